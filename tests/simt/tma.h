// Bulk copies between global and shared memory, whole boxes of tensors and plain bytes.
//
// A load overwrites its place with NaN when it is issued and lands as late as can be: when no thread of the block can go
// on without it.  A store reads shared memory when its thread waits for its group; what it finds must be what was there
// when it was issued.

#pragma once

#include "mbarrier.h"
#include "memory.h"

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  constexpr uint32_t bytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2};
  auto check = [](bool holds, const char* what) {
    if (!holds) TVM_FFI_THROW(RuntimeError) << "a tensor map whose " << what;
  };
  check(rank >= 1 && rank <= 5, "rank isn't 1 to 5");
  check(type <= CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 && !interleave && !fill, "kind isn't modelled");
  check((uintptr_t)address % 16 == 0, "address isn't a multiple of 16");
  *map = CUtensorMap();
  map->rank = rank, map->element = bytes[type], map->base = (uint8_t*)address;
  map->swizzle = swizzle ? 16u << swizzle : 0;
  for (uint32_t i = 0; i < rank; i++) {
    map->size[i] = sizes[i], map->box[i] = box[i], map->stride[i] = i ? strides[i - 1] : bytes[type];
    check(sizes[i] >= 1 && sizes[i] <= uint64_t(1) << 32, "sizes aren't 1 to 2^32");
    check(box[i] >= 1 && box[i] <= 256, "box isn't 1 to 256 elements wide");
    check(steps[i] == 1, "steps aren't 1");
    check(!i || (strides[i - 1] % 16 == 0 && strides[i - 1] < uint64_t(1) << 40), "strides aren't multiples of 16");
  }
  check(box[0] * bytes[type] % 16 == 0, "rows aren't multiples of 16 bytes");
  check(!swizzle || box[0] * bytes[type] <= map->swizzle, "rows are wider than what is swizzled");
  return CUDA_SUCCESS;
}

namespace simt {

// Bytes that lie together on both sides; those of no global memory read as zero and aren't written.
struct Piece {
  uint32_t shared;
  uint8_t* global;
  uint32_t bytes;
};
using Pieces = std::vector<Piece>;

static uint32_t swizzled(uint32_t address, uint32_t width) {
  return width ? address ^ ((address >> 7 & (width / kChunk - 1)) * kChunk) : address;
}

static Pieces pieces_of(const CUtensorMap& map, uint32_t address, std::initializer_list<int32_t> at) {
  if (at.size() != map.rank) fail("a box whose rank isn't the tensor map's");
  int64_t begin[5] = {0, 0, 0, 0, 0};
  uint32_t box[5] = {1, 1, 1, 1, 1}, i[5];
  std::copy(at.begin(), at.end(), begin);
  std::copy(map.box, map.box + map.rank, box);
  uint32_t columns = kChunk / map.element;
  check_shared(address, box[0] * box[1] * box[2] * box[3] * box[4] * map.element, 128, "a box of a tensor");
  Pieces pieces;
  for (i[4] = 0; i[4] < box[4]; i[4]++)
    for (i[3] = 0; i[3] < box[3]; i[3]++)
      for (i[2] = 0; i[2] < box[2]; i[2]++)
        for (i[1] = 0; i[1] < box[1]; i[1]++) {
          uint8_t* row = map.base;
          for (uint32_t d = 1; d < map.rank; d++) {
            int64_t x = begin[d] + i[d];
            row = row && x >= 0 && uint64_t(x) < map.size[d] ? row + x * map.stride[d] : nullptr;
          }
          for (i[0] = 0; i[0] < box[0]; i[0] += columns, address += kChunk) {
            uint32_t to = swizzled(address, map.swizzle);
            int64_t x = begin[0] + i[0];
            int64_t first = std::min<int64_t>(std::max<int64_t>(-x, 0), columns);
            int64_t last = std::min<int64_t>(std::max<int64_t>(int64_t(map.size[0]) - x, first), columns);
            if (!row) first = last = columns;
            uint32_t e = map.element;
            if (first) pieces.push_back({to, nullptr, uint32_t(first * e)});
            if (last > first) pieces.push_back({uint32_t(to + first * e), row + (x + first) * e, uint32_t((last - first) * e)});
            if (last < columns) pieces.push_back({uint32_t(to + last * e), nullptr, uint32_t((columns - last) * e)});
          }
        }
  return pieces;
}
static Pieces pieces_of_bytes(uint32_t address, const void* global, uint32_t bytes) {
  if (bytes % 16 || (uintptr_t)global % 16) fail("a bulk copy of or to what isn't a multiple of 16");
  check_shared(address, bytes, 16, "a bulk copy");
  return {{address, (uint8_t*)global, bytes}};
}
static uint32_t bytes_of(const Pieces& pieces) {
  uint32_t bytes = 0;
  for (const Piece& p : pieces) bytes += p.bytes;
  return bytes;
}

struct Load {
  uint32_t barrier;
  Pieces pieces;
};
struct Store {
  Pieces pieces;
  std::vector<uint8_t> seen;  // what was in shared memory when it was issued
  bool adds;                  // float32
};

struct BulkCopies : Unit {
  std::deque<Load> loads;
  std::vector<std::vector<Store>> open;                // by thread: stores of the group that isn't committed yet
  std::vector<std::deque<std::vector<Store>>> groups;  // those that are

