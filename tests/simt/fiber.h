// Threads of execution that take turns: each has a stack of its own and runs until it hands over.

#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#if defined(__x86_64__)

// Stores the registers that a call must keep on the stack of the one that leaves, and takes up those of the other.
extern "C" void simt_switch(void** from, void* to);
asm(R"(
.text
.balign 16
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, . - simt_switch
)");

namespace simt {

class Fiber {
 public:
  // ``entry`` must never return.
  void begin(char* stack, size_t size, void (*entry)()) {
    void** top = (void**)(((uintptr_t)stack + size) & ~uintptr_t(15));
    *--top = nullptr;  // where ``entry`` would return to
    *--top = (void*)entry;
    for (int i = 0; i < 6; i++) *--top = nullptr;
    at_ = top;
  }
  void leave_for(Fiber& other) { simt_switch(&at_, other.at_); }

 private:
  void* at_ = nullptr;
};

}  // namespace simt

#else

#include <ucontext.h>

namespace simt {

class Fiber {
 public:
  void begin(char* stack, size_t size, void (*entry)()) {
    getcontext(&context_);
    context_.uc_stack = {stack, 0, size};
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  void leave_for(Fiber& other) { swapcontext(&context_, &other.context_); }

 private:
  ucontext_t context_;
};

}  // namespace simt

#endif
