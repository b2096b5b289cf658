"""Attention over padded sequences: a range of keys for each batch entry."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cases import CASES, expected, inputs
from tvm_flash import (
    ArgumentTypeError,
    InvalidArgumentError,
    NotSupportedError,
    numerics,
    padded_attention,
    reference,
)

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


SLOPES = np.array([0.5, 0.25, 0.1, 1.0], np.float32)


@pytest.mark.parametrize("seqlen_q", (1, 5, 33, 70))
@pytest.mark.parametrize("softcap", (0.0, 2.0))
@pytest.mark.parametrize("slopes", (None, SLOPES, SLOPES / np.arange(1, 5, dtype=np.float32)[:, None]))
@pytest.mark.parametrize("start", (None, "end", (0, -3, 100, 2**31 - 1), (-(2**31), 5, 0, 1)))
def test_every_option_goes_with_ranges(seqlen_q, softcap, slopes, start):
    q, k, v = arrays(seqlen_q=seqlen_q)
    first = np.array(RANGES[:, 1] - seqlen_q if start == "end" else start, np.int32) if start else None
    if slopes is not None and first is not None:
        first = np.clip(first, -60, 100)  # a score takes the rounding of its distance
    for causal, window in ((False, (-1, -1)), (True, (-1, -1)), (False, (7, 2)), (True, (60, -1))):
        options = {"causal": causal, "window_size": window, "softcap": softcap, "return_lse": True}
        runs = [padded_attention(q, k, v, RANGES, alibi_slopes=slopes, query_start=first, **options) for _ in range(3)]
        left, right = (2**40 if x == -1 else x for x in window)
        params = {"kv_start": RANGES[:, :1], "kv_end": RANGES[:, 1:], "window_left": left}
        params |= {"window_right": 0 if causal else right, "softcap": softcap, "has_alibi_slopes": slopes is not None}
        params |= {} if slopes is None else {"alibi_slopes": np.broadcast_to(slopes, (4, 4))}
        params |= {} if first is None else {"query_start": first[:, None]}
        what = {"mask": reference.positioned, "score": reference.optional, "params": params}
        exact, exact_lse = reference.attention(q, k, v, softmax_scale=0.125, **what)
        for out, lse in runs:  # by the slow path, and as it was remembered
            assert numerics.largest_error(out, exact) <= 5e-6
            assert numerics.largest_error(lse, exact_lse) <= numerics.lse_bound(exact_lse)


@pytest.mark.parametrize("dtype", ("float32", "float16"))
def test_options_that_are_off_leave_no_trace(dtype):
    """The kernel that takes all options gives what the plain one does, infinities and NaN too."""
    q, k, v = (x.astype(dtype) for x in arrays())
    q[0, 0, 3, 5], q[0, 1, 4, 0], k[1, 0, 20, 1], v[2, 1, 69, 0] = np.nan, np.inf, -np.inf, np.inf
    options = {"causal": True, "return_lse": True}
    plain = padded_attention(q, k, v, RANGES, **options)
    start = np.full(4, k.shape[2] - q.shape[2], np.int32)
    for general in (
        padded_attention(q, k, v, RANGES, query_start=start, **options),
        padded_attention(q, k, v, RANGES, alibi_slopes=np.zeros(4, np.float32), **options),
    ):
        for x, y in zip(plain, general, strict=True):
            assert np.array_equal(np.isnan(x), np.isnan(y)) and np.array_equal(np.isinf(x), np.isinf(y))
            finite = np.isfinite(x)
            rounding = 2e-3 if dtype == "float16" and x.dtype == dtype else 2e-6
            assert np.abs(x[finite].astype(np.float64) - y[finite]).max() <= rounding


def test_queries_of_any_alignment_stand_for_what_is_not_given():
    """The kernel gets memory in place of slopes; two bytes from a multiple of four are as good."""
    q, k, v = (x.astype(np.float16) for x in arrays())
    room = np.zeros(q.size + 1, np.float16)
    odd = room[1:].reshape(q.shape)
    odd[:] = q
    want = padded_attention(q, k, v, RANGES, softcap=2.0)
    assert np.array_equal(padded_attention(odd, k, v, RANGES, softcap=2.0), want)


@pytest.mark.parametrize(
    ("start", "error", "says"),
    [
        (np.zeros(4, np.int64), ArgumentTypeError, "query_start: is int64, expected an int32 tensor"),
        ([0, 0, 0, 0], ArgumentTypeError, "query_start: is list"),
        (np.zeros((4, 1), np.int32), InvalidArgumentError, r"query_start: has shape \(4, 1\), expected \(batch,\)"),
        (np.zeros(3, np.int32), InvalidArgumentError, r"query_start: has shape \(3, 1\)"),
    ],
)
def test_wrong_starts(start, error, says):
    with pytest.raises(error, match=says):
        padded_attention(*arrays(), RANGES, query_start=start)


def test_positions_that_no_int32_can_count():
    q = np.lib.stride_tricks.as_strided(np.zeros(64, np.float32), (1, 1, 2**29, 64), (0, 0, 0, 4))
    with pytest.raises(NotSupportedError, match="query_start: there are 536870912 queries"):
        padded_attention(q, q, q, np.array([[0, 2]], np.int32), query_start=np.zeros(1, np.int32))


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
