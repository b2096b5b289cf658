/* The fast path of a repeated call, from Python's arguments to the kernel.
 *
 * Whatever the checks and the choice of a kernel depend on becomes a key of 64-bit words: shapes, strides, dtypes and
 * devices, the alignment of the pointers, and the options.  The slow path (tvm_flash/call/eager.py) does all the checks and
 * then leaves a recipe under the call's key; a call that finds one has passed them.  What depends on pointers and modes
 * is looked at here each time: alignment (in the key), overlap with `out`, and gradients.  Whatever isn't simple, and
 * whatever fails, goes to the slow path, which takes it from the start and says what is wrong.
 *
 * All state belongs to the GIL, which is released while a kernel runs.
 */
#include <stdlib.h>
#include <tvm/ffi/c_api.h>

#include "call_key.h"

#define EXPORT __attribute__((visibility("default")))
#define ABI 2 /* of the functions below and of Recipe; tvm_flash/call/fast.py asks for the one that it knows */
#define MAX_ARGUMENTS 32
#define MAX_ENTRIES 1024 /* the oldest goes first; one takes about 1.5 KB */
#define BUCKETS 2048

static PyObject* done(void) {
  Py_IncRef(none);
  return none;
}

/* ---------------------------------------------------------------- recipes */

/* What the slow path leaves; the same structure is in tvm_flash/call/fast.py. */
typedef struct {
  void* function; /* of tvm-ffi */
  const TVMFFIAny* arguments;
  const DLTensor* tensors; /* those of the arguments, in their order: q, k, v, out, lse, per-head parameters */
  int32_t argument_count, tensor_count;
  int32_t device_type, device_index;
  int32_t returns_lse;
  int32_t (*current_device)(int32_t*);          /* of the driver; NULL on the processor */
  int32_t per_head[MAX_TENSORS];                /* which of the call's tensors each of the last ones is */
  int64_t low[MAX_TENSORS], high[MAX_TENSORS]; /* bytes that each of the call's tensors touches, from its pointer */
} Recipe;

typedef struct Entry {
  struct Entry* next; /* of the same bucket */
  uint64_t hash;
  int references, words;
  const Recipe* recipe;
  PyObject *owner, *site; /* owner of the recipe, of what it points to, and of the two functions */
  PyObject *make_out, *make_lse; /* None, or tuples as make() takes them */
  Options options;
  uint64_t key[];
} Entry;

static Entry* buckets[BUCKETS];
static Entry* ring[MAX_ENTRIES]; /* in the order of their arrival */
static int ring_at;
static Entry* recent; /* what the last call found: most calls are like the one before */

/* Of libtvm_ffi. */
static int (*call_function)(TVMFFIObjectHandle, TVMFFIAny*, int32_t, TVMFFIAny*);
static void* (*get_stream)(int32_t, int32_t);
static int (*set_stream)(int32_t, int32_t, void*, void**);

static int is_of(const Entry* entry, const Call* call) {
  return entry->words == call->words && !memcmp(entry->key, call->key, 8 * call->words);
}

static Entry* find(const Call* call, uint64_t hash) {
  Entry* entry = buckets[hash % BUCKETS];
  while (entry && !(entry->hash == hash && is_of(entry, call))) entry = entry->next;
  return entry;
}

static void release(Entry* entry) {
  if (--entry->references) return;
  for (int i = 0; i < entry->options.count; i++) Py_DecRef(entry->options.options[i]);
  Py_DecRef(entry->site);
  Py_DecRef(entry->owner);
  free(entry);
}

static void evict(int at) {
  Entry* entry = ring[at];
  if (!entry) return;
  ring[at] = NULL;
  if (recent == entry) recent = NULL, known = NULL;
  Entry** link = &buckets[entry->hash % BUCKETS];
  while (*link != entry) link = &(*link)->next;
  *link = entry->next;
  release(entry);
}

/* ---------------------------------------------------------------- a call */

static int is_true(PyObject* owned) {
  int result = owned == &_Py_TrueStruct;
  if (owned)
    Py_DecRef(owned);
  else
    PyErr_Clear();
  return result;
}

