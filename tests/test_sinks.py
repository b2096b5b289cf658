"""Sinks: a logit a head in the denominator, by every function that has the argument, and learnt."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch

import tvm_flash
from tvm_flash import ArgumentTypeError, InvalidArgumentError, reference
from tvm_flash.packs.manifest import MANIFEST_NAME, Manifest

pytestmark = pytest.mark.usefixtures("cpu_pack")

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
SINKS = np.array([0.5, -2.0, 7.0, -np.inf], np.float32)


def problem(seqlen_q=70, seqlen_kv=90, batch=2):
    rng = np.random.default_rng(3)
    q = rng.standard_normal((batch, HEADS, seqlen_q, HEAD_DIM), np.float32)
    k, v = (rng.standard_normal((batch, KV_HEADS, seqlen_kv, HEAD_DIM), np.float32) for _ in "kv")
    return q, k, v


def by_torch(q, k, v, sinks, visible, softmax_scale=HEAD_DIM**-0.5):
    """Output and log-sum-exp in float64 with the sink as one key more, as gpt-oss writes it; differentiable."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT * softmax_scale).masked_fill(~visible, -torch.inf)
    logits = torch.cat([scores, sinks[..., None, None].expand(*scores.shape[:3], 1)], -1)
    lse = torch.logsumexp(logits, -1)
    weights = torch.exp(logits - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
    return weights[..., :-1] @ v, lse


def causal(seqlen_q, seqlen_kv):
    return torch.ones(seqlen_q, seqlen_kv, dtype=torch.bool).tril(seqlen_kv - seqlen_q)


@pytest.mark.parametrize(("seqlen_q", "seqlen_kv"), ((70, 90), (90, 70), (3, 2100)))
@pytest.mark.parametrize("layout", ("bhsd", "bshd"))
def test_against_float64_in_both_layouts(layout, seqlen_q, seqlen_kv):
    q, k, v = problem(seqlen_q, seqlen_kv)
    function = tvm_flash.flash_attention
    tensors = q, k, v
    if layout == "bshd":
        function, tensors = tvm_flash.flash_attention_v2, tuple(x.swapaxes(1, 2).copy() for x in tensors)
    out, lse = function(*tensors, causal=True, sinks=SINKS, return_lse=True)
    out = out if layout == "bhsd" else out.swapaxes(1, 2)
    want, want_lse = by_torch(*(torch.from_numpy(x).double() for x in (q, k, v, SINKS)), causal(seqlen_q, seqlen_kv))
    np.testing.assert_allclose(out, want.numpy(), atol=3e-6, rtol=0)
    np.testing.assert_allclose(lse, want_lse.numpy(), atol=3e-6, rtol=0)


def test_a_row_that_sees_no_key_has_the_sink_alone():
    q, k, v = problem(90, 70)
    sinks = np.array([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, -np.inf]], np.float32)
    out, lse = tvm_flash.flash_attention(q, k, v, causal=True, sinks=sinks, return_lse=True)
    assert not out[:, :, :20].any()
    np.testing.assert_array_equal(lse[:, :, :20], np.broadcast_to(sinks[..., None], (2, 4, 20)))


def test_a_sink_of_minus_infinity_is_none():
    q, k, v = problem()
    without, lse = tvm_flash.flash_attention(q, k, v, window_size=(9, 0), softcap=2.0, return_lse=True)
    none = np.full(HEADS, -np.inf, np.float32)
    got, got_lse = tvm_flash.flash_attention(q, k, v, window_size=(9, 0), softcap=2.0, sinks=none, return_lse=True)
    np.testing.assert_allclose(got, without, atol=1e-6, rtol=0)
    np.testing.assert_allclose(got_lse, lse, atol=1e-6, rtol=0)


