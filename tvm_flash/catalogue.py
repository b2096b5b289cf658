"""The masks and scores of the package's own definition: what each takes at run time, and which others compute it too.

The one table of them for calls.  Their expressions are in ``schedules/definition/catalogue.py``, which has its
parameters from here, and their numpy twins in :mod:`tvm_flash.reference`, all by the same names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tvm_flash.packs.manifest import AS_Q, Param
from tvm_flash.packs.sizes import Expression

#: The run-time parameters by name.  One ``per_head`` is a tensor, and its name an argument of a public function.  What
#: some mask or score has in the dtype of q, as rows below say with ``:q``, is here as it is else.
PARAMS: Mapping[str, Param] = {
    p.name: p
    for p in (
        Param("softcap", "float32"),
        Param("alibi_slopes", "float32", per_head=True, gradient=True),
        Param("has_alibi_slopes", "int32"),
        Param("sinks", "float32", per_head=True, gradient=True),
        Param("has_sinks", "int32"),
        Param("window_left", "int32"),
        Param("window_right", "int32"),
        Param("sink_tokens", "int32"),
        Param("kv_start", "int32", per_head=True),
        Param("kv_end", "int32", per_head=True),
        Param("query_start", "int32", per_head=True),
        Param("has_query_start", "int32"),
        Param("visible", "bool", axes="bhij"),
        Param("bias", "float32", axes="bhij", gradient=True),
    )
}

#: Parameters that are tensors.
TENSORS: Mapping[str, Param] = {name: p for name, p in PARAMS.items() if p.is_tensor}

#: Of these, what a kernel can do without: such a one has a number beside it, ``has_`` and its name, 0 if it is missing.
OPTIONAL = tuple(name for name in TENSORS if f"has_{name}" in PARAMS)

#: Parameters that GPU packs have kernels of the usual head dimensions for, and what does the same without them.
INSTEAD: Mapping[str, str] = {
    "sinks": "multiply the result without them by sigmoid(lse - sinks)",
    "visible": "use PyTorch's own function",
    "bias": "use PyTorch's own function",
}

#: What stands for a parameter that a call lacks in a kernel that stands in: an expression of the problem's sizes.
DEFAULTS: Mapping[str, Expression] = {"kv_start": 0, "kv_end": "seqlen_kv"}


@dataclass(frozen=True)
class Kind:
    """A mask or a score.

    Attributes
    ----------
    params: its run-time parameters, in the order of a kernel's arguments.
    stand_ins: what computes it, the cheapest first: itself, then others (given wide enough windows, no soft cap, …).
    """

    params: tuple[Param, ...]
    stand_ins: tuple[str, ...]


def _param(text: str) -> Param:
    name, _, dtype = text.partition(":")
    return replace(PARAMS[name], dtype=dtype) if dtype else PARAMS[name]


def _kinds(**rows: tuple[str, tuple[str, ...]]) -> Mapping[str, Kind]:
    return {name: Kind(tuple(map(_param, params.split())), (name, *others)) for name, (params, others) in rows.items()}


MASKS: Mapping[str, Kind] = _kinds(
    full=("", ("window", "positioned")),
    causal=("", ("window", "positioned")),
    window=("window_left window_right", ("positioned",)),
    sink_window=("window_left window_right sink_tokens", ()),
    padded=("window_left window_right kv_start kv_end", ("positioned",)),
    positioned=("window_left window_right kv_start kv_end has_query_start query_start", ()),
    given=("visible", ()),
)

SCORES: Mapping[str, Kind] = _kinds(
    identity=("", ("optional", "optional_sinks")),
    softcap=("softcap", ("optional", "optional_sinks")),
    alibi=("alibi_slopes", ("optional", "optional_sinks")),
    softcap_alibi=("softcap alibi_slopes", ("optional", "optional_sinks")),
    optional=("softcap has_alibi_slopes alibi_slopes", ("optional_sinks",)),
    identity_sinks=("sinks", ("optional_sinks",)),
    optional_sinks=("softcap has_alibi_slopes alibi_slopes has_sinks sinks", ()),
    biased=("bias", ()),
    biased_16=(f"bias:{AS_Q}", ()),
)

#: Scores of kernels of 16 bits alone: beside float32 each is the same as another.
OF_16_BITS = ("biased_16",)


def score_of(softcap: bool, alibi_slopes: bool, sinks: bool = False, bias: str = "") -> str:
    """The cheapest score with these options; ``bias`` is the dtype of a bias, if there is one."""
    if sinks:
        return "optional_sinks" if softcap or alibi_slopes else "identity_sinks"
    if bias:
        return "biased" if bias == PARAMS["bias"].dtype else "biased_16"
    wanted = (("softcap",) if softcap else ()) + (("alibi_slopes",) if alibi_slopes else ())
    return next(name for name, kind in SCORES.items() if tuple(p.name for p in kind.params) == wanted)
