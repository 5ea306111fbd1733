// From tensors on a GPU to what the kernels take: device, stream, memory, and errors that say which operator and which
// shapes. The public Python functions have checked arguments; what is checked again would otherwise go out of bounds.
#pragma once

// <torch/csrc/inductor/aoti_torch/c/shim.h> declares the stream's function only where this is set.
#ifndef USE_CUDA
#error "compile CUDA sources with -DUSE_CUDA"
#endif

#include <torch/csrc/stable/accelerator.h>

#include <initializer_list>
#include <string>
#include <utility>

#include "../common/tensor.h"
#include "device.cuh"

// Only libtorch_cuda defines it. Weak, so that the same file loads where PyTorch was built without CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace aml::cuda {

// The tensor's device for the length of a call, and PyTorch's current stream on it.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  operator cudaStream_t() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

using Named = std::pair<const char*, const Tensor*>;

inline void require_launched(cudaError_t error, const char* name, std::initializer_list<Named> tensors) {
  if (error == cudaSuccess) return;
  std::string message = std::string(name) + ": the launch failed with \"" + cudaGetErrorString(error) + "\"";
  for (const auto& [tensor_name, tensor] : tensors) {
    message += std::string(", ") + tensor_name + " [";
    for (int64_t d = 0; d < tensor->dim(); ++d) message += (d ? ", " : "") + std::to_string(tensor->size(d));
    message += "]";
  }
  throw std::runtime_error(message);
}

// An argument that is computed with: fp64 stays with the reference, which GPUs do not do any slower.
inline void require_float(const char* name, const Tensor& tensor) {
  const Type type = type_of(tensor);
  if (type == Type::f32 || type == Type::bf16 || type == Type::f16) return;
  throw std::invalid_argument(std::string(name) + ": expected dtype float32, bfloat16 or float16 on a GPU; backend=\"reference\" takes float64");
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> size, ScalarType type = ScalarType::Float) {
  return torch::stable::new_empty(like, {size.begin(), size.size()}, type);
}

// Calls f with a float, bf16 or f16: the type of an argument that passed require_float.
template <class F>
auto with_float_tag(Type type, F f) {
  return type == Type::f32 ? f(float()) : type == Type::bf16 ? f(bf16()) : f(f16());
}

// One number per sample, as fp32.
inline Tensor to_float32(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Float ? tensor : torch::stable::to(tensor, ScalarType::Float);
}

}  // namespace aml::cuda
