// AVX-512 VNNI, VBMI and VBMI2: sixty-four positions at a time, codes spread by vpexpandb and multiplied by vpdpbusd.
//
// vpdpbusd takes one side unsigned. Codes are made so by adding OFFSET, at the positions that are not kept as well, where
// OFFSET stands for zero: then all that is too much in a lane is OFFSET times its activations, whatever the row, and sums
// begin below zero by that. So the sum of every lane is exact.
#include "coded.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni,popcnt")))
#define INLINE static inline __attribute__((always_inline)) TARGET

enum {
    LANES = 64,
    ROWS = 4,      // of a tile of up to FEW tokens
    FEW_ROWS = 2,  // of one of more
    FEW = 2,
    TOKENS = 4,
    CHUNK = 16,    // groups whose scales are multiplied at a time
    AHEAD = 8192,  // bytes of a row's codes fetched into the second cache before they are needed
    NEAR = 1536,   // and from there into the first
};

// What is added to codes.
INLINE int offset_of(int bits) { return bits == 8 ? 128 : 8; }

INLINE __m512 read16(const void *x, int64_t i, __mmask16 valid, int dtype) {
    if (dtype == NM_F32) return _mm512_maskz_loadu_ps(valid, (const float *)x + i);
    __m256i half = _mm256_maskz_loadu_epi16(valid, (const uint16_t *)x + i);
    if (dtype == NM_F16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// Sixteen numbers, of which those of `valid` are written.
INLINE void write16(void *to, int64_t i, __mmask16 valid, __m512 v, int dtype) {
    if (dtype == NM_F32) {
        _mm512_mask_storeu_ps((float *)to + i, valid, v);
        return;
    }
    __m256i half;
    if (dtype == NM_F16) {
        half = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {  // as nm_to_bf16: the instruction for it is another set's
        __m512i bits = _mm512_castps_si512(v), high = _mm512_srli_epi32(bits, 16);
        __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
        __m512i rounded = _mm512_srli_epi32(
            _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
        __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        half = _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40)));
    }
    _mm256_mask_storeu_epi16((uint16_t *)to + i, valid, half);
}

// Rows [first, last) of y of their sums, of which there is one for every token.
INLINE void write_sums(const nm_coded *p, const float *sums, int64_t first, int64_t last, int dtype) {
    for (int64_t t = 0; t < p->tokens; t++)
        for (int64_t i = first; i < last; i += 16) {
            __mmask16 valid = last - i >= 16 ? 0xffff : (__mmask16)((1u << (last - i)) - 1);
            __m512 sum = _mm512_maskz_loadu_ps(valid, sums + t * p->out + i);
            if (p->bias) sum = _mm512_add_ps(sum, read16(p->bias, i, valid, dtype));
            write16(p->y, t * p->out + i, valid, sum, dtype);
        }
}

TARGET static void write_rows(const nm_coded *p, const float *sums, int64_t first, int64_t last) {
    if (p->dtype == NM_F32) write_sums(p, sums, first, last, NM_F32);
    else if (p->dtype == NM_F16) write_sums(p, sums, first, last, NM_F16);
    else write_sums(p, sums, first, last, NM_BF16);
}

INLINE void round_token(const nm_coded *p, int64_t t, const nm_rounded *to, int dtype) {
    for (int64_t g = 0; g < to->scales; g++) {
        int64_t first = g * p->group, count = nm_min(p->group, p->in - first), from = t * p->in + first;
        int8_t *codes = to->codes + t * to->padded + first;
        __m512 largest = _mm512_setzero_ps();
        __mmask16 nan = 0;
        for (int64_t i = 0; i < count; i += 16) {
            __mmask16 valid = count - i >= 16 ? 0xffff : (__mmask16)((1u << (count - i)) - 1);
            __m512 x = read16(p->x, from + i, valid, dtype);
            nan |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
            largest = _mm512_max_ps(largest, _mm512_abs_ps(x));
        }
        float most = nan ? __builtin_nanf("") : _mm512_reduce_max_ps(largest);
        __m512 inverse = _mm512_set1_ps(most > 0 ? 127 / most : 0);
        to->scale[t * to->scales + g] = most / 127;
        for (int64_t i = 0; i < p->group; i += 16) {
            int64_t left = count - i;
            __mmask16 valid = left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
            __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(read16(p->x, from + i, valid, dtype), inverse));
            _mm_storeu_si128((__m128i *)(codes + i), _mm512_cvtepi32_epi8(whole));
        }
        __m512i sum = _mm512_setzero_si512();
        for (int64_t i = 0; i < p->group; i += LANES)
            sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_loadu_si512(codes + i));
        __m512i below = _mm512_mullo_epi32(sum, _mm512_set1_epi32(-offset_of(p->bits)));
        _mm512_storeu_si512(to->below + (t * to->scales + g) * 16, below);
    }
}

