"""Tensors of each framework go in, and results of the same framework come out."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tvm_flash import ArgumentTypeError, flash_attention, flash_attention_v2, numerics, reference

ml_dtypes = pytest.importorskip("ml_dtypes")
pytestmark = pytest.mark.usefixtures("cpu_pack")

WANT_WITHIN = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2}


def arrays(dtype="float32", lengths=(33, 70)):
    rng = np.random.default_rng(3)
    seqlen_q, seqlen_kv = lengths
    shapes = ((2, 4, seqlen_q, 64), (2, 2, seqlen_kv, 64), (2, 2, seqlen_kv, 64))
    dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    return [rng.standard_normal(s, np.float32).astype(dtype) for s in shapes]


def expected(q, k, v):
    return reference.attention(q, k, v, softmax_scale=0.125, mask=reference.causal)


class OnlyDLPack:
    """An array of a framework that nobody has heard of."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **kwargs):
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@pytest.mark.parametrize("dtype", WANT_WITHIN)
def test_numpy(dtype):
    q, k, v = arrays(dtype)
    out, lse = flash_attention(q, k, v, causal=True, return_lse=True)
    assert type(out) is np.ndarray and out.dtype == q.dtype and lse.dtype == np.float32
    want, want_lse = expected(q, k, v)
    assert numerics.largest_error(out.astype(np.float64), want) <= WANT_WITHIN[dtype]
    assert numerics.largest_error(lse, want_lse) <= numerics.lse_bound(want_lse)


def test_numpy_arrays_that_others_cannot_export():
    q, k, v = arrays()
    want = flash_attention(q, k, v)
    for x in (q, k, v):
        x.flags.writeable = False
    assert np.array_equal(flash_attention(q, k, v), want)


@pytest.mark.parametrize("axis", (0, 1, 2))
def test_numpy_negative_strides(axis):
    q, k, v = arrays()
    backwards = [np.ascontiguousarray(np.flip(x, axis)) for x in (q, k, v)]
    assert np.array_equal(flash_attention(*(np.flip(x, axis) for x in backwards)), flash_attention(q, k, v))


def test_numpy_memmap(tmp_path):
    q, k, v = arrays()
    np.save(tmp_path / "q.npy", q)
    mapped = np.load(tmp_path / "q.npy", mmap_mode="r")
    assert np.array_equal(flash_attention(mapped, k, v), flash_attention(q, k, v))


def test_numpy_results_are_aligned():
    for n in range(1, 9):
        out = flash_attention(*arrays(lengths=(n, 5)))
        assert out.ctypes.data % 64 == 0 and out.flags.c_contiguous and out.flags.writeable


@pytest.mark.parametrize(
    "make",
    [
        lambda x: np.ma.masked_array(x, np.zeros(x.shape, bool)),
        lambda x: x.astype(">f4"),
        lambda x: np.ndarray(
            x.shape, "f4", np.zeros(x.size * 8, np.uint8), 0, (8 * 64 * 33 * 4, 8 * 64 * 33, 8 * 64 + 1, 4)
        ),
    ],
    ids=["masked", "byte order", "strides within an element"],
)
def test_numpy_arrays_with_another_meaning(make):
    q, k, v = arrays()
    with pytest.raises(ArgumentTypeError, match=r"^q: .*numpy\.|^q: .*astype"):
        flash_attention(make(q), k, v)


@pytest.mark.parametrize("dtype", WANT_WITHIN)
def test_torch_gives_the_same_bits_as_numpy(dtype):
    torch = pytest.importorskip("torch")
    q, k, v = arrays(dtype)
    as_torch = [torch.from_numpy(x.astype(np.float32)).to(getattr(torch, dtype)) for x in (q, k, v)]
    out = flash_attention(*as_torch)
    assert isinstance(out, torch.Tensor)
    assert np.array_equal(out.float().numpy(), flash_attention(q, k, v).astype(np.float32))


def test_torch_parameters_and_inference_mode():
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(x) for x in arrays())
    want = flash_attention(q, k, v)
    with torch.inference_mode():
        assert torch.equal(flash_attention(q.clone(), k, v), want)
    with torch.no_grad():
        parameter = torch.nn.Parameter(q)
        assert torch.equal(flash_attention(parameter, k, v), want)


