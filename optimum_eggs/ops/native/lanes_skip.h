// Many tokens in float32 lanes: what is pruned is not multiplied.
//
// A vector holds LANES tokens, four of them side by side. Each kept value is broadcast, and multiplied by the vectors of its
// column, whose place its bits tell. The includer defines what lanes.h asks for, and `VEC lanes_all(float)` and
// `void lanes_store(float *, VEC)`; LANES_SKIP(name) defines `static int name(const nm_problem *)`.
#include "skip.h"

enum {
    SKIP_TILES = 4,
    SKIP_PASS = SKIP_TILES * LANES,
    SKIP_LINE = SKIP_PASS * 4,             // bytes of a column
    SKIP_WIDTH = 64,                       // columns of a block, which stays in the first cache
    SKIP_BLOCK = SKIP_WIDTH * SKIP_PASS + SKIP_PASS,  // floats of a block: behind the columns are zeros
};

static uint16_t skip_places[256][8];  // of the columns whose bits are set

__attribute__((constructor)) static void skip_fill(void) {
    for (int bits = 0; bits < 256; bits++)
        for (int i = 0, count = 0; i < 8; i++)
            if (bits >> i & 1) skip_places[bits][count++] = (uint16_t)(i * SKIP_LINE);
}

TARGET static void skip_pack(const nm_problem *p, int64_t t0, int64_t tokens, char *to) {
    int64_t blocks = (p->in + SKIP_WIDTH - 1) / SKIP_WIDTH, passes = (tokens + SKIP_PASS - 1) / SKIP_PASS;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < passes * blocks; i++) {
        float *block = (float *)to + i * SKIP_BLOCK;
        int64_t first = i / blocks * SKIP_PASS, column = i % blocks * SKIP_WIDTH;
        int64_t some = nm_min(SKIP_PASS, tokens - first), width = nm_min(SKIP_WIDTH, p->in - column);
        memset(block + SKIP_WIDTH * SKIP_PASS, 0, SKIP_LINE);
        for (int64_t t = 0; t < some; t++) {
            const float *x = (const float *)p->x + (t0 + first + t) * p->in + column;
            for (int64_t c = 0; c < width; c++) block[c * SKIP_PASS + t] = x[c];
        }
        for (int64_t t = some; t < nm_round_up(some, LANES); t++)  // the rest of a vector
            for (int64_t c = 0; c < width; c++) block[c * SKIP_PASS + t] = 0;
    }
}

// Rows up to a multiple of SKIP_SIDE, and slots beyond the last column, are zeros.
TARGET static void skip_order(const nm_problem *p, const nm_skip_memory *s, int64_t r0, int64_t count, int64_t rows,
                              int64_t column) {
    int64_t slots = SKIP_WIDTH / p->m * p->n, last = nm_min(p->in, column + SKIP_SPAN);
    for (int64_t r = 0; r < rows; r++) {
        const float *v = (const float *)p->values + (r0 + r) * p->width + column / p->m * p->n;
        const uint8_t *meta = p->meta + (r0 + r) * nm_meta_width(p->in);
        float *to = (float *)s->values + r * slots;
        uint16_t *at = s->where + r * slots;
        for (int64_t c = column; c < last; c += SKIP_WIDTH, v += slots, to += rows * slots, at += rows * slots) {
            int64_t left = r < count ? nm_min(SKIP_WIDTH, p->in - c) / p->m * p->n : 0;
            if (left == 0) {
                memset(to, 0, (size_t)slots * 4);
                memset(at, 0, (size_t)slots * 2);
                continue;
            }
            uint8_t bits[8] = {0};
            uint16_t places[SKIP_WIDTH + 8] = {0};  // if the bits lie about their number, any place will do
            memcpy(bits, meta + c / 8, (size_t)nm_min(8, nm_meta_width(p->in) - c / 8));
            for (int byte = 0, n = 0; byte < 8; byte++) {
                for (int i = 0; i < 8; i++) places[n + i] = (uint16_t)(skip_places[bits[byte]][i] + byte * 8 * SKIP_LINE);
                n += __builtin_popcount(bits[byte]);
            }
            const char *ahead = (const char *)(v + SKIP_SPAN / p->m * p->n);
            for (int64_t i = 0; i < slots * 4; i += 64) lanes_prefetch(ahead + nm_min(i + 63, slots * 4 - 1));
            memcpy(to, v, (size_t)left * 4);
            memcpy(at, places, (size_t)slots * 2);
            for (int64_t i = left; i < slots; i++) {
                to[i] = 0;
                at[i] = SKIP_WIDTH * SKIP_LINE;
            }
        }
    }
}

