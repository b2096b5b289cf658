"""Packs: where they are found, what is read, what is refused, and what a wrong one says."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT
from tvm_flash import InvalidArgumentError, KernelNotFoundError, PackError, custom_attention, flash_attention
from tvm_flash.call import eager
from tvm_flash.machine import cpu
from tvm_flash.machine.arch import arch_of, by_closeness, runs_on
from tvm_flash.packs import registry as packs
from tvm_flash.packs.manifest import MANIFEST_NAME, Manifest
from tvm_flash.packs.registry import PACKAGE_PACKS, refresh, registry, search_path


@pytest.fixture
def copy(cpu_pack, tmp_path, use_packs):
    """A copy of the CPU pack that is the only one on the search path."""
    folder = tmp_path / "packs" / "cpu"
    shutil.copytree(cpu_pack, folder)
    use_packs(tmp_path / "packs")
    return folder


def attend():
    x = np.random.default_rng(0).standard_normal((1, 2, 9, 64), np.float32)
    return flash_attention(x, x, x)


def edit(folder, **changes):
    path = folder / MANIFEST_NAME
    path.write_text(dataclasses.replace(Manifest.from_json(path.read_text()), **changes).to_json())
    refresh()


def module_of(folder):
    """The module that ``attend`` needs."""
    kernels = Manifest.from_json((folder / MANIFEST_NAME).read_text()).kernels
    return folder / next(k.module for k in kernels if (k.template, k.dtype, k.head_dim) == ("v1", "float32", 64))


def test_a_copied_pack_works(copy):
    assert attend().shape == (1, 2, 9, 64)
    assert registry().kernels("cpu")[0].pack.folder == copy


def test_a_folder_on_the_path_may_be_a_pack_itself(copy, use_packs):
    use_packs(copy)
    assert attend().shape == (1, 2, 9, 64)


def test_the_search_path(monkeypatch, tmp_path):
    monkeypatch.setenv("TVM_FLASH_PACKS", f"{tmp_path / 'a'}:{tmp_path / 'b'}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert search_path() == (
        *(tmp_path / "a", tmp_path / "b"),
        *(tmp_path / "cache" / "tvm_flash" / "packs", PACKAGE_PACKS),
    )


def test_the_first_pack_on_the_path_wins(copy, use_packs, cpu_pack):
    for order in ((copy, cpu_pack), (cpu_pack, copy)):
        use_packs(*order)
        eager.forget()
        attend()
        (plan,) = eager._plans.values()
        assert plan.choice.kernel.pack.folder == order[0]


def with_definition(cpu_pack, folder, mask, *head_dims, **changes):
    """A pack in which kernels of a mask of the package's are those of a definition called "mine"."""
    shutil.copytree(cpu_pack, folder)
    manifest = Manifest.from_json((folder / MANIFEST_NAME).read_text())
    kernels = (
        dataclasses.replace(k, definition="mine", **changes)
        for k in manifest.kernels
        if (k.template, k.dtype, k.mask, k.score, k.kind) == ("v2", "float32", mask, "identity", "forward")
        and k.head_dim in head_dims
    )
    edit(folder, kernels=(*manifest.kernels, *kernels))


def rows(head_dim):
    return np.random.default_rng(0).standard_normal((1, 2, 9, head_dim), np.float32)


def test_two_packs_never_share_a_definition(cpu_pack, tmp_path, use_packs):
    """Their kernels may be of two texts: of one head_dim, or forward, of the one, and of another of the other."""
    with_definition(cpu_pack, tmp_path / "a" / "cpu", "full", 64)
    with_definition(cpu_pack, tmp_path / "b" / "cpu", "causal", 64, 256)
    for first, second, head_dim, causal in (("a", "b", 64, False), ("b", "a", 256, True)):
        use_packs(tmp_path / first, tmp_path / second)
        x = rows(head_dim)
        assert np.array_equal(custom_attention("mine")(x, x, x), flash_attention(x, x, x, causal=causal))
    use_packs(tmp_path / "a", tmp_path / "b")
    with pytest.raises(KernelNotFoundError, match="no cpu kernel for head_dim 256"):
        custom_attention("mine")(rows(256), rows(256), rows(256))
    half = rows(64).astype(np.float16)
    with pytest.raises(KernelNotFoundError, match=r"those in .*b/cpu don't count, since an earlier folder has"):
        custom_attention("mine")(half, half, half)


