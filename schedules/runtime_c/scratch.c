/* Scratch memory of CPU kernels.
 *
 * Kernels ask for the same sizes again and again.  Small pieces, of which a work item has dozens (TVM asks for each mutable
 * scalar), are put one on top of the other: a thread gives back last what it was given first.  Of large ones, a few that a
 * thread has given back are kept, since fresh memory from the system costs a page fault every 4 KB.
 *
 * Whoever reads of it what nobody wrote gets what the last kernel left, which is often right by accident.  Tests set
 * TVM_FLASH_POISON_SCRATCH, and get NaN (all bits are set) in its place.
 */
#include "old_glibc.h"

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define KEPT_BLOCKS 16 /* a ragged kernel has 14 that are large */
#define SMALL 1024     /* bytes */
#define STACK 65536

typedef struct {
  size_t size;   /* of a large block */
  size_t before; /* of a small one: where the one below it begins */
  int free;      /* the same: it was given back, and another above it wasn't */
  char padding[64 - 2 * sizeof(size_t) - sizeof(int)];
} Block; /* what lies before each piece of scratch memory */

typedef struct {
  Block* kept[KEPT_BLOCKS];
  unsigned oldest;
  char* stack;        /* of small blocks; NULL until there is one */
  size_t top, height; /* where its last block begins, and ends; 0 if there is none */
} Cache;

static pthread_key_t cache_key;
static pthread_once_t cache_once = PTHREAD_ONCE_INIT;
static int poisoned;

static void drop_cache(void* argument) {
  Cache* cache = argument;
  for (int i = 0; i < KEPT_BLOCKS; i++) free(cache->kept[i]);
  free(cache->stack);
  free(cache);
}

static void make_cache_key(void) {
  poisoned = getenv("TVM_FLASH_POISON_SCRATCH") != NULL;
  pthread_key_create(&cache_key, drop_cache);
}

static Cache* this_cache(void) {
  pthread_once(&cache_once, make_cache_key);
  Cache* cache = pthread_getspecific(cache_key);
  if (!cache && (cache = calloc(1, sizeof *cache))) pthread_setspecific(cache_key, cache);
  return cache;
}

/* The next block of a thread's stack; NULL if there is no room. */
static Block* push(Cache* cache, size_t size) {
  if (!cache->stack && !(cache->stack = aligned_alloc(64, STACK))) return NULL;
  size_t end = cache->height + sizeof(Block) + (size + 63) / 64 * 64;
  if (end > STACK) return NULL;
  Block* block = (Block*)(cache->stack + cache->height);
  block->before = cache->top;
  block->free = 0;
  cache->top = cache->height;
  cache->height = end;
  return block;
}

/* Take a block off the stack, once all above it were given back too. */
static void pop(Cache* cache, Block* block) {
  block->free = 1;
  while (cache->height && (block = (Block*)(cache->stack + cache->top))->free) {
    cache->height = cache->top;
    cache->top = block->before;
  }
}

static void* take(uint64_t size) {
  Cache* cache = this_cache();
  Block* block = cache && size <= SMALL ? push(cache, size) : NULL;
  if (block) return block + 1;
  for (int i = 0; cache && i < KEPT_BLOCKS; i++) {
    block = cache->kept[i];
    if (block && block->size >= size && block->size <= 2 * size + 4096) {
      cache->kept[i] = NULL;
      return block + 1;
    }
  }
  block = size < SIZE_MAX / 2 ? aligned_alloc(64, (sizeof(Block) + size + 63) / 64 * 64) : NULL;
  if (!block) return NULL;
  block->size = size;
  return block + 1;
}

EXPORT void* tvm_flash_AllocWorkspace(int device_type, int device_id, uint64_t size, int type_code, int type_bits) {
  (void)device_type, (void)device_id, (void)type_code, (void)type_bits;
  void* memory = take(size);
  return memory && poisoned ? memset(memory, 0xff, size) : memory;
}

EXPORT int tvm_flash_FreeWorkspace(int device_type, int device_id, void* memory) {
  (void)device_type, (void)device_id;
  if (!memory) return 0;
  Block* block = (Block*)memory - 1;
  Cache* cache = this_cache();
  if (cache && cache->stack && (char*)block >= cache->stack && (char*)block < cache->stack + STACK) {
    pop(cache, block);
    return 0;
  }
  for (int i = 0; cache && i < KEPT_BLOCKS; i++)
    if (!cache->kept[i]) {
      cache->kept[i] = block;
      return 0;
    }
  if (cache) { /* the oldest makes room */
    Block** place = &cache->kept[cache->oldest++ % KEPT_BLOCKS];
    Block* other = *place;
    *place = block;
    block = other;
  }
  free(block);
  return 0;
}