  void begin() override {
    loads.clear();
    open.assign(block->threads.size(), {});
    groups.assign(block->threads.size(), {});
  }
  // Loads of the barrier that somebody waits for land, from the oldest on, until they complete its phase.
  bool advance() override {
    for (const Load& load : loads)
      for (const Thread& t : block->threads)
        if (!t.done && t.wait.what == kTransaction && t.wait.which == load.barrier) return land_phase(load.barrier);
    return false;
  }
  void end() override {
    if (!loads.empty()) fail("ends while copies into its shared memory are in flight");
    for (size_t i = 0; i < open.size(); i++)
      if (!open[i].empty() || !groups[i].empty())
        fail_with("ends though warp ", i / kWarp, ", lane ", i % kWarp, " hasn't waited for its bulk stores");
  }

 private:
  bool land_phase(uint32_t barrier) {
    Mbarrier& own = mbarriers->find(barrier);
    uint32_t phase = own.phase;
    std::deque<Load> others;
    for (Load& load : loads) {
      if (load.barrier != barrier || own.phase != phase) {
        others.push_back(std::move(load));
        continue;
      }
      for (const Piece& p : load.pieces)
        p.global ? memcpy(at(p.shared), p.global, p.bytes) : memset(at(p.shared), 0, p.bytes);
      own.bytes -= bytes_of(load.pieces);
      own.complete();
    }
    loads.swap(others);
    return true;
  }
};
static OfBlock<BulkCopies> bulk_copies;

static void load_bulk(uint32_t barrier, Pieces pieces) {
  mbarriers->find(barrier);
  for (const Piece& p : pieces) {
    memset(at(p.shared), 0xff, p.bytes);
    for (uint32_t x = 0; x < p.bytes; x += kChunk) unfenced->overwritten(p.shared + x);
  }
  bulk_copies->loads.push_back({barrier, std::move(pieces)});
}
static void store_bulk(Pieces pieces, bool adds) {
  Store store = {std::move(pieces), {}, adds};
  for (const Piece& p : store.pieces) {
    for (uint32_t x = 0; x < p.bytes; x += kChunk) unfenced->check(p.shared + x, "a bulk store");
    store.seen.insert(store.seen.end(), at(p.shared), at(p.shared) + p.bytes);
  }
  bulk_copies->open[block->current].push_back(std::move(store));
}
void commit_bulk() {
  auto& open = bulk_copies->open[block->current];
  bulk_copies->groups[block->current].push_back(std::move(open));
  open.clear();
}
static void finish(const Store& store) {
  const uint8_t* seen = store.seen.data();
  for (const Piece& p : store.pieces) {
    if (memcmp(seen, at(p.shared), p.bytes))
      fail_with("shared memory at offset ", p.shared - kSharedBase, " was written while a bulk store read it");
    seen += p.bytes;
    if (!p.global) continue;
    if (!store.adds) memcpy(p.global, at(p.shared), p.bytes);
    for (uint32_t x = 0; store.adds && x < p.bytes; x += 4) *(float*)(p.global + x) += *(const float*)at(p.shared + x);
  }
}
void wait_bulk(size_t in_flight) {
  auto& groups = bulk_copies->groups[block->current];
  for (; groups.size() > in_flight; groups.pop_front())
    for (const Store& store : groups.front()) finish(store);
}


void load_box(uint32_t barrier, const CUtensorMap& map, uint32_t address, std::initializer_list<int32_t> at) {
  load_bulk(barrier, pieces_of(map, address, at));
}
void store_box(const CUtensorMap& map, uint32_t address, std::initializer_list<int32_t> at, bool adds) {
  store_bulk(pieces_of(map, address, at), adds);
}
void load_bytes(uint32_t barrier, uint32_t address, const void* global, uint32_t bytes) {
  load_bulk(barrier, pieces_of_bytes(address, global, bytes));
}
void store_bytes(uint32_t address, void* global, uint32_t bytes, bool adds) {
  store_bulk(pieces_of_bytes(address, global, bytes), adds);
}

}  // namespace simt
