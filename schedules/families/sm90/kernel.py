"""The Hopper kernel: one to four consumer warpgroups, the producer's warpgroup, and pipelines of tiles between them.

Who waits for whom is in ``barriers.py``, what happens when in ``steps.py`` and ``consumer.py``.
"""

from __future__ import annotations

from tvm.backend.cuda.lang import SMEMPool
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.pattern import Pattern
from schedules.families.sm90.barriers import WARPS, consumer_arrivals
from schedules.families.sm90.boxes import DenseBoxes
from schedules.families.sm90.config import WARPGROUP_ROWS, Config, panels, q_stages
from schedules.families.sm90.consumer import Consumer
from schedules.families.sm90.epilogue import epilogue
from schedules.families.sm90.packing import Rows
from schedules.families.sm90.pipeline import Pipeline
from schedules.families.sm90.producer import (
    fetch_keys,
    fetch_pages,
    fetch_queries,
    fetch_tensors,
    prologue,
    store_outputs,
)
from schedules.families.sm90.tensor_boxes import tensor_boxes
from schedules.families.sm90.tile_scheduler import TileScheduler
from schedules.families.sm90.work_tile import Block
from schedules.tile.geometry import Geometry, parameterised
from schedules.tile.static import static
from schedules.tile.tile_scheduler import Traversal

ALIGNMENT = 16  # bytes; what TMA asks of addresses and strides


def build(
    pattern: Pattern, config: Config, traversal: Traversal, name: str, geometry_type=Geometry, consumer_type=Consumer
) -> PrimFunc:
    """The kernel of a pattern."""
    func = parameterised(
        pattern,
        lambda parameters: _kernel(pattern, config, traversal, parameters, geometry_type, consumer_type),
    )
    return func.with_attr("global_symbol", name)


def _kernel(
    pattern: Pattern, config: Config, traversal: Traversal, parameters: dict, geometry_type, consumer_type
) -> PrimFunc:
    @T.prim_func(check_well_formed=False)
    def attention(q: T.handle, k: T.handle, v: T.handle, o: T.handle, lse: T.handle, softmax_scale: T.float32):
        geometry = geometry_type(pattern, traversal, (q, k, v, o, lse), softmax_scale, parameters, ALIGNMENT)
        rows = Rows(config, geometry)
        scheduler = TileScheduler(geometry, rows, config)
        tensors = T.meta_var(tensor_boxes(pattern, config, geometry))
        attend(pattern, config, geometry, rows, scheduler, DenseBoxes(geometry, rows, tensors), consumer_type)

    return attention


