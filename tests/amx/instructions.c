/* AMX's instructions as functions, for machines without them, and scratch memory that shows where a kernel is wrong.
 *
 * They stop the process where the instructions would (tiles without a configuration, a configuration that is none, tiles
 * whose sizes don't fit), and if a thread's configuration isn't put back.  Unlike tdpbf16ps, they know numbers below the
 * normal ones.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { TILES = 8, ROWS = 16, ROW_BYTES = 64, PAGE = 4096, LINE = 64 };

typedef struct {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
} Configuration;

/* What a thread has at first: somebody else's. */
#define OTHERS {.palette = 1, .row_bytes = {8, 16, 4}, .rows = {2, 3, 5}}

static const Configuration others = OTHERS;
static _Thread_local Configuration configuration = OTHERS;
static _Thread_local uint8_t tiles[TILES][ROWS][ROW_BYTES];

static void require(int condition) {
  if (!condition) abort();
}

void emulated_sttilecfg(void* memory) {
  require(!memcmp(&configuration, &others, sizeof others)); /* nobody stores a configuration of a kernel's own */
  memcpy(memory, &configuration, sizeof configuration);
}

void emulated_ldtilecfg(const void* memory) {
  memcpy(&configuration, memory, sizeof configuration);
  require(configuration.palette == 1 && configuration.start_row == 0);
  for (int i = 0; i < 14; i++) require(configuration.reserved[i] == 0);
  for (int tile = 0; tile < 16; tile++) {
    int used = configuration.rows[tile] != 0;
    require(used == (configuration.row_bytes[tile] != 0) && (!used || tile < TILES));
    require(configuration.rows[tile] <= ROWS && configuration.row_bytes[tile] <= ROW_BYTES);
  }
  memset(tiles, 0, sizeof tiles);
}

static void require_whole(uint8_t tile) {
  require(tile < TILES && configuration.rows[tile] == ROWS && configuration.row_bytes[tile] == ROW_BYTES);
}

void emulated_tilezero(uint8_t tile) {
  require_whole(tile);
  memset(tiles[tile], 0, sizeof tiles[tile]);
}

void emulated_tileloadd64(uint8_t tile, const char* memory, int64_t stride) {
  require_whole(tile);
  for (int row = 0; row < ROWS; row++) memcpy(tiles[tile][row], memory + row * stride, ROW_BYTES);
}

void emulated_tilestored64(uint8_t tile, char* memory, int64_t stride) {
  require_whole(tile);
  for (int row = 0; row < ROWS; row++) memcpy(memory + row * stride, tiles[tile][row], ROW_BYTES);
}

static float number(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

/* c += a b; the products of the first and of the second elements of pairs are summed apart. */
void emulated_tdpbf16ps(uint8_t c, uint8_t a, uint8_t b) {
  enum { COLUMNS = ROW_BYTES / 4 };
  require_whole(c), require_whole(a), require_whole(b);
  uint32_t x[ROWS][COLUMNS], y[ROWS][COLUMNS];
  float sum[ROWS][COLUMNS];
  memcpy(x, tiles[a], sizeof x), memcpy(y, tiles[b], sizeof y), memcpy(sum, tiles[c], sizeof sum);
  for (int m = 0; m < ROWS; m++) {
    float first[COLUMNS] = {0}, second[COLUMNS] = {0};
    for (int k = 0; k < COLUMNS; k++)
      for (int n = 0; n < COLUMNS; n++) {
        first[n] += number(x[m][k] << 16) * number(y[k][n] << 16);
        second[n] += number(x[m][k] & 0xFFFF0000) * number(y[k][n] & 0xFFFF0000);
      }
    for (int n = 0; n < COLUMNS; n++) sum[m][n] += first[n] + second[n];
  }
  memcpy(tiles[c], sum, sizeof sum);
}

/* Each piece of scratch memory is full of NaN, and ends (but for less than 64 bytes) at a page that can't be touched. */
void* tvm_flash_AllocWorkspace(int device_type, int device_id, uint64_t size, int type_code, int type_bits) {
  (void)device_type, (void)device_id, (void)type_code, (void)type_bits;
  size = (size + LINE - 1) / LINE * LINE;
  uint64_t mapped = (LINE + size + PAGE - 1) / PAGE * PAGE;
  char* start = mmap(NULL, mapped + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  require(start != MAP_FAILED && !mprotect(start + mapped, PAGE, PROT_NONE));
  memset(start, 0xFF, mapped);
  uint64_t* memory = (uint64_t*)(start + mapped - size);
  memory[-1] = mapped;
  memory[-2] = size;
  return memory;
}

int tvm_flash_FreeWorkspace(int device_type, int device_id, void* memory) {
  (void)device_type, (void)device_id;
  uint64_t mapped = ((uint64_t*)memory)[-1], size = ((uint64_t*)memory)[-2];
  return munmap((char*)memory + size - mapped, mapped + PAGE);
}
