// pixel_text_similarity on the CPU: tiles of pixels, divided among the threads.
#include "similarity_op.h"

#include <atomic>

namespace aml::cpu {

namespace {

constexpr int64_t kForwardPixels = 512;  // of a tile; the longer its rows, the fewer pages of memory are met again
constexpr int64_t kBackwardPixels = 256, kBackwardBytes = 512 * 1024;  // its features are read twice, then from the cache
constexpr int64_t kTilesPerTask = 4;

// The pixels of a sample in tiles of the same size, at most `most` of them before rounding up to an odd number of
// vectors: rows of scratch memory that are a power of two apart would share a few sets of the L1 cache.
int64_t tile_pixels(int64_t pixels, int64_t most) {
  const int64_t tiles = (pixels + most - 1) / most;
  return ((pixels + tiles - 1) / tiles + 15) / 16 * 16 | 16;
}

template <class T>
SimilarityCall<T> make_call(const Tensor& visual, const Tensor& text, const OptionalTensor& text_mask,
                            const SimilarityOptions& options, bool backward) {
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
  const int64_t fitting = std::max<int64_t>(64, kBackwardBytes / int64_t(sizeof(T)) / call.channels);
  call.tile_pixels = tile_pixels(call.visual.rows * call.visual.columns,
                                 backward ? std::min(kBackwardPixels, fitting) : kForwardPixels);
  return call;
}

// The words of a sample as unit vectors, in memory that the caller gives.
template <class T>
struct Words {
  static int64_t elements(const SimilarityCall<T>& call) { return panel_size(call) + call.channels + 2 * call.words; }

  Words(const SimilarityCall<T>& call, T*& memory)
      : panel(memory), row(panel + panel_size(call)), inverse_norm(row + call.channels),
        index(reinterpret_cast<int32_t*>(inverse_norm + call.words)) {
    memory += elements(call);
  }

  // Without a real word there is no similarity; tells which sample that was, for check().
  bool prepare(const SimilarityCall<T>& call, int64_t sample, std::atomic<int64_t>& wordless) {
    count = similarity_kernels<T>().prepare(call, sample, panel, index, inverse_norm, row);
    if (count == 0) wordless = sample;
    return count > 0;
  }
  static void check(const std::atomic<int64_t>& wordless) {
    if (wordless < 0) return;
    throw std::invalid_argument("text_mask: expected at least one real word in every sample, got none in sample " +
                                std::to_string(wordless));
  }

  T *panel, *row, *inverse_norm;
  int32_t* index;
  int64_t count = 0;

