"""The Hopper kernel: one to four consumer warpgroups, one that feeds them, and rings of tiles between them.

Each warp of the feeding warpgroup has one task, which one thread of it does: fetch K, fetch V, fetch the queries of
further row tiles, store what the consumers have written.  So none of these waits for another.
"""

from __future__ import annotations

from tvm.backend.cuda.lang import SMEMPool
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.pattern import Pattern
from schedules.families.interface import Traversal
from schedules.families.sm90.block import Block, Places, Walk
from schedules.families.sm90.config import WARPGROUP_ROWS, Config, panels, q_stages
from schedules.families.sm90.consumer import Consumer
from schedules.families.sm90.copy import Ring, encode_keys, encode_queries
from schedules.families.sm90.output import output
from schedules.families.sm90.rows import Rows
from schedules.tile.geometry import Geometry, parameterised

ALIGNMENT = 16  # bytes; what TMA asks of addresses and strides


def build(pattern: Pattern, config: Config, traversal: Traversal, name: str) -> PrimFunc:
    """The kernel of a pattern."""
    return parameterised(pattern, lambda parameters: _kernel(pattern, config, traversal, parameters)).with_attr(
        "global_symbol", name
    )


@T.inline
def _open(block, q, k, q_map, k_map):
    """Fetch the first tiles of Q and K, before any other thread needs to be ready."""
    walk = Walk(block, 0, block.config.block_m)
    q.fetch(0, q_map, block.queries(0))
    k.fetch(0, k_map, block.keys(walk.key_first(0)))


@T.inline
def _fetch_keys(block, ring, descriptor, first):
    """Fill the ring of K or of V, from tile ``first`` on."""
    n: T.int32 = 0
    for t in T.serial(block.tiles):
        if block.config.several_tiles:  # noqa: SIM102, decided when the kernel is made
            if t > 0:
                block.advance()
        walk = Walk(block, 0, block.config.block_m)
        for i in T.serial(walk.steps):
            if T.Or(i == 0, walk.live(i)) if block.pattern.has_gaps else True:
                if n >= first:
                    ring.load(n, descriptor, block.keys(walk.key_first(i)))
                n = n + 1


@T.inline
def _fetch_queries(block, q, q_map):
    """Fetch the queries of each row tile after the first."""
    for t in T.serial(1, block.tiles):
        block.advance()
        q.load(t, q_map, block.queries(0))


@T.inline
def _store(block, finished, o_map):
    """Store finished row tiles."""
    for t in T.serial(block.tiles):
        if block.config.several_tiles:  # noqa: SIM102, decided when the kernel is made
            if t > 0:
                block.advance()
        finished.store(block, t, o_map)


def _kernel(pattern: Pattern, config: Config, traversal: Traversal, parameters: dict) -> PrimFunc:
    dtype = pattern.dtype
    feeder_registers, consumer_registers = config.registers
    consumers = config.num_consumer_warpgroups
    feeder = 4 * consumers  # the first warp after theirs

    @T.prim_func(check_well_formed=False)
    def attention(q: T.handle, k: T.handle, v: T.handle, o: T.handle, lse: T.handle, softmax_scale: T.float32):
        geometry = Geometry(pattern, traversal, (q, k, v, o, lse), softmax_scale, parameters, ALIGNMENT)
        rows = Rows(config, geometry)
        places = Places(geometry, rows, config)
        # 1. Descriptors of the tensors, made on the host.
        q_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(encode_queries(q_map, geometry.q, rows, config.block_m))
        k_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(encode_keys(k_map, geometry.k, config.block_n))
        v_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(encode_keys(v_map, geometry.v, config.block_n))
        o_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        T.evaluate(encode_queries(o_map, geometry.o, rows, WARPGROUP_ROWS))
        # 2. Blocks, warps, lanes.
        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": config.blocks_per_sm})
        x, y, z = T.cta_id(places.grid())
        warp = T.warp_id([config.threads // 32])
        lane = T.lane_id([32])
        T.thread_id([config.threads])
        # 3. Shared memory: queries of row tiles, rings of keys and values, perhaps outputs, barriers.
        pool = SMEMPool()
        q_ring = Ring(pool, q_stages(pattern, config), panels(pattern.head_dim), config.block_m, dtype)
        k_ring = Ring(pool, config.num_stages, panels(pattern.head_dim), config.block_n, dtype)
        v_ring = Ring(pool, config.num_stages, panels(pattern.head_dim_v), config.block_n, dtype)
        finished = output(pattern, config, pool, q_ring)
        q_ring.add_barriers(pool)
        k_ring.add_barriers(pool)
        v_ring.add_barriers(pool)
        finished.add_barriers(pool)
        pool.commit()
        if warp == feeder:  # noqa: SIM102, only a whole warp may elect
            if T.cuda.elect_sync():
                q_ring.init(finished.releases)
                k_ring.init(4 * consumers)
                v_ring.init(4 * consumers)
                finished.init()
                T.ptx.fence.mbarrier_init.release.cluster()
                _open(Block(pattern, config, geometry, rows, places, (x, y, z)), q_ring, k_ring, q_map, k_map)
        T.cuda.cta_sync()
        # 4. Tasks.
        block = Block(pattern, config, geometry, rows, places, (x, y, z))
        if warp >= feeder:
            T.ptx["setmaxnreg.dec.sync.aligned.u32"](feeder_registers)
            if warp == feeder:  # noqa: SIM102, as above
                if T.cuda.elect_sync():
                    _fetch_keys(block, k_ring, k_map, 1)
            if warp == feeder + 1:  # noqa: SIM102, as above
                if T.cuda.elect_sync():
                    _fetch_keys(block, v_ring, v_map, 0)
            if warp == feeder + 2:  # noqa: SIM102, as above
                if T.cuda.elect_sync():
                    _fetch_queries(block, q_ring, q_map)
            if warp == feeder + 3:  # noqa: SIM102, as above
                if T.cuda.elect_sync():
                    _store(block, finished, o_map)
        else:
            T.ptx["setmaxnreg.inc.sync.aligned.u32"](consumer_registers)
            consumer = Consumer(pattern, config, block, (q_ring, k_ring, v_ring), finished, warp // 4, warp % 4, lane)
            consumer.run()

    return attention
