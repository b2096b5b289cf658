"""Tables of a run.  Losses are marked ``▼``; the fastest of a row stands out."""

from __future__ import annotations

import math

from tvm_flash.bench import ratios
from tvm_flash.bench.results import DISTURBED, Cell, Implementation, Run
from tvm_flash.display import Entry, Table
from tvm_flash.measure.workloads import Workload

#: A loss, in front of its ratio.
LOSS = "▼"

#: A figure of a moment in which the device had slowed down, in front of it.
SLOWED = "~"

#: Speed by kind of device: unit, and operations a second of one.
_UNITS = {"gpu": ("TFLOP/s", 1e12), "cpu": ("GFLOP/s", 1e9)}


def is_cpu(run: Run) -> bool:
    return run.machine["arch"] == "cpu"


def what(run: Run) -> str:
    """``"backward, "`` for a run of that, in front of a dtype."""
    return "backward, " if run.backward else ""


def unit(run: Run) -> tuple[str, float]:
    """Name of the unit of speed in this run's tables, and operations a second of one."""
    return _UNITS["cpu" if is_cpu(run) else "gpu"]


def speeds(run: Run, dtype: str, mode: str, compact: bool = False) -> Table:
    """Speed of each implementation, share of the peak, ratios to the best peer, and errors, for each cell of a dtype.

    ``compact`` leaves the errors out, and the ratios of the modes that aren't asked for.
    """
    name, one = unit(run)
    ours = [i for i in run.implementations if i.ours]
    modes = [mode] if compact else [mode, *(m for m in run.modes if m != mode)]
    cells = [cell for cell in run.cells if cell.workload.dtype == dtype]
    heads = [*_label_heads(run), *(i.name for i in run.implementations), "peak"]
    heads += [f"{i.name} ×" if m == mode else m for i in ours for m in modes]
    heads += [] if compact else ["error", "peers'"]
    rows, groups, before = [], [], None
    for number, cell in enumerate(cells):
        label = _labels(run, cell.workload)
        if before is not None and label[: len(label) - 1] != before:
            groups.append(number)
        before = label[: len(label) - 1]
        row = [
            *map(Entry, label),
            *_speeds_of(run, cell, mode, one),
            Entry(share_of_peak(run, cell, ours[0].key, mode)),
        ]
        row += [_ratio(run, cell, i, m) for i in ours for m in modes]
        row += [] if compact else _errors(run, cell)
        rows.append(tuple(row))
    title = f"{run.device}, {what(run)}{dtype}, {mode}: {name}"
    return Table(title, tuple(heads), tuple(rows), len(_label_heads(run)), tuple(groups))


def _label_heads(run: Run) -> tuple[str, ...]:
    return ("shape", "mask") if is_cpu(run) else ("dim", "mask", "length")


def _labels(run: Run, w: Workload) -> tuple[str, ...]:
    if not is_cpu(run):
        return str(w.head_dim), w.mask, str(w.seqlen_q)
    return shape(w), w.mask


def shape(w: Workload) -> str:
    """``"2, 8, 512, 64"``: batch, heads, queries (and keys, if more), head_dim."""
    keys = "" if w.seqlen_kv == w.seqlen_q else f" → {w.seqlen_kv}"
    return f"{w.batch}, {w.heads}, {w.seqlen_q}{keys}, {w.head_dim}"


def _speeds_of(run: Run, cell: Cell, mode: str, one: float) -> list[Entry]:
    measured = [cell.of(i.key) for i in run.implementations]
    times = [m.seconds.get(mode) if m else None for m in measured]
    shortest = None if cell.disturbed else min((t for t in times if t), default=None)
    mark = SLOWED if cell.disturbed else ""
    return [
        Entry("–")
        if t is None
        else Entry(f"{mark}{cell.workload.flops / t / one:.0f}", "best" if t == shortest else "")
        for t in times
    ]


def share_of_peak(run: Run, cell: Cell, implementation: str, mode: str) -> str:
    """Speed over that of the largest matrix product of the dtype, as ``"87%"``."""
    peak, measured = run.peak(cell.workload.dtype), cell.of(implementation)
    if peak is None or measured is None or mode not in peak.flops or mode not in measured.seconds:
        return "–"
    if cell.disturbed or peak.disturbed:
        return "–"
    return f"{cell.workload.flops / measured.seconds[mode] / peak.flops[mode]:.0%}"


def _ratio(run: Run, cell: Cell, ours: Implementation, mode: str) -> Entry:
    value = ratios.ratio(cell, ours.key, ratios.peers(run), mode)
    if value is None:
        return Entry("–")
    return Entry(times(value), "bad" if value < 1 else "")


