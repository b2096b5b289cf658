"""``scripts/tune.py report``: a log as pictures, and a table of what tuned choices gain.

Three pictures: ``space.png``, every configuration's speed by the value of each of its fields; ``search.png``, how the
best so far grew as the search went on; ``peers.png``, our default and tuned kernels and the peers by length.
Needs matplotlib.
"""

from __future__ import annotations

import argparse
import datetime
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from schedules.builder import records
from schedules.builder.records import Line, Measurement, PeerMeasurement
from schedules.tuning import tables
from schedules.tuning.strategy import geometric_mean
from tvm_flash.measure.workloads import Workload
from tvm_flash.operators import FORWARD

#: Okabe and Ito, "Color Universal Design", 2008: colour-blind people can tell them apart.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
_DPI = 130
#: A search is over if nothing is measured for so many seconds; the pause doesn't count.
_PAUSE = 120.0


def main(arguments: Sequence[str]) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="tune.py report", description="Draw what was measured, and what it gained.")
    parser.add_argument("logs", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, default=Path("report"), help="folder for pictures (default: ./report)")
    parser.add_argument("--arch", default="", help="only what was measured for this arch")
    options = parser.parse_args(arguments)
    lines = [line for path in options.logs for line in records.read(path)]
    measured = [r for r in tables.of_newest_source(tables.usable(lines)) if options.arch in ("", r.arch)]
    if not measured:
        raise ValueError(f"{', '.join(map(str, options.logs))}: nothing was measured successfully")
    peers = [r for r in lines if isinstance(r, PeerMeasurement)]
    options.output.mkdir(parents=True, exist_ok=True)
    for name, figure in (
        ("space", space(measured)),
        ("search", search(measured)),
        ("peers", by_length(measured, peers)),
    ):
        path = options.output / f"{name}.png"
        figure.savefig(path)
        print(path)
    print(summary(lines))
    print(tables.gains(measured))
    return 0


def summary(lines: Iterable[Line]) -> str:
    """How many configurations came to what."""
    measured = [r for r in lines if isinstance(r, Measurement)]
    by_status: dict[str, set[str]] = {}
    for r in measured:
        by_status.setdefault(r.status, set()).add(r.kernel_hash)
    counts = ", ".join(f"{len(hashes)} {status}" for status, hashes in sorted(by_status.items()))
    return f"{len({r.kernel_hash for r in measured})} kernels in {len(measured)} measurements: {counts}"


def _figure(width: float, height: float):
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as e:
        raise ValueError(f'report: needs {e.name}; pip install "tvm-flash[bench]"') from e
    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def space(measured: Sequence[Measurement]):
    """A panel for each field of the configurations: speed over the default's by the field's value, a dot a
    measurement, coloured by head_dim; a line through the best of each value."""
    measured = [r for r in measured if r.gain]
    fields = {id(r): _fields(r) for r in measured}
    values = {
        name: sorted({fields[id(r)][name] for r in measured if name in fields[id(r)]})
        for r in measured
        for name in fields[id(r)]
    }
    names = [name for name in values if len(values[name]) > 1]
    dims = sorted({r.head_dim for r in measured})
    columns = max(1, min(4, len(names)))
    rows = max(1, math.ceil(len(names) / columns))
    figure = _figure(3.4 * columns, 2.8 * rows)
    figure.suptitle(f"{_device(measured)}: speed over the default's, by the value of each field")
    for number, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, number + 1)
        for k, dim in enumerate(dims):
            mine = [r for r in measured if r.head_dim == dim and name in fields[id(r)]]
            spread = (k - (len(dims) - 1) / 2) * 0.22
            places = [values[name].index(fields[id(r)][name]) + spread for r in mine]
            axes.plot(places, [r.gain for r in mine], ".", color=_COLOURS[k], alpha=0.35, markersize=4)
            best = {v: max((r.gain for r in mine if fields[id(r)][name] == v), default=None) for v in values[name]}
            seen = [v for v in values[name] if best[v]]
            axes.plot(
                [values[name].index(v) + spread for v in seen],
                [best[v] for v in seen],
                "_-",
                color=_COLOURS[k],
                label=f"head_dim {dim}",
                linewidth=1,
            )
        axes.axhline(1.0, color="#1f2328", linewidth=0.6)
        axes.set_xticks(range(len(values[name])), [str(v) for v in values[name]], fontsize=7)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        if number == 0:
            axes.legend(fontsize=7)
    return figure


def _fields(r: Measurement) -> dict[str, object]:
    """A configuration's values by field; of kinds beside the usual one, its kind and field."""
    return r.config if r.kernel_kind == FORWARD else {f"{r.kernel_kind} {name}": x for name, x in r.config.items()}


