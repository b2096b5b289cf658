"""The machine of the launch for dq: a block owns queries and gradients of outputs, and visits keys."""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.mma.backward.config import LaunchConfig
from schedules.families.mma.backward.machine import GradientMachine, Sides
from schedules.families.mma.registers import fresh
from schedules.tile.functions import accurate
from schedules.tile.gradients import Tensors
from schedules.tile.score import NEGATIVE_INFINITY
from schedules.tile.softmax import from_lane
from schedules.tile.table_gradients import Slices, TableGradients, TableSums, learnt_tables
from schedules.tile.weights import negative, shift_of_row, sink_share, summed


@T.meta_class
class QueryMachine(GradientMachine):
    """The block's own rows are queries and dO: lse and delta of its rows come once."""

    def __init__(self, pattern: Pattern, config: LaunchConfig, own: Sides, own_first, tensors: Tensors, pool=None):
        self.tensors = tensors
        self.lse, self.delta = tensors.row_terms()
        self.asked = len(summed(pattern))
        self.parameter_sums = T.alloc_local([self.asked], "float32") if self.asked else None
        GradientMachine.__init__(self, pattern, config, own, own_first, pool, transposed=False)
        self.row_shift, self.row_start = (T.alloc_local([2 * self.m_tiles], "float32") for _ in range(2))

    def place_shared(self, pool):
        self.numbers = pool.alloc((2, self.config.own_rows), "float32", align=16)
        shape = (self.asked, self.config.num_warps)
        self.warp_sums = pool.alloc(shape, "float32", align=16) if self.asked else None
        self.slices = Slices(self.fragment, self.config.step_rows)
        if learnt_tables(self.pattern):
            self.slice_memory = self.slices.memory(pool, self.config.num_warps)

    def shift(self, t, g, r, e):
        """What is added to the score of a register in powers of two."""
        return self.row_shift[t * 2 + r]

    def start(self, t, g, r, e):
        """−delta of a register's query."""
        return self.row_start[t * 2 + r]

    @T.inline
    def read_numbers(self, at):
        """What belongs to the block's rows, one a thread: those past the last one weigh nothing.

        It waits in shared memory, where it costs no registers.  No gradient of a parameter yet.
        """
        thread: T.int32 = fresh("tid.x")
        if thread < self.config.own_rows:
            self.numbers[0, thread] = T.float32(NEGATIVE_INFINITY)
            self.numbers[1, thread] = T.float32(0)
            if self.own_first + thread < at.seqlen_q:
                index: T.int64 = self.term_of(at, self.own_first + thread)
                self.numbers[0, thread] = shift_of_row(self.pattern, at, self.lse[index], self.own_first + thread)
                self.numbers[1, thread] = negative(self.delta[index])
        if self.parameter_sums is not None:
            for n in T.unroll(self.asked):
                self.parameter_sums[n] = T.float32(0)
            if len(self.pattern.learnt_of_sink) > 0:
                if T.And(thread < self.config.own_rows, self.own_first + thread < at.seqlen_q):
                    place: T.int64 = self.term_of(at, self.own_first + thread)
                    share: T.float32 = sink_share(self.pattern, self.tensors, at, self.lse[place], self.delta[place])
                    T.evaluate(self.begin_sums_of_sink(share, at))

    def begin_sums_of_sink(self, share, at) -> int:
        """Let the sums of the sink's parameters begin with a row's share in its gradient; what a text may call."""
        for n, p in enumerate(summed(self.pattern)):
            if self.pattern.is_of_sink(p):
                T.buffer_store(self.parameter_sums, share * accurate(self.pattern.sink_gradient(p.name, at)), [n])
        return 0

    @T.inline
    def clear_places(self, places, tiles):
        """Zeros in gradients of scores, but for tiles that all warps visit.  A barrier is to follow."""
        if places is not None and not self.pattern.is_unmasked:
            M = T.meta_var(self.config.step_rows)
            visited = T.meta_var((tiles.full_begin * M, tiles.full_end * M))
            places.clear(self.own_first, self.config.own_rows, visited, fresh("tid.x"), self.config.threads)

    def table_gradients(self, sums: TableSums, at) -> TableGradients | None:
        """What takes the gradients of tables, if there are any."""
        if not sums.params:
            return None
        warp = fresh("tid.x") // 32
        return TableGradients(sums, self.pattern, at, self.slices, self.slice_memory, warp, self.lane)

    @T.inline
    def prepare(self, n, to):
        """The ``n``-th numbers of this lane's rows."""
        first: T.int32 = self.warp_row + self.fragment.row(self.lane)
        for t in T.unroll(self.m_tiles):
            for r in T.unroll(2):
                to[t * 2 + r] = self.numbers[n, first + (t * self.tile_step + r * self.fragment.row_step)]

    @T.inline
    def prepare_starts(self):
        """−delta of this lane's rows."""
        self.prepare(1, self.row_start)

    @T.inline
    def prepare_shifts(self):
        """The shifts of this lane's rows."""
        self.prepare(0, self.row_shift)

    @T.inline
    def load_numbers(self, at, live):
        """Visited keys have no numbers."""

    @T.inline
    def store_numbers(self, stage):
        """Nor are there any to store."""

    @T.inline
    def arrive_at(self, masked):
        """Wait for the tile in use."""
        self.arrive(self.stages - 2)

    @T.inline
    def clear_blind_rows(self):
        """A row that sees nothing may still hold the NaN of a key that it doesn't see."""
        self.prepare_shifts()
        for t in T.unroll(self.m_tiles):
            for r in T.unroll(2):
                if self.row_shift[t * 2 + r] == T.float32(NEGATIVE_INFINITY):
                    for g in T.unroll(self.d_stride // 4):
                        for e in T.unroll(2):
                            self.sum_ds[t * self.d_stride + g * 4 + r * 2 + e] = T.float32(0)

    @T.inline
    def store_parameters(self, sums, place):
        """The block's share in the gradients of parameters, to where ``sums`` has those of the work tile ``place``.

        Rows after the last sequence have none.
        """
        tensors = T.meta_var(self.tensors)
        tiles = T.meta_var(tensors.tiles_of_rows(self.config.own_rows))
        head_row = T.meta_var(tensors.head_row(place.batch, place.head))
        index = T.meta_var(head_row * tiles + tensors.first_tile(place.batch, self.config.own_rows) + place.m_block)
        count = T.meta_var(tensors.head_rows * tiles)
        for n in T.unroll(self.asked):
            for step in T.unroll(5):
                self.parameter_sums[n] = self.parameter_sums[n] + from_lane(self.parameter_sums[n], 1 << step)
            if self.lane == 0:
                self.warp_sums[n, fresh("tid.x") // 32] = self.parameter_sums[n]
        T.cuda.cta_sync()
        for n in T.unroll(self.asked):
            if T.And(fresh("tid.x") == n, tensors.has_sequence(place.batch)):
                self.parameter_sums[n] = self.warp_sums[n, 0]
                for w in T.unroll(1, self.config.num_warps):
                    self.parameter_sums[n] = self.parameter_sums[n] + self.warp_sums[n, w]
                sums[n * count + index] = self.parameter_sums[n]
