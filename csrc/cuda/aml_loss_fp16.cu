// The kernels of aml_loss for features in fp16.
#include "aml_loss.cuh"

namespace aml::cuda {

template int64_t prepare_aml_loss<f16>(AmlCall&);
template cudaError_t launch_aml_loss<f16>(AmlCall, void*, cudaStream_t);

}  // namespace aml::cuda
