"""What a tensor holds for a step's scores, in registers: fetched while the products before are computed.

A thread reads both columns of a register pair at once, where they lie beside each other in memory and the tile of keys
is whole; else element by element, those of keys and queries that there are not from the last one.  Loads are
instructions that the compiler can't move behind the wait for the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from tvm import tirx
from tvm.script import tirx as T

from schedules.definition.pattern import Site
from schedules.tile.element_pairs import BYTES, Fetched
from schedules.tile.fragment import Fragment
from schedules.tile.geometry import local, wide
from schedules.tile.parameters import Elements
from tvm_flash.packs.manifest import Param

_ALIGNED = """
__forceinline__ __device__ int is_aligned(const void* place, int bytes) {
  return ((unsigned long long)place & (bytes - 1)) == 0;
}
"""


@T.meta_class
class TensorTile:
    """The values of ``param``, a tensor with an axis of columns, at the scores of one m-tile of ``columns`` columns.

    Rows are queries and columns keys, unless it is ``transposed``: then elements are read one by one, and have a word
    each.  Else a pair of 32-bit elements takes two words, one of 16-bit elements a word, one of bytes their word.
    """

    def __init__(
        self, param: Param, elements: Elements, fragment: Fragment, columns: int, lane, transposed: bool = False
    ):
        self.param, self.elements, self.fragment, self.lane = param, elements, fragment, lane
        self.of_row, self.of_column = "ji" if transposed else "ij"  # axes
        self.groups, self.rows = columns // fragment.group, 2 if self.of_row in param.axes else 1
        self.bytes = BYTES[param.dtype]
        self.packed = self.bytes < 4 and not transposed
        self.per_pair = 1 if self.packed else 2
        self.registers = self.groups * self.rows * self.per_pair
        self.words = T.alloc_local([self.registers], "uint32")
        self.pairs = None if transposed else self._lie_together()

    def _lie_together(self):
        """Whether pairs are words that lie together in every row."""
        strides, unit = self.elements.strides, max(4, 2 * self.bytes)
        place = self.elements.memory.ptr_to([self.elements.first + T.int64(0)])
        aligned = T.cuda.func_call("is_aligned", place, unit, source_code=_ALIGNED, return_type="int32")
        pairs = T.And(strides["j"] == 1, aligned != 0)
        if "i" in strides:
            pairs = T.And(pairs, T.bitwise_and(strides["i"] * self.bytes, unit - 1) == 0)
        return local(T.Cast("int32", pairs))

    def _first(self, rows, column0):
        """Elements before those of this lane's first pair, in each of its rows ``rows``."""
        e = self.elements
        at = [e.first + T.int64(0)]
        if self.rows == 2:
            at = [at[0] + wide(T.min(x, e.lengths[self.of_row] - 1)) * wide(e.strides[self.of_row]) for x in rows]
        if self.pairs is None:
            return [x + wide(column0) * wide(e.strides[self.of_column]) for x in at]
        return [x + wide(self.column(column0)) for x in at]

    def column(self, column0):
        """The column where the word of a pair begins, of which ``column0`` is the first one."""
        return column0 if self.bytes > 1 else column0 - T.bitwise_and(self.lane, 1) * 2

    def _shift(self):
        """Where a pair of bytes begins in its word."""
        return T.Cast("uint32", T.bitwise_and(self.lane, 1) * 16)

    def _word(self, g, r) -> int:
        return (g * self.rows + r) * self.per_pair

    def fetch(self, rows, column0, last):
        """Fetch a step's values.

        ``rows`` are those of this lane, ``column0`` its first column and ``last`` the last of the tile.
        """
        whole = last < self.elements.lengths[self.of_column]
        with T.If(whole if self.pairs is None else T.And(self.pairs != 0, whole)):
            with T.Then():
                self._fetch_columns(rows, column0) if self.pairs is None else self._fetch_pairs(rows, column0)
            with T.Else():
                self.fetch_elements(rows, column0)

    def _fetch_pairs(self, rows, column0):
        for r, first in enumerate(self._first(rows, column0)):
            at = local(first)
            for g in range(self.groups):
                self._load_pair(g, r, at)

    def _load_pair(self, g, r, at):
        place = self.elements.memory.ptr_to([at + g * self.fragment.group])
        words = [self.words[self._word(g, r) + x] for x in range(self.per_pair)]
        T.evaluate(T.ptx["ld.global.v2.b32" if self.per_pair == 2 else "ld.global.b32"](*words, place))

    def _fetch_columns(self, rows, column0):
        """Elements of columns that there are, at addresses that grow by as much from one to the next."""
        stride = wide(self.elements.strides[self.of_column])
        for r, first in enumerate(self._first(rows, column0)):
            at = local(first)
            for g in range(self.groups):
                for e in range(2):
                    word = self._word(g, r) + e
                    if self.bytes == 4:
                        place = self.elements.memory.ptr_to([at + T.int64(0)])
                        T.evaluate(T.ptx["ld.global.b32"](self.words[word], place))
                    else:
                        T.buffer_store(self.words, self._bits(self.elements.memory[at + T.int64(0)], e), [word])
                    T.buffer_store(at.source, at + stride * (1 if e == 0 else self.fragment.group - 1), [0])

    def fetch_elements(self, rows, column0):
        """Fetch a step's values one by one."""
        for g in range(self.groups):
            for r in range(self.rows):
                bits = []
                for e in range(2):
                    column = column0 + (g * self.fragment.group + e)
                    i, j = (rows[r], column) if self.of_row == "i" else (column, rows[r])
                    bits.append(self._bits(self.elements.memory[self.elements.offset(i, j)], e))
                words = [T.bitwise_or(*bits)] if self.packed else bits
                for x, word in enumerate(words):
                    T.buffer_store(self.words, word, [self._word(g, r) + x])

    def _bits(self, value, e):
        """Element ``e`` of a pair where it is in its word."""
        if self.bytes == 4:
            return T.reinterpret("uint32", value)
        shift = T.uint32(0)
        if self.packed:
            shift = T.uint32(16 * e) if self.bytes == 2 else self._shift() + T.uint32(8 * e)
        bits = T.Cast("uint32", T.reinterpret("uint16", value) if self.bytes == 2 else value)
        return T.shift_left(bits, shift) if self.packed else bits

    def _is_set(self, bits, e):
        """Whether the byte of element ``e`` of a pair says so."""
        byte = T.shift_right(bits, self._shift() + e * T.uint32(8)) if self.packed else bits
        return T.bitwise_and(byte, T.uint32(1)) != T.uint32(0)

    def value(self, g, r, e) -> Fetched:
        """That of a register; ``g``, ``r`` and ``e`` may be counts of loops that are unrolled."""
        word, e = self._word(g, r if self.rows == 2 else 0), T.Cast("uint32", e)
        bits = self.words[word] if self.packed else self.words[word + T.Cast("int32", e)]
        if self.bytes == 4:
            return Fetched(T.reinterpret(self.param.dtype, bits))
        if self.bytes == 1:
            return Fetched(self._is_set(bits, e))
        half = T.shift_right(bits, e * T.uint32(16)) if self.packed else bits
        if self.param.dtype == "bfloat16":
            return Fetched(T.reinterpret("float32", T.shift_left(half, T.uint32(16))))
        return Fetched(T.Cast("float32", T.reinterpret("float16", T.Cast("uint16", half))))


