"""Attention cases that kernel tests, interface tests and benchmarks share, with inputs and float64 answers."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace

import numpy as np

from tvm_flash import numerics, reference

DTYPES = ("float32", "float16", "bfloat16")

#: How q, k, v and o lie in memory, whatever the layout of the function that is called: its own; the other layout's,
#: seen through a transposition; or with gaps between rows, heads and batches.
STRIDES = ("contiguous", "transposed", "gaps")


@dataclass(frozen=True)
class Case:
    """One attention problem.

    Attributes
    ----------
    batch, heads, kv_heads, seqlen_q, seqlen_kv, head_dim, head_dim_v: sizes; 0 for ``kv_heads``, ``seqlen_kv`` and
        ``head_dim_v`` stands for ``heads``, ``seqlen_q`` and ``head_dim``.
    dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
    mask, score: names in the catalogue.
    params: values of the run-time parameters by name, as pairs; per-head ones are made by :func:`inputs`.
    strides: one of ``STRIDES``.
    """

    batch: int
    heads: int
    seqlen_q: int
    head_dim: int
    kv_heads: int = 0
    seqlen_kv: int = 0
    head_dim_v: int = 0
    dtype: str = "float32"
    mask: str = "full"
    score: str = "identity"
    params: tuple[tuple[str, float], ...] = ()
    strides: str = "contiguous"

    def __post_init__(self):
        for field, default in (("kv_heads", "heads"), ("seqlen_kv", "seqlen_q"), ("head_dim_v", "head_dim")):
            if not getattr(self, field):
                object.__setattr__(self, field, getattr(self, default))

    @property
    def id(self) -> str:
        """Short and unique among the cases."""
        sizes = f"b{self.batch}h{self.heads}.{self.kv_heads}s{self.seqlen_q}.{self.seqlen_kv}d{self.head_dim}"
        sizes += f".{self.head_dim_v}" if self.head_dim_v != self.head_dim else ""
        params = "".join(f"-{name}={value:g}" for name, value in self.params)
        strides = "" if self.strides == "contiguous" else f"-{self.strides}"
        return f"{sizes}-{self.dtype}-{self.mask}-{self.score}{params}{strides}"

    @property
    def softmax_scale(self) -> float:
        return 1 / math.sqrt(self.head_dim)


@dataclass(frozen=True)
class Inputs:
    """What a case computes with, ``(batch, heads, seq, dim)`` float32 arrays whose values the case's dtype can hold.

    ``params`` has per-head parameters as ``(batch, heads)`` float32 arrays and scalars as numbers.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    params: dict


