"""The launch that combines partial results of disjoint ranges of keys, on any GPU.

The definition is linear in ``exp(lse)``: with outputs ``o_s`` and log-sum-exps ``l_s`` of the splits, the whole has
``lse = log(sum exp(l_s))`` and ``o = sum exp(l_s - lse) o_s``.  Splits are summed in an order that depends on nothing
but their number, so a row has the same bits whatever else a launch computes.

A *group* is as many threads as a row has columns, four a thread.  As many groups as splits give work to share a row,
each with every n-th split and ``AHEAD`` of them in flight, and are then summed one after the other; a block has as many
rows as that leaves groups for.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.parameters import Site, append_arguments, parameter_symbols
from schedules.definition.pattern import Pattern
from schedules.tile.dtypes import element_type
from schedules.tile.functions import accurate
from schedules.tile.geometry import RAGGED_LAYOUT, Tensor, flat, wide
from schedules.tile.parameters import OfHead
from schedules.tile.partial import PartialResults
from schedules.tile.score import LN_2, LOG2_E, NEGATIVE_INFINITY
from schedules.tile.sequences import Ragged, find_owner
from schedules.tile.softmax import LOWEST, from_lane
from schedules.tile.static import static
from schedules.tile.tile_scheduler import Traversal, ceildiv

THREADS = 256
#: Splits that a thread reads before it adds them.
AHEAD = 4
#: Columns of a thread: 16 bytes of float32.
COLUMNS = 4
#: Blocks of a multiprocessor that registers are meant for: left to itself, the assembler for sm_86 and sm_89 went for
#: six, with 40 registers, and spilled 8 bytes.
BLOCKS_PER_SM = 4


#: Blocks for each multiprocessor where a block has several heads.
BLOCKS = 8

#: Groups that share a row of a ragged sequence at most.
SHARING = 4


def weight_of(lse: Expr, peak: Expr) -> Expr:
    """What a part with such a log-sum-exp counts, relative to the highest one."""
    return T.exp2((lse - peak) * T.float32(LOG2_E))


def weighted(weight: Expr, value: Expr) -> Expr:
    """A part's share of an output; what a split that sees nothing has left there may be anything."""
    return T.Select(weight == T.float32(0), T.float32(0), weight * value)


def inverse_of(total: Expr) -> Expr:
    """1 / the sum of weights; 0 of a row that saw nothing."""
    return T.Select(total == T.float32(0), T.float32(0), T.float32(1) / total)


def log_sum_exp(peak: Expr, total: Expr) -> Expr:
    """That of all parts, of the highest one and the sum of their weights."""
    return peak + T.log2(total) * T.float32(LN_2)


def sink_of(pattern: Pattern, symbols, b: Expr, h: Expr) -> Expr:
    """The logit without a key of a batch entry and head, of parameters by name."""
    params = (p for p in pattern.params if pattern.is_of_sink(p))
    values = {p.name: OfHead(symbols[p.name], p.axes).value(b, h) if p.axes else symbols[p.name] for p in params}
    return accurate(pattern.sink(Site(b, h, *[T.int32(0)] * 5, T.float32(1), values)))


@T.inline
def store_columns(o: Tensor, head_dim_v, place, values, factor):
    """Write ``factor`` times four values of a row at batch, head, position and column of o."""
    packed = T.alloc_local([2], "uint32")
    pack = T.meta_var(element_type(str(o.buffer.dtype)).pack)
    for x in T.unroll(2):
        T.ptx[pack](packed[x], values[2 * x + 1] * factor, values[2 * x] * factor)
    to = T.meta_var(flat(o.buffer))
    if place[3] < head_dim_v:
        T.ptx["st.global.v2.b32"](to.ptr_to([o.offset(*place)]), packed[0], packed[1])


@T.meta_class
class Sinks:
    """Sinks, where the pattern has them: of each row a part more, without keys and with the output 0.

    ``arguments`` are the further ones of the launch, of the ``roles``.
    """

    def __init__(self, pattern: Pattern):
        self.pattern = pattern
        params = tuple(p for p in pattern.params if pattern.is_of_sink(p))
        self.roles = tuple(p.name for p in params)
        self.arguments, self.symbols = parameter_symbols(params, pattern.index_dtype)

    def of(self, b: Expr, h: Expr) -> Expr:
        """The logit of a batch entry and head."""
        return sink_of(self.pattern, self.symbols, b, h)


