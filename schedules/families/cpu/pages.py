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

    def of_key(self, base: Expr, key: Expr) -> Expr:
        return self.rows[T.bitwise_and(key, T.int64(self.room - 1))]

    def in_tile(self, first: Expr, j: Expr) -> Expr:
        return self.rows[j]


@dataclass(frozen=True)
class PagedGeometry(SequenceGeometry):
    """One sequence of a paged call: its keys are on the pages ``table[first_entry]`` and those that follow there."""

    table: tirx.Buffer
    first_entry: Expr
    page_size: Expr

    is_paged = True

    def key_rows(self, b: Expr, h: Expr) -> ContiguousRows:
        """Where the head begins in every page: pages are looked up."""
        return super().key_rows(T.int64(0), h)

    def value_rows(self, b: Expr, h: Expr) -> ContiguousRows:
        """The same of values."""
        return super().value_rows(T.int64(0), h)

    def with_room(self, keys: int) -> PagedGeometry:
        def place(name, count):
            buffer = T.sblock_alloc_buffer((count,), "int64", scope="local")
            IRBuilder.name(name, buffer)
            return buffer

        k, v = (replace(getattr(self, x), rows=place(f"{x}_rows", keys), room=keys) for x in "kv")
        return replace(self, k=k, v=v)


@T.inline
def find_rows(P: Geometry, bases, key0, most, at):
    """Look up the rows of up to ``most`` keys from ``key0`` on, if there are any, and write them down from ``at`` on.

    ``bases`` are where the head begins in a page of keys and of values.  ``most`` is a multiple of 8, and so is
    ``key0``.
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
            place = place + run
            page = page + 1
            inside = T.int64(0)
