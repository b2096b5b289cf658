// What translated sources call of the machine; machine.cpp has it.

#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>

#include "tensor_map.h"

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern dim3 threadIdx, blockIdx, gridDim, clusterDim;

namespace simt {

// ------------------------------------------------------------------ launches

// Runs ``body`` as each thread of each block, of which ``cluster`` are together; ``shared_bytes`` are what it asks for
// behind its arrays of known size.
void run(dim3 grid, dim3 size, dim3 cluster, size_t shared_bytes, std::function<void()> body);
// Whether the statement at a numbered place of the source is to be executed.
bool reach(int place);
uint8_t* shared();
uint32_t to_shared(const void* p);

// ------------------------------------------------------------------ errors of host halves

// Fails because a check of a host half did.
[[noreturn]] void refuse(const char* kind, const char* what, const char* why);
// Tells tvm-ffi of the exception that is being handled; what a host half then returns.
int raised();

// ------------------------------------------------------------------ a block and its warps

void leave();
void barrier_all();
int barrier_or(int predicate);
void barrier(uint32_t id, uint32_t count, bool stays = true);
void cluster_arrive();
void cluster_wait();
// An address in the shared memory of the block of rank ``rank`` in the cluster.
uint32_t map_to_rank(uint32_t address, uint32_t rank);
void sync_warp();
int elect();
int lane();
int any(int predicate);
uint32_t ballot(int predicate);
// What the thread in lane ``source`` brings.
uint64_t exchange(uint64_t value, int source);
void ldmatrix(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t from, bool transposed);
uint32_t movmatrix(uint32_t pair);
void stmatrix(uint32_t to, std::initializer_list<uint32_t> registers, bool transposed);
template <int K>
void mma_m16n8(float* d, const uint32_t* a, const uint32_t* b, bool brain);
void mma_m8n8k4(float* d, const uint32_t* a, const uint32_t* b, bool b_is_row);

// ------------------------------------------------------------------ 16-bit numbers

float widen(uint16_t x, bool brain);
void widen_e4m3(float& a, float& b, uint32_t pair);
void widen_int8(float& a, float& b, float& c, float& d, uint32_t word);
void widen_halves(float& a, float& b, uint32_t x, uint32_t y);
uint32_t pack(float high, float low, bool brain);

// ------------------------------------------------------------------ loads and stores of a thread

void fence_async();
void copy_later(uint32_t to, const void* from, uint32_t size, uint32_t whole = 16);
void commit();
void wait(size_t in_flight);
void load4(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t from);
void load1(uint32_t& a, uint32_t from);
void load2(uint32_t& a, uint32_t& b, uint32_t from);
void load2_of_cluster(float& a, float& b, uint32_t from);
void load_or_zero(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, const void* from, int exists);
void load_half_or_zero(uint32_t& a, uint32_t& b, const void* from, int exists);
void store_shared(uint32_t to, const void* words, uint32_t bytes);
void add(float* to, std::initializer_list<float> values);

template <typename Word>
static void load(std::initializer_list<Word*> words, const void* from) {
  for (Word* word : words) memcpy(word, from, 4), from = (const char*)from + 4;
}
template <typename Word>
static void store(void* to, std::initializer_list<Word> words) {
  static_assert(sizeof(Word) == 4, "");
  memcpy(to, words.begin(), words.size() * 4);
}
template <typename Word>
static void store_shared(uint32_t to, std::initializer_list<Word> words) {
  static_assert(sizeof(Word) == 4, "");
  store_shared(to, words.begin(), words.size() * 4);
}

// ------------------------------------------------------------------ transaction barriers

void mbarrier_init(uint32_t address, uint32_t count);
void mbarrier_invalidate(uint32_t address);
void mbarrier_arrive(uint32_t address, uint32_t count);
void mbarrier_expect(uint32_t address, uint32_t bytes);
void mbarrier_arrive_expect(uint32_t address, uint32_t bytes);
void mbarrier_wait(uint32_t address, uint32_t parity);
uint32_t mbarrier_test(uint32_t address, uint32_t parity);

// ------------------------------------------------------------------ bulk copies

void load_box(uint32_t barrier, const CUtensorMap& map, uint32_t address, std::initializer_list<int32_t> at);
void store_box(const CUtensorMap& map, uint32_t address, std::initializer_list<int32_t> at, bool adds);
void load_bytes(uint32_t barrier, uint32_t address, const void* global, uint32_t bytes);
void store_bytes(uint32_t address, void* global, uint32_t bytes, bool adds);
void commit_bulk();
void wait_bulk(size_t in_flight);

// ------------------------------------------------------------------ products of a warpgroup

// What all threads of a warpgroup bring alike to a product.
struct Shape {
  int columns;
  bool brain, a_in_registers;
  float scale_a, scale_b;
  bool a_transposed, b_transposed;
  uint64_t a, b;
  bool accumulates;
};
// ``d``: the thread's registers of the accumulator; ``a``: its four of A, where these are in registers.
void wgmma(float* const* d, const uint32_t* a, const Shape& shape);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(size_t in_flight);

}  // namespace simt
