// pixel_text_similarity and its gradients on a GPU.
#include "similarity_backward.cuh"
#include "similarity_op.h"

namespace aml::cuda {

Tensor pixel_text_similarity(Tensor visual, Tensor text, OptionalTensor text_mask, bool normalize, double scale, bool softmax) {
  const SimilarityCall call = similarity_call(visual, text, text_mask, normalize, scale, softmax);
  const OnDevice stream(visual);
  Tensor result = visual.dim() == 4 ? empty(visual, {visual.size(0), visual.size(2), visual.size(3)})
                                    : empty(visual, {visual.size(0), visual.size(1)});
  const cudaError_t error = with_float_tag(call.visual.type, [&](auto tag) {
    return launch_similarity<decltype(tag)>(call, visual.size(0), result.mutable_data_ptr<float>(), stream);
  });
  require_launched(error, "pixel_text_similarity", {{"visual", &visual}, {"text", &text}});
  return result;
}

std::tuple<Tensor, Tensor> pixel_text_similarity_backward(Tensor grad, Tensor visual, Tensor text, OptionalTensor text_mask,
                                                          bool normalize, double scale, bool softmax) {
  SimilarityBackwardCall call{};
  call.forward = similarity_call(visual, text, text_mask, normalize, scale, softmax);
  call.samples = visual.size(0);
  require(grad.numel() == call.samples * call.forward.cells && grad.scalar_type() == ScalarType::Float,
          "grad: expected the shape and dtype of the similarity");
  const OnDevice stream(visual);
  const Tensor grads = torch::stable::contiguous(grad);
  Tensor grad_visual = torch::stable::new_empty(visual, visual.sizes());
  Tensor grad_text = torch::stable::new_empty(text, text.sizes());
  call.grad = grads.const_data_ptr<float>();
  call.grad_visual = grad_visual.mutable_data_ptr(), call.grad_text = grad_text.mutable_data_ptr();
  call.channels_first = visual.dim() == 4;
  call.divide();
  SimilarityScratch scratch;
  Tensor memory = empty(visual, {scratch.divide(call, nullptr)});
  scratch.divide(call, memory.mutable_data_ptr<float>());
  const cudaError_t error = with_float_tag(call.forward.visual.type, [&](auto tag) {
    return launch_similarity_backward<decltype(tag)>(call, scratch, stream);
  });
  require_launched(error, "pixel_text_similarity_backward", {{"visual", &visual}, {"text", &text}});
  return {grad_visual, grad_text};
}

}  // namespace aml::cuda

STABLE_TORCH_LIBRARY_IMPL(aml_kernels, CUDA, library) {
  library.impl("pixel_text_similarity", TORCH_BOX(&aml::cuda::pixel_text_similarity));
  library.impl("pixel_text_similarity_backward", TORCH_BOX(&aml::cuda::pixel_text_similarity_backward));
}
