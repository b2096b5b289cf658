"""The public functions against float64: layouts, variants, dtypes, masks, scores, strides, results asked for."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import tvm_flash
from tests import torch_cases
from tests.cases import CASES, Case, inputs
from tvm_flash import flash_attention, flash_attention_v2, numerics, reference
from tvm_flash.call import eager
from tvm_flash.packs.registry import registry

pytestmark = pytest.mark.usefixtures("cpu_pack")

FUNCTIONS = {"bhsd": flash_attention, "bshd": flash_attention_v2}
#: Those that the public functions have arguments for.
PUBLIC_CASES = [c for c in CASES if c.mask in ("full", "causal", "window")]


def need(dtype: str, head_dim: int) -> None:
    """Skip where a small pack was built on purpose."""
    if not any(k.entry.head_dim >= head_dim for k in registry().candidates("cpu", "attention", dtype)):
        pytest.skip(f"the installed pack has no {dtype} kernel for head_dim {head_dim}")


def options(case: Case, data) -> dict:
    """Arguments that ask for a case's mask and score."""
    params = dict(case.params)
    found = {"causal": case.mask == "causal", "softcap": params.get("softcap", 0.0)}
    if case.mask == "window":
        found["window_size"] = (params["window_left"], params["window_right"])
    if "alibi" in case.score:
        found["alibi_slopes"] = torch.from_numpy(data.params["alibi_slopes"])
    return found


def tensors(case: Case, data, layout: str) -> list[torch.Tensor]:
    """q, k, v in a layout, lying in memory as the case says."""
    return [torch_cases.tensor(x, case.dtype, layout, case.strides) for x in (data.q, data.k, data.v)]


@pytest.mark.filterwarnings("ignore::tvm_flash.LayoutWarning")
@pytest.mark.parametrize("variant", ("v1", "v2", "auto"))
@pytest.mark.parametrize("layout", FUNCTIONS)
@pytest.mark.parametrize("case", PUBLIC_CASES, ids=lambda c: c.id)
def test_numbers(case, layout, variant):
    need(case.dtype, case.head_dim)
    data = inputs(case)
    q, k, v = tensors(case, data, layout)
    out, lse = FUNCTIONS[layout](q, k, v, variant=variant, return_lse=True, **options(case, data))
    assert out.dtype == q.dtype and out.is_contiguous() and lse.dtype == torch.float32 and lse.is_contiguous()
    logical = out if layout == "bhsd" else out.transpose(1, 2)
    torch_cases.check(case, data, logical.double().numpy(), lse.double().numpy())
    again = FUNCTIONS[layout](q, k, v, variant=variant, **options(case, data))
    assert torch.equal(again, out), "not the same bits without lse, or on a repeat"


CASE = Case(2, 4, 33, 64, kv_heads=2, seqlen_kv=70, mask="causal")


def test_softmax_scale():
    data = inputs(CASE)
    q, k, v = tensors(CASE, data, "bhsd")
    out = flash_attention(q, k, v, causal=True, softmax_scale=0.5)
    want, _ = reference.attention(data.q, data.k, data.v, softmax_scale=0.5, mask=reference.causal)
    assert numerics.largest_error(out.numpy(), want) < 6e-6  # the scores are four times as large as usual


def test_one_alibi_slope_a_head():
    data = inputs(dataclasses.replace(CASE, batch=1, score="alibi"))
    q, k, v = (torch.from_numpy(x).expand(3, -1, -1, -1) for x in (data.q, data.k, data.v))
    slopes = torch.from_numpy(data.params["alibi_slopes"])
    each = flash_attention(q, k, v, alibi_slopes=slopes.expand(3, -1))
    shared = flash_attention(q, k, v, alibi_slopes=slopes[0])
    assert torch.equal(each, shared)
    want, _ = reference.attention(
        data.q, data.k, data.v, softmax_scale=0.125, score=reference.alibi, params={"alibi_slopes": slopes.numpy()}
    )
    assert numerics.largest_error(shared[2:].numpy(), want) < 2e-6


@pytest.mark.parametrize("strides", ("contiguous", "transposed", "gaps"))
def test_out_is_written_in_place_and_returned(strides):
    case = dataclasses.replace(CASE, strides=strides)
    data = inputs(case)
    q, k, v = tensors(case, data, "bhsd")
    (out, _, _) = tensors(case, dataclasses.replace(data, q=np.full_like(data.q, np.nan)), "bhsd")
    result = flash_attention(q, k, v, causal=True, out=out)
    assert result is out
    assert torch.equal(out, flash_attention(q, k, v, causal=True))
    if strides == "gaps":
        room = torch.as_strided(out, (2, 5, 34, 72), out.stride())
        assert room[:, 4].isnan().all() and room[:, :, 33].isnan().all() and room[..., 64:].isnan().all()


