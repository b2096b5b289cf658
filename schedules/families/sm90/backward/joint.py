"""The joint launch: a block owns 128 keys and visits queries as that for dk and dv does, and adds its part to dq.

Five products in place of seven.  Sums over blocks are taken in the order of their keys, through memory
(:mod:`schedules.tile.ordered_sums`).  What masks that read ids show is found by launches before it
(:mod:`schedules.tile.mask_walks`).
"""

from __future__ import annotations

from tvm import tirx
from tvm.backend.cuda.lang import SMEMPool
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.parameters import append_arguments
from schedules.definition.pattern import Pattern
from schedules.families.interface import ScheduledLaunch
from schedules.families.row_terms import SHIFTS, STARTS
from schedules.families.sm90.backward.config import (
    BLOCK,
    CONSUMERS,
    DS_ROWS,
    JOINT_REGISTERS,
    Config,
    section_heads,
    tiles_told,
    usual_rows,
)
from schedules.families.sm90.backward.joint_consumer import JointConsumer
from schedules.families.sm90.backward.numbers import RowNumbers, row_numbers
from schedules.families.sm90.backward.parts import Parts
from schedules.families.sm90.backward.query_sums import QuerySums
from schedules.families.sm90.backward.stores import WARP_ROWS
from schedules.families.sm90.backward.walk import KeyBlock, SectionScheduler, exists_both, key_blocks
from schedules.families.sm90.barriers import WARPS, consumer_arrivals
from schedules.families.sm90.config import PANEL, panels
from schedules.families.sm90.pipeline import Pipeline
from schedules.tile.geometry import flat, parameterised
from schedules.tile.gradients import Starts, tensors_of, tiles_of
from schedules.tile.static import static
from schedules.tile.tile_scheduler import Traversal
from tvm_flash.packs.manifest import Scalar, Workspace

#: Roles of the kernel's arguments, before those of the pattern's parameters.
ROLES = ("q", "k", "v", "do", SHIFTS, STARTS, "dq", "dk", "dv", "softmax_scale", "dq_sums", "progress")
ROLES += ("tiles_told", "heads_per_block", "dk_sums", "dv_sums", "parts_done")

#: The argument that says how many heads a section has, if the configuration doesn't.
SECTION = "section_heads"
#: Query heads of a group are shared among as many blocks as make this many of a sequence: four for each multiprocessor
#: of an H200, so that one that has the most to do under a causal mask keeps nobody waiting.
BLOCKS = 512
#: Keys of a sequence that is one of many, whose own length may have no say in how they are shared.
USUAL_KEYS = 2048
_GROUP = ("ceildiv", "heads", "kv_heads")


def _heads_per_block(ragged: bool) -> tuple:
    blocks = USUAL_KEYS // BLOCK if ragged else ("ceildiv", "seqlen_kv", BLOCK)
    return ("ceildiv", _GROUP, ("ceildiv", BLOCKS, ("*", "kv_heads", blocks)))


def scalars(pattern: Pattern, config: Config, ragged: bool) -> tuple[Scalar, ...]:
    """How many tiles a block adds to before it tells the next one; how many query heads of a group it visits: the batch
    has no say there, so that a sequence's bits are its own."""
    return (
        Scalar("tiles_told", ("steps", usual_rows(ragged), *tiles_told(pattern))),
        Scalar("heads_per_block", _heads_per_block(ragged)),
        *(() if config.head_section else (Scalar(SECTION, section_heads(pattern, ragged)),)),
    )


def counters(ragged: bool) -> tuple[Workspace, ...]:
    """How far each block has come in each query head, and, where a group is shared, with dk and dv."""
    blocks = blocks_of(ragged)
    done = ("*", "kv_heads", blocks, _shared(ragged), CONSUMERS * WARPS)
    return (
        Workspace("progress", "int32", (("*", "heads", blocks, WARPS),)),
        Workspace("parts_done", "int32", (("max", 4, done),)),
    )


