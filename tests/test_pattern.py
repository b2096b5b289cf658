"""The matcher: kv ranges against brute force over the numpy twins, and refusals with the block's name."""

import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest
import tvm_ffi
from tvm import s_tir, sym, tirx
from tvm.script import tirx as T

from schedules.definition.attention import Attention
from schedules.definition.catalogue import FULL, MASKS, SCORES, Mask, ScoreModification
from schedules.definition.derive import derive
from schedules.definition.operator import KEY_RANGE
from schedules.definition.pattern import DefinitionError, Site, match
from tvm_flash import reference
from tvm_flash.packs.manifest import Param

TILE_M, TILE_N = 4, 3


def checkerboard(at):
    return (at.i + at.j) % 2 == 0


def steep(at):
    return 2 * at.j <= 3 * at.i + 1


def later_rows(at):
    return (at.i >= at.params["window_left"]) & (at.j < at.seqlen_kv - 1)


def strided(at):
    return (3 * at.i >= 2 * at.j - 4) & (5 * at.j >= 2 * at.i - 3)


def upwards(at):
    return (at.i + at.j >= 6) & (at.i + at.j <= 11)


def two_blocks(at):
    return ((at.i < 4) & (at.j < 5)) | ((at.i >= 4) & (at.j >= 5))


def prefix(at):
    return (at.j < at.params["kv_start"]) | (at.j <= at.i)


def joined(at):
    return (at.j < 2) | (at.j <= at.i - 3) | ((at.i >= 4) & (at.j < 7))


def backwards(at):
    return (at.j >= at.i) | (at.j > 6) | (at.i < 3)


#: Masks that the catalogue doesn't have: opaque, with steps of their own, of rows or keys alone, with gaps.
ODD = (
    Mask("checkerboard", lambda at: T.truncmod(at.i + at.j, T.Cast(at.i.ty.dtype, 2)) == 0, checkerboard),
    Mask("steep", lambda at: 2 * at.j <= 3 * at.i + 1, steep),
    Mask(
        "later_rows",
        lambda at: T.And(at.i >= at.param["window_left"], at.j < at.seqlen_kv - 1),
        later_rows,
        (Param("window_left", "int32"),),
    ),
    Mask("strided", lambda at: T.And(3 * at.i >= 2 * at.j - 4, 5 * at.j >= 2 * at.i - 3), strided),
    Mask("upwards", lambda at: T.And(at.i + at.j >= 6, at.i + at.j <= 11), upwards),
    Mask("two_blocks", lambda at: T.Or(T.And(at.i < 4, at.j < 5), T.And(at.i >= 4, at.j >= 5)), two_blocks),
    Mask(
        "prefix",
        lambda at: T.Or(at.j < at.param["kv_start"], at.j <= at.i),
        prefix,
        (Param("kv_start", "int32"),),
    ),
    Mask("joined", lambda at: T.Or(T.Or(at.j < 2, at.j <= at.i - 3), T.And(at.i >= 4, at.j < 7)), joined),
    Mask("backwards", lambda at: T.Or(T.Or(at.j >= at.i, at.j > 6), at.i < 3), backwards),
)
#: Masks whose ranges must be as narrow as can be, and not only right.
EXACT = ("full", "causal", "window", "steep", "later_rows", "prefix", "joined", "backwards")


def constant(value):
    return tirx.IntImm("int64", value)


def evaluate(expr):
    """The number or truth value that an expression without variables stands for."""
    value = sym.Analyzer().simplify(expr)
    assert isinstance(value, tirx.IntImm), value
    return value.value


def site_of(pattern, seqlen_q, seqlen_kv, params):
    one = constant(1)
    values = {p.name: tirx.IntImm(p.dtype, params[p.name]) for p in pattern.params}
    zero = constant(0)
    return Site(
        zero, zero, one, one, one, constant(seqlen_q), constant(seqlen_kv), tirx.Var("scale", "float32"), values
    )


PARAMS = {"window_left": 3, "window_right": 1, "sink_tokens": 2, "kv_start": 2, "kv_end": 9}
PARAMS |= {"query_start": 4, "has_query_start": 1}
SIZES = ((9, 9), (5, 13), (13, 5), (1, 10))

