"""Print plans: one plan, or several plans side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxlm.plan.planning import Memory, Plan


def show(plans: Sequence[Plan], console: Console) -> None:
    """Print plans as a table with one row per quantity and one column per plan, then the details of each plan.

    The details are: why the step does not fit, the most expensive operations, the kernels, and notes. The last line
    says how exact plans for this platform were (one line per platform).

    Args:
        plans: at least one plan. All must be plans of the same model and the same kind of step, because the heading
            and the formula of the FLOPs are those of the first plan.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(plans[0].model)
    for plan in plans:
        table.add_column(f"{plan.topology} {plan.mesh}", justify="right")
    for name, value in _rows(plans):
        table.add_row(name, *(value(plan) for plan in plans))
    console.print(table)
    first = plans[0]
    console.print(f"{first.objective}; FLOPs: {first.flops_formula}", highlight=False, markup=False)
    for plan in plans:
        _details(plan, console, with_title=len(plans) > 1)
    for accuracy in dict.fromkeys(plan.accuracy for plan in plans):
        console.print(f"accuracy: {accuracy}", highlight=False, markup=False)


def _rows(plans: Sequence[Plan]) -> Iterator[tuple[str, Callable[[Plan], str]]]:
    yield "devices", lambda p: f"{p.devices} x {p.device_kind}"
    yield "batch x sequence", lambda p: f"{p.batch} x {p.sequence}, {p.dtype}"
    yield "fits", lambda p: "yes" if p.fits else "NO"
    parts = dict.fromkeys(part for plan in plans if plan.memory for part in plan.memory.parts)
    for part in parts:
        yield f"  {part}", lambda p, part=part: _memory_cell(p, lambda m: m.parts.get(part))  # type: ignore[misc]
    yield "  temporaries", lambda p: _memory_cell(p, lambda m: m.temporaries)
    if any(plan.memory and plan.memory.gradients for plan in plans):
        yield "    of these, gradients", lambda p: _memory_cell(p, lambda m: m.gradients)
    yield "  code", lambda p: _memory_cell(p, lambda m: m.code)
    yield "bytes per device", lambda p: _memory_cell(p, lambda m: m.total)
    yield "FLOPs per step", lambda p: f"{p.flops:.3g}"
    yield "estimated cycles", lambda p: _format(p.cycles, ",")
    yield "estimated step", lambda p: _seconds(p.seconds)
    yield "  MFU", lambda p: _format(p.mfu, ".1%")
    yield "communication, at least", lambda p: _seconds(p.communication_seconds)
    yield "  MFU, no overlap", lambda p: _format(p.mfu_with_communication, ".1%")
    yield "tokens/s, no communication", lambda p: "n/a" if not p.seconds else f"{p.tokens / p.seconds:,.0f}"
    if any(plan.min_memory_seconds is not None for plan in plans):
        yield "memory reads, at least", lambda p: _seconds(p.min_memory_seconds)
    kinds = dict.fromkeys(collective.kind for plan in plans for collective in plan.collectives)
    for kind in kinds:
        yield kind, lambda p, kind=kind: _collective_cell(p, kind)  # type: ignore[misc]
    yield "compiled in", lambda p: _seconds(p.compile_seconds)


def _details(plan: Plan, console: Console, *, with_title: bool) -> None:
    if with_title:
        console.print(f"\n{plan.topology} {plan.mesh}", style="bold", highlight=False)
    if plan.reason:
        console.print(f"does not fit: {plan.reason}", highlight=False, markup=False)
    if plan.most_expensive:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name, justify in (("cycles", "right"), ("share", "right"), ("times", "right"), ("operation", "left")):
            table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
        for operation in plan.most_expensive:
            cells = f"{operation.cycles:,}", f"{operation.share:.1%}", str(operation.count)
            table.add_row(*cells, escape(operation.op_name))
        console.print(table)
    if plan.kernels:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in ("calls", "grid", "bundles per grid step", "cycles"):
            table.add_column(name, justify="right")
        table.add_column("kernel", overflow="fold")
        for kernel in plan.kernels:
            bundles = "n/a" if kernel.bundles is None else "+".join(f"{count:,}" for count in kernel.bundles[1:])
            grid, cycles = _format(kernel.grid_steps, ","), _format(kernel.cycles, ",")
            table.add_row(str(kernel.calls), grid, bundles, cycles, escape(kernel.name))
        console.print(table)
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False, markup=False)


def _memory_cell(plan: Plan, get_bytes: Callable[[Memory], float | None]) -> str:
    return _bytes(None if plan.memory is None else get_bytes(plan.memory))


def _bytes(count: float | None) -> str:
    if count is None:
        return "n/a"
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.2f} MiB"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "n/a"
    for unit, units_per_second in (("us", 1e6), ("ms", 1e3)):
        number = f"{seconds * units_per_second:.3g}"
        if float(number) < 1000:
            return f"{number} {unit}"
    return f"{seconds:.1f} s"


def _format(number: float | None, format_spec: str) -> str:
    return "n/a" if number is None else format(number, format_spec)


def _collective_cell(plan: Plan, kind: str) -> str:
    if plan.memory is None:  # the compiler rejected the step
        return "n/a"
    return next((f"{stats.count} x, {_bytes(stats.bytes)}" for stats in plan.collectives if stats.kind == kind), "0")
