"""Parameters over queries and keys where vector lanes are over one of these, and masks that aren't affine.

A tensor's strides are known at run time only, and it may end within a vector.  So its values of a tile go to scratch
first, one by one, as float32, or int32 of integers and predicates, and lanes read them from there.  What lies beyond
the last query or key is left as it is: nothing of it is stored.

A mask with parts that aren't affine is looked at in the same way before anything is multiplied, so that a tile in which
nobody sees anything costs no more than that.
"""

from __future__ import annotations

from dataclasses import replace

from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder

from schedules.definition.parameters import Site, value_dtype, widened
from tvm_flash.packs.manifest import Param


class Staged:
    """Those of ``params`` that differ along the axis of the lanes, ``"i"`` or ``"j"``.

    ``across`` scores of a tile lie beside each other in a vector's direction, ``along`` in the other: a parameter that
    differs there too has a row for each of these.
    """

    def __init__(self, params: tuple[Param, ...], axis: str, across: int, along: int = 1):
        self.axis, self.other = axis, "j" if axis == "i" else "i"
        self.params = [p for p in params if axis in p.axes]
        self.across, self.along = across, along
        self.buffers = {}
        for p in self.params:
            rows = along if self.other in p.axes else 1
            dtype = "float32" if "float" in p.dtype else "int32"
            self.buffers[p.name] = _scratch(f"{p.name}_tile", rows * across, dtype)

    def fill(self, geometry, b, h, first, count, first_other, count_other=1) -> None:
        """Copy the values of ``count`` lanes from ``first`` on, and of as many others."""
        for p in self.params:
            tensor, tile = geometry.params[p.name], self.buffers[p.name]
            others = count_other if self.other in p.axes and self.along > 1 else T.int64(1)
            with T.serial(count) as x, T.serial(others) as y:
                at = {"b": b, "h": h, self.axis: first + x, self.other: first_other + y}
                value = widened(tensor[tuple(at[a] for a in p.axes)])
                T.buffer_store(tile, T.cast(value, str(tile.dtype)), [y * self.across + x])

    def site(self, site: Site, lane, other=0) -> Site:
        """The call at a score: ``lane`` counts from the first one of the tile, and ``other`` likewise."""
        if not self.params:
            return site
        values = {}
        for p in self.params:
            row = other * self.across if self.other in p.axes and self.along > 1 else 0
            value = self.buffers[p.name][row + lane]
            values[p.name] = tirx.NE(value, T.int32(0)) if value_dtype(p) == "bool" else value
        return replace(site, params={**site.params, **values})


class Look:
    """What a mask that isn't affine lets be seen in a tile: a number for each score, not 0 if it is seen."""

    def __init__(self, pattern, axis: str, across: int, along: int, lanes: int):
        self.pattern, self.lanes, self.across = pattern, lanes, across
        self.is_needed = pattern.is_opaque
        if self.is_needed:
            self.staged = Staged(pattern.of_mask, axis, across, along)
            self.visible = _scratch("visible", along * across, "int32")
            self.some, self.every = (_scratch(name, lanes, "int32", "local") for name in ("some", "every"))

    def begin(self) -> None:
        """Before the rows of a tile."""
        for buffer, value in ((self.some, 0), (self.every, 1)):
            with T.vectorized(self.lanes) as lane:
                T.buffer_store(buffer, T.int32(value), [lane])

    def row(self, at, vectors, seen) -> None:
        """Look at ``vectors`` vectors of scores from number ``at`` on; ``seen(lane)`` is the predicate, lanes counted
        from there."""
        for n in range(vectors):
            with T.vectorized(self.lanes) as lane:
                x = n * self.lanes + lane
                T.buffer_store(self.visible, T.cast(seen(x), "int32"), [at + x])
            with T.vectorized(self.lanes) as lane:
                value = self.visible[at + n * self.lanes + lane]
                T.buffer_store(self.some, T.max(self.some[lane], value), [lane])
            with T.vectorized(self.lanes) as lane:
                value = self.visible[at + n * self.lanes + lane]
                T.buffer_store(self.every, T.min(self.every[lane], value), [lane])

    def any(self):
        """Whether something was seen."""
        found = self.some[0]
        for lane in range(1, self.lanes):
            found = T.max(found, self.some[lane])
        return found != 0

    def all(self):
        """Whether everything was."""
        found = self.every[0]
        for lane in range(1, self.lanes):
            found = T.min(found, self.every[lane])
        return found != 0

    def seen(self, at) -> dict:
        """What was seen at a score, as an argument of ``masked_score``; none if the mask has to be asked there."""
        return {"seen": tirx.NE(self.visible[at], T.int32(0))} if self.is_needed else {}


def _scratch(name: str, size: int, dtype: str, scope: str = "global"):
    buffer = T.sblock_alloc_buffer((size,), dtype, scope=scope)
    IRBuilder.name(name, buffer)
    # Written here, so that it is alive in all loops that follow: in one of them its memory would be taken for free
    # where it isn't read any more, and be given to what is loaded in the first turn and read in all.
    T.buffer_store(buffer, tirx.const(0, dtype), [0])
    return buffer
