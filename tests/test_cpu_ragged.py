"""The CPU's kernels of ragged sequences against float64, and what a sequence owes to its neighbours: nothing."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tvm_ffi

from schedules.definition.attention import Attention
from schedules.definition.catalogue import MASKS, SCORES
from schedules.definition.pattern import match
from schedules.families import cpu
from schedules.families.interface import RAGGED, RAGGED_BACKWARD, Program, Target
from schedules.toolchain import cpu as toolchain
from tests import ragged_cases
from tests.ragged_cases import RAGGED_CASES, RaggedCase
from tests.test_cpu_family import TEMPLATES, compile_for, runnable_isas, runtime
from tvm_flash.packs import sizes


@functools.cache
def kernel(dtype: str, isa: str = "", head_dim: int = 64, kind: str = RAGGED, **changes) -> tuple[Callable, tuple]:
    """``compute(values, sizes)`` and the parameters of the kernel that packs have."""
    isa = isa or runnable_isas()[0]
    pattern = match(Attention(SCORES["optional"], MASKS["window"])(head_dim, dtype, index_dtype=cpu.INDEX_DTYPE))
    target = Target("cpu", isa)
    config = replace(cpu.KINDS[kind].default_configs("v2", pattern, target)[0], **changes)
    program = TEMPLATES["v2"].apply(pattern, target, "kernel", config, kind)
    assert isinstance(program, Program), program
    compiled = compile_for(isa, program)
    with tempfile.TemporaryDirectory(dir=runtime().parent) as scratch:
        part, module = Path(scratch) / "kernel.o", runtime().parent / f"{Path(scratch).name}.so"
        compiled.mod.write_to_file(str(part), "o")
        toolchain.link_module([part], module, runtime())
        loaded = tvm_ffi.load_module(str(module))
    (launch,) = program.launches

    def compute(values, extents):
        shapes = {w.name: [sizes.evaluate(n, extents) for n in w.shape] for w in program.workspaces}
        made = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
        loaded[launch.symbol](*({**values, **made}[role] for role in launch.roles))

    return compute, pattern.params


def attend(case: RaggedCase, data, isa: str = "", **changes):
    compute, params = kernel(case.dtype, isa, **changes)
    return ragged_cases.run(case, data, compute, params)


@pytest.mark.parametrize("case", RAGGED_CASES, ids=lambda c: c.id)
def test_against_float64(case):
    data = ragged_cases.inputs(case)
    ragged_cases.check(case, data, *attend(case, data))


@pytest.mark.parametrize("case", RAGGED_CASES, ids=lambda c: c.id)
def test_gradients_against_float64(case):
    data, given = ragged_cases.inputs(case), ragged_cases.outer(case, with_dlse=case.heads > 2)
    compute, params = kernel(case.dtype, kind=RAGGED_BACKWARD)
    got = ragged_cases.run_backward(case, data, given, compute, params)
    ragged_cases.check_backward(case, data, given, got)
