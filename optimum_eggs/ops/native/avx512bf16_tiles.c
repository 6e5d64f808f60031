// AVX-512 BF16 + VBMI2, many tokens: weights are spread once for up to 64 tokens, and vectors hold tokens.
//
// x is packed once, so that a vector holds a pair of columns for sixteen tokens. Some rows are spread, 32 columns at a
// time, into a few lines of the cache; each pair of their columns is then broadcast and multiplied by the vectors of all
// tokens. Rows times vectors are 24 sums, which stay in registers from the first column to the last.
#include "nm.h"

#if defined(NM_AVX512BF16)
#include <immintrin.h>
#include <string.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bf16,popcnt")))
#define INLINE static inline __attribute__((always_inline)) TARGET
#include "spread.h"
#include "tokens.h"

enum {
    SIDE = TOKENS_SIDE,
    DEPTH = TOKENS_DEPTH,
    MOST_TILES = 4,  // vectors of tokens
    PASS = MOST_TILES * SIDE,
    BAND = 48,  // rows whose sums are stored together: a multiple of SIDE, and of every number of rows in a block
    AHEAD = 512,
};

// The next 32 columns of a row into its line.
INLINE const char *spread(const char *v, const char *end, const uint8_t *meta, int64_t left, int step, char *line) {
    uint32_t bits = spread_bits(meta);
    if (left < DEPTH) bits &= (1u << left) - 1;
    __m512i values = spread_read(v, step);
    _mm_prefetch(v + AHEAD, _MM_HINT_T0);
    _mm512_storeu_si512(line, _mm512_maskz_expand_epi16(bits, values));
    return spread_next(v, end, bits, step);
}

// `count` rows from r0 by `tiles` vectors of tokens. Both numbers are constants in every call.
INLINE void block(const nm_problem *p, const nm_rows *rows, const char *right, int64_t r0, int count, int tiles, int step,
                  float *sums) {
    __m512 sum[24][MOST_TILES];
    const char *v[24], *end[24];
    const uint8_t *meta[24];
    char lines[2][24][64] __attribute__((aligned(64)));
    for (int r = 0; r < count; r++) {
        v[r] = nm_row_values(rows, r0 + r);
        end[r] = v[r] + rows->row_bytes;
        meta[r] = nm_row_meta(rows, r0 + r);
        v[r] = spread(v[r], end[r], meta[r], p->in, step, lines[0][r]);
        for (int t = 0; t < tiles; t++) sum[r][t] = _mm512_setzero_ps();
    }
    int now = 0;
    for (int64_t column = 0; column < p->in; column += DEPTH, now ^= 1) {
        if (column + DEPTH < p->in)
            for (int r = 0; r < count; r++)
                v[r] = spread(v[r], end[r], meta[r] + (column + DEPTH) / 8, p->in - column - DEPTH, step,
                              lines[now ^ 1][r]);
        const char *with = right + column / 2 * tiles * 64;
#pragma GCC unroll 2
        for (int pair = 0; pair < DEPTH / 2; pair++, with += tiles * 64) {
            __m512bh x[MOST_TILES];
            for (int t = 0; t < tiles; t++) x[t] = (__m512bh)_mm512_load_si512(with + 64 * t);
            for (int r = 0; r < count; r++) {
                int both;
                memcpy(&both, &lines[now][r][4 * pair], 4);
                __m512bh w = (__m512bh)_mm512_set1_epi32(both);
                for (int t = 0; t < tiles; t++) sum[r][t] = _mm512_dpbf16_ps(sum[r][t], w, x[t]);
            }
        }
    }
    for (int r = 0; r < count; r++)
        for (int t = 0; t < tiles; t++) _mm512_storeu_ps(sums + r * PASS + t * SIDE, sum[r][t]);
}

// A band of up to 48 rows.
#define BANDS(tiles, rows_of_block, step) \
    TARGET static void band_##tiles##_##step(const nm_problem *p, const nm_rows *rows, const char *right, int64_t r0, \
                                             int64_t count, float *sums) { \
        int64_t r = 0; \
        for (; r + rows_of_block <= count; r += rows_of_block) \
            block(p, rows, right, r0 + r, rows_of_block, tiles, step, sums + r * PASS); \
        for (; r < count; r++) block(p, rows, right, r0 + r, 1, tiles, step, sums + r * PASS); \
    }
#define ALL_BANDS(step) BANDS(1, 24, step) BANDS(2, 12, step) BANDS(3, 8, step) BANDS(4, 6, step)
ALL_BANDS(8)
ALL_BANDS(16)
ALL_BANDS(24)
ALL_BANDS(0)

typedef void (*band_function)(const nm_problem *, const nm_rows *, const char *, int64_t, int64_t, float *);
#define ROW_OF_BANDS(step) {band_1_##step, band_2_##step, band_3_##step, band_4_##step}
static const band_function bands[4][MOST_TILES] = {ROW_OF_BANDS(8), ROW_OF_BANDS(16), ROW_OF_BANDS(24), ROW_OF_BANDS(0)};

int nm_linear_avx512bf16_tiles(const nm_problem *p) {
    nm_rows rows;
    int threads = nm_threads(p);
    int64_t depth = (p->in + DEPTH - 1) / DEPTH, parts = (p->out + BAND - 1) / BAND;
    int64_t most = nm_min(MOST_TILES, (p->tokens + SIDE - 1) / SIDE);
    int64_t each = (int64_t)BAND * PASS * 4;
    char *right = nm_alloc((size_t)(depth * SIDE * most * 64)), *memory = nm_alloc((size_t)(each * threads));
    int failed = !right || !memory || nm_rows_open(&rows, p, 64);
    if (!failed) {
        int step = DEPTH % p->m ? 0 : DEPTH / p->m * p->n;
        const band_function *of_tiles = bands[step == 8 ? 0 : step == 16 ? 1 : step == 24 ? 2 : 3];
#pragma omp parallel num_threads(threads)
        {
            float *sums = (float *)(memory + each * nm_thread());
            memset(sums, 0, (size_t)each);  // rows beyond the last are read, though never stored
            for (int64_t t0 = 0; t0 < p->tokens; t0 += PASS) {
                int64_t tokens = nm_min(PASS, p->tokens - t0), tiles = (tokens + SIDE - 1) / SIDE;
#pragma omp for schedule(static)
                for (int64_t i = 0; i < tiles * depth; i++)
                    tokens_pack(p, t0 + i % tiles * SIDE, i / tiles * DEPTH,
                                right + i / tiles * SIDE * tiles * 64 + i % tiles * 64, tiles * 64);
#pragma omp for schedule(static)
                for (int64_t i = 0; i < parts; i++) {
                    int64_t r0 = i * BAND, count = nm_min(BAND, p->out - r0);
                    of_tiles[tiles - 1](p, &rows, right, r0, count, sums);
                    for (int64_t r = 0; r < count; r += SIDE)
                        for (int64_t t = 0; t < tiles; t++)
                            tokens_store(p, sums + r * PASS + t * SIDE, PASS, r0 + r, t0 + t * SIDE, tokens - t * SIDE);
                }
            }
        }
        nm_rows_close(&rows);
    }
    nm_free(right);
    nm_free(memory);
    return failed ? -1 : 0;
}
#endif
