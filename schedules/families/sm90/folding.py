"""A consumer warpgroup that computes splits of the keys one after the other, and folds what they leave.

Each split is computed from a reference of its own, and the states are folded from left to right
(:mod:`schedules.tile.states`): outputs of the splits before lie in shared memory meanwhile, those of rows that there
are.  A block that has begun a row's first split and computes all others writes the row; one that has begun it and
leaves off writes the state of the splits that it has folded, in the place of the first one; any other block writes a
state of each split.  The launch that follows folds those that there are then.
"""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.sm90.barriers import WARPGROUP_THREADS
from schedules.families.sm90.config import WARPGROUP_ROWS
from schedules.families.sm90.consumer import Consumer
from schedules.tile.dtypes import element_type
from schedules.tile.geometry import flat, wide
from schedules.tile.states import Fold, PartialStates, inverse, log_sum_exp
from schedules.tile.static import static


def memory_aside(pool, pattern: Pattern):
    """Shared memory for the states of splits before.

    Outputs are ``(groups, threads, 4)``, four columns of a thread at a place, references and sums ``(rows, 2)``.
    """
    outputs = pool.alloc((pattern.head_dim_v // 8, WARPGROUP_THREADS, 4), "float32", align=16)
    return outputs, pool.alloc((WARPGROUP_ROWS, 2), "float32", align=8)


def bytes_aside(pattern: Pattern) -> int:
    """How much that is."""
    return WARPGROUP_ROWS * (pattern.head_dim_v + 2) * 4


@T.meta_class
class FoldingConsumer(Consumer):
    """The consumer warpgroup: every step masks and takes the maximum, and rows go straight to memory.

    What a block is at, ``block``, has ``row_first``, ``rows``, ``batch`` and ``geometry``; ``folds`` says whether it
    began with the rows' first split, and ``number`` is the split.
    """

    def __init__(self, pattern: Pattern, config, block, pipelines, states: PartialStates, aside, warp, lane):
        Consumer.__init__(self, pattern, config, block, pipelines, None, 0, warp, lane)
        self.states_o, self.states_sums = flat(states.o), flat(states.sums)
        self.columns, self.parts = states.columns, states.parts
        # Of the splits before, in shared memory: outputs as in ``acc_o``, references and sums.
        self.aside, self.sums_aside = aside
        self.peak, self.total = (T.alloc_local([2], "float32") for _ in range(2))
        self.words = T.alloc_local([4], "uint32")
        self.fold = Fold(2)
        self.counts = None if states.counts is None else flat(states.counts)

    def _row_number(self, r):
        """Number of a row in the row tile."""
        return self._row_of_lane() + r * self.softmax.fragment.row_step

    def _row_of_lane(self):
        return self.row + self.softmax.fragment.row(self.lane)

    def _has_rows(self):
        """Whether this lane has a row; its second one is further down."""
        return self.block.row_first + self._row_of_lane() < self.block.rows.count

    def _aside(self, group):
        """Where four outputs of this lane are kept."""
        return self.aside.ptr_to([group, self.warp * 32 + self.lane, 0])

    @T.inline
    def steps(self, walk):
        """The steps of a split behind the first one, from right to left: masked, full, masked."""
        self.masked_steps(walk, 1, T.min(walk.full_begin, walk.steps))
        if walk.has_full:
            for i in T.serial(T.max(walk.full_begin, 1), T.min(walk.full_end, walk.steps)):
                self.step(walk, i, False)
        if walk.has_left:
            self.masked_steps(walk, T.max(walk.full_end, 1), walk.steps)

    @T.inline
    def change_split(self, walk):
        """The first step of a split, beside which the one before is finished."""
        k = T.meta_var(self.k_state())
        v = T.meta_var(self.v_state())
        self.first = 0
        if self.pattern.has_gaps:
            self.count(walk)
        self.k.consumer_wait(k)
        self.issue(k, v)
        self.finished.keep(self.softmax)
        self.first_softmax(walk, k)
        self.next_k(k, self._more(walk, 0))
        self.finish_pv(v)
        self.softmax.pack(self.acc_s, self.p)
        self.softmax.add_sums()
        self.leave()
        for i in T.unroll(self.outputs):
            self.acc_o[i] = T.float32(0)

    @T.inline
    def end_split(self):
        """The last product of a split."""
        v = T.meta_var(self.v_state())
        self.issue_pv(v)
        self.finish_pv(v)
        self.finished.keep(self.softmax)
        self.leave()

    @T.inline
    def nothing_seen(self):
        """The state of rows that see nothing of a split."""
        self.softmax.reset()
        for r in T.unroll(2):
            self.finished.row_max[r] = self.softmax.row_max[r]
            self.finished.row_sum[r] = self.softmax.row_sum[r]
        for i in T.unroll(self.outputs):
            self.acc_o[i] = T.float32(0)

    @T.inline
    def put_together(self):
        """Fold what the split has left to the splits before."""
        for r in T.unroll(2):
            self.peak[r] = self.sums_aside[self._row_number(r), 0]
            self.total[r] = self.sums_aside[self._row_number(r), 1]
        T.cuda.warp_sync()  # one lane writes them again for all that share a row
        self.fold.begin(self.peak, self.total, self.finished.row_max, self.finished.row_sum)
        if self._has_rows():
            for g in T.unroll(self.outputs // 4):
                T.ptx["ld.shared.v4.b32"](*[self.words[x] for x in range(4)], self._aside(g))
                for x in T.unroll(4):
                    before = T.meta_var(T.reinterpret("float32", self.words[x]))
                    self.acc_o[g * 4 + x] = self.fold.folded(x // 2, before, self.acc_o[g * 4 + x])
        for r in T.unroll(2):
            self.finished.row_max[r] = self.peak[r]
            self.finished.row_sum[r] = self.total[r]

    @T.inline
    def set_aside(self):
        """Keep the state until the next split is computed."""
        if self._has_rows():
            for g in T.unroll(self.outputs // 4):
                words = T.meta_var([T.reinterpret("uint32", self.acc_o[g * 4 + x]) for x in range(4)])
                T.ptx["st.shared.v4.b32"](self._aside(g), *words)
        if self.softmax.fragment.column(self.lane) == 0:
            for r in T.unroll(2):
                self.sums_aside[self._row_number(r), 0] = self.finished.row_max[r]
                self.sums_aside[self._row_number(r), 1] = self.finished.row_sum[r]
        T.cuda.warp_sync()

    @T.inline
    def tell(self, row, column):
        """Say how many of a row's splits are folded in the place of the first one, 0 for none, if nobody else knows."""
        if static(self.counts is not None):
            if T.And(column == 0, T.Or(self.block.folds != 0, self.block.number == 0)):
                self.counts[row] = T.Select(self.block.folds != 0, self.block.number + 1, 0)

    @T.inline
    def write_states(self):
        """Leave the rows' states to the second launch: the first run's in the place of split 0."""
        geometry, fragment = T.meta_var((self.block.geometry, self.softmax.fragment))
        column: T.int32 = fragment.column(self.lane)
        part: T.int32 = T.Select(self.block.folds != 0, 0, self.block.number)

        @T.inline
        def write(r, head, position):
            row: T.int64 = geometry.lse_offset(self.block.batch, head, position)
            index: T.int64 = row * wide(self.parts) + wide(part)
            self.tell(row, column)
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

        self.each_row(write)

    @T.inline
    def write_rows(self):
        """Write output and log-sum-exp of rows whose keys the run has all."""
        block, geometry, fragment = T.meta_var((self.block, self.block.geometry, self.softmax.fragment))
        column: T.int32 = fragment.column(self.lane)
        to, lse = T.meta_var((flat(geometry.o.buffer), flat(geometry.lse)))
        pack = T.meta_var(element_type(self.pattern.dtype).pack)
        packed = T.alloc_local([1], "uint32")

        @T.inline
        def write(r, head, position):
            factor: T.float32 = inverse(self.finished.row_sum[r])
            self.tell(geometry.lse_offset(block.batch, head, position), column)
            if T.And(geometry.lse_wanted, column == 0):
                lse[geometry.lse_offset(block.batch, head, position)] = log_sum_exp(
                    self.finished.row_max[r], self.finished.row_sum[r]
                )
            at: T.int64 = geometry.o.offset(block.batch, head, position, column)
            for g in T.unroll(self.outputs // 4):
                i = T.meta_var(g * 4 + r * 2)
                T.ptx[pack](
                    packed[0],
                    T.Select(factor == T.float32(0), T.float32(0), self.acc_o[i + 1] * factor),
                    T.Select(factor == T.float32(0), T.float32(0), self.acc_o[i] * factor),
                )
                if column + fragment.output_column(g) < geometry.head_dim_v:
                    T.ptx["st.global.b32"](to.ptr_to([at + wide(fragment.output_column(g))]), packed[0])

        self.each_row(write)
