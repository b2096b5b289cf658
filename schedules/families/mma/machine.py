"""One block's work on any mma.sync machine: where its threads copy from and to, its registers, the order of a step.

What differs is mixed in: ``LdmatrixProducts`` (Turing and later) or Volta's products, asynchronous or staged copies.
A machine brings ``place_operands()``, ``scores()``, ``probabilities(k, scale)``, ``accumulate(k)`` and ``pack_pair(to,
i, low, high)``; the kernel calls its ``start()``, ``step(tile, masked, tracked)`` and ``finish()``.
"""

from __future__ import annotations

import dataclasses

from tvm.backend.cuda.lang import SMEMPool
from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.mma.registers import fresh
from schedules.tile.dtypes import tensor_types
from schedules.tile.fragment import Fragment
from schedules.tile.geometry import Geometry, flat, local
from schedules.tile.key_range import KeyTiles, next_visible
from schedules.tile.key_source import ContiguousRows, PagedRows
from schedules.tile.smem import TILE_ALIGNMENT, SharedTile
from schedules.tile.softmax import OnlineSoftmax
from schedules.tile.tile_scheduler import WorkTile


def pieces(tile: SharedTile, threads: int) -> int:
    """How many times 16 bytes one thread copies of a tile at most."""
    return -(-tile.rows // (threads // tile.panel_chunks)) * tile.panels


@T.meta_class
class Rows:
    """One head's rows of a tensor in global memory, the shared tile that they are copied to, and a thread's part.

    A thread copies 16 bytes of every ``step``-th row of each panel, from shared address ``to`` on in stage 0.  Where it
    begins is computed anew for each tile.
    """

    def __init__(self, source: ContiguousRows, tile: SharedTile, threads: int):
        self.source, self.memory, self.tile = source, flat(source.tensor.buffer), tile
        self.rows = source.sequence.length
        self.step = threads // tile.panel_chunks
        self.dim = source.tensor.sizes["dim"]
        self.to = tile.address(self.row(), self.column() // tile.chunk)

    @property
    def passes(self) -> int:
        """How many rows of a panel one thread copies at most."""
        return -(-self.tile.rows // self.step)

    def row(self):
        """First row of this thread."""
        return fresh("tid.x") // self.tile.panel_chunks

    def column(self):
        """First column of this thread."""
        return fresh("tid.x") % self.tile.panel_chunks * self.tile.chunk

    def start(self, first):
        """Offset of this thread's first element in the tile whose first row is ``first``."""
        return self.source.offset(first + self.row(), self.column())

    def place(self, start, first, i):
        """Offset of the first panel's element in this thread's ``i``-th row, from ``start`` of the tile."""
        return self.source.moved(start, first + self.row(), i * self.step)

    @T.inline
    def find(self, first):
        """Find out where this thread's rows are of the tile whose first row is ``first``, if that takes a look."""


@T.meta_class
class Matrix(Rows):
    """Rows whose tiles follow one another: ``cursor`` is the offset of a thread's first element in the tile that is
    next.

    Cursors are registers, or in a shared buffer with an element for each thread.
    """

    def __init__(self, source: ContiguousRows, tile: SharedTile, threads: int, thread, cursors=None):
        Rows.__init__(self, source, tile, threads)
        row, chunk = thread // tile.panel_chunks, thread % tile.panel_chunks
        self.cursors = cursors if cursors is not None else T.alloc_local([1], "int64")
        self.own = (lambda: fresh("tid.x")) if cursors is not None else (lambda: 0)
        T.buffer_store(self.cursors, source.offset(row, chunk * tile.chunk), [self.own()])
        if cursors is None:
            self.to = local(tile.address(row, chunk))

    @property
    def cursor(self):
        """Offset of this thread's first element in the tile that is next."""
        return self.cursors[self.own()]

    def start(self, first):
        return self.cursor

    @T.inline
    def move(self, first, distance):
        """Let the cursor go from the tile whose first row is ``first`` to the one ``distance`` rows further down."""
        self.cursors[self.own()] = self.source.moved(self.cursor, first + self.row(), distance)


@T.meta_class
class PagedMatrix(Rows):
    """The same on pages: a thread looks up the page of each of its rows.

    ``beside``: another tensor's, which looks up the same keys first.  ``ahead``: a tile's pages are looked up as soon
    as it is known which one is next, and not when it is copied.
    """

    def __init__(self, source: PagedRows, tile: SharedTile, threads: int, thread, beside=None, ahead: bool = False):
        Rows.__init__(self, source, tile, threads)
        self.to = local(tile.address(thread // tile.panel_chunks, thread % tile.panel_chunks))
        self.ahead = ahead
        self.looks = beside is None or beside.step != self.step
        if self.looks:
            self.pages, self.rows_of_pages = (T.alloc_local([self.passes], "int32") for _ in range(2))
        else:
            self.pages, self.rows_of_pages = beside.pages, beside.rows_of_pages

    def start(self, first):
        return T.Cast("int64", self.column())

    def place(self, start, first, i):
        return start + self.source.offset(self.pages[i], self.rows_of_pages[i], 0)

    @T.inline
    def look_up(self, first):
        """The pages of this thread's rows of a tile; a row that doesn't exist has no page, and none is read for it."""
        for i in T.unroll(self.passes):
            key: T.int32 = first + self.row() + i * self.step
            at = T.meta_var(self.source.split(T.max(key, 0)))
            self.rows_of_pages[i] = at[1]
            self.pages[i] = 0
            if T.And(key >= 0, key < self.rows):
                self.pages[i] = self.source.entry(at[0])

    @T.inline
    def find(self, first):
        if self.looks and not self.ahead:
            self.look_up(first)

    @T.inline
    def move(self, first, distance):
        """The tile that is next is ``distance`` rows further down than the one whose first row is ``first``."""
        if self.looks and self.ahead:
            self.look_up(first + distance)


class RowCopies:
    """Mixed into a machine: what a thread copies of a tile."""

    @T.inline
    def each_row(self, matrix, stage, tile_first, live, ragged, body):
        """``body(n, memory, shared, inside)`` for all that this thread copies of a tile.

        ``n`` counts; ``memory`` is the global element, ``shared`` the operand for shared memory; ``inside`` tells
        whether the element exists: where it doesn't, zeros are to be filled in.  ``tile_first`` is the tile's first
        row; ``live`` says whether there is such a tile at all, ``ragged`` whether it may go beyond the last row.
        """
        tile = T.meta_var(matrix.tile)
        start: T.int64 = matrix.start(tile_first)
        to: T.uint32 = matrix.to + T.Cast("uint32", stage * tile.stage_bytes)
        column: T.int32 = matrix.column()
        first: T.int32 = matrix.row() + (tile_first if ragged else 0)
        for i in T.unroll(matrix.passes):
            for p in T.unroll(tile.panels):
                row = T.meta_var(matrix.place(start, tile_first, i))
                memory = T.meta_var(row + T.int64(p * tile.panel))
                shared = T.meta_var(tile.below(to, i, matrix.step, p))
                in_row = T.meta_var(T.And(live, column + p * tile.panel < matrix.dim))
                inside = T.meta_var(T.And(in_row, first + i * matrix.step < matrix.rows) if ragged else in_row)
                if tile.rows % matrix.step == 0:
                    body(i * tile.panels + p, memory, shared, inside)
                else:
                    if matrix.row() + i * matrix.step < tile.rows:
                        body(i * tile.panels + p, memory, shared, inside)


@T.meta_class
class BlockMachine(RowCopies):
    """Shared tiles, copy cursors, registers and softmax state of one block.

    ``rows`` are its first and last row, ``sources`` where q, k and v are, ``thread`` an index in it.  ``pool`` is its
    shared memory if somebody has taken of it already; the tiles begin at ``first_byte``.
    ``parts`` warps share the rows of ``m_tiles`` m-tiles: each computes the scores of its part of the keys, and the
    output of its part of the columns.  A warp's m-tiles are ``tile_step`` rows apart.  ``cursors_in_shared`` keeps
    where threads copy from in shared memory, 16 bytes a thread, where it costs no registers.
    """

    softmax_type = OnlineSoftmax
    #: The queries, as threads copy them.
    of_queries = Matrix
    #: Rows on pages as threads copy them.
    on_pages = PagedMatrix
    #: Whether the pages of keys are looked up a tile ahead; that takes more than one stage.
    looks_ahead = False

    def __init__(
        self,
        pattern: Pattern,
        config,
        geometry: Geometry,
        at,
        rows,
        tiles: KeyTiles,
        sources,
        block: WorkTile,
        thread,
        pool: SMEMPool | None = None,
        *,
        fragment: Fragment,
        num_stages: int,
        parts: int = 1,
        cursors_in_shared: bool = False,
    ):
        D, E, M, N = pattern.head_dim, pattern.head_dim_v, config.block_m, config.block_n
        self.pattern, self.config, self.geometry, self.at = pattern, config, geometry, at
        self.rows, self.tiles, self.fragment = rows, tiles, fragment
        self.head_dim, self.head_dim_v, self.stages, self.parts = D, E, num_stages, parts
        self.threads = 32 * config.num_warps
        self.tile_step = fragment.tile_rows * (config.num_warps // parts)
        self.m_tiles = M // self.tile_step
        pool = pool or SMEMPool()
        self.first_byte = -(-pool.offset // TILE_ALIGNMENT) * TILE_ALIGNMENT
        types = self.types = tensor_types(pattern)
        of_keys, of_values = self.cache_types()
        tiles_of = self.place_tiles(
            pool, ((1, M, D, types.q), (num_stages, N, D, of_keys), (num_stages, N, E, of_values))
        )
        self.place_shared(pool)
        self.k_cursors, self.v_cursors = (
            pool.alloc((self.threads,), "int64") if cursors_in_shared else None for _ in range(2)
        )
        pool.commit()
        if isinstance(sources[1], PagedRows):
            self.q = self.of_queries(sources[0], tiles_of[0], self.threads, thread)
            self.k = self.on_pages(sources[1], tiles_of[1], self.threads, thread, None, self.looks_ahead)
            self.v = self.on_pages(sources[2], tiles_of[2], self.threads, thread, self.k, self.looks_ahead)
        else:
            self.q, self.k, self.v = (
                Matrix(source, tile, self.threads, thread, buffer)
                for source, tile, buffer in zip(sources, tiles_of, (None, self.k_cursors, self.v_cursors), strict=True)
            )
        self.s_stride, self.o_stride = fragment.registers(N // parts), fragment.registers(E // parts)
        self.S = T.alloc_local([self.m_tiles * self.s_stride], "float32")
        self.O = T.alloc_local([self.m_tiles * self.o_stride], "float32")
        self.softmax = self.softmax_type(pattern, at, fragment, self.m_tiles, N // parts, self.tile_step)
        self.place_block(block, thread)
        # the tile that is copied next, and the buffer in use
        self.fetched, self.use = (local(T.int32(0)) for _ in range(2))
        # what products read
        self.k_tile, self.v_tile = self.k.tile, self.v.tile
        self.place_operands()

    def cache_types(self):
        """Element types of the tiles that keys and values are copied to."""
        return self.types.k, self.types.v

    def place_tiles(self, pool, shapes):
        """The tiles of Q, K and V, in that order; ``shapes`` are their stages, rows, columns and element types."""
        return [SharedTile(pool, *shape) for shape in shapes]

    def place_shared(self, pool):
        """Shared memory beside the tiles."""

    def place_block(self, block: WorkTile, thread):
        """Set head, rows and lane from work tile and thread."""
        self.at = self.softmax.at = dataclasses.replace(self.at, b=block.batch, h=block.head)
        self.row_first = block.m_block * self.config.block_m
        self.lane, self.part, self.warp_row = self.place_of(thread)
        self.row0, self.column0 = self.position_of(thread)

    def place_of(self, thread):
        """Lane, part, and first row of the warp of a thread."""
        warp = thread // 32
        part = warp % self.parts if self.parts > 1 else 0
        return thread % 32, part, warp // self.parts * self.fragment.tile_rows

    def position_of(self, thread):
        """Row and column of a thread's first score in the first tile of keys."""
        lane, part, warp_row = self.place_of(thread)
        column = self.fragment.column(lane) + part * (self.config.block_n // self.parts)
        return self.row_first + warp_row + self.fragment.row(lane), column

    def output_column(self, group):
        """First output column of a register group, counted from the first of this lane's."""
        return self.fragment.output_column(group)

    @T.inline
    def wait_for_copies(self):
        """Wait for this thread's copies that no step has waited for."""

    @T.inline
    def sync_sharing_warps(self):
        """The warps that share rows wait for each other."""
        T.cuda.warp_sync()

    @T.inline
    def softmax_pv(self, tracked, first=0):
        """S to P, and O += P V, 16 keys at a time: the next exponentials run between these products."""
        if tracked:
            self.softmax.track(self.S, first=first)
            if self.softmax.grown != 0:
                self.softmax.rescale(self.O, self.o_stride, first)
        scale = T.meta_var(self.softmax.scale if tracked else self.softmax.signed_scale())
        for k in T.unroll(self.config.block_n // 16):
            self.probabilities(k, scale, first)
            self.accumulate(k, first)

    @T.inline
    def score_tile(self, tile, masked, tracked, first=0):
        """Raw products to scores of the tile, masked if need be; references only matter if ``tracked``."""
        thread: T.int32 = fresh("tid.x")
        place = T.meta_var(self.position_of(thread))
        if tracked:
            self.softmax.scores(self.S, place[0], tile * self.config.block_n + place[1], masked, first)
        else:
            self.softmax.modify(self.S, place[0], tile * self.config.block_n + place[1], masked, first)

    def is_fully_masked(self, tile):
        """Whether a warp's first m-tile sees nothing of a tile, though others of the block do."""
        _, _, warp_row = self.place_of(fresh("tid.x"))
        row = self.row_first + warp_row
        _, end = self.pattern.keys_of(self.at, row, row + (self.fragment.tile_rows - 1)).visible
        return end <= tile * self.config.block_n

    @T.inline
    def from_first_visible(self, tile, masked, body):
        """``body(first)`` from the first m-tile on, or from the last if a mask hides the tile from those before it.

        A warp's m-tiles are as far apart as possible: under a causal mask, one of two sees nothing of what is right of
        the middle of the diagonal.
        """
        if masked and self.m_tiles > 1 and not (self.pattern.is_unmasked or self.pattern.has_gaps):
            if self.is_fully_masked(tile):
                body(self.m_tiles - 1)
            else:
                body(0)
        else:
            body(0)

    @T.inline
    def clear(self):
        """No output, no softmax state; the rightmost tile is the next to be copied."""
        for i in T.unroll(self.m_tiles * self.o_stride):
            self.O[i] = T.float32(0)
        self.softmax.reset()
        self.fetched = self.tiles.end - 1
        self.use = 0
        self.q.move(0, self.rows[0])
        self.k.move(0, self.fetched * self.config.block_n)
        self.v.move(0, self.fetched * self.config.block_n)

    @T.inline
    def fetch_done(self):
        """Let ``fetched`` and the cursor of K go to the next tile on the left."""
        before: T.int32 = self.fetched
        next_visible(self.pattern, self.at, self.tiles, self.rows, self.config.block_n, self.fetched)
        self.move_to_next(self.k, before, self.fetched)

    @T.inline
    def move_to_next(self, matrix, tile, following):
        """Let a cursor go from a tile to the one that follows on the left."""
        key = T.meta_var(tile * self.config.block_n)
        if self.pattern.has_gaps:
            matrix.move(key, (following - tile) * self.config.block_n)
        else:
            matrix.move(key, -self.config.block_n)

    @T.inline
    def finish(self):
        """The row sums are complete."""
        self.softmax.finish()
        self.add_sink()

    @T.inline
    def add_sink(self):
        """The rows' logit without a key, if they have one."""
        if self.softmax.has_sink:
            self.softmax.add_sink(lambda row: self.geometry.sink(self.pattern, self.at))
