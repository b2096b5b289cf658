"""Blocks of queries of the launch for dq: where they are, and which of ragged sequences they belong to."""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.sm90.boxes import DenseBoxes, RaggedBoxes
from schedules.families.sm90.config import Config
from schedules.families.sm90.packing import Rows
from schedules.families.sm90.ragged import RaggedRows
from schedules.families.sm90.tile_scheduler import TileScheduler
from schedules.tile.gradients import RaggedTensors, Tensors
from schedules.tile.slots import WORDS, FoundTile, Own
from schedules.tile.tile_scheduler import WorkTile


@T.meta_class
class SlotScheduler:
    """A block for each slot of ragged sequences' row tiles, of each query head: one work tile, which a warp looks up.

    Those of a sequence come from its last to its first, which begins with the longest where a mask is causal.
    """

    looks_up = True

    def __init__(self, tensors: RaggedTensors, config: Config):
        self.tensors, self.config = tensors, config
        self.slots = T.bind(tensors.queries.tiles(config.block_m))

    def grid(self):
        """Blocks along each axis."""
        return [self.slots, self.tensors.heads, 1]

    def add_memory(self, pool):
        """Room for what a block knows of its tile."""
        self.found = FoundTile(pool.alloc((WORDS,), "int32"))

    @T.inline
    def look_up(self, at, lane):
        """A warp: find the block's work tile."""
        item = T.meta_var(WorkTile(T.int32(0), at[1], at[0]))
        self.found.look_up(self.tensors.queries, self.tensors.keys, self.config.block_m, item, lane)

    @T.inline
    def if_found(self, work):
        """Do the work of the block, if it has any."""
        if self.found.exists:
            work()

    def own(self, geometry, rows, tile):
        """Geometry and rows of the work tile."""
        own = geometry.at(Own(self.found.queries), Own(self.found.keys))
        return own, RaggedRows(own, rows.group)

    def work_tiles(self, at):
        """How many work tiles a block computes."""
        return 1

    def work_tile(self, at, tile):
        """M-block, query head and sequence of the work tile."""
        return self.found.m_block, self.found.head, self.found.sequence

    def first_row(self, place, tile):
        """First row of an m-block."""
        return place * self.config.block_m

    def key_tiles(self, at):
        """A block has all tiles of keys of its rows."""
        return

    @T.inline
    def each_tile(self, block, advances, lane, visit):
        """``visit(t)`` for the work tile."""
        visit(0)


@T.meta_class
class PlacedScheduler(TileScheduler):
    """That of the forward, whose blocks know their work tile by their place."""

    @T.inline
    def look_up(self, at, lane):
        """A warp: there is nothing to find."""


def query_blocks(pattern: Pattern, tensors: Tensors | RaggedTensors, config: Config):
    """Rows, scheduler and boxes of a launch; made before ``T.device_entry()``."""
    if isinstance(tensors, RaggedTensors):
        return RaggedRows(tensors, tensors.group), SlotScheduler(tensors, config), RaggedBoxes()
    rows = Rows(config, tensors)
    return rows, PlacedScheduler(tensors, rows, config), DenseBoxes(tensors, rows)
