"""Numbers first: a candidate's results against float64, on an awkward small problem and on rows of the timed one.

Runs in the measuring process.  Needs torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tvm_flash import numerics, reference
from tvm_flash.measure.sample import PARAMS
from tvm_flash.measure.workloads import Workload
from tvm_flash.packs import by_role, sizes
from tvm_flash.packs.manifest import KernelEntry

#: The small problem: grouped heads, lengths that divide no tile, more keys than queries.
BATCH, HEADS, KV_HEADS, SEQLEN_Q, SEQLEN_KV = 1, 4, 2, 150, 333
WINDOW_LEFT, WINDOW_RIGHT = 70, 9

#: So many rows of the timed problem are compared, from its first to its last.
ROWS = 16


class WrongNumbersError(Exception):
    """A result is wrong, unwritten, or not the same in two runs."""


@dataclass(frozen=True)
class Oracle:
    """The small problem: float32 inputs ``(batch, heads, seq, dim)``, exact results and how far off one may be."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    params: dict
    out: np.ndarray
    lse: np.ndarray
    bound: float


@functools.cache
def oracle(dtype: str, head_dim: int, head_dim_v: int, mask: str, score: str) -> Oracle:
    """Made once for all candidates of a kind."""
    rng = np.random.default_rng(0)
    shapes = ((HEADS, SEQLEN_Q, head_dim), (KV_HEADS, SEQLEN_KV, head_dim), (KV_HEADS, SEQLEN_KV, head_dim_v))
    q, k, v = (numerics.round_to(rng.standard_normal((BATCH, *s), dtype=np.float32), dtype) for s in shapes)
    slopes = np.array([[2.0 ** -(2 + h) for h in range(HEADS)]] * BATCH, np.float32)
    # Where queries stand is said to the one mask that asks for it; to the others it would be another diagonal.
    given = {name: x for name, x in PARAMS.items() if mask == "positioned" or "query_start" not in name}
    params = {**given, "alibi_slopes": slopes, "window_left": WINDOW_LEFT, "window_right": WINDOW_RIGHT}
    what = {
        "softmax_scale": 1 / math.sqrt(head_dim),
        "mask": reference.MASKS[mask],
        "score": reference.SCORES[score],
        "params": params,
    }
    out, lse = reference.attention(q, k, v, **what)
    usual = numerics.usual_attention(q, k, v, dtype=dtype, **what)
    return Oracle(q, k, v, params, out, lse, numerics.bound(usual, out, dtype))


def call_of(entry: KernelEntry, functions: Sequence, values: Mapping[str, Any], device: str) -> Callable[[], None]:
    """A call of a kernel with tensors and numbers by role, those among them of its own layout."""
    heads, seq = (1, 2) if entry.layout == "bhsd" else (2, 1)
    q, k, v = (values[role].shape for role in "qkv")
    problem = sizes.of(q[0], q[heads], q[seq], k[heads], k[seq], q[3], v[3])

    def make(shape: tuple[int, ...], dtype: str, zeroed: bool) -> torch.Tensor:
        return (torch.zeros if zeroed else torch.empty)(shape, dtype=getattr(torch, dtype), device=device)

    return by_role.bind(entry, functions, values, problem, make)


def check_small(entry: KernelEntry, functions: Sequence, device: str) -> float:
    """Run the small problem twice; the largest error as a share of what is allowed.

    Raises
    ------
    WrongNumbersError: a result is wrong, unwritten, or differs from run to run.
    """
    exact = oracle(entry.dtype, entry.head_dim, entry.head_dim_v, entry.mask, entry.score)
    unwritten = np.full((BATCH, HEADS, SEQLEN_Q, entry.head_dim_v), np.nan, np.float32)
    runs = []
    for _ in range(2):
        q, k, v, o = (_tensor(x, entry, device) for x in (exact.q, exact.k, exact.v, unwritten))
        lse = torch.full((BATCH * HEADS * SEQLEN_Q,), torch.nan, device=device)
        params = {
            p.name: torch.from_numpy(x).to(device) if isinstance(x := exact.params[p.name], np.ndarray) else x
            for p in entry.params
        }
        values = {"q": q, "k": k, "v": v, "o": o, "lse": lse, "softmax_scale": 1 / math.sqrt(entry.head_dim)}
        call_of(entry, functions, {**values, **params}, device)()
        o = o if entry.layout == "bhsd" else o.transpose(1, 2)
        runs.append((o.double().cpu().numpy(), lse.double().cpu().numpy().reshape(exact.lse.shape)))
    out, lse = runs[0]
    if not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(*runs, strict=True)):
        raise WrongNumbersError("two runs differ")
    share = numerics.largest_error(out, exact.out) / exact.bound
    lse_share = numerics.largest_error(lse, exact.lse) / numerics.lse_bound(exact.lse)
    if not share <= 1:  # false for NaN
        raise WrongNumbersError(f"the error is {share:.3g} × what is allowed")
    if not lse_share <= 1:
        raise WrongNumbersError(f"the error of the log-sum-exp is {lse_share:.3g} × what is allowed")
    return share


