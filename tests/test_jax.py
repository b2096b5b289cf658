"""Attention inside JAX programs: under jit and vmap, on the CPU and on a GPU."""

from __future__ import annotations

import numpy as np
import pytest

from tvm_flash import (
    ArgumentTypeError,
    InvalidArgumentError,
    flash_attention,
    flash_attention_v2,
    padded_attention,
)
from tvm_flash.machine import cuda

jax = pytest.importorskip("jax")
pytest.importorskip("jax_tvm_ffi")
pytestmark = pytest.mark.usefixtures("cpu_pack")

from jax import numpy as jnp  # noqa: E402


def on_gpu():
    return cuda.device_count() > 0 and any(d.platform == "gpu" for d in jax.devices())


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "gpu" and not on_gpu():
        pytest.skip("there is no GPU that JAX sees")
    found = jax.devices(request.param)[0]
    with jax.default_device(found):
        yield found


def arrays(device, dtype=None):
    rng = np.random.default_rng(4)
    dtype = dtype or ("float32" if device.platform == "cpu" else "float16")
    shapes = ((2, 4, 33, 64), (2, 2, 70, 64), (2, 2, 70, 64))
    return [jax.device_put(jnp.asarray(rng.standard_normal(s, np.float32), dtype), device) for s in shapes]


def others(device):
    slopes = jnp.asarray([0.1, 0.2, 0.3, 0.4], jnp.float32)
    return [jax.device_put(x, device) for x in (slopes, jnp.asarray([[0, 50], [3, 70]], jnp.int32))]


def everything(q, k, v, slopes, key_range):
    out, lse = flash_attention(q, k, v, causal=True, return_lse=True)
    windowed = flash_attention(q, k, v, window_size=(9, 2), softcap=20.0, alibi_slopes=slopes)
    swapped = flash_attention_v2(*(x.swapaxes(1, 2) for x in (q, k, v)), softmax_scale=0.2).swapaxes(1, 2)
    other = flash_attention(q, k, v, variant="v2")
    return out, lse, windowed, swapped, other, padded_attention(q, k, v, key_range)


def test_jit_gives_the_same_bits(device):
    given = (*arrays(device), *others(device))
    want = everything(*given)
    program = jax.jit(everything)
    for _ in range(3):
        for a, b in zip(program(*given), want, strict=True):
            assert a.dtype == b.dtype and np.array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
def test_jit_in_16_bits(device, dtype):
    given = arrays(device, dtype)
    got, want = jax.jit(flash_attention)(*given), flash_attention(*given)
    assert got.dtype == dtype and np.array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


def test_jit_amid_other_computation(device):
    """The kernel reads what was computed before it, and what comes after reads the kernel's result."""
    q, k, v = arrays(device)

    @jax.jit
    def program(q, k, v):
        for _ in range(4):
            q = flash_attention(q * 2, k + 1, v) - 0.5
        return q.sum(), q

    want = q
    for _ in range(4):
        want = flash_attention(want * 2, k + 1, v) - 0.5
    total, got = program(q, k, v)
    assert np.allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), atol=2e-3)
    assert np.isfinite(float(total))


def test_loops_and_scans(device):
    q, k, v = arrays(device)
    _, got = jax.lax.scan(
        lambda carry, scale: (carry, flash_attention(carry * scale, k, v)), q, jnp.asarray([1, 2], q.dtype)
    )
    for i, scale in enumerate((1, 2)):
        want = flash_attention(q * jnp.asarray(scale, q.dtype), k, v)
        assert np.array_equal(np.asarray(got[i], np.float32), np.asarray(want, np.float32))


@pytest.mark.parametrize("compiled", (False, True))
def test_vmap(device, compiled):
    q, k, v = arrays(device)
    slopes, key_range = others(device)
    stack = jnp.stack([q, q * 2, q * 3])
    ranges = jnp.stack([key_range, key_range - 1, key_range + 1])
    for function, given in (
        (lambda q: flash_attention(q, k, v, causal=True), (stack,)),
        (lambda q: flash_attention(q, k, v, return_lse=True)[1], (stack,)),
        (lambda q: flash_attention(q, k, v, alibi_slopes=slopes), (stack,)),
        (lambda q, r: padded_attention(q, k, v, r), (stack, ranges)),
    ):
        mapped = jax.vmap(function)
        got = (jax.jit(mapped) if compiled else mapped)(*given)
        want = jnp.stack([function(*one) for one in zip(*given, strict=True)])
        assert np.array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


def test_no_keys(device):
    q, k, v = arrays(device)
    out, lse = jax.jit(lambda *a: flash_attention(*a, return_lse=True))(q, k[:, :, :0], v[:, :, :0])
    assert not np.asarray(out).any() and np.isneginf(np.asarray(lse)).all()


def test_what_is_refused_while_tracing(device):
    q, k, v = arrays(device)
    with pytest.raises(InvalidArgumentError, match=r"^v: has length 20, but k has 70"):
        jax.jit(flash_attention)(q, k, v[:, :, :20])
    with pytest.raises(ArgumentTypeError, match=r"^k: has dtype bfloat16"):
        jax.jit(flash_attention)(q, k.astype("bfloat16"), v)
    with pytest.raises(ArgumentTypeError, match=r"^out: arrays of jax can't be written"):
        jax.jit(lambda q: flash_attention(q, k, v, out=q))(q)
    assert flash_attention(q, k, v).shape == q.shape


def test_without_the_package_that_calls_kernels(python):
    python(
        """
import sys
sys.modules["jax_tvm_ffi"] = None
import jax
from tvm_flash import NotSupportedError, flash_attention
q = jax.numpy.ones((1, 2, 9, 64))
flash_attention(q, q, q)
try:
    jax.jit(flash_attention)(q, q, q)
except NotSupportedError as e:
    assert "pip install jax-tvm-ffi" in str(e)
else:
    raise SystemExit("it worked")
""",
        JAX_PLATFORMS="cpu",
    )
