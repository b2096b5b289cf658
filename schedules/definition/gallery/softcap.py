"""Scores that are bounded smoothly (Gemma 2): ``cap * tanh(s / cap)``, here by a cap that each head learns."""

import numpy as np
from tvm.script import tirx as T

from schedules.definition.attention import Attention
from schedules.definition.catalogue import MASKS, ScoreModification
from tvm_flash.packs.manifest import Param


def capped(s, at):
    return at.param["cap"] * T.tanh(s / at.param["cap"])


def capped_twin(s, at):
    return at.params["cap"] * np.tanh(s / at.params["cap"])


def example(batch, heads, seqlen_q, seqlen_kv):
    return {"cap": np.linspace(10, 30, heads)}


softcap = Attention(
    ScoreModification("capped", capped, capped_twin, (Param("cap", "float32", axes="h", gradient=True),)),
    MASKS["causal"],
    example=example,
)
