"""Attention inside programs that torch traces: compiled, exported, vmapped, on meta tensors; autocast, gradients."""

from __future__ import annotations

import pytest

from tvm_flash import (
    ArgumentTypeError,
    BackendSelector,
    InvalidArgumentError,
    NotSupportedError,
    flash_attention,
    flash_attention_paged,
    flash_attention_v2,
    flash_attention_varlen,
    padded_attention,
)
from tvm_flash.machine import cuda

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.usefixtures("cpu_pack")

DEVICES = (
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not cuda.device_count(), reason="there is no CUDA device")],
    ),
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def tensors(device="cpu", seqlen_q=33):
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.float16
    shapes = ((2, 4, seqlen_q, 64), (2, 2, 70, 64), (2, 2, 70, 64))
    return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]


def ranges(device):
    return torch.tensor([[0, 50], [3, 70]], dtype=torch.int32, device=device)


def everything(q, k, v, slopes, key_range):
    """All public functions in one program."""
    out, lse = flash_attention(q, k, v, causal=True, return_lse=True)
    swapped = [x.transpose(1, 2) for x in (q, k, v)]
    windowed = flash_attention_v2(*swapped, window_size=(9, 2), softcap=20.0, alibi_slopes=slopes).transpose(1, 2)
    padded = padded_attention(q, k, v, key_range, softmax_scale=0.2)
    return out * 2 + windowed, lse, padded


def arguments(device="cpu", seqlen_q=33):
    return (
        *tensors(device, seqlen_q),
        torch.rand(4, generator=torch.Generator().manual_seed(1)).to(device),
        ranges(device),
    )


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("backend", "dynamic"), (("inductor", False), ("aot_eager", True)))
def test_compiled_in_one_graph(device, backend, dynamic):
    program = torch.compile(everything, fullgraph=True, dynamic=dynamic, backend=backend)
    for seqlen_q in (33, 21):
        given = arguments(device, seqlen_q)
        assert_same(program(*given), everything(*given))


def test_inductor_calls_what_exporters_take_apart(monkeypatch):
    """Where ``CI`` is set, it raises for operators in torch's table of decompositions that it doesn't know."""
    monkeypatch.setenv("CI", "true")
    starts = torch.tensor([0, 5, 33], dtype=torch.int32)
    table, lengths = torch.tensor([[3, 0, 1], [2, 1, 0]], dtype=torch.int32), torch.tensor([7, 40], dtype=torch.int32)
    pages = torch.randn(4, 16, 2, 64)
    codes = (pages * 40).to(torch.int8)

    def program(q, k, v):
        rows = [x[0].transpose(0, 1) for x in (q, k, v)]
        ragged = flash_attention_varlen(*rows, starts, starts)
        paged = flash_attention_paged(rows[0].detach(), pages, pages, starts, lengths, table)
        scaled = {"k_scale": torch.ones(2), "v_scale": torch.ones(2)}
        of_8_bits = flash_attention_paged(rows[0].detach(), codes, codes, starts, lengths, table, **scaled)
        return flash_attention(q, k, v)[0].transpose(0, 1) + ragged * 2 + paged * 3 + of_8_bits

    compiled = torch.compile(program, fullgraph=True, backend="inductor")
    leaves = [x[:1, :, :33].clone().requires_grad_() for x in tensors("cpu", 33)]
    with torch._inductor.utils.fresh_inductor_cache():  # else it may look into nothing
        got, want = (f(*leaves) for f in (compiled, program))
        torch.autograd.grad(got.sum(), leaves, retain_graph=True)  # compiles the backward
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()
    gradients = [torch.autograd.grad(x.square().sum(), leaves) for x in (got, want)]
    assert all((a - b).abs().max() <= 1e-5 * b.abs().max() for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("device", DEVICES[1:])
def test_compiled_into_cuda_graphs(device):
    program = torch.compile(everything, fullgraph=True, mode="reduce-overhead")
    given = arguments(device)
    want = everything(*given)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        assert_same([x.clone() for x in program(*given)], want)
    given[4].copy_(torch.tensor([[9, 70], [0, 0]]))  # the same graph, other lengths
    torch.compiler.cudagraph_mark_step_begin()
    assert_same([x.clone() for x in program(*given)], everything(*given))


class Program(torch.nn.Module):
    def forward(self, *given):
        return everything(*given)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("strict", (False, True))
def test_exported(device, strict, tmp_path):
    given = arguments(device)
    length = torch.export.Dim("length", min=2, max=500)
    shapes = ({2: length}, None, None, None, None)
    program = torch.export.export(Program(), given, strict=strict, dynamic_shapes={"given": shapes})
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    for seqlen_q in (33, 50):
        given = arguments(device, seqlen_q)
        assert_same(loaded(*given), everything(*given))


def test_out_in_a_compiled_program():
    q, k, v = tensors()

    def program(out):
        return flash_attention(q, k, v, out=out)

    out = torch.zeros_like(q)
    result = torch.compile(program, fullgraph=True, backend="aot_eager")(out)
    assert torch.equal(out, flash_attention(q, k, v)) and torch.equal(result, out)
    for wrong, error in ((out[:, :1], InvalidArgumentError), (out.half(), ArgumentTypeError)):
        with pytest.raises(Exception, match="out: has") as caught:
            torch.compile(program, fullgraph=True, backend="eager")(wrong)
        assert isinstance(caught.value, error) or error.__name__ in str(caught.value)


def test_a_selected_kernel_in_a_compiled_program():
    q, k, v = tensors()
    kernel = BackendSelector("cpu").select_attention(2, 4, 33, 64)
    program = torch.compile(lambda q: kernel(q, k, v, causal=True), fullgraph=True, backend="aot_eager")
    assert torch.equal(program(q), kernel(q, k, v, causal=True))


def operator():
    from tvm_flash.tracing import torch_ops  # noqa: F401, registers the operators

    return torch.ops.tvm_flash.attention.default


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("others", "options"),
    [
        ((), {}),
        ((), {"causal": True, "return_lse": True, "softmax_scale": 0.3}),
        (("slopes",), {"window_left": 3, "window_right": 5, "softcap": 3.0, "variant": "v2"}),
        ((None, "start", "end"), {"causal": True, "return_lse": True}),
    ],
    ids=["plain", "lse", "rich", "padded"],
)
def test_opcheck(device, others, options):
    made = {"slopes": torch.rand(4), "start": ranges("cpu")[:, :1], "end": ranges("cpu")[:, 1:], None: None}
    given = [made[x] for x in others]
    given = [x if x is None else x.to(device) for x in given]
    results = torch.library.opcheck(operator(), (*tensors(device), *given), options)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("layout", ("bhsd", "bshd"))
