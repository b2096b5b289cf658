"""Pictures of runs, each for a light and for a dark page.

Colours are those of Okabe and Ito ("Color Universal Design", 2008), which colour-blind people can tell apart; lines
differ in their markers, bars in their hatching, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tvm_flash.bench import ratios, require, tables
from tvm_flash.bench.results import Cell, Implementation, Run
from tvm_flash.errors import InvalidArgumentError

#: Inches and dots an inch: twice the width at which a README shows a picture.
WIDTH, DPI = 10.0, 160

_MARKERS = "osD^vPX"


@dataclass(frozen=True)
class Theme:
    """Colours of a page: background, text, rules, ours, peers in order."""

    background: str
    text: str
    rules: str
    ours: str
    peers: tuple[str, ...]


LIGHT = Theme("#ffffff", "#1f2328", "#d1d9e0", "#0072b2", ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#7f7f7f"))
DARK = Theme("#0d1117", "#f0f6fc", "#3d444d", "#56b4e9", ("#ff9248", "#2ec99d", "#e6a5cb", "#f0e442", "#a0a0a0"))


def write(runs: Sequence[Run], path: Path) -> list[Path]:
    """Draw the runs: one picture for a light page at ``path``, one for a dark page beside it (``<name>_dark.png``).

    Raises
    ------
    NotSupportedError: there is no matplotlib.
    InvalidArgumentError: there are several runs, or one without figures.
    """
    require("--plot", "matplotlib")
    from matplotlib.figure import Figure

    if len(runs) != 1 or not runs[0].cells:
        raise InvalidArgumentError(
            f"--plot: draws one run with figures, not {len(runs)}; name the files of one machine"
        )
    draw = _bars if tables.is_cpu(runs[0]) else _lines
    written = []
    for theme, target in ((LIGHT, path), (DARK, path.with_name(f"{path.stem}_dark{path.suffix}"))):
        figure = Figure(figsize=(WIDTH, 1), dpi=DPI, facecolor=theme.background, layout="constrained")
        draw(runs[0], figure, theme)
        figure.savefig(target)
        written.append(target)
    return written


def _shown(run: Run) -> list[Implementation]:
    """The main one of ours and the peers."""
    return [run.implementations[0], *(i for i in run.implementations if not i.ours)]


def _title(run: Run, what: str) -> str:
    versions = [f"torch {run.machine['torch']}"]
    versions += [f"cuDNN {run.machine['cuDNN']}"] if "cuDNN" in run.machine else []
    return f"{what} on one {run.device} ({', '.join(versions)}; {run.created[:10]})"


# ---------------------------------------------------------------- GPU: speed by length


def _lines(run: Run, figure, theme: Theme) -> None:
    """A panel for each mask and head_dim: speed by sequence length, of the run's first dtype."""
    dtype, mode = run.dtypes()[0], run.modes[0]
    cells = [c for c in run.cells if c.workload.dtype == dtype and not c.disturbed]
    dims, masks = (sorted({f(c) for c in cells}) for f in (lambda c: c.workload.head_dim, lambda c: c.workload.causal))
    figure.set_size_inches(WIDTH, 0.9 + 2.45 * len(masks))
    axes = figure.subplots(len(masks), len(dims), sharex=True, sharey=True, squeeze=False)
    name, one = tables.unit(run)
    peak = run.peak(dtype)
    for row, causal in zip(axes, masks, strict=True):
        for axis, dim in zip(row, dims, strict=True):
            panel = [c for c in cells if (c.workload.head_dim, c.workload.causal) == (dim, causal)]
            for number, implementation in enumerate(_shown(run)):
                _line(axis, panel, implementation, number, mode, one, theme)
            if peak and not peak.disturbed:
                axis.axhline(
                    peak.flops[mode] / one, color=theme.text, lw=1, ls=(0, (1, 2)), label=f"torch.matmul, {peak.size}³"
                )
            axis.set_title(f"head_dim {dim}, {'causal' if causal else 'full'}", color=theme.text, fontsize=12)
            _length_axis(axis, sorted({c.workload.seqlen_q for c in cells}))
            _plain(axis, theme)
        row[0].set_ylabel(name, color=theme.text, fontsize=12)
    axes[-1][len(dims) // 2].set_xlabel("positions", color=theme.text, fontsize=12)
    axes[0][0].set_ylim(bottom=0)
    _around(figure, axes[0][0], _title(run, f"{'Backward' if run.backward else 'Forward'} attention, {dtype},"), theme)


def _around(figure, axis, title: str, theme: Theme):
    """The title of a figure, and the legend of one of its panels below them all."""
    handles, labels = axis.get_legend_handles_labels()
    figure.suptitle(title, color=theme.text, fontsize=13)
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=len(labels),
        frameon=False,
        labelcolor=theme.text,
        fontsize=12,
    )


