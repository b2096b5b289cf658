"""The launch for dq: a block owns queries, two consumer warpgroups of 64 each, and visits keys, as the forward does."""

from __future__ import annotations

from tvm.backend.cuda.lang import SMEMPool
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.parameters import append_arguments
from schedules.definition.pattern import Pattern
from schedules.families.interface import ScheduledLaunch
from schedules.families.row_terms import SHIFTS, STARTS
from schedules.families.sm90 import config as forward
from schedules.families.sm90.backward.config import BLOCK, CONSUMERS, Config, registers_of_queries
from schedules.families.sm90.backward.numbers import row_numbers
from schedules.families.sm90.backward.parameters import ParameterGradients
from schedules.families.sm90.backward.query_blocks import query_blocks
from schedules.families.sm90.backward.query_consumer import QueryConsumer
from schedules.families.sm90.backward.stores import WARP_ROWS
from schedules.families.sm90.barriers import WARPS, consumer_arrivals
from schedules.families.sm90.config import panels
from schedules.families.sm90.pipeline import Pipeline
from schedules.families.sm90.producer import fetch_keys, fetch_tensors
from schedules.families.sm90.tensor_boxes import TensorBoxes, tensor_boxes
from schedules.families.sm90.work_tile import Block
from schedules.tile.fragment import M16N8
from schedules.tile.geometry import Geometry, flat, parameterised
from schedules.tile.gradients import Starts, tensors_of
from schedules.tile.place_gradients import Targets
from schedules.tile.static import static
from schedules.tile.table_gradients import Slices, TableSums, learnt_tables
from schedules.tile.tile_scheduler import Traversal
from schedules.tile.weights import asks_for_whole

#: Roles of the kernel's arguments, before the pattern's parameters and their gradients.
ROLES = ("q", "k", "v", "do", SHIFTS, STARTS, "dq", "softmax_scale")


def build(
    pattern: Pattern,
    config: Config,
    traversal: Traversal,
    name: str,
    starts: Starts | None = None,
    adds: bool = False,
) -> ScheduledLaunch:
    """The launch of a pattern; ``starts`` says where ragged sequences begin.  ``adds``: results to what is there."""
    learnt, targets = ParameterGradients(pattern, writes=False), Targets(pattern, transposed=False)
    asked = (learnt, targets, TableSums(learnt_tables(pattern)))
    func = parameterised(
        pattern, lambda parameters: _kernel(pattern, config, traversal, parameters, asked, starts, adds)
    )
    others = (*asked, *([starts] if starts else []))
    func = append_arguments(func, [argument for x in others for argument in x.arguments])
    roles = (*ROLES, *(p.name for p in pattern.params), *(role for x in others for role in x.roles))
    return ScheduledLaunch(func.with_attr("global_symbol", name), roles)


def _slice_memory(pattern: Pattern, config: Config, pool):
    """Shared memory of the consumers' warps for what they add to tables, if there are any that are learnt."""
    return Slices(M16N8, config.block_n).memory(pool, WARPS * CONSUMERS) if learnt_tables(pattern) else None


def _boxes(pattern: Pattern, tiles: forward.Config, tensors: Geometry, targets: Targets) -> TensorBoxes | None:
    """What brings a tensor in boxes, where it differs from query to query and, at head_dim 64, no gradient of it is
    stored."""
    stores = [p for p in targets.params if p == forward.boxed(pattern)] if pattern.head_dim <= 64 else []
    unless = targets.is_wanted(stores[0], tensors) if stores else None
    return tensor_boxes(pattern, tiles, tensors, by_row=True, unless=unless)


def _kernel(
    pattern: Pattern,
    config: Config,
    traversal: Traversal,
    parameters: dict,
    asked: tuple[ParameterGradients, Targets, TableSums],
    starts: Starts | None,
    adds: bool,
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
        row_shifts: T.handle,
        row_starts: T.handle,
        dq: T.handle,
        softmax_scale: T.float32,
    ):
        handles = T.meta_var({"q": q, "k": k, "v": v, "do": do, "dq": dq})
        tensors = T.meta_var(tensors_of(pattern, traversal, handles, starts, softmax_scale, parameters, adds=adds))
        memory = T.meta_var(row_numbers(row_shifts, row_starts))
        gradients = T.meta_var(tensors.gradients)
        rows, scheduler, boxes = T.meta_var(query_blocks(pattern, tensors, tiles))
        boxed = T.meta_var(_boxes(pattern, tiles, tensors, asked[1]))
        places = T.bind(tensors.tiles_of_rows(config.block_m))
        # 1. Descriptors of the tensors, made on the host.
        q_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(boxes.encode_queries(q_map, tensors.q, BLOCK))
        do_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(boxes.encode_queries(do_map, gradients["do"], BLOCK))
        k_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(boxes.encode_keys(k_map, tensors.k, tiles.block_n))
        v_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(boxes.encode_keys(v_map, tensors.v, tiles.block_n))
        dq_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        if static(not adds):
            T.evaluate(boxes.encode_queries(dq_map, gradients["dq"], WARP_ROWS))
        if static(boxed is not None):
            tensor_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
            T.evaluate(boxed.encode(tensor_map))
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
        slice_memory = T.meta_var(_slice_memory(pattern, config, pool))
        if static(boxed is not None):
            boxed.add_memory(pool)
        q_tile.add_barriers(pool)
        do_tile.add_barriers(pool)
        k_pipeline.add_barriers(pool)
        v_pipeline.add_barriers(pool)
        if static(boxed is not None):
            boxed.add_barriers(pool)
        scheduler.add_memory(pool)
        pool.commit()
        if warp == producer:  # only a whole warp may elect
            scheduler.look_up((x, y, z), lane)
            if T.cuda.elect_sync():
                q_tile.init(consumer_arrivals(CONSUMERS))
                do_tile.init(consumer_arrivals(CONSUMERS))
                k_pipeline.init(consumer_arrivals(CONSUMERS))
                v_pipeline.init(consumer_arrivals(CONSUMERS))
                if static(boxed is not None):
                    boxed.init()
                T.ptx.fence.mbarrier_init.release.cluster()
        T.cuda.cta_sync()

        # 4. Tasks.
        @T.inline
        def consume(arguments):
            if static(boxed is None):
                QueryConsumer(*arguments).run(dq_map)
            elif boxed.usable != 0:
                QueryConsumer(*arguments, boxed).run(dq_map)
            else:
                QueryConsumer(*arguments).run(dq_map)

        @T.inline
        def work():
            block = Block(pattern, tiles, tensors, rows, scheduler, boxes, (x, y, z))
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
                if static(boxed is not None):
                    if warp == producer + 2:
                        fetch_tensors(block, boxed, tensor_map, lane)
            else:
                T.ptx["setmaxnreg.inc.sync.aligned.u32"](consumer_registers)
                pipelines = T.meta_var((q_tile, k_pipeline, v_pipeline, do_tile))
                numbers = T.meta_var((flat(memory[0]), flat(memory[1]), places, config.block_m))
                of_lane = T.meta_var((warp // 4, warp % 4, lane, slice_memory))
                arguments = T.meta_var((pattern, tiles, block, pipelines, numbers, asked, config.overlaps, *of_lane))
                consume(arguments)

        scheduler.if_found(work)
        if static(scheduler.looks_up and asks_for_whole(pattern)):
            asked[0].leave_nothing(tensors, rows, scheduler, (x, y, z), warp * 32 + lane)

    return backward
