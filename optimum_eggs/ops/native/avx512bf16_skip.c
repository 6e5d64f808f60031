// AVX-512 BF16, many tokens: what is pruned is not multiplied.
//
// Vectors hold sixteen tokens each, four of them side by side. A vector product takes two columns at once, so for a block
// of columns all pairs that a group may keep are laid side by side in a table in the first cache: six of 2:4, for each of
// the four vectors. A pair of kept values is then broadcast, and multiplied by the four vectors of its pair, whose place
// its bits tell: for 2:4 half of what a dense weight takes.
#include "skip.h"

#if defined(NM_AVX512BF16)
#include <immintrin.h>
#include <string.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define INLINE static inline __attribute__((always_inline)) TARGET
#include "tokens.h"

enum {
    SIDE = TOKENS_SIDE,
    DEPTH = TOKENS_DEPTH,
    TILES = 4,                   // vectors of tokens
    PASS = TILES * SIDE,
    LINE = TILES * 64,           // bytes of a pair in the table
    SPAN_SLOTS = SKIP_SPAN / 4,  // pairs that a row keeps of a span, at the most
    MOST_PAIRS = 16 * 6,         // of a table, behind its zeros
};

// What the columns of a unit may be paired to, and how many pairs a row keeps of a unit.
enum { TWO_FOUR, ONE_FOUR, FOUR_EIGHT };

// Columns of a unit; its pairs; pairs a row keeps of it; units of a block, whose table fills the first cache.
#define WIDTH(kind) ((kind) == TWO_FOUR ? 4 : 8)
#define PAIRS(kind) ((kind) == TWO_FOUR ? 6 : (kind) == ONE_FOUR ? 16 : 24)
#define KEPT(kind) ((kind) == FOUR_EIGHT ? 2 : 1)
#define UNITS(kind) ((kind) == TWO_FOUR ? 16 : 4)
#define SLOTS(kind) (UNITS(kind) * KEPT(kind))

// The kind of a pattern, or -1.
static int kind_of(const nm_problem *p) {
    int kind = p->n == 2 && p->m == 4   ? TWO_FOUR
               : p->n == 1 && p->m == 4 ? ONE_FOUR
               : p->n == 4 && p->m == 8 ? FOUR_EIGHT
                                        : -1;
    return kind >= 0 && p->in % WIDTH(kind) == 0 ? kind : -1;
}

int64_t nm_least_avx512bf16_skip(const nm_problem *p) {
    static const int64_t least[] = {[TWO_FOUR] = 13, [ONE_FOUR] = 9, [FOUR_EIGHT] = 64};  // measured on Zen 4
    int kind = kind_of(p);
    return kind < 0 ? 0 : least[kind];
}

// Whether the first column of a pair may be i, and the second j: kept columns are in order, one of each group of 1:4, and
// of 4:8 two more lie behind the first pair or before the second.
static inline int paired(int kind, int i, int j) {
    if (kind == TWO_FOUR) return i < j;
    if (kind == ONE_FOUR) return i < 4 && j >= 4;
    return i < j && (j <= 5 || i >= 2);
}

// The table of a block: the pairs of each unit, in the order of their first columns and then of their second.
INLINE void table(const char *pairs, char *to, int64_t units, int kind, int tiles) {
    for (int64_t u = 0; u < units; u++, pairs += WIDTH(kind) / 2 * tiles * 64, to += PAIRS(kind) * LINE)
        for (int t = 0; t < tiles; t++) {
            __m512i low[8], high[8];  // of each column, where it is the first and where it is the second
            for (int i = 0; i < WIDTH(kind) / 2; i++) {
                const char *from = pairs + 64 * (i * tiles + t);
                _mm_prefetch(from + UNITS(kind) * WIDTH(kind) / 2 * tiles * 64, _MM_HINT_T1);
                low[2 * i] = high[2 * i + 1] = _mm512_load_si512(from);
                low[2 * i + 1] = _mm512_srli_epi32(low[2 * i], 16);
                high[2 * i] = _mm512_slli_epi32(low[2 * i], 16);
            }
            char *line = to + 64 * t;
            for (int i = 0; i < WIDTH(kind); i++)
                for (int j = 0; j < WIDTH(kind); j++)
                    if (paired(kind, i, j)) {
                        _mm512_store_si512(line, _mm512_mask_blend_epi16(0xaaaaaaaa, low[i], high[j]));
                        line += LINE;
                    }
        }
}

