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

from schedules.definition.cache import dequantised
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
class ScaledTensor(PagedTensor):
    """The same in 8 bits: elements ``stored``, and ``scales`` by page and head.

    ``flat`` has the rows of the tile of keys that is computed with, ``tile`` keys of ``width`` elements in ``dtype``;
    ``factors`` the scales of rows that were looked up.
    """

    stored: tirx.Buffer | None = None
    scales: tirx.Buffer | None = None
    factors: tirx.Buffer | None = None
    width: int = 0
    tile: int = 0
    dtype: str = ""

    def of_key(self, base: Expr, key: Expr) -> Expr:
        return T.bitwise_and(key, T.int64(self.tile - 1)) * self.width

    def in_tile(self, first: Expr, j: Expr) -> Expr:
        return j * self.width

    def is_apart(self, width: Expr) -> Expr:
        return T.bool(False)

    def in_memory(self, base: Expr, key: Expr) -> tuple[tirx.Buffer, Expr]:
        return self.stored, super().of_key(base, key)


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
            factors = place(f"{name}_factors", keys, "float32")
            # Of bfloat16 a view: TVM widens a buffer of its own, and then no two elements are a word.
            memory = place(f"{name}_tile", tile * x.width, "uint16" if x.dtype == "bfloat16" else x.dtype, "global")
            flat = T.decl_buffer((tile * x.width,), x.dtype, data=memory.data)
            return replace(x, factors=factors, tile=tile, flat=flat)

        return replace(self, k=with_rows("k"), v=with_rows("v"))


@T.inline
def find_rows(P: Geometry, bases, key0, most, at):
    """Look up the rows of up to ``most`` keys from ``key0`` on, if there are any, and write them down from ``at`` on.

    ``bases`` are where the head begins in a page of keys and of values, and its number.  ``most`` is a multiple of 8,
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
                k_factor: T.float32 = P.k.scales[number, bases[2]]
                v_factor: T.float32 = P.v.scales[number, bases[2]]
                for j in T.serial(run):
                    P.k.factors[place + j] = k_factor
                    P.v.factors[place + j] = v_factor
            place = place + run
            page = page + 1
            inside = T.int64(0)


@T.inline
def _widen_rows(tensor: ScaledTensor, width, keys, at):
    for j in T.serial(keys):
        row: T.int64 = tensor.rows[at + j]
        factor: T.float32 = tensor.factors[at + j]
        for d in T.serial(width // _TOGETHER):
            for lane in T.vectorized(_TOGETHER):
                tensor.flat[j * tensor.width + d * _TOGETHER + lane] = dequantised(
                    tensor.stored[row + d * _TOGETHER + lane], factor, tensor.dtype
                )


@T.inline
def widen_tile(P: Geometry, keys, at):
    """Bring the rows of ``keys`` keys, which were looked up from ``at`` on, into the tiles that products read."""
    if P.is_scaled:
        _widen_rows(P.k, P.head_dim, keys, at)
        _widen_rows(P.v, P.head_dim_v, keys, at)
