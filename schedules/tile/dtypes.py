"""Element types: how many bytes they have, and what PTX calls them.  The one table that every family reads.

A type that a family is to compute needs a row here, and nothing else says how large it is: tiles, shared memory and the
strides of TMA follow from ``bytes``.  The tensors of a kernel need not have one type: :class:`TensorTypes` says which
each has.
"""

from __future__ import annotations

from dataclasses import dataclass

from schedules.definition.pattern import Pattern

#: Bytes that one vector load or store moves, that an ldmatrix row has, and that a swizzle keeps together.
CHUNK_BYTES = 16


@dataclass(frozen=True)
class ElementType:
    """``name`` is what TIR, NumPy and PyTorch call it, ``ptx`` the suffix of instructions on it."""

    name: str
    bytes: int
    ptx: str

    @property
    def chunk(self) -> int:
        """Elements in 16 bytes."""
        return CHUNK_BYTES // self.bytes

    @property
    def pack(self) -> str:
        """The PTX instruction that rounds two float32 to a register with two of these, its first operand above.

        It needs sm_80.
        """
        return f"cvt.rn.{self.ptx}x2.f32"


ELEMENT_TYPES = {
    t.name: t
    for t in (
        ElementType("float32", 4, "f32"),
        ElementType("float16", 2, "f16"),
        ElementType("bfloat16", 2, "bf16"),
        ElementType("float8_e4m3fn", 1, "e4m3"),
        ElementType("int8", 1, "s8"),
        ElementType("uint8", 1, "u8"),  # as which kernels take e4m3
    )
}


def element_type(name: str) -> ElementType:
    """The row of a type.

    Raises
    ------
    ValueError: the table has none of that name.
    """
    if name not in ELEMENT_TYPES:
        raise ValueError(f"element type {name!r} is unknown; expected one of {', '.join(ELEMENT_TYPES)}")
    return ELEMENT_TYPES[name]


@dataclass(frozen=True)
class TensorTypes:
    """The element types of a kernel's tensors.

    Probabilities are packed to the type of ``v``, with which they are multiplied.
    """

    q: ElementType
    k: ElementType
    v: ElementType
    o: ElementType


def tensor_types(pattern: Pattern) -> TensorTypes:
    """The types of a pattern's tensors: a definition gives all four the same today."""
    t = element_type(pattern.dtype)
    return TensorTypes(q=t, k=t, v=t, o=t)
