"""Gradients, ragged and paged sequences, and caches on a GPU, through the public functions.

The cases are those of the tests on CPUs, in 16 bits.  Kernels alone have ``test_gpu.py``.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.paged_cases import PAGED_CASES
from tests.ragged_cases import RAGGED_CASES, RaggedCase
from tvm_flash import (
    KernelNotFoundError,
    check_pages,
    flash_attention,
    flash_attention_backward,
    flash_attention_latent,
    flash_attention_paged,
    flash_attention_varlen,
    flash_attention_with_kvcache,
    nn,
    numerics,
)
from tvm_flash.machine import cuda
from tvm_flash.machine.device import Device
from tvm_flash.packs.registry import registry

torch = pytest.importorskip("torch")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not cuda.device_count(), reason="there is no CUDA device")]

from tests import gradient_cases, latent_cases, paged_cases, ragged_cases, test_training  # noqa: E402
from tests import test_kvcache as cache_cases  # noqa: E402
from tests.ragged_cases import rows_tensor  # noqa: E402
from tests.test_varlen import options_of  # noqa: E402

DTYPES = ("float16", "bfloat16")


def of_kind(kind: str):
    """Skips where the GPU's pack has no kernels of a kind."""
    if not cuda.device_count():  # the module's own mark skips, and says why
        return lambda test: test
    found = any(k.entry.kind == kind for arch in Device("cuda", 0).archs() for k in registry().kernels(arch))
    return pytest.mark.skipif(not found, reason=f"the pack of this GPU has no {kind} kernels")


def on_gpu(options: dict) -> dict:
    return {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()}


# ---------------------------------------------------------------- training

MODES = {
    "full": {},
    "causal": {"causal": True},
    "scale": {"scale": 0.21, "causal": True},
    "softcap": {"softcap": 1.5, "causal": True},
    "slopes": {"slopes": True},
}


def dense(dtype, mode, seqlen_q=33, head_dim=64):
    torch.manual_seed(0)
    shapes = ((2, 4, seqlen_q, head_dim), (2, 2, 50, head_dim), (2, 2, 50, head_dim))
    tensors = [torch.randn(s).to("cuda", getattr(torch, dtype)) for s in shapes]
    return tensors + ([torch.rand(4, device="cuda")] if MODES[mode].get("slopes") else [])


def ours(mode):
    options = {k: v for k, v in MODES[mode].items() if k not in ("slopes", "scale")}
    options |= {"softmax_scale": MODES[mode].get("scale", 0.125)}

    def attend(q, k, v, slopes=None):
        return flash_attention(q, k, v, alibi_slopes=slopes, return_lse=True, **options)

    return attend


def plain(mode):
    options = {k: v for k, v in MODES[mode].items() if k != "slopes"}

    def attend(q, k, v, slopes=None):
        with torch.device("cuda"):
            if slopes is None or q.dtype == torch.float64:
                return test_training.exact(q, k, v, slopes, **options)
            out, lse = test_training.exact(*(x.float() for x in (q, k, v)), slopes, **options)  # slopes are float32
            return out.to(q.dtype), lse

    return attend


def weights(seqlen_q=33, head_dim=64):
    torch.manual_seed(1)
    return torch.randn(2, 4, seqlen_q, head_dim, device="cuda"), torch.randn(2, 4, seqlen_q, device="cuda")


@of_kind("backward")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("compiled", (False, True), ids=("eager", "compiled"))
def test_gradients(mode, dtype, compiled):
    tensors = dense(dtype, mode)
    torch.compiler.reset()  # the modes share code, which may be compiled for so many only
    attend = torch.compile(ours(mode), fullgraph=True, backend="aot_eager") if compiled else ours(mode)
    found = test_training.gradients(attend, tensors, weights())
    again = test_training.gradients(attend, tensors, weights())
    usual = test_training.gradients(plain(mode), tensors, weights())
    exact = test_training.gradients(plain(mode), [x.double() for x in tensors], weights())
    for x, y, torchs, want in zip(found, again, usual, exact, strict=True):
        bound = numerics.gradient_bound(*(t.double().cpu().numpy() for t in (torchs, want)), dtype)
        assert (x.double() - want).abs().max().item() <= bound
        assert torch.equal(x, y)


