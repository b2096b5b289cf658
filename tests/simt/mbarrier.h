// Transaction barriers in shared memory: a phase is complete when its arrivals have come and its bytes have landed.

#pragma once

#include <map>

#include "machine.h"

namespace simt {

struct Mbarrier {
  uint32_t phase = 0;      // how many phases are complete
  uint32_t expected = 0;   // arrivals of a phase
  uint32_t pending = 0;    // those that are still to come in this one
  int64_t bytes = 0;       // announced and not landed yet
  uint32_t number = 0;     // in the order in which the block has initialised its barriers

  void complete() {
    if (pending || bytes) return;
    phase++;
    pending = expected;
  }
};

struct Mbarriers : Unit {
  std::map<uint32_t, Mbarrier> barriers;  // by address

  void begin() override { barriers.clear(); }
  std::string describe(const Wait& wait) override;

  void init(uint32_t address, uint32_t count) {
    check_shared(address, 8, 8, "mbarrier.init");
    if (barriers.count(address)) fail_with("mbarrier ", barriers[address].number, " is initialised again");
    Mbarrier& own = barriers[address];
    own = Mbarrier();
    own.expected = own.pending = count;
    own.number = barriers.size() - 1;
    mark(address);
  }
  void invalidate(uint32_t address) {
    Mbarrier& own = find(address);
    if (own.bytes || own.pending != own.expected) fail_with("mbarrier ", own.number, " is in use when it is given up");
    barriers.erase(address);
  }
  Mbarrier& find(uint32_t address) {
    auto found = barriers.find(address);
    if (found == barriers.end()) fail_with("no barrier has been initialised at offset ", int64_t(address) - kSharedBase);
    uint64_t value;
    memcpy(&value, at(address), 8);
    if (value != kMark + address) fail_with("mbarrier ", found->second.number, " has been overwritten");
    return found->second;
  }

 private:
  static constexpr uint64_t kMark = 0x6d62617272696572;
  // What lies in a barrier's place is nobody's business; here it is something that shows when it is overwritten.
  void mark(uint32_t address) {
    uint64_t value = kMark + address;
    memcpy(at(address), &value, 8);
  }
};
static OfBlock<Mbarriers> mbarriers;

constexpr const char* kTransaction = "mbarrier";

std::string Mbarriers::describe(const Wait& wait) {
  if (wait.what != kTransaction) return "";
  std::ostringstream text;
  const Mbarrier& own = barriers[wait.which];
  text << " " << own.number << " (at offset " << wait.which - kSharedBase << ") for the end of a phase of parity "
       << wait.value << "; it is in phase " << own.phase << ", where " << own.pending << " of " << own.expected
       << " arrivals and " << own.bytes << " bytes are missing";
  return text.str();
}

void mbarrier_init(uint32_t address, uint32_t count) { mbarriers->init(address, count); }
void mbarrier_invalidate(uint32_t address) { mbarriers->invalidate(address); }
void mbarrier_arrive(uint32_t address, uint32_t count) {
  Mbarrier& own = mbarriers->find(address);
  if (count > own.pending)
    fail_with("arrives at mbarrier ", own.number, ", which has had all ", own.expected, " arrivals of phase ", own.phase,
              " already");
  own.pending -= count;
  own.complete();
}
void mbarrier_expect(uint32_t address, uint32_t bytes) { mbarriers->find(address).bytes += bytes; }
void mbarrier_arrive_expect(uint32_t address, uint32_t bytes) {
  mbarrier_expect(address, bytes);
  mbarrier_arrive(address, 1);
}
void mbarrier_wait(uint32_t address, uint32_t parity) {
  if (parity > 1) fail_with("waits for parity ", parity);
  if (std::exchange(next_parity_is_other, false)) parity ^= 1;
  wait_until(&mbarriers->find(address).phase, 1, parity, kTransaction, address);
}
uint32_t mbarrier_test(uint32_t address, uint32_t parity) {
  return (mbarriers->find(address).phase & 1) != parity;
}

}  // namespace simt
