/* The fast path of a repeated call, from Python's arguments to the kernel.
 *
 * Whatever the checks and the choice of a kernel depend on becomes a key of 64-bit words: shapes, strides, dtypes and
 * devices, the alignment of the pointers, and the options.  The slow path (tvm_flash/call.py) does all the checks and
 * then leaves a recipe under the call's key; a call that finds one has passed them.  What depends on pointers and modes
 * is looked at here each time: alignment (in the key), overlap with `out`, and gradients.  Whatever isn't simple, and
 * whatever fails, goes to the slow path, which takes it from the start and says what is wrong.
 *
 * All state belongs to the GIL, which is released while a kernel runs.
 */
#include <dlpack/dlpack.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <tvm/ffi/c_api.h>

#include "python_abi.h"

#define EXPORT __attribute__((visibility("default")))
#define ABI 1 /* of the functions below and of Recipe; tvm_flash/fast.py asks for the one that it knows */
#define MAX_DIMS 4
#define MAX_TENSORS 12 /* of a call: q, k, v, per-head parameters, out */
#define MAX_ARGUMENTS 32
#define MAX_WORDS 192
#define MAX_ALIGNMENT 128 /* as in tvm_flash/memory.py */
#define MAX_READERS 8
#define MAX_ENTRIES 1024 /* the oldest goes first; one takes about 1.5 KB */
#define BUCKETS 2048

static PyObject* const none = &_Py_NoneStruct;

static PyObject* done(void) {
  Py_IncRef(none);
  return none;
}

/* ---------------------------------------------------------------- tensors */

/* The start of NumPy's array struct (__array_struct__), whose layout is frozen. */
typedef struct {
  int two, nd;
  char kind;
  int item_size, flags;
  intptr_t *shape, *strides;
  void* data;
} ArrayStruct;

enum { NATIVE_ORDER = 0x200, WRITABLE = 0x400 }; /* of ArrayStruct.flags */

/* How tensors of one Python type are read. */
typedef struct {
  PyObject* type;
  int framework;                /* tensors of one call must be of one framework */
  const DLPackExchangeAPI* api; /* NULL: through __array_struct__ */
  PyObject* is_grad_enabled;    /* NULL: the framework has no gradients that we could miss */
  PyObject* void_dtype;         /* the one dtype of kind "V" that is known: bfloat16 */
} Reader;

static Reader readers[MAX_READERS];
static int reader_count;
static PyObject *name_array_struct, *name_dtype, *name_requires_grad;

static const Reader* reader_of(PyObject* tensor) {
  for (int i = 0; i < reader_count; i++)
    if ((PyObject*)tensor->type == readers[i].type) return &readers[i];
  return NULL;
}

/* A tensor in words: one of kind, dtype and device, then its shape and strides.  Gives the number of words; 0 for what
 * can't be read, with no error set. */
static int read_array(const Reader* reader, PyObject* tensor, uint64_t* words, uint64_t* pointer) {
  PyObject* capsule = PyObject_GetAttr(tensor, name_array_struct);
  const ArrayStruct* array = capsule ? PyCapsule_GetPointer(capsule, NULL) : NULL;
  int count = 0;
  if (array && array->nd <= MAX_DIMS && array->flags & NATIVE_ORDER && array->item_size < 256) {
    int known = 1;
    if (array->kind == 'V') {
      PyObject* dtype = PyObject_GetAttr(tensor, name_dtype);
      known = dtype && dtype == reader->void_dtype;
      if (dtype) Py_DecRef(dtype);
    }
    if (known) {
      words[0] = (uint64_t)array->nd | (uint64_t)(uint8_t)array->kind << 8 | (uint64_t)array->item_size << 16 |
                 (uint64_t)(array->flags & WRITABLE) << 24;
      memcpy(words + 1, array->shape, 8 * array->nd);
      memcpy(words + 1 + array->nd, array->strides, 8 * array->nd);
      *pointer = (uint64_t)array->data;
      count = 1 + 2 * array->nd;
    }
  }
  if (capsule) Py_DecRef(capsule);
  if (!count) PyErr_Clear();
  return count;
}

