// Stands for the library until dispatch.cpp does.
#include "export.h"

EFFNET_EXPORT const char* effnet_build() { return EFFNET_BUILD; }
