"""What an operator's TensorIR says: its blocks and arguments by name, and the expressions that are its own.

``read(func)`` tells by the blocks' names which operator a PrimFunc is, and takes the score and the mask out of the
blocks that hold them.  Whether everything else is as it must be is for :mod:`schedules.definition.pattern` to find out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir import Call, Expr, PrimType
from tvm.ir.expr import TensorLoad
from tvm.tirx import PrimFunc

from schedules.definition.attention import AXES, GRADIENTS
from schedules.definition.derive import OPERATORS
from schedules.definition.errors import DefinitionError
from schedules.definition.operator import PAGES, STARTS, Operator
from schedules.definition.parameters import value_dtype
from tvm_flash.packs.manifest import Param

#: The buffers with the lengths of a ragged batch's sequences.
LENGTHS = ("q_lengths", "k_lengths")


@dataclass(frozen=True)
class Variables:
    """What expressions of the score, the mask and the sink are made of, whichever block they stood in.

    ``index`` are b, h, i, j, ``sizes`` batch, heads, seqlen_q, kv_heads, seqlen_kv, ``s`` is the scaled product, and
    ``params`` has a number for each run-time parameter, for a per-head one the value that belongs to ``(b, h)``.
    """

    index: tuple[tirx.Var, ...]
    sizes: tuple[Expr, ...]
    s: tirx.Var
    params: dict[str, tirx.Var]


@dataclass(frozen=True)
class Reading:
    """An operator as it was found.

    Attributes
    ----------
    blocks: by name, without the regions that they read and write.
    arguments: the function's variables for the operator's tensors and scalars, by role.
    parameters, gradients: the variables for the run-time parameters, and for the gradients of those that ask for one.
    params: the parameters as plain data, in the same order.
    variables, score, visible, key_range, sink: the score, the predicates of the mask, and of a part's keys, and the
        sink; None where there is none.
    """

    func: PrimFunc
    op: str
    blocks: dict[str, s_tir.SBlock]
    arguments: dict[str, tirx.Var]
    parameters: tuple[tirx.Var, ...]
    gradients: tuple[tirx.Var, ...]
    params: tuple[Param, ...]
    variables: Variables | None = None
    score: Expr | None = None
    visible: Expr | None = None
    key_range: Expr | None = None
    sink: Expr | None = None


def read(func: PrimFunc) -> Reading:
    """Take an operator apart.

    Raises
    ------
    DefinitionError: it has not the blocks or the arguments of an operator, or its score or mask reads what it may not.
    """
    if not isinstance(func, PrimFunc):
        raise DefinitionError(f"a definition is a TensorIR PrimFunc, this is {type(func).__name__}")
    blocks = blocks_of(func)
    op, operator = _operator_of(blocks)
    arguments, parameters, gradients = _arguments_of(func, operator)
    axes = dict(x.split(":") for x in (func.attrs or {}).get(AXES, ()))
    params = tuple(_param(p, asked_gradients(func), axes) for p in parameters)
    found = Reading(func, op, blocks, arguments, parameters, gradients, params)
    return _with_expressions(found) if operator.has_scores else found


def asked_gradients(func: PrimFunc) -> tuple[str, ...]:
    """Names of the parameters that ask for a gradient."""
    return tuple((func.attrs or {}).get(GRADIENTS, ()))


# ---------------------------------------------------------------- blocks and arguments


def blocks_of(func: PrimFunc) -> dict[str, s_tir.SBlock]:
    """The blocks by name, without the regions that they read and write: those follow from what they compute."""
    found = {}

    def visit(block):
        if block.name_hint in found:
            raise DefinitionError(f"block {block.name_hint!r}: occurs twice; every step of attention is one block")
        found[block.name_hint] = without_regions(block)

    tvm_ffi.structural_walk(func.body, [(s_tir.SBlock, visit)])
    found.pop("root", None)
    return found


def without_regions(node):
    """A block without the regions that it reads and writes; anything else as it is."""
    if not isinstance(node, s_tir.SBlock):
        return node
    return s_tir.SBlock(node.iter_vars, [], [], node.name_hint, node.body, node.init, node.alloc_buffers)


def _operator_of(blocks) -> tuple[str, Operator]:
    """The operator that most of the blocks belong to, once it is sure that it has all of its own and no other."""
    name, operator = max(OPERATORS.items(), key=lambda item: _likeness(item[1].blocks, blocks))
    all_of = f"{'a definition' if name == 'forward' else name} has the blocks {', '.join(operator.blocks)}"
    for block in operator.blocks:
        if block not in blocks:
            raise DefinitionError(f"block {block!r}: missing; {all_of}")
    for block in blocks:
        known = (*operator.blocks, *operator.of_sink)
        if block not in known and not (operator.has_gradients and block.startswith("d_")):
            raise DefinitionError(f"block {block!r}: unknown; {all_of}")
    return name, operator


def _likeness(expected, found) -> float:
    return len(set(expected) & set(found)) / len(set(expected) | set(found))


def _arguments_of(func: PrimFunc, operator: Operator):
    """The arguments by role, the parameters, and the parameters' gradients."""
    roles = (*operator.arguments, *operator.scalars)
    fixed, others = func.params[: len(roles)], func.params[len(roles) :]
    numbers = {"softmax_scale", *operator.scalars}
    if len(fixed) < len(roles) or any(
        isinstance(p.ty, tirx.BufferType) == (role in numbers) for role, p in zip(roles, fixed, strict=True)
    ):
        tensors = ", ".join(r for r in roles if r not in numbers)
        raise DefinitionError(f"arguments: expected ({', '.join(roles)}, *params), of which {tensors} are tensors")
    count = len((func.attrs or {}).get(GRADIENTS, ())) if operator.has_gradients else 0
    split = len(others) - count
    return dict(zip(roles, fixed, strict=True)), others[:split], others[split:]


