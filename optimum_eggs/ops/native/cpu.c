// Which kernels this processor runs.
#define _GNU_SOURCE  // syscall
#include "coded.h"
#include "skip.h"

static int always(void) { return 1; }

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

static int has_avx2(void) {
    unsigned a, b, c, d;
    int f16c = __get_cpuid(1, &a, &b, &c, &d) && c >> 29 & 1;  // not a name that every compiler knows
    return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt");
}

static int has_avx512(void) { return has_avx2() && __builtin_cpu_supports("avx512f"); }

static int has_vbmi2(void) {
    return has_avx512() && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vbmi2");
}

static int has_vnni(void) {
    return has_vbmi2() && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512vnni");
}

#if defined(NM_AVX512BF16)
static int has_bf16(void) { return has_vnni() && __builtin_cpu_supports("avx512bf16"); }

static int skips_bf16(const nm_problem *p) { return nm_least_avx512bf16_skip(p) > 0; }
#endif

#if defined(NM_AMX)
// AMX tiles must be asked for, once for the process: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
static int has_amx(void) {
#if defined(__linux__)
    unsigned a, b, c, d;
    if (!has_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    return (d >> 22 & 1) && (d >> 24 & 1) && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
    return 0;
#endif
}
#endif
#endif

#if defined(NM_DOTPROD)
#if defined(__linux__)
#include <sys/auxv.h>
#endif

static int has_dotprod(void) {
#if defined(__linux__)
    return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#elif defined(__APPLE__)
    return 1;  // every one of Apple's processors that runs this
#else
    return 0;
#endif
}
#endif

#define ALL(kernel) {kernel, kernel, kernel}
#define NEVER {NULL, NULL, NULL}
#define F32 {nm_skips_f32, NULL, NULL}

const nm_isa nm_isas[] = {
    {"portable", always, ALL(nm_linear_portable), NEVER, nm_unpack_portable, nm_coded_portable, nm_decode_portable},
#if defined(__aarch64__)
    {"neon", always, ALL(nm_linear_neon), NEVER, nm_unpack_portable, nm_coded_neon, nm_decode_portable},
#if defined(NM_DOTPROD)
    {"neon_dotprod", has_dotprod, ALL(nm_linear_neon), NEVER, nm_unpack_portable, nm_coded_neon_dotprod, nm_decode_portable},
#endif
#endif
#if defined(__x86_64__)
    {"avx2", has_avx2, ALL(nm_linear_avx2), F32, nm_unpack_portable, nm_coded_avx2, nm_decode_portable},
    {"avx512", has_avx512, ALL(nm_linear_avx512), F32, nm_unpack_portable, nm_coded_avx2, nm_decode_portable},
    {"avx512_vbmi2", has_vbmi2, ALL(nm_linear_avx512), F32, nm_unpack_avx512, nm_coded_avx2, nm_decode_portable},
    {"avx512_vnni", has_vnni, ALL(nm_linear_avx512), F32, nm_unpack_avx512, nm_coded_avx512, nm_decode_avx512},
#if defined(NM_AVX512BF16)
    {"avx512_bf16", has_bf16, {nm_linear_avx512, nm_linear_avx512, nm_linear_avx512bf16}, {nm_skips_f32, NULL, skips_bf16},
     nm_unpack_avx512, nm_coded_avx512, nm_decode_avx512},
#endif
#if defined(NM_AMX)
    {"amx", has_amx, {nm_linear_avx512, nm_linear_avx512, nm_linear_amx}, F32, nm_unpack_avx512, nm_coded_avx512,
     nm_decode_avx512},
#endif
#endif
};
const int nm_isa_count = sizeof(nm_isas) / sizeof(*nm_isas);
