"""Somebody else's attention, to be timed beside ours: the peers of ``python -m tvm_flash bench``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tvm_flash.measure.peers import contestants
from tvm_flash.measure.workloads import Workload


@dataclass(frozen=True)
class Peer:
    """One that can run a workload; ``about`` names its function."""

    about: str
    call: Callable[[], object]


def peers_of(workload: Workload, qkv: tuple[torch.Tensor, ...], kind: str) -> dict[str, Peer]:
    """Those that can run a workload, by name, each called once; ``qkv`` are ``(batch, heads, seq, dim)``."""
    w = workload
    same = w.heads == w.kv_heads and w.head_dim == w.head_dim_v
    square = w.mask == "full" or (w.mask == "causal" and w.seqlen_q == w.seqlen_kv)  # other causal masks differ
    if not (same and square and w.score == "identity"):
        return {}
    found = {}
    for contestant in contestants(kind):
        if contestant.about.ours:
            continue
        tensors = qkv if contestant.layout == "bhsd" else (x.transpose(1, 2).contiguous() for x in qkv)
        call = contestant.call(*tensors, w)
        try:
            call()
        except RuntimeError:  # this backend can't run the problem, or isn't there
            continue
        found[contestant.about.key] = Peer(contestant.about.about, call)
    return found
