"""Verification of CUDA kernels on hardware: the shared cases against float64, then the time of one usual problem.

``test_gpu.py`` asserts with it and ``scripts/verify_kernels.py`` writes records with it.  Kernels are called by their
ABI, whatever the selector would choose.  Needs a GPU, torch and a pack; no TVM.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools
import math
import statistics
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from schedules.builder.records import Record
from tests import cases, torch_cases
from tests.cases import CASES, Case, Inputs
from tvm_flash import numerics
from tvm_flash.catalogue import SCORES
from tvm_flash.machine import cuda
from tvm_flash.machine.arch import runs_on
from tvm_flash.packs.manifest import BUILTIN_DEFINITION, KernelEntry
from tvm_flash.packs.registry import Installed, registry

#: What is timed: 16k tokens and a hidden size of 2048, 4096 positions; a window of 1024 keys where there is one.
TOKENS, HIDDEN, SEQLEN, WINDOW = 16384, 2048, 4096, 1024
WARM_UP, REPEATS = 3, 20

#: Masks that a window with sides beyond the ends computes as well: (left, right) by the mask.
_AS_WINDOW = {"full": (1 << 20, 1 << 20), "causal": (1 << 20, 0)}

#: Masks that another one computes as well, with the right parameters.
_NARROWER = {
    "window": ("full", "causal"),
    "padded": ("full", "causal", "window"),
    "positioned": ("full", "causal", "window", "padded"),
}


def cases_of(entry: KernelEntry) -> Iterator[tuple[Case, Inputs]]:
    """The shared cases that a kernel must get right, at their own head_dim and at the kernel's largest."""
    for case in CASES:
        params = _as_own(entry, case) if case.dtype == entry.dtype else None
        if params is None:
            continue
        sizes = {(case.head_dim, case.head_dim_v), (entry.head_dim, entry.head_dim_v)}
        for head_dim, head_dim_v in sorted(sizes):
            if head_dim <= entry.head_dim and head_dim_v <= entry.head_dim_v:
                own = dataclasses.replace(case, head_dim=head_dim, head_dim_v=head_dim_v)
                data = cases.inputs(own)
                yield own, dataclasses.replace(data, params={**params, **data.params})


def _as_own(entry: KernelEntry, case: Case) -> dict[str, object] | None:
    """The parameters with which a kernel computes a case, beside the case's own; None if it can't."""
    params: dict[str, object] = {}
    if case.score != entry.score:
        if entry.score not in SCORES[case.score].stand_ins:
            return None
        params |= {"softcap": 0.0, "has_alibi_slopes": int("alibi" in case.score)}
        params["alibi_slopes"] = np.full((case.batch, case.heads), np.nan, np.float32)  # unless the case has its own
    if case.mask != entry.mask:
        if case.mask not in _NARROWER.get(entry.mask, ()):
            return None
        params |= zip(("window_left", "window_right"), _AS_WINDOW.get(case.mask, ()), strict=False)
        ends = {"kv_start": 0, "kv_end": case.seqlen_kv, "query_start": 7}
        params |= {n: np.full((case.batch, case.heads), x, np.int32) for n, x in ends.items()}
        params["has_query_start"] = 0
    return params


def many_places(entry: KernelEntry) -> Iterator[tuple[str, Case, Inputs]]:
    """More row tiles than a GPU has room for, where a kernel's blocks go on to others when they have done one."""
    if not entry.config.get("waves"):
        return
    case = Case(3, 50, 150, 40, kv_heads=25, seqlen_kv=200, dtype=entry.dtype, mask=entry.mask, score=entry.score)
    data = cases.inputs(case)
    params = {"window_left": 60, "window_right": 5, "softcap": 2.0}
    own = {p.name: params[p.name] for p in entry.params if p.name in params}
    yield "many places", case, dataclasses.replace(data, params={**data.params, **own})


