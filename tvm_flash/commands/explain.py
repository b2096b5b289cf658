"""What ``python -m tvm_flash explain`` shows of a choice."""

from __future__ import annotations

import dataclasses
from typing import Any

from tvm_flash.call.choice import Explanation
from tvm_flash.display import Screen, table
from tvm_flash.machine.device import Imagined
from tvm_flash.operators import RAGGED_LAYOUT
from tvm_flash.packs.manifest import KernelEntry


def as_data(explanation: Explanation) -> dict[str, Any]:
    """Plain data, ready for JSON: the problem, the device, the chosen kernel's manifest entry, the rejected ones."""
    return {
        "problem": dataclasses.asdict(explanation.problem),
        "device": {"device": str(explanation.device), "name": explanation.device.name},
        "chosen": dataclasses.asdict(explanation.chosen) if explanation.chosen else None,
        "reason": explanation.reason,
        "rejected": [
            {"symbol": r.kernel.symbol, "arch": r.kernel.arch, "reason": r.reason} for r in explanation.rejected
        ],
        "others": explanation.others,
        "measured": explanation.measured,
    }


def show(explanation: Explanation, screen: Screen) -> None:
    """The chosen kernel with what is behind it; then each reason for which others weren't chosen, with their names."""
    problem, device = explanation.problem, explanation.device
    screen.line(f"{problem} ({problem.layout}) on {device} ({device.name})", "best")
    screen.line()
    if explanation.chosen is None:
        screen.line(f"✗ {explanation.reason}", "bad", whole=True)
        screen.line()
    else:
        screen.line(f"✓ {explanation.chosen.symbol} [{explanation.chosen.arch}]: {explanation.reason}", "good")
        here = [] if isinstance(device, Imagined) else [("measured", explanation.measured)]
        for name, value in (*_behind(explanation.chosen), *here):
            screen.line(f"  {name:<9} {value}")
        screen.line()
    reasons: dict[tuple[str, str], list[str]] = {}
    for r in explanation.rejected:
        reasons.setdefault((r.reason, r.kernel.arch), []).append(r.kernel.symbol)
    if reasons:
        rows = [(reason, arch, str(len(names)), ", ".join(names)) for (reason, arch), names in reasons.items()]
        screen.table(table("", ("not chosen, since it", "arch", "", "kernels"), rows))
    if explanation.others:
        screen.line(f"{explanation.others} kernels of other dtypes, definitions or archs weren't looked at", "quiet")


def _behind(entry: KernelEntry) -> list[tuple[str, str]]:
    """What a kernel is: names and values."""
    layout = entry.layout if entry.form == "dense" else RAGGED_LAYOUT
    found = [
        ("template", f"{entry.template.upper()}, layout {layout}, head_dim up to {entry.head_dim}"),
        ("config", ", ".join(f"{name} {_value(value)}" for name, value in entry.config.items()) or "none"),
        ("from", "the family's defaults" if entry.config_source == "default" else entry.config_source),
        ("source", f"sha256 {entry.source_hash}"),
    ]
    if entry.registers is not None:
        shared = (entry.shared_memory or 0) / 1024
        found.append(
            (
                "resources",
                f"{entry.registers} registers a thread, {shared:.0f} KB shared memory, {entry.spills} B spilled",
            )
        )
    for speed in entry.speeds:
        size = (
            f"batch {speed.batch}, heads {speed.heads}, {speed.seqlen_q} × {speed.seqlen_kv}, head_dim {speed.head_dim}"
        )
        figures = f"{speed.microseconds:.1f} µs, {speed.tflops:.4g} TFLOP/s"
        found.append(("measured", f"{figures} at {size} on {speed.device} ({speed.record})"))
    return found


def _value(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
