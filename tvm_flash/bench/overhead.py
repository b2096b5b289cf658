"""What a call costs the caller before the kernel runs, part by part, beside PyTorch's functions on the same tensors.

All calls take turns: in each round every one is called some hundred times in a row, and the round gives the mean; the
figure is the median of the rounds, less that of a function that does nothing.  On a GPU a row begins with an empty
queue, which so many calls don't fill.  C functions are called through ctypes, less what ctypes takes to call one that
does nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import functools
import gc
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tvm_flash import BackendSelector, __version__, flash_attention, flash_attention_v2
from tvm_flash.call import eager, fast
from tvm_flash.call.signature import Signature, signature
from tvm_flash.machine import cpu, cuda, ffi

ROUNDS, CALLS = 31, 200

#: An empty kernel, for any GPU.
_EMPTY = b".version 7.0\n.target sm_70\n.address_size 64\n.visible .entry empty() { ret; }\n"


@dataclass(frozen=True)
class Timed:
    """Something to time, and what to enter around its calls."""

    run: Callable[[], object]
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


def main(argv: list[str] | None = None) -> int:
    """The command ``scripts/overhead.py``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    device = parser.parse_args(argv).device or ("cuda" if cuda.device_count() else "cpu")
    import torch

    with torch.no_grad():
        tables = _on_gpu() if device == "cuda" else _on_cpu()
    name = cpu.name() + (f", {cuda.gpu(0).name}" if device == "cuda" else "")
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, tvm_flash {__version__}"
    print(f"{name}; {versions}; {datetime.date.today()}")
    for title, rows in tables.items():
        print(f"\n| {title} | µs |\n|---|---|")
        for label, seconds in rows.items():
            print(f"| {label} | {seconds * 1e6:.2f} |")
    return 0


def in_turns(calls: Mapping[str, Timed], wait: Callable[[], object] = lambda: None) -> dict[str, float]:
    """Seconds of a call, by name, without the loop around it; ``wait`` empties the queue of a GPU."""
    empty = "the loop"
    calls = {**calls, empty: Timed(lambda: None)}
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(ROUNDS):
            for name, timed in calls.items():
                run = timed.run
                with timed.around():
                    run()
                    wait()
                    start = time.perf_counter()
                    for _ in range(CALLS):
                        run()
                    rounds[name].append((time.perf_counter() - start) / CALLS)
                    wait()
    finally:
        if was_enabled:
            gc.enable()
    found = {name: statistics.median(times) for name, times in rounds.items()}
    return {name: seconds - found[empty] for name, seconds in found.items() if name != empty}


def _on_cpu() -> dict[str, dict[str, float]]:
    """One query, one key, one head, float32."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = (torch.randn(1, 1, 1, 64) for _ in range(3))
    out, arrays = torch.empty_like(q), [x.numpy() for x in (q, k, v)]
    selected = BackendSelector("cpu").select_attention(1, 1, 1, 64)
    ours = "`flash_attention(q, k, v)`"
    calls = {
        ours: Timed(lambda: flash_attention(q, k, v)),
        "the same, slow path": Timed(lambda: flash_attention(q, k, v), fast.switched_off),
        "the same, gradients not switched off": Timed(lambda: flash_attention(q, k, v), torch.enable_grad),
        "the same, `out=out`": Timed(lambda: flash_attention(q, k, v, out=out)),
        "the same, `return_lse=True`": Timed(lambda: flash_attention(q, k, v, return_lse=True)),
        "a kernel of `BackendSelector`": Timed(lambda: selected(q, k, v)),
        "NumPy arrays": Timed(lambda: flash_attention(*arrays)),
        "NumPy arrays, slow path": Timed(lambda: flash_attention(*arrays), fast.switched_off),
        "torch's `scaled_dot_product_attention`": Timed(lambda: scaled_dot_product_attention(q, k, v)),
    }
    parts = _parts(signature("bhsd"), (q, k, v, None, None, "v1", False, None, False, (-1, -1), 0.0))
    return _tables(calls, parts, in_turns(calls | parts), ours)


def _on_gpu() -> dict[str, dict[str, float]]:
    """128 positions, 2 heads, head_dim 64, float16, causal."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = (torch.randn(1, 128, 2, 64, dtype=torch.float16, device="cuda") for _ in range(3))
    out, heads_first = torch.empty_like(q), [x.transpose(1, 2) for x in (q, k, v)]
    selected = BackendSelector("cuda").select_attention(1, 2, 128, 64, causal=True, layout="bshd")
    ours = "`flash_attention_v2(q, k, v, causal=True)`"
    calls = {
        ours: Timed(lambda: flash_attention_v2(q, k, v, causal=True)),
        "the same, slow path": Timed(lambda: flash_attention_v2(q, k, v, causal=True), fast.switched_off),
        "the same, gradients not switched off": Timed(
            lambda: flash_attention_v2(q, k, v, causal=True), torch.enable_grad
        ),
        "the same, `out=out`": Timed(lambda: flash_attention_v2(q, k, v, causal=True, out=out)),
        "the same, `return_lse=True`": Timed(lambda: flash_attention_v2(q, k, v, causal=True, return_lse=True)),
        "a kernel of `BackendSelector`": Timed(lambda: selected(q, k, v, causal=True)),
    }
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        calls[f"torch's `{backend.name}`"] = Timed(
            lambda: scaled_dot_product_attention(*heads_first, is_causal=True), functools.partial(sdpa_kernel, backend)
        )
    parts = _parts(signature("bshd"), (q, k, v, None, None, "v2", False, None, True, (-1, -1), 0.0))
    parts |= _driver_parts(q)
    return _tables(calls, parts, in_turns(calls | parts, torch.cuda.synchronize), ours)


