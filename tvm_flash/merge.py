"""Attention over several sets of keys, put together from its results over each of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from tvm_flash.call.checks import check_layout
from tvm_flash.call.problem import DTYPES
from tvm_flash.errors import ArgumentTypeError, InvalidArgumentError, LayoutError, NotSupportedError
from tvm_flash.frameworks import framework_of
from tvm_flash.frameworks.arrays import arrays_of

#: Of each layout of results: its dimensions, and which of them its log-sum-exps have.
_LAYOUTS = {
    "bhsd": ("(batch, heads, seq, head_dim)", (0, 1, 2)),
    "bshd": ("(batch, seq, heads, head_dim)", (0, 2, 1)),
    "ragged": ("(total, heads, head_dim)", (1, 0)),
}


def merge_attention(outs: Sequence[Any], lses: Sequence[Any], *, layout: str = "bhsd") -> tuple[Any, Any]:
    """Attention of the same queries over all of several sets of keys, of which no key is in two.

    Part ``i`` is what a function of this package gave over the keys of set ``i``, with ``return_lse=True``: keys that
    came in chunks, that several sequences share as a prefix, or that lie on several devices.

    Parameters
    ----------
    outs: a list or tuple of results, all of one shape, dtype (float32, float16 or bfloat16), framework and device:
        ``(batch, heads, seq, head_dim)``, or ``(batch, seq, heads, head_dim)`` with ``layout="bshd"``, or ``(total,
        heads, head_dim)`` of sequences one after the other.  Tensors of torch, NumPy, JAX, or of what speaks DLPack, on
        the CPU (but bfloat16); any strides.
    lses: their log-sum-exps, as many, float32: ``(batch, heads, seq)`` in both layouts, or ``(heads, total)``.
    layout: ``"bhsd"`` or ``"bshd"``, of results with four dimensions.  Log-sum-exps tell the two apart, unless there
        are as many heads as positions.

    Returns
    -------
    The result and its log-sum-exp, new tensors like those of a part.  Sums are in float32, in the order of the parts,
    and rounded to the dtype once.  A part in which a row sees no key (−inf) changes nothing of it, whatever its result
    has there; a row that sees none in any part gives zeros and −inf.  One part is given back bit by bit, but for that.

    In PyTorch and JAX it is differentiable, by log-sum-exps too, and a step of programs that they compile.  A row has
    no gradient by a part in which it sees no key.

    Raises
    ------
    InvalidArgumentError, LayoutError (ValueError), ArgumentTypeError (TypeError): an argument is wrong.
    NotSupportedError (NotImplementedError): the memory of a DLPack tensor isn't on the CPU.

    Notes
    -----
    Sinks belong to one part, whichever: give them to one of the calls, and none to the others.  That part's result and
    log-sum-exp then have them, and so has what is put together.

    Positions are those of a call: causal and window_size place a part's last key beside the last query.  A part whose
    keys all come before the queries is computed without ``causal``.
    """
    check_layout(layout)
    _check_parts(outs, lses)
    if framework_of(outs[0], "outs[0]").name == "dlpack":
        return _of_dlpack(outs, lses, layout)
    xp = arrays_of(outs[0], "outs[0]")
    dims = _check_tensors(xp, outs, lses, layout)
    with xp.quiet():
        weights, total, lse = _weights(xp, lses)
        out = None
        for part, weight, part_lse in zip(outs, weights, lses, strict=True):
            seen, weight = (_beside(x, dims) for x in (part_lse != -float("inf"), weight))
            share = xp.where(seen, xp.float32(part), 0.0) * weight
            out = share if out is None else out + share
        return xp.cast(out / _beside(total, dims), xp.name_of(outs[0])), lse


def _weights(xp: Any, lses: Sequence[Any]) -> tuple[list[Any], Any, Any]:
    """What each part's result is multiplied with, what the sum of products is divided by, and the log-sum-exp of all.

    ``lses`` are float32, of shapes that broadcast, −inf where a part has no key: its weight there is 0.  The divisor is
    never 0.  ``xp`` is of :mod:`tvm_flash.frameworks.arrays`.
    """
    nothing = -float("inf")
    peak = xp.stopped(functools.reduce(xp.maximum, lses))
    seen = peak != nothing
    peak = xp.where(seen, peak, 0.0)
    weights = []
    for lse in lses:
        own = lse != nothing
        # −inf stays out of the differences, where its derivative would be NaN.
        weights.append(xp.where(own, xp.exp(xp.where(own, lse, peak) - peak), 0.0))
    total = xp.where(seen, functools.reduce(lambda a, b: a + b, weights), 1.0)
    return weights, total, xp.where(seen, peak + xp.log(total), nothing)


def _beside(x: Any, dims: tuple[int, ...]) -> Any:
    """What each row has, so that it broadcasts against results; ``dims`` are those of a result that it has."""
    if dims == (0, 2, 1):
        x = x.swapaxes(1, 2)
    elif dims == (1, 0):
        x = x.swapaxes(0, 1)
    return x[..., None]


def _of_dlpack(outs: Sequence[Any], lses: Sequence[Any], layout: str) -> tuple[Any, Any]:
    """The same by NumPy, over the memory of another framework's tensors."""
    import numpy as np

    from tvm_flash.frameworks.dlpack import DLPACK

    arrays: dict[str, list[Any]] = {"outs": [], "lses": []}
    for name, parts in (("outs", outs), ("lses", lses)):
        for i, x in enumerate(parts):
            what = f"{name}[{i}]"
            _check_framework("dlpack", x, what)
            seen = DLPACK.view(DLPACK.adopt(x), what)
            if seen.device_kind != "cpu":
                raise NotSupportedError(
                    f"{what}: is on {seen.device}, where nothing here computes for this framework; use "
                    f"torch.from_dlpack({what})"
                )
            if seen.dtype == "bfloat16":
                raise ArgumentTypeError(f"{what}: is bfloat16, which NumPy hasn't; use torch.from_dlpack({what})")
            arrays[name].append(np.from_dlpack(DLPACK.adopt(x)))
    return tuple(DLPACK.release(x, outs[0]) for x in merge_attention(**arrays, layout=layout))


