"""Whatever JAX does to a program with a call in it: the same numbers, or an error that says why not."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tvm_flash import ArgumentTypeError, BackendSelector, LayoutWarning, NotSupportedError, flash_attention, reference

jax = pytest.importorskip("jax")
pytest.importorskip("jax_tvm_ffi")
pytestmark = pytest.mark.usefixtures("cpu_pack")

from jax import numpy as jnp  # noqa: E402


@pytest.fixture(scope="module")
def given():
    rng = np.random.default_rng(7)
    with jax.default_device(jax.devices("cpu")[0]):
        yield [jnp.asarray(rng.standard_normal((2, 4, 21, 32), np.float32)) for _ in range(3)]


@pytest.fixture(scope="module")
def exact(given):
    return reference.attention(*map(np.asarray, given), softmax_scale=32**-0.5, mask=reference.causal)[0]


def causal(q, k, v):
    return flash_attention(q, k, v, causal=True)


def one(q, k, v):
    """Of one batch entry, for what maps over them."""
    return flash_attention(q[None], k[None], v[None], causal=True)[0]


def of_one(x):
    return one(*x)


def in_a_loop(*given):
    return jax.lax.fori_loop(0, 1, lambda i, x: causal(*given), given[0])


def in_a_while(*given):
    return jax.lax.while_loop(lambda c: c[0] < 1, lambda c: (c[0] + 1, causal(*given)), (0, given[0]))[1]


def in_a_branch(*given):
    return jax.jit(lambda p: jax.lax.cond(p, lambda: causal(*given), lambda: given[0]))(True)


def without_jit(*given):
    with jax.disable_jit():
        return jax.jit(causal)(*given)


def exported(*given):
    from jax import export

    text = jax.jit(causal).lower(*given).as_text()
    allowed = [export.DisabledSafetyCheck.custom_call(name) for name in set(re.findall(r"@(tvm_flash[\w.]+)", text))]
    assert len(allowed) == 1
    platforms = [given[0].device.platform]  # and not that of a GPU, if there is one
    return export.export(jax.jit(causal), platforms=platforms, disabled_checks=allowed)(*given).call(*given)


def with_a_rule_of_the_users_own(*given):
    rule = jax.custom_vjp(causal)
    rule.defvjp(lambda *given: (causal(*given), given), lambda given, g: (g, *given[1:]))
    out, pull = jax.vjp(rule, *given)
    assert np.array_equal(pull(out)[0], out)
    return out


WAYS = {
    "jit": jax.jit(causal),
    "donated": lambda q, k, v: jax.jit(causal, donate_argnums=0)(q + 0, k, v),
    "lowered and compiled": lambda *given: jax.jit(causal).lower(*given).compile()(*given),
    "exported": exported,
    "disable_jit": without_jit,
    "checkpoint": jax.checkpoint(causal),
    "named_call": jax.named_call(causal),
    "vmap": jax.vmap(one),
    "vmap over the last dimension": lambda q, k, v: jax.vmap(one, in_axes=(3, 0, 0))(jnp.moveaxis(q, 0, 3), k, v),
    "vmap into another dimension": lambda *given: jnp.moveaxis(jax.vmap(one, out_axes=2)(*given), 2, 0),
    "vmap of vmap": jax.vmap(jax.vmap(lambda *x: flash_attention(*(y[None, None] for y in x), causal=True)[0, 0])),
    "custom_vmap, one after the other": jax.vmap(jax.custom_batching.sequential_vmap(one)),
    "scan": lambda *given: jax.lax.scan(lambda c, x: (c, of_one(x)), 0, given)[1],
    "map": lambda *given: jax.lax.map(of_one, given),
    "map of batches": lambda *given: jax.lax.map(of_one, given, batch_size=2),
    "fori_loop": in_a_loop,
    "while_loop": in_a_while,
    "cond": in_a_branch,
    "custom_vjp": with_a_rule_of_the_users_own,
    "gradients stopped": lambda *given: jax.jvp(lambda x: causal(*map(jax.lax.stop_gradient, x)), (given,), (given,))[
        0
    ],
    "pure_callback": lambda *given: jax.jit(
        lambda *x: jax.pure_callback(lambda *x: np.asarray(causal(*x)), jax.eval_shape(causal, *given), *x)
    )(*given),
    "a selected kernel": jax.jit(lambda *x: BackendSelector("cpu").select_attention(2, 4, 21, 32)(*x, causal=True)),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_same_numbers(way, given, exact):
    found = np.asarray(WAYS[way](*given))
    assert found.shape == exact.shape and abs(found - exact).max() < 2e-6


def test_shapes_without_numbers(given):
    spec = jax.ShapeDtypeStruct((2, 4, 21, 32), jnp.float32)
    out, lse = jax.eval_shape(lambda *x: flash_attention(*x, return_lse=True), spec, spec, spec)
    assert (out.shape, out.dtype, lse.shape) == (spec.shape, jnp.float32, (2, 4, 21))


#: All that asks for a derivative: of each array, in either mode, of any order.
DERIVATIVES = {
    "grad": lambda f, x: jax.grad(lambda x: f(x).sum())(x),
    "jit of grad": lambda f, x: jax.jit(jax.grad(lambda x: f(x).sum()))(x),
    "grad of checkpoint": lambda f, x: jax.grad(lambda x: jax.checkpoint(f)(x).sum())(x),
    "vmap of grad": lambda f, x: jax.vmap(jax.grad(lambda x: f(x).sum()))(x[None]),
    "jvp": lambda f, x: jax.jvp(f, (x,), (x,)),
    "vjp": jax.vjp,
    "linearize": jax.linearize,
    "jacfwd": lambda f, x: jax.jacfwd(f)(x),
    "jacrev": lambda f, x: jax.jacrev(f)(x),
    "hessian": lambda f, x: jax.hessian(lambda x: f(x).sum())(x),
}


@pytest.mark.parametrize("way", DERIVATIVES)
@pytest.mark.parametrize("which", range(4))
def test_derivatives_that_nothing_computes_are_refused(way, which, given, without_backward):
    arrays = [*given, jnp.full(4, 0.1)]

    def function(x):
        *qkv, slopes = (x if i == which else y for i, y in enumerate(arrays))
        return flash_attention(*qkv, alibi_slopes=slopes)

    # JAX itself refuses forward mode of what has a rule for reverse mode.
    with pytest.raises((NotSupportedError, TypeError), match=r"stop_gradient|forward-mode"):
        DERIVATIVES[way](function, arrays[which])


def plain(q, k, v, slopes):
    """Causal attention with slopes, as one would write it."""
    s = jnp.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
    i, j = jnp.arange(q.shape[2])[:, None], jnp.arange(k.shape[2])[None]
    s = jnp.where(j <= i, s - slopes[:, None, None] * jnp.abs(i - j), -jnp.inf)
    return jnp.einsum("bhij,bhjd->bhid", jax.nn.softmax(s), v), jax.nn.logsumexp(s, axis=-1)


def ours(q, k, v, slopes):
    return flash_attention(q, k, v, causal=True, alibi_slopes=slopes, return_lse=True)


def loss(function):
    def of(*arrays):
        out, lse = function(*arrays)
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum() + (lse**2).sum()

    return of


@pytest.mark.parametrize("compiled", (False, True))
def test_gradients(given, compiled, trains):
    arrays = [*given, jnp.asarray([0.1, 0.2, 0.4, 0.8])]
    found = jax.grad(loss(ours), (0, 1, 2, 3))
    found = (jax.jit(found) if compiled else found)(*arrays)
    for a, b in zip(found, jax.jit(jax.grad(loss(plain), (0, 1, 2, 3)))(*arrays), strict=True):
        assert a.shape == b.shape and np.abs(a - b).max() < 2e-5 * max(1, np.abs(b).max())


#: Ways to ask for a gradient by q.
GRADIENTS = {
    "grad of checkpoint": lambda f: jax.grad(jax.checkpoint(f)),
    "vmap of grad": lambda f: lambda q: jax.vmap(jax.grad(f))(q[None])[0],
    "grad of vmap": lambda f: jax.grad(lambda q: jax.vmap(f)(q[None]).sum()),
    "vjp": lambda f: lambda q: jax.vjp(f, q)[1](jnp.float32(1))[0],
    "jacrev": jax.jacrev,
    "scan": lambda f: jax.grad(lambda q: jax.lax.scan(lambda c, x: (c + f(x), 0), 0.0, q[None])[0]),
}


@pytest.mark.parametrize("way", GRADIENTS)
def test_ways_to_a_gradient(given, way, trains):
    q, *others = given

    def of(function):
        return lambda x: (function(x, *others, jnp.zeros(4))[0] ** 2).sum()

    want = jax.jit(jax.grad(of(plain)))(q)
    for ours_ in (of(ours), lambda x: (flash_attention(x, *others, causal=True) ** 2).sum()):
        found = GRADIENTS[way](ours_)(q)
        assert np.abs(found - want).max() < 2e-5 * np.abs(want).max()


def test_second_derivatives_are_refused(given, trains):
    with pytest.raises((NotSupportedError, TypeError), match=r"derivative of the gradients|forward-mode"):
        jax.hessian(lambda q: flash_attention(q, *given[1:]).sum())(given[0])


def test_the_gradient_of_what_stands_beside_it(given, exact):
    found = jax.grad(lambda x: (causal(*given) * x).sum())(given[0])
    assert abs(np.asarray(found) - exact).max() < 2e-6


@pytest.mark.parametrize("name", ("softmax_scale", "softcap", "causal", "window_size"))
def test_options_that_are_traced(name, given):
    value = {"causal": True, "window_size": (3, 0)}.get(name, 0.5)
    program = jax.jit(lambda x: flash_attention(*given, **{name: x}))
    with pytest.raises(ArgumentTypeError, match=rf"^{name}: is traced by JAX, .*static_argnames"):
        program(value)
    static = jax.jit(lambda x: flash_attention(*given, **{name: x}), static_argnums=0)
    assert np.allclose(static(value), flash_attention(*given, **{name: value}), atol=1e-6)


def test_symbolic_shapes_are_refused():
    from jax import export

    (b,) = export.symbolic_shape("b")
    specs = [jax.ShapeDtypeStruct((b, 4, 21, 32), jnp.float32)] * 3
    with pytest.raises(NotSupportedError, match=r"^q: has the shape \(b, 4, 21, 32\) with symbols"):
        export.export(jax.jit(causal))(*specs)


def test_a_program_says_what_a_plain_call_says(given):
    wide = jnp.zeros((1, 20, 4, 32))
    with pytest.warns(LayoutWarning) as caught:
        jax.jit(lambda x: flash_attention(x, x, x))(wide)
    assert caught[0].filename == __file__
    with pytest.raises(ArgumentTypeError, match=r"^return_lse: is 2"):
        jax.jit(lambda *x: flash_attention(*x, return_lse=2))(*given)


def test_several_devices(python):
    python(
        """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tvm_flash import ArgumentTypeError, flash_attention

