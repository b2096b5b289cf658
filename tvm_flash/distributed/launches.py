"""Which heads are computed together, and which are on their way meanwhile.

The forward has all heads in one launch: on two H200, of 8 heads of head_dim 128 in bfloat16, up to four launches, each
with its keys on their way during the one before, took 15.2 ms for 64k positions in full, 128 for 256k under a causal
mask and 247 for 256k in full; one launch takes 13.5, 120 and 209.  The multiprocessors that messages need are taken by
the launch that they were to hide behind, and a launch leaves half a wave of its blocks without work at its end.  Nor
do 32 heads of keys gain in four launches: 31.7 ms for 64k under a causal mask, and 31.0 in one.
In the backward, where keys come from other ranks, heads are in two groups at least, so that keys of the second are on
their way during the first, and gradients of the first during the second; how many share the cache is the kernels' own
matter (sections of heads).  Of 8 heads of 64k positions in full, forward and backward, four launches of two heads took
56.9 ms and two of four 54.8.  Where rows are read in the other ranks' memory, which holds no launch back, two take more
than what they hide: 59.0 ms, and 54.1 in one; under a causal mask 29.1, and 28.6 in one.  All of this follows from what
every rank knows, since ranks must send in one order.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Keys that a query sees in a call, of all batch entries together, from which on a launch of the backward that waits
#: for keys is of no more than so many heads of keys: what isn't hidden are the first one's keys and the last one's
#: gradients.
_MANY_KEYS, _FEW = 1 << 15, 8


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
    def in_backward(self) -> int:
        """Into how many launches of a call those of the backward are."""
        if not self.fetches:
            return 1
        is_long = self.batch * self._seen >= _MANY_KEYS
        least = 1 if self.reads else 2
        return self._divisor(max(least, -(-self.kv_heads // _FEW) if is_long else least))

    def _divisor(self, most: int) -> int:
        """The largest number up to ``most``, and 1 at least, by which the heads of keys can be divided."""
        return max(n for n in range(1, max(1, most) + 1) if self.kv_heads % n == 0)
