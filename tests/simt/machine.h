// A block of threads on one processor: who runs, who waits for what, and what happens when nobody can go on.

#pragma once

#include <tvm/ffi/error.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"
#include "instructions.h"

dim3 threadIdx, blockIdx, gridDim, clusterDim;
static unsigned row_threads;  // threads of a block along x

namespace simt {

constexpr int kWarp = 32, kWarpgroup = 4;
constexpr size_t kStack = 1 << 20;
constexpr uint32_t kArrays = 4096;  // room before what a launch asks for: arrays of known size
constexpr uint32_t kSharedBase = 1024;  // shared addresses don't begin at 0 on hardware either
constexpr int kChunk = 16;              // bytes that asynchronous copies and matrix instructions move as one

// How a run may differ from the usual one: in which order threads get their turns, how many multiprocessors there seem to
// be, and at which numbered place of the source there is a fault: a statement left out, or a wait for the other parity.
struct Settings {
  uint32_t order = 0;
  int multiprocessors = 2, faulty_place = -1;
  bool other_parity = false;
};
static Settings settings;
static bool next_parity_is_other = false;

// Whether the statement at a numbered place is to be executed.
bool reach(int place) {
  bool faulty = place == settings.faulty_place;
  next_parity_is_other = faulty && settings.other_parity;
  return !faulty || settings.other_parity;
}

struct Copy {
  uint32_t to;
  const void* from;
  uint32_t size;  // what is copied of the whole, zeros follow
  uint32_t whole;
};

// A thread that waits may go on when ``(*place & mask) != value``.
struct Wait {
  const uint32_t* place = nullptr;
  uint32_t mask = 0, value = 0;
  const char* what = "";
  uint32_t which = 0;

  bool over() const { return !place || (*place & mask) != value; }
  bool operator==(const Wait& other) const {
    return place == other.place && mask == other.mask && value == other.value;
  }
};

struct Thread {
  Fiber fiber;
  std::unique_ptr<char[]> stack;
  bool done = false, at_cluster = false;  // has arrived at the cluster's barrier, which isn't complete yet
  Wait wait;
  std::vector<Copy> open;                // cp.async copies of the group that isn't committed yet
  std::deque<std::vector<Copy>> groups;  // those that are
  uint32_t in[12];                       // what it brings to an instruction of the whole warp
  uint32_t out[8];
  const void* bring[2];                  // and what lies on its stack meanwhile
};

// A place where ``count`` threads meet; the last to come acts for all.
struct Meeting {
  uint32_t arrived = 0, generation = 0, count = 0;
  int value = 0, result = 0;
};

// A part of the machine that works beside a block's threads, and what the scheduler asks of it.
struct Unit {
  virtual ~Unit() {}
  virtual void begin() {}                            // a block begins
  virtual bool advance() { return false; }           // no thread can go on: whether this lets one
  virtual std::string describe(const Wait&) { return ""; }  // what somebody waits for, if it is of this unit
  virtual void end() {}                              // all threads have ended: fail if anything of theirs hasn't

  // How to make those of a block.
  static std::vector<std::function<std::unique_ptr<Unit>()>>& kinds() {
    static std::vector<std::function<std::unique_ptr<Unit>()>> kinds;
    return kinds;
  }
};

struct Block {
  dim3 index;
  std::vector<Thread> threads;
  std::vector<std::unique_ptr<Unit>> units;
  std::vector<uint8_t> shared;
  std::vector<Meeting> warps = std::vector<Meeting>(32), barriers = std::vector<Meeting>(16);
  Fiber scheduler;
  int current = -1;
  std::function<void()> body;
  std::exception_ptr failure;
};
static Block* block;

// The blocks that run together, and how often they have met; ``block`` is the one of them whose turn it is.
struct Cluster {
  std::vector<Block> blocks;
  uint32_t meetings = 0;
};
static Cluster* cluster;

// A unit of the block whose turn it is.
template <typename Own>
class OfBlock {
 public:
  OfBlock() : number_(Unit::kinds().size()) {
    Unit::kinds().push_back([] { return std::make_unique<Own>(); });
  }
  Own* operator->() const { return static_cast<Own*>(block->units[number_].get()); }

