"""PyTorch's own list of ways to trace, export, record, transform and distribute a program: each with a call in it."""

from __future__ import annotations

import io
import pickle
import warnings

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402

from tvm_flash import ArgumentTypeError, flash_attention, flash_attention_v2, padded_attention  # noqa: E402
from tvm_flash.nn import FallbackWarning, scaled_dot_product_attention, sdpa  # noqa: E402
from tvm_flash.tracing import torch_decomposed  # noqa: E402

pytestmark = [pytest.mark.usefixtures("cpu_pack"), pytest.mark.filterwarnings("ignore")]


def given():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, 20, 32, generator=generator) for _ in range(3)]


def exact(q, k, v):
    return F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), is_causal=True)


class Plain(torch.nn.Module):
    def forward(self, q, k, v):
        return flash_attention(q, k, v, causal=True)


class DropIn(torch.nn.Module):
    def forward(self, q, k, v):
        return scaled_dot_product_attention(q, k, v, is_causal=True)


class Operator(torch.nn.Module):
    def forward(self, q, k, v):
        return torch.ops.tvm_flash.attention(q, k, v, causal=True)[0]


# ---------------------------------------------------------------- programs


def saved_and_loaded(program):
    buffer = io.BytesIO()
    torch.jit.save(program, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


def jit_trace(model):
    return torch.jit.trace(model.eval(), tuple(given()))


def shapes_of(model):
    from torch.fx.passes.shape_prop import ShapeProp

    program = torch.fx.symbolic_trace(model)
    ShapeProp(program).propagate(*given())
    (output,) = (node.args[0] for node in program.graph.nodes if node.op == "output")
    assert output.meta["tensor_meta"].shape == (2, 4, 20, 32)
    return program


def make_fx(function):
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(function)(*given())


def exported(model, **options):
    return torch.export.export(model, tuple(given()), **options)


def with_dynamic_shapes(model):
    auto = torch.export.Dim.AUTO
    return exported(model, dynamic_shapes=[{0: auto, 2: auto}] * 3).module()


def mapped(model, **options):
    return torch.vmap(lambda q, k, v: model(q[None], k[None], v[None])[0], **options)


WAYS = {
    "jit.trace": jit_trace,
    "jit.trace, saved and loaded": lambda model: saved_and_loaded(jit_trace(model)),
    "jit.freeze": lambda model: torch.jit.freeze(jit_trace(model)),
    "jit.optimize_for_inference": lambda model: torch.jit.optimize_for_inference(jit_trace(model)),
    "jit.fork": lambda model: lambda *x: torch.jit.wait(torch.jit.fork(model, *x)),
    "fx.symbolic_trace": torch.fx.symbolic_trace,
    "fx.symbolic_trace, pickled": lambda model: pickle.loads(pickle.dumps(torch.fx.symbolic_trace(model))),
    "fx.Interpreter": lambda model: torch.fx.Interpreter(torch.fx.symbolic_trace(model)).run,
    "fx.Transformer": lambda model: torch.fx.Transformer(torch.fx.symbolic_trace(model)).transform(),
    "fx, ShapeProp": shapes_of,
    "make_fx": make_fx,
    "make_fx of functionalize": lambda model: make_fx(torch.func.functionalize(model)),
    "export": lambda model: exported(model).module(),
    "export, strict": lambda model: exported(model, strict=True).module(),
    "export, dynamic shapes": with_dynamic_shapes,
    "export, decompositions": lambda model: exported(model).run_decompositions().module(),
    "export, unflattened": lambda model: torch.export.unflatten(exported(model)),
    "draft_export": lambda model: torch.export.draft_export(model, tuple(given())).module(),
    "compile": lambda model: torch.compile(model, backend="aot_eager", fullgraph=True),
    "compile, dynamic shapes": lambda model: torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True),
    "functionalize": torch.func.functionalize,
    "functional_call": lambda model: lambda *x: torch.func.functional_call(model, {}, x),
    "vmap by chunks": lambda model: mapped(model, chunk_size=1),
    "vmap, randomness": lambda model: mapped(model, randomness="different"),
    "checkpoint": lambda model: lambda *x: torch.utils.checkpoint.checkpoint(model, *x, use_reentrant=False),
    "checkpoint, reentrant": lambda model: lambda *x: torch.utils.checkpoint.checkpoint(model, *x, use_reentrant=True),
}


