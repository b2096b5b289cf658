"""Time attention over sequences that GPUs share, beside one of them and beside PyTorch's context_parallel.

torchrun --nproc-per-node 2 scripts/bench_context_parallel.py --lengths 65536 262144 --output times.jsonl

Every rank must have the same time to spend: what doesn't fit into ``--seconds`` is left out.  Rates count the products
that a mask leaves, two and a half times as many in the backward; the efficiency is that beside one GPU in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel

from tvm_flash import flash_attention
from tvm_flash.distributed import context_parallel_attention, shard_sequence

#: Of PyTorch's rings: what computes, with which of PyTorch's backends.
PEERS = {
    "torch, flash": (SDPBackend.FLASH_ATTENTION, None),
    "torch, cuDNN": (SDPBackend.CUDNN_ATTENTION, None),
    "torch, these kernels": (SDPBackend.FLASH_ATTENTION, "tvm_flash"),
}
WAYS = ("gather", "ring", "heads")
ALONE = "one GPU"
MASKS = {"causal": True, "full": False}


def seconds(step: Callable[[], object], repeats: int) -> float:
    """Of a step on the slowest rank, after one that isn't counted."""
    step()
    torch.cuda.synchronize()
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(repeats):
        step()
    torch.cuda.synchronize()
    spent = torch.tensor([(time.perf_counter() - begin) / repeats], device="cuda")
    dist.all_reduce(spent, dist.ReduceOp.MAX)
    return spent.item()


def steps(attend: Callable, tensors: list[torch.Tensor], dout: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Forward alone, and with the gradients."""
    leaves = [x.detach().requires_grad_() for x in tensors]

    def forward():
        with torch.no_grad():
            return attend(*leaves)

    def both():
        for x in leaves:
            x.grad = None
        attend(*leaves).backward(dout)

    return {"forward": forward, "forward and backward": both}


@contextlib.contextmanager
def torch_ring(mesh: DeviceMesh, backend: SDPBackend, implementation: str | None, causal: bool, tensors):
    """PyTorch's context_parallel over copies of tensors, which are then this rank's parts."""
    from torch.distributed.tensor.experimental import _attention, context_parallel
    from torch.nn import attention

    _attention._cp_options.enable_load_balance = causal
    if implementation:
        import tvm_flash.integrations.pytorch  # noqa: F401, registers

        attention.activate_flash_attention_impl(implementation)
    own = [x.clone() for x in tensors]
    try:
        whole = set(own)
        buffers = context_parallel(mesh, buffers=own, buffer_seq_dims=[2] * len(own), no_restore_buffers=whole)
        with buffers, sdpa_kernel(backend):
            yield own
    finally:
        if implementation:
            attention.restore_flash_attention_impl()


def measure(
    mesh: DeviceMesh, length: int, causal: bool, heads: tuple[int, int], who: list[str], until: float, say: Callable
) -> None:
    make = torch.Generator(device="cuda").manual_seed(0)
    shapes = [(1, h, length, 128) for h in (heads[0], heads[1], heads[1], heads[0])]
    *tensors, dout = (torch.randn(s, generator=make, device="cuda", dtype=torch.bfloat16) for s in shapes)
    repeats = 5 if length <= 1 << 16 else 2

    def timed(who: str, attend: Callable, tensors, dout) -> None:
        for what, step in steps(attend, tensors, dout).items():
            late = torch.tensor([float(time.monotonic() > until)], device="cuda")
            dist.all_reduce(late, dist.ReduceOp.MAX)
            if late.item():
                say(who=who, what=what, length=length, causal=causal, left_out="no time")
                continue
            spent = seconds(step, repeats)
            operations = 4 * length**2 * heads[0] * 128 * (0.5 if causal else 1) * (1 if what == "forward" else 3.5)
            say(who=who, what=what, length=length, causal=causal, seconds=spent, tflops=operations / spent / 1e12)

    if ALONE in who:
        timed(ALONE, lambda q, k, v: flash_attention(q, k, v, causal=causal), tensors, dout)
    for way in [x for x in WAYS if x in who]:
        own = [shard_sequence(x, mesh, dim=2, exchange=way) for x in (*tensors, dout)]

        def attend(q, k, v, way=way):
            return context_parallel_attention(q, k, v, mesh, causal=causal, exchange=way)

        timed(way, attend, own[:3], own[3])
    for name, (backend, implementation) in PEERS.items():
        if name not in who:
            continue
        try:
            with torch_ring(mesh, backend, implementation, causal, (*tensors, dout)) as own:
                timed(name, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal), own[:3], own[3])
        except Exception as e:  # a peer that can't is a result
            say(who=name, length=length, causal=causal, left_out=f"{type(e).__name__}: {str(e).splitlines()[0]}"[:200])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1 << 16, 1 << 18])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    everyone = [ALONE, *WAYS, *PEERS]
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=[*MASKS])
    parser.add_argument("--who", nargs="+", choices=everyone, default=everyone, help="what is timed (default: all)")
    parser.add_argument("--seconds", type=float, default=600, help="after so many nothing is begun")
    parser.add_argument("--output", help="a file to which a line of JSON is added for each figure")
    options = parser.parse_args()
    until = time.monotonic() + options.seconds
    dist.init_process_group("nccl")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    about = {
        "device": torch.cuda.get_device_name(), "ranks": dist.get_world_size(), "torch": torch.__version__,
        "heads": options.heads, "kv_heads": options.kv_heads, "head_dim": 128, "dtype": "bfloat16",
    }  # fmt: skip

    def say(**what) -> None:
        if dist.get_rank() == 0:
            print(json.dumps(what), flush=True)
            if options.output:
                with open(options.output, "a") as file:
                    file.write(json.dumps(about | what) + "\n")

    for length in options.lengths:
        for mask in options.masks:
            measure(mesh, length, MASKS[mask], (options.heads, options.kv_heads), options.who, until, say)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
