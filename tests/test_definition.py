"""The definition, compiled naively, against the same formula in float64 numpy."""

import numpy as np
import pytest
import tvm

from schedules.definition.attention import BLOCKS, Attention
from schedules.definition.catalogue import MASKS, SCORES
from tests.oracle import TARGET
from tests.pairs import ALL_PAIRS, some_pairs
from tvm_flash import reference
from tvm_flash.catalogue import OF_16_BITS

PARAMS = {"window_left": 5, "window_right": 2, "sink_tokens": 3, "softcap": 2.5}
PARAMS |= {"has_query_start": 1, "has_alibi_slopes": 1, "has_sinks": 1}
#: (batch, heads, kv_heads, seqlen_q, seqlen_kv, head_dim, head_dim_v)
SHAPES = ((2, 4, 2, 10, 30, 16, 16), (1, 3, 1, 21, 7, 8, 24), (1, 2, 2, 1, 33, 16, 8))


def oracle(attention, q, k, v, softmax_scale, params):
    """Run the definition as it stands; returns (out, lse)."""
    func = attention(q.shape[3], "float32", head_dim_v=v.shape[3])
    module = tvm.compile(func, target=TARGET)
    out = np.full((*q.shape[:3], v.shape[3]), np.nan, np.float32)
    lse = np.full(q.shape[:3], np.nan, np.float32)
    module["attention"](
        *(tvm.runtime.tensor(x) for x in (q, k, v)),
        out_tensor := tvm.runtime.tensor(out),
        lse_tensor := tvm.runtime.tensor(lse),
        softmax_scale,
        *(tvm.runtime.tensor(x) if isinstance(x, np.ndarray) else x for x in params),
    )
    return out_tensor.numpy(), lse_tensor.numpy()


#: Scores with masks, each pair in one of the shapes, or in all.
PROBLEMS = [
    (*pair, shape)
    for number, pair in enumerate(
        some_pairs((x for x in SCORES if x not in OF_16_BITS), MASKS, whole=("optional_sinks", "positioned"))
    )
    for n, shape in enumerate(SHAPES)
    if ALL_PAIRS or n == number % len(SHAPES)
]


@pytest.mark.parametrize(("score", "mask", "shape"), PROBLEMS)
def test_oracle_agrees_with_numpy(score, mask, shape):
    batch, heads, kv_heads, seqlen_q, seqlen_kv, head_dim, head_dim_v = shape
    rng = np.random.default_rng(seed=7)
    q, k, v = (
        rng.standard_normal(s, dtype=np.float32)
        for s in (
            (batch, heads, seqlen_q, head_dim),
            (batch, kv_heads, seqlen_kv, head_dim),
            (batch, kv_heads, seqlen_kv, head_dim_v),
        )
    )
    attention = Attention(SCORES[score], MASKS[mask])
    values = {**PARAMS, **{n: rng.random((batch, heads), dtype=np.float32) for n in ("alibi_slopes", "sinks")}}
    scores = (batch, heads, seqlen_q, seqlen_kv)
    values |= {"visible": rng.random(scores) < 0.6, "bias": rng.standard_normal(scores, dtype=np.float32)}
    placed = ("kv_start", "kv_end", "query_start")
    values |= {name: rng.integers(0, seqlen_kv + 3, (batch, heads), np.int32) for name in placed}
    params = {p.name: values[p.name] for p in attention.params}

    out, lse = oracle(attention, q, k, v, 0.3, list(params.values()))
    want_out, want_lse = reference.attention(
        q, k, v, softmax_scale=0.3, mask=attention.mask.twin, score=attention.score.twin, params=params
    )

    assert not np.isnan(out).any()
    np.testing.assert_allclose(out, want_out, atol=2e-6, rtol=0)
    np.testing.assert_allclose(lse, want_lse, atol=2e-6, rtol=0)


def test_definition_has_the_named_blocks_and_no_layout():
    text = Attention(SCORES["softcap"], MASKS["causal"])(64, "float16").script()
    for block in BLOCKS:
        assert f'T.sblock("{block}")' in text
    for symbol in ("batch", "heads", "kv_heads", "seqlen_q", "seqlen_kv"):
        assert symbol in text
    assert "thread" not in text
    assert "strides" not in text


def test_twins_and_expressions_have_the_same_names():
    assert set(SCORES) == set(reference.SCORES)
    assert set(MASKS) == set(reference.MASKS)
    for kind in (*SCORES.values(), *MASKS.values()):
        assert kind.twin.__name__ == kind.name
