// Every standard header that the tiers use. A tier's translation unit includes this before it turns its
// instruction set on: an inline function first compiled inside the region would be merged by the linker into
// code that an older processor runs, and crash there.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the deliberately undefined operand of its own AVX-512 intrinsics for a mistake (its bug
// 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
// Vectors are passed between inlined functions of one file only: what their calling convention is does not
// matter.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#include "cpu/arguments.h"
#include "cpu/element.h"
#include "cpu/tiers.h"

#define ATTNREC_INLINE static inline __attribute__((always_inline))
#define ATTNREC_MEMBER inline __attribute__((always_inline))
#define ATTNREC_LAMBDA __attribute__((always_inline))

// A region compiled for an instruction set. It reaches to the end of the file: GCC gives a template that is
// instantiated after the region's end the options of the end.
#define ATTNREC_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define ATTNREC_TARGET_BEGIN(set) \
  ATTNREC_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define ATTNREC_TARGET_END _Pragma("clang attribute pop")
#else
#define ATTNREC_TARGET_BEGIN(set) ATTNREC_PRAGMA(GCC target(set))
#define ATTNREC_TARGET_END
#endif
