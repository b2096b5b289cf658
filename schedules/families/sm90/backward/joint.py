"""The joint launch: a block owns 128 keys and visits queries as that for dk and dv does, and adds its part to dq.

Five products in place of seven.  Sums over blocks are taken in the order of their keys, through memory (``sums.py``).
"""

from __future__ import annotations

from tvm.backend.cuda.lang import SMEMPool
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.pattern import Pattern
from schedules.families.interface import ScheduledLaunch
from schedules.families.sm90.backward.config import BLOCK, CONSUMERS, JOINT_REGISTERS, Config
from schedules.families.sm90.backward.joint_consumer import JointConsumer
from schedules.families.sm90.backward.parts import Parts
from schedules.families.sm90.backward.query_sums import QuerySums
from schedules.families.sm90.backward.stores import WARP_ROWS
from schedules.families.sm90.backward.walk import KeyBlock, SectionScheduler
from schedules.families.sm90.barriers import PRODUCER_ARRIVALS, WARPS, consumer_arrivals
from schedules.families.sm90.config import PANEL, panels
from schedules.families.sm90.pipeline import Pipeline
from schedules.families.sm90.tma import encode_keys
from schedules.tile.geometry import flat, parameterised
from schedules.tile.gradients import Tensors
from schedules.tile.tile_scheduler import Traversal
from tvm_flash.packs.manifest import Scalar, Workspace

#: Roles of the kernel's arguments, before those of the pattern's parameters.
ROLES = ("q", "k", "v", "do", "lse", "delta", "dk", "dv", "softmax_scale", "dq_sums", "progress")
ROLES += ("heads_per_block", "dk_sums", "dv_sums", "parts_done")

#: Query heads of a group are shared among as many blocks as make this many of a sequence: four for each multiprocessor
#: of an H200, so that one that has the most to do under a causal mask keeps nobody waiting.
BLOCKS = 512
_GROUP = ("ceildiv", "heads", "kv_heads")
_KEY_BLOCKS = ("ceildiv", "seqlen_kv", BLOCK)
_HEADS_PER_BLOCK = ("ceildiv", _GROUP, ("ceildiv", BLOCKS, ("*", "kv_heads", _KEY_BLOCKS)))
#: 1 if a group is shared, else 0.
_SHARED = ("steps", ("ceildiv", _GROUP, _HEADS_PER_BLOCK), (0, 0), (2, 1))


def scalars() -> tuple[Scalar, ...]:
    """How many query heads of a group a block visits; the batch has no say, so that a sequence's bits are its own."""
    return (Scalar("heads_per_block", _HEADS_PER_BLOCK),)


def workspaces(pattern: Pattern, config: Config) -> tuple[Workspace, ...]:
    """Sums of dq, tile by tile in the order of accumulators, and how far each block has come; the same of dk and dv,
    where a group is shared."""
    blocks = ("*", "batch", "kv_heads", _KEY_BLOCKS, _SHARED)
    tile = config.block_m * panels(pattern.head_dim) * PANEL
    return (
        Workspace("dq_sums", "float32", (("*", "batch", "heads", ("ceildiv", "seqlen_q", config.block_m), tile),)),
        Workspace("progress", "int32", (("*", "batch", "heads", ("ceildiv", "seqlen_kv", BLOCK), WARPS),), zeroed=True),
        Workspace("dk_sums", "float32", (("max", 4, ("*", blocks, BLOCK * pattern.head_dim)),)),
        Workspace("dv_sums", "float32", (("max", 4, ("*", blocks, BLOCK * pattern.head_dim_v)),)),
        Workspace("parts_done", "int32", (("max", 4, ("*", blocks, CONSUMERS * WARPS)),), zeroed=True),
    )


def build(pattern: Pattern, config: Config, traversal: Traversal, name: str) -> ScheduledLaunch:
    """The launch of a pattern."""
    func = parameterised(pattern, lambda parameters: _kernel(pattern, config, traversal, parameters))
    return ScheduledLaunch(func.with_attr("global_symbol", name), (*ROLES, *(p.name for p in pattern.params)))


