"""Logs as tables: what tuned choices gain over the defaults, and how two logs differ.  Needs no TVM."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from schedules.builder.records import Line, Measurement
from schedules.tuning.strategy import geometric_mean
from tvm_flash.measure.workloads import Workload
from tvm_flash.operators import FORWARD


def usable(lines: Iterable[Line], problems: Collection[str] = ()) -> list[Measurement]:
    """Successful measurements, of some problems or of all."""
    found = (r for r in lines if isinstance(r, Measurement) and r.status == "ok")
    return [r for r in found if not problems or r.problem in problems]


def of_newest_source(measured: Sequence[Measurement]) -> list[Measurement]:
    """Records whose default is the newest one's of their kernel and length.

    When kernels or defaults change, what was measured before is no longer compared.
    """
    newest = {_default_of(r): r for r in sorted(measured, key=lambda r: r.date)}
    return [r for r in measured if r.incumbent == newest[_default_of(r)].incumbent]


def _default_of(r: Measurement) -> tuple[object, ...]:
    """What has one default: a kernel at a length."""
    of_kernel = (r.arch, r.template, r.dtype, r.head_dim, r.head_dim_v, r.mask, r.score, r.kernel_kind)
    return *of_kernel, Workload.parse(r.problem).seqlen_kv


def kernel_of(r: Measurement) -> str:
    """Template and, of another than the usual one, kind of a kernel."""
    return r.template if r.kernel_kind == FORWARD else f"{r.template} {r.kernel_kind}"


def by_cell(measured: Iterable[Measurement]) -> dict[tuple[str, str, str], list[Measurement]]:
    """Measurements by (arch, template and kind, problem), in the order of kind, dtype, head_dim, mask and length."""
    cells: dict[tuple[str, str, str], list[Measurement]] = {}
    for r in measured:
        cells.setdefault((r.arch, kernel_of(r), r.problem), []).append(r)

    def order(key):
        arch, kernel, problem = key
        w = Workload.parse(problem)
        return arch, w.words, w.dtype, w.head_dim, w.mask, w.seqlen_kv, w.seqlen_q, kernel

    return {key: cells[key] for key in sorted(cells, key=order)}


def best_of(cell: Iterable[Measurement]) -> Measurement:
    """The fastest: by gain over the incumbent, which is measured in the same rounds; else by time.

    What was given up early has too few rounds for a figure that could be the best.
    """
    cell = list(cell)
    cell = [r for r in cell if not r.given_up] or cell
    with_gain = [r for r in cell if r.gain]
    return max(with_gain, key=lambda r: r.gain) if with_gain else min(cell, key=lambda r: r.microseconds)


def gains(lines: Iterable[Line], problems: Collection[str] = ()) -> str:
    """For each kernel and problem the default and the best, and the geometric mean of the gains."""
    rows = [("kernel", "problem", "tried", "default µs", "best µs", "TFLOP/s", "gain", "best configuration")]
    ratios = []
    for (arch, kernel, problem), cell in by_cell(of_newest_source(usable(lines, problems))).items():
        best = best_of(cell)
        defaults = [r for r in cell if r.default]
        gain = best.gain or 1.0
        ratios.append(gain)
        rows.append(
            (
                f"{arch} {kernel}",
                problem,
                str(len({r.kernel_hash for r in cell})),
                f"{defaults[-1].microseconds:.1f}" if defaults else "–",
                f"{best.microseconds:.1f}",
                f"{best.tflops:.4g}",
                f"{gain:.3f}",
                "the default" if best.default else _changed(best, defaults),
            )
        )
    if not ratios:
        return "nothing was measured successfully"
    return f"{aligned(rows)}\ngeometric mean of the gains over {len(ratios)} cells: {geometric_mean(ratios):.4f}"


def _changed(best: Measurement, defaults: list[Measurement]) -> str:
    """The fields in which a configuration differs from the default."""
    usual = defaults[-1].config if defaults else {}
    return " ".join(f"{name}={value}" for name, value in best.config.items() if usual.get(name, ...) != value)


def difference(old: Iterable[Line], new: Iterable[Line]) -> str:
    """The best of each problem in both logs, where both have it, and the cells that only one has."""
    before, after = (by_cell(usable(lines)) for lines in (old, new))
    rows = [("kernel", "problem", "old µs", "new µs", "old/new", "configuration")]
    ratios = []
    for key in after:
        if key in before:
            a, b = (min(cells[key], key=lambda r: r.microseconds) for cells in (before, after))
            ratios.append(a.microseconds / b.microseconds)
            same = (
                "the same"
                if a.config == b.config
                else " ".join(f"{n}={a.config.get(n)}→{v}" for n, v in b.config.items() if a.config.get(n) != v)
            )
            figures = (f"{a.microseconds:.1f}", f"{b.microseconds:.1f}", f"{ratios[-1]:.3f}")
            rows.append((f"{key[0]} {key[1]}", key[2], *figures, same))
    text = f"{aligned(rows)}\ngeometric mean of old/new: {geometric_mean(ratios):.4f}" if ratios else "no common cell"
    for name, cells, others in (("old", before, after), ("new", after, before)):
        only = [" ".join(key) for key in cells if key not in others]
        text += "".join(f"\nonly in the {name} log: {cell}" for cell in only)
    return text


def aligned(rows: list[tuple[str, ...]]) -> str:
    """Rows of cells as text in columns, the first row a heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join((lines[0], "  ".join("─" * width for width in widths), *lines[1:]))
