// Small kernels by which tests/test_emulator.py tests the emulator: what it computes, and what it finds wrong.
#include "operator.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
constexpr unsigned kAll = 0xFFFFFFFF;

// ---- What a warp computes: one row of 32 numbers per function.

__global__ void warp_functions(int* out) {
  const int lane = int(threadIdx.x);
  const unsigned half = lane < 16 ? 0x0000FFFFu : 0xFFFF0000u;
  int row = 0;
  auto put = [&](int value) { out[32 * row++ + lane] = value; };
  put(__shfl_sync(kAll, lane, 5));
  put(__shfl_sync(half, lane, 3, 16));
  put(__shfl_xor_sync(kAll, lane, 9));
  put(__shfl_up_sync(kAll, lane, 2));
  put(__shfl_down_sync(kAll, lane, 2, 8));
  put(int(__ballot_sync(kAll, lane % 3 == 0)));
  put(__any_sync(half, lane == 20));
  put(__all_sync(half, lane < 16));
  put(int(__match_any_sync(kAll, lane % 4)));
  put(int(__reduce_add_sync(kAll, unsigned(lane))));
  put(__reduce_min_sync(half, lane - 7));
  put(int(__reduce_or_sync(kAll, 1u << lane % 8)));
  put(__syncthreads_count(lane < 11));
  put(__syncthreads_or(lane == 40));
  put(__syncthreads_and(lane < 32));
}

Tensor warp(Tensor like) {
  Tensor out = torch::stable::new_empty(like, {15, 32}, ScalarType::Int);
  AML_LAUNCH(1, 32, 0, nullptr, warp_functions, out.mutable_data_ptr<int>());
  return out;
}

// ---- Halves: rounding of floats, and widening of all bit patterns.

