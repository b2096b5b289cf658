"""Kernels of ragged sequences, their CUDA sources run on the processor (tests/simt), against float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("tvm")
pytest.importorskip("torch")

from schedules.builder.suite import KernelSpec
from schedules.families.interface import RAGGED
from tests import ragged_trials
from tests.simt.defaults import default_kernel
from tvm_flash.packs.manifest import BUILTIN_DEFINITION

#: Arch, template, head_dim, head_dim_v, mask, score, dtype: each family with each of its ways to multiply and to copy.
KERNELS = (
    ("sm_80", "v2", 64, 64, "full", "identity", "bfloat16"),
    ("sm_80", "v2", 128, 128, "causal", "identity", "float16"),
    ("sm_90a", "v2", 64, 64, "full", "identity", "bfloat16"),
    ("sm_90a", "v2", 128, 128, "window", "optional_sinks", "float16"),
    ("sm_80", "v2", 64, 64, "window", "optional_sinks", "bfloat16"),
    ("sm_75", "v1", 64, 64, "causal", "identity", "float16"),
    ("sm_70", "v1", 64, 64, "causal", "identity", "float16"),
)


@pytest.fixture(scope="module", params=KERNELS, ids=lambda k: "-".join(map(str, k)))
def kernel(request, tmp_path_factory):
    """A kernel's spec and parameters, and what runs it on CPU tensors by role."""
    arch, template, head_dim, head_dim_v, mask, score, dtype = request.param
    spec = KernelSpec(template, BUILTIN_DEFINITION, mask, score, dtype, head_dim, head_dim_v, kind=RAGGED)
    made = default_kernel(spec, arch, tmp_path_factory.mktemp(arch))
    roles, (function,) = made.program.launches[0].roles, made.functions

    def compute(values, problem):
        function(*(values[role] for role in roles))

    return SimpleNamespace(spec=spec, params=made.pattern.params, simulated=made.simulated, compute=compute)


def test_sequences_of_all_lengths(kernel):
    for label, problem in ragged_trials.problems(kernel.spec, kernel.params):
        try:
            problem.check(*problem.run(kernel.compute, "cpu"), "cpu")
        except AssertionError as e:
            raise AssertionError(f"{label}: {e}") from e


def test_neighbours_change_nothing(kernel):
    problem = ragged_trials.neighbours(kernel.spec, kernel.params)
    ragged_trials.check_neighbours(problem, kernel.compute, "cpu")


def test_more_sequences_than_two_looks_of_a_warp(kernel):
    if kernel.spec.head_dim > 64 or kernel.params:
        pytest.skip("they are found the same way")
    own = ragged_trials.own_case(kernel.spec, kernel.params, heads=1, kv_heads=1)
    results = ragged_trials.run_thousands(own, kernel.compute, "cpu", 1100)
    ragged_trials.check_thousands(results, "cpu")
