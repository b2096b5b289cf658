"""What a function of FlexAttention computes, read from the graph that PyTorch traces of it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from schedules.definition.errors import DefinitionError
from schedules.definition.flex.rules import RULES, Node
from tvm_flash.packs.manifest import Param

#: The arguments of the two functions: those of a mask lack the score.
ARGUMENTS = {
    "score_mod": ("score", "b", "h", "q_idx", "kv_idx"),
    "mask_mod": ("b", "h", "q_idx", "kv_idx"),
}
_RESULTS = {"score_mod": "float", "mask_mod": "bool"}

#: How values of a dtype of torch are computed.
_KINDS = {"bool": "bool", "float32": "float", "float64": "float", "int32": "int", "int64": "int"}

#: As what a tensor of a dtype of torch is given to a kernel.
_TABLES = {
    **dict.fromkeys(("int64", "int32", "int16", "int8", "uint8"), "int32"),
    **dict.fromkeys(("float64", "float32"), "float32"),
    **{x: x for x in ("float16", "bfloat16", "bool")},
}

#: Operations that leave the value as it is, but perhaps for its kind.
_CASTS = ("_to_copy", "alias", "clone", "detach", "lift_fresh_copy", "lift_fresh", "_assert_tensor_metadata")

#: Operations that make a number, and at which place it is among their arguments.
_CONSTANTS = {"scalar_tensor": 0, "full": 1, "full_like": 1, "new_full": 2}
_ZEROS_AND_ONES = [
    f"{prefix}{x}{suffix}" for x in ("zeros", "ones") for prefix, suffix in (("", ""), ("new_", ""), ("", "_like"))
]


@dataclass(frozen=True)
class Formula:
    """The result of a function as a tree of nodes, and the parameters that it reads in the order of first use.

    ``learnt`` are those that require a gradient.
    """

    name: str
    result: Node
    params: tuple[Param, ...]
    learnt: frozenset[str] = frozenset()

    @staticmethod
    def of(function: Callable, role: str) -> Formula:
        """Trace ``function``, which was given as the argument ``role``."""
        if not callable(function):
            raise DefinitionError(f"{role} is {type(function).__name__}; expected a function {_called(role)}")
        return _Reader(function, role).read()

    def part(self, node: Node) -> Formula:
        """The formula of one of its nodes."""
        names = {x.operands[0] for x in node.parts() if x.what == "parameter"}
        return Formula(self.name, node, tuple(p for p in self.params if p.name in names))


def settled(formulas: list[Formula]) -> list[Formula]:
    """The formulas with a tensor of axes in place of each table that is read at one place only: the batch entry, head,
    query and key of the score, or some of these in this order.
    """
    indices: dict[str, set[tuple[Node, ...]]] = {}
    for formula in formulas:
        for node in formula.result.parts():
            if node.what == "read":
                indices.setdefault(node.operands[0].operands[0], set()).add(node.operands[1:])
    axes = {name: _axes_of(found) for name, found in indices.items()}
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


class _Reader:
    """Reads the graph of one function."""

    def __init__(self, function: Callable, role: str):
        name = getattr(function, "__name__", type(function).__name__)
        self._function, self._role = function, role
        self._name = name if name.isidentifier() else "function"
        self._params: dict[str, Param] = {}
        self._learnt: set[str] = set()
        self._held = _held_by(function)

    def read(self) -> Formula:
        graph_module = self._trace()
        values: dict[Any, Node] = {}
        arguments = iter(ARGUMENTS[self._role])
        for node in graph_module.graph.nodes:
            if node.op == "placeholder":
                argument = next(arguments)
                values[node] = Node("argument", (argument,), "float" if argument == "score" else "int")
            elif node.op == "get_attr":
                values[node] = self._parameter(getattr(graph_module, node.target))
            elif node.op == "call_function":
                values[node] = self._operation(node, values)
            else:
                result = self._operand(values, node.args[0])
                break
        if not isinstance(result, Node) or result.kind != _RESULTS[self._role]:
            got = f"values of kind {result.kind}" if isinstance(result, Node) else type(result).__name__
            raise self._refusal(
                f"returns {got}; expected {_RESULTS[self._role]}: it is called as {_called(self._role)}"
            )
        return Formula(self._name, result, tuple(self._params.values()), frozenset(self._learnt))

    def _trace(self):
        import torch
        from torch.fx.experimental.proxy_tensor import make_fx

        kinds = [torch.float32 if a == "score" else torch.int32 for a in ARGUMENTS[self._role]]
        try:
            with _table_reads():
                trace = make_fx(self._function, tracing_mode="fake", _allow_non_fake_inputs=True)
                return trace(*(torch.zeros((), dtype=kind) for kind in kinds))
        except Exception as e:  # a user's function may fail in any way; the cause is chained
            raise self._refusal(
                f"can't be traced as a function {_called(self._role)} of 0-dimensional tensors, without branches on "
                f"their values: {type(e).__name__}: {e}"
            ) from e

    def _parameter(self, tensor) -> Node:
        dtype = _dtype(tensor)
        if dtype not in _TABLES:
            raise self._refusal(f"reads a tensor of {dtype}; expected one of {', '.join(_TABLES)}")
        kind = {"bool": "bool", "int32": "int"}.get(_TABLES[dtype], "float")
        name = self._held.get(_identity(tensor))
        if name is None and not tensor.ndim:  # the function makes it itself, of a number
            return Node("constant", (tensor.item(),), kind)
        if name is None:
            raise self._refusal(f"makes a tensor of shape {tuple(tensor.shape)}; hold it in a variable outside instead")
        if tensor.ndim:
            param = Param(name, _TABLES[dtype], rank=tensor.ndim)
        else:
            param = Param(name, "float32" if kind == "float" else "int32", gradient=tensor.requires_grad)
        self._params[name] = param
        if tensor.requires_grad:
            self._learnt.add(name)
        return Node("parameter", (name, tensor.ndim), kind)

    def _operation(self, node, values) -> Node:
        what = getattr(node.target, "overloadpacket", node.target).__name__
        if what == "index":
            return self._read_of(node, values)
        kind = _KINDS.get(_dtype(node.meta.get("val")))
        if kind is None or node.meta["val"].ndim:
            raise self._unknown(node)
        if what in _CONSTANTS:
            return Node("constant", (node.args[_CONSTANTS[what]],), kind)
        if what in _ZEROS_AND_ONES:
            return Node("constant", (int("ones" in what),), kind)
        if what in _CASTS:
            return Node("cast", (values[node.args[0]],), kind)
        if node.kwargs.get("rounding_mode"):
            what = f"{what}_{node.kwargs['rounding_mode']}"
        if what not in RULES or (what.startswith("bitwise") and kind != "bool"):
            raise self._unknown(node)
        operands = [self._operand(values, x) for x in node.args]
        if node.kwargs.get("alpha", 1) != 1:
            operands[1] = Node("mul", (operands[1], self._operand(values, node.kwargs["alpha"])), kind)
        return Node(what, tuple(operands), kind)

    def _read_of(self, node, values) -> Node:
        table, indices = values.get(node.args[0]), [values.get(x) for x in node.args[1]]
        if table is None or table.what != "parameter" or None in indices or table.operands[1] != len(indices):
            raise self._refusal(
                f"has {node.format_node()}; only a tensor that the function holds on to can be indexed, by "
                f"an index for each of its dimensions"
            )
        return Node("read", (table, *indices), table.kind)

    def _operand(self, values, x):
        """A node for an argument of an operation: another's result, or a number; None stays."""
        if isinstance(x, (bool, int, float)):
            return Node("constant", (x,), "float" if isinstance(x, float) else "bool" if isinstance(x, bool) else "int")
        return values.get(x, x) if hasattr(x, "op") else x

    def _unknown(self, node) -> DefinitionError:
        value = node.meta.get("val")
        made = f" with a result of {value.dtype}, shape {tuple(value.shape)}" if hasattr(value, "dtype") else ""
        return self._refusal(
            f"uses {node.target}{made}; known are {', '.join(sorted(RULES))}, of single values of float32, integers "
            f"and bool"
        )

    def _refusal(self, text: str) -> DefinitionError:
        return DefinitionError(f"{self._role} {self._name!r} {text}")