@of_kind("backward_accumulate")
@pytest.mark.parametrize("mode", [m for m in MODES if m != "scale"])
def test_gradients_are_added_to_float32_ones(mode):
    """In place of a conversion; those of slopes too."""
    tensors = dense("bfloat16", mode)
    q, k, v, *slopes = tensors
    options = {k: v for k, v in MODES[mode].items() if k != "slopes"} | {"alibi_slopes": slopes[0] if slopes else None}
    options |= {"gradients": ["alibi_slopes"] if slopes else []}
    dout = weights()[0].bfloat16()
    out, lse = ours(mode)(*tensors)
    want = flash_attention_backward(dout, q, k, v, out, lse, softmax_scale=0.125, **options)
    names = ("dq", "dk", "dv", "d_alibi_slopes")[: len(want)]
    rooms = {n: torch.full(x.shape, 2.0, device="cuda") for n, x in zip(names, want, strict=True)}
    rooms["accumulate"] = True
    found = flash_attention_backward(dout, q, k, v, out, lse, softmax_scale=0.125, **options, **rooms)
    for name, x, y in zip(names, found, want, strict=True):
        assert x is rooms[name] and x.dtype == torch.float32
        assert ((x - 2) - y.float()).abs().max() <= 2.0**-7 * y.float().abs().max() + 1e-5


@of_kind("backward")
def test_a_captured_training_step_replays():
    tensors = dense("bfloat16", "causal")
    dout = weights()[0].bfloat16()
    out, lse = flash_attention(*tensors, causal=True, return_lse=True)

    def step():
        return flash_attention_backward(dout, *tensors, out, lse, causal=True)

    want = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for x in found:
        x.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, found, want))


# ---------------------------------------------------------------- sequences of different lengths


@of_kind("ragged")
@pytest.mark.parametrize("case", [c for c in RAGGED_CASES if c.dtype in DTYPES], ids=lambda c: c.id)
def test_ragged(case):
    data = ragged_cases.inputs(case)
    rows = [rows_tensor(x, case, "cuda") for x in (data.q, data.k, data.v)]
    starts = [torch.from_numpy(x).cuda() for x in case.starts]
    options = on_gpu(options_of(case, data))
    out, lse = flash_attention_varlen(*rows, *starts, return_lse=True, **options)
    ragged_cases.check(case, data, *(x.double().cpu().numpy() for x in (out, lse)), "cuda")


@of_kind("ragged_backward")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case",
    [
        RaggedCase((33, 0, 5, 70, 2), 4, 64, (40, 9, 5, 60, 130), kv_heads=2, mask="causal", after=(6, 3)),
        RaggedCase((20, 300, 7), 2, 64, kv_heads=1, score="softcap_alibi", params=(("softcap", 2.0),)),
    ],
    ids=lambda c: c.mask,
)
def test_ragged_gradients(case, dtype):
    case = ragged_cases.replace(case, dtype=dtype)
    data, given = ragged_cases.inputs(case), ragged_cases.outer(case, with_dlse=True)
    rows = [rows_tensor(x, case, "cuda").nan_to_num().requires_grad_() for x in (data.q, data.k, data.v)]
    starts = [torch.from_numpy(x).cuda() for x in case.starts]
    options = on_gpu(options_of(case, data))
    learnt = [options["alibi_slopes"].requires_grad_()] if "alibi_slopes" in options else []
    out, lse = flash_attention_varlen(*rows, *starts, return_lse=True, **options)
    dout, dlse = (torch.from_numpy(x).nan_to_num().cuda() for x in (given.dout, given.dlse))
    loss = (out * dout).sum() + lse.where(lse.isfinite(), 0).mul(dlse).sum()
    found = torch.autograd.grad(loss, [*rows, *learnt])
    names = ["dq", "dk", "dv", *(["d_alibi_slopes"] if learnt else [])]
    got = {name: x.double().cpu().numpy() for name, x in zip(names, found, strict=True)}
    slopes = got.pop("d_alibi_slopes", None)
    ragged_cases.check_backward(case, data, given, got)
    if slopes is not None:
        # One number of many terms, each off by the rounding of its row's output: what torch happens to be off by is no
        # measure for it.
        want = np.concatenate([slopes_of(case, b, data, given) for b in range(case.batch)])
        assert np.abs(slopes - want).max() <= 2 * numerics.EPSILON[dtype] * np.abs(want).max()


def slopes_of(case, b, data, given):
    """Gradients of the slopes in float64, for sequence ``b``."""
    i, _ = case.rows(b)
    own = gradient_cases.Outer(given.dout[i].swapaxes(0, 1)[None], given.dlse[None, :, i])
    return gradient_cases.expected(case.alone(b), data.alone(case, b), own, ("alibi_slopes",))["d_alibi_slopes"]


