"""The matcher: from a definition to what a template needs to know of it.

``match(func)`` checks that a PrimFunc is attention as ``schedules.definition.attention`` writes it, up to what the
``score`` block computes, and takes from that block the score expression and the mask.  From the mask follows, by
interval arithmetic (:mod:`schedules.definition.visibility`) and for any tile of rows,

* ``visible_range``: the keys that some row of the tile may see: tiles outside are never visited;
* ``full_range`` and ``tile_full``: the keys that every row sees: no masking inside;
* ``tile_live``: whether a tile inside the visible range has anything to see (masks with gaps).

A predicate that isn't affine is always applied, and narrows nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import tvm_ffi
from tvm import s_tir, sym, tirx
from tvm.ir import Expr, PrimType
from tvm.ir.expr import TensorLoad
from tvm.tirx import PrimFunc

from schedules.definition.attention import BLOCKS, Attention, parameter_symbols
from schedules.definition.visibility import Rows, Tile, decompose
from tvm_flash.packs.manifest import Param

_SCALE = 5  # position of softmax_scale among the arguments of a definition


class DefinitionError(ValueError):
    """A definition that no template can schedule; the message names the block and the reason."""


@dataclass(frozen=True)
class Site:
    """What stands in a kernel for the definition's own variables: TIR expressions of the pattern's ``index_dtype``.

    ``params`` has a value for each run-time parameter, for a per-head one the value that belongs to ``(b, h)``.
    """

    b: Expr
    h: Expr
    batch: Expr
    heads: Expr
    kv_heads: Expr
    seqlen_q: Expr
    seqlen_kv: Expr
    softmax_scale: Expr
    params: Mapping[str, Expr]


class Pattern:
    """Attention as a template sees it.

    Attributes
    ----------
    head_dim, head_dim_v, dtype, index_dtype: as in the definition.
    params: the run-time parameters, in the order of the definition's arguments.
    is_scale_only: the score is ``s * softmax_scale`` and nothing more, so that the scale folds into the exponential.
    has_choice: the score is one of two, and which of them is the same throughout a batch entry and head.
    is_unmasked: every query sees every key.
    has_gaps: the visible keys of a row need not be one interval, so that ``tile_live`` is worth asking.
    depends_on_head: what is made of the raw score, or the mask, differs from head to head.
    is_interval: row i sees exactly the keys of ``visible_range(site, i, i)``, so that no other test of a key is needed.
    """

    def __init__(self, func: PrimFunc):
        self._blocks = _check(func)
        self.func = func
        q, _, v, _, _ = (p.ty for p in func.params[:_SCALE])
        self.head_dim, self.head_dim_v = int(q.shape[3]), int(v.shape[3])
        self.dtype, self.index_dtype = str(q.dtype), str(q.shape[0].ty.dtype)
        self.params = tuple(_param(p) for p in func.params[_SCALE + 1 :])
        block = self._blocks["score"]
        self._index = [x.var for x in block.iter_vars]
        self._raw_score, self._value, predicate = _split_score(block.body.value, block, func)
        self._mask = None if predicate is None else decompose(predicate, self._index)
        self._choice = _split_choice(self._value, self._index, self._raw_score)
        self.is_scale_only = tvm_ffi.structural_equal(self._value, self._raw_score * func.params[_SCALE])
        self.is_unmasked = self._mask is None
        self.has_gaps = self._mask is not None and self._mask.has_gaps
        self.is_interval = self._mask is None or self._mask.is_interval
        self.depends_on_head = _reads_head(self._value, self._raw_score, self._index[1]) or (
            predicate is not None and _reads_head(predicate, self._raw_score, self._index[1])
        )

    def parameter_symbols(self):
        """Fresh arguments for a kernel: ``(arguments, {name: Var or (batch, heads) Buffer})``."""
        return parameter_symbols(self.params, self.index_dtype)

    @property
    def has_choice(self) -> bool:
        return self._choice is not None

    def choice(self, site: Site) -> Expr:
        """Which of the two scores it is, where ``has_choice``: true for the first."""
        zero = tirx.IntImm(self.index_dtype, 0)
        return self._substitute(self._choice[0], site, zero, zero)

    def score(self, site: Site, s: Expr, i: Expr, j: Expr, chosen: bool | None = None) -> Expr:
        """The scaled and modified score (float32, natural units) of the raw product ``s = q · k``.

        ``chosen`` says that ``choice`` is known to be so, and leaves out the other score.
        """
        value = self._value if chosen is None or not self.has_choice else self._choice[1 if chosen else 2]
        return self._substitute(value, site, i, j, s)

    def mask(self, site: Site, i: Expr, j: Expr) -> Expr:
        """Whether query ``i`` sees key ``j``; also false for ``j >= seqlen_kv``."""
        inside = j < site.seqlen_kv
        return inside if self._mask is None else tirx.all(inside, self._substitute(self._mask.predicate, site, i, j))

    def visible_range(self, site: Site, row_first: Expr, row_last: Expr) -> tuple[Expr, Expr]:
        """Keys ``[lo, hi)`` outside of which no row of ``row_first .. row_last`` (inclusive) sees anything.

        ``0 <= lo <= hi <= seqlen_kv`` always holds.
        """
        return self._range(site, row_first, row_last, "visible")

    def full_range(self, site: Site, row_first: Expr, row_last: Expr) -> tuple[Expr, Expr]:
        """Keys ``[lo, hi)`` that every row of ``row_first .. row_last`` (inclusive) sees; empty if in doubt."""
        return self._range(site, row_first, row_last, "full")

    def tile_full(self, site: Site, row_first, row_last, col_first, col_last) -> Expr:
        """Whether every row of the tile certainly sees every column; all bounds inclusive."""
        inside = col_last < site.seqlen_kv
        if self._mask is None:
            return inside
        tile = Tile(row_first, row_last, col_first, col_last, lambda e: self._substitute(e, site, row_first, col_first))
        return tirx.all(inside, self._mask.full(tile))

    def tile_live(self, site: Site, row_first, row_last, col_first, col_last) -> Expr:
        """Whether some row of the tile may see some column; all bounds inclusive."""
        inside = col_first < site.seqlen_kv
        if self._mask is None:
            return inside
        tile = Tile(row_first, row_last, col_first, col_last, lambda e: self._substitute(e, site, row_first, col_first))
        return tirx.all(inside, self._mask.live(tile))

    def _range(self, site, row_first, row_last, which):
        zero = tirx.IntImm(self.index_dtype, 0)
        if self._mask is None:
            return zero, site.seqlen_kv
        rows = Rows(row_first, row_last, site.seqlen_kv, lambda e: self._substitute(e, site, row_first, zero))
        lo, hi = getattr(self._mask, f"{which}_range")(rows)
        hi = tirx.max(tirx.min(hi, site.seqlen_kv), zero)
        lo = tirx.min(tirx.max(lo, zero), hi)
        simplify = sym.Analyzer().simplify
        return simplify(lo), simplify(hi)

    def _substitute(self, expr: Expr, site: Site, i: Expr, j: Expr, s: Expr | None = None) -> Expr:
        """``expr`` of the score block with a kernel's values in place of the definition's variables."""
        func = self.func
        q, k = func.params[0].ty, func.params[1].ty
        pairs = [
            *zip(self._index, (site.b, site.h, i, j), strict=True),
            *zip(
                (*q.shape[:3], *k.shape[1:3]),
                (site.batch, site.heads, site.seqlen_q, site.kv_heads, site.seqlen_kv),
                strict=True,
            ),
            (func.params[_SCALE], site.softmax_scale),
            *(
                (a, site.params[p.name])
                for a, p in zip(func.params[_SCALE + 1 :], self.params, strict=True)
                if not p.per_head
            ),
        ]
        per_head = {p.name for p in self.params if p.per_head}

        def replace(node):
            if isinstance(node, TensorLoad):
                return site.params[node.source.name] if node.source.name in per_head else s
            if isinstance(node, tirx.Var):
                return next((new for old, new in pairs if node.same_as(old)), node)
            return node

        return tvm_ffi.structural_map(expr, replace, order="post")


def match(func: PrimFunc) -> Pattern:
    """Recognise a definition.

    Parameters
    ----------
    func: a PrimFunc as :class:`schedules.definition.attention.Attention` makes it; only its ``score`` block may differ.

    Raises
    ------
    DefinitionError: it is not attention in that form; names the block and says what was found.
    """
    return Pattern(func)


# ---------------------------------------------------------------- recognising the blocks


def _blocks_of(func: PrimFunc) -> dict[str, s_tir.SBlock]:
    found = {}

    def visit(block):
        if block.name_hint in found:
            raise DefinitionError(f"block {block.name_hint!r}: occurs twice; every step of attention is one block")
        found[block.name_hint] = block

    tvm_ffi.structural_walk(func.body, [(s_tir.SBlock, visit)])
    found.pop("root", None)
    return found


def _check(func: PrimFunc) -> dict[str, s_tir.SBlock]:
    """The blocks by name, once everything but the score is known to be attention."""
    if not isinstance(func, PrimFunc):
        raise DefinitionError(f"a definition is a TensorIR PrimFunc, this is {type(func).__name__}")
    if len(func.params) <= _SCALE or not all(isinstance(p.ty, tirx.BufferType) for p in func.params[:_SCALE]):
        raise DefinitionError(
            "arguments: expected (q, k, v, o, lse, softmax_scale, *params), the first five of them tensors"
        )
    blocks = _blocks_of(func)
    for name in BLOCKS:
        if name not in blocks:
            raise DefinitionError(f"block {name!r}: missing; a definition has the blocks {', '.join(BLOCKS)}")
    for name in blocks:
        if name not in BLOCKS:
            raise DefinitionError(f"block {name!r}: unknown; a definition has the blocks {', '.join(BLOCKS)}")
    q, v = func.params[0].ty, func.params[2].ty
    if len(q.shape) != 4 or len(v.shape) != 4 or not all(isinstance(t.shape[3], tirx.IntImm) for t in (q, v)):
        raise DefinitionError("arguments: q, k, v, o are (batch, heads, seq, head_dim) with a constant head_dim")
    model = Attention()(int(q.shape[3]), str(q.dtype), head_dim_v=int(v.shape[3]), index_dtype=str(q.shape[0].ty.dtype))
    expected = _blocks_of(model)
    for name in BLOCKS:
        if name != "score" and not tvm_ffi.structural_equal(blocks[name], expected[name], map_free_vars=True):
            raise DefinitionError(
                f"block {name!r}: is not the step of attention that the templates know; expected\n"
                f"{expected[name].script()}\nfound\n{blocks[name].script()}"
            )
    score = blocks["score"]
    if len(score.iter_vars) != 4 or not isinstance(score.body, tirx.BufferStore):
        raise DefinitionError("block 'score': expected one store X[b, h, i, j] = ..., found\n" + score.script())
    common = _with_model_score(func, score), _with_model_score(model, expected["score"])
    if not tvm_ffi.structural_equal(*common):
        where = tvm_ffi.get_first_structural_mismatch(*common)
        raise DefinitionError(f"the blocks are not connected as in attention; first difference at {where}")
    return blocks


def _with_model_score(func: PrimFunc, score: s_tir.SBlock) -> PrimFunc:
    """``func`` with the plain scaled score in its score block and without further arguments: for comparison only."""
    loads = _loads(score.body.value)
    raw = next((x for x in loads if x.source.name not in {p.name for p in func.params[_SCALE + 1 :]}), None)
    if raw is None:
        raise DefinitionError("block 'score': never reads the product of block 'qk'")
    plain = tirx.BufferStore(score.body.buffer, raw * func.params[_SCALE], score.body.indices)
    block = s_tir.SBlock(score.iter_vars, [], [], score.name_hint, plain)

    def replace(node):
        if isinstance(node, s_tir.SBlock) and node.name_hint == "score":
            return block
        return node

    return PrimFunc(func.params[: _SCALE + 1], tvm_ffi.structural_map(func.body, replace, order="post"), func.ret_type)


def _loads(expr: Expr) -> list:
    found = []
    tvm_ffi.structural_walk(expr, [(TensorLoad, found.append)])
    return found


def _split_score(value: Expr, block: s_tir.SBlock, func: PrimFunc):
    """The raw product that the score block reads, the score made of it, and the mask predicate or None."""
    per_head = {p.name for p in func.params[_SCALE + 1 :]}
    products = [x for x in _loads(value) if x.source.name not in per_head]
    raw = products[0]
    if not all(tvm_ffi.structural_equal(x, raw) for x in products):
        raise DefinitionError("block 'score': reads the product of block 'qk' at more than one position")
    index = [x.var for x in block.iter_vars]
    for load in _loads(value):
        if load.source.name in per_head and not all(a.same_as(b) for a, b in zip(load.indices, index[:2], strict=True)):
            raise DefinitionError(f"block 'score': parameter {load.source.name!r} is read elsewhere than at [b, h]")
    predicate = None
    if _is_if(value):
        condition, chosen, other = value.args
        if isinstance(other, tirx.FloatImm) and other.value == -float("inf"):
            predicate, value = condition, chosen
    if predicate is not None and any(x.source.name not in per_head for x in _loads(predicate)):
        raise DefinitionError(
            "block 'score': the mask depends on the score; it may depend on positions and parameters only"
        )
    return raw, value, predicate


def _is_if(expr: Expr) -> bool:
    return getattr(expr, "op", None) is not None and expr.op.name.endswith("if_then_else")


def _split_choice(value: Expr, index: list, raw_score: Expr):
    """``(condition, score, other score)`` if the score is one of two by a condition that knows no query and no key."""
    if not _is_if(value):
        return None
    condition, found = value.args[0], []
    tvm_ffi.structural_walk(condition, [(tirx.Var, found.append)])
    depends = any(x.same_as(y) for x in found for y in index[2:])
    depends |= any(x.source.same_as(raw_score.source) for x in _loads(condition))
    return None if depends else tuple(value.args)


def _reads_head(expr: Expr, raw_score: Expr, head) -> bool:
    """Whether an expression has the head anywhere but in the position of the raw score."""
    zero = tirx.const(0.0, raw_score.ty.dtype)

    def replace(node):
        return zero if isinstance(node, TensorLoad) and node.source.same_as(raw_score.source) else node

    found = []
    tvm_ffi.structural_walk(tvm_ffi.structural_map(expr, replace, order="post"), [(tirx.Var, found.append)])
    return any(x.same_as(head) for x in found)


def _param(argument) -> Param:
    if isinstance(argument.ty, PrimType):
        return Param(argument.name, str(argument.ty.dtype))
    if len(argument.ty.shape) != 2:
        raise DefinitionError(f"argument {argument.name!r}: a tensor parameter has the shape (batch, heads)")
    return Param(argument.name, str(argument.ty.dtype), per_head=True)
