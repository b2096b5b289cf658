"""Attention over padded sequences: a range of keys for each batch entry."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cases import CASES, expected, inputs
from tvm_flash import ArgumentTypeError, InvalidArgumentError, numerics, padded_attention, reference

pytestmark = pytest.mark.usefixtures("cpu_pack")

RANGES = np.array([[0, 70], [3, 40], [69, 70], [12, 12]], np.int32)


def arrays(layout="bhsd", seqlen_q=33):
    rng = np.random.default_rng(5)
    shapes = ((4, 4, seqlen_q, 64), (4, 2, 70, 64), (4, 2, 70, 64))
    q, k, v = (rng.standard_normal(s, np.float32) for s in shapes)
    return [x if layout == "bhsd" else np.ascontiguousarray(x.swapaxes(1, 2)) for x in (q, k, v)]


def want(q, k, v, window=(1000, 1000)):
    params = {"kv_start": RANGES[:, :1], "kv_end": RANGES[:, 1:], "window_left": window[0], "window_right": window[1]}
    return reference.attention(q, k, v, softmax_scale=0.125, mask=reference.padded, params=params)


@pytest.mark.parametrize("variant", ("v1", "v2", "auto"))
@pytest.mark.parametrize("layout", ("bhsd", "bshd"))
@pytest.mark.parametrize(
    ("options", "window"),
    [({}, (1000, 1000)), ({"causal": True}, (1000, 0)), ({"window_size": (7, 2)}, (7, 2))],
    ids=["full", "causal", "window"],
)
@pytest.mark.parametrize("seqlen_q", (1, 33, 70))
def test_numbers(layout, variant, options, window, seqlen_q):
    q, k, v = arrays(layout, seqlen_q)
    out, lse = padded_attention(q, k, v, RANGES, layout=layout, variant=variant, return_lse=True, **options)
    exact, exact_lse = want(*arrays(seqlen_q=seqlen_q), window)
    out = out if layout == "bhsd" else out.swapaxes(1, 2)
    assert numerics.largest_error(out, exact) <= 2e-6
    assert numerics.largest_error(lse, exact_lse) <= numerics.lse_bound(exact_lse)
    assert not out[3].any() and np.isneginf(lse[3]).all()


def test_ranges_beyond_the_ends_see_all_keys():
    q, k, v = arrays()
    whole = padded_attention(q, k, v, np.array([[0, 70]] * 4, np.int32))
    beyond = np.array([[-5, 2**31 - 1]] * 4, np.int32)
    assert np.array_equal(padded_attention(q, k, v, beyond), whole)


def test_what_lies_outside_is_not_read():
    """NaN in keys and values that nobody sees."""
    q, k, v = arrays()
    clean = padded_attention(q, k, v, RANGES)
    for b, (start, end) in enumerate(RANGES):
        for x in (k, v):
            x[b, :, :start], x[b, :, end:] = np.nan, np.nan
    assert np.array_equal(padded_attention(q, k, v, RANGES), clean)


def test_strided_ranges():
    q, k, v = arrays()
    room = np.zeros((8, 6), np.int32)
    view = room[::2, 1::3]
    view[:] = RANGES
    assert np.array_equal(padded_attention(q, k, v, view), padded_attention(q, k, v, RANGES))


@pytest.mark.parametrize(
    ("ranges", "error", "says"),
    [
        (RANGES.astype(np.int64), ArgumentTypeError, "key_range: is int64, expected an int32 tensor"),
        (RANGES.tolist(), ArgumentTypeError, "key_range: is list"),
        (RANGES[:, 0], InvalidArgumentError, r"key_range: has shape \(4,\), expected \(batch, 2\)"),
        (RANGES[:3], InvalidArgumentError, r"kv_start: has shape \(3, 1\)"),
        (RANGES.T, InvalidArgumentError, r"key_range: has shape \(2, 4\)"),
    ],
)
def test_wrong_ranges(ranges, error, says):
    with pytest.raises(error, match=says):
        padded_attention(*arrays(), ranges)


def test_more_heads_than_positions_is_no_surprise_in_a_named_layout(recwarn):
    q = np.zeros((1, 16, 3, 64), np.float32)
    padded_attention(q, q, q, np.array([[0, 2]], np.int32))
    assert not recwarn.list


def test_the_shared_cases_have_empty_partial_and_whole_ranges():
    for case in CASES:
        if case.mask == "padded":
            data = inputs(case)
            length = np.clip(data.params["kv_end"], 0, case.seqlen_kv) - np.clip(data.params["kv_start"], 0, None)
            assert (length <= 0).any() and (length >= case.seqlen_kv - 2).any()
            assert not expected(case)[0][-1, -1].any()
