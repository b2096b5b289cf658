"""Attention written out, and how near to it in float64 a drop-in must be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from tvm_flash import numerics

#: What of a sum in float32 its terms may be off by, in roundings of the sum of their magnitudes.
SUM_ROUNDINGS = 16


class Rounded(torch.autograd.Function):
    """Softmax and its product with v in float32 with what is rounded to 16 bits, or to nothing less: ``(s, v, dtype)``.

    Weights are rounded relative to a power of two, and a row's sum is of weights that weren't.  Gradients follow from
    the result as it was rounded; those of scores are rounded before they are multiplied.
    """

    @staticmethod
    def forward(ctx, s, v, dtype):
        s = s * math.log2(math.e)
        reference = s.amax(-1, keepdim=True).floor() if s.shape[-1] else s.new_zeros(*s.shape[:-1], 1)
        p = torch.exp2(s - reference)
        row_sum = p.sum(-1, keepdim=True) if s.shape[-1] else torch.ones_like(reference)
        out = (p.to(dtype).float() @ v / row_sum).to(dtype).float()
        ctx.dtype = dtype
        ctx.save_for_backward(p / row_sum, v, out)
        return out

    @staticmethod
    def backward(ctx, dout):
        p, v, out = ctx.saved_tensors
        ds = p * (dout @ v.transpose(-1, -2) - (dout * out).sum(-1, keepdim=True))
        return ds.to(ctx.dtype).float(), p.to(ctx.dtype).float().transpose(-1, -2) @ dout, None


def attention(q, k, v, scale: float, visible, bias=None, softcap: float = 0.0, rounded: torch.dtype | None = None):
    """Result and log-sum-exp of ``(…, heads, rows, head_dim)``, in the dtype of q; k and v may have fewer heads.

    A row that sees nothing has 0 and −inf.  ``rounded``: tensors are float32, and this is what is rounded to this dtype
    on the way.
    """
    k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) if q.ndim > 2 else x for x in (k, v))
    s = q @ k.transpose(-1, -2) * scale
    s = softcap * torch.tanh(s / softcap) if softcap else s
    s = s if bias is None else s + bias.to(s.dtype)
    s = s.masked_fill(~visible, -torch.inf)
    seen = visible.expand(s.shape).any(-1)
    s = torch.where(seen[..., None], s, 0.0)  # so that no gradient of such a row is NaN
    lse = torch.logsumexp(s, -1)
    out = torch.softmax(s, -1) @ v if rounded is None else Rounded.apply(s, v, rounded)
    return out * seen[..., None], torch.where(seen, lse, -torch.inf)


def compare(found, q, k, v, scale, visible, bias=None, softcap=0.0, lse=None) -> float:
    """Assert that a result is right; its error as a share of what is allowed."""
    of = (scale, visible, bias, softcap)
    exact, exact_lse = attention(*(x.double() for x in (q, k, v)), *of)
    usual = [attention(*(x.float() for x in (q, k, v)), *of, rounded=q.dtype)[0].to(q.dtype)]
    if softcap or bias is not None:  # what is made of scores may be rounded as torch rounds it
        usual.append(attention(q, k, v, *of)[0])
    assert found.shape == exact.shape and found.dtype == q.dtype, f"{found.shape} of {found.dtype}"
    if not found.numel():
        return 0.0
    allowed = numerics.allowed_error(max(_largest(x - exact) for x in usual), _largest(exact), _name(q.dtype))
    allowed += SUM_ROUNDINGS * numerics.EPSILON["float32"] * _largest(v)
    error = _largest(found - exact)
    assert error <= allowed, f"differs by {error:.3g}, allowed {allowed:.3g}"
    if lse is not None:
        blind = exact_lse.isneginf()
        assert torch.equal(lse.isneginf(), blind), "−inf in the log-sum-exp of other rows than those that see nothing"
        assert not found[blind].any(), "not zero in a row that sees nothing"
        off, largest = _largest((lse - exact_lse)[~blind]), _largest(exact_lse[~blind])
        unit = numerics.LSE_TOLERANCE if found.device.type == "cpu" else numerics.EPSILON[_name(q.dtype)] / 2
        largest = max(1.0, largest, _largest(q) * _largest(k) * q.shape[-1] ** 0.5 * scale)
        assert off <= unit * largest, f"the log-sum-exp differs by {off:.3g}, allowed {unit * largest:.3g}"
    return error / allowed if allowed else 0.0


def compare_gradients(leaves: dict[str, torch.Tensor], dout, formula: Callable, *qkv: torch.Tensor) -> None:
    """Assert that the gradients that autograd has left in ``leaves`` are those of ``formula``.

    ``formula``: of tensors by name, and the dtype to which :func:`attention` rounds.  Its q, k and v say how large
    terms are that cancel one another.
    """

    def by_formula(dtype, rounded=None):
        own = {n: x.detach().to(dtype).requires_grad_() for n, x in leaves.items()}
        out = formula(own, rounded)
        out.backward(dout.to(out.dtype))
        return {n: torch.zeros_like(x) if x.grad is None else x.grad for n, x in own.items()}

    dtype = dout.dtype
    exact, *usual = by_formula(torch.float64), by_formula(dtype), by_formula(torch.float32, dtype)
    terms = math.prod(max(1.0, _largest(x)) for x in (*qkv, dout)) * math.sqrt(sum(x.shape[-1] for x in qkv))
    for name, leaf in leaves.items():
        got, want = leaf.grad, exact[name]
        assert got is not None and got.shape == leaf.shape and got.dtype == leaf.dtype, f"no gradient of {name}"
        off = numerics.largest_of(_largest(x[name].to(leaf.dtype).double() - want) for x in usual)
        allowed = numerics.allowed_error(off, _largest(want), _name(dtype))
        allowed += SUM_ROUNDINGS * numerics.EPSILON["float32"] * terms
        error = _largest(got.double() - want)
        assert error <= allowed, f"the gradient of {name} differs by {error:.3g}, allowed {allowed:.3g}"


def _largest(x: torch.Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def of_sequence(options: dict[str, Any], b: int, rows: int, keys: int, device: str, hidden: int = 0):
    """What :func:`attention` takes of the options, bottom-right aligned, of sequence ``b`` with so many keys hidden."""
    slopes = options.get("alibi_slopes")
    i, j = torch.arange(rows, device=device)[:, None] + (keys - rows), torch.arange(keys, device=device)
    left, right = options.get("window_size", (-1, -1))
    visible = (j >= hidden) & ((i >= j) if options.get("causal") else True)
    visible = visible & ((j >= i - left) if left >= 0 else True) & ((j <= i + right) if right >= 0 else True)
    bias = None
    if slopes is not None:
        own = slopes if slopes.ndim == 1 else slopes[b]
        bias = -own.double()[:, None, None] * (i - j).abs()
    return visible.expand(rows, keys), bias, options.get("softcap", 0.0)
