// What the host half of a kernel needs of CUDA, on the driver's interface: a module needs libcuda and no CUDA runtime.
//
// TVM's generated host code is written against the CUDA runtime.  The names that it uses are given here the same
// meaning on driver calls; the kernels come from a device image that is embedded in the object.

#pragma once

#include <cuda.h>
#include <tvm/ffi/c_api.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>

// What a host half calls where a check fails: the compiler puts such places out of the way of what runs.
extern "C" __attribute__((cold)) void TVMFFIErrorSetRaisedFromCStrParts(const char*, const char**, int32_t);

// The host half only casts pointers to these.
struct __half;
struct __nv_bfloat16;
using half = __half;
using nv_bfloat16 = __nv_bfloat16;
using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;

#define __grid_constant__

// Generated code is between these.
#define TVM_FFI_SAFE_CALL_BEGIN() try {
#define TVM_FFI_SAFE_CALL_END()                                \
  }                                                            \
  catch (const device_image::Error& error) {                   \
    TVMFFIErrorSetRaisedFromCStr(error.kind, error.message);   \
    return -1;                                                 \
  }                                                            \
  return 0

#define TVM_FFI_CHECK(condition, kind)        \
  if (__builtin_expect(!(condition), false)) \
  device_image::Failure{#kind, "Check failed: (" #condition ") is false: "}

using cudaError_t = CUresult;
using cudaStream_t = CUstream;
constexpr CUresult cudaSuccess = CUDA_SUCCESS;
constexpr CUresult cudaErrorCudartUnloading = CUDA_ERROR_DEINITIALIZED;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };  // all that host halves name

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

constexpr CUfunction_attribute cudaFuncAttributeMaxDynamicSharedMemorySize =
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
constexpr CUfunction_attribute cudaFuncAttributeNonPortableClusterSizeAllowed =
    CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED;

static const char* cudaGetErrorString(CUresult error) {
  const char* text = nullptr;
  return cuGetErrorString(error, &text) == CUDA_SUCCESS && text ? text : "unknown error of the driver";
}

static CUresult cudaGetLastError() { return CUDA_SUCCESS; }  // the driver keeps no last error

namespace device_image {

// The device that a guard of this thread has made current; -1 outside of guards.
static thread_local int guarded = -1;

}  // namespace device_image

static CUresult cudaGetDevice(int* device) {
  if (device_image::guarded < 0) return cuCtxGetDevice(device);
  *device = device_image::guarded;
  return CUDA_SUCCESS;
}

namespace device_image {

// What a host half throws, and hands to tvm-ffi where it is left.  tvm-ffi's own class would do the same, and take each
// kernel a second to compile.
struct Error {
  const char* kind;
  char message[512];
};

[[noreturn, gnu::cold]] inline void raise(const char* kind, const char* what, const char* why) {
  Error error{kind, {}};
  snprintf(error.message, sizeof error.message, "%s%s", what, why);
  throw error;
}

// A check of generated code that has failed: what follows it by `<<` says why.
struct Failure {
  const char *kind, *what;
  [[noreturn, gnu::cold]] void operator<<(const char* why) const { raise(kind, what, why); }
};

inline void check(CUresult error, const char* what) {
  if (error == CUDA_SUCCESS) return;
  char begin[256];
  snprintf(begin, sizeof begin, "%s: ", what);
  raise("CUDAError", begin, cudaGetErrorString(error));
}

// Devices that have state of their own here; a further one works without.
constexpr int kDevices = 64;

// The context that the CUDA runtime, and with it every framework, uses on a device; kept for the process's life.
inline CUcontext primary_context(int device) {
  static std::atomic<CUcontext> kept[kDevices] = {};
  CUcontext context = device < kDevices ? kept[device].load(std::memory_order_acquire) : nullptr;
  if (context) return context;
  check(cuInit(0), "the driver doesn't start");
  check(cuDevicePrimaryCtxRetain(&context, device), "no context on the device");
  if (device < kDevices) kept[device].store(context, std::memory_order_release);
  return context;
}

// Calls that a stream capture in progress would forbid, though they enqueue nothing.
class OutsideOfCapture {
 public:
  OutsideOfCapture() { cuThreadExchangeStreamCaptureMode(&mode_); }
  ~OutsideOfCapture() { cuThreadExchangeStreamCaptureMode(&mode_); }

