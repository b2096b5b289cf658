"""Cases of attention over a sequence that several processes share, and their exact results."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

#: Of tensors that are compared: the result, its log-sum-exp, and gradients.
NAMES = ("out", "lse", "dq", "dk", "dv", "d_slopes", "d_sinks")


@dataclass(frozen=True)
class Case:
    """A problem of ``length`` positions, ``options`` of the call besides."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    batch: int = 2
    heads: int = 8
    kv_heads: int = 2
    length: int = 101
    head_dim: int = 32
    head_dim_v: int = 32
    slopes: tuple[int, ...] | None = None
    sinks: tuple[int, ...] | None = None

    def inputs(self, dtype: torch.dtype) -> dict[str, torch.Tensor | None]:
        """q, k, v, slopes, and what flows back to the result and to its log-sum-exp, in the layout bhsd."""
        make = torch.Generator().manual_seed(7)

        def tensor(*shape, of=dtype):
            return torch.randn(shape, generator=make).to(of)

        rows, keys = (self.batch, self.heads, self.length), (self.batch, self.kv_heads, self.length)
        q, k, v = (tensor(*rows, self.head_dim), tensor(*keys, self.head_dim), tensor(*keys, self.head_dim_v))
        slopes = None if self.slopes is None else tensor(*self.slopes, of=torch.float32).abs() / 10
        sinks = None if self.sinks is None else tensor(*self.sinks, of=torch.float32) * 2
        if sinks is not None:
            sinks[..., 3] = -torch.inf  # none
        dout = tensor(*rows, self.head_dim_v)
        if starts := self.options.get("cu_seqlens"):
            dout[:, :, starts[-1] :] = torch.nan  # of rows that are in no document
        return {
            "q": q,
            "k": k,
            "v": v,
            "slopes": slopes,
            "sinks": sinks,
            "dout": dout,
            "dlse": tensor(*rows, of=torch.float32),
        }

    def exact(self, inputs: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """Results and gradients in float64, by name; minus infinity has no gradient."""
        given = {n: x.double().requires_grad_() for n, x in inputs.items() if x is not None and n[0] != "d"}
        q, k, v, slopes, sinks = map(given.get, ("q", "k", "v", "slopes", "sinks"))
        k, v = (x.repeat_interleave(self.heads // self.kv_heads, 1) for x in (k, v))
        i, j = torch.arange(self.length)[:, None], torch.arange(self.length)[None]
        scores = q @ k.mT / self.head_dim**0.5
        if cap := self.options.get("softcap"):
            scores = cap * torch.tanh(scores / cap)
        if slopes is not None:
            scores = scores - slopes[..., None, None] * (i - j).abs()
        left, right = self.options.get("window_size", (-1, -1))
        right = 0 if self.options.get("causal") else right
        seen = torch.ones(self.length, self.length, dtype=torch.bool)
        seen &= (j >= i - left) if left >= 0 else True
        seen &= (j <= i + right) if right >= 0 else True
        if starts := self.options.get("cu_seqlens"):
            document = torch.bucketize(torch.arange(self.length), torch.tensor(starts[1:]), right=True)
            seen &= (document[:, None] == document[None]) & (i < starts[-1])
        scores = scores.masked_fill(~seen, -torch.inf)
        lse = torch.logsumexp(scores, -1)
        some = lse > -torch.inf
        if sinks is not None:
            lse = torch.where(some, torch.logaddexp(torch.where(some, lse, 0.0), sinks[..., None]), lse)
        p = torch.where(seen, torch.exp(scores - torch.where(some, lse, 0.0)[..., None]), 0.0)
        out = p @ v
        flowing = (out * inputs["dout"].double().nan_to_num()).sum() + (
            torch.where(some, lse, 0.0) * inputs["dlse"]
        ).sum()
        gradients = torch.autograd.grad(flowing, list(given.values()))
        named = {f"d{n}" if n in "qkv" else f"d_{n}": x for n, x in zip(given, gradients, strict=True)}
        return {"out": out.detach(), "lse": lse.detach(), **named}


DOCUMENTS = [0, 10, 11, 11, 40, 77, 101]
SHORT_DOCUMENTS = [0, 5, 9, 33, 34, 50, 52, 54, 90]  # what is after the last is in none

CASES = {
    case.name: case
    for case in (
        Case("full"),
        Case("causal", {"causal": True}),
        Case("window", {"causal": True, "window_size": (20, 0)}),
        Case("window to both sides", {"window_size": (9, 13)}, batch=1, length=128),
        Case("softcap", {"causal": True, "softcap": 2.0}, kv_heads=8),
        Case("slopes", {"causal": True}, slopes=(8,)),
        Case("slopes of each batch entry, to both sides", slopes=(2, 8), length=45),
        Case("a slope for all heads", {"causal": True}, slopes=(2, 1), length=45),
        Case("sinks", {"causal": True}, sinks=(8,)),
        Case("sinks of each batch entry, with a window", {"window_size": (20, 5)}, sinks=(2, 8), kv_heads=1),
        Case("documents with sinks", {"causal": True, "cu_seqlens": SHORT_DOCUMENTS}, batch=1, sinks=(8,)),
        Case("documents", {"cu_seqlens": DOCUMENTS}, batch=1),
        Case("causal documents", {"causal": True, "cu_seqlens": SHORT_DOCUMENTS}, batch=1),
        Case("documents with a window", {"window_size": (6, 2), "cu_seqlens": DOCUMENTS, "softcap": 3.0}, batch=1),
        Case("documents with slopes", {"causal": True, "cu_seqlens": DOCUMENTS}, batch=1, slopes=(1, 8)),
        Case("values of another size", {"causal": True}, head_dim=64, head_dim_v=24),
        Case("one key head", {"causal": True}, kv_heads=1),
        Case("fewer positions than ranks", {"causal": True}, length=5),
    )
}
