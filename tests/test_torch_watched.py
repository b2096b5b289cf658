"""Whoever watches a PyTorch program sees one operator; a tensor that isn't just memory is right or refused."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402

from tvm_flash import (  # noqa: E402
    ArgumentTypeError,
    NotSupportedError,
    TvmFlashError,
    flash_attention,
    flash_attention_v2,
    padded_attention,
)
from tvm_flash.call import fast  # noqa: E402
from tvm_flash.frameworks import torch_watch  # noqa: E402
from tvm_flash.nn import scaled_dot_product_attention  # noqa: E402

pytestmark = pytest.mark.usefixtures("cpu_pack")

OPERATOR = "tvm_flash::attention"


@pytest.fixture
def qkv():
    torch.manual_seed(0)
    return [torch.randn(1, 2, 20, 32) for _ in range(3)]


def exact(q, k, v):
    return F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)))


def near(found, wanted, bound=1e-5):
    return found.shape == wanted.shape and (found.double() - wanted.double()).abs().max().item() < bound


@pytest.fixture(params=["first call", "known call"])
def known(request, qkv):
    """Whether the fast path knows the call before anybody watches."""
    if request.param == "known call":
        for _ in range(3):
            flash_attention(*qkv)
    return request.param


def test_the_fast_path_can_tell_who_watches():
    assert torch_watch.fields() is not None, "the installed torch isn't read; its calls go the slow way"


def test_a_profiler_sees_the_operator(qkv, known):
    with torch.profiler.profile() as profile:
        flash_attention(*qkv)
    assert OPERATOR in {e.key for e in profile.key_averages()}
    assert torch.autograd._profiler_enabled() is False
    assert near(flash_attention(*qkv), exact(*qkv))


def test_a_dispatch_mode_sees_the_operator(qkv, known):
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            seen.append(str(function))
            return function(*arguments, **(options or {}))

    with Mode():
        out = flash_attention(*qkv)
    assert any("tvm_flash.attention" in name for name in seen) and near(out, exact(*qkv))


def test_a_function_mode_sees_the_operator(qkv, known):
    from torch.overrides import TorchFunctionMode

    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):
            seen.append(str(function))
            return function(*arguments, **(options or {}))

    with Mode():
        flash_attention(*qkv)
    assert any("tvm_flash" in name for name in seen)


def test_operations_are_counted(qkv, known):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        flash_attention(*qkv)
    assert counter.get_total_flops() == 4 * 2 * 20 * 20 * 32


def test_subclasses_answer_in_their_own_way(qkv, known):
    seen = []

    class Logged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, arguments=(), options=None):
            seen.append(str(function))
            return super().__torch_function__(function, types, arguments, options or {})

    out = flash_attention(*(x.as_subclass(Logged) for x in qkv))
    assert isinstance(out, Logged) and any("tvm_flash" in name for name in seen)


class Layer(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, q, k, v):
        return self.function(q * 2, k, v) + 1


@pytest.mark.parametrize("function", [flash_attention, scaled_dot_product_attention])
@pytest.mark.filterwarnings("ignore")
def test_programs_are_traced(qkv, function, known):
    layer = Layer(function)
    wanted = layer(*qkv)
    other = [torch.randn_like(x) for x in qkv]
    for traced in (torch.jit.trace(layer, tuple(qkv)), torch.fx.symbolic_trace(layer)):
        assert near(traced(*qkv), wanted) and near(traced(*other), layer(*other))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_sees_the_operator(qkv, mode, known):
    from torch.fx.experimental.proxy_tensor import make_fx

    traced = make_fx(Layer(flash_attention), tracing_mode=mode)(*qkv)
    assert any("tvm_flash.attention" in str(node.target) for node in traced.graph.nodes)
    assert near(traced(*qkv), Layer(flash_attention)(*qkv))


def test_fake_and_meta_tensors_have_shapes(qkv, known):
    from torch._subclasses.fake_tensor import FakeTensorMode

    out, lse = flash_attention(*(x.to("meta") for x in qkv), return_lse=True)
    assert (out.shape, out.device.type, lse.shape) == (qkv[0].shape, "meta", (1, 2, 20))
    with FakeTensorMode() as mode:
        fake = flash_attention(*map(mode.from_tensor, qkv))
    assert fake.shape == qkv[0].shape


# ---------------------------------------------------------------- derivatives


@pytest.mark.parametrize("which", range(3))
def test_forward_mode_is_refused(qkv, which, known):
    import torch.autograd.forward_ad as forward

    def call(x):
        return flash_attention(*(x if i == which else y for i, y in enumerate(qkv)))

    with pytest.raises(NotSupportedError, match="reverse mode only"):
        torch.func.jvp(call, (qkv[which],), (torch.ones_like(qkv[which]),))
    with forward.dual_level(), pytest.raises(NotSupportedError, match="reverse mode only"):
        call(forward.make_dual(qkv[which], torch.ones_like(qkv[which])))
    assert near(call(qkv[which]), exact(*qkv))


@pytest.mark.parametrize("transform", ["grad", "vjp", "jacrev", "jacfwd", "hessian", "linearize"])
def test_transforms_without_kernels_are_refused(qkv, transform, known, without_backward):
    def loss(q):
        return flash_attention(q, *qkv[1:]).sum()

    with pytest.raises(NotSupportedError, match=r"backward|reverse mode only"):
        if transform in ("vjp", "linearize"):
            getattr(torch.func, transform)(loss, qkv[0])
        else:
            getattr(torch.func, transform)(loss)(qkv[0])


@pytest.mark.parametrize("name", ["alibi_slopes", "out"])
def test_a_gradient_of_another_tensor_is_refused(qkv, name, without_backward):
    tensor = torch.rand(2) if name == "alibi_slopes" else torch.empty_like(qkv[0])
    flash_attention(*qkv, **{name: tensor})
    with pytest.raises(NotSupportedError, match=name):
        flash_attention(*qkv, **{name: tensor.clone().requires_grad_()})
    with torch.no_grad():
        flash_attention(*qkv, **{name: tensor.clone().requires_grad_()})


def test_the_drop_in_has_torchs_derivatives(qkv):
    def loss(function):
        return torch.func.grad(lambda q: function(q, *qkv[1:]).square().sum())(qkv[0])

    found = loss(scaled_dot_product_attention)
    assert near(found, loss(F.scaled_dot_product_attention), 1e-4)


def test_a_mask_that_is_learnt_keeps_its_gradient(qkv):
    bias = torch.zeros(20, 20, requires_grad=True)
    scaled_dot_product_attention(*qkv, attn_mask=bias).square().sum().backward()
    found = bias.grad.clone()
    bias.grad = None
    F.scaled_dot_product_attention(*qkv, attn_mask=bias).square().sum().backward()
    assert near(found, bias.grad, 1e-4) and bias.grad.abs().max() > 0


def _warned(word):
    from tvm_flash.nn import sdpa

    return any(word in reason for reason in sdpa._warned)


def _nothing():
    import contextlib

    return contextlib.nullcontext()


# ---------------------------------------------------------------- tensors that aren't just memory


def test_negated_and_conjugated_views(qkv, known):
    negated = torch._neg_view(qkv[0])
    assert near(flash_attention(negated, *qkv[1:]), exact(-qkv[0], *qkv[1:]))
    imaginary = torch.complex(*qkv[:2]).conj().imag
    assert imaginary.is_neg() and near(flash_attention(imaginary, *qkv[1:]), exact(-qkv[1], *qkv[1:]))


@pytest.mark.filterwarnings("ignore")
def test_kinds_of_tensors_that_no_kernel_reads(qkv):
    q, k, v = qkv
    nested = torch.nested.nested_tensor([torch.randn(n, 2, 32) for n in (3, 5)], layout=torch.jagged)
    for wrong in (nested, q.to_sparse(), torch.quantize_per_tensor(q, 0.1, 0, torch.qint8), q.to(torch.complex64)):
        with pytest.raises(TvmFlashError):
            flash_attention(wrong, k, v)
    with pytest.raises(TvmFlashError, match="k: "):
        flash_attention(q, k.to("meta"), v)
    with pytest.raises(ArgumentTypeError):
        flash_attention(q, np.zeros(q.shape, np.float32), v)


def test_autocast_leaves_float64_alone(qkv):
    q, k, v = (x.double() for x in qkv)
    with torch.autocast("cpu", torch.bfloat16):
        found = scaled_dot_product_attention(q, k, v)
    assert found.dtype == torch.float64 and near(found, exact(q, k, v), 1e-12)


def test_inference_mode_and_no_grad(qkv, known, without_backward):
    asked = [x.clone().requires_grad_() for x in qkv]
    with torch.no_grad():
        assert near(flash_attention(*asked), exact(*qkv))
    with torch.inference_mode():
        assert near(flash_attention(*asked), exact(*qkv))
    with pytest.raises(NotSupportedError, match="backward"):
        flash_attention(*asked)


# ---------------------------------------------------------------- vmap


@pytest.mark.parametrize("dims", [(0, None, None), (0, 1, 2), (None, 0, None)])
def test_vmap_over_any_dimension(qkv, dims):
    torch.manual_seed(1)
    mapped = [x if d is None else torch.stack([x, 2 * x, x - 1], d) for x, d in zip(qkv, dims, strict=True)]
    found = torch.vmap(flash_attention_v2, in_dims=dims)(*mapped)
    for i in range(3):
        one = [x if d is None else x.select(d, i) for x, d in zip(mapped, dims, strict=True)]
        assert near(found[i], flash_attention_v2(*one))


def test_vmap_over_masks_of_the_drop_in(qkv):
    q = torch.stack([qkv[0]] * 3)
    mask = torch.arange(20) < torch.tensor([20, 7, 12])[:, None]
    mask = mask[:, None, None, None]
    _, k, v = qkv

    def run(function):
        return torch.vmap(lambda x, m: function(x, k, v, attn_mask=m))(q, mask)

    assert near(run(scaled_dot_product_attention), run(F.scaled_dot_product_attention))


@pytest.mark.parametrize("head_dim", (20, 32))
@pytest.mark.parametrize("order", ((0, 1, 2, 3, 4), (0, 3, 1, 2, 4)))
def test_vmap_of_the_drop_in_over_any_head_dim_and_layout(order, head_dim):
    """A result whose memory lies otherwise than that of kernels is mapped too."""
    q, k, v = (torch.empty_permuted((3, 2, 4, 5, head_dim), order).normal_() for _ in range(3))
    found = torch.vmap(lambda *x: scaled_dot_product_attention(*x, is_causal=True))(q, k, v)
    assert near(
        found,
        F.scaled_dot_product_attention(*(x.flatten(0, 1) for x in (q, k, v)), is_causal=True).unflatten(0, (3, 2)),
    )


def test_vmap_over_key_ranges(qkv):
    ranges = torch.tensor([[[0, 20]], [[3, 9]]], dtype=torch.int32)
    found = torch.vmap(lambda r: padded_attention(*qkv, r))(ranges)
    for i in range(2):
        assert near(found[i], padded_attention(*qkv, ranges[i]))


def test_a_plain_call_still_takes_the_fast_path(qkv):
    if not fast.is_loaded():
        pytest.skip("the pack has no fast path")
    before = fast._forget()
    flash_attention(*qkv)
    with torch.profiler.profile():
        flash_attention(*qkv)
    flash_attention(*qkv)
    assert fast._forget() >= 1 and before >= 0 and math.isfinite(before)
