"""Whether there are kernels for the gradients of a call, asked before it is made."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType

from tvm_flash.call.choice import choose
from tvm_flash.call.prepare import kinds_of
from tvm_flash.call.problem import Problem
from tvm_flash.call.signature import Options
from tvm_flash.errors import TvmFlashError
from tvm_flash.machine.device import Device
from tvm_flash.operators import OPERATORS, RAGGED_LAYOUT
from tvm_flash.packs.registry import on_refresh

#: A length that stands for one that isn't known yet: no window is wider.
_LONG = 2**28


def why_no_backward(
    options: Options,
    device: Device,
    dtype: str,
    lengths: tuple[int, int],
    head_dims: tuple[int, int],
    parameters: Mapping[str, str] = MappingProxyType({}),
    gradients: tuple[str, ...] = (),
) -> str | None:
    """Why no kernel computes the gradients of a call, or None if one does.

    Parameters
    ----------
    options: those of the call of ``forward``.
    device, dtype: of its tensors.
    lengths: ``(seqlen_q, seqlen_kv)``; what isn't a number yet may stand for any.
    head_dims: ``(head_dim, head_dim_v)``.
    parameters: the dtypes of the parameters of mask and score that are given as tensors, by name.
    gradients: names of those whose gradients are wanted too.
    """
    lengths = tuple(n if isinstance(n, int) else _LONG for n in lengths)
    _, what = kinds_of(options, *lengths, parameters)
    return why_none(
        OPERATORS[options.op].backward, *what.values(), device, dtype, *head_dims, options.variant, gradients
    )


@functools.lru_cache(maxsize=4096)
def why_none(
    op: str, definition: str, mask: str, score: str, device: Device, dtype: str, head_dim: int, head_dim_v: int,
    variant: str = "auto", gradients: tuple[str, ...] = (), accumulate: bool = False,
) -> str | None:  # fmt: skip
    """Why there is no kernel of an operator, or None if there is one."""
    problem = Problem(
        *(1, 1, 1, 1, 1, head_dim, head_dim_v),
        dtype=dtype,
        layout=RAGGED_LAYOUT if OPERATORS[op].starts else "bhsd",
        definition=definition,
        mask=mask,
        score=score,
        op=op,
        gradients=gradients,
        accumulate=accumulate,
    )
    try:
        choose(problem, device, variant)
    except TvmFlashError as e:
        return str(e)
    return None


on_refresh(why_none.cache_clear)
