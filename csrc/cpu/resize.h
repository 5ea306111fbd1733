// A plane seen at another size, row by row.
#pragma once

#include "../common/resize.h"
#include "lanes.h"
#include "rows.h"

namespace aml::cpu {
namespace {

// A row between two rows: a + weight * step, but not below `least`. This is interpolate() of ../common/resize.h with
// what depends on the two rows alone done once for all rows between them. Without `step` it is row `a` itself.
template <class T>
struct Blend {
  const T *a, *step, *least;
  T weight;

  T operator[](int64_t x) const { return step ? larger(least[x], a[x] + weight * step[x]) : a[x]; }

  AML_MEMBER Lanes<T> at(int64_t x) const {  // of a row with a step
    return larger(load_lanes(least + x), load_lanes(a + x) + Lanes<T>(weight) * load_lanes(step + x));
  }
};

// A plane as seen at the target's size, one row of one tile of columns at a time. Resizing along a row is done once
// per source row, so that no pixel needs a gather.
template <class T>
class ResizedPlane {
 public:
  static int64_t scratch(const Plane& plane, bool resized) {
    return resized ? 4 * kTileColumns + plane.columns + kLanes<T> : kTileColumns;
  }

  ResizedPlane(const Plane& plane, bool resized, const Axis<T>& rows, const Axis<T>& columns, T*& scratch)
      : plane_(plane), resized_(resized), rows_(rows), columns_(columns) {
    for (int slot = 0; slot < 2; ++slot) blended_[slot] = scratch + slot * kTileColumns;
    step_ = scratch + 2 * kTileColumns;
    least_ = scratch + 3 * kTileColumns;
    source_ = resized ? scratch + 4 * kTileColumns : scratch;  // the last vector that is loaded ends behind the row
    scratch += ResizedPlane::scratch(plane, resized);
  }

  void start_tile(int64_t sample, int64_t first, int64_t count) {
    sample_ = sample, first_ = first, count_ = count;
    below_ = -1;
    held_[0] = held_[1] = -1;
  }

  Blend<T> row(int64_t y) {
    if (!resized_) return {read_row(plane_, sample_, y, first_, count_, source_), nullptr, nullptr, T(0)};
    if (rows_.below[y] != below_ || rows_.above[y] != above_) {
      below_ = rows_.below[y], above_ = rows_.above[y];
      a_ = source_row(below_);
      const T* b = source_row(above_);
      for (int64_t x = 0; x < count_; ++x) {
        step_[x] = a_[x] == b[x] ? T(0) : b[x] - a_[x];
        least_[x] = b[x] < a_[x] ? b[x] : a_[x];
      }
    }
    return {a_, step_, least_, rows_.weight[y]};
  }

 private:
  const T* source_row(int64_t row) {
    T* out = blended_[row & 1];  // the two neighbours of a row lie in different slots
    if (held_[row & 1] == row) return out;
    held_[row & 1] = row;
    const int32_t *below = columns_.below + first_, *above = columns_.above + first_;
    const T* weight = columns_.weight + first_;
    const int64_t cell = below[0], cells = above[count_ - 1] - cell + 1;
    const T* in = read_row(plane_, sample_, row, cell, cells, source_);
    for (int64_t i = 0; in != source_ && i < cells; ++i) source_[i] = in[i];
    int64_t x = 0;
    for (; x + kLanes<T> <= count_; x += kLanes<T>) {
      const int64_t from = below[x];
      if (above[x + kLanes<T> - 1] - from >= kLanes<T>) break;  // not enlarged: the sources fill more than a vector
      const Vector<T> near = load(source_ + from - cell), w = load(weight + x);
      store(out + x, interpolate(pick<T>(near, places(below + x, from)), pick<T>(near, places(above + x, from)), w));
    }
    for (; x < count_; ++x) out[x] = interpolate(source_[below[x] - cell], source_[above[x] - cell], weight[x]);
    return out;
  }

  static Indices<T> places(const int32_t* index, int64_t from) {
    Indices<T> result;
    if constexpr (sizeof(T) == sizeof(int32_t)) {
      result = load(index) - spread(int32_t(from));
    } else {
      for (int64_t lane = 0; lane < kLanes<T>; ++lane) result[lane] = index[lane] - from;
    }
    return result;
  }

  const Plane& plane_;
  const bool resized_;
  const Axis<T>& rows_;
  const Axis<T>& columns_;
  T *source_, *blended_[2], *step_, *least_;
  const T* a_ = nullptr;
  int64_t below_ = -1, above_ = -1, held_[2] = {-1, -1};
  int64_t sample_ = 0, first_ = 0, count_ = 0;
};

}  // namespace
}  // namespace aml::cpu
