"""The kernels of one call: tensors are ``(batch, heads, seq, head_dim)`` with any strides but that of the last
dimension, and the last query stands on the last key."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field

import torch

from tvm_flash.call.backward import why_none
from tvm_flash.call.dispatch import entrance
from tvm_flash.call.signature import signature
from tvm_flash.distributed.merge import merge
from tvm_flash.distributed.plan import Call
from tvm_flash.frameworks.torch import name_of
from tvm_flash.machine.device import Device
from tvm_flash.operators import BACKWARD, FORWARD, MERGED, PARTIAL, RAGGED, RAGGED_BACKWARD, RAGGED_LAYOUT
from tvm_flash.packs.manifest import BUILTIN_DEFINITION
from tvm_flash.padded import PARAMETERS


@dataclass(frozen=True)
class Kernels:
    """What is computed beside what plans say.

    Attributes
    ----------
    softmax_scale, softcap: as in :func:`tvm_flash.flash_attention`.
    left, right: the window over positions, None for unbounded.
    slopes: float32 ``(heads,)`` or ``(batch, heads)``, or none.
    learns: whether the gradient of the slopes is wanted.
    """

    softmax_scale: float
    softcap: float
    left: int | None
    right: int | None
    slopes: torch.Tensor | None = field(default=None, compare=False)
    learns: bool = False

    def of_heads(self, first: int, end: int) -> Kernels:
        """The same for some of the query heads."""
        if self.slopes is None:
            return self
        slopes = self.slopes[..., first:end]
        return Kernels(self.softmax_scale, self.softcap, self.left, self.right, slopes, self.learns)

    # ---- forward

    def forward(self, call: Call, q, k, v, out: torch.Tensor) -> torch.Tensor:
        """Write the result, in q's dtype; the log-sum-exp, float32 ``(batch, heads, rows)``."""
        if call.starts:
            attend = _entrance(RAGGED)
            tensors = (*(_ragged(x) for x in (q, k, v)), *_starts(call, q), self._slopes_of_heads, _ragged(out))
            return attend(*tensors, *self._options(True, call))[1][None]
        return self._dense(FORWARD, call, q, k, v, out)[1]

    def merge(self, call: Call, q, k, v, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Put the result over a call's keys, and its log-sum-exp, into what there is of others, float32.

        Where no kernel does that, ``out`` must have numbers also in rows whose log-sum-exp is −inf.
        """
        if call.starts or not self.merges(q, v):
            merge(out, lse, *self.partial(call, q, k, v))
            return
        dense = lse.contiguous()
        self._dense(MERGED, call, q, k, v, out, dense)
        if dense is not lse:
            lse.copy_(dense)

    def merges(self, q: torch.Tensor, v: torch.Tensor) -> bool:
        """Whether kernels put dense results into what there is of other keys themselves."""
        return has_merged(self._device(q), name_of(q.dtype), q.shape[-1], v.shape[-1])

    def partial(self, call: Call, q, k, v) -> tuple[torch.Tensor, torch.Tensor]:
        """The result in float32, and its log-sum-exp.

        Where there is no kernel that leaves float32, the result is rounded to q's dtype first.
        """
        if not call.starts and has_partial(self._device(q), name_of(q.dtype), q.shape[-1], v.shape[-1]):
            return self._dense(PARTIAL, call, q, k, v, None)
        out = q.new_empty((*q.shape[:3], v.shape[3]))
        lse = self.forward(call, q, k, v, out)
        return out.float(), lse

    def _dense(self, op, call, q, k, v, *results):
        tensors = (q, k, v, *self._placed(call, q, k), *results)
        return _entrance(op, self._is_placed)(*tensors, *self._options(True, call))

    # ---- backward

    def backward(self, call: Call, dout, q, k, v, out, lse, dlse, dq, dk, dv, d_slopes, *, once: bool) -> None:
        """Add the gradients of a call to float32 ``dq``, ``dk``, ``dv`` and ``d_slopes``.

        With ``once``, which needs kernels that don't add, ``dq`` is of q's dtype and is written.
        """
        learnt = ("alibi_slopes",) if self.learns else ()
        sums = (dk, dv, *([d_slopes] if learnt else []))
        lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()
        if call.starts:
            if not self._has_ragged_backward(q, v, learnt):
                self._document_by_document(call, dout, q, k, v, out, lse, dlse, dq, dk, dv, d_slopes, once)
                return
            rows = (_ragged(x) for x in (dout, q, k, v, out))
            tensors = (*rows, lse[0], None if dlse is None else dlse[0], *_starts(call, q), self._slopes_of_heads)
            places = (_ragged(dq) if once else None, *(None for _ in sums))
            found = _entrance(RAGGED_BACKWARD, False, learnt)(*tensors, *places, *self._options(False, call))
            found = [*(x.transpose(0, 1)[None] for x in found[:3]), *(x.sum(0, keepdim=True) for x in found[3:])]
        else:
            attend = _entrance(BACKWARD, self._is_placed, learnt)
            tensors = (dout, q, k, v, out, lse, dlse, *self._placed(call, q, k))
            if self.adds(q, v):
                attend(*tensors, dq, *sums, *self._options(True, call))
                return
            places = (dq if once else None, *(None for _ in sums))
            found = attend(*tensors, *places, *self._options(False, call))
        for to, x in zip(sums if once else (dq, *sums), found[1:] if once else found, strict=True):
            to.add_(x)

    def adds(self, q: torch.Tensor, v: torch.Tensor) -> bool:
        """Whether kernels add to gradients themselves."""
        learnt = ("alibi_slopes",) if self.learns else ()
        return has_accumulate(self._device(q), name_of(q.dtype), q.shape[-1], v.shape[-1], learnt)

    def _document_by_document(self, call, dout, q, k, v, out, lse, dlse, dq, dk, dv, d_slopes, once):
        for first, end in itertools.pairwise(call.starts):
            rows = (slice(None), slice(None), slice(first, end))
            inputs = (dout[rows], q[rows], k[rows], v[rows], out[rows], lse[rows], None if dlse is None else dlse[rows])
            places = (dq[rows], dk[rows], dv[rows], d_slopes)
            self.backward(call._replace(starts=()), *inputs, *places, once=once)

    def _has_ragged_backward(self, q, v, learnt) -> bool:
        kind = (BUILTIN_DEFINITION, "window", "optional")
        of = (self._device(q), name_of(q.dtype), q.shape[-1], v.shape[-1])
        return why_none(RAGGED_BACKWARD, *kind, *of, gradients=learnt) is None

    # ---- what calls have in common

    @property
    def _is_placed(self) -> bool:
        """Whether kernels must know the positions, which distances and not only their order depend on."""
        return self.slopes is not None

    @property
    def _slopes_of_heads(self) -> torch.Tensor | None:
        """The slopes of the only batch entry there is where documents are computed together."""
        return self.slopes[0] if self.slopes is not None and self.slopes.ndim == 2 else self.slopes

    def _placed(self, call, q, k):
        """The parameters of mask and score that are tensors."""
        if not self._is_placed:
            return (None,)
        numbers = {"kv_start": 0, "kv_end": k.shape[2], "query_start": call.offset}
        given = {n: torch.full((q.shape[0], 1), x, dtype=torch.int32, device=q.device) for n, x in numbers.items()}
        given["alibi_slopes"] = self.slopes
        return tuple(map(given.get, PARAMETERS))

    def _options(self, flag, call):
        left, right = (self.left, self.right) if self._is_placed else (call.left, call.right)
        window = (-1 if left is None else left, -1 if right is None else right)
        return "auto", flag, self.softmax_scale, False, window, self.softcap

    @staticmethod
    def _device(q: torch.Tensor) -> Device:
        return Device(q.device.type, q.device.index or 0)


def has_partial(device: Device, dtype: str, head_dim: int, head_dim_v: int) -> bool:
    """Whether there is a kernel that leaves its result in float32."""
    return _is_there(PARTIAL, device, dtype, head_dim, head_dim_v)


def has_merged(device: Device, dtype: str, head_dim: int, head_dim_v: int) -> bool:
    """Whether there is a kernel that puts its result into what there is of other keys."""
    return _is_there(MERGED, device, dtype, head_dim, head_dim_v, accumulate=True)


def has_accumulate(device: Device, dtype: str, head_dim: int, head_dim_v: int, learnt: tuple[str, ...] = ()) -> bool:
    """Whether there is a kernel that adds gradients to float32 ones."""
    return _is_there(BACKWARD, device, dtype, head_dim, head_dim_v, gradients=learnt, accumulate=True)


def _is_there(op, device, dtype, head_dim, head_dim_v, **more) -> bool:
    kind = (BUILTIN_DEFINITION, "positioned", "optional")  # the one that serves all others
    return why_none(op, *kind, device, dtype, head_dim, head_dim_v, **more) is None


@functools.cache
def _entrance(op: str, placed: bool = False, gradients: tuple[str, ...] = ()):
    layout = RAGGED_LAYOUT if op in (RAGGED, RAGGED_BACKWARD) else "bhsd"
    parameters = PARAMETERS if placed else ("alibi_slopes",)
    return entrance(signature(layout, parameters=parameters, op=op, gradients=gradients, layout_known=True))


def _ragged(x: torch.Tensor) -> torch.Tensor:
    """``(seq, heads, head_dim)`` of a batch of one."""
    return x[0].transpose(0, 1)


def _starts(call: Call, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    starts = _starts_on(call.starts, q.device)
    return starts, starts


@functools.lru_cache(maxsize=64)
def _starts_on(starts: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(starts, dtype=torch.int32, device=device)
