"""Sums of float32 tiles in memory to which blocks add one after the other, in the order of their numbers.

What a thread adds are accumulators, four at a time; a tile is in the order of accumulators, so that a warp's
instruction covers 512 bytes.  How far a block has come is a number in memory that grows: the next block waits until it
is large enough, and a block tells only every so many tiles, since that waits for all that has been added.
"""

from __future__ import annotations

from tvm.ir import Expr
from tvm.script import tirx as T

_STORE = """
__forceinline__ __device__ void store_tile(void* to, float a, float b, float c, float d) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" :: "l"(to), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}
"""

_ADD = """
__forceinline__ __device__ void add_to_tile(void* to, float a, float b, float c, float d) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
               :: "l"(to), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}
"""

_STORE_ELEMENT = """
__forceinline__ __device__ void store_element(void* to, float a) {
  asm volatile("st.global.f32 [%0], %1;" :: "l"(to), "f"(a) : "memory");
}
"""

_ADD_ELEMENT = """
__forceinline__ __device__ void add_element(void* to, float a) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" :: "l"(to), "f"(a) : "memory");
}
"""

_TAKE_ELEMENT = """
__forceinline__ __device__ void take_element(float* to, const void* from) {
  float a;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(a) : "l"(from) : "memory");
  *to = a;
}
"""

_ADD_PAIR = """
__forceinline__ __device__ void add_pair(void* to, float a, float b) {
  asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" :: "l"(to), "f"(a), "f"(b) : "memory");
}
"""

_TAKE = """
__forceinline__ __device__ void take_tile(float* to, const void* from) {
  float a, b, c, d;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(a), "=f"(b), "=f"(c), "=f"(d) : "l"(from) : "memory");
  to[0] = a; to[1] = b; to[2] = c; to[3] = d;
}
"""

_PREFETCH = """
__forceinline__ __device__ void prefetch_tile(const void* tile, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(tile), "r"(bytes) : "memory");
}
"""

_TELL = """
__forceinline__ __device__ void tell(void* progress, int count) {
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
  asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" :: "l"(progress), "r"(count) : "memory");
}
"""

_AWAIT = """
__forceinline__ __device__ int await_count(const void* progress, int known, int wanted) {
  while (known < wanted) {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(known) : "l"(progress) : "memory");
  }
  return known;
}
"""


def store_tile(to, a, b, c, d):
    """Four accumulators, as the first of a tile."""
    return T.cuda.func_call("store_tile", to, a, b, c, d, source_code=_STORE)


def add_to_tile(to, a, b, c, d):
    """Four accumulators, added to what is there."""
    return T.cuda.func_call("add_to_tile", to, a, b, c, d, source_code=_ADD)


def store_element(to, a):
    """One accumulator, as the first of an element; a warp's are side by side."""
    return T.cuda.func_call("store_element", to, a, source_code=_STORE_ELEMENT)


def add_element(to, a):
    """One accumulator, added to what is there: before Hopper there are no wider sums in memory."""
    return T.cuda.func_call("add_element", to, a, source_code=_ADD_ELEMENT)


def take_element(to, source):
    """What is there, to the number at ``to``."""
    return T.cuda.func_call("take_element", to, source, source_code=_TAKE_ELEMENT)


def add_pair(to, a, b):
    """Two neighbours of a row, added to what is there."""
    return T.cuda.func_call("add_pair", to, a, b, source_code=_ADD_PAIR)


def take_tile(to, source):
    """What is there, to the four numbers from ``to`` on."""
    return T.cuda.func_call("take_tile", to, source, source_code=_TAKE)


def prefetch_tile(tile, size: int):
    """One thread: start to bring ``size`` bytes of sums into the cache."""
    return T.cuda.func_call("prefetch_tile", tile, size, source_code=_PREFETCH)


def tell(progress, count: Expr):
    """One thread: ``count`` tiles are added, by it or by threads whose writes it has seen."""
    return T.cuda.func_call("tell", progress, count, source_code=_TELL)


def await_count(progress, known: Expr, wanted: Expr) -> Expr:
    """One thread: wait until ``wanted`` tiles are told of; how many are, of which ``known`` were known before."""
    return T.cuda.func_call("await_count", progress, known, wanted, source_code=_AWAIT, return_type="int32")
