"""Asking for memory before it is needed, while there is something to compute."""

from __future__ import annotations

from tvm import DataType, tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.families.cpu.config import Config
from schedules.families.cpu.geometry import Geometry, Tensor

#: Bits of a cache line.
_LINE = 512


def elements_of_line(buffer: tirx.Buffer) -> int:
    """How many elements a cache line has."""
    return _LINE // DataType(str(buffer.dtype)).bits


def fetch(buffer: tirx.Buffer, offset: Expr) -> None:
    """Ask for the cache line of an element, into the second-level cache; where there is none, nothing happens."""
    T.evaluate(T.call_intrin("void", "tirx.prefetch", T.address_of(buffer[offset]), 0, 2, 1))


def make_fetch_next(config: Config, lanes: int):
    """A macro that spreads the rows of the next kv tile over the steps of the products with this one.

    Each group of rows asks for its share, a few lines in each step: no more than the first-level cache can wait for at
    once, so that no product waits for them.  On one core of an Emerald Rapids, float32 at head_dim 128, 512, 1024 and
    2048 positions took 0.97, 0.99 and 0.96 of the time; where keys and values were in the second-level cache already,
    1.015.
    """
    groups = config.block_m // (config.row_vectors * lanes)

    def share_of(lines: int, steps: int) -> tuple[int, int]:
        """How many runs of lines a step asks for, and how many lines each has, of rows of so many lines."""
        share = -(-config.block_n * lines // (groups * steps))
        run = next(n for n in range(min(share, lines), lines + 1) if lines % n == 0)
        return -(-share // run), run

    @T.inline
    def fetch_next(P: Geometry, tensor: Tensor, at, group, step, steps, width):
        """In step ``step`` of ``steps`` of a group's product; ``at`` is where this tile's first row is."""
        if not P.is_paged:
            size = T.meta_var(elements_of_line(tensor.flat))
            lines = T.meta_var((width + size - 1) // size)
            runs = T.meta_var(share_of(lines, steps))
            for x in T.unroll(runs[0]):
                number: T.int64 = (group * steps + step) * runs[0] + x
                row: T.int64 = tensor.in_tile(at, config.block_n + number // (lines // runs[1]))
                begin: T.int64 = row + number % (lines // runs[1]) * (runs[1] * size)
                for line in T.unroll(runs[1]):
                    fetch(tensor.flat, begin + line * size)

    return fetch_next
