"""Kernels that put their results into those of other keys, their CUDA sources run on the processor (tests/simt)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("tvm")
pytest.importorskip("torch")

import numpy as np

from schedules.builder.suite import KernelSpec
from schedules.families.interface import MERGED
from tests import cases, merged_trials, torch_cases
from tests.simt.defaults import default_kernel
from tests.torch_cases import own_case, shared_cases
from tvm_flash.packs.manifest import BUILTIN_DEFINITION, LAYOUT_OF_TEMPLATE

#: Arch, template, head_dim, mask, score, dtype: each family with each of its ways to multiply and to copy.
KERNELS = (
    ("sm_80", "v2", 64, "causal", "identity", "bfloat16"),
    ("sm_80", "v2", 256, "full", "identity", "float16"),  # pairs of warps
    ("sm_90a", "v2", 128, "causal", "identity", "bfloat16"),
)


@pytest.fixture(scope="module", params=KERNELS, ids=lambda k: "-".join(map(str, k)))
def kernel(request, tmp_path_factory):
    """A kernel's spec and parameters, and what runs it on CPU tensors by role."""
    arch, template, head_dim, mask, score, dtype = request.param
    spec = KernelSpec(template, BUILTIN_DEFINITION, mask, score, dtype, head_dim, head_dim, kind=MERGED)
    made = default_kernel(spec, arch, tmp_path_factory.mktemp(arch))
    params = made.pattern.params
    compute = torch_cases.by_abi(made.functions[0], params)
    return SimpleNamespace(spec=spec, params=params, compute=compute, layout=LAYOUT_OF_TEMPLATE[template])


def merged(kernel, case, data, state):
    """The result and its log-sum-exp."""
    return torch_cases.run(case, data, kernel.compute, kernel.layout, state=state)


def test_results_of_other_keys(kernel):
    """Twice the same bits."""
    whole = own_case(kernel, kv_heads=1, seqlen_q=150, seqlen_kv=213)
    for case in (*list(shared_cases(kernel.spec))[:1], whole):
        data = cases.inputs(case)
        state = merged_trials.state_of(case, data)
        results = merged(kernel, case, data, state)
        merged_trials.check(case, data, state, results)
        again = merged(kernel, case, data, state)
        assert all(np.array_equal(a, b) for a, b in zip(results, again, strict=True))


def test_no_keys_before(kernel):
    """Outputs that nobody has written aren't read, and rows that see nothing have none."""
    case = own_case(kernel, kv_heads=1, seqlen_q=90, seqlen_kv=70)
    data = cases.inputs(case)
    state = merged_trials.nothing(case)
    merged_trials.check(case, data, state, merged(kernel, case, data, state))
