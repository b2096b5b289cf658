"""Choosing a kernel for a shape, before there are tensors, and seeing why."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tvm_flash.call import checks
from tvm_flash.call.choice import Explanation, choose, explain
from tvm_flash.call.dispatch import entrance
from tvm_flash.call.paged import PagedSizes
from tvm_flash.call.prepare import index_bits
from tvm_flash.call.problem import DTYPES, HEAD_DIM_MULTIPLE, Problem, normalise_mask
from tvm_flash.call.signature import signature
from tvm_flash.errors import InvalidArgumentError
from tvm_flash.frameworks import contiguous_strides, dtype_name
from tvm_flash.machine.device import Device, parse
from tvm_flash.operators import FORWARD, OPERATORS, PAGED, RAGGED, RAGGED_LAYOUT
from tvm_flash.packs import manifest
from tvm_flash.packs.manifest import DENSE

PREFERENCES = ("speed", "compatibility")

#: dtype for a device when none is given: what one would run there.
_USUAL_DTYPE = {"cpu": "float32", "cuda": "float16"}


#: Keys on a page that an explanation is of; which kernel runs doesn't depend on it.
_PAGE_SIZE = 16


@dataclass(frozen=True)
class _LikeSelected:
    """Refuses tensors on another kind of device than the selected kernel's; equal for kernels that are."""

    arch: str
    device: Device

    def __call__(self, device: Device) -> None:
        if (device.kind == "cpu") != (self.arch == "cpu"):
            raise InvalidArgumentError(
                f"q: is on {device}, but this kernel was selected for {self.device}; move the tensors, or select with "
                f"BackendSelector(q.device)"
            )


