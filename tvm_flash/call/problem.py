"""One attention problem, without tensors: sizes, dtype, mask and score kind, as the selector and the checks see it."""

from __future__ import annotations

from dataclasses import dataclass

from tvm_flash.catalogue import INSTEAD, MASKS, SCORES
from tvm_flash.operators import FORWARD, OPERATORS
from tvm_flash.packs import sizes
from tvm_flash.packs.manifest import BUILTIN_DEFINITION, CACHE_OF_KIND, DENSE, FARTHEST_START, MOST_ALIGNMENT, PAGED

DTYPES = ("float32", "float16", "bfloat16")
LAYOUTS = ("bhsd", "bshd")
VARIANTS = ("v1", "v2", "auto")

#: Function that takes each layout.
FUNCTION_OF_LAYOUT = {"bhsd": "flash_attention", "bshd": "flash_attention_v2"}

#: head_dim must be a multiple of this many elements.
HEAD_DIM_MULTIPLE = 8

INT32_MAX = 2**31 - 1

#: A side of a window that is wider than any distance from a ``query_start``, in sequences of ``MAX_POSITIONED`` queries
#: and keys together; no sum of the two leaves int32.
UNBOUNDED = 2 * FARTHEST_START - 2
MAX_POSITIONED = FARTHEST_START - 2


@dataclass(frozen=True)
class Mask:
    """A sliding window, causal or full mask in one normal form.

    ``left`` and ``right`` are how many keys before and after its own position a query sees; None is unbounded.
    ``kind`` is the cheapest mask of the catalogue that computes it.
    """

    left: int | None = None
    right: int | None = None

    @property
    def kind(self) -> str:
        if self.left is not None:
            return "window"
        return {None: "full", 0: "causal"}.get(self.right, "window")

    def widths(self, seqlen_q: int, seqlen_kv: int) -> tuple[int, int]:
        """``(window_left, window_right)`` for a kernel that has a window: unbounded becomes wider than any distance."""
        unbounded = seqlen_q + seqlen_kv
        return tuple(unbounded if x is None else x for x in (self.left, self.right))


def normalise_mask(causal: bool, window_size: tuple[int, int], seqlen_q: int, seqlen_kv: int) -> Mask:
    """``causal`` and ``window_size`` as FlashAttention reads them, with bounds that cut nothing off taken away.

    Causal means that nothing after a query's own position is seen, whatever the window says.  A query ``i`` stands on
    the key position ``i + seqlen_kv - seqlen_q``, which is at most ``seqlen_kv - 1`` and at least ``seqlen_kv -
    seqlen_q``.
    """
    left, right = (None if x == -1 else x for x in window_size)
    right = 0 if causal else right
    if left is not None and left >= seqlen_kv - 1:
        left = None
    if right is not None and right >= seqlen_q - 1:
        right = None
    return Mask(left, right)


@dataclass(frozen=True)
class Problem:
    """What a kernel is chosen for.

    ``head_dim`` and ``head_dim_v`` in elements; ``mask`` and ``score`` are names of the catalogue, and empty for a
    definition of the user's own, which has them built in.  ``layout`` is that of the caller's tensors.
    ``alignment`` is the number of bytes (a power of two, up to ``MOST_ALIGNMENT``) that all pointers and strides are
    multiples of.
    ``index_bits`` is 32 if every size and stride fits an int32, else 64.  ``op`` is the operator that is asked for, and
    ``workspaces`` says whether memory for them can be allocated.  ``accumulate`` says that gradients are to be added to
    float32 ones that are there, ``gradients`` of which parameters some are wanted.  Of sequences of different lengths
    ``batch`` is how many there are, and the lengths are those of all together; with their keys on pages,
    ``pages_per_sequence * page_size`` are those that a sequence may have, ``longest`` (None if unknown) is how many
    queries none exceeds, and ``split_length`` how many keys a split has, 0 if nobody says so.  ``cache_dtype`` is that
    of keys and values which have 8 bits.
    """

    batch: int
    heads: int
    kv_heads: int
    seqlen_q: int
    seqlen_kv: int
    head_dim: int
    head_dim_v: int
    dtype: str
    layout: str
    mask: str = "full"
    score: str = "identity"
    definition: str = BUILTIN_DEFINITION
    alignment: int = MOST_ALIGNMENT
    index_bits: int = 32
    op: str = FORWARD
    workspaces: bool = True
    accumulate: bool = False
    gradients: tuple[str, ...] = ()
    cache_dtype: str = ""
    pages: int = 0
    page_size: int = 0
    pages_per_sequence: int = 0
    longest: int | None = None
    split_length: int = 0

    @property
    def kind(self) -> str:
        """A kind of kernels for it, as a build is asked for."""
        return next((k for k, dtype in CACHE_OF_KIND.items() if dtype == self.cache_dtype), self.op)

    @property
    def rows(self) -> int:
        """Query rows that share a key: those of all heads of a group."""
        return self.sizes["rows"]

    @property
    def form(self) -> str:
        """How sequences lie in memory: ``"dense"``, ``"ragged"`` or ``"paged"``."""
        return OPERATORS[self.op].form

    @property
    def is_ragged(self) -> bool:
        """Whether sequences have different lengths, and lie one after the other, their keys perhaps on pages."""
        return self.form != DENSE

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes by name (:mod:`tvm_flash.packs.sizes`)."""
        if self.form == PAGED:
            return sizes.of_pages(
                *(self.batch, self.heads, self.seqlen_q, self.kv_heads, self.pages, self.page_size),
                *(self.pages_per_sequence, self.head_dim, self.head_dim_v, self.longest, self.split_length),
            )
        of = sizes.of_sequences if self.is_ragged else sizes.of
        return of(
            *(self.batch, self.heads, self.seqlen_q, self.kv_heads, self.seqlen_kv, self.head_dim, self.head_dim_v)
        )

    @property
    def masks(self) -> tuple[str, ...]:
        """The masks that would do, the best first; none for a definition of the user's own."""
        return MASKS[self.mask].stand_ins if self.mask else ()

    @property
    def scores(self) -> tuple[str, ...]:
        """The scores that would do, the best first; none for a definition of the user's own."""
        return SCORES[self.score].stand_ins if self.score else ()

    @property
    def unusual(self) -> list[str]:
        """The parameters of its mask and score that few kernels of GPUs know."""
        return [p.name for p in (*MASKS[self.mask].params, *SCORES[self.score].params) if p.name in INSTEAD]

    def __str__(self) -> str:
        kv = f", kv_heads {self.kv_heads}" if self.kv_heads != self.heads else ""
        lengths = str(self.seqlen_q) if self.seqlen_q == self.seqlen_kv else f"{self.seqlen_q}×{self.seqlen_kv}"
        dims = str(self.head_dim) if self.head_dim == self.head_dim_v else f"{self.head_dim}/{self.head_dim_v}"
        what = f"{self.mask}, {self.score}" if self.mask else self.definition
        what += f", a cache of {self.cache_dtype}" if self.cache_dtype else ""
        if self.is_ragged:
            return (
                f"{self.batch} sequences, heads {self.heads}{kv}, rows {lengths}, head_dim {dims}, {self.dtype}, {what}"
            )
        return f"batch {self.batch}, heads {self.heads}{kv}, seq {lengths}, head_dim {dims}, {self.dtype}, {what}"
