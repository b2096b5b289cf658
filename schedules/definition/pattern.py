"""The matcher: from an operator's TensorIR to what a template needs to know of it.

``match(func)`` is the inverse of :func:`schedules.definition.derive.derive`.  It tells by the blocks' names which
operator a PrimFunc is, reads the score, the mask and the parameters out of the blocks that hold them, and makes sure
that the operator of this score and this mask, written anew, is the PrimFunc that it was given.  From the mask follows,
by interval arithmetic (:mod:`schedules.definition.visibility`),

* ``keys_of`` a tile of rows: the keys that some row may see, so that tiles outside are never visited, and the keys that
  every row sees, so that no mask is needed inside;
* ``rows_of`` a tile of keys: the same the other way round, for a kernel that walks along the rows;
* ``tile_full``, ``tile_live``: whether a tile needs no mask, or has anything to see (masks with gaps).

A predicate that isn't affine is always applied, and narrows nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import tvm_ffi
from tvm import sym, tirx
from tvm.ir import Call, Expr
from tvm.ir.expr import TensorLoad
from tvm.tirx import PrimFunc

from schedules.definition.cache import STORED
from schedules.definition.cases import Cases
from schedules.definition.derive import OPERATORS
from schedules.definition.errors import DefinitionError
from schedules.definition.gradient import by_elements, derivative
from schedules.definition.intervals import Atom
from schedules.definition.operator import PAGES, SCALES, STARTS, Symbols
from schedules.definition.parameters import Lookup, Site, append_arguments, parameter_symbols, value_of
from schedules.definition.reading import Reading, blocks_of, is_paged, is_ragged, read, without_regions
from schedules.definition.terms import Split, replaced
from schedules.definition.visibility import KEYS, ROWS, Span, Tile, decompose
from tvm_flash.packs.manifest import Param

#: Functions that take no longer than arithmetic.
_CHEAP = ("abs", "fabs", "if_then_else", "likely")

#: What a kernel knows of a score where it computes it: nothing, its choice, or the answers to all of its conditions.
Known = bool | tuple[bool, ...] | None


@dataclass(frozen=True)
class Ranges:
    """Of keys or rows, ``[lo, hi)`` each: those outside ``visible`` see nothing; those in ``full`` see everything.

    ``0 <= lo <= hi`` always holds, and ``hi`` is at most how many there are.  ``registers`` are those that hold them,
    if they had to be read.
    """

    visible: tuple[Expr, Expr]
    full: tuple[Expr, Expr]
    registers: tuple = ()


class Pattern:
    """An operator of attention as a template sees it.

    Attributes
    ----------
    op: which operator, one of ``OPERATORS``.
    arguments: the function's own variables for its tensors and scalars, by role.
    head_dim, head_dim_v, dtype, index_dtype: as in the definition; ``head_dim`` is that of values if there are no rows
        of keys among the arguments.
    cache: the dtype of keys and values where they have 8 bits, or else the first one that they may have.
    params: the run-time parameters, in the order of the definition's arguments.
    is_scale_only: the score is ``s * softmax_scale`` and nothing more, so that the scale folds into the exponential.
    is_given: the mask is what a tensor says, and nothing more.
    has_choice: the score is one of two, and which of them it is depends on no query and no key.
    conditions: how many conditions in the score depend on no query and no key (:mod:`schedules.definition.cases`).
    is_unmasked: every query sees every key.
    has_gaps: the visible keys of a row need not be one interval, so that ``tile_live`` is worth asking.
    depends_on_head: what is made of the raw score, or the mask, differs from head to head.
    narrows: the rows that see a key go on to the last one, and begin no earlier for later keys, as of a causal mask.
    is_opaque: the mask has parts from which no range of keys follows; a tile may have to be looked at score by score.
    atoms: what these parts read at a query alone or at a key alone; who knows its bounds in blocks of these, knows more
        of a tile.
    has_unknown: of some part not even these say anything, such as a tensor over queries and keys together; a tile is
        only known after each of its scores was looked at.
    is_interval: row i sees exactly the visible keys of ``keys_of(site, i, i)``, so that no other test of a key is
        needed.
    has_sink: the softmax has a logit beside those of keys.
    is_uneven: the score reads tensors or tables, so that a row's scores at some keys say nothing of those at others.
    may_hide_keys: where the mask ``narrows``, whether there may be keys, the last ones, that nobody sees.
    mask_split: what of the mask is the same along rows and columns, and the rest; None if there is no mask.
    lists_tiles: a kernel has a list of the tiles that each of its own visits (:mod:`schedules.tile.mask_lists`).
    """

    lists_tiles = False

    def __init__(self, found: Reading):
        self._found, self._variables = found, found.variables
        self.func, self.op, self.params, self.arguments = found.func, found.op, found.params, found.arguments
        self.dtype, self.head_dim, self.head_dim_v, self.index_dtype = _sizes_of(found.arguments)
        self.cache = _cache_of(found.arguments)
        seen = [x for x in (found.key_range, found.visible) if x is not None]
        varying = [self._variables.params[p.name] for p in found.params if "i" in p.axes or "j" in p.axes]
        tensors = [(self._variables.params[p.name], p.axes) for p in found.params if p.axes]
        self._mask = decompose(tirx.all(*seen), self._variables.index, tensors) if seen else None
        self._varying = varying
        self.mask_split = None if self._mask is None else self._split()
        self.atoms = () if self._mask is None else self._mask.atoms
        self.is_opaque = self._mask is not None and self._mask.is_opaque
        self.has_unknown = self._mask is not None and self._mask.has_unknown
        self.is_unmasked = self._mask is None
        self.has_gaps = self._mask is not None and self._mask.has_gaps
        self.is_interval = self._mask is None or self._mask.is_interval
        self.narrows = self._mask is None or getattr(self._mask, "narrows", False)
        self.may_hide_keys = self.narrows and self._mask is not None and not self._last_sees_last()
        self.is_scale_only = found.score is None or found.score.same_as(self._variables.s)
        self.is_given = found.key_range is None and any(x.same_as(found.visible) for x, _ in tensors)
        scores = self._variables  # an operator that computes none has no variables of theirs
        varying = () if scores is None else (*scores.index[2:], scores.s, *varying)
        self._choice = _split_choice(found.score, varying)
        self.has_choice = self._choice is not None
        self._cases = Cases(found.score, varying)
        self.conditions = len(self._cases.conditions)
        self._derivatives: dict[tuple[str | None, Known], Expr] = {}
        self.depends_on_head = any(map(self._reads_head, (found.score, found.visible)))
        self.has_sink = found.sink is not None
        self.is_uneven = found.score is not None and any(p.is_spread for p in self.of_score)

    def _split(self, ids=()) -> Split:
        return Split(self._mask.predicate, self._variables.index[2:], self._varying, ids)

    def split_with_ids(self) -> Split:
        """As ``mask_split``, with the ids that the mask reads among its terms."""
        return self._split([(atom.expr, atom.axis) for atom in self.atoms])

    def _last_sees_last(self) -> bool:
        """Whether it is certain that the last query sees the last key."""
        (_, _, i, j), (_, _, seqlen_q, _, seqlen_kv) = self._variables.index, self._variables.sizes
        last = ((i, seqlen_q - 1), (j, seqlen_kv - 1))

        def replace_last(node):
            return next((x for old, x in last if node.same_as(old)), node) if isinstance(node, tirx.Var) else node

        sees = tvm_ffi.structural_map(self._mask.predicate, replace_last, order="post")
        return sym.Analyzer().can_prove(sees)

    def without_sink(self) -> Pattern:
        """The same attention without its sink, and without the sink's parameters."""
        params = tuple(p for p in self.params if not self.is_of_sink(p))
        return Pattern(replace(self._found, params=params, sink=None)) if self.has_sink else self

    # ---- what a template asks

    def parameter_symbols(self):
        """Fresh arguments for a kernel: ``(arguments, {name: Var or (batch, heads) Buffer})``."""
        return parameter_symbols(self.params, self.index_dtype)

    def choice(self, site: Site) -> Expr:
        """Which of the two scores it is, where ``has_choice``: true for the first."""
        return self._substitute(self._choice[0], site, self._zero, self._zero)

    def condition(self, site: Site, number: int) -> Expr:
        """Condition number ``number`` of ``conditions``."""
        return self._substitute(self._cases.conditions[number], site, self._zero, self._zero)

    def score(self, site: Site, s: Expr, i: Expr, j: Expr, chosen: Known = None) -> Expr:
        """The scaled and modified score (float32, natural units) of the raw product ``s = q · k``.

        ``chosen`` says that ``choice`` is known to be so, and leaves out the other score; or it has the answers to all
        ``conditions``, and leaves out whatever they rule out.
        """
        return self._substitute(self._known_score(chosen), site, i, j, s)

    @property
    def is_added_to(self) -> bool:
        """Whether the score is the scaled product and something that doesn't depend on it."""
        if self.is_scale_only:
            return False
        try:
            slope = self._derivative(None, None)
        except DefinitionError:  # of an operation whose derivative isn't known
            return False
        return isinstance(slope, tirx.FloatImm) and slope.value == 1

    def added(self, site: Site, i: Expr, j: Expr) -> Expr:
        """What is added to the scaled product, where ``is_added_to``."""
        return self._substitute(self._added(), site, i, j)

    def _added(self) -> Expr:
        """In the definition's variables."""
        s = self._variables.s
        alone = tvm_ffi.structural_map(
            self._found.score,
            lambda node: tirx.FloatImm("float32", 0.0) if isinstance(node, tirx.Var) and node.same_as(s) else node,
            order="post",
        )
        return sym.Analyzer().simplify(alone)

    @property
    def adds_by_distance(self) -> bool:
        """Whether what is added to the scaled product is the same wherever a key is as far from its query, and takes
        more than arithmetic: it looks up a table, or calls a function."""
        if not self.is_added_to or self.has_choice or self.conditions:
            return False
        added, (i, j), further = self._added(), self._variables.index[2:], tirx.Var("further", self.index_dtype)
        costly, calls, read = [], [], []
        tvm_ffi.structural_walk(added, [(TensorLoad, costly.append), (Call, calls.append), (tirx.Var, read.append)])
        if any(x.same_as(y) for x in read for y in self._varying):  # stands for a value at the query and the key
            return False
        costly += [x for x in calls if getattr(x.op, "name", "").rpartition(".")[2] not in _CHEAP]
        moved = replaced(added, [(i, i + further), (j, j + further)])
        analyzer = sym.Analyzer()
        return bool(costly) and tvm_ffi.structural_equal(analyzer.simplify(moved), analyzer.simplify(added))

    def _known_score(self, chosen: Known) -> Expr:
        """In the definition's variables."""
        if isinstance(chosen, tuple):
            return self._cases.score(chosen)
        return self._found.score if chosen is None or not self.has_choice else self._choice[1 if chosen else 2]

    def score_gradient(self, site: Site, s: Expr, i: Expr, j: Expr, chosen: Known = None) -> Expr:
        """The derivative of the score with respect to ``s * softmax_scale``, for the raw product ``s = q · k``.

        The constant 1 where something is added to the scaled product, or nothing.  ``chosen`` is as in :meth:`score`.

        Raises
        ------
        DefinitionError: the score has an operation whose derivative isn't known.
        """
        return self._substitute(self._derivative(None, chosen), site, i, j, s)

    def parameter_gradient(self, name: str, site: Site, s: Expr, i: Expr, j: Expr, chosen: Known = None) -> Expr:
        """The derivative of the score with respect to a float parameter; else as ``score_gradient``."""
        return self._substitute(self._derivative(name, chosen), site, i, j, s)

    def table_gradients(
        self, name: str, site: Site, s: Expr, i: Expr, j: Expr, chosen: Known = None
    ) -> list[tuple[tuple[Expr, ...], Expr]]:
        """Which elements of a table the score reads, each by its indices, and the derivative with respect to it.

        An element that is read at several places of the expression is there several times.  Else as ``score_gradient``.
        """
        return [
            (tuple(self._substitute(x, site, i, j, s) for x in index), self._substitute(slope, site, i, j, s))
            for index, slope in self._table_derivatives(name, chosen)
        ]

    def elements_read(self, name: str, chosen: Known = None) -> int:
        """How many elements of a table ``table_gradients`` has."""
        return len(self._table_derivatives(name, chosen))

    def sink(self, site: Site) -> Expr:
        """The logit of a head that is in the denominator beside those of keys, float32, where ``has_sink``."""
        return self._substitute(self._found.sink, site, self._zero, self._zero)

    def sink_gradient(self, name: str, site: Site) -> Expr:
        """The derivative of the sink with respect to a float parameter; else as ``score_gradient``."""
        return self._substitute(self._derivative(name, None, self._found.sink), site, self._zero, self._zero)

    @property
    def of_mask(self) -> tuple[Param, ...]:
        """The parameters of the mask."""
        return self._those_of(self._found.visible)

    @property
    def of_score(self) -> tuple[Param, ...]:
        """The parameters of the score."""
        return self._those_of(self._found.score)

    def mask_depends_on(self, axis: str) -> bool:
        """Whether the mask names an axis of ``bhij`` itself, and not only by its parameters."""
        predicate = None if self._mask is None else self._mask.predicate
        return predicate is not None and _mentions(predicate, self._variables.index["bhij".index(axis)])

    def mask_differs_along(self, axis: str) -> bool:
        """Whether the mask may differ along an axis."""
        return self.mask_depends_on(axis) or any(axis in p.axes for p in self.of_mask)

    def _those_of(self, expr: Expr | None) -> tuple[Param, ...]:
        known = self._variables.params
        return tuple(p for p in self.params if expr is not None and _mentions(expr, known[p.name]))

    def is_of_sink(self, param: Param) -> bool:
        """Whether a parameter is one of the sink."""
        return self.has_sink and _mentions(self._found.sink, self._variables.params[param.name])

    @property
    def learnt(self) -> tuple[Param, ...]:
        """The parameters of the score that ask for a gradient."""
        return tuple(p for p in self.params if p.gradient and not self.is_of_sink(p))

    @property
    def learnt_of_sink(self) -> tuple[Param, ...]:
        """Those of the sink."""
        return tuple(p for p in self.params if p.gradient and self.is_of_sink(p))

    def differentiate(self) -> None:
        """Take the derivatives of the score with respect to ``s`` and to the parameters that ask for it.

        Raises
        ------
        DefinitionError: one isn't known, a parameter that asks for a gradient isn't a float, or it is one of the score
            and of the sink.
        """
        self._derivative(None, None)
        for p in self.learnt:
            (self._table_derivatives if p.rank else self._derivative)(p.name, None)
        for p in self.learnt_of_sink:
            if _mentions(self._found.score, self._variables.params[p.name]):
                raise DefinitionError(f"parameter {p.name!r}: is one of the score and of the sink; make it two")
            self._derivative(p.name, None, self._found.sink)

    def _derivative(self, name: str | None, chosen: Known, sink: Expr | None = None) -> Expr:
        """That of the score, or of the one that was chosen, with respect to ``s`` or to a parameter; taken once."""
        chosen = chosen if self.has_choice or isinstance(chosen, tuple) else None
        if (name, chosen) not in self._derivatives:
            param = next((p for p in self.params if p.name == name), None)
            _expect_float(param)
            score = self._known_score(chosen) if sink is None else sink
            variable = self._variables.params[name] if param else self._variables.s
            self._derivatives[name, chosen] = derivative(score, variable)
        return self._derivatives[name, chosen]

    def _table_derivatives(self, name: str, chosen: Known) -> list[tuple[tuple[Expr, ...], Expr]]:
        """Indices and derivatives in the definition's variables; taken once."""
        chosen = chosen if self.has_choice or isinstance(chosen, tuple) else None
        if (name, chosen) not in self._derivatives:
            _expect_float(next(p for p in self.params if p.name == name))
            self._derivatives[name, chosen] = by_elements(self._known_score(chosen), self._variables.params[name])
        return self._derivatives[name, chosen]

    def visible(self, site: Site, i: Expr, j: Expr) -> Expr | None:
        """The definition's mask: whether query ``i`` sees key ``j``, both of which exist; None for "always"."""
        visible = self._found.visible
        return None if visible is None else self._substitute(visible, site, i, j)

    def mask(self, site: Site, i: Expr, j: Expr) -> Expr:
        """Whether query ``i`` sees key ``j``; also false for ``j >= seqlen_kv``, and outside the keys of a part."""
        inside = j < site.seqlen_kv
        return inside if self._mask is None else tirx.all(inside, self.mask_inside(site, i, j))

    def mask_inside(self, site: Site, i: Expr, j: Expr) -> Expr:
        """The same of a key that exists, where there is a mask."""
        return self._substitute(self._mask.predicate, site, i, j)

    def evaluated(self, expr: Expr, site: Site, i: Expr, j: Expr) -> Expr:
        """A part of ``mask_split``, or what was made of it, at query ``i`` and key ``j``."""
        return self._substitute(expr, site, i, j)

    def keys_of(self, site: Site, row_first: Expr, row_last: Expr) -> Ranges:
        """Keys that some row, and that every row of ``row_first .. row_last`` (inclusive) sees."""
        span = Span(ROWS, row_first, row_last, site.seqlen_kv, self._at(site, row_first, self._zero))
        return Ranges(self._range(span, "visible_range"), self._range(span, "full_range"))

    def keys_of_tile(self, site: Site, row_first: Expr, row_last: Expr) -> Ranges:
        """The same of a tile of rows, where a kernel may know more than positions say."""
        return self.keys_of(site, row_first, row_last)

    def rows_of_tile(self, site: Site, key_first: Expr, key_last: Expr) -> Ranges:
        """As ``rows_of``, of a tile of keys."""
        return self.rows_of(site, key_first, key_last)

    def rows_of(self, site: Site, key_first: Expr, key_last: Expr) -> Ranges:
        """Rows that see some key, and that see every key of ``key_first .. key_last`` (inclusive).

        ``key_first`` exists.  Keys past the last one are seen by no row, so that of a tile that has such no row is in
        ``full``; ``visible`` leaves them out of account.
        """
        last = tirx.min(key_last, site.seqlen_kv - 1)
        span = Span(KEYS, key_first, last, site.seqlen_q, self._at(site, self._zero, key_first))
        lo, hi = self._range(span, "full_range")
        whole = tirx.Select(key_last < site.seqlen_kv, hi, lo)
        return Ranges(self._range(span, "visible_range"), (lo, sym.Analyzer().simplify(whole)))

    def atom_value(self, atom: Atom, site: Site, x: Expr) -> Expr:
        """The value of an atom at query or key number ``x``."""
        return self._substitute(atom.expr, site, x, x)

    def tile_full(self, site: Site, row_first, row_last, col_first, col_last, bounds=None) -> Expr:
        """Whether every row of the tile certainly sees every column; all bounds inclusive.

        ``bounds(atom)`` has the least and the greatest value of an atom in the tile's rows, or columns, if it is known.
        """
        inside = col_last < site.seqlen_kv
        if self._mask is None:
            return inside
        tile = Tile(row_first, row_last, col_first, col_last, self._at(site, row_first, col_first), bounds)
        return tirx.all(inside, self._mask.full(tile))

    def tile_live(self, site: Site, row_first, row_last, col_first, col_last, bounds=None) -> Expr:
        """Whether some row of the tile may see some column; else as ``tile_full``."""
        inside = col_first < site.seqlen_kv
        if self._mask is None:
            return inside
        tile = Tile(row_first, row_last, col_first, col_last, self._at(site, row_first, col_first), bounds)
        return tirx.all(inside, self._mask.live(tile))

    @property
    def _zero(self) -> Expr:
        return tirx.IntImm(self.index_dtype, 0)

    def _range(self, span: Span, which: str) -> tuple[Expr, Expr]:
        if self._mask is None:
            return self._zero, span.others
        lo, hi = getattr(self._mask, which)(span)
        hi = tirx.max(tirx.min(hi, span.others), self._zero)
        lo = tirx.min(tirx.max(lo, self._zero), hi)
        simplify = sym.Analyzer().simplify
        return simplify(lo), simplify(hi)

    def _at(self, site: Site, i: Expr, j: Expr):
        return lambda expr: self._substitute(expr, site, i, j)

    def _reads_head(self, expr: Expr | None) -> bool:
        """Whether an expression differs from head to head, at the same scaled product."""
        if expr is None:
            return False
        of_head = [self._variables.index[1]]
        of_head += [self._variables.params[p.name] for p in self.params if "h" in p.axes]
        return any(_mentions(expr, x) for x in of_head)

    def _substitute(self, expr: Expr, site: Site, i: Expr, j: Expr, s: Expr | None = None) -> Expr:
        """``expr`` with a kernel's values in place of the definition's variables; ``s`` is the raw product."""
        arguments, variables = self.arguments, self._variables
        sizes = (site.batch, site.heads, site.seqlen_q, site.kv_heads, site.seqlen_kv)
        scalars = {name: arguments[name] for name in OPERATORS[self.op].scalars}
        pairs = [
            *zip(variables.index, (site.b, site.h, i, j), strict=True),
            *zip(variables.sizes, sizes, strict=True),
            (arguments["softmax_scale"], site.softmax_scale),
            *((x, site.params[name]) for name, x in scalars.items() if name in site.params),
        ]
        for p in self.params:
            # launches that look at the mask alone have its parameters alone
            value = value_of(p, site, i, j) if p.name in site.params else None
            if value is None:
                continue
            if p.rank:
                shape = value.shape if isinstance(value, Lookup) else value.ty.shape
                pairs += zip(variables.params[p.name].ty.shape, shape, strict=True)
            else:
                pairs.append((variables.params[p.name], value))
        if s is not None:
            pairs.append((variables.s, s * site.softmax_scale))

        tables = [(variables.params[p.name], site.params.get(p.name)) for p in self.params if p.rank]

        def replace(node):
            if isinstance(node, tirx.Var):
                return next((new for old, new in pairs if node.same_as(old)), node)
            if isinstance(node, TensorLoad):
                table = next((new for old, new in tables if node.source.same_as(old)), None)
                return node if table is None else table[tuple(node.indices)]
            return node

        return tvm_ffi.structural_map(expr, replace, order="post")


