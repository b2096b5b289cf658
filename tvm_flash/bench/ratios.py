"""Ours over the peers: the best peer of each cell, geometric means, the worst cell."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from tvm_flash.bench.results import Cell, Run


@dataclass(frozen=True)
class Ratio:
    """Speed of ours over a peer's in one cell; above 1 ours is faster."""

    cell: Cell
    value: float


@dataclass(frozen=True)
class Summary:
    """All cells of one dtype: ours against a peer, or against the best peer of each cell (``peer`` is then empty)."""

    ours: str
    peer: str
    dtype: str
    mode: str
    ratios: tuple[Ratio, ...]

    @property
    def mean(self) -> float:
        """The geometric mean."""
        return statistics.geometric_mean(r.value for r in self.ratios)

    @property
    def worst(self) -> Ratio:
        return min(self.ratios, key=lambda r: r.value)

    @property
    def lost(self) -> list[Ratio]:
        """Cells in which the peer is faster, the worst first."""
        return sorted((r for r in self.ratios if r.value < 1), key=lambda r: r.value)


def ratio(cell: Cell, ours: str, peers: Iterable[str], mode: str) -> float | None:
    """Speed of ours over that of the fastest of the peers; None without figures, or where they can't be compared."""
    if cell.disturbed:
        return None
    mine = cell.of(ours)
    others = [m.seconds[mode] for m in map(cell.of, peers) if m and mode in m.seconds]
    return min(others) / mine.seconds[mode] if mine and others else None


def peers(run: Run, recorded: bool = True) -> list[str]:
    """Keys of the implementations that aren't ours."""
    return [i.key for i in run.implementations if not i.ours and (recorded or not i.recorded)]


def summary(run: Run, ours: str, peer: str, dtype: str, mode: str) -> Summary | None:
    """Ours against a peer, or against the best of all where ``peer`` is empty; None if no cell has both."""
    others = [peer] if peer else peers(run)
    cells = (cell for cell in run.cells if cell.workload.dtype == dtype)
    found = [(cell, ratio(cell, ours, others, mode)) for cell in cells]
    ratios = tuple(Ratio(cell, value) for cell, value in found if value is not None)
    return Summary(ours, peer, dtype, mode, ratios) if ratios else None
