"""What the text of a compiled program says: cycles, and what crosses the network."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator

KINDS = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
# An operation's name, the shapes of its result, what it is, and the rest.
OPERATION = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<shapes>.*?) (?P<kind>[a-z][\w\-]*)"
    r"\((?P<rest>.*)"
)
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
SHAPE = re.compile(r"\b(pred|[a-z]+\d\w*)\[([\d,]*)\](\{[^}]*\})?")
CHAIN = re.compile(r'chain_id="\d+"')
# Between slices of TPUs, libtpu leaves a collective to its runtime, Megascale: each
# device sends its part to the host and receives the result.
MEGASCALE = '_xla_host_transfer_handler_name="xla_megascale_runtime"'
TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
# Either slices (numbered from 1) and devices in them, "{1,2}x{0:7}", or groups of
# devices, whose numbers count 100,000 a slice.
BETWEEN = re.compile(
    r'_xla_megascale_target=(?:"\{(?P<slices>[\d,:]+)\}|\{\{(?P<devices>[\d,]+)\})'
)
DEVICES_A_SLICE = 100_000
# A layout says so of what does not lie in the main memory.
ELSEWHERE = re.compile(r"S\([1-9]\d*\)")
# These move nothing themselves.
STILL = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota"),
    *("after-all", "partition-id", "replica-id", "while", "conditional"),
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """An operation between devices.

    Attributes:
      kind: such as `all-reduce`.
      elements: how many numbers each device gets out of it; of a reduce-scatter, how
        many each puts in.
      bytes: of these.
      devices: how many devices take part in one group of it; 0: all.
      times: how often a step does it.
      slices: how many slices take part, if it goes through the data-centre network, on
        which there is one device of each in a group; 0: it stays in the fast network.
    """

    kind: str
    elements: int
    bytes: int
    devices: int
    times: int = 1
    slices: int = 0


def estimated_cycles(text: str) -> int:
    """The compiler's own estimate of a program: the sum over its entry computation.

    A loop that has no estimate counts as its body times its known trips, a branch as
    the longest of its kind. 0 for compilers that estimate nothing, as XLA's for CPUs.
    """

    def cycles(lines: list[str]) -> list[int]:
        return [int(found[1]) if (found := CYCLES.search(x)) else 0 for x in lines]

    return _total(text, cycles)


def hbm_bytes(text: str) -> int:
    """Bytes that a program reads from the main memory and writes to it.

    The operands and results of all operations of the entry computation, but for what
    the compiler keeps in memories on the chip, which the `bytes accessed` of
    `cost_analysis` include; that can be most of a small network's. What is only sliced
    counts as its slices, but where a part of an array is written it counts whole.
    """
    return _total(text, functools.partial(_moved, computations=_computations(text)))


def repeated_bytes(text: str) -> int:
    """Bytes that loops move in all memories in each trip but the first.

    The `bytes accessed` of `cost_analysis` count a loop's body once.
    """
    moved = functools.partial(_moved, computations=_computations(text), everywhere=True)
    return _total(text, moved) - _total(text, moved, repeats=False)


def repeats_products(text: str) -> bool:
    """Whether a loop multiplies, whose operations `cost_analysis` counts once."""
    computations = _computations(text)

    def multiplies(name: str) -> bool:
        return any(
            re.search(r" (?:convolution|dot)\(", line)
            or any(map(multiplies, re.findall(r"calls=%?([\w.\-]+)", line)))
            for line in computations[name]
        )

    loops = [
        loop
        for lines in computations.values()
        for line in lines
        if (loop := _loop(line, computations))
    ]
    return any(trips > 1 and multiplies(body) for body, trips in loops)


def _moved(
    lines: list[str], computations: dict[str, list[str]], everywhere: bool = False
) -> list[int]:
    """Of each line of a computation, the bytes in and out of the main memory.

    With `everywhere`, of all memories.
    """
    operations = [OPERATION.match(line) for line in lines]
    arrays = {
        one["name"]: _arrays(one["shapes"], everywhere) for one in operations if one
    }
    found = []
    for one in operations:
        kind = one["kind"] if one else STILL[0]
        if kind in STILL or kind.endswith("-done"):
            found.append(0)
        elif kind in ("copy-start", "slice-start"):
            # From one memory to another: both are in the result, and then flags.
            (size, main), (others, other_main) = arrays[one["name"]][:2]
            found.append(min(size, others) * (main + other_main))
        else:
            total = sum(size for size, main in arrays[one["name"]] if main)
            if kind == "send":
                # Its result is its operand, which is only read.
                total = 0
            for index, name in enumerate(_operands(one)):
                size = sum(size for size, main in arrays.get(name, []) if main)
                if size and kind == "fusion":
                    size = min(size, _read(_fused(one), index, computations))
                total += size
            found.append(total)
    return found


def _read(name: str, index: int, computations: dict[str, list[str]]) -> int:
    """Bytes that a fused computation reads of an operand, of a slice only its own."""
    operations = [one for line in computations[name] if (one := OPERATION.match(line))]
    own = next(
        one
        for one in operations
        if one["kind"] == "parameter" and one["rest"].startswith(f"{index})")
    )
    total = 0
    for one in operations:
        operands = _operands(one)
        for position, operand in enumerate(operands):
            if operand != own["name"]:
                continue
            if one["kind"] == "fusion":
                total += _read(_fused(one), position, computations)
            else:
                sliced = one["kind"] in ("slice", "dynamic-slice") and not position
                total += sum(s for s, _ in _arrays((one if sliced else own)["shapes"]))
    return total


def _operands(operation: re.Match) -> list[str]:
    return re.findall(r"%([\w.\-]+)", operation["rest"].partition(")")[0])


def _fused(fusion: re.Match) -> str:
    """The name of what a fusion computes."""
    return re.search(r"calls=%?([\w.\-]+)", fusion["rest"])[1]


def _arrays(shapes: str, everywhere: bool = False) -> list[tuple[int, bool]]:
    """Bytes of each array of a type, and whether it lies in the main memory.

    With `everywhere`, in any.
    """
    return [
        (_size(dtype, shape)[1], everywhere or not ELSEWHERE.search(layout))
        for dtype, shape, layout in SHAPE.findall(shapes)
    ]


def _total(
    text: str, of_lines: Callable[[list[str]], list[int]], repeats: bool = True
) -> int:
    """The sum of a figure over the entry computation, and over what it repeats.

    Without `repeats`, loops count as one trip.
    """
    computations = _computations(text)

    def total(name: str) -> int:
        lines = computations[name]
        found = of_lines(lines)
        for i, line in enumerate(lines):
            if found[i]:
                continue
            if loop := _loop(line, computations):
                body, trips = loop
                found[i] = (trips if repeats else 1) * total(body)
            elif branches := _branches(line):
                found[i] = max(map(total, branches))
        return sum(found)

    return total(_entry(text))


def collectives(text: str) -> list[Collective]:
    """All operations between devices of a program, one that loops repeat once."""
    computations = _computations(text)

    def lines(name: str, times: int) -> Iterator[tuple[str, int, bool]]:
        # How libtpu writes a reduce-scatter: of its sum each device keeps a part.
        scatters = name.startswith("all-reduce-scatter")
        for line in computations[name]:
            yield line, times, scatters
            if loop := _loop(line, computations):
                body, trips = loop
                yield from lines(body, times * trips)
            elif called := _branches(line) or re.findall(r"calls=%?([\w.\-]+)", line):
                for inner in called:
                    yield from lines(inner, times)

    found, chains = [], set()
    for line, times, scatters in lines(_entry(text), 1):
        operation = OPERATION.match(line)
        if not operation:
            continue
        if operation["kind"] == "send" and MEGASCALE in operation["rest"]:
            found.append(_between_slices(operation, times))
        kind = operation["kind"].removesuffix("-start")
        if kind not in KINDS:
            continue
        # libtpu starts one in a fusion, goes on with it in others, ends it in a last.
        chain = CHAIN.search(operation["rest"])
        if chain and chain[0] in chains:
            continue
        chains.add(chain and chain[0])
        sizes = [
            _size(dtype, shape)
            for dtype, shape, _ in SHAPE.findall(operation["shapes"])
        ]
        if operation["kind"].endswith("-start") and kind != "all-reduce":
            # The result of these starts with the operand, and may end with flags.
            sizes = [max(sizes, key=lambda size: size[1])]
        elements, size = map(sum, zip(*sizes, strict=True))
        devices = group_size(operation["rest"])
        if scatters:
            kind = "reduce-scatter"
        elif operation["kind"] == "reduce-scatter":
            # Its result is a device's part.
            elements, size = elements * devices, size * devices
        found.append(Collective(kind, elements, size, devices, times))
    return found


def _between_slices(send: re.Match, times: int) -> Collective:
    """Returns the collective that a device's transfer to Megascale is a part of."""
    transfer, target = TRANSFER.search(send["rest"]), BETWEEN.search(send["rest"])
    if not (transfer and target):
        raise ValueError(f"no known form of a transfer between slices: {send[0]}")
    kind = transfer[1].lower().replace("_", "-")
    if target["slices"]:
        slices = sum(_length(part) for part in target["slices"].split(","))
    else:
        numbers = target["devices"].split(",")
        slices = len({int(number) // DEVICES_A_SLICE for number in numbers})
    dtype, shape, _ = SHAPE.search(send["shapes"]).groups()
    elements, size = _size(dtype, shape)
    if kind == "all-gather":
        # It sends its own part of what it gets.
        elements, size = elements * slices, size * slices
    return Collective(kind, elements, size, slices, times, slices)


def _length(part: str) -> int:
    """Returns how many numbers a part such as `3` or `0:7` (with 7) stands for."""
    first, _, last = part.partition(":")
    return int(last or first) - int(first) + 1


def group_size(text: str) -> int:
    """Size of the groups in any of XLA's ways to write `replica_groups`; 0: all.

    Operations that name pairs of devices, such as permutes, have groups of two.
    """
    # {{0,1},{2,3}}: the groups themselves.
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return len(listed[1].split(","))
    # [4,2]<=[8]: four groups of two.
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]<=", text):
        return int(tiled[1])
    # mesh['x'=4,'y'=2] {'y'} or mesh['x'=8] {'x':(4)2}: along axes, or parts of them.
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        along = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in along)
    if "source_target_pairs" in text:
        return 2
    if "replica_groups={}" in text:
        return 0
    raise ValueError(f"no known form of replica_groups: {text}")


