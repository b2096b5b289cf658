"""Attention over a sequence that the processes of a mesh share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from tvm_flash.call import checks
from tvm_flash.distributed.agreement import Agreement, Axes, axes_of, with_room
from tvm_flash.distributed.arguments import (
    agreed_placement,
    check_ends,
    check_order,
    checked_parameter,
    dealt_so_far,
    document_ends,
    in_short,
    sizes_of,
    values_in_short,
)
from tvm_flash.distributed.heads import HeadExchange
from tvm_flash.distributed.kernels import Kernels
from tvm_flash.distributed.merge import sink_gradients
from tvm_flash.distributed.placement import Placement
from tvm_flash.distributed.plan import EXCHANGES, plan
from tvm_flash.distributed.sight import Sight
from tvm_flash.distributed.steps import Job
from tvm_flash.errors import InvalidArgumentError
from tvm_flash.tracing.torch_ops import readable

#: Bytes of keys, values and their float32 gradients up to which "auto" has a rank hold those of the whole sequence.
GATHERED_BYTES = 8 << 30


@torch.compiler.disable
def context_parallel_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mesh: DeviceMesh,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    cu_seqlens: Sequence[int] | torch.Tensor | None = None,
    return_lse: bool = False,
    layout: str = "bhsd",
    balance: str = "zigzag",
    exchange: str = "auto",
) -> Any:
    """Attention over a sequence of which each rank of a mesh holds a part; differentiable.

    Parameters
    ----------
    q: ``(batch, heads, rows, head_dim)``, the rank's rows in the order of :func:`shard_sequence`; dtypes and strides as
        in :func:`tvm_flash.flash_attention`.
    k, v: ``(batch, kv_heads, rows, head_dim)`` and ``(batch, kv_heads, rows, head_dim_v)``, of the same positions.
    mesh: of one axis, along which keys are exchanged (heads with ``exchange="heads"``); or of two: along the first keys
        are exchanged, along the second heads, whose number it must divide.
    causal, softmax_scale, window_size, softcap, alibi_slopes, sinks, return_lse: as in
        :func:`tvm_flash.flash_attention`, of the whole sequence; slopes and sinks are those of all heads, on every
        rank.  A rank gets the part of their gradients that its rows and heads give: the gradient is the sum over the
        ranks, as of any weight.
    cu_seqlens: where documents begin in the whole sequence, and the last one ends, which don't see each other; the same
        numbers on every rank, in a list or a tensor on the CPU, where they are read.  For a batch of one.
    layout: of q, k, v and the result: ``"bhsd"`` or ``"bshd"``.
    balance: as it was given to :func:`shard_sequence`; another one is refused of tensors made there, and of any if
        this process has dealt out to the mesh's ranks, but never by it.  In a process that has dealt out by both,
        nothing tells them apart of what was computed since, as by a projection.
    exchange: ``"gather"`` gets all keys that a rank's queries see before it computes, with those of some heads on their
        way while others are computed: the result is the same bits as on one device, of the rows that kernels compute
        together.  ``"ring"`` gets those of one rank after the other and holds no more than two, and puts float32
        results together; ``"heads"`` needs a mesh with one axis; rows are put in the order of their
        positions when they come, and back.  ``"auto"`` is ``"gather"`` where a rank has room for
        it (8 GiB of keys, values and gradients), else ``"ring"``.

    Returns
    -------
    The rank's rows of the result, ``(batch, heads, rows, head_dim_v)`` in q's dtype; zeros in a row that sees no key.
    With ``return_lse`` a pair of that and float32 ``(batch, heads, rows)``.

    Raises
    ------
    InvalidArgumentError (ValueError), ArgumentTypeError (TypeError): an argument is wrong on some rank, or isn't the
        same on all; every rank raises, before any tensor is sent.
    NotSupportedError, KernelNotFoundError (NotImplementedError): nothing can compute it.
    ProcessGroupError (RuntimeError): a process is gone, or didn't answer within its group's timeout.

    Notes
    -----
    Sums over ranks are float32 and have one order: the same bits on every run with one mesh.  The methods are Ring
    Attention (Liu et al., 2023), its zigzag order, and DeepSpeed-Ulysses (Jacobs et al., 2023).
    """
    axes = axes_of(mesh, exchange == "heads")
    asked = Agreement(axes)
    with asked.checking():
        check_order(mesh, balance, exchange)
        sizes = sizes_of(layout, q, k, v)
        window = checks.check_window(window_size)
        causal = checks.check_flag("causal", causal)
        ends = document_ends(cu_seqlens, sizes.batch)
        slopes = checked_parameter("alibi_slopes", alibi_slopes, q, sizes)
        sinks = checked_parameter("sinks", sinks, q, sizes)
        if sizes.heads % axes.sizes[1]:
            raise InvalidArgumentError(
                f"q: has {sizes.heads} heads, expected a multiple of the {axes.sizes[1]} ranks of the mesh's axis that "
                f"exchanges heads"
            )
        learnt = {"q": q, "k": k, "v": v, "alibi_slopes": slopes, "sinks": sinks} if torch.is_grad_enabled() else {}
        scale = checks.check_scale(softmax_scale, sizes.head_dim)
        softcap, return_lse = checks.check_softcap(softcap), checks.check_flag("return_lse", return_lse)
        asked.says(
            batch=sizes.batch, heads=sizes.heads, kv_heads=sizes.kv_heads, head_dim=sizes.head_dim,
            head_dim_v=sizes.head_dim_v, dtype=str(q.dtype), causal=causal, window_size=window, softcap=softcap,
            softmax_scale=scale, alibi_slopes=values_in_short(slopes), sinks=values_in_short(sinks),
            layout=layout, balance=balance,
            exchange=exchange, cu_seqlens=in_short(ends),
            requires_grad=[n for n, x in learnt.items() if x is not None and x.requires_grad],
            rows=sizes.seqlen_q, dealt=dealt_so_far(axes, q, k, v), **_of_peers(axes, q),
        )  # fmt: skip
    said = asked.reach(differ=("rows", "dealt", "reads", "can_grow"))
    dealt = agreed_placement("q", said, axes, balance)
    placement = Placement(dealt.length, *axes.sizes, balance)
    if ends is not None:
        check_ends(ends, placement.length)
    left, right = (None if x == -1 else x for x in window)
    sight = Sight(left, 0 if causal else right, (placement.length,) if ends is None else ends)
    if exchange not in EXCHANGES:
        kept = placement.length * sizes.batch * sizes.kv_heads * (sizes.head_dim + sizes.head_dim_v)
        fits = kept // axes.sizes[1] * (q.element_size() + 4) <= GATHERED_BYTES
        exchange = "gather" if fits or axes.outer is None else "ring"
    call = _Call(axes, dealt, placement, sight, layout, exchange, scale, softcap)
    if q.shape[0] and sizes.heads:
        if axes.peers is not None and all(x["reads"] for x in said):
            trains = any(x is not None and x.requires_grad for x in learnt.values())
            size = call.shared_bytes(sizes, q.element_size(), trains)
            call = replace(call, reads=with_room(axes, size, can_grow=all(x["can_grow"] for x in said)))
        out, lse = _Attention.apply(call, q, k, v, slopes, sinks)
    else:
        out, lse = _nothing(layout, q, k, v, *(x for x in (slopes, sinks) if x is not None))
    return (out, lse) if return_lse else out


def _of_peers(axes: Axes, q: torch.Tensor) -> dict[str, bool]:
    """What others must know of this rank to tell whether a call's rows are read in memory."""
    memory = axes.peers
    if memory is None:
        return {}
    return {"reads": q.device == memory.device, "can_grow": not memory.is_fixed}