given = [np.random.default_rng(i).standard_normal((2, 4, 20, 32), np.float32) for i in range(3)]
want = flash_attention(*given, causal=True)
mesh = Mesh(np.array(jax.devices()), ("b",))
assert mesh.size == 2

def causal(q, k, v):
    return flash_attention(q, k, v, causal=True)

def one(q, k, v):
    return causal(q[None], k[None], v[None])[0]

def sharded(spec):
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x in given]

batch, length = PartitionSpec("b"), PartitionSpec(None, None, "b")
mapped = jax.shard_map(causal, mesh=mesh, in_specs=batch, out_specs=batch)
for found in (
    jax.pmap(one)(*given),
    mapped(*given),
    jax.jit(mapped)(*sharded(batch)),
    jax.jit(causal)(*sharded(batch)),
    jax.jit(causal)(*sharded(length)),
    jax.jit(jax.vmap(one, spmd_axis_name="b"))(*sharded(batch)),
):
    assert abs(np.asarray(found) - want).max() < 2e-6
try:
    flash_attention(*sharded(batch))
except ArgumentTypeError as e:
    assert "spread over 2 devices" in str(e) and "jax.jit" in str(e)
else:
    raise SystemExit("taken")
""",
        JAX_PLATFORMS="cpu",
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )
