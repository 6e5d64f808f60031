// The kept values of dense rows: what unpacking undoes. Plain C, since a row's bits say where every copy goes.
#include "nm.h"

#include <string.h>

static void pack_row(const char *dense, const uint8_t *meta, char *to, int64_t in, int64_t width, int size) {
    int64_t at = 0;
    for (int64_t column = 0; column < in && at < width; column += 8) {
        unsigned bits = meta[column / 8];
        if (in - column < 8) bits &= (1u << (in - column)) - 1;
        for (; bits && at < width; bits &= bits - 1, at++) {
            int64_t from = column + __builtin_ctz(bits);
            if (size == 2) ((uint16_t *)to)[at] = ((const uint16_t *)dense)[from];
            else ((uint32_t *)to)[at] = ((const uint32_t *)dense)[from];
        }
    }
    memset(to + at * size, 0, (size_t)((width - at) * size));  // bits that lie about their number
}

void nm_pack(const void *dense, const uint8_t *meta, void *values, int64_t out, int64_t in, int64_t width, int size,
             int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < out; row++)
        pack_row((const char *)dense + row * in * size, meta + row * nm_meta_width(in),
                 (char *)values + row * width * size, in, width, size);
}
