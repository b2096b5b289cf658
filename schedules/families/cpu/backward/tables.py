"""Gradients of tables: any score may add to any element, and the sum of each has the same order on every run.

The work items of a turn are dealt to at most ``MOST_LANES`` *lanes*, each of which has a table of sums of its own and
takes its items one after another; in the end the lanes are added up in their order.  How many there are follows from
the sizes of the call alone, and which thread has which lane changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder

from tvm_flash.packs.manifest import Param

#: More lanes serve more threads, and cost a table each: a bias by relative position of 16 heads and 4096 positions has
#: half a megabyte.
MOST_LANES = 32


@dataclass(frozen=True)
class Tables:
    """The tables that are learnt, and their sums.

    ``given`` has by name the tables, ``gradients`` what their sums go to, ``sums`` the memory of all lanes, and
    ``lane`` is the one that is added to.
    """

    params: tuple[Param, ...]
    given: Mapping[str, tirx.Buffer]
    gradients: Mapping[str, tirx.Buffer]
    sums: Mapping[str, tirx.Buffer]
    lane: Expr | None = None

    @staticmethod
    def of(params: tuple[Param, ...], given, gradients, lanes: Expr) -> Tables:
        """Those of a call, with memory for so many lanes."""
        tables = Tables(params, given, gradients, {})
        for p in params:
            size = T.Select(tables.wants(p), lanes * tables.size(p), T.int64(1))
            buffer = T.sblock_alloc_buffer((size,), "float32")
            IRBuilder.name(f"d_{p.name}_lanes", buffer)
            tables.sums[p.name] = buffer
        return tables

    def wants(self, param: Param) -> Expr:
        """Whether the gradient of a table is asked for; one element stands for none."""
        pairs = zip(self.gradients[param.name].shape, self.given[param.name].shape, strict=True)
        return tirx.all(*(n >= m for n, m in pairs))

    def size(self, param: Param) -> Expr:
        """How many elements a table has."""
        found = T.int64(1)
        for n in self.given[param.name].shape:
            found = found * n
        return found

    def _place(self, param: Param, index) -> Expr:
        """The number of an element of a table."""
        place = T.int64(0)
        for x, n in zip(index, self.given[param.name].shape, strict=True):
            place = place * n + x
        return place

    def add(self, param: Param, index, share: Expr) -> None:
        """Add to the sum of an element."""
        sums = self.sums[param.name]
        at = self.lane * self.size(param) + self._place(param, index)
        T.buffer_store(sums, sums[at] + share, [at])

    def begin(self, lanes: Expr) -> None:
        """Zeros in the sums of all lanes, in parallel; nothing where no table is learnt."""
        if not self.params:
            return
        with T.parallel(lanes) as lane, T.sblock("tables"):
            T.reads()
            T.writes()
            for p in self.params:
                size = self.size(p)
                with T.serial(T.Select(self.wants(p), size, T.int64(0))) as x:
                    T.buffer_store(self.sums[p.name], T.float32(0), [lane * size + x])

    def store(self, lanes: Expr, accumulates: bool) -> None:
        """Add up the lanes, in their order."""
        for p in self.params:
            out, sums, size = self.gradients[p.name], self.sums[p.name], self.size(p)
            first, *others = self.given[p.name].shape
            with T.grid(T.Select(self.wants(p), first, T.int64(0)), *others) as index:
                index = list(index) if others else [index]
                if not accumulates:
                    T.buffer_store(out, T.float32(0), index)
                with T.serial(lanes) as lane:
                    at = lane * size + self._place(p, index)
                    T.buffer_store(out, out[tuple(index)] + sums[at], index)


def lanes_of(items: Expr) -> Expr:
    """How many lanes so many work items are dealt to."""
    return T.min(items, T.int64(MOST_LANES))
