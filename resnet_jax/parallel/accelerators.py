"""Accelerators of this machine that JAX does not use, and how to let it use them.

AMD's GPUs are left out: JAX's plugin for them (ROCm) needs a system that AMD supports,
and this package was never run on one, so no command could be recommended.
"""

import contextlib
import importlib.util
import logging
import os
import pathlib
from collections.abc import Collection, Iterator
from importlib import metadata

# Vendors and devices on the PCI bus. Google's network cards and disks are there, too,
# so TPUs are known by their numbers: those that jax 0.12 knows.
NVIDIA, GOOGLE = "0x10de", "0x1ae0"
TPUS = (
    *("0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076", "0x007c"),
    "0x0083",
)
DISPLAY = "0x03"
# NVIDIA's driver makes these; containers may have one of them only, and WSL2 the last.
DRIVER = ("dev/nvidia0", "dev/nvidiactl", "proc/driver/nvidia/gpus", "dev/dxg")
# How JAX's own message begins where it runs on CPUs beside an accelerator.
HINT = "may be present on this machine"
SILENCE = "JAX_PLATFORMS=cpu turns this warning off."


def advice(
    root: pathlib.Path, installed: Collection[str], hidden: Collection[str] = ()
) -> str:
    """Returns what to install so that JAX uses this machine's accelerator.

    Args:
      root: The root of the file system, in which the kernel lists devices.
      installed: What JAX has to use accelerators with, of `cuda` and `tpu`.
      hidden: The accelerators that the user does not want, of `cuda` and `tpu`.

    Returns:
      One or two sentences for a user whose JAX runs on CPUs; empty if there is no
      accelerator, or if JAX itself says why it cannot use the one that there is.
    """
    devices = list(_pci_devices(root))
    driver = any((root / path).exists() for path in DRIVER)
    gpu = any(vendor == NVIDIA and of[:4] == DISPLAY for vendor, _, of in devices)
    if (gpu or driver) and "cuda" not in hidden:
        install = "" if "cuda" in installed else "pip install 'jax[cuda13]'"
        if driver and not install:
            return ""
        if driver:
            return (
                "This machine has an NVIDIA GPU, but the installed jax is for CPUs"
                f" only. Install the one for the GPU: {install}. {SILENCE}"
            )
        return (
            "This machine has an NVIDIA GPU, but JAX runs on CPUs, since NVIDIA's"
            " driver is not there. Install it, or start the container with the GPU"
            " (docker run --gpus=all)"
            + (f"; then {install}" if install else "")
            + f". {SILENCE}"
        )
    tpu = any(vendor == GOOGLE and device in TPUS for vendor, device, _ in devices)
    if tpu and "tpu" not in hidden:
        if "tpu" in installed:
            return (
                "This machine has a TPU, but JAX runs on CPUs, since libtpu could not"
                " use it. See that no other process holds the TPU, and that this one"
                f" may open /dev/vfio or /dev/accel0. {SILENCE}"
            )
        return (
            "This machine has a TPU, but the installed jax is for CPUs only. Install"
            f" the one for the TPU: pip install 'jax[tpu]'. {SILENCE}"
        )
    return ""


def installed() -> set[str]:
    """Returns what JAX has to use accelerators with, of `cuda` and `tpu`."""
    plugins = metadata.entry_points(group="jax_plugins")
    found = {"cuda"} if any("cuda" in plugin.name for plugin in plugins) else set()
    return found | ({"tpu"} if importlib.util.find_spec("libtpu") else set())


def hidden() -> set[str]:
    """Returns the accelerators that environment variables hide from this process."""
    return {"cuda"} if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") else set()


@contextlib.contextmanager
def hints_held() -> Iterator[list[logging.LogRecord]]:
    """Holds back JAX's own messages on accelerators that it does not use.

    Yields:
      The messages, as they come.
    """
    held: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        hint = HINT in record.getMessage()
        held.extend([record] * hint)
        return not hint

    # The module that finds JAX's devices logs under its own name.
    logger = logging.getLogger("jax._src.xla_bridge")
    logger.addFilter(hold)
    try:
        yield held
    finally:
        logger.removeFilter(hold)


def _pci_devices(root: pathlib.Path) -> Iterator[tuple[str, str, str]]:
    """Yields the vendor, the device and the class of each device on the PCI bus."""
    for path in (root / "sys/bus/pci/devices").glob("*"):
        with contextlib.suppress(OSError):
            names = ("vendor", "device", "class")
            vendor, device, kind = ((path / name).read_text() for name in names)
            yield vendor.strip(), device.strip(), kind.strip()
