"""What the mma.sync families share: the order of work tiles, the walk over key tiles, the epilogue.

A family brings a machine (:mod:`schedules.families.mma.machine`): how tiles are copied and multiplied, with
``start()``, ``step(tile, masked, tracked)`` for each tile of keys from right to left, and ``finish()``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tvm.backend.cuda.lang import SMEMPool
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.pattern import Pattern
from schedules.families.interface import Program, forward_program
from schedules.families.mma.paired import PART_COLUMNS
from schedules.families.mma.registers import anew, fresh
from schedules.families.ranged import own_name, with_ranges, with_tiles
from schedules.tile.dtypes import tensor_types
from schedules.tile.epilogue import normalise, store_lse, store_rows
from schedules.tile.geometry import Geometry, PagedGeometry, RaggedGeometry, flat, parameterised, site
from schedules.tile.key_range import KeyTiles, in_parts, is_full, next_visible
from schedules.tile.key_source import ContiguousRows
from schedules.tile.mask_lists import LEFTWARDS
from schedules.tile.merge import merge_rows
from schedules.tile.parameters import Parameters
from schedules.tile.slots import WORDS, FoundTile, Own
from schedules.tile.static import static
from schedules.tile.tile_scheduler import InOneRow, Order, Place, Traversal, WorkTile, longest_first
from tvm_flash.packs import sizes

ALIGNMENT = 16
INDEX_BITS = 32


#: Size of row sum and output from which a row is computed again.
_LARGEST_SUM = {"float16": math.inf, "bfloat16": 1e30}


def scheduler(pattern: Pattern, config, traversal: Traversal, geometry: Geometry) -> Order:
    """The order in which a template takes the work tiles.

    A section of a seq-outer order is as many heads as ``section_mib`` MiB of keys and values are, or one.
    """
    types = tensor_types(pattern)
    row_bytes = types.k.bytes * pattern.head_dim + types.v.bytes * pattern.head_dim_v

    def section() -> Expr:
        keys = T.truncdiv(config.section_mib * 2**20 // row_bytes, T.max(geometry.keys.usual_length, 1))
        group = T.truncdiv(geometry.heads, geometry.kv_heads)
        return T.min(T.max(keys, 1) * group, work.batch * work.heads)

    work = geometry.work(config.block_m)
    return traversal.order(work, section)


def narrow_axes(config, traversal: Traversal) -> tuple[sizes.Expression, ...]:
    """What a dense launch has along the second and the third axis of its grid, where that may be a large number."""
    if traversal.layout == "bhsd":
        return "heads", "batch"
    return (("ceildiv", "seqlen_q", config.block_m),)  # sections fill the caches, and are few


def this_place(x: Expr | None = None, y: Expr | None = None, z: Expr | None = None) -> Place:
    """This block's place; indices that aren't given are read anew."""
    x, y, z = (fresh(f"ctaid.{axis}") if i is None else i for axis, i in zip("xyz", (x, y, z), strict=True))
    return Place(x, y, z, fresh("nctaid.x"))


@dataclass(frozen=True)
class DenseBlocks:
    """Which work tile a block has, where that follows from its place: the longest under a causal mask first."""

    order: Order
    pool = None

    def grid(self) -> tuple[Expr, Expr, Expr]:
        """Blocks along each axis."""
        return self.order.grid()

    def exists(self, place: Place) -> Expr:
        """Whether the block at a place has a work tile."""
        return self.order.exists(place)

    def work_tile(self, place: Place) -> WorkTile:
        """The work tile of a place."""
        tile = self.order.work_tile(place)
        return tile._replace(m_block=longest_first(tile.m_block, self.order.work.m_blocks))


@T.meta_class
class RaggedBlocks:
    """Which work tile a block has, where it looks that up: the blocks are in one row, one for each head and slot."""

    def __init__(self, order: Order):
        self.order = InOneRow(order)
        # An array of known size would move the tiles to an address that the swizzle doesn't expect.
        self.pool = SMEMPool()
        self.found = FoundTile(self.pool.alloc((WORDS,), "int32"))

    def grid(self) -> tuple[Expr, Expr, Expr]:
        """Blocks along each axis."""
        return self.order.grid()

    @T.inline
    def find(self, geometry: Geometry, rows):
        """All threads: look up the block's tile of ``rows`` rows."""
        thread: T.int32 = fresh("tid.x")
        if thread < 32:
            place: T.int32 = fresh("ctaid.x")
            at = T.meta_var(Place(place, 0, 0, 0))
            item = T.meta_var(self.order.work_tile(at))
            slot: T.int32 = item.m_block
            self.found.look_up(geometry.queries, geometry.keys, rows, item._replace(m_block=slot), thread)
            if T.And(thread == 0, T.Not(self.order.exists(at))):
                self.found.leave_out()
        T.cuda.cta_sync()

    def sequences(self) -> tuple[Own, Own]:
        """Those of queries and keys of the tile that was found."""
        return Own(self.found.queries), Own(self.found.keys)

    def exists(self, place: Place) -> Expr:
        """Whether the block has a work tile."""
        return self.found.exists

    def work_tile(self, place: Place) -> WorkTile:
        """The work tile that was found."""
        return WorkTile(self.found.sequence, self.found.head, self.found.m_block)


