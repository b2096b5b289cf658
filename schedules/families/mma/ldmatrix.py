"""Products of Turing and later: operands by ldmatrix, accumulators in the m16n8 layout, P handed on in registers."""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.tile.fragment import M16N8
from schedules.tile.geometry import local

LOAD = "ldmatrix.sync.aligned.m8n8.x4.shared.b16"
LOAD_TRANSPOSED = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"


def operand_registers(pattern: Pattern, config) -> int:
    """Registers of the fragments of Q that a warp holds at a time."""
    m_tiles = config.block_m * config.warps_per_tile // (M16N8.tile_rows * config.num_warps)
    return m_tiles * 4 * (pattern.head_dim // 16 if config.q_in_registers else 1)


class LdmatrixProducts:
    """Mixed into a :class:`schedules.families.mma.machine.BlockMachine`.

    The machine brings ``multiply(C, c, A, a, B, b)``, one m16n8k16 product into ``C[c .. c + 3]``,
    ``q_in_registers``: whether it calls ``keep_q`` once, or Q is to be loaded for every tile; and ``v_ahead``: whether
    every fragment of V is loaded one before its products, and none earlier.  Else the compiler decides, which takes the
    registers it finds, and spills addresses and counters where there are none.
    """

    def place_operands(self):
        """What this lane hands to ldmatrix, and the registers of operands."""
        self.q_from, self.k_from, self.v_from = (local(x) for x in self.sources(self.lane, self.part, self.warp_row))
        self.place_fragments()

    def place_fragments(self):
        """The registers of operands."""
        steps = self.head_dim // 16 if self.q_in_registers else 1
        self.A = T.alloc_local([steps * self.m_tiles * 4], "uint32")
        self.B = T.alloc_local([8 if self.v_ahead else 4], "uint32")
        self.P = T.alloc_local([self.m_tiles * 4], "uint32")  # of 16 keys

    def sources(self, lane, part, warp_row):
        """Where a lane's first rows of Q, K and V are, in stage 0."""
        first_key = part * (self.config.block_n // self.parts)
        return (
            self.q.tile.address(warp_row + lane % 16, lane // 16),
            self.k_tile.address(first_key + lane // 16 * 8 + lane % 8, lane // 8 % 2),
            self.v_tile.address(first_key + lane % 16, part * 2 + lane // 16),
        )

    @T.inline
    def scores(self, first=0):
        """S = Q K for the tile in use, from m-tile ``first``."""
        self.scores_from(self.q_from, self.k_from + T.Cast("uint32", self.use * self.k_tile.stage_bytes), first)

    @T.inline
    def load_q(self, q_from, k, a, first):
        """Fragments of 16 columns of Q, to ``A[a]`` and on, from m-tile ``first``."""
        for t in T.unroll(first, self.m_tiles):
            T.ptx[LOAD](*[self.A[a + t * 4 + x] for x in range(4)], self.q.tile.at(q_from, t * self.tile_step, k * 2))

    @T.inline
    def keep_q(self):
        """All fragments of Q, once they are in shared memory."""
        for k in T.unroll(self.head_dim // 16):
            self.load_q(self.q_from, k, k * self.m_tiles * 4, 0)

    @T.inline
    def load_v(self, v_from, key, n, b=0):
        """Fragments of 16 keys from ``key`` and the n-th 16 columns of V, to ``B[b]`` and on."""
        T.ptx[LOAD_TRANSPOSED](*[self.B[b + x] for x in range(4)], self.v_tile.at(v_from, key, n * 2))

    @T.inline
    def multiply_pair(self, C, c, A, a, b=0):
        """16 columns: a pair of B fragments must be neighbours among the outputs of ldmatrix, or moves cost 8%."""
        self.multiply(C, c, A, a, self.B, b)
        self.multiply(C, c + 4, A, a, self.B, b + 2)

    @T.inline
    def multiply_v(self, v_from, key, count, stride, first):
        """O += P V for 16 keys from ``key``, and ``count`` times 16 columns, of every ``stride``-th."""
        if self.v_ahead:
            self.load_v(v_from, key, 0)
            for n in T.unroll(count):
                if n + 1 < count:
                    self.load_v(v_from, key, (n + 1) * stride, (n + 1) % 2 * 4)
                T.cuda.warp_sync()  # no load comes before it
                for t in T.unroll(first, self.m_tiles):
                    self.multiply_pair(self.O, t * self.o_stride + n * 8, self.P, t * 4, n % 2 * 4)
        else:
            for n in T.unroll(count):
                self.load_v(v_from, key, n * stride)
                for t in T.unroll(first, self.m_tiles):
                    self.multiply_pair(self.O, t * self.o_stride + n * 8, self.P, t * 4)

    @T.inline
    def scores_from(self, q_place, k_place, first):
        """S = Q K, from the given addresses."""
        q_from: T.uint32 = q_place
        k_from: T.uint32 = k_place
        for i in T.unroll(first * self.s_stride, self.m_tiles * self.s_stride):
            self.S[i] = T.float32(0)
        for k in T.unroll(self.head_dim // 16):
            a = T.meta_var(k * self.m_tiles * 4 if self.q_in_registers else 0)
            if not self.q_in_registers:
                self.load_q(q_from, k, 0, first)
            for n in T.unroll(self.config.block_n // self.parts // 16):
                T.ptx[LOAD](*[self.B[x] for x in range(4)], self.k_tile.at(k_from, n * 16, k * 2))
                for t in T.unroll(first, self.m_tiles):
                    self.multiply_pair(self.S, t * self.s_stride + n * 8, self.A, a + t * 4)

    @T.inline
    def probabilities(self, k, scale, first=0):
        """P of the k-th 16 keys: an accumulator's register pairs are the A operand of the next product."""
        self.softmax.exponentials(self.S, k * 2, 2, scale, first)
        for t in T.unroll(first, self.m_tiles):
            for x in T.unroll(4):
                s = T.meta_var(t * self.s_stride + k * 8 + x * 2)
                self.pack_pair(self.P, t * 4 + x, self.S[s], self.S[s + 1])

    @T.inline
    def accumulate(self, k, first=0):
        """O += P V for the k-th 16 keys of the tile in use."""
        v_from: T.uint32 = self.v_from + T.Cast("uint32", self.use * self.v_tile.stage_bytes)
        self.multiply_v(v_from, k * 16, self.head_dim_v // 16, 1, first)
