"""The drop-in for ``jax.nn.dot_product_attention`` beside the original."""

import warnings

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("jax_tvm_ffi")
pytestmark = pytest.mark.usefixtures("cpu_pack", "on_the_processor")

from jax import numpy as jnp  # noqa: E402

from tvm_flash import flash_attention_v2  # noqa: E402
from tvm_flash.errors import FallbackWarning, NotSupportedError  # noqa: E402
from tvm_flash.integrations import jax as integration  # noqa: E402
from tvm_flash.integrations.jax import dot_product_attention  # noqa: E402
from tvm_flash.tracing import jax_ops  # noqa: E402


@pytest.fixture
def on_the_processor():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def arrays(seqlen_q=33, seqlen_kv=33, kv_heads=4, head_dim=64, dtype="float32", batch=(2,)):
    rng = np.random.default_rng(1)
    shapes = ((*batch, seqlen_q, 4, head_dim), *((*batch, seqlen_kv, kv_heads, head_dim),) * 2)
    return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]


def lengths(*numbers):
    return jnp.asarray(numbers, jnp.int32)


CALLS = [
    ({}, {}),
    ({}, {"is_causal": True, "scale": 0.3}),
    ({"kv_heads": 2, "seqlen_kv": 50}, {"is_causal": True}),
    ({"kv_heads": 1, "seqlen_q": 50}, {"is_causal": True, "return_residual": True}),
    ({"head_dim": 20}, {"return_residual": True}),
    ({"batch": ()}, {"is_causal": True}),
    ({}, {"local_window_size": 5}),
    ({"seqlen_kv": 40}, {"local_window_size": (7, 2), "is_causal": True}),
    ({"seqlen_kv": 40}, {"key_value_seq_lengths": lengths(40, 11)}),
    ({"seqlen_kv": 40}, {"key_value_seq_lengths": [40, 11], "query_seq_lengths": np.int32([20, 33])}),
    ({}, {"key_value_seq_lengths": lengths(33, 11), "query_seq_lengths": lengths(20, 11), "is_causal": True}),
    ({"dtype": "bfloat16"}, {"is_causal": True}),
    ({"dtype": "float16"}, {"key_value_seq_lengths": lengths(33, 11)}),
]


@pytest.mark.parametrize(("sizes", "options", "compiled"), [(*x, i % 3 > 0) for i, x in enumerate(CALLS)], ids=str)
def test_the_same_results_and_gradients(sizes, options, compiled):
    given = arrays(**sizes)
    dtype = given[0].dtype
    weights = jnp.cos(jnp.arange(given[0].size)).reshape(given[0].shape)

    def results(attend, given, compiled):
        def loss(*tensors):
            out = attend(*tensors, **options)
            out, lse = out if options.get("return_residual") else (out, None)
            return (out.astype(jnp.float32) * weights).sum(), (out, lse)

        step = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
        ((_, (out, lse)), gradients) = (jax.jit(step) if compiled else step)(*given)
        return [x for x in (out, *gradients, lse) if x is not None]

    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        found = results(dot_product_attention, given, compiled)
    bound = {"float32": 2e-5, "bfloat16": 6e-2, "float16": 8e-3}[str(dtype)]
    wide = [x.astype(jnp.float32) for x in given]  # CPUs have no other in jit
    wanted = results(jax.nn.dot_product_attention, wide, True)
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape and a.dtype == dtype
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (a, b)), atol=bound, rtol=bound)


def test_rows_that_see_nothing_are_zeros():
    q, k, v = arrays()
    out, lse = dot_product_attention(q, k, v, key_value_seq_lengths=lengths(0, 33), return_residual=True)
    assert not out[0].any() and (lse[0] == -jnp.inf).all() and out[1].any()


def test_mapped():
    q, k, v = (x[:, None] for x in arrays())
    found = jax.vmap(lambda *x: dot_product_attention(*x, is_causal=True))(q, k, v)
    np.testing.assert_allclose(found[:, 0], jax.nn.dot_product_attention(*arrays(), is_causal=True), atol=2e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bias": jnp.ones((1, 1, 33, 33))}, "a bias or a mask"),
        ({"mask": jnp.ones((1, 1, 1, 33), bool)}, "a bias or a mask"),
        ({"scale": -1.0}, "scale is -1.0"),
        ({"scale": 1e-40}, "scale is 1e-40"),
        ({"local_window_size": (-1, 5)}, "sides of 0 and more"),
        ({"implementation": "xla"}, "'xla' is asked for"),
    ],
)
def test_jax_computes_the_rest(options, reason):
    integration._warned.clear()
    given = arrays()
    with pytest.warns(FallbackWarning, match=reason):
        found = dot_product_attention(*given, **options)
    np.testing.assert_array_equal(found, jax.nn.dot_product_attention(*given, **options))


def test_what_no_kernel_takes():
    integration._warned.clear()
    given = arrays(head_dim=320)
    with pytest.warns(FallbackWarning):
        found = dot_product_attention(*given)
    np.testing.assert_array_equal(found, jax.nn.dot_product_attention(*given))


def test_errors_are_jaxs():
    q, k, v = arrays()
    integration._warned.clear()
    with pytest.warns(FallbackWarning), pytest.raises(ValueError, match="value"):
        dot_product_attention(q, k, v[:, :20])
    with pytest.warns(FallbackWarning), pytest.raises(ValueError, match="value"):
        dot_product_attention(q, k, v[..., :32])
    integration._warned.clear()
    for wrong in (lengths(33), jnp.ones(2)):
        with pytest.warns(FallbackWarning, match="lengths"), pytest.raises(ValueError, match="query_seq_lengths"):
            integration._warned.clear()
            dot_product_attention(q, k, v, query_seq_lengths=wrong)


@pytest.mark.filterwarnings("error::tvm_flash.errors.FallbackWarning")
def test_without_a_batch_lengths_are_those_of_one_entry():
    """They were left to JAX, and one without a dimension, which JAX refuses, was an IndexError or taken."""
    q, k, v = arrays(batch=())
    given = {"query_seq_lengths": lengths(20), "key_value_seq_lengths": lengths(11)}
    got = dot_product_attention(q, k, v, **given)
    np.testing.assert_allclose(got, jax.nn.dot_product_attention(q, k, v, **given), atol=1e-5)
    for name in given:
        integration._warned.clear()
        with pytest.warns(FallbackWarning, match="lengths"), pytest.raises(ValueError, match=name):
            dot_product_attention(q, k, v, **{name: jnp.int32(11)})


def test_a_platform_without_kernels_is_left_to_jax(monkeypatch):
    """As of float32 on a GPU, where the program would have had the processor's kernel."""
    monkeypatch.setattr(jax_ops.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(jax_ops, "_default_platform", lambda: "cuda")
    q, k, v = arrays()
    with pytest.raises(NotSupportedError, match=r"traced for cuda.*jax.default_device\(jax.devices\('cpu'\)\[0\]\)"):
        jax.jit(flash_attention_v2)(q, k, v)
    monkeypatch.setattr(integration, "_warned", set())
    with pytest.warns(FallbackWarning, match="are traced for cuda"):
        found = jax.jit(dot_product_attention)(q, k, v)
    assert jnp.allclose(found, jax.nn.dot_product_attention(q, k, v), atol=1e-5)
