"""The launch that turns new queries and keys, and puts new keys and values into a cache, on any GPU.

A block has one row of all heads, of keys and values or of queries, and a thread a chunk of 8 elements of a few heads:
16 bytes in, and 16 or 8 out.  Whether and how rows are turned, and which dtype the cache has, which is taken as bytes,
is known at run time.

Blocks run in any order, and of keys that come to one place that of the last row is to stand there.  So a block asks, of
the sequences from its own on, whether a later row has its place, and writes nothing then: as many threads share a
sequence as its new keys have pages, in the mean.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.cache import narrowed
from schedules.tile.delta import halves
from schedules.tile.geometry import RAGGED_LAYOUT, Tensor, flat, wide
from schedules.tile.sequences import Ragged, find_owner
from tvm_flash.packs.manifest import APPEND_ROLES, CACHE_FORMATS, HALVES, INTERLEAVED, UNTURNED

THREADS = 256
#: Blocks of a multiprocessor that registers are meant for; left to itself, the assembler took 92 of them, for two.
_BLOCKS_PER_SM = 4
#: Elements of a chunk, and words.
CHUNK, WORDS = 8, 4
#: Threads of a block for keys; the others are for values.
_OF_KEYS = THREADS // 2
#: The most columns of a row: a thread has one chunk of a head.
MOST_COLUMNS = _OF_KEYS * CHUNK
ALIGNMENT, INDEX_BITS = 16, 32


def _bits(buffer):
    """The memory of a tensor of 16-bit numbers as their bits."""
    return T.decl_buffer((T.int64(1 << 60),), "uint16", data=buffer.data, layout=None)


def _number(bits: Expr, dtype: str) -> Expr:
    """A 16-bit number of its bits, as float32."""
    return halves(T.Cast("uint32", bits), dtype)[0]


@T.meta_class
class Cache:
    """Keys or values on pages, bytes ``(pages, page_size, heads, bytes)`` of any strides; scales by page and head."""

    def __init__(self, handle, scale, name: str, sizes):
        pages, page_size, heads = sizes
        self.strides = tuple(tirx.Var(f"{name}_{axis}_stride", "int32") for axis in ("page", "row", "head"))
        width = tirx.Var(f"{name}_bytes", "int32")
        self.buffer = T.match_buffer(
            handle, (pages, page_size, heads, width), "uint8", strides=[*self.strides, 1], align=ALIGNMENT
        )
        self.of_scale = tuple(tirx.Var(f"{name}_scale_{axis}_stride", "int32") for axis in ("page", "head"))
        self.of_scales = T.match_buffer(scale, (pages, heads), "float32", strides=[*self.of_scale], align=4)

    def open(self) -> None:
        """Make flat views, within the launch."""
        self.bytes, self.scales = flat(self.buffer), flat(self.of_scales)

    def place(self, page: Expr, row: Expr, head: Expr) -> Expr:
        """Bytes before a row of a head, int64."""
        return sum(
            (wide(x) * wide(stride) for x, stride in zip((page, row, head), self.strides, strict=True)), T.int64(0)
        )

    def scale(self, page: Expr, head: Expr) -> Expr:
        """What an element of a page and head is divided by."""
        of_page, of_head = self.of_scale
        return self.scales[wide(page) * wide(of_page) + wide(head) * wide(of_head)]


@T.meta_class
class Call:
    """The arguments of the launch: handles of its ``tensors``, and its ``numbers``, in the order of their roles."""

    def __init__(self, dtype: str, tensors, numbers):
        self.dtype = dtype
        handles = dict(zip(APPEND_ROLES, tensors, strict=False))
        self.turns, self.along, self.format = numbers
        names = ("total_q", "heads", "width_q", "total_new", "kv_heads", "head_dim", "head_dim_v", "batch", "ends_q")
        sizes = {name: tirx.Var(name, "int32") for name in (*names, "ends_k", "positions", "turned_pairs", "columns")}
        self.total_q, self.heads, self.width_q = sizes["total_q"], sizes["heads"], sizes["width_q"]
        self.total_new, self.kv_heads = sizes["total_new"], sizes["kv_heads"]
        self.batch, self.positions, self.half, self.columns = (
            sizes[name] for name in ("batch", "positions", "turned_pairs", "columns")
        )
        self.pages, self.page_size = tirx.Var("pages", "int32"), tirx.Var("page_size", "int32")

        def rows(role, total, heads, dim):
            shape = {"heads": heads, "seq": total, "dim": dim}
            return Tensor(handles[role], role, shape, dtype, RAGGED_LAYOUT, ALIGNMENT)

        def numbers_of(role, count):
            return T.match_buffer(handles[role], (count,), "int32", align=4)

        self.q, self.o = (rows(role, self.total_q, self.heads, self.width_q) for role in "qo")
        self.k_new = rows("k_new", self.total_new, self.kv_heads, sizes["head_dim"])
        self.v_new = rows("v_new", self.total_new, self.kv_heads, sizes["head_dim_v"])
        place = (self.pages, self.page_size, self.kv_heads)
        self.k, self.v = (Cache(handles[role], handles[f"{role}_scale"], role, place) for role in "kv")
        self.queries = Ragged(numbers_of("cu_seqlens_q", sizes["ends_q"]), sizes["ends_q"] - 1, self.total_q)
        self.keys = Ragged(numbers_of("cu_seqlens_k", sizes["ends_k"]), self.batch, self.total_new)
        self.before, self.first = (numbers_of(role, self.batch) for role in ("cache_seqlens", "rotary_seqlens"))
        self.table_stride = tirx.Var("table_stride", "int32")
        self.entries = T.match_buffer(
            handles["page_table"], (self.batch, self.columns), "int32", strides=[self.table_stride, 1], align=4
        )
        self.of_angles = {}
        for role in ("rotary_cos", "rotary_sin"):
            strides = [tirx.Var(f"{role}_{axis}_stride", "int32") for axis in ("seq", "dim")]
            shape = (self.positions, self.half)
            self.of_angles[role] = T.match_buffer(handles[role], shape, dtype, strides=strides, align=2), strides

    def open(self) -> None:
        """Make flat views, within the launch."""
        self.k.open()
        self.v.open()
        self.table = flat(self.entries)
        self.angles = {role: (_bits(buffer), strides) for role, (buffer, strides) in self.of_angles.items()}

    def entry(self, sequence: Expr, column: Expr) -> Expr:
        """The page of a sequence's keys in a column of the table."""
        return self.table[wide(sequence) * wide(self.table_stride) + wide(column)]

    def angle(self, role: str, position: Expr, i: Expr) -> Expr:
        """A cosine or sine, float32."""
        buffer, (of_position, of_element) = self.angles[role]
        return _number(buffer[wide(position) * wide(of_position) + wide(i) * wide(of_element)], self.dtype)

    def lanes_of_a_sequence(self) -> Expr:
        """How many threads look at the pages of one sequence: a power of two."""
        columns = T.truncdiv(T.truncdiv(self.total_new, self.batch) + (self.page_size - 2), self.page_size) + 1
        found = T.int32(THREADS)
        for n in reversed([1 << x for x in range(THREADS.bit_length() - 1)]):
            found = T.Select(columns <= n, T.int32(n), found)
        return found


