// Stands in for what an operator's .cu takes from PyTorch, so that it runs as it is, from tensors to launch: tensors
// whose memory belongs to the test, registration by name, calls with a list of arguments. Tensors that an operator makes
// are exactly as long as they have to be, and all ones.
//
// nvcc takes it too, to compile the kernels for their machine code without PyTorch's headers.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <variant>
#include <vector>

#if defined(AML_EMULATED)
#include "emulator.h"
#endif

namespace torch::headeronly {
enum class ScalarType : int8_t { Byte = 0, Int = 3, Long = 4, Half = 5, Float = 6, Double = 7, Bool = 11, BFloat16 = 15 };

struct Sizes : std::vector<int64_t> {
  using std::vector<int64_t>::vector;
  Sizes(const int64_t* data, size_t count) : std::vector<int64_t>(data, data + count) {}
  Sizes(const std::vector<int64_t>& sizes) : std::vector<int64_t>(sizes) {}
};
using IntHeaderOnlyArrayRef = Sizes;
}  // namespace torch::headeronly

namespace torch::stable {

using headeronly::ScalarType;

inline int64_t element_size(ScalarType type) {
  switch (type) {
    case ScalarType::Byte:
    case ScalarType::Bool: return 1;
    case ScalarType::Half:
    case ScalarType::BFloat16: return 2;
    case ScalarType::Int:
    case ScalarType::Float: return 4;
    default: return 8;
  }
}

class Tensor {
 public:
  Tensor() = default;
  Tensor(std::shared_ptr<void> data, ScalarType type, std::vector<int64_t> sizes, std::vector<int64_t> strides)
      : data_(std::move(data)), type_(type), sizes_(std::move(sizes)), strides_(std::move(strides)) {}

  bool defined() const { return data_ != nullptr; }
  const void* const_data_ptr() const { return data_.get(); }
  void* mutable_data_ptr() const { return data_.get(); }
  template <class T>
  const T* const_data_ptr() const { return static_cast<const T*>(data_.get()); }
  template <class T>
  T* mutable_data_ptr() const { return static_cast<T*>(data_.get()); }
  ScalarType scalar_type() const { return type_; }
  const std::vector<int64_t>& sizes() const { return sizes_; }
  const std::vector<int64_t>& strides() const { return strides_; }
  int64_t size(int64_t i) const { return sizes_.at(size_t(i < 0 ? i + dim() : i)); }
  int64_t stride(int64_t i) const { return strides_.at(size_t(i < 0 ? i + dim() : i)); }
  int64_t dim() const { return int64_t(sizes_.size()); }
  int64_t numel() const {
    int64_t count = 1;
    for (int64_t size : sizes_) count *= size;
    return count;
  }
  bool is_contiguous() const {
    int64_t expected = 1;
    for (int64_t i = dim() - 1; i >= 0; expected *= size(i), --i) {
      if (size(i) != 1 && stride(i) != expected) return false;
    }
    return true;
  }
  bool is_cuda() const { return true; }
  int32_t get_device() const { return 0; }
  int32_t get_device_index() const { return 0; }

