"""Machines over caches of 8 bits: each widens elements where that costs least.

Decoding has one warp a block, so that nobody else has use for what it widens: bytes go from shared memory to registers
as ldmatrix lays out pairs of them, and become operands there.  Prompts have several warps that share a tile: each
thread widens the bytes that it copied, to a tile of 16 bits.  Turing has no asynchronous copies, and widens between
global memory and the tile.
"""

from __future__ import annotations

import functools

from tvm.script import tirx as T

from schedules.families.mma.asynchronous import DecodeMachine, Machine
from schedules.families.mma.ldmatrix import LOAD, LOAD_TRANSPOSED, LdmatrixProducts
from schedules.families.mma.machine import BlockMachine, PagedMatrix, Rows
from schedules.families.mma.registers import fresh
from schedules.families.mma.staged import StagedCopies, load_half_or_zero
from schedules.families.mma.widen import ScaledCopies, Widening, widening
from schedules.tile.exchange import operand_bytes
from schedules.tile.smem import SharedTile


@T.meta_class
class WarpMatrix(PagedMatrix):
    """Rows on pages that one warp copies, at most 32 a tile: each lane looks up one, and tells the others.

    ``own``: the page of the row that this lane looks up.
    """

    def __init__(self, source, tile, threads: int, thread, beside=None, ahead: bool = False):
        PagedMatrix.__init__(self, source, tile, threads, thread, beside, ahead)
        self.own = T.alloc_local([1], "int32") if self.looks else beside.own

    @T.inline
    def look_up(self, first):
        """The pages of all rows of a tile; a row that doesn't exist has no page, and none is read for it."""
        lane: T.int32 = fresh("tid.x")
        key: T.int32 = first + lane
        at = T.meta_var(self.source.split(T.max(key, 0)))
        row: T.int32 = at[1]
        self.own[0] = 0
        if T.And(lane < self.tile.rows, T.And(key >= 0, key < self.rows)):
            self.own[0] = self.source.entry(at[0])
        for i in T.unroll(self.passes):
            whose: T.int32 = self.row() + i * self.step
            self.rows_of_pages[i] = T.cuda.__shfl_sync(T.uint32(0xFFFFFFFF), row, whose, 32)
            self.pages[i] = T.cuda.__shfl_sync(T.uint32(0xFFFFFFFF), self.own[0], whose, 32)


def _of_lane(value, lane):
    """What a lane of the warp has."""
    return T.cuda.__shfl_sync(T.uint32(0xFFFFFFFF), value, lane, 32)


@T.meta_class
class LaneMatrix(PagedMatrix):
    """The same with fewer registers and products: a lane keeps page and row of its own row alone, and tells the others
    how far from the tensor's first element it lies when they copy it.

    ``own_row``: the row of the page; ``own_offset``: elements before the head's row.
    """

    def __init__(self, source, tile, threads: int, thread, beside=None, ahead: bool = False):
        Rows.__init__(self, source, tile, threads)
        self.ahead, self.looks = ahead, beside is None
        self.own, self.own_row = (
            (T.alloc_local([1], "int32"), T.alloc_local([1], "int32")) if self.looks else (beside.own, beside.own_row)
        )
        self.own_offset = T.alloc_local([1], "int64")

    def place(self, start, first, i):
        return start + _of_lane(self.own_offset[0], self.row() + i * self.step)

    @T.inline
    def look_up(self, first):
        """The page of this lane's row of a tile; a row that doesn't exist has no page, and none is read for it."""
        lane: T.int32 = fresh("tid.x")
        key: T.int32 = first + lane
        at = T.meta_var(self.source.split(T.max(key, 0)))
        self.own_row[0] = at[1]
        self.own[0] = 0
        if T.And(lane < self.tile.rows, T.And(key >= 0, key < self.rows)):
            self.own[0] = self.source.entry(at[0])

    @T.inline
    def find(self, first):
        if self.looks and not self.ahead:
            self.look_up(first)
        self.own_offset[0] = self.source.offset(self.own[0], self.own_row[0], 0)


