/* The part of Python's stable ABI (PEP 384, Python 3.10) that call.c uses, so that it compiles without Python's headers
 * and one library serves every CPython from 3.10 on.  Not for free-threaded builds, whose objects start differently.
 */
#pragma once
#include <stddef.h>

typedef struct {
  ptrdiff_t reference_count;
  struct PyTypeObject* type;
} PyObject;

typedef struct PyTypeObject PyTypeObject;
typedef PyObject* (*FastFunction)(PyObject* self, PyObject* const* arguments, ptrdiff_t count);

typedef struct {
  const char* name;
  FastFunction function;
  int flags;
  const char* doc;
} PyMethodDef;

enum { METH_FASTCALL = 0x80 };

extern PyObject _Py_NoneStruct, _Py_TrueStruct, _Py_FalseStruct; /* None; True and False are ints of their own */
extern PyObject PyLong_Type, PyFloat_Type, PyTuple_Type, PyUnicode_Type;
extern PyObject* PyExc_TypeError;

void Py_IncRef(PyObject*);
void Py_DecRef(PyObject*);
PyObject* PyCFunction_NewEx(PyMethodDef*, PyObject* self, PyObject* module);
PyObject* PyCFunction_GetSelf(PyObject* function); /* borrowed */
PyObject* PyObject_CallNoArgs(PyObject*);
PyObject* PyObject_CallObject(PyObject*, PyObject* tuple);
PyObject* PyObject_GetAttr(PyObject*, PyObject* name);
PyObject* PyUnicode_InternFromString(const char*);
const char* PyUnicode_AsUTF8AndSize(PyObject*, ptrdiff_t* size);
long long PyLong_AsLongLong(PyObject*);
PyObject* PyLong_FromLongLong(long long);
void* PyLong_AsVoidPtr(PyObject*);
double PyFloat_AsDouble(PyObject*);
PyObject* PyTuple_New(ptrdiff_t size);
ptrdiff_t PyTuple_Size(PyObject*);
PyObject* PyTuple_GetItem(PyObject*, ptrdiff_t);
int PyTuple_SetItem(PyObject*, ptrdiff_t, PyObject* stolen);
int PyType_IsSubtype(PyTypeObject*, PyTypeObject*);
PyObject* PyCapsule_New(void*, const char* name, void (*destructor)(PyObject*));
void* PyCapsule_GetPointer(PyObject*, const char* name);
void PyErr_Clear(void);
PyObject* PyErr_NoMemory(void);
PyObject* PyErr_Occurred(void);
void PyErr_SetString(PyObject* type, const char* message);
void* PyEval_SaveThread(void);
void PyEval_RestoreThread(void*);
