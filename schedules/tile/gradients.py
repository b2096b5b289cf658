"""The arguments of a backward's launches on any GPU: the forward's tensors and sizes, and gradients in and out."""

from __future__ import annotations

from dataclasses import replace

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.tile.dtypes import TensorTypes, element_type, tensor_types
from schedules.tile.geometry import RAGGED_LAYOUT, Geometry, RaggedGeometry, Tensor, flat
from schedules.tile.tile_scheduler import Traversal

#: Bytes; what TMA asks of addresses and strides.
ALIGNMENT = 16


def tiles_of(block_m: int, ragged: bool) -> tuple:
    """How many tiles of ``block_m`` rows all heads have a place for, as a size (:meth:`Tensors.tiles_of_rows`)."""
    if ragged:  # one more than there may be: sizes know no quotient that is rounded down
        return ("*", "heads", ("+", ("ceildiv", "total_q", block_m), "batch", 1))
    return ("*", "batch", "heads", ("ceildiv", "seqlen_q", block_m))


@T.meta_class
class _Gradients:
    """What a backward's launches have beside the forward's tensors: mixed into a geometry."""

    #: Whether results are added to what is there, in float32.
    adds = False

    def _add_gradients(self, pattern: Pattern, layout: str, handles: dict):
        types = result_types(pattern, self.adds)
        self.gradients = {}
        for name, like, dim, element in (
            ("do", self.q, self.head_dim_v, tensor_types(pattern).o),
            ("dq", self.q, self.head_dim, types.q),
            ("dk", self.k, self.head_dim, types.k),
            ("dv", self.v, self.head_dim_v, types.v),
        ):
            if name in handles:
                sizes = {**like.sizes, "dim": dim}
                self.gradients[name] = Tensor(handles[name], name, sizes, element.name, layout, ALIGNMENT)
        if "lse" in handles:
            rows = T.int32(), T.int32()
            self.lse = T.match_buffer(handles["lse"], (rows[0],), "float32", align=4)
            self.delta = T.match_buffer(handles["delta"], (rows[1],), "float32", align=4)

    def _add_group(self):
        # Query heads that read one head of keys; made here, on the host, as a division costs a block more than a load.
        self.group = T.bind(T.truncdiv(self.heads, self.kv_heads))

    def row_terms(self):
        """Flat views of ``lse`` and ``delta``."""
        return flat(self.lse), flat(self.delta)


@T.meta_class
class Tensors(_Gradients, Geometry):
    """Tensors ``q, k, v, do``, flat ``lse`` and ``delta``, sizes, and of ``dq, dk, dv`` those of the launch.

    ``handles`` has them by name.  Made before ``T.device_entry()``.
    """

    #: Whether there are rows without keys.
    may_lack_keys = False

    def __init__(self, pattern: Pattern, traversal: Traversal, handles: dict, softmax_scale, parameters: dict):
        inputs = tuple(handles[name] for name in ("q", "k", "v"))
        Geometry.__init__(self, pattern, traversal, inputs, softmax_scale, parameters, ALIGNMENT)
        self._add_gradients(pattern, traversal.layout, handles)
        self._add_group()

    def head_row(self, b: Expr, h: Expr) -> Expr:
        """Number of a query head among those of all batches."""
        return b * self.heads + h

    @property
    def head_rows(self) -> Expr:
        """How many of those there are."""
        return self.batch * self.heads

    def tiles_of_rows(self, rows: int) -> Expr:
        """How many tiles of ``rows`` query rows each of those heads has a place for."""
        return self.queries.tiles(rows)

    def first_tile(self, b: Expr, rows: int) -> Expr | int:
        """The place of the first tile of a batch among those of its head."""
        return 0

    def has_sequence(self, b: Expr) -> Expr:
        """Whether a block's rows are of a batch."""
        return T.bool(True)


@T.meta_class
class AddedTensors(Tensors):
    """The same where results are added to what is there."""

    adds = True


class Starts:
    """Where ragged sequences begin, as further arguments of a launch: what :func:`append_arguments` takes."""

    roles = ("cu_seqlens_q", "cu_seqlens_k")

    def __init__(self):
        self.ends = tirx.Var("starts", "int32")
        self.arguments = [tirx.decl_buffer([self.ends], "int32", name=role) for role in self.roles]


@T.meta_class
class RaggedTensors(_Gradients, RaggedGeometry):
    """The same of ragged sequences, which ``starts`` says the beginnings of.

    What belongs to tiles of rows is in the order (heads, slots of tiles), see :mod:`schedules.tile.sequences`.
    """

    may_lack_keys = True

    def __init__(
        self, pattern: Pattern, traversal: Traversal, handles: dict, starts: Starts, softmax_scale, parameters: dict
    ):
        inputs = tuple(handles[name] for name in ("q", "k", "v"))
        traversal = replace(traversal, layout=RAGGED_LAYOUT)
        Geometry.__init__(self, pattern, traversal, inputs, softmax_scale, parameters, ALIGNMENT)
        self._begin_at(starts.ends, starts.arguments)
        self.all_queries = self.queries
        self._add_gradients(pattern, RAGGED_LAYOUT, handles)
        self._add_group()

    def head_row(self, b: Expr, h: Expr) -> Expr:
        """Number of a query head."""
        return h

    @property
    def head_rows(self) -> Expr:
        """How many there are."""
        return self.heads

    def tiles_of_rows(self, rows: int) -> Expr:
        """How many slots for tiles of ``rows`` query rows each head has."""
        return T.truncdiv(self.seqlen_q, rows) + (self.batch + 1)

    def first_tile(self, b: Expr, rows: int) -> Expr:
        """The first slot of a sequence, which isn't the one after the last."""
        return T.truncdiv(self.queries.of(b).offset, rows) + b

    def has_sequence(self, b: Expr) -> Expr:
        """Whether a block's rows, which are of batch ``b`` else, aren't those after the last sequence."""
        return self.queries.of(b).offset < self.all_queries.begin(self.batch)


def result_types(pattern: Pattern, adds: bool) -> TensorTypes:
    """The element types of gradients, by the tensors that they are of; ``adds``: added to what is there."""
    if not adds:
        return tensor_types(pattern)
    wide = element_type("float32")
    return TensorTypes(q=wide, k=wide, v=wide, o=wide)


def tensors_of(
    pattern: Pattern, traversal: Traversal, handles: dict, starts: Starts | None, *numbers, adds: bool = False
):
    """Those of a launch: of ragged sequences if it is told where they begin; ``adds``: results to what is there."""
    if starts is None:
        return (AddedTensors if adds else Tensors)(pattern, traversal, handles, *numbers)
    return RaggedTensors(pattern, traversal, handles, starts, *numbers)
