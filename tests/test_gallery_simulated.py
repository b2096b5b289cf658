"""GPU kernels of definitions to copy, run on the processor (tests/simt): tiles that see nothing, known by positions."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("tvm")
pytest.importorskip("torch")

from schedules.builder.compile import export_cuda
from schedules.definition.definition_file import DefinitionFile
from schedules.definition.pattern import match
from schedules.families import maker_of
from schedules.families.interface import BACKWARD, FORWARD, Target
from schedules.templates import v1, v2
from tests import tensor_cases
from tests.simt.simulate import Simulated

GALLERY = Path(__file__).resolve().parent.parent / "schedules" / "definition" / "gallery"
TRAVERSALS = {"v1": v1.TRAVERSAL, "v2": v2.TRAVERSAL}
LAYOUTS = {"v1": "bhsd", "v2": "bshd"}
VALUES = {"chunked": {"chunk": 90}, "neighbourhood_2d": {"width": 20, "window": 5}}

#: Arch, template, definition, kind.
KERNELS = (
    ("sm_80", "v2", "chunked", FORWARD),
    ("sm_80", "v1", "chunked", BACKWARD),
    ("sm_90a", "v1", "neighbourhood_2d", FORWARD),
)


@pytest.mark.parametrize(("arch", "template", "name", "kind"), KERNELS)
def test_kernels(arch, template, name, kind, tmp_path):
    definition, target = DefinitionFile.parse(f"{GALLERY / name}.py:{name}").load(), Target(arch)
    pattern = match(definition(64, "float16", index_dtype="int32"))
    assert pattern.has_gaps
    maker = maker_of(target, kind)
    config = maker.default_configs(template, pattern, target)[0]
    program = maker.program(pattern, config, target, TRAVERSALS[template], "kernel")
    simulated, layout = Simulated(program, export_cuda(program, target), tmp_path), LAYOUTS[template]
    case = tensor_cases.problem(definition, "float16", 1, 2, 1, 260, 260, 64, lambda rng: VALUES[name])

    def compute(given):
        return simulated(given, layout)

    if kind == FORWARD:
        tensor_cases.check_forward(case, *tensor_cases.forward(case, compute, layout))
    else:
        tensor_cases.check_backward(case, tensor_cases.backward(case, compute, layout))