@T.meta_class
class Partials:
    """The arguments of the launch: the splits' ``partial`` results, tensor ``o``, flat ``lse``, and sizes."""

    #: Whether a block has several heads of a position, one after the other.
    in_turn = False

    def __init__(self, pattern: Pattern, traversal: Traversal, handles, alignment: int):
        o_partial, lse_partial, *results = handles
        self._tensors(pattern, traversal, results, alignment)
        self.partial = PartialResults((o_partial, lse_partial), pattern.head_dim_v)
        self.rows, self.splits = self.partial.rows, self.partial.splits

    def _tensors(self, pattern: Pattern, traversal: Traversal, results, alignment: int):
        """What is written, and its sizes."""
        o, lse = results
        names = ("batch", "heads", "seqlen_q", "head_dim_v", "lse_length")
        batch, self.heads, self.seqlen_q, self.head_dim_v, self.lse_length = (tirx.Var(n, "int32") for n in names)
        sizes = {"batch": batch, "heads": self.heads, "seq": self.seqlen_q, "dim": self.head_dim_v}
        self.o = Tensor(o, "o", sizes, pattern.dtype, traversal.layout, alignment)
        self.lse = T.match_buffer(lse, (self.lse_length,), "float32", align=4)

    def sharing(self, groups: int):
        """How many of a block's groups share a row: the fewest, a power of two, that have no more than ``AHEAD``
        splits."""
        found = T.int32(groups)
        for n in reversed([1 << x for x in range(groups.bit_length() - 1)]):
            found = T.Select(self.splits <= n * AHEAD, T.int32(n), found)
        return found

    def blocks(self, rows_of_block):
        """Blocks that have so many rows each."""
        return ceildiv(self.rows, rows_of_block)

    def row_of(self, block, rows_of_block, place):
        """The row in a place of a block."""
        return block * rows_of_block + place

    def has_row(self, row, splits):
        """Whether there is a row, which has so many splits, to write."""
        return row < self.rows

    def splits_of(self, row):
        """How many splits a row has, before anything is looked up."""
        return T.Select(row < self.rows, self.splits, 0)

    @T.inline
    def look_up(self, row, lane, splits):
        """A whole warp: set ``splits`` to how many a row has; here all have the same number."""

    @T.inline
    def look_up_sink(self, sinks: Sinks, row, lane, sink):
        """A whole warp: set ``sink`` to the logit that a row has beside those of its splits."""
        head_row: T.int32 = T.truncdiv(row, self.seqlen_q)
        if row < self.rows:
            sink = sinks.of(T.truncdiv(head_row, self.heads), T.truncmod(head_row, self.heads))  # noqa: F841

    @T.inline
    def write(self, row, column, lane, values, factor, lse):
        """Write ``factor`` times four values of a row's output, and by one lane its log-sum-exp."""
        position: T.int32 = T.truncmod(row, self.seqlen_q)
        head_row: T.int32 = T.truncdiv(row, self.seqlen_q)
        head: T.int32 = T.truncmod(head_row, self.heads)
        b: T.int32 = T.truncdiv(head_row, self.heads)
        self.store(row, (b, head, position, column), lane, values, factor, lse)

    @T.inline
    def store(self, row, place, lane, values, factor, lse):
        """The same at batch, head, position and column of o."""
        store_columns(self.o, self.head_dim_v, place, values, factor)
        if T.And(lane == 0, wide(self.lse_length) >= wide(self.rows)):
            self.lse[row] = lse


