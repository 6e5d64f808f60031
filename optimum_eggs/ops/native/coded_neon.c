// NEON without instructions for dot products.
#if defined(__aarch64__)
#define TARGET
#include "coded_neon.h"
CODED_KERNEL(nm_coded_neon)
#endif