def _param(argument, asked: tuple[str, ...], axes: dict[str, str]) -> Param:
    name, gradient = argument.name, argument.name in asked
    if isinstance(argument.ty, PrimType):
        what = {}
    else:
        kind, rank = axes.get(name, "bh"), len(argument.ty.shape)
        what = {"rank": int(kind)} if kind.isdigit() else {"axes": kind}
        if rank != what.get("rank", len(kind)):
            raise DefinitionError(
                f"argument {name!r}: has rank {rank}; a tensor parameter has the shape (batch, heads), or the axes or "
                f"the rank that the function's attribute {AXES!r} says"
            )
    try:
        return Param(name, str(argument.ty.dtype), gradient=gradient, **what)
    except ValueError as e:
        raise DefinitionError(f"argument {name!r}: {e}") from None


# ---------------------------------------------------------------- score and mask


def _with_expressions(found: Reading) -> Reading:
    """The same with the expressions of the score, of the mask, and of a part's range of keys."""
    block = found.blocks["score"]
    _expect_store(block, "score")
    params = {
        p.name: tirx.Var(p.name, value_dtype(p)) if p.axes else variable
        for p, variable in zip(found.params, found.parameters, strict=True)
    }
    index = tuple(x.var for x in block.iter_vars)
    variables = Variables(index, _sizes(found), tirx.Var("s", "float32"), params)
    return replace(
        found,
        variables=variables,
        score=_score(found, variables),
        visible=_predicate(found, variables, "mask", optional=True),
        key_range=_predicate(found, variables, "key_range") if "key_range" in found.blocks else None,
        sink=_sink(found, variables),
    )


def _sizes(found: Reading) -> tuple[Expr, ...]:
    """Batch, heads, seqlen_q, kv_heads, seqlen_kv; of sequences of different lengths a variable for each length."""
    q, k = (found.arguments[role].ty.shape for role in "qk")
    if not is_ragged(found.arguments):
        return (*q[:3], *k[1:3])
    lengths = (tirx.Var(name, q[0].ty.dtype) for name in LENGTHS)
    seqlen_q, seqlen_kv = lengths
    if is_paged(found.arguments):
        return found.arguments[PAGES[0]].ty.shape[0], q[1], seqlen_q, k[2], seqlen_kv
    return found.arguments[STARTS[0]].ty.shape[0] - 1, q[1], seqlen_q, k[1], seqlen_kv


def is_ragged(arguments: dict[str, tirx.Var]) -> bool:
    """Whether an operator with these arguments by role is over sequences of different lengths."""
    return STARTS[0] in arguments


def is_paged(arguments: dict[str, tirx.Var]) -> bool:
    """Whether the keys of such an operator lie on pages."""
    return PAGES[1] in arguments


def _score(found: Reading, variables: Variables) -> Expr:
    block = found.blocks["score"]
    if not _loads(block.body.value):
        raise DefinitionError("block 'score': never reads the product of block 'qk'")
    if _hides(block.body.value):
        raise DefinitionError(
            "block 'score': hides keys with -inf; that is what a mask is for, which may depend on positions and "
            "parameters only"
        )
    value = _canonical(found, variables, block.body.value, block)
    if left := _loads(value, found.params):
        raise DefinitionError(
            f"block 'score': reads {left[0]}; it may read the product of block 'qk' at [b, h, i, j], multiplied by "
            f"softmax_scale, and parameters"
        )
    return value