class FollowingTile(TensorTile):
    """The same of tiles that are scored from right to left.

    It remembers where the pairs are that were fetched last, and goes on to the tile on their left, group by group.
    """

    def __init__(self, *arguments):
        TensorTile.__init__(self, *arguments)
        self.at = T.alloc_local([self.rows], "int64")

    def fetch(self, rows, column0, last):
        for r, first in enumerate(self._first(rows, column0)):
            T.buffer_store(self.at, first, [r])
        TensorTile.fetch(self, rows, column0, last)

    def turn_left(self):
        """Go on to the tile on the left, whose pairs lie together and are there."""
        for r in range(self.rows):
            T.buffer_store(self.at, self.at[r] - T.int64(self.groups * self.fragment.group), [r])

    def load(self, g):
        """Fetch the pairs of group ``g`` of that tile."""
        for r in range(self.rows):
            self._load_pair(g, r, self.at[r])

    def _fetch_pairs(self, rows, column0):
        for g in range(self.groups):
            self.load(g)

    def _is_set(self, bits, e):
        if not self.packed:
            return TensorTile._is_set(self, bits, e)
        pair = T.shift_right(bits, self._shift())  # the same for both
        return T.bitwise_and(pair, T.shift_left(T.uint32(1), e * T.uint32(8))) != T.uint32(0)


class FetchedTensors:
    """What makes a :class:`schedules.tile.score.ScoreTile` of one m-tile have the values of tensors with an axis of
    columns in registers, by :meth:`fetch`."""

    #: They are fetched beforehand.
    reads = False
    tensors: Mapping[str, TensorTile] = {}

    def add_tensors(self, lane, tile_type: Callable[..., TensorTile] = TensorTile) -> None:
        """Have registers for them, in tiles of a type."""
        columns, axis = self.groups * self.fragment.group, "i" if self.transposed else "j"
        self.tensors = {
            p.name: tile_type(p, self.at.params[p.name], self.fragment, columns, lane, self.transposed)
            for p in self.pattern.params
            if axis in p.axes
        }

    def fetch(self, row0, column0, last, in_pairs: bool = True) -> None:
        """Fetch what tensors hold for a step's scores; ``row0`` and ``column0`` are this lane's first query and key (if
        it is transposed too), ``last`` the last of its columns.  ``in_pairs``: where pairs lie together."""
        if self.transposed:
            rows, column = [self.position(row0, column0, 0, 0, r, 0)[1] for r in range(2)], row0
        else:
            rows, column = [self.position(row0, column0, 0, 0, r, 0)[0] for r in range(2)], column0
        for x in self.tensors.values():
            x.fetch(rows, column, last) if in_pairs else x.fetch_elements(rows, column)

    def take(self, state, row0, column0, last) -> None:
        """Take what tensors hold for a step's scores from the boxes that have it; else as ``fetch``."""
        rows = [self.position(row0, column0, 0, 0, r, 0)[0] for r in range(2)]
        for x in self.tensors.values():
            x.take(state, rows, column0, last)

    def forget_tests(self) -> None:
        """Have the compiler test the bits of masks anew."""
        for x in self.tensors.values():
            x.forget_tests()

    def lie_together(self):
        """Whether pairs of all of them do."""
        return tirx.all(*(x.pairs != 0 for x in self.tensors.values()))

    def turn_left(self) -> None:
        """Go on to the tile on the left of the one that was fetched last, which is whole; pairs lie together."""
        for x in self.tensors.values():
            x.turn_left()

    def load(self, g: int) -> None:
        """Fetch what tensors hold for group ``g`` of that tile."""
        for x in self.tensors.values():
            x.load(g)

    def look_at(self, t, g, r, e) -> None:
        """A register is next."""
        self.register = (g, r, e)

    @property
    def here(self) -> Site:
        """The site of the register that is looked at, with the values of tensors that are in registers."""
        if not self.tensors:
            return self.at
        known = {name: x.value(*self.register) for name, x in self.tensors.items()}
        return replace(self.at, params={**self.at.params, **known})
