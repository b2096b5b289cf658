"""Under PyTorch's own attention: the implementation ``"tvm_flash"`` of its registry, and the same for the CPU.

Importing this makes the name known to ``torch.nn.attention.activate_flash_attention_impl`` (torch 2.11 and later),
which then puts these kernels in the place of FlashAttention's under ``scaled_dot_product_attention``, ``varlen_attn``
and ``context_parallel``, forward and backward, until ``restore_flash_attention_impl``.  What torch has on CPUs is
replaced in a block ``with on_cpu():``.

What these kernels don't compute (dropout, float64, …) goes to the kernel that was there before, and
a :class:`tvm_flash.nn.FallbackWarning` says why, once for each reason.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

import tvm_flash.tracing.torch_ops
import tvm_flash.tracing.torch_ragged  # noqa: F401 (they register operators)
from tvm_flash.backward import (
    flash_attention_backward,
    flash_attention_v2_backward,
    padded_attention_backward,
)
from tvm_flash.call.checks import is_positive_float32
from tvm_flash.errors import NotSupportedError
from tvm_flash.nn.attend import WholeMask, attend, fit, order_of, whole_mask_of
from tvm_flash.nn.causal import top_left
from tvm_flash.nn.far_rows import rows_of
from tvm_flash.nn.masks import KeyMask, key_mask_of
from tvm_flash.nn.sdpa import for_kernels, no_kernel, warn_of_fallback
from tvm_flash.operators import BACKWARD, FORWARD, PAGED, RAGGED, RAGGED_BACKWARD
from tvm_flash.padded import padded_attention

#: The name in torch's registry.
NAME = "tvm_flash"

_BACKWARDS = {"bhsd": flash_attention_backward, "bshd": flash_attention_v2_backward}


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Have these kernels compute what ``scaled_dot_product_attention`` does on CPUs, in the whole process.

    Raises
    ------
    NotSupportedError: this version of torch has no ``torch.library.get_kernel``, which 2.9 brought.
    """
    handle = _Replacement("CPU", _CPU)
    try:
        yield
    finally:
        handle.remove()


class _Replacement:
    """Functions in the place of torch's kernels for a dispatch key, until :meth:`remove`."""

    def __init__(self, key: str, functions: dict[str, Callable]):
        if not hasattr(torch.library, "get_kernel"):
            raise NotSupportedError(
                f"torch {torch.__version__}: its kernels can't be called once they are replaced; "
                "install torch 2.11 or later, or call tvm_flash.nn.scaled_dot_product_attention"
            )
        if key == "CUDA" and not torch.backends.cuda.is_built():
            raise NotSupportedError(
                f"torch {torch.__version__}: was built without CUDA and has no kernels to replace; "
                "on CPUs: with tvm_flash.integrations.pytorch.on_cpu(): …"
            )
        self._library = torch.library.Library("aten", "IMPL", key)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"(?s).*Overriding a previously registered kernel")
            for name, function in functions.items():
                if not hasattr(torch.ops.aten, name):  # an operator of a later version
                    continue
                before = torch.library.get_kernel(f"aten::{name}", key)
                replacement = functools.partial(_call, function, before)
                self._library.impl(name, replacement, key, with_keyset=True)

    def remove(self) -> None:
        """Let torch's own kernels compute again."""
        self._library._destroy()


def _call(function: Callable, before: Any, keyset: Any, *args: Any, **kwargs: Any) -> Any:
    """What a function of this module computes, or, where it gives a reason instead, what torch did before."""
    with torch.no_grad():  # torch has its own derivative of the operator
        result = function(*args, **kwargs)
    if isinstance(result, str):
        warn_of_fallback(result)
        return before.call_boxed(keyset, *args, **kwargs)
    return result


# ---------------------------------------------------------------- attention, and its gradients


def _refusal(op: str, mask: str, dropout_p: float, scale: float | None, q, k, v, score="identity") -> str | None:
    """Why a call goes to the kernel that was there before."""
    if dropout_p:
        return "dropout_p isn't 0, and these kernels have no dropout"
    if scale is not None and not is_positive_float32(scale):
        return f"scale is {scale}, and these kernels take positive float32 ones"
    if 0 in (*q.shape, *k.shape, *v.shape):
        return "there are no queries, keys or head dimensions"
    return no_kernel(mask, q, k, v, score, ops=(op,))


def _kind(causal: bool, window: tuple[int, int]) -> str:
    return "window" if window != (-1, -1) else "causal" if causal else "full"


def _layout(query: torch.Tensor) -> str:
    """Which layout a query ``(batch, heads, seq, head_dim)`` has in memory."""
    return "bshd" if query.stride(1) < query.stride(2) else "bhsd"


