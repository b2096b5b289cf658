"""The run time on a GPU: streams, graphs, and the frameworks that live there.  Kernels have tests of their own."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from tests.cases import Case, expected, inputs
from tvm_flash import (
    ArgumentTypeError,
    BackendSelector,
    InvalidArgumentError,
    NotSupportedError,
    flash_attention,
    flash_attention_v2,
    numerics,
)
from tvm_flash.commands import check as selfcheck
from tvm_flash.machine import cuda
from tvm_flash.machine.device import Device

torch = pytest.importorskip("torch")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not cuda.device_count(), reason="there is no CUDA device")]

CASE = Case(2, 4, 100, 64, kv_heads=2, seqlen_kv=133, mask="causal", dtype="float16")


def tensors(case=CASE):
    data = inputs(case)
    dtype = getattr(torch, case.dtype)
    return [torch.from_numpy(x).to("cuda", dtype) for x in (data.q, data.k, data.v)]


@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
@pytest.mark.parametrize("variant", ("v1", "v2", "auto"))
@pytest.mark.parametrize("layout", ("bhsd", "bshd"))
def test_torch(dtype, variant, layout):
    case = dataclasses.replace(CASE, dtype=dtype)
    q, k, v = tensors(case)
    function, dims = (flash_attention, (1, 1)) if layout == "bhsd" else (flash_attention_v2, (1, 2))
    q, k, v = (x.transpose(*dims) for x in (q, k, v))
    out, lse = function(q, k, v, causal=True, return_lse=True, variant=variant)
    assert out.is_cuda and out.is_contiguous() and lse.is_cuda
    want, want_lse = expected(case)
    got = out.transpose(*dims).double().cpu().numpy()
    assert numerics.largest_error(got, want) <= 4 * numerics.EPSILON[dtype]
    assert numerics.largest_error(lse.cpu().numpy(), want_lse) <= 1e-3
    assert torch.equal(function(q, k, v, causal=True, variant=variant), out)


def test_the_current_stream_is_used():
    q, k, v = tensors()
    want = flash_attention(q.flip(2).contiguous(), k, v)
    new = q.flip(2).contiguous()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # about 50 ms: a kernel on another stream would read the old q
        q.copy_(new)
        out = flash_attention(q, k, v)
    stream.synchronize()
    assert torch.equal(out, want)


def test_a_graph_can_be_captured():
    q, k, v = tensors()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = flash_attention(q, k, v, causal=True, return_lse=True)
    q.copy_(q.flip(2).contiguous())
    graph.replay()
    torch.cuda.synchronize()
    want, want_lse = flash_attention(q, k, v, causal=True, return_lse=True)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)


def test_a_graph_can_be_captured_from_the_first_call_on(python):
    python("""
import torch
from tvm_flash import flash_attention
q, k, v = (torch.randn(1, 2, 100, 64, device="cuda", dtype=torch.float16) for _ in range(3))
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    out = flash_attention(q, k, v)
graph.replay()
torch.cuda.synchronize()
assert torch.equal(out, flash_attention(q, k, v))
""")


def test_the_same_call_on_other_addresses():
    """What a kernel's host half keeps of one call is right in the next, with other tensors of the same shapes."""
    data, results = [], []
    for i in range(12):
        data.append([x.roll(i, 2) for x in tensors()])
        results.append(flash_attention(*data[-1], causal=True))
    torch.cuda.synchronize()
    for (q, k, v), out in zip(data, results, strict=True):
        # Other strides: another tensor map.
        copies = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        assert torch.equal(flash_attention(*copies, causal=True), out)
    assert len({out.data_ptr() for out in results}) == len(results)


def test_a_result_is_memory_of_torchs_allocator():
    q, k, v = tensors()
    side = torch.cuda.Stream()
    for repeated in range(3):
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        out = flash_attention(q, k, v)
        made = torch.cuda.memory_stats()["allocation.all.allocated"] - before
        assert not repeated or made == 1
        assert not out.requires_grad and out.is_contiguous()
        at = out.data_ptr()
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
        out.record_stream(side)  # the memory isn't given away before that stream has done its work
        del out
        assert flash_attention(q, k, v).data_ptr() != at
        torch.cuda.synchronize()
    with torch.inference_mode():
        assert flash_attention(q, k, v).is_inference()


