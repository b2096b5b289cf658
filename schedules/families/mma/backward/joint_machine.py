"""The machine of the joint launch: that for dk and dv, whose dS other warps of the block make a part of dq of.

Every warp leaves its dS in shared memory, keys by queries, where ``dQ = dSᵀ K`` of a tile of queries is a product over
all keys of the block, and each warp has 32 rows, or all that there are, by some columns of it.  They are added to a
tile of sums in memory, in the order of the blocks of keys (:mod:`schedules.tile.ordered_sums`); the last block that a
tile is visible to adds the sum to what it has, and writes dq.  All blocks of a head go from the last tile of queries to
the first, and wait only for blocks that were started before them.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.mma.backward.config import DQ_ROWS, LaunchConfig
from schedules.families.mma.backward.key_machine import KeyMachine
from schedules.families.mma.backward.machine import GradientMachine, Sides
from schedules.families.mma.ldmatrix import LOAD_TRANSPOSED
from schedules.families.mma.registers import anew, fresh
from schedules.tile.geometry import flat, local, wide
from schedules.tile.gradients import Tensors
from schedules.tile.ordered_sums import add_element, await_count, store_element, take_element, tell
from schedules.tile.score import NEGATIVE_INFINITY
from schedules.tile.static import static


@dataclass(frozen=True)
class JointMemory:
    """Flat views of workspaces: shift and −delta of each row, tile by tile; sums of dq; how far each block has come.

    ``tiles`` and ``blocks`` are how many tiles of queries, and blocks of keys, each head has.
    """

    shifts: object
    starts: object
    sums: object
    progress: object
    tiles: Expr
    blocks: Expr


@T.meta_class
class JointMachine(KeyMachine):
    """The block's own rows are keys and values; it is number ``number`` of its head."""

    def __init__(
        self,
        pattern: Pattern,
        config: LaunchConfig,
        own: Sides,
        number: Expr,
        tensors: Tensors,
        memory: JointMemory,
    ):
        self.tensors, self.parameter_sums, self.memory, self.number = tensors, None, memory, number
        GradientMachine.__init__(self, pattern, config, own, number * config.own_rows, transposed=True)
        self.next_number = local(T.float32(0))
        # a warp's part of dq
        self.rows = min(DQ_ROWS, config.step_rows)
        self.dq_columns = pattern.head_dim * config.step_rows // (self.rows * config.num_warps)
        self.across = pattern.head_dim // self.dq_columns
        self.dq_stride = self.fragment.registers(self.dq_columns)
        self.dq_tiles = self.rows // self.fragment.tile_rows
        self.dQ = T.alloc_local([self.dq_tiles * self.dq_stride], "float32")
        self.taken = T.alloc_local([self.dq_tiles * self.dq_stride], "float32")
        self.packed = T.alloc_local([1], "uint32")

    def tile_place(self, at, tile):
        """Number of a tile of queries of a head among those of all, int64."""
        row = self.tensors.head_row(anew(at.b), anew(at.h))
        return wide(row) * wide(self.memory.tiles) + wide(tile)

    def progress_of(self, at, before: int = 0):
        """Where it stands how far this block has come in a head, or that ``before`` it."""
        row = self.tensors.head_row(anew(at.b), anew(at.h))
        return self.memory.progress.ptr_to([wide(row) * wide(self.memory.blocks) + wide(self.number - before)])

    @T.inline
    def load_numbers(self, at, live):
        """Start reading what belongs to the queries of the tile that is next: a number a thread."""
        rows = T.meta_var(self.config.step_rows)
        thread: T.int32 = fresh("tid.x")
        if T.And(live, thread < 2 * rows):
            place: T.int64 = self.tile_place(at, self.fetched) * T.int64(rows) + wide(thread % rows)
            if thread < rows:
                self.next_number = self.memory.shifts[place]
            else:
                self.next_number = self.memory.starts[place]

    # ------------------------------------------------------------ order

    @T.inline
    def await_turn(self, at, wanted):
        """One thread waits until the block of keys before has added to ``wanted`` tiles of a head."""
        if T.And(fresh("tid.x") == 0, self.number > 0):
            T.evaluate(await_count(self.progress_of(at, 1), T.int32(0), wanted))

    @T.inline
    def tell(self, at, count):
        """Tell the block of keys after this one that all warps have added to ``count`` tiles of a head."""
        if fresh("tid.x") == 32:
            T.evaluate(tell(self.progress_of(at), count))

    # ------------------------------------------------------------ steps

    @T.inline
    def clear_missing(self, at, masked):
        """Clear dS of keys past the last one, which no mask hides: of rows whose log-sum-exp is low it is infinite, and
        times their K, which is 0, not a number."""
        if static(not masked):
            if self.own_first + self.config.own_rows > at.seqlen_kv:
                thread: T.int32 = fresh("tid.x")
                row: T.int32 = self.first_row(thread) + self.fragment.row(thread % 32)
                for t in T.unroll(self.m_tiles):
                    for word in T.unroll(self.s_stride // 2):
                        if row + (t * self.tile_step + word % 2 * self.fragment.row_step) >= at.seqlen_kv:
                            self.dS[t * (self.s_stride // 2) + word] = T.uint32(0)

    @T.inline
    def leave_nothing(self):
        """A warp whose keys no query of a tile sees: its dS is 0."""
        for i in T.unroll(self.m_tiles * self.s_stride // 2):
            self.dS[i] = T.uint32(0)
        if self.parts > 1:
            self.hand_over(self.dS)

    @T.inline
    def step_down(self, visited, weights, tiles, i, masked):
        """Step ``i``, from the last tile on; the one that is ``stages - 1`` steps further on is fetched."""
        tile: T.int32 = tiles.tile(tiles.steps - 1 - i)
        self.use = i % self.stages
        self.fetched = tile - (self.stages - 1)
        self.arrive_at(masked)
        live: T.bool = i + (self.stages - 1) < tiles.steps
        self.load_numbers(weights.at, live)
        self.fetch(visited, self.before, live)
        if i > 0:
            self.tell(weights.at, i)
        self.await_turn(weights.at, i + 1)
        if masked:
            if self.is_seen(weights.at, tile):
                self.compute(weights, tile, masked)
            else:
                self.leave_nothing()
        else:
            self.compute(weights, tile, masked)
        if self.parts == 1:
            self.hand_over(self.dS)
        self.land(visited, self.before)
        T.cuda.cta_sync()  # dS of all keys is there, and it is this block's turn
        self.multiply_queries()
        self.add_queries(weights.at, tile)

    @T.inline
    def visit_down(self, visited, weights, tiles):
        """All steps over the tiles of one head: ``tiles`` as :class:`QueryTiles`."""
        T.cuda.cta_sync()  # no warp reads the stages any more
        for n in T.unroll(self.stages - 1):
            self.fetched = tiles.tile(tiles.steps - 1 - n)
            self.load_numbers(weights.at, n < tiles.steps)
            self.fetch(visited, n, n < tiles.steps)
            self.land(visited, n)
        if tiles.has_full:
            for i in T.serial(tiles.steps - tiles.left):
                self.step_down(visited, weights, tiles, i, False)
        if tiles.has_masked:
            for i in T.serial(tiles.steps - tiles.left, tiles.steps):
                self.step_down(visited, weights, tiles, i, True)
        T.cuda.cta_sync()
        self.tell(weights.at, tiles.steps)

    # ------------------------------------------------------------ dq

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
        ds_from: T.uint32 = self.exchanged.address(
            lane // 16 * 8 + lane % 8, row // self.exchanged.chunk + lane // 8 % 2
        )
        panel = T.meta_var(T.Cast("uint32", column // keys.panel * keys.panel_bytes))
        k_from: T.uint32 = keys.address(lane % 16, column % keys.panel // keys.chunk + lane // 16) + panel
        for i in T.unroll(self.dq_tiles * self.dq_stride):
            self.dQ[i] = T.float32(0)
        for k in T.unroll(self.config.own_rows // 16):
            for t in T.unroll(self.dq_tiles):
                T.ptx[LOAD_TRANSPOSED](
                    *[self.A[t * 4 + x] for x in range(4)], self.exchanged.at(ds_from, k * 16, t * 2)
                )
            for n in T.unroll(self.dq_columns // 16):
                T.ptx[LOAD_TRANSPOSED](*[self.B[x] for x in range(4)], keys.at(k_from, k * 16, n * 2))
                for t in T.unroll(self.dq_tiles):
                    self.multiply_pair(self.dQ, t * self.dq_stride + n * 8, self.A, t * 4)

    def is_last(self, at, tile):
        """Whether the keys that a tile of queries sees end in this block."""
        M = self.config.step_rows
        last = T.min(tile * M + (M - 1), at.seqlen_q - 1)
        end = self.pattern.keys_of(at, tile * M, last).visible[1]
        return self.own_first + self.config.own_rows >= end

    @T.inline
    def add_queries(self, at, tile):
        """Add this warp's part to the sums, or begin them; or write dq."""
        count = T.meta_var(self.dq_tiles * self.dq_stride)
        elements = T.meta_var(self.config.step_rows * self.pattern.head_dim)
        thread: T.int32 = fresh("tid.x")
        place: T.int64 = self.tile_place(at, tile) * T.int64(elements) + wide(thread // 32 * (count * 32) + thread % 32)
        first: T.bool = self.number == 0
        if self.is_last(at, tile):
            if T.Not(first):
                for i in T.unroll(count):
                    T.evaluate(take_element(T.address_of(self.taken[i]), self.memory.sums.ptr_to([place + i * 32])))
                for i in T.unroll(count):
                    self.dQ[i] = self.taken[i] + self.dQ[i]
            self.write_queries(at, tile)
        else:
            if first:
                for i in T.unroll(count):
                    T.evaluate(store_element(self.memory.sums.ptr_to([place + i * 32]), self.dQ[i]))
            else:
                for i in T.unroll(count):
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
                    self.numbers[self.use, 0, within + down] != T.float32(NEGATIVE_INFINITY),
                ):
                    for g in T.unroll(self.dq_stride // 4):
                        if column + g * 8 < self.tensors.head_dim:
                            x = T.meta_var(t * self.dq_stride + g * 4 + r * 2)
                            self.pack_pair(self.packed, 0, self.dQ[x] * scale, self.dQ[x + 1] * scale)
                            T.ptx["st.global.b32"](
                                memory.ptr_to([to + out.rows_offset(T.int32(down)) + T.int64(g * 8)]), self.packed[0]
                            )
