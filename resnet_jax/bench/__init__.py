"""Measures, side by side in one run: `python -m resnet_jax.bench WHAT`.

A table each, without arguments those of README.md:
step: images/s of the train step on this machine's CPUs, against a network of stock
Linen layers and torchvision (or the CIFAR network in torch), eager in channels_last;
`--profile=DIR` writes a trace and prints the ten costliest operations.
inference: images/s of the forward pass, against torch eager and torch.compile.
input: images/s/core of the input pipeline on JPEGs of yours (or two photographs that
come with scikit-learn), against tf.data and torch.
compile: seconds until the train step is compiled, fresh and from the cache of compiled
programs, against stock Linen; with `--scan`, scanned blocks (`model.scan_blocks`)
against a tree of its own for each; and `main --help` against importing jax.
overhead: images/s of the whole program on the fake source (loading, logging, progress)
against the same compiled step called again and again on one batch.
all: these five.
scale: 1 to 8 processes on this machine at equal work for each: bytes of collectives,
share of time in them, start-up, stall of a save, restore; save and restore of a large
network; with `--topology=v5e:2x4`, the share that `plan` expects on 8 to 4096 chips.
convolutions: GFLOP/s of every form that a network's convolutions can take on CPUs,
against XLA's own; the choice in kernels/conv.py is made by it.

gpu: a check for a machine with one GPU, in less than eight minutes: logits against the
golden figures, the train step against stock Linen and torchvision (images/s, memory,
time until the first step has ended) and the kernels that take longest. It runs in a
checkout and needs neither Grain, tfds nor ml_collections. The exit code is 1 if a logit
differs. It keeps its results in bench_gpu.json, or in the `--json=FILE`.

Pictures, which take overrides as the program does: --config.data.policy=augmix.
schedule: learning rate and weight decay over a run of a config (`--save=lr.png` draws
them); runs nothing, and needs no data if `--train_size` is given.
augment: what a config does to its training pictures, or to JPEGs of yours.

Tables are Markdown: medians, and the least and most of the repeats, in which all
contenders run in turn. A peer that is not installed is left out, and the table says so;
`--torch=PYTHON` is an interpreter that has torch, if this one does not. `--json=FILE`
keeps what is printed: a list of tables, each with `command`, the machine, `versions`
and `rows` (see `table.row`).
"""
