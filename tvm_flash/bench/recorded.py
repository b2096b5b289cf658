"""Figures of a peer that was measured elsewhere, and can't be run beside us.

They become comparable by a *bridge*: an implementation that was measured in both runs.  The peer's figure counts as ::

    recorded speed of the peer × (speed of the bridge here / recorded speed of the bridge)

cell by cell.  The file is JSON::

    {"schema": 2,
     "key": "fa4", "name": "FA4",                  how tables call it
     "about": "FlashAttention-4 …",                what it is, in words
     "bridge": "cudnn",                            key of an implementation of the run
     "device": "NVIDIA H200", "date": "2026-11-22",
     "versions": {"flash-attn-4": "4.0.0b36", …},
     "method": "steady state, …",
     "figures": [{"workload": "b=32 h=32 s=512 d=64 full float16",
                  "tflops": 317.1, "bridge_tflops": 353.9, "error": 2.7e-4}, …]}

A cell without a figure, or in which the bridge didn't run, has none.  Only the main mode of a run is compared.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tvm_flash.bench.results import Cell, Implementation, Measurement, Run
from tvm_flash.errors import InvalidArgumentError
from tvm_flash.measure.workloads import Workload

SCHEMA = 2


@dataclass(frozen=True)
class Figure:
    """One recorded cell: operations a second of the peer and of the bridge, and the peer's error."""

    flops: float
    bridge_flops: float
    error: float | None


@dataclass(frozen=True)
class Reference:
    """A peer's recorded figures by workload."""

    implementation: Implementation
    bridge: str
    figures: dict[Workload, Figure]

    def beside_all(self, runs: Sequence[Run]) -> list[Run]:
        """The runs, those that have the bridge with the peer as one more implementation.

        Raises
        ------
        InvalidArgumentError: none has the bridge.
        """
        fit = [self.bridge in [i.key for i in run.implementations] for run in runs]
        if not any(fit):
            raise InvalidArgumentError(f"--reference: is bridged by {self.bridge!r}, which no run here has")
        return [self.beside(run) if fits else run for run, fits in zip(runs, fit, strict=True)]

    def beside(self, run: Run) -> Run:
        """A run that has the bridge, with the peer as one more implementation."""
        return dataclasses.replace(
            run,
            implementations=(*run.implementations, self.implementation),
            cells=tuple(self._beside(cell, run.modes[0]) for cell in run.cells),
        )

    def _beside(self, cell: Cell, mode: str) -> Cell:
        figure, bridge = self.figures.get(cell.workload), cell.of(self.bridge)
        if figure is None or bridge is None or cell.disturbed:
            return cell
        seconds = bridge.seconds[mode] * figure.bridge_flops / figure.flops
        recorded = Measurement(self.implementation.key, {mode: seconds}, {mode: (seconds, seconds)}, figure.error)
        return dataclasses.replace(cell, measurements=(*cell.measurements, recorded))


def read(path: Path) -> Reference:
    """Read a file of recorded figures.

    Raises
    ------
    InvalidArgumentError: there is no such file, or it isn't in the format above.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["schema"] != SCHEMA:
            raise ValueError(f"schema is {raw['schema']!r}, expected {SCHEMA}")
        versions = ", ".join(f"{name} {version}" for name, version in raw["versions"].items())
        about = (
            f"{raw['about']}, as recorded on one {raw['device']} on {raw['date']} ({versions}), "
            f"scaled in each cell by {raw['bridge']}'s speed here over its speed there"
        )
        figures = {
            Workload.parse(entry["workload"]): Figure(
                entry["tflops"] * 1e12, entry["bridge_tflops"] * 1e12, entry.get("error")
            )
            for entry in raw["figures"]
        }
        implementation = Implementation(raw["key"], raw["name"], about, ours=False, recorded=True)
        return Reference(implementation, raw["bridge"], figures)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise InvalidArgumentError(
            f"--reference {path}: can't be read as recorded figures (see tvm_flash/bench/recorded.py): "
            f"{type(e).__name__}: {e}"
        ) from e
