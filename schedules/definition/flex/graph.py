"""What a function of FlexAttention computes, read from the graph that PyTorch traces of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from schedules.definition.errors import DefinitionError
from schedules.definition.flex.bits import SHIFTS, of_bits, shifted
from schedules.definition.flex.formula import ARGUMENTS, Formula, same_name
from schedules.definition.flex.held import held_by, identity
from schedules.definition.flex.reads import Sliced, table_reads
from schedules.definition.flex.rules import RULES, Node
from tvm_flash.packs.manifest import Param

_RESULTS = {"score_mod": "float", "mask_mod": "bool"}

_NARROW = ("float16", "bfloat16")

#: How values of a dtype of torch are computed; those of 16 bits as float32, as FlexAttention's compiled kernels do.
_KINDS = {"bool": "bool", "int32": "int", "int64": "int"} | dict.fromkeys(("float32", "float64", *_NARROW), "float")

#: As what a tensor of a dtype of torch is given to a kernel.
_TABLES = {
    **dict.fromkeys(("int64", "int32", "int16", "int8", "uint8"), "int32"),
    **dict.fromkeys(("float64", "float32"), "float32"),
    **{x: x for x in (*_NARROW, "bool")},
}

#: Operations that leave the value as it is, but perhaps for its kind.
_CASTS = ("_to_copy", "alias", "clone", "detach", "lift_fresh_copy", "lift_fresh", "_assert_tensor_metadata", "expand")

#: Operations by which a tensor comes into a graph that the traced function makes itself.
_MADE_HERE = ("lift_fresh_copy", "lift_fresh")

#: Operations on floats whose results jump.
_STEPS = ("floor", "ceil", "floor_divide", "div_floor", "remainder", "sign")

#: Operations that make a number, and at which place it is among their arguments.
_CONSTANTS = {"scalar_tensor": 0, "full": 1, "full_like": 1, "new_full": 2}
_ZEROS_AND_ONES = [
    f"{prefix}{x}{suffix}" for x in ("zeros", "ones") for prefix, suffix in (("", ""), ("new_", ""), ("", "_like"))
]


def read(function: Callable, role: str) -> Formula:
    """Trace ``function``, which was given as the argument ``role``.

    Raises
    ------
    DefinitionError: it isn't a function of scores or of positions, or has an operation that isn't known.
    """
    if not callable(function):
        raise DefinitionError(f"{role} is {type(function).__name__}; expected a function {_called(role)}")
    return _Reader(function, role).read()


class _Reader:
    """Reads the graph of one function."""

    def __init__(self, function: Callable, role: str):
        name = getattr(function, "__name__", type(function).__name__)
        self._function, self._role = function, role
        self._name = name if name.isidentifier() else "function"
        self._params: dict[str, Param] = {}
        self._learnt: set[str] = set()
        self._tensors: dict[str, tuple] = {}
        self._inexact: dict[int, Node] = {}
        self._held = held_by(function)

    def read(self) -> Formula:
        graph_module = self._trace()
        values: dict[Any, Node] = {}
        arguments = iter(ARGUMENTS[self._role])
        for node in graph_module.graph.nodes:
            if node.op == "placeholder":
                argument = next(arguments)
                values[node] = Node("argument", (argument,), "float" if argument == "score" else "int")
            elif node.op == "get_attr":
                made_here = all(_name_of(user) in _MADE_HERE for user in node.users)
                values[node] = self._parameter(getattr(graph_module, node.target), made_here)
            elif node.op == "call_function" and _name_of(node) == "detach" and not node.users:
                continue  # what autograd keeps of a tanh, exp or sigmoid of something learnt
            elif node.op == "call_function":
                values[node] = self._operation(node, values)
            else:
                result = self._operand(values, node.args[0])
                break
        if not isinstance(result, Node) or result.is_table or result.kind != _RESULTS[self._role]:
            got = "a tensor of several values" if isinstance(result, Node) and result.is_table else ""
            got = got or (f"values of kind {result.kind}" if isinstance(result, Node) else type(result).__name__)
            raise self._refusal(
                f"returns {got}; expected {_RESULTS[self._role]}: it is called as {_called(self._role)}"
            )
        if self._role == "score_mod" and not any(x.is_score for x in result.parts()):
            raise self._refusal("never uses its score, so that it isn't attention")
        return Formula(self._name, result, tuple(self._params.values()), frozenset(self._learnt), self._tensors)

    def _trace(self):
        import torch
        from torch.fx.experimental.proxy_tensor import make_fx

        kinds = [torch.float32 if a == "score" else torch.int32 for a in ARGUMENTS[self._role]]
        try:
            with table_reads():
                # Methods and arguments with defaults have another number of arguments than they are called with.
                trace = make_fx(lambda *x: self._function(*x), tracing_mode="fake", _allow_non_fake_inputs=True)
                return trace(*(torch.zeros((), dtype=kind) for kind in kinds))
        except Sliced as e:
            raise self._refusal(f"{e}; single elements can be read, by one index for each dimension") from None
        except Exception as e:  # a user's function may fail in any way; the cause is chained
            raise self._refusal(
                f"can't be traced as a function {_called(self._role)} of 0-dimensional tensors, without branches on "
                f"their values: {type(e).__name__}: {e}"
            ) from e

    def _parameter(self, tensor, made_here: bool) -> Node:
        dtype = _dtype(tensor)
        if dtype not in _TABLES:
            raise self._refusal(f"reads a tensor of {dtype}; expected one of {', '.join(_TABLES)}")
        kind = {"bool": "bool", "int32": "int"}.get(_TABLES[dtype], "float")
        if made_here and not tensor.ndim:  # the function makes it itself, of a number
            return Node("constant", (tensor.item(),), kind)
        name = self._held.get(identity(tensor))
        if name is None:
            made = "makes" if made_here else "holds, where its name isn't known,"
            raise self._refusal(
                f"{made} a tensor of shape {tuple(tensor.shape)}; hold it in a variable outside instead"
            )
        if self._tensors.setdefault(name, identity(tensor)) != identity(tensor):
            raise self._refusal(same_name("holds", name))
        if tensor.ndim:
            param = Param(name, _TABLES[dtype], rank=tensor.ndim)
        else:
            param = Param(name, "float32" if kind == "float" else "int32", gradient=tensor.requires_grad)
        self._params[name] = param
        if tensor.requires_grad:
            self._learnt.add(name)
        return Node("parameter", (name, tensor.ndim), kind)

    def _operation(self, node, values) -> Node:
        what = _name_of(node)
        if what == "index":
            return self._read_of(node, values)
        if what == "expand" and isinstance(node.args[0], type(node)) and values[node.args[0]].is_table:
            return self._expanded(node, values[node.args[0]])
        kind = _KINDS.get(_dtype(node.meta.get("val")))
        if kind is None or node.meta["val"].ndim:
            raise self._unknown(node)
        if what in _CONSTANTS:
            return Node("constant", (node.args[_CONSTANTS[what]],), kind)
        if what in _ZEROS_AND_ONES:
            return Node("constant", (int("ones" in what),), kind)
        if what in _CASTS:
            return self._cast(node, values[node.args[0]], kind)
        for option in ("rounding_mode", "approximate"):
            if node.kwargs.get(option):
                what = f"{what}_{node.kwargs[option]}"
        args, alpha = node.args, node.kwargs.get("alpha", 1)
        if what == "masked_fill":
            what, args = "where", (args[1], args[2], args[0])
        if what in SHIFTS:
            found = shifted(what, *(self._operand(values, x) for x in args))
            if found is None:
                raise self._refusal(f"has {node.format_node()}; shifts by a number from 0 to 30 are known")
            return found
        if what not in RULES:
            raise self._unknown(node)
        if what == "rsub":
            args, alpha = args[:2], args[2] if len(args) > 2 else alpha
        operands = [self._operand(values, x) for x in self._rounded(node, args)]
        if what.startswith("bitwise"):
            return of_bits(what, operands, kind)
        if alpha != 1:
            scaled = 0 if what == "rsub" else 1
            operands[scaled] = Node("mul", (operands[scaled], self._operand(values, alpha)), kind)
        return self._computed(node, what, operands, kind)

    def _cast(self, node, x: Node, kind: str) -> Node:
        if _name_of(node) == "detach" and any(y.is_score or y.operands[0] in self._learnt for y in x.parts()):
            raise self._refusal("detaches what has a gradient, and derivatives here follow from the formula alone")
        dtype, given = _dtype(node.meta["val"]), _dtype(node.args[0].meta["val"])
        if dtype in _NARROW and dtype != given and x.what != "constant":
            raise self._refusal(
                f"has {node.format_node()}, which rounds to {dtype}; nothing is rounded within a score here: leave the "
                f"cast out"
            )
        if kind != "float":
            self._expect_exact(node, [x])
        return Node("cast", (x,), kind)

    def _rounded(self, node, args) -> list:
        """Arguments of an operation; a number that is compared with elements of 16 bits is rounded to them, as PyTorch
        does."""
        given = {_dtype(x.meta["val"]) for x in args if hasattr(x, "op")}
        narrow = given & set(_NARROW)
        if not narrow or given & {"float32", "float64"} or len(narrow) > 1:
            return list(args)
        if given & {"int32", "int64"}:
            raise self._refusal(
                f"has {node.format_node()} of {', '.join(narrow)} and integers, which PyTorch rounds to 16 bits first; "
                f"make the former float32, by .float()"
            )
        if _dtype(node.meta["val"]) in narrow:
            return list(args)
        import torch

        dtype = getattr(torch, *narrow)
        return [torch.tensor(x, dtype=dtype).item() if type(x) in (int, float) else x for x in args]

    def _computed(self, node, what: str, operands: list[Node], kind: str) -> Node:
        """The result of an operation, of which those in 16 bits are kept in mind."""
        if kind != "float" or what in _STEPS:
            self._expect_exact(node, operands)
        found = self._power(node, operands, kind) if what == "pow" else Node(what, tuple(operands), kind)
        if _dtype(node.meta["val"]) in _NARROW:
            self._inexact[id(found)] = found
        return found

    def _expect_exact(self, node, operands: list[Node]) -> None:
        """Refuse what decides by numbers that were computed in 16 bits: PyTorch's may be rounded, and these aren't."""
        todo = [x for x in operands if isinstance(x, Node)]
        while todo:
            x = todo.pop()
            if id(x) in self._inexact:
                raise self._refusal(
                    f"has {node.format_node()} of what was computed in 16 bits, which isn't rounded to them here; make "
                    f"its elements float32 first, by .float()"
                )
            todo.extend(y for y in x.operands if isinstance(y, Node) and y.kind == "float" and x.what != "read")

    def _power(self, node, operands: list[Node], kind: str) -> Node:
        """A power; with a small whole exponent a product, which integers and negative bases have too."""
        base, exponent = operands
        n = exponent.operands[0] if exponent.what == "constant" else None
        if n in range(1, 9):
            base = Node("cast", (base,), kind)
            return functools.reduce(lambda x, _: Node("mul", (x, base), kind), range(int(n) - 1), base)
        if kind != "float":
            raise self._refusal(
                f"has {node.format_node()}; of integers powers with an exponent of 1 to 8 are known, and of floats "
                f"others too: 2.0**h"
            )
        if base.what == "constant" and base.operands[0] < 0 and exponent.kind == "int":
            # GPUs' own powers are of numbers that aren't negative
            size, two = (Node("constant", (x,), k) for x, k in ((-base.operands[0], "float"), (2, "int")))
            is_odd = Node("cast", (Node("remainder", (exponent, two), "int"),), "bool")
            powers = Node("pow", (size, exponent), kind)
            return Node("where", (is_odd, Node("neg", (powers,), kind), powers), kind)
        return Node("pow", (base, exponent), kind)

    def _read_of(self, node, values) -> Node:
        """An element of a table, or, with fewer indices than it has dimensions, what is left of it: ``bias[b][h]``."""
        table, indices = values.get(node.args[0]), [values.get(x) for x in node.args[1]]
        if table is None or not table.is_table or None in indices:
            raise self._refusal(
                f"has {node.format_node()}; only a tensor that the function holds on to can be indexed, by positions "
                f"and numbers, one for each of its dimensions"
            )
        parameter, known, places = _table(table)
        for place, index in zip(places, indices, strict=False):
            known = known if place is None else {**known, place: index}
        return _of_table(parameter, known, places[len(indices) :])

    def _expanded(self, node, table: Node) -> Node:
        """A table of which one element stands for several along a dimension, or which has further dimensions."""
        parameter, known, places = _table(table)
        sizes, made = node.args[0].meta["val"].shape, node.meta["val"].shape
        added = len(made) - len(sizes)
        repeated = [place for place, n, m in zip(places, sizes, made[added:], strict=True) if n != m]
        known = {**known, **{place: Node("constant", (0,), "int") for place in repeated if place is not None}}
        return _of_table(parameter, known, (None,) * added + tuple(None if x in repeated else x for x in places))

    def _operand(self, values, x):
        """A node for an argument of an operation: another's result, or a number; None stays."""
        if isinstance(x, (bool, int, float)):
            return Node("constant", (x,), "float" if isinstance(x, float) else "bool" if isinstance(x, bool) else "int")
        return values.get(x, x) if hasattr(x, "op") else x

    def _unknown(self, node) -> DefinitionError:
        value = node.meta.get("val")
        made = f" with a result of {value.dtype}, shape {tuple(value.shape)}" if hasattr(value, "dtype") else ""
        return self._refusal(
            f"uses {node.target}{made}; known are {', '.join(sorted([*RULES, 'masked_fill']))}, of single values of "
            f"float32, integers and bool"
        )

    def _refusal(self, text: str) -> DefinitionError:
        return DefinitionError(f"{self._role} {self._name!r} {text}")


def _table(node: Node) -> tuple[Node, Mapping[int, Node], tuple[int | None, ...]]:
    """Of a table or a part of one: the parameter, the indices that are known by its dimensions, and which of these each
    dimension that is left stands for; None for one along which all elements are the same."""
    return node.operands if node.what == "part" else (node, {}, tuple(range(node.operands[1])))


def _of_table(parameter: Node, known: Mapping[int, Node], places: tuple[int | None, ...]) -> Node:
    if places:
        return Node("part", (parameter, known, places), parameter.kind)
    return Node("read", (parameter, *(known[d] for d in range(parameter.operands[1]))), parameter.kind)


def _name_of(node) -> str:
    """The name of the operation of a node of PyTorch's graph."""
    return getattr(getattr(node.target, "overloadpacket", node.target), "__name__", "")


def _called(role: str) -> str:
    return f"({', '.join(ARGUMENTS[role])})"


def _dtype(x) -> str:
    return str(getattr(x, "dtype", "")).removeprefix("torch.")
