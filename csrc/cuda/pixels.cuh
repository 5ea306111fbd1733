// How threads walk over the pixels of masked_loss, forward and backward. A thread works on an item: kColumns columns of
// the target by some rows, from top to bottom. There are three ways to read pixels: `Direct`, where logits lie at the
// target's size in packs of 16 bytes beside a packed bool or uint8 target (and `valid`, if kValid); `Resized`, for logits
// of another size beside such a target, as networks give them that predict at a quarter of the image's resolution; and
// `General`, for everything else.
#pragma once

#include <type_traits>

#include "../common/loss.h"
#include "resize.cuh"

namespace aml::cuda {

struct PixelCall {
  Plane logits, target, similarity, valid;  // similarity and valid may be absent
  int64_t samples;
  uint32_t rows, columns;  // of the target
  Axis logit_rows, logit_columns, map_rows, map_columns;
  bool protect_target;
  uint32_t items_across, items;  // of a sample: beside each other, and in all
  uint32_t item_rows;            // of the target, in an item
};

// Rows [first, last) of the target, some columns from x on.
struct Item {
  uint32_t first, last, x;

  Item(const Item&) = default;
  __device__ __forceinline__ Item(uint32_t first, uint32_t last, uint32_t x) : first(first), last(last), x(x) {}
  __device__ __forceinline__ Item(const PixelCall& call, uint32_t index, int columns) {
    const uint32_t down = index / call.items_across;
    first = down * call.item_rows, last = min(first + call.item_rows, call.rows);
    x = (index - down * call.items_across) * columns;
  }
};

template <class Label>
struct Pixel {
  float z;
  Label label;  // bool, where the target is of bytes
  bool is_target, exists, keep;
};

// The map around the current row: a pixel is similar enough if above + weight * step >= limit.
template <int kColumns, Rows kRows = Rows::any, bool kKeep = false>
class SimilarColumns {
 public:
  __device__ __forceinline__ SimilarColumns(const PixelCall& call, int64_t sample, uint32_t y, uint32_t x)
      : map_(call.similarity, call.map_rows, call.map_columns, sample, y, x, call.similarity.data != nullptr) {
#pragma unroll
    for (int k = 0; k < kColumns; ++k) above_[k] = kInfinity, step_[k] = 0;  // without a map all are
  }

  __device__ __forceinline__ void next_row(const PixelCall& call, float limit) {
    weight_ = map_.next_row(call.similarity, call.map_rows, [&](int k, float above, float below) {
      // What interpolate() of common/resize.h gives beyond above + weight * step: never less than the smaller of the
      // two, and equal ones (infinities too) unchanged. So where both reach the limit, all between them do.
      const bool both = (above >= limit) & (below >= limit) & ((above == below) | (::fabsf(above) < kInfinity));
      above_[k] = both ? kInfinity : above;
      step_[k] = both ? 0.0f : below - above;
    });
  }

  __device__ __forceinline__ bool reaches(int k, float limit) const { return above_[k] + weight_ * step_[k] >= limit; }

 private:
  ResizedColumns<kColumns, kRows, kKeep> map_;
  float weight_ = 0;
  float above_[kColumns], step_[kColumns];
};

// Whether a label is kept that is neither 0 nor 1. For the few items that have one, and so that others need not look.
__device__ __forceinline__ bool keeps_bad_label(const PixelCall& call, int64_t sample, const Item& item, int columns, bool has_valid, float limit) {
  const uint8_t* target = static_cast<const uint8_t*>(call.target.data) + sample * call.target.sample_stride;
  for (uint32_t y = item.first; y < item.last; ++y) {
#pragma unroll 1
    for (uint32_t x = item.x; x < item.x + columns; ++x) {
      if (target[y * call.target.row_stride + x] <= 1) continue;
      if (has_valid && load_element(call.valid, sample, y, x) == 0) continue;
      SimilarColumns<1, Rows::packed_floats> similar(call, sample, y, x);
      similar.next_row(call, limit);
      if (call.protect_target | similar.reaches(0, limit)) return true;
    }
  }
  return false;
}

template <class Logit, bool kValid>
struct Direct {
  using Stored = Logit;
  using Label = bool;
  static constexpr int kColumns = 16 / int(sizeof(Logit));
  static constexpr int kBlocksPerProcessor = kColumns == 4 && !kValid ? 3 : 2;
  static constexpr int kBatch = 2;  // rows whose loads are on their way at once

