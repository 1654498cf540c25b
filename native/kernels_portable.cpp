// Any processor, with the compiler's vector extensions: SSE2 on x86-64, NEON on ARM.
#define NAMESPACE portable
#define LANES 4
#if defined(__aarch64__)
#define REGISTERS 32
#else
#define REGISTERS 16
#endif
#define CHUNK 2
#include "kernels.h"
