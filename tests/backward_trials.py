"""What a backward kernel must get right on hardware, and what of it is timed; also one that adds to what is there.

The shared cases, every other one with a gradient of lse, grouped heads and lengths that divide no tile, and more tiles
than a pipeline has stages.  Needs torch; no TVM.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch

from tests import cases, forward_trials, gradient_cases, tensor_trials, torch_cases
from tests.cases import Case, Inputs
from tests.gradient_cases import SUMS, Outer
from tests.torch_cases import Compute
from tests.trials import Results, Trial, Usual
from tvm_flash.operators import ACCUMULATE
from tvm_flash.packs.manifest import KernelEntry

#: What results hold beforehand to which a kernel adds.
_BEFORE = 3.0

#: Of (heads, kv_heads, seqlen_q, seqlen_kv), beside the shared cases.
_SIZES = ((4, 1, 250, 213), (2, 2, 700, 900), (6, 2, 129, 640), (1, 1, 1, 300), (6, 2, 150, 1030))


def trials(entry: KernelEntry) -> Iterator[Trial]:
    """All of them, for a kernel."""
    if any(p.is_spread for p in entry.params):
        yield from tensor_trials.backward(tensor_trials.kernel_of(entry))
        return
    for number, (case, data) in enumerate((*forward_trials.cases_of(entry), *_own_cases(entry))):
        yield _trial(entry, case, data, gradient_cases.outer(case, with_dlse=number % 2 == 1))


def _own_cases(entry: KernelEntry) -> Iterator[tuple[Case, Inputs]]:
    numbers = {"window_left": 90, "window_right": 3, "sink_tokens": 5, "softcap": 2.0, "has_query_start": 0}
    numbers |= {"has_alibi_slopes": 1, "has_sinks": 1}
    params = tuple((p.name, numbers[p.name]) for p in entry.params if p.name in numbers)
    for heads, kv_heads, seqlen_q, seqlen_kv in _SIZES:
        case = Case(
            *(2, heads, seqlen_q, entry.head_dim, kv_heads, seqlen_kv, entry.head_dim_v),
            *(entry.dtype, entry.mask, entry.score, params),
        )
        data = cases.inputs(case)
        yield case, dataclasses.replace(data, params={**gradient_cases.everything(case, data), **data.params})


def _trial(entry: KernelEntry, case: Case, data: Inputs, given: Outer) -> Trial:
    names = (*SUMS, *(f"d_{p.name}" for p in entry.params if p.gradient))

    def run(compute: Compute, device: str) -> Results:
        values = _values(entry, case, data, given, device)
        results = {name: values[name] for name in names}
        compute(values, torch_cases.sizes_of(case))
        if entry.layout == "bshd":
            results |= {name: results[name].transpose(1, 2) for name in SUMS}
        before = _BEFORE if entry.kind == ACCUMULATE else 0.0
        return tuple(results[name].double().cpu().numpy() - before for name in names)

    def check(results: Results, device: str) -> float:
        return gradient_cases.check(case, data, given, dict(zip(names, results, strict=True)))

    return Trial(f"{case.id}{'' if given.dlse is None else ' with dlse'}", run, check)


def _values(entry: KernelEntry, case: Case, data: Inputs, given: Outer, device: str) -> dict:
    """What a kernel takes, by role; results are full of NaN, or hold what is added to."""
    out, lse = cases.expected(case, data)
    arrays = {"q": data.q, "k": data.k, "v": data.v, "o": out.astype(np.float32), "do": given.dout}
    held, dtype = (_BEFORE, "float32") if entry.kind == ACCUMULATE else (np.nan, case.dtype)
    results = {f"d{x}": np.full_like(arrays[x], held) for x in "qkv"}
    values = {
        role: torch_cases.tensor(x, dtype if role in results else case.dtype, entry.layout, case.strides, device)
        for role, x in {**arrays, **results}.items()
    }
    dlse = np.full(1, np.nan, np.float32) if given.dlse is None else given.dlse
    flat = {"lse": lse.astype(np.float32), "dlse": dlse}
    values |= {name: torch.from_numpy(x.reshape(-1)).to(device) for name, x in flat.items()}
    for p in entry.params:
        x = data.params[p.name]
        values[p.name] = torch.from_numpy(x).to(device) if isinstance(x, np.ndarray) else x
        if p.gradient:
            shape = (case.batch, case.heads) if p.per_head else (1,)
            values[f"d_{p.name}"] = torch.full(shape, held, device=device)
    return values | {"softmax_scale": case.softmax_scale}


def usual(entry: KernelEntry) -> Usual:
    """What is timed of a kernel: the forward's problem, 2.5 times its operations."""
    forward = forward_trials.usual(entry)
    values = dict(forward.values)
    rows = forward.sizes["batch"] * forward.sizes["heads"] * forward.sizes["seqlen_q"]
    values |= {"lse": torch.full((rows,), 8.0, device="cuda"), "dlse": torch.empty(1, device="cuda")}
    dtype = torch.float32 if entry.kind == ACCUMULATE else values["q"].dtype
    values |= {
        "do": torch.randn_like(values["o"]),
        **{f"d{x}": torch.zeros_like(values[x], dtype=dtype) for x in "qkv"},
    }
    # of a gradient for each score, which would be larger than all else, nobody asks
    values |= {
        f"d_{p.name}": torch.empty((1,) * 4, device="cuda") if p.is_spread else torch.empty_like(values[p.name])
        for p in entry.params
        if p.gradient
    }
    return Usual(forward.name, values, forward.sizes, 2.5 * forward.flops)
