// The Python module: addresses and sizes in, nothing out. Callers check shapes, dtypes and contiguity.
#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "attend.h"
#include "coded.h"

static int read_ints(PyObject *const *args, Py_ssize_t given, long long *to, Py_ssize_t wanted) {
    if (given != wanted) {
        PyErr_Format(PyExc_TypeError, "%zd arguments are taken, %zd given", wanted, given);
        return -1;
    }
    for (Py_ssize_t i = 0; i < wanted; i++) {
        to[i] = PyLong_AsLongLong(args[i]);
        if (to[i] == -1 && PyErr_Occurred()) return -1;
    }
    return 0;
}

enum { MOST = 16 };
static char supported[MOST];  // by index; found once, when the module is made

static const nm_isa *isa_at(long long index) {
    if (index >= 0 && index < nm_isa_count && supported[index]) return &nm_isas[index];
    PyErr_Format(PyExc_ValueError, "%lld is not an instruction set of this processor", index);
    return NULL;
}

static PyObject *linear(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    long long a[14];
    if (read_ints(args, given, a, 14)) return NULL;
    if (a[1] < 0 || a[1] >= NM_DTYPES) return PyErr_Format(PyExc_ValueError, "no dtype %lld", a[1]);
    const nm_isa *isa = isa_at(a[0]);
    if (!isa) return NULL;
    nm_problem p = {
        .dtype = (int)a[1],
        .x = (const void *)(intptr_t)a[2],
        .values = (const void *)(intptr_t)a[3],
        .meta = (const uint8_t *)(intptr_t)a[4],
        .bias = (const void *)(intptr_t)a[5],
        .y = (void *)(intptr_t)a[6],
        .tokens = a[7],
        .out = a[8],
        .in = a[9],
        .width = a[10],
        .n = (int)a[11],
        .m = (int)a[12],
        .threads = (int)a[13],
    };
    int failed = 0;
    if (p.tokens > 0 && p.out > 0) {
        Py_BEGIN_ALLOW_THREADS
        failed = isa->linear[p.dtype](&p);
        Py_END_ALLOW_THREADS
    }
    if (failed) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *skips(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    long long a[5];
    if (read_ints(args, given, a, 5)) return NULL;
    if (a[1] < 0 || a[1] >= NM_DTYPES) return PyErr_Format(PyExc_ValueError, "no dtype %lld", a[1]);
    const nm_isa *isa = isa_at(a[0]);
    return isa ? PyBool_FromLong(nm_skips(isa, (int)a[1], a[2], (int)a[3], (int)a[4])) : NULL;
}

static PyObject *coded(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    long long a[17];
    if (read_ints(args, given, a, 17)) return NULL;
    if (a[1] < 0 || a[1] >= NM_DTYPES) return PyErr_Format(PyExc_ValueError, "no dtype %lld", a[1]);
    if (a[2] != 4 && a[2] != 8) return PyErr_Format(PyExc_ValueError, "no codes of %lld bits", a[2]);
    const nm_isa *isa = isa_at(a[0]);
    if (!isa) return NULL;
    nm_coded p = {
        .dtype = (int)a[1],
        .bits = (int)a[2],
        .x = (const void *)(intptr_t)a[3],
        .codes = (const uint8_t *)(intptr_t)a[4],
        .scale = (const uint16_t *)(intptr_t)a[5],
        .meta = (const uint8_t *)(intptr_t)a[6],
        .bias = (const void *)(intptr_t)a[7],
        .y = (void *)(intptr_t)a[8],
        .tokens = a[9],
        .out = a[10],
        .in = a[11],
        .width = a[12],
        .group = a[13],
        .n = (int)a[14],
        .m = (int)a[15],
        .threads = (int)a[16],
    };
    int failed = 0;
    if (p.tokens > 0 && p.out > 0) {
        Py_BEGIN_ALLOW_THREADS
        failed = isa->coded(&p);
        Py_END_ALLOW_THREADS
    }
    if (failed) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *decode(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    long long a[11];
    if (read_ints(args, given, a, 11)) return NULL;
    if (a[9] < 0 || a[9] >= NM_DTYPES) return PyErr_Format(PyExc_ValueError, "no dtype %lld", a[9]);
    if (a[8] != 4 && a[8] != 8) return PyErr_Format(PyExc_ValueError, "no codes of %lld bits", a[8]);
    const nm_isa *isa = isa_at(a[0]);
    if (!isa) return NULL;
    Py_BEGIN_ALLOW_THREADS
    isa->decode((const uint8_t *)(intptr_t)a[1], (const uint16_t *)(intptr_t)a[2], (void *)(intptr_t)a[3], a[4], a[5],
                a[6], a[7], (int)a[8], (int)a[9], (int)a[10]);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *unpack(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    long long a[9];
    if (read_ints(args, given, a, 9)) return NULL;
    if (a[7] != 2 && a[7] != 4) return PyErr_Format(PyExc_ValueError, "no element of %lld bytes", a[7]);
    const nm_isa *isa = isa_at(a[0]);
    if (!isa) return NULL;
    Py_BEGIN_ALLOW_THREADS
    isa->unpack((const void *)(intptr_t)a[1], (const uint8_t *)(intptr_t)a[2], (void *)(intptr_t)a[3], a[4], a[5], a[6],
                (int)a[7], (int)a[8]);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *pack(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    long long a[8];
    if (read_ints(args, given, a, 8)) return NULL;
    if (a[6] != 2 && a[6] != 4) return PyErr_Format(PyExc_ValueError, "no element of %lld bytes", a[6]);
    Py_BEGIN_ALLOW_THREADS
    nm_pack((const void *)(intptr_t)a[0], (const uint8_t *)(intptr_t)a[1], (void *)(intptr_t)a[2], a[3], a[4], a[5],
            (int)a[6], (int)a[7]);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *topn(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    long long a[6];
    if (read_ints(args, given, a, 6)) return NULL;
    if (a[4] < 1 || a[4] > NM_TOPN_LARGEST) return PyErr_Format(PyExc_ValueError, "no group of %lld", a[4]);
    Py_BEGIN_ALLOW_THREADS
    nm_topn((const float *)(intptr_t)a[0], (uint8_t *)(intptr_t)a[1], a[2], (int)a[3], (int)a[4], (int)a[5]);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *stream(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    long long a[3];
    uint64_t result;
    if (read_ints(args, given, a, 3)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    result = nm_stream((const void *)(intptr_t)a[0], a[1], (int)a[2]);
    Py_END_ALLOW_THREADS
    return PyLong_FromUnsignedLongLong(result);
}

static PyObject *instruction_sets(PyObject *self, PyObject *none) {
    PyObject *found = PyDict_New();
    for (int i = 0; found && i < nm_isa_count; i++) {
        if (!supported[i]) continue;
        PyObject *index = PyLong_FromLong(i);
        if (!index || PyDict_SetItemString(found, nm_isas[i].name, index)) Py_CLEAR(found);
        Py_XDECREF(index);
    }
    return found;
}

static PyMethodDef methods[] = {
    {"linear", (PyCFunction)(void (*)(void))linear, METH_FASTCALL,
     "linear(isa, dtype, x, values, meta, bias, y, tokens, out, in, width, n, m, threads)"},
    {"skips", (PyCFunction)(void (*)(void))skips, METH_FASTCALL,
     "skips(isa, dtype, in, n, m): whether `linear` beats the dense product with any number of tokens."},
    {"coded", (PyCFunction)(void (*)(void))coded, METH_FASTCALL,
     "coded(isa, dtype, bits, x, codes, scale, meta, bias, y, tokens, out, in, width, group, n, m, threads)"},
    {"decode", (PyCFunction)(void (*)(void))decode, METH_FASTCALL,
     "decode(isa, codes, scale, values, out, width, per_scale, scales, bits, dtype, threads)"},
    {"unpack", (PyCFunction)(void (*)(void))unpack, METH_FASTCALL,
     "unpack(isa, values, meta, dense, out, in, width, size, threads)"},
    {"pack", (PyCFunction)(void (*)(void))pack, METH_FASTCALL, "pack(dense, meta, values, out, in, width, size, threads)"},
    {"topn", (PyCFunction)(void (*)(void))topn, METH_FASTCALL, "topn(score, kept, groups, n, m, threads)"},
    {"stream", (PyCFunction)(void (*)(void))stream, METH_FASTCALL, "stream(address, bytes, threads)"},
    {"instruction_sets", instruction_sets, METH_NOARGS, "Name to index, of those this processor runs, fastest last."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_native", "N:M kernels in C; see optimum_eggs.ops.native.", -1, methods, NULL, NULL, NULL, NULL,
};

static nm_kernels kernels = {nm_isas, nm_attend};

PyMODINIT_FUNC PyInit__native(void) {
    for (int i = 0; i < nm_isa_count && i < MOST; i++) supported[i] = (char)nm_isas[i].supported();
    PyObject *module = PyModule_Create(&definition), *capsule = PyCapsule_New(&kernels, NM_KERNELS, NULL);
    if (!module || !capsule || PyModule_AddObjectRef(module, "kernels", capsule)) Py_CLEAR(module);
    Py_XDECREF(capsule);
    return module;
}