def adversarial(entry: KernelEntry) -> Iterator[tuple[str, Case, Inputs]]:
    """Inputs with finite scores that an online softmax may stumble over; float64 has finite results for all."""
    if entry.score not in ("identity", "optional"):
        return
    params = {"window_left": 150, "window_right": 0, "kv_start": 3, "kv_end": 700, "query_start": 550}
    params = _own(entry, params)
    case = Case(
        1, 2, 140, entry.head_dim, seqlen_kv=700, head_dim_v=entry.head_dim_v, dtype=entry.dtype, mask=entry.mask
    )

    def variant(name, edit):
        data = cases.inputs(case)
        q, k, v = (x.copy() for x in (data.q, data.k, data.v))
        edit(q, k)
        rounded = (numerics.round_to(x, entry.dtype) for x in (q, k, v))
        return name, case, Inputs(*rounded, params)

    def huge_late_key(q, k):
        k[:, :, 600:] *= 400

    def huge_key_before_the_last(q, k):
        k[:, :, -2] = 300 * np.sign(q[:, :, -1])

    def growing(q, k):
        q[:] = np.abs(q)
        k[:] = np.abs(k) * np.linspace(0, 60, k.shape[2])[:, None]

    def all_very_negative(q, k):
        q[:] = np.abs(q) * 20
        k[:] = -np.abs(k) * 20

    def large_logits(q, k):
        q *= 100
        k *= 100

    def denormals(q, k):
        q *= 1e-7
        k *= 1e-7

    for edit in (huge_late_key, huge_key_before_the_last, growing, all_very_negative, large_logits, denormals):
        yield variant(edit.__name__, edit)


def not_finite(entry: KernelEntry) -> Iterator[tuple[str, Case, Inputs, Inputs]]:
    """Inputs with NaN or infinity in some queries, or in a key that only the last query sees; and the same without."""
    if entry.score not in ("identity", "optional") or entry.mask not in ("full", "causal", "window", "positioned"):
        return
    params = {"window_left": 100, "window_right": 0, "kv_start": 0, "kv_end": 300, "query_start": 160}
    params = _own(entry, params)
    sizes = {"seqlen_kv": 300, "head_dim_v": entry.head_dim_v, "dtype": entry.dtype, "mask": entry.mask}
    case = Case(1, 2, 140, entry.head_dim, **sizes)
    clean = dataclasses.replace(cases.inputs(case), params=params)
    q = clean.q.copy()
    q[0, 0, 5, 3], q[0, 1, 77, 0], q[0, 1, 78, 1] = np.nan, np.inf, -np.inf
    yield "queries not finite", case, clean, dataclasses.replace(clean, q=q)
    if entry.mask != "full":
        k = clean.k.copy()
        k[0, 1, -1, 2] = np.nan
        yield "a key not finite", case, clean, dataclasses.replace(clean, k=k)


def _own(entry: KernelEntry, numbers: dict[str, int]) -> dict[str, object]:
    """Parameters of a kernel for a batch of 1 and 2 heads, without a soft cap and slopes."""
    values = {"softcap": 0.0, "alibi_slopes": np.nan, "has_alibi_slopes": 0, "has_query_start": 1, **numbers}
    return {p.name: np.full((1, 2), values[p.name], p.dtype) if p.per_head else values[p.name] for p in entry.params}


def verify(kernel: Installed) -> tuple[int, float]:
    """Run all cases of a kernel; how many, and the largest error as a share of what is allowed.

    Raises
    ------
    AssertionError: a result is wrong, unwritten, or differs from run to run; the message names the case.
    """
    entry, worst, count = kernel.entry, 0.0, 0
    function = function_of(kernel)
    labelled = [(case.id, case, data) for case, data in cases_of(entry)]
    more = itertools.chain(many_places(entry), adversarial(entry))
    labelled += [(f"{name} {case.id}", case, data) for name, case, data in more]
    for label, case, data in labelled:
        runs = [torch_cases.run(case, data, function, entry.params, entry.layout, device="cuda") for _ in range(2)]
        try:
            worst = max(worst, torch_cases.check(case, data, *runs[0], "cuda"))
        except AssertionError as e:
            raise AssertionError(f"{entry.symbol} [{entry.arch}], {label}: {e}") from e
        same = all(np.array_equal(a, b, equal_nan=True) for a, b in zip(*runs, strict=True))
        assert same, f"{entry.symbol} [{entry.arch}], {label}: two runs differ"
        count += 1
    for label, case, clean, data in not_finite(entry):
        out, lse = torch_cases.run(case, data, function, entry.params, entry.layout, device="cuda")
        try:
            worst = max(worst, torch_cases.check_confined(case, clean, data, out, lse, "cuda"))
        except AssertionError as e:
            raise AssertionError(f"{entry.symbol} [{entry.arch}], {label} {case.id}: {e}") from e
        count += 1
    assert count, f"{entry.symbol} [{entry.arch}]: no case applies to it"
    return count, worst


