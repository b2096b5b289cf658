"""Gradients of attention for whoever has no autograd: NumPy, CuPy and DLPack arrays, and programs that keep their own
book of what flows back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tvm_flash.call.checks import check_layout, check_params
from tvm_flash.call.dispatch import entrance
from tvm_flash.call.signature import signature
from tvm_flash.catalogue import PARAMS
from tvm_flash.errors import ArgumentTypeError, InvalidArgumentError
from tvm_flash.operators import BACKWARD, RAGGED_BACKWARD, RAGGED_LAYOUT, gradient_of
from tvm_flash.packs.manifest import BUILTIN_DEFINITION, Param
from tvm_flash.padded import PARAMETERS as _PADDED_PARAMETERS
from tvm_flash.padded import check_placement


def flash_attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    *,
    dlse: Any = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    gradients: Sequence[str] = (),
    dq: Any = None,
    dk: Any = None,
    dv: Any = None,
    d_alibi_slopes: Any = None,
    d_sinks: Any = None,
    accumulate: bool = False,
    variant: str = "auto",
) -> tuple[Any, ...]:
    """Gradients of :func:`tvm_flash.flash_attention`, over tensors in V1's layout, ``(batch, heads, seq, head_dim)``.

    Nothing but q, k, v, the result and its log-sum-exp is needed of the forward.

    Parameters
    ----------
    dout: gradient of the result, in its shape and in q's dtype; any strides with a contiguous last dimension.
    q, k, v: as they were given to the forward.
    out: what the forward gave, in q's dtype.
    lse: the log-sum-exp that it gave with ``return_lse=True``: float32 ``(batch, heads, seqlen_q)``, contiguous.
    dlse: gradient of the log-sum-exp, as lse; none if not given.
    causal, softmax_scale, window_size, softcap, alibi_slopes, sinks: as they were given to the forward.
    gradients: names of those of ``alibi_slopes`` and ``sinks`` whose gradients are wanted too.
    dq, dk, dv, d_alibi_slopes, d_sinks: where the gradients go; must not share memory with another tensor.
    accumulate: add the gradients to what is in dq, dk, dv (and d_alibi_slopes), all float32 and given by the caller, as
        the parts of a sequence that several devices hold need it; convert them when the last part has been added.
    variant: which kernel runs, ``"v1"``, ``"v2"`` or ``"auto"``.

    Returns
    -------
    ``(dq, dk, dv)`` in the shapes, dtype and framework of q, k and v: those of a key head are summed over the query
    heads that read it.  Then those of ``gradients``, in that order, float32 ``(batch, heads)``: sum one over the batch
    for a parameter that has none.  A row that sees no key has no gradient, whatever stands in it; what flows to its
    result and log-sum-exp, NaN too, comes to its sink, if there is one.  The same bits on every run.

    Raises
    ------
    InvalidArgumentError, LayoutError (ValueError), ArgumentTypeError (TypeError): an argument is wrong.
    NotSupportedError, KernelNotFoundError (NotImplementedError): nothing can compute it.
    PackError, KernelError (RuntimeError): no pack for the device, a damaged pack, a failed launch.

    Notes
    -----
    The method is FlashAttention's (Dao et al., 2022): scores are computed anew.  In PyTorch and JAX the functions are
    differentiable, and this one isn't needed.
    """
    given, memory = _parameters(alibi_slopes, sinks, d_alibi_slopes, d_sinks)
    attend = _of_function("bhsd", given, gradients, memory)
    # fmt: off
    return attend(dout, q, k, v, out, lse, dlse, dq, dk, dv,
                  variant, accumulate, softmax_scale, causal, window_size, softcap)
    # fmt: on


def flash_attention_v2_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    *,
    dlse: Any = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    gradients: Sequence[str] = (),
    dq: Any = None,
    dk: Any = None,
    dv: Any = None,
    d_alibi_slopes: Any = None,
    d_sinks: Any = None,
    accumulate: bool = False,
    variant: str = "auto",
) -> tuple[Any, ...]:
    """Gradients of :func:`tvm_flash.flash_attention_v2`, over tensors in its layout, ``(batch, seq, heads, head_dim)``.

    Parameters, results and errors are those of :func:`flash_attention_backward`, with dimensions 1 and 2 of all tensors
    of rank 4 swapped; lse and dlse stay ``(batch, heads, seqlen_q)``.
    """
    given, memory = _parameters(alibi_slopes, sinks, d_alibi_slopes, d_sinks)
    attend = _of_function("bshd", given, gradients, memory)
    # fmt: off
    return attend(dout, q, k, v, out, lse, dlse, dq, dk, dv,
                  variant, accumulate, softmax_scale, causal, window_size, softcap)
    # fmt: on


def padded_attention_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    key_range: Any,
    *,
    dlse: Any = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    query_start: Any = None,
    gradients: Sequence[str] = (),
    dq: Any = None,
    dk: Any = None,
    dv: Any = None,
    d_alibi_slopes: Any = None,
    d_sinks: Any = None,
    accumulate: bool = False,
    layout: str = "bhsd",
    variant: str = "auto",
) -> tuple[Any, ...]:
    """Gradients of :func:`tvm_flash.padded_attention`; those of keys and values out of range are zeros.

    ``key_range``, ``query_start`` and ``layout`` are as they were given to the forward; the others, the results and the
    errors are those of :func:`flash_attention_backward`.
    """
    check_layout(layout)
    query_start = check_placement(key_range, query_start)
    values = (key_range[:, :1], key_range[:, 1:], query_start, alibi_slopes, sinks)
    memory = {"alibi_slopes": d_alibi_slopes, "sinks": d_sinks}
    parameters = dict(zip(_PADDED_PARAMETERS, values, strict=True))
    attend = _of_function(layout, parameters, gradients, memory, layout_known=True)
    # fmt: off
    return attend(dout, q, k, v, out, lse, dlse, dq, dk, dv,
                  variant, accumulate, softmax_scale, causal, window_size, softcap)
    # fmt: on


def flash_attention_varlen_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    *,
    dlse: Any = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    gradients: Sequence[str] = (),
    dq: Any = None,
    dk: Any = None,
    dv: Any = None,
    d_alibi_slopes: Any = None,
    d_sinks: Any = None,
) -> tuple[Any, ...]:
    """Gradients of :func:`tvm_flash.flash_attention_varlen`; no kernel adds to what is there (``accumulate``).

    ``dout`` and ``out`` are ``(total_q, heads, head_dim_v)``, ``lse`` and ``dlse`` float32 ``(heads, total_q)``;
    ``cu_seqlens_q`` and ``cu_seqlens_k`` as they were given to the forward.  Gradients of rows and keys that belong to
    no sequence are zeros.  The others, the results and the errors are those of :func:`flash_attention_backward`.
    """
    given, memory = {"alibi_slopes": alibi_slopes, "sinks": sinks}, {"alibi_slopes": d_alibi_slopes, "sinks": d_sinks}
    starts = cu_seqlens_q, cu_seqlens_k
    attend = _of_function(RAGGED_LAYOUT, given, gradients, memory, layout_known=True, op=RAGGED_BACKWARD, starts=starts)
    # fmt: off
    return attend(dout, q, k, v, out, lse, dlse, dq, dk, dv,
                  "auto", False, softmax_scale, causal, window_size, softcap)
    # fmt: on


def _parameters(alibi_slopes: Any, sinks: Any, d_alibi_slopes: Any, d_sinks: Any) -> tuple[dict, dict]:
    """Parameters of a call by name, and memory for their gradients; sinks only if they have to do with it."""
    given, memory = {"alibi_slopes": alibi_slopes}, {"alibi_slopes": d_alibi_slopes}
    if sinks is not None or d_sinks is not None:
        given, memory = {**given, "sinks": sinks}, {**memory, "sinks": d_sinks}
    return given, memory


def backward_of(name: str, layout: str, variant: str, declared: dict[str, Param]) -> Callable[..., Any]:
    """The gradients of a definition of the user's own, whose parameters are ``declared``."""

    def backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        *,
        dlse=None,
        softmax_scale=None,
        gradients=(),
        dq=None,
        dk=None,
        dv=None,
        accumulate=False,
        **params,
    ):
        attend, numbers = _of_definition(name, layout, declared, gradients, params)
        return attend(dout, q, k, v, out, lse, dlse, dq, dk, dv, variant, accumulate, softmax_scale, *numbers)

    backward.__name__ = backward.__qualname__ = f"{name}_backward"
    backward.__doc__ = f"Gradients of attention as the definition {name!r} says, over tensors in the layout {layout!r}."
    return backward