// Where the pairs of a unit lie in the table, by its bits: sums for two nibbles, or two at once for a byte. Bits that lie
// get any place in the table.
typedef struct {
    uint16_t low[32], high[32];
    uint32_t byte[256];
} index_of_pairs;

static void list_pairs(int kind, index_of_pairs *index) {
    uint32_t order = 1, place[8][8] = {{0}};  // behind the zeros
    memset(index, 0, sizeof(*index));
    for (int i = 0; i < WIDTH(kind); i++)
        for (int j = 0; j < WIDTH(kind); j++)
            if (paired(kind, i, j)) place[i][j] = order++ * LINE;
    for (int i = 0; i < 4; i++) {
        index->high[1 << i] = (uint16_t)(i * LINE);
        index->low[1 << i] = (uint16_t)place[i][4];
    }
    if (kind == TWO_FOUR)
        for (int i = 0; i < 4; i++)
            for (int j = i + 1; j < 4; j++) index->low[1 << i | 1 << j] = (uint16_t)place[i][j];
    for (int bits = 0; kind == FOUR_EIGHT && bits < 256; bits++) {
        int at[8], count = 0;
        for (int i = 0; i < 8; i++)
            if (bits >> i & 1) at[count++] = i;
        if (count == 4) index->byte[bits] = place[at[0]][at[1]] | place[at[2]][at[3]] << 16;
    }
}

// The places of a row's pairs in a span, by its 32 bytes of bits.
INLINE void find_places(const uint8_t *bits, const index_of_pairs *index, uint16_t *where, int kind) {
    if (kind == FOUR_EIGHT) {
        for (int u = 0; u < 32; u++) {
            uint32_t two = index->byte[bits[u]] + (uint32_t)(u % 4 * PAIRS(FOUR_EIGHT) * LINE) * 0x10001u;
            memcpy(where + 2 * u, &two, 4);
        }
        return;
    }
    const short unit = (short)(PAIRS(kind) * LINE);
    __m256i all = _mm256_loadu_si256((const __m256i *)bits), nibble = _mm256_set1_epi8(15);
    __m512i even = _mm512_cvtepu8_epi16(_mm256_and_si256(all, nibble));
    __m512i odd = _mm512_cvtepu8_epi16(_mm256_and_si256(_mm256_srli_epi16(all, 4), nibble));
    __m512i low = _mm512_loadu_si512(index->low), high = _mm512_loadu_si512(index->high);
    __m512i four = _mm512_set1_epi64(0x0003000200010000);
    if (kind == ONE_FOUR) {
        __m512i found = _mm512_add_epi16(_mm512_permutexvar_epi16(even, low), _mm512_permutexvar_epi16(odd, high));
        _mm512_storeu_si512(where, _mm512_add_epi16(found, _mm512_mullo_epi16(four, _mm512_set1_epi16(unit))));
        return;
    }
    __m512i first = _mm512_permutexvar_epi16(even, low), second = _mm512_permutexvar_epi16(odd, low);
    __m512i twice = _mm512_set1_epi64(0x0006000400020000), once = _mm512_set1_epi16(1);  // units of even nibbles
    twice = _mm512_mask_add_epi16(twice, 0xf0f0f0f0, twice, _mm512_set1_epi16(8));
    first = _mm512_add_epi16(first, _mm512_mullo_epi16(twice, _mm512_set1_epi16(unit)));
    second = _mm512_add_epi16(second, _mm512_mullo_epi16(_mm512_add_epi16(twice, once), _mm512_set1_epi16(unit)));
    __m512i lower = _mm512_unpacklo_epi16(first, second), upper = _mm512_unpackhi_epi16(first, second);
    __m512i front = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), back = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
    _mm512_storeu_si512(where, _mm512_permutex2var_epi64(lower, front, upper));
    _mm512_storeu_si512(where + 32, _mm512_permutex2var_epi64(lower, back, upper));
}

