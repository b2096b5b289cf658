"""The warpgroup of the joint launch that makes dq of the consumers' dS, and fetches their tiles.

A step, when a tile of dS is full:

1. fetch the tile of queries that is two later, and the numbers of its rows: that dS is full says that both consumers
   are past all products of the tile before, whose stage it takes, so that no barrier says that a stage is empty;
2. ``dQ = dSᵀ K`` in chunks of 64 queries and 64 columns; while the first one runs, tell the next block of the tiles
   before, and wait for this block's turn at this one;
3. add each chunk to the sum in memory, which the first block begins.  The last block that a tile is visible to adds the
   sum to what it has, and writes dq.

All blocks of a head go from the last tile of queries to the first, and wait only for blocks that were started before
them.  Where positions don't tell which blocks add to a tile, numbers do that launches before have left
(:mod:`schedules.tile.mask_walks`): all from one on, up to another, each of which visits the tile.
"""

from __future__ import annotations

from typing import NamedTuple

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.mma.registers import anew
from schedules.families.sm90.backward.config import Config
from schedules.families.sm90.backward.numbers import RowNumbers
from schedules.families.sm90.backward.stores import add_rows
from schedules.families.sm90.backward.walk import KeyBlock
from schedules.families.sm90.barriers import WARPS
from schedules.families.sm90.config import PANEL, panels
from schedules.families.sm90.wgmma import mn_major, rows_offset
from schedules.tile.dtypes import element_type
from schedules.tile.fragment import M16N8
from schedules.tile.geometry import flat, wide
from schedules.tile.mask_walks import Walked
from schedules.tile.ordered_sums import (
    add_to_tile,
    await_count,
    prefetch_tile,
    store_tile,
    take_tile,
    tell,
)
from schedules.tile.static import static

#: Tiles of queries that are fetched before their step.
AHEAD = 2


class Turn(NamedTuple):
    """When a block adds to a tile: after those from number ``first`` on, if it ``adds`` at all (None: all blocks do).

    ``past`` is how many tiles a block that walks over this one is past before; None if that are its steps, as where all
    begin with the last tile.
    """

    first: Expr
    is_last: Expr
    adds: Expr | None
    past: Expr | None


