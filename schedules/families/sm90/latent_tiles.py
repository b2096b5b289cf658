"""Tiles of keys whose first columns are values: their parts in shared memory, and which of them a block computes."""

from __future__ import annotations

from copy import copy

from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.sm90.barriers import consumer_arrivals
from schedules.families.sm90.config import PANEL, WARPGROUP_ROWS, panels
from schedules.families.sm90.parts import Part, PartScheduler
from schedules.families.sm90.pipeline import Pipeline, PipelineState
from schedules.tile.geometry import Geometry, local
from schedules.tile.tile_scheduler import ceildiv

#: Consumer warpgroups, and stages of a pipeline, one for each of a pair of tiles.
WARPGROUPS = STAGES = 2


def columns_of_half(pattern: Pattern) -> int:
    """Columns of the output that each warpgroup has: whole panels, where the kernel is feasible."""
    return pattern.head_dim_v // WARPGROUPS


@T.meta_class
class KeyTiles:
    """Tiles of keys in shared memory, two stages of them, in parts that come one after the other.

    Each part of ``parts`` is a pipeline.  Warpgroup ``w`` has the columns of part ``w``; the last one, ``rest``, is in
    keys only.  Halves in two parts each took longer (H200, bfloat16, 128 x 4096 keys of 128 heads: 287.1 us, 279.4 in
    one part): products of 256 columns read probabilities once.
    """

    def __init__(self, pool, pattern: Pattern, rows: int):
        half = columns_of_half(pattern) // PANEL
        self.parts, first = [], 0
        for size in (half, half, panels(pattern.head_dim) - 2 * half):
            self.parts.append(Pipeline(pool, STAGES, size, rows, pattern.dtype, first_panel=first))
            first += size
        self.rest = self.parts[-1]

    def add_barriers(self, pool):
        """Take the barriers from the pool, once it has all tiles."""
        for part in self.parts:
            part.add_barriers(pool)

    def init(self):
        """One thread: initialise the barriers."""
        for part in self.parts:
            part.init(consumer_arrivals(1))


@T.meta_class
class Turns:
    """How many tiles have passed through each stage."""

    def __init__(self):
        self.first, self.second = (local(T.int32(0)) for _ in range(2))

    def state(self, stage) -> PipelineState:
        """Of the next tile of a stage; a constant, or a number that is known in the kernel."""
        turns = (self.first, self.second)
        turn = turns[stage] if isinstance(stage, int) else T.Select(stage == 0, *turns)
        return PipelineState(STAGES, turn * STAGES + stage)

    @T.inline
    def advance(self, first, second):
        """So many tiles more have passed."""
        self.first = self.first + first
        self.second = self.second + second


@T.meta_class
class LatentScheduler(PartScheduler):
    """How parts are shared among blocks where each of ``row_tiles`` row tiles has its own.

    No sequence has more row tiles.  The blocks of different ones read the same keys at about the same time.
    ``row_first`` is the first row of the block's own, in what :meth:`of_row_tile` returns.
    """

    may_cluster = False

    def __init__(self, pattern: Pattern, geometry: Geometry, config, split_bits, most_splits, row_tiles):
        self.row_tiles = row_tiles
        PartScheduler.__init__(self, pattern, geometry, config, split_bits, most_splits)

    def count_units(self):
        return PartScheduler.count_units(self) * self.row_tiles

    def of_row_tile(self, number):
        """The scheduler of the blocks that have row tile ``number``."""
        own = copy(self)
        own.row_first = number * WARPGROUP_ROWS
        return own

    def tiles_of(self, queries, keys):
        """How many tiles of keys a sequence counts for: none if it hasn't so many rows."""
        return T.Select(queries * self.group - self.row_first > 0, ceildiv(keys, self.config.block_n), 0)


@T.meta_class
class LatentPart(Part):
    """A part of a block that has one row tile, of all sequences."""

    def __init__(self, pattern: Pattern, geometry: Geometry, scheduler: LatentScheduler, boxes, unit, share):
        head = T.truncdiv(unit, scheduler.row_tiles)
        row_tile = local(unit - head * scheduler.row_tiles)
        Part.__init__(self, pattern, geometry, scheduler.of_row_tile(row_tile), boxes, head, share)
        self.m_block = row_tile

    @T.inline
    def advance(self):
        """Go on to the next part."""
        self.other_rows = 0
        self.split = self.split + 1
        self.go_on()
