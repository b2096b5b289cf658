/* Python's arguments of a call, read into a key of 64-bit words: what the slow path's checks and choices depend on. */
#pragma once
#include <dlpack/dlpack.h>
#include <stdint.h>
#include <string.h>

#include "python_abi.h"

#define MAX_DIMS 4
#define TENSOR_WORDS (2 + 2 * MAX_DIMS)
#define MAX_TENSORS 16 /* of a call: an operator's inputs, parameters that are tensors, results that may be given */
#define MAX_WORDS 192
#define MOST_ALIGNMENT 16 /* as in tvm_flash/packs/manifest.py */
#define MAX_READERS 8
#define MAX_OPTIONS 16 /* that are known again */

static PyObject* const none = &_Py_NoneStruct;

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

/* Where PyTorch keeps what it decides by how a call of an operator is answered.  None of this is a stable interface:
 * tvm_flash/frameworks/torch_watch.py finds each of it by trial, and gives up the fast path where it can't. */
typedef struct {
  ptrdiff_t impl, keys;                /* in a tensor's object, of its implementation's address; in that, of its keys */
  void* (*symbol)(void*, const char*); /* dlsym */
  void* library;
  _Bool (*observed)(void);      /* whether a profiler or another observer listens */
  _Bool (*function_mode)(void); /* whether a TorchFunctionMode is on */
  const char* thread_keys;      /* name of the thread's own keys: two words */
  PyObject* forward_ad;         /* dictionary of the module that counts levels of forward-mode derivatives */
} Watch;

static Watch watch;
static PyObject* name_level;

/* The dispatch keys that a thread has switched on and off: a trace, a mode or a transform does. */
static const uint64_t* thread_keys(void) {
  static __thread const uint64_t* found;
  if (!found) found = watch.symbol(watch.library, watch.thread_keys);
  return found;
}

/* How tensors of one Python type are read. */
typedef struct {
  PyObject* type;
  int framework;                /* tensors of one call must be of one framework */
  const DLPackExchangeAPI* api; /* NULL: through __array_struct__ */
  PyObject* is_grad_enabled;    /* NULL: the framework has no gradients that we could miss */
  PyObject* void_dtype;         /* the one dtype of kind "V" that is known: bfloat16 */
  int watched;                  /* whether tensors have dispatch keys, and others may listen: see Watch */
} Reader;

static Reader readers[MAX_READERS];
static int reader_count;
static PyObject *name_array_struct, *name_dtype, *name_requires_grad;

static const Reader* reader_of(PyObject* tensor) {
  for (int i = 0; i < reader_count; i++)
    if ((PyObject*)tensor->type == readers[i].type) return &readers[i];
  return NULL;
}

/* A tensor in words: one of kind, dtype and device, then its shape and strides, and its dispatch keys, if it has some.
 * Gives the number of words; 0 for what can't be read, with no error set. */
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
      for (int i = 0; i < array->nd; i++) {
        words[1 + 2 * i] = (uint64_t)array->shape[i];
        words[2 + 2 * i] = (uint64_t)array->strides[i];
      }
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
  for (int i = 0; i < x.ndim; i++) {
    words[1 + 2 * i] = (uint64_t)x.shape[i];
    words[2 + 2 * i] = (uint64_t)x.strides[i];
  }
  *pointer = (uint64_t)x.data + x.byte_offset;
  int count = 1 + 2 * x.ndim;
  if (reader->watched) { /* whatever isn't just memory (negated, batched, functional, …) has keys of its own */
    const char* impl = *(const char* const*)((const char*)tensor + watch.impl);
    words[count++] = *(const uint64_t*)(impl + watch.keys);
  }
  return count;
}

/* Whether the tensor that words of a DLTensor tell of is on a device. */
static int is_on(const uint64_t* words, int32_t type, int32_t index) {
  return words[0] >> 40 == ((uint64_t)(uint8_t)type | (uint64_t)(uint16_t)index << 8);
}

