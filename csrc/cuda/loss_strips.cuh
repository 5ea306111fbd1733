// What masked_loss and aml_loss do with pixels: thresholds, sums over what is kept, the loss from the sums.
//
// The image is cut in items, a thread's work, and strips of 32 items, a warp's. Strips are divided among as many blocks
// as the device runs at once, in one run each, so that a block meets one or two samples, whose thresholds it finds by
// itself before its warps take the strips of both: maps are small, and nobody has to wait. (Long maps are shared by teams
// of blocks.) The sums of each strip go to memory; behind a barrier one block per sample adds them up in order, and the
// last of these blocks adds the samples.
//
// The barrier is that of a cooperative launch, because its counter is set up by the driver: nothing has to be zeroed
// before the launch, and a captured graph can be replayed. Blocks behind the barrier may be of any sample. A cluster,
// which exists from sm_90 on, would tie a sample to its 8 blocks (16, if asked for): a batch of 4 would leave most of the
// device idle, the sum over samples would need another barrier, and sm_80 this kernel all the same. What it costs: all
// blocks run at once, so that the launch waits for kernels of other streams (NCCL's, say), and none runs beside it.
#pragma once

#include "quantile.cuh"
#include "sums.cuh"

namespace aml::cuda {

constexpr int kLossThreads = 256, kLossWarps = kLossThreads / kWarp;
enum Reduction : int { kMean, kSum, kNone };
enum SumColumn : int { kThreshold, kBce, kDice, kWeight, kP, kY, kPy, kSumColumns };
enum CountColumn : int { kKept, kKeptTarget, kIntersection, kUnion, kCountColumns };

// From which similarity on a pixel is kept: a quantile of the map, or one number per sample, or one for all.
struct Limit {
  bool by_quantile = false, rank_in_fp64 = true;
  float quantile = 0;
  Plane map_valid;
  const float* thresholds = nullptr;
  int64_t threshold_stride = 0;
  float threshold = -kInfinity;
};

struct LossCall : PixelCall {
  Limit limit;
  LossOptions<float> options;
  Reduction reduction;
  float *loss, *sums;  // [samples] or [1]; [samples, kSumColumns]
  int64_t* counts;     // [samples, kCountColumns]
  // Set by divide_loss():
  int strips;       // of a sample
  int blocks;       // of the grid
  int group_blocks, group_strips;  // how many blocks share how many strips: all of them, or those of a team
  bool teams;                      // each sample has a team of blocks, which find its threshold together
  // Scratch, not initialised:
  StripSums* strip_sums;  // [samples, strips]
  TeamCounts* team_counts;
  float* losses;     // [samples]
  unsigned* ticket;  // how many blocks have finished their samples
};

// ---- thresholds

// The blocks that find a sample's threshold together: this one alone, or `blocks` of the grid (all of which do so).
struct LimitTeam {
  TeamCounts* total;  // null: alone
  int rank, blocks;

  __device__ __forceinline__ SeveralBlocks several() const { return {total, rank, blocks}; }
  __device__ __forceinline__ int64_t first() const { return several().first(); }
  __device__ __forceinline__ int64_t threads() const { return several().threads(); }
  __device__ __forceinline__ void merge(Selection& s, int pass) const { total ? several().merge(s, pass) : __syncthreads(); }
  __device__ __forceinline__ int64_t count(const Selection& s, int pass, int bin) const {
    return total ? several().count(s, pass, bin) : int64_t(s.bins[bin]);
  }
};

// The values of a map of any type, one at a time: less code than SampleValues of three types.
struct MapValues {
  const Plane& map;
  const Plane& valid;
  int64_t sample;

  __device__ int64_t count() const { return map.rows * map.columns; }

  __device__ __forceinline__ bool load_key(int64_t i, uint32_t& key) const {
    if (i >= count()) return false;
    const uint32_t y = uint32_t(i) / uint32_t(map.columns), x = uint32_t(i) - y * uint32_t(map.columns);
    key = selection_key(load_element(map, sample, y, x));
    return !valid.data || load_element(valid, sample, y, x) != 0;
  }

