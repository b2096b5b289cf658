/* The runtime of CPU kernels: parallel loops.
 *
 * A launch is a number of tasks.  Its caller and whoever helps it take the next task until none is left, so that a helper
 * that comes late, or never, costs nothing: the caller does its share and doesn't wait for it.
 *
 * Who helps: if torch is in the process, the OpenMP team that torch's own loops run on.  Its threads spin for
 * milliseconds after a loop, on every processor, and nobody else's threads would get more than half of one.  Else workers
 * of our own, one pool a process, which serve the launches of all threads.  They spin for a moment before they
 * sleep, since the next launch often comes at once.  The child of a fork has a pool of its own, and never a team: a
 * team that was used before the fork is waited for in vain.
 *
 * A launch that is announced as small (tvm_flash_announce), and one from inside a task, stay on their thread.
 *
 * Number of threads: TVM_FLASH_NUM_THREADS; else torch's, where its team helps; else OMP_NUM_THREADS; else the
 * processors that the process may run on, or fewer if its control group has less time than that.
 */
#define _GNU_SOURCE
#include "old_glibc.h"

#include <dlfcn.h>
#include <limits.h>
#include <link.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define MAX_THREADS 512
#define SPIN_NANOSECONDS 50000 /* waking a sleeping worker costs about as much */
#define TASKS_PER_THREAD 64    /* enough for balance; taking one costs 20 ns */
/* Multiply-adds of a launch that stays on its thread, where it takes up to 35 us.  On a Zen 4, two threads are faster from
 * 0.03 million on while the helper spins (1.8 times at 1 million), but if it has fallen asleep only from 1 to 2 million on
 * (at 0.25 million they take 1.3 times as long), and torch's team may then wait a time slice of 6 ms for it. */
#define SMALL_WORK 1000000

typedef struct {
  void* sync_handle;
  int32_t num_task;
} ParallelGroup; /* TVMParallelGroupEnv */

/* Of libtvm_ffi, which has loaded the module: a task's own error stays in the thread that ran it. */
extern void TVMFFIErrorSetRaisedFromCStr(const char* kind, const char* message);

typedef int (*Task)(int task_id, ParallelGroup* group, void* closure);

typedef struct Launch {
  Task task;
  void* closure;
  ParallelGroup group;
  _Atomic int32_t next;     /* task that nobody has taken yet */
  _Atomic int failed;
  _Atomic uint32_t helpers; /* workers in it; only those that have joined are waited for */
  struct Launch* following;
} Launch;

static _Thread_local int inside; /* this thread is running a task */
static _Thread_local struct {
  int64_t items, work;
} announced;

static void run_tasks(void* data) {
  Launch* launch = data;
  int outer = inside, tasks = launch->group.num_task;
  inside = 1;
  for (int32_t id; (id = atomic_fetch_add(&launch->next, 1)) < tasks;)
    if (launch->task(id, &launch->group, launch->closure) != 0) atomic_store(&launch->failed, 1);
  inside = outer;
}

/* ---------------------------------------------------------------- how many threads */

static int number_in(const char* name) {
  const char* text = getenv(name);
  int n = text ? atoi(text) : 0;
  return n < 0 ? 0 : n < MAX_THREADS ? n : MAX_THREADS;
}

/* Processors' worth of time that the control group of this process may use (cgroup v2, its parents' limits included). */
static int quota(void) {
  char line[PATH_MAX], path[PATH_MAX + 32] = "";
  int limit = MAX_THREADS;
  FILE* file = fopen("/proc/self/cgroup", "r");
  while (file && fgets(line, sizeof line, file))
    if (!strncmp(line, "0::", 3)) snprintf(path, sizeof path, "/sys/fs/cgroup%.*s", (int)strcspn(line + 3, "\n"), line + 3);
  if (file) fclose(file);
  for (char* end = path + strlen(path); end && end > path + strlen("/sys/fs"); end = strrchr(path, '/')) {
    long long time, period;
    strcpy(end, "/cpu.max");
    if ((file = fopen(path, "r"))) {
      if (fscanf(file, "%lld %lld", &time, &period) == 2 && period > 0 && (time + period - 1) / period < limit)
        limit = (int)((time + period - 1) / period);
      fclose(file);
    }
    *end = 0;
  }
  return limit < 1 ? 1 : limit;
}

