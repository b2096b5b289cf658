"""Swin's bias within a window (Liu et al., 2021): a learnt number for each head and each offset of two pixels.

The sequence is one window of ``side`` x ``side`` pixels, row by row.  ``offset_bias`` is ``((2 side - 1)², heads)``, as
``relative_position_bias_table`` is there.
"""

import numpy as np
from tvm.script import tirx as T

from schedules.definition.attention import Attention
from schedules.definition.catalogue import FULL, ScoreModification
from tvm_flash.packs.manifest import Param

PARAMS = (Param("side", "int32"), Param("offset_bias", "float32", rank=2, gradient=True))


def swin(s, at):
    side = at.param["side"]
    down = T.floordiv(at.i, side) - T.floordiv(at.j, side) + side - 1
    right = T.floormod(at.i, side) - T.floormod(at.j, side) + side - 1
    return s + at.table["offset_bias"](down * (2 * side - 1) + right, at.h)


def swin_twin(s, at):
    side, table = int(at.params["side"]), np.asarray(at.params["offset_bias"])
    down, right = at.i // side - at.j // side + side - 1, at.i % side - at.j % side + side - 1
    return s + table[np.clip(down * (2 * side - 1) + right, 0, len(table) - 1), at.h]


def example(batch, heads, seqlen_q, seqlen_kv):
    side = max(2, int(max(seqlen_q, seqlen_kv) ** 0.5))
    offsets = np.arange((2 * side - 1) ** 2)
    return {"side": side, "offset_bias": np.sin(offsets[:, None] * (1 + np.arange(heads)) / 7)}


swin_bias = Attention(ScoreModification("swin", swin, swin_twin, PARAMS), FULL, example=example)
