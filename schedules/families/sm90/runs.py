"""Decoding on Hopper in runs: a block computes several splits of the keys of its rows, one after the other.

Splits are shared equally among as many blocks as the machine has places for (:mod:`schedules.tile.shares`): few
sequences have a split a block, many of them a block for all of their keys, and what is between the two leaves no block
without work.  Every split is computed for itself, from a reference of its own, and leaves a state, and states are
folded from left to right (:mod:`schedules.families.sm90.run_states`), so that a sequence has the same bits however many
splits a run has.
"""

from __future__ import annotations

from tvm.backend.cuda.lang import SMEMPool
from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.sm90.barriers import WARPS, consumer_arrivals
from schedules.families.sm90.boxes import DenseBoxes
from schedules.families.sm90.config import WARPGROUP_ROWS, panels
from schedules.families.sm90.kernel import ALIGNMENT
from schedules.families.sm90.packing import Rows
from schedules.families.sm90.pipeline import Pipeline
from schedules.families.sm90.run_states import RunConsumer, memory_of_states
from schedules.families.sm90.tma import encode_keys, encode_queries
from schedules.families.sm90.work_tile import Block, KeyWalk
from schedules.tile.combine import Sinks
from schedules.tile.geometry import Geometry, local
from schedules.tile.shares import Shares
from schedules.tile.states import PartialStates
from schedules.tile.tile_scheduler import Traversal, ceildiv


@T.meta_class
class RunScheduler:
    """Which splits, and of which rows, a block computes; made before ``T.device_entry()``, of host expressions.

    Parameters
    ----------
    splits: how many there are of a row's keys; blocks have ``share`` of them, runs ``kept`` at most.
    """

    def __init__(self, geometry: Geometry, rows: Rows, config, splits, split_length, share, kept):
        self.config, self.rows, self.splits, self.share = config, rows, splits, share
        self.m_blocks = T.bind(ceildiv(rows.count, config.block_m))
        self.work = T.bind(rows.heads * self.m_blocks)
        self.all_splits = T.bind(geometry.batch * splits)
        self.tiles = T.bind(T.truncdiv(split_length, config.block_n))
        self.shares = Shares(splits, share, kept)

    def work_tiles(self, at):
        """The loop over the sequences of a block is :class:`SharedRunConsumer`'s."""
        return 1

    def own(self, geometry, rows, tile):
        """Geometry and rows of the block's work tile: those of all."""
        return geometry, rows

    def grid(self):
        """Blocks along each axis: row tiles of the heads, and shares."""
        return [self.work, ceildiv(self.all_splits, self.share)]

    def work_tile(self, at, tile):
        """Place among those of its head, first query head and batch of row tile ``at[0]`` of sequence ``at[1]``."""
        head = T.truncdiv(at[0], self.m_blocks)
        return at[0] - head * self.m_blocks, head * self.rows.head_step, at[1]

    def first_row(self, place, tile):
        """First row of the work tile in place ``place`` of its head."""
        return place * self.config.block_m

    def key_tiles(self, at):
        """First and end of the tiles of keys of the split that a block has come to."""
        return at.number * self.tiles, (at.number + 1) * self.tiles


