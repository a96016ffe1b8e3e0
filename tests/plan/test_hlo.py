"""Tests of reading the text of compiled programs."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from resnet_jax.parallel import sharding
from resnet_jax.plan import hlo
from resnet_jax.plan.hlo import Collective
from tests.helpers import tiny

# A program of libtpu for v5e:2x2: a loop with three gradients, followed by another
# gradient and a maximum.
SAMPLE = (pathlib.Path(__file__).parent / "v5e_2x2.hlo").read_text()
# A program of libtpu for 2*v5e:2x4: one matrix is sharded, another is replicated.
TWO_SLICES = (pathlib.Path(__file__).parent / "2_v5e_2x4.hlo").read_text()
# The bytes of a float32 array of shape [256, 256].
SQUARE = 256 * 256 * 4


def test_cycles_are_summed_over_the_entry_and_the_rounds_of_its_loops():
    # The entry has four operations, and its loop runs three times. Fused computations
    # are counted by the operations that call them.
    assert hlo.estimated_cycles(SAMPLE) == 2930 + 1722 + 3527 + 3039 + 3 * 850


def test_collectives_are_found_with_their_bytes_and_devices():
    assert hlo.collectives(SAMPLE) == [
        Collective("all-reduce", elements=2 * 256 * 256, bytes=2 * SQUARE, devices=4),
        Collective("all-reduce", elements=1, bytes=2, devices=4),
    ]


def test_bytes_of_the_main_memory_exclude_arrays_that_stay_on_the_chip():
    # The matrix is converted, fetched and written; the bfloat16 images are fetched. The
    # scalars are 16 bytes, and 24 in each of the loop's three rounds.
    images = 3 * 128 * 256 * 2
    assert hlo.hbm_bytes(SAMPLE) == 3 * SQUARE + images + 16 + 3 * 24


def test_repeated_products_and_bytes_of_loops_are_found():
    def looped(x):
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.sin(x @ x), x)

    x = jnp.ones((64, 64))
    texts = [jax.jit(f).lower(x).compile().as_text() for f in (looped, jnp.sin)]
    assert [hlo.repeats_products(text) for text in texts] == [True, False]
    repeated, nothing = map(hlo.repeated_bytes, texts)
    # There are four more rounds, each with two factors, a product and its sine, of 16
    # KiB each.
    assert 4 * 3 * 2**14 <= repeated <= 4 * 9 * 2**14
    assert nothing == 0
    assert not hlo.repeats_products(SAMPLE.replace(" convolution(", " other("))


def test_a_fusion_that_slices_an_operand_reads_only_the_slices():
    text = """
%sliced.1 (x.1: f32[8,64]) -> f32[2,64] {
  %x.1 = f32[8,64]{1,0} parameter(0)
  ROOT %s.1 = f32[2,64]{1,0} slice(%x.1), slice={[2:4], [0:64]}
}

%fused.1 (x.2: f32[8,64], y.2: f32[8,64], n.2: s32[]) -> f32[2,64] {
  %y.2 = f32[8,64]{1,0} parameter(1)
  %x.2 = f32[8,64]{1,0} parameter(0)
  %n.2 = s32[] parameter(2)
  %part.2 = f32[2,64]{1,0} fusion(%x.2), kind=kLoop, calls=%sliced.1
  %part.3 = f32[1,64]{1,0} dynamic-slice(%x.2, %n.2), dynamic_slice_sizes={1,64}
  %whole.2 = f32[2,64]{1,0} reduce-window(%y.2), window={size=4x1 stride=4x1}
  ROOT %sum.2 = f32[2,64]{1,0} add(%part.2, %whole.2)
}

