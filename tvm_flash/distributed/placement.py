"""Which positions of a sequence each rank holds."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

#: How a sequence is dealt out.  ``zigzag`` gives rank r of n the r-th chunk of 2n from the front and from the back, so
#: that all ranks have the same to do under a causal mask, and also with a window; ``contiguous`` one chunk of n.
BALANCES = ("zigzag", "contiguous")

#: Positions ``[first, end)``.
Interval = tuple[int, int]


@dataclass(frozen=True)
class Placement:
    """How the positions of a sequence lie on a mesh.

    Attributes
    ----------
    length: how many positions there are.
    outer: ranks that hold different positions, with all heads or some.
    inner: ranks that share what an outer rank holds, and exchange it for all of that in some of the heads.
    balance: one of ``BALANCES``.
    """

    length: int
    outer: int
    inner: int = 1
    balance: str = "zigzag"

    def chunks(self, outer: int) -> tuple[Interval, ...]:
        """The one or two chunks of an outer rank, which may be empty."""
        chunks = 2 * self.outer if self.balance == "zigzag" else self.outer
        mine = (outer, chunks - 1 - outer) if self.balance == "zigzag" else (outer,)
        return tuple((c * self.length // chunks, (c + 1) * self.length // chunks) for c in mine)

    def segments(self, outer: int) -> tuple[Interval, ...]:
        """The positions of an outer rank (all its inner ones together), in the order in which it holds them."""
        return joined(self.chunks(outer))

    def held(self, outer: int, inner: int = 0) -> tuple[Interval, ...]:
        """The positions of one rank, in the order in which it holds them."""
        segments = self.segments(outer)
        first, end = self.rows_of_inner(outer)[inner]
        found, at = [], 0
        for a, b in segments:
            found.append((a + max(first - at, 0), a + min(end - at, b - a)))
            at += b - a
        return joined(found)

    def rows_of_inner(self, outer: int) -> tuple[Interval, ...]:
        """Which rows of an outer rank's segments, one after the other, each of its inner ranks has."""
        rows = size(self.segments(outer))
        return tuple((i * rows // self.inner, (i + 1) * rows // self.inner) for i in range(self.inner))

    def rows_of(self, outer: int, held: tuple[Interval, ...]) -> tuple[Interval, ...]:
        """The rows of an outer rank's segments, one after the other, at which some of its positions stand."""
        found = []
        for a, b in held:
            at = 0
            for first, end in self.segments(outer):
                if first <= a and b <= end:
                    found.append((at + a - first, at + b - first))
                at += end - first
        return tuple(found)

    def order(self) -> tuple[tuple[Interval, ...], ...]:
        """What every rank holds, by its place in the mesh, the inner axis running fastest."""
        return tuple(self.held(o, i) for o, i in itertools.product(range(self.outer), range(self.inner)))


def joined(intervals) -> tuple[Interval, ...]:
    """Intervals without empty ones, those that follow each other made one."""
    found: list[Interval] = []
    for first, end in intervals:
        if first >= end:
            continue
        if found and found[-1][1] == first:
            found[-1] = (found[-1][0], end)
        else:
            found.append((first, end))
    return tuple(found)


def size(intervals) -> int:
    """How many positions intervals have together."""
    return sum(end - first for first, end in intervals)


def common(one: Interval, other: Interval) -> Interval:
    """What two intervals have in common; the end is not after the first if that is nothing."""
    return max(one[0], other[0]), min(one[1], other[1])


def gaps(intervals: Iterable[Interval], end: int) -> list[Interval]:
    """The positions from 0 to an end that are in none of some intervals."""
    found, seen = [], 0
    for first, last in (*sorted(intervals), (end, end)):
        if seen < first:
            found.append((seen, first))
        seen = max(seen, last)
    return found
