"""Advice on accelerators of this machine that JAX does not use.

There is none on AMD's GPUs: JAX's plugin for them (ROCm) needs a system that AMD
supports, and this package was never run on one, so no command can be recommended.
"""

import contextlib
import importlib.util
import logging
import os
import pathlib
from collections.abc import Collection, Iterator
from importlib import metadata

# Numbers of vendors and devices on the PCI bus. Google's network cards and disks are
# also on it, so TPUs are recognised by the device numbers that jax 0.12 contains.
NVIDIA, GOOGLE = "0x10de", "0x1ae0"
TPUS = (
    *("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076", "0x007c"),
    "0x0083",
)
# The class of display controllers, which GPUs are.
DISPLAY = "0x03"
# Files that NVIDIA's driver creates. Containers may have only one of them, and WSL2 has
# only the last.
DRIVER = ("dev/nvidia0", "dev/nvidiactl", "proc/driver/nvidia/gpus", "dev/dxg")
# A part of JAX's own message when it runs on CPUs although there is an accelerator.
HINT = "may be present on this machine"
SILENCE = "JAX_PLATFORMS=cpu turns this warning off."


def advice(
    root: pathlib.Path, installed: Collection[str], hidden: Collection[str] = ()
) -> str:
    """Returns what to install so that JAX uses this machine's accelerator.

    Args:
      root: The root of the file system, in which the kernel lists devices.
      installed: The accelerators for which JAX's plugin is installed: `cuda`, `tpu`.
      hidden: The accelerators that the user has hidden: `cuda`, `tpu`.

    Returns:
      One or two sentences for a user whose JAX runs on CPUs; '' if there is no
      accelerator, or if JAX itself reports why it cannot use the accelerator.
    """
    devices = list(_pci_devices(root))
    driver = any((root / path).exists() for path in DRIVER)
    gpu = any(vendor == NVIDIA and kind[:4] == DISPLAY for vendor, _, kind in devices)
    if (gpu or driver) and "cuda" not in hidden:
        install = "" if "cuda" in installed else "pip install 'jax[cuda13]'"
        if driver and not install:
            return ""
        if driver:
            return (
                "This machine has an NVIDIA GPU, but the installed jax is for CPUs"
                f" only. Install jax for GPUs: {install}. {SILENCE}"
            )
        return (
            "This machine has an NVIDIA GPU, but JAX runs on CPUs, since NVIDIA's"
            " driver is missing. Install it, or start the container with the GPU"
            " (docker run --gpus=all)"
            + (f"; then {install}" if install else "")
            + f". {SILENCE}"
        )
    tpu = any(vendor == GOOGLE and device in TPUS for vendor, device, _ in devices)
    if tpu and "tpu" not in hidden:
        if "tpu" in installed:
            return (
                "This machine has a TPU, but JAX runs on CPUs, since libtpu could not"
                " use it. Check that no other process holds the TPU, and that this one"
                f" may open /dev/vfio or /dev/accel0. {SILENCE}"
            )
        return (
            "This machine has a TPU, but the installed jax is for CPUs only. Install"
            f" jax for TPUs: pip install 'jax[tpu]'. {SILENCE}"
        )
    return ""


def installed() -> set[str]:
    """Returns the accelerators for which JAX's plugin is installed: `cuda`, `tpu`."""
    plugins = metadata.entry_points(group="jax_plugins")
    accelerators = (
        {"cuda"} if any("cuda" in plugin.name for plugin in plugins) else set()
    )
    return accelerators | ({"tpu"} if importlib.util.find_spec("libtpu") else set())


def hidden() -> set[str]:
    """Returns the accelerators that environment variables hide from this process."""
    return {"cuda"} if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") else set()


@contextlib.contextmanager
def hints_withheld() -> Iterator[list[logging.LogRecord]]:
    """Withholds JAX's own log records on accelerators that it does not use.

    Yields:
      A list to which the records are added.
    """
    withheld: list[logging.LogRecord] = []

    def withhold(record: logging.LogRecord) -> bool:
        hint = HINT in record.getMessage()
        withheld.extend([record] * hint)
        return not hint

    # JAX's module that finds the devices has a logger of this name.
    logger = logging.getLogger("jax._src.xla_bridge")
    logger.addFilter(withhold)
    try:
        yield withheld
    finally:
        logger.removeFilter(withhold)


def _pci_devices(root: pathlib.Path) -> Iterator[tuple[str, str, str]]:
    """Yields the vendor, the device and the class of each device on the PCI bus."""
    for path in (root / "sys/bus/pci/devices").glob("*"):
        with contextlib.suppress(OSError):
            names = ("vendor", "device", "class")
            vendor, device, kind = ((path / name).read_text() for name in names)
            yield vendor.strip(), device.strip(), kind.strip()
