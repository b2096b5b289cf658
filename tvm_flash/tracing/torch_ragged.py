"""Sequences of different lengths as operators of PyTorch: what programs call in place of ``flash_attention_varlen``.

Importing this module registers ``torch.ops.tvm_flash.attention_varlen`` and its backward, and ``attention_paged``, of
which there are no gradients; and the same of definitions of the user's own, ``custom_attention_varlen`` and so on.
Values that are the first elements of keys, ``attention_paged_latent``, are the package's own definition only.
What is said of the other operators in :mod:`tvm_flash.tracing.torch_ops` holds here too.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from tvm_flash.call.paged import check_paged
from tvm_flash.call.ragged import count_sequences
from tvm_flash.call.signature import Options, signature
from tvm_flash.errors import NotSupportedError
from tvm_flash.frameworks import TensorView, contiguous_strides
from tvm_flash.frameworks.torch import name_of
from tvm_flash.operators import (
    OPERATORS,
    PAGED,
    PAGED_LATENT,
    PAGED_PARAMETERS,
    PAGED_SCALED,
    RAGGED,
    RAGGED_BACKWARD,
    RAGGED_LAYOUT,
)
from tvm_flash.packs.manifest import BUILTIN_DEFINITION
from tvm_flash.tracing import torch_decomposed, torch_inductor, torch_ops
from tvm_flash.tracing.torch_checks import check_call, check_kinds, check_options, check_places, check_shapes, is_known
from tvm_flash.tracing.torch_gradients import Pair, below, is_recorded, record, record_once
from tvm_flash.tracing.torch_ops import check_kernel, declared_of, readable, with_kinds_named, written

_STARTS = OPERATORS[RAGGED].starts
_ON_PAGES = (PAGED, PAGED_SCALED, PAGED_LATENT)
_PARAMETERS = dict.fromkeys((RAGGED, RAGGED_BACKWARD), ("alibi_slopes", "sinks"))
_PARAMETERS |= {**dict.fromkeys(_ON_PAGES, PAGED_PARAMETERS), PAGED_LATENT: ()}

_NUMBERS = (
    "float? softmax_scale=None, bool causal=False, int? window_left=None, int? window_right=None, float softcap=0.0"
)
#: What follows the tensors of an operator: parameters and options of the package's own definition, and of others.
_SLOPES = "Tensor? alibi_slopes=None, Tensor? sinks=None, "
_OF_BUILTIN = dict.fromkeys((RAGGED, RAGGED_BACKWARD), f"{_SLOPES}*, {_NUMBERS}")
_OF_BUILTIN |= dict.fromkeys(_ON_PAGES, f"{_SLOPES}Tensor? kv_start=None, *, {_NUMBERS}")
_OF_BUILTIN[PAGED_LATENT] = f"*, int head_dim_v, int? split_length=None, {_NUMBERS}"
_OF_CUSTOM = (
    "Tensor[] parameters, float[] numbers, *, str name, str[] parameter_names, str[] number_names, "
    "float? softmax_scale=None"
)
_TENSORS = {
    RAGGED: "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k",
    RAGGED_BACKWARD: "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse, "
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k",
    PAGED: "Tensor q, Tensor k_cache, Tensor v_cache, Tensor cu_seqlens_q, Tensor seqlens_k, Tensor page_table",
}
_TENSORS[PAGED_SCALED] = f"{_TENSORS[PAGED]}, Tensor k_scale, Tensor v_scale"
_TENSORS[PAGED_LATENT] = "Tensor q, Tensor kv_cache, Tensor cu_seqlens_q, Tensor seqlens_k, Tensor page_table"
_LAST = {
    RAGGED: "bool return_lse=False) -> (Tensor, Tensor)",
    # dq, dk, dv, and the gradients of parameters that are asked for, for each sequence and head where they have such
    RAGGED_BACKWARD: "str[] gradients) -> Tensor[]",
    **dict.fromkeys(_ON_PAGES, "int? max_seqlen_q=None, bool return_lse=False) -> (Tensor, Tensor)"),
}
_NAMES = {
    RAGGED: "attention_varlen",
    RAGGED_BACKWARD: "attention_varlen_backward",
    PAGED: "attention_paged",
    PAGED_SCALED: "attention_paged_scaled",
    PAGED_LATENT: "attention_paged_latent",
}


def _prefixes(op: str) -> tuple[str, ...]:
    """Of the operator's names: none, and that of the user's own definitions, where they have it."""
    return ("",) if op == PAGED_LATENT else ("", "custom_")


_library = torch.library.Library("tvm_flash", "FRAGMENT")
_tags = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)
for _op, _name in _NAMES.items():
    for _prefix in _prefixes(_op):
        _rest = _OF_CUSTOM if _prefix else _OF_BUILTIN[_op]
        _library.define(f"{_prefix}{_name}({_TENSORS[_op]}, {_rest}, {_LAST[_op]}", tags=_tags)
_DECOMPOSED = {
    RAGGED: torch_decomposed.attention_varlen,
    PAGED: torch_decomposed.attention_paged,
    PAGED_SCALED: torch_decomposed.attention_paged_scaled,
    PAGED_LATENT: torch_decomposed.attention_paged_latent,
}


def _operator(op: str, custom: bool = False) -> Any:
    """An operator of PyTorch, of a definition of the user's own if it is ``custom``."""
    return getattr(torch.ops.tvm_flash, f"custom_{_NAMES[op]}" if custom else _NAMES[op])


