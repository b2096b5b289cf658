"""Timing beside other processes: a round that they disturbed is thrown away and repeated.

Kernels run on a thread for each processor.  A process that takes one of two processors for a moment makes a call up to
five times slower, not two: threads that have done their share spin until the scheduler lets the last one go on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

#: Share of the processors' time that others may take: a desktop at rest takes 1 or 2 %.
TOLERATED = 0.04
#: Seconds that a process spends on rounds that it repeats, in all: a machine that is busy for longer always is.
PATIENCE = 10.0
#: Seconds of rest before a round is repeated.
REST = 0.1

Round = TypeVar("Round")
_spent = 0.0


class Watch:
    """Looks at the clocks of this process and of the processors that it may use, from now on."""

    def __init__(self):
        self._start = time.perf_counter()
        self._busy, self._own = busy_seconds(), time.process_time()

    def seconds(self) -> float:
        """How long it has looked."""
        return time.perf_counter() - self._start

    def share(self) -> float:
        """Of all processors' time since the start, what other processes took; 0 where the system doesn't say."""
        busy = busy_seconds()
        if busy is None or self._busy is None:
            return 0.0
        processors, tick = len(os.sched_getaffinity(0)), 1 / os.sysconf("SC_CLK_TCK")
        others = busy - self._busy - (time.process_time() - self._own) - processors * tick  # of rounding
        return max(0.0, others / (self.seconds() * processors))


def busy_seconds() -> float | None:
    """Seconds for which processors of this process have worked, or a hypervisor has kept them; None where none says."""
    names = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    try:
        with open("/proc/stat") as file:
            lines = [line.split() for line in file if line.partition(" ")[0] in names]
            # user, nice, system, irq, softirq, steal
            ticks = sum(int(line[column]) for line in lines for column in (1, 2, 3, 6, 7, 8))
    except (OSError, ValueError, IndexError):
        return None
    return ticks / os.sysconf("SC_CLK_TCK") if lines else None


def undisturbed(one_round: Callable[[], Round], patience: float = PATIENCE) -> Round:
    """What a round of timing returns when others leave it alone, or when patience is at an end."""
    global _spent
    while True:
        watch = Watch()
        result = one_round()
        if watch.share() <= TOLERATED or _spent > patience:
            return result
        time.sleep(REST)
        _spent += watch.seconds()