static int gradient_expected(const Call* call) {
  if (!call->reader->is_grad_enabled || !is_true(PyObject_CallNoArgs(call->reader->is_grad_enabled))) return 0;
  for (int i = 0; i < 3; i++)
    if (is_true(PyObject_GetAttr(call->tensors[i], name_requires_grad))) return 1;
  return 0;
}

/* Whether the bytes of `out` may be some of an input's; the slow path looks closer. */
static int may_overlap(const Call* call, const Recipe* recipe) {
  int o = call->tensor_count - 1;
  uint64_t out_low = call->pointers[o] + recipe->low[o], out_high = call->pointers[o] + recipe->high[o];
  for (int i = 0; i < o; i++)
    if (out_low < call->pointers[i] + recipe->high[i] && call->pointers[i] + recipe->low[i] < out_high) return 1;
  return 0;
}

/* Whether the device that new tensors are made on, if nobody names one, is the recipe's. */
static int is_current(const Recipe* recipe) {
  int32_t device;
  return !recipe->current_device || (!recipe->current_device(&device) && device == recipe->device_index);
}

/* A new tensor and its address.  `ways` is (function, arguments, function, arguments): the first is quick and makes it on
 * the current device, the second is sure. */
static PyObject* make(const Recipe* recipe, PyObject* ways, uint64_t* pointer) {
  uint64_t words[1 + 2 * MAX_DIMS];
  for (int sure = !is_current(recipe); sure < 2; sure++) {
    PyObject* tensor = PyObject_CallObject(PyTuple_GetItem(ways, 2 * sure), PyTuple_GetItem(ways, 2 * sure + 1));
    if (!tensor) return NULL;
    const Reader* reader = reader_of(tensor);
    if (reader && read_tensor(reader, tensor, words, pointer) &&
        (sure || !reader->api || is_on(words, recipe->device_type, recipe->device_index)))
      return tensor;
    Py_DecRef(tensor);
  }
  PyErr_SetString(PyExc_TypeError, "a new tensor isn't of the type that was seen before");
  return NULL;
}

/* Run a kernel without the GIL; pointers are those of the recipe's tensors. */
static int run(const Recipe* recipe, const uint64_t* pointers, void* stream) {
  DLTensor tensors[MAX_TENSORS + 1];
  TVMFFIAny arguments[MAX_ARGUMENTS], result = {0};
  memcpy(tensors, recipe->tensors, recipe->tensor_count * sizeof *tensors);
  memcpy(arguments, recipe->arguments, recipe->argument_count * sizeof *arguments);
  for (int i = 0, at = 0; i < recipe->argument_count; i++)
    if (arguments[i].type_index == kTVMFFIDLTensorPtr) {
      tensors[at].data = (void*)pointers[at];
      arguments[i].v_ptr = &tensors[at++];
    }
  void* thread = PyEval_SaveThread();
  int device = recipe->device_type, index = recipe->device_index, status;
  void* before = device == kDLCPU ? NULL : get_stream(device, index);
  if (before == stream) {
    status = call_function(recipe->function, arguments, recipe->argument_count, &result);
  } else {
    set_stream(device, index, stream, NULL);
    status = call_function(recipe->function, arguments, recipe->argument_count, &result);
    set_stream(device, index, before, NULL);
  }
  PyEval_RestoreThread(thread);
  return status;
}