  template <class F>
  __device__ __forceinline__ void visit(int64_t first, int64_t threads, F f) const {
    int64_t y = first / map.columns, x = first - y * map.columns;
    const int64_t step_y = threads / map.columns, step_x = threads - step_y * map.columns;
    while (y < map.rows) {
      f(!valid.data || load_element(valid, sample, y, x) != 0, selection_key(load_element(map, sample, y, x)));
      y += step_y, x += step_x;
      if (x >= map.columns) x -= map.columns, ++y;
    }
  }
};

// How a kernel finds thresholds: of few values, of many by teams or alone, or of either alone.
enum class Search { few, teams, alone };

// By all threads of the block; of all blocks where they are teams. Calls meanwhile() where there is a search.
template <Search kSearch, class Values, class F>
__device__ __forceinline__ float find_limit(const LossCall& call, const Values& values, int64_t sample, Selection& selection, F meanwhile) {
  const Limit& limit = call.limit;
  if (limit.thresholds) return limit.thresholds[sample * limit.threshold_stride];
  if (!limit.by_quantile) return limit.threshold;
  if (kSearch == Search::few || (kSearch == Search::alone && is_few<kLossThreads>(values.count()))) {
    return quantile_of_few<kLossThreads>(values, limit.quantile, Interpolation::linear, limit.rank_in_fp64, selection, meanwhile);
  }
  meanwhile();
  if constexpr (kSearch != Search::teams) {
    return team_quantile<kLossThreads>(values, OneBlock{}, limit.quantile, Interpolation::linear, limit.rank_in_fp64, selection);
  }
  LimitTeam team{nullptr, 0, 1};
  if (call.teams) {
    team = {call.team_counts + sample, int(blockIdx.x) % call.group_blocks, call.group_blocks};
    clear_team_counts(team.several());
    grid_barrier();
  }
  return team_quantile<kLossThreads>(values, team, limit.quantile, Interpolation::linear, limit.rank_in_fp64, selection);
}

// ---- strips

// What is left of a block's strips, which are numbered through all samples.
struct StripRun {
  int begin, end, part_end;  // the part that is summed next ends with some sample

  StripRun() = default;
  __device__ explicit StripRun(const LossCall& call) {
    const int group = int(blockIdx.x) / call.group_blocks, rank = int(blockIdx.x) - group * call.group_blocks;
    const int each = call.group_strips / call.group_blocks, more = call.group_strips - each * call.group_blocks;
    begin = group * call.group_strips + rank * each + min(rank, more);
    end = begin + each + (rank < more);
  }
};

// While blocks look for thresholds, and wait for each other, memory would be idle: the first rows that a block will sum
// are fetched to the L2 cache meanwhile, up to 64 KB of the logits and of the target each.
constexpr uint32_t kLineBytes = 128, kPrefetchedLines = 512;

__device__ __forceinline__ void prefetch_rows(const LossCall& call, const Plane& plane, const StripRun& run) {
  if (plane.column_stride != 1 || plane.rows != call.rows || plane.columns != call.columns) return;
  const uint32_t bytes = bytes_of(plane.type), row_lines = (call.columns * bytes + kLineBytes - 1) / kLineBytes;
  const uint32_t sample = run.begin / call.strips, strip = run.begin - sample * call.strips;
  const uint32_t end = min(strip + run.end - run.begin, uint32_t(call.strips));  // of the first sample's
  const uint32_t top = strip * kWarp / call.items_across, bottom = (end * kWarp - 1) / call.items_across;
  const uint32_t bands = bottom - top + 1;
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < min(bands * call.item_rows * row_lines, kPrefetchedLines); i += kLossThreads) {
    const uint32_t row = i / row_lines, down = row / bands, y = (top + row - down * bands) * call.item_rows + down;
    const int64_t offset = sample * plane.sample_stride + y * plane.row_stride;
    if (y < call.rows) prefetch(static_cast<const char*>(plane.data) + offset * bytes + (i - row * row_lines) * kLineBytes);
  }
}

__device__ __forceinline__ void prefetch_rows(const LossCall& call, const StripRun& run) {
  prefetch_rows(call, call.logits, run);
  prefetch_rows(call, call.target, run);
}

// By all threads of the block. A run is in shared memory, because a selection needs all registers.
__device__ __forceinline__ void begin_strips(const LossCall& call, StripRun& run) {
  if (threadIdx.x == 0) run = StripRun(call);
  __syncthreads();
}

// ---- sums

constexpr int kLimitsAtOnce = 8;  // samples whose thresholds a block finds before it sums their strips

