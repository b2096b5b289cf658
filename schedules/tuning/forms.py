"""How the sequences of a problem lie in memory, one row a form: sizes, tensors that say where, where the last is.

Shapes of tensors are those of :data:`tvm_flash.operators.TENSORS`.  Needs torch; no TVM.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from tvm_flash import operators
from tvm_flash.measure.workloads import Workload
from tvm_flash.packs.manifest import DENSE, PAGED, RAGGED


@dataclass(frozen=True)
class Form:
    """A form.

    Attributes
    ----------
    starts: tensors that say where sequences lie, by role, on a device.
    last: the part of the last sequence of a tensor of a role, ``(heads, length, dim)`` or ``(heads, length)``; a tensor
        of a batch is ``(batch, heads, seq, dim)``.
    """

    starts: Callable[[Workload, str], dict[str, torch.Tensor]]
    last: Callable[[Workload, str, torch.Tensor], torch.Tensor]


def _dense_last(w: Workload, role: str, x: torch.Tensor) -> torch.Tensor:
    return x.view(w.batch, w.heads, w.seqlen_q)[-1] if x.ndim == 1 else x[-1]


def _ragged_starts(w: Workload, device: str) -> dict[str, torch.Tensor]:
    queries, keys = (torch.tensor([0, *itertools.accumulate(n)]) for n in zip(*w.lengths, strict=True))
    return {"cu_seqlens_q": queries.int().to(device), "cu_seqlens_k": keys.int().to(device)}


def _ragged_last(w: Workload, role: str, x: torch.Tensor) -> torch.Tensor:
    queries, keys = w.lengths[-1]
    if x.ndim == 1:
        return x.view(w.heads, -1)[:, -queries:]
    return x[-(keys if role in KEY_ROLES else queries) :].transpose(0, 1)


def _pages(w: Workload) -> torch.Tensor:
    """Where the keys are: in no order, as in a cache that has been in use for a while."""
    order = torch.randperm(w.sizes["pages"], generator=torch.Generator().manual_seed(1))
    return order.int().view(w.batch, -1)


def _paged_starts(w: Workload, device: str) -> dict[str, torch.Tensor]:
    queries, keys = zip(*w.lengths, strict=True)
    starts = torch.tensor([0, *itertools.accumulate(queries)])
    found = {"cu_seqlens_q": starts, "seqlens_k": torch.tensor(keys), "page_table": _pages(w)}
    return {role: x.int().to(device) for role, x in found.items()}


def _paged_last(w: Workload, role: str, x: torch.Tensor) -> torch.Tensor:
    if role not in KEY_ROLES:
        return _ragged_last(w, role, x)
    own = x[_pages(w)[-1].long().to(x.device)]  # (pages, page_size, kv_heads, dim)
    return own.flatten(0, 1)[: w.lengths[-1][1]].transpose(0, 1)


#: Roles whose positions are those of keys.
KEY_ROLES = ("k", "v", "dk", "dv")

FORMS: Mapping[str, Form] = {
    DENSE: Form(lambda w, device: {}, _dense_last),
    RAGGED: Form(_ragged_starts, _ragged_last),
    PAGED: Form(_paged_starts, _paged_last),
}


def shape_of(role: str, w: Workload) -> tuple[int, ...]:
    """Shape of a tensor of a role: of a batch in the order (batch, heads, seq, dim), flat ones as a vector."""
    operator = next(o for o in operators.OPERATORS.values() if (o.form, o.differentiates) == (w.form, w.backward))
    names = (*operator.tensors(()), *operator.on_request)
    tensor = operators.tensor(next(name for name in names if operators.role_of(name) == role))
    of = w.sizes
    shape = tuple(of[axis] for axis in (tensor.axes if w.form == DENSE else tensor.ragged))
    return (math.prod(shape),) if tensor.flat else shape
