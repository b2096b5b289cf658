"""Every check of an argument.  Nothing here writes, and nothing is written before all of it has passed."""

from __future__ import annotations

import math
import numbers
import operator
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm_flash.call.problem import DTYPES, FUNCTION_OF_LAYOUT, HEAD_DIM_MULTIPLE, LAYOUTS, VARIANTS
from tvm_flash.errors import ArgumentTypeError, InvalidArgumentError, LayoutError, NotSupportedError
from tvm_flash.frameworks import TensorView, contiguous_strides
from tvm_flash.operators import RAGGED_LAYOUT, tensor
from tvm_flash.packs import sizes
from tvm_flash.packs.manifest import Param

_DIMENSIONS = {
    "bhsd": "(batch, heads, seq, head_dim)",
    "bshd": "(batch, seq, heads, head_dim)",
    RAGGED_LAYOUT: "(total, heads, head_dim)",
}
_AXES = {"b": "batch", "h": "heads", "i": "seqlen_q", "j": "seqlen_kv"}
_OTHER_LAYOUT = {"bhsd": "bshd", "bshd": "bhsd"}
_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Sizes:
    """Logical sizes of a problem."""

    batch: int
    heads: int
    kv_heads: int
    seqlen_q: int
    seqlen_kv: int
    head_dim: int
    head_dim_v: int

    def of_axes(self, axes: str) -> tuple[int, ...]:
        """The sizes of axes of scores, ``"bhij"`` or some of them."""
        found = {"b": self.batch, "h": self.heads, "i": self.seqlen_q, "j": self.seqlen_kv}
        return tuple(found[a] for a in axes)

    def shape_of(self, name: str, layout: str) -> tuple[int, ...]:
        """Shape of a tensor of an operator (:mod:`tvm_flash.operators`) in a layout."""
        shape = [getattr(self, axis) for axis in tensor(name).axes]
        if len(shape) == 4 and layout == "bshd":
            shape[1], shape[2] = shape[2], shape[1]
        return tuple(shape)

    @property
    def by_name(self) -> dict[str, int]:
        """The sizes as a kernel's manifest names them."""
        return sizes.of(**vars(self))


@dataclass(frozen=True)
class RaggedSizes(Sizes):
    """Those of ``batch`` sequences of different lengths, which have ``seqlen_q`` and ``seqlen_kv`` rows together."""

    total_q = property(lambda self: self.seqlen_q)
    total_k = property(lambda self: self.seqlen_kv)
    starts = property(lambda self: self.batch + 1)

    def shape_of(self, name: str, layout: str) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in tensor(name).ragged)

    @property
    def by_name(self) -> dict[str, int]:
        return sizes.of_sequences(
            *(self.batch, self.heads, self.seqlen_q, self.kv_heads, self.seqlen_kv, self.head_dim, self.head_dim_v)
        )


# ---------------------------------------------------------------- q, k, v


def check_tensors(layout: str, q: TensorView, k: TensorView, v: TensorView) -> Sizes:
    """Ranks, dtypes, devices, shapes and strides of the inputs, alone and together; ragged ones count as one sequence.

    Raises
    ------
    ArgumentTypeError, InvalidArgumentError, LayoutError, NotSupportedError
    """
    check_kinds(layout, q, k, v)
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ArgumentTypeError(f"{name}: has dtype {x.dtype}, but q has {q.dtype}; convert one to the other's")
        if x.device != q.device:
            raise ArgumentTypeError(f"{name}: is on {x.device}, but q is on {q.device}; move one to the other's device")
    _check_shapes(layout, q.shape, k.shape, v.shape)
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_strides(name, x)
    return _sizes(layout, q.shape, k.shape, v.shape)


