// wgmma: products of a warpgroup, of which each warp computes its 16 rows of 64.
//
// A product is computed when it is issued.  Until its warp has waited for its group its accumulator's registers hold NaN,
// and neither they nor the shared memory that the warpgroup reads for it may change.

#pragma once

#include <map>

#include "warp.h"

namespace simt {

constexpr int kRows = 16, kDepth = 16;  // of a warp's part of a product

// An operand in shared memory: PTX ISA, "Matrix descriptor format".
struct Descriptor {
  uint32_t address, leading, stride, width;  // bytes; ``width``: of a row that is swizzled in itself

  explicit Descriptor(uint64_t bits) {
    constexpr uint32_t widths[] = {16, 128, 64, 32};
    address = (bits & 0x3FFF) * 16, leading = (bits >> 16 & 0x3FFF) * 16, stride = (bits >> 32 & 0x3FFF) * 16;
    width = widths[bits >> 62];
    if (bits >> 49 & 7) fail("a matrix descriptor with a base offset");
  }
  // Where the 8 elements lie that are ``i * 8 ...`` along the direction that is contiguous in memory, in line ``j`` of the
  // other one.  ``depth_first``: the contiguous direction is that of the sum.
  uint32_t chunk(uint32_t i, uint32_t j, bool depth_first) const {
    uint32_t wide = width / kChunk, to = address;
    if (width == 16)
      to += depth_first ? i * leading + j / 8 * stride + j % 8 * 16 : i * stride + j / 8 * leading + j % 8 * 16;
    else if (depth_first)
      to += i * 16 + j / 8 * stride + j % 8 * width;
    else
      to += i / wide * leading + i % wide * 16 + j / 8 * stride + j % 8 * width;
    return width == 16 ? to : to ^ ((to >> 7 & (wide - 1)) * kChunk);
  }
};

// ``lines`` x 16 elements of an operand as they lie: lines of 16 along the sum, or 16 lines.
struct Operand {
  Descriptor from;
  int lines;
  bool transposed;  // its lines lie along the other direction than that of the sum
  std::vector<uint16_t> seen;

  template <typename Each>
  void for_each_chunk(Each each) const {
    int across = transposed ? lines / 8 : kDepth / 8, down = transposed ? kDepth : lines;
    for (int j = 0; j < down; j++)
      for (int i = 0; i < across; i++)
        each(transposed ? from.chunk(i, j, false) : from.chunk(i, j, true), (j * across + i) * 8);
  }
  // Only lines ``first .. last`` must have been made visible.
  void read(int first, int last) {
    seen.resize(lines * kDepth);
    for_each_chunk([&](uint32_t address, int to) {
      int line = transposed ? to % lines : to / kDepth;
      check_shared(address, kChunk, kChunk, "wgmma");
      if (line >= first && line < last) unfenced->check(address, "wgmma");
      memcpy(&seen[to], at(address), kChunk);
    });
  }
  void check_unchanged() const {
    for_each_chunk([&](uint32_t address, int to) {
      if (memcmp(&seen[to], at(address), kChunk))
        fail_with("shared memory at offset ", address - kSharedBase, " was written while a product in flight read it");
    });
  }
  float element(int line, int k, bool brain) const {
    return widen(seen[transposed ? k * lines + line : line * kDepth + k], brain);
  }
};

// The registers of a warp that products in flight sum into, and what they will hold.
struct Accumulator {
  int in_flight = 0, columns = 0;
  std::vector<float*> registers[kWarp];
  std::vector<float> values;  // (16, columns)
};

static int row_of(int lane, int i) { return lane / 4 + i / 2 % 2 * 8; }
static int column_of(int lane, int i) { return i / 4 * 8 + lane % 4 * 2 + i % 2; }

struct Product {
  std::vector<Operand> operands;
  const float* accumulator;
};

struct WarpProducts {
  std::map<const float*, Accumulator> accumulators;  // in flight, by the first thread's first register
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;
  bool fenced = false;
  uint64_t issued = 0;  // sums up what was issued, to be compared among the warps of a warpgroup
};

struct Wgmma : Unit {
  std::vector<WarpProducts> warps;

  void begin() override { warps.assign(block->threads.size() / kWarp, {}); }
  void end() override {
    for (size_t w = 0; w < warps.size(); w++) {
      if (!warps[w].open.empty() || !warps[w].groups.empty()) fail_with("ends though warp ", w, " has products in flight");
      if (warps[w].issued != warps[w / kWarpgroup * kWarpgroup].issued)
        fail_with("warp ", w, " has issued other products than the first of its warpgroup");
    }
  }

  void issue(Thread* threads) {
    WarpProducts& own = warps[(threads - block->threads.data()) / kWarp];
    const Shape& shape = *(const Shape*)threads[0].bring[1];
    for (int l = 1; l < kWarp; l++) {
      const Shape& other = *(const Shape*)threads[l].bring[1];
      if (other.a != shape.a || other.b != shape.b || other.accumulates != shape.accumulates)
        fail("the threads of a warp have different descriptors for a product");
    }
    if (!own.fenced) fail("issues a product without a wgmma.fence since the last group");
    for (uint64_t part : {shape.a_in_registers ? 0 : shape.a, shape.b, uint64_t(shape.columns)})
      own.issued = (own.issued ^ part) * 0x9E3779B97F4A7C15u + 1;
    Product product;
    float a[kRows][kDepth];
    read_a(threads, shape, product, a);
    product.operands.push_back({Descriptor(shape.b), shape.columns, shape.b_transposed, {}});
    product.operands.back().read(0, shape.columns);
    Accumulator& to = accumulator(own, threads, shape);
    multiply(to, a, product.operands.back(), shape);
    product.accumulator = ((float* const*)threads[0].bring[0])[0];
    own.open.push_back(std::move(product));
  }