def _tensor(x: np.ndarray, entry: KernelEntry, device: str) -> torch.Tensor:
    x = torch.from_numpy(x).to(device, getattr(torch, entry.dtype))
    return x if entry.layout == "bhsd" else x.transpose(1, 2).contiguous()


@dataclass(frozen=True)
class Rows:
    """Some rows of the last head of a timed problem: where, float64 results, and how far off one may be."""

    at: torch.Tensor
    exact: np.ndarray
    bound: float


def rows_of(workload: Workload, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, params: dict) -> Rows:
    """The exact rows; q, k, v are ``(batch, heads, seq, dim)``, params as the kernel takes them."""
    w = workload
    at = torch.linspace(0, w.seqlen_q - 1, min(ROWS, w.seqlen_q)).round().long()
    rows, keys, values = (x.double().cpu().numpy() for x in (q[-1, -1][at.to(q.device)], k[-1, -1], v[-1, -1]))
    numbers = {
        n: x[-1:, -1:, None, None].double().cpu().numpy() if torch.is_tensor(x) else x for n, x in params.items()
    }
    place = reference.Positions(at.numpy()[:, None], np.arange(w.seqlen_kv)[None], w.seqlen_q, w.seqlen_kv, numbers)
    s = reference.SCORES[w.score]((rows @ keys.T)[None, None] * w.softmax_scale, place)[0, 0]
    s = np.where(reference.MASKS[w.mask](place), s, -np.inf)
    with np.errstate(invalid="ignore"):
        p = np.nan_to_num(np.exp(s - s.max(axis=-1, keepdims=True)))
    sums = np.maximum(p.sum(axis=-1, keepdims=True), np.finfo(float).tiny)
    exact = p @ values / sums
    return Rows(at, exact, numerics.bound([_usual(w, rows, keys, values, s)], exact, w.dtype))


def _usual(w: Workload, rows: np.ndarray, keys: np.ndarray, values: np.ndarray, s: np.ndarray) -> np.ndarray:
    """The rows as one would compute them in the dtype: probabilities and result rounded, sums in float32.

    Scores ``s`` come from float64, but for float32, where the rounding of their sums is all there is.
    """
    if w.dtype == "float32" and w.score == "identity":
        products = np.zeros(s.shape, np.float32)
        for d in range(w.head_dim):  # one product after another, as kernels sum, where NumPy would sum in blocks
            products += np.outer(rows[:, d], keys[:, d]).astype(np.float32)
        s = np.where(np.isneginf(s), s, products * np.float32(w.softmax_scale))
    with np.errstate(invalid="ignore"):
        p = np.nan_to_num(np.exp(s - s.max(axis=-1, keepdims=True))).astype(np.float32)
    p, values = numerics.round_to(p, w.dtype), values.astype(np.float32)
    weighted = np.einsum("ij,jd->id", p, values) if w.dtype == "float32" else p @ values
    sums = np.maximum(p.sum(axis=-1, keepdims=True), np.finfo(np.float32).tiny)
    return numerics.round_to((weighted / sums).astype(np.float32), w.dtype)


def check_rows(rows: Rows, o: torch.Tensor) -> float:
    """Compare an output ``(batch, heads, seq, dim)``; the largest error as a share of what is allowed.

    Raises
    ------
    WrongNumbersError: it is too large.
    """
    got = o[-1, -1][rows.at.to(o.device)].double().cpu().numpy()
    share = numerics.largest_error(got, rows.exact) / rows.bound
    if not share <= 1:
        raise WrongNumbersError(f"the error is {share:.3g} × what is allowed")
    return share
