// Attention of one new token a sequence, summed in float32; written for compilers to make vectors of.
#include "attend.h"

#include <float.h>
#include <string.h>

enum {
    LANES = 16,
    TOGETHER = 4,     // positions whose values are added at a time
    WORTH = 1 << 16,  // multiplications for which a thread is worth waking
};

#define INLINE static inline __attribute__((always_inline))

INLINE void read_row(const void *from, int64_t at, int64_t dim, int dtype, float *to) {
    if (dtype == NM_F32) {
        memcpy(to, (const float *)from + at, (size_t)dim * sizeof(float));
        return;
    }
    const uint16_t *half = (const uint16_t *)from + at;
    for (int64_t i = 0; i < dim; i++) {
        uint32_t bits = (uint32_t)half[i] << 16;
        memcpy(to + i, &bits, 4);
    }
}

INLINE float dot(const float *a, const float *b, int64_t dim) {
    float lanes[LANES] = {0};
    for (int64_t i = 0; i < dim; i += LANES)
        for (int l = 0; l < LANES; l++) lanes[l] += a[i + l] * b[i + l];
    for (int half = LANES / 2; half; half /= 2)
        for (int l = 0; l < half; l++) lanes[l] += lanes[l + half];
    return lanes[0];
}

// e^x for x ≤ 0, within 2e-7 of itself: 2^k · e^r with |r| ≤ ln 2 / 2, the latter by its Taylor series.
INLINE float exponential(float x) {
    const float round = 12582912;  // 1.5 · 2^23: what is added to it is rounded, to its lowest bits
    float shifted = (x < -87 ? -87 : x) * 1.44269504f + round, whole = shifted - round, power;
    float r = (x < -87 ? -87 : x) - whole * 0.693145752f - whole * 1.42860677e-6f;
    float e = 1 + r * (1 + r * (0.5f + r * (1.66666667e-1f + r * (4.16666667e-2f + r * (8.33333333e-3f + r * 1.38888889e-3f)))));
    uint32_t bits;
    memcpy(&bits, &shifted, 4);
    bits = (bits + 127) << 23;
    memcpy(&power, &bits, 4);
    return e * power;
}

// Scores to probabilities, times their sum, which is returned; 0 if nothing may be seen. What may not has -FLT_MAX.
INLINE float soften(float *score, int64_t length) {
    float largest = -FLT_MAX, sum[LANES] = {0}, whole = 0;
    for (int64_t t = 0; t < length; t++) largest = score[t] > largest ? score[t] : largest;
    int64_t vectors = length / LANES * LANES;
    for (int64_t t = 0; t < vectors; t += LANES)
        for (int l = 0; l < LANES; l++) {
            float s = score[t + l];
            score[t + l] = s <= -FLT_MAX ? 0 : exponential(s - largest);
            sum[l] += score[t + l];
        }
    for (int64_t t = vectors; t < length; t++) {
        score[t] = score[t] <= -FLT_MAX ? 0 : exponential(score[t] - largest);
        whole += score[t];
    }
    for (int l = 0; l < LANES; l++) whole += sum[l];
    return whole;
}

