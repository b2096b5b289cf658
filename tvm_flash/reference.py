"""Attention in float64 numpy: the formula as one would write it on paper, and the numpy twin of every mask and score.

Slow and plain on purpose: it is what kernels are compared with, in ``python -m tvm_flash check`` and in the tests.
A twin sees whole arrays: ``s`` is ``(batch, heads, seqlen_q, seqlen_kv)`` after scaling; ``at.b`` is ``(batch, 1, 1,
1)``, ``at.h`` ``(heads, 1, 1)``, ``at.i`` ``(seqlen_q, 1)``, ``at.j`` ``(1, seqlen_kv)``, per-head parameters are
``(batch, heads, 1, 1)``, so that everything broadcasts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvm_flash import catalogue

#: Step of central differences: at values around 1 their error is about 1e-10, half of it from rounding.
STEP = 2.0**-16


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
    b: np.ndarray | None = None
    h: np.ndarray | None = None

    def with_param(self, name: str, value: Any) -> Positions:
        """The same with another value of a parameter."""
        return dataclasses.replace(self, params={**self.params, name: value})

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


def with_sink(sink: Callable) -> Callable:
    """A score whose softmax has a logit beside those of keys: ``sink(at)``, which has no query and no key.

    The twin of a score has it as its attribute ``sink``.
    """

    def mark(score: Callable) -> Callable:
        score.sink = sink
        return score

    return mark


def sinks(at):
    """A logit of each head, unless ``has_sinks`` is 0 (gpt-oss; Xiao et al., 2023)."""
    return at.params["sinks"] if at.params.get("has_sinks", True) else -np.inf


@with_sink(sinks)
def identity_sinks(s, at):
    """``identity``, with a sink."""
    return s


@with_sink(sinks)
def optional_sinks(s, at):
    """``optional``, with a sink."""
    return optional(s, at)


def biased(s, at):
    """With a number added to each score (:func:`torch.nn.functional.scaled_dot_product_attention`)."""
    return s + at.params["bias"]


def biased_16(s, at):
    """``biased``, where the numbers have the 16 bits of q."""
    return biased(s, at)


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


def given(at):
    """Each query sees the keys that a tensor says."""
    return at.params["visible"]


SCORES: Mapping[str, Callable] = {
    f.__name__: f
    for f in (
        *(identity, softcap, alibi, softcap_alibi, optional),
        *(identity_sinks, optional_sinks, biased, biased_16),
    )
}
MASKS: Mapping[str, Callable] = {f.__name__: f for f in (full, causal, window, sink_window, padded, positioned, given)}


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    softmax_scale: float,
    mask: Callable = full,
    score: Callable = identity,
    params: Mapping[str, Any] | None = None,
    axes: Mapping[str, str] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention and its log-sum-exp in float64.

    Parameters
    ----------
    q: ``(batch, heads, seqlen_q, head_dim)``; k: ``(batch, kv_heads, seqlen_kv, head_dim)``;
    v: ``(batch, kv_heads, seqlen_kv, head_dim_v)``; any real dtype.
    mask, score: twins from this module, or functions of the same form; a score may have a sink (:func:`with_sink`).
    params: values by name; per-head ones as ``(batch, heads)`` or ``(heads,)``.
    axes: of the parameters that are tensors, some of ``"bhij"``, ``""`` of a table; if not given, what the package's
        own parameters have, and ``"bh"`` of others.

    Returns
    -------
    out: ``(batch, heads, seqlen_q, head_dim_v)`` float64; zeros in a row that may attend to nothing.
    lse: ``(batch, heads, seqlen_q)`` float64, natural logarithm; in such a row the sink, or −inf without one.
    """
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        state = _Forward.of(q, k, v, softmax_scale, mask, score, params, axes)
        out = np.where(state.row_sum == 0, 0.0, np.einsum("bhij,bhjd->bhid", state.prob, state.v))
    return out, state.lse


@dataclass(frozen=True)
class Gradients:
    """Gradients of the inputs, in their shapes, float64; ``params`` has those of the parameters that were asked for."""

    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    params: Mapping[str, np.ndarray]


