"""Kernels of the mma.sync families compute the shared cases, their CUDA sources run on the processor (tests/simt)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("tvm")
pytest.importorskip("torch")

import numpy as np
import torch
import tvm_ffi

from schedules.builder.compile import lower, pattern_of
from schedules.builder.suite import KernelSpec
from schedules.families import family_of
from schedules.families.interface import Target
from tests import cases, torch_cases
from tests.simt import simulate
from tests.torch_cases import attend, own_case, shared_cases
from tvm_flash import numerics
from tvm_flash.packs import sizes
from tvm_flash.packs.manifest import BUILTIN_DEFINITION

#: Arch, template, head_dim, head_dim_v, mask, score, dtype: each family with each of its ways to multiply and to copy.
KERNELS = (
    ("sm_70", "v1", 64, 64, "causal", "identity", "float16"),
    ("sm_75", "v1", 64, 64, "causal", "identity", "float16"),
    ("sm_75", "v1", 128, 128, "window", "softcap", "float16"),
    ("sm_75", "v1", 256, 256, "causal", "identity", "float16"),  # pairs of warps
    ("sm_80", "v2", 64, 64, "full", "identity", "bfloat16"),
    ("sm_80", "v2", 256, 256, "causal", "identity", "float16"),  # pairs of warps
    ("sm_80", "v2", 192, 128, "full", "alibi", "bfloat16"),
    ("sm_86", "v1", 96, 96, "sink_window", "identity", "float16"),  # a mask with gaps
    ("sm_80", "v2", 64, 64, "positioned", "optional_sinks", "bfloat16"),
)


@pytest.fixture(scope="module", params=KERNELS, ids=lambda k: "-".join(map(str, k)))
def kernel(request, tmp_path_factory):
    """A kernel's spec and its function on CPU tensors."""
    arch, template, head_dim, head_dim_v, mask, score, dtype = request.param
    spec = KernelSpec(template, BUILTIN_DEFINITION, mask, score, dtype, head_dim, head_dim_v)
    target = Target(arch)
    pattern = pattern_of(spec, target)
    config = family_of(target).default_configs(template, pattern, target)[0]
    lowered = lower(spec, pattern, target, config)
    module = simulate.build(lowered.text, tmp_path_factory.mktemp(arch))
    function = tvm_ffi.load_module(str(module))[spec.symbol]
    return SimpleNamespace(spec=spec, params=pattern.params, function=function, program=lowered.program)


def test_the_shared_cases(kernel):
    count = 0
    for case in shared_cases(kernel.spec):
        data = cases.inputs(case)
        torch_cases.check(case, data, *attend(kernel, case, data))
        count += 1
    assert count


def test_full_width_and_grouped_heads(kernel):
    case = own_case(kernel, kv_heads=1, seqlen_q=150, seqlen_kv=213)
    data = cases.inputs(case)
    torch_cases.check(case, data, *attend(kernel, case, data))


def test_a_modified_score_is_as_exact_as_float32(kernel):
    """With a single key the log-sum-exp is its score.  tanh.approx, which is good to 5e-4, is hidden by the rounding of
    a 16-bit result."""
    if "softcap" not in kernel.spec.score:
        pytest.skip("nothing but a tanh is in danger")
    case = own_case(kernel, seqlen_q=64, seqlen_kv=1)
    data = cases.inputs(case)
    data.params.update(window_left=64, window_right=64)
    _, expected = cases.expected(case, data)
    assert np.ptp(expected) > 2  # from one end of the cap to the other, nearly
    _, lse = attend(kernel, case, data)
    assert np.abs(lse - expected).max() <= 2e-6


def test_scores_that_outgrow_a_row_s_first_maximum(kernel):
    """Keys are walked from the last to the first: the first are far larger, so that steps without maxima overflow."""
    if kernel.spec.score != "identity":
        pytest.skip("modified scores are bounded, or grow with the distance")
    case = own_case(kernel, seqlen_q=140, seqlen_kv=400)
    data = cases.inputs(case)
    data.k[:, :, :120] = numerics.round_to(data.k[:, :, :120] * 200, case.dtype)
    torch_cases.check(case, data, *attend(kernel, case, data))


def test_a_negative_scale(kernel):
    """The smallest products have the largest scores: the same as with a positive scale and negated queries."""
    case = own_case(kernel, seqlen_q=70, seqlen_kv=200)
    data = cases.inputs(case)
    negative = SimpleNamespace(**vars(kernel))
    negative.function = lambda q, k, v, o, lse, scale, *values: kernel.function(-q, k, v, o, lse, -scale, *values)
    for one, other in zip(attend(kernel, case, data), attend(negative, case, data), strict=True):
        assert np.array_equal(one, other, equal_nan=True)


def test_nan_in_a_key_that_is_not_seen(kernel):
    """Rows that see it have no finite output; all others, also those of the same tiles, have theirs."""
    if kernel.spec.mask != "causal":
        pytest.skip("needs rows that don't see a key")
    case = own_case(kernel, seqlen_q=150, seqlen_kv=150)
    data = cases.inputs(case)
    right, _ = cases.expected(case, data)
    data.k[:, :, 70] = np.nan
    out, _ = attend(kernel, case, data)
    assert not np.isfinite(out[:, :, 70:]).any()
    assert np.abs(out[:, :, :70] - right[:, :, :70]).max() < 0.01


def test_a_kernel_says_which_axes_of_its_grid_are_too_short(kernel):
    """It is refused at launch, as hardware does: the selector has to know before."""
    if kernel.params:
        pytest.skip("the grids are the same")
    batch = 65536
    most = max(sizes.evaluate(axis, sizes.of(batch, 1, 1, 1, 1, 8, 8)) for axis in kernel.program.narrow_axes)
    if kernel.spec.template == "v2":
        assert most == 1
        return
    assert most == batch
    x = torch.zeros((batch, 1, 1, 8), dtype=getattr(torch, kernel.spec.dtype))
    with pytest.raises(RuntimeError, match="a grid of"):
        kernel.function(x, x, x, torch.zeros_like(x), torch.zeros(1), 1.0)
