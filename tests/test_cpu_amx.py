"""Kernels for AMX compute the shared cases on any processor, its instructions emulated (tests/amx)."""

from __future__ import annotations

import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("tvm")
pytest.importorskip("torch")

import numpy as np
import tvm_ffi

from schedules.builder.compile import pattern_of
from schedules.builder.suite import KernelSpec
from schedules.definition.operator import SCALES
from schedules.families import cpu, maker_of
from schedules.families.interface import BACKWARD, PAGED, RAGGED
from tests import cases, gradient_cases, paged_cases, ragged_cases, scaled_cases, shared, torch_cases
from tests.amx import emulate
from tests.cases import CASES, Case
from tests.cpu_kernels import TEMPLATES
from tests.torch_cases import attend, own_case
from tvm_flash.packs.manifest import BUILTIN_DEFINITION, CACHE_OF_KIND, LAYOUT_OF_TEMPLATE

#: Template, head_dim, head_dim_v, mask, score, and what differs from the default configuration.
KERNELS = (
    ("v1", 64, 64, "causal", "identity", {}),
    ("v2", 64, 64, "causal", "identity", {"block_m": 64, "block_n": 32}),
    ("v1", 64, 64, "full", "identity", {"block_n": 64}),
    ("v2", 64, 64, "window", "softcap", {}),
    ("v1", 64, 64, "padded", "identity", {}),
    ("v2", 128, 128, "causal", "identity", {}),
    ("v1", 40, 56, "full", "identity", {}),  # neither is whole tiles
    ("v2", 72, 104, "causal", "identity", {"block_n": 32}),
    ("v1", 256, 256, "causal", "identity", {}),
)


def _id(kernel):
    return "-".join(map(str, (*kernel[:-1], *kernel[-1].values())))


@functools.cache
def made(number):
    """The spec and the function of one of ``KERNELS``: a test that has its own selection of them builds none again."""
    template, head_dim, head_dim_v, mask, score, changes = KERNELS[number]
    spec = KernelSpec(template, BUILTIN_DEFINITION, mask, score, "bfloat16", head_dim, head_dim_v)
    pattern = pattern_of(spec, emulate.TARGET)
    config = replace(cpu.default_configs(template, pattern, emulate.TARGET)[0], **changes)
    folder = shared.once(f"amx_{number}", lambda folder: emulate.build(spec, pattern, config, folder))
    function = tvm_ffi.load_module(str(folder / f"{spec.symbol}.so"))[spec.symbol]
    return SimpleNamespace(spec=spec, params=pattern.params, function=function)


@pytest.fixture(scope="module", params=KERNELS, ids=_id)
def kernel(request):
    """A kernel's spec and its function."""
    return made(KERNELS.index(request.param))


def test_the_shared_cases(kernel):
    spec = kernel.spec
    for case in CASES:
        fits = case.head_dim <= spec.head_dim and case.head_dim_v <= spec.head_dim_v
        if fits and (case.dtype, case.mask, case.score) == (spec.dtype, spec.mask, spec.score):
            data = cases.inputs(case)
            torch_cases.check(case, data, *attend(kernel, case, data))


@pytest.mark.parametrize("seqlen_kv", (32, 128, 256, 257, 287))
def test_full_width(kernel, seqlen_kv):
    case = own_case(kernel, kv_heads=1, seqlen_q=97, seqlen_kv=seqlen_kv)
    data = cases.inputs(case)
    torch_cases.check(case, data, *attend(kernel, case, data))


@pytest.mark.parametrize("kernel", [k for k in KERNELS if "causal" in k], ids=_id, indirect=True)
@pytest.mark.parametrize(("tensor", "bad"), (("q", np.inf), ("k", np.nan), ("v", np.inf), ("v", np.nan)))
def test_inf_and_nan_stay_in_the_rows_that_see_them(kernel, tensor, bad):
    case = own_case(kernel, seqlen_q=100, seqlen_kv=100)
    clean = cases.inputs(case)
    data = replace(clean, **{tensor: getattr(clean, tensor).copy()})
    getattr(data, tensor)[0, 0, 70, 7] = bad
    # From the diagonal on; float64 with its products of 0 and infinity would not say so of V.
    seeing = (0, 0, slice(70, 71 if tensor == "q" else None))
    out, lse = attend(kernel, case, data)
    assert not np.isfinite(out[seeing]).all(axis=-1).any()
    expected, expected_lse = cases.expected(case, clean)
    out[seeing], lse[seeing] = expected[seeing], expected_lse[seeing]
    torch_cases.check(case, clean, out, lse)


def test_ragged_sequences(tmp_path):
    spec = KernelSpec("v2", BUILTIN_DEFINITION, "window", "optional", "bfloat16", 64, 64, kind=RAGGED)
    pattern = pattern_of(spec, emulate.TARGET)
    config = cpu.ragged.default_configs("v2", pattern, emulate.TARGET)[0]
    function = tvm_ffi.load_module(str(emulate.build(spec, pattern, config, tmp_path)))[spec.symbol]
    roles = (*("q", "k", "v", "o", "lse"), *ragged_cases.STARTS, "softmax_scale", *(p.name for p in pattern.params))
    for case in ragged_cases.RAGGED_CASES:
        if case.dtype == "bfloat16":
            data = ragged_cases.inputs(case)
            compute = lambda values, _: function(*(values[role] for role in roles))  # noqa: E731
            ragged_cases.check(case, data, *ragged_cases.run(case, data, compute, pattern.params))


