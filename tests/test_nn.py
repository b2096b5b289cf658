"""The drop-ins agree with the functions whose names they have, and say where they leave the work to torch."""

from __future__ import annotations

import inspect
import itertools
import math
import re
import warnings

import pytest

from tests.test_torch_program import DEVICES
from tvm_flash import InvalidArgumentError, NotSupportedError, flash_attention_v2

torch = pytest.importorskip("torch")

from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa  # noqa: E402

from tvm_flash import nn  # noqa: E402
from tvm_flash.nn import FallbackWarning, sdpa, sequences  # noqa: E402
from tvm_flash.nn import scaled_dot_product_attention as ours  # noqa: E402

pytestmark = [pytest.mark.usefixtures("cpu_pack"), pytest.mark.filterwarnings("error::tvm_flash.nn.FallbackWarning")]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    sdpa._warned.clear()
    torch.manual_seed(0)


def tensors(lengths=(33, 70), head_dims=(64, 64), heads=(4, 4), batch=(2,), device="cpu"):
    dtype = torch.float32 if device == "cpu" else torch.float16
    (seqlen_q, seqlen_kv), (head_dim, head_dim_v) = lengths, head_dims
    shapes = ((heads[0], seqlen_q, head_dim), (heads[1], seqlen_kv, head_dim), (heads[1], seqlen_kv, head_dim_v))
    return [torch.randn(*batch, *s).to(device, dtype) for s in shapes]


def agree(q, k, v, **options):
    """Ours is as near to float64 as torch's in the same dtype: twice its error, plus one rounding."""
    out, same = ours(q, k, v, **options), torch_sdpa(q, k, v, **options)
    given = {n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in options.items()}
    want = torch_sdpa(q.double(), k.double(), v.double(), **given)
    assert out.shape == want.shape and out.dtype == q.dtype
    rounding = torch.finfo(q.dtype).eps * want.abs().max().item()
    assert (out - want).abs().max().item() <= 2 * (same - want).abs().max().item() + rounding


def test_signatures():
    documented = "(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False)"
    parameters = inspect.signature(ours).parameters.values()
    assert documented == "(" + ", ".join(str(p.replace(annotation=p.empty)) for p in parameters) + ")"
    names = "q k v dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs"
    assert list(inspect.signature(nn.flash_attn_func).parameters) == names.split()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lengths", ((33, 33), (20, 50), (50, 20), (1, 40), (40, 1)))
@pytest.mark.parametrize("is_causal", (False, True))
def test_causal_is_aligned_top_left(lengths, is_causal, device):
    agree(*tensors(lengths, device=device), is_causal=is_causal)
    agree(*tensors(lengths, device=device), is_causal=is_causal, scale=0.3)


@pytest.mark.parametrize("head_dims", ((60, 60), (40, 24), (3, 9), (64, 50)))
def test_any_head_dim(head_dims):
    agree(*tensors(head_dims=head_dims), is_causal=True)


@pytest.mark.parametrize("batch", ((), (1,), (3,)))
def test_batches(batch):
    q, k, v = tensors(batch=batch)
    agree(q, k, v)
    agree(q.transpose(-1, -2).contiguous().transpose(-1, -2), k, v)  # a last dimension that isn't contiguous


def test_batches_that_broadcast():
    (q, _, _), (_, k, v) = tensors(batch=(3,)), tensors(batch=(1,))
    agree(q, k, v)
    agree(q[:1], *tensors(batch=(3,))[1:])


@pytest.mark.parametrize("device", DEVICES)
def test_grouped_heads(device):
    agree(*tensors(heads=(6, 2), device=device), enable_gqa=True, is_causal=True)


