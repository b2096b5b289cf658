"""Kernels that add gradients to float32 ones, their CUDA sources run on the processor (tests/simt), against float64."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("tvm")
pytest.importorskip("torch")

import numpy as np

from schedules.builder.suite import KernelSpec
from schedules.families.interface import BACKWARD_ACCUMULATE
from tests import cases, gradient_cases
from tests.gradient_cases import Kernel, outer
from tests.simt.defaults import default_kernel
from tests.torch_cases import own_case
from tvm_flash.packs.manifest import BUILTIN_DEFINITION, LAYOUT_OF_TEMPLATE

#: Arch, template, head_dim, mask, score, dtype: each family with each of its ways to end.
KERNELS = (
    ("sm_80", "v2", 64, "positioned", "optional", "bfloat16"),
    ("sm_90a", "v2", 64, "causal", "identity", "bfloat16"),  # sums of dq in memory
    ("sm_90a", "v2", 64, "window", "alibi", "float16"),
)


@pytest.fixture(scope="module", params=KERNELS, ids=lambda k: "-".join(map(str, k)))
def made(request, tmp_path_factory):
    """A kernel's spec and parameters, and what runs it."""
    arch, template, head_dim, mask, score, dtype = request.param
    spec = KernelSpec(template, BUILTIN_DEFINITION, mask, score, dtype, head_dim, head_dim, kind=BACKWARD_ACCUMULATE)
    made = default_kernel(spec, arch, tmp_path_factory.mktemp(arch))
    program, params = made.program, made.pattern.params
    roles = tuple(launch.roles for launch in program.launches)
    layout = LAYOUT_OF_TEMPLATE[template]
    kernel = Kernel(made.functions, roles, program.workspaces, params, layout, program.scalars)
    return SimpleNamespace(spec=spec, params=params, kernel=kernel)


@pytest.mark.parametrize(
    "sizes", [{"kv_heads": 1, "seqlen_q": 150, "seqlen_kv": 113}, {"seqlen_q": 40, "seqlen_kv": 300}], ids=str
)
def test_gradients_are_added_to_what_is_there(made, sizes):
    """In float32, to those of the inputs and of parameters; rows that see nothing are left alone; twice the same."""
    case = replace(own_case(made, **sizes), batch=2)
    data, given = cases.inputs(case), outer(case, with_dlse=True)
    once = gradient_cases.run(case, data, given, made.kernel, before=0.0)
    gradient_cases.check(case, data, given, once)
    several = gradient_cases.run(case, data, given, made.kernel, before=3.0)
    for name, x in once.items():
        np.testing.assert_allclose(several[name] - 3, x, rtol=0, atol=4e-6 * (3 + np.abs(x).max()))
    again = gradient_cases.run(case, data, given, made.kernel, before=3.0)
    assert all(np.array_equal(several[name], x) for name, x in again.items())
