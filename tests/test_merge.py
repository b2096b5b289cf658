"""Attention over several sets of keys, put together, against float64 over all of them at once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tvm_flash import (
    ArgumentTypeError,
    InvalidArgumentError,
    LayoutError,
    flash_attention,
    flash_attention_v2,
    merge_attention,
    numerics,
    reference,
)

#: How many heads and rows; where the keys are cut; how many there are.
HEADS, ROWS, CUTS = 3, 7, (0, 5, 6, 30)
NOTHING = -np.inf


def tensors(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((2, HEADS, n, 16), np.float32) for n in (ROWS, CUTS[-1], CUTS[-1])]


def parts(q, k, v, attend, of_keys):
    pairs = itertools.pairwise(CUTS)
    return zip(*(attend(q, of_keys(k, a, b), of_keys(v, a, b), return_lse=True) for a, b in pairs), strict=True)


def exact(q, k, v):
    return reference.attention(q, k, v, softmax_scale=0.25, mask=reference.full)


def states(rng, count=4, shape=(2, HEADS, ROWS)):
    """Results and log-sum-exps of parts; of some rows none has keys, of some a few haven't."""
    outs = [rng.standard_normal((*shape, 8)).astype(np.float32) for _ in range(count)]
    lses = [(30 * rng.standard_normal(shape)).astype(np.float32) for _ in range(count)]
    for out, lse in zip(outs, lses, strict=True):
        lse[rng.random(shape) < 0.3] = NOTHING
        lse[0, 1, 2] = NOTHING
        out[lse == NOTHING] = np.nan  # what stands there has no meaning
    return outs, lses


def in_float64(outs, lses):
    """Of states heads first, by weights that nobody has to keep in range."""
    wide = np.stack(lses).astype(np.longdouble)
    weights = np.exp(wide)
    total = weights.sum(0)
    there = np.where(np.isnan(outs), 0, outs).astype(np.longdouble)
    out = np.where(total[..., None] > 0, (weights[..., None] * there).sum(0) / np.where(total, total, 1)[..., None], 0)
    with np.errstate(divide="ignore"):
        return out, np.log(total)


def test_keys_in_parts_are_as_one_call():
    q, k, v = tensors()
    out, lse = merge_attention(*map(list, parts(q, k, v, flash_attention, lambda x, a, b: x[:, :, a:b])))
    want, want_lse = exact(q, k, v)
    assert isinstance(out, np.ndarray) and (out.dtype, lse.dtype) == (np.float32, np.float32)
    assert numerics.largest_error(out, want) < 2e-6
    assert numerics.largest_error(lse, want_lse) < 2e-6


def test_layout_of_positions_first():
    q, k, v = tensors(1)
    swapped = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in (q, k, v)]
    outs, lses = parts(*swapped, flash_attention_v2, lambda x, a, b: x[:, a:b])
    out, lse = merge_attention(outs, lses, layout="bshd")
    want, want_lse = exact(q, k, v)
    assert numerics.largest_error(out.swapaxes(1, 2), want) < 2e-6
    assert numerics.largest_error(lse, want_lse) < 2e-6


def test_rows_without_keys():
    outs, lses = states(np.random.default_rng(2))
    out, lse = merge_attention(outs, lses)
    want, want_lse = in_float64(outs, lses)
    assert not np.isnan(out).any() and (lse[0, 1, 2], *out[0, 1, 2]) == (NOTHING, *[0] * 8)
    assert numerics.largest_error(out, want) < 2e-6
    seen = want_lse > NOTHING
    assert (lse[~seen] == NOTHING).all()
    np.testing.assert_allclose(lse[seen], want_lse[seen].astype(float), rtol=2e-7, atol=1e-6)


def test_one_after_the_other():
    outs, lses = states(np.random.default_rng(3), shape=(1, HEADS, ROWS))
    out, lse = merge_attention([x[0].swapaxes(0, 1) for x in outs], [x[0] for x in lses])
    dense, dense_lse = merge_attention(outs, lses)
    assert np.array_equal(out.swapaxes(0, 1), dense[0]) and np.array_equal(lse, dense_lse[0])


def test_part_alone_and_parts_without_keys_keep_bits():
    outs, lses = states(np.random.default_rng(4), 1)
    alone = merge_attention(outs, lses)
    seen = lses[0] > NOTHING
    assert np.array_equal(alone[0][seen], outs[0][seen]) and np.array_equal(alone[1], lses[0])
    blind = np.full_like(outs[0], np.nan), np.full_like(lses[0], NOTHING)
    for order in (1, -1):
        beside = merge_attention(*([x, y][::order] for x, y in zip((outs[0], lses[0]), blind, strict=True)))
        assert all(map(np.array_equal, beside, alone))


def test_sinks_belong_to_one_part():
    q, k, v = tensors(5)
    sinks = np.array([0.5, 3, -1], np.float32)
    first = flash_attention(q, k[:, :, :9], v[:, :, :9], sinks=sinks, return_lse=True)
    rest = flash_attention(q, k[:, :, 9:], v[:, :, 9:], return_lse=True)
    want, want_lse = flash_attention(q, k, v, sinks=sinks, return_lse=True)
    out, lse = merge_attention(*zip(first, rest, strict=True))
    assert numerics.largest_error(out, want) < 2e-6 and numerics.largest_error(lse, want_lse) < 2e-6