def test_dlpack():
    q, k, v = arrays()
    out, lse = flash_attention(*map(OnlyDLPack, (q, k, v)), causal=True, return_lse=True)
    want, want_lse = flash_attention(q, k, v, causal=True, return_lse=True)
    assert np.array_equal(np.from_dlpack(out), want) and np.array_equal(np.from_dlpack(lse), want_lse)
    given = np.full_like(q, np.nan)
    box = OnlyDLPack(given)
    assert flash_attention(*map(OnlyDLPack, (q, k, v)), causal=True, out=box) is box
    assert np.array_equal(given, want)
    empty, _ = flash_attention(*map(OnlyDLPack, (q, k[:, :, :0], v[:, :, :0])), return_lse=True)
    assert not np.from_dlpack(empty).any()


def test_dlpack_results_come_back_through_the_callers_from_dlpack():
    import tvm_ffi

    q, k, v = arrays()
    out = flash_attention(*map(tvm_ffi.from_dlpack, (q, k, v)))
    assert isinstance(out, tvm_ffi.Tensor)
    assert np.array_equal(np.from_dlpack(out), flash_attention(q, k, v))


@pytest.mark.parametrize("dtype", WANT_WITHIN)
def test_jax(dtype):
    jax = pytest.importorskip("jax")
    q, k, v = arrays(dtype)
    on_cpu = [jax.device_put(x, jax.devices("cpu")[0]) for x in (q, k, v)]
    out, lse = flash_attention(*on_cpu, causal=True, return_lse=True)
    want, want_lse = flash_attention(q, k, v, causal=True, return_lse=True)
    assert isinstance(out, jax.Array) and isinstance(lse, jax.Array) and out.dtype == on_cpu[0].dtype
    assert np.array_equal(np.asarray(out), want) and np.array_equal(np.asarray(lse), want_lse)
    with pytest.raises(ArgumentTypeError, match=r"^out: arrays of jax"):
        flash_attention(*on_cpu, out=on_cpu[0])


def test_both_layouts_of_a_framework():
    q, k, v = arrays()
    out = flash_attention(q, k, v, causal=True)
    swapped = flash_attention_v2(*(x.swapaxes(1, 2) for x in (q, k, v)), causal=True, variant="v1")
    assert swapped.flags.c_contiguous and np.array_equal(swapped.swapaxes(1, 2), out)


def test_mixed_frameworks_are_refused():
    torch = pytest.importorskip("torch")
    q, k, v = arrays()
    with pytest.raises(ArgumentTypeError, match=r"^k: is a torch tensor, but q is one of numpy; convert"):
        flash_attention(q, torch.from_numpy(k), v)
    with pytest.raises(ArgumentTypeError, match=r"^v: is a numpy tensor, but q is one of torch; convert"):
        flash_attention(torch.from_numpy(q), torch.from_numpy(k), v)


def test_a_torch_whose_tensors_know_nothing_of_dispatch(monkeypatch):
    """1.11 is one: a type that stands for other tensors is one that says so itself."""
    pytest.importorskip("torch")
    from tvm_flash.frameworks import torch as adapter

    usual = type("Tensor", (), {})
    monkeypatch.setattr(adapter, "torch", SimpleNamespace(Tensor=usual))
    assert not adapter.stands_for_others(usual)
    assert adapter.stands_for_others(type("Wrapper", (usual,), {"__torch_dispatch__": classmethod(len)}))


def test_this_file_needs_no_framework_to_be_imported_by_the_package():
    package = Path(sys.modules["tvm_flash"].__file__).parent
    for path in package.rglob("*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        top = [x for x in lines if x.startswith(("import ", "from "))]
        own = path.relative_to(package).parts[0] in ("nn", "integrations", "tracing", "distributed")
        for name in ("tvm", "schedules", "ml_dtypes", "cupy") if own else ("torch", "jax", "cupy", "tvm", "schedules"):
            assert not any(x.split()[1].split(".")[0] == name for x in top), path
