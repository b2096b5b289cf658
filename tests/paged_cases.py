"""Keys on pages: one list of cases for every family, their inputs, and what must come out: that of ragged sequences.

What nobody may use is NaN: pages that belong to no sequence, rows behind a sequence's last key; entries of the table
that no key needs are numbers of no page.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np
import torch

from tests import ragged_cases
from tests.cases import DTYPES
from tests.ragged_cases import RaggedCase, RaggedInputs
from tests.torch_cases import Compute
from tvm_flash.packs import sizes
from tvm_flash.packs.manifest import Param


@dataclass(frozen=True)
class PagedCase:
    """The sequences of ``of``, their keys on pages of ``page_size``.

    ``spare`` is how many columns of the table no sequence needs; ``strides`` say how caches lie in memory: pages of
    positions of heads (``"rows"``), pages of heads of positions (``"heads"``), or keys beside values (``"pairs"``).
    """

    of: RaggedCase
    page_size: int
    spare: int = 0
    strides: str = "rows"

    @property
    def id(self) -> str:
        return f"p{self.page_size}.{self.spare}-{self.strides}-{self.of.id}"

    @property
    def columns(self) -> int:
        return -(-max(self.of.keys) // self.page_size) + self.spare

    @property
    def sizes(self) -> dict[str, int]:
        of, pages = self.of, self.of.batch * self.columns + 1
        heads = (of.heads, of.totals[0], of.kv_heads)
        longest = max(of.queries)
        return sizes.of_pages(
            of.batch, *heads, pages, self.page_size, self.columns, of.head_dim, of.head_dim_v, longest
        )


@dataclass(frozen=True)
class Caches:
    """Float32 arrays ``(pages, page_size, kv_heads, dim)``, and what says which keys are where."""

    k: np.ndarray
    v: np.ndarray
    seqlens_k: np.ndarray
    page_table: np.ndarray


def caches(case: PagedCase, data: RaggedInputs, order: int = 0) -> Caches:
    """The keys of a case on pages; ``order`` is a seed for where each page is."""
    of, size = case.of, case.page_size
    pages = case.sizes["pages"]
    numbers = np.random.default_rng((zlib.crc32(case.id.encode()), order)).permutation(pages)
    table = np.full((of.batch, case.columns), -1, np.int32)
    table[:, 1::2] = np.iinfo(np.int32).max
    found = {n: np.full((pages, size, *getattr(data, n).shape[1:]), np.nan, np.float32) for n in "kv"}
    for b, length in enumerate(of.keys):
        needed = -(-length // size)
        table[b, :needed] = numbers[b * case.columns :][:needed]
        keys, (_, rows) = np.arange(length), of.rows(b)
        for name, x in found.items():
            x[table[b, keys // size], keys % size] = getattr(data, name)[rows]
    return Caches(found["k"], found["v"], np.int32(of.keys), table)


def cache_tensors(case: PagedCase, made: Caches, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Both caches as the case's strides have them in memory."""
    k, v = (torch.from_numpy(x).to(device, getattr(torch, case.of.dtype)) for x in (made.k, made.v))
    if case.strides == "heads":
        return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    if case.strides == "pairs" and k.shape == v.shape:
        return torch.stack((k, v), dim=1).unbind(1)
    return k, v


def arguments(case: PagedCase, data: RaggedInputs, params: tuple[Param, ...], device: str = "cpu") -> dict:
    """What kernels take, but their outputs, by role."""
    made, of = caches(case, data), case.of
    values = ragged_cases.arguments(of, data, tuple(p for p in params if p.name not in _PLACES), device)
    del values["cu_seqlens_k"]
    k, v = cache_tensors(case, made, device)
    values |= {"k": k, "v": v}
    values |= {name: torch.from_numpy(getattr(made, name)).to(device) for name in ("seqlens_k", "page_table")}
    everywhere = {"kv_start": 0, "kv_end": np.iinfo(np.int32).max, "query_start": -7}
    heads = (of.batch, of.heads)
    values |= {n: torch.full(heads, x, dtype=torch.int32, device=device) for n, x in everywhere.items()}
    return values | {"has_query_start": 0}


