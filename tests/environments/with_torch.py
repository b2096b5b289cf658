"""PyTorch: plain calls, the drop-in, and whatever this version has that watches or compiles a program."""

import json
import warnings

import torch

from tvm_flash import flash_attention, flash_attention_v2, padded_attention
from tvm_flash.call import fast
from tvm_flash.frameworks import torch_watch

warnings.simplefilter("ignore")
torch.manual_seed(0)
q, k, v = (torch.randn(2, 4, 33, 64) for _ in range(3))
hidden = torch.ones(33, 33, dtype=torch.bool).triu(1)


def exact(q, k, v, hidden):
    scores = (q.double() @ k.double().transpose(-1, -2) / 8).masked_fill(hidden, float("-inf"))
    return scores.softmax(-1) @ v.double()


def error(found, wanted):
    return (found.double() - wanted).abs().max().item()


want = exact(q, k, v, hidden)
errors = []
for _ in range(3):
    errors.append(error(flash_attention(q, k, v, causal=True), want))
    errors.append(error(flash_attention_v2(*(x.transpose(1, 2) for x in (q, k, v)), causal=True).transpose(1, 2), want))
lengths = torch.tensor([[0, 33], [2, 20]], dtype=torch.int32)
keys = torch.arange(33)
padding = ((keys < lengths[:, :1]) | (keys >= lengths[:, 1:]))[:, None, None]
errors.append(error(padded_attention(q, k, v, lengths), exact(q, k, v, padding)))
for dtype, bound in ((torch.float16, 4e-3), (torch.bfloat16, 3e-2)):
    assert error(flash_attention(*(x.to(dtype) for x in (q, k, v)), causal=True), want) < bound
found = {"fast path": fast.is_loaded() and fast._forget() > 0}

version = tuple(int(x) for x in torch.__version__.split(".")[:2])
if version >= (2, 0):
    from tvm_flash.nn import scaled_dot_product_attention

    errors.append(error(scaled_dot_product_attention(q, k, v, is_causal=True), want))
if version >= (2, 4):
    found["told who watches"] = torch_watch.fields() is not None
    flash_attention(q, k, v)
    with torch.profiler.profile() as profile:
        flash_attention(q, k, v)
    assert "tvm_flash::attention" in {e.key for e in profile.key_averages()}
    program = torch.compile(lambda q: flash_attention(q * 1, k, v, causal=True), fullgraph=True, backend="aot_eager")
    errors.append(error(program(q), want))
    drop_in = lambda q: scaled_dot_product_attention(q * 1, k, v, is_causal=True)  # noqa: E731
    errors.append(error(torch.compile(drop_in, fullgraph=True, backend="aot_eager")(q), want))
    errors.append(error(torch.jit.trace(lambda q: flash_attention(q, k, v, causal=True), q)(q), want))
    errors.append(error(torch.vmap(lambda q: flash_attention(q, k, v, causal=True))(q[None])[0], want))
    found["compiled, traced, mapped, profiled"] = True
print(json.dumps({"error": max(errors), **found}))
