"""What a forward kernel of ragged sequences must get right, each of them against float64 as if it were alone.

Lengths around the borders of tiles, sequences without queries or without keys, more of either, rows after the last
sequence, more sequences than a warp looks at at once; numbers that aren't finite in the neighbours; the same bits alone
and in a batch.  Needs torch; no TVM.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from tests import cases, torch_cases
from tests.cases import Case, Inputs
from tests.torch_cases import Compute
from tests.trials import Results, Trial, Usual
from tvm_flash.packs import sizes
from tvm_flash.packs.manifest import KernelEntry

#: Around the borders of tiles of 64 and 128 rows and of 48 to 128 keys; more queries than keys, and the reverse.
BORDERS = (
    ((1, 1), (127, 127), (0, 5), (128, 128), (5, 0), (129, 131), (0, 0)),
    ((64, 200), (200, 64), (65, 49), (0, 0), (3, 257)),
)
#: More sequences than a warp has lanes.
MANY = tuple((n % 3, (n + 2) % 7) for n in range(45))

#: Parameters of masks and scores, where a kernel has them.
PARAMS = {
    "window_left": 90,
    "window_right": 3,
    "sink_tokens": 5,
    "softcap": 2.0,
    "has_alibi_slopes": 1,
    "has_sinks": 1,
    "has_query_start": 1,
}


@dataclass(frozen=True)
class Ragged:
    """A problem: a kernel's own kind of attention over sequences of ``lengths`` (queries, keys).

    ``trailing`` rows and keys follow the last one.  ``transposed``: the tensors lie in memory with heads outside.
    """

    own: Case
    lengths: tuple[tuple[int, int], ...]
    trailing: int = 0
    transposed: bool = False

    @property
    def starts(self) -> tuple[np.ndarray, np.ndarray]:
        """Where the sequences begin among the queries, and among the keys."""
        return tuple(np.cumsum([0, *n]).astype(np.int32) for n in zip(*self.lengths, strict=True))

    @functools.cached_property
    def sequences(self) -> list[tuple[Case, Inputs]]:
        """Each sequence as a case of its own; one without queries or keys has a case with one."""
        found = []
        for i, (queries, keys) in enumerate(self.lengths):
            case = replace(self.own, batch=1, seqlen_q=max(queries, 1), seqlen_kv=max(keys, 1))
            data = cases.inputs(case)
            rolled = (np.roll(x, i * n, -1) for n, x in enumerate((data.q, data.k, data.v), 1))
            found.append((case, Inputs(*rolled, data.params)))
        return found

    def tensors(self, spoilt: frozenset[int] = frozenset()) -> dict[str, np.ndarray]:
        """q, k and v ``(heads, positions, dim)``, and parameters; NaN and infinities after the last sequence, and in
        those of ``spoilt``."""
        parts: dict[str, list] = {"q": [], "k": [], "v": []}
        for i, ((_, data), (queries, keys)) in enumerate(zip(self.sequences, self.lengths, strict=True)):
            for name, n in (("q", queries), ("k", keys), ("v", keys)):
                x = getattr(data, name)[0][:, :n].copy()
                if i in spoilt:
                    x[...] = np.where(np.arange(x.shape[-1]) % 2, np.nan, np.inf)
                parts[name].append(x)
        for name, x in parts.items():
            x.append(
                np.full((x[0].shape[0], self.trailing, x[0].shape[2]), np.nan if name == "k" else np.inf, np.float32)
            )
        params = {}
        for name, value in self.sequences[0][1].params.items():
            every = [data.params[name] for _, data in self.sequences]
            params[name] = np.concatenate(every) if isinstance(value, np.ndarray) else value
        return {**{name: np.concatenate(x, axis=1) for name, x in parts.items()}, **params}

    def run(self, compute: Compute, device: str, spoilt: frozenset[int] = frozenset()) -> Results:
        """Output ``(heads, positions, dim)`` and lse ``(heads, positions)``, float64."""
        values = self.tensors(spoilt)
        values["o"] = np.full((*values["q"].shape[:2], self.own.head_dim_v), np.nan, np.float32)
        tensors = {name: self._tensor(values.pop(name), device) for name in ("q", "k", "v", "o")}
        total_q, heads = tensors["q"].shape[:2]
        total_k, kv_heads = tensors["k"].shape[:2]
        starts = (torch.from_numpy(x).to(device) for x in self.starts)
        tensors |= dict(zip(("cu_seqlens_q", "cu_seqlens_k"), starts, strict=True))
        tensors["lse"] = torch.full((heads * total_q,), torch.nan, device=device)
        values = {n: torch.from_numpy(x).to(device) if isinstance(x, np.ndarray) else x for n, x in values.items()}
        problem = sizes.of_sequences(
            len(self.lengths), heads, total_q, kv_heads, total_k, self.own.head_dim, self.own.head_dim_v
        )
        compute({**tensors, "softmax_scale": self.own.softmax_scale, **values}, problem)
        lse = tensors["lse"].reshape(heads, total_q)
        return tensors["o"].transpose(0, 1).double().cpu().numpy(), lse.double().cpu().numpy()

    def _tensor(self, x: np.ndarray, device: str) -> torch.Tensor:
        x = torch.from_numpy(x).to(device, getattr(torch, self.own.dtype)).transpose(0, 1)
        return x if self.transposed else x.contiguous()

    def results(self, out: np.ndarray, lse: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Number, output and lse of each sequence, as its case has them."""
        starts, _ = self.starts
        for i, (a, b) in enumerate(itertools.pairwise(starts)):
            yield i, out[None, :, a:b], lse[None, :, a:b]

    def check(self, out: np.ndarray, lse: np.ndarray, device: str, spoilt: frozenset[int] = frozenset()) -> float:
        """Assert that all sequences but the spoilt ones are right; the largest error as a share of what is allowed."""
        worst = 0.0
        for i, o, at in self.results(out, lse):
            queries, keys = self.lengths[i]
            if i in spoilt or not queries:
                continue
            if keys:
                worst = max(worst, torch_cases.check(*self.sequences[i], o, at, device))
            else:
                assert not o.any(), "a query without keys has an output"
                sinks = self.sequences[i][1].params.get("sinks", np.full(at.shape[1:2], -np.inf, np.float32))
                np.testing.assert_allclose(at, np.broadcast_to(sinks.reshape(1, -1, 1), at.shape), rtol=1e-6)
        after = self.starts[0][-1]
        assert not out[:, after:].any(), "rows after the last sequence aren't zero"
        assert np.isneginf(lse[:, after:]).all(), "rows after the last sequence have a sum"
        return worst

    def alone(self, i: int) -> Ragged:
        """One of the sequences by itself."""
        own = replace(self, lengths=self.lengths[i : i + 1], trailing=0)
        own.__dict__["sequences"] = self.sequences[i : i + 1]
        return own