  // Calls pixel(k, Pixel) for the columns of each row of an item, then end(y); returns whether a label was kept that is
  // no probability.
  template <class P, class E>
  static __device__ __forceinline__ bool walk(const PixelCall& call, int64_t sample, const Item& item, float limit, P pixel, E end) {
    const Logit* logits = static_cast<const Logit*>(call.logits.data) + sample * call.logits.sample_stride +
        item.first * call.logits.row_stride + item.x;
    const uint8_t* target = static_cast<const uint8_t*>(call.target.data) + sample * call.target.sample_stride +
        item.first * call.target.row_stride + item.x;
    const uint8_t* valid = static_cast<const uint8_t*>(call.valid.data);
    if (kValid) valid += sample * call.valid.sample_stride + item.first * call.valid.row_stride + item.x;
    SimilarColumns<kColumns, Rows::packed_floats> similar(call, sample, item.first, item.x);
    unsigned all_labels = 0;  // or-ed

    for (uint32_t y = item.first; y < item.last; y += kBatch) {
      Pack<Logit, kColumns> z[kBatch];
      Pack<unsigned, kColumns / 4> labels[kBatch], exists[kBatch];
#pragma unroll
      for (int row = 0; row < kBatch; ++row) {
        if (row > 0 && y + row >= item.last) break;
        z[row] = load_input<kColumns>(logits);
        labels[row] = load_input<kColumns / 4>(reinterpret_cast<const unsigned*>(target));
        logits += call.logits.row_stride;
        target += call.target.row_stride;
        if (!kValid) continue;
        exists[row] = load_input<kColumns / 4>(reinterpret_cast<const unsigned*>(valid));
        valid += call.valid.row_stride;
      }
#pragma unroll
      for (int row = 0; row < kBatch; ++row) {
        if (row > 0 && y + row >= item.last) break;
        similar.next_row(call, limit);
#pragma unroll
        for (int k = 0; k < kColumns; ++k) {
          if (k % 4 == 0) all_labels |= labels[row].value[k / 4];
          const unsigned byte = 0xFFu << k % 4 * 8, label = labels[row].value[k / 4] & byte;
          const unsigned spared = call.protect_target ? label : 0;
          const bool there = !kValid || (exists[row].value[k / 4] & byte) != 0, is_target = there & (label != 0);
          const bool keep = there & (similar.reaches(k, limit) | (spared != 0));
          pixel(k, Pixel<Label>{element(z[row], k), is_target, is_target, there, keep});
        }
        end(y + row);
      }
    }
    return (all_labels & 0xFEFEFEFEu) != 0 && keeps_bad_label(call, sample, item, kColumns, kValid, limit);
  }
};

struct Resized {
  using Label = bool;
  static constexpr int kColumns = 4;
  static constexpr int kBlocksPerProcessor = 2;
  static constexpr int kAhead = 2;  // rows of labels that are on their way before they are needed

