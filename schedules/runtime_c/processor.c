/* What kernels ask of the processor that they run on, beyond what their pack needs. */
#include "old_glibc.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Whether 64 bytes can be looked up at once (AVX-512 VBMI), and TVM_FLASH_MAX_ISA names nothing that hasn't that.
 * It is found out once: asking takes a virtual machine microseconds. */
__attribute__((visibility("default"))) int32_t tvm_flash_looks_up_bytes(void) {
  static int known; /* 0 until it is, then 1 for no and 2 for yes: whoever else finds it out writes the same */
  if (!known) {
    const char* most = getenv("TVM_FLASH_MAX_ISA");
    int may = !most || !*most || !strcmp(most, "amx") || !strcmp(most, "avx512_bf16");
    __builtin_cpu_init();
    known = may && __builtin_cpu_supports("avx512vbmi") ? 2 : 1;
  }
  return known == 2;
}
