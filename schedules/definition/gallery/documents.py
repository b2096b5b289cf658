"""Packed training: documents lie one after another in a row, and nobody sees another document.

``q_document`` and ``k_document`` number the documents, in any order; where they come one after another, as here, tiles
between two documents are never visited.
"""

import numpy as np
from tvm.script import tirx as T

from schedules.definition.attention import Attention
from schedules.definition.catalogue import IDENTITY, Mask
from tvm_flash.packs.manifest import Param

PARAMS = (Param("q_document", "int32", axes="bi"), Param("k_document", "int32", axes="bj"))


def same_document(at):
    return T.And(at.param["q_document"] == at.param["k_document"], at.j <= at.diagonal)


def same_document_twin(at):
    return (at.params["q_document"] == at.params["k_document"]) & (at.j <= at.diagonal)


def example(batch, heads, seqlen_q, seqlen_kv):
    """Eight documents of different lengths, the last ones of all where there are fewer queries."""
    ends = np.array([0.16, 0.22, 0.41, 0.46, 0.62, 0.78, 0.94, 1]) * seqlen_kv
    ids = np.searchsorted(ends, np.arange(seqlen_kv), side="right")
    stands_on = np.maximum(np.arange(seqlen_kv - seqlen_q, seqlen_kv), 0)
    return {"q_document": ids[stands_on], "k_document": ids}


documents = Attention(IDENTITY, Mask("same_document", same_document, same_document_twin, PARAMS), example=example)