 private:
  std::shared_ptr<void> data_;
  ScalarType type_ = ScalarType::Float;
  std::vector<int64_t> sizes_, strides_;
};

inline Tensor new_empty(const Tensor& like, const headeronly::Sizes& sizes, std::optional<ScalarType> type = std::nullopt) {
  const ScalarType element = type.value_or(like.scalar_type());
  std::vector<int64_t> strides(sizes.size());
  int64_t count = 1;
  for (size_t i = sizes.size(); i-- > 0; count *= sizes[i]) strides[i] = count;
  const size_t bytes = size_t(count * element_size(element));
  void* data;
  if (posix_memalign(&data, 512, bytes ? bytes : 1)) throw std::bad_alloc();
  std::memset(data, 0xFF, bytes);
#if defined(AML_EMULATION_TRACE)
  emulation::buffers.emplace_back(data, bytes);
#endif
  return {std::shared_ptr<void>(data, std::free), element, sizes, std::move(strides)};
}

// Calls f(offset of an element of `from`, place in the order of a contiguous tensor).
template <class Function>
void for_each_element(const Tensor& from, Function f) {
  for (int64_t i = 0; i < from.numel(); ++i) {
    int64_t rest = i, offset = 0;
    for (int64_t d = from.dim() - 1; d >= 0; rest /= from.size(d), --d) offset += rest % from.size(d) * from.stride(d);
    f(offset, i);
  }
}

// On a GPU these are kernels of PyTorch's.
inline void note_launch([[maybe_unused]] const char* what) {
#if defined(AML_EMULATED)
  emulation::launches.push_back(what);
#endif
}

inline Tensor contiguous(const Tensor& from) {
  if (from.is_contiguous()) return from;
  note_launch("copy");
  Tensor to = new_empty(from, from.sizes());
  const int64_t bytes = element_size(from.scalar_type());
  for_each_element(from, [&](int64_t offset, int64_t i) {
    std::memcpy(static_cast<char*>(to.mutable_data_ptr()) + i * bytes,
                static_cast<const char*>(from.const_data_ptr()) + offset * bytes, size_t(bytes));
  });
  return to;
}

// From fp64, which is what has to be converted where an operator gets what the public functions let pass.
inline Tensor to(const Tensor& from, ScalarType type) {
  if (from.scalar_type() != ScalarType::Double || type != ScalarType::Float) throw std::runtime_error("to(): not emulated");
  note_launch("convert");
  Tensor result = new_empty(from, from.sizes(), type);
  for_each_element(from, [&](int64_t offset, int64_t i) {
    result.mutable_data_ptr<float>()[i] = float(from.const_data_ptr<double>()[offset]);
  });
  return result;
}

namespace accelerator {
using DeviceIndex = int32_t;
struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};
}  // namespace accelerator

}  // namespace torch::stable

using AOTITorchError = int32_t;
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#define TORCH_ERROR_CODE_CHECK(call) (static_cast<void>(call))

// ---- Operators by name.

namespace emulation {

using torch::stable::Tensor;
using Argument = std::variant<std::monostate, bool, int64_t, double, std::vector<double>, Tensor>;
using Arguments = std::vector<Argument>;

template <class T>
struct Convert {
  static T from(const Argument& value) { return std::get<T>(value); }
};
template <class T>
struct Convert<std::optional<T>> {
  static std::optional<T> from(const Argument& value) {
    return std::holds_alternative<std::monostate>(value) ? std::nullopt : std::optional<T>(Convert<T>::from(value));
  }
};

inline Arguments as_arguments(Tensor tensor) { return {std::move(tensor)}; }
template <class... Tensors>
Arguments as_arguments(std::tuple<Tensors...> tensors) {
  return std::apply([](auto... each) { return Arguments{Argument(each)...}; }, tensors);
}

using Boxed = std::function<Arguments(const Arguments&)>;

template <class Result, class... Parameters, size_t... index>
Boxed boxed(Result (*function)(Parameters...), std::index_sequence<index...>) {
  return [function](const Arguments& given) {
    if (given.size() != sizeof...(Parameters)) throw std::runtime_error("called with another number of arguments than it takes");
    return as_arguments(function(Convert<std::decay_t<Parameters>>::from(given[index])...));
  };
}
template <class Result, class... Parameters>
Boxed boxed(Result (*function)(Parameters...)) { return boxed(function, std::index_sequence_for<Parameters...>()); }

inline std::map<std::string, Boxed> operators;

struct Library {
  void impl(const char* name, Boxed function) { operators[name] = std::move(function); }
};
struct Registration {
  explicit Registration(void (*fill)(Library&)) {
    Library library;
    fill(library);
  }
};

}  // namespace emulation

#define TORCH_BOX(function) (::emulation::boxed(function))
#define STABLE_TORCH_LIBRARY_IMPL(space, key, library)                       \
  static void emulated_registrations(::emulation::Library& library);         \
  static const ::emulation::Registration emulated_registration(emulated_registrations); \
  static void emulated_registrations(::emulation::Library& library)
