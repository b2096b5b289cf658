"""Which keys a query sees, and which rectangles of queries and keys kernels have to compute for it."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tvm_flash.distributed.placement import Interval, common


class Block(NamedTuple):
    """Queries and keys of one document that see each other, and are seen, but for a window's or a causal edge.

    ``whole`` says that all of the document is in it.
    """

    queries: Interval
    keys: Interval
    whole: bool


@dataclass(frozen=True)
class Sight:
    """A window over positions, in documents that don't see each other.

    Attributes
    ----------
    left, right: how many keys before and after its own position a query sees; None is all.
    ends: where each document ends; the first begins at 0, and what is after the last belongs to none.
    """

    left: int | None
    right: int | None
    ends: tuple[int, ...]

    def blocks(self, queries: Interval, keys: Interval) -> Iterator[Block]:
        """What has to be computed of some queries and keys, document by document."""
        n = bisect.bisect_right(self.ends, max(queries[0], keys[0]))
        for i in range(n, len(self.ends)):
            document = (self.ends[i - 1] if i else 0, self.ends[i])
            if document[0] >= min(queries[1], keys[1]):
                break
            mine, theirs = common(queries, document), common(keys, document)
            if mine[0] < mine[1] and theirs[0] < theirs[1]:
                whole = mine == theirs == document
                mine, theirs = self._seen(mine, theirs)
                if mine[0] < mine[1] and theirs[0] < theirs[1]:
                    yield Block(mine, theirs, whole)

    def _seen(self, queries: Interval, keys: Interval) -> tuple[Interval, Interval]:
        """The queries that see any of the keys, and the keys that any of those see."""
        (q0, q1), (k0, k1) = queries, keys
        if self.right is not None:
            q0 = max(q0, k0 - self.right)
        if self.left is not None:
            q1 = min(q1, k1 + self.left)
        if q0 < q1:
            if self.left is not None:
                k0 = max(k0, q0 - self.left)
            if self.right is not None:
                k1 = min(k1, q1 + self.right)
        return (q0, q1), (k0, k1)

    def edges(self, queries: Interval, keys: Interval) -> tuple[int | None, int | None]:
        """The window of a block as kernels count it, the last query standing on the last key; neither side is negative.

        None is a side on which every query sees every key.
        """
        (q0, q1), (k0, k1) = queries, keys
        left = None if self.left is None or k0 >= q1 - 1 - self.left else self.left + k1 - q1
        right = None if self.right is None or k1 - 1 <= q0 + self.right else self.right + q1 - k1
        return left, right