#: What a mask hides that has a value for each query and key stands in that tensor, and not in its expression.
EVALUABLE = [m for m in (*MASKS.values(), *ODD) if not any("i" in p.axes or "j" in p.axes for p in m.params)]


def visible_of(mask, seqlen_q, seqlen_kv):
    own = {p.name: PARAMS[p.name] for p in mask.params}
    at = reference.Positions(np.arange(seqlen_q)[:, None], np.arange(seqlen_kv)[None, :], seqlen_q, seqlen_kv, own)
    return np.broadcast_to(mask.twin(at), (seqlen_q, seqlen_kv))


def check_ranges(ranges, seen, exact, whole=True):
    """Compare the ranges of a span with ``seen (span, others)``; ``whole``: all of the span exists."""
    some, every, others = seen.any(axis=0), seen.all(axis=0) & whole, seen.shape[1]
    lo, hi = map(evaluate, ranges.visible)
    assert 0 <= lo <= hi <= others
    assert not some[:lo].any()
    assert not some[hi:].any()
    full_lo, full_hi = map(evaluate, ranges.full)
    assert 0 <= full_lo <= full_hi <= others
    assert every[full_lo:full_hi].all()
    if exact:
        assert hi - lo == some.sum()
        assert full_hi - full_lo == every.sum()


@functools.cache
def pattern_of(mask, op="forward"):
    """What is matched of a mask's operator, once for all tests."""
    pattern = match(Attention(mask=mask)(8, "float32"))
    return pattern if op == "forward" else match(derive(pattern, op))


@pytest.mark.parametrize("mask", EVALUABLE, ids=lambda m: m.name)
@pytest.mark.parametrize(("seqlen_q", "seqlen_kv"), SIZES)
def test_ranges_against_brute_force(mask, seqlen_q, seqlen_kv):
    pattern = pattern_of(mask)
    site = site_of(pattern, seqlen_q, seqlen_kv, PARAMS)
    visible = visible_of(mask, seqlen_q, seqlen_kv)

    for first in range(0, seqlen_q, TILE_M):
        last = min(first + TILE_M, seqlen_q) - 1
        bounds = constant(first), constant(last)
        check_ranges(pattern.keys_of(site, *bounds), visible[first : last + 1], mask.name in EXACT)

        for col in range(0, seqlen_kv, TILE_N):
            tile = visible[first : last + 1, col : col + TILE_N]
            corners = (*bounds, constant(col), constant(col + TILE_N - 1))
            inside = col + TILE_N <= seqlen_kv
            full, live = (bool(evaluate(f(site, *corners))) for f in (pattern.tile_full, pattern.tile_live))
            assert not full or (inside and tile.all())
            assert live or not tile.any()
            if mask.name in ("full", "causal", "window"):
                assert full == (inside and tile.all())

    for first in range(0, seqlen_kv, TILE_N):
        last = first + TILE_N - 1  # which need not exist
        ranges = pattern.rows_of(site, constant(first), constant(last))
        check_ranges(ranges, visible[:, first : last + 1].T, mask.name in EXACT, whole=last < seqlen_kv)

    for i, j in itertools.product(range(seqlen_q), range(seqlen_kv + 2)):
        expected = j < seqlen_kv and visible[i, j]
        assert bool(evaluate(pattern.mask(site, constant(i), constant(j)))) == expected