EXPORT int tvm_flash_threads(void) {
  int n = number_in("TVM_FLASH_NUM_THREADS");
  if (n || (n = number_in("OMP_NUM_THREADS"))) return n;
  cpu_set_t set;
  n = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : (int)sysconf(_SC_NPROCESSORS_ONLN);
  int limit = quota();
  return n < 1 ? 1 : n < limit ? n : limit;
}

/* ---------------------------------------------------------------- torch's team */

typedef void (*RunTeam)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

static struct {
  pthread_mutex_t lock;
  unsigned long long libraries; /* that had been loaded when torch was last looked for */
  int (*threads)(void);
  _Atomic(RunTeam) run; /* NULL without torch; else GOMP_parallel of the OpenMP library that torch is linked with */
} team = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* The path of libtorch_cpu.so if it came with the libraries that were loaded since the last look. */
static int find_torch(struct dl_phdr_info* info, size_t size, void* path) {
  (void)size;
  if (info->dlpi_adds == team.libraries) return 1;
  const char* name = strrchr(info->dlpi_name, '/');
  if (!name || strcmp(name, "/libtorch_cpu.so")) return 0;
  snprintf(path, PATH_MAX, "%s", info->dlpi_name);
  return 1;
}

static int count_libraries(struct dl_phdr_info* info, size_t size, void* count) {
  (void)size;
  *(unsigned long long*)count = info->dlpi_adds;
  return 1;
}

/* Looking again costs 0.1 us as long as no library was loaded; asking the loader by name costs 30. */
static RunTeam torchs_team(void) {
  RunTeam run = atomic_load(&team.run);
  if (run || pthread_mutex_trylock(&team.lock)) return run;
  char path[PATH_MAX] = "";
  unsigned long long libraries = 0;
  dl_iterate_phdr(count_libraries, &libraries);
  dl_iterate_phdr(find_torch, path);
  team.libraries = libraries;
  void* torch = *path ? dlopen(path, RTLD_NOLOAD | RTLD_LAZY) : NULL;
  if (torch) {
    team.threads = (int (*)(void))dlsym(torch, "omp_get_max_threads");
    run = (RunTeam)dlsym(torch, "GOMP_parallel");
    atomic_store(&team.run, run && team.threads ? run : NULL);
  }
  pthread_mutex_unlock(&team.lock);
  return atomic_load(&team.run);
}

/* ---------------------------------------------------------------- a pool of our own */

static struct {
  pthread_mutex_t lock; /* of the list, for moments */
  Launch* launches;     /* the newest first */
  int workers;          /* that exist */
  int forked;           /* this process began with a fork, not with a program */
  _Atomic uint32_t epoch; /* counts launches; what workers wait for */
  _Atomic uint32_t sleeping;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER};

static pthread_once_t once = PTHREAD_ONCE_INIT;
static int asked_for; /* threads, by TVM_FLASH_NUM_THREADS */
static int threads;   /* of a launch, the caller included */

static void futex_wait(_Atomic uint32_t* word, uint32_t value) {
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t* word, int32_t waiters) {
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, waiters, NULL, NULL, 0);
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

/* Wait until *word differs from value: spin for a while, then sleep. */
static void wait_for_change(_Atomic uint32_t* word, uint32_t value, _Atomic uint32_t* sleeping) {
  int64_t limit = now() + SPIN_NANOSECONDS;
  do
    for (int i = 0; i < 64; i++) {
      if (atomic_load_explicit(word, memory_order_acquire) != value) return;
      relax();
    }
  while (now() < limit);
  if (sleeping) atomic_fetch_add(sleeping, 1);
  while (atomic_load(word) == value) futex_wait(word, value);
  if (sleeping) atomic_fetch_sub(sleeping, 1);
}

/* A launch that has tasks left, joined; NULL if there is none. */
static Launch* join(void) {
  pthread_mutex_lock(&pool.lock);
  Launch* launch = pool.launches;
  while (launch && atomic_load(&launch->next) >= launch->group.num_task) launch = launch->following;
  if (launch) atomic_fetch_add(&launch->helpers, 1);
  pthread_mutex_unlock(&pool.lock);
  return launch;
}

static void* worker(void* unused) {
  for (;;) {
    uint32_t seen = atomic_load(&pool.epoch);
    Launch* launch = join();
    if (!launch) {
      wait_for_change(&pool.epoch, seen, &pool.sleeping);
      continue;
    }
    run_tasks(launch);
    if (atomic_fetch_sub(&launch->helpers, 1) == 1) futex_wake(&launch->helpers, 1);
  }
  return unused;
}