def attention(options: Options, tensors: Mapping[str, Any]) -> Any:
    """:func:`tvm_flash.call.dispatch.attention` by way of the operators.

    Raises
    ------
    TvmFlashError: an argument is wrong, or of a kind that the operators don't know.
    """
    return with_kinds_named(program, options, tensors)


def recorded(options: Options, tensors: Mapping[str, Any], call: tuple | None) -> Any:
    """:func:`tvm_flash.tracing.torch_ops.recorded` of these operators.

    Raises
    ------
    NotSupportedError: keys lie on pages.
    """
    if options.op in _ON_PAGES:
        _refuse_gradients(tensors)
    return torch_ops.recorded(options, tensors, call, traced=attention)


def _refuse_gradients(tensors: Mapping[str, Any]) -> None:
    asked_of = ", ".join(name for name, x in tensors.items() if x is not None and x.requires_grad)
    raise NotSupportedError(
        f"{asked_of}: a gradient is required, and of keys on pages there is none; call under torch.no_grad(), or use "
        f"flash_attention_varlen"
    )


def program(options: Options, tensors: Mapping[str, Any]) -> Any:
    """The same as ``torch.compile`` traces it."""
    check_kinds(tensors)
    options = check_options(options)
    if any(type(x).__name__ == "DTensor" for x in tensors.values()):
        raise NotSupportedError(
            "q: is a DTensor, whose shards know nothing of where sequences begin; pass q.to_local() and its own starts"
        )
    if not torch.compiler.is_compiling():
        check_call(options, tensors)
    operator = OPERATORS[options.op]
    outputs = operator.all_outputs(options.gradients)
    own = {"gradients": list(options.gradients)} if operator.differentiates else {"return_lse": options.flag}
    own |= {"max_seqlen_q": options.longest} if options.op in _ON_PAGES else {}
    if operator.values_in_keys:
        own |= {"head_dim_v": options.head_dim_v, "split_length": options.split_length}
    own |= {"softmax_scale": options.softmax_scale}
    inputs = [tensors[name] for name in operator.inputs]
    inputs += [tensors.get(name) for name in (*operator.optional, *operator.starts)]
    if options.definition == BUILTIN_DEFINITION:
        compute = _operator(options.op)
        if options.op in _DECOMPOSED and torch_ops.is_for_onnx():
            compute = _DECOMPOSED[options.op]
        left, right = options.window_size
        results = compute(
            *inputs,
            *(tensors.get(name) for name in _PARAMETERS[options.op]),
            causal=options.causal,
            window_left=left,
            window_right=right,
            softcap=options.softcap,
            **own,
        )
    else:
        custom = _operator(options.op, custom=True)
        results = torch_ops.of_definition(custom, inputs, tensors, outputs, options, own)
    count = len(outputs) + (len(operator.on_request) if options.flag else 0)
    results = [results[i] for i in range(count)]
    for i, name in enumerate(outputs):
        if name in tensors:
            results[i] = written(name, tensors[name], results[i])
    return results[0] if count == 1 else tuple(results)


