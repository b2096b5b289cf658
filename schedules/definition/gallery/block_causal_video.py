"""Video, frame after frame: within a frame everyone sees everyone, and all frames before."""

from tvm.script import tirx as T

from schedules.definition.attention import Attention
from schedules.definition.catalogue import IDENTITY, Mask
from tvm_flash.packs.manifest import Param


def frame_causal(at):
    tokens = at.param["tokens_per_frame"]
    return T.floordiv(at.j, tokens) <= T.floordiv(at.diagonal, tokens)


def frame_causal_twin(at):
    tokens = at.params["tokens_per_frame"]
    return at.j // tokens <= at.diagonal // tokens


def example(batch, heads, seqlen_q, seqlen_kv):
    return {"tokens_per_frame": max(1, seqlen_kv // 7)}


block_causal_video = Attention(
    IDENTITY,
    Mask("frame_causal", frame_causal, frame_causal_twin, (Param("tokens_per_frame", "int32"),)),
    example=example,
)