def test_meta_tensors_have_shapes(layout):
    function, order = (flash_attention, (1, 1)) if layout == "bhsd" else (flash_attention_v2, (1, 2))
    q, k, v = (x.transpose(*order) for x in tensors())
    out, lse = function(q.to("meta"), k.to("meta"), v.to("meta")[..., :24], return_lse=True)
    assert out.is_meta and out.shape == (*q.shape[:3], 24) and lse.shape == (2, 4, 33)


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        q, k, v = (mode.from_tensor(x) for x in tensors())
        assert flash_attention(q, k, v).shape == q.shape


def test_a_real_tensor_beside_one_that_is_traced():
    q, k, v = tensors()
    with pytest.raises(ArgumentTypeError, match=r"^k: is on meta, but q is on cpu"):
        flash_attention(q, k.to("meta"), v.to("meta"))


@pytest.mark.parametrize("device", DEVICES)
def test_vmap(device):
    q, k, v, slopes, key_range = arguments(device)
    stack = torch.stack([q, q * 2, q * 3])
    for function, dims in (
        (lambda q: flash_attention(q, k, v, causal=True), 0),
        (lambda q: flash_attention(q, k, v, alibi_slopes=slopes), 0),
        (lambda q: padded_attention(q, k, v, key_range), 0),
        (lambda q: flash_attention(q, k, v, return_lse=True)[1], 0),
    ):
        got = torch.vmap(function, dims)(stack)
        assert torch.equal(got, torch.stack([function(x) for x in stack]))
    inner = torch.vmap(lambda q, k: flash_attention(q, k, v), in_dims=(1, None), out_dims=1)(stack.movedim(0, 1), k)
    assert torch.equal(inner[:, 1], flash_attention(stack[1], k, v))


def test_autocast_leaves_the_explicit_functions_alone():
    q, k, v = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        assert flash_attention(q, k, v).dtype == torch.float32
        assert torch.compile(flash_attention, backend="aot_eager")(q, k, v).dtype == torch.float32


def test_gradients_without_kernels_are_refused_in_programs_too(without_backward):
    q, k, v = tensors()
    needs = q.clone().requires_grad_()
    with pytest.raises(NotSupportedError, match="a gradient is required, and nothing here computes it"):
        operator()(needs, k, v)
    with pytest.raises(Exception, match="a gradient is required, and nothing here computes it"):
        torch.compile(lambda q: flash_attention(q, k, v), fullgraph=True, backend="aot_eager")(needs)
    with pytest.raises(NotSupportedError, match="a gradient is required, and nothing here computes it"):
        torch.func.grad(lambda q: flash_attention(q, k, v).sum())(q)
    with torch.no_grad():
        assert torch.equal(operator()(needs, k, v, variant="v1")[0], flash_attention(q, k, v))
