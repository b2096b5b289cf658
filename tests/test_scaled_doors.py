"""Caches of 8 bits by every other way in: appending to them, FlashAttention's function, programs of PyTorch."""

from __future__ import annotations

import pytest
import torch

from tests import ragged_cases
from tests.scaled_cases import CACHES
from tests.test_scaled import CASE, given
from tvm_flash import (
    InvalidArgumentError,
    dequantise_cache,
    flash_attention_paged,
    flash_attention_with_kvcache,
    nn,
    quantise_cache,
)
from tvm_flash.tracing import torch_ragged  # noqa: F401  registers the operators

pytestmark = pytest.mark.usefixtures("cpu_pack")

BATCH, HEADS, KV_HEADS, WIDTH, PAGE, COLUMNS = 3, 4, 2, 64, 16, 4
LENGTHS = torch.tensor([20, 0, 55], dtype=torch.int32)


def call(cache: str, of_pages: bool, paged: bool = True):
    """The tensors of a call that appends two tokens to each sequence, and the caches afterwards."""
    torch.manual_seed(3)
    pages, size = (BATCH * COLUMNS, PAGE) if paged else (BATCH, PAGE * COLUMNS)
    q, k, v = (torch.randn(BATCH, 2, h, WIDTH).bfloat16() for h in (HEADS, KV_HEADS, KV_HEADS))
    table = torch.randperm(pages).int().view(BATCH, -1)
    tensors = {"q": q, "k": k, "v": v, "cache_seqlens": LENGTHS, "causal": True}
    tensors |= {"page_table": table} if paged else {"cache_batch_idx": table[:, 0]}
    after = {}
    for name, new in (("k", k), ("v", v)):
        scale = torch.rand(pages, KV_HEADS) / 50 + 0.01
        scale = scale if of_pages else scale[0]
        stored, _ = quantise_cache(torch.randn(pages, size, KV_HEADS, WIDTH), cache, scale)
        tensors |= {f"{name}_cache": stored, f"{name}_scale": scale}
        whole = stored.clone().view(torch.uint8)
        for b, length in enumerate(LENGTHS.tolist()):
            for i in range(2):
                page, row = table[b, (length + i) // size], (length + i) % size
                own = scale[page] if of_pages else scale
                whole[page, row] = quantise_cache(new[b, i], cache, own)[0].view(torch.uint8)
        after[name] = whole.view(stored.dtype)
    return tensors, after


def expected(tensors, after):
    """Attention to what the caches stand for afterwards."""
    plain = {f"{n}_cache": dequantise_cache(after[n], tensors[f"{n}_scale"], "bfloat16") for n in "kv"}
    left = ("q", "causal", "page_table", "cache_batch_idx")
    return flash_attention_with_kvcache(
        **{n: tensors[n] for n in left if n in tensors}, **plain, cache_seqlens=LENGTHS + 2
    )


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(("of_pages", "paged"), ((False, True), (True, True), (True, False)))
def test_new_keys_are_rounded_as_quantise_cache_does(cache, of_pages, paged):
    tensors, after = call(cache, of_pages, paged)
    found = flash_attention_with_kvcache(**tensors)
    for n in "kv":
        assert torch.equal(tensors[f"{n}_cache"].view(torch.uint8), after[n].view(torch.uint8))
    assert torch.equal(found, expected(tensors, after))


def test_nothing_is_appended_by_a_wrong_call():
    tensors, _ = call("int8", False)
    before = tensors["k_cache"].clone()
    for wrong, text in (({"v_scale": None}, "v_scale: is None"), ({"k_scale": torch.ones(3)}, "k_scale: has shape")):
        with pytest.raises(InvalidArgumentError, match=text):
            flash_attention_with_kvcache(**{**tensors, **wrong})
    assert torch.equal(tensors["k_cache"], before)


@pytest.mark.parametrize("paged", (True, False))
def test_scales_of_sequences_as_flash_attention_has_them(paged):
    """``(batch, kv_heads)``: each page gets that of its sequence; columns behind the last page may name any."""
    tensors, _ = call("float8_e4m3fn", True, paged)
    own = {n: torch.rand(BATCH, KV_HEADS) / 50 + 0.01 for n in "kv"}
    table = tensors.get("page_table", tensors.get("cache_batch_idx"))
    table = table if paged else table[:, None]
    for n in "kv":
        scale = torch.ones_like(tensors[f"{n}_scale"])
        for b in range(BATCH):
            scale[table[b].long()] = own[n][b]
        tensors[f"{n}_scale"] = scale
    other = {n: x.clone() if n.endswith("cache") else x for n, x in tensors.items()}
    want = flash_attention_with_kvcache(**other)
    if paged:
        tensors["page_table"][0, 2:] = table[2, 0]  # of no key of sequence 0
    where = {"block_table" if paged else "cache_batch_idx": table if paged else table[:, 0]}
    found = nn.flash_attn_with_kvcache(
        *(tensors[n] for n in ("q", "k_cache", "v_cache", "k", "v")),
        **{"cache_seqlens": LENGTHS, "causal": True, "k_descale": own["k"], "v_descale": own["v"]} | where,
    )
    assert torch.equal(found, want)
    given, one = [tensors[n] for n in ("q", "k_cache", "v_cache")], torch.ones(2)
    for wrong, text in (
        ({"k_descale": one, "v_descale": one}, r"^k_descale: has shape \(2,\)"),
        ({"k_descale": own["k"], "v_descale": own["v"][:-1]}, "^v_descale: has shape"),
        ({"k_descale": own["k"]}, "^v_descale: is None"),
    ):
        with pytest.raises(InvalidArgumentError, match=text):
            nn.flash_attn_with_kvcache(*given, **wrong, **where, cache_seqlens=LENGTHS)
    name, shared = next(iter(where)), next(iter(where.values())).clone()
    shared[0] = shared[2]
    with pytest.raises(InvalidArgumentError, match=r"^k_descale: sequence [02] has another scale"):
        nn.flash_attn_with_kvcache(
            *given, **{name: shared, "k_descale": own["k"], "v_descale": own["v"]}, cache_seqlens=LENGTHS
        )
    beyond = LENGTHS.long() + 2**32
    with pytest.raises(InvalidArgumentError, match=r"^cache_seqlens: is 2147483647"):
        nn.flash_attn_with_kvcache(*given, **where, k_descale=one[None], v_descale=one[None], cache_seqlens=beyond)


class Model(torch.nn.Module):
    def forward(self, **tensors):
        return flash_attention_paged(**tensors, causal=True)


@pytest.mark.parametrize("cache", CACHES)
def test_programs_of_torch(cache):
    tensors, _ = given(CASE, ragged_cases.inputs(CASE.of), cache, False)
    want = Model()(**tensors)
    traced = torch.export.export(Model(), (), tensors).module()
    assert "attention_paged_scaled" in str(traced.graph) and torch.equal(traced(**tensors), want)
    compiled = torch.compile(Model(), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(**tensors), want)


def test_the_decomposition_computes_the_same():
    tensors, _ = given(CASE, ragged_cases.inputs(CASE.of), "int8", True)
    tensors = {n: x.nan_to_num() if x.is_floating_point() else x for n, x in tensors.items()}
    decomposed = torch._decomp.decomposition_table[torch.ops.tvm_flash.attention_paged_scaled.default]
    found = decomposed(*tensors.values(), causal=True)[0]
    assert torch.allclose(found, Model()(**tensors), atol=2e-5)


def test_a_gradient_is_refused():
    tensors, _ = given(CASE, ragged_cases.inputs(CASE.of), "int8", False)
    tensors["q"].requires_grad_()
    with pytest.raises(NotImplementedError, match="q: a gradient is required"):
        Model()(**tensors)
