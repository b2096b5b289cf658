"""Tiles of K and V of a cache of 8 bits, one warp's, that follow one another in a ring of places in shared memory.

K(0), V(0), K(1), V(1) and so on take the next place each, and a place is filled with the tile ``places`` further on as
soon as its own has been multiplied.  So with three places a block has one and a half tiles of keys, half of what two
stages of both take, and twice as many warps have room on a multiprocessor, which is what hides how long one of them
waits for its own instructions.

A warp has several splits, one after the other (:class:`Walk`), and its copies never cease from its first split to its
last.

A tile comes in boxes of TMA: a lane asks for a box of keys, where the lanes of all rows would share offsets and copy 16
bytes a time.  Boxes are those of :mod:`schedules.families.sm90.boxes`, of bytes: they never leave a page, and end with
the sequence.  Tiles of pages that have no boxes are copied row by row.
"""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.families.mma.decode import store_partial
from schedules.families.mma.machine import Rows
from schedules.families.mma.registers import fresh
from schedules.families.mma.transposed import TransposedDecodeMachine
from schedules.families.sm90.barriers import PRODUCER_ARRIVALS, transaction_barriers
from schedules.families.sm90.tma import PageSteps, encode_paged, load_box_once, lowest_bit, placed_box
from schedules.tile.dtypes import CHUNK_BYTES, element_type
from schedules.tile.geometry import flat, local
from schedules.tile.key_range import next_visible
from schedules.tile.smem import TILE_ALIGNMENT, SharedTile, panel_columns

#: Rows of the smallest box: those that a swizzle tells apart.
_LEAST_ROWS = 8


class ByteBoxes:
    """Boxes of tiles of ``block_n`` keys; made of host expressions, before ``T.device_entry()``.

    Attributes
    ----------
    rows: of a box, a power of two.
    are_whole: whether pages have boxes that are large enough.
    """

    def __init__(self, geometry, block_n: int):
        self.rows = T.bind(T.max(T.min(lowest_bit(geometry.page_size), block_n), 1))
        self.are_whole = T.bind(self.rows >= _LEAST_ROWS)
        self.steps, self.maps = {}, {}

    def encode(self, descriptor, tensor, columns: int):
        """Make the descriptor of k or v, whose tiles have so many columns, on the host."""
        self.maps[id(tensor)] = descriptor
        steps = self.steps[id(tensor)] = PageSteps(tensor)
        panel = panel_columns(columns, element_type(str(tensor.buffer.dtype)))
        return encode_paged(descriptor, tensor, steps, self.rows, panel)


@T.meta_class
class Queries(Rows):
    """Those of a sequence, which lanes read to registers."""

    def __init__(self, source, tile, threads: int, thread):
        Rows.__init__(self, source, tile, threads)


@T.meta_class
class Walk:
    """The splits of a sequence that a warp has, from ``first`` on ``distance`` apart, of ``tiles`` tiles each and fewer
    than ``splits`` of the sequence; each with ``row_tiles`` tiles of rows, one after the other.

    ``seen`` are the tiles that rows see of the whole sequence, ``positions`` the first and last of these rows.
    ``row_tile``: that which has been come to.
    """

    def __init__(self, seen, positions, tiles, splits, first, distance, row_tiles):
        self.seen, self.positions, self.tiles, self.splits = seen, positions, tiles, splits
        self.first, self.distance, self.row_tiles = first, distance, row_tiles
        self.row_tile = local(T.int32(0))

    def begin(self, split):
        """First tile that is seen of a split."""
        return T.max(self.seen.begin, split * self.tiles)

    def end(self, split):
        """The tile behind the last one."""
        return T.min(self.seen.end, (split + 1) * self.tiles)


@T.meta_class
class Ahead:
    """The tiles that are brought: ``split`` and ``row_tile`` that have come next, and where its tiles ``begin``."""

    def __init__(self):
        self.split, self.row_tile, self.begin = (T.local_scalar("int32") for _ in range(3))


