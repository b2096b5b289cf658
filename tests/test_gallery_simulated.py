"""GPU kernels of definitions to copy, run on the processor (tests/simt): one of each that is like no other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("tvm")
pytest.importorskip("torch")

import numpy as np

from schedules.definition.definition_file import DefinitionFile
from schedules.definition.pattern import match
from schedules.families.interface import BACKWARD, FORWARD
from tests import tensor_trials
from tests.test_tensors_simulated import made

GALLERY = Path(__file__).resolve().parent.parent / "schedules" / "definition" / "gallery"
VALUES = {
    "chunked": {"chunk": 90},
    "neighbourhood_2d": {"width": 20, "window": 5},
    # tiles that are seen whole beside others that nothing is seen of
    "sink_window": {"window": 330, "first_tokens": 4},
    # a rate is positive
    "logarithmic_alibi": {n: np.array([0.5, 1.25], np.float32) for n in ("strength", "rate")},
}
#: Those of which positions tell the tiles that see nothing.
WITH_GAPS = ("chunked", "neighbourhood_2d")

#: Arch, template, definition, kind.
KERNELS = (
    ("sm_80", "v2", "chunked", FORWARD),
    ("sm_80", "v1", "chunked", BACKWARD),
    ("sm_90a", "v1", "neighbourhood_2d", FORWARD),
    ("sm_90a", "v1", "neighbourhood_2d", BACKWARD),
    ("sm_90a", "v1", "sink_window", BACKWARD),
    ("sm_80", "v1", "neighbourhood_2d", FORWARD),
    ("sm_75", "v1", "documents", FORWARD),
    ("sm_90a", "v2", "documents", FORWARD),
    ("sm_80", "v1", "prefix_lm", FORWARD),
    ("sm_80", "v2", "dilated", FORWARD),
    ("sm_75", "v1", "block_causal_video", FORWARD),
    ("sm_80", "v1", "speculative_tree", FORWARD),
    ("sm_75", "v1", "token_tree", FORWARD),
    ("sm_80", "v2", "t5_bias", FORWARD),
    ("sm_90a", "v2", "t5_bias", BACKWARD),
    ("sm_80", "v1", "logarithmic_alibi", FORWARD),
    ("sm_80", "v2", "learned_bias", FORWARD),
    ("sm_75", "v1", "cross_attention", FORWARD),
)
#: Definitions without a kernel here, and others that read the same in the same way; ``test_gallery.py`` compares what
#: each says with its twin.
LIKE = {"softcap": "logarithmic_alibi", "neighbourhood_1d": "neighbourhood_2d", "swin_bias": "t5_bias"}
#: Lengths, where not any will do, and those of the others: two tiles of queries.
SIZES = {"chunked": (2, 1, 260, 260), "neighbourhood_2d": (2, 1, 260, 260)}
SIZES |= {"sink_window": (1, 1, 640, 630)}
USUAL = (2, 1, 140, 136)


def test_no_definition_is_left_out():
    names = {file.stem for file in GALLERY.glob("*.py") if file.stem != "__init__"}
    made = {name for _, _, name, _ in KERNELS}
    assert made | LIKE.keys() == names and set(LIKE.values()) <= made and not LIKE.keys() & made


@pytest.mark.parametrize(("arch", "template", "name", "kind"), KERNELS)
def test_kernels(arch, template, name, kind, tmp_path):
    definition = DefinitionFile.parse(f"{GALLERY / name}.py:{name}").load()
    found = made(definition, arch, template, kind, 64, "float16", tmp_path)
    kernel = found.kernel
    assert name not in WITH_GAPS or match(definition(64, "float16", index_dtype="int32")).has_gaps
    if name in VALUES:
        kernel = replace(kernel, sample=lambda *sizes: VALUES[name])
    trials = tensor_trials.backward if kind == BACKWARD else tensor_trials.forward
    for trial in trials(kernel, ((SIZES.get(name, USUAL), "whole"),)):
        trial.check(trial.run(found.compute, "cpu"), "cpu")