def test_misaligned_views_are_refused_or_served_by_another_kernel():
    q, k, v = tensors()
    room = torch.empty(q.numel() + 4, device="cuda", dtype=q.dtype)
    odd = room[4:].view(q.shape).copy_(q)
    want = flash_attention(q, k, v)
    try:
        assert torch.allclose(flash_attention(odd, k, v), want, atol=2e-3)
    except InvalidArgumentError as e:
        assert "multiple of 8 bytes only" in str(e)


def test_wrong_devices():
    q, k, v = tensors()
    with pytest.raises(ArgumentTypeError, match=r"^k: is on cpu, but q is on cuda:0; move"):
        flash_attention(q, k.cpu(), v)
    with pytest.raises(ArgumentTypeError, match=r"^out: is on cpu, expected cuda:0"):
        flash_attention(q, k, v, out=torch.empty(q.shape, dtype=q.dtype))


@pytest.mark.skipif(cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_gpu():
    q, k, v = (x.to("cuda:1") for x in tensors())
    want = flash_attention(*tensors()).cpu()
    for current in (0, 0, 0, 1, 0):
        with torch.cuda.device(current):
            out = flash_attention(q, k, v)
            assert torch.cuda.current_device() == current
        assert out.device == torch.device("cuda", 1) and torch.equal(out.cpu(), want)


def test_cupy():
    cupy = pytest.importorskip("cupy")
    q, k, v = tensors()
    want, want_lse = flash_attention(q, k, v, causal=True, return_lse=True)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        arrays = [cupy.asarray(x.cpu().numpy()) for x in (q, k, v)]
        out, lse = flash_attention(*arrays, causal=True, return_lse=True)
        stream.synchronize()
    assert isinstance(out, cupy.ndarray) and isinstance(lse, cupy.ndarray)
    assert np.array_equal(out.get(), want.cpu().numpy()) and np.array_equal(lse.get(), want_lse.cpu().numpy())
    assert flash_attention(*arrays, causal=True, out=out) is out
    empty, _ = flash_attention(arrays[0], arrays[1][:, :, :0], arrays[2][:, :, :0], return_lse=True)
    assert not empty.get().any()


@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
def test_jax(dtype):
    jax = pytest.importorskip("jax")
    case = dataclasses.replace(CASE, dtype=dtype)
    want, want_lse = flash_attention(*tensors(case), causal=True, return_lse=True)
    data = inputs(case)
    arrays = [jax.numpy.asarray(x).astype(dtype) for x in (data.q, data.k, data.v)]
    if next(iter(arrays[0].devices())).platform != "gpu":
        pytest.skip("this JAX has no GPU")
    out, lse = flash_attention(*arrays, causal=True, return_lse=True)
    assert isinstance(out, jax.Array) and out.dtype == arrays[0].dtype
    assert np.array_equal(np.asarray(out.astype("float32")), want.float().cpu().numpy())
    assert np.array_equal(np.asarray(lse), want_lse.cpu().numpy())
    again = flash_attention(*arrays, causal=True)
    assert again.unsafe_buffer_pointer() != out.unsafe_buffer_pointer()


def test_dlpack_needs_out():
    class OnlyDLPack:
        def __init__(self, tensor):
            self.tensor = tensor

        def __dlpack__(self, **kwargs):
            return self.tensor.__dlpack__(**kwargs)

        def __dlpack_device__(self):
            return self.tensor.__dlpack_device__()

    q, k, v = tensors()
    with pytest.raises(NotSupportedError, match=r"^out: can't make a float16 result on cuda:0.*pass out="):
        flash_attention(*map(OnlyDLPack, (q, k, v)))
    out = torch.full_like(q, math.nan)
    flash_attention(*map(OnlyDLPack, (q, k, v)), out=OnlyDLPack(out))
    torch.cuda.synchronize()
    assert torch.equal(out, flash_attention(q, k, v))


def test_every_installed_kernel_is_right():
    results = [r for r in selfcheck.check_kernels() if r.device != "cpu"]
    assert results and not [r for r in results if not r.ok]


def test_the_default_device():
    selector = BackendSelector()
    assert selector.device == Device("cuda", 0)
    assert selector.select_attention(2, 8, 1024, 64, dtype="float16").variant == "v2"