@T.inline
def attend(pattern: Pattern, config: Config, geometry: Geometry, rows: Rows, scheduler, boxes, consumer_type=Consumer):
    """The kernel's text, from the descriptors on."""
    producer_registers, consumer_registers = T.meta_var(config.registers)
    consumers = T.meta_var(config.num_consumer_warpgroups)
    producer = T.meta_var(WARPS * consumers)  # the first warp after theirs
    # 1. Descriptors of the tensors, made on the host.
    q_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
    T.evaluate(boxes.encode_queries(q_map, geometry.q, config.block_m))
    k_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
    if static(not boxes.widens):
        T.evaluate(boxes.encode_keys(k_map, geometry.k, config.block_n))
    v_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
    if static(not boxes.widens):
        T.evaluate(boxes.encode_keys(v_map, geometry.v, config.block_n))
    o_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
    if static(not geometry.merges):
        T.evaluate(boxes.encode_queries(o_map, geometry.o, WARPGROUP_ROWS))
    tensors = T.meta_var(boxes.tensors)
    if static(tensors is not None):
        tensor_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(tensors.encode(tensor_map))
    # 2. Blocks, warps, lanes.
    T.device_entry()
    T.attr({"tirx.launch_bounds_min_blocks_per_sm": config.blocks_per_sm})
    x, y, z = T.cta_id(scheduler.grid())
    warp = T.warp_id([config.threads // 32])
    lane = T.lane_id([32])
    T.thread_id([config.threads])
    # 3. Shared memory: queries of work tiles, pipelines of keys and values, perhaps outputs, barriers.
    dtype = T.meta_var(pattern.dtype)
    pool = SMEMPool()
    q_pipeline = Pipeline(pool, q_stages(pattern, config), panels(pattern.head_dim), config.block_m, dtype)
    k_pipeline = Pipeline(pool, config.num_stages, panels(pattern.head_dim), config.block_n, dtype)
    v_pipeline = Pipeline(pool, config.num_stages, panels(pattern.head_dim_v), config.block_n, dtype)
    finished = epilogue(pattern, config, pool, q_pipeline, geometry.merges)
    boxes.add_memory(pool)
    if static(tensors is not None):
        tensors.add_memory(pool)
    q_pipeline.add_barriers(pool)
    k_pipeline.add_barriers(pool)
    v_pipeline.add_barriers(pool)
    finished.add_barriers(pool)
    if static(tensors is not None):
        tensors.add_barriers(pool)
    scheduler.add_memory(pool)
    pool.commit()

    @T.inline
    def begin():
        prologue(
            Block(pattern, config, geometry, rows, scheduler, boxes, (x, y, z)), q_pipeline, k_pipeline, q_map, k_map
        )

    if warp == producer:  # only a whole warp may elect
        scheduler.find(x, lane)
        if T.cuda.elect_sync():
            q_pipeline.init(finished.releases)
            k_pipeline.init(consumer_arrivals(consumers), boxes.arrivals)
            v_pipeline.init(consumer_arrivals(consumers), boxes.arrivals)
            finished.init()
            if static(tensors is not None):
                tensors.init()
            scheduler.init()
            T.ptx.fence.mbarrier_init.release.cluster()
            scheduler.if_found(begin)
    T.cuda.cta_sync()

    # 4. Tasks.
    @T.inline
    def queries_and_outputs(block, first):
        if warp == first:
            if static(scheduler.looks_up):
                scheduler.feed(block, q_pipeline, q_map, lane)
            elif static(tensors is not None):
                fetch_tensors(block, tensors, tensor_map, lane, q_pipeline, q_map)
            else:
                if T.cuda.elect_sync():
                    fetch_queries(block, q_pipeline, q_map)
        if warp == first + 1:
            if static(finished.stores):
                if T.cuda.elect_sync():
                    store_outputs(block, finished, o_map)

    @T.inline
    def work():
        block = Block(pattern, config, geometry, rows, scheduler, boxes, (x, y, z))
        if warp >= producer:
            if static(boxes.widens):
                if warp < producer + WARPS:
                    boxes.produce(block, k_pipeline, v_pipeline, warp - producer, lane)
                else:
                    T.ptx["setmaxnreg.dec.sync.aligned.u32"](producer_registers)
                    queries_and_outputs(block, producer + WARPS)
            else:
                T.ptx["setmaxnreg.dec.sync.aligned.u32"](producer_registers)
                if warp == producer:
                    if static(boxes.by_pages):
                        fetch_pages(block, k_pipeline, geometry.k, k_map, lane)
                    else:
                        if T.cuda.elect_sync():
                            fetch_keys(block, k_pipeline, k_map, 1)
                if warp == producer + 1:
                    if static(boxes.by_pages):
                        fetch_pages(block, v_pipeline, geometry.v, v_map, lane)
                    else:
                        if T.cuda.elect_sync():
                            fetch_keys(block, v_pipeline, v_map, 0)
                queries_and_outputs(block, producer + 2)
        else:
            T.ptx["setmaxnreg.inc.sync.aligned.u32"](consumer_registers)
            pipelines = T.meta_var((q_pipeline, k_pipeline, v_pipeline))
            consumer = consumer_type(pattern, config, block, pipelines, finished, warp // 4, warp % 4, lane)
            consumer.run()

    scheduler.if_found(work)
