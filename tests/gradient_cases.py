"""Gradients of cases: what comes in, the answer in float64, how far from it one may be, and the call of a kernel."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from tests import cases
from tests.cases import Case, Inputs
from tests.torch_cases import tensor
from tvm_flash import numerics, reference
from tvm_flash.packs import sizes

SUMS = ("dq", "dk", "dv")


@dataclass(frozen=True)
class Outer:
    """Gradients that come in: of the output, which the case's dtype can hold, and of the log-sum-exp, if any."""

    dout: np.ndarray
    dlse: np.ndarray | None = None


def outer(case: Case, with_dlse: bool = False) -> Outer:
    """Standard normal ones; the same for the same case on every machine."""
    rng = np.random.default_rng(zlib.crc32(case.id.encode()) + 1)
    rows = (case.batch, case.heads, case.seqlen_q)
    dout = numerics.round_to(rng.standard_normal((*rows, case.head_dim_v), np.float32), case.dtype)
    return Outer(dout, rng.standard_normal(rows, np.float32) if with_dlse else None)


def low_scores(data, dtype: str, low: float):
    """The same inputs, ragged or not, with queries and keys whose scores are all about ``low``; NaN stays."""
    rng = np.random.default_rng(1)
    size = np.sqrt(-low / np.sqrt(data.q.shape[-1]))

    def around(x, at):
        rows = numerics.round_to((rng.standard_normal(x.shape) / 10 + at).astype(np.float32), dtype)
        return np.where(np.isnan(x), x, rows)

    return replace(data, q=around(data.q, -size), k=around(data.k, size))


def what(case: Case, data: Inputs) -> dict:
    """The arguments that say which attention it is."""
    names = {"mask": reference.MASKS[case.mask], "score": reference.SCORES[case.score]}
    return {"softmax_scale": case.softmax_scale, "params": data.params, **names}


