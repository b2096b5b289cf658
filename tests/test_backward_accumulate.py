"""Gradients that are added to float32 buffers of the caller, part by part of the keys, as rings of devices do it."""

import numpy as np
import pytest

from tests.test_backward import FUNCTIONS, SCALE, close, problem, swapped
from tvm_flash import (
    KernelNotFoundError,
    flash_attention_backward,
    padded_attention_backward,
    reference,
)
from tvm_flash.operators import ACCUMULATE
from tvm_flash.packs import registry

pytestmark = pytest.mark.usefixtures("trains")


def forward(layout, q, k, v, **options):
    return FUNCTIONS[layout][0](*(swapped(x, layout) for x in (q, k, v)), return_lse=True, **options)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_gradients_are_added_to_what_is_there(layout, dtype):
    dout, q, k, v, _ = problem(dtype)
    out, lse = forward(layout, q, k, v, causal=True, softmax_scale=SCALE)
    asked = [np.ascontiguousarray(swapped(x, layout)) for x in (dout, q, k, v)]
    rng = np.random.default_rng(5)
    before = [rng.standard_normal(x.shape, np.float32) for x in asked[1:]]
    rooms = [x.copy() for x in before]
    places = dict(zip(("dq", "dk", "dv"), rooms, strict=True))
    options = {"causal": True, "softmax_scale": SCALE}
    found = FUNCTIONS[layout][1](*asked, out, lse, accumulate=True, **places, **options)
    assert all(a is b for a, b in zip(found, rooms, strict=True))
    exact = reference.attention_backward(dout, q, k, v, softmax_scale=SCALE, mask=reference.causal)
    for x, start, name in zip(rooms, before, ("dq", "dk", "dv"), strict=True):
        tolerance = 3e-6 if dtype == np.float32 else 2e-3  # of the weights, which are in q's dtype
        close(x - start, swapped(getattr(exact, name), layout), tolerance)
    again = dict(zip(("dq", "dk", "dv"), (x.copy() for x in before), strict=True))
    FUNCTIONS[layout][1](*asked, out, lse, accumulate=True, **again, **options)
    assert all(np.array_equal(a, b) for a, b in zip(again.values(), rooms, strict=True))


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_a_ring_over_parts_of_the_keys(layout):
    """Each part has its own keys, the whole's result and log-sum-exp, and says where its queries stand."""
    dout, q, k, v, dlse = problem(seqlen_q=50)
    out, lse = forward(layout, q, k, v, causal=True, softmax_scale=SCALE)
    asked = [swapped(x, layout) for x in (dout, q)]
    dq, dk, dv = (np.zeros(swapped(x, layout).shape, np.float32) for x in (q, k, v))
    axis = 2 if layout == "bhsd" else 1
    for first, last in ((33, 50), (0, 20), (20, 33)):
        part = (slice(None),) * axis + (slice(first, last),)
        keys = [swapped(x, layout)[part] for x in (k, v)]
        key_range = np.array([[0, last - first]] * 2, np.int32)
        where = {"query_start": np.full(2, -first, np.int32), "layout": layout}
        rooms = {"dq": dq, "dk": dk[part], "dv": dv[part]}
        options = {"causal": True, "softmax_scale": SCALE, "dlse": dlse, "accumulate": True}
        padded_attention_backward(*asked, *keys, out, lse, key_range, **where, **rooms, **options)
    exact = reference.attention_backward(dout, q, k, v, dlse=dlse, softmax_scale=SCALE, mask=reference.causal)
    for x, name in ((dq, "dq"), (dk, "dk"), (dv, "dv")):
        close(x, swapped(getattr(exact, name), layout))


def test_a_pack_without_says_how_to_build_them(cpu_pack, monkeypatch):
    candidates = registry.Registry.candidates
    monkeypatch.setattr(
        registry.Registry, "candidates", lambda *asked: [k for k in candidates(*asked) if k.entry.kind != ACCUMULATE]
    )
    dout, q, k, v, _ = problem()
    out, lse = forward("bhsd", q, k, v)
    rooms = dict(zip(("dq", "dk", "dv"), (np.zeros_like(x) for x in (q, k, v)), strict=True))
    with pytest.raises(
        KernelNotFoundError,
        match=r"or run `.*build --arch cpu --kind backward_accumulate --head-dim 64 --dtype float32`",
    ):
        flash_attention_backward(dout, q, k, v, out, lse, accumulate=True, **rooms)
