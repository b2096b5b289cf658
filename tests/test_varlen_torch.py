"""``flash_attention_varlen`` in PyTorch and JAX: gradients, compiled programs, and what is refused."""

from __future__ import annotations

import pytest
import torch

from tests import ragged_cases
from tests.ragged_cases import RaggedCase
from tests.test_varlen import options_of, tensors
from tvm_flash import ArgumentTypeError, NotSupportedError, flash_attention_varlen
from tvm_flash.tracing import torch_ragged  # noqa: F401  registers the operators

pytestmark = pytest.mark.usefixtures("trains")

CASES = (
    RaggedCase((33, 0, 5, 70, 1), 4, 64, (40, 9, 5, 60, 130), kv_heads=2, mask="causal", after=(6, 3)),
    RaggedCase((20, 300, 7), 2, 64, kv_heads=1, score="softcap_alibi", params=(("softcap", 2.0),)),
)


def leaves(case):
    """q, k, v that require gradients, and the starts; zeros after the last sequence."""
    q, k, v, *starts = tensors(case)
    return [x.nan_to_num().requires_grad_() for x in (q, k, v)], starts


@pytest.mark.parametrize("compiled", (False, True))
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.mask)
def test_gradients_against_float64(case, compiled):
    data, given = ragged_cases.inputs(case), ragged_cases.outer(case, with_dlse=True)
    (q, k, v), starts = leaves(case)
    options = options_of(case, data)
    learnt = [options["alibi_slopes"].requires_grad_()] if "alibi_slopes" in options else []

    def attend(q, k, v, *starts):
        return flash_attention_varlen(q, k, v, *starts, return_lse=True, **options)

    attend = torch.compile(attend, fullgraph=True, backend="aot_eager") if compiled else attend
    out, lse = attend(q, k, v, *starts)
    ragged_cases.check(case, data, out.detach().double().numpy(), lse.detach().double().numpy())
    seen = lse.isfinite()
    dout, dlse = (torch.from_numpy(x).nan_to_num() for x in (given.dout, given.dlse))
    loss = (out * dout).sum() + lse.where(seen, torch.zeros(())).mul(dlse).sum()
    found = torch.autograd.grad(loss, [q, k, v, *learnt])
    names = ["dq", "dk", "dv", *(["d_alibi_slopes"] if learnt else [])]
    got = {name: x.double().numpy() for name, x in zip(names, found, strict=True)}
    ragged_cases.check_backward(case, data, given, got)


def test_slopes_for_all_sequences_get_the_sum():
    case = CASES[1]
    (q, k, v), starts = leaves(case)
    for shape in ((2,), (1, 2), (3, 2)):
        slopes = torch.full(shape, 0.25, requires_grad=True)
        flash_attention_varlen(q, k, v, *starts, alibi_slopes=slopes).square().sum().backward()
        found = slopes.grad if len(shape) == 1 else slopes.grad.sum(0)
        assert slopes.grad.shape == shape
        if shape == (2,):
            want = found
        assert torch.allclose(found, want, rtol=1e-5)


def test_the_same_bits_on_every_run():
    case = CASES[1]
    (q, k, v), starts = leaves(case)
    dout = torch.randn(q.shape)

    def once():
        return torch.autograd.grad(flash_attention_varlen(q, k, v, *starts, causal=True), (q, k, v), dout)

    first = once()
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 7):
            torch.set_num_threads(n)
            assert all(map(torch.equal, once(), first))
    finally:
        torch.set_num_threads(threads)


def test_operators_pass_opcheck():
    case = CASES[0]
    (q, k, v), starts = leaves(case)
    slopes = torch.rand(case.batch, case.heads, requires_grad=True)
    ops = torch.ops.tvm_flash
    options = {"causal": True, "window_left": 40, "window_right": -1, "softcap": 3.0}
    torch.library.opcheck(ops.attention_varlen.default, (q, k, v, *starts, slopes), {**options, "return_lse": True})
    q, k, v, slopes = (x.detach() for x in (q, k, v, slopes))
    out, lse = ops.attention_varlen(q, k, v, *starts, slopes, **options, return_lse=True)
    back = (torch.randn_like(out), q, k, v, out, lse, None, *starts, slopes)
    torch.library.opcheck(ops.attention_varlen_backward.default, back, {**options, "gradients": ["alibi_slopes"]})


