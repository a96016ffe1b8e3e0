"""The warning about an accelerator of this machine that JAX does not use."""

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
# A machine of Google's cloud without a TPU has these; the last is a GPU's audio output.
NETWORK, DISK = ("0x1ae0", "0x0042", "0x020000"), ("0x1ae0", "0x001f", "0x010802")
AUDIO = ("0x10de", "0x22ba", "0x040300")


def machine(root: pathlib.Path, *devices: tuple, files: tuple = ()) -> pathlib.Path:
    """Creates the file system of a machine with devices on its PCI bus."""
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
def test_the_advice_contains_the_command_that_installs_the_right_jax(
    devices, files, command, tmp_path
):
    text = advice(machine(tmp_path, *devices, files=files), installed=())
    assert f": {command}." in text and "JAX_PLATFORMS=cpu" in text


@pytest.mark.parametrize(
    ("devices", "files"), [([], ()), ([NETWORK, DISK, AUDIO], ("dev/vfio/vfio",))]
)
def test_there_is_no_advice_on_a_machine_without_an_accelerator(
    devices, files, tmp_path
):
    assert advice(machine(tmp_path, *devices, files=files), installed=()) == ""


def test_a_gpu_without_its_driver_needs_the_driver_first(tmp_path):
    root = machine(tmp_path, AUDIO, GPU)
    assert "driver is missing" in advice(root, installed={"cuda"})
    assert "pip" not in advice(root, installed={"cuda"})
    assert "pip install 'jax[cuda13]'" in advice(root, installed=())


def test_there_is_no_advice_where_jax_itself_reports_why_a_driver_fails(tmp_path):
    root = machine(tmp_path, GPU, files=("dev/nvidia0",))
    assert advice(root, installed={"cuda"}) == ""


def test_a_tpu_that_libtpu_cannot_use_is_not_a_missing_package(tmp_path):
    text = advice(machine(tmp_path, TPU), installed={"tpu"})
    assert "no other process" in text and "pip" not in text


def test_there_is_no_advice_on_a_gpu_that_the_user_hides(tmp_path):
    root = machine(tmp_path, GPU, files=("dev/nvidia0",))
    assert advice(root, installed=(), hidden={"cuda"}) == ""


CODE = """
import pathlib, sys
from resnet_jax.parallel.sharding import find_devices
for _ in range(2):
    print(find_devices(*map(pathlib.Path, sys.argv[1:]))[0].platform)
"""


def find_devices(root: pathlib.Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs a process that looks for its devices twice."""
    environment = {"PATH": os.environ["PATH"], **environment}
    return subprocess.run(
        [sys.executable, "-c", CODE, str(root)],
        cwd=runs.ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


# Unless JAX_PLATFORMS excludes TPUs, libtpu asks a metadata server. This skips that.
NO_METADATA = {"TPU_SKIP_MDS_QUERY": "1"}


@pytest.mark.slow
def test_a_process_warns_once(tmp_path):
    root = machine(tmp_path, GPU, files=("dev/nvidia0",))
    done = find_devices(root, **NO_METADATA)
    assert done.stdout == "cpu\ncpu\n"
    assert done.stderr.count("warning: This machine has an NVIDIA GPU") == 1


@pytest.mark.slow
def test_a_process_whose_user_chose_cpus_does_not_warn(tmp_path):
    root = machine(tmp_path, GPU, files=("dev/nvidia0",))
    assert "NVIDIA" not in find_devices(root, JAX_PLATFORMS="cpu").stderr
    hidden = find_devices(root, CUDA_VISIBLE_DEVICES="", **NO_METADATA)
    assert hidden.stdout == "cpu\ncpu\n" and "NVIDIA" not in hidden.stderr


# It runs a command in a mount namespace whose /dev has the file of NVIDIA's driver.
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
def test_the_warning_replaces_the_one_of_jax(tmp_path):
    inside = ["unshare", "-rm", "sh", "-c", FAKE_DEV, "sh", str(tmp_path)]
    if (
        not shutil.which("unshare")
        or subprocess.run([*inside, "true"], capture_output=True).returncode
    ):
        pytest.skip("this system does not allow a private /dev")
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

    # JAX by itself prints the warning that is to be replaced.
    assert "An NVIDIA GPU may be present" in run("import jax; jax.devices()")
    text = run(CODE)
    assert text.count("NVIDIA GPU") == text.count("'jax[cuda13]'") == 1
    assert "NVIDIA" not in run(CODE, CUDA_VISIBLE_DEVICES="")
