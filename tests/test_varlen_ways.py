"""PyTorch's ways of seeing a program, on ``flash_attention_varlen``: each sees an operator, or operators of its own."""

from __future__ import annotations

import io

import pytest
import torch

from tests import ragged_cases
from tests.ragged_cases import RaggedCase
from tests.test_varlen import options_of, tensors
from tvm_flash import flash_attention_varlen
from tvm_flash.tracing import torch_decomposed, torch_ragged  # noqa: F401  registers the operators

pytestmark = pytest.mark.usefixtures("cpu_pack")

LENGTHS = (33, 0, 5, 70, 1), (40, 9, 5, 60, 130)
CASES = (
    RaggedCase(LENGTHS[0], 4, 64, LENGTHS[1], kv_heads=2, mask="causal", after=(6, 3)),
    RaggedCase((20, 300, 7), 2, 64, kv_heads=1, score="softcap_alibi", params=(("softcap", 2.0),)),
    RaggedCase((20, 0, 30), 2, 32, mask="window", params=(("window_left", 7), ("window_right", 2))),
)


class Model(torch.nn.Module):
    def forward(self, q, k, v, starts_q, starts_k):
        return flash_attention_varlen(q, k, v, starts_q, starts_k, causal=True)


def given():
    return tuple(x.nan_to_num() if x.is_floating_point() else x for x in tensors(CASES[0]))


@pytest.mark.parametrize(
    "program",
    [
        lambda m: torch.jit.trace(m, given()),
        torch.fx.symbolic_trace,
        lambda m: torch.export.export(m, given()).module(),
        lambda m: torch.export.export(m, given()).run_decompositions({}).module(),
    ],
    ids=("jit.trace", "fx", "export", "export, no decompositions"),
)
def test_a_traced_program_calls_the_operator(program):
    traced = program(Model())
    assert "attention_varlen" in str(getattr(traced, "inlined_graph", traced.graph))
    q, k, v, starts_q, starts_k = given()
    assert torch.equal(traced(q, k, v, starts_q, starts_k), Model()(q, k, v, starts_q, starts_k))
    fewer = [x.clamp(max=38) for x in (starts_q, starts_k)]  # other lengths, the same program
    assert torch.equal(traced(q, k, v, *fewer), Model()(q, k, v, *fewer))


@pytest.mark.parametrize("dynamo", (True, False))
def test_onnx_has_operators_of_its_own(dynamo):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    arguments = given()
    if dynamo:
        written = torch.onnx.export(Model(), arguments, dynamo=True, verbose=False).model_proto
    else:
        buffer = io.BytesIO()
        torch.onnx.export(Model(), arguments, buffer, dynamo=False)
        written = onnx.load_from_string(buffer.getvalue())
    names = [x.name for x in written.graph.input]
    (found,) = ReferenceEvaluator(written).run(None, dict(zip(names, (x.numpy() for x in arguments), strict=True)))
    assert abs(found - Model()(*arguments).numpy()).max() < 1e-5


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.mask)
def test_the_decomposition_computes_the_same(case, monkeypatch):
    data = ragged_cases.inputs(case)
    q, k, v, *starts = tensors(case, data)
    q, k, v = (x.nan_to_num() for x in (q, k, v))
    want = flash_attention_varlen(q, k, v, *starts, return_lse=True, **options_of(case, data))
    monkeypatch.setattr("tvm_flash.tracing.torch_ops.is_for_onnx", lambda: True)
    with torch.profiler.profile() as profile:
        found = flash_attention_varlen(q, k, v, *starts, return_lse=True, **options_of(case, data))
    assert "tvm_flash::attention_varlen" not in {e.key for e in profile.key_averages()}
    for a, b in zip(want, found, strict=True):
        assert torch.allclose(a, b, atol=1e-5) and a.dtype == b.dtype
    table = torch._decomp.decomposition_table
    assert table[torch.ops.tvm_flash.attention_varlen.default] is torch_decomposed.attention_varlen


@pytest.mark.parametrize("shape", [(1, 4), (5, 1), (1,), (1, 1)], ids=str)
def test_the_decomposition_takes_parameters_of_every_shape(shape):
    """One value for all sequences or heads; and what is in rows after the last sequence reaches nobody."""
    arguments = tensors(CASES[0])
    assert any(x.isnan().any() for x in arguments[:3])
    options = {"alibi_slopes": torch.rand(shape), "sinks": torch.randn(shape), "causal": True, "return_lse": True}
    found = torch_decomposed.attention_varlen(*arguments, **options)
    for a, b in zip(flash_attention_varlen(*arguments, **options), found, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.usefixtures("trains")
def test_operations_are_those_of_each_sequence():
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v, *starts = given()
    pairs = sum(a * b for a, b in zip(*LENGTHS, strict=True))
    with FlopCounterMode(display=False) as counter:
        flash_attention_varlen(q, k, v, *starts)
    assert counter.get_total_flops() == 4 * 4 * 64 * pairs
    leaf = q.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        flash_attention_varlen(leaf, k, v, *starts).sum().backward()
    assert counter.get_total_flops() == (4 + 10) * 4 * 64 * pairs
