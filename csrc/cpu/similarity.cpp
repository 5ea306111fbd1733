// pixel_text_similarity on the CPU: tiles of pixels, divided among the threads.
#include "similarity_op.h"

namespace aml::cpu {

namespace {

constexpr int64_t kTileBytes = 512 * 1024;  // features of a tile: they are read twice, the second time from the cache
constexpr int64_t kTilesPerTask = 4;

template <class T>
SimilarityCall<T> make_call(const Tensor& visual, const Tensor& text, const OptionalTensor& text_mask,
                            const SimilarityOptions& options) {
  const bool grid = visual.dim() == 4;
  require(grid || visual.dim() == 3, "visual: expected [B, C, h, w] or [B, N, C]");
  SimilarityCall<T> call{};
  call.channels = visual.size(grid ? 1 : 2);
  call.channel_stride = visual.stride(grid ? 1 : 2);
  call.visual = grid ? plane(visual)
      : Plane{visual.const_data_ptr(), type_of(visual), visual.stride(0), 0, visual.stride(1), 1, visual.size(1)};
  require(text.dim() == 3 && text.size(0) == visual.size(0) && text.size(2) == call.channels,
          "text: expected [B, L, C] with batch and width of visual");
  require(visual.numel() > 0 && text.numel() > 0, "visual, text: expected no empty dimension");
  call.words = text.size(1);
  call.text = plane(text);
  if (text_mask) {
    require(text_mask->dim() == 2 && text_mask->size(0) == text.size(0) && text_mask->size(1) == call.words,
            "text_mask: expected [B, L]");
    call.text_mask = {text_mask->const_data_ptr(), type_of(*text_mask), text_mask->stride(0), 0, text_mask->stride(1), 1, call.words};
  }
  call.normalize = options.normalize;
  call.softmax = options.softmax;
  call.scale = T(options.scale);
  call.gradient_channels_first = grid;
  const int64_t fitting = kTileBytes / int64_t(sizeof(T)) / call.channels / 64 * 64;
  const int64_t pixels = (call.visual.rows * call.visual.columns + 63) / 64 * 64;
  call.tile_pixels = std::max<int64_t>(64, std::min<int64_t>({256, fitting, pixels}));
  return call;
}

// The words of a few samples as unit vectors: of as many as there are threads, so that little memory is in use.
template <class T>
class Words {
 public:
  explicit Words(const SimilarityCall<T>& call)
      : call_(call), panel_size_((call.words + 3) / 4 * 4 * call.channels), most_(torch::stable::get_num_threads()),
        panels_(most_ * panel_size_), index_(most_ * call.words), inverse_norm_(most_ * call.words), count_(most_) {}

  // Calls f(first, samples) for one group of samples after the other, their words being ready.
  template <class F>
  void for_each_group(int64_t samples, const F& f) {
    for (first_ = 0; first_ < samples; first_ += most_) {
      const int64_t size = std::min(most_, samples - first_);
      parallel_tasks<T>(size, call_.channels, [&](int64_t i, T* row) {
        const int64_t b = first_ + i;
        count_[i] = similarity_kernels<T>().prepare(call_, b, panel(b), index(b), inverse_norm(b), row);
      });
      for (int64_t i = 0; i < size; ++i) {
        if (count_[i] == 0) {
          throw std::invalid_argument("text_mask: expected at least one real word in every sample, got none in sample " +
                                      std::to_string(first_ + i));
        }
      }
      f(first_, size);
    }
  }

  T* panel(int64_t sample) const { return panels_ + (sample - first_) * panel_size_; }
  int32_t* index(int64_t sample) const { return index_ + (sample - first_) * call_.words; }
  T* inverse_norm(int64_t sample) const { return inverse_norm_ + (sample - first_) * call_.words; }
  int64_t count(int64_t sample) const { return count_[sample - first_]; }
  int64_t most() const { return most_; }

