"""Sequences that two GPUs of this machine share, by NCCL's messages and by reading each other's memory: the cases of
the processor, in bfloat16, as one GPU does."""

from __future__ import annotations

import pytest
import torch

from tests.context_parallel_cases import CASES
from tests.context_parallel_ranks import ON_GPUS
from tests.test_context_parallel import difference, run
from tvm_flash.distributed.peers import VARIABLE
from tvm_flash.machine import cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.fixture(scope="module", params=["0", None], ids=["messages", "memory"])
def found(request, tmp_path_factory):
    """By messages, and by what ranks do that aren't told anything."""
    if request.param is None and not torch.cuda.can_device_access_peer(0, 1):
        pytest.skip("needs two GPUs that reach each other's memory")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(VARIABLE, raising=False)
        if request.param is not None:
            patch.setenv(VARIABLE, request.param)
        told = run(tmp_path_factory.mktemp("ranks"), 2, "results", "reads_memory")
    assert told["reads_memory"] == (request.param is None)
    return told["results"]


@pytest.mark.parametrize("case", CASES)
def test_two_gpus_err_as_one_does(found, case):
    """Of gradients the parts of two ranks are rounded before they are added."""
    expected = CASES[case].exact(CASES[case].inputs(torch.bfloat16))
    alone, *others = (found[case, mesh, torch.bfloat16] for mesh in ON_GPUS)
    for mesh, together in zip(ON_GPUS[1:], others, strict=True):
        assert together.keys() == expected.keys()
        for name, exact in expected.items():
            one, two = (difference(x[name], exact).pow(2).mean().sqrt() for x in (alone, together))
            assert two <= 1.5 * one + 1e-6 * exact[exact.isfinite()].abs().max(), (mesh, name)
