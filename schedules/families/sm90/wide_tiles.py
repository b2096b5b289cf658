"""A split of a cache of 8 bits by all warps of a block, where splits are too few to give every warp one of its own.

A warp alone takes 1.5 us for a tile of 32 keys, and a split is up to 16 of these.  Here a block takes as many tiles at
a time as it has warps, a *chunk*: each warp multiplies the keys of one of them, and afterwards some columns of the
values of all::

    S = Q K of its own tile, the largest scores                                  to shared memory
    the references as they were in turn, from those of all tiles; P of its own   to shared memory
    O *= correction, O += P V of all tiles, in turn, for 16 columns

So every sum has the terms, and the order, that it has where one warp does everything, and the bits are the same.  Row
sums are one warp's, which adds the probabilities of all in the order in which each lane would have.
"""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.families.mma.decode import store_partial
from schedules.families.mma.ldmatrix import LOAD_TRANSPOSED
from schedules.families.mma.registers import fresh
from schedules.families.mma.transposed import across
from schedules.families.sm90.barriers import PRODUCER_ARRIVALS
from schedules.families.sm90.tile_ring import RingMachine
from schedules.tile.geometry import flat
from schedules.tile.score import NEGATIVE_INFINITY
from schedules.tile.smem import CHUNK_BYTES
from schedules.tile.softmax import LAZY, from_lane

_ALL_LANES = 0xFFFFFFFF


