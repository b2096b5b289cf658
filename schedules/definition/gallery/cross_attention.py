"""Cross attention: keys up to each batch entry's own length, and a bias for each query and key that is learnt."""

import numpy as np

from schedules.definition.attention import Attention
from schedules.definition.catalogue import Mask, ScoreModification
from tvm_flash.packs.manifest import Param


def biased(s, at):
    return s + at.param["alignment"]


def biased_twin(s, at):
    return s + at.params["alignment"]


def within(at):
    return at.j < at.param["key_length"]


def within_twin(at):
    return at.j < at.params["key_length"]


def example(batch, heads, seqlen_q, seqlen_kv):
    return {"key_length": np.maximum(1, seqlen_kv * (5 - np.arange(batch) % 4) // 6)}


cross_attention = Attention(
    ScoreModification("aligned", biased, biased_twin, (Param("alignment", "float32", axes="bij", gradient=True),)),
    Mask("within", within, within_twin, (Param("key_length", "int32", axes="b"),)),
    example=example,
)
