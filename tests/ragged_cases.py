"""Sequences of different lengths: one list of cases for every family, their inputs, and what must come out.

Each sequence must be what it is alone, so that its answer in float64 and how far one may be from it are those of
``cases.py``, ``torch_cases.py`` and ``gradient_cases.py``.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from tests import cases, gradient_cases, torch_cases
from tests.cases import DTYPES, Case, Inputs
from tests.gradient_cases import SUMS, Outer
from tests.torch_cases import Compute, tensor
from tvm_flash import numerics
from tvm_flash.packs import sizes
from tvm_flash.packs.manifest import Param

STARTS = ("cu_seqlens_q", "cu_seqlens_k")


@dataclass(frozen=True)
class RaggedCase:
    """Sequences of ``queries`` and ``keys``, in elements; the same if no ``keys`` are given.

    ``after`` are rows and keys that follow the last sequence.  The rest is as in :class:`tests.cases.Case`.
    """

    queries: tuple[int, ...]
    heads: int
    head_dim: int
    keys: tuple[int, ...] = ()
    kv_heads: int = 0
    head_dim_v: int = 0
    dtype: str = "float32"
    mask: str = "full"
    score: str = "identity"
    params: tuple[tuple[str, float], ...] = ()
    strides: str = "contiguous"
    after: tuple[int, int] = (0, 0)

    def __post_init__(self):
        for field, default in (("kv_heads", "heads"), ("keys", "queries"), ("head_dim_v", "head_dim")):
            if not getattr(self, field):
                object.__setattr__(self, field, getattr(self, default))

    @property
    def batch(self) -> int:
        return len(self.queries)

    @property
    def id(self) -> str:
        """Short and unique among the cases."""
        lengths = ".".join(map(str, self.queries))
        lengths += "" if self.keys == self.queries else "x" + ".".join(map(str, self.keys))
        what = "-".join((self.dtype, self.mask, self.score, *(f"{n}={x:g}" for n, x in self.params), self.strides))
        dims = f"{self.head_dim}.{self.head_dim_v}"
        return f"{lengths}+{self.after[0]}.{self.after[1]}h{self.heads}.{self.kv_heads}d{dims}-{what}"

    @property
    def totals(self) -> tuple[int, int]:
        """Rows of q, and of k and v."""
        return sum(self.queries) + self.after[0], sum(self.keys) + self.after[1]

    @property
    def starts(self) -> tuple[np.ndarray, np.ndarray]:
        """``cu_seqlens_q`` and ``cu_seqlens_k``."""
        return tuple(np.int32([0, *itertools.accumulate(x)]) for x in (self.queries, self.keys))

    @property
    def sizes(self) -> dict[str, int]:
        total_q, total_k = self.totals
        dims = (self.head_dim, self.head_dim_v)
        return sizes.of_sequences(self.batch, self.heads, total_q, self.kv_heads, total_k, *dims)

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5

    def rows(self, b: int) -> tuple[slice, slice]:
        """Rows and keys of a sequence."""
        return tuple(slice(int(x[b]), int(x[b + 1])) for x in self.starts)

    def alone(self, b: int) -> Case:
        """A sequence that has queries and keys, by itself."""
        dims = (self.kv_heads, self.keys[b], self.head_dim_v)
        return Case(
            *(1, self.heads, self.queries[b], self.head_dim, *dims, self.dtype, self.mask, self.score, self.params)
        )

    @property
    def seeing(self) -> list[int]:
        """The sequences that have queries and keys."""
        return [b for b in range(self.batch) if self.queries[b] and self.keys[b]]


@dataclass(frozen=True)
class RaggedInputs:
    """``(total, heads, dim)`` float32 arrays whose values the case's dtype can hold; ``params`` as in Inputs."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    params: dict

    def alone(self, case: RaggedCase, b: int) -> Inputs:
        """Those of one sequence."""
        i, j = case.rows(b)
        params = {name: x[b : b + 1] if np.ndim(x) else x for name, x in self.params.items()}
        return Inputs(*(_batch(x) for x in (self.q[i], self.k[j], self.v[j])), params)