 private:
  const SimilarityCall<T>& call_;
  const int64_t panel_size_, most_;
  int64_t first_ = 0;
  Scratch<T> panels_;
  Scratch<int32_t> index_;
  Scratch<T> inverse_norm_;
  Scratch<int64_t> count_;
};

template <class T>
Tensor forward(const Tensor& visual, const SimilarityCall<T>& call) {
  const int64_t pixels = call.visual.rows * call.visual.columns;
  Tensor result = visual.dim() == 4 ? empty<T>(visual, {visual.size(0), visual.size(2), visual.size(3)})
                                    : empty<T>(visual, {visual.size(0), visual.size(1)});
  T* out = result.template mutable_data_ptr<T>();
  const auto& kernel = similarity_kernels<T>();
  const int64_t step = call.tile_pixels, tiles = (pixels + step - 1) / step;
  Words<T> words(call);
  words.for_each_group(visual.size(0), [&](int64_t first_sample, int64_t samples) {
    parallel_tasks<T>(samples * tiles, kernel.scratch(call, false), [&](int64_t i, T* scratch) {
      const int64_t b = first_sample + i / tiles, first = i % tiles * step;
      kernel.forward(call, b, words.panel(b), words.count(b), first, std::min(first + step, pixels), out + b * pixels, scratch);
    });
  });
  return result;
}

template <class T>
std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& visual, const Tensor& text, const SimilarityCall<T>& call) {
  const int64_t pixels = call.visual.rows * call.visual.columns;
  require(grad.numel() == visual.size(0) * pixels && grad.scalar_type() == (sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double),
          "grad: expected the shape and dtype of the similarity");
  const Tensor grad_rows = torch::stable::contiguous(grad);
  const T* grad_in = grad_rows.const_data_ptr<T>();
  Tensor grad_visual = torch::stable::new_empty(visual, visual.sizes());
  Tensor grad_text = torch::stable::new_empty(text, text.sizes());
  void *visual_out = grad_visual.mutable_data_ptr(), *text_out = grad_text.mutable_data_ptr();

  // Each task adds up its own share of the words' gradient; the shares are added in order, whoever computed them.
  const auto& kernel = similarity_kernels<T>();
  const int64_t step = call.tile_pixels * kTilesPerTask, tasks = (pixels + step - 1) / step;
  const int64_t share = (call.words + 1) * call.channels;
  Words<T> words(call);
  Scratch<T> shares(words.most() * tasks * share);
  words.for_each_group(visual.size(0), [&](int64_t first_sample, int64_t samples) {
    parallel_tasks<T>(samples * tasks, kernel.scratch(call, true), [&](int64_t i, T* scratch) {
      const int64_t b = first_sample + i / tasks, first = i % tasks * step;
      std::fill(shares + i * share, shares + (i + 1) * share, T(0));
      kernel.backward(call, b, words.panel(b), words.count(b), first, std::min(first + step, pixels), grad_in + b * pixels,
                      visual_out, shares + i * share, scratch);
    });
    parallel_tasks<T>(samples, 0, [&](int64_t i, T*) {
      const int64_t b = first_sample + i;
      T* sum = shares + i * tasks * share;
      for (int64_t task = 1; task < tasks; ++task) {
        for (int64_t k = 0; k < share; ++k) sum[k] += sum[task * share + k];
      }
      kernel.finish_text(call, b, words.panel(b), words.count(b), words.index(b), words.inverse_norm(b), sum, text_out);
    });
  });
  return {grad_visual, grad_text};
}

}  // namespace

Tensor similarity_map(const Tensor& visual, const Tensor& text, const OptionalTensor& text_mask,
                      const SimilarityOptions& options) {
  return with_compute_type(type_of(visual), [&](auto t) {
    using T = decltype(t);
    return forward<T>(visual, make_call<T>(visual, text, text_mask, options));
  });
}

Tensor pixel_text_similarity(Tensor visual, Tensor text, OptionalTensor text_mask, bool normalize, double scale, bool softmax) {
  return similarity_map(visual, text, text_mask, {normalize, scale, softmax});
}

std::tuple<Tensor, Tensor> pixel_text_similarity_backward(Tensor grad, Tensor visual, Tensor text, OptionalTensor text_mask,
                                                          bool normalize, double scale, bool softmax) {
  return with_compute_type(type_of(visual), [&](auto t) {
    using T = decltype(t);
    return backward<T>(grad, visual, text, make_call<T>(visual, text, text_mask, {normalize, scale, softmax}));
  });
}

}  // namespace aml::cpu

STABLE_TORCH_LIBRARY_IMPL(aml_kernels, CPU, library) {
  library.impl("pixel_text_similarity", TORCH_BOX(&aml::cpu::pixel_text_similarity));
  library.impl("pixel_text_similarity_backward", TORCH_BOX(&aml::cpu::pixel_text_similarity_backward));
}
