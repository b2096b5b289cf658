"""What the host half of a kernel asks of the driver (``schedules/runtime_c/launch.h``), with a driver that counts."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import tvm_ffi

from schedules.toolchain import nvcc
from schedules.toolchain.host import HOST_HEADER, tvm_ffi_include
from schedules.toolchain.process import host_compiler

#: A driver of two devices.  A tensor map of it is the address, followed by a digest of all else.
PROGRAM = r"""
#include "launch.h"

#include <cstdio>
#include <initializer_list>
#include <thread>

static int encoded, replaced, asked_device, asked_attribute, pushed, device_now;

extern "C" {
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  encoded++;
  if ((uint64_t)address % 16) return CUDA_ERROR_INVALID_VALUE;
  uint64_t digest = (((type * 7 + rank) * 7 + interleave) * 7 + swizzle) * 7 + promotion * 3 + fill;
  for (unsigned i = 0; i < rank; i++) digest = digest * 1000003 + sizes[i] * 31 + box[i] * 17 + steps[i];
  for (unsigned i = 0; i + 1 < rank; i++) digest = digest * 1000003 + strides[i];
  *map = {};
  map->opaque[0] = (uint64_t)address;
  map->opaque[1] = digest;
  return CUDA_SUCCESS;
}
CUresult cuTensorMapReplaceAddress(CUtensorMap* map, void* address) {
  replaced++;
  if ((uint64_t)address % 16) return CUDA_ERROR_INVALID_VALUE;
  map->opaque[0] = (uint64_t)address;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice* device) { return asked_device++, *device = device_now, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute, CUdevice device) {
  return asked_attribute++, *value = 100 + device, CUDA_SUCCESS;
}
CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return *context = (CUcontext)(uint64_t)(device + 1), CUDA_SUCCESS;
}
static CUcontext before;
CUresult cuCtxPushCurrent(CUcontext context) {
  before = (CUcontext)(uint64_t)(device_now + 1);
  return pushed++, device_now = (int)(uint64_t)context - 1, CUDA_SUCCESS;
}
CUresult cuCtxPopCurrent(CUcontext* context) {
  return *context = before, device_now = (int)(uint64_t)before - 1, CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult, const char** text) { return *text = "?", CUDA_SUCCESS; }
CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode*) { return CUDA_SUCCESS; }
CUresult cuLibraryLoadData(CUlibrary*, const void*, CUjit_option*, void**, unsigned, CUlibraryOption*, void**,
                           unsigned) {
  return CUDA_SUCCESS;
}
CUresult cuLibraryGetKernel(CUkernel*, CUlibrary, const char*) { return CUDA_SUCCESS; }
static int set;
CUresult cuKernelSetAttribute(CUfunction_attribute, int, CUkernel, CUdevice) { return set++, CUDA_SUCCESS; }
static int plain, early, as_declared;
CUresult cuLaunchKernel(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream,
                        void** arguments, void**) {
  plain++;
  as_declared += *(int*)arguments[0] == 5 && *(float*)arguments[1] == 0.5f && *(int64_t*)arguments[2] == -3 &&
                 !((uint64_t)arguments[3] % alignof(CUtensorMap)) && ((uint64_t*)arguments[3])[15] == 11;
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction, void** arguments, void**) {
  const CUlaunchAttribute& only = config->attrs[0];
  early += config->numAttrs == 1 && only.id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION &&
           only.value.programmaticStreamSerializationAllowed == 1 && config->gridDimX == 7 && config->gridDimZ == 3 &&
           config->blockDimX == 256 && config->sharedMemBytes == 4096 && *(int*)arguments[0] == 5;
  return CUDA_SUCCESS;
}
}

struct Problem {
  uint64_t address;
  cuuint64_t sizes[5] = {64, 100, 4, 2, 1}, strides[4] = {512, 128, 51200, 102400};
  cuuint32_t box[5] = {64, 64, 1, 1, 1}, steps[5] = {1, 1, 1, 1, 1};
  unsigned rank = 4;
  CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B;
};

template <typename Encode>
static CUtensorMap map_of(Encode encode, Problem& p, CUresult want = CUDA_SUCCESS) {
  alignas(64) CUtensorMap map = {};
  CUresult error = encode(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, p.rank, (void*)p.address, p.sizes, p.strides, p.box,
                          p.steps, CU_TENSOR_MAP_INTERLEAVE_NONE, p.swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                          CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error != want) printf("error %d instead of %d\n", error, want);
  return map;
}

