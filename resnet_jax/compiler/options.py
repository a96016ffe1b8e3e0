"""Options of XLA's compiler for the train and evaluation steps, by chip.

`python -m resnet_jax.plan --sweep` finds them. README.md lists what was tried.
"""

from typing import Any

# Options by the names of `chips.CHIPS`; the comment is the command that found them.
OPTIONS: dict[str, dict[str, Any]] = {
    # python -m resnet_jax.plan --sweep --config=configs/r50.py --topology=v5e:2x4 \
    #     --per_chip=128
    "v5e": {
        "xla_tpu_scoped_vmem_limit_kib": 49152,
        "xla_tpu_async_copy_bandwidth_scaling_factor": 0.18,
    },
}
