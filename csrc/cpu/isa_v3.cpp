// The kernels for x86-64-v3.
// The library headers come first: their inline functions must not be compiled for this instruction set.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <cmath>
#include <cstdint>
#include <limits>
#include <immintrin.h>

#pragma GCC target("arch=x86-64-v3")
#define AML_TABLE kernels_v3
#define AML_VECTOR_BYTES 32
#include "isa.h"
#endif
