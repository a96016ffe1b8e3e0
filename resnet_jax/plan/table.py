"""Formats the table that `plan` prints: one row per figure, one column per plan."""

from resnet_jax.compiler.chips import CHIPS
from resnet_jax.plan import calibration
from resnet_jax.plan.estimate import total

# The parts of a device's memory, in the order of the table, with their labels.
PARTS = {
    "parameters": "parameters",
    "statistics": "running statistics",
    "optimiser": "optimiser",
    "average": "EMA of the parameters",
    "teacher": "teacher",
    "batch": "batch",
    "padding": "padding of the above",
    "results": "results",
    "activations": "activations and other temporaries",
    "program": "program",
}


def as_text(plans: list[tuple[dict, dict]]) -> str:
    """Returns the table of plans, with notes below it.

    Args:
      plans: The compiler's figures of each plan (`compile_steps.facts`) and the
        estimates (`estimate.estimate`).
    """
    columns = [_column(facts, estimates) for facts, estimates in plans]
    # The rows are in the order of the longest column. A row that only another column
    # has follows the same row as there, and a figure that a column lacks is empty.
    labels: list[str] = []
    for column in sorted(columns, key=len, reverse=True):
        place = 0
        for label in column:
            if label not in labels:
                labels.insert(place, label)
            place = labels.index(label) + 1
    table = [
        [label, *(column.get(label, "") for column in columns)] for label in labels
    ]
    widths = [max(map(len, cells)) for cells in zip(*table, strict=True)]
    lines = []
    for label, *cells in table:
        if not any(cells):
            lines.append("")
        texts = [label.ljust(widths[0])]
        texts += [c.rjust(w) for c, w in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join(texts).rstrip())
    return "\n".join([*lines, "", *_notes(plans)])


