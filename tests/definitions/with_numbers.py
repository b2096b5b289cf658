"""A definition that learns numbers, one of its score and one of its sink, beside a value of each head."""

import numpy as np
from tvm.script import tirx as T

from schedules.definition.attention import Attention
from schedules.definition.catalogue import MASKS, ScoreModification
from tvm_flash import reference
from tvm_flash.packs.manifest import Param

PARAMS = (
    Param("cap", "float32", gradient=True),
    Param("nearness", "float32", axes="h", gradient=True),
    Param("logit", "float32", gradient=True),
)


def capped(s, at):
    distance = T.Cast("float32", T.abs(at.j - at.diagonal))
    return at.param["cap"] * T.tanh(s / at.param["cap"]) + at.param["nearness"] / (T.float32(1) + distance)


def sink(at):
    return at.param["logit"]


@reference.with_sink(lambda at: at.params["logit"])
def capped_twin(s, at):
    near = at.params["nearness"] / (1 + np.abs(at.j - at.diagonal))
    return at.params["cap"] * np.tanh(s / at.params["cap"]) + near


def sample(batch, heads, *lengths):
    """Values for the parameters."""
    return {"cap": 1.5, "nearness": np.linspace(0.5, 2, heads, dtype=np.float32), "logit": 0.25}


with_numbers = Attention(
    ScoreModification("capped", capped, capped_twin, PARAMS, sink=sink), MASKS["causal"], example=sample
)
