"""Run-time parameters as arguments of TIR functions, and what stands in a kernel for a definition's variables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx import PrimFunc

from tvm_flash.packs.manifest import Param

#: What a definition's axes are called in the names of sizes and strides.
_SIZES = {"b": "batch", "h": "heads"}
_STRIDES = {"b": "batch_stride", "h": "head_stride"}


@dataclass(frozen=True)
class Site:
    """What stands in a kernel for the definition's own variables: TIR expressions of the pattern's ``index_dtype``.

    ``params`` has a value for each run-time parameter, for a per-head one the value that belongs to ``(b, h)``; where
    the operator is ``partial``, ``first_key`` and ``last_key`` too.
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


def axes_of(param: Param) -> str:
    """The axes of a score, of ``b h i j``, for which a parameter has a value each; none if it is one number."""
    return "bh" if param.per_head else ""


def parameter_symbols(params: tuple[Param, ...], index_dtype: str):
    """Fresh TIR variables and buffers for run-time parameters: as a list of function arguments, and by name."""
    values = {p.name: _tensor(p.name, p, index_dtype) if axes_of(p) else tirx.Var(p.name, p.dtype) for p in params}
    return list(values.values()), values


def gradient_symbols(params: tuple[Param, ...], index_dtype: str):
    """Fresh buffers for the gradients of the parameters that ask for one: as a list, and by the parameter's name.

    The gradient of a number is a tensor with one element.
    """
    values = {p.name: _tensor(gradient_name(p), p, index_dtype) for p in params if p.gradient}
    return list(values.values()), values


def gradient_name(param: Param) -> str:
    """What the argument for a parameter's gradient is called, and the block that computes it."""
    return f"d_{param.name}"


def _tensor(name: str, param: Param, index_dtype: str):
    axes = axes_of(param)
    if not axes:
        return tirx.decl_buffer([tirx.IntImm(index_dtype, 1)], param.dtype, name=name)
    sizes = [tirx.Var(f"{name}_{_SIZES[a]}", index_dtype) for a in axes]
    strides = [tirx.Var(f"{name}_{_STRIDES[a]}", index_dtype) for a in axes]
    return tirx.decl_buffer(sizes, param.dtype, name=name, strides=strides)


def append_arguments(func: PrimFunc, arguments: list) -> PrimFunc:
    """``func`` with further arguments, which its body already mentions."""
    return PrimFunc([*func.params, *arguments], func.body, func.ret_type, func.attrs)