def _nothing(layout: str, q: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What comes of no batch entries or no heads, of which nobody sends anything; gradients are zeros, each element
    of its own, as sums over ranks need them.

    ``others`` are k, v and the parameters.
    """
    out = q[..., :1].expand(*q.shape[:-1], others[1].shape[-1]) + sum((0 * x).sum() for x in others).to(q.dtype)
    lse = q[..., 0].float()
    return out, lse if layout == "bhsd" else lse.transpose(1, 2)


@dataclass(frozen=True)
class _Call:
    """A call after its checks.

    ``dealt`` is how the caller's rows lie on the mesh, ``placement`` how the rows lie that outer ranks compute;
    ``reads``: outer ranks read each other's memory.
    """

    axes: Axes
    dealt: Placement
    placement: Placement
    sight: Sight
    layout: str
    exchange: str
    softmax_scale: float
    softcap: float
    reads: bool = False

    def own(self, x: torch.Tensor | None, heads: int) -> torch.Tensor | None:
        """The part of a parameter with a value for each head that is of this rank's ``heads``."""
        first = self.axes.place[1] * heads
        return None if x is None else x[..., first : first + heads]

    def of_all(self, own: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """A gradient ``(batch, heads)`` of this rank's heads in the place of theirs among all, and as ``like``."""
        inner, ranks = self.axes.place[1], self.axes.sizes[1]
        among = own.new_zeros((own.shape[0], ranks, own.shape[1]))
        among[:, inner] = own
        return among.flatten(1).sum_to_size(like.shape)

    def job(self, slopes: torch.Tensor | None, sinks: torch.Tensor | None, heads: int, learns: bool) -> Job:
        """What this rank does, with ``heads`` query heads."""
        slopes, sinks = self.own(slopes, heads), self.own(sinks, heads)
        kernels = Kernels(self.softmax_scale, self.softcap, self.sight.left, self.sight.right, slopes, learns)
        what = plan(self.placement, self.sight, self.exchange, self.axes.place[0], slopes is not None)
        return Job(what, self.axes.outer, self.axes.peers if self.reads else None, kernels, sinks)

    def shared_bytes(self, sizes: checks.Sizes, itemsize: int, trains: bool) -> int:
        """Bytes of a rank that others read, with those of its gradients if it trains; the same on all ranks."""
        kv_heads = self.repeats(sizes.kv_heads) * sizes.kv_heads // self.axes.sizes[1]
        of = (sizes.batch, kv_heads, (sizes.head_dim, sizes.head_dim_v), itemsize)
        job = replace(self, reads=True).job(None, None, 0, learns=False)
        return max(job.layout(*of, backward=backward).size for backward in {False, trains})

    def to_heads(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Some heads of all rows of the outer rank, ``(batch, heads, rows, dim)``."""
        return list(tensors) if self.axes.inner is None else self._inner.to_heads(tensors)

    def to_rows(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """The other way round."""
        return list(tensors) if self.axes.inner is None else self._inner.to_rows(tensors)

    @property
    def _inner(self) -> HeadExchange:
        outer, inner = self.axes.place
        ranks = self.axes.sizes[1]
        held = self.dealt.order()[outer * ranks : (outer + 1) * ranks]
        return HeadExchange(self.axes.inner, inner, tuple(self.placement.rows_of(outer, x) for x in held))

    def repeats(self, kv_heads: int) -> int:
        """How often a key head is there, so that each inner rank has those that its query heads read."""
        return math.lcm(kv_heads, self.axes.sizes[1]) // kv_heads

    def as_bhsd(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor of the caller's as ``(batch, heads, rows, dim)``, or one of those as the caller's."""
        return x.transpose(1, 2) if self.layout == "bshd" else x


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, q, k, v, slopes, sinks):
        ctx.call, ctx.kv_heads = call, k.shape[1 if call.layout == "bhsd" else 2]
        q, k, v = (call.as_bhsd(x) for x in (q, k, v))
        repeats = call.repeats(k.shape[1])
        k, v = (x if repeats == 1 else x.repeat_interleave(repeats, dim=1) for x in (k, v))
        q, k, v = call.to_heads(q, k, v)
        out, lse = call.job(slopes, sinks, q.shape[1], learns=False).forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse, slopes, sinks)
        ctx.set_materialize_grads(False)
        mine, lse = call.to_rows(out, lse[..., None])
        return call.as_bhsd(mine), lse[..., 0].contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dlse):
        call, kv_heads = ctx.call, ctx.kv_heads
        q, k, v, out, lse, slopes, sinks = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * 6
        tensors = []
        if dout is not None:
            tensors.append(call.as_bhsd(dout))
        if dlse is not None:
            tensors.append(dlse[..., None])
        tensors = call.to_heads(*tensors)
        dlse = None if dlse is None else tensors.pop()[..., 0]
        dout = torch.zeros_like(out) if dout is None else tensors.pop()
        repeats = call.repeats(kv_heads)
        job = call.job(slopes, sinks, q.shape[1], learns=ctx.needs_input_grad[4])
        dtype = q.dtype if repeats == 1 else torch.float32
        dout, *tensors, dlse = readable(dout, q, k, v, out, lse, dlse)
        *found, d_slopes = job.backward(dout, *tensors, dlse, dtype)
        dq, dk, dv = call.to_rows(*found)
        if repeats > 1:
            dk, dv = (x.unflatten(1, (kv_heads, repeats)).sum(2).to(q.dtype) for x in (dk, dv))
        d_slopes = None if d_slopes is None else call.of_all(d_slopes, slopes)
        d_sinks = None
        if ctx.needs_input_grad[5]:
            d_sinks = call.of_all(sink_gradients(dout, out, lse, dlse, job.sinks), sinks)
        return None, *(call.as_bhsd(x) for x in (dq, dk, dv)), d_slopes, d_sinks
