"""What lanes that share a row give each other."""

from __future__ import annotations

from tvm.ir import Expr
from tvm.script import tirx as T

#: ldmatrix gives a lane four bytes of a row where an operand has two and the two that are eight further on: those of
#: two other lanes of the four that share the row.
_EXCHANGE = """
__forceinline__ __device__ unsigned int operand_bytes(unsigned int word, int lane) {
  int from = (lane & 28) | (lane >> 1 & 1);
  unsigned int low = __shfl_sync(0xffffffffu, word, from, 32);
  unsigned int high = __shfl_sync(0xffffffffu, word, from + 2, 32);
  return __byte_perm(low, high, (lane & 1) ? 0x7632 : 0x5410);
}
"""


def operand_bytes(word: Expr, lane: Expr) -> Expr:
    """Of ``word`` a byte for each of four neighbouring columns, as ldmatrix gives it: those of the columns that a lane
    has of an operand or a score, two and the two that are eight further on."""
    return T.cuda.func_call("operand_bytes", word, lane, source_code=_EXCHANGE, return_type="uint32")
