"""Parameters over queries and keys where vector lanes are over one of these, and masks that aren't affine.

A tensor's strides are known at run time only, and it may end within a vector.  So its values of a tile go to scratch
first, one by one, as float32, or int32 of integers and predicates, and lanes read them from there.  What lies beyond
the last query or key is left as it is: nothing of it is stored.  Floats of 16 bits whose keys lie beside each other go
there by vectors, for lanes over queries as transposed pairs: a bias for each score of 4 x 8 heads, 1024 positions,
bfloat16, head_dim 64, takes 19 ms in place of 38 (two cores of an Emerald Rapids, of the whole forward).

A mask with parts that aren't affine is looked at in the same way before anything is multiplied, so that a tile in which
nobody sees anything costs no more than that.
"""

from __future__ import annotations

from dataclasses import replace

from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder

from schedules.definition.parameters import Site, value_dtype, widened
from schedules.families.cpu.ahead import fetch
from schedules.families.cpu.flat import flat
from schedules.families.cpu.transpose import block_begin, blocks, place, transpose
from tvm_flash.packs.manifest import Param


class Staged:
    """Those of ``params`` that differ along the axis of the lanes, ``"i"`` or ``"j"``.

    ``across`` scores of a tile lie beside each other in a vector's direction, ``along`` in the other: a parameter that
    differs there too has a row for each of these.
    """

    def __init__(self, params: tuple[Param, ...], axis: str, lanes: int, across: int, along: int = 1):
        self.axis, self.other, self.lanes = axis, "j" if axis == "i" else "i", lanes
        self.params = [p for p in params if axis in p.axes]
        self.across, self.along = across, along
        self.buffers = {}
        for p in self.params:
            rows = along if self.other in p.axes else 1
            dtype = "float32" if "float" in p.dtype else "int32"
            self.buffers[p.name] = _scratch(f"{p.name}_tile", rows * across, dtype)
        in_pairs = axis == "i" and any(_has_16_bits(p) and self.other in p.axes for p in self.params)
        self.pairs = _scratch("pairs", lanes * lanes, "uint32", "local") if in_pairs else None

    def fill(self, geometry, b, h, first, count, first_other, count_other=1) -> None:
        """Copy the values of ``count`` lanes from ``first`` on, and of as many others."""
        for p in self.params:
            others = count_other if self.other in p.axes and self.along > 1 else T.int64(1)
            at = {"b": b, "h": h, self.axis: first, self.other: first_other}
            of = p, geometry.params[p.name], self.buffers[p.name], at
            if _has_16_bits(p) and "j" in p.axes and (self.axis == "j" or self.pairs is not None):
                beside = of[1].ty.strides[p.axes.index("j")] == 1
                whole = T.And(count == self.across, others >= 2 * self.lanes)
                with T.If(beside if self.axis == "j" else T.And(beside, whole)):
                    with T.Then():
                        self._fill_row(*of, count) if self.axis == "j" else self._fill_pairs(*of, others)
                    with T.Else():
                        self._fill_elements(*of, count, others)
            else:
                self._fill_elements(*of, count, others)

    def _fill_elements(self, param: Param, tensor, tile, at, count, others) -> None:
        """One value after the other."""
        with T.serial(count) as x, T.serial(others) as y:
            moved = {**at, self.axis: at[self.axis] + x, self.other: at[self.other] + y}
            value = widened(tensor[tuple(moved[a] for a in param.axes)])
            T.buffer_store(tile, T.cast(value, str(tile.dtype)), [y * self.across + x])

    def _fill_row(self, param: Param, tensor, tile, at, count) -> None:
        """Those of keys beside each other, for lanes over keys."""
        memory, first = flat(tensor), _offset(param, tensor, at)
        with T.serial(count // self.lanes) as vector, T.vectorized(self.lanes) as lane:
            x = vector * self.lanes + lane
            T.buffer_store(tile, widened(memory[first + x]), [x])
        with T.serial(count % self.lanes) as rest:
            x = count // self.lanes * self.lanes + rest
            T.buffer_store(tile, widened(memory[first + x]), [x])

    def _fill_pairs(self, param: Param, tensor, tile, at, keys) -> None:
        """The same for lanes over queries: words of two keys each, transposed."""
        memory, first, lanes = flat(tensor), _offset(param, tensor, at), self.lanes
        stride = T.bind(T.cast(tensor.ty.strides[param.axes.index("i")], "int64"))
        with T.serial(self.across // lanes) as vector, T.serial(blocks(keys, 2 * lanes)) as block:
            key = T.bind(block_begin(block, keys, 2 * lanes))
            row = T.bind(first + vector * lanes * stride + key)
            for x in range(lanes):  # the rows of the next group, which nothing else foresees
                fetch(memory, row + (self.across + x) * stride)
            T.evaluate(transpose(place(self.pairs, "w", 0), 4 * lanes, T.address_of(memory[row]), stride * 2))
            with T.serial(lanes) as pair:
                for half in range(2):
                    with T.vectorized(lanes) as lane:
                        value = _half(self.pairs[pair * lanes + lane], half, param.dtype)
                        at_key = (key + 2 * pair + half) * self.across
                        T.buffer_store(tile, value, [at_key + vector * lanes + lane])

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
            self.staged = Staged(pattern.of_mask, axis, lanes, across, along)
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


def _has_16_bits(param: Param) -> bool:
    """Whether it is of floats that are widened."""
    return value_dtype(param) != param.dtype


def _offset(param: Param, tensor, at):
    """Where in a tensor a place is."""
    return T.bind(tensor.offset_of([at[a] for a in param.axes])[0])


def _half(word, half: int, dtype: str):
    """One of the two floats of a word, the low one or the high one, as float32."""
    if dtype == "bfloat16":
        word = T.bitwise_and(word, T.uint32(0xFFFF0000)) if half else T.shift_left(word, T.uint32(16))
        return T.reinterpret("float32", word)
    word = T.shift_right(word, T.uint32(16)) if half else word
    return T.cast(T.reinterpret("float16", T.cast(word, "uint16")), "float32")


def _scratch(name: str, size: int, dtype: str, scope: str = "global"):
    buffer = T.sblock_alloc_buffer((size,), dtype, scope=scope)
    IRBuilder.name(name, buffer)
    # Written here, so that it is alive in all loops that follow: in one of them its memory would be taken for free
    # where it isn't read any more, and be given to what is loaded in the first turn and read in all.
    T.buffer_store(buffer, tirx.const(0, dtype), [0])
    return buffer
