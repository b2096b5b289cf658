"""A folder of candidates that any number of processes, also on several hosts, measure together.

::

    emission.json           arch, versions
    candidates/<id>.json    and sources/<id>.cu, modules/<id>.so; modules/<id>.failed is why there is none
    batches/<name>.json     what is timed together
    claims/<task>           somebody is at it; renamed to done/<task> at the end
    records/<worker>.jsonl  what each has measured; child.log is what the kernels' processes printed

A claim is a file that only one process can create.  Its owner touches it every few seconds; one that hasn't been for
``STALE`` seconds, or whose process on the same host is gone, may be taken over.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

from schedules.builder import records
from schedules.builder.pack import write_atomically
from schedules.tuning.candidate import Batch, Candidate, Emission

#: Seconds after which a claim that nobody touches may be taken over, and between touches.
STALE, HEARTBEAT = 60.0, 5.0


class Folder:
    """The files of one folder."""

    def __init__(self, path: Path):
        self.path = path

    def make(self) -> Folder:
        """Make what isn't there."""
        for name in ("candidates", "sources", "modules", "batches", "claims", "done", "records"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        return self

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

    def add_batch(self, batch: Batch) -> None:
        write_atomically(self.path / "batches" / f"{batch.name}.json", batch.to_json())

    def batches(self) -> list[Batch]:
        """In order."""
        return [Batch.from_json(p.read_text()) for p in sorted((self.path / "batches").glob("*.json"))]

    def log(self, device: str) -> Path:
        """The file that this process appends its records of a device to."""
        worker = f"{socket.gethostname()}-{os.getpid()}-{device.replace(':', '')}"
        return self.path / "records" / f"{worker}.jsonl"

    def logs(self) -> list[Path]:
        return sorted((self.path / "records").glob("*.jsonl"))

    def records(self) -> Iterator[records.Line]:
        """What all processes have measured so far."""
        for path in self.logs():
            yield from records.read(path)

    def is_done(self, task: str) -> bool:
        return (self.path / "done" / task).exists()


class Claims:
    """What this process is at; a context that keeps its claims alive, and gives up those that are left at the end."""

    def __init__(self, folder: Folder, stale: float = STALE):
        self.folder, self.stale = folder, stale
        self.me = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
        self.me["started"] = _started(os.getpid())
        self.clock = folder.path / "claims" / f".clock-{self.me['token']}"
        self.held: set[str] = set()
        self.ended = threading.Event()
        self.lock = threading.Lock()

    def __enter__(self) -> Claims:
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()
        for task in tuple(self.held):
            self.release(task)
        self.clock.unlink(missing_ok=True)

    def take(self, task: str) -> bool:
        """Whether the task is now this process's; not if it is done or somebody else's."""
        if self.folder.is_done(task):
            return False
        path = self._path(task)
        if not self._create(path):
            if not self._is_stale(path):
                return False
            # Of several that find it stale, the rename succeeds for one.
            grave = path.with_name(f".stale-{uuid.uuid4().hex}")
            try:
                os.rename(path, grave)
            except FileNotFoundError:
                return False
            grave.unlink()
            if not self._create(path):
                return False
        if self.folder.is_done(task):  # it was finished between the first look and the claim
            path.unlink()
            return False
        with self.lock:
            self.held.add(task)
        return True

    def finish(self, task: str) -> None:
        """The task is done, once and for all."""
        with self.lock:
            self.held.discard(task)
        try:
            os.rename(self._path(task), self.folder.path / "done" / task)
        except FileNotFoundError:  # it was taken over while this process slept; the new owner finishes it
            return

    def release(self, task: str) -> None:
        """Leave the task to others."""
        with self.lock:
            self.held.discard(task)
        self._path(task).unlink(missing_ok=True)

    def _path(self, task: str) -> Path:
        return self.folder.path / "claims" / task

    def _create(self, path: Path) -> bool:
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w") as file:
            json.dump(self.me, file)
        return True

    def _is_stale(self, path: Path) -> bool:
        try:
            touched, text = path.stat().st_mtime, path.read_text()
        except FileNotFoundError:
            return False
        self.clock.touch()  # the time of the machine that has the folder, not of this one
        if self.clock.stat().st_mtime - touched > self.stale:
            return True
        try:
            owner = json.loads(text)
        except ValueError:
            return False  # its owner is about to write
        return owner["host"] == self.me["host"] and _started(owner["pid"]) != owner["started"]

    def _beat(self) -> None:
        while not self.ended.wait(min(HEARTBEAT, self.stale / 4)):
            with self.lock:
                for task in self.held:
                    try:
                        os.utime(self._path(task))
                    except FileNotFoundError:  # as in finish()
                        continue


def _started(pid: int) -> str:
    """When a process of this host started, so that another with its number isn't taken for it; empty if it is gone."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[19]
    except OSError:
        return ""
