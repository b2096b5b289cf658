"""PyTorch's own attention with these kernels below: the registry's implementation, and the block for CPUs."""

import inspect

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

import tvm_flash  # noqa: E402
from tests.paged_cases import PagedCase  # noqa: E402
from tests.ragged_cases import RaggedCase  # noqa: E402
from tests.test_paged import tensors as paged_tensors  # noqa: E402
from tvm_flash import numerics  # noqa: E402
from tvm_flash.errors import NotSupportedError  # noqa: E402
from tvm_flash.frameworks.torch import name_of  # noqa: E402
from tvm_flash.integrations import pytorch  # noqa: E402
from tvm_flash.machine import cuda  # noqa: E402
from tvm_flash.nn import FallbackWarning, sdpa  # noqa: E402

needs_registry = pytest.mark.skipif(
    not hasattr(torch.nn.attention, "activate_flash_attention_impl"), reason="torch has no registry"
)


@pytest.fixture(autouse=True)
def warns_again(cpu_pack):
    sdpa._warned.clear()


def tensors(seqlen_q, seqlen_kv, *, heads=4, kv_heads=4, head_dim=64, dtype=torch.float32, device="cpu", packed=False):
    torch.manual_seed(seqlen_q)
    shapes = ((heads, seqlen_q), (kv_heads, seqlen_kv), (kv_heads, seqlen_kv))
    made = [torch.randn(2, s, h, head_dim, device=device).to(dtype).transpose(1, 2) for h, s in shapes]
    return [(x if packed else x.contiguous()).requires_grad_() for x in made]


def step(q, k, v, dtype=None, **options):
    """Result and gradients, of the tensors as they are or in another dtype."""
    q, k, v = (x.detach().to(dtype or x.dtype).requires_grad_() for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, **options)
    out.backward(torch.cos(torch.arange(out.numel(), device=out.device)).reshape(out.shape).to(out.dtype))
    return [out.detach(), q.grad, k.grad, v.grad]


def check(found, usual, exact, dtype):
    for x, torchs, want in zip(found, usual, exact, strict=True):
        bound = numerics.gradient_bound(*(y.double().cpu().numpy() for y in (torchs, want)), name_of(dtype))
        error = (x.double() - want).abs().max().item()
        assert error <= bound, f"differs by {error:.3g}, allowed {bound:.3g}"
        assert x.stride() == torchs.stride()


def padding(additive):
    lengths = torch.tensor([33, 20])
    visible = (torch.arange(33) < lengths[:, None])[:, None, None]
    return torch.where(visible, 0.0, -torch.inf) if additive else visible


