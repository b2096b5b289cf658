"""The launch that computes splits of the keys and folds them: warps that fetch, and a consumer warpgroup.

The forward kernel's main loop, over the parts that a block has (:mod:`schedules.families.sm90.parts`).  What limits
these kernels is memory: every step masks and takes the maximum, so that no step is ever repeated, and the producer goes
on to the next part while the consumers finish one.  Queries, of which there are few, the consumers read themselves.
"""

from __future__ import annotations

from tvm.backend.cuda.lang import SMEMPool
from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.sm90.barriers import WARPGROUP_THREADS, WARPS, NamedBarriers, consumer_arrivals
from schedules.families.sm90.config import PANEL, WARPGROUP_ROWS, panels
from schedules.families.sm90.parts import Part, PartScheduler
from schedules.families.sm90.pipeline import Pipeline
from schedules.families.sm90.run_states import RunConsumer, memory_of_states
from schedules.families.sm90.softmax import Finished, Softmax
from schedules.families.sm90.wgmma import swizzled
from schedules.families.sm90.work_tile import KeyWalk
from schedules.tile.geometry import Geometry, flat
from schedules.tile.states import PartialStates

#: Elements of 16 bytes, which a thread copies at once.
_CHUNK = 8
#: Copies of a thread that are on their way at a time.
_ON_THE_WAY = 4


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
    def place(self, row0):
        """Set the queries of the rows from this lane's first one on."""
        for r in T.unroll(2):
            self.queries[r] = self.rows.position(row0 + r * self.fragment.row_step)