def _size(dtype: str, shape: str) -> tuple[int, int]:
    """Elements and bytes of an array such as `bf16[3,64]`."""
    elements = math.prod(int(n) for n in shape.split(",") if n)
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    return elements, math.ceil(elements * bits / 8)


# All figures of a program are read from the same text.
@functools.lru_cache(maxsize=1)
def _computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation by its name."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            lines = found.setdefault(head[1], [])
        elif line.startswith(" "):
            lines.append(line)
    return found


def _entry(text: str) -> str:
    return re.search(r"^ENTRY %?([\w.\-]+) ", text, re.MULTILINE)[1]


def _loop(line: str, computations: dict[str, list[str]]) -> tuple[str, int] | None:
    """Body and trips (1 where they cannot be told) of a loop, if this is one."""
    called = re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
    if not called:
        return None
    condition, body = called.groups()
    if trips := TRIPS.search(line):
        return body, int(trips[1])
    # Compilers for TPUs do not tell; what `scan` makes counts from 0 to a constant.
    text = "\n".join(computations[condition])
    limits = re.findall(r" [su]32\[\]\S* constant\((\d+)\)", text)
    counts = len(limits) == 1 and "direction=LT" in text
    return body, int(limits[0]) if counts else 1


def _branches(line: str) -> list[str]:
    """The computations that a conditional chooses from, if this is one."""
    if " conditional(" not in line:
        return []
    if listed := re.search(r"branch_computations=\{(.*?)\}", line):
        return re.findall(r"[\w.\-]+", listed[1])
    return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line)
