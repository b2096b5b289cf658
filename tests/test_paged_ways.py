"""PyTorch's ways of seeing a program, on ``flash_attention_paged``: each sees an operator, or operators of its own."""

from __future__ import annotations

import io

import pytest
import torch

from tests import ragged_cases
from tests.paged_cases import PagedCase
from tests.ragged_cases import RaggedCase
from tests.test_paged import tensors
from tests.test_varlen import options_of
from tvm_flash import flash_attention_paged
from tvm_flash.tracing import torch_ragged  # noqa: F401  registers the operators

pytestmark = pytest.mark.usefixtures("cpu_pack")

LENGTHS = (33, 0, 5, 70, 1), (40, 9, 5, 160, 130)
CASE = PagedCase(RaggedCase(LENGTHS[0], 4, 64, LENGTHS[1], kv_heads=2, mask="causal", after=(6, 0)), 16, 1)


class Model(torch.nn.Module):
    def forward(self, *arguments):
        return flash_attention_paged(*arguments, causal=True)


def given():
    """Numbers everywhere: a reference evaluator of ONNX multiplies what is masked."""
    found = tensors(CASE)
    return tuple(x.nan_to_num() if x.is_floating_point() else x for x in found.values())


@pytest.mark.parametrize(
    "program",
    [lambda m: torch.jit.trace(m, given()), lambda m: torch.export.export(m, given()).module()],
    ids=("jit.trace", "export"),
)
def test_a_traced_program_calls_the_operator(program):
    traced = program(Model())
    assert "attention_paged" in str(getattr(traced, "inlined_graph", traced.graph))
    arguments = given()
    assert torch.equal(traced(*arguments), Model()(*arguments))
    fewer = [*arguments[:4], arguments[4].clamp(max=38), arguments[5]]  # other lengths, the same program
    assert torch.equal(traced(*fewer), Model()(*fewer))


def test_onnx_has_operators_of_its_own():
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    arguments, buffer = given(), io.BytesIO()
    torch.onnx.export(Model(), arguments, buffer, dynamo=False)
    written = onnx.load_from_string(buffer.getvalue())
    names = [x.name for x in written.graph.input]
    (found,) = ReferenceEvaluator(written).run(None, dict(zip(names, (x.numpy() for x in arguments), strict=True)))
    assert abs(found - Model()(*arguments).numpy()).max() < 1e-5


@pytest.mark.parametrize("options", ({}, {"kv_start": torch.arange(20).view(5, 4).int(), "window_size": (30, 2)}))
def test_the_decomposition_computes_the_same(options):
    of = RaggedCase(LENGTHS[0], 4, 64, LENGTHS[1], kv_heads=2, score="softcap_alibi", params=(("softcap", 2.0),))
    case = PagedCase(of, 16, 1)
    data = ragged_cases.inputs(of)
    options = options_of(of, data) | {"sinks": torch.randn(4)} | options
    want = flash_attention_paged(**tensors(case, data), return_lse=True, **options)
    left, right = options.pop("window_size", (None, None))
    decomposed = torch._decomp.decomposition_table[torch.ops.tvm_flash.attention_paged.default]
    given = tensors(case, data) | options
    found = decomposed(**given, window_left=left, window_right=right, return_lse=True)
    for a, b in zip(want, found, strict=True):
        assert torch.allclose(a, b, atol=2e-5) and a.dtype == b.dtype


@pytest.mark.parametrize("shape", [(1, 4), (5, 1), (4,), (1, 1)], ids=str)
def test_the_decomposition_takes_parameters_of_every_shape(shape):
    options = {"alibi_slopes": torch.rand(shape), "sinks": torch.randn(shape), "return_lse": True}
    options["kv_start"] = torch.arange(torch.Size(shape).numel()).view(shape).int() * 3
    decomposed = torch._decomp.decomposition_table[torch.ops.tvm_flash.attention_paged.default]
    for a, b in zip(flash_attention_paged(*given(), **options), decomposed(*given(), **options), strict=True):
        assert torch.allclose(a, b, atol=2e-5)


def test_operations_are_those_of_each_sequence():
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        Model()(*given())
    assert counter.get_total_flops() == 4 * 4 * 64 * sum(a * b for a, b in zip(*LENGTHS, strict=True))
