"""What a block of the joint launch adds to dq of a tile of queries: ``dSᵀ K`` over its keys.

Each warp has 32 rows of it, or all that there are, by some columns.
"""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.families.mma.ldmatrix import LOAD_TRANSPOSED
from schedules.families.mma.registers import anew, fresh
from schedules.tile.geometry import flat, wide
from schedules.tile.ordered_sums import add_element, store_element, take_element
from schedules.tile.score import NEGATIVE_INFINITY


class QueryPart:
    """Mixed into a :class:`schedules.families.mma.backward.joint_machine.JointMachine`."""

    def dq_row(self, thread):
        """First row of a tile that a thread's warp makes."""
        return thread // 32 // self.across * self.rows

    def dq_column(self, thread):
        """First column that it makes."""
        return thread // 32 % self.across * self.dq_columns

    @T.inline
    def multiply_queries(self):
        """This warp's part of ``dSᵀ K``, over all keys of the block."""
        thread: T.int32 = fresh("tid.x")
        lane: T.int32 = thread % 32
        keys = T.meta_var(self.own_tiles.scores)
        row = T.meta_var(self.dq_row(thread))
        column = T.meta_var(self.dq_column(thread))
        other: T.uint32 = T.Cast("uint32", (self.step + 1) % 2 * self.exchanged.stage_bytes)
        ds_from: T.uint32 = other + self.exchanged.address(
            lane // 16 * 8 + lane % 8, row // self.exchanged.chunk + lane // 8 % 2
        )
        panel = T.meta_var(T.Cast("uint32", column // keys.panel * keys.panel_bytes))
        k_from: T.uint32 = keys.address(lane % 16, column % keys.panel // keys.chunk + lane // 16) + panel
        for k in T.unroll(self.config.own_rows // 16):
            for t in T.unroll(self.dq_tiles):
                T.ptx[LOAD_TRANSPOSED](
                    *[self.dq_rows[t * 4 + x] for x in range(4)], self.exchanged.at(ds_from, k * 16, t * 2)
                )
            for n in T.unroll(self.dq_columns // 16):
                T.ptx[LOAD_TRANSPOSED](*[self.B[x] for x in range(4)], keys.at(k_from, k * 16, n * 2))
                for t in T.unroll(self.dq_tiles):
                    self.multiply_pair(self.dQ, t * self.dq_stride + n * 8, self.dq_rows, t * 4)

    def is_last(self, at, tile):
        """Whether the keys that a tile of queries sees end in this block."""
        M = self.config.step_rows
        last = T.min(tile * M + (M - 1), at.seqlen_q - 1)
        end = self.pattern.keys_of(at, tile * M, last).visible[1]
        return self.own_first + self.config.own_rows >= end

    def sums_place(self, at, tile):
        """Where this thread's first accumulator of a tile's sums is."""
        count = self.dq_tiles * self.dq_stride
        elements = self.config.step_rows * self.pattern.head_dim
        thread = fresh("tid.x")
        return self.tile_place(at, tile) * T.int64(elements) + wide(thread // 32 * (count * 32) + thread % 32)

    @T.inline
    def take_sums(self, at, tile):
        """Start reading what blocks before have left of a tile."""
        if self.number > 0:
            place: T.int64 = self.sums_place(at, tile)
            for i in T.unroll(self.dq_tiles * self.dq_stride):
                T.evaluate(take_element(T.address_of(self.dQ[i]), self.memory.sums.ptr_to([place + i * 32])))

    @T.inline
    def add_queries(self, at, tile):
        """Add this warp's part to the sums, or begin them."""
        place: T.int64 = self.sums_place(at, tile)
        if self.number == 0:
            for i in T.unroll(self.dq_tiles * self.dq_stride):
                T.evaluate(store_element(self.memory.sums.ptr_to([place + i * 32]), self.dQ[i]))
        else:
            for i in T.unroll(self.dq_tiles * self.dq_stride):
                T.evaluate(add_element(self.memory.sums.ptr_to([place + i * 32]), self.dQ[i]))

    @T.inline
    def write_queries(self, at, tile):
        """Round and write this warp's part of dq, but for rows that see nothing, which are 0 already."""
        out = T.meta_var(self.tensors.gradients["dq"])
        memory = T.meta_var(flat(out.buffer))
        thread: T.int32 = fresh("tid.x")
        lane: T.int32 = thread % 32
        within: T.int32 = self.dq_row(thread) + self.fragment.row(lane)
        row: T.int32 = tile * self.config.step_rows + within
        column: T.int32 = self.dq_column(thread) + self.fragment.column(lane)
        to: T.int64 = out.offset(anew(at.b), anew(at.h), row, column)
        scale = T.meta_var(self.tensors.softmax_scale)
        for t in T.unroll(self.dq_tiles):
            for r in T.unroll(2):
                down = T.meta_var(t * self.fragment.tile_rows + r * self.fragment.row_step)
                if T.And(
                    row + down < at.seqlen_q,
                    self.numbers[(self.step - 1) % self.config.number_slots, 0, within + down]
                    != T.float32(NEGATIVE_INFINITY),
                ):
                    for g in T.unroll(self.dq_stride // 4):
                        if column + g * 8 < self.tensors.head_dim:
                            x = T.meta_var(t * self.dq_stride + g * 4 + r * 2)
                            self.pack_pair(self.packed, 0, self.dQ[x] * scale, self.dQ[x + 1] * scale)
                            T.ptx["st.global.b32"](
                                memory.ptr_to([to + out.rows_offset(T.int32(down)) + T.int64(g * 8)]), self.packed[0]
                            )