def measure(entry: KernelEntry, function) -> tuple[str, list[float], float]:
    """Time the usual problem: its name, microseconds of each repeat, and its floating-point operations."""
    seqlen = max(SEQLEN, entry.bucket)
    batch, heads = max(1, TOKENS // seqlen), max(1, HIDDEN // entry.head_dim)
    dims = (entry.head_dim, entry.head_dim, entry.head_dim_v, entry.head_dim_v)
    order = (batch, heads, seqlen) if entry.layout == "bhsd" else (batch, seqlen, heads)
    dtype = getattr(torch, entry.dtype)
    q, k, v, o = (torch.randn(*order, dim, device="cuda", dtype=dtype) for dim in dims)
    values = {"window_left": WINDOW, "window_right": 0, "sink_tokens": 4, "softcap": 30.0}
    values["alibi_slopes"] = torch.rand(batch, heads, device="cuda")
    values |= {"has_alibi_slopes": 1, "has_query_start": 1}
    ends = {"kv_start": 0, "kv_end": seqlen, "query_start": 0}
    values |= {n: torch.full((batch, heads), x, dtype=torch.int32, device="cuda") for n, x in ends.items()}
    arguments = (q, k, v, o, torch.empty(1, device="cuda"), 1 / math.sqrt(entry.head_dim))
    arguments += tuple(values[p.name] for p in entry.params)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    for _ in range(WARM_UP):
        function(*arguments)
    events[0].record()
    for event in events[1:]:
        function(*arguments)
        event.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) * 1e3 for a, b in itertools.pairwise(events)]
    pairs = {"full": seqlen**2, "causal": seqlen**2 / 2}.get(entry.mask, seqlen * min(WINDOW + 1, seqlen))
    flops = 2.0 * batch * heads * pairs * (entry.head_dim + entry.head_dim_v)
    return f"b={batch} h={heads} s={seqlen} d={entry.head_dim}", times, flops


def run_as(kernel: Installed) -> str:
    """Whether the GPU runs the machine code of a kernel's arch, a newer arch's of the same source, or its PTX."""
    recompiled = kernel.pack.manifest.versions.get("recompiled_for")
    if recompiled:
        return f"recompiled for {recompiled}"
    return "native" if runs_on(kernel.entry.arch, torch.cuda.get_device_capability()) else "ptx"


def record(kernel: Installed, count: int, error: float) -> Record:
    """Measure a kernel that :func:`verify` gave ``count`` and ``error`` for."""
    entry = kernel.entry
    problem, times, flops = measure(entry, function_of(kernel))
    median, deciles = statistics.median(times), statistics.quantiles(times, n=10)
    return Record(
        kind="verified",
        device=torch.cuda.get_device_name(),
        driver=cuda.driver_version(),
        arch=entry.arch,
        run_as=run_as(kernel),
        **{
            name: getattr(entry, name)
            for name in ("symbol", "template", "dtype", "head_dim", "head_dim_v", "mask", "score", "bucket", "config")
        },
        source_hash=entry.source_hash,
        cases=count,
        error=round(error, 3),
        problem=problem,
        microseconds=round(median, 2),
        spread=(round(deciles[0], 2), round(deciles[-1], 2)),
        tflops=round(flops / median / 1e6, 1),
        versions={**kernel.pack.manifest.versions, "torch": torch.__version__},
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


@functools.cache
def module(path):
    """A module, loaded once."""
    import tvm_ffi

    return tvm_ffi.load_module(str(path))


def function_of(kernel: Installed):
    """The kernel itself, which takes torch tensors."""
    return module(kernel.pack.folder.resolve() / kernel.entry.module)[kernel.entry.symbol]


def cuda_kernels(archs: Iterable[str] = ()) -> list[Installed]:
    """The installed kernels of the package's own definition for CUDA archs: all, or those given."""
    packs = registry()
    kernels = [k for arch in archs or packs.archs() if arch != "cpu" for k in packs.kernels(arch)]
    return [k for k in kernels if k.entry.definition == BUILTIN_DEFINITION]
