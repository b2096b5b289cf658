"""What tests of the drop-ins begin with: tensors, and a comparison with torch's function in float64."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch.nn.functional import scaled_dot_product_attention as torch_sdpa  # noqa: E402

from tvm_flash.nn import scaled_dot_product_attention as ours  # noqa: E402
from tvm_flash.nn import sdpa  # noqa: E402


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    sdpa._warned.clear()
    torch.manual_seed(0)


def tensors(lengths=(33, 70), head_dims=(64, 64), heads=(4, 4), batch=(2,), device="cpu"):
    dtype = torch.float32 if device == "cpu" else torch.float16
    (seqlen_q, seqlen_kv), (head_dim, head_dim_v) = lengths, head_dims
    shapes = ((heads[0], seqlen_q, head_dim), (heads[1], seqlen_kv, head_dim), (heads[1], seqlen_kv, head_dim_v))
    return [torch.randn(*batch, *s).to(device, dtype) for s in shapes]


def agree(q, k, v, **options):
    """Ours is as near to float64 as torch's in the same dtype: twice its error, plus one rounding."""
    out, same = ours(q, k, v, **options), torch_sdpa(q, k, v, **options)
    given = {n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in options.items()}
    want = torch_sdpa(q.double(), k.double(), v.double(), **given)
    assert out.shape == want.shape and out.dtype == q.dtype
    rounding = torch.finfo(q.dtype).eps * want.abs().max().item()
    assert (out - want).abs().max().item() <= 2 * (same - want).abs().max().item() + rounding
