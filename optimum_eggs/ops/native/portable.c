// Any processor: plain C, one row and four tokens at a time.
#include "nm.h"

#include <string.h>

enum { BLOCK = 4 };

// Sums of up to BLOCK tokens with one row. x holds float32, (tokens, in).
static void row_sums(const nm_problem *p, const float *x, int64_t row, int tokens, float *sums) {
    const uint8_t *meta = p->meta ? p->meta + row * nm_meta_width(p->in) : NULL;
    int64_t at = row * p->width, end = at + p->width;
    for (int t = 0; t < BLOCK; t++) sums[t] = 0;
    for (int64_t column = 0; column < p->in && at < end; column += 8) {
        unsigned bits = meta ? meta[column / 8] : 0xff;
        for (int64_t i = column; bits && i < p->in && at < end; i++, bits >>= 1) {
            if (!(bits & 1)) continue;
            float w = nm_read(p->values, at++, p->dtype);
            for (int t = 0; t < tokens; t++) sums[t] += w * x[t * p->in + i];
        }
    }
}

int nm_linear_portable(const nm_problem *p) {
    const float *x = p->x;
    float *copy = NULL;
    if (p->dtype != NM_F32) {
        copy = nm_alloc((size_t)(p->tokens * p->in) * sizeof(float));
        if (!copy) return -1;
        for (int64_t i = 0; i < p->tokens * p->in; i++) copy[i] = nm_read(p->x, i, p->dtype);
        x = copy;
    }
    int threads = nm_threads(p);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < p->out; row++) {
        for (int64_t t = 0; t < p->tokens; t += BLOCK) {
            float sums[BLOCK];
            int count = (int)nm_min(BLOCK, p->tokens - t);
            row_sums(p, x + t * p->in, row, count, sums);
            for (int i = 0; i < count; i++) {
                float bias = p->bias ? nm_read(p->bias, row, p->dtype) : 0;
                nm_write(p->y, (t + i) * p->out + row, p->dtype, sums[i] + bias);
            }
        }
    }
    nm_free(copy);
    return 0;
}

void nm_unpack_portable(const void *values, const uint8_t *meta, void *dense, int64_t out, int64_t in, int64_t width,
                        int size, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < out; row++) {
        const uint8_t *bits = meta + row * nm_meta_width(in);
        const char *from = (const char *)values + row * width * size, *end = from + width * size;
        char *to = (char *)dense + row * in * size;
        memset(to, 0, (size_t)(in * size));
        for (int64_t i = 0; i < in && from < end; i++) {
            if (!(bits[i / 8] >> (i % 8) & 1)) continue;
            memcpy(to + i * size, from, (size_t)size);
            from += size;
        }
    }
}
