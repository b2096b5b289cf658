"""Results over disjoint keys, put together, and with the sink that each row has beside them."""

from __future__ import annotations

import torch


def merge(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Put attention over further keys into what there is of others, both float32.

    ``out`` and ``part`` are ``(batch, heads, rows, head_dim)``; ``lse`` and ``part_lse`` ``(batch, heads, rows)``, −inf
    in a row that saw no key.  The weight of the part is ``sigmoid(part_lse - lse)`` and the other what is left to 1, so
    that nothing is divided by a sum of rounded weights, and the results are read and written once.  Of two parts that
    is a third of the operations of :func:`tvm_flash.merge.merge_attention`, which takes any number of them.
    """
    weight = torch.sigmoid(part_lse - lse)
    weight = torch.where(part_lse == -torch.inf, 0.0, weight)  # also where neither saw a key
    out.lerp_(part, weight[..., None])
    lse.copy_(torch.logaddexp(lse, part_lse))


def add_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> None:
    """Put what takes weight and gives nothing into attention over all keys that a row sees, once.

    ``sinks`` are ``(heads,)`` or ``(batch, heads)``, −inf for none; the others are as in :func:`merge`.  A row without
    keys has none.
    """
    sinks = sinks[..., None]
    share = torch.where(sinks == -torch.inf, 1.0, torch.sigmoid(lse - sinks))
    out.mul_(share[..., None])
    lse.copy_(torch.where(lse == -torch.inf, lse, torch.logaddexp(lse, sinks)))


def sink_gradients(dout, out, lse, dlse, sinks: torch.Tensor) -> torch.Tensor:
    """The gradient of sinks ``(batch, heads)`` that some rows give, of the result and log-sum-exp with them."""
    flows = -(dout.float() * out.float()).sum(-1)
    flows = flows if dlse is None else flows + dlse
    shares = flows * torch.exp(sinks[..., None] - lse)
    return torch.where(lse == -torch.inf, 0.0, shares).sum(-1)  # a row without keys has no sink, whatever flows to it
