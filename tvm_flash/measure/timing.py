"""How calls are timed.

On a GPU (:func:`on_gpu`): a card at its power cap favours whoever runs after a pause or after a kernel that draws
little.  So implementations run in random order, several rounds, each long enough for a steady clock; ``steady`` is the
median over the rounds of the median of each round's second half, ``burst`` the shortest of a few calls after a pause.

On a CPU (:func:`on_cpu`): implementations take turns, so that a slow moment hits all; ``blocks`` are several calls of
each in turn, whose first doesn't count, as the threads of the one before still spin; ``turns`` are single calls in
turn, each after another implementation's, which is how a model that uses several sees them.  A round that other
processes disturbed is repeated (:mod:`tvm_flash.measure.others`).
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from tvm_flash.measure.others import undisturbed

Call = Callable[[], object]
#: Times of calls by mode, then by name: a list with one figure for each round, in seconds.
Rounds = dict[str, dict[str, list[float]]]

GPU_MODES = {
    "steady": "implementations in random order, {rounds} rounds of {seconds:g} s each; the median over the rounds of "
    "the median of each round's second half",
    "burst": "the shortest of {rounds} × 3 calls after a pause of 20 ms",
}
CPU_MODES = {
    "blocks": "up to {rounds} rounds in which the implementations take turns, for about {seconds:g} s each; a round's "
    "first call doesn't count; the median",
    "turns": "single calls in turn, each right after another implementation's; the median",
}

#: Seconds of rest before the calls of a burst, and their number.
PAUSE, BURST = 0.02, 3

#: Most calls of a block, and most turns: small calls need no more for a median.
LARGEST_BLOCK = 100


@dataclass(frozen=True)
class Effort:
    """How much is timed: rounds, and seconds of one implementation's calls in a round."""

    rounds: int = 3
    seconds: float = 0.12


def describe(device: str, effort: Effort) -> dict[str, str]:
    """The method in words, by mode."""
    modes = CPU_MODES if device == "cpu" else GPU_MODES
    return {mode: text.format(rounds=effort.rounds, seconds=effort.seconds) for mode, text in modes.items()}


def gpu_times(call: Call, count: int) -> list[float]:
    """Seconds of each of ``count`` calls that are queued one after another, by events on the current stream."""
    import torch

    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    events[-1].synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(events)]


def cpu_times(call: Call, count: int) -> list[float]:
    """Seconds of each of ``count`` calls."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def on_gpu(calls: Mapping[str, Call], effort: Effort, order: random.Random | None = None) -> Rounds:
    """Time calls that were made once before.

    Parameters
    ----------
    calls: by name; they run on the current device and stream.
    effort: how many rounds, and how long each.
    order: where the random order comes from.
    """
    order = order or random.Random(0)
    steady, burst = ({name: [] for name in calls} for _ in range(2))
    for _ in range(effort.rounds):
        for name in order.sample(list(calls), len(calls)):
            time.sleep(PAUSE)
            few = gpu_times(calls[name], BURST)
            burst[name].append(min(few))
            count = max(6, int(effort.seconds / statistics.median(few)))
            steady[name].append(statistics.median(gpu_times(calls[name], count)[count // 2 :]))
    return {"steady": steady, "burst": burst}


def on_cpu(calls: Mapping[str, Call], effort: Effort) -> Rounds:
    """Time calls that were made once before; arguments as for :func:`on_gpu`."""
    return {"blocks": in_blocks(calls, effort), "turns": in_turns(calls, effort)}


def in_blocks(calls: Mapping[str, Call], effort: Effort) -> dict[str, list[float]]:
    """Medians of blocks of calls, by name; the implementations take turns, and a block's first call doesn't count.

    Calls so slow that the rounds would take several times as long as asked for get fewer, but no fewer than 3.
    """
    longest = _longest(calls)
    count = max(1, min(LARGEST_BLOCK, int(effort.seconds / longest)))
    affordable = int(effort.rounds * effort.seconds / (longest * (1 + count)))

    def one_round() -> dict[str, float]:
        medians = {}
        for name, call in calls.items():
            call()
            medians[name] = statistics.median(cpu_times(call, count))
        return medians

    return _by_name(undisturbed(one_round) for _ in range(min(effort.rounds, max(3, affordable))))


def in_turns(calls: Mapping[str, Call], effort: Effort) -> dict[str, list[float]]:
    """Single calls, by name, each right after another implementation's; at least 5 of each."""
    count = int(effort.rounds * effort.seconds / _longest(calls))

    def one_turn() -> dict[str, float]:
        return {name: cpu_times(call, 1)[0] for name, call in calls.items()}

    return _by_name(undisturbed(one_turn) for _ in range(max(5, min(LARGEST_BLOCK, count))))


def _by_name(rounds: Iterable[Mapping[str, float]]) -> dict[str, list[float]]:
    rounds = list(rounds)
    return {name: [one[name] for one in rounds] for name in rounds[0]}


def _longest(calls: Mapping[str, Call]) -> float:
    """Seconds of the slowest call, roughly."""
    return max(min(cpu_times(call, 2)) for call in calls.values())


def measure(kind: str, calls: Mapping[str, Call], effort: Effort, order: random.Random | None = None) -> Rounds:
    """Time calls on ``"cpu"`` or ``"cuda"``, by the modes of that kind of device."""
    return on_cpu(calls, effort) if kind == "cpu" else on_gpu(calls, effort, order)


def figure(mode: str, rounds: list[float]) -> float:
    """One figure of a mode's rounds."""
    return min(rounds) if mode == "burst" else statistics.median(rounds)


def digits(x: float, count: int = 5) -> float:
    """A measured number with the digits that it has, at most."""
    return float(f"{x:.{count}g}")


def call_time(call: Call, count: int = 200, repeats: int = 7) -> float:
    """Seconds that the caller of a function is held up: the shortest mean of ``count`` calls in a row.

    On a GPU the work goes on afterwards; it must be less than the call.
    """
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(count):
            call()
        best = min(best, (time.perf_counter() - start) / count)
    return best