@pytest.mark.parametrize("model", (Plain, DropIn))
@pytest.mark.parametrize("way", WAYS)
def test_a_program(way, model):
    torch._dynamo.reset()
    torch.manual_seed(1)
    program = WAYS[way](model())
    for tensors in (given(), [torch.randn_like(x) for x in given()]):
        found = program(*tensors)
        assert found.shape == tensors[0].shape and (found - exact(*tensors)).abs().max() < 1e-5


@pytest.mark.parametrize("lengths", ((20, 20), (20, 31), (31, 20)))
def test_a_traced_program_takes_other_lengths(lengths):
    """Causal masks are aligned top-left whatever lengths the example had."""

    def tensors(seqlen_q, seqlen_kv):
        return [torch.randn(2, 4, n, 32) for n in (seqlen_q, seqlen_kv, seqlen_kv)]

    program = torch.jit.trace(DropIn(), tuple(tensors(*lengths)))
    for others in ((20, 20), (9, 40), (40, 9), (1, 5)):
        given = tensors(*others)
        assert (program(*given) - exact(*given)).abs().max() < 1e-5


@pytest.mark.parametrize("model", (DropIn, Operator))
def test_torchscript(model):
    program = saved_and_loaded(torch.jit.script(model()))
    assert (program(*given()) - exact(*given())).abs().max() < 1e-5


def test_torchscript_says_what_it_cant():
    with pytest.raises(torch.jit.frontend.NotSupportedError, match="keyword-only"):
        torch.jit.script(Plain())


# ---------------------------------------------------------------- whoever records


def test_an_execution_trace(tmp_path):
    from torch.profiler import ExecutionTraceObserver

    observer = ExecutionTraceObserver().register_callback(str(tmp_path / "trace.json"))
    observer.start()
    out = Plain()(*given())
    observer.stop()
    observer.unregister_callback()
    assert "tvm_flash::attention" in (tmp_path / "trace.json").read_text()
    assert (out - exact(*given())).abs().max() < 1e-5


def test_debugging_modes():
    debug = pytest.importorskip("torch.utils._debug_mode")
    with debug.DebugMode() as mode:
        DropIn()(*given())
    assert "tvm_flash::attention" in mode.debug_string()


def test_contexts_that_change_nothing():
    contexts = (
        torch.autograd.detect_anomaly(),
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
        torch.profiler.record_function("layer"),
        torch.device("meta"),
        torch.inference_mode(),
        torch.autograd.profiler.emit_itt(False),
    )
    want = Plain()(*given())
    for context in contexts:
        tensors = given()
        with context:
            assert torch.equal(Plain()(*tensors), want)


# ---------------------------------------------------------------- exporters without kernels


OPTIONS = {
    "plain": {},
    "causal, fewer queries": {"causal": True, "return_lse": True},
    "window, soft cap, slopes": {"window_size": (5, 2), "softcap": 3.0, "alibi_slopes": torch.rand(4)},
    "padded": {"key_range": torch.tensor([[2, 30], [9, 9]], dtype=torch.int32), "return_lse": True},
    "padded, positioned": {
        "key_range": torch.tensor([[2, 30], [0, 11]], dtype=torch.int32),
        "query_start": torch.tensor([4, -3], dtype=torch.int32),
        "causal": True,
        "window_size": (6, -1),
        "alibi_slopes": torch.rand(2, 4),
    },
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", ("bhsd", "bshd"))
def test_the_decomposition_computes_the_same(options, layout, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, h, n, 32, generator=generator) for h, n in ((4, 17), (2, 31), (2, 31)))
    if layout == "bshd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    arguments = dict(OPTIONS[options])
    if "key_range" in arguments:
        arguments |= {"layout": layout}
    function = padded_attention if "key_range" in arguments else flash_attention
    function = flash_attention_v2 if layout == "bshd" and function is flash_attention else function
    want = function(q, k, v, **arguments)
    monkeypatch.setattr("tvm_flash.tracing.torch_ops.is_for_onnx", lambda: True)
    with torch.profiler.profile() as profile:
        found = function(q, k, v, **arguments)
    assert "tvm_flash::attention" not in {e.key for e in profile.key_averages()}
    pairs = zip(want, found, strict=True) if isinstance(want, tuple) else [(want, found)]
    for a, b in pairs:
        assert torch.allclose(a, b, atol=1e-5) and a.dtype == b.dtype