def test_torch_gradients():
    torch = pytest.importorskip("torch")
    outs, lses = states(np.random.default_rng(6))
    dout, dlse = (np.random.default_rng(7).standard_normal(s) for s in ((2, HEADS, ROWS, 8), (2, HEADS, ROWS)))
    dout[0, 1, 2], dlse[0, 1, 2] = np.nan, np.nan  # of a row without keys
    given = [[torch.tensor(x, requires_grad=True) for x in group] for group in (outs, lses)]
    for merge in (merge_attention, torch.compile(merge_attention, fullgraph=True, backend="aot_eager")):
        out, lse = merge(*given)
        found = torch.autograd.grad(
            (out, lse), [*given[0], *given[1]], (torch.tensor(dout).float(), torch.tensor(dlse).float())
        )
        found = [x.double().numpy() for x in found]
        total, total_lse = in_float64(outs, lses)
        for i, (part, part_lse) in enumerate(zip(outs, lses, strict=True)):
            seen = part_lse > NOTHING
            share = np.exp(np.where(seen, part_lse, 0) - np.where(seen, total_lse, 0))
            want = np.where(seen[..., None], share[..., None] * dout, 0)
            flows = (dout * (np.where(seen[..., None], part, 0) - total)).sum(-1) + dlse
            want_lse = np.where(seen, share * flows, 0)
            assert numerics.largest_error(found[i], want) < 3e-6
            assert numerics.largest_error(found[len(outs) + i], want_lse) < 1e-5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits_are_rounded_once(dtype):
    torch = pytest.importorskip("torch")
    outs, lses = states(np.random.default_rng(8))
    narrow = [torch.tensor(x).to(getattr(torch, dtype)) for x in outs]
    out, lse = merge_attention(narrow, [torch.tensor(x) for x in lses])
    wide, _ = merge_attention([x.float() for x in narrow], [torch.tensor(x) for x in lses])
    assert out.dtype == narrow[0].dtype and lse.dtype == torch.float32
    assert torch.equal(out, wide.to(out.dtype))


def test_jax():
    jax = pytest.importorskip("jax")
    outs, lses = states(np.random.default_rng(9))
    want, want_lse = merge_attention(outs, lses)
    given = [list(map(jax.numpy.asarray, x)) for x in (outs, lses)]
    out, lse = jax.jit(merge_attention)(*given)
    assert numerics.largest_error(np.asarray(out), want) < 2e-6
    assert np.allclose(np.asarray(lse), want_lse, rtol=1e-6)
    gradients = jax.jit(jax.grad(lambda o, x: merge_attention(o, x)[0].sum(), (0, 1)))(*given)
    assert all(bool(jax.numpy.isfinite(x).all()) for x in jax.tree_util.tree_leaves(gradients))


def test_dlpack():
    outs, lses = states(np.random.default_rng(10))

    class Other:
        def __init__(self, x):
            self._x = x

        def __dlpack__(self, **options):
            return self._x.__dlpack__(**options)

        def __dlpack_device__(self):
            return self._x.__dlpack_device__()

    found = merge_attention(list(map(Other, outs)), list(map(Other, lses)))
    assert all(map(np.array_equal, map(np.asarray, found), merge_attention(outs, lses)))


def _wrong():
    out, lse = np.zeros((1, 2, 3, 8), np.float32), np.zeros((1, 2, 3), np.float32)
    yield (out, [lse]), {}, ArgumentTypeError, "outs: is a ndarray, expected a list or tuple"
    yield ([], []), {}, InvalidArgumentError, "outs: is empty"
    yield ([out, out], [lse]), {}, InvalidArgumentError, "lses: has 1 tensors, expected 2"
    yield ([out, out[:, :1]], [lse, lse]), {}, InvalidArgumentError, r"outs\[1\]: has shape \(1, 1, 3, 8\)"
    yield ([out], [lse.astype("f8")]), {}, ArgumentTypeError, r"lses\[0\]: has dtype float64, expected float32"
    yield ([out.astype("f8")], [lse]), {}, ArgumentTypeError, r"outs\[0\]: has dtype float64, expected one of"
    yield ([out, out.astype("f2")], [lse] * 2), {}, ArgumentTypeError, r"outs\[1\]: has dtype float16, expected float32"
    yield ([out], [lse]), {"layout": "bshd"}, LayoutError, r"pass layout='bhsd'"
    yield ([out], [lse.swapaxes(1, 2)]), {}, LayoutError, r"pass layout='bshd'"
    yield ([out], [lse[:, :1]]), {}, InvalidArgumentError, r"lses\[0\]: has shape \(1, 1, 3\), expected \(1, 2, 3\)"
    yield ([out[0, 0]], [lse]), {}, InvalidArgumentError, r"outs\[0\]: has shape \(3, 8\), expected"
    yield ([out], [lse]), {"layout": "sbhd"}, InvalidArgumentError, "layout: is 'sbhd'"
    yield ([out], ["x"]), {}, ArgumentTypeError, r"lses\[0\]: is a builtins.str"
    yield ([out], [np.ma.array(lse)]), {}, ArgumentTypeError, r"lses\[0\]: is a MaskedArray"


@pytest.mark.parametrize(("arguments", "options", "error", "text"), list(_wrong()))
def test_errors(arguments, options, error, text):
    with pytest.raises(error, match=text):
        merge_attention(*arguments, **options)


def test_tensors_of_two_frameworks():
    torch = pytest.importorskip("torch")
    out, lse = np.zeros((1, 2, 3, 8), np.float32), np.zeros((1, 2, 3), np.float32)
    with pytest.raises(ArgumentTypeError, match=r"lses\[0\]: is a torch tensor, but outs\[0\] is one of numpy"):
        merge_attention([out], [torch.tensor(lse)])
