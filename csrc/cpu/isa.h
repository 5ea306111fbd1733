// Included last by isa_*.cpp, after the instruction set has been chosen: fills its table of kernels.
#include "masked_loss.h"
#include "quantile.h"
#include "similarity.h"

namespace aml::cpu {

extern const Kernels AML_TABLE;
const Kernels AML_TABLE = {
    masked_loss_table<float>(), masked_loss_table<double>(), quantile_table<float>(), quantile_table<double>(),
    similarity_table<float>(), similarity_table<double>(),
};

}  // namespace aml::cpu
