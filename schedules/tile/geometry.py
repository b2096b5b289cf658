"""Tensors, symbols and ranges of a GPU kernel: everything about *where* that doesn't depend on the machine.

``Geometry`` declares the arguments of the ABI (:mod:`tvm_flash.packs.manifest`); make it before ``T.device_entry()``.
``Tensor`` addresses one argument by its run-time strides: sizes and strides are int32, offsets int64, and computed by
hand, since a TIRx buffer ignores the strides that it was matched with.  ``site`` gives what the definition's variables
are in this block, ``KeyTiles`` which tiles of keys a row tile has to visit.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Expr, PrimType
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.attention import append_arguments
from schedules.definition.pattern import Pattern, Site
from schedules.families.interface import Traversal

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


@T.meta_class
class Tensor:
    """One of q, k, v, o: rank 4 in the layout's order, any strides with a contiguous last dimension.

    ``sizes`` has the symbols ``batch``, ``seq``, ``heads`` and ``dim``, ``strides`` the first three.
    """

    def __init__(self, handle, name: str, sizes: dict, dtype: str, layout: str, alignment: int):
        order = {"bhsd": ("batch", "heads", "seq", "dim"), "bshd": ("batch", "seq", "heads", "dim")}[layout]
        self.sizes = sizes
        self.strides = {axis: tirx.Var(f"{name}_{axis}_stride", "int32") for axis in order[:3]}
        self.buffer = T.match_buffer(
            handle,
            [sizes[axis] for axis in order],
            dtype,
            strides=[*(self.strides[axis] for axis in order[:3]), 1],
            align=alignment,
        )

    def offset(self, b: Expr, h: Expr, row: Expr, column: Expr) -> Expr:
        """Elements before ``[b, h, row, column]``, int64."""
        at = {"batch": b, "heads": h, "seq": row}
        return sum((wide(at[axis]) * wide(stride) for axis, stride in self.strides.items()), wide(column))


@T.meta_class
class Geometry:
    """The arguments of a kernel: tensors ``q, k, v, o``, flat ``lse``, ``softmax_scale`` and their symbols.

    A kernel that computes partial results has no ``o`` and ``lse``.
    """

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
        tensors = [
            (q, "q", queries, self.head_dim),
            (k, "k", keys, self.head_dim),
            (v, "v", keys, self.head_dim_v),
            *((o, "o", queries, self.head_dim_v) for o in results[:1]),
        ]
        self.q, self.k, self.v, *rest = (
            Tensor(handle, name, {**sizes, "dim": dim}, pattern.dtype, traversal.layout, alignment)
            for handle, name, sizes, dim in tensors
        )
        if results:
            (self.o,) = rest
            self.lse_length = tirx.Var("lse_length", "int32")
            self.lse = T.match_buffer(results[1], (self.lse_length,), "float32", align=4)
        self.softmax_scale = softmax_scale
        self.parameters = parameters

    @property
    def lse_wanted(self) -> Expr:
        """Whether the caller brought room for the log-sum-exp of every row."""
        return wide(self.lse_length) >= wide(self.batch) * wide(self.heads) * wide(self.seqlen_q)

    def lse_offset(self, b: Expr, h: Expr, row: Expr) -> Expr:
        """Where the log-sum-exp of a row is in the flat tensor, int64."""
        return (wide(b) * wide(self.heads) + wide(h)) * wide(self.seqlen_q) + wide(row)


@T.meta_class
class Parameters:
    """The run-time parameters that belong to one ``(batch, head)``: scalars as they are, per-head ones read once."""

    def __init__(self, geometry: Geometry, b: Expr, h: Expr):
        self.values = {}
        self.loaded = []
        for name, value in geometry.parameters.items():
            if isinstance(value.ty, PrimType):
                self.values[name] = value
                continue
            batch_stride, head_stride = value.ty.strides
            source = flat(value)
            self.loaded.append(source)
            self.values[name] = local(source[wide(b) * wide(batch_stride) + wide(h) * wide(head_stride)])


def site(geometry: Geometry, parameters: Parameters, b: Expr, h: Expr) -> Site:
    """What the definition's variables are in a block that computes rows of head ``h`` of batch ``b``."""
    return Site(
        b,
        h,
        geometry.batch,
        geometry.heads,
        geometry.kv_heads,
        geometry.seqlen_q,
        geometry.seqlen_kv,
        geometry.softmax_scale,
        parameters.values,
    )


@T.meta_class
class KeyTiles:
    """Tiles of ``block_n`` keys that rows ``row_first .. row_last`` (inclusive) have to visit.

    Tiles ``begin .. end`` (exclusive) may be seen by some row; of these, ``full_begin .. full_end`` are seen whole by
    every row and need no mask.  ``begin <= full_begin <= full_end <= end`` always holds.  ``has_full`` and ``has_left``
    say whether there can be full tiles at all, and masked ones to the left of them: known when the kernel is made.
    ``within`` are the tiles, first and end, of a part of the keys; there ``begin`` may be beyond its end.
    """

    def __init__(
        self,
        pattern: Pattern,
        at: Site,
        row_first: Expr,
        row_last: Expr,
        block_n: int,
        within: tuple[Expr, Expr] | None = None,
    ):
        lo, hi = pattern.visible_range(at, row_first, row_last)
        full_lo, full_hi = pattern.full_range(at, row_first, row_last)
        self.has_full = constant(full_hi) != 0
        self.has_left = self.has_full and constant(full_lo) != 0
        begin, end = T.truncdiv(lo, block_n), T.truncdiv(hi + (block_n - 1), block_n)
        if within is not None:
            begin, end = T.max(begin, within[0]), T.min(end, within[1])
        self.begin = local(begin)
        self.end = local(T.max(end, self.begin))
        if not self.has_full:
            self.full_begin, self.full_end = self.end, self.end
            return
        first = T.truncdiv(full_lo + (block_n - 1), block_n) if self.has_left else self.begin
        self.full_begin = local(T.min(T.max(first, self.begin), self.end))
        self.full_end = local(T.max(T.min(T.truncdiv(full_hi, block_n), self.end), self.full_begin))
        self._full_hi, self._block_n = full_hi, block_n

    def seen_end(self) -> Expr:
        """The tile with which a walk from right to left has shown every row a key, in ``full_begin .. full_end``.

        The last key that all rows see is in a masked tile, or else in the last full one.
        """
        if not self.has_full:
            return self.end
        masked = T.And(self._full_hi > self.full_end * self._block_n, self.full_end < self.end)
        return T.max(self.full_end - T.Select(masked, 0, 1), self.full_begin)


def parameterised(pattern: Pattern, make) -> PrimFunc:
    """The kernel that ``make(parameters)`` returns, with the pattern's run-time parameters as further arguments."""
    arguments, values = pattern.parameter_symbols()
    return append_arguments(make(values), arguments)
