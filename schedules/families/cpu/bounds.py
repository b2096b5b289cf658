"""The least and the greatest of what a mask reads at each query or key, block by block: which tiles see nothing.

A mask that compares ids of a query and of a key (documents, numbers in a tree) tells by those of a block that nobody in
a tile sees anything, or everybody everything (:mod:`schedules.definition.intervals`).  One pass over the ids of each
sequence, at the beginning of a kernel, finds them: as much work as one query has.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder

from schedules.definition.intervals import Atom
from schedules.definition.parameters import Site
from schedules.families.cpu.block_table import BlockTable


@dataclass(frozen=True)
class BlockBounds:
    """Bounds of a pattern's atoms in blocks of ``block_m`` queries and ``block_n`` keys, in the call ``geometry``."""

    geometry: object
    block_m: int
    block_n: int
    buffers: tuple[tuple[Atom, tirx.Buffer, tirx.Buffer], ...]

    @staticmethod
    def of(geometry, block_m: int, block_n: int) -> BlockBounds:
        """With memory for all blocks."""
        empty = BlockBounds(geometry, block_m, block_n, ())
        found = []
        for n, atom in enumerate(geometry.pattern.atoms):
            batch, heads = empty._extents(atom)
            low, high = (
                T.sblock_alloc_buffer((batch * heads * empty._blocks(atom),), str(x.ty.dtype))
                for x in (atom.low, atom.high)
            )
            for name, buffer in (("lows", low), ("highs", high)):
                IRBuilder.name(f"{name}{n}", buffer)
            found.append((atom, low, high))
        return BlockBounds(geometry, block_m, block_n, tuple(found))

    def fill(self, announce) -> None:
        """Look at each query and key once."""
        P = self.geometry
        for atom, low, high in self.buffers:
            batch, heads = self._extents(atom)
            length = P.seqlen_q if atom.axis == "i" else P.seqlen_kv
            size, blocks, dtype = self._size(atom), self._blocks(atom), str(low.dtype)
            T.evaluate(announce(batch * heads * blocks, batch * heads * length))
            with T.parallel(batch * heads * blocks) as w, T.sblock("bounds"):
                T.reads()
                T.writes()
                site, block = P.site(w // blocks // heads, w // blocks % heads), w % blocks
                T.buffer_store(low, tirx.max_value(dtype), [w])
                T.buffer_store(high, tirx.min_value(dtype), [w])
                with T.serial(T.min(T.int64(size), length - block * size)) as x:
                    value = T.cast(P.pattern.atom_value(atom, site, block * size + x), dtype)
                    T.buffer_store(low, T.min(low[w], value), [w])
                    T.buffer_store(high, T.max(high[w], value), [w])

    def tile_live(self, site: Site, row: Expr, last_row: Expr, key: Expr, last_key: Expr) -> Expr:
        """Whether some row of the tile that begins with a block of each may see some key."""
        return self.geometry.pattern.tile_live(site, row, last_row, key, last_key, self._of_tile(site, row, key))

    def tile_full(self, site: Site, row: Expr, last_row: Expr, key: Expr, last_key: Expr) -> Expr:
        """Whether every row of it certainly sees every key."""
        return self.geometry.pattern.tile_full(site, row, last_row, key, last_key, self._of_tile(site, row, key))

    def _of_tile(self, site: Site, row: Expr, column: Expr):
        """What the bounds of an atom are in the blocks that begin with a row and a column."""

        def bounds(atom: Atom):
            _, low, high = next(x for x in self.buffers if x[0] is atom)
            _, heads = self._extents(atom)
            b, h = site.b if atom.by_batch else 0, site.h if atom.by_head else 0
            block = (row if atom.axis == "i" else column) // self._size(atom)
            at = (b * heads + h) * self._blocks(atom) + block
            return low[at], high[at]

        return bounds

    def _extents(self, atom: Atom) -> tuple[Expr, Expr]:
        one = T.int64(1)
        return self.geometry.batch if atom.by_batch else one, self.geometry.heads if atom.by_head else one

    def _size(self, atom: Atom) -> int:
        return self.block_m if atom.axis == "i" else self.block_n

    def _blocks(self, atom: Atom) -> Expr:
        length = self.geometry.seqlen_q if atom.axis == "i" else self.geometry.seqlen_kv
        return (length + (self._size(atom) - 1)) // self._size(atom)


def with_bounds(geometry, block_m: int, block_n: int, lanes: int):
    """The call, with memory for what is to be known of tiles, if anything is beyond their positions."""
    pattern = geometry.pattern
    if pattern.has_unknown:
        return replace(geometry, bounds=BlockTable.of(geometry, block_m, block_n, lanes))
    return replace(geometry, bounds=BlockBounds.of(geometry, block_m, block_n)) if pattern.atoms else geometry


def announce(items: Expr, work: Expr) -> Expr:
    """Tell the thread pool what the next loop is; a small one is not worth sharing."""
    return T.call_extern("void", "tvm_flash_announce", items, work)


def fill_bounds(geometry, announce=announce) -> None:
    """Find out what there is to know, if anything; ``announce`` precedes a loop that threads share."""
    if geometry.bounds is not None:
        geometry.bounds.fill(announce)