def whole_masks():
    """Masks that are more than where the visible keys of a batch entry start and end."""
    generator = torch.Generator().manual_seed(7)
    gaps = torch.rand(2, 1, 1, 33, generator=generator) > 0.3
    rows = torch.rand(33, 33, generator=generator) > 0.3
    rows[4] = False  # a query that sees nothing
    bias = torch.randn(2, 4, 33, 33, generator=generator)
    return [gaps, rows, torch.where(rows[None].expand(4, -1, -1), 0.0, -torch.inf)[None], bias, bias[:1, :1, :, :1]]


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        *(({"packed": i % 2 == 0}, {"attn_mask": mask}) for i, mask in enumerate(whole_masks())),
        ({"dtype": torch.bfloat16}, {"attn_mask": whole_masks()[3].bfloat16()}),
        ({"dtype": torch.float16, "head_dim": 20}, {"attn_mask": whole_masks()[1], "scale": 0.3}),
        ({"kv_heads": 2}, {"attn_mask": whole_masks()[3], "enable_gqa": True}),
        ({}, {}),
        ({"packed": True}, {"is_causal": True}),
        ({"seqlen_q": 20}, {"is_causal": True}),
        ({"seqlen_q": 50, "packed": True}, {"is_causal": True, "scale": 0.3}),
        ({"kv_heads": 2}, {"is_causal": True, "enable_gqa": True}),
        ({"head_dim": 20, "packed": True}, {}),
        ({"dtype": torch.bfloat16, "packed": True}, {"is_causal": True}),
        ({"dtype": torch.float16, "head_dim": 100}, {}),
        ({}, {"attn_mask": padding(False)}),
        ({"packed": True}, {"attn_mask": padding(True)}),
    ],
    ids=lambda x: str({n: tuple(y.shape) if isinstance(y, torch.Tensor) else y for n, y in x.items()}),
)
def test_on_cpu(sizes, options, monkeypatch):
    given = tensors(**{"seqlen_q": 33, "seqlen_kv": 33, **sizes})
    dtype = given[0].dtype
    usual = step(*given, **options)
    exact_options = dict(options)
    if "attn_mask" in options and options["attn_mask"].dtype != torch.bool:
        exact_options["attn_mask"] = options["attn_mask"].double()
    exact = step(*given, dtype=torch.float64, **exact_options)
    calls = []
    for name in ("_forward", "_backward"):
        function = getattr(pytorch, name)
        monkeypatch.setattr(
            pytorch, name, lambda *a, name=name, function=function, **o: calls.append(name) or function(*a, **o)
        )
    with pytorch.on_cpu():
        found = step(*given, **options)
        again = step(*given, **options)
    assert calls == ["_forward", "_backward"] * 2
    assert all(map(torch.equal, found, again))
    check(found, usual, exact, dtype)
    assert all(map(torch.equal, step(*given, **options), usual)), "torch's own kernels compute again"


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize(
    ("options", "expanded"),
    [*((x, None) for x in ({}, {"is_causal": True}, {"attn_mask": torch.randn(20, 33)})), *(({}, x) for x in range(3))],
    ids=["plain", "causal", "mask", *(f"axis {x} expanded" for x in range(3))],
)
def test_results_lie_as_torchs_do(packed, options, expanded):
    """A program that Inductor compiled fails over strides that aren't those of torch's kernels."""
    q, k, v = (x.detach() for x in tensors(20, 33, packed=packed))
    q = q if expanded is None else q.narrow(expanded, 0, 1).expand_as(q)
    operators = torch.ops.aten

    def strides():
        out, lse = operators._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, **options)
        given = {"dropout_p": 0.0, "is_causal": False, **options}
        backward = operators._scaled_dot_product_flash_attention_for_cpu_backward
        return [x.stride() for x in (out, lse, *backward(torch.ones_like(out), q, k, v, out, lse, **given))]

    usual = strides()
    with pytorch.on_cpu():
        assert strides() == usual


def test_torch_computes_what_these_kernels_do_not():
    given = tensors(33, 33)
    for options, reason in (
        ({"dtype": torch.float64}, "no kernels for torch.float64"),
        ({"scale": -1.0}, "scale is -1"),
    ):
        usual = step(*given, **options)
        with pytorch.on_cpu(), pytest.warns(FallbackWarning, match=reason):
            assert all(map(torch.equal, step(*given, **options), usual))


def test_modules_and_compiled_programs():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    x = torch.randn(2, 33, 64)

    def gradients(module):
        layer.zero_grad()
        module(x).square().sum().backward()
        return [p.grad.clone() for p in layer.parameters()]

    usual = gradients(layer)
    torch._dynamo.reset()
    with pytorch.on_cpu():
        for module in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
            found = gradients(module)
            assert not all(map(torch.equal, found, usual)), "torch's own kernel computed"
            for a, b in zip(found, usual, strict=True):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_the_bits_are_those_of_this_package():
    q, k, v = (x.detach() for x in tensors(33, 33))
    with pytorch.on_cpu():
        assert torch.equal(F.scaled_dot_product_attention(q, k, v), tvm_flash.flash_attention(q, k, v))


def as_torch_describes(name, *args, **options):
    """What torch's meta function says of an operator's results: shape, dtype and strides of each tensor."""
    meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in args]
    return described(getattr(torch.ops.aten, name)(*meta, **options))


