"""What turns new queries and keys and puts new keys and values into a cache, as a kind of the CPU family's kernels.

The interface of a kind is described in :mod:`schedules.families.interface`.  Queries are shared among threads by rows,
keys and values by heads: of keys that come to one place that of the last row is to stand there, so that a head's rows
are written in their order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.cache import narrowed
from schedules.definition.pattern import Pattern
from schedules.families.cpu.flat import UNBOUNDED, flat
from schedules.families.cpu.pipeline import PIPELINE
from schedules.families.interface import Program, Rejected, ScheduledLaunch, Target
from schedules.tile.dtypes import element_type
from schedules.tile.tile_scheduler import Traversal
from tvm_flash.packs.manifest import APPEND, APPEND_ROLES, CACHE_FORMATS, INTERLEAVED, UNTURNED


@dataclass(frozen=True)
class Config:
    """There is nothing to choose."""


def default_configs(template: str, pattern: Pattern, target: Target) -> dict[int, Config]:
    """The only one."""
    return {0: Config()}


def space(template: str, pattern: Pattern, target: Target) -> Mapping[str, tuple]:
    """Nothing to search."""
    return {}


def feasible(pattern: Pattern, config: Config, target: Target) -> Rejected | None:
    """It always is."""
    return None


def program(pattern: Pattern, config: Config, target: Target, traversal: Traversal, name: str) -> Program:
    """The kernel."""
    func = _kernel(pattern.dtype, max(pattern.head_dim, pattern.head_dim_v), name)
    alignment = element_type(pattern.dtype).bytes
    return Program(APPEND, (ScheduledLaunch(func, APPEND_ROLES),), PIPELINE, alignment=alignment, index_bits=64)


#: Elements that are computed at once: what every head_dim is a multiple of.
_TOGETHER = 8
#: What elements of a dtype are taken as: TVM computes with no bfloat16.
_STORED = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}


def _widened(x: Expr, dtype: str) -> Expr:
    """An element as float32."""
    if dtype == "bfloat16":
        return T.reinterpret("float32", T.shift_left(T.cast(x, "uint32"), T.uint32(16)))
    return x if dtype == "float32" else T.cast(x, "float32")


def _rounded(x: Expr, dtype: str) -> Expr:
    """A float32 as an element, to the nearest and ties to even; NaN is NaN."""
    if dtype != "bfloat16":
        return x if dtype == "float32" else T.cast(x, dtype)
    bits = T.reinterpret("uint32", x)
    high = T.shift_right(bits, T.uint32(16))
    nearest = T.shift_right(bits + T.uint32(0x7FFF) + T.bitwise_and(high, T.uint32(1)), T.uint32(16))
    is_nan = T.bitwise_and(bits, T.uint32(0x7FFFFFFF)) > T.uint32(0x7F800000)
    return T.cast(T.Select(is_nan, T.bitwise_or(high, T.uint32(0x40)), nearest), "uint16")


def _product(x: Expr, y: Expr, dtype: str) -> Expr:
    """A product of an element and an angle, rounded to float32 before anything is added; those of 16 bits are exact."""
    return T.call_llvm_pure_intrin("float32", "llvm.arithmetic.fence", x * y) if dtype == "float32" else x * y


@dataclass(frozen=True)
class Tensor:
    """A tensor argument: its elements as a flat buffer, and its strides."""

    flat: tirx.Buffer
    strides: tuple[Expr, ...]

    def at(self, *index: Expr) -> Expr:
        """Where an element is, or a row."""
        return sum((i * s for i, s in zip(index, self.strides, strict=False)), T.int64(0))


def _argument(handle, name: str, shape, dtype: str, dense: bool = True):
    """A buffer of any strides, whose last dimension is contiguous if it is ``dense``, and those strides."""
    strides = [tirx.Var(f"{name}_stride_{i}", "int64") for i in range(len(shape) - dense)]
    strides = [*strides, T.int64(1)] if dense else strides
    return T.match_buffer(handle, shape, dtype, strides=strides), tuple(strides)


def _flat(argument, dtype: str) -> Tensor:
    """The same as a kernel reads it."""
    buffer, strides = argument
    return Tensor(flat(buffer, dtype), strides)


@T.inline
def _find(starts, batch, row, sequence):
    """Set ``sequence`` to the last one that begins at or before a row."""
    sequence = T.int64(0)
    end: T.int64 = batch
    while sequence + 1 < end:
        middle: T.int64 = T.truncdiv(sequence + end, T.int64(2))
        if T.cast(starts[middle], "int64") <= row:
            sequence = middle
        else:
            end = middle


def _kernel(dtype: str, widest: int, name: str) -> PrimFunc:
    stored = _STORED[dtype]

    @T.inline
    def look_up(cos, sin, at, half, turns, c, s):
        """What each element of a row is multiplied with, and the one that it is turned with."""
        for i in T.serial(half):
            x: T.float32 = _widened(cos.flat[cos.at(at, i)], dtype)
            y: T.float32 = _widened(sin.flat[sin.at(at, i)], dtype)
            first: T.int64 = T.Select(turns == INTERLEAVED, i * 2, i)
            second: T.int64 = T.Select(turns == INTERLEAVED, i * 2 + 1, i + half)
            c[first] = x
            c[second] = x
            s[first] = y * T.float32(-1)
            s[second] = y

    @T.inline
    def widen(x, row, width, made):
        """Elements of a row as float32."""
        for j in T.serial(width // _TOGETHER):
            for lane in T.vectorized(_TOGETHER):
                made[j * _TOGETHER + lane] = _widened(x.flat[row + j * _TOGETHER + lane], dtype)

    @T.inline
    def turn(x, row, width, half, turns, c, s, own, other, made):
        """The elements of a row turned, as float32 that is still to be rounded to the dtype."""
        widen(x, row, width, own)
        if turns == INTERLEAVED:
            for i in T.serial(half):
                other[i * 2] = own[i * 2 + 1]
                other[i * 2 + 1] = own[i * 2]
        else:
            for i in T.serial(half):
                other[i] = own[i + half]
                other[i + half] = own[i]
        for j in T.serial(half * 2 // _TOGETHER):
            for lane in T.vectorized(_TOGETHER):
                d = T.meta_var(j * _TOGETHER + lane)
                made[d] = _product(own[d], c[d], dtype) + _product(other[d], s[d], dtype)
        for d in T.serial(half * 2 // _TOGETHER * _TOGETHER, half * 2):
            made[d] = _product(own[d], c[d], dtype) + _product(other[d], s[d], dtype)
        for d in T.serial(half * 2, width):
            made[d] = own[d]

    @T.inline
    def round_row(made, width, to, first):
        """A row to where elements of the dtype are."""
        for j in T.serial(width // _TOGETHER):
            for lane in T.vectorized(_TOGETHER):
                to[first + j * _TOGETHER + lane] = _rounded(made[j * _TOGETHER + lane], dtype)

    @T.inline
    def copy_row(x, row, width, to, first):
        """A row as it is."""
        for j in T.serial(width // _TOGETHER):
            for lane in T.vectorized(_TOGETHER):
                to[first + j * _TOGETHER + lane] = x.flat[row + j * _TOGETHER + lane]

    @T.inline
    def quantise_row(made, width, to, first, scale, cache):
        """A row to where elements of 8 bits are."""
        for j in T.serial(width // _TOGETHER):
            for lane in T.vectorized(_TOGETHER):
                element = T.meta_var(_widened(_rounded(made[j * _TOGETHER + lane], dtype), dtype))
                to[first + j * _TOGETHER + lane] = T.cast(narrowed(element / scale, cache), "uint8")

    @T.inline
    def write(x, row, width, is_turned, made, cache, typed, page, inside, head, scales, cache_format):
        """A row to its place in a cache: from ``made`` if it ``is_turned``, or as it is."""
        place: T.int64 = cache.at(page, inside, head)
        if cache_format == 0:
            first: T.int64 = T.truncdiv(place, T.int64(element_type(dtype).bytes))
            if is_turned:
                round_row(made, width, typed, first)
            else:
                copy_row(x, row, width, typed, first)
        else:
            scale: T.float32 = scales.flat[scales.at(page, head)]
            if not is_turned:
                widen(x, row, width, made)
            if cache_format == CACHE_FORMATS["int8"]:
                quantise_row(made, width, cache.flat, place, scale, "int8")
            else:
                quantise_row(made, width, cache.flat, place, scale, "float8_e4m3fn")

    @T.prim_func(s_tir=True, check_well_formed=False)
    def append(
        q: T.handle,
        o: T.handle,
        k_new: T.handle,
        v_new: T.handle,
        k: T.handle,
        v: T.handle,
        cu_seqlens_q: T.handle,
        cu_seqlens_k: T.handle,
        cache_seqlens: T.handle,
        rotary_seqlens: T.handle,
        page_table: T.handle,
        rotary_cos: T.handle,
        rotary_sin: T.handle,
        k_scale: T.handle,
        v_scale: T.handle,
        turns: T.int32,
        along: T.int32,
        cache_format: T.int32,
    ):
        T.func_attr({"global_symbol": name})
        total_q, heads, width_q, total_new, kv_heads = T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        head_dim, head_dim_v, batch, ends_q, ends_k = T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        pages, page_size, columns, positions, half = T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        k_bytes, v_bytes = T.int64(), T.int64()
        Q = T.meta_var(_argument(q, "q", (total_q, heads, width_q), dtype))
        O = T.meta_var(_argument(o, "o", (total_q, heads, width_q), dtype))
        KN = T.meta_var(_argument(k_new, "k_new", (total_new, kv_heads, head_dim), dtype))
        VN = T.meta_var(_argument(v_new, "v_new", (total_new, kv_heads, head_dim_v), dtype))
        K = T.meta_var(_argument(k, "k", (pages, page_size, kv_heads, k_bytes), "uint8"))
        V = T.meta_var(_argument(v, "v", (pages, page_size, kv_heads, v_bytes), "uint8"))
        q_starts = T.match_buffer(cu_seqlens_q, (ends_q,), "int32", align=4)
        k_starts = T.match_buffer(cu_seqlens_k, (ends_k,), "int32", align=4)
        before = T.match_buffer(cache_seqlens, (batch,), "int32", align=4)
        first = T.match_buffer(rotary_seqlens, (batch,), "int32", align=4)
        TABLE = T.meta_var(_argument(page_table, "page_table", (batch, columns), "int32"))
        COS = T.meta_var(_argument(rotary_cos, "rotary_cos", (positions, half), dtype, dense=False))
        SIN = T.meta_var(_argument(rotary_sin, "rotary_sin", (positions, half), dtype, dense=False))
        KS = T.meta_var(_argument(k_scale, "k_scale", (pages, kv_heads), "float32", dense=False))
        VS = T.meta_var(_argument(v_scale, "v_scale", (pages, kv_heads), "float32", dense=False))
        queries = T.meta_var(_flat(Q, stored))
        turned = T.meta_var(_flat(O, stored))
        keys = T.meta_var(_flat(KN, stored))
        values = T.meta_var(_flat(VN, stored))
        k_cache = T.meta_var(_flat(K, "uint8"))
        v_cache = T.meta_var(_flat(V, "uint8"))
        k_typed = T.decl_buffer((T.int64(UNBOUNDED),), stored, data=K[0].data)
        v_typed = T.decl_buffer((T.int64(UNBOUNDED),), stored, data=V[0].data)
        table = T.meta_var(_flat(TABLE, "int32"))
        cos = T.meta_var(_flat(COS, stored))
        sin = T.meta_var(_flat(SIN, stored))
        k_scales = T.meta_var(_flat(KS, "float32"))
        v_scales = T.meta_var(_flat(VS, "float32"))

        # 1. Queries; those after the last sequence stay as they are.
        if turns != UNTURNED:
            T.evaluate(T.call_extern("void", "tvm_flash_announce", total_q, total_q * heads * width_q))
            for row in T.parallel(total_q):
                with T.sblock("turned"):
                    T.reads()
                    T.writes()
                    c = T.sblock_alloc_buffer((widest,), "float32", scope="local")
                    s = T.sblock_alloc_buffer((widest,), "float32", scope="local")
                    own = T.sblock_alloc_buffer((widest,), "float32", scope="local")
                    other = T.sblock_alloc_buffer((widest,), "float32", scope="local")
                    made = T.sblock_alloc_buffer((widest,), "float32", scope="local")
                    b: T.int64 = T.int64(0)
                    _find(q_starts, ends_q - 1, row, b)
                    begin: T.int64 = T.cast(q_starts[b], "int64")
                    is_of_sequence: T.bool = T.And(row >= begin, row < T.cast(q_starts[b + 1], "int64"))
                    position: T.int64 = T.cast(first[b], "int64") + T.Select(along != 0, row - begin, T.int64(0))
                    at: T.int64 = T.max(T.min(position, positions - 1), T.int64(0))
                    look_up(cos, sin, at, half, turns, c, s)
                    for h in T.serial(heads):
                        begins: T.int64 = queries.at(row, h)
                        to: T.int64 = turned.at(row, h)
                        if is_of_sequence:
                            turn(queries, begins, width_q, half, turns, c, s, own, other, made)
                            round_row(made, width_q, turned.flat, to)
                        else:
                            copy_row(queries, begins, width_q, turned.flat, to)

        # 2. Keys and values.
        T.evaluate(
            T.call_extern("void", "tvm_flash_announce", kv_heads, total_new * kv_heads * (head_dim + head_dim_v))
        )
        for head in T.parallel(kv_heads):
            with T.sblock("appended"):
                T.reads()
                T.writes()
                c = T.sblock_alloc_buffer((widest,), "float32", scope="local")
                s = T.sblock_alloc_buffer((widest,), "float32", scope="local")
                own = T.sblock_alloc_buffer((widest,), "float32", scope="local")
                other = T.sblock_alloc_buffer((widest,), "float32", scope="local")
                made = T.sblock_alloc_buffer((widest,), "float32", scope="local")
                for b in T.serial(batch):
                    begin: T.int64 = T.max(T.cast(k_starts[b], "int64"), T.int64(0))
                    end: T.int64 = T.min(T.cast(k_starts[b + 1], "int64"), total_new)
                    for row in T.serial(begin, end):
                        position: T.int64 = T.cast(before[b], "int64") + (row - begin)
                        column: T.int64 = T.truncdiv(T.max(position, T.int64(0)), page_size)
                        inside: T.int64 = T.max(position, T.int64(0)) - column * page_size
                        page: T.int64 = T.int64(-1)
                        if T.And(position >= 0, column < columns):
                            page = T.cast(table.flat[table.at(b, column)], "int64")
                        if T.And(page >= 0, page < pages):
                            at: T.int64 = T.cast(first[b], "int64") + (row - begin)
                            at = T.max(T.min(at, positions - 1), T.int64(0))
                            new_key: T.int64 = keys.at(row, head)
                            new_value: T.int64 = values.at(row, head)
                            if turns != UNTURNED:
                                look_up(cos, sin, at, half, turns, c, s)
                                turn(keys, new_key, head_dim, half, turns, c, s, own, other, made)
                            is_turned: T.bool = turns != UNTURNED
                            write(
                                *(keys, new_key, head_dim, is_turned, made, k_cache, k_typed, page, inside, head),
                                *(k_scales, cache_format),
                            )
                            write(
                                *(values, new_value, head_dim_v, T.bool(False), made, v_cache, v_typed, page, inside),
                                *(head, v_scales, cache_format),
                            )

    return append
