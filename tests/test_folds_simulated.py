"""Splits of the keys that Hopper's decoding kernels fold: whoever does it, rows have the same bits.

CUDA sources run on the processor (tests/simt), against float64: batches in which a block computes one split of a row's
keys, some of them, or all.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("tvm")
pytest.importorskip("torch")

from schedules.builder.suite import KernelSpec
from schedules.families.interface import DECODE
from tests import cases, forward_trials, torch_cases
from tests.cases import Case
from tests.simt.defaults import default_kernel
from tvm_flash.packs.manifest import BUILTIN_DEFINITION

#: Heads of keys of the largest batch.
MOST_UNITS = 44


def made(kind: str, head_dim: int, dtype: str, folder):
    """A kernel and what runs it on CPU tensors."""
    spec = KernelSpec("v2", BUILTIN_DEFINITION, "window", "identity", dtype, head_dim, head_dim, kind=kind)
    kernel = default_kernel(spec, "sm_90a", folder)
    return kernel, torch_cases.by_entry(kernel.entry, kernel.functions, "cpu")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Decoding of contiguous keys, at a size whose kernels compute runs."""
    return made(DECODE, 96, "float16", tmp_path_factory.mktemp("dense"))


def test_a_sequence_has_the_same_bits_in_batches_of_any_size(dense):
    kernel, compute = dense
    chosen = set()

    def noted(values, problem):
        chosen.add(kernel.entry.extents(problem)["share_length"])
        compute(values, problem)

    for trial in forward_trials.runs(kernel.entry, MOST_UNITS):
        assert trial.check(trial.run(noted, "cpu"), "cpu") <= 1, trial.label
    assert len(chosen) > 1


@pytest.mark.parametrize("left", [1 << 20, 150])  # of the latter, the first splits see nothing
def test_runs_of_all_lengths_leave_the_same_bits(dense, left):
    kernel, _ = dense
    case = Case(1, 4, 1, 96, kv_heads=2, seqlen_kv=600, dtype="float16", mask="window")
    data = replace(cases.inputs(case), params={"window_left": left, "window_right": 0})
    splits = -(-case.seqlen_kv // 64)
    found = []
    for share, kept in [*((n, 16) for n in range(1, 2 * splits + 1)), (2 * splits, 1), (7, 2), (splits, 3)]:
        numbers = {"share_length": share, "run_length": kept}
        found.append(
            torch_cases.run(case, data, lambda x, _, numbers=numbers: kernel.simulated(x | numbers, "bshd"), "bshd")
        )
        assert torch_cases.check(case, data, *found[-1]) <= 1
        assert all(map(np.array_equal, found[0], found[-1])), f"{numbers} of {splits}"
