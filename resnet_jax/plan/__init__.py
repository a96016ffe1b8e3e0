"""Tells whether a run fits and how fast it will be, before a machine is rented.

python -m resnet_jax.plan --config=configs/r50.py --topology=v5e:16x16

compiles the train step and the evaluation step of a config and prints what the compiler
reports. The devices are a TPU slice, which need not be there (`pip install libtpu`),
several slices that the data-centre network connects (`--topology='2*v5e:16x16'`), or
those of this machine (`--topology=local`, the default). Several topologies, batch sizes
and placements of parameters (`--sharding=replicated,fsdp`), with commas between them,
are printed side by side. `--config.KEY=VALUE` sets a key of the config, such as
`--config.model.name=resnet101`. Data sets of known size, such as ImageNet, need not be
on disk; `--config.data.source=fake:CLASSES:IMAGES` takes the place of any other.

The compiler reports memory, operations, bytes, cycles and collectives. Time is an
estimate. Computation takes the longest of operations / peak, bytes of the main memory /
bandwidth, and cycles / clock. The time of the collectives is added, as none of them is
assumed to overlap with computation. The clock is that at which a chip's matrix units
reach its published peak; `compiler/chips.py` has the peaks and their sources.

Cycles are cautious: of the published bandwidth, libtpu 0.0.52 expects 80 % for sums of
float32 arrays, but only 50 % for bfloat16. For chips with published rates of ResNet-50
(v3, v4), the time of computation in bfloat16 is therefore divided by a factor, but it
is never below what the peaks allow. The rates without the factor and by the peaks alone
are printed below, and so is the deviation of each published rate from the estimate
(`resnet_jax/plan/calibration.py`). The factors are for libtpu 0.0.52. Other versions
compile, too (0.0.30 and later were tried): the table names the version that did, and
marks with a * each figure that uses a factor of another version.

If images grow during a run, all its steps are taken to have the last size. Only the
eval split is evaluated, not `evaluate.sets`. A step is bound by the network between the
chips if that takes longer than computation. Otherwise it is bound by operations or by
memory, whichever takes longer by the peaks.

A collective runs in rings along the axes of a torus. An all-reduce of B bytes over n
chips takes 2 (n - 1) / n B / bandwidth, and 2 us for each hop along half of every ring.
Beyond a pod, each chip's share goes once more through the data-centre network.

For several slices the compiler splits each collective into one inside every slice and
one between the slices, in which one device of each slice takes part. The bytes between
slices are counted apart. Over s slices, (s - 1) / s of them (twice that for an
all-reduce) are sent at the bandwidth of a chip in the data-centre network. Where no
bandwidth is published (v3, v4), no speed is printed. The efficiency on other numbers of
chips is that of more or fewer slices of the same size.

`--sweep` compiles the train step with one compiler option after the other and prints
those that save cycles; `resnet_jax/compiler/options.py` has the options of each chip.

A compilation takes minutes. Its figures are kept in the user's cache directory, by
config, topology, versions and code (`--fresh` compiles again).
"""
