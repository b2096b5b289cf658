"""The warpgroup of the joint launch that makes dq of the consumers' dS, and fetches their tiles.

A step, when a tile of dS is full:

1. fetch the tile of queries that is two later, and the numbers of its rows: that dS is full says that both consumers
   are past all products of the tile before, whose stage it takes, so that no barrier says that a stage is empty;
2. ``dQ = dSᵀ K`` in chunks of 64 queries and 64 columns; while the first one runs, tell the next block of the tiles
   before, and wait for this block's turn at this one;
3. add each chunk to the sum in memory, which the first block begins.

All blocks of a head go from the last tile of queries to the first, and wait only for blocks that were started before
them.
"""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.mma.registers import anew
from schedules.families.sm90.backward.config import Config
from schedules.families.sm90.backward.sums import add_to_tile, await_count, store_tile, tell
from schedules.families.sm90.backward.walk import KeyBlock
from schedules.families.sm90.barriers import WARPS
from schedules.families.sm90.config import PANEL, panels
from schedules.families.sm90.wgmma import mn_major, rows_offset
from schedules.tile.dtypes import element_type
from schedules.tile.geometry import wide
from schedules.tile.score import NEGATIVE_INFINITY
from schedules.tile.tile_scheduler import ceildiv
from schedules.tile.weights import negative, shift_of

#: Tiles of queries that are fetched before their step.
AHEAD = 2