def check_kinds(layout: str, q: TensorView, k: TensorView, v: TensorView) -> None:
    """Rank, dtype and kind of device of each input.

    Raises
    ------
    ArgumentTypeError, InvalidArgumentError, NotSupportedError
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        ragged = layout == RAGGED_LAYOUT
        if len(x.shape) != (3 if ragged else 4):
            remedy = (
                f"{name}.flatten(0, 1) for sequences of equal lengths"
                if ragged
                else f"{name}[None] for a missing batch dimension"
            )
            raise InvalidArgumentError(
                f"{name}: has shape {x.shape} of rank {len(x.shape)}, expected {3 if ragged else 4} dimensions "
                f"{_DIMENSIONS[layout]}; reshape it, as with {remedy}"
            )
        check_element_type(name, x)


def check_element_type(name: str, x: TensorView) -> None:
    """Dtype and kind of device of an input.

    Raises
    ------
    ArgumentTypeError, NotSupportedError
    """
    if x.dtype not in DTYPES:
        raise ArgumentTypeError(
            f"{name}: has dtype {x.dtype}, expected one of {', '.join(DTYPES)}; convert it, "
            f"as with {name}.to(torch.float32) or {name}.astype('float32')"
        )
    if x.device_kind not in _DEVICES:
        raise NotSupportedError(f"{name}: is on {x.device}, expected a tensor on the CPU or a CUDA device; move it")


def _sizes(layout: str, q: tuple, k: tuple, v: tuple) -> Sizes:
    if layout == RAGGED_LAYOUT:
        return RaggedSizes(1, q[1], k[1], q[0], k[0], q[2], v[2])
    head, seq = (1, 2) if layout == "bhsd" else (2, 1)
    return Sizes(q[0], q[head], k[head], q[seq], k[seq], q[3], v[3])


def _check_shapes(layout: str, q: tuple, k: tuple, v: tuple) -> None:
    if layout == RAGGED_LAYOUT:
        fault = _fault("bshd", *((1, *shape) for shape in (q, k, v)))
        if fault is not None:
            raise InvalidArgumentError(f"{fault}; the layout of ragged sequences is {_DIMENSIONS[layout]}")
        return
    fault = _fault(layout, q, k, v)
    if fault is None:
        return
    other = _OTHER_LAYOUT[layout]
    if _fault(other, q, k, v) is None:
        raise LayoutError(
            f"{fault}. In the layout {_DIMENSIONS[other]} the shapes q {q}, k {k}, v {v} make sense: call "
            f"{FUNCTION_OF_LAYOUT[other]}, or transpose dimensions 1 and 2"
        )
    raise InvalidArgumentError(f"{fault}; the layout of {FUNCTION_OF_LAYOUT[layout]} is {_DIMENSIONS[layout]}")


def _fault(layout: str, q: tuple, k: tuple, v: tuple) -> str | None:
    """What is wrong with shapes in a layout, or None."""
    for name, shape in (("k", k), ("v", v)):
        if shape[0] != q[0]:
            return f"{name}: has batch {shape[0]}, but q has {q[0]}; expected the same"
    if k[3] != q[3]:
        return f"k: has head_dim {k[3]}, but q has {q[3]}; expected the same"
    for name, size in (("q", q[3]), ("v", v[3])):
        if fault := fault_of_head_dim(name, size):
            return fault
    head, seq = (1, 2) if layout == "bhsd" else (2, 1)
    if v[head] != k[head]:
        return f"v: has {v[head]} heads, but k has {k[head]}; expected the same"
    if v[seq] != k[seq]:
        return f"v: has length {v[seq]}, but k has {k[seq]}; expected the same"
    if q[head] and (k[head] == 0 or q[head] % k[head]):
        return f"k: has {k[head]} heads, expected a divisor of q's {q[head]}"
    return None


def fault_of_head_dim(name: str, size: int) -> str | None:
    """What is wrong with elements of a row, or None."""
    if size and size % HEAD_DIM_MULTIPLE == 0:
        return None
    up = max(1, -(-size // HEAD_DIM_MULTIPLE)) * HEAD_DIM_MULTIPLE
    return (
        f"{name}: has head_dim {size}, expected a multiple of {HEAD_DIM_MULTIPLE}; pad q, k and v with zeros "
        f"to {up}, give softmax_scale for the size before padding, and cut the result"
    )


def check_strides(name: str, x: TensorView) -> None:
    """The last dimension is contiguous, and a GPU's strides aren't negative."""
    if 0 in x.shape:
        return
    if x.shape[-1] > 1 and x.strides[-1] != 1:
        raise InvalidArgumentError(
            f"{name}: has strides {x.strides}, expected a contiguous last dimension (stride 1); "
            f"use {name}.contiguous() or numpy.ascontiguousarray({name})"
        )
    if x.device_kind == "cuda" and any(s < 0 and n > 1 for s, n in zip(x.strides, x.shape, strict=True)):
        raise InvalidArgumentError(f"{name}: has negative strides {x.strides}, which GPU kernels don't take; copy it")


def layout_suspicion(layout: str, sizes: Sizes, q: TensorView) -> str | None:
    """The text of a warning if the shapes look as if they were meant for the other function, else None.

    More heads than positions, for queries and keys, is rare, but for a single query (a decoder's step).  A tensor whose
    memory order says that dimensions 1 and 2 were swapped on purpose (a transposed view) isn't suspicious.
    """
    swapped = sizes.heads > sizes.seqlen_q > 1 and sizes.kv_heads > sizes.seqlen_kv
    if not swapped or q.strides[1] < q.strides[2]:
        return None
    return suspicion_text(layout, f" {q.shape}", f"{sizes.heads} heads and {sizes.seqlen_q} positions")


def suspicion_text(layout: str, shape: str = "", read_as: str = "more heads than positions") -> str:
    """What :func:`layout_suspicion` says, also of a shape that isn't known in numbers."""
    other = _OTHER_LAYOUT[layout]
    return (
        f"{FUNCTION_OF_LAYOUT[layout]} takes {_DIMENSIONS[layout]} and reads q{shape} as {read_as}; if it is "
        f"{_DIMENSIONS[other]}, call {FUNCTION_OF_LAYOUT[other]}"
    )


# ---------------------------------------------------------------- options


def check_flag(name: str, value: Any) -> bool:
    """A truth value: a bool of Python or NumPy, or 0 or 1."""
    if (isinstance(value, int) and value in (0, 1)) or type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    _check_known(name, value)
    raise ArgumentTypeError(f"{name}: is {value!r}, expected True or False")


def check_variant(variant: Any) -> str:
    """One of the variants."""
    if not isinstance(variant, str) or variant not in VARIANTS:
        raise InvalidArgumentError(f"variant: is {variant!r}, expected one of {', '.join(map(repr, VARIANTS))}")
    return variant


def check_layout(layout: Any) -> str:
    """One of the layouts."""
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise InvalidArgumentError(f"layout: is {layout!r}, expected one of {', '.join(map(repr, LAYOUTS))}")
    return layout


def check_scale(scale: Any, head_dim: int) -> float:
    """``softmax_scale``, or ``1/sqrt(head_dim)`` for None."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim) if head_dim else 1.0
    scale = check_real("softmax_scale", scale)
    if not is_positive_float32(scale):
        raise InvalidArgumentError(
            f"softmax_scale: is {scale}, expected a positive float32; leave it out for 1/sqrt(head_dim)"
        )
    return scale


def is_positive_float32(x: Any) -> bool:
    """Whether a number is one that kernels take as the scale and the soft cap: positive, and normal in float32."""
    return 2.0**-126 <= x <= (2 - 2.0**-23) * 2.0**127


def check_softcap(softcap: Any) -> float:
    """``softcap``; 0 is none."""
    softcap = check_real("softcap", softcap)
    if softcap != 0 and not is_positive_float32(softcap):
        raise InvalidArgumentError(f"softcap: is {softcap}, expected a positive float32, or 0 for no soft cap")
    return softcap


def check_params(definition: str, params: Mapping[str, Any], declared: Mapping[str, Any]) -> None:
    """That the parameters that are given to a definition of the user's own are those that it takes, by name."""
    if params.keys() != declared.keys():
        raise ArgumentTypeError(
            f"{', '.join(sorted(params.keys() ^ declared.keys()))}: missing or unknown; the definition {definition!r} "
            f"takes {', '.join(declared) or 'no parameters'}"
        )


def check_real(name: str, value: Any) -> float:
    """A number of Python or NumPy as a float; not a tensor, whose value might be on a GPU."""
    if not isinstance(value, numbers.Real):
        _check_known(name, value)
        raise ArgumentTypeError(f"{name}: is a {type(value).__qualname__}, expected a number; use float({name})")
    try:
        return float(value)
    except OverflowError:
        raise InvalidArgumentError(f"{name}: is larger than any float, expected a number that is one") from None


def _check_known(name: str, value: Any) -> None:
    """That an option, which isn't what was expected, isn't one that JAX traces: the remedy is another one then."""
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(value, jax.core.Tracer):
        raise ArgumentTypeError(
            f"{name}: is traced by JAX, expected a value that is known before the program runs; name it in "
            f"static_argnames of jax.jit"
        )


def whole_number(name: str, x: object, expected: str) -> int:
    """An argument as an int.

    Raises
    ------
    ArgumentTypeError: it is none, or a bool.
    """
    try:
        return operator.index(None if isinstance(x, bool) else x)
    except (TypeError, ValueError, RuntimeError):  # of tensors too
        raise ArgumentTypeError(f"{name}: is {x!r}, expected {expected}") from None


def check_longest(name: str, length: Any) -> None:
    """A length that no sequence exceeds: a whole number."""
    if type(length) is not int and not hasattr(type(length), "__index__"):
        _check_known(name, length)
        raise ArgumentTypeError(f"{name}: is {length!r}, expected a whole number, or None")
    if type(length) is int and length < 0:
        raise InvalidArgumentError(f"{name}: is {length}, expected 0 or more; leave it out, it isn't needed")


def check_window(window_size: Any) -> tuple[int, int]:
    """``(left, right)``, each −1 (unbounded) or more."""
    try:
        left, right = (operator.index(x) for x in window_size)
    except (TypeError, ValueError):
        for x in window_size if isinstance(window_size, (tuple, list)) else ():
            _check_known("window_size", x)
        raise ArgumentTypeError(
            f"window_size: is {window_size!r}, expected two integers (left, right), −1 for unbounded"
        ) from None
    if min(left, right) < -1:
        raise InvalidArgumentError(
            f"window_size: is ({left}, {right}), expected sizes of 0 or more, or −1 for unbounded; "
            f"use (-1, -1) for no window"
        )
    return left, right


# ---------------------------------------------------------------- other tensors


def check_input(name: str, x: TensorView, shape: tuple[int, ...], dtype: str, q: TensorView) -> None:
    """That an input whose shape and dtype follow from q, k and v has them, and lies where kernels can read it."""
    _check_likeness(name, x, shape, dtype, q)
    if tensor(name).flat:
        _check_dense(name, x)
    else:
        check_strides(name, x)


def check_output(name: str, x: TensorView, shape: tuple[int, ...], dtype: str, q: TensorView) -> None:
    """That a tensor can take a result: shape, dtype, device, strides, no element twice, not read-only."""
    _check_likeness(name, x, shape, dtype, q, "; leave it out to get a new tensor")
    if not x.writable:
        raise InvalidArgumentError(f"{name}: is read-only; leave it out to get a new tensor")
    check_strides(name, x)
    if not is_injective(x.shape, x.strides):
        raise InvalidArgumentError(
            f"{name}: has strides {x.strides}, in which elements share memory; use a tensor that isn't expanded"
        )


def is_injective(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether no two elements lie in one place; strides that interleave count as if some did."""
    reach = 1
    for stride, size in sorted((abs(s), n) for s, n in zip(strides, shape, strict=True) if n > 1):
        if stride < reach:
            return 0 in shape
        reach += stride * (size - 1)
    return True


def _check_likeness(
    name: str, x: TensorView, shape: tuple[int, ...], dtype: str, q: TensorView, remedy: str = ""
) -> None:
    if x.shape != shape:
        raise InvalidArgumentError(f"{name}: has shape {x.shape}, expected {shape}{remedy}")
    if x.dtype != dtype:
        why = " as q has" if dtype == q.dtype else "; convert it"
        raise ArgumentTypeError(f"{name}: has dtype {x.dtype}, expected {dtype}{why}")
    if x.device != q.device:
        raise ArgumentTypeError(f"{name}: is on {x.device}, expected {q.device}, where q is")


def _check_dense(name: str, x: TensorView) -> None:
    dense = contiguous_strides(x.shape)
    if 0 not in x.shape and any(a != b for a, b, n in zip(x.strides, dense, x.shape, strict=True) if n > 1):
        raise InvalidArgumentError(
            f"{name}: has strides {x.strides}, expected {dense}, a contiguous tensor; use {name}.contiguous() or "
            f"numpy.ascontiguousarray({name})"
        )


def check_parameter(param: Param, x: TensorView, sizes: Sizes, q: TensorView) -> None:
    """A parameter that is a tensor: of its first axes some may be missing, and a size of 1 stands for all of one; or a
    table, of its rank and any sizes."""
    name, dtype = param.name, param.beside(q.dtype).dtype
    if param.rank and (len(x.shape) != param.rank or 0 in x.shape):
        raise InvalidArgumentError(
            f"{name}: has shape {x.shape}, expected a table with {param.rank} dimensions, none of them of size 0"
        )
    whole = sizes.of_axes(param.axes)
    tail = whole[len(whole) - len(x.shape) :]
    if not param.rank and (
        not 0 < len(x.shape) <= len(whole) or any(n not in (1, m) for n, m in zip(x.shape, tail, strict=True))
    ):
        per_head = param.per_head and f"({sizes.heads},) or {whole}: one value for each head"
        names = ", ".join(_AXES[a] for a in param.axes)
        raise InvalidArgumentError(
            f"{name}: has shape {x.shape}, expected "
            + (per_head or f"{whole}, which is ({names}), with 1 for an axis along which it is the same")
        )
    if x.dtype != dtype:
        raise ArgumentTypeError(f"{name}: has dtype {x.dtype}, expected {dtype}; convert it")
    if x.device != q.device:
        raise ArgumentTypeError(f"{name}: is on {x.device}, expected {q.device}, where q is; move it")