def described(results):
    return [(tuple(x.shape), x.dtype, x.stride()) if isinstance(x, torch.Tensor) else x for x in results]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_results_for_cuda_are_as_torch_describes_them(packed, causal):
    """The functions know nothing of a device, so that a CPU can show what they give for each operator."""
    q, k, v = (x.detach() for x in tensors(33, 47, kv_heads=2, packed=packed))
    found = pytorch._cuda_forward(q, k, v, 0.0, causal, False, scale=0.2)
    assert described(found) == as_torch_describes(
        "_scaled_dot_product_flash_attention", q, k, v, 0.0, causal, False, scale=0.2
    )
    out, lse = tvm_flash.flash_attention(q, k, v, causal=causal, softmax_scale=0.2, return_lse=True)
    torch.testing.assert_close(found[0], out, atol=1e-6, rtol=0)
    torch.testing.assert_close(found[1], lse, atol=1e-6, rtol=1e-6)
    dout = torch.randn_like(found[0])
    gradients = pytorch._cuda_backward(
        dout, q, k, v, *found[:2], None, None, 33, 47, 0.0, causal, None, None, scale=0.2
    )
    wanted = tvm_flash.flash_attention_backward(dout, q, k, v, out, lse, causal=causal, softmax_scale=0.2)
    for x, want, of in zip(gradients, wanted, (q, k, v), strict=True):
        torch.testing.assert_close(x, want, atol=1e-5, rtol=1e-5)
        assert x.stride() == torch.empty_like(of).stride()

    sequences = [x.transpose(1, 2) for x in (q, k, v)]
    window = {"window_size_left": 9, "window_size_right": -1}
    found = pytorch._flash_forward(*sequences, None, None, 33, 47, 0.0, causal, False, **window)
    assert (
        described(found)[:2]
        == as_torch_describes("_flash_attention_forward", *sequences, None, None, 33, 47, 0.0, causal, False, **window)[
            :2
        ]
    )
    out, lse = tvm_flash.flash_attention(q, k, v, causal=causal, window_size=(9, -1), return_lse=True)
    torch.testing.assert_close(found[0], out.transpose(1, 2), atol=1e-6, rtol=0)
    given = (dout.transpose(1, 2), *sequences, found[0], found[1])
    gradients = pytorch._flash_backward(*given, None, None, 33, 47, 0.0, causal, None, None, **window)
    wanted = tvm_flash.flash_attention_backward(dout, q, k, v, out, lse, causal=causal, window_size=(9, -1))
    for x, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(x.transpose(1, 2), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [(-1, -1), (9, -1)])
@pytest.mark.parametrize("causal", [False, True])
def test_sequences_of_different_lengths(causal, window):
    """What ``varlen_attn`` calls on a CUDA device, on a CPU."""
    torch.manual_seed(0)
    q = torch.randn(60, 4, 64)
    k, v = (torch.randn(71, 2, 64) for _ in range(2))
    starts = [torch.tensor(x, dtype=torch.int32) for x in ([0, 20, 20, 60], [0, 33, 40, 71])]
    sides = dict(zip(("window_size_left", "window_size_right"), window, strict=True))
    asked = (q, k, v, *starts, 40, 33, 0.0, causal, False)
    found = pytorch._flash_forward(*asked, **sides)
    assert described(found)[:2] == as_torch_describes("_flash_attention_forward", *asked, **sides)[:2]
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = tvm_flash.flash_attention_varlen(*leaves, *starts, causal=causal, window_size=window, return_lse=True)
    assert torch.equal(found[0], out) and torch.equal(found[1], lse)
    place = torch.full_like(q, torch.nan)
    assert torch.equal(pytorch._flash_forward_into(place, *asked, **sides), lse) and torch.equal(place, out)
    dout = torch.randn_like(q)
    out.backward(dout)
    gradients = pytorch._flash_backward(dout, q, k, v, *found[:2], *asked[3:9], None, None, **sides)
    assert all(torch.equal(a, b.grad) for a, b in zip(gradients, leaves, strict=True))
    assert "alibi_slopes isn't taken" in pytorch._flash_forward(*asked, alibi_slopes=torch.ones(4))


