"""One call of a backward kernel: the forward's tensors and sizes, and gradients that come in and go out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.definition.pattern import Site
from schedules.families.cpu import geometry as forward
from schedules.families.cpu.backward.tables import Tables
from schedules.families.cpu.flat import flat
from schedules.families.cpu.geometry import Tensor
from schedules.families.cpu.vector_math import vectorizable
from tvm_flash.packs.manifest import Param

#: Rows of queries, and keys, of a section at least; how many sections there are at most.
SECTION, MOST_SECTIONS = 256, 16

#: Axes of the gradients that are summed over the sections of a head's keys; others have a place for each.
SUMMED = ("", "bh")


def flat_by_role(arguments: Mapping[str, tuple[tirx.Buffer, tuple[Expr, ...]]]) -> SimpleNamespace:
    """Buffers and their strides by role, as the steps address them."""
    return SimpleNamespace(**{role: Tensor(flat(buffer), strides) for role, (buffer, strides) in arguments.items()})


@dataclass(frozen=True)
class Geometry(forward.Geometry):
    """A call of the backward.

    ``dq_sum``, ``dk_sum`` and ``dv_sum`` are flat float32 sums, a row in ``(batch, heads, seq)`` order, with
    ``width`` or ``width_v`` elements each; ``delta`` is one for each query row.  ``sums`` has, by parameter, a sum for
    each ``(batch, head, key section)``, ``tables`` the sums of those that are tables, and ``gradients`` the tensor that
    a parameter's gradient goes to.
    """

    do: Tensor
    dlse: tirx.Buffer
    dlse_length: Expr
    dq: Tensor
    dk: Tensor
    dv: Tensor
    delta: tirx.Buffer
    dq_sum: tirx.Buffer
    dk_sum: tirx.Buffer
    dv_sum: tirx.Buffer
    sums: Mapping[str, tirx.Buffer]
    tables: Tables
    gradients: Mapping[str, tirx.Buffer]
    width: Expr
    width_v: Expr

    def in_lane(self, lane: Expr) -> Geometry:
        """The same for whoever adds to the sums of this lane."""
        return replace(self, tables=replace(self.tables, lane=lane))

    def table_gradients(self, name: str, site: Site, product, i, j, chosen: bool | None = None) -> list:
        """Which elements of a table a score reads, and the derivatives with respect to them."""
        found = self.pattern.table_gradients(name, site, product, i, j, chosen)
        return [(index, vectorizable(slope)) for index, slope in found]

    @property
    def group(self) -> Expr:
        """How many query heads read one head of keys."""
        return self.heads // self.kv_heads

    def wants(self, param: Param) -> Expr:
        """Whether the gradient of a parameter over queries or keys, or of a table, is asked for; of a single element it
        isn't."""
        if param.rank:
            return self.tables.wants(param)
        extents = {"b": self.batch, "h": self.heads, "i": self.seqlen_q, "j": self.seqlen_kv}
        shape = self.gradients[param.name].shape
        return tirx.all(*(n >= extents[a] for n, a in zip(shape, param.of_gradient, strict=True)))

    def key_row(self, b: Expr, g: Expr) -> Expr:
        """Where the sums of a head's first key are, counted in keys."""
        return (b * self.kv_heads + g) * self.seqlen_kv

    def has_dlse(self) -> Expr:
        """Whether the log-sum-exp has a gradient."""
        return self.dlse_length >= self.batch * self.heads * self.seqlen_q

    def score(self, site: Site, product: Expr, i: Expr, j: Expr, chosen: bool | None = None) -> Expr:
        """The score of a raw product in natural units, as the log-sum-exp is."""
        return vectorizable(self.pattern.score(site, product, i, j, chosen))

    def score_gradient(self, site: Site, product: Expr, i: Expr, j: Expr, chosen: bool | None = None) -> Expr:
        """The derivative of the score with respect to the scaled product."""
        return vectorizable(self.pattern.score_gradient(site, product, i, j, chosen))

    def parameter_gradient(self, name: str, site: Site, product, i, j, chosen: bool | None = None) -> Expr:
        """The derivative of the score with respect to a parameter."""
        return vectorizable(self.pattern.parameter_gradient(name, site, product, i, j, chosen))


@dataclass(frozen=True)
class SequenceGeometry(Geometry, forward.SequenceGeometry):
    """One sequence of a ragged call, as if it were alone; its keys begin at ``first_key`` of the ``total_k`` of all."""

    first_key: Expr
    total_k: Expr

    def key_row(self, b: Expr, g: Expr) -> Expr:
        return g * self.total_k + self.first_key


def sections(seqlen_q: Expr, seqlen_kv: Expr) -> Expr:
    """Into how many sections queries and keys are split: a function of the lengths alone."""
    shorter = T.min(seqlen_q, seqlen_kv)
    return T.min((shorter + (SECTION - 1)) // SECTION, T.int64(MOST_SECTIONS))
