"""Values that the compiler must not keep: read or computed again wherever they are used.

In the loops of these kernels every register counts, and ptxas spills what it keeps beyond them.
"""

from __future__ import annotations

from tvm.ir import Expr
from tvm.script import tirx as T

_FRESH_INDEX = """
__forceinline__ __device__ int fresh_{name}() {{
  int x;
  asm volatile("mov.u32 %0, %%{register};" : "=r"(x));
  return x;
}}
"""


def fresh(register: str) -> Expr:
    """A special register such as ``"tid.x"``, read anew: nothing computed from it stays in registers across a loop.

    With S, P and O in registers there is no room for addresses, and ptxas would spill them.
    """
    name = register.replace(".", "_")
    source = _FRESH_INDEX.format(name=name, register=register)
    return T.cuda.func_call(f"fresh_{name}", source_code=source, return_type="int32")


_ANEW = """
__forceinline__ __device__ int anew(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
"""


def anew(value: Expr) -> Expr:
    """The value, as if it had just been read: what is computed from it isn't kept either."""
    return T.cuda.func_call("anew", value, source_code=_ANEW, return_type="int32")
