"""A sliding window that never loses the first tokens (Xiao et al., 2023)."""

from tvm.script import tirx as T

from schedules.definition.attention import Attention
from schedules.definition.catalogue import IDENTITY, Mask
from tvm_flash.packs.manifest import Param

PARAMS = (Param("window", "int32"), Param("first_tokens", "int32"))


def sinks_and_window(at):
    near = T.Or(at.j > at.diagonal - at.param["window"], at.j < at.param["first_tokens"])
    return T.And(near, at.j <= at.diagonal)


def sinks_and_window_twin(at):
    near = (at.j > at.diagonal - at.params["window"]) | (at.j < at.params["first_tokens"])
    return near & (at.j <= at.diagonal)


def example(batch, heads, seqlen_q, seqlen_kv):
    return {"window": seqlen_kv // 4, "first_tokens": 4}


sink_window = Attention(
    IDENTITY, Mask("sinks_and_window", sinks_and_window, sinks_and_window_twin, PARAMS), example=example
)