def test_programs_of_any_size():
    (q, k, v), _ = leaves(CASES[0])
    q, k, v = (x.detach() for x in (q, k, v))
    program = torch.compile(flash_attention_varlen, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ((3, 4), (50, 0, 20), (1, 1, 1, 1)):
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()
        rows = slice(0, int(ends[-1]) + 2)
        given = (q[rows], k[rows], v[rows], ends, ends)
        assert torch.equal(program(*given, causal=True), flash_attention_varlen(*given, causal=True))
    exported = torch.export.export(Module(), given)
    assert torch.equal(exported.module()(*given), flash_attention_varlen(*given))


class Module(torch.nn.Module):
    def forward(self, *arguments):
        return flash_attention_varlen(*arguments)


def test_shapes_without_memory():
    (q, k, v), starts = leaves(CASES[0])
    out, lse = flash_attention_varlen(*(x.to("meta") for x in (q, k, v, *starts)), return_lse=True)
    assert (out.shape, out.device.type, lse.shape, lse.dtype) == (q.shape, "meta", (4, q.shape[0]), torch.float32)


def test_what_is_refused():
    (q, k, v), starts = leaves(CASES[0])
    out = flash_attention_varlen(q, k, v, *starts)
    with pytest.raises(NotSupportedError, match=r"^dout: is mapped \(is_grads_batched=True.*one gradient after"):
        torch.autograd.grad(out, q, torch.stack([out.detach()] * 2), is_grads_batched=True)
    with pytest.raises(NotSupportedError, match=r"mapped by torch.vmap.*give all of them in one call"):
        torch.vmap(lambda x: flash_attention_varlen(x, k.detach(), v.detach(), *starts))(torch.stack([q.detach()] * 2))
    with pytest.raises(NotSupportedError, match=r"a gradient of the gradients"):
        grads = torch.autograd.grad(flash_attention_varlen(q, k, v, *starts).sum(), q, create_graph=True)
        grads[0].sum().backward()
    program = torch.compile(flash_attention_varlen, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"cu_seqlens_q: has dtype int64, expected int32"):
        program(q, k, v, starts[0].long(), starts[1])
    with pytest.raises(ArgumentTypeError, match=r"^cu_seqlens_q: has dtype int64"):
        flash_attention_varlen(q, k, v, starts[0].long(), starts[1])
    out = torch.empty_like(q)
    assert flash_attention_varlen(q, k, v, *starts, out=out.detach()) is not None


def test_jax():
    jax = pytest.importorskip("jax")
    pytest.importorskip("jax_tvm_ffi")
    case = CASES[0]
    (q, k, v), starts = leaves(case)
    out = flash_attention_varlen(q, k, v, *starts, causal=True)
    want = torch.autograd.grad(out.square().sum(), (q, k, v))
    arrays = [jax.numpy.asarray(x.detach().numpy()) for x in (q, k, v, *starts)]

    @jax.jit
    def loss(q, k, v, *starts):
        return (flash_attention_varlen(q, k, v, *starts, causal=True) ** 2).sum()

    found = jax.grad(loss, argnums=(0, 1, 2))(*arrays)
    for a, b in zip(found, want, strict=True):
        assert abs(torch.from_numpy(jax.numpy.array(a).__array__().copy()) - b).max() <= 1e-4
    with pytest.raises(NotSupportedError, match=r"mapped by jax.vmap"):
        jax.vmap(lambda x: flash_attention_varlen(x, *arrays[1:]))(jax.numpy.stack([arrays[0]] * 2))
