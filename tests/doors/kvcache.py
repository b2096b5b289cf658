"""``nn.flash_attn_with_kvcache``: tokens that are appended and turned, on pages or in entries, in 8 bits too."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch

from tests.doors.draw import Draw, options_of, sizes_of
from tests.doors.formula import compare, of_sequence
from tests.random_cases import DTYPES
from tvm_flash import nn


class Cache:
    """Keys and values of sequences: where they lie, and what they should be after a call.

    ``rooms`` are the two tensors, in pages if ``options`` has a table, ``scales`` of each what 8 bits are multiplied
    with, None of each if there are more bits.
    """

    def __init__(self, draw: Draw, batch: int, most: int, kv_heads: int, dims: tuple[int, int], dtype: torch.dtype):
        self.dtype, self.page = dtype, draw.one_of("page size", 0, 0, 1, 3, 16, 64, 100)
        self.options: dict[str, Any] = {}
        if self.page:
            per_sequence = -(-most // self.page)
            shape = (batch * per_sequence + draw.randint(0, 3), self.page)
            order = torch.randperm(shape[0], generator=draw.generator)[: batch * per_sequence]
            self.order = order.view(batch, per_sequence).to(draw.device)
            self.options["block_table"] = self.order.int()
        else:
            shape = (batch + draw.randint(0, 2), most + draw.choice((0, 5)))
            self.order = torch.arange(batch, device=draw.device)
            if draw.chance("entries", 0.4):
                self.order = torch.randperm(shape[0], generator=draw.generator)[:batch].to(draw.device)
                self.options["cache_batch_idx"] = self.order.int()
        self.rooms = [draw.normal(*shape, kv_heads, n, dtype=dtype) for n in dims]
        self.scales = [None, None]
        if draw.chance("8 bits", 0.25) and (draw.device == "cpu" or not any(n % 16 for n in dims)):
            narrow = getattr(torch, draw.one_of("cache", "float8_e4m3fn", "int8"))
            scales = [0.01 + 0.02 * torch.rand(batch, kv_heads, generator=draw.generator) for _ in dims]
            self.scales = [x.to(draw.device) for x in scales]
            self.options |= dict(zip(("k_descale", "v_descale"), self.scales, strict=True))
            self.rooms = [_in_8_bits(x * 50, narrow) for x in self.rooms]

    def placed(self, draw: Draw) -> list[torch.Tensor]:
        """The tensors as a call is given them."""
        pairs = zip(("k_cache", "v_cache"), self.rooms, strict=True)
        return [draw.placed(name, _as_bits(x), rows=True).view(x.dtype) for name, x in pairs]

    def place(self, b: int, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where keys of a sequence are, along the first two dimensions."""
        at, own = torch.arange(begin, end, device=self.order.device), self.order[b]
        return (own[at // self.page], at % self.page) if self.page else (own.expand(end - begin), at)

    def append(self, b: int, begin: int, *rows: torch.Tensor) -> None:
        """Put new keys and values of a sequence where they belong."""
        for room, x, scale in zip(self.rooms, rows, self.scales, strict=True):
            bits = x if scale is None else _in_8_bits(x.float() / scale[b][:, None], room.dtype)
            room[self.place(b, begin, begin + len(x))] = bits

    def of_sequence(self, b: int, end: int) -> list[torch.Tensor]:
        """Keys and values of a sequence, those that 8 bits stand for."""
        found = [room[self.place(b, 0, end)] for room in self.rooms]
        pairs = zip(found, self.scales, strict=True)
        return [x if s is None else (x.float() * s[b][:, None]).to(self.dtype) for x, s in pairs]


class Turns:
    """How new rows are turned by their positions; not at all without ``options``."""

    def __init__(self, draw: Draw, head_dim: int, positions: int, dtype: torch.dtype, may: bool):
        self.options: dict[str, Any] = {}
        if may and head_dim >= 8 and draw.chance("turned", 0.5):
            choices = (n for n in (8, 16, 32, head_dim // 16 * 16) if 0 < n <= head_dim)
            self.size = draw.one_of("elements turned", *choices)
            angles = torch.rand(positions, self.size // 2, generator=draw.generator) * 6
            tables = (f(angles).to(draw.device, dtype) for f in (torch.cos, torch.sin))
            self.options = dict(zip(("rotary_cos", "rotary_sin"), tables, strict=True))
            self.options["rotary_interleaved"] = draw.chance("interleaved", 0.5)

    def __call__(self, x: torch.Tensor, first: int, every: bool) -> torch.Tensor:
        """Rows ``(rows, heads, head_dim)`` turned by their positions from ``first`` on, or all by that."""
        if not self.options:
            return x
        at = first + torch.arange(len(x), device=x.device) * int(every)
        cos, sin = (self.options[f"rotary_{n}"][at][:, None].float() for n in ("cos", "sin"))
        of_pair, shape = (-1, (-1, 2)) if self.options["rotary_interleaved"] else (-2, (2, -1))
        a, b = x[..., : self.size].float().unflatten(-1, shape).unbind(of_pair)
        both = torch.stack((a * cos - b * sin, a * sin + b * cos), of_pair).flatten(-2)
        return torch.cat((both.to(x.dtype), x[..., self.size :]), -1)


def call(draw: Draw) -> float:
    """Make a call; its error as a share of what is allowed."""
    dtype = getattr(torch, draw.one_of("dtype", *DTYPES[draw.device]))
    _, most, batch, (heads, kv_heads), dims = sizes_of(draw)
    batch, rows = draw.one_of("batch", batch, 5), draw.one_of("new queries", 1, 1, 2, 5, 17, 70)
    fresh = draw.one_of("new keys", 0, rows, draw.randint(1, 9)) if draw.chance("appends", 0.6) else 0
    most += fresh
    before = [draw.choice((0, draw.randint(0, most - fresh), most - fresh)) for _ in range(batch)]
    draw.say("keys before", before)
    tokens, added = [rows] * batch, [fresh] * batch
    varied = draw.chance("different numbers of tokens", 0.3)
    if varied:
        tokens = draw.say("queries", [draw.randint(0, rows) for _ in tokens])
        added = draw.say("added", [draw.randint(0, fresh) for _ in added])
    cache, turn = Cache(draw, batch, most, kv_heads, dims, dtype), Turns(draw, dims[0], most + rows, dtype, fresh > 0)
    options = options_of(draw, (batch, heads), most) | cache.options | turn.options
    hidden = [0] * batch
    if draw.chance("padding on the left", 0.2):
        hidden = draw.say("hidden", [draw.randint(0, n) for n in before])
        options["cache_leftpad"] = torch.tensor(hidden, dtype=torch.int32, device=draw.device)

    starts_q, starts_k = ([0, *itertools.accumulate(x)] for x in (tokens, added))
    q = draw.normal(starts_q[-1], heads, dims[0], dtype=dtype)
    new = [draw.normal(starts_k[-1], kv_heads, n, dtype=dtype) for n in dims]
    shaped = [q, *new] if varied else [x.view(batch, -1, *x.shape[1:]) for x in (q, *new) if len(x)]
    given = [draw.placed(name, x) for name, x in zip("qkv" if fresh else "q", shaped, strict=False)]
    if varied:
        options["cu_seqlens_q"] = torch.tensor(starts_q, dtype=torch.int32, device=draw.device)
        options["max_seqlen_q"] = draw.one_of("longest", None, max(tokens))
        if fresh:
            options["cu_seqlens_k_new"] = torch.tensor(starts_k, dtype=torch.int32, device=draw.device)
    lengths = torch.tensor(before, dtype=torch.int32, device=draw.device)
    caches = cache.placed(draw)
    options |= {"cache_seqlens": lengths, "return_softmax_lse": True}
    out, lse = nn.flash_attn_with_kvcache(given[0], *caches, *given[1:], **options)
    if not varied:
        out, lse = out.flatten(0, 1), lse.transpose(0, 1).flatten(1)

    worst = 0.0
    local = options.get("causal") or any(n >= 0 for n in options.get("window_size", (-1,)))
    scale = options.get("softmax_scale", 1 / math.sqrt(dims[0]))
    for b, first in enumerate(before):
        of_q, of_new = (slice(x[b], x[b + 1]) for x in (starts_q, starts_k))
        cache.append(b, first, turn(new[0][of_new], first, True), new[1][of_new])
        end = first + added[b]
        tensors = (x.transpose(0, 1) for x in (turn(q[of_q], first, local), *cache.of_sequence(b, end)))
        of = of_sequence(options, b, tokens[b], end, draw.device, hidden[b])
        worst = max(worst, compare(out[of_q].transpose(0, 1), *tensors, scale, *of, lse=lse[:, of_q]))
    for name, *both in zip("kv", cache.rooms, caches, strict=True):
        assert torch.equal(*map(_as_bits, both)), f"{name}_cache isn't what it was with the new rows in their places"
    return worst


def _as_bits(x: torch.Tensor) -> torch.Tensor:
    """Of 8 bits the bytes, which have more operations; others as they are."""
    return x.view(torch.uint8) if x.element_size() == 1 else x


def _in_8_bits(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nearest numbers of a dtype of 8 bits, those out of its range at its ends."""
    if dtype == torch.int8:
        return x.float().clamp(-127, 127).round().to(dtype)
    return x.float().clamp(-448, 448).to(dtype)
