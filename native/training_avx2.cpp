// AVX2 with FMA.
#define NAMESPACE avx2
#define LANES 8
#define REGISTERS 16
#include "training_segments.h"
