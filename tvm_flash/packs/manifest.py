"""What a pack says about itself: plain data, JSON in and out.

A pack is one folder ``packs/<arch>/`` with compiled modules and a ``manifest.json``.  The builder writes the manifest,
the run time reads it; neither needs the other.  Every class here is a frozen dataclass of strings, numbers and tuples.

How a kernel is called
----------------------
A kernel computes one operator (``KernelEntry.op``) by one launch or several, in order.  Each :class:`Launch` names a
function of the module and says what it takes, in order, by *role*: an :class:`Argument` with the role's rank (0 for a
number) and dtype.  A tensor may have any strides unless its role says otherwise, and no size may be 0: the run time
answers empty problems itself.  Roles are:

* ``q``, ``o``, ``k``, ``v``: rank 4 in the template's physical layout, V1 ``(batch, heads, seq, dim)``, V2 ``(batch,
  seq, heads, dim)``, with a contiguous last dimension.  The last dimension of ``q`` and ``k`` may be any multiple of 8
  up to ``head_dim``, that of ``v`` and ``o`` up to ``head_dim_v``: a kernel serves every smaller size.
* ``lse``: flat float32, ``batch * heads * seqlen_q`` values in ``(batch, heads, seqlen_q)`` order; a shorter tensor
  (one element, say) means that nobody asked for it, and then it isn't written.
* ``softmax_scale``: a float32.
* a run-time parameter of the mask or the score by its name, one of ``KernelEntry.params``: a number; a tensor with the
  sizes of its ``axes``, of any strides (a stride of 0 broadcasts); or a table of its ``rank``, of any sizes and
  strides.
* a workspace by its name, one of ``KernelEntry.workspaces``: a contiguous tensor at a multiple of 128 bytes that lives
  for the launches of one call, of a shape that follows from the problem's sizes.  What a launch finds in it is what an
  earlier launch left there, or zeros if it is ``zeroed``, or anything.
* a number that the run time decides by its name, one of ``KernelEntry.scalars``: it follows from the problem's sizes
  too (:mod:`tvm_flash.packs.sizes`).

The launches of ``forward`` kernels write ``o`` and ``lse``.  One with a single launch takes ``(q, k, v, o, lse,
softmax_scale, *params)``; one that splits the keys has a launch that writes partial results into workspaces, and one
that combines them.

Kernels of the kinds ``ragged`` and ``ragged_backward`` compute ``forward`` and ``backward`` of sequences of different
lengths that lie one after the other.  Their roles are the same but for these:

* ``q``, ``o`` (and ``do``, ``dq``): ``(total_q, heads, dim)``; ``k``, ``v`` (and ``dk``, ``dv``): ``(total_k, kv_heads,
  dim)``, whatever the template, of any strides with a contiguous last dimension.
* ``lse`` (and ``dlse``): flat float32, ``heads * total_q`` values in ``(heads, total_q)`` order, or a shorter tensor.
* ``cu_seqlens_q``, ``cu_seqlens_k``: contiguous int32 ``(batch + 1,)`` on the device, which nobody reads on the host:
  sequence ``b`` has the rows ``cu_seqlens_q[b]`` up to but not ``cu_seqlens_q[b + 1]``, and such keys.  Neither falls,
  both begin with 0 and end with at most ``total_q`` and ``total_k``; a kernel of the CPU fails, before it writes
  anything, if that isn't so, one of a GPU stays within the tensors.
* a ``per_head`` parameter is ``(batch, heads)``, the sequence being the batch entry.

Rows and keys after the last sequence are written as those that see nothing.  Which kernel runs, and so its bucket, has
nothing to do with lengths.  Their sizes are those of :func:`tvm_flash.packs.sizes.of_sequences`.

Kernels of the kinds ``paged``, ``paged_decode`` and ``paged_decode_any`` compute ``forward`` of such sequences with
their keys on pages of a cache.  They take no ``cu_seqlens_k``, and of the other roles these are different:

* ``k``, ``v``: ``(pages, page_size, kv_heads, dim)``, of any strides with a contiguous last dimension.
* ``seqlens_k``: contiguous int32 ``(batch,)`` on the device, how many keys each sequence has.
* ``page_table``: int32 ``(batch, pages_per_sequence)`` on the device, of any stride with a contiguous last dimension:
  key ``j`` of sequence ``b`` is row ``j % page_size`` of page ``page_table[b, j // page_size]``.  Entries that no key
  needs may hold anything, and so may rows of a page behind a sequence's last key.

Sequences have at most ``pages_per_sequence * page_size`` keys, on pages that there are; a kernel of the CPU fails,
before it writes anything, if that isn't so.  Those of ``paged_decode`` are for few queries of each sequence
(``max_rows``) and split the keys at fixed positions; where they are for pages of some sizes only, which ``max_rows``
says too, those of ``paged_decode_any`` are for all.  Sizes are those of :func:`tvm_flash.packs.sizes.of_pages`.

Those of ``paged_latent`` have the first elements of a key as its value, and take no ``v``: ``o`` has as many columns as
there are, up to ``head_dim_v``.  The size ``split_length`` says where keys are split, if it isn't 0.

Kernels of the kinds ``paged_e4m3``, ``paged_int8``, ``paged_decode_e4m3`` and ``paged_decode_int8`` are the same but
for caches of 8 bits: ``k`` and ``v`` are uint8, the bytes of float8_e4m3fn, or int8.  They take after the table:

* ``k_scale``, ``v_scale``: float32 ``(pages, kv_heads)`` on the device, of any strides (0 broadcasts): what elements of
  a page and head are multiplied with.

An element ``x`` stands for ``float32(x) * scale``, rounded to float32 and then to the dtype of ``q``, to the nearest
and ties to even; the results are those of the kernel without scales on that.

Kernels of the kind ``append`` turn new queries and keys by their positions and put new keys and values into a cache, in
one launch; one kernel serves every size and every cache beside q's dtype.  Their roles (``APPEND_ROLES``) are:

* ``q``, ``o``: the queries and where they come turned, ``(total_q, heads, dim)``; any rows of the dtype where nothing
  is turned.
* ``k_new``, ``v_new``: ``(total_new, kv_heads, dim)``, the new keys and values.
* ``k``, ``v``: the cache, ``(pages, page_size, kv_heads, bytes of a row)`` of uint8, whatever its dtype, with strides
  in bytes and a contiguous last dimension.
* ``cu_seqlens_q``, ``cu_seqlens_k``: where each sequence begins among the queries, and among the new keys.
* ``cache_seqlens``: int32 ``(batch,)``, how many keys each sequence has before: its new ones come to the positions from
  there on.  ``page_table`` is as above.
* ``rotary_seqlens``: int32 ``(batch,)``, the positions by which the first new rows are turned; those that follow by the
  next ones, queries only if ``along`` isn't 0.
* ``rotary_cos``, ``rotary_sin``: ``(positions, rotary_dim / 2)`` in q's dtype, any strides.
* ``k_scale``, ``v_scale``: as above.
* ``turns``, ``along``, ``cache_format``: int32 numbers.

A new key without a place, whose position is negative or behind the table, or whose page isn't there, is written
nowhere, and neither is what follows the last sequence.  Of keys with one place that of the last row stands there.
Elements are turned in float32, each product and the sum rounded, and rounded to q's dtype; of 8 bits they are then
divided by their scale in float32, brought into the range of the dtype and rounded to the nearest, ties to even.

Those of ``backward`` take ``do`` (as ``o``), ``o`` and ``lse`` as a forward kernel left them, and ``dlse`` (as ``lse``;
a shorter tensor means that there is none), and write all of ``dq``, ``dk`` and ``dv`` (as ``q``, ``k`` and ``v``), and
``d_NAME`` of each parameter that asks for its gradient: float32, ``(batch, heads)`` and what else its ``axes`` have of
queries and keys (``Param.of_gradient``), or one element of a number.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tvm_flash.packs import sizes

SCHEMA = 2
MANIFEST_NAME = "manifest.json"

#: How the file names begin of the library with the fast path of a call, a support file of every pack.
CALL_STEM = "libtvm_flash_call"

#: The name that the definition of the package itself has in manifests; a user's own has the name of its function.
BUILTIN_DEFINITION = "attention"

LAYOUT_OF_TEMPLATE = {"v1": "bhsd", "v2": "bshd"}

#: The dtypes of parameters; a number is of one of the first two.
PARAM_DTYPES = ("float32", "int32", "float16", "bfloat16", "bool")

#: In a definition, the dtype of a tensor parameter that has the one of q, whichever a kernel is for.
AS_Q = "q"

#: The most blocks of a GPU's launch along any axis of its grid but the first.
MOST_BLOCKS = 65535

#: Alignments are looked at up to this many bytes: no kernel asks for more.
MOST_ALIGNMENT = 16

#: How sequences lie in memory: in a batch of one length, one after the other, or so with their keys on pages.
FORMS = DENSE, RAGGED, PAGED = "dense", "ragged", "paged"

#: The form of the sequences that kernels of a kind are for; those that aren't named are for dense ones.
FORM_OF_KIND = {"ragged": RAGGED, "ragged_backward": RAGGED}
FORM_OF_KIND |= dict.fromkeys(("paged", "paged_decode", "paged_decode_any"), PAGED)

#: Kinds of kernels over caches of 8 bits, by the kind for those in the dtype of q and by the dtype of the cache.
SCALED_KINDS = {kind: {"float8_e4m3fn": f"{kind}_e4m3", "int8": f"{kind}_int8"} for kind in ("paged", "paged_decode")}

#: The dtype of the cache that kernels of a kind read, where that isn't the dtype of q.
CACHE_OF_KIND = {kind: cache for kinds in SCALED_KINDS.values() for cache, kind in kinds.items()}
FORM_OF_KIND |= dict.fromkeys(CACHE_OF_KIND, PAGED)

#: The kind of kernels whose values are the first elements of keys.
PAGED_LATENT = "paged_latent"
#: Keys of a split that a call of such a kernel may ask for, powers of two.
LEAST_SPLIT, MOST_SPLIT = 64, 1 << 20
FORM_OF_KIND[PAGED_LATENT] = PAGED

#: The kind, and the operator, of kernels that turn new queries and keys and put new keys and values into a cache.
APPEND = "append"
FORM_OF_KIND[APPEND] = PAGED

#: What such a kernel takes, in order: tensors, then numbers.
APPEND_ROLES = (
    *("q", "o", "k_new", "v_new", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "cache_seqlens", "rotary_seqlens"),
    *("page_table", "rotary_cos", "rotary_sin", "k_scale", "v_scale", "turns", "along", "cache_format"),
)
#: Values of ``turns``: nothing is turned; elements are turned with those half of the rotary_dim on, or with neighbours.
UNTURNED, HALVES, INTERLEAVED = range(3)
#: Values of ``cache_format`` of caches of 8 bits; 0 is that of q's dtype.
CACHE_FORMATS = {"float8_e4m3fn": 1, "int8": 2}

#: Dtypes whose tensors kernels take as tensors of another: numbers of 8 bits as the bytes that they are.
TAKEN_AS = {"float8_e4m3fn": "uint8"}

#: Largest ``query_start`` of the mask ``positioned``, and the same below 0; those beyond count as it.  So no sum of a
#: position and a window leaves int32.
FARTHEST_START = 2**29


@dataclass(frozen=True)
class Param:
    """A run-time parameter of a mask or a score modification: a number, a tensor, or a table.

    Attributes
    ----------
    dtype: ``"float32"`` or ``"int32"``, of a tensor or table ``"float16"``, ``"bfloat16"`` or ``"bool"`` too, or in a
        definition ``"q"``, that of q; a kernel's parameters have the dtype that it is there (:meth:`beside`).
    axes: of a tensor, which of the axes of scores, batch, query head, query and key, ``"bhij"`` in this order, it has a
        value each for.
    per_head: the same as ``axes="bh"``.
    rank: of a table, whose indices are expressions: how many it has.
    gradient: a float number, tensor or table is learnt, and the backward computes its gradient.
    """

    name: str
    dtype: str
    per_head: bool = False
    gradient: bool = False
    axes: str = ""
    rank: int = 0

    def __post_init__(self):
        if self.per_head and not self.axes:
            object.__setattr__(self, "axes", "bh")
        object.__setattr__(self, "per_head", self.axes == "bh")
        if tuple(self.axes) != tuple(a for a in "bhij" if a in self.axes):
            raise ValueError(f"axes: is {self.axes!r}, expected some of 'bhij' in this order")
        if self.rank and self.axes:
            raise ValueError(f"{self.name}: has axes {self.axes!r} and the rank {self.rank} of a table; expected one")
        known = (*PARAM_DTYPES, AS_Q) if self.is_tensor else PARAM_DTYPES[:2]
        if self.dtype not in known:
            raise ValueError(f"dtype: is {self.dtype!r}, expected one of {', '.join(known)}")

    def beside(self, dtype: str) -> Param:
        """The parameter beside a q of some dtype."""
        return dataclasses.replace(self, dtype=dtype) if self.dtype == AS_Q else self

    @property
    def is_tensor(self) -> bool:
        """Whether it is a tensor or a table, and no number."""
        return bool(self.axes or self.rank)

    @property
    def is_spread(self) -> bool:
        """Whether it is a table, or a tensor with values for queries or keys, and not for heads alone."""
        return self.is_tensor and not self.is_summed

    @property
    def is_placed(self) -> bool:
        """Whether it is a tensor with values for queries or keys."""
        return "i" in self.axes or "j" in self.axes

    @property
    def is_summed(self) -> bool:
        """Whether a kernel sums its gradient over all queries and keys of a head."""
        return not self.rank and self.of_gradient in ("", "bh")

    @property
    def of_gradient(self) -> str:
        """The axes of its gradient: those of batch and head are left to whoever sums over them.

        A number has none, and neither has a table, whose gradient has its own shape.
        """
        return "".join(a for a in "bhij" if a in "bh" or a in self.axes) if self.axes else ""

    def aligned(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of such a tensor beside its gradient, with 1 for what it lacks; a table's is its own."""
        if self.rank:
            return tuple(shape)
        whole = (1,) * (len(self.axes) - len(shape)) + tuple(shape)
        sizes = dict(zip(self.axes, whole, strict=True))
        return tuple(sizes.get(a, 1) for a in self.of_gradient)


