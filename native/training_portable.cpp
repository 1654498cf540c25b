// any processor, by the compiler's own vectors: SSE2 on x86-64, NEON on ARM.
#define NAMESPACE portable
#define LANES 4
#if defined(__aarch64__)
#define REGISTERS 32
#else
#define REGISTERS 16
#endif
#include "training_segments.h"