// The sums of a part of the strips. A sample's threshold is limits[sample % kLimitsAtOnce].
template <class Way>
__device__ __forceinline__ void sum_strips(const LossCall& call, const StripRun& run, const float (&limits)[kLimitsAtOnce]) {
  for (int strip = run.begin + int(threadIdx.x) / kWarp; strip < run.part_end; strip += kLossWarps) {
    const int sample = strip / call.strips;
    ItemSums<typename Way::Label> sums;
    const uint32_t item = uint32_t(strip - sample * call.strips) * kWarp + threadIdx.x % kWarp;
    if (item < call.items) {
      sums.bad_target = Way::walk(call, sample, Item(call, item, Way::kColumns), limits[sample % kLimitsAtOnce],
                                  [&](int, const auto& pixel) { sums.add(pixel, call.options); },
                                  [&](uint32_t) { sums.end_row(); });
    }
    const StripSums total = warp_sums(sums.total(call.options));
    if (threadIdx.x % kWarp == 0) call.strip_sums[strip] = total;
  }
}

// Calls sum(limits) for the strips of `run`, some samples after the other.
// kFloatMap: the map consists of contiguous floats, or has rows of them.
template <bool kFloatMap, Search kSearch, class F>
__device__ __forceinline__ void run_strips(const LossCall& call, StripRun& run, Selection& selection, F sum) {
  AML_SHARED(limits, float[kLimitsAtOnce]);
  while (run.begin < run.end) {
    const int first = run.begin / call.strips, last = min((run.end - 1) / call.strips, first + kLimitsAtOnce - 1);
    for (int sample = first; sample <= last; ++sample) {
      float limit;
      const auto meanwhile = [&] {
        if (kSearch != Search::alone && sample == first) prefetch_rows(call, run);
      };
      if constexpr (kFloatMap) {
        const SampleValues<float> values(call.similarity, call.limit.map_valid, sample);
        limit = find_limit<kSearch>(call, values, sample, selection, meanwhile);
      } else {
        limit = find_limit<kSearch>(call, MapValues{call.similarity, call.limit.map_valid, sample}, sample, selection, meanwhile);
      }
      if (threadIdx.x == 0) {
        limits[sample % kLimitsAtOnce] = limit;
        if (run.begin <= sample * call.strips) call.sums[int64_t(sample) * kSumColumns + kThreshold] = limit;
      }
    }
    if (threadIdx.x == 0) run.part_end = min(run.end, (last + 1) * call.strips);  // kept in a register, it would be the one too many
    __syncthreads();
    sum(limits);
    __syncthreads();
    if (threadIdx.x == 0) run.begin = run.part_end;
    __syncthreads();
  }
}

// ---- the loss

__device__ inline void finish_sample(const LossCall& call, int64_t sample) {
  const SampleSums<float> s = block_sums<kLossThreads>(call.strip_sums + sample * call.strips, call.strips);
  if (threadIdx.x != 0) return;
  const SampleLoss<float> result = sample_loss<float>(s, call.options);
  // A kept target that is no probability: the loss is NaN. Its gradient is 0, which these sums lead to.
  const bool bad = s.bad_target > 0;
  float* sums = call.sums + sample * kSumColumns;
  sums[kBce] = result.bce, sums[kDice] = result.dice, sums[kWeight] = bad ? 0 : s.weight;
  sums[kP] = bad ? kInfinity : s.p, sums[kY] = bad ? 0 : s.y, sums[kPy] = bad ? 0 : s.py;
  int64_t* counts = call.counts + sample * kCountColumns;
  counts[kKept] = s.kept, counts[kKeptTarget] = s.kept_target;
  counts[kIntersection] = s.intersection, counts[kUnion] = s.union_;
  (call.reduction == kNone ? call.loss : call.losses)[sample] = bad ? kNaN : result.loss;
}

__device__ inline void finish_loss(const LossCall& call) {
  grid_barrier();
  if (blockIdx.x >= call.samples) return;
  for (int64_t sample = blockIdx.x; sample < call.samples; sample += gridDim.x) finish_sample(call, sample);
  if (call.reduction == kNone) return;

  AML_SHARED(last, bool);
  if (threadIdx.x == 0) {
    const unsigned others = unsigned(call.samples < gridDim.x ? call.samples : gridDim.x) - 1;
    __threadfence();
    last = atomicAdd(call.ticket, 1u) == others;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  float sum = 0;
  for (int64_t sample = threadIdx.x; sample < call.samples; sample += kLossThreads) sum += __ldcg(call.losses + sample);
  sum = block_sum<kLossThreads>(sum);
  if (threadIdx.x == 0) *call.loss = call.reduction == kMean ? sum / float(call.samples) : sum;
}

}  // namespace aml::cuda