/* ---------------------------------------------------------------- keys */

/* What tensors a call has, in this order: `inputs` that must be given, parameters and `outputs` that may be None. */
typedef struct {
  PyObject* signature; /* stands for what the caller has decided once and for all; never changes */
  int tensors, inputs, outputs;
  int below; /* whether calls come from an operator, which whoever watches has seen */
} Signature;

/* A call, read: its key, and the pointers of its tensors (0 for what isn't given). */
typedef struct {
  const Signature* signature;
  const Reader* reader;
  PyObject* const* tensors;
  int tensor_count, words, option_word; /* the last: where those of the options begin */
  uint64_t pointers[MAX_TENSORS];
  uint64_t key[MAX_WORDS + TENSOR_WORDS];
} Call;

/* Options of an earlier call, and the words of its key that they gave: nothing that can be an option ever changes. */
typedef struct {
  int count, words;
  uint64_t* key;
  PyObject* options[MAX_OPTIONS];
} Options;

static const Options* known; /* of the last call that was found, while it is kept; NULL if there is none */

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

static int append_options(Call* call, PyObject* const* options, ptrdiff_t count) {
  if (known && known->count == count && call->words + known->words <= MAX_WORDS &&
      !memcmp(known->options, options, count * sizeof *options)) {
    memcpy(call->key + call->words, known->key, 8 * known->words);
    call->words += known->words;
    return 1;
  }
  for (ptrdiff_t i = 0; i < count; i++)
    if (!append_option(call, options[i])) return 0;
  return 1;
}

/* Read the arguments (tensors …, options …) of a call with a signature; false if they are none for the fast path. */
static int read_call(Call* call, const Signature* signature, PyObject* const* arguments, ptrdiff_t count) {
  const int tensors = signature->tensors, first_output = tensors - signature->outputs;
  if (count < tensors) return 0;
  call->signature = signature;
  call->tensors = arguments;
  call->tensor_count = tensors;
  call->reader = reader_of(call->tensors[0]);
  call->words = 2;
  if (!call->reader) return 0;
  uint64_t bits = MOST_ALIGNMENT;
  for (int i = 0; i < tensors; i++) {
    PyObject* x = call->tensors[i];
    call->pointers[i] = 0;
    if (x == none && i >= signature->inputs) {
      call->key[call->words++] = UINT64_MAX;
    } else {
      const Reader* reader = x->type == call->tensors[0]->type ? call->reader : reader_of(x);
      if (!reader || reader->framework != call->reader->framework || call->words > MAX_WORDS) return 0;
      int words = read_tensor(reader, x, call->key + call->words, &call->pointers[i]);
      if (!words || (i < signature->inputs && !call->pointers[i])) return 0; /* memory that was given back: no address */
      call->words += words;
    }
    if (i < signature->inputs || i >= first_output) bits |= call->pointers[i]; /* parameters may lie anywhere */
  }
  if (call->reader->watched) {
    const uint64_t* keys = thread_keys();
    if (!keys || call->words + 2 > MAX_WORDS) return 0;
    call->key[call->words++] = keys[0];
    call->key[call->words++] = keys[1];
  }
  call->option_word = call->words;
  if (!append_options(call, arguments + tensors, count - tensors)) return 0;
  call->key[0] = (uint64_t)signature->signature;
  call->key[1] = (uint64_t)call->reader->framework << 32 | (bits & -bits);
  return 1;
}

static uint64_t hash_of(const Call* call) {
  uint64_t odd = 0x9E3779B97F4A7C15u, hash[2] = {(uint64_t)call->words, odd}; /* two chains, for speed */
  for (int i = 0; i + 1 < call->words; i += 2)
    for (int j = 0; j < 2; j++) {
      hash[j] = (hash[j] ^ call->key[i + j]) * odd;
      hash[j] ^= hash[j] >> 29;
    }
  uint64_t all = (hash[0] + 3 * hash[1] + call->key[call->words - 1]) * odd;
  return all ^ all >> 31;
}

