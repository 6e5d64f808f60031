// AMX: the weight is spread into tiles of 16 rows, a span of columns at a time, and multiplied by tiles of tokens.
//
// y is made transposed, (rows, tokens), as W · xᵀ: the weight's rows are the left operand as they are, and x is packed
// once into right operands. A thread holds a block of rows; for each span of columns it unpacks the block into its
// cache, and multiplies it by all tokens, 2 x 2 tiles in flight. Nothing larger than the block is ever unpacked.
#include "nm.h"

#if defined(NM_AMX)
#include <immintrin.h>
#include <string.h>

#define TARGET \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bf16,popcnt,amx-tile,amx-bf16")))
#define INLINE static inline __attribute__((always_inline)) TARGET

#include "spread.h"
#include "tokens.h"

enum {
    SIDE = TOKENS_SIDE,    // rows of a tile; tokens of a tile
    DEPTH = TOKENS_DEPTH,  // columns of a tile
    TILE = 1024,        // bytes of a tile
    SPAN = 16,          // tiles in a span: 512 columns
    PASS = 512,         // tokens at a time
    FEW = 4,
};

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} __attribute__((packed)) tile_config;

typedef struct {
    char *left;     // tiles of the unpacked span: [row tile][column tile]
    float *sums;    // [row tile][token tile] tiles of float32
    const char **values;
} scratch;

// A span of one row into its line of the left operands, while the span at `ahead` is fetched. Returns where the row's
// values go on.
INLINE const char *spread_row(const char *v, const char *end, const uint8_t *meta, const char *ahead,
                              const uint8_t *meta_ahead, int64_t columns, int step, char *line) {
    _mm_prefetch((const char *)meta_ahead, _MM_HINT_T0);
    for (int64_t column = 0; column < columns; column += DEPTH, line += TILE) {
        uint32_t bits = spread_bits(meta + column / 8);
        if (column + DEPTH > columns) bits &= (1u << (columns - column)) - 1;
        _mm_prefetch(ahead + column * step / DEPTH * 2, _MM_HINT_T0);
        _mm512_storeu_si512(line, _mm512_maskz_expand_epi16(bits, spread_read(v, step)));
        v += 2 * (step ? step : (int)_mm_popcnt_u32(bits));
        if (!step && v > end) v = end;  // bits that lie about their number
    }
    return v;
}

