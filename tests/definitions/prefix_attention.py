"""A definition from outside the package: a score modification and a mask that the catalogue doesn't have.

Prefix-LM attention (Raffel et al., 2020): a prefix is seen by everyone, the rest is causal; scores fade with the
distance, by a rate that each head has of its own and that is learnt.
"""

import numpy as np
from tvm.script import tirx as T

from schedules.definition.attention import Attention
from schedules.definition.catalogue import Mask, ScoreModification
from tvm_flash.packs.manifest import Param


def fading(s, at):
    distance = T.Cast("float32", T.abs(at.diagonal - at.j))
    return s / (T.float32(1) + at.param["fading_rate"] * distance)


def fading_twin(s, at):
    return s / (1 + at.params["fading_rate"] * np.abs(at.diagonal - at.j))


def prefix_or_causal(at):
    return T.Or(at.j < at.param["prefix_length"], at.j <= at.diagonal)


def prefix_or_causal_twin(at):
    return (at.j < at.params["prefix_length"]) | (at.j <= at.diagonal)


FADING_RATE = Param("fading_rate", "float32", per_head=True, gradient=True)

prefix_attention = Attention(
    name="prefix_attention",
    score=ScoreModification("fading", fading, fading_twin, (FADING_RATE,)),
    mask=Mask("prefix_or_causal", prefix_or_causal, prefix_or_causal_twin, (Param("prefix_length", "int32"),)),
)
