"""What a kernel over a cache of 8 bits must get right: the problems of :mod:`tests.paged_trials`, quantised.

Each sequence is compared with float64 on what its cache stands for, every element of the dtype with what it is, and all
of it with the kernel of 16 bits of the same kind, where one that computes in the same order is installed, bit for bit.
Scales are of a page and head, those of pages without an owner NaN; so are elements that nobody may use, where the dtype
has NaN.  Needs torch; no TVM.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from tests import paged_trials, torch_cases
from tests.cases import Case, Inputs
from tests.installed import functions_of
from tests.paged_trials import Paged
from tests.ragged_trials import own_case
from tests.torch_cases import Compute
from tests.trials import Results, Trial, Usual
from tvm_flash.packs import registry
from tvm_flash.packs.manifest import SCALED_KINDS, KernelEntry
from tvm_flash.packs.registry import Installed
from tvm_flash.quantised import LARGEST

#: Elements of 8 bits in 16 bytes.
_COLUMNS = 16


@dataclass(frozen=True)
class _Stored:
    """Keys or values of a sequence: elements ``(heads, keys, dim)``, scales ``(heads, blocks of keys)``."""

    elements: torch.Tensor
    scales: np.ndarray

    def stood_for(self, rows: int, dtype: str) -> np.ndarray:
        """What they are, ``(1, heads, keys, dim)``, with blocks of ``rows`` keys."""
        of_keys = self.scales[:, np.arange(self.elements.shape[1]) // rows]
        wide = self.elements.float() * torch.from_numpy(of_keys)[..., None]
        return wide.to(getattr(torch, dtype)).float().numpy()[None]


@dataclass(frozen=True)
class Scaled(Paged):
    """A problem over a cache of dtype ``cache``, whose scales differ from page to page if they are ``of_pages``."""

    cache: str = "int8"
    of_pages: bool = True

    @property
    def block(self) -> int:
        """Keys that share a scale."""
        return self.page_size if self.of_pages else 1 << 30

    @functools.cached_property
    def stored(self) -> list[dict[str, _Stored]]:
        """Keys and values of each sequence."""
        return [{name: self._quantised(getattr(data, name)[0]) for name in ("k", "v")} for _, data in super().sequences]

    def _quantised(self, x: np.ndarray) -> _Stored:
        """Every second head has elements near 0 only, where those of e4m3 have no leading bit."""
        most = LARGEST[self.cache]
        blocks = [x[:, i : i + self.block] for i in range(0, x.shape[1], self.block)]
        scales = np.stack([np.abs(b).max((1, 2)) for b in blocks], 1) / most
        scales *= np.where(np.arange(len(x)) % 2, most / 4, 1)[:, None]
        scales = scales.astype(np.float32)
        bits = x / scales[:, np.arange(x.shape[1]) // self.block][..., None]
        bits = torch.from_numpy(bits.round() if self.cache == "int8" else bits.astype(np.float32))
        return _Stored(bits.to(getattr(torch, self.cache)), scales)

    @functools.cached_property
    def sequences(self) -> list[tuple[Case, Inputs]]:
        """The same with what keys and values stand for."""
        return [
            (case, replace(data, **{name: x.stood_for(self.block, case.dtype) for name, x in stored.items()}))
            for (case, data), stored in zip(super().sequences, self.stored, strict=True)
        ]

    def alone(self, i: int) -> Paged:
        own = super().alone(i)
        own.__dict__["stored"] = self.stored[i : i + 1]
        return own

    def caches(self, values, table, pages, device, spoilt):
        nothing = torch.tensor([0x7F], dtype=torch.uint8)  # NaN of e4m3
        given = {}
        for name, x in values.items():
            of = zip(self.stored, self.lengths, strict=True)
            elements = [stored[name].elements.view(torch.uint8)[:, :keys] for stored, (_, keys) in of]
            placed = self.placed(torch.cat(elements, 1).numpy(), table, pages, nothing.item())
            of_pages = np.full((pages, x.shape[0]), np.nan, np.float32)
            for b, (_, keys) in enumerate(self.lengths):
                for j in range(-(-keys // self.page_size)):
                    if b not in spoilt:
                        of_pages[table[b, j]] = self.stored[b][name].scales[:, j * self.page_size // self.block]
            cache = torch.from_numpy(placed).to(device)
            given[name] = self.strided(cache.view(torch.int8) if self.cache == "int8" else cache)
            given[f"{name}_scale"] = torch.from_numpy(of_pages).to(device)
        return given

    def unscaled(self, compute: Compute, device: str) -> Results:
        """What the kernel of 16 bits has over what the cache stands for."""
        fields = ("own", "lengths", "trailing", "transposed", "page_size", "seed", "spare")
        plain = Paged(**{name: getattr(self, name) for name in fields})
        plain.__dict__["sequences"] = self.sequences
        return plain.run(compute, device)


#: Fields of configurations that decide in which order a kernel computes.
_ORDER = ("block_m", "block_n", "num_warps")


def partner(entry: KernelEntry) -> Installed | None:
    """The installed kernel of 16 bits that computes in the order of one of 8 bits, if there is one."""
    (kind,) = (kind for kind, scaled in SCALED_KINDS.items() if entry.kind in scaled.values())
    same = ("template", "dtype", "head_dim", "head_dim_v", "mask", "score")
    for kernel in registry.registry().kernels(entry.arch):
        found = kernel.entry
        # Where boxes of TMA are the faster ones, a kernel of their own order is there for pages that are none.
        alike = found.kind in (kind, f"{kind}_any") and all(getattr(found, n) == getattr(entry, n) for n in same)
        if alike and all(found.config.get(n) == entry.config.get(n) for n in _ORDER):
            return kernel
    return None


def _of_one_key(entry: KernelEntry, with_keys: bool) -> Scaled:
    """A sequence of one key for each ``head_dim`` of the 256 elements, and of one query for each of its columns.

    Values have each element once; so have keys, but for NaN, or they are 0.
    """
    dim = entry.head_dim
    count = -(-256 // dim)
    own = own_case(entry, entry.params, heads=1, kv_heads=1)
    own = replace(own, params=tuple((n, _PLAIN.get(n, x)) for n, x in own.params))
    problem = Scaled(own, ((dim, 1),) * count, page_size=1, cache=entry.cache_dtype)
    dtype = getattr(torch, entry.cache_dtype)
    bits = (torch.arange(count * dim) % 256).to(torch.uint8).reshape(count, 1, 1, dim)
    of_keys = torch.where(torch.isnan(bits.view(dtype).float()), 0, bits) if with_keys else 0 * bits
    stored, sequences = [], []
    for i, (case, data) in enumerate(problem.sequences):
        scales = np.full((1, 1), _SCALES[i % len(_SCALES)], np.float32)
        k, v = (_Stored(x[i].view(dtype), scales) for x in (of_keys, bits[..., : entry.head_dim_v]))
        params = {n: np.full((1, 1), n == "kv_end", np.int32) if n in _RANGE else x for n, x in data.params.items()}
        of = (x.stood_for(problem.block, case.dtype) for x in (k, v))
        stored.append({"k": k, "v": v})
        sequences.append((case, Inputs(np.eye(dim, dtype=np.float32)[None, None], *of, params)))
    problem.__dict__.update(stored=stored, sequences=sequences)
    return problem


def every_element(entry: KernelEntry, compute: Compute, device: str) -> Results:
    """Outputs where keys are 0, which are the values; log-sum-exps where they aren't, which are scores; and both."""
    of_values, of_keys = (_of_one_key(entry, with_keys) for with_keys in (False, True))
    out, _ = of_values.run(compute, device)
    _, lse = of_keys.run(compute, device)
    right = np.concatenate([np.repeat(x.v[0], entry.head_dim, 1) for _, x in of_values.sequences], 1)
    scores = np.concatenate([x.k[0, 0, 0] for _, x in of_keys.sequences])[None] * of_keys.own.softmax_scale
    return out, lse, right, scores