@T.meta_class
class QuerySums:
    """Warp ``warp`` of the warpgroup and lane ``lane``.

    ``pipelines`` are those of Q, K, V and dO, ``maps`` their descriptors, ``numbers`` the shifts and −delta of the rows
    of each stage; ``sums`` and ``progress`` are flat views of the workspaces.
    """

    def __init__(
        self,
        pattern: Pattern,
        config: Config,
        block: KeyBlock,
        pipelines,
        maps,
        numbers,
        ds,
        sums,
        progress,
        warp,
        lane,
    ):
        self.pattern, self.config, self.block = pattern, config, block
        self.q, self.k, self.v, self.do = pipelines
        self.q_map, self.k_map, self.v_map, self.do_map = maps
        self.shifts, self.starts = numbers
        self.ds, self.sums, self.progress = ds, sums, progress
        self.warp, self.lane = warp, lane
        self.chunks = config.block_m // PANEL, panels(pattern.head_dim)
        self.acc = T.alloc_local([PANEL // 2], "float32")
        self.n = T.local_scalar("int32")  # tiles so far
        self.next_head, self.next_step = T.local_scalar("int32"), T.local_scalar("int32")  # of the tile to fetch next
        self.known = T.local_scalar("int32")
        self.number = T.alloc_local([2], "float32")
        self.has_rows = warp * 32 < config.block_m

    # ------------------------------------------------------------ fetching

    @T.inline
    def load_numbers(self, walk):
        """Start to read lse and delta of the rows of the tile to fetch next; of rows that aren't there, none."""
        tensors = T.meta_var(self.block.tensors)
        lse, delta = T.meta_var(tensors.row_terms())
        self.number[0] = T.float32(NEGATIVE_INFINITY)
        self.number[1] = T.float32(0)
        row: T.int32 = walk.tile(walk.steps - 1 - self.next_step) * self.config.block_m + self.warp * 32 + self.lane
        if T.And(self.next_head < self.block.group, T.And(self.has_rows, row < tensors.seqlen_q)):
            at: T.int64 = tensors.lse_offset(anew(self.block.batch), self.block.head(self.next_head), row)
            self.number[0] = lse[at]
            self.number[1] = delta[at]

    @T.inline
    def fetch(self, walk, n):
        """Fetch the next tile, number ``n``: queries and gradients of outputs, and the numbers that were read.

        Then start to read those of the tile after it.
        """
        q = T.meta_var(self.q.state(n))
        if self.next_head < self.block.group:
            if self.has_rows:
                row = T.meta_var(self.warp * 32 + self.lane)
                self.shifts[q.index, row] = shift_of(self.number[0])
                self.starts[q.index, row] = negative(self.number[1])
                T.cuda.warp_sync()
                if self.lane == 0:
                    self.q.full.arrive(q.index)
                    self.do.full.arrive(q.index)
            if self.warp == 0:
                if T.cuda.elect_sync():
                    query = T.meta_var(walk.tile(walk.steps - 1 - self.next_step) * self.config.block_m)
                    at = T.meta_var((query, self.block.head(self.next_head), self.block.batch))
                    self.q.load(q, self.q_map, at)
                    self.do.load(q, self.do_map, at)
            self.next_step = self.next_step + 1
            if self.next_step == walk.steps:
                self.next_step = 0
                self.next_head = self.next_head + 1
            self.load_numbers(walk)

    @T.inline
    def start(self, walk):
        """Fetch the block's keys and values, and the first tiles."""
        self.n = 0
        self.next_head = 0
        self.next_step = 0
        if self.warp == 0:
            if T.cuda.elect_sync():
                self.k.load(self.k.state(0), self.k_map, self.block.keys(0))
                self.v.load(self.v.state(0), self.v_map, self.block.keys(0))
        if walk.steps > 0:
            self.load_numbers(walk)
            for n in T.unroll(AHEAD):
                self.fetch(walk, n)

    # ------------------------------------------------------------ sums

    def _progress(self, head, number):
        """Where it stands how far a block of keys has come in a query head; each warp for its own rows."""
        tensors = self.block.tensors
        blocks = ceildiv(tensors.seqlen_kv, self.config.block_keys)
        row = wide(anew(self.block.batch)) * wide(tensors.heads) + wide(head)
        return self.progress.ptr_to([(row * wide(blocks) + wide(number)) * WARPS + wide(self.warp)])

    def _sum(self, head, tile, chunk):
        """Where a lane's accumulators of a chunk are in the sums: four, and the next four 128 elements on."""
        tensors, config = self.block.tensors, self.config
        tiles = ceildiv(tensors.seqlen_q, config.block_m)
        row = (wide(anew(self.block.batch)) * wide(tensors.heads) + wide(head)) * wide(tiles) + wide(tile)
        elements = config.block_m * self.chunks[1] * PANEL
        return row * elements + wide((chunk * WARPS + self.warp) * (16 * PANEL) + self.lane * 4)

    @T.inline
    def multiply(self, ds, chunk):
        """Start a chunk of dQ: 64 queries of the tile of dS, transposed, and 64 columns of K."""
        keys = T.meta_var(self.config.block_keys)
        here: T.int32 = anew(T.int32(0))  # what follows isn't kept in registers
        a = T.meta_var(mn_major(self.ds.tiles.ptr_to([0, 0, 0, 0]), keys))
        b = T.meta_var(mn_major(self.k.tiles.ptr_to([0, 0, 0, 0]), keys) + T.Cast("uint64", here))
        kind = T.meta_var(element_type(self.pattern.dtype).ptx)
        first = T.meta_var(a + T.Cast("uint64", ds.index) * rows_offset(keys, self.ds.panels))
        for x in T.unroll(PANEL // 2):
            self.acc[x] = T.float32(0)  # so that ptxas knows that the last chunk's aren't needed
        T.ptx.wgmma.fence.sync.aligned()
        for i in T.unroll(keys // 16):
            T.ptx[f"wgmma.mma_async.sync.aligned.m64n64k16.f32.{kind}.{kind}"](
                *[self.acc[x] for x in range(PANEL // 2)],
                first + T.uint64(chunk // self.chunks[1] * (keys * 8) + i * 128),
                b + T.uint64(chunk % self.chunks[1] * (keys * 8) + i * 128),
                T.bool(True), 1, 1, 1, 1,
            )  # fmt: skip
        T.ptx.wgmma.commit_group.sync.aligned()

    @T.inline
    def await_turn(self, head, wanted):
        """Wait until the block of keys before has added to ``wanted`` tiles of a head."""
        if self.block.number > 0:
            if self.known < wanted:
                if self.lane == 0:
                    self.known = await_count(self._progress(head, self.block.number - 1), self.known, wanted)
                self.known = T.cuda.__shfl_sync(T.uint32(0xFFFFFFFF), self.known, 0, 32)

    @T.inline
    def tell(self, head, count):
        """Tell the block of keys after this one that this warp has added to ``count`` tiles of a head."""
        T.cuda.warp_sync()
        if self.lane == 0:
            T.evaluate(tell(self._progress(head, self.block.number), count))

    @T.inline
    def add(self, head, tile, chunk):
        """Add a chunk to the sum, or begin it."""
        at: T.int64 = self._sum(head, tile, chunk)
        if self.block.number == 0:
            for i in T.unroll(8):
                T.evaluate(store_tile(self.sums.ptr_to([at + i * 128]), *[self.acc[i * 4 + x] for x in range(4)]))
        else:
            for i in T.unroll(8):
                T.evaluate(add_to_tile(self.sums.ptr_to([at + i * 128]), *[self.acc[i * 4 + x] for x in range(4)]))

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
        self.ds.consumer_wait(ds)
        self.fetch(walk, self.n + AHEAD)
        for chunk in T.unroll(self.chunks[0] * self.chunks[1]):
            self.multiply(ds, chunk)
            if chunk == 0:
                # Both take as long as the way to memory and back, or longer: the product runs meanwhile.
                if T.And(i > 0, T.bitwise_and(i, self.config.tiles_told - 1) == 0):
                    self.tell(head, i)
                self.await_turn(head, i + 1)
            T.ptx.wgmma.wait_group.sync.aligned(0)
            if chunk == self.chunks[0] * self.chunks[1] - 1:
                self.ds.consumer_release(ds, self.lane)
            self.add(head, tile, chunk)
        if i + 1 == walk.steps:
            self.tell(head, i + 1)
        self.n = self.n + 1
