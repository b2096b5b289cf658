"""What is computed: one attention problem, and the grids of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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

MASKS = (False, True)


@dataclass(frozen=True)
class Workload:
    """One attention problem: sizes, dtype and mask (full, or causal aligned bottom-right)."""

    batch: int
    heads: int
    seqlen_q: int
    seqlen_kv: int
    head_dim: int
    dtype: str
    causal: bool

    @property
    def flops(self) -> float:
        """Operations of the two products; a causal mask takes half of the square that the queries span."""
        hidden_pairs = self.seqlen_q**2 / 2 if self.causal else 0
        return 4.0 * self.batch * self.heads * self.head_dim * (self.seqlen_q * self.seqlen_kv - hidden_pairs)

    @property
    def mask(self) -> str:
        return "causal" if self.causal else "full"

    def __str__(self) -> str:
        keys = "" if self.seqlen_kv == self.seqlen_q else f", {self.seqlen_kv} keys"
        shape = f"({self.batch}, {self.heads}, {self.seqlen_q}, {self.head_dim}){keys}"
        return f"{shape} {self.mask} {self.dtype}"


def smallest(kind: str, dtype: str) -> Workload:
    """A call whose time is that of calling: one query and one key; on a GPU 64, since cuDNN wants more than one."""
    seqlen = 1 if kind == "cpu" else 64
    return Workload(1, 1, seqlen, seqlen, 64, dtype, False)


def gpu_grid(
    head_dims: Sequence[int] = (), seqlens: Sequence[int] = (), dtypes: Sequence[str] = (), masks: Sequence[bool] = ()
) -> list[Workload]:
    """The GPU grid: for each dtype, head_dim and length, full and causal; an empty argument takes the usual values."""
    return [
        Workload(max(1, TOKENS // s), max(1, HIDDEN // d), s, s, d, dtype, causal)
        for dtype in dtypes or GPU_DTYPES
        for d in head_dims or GPU_HEAD_DIMS
        for causal in masks or MASKS
        for s in seqlens or GPU_SEQLENS
    ]


def of_shapes(
    shapes: Iterable[Sequence[int]], dtypes: Sequence[str] = (), masks: Sequence[bool] = ()
) -> list[Workload]:
    """Workloads of shapes ``(batch, heads, seqlen_q, head_dim[, seqlen_kv])``, full and causal, in each dtype."""
    return [
        Workload(b, h, s, kv[0] if kv else s, d, dtype, causal)
        for dtype in dtypes or CPU_DTYPES
        for b, h, s, d, *kv in shapes
        for causal in masks or MASKS
    ]


def cpu_grid(
    head_dims: Sequence[int] = (), seqlens: Sequence[int] = (), dtypes: Sequence[str] = (), masks: Sequence[bool] = ()
) -> list[Workload]:
    """The CPU grid; ``head_dims`` and ``seqlens`` (of the queries) keep the shapes that have them."""
    shapes = [s for s in CPU_SHAPES if (not head_dims or s[3] in head_dims) and (not seqlens or s[2] in seqlens)]
    return of_shapes(shapes, dtypes, masks)
