"""An ALiBi of your own: scores fall with the logarithm of the distance (KERPLE, Chi et al., 2022).

``strength`` and ``rate``, one each for a head, are learnt.
"""

import numpy as np
from tvm.script import tirx as T

from schedules.definition.attention import Attention
from schedules.definition.catalogue import MASKS, ScoreModification
from tvm_flash.packs.manifest import Param

PARAMS = tuple(Param(name, "float32", axes="h", gradient=True) for name in ("strength", "rate"))


def logarithmic(s, at):
    distance = T.Cast("float32", T.abs(at.diagonal - at.j))
    return s - at.param["strength"] * T.log(T.float32(1) + at.param["rate"] * distance)


def logarithmic_twin(s, at):
    return s - at.params["strength"] * np.log(1 + at.params["rate"] * np.abs(at.diagonal - at.j))


logarithmic_alibi = Attention(ScoreModification("logarithmic", logarithmic, logarithmic_twin, PARAMS), MASKS["causal"])
