"""The row tiles of ragged sequences from the longest to the shortest, found on the device by one warp.

A tile's *level* says how many keys it sees, in units of a tile's rows: where later rows see more, each tile of a
sequence is a level above the one before; where all see the same, all tiles of a sequence are at one level.  Levels are
taken together in *groups*, from the highest on: they are as wide as an eighth of a level, or 1.  A tile's *rank* is its
place in this order; within a group sequences follow one another.

So blocks that take tiles to and fro have as much to do as one another, whatever the lengths are.  A walk goes on from
where it was: all of it reads each sequence twice for every group.
"""

from __future__ import annotations

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.tile.geometry import local
from schedules.tile.sequences import Ragged, count_lanes

_LANES = 32
#: Below every level, and above it.
_NONE, _ABOVE = -(1 << 30), 1 << 30

_GROUP = """
__forceinline__ __device__ int first_level_of_group(int level) {
  if (level < 0) return -0x40000000;
  int bits = max(28 - __clz(level), 0);
  return level >> bits << bits;
}
"""
_SUM = """
__forceinline__ __device__ int sum_up_to_lane(int x, int lane) {
  for (int step = 1; step < 32; step *= 2) {
    int other = __shfl_up_sync(0xffffffffu, x, step, 32);
    x += lane < step ? 0 : other;
  }
  return x;
}
"""
_LARGEST = """
__forceinline__ __device__ int largest_of_lanes(int x) {
  for (int step = 1; step < 32; step *= 2) x = max(x, __shfl_xor_sync(0xffffffffu, x, step, 32));
  return x;
}
"""
_FROM_LANE = """
__forceinline__ __device__ int from_lane(int x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane, 32);
}
"""


def _call(name: str, source: str, *arguments: Expr) -> Expr:
    return T.cuda.func_call(name, *arguments, source_code=source, return_type="int32")


@T.meta_class
class LevelWalk:
    """A warp's way through the tiles of ``rows`` rows, a power of two; ``rises`` says that later rows see more keys.

    ``sequence`` and ``m_block`` are the tile that was found last; ``m_block`` is −1 if there was none.
    """

    def __init__(self, queries: Ragged, keys: Ragged, rows: int, rises: bool):
        self.queries, self.keys, self.rows, self.rises = queries, keys, rows, rises
        self.sequence, self.m_block = local(T.int32(0)), local(T.int32(-1))
        # the group: its first and its last level, which of its sequences are next, the ranks before those
        self.first, self.last, self.next, self.before = (local(T.int32(0)) for _ in range(4))
        # of a lane's sequence: its tiles, the levels of the first and of the last one
        self.tiles, self.low, self.high = (local(T.int32(0)) for _ in range(3))

    @T.inline
    def start(self):
        """Before the first tile."""
        self.first = _ABOVE
        self.next = self.queries.batch + 1
        self.before = 0

    @T.inline
    def save(self, words, at):
        """Leave where it has come to in four int32 of shared memory."""
        words[at] = self.first
        words[at + 1] = self.last
        words[at + 2] = self.next
        words[at + 3] = self.before

    @T.inline
    def resume(self, words, at):
        """Go on from where another warp has come to."""
        self.first = words[at]
        self.last = words[at + 1]
        self.next = words[at + 2]
        self.before = words[at + 3]

    @T.inline
    def _measure(self, number):
        """Tiles and levels of a sequence; none of one that doesn't exist."""
        found: T.int32 = T.min(number, self.queries.batch)
        length: T.int32 = self.queries.of(found).length
        keys: T.int32 = T.Select(found < self.queries.batch, self.keys.of(found).length, 0)
        self.tiles = T.Select(number <= self.queries.batch, T.truncdiv(length + (self.rows - 1), self.rows), 0)
        if self.rises:
            self.low = T.shift_right(keys - length, self.rows.bit_length() - 1)
            self.high = self.low + self.tiles - 1
        else:
            self.low = T.truncdiv(keys + (self.rows - 1), self.rows)
            self.high = self.low

    @T.inline
    def _next_group(self, lane):
        """Go on to the next group, or to none."""
        best: T.int32 = _NONE
        self.next = 0
        while self.next <= self.queries.batch:
            self._measure(self.next + lane)
            below = T.meta_var(T.And(self.tiles > 0, self.low < self.first))
            best = T.max(best, T.Select(below, T.min(self.high, self.first - 1), _NONE))
            self.next = self.next + _LANES
        self.last = _call("largest_of_lanes", _LARGEST, best)
        self.first = _call("first_level_of_group", _GROUP, self.last)
        self.next = 0

    @T.inline
    def find(self, rank, lane):
        """The whole warp: find the tile of a rank, which is larger than those before."""
        self.sequence = 0
        self.m_block = -1
        going: T.int32 = 1
        while going != 0:
            if self.next > self.queries.batch:
                self._next_group(lane)
                going = T.Cast("int32", self.last > _NONE)
            else:
                self._measure(self.next + lane)
                top: T.int32 = T.min(self.high, self.last)
                levels: T.int32 = T.max(top - T.max(self.low, self.first) + 1, 0)
                own: T.int32 = T.min(levels, self.tiles) if self.rises else T.min(levels, 1) * self.tiles
                up_to: T.int32 = _call("sum_up_to_lane", _SUM, own, lane)
                all_own: T.int32 = _call("from_lane", _FROM_LANE, up_to, 31)
                if rank < self.before + all_own:
                    at: T.int32 = count_lanes(self.before + up_to <= rank)
                    last_block = T.meta_var(top - self.low if self.rises else self.tiles - 1)
                    first_rank = T.meta_var(self.before + up_to - own)
                    self.m_block = _call("from_lane", _FROM_LANE, last_block + first_rank, at) - rank
                    self.sequence = self.next + at
                    going = 0
                else:
                    self.before = self.before + all_own
                    self.next = self.next + _LANES
