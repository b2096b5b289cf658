"""What the mma.sync families share: grid order, swizzled shared tiles, the walk over key tiles, the epilogue.

A family brings a machine (:mod:`schedules.families.machine`): how tiles are copied and multiplied, with ``start()``,
``step(tile, masked)`` for each tile of keys from right to left, and ``finish()``.
"""

from __future__ import annotations

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.epilogue import normalise, store_lse, store_rows
from schedules.geometry import Geometry, KeyTiles, Parameters, flat, parameterised, site
from schedules.pattern import Pattern
from schedules.template import SEQ_OUTER, Traversal

CHUNK = 8  # 16-bit elements in 16 bytes
ALIGNMENT = 16
INDEX_BITS = 32


_FRESH_INDEX = """
__forceinline__ __device__ int fresh_{name}() {{
  int x;
  asm volatile("mov.u32 %0, %%{register};" : "=r"(x));
  return x;
}}
"""


def fresh(register: str) -> Expr:
    """A special register such as ``"tid.x"``, read anew: nothing computed from it stays in registers across a loop.

    With S, P and O in registers there is no room for addresses, and ptxas would spill them.
    """
    name = register.replace(".", "_")
    source = _FRESH_INDEX.format(name=name, register=register)
    return T.cuda.func_call(f"fresh_{name}", source_code=source, return_type="int32")


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

    def at(self, address: Expr, row: int, step: int):
        """The operand ``row`` rows (a multiple of 8) and ``step`` pairs of chunks on from ``address``.

        A pair of chunks is 16 columns, what one k-step takes; the swizzle makes the way within a panel an exclusive or.
        """
        pairs = self.panel_chunks // 2
        return T.ptx.addr(
            T.bitwise_xor(address, T.Cast("uint32", step % pairs * 32)),
            step // pairs * self.panel_bytes + row * self.panel * 2,
        )


def grid(traversal: Traversal, geometry: Geometry, block_m: int) -> list[Expr]:
    """Blocks of a launch; the first is the fastest."""
    strips = T.truncdiv(geometry.seqlen_q + (block_m - 1), block_m)
    if traversal is SEQ_OUTER:
        return [geometry.heads, geometry.batch, strips]
    return [strips, geometry.heads, geometry.batch]


def block_of(traversal: Traversal, geometry: Geometry, block_m: int, x, y, z) -> tuple[Expr, Expr, Expr]:
    """Batch, head and row strip of a block.  Strips descend: under a causal mask the longest come first."""
    strips = T.truncdiv(geometry.seqlen_q + (block_m - 1), block_m)
    if traversal is SEQ_OUTER:
        return y, x, strips - 1 - z
    return z, y, strips - 1 - x


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
def walk(pattern: Pattern, at, tiles: KeyTiles, rows, block_n, step):
    """``step(tile, masked)`` for all tiles, from right to left; ``rows`` are the first and the last row."""
    if pattern.has_gaps:
        tile: T.int32 = tiles.end - 1
        while tile >= tiles.begin:
            if pattern.tile_full(at, rows[0], rows[1], tile * block_n, tile * block_n + (block_n - 1)):
                step(tile, False)
            else:
                step(tile, True)
            move_left(pattern, at, tiles, rows, block_n, tile)
    else:
        for i in T.serial(tiles.end - tiles.full_end):
            step(tiles.end - 1 - i, True)
        if tiles.has_full:
            for i in T.serial(tiles.full_end - tiles.full_begin):
                step(tiles.full_end - 1 - i, False)
            if tiles.has_left:
                for i in T.serial(tiles.full_begin - tiles.begin):
                    step(tiles.full_begin - 1 - i, True)


@T.inline
def store_output(machine, O):
    """Normalise and store the output by way of the warp's own rows of Q in shared memory."""
    g = T.meta_var(machine.geometry)
    lane = T.meta_var(machine.lane)
    fragment = T.meta_var(machine.fragment)
    stride = T.meta_var(machine.o_stride)
    normalise(machine.softmax, machine.O, stride)
    word = T.alloc_local([1], "uint32")
    T.cuda.warp_sync()
    for t in T.unroll(machine.m_tiles):
        for i in T.unroll(stride // 4):
            for r in T.unroll(2):
                row = T.meta_var(
                    machine.warp_row + fragment.row(lane) + (t * fragment.tile_rows + r * fragment.row_step)
                )
                column = T.meta_var(fragment.output_column(i, lane))
                machine.pack_pair(
                    word, 0, machine.O[t * stride + i * 4 + r * 2], machine.O[t * stride + i * 4 + r * 2 + 1]
                )
                T.ptx["st.shared.b32"](machine.q.tile.pointer(0, row, column // CHUNK, column % CHUNK), word[0])
    T.cuda.warp_sync()
    rows = T.meta_var(machine.m_tiles * fragment.tile_rows)
    store_rows(
        g,
        machine.at,
        O,
        machine.q.tile,
        machine.warp_row,
        machine.row_first + machine.warp_row,
        rows,
        machine.head_dim_v,
        lane,
    )


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
            # 2. Which rows of which head this block computes, and which tiles of keys they see.
            x, y, z = T.cta_id(grid(traversal, geometry, M))
            tid = T.thread_id([32 * W])
            block = T.meta_var(block_of(traversal, geometry, M, x, y, z))
            b = T.meta_var(block[0])
            h = T.meta_var(block[1])
            row_first: T.int32 = block[2] * M
            row_last: T.int32 = T.min(row_first + M, geometry.seqlen_q) - 1
            kv_head: T.int32 = T.truncdiv(h, T.truncdiv(geometry.heads, geometry.kv_heads))
            parameters = Parameters(geometry, b, h)
            at = T.meta_var(site(geometry, parameters, b, h))
            rows = T.meta_var((row_first, row_last))
            tiles = KeyTiles(pattern, at, row_first, row_last, N)
            # 3. The online softmax over the tiles, from right to left.
            machine = machine_type(pattern, config, geometry, at, rows, tiles, kv_head, block, tid)
            machine.start()
            walk(pattern, at, tiles, rows, N, machine.step)
            machine.finish()
            # 4. Log-sum-exp and output.
            LSE = flat(geometry.lse)
            O = flat(geometry.o.buffer)
            thread: T.int32 = fresh("tid.x")
            x1: T.int32 = fresh("ctaid.x")
            y1: T.int32 = fresh("ctaid.y")
            z1: T.int32 = fresh("ctaid.z")
            machine.place_block(*block_of(traversal, geometry, M, x1, y1, z1), thread)
            store_lse(geometry, machine.softmax, LSE, machine.row0, machine.lane)
            store_output(machine, O)

        return attention.with_attr("global_symbol", name)

    return parameterised(pattern, make)
