"""Tensors without their shapes: the strides alone know how far they reach."""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

#: Extent of a flat view.
UNBOUNDED = 1 << 60


def flat(buffer: tirx.Buffer, dtype: str = "") -> tirx.Buffer:
    """A buffer as a vector, of another dtype if one is given, for offsets that are computed by hand."""
    return T.decl_buffer((T.int64(UNBOUNDED),), dtype or str(buffer.dtype), data=buffer.data)
