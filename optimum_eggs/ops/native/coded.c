// Integer values in plain C: activations to bytes, products with them, and values for other kernels.
#include "coded.h"

#include <math.h>
#include <string.h>

static void round_group(const nm_coded *p, int64_t from, int64_t count, int8_t *codes, float *scale) {
    float largest = 0;
    for (int64_t i = 0; i < count; i++) {
        float size = fabsf(nm_read(p->x, from + i, p->dtype));
        if (!(size <= largest)) largest = size;  // NaN too, once and for all
        if (largest != largest) break;
    }
    float inverse = largest > 0 ? 127 / largest : 0;  // infinite and NaN ones make all NaN, by their scale
    *scale = largest / 127;
    for (int64_t i = 0; i < count; i++) codes[i] = (int8_t)lrintf(nm_read(p->x, from + i, p->dtype) * inverse);
    memset(codes + count, 0, (size_t)(p->group - count));
}

int nm_rounded_open(nm_rounded *to, const nm_coded *p) {
    to->scales = nm_scales(p);
    to->padded = to->scales * p->group;
    int64_t groups = p->tokens * to->scales;
    size_t codes = (size_t)(p->tokens * to->padded);
    to->codes = nm_alloc(codes + (size_t)groups * (sizeof(float) + 16 * sizeof(int32_t)));
    if (!to->codes) return -1;
    to->scale = (float *)(to->codes + codes);  // codes are whole groups, so that this is aligned
    to->below = (int32_t *)(to->scale + groups);
    return 0;
}

void nm_rounded_close(nm_rounded *of) { nm_free(of->codes); }

void nm_rounded_fill(nm_rounded *to, const nm_coded *p) {
    for (int64_t t = 0; t < p->tokens; t++)
        for (int64_t g = 0; g < to->scales; g++) {
            int64_t first = g * p->group;
            round_group(p, t * p->in + first, nm_min(p->group, p->in - first), to->codes + t * to->padded + first,
                        to->scale + t * to->scales + g);
        }
}

// The product of a row with a token: an exact sum of integers for every group, scaled and added in float32.
static float product(const nm_coded *p, const nm_rounded *x, int64_t row, int64_t token) {
    const uint8_t *codes = p->codes + row * nm_code_bytes(p);
    const uint8_t *meta = p->meta ? p->meta + row * nm_meta_width(p->in) : NULL;
    const int8_t *xt = x->codes + token * x->padded;
    int64_t at = 0;
    float sum = 0;
    for (int64_t g = 0; g < x->scales; g++) {
        int64_t last = nm_min(p->in, (g + 1) * p->group);
        int32_t exact = 0;
        for (int64_t i = g * p->group; i < last && at < p->width; i++)
            if (!meta || meta[i / 8] >> (i % 8) & 1) exact += nm_code(codes, at++, p->bits) * xt[i];
        sum += (float)exact * (nm_from_bf16(p->scale[row * x->scales + g]) * x->scale[token * x->scales + g]);
    }
    return sum;
}

int nm_coded_portable(const nm_coded *p) {
    nm_rounded x;
    if (nm_rounded_open(&x, p)) return -1;
    nm_rounded_fill(&x, p);
    int threads = nm_coded_threads(p);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < p->out; row++)
        for (int64_t t = 0; t < p->tokens; t++) {
            float bias = p->bias ? nm_read(p->bias, row, p->dtype) : 0;
            nm_write(p->y, t * p->out + row, p->dtype, product(p, &x, row, t) + bias);
        }
    nm_rounded_close(&x);
    return 0;
}

void nm_decode_portable(const uint8_t *codes, const uint16_t *scale, void *values, int64_t out, int64_t width,
                        int64_t per_scale, int64_t scales, int bits, int dtype, int threads) {
    int64_t bytes = (width * bits + 7) / 8;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < out; row++)
        for (int64_t g = 0; g < scales; g++) {
            float s = nm_from_bf16(scale[row * scales + g]);
            int64_t last = nm_min(width, (g + 1) * per_scale);
            for (int64_t i = g * per_scale; i < last; i++)
                nm_write(values, row * width + i, dtype, s * (float)nm_code(codes + row * bytes, i, bits));
        }
}
