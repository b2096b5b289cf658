"""The operators that kernels compute: the tensors that each takes and gives, by the names that callers use.

The one table of them for calls: whatever handles a call asks it, and counts no tensors by hand.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from tvm_flash.packs import manifest

FORWARD, BACKWARD = "forward", "backward"

#: The same of sequences of different lengths that lie one after the other, which are also kinds of kernels.
RAGGED, RAGGED_BACKWARD = "ragged", "ragged_backward"

#: Attention over some of the keys, in float32, to be put together with that over others; also a kind of kernels.
PARTIAL = "partial"

#: The same put into what there is of others, in the memory of the call; also a kind of kernels.
MERGED = "merged"

#: Forward of such sequences whose keys lie on pages of a cache.
PAGED = "paged"

#: The same where values are the first elements of keys; also a kind of kernels.
PAGED_LATENT = manifest.PAGED_LATENT

#: The same with keys and values in 8 bits, and scales.
PAGED_SCALED = "paged_scaled"
SCALES = ("k_scale", "v_scale")

#: What comes before attention over a cache: new queries and keys are turned, new keys and values put into it.
APPEND = manifest.APPEND

#: The role (:mod:`tvm_flash.packs.manifest`) of a tensor that callers know by another name.
_ROLES = {"out": "o", "dout": "do", "k_cache": "k", "v_cache": "v", "kv_cache": "k"}
_ROLES |= {"turned": "o", "cu_seqlens_k_new": "cu_seqlens_k"}

#: Kind of the kernels that add to gradients which are there, in float32, instead of writing them.
ACCUMULATE = "backward_accumulate"


def role_of(name: str) -> str:
    """The role of a tensor that callers know by a name."""
    return _ROLES.get(name, name)


def gradient_of(name: str) -> str:
    """What the gradient of a parameter is called, as a tensor of a call and as a role."""
    return f"d_{name}"


@dataclass(frozen=True)
class Tensor:
    """A tensor of an operator.

    ``axes`` name its sizes in the order of the layout ``bhsd``; one of four lies in the layout of the call.  ``ragged``
    are those it has where sequences lie one after the other, or on pages.  ``dtype`` is empty for that of q.  One that
    is ``flat`` must be dense, and kernels take it as a vector.
    """

    axes: tuple[str, ...]
    ragged: tuple[str, ...]
    dtype: str = ""
    flat: bool = False


_QUERY, _KEY = ("batch", "heads", "seqlen_q"), ("batch", "kv_heads", "seqlen_kv")
_RAGGED_QUERY, _RAGGED_KEY = ("total_q", "heads"), ("total_k", "kv_heads")
_STARTS = Tensor((), ("starts",), "int32", flat=True)
_PAGES = ("pages", "page_size", "kv_heads")

#: The tensors of operators by name; a parameter of mask and score that isn't here has a value for each head.
TENSORS = {
    "q": Tensor((*_QUERY, "head_dim"), (*_RAGGED_QUERY, "head_dim")),
    "k": Tensor((*_KEY, "head_dim"), (*_RAGGED_KEY, "head_dim")),
    "v": Tensor((*_KEY, "head_dim_v"), (*_RAGGED_KEY, "head_dim_v")),
    "out": Tensor((*_QUERY, "head_dim_v"), (*_RAGGED_QUERY, "head_dim_v")),
    "lse": Tensor(_QUERY, ("heads", "total_q"), "float32", flat=True),
}
TENSORS |= {f"d{name}": TENSORS[name] for name in tuple(TENSORS)}
TENSORS |= {
    "cu_seqlens_q": _STARTS,
    "cu_seqlens_k": _STARTS,
    "k_cache": Tensor((), (*_PAGES, "head_dim")),
    "v_cache": Tensor((), (*_PAGES, "head_dim_v")),
    "kv_cache": Tensor((), (*_PAGES, "head_dim")),
    "seqlens_k": Tensor((), ("batch",), "int32", flat=True),
    "page_table": Tensor((), ("batch", "pages_per_sequence"), "int32"),
    **dict.fromkeys(SCALES, Tensor((), ("pages", "kv_heads"), "float32")),
    "turned": TENSORS["q"],
    "k_new": TENSORS["k"],
    "v_new": TENSORS["v"],
    "cu_seqlens_k_new": _STARTS,
    **dict.fromkeys(("cache_seqlens", "rotary_seqlens"), Tensor((), ("batch",), "int32", flat=True)),
    **dict.fromkeys(("rotary_cos", "rotary_sin"), Tensor((), ("positions", "half_of_rotary_dim"))),
}

#: The gradient of a parameter with a value for each head.
_PARAMETER_GRADIENT = Tensor(("batch", "heads"), ("batch", "heads"), "float32")


def tensor(name: str) -> Tensor:
    """What is known of a tensor of an operator, parameters apart."""
    return TENSORS.get(name, _PARAMETER_GRADIENT)


@dataclass(frozen=True)
class Operator:
    """One operator.

    Attributes
    ----------
    inputs: the tensors that a call must give, in order.
    outputs: the results that a call may bring memory for, in order; all are returned.
    flag: name of the option of its own; ``accumulate`` says that results are added to what is there, in float32.
    computes: the operator in a pack that kernels for it have.
    optional: further inputs, which a call may lack.
    starts: further inputs, which a call must give, wherever they lie in memory: where sequences of different lengths
        begin, how long they are, and on which pages.
    on_request: results that are returned after the others if the call asks for them, and can't be given.
    differentiates: whether it computes gradients, and so also those of parameters that ask for one.
    backward: the operator that computes its gradients.
    float32: the tensors that are float32 whatever q is.
    form: how its sequences lie in memory (:mod:`tvm_flash.packs.manifest`).
    values_in_keys: whether values are the first elements of keys, as many as an option of the call says.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    flag: str
    computes: str
    optional: tuple[str, ...] = ()
    starts: tuple[str, ...] = ()
    on_request: tuple[str, ...] = ()
    differentiates: bool = False
    backward: str = ""
    float32: tuple[str, ...] = ()
    form: str = manifest.DENSE
    values_in_keys: bool = False

    @property
    def all_inputs(self) -> tuple[str, ...]:
        """Every input but parameters of mask and score, in the order of a call."""
        return (*self.inputs, *self.optional, *self.starts)

    def tensors(self, parameters: Iterable[str], gradients: Iterable[str] = ()) -> tuple[str, ...]:
        """The tensors of its calls, in order, with those parameters of mask and score that are tensors.

        ``gradients`` names the parameters whose gradients are outputs too.
        """
        return (*self.all_inputs, *parameters, *self.all_outputs(gradients))

    def all_outputs(self, gradients: Iterable[str] = ()) -> tuple[str, ...]:
        """The outputs, with the gradients of the parameters that are named."""
        return (*self.outputs, *map(gradient_of, gradients))


