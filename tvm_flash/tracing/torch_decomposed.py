"""The operator of plain attention as operators of PyTorch's own: for formats without kernels, as ONNX."""

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
    """What ``torch.ops.tvm_flash.attention`` gives, computed in float32 over the whole matrix of scores."""
    dtype = q.dtype
    q, k, v = (x.float() if layout == "bhsd" else x.float().transpose(1, 2) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (x if group == 1 else x.repeat_interleave(group, 1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)) * check_scale(softmax_scale, q.shape[3])
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    # Where queries and keys stand: (queries, 1), or (batch, 1, queries, 1) with query_start, and (keys,).
    keys = torch.arange(k.shape[2], device=q.device)
    queries = torch.arange(q.shape[2], device=q.device)[:, None]
    queries = queries + (k.shape[2] - q.shape[2] if query_start is None else _each(query_start))
    if alibi_slopes is not None:
        scores = scores - _each(alibi_slopes) * (queries - keys).abs()
    hidden = []
    if causal or window_right not in (None, -1):
        hidden.append(keys > queries + (0 if causal else window_right))
    if window_left not in (None, -1):
        hidden.append(keys < queries - window_left)
    if kv_start is not None:
        hidden.append(keys < _each(kv_start))
    if kv_end is not None:
        hidden.append(keys >= _each(kv_end))
    for one in hidden:
        scores = scores.masked_fill(one, -torch.inf)
    if sinks is not None:  # a key more, whose value is 0
        scores = torch.cat([scores, _each(sinks).expand(*scores.shape[:3], 1)], -1)
        v = torch.nn.functional.pad(v, (0, 0, 0, 1))
    weights = torch.softmax(scores, -1)
    if hidden:  # a row that sees no key
        weights = torch.where(torch.isnan(weights) & ~torch.isnan(scores), 0.0, weights)
    out = (weights @ v).to(dtype)
    lse = torch.logsumexp(scores, -1) if return_lse else q.new_empty(0)
    return (out if layout == "bhsd" else out.transpose(1, 2).contiguous()), lse


def _each(x):
    """A parameter of ``(heads,)`` or ``(batch, heads)`` beside scores."""
    return x[..., None, None]
