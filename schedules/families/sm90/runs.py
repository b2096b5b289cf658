"""Decoding on Hopper in runs: a block computes several splits of the keys of its rows, one after the other.

As many as leave the machine's places for blocks filled: few sequences have a split a block, many of them a block for
all of their keys.  Every split is computed for itself, from a reference of its own, and states are folded from left to
right (:mod:`schedules.tile.states`), so that a sequence has the same bits however many splits a run has.  The first run
of a row folds what it computes in registers, and where that is all, it writes the row.  Others leave a state of each
split to the second launch, which folds them to the first run's.

The first launch for batches would be that of :mod:`schedules.families.sm90.decode` but for what a block costs that
begins, ends and writes for each split: on an H200 4 to 11% (docs/hopper.md, "Decoding").
"""

from __future__ import annotations

from tvm.backend.cuda.lang import SMEMPool
from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.sm90.barriers import WARPS, consumer_arrivals
from schedules.families.sm90.boxes import DenseBoxes
from schedules.families.sm90.config import panels
from schedules.families.sm90.folding import FoldingConsumer, memory_aside
from schedules.families.sm90.packing import Rows
from schedules.families.sm90.pipeline import Pipeline
from schedules.families.sm90.split_scheduler import ALIGNMENT, SplitScheduler
from schedules.families.sm90.tma import encode_keys, encode_queries
from schedules.families.sm90.work_tile import Block, KeyWalk
from schedules.tile.geometry import Geometry, local
from schedules.tile.states import PartialStates
from schedules.tile.tile_scheduler import Traversal, ceildiv


@T.meta_class
class RunScheduler(SplitScheduler):
    """A block for each run of splits, ``block_m`` rows of a head, and batch.

    Parameters
    ----------
    splits: how many there are of a row's keys, ``run`` of them in a run.
    """

    def __init__(self, geometry: Geometry, rows: Rows, config, traversal: Traversal, splits, split_length, run):
        self.run, self.all_splits = run, splits
        runs = T.bind(ceildiv(splits, run))
        SplitScheduler.__init__(self, geometry, rows, config, traversal, runs, split_length)
        self.seq_outer = True  # of either layout: the run is an index of its own then, and takes no register

    def key_tiles(self, at):
        """First and end of the tiles of keys of the split that a block has come to."""
        return at.ahead * self.tiles, (at.ahead + 1) * self.tiles


@T.meta_class
class RunBlock(Block):
    """A block, as the main loop asks of it: ``ahead`` is the split that it has come to, of those up to ``end``, and
    ``number`` the one that is finished next."""

    def __init__(self, pattern: Pattern, config, geometry: Geometry, rows: Rows, scheduler: RunScheduler, boxes, at):
        Block.__init__(self, pattern, config, geometry, rows, scheduler, boxes, at)
        first = scheduler.split(at) * scheduler.run
        self.number, self.ahead = local(first), local(first)
        self.place = at
        self.at = self

    @property
    def end(self):
        """The split after the run's last one; computed where it is asked for, which costs no register."""
        scheduler = self.scheduler
        return T.min((scheduler.split(self.place) + 1) * scheduler.run, scheduler.all_splits)

    @property
    def folds(self):
        """Whether it is the first run, not 0 then."""
        return T.Cast("int32", self.end <= self.scheduler.run)

    @property
    def is_whole(self):
        """Whether the run has all splits; of the first run."""
        return self.end == self.scheduler.all_splits


@T.meta_class
class RunConsumer(FoldingConsumer):
    """The consumer warpgroup of a run."""

    @T.inline
    def run(self):
        """Compute the block's splits."""
        block = T.meta_var(self.block)
        self.counter.start()
        self.q.consumer_wait(self.q_state())  # also if no split has anything to see: a block may not end before
        while block.ahead < block.end:
            walk = self.walk()
            if walk.tiles.begin < walk.tiles.end:
                if block.number < block.ahead:
                    self.change_split(walk)
                else:
                    self.start()
                self.steps(walk)
            else:
                if block.number < block.ahead:
                    self.end_split()
                self.nothing_seen()
                self.leave()
            block.ahead = block.ahead + 1
        if block.number < block.ahead:
            self.end_split()

    @T.inline
    def leave(self):
        """Fold or write what a finished split has left, and go on to the next one."""
        block = T.meta_var(self.block)
        if block.folds != 0:
            if block.number > 0:
                self.put_together()
            if block.number + 1 < block.end:
                self.set_aside()
            else:
                if block.is_whole:
                    self.write_rows()
                else:
                    self.write_states()
        else:
            self.write_states()
        block.number = block.number + 1

    @T.inline
    def each_row(self, write):
        """``write(r, head, position)`` for the rows of this lane that there are."""
        block, fragment = T.meta_var((self.block, self.softmax.fragment))
        for r in T.unroll(2):
            row: T.int32 = block.row_first + self._row_of_lane() + r * fragment.row_step
            position = T.meta_var(block.rows.position(row))
            if T.And(row < block.rows.count, position < block.geometry.seqlen_q):
                write(r, block.head + block.rows.head(row), position)


