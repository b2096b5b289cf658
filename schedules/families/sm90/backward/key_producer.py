"""The producer's warpgroup of the launch for dk and dv: a thread of warp 0 fetches the block's K, then tiles of Q, one
of warp 1 V, then tiles of dO.  Neither waits for the other.

The numbers of a tile's rows come with it, shifts with Q and −delta with dO.
"""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.tile.static import static

#: Of a loop that stays one: unrolled, it would take registers that a producer hasn't.
ROLLED = {"disable_unroll": True}


@T.inline
def _fetch_tile(block, head, query, place, queries, queries_map, numbers, n):
    """Fetch tile number ``n``."""
    queries.producer_acquire(queries.state(n))
    queries.load(queries.state(n), queries_map, block.queries(query, head), numbers.bytes)
    numbers.load(queries, queries.state(n), place)


@T.inline
def _fetch_neighbours(block, walk, head, queries, queries_map, numbers, tiles, n):
    """Fetch the tiles of a head, one beside the other; ``n`` counts them, over all heads."""
    query: T.int32 = walk.begin * block.config.block_m
    place: T.int32 = block.tile_place(head, walk.begin, tiles)
    for _ in T.serial(walk.steps, annotations=ROLLED):
        _fetch_tile(block, head, query, place, queries, queries_map, numbers, n)
        query = query + block.config.block_m
        place = place + 1
        n = n + 1


@T.inline
def _fetch_listed(block, walk, head, queries, queries_map, numbers, tiles, n):
    """The same of a list of tiles."""
    for i in T.serial(walk.steps, annotations=ROLLED):
        tile: T.int32 = walk.tile(i)
        place: T.int32 = block.tile_place(head, tile, tiles)
        _fetch_tile(block, head, tile * block.config.block_m, place, queries, queries_map, numbers, n)
        n = n + 1


@T.inline
def fetch_tiles(block, keys, keys_map, queries, queries_map, numbers, tiles):
    """One thread: fetch the block's keys (or values), and all tiles of queries (or gradients of outputs) with the
    numbers of their rows; each query head has ``tiles`` places for those."""
    keys.load(keys.state(0), keys_map, block.keys(0))
    n: T.int32 = 0
    for g in T.serial(block.group):
        walk = block.tiles(block.site(g))
        head: T.int32 = block.head(g)
        if static(block.pattern.lists_tiles):
            _fetch_listed(block, walk, head, queries, queries_map, numbers, tiles, n)
        else:
            _fetch_neighbours(block, walk, head, queries, queries_map, numbers, tiles, n)