def amount(number: float | int) -> str:
    """Formats bytes, such as `12.3 MiB`."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while number >= 1024 and len(units) > 1:
        number, units = number / 1024, units[1:]
    return f"{number:.0f} {units[0]}" if units[0] == "B" else f"{number:.1f} {units[0]}"


def _column(facts: dict, estimates: dict) -> dict[str, str]:
    """Returns the texts of a plan's column by their labels."""
    devices, chips, batch = facts["devices"], facts["chips"], facts["batch_size"]
    # It marks figures that use a factor of another version of the compiler.
    mark = "*" * _is_of_another_libtpu(estimates)
    column = {
        "topology": facts["topology"],
        "devices": f"{devices} x {facts['kind']}",
        **({"compiler": _compiler(facts)} if facts["chip"] else {}),
        "chips, hosts": f"{chips}, {facts['hosts']}",
        "model": f"{facts['model']}, {facts['dtype']}",
        "sharding": facts["sharding"],
        "images": f"{facts['image_size']} px",
        "batch": f"{batch}, {batch / chips:g} per chip",
        "parameters, MACs": f"{facts['params'] / 1e6:.2f} M,"
        f" {facts['macs'] / 1e9:.3f} G",
        "MEMORY PER DEVICE": "",
        "fits": _fits(estimates),
    }
    if "largest" in estimates:
        fits, fails = estimates["largest"]
        column["largest batch that fits"] = (
            f"{fits} per chip (not {fails})" if fails else f"at least {fits} per chip"
        )
    for name, title in (("train", "training"), ("eval", "evaluation")):
        step = facts.get(name, {})
        if "memory" in step:
            column[title] = amount(total(step["memory"]))
            for part, label in PARTS.items():
                if part in step["memory"] and name == "train":
                    column[f"  {label}"] = amount(step["memory"][part])
        elif step:
            column[title] = _needed(step)
    train = facts["train"]
    if "memory" not in train:
        return column
    images = batch / devices
    column |= {
        "SPEED": "",
        "operations / image": f"{train['flops'] / images / 1e9:.2f} G",
        "bytes / image": f"{train['bytes'] / images / 1e6:.1f} MB",
    }
    # Devices that are not TPUs have no other memory.
    if facts["chip"]:
        column["  of main memory"] = f"{train['hbm_bytes'] / images / 1e6:.1f} MB"
    if train["cycles"]:
        column["cycles / image"] = f"{train['cycles'] / images / 1e3:.1f} k"
    if "rate" in estimates:
        seconds = estimates["seconds"]
        column |= {
            "step by operations": f"{1e3 * seconds['compute']:.2f} ms",
            "step by bytes": f"{1e3 * seconds['memory']:.2f} ms",
            "step by cycles": f"{1e3 * seconds['cycles']:.2f} ms",
            "network, in addition": f"{1e3 * seconds['network']:.2f} ms",
        }
        if "outside" in seconds:
            column["  of it between slices"] = f"{1e3 * seconds['outside']:.2f} ms"
        column |= {
            "bound by": estimates["bound"],
            "images/s/chip": f"{estimates['rate']:,.0f}{mark}",
            "  by the compiler alone": f"{estimates['uncalibrated']:,.0f}",
            "  at most, by the peaks": f"{estimates['most']:,.0f}",
            "  calibrated by": (
                f"{estimates['factor']:.2f}{mark}" if estimates["factor"] else "none"
            ),
            "images/s": f"{estimates['rate'] * chips:,.0f}{mark}",
            "of the peak": f"{100 * estimates['utilization']:.0f} %{mark}",
        }
        column["steps"] = f"{facts['steps']:,}"
        column["hours"] = f"{estimates['hours']:.2f}{mark}"
        if "eval_hours" in estimates:
            column["  of evaluation"] = f"{estimates['eval_hours']:.2f}{mark}"
        if "cost" in estimates:
            column["cost"] = f"{estimates['cost']:,.2f}{mark}"
    network: dict[str, str] = {}
    by_kind: dict[tuple, list[dict]] = {}
    for collective in train["collectives"]:
        key = collective.get("slices", 0), collective["kind"], collective["devices"]
        by_kind.setdefault(key, []).append(collective)
    for (slices, kind, number), same in sorted(by_kind.items()):
        if slices:
            members = f"{slices} slices"
        else:
            members = "all" if number == devices else str(number)
        times = sum(collective["times"] for collective in same)
        size = sum(collective["times"] * collective["bytes"] for collective in same)
        network[f"{kind} over {members}"] = f"{times} x, {amount(size)}"
    if "outside_bytes" in estimates:
        sent = amount(estimates["outside_bytes"])
        network["sent by a chip to other slices"] = sent
    for number, efficiency in estimates.get("efficiency", {}).items():
        label = f"efficiency, {number:,} chip{'s' if number > 1 else ''}"
        network[label] = f"{100 * efficiency:.1f} %{mark}" if efficiency else "unknown"
    if network:
        column |= {"NETWORK, PER STEP": ""} | network
    if "rate" in estimates:
        column |= {
            "HOST": "",
            "images/s/host": f"{estimates['host_rate']:,.0f}{mark}",
        }
        if "cores" in estimates:
            column["CPU cores per host for input"] = f"{estimates['cores']}{mark}"
    return column


def _calibration(chip: str) -> list[str]:
    """Returns the lines on how the rates of a chip are calibrated."""
    if published := calibration.deviations(chip):
        stock = calibration.STOCK[chip]
        return [
            f"{chip} computes {calibration.factor_of(chip):.2f} times as fast in"
            " bfloat16 as the compiler expects, by the fastest published run of"
            " ResNet-50 (deviations are from the calibrated estimate of a stock step,"
            f" libtpu {stock.libtpu}, jax {stock.jax}):",
            *(
                f"  {run.rate:,.0f} images/s/chip ({100 * deviation:+.0f} %) on"
                f" {run.chips:,} chips, {run.per_chip} images each: {run.source}"
                for run, deviation in published
            ),
        ]
    known = [
        f"{name} computes {factor:.2f} times as fast"
        for name in CHIPS
        if (factor := calibration.factor_of(name))
    ]
    return [
        f"{chip} is not calibrated, since no rate of ResNet-50 was published for it."
        f" In bfloat16, {' and '.join(known)} as the compiler expects."
    ]


