"""Hugging Face diffusers: ``use(model)``, or the attention backend ``"tvm_flash"``, which importing this makes known.

Models of today ask diffusers' dispatcher, which takes the backend's name (``model.set_attention_backend``, the context
manager ``diffusers.attention_backend``).  Those before have an attention processor in each layer, and some layers
call torch's attention by themselves: :func:`use` finds all of them.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from diffusers.models import attention_processor as processors
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch.overrides import TorchFunctionMode

from tvm_flash.errors import NotSupportedError
from tvm_flash.nn.sdpa import FallbackWarning, scaled_dot_product_attention

try:
    from diffusers.models import attention_dispatch
except ImportError:  # before 0.35
    attention_dispatch = None

#: The name of the attention backend.
NAME = "tvm_flash"

_TORCH = torch.nn.functional.scaled_dot_product_attention


def _kinds(*names: str) -> tuple[type, ...]:
    return tuple(getattr(processors, name) for name in names if hasattr(processors, name))


#: What :class:`TvmFlashAttnProcessor` computes likewise, and what the processor with keys of a text does.
_PLAIN = (AttnProcessor, AttnProcessor2_0, *_kinds("SlicedAttnProcessor", "XFormersAttnProcessor"))
#: The latter, unless a layer has another scale than the usual one, or heads of another width in all than its channels,
#: which that processor doesn't know.
_ADDED = _kinds("AttnAddedKVProcessor", "SlicedAttnAddedKVProcessor", "XFormersAttnAddedKVProcessor")


def use(model: Any) -> int:
    """Have every attention layer of a model, or of each model of a pipeline, computed here; how many there are.

    Layers that compute attention in a way of their own keep it, and a :class:`FallbackWarning` names them.

    Raises
    ------
    NotSupportedError: there is none that can be.
    """
    models = [model]
    if isinstance(getattr(model, "components", None), dict):
        models = [x for x in model.components.values() if isinstance(x, torch.nn.Module)]
    reached, left = 0, set()
    for layer in {id(x): x for m in models for x in m.modules()}.values():
        changed = _change(layer)
        reached += bool(changed)
        if changed is False:
            left.add(type(layer.processor).__name__)
    if not reached:
        raise NotSupportedError(
            f"model: {type(model).__name__} has no attention layer that can be computed here"
            f"{' (' + ', '.join(sorted(left)) + ')' if left else ''}; leave it as it is"
        )
    if left:
        text = f"diffusers: layers with {', '.join(sorted(left))} of {type(model).__name__} keep their own attention"
        warnings.warn(text, FallbackWarning, stacklevel=2)
    return reached


def _change(layer: torch.nn.Module) -> bool | None:
    """Whether a layer is computed here from now on; None if it isn't one of attention."""
    processor = getattr(layer, "processor", None)
    if hasattr(layer if processor is None else processor, "of_tvm_flash"):
        return True
    if processor is None:
        if not _calls_torch(type(layer).forward):
            return None
        layer.__class__ = _redirected(type(layer), "forward")
        return True
    if hasattr(processor, "_attention_backend"):
        if NAME not in getattr(processor, "_SUPPORTED_BACKENDS", (NAME,)):
            return False  # it makes a mask that these alone take
        processor._attention_backend = _backend()
    elif type(processor) in _PLAIN and isinstance(layer, Attention):
        layer.processor = TvmFlashAttnProcessor(by_layer=type(processor) is not AttnProcessor2_0)
    elif type(processor) in _ADDED and layer.scale_qk and layer.inner_dim == layer.query_dim:
        layer.processor = _redirected(processors.AttnAddedKVProcessor2_0, "__call__")()
    elif _calls_torch(type(processor).__call__):
        processor.__class__ = _redirected(type(processor), "__call__")
    else:
        return False
    return True


def _calls_torch(function: Any) -> bool:
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    code = getattr(function, "__code__", None)
    return code is not None and _TORCH.__name__ in code.co_names


