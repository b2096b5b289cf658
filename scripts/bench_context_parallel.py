"""Time attention over sequences that GPUs share, beside one of them and beside PyTorch's context_parallel.

torchrun --nproc-per-node 2 scripts/bench_context_parallel.py --cells 65536:8:8 262144:8:8:60:20 --output times.jsonl

A cell is a length, heads and heads of keys, and for each mask how many seconds rounds of ours may be begun, and then
those of PyTorch's: ``LENGTH:HEADS:KV_HEADS[:SECONDS[:PEERS]]``.  All of ours are timed by turns, in one round at least,
and all cells' before the first of PyTorch's, so that these never take their time.  The median of the rounds counts; in
each, calls follow each other for a quarter of a second, on the slowest rank.  Rates count the products that a mask
leaves, two and a half times as many in the backward; the efficiency is that beside one GPU in the same rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel

from tvm_flash import flash_attention
from tvm_flash.distributed import context_parallel_attention, peers, shard_sequence
from tvm_flash.distributed.agreement import axes_of
from tvm_flash.distributed.exchange import first_line

ALONE, GATHER_BY_MESSAGES = "one GPU", "gather, by messages"

#: Ours: what ``exchange`` is, where there are several ranks.
WAYS = {ALONE: None, "gather": "gather", GATHER_BY_MESSAGES: "gather", "ring": "ring", "heads": "heads"}

#: Of PyTorch's rings: what computes, with which of PyTorch's backends.
PEERS = {
    "torch, cuDNN": (SDPBackend.CUDNN_ATTENTION, None),
    "torch, these kernels": (SDPBackend.FLASH_ATTENTION, "tvm_flash"),
    "torch, flash": (SDPBackend.FLASH_ATTENTION, None),
}
MASKS = {"causal": True, "full": False}

#: For how long steps follow each other.
_SECONDS = 0.25


@dataclass(frozen=True)
class Cell:
    """What is timed together, and for how many seconds rounds are begun."""

    length: int
    heads: int
    kv_heads: int
    seconds: float = 30.0
    of_peers: float = 10.0
    causal: bool = True

    @classmethod
    def parse(cls, text: str) -> Cell:
        return cls(*(kind(x) for kind, x in zip((int, int, int, float, float), text.split(":"), strict=False)))

    @property
    def operations(self) -> float:
        """Of the forward."""
        return 4 * self.length**2 * self.heads * 128 * (0.5 if self.causal else 1)

    def tensors(self) -> list[torch.Tensor]:
        """q, k, v and a gradient of the result, the same on all ranks."""
        make = torch.Generator(device="cuda").manual_seed(0)
        shapes = [(1, h, self.length, 128) for h in (self.heads, self.kv_heads, self.kv_heads, self.heads)]
        return [torch.randn(s, generator=make, device="cuda", dtype=torch.bfloat16) for s in shapes]


def slowest(seconds: float) -> float:
    """The most of all ranks."""
    most = torch.tensor([seconds], device="cuda")
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.item()


def seconds(step: Callable[[], object], repeats: int) -> float:
    """Of a step on the slowest rank, where steps follow each other."""
    torch.cuda.synchronize()
    dist.barrier()
    begin = time.perf_counter()
    for _ in range(repeats):
        step()
    torch.cuda.synchronize()
    return slowest((time.perf_counter() - begin) / repeats)


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
def torch_ring(mesh: DeviceMesh, backend: SDPBackend, implementation: str | None, causal: bool, tensors) -> Iterator:
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


class Timing:
    """The rounds of a cell."""

    def __init__(self, cell: Cell, meshes: dict[str, DeviceMesh]):
        """``meshes`` by what is timed."""
        self._cell, self._meshes = cell, meshes
        self._repeats: dict[tuple[str, str], int] = {}
        self._found: dict[tuple[str, str], list[float]] = {}
        self._failed: dict[str, str] = {}

    def rounds(self, who: list[str], most: int, until: float, *, one: bool) -> None:
        """Time some by turns until a time of ``monotonic()``; ``one``: a round is whole, and there is one at least."""
        tensors = self._cell.tensors()
        for number in range(most):
            for at, name in enumerate(who):
                if not (one and (number == 0 or at > 0)) and slowest(time.monotonic() - until) > 0:
                    return
                if name not in self._failed:
                    self._time(name, tensors)

    def _time(self, name: str, tensors: list[torch.Tensor]) -> None:
        try:
            with self._steps(name, tensors) as both:
                for what, step in both.items():
                    if (name, what) not in self._repeats:
                        spent = seconds(step, 1)
                        spent = seconds(step, 1) if spent < _SECONDS else spent
                        self._repeats[name, what] = math.ceil(_SECONDS / spent)
                    self._found.setdefault((name, what), []).append(seconds(step, self._repeats[name, what]))
        except Exception as e:  # a peer that can't is a result
            if name not in PEERS:
                raise
            self._failed[name] = f"{type(e).__name__}: {first_line(e)}"[:200]

    @contextlib.contextmanager
    def _steps(self, name: str, tensors: list[torch.Tensor]) -> Iterator[dict[str, Callable[[], object]]]:
        causal, mesh = self._cell.causal, self._meshes.get(name)
        if name == ALONE:
            *whole, dout = tensors
            yield steps(lambda q, k, v: flash_attention(q, k, v, causal=causal), whole, dout)
        elif name in WAYS:
            options = {"causal": causal, "exchange": WAYS[name]}
            *own, dout = (shard_sequence(x, mesh, dim=2) for x in tensors)
            yield steps(lambda q, k, v: context_parallel_attention(q, k, v, mesh, **options), own, dout)
        else:
            with torch_ring(mesh, *PEERS[name], causal, tensors) as (*own, dout):
                yield steps(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal), own, dout)

    def lines(self, who: list[str]) -> Iterator[dict]:
        """What was found of some."""
        cell = self._cell
        about = {"length": cell.length, "heads": cell.heads, "kv_heads": cell.kv_heads, "causal": cell.causal}
        for name in who:
            for what, times in (("forward", 1), ("forward and backward", 3.5)):
                line = {"who": name, "what": what, **about}
                if name in self._failed:
                    yield line | {"left_out": self._failed[name]}
                elif (name, what) not in self._found:
                    yield line | {"left_out": "no time"}
                else:
                    rounds = self._found[name, what]
                    spent = statistics.median(rounds)
                    yield line | {"seconds": spent, "tflops": times * cell.operations / spent / 1e12, "rounds": rounds}


def meshes_of(who: list[str]) -> dict[str, DeviceMesh]:
    """The mesh on which each is timed: by messages on one of its own, whose ranks are told not to read memory."""
    ranks = dist.get_world_size()
    found = dict.fromkeys(who, init_device_mesh("cuda", (ranks,)))
    axes_of(found[who[0]])  # asks the ranks
    if GATHER_BY_MESSAGES in who:
        mesh = DeviceMesh.from_group(dist.new_group(), "cuda", torch.arange(ranks))
        with patch.dict(os.environ, {peers.VARIABLE: "0"}):
            axes_of(mesh)
        found[GATHER_BY_MESSAGES] = mesh
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cells = [Cell(*sizes) for sizes in ((1 << 16, 8, 8), (1 << 18, 8, 8), (1 << 16, 32, 8), (1 << 16, 32, 32))]
    parser.add_argument(
        "--cells", type=Cell.parse, nargs="+", default=cells, help="LENGTH:HEADS:KV_HEADS[:SECONDS[:PEERS]]"
    )
    everyone = [*WAYS, *PEERS]
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=[*MASKS])
    parser.add_argument("--who", nargs="+", choices=everyone, default=everyone, help="what is timed (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="at most (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after so many nothing of PyTorch's is begun")
    parser.add_argument("--output", help="a file to which a line of JSON is added for each figure")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    dist.init_process_group("nccl")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    meshes = meshes_of(options.who)
    about = {
        "device": torch.cuda.get_device_name(), "ranks": dist.get_world_size(), "torch": torch.__version__,
        "head_dim": 128, "dtype": "bfloat16",
    }  # fmt: skip

    def say(timing: Timing, who: list[str]) -> None:
        for line in timing.lines(who):
            if WAYS.get(line["who"]):
                mesh = meshes[line["who"]]
                line |= {"peer_memory": axes_of(mesh, line["who"] == "heads").peers is not None}
            if dist.get_rank() == 0:
                print(json.dumps(line), flush=True)
                if options.output:
                    with open(options.output, "a") as file:
                        file.write(json.dumps(about | line) + "\n")

    timings = [
        (cell, Timing(cell, meshes))
        for of_all in options.cells
        for mask in options.masks
        for cell in [dataclasses.replace(of_all, causal=MASKS[mask])]
    ]
    ours, theirs = ([x for x in options.who if x in of] for of in (WAYS, PEERS))
    for cell, timing in timings:
        timing.rounds(ours, options.rounds, time.monotonic() + cell.seconds, one=True)
        say(timing, ours)
    for cell, timing in timings:
        timing.rounds(theirs, options.rounds, min(end, time.monotonic() + cell.of_peers), one=False)
        say(timing, theirs)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
