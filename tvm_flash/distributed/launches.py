"""Which heads are computed together, and which are on their way meanwhile.

The forward has all heads in one launch: on two H200, of 8 heads of head_dim 128 in bfloat16, up to four launches, each
with its keys on their way during the one before, took 15.2 ms for 64k positions in full, 128 for 256k under a causal
mask and 247 for 256k in full; one launch takes 13.5, 120 and 209.  The multiprocessors that messages need are taken by
the launch that they were to hide behind, and a launch leaves half a wave of its blocks without work at its end.  Nor
do 32 heads of keys gain in four launches: 31.7 ms for 64k under a causal mask, and 31.0 in one.
In the backward, where keys come from other ranks, heads are in two groups at least, so that keys of the second are on
their way during the first, and gradients of the first during the second; how many share the cache is the kernels' own
matter (sections of heads).  Of 8 heads of 64k positions in full, forward and backward, four launches of two heads took
56.9 ms and two of four 54.8.

Where rows are read in the other ranks' memory, which holds no launch back, groups of heads are in two lanes, so that
one begins where another has no blocks left.  Forward and backward took 28.0 ms in two groups under a causal mask, 29.3
in one and 28.5 in four; 54.4, 55.8 and 55.2 in full.  So does the forward in full, where all heads wait for keys: 13.2
ms in four groups, 13.6 in two, 13.8 in one; under a causal mask, where some rows don't, it is best in one: 6.6 ms, 6.9
in two, 7.0 in four.  All of this follows from what every rank knows, since ranks must send in one order.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Keys that a query sees in a call, of all batch entries together, from which on a launch of the backward that waits
#: for keys is of no more than so many heads of keys: what isn't hidden are the first one's keys and the last one's
#: gradients.
_MANY_KEYS, _FEW = 1 << 15, 8

#: Where ranks read each other's memory, into how many launches heads are in the forward, and at least in the backward.
_READ_IN_FORWARD, _READ_IN_BACKWARD = 1, 2

#: Into how many those of the forward are if no mask lets any row begin before all keys are there, and these are so many
#: that a launch takes longer than the host needs for the next.
_READ_IN_FULL, _FULL_KEYS = 4, 1 << 16

#: Into how many launches at most heads of rows are that don't wait, while others do.
_MEANWHILE = 4


@dataclass(frozen=True)
class Heads:
    """Query heads ``[first, end)`` that are computed together, and the key heads that they read."""

    queries: tuple[int, int]
    keys: tuple[int, int]

    @property
    def meanwhile(self) -> list[Heads]:
        """In parts that are computed before others have what they wait for, and beside the last of these."""
        return self.parts(_divisor(self.keys[1] - self.keys[0], _MEANWHILE))

    def parts(self, count: int) -> list[Heads]:
        """The same in so many parts, a divisor of the key heads."""
        (first, end), (first_key, end_key) = self.queries, self.keys
        queries, keys = (end - first) // count, (end_key - first_key) // count
        return [
            Heads(
                (first + i * queries, first + (i + 1) * queries),
                (first_key + i * keys, first_key + (i + 1) * keys),
            )
            for i in range(count)
        ]


@dataclass(frozen=True)
class Work:
    """What all ranks compute, the same on each.

    Attributes
    ----------
    batch, kv_heads: sizes of this rank's tensors.
    positions: of the whole sequence.
    left, right: the window over positions, None for unbounded.
    fetches: whether a step's keys come from other ranks, all at once.
    reads: whether they are read in the memory of these.
    """

    batch: int
    kv_heads: int
    positions: int
    left: int | None
    right: int | None
    fetches: bool
    reads: bool

    @property
    def _seen(self) -> int:
        """Keys that a query sees, about."""
        of_mask = self.positions if self.right is None else self.positions // 2
        return of_mask if self.left is None else min(of_mask, self.left + (self.right or 0) + 1)

    @property
    def in_forward(self) -> int:
        """Into how many launches of a call those of the forward are."""
        if not (self.fetches and self.reads):
            return 1
        in_full = self.left is self.right is None and self.positions >= _FULL_KEYS
        return _divisor(self.kv_heads, _READ_IN_FULL if in_full else _READ_IN_FORWARD)

    @property
    def in_backward(self) -> int:
        """Into how many launches of a call those of the backward are."""
        if not self.fetches:
            return 1
        is_long = self.batch * self._seen >= _MANY_KEYS
        least = _READ_IN_BACKWARD if self.reads else 2
        return _divisor(self.kv_heads, max(least, -(-self.kv_heads // _FEW) if is_long else least))


def _divisor(heads: int, most: int) -> int:
    """The largest number up to ``most``, and 1 at least, by which heads can be divided."""
    return max(n for n in range(1, most + 1) if heads % n == 0)
