// Thirty-two positions of a packed row of 16-bit values: their bits, and the values that vpexpandw spreads by them.
//
// The includer defines TARGET, a target attribute of AVX-512 VBMI2. `step` values are kept of 32 positions; 0 where their
// number varies. It is a constant in every call.
#ifndef EGGS_SPREAD_H
#define EGGS_SPREAD_H

#include <immintrin.h>
#include <string.h>

#define SPREAD_INLINE static inline __attribute__((always_inline)) TARGET

SPREAD_INLINE uint32_t spread_bits(const uint8_t *meta) {
    uint32_t bits;
    memcpy(&bits, meta, 4);
    return bits;
}

// The values that follow; with 8 and 16 kept, only the bytes that hold them are read.
SPREAD_INLINE __m512i spread_read(const void *v, int step) {
    return step == 8    ? _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)v))
           : step == 16 ? _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)v))
                        : _mm512_loadu_si512(v);
}

// Where the row's values go on.
SPREAD_INLINE const char *spread_next(const char *v, const char *end, uint32_t bits, int step) {
    if (step) return v + 2 * step;
    v += 2 * _mm_popcnt_u32(bits);
    return v < end ? v : end;  // bits that lie about their number
}
#endif
