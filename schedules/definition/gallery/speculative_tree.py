"""A tree of speculative tokens (Miao et al., 2024): each sees the context, and its own ancestors in the tree.

Queries are the tree's tokens.  Walking through the tree, ``entered`` is when a token is reached, and a key is an
ancestor of those that are reached from ``first`` up to but not ``end``: its whole subtree.  A key of the context has 0
and a number that nobody reaches.  So a tree of any shape takes three numbers a token.
"""

import numpy as np
from tvm.script import tirx as T

from schedules.definition.attention import Attention
from schedules.definition.catalogue import IDENTITY, Mask
from tvm_flash.packs.manifest import Param

PARAMS = (
    Param("entered", "int32", axes="bi"),
    Param("first", "int32", axes="bj"),
    Param("end", "int32", axes="bj"),
)


def ancestors(at):
    return T.And(at.param["first"] <= at.param["entered"], at.param["entered"] < at.param["end"])


def ancestors_twin(at):
    return (at.params["first"] <= at.params["entered"]) & (at.params["entered"] < at.params["end"])


def numbers_of(parents, seqlen_kv):
    """The parameters of a tree: ``parents[t]`` is the token before token ``t``, −1 of one that follows the context.

    Tokens are the last keys, each after its parent.
    """
    parents, tokens = np.asarray(parents), len(parents)
    sizes = np.ones(tokens, np.int64)
    for t in range(tokens - 1, -1, -1):
        if parents[t] >= 0:
            sizes[parents[t]] += sizes[t]
    entered, following = np.zeros(tokens, np.int64), {-1: 0}
    for t in range(tokens):
        entered[t] = following[parents[t]]
        following[parents[t]] += sizes[t]
        following[t] = entered[t] + 1
    first, end = np.zeros(seqlen_kv, np.int64), np.full(seqlen_kv, tokens)
    keys = min(tokens, seqlen_kv)
    first[seqlen_kv - keys :], end[seqlen_kv - keys :] = entered[:keys], (entered + sizes)[:keys]
    return {"entered": entered, "first": first, "end": end}


def example(batch, heads, seqlen_q, seqlen_kv):
    """Each token has three that may follow it."""
    return numbers_of([(t - 1) // 3 if t else -1 for t in range(seqlen_q)], seqlen_kv)


speculative_tree = Attention(IDENTITY, Mask("ancestors", ancestors, ancestors_twin, PARAMS), example=example)
