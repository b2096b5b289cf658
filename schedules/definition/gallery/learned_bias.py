"""A learnt bias for every pair of positions and a head, and one that comes with the input (Jumper et al., 2021)."""

from schedules.definition.attention import Attention
from schedules.definition.catalogue import FULL, ScoreModification
from tvm_flash.packs.manifest import Param

PARAMS = (
    Param("position_bias", "float32", axes="hij", gradient=True),
    Param("pair_bias", "float32", axes="bhij", gradient=True),
)


def biased(s, at):
    return s + at.param["position_bias"] + at.param["pair_bias"]


def biased_twin(s, at):
    return s + at.params["position_bias"] + at.params["pair_bias"]


learned_bias = Attention(ScoreModification("biased_pairs", biased, biased_twin, PARAMS), FULL)
