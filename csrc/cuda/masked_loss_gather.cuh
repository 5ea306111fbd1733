// The gradient of logits that masked_loss resized (align_corners=True): the transpose of the resize as a gather, so that
// nothing is added by atomics and every sum has one order.
//
// A block owns a tile of the logits. It walks over the rows of the target that were blended from it, computes each
// pixel's gradient once per tile, and folds rows of pixels onto rows of logits in registers; a full row then goes to
// shared memory, where each logit gathers its columns. Only the pixels between tiles are computed twice.
#pragma once

#include "masked_loss_backward.cuh"

namespace aml::cuda {

constexpr int kGatherThreads = 128;
constexpr int kGatherColumns = General::kColumns;        // of a thread
static_assert(Resized::kColumns == kGatherColumns, "both ways have the same items");
constexpr int kChunk = kGatherThreads * kGatherColumns;  // columns of the target that are worked on at once
constexpr int kTileRows = 8, kTileColumns = kChunk;      // of logits, at most

struct GatherCall : GradientCall {
  uint32_t tile_rows = 0, tile_columns = 0;  // of logits
  uint32_t tiles_down = 0, tiles_across = 0;
};

// The first index of the target that lies at source element `element` or behind it, or the end.
__device__ __forceinline__ uint32_t first_at(const Axis& axis, int64_t element, uint32_t end) {
  if (element <= 0) return 0;
  if (element >= axis.source) return end;
  const uint32_t step = axis.multiplier, first = (uint32_t(element) * axis.denominator + step - 1) / step;
  return first < end ? first : end;
}

struct GatherTile {
  float cells[kTileRows][kTileColumns];  // the tile's gradient
  float line[kChunk];                    // gradient of a row of logits at the target's columns
  float weight[kChunk];                  // of each column, for the logit on its right
  uint32_t start[kTileColumns + 2];      // where the columns of logit c - 1 begin

