// The loop of sample_quantile: radix selection on ordered keys, eleven bits a pass, nothing stored but a histogram.
#pragma once

#include <limits>

#include "rows.h"

namespace aml::cpu {
namespace {

constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;
constexpr int kCopies = 4;  // of the histogram: neighbours often fall into one bin and would wait for each other

// Calls visit(values, count) on a sample's valid values, a block at a time.
template <class T, class Visit>
inline void for_each_block(const QuantileCall<T>& call, int64_t sample, Visit visit) {
  T values[kTileColumns], exists[kTileColumns];
  for (int64_t y = 0; y < call.values.rows; ++y) {
    for (int64_t x = 0; x < call.values.columns; x += kTileColumns) {
      const int64_t size = call.values.columns - x < kTileColumns ? call.values.columns - x : kTileColumns;
      const T* row = read_row(call.values, sample, y, x, size, values);
      if (!call.valid.data) {
        visit(row, size);
        continue;
      }
      const T* there = read_row(call.valid, sample, y, x, size, exists);
      int64_t count = 0;
      for (int64_t i = 0; i < size; ++i) {
        const T value = row[i];  // read before a value further left is overwritten
        values[count] = value;
        count += there[i] != 0;
      }
      visit(values, count);
    }
  }
}

inline int bit_width(uint32_t bits) { return bits ? 32 - __builtin_clz(bits) : 0; }
inline int bit_width(uint64_t bits) { return bits ? 64 - __builtin_clzll(bits) : 0; }

template <class T>
T sample_quantile(const QuantileCall<T>& call, int64_t sample, T q) {
  using Key = decltype(ordered_key(T()));
  constexpr int key_bits = 8 * sizeof(Key);
  constexpr T nan = std::numeric_limits<T>::quiet_NaN();

  int64_t count = 0, nans = 0;
  Key least = ~Key(0), greatest = 0;
  for_each_block(call, sample, [&](const T* values, int64_t size) {
    int64_t block_nans = 0;
    Key low = ~Key(0), high = 0;
    for (int64_t i = 0; i < size; ++i) {
      const Key key = ordered_key(values[i]);
      low = key < low ? key : low;
      high = key > high ? key : high;
      block_nans += values[i] != values[i];
    }
    least = low < least ? low : least;
    greatest = high > greatest ? high : greatest;
    count += size, nans += block_nans;
  });
  if (count == 0 || nans > 0 || !(q >= 0 && q <= 1)) return nan;
  const Rank<T> rank = quantile_rank(q, count, call.interpolation, call.rank_in_fp64);

  // The leading bits that least and greatest share are those of every key.
  int shift = bit_width(least ^ greatest);
  Key prefix = shift < key_bits ? least >> shift : Key(0);  // bits of the answer above `shift`
  int64_t place = rank.below;                                // among the keys with this prefix
  int64_t equal = count;                                     // how many keys have it
  while (shift > 0) {
    const int digit_bits = shift < kDigitBits ? shift : kDigitBits;
    const int below = shift - digit_bits;
    uint32_t histogram[kCopies][kBins] = {};
    const int prefix_shift = shift;
    for_each_block(call, sample, [&](const T* values, int64_t size) {
      Key keys[kTileColumns];
      for (int64_t i = 0; i < size; ++i) keys[i] = ordered_key(values[i]);
      if (prefix_shift == key_bits) {
        for (int64_t i = 0; i < size; ++i) ++histogram[i & (kCopies - 1)][keys[i] >> below];
      } else {
        const Key digit = (Key(1) << digit_bits) - 1;
        for (int64_t i = 0; i < size; ++i) {
          if (keys[i] >> prefix_shift == prefix) ++histogram[i & (kCopies - 1)][keys[i] >> below & digit];
        }
      }
    });
    int bin = 0;
    for (;; ++bin) {
      int64_t in_bin = 0;
      for (int copy = 0; copy < kCopies; ++copy) in_bin += histogram[copy][bin];
      equal = in_bin;
      if (place < in_bin) break;
      place -= in_bin;
    }
    prefix = prefix << digit_bits | Key(bin);
    shift = below;
  }
  const Key low = prefix;
  Key high = low;
  if (rank.above > rank.below && place + 1 >= equal) {  // the next place holds the next larger key
    high = ~Key(0);
    for_each_block(call, sample, [&](const T* values, int64_t size) {
      Key next = ~Key(0);
      for (int64_t i = 0; i < size; ++i) {
        const Key key = ordered_key(values[i]);
        next = key > low && key < next ? key : next;
      }
      high = next < high ? next : high;
    });
  }
  const T value = from_ordered_key(low);
  if (call.interpolation == Interpolation::linear || call.interpolation == Interpolation::midpoint) {
    return lerp(value, from_ordered_key(high), rank.weight);
  }
  return value;
}

}  // namespace
}  // namespace aml::cpu
