"""The launch that computes splits of the keys of sequences: warps that fetch, and a consumer warpgroup.

The forward kernel's main loop, over the parts that a block has (:mod:`schedules.families.sm90.parts`), which leave
states (:mod:`schedules.families.sm90.states`).  What limits these kernels is memory: every step masks and takes the
maximum, so that no step is ever repeated, and the producer goes on to the next part while the consumers finish one.
Queries, of which there are few, the consumers read themselves.
"""

from __future__ import annotations

from tvm.backend.cuda.lang import SMEMPool
from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.sm90.barriers import WARPGROUP_THREADS, WARPS, NamedBarriers, consumer_arrivals
from schedules.families.sm90.config import PANEL, WARPGROUP_ROWS, panels
from schedules.families.sm90.parts import Part, PartScheduler
from schedules.families.sm90.pipeline import Pipeline
from schedules.families.sm90.softmax import Finished, Softmax
from schedules.families.sm90.states import StateConsumer, memory_of_states
from schedules.families.sm90.wgmma import swizzled
from schedules.families.sm90.work_tile import KeyWalk
from schedules.tile.epilogue import normalise
from schedules.tile.geometry import Geometry, flat, wide
from schedules.tile.partial import PartialResults
from schedules.tile.score import NEGATIVE_INFINITY
from schedules.tile.softmax import LOWEST
from schedules.tile.states import COLUMNS, WARP_COLUMNS, Fold

#: Elements of 16 bytes, which a thread copies at once.
CHUNK = 8
#: Copies of queries that a thread has on their way at a time, at most.
_ON_THE_WAY = 4

_ALL_LANES = 0xFFFFFFFF


def _at_once(copies: int, most: int) -> int:
    """How many of a thread's copies are on their way together, so that they can be had in equal parts."""
    return max(n for n in range(1, most + 1) if copies % n == 0)


@T.meta_class
class PartSoftmax(Softmax):
    """The softmax of packed rows: the queries of this lane's two rows are computed once for a part."""

    def __init__(self, *args):
        Softmax.__init__(self, *args)
        self.queries = T.alloc_local([2], "int32")

    def position(self, row0, column0, t, g, r, e):
        """Query and key of a register."""
        return self.queries[r], Softmax.position(self, row0, column0, t, g, r, e)[1]

    @T.inline
    def raise_references(self):
        """Raise references to those in ``peak`` that are higher; sets ``grown``, ``correction``, ``row_sum``."""
        higher = T.meta_var(T.Or(self.peak[0] > self.row_max[0], self.peak[1] > self.row_max[1]))
        self.grown = T.cuda.any_sync(T.uint32(_ALL_LANES), T.Cast("int32", higher))
        if self.grown != 0:
            for r in T.unroll(2):
                self.correction[r] = T.exp2(self.row_max[r] - self.peak[r])
                self.row_max[r] = self.peak[r]
                self.row_sum[r] = self.row_sum[r] * self.correction[r]

    @T.inline
    def place(self, row0):
        """Set the queries of the rows from this lane's first one on."""
        for r in T.unroll(2):
            self.queries[r] = self.rows.position(row0 + r * self.fragment.row_step)


