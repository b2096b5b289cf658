"""What a tensor holds for a step's scores, in registers: fetched while the products before are computed.

A thread reads both columns of a register pair at once, where they lie beside each other in memory and the tile of keys
is whole; else element by element, those of keys and queries that there are not from the last one.  Loads are
instructions that the compiler can't move behind the wait for the scores.
"""

from __future__ import annotations

from tvm.script import tirx as T

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
    """The values of ``param``, a tensor with an axis of keys, at the scores of one m-tile of ``columns`` columns.

    A pair of 32-bit elements takes two words, one of 16-bit elements a word, and of bytes the word that they are in.
    """

    def __init__(self, param: Param, elements: Elements, fragment: Fragment, columns: int, lane, box=None):
        self.param, self.elements, self.fragment, self.lane, self.box = param, elements, fragment, lane, box
        self.groups, self.rows = columns // fragment.group, 2 if "i" in param.axes else 1
        self.bytes = BYTES[param.dtype]
        self.per_pair = 2 if self.bytes == 4 else 1
        self.words = T.alloc_local([self.groups * self.rows * self.per_pair], "uint32")
        # whether pairs are words that lie together in every row
        strides, unit = elements.strides, max(4, 2 * self.bytes)
        place = elements.memory.ptr_to([elements.first + T.int64(0)])
        aligned = T.cuda.func_call("is_aligned", place, unit, source_code=_ALIGNED, return_type="int32")
        pairs = T.And(strides["j"] == 1, aligned != 0)
        if "i" in strides:
            pairs = T.And(pairs, T.bitwise_and(strides["i"] * self.bytes, unit - 1) == 0)
        self.pairs = local(T.Cast("int32", pairs))

    def _first(self, rows, column0):
        """Elements before those of this lane's first pair, in each of its rows ``rows``."""
        e = self.elements
        down = [wide(T.min(i, e.lengths["i"] - 1)) * wide(e.strides["i"]) for i in rows] if self.rows == 2 else [0]
        column = column0 if self.bytes > 1 else column0 - T.bitwise_and(self.lane, 1) * 2
        return [e.first + T.int64(0) + x + wide(column) for x in down]

    def _shift(self):
        """Where a pair of bytes begins in its word."""
        return T.Cast("uint32", T.bitwise_and(self.lane, 1) * 16)

    def _word(self, g, r) -> int:
        return (g * self.rows + r) * self.per_pair

    def fetch(self, rows, column0, last):
        """Fetch a step's values.

        ``rows`` are this lane's two queries, ``column0`` its first key and ``last`` the last of the tile.
        """
        with T.If(T.And(self.pairs != 0, last < self.elements.lengths["j"])):
            with T.Then():
                self._fetch_pairs(rows, column0)
            with T.Else():
                self._fetch_elements(rows, column0)

    def fetch_box(self, row, stage):
        """Fetch a step's values from the box of TMA in a stage; the warp's rows begin with ``row`` of the work tile."""
        for g in range(self.groups):
            for r in range(self.rows):
                place = self.box.pair(self.fragment, self.lane, row, stage, g, r)
                words = [self.words[self._word(g, r) + x] for x in range(self.per_pair)]
                T.evaluate(T.ptx["ld.shared.v2.b32" if self.per_pair == 2 else "ld.shared.b32"](*words, place))

    def _fetch_pairs(self, rows, column0):
        for r, first in enumerate(self._first(rows, column0)):
            at = local(first)
            for g in range(self.groups):
                place = self.elements.memory.ptr_to([at + g * self.fragment.group])
                words = [self.words[self._word(g, r) + x] for x in range(self.per_pair)]
                T.evaluate(T.ptx["ld.global.v2.b32" if self.per_pair == 2 else "ld.global.b32"](*words, place))

    def _fetch_elements(self, rows, column0):
        for g in range(self.groups):
            for r in range(self.rows):
                bits = []
                for e in range(2):
                    at = self.elements.offset(rows[r], column0 + (g * self.fragment.group + e))
                    bits.append(self._bits(self.elements.memory[at], e))
                words = bits if self.per_pair == 2 else [T.bitwise_or(*bits)]
                for x, word in enumerate(words):
                    T.buffer_store(self.words, word, [self._word(g, r) + x])

    def _bits(self, value, e):
        """Element ``e`` of a pair where it is in its word."""
        if self.bytes == 4:
            return T.reinterpret("uint32", value)
        if self.bytes == 2:
            return T.shift_left(T.Cast("uint32", T.reinterpret("uint16", value)), T.uint32(16 * e))
        return T.shift_left(T.Cast("uint32", value), self._shift() + T.uint32(8 * e))

    def value(self, g, r, e) -> Fetched:
        """That of a register; ``g``, ``r`` and ``e`` may be counts of loops that are unrolled."""
        word, e = self._word(g, r if self.rows == 2 else 0), T.Cast("uint32", e)
        if self.per_pair == 2:
            return Fetched(T.reinterpret(self.param.dtype, self.words[word + T.Cast("int32", e)]))
        if self.bytes == 1:
            byte = T.shift_right(self.words[word], self._shift() + e * T.uint32(8))
            return Fetched(T.bitwise_and(byte, T.uint32(1)) != T.uint32(0))
        half = T.shift_right(self.words[word], e * T.uint32(16))
        if self.param.dtype == "bfloat16":
            return Fetched(T.reinterpret("float32", T.shift_left(half, T.uint32(16))))
        return Fetched(T.Cast("float32", T.reinterpret("float16", T.Cast("uint16", half))))
