"""Which heads are computed together, and which are on their way meanwhile.

The forward has all heads in one launch: on two H200, of 8 heads of head_dim 128 in bfloat16, up to four launches, each
with its keys on their way during the one before, took 15.2 ms for 64k positions in full, 128 for 256k under a causal
mask and 247 for 256k in full; one launch takes 13.5, 120 and 209.  The multiprocessors that messages need are taken by
the launch that they were to hide behind, and a launch leaves half a wave of its blocks without work at its end.  Nor
do 32 heads of keys gain in four launches: 31.7 ms for 64k under a causal mask, and 31.0 in one.
Launches of the backward are of few heads where sequences are long, since many share the cache.  All of this follows
from what every rank knows, since ranks must send in one order.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Keys that a query sees in a call, of all batch entries together, from which on the backward is in launches of few
#: heads of keys, and how many these are: 32k queries on 48k keys took 638 TFLOP/s in launches of 4 heads, 416 of 16.
_MANY_KEYS = 1 << 15
_FEW = 4
#: Twice as many keys, for which they are two: TFLOP/s of a GPU in launches of 2 and 4, and of 8 by one GPU alone: 64k
#: full 507, 443, 393; 256k full 457, 384, 380; 256k causal 509, 473, 381; but 64k causal, half as many, 486, 510, 547.
_FEWER = 2


@dataclass(frozen=True)
class Heads:
    """Query heads ``[first, end)`` that are computed together, and the key heads that they read."""

    queries: tuple[int, int]
    keys: tuple[int, int]

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
    ranks: that share these.
    left, right: the window over positions, None for unbounded.
    fetches: whether a step's keys come from other ranks, all at once.
    """

    batch: int
    kv_heads: int
    positions: int
    ranks: int
    left: int | None
    right: int | None
    fetches: bool

    @property
    def _seen(self) -> int:
        """Keys that a query sees, about."""
        of_mask = self.positions if self.right is None else self.positions // 2
        return of_mask if self.left is None else min(of_mask, self.left + (self.right or 0) + 1)

    @property
    def in_backward(self) -> int:
        """Into how many launches of a call those of the backward are."""
        keys = self.batch * (self._seen if self.fetches else self._seen // self.ranks)  # of a call
        least = self._divisor(2) if self.fetches else 1
        if keys < _MANY_KEYS:
            return least
        return max(least, self._divisor(-(-self.kv_heads // (_FEWER if keys >= 2 * _MANY_KEYS else _FEW))))

    def _divisor(self, most: int) -> int:
        """The largest number up to ``most``, and 1 at least, by which the heads of keys can be divided."""
        return max(n for n in range(1, max(1, most) + 1) if self.kv_heads % n == 0)
