"""The checks of what users give: alone on each rank, and of what all ranks have said."""

from __future__ import annotations

import functools
import hashlib
import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.weak import WeakTensorKeyDictionary

from tvm_flash.call import checks
from tvm_flash.call.prepare import same_framework
from tvm_flash.call.problem import INT32_MAX
from tvm_flash.call.ragged import fault_of
from tvm_flash.catalogue import PARAMS
from tvm_flash.distributed.agreement import Axes
from tvm_flash.distributed.placement import BALANCES, Placement, size
from tvm_flash.distributed.plan import EXCHANGES
from tvm_flash.errors import ArgumentTypeError, InvalidArgumentError
from tvm_flash.frameworks.torch import is_wrapper


def check_order(mesh: DeviceMesh, balance: str, exchange: str) -> None:
    """That the order of positions is one that there is.

    Raises
    ------
    InvalidArgumentError
    """
    exchanges = ("auto", *EXCHANGES, "heads")
    for name, value, known in (("balance", balance, BALANCES), ("exchange", exchange, exchanges)):
        if value not in known:
            raise InvalidArgumentError(f"{name}: is {value!r}, expected one of {', '.join(map(repr, known))}")
    if exchange == "heads" and mesh.ndim != 1:
        raise InvalidArgumentError(
            "exchange: is 'heads' and the mesh has two axes, along the second of which heads are exchanged anyway; "
            "expected 'auto', 'gather' or 'ring', which say what is done along the first"
        )


#: A way to deal a sequence out: over how many outer and inner ranks, in which balance.
Way = tuple[int, int, str]

#: The ways in which this process has dealt out to the ranks of a mesh, and that in which it made a tensor.
_dealt: dict[tuple[int, ...], set[Way]] = {}
_way_of = WeakTensorKeyDictionary()


@torch.compiler.disable
def note_dealt(part: torch.Tensor, axes: Axes, balance: str) -> None:
    """Remember how a part of a sequence was dealt out, which its rows don't tell."""
    way = (*axes.dealt, balance)
    _dealt.setdefault(axes.ranks, set()).add(way)
    _way_of[part] = (axes.ranks, way)


def dealt_so_far(axes: Axes, *tensors: Any) -> list[list[Way]]:
    """What is known of the way in which tensors were dealt out to these ranks: lists, in each of which theirs must be.

    Of a tensor that is a part itself its way is known, and of those that were computed of such that it is one of those
    that this process has dealt out by, if it has.
    """
    known = [_way_of.get(x, ((), None)) for x in tensors if isinstance(x, torch.Tensor)]
    if own := [[way] for ranks, way in known if ranks == axes.ranks]:
        return own
    return [sorted(_dealt[axes.ranks])] if axes.ranks in _dealt else []


def agreed_placement(name: str, everything: list[dict[str, Any]], axes: Axes, balance: str) -> Placement:
    """How a sequence lies on the ranks, each of which has said its ``rows`` of it and what it ``dealt`` so far.

    Raises
    ------
    InvalidArgumentError: :func:`shard_sequence` would have given them others, or gave one of them others only.
    """
    rows = [said["rows"] for said in everything]
    placement = Placement(sum(rows), *axes.dealt, balance)
    for rank, found, expected in zip(axes.ranks, rows, _sizes_of_parts(placement), strict=True):
        if found != expected:
            raise InvalidArgumentError(
                f"{name}: has {found} rows on rank {rank}, expected {expected} of {sum(rows)} positions in all; use "
                f"tvm_flash.distributed.shard_sequence with the same mesh and balance={balance!r}"
            )
    for rank, said in zip(axes.ranks, everything, strict=True):
        for ways in said["dealt"]:
            if any(_same_order(sum(rows), tuple(way), (*axes.dealt, balance)) for way in ways):
                continue
            *sizes, other = ways[0]
            raise InvalidArgumentError(
                f"balance: is {balance!r} over {_in_words(axes.dealt)}, but shard_sequence on rank {rank} has dealt "
                f"out by balance={other!r} over {_in_words(sizes)}; expected the mesh and the balance "
                f"that {name} was dealt out by"
            )
    return placement