// One sequence and the query heads that share keys and values. `room`: for each of the heads `length` scores, two rows and
// a number.
INLINE void attend_head(const nm_attention *p, int64_t b, int64_t h, float *room, int64_t dim, int dtype) {
    int64_t group = p->heads / p->kv_heads, length = p->length;
    float rows[TOGETHER * NM_MOST_DIM], *score = room, *q = score + group * length, *sum = q + group * dim;
    float *total = sum + group * dim;
    for (int64_t g = 0; g < group; g++) {
        read_row(p->q, b * p->q_batch + (h * group + g) * p->q_head, dim, dtype, q + g * dim);
        for (int64_t i = 0; i < dim; i++) q[g * dim + i] *= p->scale;
    }
    memset(sum, 0, (size_t)(group * dim) * sizeof(float));
    const uint8_t *allowed = p->allowed ? p->allowed + b * p->allowed_batch + h * group * p->allowed_head : NULL;
    for (int64_t t = 0; t < length; t++) {
        int any = !allowed;
        for (int64_t g = 0; !any && g < group; g++)
            any = allowed[g * p->allowed_head + t * p->allowed_position];
        if (any) read_row(p->k, b * p->k_batch + h * p->k_head + t * p->k_position, dim, dtype, rows);
        for (int64_t g = 0; g < group; g++) {
            int seen = any && (!allowed || allowed[g * p->allowed_head + t * p->allowed_position]);
            score[g * length + t] = seen ? dot(q + g * dim, rows, dim) : -FLT_MAX;
        }
    }
    for (int64_t g = 0; g < group; g++) total[g] = soften(score + g * length, length);
    for (int64_t t = 0; t < length; t += TOGETHER) {
        int64_t count = nm_min(TOGETHER, length - t);
        int any = 0;
        for (int64_t g = 0; g < group; g++)
            for (int64_t j = 0; j < count; j++) any |= score[g * length + t + j] != 0;
        if (!any) continue;
        for (int64_t j = 0; j < count; j++)
            read_row(p->v, b * p->v_batch + h * p->v_head + (t + j) * p->v_position, dim, dtype, rows + j * dim);
        for (int64_t g = 0; g < group; g++) {
            float *to = sum + g * dim, weight[TOGETHER] = {0};
            for (int64_t j = 0; j < count; j++) weight[j] = score[g * length + t + j];
            if (count == TOGETHER)
                for (int64_t i = 0; i < dim; i++)
                    to[i] += (weight[0] * rows[i] + weight[1] * rows[dim + i]) +
                             (weight[2] * rows[2 * dim + i] + weight[3] * rows[3 * dim + i]);
            else
                for (int64_t j = 0; j < count; j++)
                    for (int64_t i = 0; i < dim; i++) to[i] += weight[j] * rows[j * dim + i];
        }
    }
    for (int64_t g = 0; g < group; g++) {
        float by = total[g] != 0 ? 1 / total[g] : 0;
        for (int64_t i = 0; i < dim; i++)
            nm_write(p->y, (b * p->heads + h * group + g) * dim + i, dtype, sum[g * dim + i] * by);
    }
}

#define ATTEND(name, TARGET) \
    TARGET static void name(const nm_attention *p, int64_t b, int64_t h, float *room) { \
        if (p->dtype == NM_BF16 && p->dim == 128) attend_head(p, b, h, room, 128, NM_BF16); \
        else if (p->dtype == NM_BF16 && p->dim == 64) attend_head(p, b, h, room, 64, NM_BF16); \
        else if (p->dtype == NM_BF16) attend_head(p, b, h, room, p->dim, NM_BF16); \
        else attend_head(p, b, h, room, p->dim, NM_F32); \
    }

ATTEND(attend_portable, )
#if defined(__x86_64__)
ATTEND(attend_avx2, __attribute__((target("avx2,fma"))))
ATTEND(attend_avx512, __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))))
#endif

typedef void (*attender)(const nm_attention *, int64_t, int64_t, float *);

static attender fastest(void) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return attend_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return attend_avx2;
#endif
    return attend_portable;
}

int nm_attend(const nm_attention *p) {
    int64_t group = p->heads / p->kv_heads, each = nm_round_up(group * (p->length + 2 * p->dim + 1), 16);
    int64_t heads = p->batch * p->kv_heads, useful = heads * group * p->length * p->dim / WORTH;
    int threads = (int)nm_min(nm_min(p->threads, heads), useful < 1 ? 1 : useful);
    float *room = nm_alloc((size_t)(threads * each) * sizeof(float));
    if (!room) return -1;
    attender attend = fastest();
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < heads; i++) attend(p, i / p->kv_heads, i % p->kv_heads, room + nm_thread() * each);
    nm_free(room);
    return 0;
}
