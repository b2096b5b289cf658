"""What a kernel must get right that turns new queries and keys and puts new keys and values into a cache: bit by bit.

What is right is computed a row at a time with torch's operations on the processor.  Of everything that is written the
kernel gets memory full of other numbers, which must stay wherever nothing comes.  Needs torch; no TVM.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from tests.torch_cases import Compute
from tests.trials import Results, Trial, Usual
from tvm_flash.packs.manifest import CACHE_FORMATS, HALVES, INTERLEAVED, UNTURNED, KernelEntry
from tvm_flash.quantised import LARGEST


@dataclass(frozen=True)
class Append:
    """A call.

    Attributes
    ----------
    queries, added, before: of each sequence, how many queries and keys are new, and how many keys there were.
    turns, along, rotary_dim, positions: how rows are turned, and for how many positions there are angles.
    cache: the dtype of the cache, if that isn't ``dtype``; with a scale for each page and head if ``of_pages``.
    trailing: rows after the last sequence.
    entries: rows of the table, by sequence; of its own pages in any order if not given.
    strided: tensors have gaps, and lie in other orders.
    """

    dtype: str
    queries: tuple[int, ...] = (1, 1, 1)
    added: tuple[int, ...] = (1, 1, 1)
    before: tuple[int, ...] = (20, 0, 37)
    heads: tuple[int, int] = (8, 2)
    head_dims: tuple[int, int] = (128, 128)
    turns: int = UNTURNED
    along: bool = True
    rotary_dim: int = 64
    positions: int = 128
    cache: str = ""
    of_pages: bool = True
    page_size: int = 16
    columns: int = 4
    trailing: int = 0
    entries: tuple[tuple[int, ...], ...] | None = None
    strided: bool = False
    first: tuple[int, ...] | None = None
    seed: int = 0

    @functools.cached_property
    def values(self) -> dict[str, torch.Tensor | int]:
        """Tensors and numbers by role, on the processor; of 8 bits the cache is in its own dtype."""
        rng = torch.Generator().manual_seed(self.seed)
        dtype = getattr(torch, self.dtype)

        def normal(*shape: int) -> torch.Tensor:
            x = torch.randn(*shape, generator=rng) * 3
            x[..., 0] = torch.where(torch.rand(shape[:-1], generator=rng) < 0.1, torch.inf, x[..., 0])
            return self._laid_out(x.to(dtype))

        heads, kv_heads = self.heads
        dim, dim_v = self.head_dims
        total_q, total_new = (sum(x) + self.trailing for x in (self.queries, self.added))
        batch = len(self.added)
        pages = batch * self.columns + 2
        own = torch.randperm(pages, generator=rng)[: batch * self.columns].view(batch, -1)
        table = torch.full((batch, self.columns + 3), -(2**31), dtype=torch.int64)
        table[:, : self.columns] = own if self.entries is None else torch.tensor(self.entries)
        found = {"q": normal(total_q, heads, dim), "o": normal(total_q, heads, dim)}
        found |= {"k_new": normal(total_new, kv_heads, dim), "v_new": normal(total_new, kv_heads, dim_v)}
        for name, width in (("k", dim), ("v", dim_v)):
            bytes_ = torch.randint(0, 256, (pages, self.page_size, kv_heads, width), generator=rng, dtype=torch.uint8)
            there = bytes_.view(getattr(torch, self.cache)) if self.cache else bytes_.float().to(dtype)
            found[name] = self._laid_out(there)
            scale = torch.rand(pages if self.of_pages else 1, kv_heads, generator=rng) / LARGEST["int8"] * 8
            found[f"{name}_scale"] = scale.expand(pages, -1)
        starts = [torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32) for x in (self.queries, self.added)]
        found |= {"cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1]}
        found["cache_seqlens"] = torch.tensor(self.before, dtype=torch.int32)
        found["rotary_seqlens"] = torch.tensor(self.first or self.before, dtype=torch.int32)
        found["page_table"] = table.int()[:, : self.columns]
        angles = torch.rand(self.positions, self.rotary_dim // 2, generator=rng) * 7
        for name, x in (("rotary_cos", angles.cos()), ("rotary_sin", angles.sin())):
            found[name] = x.to(dtype).T.contiguous().T if self.strided else x.to(dtype)
        return found | {"turns": self.turns, "along": int(self.along), "cache_format": CACHE_FORMATS.get(self.cache, 0)}

    def _laid_out(self, x: torch.Tensor) -> torch.Tensor:
        if not self.strided:
            return x.contiguous()
        room = torch.zeros(*x.shape[:-1], x.shape[-1] + 16, dtype=x.dtype)
        room = room.transpose(-3, -2).contiguous().transpose(-3, -2)
        room[..., : x.shape[-1]] = x
        return room[..., : x.shape[-1]]

    def turned(self, row: torch.Tensor, position: int) -> torch.Tensor:
        """``(heads, dim)`` turned by a position."""
        if self.turns == UNTURNED:
            return row
        at, half = min(max(position, 0), self.positions - 1), self.rotary_dim // 2
        cos, sin = (self.values[name][at].float() for name in ("rotary_cos", "rotary_sin"))
        lower, upper = slice(0, half), slice(half, 2 * half)
        if self.turns == INTERLEAVED:
            lower, upper = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
        a, b = row[:, lower].float(), row[:, upper].float()
        row = row.clone()
        row[:, lower], row[:, upper] = (a * cos - b * sin).to(row.dtype), (a * sin + b * cos).to(row.dtype)
        return row

    @functools.cached_property
    def right(self) -> Results:
        """Turned queries of all sequences, keys and values, as bits."""
        of = self.values
        o, caches = of["o"].clone(), {name: of[name].clone() for name in "kv"}
        for b, (begin, end) in enumerate(itertools.pairwise(of["cu_seqlens_q"].tolist())):
            for row in range(begin, end):
                position = int(of["rotary_seqlens"][b]) + (row - begin if self.along else 0)
                o[row] = self.turned(of["q"][row], position)
        for b, (begin, end) in enumerate(itertools.pairwise(of["cu_seqlens_k"].tolist())):
            for row in range(begin, end):
                position = self.before[b] + row - begin
                column, inside = divmod(position, self.page_size)
                page = int(of["page_table"][b, column]) if position >= 0 and column < self.columns else -1
                if not 0 <= page < len(caches["k"]):
                    continue
                key = self.turned(of["k_new"][row], int(of["rotary_seqlens"][b]) + row - begin)
                for name, x in (("k", key), ("v", of["v_new"][row])):
                    caches[name][page, inside] = self._stored(x, of[f"{name}_scale"][page])
        return self._bits(o, *caches.values())

    def _stored(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        if not self.cache:
            return x
        most = LARGEST[self.cache]
        x = (x.float() / scale[:, None]).clamp(-most, most)
        return (x.round().nan_to_num(0) if self.cache == "int8" else x).to(getattr(torch, self.cache))

    def _bits(self, o: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Results:
        """NaN apart, which have many."""

        def bits(x: torch.Tensor) -> np.ndarray:
            x = x.cpu().contiguous()
            if x.dtype == torch.int8:
                return x.numpy()
            words = x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])
            number = 255 if x.element_size() == 1 else -1
            return torch.where(torch.isnan(x.float()), torch.full_like(words, number), words).numpy()

        rows = sum(self.queries) if self.turns != UNTURNED else 0
        return tuple(map(bits, (o[:rows], k, v)))

    def run(self, compute: Compute, device: str) -> Results:
        """What a kernel makes of it."""

        values = {role: on(x, device) if isinstance(x, torch.Tensor) else x for role, x in self.values.items()}
        kept = {role: values[role] for role in ("o", "k", "v")}
        compute({**values, **{role: as_bytes(values[role]) for role in "kv"}}, {})
        return self._bits(*kept.values())

    def check(self, results: Results, device: str) -> float:
        """Assert that all bits are right."""
        for name, found, right in zip(("o", "k", "v"), results, self.right, strict=True):
            wrong = np.argwhere(found != right)
            assert not len(wrong), f"{name}: {len(wrong)} elements are wrong, the first at {wrong[0].tolist()}"
        return 0.0


def on(x: torch.Tensor, device: str) -> torch.Tensor:
    """A copy of a tensor with its strides."""
    memory = torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0).to(device, copy=True)
    return memory.as_strided(x.shape, x.stride(), x.storage_offset())


def as_bytes(cache: torch.Tensor) -> torch.Tensor:
    """A cache as kernels take it."""
    size = cache.element_size()
    strides = [x * size for x in cache.stride()[:-1]]
    return torch.empty(0, dtype=torch.uint8, device=cache.device).set_(
        cache.untyped_storage(),
        cache.storage_offset() * size,
        (*cache.shape[:-1], cache.shape[-1] * size),
        (*strides, 1),
    )


def problems(dtype: str, most: int = 256) -> Iterator[tuple[str, Append]]:
    """Those that a kernel of a dtype for head_dims up to ``most`` must get right, by label."""
    plain = Append(dtype)
    chunks = replace(plain, queries=(5, 2, 30, 0), added=(3, 2, 27, 0), before=(20, 0, 7, 5), trailing=4)
    yield "decoding", plain
    for turns, how in ((HALVES, "in halves"), (INTERLEAVED, "with neighbours")):
        yield f"turned {how}", replace(plain, turns=turns)
        yield f"chunks turned {how}", replace(chunks, turns=turns, strided=True, rotary_dim=128)
        yield f"6 elements turned {how}", replace(chunks, turns=turns, rotary_dim=6)
        yield f"20 elements turned {how}", replace(chunks, turns=turns, rotary_dim=20, head_dims=(40, 72))
        yield f"queries turned alike {how}", replace(chunks, turns=turns, along=False, first=(3, 150, -9, 0))
        for cache in CACHE_FORMATS:
            yield f"{cache}, turned {how}", replace(chunks, turns=turns, cache=cache)
    for cache in CACHE_FORMATS:
        yield cache, replace(plain, cache=cache, of_pages=False)
        yield f"{cache}, strided", replace(chunks, cache=cache, strided=True)
    yield "many heads", replace(chunks, heads=(48, 48), turns=HALVES)
    yield "the widest rows", replace(chunks, head_dims=(most, most), turns=HALVES, rotary_dim=most, strided=True)
    yield "the narrowest", replace(chunks, head_dims=(8, 16), turns=INTERLEAVED, rotary_dim=8)
    yield "pages of one key", replace(chunks, page_size=1, columns=40)
    yield "one page", replace(chunks, page_size=77, columns=1)
    nowhere = replace(chunks, before=(61, -2, 40, 0), entries=((0, 1, 2, 3), (4, -1, 9, 5), (6, 7, 8, 10**6), (0,) * 4))
    yield "places that there are not", nowhere
    yield "rows that pad a batch", replace(
        plain, queries=(1,) * 300, added=(1,) * 300, before=(20, 0, 7, *(0,) * 297),
        entries=((1,) * 4, (2,) * 4, (3,) * 4, *((4,) * 4,) * 297), cache="int8",
    )  # fmt: skip
    rng = np.random.default_rng(3)
    for total in (40, 300):
        cuts = np.sort(rng.integers(0, total + 1, 20))
        added = tuple(np.diff([0, *cuts, total]).tolist())
        entries = tuple(map(tuple, rng.integers(-1, 5, (21, 9)).tolist()))
        before = tuple(rng.integers(-2, 9, 21).tolist())
        of = {"added": added, "queries": added, "before": before, "entries": entries, "columns": 9, "page_size": 5}
        yield f"{total} rows for few places", replace(plain, **of, turns=HALVES, positions=64)


def trials(entry: KernelEntry) -> Iterator[Trial]:
    """All of them, for a kernel."""
    for label, problem in problems(entry.dtype, min(entry.head_dim, entry.head_dim_v)):
        yield Trial(label, problem.run, problem.check)


#: What is timed: chunks of 512 tokens of 16 sequences, 32 heads on 8.
_BATCH, _TOKENS = 16, 512


def usual(entry: KernelEntry) -> Usual:
    """What is timed of a kernel."""
    problem = Append(
        *(entry.dtype, (_TOKENS,) * _BATCH, (_TOKENS,) * _BATCH, (0,) * _BATCH, (32, 8)),
        turns=HALVES, rotary_dim=128, positions=_TOKENS, columns=_TOKENS // 16,
    )  # fmt: skip
    values = {role: on(x, "cuda") if isinstance(x, torch.Tensor) else x for role, x in problem.values.items()}
    values |= {role: as_bytes(values[role]) for role in "kv"}
    flops = 3.0 * _BATCH * _TOKENS * sum(problem.heads) * problem.rotary_dim
    return Usual(f"append b={_BATCH} n={_TOKENS} h=32 on 8 d=128", values, {}, flops)
