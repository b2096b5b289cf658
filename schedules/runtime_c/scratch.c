/* Scratch memory of CPU kernels.
 *
 * A few blocks that a thread has given back are kept, since kernels ask for the same sizes again and again, and fresh memory
 * from the system costs a page fault every 4 KB.
 */
#include "old_glibc.h"

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

#define EXPORT __attribute__((visibility("default")))
#define CACHED_BLOCKS 8

typedef struct {
  size_t size;
  char padding[64 - sizeof(size_t)];
} Block; /* what lies before each piece of scratch memory */

typedef struct {
  Block* blocks[CACHED_BLOCKS];
} Cache;

static pthread_key_t cache_key;
static pthread_once_t cache_once = PTHREAD_ONCE_INIT;

static void drop_cache(void* argument) {
  Cache* cache = argument;
  for (int i = 0; i < CACHED_BLOCKS; i++) free(cache->blocks[i]);
  free(cache);
}

static void make_cache_key(void) { pthread_key_create(&cache_key, drop_cache); }

static Cache* this_cache(void) {
  pthread_once(&cache_once, make_cache_key);
  Cache* cache = pthread_getspecific(cache_key);
  if (!cache && (cache = calloc(1, sizeof *cache))) pthread_setspecific(cache_key, cache);
  return cache;
}

EXPORT void* tvm_flash_AllocWorkspace(int device_type, int device_id, uint64_t size, int type_code, int type_bits) {
  (void)device_type, (void)device_id, (void)type_code, (void)type_bits;
  Cache* cache = this_cache();
  for (int i = 0; cache && i < CACHED_BLOCKS; i++) {
    Block* block = cache->blocks[i];
    if (block && block->size >= size && block->size <= 2 * size + 4096) {
      cache->blocks[i] = NULL;
      return block + 1;
    }
  }
  Block* block = size < SIZE_MAX / 2 ? aligned_alloc(64, (sizeof(Block) + size + 63) / 64 * 64) : NULL;
  if (!block) return NULL;
  block->size = size;
  return block + 1;
}

EXPORT int tvm_flash_FreeWorkspace(int device_type, int device_id, void* memory) {
  (void)device_type, (void)device_id;
  if (!memory) return 0;
  Block* block = (Block*)memory - 1;
  Cache* cache = this_cache();
  for (int i = 0; cache && i < CACHED_BLOCKS; i++)
    if (!cache->blocks[i]) {
      cache->blocks[i] = block;
      return 0;
    }
  free(block);
  return 0;
}
