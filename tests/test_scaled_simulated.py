"""Decoding over caches of 8 bits, CUDA sources run on the processor (tests/simt), beside that of 16 bits."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest

pytest.importorskip("tvm")
pytest.importorskip("torch")


from schedules.builder.compile import entry_of, lower, pattern_of
from schedules.builder.suite import KernelSpec
from schedules.families import maker_of
from schedules.families.interface import PAGED_DECODE, Target
from tests import paged_cases, ragged_cases, torch_cases
from tests.paged_cases import PagedCase
from tests.ragged_cases import RaggedCase
from tests.scaled_cases import as_kernels_take, quantised
from tests.simt.simulate import Simulated
from tvm_flash.packs.manifest import BUILTIN_DEFINITION

#: Arch, kind, cache: each way to widen.  The kernel of 16 bits is one for all, since archs differ in nothing here.
KERNELS = (
    ("sm_80", "paged_decode_e4m3", "float8_e4m3fn"),
    ("sm_90a", "paged_decode_e4m3", "float8_e4m3fn"),
    ("sm_80", "paged_decode_int8", "int8"),
)
HEAD_DIM, DTYPE = 64, "bfloat16"
CASES = (
    PagedCase(RaggedCase((1, 3, 1, 0, 2), 4, 64, (65, 130, 0, 9, 2100), kv_heads=2, after=(2, 0)), 16, 1),
    PagedCase(RaggedCase((1, 2), 2, 40, (33, 100), head_dim_v=24, mask="causal"), 7, strides="heads"),
)


@functools.cache
def compute_of(arch, kind, folder):
    spec = KernelSpec("v2", BUILTIN_DEFINITION, "positioned", "optional", DTYPE, HEAD_DIM, HEAD_DIM, kind=kind)
    target = Target(arch)
    pattern = pattern_of(spec, target)
    config = maker_of(target, kind).default_configs("v2", pattern, target)[0]
    lowered = lower(spec, pattern, target, config)
    own = folder / f"{arch}-{kind}"
    own.mkdir()
    simulated = Simulated(lowered.program, lowered.text, own)
    functions = [simulated.module[launch.symbol] for launch in lowered.program.launches]
    entry = entry_of(spec, target, pattern, lowered, "default", {})
    return torch_cases.by_entry(entry, functions, "cpu"), pattern.params


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("scaled")


@pytest.mark.parametrize(("arch", "kind", "cache"), KERNELS)
def test_the_bits_of_what_a_cache_stands_for(arch, kind, cache, folder):
    kernels = [compute_of("sm_80", PAGED_DECODE, folder), compute_of(arch, kind, folder)]
    for i, case in enumerate(CASES):
        case = replace(case, of=replace(case.of, dtype=DTYPE))
        data = ragged_cases.inputs(case.of)
        scaled, plain = quantised(case, data, cache, bool(i))
        found = []
        for (compute, params), own in zip(kernels, (plain, as_kernels_take(case, scaled)), strict=True):

            def run(values, extents, own=own, compute=compute):
                compute({**values, **own}, extents)

            found.append(paged_cases.run(case, data, run, params))
        for x, y in zip(*found, strict=True):
            assert (x == y).all()
