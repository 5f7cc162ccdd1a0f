"""Printing a plan, and the result of a search."""

import dataclasses

from rich.console import Console
from rich.table import Table

from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.plan.cost import Estimate
from jaxmodels.plan.plan import Plan, versions
from jaxmodels.plan.search import SearchResult

# Rows of a search's table, without those that were compiled.
SHOWN = 20


def print_plan(plan: Plan, console: Console) -> None:
    """Print the figures of a plan, a line or a small table each."""
    for name, value in _lines(plan).items():
        console.print(f"{name:<12} {value}", highlight=False, markup=False, soft_wrap=True)
    for table in (_collectives(plan.time), _kernels(plan.time)):
        if table is not None:
            console.print()
            console.print(table)
    console.print()
    for note in plan.notes:
        console.print(f"note: {note}", style="dim", highlight=False, markup=False, soft_wrap=True)


def _lines(plan: Plan) -> dict[str, str]:
    chip, time, experiment = plan.topology.chip, plan.time, plan.experiment
    by = {"compiler": "by the compiler", "analytic": "by the analytic model"}
    size, room = plan.peak, chip.memory_per_device
    parts = ", ".join(f"{part} {_gb(value)}" for part, value in plan.memory.items())
    modelled = {part: value for part, value in dataclasses.asdict(plan.memory_model).items() if part not in ("state", "batch") and value}
    slices = f"{plan.topology.slices} × " if plan.topology.slices > 1 else ""
    lines = {
        "topology": f"{plan.topology.name}: {slices}{'×'.join(map(str, plan.topology.grid))} {chip.name} chips, mesh {mesh_lib.shown(plan.mesh)}",
        "memory": f"{_gb(size)} of {_gb(room)} GB a device ({size / room:.0%}), {by[plan.memory_by]}: {parts}",
    }
    if plan.memory_by == "compiler":
        lines["  model"] = (
            f"{_gb(plan.memory_model.total)} GB by the analytic model, by part: {', '.join(f'{part} {_gb(value)}' for part, value in modelled.items())}"
        )
    if plan.host_bytes:
        lines["  host"] = f"{_gb(plan.host_bytes)} GB of the host's memory for each device"
    cycles = f", {time.cycles / 1e6:,.{0 if time.cycles > 1e9 else 2}f} M cycles estimated by the compiler" if time.cycles is not None else ""
    lines["step"] = f"{_seconds(time.seconds)} ({_seconds(time.low)} if all overlaps, {_seconds(time.high)} if nothing does), {by[plan.time_by]}{cycles}"
    lines["  parts"] = ", ".join(f"{part} {_seconds(value)} ({value / time.seconds:.0%})" for part, value in time.parts.items() if value)
    lines["MFU"] = f"{plan.mfu:.1%} of {chip.flops_per_device / 1e12:g} TFLOP/s a device: {plan.flops_per_device:.4g} FLOPs of the model in a step"
    if plan.flops.attended != plan.flops.all:
        lines["MFU"] += f"; {plan.mfu_attended:.1%} without masked attention scores"
    lines["speed"] = ", ".join(f"{rate:,.4g} {name.partition('_')[0]}/s a chip" for name, rate in plan.rates.items())
    accumulated = f", {experiment.training.accumulate} microbatches" if experiment.training.accumulate > 1 else ""
    lines["run"] = (
        f"{experiment.steps:,} steps of {experiment.loading.batch_size:,} examples{accumulated}: {_duration(plan.run_seconds)}, {plan.chip_hours:,.4g} chip-hours"
    )
    if plan.step is not None:
        record = plan.step.record
        options = ", ".join(f"{name}={value}" for name, value in record.options.items())
        lines["compiled"] = (
            f"in {record.seconds:.0f} s by {', '.join(f'{name} {version}' for name, version in versions().items())}{' with ' + options if options else ''}"
        )
        for name, reason in record.rejected.items():
            lines[f"  {name}"] = f"not used, because the compiler rejects it: {reason}"
        for part, used in plan.step.experiment.kernels.items():
            lines[f"  {part}"] = f"{used['used']} ({used['why']})" if used.get("why") else used["used"]
    return lines


def _collectives(time: Estimate) -> Table | None:
    rows = [(each.kind, " × ".join(each.axes), each.network, each) for each in time.collectives]
    rows += [(f"copy {each.direction} the host", "", "host", each) for each in time.host_transfers]
    if not rows:
        return None
    table = Table("collective", "axes", "over", "count", "GB a device", "time", "exposed", box=None)
    for kind, axes, network, each in rows:
        table.add_row(kind, axes, network, f"{each.count:,}", f"{each.bytes / 1e9:.3g}", _seconds(each.seconds), _seconds(each.exposed_seconds))
    return table


def _kernels(time: Estimate) -> Table | None:
    if not time.kernels:
        return None
    table = Table("kernel", "count", "time", "operands", box=None)
    for each in time.kernels:
        table.add_row(each.name, f"{each.count:,}", _seconds(each.seconds) if each.seconds is not None else "not known", " ".join(each.shapes))
    return table


def _gb(size: float) -> str:
    """Bytes, in 10**9."""
    return f"{size / 1e9:.2f}" if size >= 1e7 else f"{size / 1e9:.2g}"


def _seconds(value: float) -> str:
    return f"{value:.4g} s" if value >= 1 else f"{1e3 * value:.4g} ms" if value >= 1e-3 or not value else f"{1e6 * value:.3g} µs"


def _duration(seconds: float) -> str:
    """`12 s`, `3.4 hours`, `5.6 days`."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} seconds"


def print_search(found: SearchResult, console: Console) -> None:
    """Print the ranked table of a search."""
    table = Table("", "setting", "GB a device", "ms a step", "MFU", "why not", box=None)
    for number, each in enumerate(found.settings, 1):
        if number > SHOWN and not each.own and each.plan is None:
            continue
        model = "" if each.plan else " ~"
        size = f"{each.bytes / 1e9:.1f}{model}" if each.bytes else ""
        seconds = f"{1e3 * each.step_seconds:.4g}{model}" if each.state in ("compiled", "modelled") else ""
        mfu = f"{each.plan['mfu']:.1%}" if each.plan and each.plan.get("mfu") else ""
        table.add_row(str(number), each.name + (" (the config's own)" if each.own else ""), size, seconds, mfu, each.why)
    console.print(table)
    if len(found.settings) > SHOWN:
        console.print(f"{len(found.settings)} settings in all; --json=FILE writes all of them", highlight=False)
    searched = "read from the cache of an earlier search" if found.cached else f"searched for {found.seconds:.0f} s"
    for note in (*found.notes, f"{searched}; ~ marks the models' figures, all others are the compiler's"):
        console.print(note, highlight=False)
