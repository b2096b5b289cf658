"""Kernels over keys on pages, their CUDA sources run on the processor (tests/simt), against float64."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("tvm")
pytest.importorskip("torch")

from schedules.builder.suite import KernelSpec
from schedules.families.interface import PAGED, PAGED_DECODE
from tests import paged_trials, torch_cases
from tests.simt.defaults import default_kernel
from tvm_flash.packs.manifest import BUILTIN_DEFINITION

#: Arch, template, kind, head_dim, head_dim_v, mask, score, dtype: each family with each of its ways to copy.
KERNELS = (
    ("sm_80", "v2", PAGED_DECODE, 64, 64, "window", "identity", "bfloat16"),
    ("sm_90a", "v2", PAGED_DECODE, 128, 128, "window", "identity", "float16"),
    ("sm_90a", "v2", PAGED, 128, 128, "causal", "identity", "float16"),
    ("sm_80", "v2", PAGED_DECODE, 64, 64, "positioned", "optional_sinks", "bfloat16"),
    ("sm_80", "v2", PAGED, 64, 64, "positioned", "optional_sinks", "bfloat16"),
    ("sm_75", "v1", PAGED, 64, 64, "causal", "identity", "float16"),
    ("sm_70", "v1", PAGED, 64, 64, "full", "identity", "float16"),
)


@pytest.fixture(scope="module", params=KERNELS, ids=lambda k: "-".join(map(str, k)))
def kernel(request, tmp_path_factory):
    """A kernel's spec and parameters, and what runs it on CPU tensors by role."""
    arch, template, kind, head_dim, head_dim_v, mask, score, dtype = request.param
    spec = KernelSpec(template, BUILTIN_DEFINITION, mask, score, dtype, head_dim, head_dim_v, kind=kind)
    made = default_kernel(spec, arch, tmp_path_factory.mktemp(arch))
    compute = torch_cases.by_entry(made.entry, made.functions, "cpu")
    configure = made.simulated.configure
    return SimpleNamespace(
        spec=spec,
        params=made.pattern.params,
        compute=compute,
        configure=configure,
        entry=made.entry,
        functions=made.functions,
    )


def test_sequences_of_all_lengths(kernel):
    for label, problem in paged_trials.problems(kernel.spec, kernel.params):
        try:
            problem.check(*problem.run(kernel.compute, "cpu"), "cpu")
        except AssertionError as e:
            raise AssertionError(f"{label}: {e}") from e


def test_neighbours_and_places_of_pages_change_nothing(kernel):
    paged_trials.check_neighbours(kernel.spec, kernel.params, kernel.compute, "cpu")


HOPPERS = pytest.mark.parametrize(
    "kernel", [k for k in KERNELS if k[:3] == ("sm_90a", "v2", PAGED_DECODE)], indirect=True
)


@HOPPERS
def test_how_many_blocks_share_the_keys_changes_nothing(kernel):
    compute = forced(kernel, 0)
    many = dict(paged_trials.problems(kernel.spec, kernel.params))["many"]
    for problem in (paged_trials.neighbours(kernel.spec, kernel.params, page_size=24), many):
        found = []
        for multiprocessors in (1, 7, 50):  # of the last, most blocks have nothing to do
            kernel.configure(multiprocessors=multiprocessors)
            found.append(problem.run(compute, "cpu"))
        kernel.configure()
        problem.check(*found[0], "cpu")
        for other in found[1:]:
            assert all(map(np.array_equal, found[0], other))


@HOPPERS
def test_clusters_of_any_size_leave_the_bits_of_equal_shares(kernel):
    problem = paged_trials.neighbours(kernel.spec, kernel.params, page_size=24)
    right = problem.run(forced(kernel, 0), "cpu")
    problem.check(*right, "cpu")
    for runs in (1, 3, 8):
        assert all(map(np.array_equal, right, problem.run(forced(kernel, runs), "cpu"))), runs


def forced(kernel, runs: int):
    """What runs a kernel with clusters of so many blocks, or, if 0, with blocks that share all tiles."""
    own = {"runs": runs, "spread": int(runs == 0)}
    scalars = tuple(replace(x, value=own.get(x.name, x.value)) for x in kernel.entry.scalars)
    return torch_cases.by_entry(replace(kernel.entry, scalars=scalars), kernel.functions, "cpu")