/* Do as a recipe says.  NULL with an error set if there is no memory, and with none if the slow path must do it. */
static PyObject* follow(const Call* call, const Entry* entry) {
  const Recipe* recipe = entry->recipe;
  int o = call->tensor_count - 1;
  PyObject *out = call->tensors[o], *lse = NULL;
  void* stream = NULL;
  uint64_t pointers[MAX_TENSORS + 1] = {call->pointers[0], call->pointers[1], call->pointers[2], call->pointers[o]};
  if (out != none && may_overlap(call, recipe)) return NULL;
  if (recipe->device_type != kDLCPU &&
      call->reader->api->current_work_stream(recipe->device_type, recipe->device_index, &stream)) {
    PyErr_Clear();
    return NULL;
  }
  if (out != none)
    Py_IncRef(out);
  else if (!(out = make(recipe, entry->make_out, &pointers[3])))
    return NULL;
  float unread; /* of a single row, the kernel writes lse even if nobody asked for it */
  pointers[4] = recipe->device_type == kDLCPU ? (uint64_t)&unread : pointers[3];
  if (entry->make_lse != none && !(lse = make(recipe, entry->make_lse, &pointers[4]))) {
    Py_DecRef(out);
    return NULL;
  }
  for (int i = 5; i < recipe->tensor_count; i++) pointers[i] = call->pointers[recipe->per_head[i - 5]];
  if (run(recipe, pointers, stream)) { /* the slow path runs it again and reports */
    Py_DecRef(out);
    if (lse) Py_DecRef(lse);
    return NULL;
  }
  if (!recipe->returns_lse) {
    if (lse) Py_DecRef(lse);
    return out;
  }
  PyObject* pair = PyTuple_New(2);
  if (!pair) {
    Py_DecRef(out);
    Py_DecRef(lse);
    return NULL;
  }
  PyTuple_SetItem(pair, 0, out);
  PyTuple_SetItem(pair, 1, lse);
  return pair;
}

/* ---------------------------------------------------------------- what Python calls */

static PyObject* slow;

/* call(site, number of tensors, q, k, v, per-head …, out, options …): what slow(…) would answer. */
static PyObject* call_(PyObject* self, PyObject* const* arguments, ptrdiff_t count) {
  (void)self;
  Call call;
  Entry* entry = NULL;
  if (read_call(&call, arguments, count)) /* may run other threads, and garbage collection any code */
    entry = recent && is_of(recent, &call) ? recent : find(&call, hash_of(&call));
  if (entry) {
    recent = entry, known = &entry->options;
    entry->references++;
    PyObject* result = gradient_expected(&call) ? NULL : follow(&call, entry);
    release(entry);
    if (result || PyErr_Occurred()) return result;
  }
  PyObject* all = PyTuple_New(count);
  for (ptrdiff_t i = 0; all && i < count; i++) {
    Py_IncRef(arguments[i]);
    PyTuple_SetItem(all, i, arguments[i]);
  }
  PyObject* result = all ? PyObject_CallObject(slow, all) : NULL;
  if (all) Py_DecRef(all);
  return result;
}

/* add(arguments of call as a tuple, function): keep what the function answers under the call's key, if there can be one
 * and it isn't known: None, or (address of a Recipe, what owns that and all it points to, make_out, make_lse), with None
 * for a result that is given or not wanted. */
static PyObject* add(PyObject* self, PyObject* const* arguments, ptrdiff_t count) {
  (void)self, (void)count;
  PyObject* items[2 + MAX_TENSORS + MAX_ARGUMENTS];
  ptrdiff_t size = PyTuple_Size(arguments[0]);
  if (size > (ptrdiff_t)(sizeof items / sizeof *items)) return done();
  for (ptrdiff_t i = 0; i < size; i++) items[i] = PyTuple_GetItem(arguments[0], i);
  Call call;
  if (!read_call(&call, items, size)) return done();
  uint64_t hash = hash_of(&call);
  if (find(&call, hash)) return done();
  PyObject* recipe = PyObject_CallNoArgs(arguments[1]); /* may run other threads */
  if (!recipe || recipe == none) return recipe;
  const Recipe* content = PyLong_AsVoidPtr(PyTuple_GetItem(recipe, 0));
  Entry* entry = find(&call, hash) || content->argument_count > MAX_ARGUMENTS ? NULL : malloc(sizeof *entry + 8 * call.words);
  if (!entry) {
    Py_DecRef(recipe);
    return done();
  }
  *entry = (Entry){
      .next = buckets[hash % BUCKETS],
      .hash = hash,
      .references = 1,
      .words = call.words,
      .recipe = content,
      .owner = recipe,
      .site = items[0],
      .make_out = PyTuple_GetItem(recipe, 2),
      .make_lse = PyTuple_GetItem(recipe, 3),
  };
  memcpy(entry->key, call.key, 8 * call.words);
  PyObject** options = items + 2 + call.tensor_count;
  if (items + size - options <= MAX_OPTIONS) {
    entry->options.count = (int)(items + size - options);
    entry->options.words = call.words - call.option_word;
    entry->options.key = entry->key + call.option_word;
    for (int i = 0; i < entry->options.count; i++) Py_IncRef(entry->options.options[i] = options[i]);
  }
  Py_IncRef(entry->site);
  buckets[hash % BUCKETS] = entry;
  evict(ring_at);
  ring[ring_at] = entry;
  ring_at = (ring_at + 1) % MAX_ENTRIES;
  return done();
}

