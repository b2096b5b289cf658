"""Neighbourhood attention along a line (Hassani et al., 2023): the ``window`` nearest keys, as many at the borders."""

import numpy as np
from tvm.script import tirx as T

from schedules.definition.attention import Attention
from schedules.definition.catalogue import IDENTITY, Mask
from tvm_flash.packs.manifest import Param


def nearest(at):
    window = at.param["window"]
    first = T.max(T.min(at.i - window // 2, at.seqlen_kv - window), 0)
    return T.And(at.j >= first, at.j < first + window)


def nearest_twin(at):
    window = at.params["window"]
    first = np.maximum(np.minimum(at.i - window // 2, at.seqlen_kv - window), 0)
    return (at.j >= first) & (at.j < first + window)


def example(batch, heads, seqlen_q, seqlen_kv):
    return {"window": seqlen_kv // 5}


neighbourhood_1d = Attention(
    IDENTITY, Mask("nearest", nearest, nearest_twin, (Param("window", "int32"),)), example=example
)