# ---------------------------------------------------------------- on real tensors


def _builtin(
    op, *tensors, return_lse=False, gradients=(), max_seqlen_q=None, head_dim_v=None, split_length=None, **options
):
    given = len(OPERATORS[op].all_inputs) + len(_PARAMETERS[op])
    tensors = (*tensors, *[None] * (given - len(tensors)))
    scale, *rest = _numbers(**options)
    what = {"parameters": _PARAMETERS[op]}
    of_latents = (head_dim_v, split_length) if OPERATORS[op].values_in_keys else ()
    return _run(op, what, tensors, scale, rest, return_lse, gradients, max_seqlen_q, of_latents)


def _custom(
    op, *arguments, name, parameter_names, number_names, softmax_scale=None, return_lse=False, gradients=(),
    max_seqlen_q=None,
):  # fmt: skip
    *tensors, parameters, numbers = arguments
    what = {"definition": name, "parameters": tuple(parameter_names), "scalars": tuple(number_names)}
    tensors = (*tensors, *parameters)
    return _run(op, what, tensors, softmax_scale, numbers, return_lse, gradients, max_seqlen_q)


def _run(op, what, tensors, softmax_scale, numbers, return_lse, gradients, max_seqlen_q, of_latents=()):
    operator, gradients = OPERATORS[op], tuple(gradients)
    made_for = {"op": op, "below": True, "gradients": gradients, "layout_known": True}
    compute = signature(RAGGED_LAYOUT, **what, **made_for).call
    outputs = [None] * len(operator.all_outputs(gradients))
    numbers = (softmax_scale, *numbers, *((max_seqlen_q,) if op in _ON_PAGES else ()), *of_latents)
    if operator.differentiates:
        return list(compute(*readable(*tensors[:7]), *tensors[7:], *outputs, "auto", False, *numbers))
    result = compute(*tensors, *outputs, "auto", return_lse, *numbers)
    return result if return_lse else (result, tensors[0].new_empty(0, dtype=torch.float32))


def _numbers(softmax_scale=None, causal=False, window_left=None, window_right=None, softcap=0.0):
    """The options of a call; a dispatcher leaves those out that have their defaults."""
    window = tuple(-1 if x is None else x for x in (window_left, window_right))
    return softmax_scale, causal, window, softcap


# ---------------------------------------------------------------- on fake tensors


def _check(q, k, v, starts, *others):
    check_shapes(RAGGED_LAYOUT, q, k, v, *starts, *others)
    if all(map(is_known, starts)):
        count_sequences(_views(_STARTS, starts))


def _views(names, tensors):
    """What checks need of fake tensors, by name."""
    shapes = [tuple(x.shape) for x in tensors]
    return {
        name: TensorView(shape, contiguous_strides(shape), name_of(x.dtype), "cpu", 0, pointer=0)
        for name, shape, x in zip(names, shapes, tensors, strict=True)
    }


def _shapes(q, k, v, cu_seqlens_q, cu_seqlens_k, *others, return_lse=False, **_):
    _check(q, k, v, (cu_seqlens_q, cu_seqlens_k), *others)
    out = q.new_empty((*q.shape[:2], v.shape[2]))
    return out, q.new_empty((q.shape[1], q.shape[0]) if return_lse else (0,), dtype=torch.float32)


def _paged_shapes(op, q, *others, return_lse=False, max_seqlen_q=None, head_dim_v=None, split_length=None, **__):
    check_places(q, *others)
    names = OPERATORS[op].all_inputs
    tensors = (q, *others)[: len(names)]
    if all(map(is_known, tensors)):
        check_paged(_views(names, tensors), max_seqlen_q, head_dim_v, split_length)
    columns = others[1].shape[3] if head_dim_v is None else head_dim_v
    out = q.new_empty((*q.shape[:2], columns))
    return out, q.new_empty((q.shape[1], q.shape[0]) if return_lse else (0,), dtype=torch.float32)


