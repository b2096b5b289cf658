"""What the two templates and the arch families agree on: target, traversal, program, refusal.

A template (``v1.py``, ``v2.py``) chooses the traversal: in which order row tiles are visited, and in which physical
layout.  A family (``families/``) knows the machine: how tiles are copied and multiplied, where an accumulator element
sits.  It is a module with

* ``DTYPES``: the element types it can compute, ``TEMPLATES``: the templates it serves, ``Config``: its frozen
  dataclass of schedule parameters, ``INDEX_DTYPE``: the index type that definitions for it should have;
* ``default_configs(template, pattern, target) -> {bucket: Config}``: bucket 0 always, and further ones where a longest
  sequence of at least that many keys is better served by another configuration;
* ``further_tiles(pattern, config) -> {block_m: Config}``, if there are further kernels beside a default one, which
  differ in the height of work tiles and give the same bits: the run time chooses (:mod:`tvm_flash.call.waves`);
* ``space(template, pattern, target) -> {field of Config: values worth trying}``, for tuning;
* ``feasible(pattern, config, target) -> Rejected | None``, before anything is compiled;
* ``program(pattern, config, target, traversal, name) -> Program``;
* ``KINDS``, if it makes kernels of other kinds than the usual one, each a module (or object) with ``Config``,
  ``default_configs``, ``space``, ``feasible`` and ``program`` as above, by name: :data:`DECODE` splits the keys for few
  rows.  :func:`schedules.families.maker_of` finds them.  Those that no hardware has run yet are in
  ``UNVERIFIED_KINDS``, and are built only if they are asked for by name; so are those of the sizes that
  ``UNVERIFIED_HEAD_DIMS`` has by kind, pairs of head_dim and head_dim_v, and those for usual sizes of the masks and
  scores that ``UNVERIFIED_VARIANTS`` has by kind.  ``FURTHER_SIZES`` are those for which a family has kernels where
  others have none.
* ``TENSOR_KINDS``, ``SINK_KINDS``: which kinds of its kernels, the usual one included, read parameters that are tables
  or tensors over other axes than heads, and which have sinks; none if it doesn't say.  ``TABLE_KINDS``: which read
  tables, and tensors over batch entries and heads, but none over queries or keys: those of sequences of different
  lengths.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tvm.ir import PrimType
from tvm.tirx import PrimFunc

from schedules.definition.operator import SCALES
from tvm_flash.packs import manifest, sizes
from tvm_flash.packs.manifest import SCALED_KINDS, Argument, Param, Scalar, Workspace

#: Kinds of kernels: the usual one; the one for few query rows, with the keys split among blocks; that of gradients.
FORWARD, DECODE, BACKWARD = "forward", "decode", "backward"
#: That of results in float32, to be put together with those of other keys.
PARTIAL = "partial"
#: That of results that are put into float32 ones of other keys.
MERGED = "merged"
#: That of ragged sequences, whose tensors have no batch axis.
RAGGED = "ragged"
#: That of their gradients.
RAGGED_BACKWARD = "ragged_backward"
#: Those of such sequences whose keys lie on pages: the usual one, and the one that splits the keys for few query rows.
PAGED, PAGED_DECODE = "paged", "paged_decode"
#: The latter for pages of any size, where a family's fastest are for some sizes only.
PAGED_DECODE_ANY = "paged_decode_any"
#: That of such sequences where values are the first elements of keys, for few query rows.
PAGED_LATENT = manifest.PAGED_LATENT
#: The same with keys and values in 8 bits, by the dtype of the cache.
PAGED_SCALED, PAGED_DECODE_SCALED = (SCALED_KINDS[kind] for kind in (PAGED, PAGED_DECODE))
#: That of what is turned and put into a cache before attention.
APPEND = manifest.APPEND
#: That of gradients in float32 that are added to what is there.
BACKWARD_ACCUMULATE = "backward_accumulate"
#: Those of sequences of different lengths.
OF_SEQUENCES = (RAGGED, RAGGED_BACKWARD, PAGED, PAGED_DECODE, PAGED_DECODE_ANY, PAGED_LATENT)
OF_SEQUENCES += (*PAGED_SCALED.values(), *PAGED_DECODE_SCALED.values())
#: The kinds of gradients.
GRADIENT_KINDS = (BACKWARD, BACKWARD_ACCUMULATE, RAGGED_BACKWARD)

#: Masks and scores of whole tensors, as torch's attention takes them, and those with a sink.
WITH_TENSORS = (("given", "identity"), ("full", "biased"), ("full", "biased_16"))
WITH_SINKS = (("positioned", "optional_sinks"), ("window", "optional_sinks"))
#: What a backward of five products can have a kernel of its own for; where there is none, the former serve it.
CAUSAL_WITH_SINKS = ("causal", "identity_sinks")


@dataclass(frozen=True)
class Target:
    """What a kernel is compiled for: ``"cpu"`` with an instruction set, or a CUDA arch such as ``"sm_90a"``.

    ``isa`` names one of ``families.cpu.ISAS`` and is empty for CUDA.
    """

    arch: str
    isa: str = ""

    @property
    def folder(self) -> str:
        """Name of its pack's folder: a machine takes the best of the CPU packs that it can run."""
        return f"{self.arch}-{self.isa}" if self.isa else self.arch

    def __str__(self) -> str:
        return f"{self.arch} ({self.isa})" if self.isa else self.arch