def test_two_instruction_sets_never_share_a_definition(cpu_pack, tmp_path, use_packs):
    """That with fewer may have been built of an earlier text, and would compute what the other lacks."""
    with_definition(cpu_pack, tmp_path / "packs" / "cpu-less", "causal", 64, 256)
    edit(tmp_path / "packs" / "cpu-less", isa="less", cpu_features=())
    with_definition(cpu_pack, tmp_path / "packs" / "cpu-more", "full", 64)
    use_packs(tmp_path / "packs")
    x = rows(64)
    assert np.array_equal(custom_attention("mine")(x, x, x), flash_attention(x, x, x))
    with pytest.raises(KernelNotFoundError, match="no cpu kernel for head_dim 256"):
        custom_attention("mine")(rows(256), rows(256), rows(256))


def test_kernels_of_a_definition_that_take_other_parameters(cpu_pack, tmp_path, use_packs):
    with_definition(cpu_pack, tmp_path / "packs" / "cpu", "full", 64)
    edit(
        tmp_path / "packs" / "cpu",
        kernels=tuple(
            dataclasses.replace(k, definition="mine", head_dim=32)
            if k.symbol == "v2_float32_d64_window_identity"
            else k
            for k in Manifest.from_json((tmp_path / "packs" / "cpu" / MANIFEST_NAME).read_text()).kernels
        ),
    )
    use_packs(tmp_path / "packs")
    x = rows(64)
    with pytest.raises(PackError, match="v2_float32_d64_full_identity takes other parameters than another one"):
        custom_attention("mine")(x, x, x, window_left=3, window_right=0)


def test_a_definition_that_takes_other_parameters_than_when_its_function_was_made(cpu_pack, tmp_path, use_packs):
    use_packs(tmp_path / "packs")
    with_definition(cpu_pack, tmp_path / "packs" / "cpu", "window", 64)
    attention, x = custom_attention("mine"), rows(64)
    attention(x, x, x, window_left=3, window_right=0)
    shutil.rmtree(tmp_path / "packs" / "cpu")
    with_definition(cpu_pack, tmp_path / "packs" / "cpu", "full", 64)
    with pytest.raises(InvalidArgumentError, match=r"^window_left, window_right: .*make the function anew"):
        attention(x, x, x, window_left=3, window_right=0)


def test_no_pack(use_packs, tmp_path):
    use_packs(tmp_path / "nothing")
    with pytest.raises(
        PackError, match=r"no usable pack for cpu \(looked in .*nothing.*tvm_flash build --arch cpu`"
    ) as e:
        attend()
    assert isinstance(e.value, RuntimeError)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "Expecting value"),
        ('{"schema": 2', "Expecting"),
        ("[]", "schema is 'list'"),
        ('{"schema": 99}', "schema is 99, expected 2"),
        ('{"schema": 2}', "field missing"),
        ("\udcff", "can't be read"),
    ],
)
def test_a_manifest_that_cannot_be_read(copy, text, says):
    (copy / MANIFEST_NAME).write_bytes(text.encode("utf-8", "surrogateescape"))
    refresh()
    with pytest.raises(PackError, match=r"no usable pack for cpu") as e:
        attend()
    assert says in str(e.value) and str(copy) in str(e.value) and "--arch cpu`" in str(e.value)


@pytest.mark.parametrize(
    ("field", "value", "says"), [("colour", "red", "colour"), ("alignment", 32, "at most 16 bytes")]
)
def test_a_manifest_with_a_field_that_is_not_understood(copy, field, value, says):
    raw = json.loads((copy / MANIFEST_NAME).read_text())
    raw["kernels"][0][field] = value
    (copy / MANIFEST_NAME).write_text(json.dumps(raw))
    refresh()
    with pytest.raises(PackError, match=says):
        attend()


def test_one_broken_pack_does_not_disable_the_others(copy, use_packs, tmp_path):
    broken = tmp_path / "broken" / "cpu"
    broken.mkdir(parents=True)
    (broken / MANIFEST_NAME).write_text("{")
    use_packs(broken.parent, copy.parent)
    assert attend().shape == (1, 2, 9, 64)
    assert [b.folder for b in registry().broken] == [broken]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "truncated or replaced"),
        (lambda p: p.write_bytes(b""), "has 0 bytes"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1] + b"x"), "sha256 differs"),
        (lambda p: p.unlink(), "No such file"),
        (lambda p: (p.unlink(), p.mkdir()), "Is a directory"),
    ],
    ids=["truncated", "empty", "edited", "gone", "a folder"],
)
@pytest.mark.parametrize("which", ("module", "support file"))
def test_a_damaged_file(copy, spoil, says, which):
    support = copy / Manifest.from_json((copy / MANIFEST_NAME).read_text()).support_files[0].file
    path = module_of(copy) if which == "module" else support
    spoil(path)
    out = np.full((1, 2, 9, 64), np.nan, np.float32)
    x = np.zeros_like(out)
    for _ in range(2):
        with pytest.raises(PackError, match=r"--arch cpu`") as e:
            flash_attention(x, x, x, out=out)
        assert says in str(e.value) and path.name in str(e.value) and str(copy) in str(e.value)
    assert np.isnan(out).all()


