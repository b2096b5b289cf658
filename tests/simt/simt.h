// A CUDA block on the processor: each thread is a fiber that runs until it has to wait for others.
//
// Enough of CUDA and PTX for the mma.sync kernels, so that their numbers can be checked without a GPU.  Asynchronous
// copies arrive when they are waited for and not before, and threads run far ahead of each other between barriers: a
// wait or a barrier that is missing shows in the numbers.

#pragma once

#include <math.h>
#include <string.h>
#include <tvm/ffi/error.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __host__
#define __forceinline__ static inline
#define __restrict__
#define __grid_constant__
#define SIMT_FAST __attribute__((optimize("O2")))

using half = uint16_t;
using nv_bfloat16 = uint16_t;
using uint = unsigned int;
using uchar = unsigned char;
using ushort = unsigned short;

using cudaError_t = int;
using cudaStream_t = void*;
constexpr int cudaSuccess = 0, cudaErrorCudartUnloading = 4, cudaFuncAttributeMaxDynamicSharedMemorySize = 8;
static const char* cudaGetErrorString(int) { return ""; }
static int cudaGetLastError() { return 0; }
static int cudaGetDevice(int* device) { return *device = 0; }
template <typename Kernel>
static int cudaFuncSetAttribute(Kernel, int, int) { return 0; }

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

static dim3 threadIdx, blockIdx, gridDim;

namespace simt {

constexpr int kWarp = 32;
constexpr size_t kStack = 1 << 20;
constexpr uint32_t kSharedBase = 1024;  // shared addresses don't begin at 0 on hardware either

struct Copy {
  uint32_t to;
  const void* from;
  uint32_t size;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  std::vector<Copy> open;                  // copies of the group that isn't committed yet
  std::deque<std::vector<Copy>> groups;    // those that are
  uint32_t in[12];                         // what it brings to an instruction of the whole warp
  uint32_t out[8];
};

// A place where `count` threads meet; the last to come acts for all.
struct Meeting {
  int arrived = 0, generation = 0, value = 0, result = 0;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<uint8_t> shared;
  std::vector<Meeting> warps = std::vector<Meeting>(32), barriers = std::vector<Meeting>(16);
  ucontext_t scheduler;
  int current = 0;
  std::function<void()> body;
};
static Block* block;

static Thread& self() { return block->threads[block->current]; }
static int lane() { return block->current % kWarp; }
static uint8_t* shared() { return block->shared.data(); }
static uint8_t* at(uint32_t address) { return shared() + (address - kSharedBase); }
static uint32_t to_shared(const void* p) { return uint32_t((const uint8_t*)p - shared()) + kSharedBase; }

static void yield() {
  int me = block->current;
  swapcontext(&block->threads[me].context, &block->scheduler);
}

template <typename Act>
static void meet(Meeting& place, int count, Act act) {
  int generation = place.generation;
  if (++place.arrived == count) {
    act();
    place.arrived = 0;
    place.generation++;
  } else {
    while (place.generation == generation) yield();
  }
}

static void barrier(uint32_t id, uint32_t count) {
  meet(block->barriers[id], count, [] {});
}

static int barrier_or(int predicate) {
  Meeting& place = block->barriers[0];
  place.value |= predicate != 0;
  meet(place, block->threads.size(), [&] { place.result = place.value, place.value = 0; });
  return place.result;
}

// An instruction of the whole warp: `act` sees its 32 threads, when all have brought their `in`.
template <typename Act>
static void together(Act act) {
  int first = block->current / kWarp * kWarp;
  meet(block->warps[first / kWarp], kWarp, [&] { act(&block->threads[first]); });
}

static void start() {
  block->body();
  self().done = true;
  yield();
}

static void run(dim3 grid, dim3 size, size_t shared_bytes, std::function<void()> body) {
  gridDim = grid;
  Block own;
  block = &own;
  own.body = body;
  own.threads.resize(size.x);
  for (Thread& t : own.threads) t.stack.reset(new char[kStack]);
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        blockIdx = dim3(x, y, z);
        own.shared.assign(shared_bytes + 16, 0xff);  // NaN, whatever it is read as
        for (Thread& t : own.threads) {
          t.done = false;
          t.open.clear(), t.groups.clear();
          getcontext(&t.context);
          t.context.uc_stack = {t.stack.get(), 0, kStack};
          t.context.uc_link = nullptr;
          makecontext(&t.context, start, 0);
        }
        for (size_t left = size.x, idle = 0; left;) {
          left = 0;
          for (size_t i = 0; i < size.x; i++) {
            if (own.threads[i].done) continue;
            own.current = i;
            threadIdx = dim3(i);
            swapcontext(&own.scheduler, &own.threads[i].context);
            left += !own.threads[i].done;
          }
          if (++idle > 1000000) TVM_FFI_THROW(RuntimeError) << "the threads of a block wait for each other forever";
        }
      }
  block = nullptr;
}