def test_the_decomposition_of_rows_that_see_nothing_or_too_much():
    """Zeros where a bias or a sink leaves nothing, NaN where a score is infinite, as of the kernel."""
    q, k, v = (torch.randn(2, h, n, 32) for h, n in ((4, 5), (2, 9), (2, 9)))
    bias = torch.where(torch.arange(5)[:, None] == 2, -torch.inf, torch.randn(4, 5, 9))[None]
    bias[0, 0, 3, 1] = torch.inf
    cases = [((q, k, v), {"bias": bias}), ((q, k[:, :, :0], v[:, :, :0]), {"sinks": torch.full((4,), -torch.inf)})]
    cases.append(((q, torch.where(torch.arange(9)[:, None] == 4, torch.inf, k), v), {"causal": True}))
    for given, options in cases:
        want = torch.ops.tvm_flash.attention(*given, **options)[0]
        found = torch_decomposed.attention(*given, **options)[0]
        assert torch.allclose(found, want, atol=1e-5, equal_nan=True)


def test_the_decomposition_is_in_torchs_table():
    table = torch._decomp.decomposition_table
    assert table[torch.ops.tvm_flash.attention.default] is torch_decomposed.attention


@pytest.mark.parametrize("model", (Plain, DropIn))
@pytest.mark.parametrize("dynamo", (True, False))
def test_onnx(model, dynamo):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    tensors = tuple(given())
    if dynamo:
        written = torch.onnx.export(model(), tensors, dynamo=True, verbose=False).model_proto
    else:
        buffer = io.BytesIO()
        torch.onnx.export(model(), tensors, buffer, dynamo=False)
        written = onnx.load_from_string(buffer.getvalue())
    names = [x.name for x in written.graph.input]
    (found,) = ReferenceEvaluator(written).run(None, dict(zip(names, (x.numpy() for x in tensors), strict=True)))
    assert abs(found - exact(*tensors).numpy()).max() < 1e-5


# ---------------------------------------------------------------- tensors that know torch's function only