ENTRY %main.1 (x: f32[8,64], y: f32[8,64], n: s32[]) -> f32[2,64] {
  %x = f32[8,64]{1,0} parameter(0)
  %y = f32[8,64]{1,0:S(1)} parameter(1)
  %z = f32[8,64]{1,0} parameter(2)
  %n = s32[] parameter(3)
  %f = f32[2,64]{1,0:S(1)} fusion(%x, %y, %n), kind=kLoop, calls=%fused.1
  ROOT %g = f32[2,64]{1,0} fusion(%x, %z, %n), kind=kLoop, calls=%fused.1
}
"""
    row = 64 * 4
    # Both calls read two rows and one row of x, and the number. The second also reads z
    # and writes its result in the main memory; y and the first result are on the chip.
    assert hlo.hbm_bytes(text) == (3 * row + 4) + (3 * row + 4 + 8 * row + 2 * row)


@pytest.mark.parametrize(
    ("condition", "trips"),
    [
        ("known", 7),
        # The number of rounds cannot be derived from this condition.
        ("direction=GT", 1),
    ],
)
def test_a_loop_counts_once_unless_its_number_of_rounds_is_known(condition, trips):
    if condition == "known":
        body = "body=%wide.region_0.1_spmd.clone.sunk"
        config = ', backend_config={"known_trip_count":{"n":"7"}}'
        text = SAMPLE.replace(body, body + config)
    else:
        text = SAMPLE.replace("direction=LT", condition)
    assert text != SAMPLE
    expected = 2930 + 1722 + 3527 + 3039 + trips * 850
    assert hlo.estimated_cycles(text) == expected


def test_a_collective_inside_a_loop_counts_once_per_round():
    mesh = tiny.mesh_of(4)

    def round_of(carried, _):
        total = jax.lax.psum(jnp.sin(carried), "data")
        return jax.lax.pcast(total, "data", to="varying"), None

    def repeated(x):
        return jax.lax.scan(round_of, x, length=5)[0]

    spec = sharding.batch_sharding(mesh).spec
    both = jax.shard_map(repeated, mesh=mesh, in_specs=spec, out_specs=spec)
    x = jax.ShapeDtypeStruct(
        (8, 3), jnp.float32, sharding=sharding.batch_sharding(mesh)
    )
    text = jax.jit(both).lower(x).compile().as_text()
    collectives = hlo.collectives(text)
    # Each device has two rows of three numbers.
    assert sum(each.times * each.bytes for each in collectives) == 5 * 2 * 3 * 4
    assert {each.devices for each in collectives} == {4}
    assert hlo.estimated_cycles(text) == 0, "XLA's compiler for CPUs estimates nothing"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "%g = bf16[8,64]{1,0} all-gather(%x), replica_groups=[1,4]<=[4],"
            " dimensions={0}",
            Collective("all-gather", 512, 1024, 4),
        ),
        (
            "%g = (f32[2,64]{1,0}, f32[8,64]{1,0}) all-gather-start(%x),"
            " replica_groups={{0,1,2,3}}, dimensions={0}",
            Collective("all-gather", 512, 2048, 4),
        ),
        (
            "%p = (f32[5]{0}, f32[5]{0}, u32[]{:S(2)}, u32[]{:S(2)})"
            " collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}",
            Collective("collective-permute", 5, 20, 2),
        ),
        (
            "%r = (f32[3]{0}, pred[]) all-reduce-start(%x, %y), replica_groups={}",
            Collective("all-reduce", 4, 13, 0),
        ),
        # Each device receives a fourth of the array that it contributes.
        (
            "%s = f32[2,64]{1,0} reduce-scatter(%x), replica_groups=[1,4]<=[4],"
            " dimensions={0}",
            Collective("reduce-scatter", 512, 2048, 4),
        ),
    ],
)
def test_every_form_of_a_collective_counts_its_result_once(line, expected):
    done = "  %d = f32[3]{0} all-reduce-done(%r)"
    text = f"ENTRY %main (x: f32[3]) -> f32[3] {{\n  {line}\n{done}\n}}\n"
    assert hlo.collectives(text) == [expected]


def test_libtpus_fused_form_of_a_reduce_scatter_is_recognized():
    groups = "replica_groups={{0,1,2,3}}"
    text = (
        "%all-reduce-scatter.1 (input: f32[8,5]) -> f32[2,5] {\n"
        f"  %a = f32[8,5]{{1,0}} all-reduce(%input), {groups}\n"
        "  ROOT %p = f32[2,5]{1,0} dynamic-slice(%a, %i, %zero)\n}\n"
        "ENTRY %main (x: f32[8,5]) -> f32[2,5] {\n"
        "  %f = f32[2,5]{1,0} fusion(%x), calls=%all-reduce-scatter.1\n}\n"
    )
    assert hlo.collectives(text) == [Collective("reduce-scatter", 40, 160, 4)]


def test_transfers_between_slices_are_separate_collectives():
    collectives = hlo.collectives(TWO_SLICES)
    part = SQUARE // 8
    assert [each for each in collectives if each.slices] == [
        # A device gathers two sixteenths from the other slice, and the rest within its
        # own slice.
        Collective("all-gather", 2**13, part, devices=2, slices=2),
        # A device sums an eighth of each gradient, and then the loss.
        Collective("all-reduce", 2**13, part, devices=2, slices=2),
        Collective("all-reduce", 2**13, part, devices=2, slices=2),
        Collective("all-reduce", 128, 512, devices=2, slices=2),
    ]
    inside = [
        (each.kind, each.bytes, each.devices) for each in collectives if not each.slices
    ]
    assert sorted(inside) == [
        ("all-gather", SQUARE // 2, 8),
        ("all-gather", SQUARE, 8),
        ("all-gather", SQUARE, 8),
        ("all-reduce", 512, 8),
        ("reduce-scatter", SQUARE, 8),
        ("reduce-scatter", SQUARE, 8),
    ]


@pytest.mark.parametrize(
    ("target", "slices"),
    [
        ('"{1,2,3}x{0:3}"', 3),
        ('"{1:4}x{0}"', 4),
        ('"{1,3:4}x{0:7}"', 3),
        # Pairs of slices exchange data, which groups of devices express.
        ("{{100000,200000},{100001,200001},{300000,400000},{300001,400001}}", 2),
    ],
)
def test_all_forms_of_the_slices_of_a_transfer_are_read(target, slices):
    attributes = (
        'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="'
        f'xla_megascale_runtime",_xla_megascale_target={target},'
        '_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    text = (
        "ENTRY %main (x: f32[3]) -> f32[3] {\n"
        "  %s = (f32[4,3]{1,0:T(8,128)}, u32[], token[]) send(%x, %a), channel_id=2, "
        f"{attributes}\n"
        f"  %r = (f32[4,3]{{1,0}}, u32[], token[]) recv(%a), channel_id=1, {attributes}"
        "\n  %d = token[] send-done(%s), channel_id=2\n}\n"
    )
    assert hlo.collectives(text) == [
        Collective("all-reduce", 12, 48, devices=slices, slices=slices)
    ]


def test_a_send_reads_once_and_a_receive_writes_once():
    sent = "f32[4,3]{1,0}, u32[], token[]"
    text = (
        "ENTRY %main (x: f32[4,3]) -> f32[4,3] {\n"
        "  %x = f32[4,3]{1,0} parameter(0)\n"
        "  %a = token[] after-all()\n"
        f"  %s = ({sent}) send(%x, %a), channel_id=2\n"
        f"  %r = ({sent}) recv(%a), channel_id=1\n}}\n"
    )
    # The result of the receive also has a number of 4 bytes.
    assert hlo.hbm_bytes(text) == 48 + 48 + 4


def test_an_all_gather_in_several_fusions_counts_once():
    def gather(name: str, chain: int) -> str:
        return (
            f"  %{name} = bf16[8,5]{{1,0}} all-gather(%x), replica_groups={{{{0,1}}}},"
            f' frontend_attributes={{chain_id="{chain}"}}\n'
        )

    text = (
        f"%start (x: bf16[4,5]) -> bf16[8,5] {{\n{gather('a', 7)}}}\n"
        f"%done (x: bf16[4,5]) -> bf16[8,5] {{\n{gather('b', 7)}}}\n"
        "ENTRY %main (x: bf16[4,5]) -> bf16[8,5] {\n"
        "  %s = bf16[8,5]{1,0} fusion(%x), calls=%start\n"
        "  %d = bf16[8,5]{1,0} fusion(%s), calls=%done\n"
        f"{gather('other', 8)}}}\n"
    )
    # libtpu 0.0.52 splits an all-gather like this for v5e, to overlap it with the
    # computation of the fusions.
    assert hlo.collectives(text) == 2 * [Collective("all-gather", 40, 80, 2)]


def test_the_longest_branch_of_a_conditional_counts():
    step = '  %f = f32[] fusion(%x), backend_config={{"estimated_cycles":"{}"}}\n'
    branches = [
        f"%branch{i} (x: f32[]) -> f32[] {{\n{step.format(cycles)}}}\n"
        for i, cycles in enumerate((40, 70))
    ]
    entry = (
        "ENTRY %main (x: f32[]) -> f32[] {\n  %c = f32[] conditional(%i, %x, %x),"
        " branch_computations={%branch0, %branch1}\n}\n"
    )
    assert hlo.estimated_cycles("\n".join([*branches, entry])) == 70


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("replica_groups={{0,1},{2,3}}, use", 2),
        ("replica_groups=[2,4]<=[8], use", 4),
        ("replica_groups=[2,4]<=[4,2]T(1,0), use", 4),
        ("replica_groups=mesh['a'=4,'b'=2,'c'=1] {'b','c'}, use", 2),
        ("replica_groups=mesh['data'=8] {'data'}, use", 8),
        ("replica_groups=mesh['data'=8] {'data':(2)4}, use", 4),
    ],
)
def test_all_forms_of_replica_groups_are_read(text, size):
    assert hlo.group_size(text) == size
