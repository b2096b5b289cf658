"""Cases as torch tensors, and how far an output may be from float64: shared by the tests of all arch families."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tests import cases
from tests.cases import CASES, Case, Inputs
from tvm_flash import numerics, reference
from tvm_flash.packs import by_role, sizes
from tvm_flash.packs.manifest import LAYOUT_OF_TEMPLATE, KernelEntry, Param


def tensor(x: np.ndarray, dtype: str, layout: str, strides: str, device: str = "cpu") -> torch.Tensor:
    """``x`` (batch, heads, seq, dim) as a tensor in a physical layout, lying in memory as ``strides`` says."""
    x = torch.from_numpy(np.ascontiguousarray(x)).to(device, getattr(torch, dtype))
    x = x if layout == "bhsd" else x.transpose(1, 2)
    if strides == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if strides == "gaps":
        # Kernels for the CPU must take data that is aligned to no more than an element, those for GPUs 16 bytes.
        before, columns = (1, 9) if device == "cpu" else (0, 8)
        room = [n + 2 for n in x.shape[:3]] + [x.shape[3] + columns]
        room = torch.full(room, torch.nan, dtype=x.dtype, device=device)
        view = room[tuple(slice(before, before + n) for n in x.shape)]
        view.copy_(x)
        return view
    return x.contiguous()


#: What runs a kernel: takes its tensors and numbers by role, more than it needs among them, and a problem's sizes.
Compute = Callable[[Mapping[str, Any], Mapping[str, int]], None]


def by_abi(function: Callable, params: Iterable[Param]) -> Compute:
    """A forward kernel of a single launch, which stands alone."""
    roles = ("q", "k", "v", "o", "lse", "softmax_scale", *(p.name for p in params))
    return lambda values, _: function(*(values[role] for role in roles))


def by_entry(entry: KernelEntry, functions: Sequence[Callable], device: str) -> Compute:
    """A kernel of a pack; workspaces hold NaN or large numbers, or zeros if they are to."""

    def make(shape: tuple[int, ...], dtype: str, zeroed: bool) -> torch.Tensor:
        anything = 1 << 20 if dtype.startswith("int") else torch.nan
        return torch.full(shape, 0 if zeroed else anything, dtype=getattr(torch, dtype), device=device)

    return lambda values, problem: by_role.bind(entry, functions, values, problem, make)()


def sizes_of(case: Case) -> dict[str, int]:
    """The sizes of a case by name."""
    return sizes.of(
        case.batch, case.heads, case.seqlen_q, case.kv_heads, case.seqlen_kv, case.head_dim, case.head_dim_v
    )


def run(
    case: Case,
    data: Inputs,
    compute: Compute,
    layout: str,
    lse_length: int | None = None,
    device: str = "cpu",
    state: tuple[np.ndarray, np.ndarray] | None = None,
):
    """Run a forward kernel on a case, with outputs full of NaN beforehand; or, of one that merges, with the ``state``.

    Returns
    -------
    Output ``(batch, heads, seqlen_q, head_dim_v)`` and lse ``(batch, heads, seqlen_q)``, or the whole flat lse tensor
    if its length was given; float64 arrays.
    """
    unwritten = np.full((*data.q.shape[:3], case.head_dim_v), np.nan, np.float32)
    arrays = {"q": data.q, "k": data.k, "v": data.v, "o": unwritten}
    values = {role: tensor(x, case.dtype, layout, case.strides, device) for role, x in arrays.items()}
    rows = case.batch * case.heads * case.seqlen_q
    lse = torch.full((rows if lse_length is None else lse_length,), torch.nan, device=device)
    if state is not None:
        values["o"] = tensor(state[0].copy(), "float32", layout, case.strides, device)
        lse = torch.from_numpy(state[1].flatten()).to(device)
    o = values["o"]
    params = {n: torch.from_numpy(x).to(device) if isinstance(x, np.ndarray) else x for n, x in data.params.items()}
    compute({**values, "lse": lse, "softmax_scale": case.softmax_scale, **params}, sizes_of(case))
    o = o if layout == "bhsd" else o.transpose(1, 2)
    lse = lse.reshape(case.batch, case.heads, case.seqlen_q) if lse_length is None else lse
    return o.double().cpu().numpy(), lse.double().cpu().numpy()


def attend(kernel, case: Case, data: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """Output and lse of a case, of a kernel that stands alone: its ``spec``, ``params`` and ``function``."""
    return run(case, data, by_abi(kernel.function, kernel.params), LAYOUT_OF_TEMPLATE[kernel.spec.template])


def shared_cases(spec) -> Iterator[Case]:
    """The shared cases of a kernel's own kind that are short enough to be simulated."""
    for case in CASES:
        if (case.dtype, case.mask, case.score) != (spec.dtype, spec.mask, spec.score) or case.strides == "gaps":
            continue
        if case.head_dim <= spec.head_dim and case.head_dim_v <= spec.head_dim_v and case.seqlen_kv <= 500:
            yield case


