"""Prefix LM (Raffel et al., 2020): everyone sees a prompt, of a length of each batch entry; the rest is causal."""

import numpy as np
from tvm.script import tirx as T

from schedules.definition.attention import Attention
from schedules.definition.catalogue import IDENTITY, Mask
from tvm_flash.packs.manifest import Param


def prefix(at):
    return T.Or(at.j < at.param["prefix_length"], at.j <= at.diagonal)


def prefix_twin(at):
    return (at.j < at.params["prefix_length"]) | (at.j <= at.diagonal)


def example(batch, heads, seqlen_q, seqlen_kv):
    return {"prefix_length": np.maximum(1, seqlen_kv * 3 // 8 - 5 * np.arange(batch))}


prefix_lm = Attention(
    IDENTITY, Mask("prefix", prefix, prefix_twin, (Param("prefix_length", "int32", axes="b"),)), example=example
)
