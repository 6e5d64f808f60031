// AVX-512 VNNI and VBMI2: sixty-four positions at a time, codes spread by vpexpandb and multiplied by vpdpbusd.
#include "coded.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512vnni,popcnt")))
#define INLINE static inline __attribute__((always_inline)) TARGET

enum { LANES = 64, ROWS = 4, TOKENS = 4, AHEAD = 4096 };

INLINE __m512 read16(const void *x, int64_t i, __mmask16 valid, int dtype) {
    if (dtype == NM_F32) return _mm512_maskz_loadu_ps(valid, (const float *)x + i);
    __m256i half = _mm256_maskz_loadu_epi16(valid, (const uint16_t *)x + i);
    if (dtype == NM_F16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
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
    }
}

TARGET static void round_all(const nm_coded *p, const nm_rounded *to) {
    for (int64_t t = 0; t < p->tokens; t++)
        if (p->dtype == NM_F32) round_token(p, t, to, NM_F32);
        else if (p->dtype == NM_F16) round_token(p, t, to, NM_F16);
        else round_token(p, t, to, NM_BF16);
}

// Sixty-four codes, of which the first `step` are those that follow; at most 64 bytes are read.
INLINE __m512i read_codes(const uint8_t *v, int step, int bits) {
    if (bits == 8)
        return step <= 16   ? _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)v))
               : step <= 32 ? _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)v))
                            : _mm512_loadu_si512(v);
    const __m512i low = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8);
    __m512i pairs = step <= 32 ? _mm512_castsi256_si512(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)v)))
                               : _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)v));
    pairs = _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4)), low);
    return _mm512_sub_epi8(pairs, eight);
}

// `count` rows, `stride` apart, by `tokens` tokens: one tile of y. `step` codes are kept of 64 positions.
INLINE void tile(const nm_coded *p, const nm_rows *rows, const nm_rounded *x, int64_t r0, int64_t stride, int count,
                 int64_t t0, int tokens, int step, int bits, int dense) {
    const __m512i offset = _mm512_set1_epi8((char)128);
    const uint8_t *v[ROWS], *meta[ROWS];
    const uint16_t *scale[ROWS];
    __m512 sum[ROWS][TOKENS];
    for (int r = 0; r < count; r++) {
        int64_t row = r0 + r * stride;
        v[r] = nm_row_values(rows, row);
        meta[r] = dense ? NULL : nm_row_meta(rows, row);
        scale[r] = p->scale + row * x->scales;
        for (int t = 0; t < tokens; t++) sum[r][t] = _mm512_setzero_ps();
    }
    const int8_t *xt = x->codes + t0 * x->padded;
    for (int64_t g = 0; g < x->scales; g++) {
        // vpdpbusd takes the activations unsigned: 128 more each, which the sum of the codes takes off again.
        __m512i exact[ROWS][TOKENS], codes[ROWS];
        for (int r = 0; r < count; r++) {
            codes[r] = _mm512_setzero_si512();
            for (int t = 0; t < tokens; t++) exact[r][t] = _mm512_setzero_si512();
        }
        for (int64_t column = g * p->group; column < (g + 1) * p->group && column < p->in; column += LANES) {
            int64_t left = p->in - column;
            uint64_t valid = left >= LANES ? ~0ull : (1ull << left) - 1;
            __m512i w[ROWS];
            for (int r = 0; r < count; r++) {
                _mm_prefetch((const char *)v[r] + AHEAD, _MM_HINT_T0);
                w[r] = read_codes(v[r], step, bits);
                v[r] += step * bits / 8;
                if (dense) {
                    w[r] = left >= LANES ? w[r] : _mm512_maskz_mov_epi8(valid, w[r]);
                } else {
                    uint64_t kept;
                    memcpy(&kept, meta[r] + column / 8, 8);
                    w[r] = _mm512_maskz_expand_epi8(kept & valid, w[r]);
                }
                codes[r] = _mm512_dpbusd_epi32(codes[r], offset, w[r]);
            }
            for (int t = 0; t < tokens; t++) {
                __m512i xv = _mm512_xor_si512(_mm512_loadu_si512(xt + t * x->padded + column), offset);
                for (int r = 0; r < count; r++) exact[r][t] = _mm512_dpbusd_epi32(exact[r][t], xv, w[r]);
            }
        }
        for (int r = 0; r < count; r++) {
            float s = nm_from_bf16(scale[r][g]);
            for (int t = 0; t < tokens; t++) {
                __m512 by = _mm512_set1_ps(s * x->scale[(t0 + t) * x->scales + g]);
                __m512 whole = _mm512_cvtepi32_ps(_mm512_sub_epi32(exact[r][t], codes[r]));
                sum[r][t] = _mm512_fmadd_ps(whole, by, sum[r][t]);
            }
        }
    }
    for (int r = 0; r < count; r++) {
        int64_t row = r0 + r * stride;
        float bias = p->bias ? nm_read(p->bias, row, p->dtype) : 0;
        for (int t = 0; t < tokens; t++)
            nm_write(p->y, (t0 + t) * p->out + row, p->dtype, _mm512_reduce_add_ps(sum[r][t]) + bias);
    }
}