def search(measured: Sequence[Measurement]):
    """Dots: speed over the default's of each measurement as time went on; the line: the geometric mean over all kernels
    and problems of the best so far."""
    measured = sorted((r for r in measured if r.gain), key=lambda r: r.date)
    minutes = _minutes(measured)
    figure = _figure(9, 4.5)
    axes = figure.add_subplot()
    for k, kernel in enumerate(sorted({tables.kernel_of(r) for r in measured})):
        chosen = [i for i, r in enumerate(measured) if tables.kernel_of(r) == kernel]
        axes.plot(
            [minutes[i] for i in chosen], [measured[i].gain for i in chosen], ".", color=_COLOURS[k % len(_COLOURS)],
            alpha=0.3, label=f"{_shown(kernel)}, one measurement",
        )  # fmt: skip
    best = {(tables.kernel_of(r), r.problem): 1.0 for r in measured}
    line = []
    for r in measured:
        cell = tables.kernel_of(r), r.problem
        best[cell] = max(best[cell], r.gain)
        line.append(geometric_mean(best.values()))
    axes.step(minutes, line, where="post", color="#1f2328", label=f"best so far, geometric mean: {line[-1]:.3f}")
    axes.axhline(1.0, color="#1f2328", linewidth=0.6)
    axes.set_xlabel("minutes of measuring")
    axes.set_ylabel("speed over the default's")
    axes.set_title(f"{_device(measured)}: {len({r.kernel_hash for r in measured})} kernels")
    axes.legend(fontsize=8)
    return figure


def _minutes(measured: Sequence[Measurement]) -> list[float]:
    """Time of each since the first, without the pauses between searches."""
    now, passed, previous = [], 0.0, None
    for r in measured:
        date = datetime.datetime.fromisoformat(r.date)
        if previous is not None and (step := (date - previous).total_seconds()) < _PAUSE:
            passed += step
        previous = date
        now.append(passed / 60)
    return now


def by_length(measured: Sequence[Measurement], peers: Sequence[PeerMeasurement]):
    """A panel for each dtype, head_dim and mask, of ragged batches and backwards apart: TFLOP/s by length of our
    defaults, our best, and the peers."""
    cells = tables.by_cell(measured)
    speeds: dict[tuple, dict[str, dict[int, float]]] = {}
    for (_, kernel, problem), cell in cells.items():
        w, name = Workload.parse(problem), _shown(kernel)
        lines = speeds.setdefault(_panel(w), {})
        lines.setdefault(f"{name} tuned", {})[w.seqlen_kv] = tables.best_of(cell).tflops
        for r in cell:
            if r.default:
                lines.setdefault(f"{name} default", {})[w.seqlen_kv] = r.tflops
    for r in peers:
        w = Workload.parse(r.problem)
        if _panel(w) in speeds:
            speeds[_panel(w)].setdefault(r.peer, {})[w.seqlen_kv] = r.tflops
    names = sorted({name for lines in speeds.values() for name in lines}, key=lambda n: (not n.startswith("V"), n))
    columns = min(4, len(speeds))
    rows = math.ceil(len(speeds) / columns)
    figure = _figure(3.4 * columns, 2.8 * rows)
    figure.suptitle(f"{_device(measured)}: TFLOP/s by length")
    for number, ((words, dtype, head_dim, mask), lines) in enumerate(sorted(speeds.items())):
        axes = figure.add_subplot(rows, columns, number + 1)
        for k, name in enumerate(names):
            if name in lines:
                points = sorted(lines[name].items())
                style = "--" if name.endswith("default") else "-"
                colour = _COLOURS[k // 2 % len(_COLOURS) if name.startswith("V") else 2 + k % 5]
                axes.plot(*zip(*points, strict=True), style, marker=".", color=colour, label=name, linewidth=1.2)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_title(", ".join((*words, dtype, f"head_dim {head_dim}", mask)), fontsize=8)
        axes.tick_params(labelsize=7)
        if number == 0:
            axes.legend(fontsize=6)
    return figure


def _panel(w: Workload) -> tuple:
    return w.words, w.dtype, w.head_dim, w.mask


def _shown(kernel: str) -> str:
    """A template and a kind as pictures name them: ``"V2 decode"``."""
    template, _, kind = kernel.partition(" ")
    return f"{template.upper()} {kind.replace('_', ' ')}".strip()


def _device(measured: Sequence[Measurement]) -> str:
    return ", ".join(dict.fromkeys(f"{r.device} ({r.arch})" for r in measured))