def expected(case: Case, data: Inputs, given: Outer, asked: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """dq, dk, dv and ``d_NAME`` of the parameters that ask for one, in float64."""
    found = reference.attention_backward(
        given.dout, data.q, data.k, data.v, dlse=given.dlse, gradients=asked, **what(case, data)
    )
    return {**{name: getattr(found, name) for name in SUMS}, **{f"d_{n}": x for n, x in found.params.items()}}


# ---------------------------------------------------------------- how far one may be from it


def usual(case: Case, data: Inputs, given: Outer, asked: tuple[str, ...] = ()) -> list[dict[str, np.ndarray]]:
    """The gradients as one computes them in a dtype, the sums taken in several orders (see :mod:`tvm_flash.numerics`).

    In 16 bits, weights and gradients of scores are rounded before they are
    multiplied, and so are output and results; where PyTorch has the same attention as a function, its own counts too.
    """
    elements = case.batch * case.heads * case.seqlen_q * case.head_dim_v if case.dtype == "float32" else math.inf
    found = [
        _by_formula(case, data, given, asked, terms, keys)
        for terms, keys in numerics.orders(case.head_dim, case.seqlen_kv, elements)
    ]
    if case.dtype != "float32" and case.score == "identity" and case.heads == case.kv_heads and given.dlse is None:
        found.append(_by_torch(case, data, given))
    return found


def _visible(case: Case, data: Inputs) -> tuple[torch.Tensor, torch.Tensor, reference.Positions]:
    """Which keys are seen, which rows see any, and where the scores are."""
    values = {name: x if np.ndim(x) == 0 else x[..., None, None] for name, x in data.params.items()}
    rows, keys = np.arange(case.seqlen_q)[:, None], np.arange(case.seqlen_kv)[None]
    at = reference.Positions(rows, keys, case.seqlen_q, case.seqlen_kv, values)
    scores = (case.batch, case.heads, case.seqlen_q, case.seqlen_kv)
    visible = torch.from_numpy(np.array(np.broadcast_to(reference.MASKS[case.mask](at), scores)))
    return visible, visible.any(-1), at


def _score(case: Case, s: torch.Tensor, params: Mapping[str, torch.Tensor], distance: torch.Tensor) -> torch.Tensor:
    capped = "softcap" in params and float(params["softcap"].detach()) != 0
    s = params["softcap"] * torch.tanh(s / params["softcap"]) if capped else s
    biased = "alibi" in case.score or bool(params.get("has_alibi_slopes", 0))
    return s - params["alibi_slopes"][..., None, None] * distance if biased else s


def _by_formula(case, data, given, asked, terms, keys) -> dict[str, np.ndarray]:
    dtype, group = getattr(torch, case.dtype), case.heads // case.kv_heads
    visible, seen, at = _visible(case, data)
    visible, distance = visible[..., keys], torch.from_numpy(np.abs(at.diagonal - at.j).astype(np.float32))
    distance = distance.expand(*visible.shape[:2], *distance.shape[-2:])[..., keys]
    q, k, v = (torch.from_numpy(x) for x in (data.q[..., terms], data.k[:, :, keys][..., terms], data.v[:, :, keys]))
    wide_k, wide_v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    s = (_one_by_one(q, wide_k) * case.softmax_scale).requires_grad_()
    params = {n: torch.as_tensor(x, dtype=torch.float32) for n, x in data.params.items() if n != "query_start"}
    for name in asked:
        params[name].requires_grad_()
    scores = _score(case, s, params, distance)
    # A row that sees nothing counts as one that sees everything, and whose output nobody asks for.
    hidden = ~visible & seen[..., None]
    x = scores.detach().masked_fill(hidden, -torch.inf)
    has_sinks = bool(data.params.get("has_sinks", "sinks" in data.params))
    if has_sinks:  # a key more, whose value is 0; with it a row sees something, be it of no weight
        sinks = params["sinks"].detach()[..., None, None].expand(*x.shape[:3], 1)
        hidden, seen = ~visible, seen | (sinks[..., 0] > -torch.inf)
        x = torch.cat([scores.detach().masked_fill(hidden & seen[..., None], -torch.inf), sinks], -1)
    prob = torch.softmax(x, -1)
    prob, of_sink = prob[..., : scores.shape[-1]], prob[..., scores.shape[-1] :].sum(-1)
    dout = torch.from_numpy(given.dout) * seen[..., None]
    dlse = torch.zeros(seen.shape) if given.dlse is None else torch.from_numpy(given.dlse) * seen
    out = (prob @ wide_v).to(dtype).float()
    delta = (out * dout).sum(-1) - dlse
    dscore = prob * (_one_by_one(dout, wide_v) - delta[..., None])
    dscore = dscore.masked_fill(~seen[..., None], 0)
    of_scores = [n for n in asked if n != "sinks"]
    slopes = torch.autograd.grad(scores, [s, *(params[n] for n in of_scores)], dscore)
    ds, prob = slopes[0].to(dtype).float() * case.softmax_scale, prob.to(dtype).float()

    def summed(x):
        return x.reshape(case.batch, case.kv_heads, group, *x.shape[2:]).sum(2)

    dk, dv = summed(ds.transpose(-1, -2) @ q), summed(prob.transpose(-1, -2) @ dout)
    back, order = np.argsort(keys), np.argsort(terms)
    found = {"dq": (ds @ wide_k)[..., order], "dk": dk[:, :, back][..., order], "dv": dv[:, :, back]}
    found = {name: x.to(dtype).double().numpy() for name, x in found.items()}
    learnt = {f"d_{n}": x.double().numpy() for n, x in zip(of_scores, slopes[1:], strict=True)}
    if "sinks" in asked:
        learnt["d_sinks"] = -(of_sink * delta).sum(-1).double().numpy()
    return found | learnt


def _one_by_one(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b.T`` with each sum taken term after term, as kernels do and a library of matrix products may not."""
    total = torch.zeros(*a.shape[:3], b.shape[2])
    for x, y in zip(*(x.movedim(-1, 0).contiguous() for x in (a, b)), strict=True):
        total.addcmul_(x[..., None], y[..., None, :])
    return total


def _by_torch(case, data, given) -> dict[str, np.ndarray]:
    visible, seen, _ = _visible(case, data)
    leaves = [torch.from_numpy(x).to(getattr(torch, case.dtype)).requires_grad_() for x in (data.q, data.k, data.v)]
    out = torch.nn.functional.scaled_dot_product_attention(
        *leaves, visible | ~seen[..., None], scale=case.softmax_scale
    )
    out.backward((torch.from_numpy(given.dout) * seen[..., None]).to(out.dtype))
    return {name: x.grad.double().numpy() for name, x in zip(SUMS, leaves, strict=True)}


def _reads(case: Case, data: Inputs, name: str) -> bool:
    """Whether the score of a case depends on a parameter."""
    word, option = {
        "alibi_slopes": ("alibi", "has_alibi_slopes"), "softcap": ("softcap", "softcap"), "sinks": ("none", "has_sinks")
    }[name]  # fmt: skip
    return word in case.score or bool(data.params.get(option, name == "sinks" and name in data.params))


def check(case: Case, data: Inputs, given: Outer, got: Mapping[str, np.ndarray], relative: float = 0.0) -> float:
    """Assert that gradients are right: the rule of :mod:`tvm_flash.numerics`, of each tensor by itself.

    The gradient of a parameter that the case's score doesn't read is 0.  An error of the share ``relative`` of the
    largest gradient is allowed at any rate: of a key or two, the usual computation has none.

    Returns
    -------
    The largest error as a share of what is allowed.
    """
    learnt = [name.removeprefix("d_") for name in got if name.startswith("d_")]
    asked = tuple(name for name in learnt if _reads(case, data, name))
    for name in set(learnt) - set(asked):
        assert not got[f"d_{name}"].any(), f"d_{name} isn't 0, and the score doesn't read {name}"
    exact, others = expected(case, data, given, asked), usual(case, data, given, asked)
    assert set(got) == set(exact) | {f"d_{name}" for name in learnt}
    largest, worst = numerics.magnitude(cases.expected(case, data)[1]), 0.0
    for name, want in exact.items():
        dtype = case.dtype if name in SUMS else "float32"
        allowed = numerics.bound([x[name] for x in others if name in x], want, dtype)
        # Weights follow from lse as it comes, in float32: its rounding, and that of scores as large, changes them.
        allowed += numerics.EPSILON["float32"] / 2 * largest * numerics.magnitude(want)
        allowed = max(allowed, relative * numerics.magnitude(want))
        error = numerics.largest_error(got[name], want)
        assert error <= allowed, f"{name} differs by {error:.3g}, allowed {allowed:.3g}"
        worst = max(worst, error / allowed) if allowed else worst
    return worst


# ---------------------------------------------------------------- the call of a kernel


#: A side of a window that reaches past every key.
_FAR = 1 << 30


def everything(case: Case, data: Inputs) -> dict:
    """A case's parameters for the kernel of the mask ``positioned`` and the score ``optional_sinks``."""
    left, right = {"full": (_FAR, _FAR), "causal": (_FAR, 0)}.get(case.mask, (None, None))
    heads = (case.batch, case.heads)
    usual = {
        "window_left": left,
        "window_right": right,
        "kv_start": np.zeros(heads, np.int32),
        "kv_end": np.full(heads, case.seqlen_kv, np.int32),
        "has_query_start": 0,
        "query_start": np.zeros(heads, np.int32),
        "softcap": 0.0,
        "has_alibi_slopes": int("alibi_slopes" in data.params),
        "alibi_slopes": np.full(heads, np.nan, np.float32),
        "has_sinks": int("sinks" in data.params),
        "sinks": np.full(heads, np.nan, np.float32),
    }
    return {**usual, **data.params}


@dataclass(frozen=True)
class Kernel:
    """A backward kernel as a manifest describes it: functions and the roles of their arguments, and workspaces."""

    functions: tuple[Callable, ...]
    roles: tuple[tuple[str, ...], ...]
    workspaces: tuple
    params: tuple
    layout: str
    scalars: tuple = field(default=())


def run(
    case: Case, data: Inputs, given: Outer, kernel: Kernel, known=None, before: float | None = None
) -> dict[str, np.ndarray]:
    """Call a kernel, results and workspaces full of NaN beforehand; results in the order (batch, heads, seq, dim).

    ``known`` are output and lse, if they aren't those that follow from ``data``; ``before`` is what float32 results
    hold that the kernel adds to.
    """
    out, lse = known or cases.expected(case, data)
    shapes = [(case.batch, h, n, d) for h, n, d in _sizes(case)]
    arrays = {"q": data.q, "k": data.k, "v": data.v, "o": out.astype(np.float32), "do": given.dout}
    held = torch.nan if before is None else before
    values = {role: tensor(x, case.dtype, kernel.layout, case.strides) for role, x in arrays.items()}
    for name, shape in zip(SUMS, shapes, strict=True):
        dtype = case.dtype if before is None else "float32"
        values[name] = tensor(np.full(shape, held, np.float32), dtype, kernel.layout, case.strides)
    values["lse"] = torch.from_numpy(lse.astype(np.float32).reshape(-1))
    values["dlse"] = torch.full((1,), torch.nan) if given.dlse is None else torch.from_numpy(given.dlse.reshape(-1))
    values["softmax_scale"] = case.softmax_scale
    results, params = {}, {**everything(case, data), **data.params}
    for p in kernel.params:
        x = params[p.name]
        values[p.name] = torch.from_numpy(x) if isinstance(x, np.ndarray) else x
        if p.gradient:
            shape = (case.batch, case.heads) if p.per_head else (1,)
            results[f"d_{p.name}"] = values[f"d_{p.name}"] = torch.full(shape, held)
    extents = sizes.of(
        case.batch, case.heads, case.seqlen_q, case.kv_heads, case.seqlen_kv, case.head_dim, case.head_dim_v
    )
    for scalar in kernel.scalars:
        values[scalar.name] = extents[scalar.name] = sizes.evaluate(scalar.value, extents)
    for w in kernel.workspaces:
        shape = [sizes.evaluate(n, extents) for n in w.shape]
        empty = 0 if w.zeroed else torch.nan if w.dtype.startswith(("float", "bfloat")) else 1 << 20
        values[w.name] = torch.full(shape, empty, dtype=getattr(torch, w.dtype))
    for function, roles in zip(kernel.functions, kernel.roles, strict=True):
        function(*(values[role] for role in roles))
    ordered = {n: values[n] if kernel.layout == "bhsd" else values[n].transpose(1, 2) for n in SUMS}
    return {n: x.double().numpy() for n, x in {**ordered, **results}.items()}


def _sizes(case: Case):
    """Heads, length and head_dim of q, k and v."""
    keys = (case.kv_heads, case.seqlen_kv)
    return (case.heads, case.seqlen_q, case.head_dim), (*keys, case.head_dim), (*keys, case.head_dim_v)
