"""Functions of a user's score are as accurate on GPUs as float32, though everything is compiled with fast mathematics,
whose functions the tests' machine doesn't have: by the text that is compiled, and by what it computes."""

from __future__ import annotations

import re

import numpy as np
import pytest

pytest.importorskip("tvm")
pytest.importorskip("torch")

from tvm.script import tirx as T

from schedules.definition.attention import Attention
from schedules.definition.catalogue import FULL, ScoreModification
from schedules.families.interface import BACKWARD, FORWARD
from tests import tensor_trials
from tests.test_tensors_simulated import made
from tvm_flash import reference
from tvm_flash.packs.manifest import Param

BIAS, LOGIT = Param("bias", "float32", axes="hij"), Param("logit", "float32", axes="h", gradient=True)


def _turning(s, at):
    distance = T.cast(at.i - at.j, "float32")
    whole = T.pow(s, T.float32(3)) * T.float32(0.1)
    return whole + T.cos(distance * T.float32(40)) + T.sin(s * T.float32(9)) + T.tanh(s) + T.tan(s * T.float32(0.1))


def turning_twin(s, at):
    distance = at.i - at.j
    return s**3 * 0.1 + np.cos(distance * 40.0) + np.sin(s * 9) + np.tanh(s) + np.tan(s * np.float64(np.float32(0.1)))


def _bent(s, at):
    return s + T.tanh(at.param["bias"])


@reference.with_sink(lambda at: np.tanh(at.params["logit"]))
def bent_twin(s, at):
    return s + np.tanh(at.params["bias"])


turning = Attention(ScoreModification("turning", _turning, turning_twin), FULL)
#: What is added to products, which Hopper's forward kernels compute beforehand, and a sink.
bent = Attention(
    ScoreModification("bent", _bent, bent_twin, (BIAS, LOGIT), sink=lambda at: T.tanh(at.param["logit"])), FULL
)

#: What fast mathematics replace by the machine's own.
_FAST = re.compile(r"\b(tanhf?|tanf?|powf?|__powf|__tanf)\(")
_TURNS = re.compile(r"\b(?:__)?(?:sin|cos)f?\((?!within_a_turn\()")

KERNELS = (
    (turning, "sm_80", "v1", FORWARD),
    (turning, "sm_90a", "v2", BACKWARD),
    (bent, "sm_90a", "v2", FORWARD),
    (bent, "sm_80", "v2", BACKWARD),
)


@pytest.mark.parametrize(("definition", "arch", "template", "kind"), KERNELS)
def test_functions_are_those_of_float32(definition, arch, template, kind, tmp_path):
    found = made(definition, arch, template, kind, 64, "float16", tmp_path)
    body = found.text[found.text.index("__global__") :]
    assert not _FAST.search(body) and not _TURNS.search(body)
    trials = tensor_trials.backward if kind == BACKWARD else tensor_trials.forward
    for trial in trials(found.kernel, (((2, 1, 140, 136), "whole"),)):
        trial.check(trial.run(found.compute, "cpu"), "cpu")


def test_a_power_of_what_is_negative_is_none_of_fast_mathematics(tmp_path):
    """Whose logarithm of it is NaN."""
    found = made(turning, "sm_75", "v1", FORWARD, 64, "float16", tmp_path)
    assert "exact_power(" in found.text and "__nv_powf" in found.text
