"""Keys and values in 8 bits on Hopper: a warpgroup widens tiles to the stages that wgmma reads.

It stands beside the producer's, whose warps for K and V have nothing to do then.  Two of its warps widen tiles of K,
the other two those of V, each half of a tile's rows: bytes come by cp.async, a tile ahead, to memory that a lane has
for itself, and scales beside them.  A tile is widened once for all rows of a work tile, and consumers see what they see
of a cache of 16 bits.
"""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.families.mma.instructions import COPY
from schedules.families.mma.widen import SCALE_BYTES, Widening, widening
from schedules.families.sm90.barriers import WARPS
from schedules.families.sm90.boxes import RaggedBoxes
from schedules.families.sm90.work_tile import KeyWalk
from schedules.tile.dtypes import CHUNK_BYTES, element_type, tensor_types
from schedules.tile.geometry import flat, wide

#: Warps that share the rows of a tile.
SHARERS = WARPS // 2
#: Tiles of bytes that a warp has room for.
SLOTS = 2
#: Rows, and 16 bytes of each, that a warp copies at a time.
_ROWS, _CHUNKS = 8, 4


def staged_bytes(block_n: int, columns: int) -> int:
    """Shared memory for bytes and scales of tiles of ``block_n`` keys; ``columns`` of a key and a value together."""
    return SLOTS * block_n * (columns + 2 * SCALE_BYTES)


def _of_lane(value, lane):
    """What a lane of the warp has."""
    return T.cuda.__shfl_sync(T.uint32(0xFFFFFFFF), value, lane, 32)


