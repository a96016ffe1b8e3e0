"""The table that `plan` prints: a row a figure, a column a plan."""

from resnet_jax.compiler.chips import CHIPS
from resnet_jax.plan import calibration
from resnet_jax.plan.estimate import total

PARTS = {
    "parameters": "parameters",
    "statistics": "running statistics",
    "optimiser": "optimiser",
    "average": "averaged parameters",
    "teacher": "teacher",
    "batch": "batch",
    "padding": "padding of these",
    "results": "results",
    "activations": "activations and the rest",
    "program": "program",
}


def as_text(plans: list[tuple[dict, dict]]) -> str:
    """The table of plans: what the compiler says of each, and what follows."""
    columns = [_column(facts, found) for facts, found in plans]
    # In the order of the column that has most; what others lack stays empty, and what
    # only others have follows the same row as there.
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
    """Bytes as `12.3 MiB`."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while number >= 1024 and len(units) > 1:
        number, units = number / 1024, units[1:]
    return f"{number:.0f} {units[0]}" if units[0] == "B" else f"{number:.1f} {units[0]}"


def _column(facts: dict, found: dict) -> dict[str, str]:
    devices, chips, batch = facts["devices"], facts["chips"], facts["batch_size"]
    # The figures that follow from a factor of another compiler.
    mark = "*" * _is_of_another_libtpu(found)
    column = {
        "topology": facts["topology"],
        "devices": f"{devices} x {facts['kind']}",
        **({"compiler": _compiler(facts)} if facts["chip"] else {}),
        "chips, hosts": f"{chips}, {facts['hosts']}",
        "model": f"{facts['model']}, {facts['dtype']}",
        "parameters lie": facts["sharding"],
        "images": f"{facts['image_size']} px",
        "batch": f"{batch}, {batch / chips:g} a chip",
        "parameters, MACs": f"{facts['params'] / 1e6:.2f} M,"
        f" {facts['macs'] / 1e9:.3f} G",
        "MEMORY OF A DEVICE": "",
        "fits": _fits(facts, found),
    }
    if "largest" in found:
        fits, fails = found["largest"]
        column["largest batch that fits"] = (
            f"{fits} a chip (not {fails})" if fails else f"at least {fits} a chip"
        )
    for name, of_step in (("train", "training"), ("eval", "evaluation")):
        step = facts.get(name, {})
        if "memory" in step:
            column[of_step] = amount(total(step["memory"]))
            for part, label in PARTS.items():
                if part in step["memory"] and name == "train":
                    column[f"  {label}"] = amount(step["memory"][part])
        elif step:
            column[of_step] = _wanted(step)
    train = facts["train"]
    if "memory" not in train:
        return column
    here = batch / devices
    column |= {
        "SPEED": "",
        "operations / image": f"{train['flops'] / here / 1e9:.2f} G",
        "bytes / image": f"{train['bytes'] / here / 1e6:.1f} MB",
    }
    # Elsewhere there is no other memory.
    if facts["chip"]:
        column["  of main memory"] = f"{train['hbm_bytes'] / here / 1e6:.1f} MB"
    if train["cycles"]:
        column["cycles / image"] = f"{train['cycles'] / here / 1e3:.1f} k"
    if "rate" in found:
        seconds = found["seconds"]
        column |= {
            "step by operations": f"{1e3 * seconds['compute']:.2f} ms",
            "step by bytes": f"{1e3 * seconds['memory']:.2f} ms",
            "step by cycles": f"{1e3 * seconds['cycles']:.2f} ms",
            "network, in addition": f"{1e3 * seconds['network']:.2f} ms",
        }
        if "outside" in seconds:
            column["  of it between slices"] = f"{1e3 * seconds['outside']:.2f} ms"
        column |= {
            "bound by": found["bound"],
            "images/s/chip": f"{found['rate']:,.0f}{mark}",
            "  by the compiler alone": f"{found['uncalibrated']:,.0f}",
            "  at most, by the peaks": f"{found['most']:,.0f}",
            "  calibrated by": (
                f"{found['factor']:.2f}{mark}" if found["factor"] else "none"
            ),
            "images/s": f"{found['rate'] * chips:,.0f}{mark}",
            "of the peak": f"{100 * found['utilization']:.0f} %{mark}",
        }
        column["steps"] = f"{facts['steps']:,}"
        column["hours"] = f"{found['hours']:.2f}{mark}"
        if "eval_hours" in found:
            column["  of evaluation"] = f"{found['eval_hours']:.2f}{mark}"
        if "cost" in found:
            column["cost"] = f"{found['cost']:,.2f}{mark}"
    column |= {"NETWORK, A STEP": ""}
    by_kind: dict[tuple, list[dict]] = {}
    for one in train["collectives"]:
        key = one.get("slices", 0), one["kind"], one["devices"]
        by_kind.setdefault(key, []).append(one)
    for (between, kind, over), same in sorted(by_kind.items()):
        if between:
            every = f"{between} slices"
        else:
            every = "all" if over == devices else str(over)
        times = sum(one["times"] for one in same)
        size = sum(one["times"] * one["bytes"] for one in same)
        column[f"{kind} over {every}"] = f"{times} x, {amount(size)}"
    if "outside_bytes" in found:
        sent = amount(found["outside_bytes"])
        column["sent by a chip to other slices"] = sent
    for over, efficiency in found.get("efficiency", {}).items():
        label = f"efficiency, {over:,} chip{'s' if over > 1 else ''}"
        column[label] = f"{100 * efficiency:.1f} %{mark}" if efficiency else "not known"
    if "rate" in found:
        column |= {
            "HOST": "",
            "images/s/host": f"{found['host_rate']:,.0f}{mark}",
        }
        if "cores" in found:
            column["cores for input, a host"] = f"{found['cores']}{mark}"
    return column


def _calibration(chip: str) -> list[str]:
    """What the rates of a chip are calibrated by."""
    if published := calibration.deviations(chip):
        stock = calibration.STOCK[chip]
        return [
            f"{chip}: in bfloat16 {calibration.factor_of(chip):.2f} times as fast as"
            " the compiler expects, by the fastest of what was published of ResNet-50"
            " (each against the calibrated estimate of a stock step,"
            f" libtpu {stock.libtpu}, jax {stock.jax}):",
            *(
                f"  {one.rate:,.0f} images/s/chip ({100 * deviation:+.0f} %) on"
                f" {one.chips:,} chips, {one.per_chip} images each: {one.source}"
                for one, deviation in published
            ),
        ]
    known = [
        f"{name} was {factor:.2f} times as fast"
        for name in CHIPS
        if (factor := calibration.factor_of(name))
    ]
    return [
        f"{chip}: not calibrated, since no rate of ResNet-50 was published;"
        f" {', '.join(known)} as the compiler expects."
    ]


def _compiler(facts: dict) -> str:
    """Returns the compiler of a TPU's plan with its version."""
    return f"libtpu {facts['versions'].get('libtpu') or 'of unknown version'}"


