"""The epilogue: finished rows pass through shared memory, which aliases their queries' or is of its own; or not at all.

A consumer warpgroup acquires its place, fills it and commits it; one thread of the producer's warpgroup stores it by
TMA and releases it.
"""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.sm90.barriers import (
    STORE_ARRIVALS,
    WARPS,
    NamedBarriers,
    consumer_arrivals,
    transaction_barriers,
)
from schedules.families.sm90.config import WARPGROUP_ROWS, Config, panels
from schedules.families.sm90.pipeline import Pipeline
from schedules.families.sm90.tma import wait_stored
from schedules.families.sm90.work_tile import Block


def epilogue(pattern: Pattern, config: Config, pool, q: Pipeline, merges: bool = False):
    """The epilogue that a configuration asks for, with memory from the pool; ``merges``: results are merged."""
    if merges:
        return InPlace(config, q)
    columns = panels(pattern.head_dim_v)
    kind = OwnMemory if config.separate_output else AliasesQ
    return kind(pattern, config, pool, q, columns)


@T.meta_class
class InPlace:
    """Warps put their rows where they belong themselves, and the next queries can come as soon as the last scores are
    computed.
    """

    stores = False

    def __init__(self, config: Config, q: Pipeline):
        self.q, self.releases = q, consumer_arrivals(config.num_consumer_warpgroups)

    def add_barriers(self, pool):
        """There are none."""

    @T.inline
    def init(self):
        """Nor anything to initialise."""

    @T.inline
    def scores_done(self, tile, lane):
        """A warp: the last scores of work tile ``tile`` are computed, so its queries may go."""
        self.q.consumer_release(self.q.state(tile), lane)


@T.meta_class
class AliasesQ:
    """Outputs lie where their queries were, so the queries' stage stays taken until the outputs are stored.

    ``releases``: how often the queries of a work tile are released.
    """

    stores = True

    def __init__(self, pattern: Pattern, config: Config, pool, q: Pipeline, columns: int):
        self.consumers, self.q, self.columns = config.num_consumer_warpgroups, q, columns
        self.releases = STORE_ARRIVALS
        self.queries_follow = config.several_tiles

    def add_barriers(self, pool):
        """Take the barriers from the pool, once it has the tiles of all pipelines."""
        self.written = transaction_barriers(pool, self.q.stages * self.consumers)

    @T.inline
    def init(self):
        """One thread: initialise the barriers."""
        self.written.init(WARPS)

    @T.inline
    def scores_done(self, tile, lane):
        """A warp: the last scores of work tile ``tile`` are computed; its queries have to stay for the store."""

    @T.inline
    def acquire(self, tile, index, barriers: NamedBarriers):
        """A warpgroup: until none of its warps reads the queries of work tile ``tile``."""
        barriers.queries_read(index)

    def pointer(self, tile, index):
        """``[panel, row, column]`` of warpgroup ``index``'s rows, as a pointer."""
        at = self.q.pointer(self.q.state(tile))
        return lambda panel, row, column: at(panel, index * WARPGROUP_ROWS + row, column)

    @T.inline
    def commit(self, tile, index):
        """One thread of each warp: its rows are there."""
        self.written.arrive(self.q.state(tile).index * self.consumers + index)

    @T.inline
    def store(self, block: Block, tile, descriptor):
        """One thread: store the rows of a work tile, and release the queries' stage."""
        place = T.meta_var(self.q.state(tile))
        for w in T.unroll(self.consumers):
            self.written.wait(place.index * self.consumers + w, place.phase)
            self.q.store(place, descriptor, self.columns, w * WARPGROUP_ROWS, block.queries(w * WARPGROUP_ROWS))
        T.evaluate(wait_stored())
        if self.queries_follow:
            self.q.empty.arrive(place.index)


@T.meta_class
class OwnMemory:
    """Room for the rows of one warpgroup, which the warpgroups fill in turn; the next queries can come as soon as the
    last scores are computed.

    Each warpgroup waits for its turns on a barrier of its own.  One barrier for all would not do: its parity can't tell
    a turn from the one after the next, and a warpgroup may come back with its next work tile before its last rows are
    stored.
    """

    stores = True

    def __init__(self, pattern: Pattern, config: Config, pool, q: Pipeline, columns: int):
        self.consumers, self.q, self.columns = config.num_consumer_warpgroups, q, columns
        self.releases = consumer_arrivals(self.consumers)
        self.place = Pipeline(pool, 1, columns, WARPGROUP_ROWS, pattern.dtype)

    def add_barriers(self, pool):
        """Take the barriers from the pool, once it has the tiles of all pipelines."""
        self.written = transaction_barriers(pool, self.consumers)
        self.turn = transaction_barriers(pool, self.consumers)

    @T.inline
    def init(self):
        """One thread: initialise the barriers; the first turn is the first warpgroup's."""
        self.written.init(WARPS)
        self.turn.init(STORE_ARRIVALS)
        self.turn.arrive(0)

    @T.inline
    def scores_done(self, tile, lane):
        """A warp: the last scores of work tile ``tile`` are computed, so its queries may go."""
        self.q.consumer_release(self.q.state(tile), lane)

    @T.inline
    def acquire(self, tile, index, barriers: NamedBarriers):
        """A warpgroup: until the rows of the one before it are stored."""
        self.turn.wait(index, T.bitwise_and(tile, 1))

    def pointer(self, tile, index):
        """``[panel, row, column]`` of warpgroup ``index``'s rows, as a pointer."""
        return self.place.pointer(self.place.state(0))

    @T.inline
    def commit(self, tile, index):
        """One thread of each warp: its rows are there."""
        self.written.arrive(index)

    @T.inline
    def store(self, block: Block, tile, descriptor):
        """One thread: store the rows of a work tile, one warpgroup's after the other's."""
        for w in T.unroll(self.consumers):
            self.written.wait(w, T.bitwise_and(tile, 1))
            self.place.store(self.place.state(0), descriptor, self.columns, 0, block.queries(w * WARPGROUP_ROWS))
            T.evaluate(wait_stored())
            self.turn.arrive((w + 1) % self.consumers)
