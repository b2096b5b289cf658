"""Decoding on Hopper in runs: a block computes several splits of the keys of its rows, one after the other.

Every split is computed for itself, from a reference of its own, and leaves a state in shared memory.  The blocks that
have a row's runs are a cluster, which at the end folds these states from left to right (:mod:`schedules.tile.states`),
each warp those of some rows and columns, whichever blocks hold them.  So a sequence has the same bits however many
splits a run has, and one launch is all.

Where clusters would leave much of the machine empty, a row's runs are *spread*: as many as there are places for, in
blocks that leave the states in global memory, for a second launch that folds them in the same order
(:mod:`schedules.tile.fold`).

Where there are many sequences, a block has all splits of a work tile, and several of these, one after the other: keys
of the next are on their way while it folds, and all blocks run at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.backend.cuda.lang import SMEMPool
from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.sm90.barriers import WARPS, NamedBarriers, consumer_arrivals
from schedules.families.sm90.boxes import DenseBoxes
from schedules.families.sm90.config import WARPGROUP_ROWS, panels
from schedules.families.sm90.packing import Rows
from schedules.families.sm90.pipeline import Pipeline
from schedules.families.sm90.split_scheduler import ALIGNMENT, RunScheduler
from schedules.families.sm90.states import StateConsumer, StatesOfBlock, memory_of_states
from schedules.families.sm90.tma import encode_keys, encode_queries, policy_of_keys
from schedules.families.sm90.work_tile import Block, KeyWalk
from schedules.tile.fragment import M16N8
from schedules.tile.geometry import Geometry, local, wide
from schedules.tile.states import COLUMNS, WARP_COLUMNS, PartialStates
from schedules.tile.static import static
from schedules.tile.tile_scheduler import Traversal, ceildiv

#: Rows of a row tile up to which they are in the first half of a warp's tile, which a kernel of their own computes.
FEW_ROWS = M16N8.row_step


@dataclass(frozen=True)
class Place:
    """Where a work tile is: first query head, head of keys, batch and first row."""

    head: Expr
    kv_head: Expr
    batch: Expr
    row_first: Expr


@T.meta_class
class RunBlock(Block):
    """A block, as the main loop asks of it: ``number`` is the split that it has come to, of those up to ``end``."""

    def __init__(self, pattern: Pattern, config, geometry: Geometry, rows: Rows, scheduler: RunScheduler, boxes, at):
        Block.__init__(self, pattern, config, geometry, rows, scheduler, boxes, at)
        self.begin = local(at[1] * scheduler.run)
        self.number = local(self.begin)
        self.place = at
        self.unit = None if scheduler.in_clusters else local(at[0])
        self.at = self

    @property
    def run(self):
        """Which run of its rows the block has; in a cluster, its rank."""
        return self.place[1]

    @property
    def exists(self):
        """Without clusters: whether the block has come to a work tile, and not to its end."""
        return self.unit < self.scheduler.units

    def has_later(self, n: int):
        """Whether there is a work tile ``n`` after this one."""
        return self.unit + n * self.scheduler.blocks < self.scheduler.units

    def later(self, n: int) -> Place:
        """Where that is."""
        scheduler = self.scheduler
        place, head, batch = scheduler.work_tile((self.unit + n * scheduler.blocks,), 0)
        return Place(head, T.truncdiv(head, self.rows.group), batch, scheduler.first_row(place, 0))

    @T.inline
    def advance(self):
        """Go on to the work tile after this one, if there is one."""
        if self.has_later(1):
            where = T.meta_var(self.later(1))
            self.head = where.head
            self.kv_head = where.kv_head
            self.batch = where.batch
            self.row_first = where.row_first
            self.parameters.read(self.batch, self.head)
        self.number = self.begin
        self.tile = self.tile + 1
        self.unit = self.unit + self.scheduler.blocks

    @property
    def is_alone(self):
        """Whether runs are spread and one split each, whose state can go where it belongs straight from registers."""
        return T.And(self.scheduler.spread != 0, self.scheduler.run == 1)

    @property
    def end(self):
        """The split after the run's last one; computed where it is asked for, which costs no register."""
        return T.min((self.run + 1) * self.scheduler.run, self.scheduler.splits)

    @property
    def count(self):
        """Rows of the block's work tile."""
        return T.min(self.rows.count - self.row_first, WARPGROUP_ROWS)

    @property
    def kept(self):
        """How many splits the block has come to before this one."""
        return self.number - self.begin

    @property
    def run_length(self):
        """Splits of a run."""
        return self.scheduler.run

    @property
    def folded(self):
        """Splits of the keys."""
        return self.scheduler.splits

    @property
    def seqlen_q(self):
        """Queries of a head."""
        return self.geometry.seqlen_q

    def place_of(self, position):
        """Where a query is in q and o."""
        return position

    def has_row(self, row):
        """Whether there is such a row."""
        return T.And(row < self.rows.count, self.rows.position(row) < self.geometry.seqlen_q)

    def number_of_row(self, row):
        """Number of a row among all of the output, int64."""
        return self.geometry.lse_offset(self.batch, self.head + self.rows.head(row), self.rows.position(row))