@T.meta_class
class QuerySums:
    """Warp ``warp`` of the warpgroup and lane ``lane``.

    ``pipelines`` are those of Q, K, V and dO, ``maps`` their descriptors, ``numbers`` the shifts and −delta of their
    rows; ``sums`` and ``progress`` are flat views of the workspaces, for ``tiles`` tiles of each query head;
    ``tiles_told`` is how many tiles a block adds to before it tells the next one, a power of two.
    """

    def __init__(
        self,
        pattern: Pattern,
        config: Config,
        block: KeyBlock,
        pipelines,
        maps,
        numbers: tuple[RowNumbers, RowNumbers],
        ds,
        sums,
        progress,
        tiles,
        tiles_told,
        warp,
        lane,
    ):
        self.pattern, self.config, self.block = pattern, config, block
        self.q, self.k, self.v, self.do = pipelines
        self.q_map, self.k_map, self.v_map, self.do_map = maps
        self.shifts, self.starts = numbers
        self.ds, self.sums, self.progress = ds, sums, progress
        self.tiles, self.tiles_told = tiles, tiles_told
        self.warp, self.lane = warp, lane
        self.chunks = config.block_m // PANEL, panels(pattern.head_dim)
        self.acc = T.alloc_local([PANEL // 2], "float32")
        self.taken = T.alloc_local([PANEL // 4], "float32")
        self.packed = T.alloc_local([1], "uint32")
        self.n = T.local_scalar("int32")  # tiles so far
        self.next_head, self.next_step = T.local_scalar("int32"), T.local_scalar("int32")  # of the tile to fetch next
        self.known = T.local_scalar("int32")

    # ------------------------------------------------------------ fetching

    @T.inline
    def fetch(self, walk, n):
        """Fetch the next tile, number ``n``: queries and gradients of outputs, and the numbers of their rows."""
        q = T.meta_var(self.q.state(n))
        if self.next_head < self.block.group:
            if self.warp == 0:
                if T.cuda.elect_sync():
                    tile: T.int32 = walk.tile(walk.steps - 1 - self.next_step)
                    head: T.int32 = self.block.head(self.next_head)
                    at = T.meta_var(self.block.queries(tile * self.config.block_m, head))
                    place: T.int32 = self.block.tile_place(head, tile, self.tiles)
                    self.q.load(q, self.q_map, at, self.shifts.bytes)
                    self.shifts.load(self.q, q, place)
                    self.do.load(q, self.do_map, at, self.starts.bytes)
                    self.starts.load(self.do, q, place)
                    if static(self.config.prefetches):
                        if self.block.number > 0:
                            elements = T.meta_var(self.config.block_m * self.chunks[1] * PANEL)
                            sums = T.meta_var(self.sums.ptr_to([wide(place) * elements]))
                            T.evaluate(prefetch_tile(sums, elements * 4))
            self.next_step = self.next_step + 1
            if self.next_step == walk.steps:
                self.next_step = 0
                self.next_head = self.next_head + 1

    @T.inline
    def start(self, walk):
        """Fetch the block's keys and values, and the first tiles, in the order in which they are needed."""
        self.n = 0
        self.next_head = 0
        self.next_step = 0
        self.load(self.k, self.k_map)
        if walk.steps > 0:
            self.fetch(walk, 0)
        self.load(self.v, self.v_map)
        if walk.steps > 0:
            for n in T.unroll(1, AHEAD):
                self.fetch(walk, n)

    @T.inline
    def load(self, keys, descriptor):
        """Fetch the block's keys or values."""
        if self.warp == 0:
            if T.cuda.elect_sync():
                keys.load(keys.state(0), descriptor, self.block.keys(0))

    # ------------------------------------------------------------ sums

    def _progress(self, head, before: int = 0):
        """Where it stands how far this block of keys has come in a query head, or that ``before`` it; each warp for its
        own rows."""
        place = self.block.block_place(self.block.tensors.heads, head)
        return self.progress.ptr_to([wide(anew((place - before) * WARPS + self.warp))])

    def _sum(self, head, tile, chunk):
        """Where a lane's accumulators of a chunk are in the sums: four, and the next four 128 elements on."""
        elements = self.config.block_m * self.chunks[1] * PANEL
        place = self.block.tile_place(head, tile, self.tiles)
        return wide(place) * elements + wide((chunk * WARPS + self.warp) * (16 * PANEL) + self.lane * 4)

    @T.inline
    def multiply(self, ds, chunk):
        """Start a chunk of dQ: 64 queries of the tile of dS, transposed, and 64 columns of K."""
        keys = T.meta_var(self.config.block_keys)
        here: T.int32 = anew(T.int32(0))  # what follows isn't kept in registers
        rows = T.meta_var(self.ds.rows)
        a = T.meta_var(mn_major(self.ds.tiles.ptr_to([0, 0, 0, 0]), rows))
        b = T.meta_var(mn_major(self.k.tiles.ptr_to([0, 0, 0, 0]), keys) + T.Cast("uint64", here))
        kind = T.meta_var(element_type(self.pattern.dtype).ptx)
        first = T.meta_var(a + T.Cast("uint64", ds.index) * rows_offset(rows, self.ds.panels))
        for x in T.unroll(PANEL // 2):
            self.acc[x] = T.float32(0)  # so that ptxas knows that the last chunk's aren't needed
        T.ptx.wgmma.fence.sync.aligned()
        for i in T.unroll(keys // 16):
            T.ptx[f"wgmma.mma_async.sync.aligned.m64n64k16.f32.{kind}.{kind}"](
                *[self.acc[x] for x in range(PANEL // 2)],
                first + T.uint64(chunk // self.chunks[1] * (rows * 8) + i * 128),
                b + T.uint64(chunk % self.chunks[1] * (keys * 8) + i * 128),
                T.bool(True), 1, 1, 1, 1,
            )  # fmt: skip
        T.ptx.wgmma.commit_group.sync.aligned()

    @T.inline
    def await_turn(self, head, first, wanted):
        """Wait until the block of keys before is past ``wanted`` tiles of a head, if this one isn't the ``first``."""
        if self.block.number > first:
            if self.known < wanted:
                if self.lane == 0:
                    self.known = await_count(self._progress(head, 1), self.known, wanted)
                self.known = T.cuda.__shfl_sync(T.uint32(0xFFFFFFFF), self.known, 0, 32)
                T.cuda.warp_sync()

    @T.inline
    def tell(self, head, count):
        """Tell the block of keys after this one that this warp is past ``count`` tiles of a head."""
        T.cuda.warp_sync()
        if self.lane == 0:
            T.evaluate(tell(self._progress(head), count))

    @T.inline
    def add(self, head, tile, chunk, first):
        """Add a chunk to the sum, or begin it in the ``first`` block."""
        at: T.int64 = self._sum(head, tile, chunk)
        if self.block.number == first:
            for i in T.unroll(8):
                T.evaluate(store_tile(self.sums.ptr_to([at + i * 128]), *[self.acc[i * 4 + x] for x in range(4)]))
        else:
            for i in T.unroll(8):
                T.evaluate(add_to_tile(self.sums.ptr_to([at + i * 128]), *[self.acc[i * 4 + x] for x in range(4)]))

    def turn(self, g, tile) -> Turn:
        """Which of the blocks that add to a tile this one is."""
        block, M = self.block, self.config.block_m
        last = T.min(tile * M + (M - 1), block.tensors.queries.of(block.batch).length - 1)
        if isinstance(self.pattern, Walked):
            first, end = self.pattern.adders(block.site(g), tile * M, last)
            adds = T.And(block.number >= first, block.number < end)
            return Turn(first, block.number + 1 == end, adds, self.tiles - 1 - tile)
        end = self.pattern.keys_of(block.site(g), tile * M, last).visible[1]
        return Turn(T.int32(0), block.key_first + self.config.block_keys >= end, None, None)

    @T.inline
    def write(self, head, tile, chunk, first):
        """Add the sum to a chunk, if there is one, and write it as dq, or add it to what is there."""
        tensors = T.meta_var(self.block.tensors)
        out = T.meta_var(tensors.gradients["dq"])
        elements = T.meta_var(flat(out.buffer))
        pack = T.meta_var(element_type(self.pattern.dtype).pack)
        if self.block.number > first:
            at: T.int64 = self._sum(anew(head), tile, chunk)
            for half in T.unroll(2):
                for i in T.unroll(4):
                    T.evaluate(
                        take_tile(T.address_of(self.taken[i * 4]), self.sums.ptr_to([at + (half * 4 + i) * 128]))
                    )
                for x in T.unroll(16):
                    self.acc[half * 16 + x] = self.taken[x] + self.acc[half * 16 + x]
        lane: T.int32 = anew(self.lane)  # what follows isn't kept in registers
        column: T.int32 = chunk % self.chunks[1] * PANEL + M16N8.column(lane)
        row: T.int32 = tile * self.config.block_m + chunk // self.chunks[1] * PANEL
        row = row + self.warp * 16 + M16N8.row(lane)
        own = T.meta_var(tensors.queries.of(self.block.batch))
        if static(tensors.adds):
            add_rows(
                elements, self.acc, PANEL // 2, tensors.softmax_scale, tensors.head_dim, column, row, own.length,
                lambda i: out.offset(anew(self.block.batch), anew(head), own.at(i), column),
            )  # fmt: skip
        else:
            to: T.int64 = out.offset(anew(self.block.batch), anew(head), own.at(row), column)
            for r in T.unroll(2):
                if row + r * M16N8.row_step < own.length:
                    for i in T.unroll(8):
                        if column + i * 8 < tensors.head_dim:
                            x = T.meta_var(i * 4 + r * 2)
                            scale = T.meta_var(tensors.softmax_scale)
                            T.ptx[pack](self.packed[0], self.acc[x + 1] * scale, self.acc[x] * scale)
                            T.ptx["st.global.b32"](elements.ptr_to([to + i * 8]), self.packed[0])
                to = to + out.rows_offset(T.int32(M16N8.row_step))

    # ------------------------------------------------------------ the whole

    @T.inline
    def run(self):
        """Fetch all tiles, and compute this block's part of dq."""
        walk = self.block.tiles(self.block.site(T.int32(0)))
        self.start(walk)
        self.k.consumer_wait(self.k.state(0))
        for g in T.serial(self.block.group):
            self.known = 0
            for i in T.serial(walk.steps):
                self.step(walk, g, i)

    @T.inline
    def step(self, walk, g, i):
        """Step ``i`` of query head ``g`` of the group."""
        head = T.meta_var(self.block.head(g))
        tile: T.int32 = walk.tile(walk.steps - 1 - i)
        ds = T.meta_var(self.ds.state(self.n))
        turn = T.meta_var(self.turn(g, tile))
        last: T.bool = turn.is_last
        past = T.meta_var(i if turn.past is None else turn.past)
        self.ds.consumer_wait(ds)
        self.fetch(walk, self.n + AHEAD)
        if static(turn.adds is None):
            self.add_part(head, tile, ds, turn.first, last, i, past)
        else:
            if turn.adds:
                self.add_part(head, tile, ds, turn.first, last, i, past)
            else:
                self.ds.consumer_release(ds, self.lane)
        if i + 1 == walk.steps:
            self.tell(head, past + 1)
        self.n = self.n + 1

    @T.inline
    def add_part(self, head, tile, ds, first, last, i, past):
        """Add what the block has of a tile of dq, when it is its turn."""
        for chunk in T.unroll(self.chunks[0] * self.chunks[1]):
            self.multiply(ds, chunk)
            if chunk == 0:
                # Both take as long as the way to memory and back, or longer: the product runs meanwhile.
                if T.And(i > 0, T.bitwise_and(i, self.tiles_told - 1) == 0):
                    self.tell(head, past)
                self.await_turn(head, first, past + 1)
            T.ptx.wgmma.wait_group.sync.aligned(0)
            if chunk == self.chunks[0] * self.chunks[1] - 1:
                self.ds.consumer_release(ds, self.lane)
            if last:
                self.write(head, tile, chunk, first)
            else:
                self.add(head, tile, chunk, first)
