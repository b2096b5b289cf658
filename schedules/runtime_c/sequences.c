/* Where sequences of different lengths begin, as kernels of the CPU are told. */
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

/* Whether starts[0 .. count - 1] begin with 0, never fall, and end with at most total. */
EXPORT int32_t tvm_flash_starts_make_sense(const int32_t* starts, int64_t count, int64_t total) {
  int32_t falls = 0;
  for (int64_t i = 1; i < count; i++) falls |= starts[i] < starts[i - 1];
  return !falls && starts[0] == 0 && starts[count - 1] <= total;
}
