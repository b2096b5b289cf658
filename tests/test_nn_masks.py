"""Masks of every kind that torch's attention takes, in its drop-in: padding, whole masks, learnt ones."""

from __future__ import annotations

import contextlib
import math

import pytest

from tests.test_torch_program import DEVICES

torch = pytest.importorskip("torch")

from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa  # noqa: E402

from tests.nn_cases import agree, fresh, tensors  # noqa: E402, F401
from tvm_flash.integrations.pytorch import on_cpu  # noqa: E402
from tvm_flash.nn import FallbackWarning, sdpa  # noqa: E402
from tvm_flash.nn import scaled_dot_product_attention as ours  # noqa: E402
from tvm_flash.nn.attend import WholeMask  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("cpu_pack", "fresh"),
    pytest.mark.filterwarnings("error::tvm_flash.nn.FallbackWarning"),
]


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
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_a_bias_is_learnt(dtype, device):
    """Its gradient has its dtype; a sum over a batch is made in float32, and rounded once."""
    if device != "cpu" and dtype == torch.float32:
        pytest.skip("a GPU multiplies 16 bits, and there a row that is as good as hidden is hidden")
    q, k, v = (x.to(dtype) for x in tensors(device=device))
    bias = torch.randn(4, 33, 70).to(device, q.dtype).requires_grad_()
    exact = bias.detach().double().requires_grad_()
    dout = torch.randn(q.shape).to(device, q.dtype)
    (ours(q, k, v, attn_mask=bias) * dout).sum().backward()
    (torch_sdpa(q.double(), k.double(), v.double(), attn_mask=exact) * dout).sum().backward()
    assert bias.grad.dtype == dtype
    close = (1e-5 if dtype == torch.float32 else 2e-2) * max(1.0, float(exact.grad.abs().max()))
    assert (bias.grad - exact.grad).abs().max() < close
    program = torch.compile(lambda b: ours(q, k, v, attn_mask=b), fullgraph=True, backend="aot_eager")
    again = bias.detach().requires_grad_()
    (program(again) * dout).sum().backward()
    assert torch.equal(again.grad, bias.grad)


@pytest.fixture
def unconverted(monkeypatch):
    """No tensor of many elements becomes one of float32."""
    convert = torch.Tensor.float

    def refuse(self):
        assert self.numel() == 1, "a tensor is converted"
        return convert(self)

    monkeypatch.setattr(torch.Tensor, "float", refuse)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_masks_of_16_bits_are_read_as_they_lie(dtype, unconverted):
    """With the bits that come of the same numbers in float32, however they lie."""
    q, k, v = (x.to(dtype).requires_grad_() for x in tensors((40, 130)))
    room = torch.randn(2, 4, 40, 131).to(dtype)
    room[0, 0, 3], room[1, :, :, 70:] = -torch.inf, torch.finfo(dtype).min
    lies = {"whole": room[..., 1:], "for all heads": room[:, :1, :, :130], "over keys": room[:, :1, :1, 1:]}
    lies |= {"over queries": room[..., :1], "keys apart": torch.randn(2, 4, 130, 40).to(dtype).mT}
    for name, mask in lies.items():
        found = []
        for given in (mask, mask.to(torch.float32)):
            out = ours(q, k, v, attn_mask=given)
            found.append((out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))))
        assert all(torch.equal(x, y) for x, y in zip(*found, strict=True)), name
        few = [ours(q[:, :, :2], k, v, attn_mask=x[:, :, : min(2, x.shape[2])]) for x in (mask, mask.to(torch.float32))]
        assert torch.equal(*few), name


def test_packs_without_kernels_for_masks_of_16_bits(monkeypatch):
    """Those for float32 take the mask then, forward and backward."""
    q, k, v = (x.bfloat16().requires_grad_() for x in tensors())
    mask = torch.randn(2, 4, 33, 70).bfloat16().requires_grad_()
    usual = torch.autograd.grad(ours(q, k, v, attn_mask=mask).sum(), (q, k, v, mask))
    there = sdpa.no_kernel

    def refuse(mask, query, key, value, score="identity", *rest, **options):
        return "there is none" if score == "biased_16" else there(mask, query, key, value, score, *rest, **options)

    monkeypatch.setattr(sdpa, "no_kernel", refuse)
    wide = torch.autograd.grad(ours(q, k, v, attn_mask=mask).sum(), (q, k, v, mask))
    assert all(torch.equal(x, y) for x, y in zip(usual, wide, strict=True))


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


