"""Who computes: our two functions, and the attention backends of PyTorch on each kind of device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm_flash import flash_attention, flash_attention_v2
from tvm_flash.call.problem import FUNCTION_OF_LAYOUT
from tvm_flash.measure.workloads import Workload

#: Layout of the template's own function.
_LAYOUT = {"v1": "bhsd", "v2": "bshd"}


@dataclass(frozen=True)
class Implementation:
    """Who computed: ``key`` in the measurements, ``name`` in tables, ``about`` in words; ours or a peer.

    ``recorded`` peers were measured in another run.
    """

    key: str
    name: str
    about: str
    ours: bool
    recorded: bool = False


@dataclass(frozen=True)
class Contestant:
    """An implementation that can be called.

    Attributes
    ----------
    about: what the results say of it.
    layout: how q, k and v lie in memory: ``"bhsd"`` or ``"bshd"``.
    result: the result's layout.
    attend: takes q, k, v and a workload, and gives a function without arguments, to be called inside of ``around()``.
    """

    about: Implementation
    layout: str
    result: str
    attend: Callable[[Any, Any, Any, Workload], Callable[[], Any]]
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    def prepare(self, q: Any, k: Any, v: Any, workload: Workload, dout: Any = None) -> Callable[[], Any]:
        """A function that computes the workload, to be called inside of ``around()``.

        It gives the result, or for a backward the gradients of q, k and v in their layout, by PyTorch's autograd, which
        keeps what the forward left: ``dout`` is the gradient of the result, in its layout.
        """
        if not workload.backward:
            return self.attend(q, k, v, workload)
        import torch

        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with self.around():
            out = self.attend(*leaves, workload)()
        return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)

    def call(self, q: Any, k: Any, v: Any, workload: Workload, dout: Any = None) -> Callable[[], Any]:
        """The same with around it what chooses the implementation."""
        prepared = self.prepare(q, k, v, workload, dout)

        def call() -> Any:
            with self.around():
                return prepared()

        return call


def contestants(device: str) -> list[Contestant]:
    """All that can run on ``"cpu"`` or ``"cuda"``; of ours, the template that is made for the device comes first.

    On a GPU all peers read V2's layout through transposed views, which is how models have their tensors; the CPU's
    reads its own layout.
    """
    if device == "cpu":
        return [_ours("v1"), _ours("v2"), _torch_on_cpu()]
    return [
        _ours("v2"),
        _ours("v1"),
        _torch_backend("cudnn", "cuDNN", "CUDNN_ATTENTION"),
        _torch_backend("flash", "FA2", "FLASH_ATTENTION"),
        _torch_backend("efficient", "MemEff", "EFFICIENT_ATTENTION"),
    ]


def _ours(template: str) -> Contestant:
    layout = _LAYOUT[template]
    function = flash_attention if layout == "bhsd" else flash_attention_v2

    def attend(q, k, v, workload):
        return lambda: function(q, k, v, causal=workload.causal, variant=template)

    name = template.upper()
    about = f"tvm_flash.{FUNCTION_OF_LAYOUT[layout]}, template {name}"
    return Contestant(Implementation(template, name, about, ours=True), layout, layout, attend)


def _is_causal(workload: Workload) -> bool:
    """PyTorch aligns its causal mask top-left, ours bottom-right; they agree on squares, and one query sees all."""
    return workload.causal and workload.seqlen_q > 1


def _torch_on_cpu() -> Contestant:
    import torch.nn.functional as F

    def attend(q, k, v, workload):
        causal = _is_causal(workload)
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    about = "torch.nn.functional.scaled_dot_product_attention"
    return Contestant(Implementation("torch", "torch", about, ours=False), "bhsd", "bhsd", attend)


def _torch_backend(key: str, name: str, backend: str) -> Contestant:
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attend(q, k, v, workload):
        causal = _is_causal(workload)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def around():
        return sdpa_kernel(getattr(SDPBackend, backend))

    about = f"torch.nn.functional.scaled_dot_product_attention, SDPBackend.{backend}"
    return Contestant(Implementation(key, name, about, ours=False), "bshd", "bhsd", attend, around)