static void start_workers(void) { /* the caller holds the lock */
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  pthread_t thread;
  while (pool.workers < threads - 1 && !pthread_create(&thread, &attributes, worker, NULL)) pool.workers++;
  pthread_attr_destroy(&attributes);
}

static void share(Launch* launch) {
  pthread_mutex_lock(&pool.lock);
  start_workers();
  launch->following = pool.launches;
  pool.launches = launch;
  pthread_mutex_unlock(&pool.lock);
  atomic_fetch_add(&pool.epoch, 1);
  if (atomic_load(&pool.sleeping)) futex_wake(&pool.epoch, launch->group.num_task - 1);
  run_tasks(launch);
  pthread_mutex_lock(&pool.lock);
  Launch** link = &pool.launches;
  while (*link != launch) link = &(*link)->following;
  *link = launch->following;
  pthread_mutex_unlock(&pool.lock);
  uint32_t left;
  while ((left = atomic_load(&launch->helpers)) != 0) wait_for_change(&launch->helpers, left, NULL);
}

static _Atomic int launches_running;

static void forget_workers(void) { /* in the child of a fork: its parent's threads don't exist here */
  pthread_mutex_init(&pool.lock, NULL);
  pool.launches = NULL;
  pool.workers = 0;
  pool.forked = 1;
  pool.epoch = pool.sleeping = 0;
  launches_running = 0;
  inside = 0;
}

static int is_fork(void) {
  char line[1024];
  unsigned flags = 0;
  FILE* file = fopen("/proc/self/stat", "r");
  const char* after = file && fgets(line, sizeof line, file) ? strrchr(line, ')') : NULL;
  if (!after || sscanf(after + 1, " %*c %*d %*d %*d %*d %*d %u", &flags) != 1) flags = 0;
  if (file) fclose(file);
  return (flags & 0x40) != 0; /* PF_FORKNOEXEC of linux/sched.h; proc(5) shows the flags */
}

static void initialise(void) {
  pool.forked = is_fork();
  asked_for = number_in("TVM_FLASH_NUM_THREADS");
  threads = tvm_flash_threads();
  pthread_atfork(NULL, NULL, forget_workers);
}

/* ---------------------------------------------------------------- what kernels call */

/* Of this thread's next launch: how many items its loop has, and how many multiply-adds they are in all. */
EXPORT void tvm_flash_announce(int64_t items, int64_t work) {
  announced.items = items;
  announced.work = work;
}

/* Threads that a launch has, if it isn't small and there is no other. */
static int launch_threads(RunTeam* run) {
  pthread_once(&once, initialise);
  *run = pool.forked ? NULL : torchs_team();
  return *run && !asked_for ? team.threads() : threads;
}

EXPORT int64_t tvm_flash_launch_threads(void) {
  RunTeam run;
  return inside ? 1 : launch_threads(&run);
}

EXPORT int tvm_flash_ParallelLaunch(Task task, void* closure, int tasks) {
  pthread_once(&once, initialise);
  int64_t items = announced.items ? announced.items : INT32_MAX, work = announced.work ? announced.work : INT64_MAX;
  announced.items = announced.work = 0;
  RunTeam run = NULL;
  int size = 1, running = atomic_fetch_add(&launches_running, 1) + 1;
  if (!inside && items > 1 && work >= SMALL_WORK) {
    size = launch_threads(&run);
    if (run) size /= running; /* each thread that calls has a team of its own: several at once share the processors */
  }
  if (size < 2)
    tasks = 1;
  else if (tasks <= 0)
    tasks = items < TASKS_PER_THREAD * size ? (int)items : TASKS_PER_THREAD * size;
  Launch launch = {.task = task, .closure = closure, .group.num_task = tasks};
  if (tasks == 1)
    run_tasks(&launch);
  else if (run)
    run(run_tasks, &launch, (unsigned)(size < tasks ? size : tasks), 0);
  else
    share(&launch);
  atomic_fetch_sub(&launches_running, 1);
  if (!launch.failed) return 0;
  TVMFFIErrorSetRaisedFromCStr("RuntimeError", "a task of a parallel loop failed");
  return -1;
}

/* Tasks run one after the other on however many threads there are: none may wait for another. */
EXPORT int tvm_flash_ParallelBarrier(int task_id, ParallelGroup* group) {
  (void)task_id, (void)group;
  TVMFFIErrorSetRaisedFromCStr("RuntimeError", "tasks of a parallel loop can't wait for each other");
  return -1;
}
