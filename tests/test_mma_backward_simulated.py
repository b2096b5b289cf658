"""The backward of the mma.sync families, its CUDA sources run on the processor (tests/simt), against float64."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("tvm")
pytest.importorskip("torch")

import numpy as np

from schedules.builder.suite import KernelSpec
from schedules.families.interface import BACKWARD
from schedules.families.mma.backward import joint
from schedules.families.mma.backward.joint_machine import JointMachine
from tests import cases
from tests.gradient_cases import Kernel, check, outer, run
from tests.simt.defaults import default_kernel
from tests.torch_cases import own_case, shared_cases
from tvm_flash.packs.manifest import BUILTIN_DEFINITION, LAYOUT_OF_TEMPLATE

#: Arch, template, head_dim, head_dim_v, mask, score, dtype.
KERNELS = (
    ("sm_80", "v2", 64, 64, "full", "identity", "bfloat16"),
    ("sm_80", "v1", 128, 128, "causal", "identity", "float16"),
    ("sm_80", "v2", 64, 64, "positioned", "optional_sinks", "float16"),
    ("sm_75", "v1", 64, 64, "window", "softcap", "float16"),
    ("sm_70", "v1", 64, 64, "positioned", "optional", "float16"),
    ("sm_70", "v1", 128, 128, "causal", "identity", "float16"),  # pairs of warps on Volta
    ("sm_80", "v2", 192, 128, "sink_window", "identity", "bfloat16"),  # pairs of warps, a mask with gaps
)


#: For tests that need rows and keys that don't see each other.
CAUSAL = pytest.mark.parametrize(
    "made_kernel", [k for k in KERNELS if "causal" in k], ids=lambda k: k[0], indirect=True
)


def made(arch, template, head_dim, head_dim_v, mask, score, dtype, folder, **changes):
    """A kernel that runs on CPU tensors; ``changes`` of its configuration."""
    spec = KernelSpec(template, BUILTIN_DEFINITION, mask, score, dtype, head_dim, head_dim_v, kind=BACKWARD)
    default = default_kernel(spec, arch, folder, **changes)
    roles, params = tuple(launch.roles for launch in default.program.launches), default.pattern.params
    layout, program = LAYOUT_OF_TEMPLATE[template], default.program
    kernel = Kernel(default.functions, roles, program.workspaces, params, layout, program.scalars)
    return SimpleNamespace(spec=spec, params=params, simulated=default.simulated, kernel=kernel)


@pytest.fixture(scope="module", params=KERNELS, ids=lambda k: "-".join(map(str, k)))
def made_kernel(request, tmp_path_factory):
    return made(*request.param, tmp_path_factory.mktemp("backward"))


def test_the_shared_cases(made_kernel):
    for number, case in enumerate(shared_cases(made_kernel.spec)):
        data, given = cases.inputs(case), outer(case, with_dlse=number % 2 == 1)
        check(case, data, given, run(case, data, given, made_kernel.kernel))


def case_of(made_kernel, **sizes):
    """A case of a kernel's own kind and full width, and its inputs."""
    case = own_case(made_kernel, **sizes)
    case = replace(case, batch=2)
    return case, cases.inputs(case)


def test_grouped_heads_ragged_lengths_and_every_order_of_turns(made_kernel):
    """Lengths that divide no tile, rows that see nothing where the mask has such, and a gradient of lse."""
    case, data = case_of(made_kernel, kv_heads=1, seqlen_q=250, seqlen_kv=213)
    given = outer(case, with_dlse=True)
    results = []
    for order in (0, 1, 7):
        made_kernel.simulated.configure(order)
        results.append(run(case, data, given, made_kernel.kernel))
    made_kernel.simulated.configure()
    check(case, data, given, results[0])
    for other in results[1:]:
        assert all(np.array_equal(results[0][name], x) for name, x in other.items())


@pytest.mark.parametrize(
    ("mask", "changes"),
    [
        ("full", {"ahead": True, "early": True}),
        ("causal", {"num_warps": 8, "block_m": 64, "min_blocks_per_sm": 1, "warps_per_tile": 2, "told_tiles": 1}),
        ("causal", {}),
    ],
    ids=["full", "causal-pairs", "causal"],
)
@pytest.mark.parametrize("shared_from", [1, joint.SHARED_FROM], ids=["shared", "whole"])
def test_the_joint_launch(mask, changes, shared_from, tmp_path, monkeypatch):
    """Sums of dq go through memory from block to block, in an order that doesn't depend on whose turn it is; those of
    dk and dv too, where heads of a group have blocks of their own."""
    monkeypatch.setattr(joint, "SHARED_FROM", shared_from)
    monkeypatch.setattr(JointMachine, "many", 3)  # a block that visits more tells of every other tile by default
    kernel = made("sm_80", "v1", 64, 64, mask, "identity", "float16", tmp_path, joint=True, **changes)
    assert len(kernel.kernel.functions) == 2
    case, data = case_of(kernel, kv_heads=1, seqlen_q=140, seqlen_kv=270)
    given = outer(case, with_dlse=True)
    results = []
    for order in (0, 7):
        kernel.simulated.configure(order)
        results.append(run(case, data, given, kernel.kernel))
    check(case, data, given, results[0])
    assert all(np.array_equal(results[0][name], x) for name, x in results[1].items())
    if mask == "causal":
        case, data = case_of(kernel, kv_heads=1, seqlen_q=150, seqlen_kv=70)
        given = outer(case)
        check(case, data, given, run(case, data, given, kernel.kernel))


def test_a_smaller_head_dim_and_values_of_another(made_kernel):
    case, data = case_of(made_kernel, kv_heads=1, seqlen_q=70, seqlen_kv=130)
    case = replace(case, head_dim=40, head_dim_v=24)
    data = cases.inputs(case)
    given = outer(case)
    check(case, data, given, run(case, data, given, made_kernel.kernel))


@CAUSAL
def test_what_rows_that_see_nothing_hold(made_kernel):
    """Their queries and gradients may be anything: nobody's gradient has any of it."""
    case, data = case_of(made_kernel, kv_heads=1, seqlen_q=150, seqlen_kv=70)
    given, known = outer(case), cases.expected(case, data)
    clean = run(case, data, given, made_kernel.kernel, known)
    for bad in (np.nan, np.inf):
        q, dout = data.q.copy(), given.dout.copy()
        q[:, :, :80], dout[:, :, :80] = bad, -bad
        got = run(case, replace(data, q=q), replace(given, dout=dout), made_kernel.kernel, known)
        assert all(np.array_equal(clean[name], x) for name, x in got.items())


@CAUSAL
def test_keys_that_are_not_seen_may_be_anything(made_kernel):
    """A key and a value past every query's diagonal: no gradient has any of them."""
    case, data = case_of(made_kernel, kv_heads=1, seqlen_q=150, seqlen_kv=150)
    given, known = outer(case), cases.expected(case, data)
    clean = run(case, data, given, made_kernel.kernel, known)
    k, v = data.k.copy(), data.v.copy()
    k[:, :, 140], v[:, :, 140] = np.nan, np.nan
    got = run(case, replace(data, k=k, v=v), given, made_kernel.kernel, known)
    assert np.array_equal(clean["dk"][:, :, :128], got["dk"][:, :, :128])
    assert np.array_equal(clean["dv"][:, :, :128], got["dv"][:, :, :128])
    assert np.array_equal(clean["dq"][:, :, :128], got["dq"][:, :, :128])
