"""How the operators are computed over ``DTensor``: each process has a part of the batch, or of the heads, or all.

Importing this module tells :mod:`torch.distributed.tensor` so; other placements it redistributes to one of these.
"""

from __future__ import annotations

import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding


def _placements(q, k, v, parameters, layout, return_lse):
    """Acceptable placements of ``(out, lse)`` and of ``(q, k, v, parameters …)``; each argument is a tensor's spec."""
    heads = 1 if layout == "bhsd" else 2
    given = [x for x in parameters if x is not None]
    ways = [(Replicate(), Replicate(), [Replicate() for _ in given])]
    ways.append((Shard(0), Shard(0), [Shard(0) if len(x.shape) > 1 and x.shape[0] > 1 else Replicate() for x in given]))
    if k.shape[heads] % q.mesh.size() == 0:  # else a query head may lie elsewhere than its key head
        of_heads = [min(len(x.shape) - 1, 1) for x in given]
        own = [Shard(a) if x.shape[a] > 1 else Replicate() for x, a in zip(given, of_heads, strict=True)]
        ways.append((Shard(heads), Shard(1), own))
    for tensors, lse, own in ways:
        yield [tensors, lse if return_lse else Replicate()], [tensors] * 3, iter(own)


@register_sharding(torch.ops.tvm_flash.attention.default)
def _attention(
    q, k, v, alibi_slopes=None, kv_start=None, kv_end=None, query_start=None, sinks=None, visible=None, bias=None,
    *, layout="bhsd", return_lse=False, **_
):  # fmt: skip
    parameters = (alibi_slopes, kv_start, kv_end, query_start, sinks, visible, bias)
    return [
        (results, [*tensors, *(None if x is None else next(own) for x in parameters)])
        for results, tensors, own in _placements(q, k, v, parameters, layout, return_lse)
    ]
