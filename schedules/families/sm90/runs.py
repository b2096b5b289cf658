"""Decoding on Hopper in runs: a block computes several splits of the keys of its rows, one after the other.

As many as leave the machine's places for blocks filled: few sequences have a split a block, many of them a block for
all of their keys.  Every split is computed for itself, from a reference of its own, and leaves a state in shared
memory; at the end of the run the states of a row's first run are folded from left to right
(:mod:`schedules.tile.states`), so that a sequence has the same bits however many splits a run has.  Where the first
run is all, it writes the row.  Other runs leave the states of their splits to the second launch, which folds them to
that of the first one.
"""

from __future__ import annotations

from tvm.backend.cuda.lang import SMEMPool
from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.sm90.barriers import WARPGROUP_THREADS, WARPS, NamedBarriers, consumer_arrivals
from schedules.families.sm90.boxes import DenseBoxes
from schedules.families.sm90.config import WARPGROUP_ROWS, panels
from schedules.families.sm90.consumer import Consumer
from schedules.families.sm90.packing import Rows
from schedules.families.sm90.pipeline import Pipeline
from schedules.families.sm90.split_scheduler import ALIGNMENT, SplitScheduler
from schedules.families.sm90.tma import encode_keys, encode_queries
from schedules.families.sm90.work_tile import Block, KeyWalk
from schedules.tile.dtypes import element_type
from schedules.tile.geometry import Geometry, flat, local, wide
from schedules.tile.softmax import LOWEST
from schedules.tile.states import Fold, PartialStates, inverse, log_sum_exp
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
        return at.number * self.tiles, (at.number + 1) * self.tiles


@T.meta_class
class RunBlock(Block):
    """A block, as the main loop asks of it: ``number`` is the split that it has come to, of those up to ``end``."""

    def __init__(self, pattern: Pattern, config, geometry: Geometry, rows: Rows, scheduler: RunScheduler, boxes, at):
        Block.__init__(self, pattern, config, geometry, rows, scheduler, boxes, at)
        self.begin = local(scheduler.split(at) * scheduler.run)
        self.number = local(self.begin)
        self.place = at
        self.at = self

    @property
    def end(self):
        """The split after the run's last one; computed where it is asked for, which costs no register."""
        scheduler = self.scheduler
        return T.min((scheduler.split(self.place) + 1) * scheduler.run, scheduler.all_splits)

    @property
    def is_alone(self):
        """Whether runs are one split of several each, whose state is that of the run."""
        return T.And(self.scheduler.run == 1, self.scheduler.all_splits > 1)

    @property
    def count(self):
        """Rows of the block's work tile."""
        return T.min(self.rows.count - self.row_first, WARPGROUP_ROWS)


def memory_of_states(pool, pattern: Pattern):
    """Shared memory for the states of a run: outputs ``(rows, columns)``, and ``(rows, 2)`` references and sums.

    Rows are those of its splits together, ``WARPGROUP_ROWS`` at most.
    """
    outputs = pool.alloc((WARPGROUP_ROWS, pattern.head_dim_v), "float32", align=16)
    return outputs, pool.alloc((WARPGROUP_ROWS, 2), "float32", align=8)


def bytes_of_states(pattern: Pattern) -> int:
    """How much that is."""
    return WARPGROUP_ROWS * (pattern.head_dim_v + 2) * 4