@T.inline
def _fetch(block: RunBlock, pipeline: Pipeline, descriptor, begun):
    """A producer's thread: fill the pipeline of K or of V with the tiles of the block's splits after ``begun`` ones."""
    n: T.int32 = begun
    skipped: T.int32 = begun
    while block.ahead < block.end:
        walk = KeyWalk(block, 0, block.config.block_m)
        if walk.tiles.begin < walk.tiles.end:
            for i in T.serial(skipped, walk.steps):
                pipeline.producer_acquire(pipeline.state(n))
                pipeline.load(pipeline.state(n), descriptor, block.keys(walk.key_first(i)))
                n = n + 1
        skipped = 0
        block.ahead = block.ahead + 1


def compute_runs(pattern: Pattern, config, traversal: Traversal, parameters: dict):
    """``(q, k, v, o_partial, sums_partial, o, lse, softmax_scale, split_length, run)``, without the parameters."""

    @T.prim_func(check_well_formed=False)
    def attention(
        q: T.handle,
        k: T.handle,
        v: T.handle,
        o_partial: T.handle,
        sums_partial: T.handle,
        o: T.handle,
        lse: T.handle,
        softmax_scale: T.float32,
        split_length: T.int32,
        run: T.int32,
    ):
        geometry = Geometry(pattern, traversal, (q, k, v, o, lse), softmax_scale, parameters, ALIGNMENT)
        states = PartialStates((o_partial, sums_partial), pattern.head_dim_v)
        rows = Rows(config, geometry)
        scheduler = RunScheduler(geometry, rows, config, traversal, states.parts, split_length, run)
        # 1. Descriptors of the tensors, made on the host.
        q_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(encode_queries(q_map, geometry.q, rows, config.block_m))
        k_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(encode_keys(k_map, geometry.k, config.block_n))
        v_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(encode_keys(v_map, geometry.v, config.block_n))
        # 2. Blocks, warps, lanes; the launch that folds may begin when every block has come here.
        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": config.blocks_per_sm})
        x, y, z = T.cta_id(scheduler.grid())
        warp = T.warp_id([config.threads // 32])
        lane = T.lane_id([32])
        T.thread_id([config.threads])
        T.ptx.griddepcontrol.launch_dependents()
        block = RunBlock(pattern, config, geometry, rows, scheduler, DenseBoxes(geometry, rows), (x, y, z))
        # 3. Shared memory: queries, pipelines of keys and values, barriers.
        pool = SMEMPool()
        q_pipeline = Pipeline(pool, 1, panels(pattern.head_dim), config.block_m, pattern.dtype)
        k_pipeline = Pipeline(pool, config.num_stages, panels(pattern.head_dim), config.block_n, pattern.dtype)
        v_pipeline = Pipeline(pool, config.num_stages, panels(pattern.head_dim_v), config.block_n, pattern.dtype)
        aside = memory_aside(pool, pattern)
        q_pipeline.add_barriers(pool)
        k_pipeline.add_barriers(pool)
        v_pipeline.add_barriers(pool)
        pool.commit()
        pipelines = T.meta_var((q_pipeline, k_pipeline, v_pipeline))
        begun: T.int32 = 0
        if warp >= WARPS:
            walk = KeyWalk(block, 0, config.block_m)
            begun = T.Select(walk.tiles.begin < walk.tiles.end, T.min(walk.steps, config.num_stages), 0)
            if warp == WARPS:
                if T.cuda.elect_sync():
                    q_pipeline.init(1)
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
        if warp >= WARPS:
            if warp == WARPS:
                if T.cuda.elect_sync():
                    _fetch(block, k_pipeline, k_map, begun)
            else:
                if T.cuda.elect_sync():
                    _fetch(block, v_pipeline, v_map, begun)
        else:
            consumer = RunConsumer(pattern, config, block, pipelines, states, aside, warp, lane)
            consumer.run()

    return attention
