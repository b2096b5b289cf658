"""Tensors whose elements lie more than 2**31 elements apart have the bits of contiguous ones."""

from __future__ import annotations

import math

import pytest
import torch

from tests.test_torch_program import DEVICES
from tvm_flash import flash_attention, flash_attention_v2, flash_attention_varlen, flash_attention_with_kvcache

pytestmark = pytest.mark.usefixtures("trains")

#: From the first element of a tensor to its last, about: more than an int32 holds.
EXTENT = 2_300_000_000


class Memory:
    """Room for tensors that have one large stride; a CPU has no memory behind what nobody touches."""

    def __init__(self, device: str):
        self.room = torch.empty(EXTENT + 2**22, dtype=torch.bfloat16, device=device)
        self.used = 0

    def far(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """A copy in which the steps along ``dim`` are so large that all together are ``EXTENT``; each fits an int32."""
        within = [n for i, n in enumerate(x.shape) if i != dim]
        strides = [math.prod(within[i + 1 :]) for i in range(len(within))]
        strides.insert(dim, EXTENT // (x.shape[dim] - 1) // 64 * 64)
        found = self.room.as_strided(x.shape, strides, self.used)
        self.used += math.prod(within)
        return found.copy_(x)


@pytest.fixture(params=DEVICES)
def memory(request):
    return Memory(request.param)


def tensors(memory: Memory, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).bfloat16().to(memory.room.device) for shape in shapes]


def bits_agree(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dim", (0, 1, 2))
@pytest.mark.parametrize("attend", (flash_attention, flash_attention_v2))
def test_batches_of_one_length(attend, dim, memory):
    given = tensors(memory, *((3, 4, 40, 64) if attend is flash_attention else (3, 40, 4, 64) for _ in range(3)))

    def results(q, k, v, out):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        o = attend(*leaves, causal=True)
        return attend(q, k, v, out=out), o, *torch.autograd.grad(o, leaves, torch.ones_like(o))

    far = [memory.far(x, dim) for x in (*given, torch.zeros_like(given[0]))]
    bits_agree(results(*far), results(*given, torch.zeros_like(given[0])))


@pytest.mark.parametrize("dim", (0, 1))
def test_sequences_of_any_length(dim, memory):
    given = tensors(memory, *[(71, 4, 64)] * 3)
    starts = torch.tensor([0, 30, 30, 71], dtype=torch.int32, device=memory.room.device)

    def results(*tensors):
        leaves = [x.detach().requires_grad_() for x in tensors]
        o = flash_attention_varlen(*leaves, starts, starts, causal=True)
        return o, *torch.autograd.grad(o, leaves, torch.ones_like(o))

    bits_agree(results(*(memory.far(x, dim) for x in given)), results(*given))


@pytest.mark.parametrize("rows", (1, 9))
@pytest.mark.parametrize("dim", (0, 1, 2))
def test_caches(dim, rows, memory):
    q, new_k, new_v, k, v = tensors(memory, (2, rows, 6, 64), *[(2, rows, 3, 64)] * 2, *[(6, 16, 3, 64)] * 2)
    where = {"page_table": [[3, 1, 4], [0, 2, 5]], "cache_seqlens": [37, 17]}
    where = {name: torch.tensor(x, dtype=torch.int32, device=memory.room.device) for name, x in where.items()}

    def results(k, v):
        return flash_attention_with_kvcache(q, k, v, new_k, new_v, causal=True, **where), k, v

    bits_agree(results(memory.far(k, dim), memory.far(v, dim)), results(k.clone(), v.clone()))