@T.meta_class
class RunConsumer(Consumer):
    """The consumer warpgroup of a run: every step masks and takes the maximum."""

    def __init__(self, pattern: Pattern, config, block: RunBlock, pipelines, states: PartialStates, memory, warp, lane):
        Consumer.__init__(self, pattern, config, block, pipelines, None, 0, warp, lane)
        self.states_o, self.states_sums = flat(states.o), flat(states.sums)
        self.columns, self.parts = states.columns, states.parts
        self.o_memory, self.sums_memory = memory
        self.fold = Fold(1)
        self.peak, self.total, self.next_peak, self.next_total = (T.alloc_local([1], "float32") for _ in range(4))
        self.values = T.alloc_local([2], "float32")

    @T.inline
    def run(self):
        """Compute the block's splits."""
        block = T.meta_var(self.block)
        self.counter.start()
        self.q.consumer_wait(self.q_state())  # also if no split has anything to see: a block may not end before
        while block.number < block.end:
            walk = self.walk()
            if walk.tiles.begin < walk.tiles.end:
                self.start()
                self.masked_steps(walk, 1, walk.steps)
                v = T.meta_var(self.v_state())
                self.issue_pv(v)
                self.finish_pv(v)
            else:
                self.softmax.reset()
            self.finished.keep(self.softmax)
            if block.is_alone:
                self.leave_state()
            else:
                self.keep_state()
            block.number = block.number + 1
        if T.Not(block.is_alone):
            barriers = T.meta_var(NamedBarriers(1))
            barriers.queries_read(0)
            self.write()

    @T.inline
    def first_softmax(self, walk, k):
        """Probabilities of a split's first step, with the exact maximum."""
        column0 = T.meta_var(self._column0(walk.key_first(0)))
        self.k.consumer_release(k, self.lane)
        self.softmax.reset()
        self.softmax.scores(self.acc_s, self._row0(), column0, True)
        self.softmax.track(self.acc_s, 0.0)
        self.softmax.probabilities(self.acc_s, self.softmax.scale)

    @T.inline
    def leave_state(self):
        """Leave what a split has left to the second launch."""
        block, geometry, fragment = T.meta_var((self.block, self.block.geometry, self.softmax.fragment))
        column: T.int32 = fragment.column(self.lane)
        for r in T.unroll(2):
            row: T.int32 = block.row_first + self.row + fragment.row(self.lane) + r * fragment.row_step
            position = T.meta_var(block.rows.position(row))
            if T.And(row < block.rows.count, position < geometry.seqlen_q):
                number: T.int64 = geometry.lse_offset(block.batch, block.head + block.rows.head(row), position)
                index: T.int64 = number * wide(self.parts) + wide(block.begin)
                if column == 0:
                    T.ptx["st.global.v2.f32"](
                        self.states_sums.ptr_to([index * 2]), self.finished.row_max[r], self.finished.row_sum[r]
                    )
                for g in T.unroll(self.outputs // 4):
                    i = T.meta_var(g * 4 + r * 2)
                    T.ptx["st.global.v2.f32"](
                        self.states_o.ptr_to([index * self.columns + wide(column + fragment.output_column(g))]),
                        self.acc_o[i],
                        self.acc_o[i + 1],
                    )

    @T.inline
    def keep_state(self):
        """Keep what a split has left in shared memory."""
        block, fragment = T.meta_var((self.block, self.softmax.fragment))
        column: T.int32 = fragment.column(self.lane)
        for r in T.unroll(2):
            row: T.int32 = self.row + fragment.row(self.lane) + r * fragment.row_step
            if row < block.count:
                at: T.int32 = (block.number - block.begin) * block.count + row
                if column == 0:
                    self.sums_memory[at, 0] = self.finished.row_max[r]
                    self.sums_memory[at, 1] = self.finished.row_sum[r]
                for g in T.unroll(self.outputs // 4):
                    i = T.meta_var(g * 4 + r * 2)
                    for e in T.unroll(2):
                        self.o_memory[at, column + fragment.output_column(g) + e] = self.acc_o[i + e]

    @T.inline
    def write(self):
        """Fold the states and write the rows or their state, if it is the first run; else write the states.

        A thread has two columns of a row at a time.
        """
        block, geometry = T.meta_var((self.block, self.block.geometry))
        pairs = T.meta_var(self.columns // 2)
        thread: T.int32 = self.warp * 32 + self.lane
        kept: T.int32 = block.end - block.begin
        for x in T.serial(T.truncdiv(block.count * pairs + (WARPGROUP_THREADS - 1), WARPGROUP_THREADS)):
            item: T.int32 = x * WARPGROUP_THREADS + thread
            row: T.int32 = T.truncdiv(item, pairs)
            column: T.int32 = (item - row * pairs) * 2
            position = T.meta_var(block.rows.position(block.row_first + row))
            head = T.meta_var(block.head + block.rows.head(block.row_first + row))
            if T.And(row < block.count, position < geometry.seqlen_q):
                number: T.int64 = geometry.lse_offset(block.batch, head, position)
                if block.begin == 0:
                    self.fold_row(kept, row, column)
                    if block.end == block.scheduler.all_splits:
                        self.write_output(number, head, position, column)
                    else:
                        self.write_state(number, 0, column, self.values, self.peak[0], self.total[0])
                else:
                    for j in T.serial(kept):
                        at: T.int32 = j * block.count + row
                        for e in T.unroll(2):
                            self.values[e] = self.o_memory[at, column + e]
                        sums = T.meta_var((self.sums_memory[at, 0], self.sums_memory[at, 1]))
                        self.write_state(number, block.begin + j, column, self.values, *sums)

    @T.inline
    def fold_row(self, kept, row, column):
        """Fold two columns of the states of a row: to ``values``, ``peak`` and ``total``."""
        self.peak[0] = T.float32(LOWEST)
        self.total[0] = T.float32(0)
        for e in T.unroll(2):
            self.values[e] = T.float32(0)
        for j in T.serial(kept):
            at: T.int32 = j * self.block.count + row
            self.next_peak[0] = self.sums_memory[at, 0]
            self.next_total[0] = self.sums_memory[at, 1]
            self.fold.begin(self.peak, self.total, self.next_peak, self.next_total)
            for e in T.unroll(2):
                self.values[e] = self.fold.folded(0, self.values[e], self.o_memory[at, column + e])

    @T.inline
    def write_state(self, row, part, column, values, peak, total):
        """Leave two columns of a state to the second launch."""
        index: T.int64 = row * wide(self.parts) + wide(part)
        T.ptx["st.global.v2.f32"](self.states_o.ptr_to([index * self.columns + wide(column)]), values[0], values[1])
        if column == 0:
            T.ptx["st.global.v2.f32"](self.states_sums.ptr_to([index * 2]), peak, total)

    @T.inline
    def write_output(self, row, head, position, column):
        """Write two columns of the output of a row that the run has whole, and its log-sum-exp."""
        block, geometry = T.meta_var((self.block, self.block.geometry))
        to, lse = T.meta_var((flat(geometry.o.buffer), flat(geometry.lse)))
        pack = T.meta_var(element_type(self.pattern.dtype).pack)
        packed = T.alloc_local([1], "uint32")
        factor: T.float32 = inverse(self.total[0])
        if T.And(geometry.lse_wanted, column == 0):
            lse[row] = log_sum_exp(self.peak[0], self.total[0])
        T.ptx[pack](packed[0], self.values[1] * factor, self.values[0] * factor)
        if column < geometry.head_dim_v:
            T.ptx["st.global.b32"](to.ptr_to([geometry.o.offset(block.batch, head, position, column)]), packed[0])


@T.inline
def _fetch(block: RunBlock, k_pipeline: Pipeline, v_pipeline: Pipeline, maps, begun):
    """The producer's thread: fill both pipelines with the tiles of the block's splits, but for the ``begun`` first."""
    n: T.int32 = begun
    skipped: T.int32 = begun
    while block.number < block.end:
        walk = KeyWalk(block, 0, block.config.block_m)
        if walk.tiles.begin < walk.tiles.end:
            for i in T.serial(skipped, walk.steps):
                # K before its stage of V is waited for: the consumers release V(n-1) when K(n+1) is there.
                at = T.meta_var(block.keys(walk.key_first(i)))
                k_pipeline.producer_acquire(k_pipeline.state(n))
                k_pipeline.load(k_pipeline.state(n), maps[0], at)
                v_pipeline.producer_acquire(v_pipeline.state(n))
                v_pipeline.load(v_pipeline.state(n), maps[1], at)
                n = n + 1
        skipped = 0
        block.number = block.number + 1


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
        if warp == WARPS:
            if T.cuda.elect_sync():
                _fetch(block, k_pipeline, v_pipeline, (k_map, v_map), begun)
        else:
            consumer = RunConsumer(pattern, config, block, pipelines, states, memory, warp, lane)
            consumer.run()

    return attention
