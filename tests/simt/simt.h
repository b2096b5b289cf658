// A CUDA block on the processor: each thread is a fiber that runs until it has to wait for others.
//
// Enough of CUDA and PTX for the project's kernels, so that their numbers can be checked without a GPU; README.md says
// what is modelled.  Asynchronous copies arrive when they are waited for and not before, and threads run far ahead of each
// other between barriers: a wait or a barrier that is missing shows in the numbers, or is refused.

#pragma once

#include <math.h>

#include "instructions.h"

#define __device__
#define __host__
#define __forceinline__ static inline
#define __restrict__
#define __grid_constant__

struct half {
  uint16_t bits;
  operator float() const { return simt::widen(bits, false); }
};
struct nv_bfloat16 {
  uint16_t bits;
  operator float() const { return simt::widen(bits, true); }
};
using uint = unsigned int;
using uchar = unsigned char;
using ushort = unsigned short;

struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct int2 { int x, y; };
struct int4 { int x, y, z, w; };
struct uint2 { uint x, y; };
struct uint4 { uint x, y, z, w; };
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static int2 make_int2(int x, int y) { return {x, y}; }
static int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
static uint2 make_uint2(uint x, uint y) { return {x, y}; }
static uint4 make_uint4(uint x, uint y, uint z, uint w) { return {x, y, z, w}; }

using cudaError_t = int;
using cudaStream_t = void*;
constexpr int cudaSuccess = 0, cudaErrorCudartUnloading = 4, cudaFuncAttributeMaxDynamicSharedMemorySize = 8;
constexpr int cudaFuncAttributeNonPortableClusterSizeAllowed = 14;
static const char* cudaGetErrorString(int) { return ""; }
static int cudaGetLastError() { return 0; }
static int cudaGetDevice(int* device) { return *device = 0; }
template <typename Kernel>
static int cudaFuncSetAttribute(Kernel, int, int) { return 0; }

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
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

// Host halves are between these, and check with that; tvm-ffi's own would make templates of each place.
#define TVM_FFI_SAFE_CALL_BEGIN() try {
#define TVM_FFI_SAFE_CALL_END() \
  }                             \
  catch (...) {                 \
    return simt::raised();      \
  }                             \
  return 0
#define TVM_FFI_CHECK(condition, kind) \
  if (!(condition)) Failure{#kind, "Check failed: (" #condition ") is false: "}
struct Failure {
  const char *kind, *what;
  [[noreturn]] void operator<<(const char* why) const { simt::refuse(kind, what, why); }
};

// What kernels' host halves ask of the library that launches them.
extern "C" int32_t opaque(int32_t value);
extern "C" int32_t beyond_multiple(void* address, int32_t multiple);
extern "C" int32_t multiprocessors();

template <typename T>
static T exchanged(T value, int source) {
  static_assert(sizeof(T) <= 8, "");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = simt::exchange(bits, source);
  memcpy(&value, &bits, sizeof(T));
  return value;
}
template <typename T>
static T __shfl_sync(uint, T value, int source, int) { return exchanged(value, source); }
template <typename T>
static T __shfl_xor_sync(uint, T value, int mask, int) { return exchanged(value, simt::lane() ^ mask); }
template <typename T>
static T __shfl_up_sync(uint, T value, int distance, int) {
  int lane = simt::lane();
  return exchanged(value, lane < distance ? lane : lane - distance);
}
static int __any_sync(uint, int predicate) { return simt::any(predicate); }
static uint32_t __ballot_sync(uint, int predicate) { return simt::ballot(predicate); }
static int __clz(uint32_t x) { return x ? __builtin_clz(x) : 32; }
static float __uint_as_float(uint32_t x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
static uint32_t __float_as_uint(float x) {
  uint32_t y;
  memcpy(&y, &x, 4);
  return y;
}
static uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t places) {
  uint64_t both = uint64_t(y) << 32 | x;
  uint32_t found = 0;
  for (int i = 0; i < 4; i++) found |= uint32_t(both >> 8 * (places >> 4 * i & 7) & 0xff) << 8 * i;
  return found;
}
static int __popc(uint32_t x) { return __builtin_popcount(x); }
static void __syncthreads() { simt::barrier_all(); }
static void __syncwarp() { simt::sync_warp(); }
static int __syncthreads_or(int predicate) { return simt::barrier_or(predicate); }
static uint32_t __cvta_generic_to_shared(const void* p) { return simt::to_shared(p); }

static int min(int a, int b) { return a < b ? a : b; }
static int max(int a, int b) { return a > b ? a : b; }
static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
static float max(float a, float b) { return fmaxf(a, b); }
static float min(float a, float b) { return fminf(a, b); }
#define CUDART_INF_F INFINITY
