// The kernel in float32 lanes: LANES dense positions at a time, values spread by the bits, activations in float32.
//
// The includer defines TARGET, LANES (8 or 16), VEC, ROWS, TOKENS (the register tile), and inline functions
//   VEC lanes_zero(void), lanes_x(const float *), lanes_add(VEC, VEC), lanes_fma(VEC, VEC, VEC); float lanes_sum(VEC);
//   VEC lanes_f32(const void *, unsigned bits), lanes_f16, lanes_bf16: values, read LANES of them, spread by the bits;
//   void lanes_prefetch(const void *);
// and then LANES_KERNEL(name), which defines `static int name(const nm_problem *)`.

#include <string.h>

#define LANES_INLINE static inline __attribute__((always_inline)) TARGET

enum {
    AHEAD = 1024,        // bytes of a row's values fetched before they are needed
    GROUP = 64 / LANES,  // steps between two fetches
};

typedef struct {
    const char *values, *end;
    const uint8_t *meta;
} lanes_row;

LANES_INLINE unsigned lanes_bits(const uint8_t *meta, int step) {
    if (step == LANES) return (1u << LANES) - 1;  // dense
#if LANES == 8
    return *meta;
#else
    uint16_t bits;
    memcpy(&bits, meta, 2);
    return bits;
#endif
}

LANES_INLINE VEC lanes_next(lanes_row *row, unsigned bits, int dtype, int step) {
    VEC w = dtype == NM_F32   ? lanes_f32(row->values, bits)
            : dtype == NM_F16 ? lanes_f16(row->values, bits)
                              : lanes_bf16(row->values, bits);
    int size = dtype == NM_F32 ? 4 : 2;
    row->values += (step ? step : __builtin_popcount(bits)) * size;
    if (!step && row->values > row->end) row->values = row->end;  // bits that lie about their number
    if (step != LANES) row->meta += LANES / 8;
    return w;
}

// `count_rows` rows, `stride` apart, by `tokens` tokens: one tile of y. Both numbers are constants in every call, so
// that the accumulators live in registers.
LANES_INLINE void lanes_tile(const nm_problem *p, const nm_rows *rows, const float *x, int64_t ldx, int64_t r0,
                             int64_t stride, int count_rows, int64_t t0, int tokens, int dtype, int step) {
    VEC sum[ROWS][TOKENS];
    lanes_row row[ROWS];
    const float *xt = x + t0 * ldx;
    for (int r = 0; r < count_rows; r++) {
        row[r].values = nm_row_values(rows, r0 + r * stride);
        row[r].end = row[r].values + rows->row_bytes;
        row[r].meta = nm_row_meta(rows, r0 + r * stride);
        for (int t = 0; t < (tokens > 1 ? tokens : 2); t++) sum[r][t] = lanes_zero();
    }
    int64_t column = 0;
    for (; column + GROUP * LANES <= p->in; column += GROUP * LANES) {
        for (int r = 0; r < count_rows; r++) {
            lanes_prefetch(row[r].values + AHEAD);
            if (dtype == NM_F32 && LANES == 16) lanes_prefetch(row[r].values + AHEAD + 64);
            if (step != LANES) lanes_prefetch(row[r].meta + AHEAD / (dtype == NM_F32 ? 16 : 8));
        }
        for (int step_of_group = 0; step_of_group < GROUP; step_of_group++) {
            VEC w[ROWS];
            for (int r = 0; r < count_rows; r++) w[r] = lanes_next(&row[r], lanes_bits(row[r].meta, step), dtype, step);
            for (int t = 0; t < tokens; t++) {
                VEC xv = lanes_x(xt + t * ldx + column + step_of_group * LANES);
                for (int r = 0; r < count_rows; r++) {
                    // A token alone has too short a chain: the spare sums of its rows take every other step.
                    VEC *to = tokens == 1 ? &sum[r][step_of_group % 2] : &sum[r][t];
                    *to = lanes_fma(w[r], xv, *to);
                }
            }
        }
    }
    for (; column + LANES <= p->in; column += LANES)
        for (int r = 0; r < count_rows; r++) {
            VEC w = lanes_next(&row[r], lanes_bits(row[r].meta, step), dtype, step);
            for (int t = 0; t < tokens; t++) sum[r][t] = lanes_fma(w, lanes_x(xt + t * ldx + column), sum[r][t]);
        }
    if (column < p->in) {
        unsigned valid = (1u << (p->in - column)) - 1;
        for (int r = 0; r < count_rows; r++) {
            VEC w = lanes_next(&row[r], lanes_bits(row[r].meta, step) & valid, dtype, step);
            for (int t = 0; t < tokens; t++) sum[r][t] = lanes_fma(w, lanes_x(xt + t * ldx + column), sum[r][t]);
        }
    }
    for (int r = 0; r < count_rows; r++) {
        int64_t at = r0 + r * stride;
        if (tokens == 1) sum[r][0] = lanes_add(sum[r][0], sum[r][1]);
        float bias = p->bias ? nm_read(p->bias, at, dtype) : 0;
        for (int t = 0; t < tokens; t++) nm_write(p->y, (t0 + t) * p->out + at, dtype, lanes_sum(sum[r][t]) + bias);
    }
}