def workspaces(pattern: Pattern, config: Config, ragged: bool) -> tuple[Workspace, ...]:
    """Sums of dq, tile by tile in the order of accumulators, and those of dk and dv, where a group is shared."""
    blocks = ("*", "kv_heads", blocks_of(ragged), _shared(ragged))
    tile = config.block_m * panels(pattern.head_dim) * PANEL
    return (
        Workspace("dq_sums", "float32", (("*", tiles_of(config.block_m, ragged), tile),)),
        Workspace("dk_sums", "float32", (("max", 4, ("*", blocks, BLOCK * pattern.head_dim)),)),
        Workspace("dv_sums", "float32", (("max", 4, ("*", blocks, BLOCK * pattern.head_dim_v)),)),
    )


def blocks_of(ragged: bool) -> tuple:
    """How many blocks of keys there are of all batches, of each head."""
    if ragged:  # one more than there may be: sizes know no quotient that is rounded down
        return ("+", ("ceildiv", "total_k", BLOCK), "batch", 1)
    return ("*", "batch", ("ceildiv", "seqlen_kv", BLOCK))


def _shared(ragged: bool) -> tuple:
    """1 if a group is shared, else 0."""
    return ("steps", ("ceildiv", _GROUP, _heads_per_block(ragged)), (0, 0), (2, 1))


class _Section:
    """How many heads the blocks that are started together are of: a number, or if the configuration has none an
    argument more."""

    def __init__(self, config: Config):
        self.heads = config.head_section or tirx.Var(SECTION, "int32")
        self.arguments, self.roles = ([], ()) if config.head_section else ([self.heads], (SECTION,))


def build(
    pattern: Pattern,
    config: Config,
    traversal: Traversal,
    name: str,
    starts: Starts | None = None,
    adds: bool = False,
) -> ScheduledLaunch:
    """The launch of a pattern; ``starts`` says where ragged sequences begin.  ``adds``: results to what is there."""
    section = _Section(config)
    func = parameterised(
        pattern, lambda parameters: _kernel(pattern, config, traversal, parameters, starts, section.heads, adds)
    )
    func = append_arguments(func, [*(starts.arguments if starts else ()), *section.arguments])
    roles = (*ROLES, *(p.name for p in pattern.params), *(starts.roles if starts else ()), *section.roles)
    return ScheduledLaunch(func.with_attr("global_symbol", name), roles)