def attention_backward(
    dout: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    softmax_scale: float,
    dlse: np.ndarray | None = None,
    mask: Callable = full,
    score: Callable = identity,
    params: Mapping[str, Any] | None = None,
    gradients: Sequence[str] = (),
    rounded: Callable[[np.ndarray], np.ndarray] = np.asarray,
    axes: Mapping[str, str] | None = None,
) -> Gradients:
    """Gradients of attention in float64, given those of its output and of its log-sum-exp.

    A twin needs no derivative of its own: that of the score, with respect to the scaled product and to a parameter, is
    taken by central differences with the step ``STEP`` times the larger of 1 and the value, relative error about 1e-10.
    The twin is asked again for each element of a table.  They need no more than that it takes arrays, as complex steps
    would not: NumPy's ``abs`` and ``maximum`` of complex numbers are other functions.  At a corner they have the mean
    of both sides.

    Parameters
    ----------
    dout: ``(batch, heads, seqlen_q, head_dim_v)``; dlse: ``(batch, heads, seqlen_q)``, zero if not given.  What they
        hold in a row that may attend to nothing doesn't count.
    q, k, v, softmax_scale, mask, score, params: as in :func:`attention`.
    gradients: names of the float parameters whose gradients are wanted.
    rounded: what is done to probabilities and to gradients of scores before they are multiplied further.

    Returns
    -------
    dq, dk, dv, and the parameters' gradients by name, in the shapes of the parameters.
    """
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        state = _Forward.of(q, k, v, softmax_scale, mask, score, params, axes)
        dout = np.where(state.row_sum == 0, 0.0, np.asarray(dout, np.float64))
        dp = np.einsum("bhid,bhjd->bhij", dout, state.v)
        delta = np.einsum("bhij,bhij->bhi", state.prob, np.where(state.prob == 0, 0.0, dp))
        delta = delta - (0.0 if dlse is None else np.asarray(dlse, np.float64))
        dscore = np.where(state.prob == 0, 0.0, state.prob * (dp - delta[..., None]))
        slope = difference(lambda s: score(s, state.at), state.s)
        ds = rounded(np.where(state.prob == 0, 0.0, dscore * slope)) * softmax_scale
        tables = {n for n, x in (axes or {}).items() if not x and np.ndim((params or {})[n])}
        found = {
            n: _table_gradient(n, score, state, dscore)
            if n in tables
            else _parameter_gradient(n, score, state, dscore, delta, np.shape((params or {})[n]))
            for n in gradients
        }
    dq = np.einsum("bhij,bhjd->bhid", ds, state.k)
    dk, dv = np.einsum("bhij,bhid->bhjd", ds, state.q), np.einsum("bhij,bhid->bhjd", rounded(state.prob), dout)
    grouped = (state.q.shape[0], state.kv_heads, state.q.shape[1] // state.kv_heads)
    dk, dv = (x.reshape(*grouped, *x.shape[2:]).sum(axis=2) for x in (dk, dv))
    return Gradients(dq, dk, dv, found)


@dataclass(frozen=True)
class _Forward:
    """What both directions compute: keys and values expanded to all heads, scaled products ``s``, probabilities."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    kv_heads: int
    at: Positions
    s: np.ndarray
    prob: np.ndarray
    row_sum: np.ndarray
    lse: np.ndarray

    @staticmethod
    def of(q, k, v, softmax_scale, mask, score, params, axes) -> _Forward:
        q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
        heads, seqlen_q, kv_heads, seqlen_kv = q.shape[1], q.shape[2], k.shape[1], k.shape[2]
        k, v = (np.repeat(x, heads // kv_heads, axis=1) for x in (k, v))
        values = beside_scores(params or {}, axes)
        at = positions(len(q), heads, seqlen_q, seqlen_kv, values)
        s = np.einsum("bhid,bhjd->bhij", q, k) * softmax_scale
        x = np.where(mask(at), score(s, at), -np.inf)
        row_max, sink = x.max(axis=-1, keepdims=True, initial=-np.inf), sink_of(score, at)
        row_max = np.maximum(row_max, sink)
        prob = np.where(row_max == -np.inf, 0.0, np.exp(x - row_max))
        row_sum = prob.sum(axis=-1, keepdims=True) + np.where(sink == -np.inf, 0.0, np.exp(sink - row_max))
        lse = np.where(row_sum == 0, -np.inf, row_max + np.log(row_sum))
        return _Forward(q, k, v, kv_heads, at, s, np.where(row_sum == 0, 0.0, prob / row_sum), row_sum, lse[..., 0])


def positions(batch: int, heads: int, seqlen_q: int, seqlen_kv: int, params: Mapping[str, Any]) -> Positions:
    """The scores of a whole call; ``params`` as they broadcast against these (:func:`beside_scores`)."""
    sizes = (batch, heads, seqlen_q, seqlen_kv)
    b, h, i, j = (np.arange(n).reshape(-1, *[1] * (3 - a)) for a, n in enumerate(sizes))
    return Positions(i, j, seqlen_q, seqlen_kv, params, b, h)


def beside_scores(params: Mapping[str, Any], axes: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Parameters by name as they broadcast against scores; ``axes`` as for :func:`attention`."""
    axes = {**{p.name: p.axes for p in catalogue.PARAMS.values()}, **(axes or {})}
    return {n: _beside_scores(x, axes.get(n, "bh")) for n, x in params.items()}


def _beside_scores(x: Any, axes: str) -> Any:
    """A parameter as it broadcasts against scores; a number, or a table, as it is."""
    if np.ndim(x) == 0 or not axes:
        return x
    x = np.asarray(x)
    x = x if x.dtype == bool else x.astype(np.float64)
    x = x[(None,) * (len(axes) - x.ndim)]
    return x[tuple(slice(None) if a in axes else None for a in "bhij")]


def sink_of(score: Callable, at: Positions) -> np.ndarray:
    """The sink of a score, −inf if it has none."""
    sink = getattr(score, "sink", None)
    return np.asarray(-np.inf if sink is None else sink(at), np.float64)


def difference(function: Callable, x: np.ndarray) -> np.ndarray:
    """The derivative of an elementwise function by central differences."""
    step = STEP * np.maximum(1.0, np.abs(x))
    return (function(x + step) - function(x - step)) / (2 * step)


def differences_beside(function: Callable, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The differences of an elementwise function to the left and to the right of ``x``.

    Where it has a kink less than a step away, one of them is its derivative, and the central difference is neither's.
    """
    step = STEP * np.maximum(1.0, np.abs(x))
    here = function(x)
    return (here - function(x - step)) / step, (function(x + step) - here) / step


def _table_gradient(name: str, score: Callable, state: _Forward, dscore: np.ndarray) -> np.ndarray:
    """The sum of ``dscore * score`` differentiated by each element of a table, one after another."""
    table = np.array(state.at.params[name], np.float64)
    found = np.zeros(table.shape)

    def total(index, value):
        kept, table[index] = table[index], value
        x = score(state.s, state.at.with_param(name, table))
        table[index] = kept
        return np.where(state.prob == 0, 0.0, dscore * x)

    for index, value in np.ndenumerate(table.copy()):
        step = STEP * max(1.0, abs(value))
        found[index] = (total(index, value + step) - total(index, value - step)).sum() / (2 * step)
    return found


def _parameter_gradient(name: str, score: Callable, state: _Forward, dscore: np.ndarray, delta, shape) -> np.ndarray:
    """The sum of ``dscore * ∂score/∂parameter`` over the axes that the parameter doesn't have, and the sink's share."""

    def of_value(value):
        return score(state.s, state.at.with_param(name, value))

    def of_sink_value(value):
        return sink_of(score, state.at.with_param(name, value))

    value = np.asarray(state.at.params[name], np.float64)
    shares = np.where(state.prob == 0, 0.0, dscore * difference(of_value, value))
    sink = sink_of(score, state.at)
    if not np.array_equal(of_sink_value(value + 1), sink):  # it is one of the sink, and so none of queries or keys
        weight = np.where(sink == -np.inf, 0.0, np.exp(sink - state.lse[..., None]))
        share = np.where(weight == 0, 0.0, weight * delta[..., None] * difference(of_sink_value, value))
        shares = shares.sum(axis=-1, keepdims=True) - share
    if not shape:
        return shares.sum()
    whole = np.shape(value)  # beside scores, with 1 for what it lacks
    broadcast = tuple(a for a, size in enumerate(whole) if size == 1)
    return shares.sum(axis=broadcast, keepdims=True).reshape(shape)
