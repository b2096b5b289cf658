"""Kernels over caches of 8 bits, CUDA sources run on the processor (tests/simt), beside those of 16 bits."""

from __future__ import annotations

import functools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("tvm")
pytest.importorskip("torch")

from schedules.builder.suite import KernelSpec
from schedules.families import family_of
from schedules.families.interface import Target
from schedules.families.sm90 import paged_scaled
from tests import paged_trials, scaled_trials, torch_cases
from tests.simt.defaults import default_kernel
from tvm_flash.packs.manifest import BUILTIN_DEFINITION, SCALED_KINDS

_ALL, _FEW = "positioned-optional_sinks", "window-identity"
#: Arch, kind, dtype, mask and score: each way to copy, to widen, and where to.
KERNELS = (
    ("sm_80", "paged_decode_e4m3", "bfloat16", _ALL),
    ("sm_90a", "paged_decode_e4m3", "bfloat16", _ALL),
    ("sm_80", "paged_decode_int8", "bfloat16", _ALL),
    ("sm_80", "paged_e4m3", "bfloat16", _ALL),
    ("sm_75", "paged_int8", "float16", _ALL),
)
#: Those of Hopper alone: keys on the left, without a kernel for few rows and with one, each of one format; and tiles
#: that a warpgroup widens.
OWN = (
    ("sm_90a", "paged_decode_e4m3", "bfloat16", _ALL),
    ("sm_90a", "paged_decode_int8", "float16", _FEW),
    ("sm_90a", "paged_e4m3", "bfloat16", _ALL),
)
HEAD_DIM = 64
#: Numbers that the run time gives their launches: a warp that takes all splits of a sequence, a block that does, and
#: the second launch for many splits.
CHOICES = ({"wide": 0, "few": 1, "blocks": 1}, {"blocks": 1, "short": 0, "long": 1})
#: Those of 16 bits are run on these: pages of several scales, rows of which the last 16 bytes aren't filled, none.
BESIDE = ("pages of 24", "grouped heads", "many")


@functools.cache
def simulated(arch, kind, dtype, formula, folder, own=False, wide_warps=8):
    """A kernel's entry, and what runs it; ``own``: in the form that Hopper alone has, with blocks of ``wide_warps``."""
    template = family_of(Target(arch)).TEMPLATES[-1]
    spec = KernelSpec(template, BUILTIN_DEFINITION, *formula.split("-"), dtype, HEAD_DIM, HEAD_DIM, kind=kind)
    place = folder / f"{arch}-{kind}-{dtype}-{formula}{'-own' * own}-{wide_warps}"
    place.mkdir()
    changes = {}
    if arch == "sm_90a" and kind.startswith("paged_decode"):
        changes = {"transposed": own, "wide_warps": wide_warps}
        if own and kind.endswith("int8"):  # a ring of which places have K and V in turn
            changes["num_stages"] = 3
    elif own:
        changes = {"configs": lambda *of: {0: paged_scaled.KINDS[kind].widened(*of)}}
    made = default_kernel(spec, arch, place, **changes)
    compute = torch_cases.by_entry(made.entry, made.functions, "cpu")
    return SimpleNamespace(entry=made.entry, functions=made.functions, compute=compute)


def chosen(kernel, numbers: dict[str, int]):
    """The same kernel with other numbers in the place of the run time's."""
    scalars = tuple(replace(x, value=numbers.get(x.name, x.value)) for x in kernel.entry.scalars)
    entry = replace(kernel.entry, scalars=scalars)
    return SimpleNamespace(entry=entry, compute=torch_cases.by_entry(entry, kernel.functions, "cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("scaled")


@pytest.fixture(
    params=[*((x, False) for x in KERNELS), *((x, True) for x in OWN)],
    ids=lambda x: "-".join(x[0]) + "-own" * x[1],
)
def kernel(request, folder):
    of, own = request.param
    return simulated(*of, folder, own)


def test_trials(kernel):
    for trial in scaled_trials.trials(kernel.entry):
        try:
            trial.check(trial.run(kernel.compute, "cpu"), "cpu")
        except AssertionError as e:
            raise AssertionError(f"{trial.label}: {e}") from e


def test_the_bits_of_what_a_cache_stands_for(kernel, folder):
    entry = kernel.entry
    (kind,) = (kind for kind, scaled in SCALED_KINDS.items() if entry.kind in scaled.values())
    # Hopper's own kernels that decode compute in another order.
    arch = "sm_80" if entry.arch == "sm_90a" and paged_trials.decodes(entry) else entry.arch
    plain = simulated(arch, kind, entry.dtype, f"{entry.mask}-{entry.score}", folder)
    problems = dict(paged_trials.problems(entry, entry.params, *scaled_trials.of_cache(entry)))
    for label in BESIDE:
        problem = problems[label]
        found, right = problem.run(kernel.compute, "cpu"), problem.unscaled(plain.compute, "cpu")
        assert all(map(np.array_equal, found, right)), label


@pytest.mark.parametrize("numbers", CHOICES, ids=lambda x: "-".join(f"{n}{v}" for n, v in x.items()))
@pytest.mark.parametrize("wide_warps", (8, 2))
def test_which_warps_compute_a_split_makes_no_difference(folder, numbers, wide_warps):
    """Tiles of a split in one go or in several; warps with columns for one product or for two."""
    changes = () if wide_warps == 8 else (wide_warps,)
    kernel = simulated("sm_90a", "paged_decode_int8", "float16", _FEW, folder, True, *changes)
    assert kernel.entry.launches[2].when == "wide"
    make, _ = scaled_trials.of_cache(kernel.entry)
    own = scaled_trials.own_case(kernel.entry, kernel.entry.params, heads=2, kv_heads=1)
    for page_size in (16, 12):  # in boxes, and row by row
        problem = make(own, ((4, 90), (1, 700), (2, 2200)), page_size=page_size)  # up to 8 rows
        found, right = (problem.run(x.compute, "cpu") for x in (chosen(kernel, numbers), kernel))
        assert all(map(np.array_equal, found, right)), page_size
