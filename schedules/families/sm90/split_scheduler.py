"""Which split of the keys, and of which rows, a block of a decoding kernel computes."""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.families.sm90.packing import Rows
from schedules.tile.geometry import Geometry
from schedules.tile.tile_scheduler import Traversal, ceildiv

ALIGNMENT = 16  # bytes; what TMA asks of addresses and strides


@T.meta_class
class SplitScheduler:
    """A block for each split of the keys, ``block_m`` rows of a head, and batch.

    Heads-outer takes all splits of a head one after the other, as they are in memory, seq-outer all heads of a split.
    Batches lie on the first axis too, the only one that has room for more than 65535.  Made before
    ``T.device_entry()``, of host expressions.
    """

    def __init__(self, geometry: Geometry, rows: Rows, config, traversal: Traversal, splits, split_length):
        self.config, self.rows, self.splits, self.batch = config, rows, splits, geometry.batch
        self.seq_outer = traversal.layout == "bshd"  # the heads of a position lie one after the other
        self.m_blocks = T.bind(ceildiv(rows.count, config.block_m))
        self.work = T.bind(rows.heads * self.m_blocks)
        self.tiles = T.bind(T.truncdiv(split_length, config.block_n))

    def work_tiles(self, at):
        """A block has the rows of one work tile."""
        return 1

    def own(self, geometry, rows, tile):
        """Geometry and rows of the block's work tile: those of all."""
        return geometry, rows

    def grid(self):
        """Blocks along each axis."""
        first, second = (self.work, self.splits) if self.seq_outer else (self.splits, self.work)
        return [first * self.batch, second, 1]

    def _places(self, at):
        """Batch of the block at ``at``, its split, and the number of its work tile among those of the batch."""
        extent = self.work if self.seq_outer else self.splits
        batch = T.truncdiv(at[0], extent)
        rest = at[0] - batch * extent
        return (batch, at[1], rest) if self.seq_outer else (batch, rest, at[1])

    def split(self, at):
        """The split of the block at ``at``."""
        return self._places(at)[1]

    def work_tile(self, at, tile):
        """Place among those of its head, first query head and batch of the block's work tile."""
        batch, _, work = self._places(at)
        head = T.truncdiv(work, self.m_blocks)
        return work - head * self.m_blocks, head * self.rows.head_step, batch

    def first_row(self, place, tile):
        """First row of the work tile in place ``place`` of its head."""
        return place * self.config.block_m

    def key_tiles(self, at):
        """First and end of the tiles of keys of a block's split."""
        first = self.split(at) * self.tiles
        return first, first + self.tiles
