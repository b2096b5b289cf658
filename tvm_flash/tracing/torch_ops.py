"""Attention as operators of PyTorch: what compiled, exported and otherwise traced programs call.

Importing this module imports torch and registers ``torch.ops.tvm_flash.attention`` and
``torch.ops.tvm_flash.custom_attention``.  The public functions call kernels directly and come here for tensors that
have no memory: under ``torch.compile`` and ``torch.export``, on fake and meta tensors, in ``torch.vmap``.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import register_flop_formula

from tvm_flash.call.prepare import NO_BACKWARD, named, no_backward_of
from tvm_flash.call.signature import Options, signature
from tvm_flash.errors import ArgumentTypeError, InvalidArgumentError, NotSupportedError
from tvm_flash.frameworks.torch_watch import is_differentiated
from tvm_flash.packs.manifest import BUILTIN_DEFINITION
from tvm_flash.tracing import torch_decomposed
from tvm_flash.tracing.torch_checks import check_call, check_kinds, check_options, check_shapes, warn_in_program

_MINIMUM = (2, 4)

if tuple(int(x) for x in torch.__version__.split(".")[:2]) < _MINIMUM:
    raise NotSupportedError(
        f"torch: is version {torch.__version__}, expected {'.'.join(map(str, _MINIMUM))} or later for compiled and "
        f"traced programs; plain calls work with any version"
    )

_library = torch.library.Library("tvm_flash", "DEF")
# Inductor may otherwise hand over tensors whose last dimension isn't contiguous.
_TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)
# None and −1 are both unbounded, and calls pass −1: AOTInductor of torch 2.13 loses whole numbers that equal a default.
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? alibi_slopes=None, Tensor? kv_start=None, "
    "Tensor? kv_end=None, Tensor? query_start=None, *, "
    'str layout="bhsd", str variant="auto", float? softmax_scale=None, bool causal=False, int? window_left=None, '
    "int? window_right=None, float softcap=0.0, bool return_lse=False) -> (Tensor, Tensor)",
    tags=_TAGS,
)
_library.define(
    "custom_attention(Tensor q, Tensor k, Tensor v, Tensor[] per_head, float[] numbers, *, str name, "
    'str[] per_head_names, str[] number_names, str layout="bhsd", str variant="auto", float? softmax_scale=None, '
    "bool return_lse=False) -> (Tensor, Tensor)",
    tags=_TAGS,
)


def attention(options: Options, q: Any, k: Any, v: Any, per_head: dict[str, Any], out: Any) -> Any:
    """:func:`tvm_flash.call.dispatch.attention` by way of the operators.

    Raises
    ------
    TvmFlashError: an argument is wrong, or of a kind that the operators don't know.
    """
    try:
        return program(options, q, k, v, per_head, out)
    except TypeError as e:
        if isinstance(e, ArgumentTypeError) or "NotImplemented" not in str(e):
            raise
        kinds = {type(x).__qualname__ for x in named(q, k, v, per_head, out).values()} - {"Tensor", "Parameter"}
        raise ArgumentTypeError(
            f"q: is a {', '.join(sorted(kinds))}, which doesn't know this operator; pass the tensors that it stands for"
        ) from e


def program(options: Options, q: Any, k: Any, v: Any, per_head: dict[str, Any], out: Any) -> Any:
    """The same as ``torch.compile`` traces it."""
    tensors = named(q, k, v, per_head, out)
    check_kinds(tensors)
    options = check_options(options)
    if any(type(x).__name__ == "DTensor" for x in tensors.values()):
        _distribute()
    operator = torch.ops.tvm_flash.attention
    if torch.compiler.is_compiling():
        warn_in_program(options, q, k)
    else:
        check_call(options, q, k, v, per_head, out)
        operator = torch_decomposed.attention if _onnx_is_traced() else operator
    if options.definition == BUILTIN_DEFINITION:
        left, right = options.window_size
        results = operator(
            q,
            k,
            v,
            per_head.get("alibi_slopes"),
            per_head.get("kv_start"),
            per_head.get("kv_end"),
            per_head.get("query_start"),
            layout=options.layout,
            variant=options.variant,
            softmax_scale=options.softmax_scale,
            causal=options.causal,
            window_left=left,
            window_right=right,
            softcap=options.softcap,
            return_lse=options.return_lse,
        )
    else:
        results = torch.ops.tvm_flash.custom_attention(
            q,
            k,
            v,
            list(per_head.values()),
            [value for _, value in options.params],
            name=options.definition,
            per_head_names=list(per_head),
            number_names=[name for name, _ in options.params],
            layout=options.layout,
            variant=options.variant,
            softmax_scale=options.softmax_scale,
            return_lse=options.return_lse,
        )
    result, lse = results[0], results[1]  # a proxy of torch.fx can't be unpacked
    if out is not None:
        if out.requires_grad and torch.is_grad_enabled():
            raise NotSupportedError(no_backward_of("out"))
        if out.shape != result.shape:
            raise InvalidArgumentError(
                f"out: has shape {tuple(out.shape)}, expected {tuple(result.shape)}; leave it out to get a new tensor"
            )
        if out.dtype != result.dtype:
            raise ArgumentTypeError(f"out: has dtype {out.dtype}, expected {result.dtype} as q has")
        result = out.copy_(result)
    return (result, lse) if options.return_lse else result


def _onnx_is_traced() -> bool:
    """Whether ``torch.onnx.export(dynamo=False)`` traces a program, whose format has no such operators."""
    onnx = sys.modules.get("torch.onnx")
    return onnx is not None and onnx.is_in_onnx_export()


def _distribute() -> None:
    from tvm_flash.tracing import torch_distributed  # noqa: F401, tells of placements


_distribute._dynamo_marked_constant = True


# ---------------------------------------------------------------- on real tensors


def _run(what, tensors, options, *, layout="bhsd", variant="auto", softmax_scale=None, return_lse=False):
    attend = signature(layout, **what, layout_known=True, below=True).call
    result = attend(*tensors, None, variant, return_lse, softmax_scale, *options)
    return result if return_lse else (result, tensors[0].new_empty(0, dtype=torch.float32))


# Arguments have the defaults of the operators: a dispatcher leaves those out that have them.


def _attention(
    q, k, v, alibi_slopes=None, kv_start=None, kv_end=None, query_start=None, *, causal=False, window_left=None,
    window_right=None, softcap=0.0, **others,
):  # fmt: skip
    what = {"parameters": ("alibi_slopes", "kv_start", "kv_end", "query_start")}
    tensors = (q, k, v, alibi_slopes, kv_start, kv_end, query_start)
    window = tuple(-1 if x is None else x for x in (window_left, window_right))
    return _run(what, tensors, (causal, window, softcap), **others)


def _custom_attention(q, k, v, per_head, numbers, *, name, per_head_names, number_names, **others):
    what = {"definition": name, "parameters": tuple(per_head_names), "scalars": tuple(number_names)}
    return _run(what, (q, k, v, *per_head), numbers, **others)


# ---------------------------------------------------------------- on fake tensors


def _shapes(q, k, v, *_, layout="bhsd", return_lse=False, **__):
    check_shapes(layout, q, k, v)
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    rows = (q.shape[0], q.shape[1], q.shape[2]) if layout == "bhsd" else (q.shape[0], q.shape[2], q.shape[1])
    return out, q.new_empty(rows if return_lse else (0,), dtype=torch.float32)


# ---------------------------------------------------------------- gradients


def _without_gradients(operator):
    def call_below(q, k, v, *others, **options):
        for x in pytree.tree_leaves((q, k, v, others, options)):
            if isinstance(x, torch.Tensor) and is_differentiated(x):
                raise NotSupportedError(NO_BACKWARD)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(q, k, v, *others, **options)

    return call_below


# ---------------------------------------------------------------- vmap


def _vmap(operator):
    """A rule that makes one batch of the mapped and the own batch dimension."""

    def rule(info, in_dims, *arguments, **options):
        size = info.batch_size

        def merged(x, dim):
            if isinstance(x, (list, tuple)):
                dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(x)
                return [merged(*pair) for pair in zip(x, dims, strict=True)]
            if not isinstance(x, torch.Tensor):
                return x
            x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            if x.ndim < 4:  # one value a head, or also a batch entry
                x = (x[:, None] if x.ndim == 2 else x).expand(size, batch, -1)
            return x.flatten(0, 1)

        q, q_dim = arguments[0], in_dims[0]
        batch = q.movedim(q_dim, 0).shape[1] if q_dim is not None else q.shape[0]
        merged_arguments = [merged(x, dim) for x, dim in zip(arguments, in_dims, strict=True)]
        out, lse = operator(*merged_arguments, **options)
        out = out.unflatten(0, (size, batch))
        if not options.get("return_lse", False):
            return (out, lse.expand(size, 0)), (0, 0)
        return (out, lse.unflatten(0, (size, batch))), (0, 0)

    return rule


for _name, _function in (("attention", _attention), ("custom_attention", _custom_attention)):
    _operator = getattr(torch.ops.tvm_flash, _name).default
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _function, _key)
    _library.impl(_name, _without_gradients(_operator), "Autograd")
    torch.library.register_fake(f"tvm_flash::{_name}", _shapes, lib=_library)
    if hasattr(torch.library, "register_vmap"):  # since torch 2.5; before, vmap calls one after the other
        torch.library.register_vmap(f"tvm_flash::{_name}", _vmap(_operator), lib=_library)


def _flops(q_shape, k_shape, v_shape, *_, layout="bhsd", **__) -> int:
    """Operations of both products, whatever is masked, as torch counts them for its own attention."""
    heads, queries = (1, 2) if layout == "bhsd" else (2, 1)
    return 2 * q_shape[0] * q_shape[heads] * q_shape[queries] * v_shape[queries] * (q_shape[3] + v_shape[3])


register_flop_formula((torch.ops.tvm_flash.attention, torch.ops.tvm_flash.custom_attention))(_flops)


# Exporters to formats that have no such operator look into this table, as that of ONNX.
torch._decomp.register_decomposition(torch.ops.tvm_flash.attention.default)(torch_decomposed.attention)
