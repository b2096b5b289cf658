"""Forward of ragged sequences over keys on pages: as of ragged ones but for where keys are (``pages.py``)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder

from schedules.definition.attention import append_arguments
from schedules.definition.pattern import Pattern
from schedules.families.cpu.config import Config
from schedules.families.cpu.flat import flat
from schedules.families.cpu.geometry import Tensor
from schedules.families.cpu.isa import ISAS, Isa
from schedules.families.cpu.kernel import functions_of
from schedules.families.cpu.pages import MALFORMED, PagedGeometry, PagedTensor
from schedules.families.cpu.pipeline import PIPELINE
from schedules.families.cpu.ragged import sequences
from schedules.families.cpu.ragged.kernel import rows_argument
from schedules.families.cpu.ragged.sequences import Starts, make_sense
from schedules.families.cpu.ragged.work import attend_macro
from schedules.families.interface import Program, Target, paged_program
from schedules.tile.dtypes import element_type
from schedules.tile.tile_scheduler import Traversal


@dataclass(frozen=True)
class Pages:
    """Where the keys of ``batch`` sequences are: how many (``buffer``), and on which pages (a row of ``table``)."""

    buffer: tirx.Buffer
    table: tirx.Buffer
    table_stride: Expr
    batch: Expr
    pages_per_sequence: Expr
    pages: Expr
    page_size: Expr

    def own_length(self, sequence: Expr) -> Expr:
        """How many keys a sequence has; none of what follows the last one."""
        length = T.cast(self.buffer[T.min(sequence, self.batch - 1)], "int64")
        return T.Select(sequence < self.batch, length, T.int64(0))

    def place(self, sequence: Expr) -> Expr:
        """Where its row of the table begins."""
        return sequence * self.table_stride

    def at(self, call: PagedGeometry, place: Expr) -> PagedGeometry:
        """The call with the keys of the sequence whose row of the table that is."""
        return replace(call, first_entry=place)

    def make_sense(self) -> Expr:
        """Whether lengths fit the table, and the pages that they need the cache (``runtime_c/sequences.c``)."""
        places = (self.buffer.access_ptr("r"), self.table.access_ptr("r"), self.table_stride)
        sizes = (self.batch, self.pages_per_sequence, self.pages, self.page_size)
        return T.call_extern("int32", "tvm_flash_pages_make_sense", *places, *sizes) != 0


def program(pattern: Pattern, config: Config, target: Target, traversal: Traversal, name: str) -> Program:
    """The kernel of one pattern, in the order of a template (see :mod:`schedules.families.interface`)."""
    arguments, values = pattern.parameter_symbols()
    func = _kernel(pattern, config, ISAS[target.isa], traversal, values, name)
    func = append_arguments(func, arguments)
    itemsize = element_type(pattern.dtype).bytes
    return paged_program(func, pattern.params, PIPELINE, alignment=itemsize, index_bits=64)


def pages_argument(handle, name: str, pages, page_size, heads, width, dtype: str):
    """An argument of rank 4: a buffer, and its strides by page, head and row."""
    strides = tuple(tirx.Var(f"{name}_{axis}_stride", "int64") for axis in ("page", "row", "head"))
    buffer = T.match_buffer(handle, (pages, page_size, heads, width), dtype, strides=(*strides, T.int64(1)))
    by_page, by_row, by_head = strides
    return buffer, (by_page, by_head, by_row)


def called(pattern: Pattern, params, handles, softmax_scale) -> tuple[PagedGeometry, Starts, Pages]:
    """The call that a kernel's arguments make, and its sequences of queries and of keys.

    ``handles`` are q, k, v, o, lse, cu_seqlens_q, seqlens_k and page_table; v is None where values are the first
    elements of keys.
    """
    q, k, v, o, lse, cu_seqlens_q, seqlens_k, page_table = handles
    dtype = pattern.dtype

    def size(name):
        return tirx.Var(name, "int64")

    total_q, heads, kv_heads, starts, batch = map(size, ("total_q", "heads", "kv_heads", "starts", "batch"))
    names = ("pages", "page_size", "pages_per_sequence", "table_stride")
    pages, page_size, pages_per_sequence, table_stride = map(size, names)
    head_dim, head_dim_v, lse_length = map(size, ("head_dim", "head_dim_v", "lse_length"))
    Q = rows_argument(q, "q", total_q, heads, head_dim, dtype)
    K = pages_argument(k, "k", pages, page_size, kv_heads, head_dim, dtype)
    V = K if v is None else pages_argument(v, "v", pages, page_size, kv_heads, head_dim_v, dtype)
    O = rows_argument(o, "o", total_q, heads, head_dim_v, dtype)
    LSE = T.match_buffer(lse, (lse_length,), "float32")
    q_starts = T.match_buffer(cu_seqlens_q, (starts,), "int32", align=4)
    lengths = T.match_buffer(seqlens_k, (batch,), "int32", align=4)
    entries = T.match_buffer(
        page_table, (batch, pages_per_sequence), "int32", strides=(table_stride, T.int64(1)), align=4
    )
    for name, buffer in (("LSE", LSE), ("q_starts", q_starts), ("lengths", lengths), ("entries", entries)):
        IRBuilder.name(name, buffer)
    rows = [Tensor(flat(buffer), strides) for buffer, strides in (Q, O)]
    cache = [PagedTensor(flat(buffer), strides) for buffer, strides in (K, V)]
    table = flat(entries)
    keys = Pages(lengths, table, table_stride, batch, pages_per_sequence, pages, page_size)
    call = PagedGeometry(
        *(pattern, rows[0], *cache, rows[1], LSE, lse_length, softmax_scale, params),
        *(batch, heads, kv_heads, total_q, T.int64(0), head_dim, head_dim_v, T.int64(0), total_q, T.int64(0)),
        *(table, T.int64(0), page_size),
    )
    return call, Starts(q_starts, batch, total_q), keys


def _kernel(pattern: Pattern, config: Config, isa: Isa, traversal: Traversal, params, name: str):
    attend = attend_macro(pattern, config, isa, traversal)

    @T.prim_func(s_tir=True, check_well_formed=False)
    def attention(
        q: T.handle,
        k: T.handle,
        v: T.handle,
        o: T.handle,
        lse: T.handle,
        cu_seqlens_q: T.handle,
        seqlens_k: T.handle,
        page_table: T.handle,
        softmax_scale: T.float32,
    ):
        T.func_attr({"tirx.noalias": True, "global_symbol": name})
        handles = T.meta_var((q, k, v, o, lse, cu_seqlens_q, seqlens_k, page_table))
        parts = T.meta_var(called(pattern, params, handles, softmax_scale))
        T.attr(0, "pragma_import_llvm", functions_of(isa, pattern.dtype))
        assert make_sense(parts[1]), sequences.MALFORMED
        assert parts[2].make_sense(), MALFORMED
        attend(*parts)

    return attention