@T.meta_class
class RaggedPartials(Partials):
    """The same of ragged sequences, each with splits of its own; rows are in the order (heads, positions).

    How the splits of a row are summed depends on nothing but their number: the same groups share it in any batch.
    """

    def __init__(self, pattern: Pattern, handles, sequences, split_count, alignment: int):
        o_partial, lse_partial, *results = handles
        self._sequences(pattern, results, sequences, split_count, alignment)
        self.partial = PartialResults((o_partial, lse_partial), pattern.head_dim_v)
        self.rows, self.splits = self.partial.rows, self.partial.splits

    def _sequences(self, pattern: Pattern, results, sequences, split_count, alignment: int):
        """What is written, and where the sequences are."""
        o, lse = results
        of_queries, of_keys = sequences
        names = ("batch", "starts", "heads", "total_q", "head_dim_v", "lse_length")
        batch, ends, heads, self.total_q, self.head_dim_v, self.lse_length = (tirx.Var(n, "int32") for n in names)
        sizes = {"heads": heads, "seq": self.total_q, "dim": self.head_dim_v}
        self.o = Tensor(o, "o", sizes, pattern.dtype, RAGGED_LAYOUT, alignment)
        self.lse = T.match_buffer(lse, (self.lse_length,), "float32", align=4)
        self.queries = Ragged(T.match_buffer(of_queries, (ends,), "int32", align=4), batch, self.total_q)
        self.lengths = T.match_buffer(of_keys, (batch,), "int32", align=4)
        self.split_count = split_count

    def sharing(self, groups: int):
        return T.int32(min(groups, SHARING))

    def splits_of(self, row):
        return T.int32(0)

    @T.inline
    def look_up(self, row, lane, splits):
        owner: T.int32 = 0
        find_owner(self.queries, T.truncmod(row, self.total_q), lane, owner)
        if T.And(row < self.rows, owner < self.queries.batch):
            splits = T.min(self.split_count(self.lengths[owner]), self.splits)  # noqa: F841, the caller's

    @T.inline
    def look_up_sink(self, sinks: Sinks, row, lane, sink):
        owner: T.int32 = 0
        find_owner(self.queries, T.truncmod(row, self.total_q), lane, owner)
        if T.And(row < self.rows, owner < self.queries.batch):
            sink = sinks.of(owner, T.truncdiv(row, self.total_q))  # noqa: F841, the caller's

    @T.inline
    def write(self, row, column, lane, values, factor, lse):
        self.store(
            row, (0, T.truncdiv(row, self.total_q), T.truncmod(row, self.total_q), column), lane, values, factor, lse
        )


@dataclass(frozen=True)
class Shape:
    """How the launch is shaped: ``threads`` of a block, and splits that a thread has on the way (``ahead``)."""

    threads: int = THREADS
    ahead: int = AHEAD


#: For many splits of few rows, whose sums wait for memory again and again: 256 splits of 32 rows take an H200 4.5 us,
#: and 7 otherwise.
LONG = Shape(threads=128, ahead=16)


@T.inline
def _share_peak(span, peak):
    """``peak`` becomes the largest of ``span`` lanes."""
    for step in T.unroll(span.bit_length() - 1):
        peak = T.max(peak, from_lane(peak, 1 << step))


@T.inline
def _largest(lse, first, splits, lane, span, value, peak):
    """``peak`` becomes the largest log-sum-exp of a row's splits, ``lse[first ...]``, in each of ``span`` lanes.

    Loads are instructions that the compiler can't move in front of the wait for the launch that writes.
    """
    for i in T.serial(T.truncdiv(splits + (span - 1), span)):
        split: T.int32 = i * span + lane
        if split < splits:
            T.ptx["ld.global.f32"](value[0], lse.ptr_to([first + wide(split)]))
            peak = T.max(peak, value[0])
    _share_peak(span, peak)


@T.inline
def _largest_ahead(lse, first, splits, lane, span, value, ahead, peak):
    """The same with ``ahead`` loads on the way at a time."""
    for i in T.serial(ceildiv(splits, span * ahead)):
        for a in T.unroll(ahead):
            split: T.int32 = (i * ahead + a) * span + lane
            value[a] = T.float32(LOWEST)
            if split < splits:
                T.ptx["ld.global.f32"](value[a], lse.ptr_to([first + wide(split)]))
        for a in T.unroll(ahead):
            peak = T.max(peak, value[a])
    _share_peak(span, peak)


def combine(pattern: Pattern, traversal: Traversal, name: str, alignment: int, waits: bool) -> PrimFunc:
    """``(o_partial, lse_partial, o, lse, *sinks)``: partial results (:mod:`schedules.tile.partial`) to o and lse.

    ``sinks`` are the parameters of the pattern's sink, if it has one (:class:`Sinks`).

    Parameters
    ----------
    waits: whether the launch before lets this one begin early, so that it has to wait for what that writes.
    """

    sinks = Sinks(pattern)

    @T.prim_func(check_well_formed=False)
    def kernel(o_partial: T.handle, lse_partial: T.handle, o: T.handle, lse: T.handle):
        _combine(
            pattern, Partials(pattern, traversal, (o_partial, lse_partial, o, lse), alignment), waits, sinks, Shape()
        )

    return append_arguments(kernel.with_attr("global_symbol", name), sinks.arguments)