def masks(device="cpu", length=70):
    """Over keys, for a batch of 2: padding at the right, at the left, on both sides, with gaps, of both alike."""
    keys = torch.arange(length)
    right, left = keys < torch.tensor([[length], [31]]), keys >= torch.tensor([[5], [length - 9]])
    named = {"right": right, "left": left, "both": left & (keys < length - 3), "gaps": torch.rand(2, length) > 0.4}
    named |= {"same": right[1:], "all": torch.ones(2, length, dtype=torch.bool), "one": keys[None] == 12}
    return {name: mask[:, None, None].to(device) for name, mask in named.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", masks())
def test_padding_masks(name, device):
    length = 70 if device == "cpu" else 1600
    mask = masks(device, length)[name]
    q, k, v = tensors((33, length), device=device)
    agree(q, k, v, attn_mask=mask)
    agree(q, k, v, attn_mask=mask.expand(-1, 4, 33, -1))
    agree(q[:, :, :1], k, v, attn_mask=mask)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")(q, k, v, attn_mask=mask)
    assert (compiled - ours(q, k, v, attn_mask=mask)).abs().max() <= 4 * torch.finfo(q.dtype).eps


@pytest.mark.parametrize("device", DEVICES[1:])
def test_few_keys_on_a_gpu_are_not_sorted(device):
    """A mask over them is one of scores, for head dimensions of which there are such kernels; others are torch's."""
    agree(*tensors(device=device), attn_mask=masks(device)["gaps"])
    with pytest.warns(FallbackWarning, match=r"sorting fewer than 1536 keys.*padded_attention"):
        ours(*tensors(head_dims=(256, 256), device=device), attn_mask=masks(device)["gaps"])


@pytest.mark.parametrize("hidden", (-math.inf, torch.finfo(torch.float32).min))
def test_padding_masks_of_numbers(hidden):
    for mask in masks().values():
        agree(*tensors(), attn_mask=torch.where(mask, 0.0, hidden))


def test_three_dimensions_with_a_mask():
    mask = torch.rand(1, 1, 70) > 0.3
    agree(*tensors(batch=()), attn_mask=mask)
    agree(*tensors(batch=()), attn_mask=mask[0])


def whole_masks():
    """Masks of any shape, by name, for 2 batch entries, 4 heads, 33 queries and 70 keys."""
    square = torch.rand(33, 70) > 0.2
    square[:, 0] = True
    documents = torch.arange(33)[:, None] // 9 == torch.arange(70) // 18
    return {
        "queries and keys": square,
        "heads": torch.rand(2, 4, 1, 70) > 0.2,
        "everything": torch.rand(2, 4, 33, 70) > 0.5,
        "documents": documents[None, None],
        "a key for all": torch.rand(2, 1, 33, 1) > -1,
        "a bias over keys": torch.randn(2, 1, 1, 70),
        "a bias": torch.randn(4, 33, 70),
        "hidden and biased": torch.where(square, torch.randn(33, 70), -torch.inf),
        "nothing but a large number": torch.full((2, 1, 1, 70), torch.finfo(torch.float32).min),
        "strides": torch.randn(70, 33, 4, 2).permute(3, 2, 1, 0),
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", whole_masks())
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_masks_of_any_shape(name, dtype, device):
    """And their gradients, which torch computes in float64 to compare with."""
    if device != "cpu" and (dtype == torch.float32 or name == "nothing but a large number"):
        pytest.skip("a GPU multiplies 16 bits, and there a row that is as good as hidden is hidden")
    mask = whole_masks()[name].to(device)
    q, k, v = (x.to(dtype).requires_grad_() for x in tensors(device=device))
    given = mask.to(dtype) if mask.is_floating_point() else mask
    out = ours(q, k, v, attn_mask=given)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(SDPBackend.MATH):  # torch's others have gradients 70 times as large in rows of one large number
        want = torch_sdpa(*exact, attn_mask=given.double() if mask.is_floating_point() else mask)
    close = 3e-6 if dtype == torch.float32 else 2e-2
    assert (out - want).abs().max() < close
    dout = torch.randn(out.shape).to(device)
    (out * dout).sum().backward()
    (want * dout).sum().backward()
    for x, y in zip((q, k, v), exact, strict=True):
        assert (x.grad - y.grad).abs().max() < 2 * close * max(1.0, float(y.grad.abs().max()))


@pytest.mark.parametrize("device", DEVICES)
def test_a_bias_is_learnt(device):
    q, k, v = tensors(device=device)
    bias = torch.randn(4, 33, 70).to(device, q.dtype).requires_grad_()
    exact = bias.detach().double().requires_grad_()
    dout = torch.randn(q.shape).to(device, q.dtype)
    (ours(q, k, v, attn_mask=bias) * dout).sum().backward()
    (torch_sdpa(q.double(), k.double(), v.double(), attn_mask=exact) * dout).sum().backward()
    assert (bias.grad - exact.grad).abs().max() < (1e-5 if device == "cpu" else 1e-2)
    program = torch.compile(lambda b: ours(q, k, v, attn_mask=b), fullgraph=True, backend="aot_eager")
    again = bias.detach().requires_grad_()
    (program(again) * dout).sum().backward()
    assert torch.equal(again.grad, bias.grad)


@pytest.mark.parametrize("hidden", (torch.finfo(torch.float32).min, -1e9))
@pytest.mark.parametrize("compiled", (False, True))
def test_rows_hidden_by_a_number_have_the_gradients_of_weights_that_are_the_same(hidden, compiled):
    """As torch's own in float32: scores vanish beside such a number, and every key has the same weight."""
    layout = (2, 33, 4, 16)
    q, dout = (torch.randn(layout).transpose(1, 2).requires_grad_() for _ in range(2))
    k, v = (torch.randn(2, 4, 70, 16, requires_grad=True) for _ in range(2))
    mask = torch.where(torch.rand(2, 1, 33, 70) < 0.5, hidden, torch.randn(2, 1, 33, 70))
    mask[:, :, 3:5], mask[0, :, 7, :69], mask[0, :, 7, 69] = hidden, -torch.inf, hidden
    mask[1, :, 9] = -torch.inf
    mask.requires_grad_()
    program = torch.compile(lambda *x, attn_mask: ours(*x, attn_mask=attn_mask), fullgraph=True, backend="aot_eager")
    leaves, found = (q, k, v, mask), []
    for f in (program if compiled else ours, torch_sdpa):
        out = f(q, k, v, attn_mask=mask)
        seen = torch.ones(2, 1, 33, 1)
        seen[1, :, 9] = 0  # torch has NaN there
        found.append((out.detach() * seen, *torch.autograd.grad(out, leaves, dout.detach() * seen)))
    for got, want in zip(*found, strict=True):
        want = want.nan_to_num()
        assert (got - want).abs().max() < 2e-5 * max(1, want.abs().max())


def test_a_batch_of_masks_is_mapped():
    q, k, v = tensors()
    mask = torch.rand(3, 33, 70) > 0.4
    mapped = torch.func.vmap(lambda m: ours(q, k, v, attn_mask=m))(mask)
    for x, m in zip(mapped, mask, strict=True):
        assert torch.equal(x, ours(q, k, v, attn_mask=m))


def test_rows_that_see_nothing_are_zero():
    q, k, v = tensors()
    mask = masks()["right"].clone()
    mask[1] = False
    assert not ours(q, k, v, attn_mask=mask)[1].any()


def only_torch():
    """Calls that these kernels don't compute, and the reason that the warning gives."""
    q, k, v = tensors()
    square = torch.rand(33, 70) > 0.2
    square[:, 0] = True
    return [
        ((q, k, v), {"dropout_p": 0.5}, "dropout_p isn't 0"),
        ((q.double(), k.double(), v.double()), {}, "no kernels for torch.float64"),
        ((q, k, v), {"attn_mask": square, "is_causal": True}, "attn_mask and is_causal are both given"),
        ((q[None], k[None], v[None]), {}, "5, 5, 5 dimensions"),
        ((q, k, v), {"scale": -0.1}, "scale is -0.1"),
        (tensors(head_dims=(512, 512)), {}, "head dimensions up to"),
    ]


@pytest.mark.parametrize("number", range(len(only_torch())))
def test_what_torch_computes(number):
    arguments, options, reason = only_torch()[number]
    with pytest.warns(FallbackWarning, match=reason), torch.random.fork_rng():
        out = ours(*arguments, **options)
    with torch.random.fork_rng():
        want = torch_sdpa(*arguments, **options)
    assert out.requires_grad == want.requires_grad
    assert "dropout_p" in options or torch.equal(out, want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(*arguments, **options)  # said once


def test_what_torch_refuses_stays_refused():
    q, k, v = tensors()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for arguments, options in (
            ((q, k[..., :32], v), {}),
            (tensors(heads=(6, 2)), {}),
            ((q, k.half(), v), {}),
        ):
            with pytest.raises(RuntimeError) as refused:
                torch_sdpa(*arguments, **options)
            with pytest.raises(RuntimeError, match=re.escape(str(refused.value))):
                ours(*arguments, **options)


def test_training_without_kernels_for_it_goes_through_torch(without_backward):
    q, k, v = (x.requires_grad_() for x in tensors())
    with pytest.warns(FallbackWarning, match="a gradient is required, and no cpu backward kernel"):
        ours(q, k, v, is_causal=True).sum().backward()
    assert all(x.grad is not None for x in (q, k, v))


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_casts_as_torch_does(device):
    q, k, v = (x.float() for x in tensors(device=device))
    with torch.autocast(device, torch.bfloat16):
        out, want = ours(q, k.bfloat16(), v), torch_sdpa(q, k.bfloat16(), v)
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")(q, k.bfloat16(), v)
    assert out.dtype == want.dtype == compiled.dtype == torch.bfloat16
    assert torch.equal(out, compiled) and (out - want).abs().max() < 0.05


@pytest.mark.parametrize("dynamic", (False, True))
def test_compiled(dynamic):
    program = torch.compile(ours, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for lengths in ((33, 33), (40, 40)):
        q, k, v = tensors(lengths)
        assert torch.equal(program(q, k, v, is_causal=True), ours(q, k, v, is_causal=True))


def test_compiled_where_torch_computes():
    q, k, v = (x.double() for x in tensors())
    with pytest.warns(FallbackWarning, match="float64"):
        out = torch.compile(ours, fullgraph=True, backend="aot_eager")(q, k, v)
    assert torch.equal(out, torch_sdpa(q, k, v))


# ---------------------------------------------------------------- flash_attn


def bshd(**options):
    return [x.transpose(1, 2) for x in tensors(**options)]


@pytest.mark.parametrize("device", DEVICES)
def test_flash_attn_func(device):
    q, k, v = bshd(heads=(4, 2), device=device)
    options = {"softmax_scale": 0.2, "causal": True, "window_size": (20, 0), "softcap": 4.0}
    slopes = torch.rand(4, device=device)
    out, lse, pattern = nn.flash_attn_func(q, k, v, 0.0, **options, alibi_slopes=slopes, return_attn_probs=True)
    want = flash_attention_v2(q, k, v, **options, alibi_slopes=slopes, return_lse=True, variant="auto")
    assert torch.equal(out, want[0]) and torch.equal(lse, want[1]) and pattern is None
    assert torch.equal(nn.flash_attn_func(q, k, v, 0.0, None, True), flash_attention_v2(q, k, v, causal=True))


def test_flash_attn_func_is_compiled():
    q, k, v = bshd()
    program = torch.compile(nn.flash_attn_func, fullgraph=True, backend="aot_eager")
    assert torch.equal(program(q, k, v, causal=True), nn.flash_attn_func(q, k, v, causal=True))


@pytest.mark.parametrize("head_dims", ((20, 20), (36, 7), (1, 1), (250, 250), (7, 64)))
def test_flash_attn_func_takes_any_head_dim(head_dims):
    q, k, v = bshd(head_dims=head_dims)
    want, want_lse = exact(q, k, v)
    out, lse, _ = nn.flash_attn_func(q, k, v, return_attn_probs=True)
    assert (out - want).abs().max() <= 3e-6 and (lse - want_lse).abs().max() <= 1e-5
    starts = [torch.arange(3, dtype=torch.int32) * x.shape[1] for x in (q, k)]
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    found = nn.flash_attn_varlen_func(*packed, *starts, q.shape[1], k.shape[1]).view(out.shape)
    assert (found - want).abs().max() <= 3e-6


def test_flash_attn_func_takes_any_strides():
    q, k, v = bshd()
    want = nn.flash_attn_func(q, k, v)
    channels_first = [x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for x in (q, k, v)]
    every_second = [torch.stack((x, x), -1).flatten(-2)[..., ::2] for x in (q, k, v)]
    for strided in (channels_first, every_second):
        assert strided[0].stride(-1) != 1
        assert torch.equal(nn.flash_attn_func(*strided), want)


def test_windows_that_are_unbounded_in_words():
    q, k, v = bshd()
    for one, other in ((None, (-1, -1)), ((None, 3), (-1, 3)), ((5, -7), (5, -1))):
        assert torch.equal(nn.flash_attn_func(q, k, v, window_size=one), nn.flash_attn_func(q, k, v, window_size=other))


def exact(q, k, v):
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = q @ k.mT / q.shape[-1] ** 0.5
    return (torch.softmax(s, -1) @ v).transpose(1, 2), torch.logsumexp(s, -1)


def test_rows_outside_of_all_sequences():
    q, k, v = (torch.randn(40, 2, 32) for _ in range(3))
    starts = torch.tensor([0, 11, 11, 30], dtype=torch.int32)
    out, lse, _ = nn.flash_attn_varlen_func(q, k, v, starts, starts, 19, 19, causal=True, return_attn_probs=True)
    for first, last in ((0, 11), (11, 30)):
        want = nn.flash_attn_func(*(x[None, first:last] for x in (q, k, v)), causal=True)[0]
        assert (out[first:last] - want).abs().max() <= 2e-6
    outside = torch.ones(40, dtype=torch.bool)
    outside[:30] = False
    assert not out[outside].any() and lse[:, outside].isneginf().all() and lse[:, ~outside].isfinite().all()


def test_packed_functions():
    q, k, v = bshd(lengths=(50, 50))
    want = nn.flash_attn_func(q, k, v, causal=True)
    assert torch.equal(nn.flash_attn_qkvpacked_func(torch.stack((q, k, v), 2), causal=True), want)
    assert torch.equal(nn.flash_attn_kvpacked_func(q, torch.stack((k, v), 2), causal=True), want)
    starts, flat = torch.tensor([0, 50, 100], dtype=torch.int32), [x.flatten(0, 1) for x in (q, k, v)]
    out = nn.flash_attn_varlen_qkvpacked_func(torch.stack(flat, 1), starts, 50, causal=True)
    assert (out.view(want.shape) - want).abs().max() <= 2e-6
    ends = (starts, starts, 50, 50)
    out = nn.flash_attn_varlen_kvpacked_func(flat[0], torch.stack(flat[1:], 1), *ends, causal=True)
    assert (out.view(want.shape) - want).abs().max() <= 2e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "lengths", ([(5, 9), (5, 9), (30, 30), (1, 70), (12, 3)], [(8, 8)] * 4, [(0, 4), (7, 0), (3, 3)])
)
def test_varlen(lengths, device):
    dtype = torch.float32 if device == "cpu" else torch.float16
    starts = [
        torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32, device=device)
        for n in zip(*lengths, strict=True)
    ]
    total_q, total_k = (int(s[-1]) for s in starts)
    q = torch.randn(total_q, 4, 64, device=device, dtype=dtype)
    k, v = (torch.randn(total_k, 2, 64, device=device, dtype=dtype) for _ in range(2))
    slopes = torch.rand(len(lengths), 4, device=device)
    options = {"causal": True, "window_size": (25, 0)}
    most = [max(n) for n in zip(*lengths, strict=True)]
    out, lse, _ = nn.flash_attn_varlen_func(
        q, k, v, *starts, *most, alibi_slopes=slopes, return_attn_probs=True, **options
    )
    assert out.shape == q.shape and lse.shape == (4, total_q)
    at_q = at_k = 0
    for (length_q, length_k), slope in zip(lengths, slopes, strict=True):
        rows, columns = slice(at_q, at_q + length_q), slice(at_k, at_k + length_k)
        one = q[rows][None], k[columns][None], v[columns][None]
        want, want_lse, _ = nn.flash_attn_func(*one, alibi_slopes=slope, return_attn_probs=True, **options)
        if length_q:
            assert (out[rows] - want[0]).abs().max() <= (2e-6 if device == "cpu" else 2e-3)
            assert torch.allclose(lse[:, rows], want_lse[0], rtol=0, atol=4e-6)
        at_q, at_k = at_q + length_q, at_k + length_k


@pytest.mark.parametrize("needs_gradients", (False, True))
def test_sequences_where_a_pack_has_no_kernels_for_them(monkeypatch, needs_gradients):
    """A call for each run of equal lengths gives the same, gradients too."""
    lengths = (5, 9), (5, 9), (30, 30), (12, 0), (0, 3)
    starts = [torch.tensor([0, *itertools.accumulate(n)]) for n in zip(*lengths, strict=True)]
    leaves = [torch.randn(60, h, 32, requires_grad=needs_gradients) for h in (4, 2, 2)]

    def attend():
        for x in leaves:
            x.grad = None
        out, lse, _ = nn.flash_attn_varlen_func(
            *leaves, *starts, 30, 30, causal=True, alibi_slopes=torch.ones(5, 4) / 8, return_attn_probs=True
        )
        if needs_gradients:
            out.square().sum().backward()
        return [out.detach(), lse.detach(), *(x.grad for x in leaves if needs_gradients)]

    want = attend()
    monkeypatch.setattr(sequences, "no_kernel", lambda *a, ragged=False: "there is none" if ragged else None)
    calls = []
    attend_once = sequences.attend
    monkeypatch.setattr(sequences, "attend", lambda *a, **b: calls.append(a) or attend_once(*a, **b))
    for a, b in zip(attend(), want, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-5)
    assert len(calls) == 4
    with pytest.raises(InvalidArgumentError, match=r"^cu_seqlens_q: begins with 1"):
        nn.flash_attn_varlen_func(*leaves, starts[0] + 1, starts[1], 30, 30)


def test_what_flash_attn_functions_refuse():
    q, k, v = bshd()
    with pytest.raises(NotSupportedError, match=r"^dropout_p: is 0.1.*give 0.0"):
        nn.flash_attn_func(q, k, v, 0.1)
    packed = [x[0] for x in (q, k, v)]
    good = torch.tensor([0, 33]), torch.tensor([0, 70])
    two = torch.tensor([0, 20, 10]), torch.tensor([0, 70, 70])
    for starts, says in (
        ((torch.tensor([0, 34]), good[1]), "^cu_seqlens_q: ends with 34, expected at most the 33 rows of q"),
        (two, "^cu_seqlens_q: falls from 20 to 10"),
        ((good[0], torch.tensor([-1, 70])), "^cu_seqlens_k: begins with -1"),
        ((good[0], torch.tensor([0, 30, 70])), "^cu_seqlens_k: is of 2 sequences, but cu_seqlens_q of 1"),
    ):
        with pytest.raises(InvalidArgumentError, match=says):
            nn.flash_attn_varlen_func(*packed, *starts, 33, 70)


@pytest.mark.parametrize("head_dim", (32, 7))
@pytest.mark.parametrize("order", ((0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 2, 3)))
def test_results_lie_in_memory_as_torchs_do(order, head_dim):
    q, k, v = (torch.empty_permuted((2, 4, 16, head_dim), order).normal_() for _ in range(3))
    found, wanted = nn.scaled_dot_product_attention(q, k, v), torch_sdpa(q, k, v)
    assert found.stride() == wanted.stride() and (found - wanted).abs().max() < 1e-5


@pytest.mark.parametrize(
    "options", [{"scale": float("inf")}, {"attn_mask": torch.zeros(16, 16, dtype=torch.float16)}], ids=["scale", "mask"]
)
def test_what_torch_makes_of_odd_arguments(options):
    q, k, v = (torch.randn(1, 2, 16, 32) for _ in range(3))

    def outcome(function):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return function(q, k, v, **options).isnan().all().item()
            except RuntimeError as e:
                return type(e)

    assert outcome(nn.scaled_dot_product_attention) == outcome(torch_sdpa)


@pytest.mark.parametrize("kv_heads", (4, 2))
@pytest.mark.parametrize("causal", (False, True))
def test_jagged_tensors(causal, kv_heads, recwarn):
    """Sequences of different lengths, by the kernels for them; gradients flow back into each."""
    lengths = (3, 0, 50, 7)
    leaves = [[torch.randn(n, h, 16, requires_grad=True) for n in lengths] for h in (4, kv_heads, kv_heads)]
    q = torch.nested.as_nested_tensor(leaves[0], layout=torch.jagged)
    k, v = (
        torch.nested.nested_tensor_from_jagged(torch.cat(x), q.offsets()) for x in leaves[1:]
    )  # of the same offsets
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    found = nn.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=kv_heads < 4)
    assert not [w for w in recwarn if issubclass(w.category, FallbackWarning)]
    assert found.shape == q.shape and found.layout == torch.jagged
    found.values().square().sum().backward()
    for b, out in enumerate(found.unbind()):
        if lengths[b]:
            own = [x[b].detach().requires_grad_() for x in leaves]
            want = torch_sdpa(*(x.transpose(0, 1)[None] for x in own), is_causal=causal, enable_gqa=kv_heads < 4)
            assert (out - want[0]).abs().max() < 1e-5
            want.square().sum().backward()
            for x, y in zip(leaves, own, strict=True):
                assert (x[b].grad - y.grad).abs().max() < 1e-4


def test_jagged_tensors_that_are_left_to_torch():
    sequences = [torch.randn(n, 2, 16) for n in (3, 5)]
    q, k, v = (torch.nested.nested_tensor(sequences, layout=torch.jagged).transpose(1, 2) for _ in "qkv")
    with pytest.warns(FallbackWarning, match="offsets of their own"):
        found = nn.scaled_dot_product_attention(q, k, v)
    for a, b in zip(found.unbind(), torch_sdpa(q, k, v).unbind(), strict=True):
        assert (a - b).abs().max() < 1e-5


def test_what_is_no_tensor_is_torchs_to_refuse():
    q, k, v = tensors()
    for call in (lambda f: f(None, k, v), lambda f: f(q.tolist(), k, v), lambda f: f(q, k, v, [[1.0]])):
        with pytest.raises(TypeError) as wanted:
            call(torch_sdpa)
        with pytest.raises(TypeError, match=re.escape(str(wanted.value).splitlines()[0])):
            call(ours)