@dataclass(frozen=True)
class Rejected:
    """Why a template can't make a kernel."""

    reason: str


@dataclass(frozen=True)
class ScheduledLaunch:
    """One function of a program, and the role of each of its parameters, in order.

    The function's global symbol is the launch's.  Roles, and ``when``, are those of :mod:`tvm_flash.packs.manifest`.
    """

    func: PrimFunc
    roles: tuple[str, ...]
    when: str = ""

    def __post_init__(self):
        if len(self.func.params) != len(self.roles):
            raise ValueError(f"{self.symbol}: has {len(self.func.params)} parameters for the roles {self.roles}")

    @property
    def symbol(self) -> str:
        return self.func.attrs["global_symbol"]

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """The parameters as the manifest names them: ranks and dtypes are the function's own."""
        types = [x.ty for x in self.func.params]
        ranks = [0 if isinstance(t, PrimType) else len(t.shape) for t in types]
        return tuple(Argument(r, n, str(t.dtype)) for r, n, t in zip(self.roles, ranks, types, strict=True))


@dataclass(frozen=True)
class Program:
    """A scheduled kernel, ready to be compiled.

    ``op`` is the operator that ``launches`` compute, in order; the first has the kernel's name, the others that name
    with a suffix.  ``workspaces``, ``scalars``, ``max_rows``, ``meant_for``, ``alignment`` (bytes),
    ``index_bits`` and ``narrow_axes`` are as in the manifest.  ``pipeline`` is the lowering that the functions need:
    ``"s_tir"`` or ``"tirx"``.
    """

    op: str
    launches: tuple[ScheduledLaunch, ...]
    pipeline: str
    alignment: int
    index_bits: int
    workspaces: tuple[Workspace, ...] = ()
    scalars: tuple[Scalar, ...] = ()
    max_rows: sizes.Expression | None = None
    meant_for: sizes.Expression | None = None
    narrow_axes: tuple[sizes.Expression, ...] = ()

    def __post_init__(self):
        named = [x.name for x in (*self.workspaces, *self.scalars)]
        taken = {role for launch in self.launches for role in launch.roles}
        if not {x.when for x in self.launches if x.when} <= taken:
            raise ValueError(f"no launch of {taken} takes the number that says whether another is needed")
        if len(set(named)) < len(named) or not {w.name for w in self.workspaces} <= taken:
            raise ValueError(f"workspaces and scalars {named} must have different names, and launches {taken} use them")

    @property
    def functions(self) -> dict[str, PrimFunc]:
        """The functions by symbol, as ``tvm.IRModule`` takes them."""
        return {launch.symbol: launch.func for launch in self.launches}


def forward_roles(params: Iterable[Param]) -> tuple[str, ...]:
    """The roles of a forward kernel with a single launch, in order."""
    return ("q", "k", "v", "o", "lse", "softmax_scale", *(p.name for p in params))


def forward_program(
    func: PrimFunc,
    params: Iterable[Param],
    pipeline: str,
    *,
    alignment: int,
    index_bits: int,
    narrow_axes: tuple[sizes.Expression, ...] = (),
) -> Program:
    """Attention in one launch."""
    launches = (ScheduledLaunch(func, forward_roles(params)),)
    return Program("forward", launches, pipeline, alignment, index_bits, narrow_axes=narrow_axes)


def ragged_program(
    func: PrimFunc, params: Iterable[Param], pipeline: str, *, alignment: int, index_bits: int
) -> Program:
    """Attention of ragged sequences in one launch."""
    starts = ("cu_seqlens_q", "cu_seqlens_k")
    roles = ("q", "k", "v", "o", "lse", *starts, "softmax_scale", *(p.name for p in params))
    return Program("forward", (ScheduledLaunch(func, roles),), pipeline, alignment, index_bits)


def paged_program(
    func: PrimFunc,
    params: Iterable[Param],
    pipeline: str,
    *,
    alignment: int,
    index_bits: int,
    scaled: bool = False,
    in_keys: bool = False,
) -> Program:
    """Attention of ragged sequences over keys on pages, in one launch; with scales if those are ``scaled``, without v
    if values are ``in_keys``."""
    where = ("cu_seqlens_q", "seqlens_k", "page_table", *(SCALES if scaled else ()))
    roles = ("q", "k", *(() if in_keys else ("v",)), "o", "lse", *where, "softmax_scale", *(p.name for p in params))
    return Program("forward", (ScheduledLaunch(func, roles),), pipeline, alignment, index_bits)
