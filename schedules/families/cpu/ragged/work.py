"""The work of a call over sequences of different lengths: row tiles of each, or parts of its keys, in equal shares.

1. Each sequence's work items are counted: row tiles, or for few queries parts of its keys.
2. Shares of them go to the threads; a work item is what it is for sequences alone (``tiles.py``, ``few.py``).
3. Parts of keys are put together.

Query heads that read the same part of keys are one item, and those of its other heads too where there are enough parts
(``decode/group.py``), so that a thread reads keys from memory once and in their order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.cpu.config import Config
from schedules.families.cpu.decode.group import group_macro
from schedules.families.cpu.few import FEW, PART_KEYS, FixedParts, join_macro
from schedules.families.cpu.geometry import SequenceGeometry
from schedules.families.cpu.isa import Isa
from schedules.families.cpu.kernel import item_macro
from schedules.families.cpu.ragged.sequences import Shares, Starts, append, begin_share, find
from schedules.families.cpu.tiles import row_tile_macro
from schedules.tile.tile_scheduler import Traversal

#: What a work item costs beside its products, in keys.
_KEYS_OF_AN_ITEM = 64
#: Parts of keys that a thread gets at least, where there are as many with heads apart.
_ITEMS_OF_A_THREAD = 4
#: How much longer a query and a key take where there are few queries, whose products load an operand each.
_COST_OF_FEW = 4


class Keys(Protocol):
    """Where the keys of sequences are; ``buffer`` has their starts, or their lengths."""

    buffer: tirx.Buffer

    def own_length(self, sequence: Expr) -> Expr:
        """How many keys a sequence has; none of what follows the last one."""

    def place(self, sequence: Expr) -> Expr:
        """A number that says where they are."""

    def at(self, call: SequenceGeometry, place: Expr) -> SequenceGeometry:
        """The call with the keys of the sequence whose are at a place."""


def attend_macro(pattern: Pattern, config: Config, isa: Isa, traversal: Traversal):
    """A macro ``(call, queries, keys)``: all sequences, of which ``queries`` and ``keys`` say where they are."""
    dtype, M = pattern.dtype, config.block_m
    row_tile = row_tile_macro(config, isa, dtype, pattern.head_dim, pattern.head_dim_v)
    split = FixedParts()
    part, join = group_macro(isa, dtype, pattern.head_dim, pattern.head_dim_v, split), join_macro(split)
    work_item = item_macro(pattern, traversal)

    def of_sequence(call: SequenceGeometry, keys: Keys, first_q, length_q, place, length_k, first_part_row):
        """The call of one sequence."""
        lengths = {"seqlen_q": length_q, "seqlen_kv": length_k}
        rows = {"q": call.q.from_row(first_q), "o": call.o.from_row(first_q), "first_row": first_q}
        return keys.at(replace(call, **rows, **lengths, first_part_row=first_part_row), place)

    def seen(P, s, tiles):
        """Keys that a row tile in the middle visits."""
        first = tiles // 2 * M
        visible = pattern.keys_of(P.site(s, T.int64(0)), first, T.min(first + M, P.seqlen_q) - 1).visible
        return T.max(visible[1] - visible[0], T.int64(0))

    def rows_of_parts(queries: Starts, keys: Keys):
        """Rows of all parts of a head (``runtime_c/sequences.c``): there is no array yet to read the number from."""
        places = (queries.buffer.access_ptr("r"), queries.total, queries.batch, keys.buffer.access_ptr("r"))
        are_starts = T.int32(isinstance(keys, Starts))
        return T.call_extern("int64", "tvm_flash_rows_of_parts", *places, are_starts, T.int64(FEW), T.int64(PART_KEYS))

    @T.inline
    def attend(call: SequenceGeometry, queries, keys):
        heads, kv_heads, head_dim, head_dim_v = call.heads, call.kv_heads, call.head_dim, call.head_dim_v
        starts = T.meta_var(call.batch + 1)
        with T.sblock("sequences"):
            T.reads()
            T.writes()
            items = T.sblock_alloc_buffer((starts + 1,), "int64")
            costs = T.sblock_alloc_buffer((starts + 1,), "int64")
            part_rows = T.sblock_alloc_buffer((starts + 1,), "int64")
            most = T.meta_var(heads * rows_of_parts(queries, keys))
            outputs = T.sblock_alloc_buffer((most * head_dim_v,), "float32")
            maxima = T.sblock_alloc_buffer((most,), "float32")
            sums = T.sblock_alloc_buffer((most,), "float32")
            shares = T.meta_var(Shares(items, costs, starts))

            # 1. Each sequence's work items.  Parts are shared out by heads where there are too few of them.
            parts: T.int64 = T.int64(0)
            for s in T.serial(starts):
                length_q: T.int64 = queries.length(s)
                length_k: T.int64 = keys.own_length(s)
                P = T.meta_var(of_sequence(call, keys, T.int64(0), length_q, T.int64(0), length_k, T.int64(0)))
                if T.And(length_q > 0, length_q <= FEW):
                    parts = parts + split.count(P)
            wanted: T.int64 = T.call_extern("int64", "tvm_flash_launch_threads") * _ITEMS_OF_A_THREAD
            blocks: T.int64 = T.min(T.max((wanted + (parts - 1)) // T.max(parts, T.int64(1)), T.int64(1)), kv_heads)
            together: T.int64 = (kv_heads + (blocks - 1)) // blocks
            blocks = (kv_heads + (together - 1)) // together
            items[0] = T.int64(0)
            costs[0] = T.int64(0)
            part_rows[0] = T.int64(0)
            for s in T.serial(starts):
                length_q: T.int64 = queries.length(s)
                length_k: T.int64 = keys.own_length(s)
                P = T.meta_var(of_sequence(call, keys, T.int64(0), length_q, T.int64(0), length_k, T.int64(0)))
                count: T.int64 = T.int64(0)
                if length_q <= FEW:
                    count = T.Select(length_q > 0, split.count(P), T.int64(0))
                    cost = T.meta_var(length_q * length_k // split.count(P) + _KEYS_OF_AN_ITEM)
                    append(shares, s, blocks * count, heads // blocks * cost * _COST_OF_FEW)
                else:
                    tiles: T.int64 = (length_q + (M - 1)) // M
                    rows: T.int64 = (length_q + (tiles - 1)) // tiles
                    append(shares, s, heads * tiles, rows * (seen(P, s, tiles) + _KEYS_OF_AN_ITEM))
                part_rows[s + 1] = part_rows[s] + heads * count * length_q

            # 2. All of them, in shares.
            work = T.meta_var(shares.cost * (head_dim + head_dim_v))
            T.evaluate(T.call_extern("void", "tvm_flash_announce", shares.count, work))
            for share in T.parallel(shares.count):
                with T.sblock("share"):
                    T.reads()
                    T.writes()
                    bounds = T.sblock_alloc_buffer((2,), "int64", scope="local")
                    begin_share(shares, share, bounds, 0)
                    begin_share(shares, share + 1, bounds, 1)
                    s: T.int64 = T.int64(0)
                    find(items, starts, bounds[0], s)
                    for item in T.serial(bounds[0], bounds[1]):
                        while items[s + 1] <= item:
                            s = s + 1
                        first_q: T.int64 = queries.begin(s)
                        length_q: T.int64 = queries.length(s)
                        place: T.int64 = keys.place(s)
                        length_k: T.int64 = keys.own_length(s)
                        first_part_row: T.int64 = part_rows[s]
                        w: T.int64 = item - items[s]
                        P = T.meta_var(of_sequence(call, keys, first_q, length_q, place, length_k, first_part_row))
                        if length_q <= FEW:
                            with T.sblock("part"):
                                T.reads()
                                T.writes()
                                kv_first: T.int64 = w % blocks * together
                                kv_count: T.int64 = T.min(kv_heads - kv_first, together)
                                part(P, (outputs, maxima, sums), s, kv_first, kv_count, w // blocks, split.count(P))
                        else:
                            with T.sblock("row_tile"):
                                T.reads()
                                T.writes()
                                tile = T.meta_var(work_item(w, T.int64(1), heads, (length_q + (M - 1)) // M))
                                h: T.int64 = tile.head
                                row0: T.int64 = tile.m_block * M
                                row_tile(P, s, h, row0)

            # 3. The parts of keys.
            if part_rows[starts] > 0:
                T.evaluate(T.call_extern("void", "tvm_flash_announce", starts * heads, part_rows[starts] * head_dim_v))
                for w in T.parallel(starts * heads):
                    with T.sblock("join"):
                        T.reads()
                        T.writes()
                        s: T.int64 = w // heads
                        first_q: T.int64 = queries.begin(s)
                        length_q: T.int64 = queries.length(s)
                        length_k: T.int64 = keys.own_length(s)
                        first_part_row: T.int64 = part_rows[s]
                        P = T.meta_var(of_sequence(call, keys, first_q, length_q, T.int64(0), length_k, first_part_row))
                        if length_q <= FEW:
                            join(P, (outputs, maxima, sums), s, w % heads, split.count(P))

    return attend
