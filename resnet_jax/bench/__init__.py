"""Measures, side by side in one run: `python -m resnet_jax.bench WHAT`.

step: images/s of the train step on this machine's CPUs, against a network of stock
Linen layers and torchvision (or the CIFAR network in torch), eager in channels_last;
`--torch=PYTHON` is an interpreter that has torch, if this one does not; `--profile=DIR`
writes a trace and prints the ten costliest operations.
inference: images/s of the forward pass, against torch eager and torch.compile.
convolutions: GFLOP/s of every form that a network's convolutions can take on CPUs,
against XLA's own; the choice in models/cpu_conv.py is made by it.
overhead: images/s of the whole program on the fake source (loading, logging, progress)
against the same compiled step called again and again on one batch.
compile: seconds that tracing and compiling the train step take with scanned blocks,
against a tree of its own for each block (`model.scan_blocks`).
scale: 1 to 8 processes on this machine at equal work for each: bytes of collectives,
share of time in them, start-up, stall of a save, restore; save and restore of a large
network; with `--topology=v5e:2x4`, the share that `plan` expects on 8 to 4096 chips.
schedule: learning rate and weight decay over a run of a config (`--save=lr.png` draws
them); runs nothing, and needs no data if `--train_size` is given; takes overrides.
input: images/s/core of the input pipeline on JPEGs of yours, against tf.data and torch.
augment: measures nothing, but draws what a config does to its training pictures, or to
JPEGs of yours; it takes overrides as the program does: --config.data.policy=augmix.

`--json` prints a row a measurement: `name`, `value`, `unit`, `peer`, `peer_value`,
`ratio` (value / peer_value) and `spread`, the least and most of the repeats.
"""
