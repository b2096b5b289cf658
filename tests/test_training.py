"""Gradients through PyTorch: eager, compiled, under ``torch.func``, with whatever else a training loop does."""

from __future__ import annotations

import functools
import os

import pytest

from tvm_flash import (
    NotSupportedError,
    flash_attention,
    flash_attention_backward,
    flash_attention_v2,
    nn,
    padded_attention,
)
from tvm_flash.call import eager, fast

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("trains")

F = torch.nn.functional
RANGES = torch.tensor([[0, 31], [4, 50]], dtype=torch.int32)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch.manual_seed(0)


def leaves(seqlen_q=33, dtype=torch.float32, slopes=True):
    found = [torch.randn(2, 4, seqlen_q, 64), torch.randn(2, 2, 50, 64), torch.randn(2, 2, 50, 64)]
    found = [x.to(dtype) for x in found] + ([torch.rand(4)] if slopes else [])
    return [x.requires_grad_() for x in found]


def exact(q, k, v, slopes=None, causal=False, ranges=None, softcap=0.0, scale=0.125):
    """Attention and its log-sum-exp in the dtype of its tensors, as one would write it."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    s = q @ k.transpose(-1, -2) * scale
    s = softcap * torch.tanh(s / softcap) if softcap else s
    i = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
    j = torch.arange(k.shape[2])[None]
    if slopes is not None:
        s = s - slopes[..., None, None] * (i - j).abs()
    if causal:
        s = s.masked_fill(j > i, -torch.inf)
    if ranges is not None:
        start, end = (x[:, None, None, None] for x in ranges.unbind(1))
        s = s.masked_fill((j < start) | (j >= end), -torch.inf)
    return torch.softmax(s, -1) @ v, torch.logsumexp(s, -1)


def gradients(function, tensors, weights):
    """Gradients of a weighted sum of the results, by the tensors."""
    tensors = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in tensors]
    results = function(*tensors)
    results = results if isinstance(results, tuple) else (results,)
    sum((r * w.to(r.dtype)).sum() for r, w in zip(results, weights, strict=False)).backward()
    return [x.grad for x in tensors]


def weights(seqlen_q=33):
    return torch.randn(2, 4, seqlen_q, 64), torch.randn(2, 4, seqlen_q)


def close(found, wanted, tolerance=4e-6):
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        error = (a.double() - b.double()).abs().max().item()
        assert error <= tolerance * max(1.0, b.abs().max().item()), error


def double(tensors):
    return [x.detach().double() for x in tensors]


#: Functions of q, k, v and slopes, and what they are in float64.
FUNCTIONS = {
    "plain": (lambda q, k, v, s: flash_attention(q, k, v), lambda q, k, v, s: exact(q, k, v)[0] + 0 * s.sum()),
    "causal with lse": (
        lambda q, k, v, s: flash_attention(q, k, v, causal=True, return_lse=True, alibi_slopes=s),
        functools.partial(exact, causal=True),
    ),
    "padded": (
        lambda q, k, v, s: padded_attention(q, k, v, RANGES, alibi_slopes=s, return_lse=True),
        functools.partial(exact, ranges=RANGES),
    ),
    "softcap, heads last": (
        lambda q, k, v, s: flash_attention_v2(
            *(x.transpose(1, 2) for x in (q, k, v)), softcap=2.0, alibi_slopes=s
        ).transpose(1, 2),
        lambda *a: exact(*a, softcap=2.0)[0],
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("compiled", (None, "aot_eager"))
def test_against_float64(name, compiled):
    ours, theirs = FUNCTIONS[name]
    given, w = leaves(), weights()
    ours = torch.compile(ours, fullgraph=True, backend=compiled) if compiled else ours
    found = gradients(ours, given, w)
    found = [torch.zeros_like(x) if g is None else g for g, x in zip(found, given, strict=True)]
    close(found, gradients(theirs, double(given), w))


def test_the_drop_ins():
    given, w = leaves(slopes=False), weights()
    want = gradients(lambda *a: exact(*a)[0], double(given), w)
    close(gradients(lambda *a: nn.scaled_dot_product_attention(*a, enable_gqa=True), given, w), want)
    q, k, v = (x.transpose(1, 2) for x in given)
    w = (w[0].transpose(1, 2), w[1])
    want = gradients(
        lambda q, k, v: exact(*(x.transpose(1, 2) for x in (q, k, v)))[0].transpose(1, 2), double((q, k, v)), w
    )
    close(gradients(nn.flash_attn_func, (q, k, v), w), want)
    starts = torch.tensor([0, 33, 66], dtype=torch.int32), torch.tensor([0, 50, 100], dtype=torch.int32)

    def ragged(q, k, v):
        rows = [x.flatten(0, 1) for x in (q, k, v)]
        return nn.flash_attn_varlen_func(*rows, *starts, 33, 50).unflatten(0, (2, 33))

    close(gradients(ragged, (q, k, v), w), want)


def test_a_padding_mask_of_the_drop_in():
    given, w = leaves(slopes=False), weights()
    visible = torch.rand(2, 1, 1, 50) > 0.3
    call = functools.partial(nn.scaled_dot_product_attention, attn_mask=visible, enable_gqa=True)

    def theirs(q, k, v):
        return F.scaled_dot_product_attention(q, *(x.repeat_interleave(2, 1) for x in (k, v)), attn_mask=visible)

    close(gradients(call, given, w), gradients(theirs, double(given), w))


def test_a_head_dim_that_is_padded():
    given = [torch.randn(2, 4, 33, 20) for _ in range(3)]
    w = [torch.randn(2, 4, 33, 20)]
    found = gradients(nn.scaled_dot_product_attention, given, w)
    close(found, gradients(F.scaled_dot_product_attention, double(given), w))


@pytest.mark.parametrize("dtype", (torch.bfloat16,))
def test_16_bits(dtype):
    given, w = leaves(dtype=dtype, slopes=False), weights()
    want = gradients(lambda *a: exact(*a, causal=True)[0], double(given), w)
    usual = gradients(lambda *a: exact(*a, causal=True)[0], [x.detach() for x in given], w)
    found = gradients(lambda *a: flash_attention(*a, causal=True), given, w)
    for a, b, c in zip(found, want, usual, strict=True):
        assert a.dtype == dtype
        rounding = torch.finfo(dtype).eps / 2 * b.abs().max()
        assert (a - b).abs().max() <= 2 * (c - b).abs().max() + rounding


def test_what_is_saved():
    """Memory grows with the length, not with its square."""
    sizes = []
    q, k, v, _ = leaves()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append((x.shape, x.dtype)) or x, lambda x: x):
        flash_attention(q, k, v, causal=True)
    shapes = [tuple(s) for s, _ in sizes]
    assert sorted(shapes) == sorted([*(tuple(x.shape) for x in (q, k, v)), tuple(q.shape), tuple(q.shape[:3])])


@pytest.mark.parametrize("which", range(4))
def test_frozen_inputs(which):
    """Only what requires a gradient gets one."""
    given, w = [x.detach() for x in leaves()], weights()
    whole = gradients(lambda *a: flash_attention(*a[:3], alibi_slopes=a[3]), given, w)
    given[which].requires_grad_()
    (flash_attention(*given[:3], alibi_slopes=given[3]) * w[0]).sum().backward()
    for i, x in enumerate(given):
        assert (x.grad is None) == (i != which)
    assert torch.equal(given[which].grad, whole[which])


def test_nobody_asks_for_a_gradient():
    q, k, v, _ = leaves()
    want = flash_attention(*(x.detach() for x in (q, k, v)))
    with torch.no_grad():
        out = flash_attention(q, k, v)
        assert not out.requires_grad and torch.equal(out, want)
    with torch.inference_mode():
        assert torch.equal(flash_attention(q, k, v), want)
    out = flash_attention(q, k, v)
    assert out.requires_grad and torch.equal(out, want)
    flash_attention(q, k, v, return_lse=True)[1].sum().backward()  # by the log-sum-exp alone
    assert not v.grad.any() and q.grad.any()


def test_gradients_as_they_come():
    """Expanded, transposed, or with gaps."""
    q, k, v, _ = leaves()
    out = flash_attention(q, k, v)
    flows = {
        "expanded": torch.ones(()).expand(out.shape),
        "transposed": torch.randn(2, 4, 64, 33).transpose(2, 3),
        "gaps": torch.randn(2, 4, 33, 128)[..., ::2],
    }
    for flow in flows.values():
        found = torch.autograd.grad(out, (q, k, v), flow, retain_graph=True)
        want = torch.autograd.grad(out, (q, k, v), flow.contiguous(), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_twice_through_a_graph():
    q, k, v, _ = leaves()
    loss = flash_attention(q, k, v, causal=True).square().sum()
    first = torch.autograd.grad(loss, (q, k, v), retain_graph=True)
    again = torch.autograd.grad(loss, (q, k, v), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "other bits when asked again"
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_backward_that_is_compiled_by_itself():
    """The compiler has a program for each function, and all calls are of one: their options differ."""
    for options in ({"causal": True}, {"window_size": (3, 1), "softcap": 2.0}):
        given = leaves(seqlen_q=5)
        loss = flash_attention(*given[:3], alibi_slopes=given[3], **options).square().sum()
        want = torch.autograd.grad(loss, given, retain_graph=True)
        with torch._dynamo.compiled_autograd._enable(lambda program: program):
            loss.backward()
        assert all(torch.equal(x.grad, y) for x, y in zip(given, want, strict=True))


@pytest.mark.parametrize("which", range(3))
def test_what_was_kept_is_changed(which):
    given = leaves()[:3]
    moved = [x * 1 for x in given]
    out = flash_attention(*moved)
    moved[which].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_result_that_is_changed():
    out = flash_attention(*leaves()[:3])
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_gradients_of_gradients_are_refused():
    q, k, v, _ = leaves()
    (dq,) = torch.autograd.grad(flash_attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotSupportedError, match="gradient of the gradients"):
        dq.sum().backward()
    with pytest.raises(NotSupportedError, match="reverse mode only"):
        torch.func.hessian(lambda q: flash_attention(q, k, v).sum())(q.detach()[:, :, :2])


def test_forward_mode_is_refused():
    q, k, v = (x.detach() for x in leaves()[:3])
    with pytest.raises(NotSupportedError, match="reverse mode only"):
        torch.func.jvp(lambda q: flash_attention(q, k, v), (q,), (q,))


def test_finite_differences():
    given = [x.detach() for x in leaves()]
    w = weights()[0]

    def loss(tensors):
        return (flash_attention(*tensors[:3], alibi_slopes=tensors[3], causal=True).double() * w).sum().item()

    found = gradients(lambda *a: flash_attention(*a[:3], alibi_slopes=a[3], causal=True), given, (w,))
    for i, gradient in enumerate(found):
        direction = torch.randn_like(given[i])
        step = 1e-2 / direction.abs().max()
        ahead, behind = (
            loss([x + s * step * direction if n == i else x for n, x in enumerate(given)]) for s in (1, -1)
        )
        slope = (gradient.double() * direction).sum().item()
        assert abs((ahead - behind) / (2 * step) - slope) < 2e-2 * max(1.0, abs(slope))


# ---------------------------------------------------------------- programs


@pytest.mark.parametrize("dynamic", (False, True))
def test_compiled_training_steps(dynamic):
    def step(q, k, v, slopes, ranges):
        out, lse = flash_attention(q, k, v, causal=True, return_lse=True)
        padded = padded_attention(q * 2, k, v, ranges, alibi_slopes=slopes)
        return (out * padded).sum() + lse.sum()

    program = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager" if dynamic else "inductor")
    for seqlen_q in (33, 21):
        given = leaves(seqlen_q)
        want = torch.autograd.grad(step(*given, RANGES), given)
        found = torch.autograd.grad(program(*given, RANGES), given)
        close(found, want, 1e-5)


def test_opcheck():
    from tvm_flash.tracing import torch_ops  # noqa: F401, registers the operators

    ops = torch.ops.tvm_flash
    q, k, v, slopes = leaves()
    options = {"causal": True, "return_lse": True}
    for given in ((q, k, v), (q, k, v, slopes), (q, k, v, slopes, RANGES[:, :1], RANGES[:, 1:])):
        assert set(torch.library.opcheck(ops.attention.default, given, options).values()) == {"SUCCESS"}
    assert set(torch.library.opcheck(ops.attention.default, (q, k, v)).values()) == {"SUCCESS"}
    q, k, v, slopes = (x.detach() for x in (q, k, v, slopes))
    out, lse = flash_attention(q, k, v, return_lse=True)
    for names in ([], ["alibi_slopes"]):
        given = (torch.randn_like(out), q, k, v, out, lse, torch.randn_like(lse), slopes)
        results = torch.library.opcheck(ops.attention_backward.default, given, {"gradients": names})
        assert set(results.values()) == {"SUCCESS"}


def test_torch_func():
    q, k, v, slopes = (x.detach() for x in leaves())
    w = weights()[0]

    def loss(q, k, v, slopes):
        return (flash_attention(q, k, v, alibi_slopes=slopes) * w).sum()

    want = gradients(lambda *a: flash_attention(*a[:3], alibi_slopes=a[3]), (q, k, v, slopes), (w,))
    found = torch.func.grad(loss, (0, 1, 2, 3))(q, k, v, slopes)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    _, pull = torch.func.vjp(lambda q: flash_attention(q, k, v, alibi_slopes=slopes), q)
    assert torch.equal(pull(w)[0], want[0])
    stack = torch.stack((q, 2 * q, q - 1))
    mapped = torch.vmap(torch.func.grad(loss, (0, 3)), (0, None, None, None))(stack, k, v, slopes)
    over = torch.func.grad(lambda x: torch.vmap(lambda q: loss(q, k, v, slopes))(x).sum())(stack)
    for i in range(3):
        one = torch.func.grad(loss, (0, 3))(stack[i], k, v, slopes)
        assert all(torch.equal(a[i], b) for a, b in zip(mapped, one, strict=True))
        assert torch.equal(over[i], one[0])


def test_checkpointing():
    from torch.utils.checkpoint import checkpoint

    given, w = leaves(slopes=False), weights()
    want = gradients(flash_attention, given, w)
    for reentrant in (False, True):
        found = gradients(lambda *a, r=reentrant: checkpoint(flash_attention, *a, use_reentrant=r), given, w)
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_autocast():
    given = [torch.randn(2, 4, 33, 64) for _ in range(3)]
    w = weights()

    def ours(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return nn.scaled_dot_product_attention(q, k, v)

    found = gradients(ours, given, w)
    assert all(x.dtype == torch.float32 for x in found)
    close(found, gradients(lambda *a: exact(*a)[0], double(given), w), 2e-2)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(64, 3 * 64)
        self.slopes = torch.nn.Parameter(torch.rand(4))

    def forward(self, x):
        qkv = self.project(x).unflatten(-1, (3, 4, 16)).unbind(2)
        return flash_attention_v2(*qkv, causal=True, alibi_slopes=self.slopes).flatten(2)


def test_distributed_data_parallel(tmp_path):
    layer, plain = Layer(), Layer()
    plain.load_state_dict(layer.state_dict())
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(layer)
        x = torch.randn(2, 20, 64)
        for model in (parallel, plain):
            model(x).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    for a, b in zip(layer.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_threads_of_autograd():
    """Backward passes in several threads at once."""
    from concurrent.futures import ThreadPoolExecutor

    given, w = leaves(), weights()

    def run(_):
        return gradients(lambda *a: flash_attention(*a[:3], alibi_slopes=a[3]), given, w)

    want = run(0)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(run, range(12)):
            assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_the_same_as_the_function():
    q, k, v, _ = leaves()
    w = weights()[0]
    out, lse = flash_attention(q, k, v, causal=True, return_lse=True)
    found = torch.autograd.grad(out, (q, k, v), w)
    with torch.no_grad():
        want = flash_attention_backward(w, q, k, v, out, lse, causal=True)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.skipif(os.environ.get(fast.VARIABLE) == "0", reason="the fast path is switched off")
def test_a_training_step_takes_the_fast_path(monkeypatch):
    q, k, v, _ = leaves()
    flash_attention(q, k, v).sum().backward()
    if not fast.is_loaded():
        pytest.skip("the pack has no fast path")
    slow, attention = [], eager.attention
    monkeypatch.setattr(eager, "attention", lambda *a: slow.append(a) or attention(*a))
    for _ in range(8):
        flash_attention(q, k, v).sum().backward()
    assert not slow