// 2 x 2 tiles (or fewer) over a span.
INLINE void multiply(const char *left, const char *right, int64_t right_stride, float *sums, int64_t sums_stride,
                     int64_t depth, int row_tiles, int token_tiles, int first) {
    if (first) {
        _tile_zero(0);
        if (token_tiles > 1) _tile_zero(1);
        if (row_tiles > 1) _tile_zero(2);
        if (row_tiles > 1 && token_tiles > 1) _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 64);
        if (token_tiles > 1) _tile_loadd(1, sums + 256, 64);
        if (row_tiles > 1) _tile_loadd(2, sums + sums_stride, 64);
        if (row_tiles > 1 && token_tiles > 1) _tile_loadd(3, sums + sums_stride + 256, 64);
    }
    for (int64_t k = 0; k < depth; k++) {
        _tile_loadd(4, left + k * TILE, 64);
        _tile_loadd(6, right + k * TILE, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (token_tiles > 1) {
            _tile_loadd(7, right + right_stride + k * TILE, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (row_tiles > 1) {
            _tile_loadd(5, left + (SPAN + k) * TILE, 64);
            _tile_dpbf16ps(2, 5, 6);
            if (token_tiles > 1) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 64);
    if (token_tiles > 1) _tile_stored(1, sums + 256, 64);
    if (row_tiles > 1) _tile_stored(2, sums + sums_stride, 64);
    if (row_tiles > 1 && token_tiles > 1) _tile_stored(3, sums + sums_stride + 256, 64);
}

// A block of rows with all tokens of the pass. right: [token tile][column tile].
INLINE void row_block(const nm_problem *p, const nm_rows *rows, const scratch *s, const char *right, int64_t r0,
                      int64_t count, int64_t t0, int64_t tokens, int step) {
    int64_t tiles = (count + SIDE - 1) / SIDE, token_tiles = (tokens + SIDE - 1) / SIDE;
    int64_t depth = (p->in + DEPTH - 1) / DEPTH;
    for (int64_t r = 0; r < count; r++) s->values[r] = nm_row_values(rows, r0 + r);
    if (count < tiles * SIDE) memset(s->left, 0, (size_t)(tiles * SPAN * TILE));
    for (int64_t k = 0; k < depth; k += SPAN) {
        int64_t deep = nm_min(SPAN, depth - k);
        for (int64_t r = 0; r < count; r++) {
            const char *end = (const char *)nm_row_values(rows, r0 + r) + rows->row_bytes;
            const uint8_t *meta = nm_row_meta(rows, r0 + r) + k * DEPTH / 8;
            char *line = s->left + r / SIDE * SPAN * TILE + r % SIDE * 64;
            int64_t columns = nm_min(deep * DEPTH, p->in - k * DEPTH);
            int more = k + SPAN < depth;  // else the next block's row
            const char *ahead = more ? s->values[r] + SPAN * 2 * step : s->values[r] + (count - 1) * rows->row_bytes;
            const uint8_t *meta_ahead = more ? meta + SPAN * DEPTH / 8 : meta + (count - 1) * rows->meta_bytes;
            s->values[r] = spread_row(s->values[r], end, meta, ahead, meta_ahead, columns, step, line);
        }
        for (int64_t t = 0; t < token_tiles; t += 2)
            for (int64_t r = 0; r < tiles; r += 2) {
                const char *from = s->left + r * SPAN * TILE, *with = right + (t * depth + k) * TILE;
                float *sums = s->sums + (r * token_tiles + t) * 256;
                int64_t strides[2] = {depth * TILE, token_tiles * 256};
                int tall = r + 1 < tiles, wide = t + 1 < token_tiles;
                if (tall && wide) multiply(from, with, strides[0], sums, strides[1], deep, 2, 2, k == 0);
                else if (tall) multiply(from, with, strides[0], sums, strides[1], deep, 2, 1, k == 0);
                else if (wide) multiply(from, with, strides[0], sums, strides[1], deep, 1, 2, k == 0);
                else multiply(from, with, strides[0], sums, strides[1], deep, 1, 1, k == 0);
            }
    }
    for (int64_t r = 0; r < tiles; r++)
        for (int64_t t = 0; t < token_tiles; t++)
            tokens_store(p, s->sums + (r * token_tiles + t) * 256, SIDE, r0 + r * SIDE, t0 + t * SIDE,
                         tokens - t * SIDE);
}

TARGET static void run(const nm_problem *p, const nm_rows *rows, char *right, char *memory, int64_t each,
                       int64_t block, int threads, int step) {
    int64_t depth = (p->in + DEPTH - 1) / DEPTH, blocks = (p->out + block - 1) / block;
#pragma omp parallel num_threads(threads)
    {
        tile_config config = {.palette = 1};
        for (int i = 0; i < 8; i++) {
            config.bytes[i] = 64;
            config.rows[i] = SIDE;
        }
        _tile_loadconfig(&config);
        for (int64_t t0 = 0; t0 < p->tokens; t0 += PASS) {
            int64_t tokens = nm_min(PASS, p->tokens - t0), token_tiles = (tokens + SIDE - 1) / SIDE;
#pragma omp for schedule(static)
            for (int64_t i = 0; i < token_tiles * depth; i++)
                tokens_pack(p, t0 + i / depth * SIDE, i % depth * DEPTH, right + i * TILE, 64);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < blocks; i++) {
                char *own = memory + each * nm_thread();
                scratch s = {own, (float *)(own + block * SPAN * 64), NULL};
                s.values = (const char **)((char *)s.sums + block * nm_round_up(nm_min(PASS, p->tokens), SIDE) * 4);
                int64_t r0 = i * block;
                row_block(p, rows, &s, right, r0, nm_min(block, p->out - r0), t0, tokens, step);
            }
        }
        _tile_release();
    }
}

int nm_linear_amx(const nm_problem *p) {
    if (p->tokens <= FEW || !p->meta) return nm_linear_avx512bf16(p);  // bound by memory, which streams read better than tiles
    nm_rows rows;
    int threads = nm_threads(p);
    int64_t most = nm_round_up(nm_min(PASS, p->tokens), SIDE), depth = (p->in + DEPTH - 1) / DEPTH;
    // Blocks of at most 128 rows, as many for every thread; of 32 where there are few tokens to reuse a block for.
    int64_t shares = threads * ((p->out + 128 * threads - 1) / (128 * threads));
    int64_t block = p->tokens > 32 ? nm_round_up((p->out + shares - 1) / shares, 32) : 32;
    int64_t each = nm_round_up(block * SPAN * 64 + block * most * 4 + block * (int64_t)sizeof(char *), 64);
    char *right = nm_alloc((size_t)(most * depth * 64)), *memory = nm_alloc((size_t)(each * threads));
    int failed = !right || !memory || nm_rows_open(&rows, p, 64);
    if (!failed) {
        int step = DEPTH % p->m ? 0 : DEPTH / p->m * p->n;
        if (step == 8) run(p, &rows, right, memory, each, block, threads, 8);
        else if (step == 16) run(p, &rows, right, memory, each, block, threads, 16);
        else run(p, &rows, right, memory, each, block, threads, 0);
        nm_rows_close(&rows);
    }
    nm_free(right);
    nm_free(memory);
    return failed ? -1 : 0;
}
#endif
