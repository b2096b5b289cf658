"""How tensors are read while PyTorch traces a function: elements by positions whose values nobody knows."""

from __future__ import annotations

from typing import Any


def _text(index: Any) -> str:
    if isinstance(index, slice):
        return ":".join(
            "" if x is None else str(x) for x in (index.start, index.stop, index.step)[: 2 + bool(index.step)]
        )
    return "..." if index is Ellipsis else "a position" if hasattr(index, "ndim") else str(index)


class Sliced(TypeError):
    """A tensor was indexed by positions and by what is no single index."""


def table_reads():
    """While this is on, ``table[q_idx]`` is an operation of the graph; PyTorch would ask for the index's value."""
    import torch
    from torch.overrides import TorchFunctionMode

    class TableReads(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.Tensor.__getitem__:
                table, index = args
                index = index if isinstance(index, tuple) else (index,)
                if len(index) <= table.ndim and all(type(i) is int or isinstance(i, torch.Tensor) for i in index):
                    index = [i if isinstance(i, torch.Tensor) else torch.full((), i, dtype=torch.int32) for i in index]
                    return torch.ops.aten.index(table, index)
                if any(isinstance(i, torch.Tensor) and not i.ndim for i in index):
                    by = ", ".join(map(_text, index))
                    raise Sliced(f"indexes a tensor of shape {tuple(table.shape)} by {by}")
            return func(*args, **(kwargs or {}))

    return TableReads()
