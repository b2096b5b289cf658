"""The kinds of kernels that are tuned, and what problems each is for.

A further kind is a row of ``KINDS``; one whose sequences lie in another way also a row of
:data:`schedules.tuning.forms.FORMS`, and a word in :mod:`tvm_flash.measure.workloads`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from operator import attrgetter

from schedules.builder.records import Measurement
from schedules.builder.suite import HEAD_DIMS, HEAD_DIMS_BETWEEN, ONE_TEMPLATE, SCOPES, HeadDim, KernelSpec, Selection
from schedules.families import further_sizes
from schedules.families.interface import (
    BACKWARD,
    DECODE,
    FORWARD,
    PAGED,
    PAGED_DECODE,
    PAGED_DECODE_ANY,
    RAGGED,
    RAGGED_BACKWARD,
    Target,
)
from tvm_flash.catalogue import MASKS, SCORES
from tvm_flash.measure.workloads import Workload
from tvm_flash.packs import sizes
from tvm_flash.packs.manifest import BUILTIN_DEFINITION, DENSE, FORM_OF_KIND, KernelEntry

#: Whether a kind computes gradients.  The first for a problem is tuned unless another is asked for by name.  Kernels
#: for parts and those that add to gradients have the configurations of the usual ones, and aren't tuned.
KINDS = {
    FORWARD: False,
    DECODE: False,
    BACKWARD: True,
    RAGGED: False,
    RAGGED_BACKWARD: True,
    PAGED: False,
    PAGED_DECODE: False,
    PAGED_DECODE_ANY: False,
}


def has_buckets(kind: str) -> bool:
    """Whether there may be several kernels by length: not where a sequence must get its bits in any batch."""
    return kind not in ONE_TEMPLATE


def serves(kind: str, workload: Workload) -> bool:
    """Whether a problem is one of a kind's."""
    return (FORM_OF_KIND.get(kind, DENSE), KINDS[kind]) == (workload.form, workload.backward)


def of(workload: Workload, asked: Iterable[str] = ()) -> tuple[str, ...]:
    """The kinds that are tuned for a problem: those of ``asked`` that are for it, or else the usual one."""
    found = tuple(kind for kind in KINDS if serves(kind, workload))
    return tuple(kind for kind in found if kind in asked) if asked else found[:1]


def problem_of(kind: str, workload: Workload) -> Workload:
    """The problem of a kind that has the sizes of another one."""
    return replace(workload, form=FORM_OF_KIND.get(kind, DENSE), backward=KINDS[kind])


def spec_for(kind: str, template: str, workload: Workload, target: Target) -> KernelSpec:
    """The kernel that would run a workload, in a pack with the core set.

    Its mask and score are the cheapest of the kind that will do, its head_dim the smallest of the target's that holds
    the workload's; where the core set has none, they are the workload's own.
    """
    gpu = target.arch != "cpu"
    core = Selection().variants(kind, gpu)
    pairs = ((mask, score) for mask in MASKS[workload.mask].stand_ins for score in SCORES[workload.score].stand_ins)
    mask, score = next((pair for pair in pairs if pair in core), (workload.mask, workload.score))
    between = gpu and SCOPES[kind].between and score == "identity" and mask != "padded"
    own = (HeadDim(*d) for d in further_sizes(target).get(kind, {}).get((mask, score), ()))
    known = (*HEAD_DIMS, *(HEAD_DIMS_BETWEEN if between else ()), *own)
    dims = [d for d in known if d.qk >= workload.head_dim and d.v >= workload.head_dim_v]
    dim = min(dims, key=lambda d: (d.qk, d.v), default=HeadDim(workload.head_dim, workload.head_dim_v))
    return KernelSpec(template, BUILTIN_DEFINITION, mask, score, workload.dtype, dim.qk, dim.v, kind=kind)


_OF_A_KERNEL = attrgetter("template", "dtype", "head_dim", "head_dim_v", "mask", "score")


def kernel_of(record: Measurement) -> tuple:
    """What says which kernel a record is of, in whatever configuration and for whatever length."""
    return record.kernel_kind, *_OF_A_KERNEL(record)


def kernel_of_spec(spec: KernelSpec) -> tuple:
    """The same of a spec."""
    return spec.kind, *_OF_A_KERNEL(spec)


def has_room(entry: KernelEntry, workload: Workload) -> bool:
    """Whether a kernel takes as many query rows a key as a problem has."""
    of = workload.sizes
    return entry.max_rows is None or of["rows"] <= sizes.evaluate(entry.max_rows, of)


def templates_of(kind: str, templates: Iterable[str], known: Iterable[str]) -> list[str]:
    """Those of ``templates`` of which a family that knows ``known`` has kernels of a kind."""
    known = tuple(known)
    return [t for t in templates if t in (known[-1:] if kind in ONE_TEMPLATE else known)]
