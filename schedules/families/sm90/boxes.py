"""Boxes of TMA: how tensors are described to it, and where the rows and the keys of a work tile are then."""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.families.sm90.barriers import PRODUCER_ARRIVALS
from schedules.families.sm90.config import panels
from schedules.families.sm90.packing import Rows
from schedules.families.sm90.tma import (
    PageSteps,
    encode_keys,
    encode_paged,
    encode_queries,
    encode_ragged,
    load_panel,
    load_panel_by,
    load_panel_once,
    lowest_bit,
    placed_box,
    ragged_box,
)
from schedules.tile.division import quotient, reciprocal
from schedules.tile.geometry import Geometry, PagedGeometry, Tensor
from schedules.tile.key_source import ContiguousRows
from schedules.tile.levels import from_lane

_LANES = 32
#: Boxes of keys on pages that a warp looks up at a time, or those of a tile if it has more.
_WINDOW = 64
_EIGHT = 8


class Boxes:
    """What all have in common: two warps of the producer's warpgroup fetch keys and values."""

    #: Whether a warpgroup before the producer's widens keys and values.
    widens = False
    #: Arrivals at the barrier that a tile of keys or values is there.
    arrivals = PRODUCER_ARRIVALS
    #: What brings a tensor of the definition's in boxes (:mod:`schedules.families.sm90.tensor_boxes`).
    tensors = None

    def add_memory(self, pool):
        """Shared memory beside the pipelines."""


class DenseBoxes(Boxes):
    """Of tensors with a batch axis."""

    #: Whether the keys of a tile are several boxes, which the lanes of a warp share.
    by_pages = False

    def __init__(self, geometry: Geometry, rows: Rows, tensors=None):
        self.geometry, self.rows, self.tensors = geometry, rows, tensors

    def encode_queries(self, descriptor, tensor: Tensor, box_rows: int):
        """Make the descriptor of q or o, on the host."""
        return encode_queries(descriptor, tensor, self.rows, box_rows)

    def encode_keys(self, descriptor, tensor: Tensor, box_rows: int):
        """Make the descriptor of k or v, on the host."""
        return encode_keys(descriptor, tensor, box_rows)

    def queries(self, block, row):
        """Where rows from ``row`` of the work tile on are: position, head in its group, group, batch."""
        row = block.row_first + row
        head = block.head - block.kv_head * self.rows.group + self.rows.head(row)
        return self.rows.position(row), head, block.kv_head, block.batch

    def keys(self, block, key):
        """Where keys from ``key`` on are."""
        keys = self.geometry.keys.of(block.batch)
        return ContiguousRows(self.geometry.k, block.batch, block.kv_head, keys).box(key)


class RaggedBoxes(Boxes):
    """Of tensors of ragged sequences: a box ends where its sequence does."""

    by_pages = False

    def encode_queries(self, descriptor, tensor: Tensor, box_rows: int):
        """Make the descriptor of q or o, on the host."""
        return encode_ragged(descriptor, tensor, box_rows)

    encode_keys = encode_queries

    def queries(self, block, row):
        """Where rows from ``row`` of the work tile on are."""
        return ragged_box(block.geometry.queries.of(block.batch), block.row_first + row, block.head)

    def keys(self, block, key):
        """Where keys from ``key`` on are."""
        return ragged_box(block.geometry.keys.of(block.batch), key, block.kv_head)


class PagedBoxes(RaggedBoxes):
    """The same with the keys on pages: a box has the rows of a page, or as many of them as never leave page and tile.

    That is the largest power of two that divides the size of a page, or ``block_n``, which is one.  A tile has
    ``of_a_tile``.  Made of host expressions, before ``T.device_entry()``.
    """

    by_pages = True

    def __init__(self, geometry: PagedGeometry, block_n: int):
        self.geometry, self.block_n = geometry, block_n
        self.rows = T.bind(T.min(lowest_bit(geometry.page_size), block_n))
        self.of_a_tile = T.bind(T.truncdiv(T.int32(block_n), self.rows))
        self.steps = {id(x): PageSteps(x) for x in (geometry.k, geometry.v)}

    def encode_keys(self, descriptor, tensor: Tensor, box_rows: int):
        """Make the descriptor of k or v, on the host."""
        return encode_paged(descriptor, tensor, self.steps[id(tensor)], self.rows)

    def fetching(self, block, tensor: Tensor, lane):
        """How a warp, of which this is lane ``lane``, fetches tiles of k or v one after the other."""
        return TilesOfPages(self, block, tensor, lane)