#define LANES_TILE(R, T) \
    case T: \
        lanes_tile(p, rows, x, ldx, r0, stride, R, t0, T, dtype, step); \
        break;

#define LANES_TILES(R) \
    switch (tokens) { \
        LANES_TILE(R, 1) LANES_TILE(R, 2) LANES_TILE(R, 3) LANES_TILE(R, 4) \
        LANES_MORE_TILES(R) \
    }

LANES_INLINE void lanes_rows(const nm_problem *p, const nm_rows *rows, const float *x, int64_t ldx, int64_t r0,
                             int64_t stride, int count_rows, int dtype, int step) {
    int64_t parts = (p->tokens + TOKENS - 1) / TOKENS;
    for (int64_t part = 0; part < parts; part++) {
        int64_t t0 = p->tokens * part / parts, tokens = p->tokens * (part + 1) / parts - t0;
        if (count_rows == ROWS) {
            LANES_TILES(ROWS)
        } else {
            LANES_TILES(1)
        }
    }
}

// For each dtype and step a function of its own: `step` values kept of LANES positions, LANES of a dense weight, which has
// no bits, or 0 where their number varies.
// A thread's rows are cut into stripes that advance together: several streams far apart keep more of the memory busy
// than neighbouring rows do.
#define LANES_LOOP(name, dtype, step) \
    TARGET static void name(const nm_problem *p, const nm_rows *rows, const float *x, int64_t ldx) { \
        int threads = nm_threads(p); \
        _Pragma("omp parallel for schedule(static) num_threads(threads)") \
        for (int64_t i = 0; i < threads; i++) { \
            int64_t first = p->out * i / threads, last = p->out * (i + 1) / threads, stride = (last - first) / ROWS; \
            for (int64_t r = first; r < first + stride; r++) lanes_rows(p, rows, x, ldx, r, stride, ROWS, dtype, step); \
            for (int64_t r = first + stride * ROWS; r < last; r++) lanes_rows(p, rows, x, ldx, r, 1, 1, dtype, step); \
        } \
    }

#define LANES_LOOPS(dtype, suffix) \
    LANES_LOOP(loop_all_##suffix, dtype, LANES) \
    LANES_LOOP(loop_half_##suffix, dtype, LANES / 2) \
    LANES_LOOP(loop_any_##suffix, dtype, 0)

#define LANES_KERNEL(name) \
    LANES_LOOPS(NM_F32, f32) \
    LANES_LOOPS(NM_F16, f16) \
    LANES_LOOPS(NM_BF16, bf16) \
    static int name(const nm_problem *p) { \
        nm_rows rows; \
        int64_t ldx = nm_round_up(p->in, LANES); \
        const float *x = p->x; \
        float *copy = NULL; \
        if (p->dtype != NM_F32 || ldx != p->in) { \
            copy = nm_alloc((size_t)(p->tokens * ldx) * sizeof(float)); \
            if (!copy) return -1; \
            lanes_convert(p, copy, ldx); \
            x = copy; \
        } \
        if (nm_rows_open(&rows, p, 4 * LANES)) { \
            nm_free(copy); \
            return -1; \
        } \
        int kind = !p->meta ? 0 : LANES % p->m == 0 && 2 * p->n == p->m ? 1 : 2; \
        static void (*const loops[NM_DTYPES][3])(const nm_problem *, const nm_rows *, const float *, int64_t) = { \
            [NM_F32] = {loop_all_f32, loop_half_f32, loop_any_f32}, \
            [NM_F16] = {loop_all_f16, loop_half_f16, loop_any_f16}, \
            [NM_BF16] = {loop_all_bf16, loop_half_bf16, loop_any_bf16}, \
        }; \
        loops[p->dtype][kind](p, &rows, x, ldx); \
        nm_rows_close(&rows); \
        nm_free(copy); \
        return 0; \
    }

// Activations to float32, every row padded with zeros.
TARGET static void lanes_convert(const nm_problem *p, float *to, int64_t ldx) {
    const char *from = p->x;
    int size = nm_size(p->dtype);
    for (int64_t t = 0; t < p->tokens; t++, to += ldx, from += p->in * size) {
        int64_t i = 0;
        for (; i + LANES <= p->in; i += LANES) {
            const char *at = from + i * size;
            lanes_store(to + i, p->dtype == NM_F32   ? lanes_f32(at, (1u << LANES) - 1)
                                : p->dtype == NM_F16 ? lanes_f16(at, (1u << LANES) - 1)
                                                     : lanes_bf16(at, (1u << LANES) - 1));
        }
        for (; i < p->in; i++) to[i] = nm_read(from, i, p->dtype);
        for (; i < ldx; i++) to[i] = 0;
    }
}
