"""Tensors, symbols and ranges of a GPU kernel: everything about *where* that doesn't depend on the machine.

``Geometry`` declares the arguments of the ABI (:mod:`tvm_flash.packs.manifest`); make it before ``T.device_entry()``.
``Tensor`` addresses one argument by its run-time strides: sizes and strides are int32, offsets int64, and computed by
hand, since a TIRx buffer ignores the strides that it was matched with.  ``site`` gives what the definition's variables
are in this block.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import replace

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.attention import append_arguments
from schedules.definition.pattern import Pattern, Site
from schedules.tile.dtypes import TensorTypes, element_type, tensor_types
from schedules.tile.functions import accurate
from schedules.tile.key_source import ContiguousRows, PagedRows
from schedules.tile.sequences import Dense, Lengths, Ragged, Sequence
from schedules.tile.tile_scheduler import Traversal, Work

_UNBOUNDED = 1 << 60  # extent of a flat view


def wide(x: Expr) -> Expr:
    """``x`` as int64."""
    return T.Cast("int64", x)


def flat(buffer):
    """The memory of a buffer as one dimension, for offsets that were computed by hand."""
    return T.decl_buffer((T.int64(_UNBOUNDED),), buffer.dtype, data=buffer.data, layout=None)


def local(value: Expr):
    """A register with a value, computed here and not wherever it is used."""
    scalar = T.local_scalar(str(value.ty.dtype))
    T.buffer_store(scalar.source, value, [0])
    return scalar


def constant(x) -> int | None:
    """The value of a constant expression, None of any other."""
    return x.value if isinstance(x, tirx.IntImm) else None


#: The layout of ragged sequences, of either template.
RAGGED_LAYOUT = "shd"
#: That of keys on pages.
PAGED_LAYOUT = "pshd"
_AXES = {
    "bhsd": ("batch", "heads", "seq", "dim"),
    "bshd": ("batch", "seq", "heads", "dim"),
    RAGGED_LAYOUT: ("seq", "heads", "dim"),
    PAGED_LAYOUT: ("batch", "seq", "heads", "dim"),
}


@T.meta_class
class Tensor:
    """One of q, k, v, o: its axes in the layout's order, any strides with a contiguous last dimension.

    ``sizes`` has the symbols ``batch``, ``seq``, ``heads`` and ``dim``, ``strides`` all of the layout's but the last.
    A tensor of ragged sequences has no ``batch``; of one of pages, ``batch`` is the page.
    """

    def __init__(self, handle, name: str, sizes: dict, dtype: str, layout: str, alignment: int):
        *outer, dim = _AXES[layout]
        self.sizes = sizes
        self.strides = {axis: tirx.Var(f"{name}_{axis}_stride", "int32") for axis in outer}
        self.buffer = T.match_buffer(
            handle,
            [sizes[axis] for axis in (*outer, dim)],
            dtype,
            strides=[*(self.strides[axis] for axis in outer), 1],
            align=alignment,
        )

    def offset(self, b: Expr, h: Expr, row: Expr, column: Expr) -> Expr:
        """Elements before ``[b, h, row, column]``, int64."""
        at = {"batch": b, "heads": h, "seq": row}
        return sum((wide(at[axis]) * wide(stride) for axis, stride in self.strides.items()), wide(column))

    def rows_offset(self, rows: Expr) -> Expr:
        """Elements from a row to the one that is ``rows`` rows on, int64."""
        return wide(rows) * wide(self.strides["seq"])


@T.meta_class
class Geometry:
    """The arguments of a kernel: tensors ``q, k, v, o``, flat ``lse``, ``softmax_scale`` and their symbols.

    A kernel that computes partial results has no ``o`` and ``lse``.  ``queries`` and ``keys`` are the sequences of both
    (:mod:`schedules.tile.sequences`).
    """

    #: Whether results are put into what ``o``, in float32 then, and ``lse`` have of other keys.
    merges = False

    def __init__(
        self, pattern: Pattern, traversal: Traversal, handles, softmax_scale, parameters: dict, alignment: int
    ):
        q, k, v, *results = handles
        names = ("batch", "heads", "kv_heads", "seqlen_q", "seqlen_kv", "head_dim", "head_dim_v")
        self.batch, self.heads, self.kv_heads, self.seqlen_q, self.seqlen_kv, self.head_dim, self.head_dim_v = (
            tirx.Var(name, "int32") for name in names
        )
        queries = {"batch": self.batch, "heads": self.heads, "seq": self.seqlen_q}
        keys = {"batch": self.batch, "heads": self.kv_heads, "seq": self.seqlen_kv}
        types = self.types_of(pattern)
        tensors = [
            (q, "q", queries, self.head_dim, types.q),
            (k, "k", keys, self.head_dim, types.k),
            (v, "v", keys, self.head_dim_v, types.v),
            *((o, "o", queries, self.head_dim_v, types.o) for o in results[:1]),
        ]
        self.q, self.k, self.v, *rest = (
            Tensor(handle, name, {**sizes, "dim": dim}, element.name, traversal.layout, alignment)
            for handle, name, sizes, dim, element in tensors
        )
        if results:
            (self.o,) = rest
            self.lse_length = tirx.Var("lse_length", "int32")
            self.lse = T.match_buffer(results[1], (self.lse_length,), "float32", align=4)
        self.queries, self.keys = Dense(self.seqlen_q), Dense(self.seqlen_kv)
        self.softmax_scale = softmax_scale
        self.parameters, self.declared = parameters, {p.name: p for p in pattern.params}

    def types_of(self, pattern: Pattern) -> TensorTypes:
        """The element types of the tensors."""
        types = tensor_types(pattern)
        return replace(types, o=element_type("float32")) if self.merges else types

    def key_rows(self, tensor: Tensor, b: Expr, kv_head: Expr, keys: Sequence) -> ContiguousRows | PagedRows:
        """Where the keys of a sequence are in k or v."""
        return ContiguousRows(tensor, b, kv_head, keys)

    def kv_head(self, h: Expr) -> Expr:
        """The head of k and v that query head ``h`` reads."""
        return T.truncdiv(h * self.kv_heads, self.heads)

    def work(self, rows: int) -> Work:
        """The work tiles of ``rows`` rows of a launch."""
        return Work(self.queries.tiles(rows), self.heads, self.batch)

    def sink(self, pattern: Pattern, at: Site) -> Expr:
        """The logit that the rows at a site have beside those of keys, where the pattern has one."""
        return accurate(pattern.sink(at))

    @property
    def lse_wanted(self) -> Expr:
        """Whether the caller brought room for the log-sum-exp of every row."""
        return wide(self.lse_length) >= wide(self.batch) * wide(self.heads) * wide(self.seqlen_q)

    def lse_offset(self, b: Expr, h: Expr, row: Expr) -> Expr:
        """Where the log-sum-exp of a row is in the flat tensor, int64."""
        return (wide(b) * wide(self.heads) + wide(h)) * wide(self.seqlen_q) + wide(row)


@T.meta_class
class MergedGeometry(Geometry):
    """The same where ``o`` and ``lse`` have the results of other keys, which those of these are put into."""

    merges = True


@T.meta_class
class RaggedGeometry(Geometry):
    """The same where sequences are ragged: tensors ``(positions, heads, head_dim)``, and where the sequences begin.

    ``seqlen_q`` and ``seqlen_kv`` are the positions of all, ``batch`` is how many sequences there are.  ``lse`` is in
    the order ``(heads, positions)``.
    """

    def __init__(
        self, pattern: Pattern, traversal: Traversal, handles, starts, softmax_scale, parameters: dict, alignment: int
    ):
        traversal = replace(traversal, layout=RAGGED_LAYOUT)
        Geometry.__init__(self, pattern, traversal, handles, softmax_scale, parameters, alignment)
        ends = tirx.Var("starts", "int32")
        self._begin_at(ends, [T.match_buffer(handle, (ends,), "int32", align=4) for handle in starts])

    def _begin_at(self, ends, starts):
        """Sequences begin where the buffers ``starts`` of ``ends`` numbers say, of queries and of keys."""
        of_queries, of_keys = starts
        self.batch = ends - 1
        self.queries = Ragged(of_queries, self.batch, self.seqlen_q)
        self.keys = Ragged(of_keys, self.batch, self.seqlen_kv)
        self.all_queries = self.queries

    def work(self, rows: int) -> Work:
        """Slots for row tiles, those of all sequences together."""
        return Work(self.queries.tiles(rows), self.heads, T.int32(1))

    def sink(self, pattern: Pattern, at: Site) -> Expr:
        is_of_sequence = self.queries.of(at.b).offset < self.all_queries.begin(self.batch)
        return T.Select(
            is_of_sequence, accurate(pattern.sink(at)), T.float32(-math.inf)
        )  # rows after the last have none

    @property
    def lse_wanted(self) -> Expr:
        return wide(self.lse_length) >= wide(self.heads) * wide(self.seqlen_q)

    def lse_offset(self, b: Expr, h: Expr, row: Expr) -> Expr:
        """Where the log-sum-exp of a row of the tensor is, int64."""
        return wide(h) * wide(self.seqlen_q) + wide(row)

    def at(self, queries, keys) -> RaggedGeometry:
        """The same with the sequences of a block's own work tile (:mod:`schedules.tile.slots`)."""
        own = copy(self)
        own.queries, own.keys = queries, keys
        return own


