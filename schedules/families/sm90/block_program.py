"""The launches of decoding over caches of 8 bits on Hopper: which of its kernels a call has, and how many blocks."""

from __future__ import annotations

from tvm import tirx
from tvm.tirx import PrimFunc

from schedules.definition.operator import SCALES
from schedules.definition.parameters import append_arguments
from schedules.definition.pattern import Pattern
from schedules.families import split_keys
from schedules.families.interface import Program, ScheduledLaunch
from schedules.families.mma.mma import ALIGNMENT
from schedules.families.sm90.decode import MULTIPROCESSORS
from schedules.tile.combine import LONG, Shape, Sinks, combine_ragged
from tvm_flash.packs import sizes
from tvm_flash.packs.manifest import Scalar, Workspace

#: Blocks on a multiprocessor up to which all warps of one share a split, where there are no more splits.  On an H200,
#: us, with a warp for a split and so: 1 x 8k keys of 8 heads 18.0 and 14.2, 4 x 1k, which are 512 splits, 9.1 and 15.
_WIDE = 2

#: Keys that a warp may have at most where it has more than a split.
_MOST_KEYS = 256

#: From how many splits on, and up to how many sequences and heads of keys, the second launch is that for many splits:
#: 1 x 128k keys of 8 heads 75.6 us in all and 77.5 by the other, 32 x 4k 79.0 and 76.5.
_LONG, _FEW_UNITS = 64, 64

#: Warps of a launch unless there are fewer splits: enough to fill any machine several times, and few enough that those
#: without a split, where sequences are much shorter than their table has room for, cost little.
_MOST_WARPS = 8192


def block_program(
    pattern: Pattern, more: PrimFunc, few: dict[str, PrimFunc], config, name: str, *, packs: bool, waits: bool
) -> Program:
    """The launches over pages of a cache of 8 bits.

    ``more``, and those of ``few``, take ``(q, k, v, o_partial, lse_partial, cu_seqlens_q, seqlens_k, page_table,
    k_scale, v_scale, softmax_scale, when, blocks, *params)``; a call with as few rows a key as ``few`` have in a tile
    has one of these in the place of ``more``: ``wide`` where splits are few, if there is one, else ``few``.
    """
    rows = ("*", "heads", "total_q")
    splits = split_keys.most_paged_splits(split_keys.PAGED_SPLIT_LENGTHS)
    results, where = ("o_partial", "lse_partial"), ("cu_seqlens_q", "seqlens_k")
    roles = ("q", "k", "v", *results, *where, "page_table", *SCALES, "softmax_scale")
    params = tuple(p.name for p in pattern.params)

    def combining(when):
        symbol = f"{name}_combine_{when}"
        shape = LONG if when == "long" else Shape()
        made = combine_ragged(pattern, split_keys.paged_split_count, symbol, ALIGNMENT, waits, shape=shape)
        return append_arguments(made, [tirx.Var(when, "int32")])

    units = ("*", "batch", "kv_heads" if packs else "heads")
    is_few = ("steps", "rows" if packs else "seqlen_q", (0, 1), (config.block_m // 2 + 1, 0)) if few else 0
    is_wide = ("steps", ("*", units, splits), (0, 1), (_WIDE * MULTIPROCESSORS + 1, 0)) if "wide" in few else 0
    is_long = ("*", ("steps", splits, (0, 0), (_LONG, 1)), ("steps", units, (0, 1), (_FEW_UNITS + 1, 0)))
    blocks = _blocks(units, splits, MULTIPROCESSORS * config.few_blocks_per_sm)
    return Program(
        "forward",
        (
            *(ScheduledLaunch(x, (*roles, n, "blocks", *params), when=n) for n, x in (("more", more), *few.items())),
            *(
                ScheduledLaunch(combining(n), (*results, "o", "lse", *where, *Sinks(pattern).roles, n), when=n)
                for n in ("short", "long")
            ),
        ),
        "tirx",
        alignment=ALIGNMENT,
        index_bits=32,
        workspaces=(
            Workspace("o_partial", "float32", (rows, splits, pattern.head_dim_v)),
            Workspace("lse_partial", "float32", (rows, splits)),
        ),
        scalars=(
            Scalar("more", ("steps", is_few, (0, 1), (1, 0))),
            Scalar("wide", ("*", is_few, is_wide)),
            Scalar("few", ("*", is_few, ("steps", "wide", (0, 1), (1, 0)))),
            Scalar("long", is_long),
            Scalar("short", ("steps", "long", (0, 1), (1, 0))),
            Scalar("blocks", ("+", ("*", "wide", splits), ("*", ("steps", "wide", (0, 1), (1, 0)), blocks))),
        ),
        max_rows=split_keys.most_packed_rows(pattern, 1),
    )


def _blocks(units: sizes.Expression, splits: sizes.Expression, resident: int) -> sizes.Expression:
    """How many warps each of ``units`` sequences and heads of keys has, of ``splits`` splits at most.

    As many as fit in ``resident`` places, since a warp that goes from split to split is the faster one: on an H200, 64
    sequences of 1024 keys and 8 heads of them take 47.7 us with 4 warps for each, and 53.8 with 16.  But not if a warp
    might have more than ``_MOST_KEYS`` keys, as lengths aren't known: 64 sequences of 101 to 2048 keys take 67.8 and
    62.2, one of 4096 and 63 of 100 take 61.1 and 35.1.  Then a warp has a split, up to ``_MOST_WARPS``.
    """
    fitting = ("min", splits, ("//", resident, ("max", 1, units)))
    is_short = ("min", 1, ("//", ("*", fitting, _MOST_KEYS), ("max", 1, "seqlen_kv")))
    many = ("min", splits, ("ceildiv", _MOST_WARPS, ("max", 1, units)))
    return ("+", ("*", is_short, fitting), ("*", ("steps", is_short, (0, 1), (1, 0)), many))
