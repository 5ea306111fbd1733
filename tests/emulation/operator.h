// Stands in for what an operator's .cu takes from PyTorch, so that it runs as it is, from tensors to launch: tensors
// whose memory belongs to the test, registration by name, calls with a list of arguments. Tensors that an operator makes
// are exactly as long as they have to be, and all ones.
#pragma once

#include <functional>
#include <optional>
#include <sstream>
#include <tuple>
#include <variant>

#include "emulator.h"

namespace torch::headeronly {
enum class ScalarType : int8_t { Byte = 0, Int = 3, Long = 4, Half = 5, Float = 6, Double = 7, Bool = 11, BFloat16 = 15 };
using IntHeaderOnlyArrayRef = std::vector<int64_t>;
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

inline Tensor new_empty(const Tensor& like, std::vector<int64_t> sizes, std::optional<ScalarType> type = std::nullopt) {
  Tensor tensor(nullptr, type.value_or(like.scalar_type()), sizes, sizes);
  int64_t stride = 1;
  std::vector<int64_t> strides(sizes.size());
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes[i]) strides[i] = stride;
  const size_t bytes = size_t(tensor.numel() * element_size(tensor.scalar_type()));
  void* data;
  if (posix_memalign(&data, 512, std::max<size_t>(bytes, 1))) throw std::bad_alloc();
  std::memset(data, 0xFF, bytes);
#if defined(AML_EMULATION_TRACE)
  emulation::buffers.emplace_back(data, bytes);
#endif
  return {std::shared_ptr<void>(data, std::free), tensor.scalar_type(), std::move(sizes), std::move(strides)};
}

// On a GPU this is a kernel of PyTorch's.
inline Tensor contiguous(const Tensor& from) {
  if (from.is_contiguous()) return from;
  Tensor to = new_empty(from, from.sizes());
  emulation::launches.push_back("copy");
  const int64_t bytes = element_size(from.scalar_type());
  for (int64_t i = 0; i < from.numel(); ++i) {
    int64_t rest = i, offset = 0;
    for (int64_t d = from.dim() - 1; d >= 0; rest /= from.size(d), --d) offset += rest % from.size(d) * from.stride(d);
    std::memcpy(to.mutable_data_ptr<char>() + i * bytes, from.const_data_ptr<char>() + offset * bytes, size_t(bytes));
  }
  return to;
}

namespace accelerator {
using DeviceIndex = int32_t;
struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};
}  // namespace accelerator

}  // namespace torch::stable

using AOTITorchError = int32_t;
inline AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
#define STABLE_TORCH_ERROR_CODE_CHECK(call) (static_cast<void>(call))

template <class... Parts>
void emulated_check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}
#define STD_TORCH_CHECK(condition, ...) emulated_check(static_cast<bool>(condition), __VA_ARGS__)

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
    if (given.size() != sizeof...(Parameters)) throw Error("called with another number of arguments than it takes");
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
