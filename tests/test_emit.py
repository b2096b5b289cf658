"""Building on two machines: sources where TVM is, packs where a compiler is, records for all archs of a source."""

import os
import re
import subprocess
import sys
from importlib.metadata import files
from pathlib import Path

import pytest
import tvm

from schedules.builder.assemble import EMISSION_NAME, assemble, twins
from schedules.builder.emit import emit
from schedules.builder.plan import BuildRequest
from schedules.builder.suite import HeadDim, Selection
from schedules.families.interface import Target
from schedules.toolchain import cuda
from schedules.toolchain.process import ToolchainError

SYMBOL = "v2_float16_d64_causal_identity"


@pytest.fixture(scope="module")
def emitted(tmp_path_factory):
    """Sources of one kernel for two archs, which is the same for both."""
    folder = tmp_path_factory.mktemp("emitted")
    selection = Selection(("v2",), ("float16",), (HeadDim(64, 64),), ("causal",), ("identity",), ("forward",))
    assert emit(BuildRequest((Target("sm_86"), Target("sm_89")), selection), folder) == []
    return folder


def test_a_source_that_two_archs_share_is_written_once(emitted):
    assert [p.parent.name for p in emitted.rglob("*.cu")] == ["sm_86"]
    assert sorted(p.parent.name for p in emitted.rglob(EMISSION_NAME)) == ["sm_86", "sm_89"]
    (((arch, symbol), (twin,)),) = twins(emitted).items()
    assert (arch, symbol, twin.arch, twin.symbol) == ("sm_86", SYMBOL, "sm_89", SYMBOL)


EMIT = """
import sys
from pathlib import Path

import tvm

assert tvm.get_global_func("device_api.cuda", allow_missing=True), "TVM didn't find the CUDA libraries"
from schedules.builder.emit import emit
from schedules.builder.plan import BuildRequest
from schedules.builder.suite import HeadDim, Selection
from schedules.families.interface import Target

selection = Selection(("v2",), ("float16",), (HeadDim(64, 64),), ("causal",), ("identity",), ("forward",))
assert emit(BuildRequest((Target("sm_86"),), selection), Path(sys.argv[1])) == []
"""


def test_the_sources_are_the_same_where_tvm_finds_a_driver(emitted, tmp_path):
    """TVM would compile them by itself there, for the GPU at hand, of which this driver has none."""
    libraries = [f.locate() for f in files("nvidia-cuda-runtime") or () if f.name.startswith("libcudart.so")]
    library = Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"
    wanted = subprocess.run(("nm", "-D", "--undefined-only", library), capture_output=True, text=True, check=True)
    functions = {*re.findall(r" U (cu[A-Z]\w+)$", wanted.stdout, re.M), "cuInit", "cuDriverGetVersion"}
    (tmp_path / "driver.c").write_text("".join(f"int {name}(void) {{ return 100; }}\n" for name in sorted(functions)))
    driver = ("-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "driver.c", "-o", "libcuda.so.1")
    subprocess.run(("cc", *driver), cwd=tmp_path, check=True)
    path = os.pathsep.join(map(str, (tmp_path, *{f.parent for f in libraries})))
    command = (sys.executable, "-c", EMIT, tmp_path / "sources")
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LD_LIBRARY_PATH": path})
    assert done.returncode == 0, done.stderr
    (found,) = (tmp_path / "sources").rglob("*.cu")
    (expected,) = emitted.rglob("*.cu")
    assert found.read_text() == expected.read_text()


def test_packs_of_emitted_sources(emitted, tmp_path):
    try:
        cuda.compiler_version("sm_86")
    except ToolchainError as missing:
        pytest.skip(str(missing))
    manifests = {m.arch: m for m in assemble(emitted, tmp_path / "packs", jobs=2)}
    assert set(manifests) == {"sm_86", "sm_89"}
    entries = [m.kernels[0] for m in manifests.values()]
    assert entries[0].source_hash != entries[1].source_hash
    for entry in entries:
        assert entry.symbol == SYMBOL
        assert (entry.spills, entry.registers > 100) == (0, True)
        assert (tmp_path / "packs" / entry.arch / entry.module).is_file()
    # For verification on another GPU, one of them stands for both.
    (manifest,) = assemble(emitted, tmp_path / "verification", jobs=1, recompile_for="sm_90")
    assert manifest.arch == "sm_86"
    assert manifest.versions["recompiled_for"] == "sm_90"
    assert manifest.kernels[0].source_hash == manifests["sm_86"].kernels[0].source_hash


def test_a_folder_without_sources_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"make it with scripts/build_kernels\.py --emit"):
        assemble(tmp_path, tmp_path / "packs", jobs=1)
