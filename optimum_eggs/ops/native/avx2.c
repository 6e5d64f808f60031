// AVX2 + FMA: eight positions at a time, values spread by a shuffle looked up by the byte of bits.
#include "nm.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#define TARGET __attribute__((target("avx2,fma,f16c,popcnt")))
#define LANES 8
#define VEC __m256
#define ROWS 2
#define TOKENS 4

// What position i takes, for every byte of bits: the number of set bits below i if bit i is set, else zero.
static struct {
    _Alignas(32) int32_t lane[256][8];    // float32: the value's lane, negative for zero
    _Alignas(32) uint8_t upper[256][32];  // bf16 to float32: the value's bytes in the upper half, 0x80 for zero
    _Alignas(16) uint8_t half[256][16];   // float16: the value's bytes, 0x80 for zero
} spread;

__attribute__((constructor)) static void fill_spread(void) {
    memset(&spread, 0x80, sizeof spread);
    for (int bits = 0; bits < 256; bits++)
        for (int i = 0, count = 0; i < 8; i++) {
            if (!(bits >> i & 1)) continue;
            for (int byte = 0; byte < 2; byte++)
                spread.upper[bits][4 * i + 2 + byte] = spread.half[bits][2 * i + byte] = (uint8_t)(2 * count + byte);
            spread.lane[bits][i] = count++;
        }
}

TARGET static inline VEC lanes_zero(void) { return _mm256_setzero_ps(); }
TARGET static inline VEC lanes_x(const float *x) { return _mm256_loadu_ps(x); }
TARGET static inline void lanes_store(float *to, VEC v) { _mm256_storeu_ps(to, v); }
TARGET static inline VEC lanes_all(float f) { return _mm256_set1_ps(f); }
TARGET static inline VEC lanes_add(VEC a, VEC b) { return _mm256_add_ps(a, b); }
TARGET static inline VEC lanes_fma(VEC a, VEC b, VEC c) { return _mm256_fmadd_ps(a, b, c); }
TARGET static inline void lanes_prefetch(const void *p) { _mm_prefetch((const char *)p, _MM_HINT_T0); }

TARGET static inline float lanes_sum(VEC v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

TARGET static inline VEC lanes_f32(const void *v, unsigned bits) {
    __m256i lane = _mm256_load_si256((const __m256i *)spread.lane[bits]);
    __m256 moved = _mm256_permutevar8x32_ps(_mm256_loadu_ps(v), lane);
    return _mm256_blendv_ps(moved, _mm256_setzero_ps(), _mm256_castsi256_ps(lane));
}

TARGET static inline VEC lanes_f16(const void *v, unsigned bits) {
    __m128i moved = _mm_shuffle_epi8(_mm_loadu_si128(v), _mm_load_si128((const __m128i *)spread.half[bits]));
    return _mm256_cvtph_ps(moved);
}

TARGET static inline VEC lanes_bf16(const void *v, unsigned bits) {
    __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(v));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(twice, _mm256_load_si256((const __m256i *)spread.upper[bits])));
}

#define LANES_MORE_TILES(R)
#include "lanes.h"
LANES_KERNEL(few_tokens)
#include "lanes_skip.h"
LANES_SKIP(many_tokens)

int nm_linear_avx2(const nm_problem *p) {
    enum { LEAST = 25 };  // tokens from which on what is pruned is skipped
    return p->tokens >= LEAST && nm_skips_f32(p) ? many_tokens(p) : few_tokens(p);
}
#endif