  void wait(Thread* threads, size_t in_flight) {
    WarpProducts& own = warps[(threads - block->threads.data()) / kWarp];
    for (; own.groups.size() > in_flight; own.groups.pop_front())
      for (const Product& product : own.groups.front()) {
        for (const Operand& operand : product.operands) operand.check_unchanged();
        Accumulator& to = own.accumulators[product.accumulator];
        if (--to.in_flight) continue;
        retire(to);
        own.accumulators.erase(product.accumulator);
      }
  }

 private:
  static constexpr uint32_t kInFlight = 0xffffabcd;  // NaN

  // The accumulator that a product sums into, with the values from before it.
  static Accumulator& accumulator(WarpProducts& own, Thread* threads, const Shape& shape) {
    int each = shape.columns / 2;
    Accumulator& to = own.accumulators[((float* const*)threads[0].bring[0])[0]];
    if (to.in_flight++) {
      if (to.columns != shape.columns) fail("products of different widths are in flight into the same registers");
      if (!shape.accumulates) std::fill(to.values.begin(), to.values.end(), 0);
      return to;
    }
    to.columns = shape.columns;
    to.values.assign(kRows * shape.columns, 0);
    for (int l = 0; l < kWarp; l++) {
      float* const* registers = (float* const*)threads[l].bring[0];
      to.registers[l].assign(registers, registers + each);
      for (int i = 0; i < each; i++) {
        if (shape.accumulates) to.values[row_of(l, i) * shape.columns + column_of(l, i)] = *registers[i];
        memcpy(registers[i], &kInFlight, 4);
      }
    }
    return to;
  }
  static void retire(const Accumulator& to) {
    for (int l = 0; l < kWarp; l++)
      for (int i = 0; i < to.columns / 2; i++) {
        if (memcmp(to.registers[l][i], &kInFlight, 4)) fail("an accumulator was written while a product was in flight");
        *to.registers[l][i] = to.values[row_of(l, i) * to.columns + column_of(l, i)];
      }
  }
  static void read_a(Thread* threads, const Shape& shape, Product& product, float (*a)[kDepth]) {
    if (shape.a_in_registers) {
      for (int l = 0; l < kWarp; l++)
        for (int i = 0; i < 8; i++)
          a[l / 4 + i / 2 % 2 * 8][l % 4 * 2 + i % 2 + i / 4 * 8] = element(threads[l].in, i, shape.brain);
    } else {
      int first = int(threads - block->threads.data()) / kWarp % kWarpgroup * kRows;
      Operand all = {Descriptor(shape.a), kWarpgroup * kRows, shape.a_transposed, {}};
      all.read(first, first + kRows);
      for (int r = 0; r < kRows; r++)
        for (int k = 0; k < kDepth; k++) a[r][k] = all.element(first + r, k, shape.brain);
      product.operands.push_back(std::move(all));
    }
    for (int r = 0; r < kRows; r++)
      for (int k = 0; k < kDepth; k++) a[r][k] *= shape.scale_a * shape.scale_b;
  }
  static void multiply(Accumulator& to, const float (*a)[kDepth], const Operand& operand, const Shape& shape) {
    static float b[kDepth][256];
    int columns = shape.columns;
    for (int k = 0; k < kDepth; k++)
      for (int c = 0; c < columns; c++) b[k][c] = operand.element(c, k, shape.brain);
    for (int r = 0; r < kRows; r++) {
      float* sums = &to.values[r * columns];
      for (int k = 0; k < kDepth; k++) {
        float factor = a[r][k];
        const float* line = b[k];
        for (int c = 0; c < columns; c++) sums[c] += factor * line[c];
      }
    }
  }
};
static OfBlock<Wgmma> wgmma_unit;

void wgmma(float* const* d, const uint32_t* a, const Shape& shape) {
  Thread& me = self();
  me.bring[0] = d, me.bring[1] = &shape;
  if (shape.a_in_registers) memcpy(me.in, a, 16);
  together([](Thread* threads) { wgmma_unit->issue(threads); });
}
void wgmma_fence() {
  together([](Thread* threads) { wgmma_unit->warps[(threads - block->threads.data()) / kWarp].fenced = true; });
}
void wgmma_commit() {
  together([](Thread* threads) {
    WarpProducts& own = wgmma_unit->warps[(threads - block->threads.data()) / kWarp];
    own.groups.push_back(std::move(own.open));
    own.open.clear();
    own.fenced = false;
  });
}
void wgmma_wait(size_t in_flight) {
  self().in[0] = in_flight;
  together([](Thread* threads) { wgmma_unit->wait(threads, threads[0].in[0]); });
}

}  // namespace simt
