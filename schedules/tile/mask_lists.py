"""Which tiles each tile of queries sees where a row's keys aren't one interval, or each tile of keys: a launch lists
them before others.

A launch asks of each pair of tiles whether somebody sees something, and whether everybody sees everything.  Positions
tell most of it (:mod:`schedules.definition.intervals`); what they leave open, a warp looks at score by score, until it
has found one that is seen and one that is hidden, and so never at all of a tile that is seen in part.  What the launch
leaves is a row of a table for each tile of the kernel's own, so that the kernel visits what is seen, one tile after
another, and masks only what is seen in part.

The table is made anew at each call: it holds for the tensors' present values, and nobody would tell of a change.

:class:`Listed` is a pattern as a kernel sees it that has the table.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.parameters import Site, append_arguments, parameter_symbols
from schedules.definition.pattern import Pattern
from schedules.tile.geometry import flat, local, site, wide
from schedules.tile.mask_ranges import MaskCall, head_of, heads_of_mask
from schedules.tile.parameters import Parameters
from schedules.tile.quotients import with_quotients_called
from schedules.tile.static import static
from schedules.tile.tile_scheduler import Traversal, ceildiv
from tvm_flash.packs import sizes
from tvm_flash.packs.manifest import Param, Workspace

THREADS, _LANES = 256, 32
_WARPS = THREADS // _LANES
#: How a row lists tiles: those that need a mask before the others, each kind from the last tile to the first; or of
#: each tile the next one to the left, or to the right, that something is seen of.
PARTS, LEFTWARDS, RIGHTWARDS = "parts", "leftwards", "rightwards"
#: Names of the tables by whose tiles have a row in them, queries or keys.
ROLES = {"i": "tiles_of_queries", "j": "tiles_of_keys"}
_LENGTHS = {"i": "seqlen_q", "j": "seqlen_kv"}
#: What is in a tile: nothing that is seen, something, or nothing that is hidden; or it has to be looked at.
_NOTHING, _SOME, _ALL, _OPEN = range(4)
#: Numbers of a row before those of tiles.
_HEAD = 2


@T.meta_class
class Visits:
    """The tiles that one tile of queries, or of keys, visits: ``steps`` in all, of which the first ``masked`` need a
    mask.  Of a tile of queries there always is one, which hides all of it if nothing is seen."""

    def __init__(self, table, row: Expr, width: Expr):
        self._table, self._row, self._width = table, local(row), width
        self.masked, self.steps = (local(table[self._row, T.int32(n)]) for n in range(_HEAD))

    def tile(self, step: Expr) -> Expr:
        """Number of the tile of a step."""
        # those that need no mask are listed from the end of the row on
        place = T.Select(step < self.masked, step + _HEAD, self._width - 1 - (step - self.masked))
        return local(self._table[self._row, place]).source[0]


class Listed:
    """A pattern with the table of tiles of ``own`` queries (``axis`` is ``"i"``) or keys (``"j"``), and of ``others``
    of the other axis, as one more parameter."""

    lists_tiles = True

    def __init__(self, pattern: Pattern, axis: str, own: int, others: int, order: str):
        self._pattern, self.axis, self.own, self.others, self.order = pattern, axis, own, others, order
        self.role = ROLES[axis]
        self.params = (*pattern.params, Param(self.role, "int32", rank=2))
        self.has_gaps = order != PARTS  # else a kernel has nothing to ask

    def __getattr__(self, name):
        return getattr(self._pattern, name)

    def parameter_symbols(self):
        """As :meth:`Pattern.parameter_symbols`."""
        return parameter_symbols(self.params, self.index_dtype)

    def visits(self, at: Site, first: Expr) -> Visits:
        """The tiles that the one of query, or key, ``first`` visits, listed in parts."""
        return Visits(at.params[self.role], self._row(at, first), self.count(at) + _HEAD)

    def first_tile(self, at: Site, first: Expr) -> Expr:
        """The tile that a walk begins with; it ends with −1 leftwards, with how many there are rightwards."""
        return at.params[self.role][self._row(at, first), T.int32(0)]

    def next_tile(self, at: Site, first: Expr, tile: Expr) -> Expr:
        """The tile after ``tile``, which may be the end; of the end that itself."""
        end = T.int32(-1) if self.order == LEFTWARDS else self.count(at)
        here = T.max(T.min(tile, self.count(at) - 1), 0)
        return T.Select(here == tile, T.shift_right(self._entry(at, first, here), 1), end)

    def is_whole(self, at: Site, first: Expr, tile: Expr) -> Expr:
        """Whether a tile of the walk needs no mask."""
        return T.bitwise_and(self._entry(at, first, tile), 1) != 0

    def count(self, at: Site) -> Expr:
        """How many tiles there are that a walk may visit."""
        return ceildiv(at.seqlen_kv if self.axis == "i" else at.seqlen_q, self.others)

    def _entry(self, at: Site, first: Expr, tile: Expr) -> Expr:
        return at.params[self.role][self._row(at, first), tile + 1]

    def _row(self, at: Site, first: Expr) -> Expr:
        length = at.seqlen_q if self.axis == "i" else at.seqlen_kv
        return head_of(self._pattern, at.b, at.h, at.heads) * ceildiv(length, self.own) + T.truncdiv(first, self.own)


def workspace(known: Listed) -> Workspace:
    """Where the table is."""
    own, others = (_LENGTHS[known.axis], _LENGTHS["ji"["ij".index(known.axis)]])
    tiles: sizes.Expression = ("ceildiv", own, known.own)
    heads = heads_of_mask(known)
    rows = ("*", *heads, tiles) if heads else tiles
    return Workspace(known.role, "int32", (rows, ("+", ("ceildiv", others, known.others), _HEAD)))


def roles(known: Listed) -> tuple[str, ...]:
    """Roles of the launch's arguments."""
    return ("q", "k", known.role, *(p.name for p in known.of_mask))


