"""Every wrong call of ``test_bad_input`` through every other way in, on the CPU and on a GPU that stays healthy."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from tests.test_bad_input import WRONG, Wrong, good
from tests.test_torch_program import DEVICES
from tvm_flash import (
    BackendSelector,
    InvalidArgumentError,
    KernelNotFoundError,
    LayoutError,
    TvmFlashError,
    flash_attention,
    flash_attention_v2,
    padded_attention,
)

pytestmark = pytest.mark.usefixtures("cpu_pack")

WAYS = ("flash_attention_v2", "a selected kernel", "padded_attention", "padded_attention of bshd")

#: Arguments that a way in doesn't have.
_WITHOUT = {
    "a selected kernel": {"variant"},
    "padded_attention": {"softcap", "alibi_slopes"},
    "padded_attention of bshd": {"softcap", "alibi_slopes"},
}


#: Wrong by how they lie in memory or by their dtype, which the way to a GPU changes here.
_NOT_ON_A_GPU = {"mixed dtypes v", "too many bytes", "expanded last", "every second", "out expanded", "out is q"}
_NOT_ON_A_GPU |= {"out overlaps k"}


def calls() -> list:
    return [
        pytest.param(way, wrong, id=f"{way}-{wrong.name}")
        for way in WAYS
        for wrong in WRONG
        if not _WITHOUT.get(way, set()) & wrong.change.keys()
    ]


def test_there_are_enough():
    assert len(WRONG) + len(calls()) >= 200


def arguments(way: str, change: dict, device: str) -> dict:
    """The good call with a change, in the layout of a way in and on a device, which has no float32 if it is a GPU."""
    swap = way == "flash_attention_v2" or "bshd" in way

    def converted(name, x):
        if isinstance(x, torch.Tensor) and x.device.type == "cpu":
            if device == "cuda" and x.dtype == torch.float32 and name != "alibi_slopes":
                x = x.bfloat16()
            x = x.to(device)
        if swap and name in ("q", "k", "v", "out") and getattr(x, "ndim", 0) == 4 and not isinstance(x, np.ndarray):
            x = x.transpose(1, 2)
        return x

    return {name: converted(name, x) for name, x in {**good(), **change}.items()}


def call(way: str, device: str, given: dict):
    if way == "flash_attention_v2":
        return flash_attention_v2(**given)
    if way == "a selected kernel":
        return BackendSelector(device).select_attention(2, 4, 17, 64)(**given)
    ranges = torch.tensor([[0, 20]], dtype=torch.int32, device=device)
    return padded_attention(**given, key_range=ranges, layout="bshd" if "bshd" in way else "bhsd")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("way", "wrong"), calls())
def test_a_wrong_call(way: str, wrong: Wrong, device: str):
    if device == "cuda" and wrong.name in _NOT_ON_A_GPU:
        pytest.skip("isn't wrong any more once it is copied to a GPU")
    given = arguments(way, wrong.change, device)
    before = given["out"].clone() if isinstance(given.get("out"), torch.Tensor) else None
    with pytest.raises(wrong.error) as caught:
        call(way, device, given)
    assert isinstance(caught.value, TvmFlashError) and isinstance(caught.value, wrong.builtin)
    named = r"^(q|k|v|out|causal|return_lse|window_size|softmax_scale|softcap|variant|alibi_slopes|key_range)\b"
    assert isinstance(caught.value, KernelNotFoundError) or re.search(named, str(caught.value))
    if before is not None:
        assert torch.equal(given["out"], before)
    if device == "cuda":
        torch.cuda.synchronize()
    right = arguments(way, {}, device)
    assert torch.equal(call(way, device, right), call(way, device, right))


@pytest.mark.parametrize("device", DEVICES[1:])
def test_wrong_calls_by_the_thousand_leave_a_gpu_healthy(device):
    q, k, v = (x.half().to(device) for x in good().values())
    want = flash_attention(q, k, v)
    for _ in range(1000):
        with pytest.raises(InvalidArgumentError):
            flash_attention(q, k, v[:, :, :5])
        with pytest.raises((InvalidArgumentError, LayoutError)):
            flash_attention_v2(q, k, v)
    torch.cuda.synchronize()
    assert torch.equal(flash_attention(q, k, v), want)
