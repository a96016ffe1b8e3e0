"""Measures speed, start-up time and memory: `python -m resnet_jax.bench WHAT`.

Each of these prints a table. Without arguments it measures what
docs/performance.md shows.
step: images/s of the train step on this machine's CPUs. The baselines are a network of
stock Linen layers and torchvision's (for CIFAR networks, the same network in torch),
eager and in channels_last. `--profile=DIR` writes a trace and prints the ten costliest
operations.
inference: images/s of the forward pass. The baselines are torch eager and
torch.compile.
input: images/s/core of the input pipeline on your JPEGs, or on two photographs that
come with scikit-learn. The baselines are tf.data and torch.
compile: seconds to compile the train step, with an empty and with a filled compilation
cache. The baseline is stock Linen; with `--scan`, scanned blocks (`model.scan_blocks`)
are compared with unrolled ones. It also compares `main --help` with importing jax.
overhead: images/s of the whole program on the fake source (loading, logging, progress).
The baseline is the same compiled step, called in a loop on one batch.
all: the five above, one after the other.
scale: 1 to 8 processes on this machine, with equal work for each: the bytes that
collectives move, their share of a step, start-up, the stall of a save, and restoring;
then saving and restoring a large network. With `--topology=v5e:2x4`, also the share of
collectives that `plan` predicts for 8 to 4096 chips.
convolutions: GFLOP/s of every implementation of a network's convolutions on CPUs. The
baseline is XLA's own. The choice in kernels/conv.py rests on this table.

gpu: checks this library on a machine with one GPU, in less than eight minutes: logits
against the golden figures, the train step against stock Linen and torchvision
(images/s, memory, time until the first step has ended), and the costliest kernels. It
runs in a checkout and needs neither Grain, tfds nor ml_collections. The exit code is 1
if a logit differs. The results are written to bench_gpu.json, or to `--json=FILE`.

These draw pictures. They take overrides as the training command does, for example
--config.data.policy=augmix.
schedule: plots learning rate and weight decay over the run of a config
(`--save=lr.png`) and prints their ranges, without training. With `--train_size` it
needs no data.
augment: shows what a config does to its training pictures, or to your JPEGs.

Tables are in Markdown. They give medians with the minimum and maximum of the repeats;
all implementations run in turn within each repeat. A baseline that is not installed is
left out, and the table says so; `--torch=PYTHON` names an interpreter that has torch if
this one does not. `--json=FILE` also writes what is printed: a list of tables, each
with its `command`, the machine, `versions` and `rows` (see `table.row`).
show: prints the tables of such files again.
"""
