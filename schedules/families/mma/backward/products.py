"""Products of a step of a backward, by ldmatrix: scores of own and visited rows, and sums of what is made of them.

Accumulators' pairs are the left operands of the sums.  Pairs of warps that share rows hand theirs to each other by way
of shared memory.
"""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.families.mma.backward.ahead import OperandsAhead
from schedules.families.mma.ldmatrix import LOAD, LOAD_TRANSPOSED
from schedules.families.mma.registers import fresh


class GradientProducts(OperandsAhead):
    """Mixed into a :class:`schedules.families.mma.backward.machine.GradientMachine`, whose ``multiply`` is one mma."""

    @T.inline
    def score(self, C, own_tile, tile):
        """``C += own visitedᵀ`` for the stage in use, and this part's visited rows."""
        lane: T.int32 = fresh("tid.x") % 32
        first = T.meta_var(tile.address(self.part * self.columns + lane // 16 * 8 + lane % 8, lane // 8 % 2))
        visited_from: T.uint32 = first + T.Cast("uint32", self.use * tile.stage_bytes)
        rows_from: T.uint32 = own_tile.address(self.warp_row + lane % 16, lane // 16)
        if self.config.ahead:
            self.score_ahead(C, own_tile, tile, rows_from, visited_from)
        else:
            for k in T.unroll(tile.columns // 16):
                if self.config.paced:
                    T.cuda.warp_sync()
                for t in T.unroll(self.m_tiles):
                    T.ptx[LOAD](
                        *[self.A[t * 4 + x] for x in range(4)], own_tile.at(rows_from, t * self.tile_step, k * 2)
                    )
                for n in T.unroll(self.columns // 16):
                    if self.config.paced:
                        T.cuda.warp_sync()
                    T.ptx[LOAD](*[self.B[x] for x in range(4)], tile.at(visited_from, n * 16, k * 2))
                    for t in T.unroll(self.m_tiles):
                        self.multiply_pair(C, t * self.s_stride + n * 8, self.A, t * 4)

    @T.inline
    def add(self, C, stride, P, tile):
        """``C += P visited`` for the stage in use, and this part's columns.

        Packed accumulators of 16 rows are the left operand; those of the partner's visited rows come from it.
        """
        if self.parts > 1:
            self.hand_over(P)
        self.add_from(C, stride, P, tile, self.part)
        if self.parts > 1:
            self.sync_sharing_warps()
            lane: T.int32 = fresh("tid.x") % 32
            chunks = T.meta_var(self.columns // self.exchanged.chunk)
            taken_from: T.uint32 = self.exchange(self.warp_row + lane % 16, (1 - self.part) * chunks + lane // 16)
            for t in T.unroll(self.m_tiles):
                for k in T.unroll(self.columns // 16):
                    i = T.meta_var(t * (self.s_stride // 2) + k * 4)
                    at = T.meta_var(self.exchanged.at(taken_from, t * self.tile_step, k * 2))
                    T.ptx[LOAD](*[P[i + x] for x in range(4)], at)
            self.add_from(C, stride, P, tile, 1 - self.part)

    @T.inline
    def hand_over(self, P):
        """This part's packed accumulators to the partner, once it has read what was there."""
        lane: T.int32 = fresh("tid.x") % 32
        chunks = T.meta_var(self.columns // self.exchanged.chunk)
        first = T.meta_var(self.exchange(self.warp_row + lane // 4, self.part * chunks))
        to: T.uint32 = first + T.Cast("uint32", lane % 4 * 4)
        self.sync_sharing_warps()
        for t in T.unroll(self.m_tiles):
            for k in T.unroll(self.columns // 16):
                for x in T.unroll(4):
                    at = T.meta_var(self.exchanged.at(to, t * self.tile_step + x % 2 * 8, k * 2 + x // 2))
                    T.ptx["st.shared.b32"](at, P[t * (self.s_stride // 2) + k * 4 + x])

    @T.inline
    def add_from(self, C, stride, P, tile, part):
        """The same with the visited rows of one part."""
        lane: T.int32 = fresh("tid.x") % 32
        first = T.meta_var(tile.address(part * self.columns + lane % 16, self.part * 2 + lane // 16))
        visited_from: T.uint32 = first + T.Cast("uint32", self.use * tile.stage_bytes)
        if self.config.ahead:
            self.add_ahead(C, stride, P, tile, visited_from)
        else:
            for k in T.unroll(self.columns // 16):
                for n in T.unroll(tile.columns // (16 * self.parts)):
                    chunk = T.meta_var(n * 2 * self.parts)
                    T.ptx[LOAD_TRANSPOSED](*[self.B[x] for x in range(4)], tile.at(visited_from, k * 16, chunk))
                    T.cuda.warp_sync()  # no load comes before it: the compiler would take registers for it, and spill
                    for t in T.unroll(self.m_tiles):
                        self.multiply_pair(C, t * stride + n * 8, P, t * (self.s_stride // 2) + k * 4)

    @T.inline
    def multiply_pair(self, C, c, A, a, b=0):
        """16 columns, of one ldmatrix."""
        self.multiply(C, c, A, a, self.B, b)
        self.multiply(C, c + 4, A, a, self.B, b + 2)
