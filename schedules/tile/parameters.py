"""The run-time parameters of a definition in a GPU kernel: once for every family.

What belongs to a head is read once for each work tile, into a register.  A tensor with values for queries or keys is
read where a score is evaluated, an element at a time: by the address of its first element of the head, which a
register keeps, and run-time strides, 0 where the tensor is the same for all.  Positions that there are not have the
value of the last one, so that nothing outside the tensor is read; masks hide what is made of it.  Of a table, the
definition's own expression keeps the indices within its sizes.
"""

from __future__ import annotations

from collections.abc import Mapping

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.definition.parameters import Lookup, Reader, widened
from schedules.tile.geometry import Geometry, flat, local, wide


@T.meta_class
class OfHead:
    """A tensor ``buffer`` over ``axes`` of scores, by batch entry and head."""

    def __init__(self, buffer, axes: str):
        self.strides = dict(zip(axes, buffer.ty.strides, strict=True))
        self.memory = flat(buffer)

    def offset(self, b: Expr, h: Expr) -> Expr:
        """Elements before the first one of a head, int64."""
        terms = [wide(x) * wide(self.strides[a]) for a, x in (("b", b), ("h", h)) if a in self.strides]
        return sum(terms[1:], terms[0]) if terms else T.int64(0)

    def value(self, b: Expr, h: Expr) -> Expr:
        """That of a head, where it has one for all queries and keys."""
        return widened(self.memory[self.offset(b, h)])

    def elements(self, b: Expr, h: Expr, geometry: Geometry) -> Elements:
        """Those of a head."""
        lengths = {"i": geometry.queries.of(b).length, "j": geometry.keys.of(b).length}
        return Elements(self.memory, self.strides, local(self.offset(b, h)), lengths)


@T.meta_class
class Elements(Reader):
    """A tensor of one batch entry and head: ``first`` is a register, the offset of its first element.

    ``strides`` and ``lengths`` are those of queries ``i`` and keys ``j``.
    """

    def __init__(self, memory, strides: Mapping[str, Expr], first: Expr, lengths: Mapping[str, Expr]):
        self.memory, self.strides, self.first, self.lengths = memory, strides, first, lengths

    @property
    def dtype(self) -> str:
        """That of the tensor."""
        return str(self.memory.dtype)

    def offset(self, i: Expr, j: Expr, bounded: str = "ij") -> Expr:
        """Elements before that of a query and a key; along the axes ``bounded``, of the last if there is none there."""
        at = {a: x for a, x in (("i", i), ("j", j)) if a in self.strides}
        at = {a: T.min(x, self.lengths[a] - 1) if a in bounded else x for a, x in at.items()}
        return sum((wide(x) * wide(self.strides[a]) for a, x in at.items()), self.first + T.int64(0))

    def __call__(self, i: Expr, j: Expr) -> Expr:
        return widened(self.memory[self.offset(i, j)])


@T.meta_class
class FlatTable(Lookup):
    """A table, addressed by its run-time strides."""

    def __init__(self, buffer):
        self.shape, self.strides = tuple(buffer.ty.shape), tuple(buffer.ty.strides)
        self.memory = flat(buffer)

    def __getitem__(self, index: tuple[Expr, ...]) -> Expr:
        offsets = [wide(x) * wide(stride) for x, stride in zip(index, self.strides, strict=True)]
        return self.memory[sum(offsets[1:], offsets[0])]


@T.meta_class
class Parameters:
    """Those of one ``(batch, head)``: numbers as they are, values of a head read once, of others where they are."""

    def __init__(self, geometry: Geometry, b: Expr, h: Expr):
        self.values = {}
        self.loaded = []
        for name, value in geometry.parameters.items():
            param = geometry.declared[name]
            if not param.is_tensor:
                self.values[name] = value
            elif param.rank:
                self.values[name] = FlatTable(value)
            else:
                of_head = OfHead(value, param.axes)
                self.loaded.append((name, of_head))
                if param.is_spread:
                    self.values[name] = of_head.elements(b, h, geometry)
                else:
                    self.values[name] = local(of_head.value(b, h))

    def read(self, b: Expr, h: Expr):
        """Read those of another batch and head in their place."""
        for name, of_head in self.loaded:
            value = self.values[name]
            if isinstance(value, Elements):
                T.buffer_store(value.first.source, of_head.offset(b, h), [0])
            else:
                T.buffer_store(value.source, of_head.value(b, h), [0])
