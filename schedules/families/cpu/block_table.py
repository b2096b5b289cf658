"""Which tiles of a mask see nothing, something or everything, where that is known from its elements alone.

A mask that reads a tensor over queries and keys together (one that was given, a tree, a table of pairs of labels) says
nothing of a tile until each score of it was looked at.  One pass at the beginning of a kernel does that, and writes a
number for each tile; whatever computes scores then visits only those in which somebody sees something, and masks only
those in which not everybody sees everything.  A mask is looked at once where it is the same for several heads, batch
entries, queries or keys, which its strides say; and of a tile no more than it takes: the first rows decide most of
those that are seen in part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder

from schedules.definition.parameters import Reader, Site, widened
from schedules.families.cpu.flat import flat
from tvm_flash.packs.manifest import Param

#: What is in a tile, as bits: scores that are seen, scores that aren't; and that positions have told what there is.
SEEN, HIDDEN, TOLD = 1, 2, 4
#: So many rows are looked at of all tiles beside each other before the next ones: with tiles one after another, every
#: one waited for memory, which took 80 ns.
_ROWS = 8
#: Multiplications that take as long as to look at a score, for the decision whether a loop is worth sharing.
_COST = 4


@dataclass(frozen=True)
class Beside(Reader):
    """A tensor whose keys lie beside each other in memory, at one batch entry and head."""

    flat: tirx.Buffer
    first: Expr
    query_stride: Expr | int

    def __call__(self, i: Expr, j: Expr) -> Expr:
        return widened(self.flat[self.first + i * self.query_stride + j])


@dataclass(frozen=True)
class BlockTable:
    """A number for each tile of ``block_m`` queries and ``block_n`` keys of the call ``geometry``.

    ``lanes`` scores are looked at together; ``tiles`` has the numbers.
    """

    geometry: object
    block_m: int
    block_n: int
    lanes: int
    tiles: tirx.Buffer | None = None

    @staticmethod
    def of(geometry, block_m: int, block_n: int, lanes: int) -> BlockTable:
        """With memory for all tiles."""
        empty = BlockTable(geometry, block_m, block_n, lanes)
        batch, heads, rows, columns = empty._extents()
        tiles = T.sblock_alloc_buffer((batch * heads * rows * columns,), "uint8")
        IRBuilder.name("tiles", tiles)
        return replace(empty, tiles=tiles)

    def tile_live(self, site: Site, row: Expr, last_row: Expr, key: Expr, last_key: Expr) -> Expr:
        """Whether some row of the tile that begins with a row and a key sees some key."""
        return T.bitwise_and(self._tile(site, row, key), T.uint8(SEEN)) != T.uint8(0)

    def tile_full(self, site: Site, row: Expr, last_row: Expr, key: Expr, last_key: Expr) -> Expr:
        """Whether every row sees every key, up to the last one that is asked for."""
        hidden = T.bitwise_and(self._tile(site, row, key), T.uint8(HIDDEN))
        return T.And(last_key < self.geometry.seqlen_kv, hidden == T.uint8(0))

    def _tile(self, site: Site, row: Expr, key: Expr) -> Expr:
        batch, heads, rows, columns = self._extents()

        def at(place, extent):
            return T.min(place, extent - 1)  # the one that there is, where all are the same

        of_head = at(site.b, batch) * heads + at(site.h, heads)
        return self.tiles[(of_head * rows + at(row // self.block_m, rows)) * columns + at(key // self.block_n, columns)]

    def fill(self, announce) -> None:
        """Look at the mask; ``announce(items, work)`` tells the thread pool what the loop is."""
        P, M, N, lanes = self.geometry, self.block_m, self.block_n, self.lanes
        batch, heads, rows, columns = self._extents()
        pattern, tiles, beside, is_beside = P.pattern, self.tiles, self._beside, self._is_beside()
        varies_i, varies_j = self._varies("i"), self._varies("j")

        @T.inline
        def look_at_vector(found, site, row, key):
            for lane in T.vectorized(lanes):
                seen = T.meta_var(pattern.mask_inside(site, row, key + lane))
                found[lane] = T.bitwise_or(found[lane], T.Select(seen, T.int32(SEEN), T.int32(HIDDEN)))

        @T.inline
        def look(found, site, first, end, key0, keys):
            """At ``keys`` keys of rows, in vectors where that is possible."""
            for lane in T.vectorized(lanes):
                found[lane] = T.int32(0)
            if T.And(is_beside, T.And(keys == N, end - first == _ROWS)):
                for i in T.unroll(_ROWS):
                    for c in T.unroll(N // lanes):
                        look_at_vector(found, beside(site), first + i, key0 + c * lanes)
            else:
                for i in T.serial(end - first):
                    for j in T.serial(keys):
                        seen = T.meta_var(pattern.mask_inside(site, first + i, key0 + j))
                        found[0] = T.bitwise_or(found[0], T.Select(seen, T.int32(SEEN), T.int32(HIDDEN)))

        @T.inline
        def fill():
            T.evaluate(announce(batch * heads * rows, batch * heads * rows * columns * (M * N * _COST)))
            for w in T.parallel(batch * heads * rows):
                with T.sblock("look"):
                    T.reads()
                    T.writes()
                    found = T.sblock_alloc_buffer((lanes,), "int32", scope="local")
                    site = T.meta_var(P.site(w // rows // heads, w // rows % heads))
                    row0: T.int64 = w % rows * M
                    end: T.int64 = T.Select(varies_i, T.min(row0 + M, P.seqlen_q), row0 + 1)
                    end_key: T.int64 = T.Select(varies_j, P.seqlen_kv, T.int64(1))
                    for n in T.serial(columns):
                        span = T.meta_var((row0, end - 1, n * N, T.min(n * N + N, end_key) - 1))
                        tiles[w * columns + n] = T.Select(
                            pattern.tile_live(site, *span),
                            T.Select(pattern.tile_full(site, *span), T.uint8(SEEN + TOLD), T.uint8(0)),
                            T.uint8(HIDDEN + TOLD),
                        )
                    for step in T.serial((end - row0 + (_ROWS - 1)) // _ROWS):
                        first: T.int64 = row0 + step * _ROWS
                        for n in T.serial(columns):
                            if tiles[w * columns + n] < T.uint8(SEEN + HIDDEN):
                                keys: T.int64 = T.min(n * N + N, end_key) - n * N
                                look(found, site, first, T.min(first + _ROWS, end), n * N, keys)
                                tiles[w * columns + n] = T.bitwise_or(
                                    tiles[w * columns + n], T.cast(any_of(found, lanes), "uint8")
                                )

        fill()

    def _beside(self, site: Site) -> Site:
        """The call where keys lie beside each other."""
        found = {}
        for p in self._tensors("j"):
            buffer = self.geometry.params[p.name]
            strides = dict(zip(p.axes, buffer.ty.strides, strict=True))
            first = sum((x * strides[a] for a, x in (("b", site.b), ("h", site.h)) if a in p.axes), T.int64(0))
            found[p.name] = Beside(flat(buffer), first, strides.get("i", 0))
        return replace(site, params={**site.params, **found})

    def _is_beside(self) -> Expr:
        """Whether keys lie beside each other in all that the mask reads at keys."""
        return tirx.all(T.bool(True), *(self.geometry.params[p.name].ty.strides[-1] == 1 for p in self._tensors("j")))

    def _tensors(self, axis: str) -> list[Param]:
        return [p for p in self.geometry.pattern.of_mask if axis in p.axes]

    def _varies(self, axis: str) -> Expr:
        """Whether the mask may differ along an axis."""
        if self.geometry.pattern.mask_depends_on(axis):
            return T.bool(True)
        strides = [self.geometry.params[p.name].ty.strides[p.axes.index(axis)] for p in self._tensors(axis)]
        return tirx.any(T.bool(False), *(x != 0 for x in strides))

    def _extents(self) -> tuple[Expr, ...]:
        """Batch entries, heads, blocks of queries and of keys that may differ."""
        P = self.geometry
        blocks = [(n + (size - 1)) // size for n, size in ((P.seqlen_q, self.block_m), (P.seqlen_kv, self.block_n))]
        return tuple(
            T.Select(self._varies(axis), n, T.int64(1))
            for axis, n in zip("bhij", (P.batch, P.heads, *blocks), strict=True)
        )


def any_of(buffer, lanes: int) -> Expr:
    """The bits that some lane has."""
    found = buffer[0]
    for lane in range(1, lanes):
        found = T.bitwise_or(found, buffer[lane])
    return found
