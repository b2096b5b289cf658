"""What a run found: plain data, JSON in and out.

A file of results holds one :class:`Run`; all times are seconds.  ``python -m tvm_flash bench --from FILE`` makes the
tables and pictures of it again.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tvm_flash.errors import InvalidArgumentError
from tvm_flash.measure.peers import Implementation
from tvm_flash.measure.workloads import Workload

SCHEMA = 2

#: The steady clock of a GPU at its power cap makes calls up to 1.13 times as long as after a pause (65 cells of an
#: H200); more than this is something else that slows the device down: 2.4 and 3.2 times for some seconds of one run.
DISTURBED = 1.3


@dataclass(frozen=True)
class Measurement:
    """One implementation on one workload.

    Attributes
    ----------
    implementation: its key, as in ``Run.implementations``.
    seconds: time of a call by mode (``"steady"`` and ``"burst"``, or ``"blocks"`` and ``"turns"``).
    spread: shortest and longest of the rounds by mode, as ``(low, high)``.
    error: norm of the difference from float64, relative; None if it wasn't measured.
    kernel, source_hash: which of our kernels ran.
    failure: why there are no figures.
    """

    implementation: str
    seconds: dict[str, float] = field(default_factory=dict)
    spread: dict[str, tuple[float, float]] = field(default_factory=dict)
    error: float | None = None
    kernel: str = ""
    source_hash: str = ""
    failure: str = ""


@dataclass(frozen=True)
class Cell:
    """One workload and what each implementation did with it."""

    workload: Workload
    measurements: tuple[Measurement, ...]

    @property
    def disturbed(self) -> bool:
        """Whether the device slowed down meanwhile, whoever was running; then nothing can be compared."""
        times = (m.seconds for m in self.measurements)
        return any(t["steady"] > DISTURBED * t["burst"] for t in times if "steady" in t and "burst" in t)

    def of(self, implementation: str) -> Measurement | None:
        """The measurement of an implementation; None if there are no times of it."""
        return next((m for m in self.measurements if m.implementation == implementation and m.seconds), None)


@dataclass(frozen=True)
class Peak:
    """The speed of torch.matmul in this run, on square matrices of ``size`` rows: operations a second by mode."""

    dtype: str
    size: int
    flops: dict[str, float]

    @property
    def disturbed(self) -> bool:
        """As of a cell."""
        return self.flops.get("burst", 0) > DISTURBED * self.flops.get("steady", float("inf"))


@dataclass(frozen=True)
class Run:
    """One run of the benchmark.

    Attributes
    ----------
    created: UTC.
    command: reproduces the run.
    machine: device, driver, versions, as names and values.
    method: how it was timed, in words, by mode; the first mode is the main one.
    implementations: ours first, the main one of ours before all.
    peaks: of the device, by dtype.
    cells: in the order of the grid.
    calls: the smallest call, whose time is that of calling.
    """

    created: str
    command: str
    machine: dict[str, str]
    method: dict[str, str]
    implementations: tuple[Implementation, ...]
    peaks: tuple[Peak, ...] = ()
    cells: tuple[Cell, ...] = ()
    calls: tuple[Cell, ...] = ()
    schema: int = SCHEMA

    @property
    def modes(self) -> tuple[str, ...]:
        return tuple(self.method)

    @property
    def device(self) -> str:
        return self.machine["device"]

    @property
    def backward(self) -> bool:
        """Whether gradients were computed; a run has one or the other."""
        return any(cell.workload.backward for cell in self.cells)

    def dtypes(self) -> tuple[str, ...]:
        """In the order of the cells."""
        return tuple(dict.fromkeys(cell.workload.dtype for cell in self.cells))

    def peak(self, dtype: str) -> Peak | None:
        return next((p for p in self.peaks if p.dtype == dtype), None)

    def of_dtypes(self, dtypes: Collection[str]) -> Run:
        """The run with no other dtypes than these."""
        cells, calls = (tuple(c for c in x if c.workload.dtype in dtypes) for x in (self.cells, self.calls))
        return dataclasses.replace(
            self, peaks=tuple(p for p in self.peaks if p.dtype in dtypes), cells=cells, calls=calls
        )

    def only(self, peers: Collection[str]) -> Run:
        """The run with no other peers than these."""
        kept = tuple(i for i in self.implementations if i.ours or i.key in peers)
        keys = {i.key for i in kept}

        def of(cells: tuple[Cell, ...]) -> tuple[Cell, ...]:
            return tuple(
                dataclasses.replace(c, measurements=tuple(m for m in c.measurements if m.implementation in keys))
                for c in cells
            )

        return dataclasses.replace(self, implementations=kept, cells=of(self.cells), calls=of(self.calls))

    def to_json(self) -> str:
        raw = dataclasses.asdict(self)
        for name in ("cells", "calls"):
            for cell, fields in zip(getattr(self, name), raw[name], strict=True):
                fields["workload"] = str(cell.workload)
        return json.dumps(raw, indent=1, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Run:
        """Read a run.

        Raises
        ------
        ValueError: the text isn't JSON, has another schema, or lacks a field.
        """
        raw = json.loads(text)
        if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
            found = raw.get("schema") if isinstance(raw, dict) else type(raw).__name__
            raise ValueError(f"schema is {found!r}, expected {SCHEMA}")
        try:
            return Run(
                **{
                    **raw,
                    "implementations": tuple(Implementation(**i) for i in raw["implementations"]),
                    "peaks": tuple(Peak(**p) for p in raw["peaks"]),
                    "cells": tuple(map(_cell, raw["cells"])),
                    "calls": tuple(map(_cell, raw["calls"])),
                }
            )
        except (KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"a field is missing or not understood: {e}") from e


def _cell(raw: dict[str, Any]) -> Cell:
    def measurement(fields):
        spread = {mode: tuple(ends) for mode, ends in fields["spread"].items()}
        return Measurement(**{**fields, "spread": spread})

    return Cell(Workload.parse(raw["workload"]), tuple(map(measurement, raw["measurements"])))


def write(run: Run, path: Path) -> None:
    """Write a run; the file is complete or not there, whatever happens meanwhile."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(run.to_json(), encoding="utf-8")
    os.replace(draft, path)


def read(path: Path) -> Run:
    """Read a file of results.

    Raises
    ------
    InvalidArgumentError: there is no such file, or it isn't one of results.
    """
    try:
        return Run.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InvalidArgumentError(f"{path}: can't be read as results of `tvm_flash bench --json`: {e}") from e


def join(runs: list[Run]) -> list[Run]:
    """Runs of one machine with the same method as one, in order; the first command and date stand for all.

    A workload that several of them measured keeps its last figures.
    """
    joined: dict[tuple, Run] = {}
    for run in runs:
        key = (tuple(sorted(run.machine.items())), run.modes, run.implementations, run.backward)
        if key not in joined:
            joined[key] = run
            continue
        first = joined[key]
        commands = dict.fromkeys((*first.command.split("\n"), *run.command.split("\n")))
        joined[key] = dataclasses.replace(
            first,
            method={
                m: " / ".join(dict.fromkeys((*text.split(" / "), run.method[m]))) for m, text in first.method.items()
            },
            command="\n".join(commands),
            peaks=tuple({p.dtype: p for p in (*first.peaks, *run.peaks)}.values()),
            cells=tuple({c.workload: c for c in (*first.cells, *run.cells)}.values()),
            calls=tuple({c.workload: c for c in (*first.calls, *run.calls)}.values()),
        )
    return list(joined.values())
