"""Definitions that read tensors: problems, the answers in float64, and calls of kernels that stand alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from schedules.definition.attention import Attention
from tests.torch_cases import tensor
from tvm_flash import numerics, reference
from tvm_flash.packs.manifest import Param

SCALE = 0.2


@dataclass(frozen=True)
class Problem:
    """One problem of a definition, in one element type; ``params`` have sizes of 1 where they are the same for all."""

    attention: Attention
    dtype: str
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    dout: np.ndarray
    params: Mapping[str, object]

    @property
    def what(self) -> dict:
        """The arguments that say which attention it is."""
        axes = {p.name: p.axes for p in self.attention.params}
        twins = {"mask": self.attention.mask.twin, "score": self.attention.score.twin}
        return {"softmax_scale": SCALE, "params": self.params, "axes": axes, **twins}

    def given(self, name: str, axes: str, device: str) -> object:
        """A parameter as a kernel takes it: whole, by strides of 0."""
        x = self.params[name]
        if not isinstance(x, np.ndarray):
            return x
        whole = dict(zip("bhij", (*self.q.shape[:3], self.k.shape[2]), strict=True))
        x = torch.from_numpy(x).to(device)
        return x.expand([whole[a] for a in axes]) if axes else x


def problem(attention: Attention, dtype: str, batch, heads, kv_heads, seqlen_q, seqlen_kv, head_dim, values) -> Problem:
    """Standard normal tensors; ``values(rng)`` has the parameters, more than are needed among them."""
    rng = np.random.default_rng(seqlen_q + seqlen_kv)
    shapes = ((heads, seqlen_q), (kv_heads, seqlen_kv), (kv_heads, seqlen_kv), (heads, seqlen_q))
    tensors = (rng.standard_normal((batch, *n, head_dim), np.float32) for n in shapes)
    known = values(rng)
    params = {p.name: known[p.name] for p in attention.params}
    return Problem(attention, dtype, *(numerics.round_to(x, dtype) for x in tensors), params)


def forward(case: Problem, compute: Callable, layout: str, device: str = "cpu") -> tuple[np.ndarray, np.ndarray]:
    """Output and lse, full of NaN before; ``compute`` takes all tensors and numbers by role."""
    o = np.full((*case.q.shape[:3], case.v.shape[3]), np.nan, np.float32)
    arrays = {"q": case.q, "k": case.k, "v": case.v, "o": o}
    values = {role: tensor(x, case.dtype, layout, "contiguous", device) for role, x in arrays.items()}
    lse = torch.full((case.q[..., 0].size,), torch.nan, device=device)
    params = {p.name: case.given(p.name, p.axes, device) for p in case.attention.params}
    compute({**values, "lse": lse, "softmax_scale": SCALE, **params})
    o = values["o"] if layout == "bhsd" else values["o"].transpose(1, 2)
    return o.double().cpu().numpy(), lse.reshape(case.q.shape[:3]).double().cpu().numpy()


def check_forward(case: Problem, out: np.ndarray, lse: np.ndarray) -> float:
    """Assert that both are right; the largest error of the output as a share of what is allowed."""
    want, want_lse = reference.attention(case.q, case.k, case.v, **case.what)
    usual = numerics.usual_attention(case.q, case.k, case.v, dtype=case.dtype, **case.what)
    allowed = numerics.bound(usual, want, case.dtype)
    error = numerics.largest_error(out, want)
    assert error <= allowed, f"output differs by {error:.3g}, allowed {allowed:.3g}"
    blind = np.isneginf(want_lse)
    assert np.array_equal(np.isneginf(lse), blind) and not out[blind].any()
    lse_error = numerics.largest_error(lse, want_lse)
    assert lse_error <= numerics.lse_bound(want_lse), f"lse differs by {lse_error:.3g}"
    return error / allowed


def backward(case: Problem, compute: Callable, layout: str, device: str = "cpu") -> dict[str, np.ndarray]:
    """Gradients, full of NaN before: dq, dk, dv, and of the parameters that ask for one, in their own shapes."""
    out, lse = reference.attention(case.q, case.k, case.v, **case.what)
    arrays = {"q": case.q, "k": case.k, "v": case.v, "o": out.astype(np.float32), "do": case.dout}
    arrays |= {f"d{n}": np.full(getattr(case, n).shape, np.nan, np.float32) for n in "qkv"}
    values = {role: tensor(x, case.dtype, layout, "contiguous", device) for role, x in arrays.items()}
    values["lse"] = torch.from_numpy(lse.astype(np.float32).reshape(-1)).to(device)
    values["dlse"] = torch.full((1,), torch.nan, device=device)
    whole = dict(zip("bhij", (*case.q.shape[:3], case.k.shape[2]), strict=True))
    for p in case.attention.params:
        values[p.name] = case.given(p.name, p.axes, device)
        if p.gradient:
            shape = [whole[a] for a in p.of_gradient] or [1]
            values[f"d_{p.name}"] = torch.full(shape, torch.nan, device=device)
    compute({**values, "softmax_scale": SCALE})
    found = {}
    for name in ("dq", "dk", "dv"):
        x = values[name] if layout == "bhsd" else values[name].transpose(1, 2)
        found[name] = x.double().cpu().numpy()
    for p in case.attention.params:
        if p.gradient:
            found[f"d_{p.name}"] = _summed(values[f"d_{p.name}"].double().cpu().numpy(), p, case.params[p.name])
    return found


def _summed(gradient: np.ndarray, param: Param, value: object) -> np.ndarray:
    """What a kernel leaves for each axis of ``Param.of_gradient``, as the run time sums it for the parameter."""
    left_out = tuple(n for n, a in enumerate(param.of_gradient) if a not in param.axes)
    gradient = gradient.sum(axis=left_out)
    same = tuple(n for n, size in enumerate(np.shape(value)) if size == 1)
    return gradient.sum(axis=same, keepdims=True)


def check_backward(case: Problem, got: Mapping[str, np.ndarray]) -> float:
    """Assert that gradients are right, of the output as it was given, in 16 bits; the largest error as a share of what
    is allowed."""
    asked = [p.name for p in case.attention.params if p.gradient]
    tensors = (case.dout, case.q, case.k, case.v)
    out, _ = reference.attention(case.q, case.k, case.v, **case.what)
    lost = (case.dout * (out - numerics.round_to(out.astype(np.float32), case.dtype))).sum(axis=-1)
    exact = reference.attention_backward(*tensors, dlse=lost, gradients=asked, **case.what)
    usual = numerics.usual_gradients(*tensors, dtype=case.dtype, dlse=lost, gradients=asked, **case.what)
    worst = 0.0
    for name in ("dq", "dk", "dv", *(f"d_{n}" for n in asked)):
        want, other = (
            x.params[name.removeprefix("d_")] if name.startswith("d_") else getattr(x, name) for x in (exact, usual)
        )
        dtype = "float32" if name.startswith("d_") else case.dtype
        allowed = numerics.gradient_bound(other, want, dtype)
        error = numerics.largest_error(got[name], want)
        assert error <= allowed, f"{name} differs by {error:.3g}, allowed {allowed:.3g}"
        worst = max(worst, error / allowed if allowed else 0.0)
    return worst
