"""The arguments of a backward's launches on any GPU: the forward's tensors and sizes, and gradients in and out."""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.tile.dtypes import tensor_types
from schedules.tile.geometry import Geometry, Tensor, flat
from schedules.tile.tile_scheduler import Traversal

#: Bytes; what TMA asks of addresses and strides.
ALIGNMENT = 16


@T.meta_class
class Tensors(Geometry):
    """Tensors ``q, k, v, do``, flat ``lse`` and ``delta``, sizes, and of ``dq, dk, dv`` those of the launch.

    ``handles`` has them by name.  Made before ``T.device_entry()``.
    """

    def __init__(self, pattern: Pattern, traversal: Traversal, handles: dict, softmax_scale, parameters: dict):
        inputs = tuple(handles[name] for name in ("q", "k", "v"))
        Geometry.__init__(self, pattern, traversal, inputs, softmax_scale, parameters, ALIGNMENT)
        types = tensor_types(pattern)
        self.gradients = {}
        for name, like, dim, element in (
            ("do", self.q, self.head_dim_v, types.o),
            ("dq", self.q, self.head_dim, types.q),
            ("dk", self.k, self.head_dim, types.k),
            ("dv", self.v, self.head_dim_v, types.v),
        ):
            if name in handles:
                sizes = {**like.sizes, "dim": dim}
                self.gradients[name] = Tensor(handles[name], name, sizes, element.name, traversal.layout, ALIGNMENT)
        rows = T.int32(), T.int32()
        self.lse = T.match_buffer(handles["lse"], (rows[0],), "float32", align=4)
        self.delta = T.match_buffer(handles["delta"], (rows[1],), "float32", align=4)
        # Query heads that read one head of keys; made here, on the host, as a division costs a block more than a load.
        self.group = T.bind(T.truncdiv(self.heads, self.kv_heads))

    def row_terms(self):
        """Flat views of ``lse`` and ``delta``."""
        return flat(self.lse), flat(self.delta)
