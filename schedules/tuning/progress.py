"""What a search shows while it runs: a bar with the best so far, or lines where there is no terminal or no rich."""

from __future__ import annotations

import math
import sys
import threading

from schedules.builder import records
from schedules.builder.records import Measurement
from schedules.tuning.tables import kernel_of


def short(config: dict) -> str:
    """A configuration in few characters."""
    return " ".join(f"{name}={value}" for name, value in config.items())


class Progress:
    """A context.  Counts kernels that are built, then measurements; threads may share it."""

    def __init__(self):
        self.best: dict[tuple[str, str], float] = {}
        self.total = self.done = 0
        self.lock = threading.Lock()
        self.bar = self._bar()

    def _bar(self):
        if not sys.stdout.isatty():
            return None
        try:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        except ImportError:  # a machine that only measures needn't have it
            return None
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        return Progress(*columns)

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
            self.task = self.bar.add_task("", total=None)
        return self

    def __exit__(self, *_) -> None:
        if self.bar:
            self.bar.stop()

    def begin(self, what: str, total: int) -> None:
        """Something else is counted from now on."""
        self.done, self.total = 0, total
        if self.bar:
            self.bar.reset(self.task, description=what, total=total, completed=0)
        else:
            print(f"{what}: {total}", flush=True)

    def step(self) -> None:
        """One more."""
        with self.lock:
            self.done += 1
            if self.bar:
                self.bar.advance(self.task)

    def record(self, record: records.Line) -> None:
        """One more measurement."""
        if not isinstance(record, Measurement):
            return
        self.step()
        with self.lock:
            if record.status != "ok":
                self._say(
                    f"{record.status}: {kernel_of(record)} {record.problem} {short(record.config)}: {record.reason}"
                )
                return
            key = (kernel_of(record), record.problem)
            if record.microseconds < self.best.get(key, math.inf):
                self.best[key] = record.microseconds
                gain = f"{record.gain:.3f} × the default" if record.gain else ""
                speed = f"{record.microseconds:.1f} µs, {record.tflops:.4g} TFLOP/s"
                text = f"{kernel_of(record)} {record.problem}: {speed}"
                self._say(f"{text} {gain}  {short(record.config)}", best=True)

    def _say(self, text: str, best: bool = False) -> None:
        if self.bar and best:
            self.bar.update(self.task, description=f"best so far: {text.partition('  ')[0]}")
        elif self.bar:
            self.bar.console.print(text, style="yellow", markup=False, highlight=False)
        else:
            print(f"[{self.done}/{self.total}] {text}", flush=True)