// Rows up to a multiple of SIDE, and slots beyond the last column, are zeros.
INLINE void order(const nm_problem *p, const nm_skip_memory *s, int64_t r0, int64_t count, int64_t rows, int64_t column,
                  int kind) {
    const int slots = SLOTS(kind), of_span = SKIP_SPAN / WIDTH(kind) * KEPT(kind);
    const index_of_pairs *index = (const index_of_pairs *)(s->table + (MOST_PAIRS + 1) * LINE);
    int64_t skipped = column / WIDTH(kind) * KEPT(kind);
    int64_t left = nm_min(of_span, p->width / 2 - skipped), blocks = (left + slots - 1) / slots;
    for (int64_t r = 0; r < rows; r++) {
        int32_t of_row[SPAN_SLOTS] = {0};
        uint16_t places[SPAN_SLOTS] __attribute__((aligned(64))) = {0};
        const char *from = (const char *)of_row;
        if (r < count) {
            const char *v = (const char *)p->values + ((r0 + r) * p->width / 2 + skipped) * 4;
            const uint8_t *bits = p->meta + (r0 + r) * nm_meta_width(p->in) + column / 8;
            uint8_t last[SKIP_SPAN / 8] = {0};
            _mm_prefetch((const char *)bits + 2 * SKIP_SPAN / 8 - 1, _MM_HINT_T1);
            if (column == 0) _mm_prefetch((const char *)bits + 8 * nm_meta_width(p->in), _MM_HINT_T0);
            if (left == of_span) {
                from = v;
            } else {
                memcpy(of_row, v, (size_t)left * 4);
                memcpy(last, bits, (size_t)((p->in - column + 7) / 8));
                bits = last;
            }
            find_places(bits, index, places, kind);
            if (left < of_span) memset(places + left, 0, (size_t)(of_span - left) * 2);
        }
        for (int64_t k = 0; k < blocks; k++) {
            int64_t at = (k * rows + r) * slots;
            memcpy((int32_t *)s->values + at, from + k * slots * 4, (size_t)slots * 4);
            memcpy(s->where + at, places + k * slots, (size_t)slots * 2);
        }
    }
}

// Adds a block to the sums of `rows` rows, `count` of them at a time, and asks for 64 bytes of each row `ahead`.
INLINE void multiply(const int32_t *values, const uint16_t *where, const char *lines, float *sums, int64_t rows, int slots,
                     int count, int tiles, const char *ahead, int64_t stride) {
    for (int64_t r = 0; r < rows; r += count, values += count * slots, where += count * slots, sums += count * PASS) {
        if (ahead)
            for (int i = 0; i < count; i++, ahead += stride) {  // two lines, unless the file happens to align them
                _mm_prefetch(ahead, _MM_HINT_T1);
                _mm_prefetch(ahead + 63, _MM_HINT_T1);
            }
        __m512 sum[8][TILES];
        for (int i = 0; i < count; i++)
            for (int t = 0; t < tiles; t++) sum[i][t] = _mm512_load_ps(sums + i * PASS + t * SIDE);
#pragma GCC unroll 4
        for (int s = 0; s < slots; s++)
            for (int i = 0; i < count; i++) {
                const char *line = lines + where[i * slots + s];
                __m512bh both = (__m512bh)_mm512_set1_epi32(values[i * slots + s]);
                for (int t = 0; t < tiles; t++)
                    sum[i][t] = _mm512_dpbf16_ps(sum[i][t], both, (__m512bh)_mm512_load_si512(line + 64 * t));
            }
        for (int i = 0; i < count; i++)
            for (int t = 0; t < tiles; t++) _mm512_store_ps(sums + i * PASS + t * SIDE, sum[i][t]);
    }
}

