"""GPU kernels of definitions to copy, run on the processor (tests/simt): tiles that see nothing, known by positions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("tvm")
pytest.importorskip("torch")

from schedules.definition.definition_file import DefinitionFile
from schedules.definition.pattern import match
from schedules.families.interface import BACKWARD, FORWARD
from tests import tensor_trials
from tests.test_tensors_simulated import made

GALLERY = Path(__file__).resolve().parent.parent / "schedules" / "definition" / "gallery"
VALUES = {"chunked": {"chunk": 90}, "neighbourhood_2d": {"width": 20, "window": 5}}

#: Arch, template, definition, kind.
KERNELS = (
    ("sm_80", "v2", "chunked", FORWARD),
    ("sm_80", "v1", "chunked", BACKWARD),
    ("sm_90a", "v1", "neighbourhood_2d", FORWARD),
)


@pytest.mark.parametrize(("arch", "template", "name", "kind"), KERNELS)
def test_kernels(arch, template, name, kind, tmp_path):
    definition = DefinitionFile.parse(f"{GALLERY / name}.py:{name}").load()
    assert match(definition(64, "float16", index_dtype="int32")).has_gaps
    found = made(definition, arch, template, kind, 64, "float16", tmp_path)
    kernel = replace(found.kernel, sample=lambda *sizes: VALUES[name])
    trials = tensor_trials.backward if kind == BACKWARD else tensor_trials.forward
    for trial in trials(kernel, (((2, 1, 260, 260), "whole"),)):
        trial.check(trial.run(found.compute, "cpu"), "cpu")
