"""The launch that folds the states of the parts of rows' keys, from left to right, on any GPU.

A block has a row, or as many of its columns as a warp has lanes for: its warps bring the states to shared memory
together, and each folds them, since that takes no longer than waiting for one that does.
"""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.parameters import append_arguments
from schedules.definition.pattern import Pattern
from schedules.tile.combine import Partials, Sinks
from schedules.tile.geometry import flat, local, wide
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


@T.meta_class
class RowStates:
    """The states of a row, as each of the block's warps looks for them; they need no place beside their number.

    Outputs are on their way to shared memory while the sums are looked at: one journey to memory, not two.
    """

    def __init__(self, at: States, row, column, warp, lane):
        self.o, self.sums, self.columns, self.count = flat(at.states_o), flat(at.states_sums), at.columns, at.parts
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


@T.inline
def _fold(pattern: Pattern, at: States, sinks: Sinks):
    """The kernel's text."""
    shares = T.meta_var(-(-pattern.head_dim_v // WARP_COLUMNS))  # blocks that share a row
    T.device_entry()
    block = T.cta_id([at.rows * shares])
    warp = T.warp_id([_WARPS])
    lane = T.lane_id([32])
    T.thread_id([_WARPS * 32])
    row: T.int32 = T.truncdiv(block, shares)
    column: T.int32 = (block - row * shares) * WARP_COLUMNS + lane * COLUMNS
    fold = Fold(RowStates(at, row, column, warp, lane), at.columns, lane)
    T.ptx.griddepcontrol.wait()
    fold.fold(at.parts, column)  # every warp: what the first one writes costs no more
    head_row: T.int32 = T.truncdiv(row, at.seqlen_q)
    b: T.int32 = T.truncdiv(head_row, at.heads)
    head: T.int32 = head_row - b * at.heads
    if pattern.has_sink:
        fold.add_sink(sinks.of(b, head))
    if warp == 0:
        fold.store(at.o, (b, head, row - head_row * at.seqlen_q, column), at.head_dim_v)
        if T.And(column == 0, wide(at.lse_length) >= wide(at.rows)):
            at.lse[row] = fold.log_sum_exp
