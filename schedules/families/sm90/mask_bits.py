"""A boolean mask in boxes, of which a lane keeps a bit for each of its scores.

An instruction (ldmatrix) takes 16 bytes of each of eight rows, four times, and gives a lane four neighbouring bytes of
a row each time.  Their lowest bits go to a word, those of other rows and keys one place further on, and lanes that
share a row exchange such words: 32 scores take two loads and a register, where a word a pair takes 16 of both.  So
there are registers for four consumer warpgroups, as without a mask.

Where there are no boxes a warp copies its rows to their place itself.
"""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.families.mma.registers import fresh
from schedules.families.sm90.tensor_boxes import BoxedTile
from schedules.tile.element_pairs import Fetched
from schedules.tile.exchange import operand_bytes
from schedules.tile.geometry import local

_LOAD = "ldmatrix.sync.aligned.m8n8.x4.shared.b16"
_LANES, _WARP_ROWS = 32, 16
#: Bytes of a row that a matrix has, a chunk.
_CHUNK = 16
#: Chunks whose bits share a word: of two rows, in each byte.
_CHUNKS = 4
_LOWEST = 0x01010101
_ALL_LANES = 0xFFFFFFFF
#: Rows that are copied at a time.
_ROWS = 4


def _through_shuffle(x):
    return T.cuda.__shfl_xor_sync(T.uint32(_ALL_LANES), x, 0, 32)


@T.meta_class
class MaskBits(BoxedTile):
    """The bits of a warpgroup's tile.

    That of register ``(g, r, e)`` is in word ``g // 8``, there in byte ``2 (g % 2) + e``, at ``2 (g // 2 % 4) + r``.
    """

    def __init__(self, boxes, index, warp, *arguments):
        BoxedTile.__init__(self, boxes, index, warp, *arguments)
        self.columns = self.groups * self.fragment.group
        self.chunks = self.columns // _CHUNK
        self.bits = T.alloc_local([-(-self.chunks // _CHUNKS)], "uint32")
        self.passes = -(-self.columns // _LANES)

    @T.inline
    def take(self, state, rows, column0, last):
        """Take the bits of a step's tile; ``rows`` and what follows as in ``fetch``."""
        place = T.meta_var(self.boxes.place(state, self.index))
        if self.boxes.usable != 0:
            self.boxes.full.wait(place, state.phase)
        else:
            self.copy(place, rows, last)
        self.load(place)

    @T.inline
    def copy(self, place, rows, last):
        """Copy a warp's rows to where boxes would be, few elements at a time, and by addresses from a lane number that
        has been through a shuffle, which are in no register before."""
        here: T.int32 = _through_shuffle(self.lane)
        row0: T.int32 = rows[0] - self.fragment.row(self.lane)
        column0: T.int32 = last - (self.columns - 1)
        seen = T.alloc_local([_ROWS * self.passes], "uint8")
        T.cuda.warp_sync()
        for n in T.serial(_WARP_ROWS // _ROWS):
            for r in T.unroll(_ROWS):
                for c in T.unroll(self.passes):
                    at = T.meta_var(self.elements.offset(row0 + (n * _ROWS + r), column0 + (c * _LANES + here)))
                    seen[r * self.passes + c] = T.Cast("uint8", self.elements.memory[at])
            for r in T.unroll(_ROWS):
                for c in T.unroll(self.passes):
                    column: T.int32 = c * _LANES + here
                    if column < self.columns:
                        x: T.int32 = T.truncdiv(column, self.boxes.width)
                        row: T.int32 = self.warp * _WARP_ROWS + (n * _ROWS + r)
                        self.boxes.tiles[place, x, row, column - x * self.boxes.width] = seen[r * self.passes + c]
        T.cuda.warp_sync()

    def load(self, place) -> None:
        """Take the bits of a tile from its boxes."""
        width = self.boxes.width
        thread = local(fresh("tid.x")) + 0  # read anew, so that no register has the address meanwhile
        row = T.bitwise_or(T.bitwise_and(T.shift_right(thread, 1), 48), T.bitwise_and(thread, 15))
        row = T.Select(T.Or(self.boxes.rows > 1, self.boxes.usable == 0), row, 0)  # a copy has every row
        half = T.bitwise_and(T.shift_right(thread, 4), 1)
        pairs = self._pairs(width // _CHUNK)
        found = T.alloc_local([4 * len(pairs)], "uint32")
        for n, (first, second) in enumerate(pairs):
            x, column = divmod(first * _CHUNK, width)
            y, other = divmod(second * _CHUNK, width)
            at = [place, x + half * (y - x), row, column + half * (other - column)]
            T.evaluate(T.ptx[_LOAD](*[found[4 * n + m] for m in range(4)], self.boxes.tiles.ptr_to(at)))
        parts: list = [[] for _ in range(-(-self.chunks // _CHUNKS))]
        for (chunk, r), m in sorted(
            {(p[m // 2], m % 2): 4 * n + m for n, p in enumerate(pairs) for m in range(4)}.items()
        ):
            bits = T.bitwise_and(found[m], T.uint32(_LOWEST))
            parts[chunk // _CHUNKS].append(T.shift_left(bits, T.uint32(2 * (chunk % _CHUNKS) + r)))
        for word, (whole, *others) in enumerate(parts):
            for part in others:
                whole = T.bitwise_or(whole, part)
            T.buffer_store(self.bits, operand_bytes(whole, self.lane), [word])

    def _pairs(self, of_box: int) -> list[tuple[int, int]]:
        """The two chunks that each instruction takes: neighbours, or those at the same place of two boxes."""
        if self.boxes.boxes == 1:
            last = max(self.chunks - 2, 0)
            return [(min(q, last), min(q, last) + 1) for q in range(0, self.chunks, 2)]
        return [(x * of_box + q, (x + 1) * of_box + q) for x in range(0, self.boxes.boxes, 2) for q in range(of_box)]

    def forget_tests(self) -> None:
        """Have the compiler test bits anew: it would keep what tests have said, in bits of other registers."""
        for word in range(-(-self.chunks // _CHUNKS)):
            T.buffer_store(self.bits, _through_shuffle(self.bits[word]), [word])

    def value(self, g, r, e) -> Fetched:
        g, r, e = (T.Cast("int32", x) for x in (g, r, e))
        place = (T.truncmod(g, 2) * 2 + e) * 8 + T.truncmod(T.truncdiv(g, 2), _CHUNKS) * 2 + r
        bit = T.shift_left(T.uint32(1), T.Cast("uint32", place))
        return Fetched(T.bitwise_and(self.bits[T.truncdiv(g, 2 * _CHUNKS)], bit) != T.uint32(0))
