"""What is installed: versions, devices, packs and their kernels, and the commands that make what is missing."""

from __future__ import annotations

import contextlib
import platform
from collections import defaultdict
from importlib import metadata
from typing import Any

from tvm_flash import __version__, cpu, cuda
from tvm_flash.device import Device
from tvm_flash.errors import PackError
from tvm_flash.registry import PATH_VARIABLE, Pack, build_command, registry

#: Packages whose versions matter; those that aren't installed are left out.
_PACKAGES = (
    *("apache-tvm-ffi", "numpy", "ml_dtypes", "torch", "jax", "cupy", "cupy-cuda12x", "cupy-cuda13x"),
    "apache-tvm",
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
        with contextlib.suppress(PackError):
            registry().load(kernel)  # checks the files
            return {"threads": cpu.threads(*(kernel.pack.folder / f.file for f in kernel.pack.manifest.support_files))}
    return {}


def _pack(pack: Pack) -> dict[str, Any]:
    manifest = pack.manifest
    return {
        "arch": manifest.arch,
        "isa": manifest.isa,
        "folder": str(pack.folder),
        "usable": pack.unusable is None,
        "reason": pack.unusable or "",
        "bytes": sum(m.size for m in (*manifest.modules, *manifest.support_files)),
        "created": manifest.created,
        "versions": manifest.versions,
        "kernels": [
            {
                "symbol": k.symbol,
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


def as_text(report: dict[str, Any]) -> str:
    """The report as a page."""
    packages = ", ".join(f"{name} {version}" for name, version in report["packages"].items())
    driver = f"driver for CUDA {report['cuda_driver']}" if report["cuda_driver"] else "no CUDA driver"
    lines = [
        f"tvm_flash {report['tvm_flash']}, Python {report['python']}, {report['system']}, {driver}",
        f"packages: {packages}",
        "devices:",
        *(f"  {_device_line(d)}" for d in report["devices"]),
        f"packs are looked for in ({PATH_VARIABLE} adds folders):",
        *(f"  {'✓' if place['exists'] else '–'} {place['folder']}" for place in report["search_path"]),
        "packs:" if report["packs"] else "packs: none",
    ]
    for pack in report["packs"]:
        lines += _pack_lines(pack)
    lines += [f"  ✗ {broken['folder']}: {broken['reason']}" for broken in report["broken"]]
    lines += [f"missing: {gap['arch']}; run `{gap['command']}`" for gap in report["missing"]]
    return "\n".join(lines)


def _device_line(device: dict[str, Any]) -> str:
    about = [device["name"], device["arch"]]
    about += [f"{device['threads']} threads"] if "threads" in device else []
    about += [f"compute capability {device['capability']}"] if "capability" in device else []
    return f"{device['device']}: {', '.join(about)}"


def _pack_lines(pack: dict[str, Any]) -> list[str]:
    isa = f" ({pack['isa']})" if pack["isa"] else ""
    head = (
        f"  {'✓' if pack['usable'] else '✗'} {pack['arch']}{isa}: {len(pack['kernels'])} kernels, "
        f"{pack['bytes'] / 2**20:.1f} MB, built {pack['created']}, {pack['folder']}"
    )
    lines = [head] if pack["usable"] else [head, f"      {pack['reason']}"]
    groups: dict[tuple[str, str, str], dict[str, set]] = defaultdict(lambda: {"dims": set(), "kinds": set()})
    for kernel in pack["kernels"]:
        group = groups[kernel["definition"], kernel["template"], kernel["dtype"]]
        group["dims"].add((kernel["head_dim"], kernel["head_dim_v"]))
        group["kinds"].add(f"{kernel['mask']}·{kernel['score']}")
    for (definition, template, dtype), group in groups.items():
        dims = ", ".join(str(d) if d == e else f"{d}:{e}" for d, e in sorted(group["dims"]))
        lines.append(f"      {definition} {template} {dtype}, head_dim ≤ {dims}: {', '.join(sorted(group['kinds']))}")
    return lines
