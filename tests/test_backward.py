"""``flash_attention_backward`` and its siblings: numbers against float64, memory, layouts, and what is refused."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from tvm_flash import (
    ArgumentTypeError,
    InvalidArgumentError,
    KernelNotFoundError,
    LayoutError,
    flash_attention,
    flash_attention_backward,
    flash_attention_v2,
    flash_attention_v2_backward,
    padded_attention,
    padded_attention_backward,
    reference,
)
from tvm_flash.call import fast

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("trains")

SCALE = 0.21
FUNCTIONS = {
    "bhsd": (flash_attention, flash_attention_backward),
    "bshd": (flash_attention_v2, flash_attention_v2_backward),
}

#: Options of a call, and what they are to the reference.
MODES = {
    "full": ({}, {}),
    "causal": ({"causal": True}, {"mask": reference.causal}),
    "window": (
        {"window_size": (9, 3)},
        {"mask": reference.window, "params": {"window_left": 9, "window_right": 3}},
    ),
    "softcap": (
        {"softcap": 1.5, "causal": True},
        {"score": reference.softcap, "mask": reference.causal, "params": {"softcap": 1.5}},
    ),
}


def problem(dtype=np.float32, batch=2, heads=4, kv_heads=2, seqlen_q=33, seqlen_kv=50, head_dim=64, head_dim_v=64):
    """dout, q, k, v and dlse."""
    rng = np.random.default_rng(3)
    shapes = (
        (batch, heads, seqlen_q, head_dim_v),
        (batch, heads, seqlen_q, head_dim),
        (batch, kv_heads, seqlen_kv, head_dim),
        (batch, kv_heads, seqlen_kv, head_dim_v),
    )
    tensors = [rng.standard_normal(s, np.float32).astype(dtype) for s in shapes]
    return (*tensors, rng.standard_normal((batch, heads, seqlen_q), np.float32))


def swapped(x, layout):
    return x if layout == "bhsd" else x.swapaxes(1, 2)


def close(found, wanted, tolerance=3e-6):
    found = found.numpy() if isinstance(found, torch.Tensor) else found
    assert found.shape == wanted.shape
    error = np.abs(found.astype(np.float64) - wanted).max(initial=0)
    assert error <= tolerance * max(1.0, np.abs(wanted).max(initial=0)), error


@pytest.mark.parametrize("layout", FUNCTIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("framework", ("numpy", "torch"))
def test_against_float64(layout, mode, framework):
    dout, q, k, v, dlse = problem()
    options, other = MODES[mode]
    want = reference.attention_backward(dout, q, k, v, softmax_scale=SCALE, dlse=dlse, **other)
    forward, backward = FUNCTIONS[layout]
    given = [swapped(x, layout) for x in (dout, q, k, v)]
    make = torch.from_numpy if framework == "torch" else np.asarray
    dout, q, k, v, dlse = (make(x) for x in (*given, dlse))
    out, lse = forward(q, k, v, softmax_scale=SCALE, return_lse=True, **options)
    found = backward(dout, q, k, v, out, lse, dlse=dlse, softmax_scale=SCALE, **options)
    for x, like, wanted in zip(found, (q, k, v), (want.dq, want.dk, want.dv), strict=True):
        assert type(x) is type(like) and x.dtype == like.dtype
        close(swapped(x, layout), wanted)
    again = backward(dout, q, k, v, out, lse, dlse=dlse, softmax_scale=SCALE, **options)
    assert all((a == b).all() for a, b in zip(again, found, strict=True)), "other bits when asked again"


@pytest.mark.parametrize("shape", ("(heads,)", "(batch, heads)", "(1, heads)"))
def test_the_gradient_of_slopes(shape):
    dout, q, k, v, _ = problem()
    slopes = np.random.default_rng(5).random({"(heads,)": 4, "(batch, heads)": (2, 4), "(1, heads)": (1, 4)}[shape])
    slopes = slopes.astype(np.float32)
    whole = np.broadcast_to(slopes, (2, 4))
    want = reference.attention_backward(
        *(dout, q, k, v),
        softmax_scale=0.125,
        mask=reference.causal,
        score=reference.alibi,
        params={"alibi_slopes": whole},
        gradients=("alibi_slopes",),
    )
    options = {"causal": True, "alibi_slopes": slopes}
    out, lse = flash_attention(q, k, v, return_lse=True, **options)
    *found, d_slopes = flash_attention_backward(dout, q, k, v, out, lse, gradients=("alibi_slopes",), **options)
    for x, wanted in zip(found, (want.dq, want.dk, want.dv), strict=True):
        close(x, wanted)
    close(d_slopes, want.params["alibi_slopes"], 1e-5)
    without = flash_attention_backward(dout, q, k, v, out, lse, **options)
    assert len(without) == 3 and all(np.array_equal(a, b) for a, b in zip(without, found, strict=True))
    room = np.full((2, 4), np.nan, np.float32)
    flash_attention_backward(dout, q, k, v, out, lse, gradients=["alibi_slopes"], d_alibi_slopes=room, **options)
    assert np.array_equal(room, d_slopes)


@pytest.mark.parametrize("layout", FUNCTIONS)
def test_padding(layout):
    dout, q, k, v, _ = problem()
    ranges = np.array([[0, 31], [7, 7]], np.int32)  # the second sees nothing
    params = {"kv_start": ranges[:, :1], "kv_end": ranges[:, 1:], "window_left": 99, "window_right": 99}
    params = {n: np.broadcast_to(x, (2, 4)) if np.ndim(x) else x for n, x in params.items()}
    want = reference.attention_backward(dout, q, k, v, softmax_scale=0.125, mask=reference.padded, params=params)
    for x in (k, v):
        x[0, :, 31:] = np.nan
    dout, q, k, v = (swapped(x, layout) for x in (dout, q, k, v))
    out, lse = padded_attention(q, k, v, ranges, layout=layout, return_lse=True)
    found = padded_attention_backward(dout, q, k, v, out, lse, ranges, layout=layout)
    assert not found[0][1].any() and not found[1][0, ..., 31:, :].any() if layout == "bhsd" else True
    for x, wanted in zip(found, (want.dq, want.dk, want.dv), strict=True):
        close(swapped(x, layout), wanted)


def test_gradients_go_where_they_are_asked_for():
    """Into views amid other data, of which nothing is touched; whatever they held before."""
    given = [torch.from_numpy(x) for x in problem()[:4]]
    out, lse = flash_attention(*given[1:], return_lse=True)
    want = flash_attention_backward(*given, out, lse)
    rooms = [torch.full([n + 2 for n in x.shape], torch.nan) for x in given[1:]]
    views = [r[tuple(slice(1, 1 + n) for n in x.shape)] for r, x in zip(rooms, given[1:], strict=True)]
    found = flash_attention_backward(*given, out, lse, dq=views[0], dk=views[1], dv=views[2])
    for view, room, result, wanted in zip(views, rooms, found, want, strict=True):
        assert result is view and torch.equal(view, wanted)
        assert int((~room.isnan()).sum()) == wanted.numel()
    part = flash_attention_backward(*given, out, lse, dk=torch.full_like(given[2], torch.nan))
    assert all(torch.equal(a, b) for a, b in zip(part, want, strict=True))


def test_views_and_expanded_tensors():
    dout, q, k, v, _ = (torch.from_numpy(x) for x in problem(seqlen_kv=33, kv_heads=4))
    out, lse = flash_attention(q, k, v, return_lse=True)
    want = flash_attention_backward(dout, q, k, v, out, lse)
    packed = torch.stack((q, k, v, dout, out), 3).unbind(3)  # (batch, heads, seq, head_dim), heads' rows far apart
    views = packed[3], *packed[:3], packed[4]
    assert all(torch.equal(a, b) for a, b in zip(flash_attention_backward(*views, lse), want, strict=True))
    one = torch.ones(1).expand(1, 4, 33, 1).expand(2, 4, 33, 64).contiguous()
    wide = torch.ones(64).expand(2, 4, 33, 64)  # a gradient of a sum over all but the last dimension
    for a, b in zip(*(flash_attention_backward(x, q, k, v, out, lse) for x in (one, wide)), strict=True):
        assert torch.equal(a, b)


def test_rows_that_see_nothing():
    """Whatever stands in them, and whatever flows into them."""
    dout, q, k, v, dlse = problem(seqlen_q=50, seqlen_kv=20)
    out, lse = flash_attention(q, k, v, causal=True, return_lse=True)
    assert np.isneginf(lse[:, :, :30]).all()
    want = flash_attention_backward(dout, q, k, v, out, lse, dlse=dlse, causal=True)
    for x in (dout, q, dlse):
        x[:, :, :30] = 1e30
    found = flash_attention_backward(dout, q, k, v, out, lse, dlse=dlse, causal=True)
    assert not found[0][:, :, :30].any()
    assert np.array_equal(found[0][:, :, 30:], want[0][:, :, 30:])
    assert all(np.array_equal(a, b) for a, b in zip(found[1:], want[1:], strict=True))


@pytest.mark.parametrize("sizes", ({"seqlen_q": 0}, {"seqlen_kv": 0}, {"batch": 0}, {"heads": 0, "kv_heads": 0}))
def test_nothing_to_compute(sizes):
    dout, q, k, v, _ = problem(**sizes)
    out, lse = flash_attention(q, k, v, return_lse=True)
    found = flash_attention_backward(dout, q, k, v, out, lse)
    for x, like in zip(found, (q, k, v), strict=True):
        assert x.shape == like.shape and not x.any()


@pytest.mark.parametrize("dlse", (False, True))
def test_a_single_row(dlse):
    """Of which one element is all there is of a gradient of the log-sum-exp, or none."""
    dout, q, k, v, given = problem(batch=1, heads=1, kv_heads=1, seqlen_q=1)
    given = given if dlse else None
    want = reference.attention_backward(dout, q, k, v, softmax_scale=0.125, dlse=given)
    out, lse = flash_attention(q, k, v, return_lse=True)
    for _ in range(3):
        found = flash_attention_backward(dout, q, k, v, out, lse, dlse=given)
        for x, wanted in zip(found, (want.dq, want.dk, want.dv), strict=True):
            close(x, wanted)


def test_the_fast_path_gives_the_same():
    if not fast.is_loaded():
        pytest.skip("the pack has no fast path")
    given = [torch.from_numpy(x) for x in problem()[:4]]
    slopes = torch.rand(4)
    options = {"causal": True, "alibi_slopes": slopes, "gradients": ("alibi_slopes",)}
    out, lse = flash_attention(*given[1:], return_lse=True, causal=True, alibi_slopes=slopes)
    with fast.switched_off():
        want = flash_attention_backward(*given, out, lse, **options)
    before = fast._forget()
    for _ in range(2):
        found = flash_attention_backward(*given, out, lse, **options)
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    assert fast._forget() >= 1 and before >= 0


def test_threads():
    dout, q, k, v, _ = problem()
    out, lse = flash_attention(q, k, v, return_lse=True)
    want, wrong = flash_attention_backward(dout, q, k, v, out, lse), []

    def run():
        for _ in range(20):
            found = flash_attention_backward(dout, q, k, v, out, lse)
            wrong.extend(a for a, b in zip(found, want, strict=True) if not np.array_equal(a, b))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


# ---------------------------------------------------------------- what is refused


def refused(error, message, **changes):
    dout, q, k, v, dlse = problem()
    out, lse = flash_attention(q, k, v, return_lse=True)
    arguments = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "lse": lse, "dlse": dlse}
    room = np.full_like(q, np.nan)
    arguments |= {"dq": room} | {n: x(arguments) if callable(x) else x for n, x in changes.items()}
    with pytest.raises(error, match=message):
        flash_attention_backward(**arguments)
    assert np.isnan(room).all(), "something was written"


def test_wrong_arguments():
    refused(InvalidArgumentError, r"^dout: has shape \(2, 4, 32, 64\), expected", dout=lambda a: a["dout"][:, :, 1:])
    refused(
        ArgumentTypeError, r"^dout: has dtype float16, expected float32", dout=lambda a: a["dout"].astype(np.float16)
    )
    refused(InvalidArgumentError, r"^dout: has strides", dout=lambda a: a["dout"][..., ::-1])
    refused(InvalidArgumentError, r"^out: has shape", out=lambda a: a["out"][:1])
    refused(InvalidArgumentError, r"^lse: has shape \(2, 33\), expected", lse=lambda a: a["lse"][:, 0])
    refused(ArgumentTypeError, r"^lse: has dtype float64", lse=lambda a: a["lse"].astype(np.float64))
    refused(InvalidArgumentError, r"^lse: has strides .* contiguous", lse=lambda a: a["lse"][..., ::-1])
    refused(InvalidArgumentError, r"^dlse: has shape", dlse=lambda a: a["dlse"][:1])
    refused(ArgumentTypeError, r"^lse: is a builtins.NoneType", lse=None)
    refused(ArgumentTypeError, r"^dlse: is a torch tensor, but q is one of numpy", dlse=torch.zeros(2, 4, 33))
    other = dict(zip("qkv", (x.swapaxes(1, 2) for x in problem()[1:4]), strict=True))
    refused(LayoutError, r"flash_attention_v2", **other)
    refused(ArgumentTypeError, r"^accumulate: is 'yes'", accumulate="yes")
    refused(InvalidArgumentError, r"^variant: is 'v3'", variant="v3")


def test_wrong_results():
    refused(InvalidArgumentError, r"^dk: has shape", dk=lambda a: a["q"].copy())
    refused(ArgumentTypeError, r"^dk: has dtype float16", dk=lambda a: a["k"].astype(np.float16))
    refused(InvalidArgumentError, r"^dk: shares memory with k, which is read", dk=lambda a: a["k"])
    refused(
        InvalidArgumentError,
        r"^dv: shares memory with dk, which is written",
        **dict.fromkeys(("dk", "dv"), problem()[2]),
    )
    refused(InvalidArgumentError, r"^dk: is read-only", dk=lambda a: np.broadcast_to(a["k"][:1].copy(), a["k"].shape))


def test_wrong_gradients_of_parameters():
    slopes = np.ones(4, np.float32)
    refused(InvalidArgumentError, r"^gradients: has 'alibi_slopes', expected .* none", gradients=("alibi_slopes",))
    refused(InvalidArgumentError, r"^gradients: has 'kv_end'", gradients=("kv_end",), alibi_slopes=slopes)
    refused(InvalidArgumentError, r"^d_alibi_slopes: is given", d_alibi_slopes=slopes, alibi_slopes=slopes)


def test_accumulation_needs_memory_in_float32():
    refused(InvalidArgumentError, r"^dk: isn't given, and with accumulate=True .* dq, dk, dv", accumulate=True)
    half = [x.astype(np.float16) for x in problem()[:4]]
    out, lse = flash_attention(*half[1:], return_lse=True)
    rooms = dict(zip(("dq", "dk", "dv"), (np.zeros_like(x) for x in half[1:]), strict=True))
    with pytest.raises(ArgumentTypeError, match=r"^dq: has dtype float16, expected float32"):
        flash_attention_backward(*half, out, lse, accumulate=True, **rooms)


def test_without_kernels(without_backward):
    refused(KernelNotFoundError, r"no cpu backward kernel for float32; run `.*build --arch cpu --kind backward")