@T.meta_class
class FurtherPartials(RaggedPartials):
    """The same where rows with a single split are none of the launch's: the one before has written them.

    A block looks up how many splits a position has for several heads, as many as leave ``BLOCKS`` for each
    multiprocessor.  Of 128 heads of 128 sequences with one split each, a block for each row found nothing to do and
    took 29 us for that, of 275 with the launch before; where all rows have splits, heads in turn cost up to 4% (H200).
    """

    in_turn = True

    def __init__(self, *args):
        RaggedPartials.__init__(self, *args)
        self.heads = self.o.sizes["heads"]
        few = T.call_extern("int32", "multiprocessors") * BLOCKS
        self.each = T.bind(T.max(T.min(T.truncdiv(self.rows, few), self.heads), 1))

    def blocks(self, rows_of_block):
        return ceildiv(self.total_q, rows_of_block) * ceildiv(self.heads, self.each)

    def _first_head(self, block, rows_of_block):
        return T.truncdiv(block, ceildiv(self.total_q, rows_of_block)) * self.each

    def row_of(self, block, rows_of_block, place):
        position = T.truncmod(block, ceildiv(self.total_q, rows_of_block)) * rows_of_block + place
        row = self._first_head(block, rows_of_block) * self.total_q + position
        return T.Select(position < self.total_q, row, self.rows)

    def heads_of_block(self, block, rows_of_block):
        """How many heads a block has."""
        return T.min(self.each, self.heads - self._first_head(block, rows_of_block))

    @T.inline
    def look_up(self, row, lane, splits):
        RaggedPartials.look_up(self, row, lane, splits)
        splits = T.Select(splits == 1, -1, splits)

    def has_row(self, row, splits):
        return T.And(row < self.rows, splits >= 0)


def combine_ragged(
    pattern: Pattern,
    split_count,
    name: str,
    alignment: int,
    waits: bool,
    partials: type = RaggedPartials,
    shape: Shape = Shape(),
) -> PrimFunc:
    """``(o_partial, lse_partial, o, lse, cu_seqlens_q, seqlens_k, *sinks)``: the same of ragged sequences.

    Parameters
    ----------
    split_count: ``split_count(keys)``, how many splits a sequence of so many keys has.
    partials: the class of the arguments, :class:`RaggedPartials` or :class:`FurtherPartials`.
    """
    sinks = Sinks(pattern)

    @T.prim_func(check_well_formed=False)
    def kernel(
        o_partial: T.handle,
        lse_partial: T.handle,
        o: T.handle,
        lse: T.handle,
        cu_seqlens_q: T.handle,
        seqlens_k: T.handle,
    ):
        handles = T.meta_var(((o_partial, lse_partial, o, lse), (cu_seqlens_q, seqlens_k)))
        _combine(pattern, partials(pattern, *handles, split_count, alignment), waits, sinks, shape)

    return append_arguments(kernel.with_attr("global_symbol", name), sinks.arguments)


