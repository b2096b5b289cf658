"""Tensors over queries and keys in shared memory: a tile's values come as boxes of TMA, beside its tile of keys.

A load of the threads' own reads eight rows, 32 bytes of each, and takes eight look-ups in the cache; a box takes none.
TMA wants neighbouring keys to be neighbours in memory, and addresses and strides that are multiples of 16 bytes.
Whether that holds is found out at each call, on the host; where it doesn't, threads load what they need themselves.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.sm90.barriers import PRODUCER_ARRIVALS, consumer_arrivals, transaction_barriers
from schedules.families.sm90.config import ALIGNMENT, TENSOR_STAGES, Config, box_bytes, boxed_params
from schedules.families.sm90.packing import Rows
from schedules.families.sm90.pipeline import PipelineState
from schedules.families.sm90.tma import encode_tensor, load_box
from schedules.tile.element_pairs import BYTES
from schedules.tile.fragment import Fragment
from schedules.tile.geometry import Geometry
from tvm_flash.packs.manifest import Param

#: Of a row of so many bytes, how far its number is shifted, and which of its bits then change places of 16 bytes.
_SWIZZLE = {128: (0, 7), 64: (1, 3), 32: (2, 1)}


@T.meta_class
class TensorBox:
    """One tensor: where it is, how TMA reads it, and the tiles ``(stage, panel, row, key)`` in shared memory.

    Made before ``T.device_entry()``, of host expressions.
    """

    def __init__(self, param: Param, buffer, config: Config, geometry: Geometry):
        self.param, self.buffer, self.block_m = param, buffer, config.block_m
        self.bytes = BYTES[param.dtype]
        self.row_bytes = box_bytes(param, config)
        self.columns = self.row_bytes // self.bytes
        self.panels = config.block_n // self.columns
        strides = dict(zip(param.axes, buffer.ty.strides, strict=True))
        sizes = {"b": geometry.batch, "h": geometry.heads, "i": geometry.seqlen_q, "j": geometry.seqlen_kv}
        self.strides = {a: strides.get(a, T.int32(0)) for a in "ihb"}
        #: Along which axes there is more than one; an axis of heads or of batch entries may be one for all.
        self.moves = {a: self.strides[a] != 0 for a in "hb"}
        self.sizes = {a: sizes[a] for a in "ji"} | {
            a: T.Select(self.moves[a], sizes[a], T.int32(1)) for a in "hb"
        }  # fmt: skip
        self.address = T.handle_add_byte_offset(buffer.data, 0)  # of any type
        multiple = [T.call_extern("int32", "is_multiple", self.address, ALIGNMENT) != 0]
        for axis, stride in self.strides.items():
            lies = T.bitwise_and(stride * self.bytes, ALIGNMENT - 1) == 0
            multiple.append(T.And(lies, stride > 0 if axis == "i" else stride >= 0))
        self.fits = tirx.all(strides["j"] == 1, *multiple)

    def encode(self, descriptor, ready):
        """Make the descriptor, on the host; of a tensor that TMA can't read, one that is never used."""
        strides = [
            T.Select(T.And(ready != 0, s > 0), T.Cast("int64", s) * self.bytes, T.int64(ALIGNMENT))
            for s in self.strides.values()
        ]
        start = T.call_extern("handle", "begin_of_multiple", self.address, ALIGNMENT)
        sizes = [self.sizes[a] for a in "jihb"]
        box = (self.columns, self.block_m)
        return encode_tensor(descriptor, start, sizes, strides, box, self.param.dtype, self.row_bytes)

    def add_memory(self, pool):
        """Take the tiles from the pool."""
        shape = (TENSOR_STAGES, self.panels, self.block_m, self.columns)
        self.tiles = pool.alloc(shape, self.param.dtype, align=1024)

    def load(self, stage, descriptor, block, key, barrier) -> None:
        """One thread: start to copy the tile from key ``key`` on of a work tile."""
        head, batch = (T.Select(self.moves[a], x, 0) for a, x in (("h", block.head), ("b", block.batch)))
        for p in range(self.panels):
            at = (key + p * self.columns, block.row_first, head, batch)
            T.evaluate(load_box(self.tiles.ptr_to([stage, p, 0, 0]), descriptor, at, barrier))

    def pair(self, fragment: Fragment, lane, row, stage, g, r):
        """Where the two elements of a lane are in group ``g`` of columns, in the second of its rows if ``r``.

        ``row`` is the work tile's row that the warp begins with, a multiple of 8.
        """
        shift, bits = _SWIZZLE[self.row_bytes]
        per_chunk = 16 // self.bytes
        column = fragment.column(lane)  # of 8 elements: of one place of 16 bytes, or of two
        chunk = T.bitwise_xor(
            T.bitwise_and(T.shift_right(fragment.row(lane), shift), bits), T.truncdiv(column, per_chunk)
        )
        place = chunk * per_chunk + T.truncmod(column, per_chunk)
        first = g * fragment.group
        down = row + fragment.row(lane) + r * fragment.row_step
        across = T.bitwise_xor(place, first % self.columns)
        return self.tiles.ptr_to([stage, first // self.columns, down, across])


@T.meta_class
class TensorBoxes:
    """All of them, with a pipeline: tile n of a block is in stage ``n % stages``, as those of keys.

    ``ready``, a number that the host finds, says whether they come this way.
    """

    def __init__(self, pattern: Pattern, config: Config, geometry: Geometry, rows: Rows):
        params = boxed_params(pattern) if config.tensor_boxes else ()
        self.consumers = config.num_consumer_warpgroups
        self.boxes = {p.name: TensorBox(p, geometry.parameters[p.name], config, geometry) for p in params}
        self.tile_bytes = sum(x.panels * x.block_m * x.row_bytes for x in self.boxes.values())
        if self.boxes:
            fits = tirx.all(T.Not(rows.packed), *(x.fits for x in self.boxes.values()))
            self.ready = T.bind(T.Cast("int32", fits))

    def __bool__(self) -> bool:
        return bool(self.boxes)

    def add_memory(self, pool):
        """Take the tiles of all tensors from the pool."""
        for x in self.boxes.values():
            x.add_memory(pool)

    def add_barriers(self, pool):
        """Take the barriers from the pool, once it has all tiles."""
        if self.boxes:
            self.full, self.empty = (transaction_barriers(pool, TENSOR_STAGES) for _ in range(2))

    @T.inline
    def init(self):
        """One thread: initialise the barriers."""
        self.full.init(PRODUCER_ARRIVALS)
        self.empty.init(consumer_arrivals(self.consumers))

    def state(self, tile) -> PipelineState:
        """State of tile number ``tile``."""
        return PipelineState(TENSOR_STAGES, tile)

    @T.inline
    def load(self, block, tile, descriptors, key):
        """One thread: fill the stage of tile number ``tile`` of the block as soon as it is empty."""
        if self.ready != 0:
            state = T.meta_var(self.state(tile))
            self.empty.wait(state.index, T.bitwise_xor(state.phase, 1))
            T.ptx.mbarrier.arrive.expect_tx.shared.b64(self.full.ptr_to([state.index]), T.uint32(self.tile_bytes))
            self._load_boxes(block, state.index, descriptors, key)

    def _load_boxes(self, block, stage, descriptors, key) -> None:
        for x, descriptor in zip(self.boxes.values(), descriptors, strict=True):
            x.load(stage, descriptor, block, key, self.full.ptr_to([stage]))

    @T.inline
    def wait(self, tile):
        """Consumer: until tile number ``tile`` is there."""
        state = T.meta_var(self.state(tile))
        self.full.wait(state.index, state.phase)

    @T.inline
    def release(self, tile, lane):
        """Consumer, every warp: this warp has read the tile."""
        T.cuda.warp_sync()
        if lane == 0:
            self.empty.arrive(self.state(tile).index)
