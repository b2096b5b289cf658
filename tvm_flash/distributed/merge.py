"""Results over disjoint keys, put together, and with the sink that each row has beside them."""

from __future__ import annotations

import torch

from tvm_flash.frameworks.arrays import torch_arrays
from tvm_flash.merge import weights_of


def merge(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Put attention over further keys into what there is of others, both float32.

    ``out`` and ``part`` are ``(batch, heads, rows, head_dim)``; ``lse`` and ``part_lse`` ``(batch, heads, rows)``, −inf
    in a row that saw no key.  Results are read and written once.
    """
    (_, weight), total, merged = weights_of(torch_arrays(), (lse, part_lse))
    out.lerp_(part, (weight / total)[..., None])
    lse.copy_(merged)


def add_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> None:
    """Put what takes weight and gives nothing into attention over all keys that a row sees, once.

    ``sinks`` are ``(heads,)`` or ``(batch, heads)``, −inf for none; the others are as in :func:`merge`.  A row without
    keys has none.
    """
    (weight, _), total, merged = weights_of(torch_arrays(), (lse, sinks[..., None]))
    out.mul_((weight / total)[..., None])
    lse.copy_(torch.where(lse == -torch.inf, lse, merged))


def sink_gradients(dout, out, lse, dlse, sinks: torch.Tensor) -> torch.Tensor:
    """The gradient of sinks ``(batch, heads)`` that some rows give, of the result and log-sum-exp with them."""
    flows = -(dout.float() * out.float()).sum(-1)
    flows = flows if dlse is None else flows + dlse
    shares = flows * torch.exp(sinks[..., None] - lse)
    return torch.where(lse == -torch.inf, 0.0, shares).sum(-1)  # a row without keys has no sink, whatever flows to it
