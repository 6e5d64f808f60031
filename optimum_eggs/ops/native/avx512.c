// AVX-512F: sixteen positions at a time, spread by vpexpand; and the unpacker for AVX-512 VBMI2.
#include "nm.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,f16c,avx2,fma,popcnt")))
#define LANES 16
#define VEC __m512
#define ROWS 4
#define TOKENS 6

TARGET static inline VEC lanes_zero(void) { return _mm512_setzero_ps(); }
TARGET static inline VEC lanes_x(const float *x) { return _mm512_loadu_ps(x); }
TARGET static inline void lanes_store(float *to, VEC v) { _mm512_storeu_ps(to, v); }
TARGET static inline VEC lanes_all(float f) { return _mm512_set1_ps(f); }
TARGET static inline VEC lanes_add(VEC a, VEC b) { return _mm512_add_ps(a, b); }
TARGET static inline VEC lanes_fma(VEC a, VEC b, VEC c) { return _mm512_fmadd_ps(a, b, c); }
TARGET static inline float lanes_sum(VEC v) { return _mm512_reduce_add_ps(v); }
TARGET static inline void lanes_prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }

TARGET static inline VEC lanes_f32(const void *v, unsigned bits) {
    return _mm512_maskz_expand_ps((__mmask16)bits, _mm512_loadu_ps(v));
}

TARGET static inline VEC lanes_f16(const void *v, unsigned bits) {
    __m512 wide = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)v));
    return _mm512_maskz_expand_ps((__mmask16)bits, wide);
}

TARGET static inline VEC lanes_bf16(const void *v, unsigned bits) {
    __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)v)), 16);
    return _mm512_maskz_expand_ps((__mmask16)bits, _mm512_castsi512_ps(wide));
}

#define LANES_MORE_TILES(R) LANES_TILE(R, 5) LANES_TILE(R, 6)
#include "lanes.h"
LANES_KERNEL(few_tokens)
#include "lanes_skip.h"
LANES_SKIP(many_tokens)

int nm_linear_avx512(const nm_problem *p) {
    enum { LEAST = 25 };  // tokens from which on what is pruned is skipped
    return p->tokens >= LEAST && nm_skips_f32(p) ? many_tokens(p) : few_tokens(p);
}

#define VBMI2 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt")))

// One row; `values` may be read 64 bytes beyond its end, `meta` 4.
VBMI2 static void unpack_row(const char *values, const uint8_t *meta, char *to, int64_t in, int64_t width, int size) {
    const char *end = values + width * size;
    int lanes = 64 / size;
    for (int64_t column = 0; column < in; column += lanes) {
        uint32_t bits = 0;
        int64_t left = in - column;
        memcpy(&bits, meta + column / 8, lanes / 8);
        uint32_t valid = left < lanes ? (1u << left) - 1 : (size == 2 ? 0xffffffffu : 0xffffu);
        bits &= valid;
        __m512i v = _mm512_loadu_si512(values);
        if (size == 2) _mm512_mask_storeu_epi16(to + column * 2, valid, _mm512_maskz_expand_epi16(bits, v));
        else _mm512_mask_storeu_epi32(to + column * 4, (__mmask16)valid, _mm512_maskz_expand_epi32((__mmask16)bits, v));
        values += _mm_popcnt_u32(bits) * size;
        if (values > end) values = end;
    }
}

void nm_unpack_avx512(const void *values, const uint8_t *meta, void *dense, int64_t out, int64_t in, int64_t width,
                      int size, int threads) {
    int64_t mw = nm_meta_width(in);
    int64_t copied = nm_min(out, nm_round_up(64, nm_min(mw, width * size)) / nm_min(mw, width * size));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < out - copied; row++)
        unpack_row((const char *)values + row * width * size, meta + row * mw, (char *)dense + row * in * size, in, width,
                   size);
    int64_t first = out - copied;  // the last rows, which must not be read past their end
    nm_unpack_portable((const char *)values + first * width * size, meta + first * mw, (char *)dense + first * in * size,
                       copied, in, width, size, 1);
}
#endif