def why_no_places(param: Param) -> str:
    """Why sequences of different lengths have no parameter over queries or keys, and what to do; after its name."""
    given = ", ".join(f"at.{a}" for a in param.axes)
    return (
        f"over queries or keys (axes {param.axes!r}), along which sequences of different lengths have no common size; "
        f"make it a table, Param({param.name!r}, {param.dtype!r}, rank={len(param.axes)}), read by "
        f"at.table[{param.name!r}]({given})"
    )


@dataclass(frozen=True)
class Argument:
    """What a launch takes at one place: its role, its rank (0 for a number) and its dtype."""

    role: str
    rank: int
    dtype: str


@dataclass(frozen=True)
class Launch:
    """One function of a module, by its symbol, and its arguments in order.

    ``when`` is the role of a number that some launch of the kernel takes; where that is 0, this one is left out.
    """

    symbol: str
    arguments: tuple[Argument, ...]
    when: str = ""

    def is_needed(self, values: Mapping[str, Any]) -> bool:
        """Whether it is to be launched, by the numbers of the kernel."""
        return not self.when or bool(values[self.when])

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> Launch:
        """What :func:`dataclasses.asdict` made of a launch."""
        return Launch(**{**raw, "arguments": tuple(Argument(**a) for a in raw["arguments"])})


