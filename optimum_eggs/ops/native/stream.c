// Reading memory as fast as this processor can: what a kernel that is bound by memory is measured against.
#include "nm.h"

enum { STREAMS = 4 };

// Each stream is read from end to end, all four together. `bytes` is a multiple of STREAMS * sizeof(vector).
#define READER(name, target, vector) \
    target static uint64_t name(const char *from, int64_t bytes) { \
        const vector *at = (const vector *)from; \
        int64_t each = bytes / (int64_t)sizeof(vector) / STREAMS; \
        vector seen[STREAMS] = {0}; \
        for (int64_t i = 0; i < each; i++) \
            for (int s = 0; s < STREAMS; s++) { \
                __builtin_prefetch(at + s * each + i + 2048 / sizeof(vector)); \
                seen[s] ^= at[s * each + i]; \
            } \
        vector all = seen[0] ^ seen[1] ^ seen[2] ^ seen[3]; \
        uint64_t result = 0; \
        for (unsigned i = 0; i < sizeof(vector) / 8; i++) result ^= all[i]; \
        return result; \
    }

typedef uint64_t v16 __attribute__((vector_size(16)));
READER(read_16, , v16)
#if defined(__x86_64__)
typedef uint64_t v32 __attribute__((vector_size(32)));
typedef uint64_t v64 __attribute__((vector_size(64)));
READER(read_32, __attribute__((target("avx2"))), v32)
READER(read_64, __attribute__((target("avx512f"))), v64)
#endif

uint64_t nm_stream(const void *from, int64_t bytes, int threads) {
    int64_t each = bytes / threads / 256 * 256;
    uint64_t result = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(^ : result)
    for (int i = 0; i < threads; i++) {
        const char *part = (const char *)from + i * each;
#if defined(__x86_64__)
        if (__builtin_cpu_supports("avx512f")) result ^= read_64(part, each);
        else if (__builtin_cpu_supports("avx2")) result ^= read_32(part, each);
        else result ^= read_16(part, each);
#else
        result ^= read_16(part, each);
#endif
    }
    return result;
}
