"""Fixtures that all tests share."""

from __future__ import annotations

import fcntl
import gc
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # before NumPy is there: a worker's threads would wait for the others'
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Before torch is there: threads of OpenMP that wait would spin on cores that others need.  With more processes at work
# than there are cores, errors of PyTorch's own attention took 20 s of the processor for 90 cases, and take 1.8 s.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# JAX would take three quarters of a GPU's memory, which other tests use at the same time.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# CPU kernels that read scratch memory which nobody wrote find NaN there, not what the last one left.
os.environ.setdefault("TVM_FLASH_POISON_SCRATCH", "1")

import pytest

from tests import shared
from tests.expected_skips import StrictSkips
from tvm_flash.measure import others
from tvm_flash.operators import BACKWARD, FORWARD
from tvm_flash.packs import registry as packs
from tvm_flash.packs.registry import PATH_VARIABLE

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser):
    parser.addoption(
        "--strict-skips",
        action="store_true",
        help="fail if a test is skipped for a reason not in tests/expected_skips.py",
    )


# Modules, of which torch, TVM and JAX have very many, stay: to look through them again and again for what nobody refers
# to took 6% of the processor's time.
gc.set_threshold(20_000, 20, 20)

# Workers disturb one another all the time: they would wait for a calm moment as long as patience lasts, 10 s each.
others._spent = others.PATIENCE + 1


def pytest_configure(config):
    shared.begin()  # workers of xdist, which come later, have the same folder
    config.option.loadscopereorder = False  # xdist would begin with the files of most tests: FIRST says which are long
    if config.getoption("--strict-skips") and not hasattr(
        config, "workerinput"
    ):  # workers of xdist report to the first
        config.pluginmanager.register(StrictSkips())


#: Long files, the longest first: whoever begins one of them last would leave the other workers without work meanwhile.
FIRST = (
    *("test_wheel.py", "test_tuning.py", "test_tensors_simulated.py", "test_cpu_family.py"),
    *("test_gallery_simulated.py", "test_mma_backward_simulated.py", "test_gpu_compile.py", "test_derive.py"),
    *("test_sm90_backward_simulated.py", "test_definitions_of_sequences.py", "test_tuning_kinds.py"),
    *("test_cpu_amx.py", "test_cpu_backward.py", "test_ragged_backward_simulated.py", "test_sequences_simulated.py"),
    *("test_sm90_simulated.py", "test_sequences_compile.py", "test_peer_suites.py", "test_build_interrupted.py"),
)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Tests of what makes kernels are skipped where there is no TVM, as on a machine that only runs them."""
    report = yield
    if report.failed and find_spec("tvm") is None and "No module named 'tvm'" in str(report.longrepr):
        report.outcome, report.longrepr = "skipped", (str(collector.path), None, "Skipped: needs TVM")
    return report


def pytest_collection_modifyitems(items):
    rank = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(FIRST)))


def pytest_collection_finish():
    gc.freeze()


@pytest.fixture(scope="session")
def cpu_pack(tmp_path_factory):
    """Folder of a CPU pack that this machine can run; built in the package, once, if there is none."""
    if not packs.registry().kernels("cpu"):
        with open(tmp_path_factory.getbasetemp().parent / "tvm_flash_build.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # other workers of this test run wait, then find it built
            command = [sys.executable, ROOT / "scripts" / "build_kernels.py", "--arch", "cpu"]
            done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        packs.refresh()
    kernels = packs.registry().kernels("cpu")
    assert kernels
    return kernels[0].pack.folder


@pytest.fixture
def use_packs(monkeypatch, tmp_path):
    """A function that makes the given folders the whole search path, until the test ends."""

    def use(*folders):
        monkeypatch.setenv(PATH_VARIABLE, ":".join(map(str, folders)))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no_cache"))
        monkeypatch.setattr(packs, "PACKAGE_PACKS", tmp_path / "no_packs_in_the_package")
        packs.refresh()

    yield use
    monkeypatch.undo()
    packs.refresh()


@pytest.fixture
def trains(cpu_pack):
    """The CPU pack has kernels for gradients."""
    if not packs.registry().candidates("cpu", "attention", "float32", BACKWARD):
        pytest.skip("the CPU pack has no kernels for gradients")


@pytest.fixture
def without_backward(monkeypatch):
    """No kernel for gradients is found."""
    candidates = packs.Registry.candidates

    def found(self, arch, definition, dtype, op=FORWARD):
        return [] if op == BACKWARD else candidates(self, arch, definition, dtype, op)

    monkeypatch.setattr(packs.Registry, "candidates", found)
    packs.refresh()
    yield
    monkeypatch.undo()
    packs.refresh()


@pytest.fixture
def python():
    """A function that runs a program in a fresh interpreter, on the packs that this process sees; gives its output."""

    def run(program, *options, **environment):
        folders = os.pathsep.join(str(f) for f in packs.search_path())
        modules = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        variables = {**os.environ, "PYTHONPATH": modules, PATH_VARIABLE: folders, **environment}
        command = [sys.executable, *options, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=ROOT, timeout=shared.HANGS)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.fixture
def toys(monkeypatch):
    """Families whose kernels compile in no time stand for the processor and for sm_90; of what packs have beside
    kernels, the same file is compiled once in a test run."""
    from schedules import families
    from schedules.builder import support
    from tests import toy_family
    from tests.toy_packs import made_once

    for module in toy_family.families_by_name().values():
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for arch, name in toy_family.FAMILY.items():
        monkeypatch.setitem(families.FAMILY, arch, name)
    for name in ("build_runtime", "build_call_path"):
        monkeypatch.setattr(support, name, made_once(getattr(support, name)))


@pytest.fixture
def request_(tmp_path):
    """A request for six kernels of the toy families."""
    from schedules.builder.plan import BuildRequest
    from tests.toy_packs import CPU, TWO_GROUPS

    return BuildRequest((CPU,), TWO_GROUPS, output=tmp_path / "packs", jobs=1)