 private:
  static int64_t panel_size(const SimilarityCall<T>& call) { return (call.words + 3) / 4 * 4 * call.channels + kPanelRest; }
};

// Threads take whole samples where that keeps them busy: one parallel region, and words for each thread alone.
bool whole_samples(int64_t samples) {
  const int64_t threads = torch::stable::get_num_threads();
  return samples % threads == 0 || samples >= 4 * threads;
}

// Else they take tiles, of as many samples at a time as there are threads, so that little memory is in use:
// calls f(first, words) for each such group, its words being ready.
template <class T, class F>
void for_each_group(const SimilarityCall<T>& call, int64_t samples, const F& f) {
  const int64_t most = std::min<int64_t>(samples, torch::stable::get_num_threads());
  Scratch<T> memory(most * Words<T>::elements(call));
  T* rest = memory;
  std::vector<Words<T>> words;
  for (int64_t i = 0; i < most; ++i) words.emplace_back(call, rest);
  std::atomic<int64_t> wordless(-1);
  for (int64_t first = 0; first < samples; first += most) {
    words.resize(std::min(most, samples - first), words[0]);
    parallel_tasks<T>(words.size(), 0, [&](int64_t i, T*) { words[i].prepare(call, first + i, wordless); });
    Words<T>::check(wordless);
    f(first, words);
  }
}

template <class T>
Tensor forward(const Tensor& visual, const SimilarityCall<T>& call) {
  const int64_t samples = visual.size(0), pixels = call.visual.rows * call.visual.columns;
  Tensor result = visual.dim() == 4 ? empty<T>(visual, {samples, visual.size(2), visual.size(3)})
                                    : empty<T>(visual, {samples, visual.size(1)});
  T* out = result.template mutable_data_ptr<T>();
  const auto& kernel = similarity_kernels<T>();
  const int64_t step = call.tile_pixels, tiles = (pixels + step - 1) / step;
  const auto tile = [&](int64_t b, int64_t i, const Words<T>& words, T* scratch) {
    kernel.forward(call, b, words.panel, words.count, i * step, std::min((i + 1) * step, pixels), out + b * pixels, scratch);
  };
  if (whole_samples(samples)) {
    std::atomic<int64_t> wordless(-1);
    parallel_tasks<T>(samples, kernel.scratch(call, false) + Words<T>::elements(call), [&](int64_t b, T* scratch) {
      Words<T> words(call, scratch);
      if (!words.prepare(call, b, wordless)) return;
      for (int64_t i = 0; i < tiles; ++i) tile(b, i, words, scratch);
    });
    Words<T>::check(wordless);
    return result;
  }
  for_each_group(call, samples, [&](int64_t first, const std::vector<Words<T>>& words) {
    parallel_tasks<T>(words.size() * tiles, kernel.scratch(call, false), [&](int64_t i, T* scratch) {
      tile(first + i / tiles, i % tiles, words[i / tiles], scratch);
    });
  });
  return result;
}

template <class T>
std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& visual, const Tensor& text, const SimilarityCall<T>& call) {
  const int64_t samples = visual.size(0), pixels = call.visual.rows * call.visual.columns;
  require(grad.numel() == samples * pixels && grad.scalar_type() == (sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double),
          "grad: expected the shape and dtype of the similarity");
  const Tensor grad_rows = torch::stable::contiguous(grad);
  const T* grad_in = grad_rows.const_data_ptr<T>();
  Tensor grad_visual = torch::stable::new_empty(visual, visual.sizes());
  Tensor grad_text = torch::stable::new_empty(text, text.sizes());
  void *visual_out = grad_visual.mutable_data_ptr(), *text_out = grad_text.mutable_data_ptr();

  // A sample is divided into the same tasks however many threads there are. Each adds up its own share of the words'
  // gradient, and the shares are added in order, whoever computed them.
  const auto& kernel = similarity_kernels<T>();
  const int64_t step = call.tile_pixels * kTilesPerTask, tasks = (pixels + step - 1) / step;
  const int64_t share = (call.words + 1) * call.channels;
  const auto task = [&](int64_t b, int64_t i, const Words<T>& words, T* gradient, T* scratch) {
    std::fill(gradient, gradient + share, T(0));
    kernel.backward(call, b, words.panel, words.count, i * step, std::min((i + 1) * step, pixels), grad_in + b * pixels,
                    visual_out, gradient, scratch);
  };
  const auto add = [&](T* sum, const T* gradient) {
    for (int64_t k = 0; k < share; ++k) sum[k] += gradient[k];
  };
  const auto finish = [&](int64_t b, const Words<T>& words, T* sum) {
    kernel.finish_text(call, b, words.count, words.index, words.inverse_norm, words.row, sum, text_out);
  };
  if (whole_samples(samples)) {
    std::atomic<int64_t> wordless(-1);
    const int64_t shares = tasks > 1 ? 2 * share : share;
    parallel_tasks<T>(samples, kernel.scratch(call, true) + Words<T>::elements(call) + shares, [&](int64_t b, T* scratch) {
      Words<T> words(call, scratch);
      T *sum = scratch, *gradient = scratch + share;
      scratch += shares;
      if (!words.prepare(call, b, wordless)) return;
      task(b, 0, words, sum, scratch);
      for (int64_t i = 1; i < tasks; ++i) {
        task(b, i, words, gradient, scratch);
        add(sum, gradient);
      }
      finish(b, words, sum);
    });
    Words<T>::check(wordless);
    return {grad_visual, grad_text};
  }
  Scratch<T> shares(std::min<int64_t>(samples, torch::stable::get_num_threads()) * tasks * share);
  for_each_group(call, samples, [&](int64_t first, const std::vector<Words<T>>& words) {
    parallel_tasks<T>(words.size() * tasks, kernel.scratch(call, true), [&](int64_t i, T* scratch) {
      task(first + i / tasks, i % tasks, words[i / tasks], shares + i * share, scratch);
    });
    parallel_tasks<T>(words.size(), 0, [&](int64_t i, T*) {
      T* sum = shares + i * tasks * share;
      for (int64_t other = 1; other < tasks; ++other) add(sum, sum + other * share);
      finish(first + i, words[i], sum);
    });
  });
  return {grad_visual, grad_text};
}

}  // namespace

Tensor similarity_map(const Tensor& visual, const Tensor& text, const OptionalTensor& text_mask,
                      const SimilarityOptions& options) {
  return with_compute_type(type_of(visual), [&](auto t) {
    using T = decltype(t);
    return forward<T>(visual, make_call<T>(visual, text, text_mask, options, false));
  });
}

Tensor pixel_text_similarity(Tensor visual, Tensor text, OptionalTensor text_mask, bool normalize, double scale, bool softmax) {
  return similarity_map(visual, text, text_mask, {normalize, scale, softmax});
}

std::tuple<Tensor, Tensor> pixel_text_similarity_backward(Tensor grad, Tensor visual, Tensor text, OptionalTensor text_mask,
                                                          bool normalize, double scale, bool softmax) {
  return with_compute_type(type_of(visual), [&](auto t) {
    using T = decltype(t);
    return backward<T>(grad, visual, text, make_call<T>(visual, text, text_mask, {normalize, scale, softmax}, true));
  });
}

}  // namespace aml::cpu

STABLE_TORCH_LIBRARY_IMPL(aml_kernels, CPU, library) {
  library.impl("pixel_text_similarity", TORCH_BOX(&aml::cpu::pixel_text_similarity));
  library.impl("pixel_text_similarity_backward", TORCH_BOX(&aml::cpu::pixel_text_similarity_backward));
}