TARGET static void round_all(const nm_coded *p, const nm_rounded *to) {
    for (int64_t t = 0; t < p->tokens; t++)
        if (p->dtype == NM_F32) round_token(p, t, to, NM_F32);
        else if (p->dtype == NM_F16) round_token(p, t, to, NM_F16);
        else round_token(p, t, to, NM_BF16);
}

// Sixty-four codes and OFFSET each, of which the first `step` are those that follow; at most 64 bytes are read.
INLINE __m512i read_codes(const uint8_t *v, int step, int bits) {
    if (bits == 8) {
        if (step <= 16)
            return _mm512_castsi128_si512(_mm_xor_si128(_mm_loadu_si128((const __m128i *)v), _mm_set1_epi8((char)128)));
        if (step <= 32)
            return _mm512_castsi256_si512(
                _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)v), _mm256_set1_epi8((char)128)));
        return _mm512_xor_si512(_mm512_loadu_si512(v), _mm512_set1_epi8((char)128));
    }
    // Every four bytes hold eight codes, which go to eight bytes: vpmultishiftqb picks them by their first bit.
    const int64_t shifts = 0x1c1814100c080400;
    if (step <= 16) {
        __m128i pairs = _mm_cvtepu32_epi64(_mm_loadl_epi64((const __m128i *)v));
        return _mm512_castsi128_si512(
            _mm_and_si128(_mm_multishift_epi64_epi8(_mm_set1_epi64x(shifts), pairs), _mm_set1_epi8(15)));
    }
    if (step <= 32) {
        __m256i pairs = _mm256_cvtepu32_epi64(_mm_loadu_si128((const __m128i *)v));
        return _mm512_castsi256_si512(
            _mm256_and_si256(_mm256_multishift_epi64_epi8(_mm256_set1_epi64x(shifts), pairs), _mm256_set1_epi8(15)));
    }
    __m512i pairs = _mm512_cvtepu32_epi64(_mm256_loadu_si256((const __m256i *)v));
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(_mm512_set1_epi64(shifts), pairs), _mm512_set1_epi8(15));
}

typedef struct {
    const uint8_t *v[ROWS], *meta[ROWS];
    const uint16_t *scale[ROWS];
    const int8_t *x[TOKENS];
    const int32_t *below[TOKENS];
    __m512 sum[ROWS][TOKENS];
} tile_state;

// Scales of `groups` groups of every row, times those of every token.
INLINE void multiply_scales(const tile_state *s, const nm_rounded *x, int64_t g, int64_t groups, int count, int64_t t0,
                            int tokens, float (*by)[TOKENS][CHUNK]) {
    __mmask16 there = (__mmask16)((1u << groups) - 1);
    for (int r = 0; r < count; r++) {
        __m256i half = _mm256_maskz_loadu_epi16(there, s->scale[r] + g);
        __m512 own = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
        for (int t = 0; t < tokens; t++)
            _mm512_storeu_ps(by[r][t],
                             _mm512_mul_ps(own, _mm512_maskz_loadu_ps(there, x->scale + (t0 + t) * x->scales + g)));
    }
}

