// AVX-512 with products of bf16; its fp32 is that of training_avx512.cpp.
#define NAMESPACE avx512bf16
#define LANES 16
#define REGISTERS 32
#define ONLY_BF16
#include "training_segments.h"
