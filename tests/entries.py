"""Manifest entries of kernels that nobody calls: for tests of choices and commands."""

from __future__ import annotations

from tvm_flash.packs.manifest import Argument, KernelEntry, Launch, Param


def launch(symbol: str, dtype: str, params: tuple[Param, ...] = ()) -> Launch:
    """The one launch of a forward kernel."""
    tensors = [Argument(role, 4, dtype) for role in ("q", "k", "v", "o")]
    numbers = [Argument("lse", 1, "float32"), Argument("softmax_scale", 0, "float32")]
    return Launch(symbol, (*tensors, *numbers, *(Argument(p.name, 2 * p.per_head, p.dtype) for p in params)))


def forward(symbol: str, dtype: str, **fields) -> KernelEntry:
    """A forward kernel."""
    usual = {"op": "forward", "kind": "forward", "module": "m.so", "definition": "attention", "params": (), "bucket": 0}
    usual |= {"alignment": 16, "index_bits": 32, "config": {}, "config_source": "default", "source_hash": ""}
    usual |= {"mask": "full", "score": "identity"} | fields
    return KernelEntry(symbol=symbol, **{"launches": (launch(symbol, dtype, usual["params"]),), **usual})