@pytest.mark.parametrize("mask", EVALUABLE, ids=lambda m: m.name)
@pytest.mark.parametrize("keys", ((3, 8), (5, 5), (9, 20), (-2, 3)))
def test_ranges_of_a_part(mask, keys):
    seqlen_q, seqlen_kv = 9, 11
    pattern = pattern_of(mask, "partial")
    site = site_of(pattern, seqlen_q, seqlen_kv, PARAMS)
    within = {name: tirx.IntImm("int32", key) for name, key in zip(KEY_RANGE, keys, strict=True)}
    site = dataclasses.replace(site, params={**site.params, **within})
    inside = (np.arange(seqlen_kv) >= keys[0]) & (np.arange(seqlen_kv) < keys[1])
    visible = visible_of(mask, seqlen_q, seqlen_kv) & inside
    for first in range(0, seqlen_q, TILE_M):
        last = min(first + TILE_M, seqlen_q) - 1
        check_ranges(pattern.keys_of(site, constant(first), constant(last)), visible[first : last + 1], False)
    for first in range(0, seqlen_kv, TILE_N):
        last = first + TILE_N - 1
        ranges = pattern.rows_of(site, constant(first), constant(last))
        check_ranges(ranges, visible[:, first : last + 1].T, False, whole=last < seqlen_kv)
    for i, j in itertools.product((0, 4, 8), range(seqlen_kv + 2)):
        expected = j < seqlen_kv and visible[i, j]
        assert bool(evaluate(pattern.mask(site, constant(i), constant(j)))) == expected


def test_what_the_matcher_finds():
    plain = match(Attention()(64, "float16", head_dim_v=32, index_dtype="int32"))
    assert (plain.head_dim, plain.head_dim_v, plain.dtype, plain.index_dtype) == (64, 32, "float16", "int32")
    assert plain.is_scale_only
    assert plain.is_unmasked
    assert plain.params == ()

    rich = match(Attention(SCORES["softcap_alibi"], MASKS["sink_window"])(64, "bfloat16"))
    assert not rich.is_scale_only
    assert not rich.is_unmasked
    assert rich.has_gaps
    assert rich.params == (
        Param("window_left", "int32"),
        Param("window_right", "int32"),
        Param("sink_tokens", "int32"),
        Param("softcap", "float32"),
        Param("alibi_slopes", "float32", per_head=True, gradient=True),
    )
    assert not match(Attention(mask=MASKS["window"])(64, "float16")).has_gaps


@pytest.mark.parametrize(
    ("mask", "narrows", "may_hide"),
    [
        ("full", True, False),
        ("causal", True, False),
        ("window", False, False),
        ("sink_window", False, False),
        ("padded", False, False),
        ("prefix", True, True),  # aligned top-left: of more keys than queries the last are seen by nobody
        ("joined", True, True),
        ("backwards", False, False),
    ],
)
def test_rows_that_see_a_key_go_on_to_the_last_and_begin_later_for_later_keys(mask, narrows, may_hide):
    known = {**MASKS, **{m.name: m for m in ODD}}
    pattern = match(Attention(mask=known[mask])(64, "float16"))
    assert (pattern.narrows, pattern.may_hide_keys) == (narrows, may_hide)


@pytest.mark.parametrize("mask", [m for m in ODD if m.name in ("prefix", "joined", "backwards")], ids=lambda m: m.name)
def test_a_union_of_intervals_with_one_end_in_common_has_no_gaps(mask):
    pattern = match(Attention(mask=mask)(64, "float16"))
    assert pattern.is_interval and not pattern.has_gaps


BIAS, TABLE, RATE = Param("bias", "float32", axes="hij"), Param("table", "float32", rank=1), Param("rate", "float32")


@pytest.mark.parametrize(
    ("score", "params", "expected"),
    [
        (lambda s, at: s + at.table["table"](T.max(at.j - at.i, at.i - at.j)), (TABLE,), True),
        (lambda s, at: s + T.exp(at.param["rate"] * T.Cast("float32", at.diagonal - at.j)), (RATE,), True),
        (lambda s, at: s + at.param["rate"] * T.Cast("float32", at.j - at.i), (RATE,), False),  # an addition costs less
        (lambda s, at: s + at.table["table"](at.j + at.i), (TABLE,), False),
        (lambda s, at: s + at.table["table"](T.floordiv(at.j, 8) - T.floordiv(at.i, 8)), (TABLE,), False),
        (lambda s, at: s + at.table["table"](T.Select(at.j < at.seqlen_kv - 1, at.j - at.i, 0)), (TABLE,), False),
        (lambda s, at: s + T.tanh(at.param["bias"]), (BIAS,), False),
        (lambda s, at: s + at.param["bias"] + at.table["table"](at.j - at.i), (BIAS, TABLE), False),
        (lambda s, at: s * at.table["table"](at.j - at.i), (TABLE,), False),
    ],
)
def test_what_is_added_by_distance(score, params, expected):
    """Of these alone the two rows of a lane have the same."""
    definition = Attention(ScoreModification("added", score, None, params), FULL)
    assert match(definition(64, "float16", index_dtype="int32")).adds_by_distance is expected


