"""Caches of 8 bits: the bits of attention to what they stand for, what that is, and wrong calls."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests import ragged_cases
from tests.paged_cases import PAGED_CASES, PagedCase
from tests.ragged_cases import RaggedCase
from tests.scaled_cases import CACHES, quantised
from tests.test_paged import tensors
from tests.test_varlen import options_of
from tvm_flash import (
    ArgumentTypeError,
    InvalidArgumentError,
    check_pages,
    dequantise_cache,
    flash_attention_paged,
    quantise_cache,
)
from tvm_flash.quantised import LARGEST

pytestmark = pytest.mark.usefixtures("cpu_pack")

#: Each in one dtype, and with one cache.
CASES = [(c, CACHES[i // 3 % 2], bool(i // 6 % 2)) for i, c in enumerate(PAGED_CASES) if i % 3 == (i // 3) % 3]
CASE = PagedCase(RaggedCase((33, 0, 5, 70, 1), 4, 64, (40, 9, 5, 160, 1330), kv_heads=2, mask="causal"), 16, 1)


def given(case: PagedCase, data, cache: str, of_pages: bool):
    """The tensors of a call, and of one on what its cache stands for."""
    plain = tensors(case, data)
    scaled, stood_for = quantised(case, data, cache, of_pages)
    scales = {name: scaled[name] for name in ("k_scale", "v_scale")}
    caches = [{f"{n}_cache": x[n] for n in "kv"} for x in (scaled, stood_for)]
    return plain | caches[0] | scales, plain | caches[1]


@pytest.mark.parametrize(("case", "cache", "of_pages"), CASES, ids=lambda x: getattr(x, "id", str(x)))
def test_the_bits_of_what_a_cache_stands_for(case, cache, of_pages):
    data = ragged_cases.inputs(case.of)
    scaled, plain = given(case, data, cache, of_pages)
    options = {"return_lse": True, **options_of(case.of, data)}
    found, want = (flash_attention_paged(**x, **options) for x in (scaled, plain))
    for x, y in zip(found, want, strict=True):
        assert torch.equal(x, y) and not x.isnan().any()


@pytest.mark.parametrize("cache", CACHES)
def test_against_float64(cache):
    """Attention to what a cache stands for, sequence by sequence, has the error of any other."""
    case = replace(CASE, of=replace(CASE.of, dtype="bfloat16"))
    data = ragged_cases.inputs(case.of)
    scaled, plain = given(case, data, cache, True)
    out, lse = flash_attention_paged(**scaled, return_lse=True, causal=True)
    own = [np.empty_like(x) for x in (data.k, data.v)]
    for b, length in enumerate(case.of.keys):
        j = np.arange(length)
        page = plain["page_table"][b].numpy()[j // case.page_size]
        for x, name in zip(own, ("k_cache", "v_cache"), strict=True):
            x[case.of.rows(b)[1]] = plain[name].float().numpy()[page, j % case.page_size]
    data = ragged_cases.RaggedInputs(data.q, *own, data.params)
    ragged_cases.check(case.of, data, out.double().numpy(), lse.double().numpy())


@pytest.mark.parametrize("dtype", ("float32", "float16", "bfloat16"))
@pytest.mark.parametrize("cache", CACHES)
def test_every_element_and_rounding(cache, dtype):
    """All 256 bytes by a kernel: each is the only key, so that the output is what it stands for."""
    stored = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(getattr(torch, cache))
    for scale in (1.0, 0.0123, 3.7e-3, 1e-7, 3e38):
        if scale == 3e38 and dtype == "float32":
            continue  # infinity and NaN are the same for all that follows; once is enough
        k = torch.zeros(4, 1, 1, 64).to(stored.dtype)
        scales = {name: torch.full((1,), scale) for name in ("k_scale", "v_scale")}
        found = flash_attention_paged(
            torch.zeros(4, 1, 64, dtype=getattr(torch, dtype)), k, stored.view(4, 1, 1, 64),
            torch.arange(5, dtype=torch.int32), torch.ones(4, dtype=torch.int32),
            torch.arange(4, dtype=torch.int32)[:, None], **scales,
        )  # fmt: skip
        want = dequantise_cache(stored.view(4, 1, 64), scales["v_scale"], dtype)
        exact = (stored.double() * float(np.float32(scale))).float().to(want.dtype).view_as(want)
        assert torch.equal(want.nan_to_num(7), exact.nan_to_num(7))
        assert torch.equal(found.nan_to_num(7), want.nan_to_num(7))


@pytest.mark.parametrize("cache", CACHES)
def test_frameworks_round_the_same(cache):
    jnp = pytest.importorskip("jax.numpy")
    x = np.random.default_rng(0).normal(size=(5, 4, 2, 8)).astype(np.float32) * 3
    x[0, 0, 0, :4] = np.nan, np.inf, -np.inf, 0
    x[:, :, 1, 1] = np.arange(20).reshape(5, 4) / 2 + 0.5  # ties
    for scale in (np.float32([0.01, 1]), np.random.default_rng(1).uniform(0.1, 2, (5, 2)).astype(np.float32)):
        stored, _ = quantise_cache(x, cache, scale)
        back = dequantise_cache(stored, scale, "bfloat16").astype(np.float32)
        for make in (torch.from_numpy, jnp.asarray):
            other, _ = quantise_cache(make(x), cache, make(scale))
            own = dequantise_cache(other, make(scale), "bfloat16")
            other, own = (
                (y.float().numpy() if isinstance(y, torch.Tensor) else np.asarray(y).astype(np.float32))
                for y in (other, own)
            )
            assert np.array_equal(other, stored.astype(np.float32), equal_nan=True)
            assert np.array_equal(own, back, equal_nan=True)
    stored, scale = quantise_cache(x[1:], cache)
    error = abs(dequantise_cache(stored, scale, "float32") - x[1:])
    assert (error <= (abs(x[1:]) / 16 if cache == "float8_e4m3fn" else 0) + scale[:, None] / 2).all()


@pytest.mark.parametrize("cache", CACHES)
def test_dtypes_are_those_of_frameworks_too(cache):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = torch.randn(3, 2, 8)
    want, scale = quantise_cache(x, cache)
    of_numpy = getattr(ml_dtypes, cache, None) or getattr(np, cache)
    for dtype in (getattr(torch, cache), of_numpy, np.dtype(of_numpy)):
        found, _ = quantise_cache(x, dtype)
        assert found.dtype == want.dtype and torch.equal(found.view(torch.uint8), want.view(torch.uint8))
    back = dequantise_cache(want, scale, "bfloat16")
    for dtype in (torch.bfloat16, ml_dtypes.bfloat16, np.dtype(ml_dtypes.bfloat16)):
        found = dequantise_cache(want, scale, dtype)
        assert found.dtype == torch.bfloat16 and torch.equal(found, back)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("framework", ("numpy", "torch", "jax"))
def test_a_scale_is_never_lost(cache, framework):
    """Of what is tiny, without elements, or has infinities and NaN: those are as they are, and others as without."""
    make = {"numpy": np.asarray, "torch": torch.from_numpy, "jax": lambda x: x}[framework]
    if framework == "jax":
        make = pytest.importorskip("jax.numpy").asarray

    def there_and_back(values):
        stored, scale = quantise_cache(make(np.float32(values).reshape(-1, 1, 3)), cache)
        back = dequantise_cache(stored, scale, "float32")
        return np.asarray(back).ravel(), float(np.asarray(scale)[0])

    for values in ([1e-44, 0, -3e-45], [3e-38, 0, 0], [0, 0, 0]):
        back, scale = there_and_back(values)
        assert scale >= np.finfo(np.float32).tiny and abs(back - values).max() <= scale / 2
    back, scale = there_and_back([1, np.nan, -2])
    assert abs(scale * LARGEST[cache] / 2 - 1) < 1e-6 and abs(back[[0, 2]] - [1, -2]).max() < scale
    assert np.isnan(back[1]) if cache == "float8_e4m3fn" else back[1] == 0
    back, again = there_and_back([1, np.inf, -2])
    assert again == scale and abs(back - [1, 2, -2]).max() < scale
    assert there_and_back(np.zeros((0, 3)))[1] == 1


def test_wrong_calls_say_what_mends_them():
    data = ragged_cases.inputs(CASE.of)
    right, plain = given(CASE, data, "int8", False)
    k_scale = right["k_scale"]
    check_pages(*(right[n] for n in ("q", "k_cache", "cu_seqlens_q", "seqlens_k", "page_table")))
    for changes, error, text in (
        ({"k_scale": None}, InvalidArgumentError, "k_scale: is None, and v_scale is given"),
        ({"v_scale": None}, InvalidArgumentError, "v_scale: is None, and k_scale is given"),
        ({"k_scale": None, "v_scale": None}, ArgumentTypeError, "k_cache: has dtype int8, and no scales"),
        ({"k_cache": plain["k_cache"]}, ArgumentTypeError, "k_cache: has dtype float32, and scales are given"),
        ({"v_cache": right["v_cache"].to(torch.float8_e4m3fn)}, ArgumentTypeError, "v_cache: has dtype float8_e4m3fn"),
        ({"k_scale": k_scale.double()}, ArgumentTypeError, "k_scale: has dtype float64, expected float32"),
        ({"k_scale": k_scale.repeat(2)}, InvalidArgumentError, r"k_scale: has shape \(4,\), expected \(2,\)"),
        ({"v_scale": k_scale[:, None]}, InvalidArgumentError, r"v_scale: has shape \(2, 1\)"),
    ):
        with pytest.raises(error, match=text):
            flash_attention_paged(**{**right, **changes})
    for call, text in (
        (lambda: quantise_cache(k_scale, "int8"), "x: has shape"),
        (lambda: quantise_cache(plain["k_cache"], "int4"), "dtype: is 'int4'"),
        (lambda: quantise_cache(plain["k_cache"].double(), "int8"), "x: has dtype float64, expected one of float32"),
        (lambda: quantise_cache(plain["k_cache"], "int8", k_scale.double()), "scale: has dtype float64"),
        (lambda: quantise_cache(plain["k_cache"], "int8", k_scale.numpy()), "scale: is a tensor of another framework"),
        (lambda: quantise_cache(plain["k_cache"], "int8", 2.0), "scale: is a builtins.float"),
        (lambda: dequantise_cache(right["k_cache"], k_scale, "float64"), "dtype: is 'float64'"),
        (
            lambda: dequantise_cache(right["k_cache"], k_scale, torch.int8),
            "dtype: is torch.int8, expected one of 'float",
        ),
        (
            lambda: quantise_cache(plain["k_cache"], torch.float16),
            "dtype: is torch.float16, expected one of 'float8_e4m",
        ),
        (lambda: quantise_cache(plain["k_cache"], None), "dtype: is None"),
        (lambda: dequantise_cache(plain["k_cache"], k_scale, "float16"), "x: has dtype float32"),
        (lambda: dequantise_cache(right["k_cache"], k_scale[:1], "float16"), "scale: has shape"),
    ):
        with pytest.raises((ArgumentTypeError, InvalidArgumentError), match=text):
            call()
