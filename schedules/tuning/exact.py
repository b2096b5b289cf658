"""Some numbers of a timed problem in float64, and how far from them a kernel's may be.

They are rows and keys of the last sequence, of its last group of heads: where an index that overflows, or a tile that
is left out, would show.  Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tvm_flash import numerics, reference
from tvm_flash.measure.workloads import Workload

#: So many rows, or keys, are compared, from the first to the last of their sequence.
SAMPLES = 16
#: Scores that are in memory at a time.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Exact:
    """What is compared: of the last head of a result's last sequence the positions ``at``, ``(positions, dim)``."""

    at: np.ndarray
    values: np.ndarray
    bound: float


@dataclass(frozen=True)
class Group:
    """The last group of heads of the last sequence, float64.

    ``q``, ``dout``: ``(group, seqlen_q, dim)``; ``k``, ``v``: ``(seqlen_kv, dim)``; ``params`` by name, of those that
    each head has a value of ``(group,)``.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    dout: np.ndarray | None = None
    params: Mapping[str, Any] = field(default_factory=dict)

    @property
    def lengths(self) -> tuple[int, int]:
        return self.q.shape[1], self.k.shape[0]


def _samples(length: int) -> np.ndarray:
    return np.linspace(0, length - 1, min(SAMPLES, length)).round().astype(int)


def _place(group: Group, head: int, rows: np.ndarray) -> reference.Positions:
    values = {name: x[head] if np.ndim(x) else x for name, x in group.params.items()}
    return reference.Positions(rows[:, None], np.arange(group.lengths[1])[None], *group.lengths, values)


def _weights(w: Workload, s: np.ndarray, at: reference.Positions) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and the log-sum-exp of scaled products."""
    x = np.where(reference.MASKS[w.mask](at), reference.SCORES[w.score](s, at), -np.inf)
    largest = x.max(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        p = np.nan_to_num(np.exp(x - largest))
        total = p.sum(axis=-1, keepdims=True)
        return p / np.maximum(total, np.finfo(float).tiny), (largest + np.log(total))[:, 0]


# ---------------------------------------------------------------- forward


def forward(w: Workload, group: Group) -> dict[str, Exact]:
    """Rows of the result."""
    at = _samples(group.lengths[0])
    rows, place = group.q[-1, at], _place(group, -1, at)
    s = rows @ group.k.T * w.softmax_scale
    exact = _weights(w, s, place)[0] @ group.v
    return {"o": Exact(at, exact, numerics.bound([_usual(w, group, rows, s, place)], exact, w.dtype))}


def _usual(w: Workload, group: Group, rows: np.ndarray, s: np.ndarray, place: reference.Positions) -> np.ndarray:
    """The rows as one would compute them in the dtype: probabilities and result rounded, sums in float32.

    Scores come from float64, but for float32, where the rounding of their sums is all there is.
    """
    if w.dtype == "float32" and w.score == "identity":
        products = np.zeros(s.shape, np.float32)
        for d in range(w.head_dim):  # one product after another, as kernels sum, where NumPy would sum in blocks
            products += np.outer(rows[:, d], group.k[:, d]).astype(np.float32)
        s = products * np.float32(w.softmax_scale)
    x = np.where(reference.MASKS[w.mask](place), reference.SCORES[w.score](s, place), -np.inf)
    with np.errstate(invalid="ignore"):
        p = np.nan_to_num(np.exp(x - x.max(axis=-1, keepdims=True))).astype(np.float32)
    p, values = numerics.round_to(p, w.dtype), group.v.astype(np.float32)
    weighted = np.einsum("ij,jd->id", p, values) if w.dtype == "float32" else p @ values
    sums = np.maximum(p.sum(axis=-1, keepdims=True), np.finfo(np.float32).tiny)
    return numerics.round_to((weighted / sums).astype(np.float32), w.dtype)


# ---------------------------------------------------------------- backward


@dataclass(frozen=True)
class Backward:
    """What a forward left of the group, ``(group, seqlen_q, dim)`` and ``(group, seqlen_q)``, and gradients."""

    out: np.ndarray
    lse: np.ndarray
    gradients: Mapping[str, Exact]


def backward(w: Workload, group: Group) -> Backward:
    """Rows of dq and keys of dk and dv, and what the kernel is given for them."""
    (queries, keys), heads = group.lengths, len(group.q)
    rows, at = _samples(queries), _samples(keys)
    out, lse = np.zeros((heads, queries, group.v.shape[1])), np.zeros((heads, queries))
    shapes = {"dq": (len(rows), w.head_dim), "dk": (len(at), w.head_dim), "dv": (len(at), w.head_dim_v)}
    exact, usual = ({name: np.zeros(shape) for name, shape in shapes.items()} for _ in range(2))
    for head in range(heads):
        for chunk in _chunks(queries, keys):
            place, q, dout = _place(group, head, chunk), group.q[head, chunk], group.dout[head, chunk]
            s = q @ group.k.T * w.softmax_scale
            p, lse[head, chunk] = _weights(w, s, place)
            out[head, chunk] = o = p @ group.v
            dp, slope = dout @ group.v.T, _slope(w, s, place)
            sampled = np.flatnonzero(np.isin(chunk, rows)) if head == heads - 1 else ()
            for found, rounded in ((exact, np.asarray), (usual, _rounding(w.dtype))):
                ds = rounded(p * (dp - (dout * rounded(o)).sum(axis=-1, keepdims=True)) * slope) * w.softmax_scale
                found["dk"] += ds[:, at].T @ q
                found["dv"] += rounded(p)[:, at].T @ dout
                for i in sampled:
                    found["dq"][rows == chunk[i]] = ds[i] @ group.k
    found = {}
    for name, values in exact.items():
        bound = numerics.gradient_bound(_rounding(w.dtype)(usual[name]), values, w.dtype)
        found[name] = Exact(rows if name == "dq" else at, values, bound)
    return Backward(out, lse, found)


def _chunks(queries: int, keys: int) -> Iterator[np.ndarray]:
    size = max(1, _CHUNK // keys)
    return (np.arange(first, min(first + size, queries)) for first in range(0, queries, size))


def _rounding(dtype: str):
    return lambda x: numerics.round_to(x.astype(np.float32), dtype).astype(np.float64)


def _slope(w: Workload, s: np.ndarray, at: reference.Positions) -> np.ndarray | float:
    """The derivative of the score, by central differences as in :mod:`tvm_flash.reference`."""
    if w.score == "identity":
        return 1.0
    step, score = reference.STEP * np.maximum(1.0, np.abs(s)), reference.SCORES[w.score]
    return (score(s + step, at) - score(s - step, at)) / (2 * step)