/* read(type, framework, capsule of its DLPackExchangeAPI or None, is_grad_enabled or None, dtype of kind "V" or None):
 * how tensors of a type are read from now on. */
static PyObject* read_(PyObject* self, PyObject* const* arguments, ptrdiff_t count) {
  (void)self, (void)count;
  const DLPackExchangeAPI* api = NULL;
  if (arguments[2] != none) {
    api = PyCapsule_GetPointer(arguments[2], "dlpack_exchange_api");
    if (!api) return NULL;
    if (api->header.version.major != 1 || !api->dltensor_from_py_object_no_sync) return done();
  }
  int at = 0;
  while (at < reader_count && readers[at].type != arguments[0]) at++;
  if (at == MAX_READERS) return done();
  if (at == reader_count) reader_count++;
  for (int i = 0; i < 5; i++) Py_IncRef(arguments[i]); /* for ever: types of frameworks, which stay loaded */
  readers[at] = (Reader){
      .type = arguments[0],
      .framework = (int)PyLong_AsLongLong(arguments[1]),
      .api = api,
      .is_grad_enabled = arguments[3] == none ? NULL : arguments[3],
      .void_dtype = arguments[4],
  };
  return done();
}

/* forget(): drop all recipes; says how many there were. */
static PyObject* forget(PyObject* self, PyObject* const* arguments, ptrdiff_t count) {
  (void)self, (void)arguments, (void)count;
  int dropped = 0;
  for (int i = 0; i < MAX_ENTRIES; i++)
    if (ring[i]) {
      dropped++;
      evict(i);
    }
  return PyLong_FromLongLong(dropped);
}

static PyMethodDef methods[] = {
    {"call", call_, METH_FASTCALL, NULL},
    {"add", add, METH_FASTCALL, NULL},
    {"read", read_, METH_FASTCALL, NULL},
    {"forget", forget, METH_FASTCALL, NULL},
};

/* The functions above as a tuple, given the slow path and three addresses in libtvm_ffi; NULL, with an error, for
 * another ABI. */
EXPORT PyObject* tvm_flash_call_functions(int abi, PyObject* slow_path, void* function_call, void* env_get_stream,
                                          void* env_set_stream) {
  if (abi != ABI) {
    PyErr_SetString(PyExc_TypeError, "the fast path is of another version");
    return NULL;
  }
  call_function = (int (*)(TVMFFIObjectHandle, TVMFFIAny*, int32_t, TVMFFIAny*))function_call;
  get_stream = (void* (*)(int32_t, int32_t))env_get_stream;
  set_stream = (int (*)(int32_t, int32_t, void*, void**))env_set_stream;
  slow = slow_path;
  Py_IncRef(slow);
  name_array_struct = PyUnicode_InternFromString("__array_struct__");
  name_dtype = PyUnicode_InternFromString("dtype");
  name_requires_grad = PyUnicode_InternFromString("requires_grad");
  const int size = sizeof methods / sizeof *methods;
  PyObject* functions = PyTuple_New(size);
  for (int i = 0; functions && i < size; i++) PyTuple_SetItem(functions, i, PyCFunction_NewEx(&methods[i], NULL, NULL));
  return functions;
}
