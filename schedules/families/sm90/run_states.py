"""What the splits of a run leave: kept in shared memory, and at the run's end folded, or left to who folds them.

Of a *run*, splits of the keys of the same rows that a block computes one after the other, each leaves a state
(:mod:`schedules.tile.states`).  The states of a row tile's first run are folded from left to right when it ends, and
the rows are written if they have no other run.  If they have, its state goes to memory in the place of split 0, and
those of the splits of later runs as they are.  The block that is the last to have written states of a row tile
(:mod:`schedules.tile.arrivals`) folds them all, again from left to right: who that is makes no difference to the bits.
"""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.sm90.barriers import WARPGROUP_THREADS, NamedBarriers
from schedules.families.sm90.config import WARPGROUP_ROWS
from schedules.families.sm90.consumer import Consumer
from schedules.tile.arrivals import arrive
from schedules.tile.combine import COLUMNS
from schedules.tile.dtypes import element_type
from schedules.tile.geometry import flat, wide
from schedules.tile.softmax import LOWEST
from schedules.tile.states import NOTHING, PartialStates, factors, finish, folded, reference
from schedules.tile.tile_scheduler import ceildiv

#: States that are folded in one go, their loads don't wait for one another: from shared memory, and from memory.
_AT_ONCE, _ON_THE_WAY = 4, 4


def memory_of_states(pool, pattern: Pattern):
    """Shared memory for the states of a run: outputs ``(rows, columns)``, and ``(rows, 2)`` references and sums.

    Rows are those of its splits together, ``WARPGROUP_ROWS`` at most.
    """
    outputs = pool.alloc((WARPGROUP_ROWS, pattern.head_dim_v), "float32", align=16)
    return outputs, pool.alloc((WARPGROUP_ROWS, 2), "float32", align=8)


def bytes_of_states(pattern: Pattern) -> int:
    """How much that is."""
    return WARPGROUP_ROWS * (pattern.head_dim_v + 2) * 4


