"""The backward of Hopper kernels, its CUDA sources run on the processor (tests/simt), against float64."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("tvm")
pytest.importorskip("torch")

import numpy as np

from schedules.builder.compile import export_cuda, pattern_of
from schedules.builder.suite import KernelSpec
from schedules.families.interface import Target
from schedules.families.sm90 import backward
from schedules.templates import v1, v2
from tests import cases
from tests.gradient_cases import Kernel, check, low_scores, outer, run
from tests.simt.simulate import Simulated
from tests.torch_cases import own_case
from tvm_flash.packs.manifest import BUILTIN_DEFINITION, LAYOUT_OF_TEMPLATE

TARGET = Target("sm_90a")
TRAVERSALS = {"v1": v1.TRAVERSAL, "v2": v2.TRAVERSAL}

#: Template, head_dim, head_dim_v, mask, score, dtype.
KERNELS = (
    ("v2", 64, 64, "causal", "identity", "bfloat16"),
    ("v1", 128, 128, "full", "identity", "float16"),
    ("v2", 128, 128, "causal", "identity", "bfloat16"),
    ("v2", 128, 128, "window", "softcap", "bfloat16"),
    ("v1", 96, 96, "sink_window", "identity", "float16"),
    ("v2", 128, 128, "positioned", "optional_sinks", "float16"),
    ("v2", 64, 64, "causal", "identity_sinks", "bfloat16"),
    ("v1", 256, 256, "causal", "identity", "bfloat16"),
)


def made(template, head_dim, head_dim_v, mask, score, dtype, folder, **changes):
    """A kernel that runs on CPU tensors."""
    spec = KernelSpec(template, BUILTIN_DEFINITION, mask, score, dtype, head_dim, head_dim_v, kind="backward")
    pattern = pattern_of(spec, TARGET)
    config = replace(backward.default_configs(template, pattern, TARGET)[0], **changes)
    assert backward.feasible(pattern, config, TARGET) is None
    program = backward.program(pattern, config, TARGET, TRAVERSALS[template], spec.symbol)
    simulated = Simulated(program, export_cuda(program, TARGET), folder)
    functions = tuple(simulated.launch(launch.symbol) for launch in program.launches)
    roles = tuple(launch.roles for launch in program.launches)
    kernel = Kernel(functions, roles, program.workspaces, pattern.params, LAYOUT_OF_TEMPLATE[template], program.scalars)
    return SimpleNamespace(spec=spec, params=pattern.params, simulated=simulated, kernel=kernel)


def _in_sections(kernel: Kernel, heads: int) -> Kernel:
    """The same that goes over so many heads at a time, if it is told how many: it changes no bits."""
    scalars = tuple(replace(s, value=heads) if s.name == "section_heads" else s for s in kernel.scalars)
    return replace(kernel, scalars=scalars)


@pytest.fixture(scope="module", params=KERNELS, ids=lambda k: "-".join(map(str, k)))
def made_kernel(request, tmp_path_factory):
    return made(*request.param, tmp_path_factory.mktemp("sm90"))


def test_grouped_heads_ragged_lengths_and_every_order_of_turns(made_kernel):
    """Lengths that divide no tile, rows that see nothing where the mask has such, and a gradient of lse."""
    case = replace(own_case(made_kernel, kv_heads=1, seqlen_q=250, seqlen_kv=213), batch=2)
    data = cases.inputs(case)
    given = outer(case, with_dlse=True)
    results = []
    for order, heads in ((0, 16), (1, 1), (7, 3)):
        made_kernel.simulated.configure(order)
        results.append(run(case, data, given, _in_sections(made_kernel.kernel, heads)))
    made_kernel.simulated.configure()
    check(case, data, given, results[0])
    for other in results[1:]:
        assert all(np.array_equal(results[0][name], x) for name, x in other.items())


def test_keys_that_end_inside_of_a_block_where_scores_are_low(made_kernel):
    """Keys past the last one have scores of 0, whose weights are infinite there: nobody may use them."""
    case = own_case(made_kernel, kv_heads=1, seqlen_q=129, seqlen_kv=200)
    data = low_scores(cases.inputs(case), case.dtype, -20.0 if case.dtype == "float16" else -100.0)
    given = outer(case)
    check(case, data, given, run(case, data, given, made_kernel.kernel))


def test_many_tiles(made_kernel):
    """Every stage of the pipelines is used several times."""
    case = own_case(made_kernel, seqlen_q=450, seqlen_kv=700)
    data = cases.inputs(case)
    given = outer(case)
    check(case, data, given, run(case, data, given, made_kernel.kernel))


def test_a_smaller_head_dim(made_kernel):
    case = replace(own_case(made_kernel, kv_heads=1, seqlen_q=70, seqlen_kv=130), head_dim=40, head_dim_v=24)
    data = cases.inputs(case)
    given = outer(case)
    check(case, data, given, run(case, data, given, made_kernel.kernel))
