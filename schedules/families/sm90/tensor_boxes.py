"""A tensor over keys as boxes of TMA: what it holds for a step's scores comes to shared memory by itself.

A thread that reads its own elements takes a look-up in the cache for each of the eight rows of an instruction: those of
a step take as many cycles as its products do.  A box passes through the data path of shared memory twice, and that is
all.  Each consumer warpgroup has a pipeline of its own, of the tiles of its rows; a tile is taken to registers before
the step's products begin, which seem to read shared memory before loads do.

A tile is boxes of ``box_width`` columns beside each other, an odd multiple of 8, or of 16 bytes: eight rows of four
pairs are in different banks then.  Where the tensor is the same for all queries a box is one row.
"""

from __future__ import annotations

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.sm90.barriers import PRODUCER_ARRIVALS, WARPS, transaction_barriers
from schedules.families.sm90.config import WARPGROUP_ROWS, Config, box_width, boxed, boxes_of
from schedules.families.sm90.pipeline import PipelineState
from schedules.families.sm90.tensor_tile import TensorTile
from schedules.families.sm90.tma import encode_tensor, load_box
from schedules.families.sm90.work_tile import KeyWalk
from schedules.tile.element_pairs import BYTES
from schedules.tile.geometry import Geometry, local
from schedules.tile.static import static

#: What TMA asks of addresses and strides, bytes.
_ALIGNMENT = 16
#: Axes of a box.
_AXES = "jihb"


