"""``jax.nn.dot_product_attention``, computed by this package's kernels where they can.

Where they can't (a bias, a mask of the user's own, a dtype without kernels, …) JAX's own function computes it, and a
:class:`tvm_flash.errors.FallbackWarning` says why, once for each reason.  Needs jax and jax-tvm-ffi.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tvm_flash.call.checks import is_positive_float32
from tvm_flash.call.problem import HEAD_DIM_MULTIPLE
from tvm_flash.errors import FallbackWarning, TvmFlashError
from tvm_flash.interface import flash_attention_v2
from tvm_flash.padded import padded_attention


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """Attention with the signature and meaning of ``jax.nn.dot_product_attention``, in ``jit``, ``vmap``, ``grad`` too.

    Parameters
    ----------
    query: ``(batch, seqlen_q, heads, head_dim)``, or without the batch.
    key, value: ``(batch, seqlen_kv, kv_heads, head_dim)``; heads is a multiple of kv_heads.
    bias, mask: computed by JAX.
    scale: of the scores; ``1/sqrt(head_dim)`` if not given.
    is_causal: aligned **top-left**, as in JAX: query i sees the keys 0 … i, whatever the lengths.
    query_seq_lengths: int32 ``(batch,)``: rows beyond are zeros.
    key_value_seq_lengths: int32 ``(batch,)``: keys beyond aren't seen.
    local_window_size: ``(left, right)``, or one number for both: query i sees the keys ``i - left`` … ``i + right``.
    implementation: if one is named, JAX computes with it.
    return_residual: also return the log-sum-exp of each row, ``(batch, seqlen_q, heads)``, in the dtype of key; no
        gradient flows through it.

    Returns
    -------
    In the shape of query.  A row that sees no key is zeros, with a log-sum-exp of −inf, where JAX's own function, which
    counts with a large negative number, gives the mean of all values.

    Raises
    ------
    Whatever JAX's own function raises for the same arguments.
    """
    options = {
        "scale": scale,
        "is_causal": is_causal,
        "query_seq_lengths": query_seq_lengths,
        "key_value_seq_lengths": key_value_seq_lengths,
        "local_window_size": local_window_size,
        "return_residual": return_residual,
    }
    lengths = (query_seq_lengths, key_value_seq_lengths)
    reason = _refusal(query, key, value, bias, mask, scale, lengths, local_window_size, implementation)
    if reason is None:
        try:
            return _compute(query, key, value, **options)
        except TvmFlashError as e:
            reason = str(e)
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"tvm_flash leaves this to jax's own attention: {reason}", FallbackWarning, stacklevel=2)
    return jax.nn.dot_product_attention(query, key, value, bias, mask, implementation=implementation, **options)


_warned: set[str] = set()


def _refusal(query, key, value, bias, mask, scale, lengths, window, implementation) -> str | None:
    """Why JAX must compute a call, as far as that doesn't depend on the kernels."""
    if implementation is not None:
        return f"the implementation {implementation!r} is asked for"
    if bias is not None or mask is not None:
        return "a bias or a mask is given, and these kernels take lengths, windows and causal masks"
    if scale is not None and not (isinstance(scale, (int, float, np.number)) and is_positive_float32(scale)):
        return f"scale is {scale}, and these kernels take positive numbers that are known when the program is traced"
    q, k, v = shapes = [np.shape(x) for x in (query, key, value)]
    if not (len(q) == len(k) in (3, 4) and k == v) or any(0 in s for s in shapes):
        return f"the shapes are {', '.join(map(str, shapes))}"
    for x in lengths:
        if x is not None and (np.shape(x) != (q[:-3] or (1,)) or jnp.asarray(x).dtype != jnp.int32):
            return "lengths aren't int32, one for each entry of the batch"
    if window is not None and np.min(window) < 0:  # a negative side is no bound here, and one that hides keys in JAX
        return f"local_window_size is {window}, and these kernels take sides of 0 and more"
    return None


def _compute(
    query, key, value, *, scale, is_causal, query_seq_lengths, key_value_seq_lengths, local_window_size, return_residual
):
    q, k, v = (jnp.asarray(x) for x in (query, key, value))
    shape, dtype = q.shape, k.dtype
    if q.ndim == 3:
        q, k, v = (x[None] for x in (q, k, v))
    (batch, seqlen_q), seqlen_kv, head_dim = q.shape[:2], k.shape[1], q.shape[-1]
    beyond = -head_dim % HEAD_DIM_MULTIPLE
    if beyond:
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, beyond))) for x in (q, k, v))
    window = (local_window_size,) * 2 if isinstance(local_window_size, int) else local_window_size
    options: dict[str, Any] = {
        "softmax_scale": 1 / math.sqrt(head_dim) if scale is None else float(scale),
        "return_lse": return_residual,
        "causal": is_causal,
        "window_size": (-1, -1) if window is None else tuple(window),
    }
    aligned = seqlen_q == seqlen_kv or not (is_causal or window)
    if aligned and key_value_seq_lengths is None:
        result = flash_attention_v2(q, k, v, **options)
    else:
        lengths = seqlen_kv if key_value_seq_lengths is None else key_value_seq_lengths
        lengths = jnp.broadcast_to(jnp.asarray(lengths, jnp.int32), (batch,))
        key_range = jnp.stack((jnp.zeros(batch, jnp.int32), jnp.clip(lengths, 0, seqlen_kv)), -1)
        first = jnp.zeros(batch, jnp.int32)  # query 0 stands on key 0
        result = padded_attention(q, k, v, key_range, query_start=first, layout="bshd", **options)
    out, lse = result if return_residual else (result, None)
    out = out[..., :head_dim]
    if query_seq_lengths is not None:
        inside = (jnp.arange(seqlen_q) < jnp.asarray(query_seq_lengths)[:, None])[..., None]
        out = jnp.where(inside[..., None], out, 0)
        lse = None if lse is None else jnp.where(inside[..., 0][:, None], lse, -jnp.inf)
    if not return_residual:
        return out.reshape(shape)
    lse = jax.lax.stop_gradient(lse)  # as JAX's own
    return out.reshape(shape), lse.swapaxes(1, 2).astype(dtype).reshape(shape[:-1])
