/* The runtime of CPU kernels: parallel loops on a pool of threads, and scratch memory.
 *
 * One pool a process.  A launch of n tasks runs task 0 on the caller and the others on workers 1 .. n-1, always on the same
 * ones.  Workers spin for a short while before they sleep, since the next launch often comes at once.  A second
 * thread that launches while the pool is busy, and a launch from inside a task, do the whole loop as one task.
 * After fork() the child starts a pool of its own.
 *
 * Number of threads: TVM_NUM_THREADS, else OMP_NUM_THREADS, else the processors that the process may run on.
 */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define MAX_THREADS 512
#define SPIN_NANOSECONDS 50000 /* waking a sleeping worker costs about as much */
#define CACHED_BLOCKS 8

typedef struct {
  void* sync_handle;
  int32_t num_task;
} ParallelGroup; /* TVMParallelGroupEnv */

/* Of libtvm_ffi, which has loaded the module: a task's own error stays in the thread that ran it. */
extern void TVMFFIErrorSetRaisedFromCStr(const char* kind, const char* message);

typedef int (*Task)(int task_id, ParallelGroup* group, void* closure);

/* ---------------------------------------------------------------- the pool */

static struct {
  pthread_mutex_t busy;     /* held by the thread whose launch is running */
  int size;                 /* threads, the caller included */
  int started;              /* workers that exist */
  Task task;
  void* closure;
  ParallelGroup group;
  _Atomic uint32_t epoch;   /* counts launches; what workers wait for */
  _Atomic uint32_t sleeping;
  _Atomic uint32_t pending; /* tasks of this launch that have not ended */
  _Atomic int failed;
  _Atomic uint32_t barrier_count, barrier_epoch;
} pool = {.busy = PTHREAD_MUTEX_INITIALIZER};

static pthread_once_t once = PTHREAD_ONCE_INIT;
static _Thread_local int inside; /* this thread is running a task */

static void futex_wait(_Atomic uint32_t* word, uint32_t value) {
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t* word) {
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}

static void relax(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

static int64_t now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000ll + t.tv_nsec;
}

/* Spin until *word differs from value; false if that took too long. */
static int spin_until_changed(_Atomic uint32_t* word, uint32_t value) {
  int64_t limit = now() + SPIN_NANOSECONDS;
  do
    for (int i = 0; i < 64; i++) {
      if (atomic_load_explicit(word, memory_order_acquire) != value) return 1;
      relax();
    }
  while (now() < limit);
  return 0;
}

static void run_task(int id) {
  inside = 1;
  if (pool.task(id, &pool.group, pool.closure) != 0) atomic_store(&pool.failed, 1);
  inside = 0;
  if (atomic_fetch_sub(&pool.pending, 1) == 1) futex_wake(&pool.pending);
}

static void* worker(void* argument) {
  int id = (int)(intptr_t)argument;
  uint32_t seen = 0;
  for (;;) {
    if (!spin_until_changed(&pool.epoch, seen)) {
      atomic_fetch_add(&pool.sleeping, 1);
      while (atomic_load(&pool.epoch) == seen) futex_wait(&pool.epoch, seen);
      atomic_fetch_sub(&pool.sleeping, 1);
    }
    /* Every worker acknowledges every launch, so that none can miss one or read a launch that is being replaced. */
    seen = atomic_load(&pool.epoch);
    if (id < pool.group.num_task)
      run_task(id);
    else if (atomic_fetch_sub(&pool.pending, 1) == 1)
      futex_wake(&pool.pending);
  }
  return NULL;
}

static int threads_wanted(void) {
  const char* names[] = {"TVM_NUM_THREADS", "OMP_NUM_THREADS"};
  for (int i = 0; i < 2; i++) {
    const char* text = getenv(names[i]);
    int n = text ? atoi(text) : 0;
    if (n > 0) return n < MAX_THREADS ? n : MAX_THREADS;
  }
  cpu_set_t set;
  int n = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : (int)sysconf(_SC_NPROCESSORS_ONLN);
  return n < 1 ? 1 : n < MAX_THREADS ? n : MAX_THREADS;
}

static void forget_workers(void) { /* in the child of a fork: its parent's workers don't exist here */
  pthread_mutex_init(&pool.busy, NULL);
  pool.started = 0;
  pool.epoch = pool.sleeping = pool.pending = 0;
  inside = 0;
}

static void initialise(void) {
  pool.size = threads_wanted();
  pthread_atfork(NULL, NULL, forget_workers);
}

static void start_workers(void) { /* the caller holds pool.busy; no launch is running */
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  pool.epoch = 0;
  while (pool.started < pool.size - 1) {
    pthread_t thread;
    if (pthread_create(&thread, &attributes, worker, (void*)(intptr_t)(pool.started + 1))) break;
    pool.started++;
  }
  pool.size = pool.started + 1; /* fewer if the system refuses threads */
  pthread_attr_destroy(&attributes);
}

static int run_alone(Task task, void* closure) {
  ParallelGroup group = {NULL, 1};
  int outer = inside;
  inside = 1;
  int result = task(0, &group, closure);
  inside = outer;
  return result;
}

EXPORT int tvm_flash_ParallelLaunch(Task task, void* closure, int tasks) {
  pthread_once(&once, initialise);
  if (inside || pool.size == 1 || pthread_mutex_trylock(&pool.busy)) return run_alone(task, closure);
  if (pool.started < pool.size - 1) start_workers();
  if (tasks <= 0 || tasks > pool.size) tasks = pool.size;
  pool.task = task;
  pool.closure = closure;
  pool.group = (ParallelGroup){NULL, tasks};
  atomic_store(&pool.failed, 0);
  atomic_store(&pool.pending, (uint32_t)pool.size);
  atomic_fetch_add(&pool.epoch, 1);
  if (atomic_load(&pool.sleeping)) futex_wake(&pool.epoch);
  run_task(0);
  uint32_t left;
  while ((left = atomic_load(&pool.pending)) != 0)
    if (!spin_until_changed(&pool.pending, left) && atomic_load(&pool.pending) == left) futex_wait(&pool.pending, left);
  int failed = atomic_load(&pool.failed);
  pthread_mutex_unlock(&pool.busy);
  if (!failed) return 0;
  TVMFFIErrorSetRaisedFromCStr("RuntimeError", "a task of a parallel loop failed");
  return -1;
}

EXPORT int tvm_flash_ParallelBarrier(int task_id, ParallelGroup* group) {
  (void)task_id;
  if (group->num_task == 1) return 0;
  uint32_t epoch = atomic_load(&pool.barrier_epoch);
  if (atomic_fetch_add(&pool.barrier_count, 1) + 1 == (uint32_t)group->num_task) {
    atomic_store(&pool.barrier_count, 0);
    atomic_fetch_add(&pool.barrier_epoch, 1);
  } else {
    while (atomic_load(&pool.barrier_epoch) == epoch) sched_yield();
  }
  return 0;
}

/* ---------------------------------------------------------------- scratch memory */

/* A few blocks that this thread has given back are kept, since kernels ask for the same sizes again and again, and fresh
 * memory from the system costs a page fault every 4 KB. */
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
