"""What is drawn for a call of a drop-in: choices with names, numbers, places in memory, sizes and options."""

from __future__ import annotations

import math
import random
from typing import Any

import torch

from tests.random_cases import GROUPS

#: Scores of one call, so that float64 takes milliseconds.
MAX_SCORES = {"cpu": 60_000, "cuda": 1_000_000}
HEAD_DIMS = (64, 64, 128, 128, 32, 96, 40, 8, 20, 33, 72, 120, 192, 256)


class Draw(random.Random):
    """The choices of a call, each with a name, so that a failure can tell them."""

    def __init__(self, seed: int, device: str):
        super().__init__(seed)
        self.device, self.said = device, {}
        self.generator = torch.Generator().manual_seed(seed)

    def say(self, name: str, value: Any) -> Any:
        """Remember a choice."""
        self.said[name] = value
        return value

    def one_of(self, name: str, *values: Any) -> Any:
        """One of some values."""
        return self.say(name, self.choice(values))

    def chance(self, name: str, share: float) -> bool:
        """True in a share of all calls."""
        return self.say(name, self.random() < share)

    def length(self, name: str, longest: int = 600) -> int:
        """1 to ``longest``, small ones and those beside multiples of tiles more often."""
        kind = self.random()
        if kind < 0.2:
            return self.say(name, self.randint(1, 9))
        if kind < 0.4:
            return self.say(name, max(1, min(longest, 64 * self.randint(1, 4) + self.choice((-1, 0, 1)))))
        return self.say(name, int(math.exp(self.uniform(0, math.log(longest)))))

    def normal(self, *shape: int, dtype: torch.dtype, factor: float = 1.0) -> torch.Tensor:
        """Random numbers on the device."""
        return (torch.randn(shape, generator=self.generator) * factor).to(self.device, dtype)

    def placed(self, name: str, x: torch.Tensor, rows: bool = False) -> torch.Tensor:
        """The same numbers, lying in memory in one of many ways, amid NaN where there is room; ``rows``: which are
        contiguous, and on a GPU begin at multiples of 16 bytes."""
        ways = () if rows else ("columns", "every other")
        ways += () if rows and self.device != "cpu" else ("odd address",)
        how = self.one_of(name, *("contiguous",) * 4, "transposed", "gaps", *ways)
        if how == "transposed" and x.ndim > 2:
            return x.transpose(0, -2).contiguous().transpose(0, -2)
        if how in ("gaps", "odd address"):
            unit = 16 // x.element_size()
            before, columns = (unit, unit + -x.shape[-1] % unit) if how == "gaps" else (1, 3)
            room = _blank((*(n + 1 for n in x.shape[:-1]), x.shape[-1] + columns), x)
            view = room[(*(slice(1, None) for _ in x.shape[:-1]), slice(before, before + x.shape[-1]))]
            return view.copy_(x)
        if how == "columns" and x.ndim > 1:
            return x.transpose(-1, -2).contiguous().transpose(-1, -2)
        if how == "every other":
            return _blank((*x.shape[:-1], 2 * x.shape[-1]), x)[..., ::2].copy_(x)
        return x.contiguous()


def _blank(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    value = True if like.dtype == torch.bool else math.nan if like.is_floating_point() else 127
    return torch.full(shape, value, dtype=like.dtype, device=like.device)


def sizes_of(draw: Draw):
    """Lengths of queries and keys, batch, heads of queries and keys, head dimensions of keys and values."""
    keys = draw.length("keys")
    rows = keys if draw.chance("as many queries", 0.4) else draw.length("queries")
    batch, kv_heads, group = draw.choice((1, 1, 2, 3)), draw.choice((1, 2, 3)), draw.choice(GROUPS)
    while batch * kv_heads * group * rows * keys > MAX_SCORES[draw.device]:
        if max(batch, kv_heads, group) == 1:
            rows, keys = (rows + 1) // 2, (keys + 1) // 2
        batch, kv_heads, group = (max(1, n // 2) for n in (batch, kv_heads, group))
    head_dim = draw.choice(HEAD_DIMS)
    head_dim_v = head_dim if draw.random() < 0.8 else draw.choice(HEAD_DIMS)
    draw.say("sizes", (batch, kv_heads * group, kv_heads, rows, keys, head_dim, head_dim_v))
    return rows, keys, batch, (kv_heads * group, kv_heads), (head_dim, head_dim_v)


def options_of(draw: Draw, heads: tuple[int, int], keys: int) -> dict[str, Any]:
    """Options that functions of flash_attn share; slopes of ``heads``, (batch, heads)."""
    options: dict[str, Any] = {}
    if draw.chance("causal", 0.4):
        options["causal"] = True
    if draw.chance("window", 0.3):
        sides = (draw.choice((-1, 0, 3, draw.randint(0, keys))) for _ in range(2))
        options["window_size"] = draw.say("window_size", tuple(sides))
    if draw.chance("capped", 0.2):
        options["softcap"] = draw.one_of("softcap", 1.0, 30.0)
    if draw.chance("scaled", 0.2):
        options["softmax_scale"] = draw.one_of("softmax_scale", 0.05, 0.5)
    if draw.chance("slopes", 0.2):
        shape = heads if draw.chance("slopes of each sequence", 0.5) else heads[1:]
        options["alibi_slopes"] = torch.rand(shape, generator=draw.generator).to(draw.device)
    return options