def _batch(rows: np.ndarray) -> np.ndarray:
    """``(rows, heads, dim)`` as ``(1, heads, rows, dim)``."""
    return rows.swapaxes(0, 1)[None]


def inputs(case: RaggedCase) -> RaggedInputs:
    """Standard normal q, k, v, NaN after the last sequence, and the parameters; the same on every machine."""
    rng = np.random.default_rng(zlib.crc32(case.id.encode()))

    def rows(total, after, heads, dim):
        x = numerics.round_to(rng.standard_normal((total, heads, dim), np.float32), case.dtype)
        x[total - after :] = np.nan
        return x

    (total_q, total_k), (after_q, after_k) = case.totals, case.after
    params = dict(case.params)
    if "alibi" in case.score or params.get("has_alibi_slopes"):
        params["alibi_slopes"] = (rng.random((case.batch, case.heads)) * 0.5).astype(np.float32)
    elif case.score.startswith("optional"):
        params["alibi_slopes"] = np.full((case.batch, case.heads), np.nan, np.float32)  # not to be used
    if params.get("has_sinks"):
        params["sinks"] = rng.standard_normal((case.batch, case.heads)).astype(np.float32)
    q = rows(total_q, after_q, case.heads, case.head_dim)
    return RaggedInputs(
        q, *(rows(total_k, after_k, case.kv_heads, d) for d in (case.head_dim, case.head_dim_v)), params
    )


#: Sides of a window that reach past every key.
_FAR = 1 << 20


def kernel_params(case: RaggedCase, data: RaggedInputs, params: tuple[Param, ...]) -> dict:
    """A case's parameters as a kernel takes them that serves its mask and its score, perhaps among others."""
    left, right = {"full": (_FAR, _FAR), "causal": (_FAR, 0)}.get(case.mask, (None, None))
    usual = {"window_left": left, "window_right": right, "softcap": 0.0}
    usual |= {"has_alibi_slopes": int("alibi" in case.score)}
    nothing = np.full((case.batch, case.heads), np.nan, np.float32)
    usual |= {"alibi_slopes": nothing, "has_sinks": 0, "sinks": nothing}
    known = {**usual, **data.params}
    return {p.name: known[p.name] for p in params}


def rows_tensor(x: np.ndarray, case: RaggedCase, device: str = "cpu", dtype: str = "") -> torch.Tensor:
    """``(rows, heads, dim)`` as the case's strides have it in memory."""
    return tensor(_batch(x), dtype or case.dtype, "bshd", case.strides, device)[0]


def arguments(case: RaggedCase, data: RaggedInputs, params: tuple[Param, ...], device: str = "cpu") -> dict:
    """What forward and backward kernels have in common, by role."""
    values = {role: rows_tensor(x, case, device) for role, x in (("q", data.q), ("k", data.k), ("v", data.v))}
    values |= {name: torch.from_numpy(x).to(device) for name, x in zip(STARTS, case.starts, strict=True)}
    given = kernel_params(case, data, params)
    values |= {n: torch.from_numpy(x).to(device) if isinstance(x, np.ndarray) else x for n, x in given.items()}
    return values | {"softmax_scale": case.softmax_scale}


def run(
    case: RaggedCase, data: RaggedInputs, compute: Compute, params: tuple[Param, ...], device="cpu", with_lse=True
) -> tuple[np.ndarray, np.ndarray]:
    """Output ``(total_q, heads, head_dim_v)`` and lse ``(heads, total_q)`` of a kernel, full of NaN beforehand."""
    total_q, rows = case.totals[0], (case.heads, case.totals[0])
    o = rows_tensor(np.full((total_q, case.heads, case.head_dim_v), np.nan, np.float32), case, device)
    lse = torch.full((rows[0] * rows[1] if with_lse else 1,), torch.nan, device=device)
    compute({**arguments(case, data, params, device), "o": o, "lse": lse}, case.sizes)
    lse = lse.double().cpu().numpy()
    return o.double().cpu().numpy(), lse.reshape(rows) if with_lse else lse


