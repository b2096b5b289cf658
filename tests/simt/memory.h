// Loads, stores and cp.async of single threads, and who has written shared memory without a fence since.

#pragma once

#include "machine.h"

namespace simt {

// What threads write with instructions (not through pointers) is seen by TMA and wgmma after a fence.proxy.async of the
// thread that wrote.
struct Unfenced : Unit {
  std::vector<uint16_t> writer;                 // by chunk of shared memory: the thread, from 1 on
  std::vector<std::vector<uint32_t>> chunks;    // by thread

  void begin() override {
    writer.assign(block->shared.size() / kChunk + 1, 0);
    chunks.assign(block->threads.size(), {});
  }
  void wrote(int thread, uint32_t address, uint32_t bytes) {
    for (uint32_t c = (address - kSharedBase) / kChunk; c <= (address - kSharedBase + bytes - 1) / kChunk; c++) {
      if (writer[c] == thread + 1) continue;
      writer[c] = thread + 1;
      chunks[thread].push_back(c);
    }
  }
  void fence(int thread) {
    for (uint32_t c : chunks[thread])
      if (writer[c] == thread + 1) writer[c] = 0;
    chunks[thread].clear();
  }
  void overwritten(uint32_t chunk_address) { writer[(chunk_address - kSharedBase) / kChunk] = 0; }
  void check(uint32_t chunk_address, const char* reader) {
    if (int thread = writer[(chunk_address - kSharedBase) / kChunk])
      fail_with(reader, " reads shared memory at offset ", chunk_address - kSharedBase, ", which warp ",
                (thread - 1) / kWarp, ", lane ", (thread - 1) % kWarp, " wrote without a fence.proxy.async since");
  }
};
static OfBlock<Unfenced> unfenced;

void fence_async() { unfenced->fence(block->current); }

// Copies land when they are waited for, and those that nobody has waited for just before their thread loads 16 bytes (as
// it does of its output): so that what was written to their place too early is lost, as it may be on hardware.
static void land(const std::vector<Copy>& copies) {
  for (const Copy& c : copies) {
    memset(at(c.to), 0, c.whole);
    memcpy(at(c.to), c.from, c.size);
    unfenced->wrote(block->current, c.to, c.whole);
  }
}
void wait(size_t in_flight) {
  for (auto& groups = self().groups; groups.size() > in_flight; groups.pop_front()) land(groups.front());
}
// Copies that are on their way to one place may land in any order, also those of one thread.
static void check_free(const std::vector<Copy>& copies, uint32_t to, uint32_t whole) {
  for (const Copy& c : copies)
    if (c.to < to + whole && to < c.to + c.whole)
      fail_with("cp.async to shared memory at offset ", to - kSharedBase, ", where an earlier copy of ", c.size,
                " bytes is on its way");
}
void copy_later(uint32_t to, const void* from, uint32_t size, uint32_t whole) {
  for (const auto& group : self().groups) check_free(group, to, whole);
  check_free(self().open, to, whole);
  self().open.push_back({to, from, size, whole});
}
void commit() {
  self().groups.push_back(std::move(self().open));
  self().open.clear();
}

void load4(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t from) {
  wait(0);
  land(self().open);
  self().open.clear();
  const uint32_t* p = (const uint32_t*)at(from);
  a = p[0], b = p[1], c = p[2], d = p[3];
}
void load1(uint32_t& a, uint32_t from) {
  wait(0);
  land(self().open);
  self().open.clear();
  a = *(const uint32_t*)at(from);
}
void load2(uint32_t& a, uint32_t& b, uint32_t from) {
  wait(0);
  land(self().open);
  self().open.clear();
  const uint32_t* p = (const uint32_t*)at(from);
  a = p[0], b = p[1];
}
void load2_of_cluster(float& a, float& b, uint32_t from) {
  memcpy(&a, at_of_cluster(from, 8), 4);
  memcpy(&b, at_of_cluster(from, 8) + 4, 4);
}
void store_shared(uint32_t to, const void* words, uint32_t bytes) {
  check_shared(to, bytes, bytes, "st.shared");
  memcpy(at(to), words, bytes);
  unfenced->wrote(block->current, to, bytes);
}
void add(float* to, std::initializer_list<float> values) {
  for (float value : values) *to++ += value;
}
void load_or_zero(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, const void* from, int exists) {
  uint32_t values[4] = {0, 0, 0, 0};
  if (exists) memcpy(values, from, 16);
  a = values[0], b = values[1], c = values[2], d = values[3];
}
void load_half_or_zero(uint32_t& a, uint32_t& b, const void* from, int exists) {
  uint32_t values[2] = {0, 0};
  if (exists) memcpy(values, from, 8);
  a = values[0], b = values[1];
}

}  // namespace simt
