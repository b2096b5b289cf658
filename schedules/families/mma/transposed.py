"""Decoding over caches of 8 bits with keys and values on the left of products: S^T = K Q^T, O^T = V^T P^T.

An m16n8k16 has 16 rows on the left and 8 on the right.  The packed rows of a group of heads are 8 or fewer most often,
so that keys on the left halve the products, the exponentials and the registers of S and O.  What widens bytes makes the
left operands then.

Every sum has the terms, and the order, that it has with keys on the right (:mod:`schedules.families.mma.decode`), so
that the bits are the same.  A product of 16 columns has the same bits in any order of these and with its sides
exchanged: an H200 gave the same in each of 185 million sums of both dtypes, with exponents of all sizes.  A reference
follows from a row's maximum.  Two lanes exchange half of their probabilities, so that each adds those of one row that a
lane has there, in the same order.

On an H200, bfloat16, e4m3, pages of 16, us, with keys on the right and on the left: 32 sequences of 4096 keys (32 heads
on 8, head_dim 128) 111.1 and 86.5, 16 of 4096 (32 on 32) 211.5 and 152.6, 64 of 1024 88.2 and 60.0, one of 131072 108.8
and 98.4, one of 1024 10.2 and 8.5, with three tokens each 32 of 4096 120.0 and 104.6; head_dim 64 (64 on 8), 4 of 16384
38.5 and 28.9.
"""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.families.mma.decode import PackedSoftmax
from schedules.families.mma.ldmatrix import LOAD, LOAD_TRANSPOSED
from schedules.families.mma.machine import BlockMachine
from schedules.families.mma.registers import anew, fresh
from schedules.families.mma.scaled_machines import LaneMatrix, ScaledDecodeMachine
from schedules.tile.fragment import M16N8_TRANSPOSED
from schedules.tile.geometry import wide
from schedules.tile.softmax import OnlineSoftmax, from_lane

_ACROSS = """
__forceinline__ __device__ unsigned int across(unsigned int pair) {
  unsigned int y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(pair));
  return y;
}
"""


def across(pair):
    """Two 16-bit elements of a row of a matrix of 8 x 8, of which this lane has two of a column."""
    return T.cuda.func_call("across", pair, source_code=_ACROSS, return_type="uint32")


@T.meta_class
class TransposedSoftmax(PackedSoftmax):
    """The softmax on packed rows whose keys are in the rows of an accumulator.

    ``own_sum``: the sum of the even keys' row of this lane if its number divided by 4 is even, else of the odd one's.
    """

    reads = False

    def __init__(self, *args):
        PackedSoftmax.__init__(self, *args)
        self.own_sum = T.alloc_local([self.m_tiles], "float32")

    def position(self, row0, column0, t, g, r, e):
        """Nothing that follows from a query alone is kept from tile to tile."""
        query, key = PackedSoftmax.position(self, row0, column0, t, g, r, e)
        return anew(query), key

    @staticmethod
    def is_odd():
        """Whether this lane adds the second of its two rows."""
        return fresh("tid.x") // 4 % 2 == 1

    @T.inline
    def reset(self):
        """Before the first tile of a row tile."""
        OnlineSoftmax.reset(self)
        for t in T.unroll(self.m_tiles):
            self.own_sum[t] = T.float32(0)

    @T.inline
    def advance(self, first=0):
        """New references, and the sums relative to them."""
        OnlineSoftmax.advance(self, first)
        for t in T.unroll(first, self.m_tiles):
            factor = T.meta_var(T.Select(self.is_odd(), self.correction[t * 2 + 1], self.correction[t * 2]))
            self.own_sum[t] = self.own_sum[t] * factor
            for r in T.unroll(2):
                self.row_sum[t * 2 + r] = T.float32(0)  # of which the compiler need not keep anything

    @T.inline
    def exponentials(self, S, group, count, scale, first=0):
        """Scores to probabilities; of two lanes with the same two rows, each adds one of them over both's keys."""
        odd: T.bool = self.is_odd()
        for t in T.unroll(first, self.m_tiles):
            for g in T.unroll(count):
                for e in T.unroll(2):
                    i = T.meta_var(t * self.stride + (group + g) * 4 + e)
                    for r in T.unroll(2):
                        S[i + r * 2] = T.exp2(S[i + r * 2] * scale - self.row_max[t * 2 + r])
                    given: T.float32 = T.Select(odd, S[i], S[i + 2])
                    own: T.float32 = T.Select(odd, S[i + 2], S[i])
                    other: T.float32 = from_lane(given, 4)
                    self.own_sum[t] = self.own_sum[t] + T.Select(odd, other, own)
                    self.own_sum[t] = self.own_sum[t] + T.Select(odd, own, other)

    @T.inline
    def finish(self):
        """Complete the row sums; after the last tile."""
        odd: T.bool = self.is_odd()
        for t in T.unroll(self.m_tiles):
            for i in T.unroll(2):
                part: T.float32 = from_lane(self.own_sum[t], 8 * (i + 1))
                self.own_sum[t] = self.own_sum[t] + part
            other: T.float32 = from_lane(self.own_sum[t], 4)
            self.row_sum[t * 2] = T.Select(odd, other, self.own_sum[t])
            self.row_sum[t * 2 + 1] = T.Select(odd, self.own_sum[t], other)


