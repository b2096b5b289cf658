"""The producer's warpgroup.  Each of its warps has one task, which one thread does, so that none waits for another;
where keys lie on pages, the lanes share the boxes of a tile.

Warp 0 fetches K, warp 1 V, warp 2 the queries of further work tiles, and warp 3 stores what the consumers have written.
Where a tensor comes in boxes all lanes of warp 2 fetch these.
"""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.families.sm90.work_tile import KeyWalk
from schedules.tile.static import static


@T.inline
def prologue(block, q, k, q_map, k_map):
    """Fetch the first tiles of Q and K, before any other thread needs to be ready; their stages are empty.

    Pages are a whole warp's task: there Q alone.
    """
    if static(block.boxes.by_pages):
        q.load(q.state(0), q_map, block.queries(0))
    else:
        walk = KeyWalk(block, 0, block.config.block_m)
        q.load(q.state(0), q_map, block.queries(0))
        k.load(k.state(0), k_map, block.keys(walk.key_first(0)))


@T.inline
def _fetch_tiles(block, pipeline, descriptor, first, n):
    """Those of the block's work tile; ``n`` counts them, over all work tiles."""
    walk = KeyWalk(block, 0, block.config.block_m)
    for i in T.serial(walk.steps):
        if T.Or(i == 0, walk.visible(i)) if block.pattern.has_gaps else True:
            if n >= first:
                pipeline.producer_acquire(pipeline.state(n))
                pipeline.load(pipeline.state(n), descriptor, block.keys(walk.key_first(i)))
            n = n + 1


@T.inline
def _fetch_queries(block, q, q_map, tile):
    """Fetch those of the work tile that the block has come to, number ``tile``."""
    q.producer_acquire(q.state(tile))
    q.load(q.state(tile), q_map, block.queries(0))


@T.inline
def fetch_keys(block, pipeline, descriptor, first):
    """Fill the pipeline of K or of V, from tile ``first`` on."""
    n: T.int32 = 0

    @T.inline
    def fetch(t):
        _fetch_tiles(block, pipeline, descriptor, first, n)

    block.scheduler.each_tile(block, True, None, fetch)


@T.inline
def _fetch_paged_tiles(block, tiles, pipeline, descriptor, n):
    walk = KeyWalk(block, 0, block.config.block_m)
    for i in T.serial(walk.steps):
        if T.Or(i == 0, walk.visible(i)) if block.pattern.has_gaps else True:
            tiles.look_up(walk.key_first(i))  # on its way while the stage is waited for
            pipeline.producer_acquire(pipeline.state(n))
            tiles.load(pipeline, pipeline.state(n), descriptor)
            n = n + 1


@T.inline
def fetch_pages(block, pipeline, tensor, descriptor, lane):
    """A whole warp: fill the pipeline of K or of V, whose keys lie on pages."""
    n: T.int32 = 0
    tiles = T.meta_var(block.boxes.fetching(block, tensor, lane))

    @T.inline
    def fetch(t):
        _fetch_paged_tiles(block, tiles, pipeline, descriptor, n)

    block.scheduler.each_tile(block, True, lane, fetch)


@T.inline
def fetch_queries(block, q, q_map):
    """Fetch the queries of each work tile after the first."""
    for t in T.serial(1, block.tiles):
        block.advance()
        _fetch_queries(block, q, q_map, t)


@T.inline
def fetch_tensors(block, tensors, descriptor, lane, q=None, q_map=None):
    """A whole warp: fetch the tiles of a tensor in boxes; where there is a pipeline of queries, before those of each
    work tile after the first its queries."""
    n: T.int32 = 0

    @T.inline
    def fetch(t):
        if static(q is not None):
            if T.And(t > 0, lane == 0):
                _fetch_queries(block, q, q_map, t)
        tensors.fetch(block, descriptor, lane, n)

    block.scheduler.each_tile(block, True, lane, fetch)


@T.inline
def store_outputs(block, epilogue, o_map):
    """Store finished work tiles."""

    @T.inline
    def store(t):
        epilogue.store(block, t, o_map)

    block.scheduler.each_tile(block, True, None, store)