_FORWARD = Operator(
    inputs=("q", "k", "v"),
    outputs=("out",),
    flag="return_lse",
    computes=FORWARD,
    on_request=("lse",),
    backward=BACKWARD,
)
_BACKWARD = Operator(
    inputs=("dout", "q", "k", "v", "out", "lse"),
    outputs=("dq", "dk", "dv"),
    flag="accumulate",
    computes=BACKWARD,
    optional=("dlse",),
    differentiates=True,
)
_SEQUENCES = ("cu_seqlens_q", "cu_seqlens_k")
_PAGED = replace(
    _FORWARD,
    inputs=("q", "k_cache", "v_cache"),
    starts=("cu_seqlens_q", "seqlens_k", "page_table"),
    backward="",
    form=manifest.PAGED,
)
OPERATORS = {
    FORWARD: _FORWARD,
    BACKWARD: _BACKWARD,
    PARTIAL: replace(_FORWARD, backward="", float32=("out",)),
    MERGED: replace(_FORWARD, outputs=("out", "lse"), flag="accumulate", on_request=(), backward=""),
    RAGGED: replace(_FORWARD, starts=_SEQUENCES, backward=RAGGED_BACKWARD, form=manifest.RAGGED),
    RAGGED_BACKWARD: replace(_BACKWARD, starts=_SEQUENCES, form=manifest.RAGGED),
    PAGED: _PAGED,
    PAGED_LATENT: replace(_PAGED, inputs=("q", "kv_cache"), values_in_keys=True),
    PAGED_SCALED: replace(_PAGED, starts=(*_PAGED.starts, *SCALES)),
    APPEND: Operator(
        inputs=("k_cache", "v_cache", "k_new", "v_new"),
        outputs=("turned",),
        flag="",
        computes=APPEND,
        optional=("q", "cu_seqlens_q", "rotary_seqlens", "rotary_cos", "rotary_sin", *SCALES),
        starts=("cu_seqlens_k_new", "cache_seqlens", "page_table"),
        form=manifest.PAGED,
    ),
}

#: The parameters of mask and score that are tensors, of calls with keys on pages.
PAGED_PARAMETERS = ("alibi_slopes", "sinks", "kv_start")

#: The layout of tensors in which sequences lie one after the other: ``(total, heads, head_dim)``.
RAGGED_LAYOUT = "shd"
