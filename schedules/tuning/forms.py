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
from tvm_flash.packs import sizes
from tvm_flash.packs.manifest import DENSE, RAGGED


@dataclass(frozen=True)
class Form:
    """A form.

    Attributes
    ----------
    sizes: of a problem, by name, as kernels of the form count them.
    starts: tensors that say where sequences lie, by role, on a device.
    last: the part of the last sequence of a tensor of a role, ``(heads, length, dim)`` or ``(heads, length)``; of
        four dimensions a tensor is ``(batch, heads, seq, dim)``.
    """

    sizes: Callable[[Workload], dict[str, int]]
    starts: Callable[[Workload, str], dict[str, torch.Tensor]]
    last: Callable[[Workload, str, torch.Tensor], torch.Tensor]


def _dense_sizes(w: Workload) -> dict[str, int]:
    return sizes.of(w.batch, w.heads, w.seqlen_q, w.kv_heads, w.seqlen_kv, w.head_dim, w.head_dim_v)


def _dense_last(w: Workload, role: str, x: torch.Tensor) -> torch.Tensor:
    return x.view(w.batch, w.heads, w.seqlen_q)[-1] if x.ndim == 1 else x[-1]


def _ragged_sizes(w: Workload) -> dict[str, int]:
    queries, keys = w.totals
    return sizes.of_sequences(w.batch, w.heads, queries, w.kv_heads, keys, w.head_dim, w.head_dim_v)


def _ragged_starts(w: Workload, device: str) -> dict[str, torch.Tensor]:
    queries, keys = (torch.tensor([0, *itertools.accumulate(n)]) for n in zip(*w.lengths, strict=True))
    return {"cu_seqlens_q": queries.int().to(device), "cu_seqlens_k": keys.int().to(device)}


def _ragged_last(w: Workload, role: str, x: torch.Tensor) -> torch.Tensor:
    queries, keys = w.lengths[-1]
    if x.ndim == 1:
        return x.view(w.heads, -1)[:, -queries:]
    return x[-(keys if role in KEY_ROLES else queries) :].transpose(0, 1)


#: Roles whose positions are those of keys.
KEY_ROLES = ("k", "v", "dk", "dv")

FORMS: Mapping[str, Form] = {
    DENSE: Form(_dense_sizes, lambda w, device: {}, _dense_last),
    RAGGED: Form(_ragged_sizes, _ragged_starts, _ragged_last),
}


def shape_of(role: str, w: Workload) -> tuple[int, ...]:
    """Shape of a tensor of a role: four dimensions in the order (batch, heads, seq, dim), flat ones as one."""
    operator = next(o for o in operators.OPERATORS.values() if (o.form, o.differentiates) == (w.form, w.backward))
    names = (*operator.tensors(()), *operator.on_request)
    tensor = operators.tensor(next(name for name in names if operators.role_of(name) == role))
    of = FORMS[w.form].sizes(w)
    shape = tuple(of[axis] for axis in (tensor.axes if w.form == DENSE else tensor.ragged))
    return (math.prod(shape),) if tensor.flat else shape
