"""Measures, side by side in one run: `python -m resnet_jax.bench WHAT`.

overhead: images/s of the whole program on the fake source (loading, logging, progress)
against the same compiled step called again and again on one batch.
compile: seconds that tracing and compiling the train step take with scanned blocks,
against a tree of its own for each block (`model.scan_blocks`).
schedule: learning rate and weight decay over a run of a config (`--save=lr.png` draws
them); runs nothing, and needs no data if `--train_size` is given.
input: images/s/core of the input pipeline on JPEGs of yours, against tf.data and torch.
augment: measures nothing, but draws what a config does to its training pictures, or to
JPEGs of yours; it takes overrides as the program does: --config.data.policy=augmix.

`--json` prints a row a measurement: `name`, `value`, `unit`, `peer`, `peer_value`,
`ratio` (value / peer_value) and `spread`, the least and most of the repeats.
"""
