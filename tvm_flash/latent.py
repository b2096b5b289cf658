"""Multi-head latent attention over a cache: values are the first elements of keys, which all query heads share."""

from __future__ import annotations

from typing import Any

from tvm_flash.call.dispatch import entrance
from tvm_flash.call.signature import signature
from tvm_flash.operators import PAGED_LATENT, RAGGED_LAYOUT

_attend = entrance(signature(RAGGED_LAYOUT, parameters=(), op=PAGED_LATENT, layout_known=True))


def flash_attention_latent(
    q: Any,
    kv_cache: Any,
    cu_seqlens_q: Any,
    seqlens_k: Any,
    page_table: Any,
    max_seqlen_q: int | None = None,
    *,
    head_dim_v: int = 512,
    softmax_scale: float,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    split_length: int | None = None,
    return_lse: bool = False,
    out: Any = None,
) -> Any:
    """Attention to a cache whose keys hold their values: DeepSeek's multi-head latent attention, as it is decoded.

    The projections of keys and values are absorbed into those of queries and outputs, so that a cache has one row for
    each token, for all heads: the latent, which is both key and value, and behind it the part of the key that was
    turned.  It is fetched once for both.  As :func:`tvm_flash.flash_attention_paged` with ``v_cache = kv_cache[...,
    :head_dim_v]`` otherwise: nothing is gathered, nothing is read on the host, and a sequence's result is the same bits
    whatever else is in the batch and wherever its pages are.

    Parameters
    ----------
    q: ``(total_q, heads, head_dim)``, the rows of all sequences one after the other.  On GPUs kernels are for few of
        them: a sequence has at most 1024 query rows, ``max_seqlen_q * heads / kv_heads``.
    kv_cache: ``(pages, page_size, kv_heads, head_dim)``, of any strides with a contiguous last dimension; ``kv_heads``
        is 1 in DeepSeek's models, of which ``cache.unsqueeze(2)`` makes this of a cache without that dimension.
    cu_seqlens_q, seqlens_k, page_table, max_seqlen_q: as in :func:`tvm_flash.flash_attention_paged`.
    head_dim_v: how many elements of a key are its value.
    softmax_scale: what scores are multiplied with.  It has no default: it is that of the heads before their projections
        were absorbed, ``192 ** -0.5`` or, with a stretched rotation, more, and not that of ``head_dim``.
    causal, window_size: as in :func:`tvm_flash.flash_attention_paged`, aligned bottom-right.
    split_length: a GPU splits the keys of a sequence after each so many, a power of two from 64 on, and computes the
        splits beside each other.  Left out, it follows from the sequence's own number of keys.  Few sequences are
        faster with 64 to 256, and many with 4096 and more (docs/serving.md).  A sequence's bits depend on it, and on
        nothing else of the batch.
    return_lse: also return the log-sum-exp of each row.
    out: where the result goes, of the result's shape and dtype; must not share memory with an input.

    Returns
    -------
    ``(total_q, heads, head_dim_v)`` in q's dtype and framework; zeros in a row that sees no key or belongs to no
    sequence.  With ``return_lse`` a pair of that and float32 ``(heads, total_q)``, natural logarithm, −inf there.

    Raises
    ------
    InvalidArgumentError (ValueError), ArgumentTypeError (TypeError): an argument is wrong.  What is in the int32
        tensors is checked on the CPU only, as in :func:`tvm_flash.flash_attention_paged`; :func:`tvm_flash.check_pages`
        looks.
    NotSupportedError, KernelNotFoundError (NotImplementedError): nothing can compute it, or a gradient is required.
    PackError, KernelError (RuntimeError): no pack for the device, a damaged pack, a failed launch.
    """
    return _attend(
        *(q, kv_cache, cu_seqlens_q, seqlens_k, page_table, out),
        *("auto", return_lse, softmax_scale, causal, window_size, 0.0, max_seqlen_q, head_dim_v, split_length),
    )
