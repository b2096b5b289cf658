"""The tests of FlashAttention 2 and 3, with :mod:`tvm_flash.nn` in the place of their packages."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import tvm_flash.nn
from tests.peer_suites.suite import Calls, Suite
from tvm_flash.errors import NotSupportedError

#: Words in names of tests, and why such a test isn't run.
_ABOUT = {
    "generator": "is about a generator of random numbers, which dropout needs",
    "paged_kv_num_splits": "calls a private function of the package",
    "block_table_bounds": "is about the words of a message; the same is refused here with others",
    "combine": "is about a private kernel of the package",
    "flash3_bw_compatibility": "is about the package's own operators",
}

#: The same where there is no GPU: these would take hours.
_FOR_A_GPU = {
    "race_condition": "repeats a call hundreds of times, at a size for a GPU",
    "deterministic": "repeats a call hundreds of times, at a size for a GPU",
}


def suites(checkout: Path, device: str, longest: int) -> list[Suite]:
    """The files that are there: the tests of FlashAttention 2, and those of 3."""
    found = []
    for source, stand_in in ((("tests", "test_flash_attn.py"), _two), (("hopper", "test_flash_attn.py"), _three)):
        path = checkout.joinpath(*source)
        if not path.is_file():
            continue
        calls, version = Calls(), 2 if stand_in is _two else 3
        text = path.read_text()
        if version == 3:  # each case tries a chunk of attention first, and these kernels have none
            text = re.sub(r"\[torch\.randint\(1, seqlen_k \* 2, \(1,\)\)\.item\(\), 0\]", "[0]", text)
        if device == "cpu":
            text = text.replace('"cuda"', '"cpu"')
        found.append(
            Suite(
                f"FlashAttention {version}'s {'/'.join(source)}, {device}",
                path,
                text,
                functools.partial(stand_in, checkout, device),
                functools.partial(_why_not, device, longest),
                calls,
            )
        )
    return found


def _why_not(device: str, longest: int, name: str, parameters: dict[str, Any]) -> str | None:
    for word, why in (_ABOUT | (_FOR_A_GPU if device == "cpu" else {})).items():
        if word in name:
            return why
    lengths = [x for k, x in parameters.items() if k.startswith("seqlen") and isinstance(x, int)]
    if parameters.get("dropout_p"):
        return "asks for dropout"
    if parameters.get("has_qv"):
        return "asks for qv, the absorbed part of queries"
    if max(lengths, default=0) > longest:
        return f"has sequences of more than {longest} positions"
    return None


@contextlib.contextmanager
def _modules(checkout: Path, device: str, *modules: types.ModuleType) -> Iterator[None]:
    """Modules by their names, the checkout's helpers, and on a CPU a GPU's answers to what the tests ask of it."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            sys.modules[module.__name__] = module
            stack.callback(sys.modules.pop, module.__name__)
        if device == "cpu":
            stack.enter_context(mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (8, 0)))
            memory = types.SimpleNamespace(total_memory=2**36)
            stack.enter_context(mock.patch.object(torch.cuda, "get_device_properties", lambda *_: memory))
            stack.enter_context(mock.patch.object(torch.cuda, "synchronize", lambda *_: None))
        yield


@contextlib.contextmanager
def _two(checkout: Path, device: str) -> Iterator[None]:
    package = _module("flash_attn", **{name: getattr(tvm_flash.nn, name) for name in tvm_flash.nn.__all__})
    interface = _module("flash_attn.flash_attn_interface", _get_block_size_n=_block_size, USE_TRITON_ROCM=False)
    layers = _module("flash_attn.layers")
    rotary = _module("flash_attn.layers.rotary", apply_rotary_emb=_rotate)
    padding = _from_file("flash_attn.bert_padding", checkout / "flash_attn" / "bert_padding.py")
    with _modules(checkout, device, package, interface, layers, rotary, padding):
        yield


@contextlib.contextmanager
def _three(checkout: Path, device: str) -> Iterator[None]:
    package = _module("flash_attn")
    layers = _module("flash_attn.layers")
    rotary = _module("flash_attn.layers.rotary", apply_rotary_emb=_rotate)
    interface = _module(
        "flash_attn_interface",
        flash_attn_func=functools.partial(_dense_of_three, tvm_flash.nn.flash_attn_func),
        flash_attn_varlen_func=functools.partial(_dense_of_three, tvm_flash.nn.flash_attn_varlen_func),
        flash_attn_with_kvcache=tvm_flash.nn.flash_attn_with_kvcache,
        flash_attn_combine=_not_here,
        get_scheduler_metadata=lambda *_, **__: None,
    )
    with (
        mock.patch.object(sys, "path", [str(checkout / "hopper"), *sys.path]),
        mock.patch.dict(os.environ, {"FLASH_ATTENTION_DISABLE_FP8": "TRUE"}),  # queries in 8 bits aren't here
        _modules(checkout, device, package, layers, rotary, interface),
    ):
        yield


def _dense_of_three(function: Callable, *tensors: Any, **options: Any):
    """A function of FlashAttention 2 with what version 3 calls it with: what changes no result is dropped."""
    for name in ("num_splits", "pack_gqa", "sm_margin"):
        options.pop(name, None)
    for name in [x for x, value in options.items() if value is None or (x == "attention_chunk" and not value)]:
        options.pop(name)
    if missing := sorted(set(options) & {"qv", "q_descale", "k_descale", "v_descale", "attention_chunk"}):
        raise NotSupportedError(f"{', '.join(missing)}: isn't here")
    for name, starts in (("seqused_q", 3), ("seqused_k", 4)):  # the tests give the lengths where all room is used too
        used = options.pop(name, None)
        if used is not None and not torch.equal(used, tensors[starts].diff()):
            raise NotSupportedError(f"{name}: sequences that are shorter than their room aren't here")
    return function(*tensors, **options)


def _block_size(*_, **__) -> tuple[int, int]:
    """The tiles of FlashAttention 2, from which its tests shape the pattern of dropout alone."""
    return 128, 128


def _not_here(*_, **__):
    raise NotSupportedError("isn't here")


def _rotate(x, cos, sin, interleaved=False, seqlen_offsets=0, **_):
    """The rotation that the tests compare with, of ``(batch, seq, heads, head_dim)``, in float32 as flash-attn's."""
    positions = torch.arange(x.shape[1], device=x.device) + torch.as_tensor(seqlen_offsets, device=x.device)[..., None]
    cos, sin = (table[positions].unsqueeze(-2).float() for table in (cos, sin))
    size = 2 * cos.shape[-1]
    turned, rest = x[..., :size].float(), x[..., size:]
    one, two = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    parts = one * cos - two * sin, one * sin + two * cos
    turned = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat((turned.to(x.dtype), rest), -1)


def _module(name: str, **members: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__path__ = []
    vars(module).update(members)
    return module


def _from_file(name: str, path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