@T.meta_class
class PartRowsConsumer:
    """What warpgroups that compute parts do with the rows of one: read the queries, write the results.

    ``threads`` do so together.  Of the output this warpgroup has the columns from ``first_column`` on.
    """

    threads = WARPGROUP_THREADS
    first_column = 0

    def add_rows(self, results: PartialResults):
        """What rows need beside the fields of a consumer."""
        self.softmax = PartSoftmax(self.pattern, self.block.site, self.block.rows, self.config.block_n)
        self.finished = Finished(self.softmax)
        self.o, self.lse, self.splits = flat(results.o), flat(results.lse), results.splits

    @property
    def thread(self):
        """This thread's number among the ``threads``."""
        return self.warp * 32 + self.lane

    @T.inline
    def meet(self):
        """The ``threads`` wait for each other."""
        NamedBarriers(1).queries_read(0)

    @T.inline
    def read_queries(self):
        """Copy the queries of a row tile to shared memory, zeros where there are none."""
        columns = T.meta_var(self.q.panels * PANEL // CHUNK)  # chunks of a row
        times = T.meta_var(WARPGROUP_ROWS * columns // self.threads)
        at_once = T.meta_var(_at_once(times, _ON_THE_WAY))
        words = T.alloc_local([at_once * 4], "uint32")
        self.meet()
        for first in T.unroll(times // at_once):
            self.copy_queries(first, at_once, columns, words)
        T.ptx.fence.proxy.async_.shared__cta()
        self.meet()
        self.softmax.place(self._row0())

    @T.inline
    def copy_queries(self, first, at_once, columns, words):
        """This thread's copies number ``first * at_once`` and those that follow."""
        part = T.meta_var(self.block)
        packed = T.meta_var(part.rows.packed)
        source = T.meta_var(flat(part.geometry.q.buffer))
        to = T.meta_var(self.q.pointer(self.q_state()))
        for i in T.unroll(at_once):
            number: T.int32 = (first * at_once + i) * self.threads + self.thread
            row: T.int32 = part.row_first + T.truncdiv(number, columns)
            column: T.int32 = T.truncmod(number, columns) * CHUNK
            for x in T.unroll(4):
                words[i * 4 + x] = T.uint32(0)
            if T.And(row < part.rows.count, column < part.geometry.head_dim):
                T.ptx["ld.global.v4.b32"](
                    *[words[i * 4 + x] for x in range(4)], source.ptr_to([packed.offset(row, column)])
                )
        for i in T.unroll(at_once):
            number: T.int32 = (first * at_once + i) * self.threads + self.thread
            row: T.int32 = T.truncdiv(number, columns)
            chunk: T.int32 = T.truncmod(number, columns)
            panel: T.int32 = T.truncdiv(chunk, PANEL // CHUNK)
            place: T.int32 = swizzled(T.truncmod(chunk, PANEL // CHUNK), row)
            T.ptx["st.shared.v4.b32"](to(panel, row, place), *[words[i * 4 + x] for x in range(4)])

    def _index(self, row):
        """Number of a row, and of the part's split in it, int64."""
        return self.block.rows.packed.number(self.block.geometry, row) * wide(self.splits) + wide(self.block.split)

    @T.inline
    def write_nothing(self):
        """Say that the part's rows see nothing of it."""
        row: T.int32 = self.block.row_first + self.thread
        if T.And(self.thread < WARPGROUP_ROWS, row < self.block.rows.count):
            self.lse[self._index(row)] = T.float32(NEGATIVE_INFINITY)

    @T.inline
    def write_partial(self):
        """Write the rows of this lane that there are."""
        normalise(self.finished, self.acc_o, self.outputs)
        fragment = T.meta_var(self.softmax.fragment)
        columns = T.meta_var(self.pattern.head_dim_v)
        column: T.int32 = fragment.column(self.lane) + self.first_column
        for r in T.unroll(2):
            row: T.int32 = self._row0() + r * fragment.row_step
            if row < self.block.rows.count:
                index: T.int64 = self._index(row)
                if column == 0:
                    self.lse[index] = self.finished.lse(r)
                for g in T.unroll(self.outputs // 4):
                    i = T.meta_var(g * 4 + r * 2)
                    T.ptx["st.global.v2.f32"](
                        self.o.ptr_to([index * columns + wide(column + fragment.output_column(g))]),
                        self.acc_o[i],
                        self.acc_o[i + 1],
                    )


@T.meta_class
class PartConsumer(PartRowsConsumer, StateConsumer):
    """The consumer warpgroup, over the block's parts."""

    def __init__(self, pattern: Pattern, config, part: Part, pipelines, states, memory, warp, lane):
        StateConsumer.__init__(self, pattern, config, part, pipelines, states, memory, warp, lane)
        self.softmax = PartSoftmax(pattern, part.site, part.rows, config.block_n)
        self.finished = Finished(self.softmax)

    @T.inline
    def run(self):
        """Compute the parts."""
        part = T.meta_var(self.block)
        self.counter.start()
        self.clear_weights()
        if part.scheduler.in_clusters:
            part.find_room()
        while part.exists:
            if part.other_rows != 0:
                self.read_queries()
            walk = self.walk()
            if walk.tiles.begin < walk.tiles.end:
                self.compute(walk)
            else:
                self.leave_nothing()
            part.advance()
        if part.scheduler.in_clusters:
            self.fold()
            if part.batch == part.geometry.batch - 1:
                self.clear_rest()

    @T.inline
    def compute(self, walk):
        """A part whose rows see something of it."""
        self.first_step(walk)
        walk.masked_steps(1, walk.steps, self.step)
        v = T.meta_var(self.v_state())
        self.issue_pv(v)
        self.finish_pv(v)
        self.finished.keep(self.softmax)
        if self.block.scheduler.in_clusters:
            self.keep_state()
        else:
            self.leave_state()

    @T.inline
    def leave_nothing(self):
        """Say that the part's rows see nothing of it."""
        part = T.meta_var(self.block)
        thread = T.meta_var(self.warp * 32 + self.lane)
        if thread < part.count:
            if part.scheduler.in_clusters:
                at: T.int32 = part.kept * part.count + thread
                self.memory[at, self.columns] = T.float32(LOWEST)
                self.memory[at, self.columns + 1] = T.float32(0)
            else:
                number: T.int64 = part.number_of_row(part.row_first + thread)
                index: T.int64 = number * wide(self.parts) + wide(part.number)
                T.ptx["st.global.v2.f32"](self.states_sums.ptr_to([index * 2]), T.float32(LOWEST), T.float32(0))

    @T.inline
    def clear_rest(self):
        """The cluster of the last sequence: write rows behind it, which see nothing."""
        part, geometry = T.meta_var((self.block, self.block.geometry))
        fold = Fold(None, self.columns, self.lane)
        fold.clear()
        first: T.int32 = part.query_first + part.seqlen_q
        rest: T.int32 = geometry.seqlen_q - first
        item: T.int32 = self.warp * part.scheduler.runs + part.run
        while item < rest * part.scheduler.group:
            head: T.int32 = T.truncdiv(item, rest)
            at: T.int32 = first + item - head * rest
            for share in T.unroll(-(-self.columns // WARP_COLUMNS)):
                column = T.meta_var(share * WARP_COLUMNS + self.lane * COLUMNS)
                fold.store(geometry.o, (part.batch, part.head + head, at, column), geometry.head_dim_v)
            if T.And(geometry.lse_wanted, self.lane == 0):
                lse = T.meta_var(flat(geometry.lse))
                lse[geometry.lse_offset(part.batch, part.head + head, at)] = T.float32(NEGATIVE_INFINITY)
            item = item + part.scheduler.runs * WARPS

    @T.inline
    def first_step(self, walk):
        """The first step of a part, which has no earlier product beside it, with the exact maximum."""
        for i in T.unroll(self.outputs):
            self.acc_o[i] = T.float32(0)
        if self.pattern.has_gaps:
            self.count(walk)
        k = T.meta_var(self.k_state())
        self.k.consumer_wait(k)
        self.issue_qk(k)
        T.ptx.wgmma.wait_group.sync.aligned(0)
        self.first_softmax(walk, k)
        self.pack()
        self.next_k(k, self._more(walk, 0))


@T.inline
def _fetch(part: Part, tensor, pipeline, descriptor, lane):
    """A whole warp: fill the pipeline of K or of V with the tiles of the block's parts."""
    tiles = T.meta_var(part.boxes.fetching(part, tensor, lane))
    n: T.int32 = 0
    while part.exists:
        walk = KeyWalk(part, 0, WARPGROUP_ROWS)
        if walk.tiles.begin < walk.tiles.end:
            tiles.start()
            for i in T.serial(walk.steps):
                if T.Or(i == 0, walk.visible(i)) if part.pattern.has_gaps else True:
                    tiles.look_up(walk, i)
                    pipeline.producer_acquire(pipeline.state(n))
                    tiles.load(pipeline, pipeline.state(n), descriptor, walk, i)
                    n = n + 1
        part.advance()


@T.inline
def compute_parts(pattern: Pattern, geometry: Geometry, scheduler: PartScheduler, boxes, states=None):
    """The kernel's text, from the descriptors on."""
    config = T.meta_var(scheduler.config)
    # 1. Descriptors of the tensors, made on the host.
    k_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
    T.evaluate(boxes.encode_keys(k_map, geometry.k, config.block_n))
    v_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
    T.evaluate(boxes.encode_keys(v_map, geometry.v, config.block_n))
    # 2. Blocks, warps, lanes; the launch that folds may begin when every block has come here.
    T.device_entry()
    T.attr({"tirx.launch_bounds_min_blocks_per_sm": config.blocks_per_sm})
    if scheduler.in_clusters:
        _x, _rank, _z = T.cta_id_in_cluster(scheduler.cluster())
    unit, share, batch = T.cta_id(scheduler.grid() if scheduler.in_clusters else [*scheduler.grid(), 1])
    warp = T.warp_id([config.threads // 32])
    lane = T.lane_id([32])
    T.thread_id([config.threads])
    if not scheduler.in_clusters:
        T.ptx.griddepcontrol.launch_dependents()
    # 3. Shared memory: queries, pipelines of keys and values, barriers.
    pool = SMEMPool()
    q_pipeline = Pipeline(pool, 1, panels(pattern.head_dim), config.block_m, pattern.dtype)
    k_pipeline = Pipeline(pool, config.num_stages, panels(pattern.head_dim), config.block_n, pattern.dtype)
    v_pipeline = Pipeline(pool, config.num_stages, panels(pattern.head_dim_v), config.block_n, pattern.dtype)
    memory = T.meta_var(memory_of_states(pool, pattern) if scheduler.in_clusters else None)
    k_pipeline.add_barriers(pool)
    v_pipeline.add_barriers(pool)
    pool.commit()
    # 4. The block's parts; meanwhile a warp that has no task makes the barriers.
    part = Part(pattern, geometry, scheduler, boxes, unit, share, batch)
    if warp == WARPS + 2:
        if T.cuda.elect_sync():
            k_pipeline.init(consumer_arrivals(1))
            v_pipeline.init(consumer_arrivals(1))
            T.ptx.fence.mbarrier_init.release.cluster()
    else:
        part.find(lane)
    T.cuda.cta_sync()
    # 5. Tasks: a warp fetches K, one V, two have none.
    if warp >= WARPS:
        T.ptx["setmaxnreg.dec.sync.aligned.u32"](config.registers[0])
        if warp == WARPS:
            _fetch(part, geometry.k, k_pipeline, k_map, lane)
        if warp == WARPS + 1:
            _fetch(part, geometry.v, v_pipeline, v_map, lane)
    else:
        T.ptx["setmaxnreg.inc.sync.aligned.u32"](config.registers[1])
        pipelines = T.meta_var((q_pipeline, k_pipeline, v_pipeline))
        consumer = PartConsumer(pattern, config, part, pipelines, states, memory, warp, lane)
        consumer.run()
