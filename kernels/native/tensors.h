// What the module of Python asks PyTorch, and what a tensor answers.
#pragma once

#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <array>
#include <cstdint>
#include <initializer_list>

namespace {

// An attribute of tensors, without the search through their types for it.
struct Attribute {
  PyObject* descriptor;
  descrgetfunc get;
};

// What is asked of PyTorch, found once. It lives as long as the process.
struct Torch {
  PyObject *tensor, *parameter;
  PyObject *data_ptr, *is_contiguous, *is_neg;
  PyObject *get_num_threads, *len_dispatch_stack, *profiler_enabled, *increment_version;
  Attribute dtype, is_cpu, is_nested, shape;
  // In the order of LeapDtype.
  std::array<PyObject*, 3> dtypes;
} torch;

// A reference that is given back at the end of its scope; null where Python has raised.
class Reference {
 public:
  explicit Reference(PyObject* object) : object_(object) {}
  Reference(const Reference&) = delete;
  Reference& operator=(const Reference&) = delete;
  ~Reference() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }

 private:
  PyObject* object_;
};

PyObject* attribute(PyObject* tensor, const Attribute& of) {
  return of.get(of.descriptor, tensor, reinterpret_cast<PyObject*>(Py_TYPE(tensor)));
}

PyObject* called(PyObject* function, PyObject* argument = nullptr) {
  return PyObject_CallFunctionObjArgs(function, argument, nullptr);
}

// Where the elements of a tensor are; null where it has none or Python has raised.
void* address(PyObject* tensor) {
  const Reference found(called(torch.data_ptr, tensor));
  return found.get() == nullptr ? nullptr : PyLong_AsVoidPtr(found.get());
}

int32_t code_of(PyObject* dtype) {
  for (size_t code = 0; code < torch.dtypes.size(); ++code) {
    if (torch.dtypes[code] == dtype) return static_cast<int32_t>(code);
  }
  return -1;
}

// Follows dotted names from a module; null where Python has raised.
PyObject* found(const char* module, std::initializer_list<const char*> names) {
  // What was looked for before may have been missing.
  PyObject* object = PyErr_Occurred() == nullptr ? PyImport_ImportModule(module) : nullptr;
  for (const char* name : names) {
    const Reference owner(object);
    object = owner.get() == nullptr ? nullptr : PyObject_GetAttrString(owner.get(), name);
  }
  return object;
}

Attribute of_tensors(const char* name) {
  PyObject* descriptor = found("torch", {"Tensor", name});
  if (descriptor == nullptr) return {nullptr, nullptr};
  return {descriptor, reinterpret_cast<descrgetfunc>(PyType_GetSlot(Py_TYPE(descriptor), Py_tp_descr_get))};
}

// Returns 0, or -1 where Python has raised.
int find_torch(PyObject*) {
  torch = {
      found("torch", {"Tensor"}),
      found("torch", {"nn", "Parameter"}),
      found("torch", {"Tensor", "data_ptr"}),
      found("torch", {"Tensor", "is_contiguous"}),
      found("torch", {"Tensor", "is_neg"}),
      found("torch", {"get_num_threads"}),
      found("torch", {"_C", "_len_torch_dispatch_stack"}),
      found("torch", {"_C", "_autograd", "_profiler_enabled"}),
      found("torch", {"_C", "_increment_version"}),
      of_tensors("dtype"),
      of_tensors("is_cpu"),
      of_tensors("is_nested"),
      of_tensors("shape"),
      {found("torch", {"float32"}), found("torch", {"bfloat16"}), found("torch", {"float16"})},
  };
  return PyErr_Occurred() == nullptr ? 0 : -1;
}

// Whether the attribute, or what a call returned, is `expected`; false where Python has raised.
bool is(PyObject* found, PyObject* expected) {
  const Reference reference(found);
  return found == expected;
}

// The elements of a tensor: null where kernels cannot take them as they are, or Python has raised.
struct Elements {
  void* address;
  int32_t dtype;
};

// Takes memory of this process, in a dtype of the kernels. PyTorch has no address for tensors that wrap others, and null
// for those that hold nothing.
Elements elements_of(PyObject* tensor) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  if (type != torch.tensor && type != torch.parameter) return {nullptr, -1};
  const Reference dtype(attribute(tensor, torch.dtype));
  const int32_t code = code_of(dtype.get());
  const bool plain = code >= 0 && is(attribute(tensor, torch.is_cpu), Py_True) &&
                     is(called(torch.is_neg, tensor), Py_False);
  return {plain ? address(tensor) : nullptr, code};
}

// Whether no dispatch mode and no profiler wants to see the ops.
bool unobserved() {
  const Reference modes(called(torch.len_dispatch_stack));
  return modes.get() != nullptr && PyLong_AsLong(modes.get()) == 0 && is(called(torch.profiler_enabled), Py_False);
}

}  // namespace
