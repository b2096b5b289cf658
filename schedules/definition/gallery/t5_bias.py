"""T5's relative position bias (Raffel et al., 2020): a learnt number for each head and bucket of distances.

``relative_bias`` is ``(buckets, heads)``, the weight of transformers' ``relative_attention_bias``.  Of 32 buckets, 16
are for keys after a query; of each 16, 8 are for one distance, and 7 more begin where ``BEGIN`` says: at 8 times powers
of the square root of 2.
"""

import numpy as np
from tvm.script import tirx as T

from schedules.definition.attention import Attention
from schedules.definition.catalogue import FULL, ScoreModification
from tvm_flash.packs.manifest import Param

BEGIN = (12, 16, 23, 32, 46, 64, 91)


def t5(s, at):
    distance = T.max(at.j - at.i, at.i - at.j)  # T.abs and T.Select take TVM nine times as long to simplify, 28 s
    bucket = T.min(distance, 8) + 16 * T.Cast("int32", at.j > at.i)
    for begin in BEGIN:
        bucket = bucket + T.Cast("int32", distance >= begin)
    return s + at.table["relative_bias"](bucket, at.h)


def bucket_of(offset):
    """The bucket of a key that is ``offset`` positions after a query."""
    distance = np.abs(offset)
    return np.minimum(distance, 8) + 16 * (offset > 0) + sum((distance >= begin).astype(int) for begin in BEGIN)


def t5_twin(s, at):
    return s + np.asarray(at.params["relative_bias"])[bucket_of(at.j - at.i), at.h]


def example(batch, heads, seqlen_q, seqlen_kv):
    return {"relative_bias": np.cos(np.arange(32)[:, None] / (2 + np.arange(heads)))}


t5_bias = Attention(
    ScoreModification("t5", t5, t5_twin, (Param("relative_bias", "float32", rank=2, gradient=True),)),
    FULL,
    example=example,
)
