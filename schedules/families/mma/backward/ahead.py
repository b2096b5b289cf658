"""The same products with right operands one ahead: each is loaded before the products of the one before it, and none
earlier, where the compiler would load more of them, and spill."""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.families.mma.ldmatrix import LOAD, LOAD_TRANSPOSED


class OperandsAhead:
    """Mixed into :class:`schedules.families.mma.backward.products.GradientProducts`."""

    @T.inline
    def score_ahead(self, C, own_tile, tile, rows_from, visited_from):
        """``C += own visitedᵀ`` from given addresses."""
        count = T.meta_var(self.columns // 16)
        steps = T.meta_var(tile.columns // 16 * count)
        self.load_visited(LOAD, tile.at(visited_from, 0, 0), 0)
        for i in T.unroll(steps):
            if i % count == 0:
                self.load_own(own_tile, rows_from, i // count)
            if i + 1 < steps:
                place = T.meta_var(tile.at(visited_from, (i + 1) % count * 16, (i + 1) // count * 2))
                self.load_visited(LOAD, place, (i + 1) % 2 * 4)
            T.cuda.warp_sync()  # no load comes before it
            for t in T.unroll(self.m_tiles):
                self.multiply_pair(C, t * self.s_stride + i % count * 8, self.A, t * 4, i % 2 * 4)

    @T.inline
    def load_own(self, own_tile, rows_from, k):
        """Left operands of the k-th 16 columns."""
        for t in T.unroll(self.m_tiles):
            T.ptx[LOAD](*[self.A[t * 4 + x] for x in range(4)], own_tile.at(rows_from, t * self.tile_step, k * 2))

    @T.inline
    def load_visited(self, instruction, place, b):
        """Right operands, to ``B[b]`` and on."""
        T.ptx[instruction](*[self.B[b + x] for x in range(4)], place)

    @T.inline
    def add_ahead(self, C, stride, P, tile, visited_from):
        """``C += P visited`` from a given address, and this part's columns."""
        count = T.meta_var(tile.columns // (16 * self.parts))
        steps = T.meta_var(self.columns // 16 * count)
        self.load_visited(LOAD_TRANSPOSED, tile.at(visited_from, 0, 0), 0)
        for i in T.unroll(steps):
            k = T.meta_var(i // count)
            n = T.meta_var(i % count)
            if i + 1 < steps:
                place = T.meta_var(tile.at(visited_from, (i + 1) // count * 16, (i + 1) % count * 2 * self.parts))
                self.load_visited(LOAD_TRANSPOSED, place, (i + 1) % 2 * 4)
            T.cuda.warp_sync()  # no load comes before it
            for t in T.unroll(self.m_tiles):
                self.multiply_pair(C, t * stride + n * 8, P, t * (self.s_stride // 2) + k * 4, i % 2 * 4)