// A span of a band of rows by up to PASS tokens.
INLINE void span(const nm_problem *p, const nm_skip_memory *s, const char *packed, float *sums, int64_t rows, int64_t column,
                 int kind, int tiles, int count) {
    const char *pairs = packed + column / 2 * tiles * 64;
    const int32_t *values = s->values;
    const uint16_t *where = s->where;
    int64_t units = nm_min(SKIP_SPAN, p->in - column) / WIDTH(kind), of_row = 0;  // bytes that are done
    for (int64_t u = 0; u < units; u += UNITS(kind)) {
        table(pairs + u * WIDTH(kind) / 2 * tiles * 64, s->table + LINE, nm_min(UNITS(kind), units - u), kind, tiles);
        const char *ahead = s->ahead && of_row % 64 == 0 ? s->ahead + of_row : NULL;
        multiply(values, where, s->table, sums, rows, SLOTS(kind), count, tiles, ahead, p->width * 2);
        of_row += SLOTS(kind) * 4;
        values += rows * SLOTS(kind);
        where += rows * SLOTS(kind);
    }
}

TARGET static void pack(const nm_problem *p, int64_t t0, int64_t tokens, char *to) {
    int64_t depth = (p->in + DEPTH - 1) / DEPTH, passes = (tokens + PASS - 1) / PASS, parts = nm_min(4, depth);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < passes * TILES * parts; i++) {  // a part of the columns for each turn
        int64_t pass = i / parts / TILES, t = i / parts % TILES, part = i % parts;
        int64_t tiles = nm_min(TILES, (tokens - pass * PASS + SIDE - 1) / SIDE);
        char *of_pass = to + pass * depth * SIDE * TILES * 64;
        if (t >= tiles) continue;
        for (int64_t d = depth * part / parts; d < depth * (part + 1) / parts; d++)
            tokens_pack(p, t0 + pass * PASS + t * SIDE, d * DEPTH, of_pass + (d * SIDE * tiles + t) * 64, tiles * 64);
    }
}

TARGET static void store(const nm_problem *p, const float *sums, int64_t r0, int64_t count, int64_t t0, int64_t tokens) {
    for (int64_t t = 0; t < tokens; t += SIDE)
        for (int64_t r = 0; r < count; r += SIDE)
            tokens_store(p, sums + r * PASS + t, PASS, r0 + r, t0 + t, tokens - t);
}

#define FUNCTIONS(kind) \
    static void start_##kind(const nm_skip_memory *s) { \
        memset(s->table, 0, LINE); \
        list_pairs(kind, (index_of_pairs *)(s->table + (MOST_PAIRS + 1) * LINE)); \
    } \
    TARGET static void order_##kind(const nm_problem *p, const nm_skip_memory *s, int64_t r0, int64_t count, int64_t rows, \
                                    int64_t column) { \
        order(p, s, r0, count, rows, column, kind); \
    } \
    TARGET static void multiply_##kind(const nm_problem *p, const nm_skip_memory *s, const char *packed, float *sums, \
                                       int64_t rows, int64_t column, int64_t tokens) { \
        switch ((tokens + SIDE - 1) / SIDE) { \
            case 1: span(p, s, packed, sums, rows, column, kind, 1, 8); break; \
            case 2: span(p, s, packed, sums, rows, column, kind, 2, 4); break; \
            case 3: span(p, s, packed, sums, rows, column, kind, 3, 2); break; \
            default: span(p, s, packed, sums, rows, column, kind, 4, 2); \
        } \
    }
FUNCTIONS(TWO_FOUR)
FUNCTIONS(ONE_FOUR)
FUNCTIONS(FOUR_EIGHT)

#define SKIPPER(kind) \
    { \
        .pass = PASS, .values_bytes = SPAN_SLOTS * 4, .table_bytes = (MOST_PAIRS + 1) * LINE + sizeof(index_of_pairs), \
        .band = 512, .start = start_##kind, .pack = pack, .order = order_##kind, .multiply = multiply_##kind, .store = store, \
    }
static const nm_skipper skippers[] = {SKIPPER(TWO_FOUR), SKIPPER(ONE_FOUR), SKIPPER(FOUR_EIGHT)};

int nm_linear_avx512bf16_skip(const nm_problem *p) {
    nm_skipper with = skippers[kind_of(p)];
    with.pass_bytes = nm_round_up(p->in, DEPTH) * PASS * 2;
    return nm_skip(p, &with);
}
#endif