@T.meta_class
class PagedGeometry(RaggedGeometry):
    """The same where the keys of the sequences lie on pages.

    ``where`` are the handles of the rows' starts, the keys' lengths and the table of pages.  A kernel that computes
    partial results has no ``o`` and ``lse``, and one whose values are the first elements of keys None for ``v``.
    ``types`` are those of the tensors, if they aren't the pattern's.
    """

    def __init__(self, pattern: Pattern, handles, where, softmax_scale, parameters: dict, alignment: int, types=None):
        q, k, v, *results = handles
        names = ("heads", "kv_heads", "total_q", "head_dim", "head_dim_v", "batch", "starts")
        self.heads, self.kv_heads, self.seqlen_q, self.head_dim, self.head_dim_v, self.batch, ends = (
            tirx.Var(name, "int32") for name in names
        )
        pages, self.page_size, columns = (tirx.Var(n, "int32") for n in ("pages", "page_size", "pages_per_sequence"))
        rows = {"seq": self.seqlen_q, "heads": self.heads}
        keys = {"batch": pages, "seq": self.page_size, "heads": self.kv_heads}
        types = types or tensor_types(pattern)

        def tensor(handle, name, sizes, dim, element, layout):
            return Tensor(handle, name, {**sizes, "dim": dim}, element.name, layout, alignment)

        self.q = tensor(q, "q", rows, self.head_dim, types.q, RAGGED_LAYOUT)
        self.k = tensor(k, "k", keys, self.head_dim, types.k, PAGED_LAYOUT)
        self.v = self.k if v is None else tensor(v, "v", keys, self.head_dim_v, types.v, PAGED_LAYOUT)
        if results:
            self.o = tensor(results[0], "o", rows, self.head_dim_v, types.o, RAGGED_LAYOUT)
            self.lse_length = tirx.Var("lse_length", "int32")
            self.lse = T.match_buffer(results[1], (self.lse_length,), "float32", align=4)
        self.table_stride = tirx.Var("table_stride", "int32")
        of_queries, of_keys, table = where
        self.table = T.match_buffer(table, (self.batch, columns), "int32", strides=[self.table_stride, 1], align=4)
        starts = T.match_buffer(of_queries, (ends,), "int32", align=4)
        lengths = T.match_buffer(of_keys, (self.batch,), "int32", align=4)
        self.seqlen_kv = columns * self.page_size
        self.queries = Ragged(starts, self.batch, self.seqlen_q)
        self.keys = Lengths(lengths, self.batch, self.seqlen_kv)
        self.all_queries = self.queries
        self.softmax_scale = softmax_scale
        self.parameters, self.declared = parameters, {p.name: p for p in pattern.params}

    def key_rows(self, tensor: Tensor, b: Expr, kv_head: Expr, keys: Sequence) -> PagedRows:
        entries = flat(self.table)
        return PagedRows(tensor, lambda page: entries[wide(b) * wide(self.table_stride) + wide(page)], kv_head, keys)


def site(geometry: Geometry, parameters, b: Expr, h: Expr) -> Site:
    """What the definition's variables are in a block that computes rows of head ``h`` of batch ``b``.

    Its lengths are those of the batch's own sequences; ``parameters`` as in :mod:`schedules.tile.parameters`.
    """
    return Site(
        b,
        h,
        geometry.batch,
        geometry.heads,
        geometry.kv_heads,
        geometry.queries.of(b).length,
        geometry.keys.of(b).length,
        geometry.softmax_scale,
        parameters.values,
    )


def parameterised(pattern: Pattern, make) -> PrimFunc:
    """The kernel that ``make(parameters)`` returns, with the pattern's run-time parameters as further arguments."""
    arguments, values = pattern.parameter_symbols()
    return append_arguments(make(values), arguments)