@T.meta_class
class RunConsumer(StateConsumer):
    """The consumer warpgroup of a run: every step masks and takes the maximum."""

    def __init__(self, few: bool, *args):
        StateConsumer.__init__(self, *args)
        self.few = few

    @T.inline
    def run(self):
        """Compute the block's work tiles."""
        self.counter.start()
        self.clear_weights()
        self.compute()

    @T.inline
    def compute(self):
        """Compute the block's splits of a work tile."""
        block = T.meta_var(self.block)
        self.q.consumer_wait(self.q_state())  # also if no split has anything to see: a block may not end before
        while block.number < block.end:
            walk = self.walk()
            if walk.tiles.begin < walk.tiles.end:
                self.start()
                walk.masked_steps(1, walk.steps, self.step)
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
        if block.scheduler.spread == 0:
            self.fold()
        else:
            if T.Not(block.is_alone):
                self.leave_states()

    @T.inline
    def leave_states(self):
        """Leave the states of the run's splits, which are in shared memory, to the second launch.

        A warp has a state at a time, a lane two columns, and neighbours write neighbours: with the states of several
        splits straight from registers 8 x 8k keys took 2% longer.
        """
        block, geometry = T.meta_var((self.block, self.block.geometry))
        NamedBarriers(1).queries_read(0)
        kept: T.int32 = (block.end - block.begin) * block.count
        for x in T.serial(ceildiv(kept, WARPS)):
            at: T.int32 = x * WARPS + self.warp
            split: T.int32 = T.truncdiv(at, block.count)
            row: T.int32 = block.row_first + at - split * block.count
            position = T.meta_var(block.rows.position(row))
            if T.And(at < kept, position < geometry.seqlen_q):
                number: T.int64 = geometry.lse_offset(block.batch, block.head + block.rows.head(row), position)
                index: T.int64 = number * wide(self.parts) + wide(block.begin + split)
                for share in T.unroll(-(-self.columns // WARP_COLUMNS)):
                    column: T.int32 = share * WARP_COLUMNS + self.lane * COLUMNS
                    if column < self.columns:
                        T.ptx["st.global.v2.f32"](
                            self.states_o.ptr_to([index * self.columns + wide(column)]),
                            self.memory[at, column],
                            self.memory[at, column + 1],
                        )
                if self.lane == 0:
                    T.ptx["st.global.v2.f32"](
                        self.states_sums.ptr_to([index * 2]),
                        self.memory[at, self.columns],
                        self.memory[at, self.columns + 1],
                    )


@T.inline
def _fetch_queries(block: RunBlock, q_pipeline: Pipeline, q_map, n: int):
    """One thread: fetch the queries of the work tile ``n`` after this one, if there is one; their stage is empty."""
    if block.has_later(n):
        q_pipeline.load(q_pipeline.state(block.tile + n), q_map, block.boxes.queries(block.later(n), 0))


@T.meta_class
class SeveralConsumer(RunConsumer):
    """The same without clusters, of several work tiles."""

    kept_states = StatesOfBlock
    are_near = True

    def __init__(self, q_map, *args):
        RunConsumer.__init__(self, True, *args)
        self.q_map = q_map

    @T.inline
    def run(self):
        self.counter.start()
        self.clear_weights()
        while self.block.exists:
            self.compute()
            self.block.advance()

    @T.inline
    def await_states(self):
        NamedBarriers(1).queries_read(0)
        if self.warp == 0:
            if T.cuda.elect_sync():  # no warp reads those of this work tile any more
                _fetch_queries(self.block, self.q, self.q_map, self.q.stages)

    @T.inline
    def let_go(self):
        NamedBarriers(1).queries_read(0)


@T.inline
def _fetch(block: RunBlock, k_pipeline: Pipeline, v_pipeline: Pipeline, maps, n, skipped, policy):
    """Fill both pipelines with the tiles of the block's splits, but for the ``skipped`` first, under a policy of the L2
    cache; ``n`` counts the tiles of all work tiles."""
    while block.number < block.end:
        walk = KeyWalk(block, 0, block.config.block_m)
        if walk.tiles.begin < walk.tiles.end:
            for i in T.serial(skipped, walk.steps):
                # K before its stage of V is waited for: the consumers release V(n-1) when K(n+1) is there.
                at = T.meta_var(block.keys(walk.key_first(i)))
                k_pipeline.producer_acquire(k_pipeline.state(n))
                k_pipeline.load_by(k_pipeline.state(n), maps[0], at, policy)
                v_pipeline.producer_acquire(v_pipeline.state(n))
                v_pipeline.load_by(v_pipeline.state(n), maps[1], at, policy)
                n = n + 1
        skipped = 0
        block.number = block.number + 1


@T.inline
def _fetch_all(block: RunBlock, k_pipeline: Pipeline, v_pipeline: Pipeline, maps, begun, policy):
    """The producer's thread: ``_fetch`` for each of the block's work tiles."""
    n: T.int32 = begun
    skipped: T.int32 = begun
    if static(block.scheduler.in_clusters):
        _fetch(block, k_pipeline, v_pipeline, maps, n, skipped, policy)
    else:
        while block.exists:
            _fetch(block, k_pipeline, v_pipeline, maps, n, skipped, policy)
            block.advance()


def compute_runs(
    pattern: Pattern,
    config,
    traversal: Traversal,
    few: bool,
    parameters: dict,
    in_clusters: bool = True,
    query_stages: int = 1,
):
    """``(q, k, v, o_partial, sums_partial, o, lse, softmax_scale, split_length, run, spread, read_once, chosen)``,
    parameters not yet: the kernel of ``few`` rows, up to ``FEW_ROWS``, or that of more; ``chosen`` says that it is this
    one, ``read_once`` that keys go first from the L2 cache.  Without clusters it is that of few rows, and ``chosen``
    how many work tiles a block has, of which ``query_stages`` have their queries there."""

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
        spread: T.int32,
        read_once: T.int32,
        chosen: T.int32,
    ):
        geometry = Geometry(pattern, traversal, (q, k, v, o, lse), softmax_scale, parameters, ALIGNMENT)
        states = PartialStates((o_partial, sums_partial), pattern.head_dim_v)
        rows = Rows(config, geometry)
        several = T.meta_var(None if in_clusters else chosen)
        scheduler = RunScheduler(geometry, rows, config, states.parts, split_length, run, spread, several)
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
        if scheduler.in_clusters:
            _x, _rank, _z = T.cta_id_in_cluster(scheduler.cluster())
        x, y, z = T.cta_id(scheduler.grid())
        warp = T.warp_id([config.threads // 32])
        lane = T.lane_id([32])
        T.thread_id([config.threads])
        T.ptx.griddepcontrol.launch_dependents()
        block = RunBlock(pattern, config, geometry, rows, scheduler, DenseBoxes(geometry, rows), (x, y, z))
        # 3. Shared memory: queries, pipelines of keys and values, barriers.
        pool = SMEMPool()
        q_pipeline = Pipeline(pool, query_stages, panels(pattern.head_dim), config.block_m, pattern.dtype)
        k_pipeline = Pipeline(pool, config.num_stages, panels(pattern.head_dim), config.block_n, pattern.dtype)
        v_pipeline = Pipeline(pool, config.num_stages, panels(pattern.head_dim_v), config.block_n, pattern.dtype)
        memory = memory_of_states(pool, pattern)
        q_pipeline.add_barriers(pool)
        k_pipeline.add_barriers(pool)
        v_pipeline.add_barriers(pool)
        pool.commit()
        pipelines = T.meta_var((q_pipeline, k_pipeline, v_pipeline))
        policy: T.uint64 = policy_of_keys(read_once)
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
                        k_pipeline.load_by(k_pipeline.state(i), k_map, first, policy)
                        v_pipeline.load_by(v_pipeline.state(i), v_map, first, policy)
                if static(q_pipeline.stages > 1):
                    _fetch_queries(block, q_pipeline, q_map, 1)
        T.cuda.cta_sync()
        # 4. Tasks.
        if warp == WARPS:
            if T.cuda.elect_sync():
                _fetch_all(block, k_pipeline, v_pipeline, (k_map, v_map), begun, policy)
        else:
            of_all = T.meta_var((pattern, config, block, pipelines, states, memory, warp, lane))
            consumer = T.meta_var(RunConsumer(few, *of_all) if in_clusters else SeveralConsumer(q_map, *of_all))
            consumer.run()

    return attention
