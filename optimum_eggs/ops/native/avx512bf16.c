// AVX-512 BF16 + VBMI2, few tokens: thirty-two positions at a time, spread by vpexpandw and multiplied by vdpbf16ps.
#include "nm.h"

#if defined(NM_AVX512BF16)
#include <immintrin.h>
#include <string.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bf16,popcnt")))
#define INLINE static inline __attribute__((always_inline)) TARGET
#include "spread.h"

enum {
    LANES = 32,
    META_LINE = 512,  // columns whose bits are one line of the cache
    ROWS = 4,
    FEW = 2,       // rows of up to two tokens
    TOKENS = 6,
    MOST = 24,     // tokens; beyond, tiles are faster
    SPARE = 6,     // tokens beyond full tiles that are faster by themselves
};

// How many bytes before their use values are fetched. The first cache of Intel and of AMD's Zen 5 keeps enough requests
// in flight; Zen 4's does not: the second is filled from further away, and the first from the second.
enum { INTEL = 2048, ZEN4 = 8192, ZEN4_NEAR = 1536, ZEN5 = 4096 };

// Fetch what is `scale` times denser than values are.
INLINE void fetch(const void *from, int scale, int ahead) {
    if (ahead == ZEN4) _mm_prefetch((const char *)from + ahead / scale, _MM_HINT_T1);
    _mm_prefetch((const char *)from + (ahead == ZEN4 ? ZEN4_NEAR : ahead) / scale, _MM_HINT_T0);
}

// The values that follow at the positions of their bits; of a dense weight they are there.
INLINE __m512bh spread(const char *v, uint32_t bits, int step) {
    __m512i read = spread_read(v, step);
    return (__m512bh)(step < LANES ? _mm512_maskz_expand_epi16(bits, read) : _mm512_maskz_mov_epi16(bits, read));
}

INLINE __m512bh load_x(const uint16_t *x) { return (__m512bh)_mm512_loadu_si512(x); }

// `count` rows, `stride` apart, by `tokens` tokens: one tile of y. Both numbers are constants in every call.
INLINE void tile(const nm_problem *p, const nm_rows *rows, const uint16_t *x, int64_t ldx, int64_t r0, int64_t stride,
                 int count, int64_t t0, int tokens, int step, int ahead) {
    __m512 sum[ROWS][TOKENS], odd[ROWS];
    const char *v[ROWS], *end[ROWS];
    const uint8_t *meta[ROWS];
    for (int r = 0; r < count; r++) {
        v[r] = nm_row_values(rows, r0 + r * stride);
        end[r] = v[r] + rows->row_bytes;
        meta[r] = nm_row_meta(rows, r0 + r * stride);
        odd[r] = _mm512_setzero_ps();
        for (int t = 0; t < tokens; t++) sum[r][t] = _mm512_setzero_ps();
    }
    x += t0 * ldx;
    int64_t column = 0;
    for (; column + 2 * LANES <= p->in; column += 2 * LANES) {
        __m512bh w[ROWS];
        for (int r = 0; r < count; r++) {
            fetch(v[r], 1, ahead);
            if (step > 16) fetch(v[r] + 64, 1, ahead);
            if (step < LANES && column % META_LINE == 0) fetch(meta[r] + column / 8, 8, ahead);
        }
        for (int half = 0; half < 2; half++) {
            for (int r = 0; r < count; r++) {
                uint32_t bits = step < LANES ? spread_bits(meta[r] + column / 8 + 4 * half) : 0xffffffffu;
                w[r] = spread(v[r], bits, step);
                v[r] = spread_next(v[r], end[r], bits, step);
            }
            for (int t = 0; t < tokens; t++) {
                __m512bh xv = load_x(x + t * ldx + column + LANES * half);
                for (int r = 0; r < count; r++) {
                    __m512 *to = tokens == 1 && half ? &odd[r] : &sum[r][t];  // a token alone has too short a chain
                    *to = _mm512_dpbf16_ps(*to, w[r], xv);
                }
            }
        }
    }
    for (; column < p->in; column += LANES) {
        uint32_t valid = column + LANES > p->in ? (1u << (p->in - column)) - 1 : 0xffffffffu;
        for (int r = 0; r < count; r++) {
            uint32_t bits = (step < LANES ? spread_bits(meta[r] + column / 8) : 0xffffffffu) & valid;
            __m512bh w = spread(v[r], bits, step);
            v[r] = spread_next(v[r], end[r], bits, step);
            for (int t = 0; t < tokens; t++)
                sum[r][t] = _mm512_dpbf16_ps(sum[r][t], w, load_x(x + t * ldx + column));
        }
    }
    for (int r = 0; r < count; r++) {
        int64_t row = r0 + r * stride;
        float bias = p->bias ? nm_read(p->bias, row, NM_BF16) : 0;
        if (tokens == 1) sum[r][0] = _mm512_add_ps(sum[r][0], odd[r]);
        for (int t = 0; t < tokens; t++)
            nm_write(p->y, (t0 + t) * p->out + row, NM_BF16, _mm512_reduce_add_ps(sum[r][t]) + bias);
    }
}