def check(case: RaggedCase, data: RaggedInputs, out: np.ndarray, lse: np.ndarray, device: str = "cpu") -> float:
    """Assert that each sequence is right, and the rest zeros; the largest error as a share of what is allowed."""
    worst, left = 0.0, np.ones(case.totals[0], bool)
    for b in case.seeing:
        i, _ = case.rows(b)
        left[i] = False
        try:
            own = torch_cases.check(case.alone(b), data.alone(case, b), _batch(out[i]), lse[None, :, i], device)
        except AssertionError as e:
            raise AssertionError(f"sequence {b}: {e}") from e
        worst = max(worst, own)
    assert not out[left].any(), "rows that see nothing aren't zeros"
    assert np.isneginf(lse[:, left]).all(), "the log-sum-exp of rows that see nothing isn't -inf"
    return worst


# ---------------------------------------------------------------- gradients


def outer(case: RaggedCase, with_dlse: bool = False) -> Outer:
    """Gradients of ``(total_q, heads, head_dim_v)`` and of ``(heads, total_q)``; NaN after the last sequence."""
    rng = np.random.default_rng(zlib.crc32(case.id.encode()) + 1)
    total_q, end = case.totals[0], sum(case.queries)
    dout = numerics.round_to(rng.standard_normal((total_q, case.heads, case.head_dim_v), np.float32), case.dtype)
    dlse = rng.standard_normal((case.heads, total_q), np.float32)
    dout[end:], dlse[:, end:] = np.nan, np.nan
    return Outer(dout, dlse if with_dlse else None)


def forward(case: RaggedCase, data: RaggedInputs) -> tuple[np.ndarray, np.ndarray]:
    """Output and lse in float64."""
    out = np.zeros((case.totals[0], case.heads, case.head_dim_v))
    lse = np.full((case.heads, case.totals[0]), -np.inf)
    for b in case.seeing:
        i, _ = case.rows(b)
        o, own = cases.expected(case.alone(b), data.alone(case, b))
        out[i], lse[:, i] = o[0].swapaxes(0, 1), own[0]
    return out, lse


def run_backward(
    case: RaggedCase, data: RaggedInputs, given: Outer, compute: Compute, params: tuple[Param, ...], device="cpu"
) -> dict[str, np.ndarray]:
    """Gradients by role, full of NaN beforehand."""
    out, lse = forward(case, data)
    values = arguments(case, data, params, device)
    values |= {name: rows_tensor(x, case, device) for name, x in (("o", out.astype(np.float32)), ("do", given.dout))}
    results = {f"d{n}": rows_tensor(np.full_like(getattr(data, n), np.nan), case, device) for n in "qkv"}
    dlse = np.full(1, np.nan, np.float32) if given.dlse is None else given.dlse
    flat = {"lse": lse.astype(np.float32), "dlse": dlse}
    values |= {name: torch.from_numpy(x.reshape(-1)).to(device) for name, x in flat.items()}
    for p in params:
        if p.gradient:
            shape = (case.batch, case.heads) if p.per_head else (1,)
            results[f"d_{p.name}"] = torch.full(shape, torch.nan, device=device)
    compute({**values, **results}, case.sizes)
    return {name: x.double().cpu().numpy() for name, x in results.items()}


def check_backward(case: RaggedCase, data: RaggedInputs, given: Outer, got: Mapping[str, np.ndarray]) -> float:
    """Assert that each sequence's gradients are right, and the rest zeros; the largest error as a share of what may be.

    Parameters are those with a value for each head.
    """
    worst, learnt = 0.0, [name for name in got if name not in SUMS]
    left = {"dq": np.ones(case.totals[0], bool)} | {n: np.ones(case.totals[1], bool) for n in ("dk", "dv")}
    for b in case.seeing:
        i, j = case.rows(b)
        at = {"dq": i, "dk": j, "dv": j}
        own = {name: _batch(got[name][at[name]]) for name in SUMS} | {n: got[n][b : b + 1] for n in learnt}
        for name in SUMS:
            left[name][at[name]] = False
        dlse = None if given.dlse is None else given.dlse[None, :, i]
        try:
            error = gradient_cases.check(
                case.alone(b), data.alone(case, b), Outer(_batch(given.dout[i]), dlse), own, numerics.LSE_TOLERANCE
            )
        except AssertionError as e:
            raise AssertionError(f"sequence {b}: {e}") from e
        worst = max(worst, error)
    for name in SUMS:
        assert not got[name][left[name]].any(), f"{name} of what sees nothing isn't 0"
    for b in set(range(case.batch)) - set(case.seeing):
        for name in learnt:
            assert not got[name][b].any(), f"{name} of a sequence that sees nothing isn't 0"
    return worst


