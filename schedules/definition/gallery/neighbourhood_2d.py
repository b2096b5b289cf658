"""Neighbourhood attention in a picture (Hassani et al., 2023): a square of ``window`` x ``window`` around each pixel.

Pixels lie row by row, ``width`` to a row; at the borders the square is moved inside.
"""

import numpy as np
from tvm.script import tirx as T

from schedules.definition.attention import Attention
from schedules.definition.catalogue import IDENTITY, Mask
from tvm_flash.packs.manifest import Param

PARAMS = (Param("width", "int32"), Param("window", "int32"))


def in_square(at):
    width, window = at.param["width"], at.param["window"]

    def is_near(query, key, size):
        first = T.max(T.min(query - window // 2, size - window), 0)
        return T.And(key >= first, key < first + window)

    rows = is_near(T.floordiv(at.i, width), T.floordiv(at.j, width), T.floordiv(at.seqlen_kv, width))
    return T.And(rows, is_near(T.floormod(at.i, width), T.floormod(at.j, width), width))


def in_square_twin(at):
    width, window = at.params["width"], at.params["window"]

    def is_near(query, key, size):
        first = np.maximum(np.minimum(query - window // 2, size - window), 0)
        return (key >= first) & (key < first + window)

    return is_near(at.i // width, at.j // width, at.seqlen_kv // width) & is_near(at.i % width, at.j % width, width)


def example(batch, heads, seqlen_q, seqlen_kv):
    return {"width": 16, "window": 7}


neighbourhood_2d = Attention(IDENTITY, Mask("in_square", in_square, in_square_twin, PARAMS), example=example)
