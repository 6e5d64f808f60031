// A dense matrix by one token in bfloat16, as a plain AVX-512 BF16 loop: four rows at a time, a thread its share of them.
// What a careful programmer gets for the dense layer without a library, to measure the packed kernels against.
#include <immintrin.h>
#include <stdint.h>

__attribute__((target("avx512f,avx512bw,avx512bf16"))) void dense_loop(const uint16_t *weight, const uint16_t *x,
                                                                      float *y, int64_t out, int64_t in, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < out; r += 4) {
        const uint16_t *row[4];
        __m512 sum[4];
        int rows = out - r < 4 ? (int)(out - r) : 4;
        for (int k = 0; k < 4; k++) {
            row[k] = weight + (r + (k < rows ? k : 0)) * in;
            sum[k] = _mm512_setzero_ps();
        }
        for (int64_t c = 0; c < in; c += 32) {
            __mmask32 valid = in - c >= 32 ? 0xffffffffu : (1u << (in - c)) - 1;
            __m512bh xv = (__m512bh)_mm512_maskz_loadu_epi16(valid, x + c);
            for (int k = 0; k < 4; k++)
                sum[k] = _mm512_dpbf16_ps(sum[k], (__m512bh)_mm512_maskz_loadu_epi16(valid, row[k] + c), xv);
        }
        for (int k = 0; k < rows; k++) y[r + k] = _mm512_reduce_add_ps(sum[k]);
    }
}