@T.meta_class
class RunBlock(Block):
    """A block, as the main loop asks of it: ``number`` is the split that it has come to, of sequence ``batch``.

    ``tile`` counts its sequences.  Of its run, ``begin`` is the first split and ``end`` the one after the last.
    """

    def __init__(self, pattern: Pattern, config, geometry: Geometry, rows: Rows, scheduler: RunScheduler, boxes, at):
        first = at[1] * scheduler.share
        sequence = T.truncdiv(first, scheduler.splits)
        Block.__init__(self, pattern, config, geometry, rows, scheduler, boxes, (at[0], sequence))
        self.number = local(first - self.batch * scheduler.splits)
        self.begin = local(self.number)
        self.share = at[1]
        self.at = self

    @property
    def share_end(self):
        """The end of the block's splits, of those of all sequences."""
        return T.min((self.share + 1) * self.scheduler.share, self.scheduler.all_splits)

    @property
    def exists(self):
        """Whether the block has come to a split, and not to its end."""
        return self.batch * self.scheduler.splits + self.number < self.share_end

    @property
    def end(self):
        """The split after the run's last one; computed where it is asked for, which costs no register."""
        return self.scheduler.shares.end_of_run(self.batch, self.begin, self.share_end)

    @property
    def first_run(self):
        """How many splits the first run of the rows has."""
        return self.scheduler.shares.first_run(self.batch)

    @property
    def splits(self):
        """How many splits the rows have."""
        return self.scheduler.splits

    @property
    def is_at_end(self):
        """Whether the block has come to the end of a sequence's splits."""
        return self.number >= self.scheduler.splits

    @property
    def count(self):
        """Rows of the block's work tile."""
        return T.min(self.rows.count - self.row_first, WARPGROUP_ROWS)

    def _place(self, row):
        """Batch, head and position of a row of the work tile."""
        row = self.row_first + row
        return self.batch, self.head + self.rows.head(row), self.rows.position(row)

    def has_row(self, row):
        """Whether a row stands for a query."""
        return T.And(row < self.count, self._place(row)[2] < self.geometry.seqlen_q)

    def row_number(self, row):
        """The number of a row among all, int64."""
        return self.geometry.lse_offset(*self._place(row))

    def output(self, row, column):
        """Elements of o before a column of a row, int64."""
        return self.geometry.o.offset(*self._place(row), column)

    def sink(self, row):
        """The logit that a row has beside those of its keys, None if rows have none."""
        if not self.pattern.has_sink:
            return None
        batch, head, _ = self._place(row)
        return Sinks(self.pattern, self.geometry.parameters).of(batch, head)

    @T.inline
    def enter_next(self):
        """Go on to the first split of the next sequence, which there may not be."""
        self.batch = self.batch + 1
        self.tile = self.tile + 1
        self.number = 0
        if self.exists:
            self.parameters.read(self.batch, self.head)


@T.meta_class
class SharedRunConsumer(RunConsumer):
    """The consumer warpgroup of a block that has a share of all row tiles' splits."""

    @T.inline
    def run(self):
        """Compute the block's splits."""
        block = T.meta_var(self.block)
        self.counter.start()
        while block.exists:
            block.begin = block.number
            self.q.consumer_wait(self.q_state())  # also if no split has anything to see: a block may not end before
            while block.number < block.end:
                self.compute()
                self.end_split()
                block.number = block.number + 1
            self.end_run()
            if block.is_at_end:
                self.q.consumer_release(self.q_state(), self.lane)
                block.enter_next()

    @T.inline
    def compute(self):
        """A split."""
        walk = self.walk()
        if walk.tiles.begin < walk.tiles.end:
            self.start()
            self.masked_steps(walk, 1, walk.steps)
            v = T.meta_var(self.v_state())
            self.issue_pv(v)
            self.finish_pv(v)
        else:
            self.see_nothing()


@T.inline
def _bring_queries(block: RunBlock, pipeline: Pipeline, descriptor, lacks_queries):
    """The producer's thread: bring the queries of a row tile if they aren't there or on their way."""
    if lacks_queries != 0:
        pipeline.producer_acquire(pipeline.state(block.tile))
        pipeline.load(pipeline.state(block.tile), descriptor, block.queries(0))
        lacks_queries = 0


@T.inline
def _fetch(block: RunBlock, pipelines, maps, begun):
    """The producer's thread: fill the pipelines with the tiles of the block's splits, but for the ``begun`` first, and
    with the queries of its row tiles but for the first."""
    q_pipeline, k_pipeline, v_pipeline = T.meta_var(pipelines)
    n: T.int32 = begun
    skipped: T.int32 = begun
    lacks_queries: T.int32 = 0

    while block.exists:
        walk = KeyWalk(block, 0, block.config.block_m)
        if walk.tiles.begin < walk.tiles.end:
            for i in T.serial(skipped, walk.steps):
                # K before its stage of V is waited for: the consumers release V(n-1) when K(n+1) is there.  Queries
                # after K: they are waited for until the consumers have done with the row tile before.
                at = T.meta_var(block.keys(walk.key_first(i)))
                k_pipeline.producer_acquire(k_pipeline.state(n))
                k_pipeline.load(k_pipeline.state(n), maps[1], at)
                _bring_queries(block, q_pipeline, maps[0], lacks_queries)
                v_pipeline.producer_acquire(v_pipeline.state(n))
                v_pipeline.load(v_pipeline.state(n), maps[2], at)
                n = n + 1
        skipped = 0
        block.number = block.number + 1
        if block.is_at_end:
            _bring_queries(block, q_pipeline, maps[0], lacks_queries)
            block.enter_next()
            lacks_queries = T.Cast("int32", block.exists)
    _bring_queries(block, q_pipeline, maps[0], lacks_queries)


