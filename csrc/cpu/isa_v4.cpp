// The kernels for x86-64-v4.
// The library headers come first: their inline functions must not be compiled for this instruction set.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <cmath>
#include <cstdint>
#include <limits>
#include <immintrin.h>

#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
// GCC does not define __FMA__ and __AVX512F__ for a target chosen by a pragma in C++.
#define AML_FMA
#define AML_AVX512
// GCC 12 takes the unused operand of its own intrinsics for an oversight.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#define AML_TABLE kernels_v4
#define AML_VECTOR_BYTES 64
#include "isa.h"
#endif
