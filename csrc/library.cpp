// The Python module aml_kernels._C. Importing it registers the kernels; what it offers itself is about the build.
#include <Python.h>

#include "cpu/kernels.h"

static PyObject* instruction_set(PyObject*, PyObject*) {
  return PyUnicode_FromString(aml::cpu::instruction_set());
}

static PyMethodDef methods[] = {
    {"instruction_set", instruction_set, METH_NOARGS, "Name of the instruction set that the CPU kernels run with."},
    {nullptr, nullptr, 0, nullptr},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "aml_kernels._C", "Kernels of aml_kernels.", -1, methods, nullptr, nullptr, nullptr, nullptr,
};

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&module); }
