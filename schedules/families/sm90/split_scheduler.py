"""Which splits of the keys, and of which rows, a block of a decoding kernel computes."""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.families.sm90.packing import Rows
from schedules.tile.geometry import Geometry
from schedules.tile.tile_scheduler import ceildiv

ALIGNMENT = 16  # bytes; what TMA asks of addresses and strides


@T.meta_class
class RunScheduler:
    """A block for each run of splits, ``block_m`` rows of a head, and batch.

    Runs lie on the second axis of the grid, all heads and batches on the first, the only one that has room for more
    than 65535.  Without clusters a block may have ``several`` work tiles, one after the other, as many apart as there
    are blocks: those that run at a time read neighbouring heads.  Made before ``T.device_entry()``, of host
    expressions.

    Parameters
    ----------
    splits: how many there are of a row's keys, ``run`` of them in a run, each of ``split_length`` keys.
    spread: 0 if the blocks that have the runs of the same rows are a cluster, or the rows are one run each.
    several: work tiles of a block of the kernel without clusters; None of one with clusters.
    """

    def __init__(self, geometry: Geometry, rows: Rows, config, splits, split_length, run, spread, several=None):
        self.config, self.rows, self.batch = config, rows, geometry.batch
        self.splits, self.run, self.spread = splits, run, spread
        self.runs = T.bind(ceildiv(splits, run))
        self.m_blocks = T.bind(ceildiv(rows.count, config.block_m))
        self.work = T.bind(rows.heads * self.m_blocks)
        self.tiles = T.bind(T.truncdiv(split_length, config.block_n))
        self.in_clusters = several is None
        if not self.in_clusters:
            self.units = T.bind(self.work * self.batch)
            self.blocks = T.bind(ceildiv(self.units, several))

    def work_tiles(self, at):
        """A block has the rows of one work tile."""
        return 1

    def own(self, geometry, rows, tile):
        """Geometry and rows of the block's work tile: those of all."""
        return geometry, rows

    def grid(self):
        """Blocks along each axis."""
        return [self.work * self.batch if self.in_clusters else self.blocks, self.runs, 1]

    def cluster(self):
        """Blocks of a cluster along each axis."""
        return [1, T.Select(self.spread == 0, self.runs, 1), 1]

    def work_tile(self, at, tile):
        """Place among those of its head, first query head and batch of the work tile of the block at ``at``."""
        batch = T.truncdiv(at[0], self.work)
        work = at[0] - batch * self.work
        head = T.truncdiv(work, self.m_blocks)
        return work - head * self.m_blocks, head * self.rows.head_step, batch

    def first_row(self, place, tile):
        """First row of the work tile in place ``place`` of its head."""
        return place * self.config.block_m

    def key_tiles(self, at):
        """First and end of the tiles of keys of the split that a block has come to."""
        return at.number * self.tiles, (at.number + 1) * self.tiles
