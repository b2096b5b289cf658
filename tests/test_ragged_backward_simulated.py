"""Gradients of ragged sequences, their CUDA sources run on the processor (tests/simt), against float64."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("tvm")
pytest.importorskip("torch")

import torch

from schedules.builder.compile import pattern_of
from schedules.builder.suite import KernelSpec
from schedules.families.interface import RAGGED_BACKWARD, Rejected, Target
from schedules.families.sm90.backward import ragged
from tests import ragged_backward_trials, ragged_cases
from tests.gradient_cases import low_scores
from tests.simt.defaults import default_kernel
from tvm_flash.packs import sizes
from tvm_flash.packs.manifest import BUILTIN_DEFINITION

#: Arch, template, head_dim, head_dim_v, mask, score, dtype.
KERNELS = (
    ("sm_90a", "v2", 128, 128, "causal", "identity", "float16"),
    ("sm_90a", "v2", 64, 64, "window", "optional_sinks", "bfloat16"),
    ("sm_80", "v2", 64, 64, "causal", "identity", "bfloat16"),
    ("sm_75", "v1", 64, 64, "window", "optional_sinks", "float16"),
    ("sm_70", "v1", 128, 128, "full", "identity", "float16"),
)


@pytest.fixture(scope="module", params=KERNELS, ids=lambda k: "-".join(map(str, k)))
def kernel(request, tmp_path_factory):
    """What is known of a kernel, and what runs it on CPU tensors by role."""
    arch, template, head_dim, head_dim_v, mask, score, dtype = request.param
    spec = KernelSpec(template, BUILTIN_DEFINITION, mask, score, dtype, head_dim, head_dim_v, kind=RAGGED_BACKWARD)
    made = default_kernel(spec, arch, tmp_path_factory.mktemp(arch))
    program = made.program

    def compute(values, problem):
        extents = {**problem, **{s.name: sizes.evaluate(s.value, problem) for s in program.scalars}}
        workspaces = {}
        for w in program.workspaces:
            anything = 1 << 20 if w.dtype.startswith("int") else torch.nan
            shape = [sizes.evaluate(n, extents) for n in w.shape]
            workspaces[w.name] = torch.full(shape, 0 if w.zeroed else anything, dtype=getattr(torch, w.dtype))
        given = {**extents, **workspaces, **values}
        for launch, function in zip(program.launches, made.functions, strict=True):
            function(*(given[role] for role in launch.roles))

    dims = {"head_dim": head_dim, "head_dim_v": head_dim_v, "dtype": dtype}
    entry = SimpleNamespace(mask=mask, score=score, params=made.pattern.params, **dims)
    return SimpleNamespace(entry=entry, simulated=made.simulated, compute=compute)


def test_sequences_of_all_lengths(kernel):
    for number, case in enumerate(ragged_backward_trials.own_cases(kernel.entry)):
        if sum(case.queries) * sum(case.keys) > 1 << 18:
            continue  # for hardware
        data, given = ragged_cases.inputs(case), ragged_cases.outer(case, with_dlse=number % 2 == 1)
        got = ragged_cases.run_backward(case, data, given, kernel.compute, kernel.entry.params)
        try:
            ragged_cases.check_backward(case, data, given, got)
        except AssertionError as e:
            raise AssertionError(f"{case.id}: {e}") from e


def test_neighbours_change_nothing(kernel):
    ragged_backward_trials.check_neighbours(kernel.entry, kernel.compute, "cpu")


def test_keys_that_end_inside_of_a_block_where_scores_are_low(kernel):
    """Keys past a sequence's last one have scores of 0, whose weights are infinite there: nobody may use them."""
    case = ragged_backward_trials.neighbours(kernel.entry)
    data = low_scores(ragged_cases.inputs(case), case.dtype, -20.0 if case.dtype == "float16" else -100.0)
    given = ragged_cases.outer(case)
    got = ragged_cases.run_backward(case, data, given, kernel.compute, kernel.entry.params)
    ragged_cases.check_backward(case, data, given, got)


def test_any_order_of_turns(kernel):
    case = ragged_backward_trials.neighbours(kernel.entry)
    data, given = ragged_cases.inputs(case), ragged_cases.outer(case)
    results = []
    for order in (0, 1, 7):
        kernel.simulated.configure(order)
        results.append(ragged_cases.run_backward(case, data, given, kernel.compute, kernel.entry.params))
    kernel.simulated.configure()
    for other in results[1:]:
        assert all(np.array_equal(results[0][name], x) for name, x in other.items())


def test_refusals_say_why():
    target = Target("sm_90a")
    spec = KernelSpec("v2", BUILTIN_DEFINITION, "window", "optional", "float16", 64, 64, kind=RAGGED_BACKWARD)
    pattern = pattern_of(spec, target)
    config = ragged.Config(heads_first=True)
    refusal = ragged.feasible(pattern, config, target)
    assert isinstance(refusal, Rejected) and "heads_first" in refusal.reason
