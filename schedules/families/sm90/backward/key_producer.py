"""The producer's warpgroup of the launch for dk and dv.  Each of its warps has one task, so that none waits for another.

Warp 0 fetches the block's K, then tiles of Q; warp 1 V, then tiles of dO; one thread of each does it.  Warp 2, with all
of its lanes, brings what belongs to the rows of each tile of Q: it needs no alignment of lse, and pads where TMA would
have zeros.
"""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.families.sm90.backward.score import shift_of
from schedules.families.sm90.backward.walk import QueryWalk
from schedules.tile.geometry import wide
from schedules.tile.score import NEGATIVE_INFINITY

#: Of a loop that stays one: unrolled, it would take registers that a producer hasn't.
ROLLED = {"disable_unroll": True}


@T.inline
def fetch_tiles(block, keys, keys_map, queries, queries_map):
    """One thread: fetch the block's keys (or values), and all tiles of queries (or gradients of outputs)."""
    keys.load(keys.state(0), keys_map, block.keys(0))
    n: T.int32 = 0
    for g in T.serial(block.group):
        walk = QueryWalk(block, block.site(g))
        head: T.int32 = block.head(g)
        query: T.int32 = walk.begin * block.config.block_m
        for _ in T.serial(walk.steps, annotations=ROLLED):
            queries.producer_acquire(queries.state(n))
            queries.load(queries.state(n), queries_map, (query, head, block.batch))
            query = query + block.config.block_m
            n = n + 1


@T.inline
def fetch_terms(block, q, terms, lane):
    """One warp: what belongs to the rows of each tile of queries, shifts and −delta, into the stage of its tile.

    A row past the last one gets the shift −inf, which makes its probabilities 0.
    """
    block_m = T.meta_var(block.config.block_m)
    tensors = T.meta_var(block.tensors)
    lse, delta = T.meta_var(tensors.row_terms())
    n: T.int32 = 0
    for g in T.serial(block.group):
        walk = QueryWalk(block, block.site(g))
        query: T.int32 = walk.begin * block_m + lane
        at: T.int64 = tensors.lse_offset(block.batch, block.head(g), query)
        for _ in T.serial(walk.steps, annotations=ROLLED):
            state = T.meta_var(q.state(n))
            q.producer_acquire(state)
            for x in T.serial((block_m + 31) // 32, annotations=ROLLED):
                row: T.int32 = x * 32 + lane
                if row < block_m:
                    shift: T.float32 = T.float32(NEGATIVE_INFINITY)
                    start: T.float32 = T.float32(0)
                    if query + x * 32 < tensors.seqlen_q:
                        shift = lse[at + wide(x * 32)]
                        start = T.float32(0) - delta[at + wide(x * 32)]
                    terms[state.index, 0, row] = shift_of(shift)
                    terms[state.index, 1, row] = start
            T.cuda.warp_sync()
            if lane == 0:
                q.full.arrive(state.index)
            query = query + block_m
            at = at + wide(block_m)
            n = n + 1
