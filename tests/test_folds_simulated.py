"""Splits of the keys that Hopper's decoding kernels fold: whoever does it, rows have the same bits.

CUDA sources run on the processor (tests/simt), against float64: batches in which a block computes one split of a row's
keys, some of them, or all.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("tvm")
pytest.importorskip("torch")

from schedules.builder.suite import KernelSpec
from schedules.families.interface import DECODE
from tests import cases, forward_trials, torch_cases
from tests.cases import Case
from tests.simt import simulate
from tests.simt.defaults import default_kernel
from tvm_flash.packs.manifest import BUILTIN_DEFINITION

#: Heads of keys of the largest batch.
MOST_UNITS = 44


#: What blocks of a cluster meet at.
BARRIERS = r"tvm_builtin_ptx_barrier_cluster_\w+"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Decoding of contiguous keys, and what runs it on CPU tensors; the columns are no whole shares of warps."""
    spec = KernelSpec("v2", BUILTIN_DEFINITION, "window", "identity", "float16", 96, 96, kind=DECODE)
    kernel = default_kernel(spec, "sm_90a", tmp_path_factory.mktemp("dense"), places=BARRIERS)
    return kernel, torch_cases.by_entry(kernel.entry, kernel.functions, "cpu")


def test_a_sequence_has_the_same_bits_in_batches_of_any_size(dense):
    kernel, compute = dense
    chosen = set()

    def noted(values, problem):
        extents = kernel.entry.extents(problem)
        chosen.add((extents["run"], extents["spread"]))
        compute(values, problem)

    for trial in forward_trials.runs(kernel.entry, MOST_UNITS):
        assert trial.check(trial.run(noted, "cpu"), "cpu") <= 1, trial.label
    assert {spread for _, spread in chosen} == {0, 1}
    assert len({run for run, spread in chosen if not spread}) > 1


CASE = Case(1, 4, 1, 96, kv_heads=2, seqlen_kv=600, dtype="float16", mask="window")


@pytest.mark.parametrize("left", [1 << 20, 150])  # of the latter, the first splits see nothing
def test_runs_of_all_lengths_leave_the_same_bits(dense, left):
    kernel, _ = dense
    data = replace(cases.inputs(CASE), params={"window_left": left, "window_right": 0})
    splits = -(-CASE.seqlen_kv // 64)
    found = []
    for spread, run in itertools.product((1, 0), range(1, splits + 1)):
        own = {"split_length": 64, "run": run, "spread": spread, "several": 0, "read_once": spread}
        found.append(torch_cases.run(CASE, data, lambda x, _, own=own: kernel.simulated(x | own, "bshd"), "bshd"))
        assert torch_cases.check(CASE, data, *found[-1]) <= 1
        assert all(map(np.array_equal, found[0], found[-1])), f"{run} splits of {splits}, {spread=}"


def test_blocks_of_several_heads_of_keys_leave_the_same_bits(dense):
    kernel, _ = dense
    case = replace(CASE, batch=3, heads=6)
    data = replace(cases.inputs(case), params={"window_left": 150, "window_right": 0})
    found = []
    for several in (1, 2, 4, 6):
        own = {"split_length": 128, "run": 5, "spread": 0, "several": several, "few": 0, "read_once": 0}
        found.append(torch_cases.run(case, data, lambda x, _, own=own: kernel.simulated(x | own, "bshd"), "bshd"))
        assert torch_cases.check(case, data, *found[-1]) <= 1
        assert all(map(np.array_equal, found[0], found[-1])), f"{several} heads of keys"


@pytest.mark.parametrize(("heads", "own_places"), [(20, range(4)), (4, range(4, 8))], ids=["many rows", "few rows"])
def test_no_barrier_of_a_cluster_can_be_left_out(dense, heads, own_places):
    """Of the kernel for so many rows a key; those of the other one are never come to."""
    kernel, _ = dense
    case = replace(CASE, heads=heads)
    data = replace(cases.inputs(case), params={"window_left": 1 << 20, "window_right": 0})
    own = {"split_length": 64, "run": 3, "spread": 0, "several": 0, "read_once": 0}

    def error() -> float:
        """Of a run, by what is allowed."""
        try:
            found = torch_cases.run(case, data, lambda x, _: kernel.simulated(x | own, "bshd"), "bshd")
            return torch_cases.check(case, data, *found)
        except (RuntimeError, AssertionError):  # refused, or not a number
            return np.inf

    names = simulate.with_places(kernel.lowered.text, BARRIERS)[1]
    assert len(names) == 8
    try:
        for place in range(-1, len(names)):
            kernel.simulated.configure(faulty_place=place)
            assert (error() <= 1) == (place not in own_places), names[place]
    finally:
        kernel.simulated.configure()
