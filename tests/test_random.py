"""Random calls of the public functions against float64.

The variables ``TVM_FLASH_RANDOM_CALLS`` and ``TVM_FLASH_RANDOM_SEED`` ask for more of them, or for others.
"""

from __future__ import annotations

import itertools
import os

import pytest

pytest.importorskip("torch")

from tests import random_cases, random_doors
from tests.test_torch_program import DEVICES

CALLS = int(os.environ.get("TVM_FLASH_RANDOM_CALLS", "200"))
SEED = int(os.environ.get("TVM_FLASH_RANDOM_SEED", "0"))
PARTS = 4

pytestmark = [pytest.mark.usefixtures("cpu_pack"), pytest.mark.filterwarnings("ignore::tvm_flash.LayoutWarning")]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("part", range(PARTS))
def test_random_calls(part, device):
    count, _, lines = random_cases.failures(range(SEED + part, SEED + CALLS, PARTS), device)
    assert count and not lines, "\n".join(lines)


def test_gradients_of_random_calls(trains):
    count, _, lines = random_cases.failures(range(SEED, SEED + CALLS // 3), gradients=True)
    assert count and not lines, "\n".join(lines)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("door", random_doors.DOORS)
def test_random_calls_of_drop_ins(door, device, trains):
    count, others, _, lines = random_doors.failures(door, range(SEED, SEED + CALLS // 2), device)
    assert count and not lines, "\n".join(lines)
    assert count > others if device == "cuda" else not others  # GPUs have no kernel for some head dimensions


def test_a_wrong_result_of_a_drop_in_is_found(monkeypatch, trains):
    """The comparison can fail, of results and of gradients."""
    computed = random_doors.sdpa.nn.scaled_dot_product_attention

    def spoiled(q, *arguments, **options):
        out = computed(q, *arguments, **options)
        return out + 0.3 * (q[..., :1].float().sum() - q[..., :1].float().sum().detach()).to(out.dtype)

    monkeypatch.setattr(random_doors.sdpa.nn, "scaled_dot_product_attention", spoiled)
    _, _, _, lines = random_doors.failures("sdpa", range(30))
    assert lines and all("the gradient of q differs" in line for line in lines)


def test_a_call_follows_from_its_seed():
    assert random_cases.call_of(17) == random_cases.call_of(17)
    assert len({random_cases.call_of(seed) for seed in range(50)}) == 50


@pytest.mark.parametrize("device", random_cases.DTYPES)
def test_every_kind_of_call_is_drawn(device):
    """Kernels and their paths: head dimensions, packed and grouped heads, split keys, masks, layouts, memory."""
    calls = [random_cases.call_of(seed, device) for seed in range(4000)]
    options = [dict(call.options) for call in calls]

    def drawn(of):
        return {of(call) for call in calls}

    assert drawn(lambda c: c.variant) == {"v1", "v2", "auto"} and drawn(lambda c: c.layout) == {"bhsd", "bshd"}
    assert drawn(lambda c: c.dtype) == set(random_cases.DTYPES[device])
    assert drawn(lambda c: (c.head_dim, c.head_dim_v)) >= {(d, d) for d in (64, 96, 128, 192, 256)} | {(192, 128)}
    assert any(c.head_dim_v > c.head_dim for c in calls) and any(c.head_dim % 64 % 16 for c in calls)
    assert drawn(lambda c: c.heads // c.kv_heads) >= set(random_cases.GROUPS)
    assert any(c.seqlen_q < 10 and c.seqlen_kv > 8192 for c in calls), "keys that are split"
    assert any(c.seqlen_q < 10 and c.heads > 4 * c.kv_heads and c.kv_heads > 1 for c in calls), "heads that are packed"
    assert any(c.seqlen_q > c.seqlen_kv and o.get("causal") for c, o in zip(calls, options, strict=True))
    assert drawn(lambda c: 0 in (c.seqlen_q, c.seqlen_kv)) == {True, False}
    for option in ("causal", "window_size", "softmax_scale", "softcap"):
        assert any(option in o for o in options)
    assert drawn(lambda c: (c.slopes, c.ranges)) == set(itertools.product((0, 1, 2), (False, True)))
    assert drawn(lambda c: (c.ranges, c.starts)) == {(False, False), (True, False), (True, True)}
    assert any("softcap" in o and c.starts for c, o in zip(calls, options, strict=True))
    assert {x for c in calls for x in c.strides} == set(random_cases.STRIDES[: None if device == "cpu" else -1])
    assert drawn(lambda c: c.out) == {"", "contiguous", "transposed", "gaps"}


def test_a_wrong_result_is_found(monkeypatch):
    """The comparison can fail: one key more or less, one element, one row."""
    seed = next(s for s in range(100) if random_cases.call_of(s).seqlen_q > 20 and not random_cases.call_of(s).out)
    run = random_cases._run

    def spoiled(*arguments):
        out, lse = run(*arguments)
        out.view(-1)[out.numel() // 2] += 0.1
        return out, lse

    monkeypatch.setattr(random_cases, "_run", spoiled)
    _, _, lines = random_cases.failures([seed])
    assert len(lines) == 1 and f"--seed {seed}" in lines[0] and "differs by" in lines[0]
