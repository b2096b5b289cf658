"""Every installed CUDA kernel on this machine's GPU: the shared cases and adversarial scores, against float64.

Needs packs and torch, and no TVM: what is checked is what ships.  An older arch's pack can be checked on a newer GPU
if it was built with ``--run-on`` or assembled with ``--recompile-for``.
"""

import numpy as np
import pytest

from tvm_flash.machine import cuda

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not cuda.device_count(), reason="there is no CUDA device")]

from tests import forward_trials, torch_cases, verification  # noqa: E402
from tests.installed import functions_of  # noqa: E402
from tvm_flash.operators import FORWARD, MERGED  # noqa: E402
from tvm_flash.packs.manifest import DENSE  # noqa: E402

KERNELS = verification.cuda_kernels()
#: Those that may be given no room for it, with a problem to try that on.
THAT_WRITE_LSE = [
    k
    for k in KERNELS
    if k.entry.op == FORWARD
    and k.entry.kind != MERGED
    and k.entry.form == DENSE
    and any(forward_trials.cases_of(k.entry))
]


def name(kernel):
    return f"{kernel.entry.arch}-{kernel.entry.symbol}"


@pytest.mark.parametrize("kernel", KERNELS, ids=name)
def test_against_float64(kernel):
    count, worst = verification.verify(kernel)
    assert count > 0
    assert worst <= 1


@pytest.mark.parametrize("kernel", THAT_WRITE_LSE, ids=name)
def test_lse_is_left_alone_where_there_is_no_room(kernel):
    case, data = next(forward_trials.cases_of(kernel.entry))
    compute = torch_cases.by_entry(kernel.entry, functions_of(kernel), "cuda")
    rows = case.batch * case.heads * case.seqlen_q
    arguments = (case, data, compute, kernel.entry.layout)
    out, lse = torch_cases.run(*arguments, lse_length=rows - 1, device="cuda")
    assert np.isnan(lse).all()
    assert np.array_equal(out, torch_cases.run(*arguments, device="cuda")[0])
