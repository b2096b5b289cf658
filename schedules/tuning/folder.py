"""A folder of candidates, and what was measured of them.

::

    emission.json           arch, versions
    candidates/<id>.json    and sources/<id>.cu, modules/<id>.so; modules/<id>.failed is why there is none
    batches/<name>.json     what is timed together; done/<name> once that is complete
    records/<worker>.jsonl  what each process has measured; child.log is what the kernels' processes printed
    lock                    held by the process that measures

One process at a time measures a folder; it may use all GPUs of its host, or the hosts of a Ray cluster.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from schedules.builder import records
from schedules.builder.pack import exclusive, write_atomically
from schedules.tuning.candidate import Batch, Candidate, Emission


class FolderBusyError(RuntimeError):
    """Another process measures the same folder."""


class Folder:
    """The files of one folder."""

    def __init__(self, path: Path):
        self.path = path

    def make(self) -> Folder:
        """Make what isn't there."""
        for name in ("candidates", "sources", "modules", "batches", "done", "records"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        return self

    def locked(self) -> AbstractContextManager[None]:
        """Hold the right to measure this folder.

        Raises
        ------
        FolderBusyError: another process has it.
        """
        busy = FolderBusyError(f"{self.path}: another process measures this folder; wait until it has ended")
        return exclusive(self.path / "lock", busy)

    def write_emission(self, emission: Emission) -> None:
        write_atomically(self.path / "emission.json", emission.to_json())

    def emission(self) -> Emission:
        """What holds for all candidates.

        Raises
        ------
        ValueError: nothing was emitted here.
        """
        try:
            return Emission.from_json((self.path / "emission.json").read_text())
        except FileNotFoundError:
            raise ValueError(f"{self.path}: holds no emission.json; make it with scripts/tune.py --emit") from None

    def add(self, candidate: Candidate) -> None:
        write_atomically(self.path / "candidates" / f"{candidate.id}.json", candidate.to_json())

    def candidate(self, id: str) -> Candidate:
        return Candidate.from_json((self.path / "candidates" / f"{id}.json").read_text())

    def has(self, id: str) -> bool:
        return (self.path / "candidates" / f"{id}.json").exists()

    def source(self, id: str) -> Path:
        return self.path / "sources" / f"{id}.cu"

    def module(self, id: str) -> Path:
        return self.path / "modules" / f"{id}.so"

    def failure(self, id: str) -> str | None:
        """Why a candidate has no module; None if it has one, or isn't compiled yet."""
        path = self.path / "modules" / f"{id}.failed"
        return path.read_text() if path.exists() else None

    def fail(self, id: str, reason: str) -> None:
        write_atomically(self.path / "modules" / f"{id}.failed", reason)

    def is_compiled(self, id: str) -> bool:
        """Whether a candidate has a module, or a reason why not."""
        return self.module(id).exists() or self.failure(id) is not None

    def add_batch(self, batch: Batch) -> None:
        write_atomically(self.path / "batches" / f"{batch.name}.json", batch.to_json())

    def batches(self) -> list[Batch]:
        """In order."""
        return [Batch.from_json(p.read_text()) for p in sorted((self.path / "batches").glob("*.json"))]

    def left(self) -> list[Batch]:
        """The batches that aren't complete, in order."""
        return [batch for batch in self.batches() if not (self.path / "done" / batch.name).exists()]

    def finish(self, batch: Batch) -> None:
        """A batch is complete."""
        (self.path / "done" / batch.name).touch()

    def log(self) -> Path:
        """The file that this process appends its records to."""
        return self.path / "records" / f"{socket.gethostname()}-{os.getpid()}.jsonl"

    def records(self) -> Iterator[records.Line]:
        """What all processes have measured so far."""
        for path in sorted((self.path / "records").glob("*.jsonl")):
            yield from records.read(path)
