"""What is added to scores by the distance of a key from its query, once for the two rows of a lane.

A lane's second row is as many rows below the first as a group of columns is wide, so that its scores in a group are on
the same diagonals as those of the first row in the group before.  What a definition adds there, such as a table's
element or a logarithm, is the same number.
"""

from __future__ import annotations

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.tile.fragment import Fragment


@T.meta_class
class Diagonals:
    """The values of the diagonals of two columns, of the group that is looked at and of the one before it or after it.

    Groups come from the first to the last, or ``descending`` from the last to the first.
    """

    def __init__(self):
        self.values = T.alloc_local([4], "float32")

    @staticmethod
    def serves(pattern: Pattern, fragment: Fragment) -> bool:
        """Whether it is worth it: what is added costs more than arithmetic."""
        are_shared = fragment.row_step == fragment.group and fragment.column_step == 1
        return are_shared and pattern.adds_by_distance

    def begin(self, groups: int, value, descending: bool) -> None:
        """Before the groups of an m-tile; ``value(g, r, e)`` is what a register's score has added."""
        self._set(groups - 1 if descending else 0, 0 if descending else 1, value)

    def follow(self, g, value, descending: bool) -> None:
        """A group is next."""
        self._set(g, 1 if descending else 0, value)

    def _set(self, g, r, value):
        for e in range(2):
            T.buffer_store(self.values, value(g, r, e), [_place(g, r, e)])

    def of(self, g, r, e) -> Expr:
        """What the score of a register of that group has added."""
        return self.values[_place(g, r, e)]


def _place(g, r, e) -> Expr:
    """Where the value of a register's diagonal is: that of row 1 where that of row 0 of the group before is."""
    return (g + r) % 2 * 2 + e
