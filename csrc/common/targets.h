// Compiles a part of a file for an instruction set that the rest of the program does not assume.
#pragma once

#include <cstdint>

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#define DBLOCKS_X86 1
#include <immintrin.h>
#else
#define DBLOCKS_X86 0
#endif

#define DBLOCKS_PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define DBLOCKS_TARGET_BEGIN(set) \
  DBLOCKS_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define DBLOCKS_TARGET_END _Pragma("clang attribute pop")
#else
#define DBLOCKS_TARGET_BEGIN(set) \
  _Pragma("GCC push_options") DBLOCKS_PRAGMA(GCC target(set))
#define DBLOCKS_TARGET_END _Pragma("GCC pop_options")
#endif
