"""Somebody else's attention, to be timed beside ours: the backends of PyTorch.

They read V2's layout through transposed views on a GPU, which is how models have their tensors, and their own on the
CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from schedules.tuning.workload import Workload

_FUNCTION = "torch.nn.functional.scaled_dot_product_attention"
_BACKENDS = {"cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}


def about(name: str) -> str:
    """The function behind a peer's name."""
    return f"{_FUNCTION}, SDPBackend.{_BACKENDS[name]}" if name in _BACKENDS else _FUNCTION


def calls(workload: Workload, qkv: tuple[torch.Tensor, ...], kind: str) -> dict[str, Callable[[], object]]:
    """Peers that can run a workload, each called once; ``qkv`` are ``(batch, heads, seq, dim)``.

    PyTorch aligns its causal mask top-left and ours bottom-right, which is the same for squares only.
    """
    w = workload
    if w.score != "identity" or w.mask == "window" or (w.mask == "causal" and w.seqlen_q != w.seqlen_kv):
        return {}
    if kind != "cpu":
        qkv = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv)
    options = {"is_causal": w.mask == "causal", "enable_gqa": w.heads != w.kv_heads}

    def plain():
        return F.scaled_dot_product_attention(*qkv, **options)

    if kind == "cpu":
        plain()
        return {"torch": plain}
    found = {}
    for name, backend in _BACKENDS.items():

        def call(backend=backend):
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return plain()

        try:
            call()
        except RuntimeError:  # this backend can't run the problem, or isn't there
            continue
        found[name] = call
    return found
