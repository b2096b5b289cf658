"""States of rows on Hopper: what a consumer warpgroup leaves of a split of the keys, and a cluster that folds it.

A split's state (:mod:`schedules.tile.states`) stays in the block's shared memory, until the blocks that have a row's
splits, a cluster, fold them from left to right, each warp those of some rows and columns, whichever blocks hold them.
Or it goes to global memory, for a second launch that folds them in the same order (:mod:`schedules.tile.fold`).
"""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.sm90.barriers import WARPS
from schedules.families.sm90.config import WARPGROUP_ROWS
from schedules.families.sm90.consumer import Consumer
from schedules.tile.geometry import flat, site, wide
from schedules.tile.parameters import Parameters
from schedules.tile.states import COLUMNS, WARP_COLUMNS, Fold
from schedules.tile.static import static


def memory_of_states(pool, pattern: Pattern):
    """Shared memory for the states of a block's splits: of each row its outputs, its reference and its sum.

    Rows are those of its splits together, ``WARPGROUP_ROWS`` at most.
    """
    return pool.alloc((WARPGROUP_ROWS, pattern.head_dim_v + 2), "float32", align=16)


def bytes_of_states(pattern: Pattern) -> int:
    """How much that is."""
    return WARPGROUP_ROWS * (pattern.head_dim_v + 2) * 4


@T.meta_class
class StatesOfCluster:
    """The states of row ``row`` of a cluster's blocks, as a warp looks for them; a place is a shared address."""

    def __init__(self, block, memory, columns: int, row):
        self.block, self.memory, self.columns, self.row = block, memory, columns, row

    @T.inline
    def look_up(self, number, place, sums):
        rank: T.int32 = T.truncdiv(number, self.block.run_length)
        at: T.int32 = (number - rank * self.block.run_length) * self.block.count + self.row
        own = T.meta_var(T.cuda.cvta_generic_to_shared(self.memory.ptr_to([at, 0])))
        T.ptx["mapa.shared::cluster.u32"](place[0], own, T.Cast("uint32", rank))
        T.ptx["ld.shared::cluster.v2.f32"](sums[0], sums[1], place[0] + T.uint32(self.columns * 4))

    @T.inline
    def fetch(self, batch):
        """States are read where they are."""

    @T.inline
    def fetched(self):
        """Nothing to wait for."""

    done = fetched

    @T.inline
    def load(self, number, place, column, to, first):
        T.ptx["ld.shared::cluster.v2.f32"](to[first], to[first + 1], place + T.Cast("uint32", column * 4))


@T.meta_class
class StatesOfBlock(StatesOfCluster):
    """The same of a block that has all states of its rows; a place is a row of its memory."""

    @T.inline
    def look_up(self, number, place, sums):
        at: T.int32 = number * self.block.count + self.row
        place[0] = T.Cast("uint32", at)
        T.ptx["ld.shared.v2.f32"](sums[0], sums[1], self.memory.ptr_to([at, self.columns]))

    @T.inline
    def load(self, number, place, column, to, first):
        T.ptx["ld.shared.v2.f32"](to[first], to[first + 1], self.memory.ptr_to([T.Cast("int32", place), column]))


