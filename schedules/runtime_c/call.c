/* The fast path of a repeated call, from Python's arguments to the kernel.
 *
 * Whatever the checks and the choice of a kernel depend on becomes a key of 64-bit words: shapes, strides, dtypes and
 * devices, the alignment of the pointers, and the options.  The slow path (tvm_flash/call/dispatch.py) does all the checks and
 * then leaves a recipe under the call's key; a call that finds one has passed them.  What depends on pointers and modes
 * is looked at here each time: alignment (in the key), overlap with `out`, gradients, and whether somebody watches.  Whatever
 * isn't simple, and whatever fails, goes to the slow path, which takes it from the start and says what is wrong.
 *
 * All state belongs to the GIL, which is released while a kernel runs.
 */
#include <stdlib.h>
#include <tvm/ffi/c_api.h>

#include "call_key.h"

#define EXPORT __attribute__((visibility("default")))
#define ABI 5 /* of the functions below and of Recipe; tvm_flash/call/fast.py asks for the one that it knows */
#define MAX_ARGUMENTS 32 /* of a launch */
#define WORKSPACE_ALIGNMENT 128 /* as in tvm_flash/call/memory.py */
#define MAX_MADE 12      /* tensors that a call makes: results, and memory for workspaces */
#define MAX_SLOTS 32     /* pointers of a call: those of its tensors, of what it makes, and of workspaces */
#define MAX_ENTRIES 1024 /* the oldest goes first; one takes about 2 KB */
#define BUCKETS 2048

static PyObject* done(void) {
  Py_IncRef(none);
  return none;
}

/* ---------------------------------------------------------------- recipes */

/* What the slow path leaves; the same structures are in tvm_flash/call/fast.py.
 *
 * Pointers are numbered by slots: first the call's tensors in their order, then whatever else there is. */
typedef struct {
  void* function; /* of tvm-ffi */
  const TVMFFIAny* arguments;
  const DLTensor* tensors; /* those of the arguments, in their order */
  const int32_t* slots;    /* of their pointers */
  int32_t argument_count, tensor_count;
} Launch;

/* A workspace, in memory that was made for all of them. */
typedef struct {
  int32_t slot, memory; /* the slots of its pointer and of the memory */
  int64_t offset;       /* in bytes, from the first address in the memory that is a multiple of WORKSPACE_ALIGNMENT */
} Workspace;

typedef struct {
  const Launch* launches;
  const Workspace* workspaces;
  int32_t launch_count, workspace_count, slot_count;
  int32_t device_type, device_index;
  int32_t (*current_device)(int32_t*); /* of the driver; NULL on the processor */
  int32_t made_count, returned_count;  /* tensors that are made if they aren't given; the first ones are returned */
  int32_t made[MAX_MADE];              /* the slots of their pointers */
  int64_t low[MAX_TENSORS], high[MAX_TENSORS]; /* bytes that each of the call's tensors touches, from its pointer */
} Recipe;

typedef struct Entry {
  struct Entry* next; /* of the same bucket */
  uint64_t hash;
  int references, words;
  const Recipe* recipe;
  PyObject *owner, *signature; /* owner of the recipe, of what it points to, and of what makes tensors */
  PyObject* make[MAX_MADE];    /* None, or tuples as make() takes them */
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
  Py_DecRef(entry->signature);
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
  for (int i = 0; i < call->tensor_count; i++)
    if (call->tensors[i] != none && is_true(PyObject_GetAttr(call->tensors[i], name_requires_grad))) return 1;
  return 0;
}

/* Whether somebody may have to see the call as an operator.  What the dispatch keys tell is in the call's key. */
static int is_watched(const Call* call) {
  if (!call->reader->watched || call->signature->below) return 0;
  if (watch.observed() || watch.function_mode()) return 1;
  PyObject* level = PyDict_GetItemWithError(watch.forward_ad, name_level);
  return !level || PyLong_AsLongLong(level) >= 0; /* -1: no tensor has a tangent */
}

