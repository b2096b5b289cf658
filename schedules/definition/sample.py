"""Values for the parameters of a definition, where a check or a picture needs some.

Those that mean something only together (ids, a tree, the width of a picture) are the definition's ``example``; the
others are drawn at random.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from schedules.definition.attention import Attention
from schedules.definition.errors import DefinitionError
from tvm_flash.packs.manifest import Param

#: Sizes of a table by its rank, so that whoever looks up distances of some hundred positions stays within it.
_TABLE_SIZES = {1: 1024, 2: 512, 3: 64}
_TABLE_SIZE = 12


def parameters_of(
    definition: Attention, batch: int, heads: int, seqlen_q: int, seqlen_kv: int, seed: int = 0
) -> dict[str, Any]:
    """Numbers and arrays by name, tensors with all sizes of their axes.

    Floats lie between 0.25 and 1.25, so that they can be divisors, integers of tensors below 4, as ids of a few
    documents, and numbers below half of the shorter length.

    Raises
    ------
    DefinitionError: the definition's example fails, or has something that is no parameter or has another rank.
    """
    rng = np.random.default_rng(seed)
    sizes = {"b": batch, "h": heads, "i": seqlen_q, "j": seqlen_kv}
    given = _example(definition, batch, heads, seqlen_q, seqlen_kv)
    found = {}
    for p in definition.params:
        whole = tuple(sizes[a] for a in p.axes) or (_TABLE_SIZES.get(p.rank, _TABLE_SIZE),) * p.rank
        if p.name in given:
            found[p.name] = _as_declared(definition, p, given[p.name], whole)
        elif p.is_tensor:
            found[p.name] = _encoded(_drawn(p, rng, whole), p)
        elif p.dtype == "int32":
            found[p.name] = int(rng.integers(1, max(2, min(seqlen_q, seqlen_kv) // 2)))
        else:
            found[p.name] = float(np.float32(rng.uniform(0.25, 1.25)))
    return found


def _example(definition: Attention, *sizes: int) -> Mapping[str, Any]:
    if definition.example is None:
        return {}
    try:
        given = definition.example(*sizes)
    except Exception as e:  # a user's function may fail in any way; the cause is chained
        raise DefinitionError(f"{definition.name}: its example fails: {type(e).__name__}: {e}") from e
    if unknown := set(given) - {p.name for p in definition.params}:
        raise DefinitionError(f"{definition.name}: its example has {min(unknown)!r}, which is no parameter")
    return given


def _as_declared(definition: Attention, param: Param, value: Any, whole: tuple[int, ...]):
    if not param.is_tensor:
        return (float if param.dtype == "float32" else int)(value)
    value = np.asarray(value)
    try:
        value = value if param.rank else np.broadcast_to(value, whole)
    except ValueError:
        raise DefinitionError(
            f"{definition.name}: its example has {param.name!r} of shape {value.shape}, expected {whole}"
        ) from None
    if param.rank and value.ndim != param.rank:
        raise DefinitionError(f"{definition.name}: its example has {param.name!r} of rank {value.ndim}")
    return _encoded(np.array(value), param)


def _drawn(param: Param, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    if param.dtype == "bool":
        return rng.random(shape) < 0.6
    if param.dtype == "int32":
        return rng.integers(0, 4, shape)
    return rng.uniform(0.25, 1.25, shape)


def _encoded(value: np.ndarray, param: Param) -> np.ndarray:
    """In the parameter's dtype, or float32 if it is that of q; bfloat16 as NumPy has it by ``ml_dtypes``."""
    if param.dtype != "bfloat16":
        return np.ascontiguousarray(value.astype(param.beside("float32").dtype))
    import ml_dtypes

    return np.ascontiguousarray(value.astype(ml_dtypes.bfloat16))
