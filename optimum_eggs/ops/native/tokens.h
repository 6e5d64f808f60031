// Tokens as vectors: x, (tokens, in), packed once so that sixteen tokens lie side by side, and sums stored back.
//
// The includer defines TARGET, a target attribute of AVX-512 BF16.
#ifndef EGGS_TOKENS_H
#define EGGS_TOKENS_H

#include <immintrin.h>

enum { TOKENS_SIDE = 16, TOKENS_DEPTH = 32 };  // tokens of a vector; columns that are packed at a time

// 16 rows of 16 dwords to their transpose.
static inline __attribute__((always_inline)) TARGET void tokens_transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

// 32 columns of 16 tokens: 16 vectors, `stride` bytes apart, each of one pair of columns for all tokens; zeros beyond the
// tokens and the columns.
TARGET static void tokens_pack(const nm_problem *p, int64_t t0, int64_t column, char *to, int64_t stride) {
    __m512i rows[16];
    int64_t left = p->in - column;
    __mmask32 valid = left >= TOKENS_DEPTH ? 0xffffffffu : (1u << left) - 1;
    const uint16_t *x = (const uint16_t *)p->x + column;
    for (int t = 0; t < TOKENS_SIDE; t++)
        rows[t] = t0 + t < p->tokens ? _mm512_maskz_loadu_epi16(valid, x + (t0 + t) * p->in) : _mm512_setzero_si512();
    tokens_transpose(rows);
    for (int i = 0; i < TOKENS_SIDE; i++) _mm512_storeu_si512(to + stride * i, rows[i]);
}

// Sums of 16 rows, `stride` floats apart, of 16 tokens each, to y, (tokens, out).
TARGET static void tokens_store(const nm_problem *p, const float *sums, int64_t stride, int64_t r0, int64_t t0,
                                int64_t tokens) {
    __m512i rows[16];
    int64_t left = p->out - r0;
    __mmask16 valid = left >= TOKENS_SIDE ? 0xffff : (__mmask16)((1u << left) - 1);
    __m512 bias = _mm512_setzero_ps();
    if (p->bias) {
        __m256i half = _mm256_maskz_loadu_epi16(valid, (const uint16_t *)p->bias + r0);
        bias = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    for (int i = 0; i < 16; i++) rows[i] = _mm512_loadu_si512(sums + stride * i);
    tokens_transpose(rows);
    for (int64_t t = 0; t < nm_min(tokens, TOKENS_SIDE); t++) {
        __m256bh half = _mm512_cvtneps_pbh(_mm512_add_ps(_mm512_castsi512_ps(rows[t]), bias));
        _mm256_mask_storeu_epi16((uint16_t *)p->y + (t0 + t) * p->out + r0, valid, (__m256i)half);
    }
}
#endif