@dataclass(frozen=True)
class SelectedKernel:
    """A kernel's template, called like ``flash_attention`` on tensors in ``layout``.

    Attributes
    ----------
    variant: ``"v1"`` or ``"v2"``: the template that was chosen.
    layout: of the tensors that a call takes: ``"bhsd"`` or ``"bshd"``.
    arch: ``"cpu"`` or the CUDA arch of the chosen kernel.
    reason: why it was chosen.
    device: where it runs.
    """

    variant: str
    layout: str
    arch: str
    reason: str
    device: Device
    _attend: Callable[..., Any] = field(init=False, repr=False, compare=False)
    _attend_with_sinks: Callable[..., Any] = field(init=False, repr=False, compare=False)

    def __call__(
        self,
        q: Any,
        k: Any,
        v: Any,
        *,
        causal: bool = False,
        softmax_scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Any = None,
        sinks: Any = None,
        return_lse: bool = False,
        out: Any = None,
    ) -> Any:
        """Attention, as :func:`tvm_flash.flash_attention` describes it.

        Tensors of other sizes run on the kernel of this template that fits them.

        Raises
        ------
        InvalidArgumentError: the tensors are on another kind of device than this kernel was selected for.
        """
        # fmt: off
        if sinks is not None:
            return self._attend_with_sinks(q, k, v, alibi_slopes, sinks, out,
                                           self.variant, return_lse, softmax_scale, causal, window_size, softcap)
        return self._attend(q, k, v, alibi_slopes, out,
                            self.variant, return_lse, softmax_scale, causal, window_size, softcap)
        # fmt: on

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle, as models that hold one are saved or sent to other processes: what was decided."""
        return SelectedKernel, (self.variant, self.layout, self.arch, self.reason, self.device)

    def __post_init__(self):
        accept = _LikeSelected(self.arch, self.device)
        for name, parameters in (("_attend", ("alibi_slopes",)), ("_attend_with_sinks", ("alibi_slopes", "sinks"))):
            found = entrance(signature(self.layout, parameters=parameters, accept=accept))
            object.__setattr__(self, name, found)  # once, not in every call


class BackendSelector:
    """Chooses between the templates for a device.

    Parameters
    ----------
    device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, an index or a framework's device object; the first CUDA device, or the
        processor where there is none, if not given.
    prefer: ``"speed"``, or ``"compatibility"`` for V1 everywhere.

    Raises
    ------
    InvalidArgumentError, ArgumentTypeError: there is no such device or preference.
    """

    def __init__(self, device: Any = None, prefer: str = "speed"):
        if prefer not in PREFERENCES:
            raise InvalidArgumentError(f"prefer: is {prefer!r}, expected one of {', '.join(map(repr, PREFERENCES))}")
        self.device = parse(device)
        self.prefer = prefer

    def select_attention(
        self,
        batch: int,
        heads: int,
        seq_len: int,
        head_dim: int,
        *,
        kv_heads: int | None = None,
        seq_len_kv: int | None = None,
        dtype: Any = None,
        causal: bool = False,
        layout: str = "bhsd",
    ) -> SelectedKernel:
        """The kernel for a problem.

        Parameters
        ----------
        batch, heads, seq_len, head_dim: sizes of the queries.
        kv_heads, seq_len_kv: sizes of keys and values; those of the queries if not given.
        dtype: a name, or a dtype of a framework; float16 on a GPU and float32 on the processor if not given.
        causal: whether a causal mask will be asked for.
        layout: of the tensors that the kernel will be called with.

        Raises
        ------
        InvalidArgumentError, ArgumentTypeError: a size, the dtype or the layout is wrong.
        PackError, KernelNotFoundError, NotSupportedError: nothing installed can run it.
        """
        problem = self._problem(batch, heads, seq_len, head_dim, kv_heads, seq_len_kv, dtype, causal, layout)
        choice = choose(_counted(problem), self.device, "auto", self.prefer)
        entry = choice.kernel.entry
        return SelectedKernel(entry.template, layout, entry.arch, choice.reason, self.device)

    def explain(
        self,
        batch: int,
        heads: int,
        seq_len: int,
        head_dim: int,
        *,
        kv_heads: int | None = None,
        seq_len_kv: int | None = None,
        dtype: Any = None,
        causal: bool = False,
        layout: str = "bhsd",
        variant: str = "auto",
        backward: bool = False,
        ragged: bool = False,
        paged: bool = False,
    ) -> Explanation:
        """What :meth:`select_attention` (or ``flash_attention`` with ``variant``) chooses, and why no other kernel.

        With ``backward`` the same for the kernel that computes the gradients; with ``ragged`` for that of
        ``flash_attention_varlen`` on ``batch`` sequences that are so long on average, and with ``paged`` for that of
        ``flash_attention_paged`` on as many with so many keys at most, on pages of 16.
        """
        problem = self._problem(batch, heads, seq_len, head_dim, kv_heads, seq_len_kv, dtype, causal, layout)
        if ragged and paged:
            raise InvalidArgumentError("ragged: is True beside paged; leave out the one that isn't asked about")
        op = PAGED if paged else RAGGED if ragged else FORWARD
        if backward and not OPERATORS[op].backward:
            raise InvalidArgumentError("backward: is True, and of keys on pages there are no gradients; leave it out")
        problem = dataclasses.replace(problem, op=OPERATORS[op].backward if backward else op)
        if ragged or paged:
            lengths = {"seqlen_q": batch * problem.seqlen_q, "seqlen_kv": batch * problem.seqlen_kv}
            if paged:
                pages = -(-problem.seqlen_kv // _PAGE_SIZE)
                lengths |= {"pages": batch * pages, "page_size": _PAGE_SIZE, "pages_per_sequence": pages}
                lengths |= {"seqlen_kv": pages * _PAGE_SIZE, "longest": problem.seqlen_q}
            mask = "causal" if causal else "full"
            problem = dataclasses.replace(problem, **lengths, layout=RAGGED_LAYOUT, mask=mask)
        return explain(_counted(problem), self.device, checks.check_variant(variant), self.prefer)

    def _problem(self, batch, heads, seq_len, head_dim, kv_heads, seq_len_kv, dtype, causal, layout) -> Problem:
        kv_heads = heads if kv_heads is None else kv_heads
        seq_len_kv = seq_len if seq_len_kv is None else seq_len_kv
        sizes = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "seq_len": seq_len, "seq_len_kv": seq_len_kv}
        for name, size in (*sizes.items(), ("head_dim", head_dim)):
            if not isinstance(size, int) or size < 1:
                raise InvalidArgumentError(f"{name}: is {size!r}, expected a whole number from 1 on")
        if head_dim % HEAD_DIM_MULTIPLE:
            raise InvalidArgumentError(
                f"head_dim: is {head_dim}, expected a multiple of {HEAD_DIM_MULTIPLE}; pad with zeros"
            )
        if heads % kv_heads:
            raise InvalidArgumentError(f"kv_heads: is {kv_heads}, expected a divisor of heads {heads}")
        mask = normalise_mask(checks.check_flag("causal", causal), (-1, -1), seq_len, seq_len_kv)
        return Problem(
            batch=batch,
            heads=heads,
            kv_heads=kv_heads,
            seqlen_q=seq_len,
            seqlen_kv=seq_len_kv,
            head_dim=head_dim,
            head_dim_v=head_dim,
            dtype=_USUAL_DTYPE[self.device.kind] if dtype is None else dtype_name(dtype, DTYPES),
            layout=checks.check_layout(layout),
            mask=mask.kind,
        )


#: Sizes of a call, by the form of its sequences.
_SIZES = {DENSE: checks.Sizes, manifest.RAGGED: checks.RaggedSizes, manifest.PAGED: PagedSizes}


def _counted(problem: Problem) -> Problem:
    """The problem with the bits that sizes and strides of contiguous tensors need."""
    kind, operator = _SIZES[problem.form], OPERATORS[problem.op]
    sizes = kind(**{f.name: getattr(problem, f.name) for f in dataclasses.fields(kind)})
    given = [sizes.shape_of(name, problem.layout) for name in operator.inputs]
    outputs = [sizes.shape_of(name, problem.layout) for name in operator.outputs]
    bits = index_bits(sizes, [(shape, contiguous_strides(shape)) for shape in given], outputs)
    return dataclasses.replace(problem, index_bits=bits)