def _predicate(found: Reading, variables: Variables, name: str, *, optional: bool = False) -> Expr | None:
    """When the block leaves a score as it is; None if it always does, where that may be."""
    block = found.blocks[name]
    _expect_store(block, name)
    value = block.body.value
    if optional and isinstance(value, TensorLoad):
        return None
    if not (_hides(value) and isinstance(value.args[1], TensorLoad)):
        raise DefinitionError(
            f"block {name!r}: expected if_then_else(visible, score, -inf), or the score as it is, found\n"
            + block.script()
        )
    condition = _canonical(found, variables, value.args[0], block)
    if _loads(condition, found.params):
        raise DefinitionError(
            f"block {name!r}: the mask depends on the score; it may depend on positions and parameters only"
        )
    return condition


def _sink(found: Reading, variables: Variables) -> Expr | None:
    """The logit beside those of keys, None if there is none."""
    block = next((found.blocks[name] for name in OPERATORS[found.op].of_sink if name in found.blocks), None)
    if block is None:
        return None
    value = block.body.value
    if isinstance(value, tirx.Max):
        value = value.b
    elif _is_call(value, "if_then_else") and isinstance(value.args[0], tirx.EQ):
        value = value.args[0].a
    else:
        raise DefinitionError(
            f"block {block.name_hint!r}: is not a step of attention with a sink, found\n{block.script()}"
        )
    sink = _canonical(found, variables, value, block)
    queries = [v for v in _variables_of(sink) if any(v.same_as(x) for x in (*variables.index[2:], variables.s))]
    if queries or _loads(sink, found.params):
        raise DefinitionError(
            f"block {block.name_hint!r}: the sink {sink} depends on more than batch, head and parameters"
        )
    return sink


def _canonical(found: Reading, variables: Variables, expr: Expr, block: s_tir.SBlock) -> Expr:
    """``expr`` of a block, in ``variables``."""
    axes = {p.name: p.axes for p in found.params if p.axes}
    scalars = {p.name for p in found.params if not p.axes}
    index = tuple(zip((x.var for x in block.iter_vars), variables.index, strict=False))  # a row has no key
    at = dict(zip("bhij", variables.index, strict=True))
    scale = found.arguments["softmax_scale"]
    lengths = dict(zip(LENGTHS, (variables.sizes[2], variables.sizes[4]), strict=True))
    lengths = lengths if is_ragged(found.arguments) else {}

    def reads(node, place):
        return len(node.indices) == len(place) and all(a.same_as(b) for a, b in zip(node.indices, place, strict=True))

    def is_product(node):
        mine = {*axes, *scalars}
        return isinstance(node, TensorLoad) and node.source.name not in mine and reads(node, variables.index)

    def parameter(name, node):
        if not reads(node, [at[a] for a in axes[name]]):
            elsewhere.append(name)
            return node
        variable = variables.params[name]
        return (
            variable if node.ty.dtype == variable.ty.dtype else narrow.setdefault(name, tirx.Var(name, node.ty.dtype))
        )

    narrow, elsewhere = {}, []

    def rewrite(node):
        if isinstance(node, tirx.Cast) and any(node.value.same_as(x) for x in narrow.values()):
            return variables.params[node.value.name]
        if isinstance(node, tirx.Mul) and node.b.same_as(scale) and is_product(node.a):
            return variables.s
        if isinstance(node, TensorLoad) and node.source.name in axes:
            return parameter(node.source.name, node)
        if isinstance(node, TensorLoad) and node.source.name in lengths and reads(node, variables.index[:1]):
            return lengths[node.source.name]
        if isinstance(node, tirx.Var):
            return next((new for old, new in index if node.same_as(old)), node)
        return node

    rewritten = tvm_ffi.structural_map(expr, rewrite, order="post")
    if elsewhere:  # not raised inside: what calls ``rewrite`` would make another error of it
        name, where = elsewhere[0], ", ".join(axes[elsewhere[0]])
        raise DefinitionError(f"block {block.name_hint!r}: parameter {name!r} is read elsewhere than at [{where}]")
    return rewritten


def _expect_store(block: s_tir.SBlock, name: str) -> None:
    if len(block.iter_vars) != 4 or not isinstance(block.body, tirx.BufferStore):
        raise DefinitionError(f"block {name!r}: expected one store X[b, h, i, j] = ..., found\n" + block.script())


def _loads(expr: Expr, params: tuple[Param, ...] = ()) -> list:
    """What an expression reads of tensors, tables apart."""
    found, tables = [], {p.name for p in params if p.rank}
    tvm_ffi.structural_walk(expr, [(TensorLoad, found.append)])
    return [x for x in found if x.source.name not in tables]


def _hides(value: Expr) -> bool:
    """Whether it is ``if_then_else(.., .., -inf)``."""
    if not _is_call(value, "if_then_else"):
        return False
    return isinstance(value.args[2], tirx.FloatImm) and value.args[2].value == -math.inf


def _is_call(value: Expr, name: str) -> bool:
    return isinstance(value, Call) and value.op.name.endswith(name)


def _variables_of(expr: Expr) -> list:
    found = []
    tvm_ffi.structural_walk(expr, [(tirx.Var, found.append)])
    return found
