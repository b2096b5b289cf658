"""The launch for dq: a block owns queries, two consumer warpgroups of 64 each, and visits keys, as the forward does."""

from __future__ import annotations

from tvm.backend.cuda.lang import SMEMPool
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.parameters import append_arguments
from schedules.definition.pattern import Pattern
from schedules.families.interface import ScheduledLaunch
from schedules.families.sm90.backward.config import BLOCK, CONSUMERS, Config, registers_of_queries
from schedules.families.sm90.backward.parameters import ParameterGradients
from schedules.families.sm90.backward.query_consumer import QueryConsumer
from schedules.families.sm90.backward.stores import WARP_ROWS
from schedules.families.sm90.barriers import WARPS, consumer_arrivals
from schedules.families.sm90.boxes import DenseBoxes
from schedules.families.sm90.config import panels
from schedules.families.sm90.packing import Rows
from schedules.families.sm90.pipeline import Pipeline
from schedules.families.sm90.producer import fetch_keys
from schedules.families.sm90.tile_scheduler import TileScheduler
from schedules.families.sm90.tma import encode_keys, encode_queries
from schedules.families.sm90.work_tile import Block
from schedules.tile.geometry import parameterised
from schedules.tile.gradients import Tensors
from schedules.tile.tile_scheduler import Traversal

#: Roles of the kernel's arguments, before the pattern's parameters and their gradients.
ROLES = ("q", "k", "v", "do", "lse", "delta", "dq", "softmax_scale")


def build(pattern: Pattern, config: Config, traversal: Traversal, name: str) -> ScheduledLaunch:
    """The launch of a pattern."""
    learnt = ParameterGradients(pattern, writes=False)
    func = parameterised(pattern, lambda parameters: _kernel(pattern, config, traversal, parameters, learnt))
    func = append_arguments(func, learnt.arguments).with_attr("global_symbol", name)
    return ScheduledLaunch(func, (*ROLES, *(p.name for p in pattern.params), *learnt.roles))


def _kernel(
    pattern: Pattern, config: Config, traversal: Traversal, parameters: dict, learnt: ParameterGradients
) -> PrimFunc:
    dtype, D, E = pattern.dtype, pattern.head_dim, pattern.head_dim_v
    tiles = config.for_queries
    producer_registers, consumer_registers = registers_of_queries(pattern, config)
    producer = WARPS * CONSUMERS  # the first warp after the consumers'

    @T.prim_func(check_well_formed=False)
    def backward(
        q: T.handle,
        k: T.handle,
        v: T.handle,
        do: T.handle,
        lse: T.handle,
        delta: T.handle,
        dq: T.handle,
        softmax_scale: T.float32,
    ):
        tensors = Tensors(
            pattern,
            traversal,
            {"q": q, "k": k, "v": v, "do": do, "dq": dq, "lse": lse, "delta": delta},
            softmax_scale,
            parameters,
        )
        gradients = T.meta_var(tensors.gradients)
        rows = Rows(tiles, tensors)
        scheduler = TileScheduler(tensors, rows, tiles)
        # 1. Descriptors of the tensors, made on the host.
        q_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(encode_queries(q_map, tensors.q, rows, BLOCK))
        do_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(encode_queries(do_map, gradients["do"], rows, BLOCK))
        k_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(encode_keys(k_map, tensors.k, tiles.block_n))
        v_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(encode_keys(v_map, tensors.v, tiles.block_n))
        dq_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(encode_queries(dq_map, gradients["dq"], rows, WARP_ROWS))
        # 2. Blocks, warps, lanes.
        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": 1})
        x, y, z = T.cta_id(scheduler.grid())
        warp = T.warp_id([config.threads // 32])
        lane = T.lane_id([32])
        T.thread_id([config.threads])
        # 3. Shared memory: the block's queries and gradients of outputs, pipelines of keys and values, barriers.
        pool = SMEMPool()
        q_tile = Pipeline(pool, 1, panels(D), BLOCK, dtype)
        do_tile = Pipeline(pool, 1, panels(E), BLOCK, dtype)
        k_pipeline = Pipeline(pool, tiles.num_stages, panels(D), tiles.block_n, dtype)
        v_pipeline = Pipeline(pool, tiles.num_stages, panels(E), tiles.block_n, dtype)
        q_tile.add_barriers(pool)
        do_tile.add_barriers(pool)
        k_pipeline.add_barriers(pool)
        v_pipeline.add_barriers(pool)
        pool.commit()
        block = Block(pattern, tiles, tensors, rows, scheduler, DenseBoxes(tensors, rows), (x, y, z))
        if warp == producer:  # only a whole warp may elect
            if T.cuda.elect_sync():
                q_tile.init(consumer_arrivals(CONSUMERS))
                do_tile.init(consumer_arrivals(CONSUMERS))
                k_pipeline.init(consumer_arrivals(CONSUMERS))
                v_pipeline.init(consumer_arrivals(CONSUMERS))
                T.ptx.fence.mbarrier_init.release.cluster()
        T.cuda.cta_sync()
        # 4. Tasks.
        if warp >= producer:
            T.ptx["setmaxnreg.dec.sync.aligned.u32"](producer_registers)
            if warp == producer:
                if T.cuda.elect_sync():
                    q_tile.load(q_tile.state(0), q_map, block.queries(0))
                    fetch_keys(block, k_pipeline, k_map, 0)
            if warp == producer + 1:
                if T.cuda.elect_sync():
                    do_tile.load(do_tile.state(0), do_map, block.queries(0))
                    fetch_keys(block, v_pipeline, v_map, 0)
        else:
            T.ptx["setmaxnreg.inc.sync.aligned.u32"](consumer_registers)
            pipelines = T.meta_var((q_tile, k_pipeline, v_pipeline, do_tile))
            consumer = QueryConsumer(
                pattern, tiles, block, pipelines, learnt, config.overlaps, warp // 4, warp % 4, lane
            )
            consumer.run(dq_map)

    return backward
