"""Compilers and linkers: what they accept, what they refuse, and that modules need nothing else at run time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm.script import tirx as T

from schedules.builder.compile import without_unused_headers
from schedules.toolchain import cpu, cuda, elements, host, inspection, machine, nvcc, nvrtc, ptxas
from schedules.toolchain.process import ToolchainError, run
from tests.shared import HANGS

ROOT = Path(__file__).resolve().parent.parent

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'fast_kernel' for 'sm_90a'
ptxas info    : Function properties for fast_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 9 barriers, 1024 bytes smem
ptxas info    : Compiling entry function 'fat_kernel' for 'sm_90a'
ptxas info    : Function properties for fat_kernel
    64 bytes stack frame, 40 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""
SERIALISED = (
    "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ...\n"
)

#: As TVM exports it, with fewer checks: device code, and a function that tvm-ffi can call.
SOURCE = """\
extern "C" __global__ void __launch_bounds__(BOUNDS) scale_kernel(float* __restrict__ x, int n);
extern "C" __global__ void __launch_bounds__(BOUNDS) scale_kernel(float* __restrict__ x, int n) {
  float a[SIZE];
  for (int i = 0; i < SIZE; i++) a[i] = x[i * n + threadIdx.x];
  for (int k = 0; k < n; k++)
    #pragma unroll
    for (int i = 0; i < SIZE; i++) a[i] = a[i] * a[(i + 7) % SIZE] + 1.0f;
  for (int i = 0; i < SIZE; i++) x[i * n + threadIdx.x] = a[i];
}
#include <tvm/ffi/c_api.h>
#include <tvm/ffi/function.h>
#include <cuda.h>
#include <cuda_runtime.h>
void* __tvm_ffi__library_ctx = NULL;
template <typename... Params, typename... Args>
static cudaError_t tvm_cuda_host_launch(void (*kernel)(Params...), const cudaLaunchConfig_t* config, Args... args) {
  return cudaLaunchKernelEx(config, kernel, ((Params)args)...);
}
extern "C" TVM_FFI_DLL_EXPORT int __tvm_ffi_scale(void*, void*, int, void*) {
  TVM_FFI_SAFE_CALL_BEGIN();
  cudaLaunchConfig_t cuda_config = {};
  float* x = nullptr;
  tvm_cuda_host_launch(::scale_kernel, &cuda_config, x, 2);
  TVM_FFI_SAFE_CALL_END();
}
extern "C" TVM_FFI_DLL_EXPORT int __tvm_ffi_main(void* s, void* a, int n, void* r) {
  return __tvm_ffi_scale(s, a, n, r);
}
"""


def small_source(size: int = 4, bounds: str = "32") -> str:
    return SOURCE.replace("SIZE", str(size)).replace("BOUNDS", bounds)


def exports(module: Path) -> set[str]:
    """Functions that a module defines; it can't be loaded where there is no driver."""
    listed = run(["nm", "--dynamic", "--defined-only", "--format=posix", module], "reading the symbols")
    return {line.split()[0] for line in listed.splitlines()}


# ---------------------------------------------------------------- ptxas


def test_report_is_read():
    fast, fat = ptxas.parse(PTXAS).kernels
    assert fast == ptxas.KernelReport("fast_kernel", "sm_90a", 168, 0, 0, 1024)
    assert fat == ptxas.KernelReport("fat_kernel", "sm_90a", 255, 64, 68, 0)


def test_spills_and_serialised_wgmma_are_refused():
    report = ptxas.parse(PTXAS)
    with pytest.raises(ToolchainError, match="fat_kernel for sm_90a: spills 68 bytes at 255 registers"):
        ptxas.check(report, "sm_90a")
    ptxas.check(report, "sm_80")  # code for another arch says nothing
    with pytest.raises(ToolchainError, match=r"C7510 \(wgmma is serialised\)"):
        ptxas.check(ptxas.parse(PTXAS + SERIALISED), "sm_80")


# ---------------------------------------------------------------- nvcc


