"""Kernels whose values are the first columns of keys, their CUDA sources run on the processor, against float64."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("tvm")
pytest.importorskip("torch")

from schedules.builder.suite import KernelSpec
from schedules.families.interface import PAGED_LATENT
from tests import latent_trials, torch_cases
from tests.simt.defaults import default_kernel
from tvm_flash.packs.manifest import BUILTIN_DEFINITION

#: dtype, head_dim, head_dim_v: that of DeepSeek's models, and one whose halves are three panels; who computes which
#: keys is the same in both, and tried in the first.
KERNELS = (("bfloat16", 576, 512), ("float16", 448, 384))
FIRST = pytest.mark.parametrize("kernel", KERNELS[:1], indirect=True)


@pytest.fixture(scope="module", params=KERNELS, ids=lambda k: "-".join(map(str, k)))
def kernel(request, tmp_path_factory):
    """A kernel's spec and parameters, and what runs it on CPU tensors by role."""
    dtype, head_dim, head_dim_v = request.param
    spec = KernelSpec("v2", BUILTIN_DEFINITION, "window", "identity", dtype, head_dim, head_dim_v, kind=PAGED_LATENT)
    made = default_kernel(spec, "sm_90a", tmp_path_factory.mktemp("latent"))
    compute = torch_cases.by_entry(made.entry, made.functions, "cpu")
    configure = made.simulated.configure
    return SimpleNamespace(spec=spec, params=made.pattern.params, compute=compute, configure=configure)


def test_sequences_of_all_lengths(kernel):
    for label, problem in latent_trials.problems(kernel.spec, kernel.params):
        try:
            problem.check(*problem.run(kernel.compute, "cpu"), "cpu")
        except AssertionError as e:
            raise AssertionError(f"{label}: {e}") from e


@FIRST
def test_neighbours_and_places_of_pages_change_nothing(kernel):
    latent_trials.check_neighbours(kernel.spec, kernel.params, kernel.compute, "cpu")


@FIRST
def test_how_many_blocks_share_the_keys_changes_nothing(kernel):
    many = dict(latent_trials.problems(kernel.spec, kernel.params))["several row tiles"]
    for problem in (latent_trials.neighbours(kernel.spec, kernel.params, page_size=24), many):
        found = []
        for multiprocessors in (1, 7, 50):  # of the last, most blocks have nothing to do
            kernel.configure(multiprocessors=multiprocessors)
            found.append(problem.run(kernel.compute, "cpu"))
        kernel.configure()
        problem.check(*found[0], "cpu")
        for other in found[1:]:
            assert all(map(np.array_equal, found[0], other))