def test_out_may_lie_between_the_inputs_without_overlapping_them():
    data = inputs(dataclasses.replace(CASE, kv_heads=4, seqlen_kv=33))
    packed = torch.stack([torch.from_numpy(x) for x in (data.q, data.k, data.v, data.q)], dim=2)
    q, k, v, out = packed.unbind(2)
    want = flash_attention(*(x.contiguous() for x in (q, k, v)))
    flash_attention(q, k, v, out=out)
    assert torch.equal(out, want)


def test_expanded_tensors_are_read_in_place():
    data = inputs(dataclasses.replace(CASE, batch=1))
    q, k, v = tensors(CASE, data, "bhsd")
    out = flash_attention(*(x.expand(5, -1, -1, -1) for x in (q, k, v)), causal=True)
    assert torch.equal(out, flash_attention(q, k, v, causal=True).expand(5, -1, -1, -1))


@pytest.mark.parametrize("layout", FUNCTIONS)
@pytest.mark.parametrize("variant", ("v1", "v2"))
def test_the_variant_that_was_asked_for_runs(layout, variant):
    q, k, v = tensors(CASE, inputs(CASE), layout)
    eager.forget()
    FUNCTIONS[layout](q, k, v, variant=variant)
    (plan,) = eager._plans.values()
    assert plan.choice.kernel.entry.template == variant


def test_each_function_has_its_own_variant():
    for layout, template in (("bhsd", "v1"), ("bshd", "v2")):
        eager.forget()
        FUNCTIONS[layout](*tensors(CASE, inputs(CASE), layout))
        (plan,) = eager._plans.values()
        assert plan.choice.kernel.entry.template == template


@pytest.mark.parametrize("sizes", [(0, 2, 2, 5, 7), (2, 0, 0, 5, 7), (2, 2, 2, 0, 7), (0, 0, 0, 0, 0)])
@pytest.mark.parametrize("layout", FUNCTIONS)
def test_an_empty_result(sizes, layout):
    batch, heads, kv_heads, seqlen_q, seqlen_kv = sizes
    shapes = [(batch, heads, seqlen_q, 16), (batch, kv_heads, seqlen_kv, 16), (batch, kv_heads, seqlen_kv, 24)]
    q, k, v = (torch.empty(s if layout == "bhsd" else (s[0], s[2], s[1], s[3])) for s in shapes)
    out, lse = FUNCTIONS[layout](q, k, v, return_lse=True)
    assert out.shape == (*q.shape[:3], 24) and lse.shape == (batch, heads, seqlen_q)
    assert out.stride() == torch.empty(out.shape).stride() and lse.stride() == torch.empty(lse.shape).stride()


def test_queries_without_keys_get_zeros_and_minus_infinity():
    q, k = torch.randn(2, 3, 5, 16), torch.empty(2, 3, 0, 16)
    for out in (None, torch.full((2, 3, 5, 16), torch.nan)):
        result, lse = flash_attention(q, k, k, return_lse=True, out=out)
        assert torch.equal(result, torch.zeros(2, 3, 5, 16)) and (lse == -torch.inf).all()
        assert out is None or result is out


def test_a_row_without_keys_gets_zeros_and_minus_infinity():
    q, k = torch.randn(1, 2, 9, 64), torch.randn(1, 2, 4, 64)
    out, lse = flash_attention(q, k, k, causal=True, return_lse=True)
    assert (out[:, :, :5] == 0).all() and (lse[:, :, :5] == -torch.inf).all()
    assert out[:, :, 5:].abs().min() > 0 and lse[:, :, 5:].isfinite().all()


def test_one_row_without_lse():
    q, k, v = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 9, 64), torch.randn(1, 1, 9, 64)
    out, lse = flash_attention(q, k, v, return_lse=True)
    assert torch.equal(out, flash_attention(q, k, v)) and lse.shape == (1, 1, 1)


def test_plans_are_bounded(monkeypatch):
    monkeypatch.setattr(eager, "MAX_PLANS", 5)
    for n in range(1, 20):
        flash_attention(*(torch.randn(1, 1, n, 64) for _ in range(3)))
    assert len(eager._plans) <= 5


def test_options_that_cannot_be_remembered_still_work():
    q, k, v = tensors(CASE, inputs(CASE), "bhsd")
    assert torch.equal(flash_attention(q, k, v, window_size=[5, 2]), flash_attention(q, k, v, window_size=(5, 2)))


def test_version_and_names():
    assert tvm_flash.__version__ == "0.1.0"
    for name in tvm_flash.__all__:
        assert hasattr(tvm_flash, name)