def test_gencode():
    assert nvcc.code_for("sm_90a") == "arch=compute_90a,code=sm_90a"
    assert nvcc.code_for("sm_80", "sm_90") == "arch=compute_80,code=[sm_80,compute_80]"
    with pytest.raises(ToolchainError, match="sm_90a code runs on sm_90a only"):
        nvcc.code_for("sm_90a", "sm_100")
    assert nvcc.code_for("sm_80", recompile_for="sm_90") == "arch=compute_80,code=sm_90"
    assert nvcc.code_for("sm_120", recompile_for="sm_90") == "arch=compute_90,code=sm_90"


def test_source_to_module_without_tvm(tmp_path):
    (tmp_path / "k.cu").write_text(small_source())
    script = f"""
import sys
from pathlib import Path
from schedules.toolchain import cuda
folder = Path({str(tmp_path)!r})
print(cuda.compile_object(folder / "k.cu", folder / "k.o", "sm_80", run_on="sm_90"))
cuda.link_module([folder / "k.o"], folder / "k.so")
assert not any(m == "tvm" or m.startswith("tvm.") for m in sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "scale_kernel" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["k.cu", "k.o", "k.so"]
    assert exports(tmp_path / "k.so") >= {"__tvm_ffi_scale", "__tvm_ffi_main"}
    needed = inspection.needed_libraries(tmp_path / "k.so")
    assert "libcuda.so.1" in needed
    assert "libcudart" not in " ".join(needed)


def test_compiler_errors_are_readable(tmp_path):
    (tmp_path / "k.cu").write_text("int f( {\n" + small_source())
    with pytest.raises(ToolchainError, match=r"compiling k.cu for sm_80: .*\n.*error"):
        cuda.compile_object(tmp_path / "k.cu", tmp_path / "k.o", "sm_80")
    assert not (tmp_path / "k.o").exists()


def test_spilling_kernel_is_refused(tmp_path):
    (tmp_path / "k.cu").write_text(small_source(96, "1024, 2"))
    with pytest.raises(ToolchainError, match=r"scale_kernel for sm_80: spills \d+ bytes at 32 registers"):
        cuda.compile_object(tmp_path / "k.cu", tmp_path / "k.o", "sm_80")
    assert not (tmp_path / "k.o").exists()
    report = cuda.compile_object(tmp_path / "k.cu", tmp_path / "k.o", "sm_80", of_user=True)
    assert report.kernels[0].spills and (tmp_path / "k.o").exists()


def test_templates_with_the_same_device_half_share_an_image(tmp_path, monkeypatch):
    compiled, image = [], nvcc.image

    def counted(device, *arguments, **options):
        compiled.append(device.name)
        return image(device, *arguments, **options)

    monkeypatch.setattr(nvcc, "image", counted)
    reports = []
    for name in ("v1_scale", "v2_scale", "v2_other"):
        text = small_source().replace("scale_kernel", f"{name}_kernel").replace("__tvm_ffi_scale", f"__tvm_ffi_{name}")
        (tmp_path / f"{name}.cu").write_text(text)
        target = tmp_path / f"{name}.o"
        reports.append(
            cuda.compile_object(tmp_path / f"{name}.cu", target, "sm_80", images=tmp_path / "images").kernels[0]
        )
    assert compiled == ["v1_scale.cu", "v2_other.cu"]
    assert reports[0] == reports[1]
    assert [r.name for r in reports] == ["scale_kernel", "scale_kernel", "other_kernel"]
    cuda.link_module([tmp_path / "v1_scale.o", tmp_path / "v2_scale.o"], tmp_path / "k.so")
    assert exports(tmp_path / "k.so") >= {"__tvm_ffi_v1_scale", "__tvm_ffi_v2_scale"}


def test_dynamic_shared_memory_is_read_from_the_launch():
    launch = (
        "cudaFuncSetAttribute(::k, cudaFuncAttributeMaxDynamicSharedMemorySize, 65536)); x.dynamicSmemBytes = 65536;"
    )
    assert cuda.dynamic_shared_memory(launch) == 65536
    assert cuda.dynamic_shared_memory("cuda_config.dynamicSmemBytes = 0;") == 0


# ---------------------------------------------------------------- inspection


def library(tmp_path: Path, source: str, *flags: str) -> Path:
    (tmp_path / "x.c").write_text(source)
    run(["cc", "-shared", "-fPIC", tmp_path / "x.c", "-o", tmp_path / "x.so", *flags], "test library")
    return tmp_path / "x.so"


def test_module_with_source_is_refused(tmp_path):
    path = library(tmp_path, 'const char* s = "extern \\"C\\" __global__ void k(float* x) {}";')
    with pytest.raises(ToolchainError, match=r"x\.so: holds CUDA source"):
        inspection.check_module(path)


def test_module_with_other_needs_is_refused(tmp_path):
    (tmp_path / "other").mkdir()
    other = library(tmp_path / "other", "int other(void) { return 1; }", "-Wl,-soname,libother.so.1")
    path = library(tmp_path, "int other(void); int f(void) { return other(); }", str(other))
    with pytest.raises(ToolchainError, match=r"x.so: needs libother.so.1"):
        inspection.check_module(path)
    inspection.check_module(path, may_need=("libother",))


# ---------------------------------------------------------------- this machine


def test_best_instruction_set(monkeypatch):
    isas = {name: SimpleNamespace(features=f) for name, f in (("wide", ("avx512f", "fma")), ("narrow", ("fma",)))}
    monkeypatch.setattr(machine, "cpu_features", lambda: frozenset({"fma", "sse2"}))
    assert machine.best_isa(isas) == "narrow"
    monkeypatch.setattr(machine, "cpu_features", frozenset)
    with pytest.raises(ValueError, match="none of the instruction sets wide, narrow"):
        machine.best_isa(isas)


# ---------------------------------------------------------------- the thread pool of CPU modules


def module_of(f, folder: Path) -> Path:
    """The module of a function ``f``, beside its runtime in a folder."""
    runtime = folder / cpu.runtime_name()
    cpu.build_runtime(runtime, runtime.name)
    compiled = tvm.compile(tvm.IRModule({"f": f}), target=tvm.target.Target("llvm"))
    compiled.mod.write_to_file(str(folder / "f.o"), "o")
    cpu.link_module([folder / "f.o"], folder / "f.so", runtime)
    (folder / "f.o").unlink()
    return folder / "f.so"


@pytest.fixture(scope="module")
def doubled(tmp_path_factory):
    """A module whose function ``f(a, b)`` sets ``b = 2 * a`` row by row in parallel, through scratch memory."""

    @T.prim_func(s_tir=True)
    def f(a: T.handle, b: T.handle):
        T.func_attr({"tirx.noalias": True, "global_symbol": "f"})
        rows = T.int64()
        A = T.match_buffer(a, (rows, 512), "float32")
        B = T.match_buffer(b, (rows, 512), "float32")
        for i in T.parallel(rows):
            with T.sblock("row"):
                row = T.axis.remap("S", [i])
                scratch = T.sblock_alloc_buffer((512,), "float32")
                for j in range(512):
                    with T.sblock("fill"):
                        column = T.axis.remap("S", [j])
                        scratch[column] = A[row, 511 - column] * T.float32(2)
                for j in range(512):
                    with T.sblock("store"):
                        column = T.axis.remap("S", [j])
                        B[row, column] = scratch[511 - column]

    return module_of(f, tmp_path_factory.mktemp("doubled"))


def test_the_runtime_loads_on_old_systems(doubled):
    """It asks for no version of a symbol that glibc 2.17, of manylinux2014, lacks."""
    (runtime,) = doubled.parent.glob("lib*.so")
    symbols = subprocess.run(("objdump", "-T", runtime), capture_output=True, text=True, check=True).stdout
    versions = {tuple(map(int, text.split("."))) for text in re.findall(r"GLIBC_([\d.]+)", symbols)}
    assert max(versions) <= (2, 17)


CALLS = """
import os, sys, threading
import numpy as np, tvm_ffi
f = tvm_ffi.load_module(sys.argv[1])["f"]

