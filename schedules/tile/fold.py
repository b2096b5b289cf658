"""The launch that folds the states of the parts of rows' keys, from left to right, on any GPU.

A block has a row, or as many of its columns as a warp has lanes for: its warps bring the states to shared memory
together, and each folds them, since that takes no longer than waiting for one that does.
"""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.parameters import append_arguments
from schedules.definition.pattern import Pattern
from schedules.tile.combine import Partials, RaggedPartials, Sinks
from schedules.tile.geometry import flat, local, wide
from schedules.tile.score import NEGATIVE_INFINITY
from schedules.tile.sequences import find_owner
from schedules.tile.states import BATCH, COLUMNS, WARP_COLUMNS, Fold, PartialStates
from schedules.tile.tile_scheduler import Traversal

#: Warps of a block, which fetch the states of a row together, as many columns of them as one has lanes for.
_WARPS = 2
#: States of a batch that each fetches.
_OWN = BATCH // _WARPS


@T.meta_class
class States(Partials):
    """The arguments of the launch, and sizes."""

    def __init__(self, pattern: Pattern, traversal: Traversal, handles, alignment: int):
        states = PartialStates(handles[:2], pattern.head_dim_v)
        self._tensors(pattern, traversal, handles[2:], alignment)
        self.rows, self.parts, self.columns = states.rows, states.parts, states.columns
        self.states_o, self.states_sums = states.o, states.sums

    def row(self, row) -> DenseRow:
        """What belongs to a row; made behind ``T.device_entry()``."""
        return DenseRow(self, row)


@T.meta_class
class RaggedStates(RaggedPartials):
    """The same of ragged sequences, each with splits of its own; rows are in the order (heads, positions)."""

    def __init__(self, pattern: Pattern, handles, sequences, split_count, alignment: int):
        states = PartialStates(handles[:2], pattern.head_dim_v)
        self._sequences(pattern, handles[2:], sequences, split_count, alignment)
        self.rows, self.parts, self.columns = states.rows, states.parts, states.columns
        self.states_o, self.states_sums = states.o, states.sums
        self.splits = self.parts

    def row(self, row) -> RaggedRow:
        """What belongs to a row; made behind ``T.device_entry()``."""
        return RaggedRow(self, row)


@T.meta_class
class DenseRow:
    """A row, in the order (batch, heads, seqlen_q): it has as many states as all, ``count``."""

    def __init__(self, at: States, row):
        self.at, self.row, self.count = at, row, at.parts

    @T.inline
    def find(self, lane):
        """Nothing has to be looked up."""

    @T.inline
    def fold(self, fold: Fold, column):
        """Fold its states."""
        fold.fold(self.count, column)

    @T.inline
    def write(self, fold: Fold, sinks: Sinks, column, warp):
        """Write what is left of it; one warp does."""
        at, row = T.meta_var((self.at, self.row))
        head_row: T.int32 = T.truncdiv(row, at.seqlen_q)
        b: T.int32 = T.truncdiv(head_row, at.heads)
        head: T.int32 = head_row - b * at.heads
        if sinks.pattern.has_sink:
            fold.add_sink(sinks.of(b, head))
        if warp == 0:
            fold.store(at.o, (b, head, row - head_row * at.seqlen_q, column), at.head_dim_v)
            if T.And(column == 0, wide(at.lse_length) >= wide(at.rows)):
                at.lse[row] = fold.log_sum_exp


@T.meta_class
class RaggedRow:
    """A row, in the order (heads, positions): a whole warp finds its sequence, which says how many states it has.

    One behind all sequences, or of a sequence without keys, has none.
    """

    def __init__(self, at: RaggedStates, row):
        self.at, self.row = at, row
        self.owner, self.count = (T.local_scalar("int32") for _ in range(2))

    @T.inline
    def find(self, lane):
        """Find the row's sequence.

        Where each has one query it is the one of the row's number, and its length is asked for beside where it begins.
        """
        at = T.meta_var(self.at)
        position: T.int32 = T.truncmod(self.row, at.total_q)
        likely: T.int32 = T.min(position, at.queries.batch - 1)
        keys: T.int32 = at.lengths[likely]
        begin: T.int32 = at.queries.begin(likely)
        owner: T.int32 = likely
        if T.Or(position < begin, position >= at.queries.end(likely)):
            find_owner(at.queries, position, lane, owner)
            keys = at.lengths[T.min(owner, at.queries.batch - 1)]
        self.owner = owner
        self.count = T.Select(owner < at.queries.batch, T.min(at.split_count(keys), at.parts), 0)

    @T.inline
    def fold(self, fold: Fold, column):
        """Fold its states."""
        if self.count > 0:
            fold.fold(self.count, column)
        else:
            fold.clear()

    @T.inline
    def write(self, fold: Fold, sinks: Sinks, column, warp):
        """Write what is left of it; one warp does."""
        at, row = T.meta_var((self.at, self.row))
        head: T.int32 = T.truncdiv(row, at.total_q)
        if sinks.pattern.has_sink:
            sink: T.float32 = T.float32(NEGATIVE_INFINITY)
            if self.owner < at.queries.batch:
                sink = sinks.of(self.owner, head)
            fold.add_sink(sink)
        if warp == 0:
            fold.store(at.o, (0, head, row - head * at.total_q, column), at.head_dim_v)
            if T.And(column == 0, wide(at.lse_length) >= wide(at.rows)):
                at.lse[row] = fold.log_sum_exp