def _backward_shapes(
    dout, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, *others, gradients=(), name=BUILTIN_DEFINITION,
    parameter_names=(), **_,
):  # fmt: skip
    _check(q, k, v, (cu_seqlens_q, cu_seqlens_k), dout, out, lse, dlse, *others)
    heads, declared = (cu_seqlens_q.shape[0] - 1, q.shape[1]), declared_of(name) if gradients else {}
    given = dict(zip(parameter_names, others[-2], strict=True)) if parameter_names else {}
    shapes = [given[x].shape if declared[x].rank else heads if declared[x].axes else (1,) for x in gradients]
    return [*(x.new_empty(x.shape) for x in (q, k, v)), *(q.new_empty(s, dtype=torch.float32) for s in shapes)]


# ---------------------------------------------------------------- gradients


def _forward_where_autograd_listens(custom, q, k, v, cu_seqlens_q, cu_seqlens_k, *rest, **options):
    forward, backward = (_operator(op, custom).default for op in (RAGGED, RAGGED_BACKWARD))
    starts = cu_seqlens_q, cu_seqlens_k
    if custom:
        (parameters, *numbers), names = rest, options["parameter_names"]
    else:
        parameters, numbers, names = (*rest, *[None] * (len(_PARAMETERS[RAGGED]) - len(rest))), [], _PARAMETERS[RAGGED]
    if not is_recorded((q, k, v, *parameters)):
        return below(forward, q, k, v, *starts, *rest, **options)
    own = {name: x for name, x in options.items() if name != "return_lse"}

    def flat(*tensors):
        """Arguments of an operator, of tensors that all come by themselves."""
        before = len(tensors) - len(names)
        return (*tensors[:before], list(tensors[before:]), *numbers) if custom else tensors

    def check(q, k, v, parameters, wanted):
        check_kernel(_asked(own), q, k, v, parameters, wanted)

    pair = Pair(
        lambda *tensors: below(forward, *flat(*tensors), **own, return_lse=True),
        lambda *tensors, gradients: backward(*flat(*tensors), **own, gradients=gradients),
        (*_STARTS, *names),
        declared_of(options.get("name", BUILTIN_DEFINITION)),
        asked=options.get("return_lse", False),
        check=check,
    )
    return record(pair, q, k, v, *starts, *parameters)


def _asked(options: Mapping[str, Any]) -> Options:
    """What a call of an operator asks for, as kernels are chosen by it."""
    if "name" in options:
        scale = options.get("softmax_scale")
        return Options(RAGGED_LAYOUT, "auto", False, scale, definition=options["name"], op=RAGGED)
    return Options(RAGGED_LAYOUT, "auto", False, *_numbers(**options), op=RAGGED)


def _backward_where_autograd_listens(custom, *arguments, **options):
    backward = _operator(RAGGED_BACKWARD, custom).default
    if not is_recorded(_flat(custom, arguments)):
        return below(backward, *arguments, **options)
    return record_once(backward, *arguments, **options)


def _paged_where_autograd_listens(op, custom, *arguments, **options):
    tensors = _flat(custom, arguments)
    if is_recorded(tensors):
        names = options["parameter_names"] if custom else PAGED_PARAMETERS
        _refuse_gradients(dict(zip((*OPERATORS[op].all_inputs, *names), tensors, strict=False)))
    return below(_operator(op, custom).default, *arguments, **options)


def _flat(custom, arguments):
    """The tensors among the arguments of an operator."""
    return (*arguments[:-2], *arguments[-2]) if custom else arguments


def _refuse_vmap(info, in_dims, *arguments, **options):
    raise NotSupportedError(
        "q, k, v: are mapped by torch.vmap, and sequences of different lengths can't be; they are a batch already: "
        "give all of them in one call"
    )


def _refuse_mapped_gradients(*arguments, **options):
    """By torch's older map, which autograd has for ``is_grads_batched`` and ``vectorize``."""
    raise NotSupportedError(
        "dout: is mapped (is_grads_batched=True, vectorize=True), and sequences of different lengths can't be; ask for "
        "one gradient after the other"
    )


