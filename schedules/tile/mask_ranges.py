"""What each tile of queries sees where a mask reads ids, or each tile of keys: found by a launch before others.

Of a mask that compares ids of queries with those of keys (documents in a row, a tree's numbers) positions say nothing.
The launch looks at the ids once: it takes the least and the greatest of a tile's own, and asks of each key by itself
whether some query of the tile may see it, and whether every one does (:mod:`schedules.definition.intervals`).  What it
leaves is four numbers for each tile: the first and the end of what is seen, and of the longest of what is seen by all
at either end.  Kernels take their ranges of tiles from these as they do from positions elsewhere, so that of documents
one after another nobody visits a tile between two.

:class:`Ranged` is a pattern as a kernel sees it that has these numbers.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.parameters import Site, append_arguments, parameter_symbols
from schedules.definition.pattern import Pattern, Ranges
from schedules.tile.geometry import Tensor, flat, site, wide
from schedules.tile.parameters import Parameters
from schedules.tile.sequences import Dense
from schedules.tile.softmax import from_lane
from schedules.tile.tile_scheduler import Traversal, ceildiv
from tvm_flash.packs import sizes
from tvm_flash.packs.manifest import Param, Workspace

THREADS, _LANES = 256, 32
#: Blocks on a multiprocessor: with one more ptxas spilled 24 bytes on sm_80.
BLOCKS_PER_SM = 4
#: Names of the numbers by whose tiles they are of, queries or keys.
ROLES = {"i": "ranges_of_queries", "j": "ranges_of_keys"}
_LENGTHS = {"i": "seqlen_q", "j": "seqlen_kv"}
_LARGEST = 2**31 - 1


def _register(value: Expr):
    """A register with a value, as a buffer of one element."""
    register = T.alloc_local([1], "int32")
    T.buffer_store(register, value, [0])
    return register


class Ranged:
    """A pattern with the numbers of tiles of ``block`` queries (``axis`` is ``"i"``) or keys (``"j"``) as one more
    parameter, a table; a kernel may ask for ``most`` of these tiles at once."""

    def __init__(self, pattern: Pattern, axis: str, block: int, most: int = 1):
        self._pattern, self.axis, self.block, self.most = pattern, axis, block, most
        self.role = ROLES[axis]
        self.params = (*pattern.params, Param(self.role, "int32", rank=2))

    def __getattr__(self, name):
        return getattr(self._pattern, name)

    def parameter_symbols(self):
        """As :meth:`Pattern.parameter_symbols`."""
        return parameter_symbols(self.params, self.index_dtype)

    def keys_of_tile(self, at: Site, row_first: Expr, row_last: Expr) -> Ranges:
        """As :meth:`Pattern.keys_of_tile`."""
        if self.axis != "i":
            return self._pattern.keys_of_tile(at, row_first, row_last)
        return self._of(at, row_first, row_last, at.seqlen_q)

    def rows_of_tile(self, at: Site, key_first: Expr, key_last: Expr) -> Ranges:
        """As :meth:`Pattern.rows_of_tile`."""
        if self.axis != "j":
            return self._pattern.rows_of_tile(at, key_first, key_last)
        return self._of(at, key_first, key_last, at.seqlen_kv)

    def _of(self, at: Site, first: Expr, last: Expr, length: Expr) -> Ranges:
        """What some, and what all of the tiles from the one of ``first`` to that of ``last`` see."""
        table, tiles = at.params[self.role], ceildiv(length, self.block)
        head = head_of(self._pattern, at.b, at.h, at.heads) * tiles
        found = None
        for n in range(self.most):
            tile = T.max(T.min(T.truncdiv(first, self.block) + n, T.truncdiv(last, self.block)), 0)
            lo, hi, full_lo, full_hi = (table[head + tile, T.int32(c)] for c in range(4))
            if found is None:
                found = [_register(x) for x in (lo, hi, full_lo, full_hi)]
                continue
            # A tile that sees nothing has no first key either.
            before = found[0][0], found[1][0]
            first_seen = T.Select(before[0] < before[1], T.min(before[0], lo), lo)
            T.buffer_store(found[0], T.Select(lo < hi, first_seen, before[0]), [0])
            T.buffer_store(found[1], T.max(before[1], hi), [0])
            T.buffer_store(found[2], T.max(found[2][0], full_lo), [0])
            T.buffer_store(found[3], T.min(found[3][0], full_hi), [0])
        lo, hi, full_lo, full_hi = (x[0] for x in found)
        # Those seen by all of several tiles may be none, and end before they begin.
        return Ranges((lo, hi), (full_lo, full_hi if self.most == 1 else T.max(full_lo, full_hi)), tuple(found))


def ranged(pattern: Pattern, axis: str, block: int, most: int = 1) -> Pattern | Ranged:
    """The pattern as kernels over such tiles see it: the same, unless its mask reads ids."""
    return Ranged(pattern, axis, block, most) if pattern.atoms else pattern


def head_of(pattern: Pattern, b: Expr, h: Expr, heads: Expr) -> Expr:
    """Number of a head among those that may see something else."""
    by_head = pattern.mask_differs_along("h")
    if not pattern.mask_differs_along("b"):
        return h if by_head else T.int32(0)
    return b * heads + h if by_head else b


def heads_of_mask(known: Pattern) -> list[str]:
    """The sizes whose product is how many heads may see something else."""
    return [name for axis, name in (("b", "batch"), ("h", "heads")) if known.mask_differs_along(axis)]


def workspace(known: Ranged) -> Workspace:
    """Where the numbers are."""
    heads = heads_of_mask(known)
    tiles: sizes.Expression = ("ceildiv", _LENGTHS[known.axis], known.block)
    return Workspace(known.role, "int32", (("*", *heads, tiles) if heads else tiles, 4))


def roles(known: Ranged) -> tuple[str, ...]:
    """Roles of the launch's arguments."""
    return ("q", "k", known.role, *(p.name for p in known.of_mask))


