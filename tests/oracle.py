"""Operators compiled as they stand, without a schedule: the oracle of each, on float32 arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import tvm
from tvm import tirx

from schedules.definition.attention import Attention
from schedules.definition.derive import OPERATORS, derive
from schedules.definition.parameters import gradient_name
from schedules.definition.pattern import match

#: What an oracle is compiled for: the way that takes LLVM the least time, since an oracle computes a few small tensors.
TARGET = tvm.target.Target({"kind": "llvm", "jit": "orcjit", "opt-level": 0})

#: What each operator writes.
OUTPUTS = {
    "forward": ("o", "lse"),
    "partial": ("o", "lse"),
    "combine": ("o", "lse"),
    "delta": ("delta",),
    "backward": ("dq", "dk", "dv"),
    "ragged": ("o", "lse"),
    "ragged_backward": ("dq", "dk", "dv"),
    "paged": ("o", "lse"),
    "paged_scaled": ("o", "lse"),
    "append": ("o", "k", "v"),
    "append_scaled": ("o", "k", "v"),
}


def compiled(func) -> Callable:
    """A function of the operator's inputs by role, parameters by name; it returns its outputs, a namespace."""
    pattern = match(func)
    module = tvm.compile(func, target=TARGET)
    asked = [p for p in pattern.params if p.gradient] if OPERATORS[pattern.op].has_gradients else []
    roles = [*pattern.arguments, *(p.name for p in pattern.params), *map(gradient_name, asked)]

    def run(**inputs) -> SimpleNamespace:
        sizes = {}
        for role, x in inputs.items():
            if role in pattern.arguments and isinstance(x, np.ndarray):
                sizes.update(zip(map(str, pattern.arguments[role].ty.shape), x.shape, strict=True))
        outputs = {}
        for role in OUTPUTS[pattern.op]:
            kind = pattern.arguments[role].ty
            shape = [int(n) if isinstance(n, tirx.IntImm) else sizes[str(n)] for n in kind.shape]
            before = inputs[role] if role in inputs else np.full(shape, np.nan, str(kind.dtype))
            outputs[role] = tvm.runtime.tensor(before)
        for p in asked:
            shape = np.shape(inputs[p.name]) or (1,)
            outputs[gradient_name(p)] = tvm.runtime.tensor(np.full(shape, np.nan, np.float32))
        values = {r: tvm.runtime.tensor(x) if isinstance(x, np.ndarray) else x for r, x in inputs.items()}
        module[func.attrs["global_symbol"]](*(outputs[r] if r in outputs else values[r] for r in roles))
        return SimpleNamespace(**{role: x.numpy() for role, x in outputs.items()})

    return run


@functools.lru_cache(maxsize=64)
def operator(attention, op: str, head_dim: int, head_dim_v: int, cache: str = "") -> Callable:
    """The oracle of an operator of a definition."""
    return compiled(derive(match(attention(head_dim, "float32", head_dim_v=head_dim_v)), op, cache))


def gradients(attention, dout, q, k, v, softmax_scale, params, dlse=None) -> SimpleNamespace:
    """The whole way back: forward, delta, backward, each by its oracle."""
    sizes = q.shape[3], v.shape[3]
    ahead = operator(attention, "forward", *sizes)(q=q, k=k, v=v, softmax_scale=softmax_scale, **params)
    dlse = np.zeros(q.shape[:3], np.float32) if dlse is None else dlse
    delta = operator(Attention(), "delta", *sizes)(o=ahead.o, do=dout, dlse=dlse).delta
    inputs = {"q": q, "k": k, "v": v, "do": dout, "lse": ahead.lse, "delta": delta, "softmax_scale": softmax_scale}
    return operator(attention, "backward", *sizes)(**inputs, **params)
