// The kernels as operations of torch, which compiled code calls without Python: `optimum_eggs::packed_linear`,
// `packed_linears` of several layers, and `attend`, for the CPU. What a kernel cannot take (too many tokens, a dtype that
// it does not know, what is not contiguous) goes on to the operation of that name with `_by_python`.
//
// It calls torch through the C functions that torch keeps stable across versions, found by name when it is registered: the
// package needs no headers of torch to be built, and one build serves all versions.
#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <dlfcn.h>
#include <pthread.h>

#if defined(_OPENMP)
#include <omp.h>  // has templates, which are not for the C that follows
#endif

#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

extern "C" {
#include "attend.h"
#include "coded.h"
}

namespace {

using Value = uint64_t;  // torch's StableIValue: a number, a tensor's handle, or the address of a Value if it is optional
using Tensor = void *;

enum { MOST_DIMENSIONS = 8 };

struct Torch {
    int32_t (*data_ptr)(Tensor, void **);
    int32_t (*dim)(Tensor, int64_t *);
    int32_t (*sizes)(Tensor, int64_t **);
    int32_t (*strides)(Tensor, int64_t **);
    int32_t (*dtype)(Tensor, int32_t *);
    int32_t (*is_contiguous)(Tensor, bool *);
    int32_t (*empty_strided)(int64_t, const int64_t *, const int64_t *, int32_t, int32_t, int32_t, Tensor *);
    int32_t (*delete_tensor)(Tensor);
    int32_t (*call)(const char *, const char *, Value *);
    int32_t (*library)(const char *, const char *, const char *, uint32_t, void **);
    int32_t (*implement)(void *, const char *, void (*)(Value *, uint64_t, uint64_t));
    int32_t (*dtype_float32)();
    int32_t (*dtype_float16)();
    int32_t (*dtype_bfloat16)();
    int32_t (*dtype_int8)();
    int32_t (*dtype_uint8)();
    int32_t (*dtype_bool)();
    int32_t (*device_type_cpu)();
    // Of newer versions alone.
    int32_t (*num_threads)(uint32_t *);
    int32_t (*delete_value)(Value *);
    const char *(*what)();
} torch;

struct {
    int32_t float_[NM_DTYPES], int8, uint8, boolean, cpu;
} kinds;

// What `select.py` chose, by dtype.
struct {
    const nm_isa *isa[NM_DTYPES];
    int64_t most[NM_DTYPES];                                  // tokens of a packed layer
    int64_t dense_first[NM_DTYPES], dense_last[NM_DTYPES];    // tokens of a dense one
    int64_t most_coded;
} chosen;

const nm_kernels *kernels;
bool forked;  // a forked child has lost the threads that the parent's OpenMP waits for

int threads() {
    if (forked) return 1;
    uint32_t found = 1;
    if (torch.num_threads && torch.num_threads(&found) == 0) return static_cast<int>(found);
#if defined(_OPENMP)
    return omp_get_max_threads();
#else
    return 1;
#endif
}

void check(int32_t error) {
    if (!error) return;
    const char *what = torch.what ? torch.what() : nullptr;
    std::string said = what ? what : "an operation of optimum_eggs failed in torch, which says why to its log alone";
    throw std::runtime_error(said.substr(0, said.find("\n\nAt:")));  // what follows are lines of Python
}

// What the operation knows of a tensor, if there is one.
struct Known {
    Tensor handle = nullptr;
    void *data = nullptr;
    int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
    int32_t dtype = -1;
    bool contiguous = true;

    explicit Known(Tensor of) : handle(of) {
        if (!of) return;
        check(torch.data_ptr(of, &data));
        check(torch.dim(of, &dim));
        check(torch.sizes(of, &sizes));
        check(torch.strides(of, &strides));
        check(torch.dtype(of, &dtype));
        check(torch.is_contiguous(of, &contiguous));
    }

    bool is(int32_t kind, int64_t rows, int64_t columns) const {
        return contiguous && dtype == kind && dim == 2 && sizes[0] == rows && sizes[1] == columns;
    }