def inputs(case: Case) -> Inputs:
    """Standard normal q, k, v and the parameters; the same for the same case on every machine."""
    rng = np.random.default_rng(zlib.crc32(case.id.encode()))

    def tensor(heads, seqlen, dim):
        return numerics.round_to(rng.standard_normal((case.batch, heads, seqlen, dim), np.float32), case.dtype)

    q = tensor(case.heads, case.seqlen_q, case.head_dim)
    k = tensor(case.kv_heads, case.seqlen_kv, case.head_dim)
    v = tensor(case.kv_heads, case.seqlen_kv, case.head_dim_v)
    params = dict(case.params)
    if "alibi" in case.score or params.get("has_alibi_slopes"):
        slopes = 2.0 ** (-8 * (np.arange(case.heads) + 1) / case.heads) * (1 + np.arange(case.batch))[:, None]
        params["alibi_slopes"] = slopes.astype(np.float32)
    if case.mask in ("padded", "positioned"):
        # From all keys down to none, cut off at the left, at the right, and beyond both ends.
        step = np.arange(case.batch * case.heads).reshape(case.batch, case.heads) * case.seqlen_kv
        params["kv_start"] = (step // (3 * step.size) - 2).astype(np.int32)
        params["kv_end"] = (case.seqlen_kv + 2 - step // step.size).astype(np.int32)
        params["kv_end"][-1, -1] = params["kv_start"][-1, -1]
    if case.mask == "positioned":
        # From before the first key to beyond the last.
        places = np.linspace(-case.seqlen_q, case.seqlen_kv + 3, case.batch * case.heads)
        params["query_start"] = places.astype(np.int32).reshape(case.batch, case.heads)
    nothing = np.full((case.batch, case.heads), np.nan, np.float32)  # not to be used
    if case.score.startswith("optional"):
        params.setdefault("alibi_slopes", nothing)
    if case.score.endswith("_sinks"):
        # From none to one that outweighs every key.
        sinks = np.linspace(-4, 9, nothing.size).astype(np.float32).reshape(nothing.shape)
        sinks[-1, 0] = -np.inf
        params["sinks"] = sinks if params.get("has_sinks", True) else nothing
    return Inputs(q, k, v, params)


def expected(case: Case, data: Inputs | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Output and log-sum-exp of a case in float64 (see :func:`tvm_flash.reference.attention`)."""
    data = data or inputs(case)
    return reference.attention(
        data.q,
        data.k,
        data.v,
        softmax_scale=case.softmax_scale,
        mask=reference.MASKS[case.mask],
        score=reference.SCORES[case.score],
        params=data.params,
    )


def _in_all_dtypes(*cases: Case) -> tuple[Case, ...]:
    return tuple(replace(c, dtype=dtype) for c in cases for dtype in DTYPES)


_WINDOW = (("window_left", 40), ("window_right", 3))
_BAND = (("window_left", 17), ("window_right", 0))
_SINK = (*_BAND, ("sink_tokens", 5))
_CAP = (("softcap", 2.0),)
_UNBOUNDED = (("window_left", 1 << 20), ("window_right", 1 << 20))
_PLAIN = (("softcap", 0.0), ("has_alibi_slopes", 0), ("has_query_start", 1))
_CAP_ONLY = (*_CAP, ("has_alibi_slopes", 0), ("has_query_start", 1))
_ALL = (*_CAP, ("has_alibi_slopes", 1), ("has_query_start", 1))
_ALIGNED = (("softcap", 0.0), ("has_alibi_slopes", 1), ("has_query_start", 0))

#: What every kernel must get right: small, odd, and each for a reason.
CASES: tuple[Case, ...] = _in_all_dtypes(
    # Every mask, with lengths that divide no tile, more keys than queries and the reverse.
    Case(2, 3, 70, 64, seqlen_kv=131),
    Case(1, 2, 131, 64, mask="causal"),
    Case(1, 2, 70, 64, seqlen_kv=333, mask="causal"),
    Case(1, 2, 333, 64, seqlen_kv=70, mask="causal"),  # the first rows see nothing
    Case(2, 2, 150, 64, mask="window", params=_WINDOW),
    Case(1, 2, 37, 64, seqlen_kv=290, mask="window", params=_BAND),
    Case(1, 2, 260, 64, mask="sink_window", params=_SINK),
    Case(3, 4, 130, 64, kv_heads=2, seqlen_kv=330, mask="padded", params=_UNBOUNDED),
    Case(2, 3, 200, 64, mask="padded", params=_BAND),
    Case(4, 2, 1, 64, seqlen_kv=270, mask="padded", params=_UNBOUNDED),
    # Every score modification.
    Case(1, 2, 90, 64, seqlen_kv=100, score="softcap", params=_CAP),
    Case(2, 4, 90, 64, seqlen_kv=100, score="alibi"),
    Case(1, 2, 77, 64, mask="causal", score="softcap_alibi", params=_CAP),
    Case(1, 2, 140, 64, mask="window", score="softcap", params=(*_WINDOW, *_CAP)),
    # Everything in one kernel, each part on and off.
    *(
        Case(*sizes, seqlen_kv=seqlen_kv, kv_heads=kv_heads, mask="positioned", score="optional", params=params)
        for sizes, seqlen_kv, kv_heads, params in (
            ((3, 4, 130, 64), 330, 2, (*_BAND, *_PLAIN)),
            ((2, 3, 70, 64), 150, 3, (*_WINDOW, *_ALL)),
            ((3, 2, 40, 64), 90, 1, (*_UNBOUNDED, *_CAP_ONLY)),
            ((2, 2, 77, 64), 60, 2, (*_BAND, *_ALIGNED)),
            ((4, 2, 1, 64), 270, 2, (*_UNBOUNDED, *_PLAIN)),
            ((4, 4, 3, 64), 270, 2, (*_BAND, *_ALL)),
        )
    ),
    *(
        Case(*sizes, seqlen_kv=seqlen_kv, kv_heads=kv_heads, mask="positioned", score="optional_sinks", params=params)
        for sizes, seqlen_kv, kv_heads, params in (
            ((2, 4, 130, 64), 330, 2, (*_BAND, *_PLAIN, ("has_sinks", 1))),
            ((2, 3, 70, 64), 50, 1, (*_UNBOUNDED, *_ALL, ("has_sinks", 1))),
            ((2, 4, 40, 64), 90, 1, (*_WINDOW, *_ALIGNED, ("has_sinks", 0))),
            ((2, 2, 3, 64), 2100, 2, (*_UNBOUNDED, *_PLAIN, ("has_sinks", 1))),
        )
    ),
    # Grouped heads.
    Case(2, 6, 65, 64, kv_heads=2, seqlen_kv=97, mask="causal"),
    Case(1, 8, 33, 64, kv_heads=1),
    Case(2, 8, 5, 64, kv_heads=2, seqlen_kv=150, mask="causal"),
    Case(1, 12, 3, 64, kv_heads=2, seqlen_kv=90),
    # Few queries, one key.
    Case(2, 4, 1, 64, seqlen_kv=300),
    Case(2, 4, 1, 64, kv_heads=2, seqlen_kv=300, mask="causal"),
    Case(1, 2, 5, 64, seqlen_kv=129, mask="causal", score="softcap", params=_CAP),
    Case(1, 2, 3, 64, seqlen_kv=400, mask="window", params=_BAND),
    Case(3, 1, 9, 64, seqlen_kv=1),
    Case(1, 2, 2, 64, seqlen_kv=2500, mask="causal"),  # the keys are split
    Case(1, 1, 4, 64, seqlen_kv=3000, mask="window", params=_BAND),  # and most parts see nothing
    # Smaller head dimensions than a kernel's, and values of another width.
    Case(1, 2, 50, 40, seqlen_kv=77),
    Case(1, 2, 50, 8, seqlen_kv=77, mask="causal"),
    Case(1, 2, 50, 64, seqlen_kv=77, head_dim_v=24),
    Case(1, 2, 1, 40, seqlen_kv=77, head_dim_v=56),
    # Memory that isn't contiguous.
    Case(2, 3, 45, 64, seqlen_kv=66, strides="transposed", mask="causal"),
    Case(2, 3, 45, 64, seqlen_kv=66, strides="gaps"),
    Case(2, 4, 1, 64, kv_heads=2, seqlen_kv=66, strides="gaps"),
    # Many tiles.
    Case(1, 1, 600, 64, seqlen_kv=1100, mask="causal"),
)
