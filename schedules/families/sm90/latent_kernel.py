"""The launch that computes partial results where values are the first columns of keys: two consumer warpgroups.

A tile of keys lies in shared memory once: as the second factor of the scores it is read along its rows, and as that of
the output down its columns.  The output of 64 rows is more than one warpgroup has registers for, so that two share its
columns, and take turns at scoring tiles: the first of a pair of tiles is scored by warpgroup 0, the second by
warpgroup 1.  Each hands its probabilities over, with the references that they are relative to, and adds the products of
both with its own columns of the values.  So an output is accumulated tile by tile from right to left, as if one
warpgroup did it all.  The idea is FlashMLA's ("seesaw").

Of a pair, from left to right; the stages of the two tiles are 0 and 1::

    WG0     QK(0)        softmax ▸hand over 0 ▸PV(0, left)                          ▸take over 1 ▸PV(1, left)
    WG1     ▸issued QK(1)                     ▸references 0 softmax ▸PV(0, right) ▸hand over 1 ▸PV(1, right)
    tensor [QK(0)    ][QK(1)            ][PV(0, left)          ][PV(0, right)     ][PV(1, right)][PV(1, left)]

QK(1) is issued behind QK(0), for which everything waits.  Beside the softmax of tile 0 runs QK(1), beside that of tile
1 PV(0, left): warpgroup 1 doesn't issue PV(0, right) before, as a warp that issues products waits until those of the
other warpgroup are done.  It needs no more of tile 0 for its softmax than references, which are left as soon as they
are known.  Where PV(0, left) is issued earlier it runs beside QK(1), and nothing beside the softmax of tile 1.

A tile comes in parts of panels, each with barriers of its own, so that its scores begin with the first one: the columns
of warpgroup 0, those of warpgroup 1, and the rest, which is in keys only.  Probabilities are handed over in the place
of the latter, which nobody needs once a tile is scored.  So each part is released by one warpgroup, when its product
with it is done:

=====  ======  ======  =======================================================
part   tile 0  tile 1  why nobody else needs it then
=====  ======  ======  =======================================================
left   WG0     WG0     WG1 has scored tile 1 before it handed it over
right  WG1     WG1     WG0 has scored tile 0 before it handed it over
rest   WG1     WG0     it holds the probabilities, which the other one reads
=====  ======  ======  =======================================================
"""

from __future__ import annotations

from tvm.backend.cuda.lang import SMEMPool
from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.sm90.barriers import WARPS
from schedules.families.sm90.boxes import PagedBoxes, TilesOfPages
from schedules.families.sm90.config import WARPGROUP_ROWS, panels
from schedules.families.sm90.latent_consumer import HandedOver, LatentConsumer
from schedules.families.sm90.latent_tiles import WARPGROUPS, KeyTiles, LatentPart, LatentScheduler, Turns
from schedules.families.sm90.pipeline import Pipeline, PipelineState
from schedules.families.sm90.tma import policy_of_keys
from schedules.families.sm90.work_tile import KeyWalk
from schedules.tile.geometry import Geometry
from schedules.tile.partial import PartialResults


def _tiles_of(part: LatentPart, lane) -> TilesOfPages:
    """How a warp fetches tiles of keys: where the blocks of no other row tile read them, they go first from the L2
    cache.  16 heads on 128 x 4096 keys take 2% less so, on 32 x 4096 8%; read again by those of two row tiles, lengths
    of 1 to 4096 took 2% more (H200)."""
    tiles = part.boxes.fetching(part, part.geometry.k, lane)
    tiles.policy = policy_of_keys(part.scheduler.row_tiles == 1)
    return tiles


@T.inline
def _fetch_part(part: Pipeline, tiles: TilesOfPages, state: PipelineState, descriptor):
    part.producer_acquire(state)
    tiles.load(part, state, descriptor)


def _fetch_parts(keys: KeyTiles, tiles: TilesOfPages, state: PipelineState, descriptor):
    for part in keys.parts:
        _fetch_part(part, tiles, state, descriptor)


@T.inline
def _fetch(part: LatentPart, keys: KeyTiles, descriptor, lane):
    """A whole warp: fetch the tiles of keys, one part after the other, so that scores can begin with the first."""
    tiles = T.meta_var(_tiles_of(part, lane))
    turns = Turns()
    while part.exists:
        walk = KeyWalk(part, 0, WARPGROUP_ROWS)
        if walk.tiles.begin < walk.tiles.end:
            for i in T.serial(walk.steps):
                stage: T.int32 = T.bitwise_and(i, 1)
                tiles.look_up(walk.key_first(i))
                _fetch_parts(keys, tiles, turns.state(stage), descriptor)
                turns.advance(1 - stage, stage)
        part.advance()


@T.inline
def compute_latent_parts(pattern: Pattern, geometry: Geometry, scheduler: LatentScheduler, results: PartialResults):
    """The kernel's text, from the descriptor on."""
    config = T.meta_var(scheduler.config)
    boxes = T.meta_var(PagedBoxes(geometry, config.block_n))
    # 1. The descriptor of the keys, made on the host.
    k_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
    T.evaluate(boxes.encode_keys(k_map, geometry.k, config.block_n))
    # 2. Blocks, warps, lanes; the launch that combines may begin when every block has come here.
    T.device_entry()
    T.attr({"tirx.launch_bounds_min_blocks_per_sm": config.blocks_per_sm})
    unit, share = T.cta_id(scheduler.grid())
    warp = T.warp_id([config.threads // 32])
    lane = T.lane_id([32])
    T.thread_id([config.threads])
    T.ptx.griddepcontrol.launch_dependents()
    # 3. Shared memory: queries, keys, what is handed over, barriers.
    pool = SMEMPool()
    q = Pipeline(pool, 1, panels(pattern.head_dim), WARPGROUP_ROWS, pattern.dtype)
    keys = KeyTiles(pool, pattern, config.block_n)
    handed = HandedOver(pool)
    keys.add_barriers(pool)
    pool.commit()
    if warp == WARPGROUPS * WARPS:
        if T.cuda.elect_sync():
            keys.init()
            T.ptx.fence.mbarrier_init.release.cluster()
    # 4. The block's parts.
    part = LatentPart(pattern, geometry, scheduler, boxes, unit, share)
    part.find(lane)
    T.cuda.cta_sync()
    # 5. Tasks: a warp fetches, three beside it have none.
    if warp >= WARPGROUPS * WARPS:
        T.ptx["setmaxnreg.dec.sync.aligned.u32"](config.registers[0])
        if warp == WARPGROUPS * WARPS:
            _fetch(part, keys, k_map, lane)
    else:
        T.ptx["setmaxnreg.inc.sync.aligned.u32"](config.registers[1])
        memory = T.meta_var((q, keys, handed))
        if warp < WARPS:
            first = LatentConsumer(pattern, config, part, memory, results, 0, warp, lane)
            first.run()
        else:
            second = LatentConsumer(pattern, config, part, memory, results, 1, warp - WARPS, lane)
            second.run()