static int read_tensor(const Reader* reader, PyObject* tensor, uint64_t* words, uint64_t* pointer) {
  if (!reader->api) return read_array(reader, tensor, words, pointer);
  DLTensor x;
  if (reader->api->dltensor_from_py_object_no_sync(tensor, &x)) {
    PyErr_Clear();
    return 0;
  }
  if (x.ndim > MAX_DIMS || !x.strides) return 0;
  words[0] = (uint64_t)x.ndim | (uint64_t)x.dtype.code << 8 | (uint64_t)x.dtype.bits << 16 | (uint64_t)x.dtype.lanes << 24 |
             (uint64_t)(uint8_t)x.device.device_type << 40 | (uint64_t)(uint16_t)x.device.device_id << 48;
  memcpy(words + 1, x.shape, 8 * x.ndim);
  memcpy(words + 1 + x.ndim, x.strides, 8 * x.ndim);
  *pointer = (uint64_t)x.data + x.byte_offset;
  return 1 + 2 * x.ndim;
}

/* ---------------------------------------------------------------- keys */

/* A call, read: its key, and its pointers in the order q, k, v, per-head parameters, out (0 for what isn't given). */
typedef struct {
  const Reader* reader;
  PyObject* const* tensors;
  int tensor_count, words;
  uint64_t pointers[MAX_TENSORS];
  uint64_t key[MAX_WORDS + 1 + 2 * MAX_DIMS];
} Call;

enum { NOTHING, FALSE_, TRUE_, INTEGER, REAL, TEXT, TUPLE };

/* Append an option to a key; false for one that no key can hold.  Only what is equal in type and value is equal in
 * words; a float of NumPy is the float that it is. */
static int append_option(Call* call, PyObject* x) {
  if (call->words + 2 > MAX_WORDS) return 0;
  uint64_t* word = call->key + call->words;
  PyObject* type = (PyObject*)x->type;
  if (x == none || x == &_Py_FalseStruct || x == &_Py_TrueStruct) {
    word[0] = x == none ? NOTHING : x == &_Py_TrueStruct ? TRUE_ : FALSE_;
    call->words += 1;
    return 1;
  }
  call->words += 2;
  if (type == &PyLong_Type) {
    long long value = PyLong_AsLongLong(x);
    word[0] = INTEGER;
    word[1] = (uint64_t)value;
    if (value != -1 || !PyErr_Occurred()) return 1;
    PyErr_Clear();
    return 0;
  }
  if (type == &PyUnicode_Type) {
    ptrdiff_t size;
    const char* text = PyUnicode_AsUTF8AndSize(x, &size);
    if (!text) PyErr_Clear();
    if (!text || size > 8) return 0;
    word[0] = TEXT | (uint64_t)size << 8;
    word[1] = 0;
    memcpy(word + 1, text, size);
    return 1;
  }
  if (type == &PyTuple_Type) {
    ptrdiff_t size = PyTuple_Size(x);
    word[0] = TUPLE;
    word[1] = size;
    for (ptrdiff_t i = 0; i < size; i++)
      if (!append_option(call, PyTuple_GetItem(x, i))) return 0;
    return 1;
  }
  if (PyType_IsSubtype(x->type, (PyTypeObject*)&PyFloat_Type)) {
    double value = PyFloat_AsDouble(x);
    word[0] = REAL;
    memcpy(word + 1, &value, 8);
    return 1;
  }
  return 0;
}

/* Read the arguments (site, number of tensors, tensors …, options …); false if they are none for the fast path.  A site
 * is an object that stands for what its caller has decided once and for all. */
