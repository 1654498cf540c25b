// Which sources this library was compiled from. Only this file is compiled with EFFNET_SOURCES, so that a change
// elsewhere does not compile every file again.
#include "export.h"

// The first 16 digits of the sha256 over native/*.cpp and native/*.h, as build.py counts it.
EFFNET_EXPORT const char* effnet_build() { return EFFNET_SOURCES; }
