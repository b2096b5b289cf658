"""Which heads are computed together, and which are on their way meanwhile.

A launch leaves part of a GPU without work at its end: about half a wave of its blocks.  So launches of few heads cost
time, launches of all heads wait for all keys, and launches of many heads share the cache.  All of this follows from
what every rank knows, since ranks must send in one order.  What a rank of two computes of 8 heads of head_dim 128 in
bfloat16 on an H200, in 1 and in 4 launches of a call, without the messages: 64k positions under a causal mask 6.6 and
7.1 ms, 64k in full 13.2 and 13.0, 256k under a causal mask 115 and 108, 256k in full 212 and 210.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Rows of a block.
_BLOCK = 128
#: Blocks that a launch of the forward should have: 8 waves of an H200.
_ENOUGH_BLOCKS = 1024
#: Into how many groups the forward's heads are split at most.
_MOST_GROUPS = 4

#: Keys that a query sees in a call, of all batch entries together, from which on the backward is faster in launches of
#: few heads of keys: they share less of the cache.  TFLOP/s of a GPU in launches of 2 and 4, and of 8 by one GPU alone:
#: 64k full 507, 443, 393; 256k full 457, 384, 380; 256k causal 509, 473, 381; but 64k causal, half as many, 486, 510,
#: 547.
_MANY_KEYS = 1 << 16
#: As many heads of keys are few.
_FEW = 2


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
    batch, heads, kv_heads: sizes of this rank's tensors.
    positions: of the whole sequence.
    ranks: that share these.
    left, right: the window over positions, None for unbounded.
    fetches: whether a step's keys come from other ranks, all at once.
    """

    batch: int
    heads: int
    kv_heads: int
    positions: int
    ranks: int
    left: int | None
    right: int | None
    fetches: bool

    @property
    def _is_masked(self) -> bool:
        return self.left is not None or self.right is not None

    @property
    def _seen(self) -> int:
        """Keys that a query sees, about."""
        of_mask = self.positions if self.right is None else self.positions // 2
        return of_mask if self.left is None else min(of_mask, self.left + (self.right or 0) + 1)

    @property
    def in_forward(self) -> int:
        """Into how many groups the forward's heads are split."""
        calls = 2 if self._is_masked else 1  # one for each chunk of a rank that sees other keys
        blocks = self.batch * self.heads * self.positions // (self.ranks * calls * _BLOCK)
        return self._divisor(min(_MOST_GROUPS, blocks // _ENOUGH_BLOCKS)) if self.fetches else 1

    @property
    def in_backward(self) -> int:
        """Into how many launches of a call those of the backward are."""
        keys = self._seen if self.fetches else self._seen // self.ranks  # of a call
        if self.batch * keys >= _MANY_KEYS:
            return self._divisor(self.kv_heads // _FEW)
        return self._divisor(2) if self.fetches else 1

    def _divisor(self, most: int) -> int:
        """The largest number up to ``most``, and 1 at least, by which the heads of keys can be divided."""
        return max(n for n in range(1, max(1, most) + 1) if self.kv_heads % n == 0)