@of_kind("ragged")
def test_a_graph_of_ragged_sequences_replays_with_other_lengths():
    torch.manual_seed(0)
    q, k, v = (torch.randn(300, h, 64, device="cuda").half() for h in (4, 2, 2))
    starts = torch.tensor([0, 100, 100, 300], dtype=torch.int32, device="cuda")

    def attend():
        return flash_attention_varlen(q, k, v, starts, starts, causal=True)

    attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    for lengths in ([0, 1, 170, 300], [0, 0, 0, 300], [0, 150, 290, 290]):
        starts.copy_(torch.tensor(lengths))
        graph.replay()
        assert torch.equal(out, attend())


# ---------------------------------------------------------------- keys on pages, and caches


@of_kind("paged")
@pytest.mark.parametrize("case", [c for c in PAGED_CASES if c.of.dtype in DTYPES], ids=lambda c: c.id)
def test_paged(case):
    data = ragged_cases.inputs(case.of)
    made = paged_cases.caches(case, data)
    k_cache, v_cache = paged_cases.cache_tensors(case, made, "cuda")
    starts = torch.from_numpy(case.of.starts[0]).cuda()
    lengths, table = (torch.from_numpy(getattr(made, n)).cuda() for n in ("seqlens_k", "page_table"))
    q = rows_tensor(data.q, case.of, "cuda")
    options = on_gpu(options_of(case.of, data))
    out, lse = flash_attention_paged(q, k_cache, v_cache, starts, lengths, table, return_lse=True, **options)
    paged_cases.check(case, data, *(x.double().cpu().numpy() for x in (out, lse)), "cuda")


@of_kind("paged_decode")
def test_a_graph_of_decoding_replays_with_other_lengths_and_pages():
    torch.manual_seed(0)
    q = torch.randn(3, 8, 128, device="cuda").bfloat16()
    k, v = (torch.randn(200, 16, 2, 128, device="cuda").bfloat16() for _ in "kv")
    starts = torch.arange(4, dtype=torch.int32, device="cuda")
    lengths = torch.tensor([40, 700, 1], dtype=torch.int32, device="cuda")
    table = torch.randperm(200)[:150].int().view(3, 50).cuda()

    def attend():
        return flash_attention_paged(q, k, v, starts, lengths, table, max_seqlen_q=1, causal=True)

    attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    for new in ([41, 701, 2], [0, 800, 33], [800, 1, 799]):
        lengths.copy_(torch.tensor(new))
        table.copy_(torch.randperm(200)[:150].int().view(3, 50))
        check_pages(q, k, starts, lengths, table)
        graph.replay()
        assert torch.equal(out, attend())


@of_kind("paged_decode")
def test_a_sequence_has_the_same_bits_alone_and_among_others():
    torch.manual_seed(0)
    q = torch.randn(9, 8, 128, device="cuda").half()
    k, v = (torch.randn(600, 16, 2, 128, device="cuda").half() for _ in "kv")
    lengths = torch.tensor([5, 1000, 33, 16, 1, 800, 999, 0, 64], dtype=torch.int32, device="cuda")
    table = torch.randperm(600)[: 9 * 64].int().view(9, 64).cuda()
    starts = torch.arange(10, dtype=torch.int32, device="cuda")
    whole = flash_attention_paged(q, k, v, starts, lengths, table, max_seqlen_q=1)
    for b in range(9):
        own = (q[b : b + 1], k, v, starts[:2], lengths[b : b + 1], table[b : b + 1])
        assert torch.equal(flash_attention_paged(*own, max_seqlen_q=1)[0], whole[b])