@T.meta_class
class AskingWarp:
    """A warp that asks for boxes of the tiles of its ``block``, whose pages and rows are ``steps`` apart."""

    #: Whether no other block reads these keys, which go first from the L2 cache then.
    reads_once = False
    #: The policy of the L2 cache where that is known when the kernel runs, else None.
    policy = None

    def _load(self):
        """What asks for a panel, under the policy of these keys."""
        if self.policy is not None:
            return lambda *what: load_panel_by(*what, self.policy)
        return load_panel_once if self.reads_once else load_panel

    @T.inline
    def ask(self, pipeline, state, descriptor, row, place, seen):
        """Ask for the panels of the box that begins with a row of the tile, and has ``seen``."""
        load = T.meta_var(self._load())
        for p in T.unroll(pipeline.panels):
            load(
                pipeline.pointer(state)(p, row, 0),
                descriptor,
                p + pipeline.first_panel,
                placed_box(self.steps, place, seen, self.block.kv_head),
                pipeline.full.ptr_to([state.index]),
            )


@T.meta_class
class TilesOfPages(AskingWarp):
    """Tiles of keys that are several boxes each.

    Where the boxes of a tile are is looked up apart from loading, before a stage is waited for: what is left to do then
    is to ask for them.  Lanes can't do that at the same time: each waits for its turn, and for its numbers to get to
    where TMA takes them from.  So at head_dim 128 a single one asks for eight whole boxes, those of pages of 16 keys;
    at 64, and of latents, that spilled.
    """

    def __init__(self, boxes: PagedBoxes, block, tensor: Tensor, lane):
        self.boxes, self.block, self.lane = boxes, block, lane
        self.tensor, self.steps = tensor, boxes.steps[id(tensor)]
        self.each = max(boxes.block_n // _LANES, 1)  # boxes of a lane at most, where lanes share them
        self.places = T.alloc_local([self.each], "int32")  # of a box, the steps of page and row that it begins at
        self.left = T.local_scalar("int32")  # keys from the tile's first on
        self.asks_alone = panels(block.pattern.head_dim) == 2

    def _row(self, i):
        """First row in the tile of this lane's box number ``i``, ``block_n`` or more if there is none."""
        return (i * _LANES + self.lane) * self.boxes.rows

    @T.inline
    def look_up(self, key_first):
        """Look up where the tile from key ``key_first`` on is."""
        geometry, block = T.meta_var((self.boxes.geometry, self.block))
        rows = T.meta_var(geometry.key_rows(self.tensor, block.batch, block.kv_head, geometry.keys.of(block.batch)))
        self.left = block.site.seqlen_kv - key_first
        for i in T.unroll(self.each):
            self.places[i] = 0
            if T.And(self._row(i) < self.boxes.block_n, self._row(i) < self.left):
                at = T.meta_var(rows.split(key_first + self._row(i)))
                self.places[i] = rows.entry(at[0]) * self.steps.page + at[1] * self.steps.row

    @T.inline
    def load(self, pipeline, state, descriptor):
        """Fill a stage, which is empty, with that tile; what is past the last key is zero."""
        if self.lane == 0:
            pipeline.expect(state)
        T.cuda.warp_sync()
        if T.And(self.boxes.of_a_tile == _EIGHT, self.left >= self.boxes.block_n) if self.asks_alone else False:
            rows = T.meta_var(self.boxes.block_n // _EIGHT)
            places = T.alloc_local([_EIGHT], "int32")
            for b in T.unroll(_EIGHT):
                places[b] = from_lane(self.places[0], b)
            if T.cuda.elect_sync():
                for b in T.unroll(_EIGHT):
                    self.ask(pipeline, state, descriptor, b * rows, places[b], rows)
        else:
            for i in T.unroll(self.each):
                row: T.int32 = self._row(i)
                if row < self.boxes.block_n:
                    seen: T.int32 = T.min(T.max(self.left - row, 0), self.boxes.rows)
                    self.ask(pipeline, state, descriptor, row, self.places[i], seen)


class FetchedPages(PagedBoxes):
    """The same where a warp fetches all tiles of K, or of V, one after the other."""

    def __init__(self, geometry: PagedGeometry, block_n: int):
        PagedBoxes.__init__(self, geometry, block_n)
        self.of_one_key = T.bind(reciprocal(geometry.page_size))

    def page(self, key):
        """Number of a key's page among those of its sequence."""
        return quotient(key, self.geometry.page_size, self.of_one_key)

    def fetching(self, block, tensor: Tensor, lane):
        """How a warp, of which this is lane ``lane``, fetches tiles of k or v one after the other."""
        return WindowOfPages(self, block, tensor, lane)


@T.meta_class
class WindowOfPages(AskingWarp):
    """Tiles of keys that are several boxes each, which the lanes share.

    Where the next ``window`` boxes of a walk are is looked up at once, apart from loading, before a stage is waited
    for: a lane keeps the place of every 32nd of them, and tells the others when their tile is loaded.

    What splits leave in memory stays in the L2 cache so until the second launch reads it: 32 x 4k keys of 8 heads at
    head_dim 128 took 143.3 us, of which 11 were writes of 8.5 MB and 5.6 the second launch, and take 134.9.
    """

    reads_once = True

    def __init__(self, boxes: FetchedPages, block, tensor: Tensor, lane):
        self.boxes, self.block, self.lane = boxes, block, lane
        self.tensor, self.steps = tensor, boxes.steps[id(tensor)]
        self.window = max(_WINDOW, boxes.block_n)
        # Of a box, the steps of page and row that it begins at; of the walk, the steps whose boxes these are.
        self.places = T.alloc_local([self.window // _LANES], "int32")
        self.begin, self.end = T.local_scalar("int32"), T.local_scalar("int32")

    @T.inline
    def start(self):
        """Before the first step of a walk."""
        self.end = 0

    @T.inline
    def look_up(self, walk, step):
        """Look up where the tiles from a step on are, unless that is known."""
        if step >= self.end:
            boxes, geometry, block = T.meta_var((self.boxes, self.boxes.geometry, self.block))
            keys = T.meta_var(geometry.keys.of(block.batch))
            rows = T.meta_var(geometry.key_rows(self.tensor, block.batch, block.kv_head, keys))
            for i in T.unroll(self.window // _LANES):
                row: T.int32 = (i * _LANES + self.lane) * boxes.rows  # behind the first row of the step's tile
                tile: T.int32 = T.truncdiv(row, boxes.block_n)
                key: T.int32 = walk.key_first(step + tile) + (row - tile * boxes.block_n)
                self.places[i] = 0
                if T.And(key >= 0, key < block.seqlen_kv):
                    page: T.int32 = boxes.page(key)
                    row_in: T.int32 = key - page * geometry.page_size
                    self.places[i] = rows.entry(page) * self.steps.page + row_in * self.steps.row
            self.begin = step
            self.end = step + T.truncdiv(self.window * boxes.rows, boxes.block_n)

    @T.inline
    def load(self, pipeline, state, descriptor, walk, step):
        """Fill a stage, which is empty, with the tile of a step; what is past the last key is zero."""
        boxes = T.meta_var(self.boxes)
        if self.lane == 0:
            pipeline.expect(state)
        T.cuda.warp_sync()
        first: T.int32 = (step - self.begin) * boxes.of_a_tile
        keys: T.int32 = self.block.seqlen_kv - walk.key_first(step)
        for i in T.unroll(max(boxes.block_n // _LANES, 1)):
            number: T.int32 = i * _LANES + self.lane
            box: T.int32 = first + number
            place: T.int32 = from_lane(self.places[0], T.bitwise_and(box, _LANES - 1))
            for w in T.unroll(1, self.window // _LANES):
                other: T.int32 = from_lane(self.places[w], T.bitwise_and(box, _LANES - 1))
                if box >= w * _LANES:
                    place = other
            row: T.int32 = number * boxes.rows
            if row < boxes.block_n:
                seen: T.int32 = T.min(T.max(keys - row, 0), boxes.rows)
                self.ask(pipeline, state, descriptor, row, place, seen)
