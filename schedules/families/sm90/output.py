"""Where finished rows wait in shared memory to be stored: in the place of their queries, or in a place of their own.

Consumers take a place, fill it and hand it over; one thread stores it by TMA and gives it back.
"""

from __future__ import annotations

from tvm.backend.cuda.lang import MBarrier
from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.sm90.block import Block
from schedules.families.sm90.config import WARPGROUP_ROWS, Config, panels
from schedules.families.sm90.copy import WAIT_STORED, Ring

#: Warps of a warpgroup, each of which hands its rows over.
WARPS = 4


def output(pattern: Pattern, config: Config, pool, q: Ring):
    """The place of the outputs that a configuration asks for, taken from the pool."""
    columns = panels(pattern.head_dim_v)
    return Apart(pattern, config, pool, q, columns) if config.separate_output else InPlace(config, q, columns)


@T.meta_class
class InPlace:
    """Rows lie where their queries were, so these stay taken until the rows are stored.

    ``releases``: how often the queries of a row tile are given back.
    """

    releases = 1  # by who stores

    def __init__(self, config: Config, q: Ring, columns: int):
        self.consumers, self.q, self.columns = config.num_consumer_warpgroups, q, columns
        self.give_back = config.several_tiles

    def add_barriers(self, pool):
        """Take the barriers from the pool, once it has the tiles of all rings."""
        self.written = MBarrier(pool, self.q.stages * self.consumers, leader=T.bool(True))

    @T.inline
    def init(self):
        """One thread: initialise the barriers."""
        self.written.init(WARPS)

    @T.inline
    def scored(self, tile, lane):
        """A warp: the last scores of row tile ``tile`` are computed; its queries have to stay for the store."""

    @T.inline
    def take(self, tile, index, barrier):
        """A warpgroup: until none of its warps reads the queries of row tile ``tile``."""
        T.ptx.bar.sync(T.Cast("uint32", barrier), 128)

    def pointer(self, tile, index):
        """``[panel, row, column]`` of warpgroup ``index``'s rows, as a pointer."""
        at = self.q.pointer(tile)
        return lambda panel, row, column: at(panel, index * WARPGROUP_ROWS + row, column)

    @T.inline
    def hand_over(self, tile, index):
        """One thread of each warp: its rows are there."""
        self.written.arrive(self.q.slot(tile) * self.consumers + index)

    @T.inline
    def store(self, block: Block, tile, descriptor):
        """One thread: store the rows of a row tile, and give the place back to its queries."""
        for w in T.unroll(self.consumers):
            self.written.wait(self.q.slot(tile) * self.consumers + w, self.q.phase(tile))
            self.q.store(tile, descriptor, self.columns, w * WARPGROUP_ROWS, block.queries(w * WARPGROUP_ROWS))
        T.evaluate(T.cuda.func_call("wait_stored", source_code=WAIT_STORED))
        if self.give_back:
            self.q.empty.arrive(self.q.slot(tile))


@T.meta_class
class Apart:
    """Room for the rows of one warpgroup, which the warpgroups fill in turn; queries can be followed by the next ones
    as soon as the last scores are computed.

    Each warpgroup waits for its turns on a barrier of its own.  One barrier for all would not do: its parity can't tell
    a turn from the one after the next, and a warpgroup may come back with its next row tile before its last rows are
    stored.
    """

    def __init__(self, pattern: Pattern, config: Config, pool, q: Ring, columns: int):
        self.consumers, self.q, self.columns = config.num_consumer_warpgroups, q, columns
        self.releases = WARPS * self.consumers  # by the consumers
        self.ring = Ring(pool, 1, columns, WARPGROUP_ROWS, pattern.dtype)

    def add_barriers(self, pool):
        """Take the barriers from the pool, once it has the tiles of all rings."""
        self.written = MBarrier(pool, self.consumers, leader=T.bool(True))
        self.turn = MBarrier(pool, self.consumers, leader=T.bool(True))

    @T.inline
    def init(self):
        """One thread: initialise the barriers; the first turn is the first warpgroup's."""
        self.written.init(WARPS)
        self.turn.init(1)
        self.turn.arrive(0)

    @T.inline
    def scored(self, tile, lane):
        """A warp: the last scores of row tile ``tile`` are computed, so its queries may go."""
        self.q.release(tile, lane)

    @T.inline
    def take(self, tile, index, barrier):
        """A warpgroup: until the rows of the one before it are stored."""
        self.turn.wait(index, T.bitwise_and(tile, 1))

    def pointer(self, tile, index):
        """``[panel, row, column]`` of warpgroup ``index``'s rows, as a pointer."""
        return self.ring.pointer(0)

    @T.inline
    def hand_over(self, tile, index):
        """One thread of each warp: its rows are there."""
        self.written.arrive(index)

    @T.inline
    def store(self, block: Block, tile, descriptor):
        """One thread: store the rows of a row tile, one warpgroup's after the other's."""
        for w in T.unroll(self.consumers):
            self.written.wait(w, T.bitwise_and(tile, 1))
            self.ring.store(0, descriptor, self.columns, 0, block.queries(w * WARPGROUP_ROWS))
            T.evaluate(T.cuda.func_call("wait_stored", source_code=WAIT_STORED))
            self.turn.arrive((w + 1) % self.consumers)
