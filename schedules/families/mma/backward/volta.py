"""Products of a backward on Volta: mma.sync m8n8k4 on 32 rows a warp, operands by 16-byte loads.

The left operand of a sum is again what a warp has of its accumulators, but not register by register: lanes ``l`` and
``l ^ 2`` exchange halves of their rows.  Pairs of warps that share rows write theirs to shared memory, whence both read
them as they read any left operand.
"""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.families.mma.registers import fresh
from schedules.families.mma.staged import pack_halves
from schedules.tile.fragment import VOLTA
from schedules.tile.softmax import from_lane

_SCORE = "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32"
_ADD = "mma.sync.aligned.m8n8k4.row.row.f32.f16.f16.f32"


class VoltaProducts:
    """Mixed into a :class:`schedules.families.mma.backward.machine.GradientMachine`."""

    fragment = VOLTA

    def left_row(self, lane):
        """The row of a left operand that a lane loads, counted from the warp's first."""
        return self.warp_row + lane % 8 + lane % 16 // 8 * 16 + lane // 16 * 8

    def output_column(self, group):
        """First column of a register group of a sum, counted from the first of this part's: every other 16 of two."""
        return group // 4 * (16 * self.parts) + group % 2 * 8 + group % 4 // 2 * 4

    @T.inline
    def load(self, to, place):
        """16 bytes of shared memory to four registers."""
        T.ptx["ld.shared.v4.b32"](*[to[x] for x in range(4)], place)

    @T.inline
    def multiply(self, instruction, C, c, A, a, b):
        """Products of k = 4 for the quad pairs: 8 accumulators, 2 registers of either operand."""
        sums = T.meta_var([C[c + x] for x in range(8)])
        T.ptx[instruction](*sums, A[a], A[a + 1], self.B[b], self.B[b + 1], *sums)

    @T.inline
    def score(self, C, own_tile, tile):
        """``C += own visitedᵀ`` for the stage in use, and this part's visited rows: 8 columns at a time."""
        lane: T.int32 = fresh("tid.x") % 32
        first = T.meta_var(tile.address(self.part * self.columns + lane % 4 + lane // 16 * 4, 0))
        visited_from: T.uint32 = first + T.Cast("uint32", self.use * tile.stage_bytes)
        rows_from: T.uint32 = own_tile.address(self.left_row(lane), 0)
        for k in T.unroll(tile.columns // 8):
            self.load(self.A, own_tile.at(rows_from, 0, k))
            for n in T.unroll(self.columns // 8):
                self.load(self.B, tile.at(visited_from, n * 8, k))
                for e in T.unroll(2):
                    self.multiply(_SCORE, C, n * 8, self.A, e * 2, e * 2)

    @T.inline
    def add(self, C, stride, P, tile):
        """``C += P visited`` for the stage in use, and this part's columns: accumulators are the left operand."""
        lane: T.int32 = fresh("tid.x") % 32
        first = T.meta_var(tile.address(lane % 4, self.part * 2 + lane // 16))
        visited_from: T.uint32 = first + T.Cast("uint32", self.use * tile.stage_bytes)
        if self.parts == 1:
            for g in T.unroll(self.columns // 4):
                self.exchange(P, g * 2)
                self.add_four(C, P, g * 2, tile, visited_from, g * 4)
        else:
            self.hand_over(P)
            self.sync_sharing_warps()
            rows_from: T.uint32 = self.exchanged.address(self.left_row(lane), 0)
            for k in T.unroll(self.config.step_rows // 8):
                self.load(self.A, self.exchanged.at(rows_from, 0, k))
                for e in T.unroll(2):
                    self.add_four(C, self.A, e * 2, tile, visited_from, k * 8 + e * 4)

    @T.inline
    def add_four(self, C, A, a, tile, visited_from, row):
        """The same of 4 visited rows from ``row`` on."""
        for n in T.unroll(tile.columns // (16 * self.parts)):
            self.load(self.B, tile.at(visited_from, row, n * 2 * self.parts))
            for e in T.unroll(2):
                self.multiply(_ADD, C, n * 16 + e * 8, A, a, e * 2)

    @T.inline
    def exchange(self, P, i):
        """A group of packed accumulators, two rows of a lane, to a left operand, 4 columns of one row."""
        lane: T.int32 = fresh("tid.x") % 32
        left = T.meta_var(self.fragment.column(lane) == 0)
        other = T.alloc_local([2], "uint32")
        other[0] = from_lane(T.Select(left, P[i + 1], P[i]), 2)
        other[1] = T.Select(left, other[0], P[i + 1])
        P[i] = T.Select(left, P[i], other[0])
        P[i + 1] = other[1]

    @T.inline
    def hand_over(self, P):
        """This part's packed accumulators to where both warps read them, once they have read what was there."""
        lane: T.int32 = fresh("tid.x") % 32
        chunks = T.meta_var(self.columns // self.exchanged.chunk)
        first = T.meta_var(self.exchanged.address(self.warp_row + self.fragment.row(lane), self.part * chunks))
        to: T.uint32 = first + T.Cast("uint32", self.fragment.column(lane) * 2)
        self.sync_sharing_warps()
        for g in T.unroll(self.columns // 4):
            for r in T.unroll(2):
                at = T.meta_var(self.exchanged.at(to, r * self.fragment.row_step, g // 2, g % 2 * 8))
                T.ptx["st.shared.b32"](at, P[g * 2 + r])

    @T.inline
    def pack_pair(self, to, i, low, high):
        """Two float32 as one register of halves."""
        pack_halves(to, i, low, high)
