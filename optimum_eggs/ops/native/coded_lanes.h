// The product on integer values, in terms of vectors that the includer defines.
//
// BYTES positions at a time, of VB; VI sums their products in 32 bits, VF the scaled sums; TARGET, ROWS and TOKENS, and:
// codes_at, codes_spread (BYTES positions from codes that follow, by their bits), codes_unpack (32 codes of four bits),
// vi_zero, vi_dot, vf_zero, vf_add (a scaled VI), vf_sum; and round_all.

enum { CHUNK = 64, AHEAD = 2048 };

// `count` rows, `stride` apart, by `tokens` tokens: one tile of y. `step` codes are kept of 64 positions, `each` of eight,
// or 0 if that varies.
INLINE void tile(const nm_coded *p, const nm_rows *rows, const nm_rounded *x, int64_t r0, int64_t stride, int count,
                 int64_t t0, int tokens, int step, int each, int bits, int dense) {
    const uint8_t *v[ROWS], *meta[ROWS];
    const uint16_t *scale[ROWS];
    VF sum[ROWS][TOKENS];
    for (int r = 0; r < count; r++) {
        int64_t row = r0 + r * stride;
        v[r] = nm_row_values(rows, row);
        meta[r] = dense ? NULL : nm_row_meta(rows, row);
        scale[r] = p->scale + row * x->scales;
        for (int t = 0; t < tokens; t++) sum[r][t] = vf_zero();
    }
    const int8_t *xt = x->codes + t0 * x->padded;
    for (int64_t g = 0; g < x->scales; g++) {
        VI exact[ROWS][TOKENS];
        for (int r = 0; r < count; r++)
            for (int t = 0; t < tokens; t++) exact[r][t] = vi_zero();
        for (int64_t column = g * p->group; column < (g + 1) * p->group && column < p->in; column += CHUNK) {
            int64_t left = p->in - column;
            uint64_t valid = left >= CHUNK ? ~0ull : (1ull << left) - 1;
            for (int r = 0; r < count; r++) {
                __builtin_prefetch(v[r] + AHEAD);
                // Bits that lie about their number read no more than 64 codes.
                int8_t wide[CHUNK + 8];
                const int8_t *codes = (const int8_t *)v[r];
                if (bits == 4) {
                    codes_unpack(v[r], wide);
                    if (step > 32) codes_unpack(v[r] + 16, wide + 32);
                    codes = wide;
                }
                v[r] += step * bits / 8;
                uint64_t kept = ~0ull;
                if (!dense) memcpy(&kept, meta[r] + column / 8, 8);
                kept &= valid;
                for (int part = 0; part < CHUNK; part += BYTES) {
                    VB w = dense && left >= CHUNK ? codes_at(codes + part) : codes_spread(&codes, kept >> part, each);
                    for (int t = 0; t < tokens; t++) {
                        VB xv = codes_at(xt + t * x->padded + column + part);
                        exact[r][t] = vi_dot(exact[r][t], w, xv);
                    }
                }
            }
        }
        for (int r = 0; r < count; r++) {
            float s = nm_from_bf16(scale[r][g]);
            for (int t = 0; t < tokens; t++)
                sum[r][t] = vf_add(sum[r][t], exact[r][t], s * x->scale[(t0 + t) * x->scales + g]);
        }
    }
    for (int r = 0; r < count; r++) {
        int64_t row = r0 + r * stride;
        float bias = p->bias ? nm_read(p->bias, row, p->dtype) : 0;
        for (int t = 0; t < tokens; t++) nm_write(p->y, (t0 + t) * p->out + row, p->dtype, vf_sum(sum[r][t]) + bias);
    }
}

#define TILE(R, T) \
    case T: \
        tile(p, rows, x, r0, stride, R, t0, T, step, each, bits, dense); \
        break;
#define TILES(R) \
    switch (tokens) { TILE(R, 1) TILE(R, 2) TILE(R, 3) TILE(R, 4) }

INLINE void block(const nm_coded *p, const nm_rows *rows, const nm_rounded *x, int64_t r0, int64_t stride, int count,
                  int step, int each, int bits, int dense) {
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
#define LOOP(name, step, each, bits, dense) \
    TARGET static void name(const nm_coded *p, const nm_rows *rows, const nm_rounded *x) { \
        int threads = nm_coded_threads(p); \
        _Pragma("omp parallel for schedule(static) num_threads(threads)") \
        for (int64_t i = 0; i < threads; i++) { \
            int64_t first = p->out * i / threads, last = p->out * (i + 1) / threads, stride = (last - first) / ROWS; \
            for (int64_t r = first; r < first + stride; r++) \
                block(p, rows, x, r, stride, ROWS, step, each, bits, dense); \
            for (int64_t r = first + stride * ROWS; r < last; r++) block(p, rows, x, r, 1, 1, step, each, bits, dense); \
        } \
    }
LOOP(quarter_8, 16, 2, 8, 0)
LOOP(half_8, 32, 4, 8, 0)
LOOP(any_8, CHUNK / p->m * p->n, 0, 8, 0)
LOOP(all_8, 64, 8, 8, 1)
LOOP(quarter_4, 16, 2, 4, 0)
LOOP(half_4, 32, 4, 4, 0)
LOOP(any_4, CHUNK / p->m * p->n, 0, 4, 0)
LOOP(all_4, 64, 8, 4, 1)

typedef void (*loop)(const nm_coded *, const nm_rows *, const nm_rounded *);
static const loop loops[2][4] = {{quarter_8, half_8, any_8, all_8}, {quarter_4, half_4, any_4, all_4}};

// The whole of it, as one function.
#define CODED_KERNEL(kernel) \
    int kernel(const nm_coded *p) { \
        nm_rounded x; \
        nm_rows rows; \
        if (nm_rounded_open(&x, p)) return -1; \
        /* A row's last codes are read 64 bytes at a time, and its last bits 8. */ \
        if (nm_rows_of(&rows, p->codes, nm_code_bytes(p), p->meta, p->meta ? nm_meta_width(p->in) : 0, p->out, CHUNK)) { \
            nm_rounded_close(&x); \
            return -1; \
        } \
        round_all(p, &x); \
        /* The same number is kept of every eight positions where groups fit into them. */ \
        int step = CHUNK / p->m * p->n, even = 8 % p->m == 0; \
        loops[p->bits == 4][!p->meta ? 3 : even && step == 16 ? 0 : even && step == 32 ? 1 : 2](p, &rows, &x); \
        nm_rows_close(&rows); \
        nm_rounded_close(&x); \
        return 0; \
    }