def compute_runs(pattern: Pattern, config, traversal: Traversal, parameters: dict):
    """``(q, k, v, o_partial, sums_partial, arrivals, o, lse, softmax_scale, split_length, share, kept)``, without the
    parameters."""

    @T.prim_func(check_well_formed=False)
    def attention(
        q: T.handle,
        k: T.handle,
        v: T.handle,
        o_partial: T.handle,
        sums_partial: T.handle,
        arrivals: T.handle,
        o: T.handle,
        lse: T.handle,
        softmax_scale: T.float32,
        split_length: T.int32,
        share: T.int32,
        kept: T.int32,
    ):
        geometry = Geometry(pattern, traversal, (q, k, v, o, lse), softmax_scale, parameters, ALIGNMENT)
        states = PartialStates((o_partial, sums_partial, arrivals), pattern.head_dim_v)
        rows = Rows(config, geometry)
        scheduler = RunScheduler(geometry, rows, config, states.splits, split_length, share, kept)
        # 1. Descriptors of the tensors, made on the host.
        q_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(encode_queries(q_map, geometry.q, rows, config.block_m))
        k_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(encode_keys(k_map, geometry.k, config.block_n))
        v_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(encode_keys(v_map, geometry.v, config.block_n))
        # 2. Blocks, warps, lanes.
        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": config.blocks_per_sm})
        x, y = T.cta_id(scheduler.grid())
        warp = T.warp_id([config.threads // 32])
        lane = T.lane_id([32])
        T.thread_id([config.threads])
        block = RunBlock(pattern, config, geometry, rows, scheduler, DenseBoxes(geometry, rows), (x, y))
        # 3. Shared memory: queries, pipelines of keys and values, barriers.
        pool = SMEMPool()
        q_pipeline = Pipeline(pool, 1, panels(pattern.head_dim), config.block_m, pattern.dtype)
        k_pipeline = Pipeline(pool, config.num_stages, panels(pattern.head_dim), config.block_n, pattern.dtype)
        v_pipeline = Pipeline(pool, config.num_stages, panels(pattern.head_dim_v), config.block_n, pattern.dtype)
        memory = memory_of_states(pool, pattern)
        q_pipeline.add_barriers(pool)
        k_pipeline.add_barriers(pool)
        v_pipeline.add_barriers(pool)
        pool.commit()
        pipelines = T.meta_var((q_pipeline, k_pipeline, v_pipeline))
        begun: T.int32 = 0
        if warp == WARPS:
            walk = KeyWalk(block, 0, config.block_m)
            begun = T.Select(walk.tiles.begin < walk.tiles.end, T.min(walk.steps, config.num_stages), 0)
            if T.cuda.elect_sync():
                q_pipeline.init(consumer_arrivals(1))
                k_pipeline.init(consumer_arrivals(1))
                v_pipeline.init(consumer_arrivals(1))
                T.ptx.fence.mbarrier_init.release.cluster()
                q_pipeline.load(q_pipeline.state(0), q_map, block.queries(0))
                for i in T.unroll(config.num_stages):
                    if i < begun:
                        first = T.meta_var(block.keys(walk.key_first(i)))
                        k_pipeline.load(k_pipeline.state(i), k_map, first)
                        v_pipeline.load(v_pipeline.state(i), v_map, first)
        T.cuda.cta_sync()
        # 4. Tasks.
        if warp == WARPS:
            if T.cuda.elect_sync():
                _fetch(block, pipelines, (q_map, k_map, v_map), begun)
                T.ptx.griddepcontrol.wait()  # this launch isn't to end before the one that clears counters
        else:
            consumer = SharedRunConsumer(pattern, config, block, pipelines, states, memory, warp, lane)
            consumer.run()

    return attention
