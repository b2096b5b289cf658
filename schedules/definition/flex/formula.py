"""What a function of FlexAttention computes, as a tree: where it reads parameters, and what of a score is a mask."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from schedules.definition.errors import DefinitionError
from schedules.definition.flex.rules import Node
from tvm_flash.packs.manifest import Param

#: The arguments of the two functions: those of a mask lack the score.
ARGUMENTS = {
    "score_mod": ("score", "b", "h", "q_idx", "kv_idx"),
    "mask_mod": ("b", "h", "q_idx", "kv_idx"),
}


@dataclass(frozen=True)
class Formula:
    """The result of a function as a tree of nodes, and the parameters that it reads in the order of first use.

    ``learnt`` are those that require a gradient, and ``tensors`` says which tensor each of them is.
    """

    name: str
    result: Node
    params: tuple[Param, ...]
    learnt: frozenset[str] = frozenset()
    tensors: Mapping[str, tuple] = dataclasses.field(default_factory=dict)

    def part(self, node: Node) -> Formula:
        """The formula of one of its nodes."""
        names = {x.operands[0] for x in node.parts() if x.what == "parameter"}
        params = tuple(p for p in self.params if p.name in names)
        return dataclasses.replace(self, result=node, params=params)


def settled(formulas: list[Formula], tables: bool = False) -> list[Formula]:
    """The formulas with a tensor of axes in place of each table that is read at one place only: the batch entry, head,
    query and key of the score, or some of these in this order; with ``tables``, of batch entry and head alone.

    Raises
    ------
    DefinitionError: two of them hold different tensors in variables of one name.
    """
    for one, other in itertools.combinations(formulas, 2):
        for name in one.tensors.keys() & other.tensors.keys():
            if one.tensors[name] != other.tensors[name]:
                raise DefinitionError(same_name(f"{one.name!r} and {other.name!r} hold", name))
    indices: dict[str, set[tuple[Node, ...]]] = {}
    for formula in formulas:
        for node in formula.result.parts():
            if node.what == "read":
                indices.setdefault(node.operands[0].operands[0], set()).add(node.operands[1:])
    axes = {name: _axes_of(found) for name, found in indices.items()}
    if tables:
        axes = {name: "" if set(of) & {"i", "j"} else of for name, of in axes.items()}
    learnt = {name for f in formulas for name in f.learnt}
    known: dict[int, Node] = {}

    def placed(node: Node) -> Node:
        if id(node) not in known:
            if node.what == "read" and axes[node.operands[0].operands[0]]:
                known[id(node)] = Node("parameter", (node.operands[0].operands[0], 0), node.kind)
            else:
                operands = tuple(placed(x) if isinstance(x, Node) else x for x in node.operands)
                known[id(node)] = dataclasses.replace(node, operands=operands)
        return known[id(node)]

    def declared(param: Param) -> Param:
        if axes.get(param.name):
            return Param(param.name, param.dtype, axes=axes[param.name], gradient=param.name in learnt)
        return dataclasses.replace(param, gradient=param.name in learnt)

    return [Formula(f.name, placed(f.result), tuple(declared(p) for p in f.params)) for f in formulas]


def _axes_of(indices: set[tuple[Node, ...]]) -> str:
    """The axes of scores that are the only indices of a tensor; none if there are others."""
    names = [tuple(i.operands[0] if i.what == "argument" else "" for i in each) for each in indices]
    order = ARGUMENTS["mask_mod"]
    if len(names) > 1 or list(names[0]) != [x for x in order if x in names[0]]:
        return ""
    return "".join("bhij"[order.index(x)] for x in names[0])


def without_hidden(formula: Formula) -> tuple[Formula | None, Formula | None]:
    """A score without its outermost choices of −inf, and what is true where none of them hides a key.

    Either is None if nothing is left of it.

    Raises
    ------
    DefinitionError: a key is hidden by the value of its score.
    """
    node, visible = formula.result, None
    while node.what == "where":
        condition, a, b = node.operands
        if b.is_minus_infinity:
            node, shown = a, condition
        elif a.is_minus_infinity:
            node, shown = b, Node("logical_not", (condition,), "bool")
        else:
            break
        visible = shown if visible is None else Node("logical_and", (visible, shown), "bool")
    score = None if node.is_score else formula.part(node)
    if visible is None:
        return score, None
    if any(x.is_score for x in visible.parts()):
        raise DefinitionError(
            f"score_mod {formula.name!r} hides keys by the value of the score, where a mask has positions"
        )
    return score, formula.part(visible)


def same_name(who: str, name: str) -> str:
    """The text of an error: two tensors would be one parameter."""
    return f"{who} two tensors in variables named {name!r}, and a parameter has one; name one of them otherwise"
