"""The choice of a convolution's lowering on CPUs."""

import itertools
import json

import jax
import jax.numpy as jnp
import pytest

from resnet_jax.kernels import onednn
from resnet_jax.kernels.conv import convolve
from resnet_jax.kernels.cpu import conv
from resnet_jax.kernels.cpu.conv import blocks_of_groups, choose_lowering
from resnet_jax.kernels.cpu.lowerings import LOWERINGS, possible_lowerings
from resnet_jax.kernels.geometry import Geometry
from tests.helpers import runs
from tests.helpers.convolutions import KINDS, draw_problem, same


def test_the_chosen_lowering_can_compute_the_convolution(monkeypatch):
    options = itertools.product(
        KINDS, LOWERINGS, (1, 64), ("float32", "bfloat16"), (False, True)
    )
    for (k, geometry, h, _, c, _), direction, b, dtype, flag in options:
        monkeypatch.setattr(conv, "xla_uses_onednn", lambda flag=flag: flag)
        size = geometry.output_length(h, 0, k)
        chosen = choose_lowering(direction, b, size, c, k, geometry, dtype)
        assert chosen in possible_lowerings(direction, k, geometry)


@pytest.mark.parametrize("cpu", ["widens", "has_amx", "neither"])
def test_onednn_is_chosen_where_it_is_faster(monkeypatch, cpu):
    monkeypatch.setattr(onednn, "computes", lambda dtype: dtype != "float16")
    monkeypatch.setattr(onednn, "widens", lambda: cpu == "widens")
    monkeypatch.setattr(onednn, "has_amx", lambda: cpu == "has_amx")
    amx = cpu == "has_amx"

    def chosen(direction, b, size, k, dtype="float32", stride=1):
        return choose_lowering(direction, b, size, 64, k, Geometry(stride), dtype)

    for direction in LOWERINGS:
        assert chosen(direction, 128, 32, 3) == "onednn"
        assert chosen(direction, 128, 32, 3, "bfloat16") == "onednn"
        assert chosen(direction, 32, 7, 3) == "onednn"
        # Few pixels.
        some = chosen(direction, 32, 7, 3, "bfloat16")
        assert (some == "onednn") == (cpu != "neither")
        few = chosen(direction, 1, 14, 3, "bfloat16")
        assert (few == "onednn") == (amx and direction == "forward")
        assert (chosen(direction, 32, 56, 1, "bfloat16") == "onednn") == amx
        assert chosen(direction, 1, 56, 3) == "onednn"
        assert chosen(direction, 32, 56, 1) == "matmul"
        assert chosen(direction, 128, 32, 3, "float16") != "onednn"
    assert chosen("input", 32, 7, 3, "bfloat16", stride=2) == "onednn"


@pytest.mark.parametrize(
    ("channels", "groups", "blocks"),
    [(128, 32, 4), (1024, 32, 32), (256, 2, 2), (72, 6, 2), (16, 4, 1)],
)
def test_blocks_of_groups_have_at_least_32_channels_if_there_are_as_many(
    channels, groups, blocks
):
    assert blocks_of_groups(channels, groups) == blocks


def test_the_transposition_of_an_image_does_not_compute_it_again():
    geometry = Geometry(1, same(1))
    x, kernel, g = draw_problem(3, geometry, 8, 8, 16, 16, "float32")
    chosen = choose_lowering("kernel", *x.shape[:2], 16, 3, geometry, x.dtype)
    assert chosen == "convolution"

    def loss(kernel, x):
        return jnp.vdot(convolve(jnp.maximum(x, 0.5), kernel, geometry), g)

    text = jax.jit(jax.grad(loss)).lower(kernel, x).compile().as_text()
    transposed = [part for part in text.split("\n\n") if " transpose(" in part]
    assert transposed
    assert not any(" maximum(" in part for part in transposed)


# XLA reads the flags in `XLA_FLAGS` once, at the start of a process.
XLAS_ONEDNN = """
import json
import jax
from resnet_jax.kernels.conv import convolve
from resnet_jax.kernels.cpu.conv import xla_uses_onednn
from resnet_jax.kernels.geometry import Geometry
from resnet_jax.kernels.plain import convolution

geometry = Geometry(1, ((1, 1), (1, 1)))
x, kernel, g = (
    jax.random.normal(jax.random.key(i), shape, "bfloat16")
    for i, shape in enumerate([(4, 16, 16, 64), (3, 3, 64, 64), (4, 16, 16, 64)])
)

def differences(*arrays):
    def directions(convolution, *arrays):
        x, kernel, g = arrays
        out, pull = jax.vjp(lambda x, k: convolution(x, k, geometry), x, kernel)
        return out, *pull(g)
    wide = directions(convolution, *(array.astype("float32") for array in arrays))
    for ours, xlas in zip(directions(convolve, *arrays), wide):
        yield float(abs(ours.astype("float32") - xlas).max() / abs(xlas).max())

compiled = jax.jit(lambda x, k: convolve(x, k, geometry)).lower(x, kernel).compile()
calls = "onednn$convolution" in compiled.as_text()
print(json.dumps([xla_uses_onednn(), calls, list(differences(x, kernel, g))]))
"""


def test_xla_does_not_use_onednn_where_jax_has_no_cpus(monkeypatch):
    def no_devices(backend):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_experimental_onednn_custom_call=true")
    monkeypatch.setattr(jax, "local_devices", no_devices)
    assert not conv.xla_uses_onednn.__wrapped__()


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["true", "false"])
def test_xla_uses_onednn_if_a_flag_says_so_and_computes_the_convolution(flag):
    # With several devices, this package does not use oneDNN itself if it is installed.
    environment = {
        "XLA_FLAGS": f"--xla_cpu_experimental_onednn_custom_call={flag}",
        "JAX_NUM_CPU_DEVICES": "2",
    }
    code, output = runs.run_python("-c", XLAS_ONEDNN, **environment)
    assert code == 0, output
    uses, calls, differences = json.loads(output.splitlines()[-1])
    assert uses == calls
    # Sums of up to 1024 terms in float32, rounded once to bfloat16's 8 digits.
    assert max(differences) < 2**-8
    if flag == "false":
        assert not uses
    elif not uses:
        pytest.skip("no oneDNN in XLA before jax 0.12, or no bfloat16 in this CPU")
