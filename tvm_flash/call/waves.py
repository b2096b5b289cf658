"""Which height of work tiles: how batch, heads and positions divide among multiprocessors.

A launch takes whole waves of work tiles: 40 heads of 1024 positions are 160 tiles of 256 rows, two waves on 132
multiprocessors, of which the second has 28; or 240 tiles of 192 rows, two waves of shorter tiles.  What a wave takes is
in the pack (:class:`tvm_flash.packs.manifest.Waves`).  Kernels that differ in this height alone give the same bits, so
that the batch and the device may decide.
"""

from __future__ import annotations

from tvm_flash.call.problem import Problem
from tvm_flash.machine.device import Device
from tvm_flash.packs.manifest import KernelEntry

#: A further height is taken where it needs at most this share of the usual one's time: the rule is some per cent off.
WORTH = 0.95


def rank(entry: KernelEntry, problem: Problem, device: Device) -> tuple[bool, float]:
    """The smaller, the sooner a kernel is chosen among those that differ in the height of work tiles alone.

    Without measurements, on a device whose multiprocessors aren't known, and where query heads share keys (whose
    queries a tile may pack, if it is high enough), it is the usual one.
    """
    time = _time(entry, problem, device)
    if time is None:
        return entry.block_m > 0, 0
    return False, time * (1 if entry.block_m else WORTH)


def why(best: KernelEntry, entry: KernelEntry, problem: Problem, device: Device) -> str:
    """Why a kernel comes after another one."""
    times = [_time(x, problem, device) for x in (best, entry)]
    if None in times:
        return "is never taken where waves weren't measured, or query heads share keys"
    heights = [x.waves.block_m for x in (best, entry)]
    figures = [f"{height} rows a tile take {time / 1e6:.1f} µs" for height, time in zip(heights, times, strict=True)]
    return " where by their waves ".join(figures)


def _time(entry: KernelEntry, problem: Problem, device: Device) -> int | None:
    """Picoseconds; None if they aren't known, or don't decide."""
    if entry.waves is None or not device.multiprocessors or problem.heads != problem.kv_heads:
        return None
    return entry.waves.time(problem.sizes, device.multiprocessors)
