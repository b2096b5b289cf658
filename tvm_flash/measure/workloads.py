"""One attention problem to be measured, as data and as text, and the grids of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tvm_flash.call.problem import DTYPES
from tvm_flash.catalogue import score_of
from tvm_flash.packs import sizes
from tvm_flash.packs.manifest import DENSE, PAGED, RAGGED

_SIZES = {"b": "batch", "h": "heads", "hk": "kv_heads", "s": "seqlen_q", "sk": "seqlen_kv", "d": "head_dim"}
_SIZES["dv"] = "head_dim_v"
_SHORT_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

#: Sizes of the GPU grid follow the FlashAttention-3 paper (Shah et al., 2024): 16k tokens a batch, hidden size 2048.
TOKENS, HIDDEN = 16384, 2048
GPU_HEAD_DIMS = (64, 128, 256)
GPU_SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
GPU_DTYPES = ("float16", "bfloat16")

#: (batch, heads, seqlen_q, head_dim, seqlen_kv) of the CPU grid: a batch of prompts, a long one, a longer one with wide
#: heads, a sentence encoder's batch, and one new token with a cache of 4096.
CPU_SHAPES = (
    (2, 8, 512, 64, 512),
    (1, 16, 2048, 64, 2048),
    (1, 8, 4096, 128, 4096),
    (4, 12, 384, 32, 384),
    (1, 32, 1, 128, 4096),
)
CPU_DTYPES = ("float32", "bfloat16", "float16")

MASKS = ("full", "causal")

#: How sequences may lie that don't have one length, as the words of a problem.
_FORMS = (RAGGED, PAGED)
#: Keys on a page.
PAGE_SIZE = 64


@dataclass(frozen=True)
class Workload:
    """Sizes, dtype, and which attention.

    ``mask`` is ``"full"``, ``"causal"`` or ``"window"`` (``window`` keys before each query's own, and none after), and
    ``score`` a name of the catalogue; 0 for ``kv_heads``, ``seqlen_kv`` and ``head_dim_v`` stands for ``heads``,
    ``seqlen_q`` and ``head_dim``.  ``backward`` says that the gradients of q, k and v are computed, the result being
    there already.  ``form`` says how the sequences lie (:mod:`tvm_flash.packs.manifest`): those of a ragged batch have
    different lengths, ``seqlen_q`` and ``seqlen_kv`` on average, and so have those with keys on pages of ``PAGE_SIZE``.
    """

    batch: int
    heads: int
    seqlen_q: int
    head_dim: int
    dtype: str
    mask: str = "full"
    score: str = "identity"
    kv_heads: int = 0
    seqlen_kv: int = 0
    head_dim_v: int = 0
    window: int = 0
    softcap: float = 0.0
    backward: bool = False
    form: str = DENSE

    def __post_init__(self):
        for name, default in (("kv_heads", "heads"), ("seqlen_kv", "seqlen_q"), ("head_dim_v", "head_dim")):
            if not getattr(self, name):
                object.__setattr__(self, name, getattr(self, default))

    @staticmethod
    def parse(text: str, dtype: str = "") -> Workload:
        """Read ``"b=4 h=16 s=4096 d=128 causal"``.

        Sizes are ``b h s d``, and where they differ from these ``hk sk dv`` (heads, length and size of keys and
        values); words are ``causal``, ``window=N``, ``softcap=X``, ``alibi``, ``ragged``, ``paged``, ``backward`` and
        a dtype (``float16`` or ``fp16``, …).

        Raises
        ------
        ValueError: a word isn't understood, or a size or the dtype is missing.
        """
        fields: dict = {"dtype": dtype}
        alibi = False
        for word in text.split():
            name, _, value = word.partition("=")
            if name in _SIZES and value.isdigit() and int(value) > 0:
                fields[_SIZES[name]] = int(value)
            elif name == "window" and value.isdigit():
                fields |= {"mask": "window", "window": int(value)}
            elif name == "softcap" and _is_positive(value):
                fields["softcap"] = float(value)
            elif word in ("full", "causal"):
                fields["mask"] = word
            elif word == "alibi":
                alibi = True
            elif word == "backward":
                fields["backward"] = True
            elif word in _FORMS:
                fields["form"] = word
            elif _SHORT_DTYPES.get(word, word) in DTYPES:
                fields["dtype"] = _SHORT_DTYPES.get(word, word)
            else:
                raise ValueError(
                    f"problem {text!r}: {word!r} isn't understood; expected words such as b=4 h=16 s=4096 d=128 causal "
                    f"window=1024 softcap=30 alibi ragged backward fp16"
                )
        missing = [short for short in "bhsd" if _SIZES[short] not in fields]
        if missing:
            raise ValueError(f"problem {text!r}: lacks {', '.join(f'{m}=…' for m in missing)}")
        if not fields["dtype"]:
            raise ValueError(f"problem {text!r}: names no dtype; add {', '.join(_SHORT_DTYPES)}, or --dtype")
        fields["score"] = score_of("softcap" in fields, alibi)
        workload = Workload(**fields)
        if workload.form == PAGED and workload.backward:
            raise ValueError(
                f"problem {text!r}: keys on pages of a cache have no gradients; leave out paged or backward"
            )
        if workload.heads % workload.kv_heads:
            raise ValueError(f"problem {text!r}: hk={workload.kv_heads} doesn't divide h={workload.heads}")
        return workload

    def __str__(self) -> str:
        words = [f"b={self.batch}", f"h={self.heads}"]
        words += [f"hk={self.kv_heads}"] if self.kv_heads != self.heads else []
        words += [f"s={self.seqlen_q}"]
        words += [f"sk={self.seqlen_kv}"] if self.seqlen_kv != self.seqlen_q else []
        words += [f"d={self.head_dim}"]
        words += [f"dv={self.head_dim_v}"] if self.head_dim_v != self.head_dim else []
        words += [f"window={self.window}" if self.mask == "window" else self.mask]
        words += [f"softcap={self.softcap:g}"] if self.softcap else []
        words += ["alibi"] if "alibi" in self.score else []
        return " ".join((*words, *self.words, self.dtype))

    @property
    def words(self) -> tuple[str, ...]:
        """The words that say what it is beside a forward over a batch of one length."""
        return (*((self.form,) if self.form != DENSE else ()), *(("backward",) if self.backward else ()))

    @property
    def lengths(self) -> tuple[tuple[int, int], ...]:
        """Queries and keys of each sequence."""
        if self.form == DENSE:
            return ((self.seqlen_q, self.seqlen_kv),) * self.batch
        return tuple(zip(spread(self.batch, self.seqlen_q), spread(self.batch, self.seqlen_kv), strict=True))

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes by name as kernels for the form count them (:mod:`tvm_flash.packs.sizes`)."""
        dims, heads = (self.head_dim, self.head_dim_v), (self.heads, self.kv_heads)
        if self.form == DENSE:
            return sizes.of(self.batch, heads[0], self.seqlen_q, heads[1], self.seqlen_kv, *dims)
        queries, keys = zip(*self.lengths, strict=True)
        if self.form == RAGGED:
            return sizes.of_sequences(self.batch, heads[0], sum(queries), heads[1], sum(keys), *dims)
        each = -(-max(keys) // PAGE_SIZE)
        pages = (self.batch * each, PAGE_SIZE, each)
        return sizes.of_pages(self.batch, heads[0], sum(queries), heads[1], *pages, *dims, seqlen_q=max(queries))

    @property
    def totals(self) -> tuple[int, int]:
        """Queries and keys as the run time counts them: of one sequence of a batch, of all ragged ones together, or
        those that the pages of a sequence have room for."""
        of = self.sizes
        return of.get("total_q", of.get("seqlen_q")), of.get("total_k", of.get("seqlen_kv"))

    @property
    def softmax_scale(self) -> float:
        return 1 / math.sqrt(self.head_dim)

    @property
    def flops(self) -> float:
        """Operations of the two products, or of a backward's five; a causal mask takes half of the queries' square."""
        widths = self.head_dim + self.head_dim_v  # of S and P V; the backward has S, dQ and dK, and dP and dV
        widths += (2 * self.head_dim + self.head_dim_v) if self.backward else 0
        return 2.0 * self.heads * sum(self._pairs(*n) for n in self.lengths) * widths

    def _pairs(self, queries: int, keys: int) -> float:
        """Pairs of a query and a key that count of a sequence."""
        if self.mask == "window":
            return queries * min(self.window + 1, keys)
        return queries * keys - (queries**2 / 2 if self.mask == "causal" else 0)

    def params(self) -> dict[str, float]:
        """Values of the scalar parameters of the catalogue's masks and scores, also of those that stand in."""
        beyond = sum(self.totals)
        left, right = {"full": (beyond, beyond), "causal": (beyond, 0)}.get(self.mask, (self.window, 0))
        biased = {"has_alibi_slopes": int("alibi" in self.score)}
        return {"window_left": left, "window_right": right, "softcap": self.softcap, **biased}

    @property
    def causal(self) -> bool:
        return self.mask == "causal"


def spread(count: int, mean: int) -> tuple[int, ...]:
    """``count`` lengths from a fifth to nine fifths of ``mean``, in no order, the same on every machine."""
    bits = np.random.RandomState(count).randint(0, 2**32, count, dtype=np.uint32)
    share = (bits % 2**24).astype(np.float32) / np.float32(2**24)
    return tuple(max(1, int(x)) for x in share * np.float32(1.6) * np.float32(mean) + np.float32(0.2 * mean))


def _is_positive(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False


def smallest(kind: str, dtype: str, backward: bool = False) -> Workload:
    """A call whose time is that of calling: one query and one key; on a GPU 64, since cuDNN wants more than one."""
    return Workload(1, 1, 1 if kind == "cpu" else 64, 64, dtype, backward=backward)


def gpu_grid(
    head_dims: Sequence[int] = (), seqlens: Sequence[int] = (), dtypes: Sequence[str] = (), masks: Sequence[str] = ()
) -> list[Workload]:
    """The GPU grid: for each dtype, head_dim and length, full and causal; an empty argument takes the usual values."""
    return [
        Workload(max(1, TOKENS // s), max(1, HIDDEN // d), s, d, dtype, mask)
        for dtype in dtypes or GPU_DTYPES
        for d in head_dims or GPU_HEAD_DIMS
        for mask in masks or MASKS
        for s in seqlens or GPU_SEQLENS
    ]


def of_shapes(shapes: Iterable[Sequence[int]], dtypes: Sequence[str] = (), masks: Sequence[str] = ()) -> list[Workload]:
    """Workloads of shapes ``(batch, heads, seqlen_q, head_dim[, seqlen_kv])``, full and causal, in each dtype."""
    return [
        Workload(b, h, s, d, dtype, mask, seqlen_kv=kv[0] if kv else s)
        for dtype in dtypes or CPU_DTYPES
        for b, h, s, d, *kv in shapes
        for mask in masks or MASKS
    ]


def cpu_grid(
    head_dims: Sequence[int] = (), seqlens: Sequence[int] = (), dtypes: Sequence[str] = (), masks: Sequence[str] = ()
) -> list[Workload]:
    """The CPU grid; ``head_dims`` and ``seqlens`` (of the queries) keep the shapes that have them."""
    shapes = [s for s in CPU_SHAPES if (not head_dims or s[3] in head_dims) and (not seqlens or s[2] in seqlens)]
    return of_shapes(shapes, dtypes, masks)


def standard_suite(
    kind: str,
    dtypes: Collection[str],
    head_dims: Sequence[int] = (),
    seqlens: Sequence[int] = (),
    masks: Sequence[str] = (),
) -> list[Workload]:
    """The problems of ``python -m tvm_flash bench`` on ``"cpu"`` or ``"cuda"``; the filters keep some of them."""
    found = (cpu_grid if kind == "cpu" else gpu_grid)(head_dims, seqlens, tuple(dtypes), masks)
    # For one query a causal mask hides nothing.
    return [w for w in found if w.seqlen_q > 1 or w.mask == "full"]
