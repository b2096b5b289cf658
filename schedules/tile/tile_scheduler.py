"""The tile scheduler: which work tiles a launch has, and in which order they are taken.

A *work tile* is an m-block (``block_m`` rows) of one head of one batch.  An *order* lays them out along three axes, the
first the fastest, as blocks of a grid or as work items that threads share, and finds the work tile of a place again:

* :class:`HeadsOuter`: all m-blocks of a head, then those of the next.  A head's keys and values stay in the cache that
  the blocks share.
* :class:`SeqOuter`: one m-block of all heads of a *section*, then the next m-block.  A section is as many heads as the
  cache has room for; all of them, if the caller says so.

An order counts m-blocks as they come; which of them that is, a family adds (:func:`longest_first`,
:func:`from_both_ends`): under a causal mask the last is the longest.

Sizes and indices are expressions of whatever integer type the family computes addresses in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from tvm.ir import Expr
from tvm.script import tirx as T


class WorkTile(NamedTuple):
    """Batch, (query) head, and the m-block counted from the first row."""

    batch: Expr
    head: Expr
    m_block: Expr


class Place(NamedTuple):
    """Where a block stands in the grid; ``width`` is the grid's extent along the fastest axis, as a block reads it."""

    x: Expr
    y: Expr
    z: Expr
    width: Expr


@dataclass(frozen=True)
class Work:
    """What there is to do: ``m_blocks`` of each of ``heads`` heads of ``batch`` batches."""

    m_blocks: Expr
    heads: Expr
    batch: Expr


class Order(Protocol):
    """How work tiles lie along the axes of a grid."""

    def grid(self) -> tuple[Expr, Expr, Expr]:
        """Places along each axis, the first the fastest."""

    def work_tile(self, place: Place) -> WorkTile:
        """The work tile of a place that exists; m-blocks are counted in the order in which they come."""

    def exists(self, place: Place) -> Expr:
        """Whether a place has a work tile."""


@dataclass(frozen=True)
class HeadsOuter:
    """All m-blocks of a head, then those of the next: places ``(m_blocks, heads, batch)``."""

    work: Work

    def grid(self):
        return self.work.m_blocks, self.work.heads, self.work.batch

    def work_tile(self, place: Place) -> WorkTile:
        return WorkTile(place.z, place.y, place.x)

    def exists(self, place: Place) -> Expr:
        return T.bool(True)


@dataclass(frozen=True)
class SeqOuter:
    """The same m-block of all heads of a section, then the next: places ``(section, m_blocks, sections)``.

    Sections are of the heads of all batches together; the last may have fewer than the others.
    """

    work: Work
    section: Expr

    def grid(self):
        pairs = self.work.batch * self.work.heads
        return self.section, self.work.m_blocks, T.truncdiv(pairs + (self.section - 1), self.section)

    def work_tile(self, place: Place) -> WorkTile:
        pair = place.z * place.width + place.x
        return WorkTile(T.truncdiv(pair, self.work.heads), T.truncmod(pair, self.work.heads), place.y)

    def exists(self, place: Place) -> Expr:
        return place.z * place.width + place.x < self.work.batch * self.work.heads


@dataclass(frozen=True)
class InOneRow:
    """Another order's places along the first axis alone, the only one of a grid that has room for more than 65535."""

    order: Order

    def grid(self):
        x, y, z = self.order.grid()
        return x * y * z, T.int32(1), T.int32(1)

    def _place(self, place: Place) -> Place:
        x, y, _ = self.order.grid()
        rest = T.truncdiv(place.x, x)
        return Place(T.truncmod(place.x, x), T.truncmod(rest, y), T.truncdiv(rest, y), x)

    def work_tile(self, place: Place) -> WorkTile:
        return self.order.work_tile(self._place(place))

    def exists(self, place: Place) -> Expr:
        return self.order.exists(self._place(place))


def place_of_item(grid: tuple[Expr, Expr, Expr], item: Expr) -> Place:
    """The place of work item ``item`` of those that are numbered along the axes; for non-negative numbers."""
    x, y, _ = grid
    return Place(item % x, item // x % y, item // (x * y), x)


def longest_first(m_block: Expr, m_blocks: Expr) -> Expr:
    """M-blocks from the last to the first: under a causal mask from the longest to the shortest."""
    return m_blocks - 1 - m_block


def from_both_ends(m_block: Expr, m_blocks: Expr) -> Expr:
    """First, last, second, second to last, ...: any contiguous share of them is about as long as any other."""
    return T.Select(m_block % 2 == 0, m_block // 2, m_blocks - 1 - m_block // 2)


def ceildiv(a, b):
    """``a / b`` rounded up, for non-negative numbers."""
    return T.truncdiv(a + (b - 1), b)


@dataclass(frozen=True)
class Traversal:
    """What a template decides: the order in which work tiles are visited, and the physical layout of q, k, v and o.

    ``order(work, section)`` is the tile scheduler's order of a launch's work; ``section()`` is how many heads the
    caches have room for, asked only by an order that wants to know.
    """

    template: str
    layout: str
    order: Callable[[Work, Callable[[], Expr]], Order]
