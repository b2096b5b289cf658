"""What else computes sequences of different lengths that lie one after the other: functions of PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

#: Names of them: torch's attention called for each sequence, and torch's own function for ragged batches.
ONE_AT_A_TIME, VARLEN = "torch, one at a time", "varlen_attn"
ABOUT = {
    ONE_AT_A_TIME: "torch.nn.functional.scaled_dot_product_attention, a sequence at a time",
    VARLEN: "torch.nn.attention.varlen.varlen_attn",
}


def peers(q: Any, k: Any, v: Any, lengths: Sequence[int], causal: bool) -> dict[str, Callable[[], Any]]:
    """Those that there are for a device and a dtype, by name.

    Parameters
    ----------
    q, k, v: torch tensors ``(total, heads, head_dim)``.
    lengths: queries of each sequence, and as many keys.
    """
    import torch

    starts = torch.tensor([0, *lengths], device=q.device).cumsum(0).int()
    ends, longest = starts.tolist(), max(lengths)
    grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}

    def one_at_a_time():
        found = []
        for first, end in itertools.pairwise(ends):
            own = (x[None, first:end].transpose(1, 2) for x in (q, k, v))
            out = torch.nn.functional.scaled_dot_product_attention(*own, is_causal=causal, **grouped)
            found.append(out[0].transpose(0, 1))
        return torch.cat(found)

    found = {ONE_AT_A_TIME: one_at_a_time}
    if q.device.type != "cpu" and (attend := _varlen_attn()) is not None and q.dtype != torch.float32:
        options = {**({"window_size": (-1, 0)} if causal else {}), **grouped}
        found[VARLEN] = lambda: attend(q, k, v, starts, starts, longest, longest, **options)
    return found


def _varlen_attn():
    """PyTorch's own function, or None if this version has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def backward(call: Callable[[], Any], leaves: Sequence[Any], dout: Any) -> Callable[[], tuple[Any, ...]]:
    """The gradients alone of what a call computes of ``leaves``: what the forward left is kept."""
    import torch

    out = call()
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)
