"""Keys on pages of a cache: where the rows of a tile are, looked up once for all of its queries.

Page numbers are read a page at a time, so that a tile of keys costs a division and, where pages have a multiple of 8
rows, an addition and a store for each 8 keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder

from schedules.families.cpu.geometry import Geometry, SequenceGeometry, Tensor
from schedules.families.cpu.widen import TABLE, widen_rows
from schedules.tile.key_source import ContiguousRows

#: What a kernel says of lengths or pages that make no sense; the run time looks which and says it better.
MALFORMED = "seqlens_k, page_table: expected lengths that the table has pages for, and pages that the cache has"


#: Rows that are written down together.
_TOGETHER = 8


@dataclass(frozen=True)
class PagedTensor(Tensor):
    """Keys or values on pages; strides are those of page, head and row.

    ``rows`` has the offsets of rows that were looked up, that of a key at its number modulo ``room``, which is a power
    of two, or in a tile at its number there.
    """

    rows: tirx.Buffer | None = None
    room: int = 0

    def base(self, first: Expr, heads: Expr | int) -> Expr:
        return heads * self.strides[1]

    def near(self, base: Expr, key: Expr, j: Expr | int) -> Expr:
        return base + self.rows[T.bitwise_and(key, T.int64(self.room - 1)) + j]

    def in_tile(self, first: Expr, j: Expr) -> Expr:
        return self.rows[j]


@dataclass(frozen=True)
class ScaledTensor(PagedTensor):
    """The same in 8 bits: elements ``stored``, and ``scales`` by page and head.

    ``flat`` has the rows of the tile of keys that is computed with, ``tile`` keys of ``width`` elements in ``dtype``;
    ``numbers`` the pages of rows that were looked up.  Where elements are looked up (:mod:`.widen`), ``memory`` is
    ``flat`` as words, ``table`` (``words``) what magnitudes stand for, and ``made`` the scale that it was made for.
    """

    stored: tirx.Buffer | None = None
    scales: tirx.Buffer | None = None
    numbers: tirx.Buffer | None = None
    memory: tirx.Buffer | None = None
    words: tirx.Buffer | None = None
    table: tirx.Buffer | None = None
    made: tirx.Buffer | None = None
    width: int = 0
    tile: int = 0
    dtype: str = ""
    looks_up: bool = False

    def near(self, base: Expr, key: Expr, j: Expr | int) -> Expr:
        return (T.bitwise_and(key, T.int64(self.tile - 1)) + j) * self.width

    def in_tile(self, first: Expr, j: Expr) -> Expr:
        return j * self.width

    def is_apart(self, width: Expr) -> Expr:
        return T.bool(False)

    def in_memory(self, base: Expr, key: Expr, j: Expr | int = 0) -> tuple[tirx.Buffer, Expr]:
        return self.stored, super().near(base, key, j)


@dataclass(frozen=True)
class PagedGeometry(SequenceGeometry):
    """One sequence of a paged call: its keys are on the pages ``table[first_entry]`` and those that follow there."""

    table: tirx.Buffer
    first_entry: Expr
    page_size: Expr

    is_paged = True

    @property
    def is_scaled(self) -> bool:
        return isinstance(self.k, ScaledTensor)

    def key_rows(self, b: Expr, h: Expr) -> ContiguousRows:
        """Where the head begins in every page: pages are looked up."""
        return super().key_rows(T.int64(0), h)

    def value_rows(self, b: Expr, h: Expr) -> ContiguousRows:
        """The same of values."""
        return super().value_rows(T.int64(0), h)

    def with_room(self, keys: int, tile: int) -> PagedGeometry:
        def place(name, count, dtype="int64", scope="local"):
            buffer = T.sblock_alloc_buffer((count,), dtype, scope=scope)
            IRBuilder.name(name, buffer)
            return buffer

        def with_rows(name):
            x = replace(getattr(self, name), rows=place(f"{name}_rows", keys), room=keys)
            if not self.is_scaled:
                return x
            # All of this is local, so that TVM doesn't put it where functions outside TIR find another dtype.
            # Of 16 bits a view: TVM widens a buffer of bfloat16, and then no two elements are a word.
            memory = place(f"{name}_tile", tile * x.width, "float32" if x.dtype == "float32" else "uint16")
            flat = T.decl_buffer((tile * x.width,), x.dtype, data=memory.data)
            x = replace(x, numbers=numbers, tile=tile, flat=flat, memory=memory)
            if not x.looks_up:
                return x
            made = place(f"{name}_made", 1)
            T.buffer_store(made, T.int64(-1), [0])
            words = place(f"{name}_table", TABLE, "uint16")
            return replace(x, words=words, table=T.decl_buffer((TABLE,), x.dtype, data=words.data), made=made)

        numbers = place("numbers", keys) if self.is_scaled else None
        return replace(self, k=with_rows("k"), v=with_rows("v"))


@T.inline
def find_rows(P: Geometry, bases, key0, most, at):
    """Look up the rows of up to ``most`` keys from ``key0`` on, if there are any, and write them down from ``at`` on.

    ``bases`` are where the head begins in a page of keys and of values.  ``most`` is a multiple of 8,
    and so is ``key0``.
    """
    if P.is_paged:
        count: T.int64 = T.min(T.int64(most), P.seqlen_kv - key0)
        page: T.int64 = P.first_entry + T.truncdiv(key0, P.page_size)
        inside: T.int64 = T.truncmod(key0, P.page_size)
        place: T.int64 = at
        end: T.int64 = at + count
        while place < end:
            run: T.int64 = T.min(P.page_size - inside, end - place)
            number: T.int64 = T.cast(P.table[page], "int64")
            k_row: T.int64 = bases[0] + number * P.k.strides[0] + inside * P.k.strides[2]
            v_row: T.int64 = bases[1] + number * P.v.strides[0] + inside * P.v.strides[2]
            if P.page_size % _TOGETHER == 0:
                for block in T.serial((run + (_TOGETHER - 1)) // _TOGETHER):
                    for lane in T.vectorized(_TOGETHER):
                        j = T.meta_var(block * _TOGETHER + lane)
                        P.k.rows[place + j] = k_row + j * P.k.strides[2]
                        P.v.rows[place + j] = v_row + j * P.v.strides[2]
            else:
                for j in T.serial(run):
                    P.k.rows[place + j] = k_row + j * P.k.strides[2]
                    P.v.rows[place + j] = v_row + j * P.v.strides[2]
            if P.is_scaled:
                for j in T.serial(run):
                    P.k.numbers[place + j] = number
            place = place + run
            page = page + 1
            inside = T.int64(0)


@T.inline
def widen_tile(P: Geometry, keys, at, head):
    """Bring the rows of ``keys`` keys, which were looked up from ``at`` on, into the tiles that products read.

    ``head`` is where its rows are from those that were looked up on, of keys and values, and its number.
    """
    if P.is_scaled:
        widen_rows(P.k, head[0], head[2], P.head_dim, keys, at)
        widen_rows(P.v, head[1], head[2], P.head_dim_v, keys, at)