@dataclass(frozen=True)
class Workspace:
    """Memory for the launches of one call: a contiguous tensor, its sizes expressions of the problem's sizes.

    ``zeroed`` says that it is all zeros when the first launch begins.
    """

    name: str
    dtype: str
    shape: tuple[sizes.Expression, ...]
    zeroed: bool = False

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> Workspace:
        """What :func:`dataclasses.asdict` made of a workspace, perhaps by way of JSON."""
        return Workspace(**{**raw, "shape": tuple(map(sizes.from_json, raw["shape"]))})


@dataclass(frozen=True)
class Scalar:
    """A number that a kernel is given by the run time: an expression of the problem's sizes.

    Shapes of workspaces, and further scalars, may name it like a size.
    """

    name: str
    value: sizes.Expression

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> Scalar:
        """What :func:`dataclasses.asdict` made of a scalar, perhaps by way of JSON."""
        return Scalar(**{**raw, "value": sizes.from_json(raw["value"])})


@dataclass(frozen=True)
class Speed:
    """How fast a kernel was on one problem, with tensors in its own layout.

    ``device`` is the name of what it ran on, ``record`` that of the line in ``tuning_logs`` that says so.  Sizes are in
    elements; ``tflops`` are operations of the two products (half of them under a causal mask) by the median time.
    """

    device: str
    batch: int
    heads: int
    seqlen_q: int
    seqlen_kv: int
    head_dim: int
    microseconds: float
    tflops: float
    record: str

    def __str__(self) -> str:
        lengths = str(self.seqlen_q) if self.seqlen_q == self.seqlen_kv else f"{self.seqlen_q}×{self.seqlen_kv}"
        problem = f"batch {self.batch}, heads {self.heads}, seq {lengths}, head_dim {self.head_dim}"
        speed = f"{self.tflops:.4g} TFLOP/s" if self.tflops >= 1 else f"{1000 * self.tflops:.3g} GFLOP/s"
        return f"{self.microseconds:.1f} µs, {speed} at {problem} ({self.record})"