def test_functions_have_torchs_parameters():
    for functions in (pytorch._CPU, pytorch._CUDA):
        for name, function in functions.items():
            if not hasattr(torch.ops.aten, name):
                continue  # an older torch has fewer functions
            wanted = [a.name for a in getattr(torch.ops.aten, name).default._schema.arguments]
            parameters = inspect.signature(function).parameters
            found = list(parameters)
            if found[-1] == "options":  # handed on to another of these functions
                found = [*found[:-1], *wanted[len(found) - 1 :]]
            # An older torch passes fewer.
            assert found[: len(wanted)] == wanted, name
            assert all(parameters[n].default is not inspect.Parameter.empty for n in found[len(wanted) :]), name


@needs_registry
def test_a_torch_without_cuda_says_so():
    if torch.backends.cuda.is_built():
        pytest.skip("torch was built with CUDA")
    assert pytorch.NAME in torch.nn.attention.list_flash_attention_impls()
    with pytest.raises(NotSupportedError, match="was built without CUDA"):
        torch.nn.attention.activate_flash_attention_impl(pytorch.NAME)
    assert torch.nn.attention.current_flash_attention_impl() is None


@pytest.mark.gpu
@pytest.mark.skipif(not cuda.device_count(), reason="there is no CUDA device")
@needs_registry
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_the_registry(dtype, causal):
    given = tensors(300, 300, dtype=dtype, device="cuda", packed=True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        usual = step(*given, is_causal=causal)
        torch.nn.attention.activate_flash_attention_impl(pytorch.NAME)
        try:
            found, again = step(*given, is_causal=causal), step(*given, is_causal=causal)
            dropped = F.scaled_dot_product_attention(*given, dropout_p=0.5)
        finally:
            torch.nn.attention.restore_flash_attention_impl()
        restored = step(*given, is_causal=causal)
    assert torch.equal(restored[0], usual[0]) and dropped.isfinite().all()
    assert all(map(torch.equal, found, again))
    with sdpa_kernel(SDPBackend.MATH):
        exact = step(*given, dtype=torch.float64, is_causal=causal)
    check(found, usual, exact, dtype)
    q, k, v = (x.detach().transpose(1, 2) for x in given)
    ours = tvm_flash.flash_attention_v2(q, k, v, causal=causal).transpose(1, 2)
    assert torch.equal(found[0], ours)


@pytest.mark.gpu
@pytest.mark.skipif(not cuda.device_count(), reason="there is no CUDA device")
@needs_registry
def test_varlen_attn_by_the_registry():
    from torch.nn.attention.varlen import varlen_attn

    torch.manual_seed(0)
    q, k, v = (torch.randn(700, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    starts = torch.tensor([0, 300, 300, 650], dtype=torch.int32, device="cuda")
    usual = varlen_attn(q, k, v, starts, starts, 350, 350)[:650]
    torch.nn.attention.activate_flash_attention_impl(pytorch.NAME)
    try:
        found = varlen_attn(q, k, v, starts, starts, 350, 350)[:650]
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    assert torch.equal(found, tvm_flash.flash_attention_varlen(q, k, v, starts, starts)[:650])
    torch.testing.assert_close(found.float(), usual.float(), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("head_dim", (64, 20))
@pytest.mark.parametrize("packed", (False, True))
def test_keys_on_pages_of_varlen_attn(head_dim, packed):
    """What ``varlen_attn`` with a block table asks for; results lie as q does."""
    case = PagedCase(RaggedCase((9, 1), 4, 64, (40, 33), kv_heads=2, dtype="bfloat16", mask="causal"), 16, 1)
    given = paged_tensors(case)
    for name in ("q", "k_cache", "v_cache"):
        given[name][..., head_dim:] = 0
    want = tvm_flash.flash_attention_paged(**given, softmax_scale=head_dim**-0.5, causal=True, return_lse=True)
    q, k, v = (given[name][..., :head_dim] for name in ("q", "k_cache", "v_cache"))
    q = q.transpose(0, 1).contiguous().transpose(0, 1) if packed else q.contiguous()
    asked = (q, k, v, given["cu_seqlens_q"], None, 9, 48, 0.0, True, False)
    found = pytorch._flash_forward(*asked, seqused_k=given["seqlens_k"], block_table=given["page_table"])
    assert torch.equal(found[0], want[0][..., :head_dim]) and torch.equal(found[1], want[1])
    assert found[0].stride() == q.stride()
