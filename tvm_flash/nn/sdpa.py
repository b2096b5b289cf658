"""``torch.nn.functional.scaled_dot_product_attention``, computed by this package's kernels where they can.

Where they can't (dropout, on a GPU a whole mask at a head_dim beyond 128, a device or dtype without kernels)
torch's own function computes it, and a :class:`FallbackWarning` says why, once for each reason.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa
from torch.overrides import handle_torch_function, has_torch_function

from tvm_flash.call.checks import is_positive_float32
from tvm_flash.call.choice import candidates, choose
from tvm_flash.call.problem import HEAD_DIM_MULTIPLE, Problem
from tvm_flash.errors import ArgumentTypeError, FallbackWarning, TvmFlashError
from tvm_flash.frameworks.torch_watch import has_tangent_below, is_differentiated
from tvm_flash.machine.device import Device
from tvm_flash.nn.attend import WholeMask, attend, fit, order_of, whole_mask_of
from tvm_flash.nn.causal import bottom_right, is_causal_bias, is_of, is_top_left, kind_of, top_left
from tvm_flash.nn.jagged import sequences_of
from tvm_flash.nn.masks import KeyMask, key_mask_of
from tvm_flash.operators import FORWARD, OPERATORS, RAGGED, RAGGED_LAYOUT
from tvm_flash.packs.registry import on_refresh
from tvm_flash.padded import padded_attention

_FLAGS = (bool, torch.SymBool) if hasattr(torch, "SymBool") else (bool,)

_DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Attention with torch's signature and meaning.

    Parameters
    ----------
    query: ``(batch, heads, seqlen_q, head_dim)``, or without the batch or with it alone (three dimensions).
    key, value: ``(batch, heads, seqlen_kv, head_dim)``; with ``enable_gqa`` fewer heads.
    attn_mask: boolean, true where a key is seen, or added to the scores, of any shape that broadcasts to ``(batch,
        heads, seqlen_q, seqlen_kv)``; one of numbers may require a gradient.  On a GPU it is computed here up to a
        head_dim of 128, and beyond if it is the same for all queries and heads (``(batch, 1, 1, seqlen_kv)``, or
        expanded from that), as padding masks are; a row whose numbers are all below -2e38 sees nothing there.
    dropout_p: 0 is computed here.
    is_causal: aligned **top-left**, as torch does: query i sees the keys 0 … i, whatever the lengths.
    scale: of the scores; ``1/sqrt(head_dim)`` if not given.
    enable_gqa: let several query heads read one key head.

    Returns
    -------
    ``(batch, heads, seqlen_q, head_dim_v)``; zeros in a row that sees no key.

    Raises
    ------
    Whatever torch's own function raises for the same arguments; ArgumentTypeError for a mask without memory.

    Notes
    -----
    What is added to all scores of a row changes nothing, and gradients through rows far from 0 are as exact as through
    others; from 5e8 on float32 has one weight for all keys of the largest number, here as in torch.

    Under autocast the tensors are cast, as torch does.  A head_dim that is no multiple of 8 is padded with zeros, which
    copies the tensors; tensors whose rows don't begin at multiples of 16 bytes are copied on a GPU.
    """
    tensors = (query, key, value, attn_mask)
    asked = (query, key, value, attn_mask, dropout_p, is_causal)
    options = {"scale": scale, **({} if enable_gqa is False else {"enable_gqa": enable_gqa})}
    aligned = top_left if is_causal else None
    given = tensors if attn_mask is not None else tensors[:3]
    if not all(isinstance(x, torch.Tensor) for x in given) or not _are_numbers(dropout_p, is_causal, scale, enable_gqa):
        return torch_sdpa(*asked, **options)  # which says what is wrong
    if any(x.is_nested for x in given):
        return _nested(asked, options, enable_gqa)
    if has_torch_function(tensors):  # tensors and modes that answer functions in their own way, and torch.fx
        biased = is_causal_bias(attn_mask) and not has_torch_function((query, key, value))
        if biased and is_of(attn_mask, query, key) and not is_causal:
            attn_mask, aligned = None, top_left if is_top_left(attn_mask) else bottom_right
        elif kinds := ["CausalBias"] if biased else _answer_for_torch(tensors):
            warn_of_fallback(f"{', '.join(kinds)} answers torch's functions in its own way")
            return _torchs(asked, options)
        else:
            return handle_torch_function(scaled_dot_product_attention, tensors, *asked, **options)
    query, key, value = _as_autocast(query, key, value)
    reason = refusal(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if reason is None:
        kind = "full" if aligned is None else kind_of(aligned, query.shape[-2], key.shape[-2])
        mask = None if attn_mask is None else _mask_of(attn_mask, query, key, value, scale)
        reason = mask if isinstance(mask, str) else no_kernel(kind, query, key, value) if mask is None else None
    if reason is not None:
        warn_of_fallback(reason)
        return _torchs(asked, options)
    return _compute(query, key, value, mask, aligned, scale)


def _are_numbers(dropout_p: Any, is_causal: Any, scale: Any, enable_gqa: Any) -> bool:
    """Whether options are of the types that torch's function takes; a tensor as the scale is one if it isn't learnt."""
    learnt = isinstance(scale, torch.Tensor) and (scale.ndim > 0 or scale.requires_grad)
    return dropout_p is not None and not learnt and all(isinstance(x, _FLAGS) for x in (is_causal, enable_gqa))


def _torchs(asked: tuple[Any, ...], options: dict[str, Any]) -> torch.Tensor:
    """torch's own function, also in a program that has put this one in its place."""
    bias = asked[3]
    if is_causal_bias(bias):  # it answers the function that torch.nn.functional has now, and no other
        return bias.__torch_function__(torch.nn.functional.scaled_dot_product_attention, (type(bias),), asked, options)
    return torch_sdpa(*asked, **options)


def _mask_of(
    attn_mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
) -> KeyMask | WholeMask | str:
    """A mask as kernels take it: over keys if it is one, or else of all scores; or why none does."""
    keys = key_mask_of(attn_mask, query, key, scale)
    if not isinstance(keys, str):
        return no_kernel("padded", query, key, value) or keys
    whole = whole_mask_of(attn_mask, query, key)
    if isinstance(whole, str):
        return whole
    ops = (FORWARD, OPERATORS[FORWARD].backward) if is_differentiated(attn_mask) else None
    whole = for_kernels(whole, query, key, value, ops)
    return f"{keys}; {whole}" if isinstance(whole, str) else whole


def _answer_for_torch(tensors: tuple[torch.Tensor | None, ...]) -> list[str]:
    """The kinds of tensors that know torch's own function, and not this one."""
    usual = torch.Tensor.__torch_function__.__func__
    answers = {
        type(x): getattr(type(x).__torch_function__, "__func__", usual) for x in tensors if isinstance(x, torch.Tensor)
    }
    return sorted(kind.__name__ for kind, answer in answers.items() if answer is not usual)


def _as_autocast(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
    """Tensors as autocast hands them on: float64, and what is on another kind of device, stays as it is."""
    kind = tensors[0].device.type
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    others = (not x.is_floating_point() or x.dtype is torch.float64 or x.device.type != kind for x in tensors)
    return [x if other else x.to(dtype) for x, other in zip(tensors, others, strict=True)]


def refusal(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa) -> str | None:
    """Why torch must compute a call, as far as that doesn't depend on the mask and on the kernels."""
    if dropout_p:
        return "dropout_p isn't 0, and these kernels have no dropout"
    if any(map(has_tangent_below, (query, key, value))):
        return "a forward-mode derivative is asked for, and these kernels have gradients in reverse mode only"
    shapes = q, k, v = query.shape, key.shape, value.shape
    if not (len(q) == len(k) == len(v) and len(q) in (3, 4)):
        return f"the tensors have {', '.join(str(len(x)) for x in shapes)} dimensions, expected 4, or 3, of each"
    if not query.dtype == key.dtype == value.dtype:
        return f"the dtypes differ: {query.dtype}, {key.dtype}, {value.dtype}"
    if not query.device == key.device == value.device:
        return f"the devices differ: {query.device}, {key.device}, {value.device}"
    if scale is not None and not is_positive_float32(scale):
        return f"scale is {scale}, and these kernels take positive float32 ones"
    if attn_mask is not None and attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        return f"attn_mask is {attn_mask.dtype}, and query {query.dtype}"
    if attn_mask is not None and attn_mask.device != query.device:
        if attn_mask.is_meta:  # torch would give what happens to lie in memory
            raise ArgumentTypeError(f"attn_mask: is on meta, expected {query.device}, where query is; move it")
        return f"attn_mask is on {attn_mask.device}, and query on {query.device}"
    if is_causal and attn_mask is not None:
        return "attn_mask and is_causal are both given"
    if q[-1] != k[-1] or k[-2] != v[-2] or k[-3] != v[-3] or 0 in (q[-1], v[-1]):
        return "the shapes don't fit"
    heads, kv_heads = q[-3], k[-3]
    if heads != kv_heads and not (enable_gqa and kv_heads and heads % kv_heads == 0):
        return f"query has {heads} heads and key {kv_heads}"
    return None


def _nested(asked: tuple[Any, ...], options: dict[str, Any], enable_gqa: bool) -> torch.Tensor:
    """Sequences of different lengths, by their kernels if the tensors are jagged, or else by torch."""
    query, key, value, attn_mask, dropout_p, is_causal = asked
    scale, reason = options["scale"], None if attn_mask is None else "the tensors are nested, and there is a mask"
    if reason is None:
        found = sequences_of(*_as_autocast(query, key, value), is_causal)
        reason = found if isinstance(found, str) else None
    if reason is None:
        heads_first = (x.transpose(0, 1) for x in found.rows)
        reason = refusal(*heads_first, None, dropout_p, is_causal, scale, enable_gqa)
    if reason is None:
        reason = no_kernel("causal" if is_causal else "full", *found.rows, ragged=True)
    if reason is None:
        return found.attend(is_causal, scale)
    warn_of_fallback(reason)
    return torch_sdpa(*asked, **options)


def no_kernel(
    mask: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score: str = "identity",
    ops: tuple[str, ...] | None = None,
    ragged: bool = False,
) -> str | None:
    """Why no kernel computes a kind of call, and its gradients where they are required; None if one does.

    ``ops`` are the operators, where a caller knows which it needs; ``ragged`` says that sequences of different lengths
    lie one after the other.
    """
    device, sizes = query.device, (query.shape[-1], value.shape[-1])
    if ops is None:
        forward = RAGGED if ragged else FORWARD
        differentiated = any(map(is_differentiated, (query, key, value)))
        ops = (forward, OPERATORS[forward].backward) if differentiated else (forward,)
    for op in ops:
        why = "a gradient is required, and " if OPERATORS[op].differentiates else ""
        limits = _limits(mask, score, device.type, device.index or 0, query.dtype, op)
        if isinstance(limits, str):
            return why + limits
        if not any(sizes[0] <= head_dim and sizes[1] <= head_dim_v for head_dim, head_dim_v in limits):
            return f"{why}there are kernels for head dimensions up to {limits} only"
    return None


def for_kernels(
    mask: WholeMask, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ops: tuple[str, ...] | None = None
) -> WholeMask | str:
    """A mask as there are kernels for it, or why there are none for a call with it; ``ops`` as for
    :func:`no_kernel`."""
    reason = no_kernel(mask.kind[0], query, key, value, mask.kind[1], ops)
    is_worth_it = reason is not None or (query.device.type == "cuda" and mask.is_small(query, key))
    if mask.has_16_bits and is_worth_it and no_kernel("full", query, key, value, "biased", ops) is None:
        return mask.wider()
    return mask if reason is None else reason


@torch.compiler.assume_constant_result
def _limits(
    mask: str, score: str, kind: str, index: int, dtype: torch.dtype, op: str
) -> tuple[tuple[int, int], ...] | str:
    """``(head_dim, head_dim_v)`` of the kernels of an operator, or why there are none; a compiled program asks once."""
    return _look_up(mask, score, kind, index, dtype, op)


@functools.lru_cache(maxsize=1024)
def _look_up(
    mask: str, score: str, kind: str, index: int, dtype: torch.dtype, op: str
) -> tuple[tuple[int, int], ...] | str:
    if kind not in ("cpu", "cuda") or dtype not in _DTYPES:
        return f"there are no kernels for {dtype} on {kind}"
    sizes = (1, 1, 1, 1, 1, HEAD_DIM_MULTIPLE, HEAD_DIM_MULTIPLE)
    layout = RAGGED_LAYOUT if OPERATORS[op].starts else "bhsd"
    problem = Problem(*sizes, dtype=_DTYPES[dtype], layout=layout, mask=mask, score=score, op=op)
    device = Device(kind, index)
    try:
        choose(problem, device, "auto")
    except TvmFlashError as e:
        return str(e)
    kernels = [k.entry for arch in device.archs() for k in candidates(arch, problem)]
    fitting = [e for e in kernels if e.mask in problem.masks and e.score in problem.scores]
    return tuple(sorted({(e.head_dim, e.head_dim_v) for e in fitting}))


on_refresh(_look_up.cache_clear)


@torch.compiler.assume_constant_result
def warn_of_fallback(reason: str) -> None:
    """Say once that torch computes something, and why; in a compiled program, while it is compiled."""
    if reason not in _warned:
        text = f"tvm_flash leaves this to torch's own attention: {reason}"
        warnings.warn(text, FallbackWarning, stacklevel=3)
        _warned.add(reason)


_warned: set[str] = set()


#: Dimensions in the order of their strides, the largest first.
_HEADS_APART, _HEADS_SIDE_BY_SIDE = (0, 1, 2, 3), (0, 2, 1, 3)


def _order(query: torch.Tensor) -> tuple[int, ...]:
    """How the dimensions of a result lie, which is how the query's do, as with torch: models view one as the other."""
    if torch.compiler.is_compiling():  # sizes may be symbols there, which can be compared and not sorted
        return _HEADS_SIDE_BY_SIDE if query.stride(1) < query.stride(2) else _HEADS_APART
    order = order_of(query)
    return order if order[3] == 3 else _HEADS_APART


def _compute(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: KeyMask | WholeMask | None,
    aligned: Callable | None,
    scale: float | None,
) -> torch.Tensor:
    whole = query.ndim == 4
    if not whole:  # (heads, seqlen, head_dim)
        query, key, value = query[None], key[None], value[None]
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        batch = torch.broadcast_shapes(query.shape[:1], key.shape[:1], value.shape[:1])
        query, key, value = (x.expand(*batch, -1, -1, -1) for x in (query, key, value))
    head_dim, head_dim_v = query.shape[-1], value.shape[-1]
    if scale is not None:
        scale = float(scale)
    elif head_dim % HEAD_DIM_MULTIPLE:  # else the kernels' own is the same, also in a program for any head_dim
        scale = 1 / math.sqrt(head_dim)
    order = _order(query)
    layout = "bshd" if order == _HEADS_SIDE_BY_SIDE else "bhsd"
    query, key, value = fit(query), fit(key), fit(value)
    if isinstance(mask, WholeMask):
        call = functools.partial(mask.attend, layout)
    elif mask is not None:
        key, value = mask.arrange(key), mask.arrange(value)
        call = functools.partial(padded_attention, layout=layout, key_range=mask.key_range())
    else:
        key, value, options = aligned(query, key, value) if aligned else (key, value, {})
        call = functools.partial(padded_attention if "key_range" in options else attend, layout=layout, **options)
    if layout == "bshd":
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    out = call(q=query, k=key, v=value, softmax_scale=scale)
    out = out.transpose(1, 2) if layout == "bshd" else out
    if head_dim_v % HEAD_DIM_MULTIPLE or order not in (_HEADS_APART, _HEADS_SIDE_BY_SIDE):
        back = tuple(map(order.index, range(4)))
        out = out[..., :head_dim_v].permute(order).contiguous().permute(back)
    return out if whole else out[0]


# TorchScript compiles the text of functions, and takes torch's operator for this one.
if hasattr(getattr(torch.jit, "_builtins", None), "_register_builtin"):
    torch.jit._builtins._register_builtin(scaled_dot_product_attention, "aten::scaled_dot_product_attention")
