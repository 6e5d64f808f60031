// NEON: eight positions at a time, values spread by a byte shuffle looked up by the byte of bits.
#include "nm.h"

#if defined(__aarch64__)
#include <arm_neon.h>

#define TARGET
#define LANES 8
#define VEC float32x4x2_t
#define ROWS 2
#define TOKENS 4

// For 16-bit values: the bytes that each position takes, 0xff (which the shuffle turns into zero) where the bit is 0.
static uint8_t spread[256][16];

__attribute__((constructor)) static void fill_spread(void) {
    for (int bits = 0; bits < 256; bits++)
        for (int i = 0, count = 0; i < 8; i++) {
            int set = bits >> i & 1;
            spread[bits][2 * i] = set ? (uint8_t)(2 * count) : 0xff;
            spread[bits][2 * i + 1] = set ? (uint8_t)(2 * count + 1) : 0xff;
            count += set;
        }
}

static inline VEC lanes_zero(void) { return (VEC){{vdupq_n_f32(0), vdupq_n_f32(0)}}; }
static inline VEC lanes_x(const float *x) { return (VEC){{vld1q_f32(x), vld1q_f32(x + 4)}}; }
static inline void lanes_prefetch(const void *p) { __builtin_prefetch(p); }
static inline float lanes_sum(VEC v) { return vaddvq_f32(vaddq_f32(v.val[0], v.val[1])); }

static inline void lanes_store(float *to, VEC v) {
    vst1q_f32(to, v.val[0]);
    vst1q_f32(to + 4, v.val[1]);
}

static inline VEC lanes_add(VEC a, VEC b) {
    return (VEC){{vaddq_f32(a.val[0], b.val[0]), vaddq_f32(a.val[1], b.val[1])}};
}

static inline VEC lanes_fma(VEC a, VEC b, VEC c) {
    return (VEC){{vfmaq_f32(c.val[0], a.val[0], b.val[0]), vfmaq_f32(c.val[1], a.val[1], b.val[1])}};
}

// float32: the same shuffle on the upper and the lower halves of the values, then woven together.
static inline VEC lanes_f32(const void *v, unsigned bits) {
    uint16x8x2_t halves = vld2q_u16((const uint16_t *)v);
    uint8x16_t index = vld1q_u8(spread[bits]);
    uint16x8_t low = vreinterpretq_u16_u8(vqtbl1q_u8(vreinterpretq_u8_u16(halves.val[0]), index));
    uint16x8_t high = vreinterpretq_u16_u8(vqtbl1q_u8(vreinterpretq_u8_u16(halves.val[1]), index));
    return (VEC){{vreinterpretq_f32_u16(vzip1q_u16(low, high)), vreinterpretq_f32_u16(vzip2q_u16(low, high))}};
}

static inline uint16x8_t spread_out(const void *v, unsigned bits) {
    uint8x16_t bytes = vreinterpretq_u8_u16(vld1q_u16((const uint16_t *)v));
    return vreinterpretq_u16_u8(vqtbl1q_u8(bytes, vld1q_u8(spread[bits])));
}

static inline VEC lanes_f16(const void *v, unsigned bits) {
    float16x8_t h = vreinterpretq_f16_u16(spread_out(v, bits));
    return (VEC){{vcvt_f32_f16(vget_low_f16(h)), vcvt_high_f32_f16(h)}};
}

static inline VEC lanes_bf16(const void *v, unsigned bits) {
    uint16x8_t h = spread_out(v, bits), zero = vdupq_n_u16(0);
    return (VEC){{vreinterpretq_f32_u16(vzip1q_u16(zero, h)), vreinterpretq_f32_u16(vzip2q_u16(zero, h))}};
}

#define LANES_MORE_TILES(R)
#include "lanes.h"
LANES_KERNEL(linear)

int nm_linear_neon(const nm_problem *p) { return linear(p); }
#endif
