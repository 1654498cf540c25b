// AVX-512 with bf16 products; its fp32 kernels are those of training_avx512.cpp.
#define NAMESPACE avx512bf16
#define LANES 16
#define REGISTERS 32
#define ONLY_BF16
#include "training_segments.h"
