"""Run-time parameters as arguments of TIR functions, and what stands in a kernel for a definition's variables."""

from __future__ import annotations

import keyword
from collections.abc import Mapping
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.errors import DefinitionError
from tvm_flash.operators import TENSORS
from tvm_flash.packs.manifest import Param

#: What a definition's axes are called in the names of sizes and strides.
_SIZES = {"b": "batch", "h": "heads", "i": "queries", "j": "keys"}
_STRIDES = {"b": "batch_stride", "h": "head_stride", "i": "query_stride", "j": "key_stride"}


#: Names that a parameter can't have: those of other tensors and numbers of calls and kernels.
_TAKEN = {"o", "do", "delta", "softmax_scale", "return_lse", "accumulate", "gradients", "first_key", "last_key"}
_TAKEN |= TENSORS.keys()


def check_names(definition: str, params: tuple[Param, ...]) -> None:
    """That each parameter of a definition has a name of its own, by which a call can give it.

    Raises
    ------
    DefinitionError
    """
    for i, param in enumerate(params):
        name, gradients = param.name, {f"d_{p.name}" for p in params if p.gradient}
        if not name.isidentifier() or keyword.iskeyword(name):
            raise DefinitionError(f"{definition}: a parameter is named {name!r}; expected a name as Python's arguments")
        if name in _TAKEN or name in gradients or name.endswith(("_sum", "_sums", "_partial")):
            raise DefinitionError(
                f"{definition}: a parameter is named {name!r}, as another tensor or option of a call or a kernel; name "
                f"it otherwise"
            )
        if other := next((p for p in params[:i] if p.name == name), None):
            raise DefinitionError(
                f"{definition}: its mask and its score have two parameters named {name!r}, {other} and {param}; name "
                f"one of them otherwise"
            )


@dataclass(frozen=True)
class Site:
    """What stands in a kernel for the definition's own variables: TIR expressions of the pattern's ``index_dtype``.

    ``params`` has for each run-time parameter its value, for a per-head one that which belongs to ``(b, h)``; or what
    gives a tensor's value at a query and a key: the buffer, or a :class:`Reader`; and the buffer of a table, or a
    :class:`Lookup`.  Where the operator is ``partial``, it has ``first_key`` and ``last_key`` too.
    """

    b: Expr
    h: Expr
    batch: Expr
    heads: Expr
    kv_heads: Expr
    seqlen_q: Expr
    seqlen_kv: Expr
    softmax_scale: Expr
    params: Mapping[str, Expr]


class Reader:
    """What a kernel has of a tensor for one batch entry and head: its value at a query and a key."""

    def __call__(self, i: Expr, j: Expr) -> Expr:
        """The value at query ``i`` and key ``j``, float32, int32 or a predicate."""
        raise NotImplementedError


class Lookup:
    """What a kernel has of a table: its ``shape``, and elements by indices that are within it."""

    shape: tuple[Expr, ...]

    def __getitem__(self, index: tuple[Expr, ...]) -> Expr:
        """An element in the table's own dtype."""
        raise NotImplementedError


@dataclass(frozen=True)
class Place(Reader):
    """A tensor at one batch entry and head; queries and keys that there are not have the value of the last one."""

    buffer: tirx.Buffer
    axes: str
    b: Expr
    h: Expr
    seqlen_q: Expr
    seqlen_kv: Expr

    def __call__(self, i: Expr, j: Expr) -> Expr:
        i, j = (T.min(x, n - 1) for x, n in ((i, self.seqlen_q), (j, self.seqlen_kv)))
        at = {"b": self.b, "h": self.h, "i": i, "j": j}
        return widened(self.buffer[tuple(at[a] for a in self.axes)])


def value_of(param: Param, site: Site, i: Expr | None, j: Expr | None) -> Expr | None:
    """A parameter's value at a place: float32, int32, or a predicate; what a table is in a kernel; None where it has
    none."""
    x = site.params[param.name]
    if param.rank:
        return x
    if isinstance(x, Reader):
        return x(i, j)
    if not isinstance(x.ty, tirx.BufferType):
        return x
    at = {"b": site.b, "h": site.h, "i": i, "j": j}
    index = tuple(at[a] for a in param.axes)
    return None if any(x is None for x in index) else widened(x[index])


def widened(x: Expr) -> Expr:
    """A 16-bit value as float32, any other as it is."""
    return T.cast(x, "float32") if str(x.ty.dtype) in ("float16", "bfloat16") else x


def value_dtype(param: Param) -> str:
    """The dtype of a parameter's values in expressions."""
    return "float32" if param.dtype in ("float16", "bfloat16") else param.dtype


@dataclass(frozen=True)
class Table:
    """A table as an expression reads it: ``table(index, …)``, each index moved to the nearest that there is."""

    buffer: tirx.Buffer

    @property
    def shape(self) -> tuple[Expr, ...]:
        """Its sizes."""
        return tuple(self.buffer.ty.shape)

    def __call__(self, *index: Expr) -> Expr:
        if len(index) != len(self.shape):
            raise DefinitionError(f"table {self.buffer.name!r}: has rank {len(self.shape)}, and {len(index)} indices")
        return widened(
            self.buffer[tuple(_within(T.cast(x, n.ty.dtype), n) for x, n in zip(index, self.shape, strict=True))]
        )


def _within(index: Expr, size: Expr) -> Expr:
    return T.max(T.min(index, size - 1), tirx.const(0, size.ty.dtype))


def parameter_symbols(params: tuple[Param, ...], index_dtype: str):
    """Fresh TIR variables and buffers for run-time parameters: as a list of function arguments, and by name."""
    values = {p.name: _tensor(p.name, p, index_dtype) if p.is_tensor else tirx.Var(p.name, p.dtype) for p in params}
    return list(values.values()), values


def gradient_symbols(params: tuple[Param, ...], index_dtype: str):
    """Fresh buffers for the gradients of the parameters that ask for one: as a list, and by the parameter's name.

    The gradient of a number is a tensor with one element, that of a table a tensor of its shape.
    """
    values = {p.name: _gradient(p, index_dtype) for p in params if p.gradient}
    return list(values.values()), values


def gradient_name(param: Param) -> str:
    """What the argument for a parameter's gradient is called, and the block that computes it."""
    return f"d_{param.name}"


def _gradient(param: Param, index_dtype: str):
    if param.rank:
        return _tensor(gradient_name(param), Param(param.name, "float32", rank=param.rank), index_dtype)
    if not param.axes:
        return tirx.decl_buffer([tirx.IntImm(index_dtype, 1)], "float32", name=gradient_name(param))
    return _tensor(gradient_name(param), Param(param.name, "float32", axes=param.of_gradient), index_dtype)


def _tensor(name: str, param: Param, index_dtype: str):
    sizes = [_SIZES[a] for a in param.axes] or [f"size{n}" for n in range(param.rank)]
    strides = [_STRIDES[a] for a in param.axes] or [f"stride{n}" for n in range(param.rank)]
    sizes, strides = ([tirx.Var(f"{name}_{x}", index_dtype) for x in names] for names in (sizes, strides))
    return tirx.decl_buffer(sizes, param.dtype, name=name, strides=strides)


def append_arguments(func: PrimFunc, arguments: list) -> PrimFunc:
    """``func`` with further arguments, which its body already mentions."""
    return PrimFunc([*func.params, *arguments], func.body, func.ret_type, func.attrs)
