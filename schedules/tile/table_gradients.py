"""Gradients of tables on any GPU: any score may add to any element, and the sums have the same bits in any order.

The launch for dq has of each score its gradient with respect to the elements that it reads.  A lane adds up what
follows one another for the same element, on its way along diagonals of a tile; then it adds that *share* to the
element's sum in memory, where shares of all blocks arrive in any order.  So the sum is one of whole numbers: a float32
is a whole number of 24 bits times a power of two, and lands, cut in two at a multiple of 32 bits, in two neighbours of
five *limbs*, 64-bit numbers that are worth ``2^(32 n)`` times the least share.  What a limb gets of a share has 32 bits
at most, so that there is room for 2^31 shares an element.  A last launch puts the limbs together: the sum of shares is
exact, and is rounded once.

========= ============================================================================================
2^-100    a unit of the first limb: what a share has below is cut off
2^51      shares from here on, infinities and NaN set the element's flag, and its gradient is not a number
48        bytes of memory an element: limb by limb, so that neighbours in a table are neighbours there; a flag
========= ============================================================================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.attention import append_arguments
from schedules.definition.parameters import gradient_name, gradient_symbols
from schedules.definition.pattern import Pattern, Site
from schedules.tile.fragment import Fragment
from schedules.tile.geometry import flat, local, wide
from schedules.tile.tile_scheduler import ceildiv
from tvm_flash.packs.manifest import Param, Workspace
from tvm_flash.packs.sizes import elements_of

BLOCK, LANES = 16, 32
_LIMBS = 5
#: Words of 32 bits an element: two for each limb, and for the flag.
_WORDS = 2 * (_LIMBS + 1)
#: Threads of a block of the launches before and after, and blocks of the former.
_THREADS, _BLOCKS = 128, 512

_ADD_SHARE = f"""
__forceinline__ __device__ void add_share(void* sum, int elements, float share) {{
  unsigned bits = __float_as_uint(share);
  unsigned long long mantissa = bits & 0x7fffffu;
  int exponent = bits >> 23 & 0xff;
  if (exponent) mantissa |= 0x800000u; else exponent = 1;
  int place = exponent - 50;
  if (place < 0) {{ mantissa = place > -32 ? mantissa >> -place : 0; place = 0; }}
  long long stride = (long long)elements * 8;
  char* limb = (char*)sum + (place >> 5) * stride;
  if (place >= {32 * (_LIMBS - 1)}) {{ limb = (char*)sum + {_LIMBS} * stride; mantissa = 1; place = 0; bits = 0; }}
  mantissa <<= place & 31;
  unsigned long long low = mantissa & 0xffffffffull, high = mantissa >> 32;
  if (bits >> 31) {{ low = -low; high = -high; }}
  if (low) asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" :: "l"(limb), "l"(low) : "memory");
  limb += stride;
  if (high) asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" :: "l"(limb), "l"(high) : "memory");
}}
"""

_SUM_OF_LIMBS = f"""
__forceinline__ __device__ float sum_of_limbs(const void* sum, int elements) {{
  const long long* limb = (const long long*)sum;
  long long digits[{_LIMBS}], carry = 0;
  for (int n = 0; n < {_LIMBS}; n++) {{
    long long x = limb[n * (long long)elements] + carry;
    carry = x >> 32;
    digits[n] = n < {_LIMBS - 1} ? x & 0xffffffffll : x;
  }}
  double value = 0;
  for (int n = {_LIMBS - 1}; n >= 0; n--) value = value * 4294967296.0 + (double)digits[n];
  if (limb[{_LIMBS} * (long long)elements]) return __uint_as_float(0x7fffffffu);
  return (float)(value * {2.0**-100!r});
}}
"""


def add_share(total, elements, share):
    """Add a share to the sum whose first limb is at ``total``; limbs are ``elements`` apart."""
    return T.cuda.func_call("add_share", total, elements, share, source_code=_ADD_SHARE)


def _sum_of_limbs(total, elements) -> Expr:
    return T.cuda.func_call("sum_of_limbs", total, elements, source_code=_SUM_OF_LIMBS, return_type="float32")


def learnt_tables(pattern: Pattern) -> tuple[Param, ...]:
    """The tables that ask for a gradient."""
    return tuple(p for p in pattern.learnt if p.rank)


def _role(param: Param) -> str:
    return f"{gradient_name(param)}_sums"


def workspace(param: Param) -> Workspace:
    """Memory for the sums of a table; of one whose gradient nobody asks it is that of a single element."""
    return Workspace(_role(param), "int32", (("*", _WORDS, elements_of(gradient_name(param))),))


class TableSums:
    """The sums that a launch adds to, as further arguments of it."""

    def __init__(self, params: tuple[Param, ...]):
        self.params = params
        self.roles = tuple(map(_role, params))
        self.arguments = [tirx.decl_buffer([tirx.Var(f"{x}_length", "int32")], "int32", name=x) for x in self.roles]

    def elements(self, n: int) -> Expr:
        """How many elements the ``n``-th has room for."""
        return T.truncdiv(self.arguments[n].shape[0], _WORDS)


@dataclass(frozen=True)
class Slices:
    """How a warp's scores of an m-tile, ``columns`` columns, pass through its part of shared memory: a slice at a time,
    so that lanes walk along diagonals of blocks of 16 x 16 scores, which positions often give the same element.

    A slice is one such block, half of whose rows a lane has, or two.
    """

    fragment: Fragment
    columns: int

    @property
    def width(self) -> int:
        """Columns of a slice."""
        two = 2 * BLOCK * BLOCK // self.fragment.tile_rows
        return two if self.columns % two == 0 else BLOCK

    @property
    def pitch(self) -> int:
        """Elements from one row to the next: so many that a fragment's stores meet in no bank."""
        return self.width + 8

    @property
    def elements(self) -> int:
        """Those of a warp's part."""
        return self.fragment.tile_rows * self.pitch

    @property
    def steps(self) -> int:
        """Scores of a slice that a lane walks over."""
        return self.fragment.tile_rows * self.width // LANES

    def place(self, lane: Expr, step: Expr) -> tuple[Expr, Expr]:
        """Row and column of a lane's score number ``step`` in a slice."""
        half = T.truncdiv(lane, BLOCK)
        row = step if self.width > BLOCK else half * (self.fragment.tile_rows // 2) + step
        column = T.truncmod(lane + row, BLOCK)
        return row, column + half * BLOCK if self.width > BLOCK else column

    def memory(self, pool, warps: int):
        """What a block needs."""
        return pool.alloc((warps, self.elements), "float32", align=16)

    def bytes(self, warps: int) -> int:
        """How much that is."""
        return 4 * warps * self.elements


@T.meta_class
class TableGradients:
    """A lane's shares in the gradients of tables, at a site; ``memory`` is that of :class:`Slices`.

    Of each element that the expression reads it has two, of the element that it is at and of the one before: lanes turn
    to another diagonal in different steps, and add what they have left all at once after a slice.
    """

    def __init__(self, sums: TableSums, pattern: Pattern, at: Site, slices: Slices, memory, warp: Expr, lane: Expr):
        self.params, self.pattern, self.at, self.slices, self.lane = sums.params, pattern, at, slices, lane
        self.memory, self.warp = memory, warp
        self.sums, self.elements, self.counts, self.element, self.share = {}, {}, {}, {}, {}
        for n, p in enumerate(self.params):
            size = math.prod(at.params[p.name].shape, start=T.int32(1))
            self.sums[p.name] = flat(sums.arguments[n])
            self.elements[p.name] = local(T.Select(sums.elements(n) >= size, sums.elements(n), 0))
            self.counts[p.name] = 2 * pattern.elements_read(p.name)
            self.element[p.name] = T.alloc_local([self.counts[p.name]], "int32")
            self.share[p.name] = T.alloc_local([self.counts[p.name]], "float32")
            for x in range(self.counts[p.name]):
                T.buffer_store(self.element[p.name], T.int32(0), [x])
                T.buffer_store(self.share[p.name], T.float32(0), [x])

    @property
    def wanted(self) -> Expr:
        """Whether the gradient of any table is asked for."""
        return tirx.any(*(x > 0 for x in self.elements.values()))

    def put(self, g: int, r: Expr, pair) -> None:
        """What the registers of two columns of group ``g`` of a slice have, to shared memory."""
        f = self.slices.fragment
        row = f.row(self.lane) + r * f.row_step
        at = row * self.slices.pitch + f.column(self.lane) + g * f.group
        with T.vectorized(2) as e:
            T.buffer_store(self.memory, pair[e], [self.warp, at + e])

    def add(self, param: Param, number: int, row: Expr, column: Expr, chosen) -> None:
        """Add what is in shared memory to the ``number``-th element of a table that the expression reads, for a slice
        whose first query is ``row`` and first key ``column``."""
        share, n = self.share[param.name], 2 * number
        with T.If(self.elements[param.name] > 0), T.Then():
            with T.serial(self.slices.steps) as step:
                i, j = self.slices.place(self.lane, step)
                found = self._element(param, number, row + i, column + j, chosen)
                value = self.memory[self.warp, i * self.slices.pitch + j]
                self._add(param, n, *(local(x).source[0] for x in (found, value)))
            with T.If(share[n + 1] != T.float32(0)), T.Then():
                for x in (n, n + 1):
                    self._leave(param, x)
                    T.buffer_store(share, T.float32(0), [x])

    def leave(self) -> None:
        """Add what the lane still has to the sums."""
        for p in self.params:
            with T.If(self.elements[p.name] > 0), T.Then():
                for n in range(self.counts[p.name]):
                    self._leave(p, n)

    def _element(self, param: Param, number: int, i: Expr, j: Expr, chosen) -> Expr:
        """The number of an element, row by row."""
        index, _ = self.pattern.table_gradients(param.name, self.at, T.float32(0), i, j, chosen)[number]
        found = T.int32(0)
        for x, size in zip(index, self.at.params[param.name].shape, strict=True):
            found = found * size + x
        return found

    def _add(self, param: Param, n: int, found: Expr, value: Expr) -> None:
        """Add to share ``n`` if it is that of the element ``found``; else it becomes the earlier one, ``n + 1``."""
        element, share = self.element[param.name], self.share[param.name]
        turns = local(T.And(found != element[n], value != T.float32(0))).source[0]
        with T.If(T.And(turns, share[n + 1] != T.float32(0))), T.Then():
            self._leave(param, n + 1)
        for x in (element, share):
            T.buffer_store(x, T.Select(turns, x[n], x[n + 1]), [n + 1])
        T.buffer_store(element, T.Select(turns, found, element[n]), [n])
        T.buffer_store(share, T.Select(turns, T.float32(0), share[n]) + value, [n])

    def _leave(self, param: Param, n: int) -> None:
        """Add a share to its element's sum."""
        share = self.share[param.name][n]
        with T.If(share != T.float32(0)), T.Then():
            at = wide(self.element[param.name][n]) * T.int64(2)
            T.evaluate(add_share(self.sums[param.name].ptr_to([at]), self.elements[param.name], share))


def clear(params: tuple[Param, ...], name: str) -> PrimFunc:
    """The launch ``(*sums)`` that makes the sums of all tables 0."""
    sums = TableSums(params)

    @T.prim_func(check_well_formed=False)
    def kernel():
        T.device_entry()
        block = T.cta_id([_BLOCKS])
        thread = T.thread_id([_THREADS])
        T.evaluate(_clear(sums, block * _THREADS + thread))

    return append_arguments(kernel.with_attr("global_symbol", name), sums.arguments)


def _clear(sums: TableSums, first: Expr) -> int:
    for x in sums.arguments:
        steps = ceildiv(T.max(x.shape[0] - first, 0), _BLOCKS * _THREADS)
        with T.serial(steps) as step:
            T.buffer_store(flat(x), T.int32(0), [wide(first) + wide(step) * (_BLOCKS * _THREADS)])
    return 0


def finish(param: Param, name: str) -> PrimFunc:
    """The launch ``(sums, gradient)`` that makes a table's gradient of its sums."""
    sums = TableSums((param,))
    arguments, gradients = gradient_symbols((param,), "int32")
    out, elements = gradients[param.name], sums.elements(0)

    @T.prim_func(check_well_formed=False)
    def kernel():
        T.device_entry()
        block = T.cta_id([ceildiv(elements, _THREADS)])
        thread = T.thread_id([_THREADS])
        number = block * _THREADS + thread
        if number < elements:
            place = T.meta_var(_place(number, out))
            memory, total = T.meta_var((flat(sums.arguments[0]), flat(out)))
            total[place] = _sum_of_limbs(memory.ptr_to([wide(number) * T.int64(2)]), elements)

    return append_arguments(kernel.with_attr("global_symbol", name), [*sums.arguments, *arguments])


def _place(number: Expr, out) -> Expr:
    """Where an element is in a tensor, by its number."""
    place = T.int64(0)
    for size, stride in reversed(list(zip(out.shape, out.ty.strides, strict=True))):
        place = place + wide(T.truncmod(number, size)) * wide(stride)
        number = T.truncdiv(number, size)
    return place
