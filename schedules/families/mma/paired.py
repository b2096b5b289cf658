"""Pairs of warps that share 32 rows: what head_dim beyond 128 needs, where an ldmatrix has to feed more products.

The output of 32 rows doesn't fit the registers of one warp any more, and with 16 rows each fragment of K or V that is
loaded serves two products only: shared memory is the limit.  So two warps take 32 rows together.  Each computes the
scores of half the keys of a tile, makes probabilities of them and hands these to its partner through shared memory;
each then multiplies all probabilities with half the columns of V.  For head_dim 256 and 64 keys a step takes 104 loads
and stores instead of 144 for 256 products.

The columns of V alternate between the two, 16 by 16.  References have to be the same for both, so steps with maxima
exchange these; steps without exchange nothing but P.
"""

from __future__ import annotations

import operator

from tvm.script import tirx as T

from schedules.families.mma.ldmatrix import LOAD, LdmatrixProducts
from schedules.families.mma.registers import fresh
from schedules.tile.smem import SharedTile

#: Named barriers of the pairs begin here; barrier 0 is the whole block's.
_FIRST_BARRIER = 1
#: Columns of V after which those of the other one begin.
PART_COLUMNS = 16


class PairedProducts(LdmatrixProducts):
    """``LdmatrixProducts`` of a machine with two ``parts``."""

    def place_shared(self, pool):
        """P of the whole tile, and a float for each row and part."""
        self.p_tile = SharedTile(pool, 1, self.config.block_m, self.config.block_n, self.types.v)
        self.exchange = pool.alloc((2, self.config.block_m), "float32")

    def place_operands(self):
        """The registers of operands.  Addresses are computed where they are used: none is kept in a register."""
        self.place_fragments()

    @T.inline
    def scores(self, first=0):
        """S = Q K for the tile in use, from m-tile ``first``."""
        thread: T.int32 = fresh("tid.x")
        sources = T.meta_var(self.sources(*self.place_of(thread)))
        self.scores_from(sources[0], sources[1] + T.Cast("uint32", self.use * self.k.tile.stage_bytes), first)

    def pair(self):
        """Number of this pair in the block."""
        return fresh("tid.x") // 64

    def output_column(self, group):
        """Every other 16 columns, counted from the first of this part."""
        return group // 2 * 32 + group % 2 * 8

    @T.inline
    def sync_sharing_warps(self):
        """The two warps wait for each other."""
        T.ptx.bar.sync(T.Cast("uint32", _FIRST_BARRIER + self.pair()), 64)

    @T.inline
    def share(self, values, combine, first=0):
        """Combine the values of each row, the same in all lanes of a row, with the partner's."""
        thread: T.int32 = fresh("tid.x")
        place = T.meta_var(self.place_of(thread))
        lane, part, row0 = T.meta_var((place[0], place[1], place[2] + place[0] // 4))
        for i in T.unroll(2 * first, 2 * self.m_tiles):
            row = T.meta_var(self.softmax.position(row0, 0, i // 2, 0, i % 2, 0)[0])
            if lane % 4 == 0:
                self.exchange[part, row] = values[i]
        self.sync_sharing_warps()
        for i in T.unroll(2 * first, 2 * self.m_tiles):
            row = T.meta_var(self.softmax.position(row0, 0, i // 2, 0, i % 2, 0)[0])
            values[i] = combine(values[i], self.exchange[1 - part, row])

    @T.inline
    def softmax_pv(self, tracked, first=0):
        """S to P, and O += P V: first the probabilities of this warp's keys, then the partner's."""
        if tracked:
            self.softmax.local_max(self.S, self.softmax.peak, first)
            self.softmax.reduce_rows(self.softmax.peak, T.max, first)
            self.share(self.softmax.peak, T.max, first)
            self.softmax.advance(first)
            self.softmax.rescale(self.O, self.o_stride, first)
        scale = T.meta_var(self.softmax.scale if tracked else self.softmax.signed_scale())
        keys, chunks = T.meta_var((self.config.block_n // 2, self.config.block_n // 16))
        # 1. Where P goes to and comes from, and this warp's keys and columns of V.
        thread: T.int32 = fresh("tid.x")
        place = T.meta_var(self.place_of(thread))
        lane, part, row0 = T.meta_var(place)
        p_to: T.uint32 = self.p_tile.address(row0 + lane // 4, part * chunks) + T.Cast("uint32", lane % 4 * 4)
        p_from: T.uint32 = self.p_tile.address(row0 + lane % 16, (1 - part) * chunks + lane // 16)
        stage = T.meta_var(T.Cast("uint32", self.use * self.v.tile.stage_bytes))
        v_own: T.uint32 = self.sources(lane, part, row0)[2] + stage
        down = T.meta_var(keys * self.v.tile.row_bytes)
        v_other: T.uint32 = v_own + T.Select(part == 0, T.uint32(down), T.uint32(2**32 - down))
        # 2. This warp's probabilities, also to the partner.
        for k in T.unroll(keys // 16):
            self.probabilities(k, scale, first)
            for t in T.unroll(first, self.m_tiles):
                for x in T.unroll(4):
                    to = T.meta_var(self.p_tile.at(p_to, t * self.tile_step + x % 2 * 8, k * 2 + x // 2))
                    T.ptx["st.shared.b32"](to, self.P[t * 4 + x])
            self.accumulate_from(v_own, k, first)
        self.sync_sharing_warps()
        # 3. The partner's.
        for k in T.unroll(keys // 16):
            for t in T.unroll(first, self.m_tiles):
                T.ptx[LOAD](*[self.P[t * 4 + x] for x in range(4)], self.p_tile.at(p_from, t * self.tile_step, k * 2))
            self.accumulate_from(v_other, k, first)

    @T.inline
    def accumulate_from(self, v_from, k, first):
        """O += P V for the k-th 16 keys from ``v_from`` on, and this warp's columns."""
        self.multiply_v(v_from, k * 16, self.head_dim_v // 32, 2, first)

    @T.inline
    def finish(self):
        """The row sums are complete: over the lanes of a row, and over both warps."""
        self.softmax.finish()
        self.share(self.softmax.row_sum, operator.add)
        self.add_sink()
