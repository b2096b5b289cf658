"""Which tiles of queries each block of keys visits, where blocks add to a tile one after the other.

A launch finds what each tile of queries sees (:mod:`schedules.tile.mask_ranges`), and so which blocks add to it: all
from the first that has a key which it sees to the last.  Each of these waits for the one before, and must visit the
tile, whatever ids there are.  What a block visits is therefore made of these numbers, and not found anew, by a launch
after that one: all tiles from the first to the last to which it adds.  Between them there may be some to which it
doesn't, where ids are in no order; it visits those in vain.

:class:`Walked` is a pattern as a kernel sees it that has both.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.pattern import Pattern, Site
from schedules.tile.geometry import flat, wide
from schedules.tile.mask_ranges import (
    BLOCKS_PER_SM,
    THREADS,
    Extremes,
    MaskCall,
    Ranged,
    kept,
    ranges_within,
)
from schedules.tile.mask_ranges import workspace as workspace
from schedules.tile.tile_scheduler import Traversal, ceildiv


class Walked(Ranged):
    """A pattern with the numbers of blocks of ``keys`` keys, which are made of those of tiles of ``queries`` queries;
    it has these too."""

    def __init__(self, pattern: Pattern, keys: int, queries: int):
        self.of_queries = Ranged(pattern, "i", queries)
        Ranged.__init__(self, self.of_queries, "j", keys)
        self.mask_split = pattern.split_with_ids()

    def adders(self, at: Site, row_first: Expr, row_last: Expr) -> tuple[Expr, Expr]:
        """The first of the blocks of keys that add to a tile of queries, and the one after the last."""
        lo, hi = self.keys_of_tile(at, row_first, row_last).visible
        return T.truncdiv(lo, self.block), ceildiv(hi, self.block)


def roles(known: Walked) -> tuple[str, ...]:
    """Roles of the launch's arguments."""
    return ("q", "k", known.role, known.of_queries.role)


def find(known: Walked, traversal: Traversal, name: str) -> PrimFunc:
    """``(q, k, numbers, numbers_of_queries)``: a block of threads for each block of keys."""
    pattern, size, queries = known.of_queries, known.block, known.of_queries.block
    places, rows = tirx.Var("places", "int32"), tirx.Var("rows", "int32")

    def block_of_keys(block, call, thread, seen, numbers):
        """Write the numbers of a block of keys; what a kernel's text may call."""
        blocks, tiles = ceildiv(call.seqlen_kv, size), ceildiv(call.seqlen_q, queries)
        head, number = kept(T.truncdiv(block, blocks)), kept(T.truncmod(block, blocks))
        first = kept(number * size)
        end = kept(T.min(first + size, call.seqlen_kv))

        def asked(n, tile):
            """Whether the block adds to a tile of queries (0), which sees all of its keys (1)."""
            lo, hi = (seen[wide(head * tiles + tile) * 4 + (2 * n + c)] for c in range(2))
            return T.And(lo <= first, hi >= end) if n else T.And(lo < first + size, hi > first)

        found = ranges_within(Extremes(thread, 4), T.int32(0), tiles, asked)
        with T.If(thread == 0), T.Then():
            for c, value in enumerate(found):
                T.buffer_store(numbers, T.min(value * queries, call.seqlen_q), [wide(block) * 4 + c])
        return 0

    @T.prim_func(check_well_formed=False)
    def kernel(q: T.handle, k: T.handle, numbers: T.handle, numbers_of_queries: T.handle):
        call = MaskCall(pattern, traversal, (q, k), {})
        written = T.match_buffer(numbers, (places, 4), "int32", align=4)
        read = T.match_buffer(numbers_of_queries, (rows, 4), "int32", align=4)
        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": BLOCKS_PER_SM})
        block = T.cta_id([places])
        thread = T.thread_id([THREADS])
        memory = T.meta_var((flat(read), flat(written)))
        T.evaluate(block_of_keys(block, call, thread, *memory))

    return kernel.with_attr("global_symbol", name)
