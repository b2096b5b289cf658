"""One attention problem to be timed, as text: ``"b=4 h=16 s=4096 d=128 causal float16"``."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from tvm_flash.bench import workloads
from tvm_flash.call.problem import DTYPES, score_kind

_SIZES = {"b": "batch", "h": "heads", "hk": "kv_heads", "s": "seqlen_q", "sk": "seqlen_kv", "d": "head_dim"}
_SIZES["dv"] = "head_dim_v"
_SHORT_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Workload:
    """Sizes, dtype, and which attention.

    ``mask`` is ``"full"``, ``"causal"`` or ``"window"`` (``window`` keys before each query's own, and none after), and
    ``score`` a name of the catalogue; 0 for ``kv_heads``, ``seqlen_kv`` and ``head_dim_v`` stands for ``heads``,
    ``seqlen_q`` and ``head_dim``.
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

    def __post_init__(self):
        for name, default in (("kv_heads", "heads"), ("seqlen_kv", "seqlen_q"), ("head_dim_v", "head_dim")):
            if not getattr(self, name):
                object.__setattr__(self, name, getattr(self, default))

    @staticmethod
    def parse(text: str, dtype: str = "") -> Workload:
        """Read ``"b=4 h=16 s=4096 d=128 causal"``.

        Sizes are ``b h s d``, and where they differ from these ``hk sk dv`` (heads, length and size of keys and
        values); words are ``causal``, ``window=N``, ``softcap=X``, ``alibi`` and a dtype (``float16`` or ``fp16``, …).

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
            elif _SHORT_DTYPES.get(word, word) in DTYPES:
                fields["dtype"] = _SHORT_DTYPES.get(word, word)
            else:
                raise ValueError(
                    f"problem {text!r}: {word!r} isn't understood; expected words such as b=4 h=16 s=4096 d=128 causal "
                    f"window=1024 softcap=30 alibi fp16"
                )
        missing = [short for short in "bhsd" if _SIZES[short] not in fields]
        if missing:
            raise ValueError(f"problem {text!r}: lacks {', '.join(f'{m}=…' for m in missing)}")
        if not fields["dtype"]:
            raise ValueError(f"problem {text!r}: names no dtype; add {', '.join(_SHORT_DTYPES)}, or --dtype")
        fields["score"] = score_kind("softcap" in fields, alibi)
        workload = Workload(**fields)
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
        return " ".join((*words, self.dtype))

    @property
    def softmax_scale(self) -> float:
        return 1 / math.sqrt(self.head_dim)

    @property
    def flops(self) -> float:
        """Operations of the two products; a causal mask takes half of the square that the queries span."""
        pairs = self.seqlen_q * self.seqlen_kv
        if self.mask == "causal":
            pairs -= self.seqlen_q**2 / 2
        if self.mask == "window":
            pairs = self.seqlen_q * min(self.window + 1, self.seqlen_kv)
        return 2.0 * self.batch * self.heads * pairs * (self.head_dim + self.head_dim_v)

    def params(self) -> dict[str, float]:
        """Values of the scalar parameters that the catalogue's masks and scores may have."""
        return {"window_left": self.window, "window_right": 0, "softcap": self.softcap}

    def with_dtype(self, dtype: str) -> Workload:
        return replace(self, dtype=dtype)


def _is_positive(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False


def standard_suite(
    arch: str,
    dtypes: Iterable[str],
    head_dims: Iterable[int] = (),
    seqlens: Iterable[int] = (),
    masks: Collection[str] = (),
) -> list[Workload]:
    """The problems of ``python -m tvm_flash bench``: full and causal, short to long; the filters keep some of them."""
    grid = workloads.cpu_grid if arch == "cpu" else workloads.gpu_grid
    found = (
        Workload(w.batch, w.heads, w.seqlen_q, w.head_dim, w.dtype, w.mask, seqlen_kv=w.seqlen_kv)
        for w in grid(tuple(head_dims), tuple(seqlens), tuple(dtypes))
    )
    # For one query a causal mask hides nothing.
    return [w for w in found if w.mask in (masks or (w.mask,)) and (w.seqlen_q > 1 or w.mask == "full")]
