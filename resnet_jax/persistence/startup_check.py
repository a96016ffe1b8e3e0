"""Compares the processes of a run before it starts."""

from collections.abc import Mapping
from typing import Any

from resnet_jax.parallel import processes
from resnet_jax.parallel.sharding import find_devices
from resnet_jax.persistence import versions


def check_processes(settings: Mapping[str, Any]) -> None:
    """Checks that all processes have the same settings, code, devices and clocks.

    Args:
      settings: The flags and the keys of the config, by the names for the message.

    Raises:
      UserError: A process differs. The message names the first difference.
    """
    processes.check_same(
        "start",
        {
            "the number of processes": processes.count(),
            "the code of resnet_jax": versions.code_checksum(),
            **{
                f"the version of {k}": v for k, v in versions.package_versions().items()
            },
            **settings,
        },
    )
    own = [x for x in find_devices() if x.process_index == processes.index()]
    kinds = sorted({device.device_kind for device in own})
    devices = f"{len(own)} x {', '.join(kinds)}"
    processes.check_same("devices", {"their devices": devices})
    processes.check_clocks()
