// The loops around kernels that do not multiply what is pruned.
#include "skip.h"

#include <string.h>

// `count` rows by the tokens [t0, t0 + tokens).
static void band(const nm_problem *p, const nm_skipper *with, nm_skip_memory *s, const char *packed, int64_t r0,
                 int64_t count, int64_t t0, int64_t tokens) {
    int64_t rows = nm_round_up(count, SKIP_SIDE), passes = (tokens + with->pass - 1) / with->pass;
    memset(s->sums, 0, (size_t)(passes * rows * with->pass) * sizeof(float));
    for (int64_t column = 0; column < p->in; column += SKIP_SPAN) {
        with->order(p, s, r0, count, rows, column);
        int64_t row = column + SKIP_SPAN < p->in ? r0 : r0 + count, next = row == r0 ? column + SKIP_SPAN : 0;
        const char *ahead = (const char *)p->values + (row * p->width + next / p->m * p->n) * nm_size(p->dtype);
        for (int64_t i = 0; i < passes; i++) {
            s->ahead = i == 0 && row < p->out ? ahead : NULL;
            with->multiply(p, s, packed + i * with->pass_bytes, s->sums + i * rows * with->pass, rows, column,
                           nm_min(with->pass, tokens - i * with->pass));
        }
    }
    for (int64_t i = 0; i < passes; i++)
        with->store(p, s->sums + i * rows * with->pass, r0, count, t0 + i * with->pass,
                    nm_min(with->pass, tokens - i * with->pass));
}

int nm_skip(const nm_problem *p, const nm_skipper *with) {
    enum { SUMS_BYTES = 512 << 10 };  // of a band: half of the second cache of the processors that this is for
    int threads = nm_threads(p);
    int64_t turns = (p->tokens + SKIP_TOKENS - 1) / SKIP_TOKENS;
    int64_t chunk = nm_round_up((p->tokens + turns - 1) / turns, with->pass);
    int64_t most = nm_min(with->band, SUMS_BYTES / 4 / chunk), parts = nm_round_up((p->out + most - 1) / most, threads);
    int64_t height = nm_round_up((p->out + parts - 1) / parts, SKIP_SIDE);
    int64_t sums_bytes = height * chunk * 4, values_bytes = nm_round_up(height * with->values_bytes, 128);
    int64_t table_bytes = nm_round_up(with->table_bytes, 64), each = table_bytes + sums_bytes + values_bytes / 2 * 3;
    char *packed = nm_alloc((size_t)(chunk / with->pass * with->pass_bytes)), *memory = nm_alloc((size_t)(each * threads));
    if (packed && memory) {
#pragma omp parallel num_threads(threads)
        {
            nm_skip_memory s = {.table = memory + each * nm_thread()};
            s.sums = (float *)(s.table + table_bytes);
            s.values = (char *)s.sums + sums_bytes;
            s.where = (uint16_t *)((char *)s.values + values_bytes);
            if (with->start) with->start(&s);
            for (int64_t t0 = 0; t0 < p->tokens; t0 += chunk) {
                int64_t tokens = nm_min(chunk, p->tokens - t0);
                with->pack(p, t0, tokens, packed);
#pragma omp for schedule(static)
                for (int64_t r0 = 0; r0 < p->out; r0 += height)
                    band(p, with, &s, packed, r0, nm_min(height, p->out - r0), t0, tokens);
            }
        }
    }
    int failed = !packed || !memory;
    nm_free(packed);
    nm_free(memory);
    return failed ? -1 : 0;
}

int nm_skips_f32(const nm_problem *p) {
    return p->dtype == NM_F32 && p->n > 0 && 2 * p->n <= p->m && 64 % p->m == 0 && p->in % p->m == 0;
}