def ballot(condition: Expr) -> Expr:
    """A bit for each lane of a whole warp."""
    return T.cuda.ballot_sync(T.uint32(0xFFFFFFFF), T.Cast("int32", condition))


def any_lane(condition: Expr) -> Expr:
    """1 if a condition holds in some lane of a whole warp, else 0."""
    return T.Cast("int32", T.cuda.any_sync(T.uint32(0xFFFFFFFF), T.Cast("int32", condition)) != 0)


@T.meta_class
class _Row:
    """What one block of threads does: a row of the table, by tiles of the other axis, a chunk of ``THREADS`` at a time.

    Tiles are taken in the order of :meth:`tile`; ``state`` has what is known of each of the chunk.
    """

    def __init__(self, known: Listed, call: MaskCall, block: Expr, thread: Expr, table):
        pattern, axis = known._pattern, known.axis
        self.pattern, self.axis, self.known, self.table, self.thread = pattern, axis, known, table, thread
        self.lane, self.warp = T.truncmod(thread, _LANES), T.truncdiv(thread, _LANES)
        lengths = (call.seqlen_q, call.seqlen_kv)
        length, self.other_length = lengths if axis == "i" else lengths[::-1]
        self.tiles = ceildiv(self.other_length, known.others)
        own_tiles = ceildiv(length, known.own)
        head = self.head = local(T.truncdiv(block, own_tiles))
        by_batch, by_head = (pattern.mask_differs_along(a) for a in "bh")
        self.b = local(T.truncdiv(head, call.heads) if by_head else head) if by_batch else T.int32(0)
        self.h = local(T.truncmod(head, call.heads)) if by_head else T.int32(0)
        self.parameters = Parameters(call, self.b, self.h)
        self.at = site(call, self.parameters, self.b, self.h)
        self.first = local((block - head * own_tiles) * known.own)
        self.last = local(T.min(self.first + known.own, length) - 1)
        self.row = wide(block) * wide(self.tiles + _HEAD)
        self.state = T.alloc_shared([THREADS], "int32")
        self.words = T.alloc_shared([2 * _WARPS], "uint32")  # by kind and warp: which tiles of the chunk are of it
        self.found = T.alloc_local([2], "int32")  # how many of each kind so far; or the last one that is seen
        self.seen = T.alloc_local([2], "int32")  # whether a score is seen, and one is hidden

    def tile(self, n):
        """The tile that is taken after ``n`` others."""
        return n if self.known.order == LEFTWARDS else self.tiles - 1 - n

    def corners(self, tile):
        """First and last query, first and last key of a tile of the other axis that exists."""
        first = tile * self.known.others
        others = first, T.min(first + self.known.others, self.other_length) - 1
        own = self.first, self.last
        return (*own, *others) if self.axis == "i" else (*others, *own)

    def goes_beyond(self, tile):
        """Whether a tile needs a mask for keys that there aren't."""
        end = tile * self.known.others + self.known.others
        return end > self.other_length if self.axis == "i" else T.bool(False)

    def told(self, tile):
        """What positions say of a tile."""
        corners = self.corners(tile)
        full = T.And(self.pattern.tile_full(self.at, *corners), T.Not(self.goes_beyond(tile)))
        undecided = T.int32(_OPEN if self.pattern.is_opaque else _SOME)
        live = self.pattern.tile_live(self.at, *corners)
        full, live = with_quotients_called(full), with_quotients_called(live)
        return T.Select(live, T.Select(full, T.int32(_ALL), undecided), T.int32(_NOTHING))

    @T.inline
    def look(self, n, tile):
        """A warp: look at the scores of a tile, number ``n`` of the chunk, and keep what was found."""
        row, last_row, key, last_key = T.meta_var(self.corners(tile))
        steps: T.int32 = T.truncdiv(last_key - key + _LANES, _LANES)
        total: T.int32 = (last_row - row + 1) * steps
        self.seen[0] = 0
        self.seen[1] = T.Cast("int32", self.goes_beyond(tile))
        i: T.int32 = 0
        while i < total:
            j: T.int32 = key + (i - T.truncdiv(i, steps) * steps) * _LANES + self.lane
            exists: T.bool = j <= last_key
            at = T.meta_var((row + T.truncdiv(i, steps), T.min(j, last_key)))
            sees: T.bool = T.And(exists, self.pattern.mask_inside(self.at, *at))
            self.seen[0] = T.bitwise_or(self.seen[0], any_lane(sees))
            self.seen[1] = T.bitwise_or(self.seen[1], any_lane(T.And(exists, T.Not(sees))))
            i = T.Select(T.And(self.seen[0] != 0, self.seen[1] != 0), total, i + 1)
        if self.lane == 0:
            self.state[n] = T.Select(
                self.seen[0] == 0, T.int32(_NOTHING), T.Select(self.seen[1] == 0, T.int32(_ALL), T.int32(_SOME))
            )

    @T.inline
    def write(self):
        """All threads: make the row."""
        is_list = T.meta_var(self.known.order == PARTS)
        self.found[0] = T.int32(0) if is_list else self.tile(T.int32(-1))
        self.found[1] = 0
        for c in T.serial(ceildiv(self.tiles, THREADS)):
            first: T.int32 = c * THREADS
            # 1. What positions say, a tile a thread.
            self.state[self.thread] = _NOTHING
            if first + self.thread < self.tiles:
                self.state[self.thread] = self.told(self.tile(first + self.thread))
            T.cuda.cta_sync()
            # 2. What they don't, a tile a warp.
            if self.pattern.is_opaque:
                for k in T.serial(THREADS // _WARPS):
                    n: T.int32 = k * _WARPS + self.warp
                    if self.state[n] == _OPEN:
                        self.look(n, self.tile(first + n))
                T.cuda.cta_sync()
            # 3. What the row has of them.
            state: T.int32 = self.state[self.thread]
            if static(is_list):
                self.list_tiles(first + self.thread, state)
            else:
                self.link_tiles(first, state)
            T.cuda.cta_sync()  # before anything in shared memory is written anew
        if self.thread == 0:
            self.table[self.row] = self.found[0]
            if static(is_list):
                self.table[self.row + 1] = self.found[0] + self.found[1]

    @T.inline
    def share(self, kind, condition):
        """Tell all threads of which tiles of the chunk, one a thread, a condition holds."""
        word: T.uint32 = ballot(condition)
        if self.lane == 0:
            self.words[kind * _WARPS + self.warp] = word

    @T.inline
    def list_tiles(self, n, state):
        """Tile number ``n``, which is the thread's own: those that need a mask from the row's beginning on, the others
        from its end."""
        tile: T.int32 = self.tile(n)
        if self.axis == "i":
            # If nothing was seen before the last tile, the first one of all is listed, and hides all of itself.
            some: T.int32 = T.cuda.syncthreads_or(T.Cast("int32", state != _NOTHING))
            if T.And(T.And(tile == 0, some == 0), self.found[0] + self.found[1] == 0):
                state = _SOME
        for kind in T.unroll(2):
            self.share(kind, state == _SOME + kind)
        T.cuda.cta_sync()
        before = T.meta_var(T.shift_left(T.uint32(1), T.Cast("uint32", self.lane)) - T.uint32(1))
        for kind in T.unroll(2):
            own: T.uint32 = T.bitwise_and(self.words[kind * _WARPS + self.warp], before)
            place: T.int32 = self.found[kind] + T.Cast("int32", T.popcount(own))
            for w in T.unroll(_WARPS):
                count: T.int32 = T.Cast("int32", T.popcount(self.words[kind * _WARPS + w]))
                self.found[kind] = self.found[kind] + count
                place = place + T.Select(w < self.warp, count, 0)
            if state == _SOME + kind:
                at = T.meta_var(place + _HEAD if kind == 0 else self.tiles + (_HEAD - 1) - place)
                self.table[self.row + wide(at)] = tile

    @T.inline
    def link_tiles(self, first, state):
        """The thread's own tile of the chunk that begins with number ``first``: which one was seen before it."""
        self.share(0, state != _NOTHING)
        T.cuda.cta_sync()
        before = T.meta_var(T.shift_left(T.uint32(1), T.Cast("uint32", self.lane)) - T.uint32(1))
        nearest: T.int32 = self.found[0]
        for w in T.unroll(_WARPS):
            word: T.uint32 = self.words[w]
            last = T.meta_var(self.tile(first + (w + 1) * _LANES - 1 - T.Cast("int32", T.clz(word))))
            if word != T.uint32(0):
                self.found[0] = last
            if w < self.warp:
                nearest = self.found[0]
            if w == self.warp:
                word = T.bitwise_and(word, before)
                if word != T.uint32(0):
                    nearest = last
        if state != _NOTHING:
            tile: T.int32 = self.tile(first + self.thread)
            self.table[self.row + wide(tile + 1)] = nearest * 2 + T.Cast("int32", state == _ALL)


def find(known: Listed, traversal: Traversal, name: str) -> PrimFunc:
    """``(q, k, table, *params)``: a block of threads for each row."""
    pattern = known._pattern
    rows, width = tirx.Var("rows", "int32"), tirx.Var("width", "int32")

    def make(values):
        @T.prim_func(check_well_formed=False)
        def kernel(q: T.handle, k: T.handle, table: T.handle):
            call = MaskCall(pattern, traversal, (q, k), values)
            buffer = T.match_buffer(table, (rows, width), "int32", align=4)
            T.device_entry()
            block = T.cta_id([rows])
            thread = T.thread_id([THREADS])
            memory = T.meta_var(flat(buffer))
            row = _Row(known, call, block, thread, memory)
            row.write()

        return kernel.with_attr("global_symbol", name)

    arguments, values = parameter_symbols(pattern.of_mask, pattern.index_dtype)
    return append_arguments(make(values), arguments)
