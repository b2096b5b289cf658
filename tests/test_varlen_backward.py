"""Gradients of sequences one after the other for whoever has no autograd: NumPy, each beside float64 of it alone."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_flash import InvalidArgumentError, flash_attention_varlen, flash_attention_varlen_backward, numerics, reference

STARTS_Q, STARTS_K = (np.array(x, np.int32) for x in ((0, 4, 4, 10), (0, 9, 12, 18)))


def given(seed=0):
    rng = np.random.default_rng(seed)
    # One row and two keys more than there are in sequences.
    q, k, v = (rng.standard_normal((n, h, 64), np.float32) for n, h in ((11, 4), (20, 2), (20, 2)))
    return q, k, v, rng.standard_normal(q.shape, np.float32), rng.standard_normal((4, 11), np.float32)


def test_gradients_of_each_sequence():
    q, k, v, dout, dlse = given()
    sinks = np.array([0.5, -1, 2, 0], np.float32)
    options = {"causal": True, "sinks": sinks}
    out, lse = flash_attention_varlen(q, k, v, STARTS_Q, STARTS_K, return_lse=True, **options)
    dq, dk, dv, d_sinks = flash_attention_varlen_backward(
        dout, q, k, v, out, lse, STARTS_Q, STARTS_K, dlse=dlse, gradients=("sinks",), **options
    )
    total = np.zeros(4)
    for b in range(3):
        rows, keys = (slice(*x[b : b + 2]) for x in (STARTS_Q, STARTS_K))
        alone = [x[s].swapaxes(0, 1)[None] for x, s in ((dout, rows), (q, rows), (k, keys), (v, keys))]
        want = reference.attention_backward(
            *alone,
            softmax_scale=0.125,
            mask=reference.causal,
            score=reference.identity_sinks,
            params={"sinks": sinks[None]},
            dlse=dlse[None, :, rows],
            gradients=("sinks",),
        )
        for found, exact, s in ((dq, want.dq, rows), (dk, want.dk, keys), (dv, want.dv, keys)):
            assert numerics.largest_error(found[s].swapaxes(0, 1)[None], exact) < 1e-5
        total += want.params["sinks"].sum(0)
    assert numerics.largest_error(d_sinks.sum(0), total) < 1e-5
    assert not (dq[10:].any() or dk[18:].any() or dv[18:].any())


def test_errors():
    q, k, v, dout, _ = given(1)
    out, lse = flash_attention_varlen(q, k, v, STARTS_Q, STARTS_K, return_lse=True)
    with pytest.raises(InvalidArgumentError, match="lse: has shape"):
        flash_attention_varlen_backward(dout, q, k, v, out, lse[:, :3], STARTS_Q, STARTS_K)
    with pytest.raises(InvalidArgumentError, match="cu_seqlens_q"):
        flash_attention_varlen_backward(dout, q, k, v, out, lse, STARTS_Q[::-1].copy(), STARTS_K)
    with pytest.raises(InvalidArgumentError, match="gradients: has 'sinks'"):
        flash_attention_varlen_backward(dout, q, k, v, out, lse, STARTS_Q, STARTS_K, gradients=("sinks",))