_WINDOW = (("window_left", 40), ("window_right", 3))
_BAND = (("window_left", 17), ("window_right", 0))
_CAP = (("softcap", 2.0),)

_SKEWED = (3, 150, 0, 1, 70, 12, 260)
_OTHER = (9, 61, 5, 0, 333, 12, 130)


def _in_all_dtypes(*given: RaggedCase) -> tuple[RaggedCase, ...]:
    return tuple(replace(c, dtype=dtype) for c in given for dtype in DTYPES)


#: What every ragged kernel must get right: small, odd, and each for a reason.
RAGGED_CASES: tuple[RaggedCase, ...] = _in_all_dtypes(
    # Lengths that divide no tile, empty sequences, and rows after the last; q as long as k, longer, and shorter.
    RaggedCase(_SKEWED, 3, 64, after=(5, 5)),
    RaggedCase(_SKEWED, 4, 64, _OTHER, kv_heads=2, after=(9, 70)),
    RaggedCase(_SKEWED, 2, 64, _OTHER, mask="causal", after=(200, 0)),
    RaggedCase(_OTHER, 4, 64, _SKEWED, kv_heads=1, mask="causal"),  # the first rows see nothing
    RaggedCase(_SKEWED, 2, 64, _OTHER, mask="window", params=_WINDOW),
    RaggedCase((150, 37, 1), 2, 64, (150, 290, 300), mask="window", params=_BAND),
    # Scores.
    RaggedCase((90, 5, 33), 2, 64, (100, 40, 7), score="softcap", params=_CAP),
    RaggedCase((77, 3, 140), 4, 64, (60, 80, 140), mask="causal", score="alibi"),
    RaggedCase((77, 20), 2, 64, kv_heads=1, mask="window", score="softcap_alibi", params=(*_WINDOW, *_CAP)),
    # One sequence; as many as there are rows; none but empty ones; no keys at all; equal lengths.
    RaggedCase((131,), 2, 64, mask="causal"),
    RaggedCase((1,) * 40, 2, 64, tuple(2 + i % 5 for i in range(40))),
    RaggedCase((0, 0, 0), 2, 64, (0, 9, 0), after=(7, 3)),
    RaggedCase((4, 30), 2, 64, (0, 5), after=(0, 3)),
    RaggedCase((64,) * 5, 2, 64, mask="causal"),
    # A step of decoding, a few tokens at once, and prompts among them; keys that are split on a CPU.
    RaggedCase((1,) * 6, 4, 64, (300, 7, 90, 1, 129, 256), kv_heads=2, mask="causal"),
    RaggedCase((4, 1, 100, 8, 9), 2, 64, (2500, 3000, 100, 40, 1100), mask="causal"),
    # Smaller head dimensions than a kernel's, and values of another width; memory that isn't contiguous.
    RaggedCase((50, 3, 31), 2, 40, (77, 9, 31), head_dim_v=24, mask="causal"),
    RaggedCase((45, 2, 31), 4, 64, (66, 9, 12), kv_heads=2, strides="transposed", mask="causal"),
    RaggedCase((45, 2, 31), 4, 64, (66, 9, 12), kv_heads=2, strides="gaps", after=(3, 4)),
    # Many tiles beside few.
    RaggedCase((2, 600, 5), 1, 64, (30, 1100, 5), mask="causal"),
)
