"""Decoding: few query rows for each head of keys, so that the keys are split among blocks.

Two launches.  The first has a block for each split of the keys, head of keys and batch: the forward kernel's main loop
with one consumer warpgroup and a single producer's warp, restricted to the split's keys, which leaves a normalised
output in float32 and its log-sum-exp.  The second combines the splits (:mod:`schedules.tile.combine`); it begins while
the first one ends.

Or a block computes several splits, as many as leave the machine filled (:mod:`schedules.families.sm90.runs`).

Splits are at fixed positions, multiples of a length that follows from the number of keys alone, so that a sequence has
the same bits in any batch.  What limits these kernels is memory: every step masks and takes the maximum, and one kernel
for a window with sides beyond the ends serves full and causal attention as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvm.backend.cuda.lang import SMEMPool
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.pattern import Pattern
from schedules.families import split_keys
from schedules.families.interface import Program, Rejected, Target
from schedules.families.sm90.barriers import WARPS, consumer_arrivals
from schedules.families.sm90.boxes import DenseBoxes
from schedules.families.sm90.config import BARRIER_BYTES, OTHER_REGISTERS, PANEL, WARPGROUP_ROWS, panels
from schedules.families.sm90.config import available_memory as _available_memory
from schedules.families.sm90.consumer import Consumer
from schedules.families.sm90.packing import Rows
from schedules.families.sm90.pipeline import Pipeline
from schedules.families.sm90.runs import bytes_of_states, compute_runs
from schedules.families.sm90.split_scheduler import ALIGNMENT, SplitScheduler
from schedules.families.sm90.tma import encode_keys, encode_queries
from schedules.families.sm90.work_tile import Block, KeyWalk
from schedules.tile.epilogue import normalise
from schedules.tile.geometry import Geometry, flat, parameterised, wide
from schedules.tile.partial import PartialResults
from schedules.tile.score import NEGATIVE_INFINITY
from schedules.tile.tile_scheduler import Traversal

#: Keys of a split, by the fewest keys of the sequence: as few as fill the machine with one sequence, unless its blocks
#: would take longer to start and end than to read (the table in docs/hopper.md, "Decoding").
SPLIT_LENGTHS = ((0, 64), (1024, 128), (4096, 256), (8192, 512), (65536, 1024), (131072, 2048))

#: Multiprocessors of an H100 or H200: how many blocks there are to fill.
_MULTIPROCESSORS = 132
_REGISTER_FILE = 65536
_MOST_REGISTERS = 255

_EXIT = '__forceinline__ __device__ void leave() { asm volatile("exit;"); }\n'


@dataclass(frozen=True)
class Config:
    """How a decoding kernel is scheduled.

    Attributes
    ----------
    block_n: keys of a tile, a multiple of 16 that divides every split.
    num_stages: stages of each of the two pipelines, of K and of V; a power of two.
    blocks_per_sm: blocks that share a multiprocessor.
    pack_heads: query heads of a group share a work tile (``packing.py``).
    runs: a block computes as many splits as leave the machine filled, one after the other (``runs.py``).
    """

    block_n: int = 64
    num_stages: int = 2
    blocks_per_sm: int = 2
    pack_heads: bool = True
    runs: bool = False

    # What the main loop asks of a configuration.
    num_consumer_warpgroups = 1
    block_m = WARPGROUP_ROWS
    pingpong = overlap_tiles = several_tiles = persistent = False
    tiles_per_cta = 1

    @property
    def threads(self) -> int:
        """Threads of a block: the consumer warpgroup and the producer's warp."""
        return 32 * (WARPS + 1)

    @property
    def registers(self) -> int:
        """Registers of a thread."""
        return min(_REGISTER_FILE // (self.threads * self.blocks_per_sm) // 8 * 8, _MOST_REGISTERS)


def default_configs(template: str, pattern: Pattern, target: Target) -> dict[int, Config]:
    """The configuration of a pattern."""
    packs, runs = not pattern.depends_on_head, not pattern.has_sink
    if pattern.head_dim <= 64:
        # Not in runs, whose states leave room for two blocks where these are three: 8 x 1500 keys, 20 heads, took 30.5
        # us in place of 23.6, and 4 x 16k with 64 heads on 8 40.1 in place of 42.4 (H200).
        return {0: Config(num_stages=4, pack_heads=packs)}
    if pattern.head_dim <= 128:
        return {0: Config(pack_heads=packs, runs=runs)}
    return {0: Config(num_stages=2, blocks_per_sm=1, pack_heads=packs, runs=runs)}


def space(template: str, pattern: Pattern, target: Target) -> Mapping[str, tuple]:
    """Values of each field of ``Config`` that are worth trying."""
    return {"block_n": (32, 64), "num_stages": (2, 4, 8), "blocks_per_sm": (1, 2, 3, 4)}


def feasible(pattern: Pattern, config: Config, target: Target) -> Rejected | None:
    """Whether the configuration can be compiled for the pattern."""
    for name, head_dim in (("head_dim", pattern.head_dim), ("head_dim_v", pattern.head_dim_v)):
        if head_dim % 16 or not 16 <= head_dim <= 256:
            return Rejected(f"{name} {head_dim} is not a multiple of 16 from 16 to 256")
    if config.block_n % 16:
        return Rejected(f"block_n {config.block_n} is not a multiple of 16")
    if refusal := split_keys.undivided(config.block_n, SPLIT_LENGTHS):
        return refusal
    if config.num_stages not in (2, 4, 8):
        return Rejected(f"num_stages {config.num_stages} is not 2, 4 or 8")
    if pattern.has_gaps:
        return Rejected("a mask with gaps isn't decoded with split keys: every tile of them is loaded")
    if pattern.depends_on_head and config.pack_heads:
        return Rejected("a score or a mask that differs from head to head can't have heads packed")
    available = _available_memory(config)
    if (needed := _shared_memory(pattern, config)) > available:
        return Rejected(f"needs {needed} bytes of shared memory, a block of {target} has {available}")
    if config.runs and pattern.has_sink:
        return Rejected("a sink is added by the launch that combines splits, which has no part in rows of one run")
    needed = config.block_n // 2 + config.block_n // 4 + pattern.head_dim_v // 2 + OTHER_REGISTERS
    if needed > config.registers:
        return Rejected(f"needs about {needed} registers a thread, there are {config.registers}")
    return None


def _shared_memory(pattern: Pattern, config: Config) -> int:
    keys = config.num_stages * config.block_n * (panels(pattern.head_dim) + panels(pattern.head_dim_v))
    aside = bytes_of_states(pattern) if config.runs else 0
    return (config.block_m * panels(pattern.head_dim) + keys) * 2 * PANEL + aside + BARRIER_BYTES


@T.meta_class
class Partial:
    """Where a block leaves the partial results of its split."""

    def __init__(self, results: PartialResults):
        self.o, self.lse = flat(results.o), flat(results.lse)
        self.splits, self.columns = results.splits, results.columns

    def index(self, block: Block, row, position):
        """Number of a row of the work tile, and of the block's split in it, int64."""
        geometry = block.geometry
        head = wide(block.batch) * wide(geometry.heads) + wide(block.head + block.rows.head(row))
        at = head * wide(geometry.seqlen_q) + wide(position)
        return at * wide(self.splits) + wide(block.scheduler.split(block.at))

    @T.inline
    def nothing_seen(self, block, thread):
        """All threads: the block's rows see nothing of its split."""
        row = block.row_first + thread
        position = T.meta_var(block.rows.position(row))
        if T.And(thread < WARPGROUP_ROWS, T.And(row < block.rows.count, position < block.geometry.seqlen_q)):
            self.lse[self.index(block, row, position)] = T.float32(NEGATIVE_INFINITY)


@T.meta_class
class PartialConsumer(Consumer):
    """The consumer warpgroup of a split: every step masks and takes the maximum, and rows go straight to memory."""

    def __init__(self, pattern: Pattern, config: Config, block: Block, pipelines, partial: Partial, warp, lane):
        Consumer.__init__(self, pattern, config, block, pipelines, None, 0, warp, lane)
        self.partial = partial

    @T.inline
    def run(self):
        """Compute the block's work tile."""
        self.counter.start()
        self.start()
        walk = self.walk()
        self.masked_steps(walk, 1, walk.steps)
        v = T.meta_var(self.v_state())
        self.issue_pv(v)
        T.ptx.wgmma.wait_group.sync.aligned(0)
        self.finished.keep(self.softmax)
        self.write_partial()

    @T.inline
    def first_softmax(self, walk, k):
        """Probabilities of the first step, with the exact maximum."""
        column0 = T.meta_var(self._column0(walk.key_first(0)))
        self.k.consumer_release(k, self.lane)
        self.softmax.reset()
        self.softmax.scores(self.acc_s, self._row0(), column0, True)
        self.softmax.track(self.acc_s, 0.0)
        self.softmax.probabilities(self.acc_s, self.softmax.scale)

    @T.inline
    def write_partial(self):
        """Write the rows of this lane that there are."""
        normalise(self.finished, self.acc_o, self.outputs)
        fragment = T.meta_var(self.softmax.fragment)
        column: T.int32 = fragment.column(self.lane)
        for r in T.unroll(2):
            row: T.int32 = self.block.row_first + self.row + fragment.row(self.lane) + r * fragment.row_step
            position = T.meta_var(self.block.rows.position(row))
            if T.And(row < self.block.rows.count, position < self.block.geometry.seqlen_q):
                index: T.int64 = self.partial.index(self.block, row, position)
                if column == 0:
                    self.partial.lse[index] = self.finished.lse(r)
                for g in T.unroll(self.outputs // 4):
                    i = T.meta_var(g * 4 + r * 2)
                    T.ptx["st.global.v2.f32"](
                        self.partial.o.ptr_to(
                            [index * self.partial.columns + wide(column + fragment.output_column(g))]
                        ),
                        self.acc_o[i],
                        self.acc_o[i + 1],
                    )


def partial(pattern: Pattern, config: Config, traversal: Traversal, name: str) -> PrimFunc:
    """``(q, k, v, o_partial, lse_partial, softmax_scale, split_length, *params)``."""
    return parameterised(pattern, lambda parameters: _partial(pattern, config, traversal, parameters)).with_attr(
        "global_symbol", name
    )


def _partial(pattern: Pattern, config: Config, traversal: Traversal, parameters: dict) -> PrimFunc:
    dtype, E = pattern.dtype, pattern.head_dim_v

    @T.prim_func(check_well_formed=False)
    def attention(
        q: T.handle,
        k: T.handle,
        v: T.handle,
        o_partial: T.handle,
        lse_partial: T.handle,
        softmax_scale: T.float32,
        split_length: T.int32,
    ):
        geometry = Geometry(pattern, traversal, (q, k, v), softmax_scale, parameters, ALIGNMENT)
        results = PartialResults((o_partial, lse_partial), E)
        rows = Rows(config, geometry)
        scheduler = SplitScheduler(geometry, rows, config, traversal, results.splits, split_length)
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
        x, y, z = T.cta_id(scheduler.grid())
        warp = T.warp_id([config.threads // 32])
        lane = T.lane_id([32])
        thread = T.thread_id([config.threads])
        # 3. The block's part of the keys; the launch that combines may begin when every block has come here.
        T.ptx.griddepcontrol.launch_dependents()
        block = Block(pattern, config, geometry, rows, scheduler, DenseBoxes(geometry, rows), (x, y, z))
        left = Partial(results)
        walk = KeyWalk(block, 0, config.block_m)
        if walk.tiles.end <= walk.tiles.begin:
            left.nothing_seen(block, thread)
            T.evaluate(T.cuda.func_call("leave", source_code=_EXIT))
        # 4. Shared memory: queries, pipelines of keys and values, barriers.
        pool = SMEMPool()
        q_pipeline = Pipeline(pool, 1, panels(pattern.head_dim), config.block_m, dtype)
        k_pipeline = Pipeline(pool, config.num_stages, panels(pattern.head_dim), config.block_n, dtype)
        v_pipeline = Pipeline(pool, config.num_stages, panels(E), config.block_n, dtype)
        q_pipeline.add_barriers(pool)
        k_pipeline.add_barriers(pool)
        v_pipeline.add_barriers(pool)
        pool.commit()
        pipelines = T.meta_var((q_pipeline, k_pipeline, v_pipeline))
        if warp == WARPS:
            if T.cuda.elect_sync():
                q_pipeline.init(1)
                k_pipeline.init(consumer_arrivals(1))
                v_pipeline.init(consumer_arrivals(1))
                T.ptx.fence.mbarrier_init.release.cluster()
                q_pipeline.load(q_pipeline.state(0), q_map, block.queries(0))
                for i in T.unroll(config.num_stages):
                    if i < walk.steps:
                        first = T.meta_var(block.keys(walk.key_first(i)))
                        k_pipeline.load(k_pipeline.state(i), k_map, first)
                        v_pipeline.load(v_pipeline.state(i), v_map, first)
        T.cuda.cta_sync()
        # 5. Tasks.
        if warp == WARPS:
            if T.cuda.elect_sync():
                for i in T.serial(config.num_stages, walk.steps):
                    # K before its stage of V is waited for: the consumers release V(n-1) when K(n+1) is there.
                    at = T.meta_var(block.keys(walk.key_first(i)))
                    k_pipeline.producer_acquire(k_pipeline.state(i))
                    k_pipeline.load(k_pipeline.state(i), k_map, at)
                    v_pipeline.producer_acquire(v_pipeline.state(i))
                    v_pipeline.load(v_pipeline.state(i), v_map, at)
        else:
            consumer = PartialConsumer(pattern, config, block, pipelines, left, warp, lane)
            consumer.run()

    return attention


def program(pattern: Pattern, config: Config, target: Target, traversal: Traversal, name: str) -> Program:
    """The two launches; ``config`` must be feasible."""
    if config.runs:
        func = parameterised(pattern, lambda parameters: compute_runs(pattern, config, traversal, parameters))
        resident = _MULTIPROCESSORS * config.blocks_per_sm
        return split_keys.runs_program(
            pattern,
            func.with_attr("global_symbol", name),
            traversal,
            name,
            SPLIT_LENGTHS,
            resident=resident,
            packs=config.pack_heads,
            most_rows=WARPGROUP_ROWS,
            alignment=ALIGNMENT,
        )
    func = partial(pattern, config, traversal, name)
    return split_keys.program(pattern, func, traversal, name, SPLIT_LENGTHS, alignment=ALIGNMENT, waits=True)
