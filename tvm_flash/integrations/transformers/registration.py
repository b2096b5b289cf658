"""Making ourselves known to transformers, under names that it takes everywhere."""

from __future__ import annotations

import functools
import sys
import warnings
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, modeling_utils
from transformers.utils import generic

from tvm_flash.integrations.transformers import batching
from tvm_flash.integrations.transformers.attention import attention_forward
from tvm_flash.integrations.transformers.masks import make_mask
from tvm_flash.integrations.transformers.models import findings, note_reader, reads_masks
from tvm_flash.nn.sdpa import FallbackWarning

#: The name for ``attn_implementation``, and the one from before, which means the same.
NAME = "tvm"
OLD_NAME = "tvm_flash"

#: What a model says that is ready for other attention than eager.
_DECLARED = ("_supports_sdpa", "_supports_flash_attn", "_supports_flash_attn_2", "_supports_attention_backend")

_names: set[str] = set()
_told: set[tuple[type, str]] = set()


def register(name: str | None = None) -> None:
    """Make ``attn_implementation="tvm"`` (and ``"tvm_flash"``) known to transformers; importing this module does it.

    ``name`` is a further name for the same.
    """
    for one in (NAME, OLD_NAME, *(() if name is None else (name,))):
        _names.add(one)
        AttentionInterface.register(one, attention_forward)
        AttentionMaskInterface.register(one, make_mask)
    _settle_in()


class Registration:
    """Kept by each model, so that a process which a model is sent to registers its attention before it is used.

    ``reader`` is the name of its configuration's class if the model looks into its masks.
    """

    def __init__(self, name: str, reader: str | None = None):
        self.name, self.reader = name, reader

    def __reduce__(self):
        return _registered, (self.name, self.reader)


def _registered(name: str, reader: str | None = None) -> Registration:
    register(name)
    if reader is not None:
        note_reader(reader)
    return Registration(name, reader)


def _settle_in() -> None:
    """Have transformers ask us about our names, once."""
    if getattr(PreTrainedModel.get_correct_attn_implementation, "of_tvm_flash", False):
        return
    PreTrainedModel.get_correct_attn_implementation = _choosing(PreTrainedModel.get_correct_attn_implementation)
    # transformers takes every name with "flash" in it for the package flash_attn or one like it.
    if hasattr(modeling_utils, "lazy_import_flash_attention"):
        modeling_utils.lazy_import_flash_attention = _unless_ours(modeling_utils.lazy_import_flash_attention)
    batching.settle_in(_names)
    if original := getattr(generic, "is_flash_attention_requested", None):
        for module in list(sys.modules.values()):
            name = getattr(module, "__name__", "") or ""
            if name.startswith("transformers.") and vars(module).get(original.__name__) is original:
                batched = name.startswith("transformers.generation.continuous_batching.")
                setattr(module, original.__name__, _is_flash(original, ours=batched))


def _unless_ours(lazy_import: Any) -> Any:
    @functools.wraps(lazy_import)
    def import_flash_attention(implementation, *args, **kwargs):
        return None if implementation in _names else lazy_import(implementation, *args, **kwargs)

    return import_flash_attention


def _is_flash(original: Any, ours: bool) -> Any:
    """Whether flash_attn is asked for; in continuous batching our names are, which asks for packed sequences."""

    @functools.wraps(original)
    def is_flash_attention_requested(config=None, requested_attention_implementation=None, version=None):
        asked = requested_attention_implementation if config is None else config._attn_implementation
        if asked in _names:
            return ours and version is None
        return original(config, requested_attention_implementation, version)

    return is_flash_attention_requested


def _choosing(original: Any) -> Any:
    @functools.wraps(original)
    def get_correct_attn_implementation(self, requested_attention, *args, **kwargs):
        if requested_attention not in _names:
            return original(self, requested_attention, *args, **kwargs)
        if _can_ask(self, requested_attention):
            reader = type(self.config).__name__ if reads_masks(self.config) else None
            self.__dict__["_tvm_flash"] = Registration(requested_attention, reader)
            return requested_attention
        return original(self, None, *args, **kwargs)

    get_correct_attn_implementation.of_tvm_flash = True
    return get_correct_attn_implementation


def _can_ask(model: PreTrainedModel, name: str) -> bool:
    """Whether a model's layers will call us; if not, or not all of them, a warning says what computes them."""
    found = findings(type(model))
    if found.own or found.reads:
        note_reader(type(model.config).__name__)
    parts = any(getattr(model.config, part, None) is not None for part in getattr(model.config, "sub_configs", ()))
    if not found.asks and not found.own and (parts or found.makes):
        return True  # made of other models, each of which is asked by itself
    kind = type(model).__name__
    # Without either, None for a mask need not mean what it means to "sdpa": causal, unless the layer says otherwise.
    declared = any(getattr(model, flag, False) for flag in _DECLARED)
    if found.asks and declared and not found.own:
        return True
    if found.asks and not declared:
        _tell(model, f"{kind} declares no other than eager attention ({_DECLARED[0]}), and runs with that")
        return False
    if found.asks:
        _tell(model, f"{', '.join(found.own)} of {kind}: attention code of their own, which computes these layers")
        return True
    why = "no layer of it computes attention under a mask"
    if found.own:
        why = f"its layers ({', '.join(found.own)}) have attention code of their own"
    _tell(model, f"{kind} never asks for an attention implementation: {why}, and it runs as it does without {name!r}")
    return False


def _tell(model: PreTrainedModel, text: str) -> None:
    if (type(model), text) not in _told:
        _told.add((type(model), text))
        warnings.warn(f"attn_implementation: {text}", FallbackWarning, stacklevel=5)