 private:
  const size_t number_;
};

static Thread& self() { return block->threads[block->current]; }
int lane() { return block->current % kWarp; }
static int warp() { return block->current / kWarp; }
uint8_t* shared() { return block->shared.data(); }
static uint8_t* at(uint32_t address) { return shared() + (address - kSharedBase); }

// Stops the run: the kernel did what hardware doesn't allow, or promises nothing about.
[[noreturn]] static void fail(const std::string& what) {
  std::ostringstream text;
  text << "block (" << blockIdx.x << ", " << blockIdx.y << ", " << blockIdx.z << ")";
  if (block->current >= 0) text << ", warp " << warp() << ", lane " << lane();
  TVM_FFI_THROW(RuntimeError) << text.str() << ": " << what;
  std::terminate();
}
template <typename... Parts>
[[noreturn]] static void fail_with(const Parts&... parts) {
  std::ostringstream text;
  (void)(text << ... << parts);
  fail(text.str());
}

uint32_t to_shared(const void* p) {
  size_t offset = (const uint8_t*)p - shared();
  if (offset >= block->shared.size()) fail("an address that isn't in the block's dynamic shared memory");
  return uint32_t(offset) + kSharedBase;
}
static void check_shared(uint32_t address, uint32_t bytes, uint32_t alignment, const char* what) {
  if (address < kSharedBase || address - kSharedBase + uint64_t(bytes) > block->shared.size())
    fail_with(what, " beyond shared memory, at offset ", int64_t(address) - kSharedBase);
  if (address % alignment)
    fail_with(what, " at offset ", address - kSharedBase, ", which isn't a multiple of ", alignment);
}

static void yield() { self().fiber.leave_for(block->scheduler); }

static void wait_until(const uint32_t* place, uint32_t mask, uint32_t value, const char* what, uint32_t which) {
  Wait wait = {place, mask, value, what, which};
  if (wait.over()) return;
  self().wait = wait;
  yield();
}

constexpr const char *kOfWarp = "an instruction of its whole warp", *kNamed = "barrier";

template <typename Act>
static void meet(Meeting& place, uint32_t count, bool stays, const char* what, uint32_t which, Act act) {
  uint32_t generation = place.generation;
  place.count = count;
  if (++place.arrived == count) {
    act();
    place.arrived = 0;
    place.generation++;
  } else if (stays) {
    wait_until(&place.generation, ~0u, generation, what, which);
  }
}

// ``bar.sync`` and, for who doesn't stay, ``bar.arrive``.
void barrier(uint32_t id, uint32_t count, bool stays) {
  if (id >= block->barriers.size() || count % kWarp) fail_with("barrier ", id, " of ", count, " threads");
  Meeting& place = block->barriers[id];
  if (place.arrived && place.count != count)
    fail_with("comes to barrier ", id, " of ", count, " threads where others wait for ", place.count);
  meet(place, count, stays, kNamed, id, [] {});
}

void barrier_all() { barrier(0, block->threads.size()); }

constexpr const char* kCluster = "the barrier of its cluster";

// Complete when all threads of the cluster that haven't ended have arrived, which is seen when no other can go on.
void cluster_arrive() {
  if (self().at_cluster) fail("arrives at the barrier of its cluster again before that is complete");
  self().at_cluster = true;
}
void cluster_wait() {
  if (self().at_cluster) wait_until(&cluster->meetings, ~0u, cluster->meetings, kCluster, 0);
}
static bool cluster_meets() {
  bool anyone = false;
  for (Block& own : cluster->blocks)
    for (Thread& t : own.threads) {
      if (!t.done && !t.at_cluster) return false;
      anyone = anyone || !t.done;
    }
  for (Block& own : cluster->blocks)
    for (Thread& t : own.threads) t.at_cluster = false;
  cluster->meetings++;
  return anyone;
}

constexpr uint32_t kRankShift = 24;  // above every address in a block's shared memory

uint32_t map_to_rank(uint32_t address, uint32_t rank) {
  if (rank >= cluster->blocks.size()) fail_with("rank ", rank, " in a cluster of ", cluster->blocks.size(), " blocks");
  return address + (rank + 1 << kRankShift);
}
// Where an address of the cluster is; a block that has ended has no memory left.
static uint8_t* at_of_cluster(uint32_t address, uint32_t bytes) {
  Block& other = address >> kRankShift ? cluster->blocks[(address >> kRankShift) - 1] : *block;
  uint64_t offset = (address & (1 << kRankShift) - 1) - uint64_t(kSharedBase);
  if (offset + bytes > other.shared.size()) fail_with("reads beyond another block's shared memory, at offset ", offset);
  if (address % bytes) fail_with("reads ", bytes, " bytes at offset ", offset, " of another block");
  if (std::all_of(other.threads.begin(), other.threads.end(), [](const Thread& t) { return t.done; }))
    fail("reads the shared memory of a block that has ended");
  return other.shared.data() + offset;
}

int barrier_or(int predicate) {
  Meeting& place = block->barriers[0];
  place.value |= predicate != 0;
  meet(place, block->threads.size(), true, kNamed, 0, [&] { place.result = place.value, place.value = 0; });
  return place.result;
}

// An instruction of the whole warp: ``act`` sees its 32 threads, when all have brought what they bring.
template <typename Act>
static void together(Act act) {
  int first = block->current / kWarp * kWarp;
  meet(block->warps[first / kWarp], kWarp, true, kOfWarp, first / kWarp, [&] { act(&block->threads[first]); });
}

void sync_warp() {
  together([](Thread*) {});
}
int elect() {
  sync_warp();
  return lane() == 0;
}

// The calling thread ends.
void leave() {
  self().done = true;
  yield();
}

static void start() {
  try {
    block->body();
  } catch (...) {
    if (!block->failure) block->failure = std::current_exception();
  }
  leave();
}

// Who waits for what, threads with the same wait taken together.
static std::string waiting() {
  std::ostringstream text;
  const std::vector<Thread>& threads = block->threads;
  for (size_t i = 0, end; i < threads.size(); i = end) {
    for (end = i + 1; end < threads.size() && threads[end].done == threads[i].done; end++)
      if (!threads[i].done && !(threads[end].wait == threads[i].wait)) break;
    if (threads[i].done) continue;
    const Wait& wait = threads[i].wait;
    text << "\n  warp " << i / kWarp << ", lane " << i % kWarp;
    if (end - i > 1) text << " to warp " << (end - 1) / kWarp << ", lane " << (end - 1) % kWarp;
    text << ": " << wait.what;
    if (wait.what == kOfWarp) text << " (" << block->warps[wait.which].arrived << " of 32 threads are there)";
    if (wait.what == kNamed) {
      const Meeting& place = block->barriers[wait.which];
      text << " " << wait.which << " (" << place.arrived << " of " << place.count << " threads are there)";
    }
    for (auto& unit : block->units) text << unit->describe(wait);
  }
  return text.str();
}

// The order in which threads get their turns: by number, backwards, or warps shuffled.
static std::vector<int> turns(int threads) {
  std::vector<int> order(threads), warps((threads + kWarp - 1) / kWarp);
  for (size_t i = 0; i < warps.size(); i++) warps[i] = settings.order == 1 ? warps.size() - 1 - i : i;
  uint32_t state = settings.order;
  for (size_t i = warps.size() - 1; settings.order > 1 && i > 0; i--) {
    state = state * 1664525u + 1013904223u;
    std::swap(warps[i], warps[(state >> 8) % (i + 1)]);
  }
  for (int i = 0; i < threads; i++) {
    int own = settings.order % 2 ? kWarp - 1 - i % kWarp : i % kWarp;
    order[i] = warps[i / kWarp] * kWarp + own;
  }
  return order;
}

// Some threads of a warp, if they don't wait: each until it does.  Whether any has run.
static bool run_warp(Block& own, const int* threads) {
  bool moved = false;
  for (int l = 0; l < kWarp; l++) {
    Thread& t = own.threads[threads[l]];
    if (t.done || !t.wait.over()) continue;
    t.wait.place = nullptr;
    moved = true;
    own.current = threads[l];
    threadIdx = dim3(threads[l] % row_threads, threads[l] / row_threads);
    own.scheduler.leave_for(t.fiber);
    own.current = -1;
    if (own.failure) std::rethrow_exception(own.failure);
  }
  return moved;
}

// A block's turn: one warp after the other runs as far as it can.  Whether anything has moved.
static bool run_block(Block& own, const std::vector<int>& order) {
  block = &own;
  blockIdx = own.index;
  bool moved = false;
  for (size_t first = 0; first < order.size(); first += kWarp)
    while (run_warp(own, &order[first])) moved = true;
  for (auto& unit : own.units) moved = unit->advance() || moved;
  return moved;
}

static void begin(Block& own, dim3 index, size_t shared_bytes) {
  block = &own;
  own.index = blockIdx = index;
  own.shared.assign(shared_bytes, 0xff);  // NaN, whatever it is read as
  own.barriers.assign(16, Meeting()), own.warps.assign(32, Meeting());
  for (Thread& t : own.threads) {
    t.done = t.at_cluster = false, t.wait = Wait();
    t.open.clear(), t.groups.clear();
    t.fiber.begin(t.stack.get(), kStack, start);
  }
  for (auto& unit : own.units) unit->begin();
}

// All threads of a cluster's blocks, from their first instruction to their last.
static void run_cluster(const std::vector<int>& order) {
  auto is_done = [](const Block& own) {
    return std::all_of(own.threads.begin(), own.threads.end(), [](const Thread& t) { return t.done; });
  };
  while (!std::all_of(cluster->blocks.begin(), cluster->blocks.end(), is_done)) {
    bool moved = false;
    for (Block& own : cluster->blocks) moved = run_block(own, order) || moved;
    if (moved || cluster_meets()) continue;
    std::string found;
    for (Block& own : cluster->blocks) block = &own, blockIdx = own.index, found += waiting();
    fail("its threads wait for each other forever:" + found);
  }
  for (Block& own : cluster->blocks) {
    block = &own, blockIdx = own.index;
    for (auto& unit : own.units) unit->end();
  }
}

void run(dim3 grid, dim3 size, dim3 of_cluster, size_t shared_bytes, std::function<void()> body) {
  if (size.x % kWarp || (size.y != 1 && size.x != kWarp) || size.z != 1)
    TVM_FFI_THROW(RuntimeError) << "a block of " << size.x << " times " << size.y << " threads";
  if (grid.y > 65535 || grid.z > 65535) TVM_FFI_THROW(RuntimeError) << "a grid of " << grid.y << " times " << grid.z << " rows";
  unsigned blocks = of_cluster.x * of_cluster.y * of_cluster.z;
  if (blocks > 16 || grid.x % of_cluster.x || grid.y % of_cluster.y || grid.z % of_cluster.z)
    TVM_FFI_THROW(RuntimeError) << "clusters of " << blocks << " blocks, in which the grid isn't whole";
  gridDim = grid, clusterDim = of_cluster, row_threads = size.x;
  Cluster own;
  own.blocks.resize(blocks);
  for (Block& each : own.blocks) {
    each.body = body;
    each.threads.resize(size.x * size.y);
    for (Thread& t : each.threads) t.stack.reset(new char[kStack]);
    for (auto& make : Unit::kinds()) each.units.push_back(make());
  }
  std::vector<int> order = turns(size.x * size.y);
  struct Current {
    Current(Cluster& own) { cluster = &own; }
    ~Current() { cluster = nullptr, block = nullptr; }
  } current(own);
  for (unsigned z = 0; z < grid.z; z += clusterDim.z)
    for (unsigned y = 0; y < grid.y; y += clusterDim.y)
      for (unsigned x = 0; x < grid.x; x += clusterDim.x) {
        for (unsigned i = 0; i < blocks; i++)
          begin(own.blocks[i],
                dim3(x + i % clusterDim.x, y + i / clusterDim.x % clusterDim.y, z + i / clusterDim.x / clusterDim.y),
                shared_bytes + kArrays + 16);
        run_cluster(order);
      }
}

}  // namespace simt