#define TILE(R, T) \
    case T: \
        tile(p, rows, x, ldx, r0, stride, R, t0, T, step, ahead); \
        break;
#define TILES(R) \
    switch (tokens) { TILE(R, 1) TILE(R, 2) TILE(R, 3) TILE(R, 4) TILE(R, 5) TILE(R, 6) }

INLINE void block(const nm_problem *p, const nm_rows *rows, const uint16_t *x, int64_t ldx, int64_t r0, int64_t stride,
                  int count, int step, int ahead) {
    int64_t parts = (p->tokens + TOKENS - 1) / TOKENS;
    for (int64_t part = 0; part < parts; part++) {
        int64_t t0 = p->tokens * part / parts, tokens = p->tokens * (part + 1) / parts - t0;
        if (count == ROWS) {
            TILES(ROWS)
        } else if (count == FEW) {
            TILES(FEW)
        } else {
            TILES(1)
        }
    }
}

// Rows [first, last), in stripes that advance together: several streams far apart keep more of the memory busy than
// neighbouring rows do.
INLINE void stripes(const nm_problem *p, const nm_rows *rows, const uint16_t *x, int64_t ldx, int64_t first,
                    int64_t last, int count, int step, int ahead) {
    int64_t stride = (last - first) / count;
    for (int64_t r = first; r < first + stride; r++) block(p, rows, x, ldx, r, stride, count, step, ahead);
    for (int64_t r = first + stride * count; r < last; r++) block(p, rows, x, ldx, r, 1, 1, step, ahead);
}

#define LOOP(name, step, ahead) \
    TARGET static void name(const nm_problem *p, const nm_rows *rows, const uint16_t *x, int64_t ldx) { \
        int threads = nm_threads(p); \
        _Pragma("omp parallel for schedule(static) num_threads(threads)") \
        for (int64_t i = 0; i < threads; i++) { \
            int64_t first = p->out * i / threads, last = p->out * (i + 1) / threads; \
            if (p->tokens <= 2) stripes(p, rows, x, ldx, first, last, FEW, step, ahead); \
            else stripes(p, rows, x, ldx, first, last, ROWS, step, ahead); \
        } \
    }
#define LOOPS(step) LOOP(intel_##step, step, INTEL) LOOP(zen4_##step, step, ZEN4) LOOP(zen5_##step, step, ZEN5)
LOOPS(8)
LOOPS(16)
LOOPS(24)
LOOPS(32)
LOOPS(0)

typedef void (*loop)(const nm_problem *, const nm_rows *, const uint16_t *, int64_t);
#define OF_STEPS(name) {name##_8, name##_16, name##_24, name##_32, name##_0}
static const loop loops[3][5] = {OF_STEPS(intel), OF_STEPS(zen4), OF_STEPS(zen5)};

static int few_tokens(const nm_problem *p) {
    nm_rows rows;
    int64_t ldx = nm_round_up(p->in, LANES);
    const uint16_t *x = p->x;
    uint16_t *copy = NULL;
    if (ldx != p->in) {
        copy = nm_alloc((size_t)(p->tokens * ldx * 2));
        if (!copy) return -1;
        memset(copy, 0, (size_t)(p->tokens * ldx * 2));
        for (int64_t t = 0; t < p->tokens; t++) memcpy(copy + t * ldx, x + t * p->in, (size_t)p->in * 2);
        x = copy;
    }
    if (nm_rows_open(&rows, p, 64)) {
        nm_free(copy);
        return -1;
    }
    int step = !p->meta ? LANES : LANES % p->m ? 0 : LANES / p->m * p->n;
    // Of AMD's processors, those before Zen 5 do not have VP2INTERSECT.
    int kind = !__builtin_cpu_is("amd") ? 0 : !__builtin_cpu_supports("avx512vp2intersect") ? 1 : 2;
    loops[kind][step == 8 ? 0 : step == 16 ? 1 : step == 24 ? 2 : step == LANES ? 3 : 4](p, &rows, x, ldx);
    nm_rows_close(&rows);
    nm_free(copy);
    return 0;
}

int nm_linear_avx512bf16(const nm_problem *p) {
    int64_t least = nm_least_avx512bf16_skip(p);
    int skips = least && p->tokens >= least;
    if (!p->meta || (p->tokens <= MOST && !skips)) return few_tokens(p);
    // Vectors of tokens hold sixteen: a few beyond the last full one cost less by themselves.
    int64_t rest = p->tokens > 16 && p->tokens % 16 <= SPARE ? p->tokens % 16 : 0;
    nm_problem many = *p, few = *p;
    many.tokens -= rest;
    few.tokens = rest;
    few.x = (const uint16_t *)p->x + many.tokens * p->in;
    few.y = (uint16_t *)p->y + many.tokens * p->out;
    int failed = skips ? nm_linear_avx512bf16_skip(&many) : nm_linear_avx512bf16_tiles(&many);
    return failed || !rest ? failed : few_tokens(&few);
}
#endif
