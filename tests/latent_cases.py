"""Calls of ``flash_attention_latent``: sequences on pages whose keys hold their values.  Needs torch; no TVM."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tvm_flash import flash_attention_latent

#: That of DeepSeek's heads before their projections are absorbed.
SCALE = 192**-0.5


@dataclass(frozen=True)
class Call:
    """Sequences of queries and keys on pages, in the order of a call's tensors."""

    queries: tuple[int, ...] = (2, 1, 3, 0, 1)
    keys: tuple[int, ...] = (150, 0, 65, 9, 1)
    heads: int = 16
    head_dim: int = 576
    head_dim_v: int = 512
    page_size: int = 64
    dtype: str = "float32"

    def tensors(self, seed: int = 0) -> dict[str, torch.Tensor]:
        """Of keys only ``seed`` says where their pages are; what no key needs is NaN, or the number of no page."""
        generator = torch.Generator().manual_seed(1)
        dtype = getattr(torch, self.dtype)
        columns = [-(-n // self.page_size) for n in self.keys]
        places = np.random.default_rng(seed).permutation(sum(columns) + 2)
        cache = torch.full((len(places), self.page_size, 1, self.head_dim), torch.nan, dtype=dtype)
        table = torch.full((len(self.keys), max(columns) + 1), 2**31 - 1, dtype=torch.int32)
        for b, (count, keys) in enumerate(zip(columns, self.keys, strict=True)):
            table[b, :count], places = torch.from_numpy(places[:count]).int(), places[count:]
            rows = torch.randn(keys, 1, self.head_dim, generator=generator).to(dtype)
            for j in range(count):
                part = rows[j * self.page_size : (j + 1) * self.page_size]
                cache[table[b, j], : len(part)] = part
        q = torch.randn(sum(self.queries), self.heads, self.head_dim, generator=generator).to(dtype)
        starts = torch.tensor([0, *np.cumsum(self.queries)], dtype=torch.int32)
        lengths = torch.tensor(self.keys, dtype=torch.int32)
        return {"q": q, "kv_cache": cache, "cu_seqlens_q": starts, "seqlens_k": lengths, "page_table": table}

    def attend(self, seed: int = 0, **options):
        """The function's answer."""
        options = {"head_dim_v": self.head_dim_v, "softmax_scale": SCALE, "return_lse": True} | options
        return flash_attention_latent(**self.tensors(seed), **options)

    def exact(self, softmax_scale: float = SCALE) -> torch.Tensor:
        """The output of causal attention in float64."""
        given, found = self.tensors(), []
        cache = torch.nan_to_num(given["kv_cache"].double())
        for b, (queries, keys) in enumerate(zip(self.queries, self.keys, strict=True)):
            rows = slice(given["cu_seqlens_q"][b], given["cu_seqlens_q"][b + 1])
            kv = cache[given["page_table"][b, : -(-keys // self.page_size)].long()].reshape(-1, self.head_dim)[:keys]
            scores = torch.einsum("thd,jd->htj", given["q"][rows].double(), kv) * softmax_scale
            hidden = torch.arange(keys) > torch.arange(queries)[:, None] + (keys - queries)
            weights = torch.nan_to_num(torch.softmax(scores.masked_fill(hidden, -torch.inf), -1))
            found.append(torch.einsum("htj,jd->thd", weights, kv[:, : self.head_dim_v]))
        return torch.cat(found)