def call(rows):
    a = np.random.rand(rows, 512).astype("float32")
    b = np.zeros_like(a)
    f(tvm_ffi.from_dlpack(a), tvm_ffi.from_dlpack(b))
    assert np.array_equal(b, 2 * a)
"""


def in_process(module: Path, script: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", CALLS + script, str(module)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("threads", ["1", "2", "5"])
def test_pool_runs_every_task_once(doubled, threads):
    script = """
for i in range(2000):
    call(1 + i % 17)
print(len(os.listdir("/proc/self/task")))
"""
    assert int(in_process(doubled, script, TVM_FLASH_NUM_THREADS=threads)) >= int(threads)


def test_pool_serves_many_threads_and_forked_processes(doubled):
    script = """
threads = [threading.Thread(target=lambda: [call(1 + i % 37) for i in range(300)]) for _ in range(6)]
[t.start() for t in threads]
[t.join() for t in threads]
for _ in range(5):
    child = os.fork()
    if child == 0:
        for i in range(200):
            call(1 + i % 17)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    call(9)
"""
    in_process(doubled, script, TVM_FLASH_NUM_THREADS="3")


def test_module_runs_beside_tvm_and_without_it(doubled):
    in_process(doubled, "call(5); assert 'tvm' not in sys.modules; import tvm; call(5)")
    in_process(doubled, "import tvm; call(5)")
    a, b = np.ones((3, 512), "float32"), np.zeros((3, 512), "float32")
    tvm_ffi.load_module(str(doubled))["f"](tvm_ffi.from_dlpack(a), tvm_ffi.from_dlpack(b))
    assert (b == 2).all()


@pytest.mark.parametrize("size", [256, 5000])
def test_scratch_memory_of_tests_is_poisoned(size, tmp_path):
    """What nobody wrote is NaN, in the largest of small pieces and in a large one, also where the last call wrote."""

    @T.prim_func(s_tir=True)
    def half(a: T.handle, b: T.handle):
        T.func_attr({"tirx.noalias": True, "global_symbol": "f"})
        A = T.match_buffer(a, (4, size), "float32")
        B = T.match_buffer(b, (4, size), "float32")
        for i in T.parallel(4):
            with T.sblock("row"):
                row = T.axis.remap("S", [i])
                scratch = T.sblock_alloc_buffer((size,), "float32")
                for j in range(size):
                    with T.sblock("fill"):
                        column = T.axis.remap("S", [j])
                        if A[row, column] > T.float32(0):
                            scratch[column] = A[row, column]
                for j in range(size):
                    with T.sblock("store"):
                        column = T.axis.remap("S", [j])
                        B[row, column] = scratch[column]

    f = tvm_ffi.load_module(str(module_of(half, tmp_path)))["f"]
    b = np.zeros((4, size), "float32")
    f(tvm_ffi.from_dlpack(np.ones_like(b)), tvm_ffi.from_dlpack(b))
    assert (b == 1).all()
    f(tvm_ffi.from_dlpack(np.zeros_like(b)), tvm_ffi.from_dlpack(b))
    assert np.isnan(b).all()


def test_call_that_only_tvm_can_answer_is_refused(tmp_path):
    source = "void* __TVMFuncCall __attribute__((weak)); int f(void) { return __TVMFuncCall != 0; }"
    (tmp_path / "x.c").write_text(source)
    run(["cc", "-c", "-fPIC", tmp_path / "x.c", "-o", tmp_path / "x.o"], "test object")
    runtime = tmp_path / cpu.runtime_name()
    cpu.build_runtime(runtime, runtime.name)
    with pytest.raises(ToolchainError, match="calls __TVMFuncCall, which needs TVM's runtime"):
        cpu.link_module([tmp_path / "x.o"], tmp_path / "x.so", runtime)


# ---------------------------------------------------------------- sm_70, and the host half of every arch


def has_volta() -> bool:
    try:
        return bool(nvrtc.compiler_version())
    except ToolchainError:
        return False


@pytest.mark.skipif(not has_volta(), reason="needs the extra volta (the wheels of CUDA 12)")
@pytest.mark.parametrize("run_on", ["", "sm_90"])
def test_volta_image_is_embedded(tmp_path, run_on):
    (tmp_path / "k.cu").write_text(small_source())
    report = cuda.compile_object(tmp_path / "k.cu", tmp_path / "k.o", "sm_70", run_on=run_on)
    cuda.link_module([tmp_path / "k.o"], tmp_path / "k.so")
    assert [(k.name, k.arch, k.spills) for k in report.kernels] == [("scale_kernel", "sm_70", 0)]
    assert "__tvm_ffi_scale" in exports(tmp_path / "k.so")


@pytest.mark.skipif(not has_volta(), reason="needs the extra volta (the wheels of CUDA 12)")
def test_volta_code_is_recompiled_for_a_newer_arch(tmp_path):
    (tmp_path / "k.cu").write_text(small_source())
    report = cuda.compile_object(tmp_path / "k.cu", tmp_path / "k.o", "sm_70", recompile_for="sm_90")
    assert [(k.name, k.arch) for k in report.kernels] == [("scale_kernel", "sm_90")]
    with pytest.raises(ToolchainError, match=r"assembling k\.ptx for sm_70"):
        cuda.compile_object(tmp_path / "k.cu", tmp_path / "k.o", "sm_70", recompile_for="sm_70")


def test_a_source_of_another_form_is_refused(tmp_path):
    with pytest.raises(ToolchainError, match=r"k\.cu: has no host half"):
        host.split("int x;", "k.cu")
    device, half = host.split(small_source(), "k.cu")
    assert "scale_kernel" in host.embed(device, half, tmp_path / "image")
    with pytest.raises(ToolchainError, match="doesn't launch scale_kernel"):
        host.embed(device, half.replace("::scale_kernel", "::other_kernel"), tmp_path / "image")
    with pytest.raises(ToolchainError, match="another form"):
        host.embed(device, half.replace("template <", "template<"), tmp_path / "image")


def with_array(last: str = "x[0] = a_ptr[0];", rounds: int = 15) -> str:
    """A kernel as TVM writes one, which names elements of an array of its own by constants, but perhaps at the end."""
    size = 8
    steps = [f"a_ptr[{i}] = x[{i}];" for i in range(size)]
    steps += [f"a_ptr[{i}] = (a_ptr[{i}] * a_ptr[{(i + 3) % size}]) + x[{i}];" for i in range(size)] * rounds
    steps += [*(f"x[{i}] = a_ptr[{i}];" for i in range(1, size)), last]
    signature = 'extern "C" __global__ void __launch_bounds__(128, 2) array_kernel(float* __restrict__ x)'
    return f"{signature};\n{signature} {{\n  alignas(64) float a_ptr[{size}];\n  " + "\n  ".join(steps) + "\n}\n"


def test_elements_taken_apart_are_the_same_code(tmp_path):
    changed = elements.with_elements_apart(with_array())
    assert "  float a_ptr_at_7[1], a_ptr_at_6[1], " in changed and "x[0] = a_ptr_at_0[0];" in changed
    found = []
    for name, device in (("array", with_array()), ("elements", changed)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "k.cu").write_text(device)
        found.append(nvcc.ptx(tmp_path / name / "k.cu", "sm_80"))
    assert found[0] == found[1] and "array_kernel" in found[0]


@pytest.mark.parametrize(
    "text",
    [
        with_array("x[0] = a_ptr[threadIdx.x];"),
        with_array("x[0] = *(a_ptr + 1);"),
        with_array("{ alignas(64) float a_ptr[2]; }"),
        with_array(rounds=2),
    ],
)
def test_other_arrays_stay_whole(text):
    assert elements.with_elements_apart(text) == text


def test_headers_that_nothing_uses_are_dropped():
    both = "#include <cuda/barrier>\n#include <cooperative_groups.h>\n"
    assert without_unused_headers(both + "cuda::std::uint8_t x;") == "cuda::std::uint8_t x;"
    used = both + "namespace cg = cooperative_groups; cuda::barrier<cuda::thread_scope_block> b;"
    assert without_unused_headers(used) == used
