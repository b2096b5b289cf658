"""One call of a kernel: its tensors and sizes as TIR expressions, in logical order whatever the layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.definition.parameters import Place
from schedules.definition.pattern import Pattern, Site
from schedules.families.cpu.block_table import BlockTable
from schedules.families.cpu.bounds import BlockBounds
from schedules.families.cpu.vector_math import vectorizable
from schedules.tile.key_source import ContiguousRows
from schedules.tile.score import LOG2_E, NEGATIVE_INFINITY
from schedules.tile.sequences import Dense
from tvm_flash.packs.manifest import Param


@dataclass(frozen=True)
class Tensor:
    """A tensor argument: its elements as a flat buffer, and the strides in elements of batch, head and position.

    Flat, because TVM analyses each index: with rank-4 indices in unrolled loops that took 5 s a kernel.  Of a ragged
    batch ``first`` is the offset of the first row of the sequence that is meant, and the stride of the batch is 0.
    """

    flat: tirx.Buffer
    strides: tuple[Expr, Expr, Expr]
    first: Expr | None = None

    def row(self, b: Expr, h: Expr, s: Expr) -> Expr:
        """Offset of the first element of a row."""
        row = b * self.strides[0] + h * self.strides[1] + s * self.strides[2]
        return row if self.first is None else self.first + row

    def from_row(self, s: Expr) -> Tensor:
        """The same tensor from position ``s`` on."""
        return replace(self, first=s * self.strides[2])

    def offset(self, b: Expr, h: Expr, s: Expr, d: Expr) -> Expr:
        """Offset of an element."""
        return self.row(b, h, s) + d

    def rows_offset(self, rows: Expr) -> Expr:
        """Elements from a row to the one that is ``rows`` rows on."""
        return rows * self.strides[2]

    def is_apart(self, width: Expr) -> Expr:
        """Whether there is something else between rows of ``width`` elements."""
        return self.strides[2] > width

    def of_key(self, base: Expr, key: Expr) -> Expr:
        """Offset of the row of a key, ``base`` being that of the head's first; of no key it is any number."""
        return base + key * self.strides[2]

    def in_tile(self, first: Expr, j: Expr) -> Expr:
        """Offset of the row of key number ``j`` of a tile, ``first`` being that of its first."""
        return first + j * self.strides[2]

    def in_memory(self, base: Expr, key: Expr) -> tuple[tirx.Buffer, Expr]:
        """The buffer that the row of a key comes from, and its offset there."""
        return self.flat, self.of_key(base, key)