def varlen_backward_of(name: str, declared: dict[str, Param]) -> Callable[..., Any]:
    """The same of sequences of different lengths."""

    def backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens_q,
        cu_seqlens_k,
        *,
        dlse=None,
        softmax_scale=None,
        gradients=(),
        dq=None,
        dk=None,
        dv=None,
        **params,
    ):
        how = {"op": RAGGED_BACKWARD, "starts": (cu_seqlens_q, cu_seqlens_k), "layout_known": True}
        attend, numbers = _of_definition(name, RAGGED_LAYOUT, declared, gradients, params, **how)
        return attend(dout, q, k, v, out, lse, dlse, dq, dk, dv, "auto", False, softmax_scale, *numbers)

    backward.__name__ = backward.__qualname__ = f"{name}_varlen_backward"
    backward.__doc__ = f"Gradients of attention as the definition {name!r} says, over sequences of different lengths."
    return backward


def _of_definition(
    name: str, layout: str, declared: dict[str, Param], gradients: Sequence[str], params: dict[str, Any], **how: Any
) -> tuple[Callable[..., Any], list]:
    """:func:`_of_function` of a definition, and the values of its parameters that are numbers.

    ``params`` are its parameters by name, with memory for their gradients among them.
    """
    memory = {p: params.pop(gradient_of(p), None) for p in declared}
    check_params(name, params, declared)
    given = {p: params[p] for p in declared if declared[p].is_tensor}
    scalars = tuple(p for p in declared if not declared[p].is_tensor)
    own = {"name": name, "scalars": scalars, "declared": declared, **how}
    return _of_function(layout, given, gradients, memory, **own), [params[p] for p in scalars]


