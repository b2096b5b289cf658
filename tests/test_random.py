"""Random calls of the public functions against float64.

The variables ``TVM_FLASH_RANDOM_CALLS`` and ``TVM_FLASH_RANDOM_SEED`` ask for more of them, or for others.
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("torch")

from tests import random_cases
from tests.test_torch_program import DEVICES

CALLS = int(os.environ.get("TVM_FLASH_RANDOM_CALLS", "300"))
SEED = int(os.environ.get("TVM_FLASH_RANDOM_SEED", "0"))
PARTS = 6

pytestmark = [pytest.mark.usefixtures("cpu_pack"), pytest.mark.filterwarnings("ignore::tvm_flash.LayoutWarning")]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("part", range(PARTS))
def test_random_calls(part, device):
    count, _, lines = random_cases.failures(range(SEED + part, SEED + CALLS, PARTS), device)
    assert count and not lines, "\n".join(lines)


def test_a_call_follows_from_its_seed():
    assert random_cases.call_of(17) == random_cases.call_of(17)
    assert len({random_cases.call_of(seed) for seed in range(50)}) == 50


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
