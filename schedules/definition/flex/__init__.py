"""Definitions from the functions that PyTorch's FlexAttention takes: ``score_mod`` and ``mask_mod``.

PyTorch traces each function to a graph of operations (:mod:`.graph`); one table (:mod:`.rules`) says what each of them
is as a TIR expression and in NumPy, of which the twins are made.  A tensor that a function holds on to becomes a table,
named as the function's own variable.  A score of −inf, which these functions use for "hidden", becomes a part of the
mask, so that tiles that nobody sees are skipped.

PyTorch is needed where a definition is made, never where it is called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from tvm.script import tirx as T

from schedules.definition.attention import Attention
from schedules.definition.catalogue import FULL, IDENTITY, Mask, ScoreModification
from schedules.definition.flex.formula import Formula, settled, without_hidden
from schedules.definition.flex.graph import read
from schedules.definition.flex.rules import NumPy, Tir


def from_flex(
    score_mod: Callable | None = None,
    mask_mod: Callable | None = None,
    *,
    name: str = "flex_attention",
    tables: bool = False,
) -> Attention:
    """The definition that says what ``flex_attention(q, k, v, score_mod, create_block_mask(mask_mod, …))`` does.

    Parameters
    ----------
    score_mod: ``(score, b, h, q_idx, kv_idx) -> score``, of 0-dimensional tensors; None leaves the score as it is.
    mask_mod: ``(b, h, q_idx, kv_idx) -> bool``, true where a query sees a key; None hides nothing.
    name: of the definition; ``build --definition file.py:name`` uses the variable's name instead.
    tables: tensors that are read at queries or keys are tables too.  Kernels of sequences of different lengths
        (``build --form ragged,paged``) take no others, and those over a batch skip fewer tiles with them.

    Returns
    -------
    An :class:`Attention`.  Every tensor that the functions hold on to is a parameter of the variable's name (or the
    attribute's, the default argument's; ``name_0`` in a list, ``name_key`` in a dictionary), given at each call,
    integers as int32, float64 as float32.  One that is read at ``[b, h, q_idx, kv_idx]`` only, or at some of these in
    this order, has a value for each, and a gradient if it requires one; any other is a table of any sizes, and an index
    beyond its end reads the last element.  Positions count from 0 in both sequences, as FlexAttention's do: nothing is
    aligned bottom-right.

    Raises
    ------
    DefinitionError: a function isn't one of scores or of positions, or has an operation that isn't known here; the
        message names it.
    ImportError: PyTorch isn't installed.
    """
    given = [(score_mod, "score_mod"), (mask_mod, "mask_mod")]
    formulas = settled([read(function, role) for function, role in given if function is not None], tables)
    score = None if score_mod is None else formulas[0]
    masks = [] if mask_mod is None else formulas[-1:]
    if score is not None:
        score, hidden = without_hidden(score)
        masks += [] if hidden is None else [hidden]
    return Attention(
        score=IDENTITY if score is None else _modification(score),
        mask=_mask(masks) if masks else FULL,
        name=name,
    )


def _modification(formula: Formula) -> ScoreModification:
    def expr(s, at):
        return Tir(at, s).value(formula.result)

    def twin(s, at):
        return NumPy(at, s).value(formula.result)

    return ScoreModification(f"{formula.name}_score", expr, twin, formula.params)


def _mask(formulas: list[Formula]) -> Mask:
    def expr(at):
        first, *others = (Tir(at).value(f.result) for f in formulas)
        return T.And(first, *others) if others else first

    def twin(at):
        return functools.reduce(np.logical_and, (NumPy(at).value(f.result) for f in formulas))

    params = tuple(dict.fromkeys(p for f in formulas for p in f.params))
    return Mask("_".join(f.name for f in formulas) + "_mask", expr, twin, params)
