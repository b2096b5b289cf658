"""The row tiles of ragged sequences from the longest to the shortest, found on the device by one warp.

Tiles are handed out in *shares*.  Where all rows see the same keys, a share is one tile of a head.  Where later rows
see more, it is two, one from each end of the sequence, and of an odd number the middle one alone: so all pairs of a
sequence are equally long.  A share's *level* says how long it is.  Levels are taken together in *groups*, from the
highest on, which are as wide as an eighth of a level, or 1; within a group the shares of a sequence follow one another,
head by head, so that those who read the same keys do so at about the same time.

Blocks that take shares to and fro have as much to do as one another, whatever the lengths are.  A walk goes on from
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
#: Keys of a level where all rows see the same.
_KEYS = 32

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


def sum_up_to_lane(x: Expr, lane: Expr) -> Expr:
    """The sum of ``x`` of the warp's lanes up to this one, which all ask."""
    return _call("sum_up_to_lane", _SUM, x, lane)


def from_lane(x: Expr, lane: Expr | int) -> Expr:
    """``x`` of a lane of the warp, all of which ask."""
    return _call("from_lane", _FROM_LANE, x, lane)


@T.meta_class
class LevelWalk:
    """A warp's way through the shares of ``rows`` rows, a power of two; ``rises`` says that later rows see more keys.

    ``sequence``, ``head``, ``m_block`` and ``other`` are the share that was found last: its row tiles, ``other`` −1 if
    it has one, and ``m_block`` too if there was none.
    """

    def __init__(self, queries: Ragged, keys: Ragged, heads: Expr, rows: int, rises: bool):
        self.queries, self.keys, self.heads, self.rows, self.rises = queries, keys, heads, rows, rises
        self.sequence, self.head, self.m_block, self.other = (local(T.int32(0)) for _ in range(4))
        # the group: its first and its last level, which of its sequences are next, the shares before those
        self.first, self.last, self.next, self.before = (local(T.int32(0)) for _ in range(4))
        # of a lane's sequence: its tiles, the levels of most of its shares and of the middle one
        self.tiles, self.level, self.middle = (local(T.int32(0)) for _ in range(3))

    @T.inline
    def start(self):
        """Before the first share."""
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

    def _most(self) -> Expr:
        """How many of a sequence's shares of one head are at ``level``."""
        return T.shift_right(self.tiles, 1) if self.rises else self.tiles

    def _odd(self) -> Expr:
        """How many are at ``middle``."""
        return T.bitwise_and(self.tiles, 1) if self.rises else T.int32(0)

    def _in_group(self, level, count) -> Expr:
        return T.Select(T.And(self.first <= level, level <= self.last), count, 0)

    def _below(self, level, count) -> Expr:
        return T.Select(T.And(count > 0, level < self.first), level, _NONE)

    @T.inline
    def _measure(self, number):
        """Tiles and levels of a sequence; no tiles of one that doesn't exist."""
        found: T.int32 = T.min(number, self.queries.batch)
        length: T.int32 = self.queries.of(found).length
        keys: T.int32 = T.Select(found < self.queries.batch, self.keys.of(found).length, 0)
        self.tiles = T.Select(number <= self.queries.batch, T.truncdiv(length + (self.rows - 1), self.rows), 0)
        if self.rises:
            lowest = T.meta_var(T.shift_right(keys - length, self.rows.bit_length() - 1))
            self.middle = lowest + T.shift_right(self.tiles, 1)
            self.level = lowest * 2 + self.tiles
        else:
            self.level = T.truncdiv(keys + (_KEYS - 1), _KEYS)

    @T.inline
    def _next_group(self, lane):
        """Go on to the next group, or to none."""
        best: T.int32 = _NONE
        self.next = 0
        while self.next <= self.queries.batch:
            self._measure(self.next + lane)
            best = T.max(best, self._below(self.level, self._most()))
            best = T.max(best, self._below(self.middle, self._odd()))
            self.next = self.next + _LANES
        self.last = _call("largest_of_lanes", _LARGEST, best)
        self.first = _call("first_level_of_group", _GROUP, self.last)
        self.next = 0

    @T.inline
    def find(self, number, lane):
        """The whole warp: find share ``number`` of all, which is larger than those before."""
        going: T.int32 = 1
        share: T.int32 = number
        while going != 0:
            if self.next > self.queries.batch:
                self._next_group(lane)
                going = T.Cast("int32", self.last > _NONE)
            else:
                self._measure(self.next + lane)
                shares = T.meta_var(
                    self._in_group(self.level, self._most())
                    + (self._in_group(self.middle, self._odd()) if self.rises else 0)
                )
                own: T.int32 = shares * self.heads
                up_to: T.int32 = sum_up_to_lane(own, lane)
                all_own: T.int32 = from_lane(up_to, _LANES - 1)
                if number < self.before + all_own:
                    at: T.int32 = count_lanes(self.before + up_to <= number)
                    share = number - self.before - from_lane(up_to - own, at)
                    self.sequence = self.next + at
                    going = 0
                else:
                    self.before = self.before + all_own
                    self.next = self.next + _LANES
        self.m_block = -1
        self.other = -1
        if self.last > _NONE:
            self._choose(share)
        else:
            self.sequence = 0

    @T.inline
    def _choose(self, share):
        """Head and row tiles of a share of ``sequence`` in this group."""
        self._measure(self.sequence)
        each: T.int32 = self._in_group(self.level, self._most())
        if share < each * self.heads:
            self.head = T.truncdiv(share, each)
            place: T.int32 = share - self.head * each
            self.m_block = self.tiles - 1 - place
            if self.rises:
                self.other = place
        else:
            self.head = share - each * self.heads
            self.m_block = T.shift_right(self.tiles, 1)