class _Mode(TorchFunctionMode):
    """Within it, torch's attention is ours."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is _TORCH:
            with torch._C.DisableTorchFunction():
                return scaled_dot_product_attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@functools.cache
def _redirected(cls: type, method: str) -> type:
    """A class that differs from another only in that torch's attention, which its method calls, is ours."""
    original = getattr(cls, method)

    @functools.wraps(original)  # layers ask for its signature, and hand on what it takes
    def redirected(*args: Any, **kwargs: Any) -> Any:
        with _Mode():
            return original(*args, **kwargs)

    def __reduce__(self):
        return _rebuild, (cls, method, self.__dict__)

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "of_tvm_flash": True}
    return type(cls.__name__, (cls,), {**names, method: redirected, "__reduce__": __reduce__})


def _rebuild(cls: type, method: str, state: dict[str, Any]) -> Any:
    made = object.__new__(_redirected(cls, method))
    made.__dict__.update(state)
    return made


# ---------------------------------------------------------------- the dispatcher


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> torch.Tensor:
    """The backend's function: tensors and result are ``(batch, seq, heads, head_dim)``, as the dispatcher has them.

    Raises
    ------
    NotSupportedError: the log-sum-exp or context parallelism is asked for.
    """
    for name, x in (("return_lse", return_lse or None), ("_parallel_config", _parallel_config)):
        if x is not None:
            raise NotSupportedError(
                f"{name}: isn't supported by the backend {NAME!r}; use set_attention_backend('native')"
            )
    if attn_mask is not None and attn_mask.ndim == 2 and attn_mask.shape == (query.shape[0], key.shape[1]):
        attn_mask = attn_mask[:, None, None]  # over keys
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    out = scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return out.transpose(1, 2)


def register() -> None:
    """Make ``set_attention_backend("tvm_flash")`` known to diffusers; importing this module does it."""
    if attention_dispatch is None or NAME in attention_dispatch.AttentionBackendName._value2member_map_:
        return
    names = attention_dispatch.AttentionBackendName
    member = str.__new__(names, NAME)
    member._name_, member._value_ = NAME.upper(), NAME
    names._member_map_[member._name_] = names._value2member_map_[NAME] = member
    names._member_names_.append(member._name_)
    type.__setattr__(names, member._name_, member)
    registry = attention_dispatch._AttentionBackendRegistry
    registry.register(member, constraints=[attention_dispatch._check_device, attention_dispatch._check_shape])(
        attention
    )


def _backend() -> Any:
    return attention_dispatch.AttentionBackendName(NAME)


register()


# ---------------------------------------------------------------- processors


class TvmFlashAttnProcessor:
    """One attention layer: projections, attention, output projection, as ``AttnProcessor2_0`` computes them.

    ``by_layer`` is for what the processors before that one compute: they scale scores by the layer's ``scale``, which
    it doesn't know, and leave out the layer's ``norm_q`` and ``norm_k``, which it doesn't.
    """

    of_tvm_flash = True

    def __init__(self, by_layer: bool = False):
        self.by_layer = by_layer

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Self-attention of ``hidden_states``, or cross-attention to ``encoder_hidden_states``.

        ``hidden_states`` and the result are ``(batch, seq, channels)`` or images ``(batch, channels, height, width)``.
        """
        x = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
        image = x.shape[2:] if x.ndim == 4 else None
        x = x.flatten(2).transpose(1, 2) if image else x  # (batch, seq, channels)
        batch = x.shape[0]
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        context = x if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        if attention_mask is not None:  # comes as (batch * heads, 1 or seq, keys)
            shared = attention_mask.shape[0] == batch
            attention_mask = attn.prepare_attention_mask(attention_mask, context.shape[1], batch)
            attention_mask = attention_mask.reshape(batch, attn.heads, -1, attention_mask.shape[-1])
            attention_mask = attention_mask[:, :1] if shared else attention_mask
        q, k, v = (
            projection(source).unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (batch, heads, seq, head_dim)
            for projection, source in ((attn.to_q, x), (attn.to_k, context), (attn.to_v, context))
        )
        if not self.by_layer:
            q = q if attn.norm_q is None else attn.norm_q(q)
            k = k if attn.norm_k is None else attn.norm_k(k)
        scale = attn.scale if self.by_layer else None
        out = scaled_dot_product_attention(q, k, v, attention_mask, scale=scale)
        out = out.transpose(1, 2).flatten(2).to(q.dtype)
        for layer in attn.to_out:  # projection, dropout
            out = layer(out)
        if image:
            out = out.transpose(1, 2).unflatten(2, image)
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor
