// The Python module aml_kernels._C. Importing it registers the kernels; what it offers itself is about the build.
#include <Python.h>

#include "cpu/kernels.h"

static PyObject* instruction_set(PyObject*, PyObject*) {
  return PyUnicode_FromString(aml::cpu::instruction_set());
}

// As setup.py gave them to nvcc, separated by spaces.
#ifndef AML_CUDA_ARCHITECTURES
#define AML_CUDA_ARCHITECTURES ""
#endif

static PyObject* cuda_architectures(PyObject*, PyObject*) {
  PyObject* names = PyUnicode_FromString(AML_CUDA_ARCHITECTURES);
  PyObject* list = names ? PyUnicode_Split(names, nullptr, -1) : nullptr;
  PyObject* tuple = list ? PyList_AsTuple(list) : nullptr;
  Py_XDECREF(names);
  Py_XDECREF(list);
  return tuple;
}

static PyMethodDef methods[] = {
    {"instruction_set", instruction_set, METH_NOARGS, "Name of the instruction set that the CPU kernels run with."},
    {"cuda_architectures", cuda_architectures, METH_NOARGS,
     "GPUs that the CUDA kernels were built for, such as ('8.0', '10.0+PTX'); empty if the build has none."},
    {nullptr, nullptr, 0, nullptr},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "aml_kernels._C", "Kernels of aml_kernels.", -1, methods, nullptr, nullptr, nullptr, nullptr,
};

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
