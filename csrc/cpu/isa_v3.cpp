// The kernels for x86-64-v3.
// The library headers come first: their inline functions must not be compiled for this instruction set.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <cmath>
#include <cstdint>
#include <limits>
#include <immintrin.h>

#pragma GCC target("arch=x86-64-v3")
// GCC does not define __FMA__ for a target chosen by a pragma in C++.
#define AML_FMA
#define AML_TABLE kernels_v3
#define AML_VECTOR_BYTES 32
#include "isa.h"
#endif
