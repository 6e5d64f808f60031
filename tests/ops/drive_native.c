// Runs every kernel of this processor on buffers of exactly the right size, so that a sanitizer sees a read beyond them.
// First with legal bits, against sums in double; then with random bytes for bits, which must do no harm.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attend.h"
#include "coded.h"

static uint64_t state = 1;

static uint32_t draw(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33);
}

static float uniform(void) { return (float)draw() / 1073741824.0f - 1; }

static void *exact(int64_t bytes) {
    void *memory = malloc(bytes ? (size_t)bytes : 1);
    if (!memory) exit(2);
    return memory;
}

static uint8_t *bits_of(int64_t out, int64_t in, int n, int m) {
    int64_t mw = nm_meta_width(in);
    uint8_t *meta = exact(out * mw);
    memset(meta, 0, (size_t)(out * mw));
    for (int64_t r = 0; r < out; r++)
        for (int64_t g = 0; g < in; g += m)
            for (int kept = 0; kept < n;) {
                int64_t c = g + draw() % (uint32_t)m;
                if (meta[r * mw + c / 8] >> (c % 8) & 1) continue;
                meta[r * mw + c / 8] |= (uint8_t)(1 << (c % 8));
                kept++;
            }
    return meta;
}

static void *values_of(int64_t count, int dtype) {
    void *data = exact(count * nm_size(dtype));
    for (int64_t i = 0; i < count; i++) nm_write(data, i, dtype, uniform());
    return data;
}

// With n = m the weight is dense, without bits.
static int run(int dtype, int n, int m, int64_t out, int64_t in, int64_t tokens, int threads, int lies) {
    int64_t width = in / m * n, mw = nm_meta_width(in);
    uint8_t *meta = n < m ? bits_of(out, in, n, m) : NULL;
    if (lies && meta)
        for (int64_t i = 0; i < out * mw; i++) meta[i] = (uint8_t)draw();
    void *x = values_of(tokens * in, dtype), *values = values_of(out * width, dtype), *bias = values_of(out, dtype);
    void *y = exact(tokens * out * nm_size(dtype)), *dense = exact(out * in * nm_size(dtype));
    double unit = dtype == NM_F32 ? 0x1p-24 : dtype == NM_F16 ? 0x1p-11 : 0x1p-8;
    int bad = 0;
    for (int isa = 0; isa < nm_isa_count && !bad; isa++) {
        if (!nm_isas[isa].supported()) continue;
        nm_problem p = {dtype, x, values, meta, tokens % 2 ? bias : NULL, y, tokens, out, in, width, n, m, threads};
        memset(y, 0xff, (size_t)(tokens * out * nm_size(dtype)));
        if (nm_isas[isa].linear[dtype](&p)) return 1;
        if (meta) {
            nm_isas[isa].unpack(values, meta, dense, out, in, width, nm_size(dtype), threads);
            void *packed = exact(out * width * nm_size(dtype));
            nm_pack(dense, meta, packed, out, in, width, nm_size(dtype), threads);
            if (!lies && memcmp(packed, values, (size_t)(out * width * nm_size(dtype)))) bad = 3;
            free(packed);
        }
        if (lies) continue;
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t r = 0; r < out; r++) {
                double sum = p.bias ? nm_read(bias, r, dtype) : 0, size = fabs(sum);
                int64_t at = r * width;
                for (int64_t c = 0; c < in; c++) {
                    int set = !meta || (meta[r * mw + c / 8] >> (c % 8) & 1);
                    double w = set ? nm_read(values, at++, dtype) : 0;
                    if (t == 0 && meta && nm_read(dense, r * in + c, dtype) != w) bad = 2;
                    sum += w * nm_read(x, t * in + c, dtype);
                    size += fabs(w * nm_read(x, t * in + c, dtype));
                }
                // Sums of width + 1 terms in float32, then one rounding to the dtype.
                double bound = (width + 1) * 0x1p-24 * size + unit * fabs(sum) + 1e-7;
                if (!(fabs(nm_read(y, t * out + r, dtype) - sum) <= bound)) bad = 1;
            }
        if (bad)
            printf("%s %s: dtype %d, %d:%d, out %ld, in %ld, tokens %ld\n", nm_isas[isa].name,
                   bad == 3 ? "packs wrongly" : bad == 2 ? "unpacks wrongly" : "is off", dtype, n, m, (long)out, (long)in, (long)tokens);
    }
    free(x), free(values), free(bias), free(y), free(meta), free(dense);
    return bad;
}

