"""Attention as a definition of the user's own says: over a batch, over sequences of different lengths, over a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tvm_flash.backward import backward_of, varlen_backward_of
from tvm_flash.call.checks import check_layout, check_longest, check_params, check_variant
from tvm_flash.call.dispatch import entrance
from tvm_flash.call.over_cache import OverCache
from tvm_flash.call.prepare import params_of
from tvm_flash.call.signature import signature
from tvm_flash.errors import NotSupportedError
from tvm_flash.kvcache import with_kvcache
from tvm_flash.operators import FORWARD, PAGED, PAGED_SCALED, RAGGED, RAGGED_LAYOUT, SCALES
from tvm_flash.packs.manifest import why_no_places
from tvm_flash.paged import both_scales


def custom_attention(name: str, *, layout: str = "bhsd", variant: str = "auto") -> Callable[..., Any]:
    """Attention as a definition of the user's own says, from kernels that were built of it.

    Parameters
    ----------
    name: the definition's name, as in ``python -m tvm_flash build --definition file.py:name``.
    layout: of the tensors that the function takes: ``"bhsd"`` or ``"bshd"``.
    variant: as in :func:`tvm_flash.flash_attention`.

    Returns
    -------
    ``fn(q, k, v, *, softmax_scale=None, return_lse=False, out=None, **params)``: like
    :func:`tvm_flash.flash_attention`, the definition's run-time parameters by name: numbers; tensors of any strides
    with the sizes of their axes, or 1 where they are the same, the first ones of which may be missing, as ``(heads,)``
    or ``(batch, heads)``; tables.  It has these attributes:

    ``fn.backward(dout, q, k, v, out, lse, *, gradients=(), **params)`` is to it what
    :func:`tvm_flash.flash_attention_backward` is to :func:`tvm_flash.flash_attention`; the gradient of a number that is
    learnt is float32 ``(1,)``.

    ``fn.varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, *, softmax_scale=None, return_lse=False, out=None, **params)`` is
    the same of sequences of different lengths, like :func:`tvm_flash.flash_attention_varlen`, and
    ``fn.varlen.backward`` its gradients, like :func:`tvm_flash.flash_attention_varlen_backward`.  In the definition,
    queries and keys count from the first of their sequence, whose number is the batch entry: ``(batch, heads)`` are
    values of each sequence and head.

    ``fn.paged(q, k_cache, v_cache, cu_seqlens_q, seqlens_k, page_table, max_seqlen_q=None, *, …, **params)`` is the
    same over keys on pages, like :func:`tvm_flash.flash_attention_paged`.

    ``fn.with_kvcache(q, k_cache, v_cache, k, v, *, cache_seqlens, …, **params)`` appends to a cache first, like
    :func:`tvm_flash.flash_attention_with_kvcache`.

    The last three take kernels that were built with ``--form ragged`` or ``--form paged``.

    Raises
    ------
    InvalidArgumentError: no pack has kernels of the definition, or the layout or variant is unknown.
    """
    check_layout(layout)
    check_variant(variant)
    definition = _Definition(name)
    fn = definition.over_a_batch(layout, variant)
    fn.backward = backward_of(name, layout, variant, definition.declared)
    fn.varlen = definition.over_sequences()
    fn.varlen.backward = varlen_backward_of(name, definition.declared)
    fn.paged, fn.with_kvcache = definition.over_pages(), definition.over_a_cache()
    return fn


class _Definition:
    """A definition by its name, and what is known of its parameters."""

    def __init__(self, name: str):
        self.name, self.declared = name, params_of(name)
        self.tensors = tuple(p for p in self.declared if self.declared[p].is_tensor)
        self.scalars = tuple(p for p in self.declared if not self.declared[p].is_tensor)

    def _entrance(self, layout: str, op: str) -> Callable[..., Any]:
        known = {"op": op, "layout_known": True} if op != FORWARD else {}
        return entrance(signature(layout, self.name, self.tensors, self.scalars, **known))

    def _values(self, params: Mapping[str, Any]) -> tuple[list, list]:
        """The values of the parameters that are tensors, and of those that are numbers."""
        check_params(self.name, params, self.declared)
        return [params[p] for p in self.tensors], [params[p] for p in self.scalars]

    def _of_sequences(self, params: Mapping[str, Any]) -> tuple[list, list]:
        """The same where sequences have different lengths.

        Raises
        ------
        NotSupportedError: a parameter is over queries or keys.
        """
        if placed := [p for p in self.declared.values() if p.is_placed]:
            raise NotSupportedError(f"{placed[0].name}: the definition {self.name!r} has it {why_no_places(placed[0])}")
        return self._values(params)

    def _named(self, fn: Callable[..., Any], what: str, suffix: str = "") -> Callable[..., Any]:
        fn.__name__ = fn.__qualname__ = self.name + suffix
        fn.__doc__ = f"Attention as the definition {self.name!r} says, {what}."
        return fn

    def over_a_batch(self, layout: str, variant: str) -> Callable[..., Any]:
        attend = self._entrance(layout, FORWARD)

        def fn(q, k, v, *, softmax_scale=None, return_lse=False, out=None, **params):
            given, numbers = self._values(params)
            return attend(q, k, v, *given, out, variant, return_lse, softmax_scale, *numbers)

        return self._named(fn, f"over tensors in the layout {layout!r}")

    def over_sequences(self) -> Callable[..., Any]:
        attend = self._entrance(RAGGED_LAYOUT, RAGGED)

        def varlen(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q=None,
            max_seqlen_k=None,
            *,
            softmax_scale=None,
            return_lse=False,
            out=None,
            **params,
        ):
            given, numbers = self._of_sequences(params)
            for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
                if longest is not None:
                    check_longest(name, longest)
            starts = cu_seqlens_q, cu_seqlens_k
            return attend(q, k, v, *starts, *given, out, "auto", return_lse, softmax_scale, *numbers)

        return self._named(varlen, "over sequences of different lengths", "_varlen")

    def over_pages(self) -> Callable[..., Any]:
        attend, attend_scaled = (self._entrance(RAGGED_LAYOUT, op) for op in (PAGED, PAGED_SCALED))

        def paged(
            q,
            k_cache,
            v_cache,
            cu_seqlens_q,
            seqlens_k,
            page_table,
            max_seqlen_q=None,
            *,
            softmax_scale=None,
            k_scale=None,
            v_scale=None,
            return_lse=False,
            out=None,
            **params,
        ):
            given, numbers = self._of_sequences(params)
            tensors = [q, k_cache, v_cache, cu_seqlens_q, seqlens_k, page_table]
            call = attend
            if k_scale is not None or v_scale is not None:
                tensors += both_scales(k_scale, v_scale)
                call = attend_scaled
            return call(*tensors, *given, out, "auto", return_lse, softmax_scale, *numbers, max_seqlen_q)

        return self._named(paged, "over keys on pages", "_paged")

    def over_a_cache(self) -> Callable[..., Any]:
        paged = self.over_pages()

        def with_kvcache_(
            q,
            k_cache,
            v_cache,
            k=None,
            v=None,
            *,
            rotary_cos=None,
            rotary_sin=None,
            cache_seqlens=None,
            cache_batch_idx=None,
            page_table=None,
            cu_seqlens_q=None,
            cu_seqlens_k_new=None,
            max_seqlen_q=None,
            rotary_seqlens=None,
            softmax_scale=None,
            k_scale=None,
            v_scale=None,
            rotary_interleaved=True,
            num_splits=0,
            return_lse=False,
            **params,
        ):
            self._of_sequences(params)
            tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v, "rotary_cos": rotary_cos}
            tensors |= {"rotary_sin": rotary_sin, "cache_batch_idx": cache_batch_idx, "page_table": page_table}
            tensors |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k_new": cu_seqlens_k_new, "cache_leftpad": None}
            tensors |= {"rotary_seqlens": rotary_seqlens, **dict(zip(SCALES, (k_scale, v_scale), strict=True))}
            how = OverCache(
                paged,
                {p: params[p] for p in self.tensors},
                {"softmax_scale": softmax_scale, "return_lse": return_lse},
                numbers={p: params[p] for p in self.scalars},
                definition=self.name,
            )
            return with_kvcache(tensors, cache_seqlens, max_seqlen_q, rotary_interleaved, num_splits, how)

        return self._named(with_kvcache_, "over a cache to which keys are appended first", "_with_kvcache")
