"""Whether a run fits and how fast it will be, before a machine is rented.

python -m resnet_jax.plan --config=configs/r50.py --topology=v5e:16x16

compiles the train and the evaluation step of a config for a TPU slice, with no TPU
there (`pip install libtpu`), for several slices that the data-centre network connects
(`--topology='2*v5e:16x16'`), or for this machine's own devices (`--topology=local`, the
default), and tells what the compiler says of them. Several topologies, batch sizes and
ways in which parameters lie (`--sharding=replicated,fsdp`), with commas between them,
stand side by side. Overrides are those of the program: `--config.model.name=resnet101`.
Data sets of known size, such as ImageNet, need not be there; another one can be stood
in for by `--config.data.source=fake:CLASSES:IMAGES`.

What comes from the compiler: memory, operations, bytes, cycles and collectives. Time is
an estimate: the longest of operations / peak, bytes of the main memory / bandwidth and
cycles / clock, and then that of the collectives, none of which is taken to hide behind
computation. The clock is that at which a chip's multipliers reach its published peak;
`compiler/chips.py` has the peaks and their sources. Cycles are cautious: of the
published bandwidth, libtpu 0.0.52 expects 80 % for sums of float32 arrays, but only
50 % for bfloat16. So in bfloat16 the time of computation is divided by a factor for
chips of which rates of ResNet-50 were published (v3, v4), but never below what the
peaks allow; the rates without the factor and by the peaks alone stand below, and how
far each published rate is from the estimate (`resnet_jax/plan/calibration.py`). The
factors are of libtpu 0.0.52. Other versions compile, too (0.0.30 and later were tried):
the table names the one that did, and marks with a * what a factor of another one gave.

Where images grow during a run, all its steps are taken to be those of the last size;
of what is evaluated only the split counts, not `evaluate.sets`. A step is bound by the
network between the chips where that takes longer than computation, else by operations
or memory, whichever takes longer by the peaks.

A collective goes in rings along the axes of a torus: an all-reduce of B bytes over n
chips takes 2 (n - 1) / n B / bandwidth, and 2 us for each hop along half of every ring;
beyond a pod, each chip's share goes once more through the data-centre network.

With several slices the compiler splits each collective into one inside every slice and
one between the slices, in which a device of each slice takes part. The bytes of the
latter are counted apart, and take (s - 1) / s of them, twice for an all-reduce, over s
slices at the bandwidth of a chip in the data-centre network. Where none is published
(v3, v4), no speed is told. The efficiency on other numbers of chips is that of more or
fewer slices of the same size.

`--sweep` compiles the train step with one option of the compiler after the other and
prints those that save cycles; `resnet_jax/compiler/options.py` has them by chip.

A compilation takes minutes; its figures are kept in the user's cache directory, by
config, topology, versions and code (`--fresh` compiles anew).
"""