// Adds a block to the sums of `rows` rows, `count` of them at a time.
LANES_INLINE void skip_rows(const float *values, const uint16_t *where, const char *lines, float *sums, int64_t rows,
                            int64_t slots, int count, int tiles) {
    for (int64_t r = 0; r < rows; r += count, values += count * slots, where += count * slots, sums += count * SKIP_PASS) {
        VEC sum[8][SKIP_TILES];
        for (int i = 0; i < count; i++)
            for (int t = 0; t < tiles; t++) sum[i][t] = lanes_x(sums + i * SKIP_PASS + t * LANES);
#pragma GCC unroll 4
        for (int64_t at = 0; at < slots; at++)
            for (int i = 0; i < count; i++) {
                const char *line = lines + where[i * slots + at];
                VEC value = lanes_all(values[i * slots + at]);
                for (int t = 0; t < tiles; t++) sum[i][t] = lanes_fma(value, lanes_x((const float *)line + t * LANES), sum[i][t]);
            }
        for (int i = 0; i < count; i++)
            for (int t = 0; t < tiles; t++) lanes_store(sums + i * SKIP_PASS + t * LANES, sum[i][t]);
    }
}

TARGET static void skip_multiply(const nm_problem *p, const nm_skip_memory *s, const char *packed, float *sums, int64_t rows,
                                 int64_t column, int64_t tokens) {
    int64_t slots = SKIP_WIDTH / p->m * p->n, last = nm_min(p->in, column + SKIP_SPAN);
    const float *values = s->values;
    const uint16_t *where = s->where;
    for (int64_t c = column; c < last; c += SKIP_WIDTH, values += rows * slots, where += rows * slots) {
        const char *lines = packed + c / SKIP_WIDTH * SKIP_BLOCK * 4;
        switch ((tokens + LANES - 1) / LANES) {
            case 1: skip_rows(values, where, lines, sums, rows, slots, 8, 1); break;
            case 2: skip_rows(values, where, lines, sums, rows, slots, 4, 2); break;
            case 3: skip_rows(values, where, lines, sums, rows, slots, 2, 3); break;
            default: skip_rows(values, where, lines, sums, rows, slots, 2, 4);
        }
    }
}

TARGET static void skip_store(const nm_problem *p, const float *sums, int64_t r0, int64_t count, int64_t t0, int64_t tokens) {
    for (int64_t r = 0; r < count; r += SKIP_SIDE) {
        int64_t some = nm_min(SKIP_SIDE, count - r);
        const float *bias = p->bias ? (const float *)p->bias + r0 + r : NULL;
        for (int64_t t = 0; t < tokens; t++) {
            float *y = (float *)p->y + (t0 + t) * p->out + r0 + r;
            for (int64_t i = 0; i < some; i++) y[i] = sums[(r + i) * SKIP_PASS + t] + (bias ? bias[i] : 0);
        }
    }
}

#define LANES_SKIP(name) \
    static int name(const nm_problem *p) { \
        int64_t blocks = (p->in + SKIP_WIDTH - 1) / SKIP_WIDTH; \
        nm_skipper with = { \
            .pass = SKIP_PASS, \
            .pass_bytes = blocks * SKIP_BLOCK * 4, \
            .values_bytes = SKIP_SPAN / p->m * p->n * 4, \
            .band = 256, \
            .pack = skip_pack, \
            .order = skip_order, \
            .multiply = skip_multiply, \
            .store = skip_store, \
        }; \
        return nm_skip(p, &with); \
    }
