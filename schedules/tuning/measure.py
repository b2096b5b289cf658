"""Measuring a folder of candidates, on one device, batch by batch.

Needs no TVM: candidates come as sources or modules.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from schedules.builder import records
from schedules.tuning.batch import BatchRun, Options
from schedules.tuning.candidate import Batch
from schedules.tuning.compiler import Compiler
from schedules.tuning.folder import Claims, Folder
from schedules.tuning.process import Process
from schedules.tuning.progress import Progress


class Measurer:
    """Measures what is left in a folder, batch by batch; a context.

    Parameters
    ----------
    told: hears every record as it is written.
    """

    def __init__(self, folder: Folder, options: Options, told: Callable[[records.Line], None] = lambda _: None):
        self.folder, self.options, self.told = folder, options, told
        self.log = folder.log(options.device)
        self.emission = folder.emission()
        self.claims = Claims(folder)
        self.compiler = Compiler(folder, self.claims, self.emission, options.jobs, options.recompile_for)
        self.spare: Process | None = None

    def __enter__(self) -> Measurer:
        self.claims.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        if self.spare:
            self.spare.kill()
        self.compiler.__exit__(*exception)
        self.claims.__exit__(*exception)

    def run(self) -> None:
        """All batches that nobody has measured or is measuring.

        Raises
        ------
        UnhealthyDeviceError: the device doesn't recover from a kernel.
        """
        batches = [b for b in self.folder.batches() if not self.folder.is_done(b.name)]
        for batch in batches:
            self.compiler.start((*batch.incumbent_ids(), *batch.candidates))
        for batch in batches:
            if time.monotonic() > self.options.deadline:
                return
            if self.claims.take(batch.name):
                if self._measure(batch):
                    self.claims.finish(batch.name)
                else:
                    self.claims.release(batch.name)

    def _measure(self, batch: Batch) -> bool:
        ids = tuple(dict.fromkeys((*batch.incumbent_ids(), *batch.candidates)))
        self.compiler.wait(ids)
        return BatchRun(self.folder, batch, self.options, self.process, self.write).run()

    def process(self) -> Process:
        """A fresh child; the next one starts meanwhile, unless its start would take time from the CPU's kernels."""
        log = self.folder.path / "child.log"
        if self.options.device == "cpu":
            return Process(log)
        process, self.spare = self.spare or Process(log), Process(log)
        return process

    def write(self, record: records.Line) -> None:
        """Put a record on disk before anything else happens."""
        records.append(self.log, [record])
        if self.options.log:
            records.append(self.options.log, [record])
        self.told(record)


def measure(folder: Folder, options: Options, devices: Sequence[str], progress: Progress) -> None:
    """Measure what is left in a folder, on several devices at a time.

    Raises
    ------
    UnhealthyDeviceError: a device doesn't recover from a kernel; the others have ended.
    """
    left = sum(len(b.candidates) * len(b.workloads) for b in folder.batches() if not folder.is_done(b.name))
    if not left:
        return
    progress.begin(f"measuring on {', '.join(devices)}", left)
    measurers = [Measurer(folder, replace(options, device=device), progress.record) for device in devices]
    failures: list[BaseException] = []

    def work(measurer: Measurer) -> None:
        try:
            with measurer:
                measurer.run()
        except Exception as e:  # told below, when the others have ended
            failures.append(e)

    if len(measurers) == 1:
        with measurers[0] as measurer:
            measurer.run()
        return
    threads = [threading.Thread(target=work, args=[m], daemon=True) for m in measurers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
