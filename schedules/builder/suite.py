"""Which kernels exist: one :class:`KernelSpec` each, and the core set that is built for every arch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from schedules.families.interface import (
    APPEND,
    BACKWARD,
    BACKWARD_ACCUMULATE,
    CAUSAL_WITH_SINKS,
    DECODE,
    FORWARD,
    MERGED,
    PAGED,
    PAGED_DECODE,
    PAGED_DECODE_ANY,
    PAGED_DECODE_SCALED,
    PAGED_LATENT,
    PAGED_SCALED,
    PARTIAL,
    RAGGED,
    RAGGED_BACKWARD,
    WITH_TENSORS,
)
from tvm_flash.catalogue import OF_16_BITS
from tvm_flash.packs.manifest import BUILTIN_DEFINITION, DENSE, FORM_OF_KIND, FORMS

#: (mask, score) of the core set; a sliding window with unbounded sides serves full and causal attention as well, and
#: the last pair everything that the public functions have arguments for.
CORE_VARIANTS = (
    ("full", "identity"),
    ("causal", "identity"),
    ("window", "identity"),
    ("window", "softcap"),
    ("window", "alibi"),
    ("window", "softcap_alibi"),
    ("padded", "identity"),
    ("positioned", "optional"),
)

#: The same on the CPU, where the last kernel has sinks too: one that isn't given costs a comparison for each row tile.
CPU_VARIANTS = (*CORE_VARIANTS[:-1], ("positioned", "optional_sinks"), *WITH_TENSORS)

TEMPLATES = ("v1", "v2")


@dataclass(frozen=True)
class Scope:
    """What the core set has of a kind of kernels.

    Attributes
    ----------
    variants: the (mask, score) pairs.
    on_gpus: those on a GPU, if they aren't the same.
    head_dims: of which sizes, if not of all.
    usual_sizes: further ones on a GPU, with kernels for ``USUAL_HEAD_DIMS`` only and of one template, where its family
        has what they need.
    between: whether there are kernels for ``HEAD_DIMS_BETWEEN``, on a GPU.
    own_definitions: whether a definition of the user's own gets such kernels, of the forms that it is built for,
        without asking for them.
    """

    variants: tuple[tuple[str, str], ...]
    between: bool = False
    own_definitions: bool = False
    on_gpus: tuple[tuple[str, str], ...] | None = None
    usual_sizes: tuple[tuple[str, str], ...] = ()
    head_dims: tuple[int, ...] | None = None

    def has_size(self, dim: HeadDim) -> bool:
        """Whether the core set has kernels of a size."""
        return dim != LATENT_HEAD_DIM if self.head_dims is None else dim.qk in self.head_dims


#: Of every kind that families make (:mod:`schedules.families.interface`) what is built unless it is asked for by name.
#: Decoding is bound by memory, so that one kernel for a window serves full and causal attention at no cost.  Of the
#: CPU's backward, the kernel that has everything was as fast as those of plain masks: 0.99 to 1.02 of their time,
#: causal bfloat16 of 512 and 1024 keys 1.02 and 1.04.
SCOPES = {
    FORWARD: Scope(
        CPU_VARIANTS,
        between=True,
        own_definitions=True,
        on_gpus=CORE_VARIANTS,
        usual_sizes=(*WITH_TENSORS, ("positioned", "optional_sinks")),
    ),
    DECODE: Scope((("window", "identity"),)),
    BACKWARD: Scope(
        (("positioned", "optional_sinks"), *WITH_TENSORS),
        between=True,
        own_definitions=True,
        on_gpus=(("full", "identity"), ("causal", "identity"), ("positioned", "optional")),
        usual_sizes=(*WITH_TENSORS, ("positioned", "optional_sinks"), CAUSAL_WITH_SINKS),
    ),
    RAGGED: Scope(
        (("window", "optional_sinks"),),
        between=True,
        own_definitions=True,
        on_gpus=(("full", "identity"), ("causal", "identity"), ("window", "optional")),
        usual_sizes=(("window", "optional_sinks"),),
    ),
    RAGGED_BACKWARD: Scope(
        (("window", "optional_sinks"),),
        between=True,
        own_definitions=True,
        on_gpus=(("full", "identity"), ("causal", "identity"), ("window", "optional")),
        usual_sizes=(("window", "optional_sinks"),),
    ),
    PAGED: Scope(
        (("positioned", "optional_sinks"),),
        between=True,
        own_definitions=True,
        on_gpus=(("full", "identity"), ("causal", "identity"), ("positioned", "optional")),
        usual_sizes=(("positioned", "optional_sinks"),),
    ),
    PAGED_DECODE: Scope(
        (("window", "identity"), ("positioned", "optional")),
        own_definitions=True,
        usual_sizes=(("positioned", "optional_sinks"),),
    ),
    PAGED_DECODE_ANY: Scope((("window", "identity"),), own_definitions=True, head_dims=(64, 128)),
    PAGED_LATENT: Scope((("window", "identity"),), head_dims=(576,)),
    # Of a cache of 8 bits one kernel has everything; on GPUs decoding is bound by instructions, of which that one has
    # 1.2 times as many for each key as one for a window.
    **dict.fromkeys(PAGED_SCALED.values(), Scope((("positioned", "optional_sinks"),))),
    **dict.fromkeys(
        PAGED_DECODE_SCALED.values(),
        Scope(
            (("positioned", "optional_sinks"),),
            on_gpus=(("window", "identity"), ("positioned", "optional_sinks")),
        ),
    ),
    # What it does depends on no mask, score or head_dim: one kernel serves all up to the largest.
    APPEND: Scope((("full", "identity"),), head_dims=(256,)),
    # Of sequences that several devices hold; one template, as they are for rings alone.
    MERGED: Scope((("full", "identity"), ("causal", "identity"), ("positioned", "optional"))),
    PARTIAL: Scope((("positioned", "optional"),)),
    BACKWARD_ACCUMULATE: Scope(
        (("positioned", "optional_sinks"),),
        on_gpus=(("full", "identity"), ("causal", "identity"), ("positioned", "optional")),
    ),
}

#: Kinds of which there are kernels of one template, the family's last: those whose tensors have no batch axis, and so
#: one layout, and those that context parallel attention alone calls, which take tensors of either layout.  So it is
#: with scores of 16 bits: on two cores of an Emerald Rapids V1's kernels took as long as V2's, in both layouts.
ONE_TEMPLATE = (
    *(
        RAGGED,
        RAGGED_BACKWARD,
        PAGED,
        PAGED_DECODE,
        PAGED_DECODE_ANY,
        PAGED_LATENT,
        *PAGED_SCALED.values(),
        *PAGED_DECODE_SCALED.values(),
        APPEND,
    ),
    *(PARTIAL, MERGED, BACKWARD_ACCUMULATE),
)


@dataclass(frozen=True)
class HeadDim:
    """Elements of a query or key row, and of a value row; ``"128"`` or ``"192:128"`` in text."""

    qk: int
    v: int

    @staticmethod
    def parse(text: str) -> HeadDim:
        """Read ``"128"`` or ``"192:128"``.

        Raises
        ------
        ValueError: it is neither, or a size isn't a positive multiple of 8.
        """
        qk, _, v = text.partition(":")
        try:
            dims = HeadDim(int(qk), int(v or qk))
        except ValueError:
            raise ValueError(f"head_dim {text!r}: expected a number, or two such as 192:128") from None
        if any(d <= 0 or d % 8 for d in (dims.qk, dims.v)):
            raise ValueError(f"head_dim {text!r}: expected positive multiples of 8")
        return dims

    def __str__(self) -> str:
        return str(self.qk) if self.qk == self.v else f"{self.qk}v{self.v}"


#: A kernel serves every head_dim up to its own, so that few sizes cover all.
HEAD_DIMS = tuple(HeadDim(d, d) for d in (64, 128, 256))

#: That of latents with the turned part of a key behind: of kernels whose values are in keys, and of no others.
LATENT_HEAD_DIM = HeadDim(576, 512)

#: Those of most models.
USUAL_HEAD_DIMS = HEAD_DIMS[:2]

#: Sizes of models that lie between those.  A GPU multiplies a padded column as it does a real one, so that it gets
#: kernels for them too, of plain scores; with other scores or padding the next larger kernel serves.
HEAD_DIMS_BETWEEN = (HeadDim(96, 96), HeadDim(192, 192), HeadDim(192, 128))


@dataclass(frozen=True)
class KernelSpec:
    """One kernel, apart from the arch: what it computes, in which order, and for which problems.

    ``bucket`` and ``block_m`` are as in the manifest; a spec where both are 0 stands for all buckets and heights of
    work tiles that its family has.  ``kind`` is one of the kinds of kernels that a family makes
    (:mod:`schedules.families.interface`).
    """

    template: str
    definition: str
    mask: str
    score: str
    dtype: str
    head_dim: int
    head_dim_v: int
    bucket: int = 0
    kind: str = FORWARD
    block_m: int = 0

    @property
    def group(self) -> str:
        """Kernels of one group share a module, which has this name."""
        prefix = "" if self.definition == BUILTIN_DEFINITION else f"{self.definition}_"
        return f"{prefix}{self.template}_{self.dtype}_d{HeadDim(self.head_dim, self.head_dim_v)}"

    @property
    def symbol(self) -> str:
        """Global symbol of the kernel."""
        kind = "" if self.kind == FORWARD else f"_{self.kind}"
        height = f"_m{self.block_m}" if self.block_m else ""
        bucket = f"_s{self.bucket}" if self.bucket else ""
        return f"{self.group}_{self.mask}_{self.score}{kind}{height}{bucket}"

    def with_bucket(self, bucket: int, block_m: int = 0) -> KernelSpec:
        """The same for longer sequences, or with work tiles of another height."""
        return dataclasses.replace(self, bucket=bucket, block_m=block_m)


@dataclass(frozen=True)
class Selection:
    """Filters of a build; an empty one selects the core set's values.

    A mask that is named alone comes with the scores that the core set has for it, or else without one; likewise a score
    that is named alone, which else comes with a window.  Kinds of kernels beside the usual one have their own share of
    the core set (``SCOPES``), and whatever else is selected if they are named.  ``forms`` are those of the sequences
    that kernels are for, all if none is named.

    Of a definition of the user's own whoever names nothing waits for the build and gets what most calls need: dense
    sequences, ``USUAL_HEAD_DIMS``, and the arch's last template, whose kernels take tensors of either layout.
    """

    templates: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    head_dims: tuple[HeadDim, ...] = ()
    masks: tuple[str, ...] = ()
    scores: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    forms: tuple[str, ...] = ()

    def kinds_of(self, kinds: Sequence[str], own: bool = False) -> list[str]:
        """Those of the kinds that an arch has which are selected, of the package's definition or one of the user's own.

        A kind that is named is selected in whatever form, unless forms are named too.
        """
        usual = [k for k in kinds if SCOPES[k].own_definitions or not own]
        forms = self.forms or ((DENSE,) if own and not self.kinds else FORMS)
        wanted = [k for k in kinds if k in self.kinds] if self.kinds else usual
        return [k for k in wanted if FORM_OF_KIND.get(k, DENSE) in forms]

    def variants(self, kind: str = FORWARD, gpu: bool = False) -> tuple[tuple[str, str], ...]:
        """The (mask, score) pairs that are selected of a kind, for a GPU or the CPU."""
        scope = SCOPES[kind]
        core = scope.variants if scope.on_gpus is None or not gpu else scope.on_gpus
        if not self.masks and not self.scores:
            return core
        if self.masks and self.scores:
            chosen = tuple((m, s) for m in self.masks for s in self.scores)
        else:
            usual = (*CORE_VARIANTS, *WITH_TENSORS) if gpu else CPU_VARIANTS
            known = tuple((m, s) for m, s in usual if m in self.masks or s in self.scores)
            missing = [(m, "identity") for m in self.masks if m not in {c[0] for c in known}]
            missing += [("window", s) for s in self.scores if s not in {c[1] for c in known}]
            chosen = (*known, *missing)
        return chosen if kind == FORWARD or kind in self.kinds else tuple(c for c in chosen if c in core)

    def _of_usual_sizes(self, kind: str, dim: HeadDim, has) -> tuple[tuple[str, str], ...]:
        """The variants for the usual sizes only, unless others are named."""
        if has is None or self.masks or self.scores or dim not in USUAL_HEAD_DIMS:
            return ()
        return tuple(v for v in SCOPES[kind].usual_sizes if has(kind, *v))

    def specs(
        self,
        dtypes: Sequence[str],
        definition: str = BUILTIN_DEFINITION,
        variants: Iterable[tuple[str, str]] = (),
        *,
        gpu: bool = False,
        kinds: Sequence[str] = (FORWARD,),
        templates: Sequence[str] = TEMPLATES,
        has: Callable[[str, str, str], bool] = lambda kind, mask, score: False,
        further: Mapping[str, Mapping[tuple[str, str], tuple[tuple[int, int], ...]]] = MappingProxyType({}),
    ) -> list[KernelSpec]:
        """The kernels selected, in order.

        Parameters
        ----------
        dtypes: what the arch computes.
        definition, variants: of a definition of the user's own.
        gpu: whether the arch is that of a GPU, whose core set has ``HEAD_DIMS_BETWEEN``.
        kinds: of kernels that the arch has.
        templates: that the arch has.
        has: whether it has kernels of a kind for one of the variants in ``usual_sizes``.
        further: sizes for which its core set has kernels of its own, by kind and variant.
        """
        own, variants = definition != BUILTIN_DEFINITION, tuple(variants)
        usual_templates, usual_dims = (
            (templates[-1:], USUAL_HEAD_DIMS) if own else (TEMPLATES, (*HEAD_DIMS, LATENT_HEAD_DIM))
        )
        between = gpu and not self.head_dims and not own
        others = tuple(dict.fromkeys(HeadDim(*d) for kind in further.values() for of in kind.values() for d in of))
        wanted = self.kinds_of(kinds, own)
        return [
            KernelSpec(template, definition, mask, score, dtype, dim.qk, dim.v, kind=kind)
            for template in self.templates or usual_templates
            for dtype in self.dtypes or dtypes
            for dim in (
                *(self.head_dims or usual_dims),
                *((*HEAD_DIMS_BETWEEN, *others) if between else ()),
            )
            for kind in wanted
            if kind not in ONE_TEMPLATE or template == templates[-1]
            if self.head_dims or SCOPES[kind].has_size(dim)
            if not between or dim not in HEAD_DIMS_BETWEEN or SCOPES[kind].between
            if not between or dim not in others or kind in further
            for mask, score in variants
            or (
                *self.variants(kind, gpu),
                *self._of_usual_sizes(kind, dim, has if gpu and template == templates[-1] else None),
            )
            if score not in OF_16_BITS or (dtype != "float32" and template == templates[-1])
            if not between or dim not in HEAD_DIMS_BETWEEN or (score == "identity" and mask != "padded")
            if not between or dim not in others or (dim.qk, dim.v) in further[kind].get((mask, score), ())
        ]