@T.meta_class
class RowStates:
    """The states of a row, as each of the block's warps looks for them; they need no place beside their number.

    Outputs are on their way to shared memory while the sums are looked at: one journey to memory, not two.
    """

    def __init__(self, at: States | RaggedStates, count, row, column, warp, lane):
        self.o, self.sums, self.columns, self.count = flat(at.states_o), flat(at.states_sums), at.columns, count
        self.first = local(wide(row) * wide(at.parts))
        self.column = local(T.min(column, at.columns - COLUMNS))
        self.warp, self.lane = warp, lane
        self.words = T.alloc_local([_OWN * COLUMNS], "float32")  # of states behind the last one anything
        self.shared = T.alloc_shared([BATCH * WARP_COLUMNS], "float32")

    @T.inline
    def look_up(self, number, place, sums):
        T.ptx["ld.global.v2.f32"](sums[0], sums[1], self.sums.ptr_to([(self.first + wide(number)) * 2]))

    @T.inline
    def fetch(self, batch):
        for a in T.unroll(_OWN):
            number: T.int32 = batch * BATCH + a * _WARPS + self.warp
            if number < self.count:
                index = T.meta_var((self.first + wide(number)) * self.columns + wide(self.column))
                T.ptx["ld.global.v2.f32"](self.words[a * COLUMNS], self.words[a * COLUMNS + 1], self.o.ptr_to([index]))

    @T.inline
    def fetched(self):
        for a in T.unroll(_OWN):
            for x in T.unroll(COLUMNS):
                at = T.meta_var((a * _WARPS + self.warp) * WARP_COLUMNS + self.lane * COLUMNS + x)
                self.shared[at] = self.words[a * COLUMNS + x]
        T.cuda.cta_sync()

    @T.inline
    def load(self, number, place, column, to, first):
        for x in T.unroll(COLUMNS):
            to[first + x] = self.shared[number * WARP_COLUMNS + self.lane * COLUMNS + x]

    @T.inline
    def done(self):
        T.cuda.cta_sync()


def fold_states(pattern: Pattern, traversal: Traversal, name: str, alignment: int) -> PrimFunc:
    """``(o_partial, sums_partial, o, lse, *sinks)``: states (:mod:`schedules.tile.states`) to o and lse.

    ``sinks`` are the parameters of the pattern's sink, if it has one.  The launch before lets this one begin early.
    """
    sinks = Sinks(pattern)

    @T.prim_func(check_well_formed=False)
    def kernel(o_partial: T.handle, sums_partial: T.handle, o: T.handle, lse: T.handle):
        _fold(pattern, States(pattern, traversal, (o_partial, sums_partial, o, lse), alignment), sinks)

    return append_arguments(kernel.with_attr("global_symbol", name), sinks.arguments)


def fold_ragged(pattern: Pattern, split_count, name: str, alignment: int) -> PrimFunc:
    """``(o_partial, sums_partial, o, lse, cu_seqlens_q, seqlens_k, longer, *sinks)``: the same of ragged sequences.

    A sequence of ``keys`` keys has ``split_count(keys, longer)`` states.
    """
    sinks = Sinks(pattern)

    @T.prim_func(check_well_formed=False)
    def kernel(
        o_partial: T.handle,
        sums_partial: T.handle,
        o: T.handle,
        lse: T.handle,
        cu_seqlens_q: T.handle,
        seqlens_k: T.handle,
        longer: T.int32,
    ):
        handles = T.meta_var(((o_partial, sums_partial, o, lse), (cu_seqlens_q, seqlens_k)))
        _fold(pattern, RaggedStates(pattern, *handles, lambda keys: split_count(keys, longer), alignment), sinks)

    return append_arguments(kernel.with_attr("global_symbol", name), sinks.arguments)


@T.inline
def _fold(pattern: Pattern, at, sinks: Sinks):
    """The kernel's text."""
    shares = T.meta_var(-(-pattern.head_dim_v // WARP_COLUMNS))  # blocks that share a row
    T.device_entry()
    block = T.cta_id([at.rows * shares])
    warp = T.warp_id([_WARPS])
    lane = T.lane_id([32])
    T.thread_id([_WARPS * 32])
    row: T.int32 = T.truncdiv(block, shares)
    column: T.int32 = (block - row * shares) * WARP_COLUMNS + lane * COLUMNS
    own = at.row(row)
    own.find(lane)
    fold = Fold(RowStates(at, own.count, row, column, warp, lane), at.columns, lane)
    T.ptx.griddepcontrol.wait()
    own.fold(fold, column)  # every warp: what the first one writes costs no more
    own.write(fold, sinks, column, warp)