@pytest.mark.parametrize("height", (-3e38, -1e9, -1e8, -1e7, -1e4, 1e3, 1e6, 1e9, 3e38))
@pytest.mark.parametrize("how", ("eager", "compiled", "whole process"))
def test_gradients_of_rows_far_from_zero(height, how):
    """What is added to all scores of a row doesn't count; from 2**29 on float32 has one weight for the largest."""
    q = torch.randn(2, 33, 4, 16).transpose(1, 2).requires_grad_()
    k, v = (torch.randn(2, 4, 70, 16, requires_grad=True) for _ in range(2))
    dout, mask = torch.randn(q.shape), torch.randn(2, 1, 33, 70)
    mask[:, :, 3:7] += height
    mask[:, :, 8:12, :30] = height  # a few far from the others
    mask[:, :, 12, 30:] = -torch.inf
    leaves = [q, k, v] if how == "whole process" else [q, k, v, mask.requires_grad_()]  # else torch takes no kernel
    program = {"eager": ours, "whole process": torch_sdpa}.get(how)
    program = program or torch.compile(lambda *x, attn_mask: ours(*x, attn_mask=attn_mask), backend="aot_eager")
    with on_cpu() if how == "whole process" else contextlib.nullcontext():
        found = torch.autograd.grad(program(q, k, v, attn_mask=mask), leaves, dout)
    dtype = torch.float64 if abs(height) < 2**29 else torch.float32
    exact = [x.detach().to(dtype).requires_grad_() for x in (q, k, v, mask)]
    with sdpa_kernel(SDPBackend.MATH):
        out = torch_sdpa(*exact[:3], attn_mask=exact[3])
    wanted = torch.autograd.grad(out, exact[: len(leaves)], dout.to(dtype))
    for got, want in zip(found, wanted, strict=True):
        assert (got - want).abs().max() < 4e-6 * max(1, want.abs().max())


@pytest.mark.parametrize("height", (-1e9, -1e4, 1e3, 3e38))
def test_gradients_of_rows_far_from_zero_in_16_bits(height):
    q = torch.randn(2, 4, 33, 16).bfloat16().requires_grad_()
    k, v = (torch.randn(2, 4, 70, 16).bfloat16().requires_grad_() for _ in range(2))
    dout, mask = torch.randn(q.shape).bfloat16(), torch.randn(2, 1, 33, 70)
    mask[:, :, 3:7] += height
    mask[:, :, 8:12, :30] = height
    mask = mask.bfloat16().requires_grad_()
    leaves = [q, k, v, mask]
    found = torch.autograd.grad(ours(q, k, v, attn_mask=mask), leaves, dout)
    dtype = torch.float64 if abs(height) < 2**29 else torch.float32
    exact = [x.detach().to(dtype).requires_grad_() for x in leaves]
    with sdpa_kernel(SDPBackend.MATH):
        wanted = torch.autograd.grad(torch_sdpa(*exact[:3], attn_mask=exact[3]), exact, dout.to(dtype))
    for got, want in zip(found, wanted, strict=True):
        assert (got - want).abs().max() < 2e-2 * max(1, want.abs().max())


def test_lowest_numbers_that_scores_make_up_for():
    """Scores of 16-bit tensors may be larger than float16's lowest number."""
    q, k, v = (x.half() for x in tensors())
    mask = torch.zeros(2, 1, 1, 70, dtype=torch.float16)
    mask[:, :, :, :60] = torch.finfo(torch.float16).min
    agree(q * 200, k * 200, v, attn_mask=mask)
    agree(q, k, v, attn_mask=mask)


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


@pytest.mark.parametrize("shape", ((2, 4, 0, 70), (2, 1, 0, 70), (0, 70), (2, 4, 0, 1)))
@pytest.mark.parametrize("numbers", (False, True))
def test_a_mask_of_no_queries(shape, numbers):
    q, (k, v) = torch.randn(2, 4, 0, 16), torch.randn(2, 2, 4, 70, 16)
    mask = torch.zeros(shape) if numbers else torch.ones(shape, dtype=torch.bool)
    assert ours(q, k, v, mask).shape == torch_sdpa(q, k, v, mask).shape == (2, 4, 0, 16)


def test_a_mask_fits_keys_of_the_same_length_whichever_symbol_that_is_in_a_program():
    q, k, v = (torch.randn(2, 4, n, 16) for n in (9, 12, 12))

    def masked(n):
        return ours(q, k[:, :, :n], v[:, :, :n], torch.ones(9, n).tril().bool())

    torch._dynamo.reset()
    compiled = torch.compile(masked, backend="eager", fullgraph=True, dynamic=True)
    for n in (5, 7):
        assert (compiled(n) - masked(n)).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("shape", "small"),
    [((2, 1, 1, 96), True), ((1, 1, 64, 96), True), ((2, 1, 64, 96), False), ((2, 32, 64, 96), False)],
)
def test_masks_of_16_bits_that_a_gpu_had_better_widen(shape, small):
    query, key = torch.empty(2, 16, 64, 8), torch.empty(2, 16, 96, 8)
    assert WholeMask(torch.zeros(shape, dtype=torch.bfloat16)).is_small(query, key) == small