def _expect_float(param: Param | None) -> None:
    if param and "float" not in param.dtype:
        raise DefinitionError(f"parameter {param.name!r}: is {param.dtype}; only a float parameter has a gradient")


def _mentions(expr: Expr, variable: Expr) -> bool:
    found = []
    tvm_ffi.structural_walk(expr, [(tirx.Var, lambda x: found.append(x.same_as(variable)))])
    return any(found)


def _split_choice(score: Expr | None, varying) -> tuple[Expr, Expr, Expr] | None:
    """``(condition, score, other score)`` if a score is one of two by a condition without the variables ``varying``,
    which differ from query to query or key to key."""
    if score is None or not getattr(getattr(score, "op", None), "name", "").endswith("if_then_else"):
        return None
    return None if any(_mentions(score.args[0], x) for x in varying) else tuple(score.args)


def match(func: PrimFunc) -> Pattern:
    """Recognise an operator of attention.

    Parameters
    ----------
    func: a PrimFunc as :class:`schedules.definition.attention.Attention` or
        :func:`schedules.definition.derive.derive` makes it; what its score and its mask compute is its own.

    Raises
    ------
    DefinitionError: it is none in that form; names the block and says what was found.
    """
    found = read(func)
    pattern = Pattern(found)
    _check(found, pattern)
    return pattern