def test_torchs_causal_biases():
    bias = pytest.importorskip("torch.nn.attention.bias")
    q, k, v = (torch.randn(2, 4, n, 32) for n in (20, 30, 30))
    for make in (bias.causal_upper_left, bias.causal_lower_right):
        mask = make(20, 30)
        want = F.scaled_dot_product_attention(q, k, v, mask)
        assert torch.allclose(scaled_dot_product_attention(q, k, v, mask), want, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        found = scaled_dot_product_attention(q, q, q, bias.causal_lower_right(20, 20))
    assert torch.equal(found, scaled_dot_product_attention(q, q, q, is_causal=True))


def test_a_kind_of_tensor_that_computes_attention_by_itself():
    class Own(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, arguments=(), options=None):
            if function is F.scaled_dot_product_attention:
                return "its own"
            return super().__torch_function__(function, types, arguments, options or {})

    sdpa._warned.clear()
    q, k, v = given()
    with pytest.warns(FallbackWarning, match="Own answers torch's functions"):
        assert scaled_dot_product_attention(q.as_subclass(Own), k, v) == "its own"


def test_masked_tensors_are_refused():
    from torch.masked import masked_tensor

    masked = [masked_tensor(x, torch.ones(x.shape, dtype=torch.bool)) for x in given()]
    with pytest.raises(ArgumentTypeError, match=r"^q: is a MaskedTensor, which doesn't know this operator"):
        flash_attention(*masked)
    with pytest.raises(TypeError):
        scaled_dot_product_attention(*masked)


def test_wrappers_of_two_tensors():
    two = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor
    wrapped = [two(x, 2 * x) for x in given()]
    for model in (Plain(), DropIn(), torch.compile(Plain(), backend="aot_eager", fullgraph=True)):
        out = model(*wrapped)
        assert (out.a - exact(*given())).abs().max() < 1e-5
        assert (out.b - exact(*(2 * x for x in given()))).abs().max() < 1e-5


# ---------------------------------------------------------------- several processes


def test_distributed_tensors(python):
    pytest.importorskip("torch.distributed.tensor")
    python(
        """
import os, tempfile, warnings
import pytest, torch, torch.distributed as dist, torch.multiprocessing as mp
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.experimental import local_map
from tvm_flash import ArgumentTypeError, flash_attention, flash_attention_backward, flash_attention_v2, padded_attention
from tvm_flash.nn import scaled_dot_product_attention

def run(rank, store):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 20, 32, generator=generator) for h in (4, 2, 2))
    slopes, ranges = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([[0, 20], [3, 9]], dtype=torch.int32)
    functions = (
        lambda q, k, v, s, r: flash_attention(q, k, v, causal=True),
        lambda q, k, v, s, r: flash_attention(q, k, v, alibi_slopes=s, return_lse=True)[1],
        lambda q, k, v, s, r: flash_attention_v2(*(x.transpose(1, 2) for x in (q, k, v)), alibi_slopes=s),
        lambda q, k, v, s, r: padded_attention(q, k, v, r),
        lambda q, k, v, s, r: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    )
    for function in functions:
        want = function(q, k, v, slopes, ranges)
        for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
            given = [distribute_tensor(x, mesh, [placement]) for x in (q, k, v)]
            given += [distribute_tensor(x, mesh, [Replicate()]) for x in (slopes, ranges)]
            out = function(*given)
            if placement in (Shard(0), Shard(1)) and function is functions[0]:
                assert out.placements == (placement,), (placement, out.placements)
            assert (out.full_tensor() - want).abs().max() < 1e-5, placement
    square = [x[:, :, :4].repeat(1, 4 // x.shape[1], 1, 1) for x in (q, k, v)]  # as many heads as positions
    parts = [distribute_tensor(x, mesh, [Shard(1)]) for x in (*square, slopes[None].repeat(2, 1))]
    for function in (  # torch keeps what it decided for calls that it takes for the same
        lambda q, k, v, s: flash_attention(q, k, v),
        lambda q, k, v, s: flash_attention_v2(q, k, v),
        lambda q, k, v, s: flash_attention_v2(q, k, v, return_lse=True)[1],
        lambda q, k, v, s: flash_attention(q, k, v, return_lse=True)[1],
        lambda q, k, v, s: flash_attention(q, k, v, alibi_slopes=s),
        lambda q, k, v, s: flash_attention(q, k, v, sinks=s),
    ):
        want = function(*square, slopes[None].repeat(2, 1))
        assert (function(*parts).full_tensor() - want).abs().max() < 1e-5
    learnt = (
        lambda q, k, v, s, r: flash_attention(q, k, v, causal=True, alibi_slopes=s),
        lambda q, k, v, s, r: flash_attention_v2(*(x.transpose(1, 2) for x in (q, k, v)), sinks=s),
        functions[3],
        functions[4],
    )
    for function in learnt:
        given = [x.clone().requires_grad_(x.is_floating_point()) for x in (q, k, v, slopes, ranges)]
        want = function(*given)
        want.square().sum().backward()
        for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
            parts = [distribute_tensor(x, mesh, [placement]) for x in (q, k, v)]
            parts += [distribute_tensor(x, mesh, [Replicate()]) for x in (slopes, ranges)]
            parts = [x.detach().requires_grad_(x.is_floating_point()) for x in parts]
            function(*parts).square().sum().backward()
            for x, y in zip(given, parts):
                assert (x.grad is None) == (y.grad is None)
                assert x.grad is None or (x.grad - y.grad.full_tensor()).abs().max() < 1e-4, placement
    out, lse = flash_attention(q, k, v, return_lse=True)
    want = flash_attention_backward(out, q, k, v, out, lse)
    parts = [distribute_tensor(x, mesh, [Shard(1)]) for x in (out, q, k, v, out, lse)]
    found = flash_attention_backward(*parts)
    assert all((x - y.full_tensor()).abs().max() < 1e-5 for x, y in zip(want, found))
    with pytest.raises(ArgumentTypeError, match="^q: is a Tensor beside a DTensor"):
        flash_attention_backward(parts[0], q, *parts[2:])
    each = local_map(functions[0], out_placements=[Shard(0)], in_placements=([Shard(0)],) * 3 + (None, None),
                     device_mesh=mesh)
    parts = [distribute_tensor(x, mesh, [Shard(0)]) for x in (q, k, v)]
    want = functions[0](q, k, v, None, None)
    assert (each(*parts, None, None).full_tensor() - want).abs().max() < 1e-5
    dist.destroy_process_group()

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(run, (os.path.join(folder, "store"),), nprocs=2, start_method="fork")
"""
    )