@T.meta_class
class StateConsumer(Consumer):
    """A consumer warpgroup that leaves states, in the shared memory ``memory`` or in global memory, ``states``; of the
    two there may be one.

    Its block tells, beside what the main loop asks: ``number``, the split that it has come to, and how many it has kept
    before, ``kept``; how many are ``folded``, of which each block of the cluster has ``run_length``, and the place in
    it, ``run``; ``count`` rows of its row tile; ``has_row(row)`` and ``number_of_row(row)``, whether there is one and
    which of the whole output; ``place_of(position)``, where a query of the sequence is in q and o.
    """

    #: Whether row tiles have rows for the first halves of warps' tiles alone; None where that is asked of each tile.
    few = None
    #: Where the states are that it folds, and whether that is the block's own memory.
    kept_states = StatesOfCluster
    are_near = False

    def __init__(self, pattern: Pattern, config, block, pipelines, states, memory, warp, lane):
        Consumer.__init__(self, pattern, config, block, pipelines, None, 0, warp, lane)
        self.columns, self.memory = pattern.head_dim_v, memory
        if states is not None:
            self.states_o, self.states_sums, self.parts = flat(states.o), flat(states.sums), states.parts

    # ------------------------------------------------------------ rows that there are

    @T.inline
    def of_rows(self, compute):
        """``compute()`` for the rows of this warp that there are.

        Of its 16 most calls have up to 8, and most warps have none: a step takes as long as the one warp that has some.
        """
        row = T.meta_var(self.row)
        if static(self.few is None):
            if row + self.softmax.fragment.row_step < self.block.count:
                compute()
            else:
                if row < self.block.count:
                    self.softmax.of_first_rows(compute)
        else:
            if row < self.block.count:
                if static(self.few):
                    self.softmax.of_first_rows(compute)
                else:
                    compute()

    @T.inline
    def clear_weights(self):
        """Before the first step: rows that there aren't weigh nothing."""
        for i in T.unroll(self.config.block_n // 4):
            self.p[i] = T.uint32(0)

    @T.inline
    def first_softmax(self, walk, k):
        """Probabilities of a split's first step, with the exact maximum."""
        self.k.consumer_release(k, self.lane)
        self.softmax.reset()
        self.of_rows(lambda: self.first_weights(walk))

    @T.inline
    def first_weights(self, walk):
        """The same of the rows that there are."""
        self.softmax.scores(self.acc_s, self._row0(), self._column0(walk.key_first(0)), True)
        self.softmax.track(self.acc_s, 0.0)
        self.softmax.probabilities(self.acc_s, self.softmax.scale, self.acc_s)

    @T.inline
    def weigh(self, walk, i, masked):
        self.of_rows(lambda: Consumer.weigh(self, walk, i, masked))

    @T.inline
    def pack(self):
        self.of_rows(lambda: Consumer.pack(self))

    @T.inline
    def take_in(self):
        self.of_rows(self.take_in_rows)

    @T.inline
    def take_in_rows(self):
        """The same of the rows that there are."""
        Consumer.pack(self)
        Consumer.rescale(self)

    # ------------------------------------------------------------ states

    @T.inline
    def leave_state(self):
        """Leave the state of a split, which is in registers, to the second launch."""
        block, fragment = T.meta_var((self.block, self.softmax.fragment))
        column: T.int32 = fragment.column(self.lane)
        for r in T.unroll(2):
            row: T.int32 = block.row_first + self.row + fragment.row(self.lane) + r * fragment.row_step
            if block.has_row(row):
                number: T.int64 = block.number_of_row(row)
                index: T.int64 = number * wide(self.parts) + wide(block.number)
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
                at: T.int32 = block.kept * block.count + row
                if column == 0:
                    self.memory[at, self.columns] = self.finished.row_max[r]
                    self.memory[at, self.columns + 1] = self.finished.row_sum[r]
                for g in T.unroll(self.outputs // 4):
                    i = T.meta_var(g * 4 + r * 2)
                    for e in T.unroll(2):
                        self.memory[at, column + fragment.output_column(g) + e] = self.acc_o[i + e]

    def sink(self, head):
        """The logit that a query head has beside those of keys."""
        geometry, batch = self.block.geometry, self.block.batch
        return geometry.sink(self.pattern, site(geometry, Parameters(geometry, batch, head), batch, head))

    @T.inline
    def fold(self):
        """Fold the states of the cluster's blocks, and write the rows: a warp has every n-th share of them."""
        block, geometry, scheduler = T.meta_var((self.block, self.block.geometry, self.block.scheduler))
        shares = T.meta_var(-(-self.columns // WARP_COLUMNS))  # warps that share a row
        self.await_states()
        item: T.int32 = self.warp * scheduler.runs + block.run
        while item < block.count * shares:
            row: T.int32 = T.truncdiv(item, shares)
            column: T.int32 = (item - row * shares) * WARP_COLUMNS + self.lane * COLUMNS
            position: T.int32 = block.rows.position(block.row_first + row)
            head: T.int32 = block.head + block.rows.head(block.row_first + row)
            if position < block.seqlen_q:
                fold = Fold(self.kept_states(block, self.memory, self.columns, row), self.columns, self.lane)
                if static(self.are_near):
                    fold.fold_near(block.folded, column)
                else:
                    fold.fold(block.folded, column)
                if self.pattern.has_sink:
                    fold.add_sink(self.sink(head))
                fold.store(geometry.o, (block.batch, head, block.place_of(position), column), geometry.head_dim_v)
                if T.And(geometry.lse_wanted, column == 0):
                    lse = T.meta_var(flat(geometry.lse))
                    lse[geometry.lse_offset(block.batch, head, block.place_of(position))] = fold.log_sum_exp
            item = item + scheduler.runs * WARPS
        self.let_go()

    @T.inline
    def await_states(self):
        """Until the states of all blocks of the cluster are there."""
        T.ptx.barrier.cluster.arrive.release.aligned()
        T.ptx.barrier.cluster.wait.acquire.aligned()

    @T.inline
    def let_go(self):
        """Until all have read them: so long a block's states stay where they are."""
        T.ptx.barrier.cluster.arrive.relaxed.aligned()
        T.ptx.barrier.cluster.wait.aligned()