def _kernel(
    pattern: Pattern,
    config: Config,
    traversal: Traversal,
    parameters: dict,
    starts: Starts | None,
    section: Expr | int,
    adds: bool,
) -> PrimFunc:
    dtype, M, N, D, E = pattern.dtype, config.block_m, BLOCK, pattern.head_dim, pattern.head_dim_v
    sums_registers, consumer_registers = JOINT_REGISTERS
    others = WARPS * CONSUMERS  # the first warp after the consumers'

    @T.prim_func(check_well_formed=False)
    def backward(
        q: T.handle,
        k: T.handle,
        v: T.handle,
        do: T.handle,
        row_shifts: T.handle,
        row_starts: T.handle,
        dq: T.handle,
        dk: T.handle,
        dv: T.handle,
        softmax_scale: T.float32,
        dq_sums: T.handle,
        progress: T.handle,
        tiles_told: T.int32,
        heads_per_block: T.int32,
        dk_sums: T.handle,
        dv_sums: T.handle,
        parts_done: T.handle,
    ):
        handles = T.meta_var({"q": q, "k": k, "v": v, "do": do, "dq": dq, "dk": dk, "dv": dv})
        tensors = T.meta_var(tensors_of(pattern, traversal, handles, starts, softmax_scale, parameters, adds=adds))
        memory = T.meta_var(row_numbers(row_shifts, row_starts))
        sums_length = T.int64()
        sums = T.match_buffer(dq_sums, (sums_length,), "float32", align=16)
        progress_length = T.int32()
        counts = T.match_buffer(progress, (progress_length,), "int32", align=4)
        dk_length, dv_length, done_length = T.int64(), T.int64(), T.int32()
        of_dk = T.match_buffer(dk_sums, (dk_length,), "float32", align=16)
        of_dv = T.match_buffer(dv_sums, (dv_length,), "float32", align=16)
        done = T.match_buffer(parts_done, (done_length,), "int32", align=4)
        gradients = T.meta_var(tensors.gradients)
        blocks = T.meta_var(key_blocks(tensors, N))
        scheduler = SectionScheduler(tensors, blocks, heads_per_block, section)
        tiles = T.bind(tensors.tiles_of_rows(M))
        # 1. Descriptors of the tensors, made on the host.
        q_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(blocks.encode(q_map, tensors.q, M))
        do_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(blocks.encode(do_map, gradients["do"], M))
        k_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(blocks.encode(k_map, tensors.k, N))
        v_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(blocks.encode(v_map, tensors.v, N))
        dk_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        if static(not adds):
            T.evaluate(blocks.encode(dk_map, gradients["dk"], WARP_ROWS))
        dv_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        if static(not adds):
            T.evaluate(blocks.encode(dv_map, gradients["dv"], WARP_ROWS))
        # 2. Blocks, warps, lanes.
        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": 1})
        x, y, z = T.cta_id(scheduler.grid())
        warp = T.warp_id([config.threads // 32])
        lane = T.lane_id([32])
        T.thread_id([config.threads])
        # 3. Shared memory: the block's keys and values, pipelines of queries and of dS, numbers of rows, barriers.
        pool = SMEMPool()
        k_tile = Pipeline(pool, 1, panels(D), N, dtype)
        v_tile = Pipeline(pool, 1, panels(E), N, dtype)
        q_pipeline = Pipeline(pool, config.num_stages, panels(D), M, dtype)
        do_pipeline = Pipeline(pool, config.num_stages, panels(E), M, dtype)
        ds = Pipeline(pool, 2, M // PANEL, DS_ROWS, dtype)
        shifts = RowNumbers(pool, config.num_stages, M, memory[0])
        begins = RowNumbers(pool, config.num_stages, M, memory[1])
        k_tile.add_barriers(pool)
        v_tile.add_barriers(pool)
        q_pipeline.add_barriers(pool)
        do_pipeline.add_barriers(pool)
        ds.add_barriers(pool)
        blocks.add_memory(pool)
        pool.commit()
        place = T.meta_var(scheduler.place((x, y, z))[0])
        if warp == others:  # only a whole warp may elect
            blocks.find(place, lane)
            if T.cuda.elect_sync():
                k_tile.init(consumer_arrivals(CONSUMERS))
                v_tile.init(consumer_arrivals(CONSUMERS))
                q_pipeline.init(consumer_arrivals(CONSUMERS))
                do_pipeline.init(consumer_arrivals(CONSUMERS))
                ds.init(WARPS, consumer_arrivals(CONSUMERS))
                T.ptx.fence.mbarrier_init.release.cluster()
        T.cuda.cta_sync()
        # 4. Tasks.
        if exists_both(scheduler.exists((x, y, z)), blocks.exists()):
            block = KeyBlock(pattern, config, blocks, scheduler, (x, y, z))
            pipelines = T.meta_var((q_pipeline, k_tile, v_tile, do_pipeline))
            numbers = T.meta_var((shifts, begins))
            if warp >= others:
                T.ptx["setmaxnreg.dec.sync.aligned.u32"](sums_registers)
                maps = T.meta_var((q_map, k_map, v_map, do_map))
                workspaces = T.meta_var((flat(sums), flat(counts), tiles, tiles_told))
                QuerySums(pattern, config, block, pipelines, maps, numbers, ds, *workspaces, warp - others, lane).run()
            else:
                T.ptx["setmaxnreg.inc.sync.aligned.u32"](consumer_registers)
                parts = T.meta_var(Parts(block, scheduler.parts, flat(of_dk), flat(of_dv), flat(done), warp, lane))
                of_lane = T.meta_var((warp // WARPS, warp % WARPS, lane))
                JointConsumer(pattern, config, block, pipelines, numbers, ds, parts, *of_lane).run(dk_map, dv_map)

    return backward
