// The inner loops of the CPU back end: what an operator hands to them, and the table of them for this processor.
//
// isa_base.cpp, isa_v3.cpp and isa_v4.cpp compile the same loops for three instruction sets; kernels() picks one when
// the extension is loaded. The operators themselves (similarity.cpp, ...) only check, allocate and divide the work.
#pragma once

#include "../common/loss.h"
#include "../common/plane.h"
#include "../common/quantile.h"

namespace aml::cpu {

// For each destination row or column: its two sources and the weight of the second.
template <class T>
struct Axis {
  const int32_t* below;
  const int32_t* above;
  const T* weight;
};

template <class T>
struct MaskedLossCall {
  Plane logits, target, similarity, valid;  // similarity and valid may be absent
  int64_t rows, columns;                    // of the target
  Axis<T> logit_rows, logit_columns, similarity_rows, similarity_columns;  // unused where nothing is resized
  const T* limits;                          // [samples] thresholds
  bool protect_target;
  LossOptions<T> options;
  int64_t rows_per_task;                    // fixed, so that sums never depend on the number of threads
};

constexpr int64_t kTileColumns = 1024;  // rows are worked on in pieces that stay in the L1 cache

template <class T>
struct MaskedLossKernels {
  int64_t (*scratch)(const MaskedLossCall<T>&);  // elements of T a task needs
  void (*forward)(const MaskedLossCall<T>&, int64_t sample, int64_t first, int64_t last, SampleSums<double>*, T* scratch);
  // The gradient of the logits' rows [first, last).
  void (*backward)(const MaskedLossCall<T>&, const LossGradient<T>&, int64_t sample, int64_t first, int64_t last,
                   void* gradient, T* scratch);
};

template <class T>
struct QuantileCall {
  Plane values, valid;
  bool rank_in_fp64;
  Interpolation interpolation;
};

template <class T>
struct QuantileKernels {
  int64_t (*scratch)(const QuantileCall<T>&);  // elements of T
  T (*quantile)(const QuantileCall<T>&, int64_t sample, T q, T* scratch);
};

template <class T>
struct SimilarityCall {
  Plane visual;            // of one channel: rows and columns are those of the grid
  int64_t channel_stride, channels;
  Plane text, text_mask;   // [samples, words, channels]; [samples, 1, words]
  int64_t words;
  bool normalize, softmax;
  bool gradient_channels_first;  // layout of the gradient: [B, C, pixels] or [B, pixels, C]
  T scale;
  int64_t tile_pixels;     // pixels of a tile
};

constexpr int64_t kPanelRest = 32;  // elements behind the unit words that may be read with the last of them

template <class T>
struct SimilarityKernels {
  int64_t (*scratch)(const SimilarityCall<T>&, bool backward);  // elements of T
  // The sample's real words as unit vectors, [channels][words up to a multiple of 4]; returns how many there are.
  int64_t (*prepare)(const SimilarityCall<T>&, int64_t sample, T* panel, int32_t* word_index, T* inverse_norm, T* row);
  // Pixels [first, last). `similarity` and `grad` are the sample's.
  void (*forward)(const SimilarityCall<T>&, int64_t sample, const T* panel, int64_t words, int64_t first, int64_t last,
                  T* similarity, T* scratch);
  // Writes grad_visual, adds to grad_text [words][channels] (of the unit vectors).
  void (*backward)(const SimilarityCall<T>&, int64_t sample, const T* panel, int64_t words, int64_t first, int64_t last,
                   const T* grad, void* grad_visual, T* grad_text, T* scratch);
  // grad_text [words + 1][channels], its last row zero, becomes the gradient of `text`.
  void (*finish_text)(const SimilarityCall<T>&, int64_t sample, int64_t words, const int32_t* word_index,
                      const T* inverse_norm, T* row, T* grad_text, void* gradient);
};

struct Kernels {
  MaskedLossKernels<float> masked_loss_f32;
  MaskedLossKernels<double> masked_loss_f64;
  QuantileKernels<float> quantile_f32;
  QuantileKernels<double> quantile_f64;
  SimilarityKernels<float> similarity_f32;
  SimilarityKernels<double> similarity_f64;
};

const Kernels& kernels();
const char* instruction_set();  // "x86-64-v4", "x86-64-v3" or "base"

template <class T>
const auto& masked_loss_kernels() {
  if constexpr (sizeof(T) == 4) return kernels().masked_loss_f32; else return kernels().masked_loss_f64;
}
template <class T>
const auto& similarity_kernels() {
  if constexpr (sizeof(T) == 4) return kernels().similarity_f32; else return kernels().similarity_f64;
}
template <class T>
const auto& quantile_kernels() {
  if constexpr (sizeof(T) == 4) return kernels().quantile_f32; else return kernels().quantile_f64;
}

}  // namespace aml::cpu