@T.meta_class
class Chunk:
    """The 8 elements of a row that a thread has: their column, and the cosines and sines that turn them.

    Of the two elements that are turned together each becomes ``own * cos + other * sin``, products and sum rounded to
    float32, with the sine's sign the other one for the first of the two.
    """

    def __init__(self, at: Call, column, pack: Callable):
        self.at, self.column, self.pack = at, column, pack
        self.own, self.other, self.made = (T.alloc_local([WORDS], "uint32") for _ in range(3))
        self.cos, self.sin = (T.alloc_local([CHUNK], "float32") for _ in range(2))
        self.sum, self.product = (T.alloc_local([2], "float32") for _ in range(2))

    @T.inline
    def load(self, tensor, head, row):
        """Bring the elements of a head and row."""
        memory = T.meta_var(flat(tensor.buffer))
        T.ptx["ld.global.v4.b32"](
            *[self.own[w] for w in range(WORDS)], memory.ptr_to([tensor.offset(0, head, row, self.column)])
        )

    def across(self, element: Expr) -> Expr:
        """The element that one is turned with, of those in halves."""
        half = self.at.half
        return element + T.Select(element < half, half, -half)

    @T.inline
    def load_other_half(self, tensor, head, row):
        """Bring those that they are turned with, where that isn't their neighbours."""
        at = T.meta_var(self.at)
        if T.And(at.turns == HALVES, self.column < 2 * at.half):
            if at.half % CHUNK == 0:
                memory = T.meta_var(flat(tensor.buffer))
                T.ptx["ld.global.v4.b32"](
                    *[self.other[w] for w in range(WORDS)],
                    memory.ptr_to([tensor.offset(0, head, row, self.across(self.column))]),
                )
            else:
                bits = T.meta_var(_bits(tensor.buffer))
                for x in T.unroll(CHUNK):
                    if self.column + x < 2 * at.half:
                        word: T.uint32 = T.Cast(
                            "uint32", bits[tensor.offset(0, head, row, self.across(self.column + x))]
                        )
                        if x % 2 == 0:
                            self.other[x // 2] = word
                        else:
                            self.other[x // 2] = T.bitwise_or(self.other[x // 2], T.shift_left(word, T.uint32(16)))

    @T.inline
    def look_up(self, position):
        """Bring the cosines and sines of a position, or of the nearest that there is one of."""
        at = T.meta_var(self.at)
        if at.turns != UNTURNED:
            place: T.int32 = T.max(T.min(position, at.positions - 1), 0)
            for x in T.unroll(CHUNK):
                self.cos[x] = T.float32(1)
                self.sin[x] = T.float32(0)
                element: T.int32 = self.column + x
                if element < 2 * at.half:
                    pair: T.int32 = T.Select(element < at.half, element, element - at.half)
                    if at.turns == INTERLEAVED:
                        pair = T.truncdiv(element, 2)
                    is_first: T.bool = T.Select(at.turns == INTERLEAVED, T.bool(x % 2 == 0), element < at.half)
                    self.cos[x] = at.angle("rotary_cos", place, pair)
                    self.sin[x] = at.angle("rotary_sin", place, pair)
                    sign: T.uint32 = T.Select(is_first, T.uint32(0x80000000), T.uint32(0))
                    self.sin[x] = T.reinterpret("float32", T.bitwise_xor(T.reinterpret("uint32", self.sin[x]), sign))

    @T.inline
    def turn(self):
        """Turn what was brought."""
        at = T.meta_var(self.at)
        if at.turns != UNTURNED:
            for w in T.unroll(WORDS):
                own = T.meta_var(halves(self.own[w], at.dtype))
                other = T.meta_var(halves(self.other[w], at.dtype))
                for e in T.unroll(2):
                    mine = T.meta_var(T.Select(e == 0, own[0], own[1]))
                    beside = T.meta_var(T.Select(e == 0, own[1], own[0]))
                    across = T.meta_var(T.Select(e == 0, other[0], other[1]))
                    theirs: T.float32 = T.Select(at.turns == INTERLEAVED, beside, across)
                    T.ptx["mul.rn.f32"](self.product[0], mine, self.cos[2 * w + e])
                    T.ptx["mul.rn.f32"](self.product[1], theirs, self.sin[2 * w + e])
                    T.ptx["add.rn.f32"](self.sum[e], self.product[0], self.product[1])
                self.pack(self.made, w, self.sum[0], self.sum[1])
                if self.column + 2 * w < 2 * at.half:
                    self.own[w] = self.made[w]

    @T.inline
    def narrow(self, scale):
        """Divide by a scale, and make bytes of the elements, in ``made``."""
        at = T.meta_var(self.at)
        for w in T.unroll(WORDS):
            elements = T.meta_var(halves(self.own[w], at.dtype))
            self.sum[0] = elements[0]
            self.sum[1] = elements[1]
            for e in T.unroll(2):
                T.ptx["div.rn.f32"](self.product[e], self.sum[e], scale)
                byte: T.uint32 = T.uint32(0)
                if at.format == CACHE_FORMATS["int8"]:
                    byte = narrowed(self.product[e], "int8")
                else:
                    byte = narrowed(self.product[e], "float8_e4m3fn")
                place = T.meta_var((2 * w + e) % 4)
                if place == 0:
                    self.made[w // 2] = byte
                else:
                    self.made[w // 2] = T.bitwise_or(self.made[w // 2], T.shift_left(byte, T.uint32(8 * place)))


@T.inline
def _store(at: Call, cache: Cache, chunk: Chunk, page, row, head):
    """Write elements to their place in a cache."""
    offset: T.int64 = cache.place(page, row, head)
    if at.format == 0:
        T.ptx["st.global.v4.b32"](
            cache.bytes.ptr_to([offset + wide(chunk.column) * 2]), *[chunk.own[w] for w in range(WORDS)]
        )
    else:
        T.ptx["st.global.v2.b32"](cache.bytes.ptr_to([offset + wide(chunk.column)]), chunk.made[0], chunk.made[1])


@T.inline
def _append_row(at: Call, row, thread, lanes, pack):
    """One row of new keys and values, by a block."""
    of_values: T.int32 = T.truncdiv(thread, _OF_KEYS)
    width: T.int32 = T.Select(of_values == 0, at.k_new.sizes["dim"], at.v_new.sizes["dim"])
    chunks: T.int32 = T.truncdiv(width, CHUNK)
    number: T.int32 = T.truncmod(thread, _OF_KEYS)
    step: T.int32 = T.truncdiv(T.int32(_OF_KEYS), chunks)
    first: T.int32 = T.truncdiv(number, chunks)
    column: T.int32 = T.truncmod(number, chunks) * CHUNK
    end: T.int32 = T.Select(first < step, at.kv_heads, 0)
    chunk = Chunk(at, column, pack)
    # 1. The first elements, which follow from sizes alone.
    if first < end:
        if of_values == 0:
            chunk.load(at.k_new, first, row)
        else:
            chunk.load(at.v_new, first, row)
    # 2. Where the row belongs.
    sequence: T.int32 = 0
    find_owner(at.keys, row, T.truncmod(thread, 32), sequence)
    exists: T.bool = sequence < at.batch
    sequence = T.min(sequence, at.batch - 1)
    inside: T.int32 = row - at.keys.begin(sequence)
    position: T.int32 = at.before[sequence] + inside
    turned_by: T.int32 = at.first[sequence] + inside
    place: T.int32 = T.truncdiv(T.max(position, 0), at.page_size)
    at_row: T.int32 = T.max(position, 0) - place * at.page_size
    page: T.int32 = at.entry(sequence, T.min(place, at.columns - 1))
    exists = T.And(T.And(exists, position >= 0), T.And(place < at.columns, T.And(page >= 0, page < at.pages)))
    if of_values == 0:
        chunk.look_up(turned_by)
    # 3. Whether a later row comes to the same place.
    replaced: T.int32 = 0
    if T.And(exists, row < at.total_new - 1):
        other: T.int32 = sequence + T.truncdiv(thread, lanes)
        while other < at.batch:
            before: T.int32 = at.before[other]
            after: T.int32 = before + (at.keys.end(other) - at.keys.begin(other))
            theirs: T.int32 = T.Select(other == sequence, place + 1, T.truncdiv(T.max(before, 0), at.page_size))
            theirs = theirs + T.truncmod(thread, lanes)
            while T.And(theirs < at.columns, theirs * at.page_size < after):
                there: T.int32 = theirs * at.page_size + at_row
                if T.And(at.entry(other, theirs) == page, T.And(there >= before, there < after)):
                    replaced = 1
                theirs = theirs + lanes
            other = other + T.truncdiv(T.int32(THREADS), lanes)
    replaced = T.cuda.syncthreads_or(replaced)
    # 4. Turn and write.
    if T.And(exists, replaced == 0):
        head: T.int32 = first
        while head < end:
            if of_values == 0:
                chunk.load_other_half(at.k_new, head, row)
                chunk.turn()
            if at.format != 0:
                scale: T.float32 = T.float32(0)
                if of_values == 0:  # noqa: SIM108, one of them is loaded
                    scale = at.k.scale(page, head)
                else:
                    scale = at.v.scale(page, head)
                chunk.narrow(scale)
            if of_values == 0:
                _store(at, at.k, chunk, page, at_row, head)
            else:
                _store(at, at.v, chunk, page, at_row, head)
            head = head + step
            if head < end:
                if of_values == 0:
                    chunk.load(at.k_new, head, row)
                else:
                    chunk.load(at.v_new, head, row)


@T.inline
def _turn_row(at: Call, row, thread, pack):
    """One row of queries, by a block; one after the last sequence stays as it is."""
    chunks: T.int32 = T.truncdiv(at.width_q, CHUNK)
    step: T.int32 = T.truncdiv(T.int32(THREADS), chunks)
    first: T.int32 = T.truncdiv(thread, chunks)
    column: T.int32 = T.truncmod(thread, chunks) * CHUNK
    end: T.int32 = T.Select(first < step, at.heads, 0)
    chunk = Chunk(at, column, pack)
    results = T.meta_var(flat(at.o.buffer))
    if first < end:
        chunk.load(at.q, first, row)
    sequence: T.int32 = 0
    find_owner(at.queries, row, T.truncmod(thread, 32), sequence)
    exists: T.bool = sequence < at.batch
    sequence = T.min(sequence, at.batch - 1)
    chunk.look_up(at.first[sequence] + T.Select(at.along == 0, 0, row - at.queries.begin(sequence)))
    head: T.int32 = first
    while head < end:
        if exists:
            chunk.load_other_half(at.q, head, row)
            chunk.turn()
        T.ptx["st.global.v4.b32"](
            results.ptr_to([at.o.offset(0, head, row, column)]), *[chunk.own[w] for w in range(WORDS)]
        )
        head = head + step
        if head < end:
            chunk.load(at.q, head, row)


def append(dtype: str, name: str, pack: Callable) -> PrimFunc:
    """The kernel, of the roles :data:`tvm_flash.packs.manifest.APPEND_ROLES`.

    ``pack(to, i, low, high)`` writes what rounds two float32 to a register with two 16-bit numbers.
    """

    @T.prim_func(check_well_formed=False)
    def kernel(
        q: T.handle,
        o: T.handle,
        k_new: T.handle,
        v_new: T.handle,
        k: T.handle,
        v: T.handle,
        cu_seqlens_q: T.handle,
        cu_seqlens_k: T.handle,
        cache_seqlens: T.handle,
        rotary_seqlens: T.handle,
        page_table: T.handle,
        rotary_cos: T.handle,
        rotary_sin: T.handle,
        k_scale: T.handle,
        v_scale: T.handle,
        turns: T.int32,
        along: T.int32,
        cache_format: T.int32,
    ):
        tensors = T.meta_var(
            (
                *(q, o, k_new, v_new, k, v, cu_seqlens_q, cu_seqlens_k, cache_seqlens, rotary_seqlens, page_table),
                *(rotary_cos, rotary_sin, k_scale, v_scale),
            )
        )
        at = Call(dtype, tensors, (turns, along, cache_format))
        lanes = T.bind(at.lanes_of_a_sequence())
        blocks = T.bind(at.total_new + T.Select(turns == UNTURNED, T.int32(0), at.total_q))
        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": _BLOCKS_PER_SM})
        at.open()
        block = T.cta_id([blocks])
        thread = T.thread_id([THREADS])
        if block < at.total_new:
            _append_row(at, block, thread, lanes, pack)
        else:
            _turn_row(at, block - at.total_new, thread, pack)

    return kernel.with_attr("global_symbol", name)