@T.inline
def _combine_row(
    pattern: Pattern, at, sinks: Sinks, shape: Shape, groups, memory, of_thread, sharing, row, first, splits
):
    """Combine a row's splits, whose first one is number ``first`` of all."""
    ahead, columns = T.meta_var((shape.ahead, pattern.head_dim_v))
    parts, logs, acc_shared, sum_shared, acc, words, weight = T.meta_var(memory)
    thread, lanes, group, lane, column, member = T.meta_var(of_thread)
    # 2. The largest log-sum-exp; finite, so that −inf minus it is −inf.
    peak: T.float32 = T.float32(LOWEST)
    if pattern.has_sink:
        sink: T.float32 = T.float32(NEGATIVE_INFINITY)
        at.look_up_sink(sinks, row, T.truncmod(thread, 32), sink)
        peak = T.max(peak, sink)
    span = T.meta_var(min(lanes, 32))
    if ahead == AHEAD:
        _largest(logs, first, splits, T.truncmod(thread, span), span, weight, peak)
    else:
        _largest_ahead(logs, first, splits, T.truncmod(thread, span), span, weight, ahead, peak)
    # 3. Each group sums its splits, weighted.
    total: T.float32 = T.float32(0)
    for x in T.unroll(COLUMNS):
        acc[x] = T.float32(0)
    for i in T.serial(T.truncdiv(splits - member + (sharing * ahead - 1), sharing * ahead)):
        for a in T.unroll(ahead):
            split: T.int32 = member + (i * ahead + a) * sharing
            weight[a] = T.float32(0)
            for x in T.unroll(COLUMNS):
                words[a * COLUMNS + x] = T.uint32(0)
            if T.And(split < splits, column < columns):
                T.ptx["ld.global.f32"](weight[a], logs.ptr_to([first + wide(split)]))
                weight[a] = weight_of(weight[a], peak)
                T.ptx["ld.global.v4.b32"](
                    *[words[a * COLUMNS + x] for x in range(COLUMNS)],
                    parts.ptr_to([(first + wide(split)) * columns + wide(column)]),
                )
        for a in T.unroll(ahead):
            total = total + weight[a]
            for x in T.unroll(COLUMNS):
                value = T.meta_var(T.reinterpret("float32", words[a * COLUMNS + x]))
                acc[x] = acc[x] + weighted(weight[a], value)
    for x in T.unroll(COLUMNS):
        acc_shared[thread * COLUMNS + x] = acc[x]
    if lane == 0:
        sum_shared[group] = total
    T.cuda.cta_sync()
    # 4. The first group of a row sums those that share it, and writes the row.
    if T.And(member == 0, at.has_row(row, splits)):
        for x in T.unroll(COLUMNS):
            acc[x] = T.float32(0)
        total = T.float32(0)
        for g in T.unroll(groups):
            if g < sharing:
                total = total + sum_shared[group + g]
                for x in T.unroll(COLUMNS):
                    acc[x] = acc[x] + acc_shared[(thread + g * lanes) * COLUMNS + x]
        if pattern.has_sink:
            total = total + weight_of(sink, peak)
        inverse: T.float32 = inverse_of(total)
        at.write(row, column, lane, acc, inverse, log_sum_exp(peak, total))


@T.inline
def _combine(pattern: Pattern, at, waits, sinks: Sinks, shape: Shape):
    """The kernel's text."""
    ahead = T.meta_var(shape.ahead)
    columns = T.meta_var(pattern.head_dim_v)
    lanes = T.meta_var(1 << (-(-columns // COLUMNS) - 1).bit_length())  # of a group, a power of two
    groups = T.meta_var(shape.threads // lanes)
    # 1. Which row of the block a thread's group belongs to.
    sharing = T.bind(at.sharing(groups))
    rows_of_block = T.bind(T.truncdiv(T.int32(groups), sharing))
    T.device_entry()
    T.attr({"tirx.launch_bounds_min_blocks_per_sm": BLOCKS_PER_SM})
    parts = T.meta_var(flat(at.partial.o))
    logs = T.meta_var(flat(at.partial.lse))
    block = T.cta_id([at.blocks(rows_of_block)])
    thread = T.thread_id([shape.threads])
    acc_shared = T.alloc_shared([groups * lanes * COLUMNS], "float32")
    sum_shared = T.alloc_shared([groups], "float32")
    acc = T.alloc_local([COLUMNS], "float32")
    words = T.alloc_local([ahead * COLUMNS], "uint32")
    weight = T.alloc_local([ahead], "float32")
    group: T.int32 = T.truncdiv(thread, lanes)
    lane: T.int32 = T.truncmod(thread, lanes)
    column: T.int32 = lane * COLUMNS
    place: T.int32 = T.truncdiv(group, sharing)
    member: T.int32 = group - place * sharing
    row: T.int32 = at.row_of(block, rows_of_block, place)
    splits: T.int32 = at.splits_of(row)
    at.look_up(row, T.truncmod(thread, 32), splits)
    first: T.int64 = wide(row) * wide(at.splits)
    if waits:
        T.ptx.griddepcontrol.wait()
    memory = T.meta_var((parts, logs, acc_shared, sum_shared, acc, words, weight))
    of_thread = T.meta_var((thread, lanes, group, lane, column, member))
    if static(at.in_turn):
        if T.Or(splits >= 0, rows_of_block > 1):
            for h in T.serial(at.heads_of_block(block, rows_of_block)):
                here: T.int32 = row + h * at.total_q
                at_first: T.int64 = wide(here) * wide(at.splits)
                _combine_row(pattern, at, sinks, shape, groups, memory, of_thread, sharing, here, at_first, splits)
                T.cuda.cta_sync()
    else:
        _combine_row(pattern, at, sinks, shape, groups, memory, of_thread, sharing, row, first, splits)