// ------------------------------------------------------------------ memory

// Copies land when they are waited for, and those that nobody has waited for just before their thread loads 16 bytes (as it
// does of its output): so that what was written to their place too early is lost, as it may be on hardware.
static void land(const std::vector<Copy>& copies) {
  for (const Copy& c : copies) {
    memset(at(c.to), 0, 16);
    memcpy(at(c.to), c.from, c.size);
  }
}
static void wait(size_t in_flight) {
  for (auto& groups = self().groups; groups.size() > in_flight; groups.pop_front()) land(groups.front());
}
static void load4(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t from) {
  wait(0);
  land(self().open);
  self().open.clear();
  const uint32_t* p = (const uint32_t*)at(from);
  a = p[0], b = p[1], c = p[2], d = p[3];
}
static void store1(uint32_t to, uint32_t value) { *(uint32_t*)at(to) = value; }
template <typename T>
static void store2(T* to, T a, T b) { to[0] = a, to[1] = b; }
static void store4(void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  uint32_t values[4] = {a, b, c, d};
  memcpy(to, values, 16);
}
static void copy_later(uint32_t to, const void* from, uint32_t size) { self().open.push_back({to, from, size}); }
static void commit() {
  self().groups.push_back(std::move(self().open));
  self().open.clear();
}
static void load_or_zero(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, const void* from, int exists) {
  uint32_t values[4] = {0, 0, 0, 0};
  if (exists) memcpy(values, from, 16);
  a = values[0], b = values[1], c = values[2], d = values[3];
}

// ------------------------------------------------------------------ 16-bit numbers

static float widen(uint16_t x, bool brain) {
  if (brain) {
    uint32_t bits = uint32_t(x) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
  }
  _Float16 value;
  memcpy(&value, &x, 2);
  return value;
}
static uint16_t narrow(float x, bool brain) {
  uint16_t bits;
  if (brain) {
    uint32_t all;
    memcpy(&all, &x, 4);
    return x != x ? 0x7fff : (all + 0x7fff + (all >> 16 & 1)) >> 16;
  }
  _Float16 value = x;
  memcpy(&bits, &value, 2);
  return bits;
}
static uint32_t pack(float high, float low, bool brain) {
  return uint32_t(narrow(high, brain)) << 16 | narrow(low, brain);
}

// ------------------------------------------------------------------ instructions of a warp

template <typename Value>
static Value exchange(Value value, std::function<int(int)> source) {
  static_assert(sizeof(Value) == 4, "");
  memcpy(self().in, &value, 4);
  int from = source(lane());
  self().in[1] = from;
  together([](Thread* warp) {
    for (int l = 0; l < kWarp; l++) warp[l].out[0] = warp[warp[l].in[1]].in[0];
  });
  memcpy(&value, self().out, 4);
  return value;
}

static int any(int predicate) {
  self().in[0] = predicate != 0;
  together([](Thread* warp) {
    uint32_t result = 0;
    for (int l = 0; l < kWarp; l++) result |= warp[l].in[0];
    for (int l = 0; l < kWarp; l++) warp[l].out[0] = result;
  });
  return self().out[0];
}

static SIMT_FAST void ldmatrix(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t from, bool transposed) {
  self().in[0] = from;
  if (from % 16) TVM_FFI_THROW(RuntimeError) << "ldmatrix of an address that isn't a multiple of 16";
  self().in[1] = transposed;
  together([](Thread* warp) {
    for (int m = 0; m < 4; m++)
      for (int l = 0; l < kWarp; l++) {
        uint16_t pair[2];
        for (int e = 0; e < 2; e++) {
          int row = l / 4, column = l % 4 * 2 + e;
          if (warp[0].in[1]) std::swap(row, column);
          memcpy(&pair[e], at(warp[m * 8 + row].in[0]) + column * 2, 2);
        }
        memcpy(&warp[l].out[m], pair, 4);
      }
  });
  a = self().out[0], b = self().out[1], c = self().out[2], d = self().out[3];
}

