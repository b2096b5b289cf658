"""Elements of tensors over queries and keys for a whole tile of scores: two at a time, where they lie so.

An element at a time, as :class:`schedules.tile.parameters.Elements` reads them, costs the arithmetic of an address
each, in 64 bits.  Where all of a lane's columns exist, addresses are those of its rows plus a constant; and where two
neighbouring keys are neighbours in memory, at an address that is a multiple of both, one load has both.  A block finds
out once which of its tensors lie so, and each tile chooses between two texts.
"""

from __future__ import annotations

import dataclasses

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.definition.parameters import Reader, widened
from schedules.definition.pattern import Site
from schedules.tile.geometry import local, wide
from schedules.tile.parameters import Elements

#: Bytes of an element.
BYTES = {"float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "bool": 1}

_ALIGNED = """
__forceinline__ __device__ int is_multiple(const void* address, int bytes) {
  return (reinterpret_cast<unsigned long long>(address) & (bytes - 1)) == 0;
}
"""

_PAIR = """
__forceinline__ __device__ {type} load_pair_{size}(const void* address) {{
  return *reinterpret_cast<const {type}*>(address);
}}
"""

#: Bytes of two elements: the type of a register with both, in CUDA and in TIR.
_WORDS = {8: ("unsigned long long", "uint64"), 4: ("unsigned int", "uint32"), 2: ("unsigned short", "uint16")}


def _is_multiple(address: Expr, size: int) -> Expr:
    return T.cuda.func_call("is_multiple", address, size, source_code=_ALIGNED, return_type="int32") != 0


def _load_pair(address: Expr, dtype: str) -> Expr:
    size = 2 * BYTES[dtype]
    type_, word = _WORDS[size]
    source = _PAIR.format(type=type_, size=size)
    return T.cuda.func_call(f"load_pair_{size}", address, source_code=source, return_type=word)


def _half(pair: Expr, e: Expr, dtype: str) -> Expr:
    """The first or the second element of a pair, widened."""
    bits = 8 * BYTES[dtype]
    shifted = T.shift_right(pair, T.Cast(str(pair.ty.dtype), e * bits))
    if dtype == "bool":
        return T.bitwise_and(T.Cast("uint32", shifted), T.uint32(255)) != T.uint32(0)
    if dtype == "bfloat16":
        return T.reinterpret("float32", T.shift_left(T.Cast("uint32", shifted), T.uint32(16)))
    element = T.reinterpret(dtype, T.Cast(f"uint{bits}", shifted))
    return widened(element)


@dataclasses.dataclass(frozen=True)
class Fetched(Reader):
    """What has been read of a tensor: its value wherever it is asked for."""

    value: Expr

    def __call__(self, i: Expr, j: Expr) -> Expr:
        return self.value


@T.meta_class
class ElementPairs:
    """Those that the scores of ``rows`` rows of a lane read; columns are keys, or queries if ``transposed``: then
    neighbours are read one by one."""

    def __init__(self, at: Site, rows: int, transposed: bool):
        self.transposed = transposed
        self.elements = {name: x for name, x in at.params.items() if isinstance(x, Elements)}
        self.across, self.down = ("i", "j") if transposed else ("j", "i")
        # of each row the offset of this lane's first column
        self.first = {name: T.alloc_local([rows], "int64") for name in self.elements}
        self.pair = {
            name: T.alloc_local([1], _WORDS[2 * BYTES[x.dtype]][1])
            for name, x in self.elements.items()
            if self.across in x.strides and not transposed
        }
        lies = [self._lies_in_pairs(self.elements[name]) for name in self.pair]
        self.ready = local(T.Cast("int32", tirx.all(*lies))) if lies else None

    def _lies_in_pairs(self, x: Elements) -> Expr:
        even = [T.bitwise_and(stride, 1) == 0 for axis, stride in x.strides.items() if axis != "j"]
        return tirx.all(x.strides["j"] == 1, *even, _is_multiple(x.memory.ptr_to([0]), 2 * BYTES[x.dtype]))

    def covers(self, at: Site, last_column: Expr) -> Expr:
        """Whether a tile may be read this way: all of a lane's columns exist, and tensors lie as they should."""
        exists = last_column < (at.seqlen_q if self.transposed else at.seqlen_kv)
        return exists if self.ready is None else T.And(self.ready != 0, exists)

    def begin_row(self, n: Expr, i: Expr, j: Expr) -> None:
        """Row number ``n`` of the lane has its first column at query ``i`` and key ``j``."""
        for name, x in self.elements.items():
            T.buffer_store(self.first[name], x.offset(i, j, bounded=self.down), [n])

    def fetch(self, n: Expr, column: Expr) -> None:
        """Read what two columns of a row need, ``column`` from the first one on."""
        for name, pair in self.pair.items():
            x = self.elements[name]
            T.buffer_store(pair, _load_pair(x.memory.ptr_to([self.first[name][n] + wide(column)]), x.dtype), [0])

    def site(self, at: Site, n: Expr, column: Expr, e: Expr) -> Site:
        """``at`` with the values of a row and the column ``e`` of those that ``column`` begins."""
        values = dict(at.params)
        for name, x in self.elements.items():
            if name in self.pair:
                value = _half(self.pair[name][0], e, x.dtype)
            else:
                stride = wide(x.strides[self.across]) if self.across in x.strides else None
                offset = self.first[name][n] + (T.int64(0) if stride is None else wide(column + e) * stride)
                value = widened(x.memory[offset])
            values[name] = Fetched(value)
        return dataclasses.replace(at, params=values)
