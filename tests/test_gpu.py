"""Kernels on a real GPU against float64: the case list of all targets; an older arch's kernels run by their PTX."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("tvm")

import torch
import tvm
import tvm_ffi
from tvm.backend.cuda import export_cuda_host

from schedules import v1, v2
from schedules.attention import Attention
from schedules.catalogue import MASKS, SCORES
from schedules.families import family_of
from schedules.pattern import match
from schedules.template import Program, Target
from schedules.toolchain import cuda
from tests import cases
from tests.cases import CASES, Case
from tvm_flash.manifest import LAYOUT_OF_TEMPLATE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]

TEMPLATES = {"v1": v1, "v2": v2}

#: Arch and template of the kernels that are checked; an arch without bfloat16 or a template is left out case by case.
KERNELS = (("sm_80", "v1"), ("sm_80", "v2"), ("sm_75", "v1"))


def runs_here(arch: str) -> bool:
    """Whether this GPU executes the arch's machine code, or its PTX."""
    major, minor = torch.cuda.get_device_capability()
    return int(arch.removeprefix("sm_")) <= 10 * major + minor


@functools.cache
def kernel(arch: str, template: str, dtype: str, mask: str, score: str, head_dim: int = 64):
    """The compiled function and the run-time parameters of its definition."""
    target = Target(arch)
    pattern = match(Attention(SCORES[score], MASKS[mask])(head_dim, dtype, index_dtype=family_of(target).INDEX_DTYPE))
    program = TEMPLATES[template].apply(pattern, target, "kernel")
    assert isinstance(program, Program), program
    tvm_target = tvm.target.Target({"kind": "cuda", "arch": arch}, host={"kind": "cuda_host"})
    module = tvm.compile(tvm.IRModule({"kernel": program.func}), target=tvm_target, tir_pipeline=program.pipeline)
    folder = Path(tempfile.mkdtemp(prefix="tvm_flash_"))
    source = folder / "kernel.cu"
    source.write_text(export_cuda_host(module.mod))
    here = "sm_{}{}".format(*torch.cuda.get_device_capability())
    cuda.compile_object(source, folder / "kernel.o", arch, run_on=here if here != arch else "")
    cuda.link_module([folder / "kernel.o"], folder / "kernel.so")
    return tvm_ffi.load_module(str(folder / "kernel.so"))["kernel"], pattern.params


def tensor(x: np.ndarray, dtype: str, layout: str, strides: str) -> torch.Tensor:
    """``x`` (batch, heads, seq, dim) on the GPU in a physical layout, lying in memory as ``strides`` says."""
    x = torch.from_numpy(np.ascontiguousarray(x)).to("cuda", getattr(torch, dtype))
    x = x if layout == "bhsd" else x.transpose(1, 2)
    if strides == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if strides == "gaps":
        room = torch.full([n + 1 for n in x.shape[:3]] + [x.shape[3] + 8], torch.nan, dtype=x.dtype, device="cuda")
        view = room[tuple(slice(n) for n in x.shape)]
        view.copy_(x)
        return view
    return x.contiguous()


def run(case: Case, data: cases.Inputs, arch: str, template: str, lse_length: int | None = None, head_dim: int = 64):
    """Output (batch, heads, seq, dim) and lse (batch, heads, seq), float64 arrays; every output was NaN before."""
    function, params = kernel(arch, template, case.dtype, case.mask, case.score, head_dim)
    layout = LAYOUT_OF_TEMPLATE[template]
    o = tensor(np.full((*data.q.shape[:3], case.head_dim_v), np.nan, np.float32), case.dtype, layout, case.strides)
    rows = case.batch * case.heads * case.seqlen_q
    lse = torch.full((rows if lse_length is None else lse_length,), torch.nan, device="cuda")
    q, k, v = (tensor(x, case.dtype, layout, case.strides) for x in (data.q, data.k, data.v))
    given = (data.params[p.name] for p in params)
    values = [torch.from_numpy(x).cuda() if isinstance(x, np.ndarray) else x for x in given]
    function(q, k, v, o, lse, case.softmax_scale, *values)
    torch.cuda.synchronize()
    o = o if layout == "bhsd" else o.transpose(1, 2)
    lse = lse.reshape(case.batch, case.heads, case.seqlen_q) if lse_length is None else lse
    return o.double().cpu().numpy(), lse.double().cpu().numpy()