// Integer values; with n = m all positions are kept, without bits.
static int run_coded(int dtype, int bits, int n, int m, int64_t out, int64_t in, int64_t tokens, int64_t group, int threads,
                     int lies) {
    int64_t width = in / m * n, mw = nm_meta_width(in), bytes = (width * bits + 7) / 8, scales = (in + group - 1) / group;
    uint8_t *meta = n < m ? bits_of(out, in, n, m) : NULL, *codes = exact(out * bytes);
    for (int64_t i = 0; i < out * bytes; i++) codes[i] = (uint8_t)draw();
    for (int64_t i = 0; lies && meta && i < out * mw; i++) meta[i] = (uint8_t)draw();
    void *x = values_of(tokens * in, dtype), *bias = values_of(out, dtype), *scale = values_of(out * scales, NM_BF16);
    void *y = exact(tokens * out * nm_size(dtype)), *values = exact(out * width * nm_size(dtype));
    double unit = dtype == NM_F32 ? 0x1p-24 : dtype == NM_F16 ? 0x1p-11 : 0x1p-8;
    int bad = 0;
    for (int isa = 0; isa < nm_isa_count; isa++) {
        if (!nm_isas[isa].supported()) continue;
        memset(values, 0xff, (size_t)(out * width * nm_size(dtype)));
        nm_isas[isa].decode(codes, scale, values, out, width, group / m * n, scales, bits, dtype, threads);
        for (int64_t r = 0; r < out; r++)
            for (int64_t i = 0; i < width && !bad; i++) {
                float found = nm_read(values, r * width + i, dtype);
                float of = nm_read(scale, r * scales + i / (group / m * n), NM_BF16);
                double want = (double)of * nm_code(codes + r * bytes, i, bits);
                bad = !(fabs(found - want) <= unit * fabs(want) + 1e-7);
            }
    }
    for (int isa = 0; isa < nm_isa_count && !bad; isa++) {
        if (!nm_isas[isa].supported()) continue;
        nm_coded p = {dtype, bits, x, codes, scale, meta, tokens % 2 ? bias : NULL, y, tokens, out, in, width, group, n, m,
                      threads};
        memset(y, 0xff, (size_t)(tokens * out * nm_size(dtype)));
        if (nm_isas[isa].coded(&p)) return 1;
        if (lies) continue;
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t r = 0; r < out; r++) {
                double sum = p.bias ? nm_read(bias, r, dtype) : 0, size = fabs(sum);
                for (int64_t g = 0, at = 0; g < scales; g++) {
                    int64_t last = nm_min(in, (g + 1) * group);
                    float largest = 0, of = nm_read(scale, r * scales + g, NM_BF16);
                    for (int64_t c = g * group; c < last; c++)
                        largest = fmaxf(largest, fabsf(nm_read(x, t * in + c, dtype)));
                    for (int64_t c = g * group; c < last; c++) {
                        if (meta && !(meta[r * mw + c / 8] >> (c % 8) & 1)) continue;
                        long rounded = lrintf(nm_read(x, t * in + c, dtype) * (127 / largest));
                        double term = (double)(nm_code(codes + r * bytes, at++, bits) * rounded) * of * (largest / 127);
                        sum += term;
                        size += fabs(term);
                    }
                }
                // Sums of so many groups and lanes in float32, each scaled twice, then one rounding to the dtype.
                double bound = (scales + 64) * 0x1p-24 * size + unit * fabs(sum) + 1e-7;
                if (!(fabs(nm_read(y, t * out + r, dtype) - sum) <= bound)) bad = 1;
            }
        if (bad) printf("%s: ", nm_isas[isa].name);
    }
    if (bad)
        printf("%d bits are off: dtype %d, %d:%d, out %ld, in %ld, tokens %ld, group %ld\n", bits, dtype, n, m, (long)out,
               (long)in, (long)tokens, (long)group);
    free(x), free(codes), free(scale), free(values), free(bias), free(y), free(meta);
    return bad;
}

// Of every m scores n are kept, and none that is not is before one that is.
static int topn_is_wrong(int n, int m, int64_t groups, int threads) {
    float *score = exact(groups * m * 4);
    uint8_t *kept = exact(groups * m);
    for (int64_t i = 0; i < groups * m; i++) score[i] = (float)(draw() % 9);
    nm_topn(score, kept, groups, n, m, threads);
    int bad = 0;
    for (int64_t g = 0; g < groups; g++)
        for (int i = 0; i < m; i++) {
            int before = 0;
            for (int j = 0; j < m; j++) {
                float other = score[g * m + j], own = score[g * m + i];
                before += other > own || (other == own && j < i);
            }
            bad |= kept[g * m + i] != (before < n);
        }
    if (bad) printf("the largest are wrong: %d:%d, %ld groups\n", n, m, (long)groups);
    free(score), free(kept);
    return bad;
}

