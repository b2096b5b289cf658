"""How far a result is from float64."""

from __future__ import annotations

import math

from tvm_flash import numerics
from tvm_flash.measure.workloads import Workload

#: So many of the last rows are compared; they see the most keys.
ROWS = 1024


def exact_rows(q, k, v, workload: Workload, dout=None):
    """The last rows of the first head of the first batch in float64, ``(rows, head_dim)``, on the tensors' device.

    They are those of the result, or of the queries' gradient for a backward.

    Parameters
    ----------
    q, k, v, dout: torch tensors ``(batch, seq, heads, head_dim)``.
    """
    import torch

    rows = min(workload.seqlen_q, ROWS)
    q, k, v = q[0, -rows:, 0].double(), k[0, :, 0].double(), v[0, :, 0].double()
    s = q @ k.T * workload.softmax_scale
    if workload.causal:
        last_seen = torch.arange(workload.seqlen_kv - rows, workload.seqlen_kv, device=q.device)[:, None]
        s.masked_fill_(torch.arange(workload.seqlen_kv, device=q.device)[None] > last_seen, -math.inf)
    p = torch.softmax(s, dim=-1)
    if not workload.backward:
        return p @ v
    dp = dout[0, -rows:, 0].double() @ v.T
    return (p * (dp - (p * dp).sum(dim=-1, keepdim=True))) @ k * workload.softmax_scale


def same_rows(out, layout: str, workload: Workload):
    """Those rows of a result in a layout."""
    out = out if layout == "bshd" else out.transpose(1, 2)
    return out[0, -min(workload.seqlen_q, ROWS) :, 0]


def relative_error(got, exact) -> float:
    """Norm of the difference over the norm of the float64 tensor ``exact``; NaN if there is one in ``got``."""
    return ((got.double() - exact).norm() / exact.norm()).item()


def allowed_error(usual: float, dtype) -> float:
    """The rule of :mod:`tvm_flash.numerics` for relative errors and a torch dtype."""
    return numerics.allowed_error(usual, 1.0, str(dtype).removeprefix("torch."))