    // From one to the next along dimension d, where one may serve for all `wanted`; -1 if it does not fit.
    int64_t step(int64_t d, int64_t wanted) const {
        return sizes[d] == wanted ? strides[d] : sizes[d] == 1 ? 0 : -1;
    }
};

Tensor optional(Value value) { return value ? reinterpret_cast<Tensor>(*reinterpret_cast<Value *>(value)) : nullptr; }

void let_go(Value value) {
    if (!value) return;
    check(torch.delete_tensor(optional(value)));
    auto *of = reinterpret_cast<Value *>(value);
    if (torch.delete_value) check(torch.delete_value(of));
    else delete of;  // as the headers of those versions do
}

// The arguments: first tensors, then optional ones; numbers need nothing.
void let_go_of_all(const Value *stack, int tensors, int optionals) {
    for (int i = 0; i < tensors; i++) check(torch.delete_tensor(reinterpret_cast<Tensor>(stack[i])));
    for (int i = tensors; i < tensors + optionals; i++) let_go(stack[i]);
}

// Puts what `run` gives in place of the arguments, tensors first; without a result they go on to the operation `instead`.
void replace(Value *stack, Tensor (*run)(const Value *), int tensors, int optionals, const char *instead) {
    Tensor result;
    try {
        result = run(stack);
    } catch (...) {
        let_go_of_all(stack, tensors, optionals);
        throw;
    }
    if (!result) {
        check(torch.call(instead, "", stack));  // takes the arguments over
        return;
    }
    let_go_of_all(stack, tensors, optionals);
    stack[0] = reinterpret_cast<Value>(result);
}

// An empty tensor of these sizes.
Tensor make(int64_t dim, const int64_t *sizes, int32_t dtype) {
    int64_t strides[MOST_DIMENSIONS], stride = 1;
    for (int64_t d = dim - 1; d >= 0; d--) {
        strides[d] = stride;
        stride *= sizes[d];
    }
    Tensor result = nullptr;
    check(torch.empty_strided(dim, sizes, strides, dtype, kinds.cpu, 0, &result));
    return result;
}

// What is stored of a layer.
struct Layer {
    Known weight, scale, meta, bias;
};

// X Wᵀ + b: all that layers of the same inputs have in common.
struct Product {
    Known x;
    int64_t n, m, bits, group, in = 0, width = 0, tokens = 1;
    int dtype = 0;
    const nm_isa *isa = nullptr;  // nullptr: no kernel takes it

    Product(Value of, const Value *numbers)
        : x(reinterpret_cast<Tensor>(of)),
          n(static_cast<int64_t>(numbers[0])),
          m(static_cast<int64_t>(numbers[1])),
          bits(static_cast<int64_t>(numbers[2])),
          group(static_cast<int64_t>(numbers[3])) {
        while (dtype < NM_DTYPES && kinds.float_[dtype] != x.dtype) dtype++;
        if (dtype == NM_DTYPES || !x.contiguous || x.dim < 1 || x.dim > MOST_DIMENSIONS) return;
        in = x.sizes[x.dim - 1];
        for (int64_t d = 0; d + 1 < x.dim; d++) tokens *= x.sizes[d];
        if (tokens < 1 || in < 1 || n < 1 || m < n || in % m) return;
        if (bits && ((bits != 8 && bits != 4) || group < 64 || group % 64 || tokens > chosen.most_coded)) return;
        width = in / m * n;
        const nm_isa *found = chosen.isa[dtype];  // read once: another thread may choose otherwise
        if (!found) return;
        bool few = bits || (n < m ? tokens <= chosen.most[dtype] ||
                                        nm_skips(found, dtype, in, static_cast<int>(n), static_cast<int>(m))
                                  : tokens >= chosen.dense_first[dtype] && tokens <= chosen.dense_last[dtype]);
        if (few) isa = found;
    }

    int64_t size() const { return nm_size(dtype); }

    bool takes(const Layer &layer) const {
        const Known &weight = layer.weight, &scale = layer.scale, &meta = layer.meta, &bias = layer.bias;
        if (weight.dim != 2 || weight.sizes[0] < 1 || (n == m) != !meta.handle) return false;
        int64_t out = weight.sizes[0];
        if (meta.handle && !meta.is(kinds.uint8, out, nm_meta_width(in))) return false;
        if (bias.handle && !(bias.contiguous && bias.dtype == x.dtype && bias.dim == 1 && bias.sizes[0] == out)) return false;
        if (!bits) return weight.is(x.dtype, out, width);
        return scale.handle && scale.is(kinds.float_[NM_BF16], out, (in + group - 1) / group) &&
               weight.is(bits == 8 ? kinds.int8 : kinds.uint8, out, (width * bits + 7) / 8);
    }