def _line(axis, panel: list[Cell], implementation: Implementation, number: int, mode: str, one: float, theme: Theme):
    points = [
        (c.workload.seqlen_q, c.workload.flops / m.seconds[mode] / one) for c in panel if (m := _in(c, implementation))
    ]
    ours = implementation.ours
    axis.plot(
        *zip(*sorted(points), strict=True) if points else ([], []),
        color=theme.ours if ours else theme.peers[number - 1],
        marker=_MARKERS[number],
        markersize=6 if ours else 5,
        lw=2.8 if ours else 1.8,
        ls="--" if implementation.recorded else "-",
        zorder=3 if ours else 2,
        label=f"tvm_flash {implementation.name}"
        if ours
        else implementation.name + " (recorded)" * implementation.recorded,
    )


def _in(cell: Cell, implementation: Implementation):
    return cell.of(implementation.key)


def _length_axis(axis, lengths: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [str(n) if n < 1024 else f"{n // 1024}k" for n in lengths])
    axis.minorticks_off()


# ---------------------------------------------------------------- CPU: ratio by shape


def _bars(run: Run, figure, theme: Theme) -> None:
    """A panel for each dtype: how many times as fast as the best peer, by shape and mask."""
    mode, ours = run.modes[0], run.implementations[0]
    shapes = list(dict.fromkeys(_shape(run, c) for c in run.cells))
    figure.set_size_inches(WIDTH, 1.3 + 0.5 * len(shapes))
    dtypes = run.dtypes()
    panels = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
    masks = sorted({c.workload.causal for c in run.cells})
    height = 0.8 / len(masks)
    for axis, dtype in zip(panels, dtypes, strict=True):
        for number, causal in enumerate(masks):
            cells = [c for c in run.cells if (c.workload.dtype, c.workload.causal) == (dtype, causal)]
            values = [ratios.ratio(c, ours.key, ratios.peers(run), mode) or 0 for c in cells]
            places = [shapes.index(_shape(run, c)) + (number - (len(masks) - 1) / 2) * height for c in cells]
            bars = axis.barh(
                places, values, height, color=theme.ours if not causal else theme.background, edgecolor=theme.ours,
                hatch="///" if causal else None, lw=1.2, label="causal" if causal else "full",
            )  # fmt: skip
            axis.bar_label(bars, [f"{v:.2f}" for v in values], padding=3, color=theme.text, fontsize=10)
        axis.axvline(1, color=theme.text, lw=1.2)
        axis.set_title(dtype, color=theme.text, fontsize=12)
        axis.set_yticks(range(len(shapes)), shapes)
        axis.margins(x=0.18)
        _plain(axis, theme, "x")
    panels[0].invert_yaxis()
    panels[0].set_ylabel("batch, heads, positions, head_dim", color=theme.text, fontsize=11)
    _around(figure, panels[0], _title(run, f"Times as fast as PyTorch ({ours.name}, {mode})"), theme)


def _shape(run: Run, cell: Cell) -> str:
    return tables.shape(cell.workload)


def _plain(axis, theme: Theme, rules: str = "both") -> None:
    """Light rules, no box, the page's colours."""
    axis.set_facecolor(theme.background)
    axis.grid(axis=rules, color=theme.rules, lw=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=theme.text, labelsize=11, length=0)
    for side in axis.spines.values():
        side.set_visible(False)
