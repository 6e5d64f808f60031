// The n largest of every m scores: what a solver asks for at every step.
#include "nm.h"

enum { BLOCK = 64 };  // groups side by side, so that compilers vectorise over them

// Every pair of a group is compared; `larger` counts what goes before.
static void topn_block(const float *score, uint8_t *kept, int groups, int n, int m) {
    float place[NM_TOPN_LARGEST][BLOCK];
    int32_t larger[NM_TOPN_LARGEST][BLOCK];
    for (int i = 0; i < m; i++)
        for (int g = 0; g < BLOCK; g++) {
            place[i][g] = g < groups ? score[g * m + i] : 0;
            larger[i][g] = 0;
        }
    for (int i = 0; i < m; i++)
        for (int j = i + 1; j < m; j++)
            for (int g = 0; g < BLOCK; g++) {
                int32_t first = place[i][g] >= place[j][g];
                larger[j][g] += first;
                larger[i][g] += 1 - first;
            }
    for (int g = 0; g < groups; g++)
        for (int i = 0; i < m; i++) kept[g * m + i] = larger[i][g] < n;
}

// With a constant m the loop over a group unrolls, and small groups need no copies.
static void topn_fours(const float *score, uint8_t *kept, int groups, int n) {
    for (int g = 0; g < groups; g++, score += 4, kept += 4)
        for (int i = 0; i < 4; i++) {
            int larger = 0;
            for (int j = 0; j < 4; j++) larger += j < i ? score[j] >= score[i] : score[j] > score[i];
            kept[i] = larger < n;
        }
}

void nm_topn(const float *score, uint8_t *kept, int64_t groups, int n, int m, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t start = 0; start < groups; start += BLOCK) {
        int count = (int)nm_min(BLOCK, groups - start);
        if (m == 4) topn_fours(score + start * m, kept + start * m, count, n);
        else topn_block(score + start * m, kept + start * m, count, n, m);
    }
}