static void maps() {
  static thread_local device_image::TensorMap last;
  auto ours = [](auto... x) { return last.encode(x...); };
  auto drivers = [](auto... x) { return cuTensorMapEncodeTiled(x...); };
  int wrong = 0;
  auto compare = [&](Problem p) {
    int before = encoded;
    CUtensorMap found = map_of(ours, p);
    int fresh = encoded - before;
    CUtensorMap wanted = map_of(drivers, p);
    wrong += memcmp(&found, &wanted, sizeof found) != 0;
    return fresh;
  };
  Problem p{1024};
  int fresh = compare(p);
  printf("the first: %d\n", fresh);
  for (int i = 0; i < 5; i++) p.address += 16, fresh += compare(p);
  printf("other addresses: %d\n", fresh);
  for (int i = 0; i < 4; i++) {
    Problem other = p;
    other.sizes[i]++, fresh += compare(other);
    other.box[i]++, fresh += compare(other);
    other.steps[i]++, fresh += compare(other);
    if (i < 3) other.strides[i] += 16, fresh += compare(other);
  }
  printf("other sizes: %d\n", fresh);
  Problem five = p, unswizzled = p;
  five.rank = 5, unswizzled.swizzle = CU_TENSOR_MAP_SWIZZLE_NONE;
  fresh += compare(five) + compare(five) + compare(unswizzled) + compare(p);
  printf("other kinds: %d\n", fresh);
  Problem misaligned = p;
  misaligned.address += 4;
  map_of(ours, misaligned, CUDA_ERROR_INVALID_VALUE);
  map_of(ours, misaligned, CUDA_ERROR_INVALID_VALUE);
  fresh += compare(p);
  printf("after an error: %d\n", fresh);
  std::thread([&] { fresh += compare(p); }).join();
  printf("another thread: %d\n", fresh);
  printf("wrong maps: %d\n", wrong);
}

static void devices() {
  device_image::Kernel kernel(nullptr, "kernel", false);
  for (int device = 0; device < 2; device++)
    for (int i = 0; i < 3; i++) {
      tvm::ffi::CUDADeviceGuard guard(device);
      int found = -1;
      cudaGetDevice(&found);
      kernel.prepare(cudaFuncAttributeMaxDynamicSharedMemorySize, 1 << 16);
      if (found != device || multiprocessors() != 100 + device) printf("a wrong device\n");
    }
  printf("guards: asked %d, pushed %d, attributes %d, prepared %d\n", asked_device, pushed, asked_attribute, set);
  device_now = 1;
  {
    tvm::ffi::CUDADeviceGuard outer(1);
    {
      tvm::ffi::CUDADeviceGuard inner(0);
      printf("inner %d", multiprocessors());
    }
    printf(", outer %d", multiprocessors());
  }
  device_now = 0;
  printf(", none %d\n", multiprocessors());
}

static void launches() {
  cudaLaunchConfig_t config = {dim3(7, 5, 3), dim3(256), 4096, nullptr};
  CUtensorMap map = {};
  ((uint64_t*)&map)[15] = 11;
  device_image::Kernel(nullptr, "first", false)
      .launch((void (*)(int, float, int64_t, const CUtensorMap))nullptr, &config, int64_t(5), 0.5, -3, map);
  device_image::Kernel(nullptr, "second", true).launch((void (*)(int))nullptr, &config, 5);
  printf("launches: plain %d, early %d, arguments as declared %d\n", plain, early, as_declared);
}

static int checked(int value, CUresult error) {
  TVM_FFI_SAFE_CALL_BEGIN();
  TVM_FFI_CHECK(value >= 0, ValueError) << "it is negative";
  device_image::check(error, "cannot use it");
  TVM_FFI_SAFE_CALL_END();
}

static void errors() {
  printf("errors: %d", checked(1, CUDA_SUCCESS));
  for (bool negative : {true, false}) {
    if (checked(negative ? -1 : 1, negative ? CUDA_SUCCESS : CUDA_ERROR_UNKNOWN) != -1) printf("; no error");
    void* raised;
    TVMFFIErrorMoveFromRaised(&raised);
    auto* error = (TVMFFIErrorCell*)((char*)raised + sizeof(TVMFFIObject));
    printf("; %.*s: %.*s", (int)error->kind.size, error->kind.data, (int)error->message.size, error->message.data);
  }
  printf("\n");
}

int main() { maps(), devices(), launches(), errors(); }
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """The lines that the program says."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "program.cpp").write_text(PROGRAM)
    include = [f"-I{path}" for path in (HOST_HEADER.parent, *tvm_ffi_include(), *nvcc.find_toolkit().include[:1])]
    library = Path(tvm_ffi.LIB._name)
    link = (library, f"-Wl,-rpath,{library.parent}", "-pthread")
    subprocess.run(
        [
            host_compiler("c++"),
            "-std=c++17",
            "-O1",
            "-w",
            *include,
            folder / "program.cpp",
            *link,
            "-o",
            folder / "run",
        ],
        check=True,
    )
    done = subprocess.run([folder / "run"], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def test_a_tensor_map_is_encoded_only_if_more_than_its_address_is_new(said):
    assert said[:7] == [
        "the first: 1",
        "other addresses: 1",
        "other sizes: 16",
        "other kinds: 19",
        "after an error: 20",
        "another thread: 21",
        "wrong maps: 0",
    ]


def test_the_driver_is_asked_for_the_device_once_in_a_call(said):
    assert said[7:9] == [
        "guards: asked 6, pushed 3, attributes 2, prepared 2",
        "inner 100, outer 101, none 100",
    ]


def test_a_kernel_that_waits_for_the_launch_before_it_may_begin_early(said):
    assert said[9] == "launches: plain 1, early 1, arguments as declared 1"


def test_an_error_has_a_kind_and_a_message(said):
    assert said[-1] == (
        "errors: 0; ValueError: Check failed: (value >= 0) is false: it is negative; CUDAError: cannot use it: ?"
    )