def _swapped(layout: str, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Tensors ``(batch, heads, seq, head_dim)`` in a layout, or back."""
    return [x.transpose(1, 2) if layout == "bshd" else x for x in tensors]


def _laid_out(result: torch.Tensor, size: int, x: torch.Tensor) -> torch.Tensor:
    """The first ``size`` elements of the last dimension, laid out as ``empty_like(x)``, which torch counts on."""
    result = result[..., :size]
    place = torch.empty_permuted(tuple(result.shape), order_of(x), dtype=result.dtype, device=result.device)
    return result if result.stride() == place.stride() else place.copy_(result)


def _forward(q, k, v, *, scale=None, mask: KeyMask | WholeMask | None = None, **options):
    """The result, laid out as q, and its log-sum-exp, float32 ``(batch, heads, seqlen_q)``.

    The tensors are ``(batch, heads, seq, head_dim)``, and a causal mask is aligned bottom-right.
    """
    layout, size = _layout(q), v.shape[-1]
    options |= {"softmax_scale": 1 / math.sqrt(q.shape[-1]) if scale is None else scale, "return_lse": True}
    tensors = _swapped(layout, fit(q), fit(k), fit(v))
    if isinstance(mask, WholeMask):
        out, lse = torch.ops.tvm_flash.attention(*tensors, **{mask.name: mask.values}, layout=layout, **options)
    elif mask is not None:
        out, lse = padded_attention(*tensors, mask.key_range(), layout=layout, **options)
    else:
        out, lse = attend(layout, *tensors, **options)
    (out,) = _swapped(layout, out)
    return _laid_out(out, size, q), lse


def _backward(dout, q, k, v, out, lse, *, scale=None, mask: KeyMask | WholeMask | None = None, **options):
    """Gradients of q, k and v, laid out as they are; the arguments are those of :func:`_forward`."""
    layout = _layout(q)
    if isinstance(mask, WholeMask) and mask.name == "bias":
        rows = rows_of(mask.values, k.shape[2])
        if rows.moved:  # the log-sum-exp, and with it the result, has too few digits
            mask = WholeMask(rows.bias)
            out, lse = _forward(q, k, v, scale=scale, mask=mask)
        dout = rows.shared(dout)
    options["softmax_scale"] = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    tensors = (*_swapped(layout, *(fit(x) for x in (dout, q, k, v, out))), lse.contiguous())
    if isinstance(mask, WholeMask):
        options |= {mask.name: mask.values, "layout": layout, "gradients": []}
        found = torch.ops.tvm_flash.attention_backward(*tensors, **options)
    elif mask is not None:
        found = padded_attention_backward(*tensors, mask.key_range(), layout=layout, **options)
    else:
        found = _BACKWARDS[layout](*tensors, **options)
    return tuple(_laid_out(x, of.shape[-1], of) for x, of in zip(_swapped(layout, *found), (q, k, v), strict=True))


# ---------------------------------------------------------------- operators of torch on CPUs


def _cpu_forward(query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    refused, key, value, options = _cpu_call(FORWARD, query, key, value, dropout_p, is_causal, attn_mask, scale)
    if refused:
        return refused
    out, lse = _forward(query, key, value, scale=scale, **options)
    return out, lse.transpose(1, 2).contiguous().transpose(1, 2)  # as torch's own lies


def _cpu_backward(grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, *, attn_mask=None, scale=None):
    refused, keys, values, options = _cpu_call(BACKWARD, query, key, value, dropout_p, is_causal, attn_mask, scale)
    if refused:
        return refused
    dq, dk, dv = _backward(grad_out, query, keys, values, out, logsumexp, scale=scale, **options)
    beyond = key.shape[2] - keys.shape[2]  # keys after the last query have no gradient
    padded = (torch.nn.functional.pad(x, (0, 0, 0, beyond)) if beyond else x for x in (dk, dv))
    # As torch's own lie, whatever q, k and v do: a compiled program counts on it.
    return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (dq, *padded))


def _cpu_call(op, query, key, value, dropout_p, is_causal, attn_mask, scale):
    """Why torch must compute a call, if it must; keys, values and options of these functions."""
    options: dict[str, Any] = {}
    if attn_mask is not None:
        mask = "attn_mask and is_causal are both given" if is_causal else _mask_of(attn_mask, query, key, scale)
        if isinstance(mask, WholeMask):
            mask = for_kernels(mask, query, key, value, (op,))
        if isinstance(mask, str):
            return mask, key, value, options
        kind, options = mask.kind if isinstance(mask, WholeMask) else ("padded", "identity"), {"mask": mask}
    else:
        if is_causal:
            key, value, options = top_left(query, key, value)
        kind = (_kind(is_causal, options.get("window_size", (-1, -1))), "identity")
    refused = _refusal(op, kind[0], dropout_p, scale, query, key, value, kind[1])
    return refused, key, value, options


def _mask_of(attn_mask, query, key, scale) -> KeyMask | WholeMask | str:
    """A mask by where the visible keys start and end, if it is one, or else of all scores; or why it isn't one."""
    mask = key_mask_of(attn_mask, query, key, scale)
    if isinstance(mask, KeyMask) and mask.ordered:
        return mask
    return whole_mask_of(attn_mask, query, key)


_CPU = {
    "_scaled_dot_product_flash_attention_for_cpu": _cpu_forward,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _cpu_backward,
}


# ---------------------------------------------------------------- operators of torch on CUDA devices


def _unused(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In the place of the state of random numbers, which dropout alone would read."""
    make = functools.partial(torch.empty, dtype=torch.uint64, device=q.device)
    return make(2), make(())


def _cuda_forward(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    if return_debug_mask:
        return "a debug mask is asked for, which shows dropout"
    if refused := _refusal(FORWARD, _kind(is_causal, (-1, -1)), dropout_p, scale, query, key, value):
        return refused
    out, lse = _forward(query, key, value, causal=is_causal, scale=scale)
    return out, lse, None, None, query.shape[2], key.shape[2], *_unused(query), query.new_empty(0)


def _cuda_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
    philox_seed, philox_offset, *, scale=None,
):  # fmt: skip
    if refused := _refusal(BACKWARD, _kind(is_causal, (-1, -1)), dropout_p, scale, query, key, value):
        return refused
    return _backward(grad_out, query, key, value, out, logsumexp, causal=is_causal, scale=scale)


def _flash_forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
    window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None, block_table=None, num_splits=None,
):  # fmt: skip
    unknown = {"alibi_slopes": alibi_slopes}
    if block_table is None:
        unknown["seqused_k"] = seqused_k
    if return_debug_mask:
        return "a debug mask is asked for, which shows dropout"
    if given := [name for name, x in unknown.items() if x is not None]:
        return f"{', '.join(given)} isn't taken here"
    window = _window(window_size_left, window_size_right)
    op = FORWARD if cum_seq_q is None else RAGGED if block_table is None else PAGED
    if refused := _refusal(op, _kind(is_causal, window), dropout_p, scale, query, key, value):
        return refused
    if op != FORWARD:
        tensors, options = (fit(query), fit(key), fit(value)), _ragged_options(query, scale, is_causal, window)
        if op == PAGED:
            lengths = cum_seq_k.diff() if seqused_k is None else seqused_k
            where, options = (cum_seq_q, lengths.int(), block_table), options | {"max_seqlen_q": max_q}
            out, lse = torch.ops.tvm_flash.attention_paged(*tensors, *where, **options, return_lse=True)
        else:
            out, lse = torch.ops.tvm_flash.attention_varlen(*tensors, cum_seq_q, cum_seq_k, **options, return_lse=True)
        return _laid_out(out, value.shape[-1], query), lse, *_unused(query), query.new_empty(0)
    tensors = _swapped("bshd", query, key, value)
    out, lse = _forward(*tensors, causal=is_causal, window_size=window, scale=scale)
    return out.transpose(1, 2), lse, *_unused(query), query.new_empty(0)


def _flash_forward_into(
    out, query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, **options
):
    asked = (query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask)
    result = _flash_forward(*asked, **options)
    if isinstance(result, str):
        return result
    out.copy_(result[0])
    return result[1]


def _flash_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state,
    unused, *, scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    window = _window(window_size_left, window_size_right)
    ragged = cum_seq_q is not None and cum_seq_q.numel() > 0
    op = RAGGED_BACKWARD if ragged else BACKWARD
    if refused := _refusal(op, _kind(is_causal, window), dropout_p, scale, query, key, value):
        return refused
    if ragged:
        starts, options = (cum_seq_q, cum_seq_k), _ragged_options(query, scale, is_causal, window)
        tensors = (*(fit(x) for x in (grad_out, query, key, value, out)), logsumexp.contiguous(), None)
        found = torch.ops.tvm_flash.attention_varlen_backward(*tensors, *starts, **options, gradients=[])
        return tuple(_laid_out(x, of.shape[-1], of) for x, of in zip(found, (query, key, value), strict=True))
    tensors = (*_swapped("bshd", grad_out, query, key, value, out), logsumexp)
    return tuple(_swapped("bshd", *_backward(*tensors, causal=is_causal, window_size=window, scale=scale)))


def _ragged_options(query, scale, causal, window) -> dict[str, Any]:
    """Options of the operators over sequences of different lengths."""
    left, right = (None if x < 0 else x for x in window)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return {"softmax_scale": scale, "causal": causal, "window_left": left, "window_right": right}


def _window(left: int | None, right: int | None) -> tuple[int, int]:
    """A window as these functions take it; torch's sides are −1 or None where there is no bound."""
    return tuple(-1 if x is None or x < 0 else x for x in (left, right))


_CUDA = {
    "_scaled_dot_product_flash_attention": _cuda_forward,
    "_scaled_dot_product_flash_attention_backward": _cuda_backward,
    "_flash_attention_forward": _flash_forward,
    "_flash_attention_forward_no_dropout_inplace": _flash_forward_into,
    "_flash_attention_backward": _flash_backward,
}


try:
    from torch.nn.attention import register_flash_attention_impl
except ImportError:  # before 2.11
    pass
else:
    register_flash_attention_impl(NAME, register_fn=functools.partial(_Replacement, "CUDA", _CUDA))
