"""What a kernel over keys on pages must get right, each sequence against float64 as if it were alone.

The sequences of :mod:`tests.ragged_trials` and their checks.  Pages lie in any order, sizes of pages are odd, larger
than a sequence, or 1, and the whole cache may be one page for each sequence.  What nobody may use is NaN, pages that
belong to nobody and rows behind a sequence's last key, and entries of the table that no key needs are numbers of no
page.  Needs torch; no TVM.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from tests import ragged_trials
from tests.ragged_trials import PARAMS, Ragged, own_case
from tests.torch_cases import Compute
from tests.trials import Results, Trial, Usual
from tvm_flash.packs import sizes
from tvm_flash.packs.manifest import KernelEntry

_NO_PAGE = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Paged(Ragged):
    """The same with the keys on pages of ``page_size``, whose places follow from ``seed``.

    ``spare`` columns of the table belong to no key.
    """

    page_size: int = 16
    seed: int = 0
    spare: int = 1

    @property
    def further_sizes(self) -> dict[str, int]:
        """Sizes beside those that follow from the tensors."""
        return {}

    def table(self) -> tuple[np.ndarray, int]:
        """The table of pages, and how many pages there are."""
        needed = [-(-keys // self.page_size) for _, keys in self.lengths]
        pages = sum(needed) + 2
        places = np.random.default_rng(self.seed).permutation(pages)
        table = np.full((len(needed), max(needed) + self.spare), _NO_PAGE, np.int32)
        for row, n in zip(table, needed, strict=True):
            row[:n], places = places[:n], places[n:]
        return table, pages

    def placed(self, x: np.ndarray, table: np.ndarray, pages: int, nothing: float) -> np.ndarray:
        """Keys ``(heads, positions, dim)`` of all sequences on their pages; ``nothing`` where no key is."""
        heads, _, dim = x.shape
        cache = np.full((pages, self.page_size, heads, dim), nothing, x.dtype)
        for b, (_, keys) in enumerate(self.lengths):
            j, first = np.arange(keys), self.starts[1][b]
            cache[table[b, j // self.page_size], j % self.page_size] = x[:, first + j].swapaxes(0, 1)
        return cache

    def strided(self, cache: torch.Tensor) -> torch.Tensor:
        """A cache as it lies in memory."""
        return cache.transpose(1, 2).contiguous().transpose(1, 2) if self.transposed else cache

    def caches(
        self, values: dict[str, np.ndarray], table: np.ndarray, pages: int, device: str, spoilt: frozenset[int]
    ) -> dict[str, torch.Tensor]:
        """What kernels take of keys and values on pages, by role."""
        dtype = getattr(torch, self.own.dtype)
        caches = {name: self.placed(x, table, pages, np.nan) for name, x in values.items()}
        return {name: self.strided(torch.from_numpy(x).to(device, dtype)) for name, x in caches.items()}

    def run(self, compute: Compute, device: str, spoilt: frozenset[int] = frozenset()) -> Results:
        """Output ``(heads, positions, dim)`` and lse ``(heads, positions)``, float64."""
        values = self.tensors(spoilt)
        table, pages = self.table()
        starts, _ = self.starts
        keys = {name: values.pop(name) for name in ("k", "v")}
        given = self.caches(keys, table, pages, device, spoilt)
        values["o"] = np.full((*values["q"].shape[:2], self.own.head_dim_v), np.nan, np.float32)
        given |= {name: self._tensor(values.pop(name), device) for name in ("q", "o")}
        wide = torch.full((len(table), table.shape[1] + 3), _NO_PAGE, dtype=torch.int32, device=device)
        wide[:, : table.shape[1]] = torch.from_numpy(table)
        given["page_table"] = wide[:, : table.shape[1]]
        given["cu_seqlens_q"] = torch.from_numpy(starts).to(device)
        given["seqlens_k"] = torch.tensor([k for _, k in self.lengths], dtype=torch.int32, device=device)
        total_q, heads = given["q"].shape[:2]
        given["lse"] = torch.full((heads * total_q,), torch.nan, device=device)
        params = {n: torch.from_numpy(x).to(device) if isinstance(x, np.ndarray) else x for n, x in values.items()}
        problem = sizes.of_pages(
            *(len(self.lengths), heads, total_q, given["k"].shape[2], pages, self.page_size, table.shape[1]),
            *(self.own.head_dim, self.own.head_dim_v, max(q for q, _ in self.lengths)),
        )
        problem |= self.further_sizes
        compute({**given, "softmax_scale": self.own.softmax_scale, **params}, problem)
        lse = given["lse"].reshape(heads, total_q)
        return given["o"].transpose(0, 1).double().cpu().numpy(), lse.double().cpu().numpy()


#: Few rows of sequences whose keys are one split, the end of one, several, and none; tokens that are decoded together.
FEW_ROWS = (
    ((1, 64), (1, 65), (1, 0), (3, 200), (0, 70), (1, 1023), (1, 1)),
    ((1, 1100), (5, 129), (2, 2), (17, 40)),
)


def decodes(spec) -> bool:
    """Whether a kernel is for few rows."""
    return spec.kind.startswith("paged_decode")


def _lengths(spec) -> tuple:
    return FEW_ROWS if decodes(spec) else ragged_trials.BORDERS


def problems(spec, params, make: Callable[..., Paged] = Paged, columns: int = 8) -> Iterator[tuple[str, Paged]]:
    """The problems of a kernel, by label: ``make`` makes them, ``columns`` have 16 bytes in a cache."""
    plain = own_case(spec, params)
    first, second = _lengths(spec)
    yield "pages of 16", make(plain, first, trailing=3)
    yield "pages of 24", make(plain, second, trailing=0, transposed=True, page_size=24)
    yield "pages of 256", make(plain, first, page_size=256)
    yield "a page for each sequence", make(plain, second, trailing=1, page_size=1200, spare=0)
    dims = {"head_dim": spec.head_dim - columns, "head_dim_v": spec.head_dim_v - 3 * columns}
    grouped = own_case(spec, params, heads=4, kv_heads=1, **dims)
    some = ((2, 70), (1, 90), (17, 17)) if decodes(spec) else ((70, 70), (1, 90), (17, 17))
    yield "grouped heads", make(grouped, some, trailing=130, page_size=1, seed=1)
    yield "many", make(replace(plain, heads=1, kv_heads=1), ragged_trials.MANY, trailing=1, page_size=8)


def neighbours(spec, params, page_size: int = 64, seed: int = 0, make: Callable[..., Paged] = Paged) -> Paged:
    """Sequences of different lengths beside each other."""
    lengths = ((1, 30), (4, 129), (1, 1090), (2, 75)) if decodes(spec) else ((30, 30), (40, 129), (140, 75))
    return make(own_case(spec, params), lengths, trailing=9, page_size=page_size, seed=seed)


def check_neighbours(spec, params, compute: Compute, device: str, make: Callable[..., Paged] = Paged) -> None:
    """Assert that a sequence has the same bits alone, in a batch, and wherever its pages of whatever size are."""
    check_same_bits(functools.partial(neighbours, spec, params, make=make), compute, device)


def check_same_bits(of_pages: Callable[..., Paged], compute: Compute, device: str) -> None:
    """Assert the same of the problem that ``of_pages(page_size=…, seed=…)`` makes."""
    problem = of_pages()
    ragged_trials.check_neighbours(problem, compute, device)
    right = problem.run(compute, device)
    for page_size, seed in ((64, 1), (16, 2), (7, 3)):
        found = of_pages(page_size=page_size, seed=seed).run(compute, device)
        assert all(map(np.array_equal, right, found)), f"pages of {page_size} in another order change bits"


def trials(entry: KernelEntry) -> Iterator[Trial]:
    """All of them, for a kernel."""
    for label, problem in problems(entry, entry.params):
        yield trial(label, problem)
    yield trial_of_neighbours(entry)


def trial(label: str, problem: Paged) -> Trial:
    """A problem, compared with float64."""
    return Trial(label, problem.run, lambda results, device: problem.check(*results, device))


def trial_of_neighbours(entry: KernelEntry, make: Callable[..., Paged] = Paged) -> Trial:
    """That of :func:`check_neighbours`."""

    def run(compute: Compute, device: str) -> Results:
        check_neighbours(entry, entry.params, compute, device, make)
        return problem.run(compute, device)

    problem = neighbours(entry, entry.params, make=make)
    return Trial("neighbours", run, lambda results, device: problem.check(*results, device))


#: What is timed: chunks of 256 queries at the end of 16 sequences, or a query for each; pages of 16.
_BATCH, _CHUNK, _KEYS, _PAGE = 16, 256, 4096, 16


def usual(entry: KernelEntry) -> Usual:
    """What is timed of a kernel."""
    heads = max(1, 2048 // entry.head_dim)
    kv_heads = max(1, heads // 4)
    queries = 1 if decodes(entry) else _CHUNK
    columns = _KEYS // _PAGE
    pages, total = _BATCH * columns, _BATCH * queries
    D, E = entry.head_dim, entry.head_dim_v

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=getattr(torch, entry.dtype))

    def numbers(x: range | list) -> torch.Tensor:
        return torch.tensor(x, dtype=torch.int32, device="cuda")

    values = {"q": tensor(total, heads, D), "o": tensor(total, heads, E), "lse": torch.empty(1, device="cuda")}
    values |= {"k": tensor(pages, _PAGE, kv_heads, D), "v": tensor(pages, _PAGE, kv_heads, E)}
    values |= {"cu_seqlens_q": numbers(range(0, total + 1, queries)), "seqlens_k": numbers([_KEYS] * _BATCH)}
    values["page_table"] = torch.randperm(pages, device="cuda").int().view(_BATCH, columns)
    values |= {"softmax_scale": D**-0.5, **PARAMS, "has_query_start": 0, "softcap": 30.0}
    values |= {"window_left": _KEYS, "window_right": _KEYS}
    each = (_BATCH, heads)
    values |= {n: torch.rand(each, device="cuda") for n in ("alibi_slopes", "sinks")} | {"has_sinks": 1}
    values |= {n: torch.zeros(each, dtype=torch.int32, device="cuda") for n in ("kv_start", "query_start")}
    values["kv_end"] = torch.full(each, _KEYS, dtype=torch.int32, device="cuda")
    name = f"{entry.kind} b={_BATCH} q={queries} k={_KEYS} h={heads} on {kv_heads} d={D}"
    flops = 2.0 * heads * total * _KEYS * (D + E)
    problem = sizes.of_pages(_BATCH, heads, total, kv_heads, pages, _PAGE, columns, D, E, queries)
    return Usual(name, values, problem, flops)
