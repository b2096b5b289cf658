"""Attention over sequences of different lengths whose keys lie on pages of a cache."""

from __future__ import annotations

import dataclasses
from typing import Any

from tvm_flash.call.dispatch import entrance
from tvm_flash.call.paged import CACHE_DTYPES, check_numbers, check_paged
from tvm_flash.call.prepare import same_framework
from tvm_flash.call.ragged import fault_of
from tvm_flash.call.signature import signature
from tvm_flash.errors import InvalidArgumentError
from tvm_flash.operators import PAGED, PAGED_PARAMETERS, PAGED_SCALED, RAGGED_LAYOUT

_attend = entrance(signature(RAGGED_LAYOUT, parameters=PAGED_PARAMETERS, op=PAGED, layout_known=True))


_attend_scaled = entrance(signature(RAGGED_LAYOUT, parameters=PAGED_PARAMETERS, op=PAGED_SCALED, layout_known=True))


def flash_attention_paged(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    cu_seqlens_q: Any,
    seqlens_k: Any,
    page_table: Any,
    max_seqlen_q: int | None = None,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    kv_start: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    return_lse: bool = False,
    out: Any = None,
) -> Any:
    """Attention of several sequences' new tokens to the keys that each has in a cache of pages.

    Nothing is gathered, and nothing is read on the host: a GPU isn't waited for, and a CUDA graph replays with other
    lengths and other pages in the same tensors.  A sequence's result is the same bits whatever else is in the batch and
    wherever its pages are.

    Parameters
    ----------
    q: ``(total_q, heads, head_dim)``, the rows of all sequences one after the other; frameworks, dtypes and strides as
        in :func:`tvm_flash.flash_attention`.
    k_cache: ``(pages, page_size, kv_heads, head_dim)``, of any strides with a contiguous last dimension; query head h
        reads kv head ``h // (heads // kv_heads)``.  Any page size will do.
    v_cache: ``(pages, page_size, kv_heads, head_dim_v)``.
    cu_seqlens_q: int32 ``(batch + 1,)`` on the device of q, contiguous: sequence b has the rows ``cu_seqlens_q[b]`` up
        to but not ``cu_seqlens_q[b + 1]``, as in :func:`tvm_flash.flash_attention_varlen`.
    seqlens_k: int32 ``(batch,)``, contiguous: how many keys each sequence has in the cache, those of its rows included.
    page_table: int32 ``(batch, pages_per_sequence)``: key j of sequence b is row ``j % page_size`` of page
        ``page_table[b, j // page_size]``.  Entries that no key needs are never read, nor are rows behind the last key.
    max_seqlen_q: a number of queries that no sequence exceeds, a promise: rows of a sequence behind that many may be
        left as they are.  Where it is small, a GPU takes kernels for few queries.  It alone decides so, beside the
        width of ``page_table``: a sequence has the same bits in every batch that is given the same.  Without it,
        ``total_q`` decides.
    causal: query i of a sequence sees its keys up to ``i + seqlens_k - length_q``, aligned bottom-right.
    window_size, softcap: as in :func:`tvm_flash.flash_attention`.
    alibi_slopes: float32 ``(heads,)`` or ``(batch, heads)``.
    sinks: as in :func:`tvm_flash.flash_attention`, ``(heads,)`` or ``(batch, heads)``.
    k_scale, v_scale: of caches in 8 bits, float8_e4m3fn or int8: float32 ``(kv_heads,)`` or ``(pages, kv_heads)``.  An
        element stands for itself times the scale (:func:`tvm_flash.dequantise_cache`), and the result is that of a
        cache of what they stand for, bit for bit.
    kv_start: int32 ``(batch, 1)`` or ``(batch, heads)``: keys before this one are hidden (left padding).
    return_lse: also return the log-sum-exp of each row.
    out: where the result goes, of the result's shape and dtype; must not share memory with an input.

    Returns
    -------
    ``(total_q, heads, head_dim_v)`` in q's dtype and framework; zeros in a row that sees no key or belongs to no
    sequence.  With ``return_lse`` a pair of that and float32 ``(heads, total_q)``, natural logarithm, −inf there.

    Raises
    ------
    InvalidArgumentError (ValueError), ArgumentTypeError (TypeError): an argument is wrong.  What is in the int32
        tensors is checked on the CPU; on a GPU nobody reads it, and numbers that make no sense give rows that make
        none; :func:`tvm_flash.check_pages` looks.
    NotSupportedError, KernelNotFoundError (NotImplementedError): nothing can compute it, or a gradient is required.
    PackError, KernelError (RuntimeError): no pack for the device, a damaged pack, a failed launch.
    """
    # fmt: off
    if k_scale is not None or v_scale is not None:
        return _attend_scaled(q, k_cache, v_cache, cu_seqlens_q, seqlens_k, page_table, *both_scales(k_scale, v_scale),
                              alibi_slopes, sinks, kv_start, out,
                              "auto", return_lse, softmax_scale, causal, window_size, softcap, max_seqlen_q)
    return _attend(q, k_cache, v_cache, cu_seqlens_q, seqlens_k, page_table, alibi_slopes, sinks, kv_start, out,
                   "auto", return_lse, softmax_scale, causal, window_size, softcap, max_seqlen_q)
    # fmt: on


def both_scales(k_scale: Any, v_scale: Any) -> tuple[Any, Any]:
    """Both scales.

    Raises
    ------
    InvalidArgumentError: one of them is None.
    """
    if k_scale is None or v_scale is None:
        missing, other = ("k_scale", "v_scale") if k_scale is None else ("v_scale", "k_scale")
        raise InvalidArgumentError(f"{missing}: is None, and {other} is given; give both, or none")
    return k_scale, v_scale


def check_pages(q: Any, k_cache: Any, cu_seqlens_q: Any, seqlens_k: Any, page_table: Any) -> None:
    """Read where sequences begin, how long they are and which pages they need, and see whether it makes sense.

    For finding a mistake: it waits for a GPU, on which a call takes these numbers as they are.  The tensors are those
    of :func:`flash_attention_paged`.

    Raises
    ------
    InvalidArgumentError, ArgumentTypeError: something doesn't; the text names the sequence.
    """
    tensors = {"q": q, "k_cache": k_cache, "v_cache": k_cache}
    tensors |= {"cu_seqlens_q": cu_seqlens_q, "seqlens_k": seqlens_k, "page_table": page_table}
    framework = same_framework(tensors)
    views = {name: framework.view(framework.adopt(x), name) for name, x in tensors.items()}
    if views["k_cache"].dtype in CACHE_DTYPES:  # what is in it isn't looked at
        views |= {n: dataclasses.replace(views[n], dtype=views["q"].dtype) for n in ("k_cache", "v_cache")}
    sizes = check_paged(views, None)
    if fault := fault_of(cu_seqlens_q.tolist(), "q", sizes.total_q):
        raise InvalidArgumentError(f"cu_seqlens_q: {fault}")
    check_numbers(seqlens_k.tolist(), page_table.tolist(), sizes)