static float element(const uint32_t* registers, int i, bool brain) {
  return widen(uint16_t(registers[i / 2] >> (i % 2 * 16)), brain);
}

// D = A B + C of m16n8kK: row l / 4 (+ 8) and columns l % 4 * 2 (+ 1) of A's registers and of C; PTX ISA, "mma".
template <int K>
static SIMT_FAST void mma_m16n8(float* d, const uint32_t* a, const uint32_t* b, bool brain) {
  Thread& me = self();
  memcpy(me.in, a, K / 4 * 4), memcpy(me.in + 4, b, K / 8 * 4), memcpy(me.in + 6, d, 16);
  static bool kind;
  kind = brain;
  together([](Thread* warp) {
    static float A[16][K], B[K][8];
    for (int l = 0; l < kWarp; l++) {
      for (int i = 0; i < K / 2; i++) A[l / 4 + i / 2 % 2 * 8][l % 4 * 2 + i % 2 + i / 4 * 8] = element(warp[l].in, i, kind);
      for (int i = 0; i < K / 4; i++) B[l % 4 * 2 + i % 2 + i / 2 * 8][l / 4] = element(warp[l].in + 4, i, kind);
    }
    for (int l = 0; l < kWarp; l++)
      for (int i = 0; i < 4; i++) {
        float sum;
        memcpy(&sum, &warp[l].in[6 + i], 4);
        for (int k = 0; k < K; k++) sum += A[l / 4 + i / 2 * 8][k] * B[k][l % 4 * 2 + i % 2];
        memcpy(&warp[l].out[i], &sum, 4);
      }
  });
  memcpy(d, me.out, 16);
}

// Volta's m8n8k4 with float32 C: four products, one for each quad pair (lanes q * 4 .. + 3 and 16 more).
static SIMT_FAST void mma_m8n8k4(float* d, const uint32_t* a, const uint32_t* b, bool b_is_row) {
  Thread& me = self();
  memcpy(me.in, a, 8), memcpy(me.in + 2, b, 8), memcpy(me.in + 4, d, 32);
  static bool row;
  row = b_is_row;
  together([](Thread* warp) {
    for (int q = 0; q < 4; q++) {
      float A[8][4], B[4][8];
      auto lane_of = [&](int i) { return q * 4 + i % 4 + i / 4 * 16; };  // i-th of the eight lanes of a quad pair
      for (int i = 0; i < 8; i++)
        for (int j = 0; j < 4; j++) {
          A[i][j] = element(warp[lane_of(i)].in, j, false);
          float x = element(warp[lane_of(i)].in + 2, j, false);
          if (row)
            B[i % 4][j + i / 4 * 4] = x;
          else
            B[j][i] = x;
        }
      for (int i = 0; i < 8; i++)
        for (int x = 0; x < 8; x++) {
          int l = lane_of(i);
          int r = (l & 1) + (x & 2) + (l >= 16 ? 4 : 0), c = (x & 4) + (l & 2) + (x & 1);
          float sum;
          memcpy(&sum, &warp[l].in[4 + x], 4);
          for (int k = 0; k < 4; k++) sum += A[r][k] * B[k][c];
          memcpy(&warp[l].out[x], &sum, 4);
        }
    }
  });
  memcpy(d, me.out, 32);
}

}  // namespace simt

template <typename T>
static T __shfl_sync(uint, T value, int source, int) { return simt::exchange(value, [=](int) { return source; }); }
template <typename T>
static T __shfl_xor_sync(uint, T value, int mask, int) { return simt::exchange(value, [=](int l) { return l ^ mask; }); }
static int __any_sync(uint, int predicate) { return simt::any(predicate); }
static void __syncthreads() { simt::barrier(0, simt::block->threads.size()); }
static void __syncwarp() { simt::together([](simt::Thread*) {}); }
static int __syncthreads_or(int predicate) { return simt::barrier_or(predicate); }
static uint32_t __cvta_generic_to_shared(const void* p) { return simt::to_shared(p); }

static int min(int a, int b) { return a < b ? a : b; }
static int max(int a, int b) { return a > b ? a : b; }
static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
static float max(float a, float b) { return fmaxf(a, b); }
static float min(float a, float b) { return fminf(a, b); }
#define CUDART_INF_F INFINITY