def paged_kernel(kind):
    """What runs a kernel whose keys are on pages, and its parameters; it is compiled once."""
    spec = KernelSpec("v2", BUILTIN_DEFINITION, "positioned", "optional", "bfloat16", 64, 64, kind=kind)
    pattern = pattern_of(spec, emulate.TARGET)
    config = maker_of(emulate.TARGET, kind).default_configs("v2", pattern, emulate.TARGET)[0]
    folder = shared.once(f"amx_{kind}", lambda folder: emulate.build(spec, pattern, config, folder))
    function = tvm_ffi.load_module(str(folder / f"{spec.symbol}.so"))[spec.symbol]
    where = ("cu_seqlens_q", "seqlens_k", "page_table", *(SCALES if kind != PAGED else ()), "softmax_scale")
    roles = ("q", "k", "v", "o", "lse", *where, *(p.name for p in pattern.params))
    return (lambda values, _: function(*(values[role] for role in roles))), pattern.params


def test_keys_on_pages():
    compute, params = paged_kernel(PAGED)
    for case in paged_cases.PAGED_CASES:
        if case.of.dtype == "bfloat16":
            data = ragged_cases.inputs(case.of)
            paged_cases.check(case, data, *paged_cases.run(case, data, compute, params))


@pytest.mark.parametrize("cache", scaled_cases.CACHES)
def test_caches_of_8_bits_give_the_bits_of_what_they_stand_for(cache):
    kind = next(k for k, dtype in CACHE_OF_KIND.items() if dtype == cache)
    kernels = paged_kernel(PAGED), paged_kernel(kind)
    for i, case in enumerate(c for c in paged_cases.PAGED_CASES if c.of.dtype == "bfloat16"):
        data = ragged_cases.inputs(case.of)
        scaled, plain = scaled_cases.quantised(case, data, cache, bool(i % 2))
        found = []
        for (compute, params), own in zip(kernels, (plain, scaled_cases.as_kernels_take(case, scaled)), strict=True):
            run = lambda values, sizes, own=own, compute=compute: compute({**values, **own}, sizes)  # noqa: E731
            found.append(paged_cases.run(case, data, run, params))
        for x, y in zip(*found, strict=True):
            assert np.array_equal(x, y)


#: The same of backward kernels: of any lengths, sinks and a score with a choice, and widths that aren't whole tiles.
BACKWARD_KERNELS = (
    ("v1", 64, 64, "positioned", "optional_sinks", {}),
    ("v2", 40, 56, "causal", "identity", {"block_m": 32, "block_n": 96}),
)


#: Beside the shared cases: more keys than a tile has, which are no whole blocks.
OWN_GRADIENTS = tuple(
    Case(1, 4, 97, 40, kv_heads=2, seqlen_kv=seqlen_kv, head_dim_v=56, dtype="bfloat16", mask="causal")
    for seqlen_kv in (97, 290)
)


@pytest.mark.parametrize("kernel", BACKWARD_KERNELS, ids=_id)
def test_gradients(kernel, tmp_path):
    template, head_dim, head_dim_v, mask, score, changes = kernel
    spec = KernelSpec(template, BUILTIN_DEFINITION, mask, score, "bfloat16", head_dim, head_dim_v, kind=BACKWARD)
    pattern = pattern_of(spec, emulate.TARGET)
    config = replace(cpu.backward.default_configs(template, pattern, emulate.TARGET)[0], **changes)
    module = tvm_ffi.load_module(str(emulate.build(spec, pattern, config, tmp_path)))
    program = TEMPLATES[template].apply(pattern, emulate.TARGET, spec.symbol, config, BACKWARD)
    roles = tuple(launch.roles for launch in program.launches)
    layout = LAYOUT_OF_TEMPLATE[template]
    one = gradient_cases.Kernel((module[spec.symbol],), roles, program.workspaces, pattern.params, layout)
    tried = 0
    for case in (*CASES, *OWN_GRADIENTS):
        fits = case.head_dim <= head_dim and case.head_dim_v <= head_dim_v and case.dtype == "bfloat16"
        if fits and (mask == "positioned" or (case.mask, case.score) == (mask, score)) and case.mask != "sink_window":
            data, given = cases.inputs(case), gradient_cases.outer(case, case.batch > 1)
            got = gradient_cases.run(case, data, given, one)
            gradient_cases.check(case, data, given, {n: x for n, x in got.items() if n in gradient_cases.SUMS})
            tried += 1
    assert tried


def test_repeats_are_bit_equal(kernel):
    case = own_case(kernel, seqlen_q=130, seqlen_kv=200)
    data = cases.inputs(case)
    for one, other in zip(attend(kernel, case, data), attend(kernel, case, data), strict=True):
        assert np.array_equal(one, other, equal_nan=True)
