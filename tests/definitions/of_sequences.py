"""A definition with every kind of parameter that sequences of different lengths have: numbers, values of a sequence, of
a head, or of both, and tables by sequence and by distance; some of each are learnt."""

import numpy as np
from tvm.script import tirx as T

from schedules.definition.attention import Attention
from schedules.definition.catalogue import Mask, ScoreModification
from tvm_flash.packs.manifest import Param

OF_SCORE = (
    Param("fading_rate", "float32", per_head=True, gradient=True),
    Param("strength", "float32", axes="h", gradient=True),
    Param("shift", "float32", axes="b"),
    Param("shift_scale", "float32"),
    Param("offsets", "float32", rank=2, gradient=True),
)
OF_MASK = (Param("prefix_length", "int32"), Param("shown", "bool", rank=3))


def mixed(s, at):
    table, distance = at.table["offsets"], at.j - at.diagonal
    fading = s / (T.float32(1) + at.param["fading_rate"] * T.Cast("float32", T.abs(distance)))
    offset = at.param["strength"] * table(at.h, distance + table.shape[1] // 2)
    return fading + offset + at.param["shift_scale"] * at.param["shift"]


def mixed_twin(s, at):
    table, distance = np.asarray(at.params["offsets"], np.float64), at.j - at.diagonal
    column = np.clip(distance + table.shape[1] // 2, 0, table.shape[1] - 1)
    fading = s / (1 + at.params["fading_rate"] * np.abs(distance))
    offset = at.params["strength"] * table[at.h, column]
    return fading + offset + np.float64(at.params["shift_scale"]) * at.params["shift"]


def prefix_or_shown(at):
    before = at.seqlen_kv - at.seqlen_q
    own = T.And(at.j >= before, at.table["shown"](at.b, at.i, at.j - before))
    return T.Or(at.j < at.param["prefix_length"], own)


def prefix_or_shown_twin(at):
    before, shown = at.seqlen_kv - at.seqlen_q, np.asarray(at.params["shown"])
    row, column = (np.clip(x, 0, n - 1) for x, n in zip((at.i, at.j - before), shown.shape[1:], strict=True))
    return (at.j < at.params["prefix_length"]) | ((at.j >= before) & shown[at.b, row, column])


def sample(batch, heads, seed=0):
    """Values for the parameters."""
    rng = np.random.default_rng(seed)
    return {
        "fading_rate": np.float32(0.25) + rng.random((batch, heads), np.float32),
        "strength": rng.random(heads, np.float32),
        "shift": rng.standard_normal(batch, np.float32),
        "shift_scale": 0.75,
        "offsets": rng.standard_normal((heads, 41), np.float32),
        "prefix_length": 11,
        "shown": rng.random((batch, 24, 24)) < 0.4,
    }


of_sequences = Attention(
    ScoreModification("mixed", mixed, mixed_twin, OF_SCORE),
    Mask("prefix_or_shown", prefix_or_shown, prefix_or_shown_twin, OF_MASK),
)
