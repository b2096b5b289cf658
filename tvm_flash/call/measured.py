"""What was measured of two kernels on this device, and which of them is faster on a problem like the one at hand."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm_flash.call.problem import Problem
from tvm_flash.machine.device import Device
from tvm_flash.operators import OPERATORS
from tvm_flash.packs.manifest import RAGGED, KernelEntry, Speed

#: Measured times that differ by less decide nothing.
TIE = 1.02
#: A measurement speaks for problems whose lengths are within this factor of its own.
REACH = 4.0


@dataclass(frozen=True)
class Comparison:
    """Two kernels on one problem: the speeds of the faster and of the slower."""

    faster: KernelEntry
    by: Speed
    slower: KernelEntry
    than: Speed

    def __str__(self) -> str:
        times = f"{self.slower.template.upper()} {self.than.microseconds:.1f}, {self.faster.template.upper()}"
        return f"measured on {self.by.device}: {times} {self.by}"


def nearest(entry: KernelEntry, problem: Problem, device: Device) -> Speed | None:
    """The measurement of a kernel on this device that is nearest to a problem; None if there is none in reach."""
    inside = [s for s in entry.speeds if s.device == device.name and _distance(s, problem)[0] <= math.log(REACH)]
    return min(inside, key=lambda s: _distance(s, problem), default=None)


def compare(one: KernelEntry, other: KernelEntry, problem: Problem, device: Device) -> Comparison | None:
    """Which of two kernels is faster; None if they weren't both measured on a problem like this, or there is a tie."""
    by_shape = {_shape(s): s for s in other.speeds if s.device == device.name}
    common = [s for s in one.speeds if s.device == device.name and _shape(s) in by_shape]
    common = [s for s in common if _distance(s, problem)[0] <= math.log(REACH)]
    if not common:
        return None
    mine = min(common, key=lambda s: _distance(s, problem))
    its = by_shape[_shape(mine)]
    if max(mine.microseconds, its.microseconds) < TIE * min(mine.microseconds, its.microseconds):
        return None
    if mine.microseconds < its.microseconds:
        return Comparison(one, mine, other, its)
    return Comparison(other, its, one, mine)


def _shape(s: Speed) -> tuple[int, ...]:
    return (s.batch, s.heads, s.seqlen_q, s.seqlen_kv, s.head_dim)


def _distance(s: Speed, problem: Problem) -> tuple[float, float]:
    """How far apart the lengths are, and the rest; logarithms of ratios."""
    lengths = max(_ratio(s.seqlen_q, problem.seqlen_q), _ratio(s.seqlen_kv, problem.seqlen_kv))
    rest = _ratio(s.batch * s.heads, problem.batch * problem.heads) + _ratio(s.head_dim, problem.head_dim)
    return lengths, rest


def _ratio(a: int, b: int) -> float:
    return abs(math.log(a / b))


def tune_command(entry: KernelEntry, problem: Problem, device: Device) -> str:
    """The command that measures a kernel, and others of its kind, for a problem on a device."""
    p, count = problem, problem.batch if problem.is_ragged else 1
    # The tuner is told mean lengths, and the run time knows those of all sequences, or what a page table has room for.
    seqlen_q, seqlen_kv = max(1, p.seqlen_q // count), max(1, p.seqlen_kv // (count if p.form == RAGGED else 1))
    words = [f"b={p.batch}", f"h={p.heads}", f"s={seqlen_q}", f"d={p.head_dim}"]
    words += [f"hk={p.kv_heads}"] if p.kv_heads != p.heads else []
    words += [f"sk={seqlen_kv}"] if seqlen_kv != seqlen_q else []
    words += ["causal"] if "causal" in p.masks[:1] else []
    words += [p.form] if p.is_ragged else []
    words += ["backward"] if OPERATORS[p.op].differentiates else []
    kind = f" --kind {entry.kind}" if entry.max_rows is not None else ""  # the problem doesn't say that
    return f'scripts/tune.py --arch {device.native_arch}{kind} --problem "{" ".join(words)} {p.dtype}"'
