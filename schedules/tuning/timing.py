"""Times of several functions in turn, on a device that is kept busy.

A card at its power cap, and a processor whose clock changes, favour whoever runs after a pause.  So all take turns in
random order, round after round, each for a block of calls; a function's time is the median over the rounds of the mean
of a block, on a processor of its median.  Those that are clearly slower than the best are given up after a few rounds.
On a processor, a round that other processes disturbed is repeated.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from tvm_flash.measure.others import PATIENCE, undisturbed
from tvm_flash.measure.timing import cpu_times

Call = Callable[[], object]


@dataclass(frozen=True)
class Effort:
    """How long is measured.

    ``rounds``, and ``block`` seconds of calls in each; ``warm_up`` seconds of calls before a batch.  After ``trial``
    rounds what takes ``hopeless`` times as long as the best is given up.  ``patience`` is how many seconds may go into
    rounds that are repeated, since other processes disturbed them.
    """

    rounds: int
    block: float
    warm_up: float
    trial: int = 2
    hopeless: float = 1.3
    patience: float = PATIENCE


#: A block of 5 ms is some 5 to 50 calls, and the card is at its power cap after half a second of them.
EFFORT = {"cuda": Effort(rounds=7, block=0.005, warm_up=0.5), "cpu": Effort(rounds=5, block=0.03, warm_up=0.2)}


def seconds_of(call: Call, count: int, device: str) -> float:
    """Time of one of ``count`` calls in a row: their mean; on a processor, which others may take, their median."""
    if device == "cpu":
        return statistics.median(cpu_times(call, count))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / count


def keep_busy(call: Call, seconds: float, device: str) -> None:
    """Call for a while."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        seconds_of(call, 1, device)


def in_turn(
    calls: Mapping[str, Call],
    always: set[str],
    effort: Effort,
    device: str,
    order: random.Random,
    begins: Callable[[str], None] = lambda _: None,
) -> dict[str, list[float]]:
    """Seconds of each function, one figure a round.

    Parameters
    ----------
    calls: by name, each called at least once before.
    always: names that are timed in every round, however slow.
    begins: hears a name before it is called.
    """
    counts = {}
    for name, call in calls.items():
        begins(name)
        counts[name] = max(1, min(2000, round(effort.block / seconds_of(call, 1, device))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    left = set(calls)

    def one_round() -> dict[str, float]:
        seconds = {}
        for name in order.sample(sorted(left), len(left)):
            begins(name)
            seconds[name] = seconds_of(calls[name], counts[name], device)
        return seconds

    for number in range(effort.rounds):
        for name, seconds in (undisturbed(one_round, effort.patience) if device == "cpu" else one_round()).items():
            times[name].append(seconds)
        if number + 1 == effort.trial:
            best = min(statistics.median(t) for t in times.values())
            left = {n for n in left if n in always or statistics.median(times[n]) <= effort.hopeless * best}
    return times
