// What every kernel gets, and what the dispatcher knows of each.
#ifndef EGGS_NM_H
#define EGGS_NM_H

#include <stddef.h>
#include <stdint.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

// What this compiler knows: older ones build the package with the kernels they can.
#if defined(__x86_64__)
#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11
#define NM_AMX 1
#endif
#if defined(__clang__) ? __clang_major__ >= 9 : __GNUC__ >= 10
#define NM_AVX512BF16 1
#endif
#endif

#if defined(__aarch64__)
#if defined(__clang__) ? __clang_major__ >= 16 : __GNUC__ >= 9
#define NM_DOTPROD 1
#endif
#endif

enum { NM_F32, NM_F16, NM_BF16, NM_DTYPES };

// y = x Wᵀ + bias, W packed n:m, or dense: n = m, without bits. All matrices are row-major and contiguous; x, values, bias
// and y have one dtype.
typedef struct {
    int dtype;
    const void *x;        // (tokens, in)
    const void *values;   // (out, width): the values kept, width = in·n/m
    const uint8_t *meta;  // (out, ⌈in/8⌉): bit i of byte b is position 8b + i; or NULL
    const void *bias;     // (out) or NULL
    void *y;              // (tokens, out)
    int64_t tokens, out, in, width;
    int n, m;
    int threads;
} nm_problem;

// A kernel returns 0, or -1 if memory ran out. It reads nothing outside the matrices, whatever the bits are.
typedef int (*nm_kernel)(const nm_problem *);

int nm_linear_portable(const nm_problem *p);
int nm_linear_avx2(const nm_problem *p);
int nm_linear_avx512(const nm_problem *p);
int nm_linear_avx512bf16(const nm_problem *p);        // bf16 only
int nm_linear_avx512bf16_tiles(const nm_problem *p);  // bf16 only; for many tokens
int nm_linear_avx512bf16_skip(const nm_problem *p);   // bf16 only; for many tokens of the patterns that it is made for
int64_t nm_least_avx512bf16_skip(const nm_problem *p);  // from how many tokens on it is the fastest; 0 if never
int nm_linear_amx(const nm_problem *p);         // bf16 only
int nm_linear_neon(const nm_problem *p);

// Write the rows [0, out) of the dense weight (out, in), elements of `size` bytes (2 or 4).
typedef void (*nm_unpacker)(const void *values, const uint8_t *meta, void *dense, int64_t out, int64_t in,
                            int64_t width, int size, int threads);
void nm_unpack_portable(const void *values, const uint8_t *meta, void *dense, int64_t out, int64_t in, int64_t width,
                        int size, int threads);
void nm_unpack_avx512(const void *values, const uint8_t *meta, void *dense, int64_t out, int64_t in, int64_t width,
                      int size, int threads);

// Write the values kept (out, width) of the rows [0, out) of a dense matrix (out, in), elements of `size` bytes (2 or 4).
void nm_pack(const void *dense, const uint8_t *meta, void *values, int64_t out, int64_t in, int64_t width, int size,
             int threads);

// Mark in `kept` the n largest of every m scores, of equal ones the first; m is NM_TOPN_LARGEST at the most.
enum { NM_TOPN_LARGEST = 16 };
void nm_topn(const float *score, uint8_t *kept, int64_t groups, int n, int m, int threads);

// Read `bytes` from `from`, aligned to 64 bytes, but for less than 256 a thread, and return something that depends on all of them.
uint64_t nm_stream(const void *from, int64_t bytes, int threads);

typedef struct nm_coded nm_coded;  // in coded.h
typedef int (*nm_coded_kernel)(const nm_coded *);
typedef void (*nm_decoder)(const uint8_t *codes, const uint16_t *scale, void *values, int64_t out, int64_t width,
                           int64_t per_scale, int64_t scales, int bits, int dtype, int threads);

