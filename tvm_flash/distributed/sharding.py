"""Sequences dealt out to the ranks of a mesh, and put together again."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from tvm_flash.distributed.agreement import Agreement, Axes, axes_of
from tvm_flash.distributed.arguments import agreed_placement, check_order, dealt_so_far, note_dealt
from tvm_flash.distributed.exchange import talking
from tvm_flash.distributed.placement import Interval, Placement, size
from tvm_flash.errors import InvalidArgumentError

#: A label that no loss counts.
IGNORED = -100


def shard_sequence(
    x: torch.Tensor, mesh: DeviceMesh, *, dim: int = 1, balance: str = "zigzag", exchange: str = "auto"
) -> torch.Tensor:
    """This rank's part of a tensor that has a whole sequence along a dimension, as every rank has it; nothing is sent.

    ``balance="zigzag"`` gives each of n ranks along the mesh's first axis one of 2n chunks from the front and one from
    the back; what these ranks have is dealt out along the second axis in its order.  Chunks may differ by a position.
    ``balance`` has to be that of :func:`context_parallel_attention`, which refuses another one of parts made here, and
    of any if this process has never dealt out by it.  Every ``exchange`` has the same order; its name is checked only.

    Raises
    ------
    InvalidArgumentError: an argument is wrong.
    """
    check_order(mesh, balance, exchange)
    axes = axes_of(mesh)
    dim = _checked_dim(x, dim)
    held = Placement(x.shape[dim], *axes.dealt, balance).held(*axes.place)
    parts = [x.narrow(dim, first, end - first) for first, end in held]
    part = torch.cat(parts or [x.narrow(dim, 0, 0)], dim)
    note_dealt(part, axes, balance)
    return part


def sequence_positions(
    length: int,
    mesh: DeviceMesh,
    *,
    balance: str = "zigzag",
    exchange: str = "auto",
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Where this rank's rows stand in a sequence, int64: its position ids."""
    return shard_sequence(torch.arange(length, device=device), mesh, dim=0, balance=balance, exchange=exchange)


def shard_batch(
    batch: Mapping[str, torch.Tensor],
    mesh: DeviceMesh,
    *,
    dim: int = 1,
    balance: str = "zigzag",
    exchange: str = "auto",
) -> dict[str, torch.Tensor]:
    """This rank's part of what a causal language model is trained with, ``(batch, seq)`` tensors by name.

    ``position_ids`` are added if they aren't there.  With ``labels`` come ``shift_labels``: the label of each row's
    next position, −100 at the end, since that of a part's last row is on another rank.  A loss of these summed on every
    rank, over the number of labels of all ranks, has gradients whose sum over the ranks is that of the whole.
    """
    whole = dict(batch)
    if not whole:
        raise InvalidArgumentError("batch: is empty, expected tensors by name, as input_ids")
    first = next(iter(whole.values()))
    if "position_ids" not in whole:
        shape = [1] * first.ndim
        shape[dim] = first.shape[dim]
        whole["position_ids"] = torch.arange(first.shape[dim], device=first.device).view(shape)
    if "labels" in whole:
        labels = whole["labels"]
        after = torch.full_like(labels.narrow(dim, 0, 1), IGNORED)
        whole["shift_labels"] = torch.cat([labels.narrow(dim, 1, labels.shape[dim] - 1), after], dim)
    return {n: shard_sequence(x, mesh, dim=dim, balance=balance, exchange=exchange) for n, x in whole.items()}


def unshard_sequence(
    x: torch.Tensor, mesh: DeviceMesh, *, dim: int = 1, balance: str = "zigzag", exchange: str = "auto"
) -> torch.Tensor:
    """The whole sequence on every rank, of each rank's part; what it costs grows with the number of ranks.

    For looking at results: no gradient flows through it, and a loss is better computed of the parts.

    Raises
    ------
    InvalidArgumentError: an argument is wrong on some rank, or isn't the same on all; every rank raises.
    ProcessGroupError: a process is gone, or didn't answer within its group's timeout.
    """
    axes = axes_of(mesh)
    asked = Agreement(axes)
    with asked.checking():
        check_order(mesh, balance, exchange)
        dim = _checked_dim(x, dim)
        others = [n for i, n in enumerate(x.shape) if i != dim]
        asked.says(dim=dim, shape=others, dtype=str(x.dtype), balance=balance, exchange=exchange)
        asked.says(rows=x.shape[dim], dealt=dealt_so_far(axes, x))
    placement = agreed_placement("x", asked.reach(differ=("rows", "dealt")), axes, balance)
    whole = _together(x.detach().movedim(dim, 0).contiguous(), axes, placement)
    order = [interval for o in range(placement.outer) for interval in placement.segments(o)]
    return _in_order(whole, order).movedim(0, dim).contiguous()


def _together(x: torch.Tensor, axes: Axes, placement: Placement) -> torch.Tensor:
    """The rows of all ranks, one after the other."""
    outer, _ = axes.place
    if axes.inner is not None:
        x = _gathered(x, [b - a for a, b in placement.rows_of_inner(outer)], axes.inner)
    if axes.outer is not None:
        x = _gathered(x, [size(placement.segments(o)) for o in range(placement.outer)], axes.outer)
    return x


def _gathered(x: torch.Tensor, rows: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    most = max(rows)
    mine = x.new_zeros((most, *x.shape[1:]))
    mine[: len(x)] = x
    rooms = [torch.empty_like(mine) for _ in rows]
    with talking(group):
        dist.all_gather(rooms, mine, group=group)
    return torch.cat([room[:n] for room, n in zip(rooms, rows, strict=True)])


def _in_order(rows: torch.Tensor, held: list[Interval]) -> torch.Tensor:
    """Rows that lie in the order of some intervals, in the order of positions."""
    whole, at = torch.empty_like(rows), 0
    for first, end in held:
        whole[first:end] = rows[at : at + end - first]
        at += end - first
    return whole


def _checked_dim(x: torch.Tensor, dim: int) -> int:
    if not -x.ndim <= dim < x.ndim:
        raise InvalidArgumentError(f"dim: is {dim}, expected a dimension of x, which has {x.ndim}")
    return dim % x.ndim
