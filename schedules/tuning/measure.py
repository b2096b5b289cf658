"""Measuring a folder of candidates on the devices of this host, batch by batch.

Needs no TVM: candidates come as sources or modules.  :mod:`schedules.tuning.cluster` does the same on many hosts.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from schedules.builder import records
from schedules.tuning.batch import BatchRun, Options
from schedules.tuning.candidate import Batch
from schedules.tuning.compiler import Compiler
from schedules.tuning.folder import Folder
from schedules.tuning.process import Process
from schedules.tuning.progress import Progress


class Engine(Protocol):
    """What measures a folder."""

    def measure(self, folder: Folder, options: Options, progress: Progress) -> None:
        """Measure what is left.

        Raises
        ------
        UnhealthyDeviceError: a device doesn't recover from a kernel; whatever else could be measured has been.
        FolderBusyError: another process measures the folder.
        """


class Recorder:
    """Puts each record on disk before anything else happens; threads may share it.

    Parameters
    ----------
    log: a file that gets every record too, beside the folder's own.
    told: hears every record.
    """

    def __init__(self, folder: Folder, options: Options, told: Callable[[records.Line], None]):
        self.paths = [folder.log(), *([options.log] if options.log else [])]
        self.told, self.lock = told, threading.Lock()

    def write(self, record: records.Line) -> None:
        with self.lock:
            for path in self.paths:
                records.append(path, [record])
        self.told(record)


def begin(folder: Folder, progress: Progress, where: str) -> list[Batch]:
    """What is left of a folder, after telling how much that is."""
    left = folder.left()
    if left:
        progress.begin(f"measuring on {where}", sum(len(b.candidates) * len(b.workloads) for b in left))
    return left


@dataclass(frozen=True)
class ThisHost:
    """Measures on devices of this host, several at a time: ``"cpu"``, ``"cuda:0"``, …."""

    devices: Sequence[str]

    def measure(self, folder: Folder, options: Options, progress: Progress) -> None:
        """See :meth:`Engine.measure`."""
        with folder.locked():
            left = begin(folder, progress, ", ".join(self.devices))
            if not left:
                return
            recorder = Recorder(folder, options, progress.record)
            batches: queue.SimpleQueue[Batch] = queue.SimpleQueue()
            with Compiler(folder, options.jobs, options.recompile_for) as compiler:
                for batch in left:
                    compiler.start(batch.all_ids())
                    batches.put(batch)
                workers = [_Worker(folder, options, device, compiler, recorder, batches) for device in self.devices]
                for worker in workers:
                    worker.start()
                for worker in workers:
                    worker.join()
            for worker in workers:
                if worker.failure:
                    raise worker.failure


class _Worker(threading.Thread):
    """Measures batch after batch on one device; ``failure`` is what ended it early."""

    def __init__(self, folder: Folder, options: Options, device: str, compiler: Compiler, recorder: Recorder, batches):
        super().__init__(daemon=True)
        self.folder, self.options, self.device = folder, options, device
        self.compiler, self.recorder, self.batches = compiler, recorder, batches
        self.spare: Process | None = None
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            while time.monotonic() <= self.options.deadline:
                batch = self.batches.get_nowait()
                self.compiler.wait(batch.all_ids())
                run = BatchRun(self.folder, batch, self.options, self.device, self.process, self.recorder.write)
                if run.run():
                    self.folder.finish(batch)
        except queue.Empty:
            pass
        except Exception as e:  # told by the main thread, when the other devices have ended
            self.failure = e
        finally:
            if self.spare:
                self.spare.kill()

    def process(self) -> Process:
        """A fresh child; the next one starts meanwhile, unless its start would take time from the CPU's kernels."""
        log = self.folder.path / "child.log"
        if self.device == "cpu":
            return Process(log)
        process, self.spare = self.spare or Process(log), Process(log)
        return process
