// NEON: sixteen positions at a time, codes spread by a byte shuffle looked up by the byte of bits.
//
// The includer defines TARGET, and DOTPROD where the target has its instructions.
#include "coded.h"

#include <arm_neon.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline)) TARGET
#define BYTES 16
#define ROWS 2
#define TOKENS 4
#define VB int8x16_t
#define VI int32x4_t
#define VF float32x4_t

// What position i takes, for every byte of bits; 0xff, which the shuffle turns into zero, where the bit is 0.
static uint8_t spread[256][8];

__attribute__((constructor)) static void fill_spread(void) {
    memset(spread, 0xff, sizeof spread);
    for (int bits = 0; bits < 256; bits++)
        for (int i = 0, count = 0; i < 8; i++)
            if (bits >> i & 1) spread[bits][i] = (uint8_t)count++;
}

static void round_all(const nm_coded *p, nm_rounded *to) { nm_rounded_fill(to, p); }

INLINE VI vi_zero(void) { return vdupq_n_s32(0); }
INLINE VF vf_zero(void) { return vdupq_n_f32(0); }
INLINE VB codes_at(const int8_t *v) { return vld1q_s8(v); }

INLINE void codes_unpack(const uint8_t *v, int8_t *to) {
    uint8x16_t pairs = vld1q_u8(v), low = vandq_u8(pairs, vdupq_n_u8(15)), high = vshrq_n_u8(pairs, 4);
    const int8x16_t eight = vdupq_n_s8(8);
    vst1q_s8(to, vsubq_s8(vreinterpretq_s8_u8(vzip1q_u8(low, high)), eight));
    vst1q_s8(to + 16, vsubq_s8(vreinterpretq_s8_u8(vzip2q_u8(low, high)), eight));
}

INLINE int8x8_t spread8(const int8_t **v, unsigned bits, int each) {
    int8x8_t codes = vld1_s8(*v);
    *v += each ? each : __builtin_popcount(bits);
    return vtbl1_s8(codes, vreinterpret_s8_u8(vld1_u8(spread[bits])));
}

INLINE VB codes_spread(const int8_t **v, uint64_t bits, int each) {
    int8x8_t a = spread8(v, bits & 255, each);
    return vcombine_s8(a, spread8(v, bits >> 8 & 255, each));
}

INLINE VI vi_dot(VI sum, VB w, VB x) {
#if defined(DOTPROD)
    return vdotq_s32(sum, w, x);
#else
    int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(x)), high = vmull_high_s8(w, x);
    return vpadalq_s16(vpadalq_s16(sum, low), high);
#endif
}

INLINE VF vf_add(VF sum, VI whole, float by) { return vfmaq_n_f32(sum, vcvtq_f32_s32(whole), by); }
INLINE float vf_sum(VF v) { return vaddvq_f32(v); }

#include "coded_lanes.h"