@functools.lru_cache(maxsize=64)
def _sizes_of_parts(placement: Placement) -> tuple[int, ...]:
    """How many rows each rank has, by its place in the mesh."""
    return tuple(map(size, placement.order()))


@functools.lru_cache(maxsize=64)
def _same_order(length: int, one: Way, other: Way) -> bool:
    return one == other or Placement(length, *one).order() == Placement(length, *other).order()


def _in_words(sizes: Sequence[int]) -> str:
    return f"{sizes[0]} ranks" if sizes[1] == 1 else f"{sizes[0]} × {sizes[1]} ranks"


def sizes_of(layout: str, q: Any, k: Any, v: Any) -> checks.Sizes:
    """The sizes of a rank's part.

    Raises
    ------
    TvmFlashError: it isn't what attention takes.
    """
    checks.check_layout(layout)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise ArgumentTypeError(f"{name}: is a {type(x).__qualname__}, expected a torch.Tensor")
        if is_wrapper(x):
            kind = "tensor on meta" if x.is_meta else type(x).__qualname__
            raise ArgumentTypeError(
                f"{name}: is a {kind}, expected a tensor with memory of its own, of this rank's rows"
            )
    framework = same_framework({"q": q, "k": k, "v": v})
    sizes = checks.check_tensors(layout, *(framework.view(x, name) for name, x in (("q", q), ("k", k), ("v", v))))
    if sizes.seqlen_q != sizes.seqlen_kv:
        raise InvalidArgumentError(
            f"k: has {sizes.seqlen_kv} rows, but q has {sizes.seqlen_q}; expected keys and queries of the same "
            f"positions"
        )
    return sizes


def document_ends(cu_seqlens: Any, batch: int) -> tuple[int, ...] | None:
    """Where documents end, without empty ones.

    Raises
    ------
    InvalidArgumentError
    """
    if cu_seqlens is None:
        return None
    if batch != 1:
        raise InvalidArgumentError(f"cu_seqlens: is given, and q has batch {batch}; expected a batch of one")
    try:
        starts = [operator.index(n) for n in (cu_seqlens.tolist() if hasattr(cu_seqlens, "tolist") else cu_seqlens)]
    except TypeError:
        starts = []
    if not starts:
        raise InvalidArgumentError(
            f"cu_seqlens: is {str(cu_seqlens)[:60]}, expected whole numbers, 0 first: where documents begin and the "
            f"last ends"
        )
    if fault := fault_of(starts, "q", INT32_MAX):
        raise InvalidArgumentError(f"cu_seqlens: {fault}")
    return tuple(b for a, b in itertools.pairwise(starts) if b > a)


def check_ends(ends: tuple[int, ...], length: int) -> None:
    """That documents lie within a sequence.

    Raises
    ------
    InvalidArgumentError
    """
    if ends[-1:] > (length,):
        raise InvalidArgumentError(f"cu_seqlens: ends with {ends[-1]}, expected at most the {length} positions of q")


def in_short(ends: tuple[int, ...] | None) -> list[int] | None:
    """What is said of documents to other ranks, who have their own to compare."""
    return None if ends is None else list(ends) if len(ends) <= 16 else [len(ends), hash(ends)]


def values_in_short(x: torch.Tensor | None) -> str | None:
    """What is said of a parameter's values to other ranks.

    It waits for the device, some 50 µs beside calls that take milliseconds; while a graph is captured there is nothing
    to wait for, and values may change later: then it says the shape.
    """
    if x is None:
        return None
    what = f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return what
    values = x.detach().cpu().numpy().tobytes()
    return f"{what} with sha256 {hashlib.sha256(values).hexdigest()[:12]}…"


def checked_parameter(name: str, x: Any, q: torch.Tensor, sizes: checks.Sizes) -> torch.Tensor | None:
    """A parameter with a value for each head, or one for all of them, as one with a value for each.

    Raises
    ------
    TvmFlashError: it isn't that.
    """
    if x is None:
        return None
    framework = same_framework({"q": q, name: x})
    checks.check_parameter(PARAMS[name], framework.view(x, name), sizes, framework.view(q, "q"))
    return x if x.shape[-1] == sizes.heads else x.expand(*x.shape[:-1], sizes.heads)