@T.meta_class
class PartConsumer(RunConsumer):
    """The consumer warpgroup, over the block's parts."""

    def __init__(self, pattern: Pattern, config, part: Part, pipelines, states: PartialStates, memory, warp, lane):
        RunConsumer.__init__(self, pattern, config, part, pipelines, states, memory, warp, lane)
        self.softmax = PartSoftmax(pattern, part.site, part.rows, config.block_n)
        self.finished = Finished(self.softmax)

    @T.inline
    def run(self):
        """Compute the parts."""
        part = T.meta_var(self.block)
        self.counter.start()
        while part.exists:
            if part.other_rows != 0:
                self.read_queries()
            part.begin_run()
            while part.split < part.end:
                walk = self.walk()
                if walk.tiles.begin < walk.tiles.end:
                    self.compute(walk)
                else:
                    self.see_nothing()
                self.end_split()
                part.split = part.split + 1
            self.end_run()
            part.end_run()

    @T.inline
    def compute(self, walk):
        """A part whose rows see something of it."""
        self.first_step(walk)
        self.masked_steps(walk, 1, walk.steps)
        v = T.meta_var(self.v_state())
        self.issue_pv(v)
        self.finish_pv(v)

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
        self.softmax.pack(self.acc_s, self.p)
        self.softmax.add_sums()
        self.next_k(k, self._more(walk, 0))

    @T.inline
    def read_queries(self):
        """Copy the queries of a row tile to shared memory, zeros where there are none."""
        part = T.meta_var(self.block)
        packed = T.meta_var(part.rows.packed)
        columns = T.meta_var(self.q.panels * PANEL // _CHUNK)  # chunks of a row
        times = T.meta_var(WARPGROUP_ROWS * columns // WARPGROUP_THREADS)
        thread = T.meta_var(self.warp * 32 + self.lane)
        source = T.meta_var(flat(part.geometry.q.buffer))
        barriers = T.meta_var(NamedBarriers(1))
        to = T.meta_var(self.q.pointer(self.q_state()))
        words = T.alloc_local([_ON_THE_WAY * 4], "uint32")
        barriers.queries_read(0)
        for first in T.unroll(times // _ON_THE_WAY):
            for i in T.unroll(_ON_THE_WAY):
                number: T.int32 = (first * _ON_THE_WAY + i) * WARPGROUP_THREADS + thread
                row: T.int32 = part.row_first + T.truncdiv(number, columns)
                column: T.int32 = T.truncmod(number, columns) * _CHUNK
                for x in T.unroll(4):
                    words[i * 4 + x] = T.uint32(0)
                if T.And(row < part.rows.count, column < part.geometry.head_dim):
                    T.ptx["ld.global.v4.b32"](
                        *[words[i * 4 + x] for x in range(4)], source.ptr_to([packed.offset(row, column)])
                    )
            for i in T.unroll(_ON_THE_WAY):
                number: T.int32 = (first * _ON_THE_WAY + i) * WARPGROUP_THREADS + thread
                row: T.int32 = T.truncdiv(number, columns)
                chunk: T.int32 = T.truncmod(number, columns)
                panel: T.int32 = T.truncdiv(chunk, PANEL // _CHUNK)
                place: T.int32 = swizzled(T.truncmod(chunk, PANEL // _CHUNK), row)
                T.ptx["st.shared.v4.b32"](to(panel, row, place), *[words[i * 4 + x] for x in range(4)])
        T.ptx.fence.proxy.async_.shared__cta()
        barriers.queries_read(0)
        self.softmax.place(self._row0())


@T.inline
def _fetch(part: Part, tensor, pipeline, descriptor, lane):
    """A whole warp: fill the pipeline of K or of V with the tiles of the block's parts."""
    tiles = T.meta_var(part.boxes.fetching(part, tensor, lane))
    n: T.int32 = 0
    while part.exists:
        walk = KeyWalk(part, 0, WARPGROUP_ROWS)
        if walk.tiles.begin < walk.tiles.end:
            for i in T.serial(walk.steps):
                if T.Or(i == 0, walk.visible(i)) if part.pattern.has_gaps else True:
                    tiles.look_up(walk.key_first(i))
                    pipeline.producer_acquire(pipeline.state(n))
                    tiles.load(pipeline, pipeline.state(n), descriptor)
                    n = n + 1
        part.advance()


@T.inline
def compute_parts(pattern: Pattern, geometry: Geometry, scheduler: PartScheduler, boxes, states: PartialStates):
    """The kernel's text, from the descriptors on."""
    config = T.meta_var(scheduler.config)
    # 1. Descriptors of the tensors, made on the host.
    k_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
    T.evaluate(boxes.encode_keys(k_map, geometry.k, config.block_n))
    v_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
    T.evaluate(boxes.encode_keys(v_map, geometry.v, config.block_n))
    # 2. Blocks, warps, lanes.
    T.device_entry()
    T.attr({"tirx.launch_bounds_min_blocks_per_sm": config.blocks_per_sm})
    unit, share = T.cta_id(scheduler.grid())
    warp = T.warp_id([config.threads // 32])
    lane = T.lane_id([32])
    T.thread_id([config.threads])
    # 3. Shared memory: queries, pipelines of keys and values, barriers.
    pool = SMEMPool()
    q_pipeline = Pipeline(pool, 1, panels(pattern.head_dim), config.block_m, pattern.dtype)
    k_pipeline = Pipeline(pool, config.num_stages, panels(pattern.head_dim), config.block_n, pattern.dtype)
    v_pipeline = Pipeline(pool, config.num_stages, panels(pattern.head_dim_v), config.block_n, pattern.dtype)
    memory = memory_of_states(pool, pattern)
    k_pipeline.add_barriers(pool)
    v_pipeline.add_barriers(pool)
    pool.commit()
    if warp == WARPS:
        if T.cuda.elect_sync():
            k_pipeline.init(consumer_arrivals(1))
            v_pipeline.init(consumer_arrivals(1))
            T.ptx.fence.mbarrier_init.release.cluster()
    # 4. The block's parts.
    part = Part(pattern, geometry, scheduler, boxes, unit, share)
    part.find(lane)
    T.cuda.cta_sync()
    # 5. Tasks: a warp fetches K, one V, two have none.
    if warp >= WARPS:
        T.ptx["setmaxnreg.dec.sync.aligned.u32"](config.registers[0])
        if warp == WARPS:
            _fetch(part, geometry.k, k_pipeline, k_map, lane)
            T.ptx.griddepcontrol.wait()  # this launch isn't to end before the one that clears counters
        if warp == WARPS + 1:
            _fetch(part, geometry.v, v_pipeline, v_map, lane)
    else:
        T.ptx["setmaxnreg.inc.sync.aligned.u32"](config.registers[1])
        pipelines = T.meta_var((q_pipeline, k_pipeline, v_pipeline))
        consumer = PartConsumer(pattern, config, part, pipelines, states, memory, warp, lane)
        consumer.run()