  // Calls pixel() and end() as Direct does.
  template <class P, class E>
  static __device__ __forceinline__ bool walk(const PixelCall& call, int64_t sample, const Item& item, float limit, P pixel, E end) {
    const uint8_t* target = static_cast<const uint8_t*>(call.target.data) + sample * call.target.sample_stride +
        item.first * call.target.row_stride + item.x;
    const uint8_t* valid = static_cast<const uint8_t*>(call.valid.data);
    if (valid) valid += sample * call.valid.sample_stride + item.first * call.valid.row_stride + item.x;
    const bool inside = item.x < call.columns;  // threads behind the last column have work in a gather
    unsigned labels[kAhead + 1], exists[kAhead + 1], all_labels = 0;  // four to a word; the last: or-ed
    const auto load_row = [&](int row, uint32_t y) {
      labels[row] = 0, exists[row] = inside ? ~0u : 0;
      if (y >= item.last || !inside) return;
      labels[row] = __ldg(reinterpret_cast<const unsigned*>(target));
      target += call.target.row_stride;
      if (!valid) return;
      exists[row] = __ldg(reinterpret_cast<const unsigned*>(valid));
      valid += call.valid.row_stride;
    };
#pragma unroll
    for (int row = 1; row <= kAhead; ++row) load_row(row, item.first + row - 1);
    ResizedColumns<kColumns, Rows::packed, true> logits(call.logits, call.logit_rows, call.logit_columns, sample, item.first, item.x);
    SimilarColumns<kColumns, Rows::packed_floats, true> similar(call, sample, item.first, item.x);
    float above[kColumns], below[kColumns], step[kColumns];

#pragma unroll 1
    for (uint32_t y = item.first; y < item.last; ++y) {
#pragma unroll
      for (int row = 0; row < kAhead; ++row) labels[row] = labels[row + 1], exists[row] = exists[row + 1];
      load_row(kAhead, y + kAhead);
      const float weight = logits.next_row(call.logits, call.logit_rows, [&](int k, float first, float second) {
        above[k] = first, below[k] = second, step[k] = first == second ? 0.0f : second - first;
      });
      similar.next_row(call, limit);
      all_labels |= labels[0];
      const unsigned spared = call.protect_target ? labels[0] : 0;
      const auto row = [&](auto all_exist) {
#pragma unroll
        for (int k = 0; k < kColumns; ++k) {
          const unsigned byte = 0xFFu << k * 8;
          const bool there = decltype(all_exist)::value || (exists[0] & byte) != 0, is_target = there & ((labels[0] & byte) != 0);
          const bool keep = there & (similar.reaches(k, limit) | ((spared & byte) != 0));
          // interpolate() of common/resize.h
          const float least = fminf(above[k], below[k]), product = weight * step[k], value = above[k] + product;
          pixel(k, Pixel<Label>{value < least ? least : value, is_target, is_target, there, keep});
        }
      };
      const unsigned zeros = (exists[0] - 0x01010101u) & ~exists[0] & 0x80808080u;  // 0 where no byte is
      zeros == 0 ? row(std::true_type()) : row(std::false_type());
      end(y);
    }
    return (all_labels & 0xFEFEFEFEu) != 0 && keeps_bad_label(call, sample, item, kColumns, valid != nullptr, limit);
  }
};

struct General {
  using Label = float;
  static constexpr int kColumns = 4;
  static constexpr int kBlocksPerProcessor = 2;

  template <class P, class E>
  static __device__ __forceinline__ bool walk(const PixelCall& call, int64_t sample, const Item& item, float limit, P pixel, E end) {
    const int count = item.x < call.columns ? int(min(uint32_t(kColumns), call.columns - item.x)) : 0;
    ResizedColumns<kColumns> logits(call.logits, call.logit_rows, call.logit_columns, sample, item.first, item.x);
    SimilarColumns<kColumns> similar(call, sample, item.first, item.x);
    float above[kColumns], below[kColumns], labels[kColumns];
    bool bad = false;

    for (uint32_t y = item.first; y < item.last; ++y) {
      unsigned exist = (1u << count) - 1;  // bits
      if (call.valid.data) {
        load_row(call.valid, sample, y, item.x, count, labels);
#pragma unroll
        for (int k = 0; k < kColumns; ++k) exist &= ~(unsigned(labels[k] == 0) << k);
      }
      load_row(call.target, sample, y, item.x, count, labels);
      const float weight = logits.next_row(call.logits, call.logit_rows, [&](int k, float first, float second) {
        above[k] = first, below[k] = second;
      });
      similar.next_row(call, limit);
#pragma unroll
      for (int k = 0; k < kColumns; ++k) {
        const bool there = exist >> k & 1, is_target = there & (labels[k] > 0.5f);
        const bool keep = there & (similar.reaches(k, limit) | (call.protect_target & is_target));
        pixel(k, Pixel<Label>{interpolate(above[k], below[k], weight), labels[k], is_target, there, keep});
        bad |= keep & !((labels[k] >= 0) & (labels[k] <= 1));
      }
      end(y);
    }
    return bad;
  }

 private:
  // `count` elements of a row from column x on; in one load where they are a word of bytes.
  static __device__ __forceinline__ void load_row(const Plane& plane, int64_t sample, uint32_t y, uint32_t x, int count,
                                                  float (&out)[kColumns]) {
    with_type(plane.type, plane.data, [&](auto* data) {
      auto* at = data + sample * plane.sample_stride + y * plane.row_stride + x * plane.column_stride;
      if (sizeof(*at) == 1 && plane.column_stride == 1 && count == kColumns && reinterpret_cast<uintptr_t>(at) % kColumns == 0) {
        const auto word = load_input<kColumns>(reinterpret_cast<const uint8_t*>(at));
#pragma unroll
        for (int k = 0; k < kColumns; ++k) out[k] = to_float(word.value[k]);
      } else {
#pragma unroll
        for (int k = 0; k < kColumns; ++k) out[k] = k < count ? to_float(at[k * plane.column_stride]) : 0.0f;
      }
    });
  }
};

}  // namespace aml::cuda