// One group of inputs, sixty-four columns `times`.
INLINE void group_of(tile_state *s, int64_t times, int count, int tokens, int step, int bits, int dense,
                     float (*by)[TOKENS][CHUNK], int64_t place) {
    const __m512i offset = _mm512_set1_epi8((char)offset_of(bits));
    __m512i exact[ROWS][TOKENS];
    for (int t = 0; t < tokens; t++) {
        __m512i below = _mm512_loadu_si512(s->below[t]);
        s->below[t] += 16;
        for (int r = 0; r < count; r++) exact[r][t] = below;
    }
    for (int64_t i = 0; i < times; i++) {
        __m512i w[ROWS];
        for (int r = 0; r < count; r++) {
            // Bits beyond the row's last column, and codes beyond its last, meet activations that are zero.
            w[r] = read_codes(s->v[r], step, bits);
            s->v[r] += step * bits / 8;
            if (!dense) {
                uint64_t kept;
                memcpy(&kept, s->meta[r], 8);
                s->meta[r] += LANES / 8;
                w[r] = _mm512_mask_expand_epi8(offset, kept, w[r]);
            }
        }
        for (int t = 0; t < tokens; t++) {
            __m512i xv = _mm512_loadu_si512(s->x[t]);
            s->x[t] += LANES;
            for (int r = 0; r < count; r++) exact[r][t] = _mm512_dpbusd_epi32(exact[r][t], w[r], xv);
        }
    }
    for (int r = 0; r < count; r++)
        for (int t = 0; t < tokens; t++)
            s->sum[r][t] =
                _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact[r][t]), _mm512_set1_ps(by[r][t][place]), s->sum[r][t]);
}