def own_case(kernel, **sizes) -> Case:
    """A case of such a kernel's own kind and full width."""
    spec = kernel.spec
    params = {"window_left": 90, "window_right": 3, "sink_tokens": 5, "softcap": 2.0}
    params |= {"has_query_start": 1, "has_alibi_slopes": 1, "has_sinks": 1}
    return Case(
        1,
        2,
        head_dim=spec.head_dim,
        head_dim_v=spec.head_dim_v,
        dtype=spec.dtype,
        mask=spec.mask,
        score=spec.score,
        params=tuple((p.name, params[p.name]) for p in kernel.params if p.name in params),
        **sizes,
    )


def usual(case: Case, data: Inputs, device: str = "cpu") -> list[np.ndarray]:
    """PyTorch's attention in the same dtype with its sums in each of :func:`tvm_flash.numerics.orders`, and the usual
    computation, which is the same on every machine.

    Of modified scores PyTorch has the plain formula only, which in 16 bits rounds the scores too: too bad a measure.
    """
    dtype = getattr(torch, case.dtype)
    q, k, v = (torch.from_numpy(x).to(device, dtype) for x in (data.q, data.k, data.v))
    k, v = (x.repeat_interleave(case.heads // case.kv_heads, dim=1) for x in (k, v))
    params = {name: x if np.ndim(x) == 0 else x[..., None, None] for name, x in data.params.items()}
    at = reference.Positions(
        np.arange(case.seqlen_q)[:, None], np.arange(case.seqlen_kv)[None], case.seqlen_q, case.seqlen_kv, params
    )
    scores = (case.batch, case.heads, case.seqlen_q, case.seqlen_kv)
    visible = torch.from_numpy(np.array(np.broadcast_to(reference.MASKS[case.mask](at), scores))).to(device)
    seen = visible.any(-1, keepdim=True)

    def attend(q, k, v, visible, j):
        if case.score == "identity":
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, visible, scale=case.softmax_scale)
        s = (q @ k.transpose(-1, -2)) * case.softmax_scale
        cap = data.params.get("softcap")
        s = s if cap is None else cap * torch.tanh(s / cap)
        if "alibi" in case.score:
            distance = torch.from_numpy(np.abs(at.diagonal - j)).to(device, dtype)
            s = s - torch.from_numpy(params["alibi_slopes"]).to(device, dtype) * distance
        return torch.softmax(s.masked_fill(~visible, -torch.inf), -1) @ v

    results = []
    orders = numerics.orders(case.head_dim, case.seqlen_kv, data.q[..., 0].size * case.head_dim_v)
    for terms, keys in orders if case.score == "identity" or case.dtype == "float32" else ():
        out = attend(q[..., terms], k[..., keys, :][..., terms], v[..., keys, :], visible[..., keys], at.j[:, keys])
        results.append(torch.where(seen, out, 0).double().cpu().numpy())
    what = {"mask": reference.MASKS[case.mask], "score": reference.SCORES[case.score], "params": data.params}
    stated = numerics.usual_attention(
        data.q, data.k, data.v, dtype=case.dtype, softmax_scale=case.softmax_scale, **what
    )
    return [*results, *stated]


def allowed_error(case: Case, data: Inputs, expected: np.ndarray, lse: np.ndarray, device: str = "cpu") -> float:
    """The rule of :mod:`tvm_flash.numerics`.

    16-bit kernels have scores in float32: where these are large, one rounding of a score changes its probability by
    more than an output's rounding, and PyTorch's error is a matter of luck.  ``lse`` is as large as a row's scores.
    """
    allowed = numerics.bound(usual(case, data, device), expected, case.dtype)
    if case.dtype != "float32":
        allowed += numerics.EPSILON["float32"] / 2 * numerics.magnitude(lse) * numerics.magnitude(expected)
    return allowed


def check(
    case: Case,
    data: Inputs,
    out: np.ndarray,
    lse: np.ndarray,
    device: str = "cpu",
) -> float:
    """Assert that an output is right; its largest error as a share of what is allowed."""
    expected, expected_lse = cases.expected(case, data)
    allowed = allowed_error(case, data, expected, expected_lse, device)
    error = np.abs(out - expected).max()
    assert error <= allowed, f"output differs by {error:.3g}, allowed {allowed:.3g}"
    blind = np.isneginf(expected_lse)
    assert np.array_equal(np.isneginf(lse), blind)
    assert not out[blind].any()
    if not blind.all():
        lse_error = np.abs(lse[~blind] - expected_lse[~blind]).max()
        lse_allowed = numerics.lse_bound(expected_lse)
        assert lse_error <= lse_allowed, f"lse differs by {lse_error:.3g}, allowed {lse_allowed:.3g}"
    return float(error / allowed) if error else 0.0


def check_confined(case: Case, clean: Inputs, data: Inputs, out: np.ndarray, lse: np.ndarray, device: str = "cpu"):
    """Assert that what isn't finite in ``data``, and is in ``clean``, spoils the rows that see it and no other.

    Returns the largest error of the others as a share of what is allowed.
    """
    with np.errstate(invalid="ignore"):
        spoilt = ~np.isfinite(cases.expected(case, data)[0]).all(axis=-1)
    assert spoilt.any()
    assert not spoilt.all()
    assert not np.isfinite(out[spoilt]).all(axis=-1).any(), "a row that sees NaN or infinity has numbers"
    expected, expected_lse = cases.expected(case, clean)
    return check(case, clean, np.where(spoilt[..., None], expected, out), np.where(spoilt, expected_lse, lse), device)