@of_kind("paged_latent")
@pytest.mark.parametrize("split_length", (None, 64, 1 << 20))
@pytest.mark.parametrize("dtype", DTYPES)
def test_latents(dtype, split_length):
    """What float64 gives, to rounding; alone and among others the same bits, and a graph replays with other lengths."""
    case = latent_cases.Call(keys=(150, 0, 1100, 9, 1), heads=128, dtype=dtype)
    given = on_gpu(case.tensors())
    options = {"softmax_scale": latent_cases.SCALE, "causal": True, "split_length": split_length}

    def attend():
        return flash_attention_latent(**given, max_seqlen_q=3, return_lse=True, **options)

    whole = attend()
    exact = case.exact()
    error, largest = (whole[0].cpu().double() - exact).abs().max().item(), exact.abs().max().item()
    assert error <= numerics.allowed_error(numerics.EPSILON[dtype] * largest, largest, dtype)
    rows = slice(*given["cu_seqlens_q"][2:4].tolist())
    alone = {**given, "q": given["q"][rows], "cu_seqlens_q": torch.tensor([0, 3]).int().cuda()}
    alone |= {name: given[name][2:3] for name in ("seqlens_k", "page_table")}
    out, lse = flash_attention_latent(**alone, return_lse=True, **options)
    assert torch.equal(out, whole[0][rows]) and torch.equal(lse, whole[1][:, rows])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = attend()
    for lengths in ([149, 0, 1024, 8, 1], [1, 0, 70, 3, 1]):
        given["seqlens_k"].copy_(torch.tensor(lengths))
        graph.replay()
        assert all(map(torch.equal, found, attend()))


@of_kind("paged_latent")
def test_more_rows_than_latents_are_decoded_with():
    given = on_gpu(latent_cases.Call(queries=(9, 0, 0, 0, 0), heads=128, dtype="bfloat16").tensors())
    with pytest.raises(KernelNotFoundError, match="1024 query rows a key or fewer, not 1152"):
        flash_attention_latent(**given, softmax_scale=1.0)


@of_kind("paged_decode")
def test_a_token_has_the_same_bits_alone_and_beside_a_prompt():
    """As long as the same is said of the longest sequence."""
    torch.manual_seed(0)
    queries, lengths = (1, 300, 1), (900, 300, 1100)
    q = torch.randn(sum(queries), 8, 128, device="cuda").bfloat16()
    k, v = (torch.randn(300, 16, 2, 128, device="cuda").bfloat16() for _ in "kv")
    table = torch.randperm(300)[: 3 * 80].int().view(3, 80).cuda()
    starts, keys = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ((0, 1, 301, 302), lengths))
    whole = flash_attention_paged(q, k, v, starts, keys, table, max_seqlen_q=300, causal=True)
    for b, at in ((0, 0), (2, 301)):
        own = (q[at : at + 1], k, v, starts[:2], keys[b : b + 1], table[b : b + 1])
        assert torch.equal(flash_attention_paged(*own, max_seqlen_q=300, causal=True)[0], whole[at])


@of_kind("paged")
@pytest.mark.parametrize(
    "options", ({}, {"window_size": (300, 0), "softcap": 3.0}), ids=("causal", "window and softcap")
)
@pytest.mark.parametrize("head_dim", (64, 128))
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_has_the_same_bits_in_chunks(dtype, head_dim, options):
    """Of prompts, chunks that begin at multiples of 64 tokens and have more rows than kernels for decoding take."""
    torch.manual_seed(0)
    length = 1200
    q, k, v = (torch.randn(length, h, head_dim, device="cuda").to(getattr(torch, dtype)) for h in (4, 2, 2))
    table = torch.randperm(-(-length // 16), device="cuda").int()[None]
    cache = torch.zeros(2, table.shape[1], 16, 2, head_dim, dtype=q.dtype, device="cuda")
    for place, x in zip(cache, (k, v), strict=True):
        place[table[0].long()] = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -length % 16)).view(-1, 16, 2, head_dim)

    def chunk(first, count):
        """Rows from ``first`` on, with the keys up to their last."""
        starts, lengths = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([0, count], [first + count]))
        return flash_attention_paged(q[first : first + count], *cache, starts, lengths, table, causal=True, **options)

    whole = chunk(0, length)
    assert not whole.isnan().any()
    for size in (64, 128, 192, 256):  # what is left after the last is more than 32 too
        ends = [*range(size, length, size), length]
        parts = [chunk(first, end - first) for first, end in zip([0, *ends], ends, strict=False)]
        assert torch.equal(torch.cat(parts), whole), size


@of_kind("paged")
@pytest.mark.parametrize("paged", (False, True), ids=("contiguous", "paged"))
@pytest.mark.parametrize("turns", ("", "interleaved", "halves"))
@pytest.mark.parametrize(("queries", "added"), [((1, 1, 1), (1, 1, 1)), ((5, 2, 20), (3, 2, 17))])
@pytest.mark.parametrize(("dtype", "causal"), [(torch.float16, True), (torch.bfloat16, False)])
def test_kvcache(dtype, causal, paged, turns, queries, added):
    q, caches, new, options, want, after = cache_cases.case(dtype, paged, turns, causal, queries, added, leftpad=causal)
    options |= {"cu_seqlens_q": cache_cases.starts(queries), "cu_seqlens_k_new": cache_cases.starts(added)}
    caches, new = [x.cuda() for x in caches], [x.cuda() for x in new]
    out = flash_attention_with_kvcache(q.cuda(), *caches, *new, **on_gpu(options))
    assert (out.double().cpu() - want).abs().max() < 2e-2
    for found, wanted in zip(caches, after, strict=True):
        assert (found.double().cpu() - wanted.double()).abs().max() < 0.02


