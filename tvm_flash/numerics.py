"""Rounding, attention as one usually computes it in a dtype, and how far from float64 a result may be.

The rule of every comparison here, in tests, in the tuner and in the benchmark: an error is at most **twice that of the
usual computation in the same dtype, plus one rounding**.  The largest error of a few numbers is a matter of luck, and
of the order in which one processor's library happens to sum; so the usual error is the largest of several orders of the
same sums, of which those taken here are the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from tvm_flash import reference

#: Distance of 1 from the next larger number of each dtype: one unit in the last place.
EPSILON = MappingProxyType({"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7})

#: Of the log-sum-exp, relative to the largest: 32 roundings, since it ends a sum over all keys, rescaled tile by tile.
LSE_TOLERANCE = 4e-6

#: Keys whose values are summed one after another; then the sums of these tiles are.
TILE = 64
#: In so many orders the usual sums are taken where results are few.
ORDERS = 8
#: Elements of a result that are few: of them, the largest error is a matter of chance.
FEW = 20_000


# ---------------------------------------------------------------- rounding


def encode(x: np.ndarray, dtype: str) -> np.ndarray:
    """Memory of a dtype with the values of ``x``, rounded to nearest even.

    NumPy lacks bfloat16, which is uint16 here, and float8_e4m3fn, which is uint8.  In 8 bits what is too large becomes
    the largest number, and NaN of int8 the one number that no cache has, -128.
    """
    if dtype not in ("bfloat16", "float8_e4m3fn", "int8"):
        return np.ascontiguousarray(x, dtype=dtype)
    x = np.ascontiguousarray(x, dtype=np.float32)
    if dtype == "int8":
        return np.where(np.isnan(x), -128, np.rint(np.clip(np.nan_to_num(x), -127, 127))).astype(np.int8)
    if dtype == "float8_e4m3fn":
        size = np.minimum(np.abs(np.nan_to_num(x)), _E4M3[-1])
        above = np.searchsorted(_E4M3, size)
        below = np.maximum(above - 1, 0)
        to_above, to_below = _E4M3[above] - size, size - _E4M3[below]
        nearest = np.where((to_above < to_below) | ((to_above == to_below) & (above % 2 == 0)), above, below)
        return np.where(np.isnan(x), 0x7F, nearest | np.signbit(x) << 7).astype(np.uint8)
    bits = x.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def decode(memory: np.ndarray, dtype: str) -> np.ndarray:
    """The values of a dtype's memory as float32."""
    if dtype == "float8_e4m3fn":
        return np.append(_E4M3, np.float32(np.nan))[memory & 0x7F] * np.where(memory & 0x80, np.float32(-1), 1)
    if dtype != "bfloat16":
        return memory.astype(np.float32)
    return (memory.astype(np.uint32) << 16).view(np.float32)


#: The numbers of float8_e4m3fn that aren't negative, in order: 4 bits of exponent with a bias of 7, 3 of fraction.
_E4M3 = np.array([(i & 7 | (8 if i > 7 else 0)) * 2.0 ** (max(i >> 3, 1) - 10) for i in range(0x7F)], np.float32)


