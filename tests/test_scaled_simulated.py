"""Kernels over caches of 8 bits, CUDA sources run on the processor (tests/simt), beside those of 16 bits."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("tvm")
pytest.importorskip("torch")

from schedules.builder.suite import KernelSpec
from schedules.families import family_of
from schedules.families.interface import Target
from tests import paged_trials, scaled_trials, torch_cases
from tests.simt.defaults import default_kernel
from tvm_flash.packs.manifest import BUILTIN_DEFINITION, SCALED_KINDS

#: Arch, kind, dtype: each way to copy, to widen, and where to.
KERNELS = (
    ("sm_80", "paged_decode_e4m3", "bfloat16"),
    ("sm_90a", "paged_decode_e4m3", "bfloat16"),
    ("sm_80", "paged_decode_int8", "bfloat16"),
    ("sm_80", "paged_e4m3", "bfloat16"),
    ("sm_75", "paged_int8", "float16"),
)
LEAN = ("sm_90a", "paged_decode_e4m3", "bfloat16", "lean")
HEAD_DIM = 64
#: Those of 16 bits are run on these: pages of several scales, rows of which the last 16 bytes aren't filled, none.
BESIDE = ("pages of 24", "grouped heads", "many")


@functools.cache
def simulated(arch, kind, dtype, folder, lean=False):
    """A kernel's entry, and what runs it; on Hopper also in the form of fewer instructions."""
    template = family_of(Target(arch)).TEMPLATES[-1]
    mask, score = "positioned", "optional_sinks"
    spec = KernelSpec(template, BUILTIN_DEFINITION, mask, score, dtype, HEAD_DIM, HEAD_DIM, kind=kind)
    own = folder / f"{arch}-{kind}{'-lean' * lean}"
    own.mkdir()
    made = default_kernel(spec, arch, own, **({"lean": True} if lean else {}))
    return SimpleNamespace(entry=made.entry, compute=torch_cases.by_entry(made.entry, made.functions, "cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("scaled")


@pytest.fixture(params=(*KERNELS, LEAN), ids="-".join)
def kernel(request, folder):
    *of, last = request.param
    return simulated(*of, folder, lean=True) if last == "lean" else simulated(*request.param, folder)


def test_trials(kernel):
    for trial in scaled_trials.trials(kernel.entry):
        try:
            trial.check(trial.run(kernel.compute, "cpu"), "cpu")
        except AssertionError as e:
            raise AssertionError(f"{trial.label}: {e}") from e


def test_the_bits_of_what_a_cache_stands_for(kernel, folder):
    entry = kernel.entry
    (kind,) = (kind for kind, scaled in SCALED_KINDS.items() if entry.kind in scaled.values())
    # Hopper's own kernels compute in another order.
    plain = simulated("sm_80" if entry.arch == "sm_90a" else entry.arch, kind, entry.dtype, folder)
    problems = dict(paged_trials.problems(entry, entry.params, *scaled_trials.of_cache(entry)))
    for label in BESIDE:
        problem = problems[label]
        found, right = problem.run(kernel.compute, "cpu"), problem.unscaled(plain.compute, "cpu")
        assert all(map(np.array_equal, found, right)), label