#: Parameters without which a single key's probability is 1.
_PLAIN = {"window_left": 1 << 20, "window_right": 1 << 20, "has_sinks": 0, "has_alibi_slopes": 0, "softcap": 0.0}
_PLAIN |= {"has_query_start": 0}
_RANGE = ("kv_start", "kv_end")
#: One that rounds, and one whose products are no numbers with a leading bit in half precision.
_SCALES = (0.0123, 3e-6, 1.7)


def check_every_element(results: Results, device: str) -> float:
    """Assert that outputs are elements, bit for bit, and log-sum-exps scores."""
    out, lse, right, scores = results
    np.testing.assert_array_equal(out, right)
    np.testing.assert_allclose(lse, scores, rtol=2e-6, atol=2e-6)
    return 0.0


def check_same(results: Results, device: str) -> float:
    """Assert that the second half of the results has the bits of the first."""
    half = len(results) // 2
    for found, right in zip(results[:half], results[half:], strict=True):
        np.testing.assert_array_equal(found, right)
    return 0.0


def of_cache(entry: KernelEntry) -> tuple[Callable[..., Scaled], int]:
    """What makes the problems of a kernel, and how many columns have 16 bytes."""
    return functools.partial(Scaled, cache=entry.cache_dtype), _COLUMNS


def trials(entry: KernelEntry) -> Iterator[Trial]:
    """All of them, for a kernel."""
    make, columns = of_cache(entry)
    problems = dict(paged_trials.problems(entry, entry.params, make, columns))
    for label, problem in problems.items():
        yield paged_trials.trial(label, problem)
    # On pages of any size a sequence has the same scales.
    yield paged_trials.trial_of_neighbours(entry, functools.partial(make, of_pages=False))
    yield Trial("every element", functools.partial(every_element, entry), check_every_element)
    kernel = partner(entry)
    if kernel is None:
        return
    plain = torch_cases.by_entry(kernel.entry, functions_of(kernel), "cuda")
    for label, problem in problems.items():

        def run(compute: Compute, device: str, problem=problem) -> Results:
            return (*problem.run(compute, device), *problem.unscaled(plain, device))

        yield Trial(f"{label}, beside 16 bits", run, check_same)


def usual(entry: KernelEntry) -> Usual:
    """What is timed: what is of 16 bits, with elements that may be anything but NaN, and a scale for each page."""
    of = paged_trials.usual(entry)
    stored = {"k": of.values["k"], "v": of.values["v"]}
    values = dict(of.values)
    for name, x in stored.items():
        elements = (x * 20).clamp(-127, 127).round().to(getattr(torch, entry.cache_dtype))
        values[name] = elements if entry.cache_dtype == "int8" else elements.view(torch.uint8)
        values[f"{name}_scale"] = torch.full((x.shape[0], x.shape[2]), 1 / 20, device="cuda")
    return Usual(of.name, values, of.sizes, of.flops)