// The sums of the lanes of four vectors.
INLINE __m128 add_four(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512 each = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(each), _mm512_extractf32x8_ps(each, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// `count` rows, `stride` apart, by `tokens` tokens: one tile of `sums` (tokens, out). `step` codes are kept of 64 positions. `group`: of
// inputs that share a scale, or 0 where their number varies.
INLINE void tile(const nm_coded *p, const nm_rows *rows, const nm_rounded *x, float *sums, int64_t r0, int64_t stride, int count,
                 int64_t t0, int tokens, int step, int bits, int dense, int64_t group) {
    tile_state s;
    float by[ROWS][TOKENS][CHUNK];
    for (int r = 0; r < count; r++) {
        int64_t row = r0 + r * stride;
        s.v[r] = nm_row_values(rows, row);
        s.meta[r] = dense ? NULL : nm_row_meta(rows, row);
        s.scale[r] = p->scale + row * x->scales;
        for (int t = 0; t < tokens; t++) s.sum[r][t] = _mm512_setzero_ps();
    }
    for (int t = 0; t < tokens; t++) {
        s.x[t] = x->codes + (t0 + t) * x->padded;
        s.below[t] = x->below + (t0 + t) * x->scales * 16;
    }
    int64_t size = group ? group : p->group, whole = p->in / size;
    for (int64_t g0 = 0; g0 < x->scales; g0 += CHUNK) {
        int64_t groups = nm_min(CHUNK, x->scales - g0), last = nm_min(g0 + groups, whole);
        multiply_scales(&s, x, g0, groups, count, t0, tokens, by);
        for (int64_t g = g0; g < last; g++) {
            for (int r = 0; r < count; r++) {
                for (int64_t i = 0; i < size / LANES * step * bits / 8; i += 64) {
                    _mm_prefetch((const char *)s.v[r] + AHEAD + i, _MM_HINT_T1);
                    _mm_prefetch((const char *)s.v[r] + NEAR + i, _MM_HINT_T0);
                }
            }
            group_of(&s, size / LANES, count, tokens, step, bits, dense, by, g - g0);
        }
        if (g0 + groups > whole)
            group_of(&s, (p->in - whole * size + LANES - 1) / LANES, count, tokens, step, bits, dense, by, whole - g0);
    }
    for (int t = 0; t < tokens; t++) {
        float own[ROWS], *to = sums + (t0 + t) * p->out + r0;
        if (count == ROWS) _mm_storeu_ps(own, add_four(s.sum[0][t], s.sum[1][t], s.sum[2][t], s.sum[3][t]));
        for (int r = 0; r < count; r++) to[r * stride] = count == ROWS ? own[r] : _mm512_reduce_add_ps(s.sum[r][t]);
    }
}

#define TILE(R, T) \
    case T: \
        tile(p, rows, x, sums, r0, stride, R, t0, T, step, bits, dense, group); \
        break;

// How many of the tokens that are left to take next: `most`, and of few more than that one half.
INLINE int64_t next_share(int64_t left, int64_t most) {
    return left <= most ? left : left < 2 * most ? (left + 1) / 2 : most;
}

INLINE void block(const nm_coded *p, const nm_rows *rows, const nm_rounded *x, float *sums, int64_t r0, int64_t stride, int count,
                  int step, int bits, int dense, int64_t group) {
    for (int64_t t0 = 0, tokens; t0 < p->tokens; t0 += tokens) {
        tokens = next_share(p->tokens - t0, TOKENS);
        if (count == ROWS) {
            switch (tokens) { TILE(ROWS, 1) TILE(ROWS, 2) }
        } else if (count == FEW_ROWS) {
            switch (tokens) { TILE(FEW_ROWS, 1) TILE(FEW_ROWS, 2) TILE(FEW_ROWS, 3) TILE(FEW_ROWS, 4) }
        } else {
            switch (tokens) { TILE(1, 1) TILE(1, 2) TILE(1, 3) TILE(1, 4) }
        }
    }
}

// Rows [first, last), in stripes that advance together, as in avx512bf16.c.
INLINE void stripes(const nm_coded *p, const nm_rows *rows, const nm_rounded *x, float *sums, int64_t first, int64_t last, int count,
                    int step, int bits, int dense, int64_t group) {
    int64_t stride = (last - first) / count;
    for (int64_t r = first; r < first + stride; r++) block(p, rows, x, sums, r, stride, count, step, bits, dense, group);
    for (int64_t r = first + stride * count; r < last; r++) block(p, rows, x, sums, r, 1, 1, step, bits, dense, group);
}

#define LOOP(name, step, bits, dense, group) \
    TARGET static void name(const nm_coded *p, const nm_rows *rows, const nm_rounded *x, float *sums) { \
        int threads = nm_coded_threads(p); \
        _Pragma("omp parallel for schedule(static) num_threads(threads)") \
        for (int64_t i = 0; i < threads; i++) { \
            int64_t first = p->out * i / threads, last = p->out * (i + 1) / threads; \
            if (p->tokens <= FEW) stripes(p, rows, x, sums, first, last, ROWS, step, bits, dense, group); \
            else stripes(p, rows, x, sums, first, last, FEW_ROWS, step, bits, dense, group); \
            write_rows(p, sums, first, last); \
        } \
    }
LOOP(half_8_128, 32, 8, 0, 128)
LOOP(half_4_128, 32, 4, 0, 128)
LOOP(half_8, 32, 8, 0, 0)
LOOP(half_4, 32, 4, 0, 0)
LOOP(any_8, LANES / p->m * p->n, 8, 0, 0)
LOOP(any_4, LANES / p->m * p->n, 4, 0, 0)
LOOP(all_8_128, 64, 8, 1, 128)
LOOP(all_4_128, 64, 4, 1, 128)
LOOP(all_8, 64, 8, 1, 0)
LOOP(all_4, 64, 4, 1, 0)

typedef void (*loop)(const nm_coded *, const nm_rows *, const nm_rounded *, float *);

static loop loop_for(const nm_coded *p) {
    int eight = p->bits == 8;
    if (!p->meta) return p->group == 128 ? (eight ? all_8_128 : all_4_128) : eight ? all_8 : all_4;
    if (2 * p->n != p->m) return eight ? any_8 : any_4;
    return p->group == 128 ? (eight ? half_8_128 : half_4_128) : eight ? half_8 : half_4;
}

INLINE void decode_row(const uint8_t *codes, const uint16_t *scale, void *to, int64_t width, int64_t per_scale,
                       int64_t scales, int bits, int dtype) {
    for (int64_t g = 0; g < scales; g++) {
        __m512 s = _mm512_set1_ps(nm_from_bf16(scale[g]));
        int64_t last = nm_min(width, (g + 1) * per_scale);
        for (int64_t i = g * per_scale; i < last; i += 16) {
            __mmask16 valid = last - i >= 16 ? 0xffff : (__mmask16)((1u << (last - i)) - 1);
            __m128i whole;
            if (bits == 8) {
                whole = _mm_maskz_loadu_epi8(valid, codes + i);
            } else {
                __m128i pairs = _mm_maskz_loadu_epi8((__mmask16)((1u << (nm_min(last - i, 16) + 1) / 2) - 1), codes + i / 2);
                pairs = _mm_cvtepu8_epi16(pairs);
                pairs = _mm_and_si128(_mm_or_si128(pairs, _mm_slli_epi16(pairs, 4)), _mm_set1_epi8(15));
                whole = _mm_sub_epi8(pairs, _mm_set1_epi8(8));
            }
            write16(to, i, valid, _mm512_mul_ps(s, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(whole))), dtype);
        }
    }
}

#define DECODE(bits, dtype) \
    decode_row(codes + row * bytes, scale + row * scales, (char *)values + row * width * nm_size(dtype), width, per_scale, \
               scales, bits, dtype)

TARGET static void decode_any(const uint8_t *codes, const uint16_t *scale, void *values, int64_t row, int64_t bytes,
                              int64_t width, int64_t per_scale, int64_t scales, int bits, int dtype) {
    if (bits == 8) {
        if (dtype == NM_BF16) DECODE(8, NM_BF16);
        else if (dtype == NM_F16) DECODE(8, NM_F16);
        else DECODE(8, NM_F32);
    } else {
        if (dtype == NM_BF16) DECODE(4, NM_BF16);
        else if (dtype == NM_F16) DECODE(4, NM_F16);
        else DECODE(4, NM_F32);
    }
}

void nm_decode_avx512(const uint8_t *codes, const uint16_t *scale, void *values, int64_t out, int64_t width,
                      int64_t per_scale, int64_t scales, int bits, int dtype, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < out; row++)
        decode_any(codes, scale, values, row, (width * bits + 7) / 8, width, per_scale, scales, bits, dtype);
}

int nm_coded_avx512(const nm_coded *p) {
    nm_rounded x;
    nm_rows rows;
    float *sums = nm_alloc((size_t)(p->tokens * p->out) * sizeof(float));
    if (!sums || nm_rounded_open(&x, p)) {
        nm_free(sums);
        return -1;
    }
    // A row's last codes are read 64 bytes at a time, and its last bits 8.
    if (nm_rows_of(&rows, p->codes, nm_code_bytes(p), p->meta ? p->meta : NULL, p->meta ? nm_meta_width(p->in) : 0,
                   p->out, 64)) {
        nm_rounded_close(&x);
        nm_free(sums);
        return -1;
    }
    round_all(p, &x);
    loop_for(p)(p, &rows, &x, sums);
    nm_rows_close(&rows);
    nm_rounded_close(&x);
    nm_free(sums);
    return 0;
}
#endif
