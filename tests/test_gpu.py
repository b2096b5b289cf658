"""Every installed CUDA kernel on this machine's GPU: the shared cases and adversarial scores, against float64.

Needs packs and torch, and no TVM: what is checked is what ships.  An older arch's pack can be checked on a newer GPU
if it was built with ``--run-on`` or assembled with ``--recompile-for``.
"""

import numpy as np
import pytest

from tvm_flash.machine import cuda

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not cuda.device_count(), reason="there is no CUDA device")]

from tests import torch_cases, verification  # noqa: E402

KERNELS = pytest.mark.parametrize(
    "kernel", verification.cuda_kernels(), ids=lambda k: f"{k.entry.arch}-{k.entry.symbol}"
)


@KERNELS
def test_against_float64(kernel):
    count, worst = verification.verify(kernel)
    assert count > 0
    assert worst <= 1


@KERNELS
def test_lse_is_left_alone_where_there_is_no_room(kernel):
    case, data = next(verification.cases_of(kernel.entry))
    function = verification.function_of(kernel)
    rows = case.batch * case.heads * case.seqlen_q
    arguments = (case, data, function, kernel.entry.params, kernel.entry.layout)
    out, lse = torch_cases.run(*arguments, lse_length=rows - 1, device="cuda")
    assert np.isnan(lse).all()
    assert np.array_equal(out, torch_cases.run(*arguments, device="cuda")[0])
