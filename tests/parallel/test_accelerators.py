"""The warning of a machine whose accelerator JAX does not use."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from resnet_jax.parallel.accelerators import advice
from tests.helpers import runs

GPU = ("0x10de", "0x2335", "0x030200")
TPU = ("0x1ae0", "0x0063", "0x120000")
# What a machine of Google's cloud has without a TPU, and another GPU's audio output.
NETWORK, DISK = ("0x1ae0", "0x0042", "0x020000"), ("0x1ae0", "0x001f", "0x010802")
AUDIO = ("0x10de", "0x22ba", "0x040300")


def machine(root: pathlib.Path, *devices: tuple, files: tuple = ()) -> pathlib.Path:
    """Writes a file system of a machine with devices on its PCI bus."""
    for number, device in enumerate(devices):
        folder = root / f"sys/bus/pci/devices/0000:00:0{number}.0"
        folder.mkdir(parents=True)
        for name, value in zip(("vendor", "device", "class"), device, strict=True):
            (folder / name).write_text(value + "\n")
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


@pytest.mark.parametrize(
    ("devices", "files", "command"),
    [
        ([GPU], ("dev/nvidia0",), "pip install 'jax[cuda13]'"),
        # Containers may list no devices.
        ([], ("dev/nvidiactl",), "pip install 'jax[cuda13]'"),
        ([], ("proc/driver/nvidia/gpus/0/information",), "pip install 'jax[cuda13]'"),
        ([NETWORK, DISK, TPU], ("dev/vfio/0",), "pip install 'jax[tpu]'"),
    ],
)
def test_the_command_that_installs_the_right_jax_is_told(
    devices, files, command, tmp_path
):
    text = advice(machine(tmp_path, *devices, files=files), installed=())
    assert f": {command}." in text and "JAX_PLATFORMS=cpu" in text


@pytest.mark.parametrize(
    ("devices", "files"), [([], ()), ([NETWORK, DISK, AUDIO], ("dev/vfio/vfio",))]
)
def test_a_machine_with_cpus_only_has_no_warning(devices, files, tmp_path):
    assert advice(machine(tmp_path, *devices, files=files), installed=()) == ""


def test_a_gpu_without_its_driver_needs_that_first(tmp_path):
    root = machine(tmp_path, AUDIO, GPU)
    assert "driver is not there" in advice(root, installed={"cuda"})
    assert "pip" not in advice(root, installed={"cuda"})
    assert "pip install 'jax[cuda13]'" in advice(root, installed=())


def test_jax_itself_says_why_a_driver_fails(tmp_path):
    root = machine(tmp_path, GPU, files=("dev/nvidia0",))
    assert advice(root, installed={"cuda"}) == ""


def test_a_tpu_that_libtpu_cannot_use_is_not_a_missing_package(tmp_path):
    text = advice(machine(tmp_path, TPU), installed={"tpu"})
    assert "no other process" in text and "pip" not in text


def test_a_gpu_that_the_user_hides_has_no_warning(tmp_path):
    root = machine(tmp_path, GPU, files=("dev/nvidia0",))
    assert advice(root, installed=(), hidden={"cuda"}) == ""


CODE = """
import pathlib, sys
from resnet_jax.parallel.sharding import find_devices
for _ in range(2):
    print(find_devices(*map(pathlib.Path, sys.argv[1:]))[0].platform)
"""


def found(root: pathlib.Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs a process that finds its devices twice."""
    environment = {"PATH": os.environ["PATH"], **environment}
    return subprocess.run(
        [sys.executable, "-c", CODE, str(root)],
        cwd=runs.ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


# libtpu looks for a TPU unless JAX_PLATFORMS leaves it out, and then waits less long.
NO_METADATA = {"TPU_SKIP_MDS_QUERY": "1"}


@pytest.mark.slow
def test_a_process_warns_once(tmp_path):
    root = machine(tmp_path, GPU, files=("dev/nvidia0",))
    done = found(root, **NO_METADATA)
    assert done.stdout == "cpu\ncpu\n"
    assert done.stderr.count("warning: This machine has an NVIDIA GPU") == 1


@pytest.mark.slow
def test_a_process_that_was_told_to_use_cpus_does_not_warn(tmp_path):
    root = machine(tmp_path, GPU, files=("dev/nvidia0",))
    assert "NVIDIA" not in found(root, JAX_PLATFORMS="cpu").stderr
    hidden = found(root, CUDA_VISIBLE_DEVICES="", **NO_METADATA)
    assert hidden.stdout == "cpu\ncpu\n" and "NVIDIA" not in hidden.stderr


# A /dev with the file of NVIDIA's driver, in a mount namespace of its own.
FAKE_DEV = """
set -e
mount -t tmpfs tmpfs "$1"
for name in null zero urandom random; do
  touch "$1/$name" && mount --bind "/dev/$name" "$1/$name"
done
mkdir "$1/shm" && mount -t tmpfs tmpfs "$1/shm"
touch "$1/nvidia0"
mount --rbind "$1" /dev
shift
exec "$@"
"""


@pytest.mark.slow
def test_jax_does_not_warn_a_second_time(tmp_path):
    inside = ["unshare", "-rm", "sh", "-c", FAKE_DEV, "sh", str(tmp_path)]
    if (
        not shutil.which("unshare")
        or subprocess.run([*inside, "true"], capture_output=True).returncode
    ):
        pytest.skip("this system lets nobody mount a /dev of his own")
    environment = {"PATH": os.environ["PATH"], **NO_METADATA}

    def run(code: str, **more: str) -> str:
        done = subprocess.run(
            [*inside, sys.executable, "-c", code],
            cwd=runs.ROOT,
            env=environment | more,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    # Alone, JAX does: this test has something to hold back.
    assert "An NVIDIA GPU may be present" in run("import jax; jax.devices()")
    text = run(CODE)
    assert text.count("NVIDIA GPU") == text.count("'jax[cuda13]'") == 1
    assert "NVIDIA" not in run(CODE, CUDA_VISIBLE_DEVICES="")