def own_case(spec, params, heads: int = 2, kv_heads: int = 2, **sizes) -> Case:
    """A case of a kernel's own kind, of full width unless sizes say otherwise."""
    dims = {"head_dim": spec.head_dim, "head_dim_v": spec.head_dim_v, **sizes}
    values = tuple((p.name, PARAMS[p.name]) for p in params if p.name in PARAMS)
    return Case(
        1, heads, 1, kv_heads=kv_heads, dtype=spec.dtype, mask=spec.mask, score=spec.score, params=values, **dims
    )


def problems(spec, params) -> Iterator[tuple[str, Ragged]]:
    """The problems of a kernel, by label."""
    plain = own_case(spec, params)
    for n, lengths in enumerate(BORDERS):
        yield f"borders {n}", Ragged(plain, lengths, trailing=3 * n, transposed=bool(n))
    grouped = own_case(spec, params, heads=4, kv_heads=1, head_dim=spec.head_dim - 8, head_dim_v=spec.head_dim_v - 24)
    yield "grouped heads", Ragged(grouped, ((70, 70), (1, 90), (17, 17)), trailing=130)
    yield "many", Ragged(replace(plain, heads=1, kv_heads=1), MANY, trailing=1)


def neighbours(spec, params) -> Ragged:
    """Sequences that share tiles of rows and of keys."""
    return Ragged(own_case(spec, params), ((30, 30), (40, 129), (140, 75), (1, 1)), trailing=9)


def check_neighbours(problem: Ragged, compute: Compute, device: str) -> None:
    """Assert that a sequence has the same bits alone, in the batch, and beside numbers that aren't finite."""
    right = problem.run(compute, device)
    problem.check(*right, device)
    every = range(len(problem.lengths))
    for parity in (0, 1):
        spoilt = frozenset(i for i in every if i % 2 == parity)
        found = problem.run(compute, device, spoilt)
        problem.check(*found, device, spoilt)
        for one, other in zip(problem.results(*right), problem.results(*found), strict=True):
            assert one[0] in spoilt or all(map(np.array_equal, one[1:], other[1:])), "a neighbour changes bits"
    for i, *results in problem.results(*right):
        alone = next(problem.alone(i).results(*problem.alone(i).run(compute, device)))
        assert all(map(np.array_equal, results, alone[1:])), "a sequence alone has other bits"


