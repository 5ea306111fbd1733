// From tensors to what the kernels take. The public Python functions have checked shapes and types; what is checked
// here again is what would otherwise read or write outside a tensor, for callers of torch.ops.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../common/resize.h"
#include "../common/tensor.h"
#include "kernels.h"

namespace aml::cpu {

inline ScalarType scalar_type(Type type) {
  switch (type) {
    case Type::f32: return ScalarType::Float;
    case Type::f64: return ScalarType::Double;
    case Type::bf16: return ScalarType::BFloat16;
    case Type::f16: return ScalarType::Half;
    default: return ScalarType::Byte;
  }
}

// Calls f with a float, or with a double for fp64: the type that is computed in.
template <class F>
auto with_compute_type(Type type, F f) {
  return type == Type::f64 ? f(double()) : f(float());
}

// Aligned memory for the length of a call. AML_KERNELS_POISON_SCRATCH=1 fills it with NaN, to find what is read
// before it was written.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(::operator new(std::max<int64_t>(count, 1) * sizeof(T), std::align_val_t(64)))) {
    static const bool poison = std::getenv("AML_KERNELS_POISON_SCRATCH") != nullptr;
    if (poison) std::memset(static_cast<void*>(data_), 0xFF, count * sizeof(T));
  }
  ~Scratch() { ::operator delete(data_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

// Where each destination row or column lies in the source; empty where the plane is not `resized`.
template <class T>
class AxisTable {
 public:
  AxisTable(int64_t source, int64_t destination, bool align_corners, bool resized)
      : size_(resized ? destination : 0), below_(size_), above_(size_), weight_(size_) {
    require(source <= std::numeric_limits<int32_t>::max() && destination <= std::numeric_limits<int32_t>::max(),
            "rows and columns: expected at most 2^31 - 1 of each");
    for (int64_t i = 0; i < size_; ++i) {
      const Coordinate<T> c = coordinate<T>(i, source, destination, align_corners);
      below_[i] = int32_t(c.below), above_[i] = int32_t(c.above), weight_[i] = c.weight;
    }
  }
  Axis<T> axis() const { return {below_, above_, weight_}; }

 private:
  const int64_t size_;
  Scratch<int32_t> below_, above_;
  Scratch<T> weight_;
};

inline bool resizes(const Plane& plane, int64_t rows, int64_t columns) {
  return plane.data && (plane.rows != rows || plane.columns != columns);
}

template <class T>
Tensor empty(const Tensor& like, std::initializer_list<int64_t> size) {
  return torch::stable::new_empty(like, {size.begin(), size.size()}, sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double);
}

// Runs task(i, scratch) for i in [0, tasks) on PyTorch's threads. Each thread has its own scratch.
template <class T, class F>
void parallel_tasks(int64_t tasks, int64_t scratch_elements, const F& task) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(scratch_elements);
    for (int64_t i = begin; i < end; ++i) task(i, static_cast<T*>(scratch));
  });
}

// The per-sample threshold: given, or a quantile of the map; -inf where neither is.
struct Limit {
  OptionalTensor thresholds;
  std::optional<double> threshold, quantile;
  bool rank_in_fp64;
};

template <class T>
void sample_limits(const Limit& limit, const Plane& map, const Plane& map_valid, int64_t samples, T* out) {
  if (limit.quantile) {
    require(map.data, "similarity: expected [B, h, w] where quantile is given, got None");
    require(!map_valid.data || (map_valid.rows == map.rows && map_valid.columns == map.columns),
            "map_valid: expected the shape of similarity");
    const QuantileCall<T> call{map, map_valid, limit.rank_in_fp64, Interpolation::linear};
    const auto& kernel = quantile_kernels<T>();
    parallel_tasks<T>(samples, kernel.scratch(call), [&](int64_t b, T* scratch) {
      out[b] = kernel.quantile(call, b, T(*limit.quantile), scratch);
    });
    return;
  }
  require(!limit.thresholds || (limit.thresholds->dim() == 1 && limit.thresholds->size(0) == samples),
          "threshold: expected a number or [B]");
  for (int64_t b = 0; b < samples; ++b) {
    out[b] = limit.threshold ? T(*limit.threshold) : -std::numeric_limits<T>::infinity();
    if (limit.thresholds) {
      const int64_t offset = b * limit.thresholds->stride(0);
      const void* data = limit.thresholds->const_data_ptr();
      switch (type_of(*limit.thresholds)) {
        case Type::f32: out[b] = T(static_cast<const float*>(data)[offset]); break;
        case Type::f64: out[b] = T(static_cast<const double*>(data)[offset]); break;
        default: require(false, "threshold: expected dtype float32 or float64");
      }
    }
  }
}

}  // namespace aml::cpu