def times(value: float) -> str:
    """A ratio with two decimals; a loss is marked, and rounded down with as many as show it."""
    if value >= 1:
        return f"{value:.2f}"
    digits = 2 if value < 0.99 else 3
    return f"{LOSS}{math.floor(value * 10**digits) / 10**digits:.{digits}f}"


def _errors(run: Run, cell: Cell) -> list[Entry]:
    """The largest error of ours, and the largest of the peers that ran here."""
    found = []
    for ours in (True, False):
        who = [cell.of(i.key) for i in run.implementations if i.ours == ours and not i.recorded]
        errors = [m.error for m in who if m and m.error is not None]
        found.append(Entry(f"{max(errors):.1e}" if errors else "–"))
    return found


def calls(run: Run) -> Table | None:
    """Microseconds of a small call; None if it wasn't measured."""
    if not run.calls:
        return None
    rows = []
    for cell in run.calls:
        times = [m.seconds["call"] if (m := cell.of(i.key)) else None for i in run.implementations]
        shortest = min((t for t in times if t), default=None)
        entries = [Entry("–") if t is None else Entry(f"{t * 1e6:.1f}", "best" if t == shortest else "") for t in times]
        rows.append((Entry(cell.workload.dtype), *entries))
    return Table(
        f"time of a small call ({what(run)}{shape(run.calls[0].workload)}) from Python: µs",
        ("dtype", *(i.name for i in run.implementations)),
        tuple(rows),
        1,
    )


def summaries(run: Run, mode: str) -> list[str]:
    """What the tables come to, in sentences: one for each of ours and dtype."""
    lines = []
    for dtype in run.dtypes():
        for ours in (i for i in run.implementations if i.ours):
            best = ratios.summary(run, ours.key, "", dtype, mode)
            if best is None:
                continue
            each = [
                (i.name, ratios.summary(run, ours.key, i.key, dtype, mode)) for i in run.implementations if not i.ours
            ]
            each = [f"{name} {found.mean:.2f}" for name, found in each if found]
            over = f" ({', '.join(each)})" if len(each) > 1 else ""
            where = short(run, best.worst.cell.workload)
            lines.append(
                f"{ours.name} {what(run)}{dtype}, {mode}: {best.mean:.3f} × the best peer of each cell, geometric mean "
                f"of {len(best.ratios)}{over}; worst {times(best.worst.value)} at {where}; {len(best.lost)} lost"
            )
    return lines


def short(run: Run, w: Workload) -> str:
    """A workload in a few words, without its dtype."""
    if is_cpu(run):
        return " ".join(_labels(run, w))
    return f"d{w.head_dim} {w.mask} {w.seqlen_q}"


def failures(run: Run) -> list[str]:
    """What couldn't be run or compared, each reason once, with how many cells it kept empty."""
    found: dict[tuple[str, str], int] = {}
    names = {i.key: i.name for i in run.implementations}
    for cell in (*run.cells, *run.calls):
        for m in cell.measurements:
            if m.failure:
                key = (names[m.implementation], m.failure)
                found[key] = found.get(key, 0) + 1
    lines = [f"{name} has no figure in {count} cells: {why}" for (name, why), count in found.items()]
    slowed = [f"{short(run, c.workload)} {c.workload.dtype}" for c in run.cells if c.disturbed]
    slowed += [f"torch.matmul {p.dtype}" for p in run.peaks if p.disturbed]
    if slowed:
        lines.append(
            f"{SLOWED}: the device had slowed down (steady more than {DISTURBED} × burst), whoever ran; "
            f"not compared: {', '.join(slowed)}"
        )
    if run.cells and not run.calls:
        lines.append("the run was stopped before its end; the cells that would follow are missing")
    return lines


def legend(run: Run) -> list[str]:
    """What the columns and modes are."""
    (name, one), mode = unit(run), run.modes[0]
    peaks = (f"{p.dtype} {p.size}³ at {p.flops[mode] / one:.0f} {name}" for p in run.peaks)
    return [
        *(f"{i.name}: {i.about}" for i in run.implementations),
        *(f"{mode}: {text}" for mode, text in run.method.items()),
        f"peak: speed of {run.implementations[0].name} over that of torch.matmul in the same run: {', '.join(peaks)}",
        f"×: ours over the fastest peer of the cell; {LOSS} marks a loss",
        "error: norm of the difference from float64, relative: the largest of ours, and of the peers",
    ]