def check(case: Case, data: cases.Inputs, arch: str, template: str, head_dim: int = 64):
    """Output within a few roundings of the dtype, lse within float32's; zeros and −inf where nothing is visible."""
    expected, expected_lse = cases.expected(case, data)
    out, lse = run(case, data, arch, template, head_dim=head_dim)
    bound = 8 * cases.EPSILON[case.dtype] * np.abs(expected).max()
    error = np.abs(out - expected).max()
    assert error <= bound, f"output differs by {error:.3g}, allowed {bound:.3g}"
    blind = np.isneginf(expected_lse)
    assert np.array_equal(np.isneginf(lse), blind)
    assert not out[blind].any()
    lse_error = np.abs(lse - expected_lse)[~blind].max()
    assert lse_error <= 4e-6 * max(1, np.abs(expected_lse[~blind]).max()), f"lse differs by {lse_error:.3g}"


def supported(case: Case, arch: str) -> bool:
    return runs_here(arch) and case.dtype in family_of(Target(arch)).DTYPES


@pytest.mark.parametrize(("arch", "template"), KERNELS)
@pytest.mark.parametrize("case", [c for c in CASES if c.dtype != "float32"], ids=lambda c: c.id)
def test_against_float64(case, arch, template):
    if not supported(case, arch):
        pytest.skip(f"{arch} has no {case.dtype}, or this GPU is older")
    check(case, cases.inputs(case), arch, template)


@pytest.mark.parametrize(("arch", "template"), KERNELS)
@pytest.mark.parametrize("head_dim", (96, 128, 192, 256))
def test_head_dims(head_dim, arch, template):
    for mask, dim in (("causal", head_dim), ("full", head_dim - 24)):
        case = Case(1, 4, 200, dim, kv_heads=2, seqlen_kv=333, dtype="float16", mask=mask)
        if not supported(case, arch):
            pytest.skip(f"this GPU is older than {arch}")
        check(case, cases.inputs(case), arch, template, head_dim)


@pytest.mark.parametrize(("arch", "template"), KERNELS)
def test_repeats_are_bit_equal(arch, template):
    case = Case(2, 3, 200, 64, seqlen_kv=333, dtype="float16", mask="causal")
    data = cases.inputs(case)
    first = run(case, data, arch, template)
    for _ in range(5):
        for a, b in zip(first, run(case, data, arch, template), strict=True):
            assert np.array_equal(a, b, equal_nan=True)


@pytest.mark.parametrize(("arch", "template"), KERNELS)
def test_maxima_that_keep_growing(arch, template):
    case = Case(1, 2, 140, 64, seqlen_kv=700, dtype="float16")
    data = cases.inputs(case)
    growth = np.linspace(15, 1, case.seqlen_kv)[:, None]  # keys are visited from the last to the first
    data = replace(
        data, q=cases.rounded(np.abs(data.q), "float16"), k=cases.rounded(np.abs(data.k) * growth, "float16")
    )
    check(case, data, arch, template)


@pytest.mark.parametrize(("arch", "template"), KERNELS)
def test_huge_scores_stay_finite(arch, template):
    case = Case(1, 2, 130, 64, seqlen_kv=640, dtype="float16", mask="causal")
    data = cases.inputs(case)
    data = replace(data, q=cases.rounded(data.q * 1e4, "float16"), k=cases.rounded(data.k * 1e4, "float16"))
    expected_lse = cases.expected(case, data)[1]
    out, lse = run(case, data, arch, template)
    assert np.isfinite(out).all()
    assert np.abs(lse / expected_lse - 1).max() <= 1e-5


@pytest.mark.parametrize(("arch", "template"), KERNELS)
@pytest.mark.parametrize("bad", (np.inf, -np.inf, np.nan))
@pytest.mark.parametrize("tensor_name", ("q", "k", "v"))
def test_inf_and_nan_stay_where_they_are_seen(tensor_name, bad, arch, template):
    case = Case(1, 2, 100, 64, dtype="float16", mask="causal")
    data = cases.inputs(case)
    poisoned = {n: getattr(data, n).copy() for n in "qkv"}
    poisoned[tensor_name][0, 0, 50 if tensor_name == "q" else 98, 7] = bad
    data = cases.Inputs(**poisoned, params={})
    expected, _ = cases.expected(case, data)
    out, _ = run(case, data, arch, template)
    clean = np.isfinite(expected)
    assert np.isfinite(out[clean]).all()
    assert np.abs(out - expected)[clean].max() <= 8 * cases.EPSILON["float16"] * np.abs(expected[clean]).max()


@pytest.mark.parametrize("length", (1, 2 * 3 * 40 - 1))
def test_a_short_lse_is_not_written(length):
    case = Case(2, 3, 40, 64, dtype="float16")
    _, lse = run(case, cases.inputs(case), "sm_80", "v2", lse_length=length)
    assert np.isnan(lse).all()
