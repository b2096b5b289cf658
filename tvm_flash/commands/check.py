"""One small case for each installed kernel, against float64: what ``python -m tvm_flash check`` runs.

Kernels are called directly, with memory that is made here: no framework is needed, not even for a GPU.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from tvm_flash.display import Entry, Table, table
from tvm_flash.errors import TvmFlashError
from tvm_flash.machine import cuda
from tvm_flash.machine.device import Device
from tvm_flash.machine.ffi import Kernel
from tvm_flash.measure import small_append
from tvm_flash.measure.sample import SEQLEN_KV, SEQLEN_Q
from tvm_flash.measure.small_case import compare, kind_of, share
from tvm_flash.packs.manifest import APPEND, BUILTIN_DEFINITION, KernelEntry
from tvm_flash.packs.registry import Installed, registry

#: Keys that a kernel for longer sequences gets beyond those of the case, at most: enough for several tiles.  Without a
#: limit (``--thorough``) float64 alone took 0.5 s a kernel.
LONGER_BY = 512
#: Further lengths of queries and keys of a thorough check: several row tiles, the last of them not whole.
THOROUGH_LENGTHS = (300, 333)


@dataclass(frozen=True)
class Result:
    """What became of one kernel: largest error and what is allowed, of the result and, if it has one, the log-sum-exp.

    Of a backward kernel, those of the gradient that comes nearest to what is allowed.

    ``note`` says why there are no figures, or what failed.
    """

    symbol: str
    arch: str
    device: str
    ok: bool
    seconds: float
    error: float | None = None
    bound: float | None = None
    lse_error: float | None = None
    lse_bound: float | None = None
    note: str = ""

    def line(self) -> str:
        """The result in a line."""
        figures = "" if self.error is None else f"error {self.error:.1e} (≤ {self.bound:.1e})  "
        mark = "✓" if self.ok else "✗"
        return f"{mark} {self.device} {self.symbol}  {figures}{self.seconds:.2f} s  {self.note}".rstrip()


def check_kernels(
    arch: str | None = None, begins: Callable[[str], None] = lambda _: None, *, thorough: bool = False
) -> Iterator[Result]:
    """Run every installed kernel that a device of this machine can, or those of one arch.

    ``begins`` hears the symbol of a kernel before it runs.  A ``thorough`` check has more and longer cases, and runs
    each twice: the bits must be the same.
    """
    with contextlib.ExitStack() as held:
        for index in {device.index for _, device in _runnable(arch) if device.kind == "cuda"}:
            held.enter_context(cuda.held(index))
        for kernel, device in _runnable(arch):
            begins(kernel.entry.symbol)
            yield check_kernel(kernel, device, thorough=thorough)


def count(arch: str | None = None) -> int:
    """How many results :func:`check_kernels` gives."""
    return sum(1 for _ in _runnable(arch))


def _runnable(arch: str | None) -> Iterator[tuple[Installed, Device]]:
    devices = [Device("cpu"), *(Device("cuda", i) for i in range(cuda.device_count()))]
    return (
        (kernel, device)
        for device in devices
        for candidate in device.archs()
        if arch in (None, candidate)
        for kernel in sorted(registry().kernels(candidate), key=lambda k: kind_of(k.entry))
    )


def _compare(
    entry: KernelEntry, functions: Sequence[Kernel], device: Device, lengths: tuple[int, int], *, repeat: bool
) -> tuple[dict[str, tuple[float, float]], bool]:
    """Errors and bounds by role, and whether a second run had the same bits."""
    if entry.op == APPEND:
        return small_append.compare(entry, functions, device, lengths[0], repeat=repeat)
    return compare(entry, functions, device, *lengths, repeat=repeat)


def summary(results: Iterable[Result]) -> Table:
    """What the results come to, by device and arch."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.device, result.arch), []).append(result)
    rows = []
    for (device, arch), found in groups.items():
        shares = [r.error / r.bound for r in found if r.error is not None and r.bound]
        failed = sum(not r.ok for r in found)
        rows.append(
            (
                *(device, arch, str(len(found)), Entry(str(failed), "bad" if failed else "")),
                *(f"{max(shares):.2g}" if shares else "–", f"{sum(r.seconds for r in found):.1f}"),
            )
        )
    return table("", ("device", "arch", "kernels", "failed", "error / allowed", "seconds"), rows, labels=2)


def check_kernel(kernel: Installed, device: Device, *, thorough: bool = False) -> Result:
    """Run one kernel."""
    entry, start = kernel.entry, time.perf_counter()
    identity = (entry.symbol, entry.arch, str(device))
    if entry.definition != BUILTIN_DEFINITION:
        return Result(
            *identity, True, 0.0, note="not checked: a definition of the user's own, without a numpy twin here"
        )
    try:
        lengths = [(SEQLEN_Q, SEQLEN_KV + (entry.bucket if thorough else min(entry.bucket, LONGER_BY)))]
        lengths += [THOROUGH_LENGTHS] if thorough else []
        functions = registry().load(kernel)
        found = [_compare(entry, functions, device, length, repeat=thorough) for length in lengths]
    except TvmFlashError as e:
        return Result(*identity, False, time.perf_counter() - start, note=str(e))
    ok = all(error <= bound for errors, _ in found for error, bound in errors.values())
    note = "" if all(same for _, same in found) else "another run gives other bits"
    worst = {role: max((e[role] for e, _ in found), key=share) for role in found[0][0]}
    results = max((x for role, x in worst.items() if role != "lse"), key=share)
    figures = (*results, *worst.get("lse", (None, None)))
    return Result(*identity, ok and not note, time.perf_counter() - start, *figures, note)
