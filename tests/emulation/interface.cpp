// The operators that the .cu files register, for Python to call through ctypes.
#include "operator.h"

using torch::stable::ScalarType;
using torch::stable::Tensor;

namespace {
emulation::Arguments arguments, results;
std::string text;
}  // namespace

extern "C" {

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

void emulation_start(uint64_t seed, int resident_blocks) {
  emulation::settings.seed = seed;
  emulation::resident_blocks = resident_blocks;
  emulation::launches.clear();
  arguments.clear();
  results.clear();
#if defined(AML_EMULATION_TRACE)
  emulation::buffers.clear();
#endif
}

void emulation_none() { arguments.emplace_back(); }
void emulation_bool(bool value) { arguments.emplace_back(value); }
void emulation_int(int64_t value) { arguments.emplace_back(value); }
void emulation_float(double value) { arguments.emplace_back(value); }
void emulation_floats(const double* values, int64_t count) { arguments.emplace_back(std::vector<double>(values, values + count)); }
void emulation_tensor(void* data, int type, int64_t dims, const int64_t* sizes, const int64_t* strides) {
  arguments.emplace_back(Tensor(std::shared_ptr<void>(data, [](void*) {}), ScalarType(type), {sizes, sizes + dims}, {strides, strides + dims}));
}

// nullptr, or what went wrong.
const char* emulation_call(const char* name) {
  try {
    const auto found = emulation::operators.find(name);
    if (found == emulation::operators.end()) throw emulation::Error(std::string("no operator ") + name);
    results = found->second(arguments);
    return nullptr;
  } catch (const std::exception& error) {
    text = error.what();
    return text.c_str();
  }
}

int64_t emulation_results() { return int64_t(results.size()); }
const void* emulation_result(int64_t i, int* type, int64_t* dims, int64_t* sizes) {
  const Tensor& tensor = std::get<Tensor>(results[size_t(i)]);
  *type = int(tensor.scalar_type());
  *dims = tensor.dim();
  std::copy(tensor.sizes().begin(), tensor.sizes().end(), sizes);
  return tensor.const_data_ptr();
}

const char* emulation_launches() {
  text.clear();
  for (const std::string& launch : emulation::launches) text += launch + "\n";
  return text.c_str();
}

#if defined(AML_EMULATION_TRACE)
// Accesses to [data, data + bytes) are counted from now on; those to tensors that the operator makes anyway.
void emulation_watch(const void* data, int64_t bytes) { emulation::buffers.emplace_back(data, size_t(bytes)); }
int64_t emulation_watched() { return int64_t(emulation::buffers.size()); }
// Address, size, and bytes read in all, distinct ones, written in all, distinct ones.
void emulation_counts(int64_t i, uint64_t* counts) {
  const emulation::Buffer& buffer = emulation::buffers[size_t(i)];
  const uint64_t all[] = {reinterpret_cast<uint64_t>(buffer.data), buffer.bytes, buffer.read, buffer.distinct(1), buffer.written, buffer.distinct(2)};
  std::copy(std::begin(all), std::end(all), counts);
}
#endif
}

#if defined(AML_EMULATION_TRACE)
#define EMULATION_HOOKS(n)                                                                                    \
  void __tsan_read##n(void* p) { emulation::access(p, n, false); }                                            \
  void __tsan_write##n(void* p) { emulation::access(p, n, true); }                                            \
  void __tsan_unaligned_read##n(void* p) { emulation::access(p, n, false); }                                  \
  void __tsan_unaligned_write##n(void* p) { emulation::access(p, n, true); }
extern "C" {
EMULATION_HOOKS(1)
EMULATION_HOOKS(2)
EMULATION_HOOKS(4)
EMULATION_HOOKS(8)
EMULATION_HOOKS(16)
void __tsan_read_range(void* p, size_t bytes) { emulation::access(p, bytes, false); }
void __tsan_write_range(void* p, size_t bytes) { emulation::access(p, bytes, true); }
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
int __tsan_atomic32_fetch_add(int* p, int value, int) { return *p += value, *p - value; }  // of std::shared_ptr
}
#undef EMULATION_HOOKS
#endif
