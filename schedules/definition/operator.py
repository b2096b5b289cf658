"""What an operator is to whoever derives or reads one: its arguments, its blocks, and what writes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm.tirx import PrimFunc

from schedules.definition.blocks import Formula
from tvm_flash.packs.manifest import APPEND_ROLES

#: Further arguments of ``partial``: numbers of the keys where it begins, and before which it ends.
KEY_RANGE = ("first_key", "last_key")

#: Arguments of the operators over sequences of different lengths: where each begins among all queries, and among all
#: keys, int32 ``(batch + 1,)``; the last element is where the last sequence ends.
STARTS = ("cu_seqlens_q", "cu_seqlens_k")

#: Arguments of an operator whose keys lie on pages: how many keys each sequence has, int32 ``(batch,)``, and on which
#: pages, int32 ``(batch, pages_per_sequence)``.
PAGES = ("seqlens_k", "page_table")

#: Arguments of one whose keys and values have 8 bits: what elements of a page and head are multiplied with, float32
#: ``(pages, kv_heads)``.
SCALES = ("k_scale", "v_scale")

#: Arguments of the operators that append to a cache, tensors and then numbers; scales stand between the two.
APPENDED = tuple(role for role in APPEND_ROLES[:-3] if role not in SCALES)
TURNS = ("turns", "along")


@dataclass(frozen=True)
class Symbols:
    """What a function is written with besides its own arguments: parameters, gradients and scalars by name.

    ``cache`` is the dtype of keys and values where it isn't that of queries.
    """

    parameters: dict
    gradients: dict
    scalars: dict
    cache: str = ""


@dataclass(frozen=True)
class Operator:
    """One operator.

    Attributes
    ----------
    arguments: the roles of its tensors and of ``softmax_scale``, in order; then come ``scalars``, int32 numbers, then
        the run-time parameters, then their gradients.
    blocks: the names of its blocks, in order; one for each gradient of a parameter follows, ``d_`` and its name.
    write: makes the function with its ``arguments``, those that follow being given as symbols.
    has_scores: whether it computes scores, and so has run-time parameters.
    of_sink: further blocks where there is a sink.
    """

    arguments: tuple[str, ...]
    blocks: tuple[str, ...]
    write: Callable[[Formula, Symbols], PrimFunc]
    scalars: tuple[str, ...] = ()
    has_scores: bool = True
    has_gradients: bool = False
    of_sink: tuple[str, ...] = ()