@dataclass(frozen=True)
class Waves:
    """How long a kernel takes by its waves, a wave being as many work tiles as a device computes at a time.

    Attributes
    ----------
    block_m: query rows of a work tile; ``block_n``: keys that it takes at a step.
    launch: picoseconds from the end of one launch to the first work of the next.
    tiles: ``(start, step)``, in picoseconds, of a multiprocessor that computes one work tile, two at a time, and so on
        up to as many as it can: together they take ``start + n * step`` for ``n`` steps each.
    record: the line in ``tuning_logs`` with the measurements that the figures are from.
    """

    block_m: int
    block_n: int
    launch: int
    tiles: tuple[tuple[int, int], ...]
    record: str

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> Waves:
        """What :func:`dataclasses.asdict` made of it, perhaps by way of JSON."""
        return Waves(**{**raw, "tiles": tuple((start, step) for start, step in raw["tiles"])})

    def time(self, problem: Mapping[str, int], multiprocessors: int) -> int:
        """Picoseconds of a problem, by its sizes (:func:`tvm_flash.packs.sizes.of`).

        The longest share of a multiprocessor counts, in full waves and what is left.
        """
        steps = -(-problem["seqlen_kv"] // self.block_n)
        tiles = problem["batch"] * problem["heads"] * -(-problem["seqlen_q"] // self.block_m)
        full, rest = divmod(-(-tiles // multiprocessors), len(self.tiles))
        each = [0, *(start + steps * step for start, step in self.tiles)]
        return self.launch + full * each[-1] + each[rest]


@dataclass(frozen=True)
class ModuleFile:
    """One shared library of a pack: its file name, size in bytes, and the sha256 that is checked at load."""

    file: str
    size: int
    sha256: str


@dataclass(frozen=True)
class KernelEntry:
    """One kernel of a pack.

    Attributes
    ----------
    symbol: the kernel's name in its pack, and that of its first launch.
    module: file name of the module, one of ``Manifest.modules``.
    op: the operator that it computes, one of ``tvm_flash.operators.OPERATORS``.
    kind: which of its kinds of kernels for that the builder made, such as ``"forward"`` or ``"decode"``.
    template: ``"v1"`` (layout bhsd) or ``"v2"`` (layout bshd).
    arch: ``"cpu"`` or a CUDA arch such as ``"sm_90a"``.
    head_dim, head_dim_v: the largest sizes it takes, in elements.
    definition, mask, score: which attention it computes.
    params: the run-time parameters of mask and score.
    launches: what is called, in order.
    workspaces, scalars: memory and numbers that the launches take beside the operator's own arguments.
    bucket: the fewest keys (``seqlen_kv``) it is meant for; of several kernels of one kind the one with the largest
        bucket that fits is the fastest.
    block_m: query rows of a work tile, where there are several kernels of one kind and bucket that differ in these
        alone, and give the same bits; 0 of the usual one.
    waves: by which one of these is chosen; None if nothing was measured.
    has_sink: whether each row's softmax has a logit beside those of its keys.
    max_rows: the most query rows that share a key (``seqlen_q * heads / kv_heads``) for which it is meant, by the
        problem's sizes; None if any number will do.  A kernel that is made for few rows is preferred where it fits.
    meant_for: 1 where it is meant for the problem's sizes, and 0 where another that fits, of a smaller bucket, is
        faster; None if the bucket says it all.
    narrow_axes: how many blocks launches have along the axes of a GPU's grid with room for ``MOST_BLOCKS`` only, by the
        problem's sizes, where that may be more.
    alignment: bytes, up to ``MOST_ALIGNMENT``; data pointers and all strides but the last must be multiples of it.
    index_bits: 32 if sizes and strides (in elements) must fit an int32, else 64.
    config: the schedule's configuration as JSON.
    config_source: where the configuration comes from: ``"default"`` or the name of a tuning record, such as
        ``"nvidia_h200.jsonl#5e1f0a93c2"``.
    source_hash: sha256 of what the kernel was compiled from; the key of its record in ``tuning_logs``.
    registers, shared_memory, spills: per thread, bytes per block, bytes; None where they don't apply.
    speeds: what tuning records say of exactly this kernel, for lengths of its bucket.
    """

    symbol: str
    module: str
    op: str
    kind: str
    template: str
    arch: str
    head_dim: int
    head_dim_v: int
    definition: str
    mask: str
    score: str
    params: tuple[Param, ...]
    launches: tuple[Launch, ...]
    bucket: int
    alignment: int
    index_bits: int
    config: dict[str, Any]
    config_source: str
    source_hash: str
    workspaces: tuple[Workspace, ...] = ()
    scalars: tuple[Scalar, ...] = ()
    max_rows: sizes.Expression | None = None
    meant_for: sizes.Expression | None = None
    narrow_axes: tuple[sizes.Expression, ...] = ()
    registers: int | None = None
    shared_memory: int | None = None
    spills: int | None = None
    speeds: tuple[Speed, ...] = ()
    block_m: int = 0
    waves: Waves | None = None
    has_sink: bool = False

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> KernelEntry:
        """What :func:`dataclasses.asdict` made of an entry, perhaps by way of JSON.

        Raises
        ------
        KeyError, TypeError, ValueError: a field is missing, unknown or not understood.
        """
        if raw["alignment"] > MOST_ALIGNMENT:
            raise ValueError(f"alignment must be at most {MOST_ALIGNMENT} bytes, got {raw['alignment']}")

        def expression_or_none(name: str) -> sizes.Expression | None:
            return None if raw.get(name) is None else sizes.from_json(raw[name])

        parts = {
            "params": tuple(Param(**p) for p in raw["params"]),
            "launches": tuple(map(Launch.from_dict, raw["launches"])),
            "workspaces": tuple(map(Workspace.from_dict, raw.get("workspaces", ()))),
            "scalars": tuple(map(Scalar.from_dict, raw.get("scalars", ()))),
            "max_rows": expression_or_none("max_rows"),
            "meant_for": expression_or_none("meant_for"),
            "narrow_axes": tuple(map(sizes.from_json, raw.get("narrow_axes", ()))),
            "speeds": tuple(Speed(**s) for s in raw.get("speeds", ())),
            "waves": None if raw.get("waves") is None else Waves.from_dict(raw["waves"]),
        }
        return KernelEntry(**{**raw, **parts})

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """Arguments of all launches, each role once, in the order in which they first appear."""
        found = {a.role: a for launch in self.launches for a in launch.arguments}
        return tuple(found.values())

    def dtype_of(self, role: str) -> str:
        """The dtype of a role."""
        return next(a.dtype for a in self.arguments if a.role == role)

    @property
    def dtype(self) -> str:
        """The dtype by which kernels are looked for, that of ``q``: ``"float32"``, ``"float16"`` or ``"bfloat16"``."""
        return self.dtype_of("q")

    def extents(
        self, problem: Mapping[str, int], shape_of: Callable[[str], Sequence[int]] | None = None
    ) -> dict[str, int]:
        """The sizes of a problem (:func:`tvm_flash.packs.sizes.of`), those of the gradients of tables that workspaces
        name, of which ``shape_of`` says what shape the tensor of a role has, and the values of the scalars."""
        found = dict(problem)
        named = {name for w in self.workspaces for size in w.shape for name in sizes.names(size)}
        for role in (f"d_{p.name}" for p in self.params):
            if sizes.elements_of(role) in named:
                found[sizes.elements_of(role)] = math.prod(shape_of(role))
        for scalar in self.scalars:
            found[scalar.name] = sizes.evaluate(scalar.value, found)
        return found

    @property
    def form(self) -> str:
        """How the sequences lie that it is for: ``"dense"``, ``"ragged"`` or ``"paged"``."""
        return FORM_OF_KIND.get(self.kind, DENSE)

    @property
    def values_in_keys(self) -> bool:
        """Whether values are the first elements of keys."""
        return self.kind == PAGED_LATENT

    @property
    def cache_dtype(self) -> str:
        """The dtype of keys and values: that of ``q``, or of 8 bits."""
        return CACHE_OF_KIND.get(self.kind, self.dtype)

    @property
    def layout(self) -> str:
        """Physical layout of the tensors that the symbol takes: ``"bhsd"`` or ``"bshd"``."""
        return LAYOUT_OF_TEMPLATE[self.template]


@dataclass(frozen=True)
class Manifest:
    """Contents of ``manifest.json``.

    ``cpu_features`` are the processor flags (as in ``/proc/cpuinfo``) without which the pack must not be loaded, and
    ``isa`` is their short name (``"avx512"``, ``"avx2"``, ``"baseline"``); both are empty for a CUDA pack.
    ``versions`` names the compilers: ``tvm``, ``tvm_ffi``, and ``cuda`` for a CUDA pack.
    ``support_files`` are further files of the pack that a module needs at load (the CPU's thread pool).
    """

    arch: str
    versions: dict[str, str]
    modules: tuple[ModuleFile, ...]
    kernels: tuple[KernelEntry, ...]
    isa: str = ""
    cpu_features: tuple[str, ...] = ()
    support_files: tuple[ModuleFile, ...] = ()
    created: str = ""
    schema: int = field(default=SCHEMA)

    def to_json(self) -> str:
        """The manifest as indented JSON text, keys in the order of the fields."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> Manifest:
        """Read a manifest.

        Raises
        ------
        ValueError: the text isn't JSON, has another schema, or lacks or adds a field.
        """
        raw = json.loads(text)
        if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
            found = raw.get("schema") if isinstance(raw, dict) else type(raw).__name__
            raise ValueError(f"manifest schema is {found!r}, expected {SCHEMA}")
        try:
            files = {key: tuple(ModuleFile(**m) for m in raw.pop(key)) for key in ("modules", "support_files")}
            kernels = tuple(KernelEntry.from_dict(k) for k in raw.pop("kernels"))
            return Manifest(**{**raw, **files, "kernels": kernels, "cpu_features": tuple(raw["cpu_features"])})
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            raise ValueError(f"manifest field missing or not understood: {e}") from e
