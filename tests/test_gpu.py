"""Every installed CUDA kernel on this machine's GPU: the shared cases and adversarial scores, against float64."""

import pytest

from tvm_flash import cuda
from tvm_flash.registry import registry

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not cuda.device_count(), reason="there is no CUDA device")]


def kernels():
    from tests.verification import cuda_kernels

    return cuda_kernels([k for arch in registry().archs() for k in registry().kernels(arch)])


@pytest.mark.parametrize("kernel", kernels(), ids=lambda k: f"{k.entry.arch}-{k.entry.symbol}")
def test_against_float64(kernel):
    from tests.verification import function_of, verify

    count, worst = verify(kernel, function_of(kernel))
    assert count > 0
    assert worst <= 1
