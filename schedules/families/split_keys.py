"""Kernels that split the keys among blocks, for few query rows: what the families' two launches have in common.

The first launch leaves a partial result of each split (:mod:`schedules.tile.partial`), the second combines them
(:mod:`schedules.tile.combine`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.operator import SCALES
from schedules.definition.parameters import append_arguments
from schedules.definition.pattern import Pattern
from schedules.families.interface import Program, Rejected, ScheduledLaunch
from schedules.families.limits import by_head_dim
from schedules.tile.combine import FurtherPartials, Sinks, combine, combine_ragged
from schedules.tile.fold import fold_ragged
from schedules.tile.tile_scheduler import Traversal, ceildiv
from tvm_flash.packs import sizes
from tvm_flash.packs.manifest import MOST_BLOCKS, MOST_SPLIT, Scalar, Workspace

#: Query rows that share a key up to which these kernels are meant, by head_dim (the first that is large enough) and by
#: the fewest keys.  What they gain depends on the batch, which must not decide: a sequence has the same bits in any.
#: Time of the forward kernel by theirs on an H200, bfloat16, 16 heads on 16, at batch 1, 8 and 64: head_dim 128 at 512
#: keys 1.40, 0.66, 0.73 for 4 rows; at 1024 1.93, 0.82, 0.89 for 4 and 1.33, 0.76, 0.73 for 64; at 8192 3.84, 0.94,
#: 0.96 and 3.30, 0.73, 0.72.  head_dim 64 at 256 keys 1.17, 1.05, 1.15 for 32 rows and 1.17, 0.97, 0.84 for 64.
#: head_dim 256 at batch 1 and 16, one row: at 256 keys 1.55, 0.66, at 1024 3.08, 0.86.
MAX_ROWS = {
    64: ((0, 0), (256, 32), (512, 64)),
    128: ((0, 0), (1024, 32), (2048, 64)),
    256: ((0, 0), (1024, 64)),
}

#: Keys of a split, by the fewest keys of the sequence, rising from 0.
SplitLengths = Sequence[tuple[int, int]]

#: Keys of a split for each row, at least, in multiples of ``GRAIN``: of a row 8 bytes an element are written and read
#: again, in float32, and of a key 4 are read, so that this bounds what splits leave to a quarter of what they read.
KEYS_OF_A_ROW, GRAIN = 8, 64


#: Blocks of a cluster at most: what every machine with clusters has.  Sixteen, which an H200 has too, seldom find
#: places: 1 x 8k keys of 8 heads 14.1 us, with sixteen blocks that are spread 12.3.
MOST_OF_A_CLUSTER = 8


def undivided(block_n: int, split_lengths: SplitLengths) -> Rejected | None:
    """Why tiles of ``block_n`` keys don't fill every split."""
    if any(length % block_n for length in (GRAIN, *(length for _, length in split_lengths))):
        return Rejected(f"block_n {block_n} doesn't divide every split")
    return None


def program(
    pattern: Pattern,
    partial: PrimFunc,
    traversal: Traversal,
    name: str,
    split_lengths: SplitLengths,
    *,
    alignment: int,
    waits: bool,
) -> Program:
    """Both launches.

    Parameters
    ----------
    partial: ``(q, k, v, o_partial, lse_partial, softmax_scale, split_length, *params)``, with the name ``name``.
    alignment: bytes, as in the manifest.
    waits: whether ``partial`` lets the second launch begin early, so that that one has to wait.
    """
    rows = ("*", "batch", "heads", "seqlen_q")
    splits = ("ceildiv", "seqlen_kv", "split_length")
    for_rows = ("*", GRAIN, ("ceildiv", ("*", KEYS_OF_A_ROW, "rows"), GRAIN))
    results = ("o_partial", "lse_partial")
    params = tuple(p.name for p in pattern.params)
    combining = combine(pattern, traversal, f"{name}_combine", alignment, waits)
    return Program(
        "forward",
        (
            ScheduledLaunch(partial, ("q", "k", "v", *results, "softmax_scale", "split_length", *params)),
            ScheduledLaunch(combining, (*results, "o", "lse", *Sinks(pattern).roles)),
        ),
        "tirx",
        alignment=alignment,
        index_bits=32,
        workspaces=(
            Workspace("o_partial", "float32", (rows, splits, pattern.head_dim_v)),
            Workspace("lse_partial", "float32", (rows, splits)),
        ),
        scalars=(Scalar("split_length", ("max", ("steps", "seqlen_kv", *split_lengths), for_rows)),),
        max_rows=("steps", "seqlen_kv", *by_head_dim(MAX_ROWS, pattern)),
    )