_LISTENING = {
    RAGGED: _forward_where_autograd_listens,
    RAGGED_BACKWARD: _backward_where_autograd_listens,
    **{op: functools.partial(_paged_where_autograd_listens, op) for op in _ON_PAGES},
}
_FAKE = {RAGGED: _shapes, RAGGED_BACKWARD: _backward_shapes}
_FAKE |= {op: functools.partial(_paged_shapes, op) for op in _ON_PAGES}
for _op, _name in _NAMES.items():
    for _prefix in _prefixes(_op):
        _compute = _custom if _prefix else _builtin
        for _key in ("CPU", "CUDA"):
            _library.impl(_prefix + _name, functools.partial(_compute, _op), _key)
        _library.impl(_prefix + _name, functools.partial(_LISTENING[_op], bool(_prefix)), "Autograd")
        _fake = torch_inductor.traced(_FAKE[_op])
        torch.library.register_fake(f"tvm_flash::{_prefix}{_name}", _fake, lib=_library)
        if hasattr(torch.library, "register_vmap"):  # since torch 2.5
            torch.library.register_vmap(f"tvm_flash::{_prefix}{_name}", _refuse_vmap, lib=_library)
        if _op == RAGGED_BACKWARD:
            _library.impl(_prefix + _name, _refuse_mapped_gradients, "Batched")


# ---------------------------------------------------------------- what is said of the operators elsewhere


def _lengths(starts) -> list[int] | None:
    """Lengths of sequences, None where nobody knows them yet."""
    return None if starts.is_meta or type(starts) is not torch.Tensor else starts.diff().tolist()


def _products(q, k, cu_seqlens_q, cu_seqlens_k) -> int:
    """Operations of a product of all queries and keys of each sequence, for each element of a head.

    Where lengths aren't known, each sequence could have all rows: what is counted then is the most that it can be.
    """
    lengths = _lengths(cu_seqlens_q), _lengths(cu_seqlens_k)
    pairs = q.shape[0] * k.shape[0] if None in lengths else sum(a * b for a, b in zip(*lengths, strict=True))
    return 2 * q.shape[1] * pairs


def _flops(q, k, v, cu_seqlens_q, cu_seqlens_k, *_, out_val=None, **__) -> int:
    """Operations of both products, whatever is masked, as torch counts them for its own attention."""
    return _products(q, k, cu_seqlens_q, cu_seqlens_k) * (q.shape[2] + v.shape[2])


def _backward_flops(dout, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, *_, out_val=None, **__) -> int:
    """Those of the five products of a backward."""
    return _products(q, k, cu_seqlens_q, cu_seqlens_k) * (3 * q.shape[2] + 2 * v.shape[2])


def _paged_products(q, k_cache, cu_seqlens_q, seqlens_k, page_table) -> int:
    """Operations of a product of the queries and keys that each sequence has, for each element of a head."""
    lengths = _lengths(cu_seqlens_q)
    if lengths is None:
        pairs = q.shape[0] * page_table.shape[1] * k_cache.shape[1]
    else:
        pairs = sum(a * b for a, b in zip(lengths, seqlens_k.tolist(), strict=True))
    return 2 * q.shape[1] * pairs


def _paged_flops(q, k_cache, v_cache, cu_seqlens_q, seqlens_k, page_table, *_, out_val=None, **__) -> int:
    """Operations of both products over keys on pages."""
    return _paged_products(q, k_cache, cu_seqlens_q, seqlens_k, page_table) * (q.shape[2] + v_cache.shape[3])


def _latent_flops(q, kv_cache, *places, head_dim_v, out_val=None, **__) -> int:
    """The same where values are in keys."""
    return _paged_products(q, kv_cache, *places) * (q.shape[2] + head_dim_v)


_FLOPS = {RAGGED: _flops, RAGGED_BACKWARD: _backward_flops, PAGED: _paged_flops, PAGED_SCALED: _paged_flops}
_FLOPS |= {PAGED_LATENT: _latent_flops}
for _op, _formula in _FLOPS.items():
    register_flop_formula([_operator(_op, bool(prefix)) for prefix in _prefixes(_op)], get_raw=True)(_formula)
for _op, _decomposed in _DECOMPOSED.items():
    torch_inductor.decompose(_operator(_op).default, _decomposed)