  // Adds `values`, a row of gradients at the chunk's columns, to a row of cells.
  __device__ __forceinline__ void gather(const float (&values)[kGatherColumns], uint32_t chunk, int row, uint32_t columns) {
#pragma unroll
    for (int k = 0; k < kGatherColumns; ++k) line[threadIdx.x * kGatherColumns + k] = values[k];
    __syncthreads();
    for (uint32_t c = threadIdx.x; c < columns; c += kGatherThreads) {
      const uint32_t begin = max(start[c], chunk) - chunk, middle = max(start[c + 1], chunk) - chunk;
      const uint32_t end = min(max(start[c + 2], chunk) - chunk, uint32_t(kChunk));
      float sum = 0;
      for (uint32_t x = begin; x < min(middle, end); ++x) sum += weight[x] * line[x];
      for (uint32_t x = middle; x < end; ++x) sum += line[x] - weight[x] * line[x];
      cells[row][c] += sum;
    }
    __syncthreads();  // `line` may be written again
  }
};

template <class Way>
__global__ void __launch_bounds__(kGatherThreads, 5) masked_loss_backward_gather(const GatherCall call) {
  AML_SHARED(tile, GatherTile);
  constexpr int kColumns = kGatherColumns;
  const uint32_t tiles = call.tiles_down * call.tiles_across;
  const int64_t sample = blockIdx.x / tiles;
  const uint32_t index = blockIdx.x - uint32_t(sample) * tiles, down = index / call.tiles_across;
  const uint32_t top = down * call.tile_rows, left = (index - down * call.tiles_across) * call.tile_columns;
  const uint32_t rows = min(call.tile_rows, uint32_t(call.logits.rows) - top);
  const uint32_t columns = min(call.tile_columns, uint32_t(call.logits.columns) - left);

  for (uint32_t c = threadIdx.x; c < columns + 2; c += kGatherThreads) {
    tile.start[c] = first_at(call.logit_columns, int64_t(left) + c - 1, call.columns);
  }
  for (uint32_t i = threadIdx.x; i < rows * kTileColumns; i += kGatherThreads) tile.cells[i / kTileColumns][i % kTileColumns] = 0;
  __syncthreads();

  const LossGradient<float> g = call.loss_gradient_of(sample);
  const uint32_t first = first_at(call.logit_rows, int64_t(top) - 1, call.rows);
  const uint32_t last = first_at(call.logit_rows, int64_t(top) + rows, call.rows);
  const uint32_t end = tile.start[columns + 1];
  for (uint32_t chunk = tile.start[0]; chunk < end; chunk += kChunk) {
    const uint32_t x = chunk + threadIdx.x * kColumns;
    Position column(call.logit_columns, x);
#pragma unroll
    for (int k = 0; k < kColumns; ++k) {
      tile.weight[threadIdx.x * kColumns + k] = column.blends(call.logit_columns) ? weight_of(column.part, call.logit_columns) : 0.0f;
      column.part += call.logit_columns.part;
      column.carry(call.logit_columns);
    }
    // `here` belongs to the row of logits above the current row of the target, `next` to the one below it.
    Position row(call.logit_rows, first);
    float here[kColumns] = {}, next[kColumns] = {}, pixels[kColumns];
    const auto finish = [&](int32_t logit_row, const float (&values)[kColumns]) {
      const int32_t r = logit_row - int32_t(top);
      if (r >= 0 && r < int32_t(rows)) tile.gather(values, chunk, r, columns);
    };
    Way::walk(
        call, sample, Item(first, last, x), call.limit(sample),
        [&](int k, const auto& pixel) { pixels[k] = gradient_of(call, pixel, g); },
        [&](uint32_t y) {
          const float weight = row.blends(call.logit_rows) ? weight_of(row.part, call.logit_rows) : 0.0f;
#pragma unroll
          for (int k = 0; k < kColumns; ++k) {
            const float part = weight * pixels[k];
            next[k] += part;
            here[k] += pixels[k] - part;
          }
          const int32_t below = row.below;
          row.part += call.logit_rows.part;
          row.carry(call.logit_rows);
          if (row.below == below && y + 1 < last) return;
          finish(below, here);
          const bool follows = row.below == below + 1 && y + 1 < last;
          if (!follows) finish(below + 1, next);
#pragma unroll
          for (int k = 0; k < kColumns; ++k) here[k] = follows ? next[k] : 0.0f, next[k] = 0;
        });
  }

  with_float_type(call.logits.type, call.gradient, [&](auto* to) {
    using T = std::decay_t<decltype(*to)>;
    for (uint32_t r = 0; r < rows; ++r) {
      T* out = const_cast<T*>(to) + (sample * call.logits.rows + top + r) * call.logits.columns + left;
      for (uint32_t c = threadIdx.x; c < columns; c += kGatherThreads) out[c] = from_float<T>(tile.cells[r][c]);
    }
  });
}

// One launch, no scratch.
template <class Way>
cudaError_t launch_masked_loss_gather(const GradientCall& gradient, cudaStream_t stream) {
  GatherCall call{gradient};
  const auto divide_up = [](int64_t a, int64_t b) { return uint32_t((a + b - 1) / b); };
  // About 32 rows of the target for a tile; all its columns, or a chunk of them and what that was blended from.
  const int64_t logit_rows = call.logits.rows, logit_columns = call.logits.columns;
  const int64_t fitting = kChunk * logit_columns / call.columns - 2;
  call.tile_rows = uint32_t(std::clamp<int64_t>(32 * logit_rows / call.rows, 1, kTileRows));
  call.tile_columns = uint32_t(std::min<int64_t>(
      {call.columns <= kChunk ? logit_columns : std::max<int64_t>(fitting, 1), logit_columns, kTileColumns}));
  call.tiles_down = divide_up(logit_rows, call.tile_rows), call.tiles_across = divide_up(logit_columns, call.tile_columns);
  const int64_t blocks = call.samples * call.tiles_down * call.tiles_across;
  return AML_LAUNCH(dim3(unsigned(blocks)), dim3(kGatherThreads), 0, stream, masked_loss_backward_gather<Way>, call);
}

inline cudaError_t launch_backward(GradientCall call, cudaStream_t stream) {
  return with_way(call, [&](auto way) {
    using Way = decltype(way);
    if constexpr (std::is_same_v<Way, Resized>) {
      return launch_masked_loss_gather<Way>(call, stream);
    } else if constexpr (std::is_same_v<Way, General>) {
      return has_resized_logits(call) ? launch_masked_loss_gather<Way>(call, stream) : launch_masked_loss_backward<Way>(call, stream);
    } else {
      return launch_masked_loss_backward<Way>(call, stream);
    }
  });
}

}  // namespace aml::cuda
