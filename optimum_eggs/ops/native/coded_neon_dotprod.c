// NEON with the dot products of Armv8.2.
#include "nm.h"

#if defined(NM_DOTPROD)
#define TARGET __attribute__((target("+dotprod")))
#define DOTPROD
#include "coded_neon.h"
CODED_KERNEL(nm_coded_neon_dotprod)
#endif