#: Keys of a split where keys lie on pages, by the sequence's own number of keys: a sequence has the same splits
#: whatever a batch or a table of pages has room for.  Multiples of ``GRAIN``.  On an H200, 32 heads on 8 at 128, with
#: splits twice as long: 1 x 1k keys 12.4 us (four tiles one after the other in a single warp), 1 x 128k 155 (1024
#: blocks where 792 are resident; 135 where 528 are).  These were not run.
PAGED_SPLIT_LENGTHS: SplitLengths = ((0, 64), (2048, 128), (4096, 256), (32768, 512))


def paged_split_length(keys: Expr, lengths: SplitLengths = PAGED_SPLIT_LENGTHS) -> Expr:
    """Keys of a split of a sequence of ``keys`` keys."""
    (_, length), *others = lengths
    found = T.int32(length)
    for fewest, length in others:
        found = T.Select(keys >= fewest, T.int32(length), found)
    return found


#: Keys from which on splits may be twice as long, and heads of keys from which on they are: then one sequence fills the
#: machine all the same, and has half as many states.
LONG, _OF_HEADS = 32768, 4


def _bits_of(lengths: SplitLengths, block_n: int) -> list[tuple[int, int]]:
    """Of how many tiles splits of ``lengths`` are, as powers of two."""
    return [(fewest, (length // block_n).bit_length() - 1) for fewest, length in lengths]


def paged_split_bits(keys: Expr, block_n: int, lengths: SplitLengths, longer: Expr | None = None) -> Expr:
    """Of how many tiles of ``block_n`` keys a split of a sequence of ``keys`` keys is, as a power of two.

    Those of long ones are ``longer`` powers of two longer.
    """
    steps = _bits_of(lengths, block_n)
    bits = T.int32(steps[0][1])
    for (_, before), (fewest, after) in itertools.pairwise(steps):
        if after != before:
            bits = bits + T.Select(keys >= fewest, T.int32(after - before), T.int32(0))
    return bits if longer is None else bits + T.Select(keys >= LONG, longer, T.int32(0))


def paged_split_count(keys: Expr, lengths: SplitLengths = PAGED_SPLIT_LENGTHS) -> Expr:
    """How many splits a sequence of ``keys`` keys has."""
    return ceildiv(keys, paged_split_length(T.max(keys, 0), lengths))


def _count_of_longer(lengths: SplitLengths):
    """The same where those of long sequences are ``longer`` powers of two longer, a function of both."""

    def count(keys: Expr, longer: Expr) -> Expr:
        length = paged_split_length(T.max(keys, 0), lengths)
        return ceildiv(keys, T.shift_left(length, T.Select(keys >= LONG, longer, T.int32(0))))

    return count


def most_paged_splits(lengths: SplitLengths) -> tuple:
    """How many splits a sequence has at most that fits its row of the table, as an expression of the sizes."""
    ends = [(fewest, fewest // length) for (_, length), (fewest, _) in itertools.pairwise(lengths)]
    longest = ("ceildiv", "seqlen_kv", ("steps", "seqlen_kv", *lengths))
    return "max", longest, ("steps", "seqlen_kv", (0, 1), *ends)


def parts_program(
    pattern: Pattern,
    clusters: PrimFunc,
    shares: PrimFunc,
    folding: str,
    lengths: SplitLengths,
    *,
    resident: int,
    packs: bool,
    most_rows: int,
    page_step: int,
    alignment: int,
) -> Program:
    """The launches, of ragged sequences with their keys on pages, where blocks leave states of splits of ``lengths``.

    Blocks share the tiles of all sequences, and a second launch, ``folding``, folds.  Or clusters of ``runs`` blocks
    each take a sequence, and fold its states themselves.  Which it is follows from shapes, the table of pages among
    them, as the host doesn't know lengths.

    Parameters
    ----------
    clusters: ``(q, k, v, o, lse, cu_seqlens_q, seqlens_k, page_table, softmax_scale, longer, runs, *params)``.
    shares: ``(q, k, v, o_partial, sums_partial, cu_seqlens_q, seqlens_k, page_table, softmax_scale, longer, spread,
        *params)``; it lets the second launch begin early.
    resident: blocks that the machine runs at a time.
    packs: whether query heads of a group share rows, of which a block keeps the states of ``most_rows`` at most.
    page_step: keys of which pages are meant to have multiples; others are computed as well.
    """
    units = ("*", "batch", "kv_heads" if packs else "heads")
    splits = most_paged_splits(lengths)
    runs = _runs_of_sequences(units, splits, "rows" if packs else "seqlen_q", resident, most_rows)
    rows = ("max", 1, ("*", "spread", "heads", "total_q"))
    results, where = ("o_partial", "sums_partial"), ("cu_seqlens_q", "seqlens_k")
    params = tuple(p.name for p in pattern.params)
    fold = fold_ragged(pattern, _count_of_longer(lengths), folding, alignment)
    of_all = (*where, "page_table", "softmax_scale", "longer")
    return Program(
        "forward",
        (
            ScheduledLaunch(clusters, ("q", "k", "v", "o", "lse", *of_all, "runs", *params), when="runs"),
            ScheduledLaunch(shares, ("q", "k", "v", *results, *of_all, "spread", *params), when="spread"),
            ScheduledLaunch(fold, (*results, "o", "lse", *where, "longer", *Sinks(pattern).roles), when="spread"),
        ),
        "tirx",
        alignment=alignment,
        index_bits=32,
        workspaces=(
            Workspace("o_partial", "float32", (rows, splits, pattern.head_dim_v)),
            Workspace("sums_partial", "float32", (rows, splits, 2)),
        ),
        scalars=(
            Scalar("longer", ("steps", "kv_heads", (0, 0), (_OF_HEADS, 1))),
            Scalar("runs", runs),
            Scalar("spread", ("steps", "runs", (0, 1), (1, 0))),
        ),
        max_rows=most_packed_rows(pattern, page_step),
    )


#: Keys that a table has room for at most where clusters of two or three blocks each take a sequence.
_SHORT = 2048


def _runs_of_sequences(
    units: sizes.Expression, splits: sizes.Expression, rows: sizes.Expression, resident: int, most_rows: int
) -> sizes.Expression:
    """Blocks of each of ``units`` clusters, of sequences that have ``splits`` splits and ``rows`` rows a key at most; 0
    if blocks should rather share all tiles.

    Lengths aren't known, and equal shares are what suits any.  But

    * where sequences are few and short, a cluster of four blocks or more, with two splits a block at most, saves the
      second launch, whatever lengths are;
    * where a table has room for ``_SHORT`` keys at most, so do two or three blocks, and pairs fill all places.  16 x 1k
      keys of 8 heads at head_dim 64 take 12.2 us in place of 16.3, 16 x 2k at 128 35.8 in place of 40.4, half of the
      keys that there is room for 8.2 in place of 11.6 and 21.4 of 24.8, lengths from 0.1 to 1 of that 11.7 in place of
      17.1 and 28.4 of 31.4, but one of that and 15 of an eighth 10.6 in place of 9.2 and 18.7 of 14.2 (H200);
    * where they are twice as many as the places, sequences of different lengths fill the machine one after the other,
      and with a block for each no states go through memory: 128 of about 1024 keys 145 us in place of 161, 64 of
      exactly 1024 72 in place of 82 (H200, 32 heads on 8, head_dim 128).  32 of about 4096 would wait for the longest.
    """
    most = MOST_OF_A_CLUSTER
    pairs = ("min", 2, ("//", resident, units))
    fitting = ("min", most, splits, ("max", pairs, ("//", resident * 13 // 16, units)))
    four, two = (("steps", fitting, (0, 0), (blocks, 1)) for blocks in (4, 2))
    short = ("steps", splits, (0, 1), (most * 3 // 2 + 1, 0))
    shorter = ("steps", "seqlen_kv", (0, 1), (_SHORT + 1, 0))
    many = ("steps", units, (0, 0), (resident * 15 // 8, 1))
    found = ("+", ("*", ("max", ("*", four, short), ("*", two, shorter)), fitting), many)
    of_a_block = ("ceildiv", splits, ("max", 1, found))
    fit = ("steps", ("*", rows, of_a_block), (0, 1), (most_rows + 1, 0))
    on_an_axis = ("steps", "batch", (0, 1), (MOST_BLOCKS + 1, 0))
    return ("*", fit, on_an_axis, found)


def most_packed_rows(pattern: Pattern, page_step: int) -> sizes.Expression:
    """Query rows that share a key up to which kernels over pages of multiples of ``page_step`` keys are meant."""
    most_rows = ("steps", "seqlen_kv", *by_head_dim(MAX_ROWS, pattern))
    if page_step == 1:
        return most_rows
    filled = ("*", page_step, ("ceildiv", "page_size", page_step))  # the size of a page, if it is such a multiple
    return ("*", ("steps", ("ceildiv", filled, ("max", "page_size", 1)), (0, 1), (2, 0)), most_rows)


def paged_program(
    pattern: Pattern,
    partial: PrimFunc,
    name: str,
    *,
    alignment: int,
    waits: bool,
) -> Program:
    """Both launches, of ragged sequences with their keys on pages.

    ``partial``: ``(q, k, v, o_partial, lse_partial, cu_seqlens_q, seqlens_k, page_table, softmax_scale, *params)``.
    """
    return _paged_program(pattern, name, partial, ("page_table",), alignment, waits)


def scaled_program(pattern: Pattern, partial: PrimFunc, name: str, *, alignment: int, waits: bool) -> Program:
    """The launches over pages of a cache of 8 bits: ``partial`` takes the scales behind the table."""
    return _paged_program(pattern, name, partial, ("page_table", *SCALES), alignment, waits)


def _paged_program(
    pattern: Pattern,
    name: str,
    partial: PrimFunc,
    table: tuple[str, ...],
    alignment: int,
    waits: bool,
) -> Program:
    rows = ("*", "heads", "total_q")
    splits = most_paged_splits(PAGED_SPLIT_LENGTHS)
    results, where = ("o_partial", "lse_partial"), ("cu_seqlens_q", "seqlens_k")
    params = tuple(p.name for p in pattern.params)
    combining = combine_ragged(pattern, paged_split_count, f"{name}_combine", alignment, waits)
    return Program(
        "forward",
        (
            ScheduledLaunch(partial, ("q", "k", "v", *results, *where, *table, "softmax_scale", *params)),
            ScheduledLaunch(combining, (*results, "o", "lse", *where, *Sinks(pattern).roles)),
        ),
        "tirx",
        alignment=alignment,
        index_bits=32,
        workspaces=(
            Workspace("o_partial", "float32", (rows, splits, pattern.head_dim_v)),
            Workspace("lse_partial", "float32", (rows, splits)),
        ),
        max_rows=most_packed_rows(pattern, 1),
    )


def asked_split_bits(asked: Expr, keys: Expr, block_n: int, lengths: SplitLengths) -> Expr:
    """Of how many tiles a split is, as a power of two: ``asked - 1``, or as ``lengths`` say if ``asked`` is 0."""
    return T.Select(asked > 0, asked - 1, paged_split_length(keys, _bits_of(lengths, block_n)))


def latent_program(
    pattern: Pattern,
    partial: PrimFunc,
    name: str,
    *,
    alignment: int,
    lengths: SplitLengths,
    block_n: int,
    block_m: int,
    most_rows: int,
) -> Program:
    """Both launches where values are the first columns of keys, for at most ``most_rows`` query rows a sequence.

    Splits are as long as a call asks for (``split_length``), else of ``lengths``; in powers of two of tiles of
    ``block_n`` keys.

    ``partial``: ``(q, k, o_partial, lse_partial, o, lse, cu_seqlens_q, seqlens_k, page_table, softmax_scale, row_tiles,
    split_bits, *params)``, which lets the second launch begin early, and writes the rows of sequences with a single
    split itself.  ``row_tiles`` are how many tiles of ``block_m``
    rows a sequence has at most, and ``split_bits`` what :func:`asked_split_bits` takes.
    """
    rows = ("*", "heads", "total_q")
    is_asked = ("steps", "split_length", (0, 0), (1, 1))
    by_keys = ("*", ("steps", "split_length", (0, 1), (1, 0)), most_paged_splits(lengths))
    by_length = ("*", is_asked, ("ceildiv", "seqlen_kv", ("max", 1, "split_length")))
    splits = ("max", 1, ("+", by_keys, by_length))
    doublings = ((block_n << n, n + 1) for n in range((MOST_SPLIT // block_n).bit_length()))
    asked = tirx.Var("split_bits", "int32")

    def split_count(keys):
        bits = asked_split_bits(asked, T.max(keys, 0), block_n, lengths)
        return T.shift_right(keys + T.shift_left(T.int32(block_n), bits) - 1, bits + (block_n.bit_length() - 1))

    results, where = ("o_partial", "lse_partial"), ("cu_seqlens_q", "seqlens_k")
    combining = combine_ragged(pattern, split_count, f"{name}_combine", alignment, True, FurtherPartials)
    combining = append_arguments(combining, [asked])
    params = tuple(p.name for p in pattern.params)
    numbers = ("softmax_scale", "row_tiles", "split_bits")
    return Program(
        "forward",
        (
            ScheduledLaunch(partial, ("q", "k", *results, "o", "lse", *where, "page_table", *numbers, *params)),
            ScheduledLaunch(combining, (*results, "o", "lse", *where, *Sinks(pattern).roles, "split_bits")),
        ),
        "tirx",
        alignment=alignment,
        index_bits=32,
        workspaces=(
            Workspace("o_partial", "float32", (rows, splits, pattern.head_dim_v)),
            Workspace("lse_partial", "float32", (rows, splits)),
        ),
        scalars=(
            Scalar("row_tiles", ("ceildiv", "rows", block_m)),
            Scalar("split_bits", ("steps", "split_length", (0, 0), *doublings)),
        ),
        max_rows=most_rows,
    )
