"""What the mma.sync families share: grid order, swizzled shared tiles, the walk over key tiles, the epilogue.

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
from schedules.families.interface import SEQ_OUTER, Traversal
from schedules.families.mma.registers import anew, fresh
from schedules.tile.dtypes import tensor_types
from schedules.tile.epilogue import normalise, store_lse, store_rows
from schedules.tile.geometry import Geometry, KeyTiles, Parameters, flat, parameterised, site

ALIGNMENT = 16
INDEX_BITS = 32


#: Size of row sum and output from which a row is computed again.
_LARGEST_SUM = {"float16": math.inf, "bfloat16": 1e30}


def _section(pattern: Pattern, geometry: Geometry, mib: int) -> Expr:
    """How many heads, over all batches, are a section: their keys and values have ``mib`` MiB, or it is one head."""
    types = tensor_types(pattern)
    row_bytes = types.k.bytes * pattern.head_dim + types.v.bytes * pattern.head_dim_v
    keys = T.truncdiv(mib * 2**20 // row_bytes, T.max(geometry.seqlen_kv, 1))
    group = T.truncdiv(geometry.heads, geometry.kv_heads)
    return T.min(T.max(keys, 1) * group, geometry.batch * geometry.heads)


def _strips(geometry: Geometry, block_m: int) -> Expr:
    return T.truncdiv(geometry.seqlen_q + (block_m - 1), block_m)


def grid(pattern: Pattern, config, traversal: Traversal, geometry: Geometry) -> list[Expr]:
    """Blocks of a launch; the first is the fastest.

    Heads-outer takes all strips of a head, then those of the next; seq-outer one strip of all heads of a section.
    """
    strips = _strips(geometry, config.block_m)
    if traversal is not SEQ_OUTER:
        return [strips, geometry.heads, geometry.batch]
    section = _section(pattern, geometry, config.section_mib)
    return [section, strips, T.truncdiv(geometry.batch * geometry.heads + (section - 1), section)]


def block_of(config, traversal: Traversal, geometry: Geometry, x, y, z) -> tuple[Expr, Expr, Expr]:
    """Batch, head and row strip of a block.  Strips descend: under a causal mask the longest come first."""
    last = _strips(geometry, config.block_m) - 1
    if traversal is not SEQ_OUTER:
        return z, y, last - x
    pair = z * fresh("nctaid.x") + x
    return T.truncdiv(pair, geometry.heads), T.truncmod(pair, geometry.heads), last - y


def exists(traversal: Traversal, geometry: Geometry) -> Expr:
    """Whether a block has anything to do: the last section may have fewer heads than the others."""
    if traversal is not SEQ_OUTER:
        return T.bool(True)
    return fresh("ctaid.z") * fresh("nctaid.x") + fresh("ctaid.x") < geometry.batch * geometry.heads


@T.inline
def move_left(pattern: Pattern, at, tiles: KeyTiles, rows, block_n, tile):
    """``tile`` to the next tile on the left that has something to see, or below ``tiles.begin``."""
    tile = tile - 1
    if pattern.has_gaps:
        while T.And(
            tile >= tiles.begin,
            T.Not(pattern.tile_live(at, rows[0], rows[1], tile * block_n, tile * block_n + (block_n - 1))),
        ):
            tile = tile - 1


@T.inline
def walk(pattern: Pattern, at, tiles: KeyTiles, rows, block_n, careful, step):
    """``step(tile, masked, tracked)`` for all tiles, from right to left; ``rows`` are the first and the last row.

    Tiles that every row sees whole go without mask and, once every row has a reference, without maxima, unless
    ``careful``.
    """
    if pattern.has_gaps:
        tile: T.int32 = tiles.end - 1
        while tile >= tiles.begin:
            if pattern.tile_full(at, rows[0], rows[1], tile * block_n, tile * block_n + (block_n - 1)):
                step(tile, False, True)
            else:
                step(tile, True, True)
            move_left(pattern, at, tiles, rows, block_n, tile)
    else:
        plain_end: T.int32 = T.Select(careful != 0, tiles.begin, tiles.seen_end())
        plain_begin: T.int32 = T.min(tiles.full_begin, plain_end)
        for i in T.serial(tiles.end - plain_end):
            step(tiles.end - 1 - i, True, True)
        if tiles.has_full:
            for i in T.serial(plain_end - plain_begin):
                step(plain_end - 1 - i, False, False)
            if tiles.has_left:
                for i in T.serial(plain_begin - tiles.begin):
                    step(plain_begin - 1 - i, True, True)


@T.inline
def store_output(machine, O):
    """Normalise and store the output by way of the warp's own rows of Q in shared memory."""
    g = T.meta_var(machine.geometry)
    lane = T.meta_var(machine.lane)
    fragment = T.meta_var(machine.fragment)
    stride = T.meta_var(machine.o_stride)
    normalise(machine.softmax, machine.O, stride)
    element = T.meta_var(machine.types.o)
    word = T.alloc_local([1], "uint32")
    first = T.meta_var(machine.q.tile.address(machine.warp_row + fragment.row(lane), machine.part * 2))
    to: T.uint32 = first + T.Cast("uint32", fragment.column(lane) * element.bytes)
    machine.meet()
    for t in T.unroll(machine.m_tiles):
        for i in T.unroll(stride // 4):
            for r in T.unroll(2):
                o = T.meta_var(t * stride + i * 4 + r * 2)
                row = T.meta_var(t * machine.tile_step + r * fragment.row_step)
                column = T.meta_var(machine.output_column(i))
                machine.pack_pair(word, 0, machine.O[o], machine.O[o + 1])
                at = T.meta_var((column // element.chunk, column % element.chunk * element.bytes))
                T.ptx["st.shared.b32"](machine.q.tile.at(to, row, *at), word[0])
    machine.meet()
    rows = T.meta_var(fragment.tile_rows // machine.parts)
    store_rows(
        g, machine.at, O, machine.q.tile, machine.warp_row + machine.part * rows, machine.row_first, lane,
        machine.m_tiles, machine.tile_step, rows,
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
            _x, _y, _z = T.cta_id(grid(pattern, config, traversal, geometry))
            _tid = T.thread_id([32 * W])
            careful: T.int32 = 0
            again: T.int32 = T.Cast("int32", exists(traversal, geometry))
            while again != 0:
                # 2. Which rows of which head this block computes, and which tiles of keys they see.
                x: T.int32 = fresh("ctaid.x")
                y: T.int32 = fresh("ctaid.y")
                z: T.int32 = fresh("ctaid.z")
                tid: T.int32 = fresh("tid.x")
                block = T.meta_var(block_of(config, traversal, geometry, x, y, z))
                b: T.int32 = block[0]
                h: T.int32 = block[1]
                row_first: T.int32 = block[2] * M
                row_last: T.int32 = T.min(row_first + M, geometry.seqlen_q) - 1
                kv_head: T.int32 = T.truncdiv(h * geometry.kv_heads, geometry.heads)
                parameters = Parameters(geometry, b, h)
                # Without a mask ranges are the same for every block, and would be kept from outside the loop.
                seqlen_kv: T.int32 = anew(geometry.seqlen_kv) if pattern.is_unmasked else geometry.seqlen_kv
                at = T.meta_var(replace(site(geometry, parameters, b, h), seqlen_kv=seqlen_kv))
                rows = T.meta_var((row_first, row_last))
                tiles = KeyTiles(pattern, at, row_first, row_last, N)
                # 3. The online softmax over the tiles, from right to left.
                machine = machine_type(pattern, config, geometry, at, rows, tiles, kv_head, (b, h, block[2]), tid)
                machine.start()
                walk(pattern, at, tiles, rows, N, careful, machine.step)
                machine.settle()
                # 4. Once more, with care, if that went wrong.  Indices are read anew, so that none is kept until here.
                thread: T.int32 = fresh("tid.x")
                x1: T.int32 = fresh("ctaid.x")
                y1: T.int32 = fresh("ctaid.y")
                z1: T.int32 = fresh("ctaid.z")
                machine.place_block(*block_of(config, traversal, geometry, x1, y1, z1), thread)
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