# ---------------------------------------------------------------- making sure of the rest


#: Tensors whose last dimension isn't that of a row.
_WITHOUT_ROWS = ("lse", "dlse", "delta", "lse_parts")
_WITHOUT_ROWS += ("cache_seqlens", "rotary_seqlens", "rotary_cos", "rotary_sin")


def _sizes_of(arguments) -> tuple[str, int, int, str]:
    """dtype, head_dim, head_dim_v and index dtype of an operator."""
    keys, values = (arguments.get(role, arguments.get("o")) for role in ("k", "v"))
    for role, x in arguments.items():
        if not isinstance(x.ty, tirx.BufferType) or role in (*_WITHOUT_ROWS, *STARTS, *PAGES, *SCALES):
            continue
        if is_paged(arguments) and role in ("k", "v"):
            axes, rank = "(pages, page_size, heads, head_dim)", 4
        elif is_ragged(arguments):
            axes, rank = "(total, heads, head_dim)", 3
        else:
            axes, rank = "(batch, heads, seq, head_dim)", 4
        if len(x.ty.shape) != rank + (role == "o_parts") or not isinstance(x.ty.shape[-1], tirx.IntImm):
            raise DefinitionError(f"arguments: {role} is {axes} with a constant head_dim")
    return (
        str(arguments.get("q", keys).ty.dtype),
        int(keys.ty.shape[-1]),
        int(values.ty.shape[-1]),
        str(keys.ty.shape[0].ty.dtype),
    )


