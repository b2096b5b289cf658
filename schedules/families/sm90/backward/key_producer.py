"""The producer's warpgroup of the launch for dk and dv.  Each of its warps has one task, and none waits for another.

Warp 0 fetches the block's K, then tiles of Q; warp 1 V, then tiles of dO; one thread of each does it.  Warps 2 and 3,
with all of their lanes, bring the numbers of the rows of each tile, shifts beside Q and −delta beside dO: they need no
alignment of lse, and know what a row is to have that isn't there.  With 240 registers for a consumer they have 24.
"""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.tile.geometry import wide

#: Of a loop that stays one: unrolled, it would take registers that a producer hasn't.
ROLLED = {"disable_unroll": True}


@T.inline
def fetch_tiles(block, keys, keys_map, queries, queries_map):
    """One thread: fetch the block's keys (or values), and all tiles of queries (or gradients of outputs)."""
    keys.load(keys.state(0), keys_map, block.keys(0))
    n: T.int32 = 0
    for g in T.serial(block.group):
        walk = block.tiles(block.site(g))
        head: T.int32 = block.head(g)
        query: T.int32 = walk.begin * block.config.block_m
        for _ in T.serial(walk.steps, annotations=ROLLED):
            queries.producer_acquire(queries.state(n))
            queries.load(queries.state(n), queries_map, (query, head, block.batch))
            query = query + block.config.block_m
            n = n + 1


@T.inline
def fetch_numbers(block, pipeline, numbers, source, missing, of, lane):
    """One warp: a number for each row of each tile of queries, into the stage of its tile.

    It is ``of`` the row's element of ``source``, flat as lse is, and of ``missing`` for a row past the last one.
    """
    block_m = T.meta_var(block.config.block_m)
    tensors = T.meta_var(block.tensors)
    n: T.int32 = 0
    for g in T.serial(block.group):
        walk = block.tiles(block.site(g))
        query: T.int32 = walk.begin * block_m + lane
        # As many rows as an int32 counts: a flat tensor's length is one.
        at: T.int32 = (block.batch * tensors.heads + block.head(g)) * tensors.seqlen_q + query
        for _ in T.serial(walk.steps, annotations=ROLLED):
            state = T.meta_var(pipeline.state(n))
            pipeline.producer_acquire(state)
            for x in T.serial((block_m + 31) // 32, annotations=ROLLED):
                row: T.int32 = x * 32 + lane
                if row < block_m:
                    value: T.float32 = T.float32(missing)
                    if query + x * 32 < tensors.seqlen_q:
                        value = source[wide(at + x * 32)]
                    numbers[state.index, row] = of(value)
            T.cuda.warp_sync()
            if lane == 0:
                pipeline.full.arrive(state.index)
            query = query + block_m
            at = at + block_m
            n = n + 1
