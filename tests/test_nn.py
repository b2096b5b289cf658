"""The drop-ins agree with the functions whose names they have, and say where they leave the work to torch."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import re
import warnings

import pytest

from tests.test_torch_program import DEVICES

torch = pytest.importorskip("torch")

from torch.nn.functional import scaled_dot_product_attention as torch_sdpa  # noqa: E402

from tests.nn_cases import agree, fresh, tensors  # noqa: E402, F401
from tvm_flash import nn  # noqa: E402
from tvm_flash.integrations.pytorch import on_cpu  # noqa: E402
from tvm_flash.nn import FallbackWarning  # noqa: E402
from tvm_flash.nn import scaled_dot_product_attention as ours  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("cpu_pack", "fresh"),
    pytest.mark.filterwarnings("error::tvm_flash.nn.FallbackWarning"),
]


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


@pytest.mark.parametrize("attend", (ours, torch_sdpa), ids=("drop-in", "whole process"))
def test_any_order_in_memory(attend):
    """Also of a head_dim that gets zeros, which leave dimensions in the order that they have."""
    weights = torch.randn(2, 2, 5, 20)
    exact = [x.double().requires_grad_() for x in tensors((5, 7), (20, 20), (2, 2))]
    wanted = torch.autograd.grad(torch_sdpa(*exact), exact, weights.double())
    for order in itertools.permutations(range(4)):
        q, k, v = (torch.empty_permuted(x.shape, order).copy_(x).requires_grad_() for x in exact)
        with on_cpu() if attend is torch_sdpa else contextlib.nullcontext():
            found = torch.autograd.grad(attend(q, k, v), (q, k, v), weights)
        for x, y in zip(found, wanted, strict=True):
            assert (x - y).abs().max() < 1e-5


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
        ((q, k, v), {"scale": 1e-40}, "scale is 1e-40"),
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


@pytest.mark.parametrize("head_dim", (32, 7))
@pytest.mark.parametrize("order", ((0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 2, 3)))
def test_results_lie_in_memory_as_torchs_do(order, head_dim):
    q, k, v = (torch.empty_permuted((2, 4, 16, head_dim), order).normal_() for _ in range(3))
    found, wanted = nn.scaled_dot_product_attention(q, k, v), torch_sdpa(q, k, v)
    assert found.stride() == wanted.stride() and (found - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("dim", range(3))
def test_results_of_expanded_queries_lie_as_torchs_do(dim):
    """Learned queries that a batch, heads or rows share: models view the result as ``(batch, rows, channels)``."""
    q, k, v = (torch.randn(2, 16, 4, 32).transpose(1, 2) for _ in range(3))
    q = q.narrow(dim, 0, 1).expand_as(q)
    assert nn.scaled_dot_product_attention(q, k, v).stride() == torch_sdpa(q, k, v).stride()


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


def jagged(lengths=(3, 5), heads=2):
    rows = torch.nested.nested_tensor([torch.randn(n, heads, 16) for n in lengths], layout=torch.jagged)
    return rows.transpose(1, 2)


@pytest.mark.parametrize("scale", (0.0, -0.5, torch.tensor(0.3)))
def test_jagged_tensors_have_any_scale(scale, recwarn):
    x = jagged()
    found, want = (attend(x, x, x, scale=scale) for attend in (nn.scaled_dot_product_attention, torch_sdpa))
    assert (found.values() - want.values()).abs().max() < 1e-5
    assert (scale > 0) ^ any("positive float32" in str(w.message) for w in recwarn)


def test_jagged_tensors_under_autocast(recwarn):
    x = jagged()
    with torch.autocast("cpu", torch.bfloat16):
        found, want = (attend(x, x, x) for attend in (nn.scaled_dot_product_attention, torch_sdpa))
    assert found.dtype == want.dtype == torch.bfloat16 and found.shape == want.shape
    assert (found.values() - want.values()).abs().max() < 0.02
    assert not [w for w in recwarn if issubclass(w.category, FallbackWarning)]


def test_what_is_no_tensor_or_no_option_is_torchs_to_refuse():
    q, k, v = tensors()
    options = (
        {"scale": torch.tensor(0.3, requires_grad=True)},  # nobody computes its gradient
        {"scale": torch.tensor([0.3])},
        {"dropout_p": None},
        {"is_causal": "no"},
        {"enable_gqa": 2},
    )
    calls = [lambda f: f(None, k, v), lambda f: f(q.tolist(), k, v), lambda f: f(q, k, v, [[1.0]])]
    for call in (*calls, *(lambda f, o=o: f(q, k, v, **o) for o in options)):
        with pytest.raises(TypeError) as wanted:
            call(torch_sdpa)
        with pytest.raises(TypeError) as found:
            call(ours)
        first_lines = (re.sub(r" \(position \d+\)", "", str(x.value)).splitlines()[0] for x in (found, wanted))
        assert len(set(first_lines)) == 1
