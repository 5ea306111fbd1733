// The kernels for any processor.
#define AML_TABLE kernels_base
#define AML_VECTOR_BYTES 16
#include "isa.h"