@T.meta_class
class TransposedDecodeMachine(ScaledDecodeMachine):
    """The machine of decoding over a cache of one dtype; an m-tile has 8 rows.

    A lane multiplies the four neighbouring elements that ldmatrix gives it, and takes the same four of Q, so that no
    lanes exchange bytes of keys.  Of each 16 columns of the output the even ones are in the upper half of an
    accumulator.
    """

    on_pages = LaneMatrix
    softmax_type = TransposedSoftmax
    fragment_type = M16N8_TRANSPOSED
    by_halves = True

    def from_first_visible(self, tile, masked, body):
        """All m-tiles: rows are packed, so that none sees less than another."""
        body(0)

    def place_operands(self):
        """Where K and V are read is computed anew for each tile."""
        self.place_words()
        self.lane = fresh("tid.x")
        self.q_from, self.k_from, self.v_from = self.sources(self.lane, 0, 0)
        self.place_fragments()

    def place_fragments(self):
        """Q and P are the right operands."""
        steps = self.head_dim // 16 if self.q_in_registers else 2
        self.A = T.alloc_local([4], "uint32")
        self.B = T.alloc_local([steps * self.m_tiles * 2], "uint32")
        self.P = T.alloc_local([self.m_tiles * 2], "uint32")
        self.pair = T.alloc_local([1], "uint32")

    def sources(self, lane, part, warp_row):
        """Where a lane's elements of Q are, and its first rows of K and V."""
        _, k, v = ScaledDecodeMachine.sources(self, lane, part, warp_row)
        q = self.q.tile.address(warp_row + lane // 4, lane % 4 // 2)
        return q + T.Cast("uint32", lane % 2 * 8), k, v

    def scale_at(self, which: int, page):
        """As ever, but nothing of it is kept: there are few registers."""
        page_stride, head_stride = self.geometry.scale_strides[which]
        return wide(page) * wide(page_stride) + wide(anew(self.k.source.head)) * wide(head_stride)

    @T.inline
    def load_q(self, q_from, k, b, first):
        """16 columns of Q, four neighbouring ones a lane, to ``B[b]`` and on, from m-tile ``first``."""
        for t in T.unroll(first, self.m_tiles):
            where = T.meta_var(self.q.tile.at(q_from, t * self.tile_step, k * 2))
            T.ptx["ld.shared.v2.b32"](self.B[b + t * 2], self.B[b + t * 2 + 1], where)

    @T.inline
    def keep_q(self):
        """All fragments of Q, from global memory: each element is one lane's alone."""
        for t in T.unroll(self.m_tiles):
            row: T.int32 = self.rows[0] + t * self.tile_step + self.lane // 4
            first: T.int64 = self.q.source.offset(row, self.lane % 4 * 4)
            for k in T.unroll(self.head_dim // 16):
                b = T.meta_var((k * self.m_tiles + t) * 2)
                for x in T.unroll(2):
                    self.B[b + x] = T.uint32(0)
                if T.And(row < self.q.rows, k * 16 + self.lane % 4 * 4 < self.q.dim):
                    source = T.meta_var(self.q.memory.ptr_to([first + T.int64(k * 16)]))
                    T.ptx["ld.global.v2.b32"](self.B[b], self.B[b + 1], source)

    @T.inline
    def multiply_left(self, C, c, B, b):
        """One product of ``A`` into the registers of a fragment from ``C[c]`` on."""
        dt = T.meta_var(self.types.v.ptx)
        d = T.meta_var([C[c + x] for x in (0, 2, 1, 3)])
        T.ptx[f"mma.sync.aligned.m16n8k16.row.col.f32.{dt}.{dt}.f32"](
            *d, *[self.A[x] for x in range(4)], B[b], B[b + 1], *d
        )

    @T.inline
    def scores(self, first=0):
        """S^T = K Q^T for the tile in use."""
        if self.m_tiles == 1:
            for n in T.unroll(self.config.block_n // 16):
                self.load_key_scales(n)
        self.scores_from(self.q_from, self.k_from + T.Cast("uint32", self.use * self.k_tile.stage_bytes), first)

    @T.inline
    def load_key_scales(self, n):
        """Those of this lane's rows of the n-th 16 keys."""
        for group in T.unroll(2):
            i = T.meta_var(n * 2 + group)
            self.load_scale(self.key_scales, i, 0, i * 8 + self.lane // 4)

    @T.inline
    def load_scale(self, to, i, which, row):
        """The scale of a row of the tile of K (0) or of V (1) in use to ``to[i]``."""
        to[i] = self.row_scales[which][self.use, row]

    @T.inline
    def scores_from(self, q_place, k_place, first):
        """S^T = K Q^T, from the given addresses; scales are loaded late where there are few registers."""
        q_from: T.uint32 = q_place
        k_from: T.uint32 = k_place
        for i in T.unroll(self.m_tiles * self.s_stride):
            self.S[i] = T.float32(0)
        for k in T.unroll(self.head_dim // 32):
            if not self.q_in_registers:
                for half in T.unroll(2):
                    self.load_q(q_from, k * 2 + half, half * self.m_tiles * 2, 0)
            for n in T.unroll(self.config.block_n // 16):
                T.ptx[LOAD](*[self.words[x] for x in range(4)], self.k_tile.at(k_from, n * 16, k * 2))
                if self.m_tiles > 1:
                    self.load_key_scales(n)
                T.cuda.warp_sync()
                for half in T.unroll(2):
                    for group in T.unroll(2):
                        scale = T.meta_var(self.key_scales[n * 2 + group])
                        self.widen_word(self.words[group * 2 + half], lambda x, scale=scale: scale)
                        self.pack_pair(self.A, group, self.floats[0], self.floats[1])
                        self.pack_pair(self.A, group + 2, self.floats[2], self.floats[3])
                    b = T.meta_var((k * 2 + half if self.q_in_registers else half) * self.m_tiles * 2)
                    for t in T.unroll(self.m_tiles):
                        self.multiply_left(self.S, t * self.s_stride + n * 4, self.B, b + t * 2)

    @T.inline
    def probabilities(self, k, scale, first=0):
        """P of the k-th 16 keys: pairs of rows become pairs of keys."""
        self.softmax.exponentials(self.S, k, 1, scale, first)
        for t in T.unroll(first, self.m_tiles):
            for e in T.unroll(2):
                s = T.meta_var(t * self.s_stride + k * 4 + e)
                self.pack_pair(self.pair, 0, self.S[s], self.S[s + 2])
                self.P[t * 2 + e] = across(self.pair[0])

    @T.inline
    def accumulate(self, k, first=0):
        """O^T += V^T P^T for the k-th 16 keys of the tile in use."""
        v_from: T.uint32 = self.v_from + T.Cast("uint32", self.use * self.v_tile.stage_bytes)
        self.load_value_scales(k)
        for n in T.unroll(self.head_dim_v // 32):
            T.ptx[LOAD_TRANSPOSED](*[self.words[x] for x in range(4)], self.v_tile.at(v_from, k * 16, n * 2))
            T.cuda.warp_sync()
            for half in T.unroll(2):
                self.widen_values(half)
                for t in T.unroll(self.m_tiles):
                    self.multiply_left(self.O, t * self.o_stride + (n * 2 + half) * 4, self.P, t * 2)

    @T.inline
    def load_value_scales(self, k):
        """Those of this lane's keys of the k-th 16 keys of the tile in use."""
        for x in T.unroll(4):
            key = T.meta_var(k * 16 + x // 2 * 8 + x % 2)
            self.load_scale(self.value_scales, x, 1, key + self.lane % 4 * 2)

    @T.inline
    def widen_values(self, half):
        """The left operand of 16 of the 32 columns whose words have been loaded."""
        for keys in T.unroll(2):
            word = T.meta_var(self.words[half * 2 + keys])
            self.widen_word(word, lambda x, keys=keys: self.value_scales[keys * 2 + x // 2])
            self.pack_pair(self.A, keys * 2, self.floats[0], self.floats[2])
            self.pack_pair(self.A, keys * 2 + 1, self.floats[1], self.floats[3])

    def output_column(self, group):
        """First output column of a register group, counted from the first of this lane's."""
        return group * 16 + self.fragment.column(self.lane)

    @T.inline
    def finish(self):
        """The row sums are complete."""
        BlockMachine.finish(self)
