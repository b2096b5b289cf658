"""Definitions that read tensors: a learnt bias, document ids, relative positions out of a table, a mask, a sink."""

import numpy as np
from tvm.script import tirx as T

from schedules.definition.attention import Attention
from schedules.definition.catalogue import IDENTITY, Mask, ScoreModification
from tvm_flash import reference
from tvm_flash.packs.manifest import Param

BIAS = Param("bias", "float32", axes="hij", gradient=True)
KEY_BIAS = Param("key_bias", "float16", axes="bj", gradient=True)
GATE = Param("gate", "float32", axes="bi", gradient=True)


def _biased(s, at):
    return T.tanh(s * at.param["gate"]) + at.param["bias"] + at.param["key_bias"]


def biased_twin(s, at):
    return np.tanh(s * at.params["gate"]) + at.params["bias"] + at.params["key_bias"]


def _same_document(at):
    return T.And(at.param["q_document"] == at.param["k_document"], at.j <= at.diagonal)


def same_document_twin(at):
    return (at.params["q_document"] == at.params["k_document"]) & (at.j <= at.diagonal)


documents = Attention(
    ScoreModification("biased", _biased, biased_twin, (BIAS, KEY_BIAS, GATE)),
    Mask(
        "same_document",
        _same_document,
        same_document_twin,
        (Param("q_document", "int32", axes="bi"), Param("k_document", "int32", axes="bj")),
    ),
)


def _relative(s, at):
    return s + at.table["positions"](at.h, at.j - at.i + at.table["positions"].shape[1] // 2)


def relative_twin(s, at):
    table = np.asarray(at.params["positions"], np.float64)
    column = np.clip(at.j - at.i + table.shape[1] // 2, 0, table.shape[1] - 1)
    return s + table[np.arange(s.shape[1])[:, None, None], column]


def _allowed(at):
    return at.param["allowed"]


def allowed_twin(at):
    return at.params["allowed"]


relative = Attention(
    ScoreModification("relative", _relative, relative_twin, (Param("positions", "float32", rank=2),)),
    Mask("allowed", _allowed, allowed_twin, (Param("allowed", "bool", axes="bhij"),)),
)

learnt_relative = Attention(
    ScoreModification("relative", _relative, relative_twin, (Param("positions", "float32", rank=2, gradient=True),)),
    relative.mask,
)

plain_allowed = Attention(IDENTITY, relative.mask)


def _own_sink(at):
    return at.param["logit"]


own_sink = Attention(
    ScoreModification(
        "own_sink",
        lambda s, at: s,
        reference.with_sink(lambda at: at.params["logit"])(lambda s, at: s),
        (Param("logit", "float32", axes="h"),),
        sink=_own_sink,
    ),
    relative.mask,
)
