"""Results over disjoint keys, put together."""

from __future__ import annotations

import torch


def merge(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Put attention over further keys into what there is of others, both float32.

    ``out`` and ``part`` are ``(batch, heads, rows, head_dim)``; ``lse`` and ``part_lse`` ``(batch, heads, rows)``, −inf
    in a row that saw no key.  The weight of the part is ``sigmoid(part_lse - lse)`` and the other what is left to 1, so
    that nothing is divided by a sum of rounded weights, and the results are read and written once.
    """
    weight = torch.sigmoid(part_lse - lse)
    weight = torch.where(part_lse == -torch.inf, 0.0, weight)  # also where neither saw a key
    out.lerp_(part, weight[..., None])
    lse.copy_(torch.logaddexp(lse, part_lse))