@T.meta_class
class TensorBoxes:
    """The tensor as TMA sees it, and the pipelines that its tiles pass through; made before ``T.device_entry()``.

    ``usable``: whether it lies as TMA can read it, and is to be read so; else the consumers' threads do.  ``rows``:
    those of a box.
    """

    def __init__(self, pattern: Pattern, config: Config, geometry: Geometry, by_row: bool, unless: Expr | None):
        self.param = boxed(pattern)
        self.bytes = BYTES[self.param.dtype]
        self.dtype = "uint8" if self.param.dtype == "bool" else self.param.dtype
        self.stages, self.consumers = config.tensor_stages, config.num_consumer_warpgroups
        self.by_lanes = config.persistent  # whose producer has too few registers for the place of each box
        self.width = box_width(config.block_n, self.param.dtype)
        self.boxes = boxes_of(config.block_n, self.param.dtype)
        self.buffer = geometry.parameters[self.param.name]
        self.strides = dict(zip(self.param.axes, self.buffer.ty.strides, strict=True))
        extents = {"b": geometry.batch, "h": geometry.heads, "i": geometry.seqlen_q, "j": geometry.seqlen_kv}
        # Along an axis that it is the same for it has one element.
        self.sizes = {a: T.Select(x != 0, extents[a], 1) for a, x in self.strides.items()}
        self.rows = T.bind(T.Select(self._varies("i"), WARPGROUP_ROWS, 1))
        memory = T.handle_add_byte_offset(self.buffer.data, 0)
        self.beyond = T.bind(T.call_extern("int32", "beyond_multiple", memory, _ALIGNMENT))
        # One element for all keys is none that a box could have beside each other.
        fits = T.And(self.beyond == 0, T.Or(self.strides["j"] == 1, extents["j"] == 1))
        for a in self.param.axes.replace("j", ""):
            aligned = T.And(self.strides[a] > 0, T.truncmod(self.strides[a], _ALIGNMENT // self.bytes) == 0)
            fits = T.And(fits, T.Or(self.sizes[a] == 1, aligned))
        if by_row:
            fits = T.And(fits, self._varies("i"))
        if unless is not None:
            fits = T.And(fits, T.Not(unless))
        self.usable = T.bind(T.call_extern("int32", "opaque", T.Cast("int32", fits)))

    def _varies(self, axis):
        """Whether it differs along an axis."""
        return self.sizes[axis] > 1 if axis in self.sizes else T.bool(False)

    def encode(self, descriptor):
        """Make the descriptor, on the host; one that is never used too where the tensor doesn't lie so."""
        address = T.handle_add_byte_offset(self.buffer.data, 0 - self.beyond)
        sizes = [self.sizes.get(a, T.int32(1)) for a in _AXES]
        strides = [self._stride_bytes(a) for a in _AXES[1:]]
        return encode_tensor(descriptor, address, sizes, strides, (self.width, self.rows), self.dtype)

    def _stride_bytes(self, axis):
        if axis not in self.strides:
            return T.int64(_ALIGNMENT)
        counts = T.And(self.usable != 0, self._varies(axis))
        return T.Select(counts, T.Cast("int64", self.strides[axis]) * self.bytes, T.int64(_ALIGNMENT))

    def add_memory(self, pool):
        """Take the tiles from the pool."""
        shape = (self.stages * self.consumers, self.boxes, WARPGROUP_ROWS, self.width)
        self.tiles = pool.alloc(shape, self.dtype, align=128)

    def add_barriers(self, pool):
        """Take the barriers from the pool, once it has the tiles of all pipelines."""
        self.full = transaction_barriers(pool, self.stages * self.consumers)
        self.empty = transaction_barriers(pool, self.stages * self.consumers)

    @T.inline
    def init(self):
        """One thread: initialise the barriers."""
        self.full.init(PRODUCER_ARRIVALS)
        self.empty.init(WARPS)

    def place(self, state: PipelineState, index):
        """Where the tile of consumer warpgroup ``index`` is."""
        return state.index * self.consumers + index

    @T.inline
    def expect(self, state, w):
        """What is going to come for consumer warpgroup ``w``."""
        T.ptx.mbarrier.arrive.expect_tx.shared.b64(
            self.full.ptr_to([self.place(state, w)]),
            T.Cast("uint32", self.rows * (self.boxes * self.width * self.bytes)),
        )

    @T.inline
    def fetch_box(self, block, descriptor, key, state, w, x):
        """Fetch box ``x`` of the tile of warpgroup ``w`` that begins at ``key``."""
        place = T.meta_var(self.place(state, w))
        load_box(
            self.tiles.ptr_to([place, x, 0, 0]),
            descriptor,
            self._at(block, key + x * self.width, w),
            self.full.ptr_to([place]),
        )

    @T.inline
    def fetch_by_thread(self, walk, block, descriptor, before):
        """One thread: fetch the tiles of the steps of a walk."""
        for i in T.serial(walk.steps):
            state = T.meta_var(PipelineState(self.stages, before + i))
            for w in T.unroll(self.consumers):
                self.empty.wait(self.place(state, w), T.bitwise_xor(state.phase, 1))
                self.expect(state, w)
                for x in T.unroll(self.boxes):
                    self.fetch_box(block, descriptor, walk.key_first(i), state, w, x)

    @T.inline
    def fetch_by_lanes(self, walk, block, descriptor, lane, before):
        """A whole warp, each lane a box of each tile."""
        if lane < self.consumers * self.boxes:
            w: T.int32 = T.truncdiv(lane, self.boxes)
            x: T.int32 = lane - w * self.boxes
            for i in T.serial(walk.steps):
                state = T.meta_var(PipelineState(self.stages, before + i))
                self.empty.wait(self.place(state, w), T.bitwise_xor(state.phase, 1))
                if x == 0:
                    self.expect(state, w)
                self.fetch_box(block, descriptor, walk.key_first(i), state, w, x)

    @T.inline
    def fetch(self, block, descriptor, lane, before):
        """A whole warp: fetch the tiles of the steps of a work tile, if they come in boxes; ``before`` it there were so
        many tiles."""
        walk = KeyWalk(block, 0, block.config.block_m)
        if self.usable != 0:
            if static(self.by_lanes):
                self.fetch_by_lanes(walk, block, descriptor, lane, before)
            elif T.cuda.elect_sync():
                self.fetch_by_thread(walk, block, descriptor, before)
        before = before + walk.steps

    @T.inline
    def skip(self, state, index, lane):
        """A consumer warp: let a tile pass."""
        if self.usable != 0:
            self.full.wait(self.place(state, index), state.phase)
            self.release(state, index, lane)

    @T.inline
    def release(self, state, index, lane):
        """A consumer warp: it needs the tile no more, and something has depended on what every lane has read of it.

        Where a tile was released as soon as the loads were issued, the next box was there before they had been done.
        """
        if self.usable != 0:
            T.cuda.warp_sync()
            if lane == 0:
                self.empty.arrive(self.place(state, index))

    def _at(self, block, key, index):
        """Where the box from a key on is, of the rows of a warpgroup."""
        row = block.row_first + index * WARPGROUP_ROWS
        places = {"j": key, "i": row, "h": block.head, "b": block.batch}
        return [T.Select(self._varies(a), places[a], 0) for a in _AXES]


@T.meta_class
class BoxedTile(TensorTile):
    """The values at the scores of a warpgroup's tile, from boxes; where there are none, from memory."""

    def __init__(self, boxes: TensorBoxes, index, warp, *arguments):
        TensorTile.__init__(self, *arguments)
        self.boxes, self.index, self.warp = boxes, index, warp
        row = warp * self.fragment.tile_rows + self.fragment.row(self.lane)
        self.row = [local(T.Select(boxes.rows > 1, row + r * self.fragment.row_step, 0)) for r in range(self.rows)]

    @T.inline
    def take(self, state, rows, column0, last):
        """Take the tile of a step to registers; ``rows`` and what follows as in ``fetch``."""
        if self.boxes.usable != 0:
            place = T.meta_var(self.boxes.place(state, self.index))
            self.boxes.full.wait(place, state.phase)
            self.load(place)
        else:
            self.fetch(rows, column0, last)

    def load(self, place) -> None:
        """Take the pairs of a tile from its boxes."""
        width, load = self.boxes.width, T.ptx["ld.shared.v2.b32" if self.per_pair == 2 else "ld.shared.b32"]
        for g in range(self.groups):
            x, column = divmod(g * self.fragment.group, width)
            for r in range(self.rows):
                at = column + self.column(self.fragment.column(self.lane))
                pair = self.boxes.tiles.ptr_to([place, x, self.row[r], at])
                T.evaluate(load(*[self.words[self._word(g, r) + w] for w in range(self.per_pair)], pair))


def tensor_boxes(
    pattern: Pattern, config: Config, geometry: Geometry, by_row: bool = False, unless: Expr | None = None
) -> TensorBoxes | None:
    """What brings the tensor that a configuration wants in boxes, if any; ``by_row``: where it differs from query to
    query; ``unless`` something is so."""
    return TensorBoxes(pattern, config, geometry, by_row, unless) if config.tensor_stages else None
