// The functions of leap_native.h as a module of Python, on tensors of PyTorch, of which it knows what Python says: one
// binary serves any torch version and, by the stable interface, any Python from 3.10 on. Also the questions that come
// before every call, which take several times as long to ask in Python.

#include "tensors.h"

#include <tuple>
#include <type_traits>
#include <utility>

#include "leap_native.h"

namespace {

// ---- calls -----------------------------------------------------------------------------------------------------

// An argument as the C interface takes it: of a tensor, or a number that is one, the address; of a dtype its code.
template <class T>
T converted(PyObject* argument) {
  if constexpr (std::is_pointer_v<T>) {
    if (argument == Py_None) return nullptr;
    return static_cast<T>(PyLong_Check(argument) ? PyLong_AsVoidPtr(argument) : address(argument));
  } else if constexpr (std::is_same_v<T, float>) {
    return static_cast<float>(PyFloat_AsDouble(argument));
  } else if constexpr (std::is_same_v<T, uint64_t>) {
    return PyLong_AsUnsignedLongLong(argument);
  } else if constexpr (std::is_same_v<T, int64_t>) {
    return PyLong_AsLongLong(argument);
  } else {
    static_assert(std::is_same_v<T, int32_t>);
    return PyLong_Check(argument) ? static_cast<int32_t>(PyLong_AsLong(argument)) : code_of(argument);
  }
}

PyObject* failed(const char* name, int32_t status) {
  const char* reason = status == -1 ? "unknown dtype" : status == -2 ? "out of memory" : "unknown error";
  return PyErr_Format(PyExc_RuntimeError, "%s failed: %s.", name, reason);
}

template <class... A, size_t... I>
PyObject* invoke(const char* name, int32_t (*function)(A...), PyObject* const* arguments, Py_ssize_t count,
                 std::index_sequence<I...>) {
  // The number of threads comes last, and is PyTorch's: torch.set_num_threads holds for both.
  if (count != static_cast<Py_ssize_t>(sizeof...(I)) - 1) {
    return PyErr_Format(PyExc_TypeError, "%s takes %d arguments, not %d.", name, static_cast<int>(sizeof...(I)) - 1,
                        static_cast<int>(count));
  }
  const Reference threads(called(torch.get_num_threads));
  if (threads.get() == nullptr) return nullptr;
  const std::tuple<A...> values{converted<A>(I + 1 < sizeof...(I) ? arguments[I] : threads.get())...};
  if (PyErr_Occurred() != nullptr) return nullptr;
  int32_t status;
  Py_BEGIN_ALLOW_THREADS
  status = std::apply(function, values);
  Py_END_ALLOW_THREADS
  if (status != 0) return failed(name, status);
  Py_RETURN_NONE;
}

template <class F>
struct Arity;
template <class... A>
struct Arity<int32_t (*)(A...)> {
  using Indices = std::index_sequence_for<A...>;
};

#define LEAP_ENTRY(name)                                                                                \
  {#name,                                                                                               \
   reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(                                          \
       +[](PyObject*, PyObject* const* arguments, Py_ssize_t count) -> PyObject* {                      \
         return invoke(#name, &name, arguments, count, typename Arity<decltype(&name)>::Indices{});     \
       })),                                                                                             \
   METH_FASTCALL, nullptr}

// ---- questions -------------------------------------------------------------------------------------------------

// What raised while a question was asked is a no: the answer then comes from Python.
PyObject* no() {
  PyErr_Clear();
  Py_RETURN_FALSE;
}

// Whether an op has nothing to see to but tensors whose elements kernels can take, None and numbers.
PyObject* plain(PyObject*, PyObject* arguments) {
  if (!unobserved()) return no();
  const Py_ssize_t count = PyTuple_Size(arguments);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* argument = PyTuple_GetItem(arguments, i);
    if (argument == Py_None || PyLong_Check(argument) || PyFloat_Check(argument)) continue;
    // A nested tensor has elements, but no shape.
    if (elements_of(argument).address == nullptr || !is(attribute(argument, torch.is_nested), Py_False)) return no();
  }
  Py_RETURN_TRUE;
}

// ---- both at once ----------------------------------------------------------------------------------------------

// A tensor that is written and one that is read beside it, both contiguous and of one shape.
struct Pair {
  Elements written, read;
  int64_t count;
};

bool overlap(const Pair& pair) {
  const auto end = [&](const Elements& of) {
    return reinterpret_cast<uintptr_t>(of.address) + static_cast<uint64_t>(pair.count) * (of.dtype == 0 ? 4 : 2);
  };
  return reinterpret_cast<uintptr_t>(pair.written.address) < end(pair.read) &&
         reinterpret_cast<uintptr_t>(pair.read.address) < end(pair.written);
}

