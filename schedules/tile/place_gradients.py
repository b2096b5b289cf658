"""Gradients of parameters that have values for queries or keys: how a backward's launches on any GPU store them.

A launch goes over the scores with either queries or keys of its own, and has of each score the gradient with respect
to such a parameter (:class:`schedules.tile.weights.Weights` adds it here).  Whoever has

* a value for each query and key gets it stored where it belongs, by the launch whose own rows are queries;
* one for each query, or one for each key, has it summed over the others in registers, by the launch whose own rows
  these are, and stored at the end of a head.

Either way an element is written by one thread, always the same, so that it has the same bits on every run.  What a
launch doesn't visit is to be cleared before.  Gradients have the axes ``Param.of_gradient``: each batch entry and
query head its own, which the run time sums where the parameter is the same for several.  A target of a single element
says that nobody asked.
"""

from __future__ import annotations

import operator

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.definition.parameters import gradient_name, gradient_symbols
from schedules.definition.pattern import Pattern, Site
from schedules.tile.fragment import Fragment
from schedules.tile.geometry import Geometry, local, wide
from schedules.tile.parameters import OfHead
from schedules.tile.softmax import from_lane
from tvm_flash.packs.manifest import Param


def stored_by(pattern: Pattern, transposed: bool) -> tuple[Param, ...]:
    """The parameters whose gradients the launch stores whose own rows are queries, or keys if ``transposed``."""
    spread = [p for p in pattern.learnt if p.is_placed]
    return tuple(p for p in spread if ("i" not in p.axes) == transposed)


class Targets:
    """The gradients that a launch stores, as further arguments of it."""

    def __init__(self, pattern: Pattern, transposed: bool):
        self.params = stored_by(pattern, transposed)
        self.arguments, self.buffers = gradient_symbols(self.params, pattern.index_dtype)
        self.roles = tuple(map(gradient_name, self.params))

    def is_wanted(self, param: Param, sizes: Site | Geometry) -> Expr:
        """Whether somebody asked for one of them, of a call of such sizes."""
        extents = {"b": sizes.batch, "h": sizes.heads, "i": sizes.seqlen_q, "j": sizes.seqlen_kv}
        shape = self.buffers[param.name].shape
        return tirx.all(*(n >= extents[a] for n, a in zip(shape, param.of_gradient, strict=True)))


@T.meta_class
class PlaceGradients:
    """Those of the head at a site: made anew for each.

    ``m_tiles`` and ``tile_step`` are as those of a ``ScoreTile``.
    """

    def __init__(self, targets: Targets, at: Site, fragment: Fragment, m_tiles: int, tile_step: int, transposed: bool):
        self.at, self.fragment, self.m_tiles, self.tile_step = at, fragment, m_tiles, tile_step
        self.own = "j" if transposed else "i"
        self.params = targets.params
        self.targets = {p.name: OfHead(targets.buffers[p.name], p.of_gradient) for p in self.params}
        self.first = {name: local(x.offset(at.b, at.h)) for name, x in self.targets.items()}
        self.wanted = {p.name: targets.is_wanted(p, at) for p in self.params}
        # one lane's share of each of its rows
        rows = [p.name for p in self.params if not self._is_of_scores(p)]
        self.sums = {name: T.alloc_local([2 * m_tiles], "float32") for name in rows}
        for x in self.sums.values():
            for n in range(2 * m_tiles):
                T.buffer_store(x, T.float32(0), [n])

    def _is_of_scores(self, param: Param) -> bool:
        return "i" in param.axes and "j" in param.axes

    def _store(self, name: str, value: Expr, i: Expr, j: Expr):
        target, at = self.targets[name], {"i": i, "j": j}
        place = [wide(x) * wide(target.strides[a]) for a, x in at.items() if a in target.strides]
        T.buffer_store(target.memory, value, [sum(place, self.first[name] + T.int64(0))])

    def add(self, param: Param, value: Expr, at: tuple[Expr, Expr], place) -> None:
        """The gradient at the query and key ``at``, of the register at ``place``."""
        if self._is_of_scores(param):
            exists = tirx.all(self.wanted[param.name], at[0] < self.at.seqlen_q, at[1] < self.at.seqlen_kv)
            with T.If(exists), T.Then():
                self._store(param.name, value, *at)
        else:
            t, _, r, _ = place
            sums = self.sums[param.name]
            T.buffer_store(sums, sums[t * 2 + r] + value, [t * 2 + r])

    def store_sums(self, row0: Expr, lane: Expr, adds: bool = False) -> None:
        """Store the sums of this lane's own rows, the first of which is ``row0``; by one lane of those that share one.

        ``adds``: they are added to what is there.
        """
        length = self.at.seqlen_kv if self.own == "j" else self.at.seqlen_q
        for name, sums in self.sums.items():
            target = self.targets[name]
            for n in range(2 * self.m_tiles):
                for lanes in self.fragment.row_lanes:
                    T.buffer_store(sums, operator.add(sums[n], from_lane(sums[n], lanes)), [n])
                row = row0 + (n // 2 * self.tile_step + n % 2 * self.fragment.row_step)
                writes = tirx.all(self.fragment.column(lane) == 0, row < length, self.wanted[name])
                with T.If(writes), T.Then():
                    at = self.first[name] + wide(row) * wide(target.strides[self.own])
                    T.buffer_store(target.memory, target.memory[at] + sums[n] if adds else sums[n], [at])

    def clear(self, row_first: Expr, rows: int, seen: tuple[Expr, Expr], thread: Expr, threads: int) -> None:
        """All threads: zeros in the gradients of scores of ``rows`` queries from ``row_first`` on, at all keys that are
        not in ``seen``, the first one and the end.  A barrier is to follow, if tiles in it are stored too."""
        begin, end = seen
        for p in self.params:
            if not self._is_of_scores(p):
                continue
            with (
                T.If(self.wanted[p.name]),
                T.Then(),
                T.serial(rows) as row,
                T.If(row_first + row < self.at.seqlen_q),
                T.Then(),
            ):
                for first, last in ((T.int32(0), T.min(begin, self.at.seqlen_kv)), (end, self.at.seqlen_kv)):
                    with T.serial(T.truncdiv(T.max(last - first, 0) + (threads - 1), threads)) as step:
                        key = first + step * threads + thread
                        with T.If(key < last), T.Then():
                            self._store(p.name, T.float32(0), row_first + row, key)