@dataclass(frozen=True)
class Geometry:
    """A call, and the pattern that it computes.

    ``params`` has the run-time parameters by name, per-head ones as ``(batch, heads)`` buffers; ``bounds`` is what is
    known beyond positions of the mask in tiles of queries and keys.
    """

    pattern: Pattern
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    lse: tirx.Buffer
    lse_length: Expr
    softmax_scale: Expr
    params: Mapping[str, tirx.Var | tirx.Buffer]
    batch: Expr
    heads: Expr
    kv_heads: Expr
    seqlen_q: Expr
    seqlen_kv: Expr
    head_dim: Expr
    head_dim_v: Expr
    bounds: BlockBounds | BlockTable | None = field(default=None, kw_only=True)

    #: Whether keys lie on pages.
    is_paged = False
    #: Whether they have 8 bits, and scales.
    is_scaled = False

    def site(self, b: Expr, h: Expr) -> Site:
        """What the pattern has to know of one batch and head."""
        params = {p.name: self._parameter(p, b, h) for p in self.pattern.params}
        sizes = (self.batch, self.heads, self.kv_heads, self.seqlen_q, self.seqlen_kv)
        return Site(b, h, *sizes, self.softmax_scale, params)

    def _parameter(self, param: Param, b: Expr, h: Expr):
        x = self.params[param.name]
        if not param.axes:
            return x
        return x[b, h] if param.per_head else Place(x, param.axes, b, h, self.seqlen_q, self.seqlen_kv)

    def tile_live(self, site: Site, row: Expr, last_row: Expr, key: Expr, last_key: Expr) -> Expr:
        """Whether some row of a tile may see some key; it begins with a block of each where ``bounds`` are known."""
        return (self.bounds or self.pattern).tile_live(site, row, last_row, key, last_key)

    def tile_full(self, site: Site, row: Expr, last_row: Expr, key: Expr, last_key: Expr) -> Expr:
        """Whether every row of a tile certainly sees every key; else as ``tile_live``."""
        return (self.bounds or self.pattern).tile_full(site, row, last_row, key, last_key)

    def kv_head(self, h: Expr) -> Expr:
        """The head of k and v that query head ``h`` reads."""
        return h // (self.heads // self.kv_heads)

    def key_rows(self, b: Expr, h: Expr) -> ContiguousRows:
        """Where the keys are that query head ``h`` reads."""
        return ContiguousRows(self.k, b, self.kv_head(h), Dense(self.seqlen_kv).of(b))

    def value_rows(self, b: Expr, h: Expr) -> ContiguousRows:
        """Where their values are."""
        return ContiguousRows(self.v, b, self.kv_head(h), Dense(self.seqlen_kv).of(b))

    def with_room(self, keys: int, tile: int) -> Geometry:
        """The same call within a block that looks up the rows of so many keys at once, where that is needed, and
        computes with tiles of ``tile`` keys."""
        return self

    def scale(self) -> Expr:
        """What turns a stored score into a natural one.

        A score that is only scaled is stored as the raw product; its scale goes into the multiplication before the
        exponential, which is there anyway.
        """
        return self.softmax_scale if self.pattern.is_scale_only else T.float32(1)

    def exponent_scale(self) -> Expr:
        """What turns a stored score into an exponent of 2."""
        return self.scale() * T.float32(LOG2_E)

    def stored_score(self, site: Site, product: Expr, i: Expr, j: Expr, chosen: bool | None = None) -> Expr:
        """The score of a raw product as it is stored; ``chosen`` as in :meth:`Pattern.score`."""
        return product if self.pattern.is_scale_only else vectorizable(self.pattern.score(site, product, i, j, chosen))

    def masked_score(
        self, site: Site, product: Expr, i: Expr, j: Expr, chosen: bool | None = None, seen: Expr | None = None
    ) -> Expr:
        """The same, −inf where query ``i`` doesn't see key ``j``, or where it isn't ``seen``, if that is known."""
        value = self.stored_score(site, product, i, j, chosen)
        seen = self.pattern.mask(site, i, j) if seen is None else seen
        return T.Select(seen, value, T.float32(NEGATIVE_INFINITY))

    def sink(self, b: Expr, h: Expr) -> Expr:
        """The logit that a head's rows have beside those of keys; −inf, a constant, if there is none."""
        return self.pattern.sink(self.site(b, h)) if self.pattern.has_sink else T.float32(NEGATIVE_INFINITY)

    def first_max(self, b: Expr, h: Expr) -> Expr:
        """What a row's maximum begins with, as scores are stored: the sink, if there is one."""
        return self.sink(b, h) / self.scale() if self.pattern.has_sink else T.float32(NEGATIVE_INFINITY)

    def first_sum(self, b: Expr, h: Expr) -> Expr:
        """What a row's sum begins with: the sink's share, relative to that maximum."""
        if not self.pattern.has_sink:
            return T.float32(0)
        return T.Select(self.sink(b, h) == T.float32(NEGATIVE_INFINITY), T.float32(0), T.float32(1))

    def wants_lse(self) -> Expr:
        """Whether the caller asked for the log-sum-exp."""
        return self.lse_length >= self.batch * self.heads * self.seqlen_q

    def lse_row(self, b: Expr, h: Expr) -> Expr:
        """Where the log-sum-exp of the first row of a head is."""
        return (b * self.heads + h) * self.seqlen_q

    def part_row(self, b: Expr, h: Expr, part: Expr | int, parts: Expr) -> Expr:
        """Where the first row of a part of a head's keys is, of the rows of all parts."""
        return ((b * self.heads + h) * parts + part) * self.seqlen_q


@dataclass(frozen=True)
class SequenceGeometry(Geometry):
    """One sequence of a ragged call, as if it were alone.

    Its tensors begin with its first row, ``seqlen_q`` and ``seqlen_kv`` are its own lengths, ``first_row`` is where its
    rows begin among the ``total_q`` of all sequences, and ``first_part_row`` where those of its parts do.  The batch
    entry is its number; what follows the last sequence counts as one more, without parameters of its own.
    """

    first_row: Expr
    total_q: Expr
    first_part_row: Expr

    def site(self, b: Expr, h: Expr) -> Site:
        return super().site(T.min(b, self.batch - 1), h)

    def sink(self, b: Expr, h: Expr) -> Expr:
        none = T.float32(NEGATIVE_INFINITY)
        return T.Select(b < self.batch, super().sink(b, h), none) if self.pattern.has_sink else none

    def wants_lse(self) -> Expr:
        return self.lse_length >= self.heads * self.total_q

    def lse_row(self, b: Expr, h: Expr) -> Expr:
        return h * self.total_q + self.first_row

    def part_row(self, b: Expr, h: Expr, part: Expr | int, parts: Expr) -> Expr:
        return self.first_part_row + (h * parts + part) * self.seqlen_q
