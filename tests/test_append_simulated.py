"""Kernels that turn and append, their CUDA sources run on the processor (tests/simt), bit by bit."""

from __future__ import annotations

import pytest

pytest.importorskip("tvm")
pytest.importorskip("torch")

from schedules.builder.suite import KernelSpec
from schedules.families.interface import APPEND
from tests import append_trials, torch_cases
from tests.simt.defaults import default_kernel
from tvm_flash.packs.manifest import BUILTIN_DEFINITION

KERNELS = (("sm_90a", "v2", "bfloat16"), ("sm_80", "v2", "float16"), ("sm_70", "v1", "float16"))


@pytest.fixture(scope="module", params=KERNELS, ids="-".join)
def kernel(request, tmp_path_factory):
    arch, template, dtype = request.param
    spec = KernelSpec(template, BUILTIN_DEFINITION, "full", "identity", dtype, 256, 256, kind=APPEND)
    return default_kernel(spec, arch, tmp_path_factory.mktemp(arch))


@pytest.mark.parametrize("order", (0, 1))
def test_all_bits_are_right(kernel, order):
    compute = torch_cases.by_entry(kernel.entry, kernel.functions, "cpu")
    kernel.simulated.configure(order=order)
    for label, problem in append_trials.problems(kernel.spec.dtype):
        try:
            problem.check(problem.run(compute, "cpu"), "cpu")
        except AssertionError as e:
            raise AssertionError(f"{label}: {e}") from e
