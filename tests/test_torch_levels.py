"""Transforms of ``torch.func`` inside of each other: each level's derivative is right, or refused with a reason."""

import pytest

torch = pytest.importorskip("torch")

from torch.func import grad, jacrev, jvp, vjp, vmap  # noqa: E402

from tvm_flash import NotSupportedError, flash_attention, flash_attention_varlen  # noqa: E402
from tvm_flash.nn import scaled_dot_product_attention as ours  # noqa: E402

pytestmark = pytest.mark.usefixtures("cpu_pack")


def exact(q, k, v):
    """In float64, where torch has every derivative."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def tensors(batch=1, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(batch, 2, n, 8).to(dtype) for n in (5, 7, 7)]


def sequences(q, k, v):
    starts = [torch.tensor([0, n], dtype=torch.int32) for n in (q.shape[2], k.shape[2])]
    rows = (x[0].transpose(0, 1) for x in (q, k, v))
    return flash_attention_varlen(*rows, *starts).transpose(0, 1)[None]


FUNCTIONS = {"drop-in": ours, "flash_attention": flash_attention, "sequences": sequences}


def near(found, want):
    assert found.shape == want.shape
    error = (found.double() - want).abs().max().item()
    assert error <= 2e-6 * max(want.abs().max().item(), 1), error


@pytest.mark.parametrize("attend", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_gradient_of_a_gradient_is_refused(attend):
    def inner(*x):
        return grad(lambda *y: attend(*y).square().sum())(*x)

    with pytest.raises(NotSupportedError, match="a gradient of the gradients"):
        grad(lambda *x: inner(*x).square().sum())(*tensors())
    with pytest.raises(NotSupportedError, match="a gradient of the gradients"):
        jacrev(inner, argnums=1)(*tensors())
    with pytest.raises(NotSupportedError, match="forward-mode"):
        jvp(lambda q: inner(q, *tensors()[1:]), (tensors()[0],), (tensors()[0],))


@pytest.mark.parametrize("attend", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_value_inside_of_another_gradient_has_its_gradient(attend):
    """The inner transform only needs the value's own derivative, the outer one that of the value."""

    def outer(attend):
        def loss(q, k, v):
            value, _ = vjp(lambda x: attend(x, k, v), q)
            return value.square().sum()

        return grad(loss, argnums=(0, 1, 2))

    wanted = outer(exact)(*tensors(dtype=torch.float64))
    for found, want in zip(outer(attend)(*tensors()), wanted, strict=True):
        near(found, want)


@pytest.mark.parametrize("batch", (1, 2))
@pytest.mark.parametrize("attend", (ours, flash_attention))
def test_a_jacobian(attend, batch):
    """One log-sum-exp, and one of each tensor, stands for all rows of the Jacobian."""
    wanted = jacrev(exact, argnums=(0, 1, 2))(*tensors(batch, torch.float64))
    for found, want in zip(jacrev(attend, argnums=(0, 1, 2))(*tensors(batch)), wanted, strict=True):
        near(found, want)


def test_a_jacobian_by_slopes_and_sinks():
    q, k, v = tensors()
    given = torch.rand(2, 2)

    def attend(x):
        return flash_attention(q, k, v, alibi_slopes=x[0], sinks=x[1])

    found = jacrev(attend)(given)
    for i in range(2):
        for h in range(2):
            step = torch.zeros(2, 2)
            step[i, h] = 1e-2
            want = (attend(given + step).double() - attend(given - step).double()) / 2e-2
            assert (found[..., i, h].double() - want).abs().max().item() < 1e-3


def test_gradients_of_each_sample():
    q, k, v = tensors(3)
    found = vmap(grad(lambda x, y, z: ours(x, y, z).square().sum()))(q, k, v)
    want = vmap(grad(lambda x, y, z: exact(x, y, z).square().sum()))(q.double(), k.double(), v.double())
    near(found, want)


@pytest.mark.parametrize("batch", (1, 2))
@pytest.mark.parametrize("attend", (ours, flash_attention))
def test_gradients_that_autograd_maps(attend, batch):
    """``is_grads_batched`` maps with torch's older vmap, as ``jacobian(vectorize=True)`` does."""
    inputs = [x.requires_grad_() for x in tensors(batch)]
    slopes = torch.rand(2, requires_grad=True)
    out = attend(*inputs)
    given = torch.stack((torch.ones_like(out), torch.randn(out.shape), torch.zeros_like(out)))
    found = torch.autograd.grad(out, inputs, given, is_grads_batched=True)
    for i, dout in enumerate(given):
        for x, want in zip(found, torch.autograd.grad(attend(*inputs), inputs, dout), strict=True):
            assert torch.equal(x[i], want)
    q, k, v = (x.detach() for x in inputs)
    jacobian = torch.autograd.functional.jacobian(lambda x: attend(x, k, v), q, vectorize=True)
    near(jacobian, jacrev(exact)(q.double(), k.double(), v.double()))
    out = flash_attention(q, k, v, alibi_slopes=slopes)
    (found,) = torch.autograd.grad(out, slopes, given, is_grads_batched=True)
    (want,) = torch.autograd.grad(flash_attention(q, k, v, alibi_slopes=slopes), slopes, given[1])
    torch.testing.assert_close(found[1], want)