def _of_function(
    layout: str,
    parameters: dict[str, Any],
    gradients: Sequence[str],
    memory: dict[str, Any],
    *,
    name: str = BUILTIN_DEFINITION,
    scalars: tuple[str, ...] = (),
    declared: Any = PARAMS,
    layout_known: bool = False,
    op: str = BACKWARD,
    starts: tuple[Any, ...] = (),
) -> Callable[..., Any]:
    """``attend(dout, q, k, v, out, lse, dlse, dq, dk, dv, options …)`` with the parameters put where they belong.

    ``parameters`` are tensors by name, None if they aren't given, and ``scalars`` names of numbers; ``memory`` is what
    was given for the gradients of both; ``starts`` say where sequences begin, of an operator over those that lie one
    after the other.
    """
    if isinstance(gradients, str) or not isinstance(gradients, Iterable):
        raise ArgumentTypeError(f"gradients: is {gradients!r}, expected a tuple of names")
    wanted = tuple(gradients)
    learnt = [n for n, x in parameters.items() if x is not None and "float" in declared[n].dtype]
    learnt += [n for n in scalars if declared[n].gradient]
    if unknown := [n for n in wanted if n not in learnt]:
        raise InvalidArgumentError(
            f"gradients: has {', '.join(map(repr, unknown))}, expected names of float parameters that are given: "
            f"{', '.join(map(repr, learnt)) or 'there are none'}"
        )
    for n, x in memory.items():
        if x is not None and n not in wanted:
            raise InvalidArgumentError(
                f"{gradient_of(n)}: is given, but that gradient isn't asked for; add {n!r} to gradients"
            )
    attend = entrance(
        signature(
            *(layout, name, tuple(parameters), scalars),
            op=op,
            gradients=wanted,
            layout_known=layout_known,
        )
    )

    def call(dout, q, k, v, out, lse, dlse, dq, dk, dv, *options):
        more = (memory.get(n) for n in wanted)
        return attend(dout, q, k, v, out, lse, dlse, *starts, *parameters.values(), dq, dk, dv, *more, *options)

    return call
