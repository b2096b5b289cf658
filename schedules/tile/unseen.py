"""The rows of ragged sequences that see no keys: those of sequences without any, and those behind the last sequence.

Blocks that compute a sequence's keys don't come to them.  The launch that clears the counters of those blocks
(:mod:`schedules.tile.arrivals`) writes what such a row is: zeros, and the log-sum-exp of its sink, if it has one.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.parameters import append_arguments
from schedules.definition.pattern import Pattern
from schedules.tile.combine import COLUMNS, RaggedPartials, Sinks
from schedules.tile.geometry import flat
from schedules.tile.score import NEGATIVE_INFINITY
from schedules.tile.sequences import find_owner
from schedules.tile.tile_scheduler import ceildiv

#: A warp has a row.
_LANES, _WARPS = 32, 8


@T.meta_class
class UnseenRows(RaggedPartials):
    """The arguments of the launch: ``counters``, one for each of ``rows``, and the tensors of results."""

    def __init__(self, pattern: Pattern, counters, results, sequences, alignment: int):
        self._ragged(pattern, results, sequences, alignment)
        self.rows = tirx.Var("rows", "int32")
        self.counters = T.match_buffer(counters, (self.rows,), "int32", align=4)


def write_unseen(pattern: Pattern, name: str, alignment: int) -> PrimFunc:
    """``(counters, o, lse, cu_seqlens_q, seqlens_k, *sinks)``; the launch that follows may begin at once."""
    sinks = Sinks(pattern)

    @T.prim_func(check_well_formed=False)
    def kernel(counters: T.handle, o: T.handle, lse: T.handle, cu_seqlens_q: T.handle, seqlens_k: T.handle):
        at = UnseenRows(pattern, counters, (o, lse), (cu_seqlens_q, seqlens_k), alignment)
        T.device_entry()
        block = T.cta_id([ceildiv(at.rows, _WARPS)])
        warp = T.warp_id([_WARPS])
        lane = T.lane_id([_LANES])
        T.thread_id([_WARPS * _LANES])
        T.ptx.griddepcontrol.launch_dependents()
        to = T.meta_var(flat(at.counters))
        row: T.int32 = block * _WARPS + warp
        if T.And(lane == 0, row < at.rows):
            to[row] = 0
        owner: T.int32 = 0
        find_owner(at.queries, T.truncmod(row, at.total_q), lane, owner)
        sink: T.float32 = T.float32(NEGATIVE_INFINITY)
        if pattern.has_sink:
            at.look_up_sink(sinks, row, lane, sink)
        keys: T.int32 = 0
        if owner < at.queries.batch:
            keys = at.lengths[owner]
        if T.And(row < at.rows, keys <= 0):
            acc = T.alloc_local([COLUMNS], "float32")
            for x in T.unroll(COLUMNS):
                acc[x] = T.float32(0)
            for x in T.unroll(-(-pattern.head_dim_v // (COLUMNS * _LANES))):
                part: T.int32 = x * _LANES + lane
                if part * COLUMNS < pattern.head_dim_v:
                    at.write(row, part * COLUMNS, part, acc, T.float32(0), sink)

    return append_arguments(kernel.with_attr("global_symbol", name), sinks.arguments)