def _called(role: str) -> str:
    return f"({', '.join(ARGUMENTS[role])})"


def _dtype(x) -> str:
    return str(getattr(x, "dtype", "")).removeprefix("torch.")


def _table_reads():
    """While this is on, ``table[q_idx]`` is an operation of the graph; PyTorch would ask for the index's value."""
    import torch
    from torch.overrides import TorchFunctionMode

    class TableReads(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.Tensor.__getitem__:
                table, index = args
                index = index if isinstance(index, tuple) else (index,)
                if len(index) == table.ndim and any(isinstance(i, torch.Tensor) for i in index):
                    index = [i if isinstance(i, torch.Tensor) else torch.full((), i, dtype=torch.int32) for i in index]
                    return torch.ops.aten.index(table, index)
            return func(*args, **(kwargs or {}))

    return TableReads()


def _identity(tensor) -> tuple:
    return tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype


def _held_by(function: Callable) -> dict[tuple, str]:
    """Names of the tensors in the closure and among the globals of a function, and of the functions there."""
    import torch

    names: dict[tuple, str] = {}
    seen, todo = set(), [function]
    while todo:
        current = todo.pop()
        if id(current) in seen or not inspect.isfunction(current):
            continue
        seen.add(id(current))
        found = inspect.getclosurevars(current)
        for name, value in {**found.globals, **found.nonlocals}.items():
            for x in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(x, torch.Tensor):
                    names.setdefault(_identity(x), name)
                elif inspect.isfunction(x):
                    todo.append(x)
    return names