/* Whether the bytes of a result may be some of another tensor's; the slow path looks closer. */
static int may_overlap(const Call* call, const Recipe* recipe) {
  for (int o = call->tensor_count - call->signature->outputs; o < call->tensor_count; o++) {
    uint64_t out_low = call->pointers[o] + recipe->low[o], out_high = call->pointers[o] + recipe->high[o];
    for (int i = 0; i < o; i++)
      if (out_low < call->pointers[i] + recipe->high[i] && call->pointers[i] + recipe->low[i] < out_high) return 1;
  }
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
  uint64_t words[TENSOR_WORDS];
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

static int run_launch(const Launch* launch, const uint64_t* pointers) {
  DLTensor tensors[MAX_ARGUMENTS];
  TVMFFIAny arguments[MAX_ARGUMENTS], result = {0};
  memcpy(tensors, launch->tensors, launch->tensor_count * sizeof *tensors);
  memcpy(arguments, launch->arguments, launch->argument_count * sizeof *arguments);
  for (int i = 0, at = 0; i < launch->argument_count; i++)
    if (arguments[i].type_index == kTVMFFIDLTensorPtr) {
      tensors[at].data = (void*)pointers[launch->slots[at]];
      arguments[i].v_ptr = &tensors[at++];
    }
  return call_function(launch->function, arguments, launch->argument_count, &result);
}

/* Run the launches in order, without the GIL. */
static int run(const Recipe* recipe, const uint64_t* pointers, void* stream) {
  void* thread = PyEval_SaveThread();
  int device = recipe->device_type, index = recipe->device_index, status = 0;
  void* before = device == kDLCPU ? NULL : get_stream(device, index);
  if (before != stream) set_stream(device, index, stream, NULL);
  for (int i = 0; i < recipe->launch_count && !status; i++) status = run_launch(&recipe->launches[i], pointers);
  if (before != stream) set_stream(device, index, before, NULL);
  PyEval_RestoreThread(thread);
  return status;
}

/* The results as the caller gets them, from tensors that are given away; NULL with an error if there is no memory. */
static PyObject* returned(PyObject** tensors, int count) {
  if (count == 1) return tensors[0];
  PyObject* all = PyTuple_New(count);
  for (int i = 0; i < count; i++)
    if (all)
      PyTuple_SetItem(all, i, tensors[i]);
    else
      Py_DecRef(tensors[i]);
  return all;
}

/* Do as a recipe says.  NULL with an error set if there is no memory, and with none if the slow path must do it. */
static PyObject* follow(const Call* call, const Entry* entry) {
  const Recipe* recipe = entry->recipe;
  void* stream = NULL;
  if (may_overlap(call, recipe)) return NULL;
  if (recipe->device_type != kDLCPU &&
      call->reader->api->current_work_stream(recipe->device_type, recipe->device_index, &stream)) {
    PyErr_Clear();
    return NULL;
  }
  /* Of a single row, a kernel on the processor writes the log-sum-exp even if nobody asked for it; on a GPU it is made
   * then, and else an address must be there that nothing is written to. */
  float unread;
  uint64_t pointers[MAX_SLOTS], nowhere = recipe->device_type == kDLCPU ? (uint64_t)&unread : call->pointers[0];
  memcpy(pointers, call->pointers, call->tensor_count * sizeof *pointers);
  for (int i = call->tensor_count; i < recipe->slot_count; i++) pointers[i] = nowhere;
  PyObject* tensors[MAX_MADE];
  int made = 0;
  for (; made < recipe->made_count; made++) {
    int slot = recipe->made[made];
    tensors[made] = NULL;
    if (slot < call->tensor_count && call->tensors[slot] != none)
      Py_IncRef(tensors[made] = call->tensors[slot]);
    else if (entry->make[made] != none && !(tensors[made] = make(recipe, entry->make[made], &pointers[slot])))
      break;
  }
  int done = made == recipe->made_count;
  if (done) {
    for (int i = 0; i < recipe->workspace_count; i++) {
      const Workspace* workspace = &recipe->workspaces[i];
      pointers[workspace->slot] = (pointers[workspace->memory] + (WORKSPACE_ALIGNMENT - 1)) / WORKSPACE_ALIGNMENT * WORKSPACE_ALIGNMENT +
                                  (uint64_t)workspace->offset;
    }
    done = !run(recipe, pointers, stream); /* if it fails, the slow path runs it again and reports */
  }
  for (int i = done ? recipe->returned_count : 0; i < made; i++)
    if (tensors[i]) Py_DecRef(tensors[i]);
  return done ? returned(tensors, recipe->returned_count) : NULL;
}

/* ---------------------------------------------------------------- what Python calls */

static PyObject* slow;

static const char* const CAPSULE = "tvm_flash.signature";

/* What bind() made: call(tensors …, options …) is what slow(signature, tensors …, options …) would answer. */
static PyObject* call_(PyObject* self, PyObject* const* arguments, ptrdiff_t count) {
  const Signature* signature = PyCapsule_GetPointer(self, CAPSULE);
  Call call;
  Entry* entry = NULL;
  if (read_call(&call, signature, arguments, count)) /* may run other threads, and garbage collection any code */
    entry = recent && is_of(recent, &call) ? recent : find(&call, hash_of(&call));
  if (entry) {
    recent = entry, known = &entry->options;
    entry->references++;
    PyObject* result = is_watched(&call) || gradient_expected(&call) ? NULL : follow(&call, entry);
    release(entry);
    if (result || PyErr_Occurred()) return result;
  }
  PyObject* all = PyTuple_New(1 + count);
  if (all) {
    Py_IncRef(signature->signature);
    PyTuple_SetItem(all, 0, signature->signature);
  }
  for (ptrdiff_t i = 0; all && i < count; i++) {
    Py_IncRef(arguments[i]);
    PyTuple_SetItem(all, 1 + i, arguments[i]);
  }
  PyObject* result = all ? PyObject_CallObject(slow, all) : NULL;
  if (all) Py_DecRef(all);
  return result;
}

static void unbind(PyObject* capsule) {
  Signature* signature = PyCapsule_GetPointer(capsule, CAPSULE);
  Py_DecRef(signature->signature);
  free(signature);
}

static PyMethodDef call_method = {"call", call_, METH_FASTCALL, NULL};

/* bind(signature, tensors, inputs, outputs, below): the function that answers calls of a signature, sooner. */
static PyObject* bind(PyObject* self, PyObject* const* arguments, ptrdiff_t count) {
  (void)self, (void)count;
  Signature* signature = malloc(sizeof *signature);
  if (!signature) return PyErr_NoMemory();
  *signature = (Signature){
      .signature = arguments[0],
      .tensors = (int)PyLong_AsLongLong(arguments[1]),
      .inputs = (int)PyLong_AsLongLong(arguments[2]),
      .outputs = (int)PyLong_AsLongLong(arguments[3]),
      .below = arguments[4] == &_Py_TrueStruct,
  };
  if (signature->tensors > MAX_TENSORS) { /* too many for a key: every call goes the slow way */
    free(signature);
    return done();
  }
  PyObject* capsule = PyCapsule_New(signature, CAPSULE, unbind);
  if (!capsule) {
    free(signature);
    return NULL;
  }
  Py_IncRef(signature->signature);
  PyObject* function = PyCFunction_NewEx(&call_method, capsule, NULL);
  Py_DecRef(capsule);
  return function;
}

/* add(function of bind, its arguments as a tuple, function): keep what the last function answers under the call's key, if
 * there can be one and it isn't known: None, or (address of a Recipe, what owns that and all it points to, a tuple with
 * what makes each tensor, or None if it is given or not wanted). */
static PyObject* add(PyObject* self, PyObject* const* arguments, ptrdiff_t count) {
  (void)self, (void)count;
  PyObject* items[MAX_TENSORS + MAX_ARGUMENTS];
  PyObject* capsule = PyCFunction_GetSelf(arguments[0]);
  const Signature* signature = capsule ? PyCapsule_GetPointer(capsule, CAPSULE) : NULL;
  if (!signature) return NULL;
  ptrdiff_t size = PyTuple_Size(arguments[1]);
  if (size > (ptrdiff_t)(sizeof items / sizeof *items)) return done();
  for (ptrdiff_t i = 0; i < size; i++) items[i] = PyTuple_GetItem(arguments[1], i);
  Call call;
  if (!read_call(&call, signature, items, size)) return done();
  uint64_t hash = hash_of(&call);
  if (find(&call, hash)) return done();
  PyObject* recipe = PyObject_CallNoArgs(arguments[2]); /* may run other threads */
  if (!recipe || recipe == none) return recipe;
  Entry* entry = find(&call, hash) ? NULL : malloc(sizeof *entry + 8 * call.words);
  if (!entry) {
    Py_DecRef(recipe);
    return done();
  }
  *entry = (Entry){
      .next = buckets[hash % BUCKETS],
      .hash = hash,
      .references = 1,
      .words = call.words,
      .recipe = PyLong_AsVoidPtr(PyTuple_GetItem(recipe, 0)),
      .owner = recipe,
      .signature = signature->signature,
  };
  for (int i = 0; i < entry->recipe->made_count; i++) entry->make[i] = PyTuple_GetItem(PyTuple_GetItem(recipe, 2), i);
  memcpy(entry->key, call.key, 8 * call.words);
  PyObject** options = items + call.tensor_count;
  if (items + size - options <= MAX_OPTIONS) {
    entry->options.count = (int)(items + size - options);
    entry->options.words = call.words - call.option_word;
    entry->options.key = entry->key + call.option_word;
    for (int i = 0; i < entry->options.count; i++) Py_IncRef(entry->options.options[i] = options[i]);
  }
  Py_IncRef(entry->signature);
  buckets[hash % BUCKETS] = entry;
  evict(ring_at);
  ring[ring_at] = entry;
  ring_at = (ring_at + 1) % MAX_ENTRIES;
  return done();
}

/* read(type, framework, capsule of its DLPackExchangeAPI or None, is_grad_enabled or None, dtype of kind "V" or None,
 * the fields of Watch as a tuple or None): how tensors of a type are read from now on. */
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
  for (int i = 0; i < 6; i++) Py_IncRef(arguments[i]); /* for ever: types of frameworks, which stay loaded */
  readers[at] = (Reader){
      .type = arguments[0],
      .framework = (int)PyLong_AsLongLong(arguments[1]),
      .api = api,
      .is_grad_enabled = arguments[3] == none ? NULL : arguments[3],
      .void_dtype = arguments[4],
      .watched = arguments[5] != none,
  };
  if (arguments[5] != none) {
    void* fields[6];
    for (int i = 0; i < 6; i++) fields[i] = PyLong_AsVoidPtr(PyTuple_GetItem(arguments[5], i));
    watch = (Watch){
        .impl = (ptrdiff_t)fields[0],
        .keys = (ptrdiff_t)fields[1],
        .symbol = (void* (*)(void*, const char*))fields[2],
        .library = fields[3],
        .observed = (_Bool(*)(void))fields[4],
        .function_mode = (_Bool(*)(void))fields[5],
        .thread_keys = PyUnicode_AsUTF8AndSize(PyTuple_GetItem(arguments[5], 6), NULL),
        .forward_ad = PyTuple_GetItem(arguments[5], 7),
    };
  }
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
    {"bind", bind, METH_FASTCALL, NULL},
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
  name_level = PyUnicode_InternFromString("_current_level");
  name_array_struct = PyUnicode_InternFromString("__array_struct__");
  name_dtype = PyUnicode_InternFromString("dtype");
  name_requires_grad = PyUnicode_InternFromString("requires_grad");
  const int size = sizeof methods / sizeof *methods;
  PyObject* functions = PyTuple_New(size);
  for (int i = 0; functions && i < size; i++) PyTuple_SetItem(functions, i, PyCFunction_NewEx(&methods[i], NULL, NULL));
  return functions;
}