@T.meta_class
class MaskCall:
    """The sizes of a call, and what its mask reads."""

    def __init__(self, pattern: Pattern, traversal: Traversal, handles, parameters: dict):
        names = ("batch", "heads", "kv_heads", "seqlen_q", "seqlen_kv", "head_dim")
        self.batch, self.heads, self.kv_heads, self.seqlen_q, self.seqlen_kv, dim = (
            tirx.Var(name, "int32") for name in names
        )
        queries = {"batch": self.batch, "heads": self.heads, "seq": self.seqlen_q, "dim": dim}
        keys = {"batch": self.batch, "heads": self.kv_heads, "seq": self.seqlen_kv, "dim": dim}
        self.q, self.k = (
            Tensor(handle, name, extents, pattern.dtype, traversal.layout, 16)
            for handle, name, extents in zip(handles, "qk", (queries, keys), strict=True)
        )
        self.queries, self.keys = Dense(self.seqlen_q), Dense(self.seqlen_kv)
        self.softmax_scale = T.float32(1)  # no mask reads it
        self.parameters, self.declared = parameters, {p.name: p for p in pattern.of_mask}


class Extremes:
    """Numbers of one block of threads: the extremes of what its threads have found."""

    def __init__(self, thread: Expr, count: int):
        self.thread, self.count = thread, count
        self.own, self.other = (T.alloc_local([n], "int32") for n in (count, 1))
        self.shared = T.alloc_shared([count * (THREADS // _LANES)], "int32")

    def begin(self, values) -> None:
        """The first numbers become ``values``."""
        for n, value in enumerate(values):
            T.buffer_store(self.own, value, [n])

    def take(self, n: int, op, value: Expr) -> None:
        """Let number ``n`` be that of itself and a value."""
        T.buffer_store(self.own, op(self.own[n], value), [n])

    def join(self, ops) -> None:
        """All threads: the first numbers become those of all threads."""
        warps, lane, warp = THREADS // _LANES, T.truncmod(self.thread, _LANES), T.truncdiv(self.thread, _LANES)
        for n, op in enumerate(ops):
            for step in range(_LANES.bit_length() - 1):
                T.buffer_store(self.other, from_lane(self.own[n], 1 << step), [0])  # all lanes, once
                self.take(n, op, self.other[0])
        T.evaluate(T.cuda.cta_sync())  # what was there was read
        with T.If(lane == 0), T.Then():
            for n in range(len(ops)):
                T.buffer_store(self.shared, self.own[n], [warp * self.count + n])
        T.evaluate(T.cuda.cta_sync())
        for n, op in enumerate(ops):
            for w in range(warps):
                self.take(n, op, self.shared[w * self.count + n])


def kept(value: Expr) -> Expr:
    """A value, evaluated once."""
    return _register(value)[0]


def ranges_within(found: Extremes, begin: Expr, end: Expr, asked) -> tuple[Expr, Expr, Expr, Expr]:
    """All threads of a block: the numbers of a tile, if ``asked(0, x)`` says whether some of it sees ``x``, which is
    one of ``begin .. end`` (exclusive), and ``asked(1, x)`` whether all of it does."""
    thread = found.thread
    # 1. Where each begins and ends.
    found.begin([T.int32(_LARGEST), T.int32(0)] * 2)
    with T.serial(ceildiv(T.max(end - begin, 0), THREADS)) as i:
        x = begin + i * THREADS + thread
        with T.If(x < end), T.Then():
            for n in range(2):
                with T.If(asked(n, x)), T.Then():
                    found.take(2 * n, T.min, x)
                    found.take(2 * n + 1, T.max, x + 1)
    found.join([T.min, T.max] * 2)
    lo, hi, full_lo, full_hi = (kept(found.own[n]) for n in range(4))
    # 2. Between what the first and the last see whole there may be gaps: where the first begins, the last ends.
    found.begin([full_hi, full_lo])
    with T.serial(ceildiv(T.max(full_hi - full_lo, 0), THREADS)) as i:
        x = full_lo + i * THREADS + thread
        with T.If(x < full_hi), T.Then(), T.If(T.Not(asked(1, x))), T.Then():
            found.take(0, T.min, x)
            found.take(1, T.max, x + 1)
    found.join([T.min, T.max])
    left_end, right_begin = (kept(found.own[n]) for n in range(2))
    # 3. Nothing is the range of 0 from the first on.
    is_left = left_end - full_lo >= full_hi - right_begin
    return (
        T.Select(lo < hi, lo, T.int32(0)),
        hi,
        T.Select(full_lo < full_hi, T.Select(is_left, full_lo, right_begin), T.int32(0)),
        T.Select(full_lo < full_hi, T.Select(is_left, left_end, full_hi), T.int32(0)),
    )


def find(known: Ranged, traversal: Traversal, name: str) -> PrimFunc:
    """``(q, k, numbers, *params)``: a block of threads for each tile."""
    pattern, axis, size = known._pattern, known.axis, known.block
    atoms = [a for a in pattern.atoms if a.axis == axis]

    def tile(block, call, thread, numbers):
        """Write the numbers of tile number ``block``; what a kernel's text may call."""
        length = call.seqlen_q if axis == "i" else call.seqlen_kv
        tiles = ceildiv(length, size)
        head, number = kept(T.truncdiv(block, tiles)), kept(T.truncmod(block, tiles))
        by_batch, by_head = (pattern.mask_differs_along(a) for a in "bh")
        b = (kept(T.truncdiv(head, call.heads)) if by_head else head) if by_batch else T.int32(0)
        h = kept(T.truncmod(head, call.heads)) if by_head else T.int32(0)
        at = site(call, Parameters(call, b, h), b, h)
        first = kept(number * size)
        last = kept(T.min(first + size, length) - 1)
        found = Extremes(thread, max(4, 2 * len(atoms)))
        # 1. The least and the greatest of each id of the tile's own queries or keys.
        own = [T.alloc_local([1], "int32") for _ in range(2 * len(atoms))]
        found.begin([T.int32(_LARGEST), T.int32(-_LARGEST - 1)] * len(atoms))
        with T.serial(ceildiv(size, THREADS)) as i:
            x = first + i * THREADS + thread
            with T.If(x <= last), T.Then():
                for n, atom in enumerate(atoms):
                    value = T.Cast("int32", pattern.atom_value(atom, at, x))
                    found.take(2 * n, T.min, value)
                    found.take(2 * n + 1, T.max, value)
        found.join([T.min, T.max] * len(atoms))
        for n, register in enumerate(own):
            T.buffer_store(register, found.own[n], [0])

        def asked(which, x):
            """``tile_live`` or ``tile_full`` of the tile and one key, or query."""

            def bounds(atom):
                if atom.axis == axis:
                    n = next(n for n, a in enumerate(atoms) if a is atom)
                    return own[2 * n][0], own[2 * n + 1][0]
                value = T.Cast("int32", pattern.atom_value(atom, at, x))
                return value, value

            mine, other = (first, last), (x, x)
            return which(at, *(mine + other if axis == "i" else other + mine), bounds)

        # 2. What is seen, and what by all.
        within = pattern.keys_of(at, first, last) if axis == "i" else pattern.rows_of(at, first, last)
        begin, end = (kept(x) for x in within.visible)
        which = (pattern.tile_live, pattern.tile_full)
        results = ranges_within(found, begin, end, lambda n, x: asked(which[n], x))
        # 3. One thread writes.
        with T.If(thread == 0), T.Then():
            for c, value in enumerate(results):
                T.buffer_store(numbers, value, [wide(block) * 4 + c])
        return 0

    places = tirx.Var("places", "int32")

    def make(values):
        @T.prim_func(check_well_formed=False)
        def kernel(q: T.handle, k: T.handle, numbers: T.handle):
            call = MaskCall(pattern, traversal, (q, k), values)
            buffer = T.match_buffer(numbers, (places, 4), "int32", align=4)
            T.device_entry()
            T.attr({"tirx.launch_bounds_min_blocks_per_sm": BLOCKS_PER_SM})
            block = T.cta_id([places])
            thread = T.thread_id([THREADS])
            memory = T.meta_var(flat(buffer))
            T.evaluate(tile(block, call, thread, memory))

        return kernel.with_attr("global_symbol", name)

    arguments, values = parameter_symbols(pattern.of_mask, pattern.index_dtype)
    return append_arguments(make(values), arguments)
