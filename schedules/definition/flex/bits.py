"""Operations of PyTorch on bits, as others of which more is known: quotients, remainders, logic."""

from __future__ import annotations

from schedules.definition.flex.rules import Node

#: Shifts, and the operation by a power of two that each is.
SHIFTS = {
    **dict.fromkeys(("__lshift__", "bitwise_left_shift"), "mul"),
    **dict.fromkeys(("__rshift__", "bitwise_right_shift"), "floor_divide"),
}


def shifted(what: str, x: Node, count: Node) -> Node | None:
    """A shift of a whole number by a constant that leaves its power of two one of 32 bits; None for any other."""
    if count.what != "constant" or x.what == "constant" or not 0 <= count.operands[0] <= 30:
        return None
    return Node(SHIFTS[what], (x, Node("constant", (1 << count.operands[0],), "int")), "int")


def of_bits(what: str, operands: list[Node], kind: str) -> Node:
    """``bitwise_and`` and its likes: of truth values they are logic, and the last bits of a number are a remainder."""
    if kind == "bool":
        return Node(what.replace("bitwise", "logical"), tuple(operands), kind)
    if what == "bitwise_and":
        for x, mask in (operands, operands[::-1]):
            last = mask.operands[0] if mask.what == "constant" else 0
            if 0 < last < 1 << 30 and last & (last + 1) == 0:
                return Node("remainder", (x, Node("constant", (last + 1,), "int")), kind)
    return Node(what, tuple(operands), kind)
