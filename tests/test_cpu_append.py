"""The CPU's kernels that turn and append, bit by bit, for each instruction set that this machine can run."""

from __future__ import annotations

import functools

import pytest

from schedules.builder.compile import pattern_of
from schedules.builder.suite import KernelSpec
from schedules.families.cpu import append
from schedules.families.interface import APPEND, Target
from schedules.templates import v2
from tests import append_trials
from tests.cpu_kernels import make, runnable_isas
from tvm_flash.packs.manifest import APPEND_ROLES, BUILTIN_DEFINITION


@functools.cache
def compute(isa: str, dtype: str):
    """What runs the kernel of a dtype."""
    target = Target("cpu", isa)
    spec = KernelSpec("v2", BUILTIN_DEFINITION, "full", "identity", dtype, 256, 256, kind=APPEND)
    program = append.program(pattern_of(spec, target), append.Config(), target, v2.TRAVERSAL, spec.symbol)
    kernel = make(isa, program)[spec.symbol]
    return lambda values, _: kernel(*(values[role] for role in APPEND_ROLES))


@pytest.mark.parametrize(
    ("isa", "dtype"),
    (*((runnable_isas()[0], x) for x in ("float32", "float16", "bfloat16")), (runnable_isas()[-1], "bfloat16")),
)
def test_all_bits_are_right(isa, dtype):
    for label, problem in append_trials.problems(dtype):
        try:
            problem.check(problem.run(compute(isa, dtype), "cpu"), "cpu")
        except AssertionError as e:
            raise AssertionError(f"{label}: {e}") from e
