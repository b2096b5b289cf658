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
from schedules.tile.epilogue import normalise, store_lse, store_rows
from schedules.tile.geometry import Geometry, KeyTiles, Parameters, flat, parameterised, site

CHUNK = 8  # 16-bit elements in 16 bytes
ALIGNMENT = 16
INDEX_BITS = 32


#: Size of row sum and output from which a row is computed again.
_LARGEST_SUM = {"float16": math.inf, "bfloat16": 1e30}


def panel_columns(columns: int) -> int:
    """Columns of a shared-memory panel: 128 bytes where that divides the tile, else 64."""
    return 64 if columns % 64 == 0 else 32


@T.meta_class
class SharedTile:
    """``stages`` tiles of ``rows`` x ``columns`` 16-bit elements in shared memory.

    A tile is stored in panels of 64 (or 32) columns, ``[columns / panel][rows][panel]``; within a panel the 16-byte
    chunk ``c`` of a row stands at ``c ^ row`` (mod 8; for 32 columns ``c ^ row / 2`` mod 4): the eight rows that an
    ldmatrix or a warp's 16-byte stores touch lie in different banks.
    """

    def __init__(self, pool, stages: int, rows: int, columns: int, dtype: str):
        self.rows, self.columns, self.panel = rows, columns, panel_columns(columns)
        self.panel_chunks = self.panel // CHUNK
        self.panels = columns // self.panel
        self.panel_bytes = rows * self.panel * 2
        self.stage_bytes = rows * columns * 2
        self.buffer = pool.alloc((stages, self.panels, rows, self.panel), dtype, align=1024)

    def swizzled(self, row: Expr, chunk: Expr) -> Expr:
        """Where chunk ``chunk`` of a panel's row stands."""
        return T.bitwise_xor(chunk, row // (8 // self.panel_chunks) % self.panel_chunks)

    def pointer(self, stage, row: Expr, chunk: Expr, element: Expr = 0):
        """Pointer to element ``element`` of the 8 from column ``8 * chunk``."""
        within = self.swizzled(row, chunk % self.panel_chunks)
        return self.buffer.ptr_to([stage, chunk // self.panel_chunks, row, within * CHUNK + element])

    def address(self, row: Expr, chunk: Expr) -> Expr:
        """Shared address (uint32) of a chunk of the first panel, stage 0: ``at`` leads from it to any other step."""
        return T.cuda.cvta_generic_to_shared(self.buffer.ptr_to([0, 0, 0, 0])) + T.Cast(
            "uint32", row * (self.panel * 2) + self.swizzled(row, chunk) * 16
        )

    def at(self, address: Expr, row: int, chunk: int, byte: int = 0):
        """The operand ``row`` rows, ``chunk`` chunks and ``byte`` bytes on from ``address``.

        The swizzle makes the way within a panel an exclusive or: of the bits of row and chunk that it mixes, those that
        are set here must not be set at ``address``.
        """
        mixed = T.bitwise_xor(chunk % self.panel_chunks, row % 8 // (8 // self.panel_chunks))
        return T.ptx.addr(
            T.bitwise_xor(address, T.Cast("uint32", mixed * 16)),
            chunk // self.panel_chunks * self.panel_bytes + row * self.panel * 2 + byte,
        )


def _section(pattern: Pattern, geometry: Geometry, mib: int) -> Expr:
    """How many heads, over all batches, are a section: their keys and values have ``mib`` MiB, or it is one head."""
    keys = T.truncdiv(mib * 2**20 // (2 * (pattern.head_dim + pattern.head_dim_v)), T.max(geometry.seqlen_kv, 1))
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
    word = T.alloc_local([1], "uint32")
    first = T.meta_var(machine.q.tile.address(machine.warp_row + fragment.row(lane), machine.part * 2))
    to: T.uint32 = first + T.Cast("uint32", fragment.column(lane) * 2)
    machine.meet()
    for t in T.unroll(machine.m_tiles):
        for i in T.unroll(stride // 4):
            for r in T.unroll(2):
                o = T.meta_var(t * stride + i * 4 + r * 2)
                row = T.meta_var(t * machine.tile_step + r * fragment.row_step)
                column = T.meta_var(machine.output_column(i))
                machine.pack_pair(word, 0, machine.O[o], machine.O[o + 1])
                T.ptx["st.shared.b32"](machine.q.tile.at(to, row, column // CHUNK, column % CHUNK * 2), word[0])
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
