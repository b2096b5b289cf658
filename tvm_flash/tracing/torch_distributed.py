"""How the operators are computed over ``DTensor``: each process has a part of the batch, or of the heads, or all.

Importing this module tells :mod:`torch.distributed.tensor` so of the forward; other placements it redistributes to one
of these.  A backward has a list of results, for which it takes no rule: :func:`gradients` calls it on the parts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from tvm_flash.errors import ArgumentTypeError, NotSupportedError

#: What is split: the batch, or the heads.
_BATCH, _HEADS = 0, 1


def _axis(split: int | None, layout: str) -> int | None:
    """Which dimension of q, k, v is split."""
    return 2 if split == _HEADS and layout == "bshd" else split


def _of_tensor(split: int | None, layout: str) -> Any:
    return Replicate() if split is None else Shard(_axis(split, layout))


def _of_rows(split: int | None) -> Any:
    """Of what begins with batch and heads, as a log-sum-exp does."""
    return Replicate() if split is None else Shard(split)


def _of_parameter(x: Any, split: int | None) -> Any:
    """Of a parameter ``(batch, heads, …)`` or ``(heads,)``, of which one element may stand for all."""
    axis = split if split is None or len(x.shape) > 1 else split - 1
    return Replicate() if axis is None or axis < 0 or x.shape[axis] == 1 else Shard(axis)


def _splits(k: Any, layout: str) -> Iterator[int | None]:
    """What may be split; ``k`` is a tensor's spec."""
    yield from (None, _BATCH)
    if k.shape[_axis(_HEADS, layout)] % k.mesh.size() == 0:  # else a query head may lie elsewhere than its key head
        yield _HEADS


@register_sharding(torch.ops.tvm_flash.attention.default)
def _attention(
    q, k, v, alibi_slopes=None, kv_start=None, kv_end=None, query_start=None, sinks=None, visible=None, bias=None,
    *, layout="bhsd", return_lse=False, **_
):  # fmt: skip
    parameters = (alibi_slopes, kv_start, kv_end, query_start, sinks, visible, bias)
    ways = []
    for split in _splits(k, layout):
        tensor, rows = _of_tensor(split, layout), _of_rows(split)
        own = [None if x is None else _of_parameter(x, split) for x in parameters]
        ways.append(([tensor, rows if return_lse else Replicate()], [tensor] * 3 + own))
    return ways


def _tell_calls_apart() -> None:
    """Have torch keep placements for each layout and each set of parameters.

    It finds what it decided for an earlier call by the tensors and the whole numbers alone: with the heads split, a
    call in one layout would get what was right in the other, where that dimension is the sequence.

    Raises
    ------
    NotSupportedError: this torch keeps them in a way that isn't known here.
    """
    operator = torch.ops.tvm_flash.attention.default
    names = [x.name for x in operator._schema.arguments if x.kwarg_only]
    try:
        known = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
        known[operator] = dataclasses.replace(known[operator], static_argnum=3, static_kwargkey=names)
    except (AttributeError, KeyError, TypeError) as e:
        raise NotSupportedError(
            f"torch {torch.__version__}: keeps the placements of a DTensor in a way that isn't known here; call with "
            f"local tensors, by torch.distributed.tensor.experimental.local_map"
        ) from e


_tell_calls_apart()


def gradients(
    operator: Callable[..., Sequence[torch.Tensor]],
    dout: DTensor, q: DTensor, k: DTensor, v: DTensor, out: DTensor, lse: DTensor, dlse: DTensor | None,
    *parameters: DTensor | None, layout: str = "bhsd", **options: Any,
) -> list[DTensor]:  # fmt: skip
    """What ``operator``, a backward, gives: on each process's part of what the forward split, by ``out``.

    Raises
    ------
    ArgumentTypeError: one of the tensors is none of many processes.
    """
    given = (dout, q, k, v, out, lse, dlse, *parameters)
    for name, x in zip(
        ("dout", "q", "k", "v", "out", "lse", "dlse", *["a parameter"] * len(parameters)), given, strict=True
    ):
        if x is not None and not isinstance(x, DTensor):
            raise ArgumentTypeError(
                f"{name}: is a {type(x).__name__} beside a DTensor; give all as one, by distribute_tensor"
            )
    mesh, heads = out.device_mesh, _axis(_HEADS, layout)
    splits = [{0: _BATCH, heads: _HEADS}[p.dim] if p.is_shard() else None for p in out.placements]
    tensor, rows = [_of_tensor(s, layout) for s in splits], [_of_rows(s) for s in splits]
    placements = [*[tensor] * 5, rows, rows]
    placements += [None if x is None else [_of_parameter(x, s) for s in splits] for x in parameters]
    parts = [
        None if x is None else x.redistribute(mesh, place).to_local()
        for x, place in zip(given, placements, strict=True)
    ]
    found = operator(*parts, layout=layout, **options)

    def whole(x: torch.Tensor, place: list, shape: Sequence[int]) -> DTensor:
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(x.contiguous(), mesh, place, run_check=False, shape=torch.Size(shape), stride=stride)

    learnt = [whole(x, rows, (*lse.shape[:2], *x.shape[2:])) for x in found[3:]]
    return [whole(x, tensor, of.shape) for x, of in zip(found, (q, k, v), strict=False)] + learnt
