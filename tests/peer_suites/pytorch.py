"""PyTorch's tests of attention, with these kernels below its own function or in the place of it."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.nn.attention

from tests.peer_suites.suite import Calls, Suite
from tvm_flash.errors import FallbackWarning

#: Where PyTorch keeps its tests of attention, and where a project that tests another device keeps a copy of them.
SOURCES = ("test/test_transformers.py", "test/xpu/test_transformers_xpu.py", "test/test_varlen_attention.py")


def suites(checkout: Path, device: str) -> list[Suite]:
    """The files that are there, each by both doors where both lead to what it calls."""
    found = []
    for source in (checkout / x for x in SOURCES):
        if not source.is_file():
            continue
        doors = {"torch alone": _nothing, "registry": _below, "drop-in": _in_place}
        if "varlen" in source.name:  # no function of this package has the arguments of varlen_attn
            del doors["drop-in"]
        if not _has_registry(device):
            del doors["registry"]
        for door, stand_in in doors.items():
            calls = Calls()
            found.append(
                Suite(
                    f"PyTorch's {source.stem}, {door}, {device}",
                    source,
                    source.read_text(),
                    functools.partial(stand_in, calls, device),
                    _nowhere if device == "cpu" and "varlen" in source.name else _everywhere,
                    calls,
                    baseline=stand_in is _nothing,
                    counted=stand_in is not _nothing,
                )
            )
    return found


def _has_registry(device: str) -> bool:
    """Whether this torch lets its kernels be replaced: 2.9 brought what the CPU needs, 2.11 the registry of GPUs."""
    if device == "cpu":
        return hasattr(torch.library, "get_kernel")
    return hasattr(torch.nn.attention, "activate_flash_attention_impl")


def _nowhere(name: str, parameters: dict) -> str:
    return "varlen_attn is there on GPUs only"


def _everywhere(name: str, parameters: dict) -> None:
    return None


@contextlib.contextmanager
def _only_on(device: str) -> Iterator[None]:
    """Have PyTorch's own machinery make cases for one kind of device, and say of each fallback why."""
    with mock.patch.dict(os.environ, PYTORCH_TESTING_DEVICE_ONLY_FOR=device), warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        yield


@contextlib.contextmanager
def _nothing(calls: Calls, device: str) -> Iterator[None]:
    """torch as it is: what fails so isn't a fault of this package's."""
    with _only_on(device):
        yield


@contextlib.contextmanager
def _below(calls: Calls, device: str) -> Iterator[None]:
    """These kernels under ``scaled_dot_product_attention``: torch chooses the backend first."""
    from tvm_flash.integrations import pytorch as integration

    functions = integration._CPU if device == "cpu" else integration._CUDA
    counted = {name: _counted(calls, function) for name, function in functions.items()}
    with mock.patch.dict(functions, counted), _only_on(device):
        if device == "cpu":
            with integration.on_cpu():
                yield
        else:
            torch.nn.attention.activate_flash_attention_impl(integration.NAME)
            try:
                yield
            finally:
                torch.nn.attention.restore_flash_attention_impl()


def _counted(calls: Calls, function: Callable) -> Callable:
    @functools.wraps(function)
    def replacement(*args, **kwargs):
        result = function(*args, **kwargs)
        if isinstance(result, str):
            calls.leave(result)
        else:
            calls.ours += 1
        return result

    return replacement


#: Why the drop-in leaves a call to torch that a test wants computed by another backend, to compare with.
_COMPARED = "a test asks for another backend"


@contextlib.contextmanager
def _in_place(calls: Calls, device: str) -> Iterator[None]:
    """The drop-in in the place of ``scaled_dot_product_attention``, except where a test asks for another backend."""
    from tvm_flash.nn import sdpa

    refusal, compute, leave = sdpa.refusal, sdpa._compute, sdpa.warn_of_fallback

    def refuse(*args):
        if not torch.compiler.is_compiling() and not torch.backends.cuda.flash_sdp_enabled():
            return _COMPARED
        return refusal(*args)

    def count(*args):
        calls.ours += 1
        return compute(*args)

    def note(reason: str) -> None:
        if reason != _COMPARED:
            calls.leave(reason)
            leave(reason)

    place = (torch.nn.functional, "scaled_dot_product_attention", sdpa.scaled_dot_product_attention)
    replaced = (place, (sdpa, "refusal", refuse), (sdpa, "_compute", count), (sdpa, "warn_of_fallback", note))
    with contextlib.ExitStack() as stack:
        for of, name, by in replaced:
            stack.enter_context(mock.patch.object(of, name, by))
        stack.enter_context(_only_on(device))
        yield
