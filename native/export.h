// What of the library is seen from outside: C functions marked EFFNET_EXPORT, and nothing else.
#pragma once

#ifdef _WIN32
#define EFFNET_EXPORT extern "C" __declspec(dllexport)
#else
#define EFFNET_EXPORT extern "C" __attribute__((visibility("default")))
#endif
