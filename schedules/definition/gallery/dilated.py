"""Dilated attention (Beltagy et al., 2020): of a window every ``dilation``-th key before a query."""

from tvm.script import tirx as T

from schedules.definition.attention import Attention
from schedules.definition.catalogue import IDENTITY, Mask
from tvm_flash.packs.manifest import Param

PARAMS = (Param("window", "int32"), Param("dilation", "int32"))


def every_nth(at):
    distance = at.diagonal - at.j
    near = T.And(distance >= 0, distance < at.param["window"] * at.param["dilation"])
    return T.And(near, T.floormod(distance, at.param["dilation"]) == 0)


def every_nth_twin(at):
    distance = at.diagonal - at.j
    near = (distance >= 0) & (distance < at.params["window"] * at.params["dilation"])
    return near & (distance % at.params["dilation"] == 0)


def example(batch, heads, seqlen_q, seqlen_kv):
    return {"window": seqlen_kv // 16, "dilation": 4}


dilated = Attention(IDENTITY, Mask("every_nth", every_nth, every_nth_twin, PARAMS), example=example)