def trials(entry: KernelEntry) -> Iterator[Trial]:
    """All of them, for a kernel."""
    for label, problem in problems(entry, entry.params):
        yield Trial(label, problem.run, lambda results, device, own=problem: own.check(*results, device))
    problem = neighbours(entry, entry.params)

    def run(compute: Compute, device: str) -> Results:
        check_neighbours(problem, compute, device)
        return problem.run(compute, device)

    yield Trial("neighbours", run, lambda results, device: problem.check(*results, device))
    own = own_case(entry, entry.params, heads=1, kv_heads=1)
    if entry.score == "identity" and entry.mask in ("full", "causal"):
        yield Trial("thousands", functools.partial(run_thousands, own), check_thousands)


def run_thousands(own: Case, compute: Compute, device: str, count: int = 2500) -> Results:
    """``count`` sequences, more than a warp finds in two steps: every seventh has a position, its output the value."""
    positions = -(-count // 7)
    case = replace(own, seqlen_q=positions, seqlen_kv=positions)
    data = cases.inputs(case)
    tensors = {
        name: torch.from_numpy(x[0, 0][:, None]).to(device, getattr(torch, case.dtype))
        for name, x in (("q", data.q), ("k", data.k), ("v", data.v))
    }
    starts = torch.from_numpy(-(-np.arange(count + 1, dtype=np.int32) // 7)).to(device)
    tensors |= {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "o": torch.full_like(tensors["v"], torch.nan)}
    lse = torch.full((positions,), torch.nan, device=device)
    problem = sizes.of_sequences(count, 1, positions, 1, positions, case.head_dim, case.head_dim_v)
    compute({**tensors, "lse": lse, "softmax_scale": case.softmax_scale}, problem)
    found = (*(tensors[name] for name in ("o", "v", "q", "k")), lse)
    return tuple(x.double().cpu().numpy() for x in found)


def check_thousands(results: Results, device: str) -> float:
    """Assert that each sequence has its own value and score."""
    o, v, q, k, lse = results
    # a probability and the output are rounded once each
    assert (np.abs(o - v) <= 2.0**-7 * np.abs(v)).all(), "a sequence of one position isn't its value"
    error = np.abs(lse - (q * k).sum(axis=(1, 2)) * q.shape[-1] ** -0.5).max()
    assert error < 1e-4, f"lse differs by {error:.3g}"
    return 0.0


#: What is timed: 16 sequences of 200 to 1800 positions, 16k of them in all, and a hidden size of 2048.
_LENGTHS = tuple(224 + 107 * n for n in range(16))
_LONGEST_WINDOW = 1024


def usual(entry: KernelEntry) -> Usual:
    """What is timed of a kernel: prompts of different lengths."""
    heads = max(1, 2048 // entry.head_dim)
    own = replace(own_case(entry, entry.params), heads=heads, kv_heads=heads)
    total = sum(_LENGTHS)

    def tensor(dim: int) -> torch.Tensor:
        return torch.randn(total, heads, dim, device="cuda", dtype=getattr(torch, entry.dtype))

    D, E = entry.head_dim, entry.head_dim_v
    starts = torch.tensor([0, *itertools.accumulate(_LENGTHS)], dtype=torch.int32, device="cuda")
    values = {"q": tensor(D), "k": tensor(D), "v": tensor(E), "o": tensor(E), "lse": torch.empty(1, device="cuda")}
    values |= {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "softmax_scale": own.softmax_scale, **PARAMS}
    values |= {"window_left": _LONGEST_WINDOW, "window_right": 0, "has_query_start": 0, "softcap": 30.0}
    each = (len(_LENGTHS), heads)
    values |= {n: torch.rand(each, device="cuda") for n in ("alibi_slopes", "sinks")} | {"has_sinks": 1}
    values |= {n: torch.zeros(each, dtype=torch.int32, device="cuda") for n in ("kv_start", "query_start")}
    values["kv_end"] = torch.full(each, max(_LENGTHS), dtype=torch.int32, device="cuda")
    share = {"full": lambda n: n, "causal": lambda n: n / 2}.get(entry.mask, lambda n: min(_LONGEST_WINDOW + 1, n))
    flops = 2.0 * heads * sum(n * share(n) for n in _LENGTHS) * (D + E)
    name = f"ragged b={len(_LENGTHS)} t={total} h={heads} d={D}"
    return Usual(name, values, sizes.of_sequences(len(_LENGTHS), heads, total, heads, total, D, E), flops)