@T.meta_class
class TileWidener(Widening):
    """A warp that widens its part of the tiles of keys (``which`` 0) or values (1): rows from ``part * rows`` on.

    A lane copies 16 bytes of row ``lane % 8`` of each 8 rows, of every fourth 16 bytes, and widens what it has copied.
    """

    def __init__(self, boxes, block, pipeline, which: int, part, lane):
        self.boxes, self.block, self.pipeline = boxes, block, pipeline
        self.which, self.part, self.lane = which, part, lane
        geometry, pattern = block.geometry, boxes.pattern
        self.tensor = (geometry.k, geometry.v)[which]
        self.memory, self.dim = flat(self.tensor.buffer), self.tensor.sizes["dim"]
        self.scale_source, self.scale_strides = flat(geometry.scales[which]), geometry.scale_strides[which]
        self.cache, self.widen = boxes.cache, widening(boxes.cache, "sm_90a", by_halves=True)
        self.pack = element_type(tensor_types(pattern).v.name).pack
        self.columns = (pattern.head_dim, pattern.head_dim_v)[which]
        self.block_n = boxes.config.block_n
        self.rows = self.block_n // SHARERS
        self.across = self.columns // (_CHUNKS * CHUNK_BYTES)  # passes for 8 rows
        self.looks = -(-self.rows // 32)
        self.groups = min(self.rows, 32) // _ROWS  # of 8 rows, of those that the lanes look up at a time
        self.staged, self.scales = boxes.bytes[which], boxes.scales[which]
        self.pages = T.alloc_local([self.looks], "int32")
        self.offsets = T.alloc_local([self.looks], "int64")
        self.floats = T.alloc_local([4], "float32")
        self.words, self.packed = T.alloc_local([4], "uint32"), T.alloc_local([8], "uint32")
        self.n, self.ahead = T.local_scalar("int32"), T.local_scalar("int32")

    # ------------------------------------------------------------ bytes

    def _keys(self):
        """Where the keys of the sequence are, and how many."""
        geometry, block = self.block.geometry, self.block
        keys = geometry.keys.of(block.batch)
        return geometry.key_rows(self.tensor, block.batch, block.kv_head, keys), keys.length

    def _own(self, i):
        """The row of the warp's part whose page this lane looks up."""
        return i * 32 + self.lane

    @T.inline
    def look_up(self, key_first):
        """The pages of the rows of a tile; a row that doesn't exist has none."""
        source, length = T.meta_var(self._keys())
        for i in T.unroll(self.looks):
            key: T.int32 = key_first + self.part * self.rows + self._own(i)
            self.pages[i] = 0
            if T.And(self._own(i) < self.rows, key < length):
                self.pages[i] = source.entry(source.split(key)[0])

    @T.inline
    def copy(self, slot, key_first):
        """Start copying this warp's part of a tile whose pages are known, and its scales."""
        source, length = T.meta_var(self._keys())
        first: T.int32 = key_first + self.part * self.rows
        for i in T.unroll(self.looks):
            key: T.int32 = first + self._own(i)
            exists = T.meta_var(key < length)
            row = T.meta_var(source.split(T.min(key, T.max(length - 1, 0)))[1])
            self.offsets[i] = source.offset(self.pages[i], row, 0)
            if self._own(i) < self.rows:
                page_stride, head_stride = T.meta_var(self.scale_strides)
                at: T.int64 = wide(self.pages[i]) * wide(page_stride) + wide(self.block.kv_head) * wide(head_stride)
                T.ptx["cp.async.ca.shared.global"](
                    T.cuda.cvta_generic_to_shared(self.scales.ptr_to([slot, self.part * self.rows + self._own(i)])),
                    self.scale_source.ptr_to([at]),
                    SCALE_BYTES,
                    T.Select(exists, T.uint32(SCALE_BYTES), T.uint32(0)),
                )
        if T.And(self.dim == self.columns, first + self.rows <= length):
            for i in T.unroll(self.looks):
                for j in T.unroll(self.groups):
                    self._copy_group(slot, i, j, lambda row, column: T.uint32(CHUNK_BYTES))
        else:
            # A row may end in the middle of 16 bytes.
            for i in T.unroll(self.looks):
                for j in T.serial(self.groups):
                    self._copy_group(
                        slot,
                        i,
                        j,
                        lambda row, column: T.Select(
                            first + row < length,
                            T.Cast("uint32", T.min(T.max(self.dim - column, 0), CHUNK_BYTES)),
                            T.uint32(0),
                        ),
                    )

    @T.inline
    def _copy_group(self, slot, i, j, size):
        """The ``j``-th 8 rows of those that the lanes have looked up ``i``-th."""
        row: T.int32 = j * _ROWS + self.lane % _ROWS
        offset: T.int64 = _of_lane(self.offsets[i], row)
        to: T.uint32 = self._staged(slot) + T.Cast("uint32", (i * 4 + j) * (self.across * 32 * CHUNK_BYTES))
        for c in T.unroll(self.across):
            column = T.meta_var((c * _CHUNKS + self.lane // _ROWS) * CHUNK_BYTES)
            T.ptx[COPY](
                T.ptx.addr(to, c * 32 * CHUNK_BYTES),
                self.memory.ptr_to([offset + wide(column)]),
                CHUNK_BYTES,
                size(i * 32 + row, column),
            )

    def _staged(self, slot):
        """Shared address of this lane's first bytes in a slot."""
        return T.cuda.cvta_generic_to_shared(self.staged.ptr_to([self.part, slot, self.lane * CHUNK_BYTES]))

    # ------------------------------------------------------------ 16 bits

    @T.inline
    def widen_tile(self, slot, state):
        """This warp's part of a tile to its stage, which is empty."""
        staged: T.uint32 = self._staged(slot)
        row = T.meta_var(self.part * self.rows + self.lane % _ROWS)
        of_row = T.meta_var(lambda half: T.bitwise_xor(self.lane // _ROWS * 2 + half, self.lane % _ROWS) * 8)
        to0: T.uint32 = T.cuda.cvta_generic_to_shared(self.pipeline.pointer(state)(0, row, of_row(0)))
        to1: T.uint32 = T.cuda.cvta_generic_to_shared(self.pipeline.pointer(state)(0, row, of_row(1)))
        for j in T.unroll(self.rows // _ROWS):
            scale: T.float32 = self.scales[slot, row + j * _ROWS]
            for c in T.unroll(self.across):
                from_ = T.meta_var(T.ptx.addr(staged, (j * self.across + c) * 32 * CHUNK_BYTES))
                T.ptx["ld.shared.v4.b32"](*[self.words[x] for x in range(4)], from_)
                for word in T.unroll(4):
                    self.widen_word(self.words[word], lambda x, scale=scale: scale)
                    T.ptx[self.pack](self.packed[word * 2], self.floats[1], self.floats[0])
                    T.ptx[self.pack](self.packed[word * 2 + 1], self.floats[3], self.floats[2])
                below = T.meta_var(c * self.block_n * 128 + j * _ROWS * 128)
                T.ptx["st.shared.v4.b32"](T.ptx.addr(to0, below), *[self.packed[x] for x in range(4)])
                T.ptx["st.shared.v4.b32"](T.ptx.addr(to1, below), *[self.packed[4 + x] for x in range(4)])

    # ------------------------------------------------------------ all tiles

    @T.inline
    def follow(self, walk):
        """Let ``ahead`` go to the next step that sees anything."""
        self.ahead = self.ahead + 1
        if self.block.pattern.has_gaps:
            going: T.int32 = T.Cast("int32", self.ahead < walk.steps)
            while going != 0:
                if walk.visible(self.ahead):
                    going = 0
                else:
                    self.ahead = self.ahead + 1
                    going = T.Cast("int32", self.ahead < walk.steps)

    @T.inline
    def fetch(self, walk, slot):
        """Start copying the tile of step ``ahead``, and look up where the one after it is."""
        if self.ahead < walk.steps:
            self.copy(slot, walk.key_first(self.ahead))
            self.follow(walk)
            if self.ahead < walk.steps:
                self.look_up(walk.key_first(self.ahead))
        T.ptx.cp.async_.commit_group()

    @T.inline
    def run(self):
        """Fill the pipeline."""
        self.n = 0

        @T.inline
        def fill(t):
            walk = KeyWalk(self.block, 0, self.block.config.block_m)
            self.ahead = 0
            self.look_up(walk.key_first(0))
            self.fetch(walk, T.bitwise_and(self.n, SLOTS - 1))
            for i in T.serial(walk.steps):
                if T.Or(i == 0, walk.visible(i)) if self.block.pattern.has_gaps else True:
                    self.fetch(walk, T.bitwise_and(self.n + 1, SLOTS - 1))
                    T.ptx.cp.async_.wait_group(1)
                    T.cuda.warp_sync()
                    state = T.meta_var(self.pipeline.state(self.n))
                    self.pipeline.producer_acquire(state)
                    self.widen_tile(T.bitwise_and(self.n, SLOTS - 1), state)
                    T.ptx.fence.proxy.async_.shared__cta()
                    T.cuda.warp_sync()
                    if self.lane == 0:
                        self.pipeline.full.arrive(state.index)
                    self.n = self.n + 1
            T.ptx.cp.async_.wait_group(0)

        self.block.scheduler.each_tile(self.block, True, self.lane, fill)


class WidenedBoxes(RaggedBoxes):
    """Boxes of TMA for queries and outputs alone; what widens keys and values."""

    by_pages = True
    widens = True
    #: Arrivals at the barrier that a tile is there.
    arrivals = SHARERS

    def __init__(self, geometry, pattern, config, cache: str):
        self.pattern, self.config, self.cache = pattern, config, cache

    def add_memory(self, pool):
        """Bytes and scales of tiles."""
        n = self.config.block_n
        self.bytes = [
            pool.alloc((SHARERS, SLOTS, n // SHARERS * columns), "uint8", align=CHUNK_BYTES)
            for columns in (self.pattern.head_dim, self.pattern.head_dim_v)
        ]
        self.scales = [pool.alloc((SLOTS, n), "float32", align=CHUNK_BYTES) for _ in range(2)]

    @T.inline
    def produce(self, block, k, v, index, lane):
        """Warp ``index`` of the warpgroup: fill its part of a pipeline."""
        T.ptx["setmaxnreg.dec.sync.aligned.u32"](self.config.widening_registers)
        if index < SHARERS:
            widener = TileWidener(self, block, k, 0, index, lane)
            widener.run()
        else:
            widener = TileWidener(self, block, v, 1, index - SHARERS, lane)
            widener.run()
