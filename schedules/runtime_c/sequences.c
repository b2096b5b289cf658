/* Where sequences of different lengths begin, as kernels of the CPU are told. */
#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

/* Whether starts[0 .. count - 1] begin with 0, never fall, and end with at most total. */
EXPORT int32_t tvm_flash_starts_make_sense(const int32_t* starts, int64_t count, int64_t total) {
  int32_t falls = 0;
  for (int64_t i = 1; i < count; i++) falls |= starts[i] < starts[i - 1];
  return !falls && starts[0] == 0 && starts[count - 1] <= total;
}

/* Whether lengths[0 .. batch - 1] are keys that a table of that many pages for each sequence has room for, and the
 * entries that they need numbers of pages that there are. */
EXPORT int32_t tvm_flash_pages_make_sense(const int32_t* lengths, const int32_t* table, int64_t stride, int64_t batch,
                                          int64_t pages_per_sequence, int64_t pages, int64_t page_size) {
  for (int64_t b = 0; b < batch; b++) {
    if (lengths[b] < 0 || lengths[b] > pages_per_sequence * page_size) return 0;
    int64_t needed = (lengths[b] + page_size - 1) / page_size;
    uint32_t largest = 0; /* a negative number is a large one */
    for (int64_t i = 0; i < needed; i++) {
      uint32_t page = (uint32_t)table[b * stride + i];
      if (page > largest) largest = page;
    }
    if (needed && largest >= pages) return 0;
  }
  return 1;
}

/* Rows of queries times parts of their keys, of the sequences with at most `few` queries.  `keys` are starts, batch + 1 of
 * them, or lengths.  A part has `part` keys, the last one fewer; there is one at least.  Rows after the last sequence are
 * one more, without keys. */
EXPORT int64_t tvm_flash_rows_of_parts(const int32_t* queries, int64_t total_q, int64_t batch, const int32_t* keys,
                                       int32_t keys_are_starts, int64_t few, int64_t part) {
  int64_t rows = 0;
  for (int64_t b = 0; b <= batch; b++) {
    int64_t length_q = (b < batch ? queries[b + 1] : total_q) - queries[b];
    int64_t length_k = b == batch ? 0 : keys_are_starts ? keys[b + 1] - keys[b] : keys[b];
    int64_t parts = length_k > part ? (length_k + part - 1) / part : 1;
    if (length_q > 0 && length_q <= few) rows += length_q * parts;
  }
  return rows;
}
