"""Every architecture of the installed transformers, small and with random weights: with our attention and with torch's.

:func:`compare` runs one of them in each way that its inputs allow (without a mask, padded at either side, step by step
with a cache, with beams, with a static cache) and compares what comes out.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import configuration_auto, modeling_auto

from tvm_flash.errors import TvmFlashError
from tvm_flash.integrations.transformers import NAME, attention, by_torch, registration

#: Models of each type are looked for in this order.
FAMILIES = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_PRETRAINING_MAPPING_NAMES",
)

#: More parameters than this aren't tried.
LARGEST = 60e6

#: Relative to the largest value of the result: float32 sums over some layers in another order.
TOLERANCE = 2e-4

_LAYERS = r"(^|_)(layers|n_layers?|num_blocks|depth|num_hidden_layers)$"

#: What a number of a configuration becomes, by its name; the first that matches.
_SIZES = (
    (r"qk_head_dim$", 32),
    (r"moe_k$", 2),
    (r"vocab_size", 128),
    (r"(num_key_value_heads|num_kv_heads|n_kv_heads|kv_n_heads|key_value_heads|query_groups)", 2),
    (r"(num_attention_heads|num_heads|n_heads?$|_heads$|attention_heads)", 4),
    (r"(experts_per_tok|topk_group|top_k|moe_topk|num_experts_per)", 2),
    (r"n_group$", 1),
    (r"(num_(local_|routed_)?experts|n_routed_experts|num_experts)$", 4),
    (_LAYERS, 2),
    (r"(qk_rope_head_dim|qk_nope_head_dim|v_head_dim|head_dim|head_size|d_kv|kv_channels|attention_head_size)$", 16),
    (r"(kv_lora_rank|q_lora_rank)", 32),
    (r"(intermediate_size|ffn_dim|d_ff|n_inner|inner_dim|mlp_dim|intermediate_dim|ffn_hidden_size)", 64),
    (r"(hidden_size|d_model|n_embd|embed_dim|hidden_dim|embedding_size|projection_dim|out_hidden_size|emb_dim)$", 64),
    (r"(max_position_embeddings|n_positions|max_seq_len|max_sequence_length|max_source_positions|max_target_pos)", 256),
    (r"(sliding_window|attention_window|local_attention)", 8),
    (r"attention_chunk_size", 8),
    (r"image_size$", 32),
    (r"patch_size$", 8),
    (r"num_mel_bins", 16),
)


@dataclass
class Outcome:
    """How one architecture went: ``state`` in a word, and why; ``worst`` is the largest relative difference."""

    model_type: str
    model: str = ""
    state: str = "not tried"
    why: str = ""
    ways: list[str] = field(default_factory=list)
    kernels: int = 0
    torch: int = 0
    worst: float = 0.0

    def __str__(self) -> str:
        return f"{self.model_type}: {self.state} {self.why} {self.worst:.1e} {','.join(self.ways)}"


def model_types() -> list[str]:
    return sorted(configuration_auto.CONFIG_MAPPING_NAMES)


def model_class(model_type: str) -> type | None:
    for family in FAMILIES:
        name = getattr(modeling_auto, family, {}).get(model_type)
        name = name[0] if isinstance(name, (tuple, list)) else name
        if name and hasattr(transformers, name):
            return getattr(transformers, name)
    return _class_of_part(configuration_auto.CONFIG_MAPPING[model_type])


def _class_of_part(config: type) -> type | None:
    """The model class of a configuration that is a part of others, in the same folder."""
    folder = Path(inspect.getfile(config)).parent
    found = []
    for file in sorted(folder.glob("modeling_*.py")):
        try:
            module = importlib.import_module(f"{config.__module__.rpartition('.')[0]}.{file.stem}")
        except ImportError:
            continue
        found += [
            x for x in vars(module).values() if isinstance(x, type) and getattr(x, "config_class", None) is config
        ]
    found = [x for x in found if not x.__name__.endswith("PreTrainedModel")]
    return max(found, key=lambda x: len(x.__name__), default=None)


# ---------------------------------------------------------------- small configurations


def _shrunk(name: str, x: Any, layers: int | None) -> Any:
    if isinstance(x, dict):
        return {k: _shrunk(str(k), v, _layers(x)) for k, v in x.items() if k != "per_layer_config"}
    if name == "mrope_section":
        return [2, 3, 3]
    if isinstance(x, bool) or x is None or isinstance(x, str):
        return x
    if isinstance(x, (list, tuple)):
        if layers and len(x) == layers:
            kinds = list(dict.fromkeys(x)) if all(isinstance(y, (str, int)) for y in x) else x
            return (list(kinds) * 2)[:2] if len(kinds) > 1 else list(x[:2])
        return x
    if isinstance(x, int):
        for pattern, size in _SIZES:
            if re.search(pattern, name):
                return min(x, size) if x > 0 else x
        if name.endswith(("token_id", "token_index")):
            return x if x < 128 else 100 + x % 28
    return x


def _layers(config: dict) -> int | None:
    """How many layers a configuration has, so that lists of one entry a layer are known."""
    return next((n for k, n in config.items() if re.search(_LAYERS, str(k)) and isinstance(n, int)), None)


def configurations(model_type: str) -> Iterator[Callable[[], Any]]:
    """Ways to a small configuration, the smallest first."""
    cls = configuration_auto.CONFIG_MAPPING[model_type]

    def given():
        return {k: v for k, v in cls().to_dict().items() if k not in ("model_type", "transformers_version")}

    def small():
        return _tidy(cls(**_shrunk("", given(), None)))

    def small_without(pattern: str, **others: Any):
        """With the sizes of some names as they were, or as said."""

        def change(name: str, x: Any, new: Any) -> Any:
            if isinstance(x, dict) and isinstance(new, dict):
                return {k: change(str(k), x.get(k), v) for k, v in new.items()}
            if name in others:
                return others[name]
            return x if pattern and re.search(pattern, name) else new

        whole = given()
        return lambda: _tidy(cls(**change("", whole, _shrunk("", whole, None))))

    def shallow():
        config = cls()
        for part in (config, *(getattr(config, p, None) for p in getattr(config, "sub_configs", ()))):
            for name in ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers", "n_layers"):
                if part is not None and isinstance(getattr(part, name, None), int):
                    setattr(part, name, 2)
        return _tidy(config)

    def sectioned():
        """With three sections of rotary positions, which some models take for given."""

        def add(x: Any) -> Any:
            if not isinstance(x, dict):
                return x
            rope = x.get("rope_parameters")
            more = {"rope_parameters": {**rope, "mrope_section": [2, 3, 3]}} if isinstance(rope, dict) else {}
            return {**{k: add(v) for k, v in x.items()}, **more}

        return _tidy(cls(**add(_shrunk("", given(), None))))

    yield small
    yield sectioned
    yield small_without("", num_key_value_heads=4, mrope_section=[1, 1, 2])
    yield small_without(r"head|hidden_size|d_model|n_embd|embed_dim|mrope_section|partial_rotary|lora_rank")
    yield small_without(r"head|size|dim|d_model|n_embd|mrope_section|lora_rank|channels|position")
    yield shallow
    yield lambda: _tidy(cls())


def _tidy(config: Any) -> Any:
    """No tokens that end a text, and no dropout."""
    for part in (config, *(getattr(config, p, None) for p in getattr(config, "sub_configs", ()))):
        if part is None:
            continue
        for name in ("eos_token_id",):
            if getattr(part, name, None) is not None and not getattr(part, "is_encoder_decoder", False):
                setattr(part, name, 127)
        if getattr(part, "pad_token_id", 0) is None:
            part.pad_token_id = 0
    return config


# ---------------------------------------------------------------- models


def build(model_type: str) -> tuple[type, Any] | str:
    """The class and a small configuration of an architecture, or why there is none."""
    cls = model_class(model_type)
    if cls is None:
        return "no model class of its own"
    why = ""
    for make in configurations(model_type):
        try:
            config = make()
            with torch.device("meta"):
                size = sum(p.numel() for p in _make(cls, config, "eager").parameters())
            if size <= LARGEST:
                problem = _problem(_make(cls, config, "eager"))
                if not problem:
                    return cls, config
                why = why or problem
                continue
            why = why or f"{size / 1e6:.0f} million parameters when small"
        except Exception as e:
            why = why or f"{type(e).__name__}: {str(e).splitlines()[0][:90] if str(e) else ''}"
    return why


def _problem(model: Any) -> str:
    """Why a model runs in none of its ways; empty if it does in one."""
    why = ""
    for way, run in ways(model):
        try:
            with torch.no_grad():
                run(model)
            return ""
        except Exception as e:
            why = why or f"{way}: {type(e).__name__}: {str(e).splitlines()[0][:90] if str(e) else ''}"
    return why or "no inputs are known for it"


def _make(cls: type, config: Any, implementation: str) -> Any:
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    return cls._from_config(config, attn_implementation=implementation).eval()


def _randomise(model: torch.nn.Module) -> None:
    """Weights that let attention look at some keys more than at others."""
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.ndim > 1 and p.is_floating_point():
            std = 1.2 / p.shape[-1] ** 0.5 if p.ndim == 2 else 0.08
            p.data.normal_(0, std, generator=generator)


def compare(model_type: str, implementation: str = NAME) -> Outcome:
    """One architecture in every way that it can be run."""
    outcome = Outcome(model_type)
    found = build(model_type)
    if isinstance(found, str):
        outcome.why = found
        return outcome
    cls, config = found
    outcome.model = cls.__name__
    calls = {"kernels": 0, "torch": 0}
    with warnings.catch_warnings(record=True) as said, _counted(calls):
        warnings.simplefilter("always")
        try:
            want = _make(cls, config, "eager")
            _randomise(want)
            got = _make(cls, config, implementation)
            got.load_state_dict(want.state_dict())
            for ours, theirs in zip(got.buffers(), want.buffers(), strict=True):
                ours.data.copy_(theirs.data)
        except (TvmFlashError, ValueError) as e:
            outcome.state, outcome.why = "refused", str(e).splitlines()[0][:120]
            return outcome
        as_sdpa: list[str] = []
        for way, run in ways(want):
            try:
                torch.manual_seed(2)
                with torch.no_grad():
                    expected = run(want)
            except Exception:  # eager attention can't be run in this way
                continue
            try:
                torch.manual_seed(2)
                with torch.no_grad():
                    result = run(got)
            except TvmFlashError as e:
                outcome.state, outcome.why = "refused", f"{way}: {str(e).splitlines()[0][:120]}"
                return outcome
            except Exception as e:
                outcome.state, outcome.why = "error", f"{way}: {type(e).__name__}: {str(e)[:150]}"
                return outcome
            outcome.ways.append(way)
            difference = max((_difference(a, b) for a, b in zip(result, expected, strict=True)), default=0.0)
            if not difference <= TOLERANCE and _as_sdpa(cls, config, want, run, result):
                as_sdpa.append(way)
            elif not difference <= TOLERANCE:
                outcome.state, outcome.why = "different", f"{way}: off by {difference:.1e}"
                return outcome
            else:
                outcome.worst = max(outcome.worst, difference)
    outcome.kernels, outcome.torch = calls["kernels"], calls["torch"]
    reasons = [str(w.message) for w in said if w.category.__name__ == "FallbackWarning"]
    if calls["kernels"]:
        outcome.state = "same"
    else:
        outcome.state = "falls back"
    if as_sdpa:
        outcome.why = f"{', '.join(as_sdpa)}: as 'sdpa', which differs from 'eager' in this model"
    elif reasons:
        outcome.why = reasons[0].split("attention: ")[-1].removeprefix("attn_implementation: ")[:160]
    return outcome


def _as_sdpa(cls: type, config: Any, weights: Any, run: Callable, result: list[torch.Tensor]) -> bool:
    """Whether a result that isn't that of eager attention is that of sdpa, from which the model's own eager differs."""
    try:
        model = _make(cls, config, "sdpa")
    except ValueError:
        return False
    model.load_state_dict(weights.state_dict())
    for ours, theirs in zip(model.buffers(), weights.buffers(), strict=True):
        ours.data.copy_(theirs.data)
    torch.manual_seed(2)
    with torch.no_grad():
        return all(_difference(a, b) <= TOLERANCE for a, b in zip(result, run(model), strict=True))


class _counted:
    """Counts the calls that our kernels and that torch computed."""

    COUNTED = (
        (attention, "_compute", "kernels"),
        (attention, "_by_whole_mask", "kernels"),
        (by_torch, "attention", "torch"),
    )

    def __init__(self, calls: dict[str, int]):
        self.calls = calls
        self.before = {(m, name): getattr(m, name) for m, name, _ in self.COUNTED}

    def __enter__(self):
        from tvm_flash.nn import sdpa

        sdpa._warned.clear()
        registration._told.clear()
        for module, name, key in self.COUNTED:
            setattr(module, name, self._counting(key, self.before[module, name]))

    def _counting(self, key: str, function: Callable) -> Callable:
        def counting(*args, **kwargs):
            self.calls[key] += 1
            return function(*args, **kwargs)

        return counting

    def __exit__(self, *_):
        for (module, name), function in self.before.items():
            setattr(module, name, function)


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    if not a.is_floating_point():
        return float((a != b).sum())
    a, b = a.float(), b.float()
    if not bool(torch.isfinite(b).all()):
        return 0.0 if torch.equal(torch.isfinite(a), torch.isfinite(b)) else float("inf")
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item() if a.numel() else 0.0


# ---------------------------------------------------------------- ways to run a model


def ways(model: Any) -> Iterator[tuple[str, Callable[[Any], list[torch.Tensor]]]]:
    """Names and functions that run a model and return tensors to compare."""
    torch.set_num_threads(1)
    name = model.main_input_name
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    if name == "input_ids":
        yield from _text(model, config)
    elif name == "pixel_values":
        yield from _images(model)
    elif name in ("input_values", "input_features"):
        yield from _sounds(model, name)


def _first(output: Any) -> torch.Tensor:
    values = output.values() if hasattr(output, "values") else output
    return next(x for x in values if isinstance(x, torch.Tensor) and x.is_floating_point() and x.ndim > 1)


def _text(model: Any, config: Any):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 90, (2, 21), generator=generator)
    asked = inspect.signature(model.forward).parameters
    both = getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in asked
    more = {"decoder_input_ids": torch.randint(5, 90, (2, 9), generator=generator)} if both else {}
    right, left = torch.ones_like(ids), torch.ones_like(ids)
    right[1, 12:], left[1, :9] = 0, 0

    def seen(model, mask):
        x = _first(model(input_ids=ids, attention_mask=mask, **more))
        if mask is None:
            return [x]
        if x.shape[1] == mask.shape[1] + 1:  # a token of the model's own comes last
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
        return [x if x.shape[:2] != mask.shape else x[mask.bool()]]

    if "pixel_values" in asked and not model.can_generate():
        yield from _images(model)
        return
    yield "no mask", lambda m: seen(m, None)
    yield "padded right", lambda m: seen(m, right)
    yield "padded left", lambda m: seen(m, left)
    if not both and "position_ids" in asked:
        positions = torch.cat((torch.arange(12), torch.arange(9)))[None]
        yield "packed", lambda m: [_first(m(input_ids=ids[:1], position_ids=positions, use_cache=False))]
    if not model.can_generate():
        return
    options = {"attention_mask": left, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    options |= {"pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}

    def generate(model, **others):
        given = {**options, **others}
        result = model.generate(ids, **given)
        return [result.sequences] if given.get("num_beams") else [torch.stack(list(result.logits))]

    yield "cache", lambda m: generate(m)
    yield "beams", lambda m: generate(m, num_beams=2)
    static = {"cache_implementation": "static", "disable_compile": True}
    yield "static cache", lambda m: generate(m, **static)


def _images(model: Any):
    part = getattr(model.config, "vision_config", model.config)
    size = getattr(part, "image_size", 32)
    size = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(part, "num_channels", 3)
    generator = torch.Generator().manual_seed(3)
    for shape in ((2, channels, *size), (2, getattr(part, "num_frames", 2) or 2, channels, *size)):
        x = torch.randn(*shape, generator=generator)
        yield "images" if len(shape) == 4 else "video", lambda m, x=x: [_first(m(pixel_values=x))]
    asked = inspect.signature(model.forward).parameters
    ids = torch.randint(5, 90, (2, 12), generator=generator)
    image = torch.randn(2, channels, *size, generator=generator)
    if {"pixel_values", "input_ids"} <= set(asked):
        yield "images and text", lambda m: [_first(m(pixel_values=image, input_ids=ids))]
    if "decoder_input_ids" in asked:
        yield "images and a decoder", lambda m: [_first(m(pixel_values=image, decoder_input_ids=ids))]


def _sounds(model: Any, name: str):
    generator = torch.Generator().manual_seed(3)
    asked = inspect.signature(model.forward).parameters
    both = getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in asked
    more = {"decoder_input_ids": torch.randint(5, 90, (2, 9), generator=generator)} if both else {}
    if name == "input_values":
        x = torch.randn(2, 4000, generator=generator)
    else:
        names = ("num_mel_bins", "feature_size", "input_feat_per_channel", "input_size")
        bins = next((getattr(model.config, b) for b in names if hasattr(model.config, b)), 80)
        length = 2 * getattr(model.config, "max_source_positions", 100)
        x = torch.randn(2, bins, length, generator=generator)
    mask = torch.ones(x.shape[0], x.shape[-1], dtype=torch.long)
    mask[1, x.shape[-1] // 2 :] = 0
    for way, y, m in (("sound", x, mask), ("sound", x.transpose(1, -1), torch.ones(2, x.shape[1], dtype=torch.long))):
        yield way, lambda model, y=y: [_first(model(**{name: y}, **more))]
        if "attention_mask" in asked:
            yield f"padded {way}", lambda model, y=y, m=m: [_first(model(**{name: y}, attention_mask=m, **more))]
