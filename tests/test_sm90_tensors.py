"""Hopper kernels of definitions that read tensors and tables, run on the processor (tests/simt), against float64."""

from __future__ import annotations

import pytest

pytest.importorskip("tvm")
pytest.importorskip("torch")

import numpy as np

from schedules.builder.compile import export_cuda
from schedules.definition.attention import Attention
from schedules.definition.catalogue import FULL, IDENTITY, MASKS, SCORES
from schedules.definition.pattern import match
from schedules.families import maker_of
from schedules.families.interface import BACKWARD, FORWARD, Target
from schedules.templates import v1, v2
from tests import tensor_cases
from tests.definitions.with_tensors import documents, relative
from tests.simt.simulate import Simulated

TARGET = Target("sm_90a")
TRAVERSALS = {"v1": v1.TRAVERSAL, "v2": v2.TRAVERSAL}
LAYOUTS = {"v1": "bhsd", "v2": "bshd"}
BATCH, HEADS, KV_HEADS = 2, 4, 2

DEFINITIONS = {
    "documents": documents,
    "relative": relative,
    "given": Attention(IDENTITY, MASKS["given"]),
    "biased": Attention(SCORES["biased"], FULL),
}

#: Definition, template, head_dim, dtype.
KERNELS = (
    ("documents", "v2", 64, "bfloat16"),
    ("relative", "v1", 128, "float16"),
    ("given", "v2", 128, "bfloat16"),
    ("biased", "v2", 64, "float16"),
)


def values(name, seqlen_q, seqlen_kv):
    """What the definitions read, by name, some of it the same for all of an axis."""

    def of(rng):
        allowed = rng.random((BATCH, 1, seqlen_q, seqlen_kv)) < 0.4
        allowed[0, 0, :, : seqlen_kv // 2] = False  # tiles in which nobody sees anything
        allowed[1, 0, seqlen_q // 2] = False  # and a row
        bias = rng.standard_normal((BATCH, HEADS, seqlen_q, seqlen_kv), np.float32) * 3
        bias[:, :, :, -20:] = -np.inf  # what comes first is hidden
        bias[0, 1, 1] = -np.inf  # and a row
        return {
            "bias": bias[0] if name == "documents" else bias,
            "key_bias": rng.standard_normal((BATCH, seqlen_kv)).astype(np.float16),
            "gate": rng.random((BATCH, seqlen_q), np.float32),
            "q_document": np.sort(rng.integers(0, 4, (BATCH, seqlen_q))).astype(np.int32),
            "k_document": np.sort(rng.integers(0, 4, (BATCH, seqlen_kv))).astype(np.int32),
            "positions": rng.standard_normal((HEADS, 101), np.float32),
            "allowed": allowed,
            "visible": allowed,
        }

    return of


def made(name, template, head_dim, dtype, folder, kind=FORWARD):
    """What runs a kernel on CPU tensors."""
    pattern = match(DEFINITIONS[name](head_dim, dtype, index_dtype="int32"))
    maker = maker_of(TARGET, kind)
    config = maker.default_configs(template, pattern, TARGET)[0]
    assert maker.feasible(pattern, config, TARGET) is None
    program = maker.program(pattern, config, TARGET, TRAVERSALS[template], "kernel")
    return Simulated(program, export_cuda(program, TARGET), folder)


@pytest.fixture(scope="module", params=KERNELS, ids=lambda k: "-".join(map(str, k)))
def kernel(request, tmp_path_factory):
    return request.param, made(*request.param, tmp_path_factory.mktemp("sm90"))


@pytest.mark.parametrize(("seqlen_q", "seqlen_kv"), ((150, 333), (300, 90), (70, 304)))
def test_forward(kernel, seqlen_q, seqlen_kv):
    (name, template, head_dim, dtype), simulated = kernel
    sizes = (BATCH, HEADS, KV_HEADS, seqlen_q, seqlen_kv, head_dim)
    case = tensor_cases.problem(DEFINITIONS[name], dtype, *sizes, values(name, seqlen_q, seqlen_kv))
    layout = LAYOUTS[template]
    results = tensor_cases.forward(case, lambda given: simulated(given, layout), layout)
    tensor_cases.check_forward(case, *results)


#: The same of backward kernels.
BACKWARD_KERNELS = (
    ("documents", "v2", 64, "bfloat16"),
    ("documents", "v1", 128, "float16"),
    ("relative", "v2", 64, "float16"),
    ("biased", "v2", 128, "bfloat16"),
)


@pytest.fixture(scope="module", params=BACKWARD_KERNELS, ids=lambda k: "-".join(map(str, k)))
def backward_kernel(request, tmp_path_factory):
    return request.param, made(*request.param, tmp_path_factory.mktemp("sm90"), kind=BACKWARD)


@pytest.mark.parametrize(("seqlen_q", "seqlen_kv"), ((150, 250), (200, 90)))
def test_backward(backward_kernel, seqlen_q, seqlen_kv):
    (name, template, head_dim, dtype), simulated = backward_kernel
    sizes = (BATCH, HEADS, KV_HEADS, seqlen_q, seqlen_kv, head_dim)
    case = tensor_cases.problem(DEFINITIONS[name], dtype, *sizes, values(name, seqlen_q, seqlen_kv))
    layout = LAYOUTS[template]
    results = [tensor_cases.backward(case, lambda given: simulated(given, layout), layout) for _ in range(2)]
    tensor_cases.check_backward(case, results[0])
    assert all(np.array_equal(results[0][n], x) for n, x in results[1].items())