@pytest.mark.parametrize("whole", (False, True))
def test_sinks_are_learnt(whole):
    """By torch's autograd, the gradient of the log-sum-exp flowing too."""
    q, k, v = problem()
    sinks = [*SINKS[:3].tolist(), 1.0]
    sinks = np.array([sinks, sinks[::-1]] if whole else sinks, np.float32)
    leaves = [torch.from_numpy(x).requires_grad_() for x in (q, k, v, sinks)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    out, lse = tvm_flash.flash_attention(*leaves[:3], causal=True, sinks=leaves[3], return_lse=True)
    want, want_lse = by_torch(*exact, causal(70, 90))
    dout, dlse = torch.randn(out.shape), torch.randn(lse.shape)
    ((out * dout).sum() + (lse * dlse).sum()).backward()
    ((want * dout).sum() + (want_lse * dlse).sum()).backward()
    for x, y in zip(leaves, exact, strict=True):
        assert (x.grad - y.grad).abs().max() < 1e-5 * max(1.0, float(y.grad.abs().max()))
    given = [x.detach() for x in (dout, *leaves[:3], out, lse)]
    *found, d_sinks = tvm_flash.flash_attention_backward(
        *given, dlse=dlse, causal=True, sinks=leaves[3].detach(), gradients=("sinks",)
    )
    assert all(torch.equal(x, y.grad) for x, y in zip(found, leaves, strict=False))
    assert torch.equal(d_sinks if whole else d_sinks.sum(0), leaves[3].grad)


def test_gradients_are_added_to_what_is_there():
    q, k, v = (torch.from_numpy(x) for x in problem())
    sinks = torch.tensor([0.5, -2.0, 3.0, 1.0])
    out, lse = tvm_flash.flash_attention(q, k, v, sinks=sinks, return_lse=True)
    d_sinks = tvm_flash.flash_attention_backward(out, q, k, v, out, lse, sinks=sinks, gradients=("sinks",))[3]
    room = torch.empty(2, 4)
    tvm_flash.flash_attention_backward(out, q, k, v, out, lse, sinks=sinks, gradients=("sinks",), d_sinks=room)
    assert torch.equal(room, d_sinks) and room.abs().min() > 0


def test_padded_sequences():
    q, k, v = problem()
    ends = np.array([[3, 80], [0, 40]], np.int32)
    out, lse = tvm_flash.padded_attention(q, k, v, ends, sinks=SINKS, return_lse=True)
    j = torch.arange(90)
    visible = torch.stack([(j >= a) & (j < b) for a, b in ends])[:, None, None]
    want, want_lse = by_torch(*(torch.from_numpy(x).double() for x in (q, k, v, SINKS)), visible)
    np.testing.assert_allclose(out, want.numpy(), atol=3e-6, rtol=0)
    np.testing.assert_allclose(lse, want_lse.numpy(), atol=3e-6, rtol=0)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_sequences_of_different_lengths(dtype):
    """Each as if it were alone, rows after the last sequence seeing nothing; and learnt."""
    lengths_q, lengths_k = (33, 0, 3, 70), (40, 5, 300, 60)
    starts = [torch.tensor([0, *np.cumsum(n)], dtype=torch.int32) for n in (lengths_q, lengths_k)]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(n, h, HEAD_DIM, generator=generator).to(dtype).requires_grad_()
        for n, h in ((sum(lengths_q) + 4, HEADS), *[(sum(lengths_k), KV_HEADS)] * 2)
    )
    sinks = torch.tensor([0.5, -2.0, 3.0, 1.0], requires_grad=True)
    out, lse = tvm_flash.flash_attention_varlen(q, k, v, *starts, causal=True, sinks=sinks, return_lse=True)
    assert not out[-4:].any() and (lse[:, -4:] == -torch.inf).all()
    dout = torch.randn(out.shape, generator=generator)
    (out * dout).sum().backward()
    alone = [x.detach().clone().requires_grad_() for x in (q, k, v, sinks)]
    loss = 0.0
    for b, (n, m) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        rows, keys = slice(int(starts[0][b]), int(starts[0][b]) + n), slice(int(starts[1][b]), int(starts[1][b]) + m)
        if not n:
            continue
        one = [x[s].transpose(0, 1)[None] for x, s in zip(alone[:3], (rows, keys, keys), strict=True)]
        want, want_lse = tvm_flash.flash_attention(*one, causal=True, sinks=alone[3], return_lse=True)
        assert (out[rows] - want[0].transpose(0, 1)).abs().max() < (1e-5 if dtype == torch.float32 else 2e-2)
        assert (lse[:, rows] - want_lse[0]).abs().max() < 1e-5
        loss = loss + (want[0].transpose(0, 1) * dout[rows]).sum()
    loss.backward()
    for x, y in zip((q, k, v, sinks), alone, strict=True):
        allowed = (2e-5 if dtype == torch.float32 else 2e-2) * max(1.0, float(y.grad.abs().max()))
        assert (x.grad - y.grad).abs().max() < allowed


