// An empty Python module, so that `import dblocks._C` loads the library and its registrations.
#include <Python.h>

static PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C(void) { return PyModule_Create(&module); }