@T.meta_class
class WideMachine(RingMachine):
    """The machine of a block of (32, ``wide_warps``) threads, whose numbers along x are those of lanes.

    Each warp has two places, for a tile of K and one of V.  ``O`` are the columns of a warp, ``each`` times 16;
    ``own_max`` the references of its own tile's probabilities.  ``next_first``: the first tile of the chunk that is
    brought next.
    """

    @staticmethod
    def warps_of(config) -> int:
        return config.wide_warps

    def __init__(self, pattern, config, *args, **beside):
        self.warps = config.wide_warps
        self.column_groups = pattern.head_dim_v // 16
        self.each = -(-self.column_groups // self.warps)
        RingMachine.__init__(self, pattern, config, *args, **beside)
        self.o_stride = 4 * self.each
        self.O = T.alloc_local([self.m_tiles * self.o_stride], "float32")
        self.own_max = T.alloc_local([2 * self.m_tiles], "float32")
        self.next_first = T.local_scalar("int32")

    def place_shared(self, pool):
        """What warps tell each other of their tiles: the largest scores, corrections and probabilities."""
        RingMachine.place_shared(self, pool)
        rows = self.m_tiles * self.fragment.tile_rows
        self.peaks, self.corrections = (pool.alloc((self.warps, rows), "float32", align=16) for _ in range(2))
        self.totals = pool.alloc((rows,), "float32", align=16)
        self.growths = pool.alloc((self.warps,), "int32", align=16)
        pairs = self.config.block_n // 16 * self.m_tiles * 2
        self.pairs = pool.alloc((self.warps, pairs, 32), "uint32", align=16)

    # ------------------------------------------------------------ tiles on their way

    @T.inline
    def begin_block(self):
        """All threads of a block: prepare the barriers."""
        if T.And(fresh("tid.x") == 0, fresh("tid.y") == 0):
            self.full.init(PRODUCER_ARRIVALS)
            T.ptx.fence.mbarrier_init.release.cluster()
        T.cuda.cta_sync()

    @T.inline
    def start(self):
        """Bring the first chunk."""
        ahead = T.meta_var(self.ahead)
        self.phase = 0
        ahead.split = self.walk.first
        self.enter_split()
        self.look_up()
        self.read_scales()
        self.bring_own()

    @T.inline
    def enter_split(self):
        """Bring the rightmost chunk next of the first split from ``ahead.split`` on of which anything is seen."""
        ahead, walk = T.meta_var((self.ahead, self.walk))
        self.find_seen()
        self.next_first = -1
        if ahead.split < walk.splits:
            self.next_first = walk.end(ahead.split) - 1

    @T.inline
    def look_up(self):
        """The pages of the warp's own tile of the chunk that is brought next."""
        self.fetched = self.next_first - fresh("tid.y")
        RingMachine.look_up(self)

    @T.inline
    def bring_own(self):
        """Start bringing the warp's own tile of a chunk, and look up the next one's."""
        self.bring_tile(0, fresh("tid.y") * 2)
        self.bring_tile(1, fresh("tid.y") * 2 + 1)
        if T.And(self.fetched < self.ahead.begin, fresh("tid.x") == 0):  # the turn of a barrier is over all the same
            self.full.arrive(fresh("tid.y") * 2)
            self.full.arrive(fresh("tid.y") * 2 + 1)
        self.next_first = self.next_first - self.warps
        if self.next_first < self.ahead.begin:
            self.ahead.split = self.ahead.split + self.walk.distance
            self.enter_split()
        self.look_up()

    # ------------------------------------------------------------ a chunk

    def row_of(self, t, r):
        """Number of a row of this lane among all."""
        fragment = self.fragment
        return t * fragment.tile_rows + fragment.row(self.lane) + r * fragment.row_step

    @T.inline
    def chunk(self, first, count):
        """``count`` tiles from ``first`` to the left."""
        warp: T.int32 = fresh("tid.y")
        softmax = T.meta_var(self.softmax)
        # 1. Scores of the warp's own tile.
        T.ptx.cp.async_.wait_group(1)
        self.use = warp * 2
        for i in T.unroll(2 * self.m_tiles):
            softmax.peak[i] = T.float32(NEGATIVE_INFINITY)
        if warp < count:
            self.full.wait(self.use, self.phase)
            T.cuda.warp_sync()
            self.scores()
            self.score_tile(first - warp, True, True)
            softmax.local_max(self.S, softmax.peak)
            softmax.reduce_rows(softmax.peak, T.max)
        if self.lane // 4 == 0:
            for t in T.unroll(self.m_tiles):
                for r in T.unroll(2):
                    self.peaks[warp, self.row_of(t, r)] = softmax.peak[t * 2 + r]
        T.cuda.cta_sync()
        # 2. References in turn, and probabilities of its own tile.
        for j in T.serial(count):
            self.follow(j)
            if j == warp:
                for i in T.unroll(2 * self.m_tiles):
                    self.own_max[i] = softmax.row_max[i]
                self.leave_correction(warp)
        if warp < count:
            self.leave_probabilities(warp)
        T.ptx.cp.async_.wait_group(0)
        T.cuda.cta_sync()
        # 3. Its columns of all tiles.
        for j in T.serial(count):
            self.full.wait(j * 2 + 1, self.phase)
        T.cuda.warp_sync()
        for j in T.serial(count):
            if self.growths[j] != 0:
                for t in T.unroll(self.m_tiles):
                    for r in T.unroll(2):
                        softmax.correction[t * 2 + r] = self.corrections[j, self.row_of(t, r)]
                softmax.rescale(self.O, self.o_stride)
                self.scale_sums()
            if warp * self.each < self.column_groups:
                self.multiply_values(j, warp)
            if warp == self.warps - 1:
                self.add_sums(j)
        T.ptx.fence.proxy.async_.shared__cta()
        T.cuda.cta_sync()
        # 4. Its places are free.
        self.phase = 1 - self.phase
        self.bring_own()

    @T.inline
    def follow(self, j):
        """References as tile ``j`` of the chunk raises them."""
        softmax = T.meta_var(self.softmax)
        softmax.grown = 0
        for t in T.unroll(self.m_tiles):
            for r in T.unroll(2):
                i = T.meta_var(t * 2 + r)
                softmax.peak[i] = self.peaks[j, self.row_of(t, r)]
                excess = T.meta_var(softmax.peak[i] * softmax.scale > softmax.row_max[i] + T.float32(LAZY))
                softmax.grown = T.bitwise_or(softmax.grown, T.Cast("int32", excess))
        softmax.grown = T.cuda.any_sync(T.uint32(_ALL_LANES), softmax.grown)
        if softmax.grown != 0:
            for i in T.unroll(2 * self.m_tiles):
                softmax.raise_reference(i)

    def addends_of(self, warp):
        """Shared address of what this lane of the warp that sums adds of a warp's tile, in that one's place of K."""
        first = T.cuda.cvta_generic_to_shared(self.k_tile.buffer.ptr_to([0, 0, 0, 0]))
        return first + T.Cast("uint32", warp * 2 * self.k_tile.stage_bytes + self.lane * 8)

    @T.inline
    def leave_probabilities(self, warp):
        """Scores to probabilities, which all need."""
        softmax = T.meta_var(self.softmax)
        odd: T.bool = softmax.is_odd()
        to: T.uint32 = self.addends_of(warp)
        for k in T.unroll(self.config.block_n // 16):
            for t in T.unroll(self.m_tiles):
                for e in T.unroll(2):
                    s = T.meta_var(t * self.s_stride + k * 4 + e)
                    n = T.meta_var((k * self.m_tiles + t) * 2 + e)
                    for r in T.unroll(2):
                        self.S[s + r * 2] = T.exp2(self.S[s + r * 2] * softmax.scale - self.own_max[t * 2 + r])
                    given: T.float32 = T.Select(odd, self.S[s], self.S[s + 2])
                    own: T.float32 = T.Select(odd, self.S[s + 2], self.S[s])
                    other: T.float32 = from_lane(given, 4)
                    T.ptx["st.shared.v2.f32"](
                        T.ptx.addr(to, n * 256), T.Select(odd, other, own), T.Select(odd, own, other)
                    )
                    self.pack_pair(self.pair, 0, self.S[s], self.S[s + 2])
                    self.pairs[warp, n, self.lane] = across(self.pair[0])

    @T.inline
    def leave_correction(self, warp):
        """How references change with a warp's own tile, which all need."""
        softmax = T.meta_var(self.softmax)
        if self.lane // 4 == 0:
            for t in T.unroll(self.m_tiles):
                for r in T.unroll(2):
                    self.corrections[warp, self.row_of(t, r)] = softmax.correction[t * 2 + r]
        if self.lane == 0:
            self.growths[warp] = softmax.grown

    @T.inline
    def scale_sums(self):
        """The row sums, relative to other references."""
        for t in T.unroll(self.m_tiles):
            softmax = T.meta_var(self.softmax)
            factor = T.meta_var(T.Select(softmax.is_odd(), softmax.correction[t * 2 + 1], softmax.correction[t * 2]))
            softmax.own_sum[t] = softmax.own_sum[t] * factor

    @T.inline
    def add_sums(self, j):
        """Add the probabilities of tile ``j``, those of a lane in its own order."""
        softmax = T.meta_var(self.softmax)
        source: T.uint32 = self.addends_of(j)
        added = T.alloc_local([2], "float32")
        for k in T.unroll(self.config.block_n // 16):
            for t in T.unroll(self.m_tiles):
                for e in T.unroll(2):
                    n = T.meta_var((k * self.m_tiles + t) * 2 + e)
                    T.ptx["ld.shared.v2.f32"](added[0], added[1], T.ptx.addr(source, n * 256))
                    for x in T.unroll(2):
                        softmax.own_sum[t] = softmax.own_sum[t] + added[x]

    @T.inline
    def multiply_values(self, j, warp):
        """O^T += V^T P^T of tile ``j``, for the warp's own columns."""
        tile = T.meta_var(self.v_tile)
        chunk: T.int32 = warp * self.each // 2 * 2
        self.use = j * 2 + 1
        v_from: T.uint32 = T.bitwise_xor(
            self.v_from + T.Cast("uint32", self.use * tile.stage_bytes),
            T.Cast("uint32", chunk % tile.panel_chunks * CHUNK_BYTES),
        ) + T.Cast("uint32", chunk // tile.panel_chunks * tile.panel_bytes)
        for k in T.unroll(self.config.block_n // 16):
            self.load_value_scales(k)
            T.ptx[LOAD_TRANSPOSED](*[self.words[x] for x in range(4)], tile.at(v_from, k * 16, 0))
            T.cuda.warp_sync()
            for t in T.unroll(self.m_tiles):
                for e in T.unroll(2):
                    self.P[t * 2 + e] = self.pairs[j, (k * self.m_tiles + t) * 2 + e, self.lane]
            for x in T.unroll(self.each):
                if self.each == 1:
                    for keys in T.unroll(2):
                        self.words[keys] = T.Select(warp % 2 == 1, self.words[2 + keys], self.words[keys])
                self.widen_values(x)
                for t in T.unroll(self.m_tiles):
                    self.multiply_left(self.O, t * self.o_stride + x * 4, self.P, t * 2)

    def output_column(self, group):
        """First output column of a register group, counted from the first of this lane's."""
        return (fresh("tid.y") * self.each + group) * 16 + self.fragment.column(self.lane)

    # ------------------------------------------------------------ all splits

    @T.inline
    def compute(self, rows, results):
        """Compute the walk's splits, and leave what they have."""
        walk = T.meta_var(self.walk)
        split: T.int32 = walk.first
        while split < walk.splits:
            self.start_rows()
            first: T.int32 = walk.end(split) - 1
            while first >= walk.begin(split):
                self.chunk(first, T.min(first - walk.begin(split) + 1, self.warps))
                first = first - self.warps
            if walk.begin(split) < walk.end(split):
                self.share_sums()
            if fresh("tid.y") * self.each < self.column_groups:
                store_partial(self, rows, self.geometry, flat(results.o), flat(results.lse), results.splits, split)
            split = split + walk.distance

    @T.inline
    def share_sums(self):
        """Row sums from the warp that has added them to all."""
        softmax = T.meta_var(self.softmax)
        if fresh("tid.y") == self.warps - 1:
            softmax.finish()
            if self.lane // 4 == 0:
                for t in T.unroll(self.m_tiles):
                    for r in T.unroll(2):
                        self.totals[self.row_of(t, r)] = softmax.row_sum[t * 2 + r]
        T.cuda.cta_sync()
        for t in T.unroll(self.m_tiles):
            for r in T.unroll(2):
                softmax.row_sum[t * 2 + r] = self.totals[self.row_of(t, r)]
