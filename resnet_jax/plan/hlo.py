"""Reads cycles, bytes and collectives from the text of a compiled program."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator

KINDS = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
# A line of the text: an operation's name, the shapes of its result, its kind, and the
# operands and attributes.
OPERATION = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<shapes>.*?) (?P<kind>[a-z][\w\-]*)"
    r"\((?P<rest>.*)"
)
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
SHAPE = re.compile(r"\b(pred|[a-z]+\d\w*)\[([\d,]*)\](\{[^}]*\})?")
BITS = re.compile(r"\d+")
CHAIN = re.compile(r'chain_id="\d+"')
ENTRY = re.compile(r"^ENTRY %?([\w.\-]+) ", re.MULTILINE)
CALLS = re.compile(r"calls=%?([\w.\-]+)")
# Between slices of TPUs, libtpu leaves a collective to its runtime, Megascale: each
# device sends its part to the host and receives the result.
MEGASCALE = '_xla_host_transfer_handler_name="xla_megascale_runtime"'
TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
# The target of a transfer is either slices (numbered from 1) and the devices in them,
# "{1,2}x{0:7}", or groups of devices, whose numbers count 100,000 per slice.
BETWEEN = re.compile(
    r'_xla_megascale_target=(?:"\{(?P<slices>[\d,:]+)\}|\{\{(?P<devices>[\d,]+)\})'
)
DEVICES_PER_SLICE = 100_000
# Layout annotation of buffers that are not in HBM.
ELSEWHERE = re.compile(r"S\([1-9]\d*\)")
# Kinds of operations that move no bytes themselves.
STILL = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota"),
    *("after-all", "partition-id", "replica-id", "while", "conditional"),
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """An operation between devices.

    Attributes:
      kind: The kind, such as `all-reduce`.
      elements: Number of elements of a device's result, or of its operand for a
        reduce-scatter.
      bytes: Bytes of these elements.
      devices: Number of devices of a group; 0 if all devices take part.
      times: Number of times that a step executes it.
      slices: Number of slices that take part, with one device each in a group, if the
        operation uses the data-centre network; 0 if it stays in the fast network.
    """

    kind: str
    elements: int
    bytes: int
    devices: int
    times: int = 1
    slices: int = 0


def estimated_cycles(text: str) -> int:
    """Returns the compiler's own estimate of a program's clock cycles.

    It is the sum over the entry computation. A loop without an estimate counts as its
    body times its known trips, and a conditional as its longest branch. The sum is 0
    for compilers that estimate nothing, such as XLA's for CPUs.
    """

    def cycles(lines: list[str]) -> list[int]:
        return [int(match[1]) if (match := CYCLES.search(x)) else 0 for x in lines]

    return _total(text, cycles)


def hbm_bytes(text: str) -> int:
    """Returns the bytes that a program reads from the main memory and writes to it.

    They are the operands and results of all operations of the entry computation,
    without those that the compiler keeps in memories on the chip. (The `bytes accessed`
    of `cost_analysis` include these, which can be most of a small network's bytes.) An
    operand that is only sliced counts as its slices, but an array of which a part is
    written counts as the whole array.
    """
    return _total(text, functools.partial(_moved, computations=_computations(text)))


def repeated_bytes(text: str) -> int:
    """Returns the bytes that loops move, in all memories, in all trips but the first.

    The `bytes accessed` of `cost_analysis` count a loop's body only once.
    """
    moved = functools.partial(_moved, computations=_computations(text), everywhere=True)
    return _total(text, moved) - _total(text, moved, repeats=False)


def repeats_products(text: str) -> bool:
    """Returns whether a loop contains a matrix product or a convolution.

    `cost_analysis` counts the operations of a loop's body only once.
    """
    computations = _computations(text)

    def multiplies(name: str) -> bool:
        return any(
            re.search(r" (?:convolution|dot)\(", line)
            or any(map(multiplies, CALLS.findall(line)))
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
    """Returns the bytes that each line of a computation moves.

    Args:
      lines: The lines of the computation.
      computations: The lines of all computations by their names.
      everywhere: Counts bytes in all memories instead of only the main memory.
    """
    operations = [OPERATION.match(line) for line in lines]
    arrays = {x["name"]: _arrays(x["shapes"], everywhere) for x in operations if x}
    moved = []
    for operation in operations:
        if (
            operation is None
            or operation["kind"] in STILL
            or operation["kind"].endswith("-done")
        ):
            moved.append(0)
            continue
        kind, results = operation["kind"], arrays[operation["name"]]
        if kind in ("copy-start", "slice-start"):
            # The result has the arrays in both memories, and then flags.
            (size, main), (copied_size, copied_main) = results[:2]
            moved.append(min(size, copied_size) * (main + copied_main))
            continue
        # The result of a send is its operand, which is only read.
        total = 0 if kind == "send" else sum(size for size, main in results if main)
        for index, name in enumerate(_operands(operation)):
            size = sum(size for size, main in arrays.get(name, []) if main)
            if size and kind == "fusion":
                size = min(size, _read(_fused(operation), index, computations))
            total += size
        moved.append(total)
    return moved


def _read(name: str, index: int, computations: dict[str, list[str]]) -> int:
    """Returns the bytes that a fused computation reads of its operand number `index`.

    If only slices of the operand are used, only their bytes count.
    """
    operations = [x for line in computations[name] if (x := OPERATION.match(line))]
    parameter = next(
        x
        for x in operations
        if x["kind"] == "parameter" and x["rest"].startswith(f"{index})")
    )
    total = 0
    for operation in operations:
        for position, operand in enumerate(_operands(operation)):
            if operand != parameter["name"]:
                continue
            if operation["kind"] == "fusion":
                total += _read(_fused(operation), position, computations)
                continue
            is_slice = operation["kind"] in ("slice", "dynamic-slice") and not position
            arrays = _arrays((operation if is_slice else parameter)["shapes"])
            total += sum(size for size, _ in arrays)
    return total


def _operands(operation: re.Match) -> list[str]:
    """Returns the names of an operation's operands."""
    return re.findall(r"%([\w.\-]+)", operation["rest"].partition(")")[0])


def _fused(fusion: re.Match) -> str:
    """Returns the name of the computation that a fusion calls."""
    return _search(CALLS, fusion["rest"])[1]


def _arrays(shapes: str, everywhere: bool = False) -> list[tuple[int, bool]]:
    """Returns the bytes of each array of a shape, and whether they count.

    Arrays in the main memory count, and with `everywhere` all do.
    """
    return [
        (_size(dtype, shape)[1], everywhere or not ELSEWHERE.search(layout))
        for dtype, shape, layout in SHAPE.findall(shapes)
    ]


def _total(
    text: str, figures: Callable[[list[str]], list[int]], repeats: bool = True
) -> int:
    """Sums a figure over the entry computation and the computations that it calls.

    Args:
      text: The text of the program.
      figures: Returns the figure of each line of a computation.
      repeats: Counts the body of a loop as often as it runs, and not only once.
    """
    computations = _computations(text)

    def total(name: str) -> int:
        lines = computations[name]
        values = figures(lines)
        for i, line in enumerate(lines):
            if values[i]:
                continue
            if loop := _loop(line, computations):
                body, trips = loop
                values[i] = (trips if repeats else 1) * total(body)
            elif branches := _branches(line):
                values[i] = max(map(total, branches))
        return sum(values)

    return total(_entry(text))


def collectives(text: str) -> list[Collective]:
    """Returns all collectives of a program; one in a loop is listed once."""
    computations = _computations(text)

    def lines(name: str, times: int) -> Iterator[tuple[str, int, bool]]:
        # libtpu writes a reduce-scatter as an all-reduce of which each device keeps a
        # part, in a computation of this name.
        scatters = name.startswith("all-reduce-scatter")
        for line in computations[name]:
            yield line, times, scatters
            if loop := _loop(line, computations):
                body, trips = loop
                yield from lines(body, times * trips)
            elif called := _branches(line) or CALLS.findall(line):
                for inner in called:
                    yield from lines(inner, times)

    results, chains = [], set()
    for line, times, scatters in lines(_entry(text), 1):
        operation = OPERATION.match(line)
        if not operation:
            continue
        if operation["kind"] == "send" and MEGASCALE in operation["rest"]:
            results.append(_between_slices(operation, times))
        kind = operation["kind"].removesuffix("-start")
        if kind not in KINDS:
            continue
        # libtpu starts a collective in one fusion, continues it in others and ends it
        # in a last one. All have the same chain.
        chain = CHAIN.search(operation["rest"])
        if chain and chain[0] in chains:
            continue
        chains.add(chain and chain[0])
        sizes = [
            _size(dtype, shape)
            for dtype, shape, _ in SHAPE.findall(operation["shapes"])
        ]
        if operation["kind"].endswith("-start") and kind != "all-reduce":
            # The result starts with the operand, and may end with flags.
            sizes = [max(sizes, key=lambda size: size[1])]
        elements, size = map(sum, zip(*sizes, strict=True))
        devices = group_size(operation["rest"])
        if scatters:
            kind = "reduce-scatter"
        elif operation["kind"] == "reduce-scatter":
            # The result is only a device's part.
            elements, size = elements * devices, size * devices
        results.append(Collective(kind, elements, size, devices, times))
    return results


def _between_slices(send: re.Match, times: int) -> Collective:
    """Returns the collective that a device's transfer to Megascale belongs to."""
    transfer, target = TRANSFER.search(send["rest"]), BETWEEN.search(send["rest"])
    if not (transfer and target):
        raise ValueError(f"unknown form of a transfer between slices: {send[0]}")
    kind = transfer[1].lower().replace("_", "-")
    if target["slices"]:
        slices = sum(_length(part) for part in target["slices"].split(","))
    else:
        numbers = target["devices"].split(",")
        slices = len({int(number) // DEVICES_PER_SLICE for number in numbers})
    dtype, shape, _ = _search(SHAPE, send["shapes"]).groups()
    elements, size = _size(dtype, shape)
    if kind == "all-gather":
        # A device sends only its own part of the result.
        elements, size = elements * slices, size * slices
    return Collective(kind, elements, size, slices, times, slices)


def _length(part: str) -> int:
    """Returns how many numbers `3`, or a range that includes its end, `0:7`, has."""
    first, _, last = part.partition(":")
    return int(last or first) - int(first) + 1


def group_size(text: str) -> int:
    """Returns the number of devices of a group, or 0 if all devices are one group.

    XLA writes `replica_groups` in several forms. Operations that name pairs of devices,
    such as permutes, have groups of two.

    Args:
      text: The attributes of a collective.

    Raises:
      ValueError: The form is not known.
    """
    # {{0,1},{2,3}} lists the groups.
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return len(listed[1].split(","))
    # [4,2]<=[8] means four groups of two.
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]<=", text):
        return int(tiled[1])
    # mesh['x'=4,'y'=2] {'y'} means groups along an axis of a mesh, and
    # mesh['x'=8] {'x':(4)2} means groups along a part of an axis.
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        along = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in along)
    if "source_target_pairs" in text:
        return 2
    if "replica_groups={}" in text:
        return 0
    raise ValueError(f"unknown form of replica_groups: {text}")


def _size(dtype: str, shape: str) -> tuple[int, int]:
    """Returns the numbers of elements and of bytes of an array such as `bf16[3,64]`."""
    elements = math.prod(int(n) for n in shape.split(",") if n)
    bits = 8 if dtype == "pred" else int(_search(BITS, dtype)[0])
    return elements, math.ceil(elements * bits / 8)


def _search(pattern: re.Pattern[str], text: str) -> re.Match[str]:
    """Returns the first match; raises ValueError if there is none."""
    match = pattern.search(text)
    if match is None:
        raise ValueError(f"{pattern.pattern} is not in {text[:200]}")
    return match


# Each figure of a program parses the same text, which is long.
@functools.lru_cache(maxsize=1)
def _computations(text: str) -> dict[str, list[str]]:
    """Returns the lines of each computation by its name."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            lines = computations.setdefault(head[1], [])
        elif line.startswith(" "):
            lines.append(line)
    return computations


def _entry(text: str) -> str:
    """Returns the name of the entry computation."""
    return _search(ENTRY, text)[1]


def _loop(line: str, computations: dict[str, list[str]]) -> tuple[str, int] | None:
    """Returns the body and the trips (1 if unknown) of a loop; None for other lines."""
    called = re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
    if not called:
        return None
    condition, body = called.groups()
    if trips := TRIPS.search(line):
        return body, int(trips[1])
    # Compilers for TPUs do not write the trips. A loop of `lax.scan` counts from 0 to a
    # constant.
    text = "\n".join(computations[condition])
    limits = re.findall(r" [su]32\[\]\S* constant\((\d+)\)", text)
    counts = len(limits) == 1 and "direction=LT" in text
    return body, int(limits[0]) if counts else 1


def _branches(line: str) -> list[str]:
    """Returns the branches of a conditional, and nothing for other lines."""
    if " conditional(" not in line:
        return []
    if listed := re.search(r"branch_computations=\{(.*?)\}", line):
        return re.findall(r"[\w.\-]+", listed[1])
    return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", line)