# ---------------------------------------------------------------- checks


def _check_parts(outs: Any, lses: Any) -> None:
    for name, parts in (("outs", outs), ("lses", lses)):
        if not isinstance(parts, (list, tuple)):
            raise ArgumentTypeError(
                f"{name}: is a {type(parts).__qualname__}, expected a list or tuple of tensors, one for each part"
            )
    if not outs:
        raise InvalidArgumentError("outs: is empty, expected the results of one part at least")
    if len(lses) != len(outs):
        raise InvalidArgumentError(f"lses: has {len(lses)} tensors, expected {len(outs)}, one for each of outs")


def _check_framework(framework: str, x: Any, name: str) -> None:
    if (other := framework_of(x, name).name) != framework:
        raise ArgumentTypeError(
            f"{name}: is a {other} tensor, but outs[0] is one of {framework}; convert one to the other's"
        )


def _check_tensors(xp: Any, outs: Sequence[Any], lses: Sequence[Any], layout: str) -> tuple[int, ...]:
    """Which dimensions of a result its log-sum-exp has, once all tensors fit the first."""
    framework, first = framework_of(outs[0], "outs[0]").name, outs[0]
    for name, parts in (("outs", outs), ("lses", lses)):
        for i, x in enumerate(parts):
            _check_framework(framework, x, f"{name}[{i}]")
            xp.check(x, f"{name}[{i}]")
    shape = tuple(first.shape)
    if len(shape) not in (3, 4):
        raise InvalidArgumentError(
            f"outs[0]: has shape {shape}, expected {_LAYOUTS[layout][0]}, or {_LAYOUTS['ragged'][0]} of sequences one "
            f"after the other"
        )
    dimensions, dims = _LAYOUTS[layout if len(shape) == 4 else "ragged"]
    rows = tuple(shape[d] for d in dims)
    if xp.name_of(first) not in DTYPES:
        raise ArgumentTypeError(
            f"outs[0]: has dtype {xp.name_of(first)}, expected one of {', '.join(DTYPES)}; convert it"
        )
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if tuple(out.shape) != shape:
            raise InvalidArgumentError(f"outs[{i}]: has shape {tuple(out.shape)}, expected {shape}, that of outs[0]")
        _check_likeness(xp, out, f"outs[{i}]", xp.name_of(first), first)
        _check_rows(tuple(lse.shape), f"lses[{i}]", rows, shape, dimensions)
        _check_likeness(xp, lse, f"lses[{i}]", "float32", first)
    return dims


def _check_rows(
    found: tuple[int, ...], name: str, rows: tuple[int, ...], shape: tuple[int, ...], dimensions: str
) -> None:
    if found == rows:
        return
    message = f"{name}: has shape {found}, expected {rows} beside results {shape}, which are {dimensions}"
    if len(shape) == 4 and found == (rows[0], rows[2], rows[1]):
        other = next(x for x, (text, _) in _LAYOUTS.items() if len(text.split()) == 4 and text != dimensions)
        raise LayoutError(f"{message}; if they are {_LAYOUTS[other][0]}, pass layout={other!r}")
    raise InvalidArgumentError(message)


def _check_likeness(xp: Any, x: Any, name: str, dtype: str, first: Any) -> None:
    if xp.name_of(x) != dtype:
        raise ArgumentTypeError(f"{name}: has dtype {xp.name_of(x)}, expected {dtype}; convert it")
    if xp.device(x) != xp.device(first):
        raise ArgumentTypeError(f"{name}: is on {xp.device(x)}, expected {xp.device(first)}, where outs[0] is")
