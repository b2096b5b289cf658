"""The operators of attention as operators of PyTorch's own: for formats without kernels, as ONNX.

Both are computed in float32 over the whole matrix of scores.
"""

from __future__ import annotations

import torch

from tvm_flash.call.checks import check_scale


def attention(
    q,
    k,
    v,
    alibi_slopes=None,
    kv_start=None,
    kv_end=None,
    query_start=None,
    sinks=None,
    *,
    layout="bhsd",
    variant="auto",
    softmax_scale=None,
    causal=False,
    window_left=None,
    window_right=None,
    softcap=0.0,
    return_lse=False,
):
    """What ``torch.ops.tvm_flash.attention`` gives."""
    if layout != "bhsd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    # Where queries and keys stand: (queries, 1), or (batch, 1, queries, 1) with query_start, and (keys,).
    keys = torch.arange(k.shape[2], device=q.device)
    queries = torch.arange(q.shape[2], device=q.device)[:, None]
    queries = queries + (k.shape[2] - q.shape[2] if query_start is None else _each(query_start))
    hidden = _outside(queries, keys, causal, window_left, window_right)
    if kv_start is not None:
        hidden.append(keys < _each(kv_start))
    if kv_end is not None:
        hidden.append(keys >= _each(kv_end))
    slopes, sinks = (None if x is None else _each(x) for x in (alibi_slopes, sinks))
    out, lse = _attend(q, k, v, queries - keys, hidden, slopes, sinks, softmax_scale, softcap)
    out = out if layout == "bhsd" else out.transpose(1, 2).contiguous()
    return out, lse if return_lse else q.new_empty(0, dtype=torch.float32)


def attention_varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    alibi_slopes=None,
    sinks=None,
    *,
    softmax_scale=None,
    causal=False,
    window_left=None,
    window_right=None,
    softcap=0.0,
    return_lse=False,
):
    """What ``torch.ops.tvm_flash.attention_varlen`` gives: all rows see all keys but those of other sequences."""
    batch = cu_seqlens_q.shape[0] - 1
    rows, columns = (torch.arange(x.shape[0], device=q.device) for x in (q, k))
    of_row, of_key = ((x[:, None] >= cu[1:]).sum(-1) for x, cu in ((rows, cu_seqlens_q), (columns, cu_seqlens_k)))
    # Rows after the last sequence are of none; where they are said to stand doesn't matter.
    row, key = (x.clamp(max=max(batch - 1, 0)) for x in (of_row, of_key))
    lengths_q, lengths_k = (cu[1:] - cu[:-1] for cu in (cu_seqlens_q, cu_seqlens_k))
    queries = (rows - cu_seqlens_q[:-1][row] + lengths_k[row] - lengths_q[row])[:, None]
    keys = columns - cu_seqlens_k[:-1][key]
    hidden = [
        of_row[:, None] != of_key,
        (of_row == batch)[:, None],
        *_outside(queries, keys, causal, window_left, window_right),
    ]
    slopes, sinks = (None if x is None else _each_row(x, row) for x in (alibi_slopes, sinks))
    if sinks is not None:
        sinks = torch.where((of_row == batch)[:, None], -torch.inf, sinks)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    out, lse = _attend(q, k, v, queries - keys, hidden, slopes, sinks, softmax_scale, softcap)
    return out.transpose(0, 1).contiguous(), lse if return_lse else q.new_empty(0, dtype=torch.float32)


def _attend(q, k, v, distances, hidden, slopes, sinks, softmax_scale, softcap):
    """Attention of ``(…, heads, rows, head_dim)`` tensors, and its log-sum-exp.

    ``distances`` are those from keys to queries, ``hidden`` lists where a key is hidden, and slopes and sinks are given
    so that they broadcast against scores.
    """
    dtype, group = q.dtype, q.shape[-3] // k.shape[-3]
    q, k, v = (x.float() for x in (q, k, v))
    k, v = (x if group == 1 else x.repeat_interleave(group, -3) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)) * check_scale(softmax_scale, q.shape[-1])
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if slopes is not None:
        scores = scores - slopes * distances.abs()
    for one in hidden:
        scores = scores.masked_fill(one, -torch.inf)
    if sinks is not None:  # a key more, whose value is 0
        scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], -1)
        v = torch.nn.functional.pad(v, (0, 0, 0, 1))
    weights = torch.softmax(scores, -1)
    if hidden:  # a row that sees no key
        weights = torch.where(torch.isnan(weights) & ~torch.isnan(scores), 0.0, weights)
    return (weights @ v).to(dtype), torch.logsumexp(scores, -1)


def _outside(queries, keys, causal, window_left, window_right):
    """Where keys are hidden by a window, one predicate for each of its sides."""
    sides = []
    if causal or window_right not in (None, -1):
        sides.append(keys > queries + (0 if causal else window_right))
    if window_left not in (None, -1):
        sides.append(keys < queries - window_left)
    return sides


def _each(x):
    """A parameter of ``(heads,)`` or ``(batch, heads)`` beside scores."""
    return x[..., None, None]


def _each_row(x, sequence):
    """A parameter of ``(heads,)`` or ``(batch, heads)`` beside scores ``(heads, rows, keys)`` of rows of sequences."""
    return x[:, None, None] if x.ndim == 1 else x[sequence].transpose(0, 1)[..., None]
