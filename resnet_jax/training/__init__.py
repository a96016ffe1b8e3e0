"""Training and evaluation of a config: `loop.py` is the place to start reading.

- `experiment.py` turns a config into its data, network, schedule and optimiser, with
  `datasets.py`, `schedules.py`, `optim.py`, `ghost_batch.py` and `validate.py`.
- `step.py` has the pure functions of a step, with `losses.py`, `metrics.py` and
  `mixup.py`; `programs.py` compiles them for the devices.
- `loop.py` trains, with `initialization.py`, `resume.py`, `meter.py` and
  `precise_bn.py`; `evaluation.py` evaluates.
"""