def test_score_takes_the_kernels_own_values():
    pattern = match(Attention(SCORES["alibi"], MASKS["causal"])(64, "float16", index_dtype="int32"))
    names = ("b", "h", "batch", "heads", "kv_heads", "sq", "skv", "row", "col")
    v = {n: tirx.Var(n, "int32") for n in names}
    slope, scale, s = (tirx.Var(n, "float32") for n in ("slope", "scale", "s"))
    site = Site(
        v["b"], v["h"], v["batch"], v["heads"], v["kv_heads"], v["sq"], v["skv"], scale, {"alibi_slopes": slope}
    )
    expr = pattern.score(site, s, v["row"], v["col"])
    free = {x.name for x in tirx.analysis.undefined_vars(tirx.Evaluate(expr), [])}
    assert free == {"s", "scale", "slope", "row", "col", "sq", "skv"}
    assert str(expr.ty.dtype) == "float32"


# ---------------------------------------------------------------- refusals


def edit_block(func, name, edit):
    """``func`` with one block replaced by what ``edit`` makes of it."""

    def replace(node):
        return edit(node) if isinstance(node, s_tir.SBlock) and node.name_hint == name else node

    return tirx.PrimFunc(
        func.params, tvm_ffi.structural_map(func.body, replace, order="post"), func.ret_type, func.attrs
    )


def store(block, value):
    body = tirx.BufferStore(block.body.buffer, value, block.body.indices)
    return s_tir.SBlock(block.iter_vars, block.reads, block.writes, block.name_hint, body, block.init)


@pytest.mark.parametrize("block", ("qk", "row_max", "prob", "row_sum", "pv", "out", "lse"))
def test_another_step_is_refused_by_name(block):
    changed = edit_block(Attention()(8, "float32"), block, lambda b: store(b, b.body.value * 2))
    with pytest.raises(DefinitionError, match=f"block '{block}'"):
        match(changed)


def test_renamed_block_is_refused():
    def rename(b):
        return s_tir.SBlock(b.iter_vars, b.reads, b.writes, "weights", b.body, b.init)

    with pytest.raises(DefinitionError, match="block 'prob': missing"):
        match(edit_block(Attention()(8, "float32"), "prob", rename))


@pytest.mark.parametrize(
    ("block", "says"), [("score", "block 'score': hides keys"), ("mask", "block 'mask': the mask depends on the score")]
)
def test_mask_that_depends_on_the_score_is_refused(block, says):
    def threshold(b):
        value = b.body.value
        return store(b, T.if_then_else(value > 0, value, T.float32(-math.inf)))

    with pytest.raises(DefinitionError, match=says):
        match(edit_block(Attention()(8, "float32"), block, threshold))


def test_mask_that_changes_scores_is_refused():
    with pytest.raises(DefinitionError, match="block 'mask': expected if_then_else"):
        match(edit_block(Attention()(8, "float32"), "mask", lambda b: store(b, b.body.value * 2)))


def test_product_without_its_scale_is_refused():
    def raw(b):
        return store(b, b.body.value.a + T.float32(1))

    with pytest.raises(DefinitionError, match="multiplied by softmax_scale"):
        match(edit_block(Attention()(8, "float32"), "score", raw))


def test_score_that_ignores_the_product_is_refused():
    with pytest.raises(DefinitionError, match="block 'score': never reads the product"):
        match(edit_block(Attention()(8, "float32"), "score", lambda b: store(b, T.float32(1))))


def test_not_a_definition():
    with pytest.raises(DefinitionError, match="PrimFunc"):
        match(FULL)
