// The kernels of aml_loss for features in fp32.
#include "aml_loss.cuh"

namespace aml::cuda {

template int64_t prepare_aml_loss<float>(AmlCall&);
template cudaError_t launch_aml_loss<float>(AmlCall, void*, cudaStream_t);

}  // namespace aml::cuda