typedef struct {
    const char *name;
    int (*supported)(void);  // does this processor (and this build) run it?
    nm_kernel linear[NM_DTYPES];
    int (*skips[NM_DTYPES])(const nm_problem *);  // see nm_skips; NULL if never
    nm_unpacker unpack;
    nm_coded_kernel coded;
    nm_decoder decode;
} nm_isa;

extern const nm_isa nm_isas[];  // from the simplest to the fastest
extern const int nm_isa_count;

// Does `linear` skip what is pruned of many tokens, and beat the dense product with any number of them?
static inline int nm_skips(const nm_isa *isa, int dtype, int64_t in, int n, int m) {
    nm_problem p = {0};
    p.dtype = dtype;
    p.in = in;
    p.n = n;
    p.m = m;
    return isa->skips[dtype] && isa->skips[dtype](&p);
}

// Rounding to nearest even; NaN stays NaN.
static inline uint16_t nm_to_bf16(float f) {
    union { float f; uint32_t u; } v = {f};
    if ((v.u & 0x7fffffff) > 0x7f800000) return (uint16_t)((v.u >> 16) | 0x40);
    return (uint16_t)((v.u + 0x7fff + ((v.u >> 16) & 1)) >> 16);
}

static inline float nm_from_bf16(uint16_t h) {
    union { uint32_t u; float f; } v = {(uint32_t)h << 16};
    return v.f;
}

float nm_from_f16(uint16_t h);
uint16_t nm_to_f16(float f);

static inline int nm_size(int dtype) { return dtype == NM_F32 ? 4 : 2; }

static inline float nm_read(const void *data, int64_t i, int dtype) {
    if (dtype == NM_F32) return ((const float *)data)[i];
    uint16_t h = ((const uint16_t *)data)[i];
    return dtype == NM_F16 ? nm_from_f16(h) : nm_from_bf16(h);
}

static inline void nm_write(void *data, int64_t i, int dtype, float f) {
    if (dtype == NM_F32) ((float *)data)[i] = f;
    else ((uint16_t *)data)[i] = dtype == NM_F16 ? nm_to_f16(f) : nm_to_bf16(f);
}

static inline int64_t nm_meta_width(int64_t in) { return (in + 7) / 8; }
static inline int64_t nm_round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }
static inline int64_t nm_min(int64_t a, int64_t b) { return a < b ? a : b; }

// Threads worth waking for this much work: below some 64 KiB of weights, handing it over costs more than it saves.
static inline int nm_threads(const nm_problem *p) {
    int64_t bytes = p->out * p->width * nm_size(p->dtype) * (p->tokens > 4 ? p->tokens / 4 : 1);
    int64_t useful = bytes / 65536;
    return useful < 1 ? 1 : (int)nm_min(useful, p->threads);
}

// Values and bits whose last rows may be read `slack` bytes beyond their end: those rows are copied to a padded buffer.
typedef struct {
    const char *values, *tail_values;
    const uint8_t *meta, *tail_meta;
    int64_t first;  // row from which the copies are used
    int64_t row_bytes, meta_bytes;
    void *memory;
} nm_rows;

int nm_rows_open(nm_rows *rows, const nm_problem *p, int64_t slack);
int nm_rows_of(nm_rows *rows, const void *values, int64_t row_bytes, const uint8_t *meta, int64_t meta_row,
               int64_t out, int64_t slack);  // meta: NULL where there are no bits
void nm_rows_close(nm_rows *rows);

static inline const void *nm_row_values(const nm_rows *rows, int64_t r) {
    return r < rows->first ? rows->values + r * rows->row_bytes
                           : rows->tail_values + (r - rows->first) * rows->row_bytes;
}

static inline const uint8_t *nm_row_meta(const nm_rows *rows, int64_t r) {
    if (!rows->meta) return NULL;
    return r < rows->first ? rows->meta + r * rows->meta_bytes : rows->tail_meta + (r - rows->first) * rows->meta_bytes;
}

// Number of the calling thread in its team.
static inline int nm_thread(void) {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

void *nm_alloc(size_t bytes);  // aligned to 64 bytes, or NULL
void nm_free(void *memory);

#endif
