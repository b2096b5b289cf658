"""What the mma.sync families share: the order of work tiles, the walk over key tiles, the epilogue.

A family brings a machine (:mod:`schedules.families.mma.machine`): how tiles are copied and multiplied, with
``start()``, ``step(tile, masked, tracked)`` for each tile of keys from right to left, and ``finish()``.
"""

from __future__ import annotations

import math
from dataclasses import replace

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.pattern import Pattern
from schedules.families.mma.registers import anew, fresh
from schedules.tile.dtypes import tensor_types
from schedules.tile.epilogue import normalise, store_lse, store_rows
from schedules.tile.geometry import Geometry, Parameters, flat, parameterised, site
from schedules.tile.key_range import KeyTiles, in_parts, is_full, next_visible
from schedules.tile.key_source import ContiguousRows
from schedules.tile.tile_scheduler import Order, Place, Traversal, Work, WorkTile, ceildiv, longest_first

ALIGNMENT = 16
INDEX_BITS = 32


#: Size of row sum and output from which a row is computed again.
_LARGEST_SUM = {"float16": math.inf, "bfloat16": 1e30}


def scheduler(pattern: Pattern, config, traversal: Traversal, geometry: Geometry) -> Order:
    """The order in which a template takes the work tiles.

    A section of a seq-outer order is as many heads as ``section_mib`` MiB of keys and values are, or one.
    """
    work = Work(ceildiv(geometry.seqlen_q, config.block_m), geometry.heads, geometry.batch)
    types = tensor_types(pattern)
    row_bytes = types.k.bytes * pattern.head_dim + types.v.bytes * pattern.head_dim_v

    def section() -> Expr:
        keys = T.truncdiv(config.section_mib * 2**20 // row_bytes, T.max(geometry.seqlen_kv, 1))
        group = T.truncdiv(geometry.heads, geometry.kv_heads)
        return T.min(T.max(keys, 1) * group, geometry.batch * geometry.heads)

    return traversal.order(work, section)


def this_place(x: Expr | None = None, y: Expr | None = None, z: Expr | None = None) -> Place:
    """This block's place; indices that aren't given are read anew."""
    x, y, z = (fresh(f"ctaid.{axis}") if i is None else i for axis, i in zip("xyz", (x, y, z), strict=True))
    return Place(x, y, z, fresh("nctaid.x"))


def work_tile(order: Order, place: Place) -> WorkTile:
    """The work tile of a place, the longest under a causal mask first."""
    tile = order.work_tile(place)
    return tile._replace(m_block=longest_first(tile.m_block, order.work.m_blocks))


@T.inline
def walk(pattern: Pattern, at, tiles: KeyTiles, rows, block_n, careful, step):
    """``step(tile, masked, tracked)`` for all tiles, from right to left; ``rows`` are the first and the last row.

    Tiles that every row sees whole go without mask and, once every row has a reference, without maxima, unless
    ``careful``.
    """
    if pattern.has_gaps:
        tile: T.int32 = tiles.end - 1
        while tile >= tiles.begin:
            if is_full(pattern, at, rows, tile * block_n, block_n):
                step(tile, False, True)
            else:
                step(tile, True, True)
            next_visible(pattern, at, tiles, rows, block_n, tile)
    else:
        plain_end: T.int32 = T.Select(careful != 0, tiles.begin, tiles.seen_end())
        plain_begin: T.int32 = T.min(tiles.full_begin, plain_end)

        @T.inline
        def partly(first, last):
            for i in T.serial(first - last):
                step(first - 1 - i, True, True)

        @T.inline
        def fully(first, last):
            for i in T.serial(first - last):
                step(first - 1 - i, False, False)

        bounds = T.meta_var((tiles.end, plain_end, plain_begin, tiles.begin))
        in_parts(bounds, tiles.has_full, tiles.has_left, partly, fully)


@T.inline
def stage_rows(machine, tile, acc, stride):
    """A warp's accumulators, ``stride`` registers an m-tile, rounded, to its own rows of ``tile``.

    No warp reads these rows any more.
    """
    lane = T.meta_var(machine.lane)
    fragment = T.meta_var(machine.fragment)
    element = T.meta_var(tile.element)
    word = T.alloc_local([1], "uint32")
    first = T.meta_var(tile.address(machine.warp_row + fragment.row(lane), machine.part * 2))
    to: T.uint32 = first + T.Cast("uint32", fragment.column(lane) * element.bytes)
    machine.sync_sharing_warps()
    for t in T.unroll(machine.m_tiles):
        for i in T.unroll(stride // 4):
            for r in T.unroll(2):
                o = T.meta_var(t * stride + i * 4 + r * 2)
                row = T.meta_var(t * machine.tile_step + r * fragment.row_step)
                column = T.meta_var(machine.output_column(i))
                machine.pack_pair(word, 0, acc[o], acc[o + 1])
                at = T.meta_var((column // element.chunk, column % element.chunk * element.bytes))
                T.ptx["st.shared.b32"](tile.at(to, row, *at), word[0])
    machine.sync_sharing_warps()


@T.inline
def store_output(machine, O):
    """Normalise and store the output by way of the warp's own rows of Q in shared memory."""
    g = T.meta_var(machine.geometry)
    normalise(machine.softmax, machine.O, machine.o_stride)
    stage_rows(machine, machine.q.tile, machine.O, machine.o_stride)
    rows = T.meta_var(machine.fragment.tile_rows // machine.parts)
    store_rows(
        g.o, machine.at.b, machine.at.h, O, machine.q.tile, machine.warp_row + machine.part * rows, machine.row_first,
        machine.lane, machine.m_tiles, machine.tile_step, rows,
    )  # fmt: skip


@T.inline
def look_for_faults(machine, careful):
    """Set ``careful`` if some row of the block has to be computed again, with maxima; else clear it.

    Without maxima a probability may have left the range of the input's type.  It has become infinite then, and whatever
    it was multiplied with, the row's output isn't finite: one element of each row tells.  With bfloat16, whose range is
    float32's, the row sum tells first: below ``_LARGEST_SUM`` neither it nor the output has lost anything.
    """
    bad: T.int32 = 0
    if careful == 0:
        for t in T.unroll(machine.m_tiles):
            for r in T.unroll(2):
                i = T.meta_var(t * machine.o_stride + r * 2)
                row = T.meta_var(machine.softmax.position(machine.row0, 0, t, 0, r, 0)[0])
                size = T.meta_var(T.abs(machine.O[i]) + machine.softmax.row_sum[t * 2 + r])
                # not the negation of a comparison, which would be turned into one that NaN fails
                fault = T.meta_var(T.Select(size < T.float32(_LARGEST_SUM[machine.pattern.dtype]), 0, 1))
                bad = T.bitwise_or(bad, T.Select(row < machine.geometry.seqlen_q, fault, 0))
    careful = T.cuda.syncthreads_or(bad)


def kernel(pattern: Pattern, config, traversal: Traversal, name: str, machine_type) -> PrimFunc:
    """The kernel of a family whose ``machine_type`` does one block's work."""
    M, N, W = config.block_m, config.block_n, config.num_warps

    def make(values):
        @T.prim_func(check_well_formed=False)
        def attention(q: T.handle, k: T.handle, v: T.handle, o: T.handle, lse: T.handle, softmax_scale: T.float32):
            # 1. Arguments.
            geometry = Geometry(pattern, traversal, (q, k, v, o, lse), softmax_scale, values, ALIGNMENT)
            T.device_entry()
            T.attr({"tirx.launch_bounds_min_blocks_per_sm": config.min_blocks_per_sm})
            order = T.meta_var(scheduler(pattern, config, traversal, geometry))
            _x, _y, _z = T.cta_id([*order.grid()])
            _tid = T.thread_id([32 * W])
            careful: T.int32 = 0
            again: T.int32 = T.Cast("int32", order.exists(this_place()))
            while again != 0:
                # 2. Which rows of which head this block computes, and which tiles of keys they see.
                x: T.int32 = fresh("ctaid.x")
                y: T.int32 = fresh("ctaid.y")
                z: T.int32 = fresh("ctaid.z")
                tid: T.int32 = fresh("tid.x")
                block = T.meta_var(work_tile(order, this_place(x, y, z)))
                b: T.int32 = block.batch
                h: T.int32 = block.head
                queries = T.meta_var(geometry.queries.of(b))
                keys = T.meta_var(geometry.keys.of(b))
                row_first: T.int32 = block.m_block * M
                row_last: T.int32 = T.min(row_first + M, queries.length) - 1
                kv_head: T.int32 = geometry.kv_head(h)
                parameters = Parameters(geometry, b, h)
                # Without a mask ranges are the same for every block, and would be kept from outside the loop.
                seqlen_kv: T.int32 = anew(keys.length) if pattern.is_unmasked else keys.length
                at = T.meta_var(replace(site(geometry, parameters, b, h), seqlen_kv=seqlen_kv))
                rows = T.meta_var((row_first, row_last))
                tiles = KeyTiles(pattern, at, row_first, row_last, N)
                # 3. The online softmax over the tiles, from right to left.
                sources = T.meta_var(
                    (
                        ContiguousRows(geometry.q, b, h, queries),
                        ContiguousRows(geometry.k, b, kv_head, keys),
                        ContiguousRows(geometry.v, b, kv_head, keys),
                    )
                )
                machine = machine_type(pattern, config, geometry, at, rows, tiles, sources, block, tid)
                machine.start()
                walk(pattern, at, tiles, rows, N, careful, machine.step)
                machine.wait_for_copies()
                # 4. Once more, with care, if that went wrong.  Indices are read anew, so that none is kept until here.
                thread: T.int32 = fresh("tid.x")
                x1: T.int32 = fresh("ctaid.x")
                y1: T.int32 = fresh("ctaid.y")
                z1: T.int32 = fresh("ctaid.z")
                machine.place_block(work_tile(order, this_place(x1, y1, z1)), thread)
                look_for_faults(machine, careful)
                again = careful
                # 5. Log-sum-exp and output.
                if again == 0:
                    machine.finish()
                    LSE = flat(geometry.lse)
                    O = flat(geometry.o.buffer)
                    store_lse(geometry, machine.softmax, LSE, machine.row0, machine.lane)
                    store_output(machine, O)

        return attention.with_attr("global_symbol", name)

    return parameterised(pattern, make)
