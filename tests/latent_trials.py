"""What a kernel over keys on pages must get right whose values are the first elements of keys.

The problems and checks of :mod:`tests.paged_trials`, with many query heads on one head of keys: rows of several tiles,
of one that is far from full, and of sequences with different numbers of queries.  Needs torch; no TVM.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from tests import paged_trials
from tests.cases import Case, Inputs
from tests.paged_trials import Paged
from tests.ragged_trials import MANY, own_case
from tests.torch_cases import Compute
from tests.trials import Results, Trial, Usual
from tvm_flash.packs import sizes
from tvm_flash.packs.manifest import KernelEntry


@dataclass(frozen=True)
class Latent(Paged):
    """A problem whose values are the first elements of its keys; ``split_length`` as in a call."""

    split_length: int = 0

    @functools.cached_property
    def sequences(self) -> list[tuple[Case, Inputs]]:
        return [
            (case, replace(data, v=np.ascontiguousarray(data.k[..., : case.head_dim_v])))
            for case, data in super().sequences
        ]

    @property
    def further_sizes(self) -> dict[str, int]:
        return {"split_length": self.split_length}

    def caches(self, values, table, pages, device, spoilt):
        return super().caches({"k": values["k"]}, table, pages, device, spoilt)


def problems(spec, params) -> Iterator[tuple[str, Latent]]:
    """The problems of a kernel, by label."""
    first, second = paged_trials.FEW_ROWS
    plain = own_case(spec, params)
    yield "pages of 64", Latent(own_case(spec, params, heads=16, kv_heads=1), first, trailing=3, page_size=64)
    hidden = (*second, (90, 12))  # of the last one, the first tile of rows sees nothing
    yield "pages of 24", Latent(plain, hidden, transposed=True, page_size=24)
    yield "a page for each sequence", Latent(plain, first, trailing=1, page_size=1200, spare=0)
    many = own_case(spec, params, heads=70, kv_heads=1)
    yield "several row tiles", Latent(many, ((2, 300), (1, 65), (0, 9), (3, 3), (1, 0)), trailing=2, page_size=16)
    dims = {"head_dim": spec.head_dim - 8, "head_dim_v": spec.head_dim_v - 24}
    narrow = own_case(spec, params, heads=8, kv_heads=2, **dims)
    yield "narrow", Latent(narrow, ((2, 70), (1, 90), (17, 17)), trailing=130, page_size=1, seed=1)
    yield "long splits", Latent(many, ((2, 300), (1, 65), (0, 9), (3, 513)), page_size=64, split_length=512)
    yield "many", Latent(replace(plain, heads=1, kv_heads=1), MANY, trailing=1, page_size=8)


def neighbours(spec, params, page_size: int = 64, seed: int = 0) -> Latent:
    """Sequences of different lengths beside each other."""
    lengths = ((1, 30), (4, 129), (1, 1090), (2, 75))
    return Latent(own_case(spec, params, heads=24, kv_heads=1), lengths, trailing=9, page_size=page_size, seed=seed)


def check_neighbours(spec, params, compute: Compute, device: str) -> None:
    """Assert that a sequence has the same bits alone, in a batch, and wherever its pages of whatever size are."""
    paged_trials.check_same_bits(functools.partial(neighbours, spec, params), compute, device)


def trials(entry: KernelEntry) -> Iterator[Trial]:
    """All of them, for a kernel."""
    for label, problem in problems(entry, entry.params):
        yield paged_trials.trial(label, problem)

    def run(compute: Compute, device: str) -> Results:
        check_neighbours(entry, entry.params, compute, device)
        return problem.run(compute, device)

    problem = neighbours(entry, entry.params)
    yield Trial("neighbours", run, lambda results, device: problem.check(*results, device))


#: What is timed: a query of 128 heads for each of 32 sequences of 4096 keys, on pages of 64.
_BATCH, _KEYS, _PAGE, _HEADS = 32, 4096, 64, 128


def usual(entry: KernelEntry) -> Usual:
    """What is timed of a kernel."""
    columns = _KEYS // _PAGE
    pages, D, E = _BATCH * columns, entry.head_dim, entry.head_dim_v

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=getattr(torch, entry.dtype))

    def numbers(x) -> torch.Tensor:
        return torch.tensor(x, dtype=torch.int32, device="cuda")

    values = {"q": tensor(_BATCH, _HEADS, D), "o": tensor(_BATCH, _HEADS, E), "lse": torch.empty(1, device="cuda")}
    values |= {"k": tensor(pages, _PAGE, 1, D), "seqlens_k": numbers([_KEYS] * _BATCH)}
    values |= {"cu_seqlens_q": numbers(range(_BATCH + 1)), "softmax_scale": D**-0.5}
    values |= {"page_table": torch.randperm(pages, device="cuda").int().view(_BATCH, columns)}
    values |= {"window_left": _KEYS, "window_right": 0}
    name = f"{entry.kind} b={_BATCH} q=1 k={_KEYS} h={_HEADS} on 1 d={D}"
    flops = 2.0 * _HEADS * _BATCH * _KEYS * (D + E)
    problem = sizes.of_pages(_BATCH, _HEADS, _BATCH, 1, pages, _PAGE, columns, D, E, 1)
    return Usual(name, values, problem, flops)