__global__ void convert(const float* from, __half* half, __nv_bfloat16* bfloat, float* half_again, float* bfloat_again, int n) {
  for (int i = int(blockIdx.x * blockDim.x + threadIdx.x); i < n; i += int(gridDim.x * blockDim.x)) {
    half[i] = __float2half_rn(from[i]), bfloat[i] = __float2bfloat16_rn(from[i]);
    half_again[i] = __half2float(half[i]), bfloat_again[i] = __bfloat162float(bfloat[i]);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> halves(Tensor from) {
  auto make = [&](ScalarType type) { return torch::stable::new_empty(from, from.sizes(), type); };
  Tensor half = make(ScalarType::Half), bfloat = make(ScalarType::BFloat16), a = make(ScalarType::Float), b = make(ScalarType::Float);
  AML_LAUNCH(2, 128, 0, nullptr, convert, from.const_data_ptr<float>(), half.mutable_data_ptr<__half>(),
             bfloat.mutable_data_ptr<__nv_bfloat16>(), a.mutable_data_ptr<float>(), b.mutable_data_ptr<float>(), int(from.numel()));
  return {half, bfloat, a, b};
}

// ---- Tensor cores: a row of each lane's numbers, of a, of b and of what is added up.

template <class T>
__global__ void multiply_fragments(const uint32_t* a, const uint32_t* b, float* sum) {
  const int lane = int(threadIdx.x);
  uint32_t left[4], right[2];
  float sums[4];
  for (int i = 0; i < 4; ++i) left[i] = a[4 * lane + i], sums[i] = sum[4 * lane + i];
  for (int i = 0; i < 2; ++i) right[i] = b[2 * lane + i];
  emulation::multiply<T>(left, right, sums);
  for (int i = 0; i < 4; ++i) sum[4 * lane + i] = sums[i];
}

Tensor product(Tensor a, Tensor b, Tensor before, bool bf16) {
  Tensor sum = torch::stable::new_empty(before, before.sizes());
  std::memcpy(sum.mutable_data_ptr<float>(), before.const_data_ptr<float>(), 128 * sizeof(float));
  const auto* left = static_cast<const uint32_t*>(a.const_data_ptr());
  const auto* right = static_cast<const uint32_t*>(b.const_data_ptr());
  if (bf16) {
    AML_LAUNCH(1, 32, 0, nullptr, multiply_fragments<__nv_bfloat16>, left, right, sum.mutable_data_ptr<float>());
  } else {
    AML_LAUNCH(1, 32, 0, nullptr, multiply_fragments<__half>, left, right, sum.mutable_data_ptr<float>());
  }
  return sum;
}

// ---- A sum over blocks, right or with one mistake. Every mistake has its name.

enum Mistake { kNone, kNoBarrier, kNoAtomic, kNoFenceOfWriter, kNoFenceOfReader, kBeyondShared, kBeyondGlobal, kMisaligned };

__global__ void sum_up(const int* from, int n, int* partial, unsigned* ticket, int* out, int mistake) {
  AML_SHARED(parts, int[8]);
  AML_SHARED(total, int[1]);
  AML_SHARED(last, bool);
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  if (threadIdx.x == 0) total[0] = 0;
  int sum = 0;
  for (int i = int(blockIdx.x * blockDim.x + threadIdx.x); i < n; i += int(gridDim.x * blockDim.x)) sum += from[i];
  if (mistake == kBeyondGlobal && threadIdx.x == 0) sum += from[n];
  if (mistake == kMisaligned) sum += reinterpret_cast<const int4*>(from + 1)->x;
  sum = __reduce_add_sync(kAll, sum);
  if (lane == 0) parts[warp + (mistake == kBeyondShared ? 7 : 0)] = sum;
  if (mistake != kNoBarrier) __syncthreads();
  if (lane == 0) {
    if (mistake == kNoAtomic) total[0] += parts[warp]; else atomicAdd(&total[0], parts[warp]);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = total[0];
    if (mistake != kNoFenceOfWriter) __threadfence();
    last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    if (mistake != kNoFenceOfReader) __threadfence();
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    out[0] = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) out[0] += partial[b];
  }
}

Tensor sum(Tensor from, int64_t blocks, int64_t mistake) {
  Tensor partial = torch::stable::new_empty(from, {blocks}), ticket = torch::stable::new_empty(from, {1}), out = torch::stable::new_empty(from, {1});
  *ticket.mutable_data_ptr<int>() = 0;
  AML_LAUNCH(unsigned(blocks), 128, 0, nullptr, sum_up, from.const_data_ptr<int>(), int(from.numel()), partial.mutable_data_ptr<int>(),
             ticket.mutable_data_ptr<unsigned>(), out.mutable_data_ptr<int>(), int(mistake));
  return out;
}

// ---- Copies to shared memory that go on beside the thread: packs that all read in reverse order.

enum CopyMistake { kCopiedRight, kNotWaitedFor, kWaitedForTheGroupBefore, kNoBarrierBehind, kReadAtOnce, kMisalignedCopy };

__global__ void reverse(const int* from, int* out, int n, int mistake) {
  AML_SHARED(pack, int4[64]);
  const int i = int(threadIdx.x), left = n - 4 * i;
  emulation::commit_copies();
  if (left >= 4) {
    emulation::copy_async(&pack[i], from + 4 * i + (mistake == kMisalignedCopy));
  } else {
    pack[i] = {0, 0, 0, 0};
  }
  emulation::commit_copies();
  if (mistake != kNotWaitedFor) emulation::wait_for_copies(mistake == kWaitedForTheGroupBefore);
  if (mistake != kNoBarrierBehind) __syncthreads();
  const int4 other = pack[63 - i];
  if (mistake == kReadAtOnce) emulation::copy_async(&pack[i], from);  // where another may still read
  out[4 * i] = other.x, out[4 * i + 1] = other.y, out[4 * i + 2] = other.z, out[4 * i + 3] = other.w;
}

Tensor reversed(Tensor from, int64_t mistake) {
  Tensor out = torch::stable::new_empty(from, {256});
  AML_LAUNCH(1, 64, 0, nullptr, reverse, from.const_data_ptr<int>(), out.mutable_data_ptr<int>(), int(from.numel()), int(mistake));
  return out;
}

// ---- Waiting for ever, or for nobody.

enum Wait { kDivergent, kDeadlock, kFinishedLane, kNotInMask, kGridBarrier, kFinishedBlock, kPolling, kTrap };

__global__ void wait_for(unsigned* flag, int wait) {
  const unsigned thread = threadIdx.x;
  if (wait == kDivergent) {
    if (thread < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  }
  if (wait == kDeadlock && thread != 7) __syncthreads();
  if (wait == kDeadlock && thread == 7) __syncwarp();
  if (wait == kFinishedLane) {
    if (thread == 5) return;
    __syncwarp();
  }
  if (wait == kNotInMask) __syncwarp(1);
  if (wait == kFinishedBlock && blockIdx.x == 0) return;
  if (wait == kGridBarrier || wait == kFinishedBlock) cooperative_groups::this_grid().sync();
  if (wait == kPolling && blockIdx.x == 0) while (atomicAdd(flag, 0u) == 0) {}
  if (wait == kTrap && thread == 3) __trap();
}

Tensor waits(Tensor like, int64_t wait, bool cooperative) {
  Tensor flag = torch::stable::new_empty(like, {1}, ScalarType::Int);
  *flag.mutable_data_ptr<int>() = 0;
  if (cooperative) {
    AML_LAUNCH_COOPERATIVE(2, 64, 0, nullptr, wait_for, flag.mutable_data_ptr<unsigned>(), int(wait));
  } else {
    AML_LAUNCH(2, 64, 0, nullptr, wait_for, flag.mutable_data_ptr<unsigned>(), int(wait));
  }
  return flag;
}

// ---- Blocks of a cooperative launch that wait for each other, at the grid's barrier or at one of their own.

__global__ void rotate(const float* from, float* between, unsigned* arrived, float* out, bool own) {
  AML_DYNAMIC_SHARED(float, row);
  row[threadIdx.x] = from[blockIdx.x * blockDim.x + threadIdx.x];
  between[blockIdx.x * blockDim.x + threadIdx.x] = row[threadIdx.x];
  if (own) {
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(arrived, 1u);
      while (atomicAdd(arrived, 0u) < gridDim.x) __nanosleep(20);
      __threadfence();
    }
    __syncthreads();
  } else {
    cooperative_groups::this_grid().sync();
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = between[(blockIdx.x + 1) % gridDim.x * blockDim.x + threadIdx.x];
}

Tensor rotated(Tensor from, bool own) {
  Tensor between = torch::stable::new_empty(from, from.sizes()), out = torch::stable::new_empty(from, from.sizes());
  Tensor arrived = torch::stable::new_empty(from, {1}, ScalarType::Int);
  *arrived.mutable_data_ptr<int>() = 0;
  AML_LAUNCH_COOPERATIVE(unsigned(from.size(0)), unsigned(from.size(1)), size_t(from.size(1)) * 4, nullptr, rotate,
                         from.const_data_ptr<float>(), between.mutable_data_ptr<float>(), arrived.mutable_data_ptr<unsigned>(),
                         out.mutable_data_ptr<float>(), own);
  return out;
}

// ---- What nobody has written.

__global__ void read_unwritten(float* out) {
  AML_SHARED(unwritten, float[32]);
  out[threadIdx.x] = unwritten[threadIdx.x];
}

Tensor unwritten(Tensor like) {
  Tensor out = torch::stable::new_empty(like, {32}, ScalarType::Float);
  AML_LAUNCH(1, 32, 0, nullptr, read_unwritten, out.mutable_data_ptr<float>());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(aml_kernels, CUDA, library) {
  library.impl("warp", TORCH_BOX(&warp));
  library.impl("halves", TORCH_BOX(&halves));
  library.impl("product", TORCH_BOX(&product));
  library.impl("sum", TORCH_BOX(&sum));
  library.impl("reversed", TORCH_BOX(&reversed));
  library.impl("waits", TORCH_BOX(&waits));
  library.impl("rotated", TORCH_BOX(&rotated));
  library.impl("unwritten", TORCH_BOX(&unwritten));
}