def _is_of_another_libtpu(found: dict) -> bool:
    """Returns whether rates have a factor that was found with another libtpu."""
    return bool(found.get("factor")) and not found["calibrated"]


def _fits(facts: dict, found: dict) -> str:
    if found["fits"]:
        return f"yes: {amount(found['memory'])} of {amount(found['limit'])}"
    return "no"


def _wanted(step: dict) -> str:
    if not step["wanted"]:
        return "out of memory"
    return f"{amount(step['wanted'])} of {amount(step['limit'])}"


def _notes(plans: list[tuple[dict, dict]]) -> list[str]:
    lines = []
    for facts, found in plans:
        where = f"{facts['topology']}, batch {facts['batch_size']}:"
        if not found["fits"]:
            amounts = f"{amount(found['memory'])} of {amount(found['limit'])}"
            wants = (
                f"wants {amounts}" if found["memory"] else "wants more than there is"
            )
            ways = ["a smaller batch_size", "more chips", "optim.microbatches=2"]
            if facts["dtype"] != "bfloat16":
                ways.append("model.dtype=bfloat16")
            if facts["devices"] > 1 and facts["sharding"] != "fsdp":
                ways.append("sharding.params=fsdp")
            lines.append(
                f"{where} does not fit: a device {wants}. Take"
                f" {', '.join(ways[:-1])} or {ways[-1]}."
            )
        elif not facts["chip"]:
            lines.append(
                f"{where} no speed, hours, cores or cost, since no peaks of"
                f" {facts['kind']} are known; measure it: python -m resnet_jax.bench"
                " overhead."
            )
        elif "rate" not in found:
            lines.append(
                f"{where} no speed, hours, cores or cost, since no bandwidth of the"
                f" data-centre network is published for {facts['chip']}; a plan for one"
                " slice has them."
            )
        elif not facts["train"]["cycles"]:
            lines.append(
                f"{where} {_compiler(facts)} does not say how many cycles the"
                " step takes, so the speed is only what the published peaks allow."
            )
        elif _is_of_another_libtpu(found):
            lines.append(
                f"* {where} {_compiler(facts)} compiled this, but the factor was"
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
            "Times are estimates: the longest of the first three, calibrated where"
            " something was published, and the network, none of it hidden; see python"
            " -m resnet_jax.plan --help."
        )
        for chip in chips:
            lines += _calibration(chip)
    found = plans[0][0]["versions"]
    lines.append(", ".join(f"{name} {version}" for name, version in found.items()))
    return lines