    // Whether two layers lie in memory as one of the rows of both.
    bool are_one(const Layer &a, const Layer &b) const {
        return follows(a.weight, b.weight, bits ? 1 : size()) && follows(a.scale, b.scale, 2) && follows(a.meta, b.meta, 1) &&
               follows(a.bias, b.bias, size());
    }

    static bool follows(const Known &a, const Known &b, int64_t size) {
        if (!a.handle || !b.handle) return a.handle == b.handle;
        int64_t numbers = 1;
        for (int64_t d = 0; d < a.dim; d++) numbers *= a.sizes[d];
        return static_cast<const char *>(a.data) + numbers * size == b.data;
    }

    int run(const Layer &layer, int64_t out, void *y) const {
        if (bits) {
            nm_coded p = {dtype,
                          static_cast<int>(bits),
                          x.data,
                          static_cast<const uint8_t *>(layer.weight.data),
                          static_cast<const uint16_t *>(layer.scale.data),
                          static_cast<const uint8_t *>(layer.meta.data),
                          layer.bias.data,
                          y,
                          tokens,
                          out,
                          in,
                          width,
                          group,
                          static_cast<int>(n),
                          static_cast<int>(m),
                          threads()};
            return isa->coded(&p);
        }
        nm_problem p = {dtype,
                        x.data,
                        layer.weight.data,
                        static_cast<const uint8_t *>(layer.meta.data),
                        layer.bias.data,
                        y,
                        tokens,
                        out,
                        in,
                        width,
                        static_cast<int>(n),
                        static_cast<int>(m),
                        threads()};
        return isa->linear[dtype](&p);
    }
};

// The outputs of the layers side by side, or nullptr where no kernel takes them. Neighbours in memory are one product.
Tensor outputs(const Product &product, const Layer *layers, int count) {
    if (!product.isa) return nullptr;
    int64_t total = 0;
    bool one = true;
    for (int i = 0; i < count; i++) {
        if (!product.takes(layers[i])) return nullptr;
        total += layers[i].weight.sizes[0];
        one = one && (!i || product.are_one(layers[i - 1], layers[i]));
    }
    int64_t sizes[MOST_DIMENSIONS], dim = product.x.dim;
    std::copy_n(product.x.sizes, dim, sizes);
    sizes[dim - 1] = total;
    Tensor result = make(dim, sizes, product.x.dtype);
    char *y = static_cast<char *>(Known(result).data);
    try {
        std::vector<char> apart;  // a kernel writes whole rows, which then go to their places
        if (!one && product.tokens > 1) apart.resize(product.tokens * total * product.size());
        for (int i = 0, next; i < count; i = next) {
            int64_t out = layers[i].weight.sizes[0];
            for (next = i + 1; next < count && product.are_one(layers[next - 1], layers[next]); next++)
                out += layers[next].weight.sizes[0];
            if (product.run(layers[i], out, apart.empty() ? y : apart.data())) throw std::bad_alloc();
            int64_t bytes = out * product.size();
            for (int64_t row = 0; !apart.empty() && row < product.tokens; row++)
                std::memcpy(y + row * total * product.size(), apart.data() + row * bytes, bytes);
            y += bytes;
        }
    } catch (...) {
        torch.delete_tensor(result);
        throw;
    }
    return result;
}

// The arguments, in the order of the schema.
enum { X, WEIGHT, SCALE, META, BIAS, NUMBERS };

Tensor output(const Value *stack) {
    const Layer layer = {Known(reinterpret_cast<Tensor>(stack[WEIGHT])), Known(optional(stack[SCALE])),
                         Known(optional(stack[META])), Known(optional(stack[BIAS]))};
    return outputs(Product(stack[X], stack + NUMBERS), &layer, 1);
}

void packed_linear(Value *stack, uint64_t, uint64_t) {
    replace(stack, output, 2, 3, "optimum_eggs::packed_linear_by_python");
}

// Of two or three layers: each thing stored is followed by that of the others. There need be no third.
enum { MOST_LAYERS = 3, WEIGHTS = 1, SCALES = WEIGHTS + MOST_LAYERS, METAS = SCALES + MOST_LAYERS };
enum { BIASES = METAS + MOST_LAYERS, NUMBERS_OF_ALL = BIASES + MOST_LAYERS };

Tensor outputs_of_all(const Value *stack) {
    Known third(optional(stack[WEIGHTS + 2]));
    auto layer = [&](int i, Known weight) {
        return Layer{weight, Known(optional(stack[SCALES + i])), Known(optional(stack[METAS + i])),
                     Known(optional(stack[BIASES + i]))};
    };
    const Layer layers[MOST_LAYERS] = {layer(0, Known(reinterpret_cast<Tensor>(stack[WEIGHTS]))),
                                       layer(1, Known(reinterpret_cast<Tensor>(stack[WEIGHTS + 1]))), layer(2, third)};
    return outputs(Product(stack[X], stack + NUMBERS_OF_ALL), layers, third.handle ? 3 : 2);
}

void packed_linears(Value *stack, uint64_t, uint64_t) {
    replace(stack, outputs_of_all, 3, 10, "optimum_eggs::packed_linears_by_python");
}

enum { Q, K, V, MASK, SCALING };

// softmax(q Kᵀ · scale) V, or nullptr where the kernel does not take it.
Tensor attention(const Value *stack) {
    Known q(reinterpret_cast<Tensor>(stack[Q])), k(reinterpret_cast<Tensor>(stack[K]));
    Known v(reinterpret_cast<Tensor>(stack[V])), mask(optional(stack[MASK]));
    int dtype = q.dtype == kinds.float_[NM_F32] ? NM_F32 : NM_BF16;
    if (q.dtype != kinds.float_[dtype] || k.dtype != q.dtype || v.dtype != q.dtype) return nullptr;
    if (q.dim != 4 || k.dim != 4 || v.dim != 4 || q.sizes[2] != 1) return nullptr;
    int64_t batch = q.sizes[0], heads = q.sizes[1], dim = q.sizes[3], kv_heads = k.sizes[1], length = k.sizes[2];
    if (batch < 1 || kv_heads < 1 || heads < 1 || heads % kv_heads || length < 1 || dim < 16 || dim % 16 || dim > NM_MOST_DIM)
        return nullptr;
    for (int64_t d = 0; d < 4; d++)
        if (k.sizes[d] != v.sizes[d]) return nullptr;
    if (k.sizes[0] != batch || k.sizes[3] != dim || q.strides[3] != 1 || k.strides[3] != 1 || v.strides[3] != 1)
        return nullptr;
    int64_t mask_steps[3] = {0, 0, 0};
    if (mask.handle) {
        if (mask.dtype != kinds.boolean || mask.dim != 4 || mask.sizes[2] != 1 || mask.sizes[3] != length) return nullptr;
        mask_steps[0] = mask.step(0, batch), mask_steps[1] = mask.step(1, heads), mask_steps[2] = mask.strides[3];
        if (mask_steps[0] < 0 || mask_steps[1] < 0) return nullptr;
    }
    double scale;
    std::memcpy(&scale, stack + SCALING, sizeof(scale));
    const int64_t sizes[] = {batch, 1, heads, dim};
    Tensor result = make(4, sizes, q.dtype);
    nm_attention p = {dtype,
                      q.data,
                      k.data,
                      v.data,
                      Known(result).data,
                      static_cast<const uint8_t *>(mask.data),
                      batch,
                      heads,
                      kv_heads,
                      length,
                      dim,
                      q.strides[0],
                      q.strides[1],
                      k.strides[0],
                      k.strides[1],
                      k.strides[2],
                      v.strides[0],
                      v.strides[1],
                      v.strides[2],
                      mask_steps[0],
                      mask_steps[1],
                      mask_steps[2],
                      static_cast<float>(scale),
                      threads()};
    if (kernels->attend(&p)) {
        torch.delete_tensor(result);
        throw std::bad_alloc();
    }
    return result;
}

void attend(Value *stack, uint64_t, uint64_t) {
    replace(stack, attention, 3, 1, "optimum_eggs::attend_by_python");
}

template <class Function>
bool find(void *library, const char *name, Function &to) {
    void *found = dlsym(library, name);
    std::memcpy(&to, &found, sizeof(found));
    return found;
}

// The name of what this version of torch lacks, or nullptr.
const char *find_all(void *library) {
#define FIND(name, to) \
    if (!find(library, name, torch.to)) return name;
    FIND("aoti_torch_get_data_ptr", data_ptr)
    FIND("aoti_torch_get_dim", dim)
    FIND("aoti_torch_get_sizes", sizes)
    FIND("aoti_torch_get_strides", strides)
    FIND("aoti_torch_get_dtype", dtype)
    FIND("aoti_torch_is_contiguous", is_contiguous)
    FIND("aoti_torch_empty_strided", empty_strided)
    FIND("aoti_torch_delete_tensor_object", delete_tensor)
    FIND("aoti_torch_call_dispatcher", call)
    FIND("aoti_torch_library_init_impl", library)
    FIND("aoti_torch_library_impl", implement)
    FIND("aoti_torch_dtype_float32", dtype_float32)
    FIND("aoti_torch_dtype_float16", dtype_float16)
    FIND("aoti_torch_dtype_bfloat16", dtype_bfloat16)
    FIND("aoti_torch_dtype_int8", dtype_int8)
    FIND("aoti_torch_dtype_uint8", dtype_uint8)
    FIND("aoti_torch_dtype_bool", dtype_bool)
    FIND("aoti_torch_device_type_cpu", device_type_cpu)
#undef FIND
    find(library, "torch_get_num_threads", torch.num_threads);
    find(library, "torch_delete_stable_ivalue", torch.delete_value);
    find(library, "torch_exception_get_what_without_backtrace", torch.what);
    return nullptr;
}

PyObject *register_op(PyObject *, PyObject *args) {
    const char *path;
    PyObject *table;
    if (!PyArg_ParseTuple(args, "sO", &path, &table)) return nullptr;
    kernels = static_cast<const nm_kernels *>(PyCapsule_GetPointer(table, NM_KERNELS));
    if (!kernels) return nullptr;
    void *library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
    if (!library) return PyErr_Format(PyExc_OSError, "%s is not loaded", path);
    if (const char *missing = find_all(library)) return PyErr_Format(PyExc_OSError, "this torch has no %s", missing);
    kinds = {{torch.dtype_float32(), torch.dtype_float16(), torch.dtype_bfloat16()},
             torch.dtype_int8(),
             torch.dtype_uint8(),
             torch.dtype_bool(),
             torch.device_type_cpu()};
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
    void *registrations;  // for as long as the process lives
    if (torch.library("optimum_eggs", "CPU", __FILE__, __LINE__, &registrations) ||
        torch.implement(registrations, "packed_linear", packed_linear) ||
        torch.implement(registrations, "packed_linears", packed_linears) ||
        torch.implement(registrations, "attend", attend))
        return PyErr_Format(PyExc_OSError, "torch did not take the operations");
    Py_RETURN_NONE;
}

PyObject *choose(PyObject *, PyObject *args) {
    int dtype;
    long long isa, most, dense_first, dense_last, most_coded;
    if (!PyArg_ParseTuple(args, "iLLLLL", &dtype, &isa, &most, &dense_first, &dense_last, &most_coded)) return nullptr;
    if (dtype < 0 || dtype >= NM_DTYPES) return PyErr_Format(PyExc_ValueError, "no dtype %d", dtype);
    chosen.isa[dtype] = isa < 0 ? nullptr : kernels->isas + isa;
    chosen.most[dtype] = most;
    chosen.dense_first[dtype] = dense_first;
    chosen.dense_last[dtype] = dense_last;
    chosen.most_coded = most_coded;
    Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"register", register_op, METH_VARARGS, "register(path of libtorch_cpu, kernels): make the operations known to torch."},
    {"choose", choose, METH_VARARGS,
     "choose(dtype, isa, most, dense_first, dense_last, most_coded): tokens that kernels take; isa -1 for none."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_torch_ops", "Operations of torch; see optimum_eggs.ops.native.", -1, methods, nullptr, nullptr,
    nullptr, nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__torch_ops(void) { return PyModule_Create(&definition); }