def _kernel(pattern: Pattern, config: Config, traversal: Traversal, parameters: dict) -> PrimFunc:
    dtype, M, N, D, E = pattern.dtype, config.block_m, BLOCK, pattern.head_dim, pattern.head_dim_v
    sums_registers, consumer_registers = JOINT_REGISTERS
    others = WARPS * CONSUMERS  # the first warp after the consumers'

    @T.prim_func(check_well_formed=False)
    def backward(
        q: T.handle,
        k: T.handle,
        v: T.handle,
        do: T.handle,
        lse: T.handle,
        delta: T.handle,
        dk: T.handle,
        dv: T.handle,
        softmax_scale: T.float32,
        dq_sums: T.handle,
        progress: T.handle,
        heads_per_block: T.int32,
        dk_sums: T.handle,
        dv_sums: T.handle,
        parts_done: T.handle,
    ):
        tensors = Tensors(
            pattern,
            traversal,
            {"q": q, "k": k, "v": v, "do": do, "dk": dk, "dv": dv, "lse": lse, "delta": delta},
            softmax_scale,
            parameters,
        )
        sums_length = T.int64()
        sums = T.match_buffer(dq_sums, (sums_length,), "float32", align=16)
        progress_length = T.int32()
        counts = T.match_buffer(progress, (progress_length,), "int32", align=4)
        dk_length, dv_length, done_length = T.int64(), T.int64(), T.int32()
        of_dk = T.match_buffer(dk_sums, (dk_length,), "float32", align=16)
        of_dv = T.match_buffer(dv_sums, (dv_length,), "float32", align=16)
        done = T.match_buffer(parts_done, (done_length,), "int32", align=4)
        gradients = T.meta_var(tensors.gradients)
        scheduler = SectionScheduler(tensors, config, heads_per_block)
        # 1. Descriptors of the tensors, made on the host.
        q_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(encode_keys(q_map, tensors.q, M))
        do_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(encode_keys(do_map, gradients["do"], M))
        k_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(encode_keys(k_map, tensors.k, N))
        v_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(encode_keys(v_map, tensors.v, N))
        dk_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(encode_keys(dk_map, gradients["dk"], WARP_ROWS))
        dv_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(encode_keys(dv_map, gradients["dv"], WARP_ROWS))
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
        ds = Pipeline(pool, 2, M // PANEL, N, dtype)
        shifts = pool.alloc((config.num_stages, M), "float32", align=16)
        starts = pool.alloc((config.num_stages, M), "float32", align=16)
        k_tile.add_barriers(pool)
        v_tile.add_barriers(pool)
        q_pipeline.add_barriers(pool)
        do_pipeline.add_barriers(pool)
        ds.add_barriers(pool)
        pool.commit()
        if warp == others:  # only a whole warp may elect
            if T.cuda.elect_sync():
                k_tile.init(consumer_arrivals(CONSUMERS))
                v_tile.init(consumer_arrivals(CONSUMERS))
                q_pipeline.init(consumer_arrivals(CONSUMERS), PRODUCER_ARRIVALS + M // 32)
                do_pipeline.init(consumer_arrivals(CONSUMERS), PRODUCER_ARRIVALS + M // 32)
                ds.init(WARPS, consumer_arrivals(CONSUMERS))
                T.ptx.fence.mbarrier_init.release.cluster()
        T.cuda.cta_sync()
        # 4. Tasks.
        block = KeyBlock(pattern, config, tensors, scheduler, (x, y, z))
        pipelines = T.meta_var((q_pipeline, k_tile, v_tile, do_pipeline))
        if scheduler.exists((x, y, z)):
            if warp >= others:
                T.ptx["setmaxnreg.dec.sync.aligned.u32"](sums_registers)
                maps = T.meta_var((q_map, k_map, v_map, do_map))
                memory = T.meta_var((flat(sums), flat(counts)))
                numbers = T.meta_var((shifts, starts))
                QuerySums(pattern, config, block, pipelines, maps, numbers, ds, *memory, warp - others, lane).run()
            else:
                T.ptx["setmaxnreg.inc.sync.aligned.u32"](consumer_registers)
                parts = T.meta_var(Parts(block, scheduler.parts, flat(of_dk), flat(of_dv), flat(done), warp, lane))
                JointConsumer(
                    pattern, config, block, pipelines, shifts, starts, ds, parts, warp // WARPS, warp % WARPS, lane
                ).run(dk_map, dv_map)

    return backward
