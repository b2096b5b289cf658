"""The bound of an error lets the usual computation pass, in any order of its sums, and no mistake of a kernel's."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_flash import numerics, reference

SCALE = 0.125
PARAMS = {"softcap": 2.0}


def problem(dtype, seqlen_kv, seed=0):
    rng = np.random.default_rng(seed)
    return [
        numerics.round_to(rng.standard_normal((1, 2, n, 64), np.float32), dtype) for n in (33, seqlen_kv, seqlen_kv)
    ]


def attend(q, k, v, dtype, *, scale=SCALE, score=reference.identity, mask=reference.full):
    """One result of the usual computation; the mistakes below are made in its arguments."""
    what = {"softmax_scale": scale, "mask": mask, "score": score, "params": PARAMS}
    return numerics.usual_attention(q, k, v, dtype=dtype, **what)[0]


def exact_and_bound(q, k, v, dtype, score=reference.identity):
    what = {"softmax_scale": SCALE, "mask": reference.full, "score": score, "params": PARAMS}
    exact, _ = reference.attention(q, k, v, **what)
    return exact, numerics.bound(numerics.usual_attention(q, k, v, dtype=dtype, **what), exact, dtype)


def without_a_key(q, k, v, dtype):
    return attend(q, k, v, dtype, mask=lambda at: at.j != 40)


def with_a_wrong_scale(q, k, v, dtype):
    return attend(q, k, v, dtype, scale=SCALE * (1 + 1e-5))


def with_an_approximate_tanh(q, k, v, dtype):
    """``tanh.approx`` is good to 2^-11."""

    def softcap(s, at):
        return reference.softcap(s, at) * (1 + 2.0**-11 * np.sign(np.sin(1e4 * s)))

    return attend(q, k, v, dtype, score=softcap)


def without_a_rescale(q, k, v, dtype):
    """The first 64 keys' sums aren't rescaled when the maximum of a row grows afterwards."""

    def sums(keys):
        s = np.matmul(q, np.swapaxes(k[:, :, keys], 2, 3)) * SCALE
        return s, s.max(-1, keepdims=True)

    (s0, max0), (s1, max1) = sums(slice(0, 64)), sums(slice(64, None))
    p = np.concatenate([np.exp(s0 - max0), np.exp(s1 - np.maximum(max0, max1))], -1)
    return numerics.round_to(np.matmul(p, v) / p.sum(-1, keepdims=True), dtype)


@pytest.mark.parametrize(
    ("mistake", "dtype", "seqlen_kv"),
    [
        (without_a_key, "float32", 2500),
        (without_a_key, "float16", 600),
        (without_a_key, "bfloat16", 100),
        (with_a_wrong_scale, "float32", 2500),
        (with_an_approximate_tanh, "float32", 2500),
        (without_a_rescale, "float32", 2500),
        (without_a_rescale, "float16", 600),
        (without_a_rescale, "bfloat16", 100),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_a_mistake_exceeds_the_bound(mistake, dtype, seqlen_kv):
    q, k, v = problem(dtype, seqlen_kv)
    score = reference.softcap if mistake is with_an_approximate_tanh else reference.identity
    exact, bound = exact_and_bound(q, k, v, dtype, score)
    assert numerics.largest_error(attend(q, k, v, dtype, score=score), exact) <= bound
    error = numerics.largest_error(mistake(q, k, v, dtype), exact)
    assert error > 1.5 * bound, f"{error:.2e}, allowed {bound:.2e}"


@pytest.mark.parametrize("dtype", numerics.EPSILON)
@pytest.mark.parametrize("seqlen_kv", (3, 70, 1000))
def test_any_order_of_the_sums_is_allowed(dtype, seqlen_kv):
    q, k, v = problem(dtype, seqlen_kv)
    exact, bound = exact_and_bound(q, k, v, dtype)
    for seed in range(40):
        rng = np.random.default_rng(1000 + seed)
        terms, keys = rng.permutation(64), rng.permutation(seqlen_kv)
        other = attend(q[..., terms], k[:, :, keys][..., terms], v[:, :, keys], dtype)
        assert numerics.largest_error(other, exact) <= bound


def test_nan_and_unwritten_results_exceed_every_bound():
    assert not numerics.largest_error(np.array([1.0, np.nan]), np.ones(2)) <= 1e30
    assert numerics.largest_error(np.array([np.inf, -np.inf]), np.array([np.inf, -np.inf])) == 0


def test_rounding():
    x = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, -0.0, np.inf, -np.inf, np.nan, 3.4e38], np.float32)
    rounded = numerics.round_to(x, "bfloat16")
    assert np.array_equal(rounded, np.array([1, 1 + 2.0**-6, -0.0, np.inf, -np.inf, np.nan, np.inf]), equal_nan=True)
    assert np.array_equal(numerics.round_to(x[:1], "float16"), x[:1])
    for dtype, epsilon in numerics.EPSILON.items():
        one_more = np.array([1 + epsilon], np.float32)
        assert numerics.round_to(one_more, dtype) == one_more
        assert numerics.round_to(np.array([1 + 0.49 * epsilon]).astype(np.float32), dtype) == 1


def test_a_peer_that_fails_allows_nothing():
    exact = np.array([1.0, 2.0])
    near, failed = exact + 1e-3, np.array([np.nan, 2.0])
    bound = numerics.bound([near], exact, "float32")
    assert 2e-3 < bound < 2.1e-3
    for usual in ([failed, near], [near, failed], [near, np.array([np.inf, 2.0])]):
        assert numerics.bound(usual, exact, "float32") == bound
    assert numerics.bound([failed], exact, "float32") == numerics.EPSILON["float32"] * 2


def test_numbers_of_8_bits_are_torchs():
    torch = pytest.importorskip("torch")
    every = np.arange(256, dtype=np.uint8)
    torchs = torch.from_numpy(every).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(numerics.decode(every, "float8_e4m3fn"), torchs, equal_nan=True)
    rng = np.random.default_rng(0)
    between = (torchs[:126] + torchs[1:127]) / 2
    x = rng.standard_normal(10_000) * np.exp(rng.uniform(-9, 4, 10_000))
    x = np.clip(np.concatenate([x, between, -between, [0.0, -0.0]]), -448, 448).astype(np.float32)
    wanted = torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(numerics.encode(x, "float8_e4m3fn"), wanted)
    few = np.array([np.nan, 500, -127.6, 0.5, 1.5], np.float32)
    assert numerics.encode(few, "int8").tolist() == [-128, 127, -127, 0, 2]


@pytest.mark.parametrize(("queries", "keys"), ((3, 0), (0, 3), (0, 0)))
@pytest.mark.parametrize("mask", (reference.full, reference.causal))
def test_the_reference_knows_calls_without_keys_or_queries(queries, keys, mask):
    q, dout = np.ones((2, 2, 4, queries, 8))
    k, v = np.ones((2, 2, 2, keys, 8))
    out, lse = reference.attention(q, k, v, softmax_scale=0.3, mask=mask)
    assert not out.any() and np.all(lse == -np.inf)
    slopes = np.ones(4)
    found = reference.attention_backward(
        *(dout, q, k, v), softmax_scale=0.3, mask=mask, score=reference.alibi,
        params={"alibi_slopes": slopes}, gradients=("alibi_slopes",),
    )  # fmt: skip
    assert (found.dq.shape, found.dk.shape, found.dv.shape) == (q.shape, k.shape, v.shape)
    assert not found.dq.any() and np.array_equal(found.params["alibi_slopes"], np.zeros(4))


def test_gradients_of_what_keys_have_beside_a_sink():
    """They are of each key; a sum over keys is what a parameter of the sink gets."""

    @reference.with_sink(lambda at: at.params["logit"])
    def score(s, at):
        return s * at.params["scale"] + at.params["bias"]

    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((2, 2, n, 4)) for n in (3, 5, 5, 3))
    given = {"logit": rng.standard_normal(2), "scale": rng.standard_normal(2), "bias": rng.standard_normal((2, 5))}
    what = {"softmax_scale": 0.5, "score": score, "axes": {"logit": "h", "scale": "h", "bias": "hj"}}
    found = reference.attention_backward(dout, q, k, v, params=given, gradients=list(given), **what).params
    for name, value in given.items():
        for index in np.ndindex(value.shape):
            step = np.zeros(value.shape)
            step[index] = 1e-5
            ends = (reference.attention(q, k, v, params={**given, name: value + x}, **what)[0] for x in (step, -step))
            slope = np.subtract(*((dout * out).sum() for out in ends)) / 2e-5
            np.testing.assert_allclose(found[name][index], slope, rtol=1e-6, atol=1e-8)