@of_kind("paged_latent")
def test_rows_behind_sequences_without_queries():
    """No sequence has a query, and the call says so; kernels divided by the rows of the longest one."""
    starts, lengths = torch.zeros(4, dtype=torch.int32, device="cuda"), torch.full((3,), 50).int().cuda()
    table = torch.arange(3, dtype=torch.int32, device="cuda")[:, None]
    q, cache = torch.randn(5, 16, 576, device="cuda").half(), torch.randn(3, 64, 1, 576, device="cuda").half()
    k = cache[..., :64].contiguous()
    for out, lse in (
        flash_attention_latent(q, cache, starts, lengths, table, 0, head_dim_v=512, softmax_scale=1.0, return_lse=True),
        flash_attention_paged(q[..., :64], k, k, starts, lengths, table, 0, return_lse=True),
    ):
        assert not out.any() and torch.all(lse == -torch.inf)


@pytest.mark.parametrize("kind", ("bool", "float32", "bfloat16"))
def test_masks_of_all_shapes_that_broadcast(kind):
    """Of torch's function, forward and backward, on any axes, as a tensor of their own or part of a wider one."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 64, device="cuda").bfloat16().requires_grad_() for n in (70, 96, 96))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    dout = torch.randn(2, 3, 70, 64, device="cuda").bfloat16()
    for wanted in itertools.product((False, True), repeat=4):
        shape = [n if w else 1 for n, w in zip((2, 3, 70, 96), wanted, strict=True)]
        for room in (shape, [*shape[:-1], 128]):
            wide = torch.randn(room, device="cuda")
            if kind == "bool":
                wide = wide > -1.0
                wide[..., 0] = True
            wide = wide if kind == "bool" else wide.to(getattr(torch, kind))
            mask = wide[..., : shape[-1]]
            out = nn.scaled_dot_product_attention(q, k, v, mask)
            of = torch.nn.functional.scaled_dot_product_attention
            same = of(*exact, mask if kind == "bool" else mask.double())
            pairs = zip((out, *torch.autograd.grad(out, (q, k, v), dout)),
                        (same, *torch.autograd.grad(same, exact, dout.double())), strict=True)  # fmt: skip
            assert all((a.double() - b).abs().max() < 0.02 * (1 + b.abs().max()) for a, b in pairs), (shape, room)


def test_drop_ins_copy_rows_that_begin_anywhere():
    torch.manual_seed(0)
    room = torch.randn(3, 2, 40, 4, 67, device="cuda").half()
    q, k, v = (x[..., 3:].requires_grad_() for x in room.unbind())
    copies = [x.detach().clone().requires_grad_() for x in (q, k, v)]

    def swapped(*tensors):
        return nn.scaled_dot_product_attention(*(x.transpose(1, 2) for x in tensors))

    for call in (nn.flash_attn_func, swapped):
        found, wanted = call(q, k, v), call(*copies)
        assert torch.equal(found, wanted)
        dout = torch.randn_like(wanted)
        gradients = [torch.autograd.grad(*x, dout) for x in ((found, (q, k, v)), (wanted, copies))]
        assert all(map(torch.equal, *gradients))


@of_kind("ragged")
def test_drop_ins_of_flash_attn():
    torch.manual_seed(0)
    q, k, v = (torch.randn(70, 4, 64, device="cuda").bfloat16() for _ in "qkv")
    starts = torch.tensor([0, 30, 70], dtype=torch.int32, device="cuda")
    out = nn.flash_attn_varlen_func(q, k, v, starts, starts, 40, 40, causal=True)
    assert torch.equal(out, flash_attention_varlen(q, k, v, starts, starts, causal=True))
    parts = [
        flash_attention(*(x[None, i:j].transpose(1, 2) for x in (q, k, v)), causal=True) for i, j in ((0, 30), (30, 70))
    ]
    whole = torch.cat([x.transpose(1, 2)[0] for x in parts])
    assert (out.float() - whole.float()).abs().max() < 2e-2
