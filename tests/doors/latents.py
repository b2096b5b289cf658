"""``nn.flash_mla_with_kvcache``: values in keys, on pages, split where a call says so."""

from __future__ import annotations

import torch

from tests.doors.draw import Draw
from tests.doors.formula import compare, of_sequence
from tests.random_cases import DTYPES
from tvm_flash import nn


def call(draw: Draw) -> float:
    """``nn.flash_mla_with_kvcache``: values in keys, on pages, split where a call says so."""
    dtype = getattr(torch, draw.one_of("dtype", *DTYPES[draw.device]))
    batch, rows, heads = (
        draw.one_of("batch", 1, 2, 5),
        draw.one_of("queries", 1, 1, 2, 3),
        draw.one_of("heads", 1, 3, 16, 40),
    )
    head_dim, head_dim_v = draw.one_of("head_dim", (576, 512), (576, 512), (192, 128), (80, 64), (576, 504), (136, 136))
    most, page = draw.length("keys", 3000), draw.one_of("page size", 1, 3, 16, 64, 64, 100)
    lengths = draw.say("lengths", [draw.choice((0, 1, draw.randint(0, most), most)) for _ in range(batch)])
    per_sequence = -(-most // page)
    order = torch.randperm(batch * per_sequence + 2, generator=draw.generator)[: batch * per_sequence]
    table = order.view(batch, per_sequence).to(draw.device, torch.int32)
    cache = draw.normal(batch * per_sequence + 2, page, head_dim, dtype=dtype)
    q = draw.normal(batch, rows, heads, head_dim, dtype=dtype)
    causal, split = draw.chance("causal", 0.5), draw.one_of("split_length", None, None, 64, 256, 4096)
    scale = draw.one_of("scale", 0.1, head_dim**-0.5)
    out, lse = nn.flash_mla_with_kvcache(
        draw.placed("q", q, rows=True),
        draw.placed("k_cache", cache, rows=True),
        table,
        torch.tensor(lengths, dtype=torch.int32, device=draw.device),
        head_dim_v,
        *nn.get_mla_metadata(split_length=split),
        scale,
        causal,
    )
    worst = 0.0
    for b, length in enumerate(lengths):
        at = torch.arange(length, device=draw.device)
        keys = cache[table[b].long()[at // page], at % page][None]
        of = of_sequence({"causal": causal}, b, rows, length, draw.device)
        tensors = (q[b].transpose(0, 1), keys, keys[..., :head_dim_v])
        worst = max(worst, compare(out[b].transpose(0, 1), *tensors, scale, *of, lse=lse[b]))
    return worst