@T.meta_class
class RingMachine(TransposedDecodeMachine):
    """The machine of decoding over a cache of one dtype; ``config.num_stages`` are the places of a warp's ring.

    ``use`` is the place of the tile that is multiplied next, ``phase`` the parity of its turn.  ``scales_of_head`` are
    those of keys and values where a head has the same on all pages: then none come with the tiles.

    A block is a warp.
    """

    of_queries = Queries

    @staticmethod
    def warps_of(config) -> int:
        """Warps of a block."""
        return 1

    def __init__(self, pattern, config, *args, boxes: ByteBoxes, walk: Walk):
        self.boxes, self.walk, self.places = boxes, walk, config.num_stages
        self.all_places = self.places * self.warps_of(config)
        TransposedDecodeMachine.__init__(self, pattern, config, *args)
        self.scales_of_head = T.alloc_local([2], "float32")
        self.phase = T.local_scalar("int32")
        self.ahead = Ahead()

    def place_tiles(self, pool, shapes):
        """K and V begin at the same place; Q has no memory, as it is kept in registers."""
        (_, block_m, columns, element), (_, block_n, *of_keys), (_, _, *of_values) = shapes
        first = -(-pool.offset // TILE_ALIGNMENT) * TILE_ALIGNMENT
        q = SharedTile(pool, 1, block_m, columns, element)
        pool.move_base_to(first)
        k = SharedTile(pool, 1, block_n, *of_keys)
        pool.move_base_to(first)
        v = SharedTile(pool, 1, block_n, *of_values)
        k.stage_bytes = v.stage_bytes = place = place_bytes(block_n, max(of_keys[0], of_values[0]))
        pool.move_base_to(first + self.all_places * place)
        return [q, k, v]

    def place_shared(self, pool):
        """The scales of the rows of each place, and a barrier for it."""
        scales = pool.alloc((self.all_places, self.config.block_n), "float32", align=CHUNK_BYTES)
        self.row_scales = [scales, scales]
        self.full = transaction_barriers(pool, self.all_places)

    # ------------------------------------------------------------ scales

    @property
    def scales_differ(self):
        """Whether pages have scales of their own."""
        of_keys, of_values = self.geometry.scale_strides
        return T.bitwise_or(of_keys[0], of_values[0]) != 0

    @T.inline
    def read_scales(self):
        """Those of the head, if they don't differ."""
        self.scales_of_head[0] = T.float32(0)
        self.scales_of_head[1] = T.float32(0)
        if T.Not(self.scales_differ):
            self.scales_of_head[0] = self.scale_sources[0][self.scale_at(0, 0)]
            self.scales_of_head[1] = self.scale_sources[1][self.scale_at(1, 0)]

    @T.inline
    def load_scale(self, to, i, which, row):
        """The scale of a row of the tile in use to ``to[i]``."""
        to[i] = self.scales_of_head[which]
        if self.scales_differ:
            to[i] = self.row_scales[which][self.use, row]

    @T.inline
    def copy_scales(self, matrix, which, stage, tile_first, live):
        """Start copying the scales of a tile's rows, if they differ: each lane that of the row that it has looked
        up."""
        lane: T.int32 = fresh("tid.x")
        if T.And(self.scales_differ, lane < matrix.tile.rows):
            to: T.uint32 = T.cuda.cvta_generic_to_shared(self.row_scales[which].ptr_to([stage, lane]))
            self.copy_scale(which, T.ptx.addr(to, 0), matrix.own[0], T.And(live, tile_first + lane < matrix.rows))

    # ------------------------------------------------------------ tiles on their way

    @T.inline
    def begin_block(self):
        """All threads of a block: prepare the barriers."""
        if fresh("tid.x") == 0:
            self.full.init(PRODUCER_ARRIVALS)
            T.ptx.fence.mbarrier_init.release.cluster()
        T.cuda.warp_sync()

    @T.inline
    def start(self):
        """Fill the ring."""
        ahead = T.meta_var(self.ahead)
        self.use = 0
        self.phase = 0
        ahead.row_tile = 0
        ahead.split = self.walk.first
        self.enter_split()
        self.look_up()
        self.read_scales()
        place: T.int32 = 0
        while place + 1 < self.places:
            self.bring(0, place)
            self.bring(1, place + 1)
            place = place + 2
        if self.places % 2 == 1:
            self.bring(0, place)

    @T.inline
    def enter_split(self):
        """The rightmost tile is brought next of the first split from ``ahead.split`` on of which anything is seen."""
        ahead, walk = T.meta_var((self.ahead, self.walk))
        self.find_seen()
        self.fetched = -1
        if ahead.split < walk.splits:
            self.fetched = walk.end(ahead.split) - 1

    @T.inline
    def find_seen(self):
        """The first split from ``ahead.split`` on of which anything is seen, if there is one, and where it begins."""
        ahead, walk = T.meta_var((self.ahead, self.walk))
        while T.And(ahead.split < walk.splits, walk.begin(ahead.split) >= walk.end(ahead.split)):
            ahead.split = ahead.split + walk.distance
        ahead.begin = 0
        if ahead.split < walk.splits:
            ahead.begin = walk.begin(ahead.split)

    @T.inline
    def fetch_done(self):
        """Go on to the next tile that is to be brought."""
        ahead, walk = T.meta_var((self.ahead, self.walk))
        next_visible(self.pattern, self.at, ahead, walk.positions, self.config.block_n, self.fetched)
        if self.fetched < ahead.begin:
            ahead.row_tile = ahead.row_tile + 1
            if ahead.row_tile >= walk.row_tiles:
                ahead.row_tile = 0
                ahead.split = ahead.split + walk.distance
            self.enter_split()
        self.look_up()

    @T.inline
    def look_up(self):
        """The pages of the tile that is brought next: in one place, or they would be waited for where branches meet."""
        self.k.move(0, self.fetched * self.config.block_n)

    @T.inline
    def start_rows(self):
        """Begin with a tile of rows of a split."""
        for i in T.unroll(self.m_tiles * self.o_stride):
            self.O[i] = T.float32(0)
        self.softmax.reset()

    @T.inline
    def compute(self, rows, results):
        """Compute the walk's splits, and leave what they have."""
        walk = T.meta_var(self.walk)
        split: T.int32 = walk.first
        while split < walk.splits:
            self.start_rows()
            tile: T.int32 = walk.end(split) - 1
            while tile >= walk.begin(split):
                self.step(tile, True, True)
                next_visible(self.pattern, self.at, walk.seen, walk.positions, self.config.block_n, tile)
            self.finish()
            store_partial(self, rows, self.geometry, flat(results.o), flat(results.lse), results.splits, split)
            walk.row_tile = walk.row_tile + 1
            if walk.row_tile >= walk.row_tiles:
                walk.row_tile = 0
                split = split + walk.distance
            if walk.row_tiles > 1:
                self.read_rows(rows)

    @T.inline
    def read_rows(self, rows):
        """Queries of a tile of rows."""
        self.softmax.place(rows, self.row0)
        self.keep_q()

    @T.inline
    def bring(self, which, place):
        """Start bringing the next tile of K (0) or of V (1), if there is one; V is the later one."""
        self.bring_tile(which, place)
        if which == 1:
            self.fetch_done()

    @T.inline
    def bring_tile(self, which, place):
        """Start bringing the next tile, if there is one."""
        matrix = T.meta_var((self.k, self.v)[which])
        first: T.int32 = self.fetched * self.config.block_n
        if self.fetched >= self.ahead.begin:
            if self.boxes.are_whole:
                self.load_tile(matrix, place, first)
                self.copy_scales(matrix, which, place, first, True)
            else:
                if fresh("tid.x") == 0:
                    self.full.arrive(place)
                self.copy(matrix, place, first, True, True)
        T.ptx.cp.async_.commit_group()

    @T.inline
    def load_tile(self, matrix, place, first):
        """Start bringing the boxes of a tile: the lane that has looked up a box's first row asks for it."""
        tile, steps = T.meta_var((matrix.tile, self.boxes.steps[id(matrix.source.tensor)]))
        descriptor = T.meta_var(self.boxes.maps[id(matrix.source.tensor)])
        lane: T.int32 = fresh("tid.x")
        if lane == 0:
            T.ptx.mbarrier.arrive.expect_tx.shared.b64(
                self.full.ptr_to([place]), T.uint32(tile.panels * tile.panel_bytes)
            )
        T.cuda.warp_sync()
        if T.And(lane < self.config.block_n, T.bitwise_and(lane, self.boxes.rows - 1) == 0):
            seen: T.int32 = T.min(T.max(matrix.rows - (first + lane), 0), self.boxes.rows)
            where: T.int32 = matrix.own[0] * steps.page + matrix.own_row[0] * steps.row
            to: T.uint32 = T.cuda.cvta_generic_to_shared(tile.buffer.ptr_to([0, 0, 0, 0])) + T.Cast(
                "uint32", place * tile.stage_bytes + lane * tile.row_bytes
            )
            for p in T.unroll(tile.panels):
                load_box_once(
                    to + T.uint32(p * tile.panel_bytes),
                    descriptor,
                    (T.int32(p * tile.panel), *placed_box(steps, where, seen, matrix.source.head)),
                    self.full.ptr_to([place]),
                )

    @T.inline
    def await_tile(self):
        """Wait for the tile in use, and the scales of its rows."""
        T.ptx.cp.async_.wait_group(self.places - 1)
        self.full.wait(self.use, self.phase)
        T.cuda.warp_sync()

    @T.inline
    def replace_tile(self, which):
        """The tile in use, of K (0) or of V (1), has been multiplied: start bringing another, and go to the next."""
        T.cuda.warp_sync()
        self.bring((which + self.places) % 2, self.use)
        self.phase = T.Select(self.use == self.places - 1, 1 - self.phase, self.phase)
        self.use = T.Select(self.use == self.places - 1, 0, self.use + 1)

    @T.inline
    def step(self, tile, masked, tracked):
        """One tile of keys."""
        self.await_tile()
        self.scores()
        self.replace_tile(0)
        self.score_tile(tile, masked, tracked)
        self.await_tile()
        self.softmax_pv(tracked)
        self.replace_tile(1)


def place_bytes(block_n: int, columns: int) -> int:
    """Bytes of a place of the ring, of tiles of ``block_n`` keys with so many columns at most."""
    return -(-block_n * columns // TILE_ALIGNMENT) * TILE_ALIGNMENT
