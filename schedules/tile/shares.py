"""Splits of rows' keys shared among blocks: equal ranges of the splits of all sequences, laid end to end.

Those of each row tile of a sequence's heads apart, so that the blocks of all heads read the same keys' neighbours at
about the same time.  Sequence ``u`` has splits ``u * splits`` to ``(u + 1) * splits`` (exclusive), and block ``i`` of a
row tile computes those from ``i * share`` on, ``share`` of them.  What it has of one sequence is a *run*, ``kept``
splits at most.  All blocks have as much to do, however many sequences there are, and one that goes on to another
sequence doesn't begin anew.

Ragged sequences have splits of lengths of their own: there *tiles* of keys are laid end to end, and a block has the
splits that begin in its range (:class:`RaggedShares`).
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.tile.sequences import Lengths, Ragged
from schedules.tile.tile_scheduler import ceildiv

#: Rows of a tile.
ROWS = 64


@T.meta_class
class Shares:
    """Numbers of host or device."""

    def __init__(self, splits: Expr, share: Expr, kept: Expr):
        self.splits, self.share, self.kept = splits, share, kept

    def first_run(self, unit: Expr) -> Expr:
        """How many splits the first run of a sequence has."""
        rest = self.share - T.truncmod(unit * self.splits, self.share)
        return T.min(T.min(self.splits, self.kept), rest)

    def end_of_run(self, unit: Expr, split: Expr, end: Expr) -> Expr:
        """The split after the last one of a run that begins with ``split``, in a share that ends before split ``end``
        of those of all sequences."""
        return T.min(T.min(self.splits, split + self.kept), end - unit * self.splits)


def kept_states(rows: Expr) -> Expr:
    """How many splits a run has at most whose states have so many rows; one if rows are of several tiles."""
    return T.max(T.truncdiv(T.int32(ROWS), T.max(rows, 1)), 1)


@T.meta_class
class RaggedShares:
    """Equal ranges of the tiles of ragged sequences; made before ``T.device_entry()``, of host expressions.

    Parameters
    ----------
    heads, group: query heads, and how many of them share row tiles.
    block_n: keys of a tile.
    split_bits: ``split_bits(keys)``, of how many tiles the splits of a sequence of so many keys are, as a power of two.
    most_splits: that no sequence has more than.
    blocks_per_sm: blocks that share a multiprocessor.
    """

    def __init__(
        self,
        queries: Ragged,
        keys: Lengths,
        heads: Expr,
        group: Expr,
        *,
        block_n: int,
        split_bits: Callable[[Expr], Expr],
        most_splits: Expr,
        blocks_per_sm: int,
    ):
        self.queries, self.keys, self.group = queries, keys, group
        self.block_n, self.split_bits, self.most_splits = block_n, split_bits, most_splits
        self.units = T.bind(T.truncdiv(heads, group))
        resident = T.call_extern("int32", "multiprocessors") * blocks_per_sm
        most = most_splits * queries.batch
        self.count = T.bind(T.max(T.min(T.truncdiv(resident, self.units), most), 1))

    def tiles(self, sequence: Expr) -> Expr:
        """How many tiles of keys a sequence counts for: none if it has no queries."""
        return self.tiles_of(self.queries.of(sequence).length, self.keys.of(sequence).length)

    def tiles_of(self, queries: Expr, keys: Expr) -> Expr:
        """The same of a sequence of so many queries and keys."""
        return T.Select(queries > 0, ceildiv(keys, self.block_n), 0)

    def size(self, total: Expr) -> Expr:
        """How many of all tiles a range has."""
        return ceildiv(total, self.count)

    def splits_within(self, tiles: Expr, keys: Expr) -> Expr:
        """How many splits of a sequence of so many keys begin in its first ``tiles`` tiles."""
        bits = self.split_bits(keys)
        return T.min(T.shift_right(tiles + T.shift_left(T.int32(1), bits) - 1, bits), self.most_splits)

    def first_run(self, before: Expr, total: Expr, splits: Expr, keys: Expr, rows: Expr) -> Expr:
        """How many splits the first run of a sequence has that has ``before`` of the ``total`` tiles before it, so many
        splits and keys, and so many rows in a row tile or in all of them."""
        size = self.size(total)
        end = T.min((T.truncdiv(before, size) + 1) * size, total)
        return T.min(T.min(splits, self.splits_within(end - before, keys)), kept_states(rows))
