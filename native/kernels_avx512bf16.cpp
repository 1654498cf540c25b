// AVX-512 with products of bf16.
#define NAMESPACE avx512bf16
#define LANES 16
#define REGISTERS 32
#define CHUNK 3
#include "kernels.h"