def test_a_pack_that_every_user_may_write(copy, cpu_pack, monkeypatch):
    path = module_of(copy)
    for spoiled, says in ((copy, "chmod -R o-w"), (copy / MANIFEST_NAME, "chmod -R o-w"), (path, path.name)):
        mode = spoiled.stat().st_mode
        spoiled.chmod(mode | 0o002)
        refresh()
        with pytest.raises(PackError, match=r"can be written by every user of this machine") as e:
            attend()
        assert says in str(e.value)
        spoiled.chmod(mode)
    refresh()
    attend()
    path.chmod(0o777)
    monkeypatch.setattr(packs, "PACKAGE_PACKS", copy.parent)  # as open as the Python files beside it
    refresh()
    attend()


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable to root")
def test_a_file_that_cannot_be_read(copy):
    path = module_of(copy)
    path.chmod(0)
    with pytest.raises(PackError, match=rf"{path.name} can't be read: Permission denied"):
        attend()
    (copy / MANIFEST_NAME).chmod(0)
    refresh()
    with pytest.raises(PackError, match=r"manifest.json can't be read: .*Permission denied"):
        attend()


def test_a_pack_that_cannot_be_read_for_whatever_reason(copy, monkeypatch):
    """As root sees no permissions: the system says no."""
    path, read = module_of(copy), Path.read_bytes

    def refuse(self):
        if self.name == path.name:
            raise PermissionError(13, "Permission denied")
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(PackError, match=rf"{path.name} can't be read: Permission denied"):
        attend()


def test_processes_that_load_while_another_publishes(copy, python):
    """Every reader finds a whole pack, the old one or a new one, whatever the moment.

    The files of the pack before the last are gone, so that no two are published while one is loaded.
    """
    loads = copy.parent / "loads"  # a byte for each
    loads.touch()
    program = f"""
import dataclasses, random, time
from pathlib import Path
from schedules.builder import pack
folder, loads, draw = Path({str(copy)!r}), Path({str(loads)!r}), random.Random(0)
manifest = pack.read_manifest(folder)
for number in range(12):
    new = {{m.file: f"{{m.file.split('.')[0]}}.{{number}}.so" for m in manifest.modules}}
    for old, name in new.items():
        (folder / name).write_bytes((folder / old).read_bytes())
    modules = tuple(dataclasses.replace(m, file=new[m.file]) for m in manifest.modules)
    kernels = tuple(dataclasses.replace(k, module=new[k.module]) for k in manifest.kernels)
    manifest = dataclasses.replace(manifest, modules=modules, kernels=kernels)
    pack.publish(folder, manifest)
    done = loads.stat().st_size
    while loads.stat().st_size < done + 2:
        time.sleep(1e-4)
    time.sleep(0.02 * draw.random())
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    builder = subprocess.Popen([sys.executable, "-c", program], env=environment)
    loaded = set()
    try:
        while builder.poll() is None:
            refresh()
            assert attend().shape == (1, 2, 9, 64)
            loaded.add(registry().kernels("cpu")[0].entry.module)
            with loads.open("ab") as file:
                file.write(b".")
    finally:
        builder.kill()
    assert builder.wait() == 0 and len(loaded) > 6


def test_a_module_that_is_no_library(copy):
    """A file that the manifest vouches for, and the loader refuses."""
    path, data = module_of(copy), b"not a library"
    manifest = Manifest.from_json((copy / MANIFEST_NAME).read_text())
    path.write_bytes(data)
    entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit(copy, modules=tuple(dataclasses.replace(m, **entry) if m.file == path.name else m for m in manifest.modules))
    with pytest.raises(PackError, match=rf"{path.name} can't be loaded"):
        attend()


def test_a_module_outside_the_pack(copy):
    manifest = Manifest.from_json((copy / MANIFEST_NAME).read_text())
    outside = f"../{module_of(copy).name}"
    edit(
        copy,
        modules=tuple(dataclasses.replace(m, file=outside) for m in manifest.modules),
        kernels=tuple(dataclasses.replace(k, module=outside) for k in manifest.kernels),
    )
    with pytest.raises(PackError, match=r"isn't a plain file name"):
        attend()


def _renamed(entry):
    launches = tuple(dataclasses.replace(x, symbol=f"{x.symbol}_gone") for x in entry.launches)
    return dataclasses.replace(entry, launches=launches)


def test_a_function_that_is_not_there(copy):
    manifest = Manifest.from_json((copy / MANIFEST_NAME).read_text())
    edit(copy, kernels=tuple(_renamed(k) for k in manifest.kernels))
    with pytest.raises(PackError, match=r"has no function v1_float32_.*_gone"):
        attend()


def test_a_pack_of_another_processor(copy):
    edit(copy, cpu_features=("fpu", "amx_tile_of_tomorrow"), isa="amx")
    with pytest.raises(PackError, match=r"it is for amx and needs amx_tile_of_tomorrow, which this processor lacks"):
        attend()
    assert registry().packs and not registry().kernels("cpu")


def test_a_pack_of_an_unknown_arch(copy):
    edit(copy, arch="tpu_v9")
    with pytest.raises(PackError, match=r"no usable pack for cpu"):
        attend()
    assert "unknown to this version" in registry().packs[0].unusable


FLAGS = frozenset(("sse4_2", "popcnt", "avx", "avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile"))


@pytest.mark.parametrize(
    ("isa", "without"),
    [
        ("", ()),
        ("amx", ()),
        ("avx512_bf16", ("amx_tile",)),
        ("avx512", ("amx_tile", "avx512_bf16")),
        ("avx2", ("amx_tile", "avx512_bf16", "avx512_vnni", "avx512f")),
        ("baseline", FLAGS - {"sse4_2", "popcnt"}),
    ],
)
def test_the_most_that_is_used_of_a_processor(isa, without):
    assert cpu._restricted(FLAGS, isa) == FLAGS - set(without)


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(InvalidArgumentError, match=r"TVM_FLASH_MAX_ISA: is 'avx9', expected one of baseline, avx2"):
        cpu._restricted(FLAGS, "avx9")


def test_a_pack_beyond_the_most_that_is_used(cpu_pack, python):
    program = """