@T.meta_class
class RunConsumer(Consumer):
    """The consumer warpgroup of a run: every step masks and takes the maximum.

    Beside what the main loop asks of it, a block says which of its run's splits it has come to, ``number`` of those
    from ``begin`` to ``end`` (exclusive), of ``splits`` that its rows have, and of row ``r`` of ``count``:
    ``has_row(r)``; ``row_number(r)``, its place among the rows of states; ``output(r, column)``, where it is in o;
    ``sink(r)``.  The first run of its rows has ``first_run`` splits.
    """

    def __init__(self, pattern: Pattern, config, block, pipelines, states: PartialStates, memory, warp, lane):
        """``states`` and the counters beside them are arguments of the launch, ``memory`` is shared."""
        Consumer.__init__(self, pattern, config, block, pipelines, None, 0, warp, lane)
        self.states_o, self.states_sums = flat(states.o), flat(states.sums)
        self.counters = flat(states.counters)
        self.columns, self.splits = states.columns, states.splits
        self.o_memory, self.sums_memory = memory
        self.peak, self.total = (T.local_scalar("float32") for _ in range(2))
        self.values = T.alloc_local([COLUMNS], "float32")
        self.peaks, self.sums = (T.alloc_local([_ON_THE_WAY], "float32") for _ in range(2))
        self.outputs_of = T.alloc_local([_ON_THE_WAY * COLUMNS], "float32")

    @property
    def is_alone(self):
        """Whether the run is one split of several, whose state is that of the run."""
        return T.And(self.block.end - self.block.begin == 1, self.block.splits > 1)

    @T.inline
    def first_softmax(self, walk, k):
        """Probabilities of a split's first step, with the exact maximum."""
        column0 = T.meta_var(self._column0(walk.key_first(0)))
        self.k.consumer_release(k, self.lane)
        self.softmax.reset()
        self.softmax.scores(self.acc_s, self._row0(), column0, True)
        self.softmax.track(self.acc_s, 0.0)
        self.softmax.probabilities(self.acc_s, self.softmax.scale)

    @T.inline
    def see_nothing(self):
        """What a split leaves whose rows see nothing of it: zeros, so that no output lives on from split to split."""
        self.softmax.reset()
        for i in T.unroll(self.outputs):
            self.acc_o[i] = T.float32(0)

    @T.inline
    def end_split(self):
        """Keep what a split has left, or leave it to who folds all."""
        self.finished.keep(self.softmax)
        if self.is_alone:
            self.leave_state()
        else:
            self.keep_state()

    @T.inline
    def end_run(self):
        """Write what the run leaves, unless its split has, and fold all states if they are there."""
        block = T.meta_var(self.block)
        barriers = T.meta_var(NamedBarriers(1))
        if T.Not(self.is_alone):
            self.write()
        if block.end - block.begin < block.splits:
            barriers.queries_read(0)  # the threads have written
            if self.warp * 32 + self.lane == 0:
                T.ptx.griddepcontrol.wait()  # the counters are cleared
                there: T.int32 = arrive(self.counters.ptr_to([block.row_number(0)]), block.end - block.begin)
                self.sums_memory[0, 0] = T.reinterpret("float32", there)
            barriers.queries_read(0)
            if T.reinterpret("int32", self.sums_memory[0, 0]) == block.splits:
                self.fold_all()
            barriers.queries_read(0)  # before the next run's states come to the place of that number

    @T.inline
    def leave_state(self):
        """Leave what a split has left to who folds all."""
        block, fragment = T.meta_var((self.block, self.softmax.fragment))
        column: T.int32 = fragment.column(self.lane)
        for r in T.unroll(2):
            row: T.int32 = self.row + fragment.row(self.lane) + r * fragment.row_step
            if block.has_row(row):
                index: T.int64 = block.row_number(row) * wide(self.splits) + wide(block.begin)
                if column == 0:
                    T.ptx["st.global.v2.f32"](
                        self.states_sums.ptr_to([index * 2]), self.finished.row_max[r], self.finished.row_sum[r]
                    )
                for g in T.unroll(self.outputs // 4):
                    i = T.meta_var(g * 4 + r * 2)
                    T.ptx["st.global.v2.f32"](
                        self.states_o.ptr_to([index * self.columns + wide(column + fragment.output_column(g))]),
                        self.acc_o[i],
                        self.acc_o[i + 1],
                    )

    @T.inline
    def keep_state(self):
        """Keep what a split has left in shared memory."""
        block, fragment = T.meta_var((self.block, self.softmax.fragment))
        column: T.int32 = fragment.column(self.lane)
        for r in T.unroll(2):
            row: T.int32 = self.row + fragment.row(self.lane) + r * fragment.row_step
            if row < block.count:
                at: T.int32 = (block.number - block.begin) * block.count + row
                if column == 0:
                    self.sums_memory[at, 0] = self.finished.row_max[r]
                    self.sums_memory[at, 1] = self.finished.row_sum[r]
                for g in T.unroll(self.outputs // 4):
                    i = T.meta_var(g * 4 + r * 2)
                    for e in T.unroll(2):
                        self.o_memory[at, column + fragment.output_column(g) + e] = self.acc_o[i + e]

    @T.inline
    def write(self):
        """Fold the states and write the rows or their state, if it is the first run; else write the states.

        A thread has four columns of a row at a time.
        """
        block = T.meta_var(self.block)
        kept: T.int32 = block.end - block.begin
        barriers = T.meta_var(NamedBarriers(1))
        barriers.queries_read(0)

        @T.inline
        def visit(row, column):
            number: T.int64 = block.row_number(row)
            if block.begin == 0:
                self.begin_fold()
                for first in T.serial(ceildiv(kept, _AT_ONCE)):
                    for a in T.unroll(_AT_ONCE):
                        j: T.int32 = first * _AT_ONCE + a
                        at: T.int32 = T.min(j, kept - 1) * block.count + row
                        self.sums[a] = T.Select(j < kept, self.sums_memory[at, 1], T.float32(0))
                        self.peaks[a] = self.sums_memory[at, 0]
                        for e in T.unroll(COLUMNS):
                            self.outputs_of[a * COLUMNS + e] = self.o_memory[at, column + e]
                    self.fold(_AT_ONCE)
                if kept == block.splits:
                    self.write_output(number, row, column)
                else:
                    self.write_state(number, 0, column, self.peak, self.total)
            else:
                for j in T.serial(kept):
                    at: T.int32 = j * block.count + row
                    for e in T.unroll(COLUMNS):
                        self.values[e] = self.o_memory[at, column + e]
                    self.write_state(number, block.begin + j, column, self.sums_memory[at, 0], self.sums_memory[at, 1])

        self.each_item(visit)
        barriers.queries_read(0)  # before the next run's states come to the place of these

    @T.inline
    def fold_all(self):
        """Fold the states of all runs of the row tile, and write the rows."""
        block = T.meta_var(self.block)
        states: T.int32 = block.splits - block.first_run + 1

        @T.inline
        def visit(row, column):
            number: T.int64 = block.row_number(row)
            self.begin_fold()
            for first in T.serial(ceildiv(states, _ON_THE_WAY)):
                for a in T.unroll(_ON_THE_WAY):
                    j: T.int32 = first * _ON_THE_WAY + a
                    split: T.int32 = T.Select(j == 0, 0, block.splits - states + j)
                    index: T.int64 = number * wide(self.splits) + wide(split)
                    self.sums[a] = T.float32(0)
                    if j < states:
                        T.ptx["ld.global.v2.f32"](self.peaks[a], self.sums[a], self.states_sums.ptr_to([index * 2]))
                        T.ptx["ld.global.v4.f32"](
                            *[self.outputs_of[a * COLUMNS + e] for e in range(COLUMNS)],
                            self.states_o.ptr_to([index * self.columns + wide(column)]),
                        )
                self.fold(_ON_THE_WAY)
            self.write_output(number, row, column)

        self.each_item(visit)

    @T.inline
    def each_item(self, visit):
        """``visit(row, column)``: rows of the work tile, and the first of four columns, shared among the threads."""
        block = T.meta_var(self.block)
        quads = T.meta_var(self.columns // COLUMNS)
        thread: T.int32 = self.warp * 32 + self.lane
        for x in T.serial(ceildiv(block.count * quads, WARPGROUP_THREADS)):
            item: T.int32 = x * WARPGROUP_THREADS + thread
            row: T.int32 = T.truncdiv(item, quads)
            if block.has_row(row):
                visit(row, (item - row * quads) * COLUMNS)

    @T.inline
    def begin_fold(self):
        """Nothing is folded yet, to ``values``, ``peak`` and ``total``."""
        self.peak = T.float32(LOWEST)
        self.total = T.float32(NOTHING)
        for e in T.unroll(COLUMNS):
            self.values[e] = T.float32(NOTHING)

    @T.inline
    def fold(self, count):
        """Fold ``count`` states, which were loaded."""
        for a in T.unroll(count):
            own_peak: T.float32 = reference(self.peaks[a], self.sums[a])
            highest: T.float32 = T.max(self.peak, own_peak)
            both = T.meta_var(factors(self.peak, highest, own_peak, self.sums[a]))
            before: T.float32 = both[0]
            own: T.float32 = both[1]
            self.peak = highest
            self.total = folded(self.total, before, own, self.sums[a])
            for e in T.unroll(COLUMNS):
                self.values[e] = folded(self.values[e], before, own, self.outputs_of[a * COLUMNS + e])

    @T.inline
    def write_state(self, row, part, column, peak, total):
        """Leave four columns of a state, ``values``, to who folds all."""
        index: T.int64 = row * wide(self.splits) + wide(part)
        T.ptx["st.global.v4.f32"](
            self.states_o.ptr_to([index * self.columns + wide(column)]), *[self.values[e] for e in range(COLUMNS)]
        )
        if column == 0:
            T.ptx["st.global.v2.f32"](self.states_sums.ptr_to([index * 2]), peak, total)

    @T.inline
    def write_output(self, number, row, column):
        """Write four columns of the output of a row that the run has whole, and its log-sum-exp."""
        block, geometry = T.meta_var((self.block, self.block.geometry))
        to, lse = T.meta_var((flat(geometry.o.buffer), flat(geometry.lse)))
        pack = T.meta_var(element_type(self.pattern.dtype).pack)
        packed = T.alloc_local([COLUMNS // 2], "uint32")
        finished = T.meta_var(finish(self.peak, self.total, block.sink(row)))
        factor: T.float32 = finished[0]
        if T.And(geometry.lse_wanted, column == 0):
            lse[number] = finished[1]
        for x in T.unroll(COLUMNS // 2):
            T.ptx[pack](packed[x], self.values[2 * x + 1] * factor, self.values[2 * x] * factor)
        if column < geometry.head_dim_v:
            T.ptx["st.global.v2.b32"](to.ptr_to([block.output(row, column)]), packed[0], packed[1])