// Looks at the first two arguments; false where they are no such pair, or Python has raised, as it does where a tensor
// has no shape.
bool find_pair(PyObject* arguments, Pair& pair) {
  PyObject* written = PyTuple_GetItem(arguments, 0);
  PyObject* read = PyTuple_GetItem(arguments, 1);
  if (written == nullptr || read == nullptr || !unobserved()) return false;
  pair.written = elements_of(written);
  if (pair.written.address == nullptr) return false;
  pair.read = elements_of(read);
  if (pair.read.address == nullptr) return false;
  for (PyObject* tensor : {written, read}) {
    if (!is(called(torch.is_contiguous, tensor), Py_True)) return false;
  }
  const Reference shape(attribute(written, torch.shape)), other(attribute(read, torch.shape));
  if (shape.get() == nullptr || other.get() == nullptr) return false;
  if (PyObject_RichCompareBool(shape.get(), other.get(), Py_EQ) != 1) return false;
  pair.count = 1;
  const Py_ssize_t dimensions = PyTuple_Size(shape.get());
  for (Py_ssize_t i = 0; i < dimensions; ++i) pair.count *= PyLong_AsLongLong(PyTuple_GetItem(shape.get(), i));
  return PyErr_Occurred() == nullptr && !overlap(pair);
}

// Calls run(pair, threads), tells autograd of the change, and returns True; or False where the arguments are no pair.
template <class Run>
PyObject* on_pair(const char* name, PyObject* arguments, Run run) {
  Pair pair;
  if (!find_pair(arguments, pair)) return no();
  const Reference found(called(torch.get_num_threads));
  const auto threads = static_cast<int32_t>(PyLong_AsLong(found.get()));
  int32_t status;
  Py_BEGIN_ALLOW_THREADS
  status = run(pair, threads);
  Py_END_ALLOW_THREADS
  if (status != 0) return failed(name, status);
  const Reference changed(PyTuple_GetSlice(arguments, 0, 1));
  const Reference done(changed.get() == nullptr ? nullptr : called(torch.increment_version, changed.get()));
  return done.get() == nullptr ? nullptr : PyBool_FromLong(1);
}

PyObject* accumulate(PyObject*, PyObject* arguments) {
  return on_pair("leap_accumulate", arguments, [](const Pair& pair, int32_t threads) {
    return leap_accumulate(pair.written.address, pair.read.address, pair.count, pair.written.dtype, pair.read.dtype,
                           threads);
  });
}

PyObject* ema_update(PyObject*, PyObject* arguments) {
  PyObject* decay = PyTuple_GetItem(arguments, 2);
  const double kept = decay == nullptr ? -1.0 : PyFloat_AsDouble(decay);
  if (PyErr_Occurred() != nullptr) return no();
  return on_pair("leap_ema_update", arguments, [=](const Pair& pair, int32_t threads) {
    return leap_ema_update(pair.written.address, pair.read.address, static_cast<float>(1.0 - kept), pair.count,
                           pair.written.dtype, pair.read.dtype, threads);
  });
}

PyObject* abi(PyObject*, PyObject*) { return PyLong_FromLong(leap_abi()); }
PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(leap_isa()); }
PyObject* has_openmp(PyObject*, PyObject*) { return PyBool_FromLong(leap_has_openmp()); }

// ---- the module ------------------------------------------------------------------------------------------------

PyMethodDef methods[] = {
    {"abi", abi, METH_NOARGS, nullptr},
    {"isa", isa, METH_NOARGS, nullptr},
    {"has_openmp", has_openmp, METH_NOARGS, nullptr},
    {"plain", plain, METH_O, nullptr},
    {"accumulate", accumulate, METH_O, nullptr},
    {"ema_update", ema_update, METH_O, nullptr},
    LEAP_ENTRY(leap_connector),
    LEAP_ENTRY(leap_scale),
    LEAP_ENTRY(leap_distances),
    LEAP_ENTRY(leap_combine),
    LEAP_ENTRY(leap_euler_step),
    LEAP_ENTRY(leap_weighted_loss),
    LEAP_ENTRY(leap_stochastic_round),
    LEAP_ENTRY(leap_accumulate),
    LEAP_ENTRY(leap_ema_update),
    LEAP_ENTRY(leap_adamw_8bit_step),
    LEAP_ENTRY(leap_norm_rope),
    LEAP_ENTRY(leap_norm_rope_backward),
    LEAP_ENTRY(leap_group_norm_silu),
    LEAP_ENTRY(leap_group_norm_silu_backward),
    LEAP_ENTRY(leap_adaln),
    LEAP_ENTRY(leap_adaln_backward),
    LEAP_ENTRY(leap_gated_residual),
    LEAP_ENTRY(leap_gated_residual_backward),
    LEAP_ENTRY(leap_gelu_tanh),
    LEAP_ENTRY(leap_swiglu),
    LEAP_ENTRY(leap_swiglu_backward),
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef_Slot slots[] = {{Py_mod_exec, reinterpret_cast<void*>(find_torch)}, {0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "leap_native", nullptr, 0, methods, slots, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_leap_native() { return PyModuleDef_Init(&definition); }
