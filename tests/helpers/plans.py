"""Makes compiled figures of plans, from which tests work out predictions by hand."""

from resnet_jax.compiler.chips import CHIPS

V5E = CHIPS["v5e"]
GIB = 2**30

# The collectives of two slices of eight chips: 100 MB are summed within each slice, and
# each chip then exchanges an eighth of them with the other slice.
BETWEEN_SLICES = [
    {"kind": "reduce-scatter", "bytes": 10**8, "devices": 8, "slices": 0, "times": 1},
    {"kind": "all-reduce", "bytes": 10**8 // 8, "devices": 2, "slices": 2, "times": 1},
]


def facts(**changes) -> dict:
    """Returns the figures of a plan for eight chips of v5e on two hosts.

    A step of 1024 images takes 100 ms by the compiler's estimate of the cycles.

    Args:
      **changes: Values that replace those of the plan.
    """
    all_reduce = {"kind": "all-reduce", "bytes": 10**8, "devices": 8, "times": 1}
    step = {
        "memory": {"parameters": 3 * GIB, "activations": 5 * GIB},
        # At the peaks of a chip, these take 10 ms, 110 ms and 50 ms.
        "flops": 1.97e12,
        "bytes": 9e10,
        "hbm_bytes": 4.095e10,
        "cycles": V5E.clock / 10,
        "collectives": [all_reduce],
    }
    evaluation = step | {"cycles": V5E.clock / 50, "collectives": []}
    plan = {
        "topology": "v5e:2x4",
        "chip": "v5e",
        "kind": V5E.kind,
        "devices": 8,
        "chips": 8,
        "hosts": 2,
        "slices": 1,
        "memory": 16 * GIB,
        "model": "resnet50",
        "dtype": "bfloat16",
        "sharding": "replicated",
        "image_size": 224,
        "batch_size": 1024,
        "eval_batch_size": 1024,
        "steps": 36_000,
        "evaluations": 36,
        "eval_images": 50_000,
        "params": 25_557_032,
        "macs": 1_000_000,
        "versions": {"jax": "1.2.3"},
        "train": step,
        "eval": evaluation,
    }
    return plan | changes


def two_slices(**changes) -> dict:
    """Returns the figures of a plan for two slices of eight chips of v5e each.

    Args:
      **changes: Values that replace those of the plan.
    """
    train = facts()["train"] | {"collectives": BETWEEN_SLICES}
    size = {"topology": "2*v5e:2x4", "slices": 2, "devices": 16, "chips": 16}
    return facts(train=train, batch_size=2048) | size | changes