#define TILE(R, T) \
    case T: \
        tile(p, rows, x, r0, stride, R, t0, T, step, bits, dense); \
        break;
#define TILES(R) \
    switch (tokens) { TILE(R, 1) TILE(R, 2) TILE(R, 3) TILE(R, 4) }

INLINE void block(const nm_coded *p, const nm_rows *rows, const nm_rounded *x, int64_t r0, int64_t stride, int count,
                  int step, int bits, int dense) {
    int64_t parts = (p->tokens + TOKENS - 1) / TOKENS;
    for (int64_t part = 0; part < parts; part++) {
        int64_t t0 = p->tokens * part / parts, tokens = p->tokens * (part + 1) / parts - t0;
        if (count == ROWS) {
            TILES(ROWS)
        } else {
            TILES(1)
        }
    }
}

// A thread's rows are cut into stripes that advance together, as in avx512bf16.c.
#define LOOP(name, step, bits, dense) \
    TARGET static void name(const nm_coded *p, const nm_rows *rows, const nm_rounded *x) { \
        int threads = nm_coded_threads(p); \
        _Pragma("omp parallel for schedule(static) num_threads(threads)") \
        for (int64_t i = 0; i < threads; i++) { \
            int64_t first = p->out * i / threads, last = p->out * (i + 1) / threads, stride = (last - first) / ROWS; \
            for (int64_t r = first; r < first + stride; r++) block(p, rows, x, r, stride, ROWS, step, bits, dense); \
            for (int64_t r = first + stride * ROWS; r < last; r++) block(p, rows, x, r, 1, 1, step, bits, dense); \
        } \
    }
LOOP(quarter_8, 16, 8, 0)
LOOP(half_8, 32, 8, 0)
LOOP(any_8, LANES / p->m * p->n, 8, 0)
LOOP(all_8, 64, 8, 1)
LOOP(quarter_4, 16, 4, 0)
LOOP(half_4, 32, 4, 0)
LOOP(any_4, LANES / p->m * p->n, 4, 0)
LOOP(all_4, 64, 4, 1)

typedef void (*loop)(const nm_coded *, const nm_rows *, const nm_rounded *);
static const loop loops[2][4] = {{quarter_8, half_8, any_8, all_8}, {quarter_4, half_4, any_4, all_4}};

int nm_coded_avx512(const nm_coded *p) {
    nm_rounded x;
    nm_rows rows;
    if (nm_rounded_open(&x, p)) return -1;
    // A row's last codes are read 64 bytes at a time, and its last bits 8.
    if (nm_rows_of(&rows, p->codes, nm_code_bytes(p), p->meta ? p->meta : NULL, p->meta ? nm_meta_width(p->in) : 0,
                   p->out, 64)) {
        nm_rounded_close(&x);
        return -1;
    }
    round_all(p, &x);
    int step = LANES / p->m * p->n;
    loops[p->bits == 4][!p->meta ? 3 : step == 16 ? 0 : step == 32 ? 1 : 2](p, &rows, &x);
    nm_rows_close(&rows);
    nm_rounded_close(&x);
    return 0;
}
#endif
