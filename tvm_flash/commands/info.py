"""What is installed: versions, devices, packs and their kernels, and the commands that make what is missing."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterable
from importlib import metadata
from typing import Any

from tvm_flash import __version__
from tvm_flash.display import Screen, table
from tvm_flash.errors import PackError
from tvm_flash.machine import cpu, cuda
from tvm_flash.machine.device import Device
from tvm_flash.packs.registry import PATH_VARIABLE, Pack, build_command, registry

#: Packages whose versions matter; those that aren't installed are left out.
_PACKAGES = (
    *("apache-tvm-ffi", "numpy", "ml_dtypes", "torch", "jax", "cupy", "cupy-cuda12x", "cupy-cuda13x"),
    *("apache-tvm", "nvidia-cuda-nvcc", "rich", "matplotlib", "transformers"),
)


def collect() -> dict[str, Any]:
    """Everything as plain data, ready for JSON."""
    packs = registry()
    devices = [Device("cpu"), *(Device("cuda", i) for i in range(cuda.device_count()))]
    return {
        "tvm_flash": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": _versions(),
        "cuda_driver": cuda.driver_version(),
        "devices": [_device(d) for d in devices],
        "search_path": [{"folder": str(f), "exists": f.is_dir()} for f in packs.folders],
        "packs": [_pack(p) for p in packs.packs],
        "broken": [{"folder": str(b.folder), "reason": b.reason} for b in packs.broken],
        "missing": [
            {"arch": d.native_arch, "command": build_command(d.native_arch)}
            for d in devices
            if not packs.kernels(d.native_arch)
        ],
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _device(device: Device) -> dict[str, Any]:
    about = {"device": str(device), "name": device.name, "arch": device.native_arch}
    if device.kind == "cpu":
        return {**about, **_threads()}
    return {**about, "capability": ".".join(map(str, device.capability))}


def _threads() -> dict[str, int]:
    """How many threads the kernels would use; nothing if there are none that can be loaded."""
    for kernel in registry().kernels("cpu")[:1]:
        files = [f.file for f in kernel.pack.manifest.support_files if f.file.startswith(cpu.RUNTIME_STEM)]
        with contextlib.suppress(PackError, OSError):
            registry().load(kernel)  # checks the files
            return {"threads": cpu.threads(registry().place_of(kernel.pack) / files[0])}
    return {}


def _pack(pack: Pack) -> dict[str, Any]:
    manifest = pack.manifest
    return {
        "arch": manifest.arch,
        "isa": manifest.isa,
        "folder": str(pack.folder),
        "usable": pack.unusable is None,
        "for_this_processor": not pack.lacking,
        "reason": pack.unusable or "",
        "bytes": sum(m.size for m in (*manifest.modules, *manifest.support_files)),
        "created": manifest.created,
        "versions": manifest.versions,
        "kernels": [
            {
                "symbol": k.symbol,
                "op": k.op,
                "kind": k.kind,
                "template": k.template,
                "dtype": k.dtype,
                "head_dim": k.head_dim,
                "head_dim_v": k.head_dim_v,
                "definition": k.definition,
                "mask": k.mask,
                "score": k.score,
                "bucket": k.bucket,
                "config_source": k.config_source,
            }
            for k in manifest.kernels
        ],
    }


def show(report: dict[str, Any], screen: Screen) -> None:
    """The report as a page."""
    driver = f"driver for CUDA {report['cuda_driver']}" if report["cuda_driver"] else "no CUDA driver"
    screen.line(f"tvm_flash {report['tvm_flash']}, Python {report['python']}, {report['system']}, {driver}", "best")
    screen.line("packages: " + ", ".join(f"{name} {version}" for name, version in report["packages"].items()))
    screen.line()
    screen.table(table("", ("device", "name", "arch", ""), [_device_row(d) for d in report["devices"]]))
    screen.line(f"packs are looked for in ({PATH_VARIABLE} adds folders):")
    for place in report["search_path"]:
        screen.line(f"  {'✓' if place['exists'] else '–'} {place['folder']}", whole=True)
    screen.line()
    if report["packs"]:
        screen.table(
            table("", ("pack", "for", "kernels", "size", "built", "folder"), list(map(_pack_row, report["packs"])))
        )
        screen.table(
            table(
                "",
                ("pack", "definition", "kind", "template", "dtypes", "head_dim ≤", "masks and scores"),
                _kernel_rows(report),
            )
        )
    else:
        screen.line("packs: none")
    for pack in report["packs"]:
        if not pack["usable"]:
            style = "warning" if pack["for_this_processor"] else ""
            screen.line(f"{_mark(pack)} {pack['folder']}: {pack['reason']}", style, whole=True)
    for broken in report["broken"]:
        screen.line(f"✗ {broken['folder']}: {broken['reason']}", "bad", whole=True)
    for gap in report["missing"]:
        screen.line(f"missing: {gap['arch']}; run `{gap['command']}`", "warning", whole=True)


def _device_row(device: dict[str, Any]) -> tuple[str, ...]:
    details = [f"{device['threads']} threads"] if "threads" in device else []
    details += [f"compute capability {device['capability']}"] if "capability" in device else []
    return device["device"], device["name"], device["arch"], ", ".join(details)


def _pack_row(pack: dict[str, Any]) -> tuple[str, ...]:
    size = f"{pack['bytes'] / 2**20:.1f} MB"
    return (
        f"{_mark(pack)} {pack['arch']}",
        pack["isa"],
        str(len(pack["kernels"])),
        size,
        _minute(pack["created"]),
        pack["folder"],
    )


def _mark(pack: dict[str, Any]) -> str:
    """A pack for better processors is no fault."""
    if pack["usable"]:
        return "✓"
    return "✗" if pack["for_this_processor"] else "–"


def _minute(moment: str) -> str:
    return moment[:16].replace("T", " ")


def _kernel_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row for each set of kernels that differ in nothing but dtype, head_dim, mask and score."""
    sets: dict[tuple[str, ...], list[str]] = {}  # instruction sets that have the same kernels
    for pack in report["packs"]:
        kinds: dict[tuple[str, str, str, str], dict[str, dict]] = {}
        for kernel in pack["kernels"]:
            of_dtype = kinds.setdefault(
                (kernel["definition"], kernel["kind"], kernel["template"], kernel["dtype"]), {"dims": {}, "what": {}}
            )
            of_dtype["dims"][kernel["head_dim"], kernel["head_dim_v"]] = None
            of_dtype["what"][kernel["mask"], kernel["score"]] = None
        merged: dict[tuple[str, ...], list[str]] = {}
        for (definition, kind, template, dtype), found in kinds.items():
            dims = ", ".join(str(d) if d == e else f"{d}:{e}" for d, e in sorted(found["dims"]))
            merged.setdefault((definition, kind, template, dims, _masks(found["what"])), []).append(dtype)
        for (definition, kind, template, dims, what), dtypes in merged.items():
            row = (pack["arch"], definition, kind, template, ", ".join(dtypes), dims, what)
            sets.setdefault(row, []).append(pack["isa"])
    return [(f"{arch} {', '.join(isas)}".rstrip(), *rest) for (arch, *rest), isas in sets.items()]


def _masks(kinds: Iterable[tuple[str, str]]) -> str:
    """``"causal, full, window (+ alibi, softcap)"``: each mask with the scores that aren't plain."""
    scores: dict[str, list[str]] = {}
    for mask, score in sorted(kinds):
        scores.setdefault(mask, []).extend([] if score == "identity" else [score])
    return ", ".join(mask + (f" (+ {', '.join(more)})" if more else "") for mask, more in scores.items())
