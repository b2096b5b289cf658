"""A work tile: which rows of which head, and which tiles of keys they visit."""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.sm90.boxes import DenseBoxes
from schedules.families.sm90.config import Config
from schedules.families.sm90.packing import Rows
from schedules.families.sm90.tile_scheduler import TileScheduler
from schedules.tile.geometry import Geometry, local, site
from schedules.tile.key_range import KeyTiles
from schedules.tile.parameters import Parameters


@T.meta_class
class Block:
    """What one block computes, a work tile after the other.

    ``head``, ``kv_head``, ``batch`` and ``row_first`` are those of the work tile that it has come to, number ``tile``
    of ``tiles``.  ``at`` is the block's place in the grid.

    Everything is computed anew from the number of the tile, since each register counts throughout the steps.
    """

    def __init__(
        self,
        pattern: Pattern,
        config: Config,
        geometry: Geometry,
        rows: Rows,
        scheduler: TileScheduler,
        boxes: DenseBoxes,
        at,
    ):
        self.pattern, self.config, self.geometry, self.rows, self.scheduler = pattern, config, geometry, rows, scheduler
        self.boxes, self.at = boxes, at
        self.tile = local(T.int32(0))
        self.tiles = scheduler.work_tiles(at)
        self.geometry, self.rows = scheduler.own(self.geometry, self.rows, self.tile)
        place, head, batch = scheduler.work_tile(at, 0)
        self.head, self.batch = local(head), local(batch)
        self.row_first = local(scheduler.first_row(place, T.int32(0)))
        self.kv_head = local(T.truncdiv(self.head, rows.group))
        self.parameters = Parameters(self.geometry, self.batch, self.head)
        self.site = site(self.geometry, self.parameters, self.batch, self.head)

    def queries(self, row):
        """Where rows from ``row`` of the work tile on are, as a box of TMA."""
        return self.boxes.queries(self, row)

    def keys(self, key):
        """Where keys from ``key`` on are, as a box of TMA."""
        return self.boxes.keys(self, key)

    @T.inline
    def advance(self):
        """Go on to the next work tile."""
        self.tile = self.tile + 1
        self.scheduler.await_tile(self.tile)
        where = T.meta_var(self.scheduler.work_tile(self.at, self.tile))
        self.head = where[1]
        self.batch = where[2]
        self.kv_head = T.truncdiv(self.head, self.rows.group)
        self.row_first = self.scheduler.first_row(where[0], self.tile)
        self.scheduler.read_parameters(self)


@T.meta_class
class KeyWalk:
    """The tiles of keys that a work tile visits, from right to left: step ``i`` is tile ``last - i``, ``steps`` in all.

    For ``rows`` rows from row ``row`` of the work tile on, the first ``hidden`` steps are fully masked, and those from
    ``full_begin`` to ``full_end`` (exclusive) fully visible, so that they need no mask.  There always is a step 0,
    which masks if it must, even for rows that see nothing, and one that isn't hidden.  ``has_full`` and ``has_left``
    say whether there can be fully visible steps, and partly visible ones after them.
    """

    def __init__(self, block: Block, row, rows: int):
        self.block = block
        self.lists = block.pattern.lists_tiles
        if self.lists:
            self._follow_list()
            return
        self.tiles = tiles = self._tiles(0, block.config.block_m)
        # A work tile past the last row (a place has two, and an odd number was needed) takes the one step.
        steps = T.max(tiles.end - tiles.begin, 1)
        exists = block.row_first < block.rows.count
        self.steps = local(T.Select(exists, steps, 1) if block.config.tiles_per_cta == 2 else steps)
        self.last = local(T.max(tiles.end - 1, tiles.begin))
        self.own = own = self._tiles(row, rows)
        self.has_full, self.has_left = own.has_full, own.has_left
        self.full_begin = local(self.last + 1 - own.full_end) if own.has_full else self.steps
        self.full_end = local(self.last + 1 - own.full_begin) if own.has_full else self.steps
        self.hidden = T.max(T.min(self.last + 1 - self._own_end(row), self.steps - 1), 0)

    def _follow_list(self):
        """Take the steps from the list of the work tile."""
        block = self.block
        self.visits = block.pattern.visits(block.site, block.rows.span(block.row_first, block.config.block_m)[0])
        self.steps, self.hidden = self.visits.steps, T.int32(0)
        self.full_begin, self.full_end = self.visits.masked, self.visits.steps
        self.has_full, self.has_left = True, False

    def _own_end(self, row):
        """The tile after the last one that the rows from ``row`` of the work tile on see."""
        block = self.block
        if not block.rows.may_be_absent:
            return self.own.end
        return T.Select(block.row_first + row < block.rows.count, self.own.end, 0)

    def _tiles(self, row, rows):
        block = self.block
        span = block.rows.span(block.row_first + row, rows)
        return KeyTiles(block.pattern, block.site, *span, block.config.block_n, block.scheduler.key_tiles(block.at))

    def key_first(self, step):
        """First key of a step's tile; of a list it is read, where this is called."""
        if self.lists:
            return self.visits.tile(step) * self.block.config.block_n
        return (self.last - step) * self.block.config.block_n

    def visible(self, step):
        """Whether a step has anything to see; asked only of masks with gaps, and not of step 0."""
        block, config = self.block, self.block.config
        key = self.key_first(step)
        rows = block.rows.span(block.row_first, config.block_m)
        return block.pattern.tile_live(block.site, *rows, key, key + (config.block_n - 1))

    @T.inline
    def masked_steps(self, begin, end, step):
        """``step(walk, i, True)``, with the mask, for steps ``begin .. end`` (exclusive) but those that see nothing."""
        for i in T.serial(begin, end):
            if self.block.pattern.has_gaps:
                if self.visible(i):
                    step(self, i, True)
            else:
                step(self, i, True)