@T.meta_class
class ScaledDecodeMachine(ScaledCopies, DecodeMachine):
    """The machine of decoding, over a cache of one dtype.

    Columns of the output lie otherwise than with 16 bits: the transposing ldmatrix gives a lane two neighbouring
    columns of two keys, so that of each 16 columns the even ones are in one fragment and the odd ones in the next.
    """

    on_pages = WarpMatrix

    @T.inline
    def copy_scales(self, matrix, which, stage, tile_first, live):
        """Start copying the scales of a tile's rows: each lane that of the row that it has looked up."""
        lane: T.int32 = fresh("tid.x")
        if lane < matrix.tile.rows:
            to: T.uint32 = T.cuda.cvta_generic_to_shared(self.row_scales[which].ptr_to([stage, lane]))
            self.copy_scale(which, T.ptx.addr(to, 0), matrix.own[0], T.And(live, tile_first + lane < matrix.rows))

    def place_operands(self):
        """What this lane hands to ldmatrix, and the registers of bytes, scales and operands."""
        self.place_words()
        LdmatrixProducts.place_operands(self)

    def place_words(self):
        """The registers of bytes and scales."""
        self.place_scales()
        self.words = T.alloc_local([4], "uint32")
        self.key_scales = T.alloc_local([self.config.block_n // 8], "float32")
        self.value_scales = T.alloc_local([4], "float32")

    def place_fragments(self):
        """Bytes of 32 columns come at a time, so that there are two fragments of Q."""
        steps = self.head_dim // 16 if self.q_in_registers else 2
        self.A = T.alloc_local([steps * self.m_tiles * 4], "uint32")
        self.B = T.alloc_local([4], "uint32")
        self.P = T.alloc_local([self.m_tiles * 4], "uint32")

    def key_bytes(self, word):
        """The four elements of a row of K that this lane hands to a product, of a word of ldmatrix."""
        return operand_bytes(word, self.lane)

    @T.inline
    def scores(self, first=0):
        """S = Q K for the tile in use."""
        for i in T.unroll(self.config.block_n // 8):
            self.key_scales[i] = self.row_scales[0][self.use, i * 8 + self.lane // 4]
        LdmatrixProducts.scores(self, first)

    @T.inline
    def scores_from(self, q_place, k_place, first):
        """S = Q K, from the given addresses."""
        q_from: T.uint32 = q_place
        k_from: T.uint32 = k_place
        for i in T.unroll(self.m_tiles * self.s_stride):
            self.S[i] = T.float32(0)
        for k in T.unroll(self.head_dim // 32):
            if not self.q_in_registers:
                for half in T.unroll(2):
                    self.load_q(q_from, k * 2 + half, half * self.m_tiles * 4, 0)
            for n in T.unroll(self.config.block_n // 16):
                T.ptx[LOAD](*[self.words[x] for x in range(4)], self.k_tile.at(k_from, n * 16, k * 2))
                T.cuda.warp_sync()
                for half in T.unroll(2):
                    for group in T.unroll(2):
                        scale = T.meta_var(self.key_scales[n * 2 + group])
                        word: T.uint32 = self.key_bytes(self.words[group * 2 + half])
                        self.widen_word(word, lambda x, scale=scale: scale)
                        self.pack_pair(self.B, group * 2, self.floats[0], self.floats[1])
                        self.pack_pair(self.B, group * 2 + 1, self.floats[2], self.floats[3])
                    a = T.meta_var((k * 2 + half if self.q_in_registers else half) * self.m_tiles * 4)
                    for t in T.unroll(self.m_tiles):
                        self.multiply_pair(self.S, t * self.s_stride + n * 8, self.A, a + t * 4)

    @T.inline
    def accumulate(self, k, first=0):
        """O += P V for the k-th 16 keys of the tile in use."""
        v_from: T.uint32 = self.v_from + T.Cast("uint32", self.use * self.v_tile.stage_bytes)
        for x in T.unroll(4):
            key = T.meta_var(k * 16 + x // 2 * 8 + x % 2)
            self.value_scales[x] = self.row_scales[1][self.use, key + self.lane % 4 * 2]
        for n in T.unroll(self.head_dim_v // 32):
            T.ptx[LOAD_TRANSPOSED](*[self.words[x] for x in range(4)], self.v_tile.at(v_from, k * 16, n * 2))
            T.cuda.warp_sync()
            for half in T.unroll(2):
                for keys in T.unroll(2):
                    word = T.meta_var(self.words[half * 2 + keys])
                    self.widen_word(word, lambda x, keys=keys: self.value_scales[keys * 2 + x // 2])
                    self.pack_pair(self.B, keys, self.floats[0], self.floats[2])
                    self.pack_pair(self.B, keys + 2, self.floats[1], self.floats[3])
                for t in T.unroll(self.m_tiles):
                    self.multiply_pair(self.O, t * self.o_stride + (n * 2 + half) * 8, self.P, t * 4)

    def output_column(self, group):
        """First output column of a register group, counted from the first of this lane's."""
        return group // 2 * 16 + group % 2 * 2 + self.fragment.column(self.lane)

    @T.inline
    def finish(self):
        """The row sums are complete, and neighbouring columns beside each other."""
        BlockMachine.finish(self)
        for t in T.unroll(self.m_tiles):
            for n in T.unroll(self.head_dim_v // 16):
                for r in T.unroll(2):
                    i = T.meta_var(t * self.o_stride + n * 8 + r * 2)
                    odd: T.float32 = self.O[i + 4]
                    self.O[i + 4] = self.O[i + 1]
                    self.O[i + 1] = odd


@T.meta_class
class ScaledMachine(ScaledCopies, Machine):
    """The machine of prompts, over a cache of one dtype; it takes more than one stage."""

    def place_shared(self, pool):
        """Tiles of 16 bits, and the scales of the rows of each stage."""
        self.wide_tiles = [
            SharedTile(pool, 1, self.config.block_n, columns, element)
            for columns, element in ((self.head_dim, self.types.k), (self.head_dim_v, self.types.v))
        ]
        ScaledCopies.place_shared(self, pool)

    def place_operands(self):
        """Products read the tiles of 16 bits, which all stages share."""
        self.place_scales()
        self.words, self.packed = T.alloc_local([4], "uint32"), T.alloc_local([8], "uint32")
        self.k_tile, self.v_tile = self.wide_tiles
        self.k_tile.stage_bytes = self.v_tile.stage_bytes = 0
        LdmatrixProducts.place_operands(self)

    @T.inline
    def widen_tile(self, matrix, which):
        """The tile of the stage in use, to 16 bits; what no tensor has is 0, whatever the scale is."""
        tile = T.meta_var(self.wide_tiles[which])

        @T.inline
        def row(n, memory, shared, inside):
            T.ptx["ld.shared.v4.b32"](*[self.words[x] for x in range(4)], shared)
            at = T.meta_var(matrix.row() + T.truncdiv(n, matrix.tile.panels) * matrix.step)
            chunk = T.meta_var(
                (matrix.column() // matrix.tile.chunk + T.truncmod(n, matrix.tile.panels) * matrix.tile.panel_chunks)
                * 2
            )
            scale: T.float32 = T.Select(inside, self.row_scales[which][self.use, at], T.float32(0))
            for word in T.unroll(4):
                self.widen_word(self.words[word], lambda x: scale)
                self.pack_pair(self.packed, word * 2, self.floats[0], self.floats[1])
                self.pack_pair(self.packed, word * 2 + 1, self.floats[2], self.floats[3])
            for half in T.unroll(2):
                T.ptx["st.shared.v4.b32"](
                    T.cuda.cvta_generic_to_shared(tile.pointer(0, at, chunk + half)),
                    *[self.packed[half * 4 + x] for x in range(4)],
                )

        self.each_row(matrix, self.use, 0, True, False, row)

    @T.inline
    def step(self, tile, masked, tracked):
        """One tile of keys."""
        self.arrive(self.stages - 2)
        self.fetch(T.Select(self.use == 0, self.stages, self.use) - 1, self.is_live(tile))
        self.widen_tile(self.k, 0)
        self.widen_tile(self.v, 1)
        T.cuda.cta_sync()

        @T.inline
        def compute(first):
            self.scores(first)
            self.score_tile(tile, masked, tracked, first)
            self.softmax_pv(tracked, first)

        self.from_first_visible(tile, masked, compute)
        self.use = T.Select(self.use == self.stages - 1, 0, self.use + 1)


class StagedWidening(Widening):
    """Mixed into a machine with :class:`schedules.families.mma.staged.StagedCopies`: what is loaded of keys and values
    is half as many bytes, which are widened when they are stored."""

    def place_operands(self):
        """Registers for a scale of each row, and for elements."""
        self.place_scales()
        passes = max(x.passes for x in (self.k, self.v))
        self.row_scales, self.packed = T.alloc_local([passes], "float32"), T.alloc_local([4], "uint32")
        LdmatrixProducts.place_operands(self)

    @T.inline
    def load_bytes(self, matrix, tile_first, live, ragged):
        """Start loading the tile at a cursor to registers, and its scales; what doesn't exist is zero."""
        which = T.meta_var(self.number_of(matrix))

        @T.inline
        def row(n, memory, shared, inside):
            load_half_or_zero(self.staging, n * 2, matrix.memory.ptr_to([memory]), inside)
            if n % matrix.tile.panels == 0:
                i = T.meta_var(n // matrix.tile.panels)
                self.row_scales[i] = T.float32(0)
                if inside:
                    self.row_scales[i] = self.scale_sources[which][self.scale_at(which, matrix.pages[i])]

        matrix.find(tile_first)
        self.each_row(matrix, 0, tile_first, live, ragged, row)

    @T.inline
    def load(self, matrix, tile_first, live, ragged=False):
        """As of 16 bits."""
        self.load_bytes(matrix, tile_first, live, ragged)

    @T.inline
    def store(self, matrix):
        """Registers to shared memory, widened; what no tensor has is 0, whatever the scale is."""

        @T.inline
        def row(n, memory, shared, inside):
            scale: T.float32 = T.Select(inside, self.row_scales[n // matrix.tile.panels], T.float32(0))
            for word in T.unroll(2):
                self.widen_word(self.staging[n * 2 + word], lambda x: scale)
                self.pack_pair(self.packed, word * 2, self.floats[0], self.floats[1])
                self.pack_pair(self.packed, word * 2 + 1, self.floats[2], self.floats[3])
            T.ptx["st.shared.v4.b32"](shared, *[self.packed[x] for x in range(4)])

        self.each_row(matrix, 0, 0, True, False, row)

    @T.inline
    def copy(self, matrix, tile_first, live):
        """All rows of the tile at a cursor, at once; it may go beyond the last row."""
        if self.number_of(matrix) < 0:
            StagedCopies.copy(self, matrix, tile_first, live)
        else:
            self.load_bytes(matrix, tile_first, live, True)
            self.store(matrix)


@functools.cache
def over(machine: type, cache: str, arch: str) -> type:
    """A machine of these over a cache of one dtype, as an arch widens it."""
    name = f"{machine.__name__}Over{cache.title()}"
    return T.meta_class(type(name, (machine,), {"cache": cache, "widen": widening(cache, arch, machine.by_halves)}))