@T.inline
def walk(pattern: Pattern, at, tiles: KeyTiles, rows, block_n, careful, step):
    """``step(tile, masked, tracked)`` for all tiles, from right to left; ``rows`` are the first and the last row.

    Tiles that every row sees whole go without mask and, once every row has a reference, without maxima, unless
    ``careful``, or scores are uneven: then a bias of −inf may have left a row without one.
    """
    if pattern.has_gaps:
        tile: T.int32 = tiles.end - 1
        while tile >= tiles.begin:
            if is_full(pattern, at, rows, tile, block_n):
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
                step(first - 1 - i, False, pattern.is_uneven)

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
def store_output(machine, queries, O):
    """Normalise and store the output of rows of ``queries`` by way of the warp's own rows of Q in shared memory."""
    g = T.meta_var(machine.geometry)
    normalise(machine.softmax, machine.O, machine.o_stride)
    stage_rows(machine, machine.q.tile, machine.O, machine.o_stride)
    rows = T.meta_var(machine.fragment.tile_rows // machine.parts)
    store_rows(
        g.o, queries, machine.at.b, machine.at.h, O, machine.q.tile, machine.warp_row + machine.part * rows,
        machine.row_first, machine.lane, machine.m_tiles, machine.tile_step, rows,
    )  # fmt: skip


@T.inline
def merge_output(machine, queries, LSE, O):
    """Put the results of rows of ``queries`` into those of other keys."""
    g = T.meta_var(machine.geometry)
    softmax = T.meta_var(machine.softmax)
    column: T.int32 = machine.fragment.column(machine.lane) + machine.part * PART_COLUMNS
    merge_rows(
        softmax, machine.O, machine.o_stride, g.head_dim_v, O, LSE, column, machine.output_column,
        lambda t, r: softmax.position(machine.row0, 0, t, 0, r, 0)[0], queries.length,
        lambda row: g.lse_offset(machine.at.b, machine.at.h, queries.at(row)),
        lambda row: g.o.offset(machine.at.b, machine.at.h, queries.at(row), column),
        machine.sync_sharing_warps,
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
                bad = T.bitwise_or(bad, T.Select(row < machine.q.rows, fault, 0))
    careful = T.cuda.syncthreads_or(bad)


@T.inline
def attend(pattern: Pattern, config, geometry: Geometry, blocks, machine_type):
    """One block's work, of the block that ``blocks`` (:mod:`schedules.families.mma.blocks`) makes this one."""
    M, N = T.meta_var((config.block_m, config.block_n))
    careful: T.int32 = 0
    again: T.int32 = T.Cast("int32", blocks.exists(this_place()))
    while again != 0:
        # 1. Which rows of which head this block computes, and which tiles of keys they see.
        x: T.int32 = fresh("ctaid.x")
        y: T.int32 = fresh("ctaid.y")
        z: T.int32 = fresh("ctaid.z")
        tid: T.int32 = fresh("tid.x")
        block = T.meta_var(blocks.work_tile(this_place(x, y, z)))
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
        # 2. The online softmax over the tiles, from right to left.
        sources = T.meta_var(
            (
                ContiguousRows(geometry.q, b, h, queries),
                geometry.key_rows(geometry.k, b, kv_head, keys),
                geometry.key_rows(geometry.v, b, kv_head, keys),
            )
        )
        machine = machine_type(pattern, config, geometry, at, rows, tiles, sources, block, tid, blocks.pool)
        machine.start()
        walk(pattern, at, tiles, rows, N, careful, machine.step)
        machine.wait_for_copies()
        # 3. Once more, with care, if that went wrong.  Indices are read anew, so that none is kept until here.
        thread: T.int32 = fresh("tid.x")
        x1: T.int32 = fresh("ctaid.x")
        y1: T.int32 = fresh("ctaid.y")
        z1: T.int32 = fresh("ctaid.z")
        machine.place_block(blocks.work_tile(this_place(x1, y1, z1)), thread)
        look_for_faults(machine, careful)
        again = careful
        # 4. Log-sum-exp and output.
        if again == 0:
            machine.finish()
            LSE = flat(geometry.lse)
            O = flat(geometry.o.buffer)
            if static(geometry.merges):
                merge_output(machine, queries, LSE, O)
            else:
                store_lse(geometry, queries, machine.softmax, LSE, machine.row0, machine.lane)
                store_output(machine, queries, O)


@T.inline
def attend_sequences(pattern: Pattern, config, traversal: Traversal, geometry, machine_type):
    """The kernel's text from the device's entry on, where blocks look their work tiles up."""
    T.device_entry()
    T.attr({"tirx.launch_bounds_min_blocks_per_sm": config.min_blocks_per_sm})
    blocks = RaggedBlocks(scheduler(pattern, config, traversal, geometry))
    _x, _y, _z = T.cta_id([*blocks.grid()])
    _tid = T.thread_id([32 * config.num_warps])
    blocks.find(geometry, config.block_m)
    attend(pattern, config, geometry.at(*blocks.sequences()), blocks, machine_type)


def paged_kernel(pattern: Pattern, config, traversal: Traversal, name: str, machine_type) -> PrimFunc:
    """The same for ragged sequences whose keys lie on pages."""

    def make(values):
        @T.prim_func(check_well_formed=False)
        def attention(
            q: T.handle,
            k: T.handle,
            v: T.handle,
            o: T.handle,
            lse: T.handle,
            cu_seqlens_q: T.handle,
            seqlens_k: T.handle,
            page_table: T.handle,
            softmax_scale: T.float32,
        ):
            handles = T.meta_var(((q, k, v, o, lse), (cu_seqlens_q, seqlens_k, page_table)))
            geometry = PagedGeometry(pattern, *handles, softmax_scale, values, ALIGNMENT)
            attend_sequences(pattern, config, traversal, geometry, machine_type)

        return attention.with_attr("global_symbol", name)

    return parameterised(pattern, make)


def ragged_kernel(pattern: Pattern, config, traversal: Traversal, name: str, machine_type) -> PrimFunc:
    """The same for ragged sequences."""

    def make(values):
        @T.prim_func(check_well_formed=False)
        def attention(
            q: T.handle,
            k: T.handle,
            v: T.handle,
            o: T.handle,
            lse: T.handle,
            cu_seqlens_q: T.handle,
            cu_seqlens_k: T.handle,
            softmax_scale: T.float32,
        ):
            handles = T.meta_var(((q, k, v, o, lse), (cu_seqlens_q, cu_seqlens_k)))
            geometry = RaggedGeometry(pattern, traversal, *handles, softmax_scale, values, ALIGNMENT)
            attend_sequences(pattern, config, traversal, geometry, machine_type)

        return attention.with_attr("global_symbol", name)

    return parameterised(pattern, make)


def kernel(pattern: Pattern, config, traversal: Traversal, name: str, machine_type, geometry_type=Geometry) -> PrimFunc:
    """The kernel of a family whose ``machine_type`` does one block's work."""

    def make(values):
        @T.prim_func(check_well_formed=False)
        def attention(q: T.handle, k: T.handle, v: T.handle, o: T.handle, lse: T.handle, softmax_scale: T.float32):
            geometry = geometry_type(pattern, traversal, (q, k, v, o, lse), softmax_scale, values, ALIGNMENT)
            T.device_entry()
            T.attr({"tirx.launch_bounds_min_blocks_per_sm": config.min_blocks_per_sm})
            blocks = T.meta_var(DenseBlocks(scheduler(pattern, config, traversal, geometry)))
            _x, _y, _z = T.cta_id([*blocks.grid()])
            _tid = T.thread_id([32 * config.num_warps])
            attend(pattern, config, geometry, blocks, machine_type)

        return attention.with_attr("global_symbol", name)

    return parameterised(pattern, make)


def program(pattern: Pattern, config, traversal: Traversal, name: str, machine_type, geometry_type=Geometry) -> Program:
    """The program of a forward kernel; further arguments as in :func:`kernel`."""
    known = with_tiles(pattern, "i", config.block_m, config.block_n, order=LEFTWARDS)
    func = kernel(known, config, traversal, own_name(known, name), machine_type, geometry_type)
    axes = narrow_axes(config, traversal)
    attention = forward_program(
        func, known.params, "tirx", alignment=ALIGNMENT, index_bits=INDEX_BITS, narrow_axes=axes
    )
    return with_ranges(attention, traversal, name, known)
