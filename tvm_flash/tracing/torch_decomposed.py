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
    visible=None,
    bias=None,
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
    if visible is not None:
        hidden.append(~visible)
    slopes, sinks = (None if x is None else _each(x) for x in (alibi_slopes, sinks))
    out, lse = _attend(q, k, v, queries - keys, hidden, slopes, sinks, softmax_scale, softcap, bias)
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
    columns = torch.arange(k.shape[0], device=q.device)
    of_key = _sequence_of(columns, cu_seqlens_k)
    there = (of_key < cu_seqlens_k.shape[0] - 1)[:, None, None]
    k, v = (torch.where(there, x, 0) for x in (k, v))
    positions = columns - cu_seqlens_k[:-1][_clamped(of_key, cu_seqlens_q)]
    keys = (of_key, positions, cu_seqlens_k[1:] - cu_seqlens_k[:-1])
    sides = (causal, window_left, window_right)
    given = (alibi_slopes, sinks, softmax_scale, softcap, return_lse)
    return _sequences(q, k, v, cu_seqlens_q, keys, sides, [], *given)


def attention_paged(
    q,
    k_cache,
    v_cache,
    cu_seqlens_q,
    seqlens_k,
    page_table,
    alibi_slopes=None,
    sinks=None,
    kv_start=None,
    *,
    softmax_scale=None,
    causal=False,
    window_left=None,
    window_right=None,
    softcap=0.0,
    max_seqlen_q=None,
    return_lse=False,
):
    """What ``torch.ops.tvm_flash.attention_paged`` gives: the keys of each sequence are gathered, as many as may be."""
    room = page_table.shape[1] * k_cache.shape[1]
    columns = torch.arange(page_table.shape[0] * room, device=q.device)
    of_key, positions = columns // room, columns % room
    there = (positions < seqlens_k[of_key])[:, None, None]
    pages = page_table.long().clamp(0, k_cache.shape[0] - 1)
    k, v = (torch.where(there, x[pages].flatten(0, 2), 0) for x in (k_cache, v_cache))
    hidden = [~there[:, 0, 0][None]]
    if kv_start is not None:
        hidden.append(positions < _each_of(kv_start, of_key)[:, None])
    keys, sides = (of_key, positions, seqlens_k), (causal, window_left, window_right)
    given = (alibi_slopes, sinks, softmax_scale, softcap, return_lse)
    return _sequences(q, k, v, cu_seqlens_q, keys, sides, hidden, *given)


def attention_paged_scaled(
    q, k_cache, v_cache, cu_seqlens_q, seqlens_k, page_table, k_scale, v_scale, *parameters, **options
):
    """What ``torch.ops.tvm_flash.attention_paged_scaled`` gives: the cache is made what it stands for first."""
    caches = (
        (x.float() * (s[:, None, :, None] if s.ndim == 2 else s[:, None])).to(q.dtype)
        for x, s in ((k_cache, k_scale), (v_cache, v_scale))
    )
    return attention_paged(q, *caches, cu_seqlens_q, seqlens_k, page_table, *parameters, **options)


def attention_paged_latent(
    q, kv_cache, cu_seqlens_q, seqlens_k, page_table, *, head_dim_v, split_length=None, **options
):
    """What ``torch.ops.tvm_flash.attention_paged_latent`` gives."""
    caches = kv_cache, kv_cache[..., :head_dim_v]
    return attention_paged(q, *caches, cu_seqlens_q, seqlens_k, page_table, **options)


def _sequence_of(rows, starts):
    """Which sequence each row is in; those after the last are in one more."""
    return (rows[:, None] >= starts[1:]).sum(-1)


def _clamped(sequence, starts):
    """The same as one that there is; where rows after the last are said to stand doesn't matter."""
    return sequence.clamp(max=max(starts.shape[0] - 2, 0))


def _sequences(q, k, v, starts, keys, sides, hidden, slopes, sinks, softmax_scale, softcap, return_lse):
    """All rows see all keys but those of other sequences; ``keys`` are the sequence and the position of each key, and
    how many each sequence has."""
    of_key, positions, lengths_k = keys
    rows, batch = torch.arange(q.shape[0], device=q.device), starts.shape[0] - 1
    of_row = _sequence_of(rows, starts)
    row = _clamped(of_row, starts)
    queries = (rows - starts[:-1][row] + lengths_k[row] - (starts[1:] - starts[:-1])[row])[:, None]
    hidden = [*hidden, of_row[:, None] != of_key, (of_row == batch)[:, None], *_outside(queries, positions, *sides)]
    slopes, sinks = (None if x is None else _each_of(x, row)[..., None] for x in (slopes, sinks))
    if sinks is not None:
        sinks = torch.where((of_row == batch)[:, None], -torch.inf, sinks)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    out, lse = _attend(q, k, v, queries - positions, hidden, slopes, sinks, softmax_scale, softcap)
    return out.transpose(0, 1).contiguous(), lse if return_lse else q.new_empty(0, dtype=torch.float32)


def _attend(q, k, v, distances, hidden, slopes, sinks, softmax_scale, softcap, bias=None):
    """Attention of ``(…, heads, rows, head_dim)`` tensors, and its log-sum-exp.

    ``distances`` are those from keys to queries, ``hidden`` lists where a key is hidden, and slopes, sinks and bias are
    given so that they broadcast against scores.
    """
    dtype, group = q.dtype, q.shape[-3] // k.shape[-3]
    q, k, v = (x.float() for x in (q, k, v))
    k, v = (x if group == 1 else x.repeat_interleave(group, -3) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)) * check_scale(softmax_scale, q.shape[-1])
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if slopes is not None:
        scores = scores - slopes * distances.abs()
    if bias is not None:
        scores = scores + bias
    for one in hidden:
        scores = scores.masked_fill(one, -torch.inf)
    if sinks is not None:  # a key more, whose value is 0
        scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], -1)
        v = torch.nn.functional.pad(v, (0, 0, 0, 1))
    weights = torch.softmax(scores, -1)
    if hidden or bias is not None or sinks is not None:  # a row that sees no key, whatever hides them
        weights = torch.where((scores == -torch.inf).all(-1, keepdim=True), 0.0, weights)
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


def _each_of(x, sequence):
    """A parameter of ``(heads,)`` or ``(batch, heads)``, each of them perhaps 1, as ``(heads, rows)`` of rows of
    sequences."""
    if x.ndim == 1 or x.shape[0] == 1:
        return x.reshape(-1, 1)
    return x[sequence].transpose(0, 1)
