"""Pipelines of tiles in shared memory, from a producer's thread to the consumer warpgroups.

Tile ``n`` of those that pass through a pipeline of ``stages`` stages is in stage ``n % stages``, in that stage's turn
``n // stages``.  A ``PipelineState`` is a tile's number as these two: ``index`` and ``phase``.  The producer acquires a
stage (waits until it is empty) and loads the tile; the consumers wait for it and release it.
"""

from __future__ import annotations

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.families.sm90.barriers import PRODUCER_ARRIVALS, transaction_barriers
from schedules.families.sm90.config import PANEL
from schedules.families.sm90.tma import load_panel, load_panel_by, store_panel


@T.meta_class
class PipelineState:
    """Where tile ``tile`` of a pipeline of ``stages`` stages is; a power of two costs a bit operation each."""

    def __init__(self, stages: int, tile):
        self.stages, self._tile = stages, tile

    @property
    def tile(self):
        """The tile's number among all that pass through the pipeline."""
        return self._tile

    @property
    def index(self) -> Expr:
        """The tile's stage."""
        if self.stages & (self.stages - 1):
            return T.truncmod(self.tile, self.stages)
        return T.bitwise_and(self.tile, self.stages - 1)

    @property
    def phase(self) -> Expr:
        """Parity of the stage's turn in which it has the tile."""
        if self.stages & (self.stages - 1):
            return T.bitwise_and(T.truncdiv(self.tile, self.stages), 1)
        return T.bitwise_and(T.shift_right(self.tile, self.stages.bit_length() - 1), 1)


@T.meta_class
class TileCounter:
    """How many tiles a consumer has taken from pipelines that go on together, in one register for all of them.

    A state names a tile, and goes on naming it when the counter advances: how far the counter has gone on since is
    known when the kernel is made, so a state is to be used in the iteration that it was made in.
    """

    def __init__(self, count):
        self.count = count
        self.advances = 0

    @T.inline
    def start(self):
        """Before the first tile."""
        self.count = 0

    def advance(self):
        """The next tile is the current one."""
        T.buffer_store(self.count.source, self.count + 1, [0])
        self.advances += 1

    def state(self, stages: int, behind: int = 0) -> PipelineState:
        """State of the current tile of a pipeline, or of the one ``behind`` tiles before it."""
        return _CountedState(stages, self, behind)


@T.meta_class
class _CountedState(PipelineState):
    """A state relative to a counter."""

    def __init__(self, stages: int, counter: TileCounter, behind: int):
        PipelineState.__init__(self, stages, None)
        self.counter, self.number = counter, counter.advances - behind

    @property
    def tile(self):
        behind = self.counter.advances - self.number
        count = self.counter.count
        return count + -behind if behind < 0 else count - behind if behind else count

    def next(self) -> PipelineState:
        """State of the tile after this one."""
        return _CountedState(self.stages, self.counter, self.counter.advances - self.number - 1)


@T.meta_class
class Pipeline:
    """Tiles ``(stages, panels, rows, 64)`` of 16 bits in shared memory, each stage with a barrier for "full" and one
    for "empty".  ``first_panel`` is that of the tensor which is the first one of a tile."""

    def __init__(self, pool, stages: int, panels: int, rows: int, dtype: str, first_panel: int = 0):
        self.stages, self.panels, self.rows, self.first_panel = stages, panels, rows, first_panel
        self.tiles = pool.alloc((stages, panels, rows, PANEL), dtype, align=1024)

    def add_barriers(self, pool):
        """Take the barriers from the pool, once it has the tiles of all pipelines."""
        self.full = transaction_barriers(pool, self.stages)
        self.empty = transaction_barriers(pool, self.stages)

    @T.inline
    def init(self, releases: int, arrivals: int = PRODUCER_ARRIVALS):
        """One thread: initialise the barriers; a stage is empty when it has been released that many times, and full
        when that many producers have said so and all bytes are there."""
        self.full.init(arrivals)
        self.empty.init(releases)

    def state(self, tile) -> PipelineState:
        """State of tile number ``tile``."""
        return PipelineState(self.stages, tile)

    def pointer(self, state: PipelineState):
        """``[panel, row, column]`` of a tile, as a pointer."""
        return lambda panel, row, column: self.tiles.ptr_to([state.index, panel, row, column])

    @T.inline
    def producer_acquire(self, state):
        """Producer: until the tile's stage is empty."""
        self.empty.wait(state.index, T.bitwise_xor(state.phase, 1))

    @T.inline
    def expect(self, state, beside=0):
        """Producer: the bytes of a tile are about to come to its stage, which is empty.

        ``beside`` are bytes that other copies bring, for which its barrier waits too.
        """
        T.ptx.mbarrier.arrive.expect_tx.shared.b64(
            self.full.ptr_to([state.index]), T.uint32(self.panels * self.rows * PANEL * 2 + beside)
        )

    @T.inline
    def load(self, state, descriptor, at, beside=0):
        """Producer: fill the tile's stage, which is empty, with the box at ``at``, coordinates behind the panel's, and
        expect ``beside`` bytes more."""
        self.expect(state, beside)
        for p in T.unroll(self.panels):
            load_panel(self.pointer(state)(p, 0, 0), descriptor, p, at, self.full.ptr_to([state.index]))

    @T.inline
    def load_by(self, state, descriptor, at, policy):
        """Producer: the same under a policy of the L2 cache."""
        self.expect(state)
        for p in T.unroll(self.panels):
            load_panel_by(self.pointer(state)(p, 0, 0), descriptor, p, at, self.full.ptr_to([state.index]), policy)

    @T.inline
    def consumer_wait(self, state):
        """Consumer: until the tile is there."""
        self.full.wait(state.index, state.phase)

    @T.inline
    def consumer_release(self, state, lane):
        """Consumer, every warp: this warp needs the tile no more."""
        if lane == 0:
            self.empty.arrive(state.index)

    @T.inline
    def store(self, state, descriptor, panels, row, at):
        """One thread: write the tile's rows from ``row`` on to the box at ``at``, as one bulk group."""
        for p in T.unroll(panels):
            store_panel(descriptor, p, at, self.pointer(state)(p, row, 0))
        T.ptx.cp.async_.bulk.commit_group()