 private:
  CUstreamCaptureMode mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;
};

inline CUlibrary load(const void* image) {
  OutsideOfCapture guard;
  CUlibrary library = nullptr;
  check(cuLibraryLoadData(&library, image, nullptr, nullptr, 0, nullptr, nullptr, 0), "cannot load the device image");
  return library;
}

// A kernel of an image, ready on every device on which it was prepared.
class Kernel {
 public:
  // ``early``: the kernel waits by itself for the launch before it, and may begin while that one ends.
  Kernel(CUlibrary library, const char* name, bool early) : early_(early) {
    check(cuLibraryGetKernel(&handle_, library, name), name);
  }

  // Sets an attribute once for each device.
  CUresult prepare(CUfunction_attribute attribute, int value) {
    bool is_memory = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize;
    std::atomic<uint64_t>& prepared = is_memory ? with_memory_ : with_clusters_;
    int device;
    CUresult error = cudaGetDevice(&device);
    if (error != CUDA_SUCCESS) return error;
    uint64_t bit = device < kDevices ? uint64_t(1) << device : 0;
    if (prepared.load(std::memory_order_acquire) & bit) return CUDA_SUCCESS;
    OutsideOfCapture guard;
    error = cuKernelSetAttribute(attribute, value, handle_, device);
    if (error == CUDA_SUCCESS) prepared.fetch_or(bit, std::memory_order_release);
    return error;
  }

  // The arguments as the kernel declares them: copies, which live until it has been launched.
  template <typename... Params, typename... Args>
  CUresult launch(void (*)(Params...), const cudaLaunchConfig_t* config, const Args&... arguments) {
    static_assert(sizeof...(Params) == sizeof...(Args), "kernel argument count mismatch");
    return launch_with<Params...>(config, (Params)arguments...);
  }

 private:
  template <typename... Params>
  CUresult launch_with(const cudaLaunchConfig_t* config, const Params&... values) {
    void* pointers[] = {(void*)&values...};
    return launch(config, pointers);
  }

  CUresult launch(const cudaLaunchConfig_t* config, void** pointers) {
    const dim3 &grid = config->gridDim, &block = config->blockDim;
    const unsigned memory = (unsigned)config->dynamicSmemBytes;
    const dim3 cluster = config->numAttrs ? config->attrs->val.clusterDim : dim3();
    const bool clustered = cluster.x * cluster.y * cluster.z > 1;
    if (!early_ && !clustered)
      return cuLaunchKernel((CUfunction)handle_, grid.x, grid.y, grid.z, block.x, block.y, block.z, memory,
                            config->stream, pointers, nullptr);
    CUlaunchAttribute attributes[2] = {};
    CUlaunchConfig launch = {};
    launch.gridDimX = grid.x, launch.gridDimY = grid.y, launch.gridDimZ = grid.z;
    launch.blockDimX = block.x, launch.blockDimY = block.y, launch.blockDimZ = block.z;
    launch.sharedMemBytes = memory;
    launch.hStream = config->stream;
    launch.attrs = attributes;
    if (early_) {
      CUlaunchAttribute& own = attributes[launch.numAttrs++];
      own.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
      own.value.programmaticStreamSerializationAllowed = 1;
    }
    if (clustered) {
      CUlaunchAttribute& own = attributes[launch.numAttrs++];
      own.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
      own.value.clusterDim.x = cluster.x, own.value.clusterDim.y = cluster.y, own.value.clusterDim.z = cluster.z;
    }
    return cuLaunchKernelEx(&launch, (CUfunction)handle_, pointers, nullptr);
  }