def _compiler(facts: dict) -> str:
    """Returns the name and version of the compiler of a TPU's plan."""
    return f"libtpu {facts['versions'].get('libtpu') or 'of unknown version'}"


def _is_of_another_libtpu(estimates: dict) -> bool:
    """Returns whether the factor of the rates was calibrated with another libtpu."""
    return bool(estimates.get("factor")) and not estimates["calibrated"]


def _fits(estimates: dict) -> str:
    if estimates["fits"]:
        return f"yes: {amount(estimates['memory'])} of {amount(estimates['limit'])}"
    return "no"


def _needed(step: dict) -> str:
    if not step["wanted"]:
        return "out of memory"
    return f"{amount(step['wanted'])} of {amount(step['limit'])}"


def _notes(plans: list[tuple[dict, dict]]) -> list[str]:
    """Returns the lines below the table."""
    lines = []
    for facts, estimates in plans:
        title = f"{facts['topology']}, batch {facts['batch_size']}:"
        if not estimates["fits"]:
            amounts = f"{amount(estimates['memory'])} of {amount(estimates['limit'])}"
            if not estimates["memory"]:
                amounts = "more than there is"
            ways = ["a smaller batch_size", "more chips", "optim.microbatches=2"]
            if facts["dtype"] != "bfloat16":
                ways.append("model.dtype=bfloat16")
            if facts["devices"] > 1 and facts["sharding"] != "fsdp":
                ways.append("sharding.params=fsdp")
            lines.append(
                f"{title} does not fit: a device needs {amounts}. Try"
                f" {', '.join(ways[:-1])} or {ways[-1]}."
            )
        elif not facts["chip"]:
            lines.append(
                f"{title} no speed, hours, cores or cost, since the peaks of"
                f" {facts['kind']} are unknown. To measure the speed, run python -m"
                " resnet_jax.bench overhead."
            )
        elif "rate" not in estimates:
            lines.append(
                f"{title} no speed, hours, cores or cost, since no bandwidth of the"
                f" data-centre network is published for {facts['chip']}. A plan for one"
                " slice has them."
            )
        elif not facts["train"]["cycles"]:
            lines.append(
                f"{title} {_compiler(facts)} does not estimate the cycles of the step,"
                " so the speed is only what the published peaks allow."
            )
        elif _is_of_another_libtpu(estimates):
            lines.append(
                f"* {title} {_compiler(facts)} compiled this plan, but the factor was"
                f" calibrated with libtpu {calibration.libtpu_of(facts['chip'])}. These"
                " figures are not calibrated for the compiler that gave them."
            )
    chips = dict.fromkeys(f["chip"] for f, p in plans if "rate" in p)
    lines += [
        f"{name}: {chip.flops / 1e12:g} Tflop/s in bf16, {amount(chip.hbm)} at"
        f" {chip.hbm_bandwidth / 1e9:g} GB/s, network {chip.network / 1e9:.0f} GB/s,"
        + (f" between slices {chip.outside / 1e9:.1f} GB/s," * bool(chip.outside))
        + f" {chip.clock / 1e9:.2f} GHz ({chip.source})"
        for name, chip in CHIPS.items()
        if name in chips
    ]
    if chips:
        lines.append(
            "Times are estimates: the longest of operations, bytes and cycles,"
            " calibrated where a rate was published, plus the network, none of which"
            " overlaps with computation. See python -m resnet_jax.plan --help."
        )
        for chip in chips:
            lines += _calibration(chip)
    versions = plans[0][0]["versions"]
    lines.append(
        ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    )
    return lines
