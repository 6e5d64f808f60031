// Integer values: W = code · scale, with one scale for every `group` inputs of a row.
#ifndef EGGS_CODED_H
#define EGGS_CODED_H

#include "nm.h"

// y = x Wᵀ + bias. Rows of `codes` hold the values kept, signed bytes; or two of four bits a byte, the first in the low
// half, each 8 more than it stands for. x, bias and y have one dtype.
struct nm_coded {
    int dtype, bits;        // bits: 8 or 4
    const void *x;          // (tokens, in)
    const uint8_t *codes;   // (out, ⌈width · bits / 8⌉)
    const uint16_t *scale;  // (out, ⌈in / group⌉), bfloat16
    const uint8_t *meta;    // (out, ⌈in/8⌉), or NULL where all positions are kept
    const void *bias;       // (out) or NULL
    void *y;                // (tokens, out)
    int64_t tokens, out, in, width, group;  // group: a multiple of 64
    int n, m;
    int threads;
};

int nm_coded_portable(const nm_coded *p);
int nm_coded_neon(const nm_coded *p);
int nm_coded_neon_dotprod(const nm_coded *p);
int nm_coded_avx2(const nm_coded *p);
int nm_coded_avx512(const nm_coded *p);  // AVX-512 VNNI and VBMI2

// Write the values (out, width) that the codes stand for, in `dtype`; an even number of them shares a scale.
void nm_decode_portable(const uint8_t *codes, const uint16_t *scale, void *values, int64_t out, int64_t width,
                        int64_t per_scale, int64_t scales, int bits, int dtype, int threads);
void nm_decode_avx512(const uint8_t *codes, const uint16_t *scale, void *values, int64_t out, int64_t width,
                      int64_t per_scale, int64_t scales, int bits, int dtype, int threads);

static inline int64_t nm_code_bytes(const nm_coded *p) { return (p->width * p->bits + 7) / 8; }
static inline int64_t nm_scales(const nm_coded *p) { return (p->in + p->group - 1) / p->group; }

static inline int nm_code(const uint8_t *codes, int64_t i, int bits) {
    return bits == 8 ? (int8_t)codes[i] : (codes[i / 2] >> (i % 2 * 4) & 15) - 8;
}

// Activations as the kernels multiply them: signed bytes, and for every group of a token the number that one stands for.
typedef struct {
    int8_t *codes;  // (tokens, padded), zeros beyond `in`
    float *scale;   // (tokens, scales)
    int32_t *below; // (tokens, scales, 16): what lanes of a kernel's sums begin with, if it needs that
    int64_t padded, scales;
} nm_rounded;

int nm_rounded_open(nm_rounded *to, const nm_coded *p);  // its memory; 0, or -1 if there is none
void nm_rounded_fill(nm_rounded *to, const nm_coded *p);
void nm_rounded_close(nm_rounded *of);

static inline int nm_coded_threads(const nm_coded *p) {
    int64_t useful = p->out * p->width * (p->tokens > 4 ? p->tokens / 4 : 1) / 65536;
    return useful < 1 ? 1 : (int)nm_min(useful, p->threads);
}
#endif
