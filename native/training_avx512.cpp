// AVX-512 (F, BW, DQ, VL).
#define NAMESPACE avx512
#define LANES 16
#define REGISTERS 32
#include "training_segments.h"
