"""oneDNN's convolutions are XLA's, to rounding; without a compiler there are none."""

import json

import numpy as np
import pytest

from tests import runs

# For a process of its own, of one device.
KINDS = """
import itertools, json, logging
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from resnet_jax.models import onednn
from resnet_jax.models.cpu_conv import convolve
from resnet_jax.models.cpu_forms import FORMS, Geometry, apply, convolution
from tests.models.test_cpu_conv import KINDS, call, draw

def wide(x):
    return x.astype(jnp.float32)

def difference(found, wanted):
    return float(abs(wide(found) - wanted).max() / abs(wanted).max())

logging.basicConfig(level=logging.WARNING)
print("uses", onednn.computes("float32"), onednn.computes("bfloat16"))
"""
DIRECTIONS = """
worst = {}
for dtype, kind, b in itertools.product(("float32", "bfloat16"), KINDS, (1, 7)):
    if not onednn.computes(dtype):
        continue
    k, where, h, w, c, f = kind
    g = where.output(h, 0, k), where.output(w, 1, k), f
    x, kernel, g = draw(dtype, b, h, w, c), draw(dtype, k, k, c, f), draw(dtype, b, *g)
    for direction in FORMS:
        found = call(direction, "onednn", x, kernel, g, where)
        assert found.dtype == dtype
        wanted = call(direction, "convolution", *map(wide, (x, kernel, g)), where)
        worst[dtype] = max(worst.get(dtype, 0), difference(found, wanted))
print(json.dumps(worst))
"""
DERIVATIVES = """
AUTO = jax.sharding.AxisType.Auto
where = Geometry(1, ((1, 1), (1, 1)))
x, kernel = draw("float32", 16, 16, 18, 8), draw("float32", 3, 3, 8, 4)

def loss(convolve, kernel, x):
    return jnp.sum(jnp.sin(convolve(x, kernel, where)))

def all_of(convolve):
    grad = jax.grad(loss, 1)
    def twice(kernel, x):
        return jnp.sum(grad(convolve, kernel, x) ** 2)
    each = jax.vmap(lambda x: grad(convolve, kernel, jnp.stack([x] * 16)))(x[:3])
    shared = jax.shard_map(
        lambda kernel, x: jax.lax.psum(grad(convolve, kernel, x), "data"),
        mesh=jax.make_mesh((1,), ("data",), (AUTO,)),
        in_specs=(P(), P("data")),
        out_specs=P(),
    )
    return (
        grad(convolve, kernel, x),
        jax.grad(twice)(kernel, x),
        jax.grad(jax.checkpoint(lambda k: loss(convolve, k, x)))(kernel),
        each,
        shared(kernel, x),
    )

text = jax.jit(all_of, static_argnums=0).lower(convolve).compile().as_text()
assert onednn.TARGET in text
both = zip(all_of(convolve), all_of(convolution))
print(json.dumps([difference(found, wanted) for found, wanted in both]))
"""


def run(*code: str, **environment: str) -> str:
    environment = {"JAX_NUM_CPU_DEVICES": "1", **environment}
    status, output = runs.run_python("-c", "".join(code), **environment)
    assert status == 0, output
    return output


def test_every_direction_is_that_of_the_convolution():
    output = run(KINDS, DIRECTIONS)
    assert "uses True" in output
    worst = json.loads(output.splitlines()[-1])
    # Sums of up to 2000 terms in another order; bfloat16's 8 digits, rounded once.
    assert worst.pop("float32") < 1e-5
    assert all(one < 2**-8 for one in worst.values())


def test_it_has_derivatives_batches_and_meshes():
    differences = json.loads(run(KINDS, DERIVATIVES).splitlines()[-1])
    assert len(differences) == 5
    # As above.
    assert max(differences) < 1e-5


@pytest.mark.parametrize(
    ("compiler", "told"),
    [
        ("false", "false failed: no reason given"),
        ("no-such-c++", "no-such-c++: No such"),
    ],
)
def test_without_a_compiler_it_is_said_and_xla_convolves(compiler, told):
    output = run(KINDS, CXX=compiler)
    assert "uses False False" in output
    assert output.count(told) == 1
    assert "needs a C++ compiler" in output


def test_several_devices_keep_what_xla_can_divide():
    assert "uses False False" in run(KINDS, JAX_NUM_CPU_DEVICES="2")


def test_a_run_with_it_is_the_same_twice(tmp_path):
    flags = ["--config=configs/quickstart.py", "--config.total.steps=3"]
    flags += ["--config.optim.warmup.steps=1"]
    flags += ["--config.model.name=cifar_resnet20", "--config.model.dtype=bfloat16"]
    for name in "ab":
        status, output = runs.run(tmp_path / name, *flags, JAX_NUM_CPU_DEVICES="1")
        assert status == 0, output
    one, other = (runs.final_arrays(tmp_path / name) for name in "ab")
    assert one
    assert all(np.array_equal(one[key], other[key]) for key in one)
