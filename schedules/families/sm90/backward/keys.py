"""The launch for dk and dv: a block owns keys, 64 of each of two consumer warpgroups or of both, and visits queries."""

from __future__ import annotations

from tvm.backend.cuda.lang import SMEMPool
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.parameters import append_arguments
from schedules.definition.pattern import Pattern
from schedules.families.interface import ScheduledLaunch
from schedules.families.row_terms import SHIFTS, STARTS
from schedules.families.sm90.backward.config import CONSUMERS, Config, registers_of_keys
from schedules.families.sm90.backward.key_consumer import KeyConsumer
from schedules.families.sm90.backward.key_producer import fetch_tiles
from schedules.families.sm90.backward.numbers import RowNumbers, row_numbers
from schedules.families.sm90.backward.parameters import ParameterGradients
from schedules.families.sm90.backward.stores import WARP_ROWS
from schedules.families.sm90.backward.walk import KeyBlock, KeyScheduler, key_blocks
from schedules.families.sm90.barriers import WARPS, consumer_arrivals
from schedules.families.sm90.config import panels
from schedules.families.sm90.pipeline import Pipeline
from schedules.tile.geometry import parameterised
from schedules.tile.gradients import Starts, tensors_of
from schedules.tile.place_gradients import Targets
from schedules.tile.static import static
from schedules.tile.tile_scheduler import Traversal

#: Roles of the kernel's arguments, before the pattern's parameters and their gradients.
ROLES = ("q", "k", "v", "do", SHIFTS, STARTS, "dk", "dv", "softmax_scale")


def build(
    pattern: Pattern,
    config: Config,
    traversal: Traversal,
    name: str,
    starts: Starts | None = None,
    adds: bool = False,
) -> ScheduledLaunch:
    """The launch of a pattern; ``starts`` says where ragged sequences begin.  ``adds``: results to what is there."""
    learnt, targets = ParameterGradients(pattern, writes=True, adds=adds), Targets(pattern, transposed=True)
    func = parameterised(
        pattern, lambda parameters: _kernel(pattern, config, traversal, parameters, learnt, targets, starts, adds)
    )
    func = append_arguments(func, [*learnt.arguments, *targets.arguments, *(starts.arguments if starts else ())])
    params = tuple(p.name for p in pattern.params)
    roles = (*ROLES, *params, *learnt.roles, *targets.roles, *(starts.roles if starts else ()))
    return ScheduledLaunch(func.with_attr("global_symbol", name), roles)


def _kernel(
    pattern: Pattern,
    config: Config,
    traversal: Traversal,
    parameters: dict,
    learnt: ParameterGradients,
    targets: Targets,
    starts: Starts | None,
    adds: bool,
) -> PrimFunc:
    dtype, M, N, D, E = pattern.dtype, config.block_m, config.block_keys, pattern.head_dim, pattern.head_dim_v
    producer_registers, consumer_registers = registers_of_keys(pattern, config)
    producer = WARPS * CONSUMERS  # the first warp after the consumers'

    @T.prim_func(check_well_formed=False)
    def backward(
        q: T.handle,
        k: T.handle,
        v: T.handle,
        do: T.handle,
        row_shifts: T.handle,
        row_starts: T.handle,
        dk: T.handle,
        dv: T.handle,
        softmax_scale: T.float32,
    ):
        handles = T.meta_var({"q": q, "k": k, "v": v, "do": do, "dk": dk, "dv": dv})
        tensors = T.meta_var(tensors_of(pattern, traversal, handles, starts, softmax_scale, parameters, adds=adds))
        memory = T.meta_var(row_numbers(row_shifts, row_starts))
        gradients = T.meta_var(tensors.gradients)
        blocks = T.meta_var(key_blocks(tensors, N))
        scheduler = KeyScheduler(tensors, blocks, config)
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
        # 3. Shared memory: the block's keys and values, pipelines of queries, what belongs to their rows, barriers.
        pool = SMEMPool()
        k_tile = Pipeline(pool, 1, panels(D), N, dtype)
        v_tile = Pipeline(pool, 1, panels(E), N, dtype)
        q_pipeline = Pipeline(pool, config.num_stages, panels(D), M, dtype)
        do_pipeline = Pipeline(pool, config.num_stages, panels(E), M, dtype)
        shifts = RowNumbers(pool, config.num_stages, M, memory[0])
        begins = RowNumbers(pool, config.num_stages, M, memory[1])
        k_tile.add_barriers(pool)
        v_tile.add_barriers(pool)
        q_pipeline.add_barriers(pool)
        do_pipeline.add_barriers(pool)
        blocks.add_memory(pool)
        learnt.add_memory(pool, config.threads // 32)
        pool.commit()
        place = T.meta_var(scheduler.place((x, y, z))[0])
        if warp == producer:  # only a whole warp may elect
            blocks.find(place, lane)
            if T.cuda.elect_sync():
                k_tile.init(consumer_arrivals(CONSUMERS))
                v_tile.init(consumer_arrivals(CONSUMERS))
                q_pipeline.init(consumer_arrivals(CONSUMERS))
                do_pipeline.init(consumer_arrivals(CONSUMERS))
                T.ptx.fence.mbarrier_init.release.cluster()
        T.cuda.cta_sync()
        block = KeyBlock(pattern, config, blocks, scheduler, (x, y, z))
        # 4. Gradients of parameters, by the first block of a head.
        if len(learnt.params) > 0:
            if blocks.begins(block):
                learnt.add(block.tensors, block.batch, block.kv_head, warp, config.threads // 32, lane)

        # 5. Tasks.
        @T.inline
        def work():
            if warp >= producer:
                T.ptx["setmaxnreg.dec.sync.aligned.u32"](producer_registers)
                if warp == producer:
                    if T.cuda.elect_sync():
                        fetch_tiles(block, k_tile, k_map, q_pipeline, q_map, shifts, tiles)
                if warp == producer + 1:
                    if T.cuda.elect_sync():
                        fetch_tiles(block, v_tile, v_map, do_pipeline, do_map, begins, tiles)
            else:
                T.ptx["setmaxnreg.inc.sync.aligned.u32"](consumer_registers)
                pipelines = T.meta_var((q_pipeline, k_tile, v_tile, do_pipeline))
                of_lane = T.meta_var(((shifts, begins), warp // WARPS, warp % WARPS, lane))
                if config.shares_keys:
                    if warp < WARPS:
                        KeyConsumer(pattern, config, block, pipelines, *of_lane, results="v").run(None, dv_map)
                    else:
                        KeyConsumer(pattern, config, block, pipelines, *of_lane, "k", targets).run(dk_map, None)
                else:
                    KeyConsumer(pattern, config, block, pipelines, *of_lane, targets=targets).run(dk_map, dv_map)

        if static(blocks.looks_up):
            if blocks.exists():
                work()
        else:
            work()

    return backward