  CUkernel handle_ = nullptr;
  const bool early_;
  std::atomic<uint64_t> with_memory_{0}, with_clusters_{0};  // a bit for each device
};

// The tensor map that one place in a kernel's host half made last.
class TensorMap {
 public:
  // cuTensorMapEncodeTiled; if nothing but the address has changed, that is replaced: 0.02 µs in place of 0.07.
  CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* sizes,
                  const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps,
                  CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                  CUtensorMapFloatOOBfill fill) {
    const uint32_t kinds[kKinds] = {rank, uint32_t(type), uint32_t(interleave), uint32_t(swizzle), uint32_t(promotion),
                                    uint32_t(fill)};
    CUresult error = CUDA_SUCCESS;
    if (!is_like(kinds, sizes, strides, box, steps)) {
      error = cuTensorMapEncodeTiled(&map_, type, rank, address, sizes, strides, box, steps, interleave, swizzle,
                                     promotion, fill);
      if (error == CUDA_SUCCESS) remember(kinds, sizes, strides, box, steps);
    } else if (address != address_) {
      error = cuTensorMapReplaceAddress(&map_, address);
    }
    if (error != CUDA_SUCCESS) kinds_[0] = 0;
    address_ = address;
    *map = map_;
    return error;
  }

 private:
  static constexpr int kKinds = 6, kRank = 5;

  bool is_like(const uint32_t* kinds, const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
               const cuuint32_t* steps) const {
    uint64_t differs = 0;
    for (int i = 0; i < kKinds; i++) differs |= kinds[i] ^ kinds_[i];
    if (differs || !kinds[0]) return false;
    for (uint32_t i = 0; i < kinds[0]; i++)
      differs |= (sizes[i] ^ sizes_[i]) | (box[i] ^ box_[i]) | (steps[i] ^ steps_[i]);
    for (uint32_t i = 0; i + 1 < kinds[0]; i++) differs |= strides[i] ^ strides_[i];
    return !differs;
  }

  void remember(const uint32_t* kinds, const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                const cuuint32_t* steps) {
    const uint32_t rank = kinds[0];
    memcpy(kinds_, kinds, sizeof kinds_);
    memcpy(sizes_, sizes, rank * sizeof *sizes);
    memcpy(strides_, strides, (rank - 1) * sizeof *strides);
    memcpy(box_, box, rank * sizeof *box);
    memcpy(steps_, steps, rank * sizeof *steps);
  }

  CUtensorMap map_;
  void* address_;
  uint32_t kinds_[kKinds];  // the first, the rank, is 0 if there is none
  cuuint64_t sizes_[kRank], strides_[kRank - 1];
  cuuint32_t box_[kRank], steps_[kRank];
};

}  // namespace device_image

// What a number is, and not how it was computed: TVM's simplifier sees no further.
extern "C" inline int32_t opaque(int32_t value) { return value; }

// How many bytes an address is beyond a multiple of a power of two.
extern "C" inline int32_t beyond_multiple(void* address, int32_t multiple) {
  return int32_t(reinterpret_cast<uintptr_t>(address) & uintptr_t(multiple - 1));
}

// How many multiprocessors the current device has; kernels whose blocks stay for more than one tile ask for it.
extern "C" inline int32_t multiprocessors() {
  static std::atomic<int> kept[device_image::kDevices] = {};
  int device;
  device_image::check(cudaGetDevice(&device), "there is no current device");
  int count = device < device_image::kDevices ? kept[device].load(std::memory_order_relaxed) : 0;
  if (count) return count;
  device_image::check(cuDeviceGetAttribute(&count, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device),
                      "the device doesn't say how many multiprocessors it has");
  if (device < device_image::kDevices) kept[device].store(count, std::memory_order_relaxed);
  return count;
}

namespace tvm {
namespace ffi {

// Makes a device's primary context current, unless a context of that device is.
class CUDADeviceGuard {
 public:
  explicit CUDADeviceGuard(int device) {
    CUdevice current;
    if (cuCtxGetDevice(&current) != CUDA_SUCCESS || current != device) {
      device_image::check(cuCtxPushCurrent(device_image::primary_context(device)), "cannot use the device");
      pushed_ = true;
    }
    device_image::guarded = device;
  }
  ~CUDADeviceGuard() {
    device_image::guarded = before_;
    CUcontext context;
    if (pushed_) cuCtxPopCurrent(&context);
  }
  CUDADeviceGuard(const CUDADeviceGuard&) = delete;

 private:
  int before_ = device_image::guarded;
  bool pushed_ = false;
};

}  // namespace ffi
}  // namespace tvm
