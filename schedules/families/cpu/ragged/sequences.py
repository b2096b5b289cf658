"""Sequences of different lengths: where each begins, whether that makes sense, and equal shares of their work.

On the processor nothing is in the way of reading the starts: a kernel checks them before it writes anything, and counts
each sequence's work items.  Work items differ in what they cost as the lengths do, so that what threads take one after
the other are *shares*: consecutive items that cost about the same together.  What an item computes has nothing to do
with the share that it is in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.families.cpu.geometry import SequenceGeometry

#: Shares at most: 64 tasks for each of 16 threads, and more threads have as many of them for every one less often.
MOST_SHARES = 1024

#: What a kernel says of starts that make no sense; the run time looks which and says it better.
MALFORMED = "cu_seqlens_q, cu_seqlens_k: expected to begin with 0, never to fall, and to end within the tensors"


@dataclass(frozen=True)
class Starts:
    """Where the ``batch`` sequences begin among ``total`` positions; what follows the last is one more, ``batch``."""

    buffer: tirx.Buffer
    batch: Expr
    total: Expr

    def begin(self, sequence: Expr) -> Expr:
        """The first position of a sequence."""
        return T.cast(self.buffer[sequence], "int64")

    def length(self, sequence: Expr) -> Expr:
        """How many positions it has."""
        following = T.cast(self.buffer[T.min(sequence + 1, self.batch)], "int64")
        return T.Select(sequence < self.batch, following, self.total) - self.begin(sequence)

    def place(self, sequence: Expr) -> Expr:
        """Where a sequence's keys are: its first position."""
        return self.begin(sequence)

    def at(self, call: SequenceGeometry, place: Expr) -> SequenceGeometry:
        """The call with the keys of the sequence that begins there."""
        return replace(call, k=call.k.from_row(place), v=call.v.from_row(place))

    def own_length(self, sequence: Expr) -> Expr:
        """The same, 0 for what follows the last one: such rows see nothing, and nobody sees such keys."""
        return T.Select(sequence < self.batch, self.length(sequence), T.int64(0))


def make_sense(starts: Starts) -> Expr:
    """Whether they begin with 0, never fall, and end within the tensor (``runtime_c/sequences.c``)."""
    begin = starts.buffer.access_ptr("r")
    return T.call_extern("int32", "tvm_flash_starts_make_sense", begin, starts.batch + 1, starts.total) != 0


@dataclass(frozen=True)
class Shares:
    """``items[s]`` work items come before sequence ``s``, and cost ``costs[s]``; the items of one cost the same.

    Both have an element more than there are sequences, for all of them together.  There are ``most`` shares at most.
    """

    items: tirx.Buffer
    costs: tirx.Buffer
    sequences: Expr
    most: int = MOST_SHARES

    @property
    def count(self) -> Expr:
        """How many shares there are."""
        return T.min(self.items[self.sequences], T.int64(self.most))

    @property
    def cost(self) -> Expr:
        """What all items cost."""
        return self.costs[self.sequences]


@T.inline
def append(shares: Shares, sequence, items, cost):
    """Count the next sequence's ``items``, of which each costs ``cost``."""
    shares.items[sequence + 1] = shares.items[sequence] + items
    shares.costs[sequence + 1] = shares.costs[sequence] + items * cost


@T.inline
def find(before, count, value, found):
    """Set ``found`` to the last number below ``count`` for which ``before[found] <= value``."""
    found = T.int64(0)
    above: T.int64 = count
    while above - found > 1:
        middle: T.int64 = (found + above) // 2
        if before[middle] <= value:
            found = middle
        else:
            above = middle


@T.inline
def begin_share(shares: Shares, share, bounds, at):
    """Put the first item of a share into ``bounds[at]``; that of the share after the last is the number of items."""
    sequence: T.int64 = T.int64(0)
    before: T.int64 = shares.cost * share // shares.count
    find(shares.costs, shares.sequences, before, sequence)
    items: T.int64 = shares.items[sequence + 1] - shares.items[sequence]
    cost: T.int64 = T.max(shares.costs[sequence + 1] - shares.costs[sequence], T.int64(1)) // T.max(items, T.int64(1))
    rest: T.int64 = before - shares.costs[sequence]
    bounds[at] = shares.items[sequence] + (rest + (cost - 1)) // cost