def _check(found: Reading, pattern: Pattern) -> None:
    """Make sure that the operator, written anew with the score and the mask that were read, is what was given."""
    func, operator = found.func, OPERATORS[found.op]
    asked = [p for p in found.params if p.gradient and operator.has_gradients]
    symbols = Symbols(
        {p.name: x for p, x in zip(found.params, found.parameters, strict=True)},
        {p.name: x for p, x in zip(asked, found.gradients, strict=True)},
        {name: found.arguments[name] for name in operator.scalars},
        pattern.cache,
    )
    model = operator.write(pattern, symbols)
    expected = blocks_of(model)
    for name in (*expected, *found.blocks):
        if name not in expected:
            raise DefinitionError(f"block {name!r}: unknown; no such parameter asks for a gradient")
        if name not in found.blocks:
            raise DefinitionError(f"block {name!r}: missing; its parameter asks for a gradient")
        if not tvm_ffi.structural_equal(found.blocks[name], expected[name], map_free_vars=True):
            raise DefinitionError(
                f"block {name!r}: is not the step of attention that the templates know; expected\n"
                f"{expected[name].script()}\nfound\n{found.blocks[name].script()}"
            )
    common = _plain(func), _plain(append_arguments(model, list(func.params[len(operator.arguments) :])))
    if not tvm_ffi.structural_equal(*common):
        where = tvm_ffi.get_first_structural_mismatch(*common)
        raise DefinitionError(f"the blocks are not connected as in attention; first difference at {where}")


def _cache_of(arguments) -> str:
    """The dtype of keys and values that have 8 bits; where they have that of queries, the one to derive others with."""
    if SCALES[0] not in arguments:
        return next(iter(STORED))
    stored = str(arguments["k"].ty.dtype)
    found = next((cache for cache, bits in STORED.items() if bits == stored), None)
    if found is None:
        raise DefinitionError(f"arguments: k is {stored}, and a cache with scales is one of {', '.join(STORED)}")
    return found


def _plain(func: PrimFunc) -> PrimFunc:
    """``func`` without attributes and regions: for comparison only."""
    return PrimFunc(func.params, tvm_ffi.structural_map(func.body, without_regions, order="post"), func.ret_type)