def test_programs_of_torch_and_jax():
    q, k, v = problem()
    want = tvm_flash.flash_attention(q, k, v, causal=True, sinks=SINKS)
    given = [torch.from_numpy(x) for x in (q, k, v, SINKS)]

    def step(q, k, v, sinks):
        return tvm_flash.flash_attention(q, k, v, causal=True, sinks=sinks)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given), torch.from_numpy(want))
    mapped = torch.func.vmap(step, in_dims=(0, 0, 0, None))(*(x[:, None] for x in given[:3]), given[3])
    assert torch.equal(mapped[:, 0], torch.from_numpy(want))
    jax = pytest.importorskip("jax")
    pytest.importorskip("jax_tvm_ffi")
    np.testing.assert_array_equal(jax.jit(step)(q, k, v, SINKS), want)


def test_wrong_sinks_are_refused():
    q, k, v = (torch.from_numpy(x) for x in problem())
    for sinks, kind, text in (
        (torch.zeros(3), InvalidArgumentError, r"sinks: has shape \(3,\), expected \(4,\) or \(2, 4\)"),
        (torch.zeros(4).double(), ArgumentTypeError, "sinks: has dtype float64, expected float32"),
        (np.zeros(4, np.float32), ArgumentTypeError, "sinks: is a numpy tensor"),
    ):
        with pytest.raises(kind, match=text):
            tvm_flash.flash_attention(q, k, v, sinks=sinks)
    out, lse = tvm_flash.flash_attention(q, k, v, return_lse=True)
    with pytest.raises(InvalidArgumentError, match="gradients: has 'sinks', expected"):
        tvm_flash.flash_attention_backward(out, q, k, v, out, lse, gradients=("sinks",))


def test_the_twin_of_a_sink_is_differentiated():
    """By differences of the whole of attention."""
    q, k, v = (x[:1, :, :9].astype(np.float64) for x in problem(9, 9))
    params = {
        "softcap": 0.0,
        "has_alibi_slopes": 0,
        "alibi_slopes": np.zeros(HEADS),
        "sinks": [*SINKS[:3].tolist(), 1.0],
    }
    dout = np.random.default_rng(1).standard_normal(q.shape)
    what = {"softmax_scale": 0.2, "mask": reference.causal, "score": reference.optional_sinks}
    found = reference.attention_backward(dout, q, k, v, **what, params=params, gradients=("sinks",)).params["sinks"]

    def loss(step):
        moved = {**params, "sinks": np.asarray(params["sinks"]) + step}
        return (reference.attention(q, k, v, **what, params=moved)[0] * dout).sum()

    for h, way in enumerate(np.eye(HEADS) * 1e-5):
        assert found[h] == pytest.approx((loss(way) - loss(-way)) / 2e-5, rel=1e-6)