_PLACES = ("kv_start", "kv_end", "query_start", "has_query_start")


def run(
    case: PagedCase, data: RaggedInputs, compute: Compute, params: tuple[Param, ...], device: str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """Output ``(total_q, heads, head_dim_v)`` and lse ``(heads, total_q)`` of a kernel, full of NaN beforehand."""
    of, total_q = case.of, case.of.totals[0]
    o = ragged_cases.rows_tensor(np.full((total_q, of.heads, of.head_dim_v), np.nan, np.float32), of, device)
    lse = torch.full((of.heads * total_q,), torch.nan, device=device)
    compute({**arguments(case, data, params, device), "o": o, "lse": lse}, case.sizes)
    return o.double().cpu().numpy(), lse.double().cpu().numpy().reshape(of.heads, total_q)


def check(case: PagedCase, data: RaggedInputs, out: np.ndarray, lse: np.ndarray, device: str = "cpu") -> float:
    """:func:`tests.ragged_cases.check` of the sequences."""
    return ragged_cases.check(case.of, data, out, lse, device)


_WINDOW = (("window_left", 40), ("window_right", 3))
_BAND = (("window_left", 17), ("window_right", 0))
_CAP = (("softcap", 2.0),)

_PROMPTS = (3, 150, 0, 1, 70, 12, 260)
_CACHED = (9, 161, 5, 0, 333, 12, 260)


def _in_all_dtypes(*given: PagedCase) -> tuple[PagedCase, ...]:
    return tuple(replace(c, of=replace(c.of, dtype=dtype)) for c in given for dtype in DTYPES)


#: What every kernel over pages must get right: small, odd, and each for a reason.
PAGED_CASES: tuple[PagedCase, ...] = _in_all_dtypes(
    # Prompts, chunks on a prefix, sequences without keys or rows; every page size from 1 on, and rows after the last.
    PagedCase(RaggedCase(_PROMPTS, 3, 64, _CACHED, after=(5, 0)), 16, spare=2),
    PagedCase(RaggedCase(_PROMPTS, 4, 64, _CACHED, kv_heads=2, mask="causal"), 1),
    PagedCase(RaggedCase(_PROMPTS, 2, 64, _CACHED, mask="causal", after=(200, 0)), 128),
    PagedCase(RaggedCase(_PROMPTS, 2, 64, _CACHED, mask="window", params=_WINDOW), 7, spare=1),
    PagedCase(RaggedCase((150, 37, 1), 2, 64, (150, 290, 300), mask="window", params=_BAND), 64, strides="heads"),
    # Scores.
    PagedCase(RaggedCase((90, 5, 33), 2, 64, (100, 40, 70), score="softcap", params=_CAP), 32),
    PagedCase(RaggedCase((77, 3, 140), 4, 64, (160, 80, 140), mask="causal", score="alibi"), 16, strides="pairs"),
    PagedCase(
        RaggedCase((77, 2), 2, 64, (77, 300), kv_heads=1, mask="window", score="softcap_alibi", params=_WINDOW + _CAP),
        *(48, 3),
    ),
    # A step of decoding, with keys that are split; a few tokens at once beside prompts; one sequence.
    PagedCase(RaggedCase((1,) * 6, 4, 64, (300, 7, 90, 1, 1129, 2500), kv_heads=2, mask="causal"), 16, strides="pairs"),
    PagedCase(RaggedCase((4, 1, 100, 8, 9), 2, 64, (2500, 3000, 100, 40, 1100), mask="causal"), 256),
    PagedCase(RaggedCase((1,), 8, 64, (4000,), kv_heads=1), 4096),
    # Smaller head dimensions than a kernel's, and values of another width.
    PagedCase(RaggedCase((50, 3, 31), 2, 40, (77, 9, 31), head_dim_v=24, mask="causal"), 20, strides="heads"),
)
