"""The Hopper kernel: one producer warpgroup, two or three consumers, and rings of K and V tiles between them."""

from __future__ import annotations

from tvm.backend.cuda.lang import SMEMPool
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.families.sm90.block import Block, Walk, grid
from schedules.families.sm90.config import REGISTERS, WARPGROUP_ROWS, Config, panels
from schedules.families.sm90.consumer import Consumer
from schedules.families.sm90.copy import Ring, encode
from schedules.geometry import Geometry, parameterised
from schedules.pattern import Pattern
from schedules.template import Traversal

ALIGNMENT = 16  # bytes; what TMA asks of addresses and strides


def build(pattern: Pattern, config: Config, traversal: Traversal, name: str) -> PrimFunc:
    """The kernel of a pattern."""
    return parameterised(pattern, lambda parameters: _kernel(pattern, config, traversal, parameters)).with_attr(
        "global_symbol", name
    )


@T.inline
def _open(block, rings, descriptors):
    """One thread, before any other needs to be ready: fetch the first tiles of Q and K."""
    row_first: T.int32 = block.row_first(0)
    walk = Walk(block, row_first)
    rings[0].fetch(0, descriptors[0], row_first, block.head, block.batch)
    rings[1].fetch(0, descriptors[1], walk.key_first(0), block.kv_head, block.batch)


@T.inline
def _produce(pattern, config, block, rings, descriptors):
    """One thread: fill the rings after that, K(n) before V(n−1), the order in which consumers ask for them."""
    q, k, v = rings
    q_map, k_map, v_map = descriptors
    n: T.int32 = 0
    v_row: T.int32 = 0
    for turn in T.serial(config.tiles_per_cta):
        row_first: T.int32 = block.row_first(turn)
        walk = Walk(block, row_first)
        for i in T.serial(walk.steps):
            if T.Or(i == 0, walk.live(row_first, i)) if pattern.has_gaps else True:
                if n > 0:
                    k.load(n, k_map, walk.key_first(i), block.kv_head, block.batch)
                    if config.tiles_per_cta == 2:  # noqa: SIM102, decided when the kernel is made
                        if i == 0:
                            q.fetch(1, q_map, row_first, block.head, block.batch)
                    v.load(n - 1, v_map, v_row, block.kv_head, block.batch)
                v_row = walk.key_first(i)
                n = n + 1
    v.load(n - 1, v_map, v_row, block.kv_head, block.batch)


def _kernel(pattern: Pattern, config: Config, traversal: Traversal, parameters: dict) -> PrimFunc:
    dtype = pattern.dtype
    producer_registers, consumer_registers = REGISTERS[config.num_consumer_warpgroups]

    @T.prim_func(check_well_formed=False)
    def attention(q: T.handle, k: T.handle, v: T.handle, o: T.handle, lse: T.handle, softmax_scale: T.float32):
        geometry = Geometry(pattern, traversal, (q, k, v, o, lse), softmax_scale, parameters, ALIGNMENT)
        # 1. Descriptors of the tensors, made on the host.
        q_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(encode(q_map, geometry.q, config.block_m))
        k_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(encode(k_map, geometry.k, config.block_n))
        v_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(encode(v_map, geometry.v, config.block_n))
        o_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(encode(o_map, geometry.o, WARPGROUP_ROWS))
        # 2. Blocks, warpgroups, warps.
        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": 1})
        x, y, z = T.cta_id(grid(geometry, config))
        warpgroup = T.warpgroup_id([config.num_consumer_warpgroups + 1])
        warp = T.warp_id_in_wg([4])
        lane = T.lane_id([32])
        T.thread_id([config.threads])
        # 3. Shared memory: queries of each row tile, rings of keys and values, barriers.
        pool = SMEMPool()
        q_ring = Ring(pool, config.tiles_per_cta, panels(pattern.head_dim), config.block_m, dtype)
        k_ring = Ring(pool, config.num_stages, panels(pattern.head_dim), config.block_n, dtype)
        v_ring = Ring(pool, config.num_stages, panels(pattern.head_dim_v), config.block_n, dtype)
        q_ring.add_barriers(pool)
        k_ring.add_barriers(pool)
        v_ring.add_barriers(pool)
        pool.commit()
        q_ring.init(4 * config.num_consumer_warpgroups)
        k_ring.init(4 * config.num_consumer_warpgroups)
        v_ring.init(4 * config.num_consumer_warpgroups)
        T.ptx.fence.mbarrier_init.release.cluster()
        block = Block(pattern, config, geometry, x, y, z)
        if T.cuda.thread_rank() == 0:
            _open(block, (q_ring, k_ring, v_ring), (q_map, k_map, v_map))
        T.cuda.cta_sync()
        # 4. Roles.
        if warpgroup == 0:
            T.ptx["setmaxnreg.dec.sync.aligned.u32"](producer_registers)
            if warp == 0:  # noqa: SIM102, only a whole warp may elect
                if T.cuda.elect_sync():
                    _produce(pattern, config, block, (q_ring, k_ring, v_ring), (q_map, k_map, v_map))
        else:
            T.ptx["setmaxnreg.inc.sync.aligned.u32"](consumer_registers)
            consumer = Consumer(pattern, config, block, (q_ring, k_ring, v_ring), warpgroup - 1, warp, lane)
            consumer.run(o_map)

    return attention