def test_gpt_oss_is_the_same():
    """A small model of that kind, its sinks learnt: against transformers' own eager attention."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "GptOssForCausalLM"):
        pytest.skip("this transformers has no gpt-oss")
    from tvm_flash.integrations import transformers as integration

    integration.register()
    config = transformers.GptOssConfig(
        vocab_size=99, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=8, num_local_experts=2, num_experts_per_tok=1,
        layer_types=["sliding_attention", "full_attention"], max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(config).eval()
    tokens = torch.randint(0, 99, (2, 23))
    found = {}
    for name in ("eager", "tvm_flash"):
        model.set_attn_implementation(name)
        model.zero_grad()
        logits = model(tokens).logits
        logits.square().mean().backward()
        sinks = [p.grad.clone() for n, p in model.named_parameters() if n.endswith("sinks")]
        found[name] = [logits.detach(), *sinks]
    assert len(found["eager"]) == 3
    for want, got in zip(found["eager"], found["tvm_flash"], strict=True):
        assert (got - want).abs().max() < 1e-4 * float(want.abs().max())


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("placed", (False, True))
def test_without_any_key_a_padded_row_sees_its_sink(placed, causal):
    sinks = torch.tensor([0.5, -1.0, 7.0, -torch.inf], requires_grad=True)
    q, k = torch.randn(2, 4, 5, 16, requires_grad=True), torch.randn(2, 2, 0, 16)
    options = {"query_start": torch.tensor([3, -2]).int() if placed else None, "causal": causal}
    none = torch.zeros(2, 2).int()
    out, lse = tvm_flash.padded_attention(q, k, k, none, sinks=sinks, return_lse=True, **options)
    assert not out.any() and torch.equal(lse, sinks.detach()[:, None].expand(2, 4, 5))
    dq, d_sinks = torch.autograd.grad(torch.where(lse > -torch.inf, lse, 0.0).sum(), [q, sinks])
    assert not dq.any() and d_sinks.tolist() == [10.0, 10.0, 10.0, 0.0]


@pytest.mark.parametrize("form", ("bhsd", "bshd", "ragged", "paged"))
def test_without_any_key_a_row_sees_its_sink(form):
    """Also where there is no memory of keys at all; its gradient is that of the log-sum-exp."""
    batch, rows = 2, 5
    sinks = torch.tensor([[1.0, 2.0, -3.0, -torch.inf], [0.5, -1.0, 7.0, 2.0]], requires_grad=True)
    q = torch.randn(batch, 4, rows, 16)
    k = torch.randn(batch, 2, 0, 16)
    want = sinks.detach()[..., None].expand(-1, -1, rows)
    if form in ("bhsd", "bshd"):
        function = tvm_flash.flash_attention if form == "bhsd" else tvm_flash.flash_attention_v2
        given = [x if form == "bhsd" else x.transpose(1, 2) for x in (q, k, k)]
        plain, plain_lse = function(*(x.numpy() for x in given), sinks=sinks.detach().numpy(), return_lse=True)
        assert not plain.any() and np.array_equal(plain_lse, want)
        leaves = [x.clone().requires_grad_() for x in given]
        out, lse = function(*leaves, sinks=sinks, return_lse=True, causal=True)
    else:
        q, k = (x.transpose(1, 2).flatten(0, 1) for x in (q, k))
        q = torch.cat([q, torch.full_like(q[:3], torch.nan)])
        starts, none = torch.tensor([0, rows, 2 * rows]).int(), torch.zeros(batch + 1).int()
        want = torch.cat([*want, torch.full((4, 3), -torch.inf)], 1)
        with pytest.raises(tvm_flash.InvalidArgumentError, match=r"^cu_seqlens_k: ends with 1"):
            tvm_flash.flash_attention_varlen(q, k, k, starts, none + torch.tensor([0, 0, 1]).int(), sinks=sinks)
        if form == "paged":
            for pages, size, columns in ((0, 8, 2), (3, 0, 1), (3, 8, 0)):
                table = torch.zeros(batch, columns).int()
                cache = torch.randn(pages, size, 2, 16)
                given = (q, cache, cache, starts, none[1:], table)
                out, lse = tvm_flash.flash_attention_paged(*given, sinks=sinks.detach(), return_lse=True)
                assert not out.any() and torch.equal(lse, want)
                scales = {"k_scale": torch.ones(2), "v_scale": torch.ones(pages, 2)}
                given = (q, *(cache.to(torch.int8),) * 2, *given[3:])
                out, lse = tvm_flash.flash_attention_paged(*given, sinks=sinks.detach(), return_lse=True, **scales)
                assert not out.any() and torch.equal(lse, want)
            return
        leaves = [x.clone().requires_grad_() for x in (q, k, k)]
        out, lse = tvm_flash.flash_attention_varlen(*leaves, starts, none, sinks=sinks, return_lse=True)
    assert not out.any() and torch.equal(lse, want)
    found = torch.autograd.grad([out, torch.where(lse > -torch.inf, lse, 0.0).sum()], [*leaves, sinks], [out, None])
    assert not found[0].any() and found[1].shape == leaves[1].shape
    assert torch.equal(found[3], torch.where(sinks > -torch.inf, float(rows), 0.0))


@pytest.mark.parametrize("form", ("bhsd", "bshd", "padded", "ragged"))
def test_without_any_key_a_row_of_a_program_of_jax_sees_its_sink(form):
    """Traced, too: its log-sum-exp was −inf there, and the sinks had no gradient."""
    jax = pytest.importorskip("jax")
    pytest.importorskip("jax_tvm_ffi")
    rows, sinks = 5, np.array([[1.0, 2.0, -3.0, -np.inf], [0.5, -1.0, 7.0, 2.0]], np.float32)
    q, k = np.ones((2, 4, rows, 16), np.float32), np.zeros((2, 2, 0, 16), np.float32)
    want = np.repeat(sinks[..., None], rows, 2)
    attend, given = tvm_flash.flash_attention, ()
    if form == "bshd":
        attend, q, k = tvm_flash.flash_attention_v2, q.swapaxes(1, 2), k.swapaxes(1, 2)
    elif form == "padded":
        attend, given = tvm_flash.padded_attention, (np.zeros((2, 2), np.int32),)
    elif form == "ragged":
        attend, want = tvm_flash.flash_attention_varlen, np.concatenate(want, 1)
        q, k = (x.swapaxes(1, 2).reshape(-1, x.shape[1], 16) for x in (q, k))
        given = np.array([0, rows, 2 * rows], np.int32), np.zeros(3, np.int32)

    def step(q, k, sinks):
        return attend(q, k, k, *map(jax.numpy.asarray, given), sinks=sinks, return_lse=True, causal=True)

    def loss(q, k, sinks):
        lse = step(q, k, sinks)[1]
        return jax.numpy.where(lse > -np.inf, lse, 0.0).sum()

    for function in (step, jax.jit(step)):
        out, lse = function(*map(jax.numpy.asarray, (q, k, sinks)))
        assert not out.any() and np.array_equal(lse, want)
    dq, dk, d_sinks = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, sinks)
    assert not dq.any() and dk.shape == k.shape
    assert np.array_equal(d_sinks, np.where(sinks > -np.inf, float(rows), 0.0))


@pytest.mark.parametrize("has_sink", (True, False))
def test_without_any_key_a_parameter_of_this_name_is_the_definitions_own(cpu_pack, tmp_path, use_packs, has_sink):
    """A definition of the user's own says itself whether there is a sink, whatever its parameters are called."""
    folder = tmp_path / "packs" / "cpu"
    shutil.copytree(cpu_pack, folder)
    manifest = Manifest.from_json((folder / MANIFEST_NAME).read_text())
    kernels = (k for k in manifest.kernels if k.symbol == "v1_float32_d64_positioned_optional_sinks")
    mine = tuple(dataclasses.replace(k, definition="mine", has_sink=has_sink) for k in kernels)
    (folder / MANIFEST_NAME).write_text(dataclasses.replace(manifest, kernels=mine).to_json())
    use_packs(tmp_path / "packs")
    q, k, v = problem(seqlen_kv=0)
    of_heads = {"kv_start": np.int32, "kv_end": np.int32, "query_start": np.int32, "alibi_slopes": np.float32}
    given = {p.name: np.zeros(HEADS, of_heads.get(p.name, np.float32)) if p.is_tensor else 0 for p in mine[0].params}
    attention = tvm_flash.custom_attention("mine")
    if has_sink:
        with pytest.raises(tvm_flash.NotSupportedError, match="'mine', which has a sink; pass a key that its mask"):
            attention(q, k, v, **given)
    else:
        assert (attention(q, k, v, **given) == 0).all()