# ---------------------------------------------------------------- parts of a call


def _parts(signature: Signature, arguments: tuple) -> dict[str, Timed]:
    """What a call with such arguments does, in pieces that can be called alone."""
    eager.forget()
    out = signature.call(*arguments)
    if not fast.is_loaded():
        raise SystemExit("the installed packs have no fast path; run `python -m tvm_flash build`")
    (plan,) = eager._plans.values()
    q, k, v = arguments[:3]
    _, (_, call, *_), ((make_out, of_what, *_), *_) = plan.recipe(signature, {"q": q, "k": k, "v": v})
    ((frame, _),) = call.launches
    frame.run([x.data_ptr() for x in (q, k, v, out, out)])
    function, values, _, count, _ = frame.parts()
    kernel_call, nothing = ctypes.CDLL(ffi.tvm_ffi().LIB._name).TVMFFIFunctionCall, ctypes.CDLL(None).labs
    result = (ctypes.c_uint64 * 2)()
    given = ctypes.c_void_p(function), ctypes.c_void_p(values), ctypes.c_int(count), ctypes.byref(result)
    entry, alive = signature.call, (frame, out)
    return {
        "entry": Timed(lambda: entry(*arguments)),
        "allocation": Timed(lambda: make_out(*of_what)),
        "kernel": Timed(lambda: (kernel_call(*given), alive)),
        "nothing": Timed(lambda: (nothing(*given), alive)),
    }


def _driver_parts(q) -> dict[str, Timed]:
    """What the driver takes for a tensor map, and for the launch of an empty kernel."""
    driver = ctypes.CDLL("libcuda.so.1")
    module, kernel, tensor_map = ctypes.c_void_p(), ctypes.c_void_p(), (ctypes.c_uint64 * 32)()
    at = ctypes.addressof(tensor_map) + -ctypes.addressof(tensor_map) % 64
    for status in (
        driver.cuModuleLoadData(ctypes.byref(module), _EMPTY),
        driver.cuModuleGetFunction(ctypes.byref(kernel), module, b"empty"),
    ):
        cuda.check(status)
    ones = [ctypes.c_uint32(1)] * 6
    launch = (kernel, *ones, ctypes.c_uint32(0), ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p())
    # float16, rank 4: dimensions, byte strides, box, steps; 128-byte swizzle and 256-byte promotion to L2.
    encode = (
        *(ctypes.c_void_p(at), ctypes.c_int(6), ctypes.c_uint32(4), ctypes.c_void_p(q.data_ptr())),
        *((ctypes.c_uint64 * 4)(64, 128, 2, 1), (ctypes.c_uint64 * 3)(256, 128, 32768)),
        *((ctypes.c_uint32 * 4)(64, 64, 1, 1), (ctypes.c_uint32 * 4)(1, 1, 1, 1)),
        *map(ctypes.c_int, (0, 3, 3, 0)),
    )
    cuda.check(driver.cuTensorMapEncodeTiled(*encode))
    cuda.check(driver.cuLaunchKernel(*launch))
    nothing = ctypes.CDLL(None).labs
    return {
        "tensor map": Timed(lambda: (driver.cuTensorMapEncodeTiled(*encode), tensor_map)),
        "no tensor map": Timed(lambda: (nothing(*encode), tensor_map)),
        "launch": Timed(lambda: (driver.cuLaunchKernel(*launch), module)),
        "no launch": Timed(lambda: (nothing(*launch), module)),
    }


def _tables(
    calls: Mapping[str, Timed], parts: Mapping[str, Timed], found: Mapping[str, float], ours: str
) -> dict[str, dict[str, float]]:
    kernel = found["kernel"] - found["nothing"]
    rows = {
        "Python: the function and its options": found[ours] - found["entry"],
        "C: tensors and options read, recipe found, checks, arguments": found["entry"] - found["allocation"] - kernel,
        "the framework: a new tensor for the result": found["allocation"],
        "the kernel's host function": kernel,
    }
    if "launch" in parts:
        rows["— for comparison, four tensor maps encoded"] = 4 * (found["tensor map"] - found["no tensor map"])
        rows["— for comparison, the launch of an empty kernel"] = found["launch"] - found["no launch"]
    rows["together"] = found[ours]
    return {"call": {name: found[name] for name in calls}, "part of the first call": rows}
