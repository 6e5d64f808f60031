// AVX2: sixty-four positions at a time, codes spread by a shuffle looked up by the byte of bits, products by vpmaddubsw.
#include "coded.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#define TARGET __attribute__((target("avx2,fma,f16c,popcnt")))
#define INLINE static inline __attribute__((always_inline)) TARGET

#define BYTES 32
#define ROWS 2
#define TOKENS 4
#define VB __m256i
#define VI __m256i
#define VF __m256

// What position i takes, for every byte of bits: the number of set bits below i if bit i is set, else 0x80 for zero.
static _Alignas(16) uint8_t spread[256][8];

__attribute__((constructor)) static void fill_spread(void) {
    memset(spread, 0x80, sizeof spread);
    for (int bits = 0; bits < 256; bits++)
        for (int i = 0, count = 0; i < 8; i++)
            if (bits >> i & 1) spread[bits][i] = (uint8_t)count++;
}

INLINE __m256 read8(const void *x, int64_t i, int64_t count, int dtype) {
    if (count < 8) {
        float some[8] = {0};
        for (int64_t j = 0; j < count; j++) some[j] = nm_read(x, i + j, dtype);
        return _mm256_loadu_ps(some);
    }
    if (dtype == NM_F32) return _mm256_loadu_ps((const float *)x + i);
    __m128i half = _mm_loadu_si128((const __m128i *)((const uint16_t *)x + i));
    if (dtype == NM_F16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

INLINE float largest_of(__m256 v) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

INLINE void round_token(const nm_coded *p, int64_t t, nm_rounded *to, int dtype) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    for (int64_t g = 0; g < to->scales; g++) {
        int64_t first = g * p->group, count = nm_min(p->group, p->in - first), from = t * p->in + first;
        int8_t *codes = to->codes + t * to->padded + first;
        __m256 largest = _mm256_setzero_ps(), nan = _mm256_setzero_ps();
        for (int64_t i = 0; i < count; i += 8) {
            __m256 x = read8(p->x, from + i, count - i, dtype);
            nan = _mm256_or_ps(nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
            largest = _mm256_max_ps(_mm256_andnot_ps(sign, x), largest);
        }
        float most = _mm256_movemask_ps(nan) ? __builtin_nanf("") : largest_of(largest);
        __m256 inverse = _mm256_set1_ps(most > 0 ? 127 / most : 0);
        to->scale[t * to->scales + g] = most / 127;
        for (int64_t i = 0; i < p->group; i += 8) {
            __m256i whole = _mm256_cvtps_epi32(_mm256_mul_ps(read8(p->x, from + i, count - i, dtype), inverse));
            __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
            _mm_storel_epi64((__m128i *)(codes + i), _mm_packs_epi16(words, words));
        }
    }
}

TARGET static void round_all(const nm_coded *p, nm_rounded *to) {
    for (int64_t t = 0; t < p->tokens; t++)
        if (p->dtype == NM_F32) round_token(p, t, to, NM_F32);
        else if (p->dtype == NM_F16) round_token(p, t, to, NM_F16);
        else round_token(p, t, to, NM_BF16);
}

INLINE VI vi_zero(void) { return _mm256_setzero_si256(); }
INLINE VF vf_zero(void) { return _mm256_setzero_ps(); }
INLINE VB codes_at(const int8_t *v) { return _mm256_loadu_si256((const __m256i *)v); }

INLINE void codes_unpack(const uint8_t *v, int8_t *to) {
    const __m256i low = _mm256_set1_epi8(15), eight = _mm256_set1_epi8(8);
    __m256i pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)v));
    pairs = _mm256_and_si256(_mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4)), low);
    _mm256_storeu_si256((__m256i *)to, _mm256_sub_epi8(pairs, eight));
}

INLINE __m128i spread8(const int8_t **v, unsigned bits, int each) {
    __m128i codes = _mm_loadl_epi64((const __m128i *)*v);
    *v += each ? each : _mm_popcnt_u32(bits);
    return _mm_shuffle_epi8(codes, _mm_loadl_epi64((const __m128i *)spread[bits]));
}

INLINE VB codes_spread(const int8_t **v, uint64_t bits, int each) {
    __m128i a = spread8(v, bits & 255, each), b = spread8(v, bits >> 8 & 255, each);
    __m128i c = spread8(v, bits >> 16 & 255, each), d = spread8(v, bits >> 24 & 255, each);
    return _mm256_set_m128i(_mm_unpacklo_epi64(c, d), _mm_unpacklo_epi64(a, b));
}

// vpmaddubsw takes one side unsigned: |w|, and the activations with its sign.
INLINE VI vi_dot(VI sum, VB w, VB x) {
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

INLINE VF vf_add(VF sum, VI whole, float by) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), _mm256_set1_ps(by), sum);
}

INLINE float vf_sum(VF v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

#include "coded_lanes.h"
CODED_KERNEL(nm_coded_avx2)
#endif