from tvm_flash.packs.registry import registry
print(registry().kernels("cpu") == [], *[p.unusable for p in registry().packs])
"""
    if "avx2" in registry().packs[0].manifest.cpu_features:
        assert "which this processor lacks" in python(program, TVM_FLASH_MAX_ISA="baseline")
    else:
        assert "False None" in python(program, TVM_FLASH_MAX_ISA="baseline")


def test_of_two_cpu_packs_the_richer_comes_first(cpu_pack, tmp_path, use_packs):
    for name, features in (("a", ()), ("b", ("fpu",)), ("c", ("fpu", "sse2"))):
        shutil.copytree(cpu_pack, tmp_path / "packs" / name)
        edit(tmp_path / "packs" / name, cpu_features=features)
    use_packs(tmp_path / "packs")
    if not {"fpu", "sse2"} <= cpu.features():
        pytest.skip("the flags are those of x86-64")
    attend()
    assert [k.pack.folder.name for k in registry().kernels("cpu")][:: len(registry().kernels("cpu")) // 3][:3] == [
        *("c", "b", "a"),
    ]


def test_a_pack_that_is_rebuilt_meanwhile(copy):
    """Files of the old manifest stay until the next build: what was found keeps working, a refresh finds the new."""
    kernels = registry().kernels("cpu")
    edit(copy, created="later")
    assert registry().packs[0].manifest.created == "later"
    assert [f.symbol for f in registry().load(kernels[0])] == [kernels[0].entry.symbol]
    attend()


RUNS = {
    "sm_90a": [(9, 0)],
    "sm_90": [(9, 0)],
    "sm_80": [(8, 0), (8, 6), (8, 7), (8, 9)],
    "sm_86": [(8, 6), (8, 7), (8, 9)],
    "sm_89": [(8, 9)],
    "sm_75": [(7, 5)],
    "sm_70": [(7, 0), (7, 5)],
    "sm_100a": [(10, 0)],
    "sm_120": [(12, 0), (12, 1)],
    "sm_120a": [(12, 0)],
    "cpu": [],
    "nonsense": [],
}
CAPABILITIES = [(7, 0), (7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1)]


@pytest.mark.parametrize("arch", RUNS)
def test_which_gpus_run_an_arch(arch):
    assert [c for c in CAPABILITIES if runs_on(arch, c)] == RUNS[arch]


@pytest.mark.parametrize(
    ("capability", "archs"),
    [
        ((9, 0), ["sm_90a", "sm_90"]),
        ((8, 9), ["sm_89", "sm_86", "sm_80"]),
        ((8, 6), ["sm_86", "sm_80"]),
        ((8, 0), ["sm_80"]),
        ((7, 5), ["sm_75", "sm_70"]),
        ((12, 1), ["sm_120"]),
        ((6, 1), []),
    ],
)
def test_the_closest_arch_comes_first(capability, archs):
    assert by_closeness(set(RUNS) - {"nonsense"}, capability) == archs


def test_the_arch_to_build():
    assert [arch_of(c) for c in ((7, 0), (8, 9), (9, 0), (12, 0))] == ["sm_70", "sm_89", "sm_90a", "sm_120"]