def round_to(x: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers rounded to a dtype, ties to even, as float32; NaN and infinities stay."""
    return decode(encode(x, dtype), dtype)


# ---------------------------------------------------------------- bounds


def largest_error(got: np.ndarray, exact: np.ndarray) -> float:
    """Largest difference, NaN if there is one; equal infinities don't differ."""
    with np.errstate(invalid="ignore"):
        return float(np.abs(np.where(got == exact, 0.0, got - exact)).max(initial=0.0))


def magnitude(x: np.ndarray) -> float:
    """The largest of the finite numbers, without its sign."""
    return float(np.abs(x[np.isfinite(x)]).max(initial=0.0))


def allowed_error(usual: float, largest: float, dtype: str) -> float:
    """The rule: how large an error may be.

    Parameters
    ----------
    usual: error of the usual computation in the same dtype.
    largest: magnitude of the largest exact result; 1 if errors are relative to it.
    """
    return 2 * usual + EPSILON[dtype] * largest


def bound(usual: Iterable[np.ndarray], exact: np.ndarray, dtype: str) -> float:
    """The rule for arrays: ``usual`` are results of the usual computation, each with its sums in another order."""
    return allowed_error(largest_of(largest_error(x, exact) for x in usual), magnitude(exact), dtype)


def largest_of(errors: Iterable[float]) -> float:
    """The largest error of usual computations; one that made a NaN or an infinity of finite numbers allows nothing."""
    return max(filter(math.isfinite, errors), default=0.0)


def gradient_bound(usual: np.ndarray, exact: np.ndarray, dtype: str) -> float:
    """The rule for a gradient, whose sums are in float32: of these, too, an error of 32 roundings is allowed."""
    return max(bound([usual], exact, dtype), LSE_TOLERANCE * magnitude(exact))


def lse_bound(exact: np.ndarray, largest_score: float = 0.0) -> float:
    """How large an error of the log-sum-exp may be; ``largest_score`` is the magnitude of the largest one, if known."""
    return LSE_TOLERANCE * max(1.0, largest_score, magnitude(exact))


# ---------------------------------------------------------------- the usual computation


def orders(head_dim: int, seqlen_kv: int, elements: float, seed: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Orders of the products of a score and of the keys of a result: ``ORDERS`` where its ``elements`` are few, else 1.

    The first is the order in which they lie in memory.
    """
    yield np.arange(head_dim), np.arange(seqlen_kv)
    rng = np.random.default_rng(seed)
    for _ in range(ORDERS - 1 if elements <= FEW else 0):
        yield rng.permutation(head_dim), rng.permutation(seqlen_kv)


def usual_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    softmax_scale: float,
    mask: Callable,
    score: Callable,
    params: Mapping[str, Any],
    dtype: str,
    axes: Mapping[str, str] | None = None,
) -> list[np.ndarray]:
    """Attention as one expects it of a dtype: float32 throughout, weights and result rounded.  One result an order.

    Arguments are those of :func:`tvm_flash.reference.attention`.  In float32 the rounding of the sums is all there is,
    so that each of :func:`orders` counts; in 16 bits it hides behind that of the weights, and one order stands for all.
    """
    k, v = (np.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    at = reference.positions(*q.shape[:3], k.shape[2], reference.beside_scores(params, axes))
    visible = np.broadcast_to(mask(at), (*q.shape[:3], k.shape[2]))

    def attend(terms, keys):
        products = _one_by_one(q[..., terms], np.swapaxes(k[..., terms], -1, -2))
        s = np.where(visible, score(products * np.float32(softmax_scale), at), -np.inf).astype(np.float32)
        sink = reference.sink_of(score, at).astype(np.float32)
        row_max = np.maximum(s.max(axis=-1, keepdims=True, initial=-np.inf), sink)
        with np.errstate(invalid="ignore"):
            prob = np.where(row_max == -np.inf, np.float32(0), np.exp(s - row_max))[..., keys]
            row_sum = prob.sum(axis=-1, keepdims=True) + np.where(sink == -np.inf, 0, np.exp(sink - row_max))
            weights, values = round_to(prob, dtype), v[..., keys, :]
            return round_to(np.where(row_sum == 0, np.float32(0), _sum_of_tiles(weights, values) / row_sum), dtype)

    elements = q[..., 0].size * v.shape[-1] if dtype == "float32" else math.inf
    return [attend(terms, keys) for terms, keys in orders(q.shape[3], k.shape[2], elements)]


def usual_gradients(
    dout: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    dtype: str,
    gradients: Sequence[str] = (),
    **what: Any,
) -> reference.Gradients:
    """Gradients of attention as one computes them in a dtype: weights, gradients of scores and results are rounded.

    Arguments are those of :func:`tvm_flash.reference.attention_backward`.  Sums are exact: their rounding isn't in it.
    """

    def rounded(x: np.ndarray) -> np.ndarray:
        return round_to(x.astype(np.float32), dtype)

    found = reference.attention_backward(dout, q, k, v, gradients=gradients, rounded=rounded, **what)
    shares = {name: x.astype(np.float32) for name, x in found.params.items()}
    return reference.Gradients(*(round_to(x, dtype) for x in (found.dq, found.dk, found.dv)), shares)


def _one_by_one(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``a @ b`` with each sum taken term after term, where a library of matrix products has an order of its own.

    It is also three times as fast as such a library, whose threads wait for one another, on a machine that is busy.
    """
    return np.einsum("bhij,bhjd->bhid", np.ascontiguousarray(a), np.ascontiguousarray(b))


def _sum_of_tiles(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """``weights @ values`` as kernels with an online softmax sum it: a tile of keys, and then the next.

    One chain over thousands of keys is several times less accurate, and a bound that follows from it is blind.
    """
    total = np.zeros((*weights.shape[:3], values.shape[-1]), np.float32)
    for first in range(0, values.shape[2], TILE):
        total += _one_by_one(weights[..., first : first + TILE], values[:, :, first : first + TILE])
    return total