static int read_call(Call* call, PyObject* const* arguments, ptrdiff_t count) {
  long long tensors = count > 1 ? PyLong_AsLongLong(arguments[1]) : 0;
  if (tensors < 4 || tensors > MAX_TENSORS || count < 2 + tensors) return 0;
  call->tensors = arguments + 2;
  call->tensor_count = (int)tensors;
  call->reader = reader_of(call->tensors[0]);
  call->words = 2;
  if (!call->reader) return 0;
  uint64_t bits = MAX_ALIGNMENT;
  for (int i = 0; i < tensors; i++) {
    PyObject* x = call->tensors[i];
    call->pointers[i] = 0;
    if (x == none && i > 2) {
      call->key[call->words++] = UINT64_MAX;
    } else {
      const Reader* reader = x->type == call->tensors[0]->type ? call->reader : reader_of(x);
      if (!reader || reader->framework != call->reader->framework || call->words > MAX_WORDS) return 0;
      int words = read_tensor(reader, x, call->key + call->words, &call->pointers[i]);
      if (!words) return 0;
      call->words += words;
    }
    if (i < 3 || i == tensors - 1) bits |= call->pointers[i]; /* per-head parameters may lie anywhere */
  }
  for (ptrdiff_t i = 2 + tensors; i < count; i++)
    if (!append_option(call, arguments[i])) return 0;
  call->key[0] = (uint64_t)arguments[0];
  call->key[1] = (uint64_t)call->reader->framework << 32 | (bits & -bits);
  return 1;
}

static uint64_t hash_of(const Call* call) {
  uint64_t hash = (uint64_t)call->words;
  for (int i = 0; i < call->words; i++) {
    hash = (hash ^ call->key[i]) * 0x9E3779B97F4A7C15u;
    hash ^= hash >> 29;
  }
  return hash;
}

/* ---------------------------------------------------------------- recipes */

/* What the slow path leaves; the same structure is in tvm_flash/fast.py. */
typedef struct {
  void* function; /* of tvm-ffi */
  const TVMFFIAny* arguments;
  const DLTensor* tensors; /* those of the arguments, in their order: q, k, v, out, lse, per-head parameters */
  int32_t argument_count, tensor_count;
  int32_t device_type, device_index;
  int32_t returns_lse;
  int32_t per_head[MAX_TENSORS];                /* which of the call's tensors each of the last ones is */
  int64_t low[MAX_TENSORS], high[MAX_TENSORS]; /* bytes that each of the call's tensors touches, from its pointer */
} Recipe;

typedef struct Entry {
  struct Entry* next; /* of the same bucket */
  uint64_t hash;
  int references, words;
  const Recipe* recipe;
  PyObject *owner, *site; /* owner of the recipe, of what it points to, and of the two functions */
  PyObject *make_out, *make_lse;
  uint64_t key[];
} Entry;

static Entry* buckets[BUCKETS];
static Entry* ring[MAX_ENTRIES]; /* in the order of their arrival */
static int ring_at;

/* Of libtvm_ffi. */
static int (*call_function)(TVMFFIObjectHandle, TVMFFIAny*, int32_t, TVMFFIAny*);
static void* (*get_stream)(int32_t, int32_t);
static int (*set_stream)(int32_t, int32_t, void*, void**);

static Entry* find(const Call* call, uint64_t hash) {
  Entry* entry = buckets[hash % BUCKETS];
  while (entry && !(entry->hash == hash && entry->words == call->words && !memcmp(entry->key, call->key, 8 * call->words)))
    entry = entry->next;
  return entry;
}

static void release(Entry* entry) {
  if (--entry->references) return;
  Py_DecRef(entry->site);
  Py_DecRef(entry->owner);
  free(entry);
}

static void evict(int at) {
  Entry* entry = ring[at];
  if (!entry) return;
  ring[at] = NULL;
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

/* A new tensor and its address. */
static PyObject* make(PyObject* function, uint64_t* pointer) {
  uint64_t words[1 + 2 * MAX_DIMS];
  PyObject* tensor = PyObject_CallNoArgs(function);
  if (!tensor) return NULL;
  const Reader* reader = reader_of(tensor);
  if (reader && read_tensor(reader, tensor, words, pointer)) return tensor;
  Py_DecRef(tensor);
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
  else if (!(out = make(entry->make_out, &pointers[3])))
    return NULL;
  pointers[4] = pointers[3]; /* a kernel that isn't asked for lse needs an address, and doesn't use it */
  if (entry->make_lse != none && !(lse = make(entry->make_lse, &pointers[4]))) {
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
  Entry* entry = read_call(&call, arguments, count) ? find(&call, hash_of(&call)) : NULL;
  if (entry && !gradient_expected(&call)) {
    entry->references++;
    PyObject* result = follow(&call, entry);
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