// Attention of one query a sequence, against softmax in double.
static int attention_is_wrong(int dtype, int64_t batch, int64_t kv_heads, int64_t group, int64_t length, int64_t dim, int masked,
                              int threads) {
    int64_t heads = kv_heads * group, states = batch * kv_heads * length * dim;
    void *q = values_of(batch * heads * dim, dtype), *k = values_of(states, dtype), *v = values_of(states, dtype);
    void *y = exact(batch * heads * dim * nm_size(dtype));
    uint8_t *allowed = exact(batch * length);
    double *weight = exact(length * (int64_t)sizeof(double));
    for (int64_t i = 0; i < batch * length; i++) allowed[i] = draw() % 3 > 0 && i >= length;  // none of the first sequence
    nm_attention p = {dtype, q, k, v, y, masked ? allowed : NULL, batch, heads, kv_heads, length, dim, heads * dim, dim,
                      kv_heads * length * dim, length * dim, dim, kv_heads * length * dim, length * dim, dim, length, 0, 1, 0.2f,
                      threads};
    int bad = nm_attend(&p);
    double unit = dtype == NM_F32 ? 1e-6 : 0x1p-8;
    for (int64_t b = 0; b < batch; b++)
        for (int64_t h = 0; h < heads && !bad; h++) {
            int64_t at = (b * kv_heads + h / group) * length * dim;
            double total = 0;
            for (int64_t t = 0; t < length; t++) {
                double sum = 0;
                for (int64_t i = 0; i < dim; i++)
                    sum += (double)nm_read(q, (b * heads + h) * dim + i, dtype) * nm_read(k, at + t * dim + i, dtype);
                weight[t] = masked && !allowed[b * length + t] ? 0 : exp(0.2f * sum);
                total += weight[t];
            }
            for (int64_t i = 0; i < dim; i++) {
                double want = 0;
                for (int64_t t = 0; t < length && total > 0; t++)
                    want += weight[t] / total * nm_read(v, at + t * dim + i, dtype);
                bad |= !(fabs(nm_read(y, (b * heads + h) * dim + i, dtype) - want) <= unit * (1 + fabs(want)));
            }
        }
    if (bad)
        printf("attention is off: dtype %d, batch %ld, heads %ld of %ld, length %ld, dim %ld\n", dtype, (long)batch, (long)heads,
               (long)kv_heads, (long)length, (long)dim);
    free(q), free(k), free(v), free(y), free(allowed), free(weight);
    return bad;
}

int main(void) {
    static const int patterns[][2] = {{2, 4}, {1, 4}, {4, 8}, {6, 8}, {1, 2}, {5, 16}, {17, 32}, {16, 32}};
    static const int tokens[] = {0, 1, 2, 3, 5, 7, 16, 17, 28, 33, 47, 63, 70};
    int problems = 0;
    for (unsigned i = 0; i < sizeof patterns / sizeof *patterns; i++)
        for (unsigned t = 0; t < sizeof tokens / sizeof *tokens; t++)
            if (patterns[i][1] <= NM_TOPN_LARGEST && topn_is_wrong(patterns[i][0], patterns[i][1], tokens[t], 1 + t % 3))
                return 1;
    for (int i = 0; i < 200; i++)
        if (attention_is_wrong(i % 2 ? NM_F32 : NM_BF16, 1 + draw() % 3, 1 + draw() % 3, 1 + draw() % 7, 1 + draw() % 90,
                               16 * (1 + draw() % 16), i % 3 > 0, 1 + (int)(draw() % 4)))
            return 1;
    for (unsigned i = 0; i < sizeof patterns / sizeof *patterns; i++)
        for (int dtype = 0; dtype < NM_DTYPES; dtype++)
            for (unsigned t = 0; t < sizeof tokens / sizeof *tokens; t++)
                for (int lies = 0; lies < 2; lies++, problems++) {
                    int n = patterns[i][0], m = patterns[i][1];
                    int64_t out = 1 + draw() % 70, in = m * (1 + draw() % (uint32_t)(700 / m));
                    int threads = 1 + (int)(draw() % 4);
                    int64_t group = 64 << draw() % 3;
                    if (run(dtype, n, m, out, in, tokens[t], threads, lies)) return 1;
                    if (!lies && run(dtype, m, m, out, in, tokens[t], threads, 0)) return 1;
                    for (int bits = 4; bits <= 8; bits += 4)
                        if (run_coded(dtype, bits, n, m, out, in, tokens[t], group, threads, lies) ||
                            run_coded(dtype, bits, m, m, out, in, tokens[t], group, threads, lies))
                            return 1;
                }
    for (int i = 0; i < 24; i++, problems++) {  // many tokens: more than are packed at a time, and a few beyond a vector
        int n = patterns[i % 3][0], m = patterns[i % 3][1];
        int64_t in = m * (1 + draw() % (uint32_t)(600 / m));
        if (run(i < 12 ? NM_BF16 : NM_F32, n, m, 1 + draw() % 40, in, i % 2 ? 135 : 519, 1 + i % 3, i % 4 > 1)) return 1;
    }
    printf("%d problems:", problems);
    for (int isa = 0; isa < nm_isa_count; isa++)
        if (nm_isas[isa].supported()) printf(" %s", nm_isas[isa].name);
    printf("\n");
    return 0;
}
