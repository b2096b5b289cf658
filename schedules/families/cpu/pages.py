"""Keys on pages of a cache: where the rows of a tile are, looked up once for all of its queries.

Page numbers are read a page at a time, so that a tile of keys costs a division, and an addition for each key.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder

from schedules.families.cpu.geometry import Geometry, SequenceGeometry, Tensor

#: What a kernel says of lengths or pages that make no sense; the run time looks which and says it better.
MALFORMED = "seqlens_k, page_table: expected lengths that the table has pages for, and pages that the cache has"


@dataclass(frozen=True)
class PagedTensor(Tensor):
    """Keys or values on pages; strides are those of page, head and row.

    ``rows`` has the offsets of the rows that were looked up last, of the keys from ``first_key`` on.
    """

    rows: tirx.Buffer | None = None
    first_key: tirx.Buffer | None = None

    def of_key(self, base: Expr, key: Expr) -> Expr:
        return self.rows[key - self.first_key[0]]

    def near_key(self, base: Expr, key: Expr) -> Expr:
        return self.rows[T.min(key - self.first_key[0], self.first_key[1])]

    def in_tile(self, first: Expr, j: Expr) -> Expr:
        return self.rows[j]


@dataclass(frozen=True)
class PagedGeometry(SequenceGeometry):
    """One sequence of a paged call: its keys are on the pages ``table[first_entry]`` and those that follow there."""

    table: tirx.Buffer
    first_entry: Expr
    page_size: Expr

    is_paged = True

    def with_room(self, keys: int) -> PagedGeometry:
        def room(name, count):
            buffer = T.sblock_alloc_buffer((count,), "int64", scope="local")
            IRBuilder.name(name, buffer)
            return buffer

        first_key = room("first_key", 2)
        k, v = (replace(getattr(self, x), rows=room(f"{x}_rows", keys), first_key=first_key) for x in "kv")
        return replace(self, k=k, v=v)


@T.inline
def find_rows(P: Geometry, b, h, key0, most):
    """Look up the rows of up to ``most`` keys from ``key0`` on, for the functions of ``P.k`` and ``P.v``."""
    if P.is_paged:
        count: T.int64 = T.min(T.int64(most), P.seqlen_kv - key0)
        page: T.int64 = P.first_entry + key0 // P.page_size
        inside: T.int64 = key0 % P.page_size
        done: T.int64 = T.int64(0)
        while done < count:
            run: T.int64 = T.min(P.page_size - inside, count - done)
            number: T.int64 = T.cast(P.table[page], "int64")
            k_row: T.int64 = P.k.row(number, P.kv_head(h), inside)
            v_row: T.int64 = P.v.row(number, P.kv_head(h), inside)
            for j in T.serial(run):
                P.k.rows[done + j] = k_row + j * P.k.strides[2]
                P.v.rows[done + j] = v_row + j * P.v.strides[2]
            done = done + run
            page = page + 1
            inside = T.int64(0)
        P.k.first_key[0] = key0
        P.k.first_key[1] = count - 1
