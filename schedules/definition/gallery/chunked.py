"""Chunked attention (Llama 4): causal within chunks of a fixed length, nothing between them."""

from tvm.script import tirx as T

from schedules.definition.attention import Attention
from schedules.definition.catalogue import IDENTITY, Mask
from tvm_flash.packs.manifest import Param


def same_chunk(at):
    chunk = at.param["chunk"]
    return T.And(T.floordiv(at.j, chunk) == T.floordiv(at.diagonal, chunk), at.j <= at.diagonal)


def same_chunk_twin(at):
    chunk = at.params["chunk"]
    return (at.j // chunk == at.diagonal // chunk) & (at.j <= at.diagonal)


def example(batch, heads, seqlen_q, seqlen_kv):
    return {"chunk": max(1, seqlen_kv // 5)}


chunked = Attention(
    IDENTITY, Mask("same_chunk", same_chunk, same_chunk_twin, (Param("chunk", "int32"),)), example=example
)
