"""Attention in float64 numpy: the formula as one would write it on paper, and the numpy twin of every mask and score.

Slow and plain on purpose: it is what kernels are compared with, in ``python -m tvm_flash check`` and in the tests.
A twin sees whole arrays: ``s`` is ``(batch, heads, seqlen_q, seqlen_kv)`` after scaling; ``at.i`` is ``(seqlen_q, 1)``,
``at.j`` is ``(1, seqlen_kv)``, per-head parameters are ``(batch, heads, 1, 1)``, so that everything broadcasts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Positions:
    """Where the scores of one call are, and the values of the parameters.

    ``diagonal`` is the key position that a query stands on: ``i + seqlen_kv - seqlen_q`` (bottom-right alignment), or
    ``i + query_start`` with a parameter of that name, unless ``has_query_start`` is 0.
    """

    i: np.ndarray
    j: np.ndarray
    seqlen_q: int
    seqlen_kv: int
    params: Mapping[str, Any]

    @property
    def diagonal(self) -> np.ndarray:
        aligned = self.seqlen_kv - self.seqlen_q
        given = self.params.get("has_query_start", True)
        return self.i + (self.params.get("query_start", aligned) if given else aligned)


def identity(s, at):
    """The scores as they are."""
    return s


def softcap(s, at):
    """``cap * tanh(s / cap)`` (Gemma 2)."""
    cap = np.float64(at.params["softcap"])
    return cap * np.tanh(s / cap)


def alibi(s, at):
    """``s - slope * |distance|`` (Press et al., 2022; two-sided as in FlashAttention)."""
    return s - at.params["alibi_slopes"] * np.abs(at.diagonal - at.j)


def softcap_alibi(s, at):
    """Softcap, then ALiBi: the order of FlashAttention."""
    return alibi(softcap(s, at), at)


def optional(s, at):
    """Softcap unless ``softcap`` is 0, then ALiBi unless ``has_alibi_slopes`` is 0."""
    s = softcap(s, at) if at.params["softcap"] else s
    return alibi(s, at) if at.params["has_alibi_slopes"] else s


def full(at):
    """Every query sees every key."""
    return at.j < at.seqlen_kv


def causal(at):
    """A query sees the keys up to its own position, aligned bottom-right."""
    return at.j <= at.diagonal


def window(at):
    """``window_left`` keys before and ``window_right`` keys after a query's own position, both inclusive."""
    return (at.j >= at.diagonal - at.params["window_left"]) & (at.j <= at.diagonal + at.params["window_right"])


def sink_window(at):
    """A sliding window that never loses the first ``sink_tokens`` keys (StreamingLLM, Xiao et al., 2023)."""
    d = at.diagonal
    near = (at.j >= d - at.params["window_left"]) | (at.j < at.params["sink_tokens"])
    return (at.j <= d + at.params["window_right"]) & near


def padded(at):
    """A window over the keys ``kv_start`` up to but not ``kv_end``, which each batch entry and head has of its own."""
    return (at.j >= at.params["kv_start"]) & (at.j < at.params["kv_end"]) & window(at)


def positioned(at):
    """The same, where query 0 of each batch entry and head stands on a key position of its own, ``query_start``."""
    return padded(at)


SCORES: Mapping[str, Callable] = {f.__name__: f for f in (identity, softcap, alibi, softcap_alibi, optional)}
MASKS: Mapping[str, Callable] = {f.__name__: f for f in (full, causal, window, sink_window, padded, positioned)}


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    softmax_scale: float,
    mask: Callable = full,
    score: Callable = identity,
    params: Mapping[str, Any] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention and its log-sum-exp in float64.

    Parameters
    ----------
    q: ``(batch, heads, seqlen_q, head_dim)``; k: ``(batch, kv_heads, seqlen_kv, head_dim)``;
    v: ``(batch, kv_heads, seqlen_kv, head_dim_v)``; any real dtype.
    mask, score: twins from this module, or functions of the same form.
    params: values by name; per-head ones as ``(batch, heads)`` or ``(heads,)``.

    Returns
    -------
    out: ``(batch, heads, seqlen_q, head_dim_v)`` float64; zeros in a row that may attend to nothing.
    lse: ``(batch, heads, seqlen_q)`` float64, natural logarithm; −inf in such a row.
    """
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    heads, seqlen_q, seqlen_kv = q.shape[1], q.shape[2], k.shape[2]
    group = heads // k.shape[1]
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    values = {
        n: x if np.ndim(x) == 0 else np.asarray(x, np.float64)[..., None, None] for n, x in (params or {}).items()
    }
    at = Positions(np.arange(seqlen_q)[:, None], np.arange(seqlen_kv)[None, :], seqlen_q, seqlen_kv, values)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        s = score(np.einsum("bhid,bhjd->bhij", q, k) * softmax_scale, at)
        s = np.where(mask(at), s, -np.inf)
        row_max = s.max(axis=-1, keepdims=True, initial=-np.inf)
        prob = np.where(row_max == -np.inf, 0.0, np.exp(s - row_max))
        row_sum = prob.sum(axis=-1, keepdims=True)
        out = np.where(row_sum == 0, 0.0, np.einsum("bhij,bhjd->bhid", prob, v) / row_sum)
        lse = np.where(row_sum == 0, -np.inf, row_max + np.log(row_sum))
    return out, lse[..., 0]
