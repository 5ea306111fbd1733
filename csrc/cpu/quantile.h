// The loop of sample_quantile. A guess from a few values says between which two the quantile lies; one pass counts what
// is smaller and sets aside what lies between; radix selection finds it there, exactly.
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

// Moves the keys whose digit is `bin` to the front and returns how many these are; `next` becomes the smallest one whose
// digit is larger, if that is less.
template <class Key>
inline int64_t keep_bin(Key* keys, int64_t count, int shift, Key digit, Key bin, Key& next) {
  int64_t i = 0, left = 0;
#if defined(AML_AVX512)
  if constexpr (sizeof(Key) == 4) {
    const __m512i digits = _mm512_set1_epi32(int(digit)), bins = _mm512_set1_epi32(int(bin));
    __m512i least = _mm512_set1_epi32(int(next));
    for (; i + 16 <= count; i += 16) {
      const __m512i key = _mm512_loadu_si512(keys + i), its_bin = _mm512_and_si512(_mm512_srli_epi32(key, shift), digits);
      const __mmask16 chosen = _mm512_cmpeq_epi32_mask(its_bin, bins);
      least = _mm512_mask_min_epu32(least, _mm512_cmpgt_epu32_mask(its_bin, bins), least, key);
      _mm512_storeu_si512(keys + left, _mm512_maskz_compress_epi32(chosen, key));  // ends where `key` does, or before
      left += __builtin_popcount(chosen);
    }
    next = _mm512_reduce_min_epu32(least);
  }
#endif
  for (; i < count; ++i) {
    const Key key = keys[i], its_bin = key >> shift & digit;
    keys[left] = key;
    left += its_bin == bin;
    next = its_bin > bin && key < next ? key : next;
  }
  return left;
}

// The keys at `place` and `place + 1` in the order of `keys`, which are overwritten: eleven bits at a time.
template <class Key>
struct Selected {
  Key key, next;  // next is the largest number if there is none
};

template <class Key>
Selected<Key> select(Key* keys, int64_t count, int64_t place) {
  Key least = ~Key(0), greatest = 0;
  for (int64_t i = 0; i < count; ++i) {
    least = keys[i] < least ? keys[i] : least;
    greatest = keys[i] > greatest ? keys[i] : greatest;
  }
  Key next = ~Key(0);
  int shift = bit_width(Key(least ^ greatest));  // the leading bits that all keys share need no search
  uint32_t histogram[kCopies][kBins];
  while (shift > 0) {
    // Few keys: few bins in one copy, since clearing and reading them is then most of the work.
    const int most_bits = count < 8192 ? 8 : kDigitBits, copies = count < 8192 ? 1 : kCopies;
    const int digit_bits = shift < most_bits ? shift : most_bits;
    const Key digit = (Key(1) << digit_bits) - 1;
    shift -= digit_bits;
    for (int copy = 0; copy < copies; ++copy) {
      for (int64_t bin = 0; bin <= int64_t(digit); ++bin) histogram[copy][bin] = 0;
    }
    for (int64_t i = 0; i < count; ++i) ++histogram[i & (copies - 1)][keys[i] >> shift & digit];
    Key bin = 0;
    for (;; ++bin) {
      int64_t in_bin = 0;
      for (int copy = 0; copy < copies; ++copy) in_bin += histogram[copy][bin];
      if (place < in_bin) break;
      place -= in_bin;
    }
    count = keep_bin(keys, count, shift, digit, bin, next);  // all keys here agree above `shift`
  }
  return {keys[0], place + 1 < count ? keys[0] : next};
}

// The keys of the values in [low, high] are set aside as long as there is room. How many these are, how many values are
// smaller, whether any is NaN, and how many there are in all.
template <class T>
struct Bracket {
  T low, high;
  int64_t inside = 0, smaller = 0, nans = 0, all = 0;
};

template <class T, class Key>
inline void collect(Bracket<T>& bracket, const T* values, int64_t count, Key* out, int64_t room) {
  const T low = bracket.low, high = bracket.high;
  const bool fits = bracket.inside + count <= room;
  Key* to = out + (fits ? bracket.inside : 0);
  int64_t i = 0, inside = 0, smaller = 0, nans = 0;
#if defined(AML_AVX512)
  if constexpr (sizeof(T) == 4) {
    const __m512 lows = _mm512_set1_ps(low), highs = _mm512_set1_ps(high);
    __mmask16 unordered = 0;
    for (; i + 16 <= count; i += 16) {
      const __m512 v = _mm512_loadu_ps(values + i);
      const __mmask16 chosen = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(v, lows, _CMP_GE_OQ), v, highs, _CMP_LE_OQ);
      smaller += __builtin_popcount(_mm512_cmp_ps_mask(v, lows, _CMP_LT_OQ));
      unordered |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
      if (fits) _mm512_storeu_si512(to + inside, _mm512_maskz_compress_epi32(chosen, _mm512_castps_si512(v)));
      inside += __builtin_popcount(chosen);
    }
    nans = unordered != 0;
  }
#endif
  for (; i < count; ++i) {
    if (fits) to[inside] = bit_cast<Key>(values[i]);
    inside += (values[i] >= low) & (values[i] <= high);
    smaller += values[i] < low;
    nans += values[i] != values[i];
  }
  for (i = 0; fits && i < inside; ++i) to[i] = ordered_key(bit_cast<T>(to[i]));
  bracket.inside += inside, bracket.smaller += smaller, bracket.nans += nans, bracket.all += count;
}

constexpr int64_t kSample = 2048;  // values looked at to guess between which two the quantile lies
constexpr int64_t kOverrun = 64;   // a vector may be stored past the last key

// Room for keys: all of a short sample, an eighth of a long one.
template <class T>
int64_t quantile_scratch(const QuantileCall<T>& call) {
  const int64_t count = call.values.rows * call.values.columns, eighth = count / 8;
  return (eighth > 8 * kSample ? eighth : count < 8 * kSample ? count : 8 * kSample) + kTileColumns + kOverrun;
}

// Two values that the quantile most likely lies between.
template <class T, class Key>
inline bool guess_bracket(const QuantileCall<T>& call, int64_t sample, T q, Key* keys, Bracket<T>& bracket) {
  const int64_t step = call.values.rows * call.values.columns / kSample;
  int64_t found = 0;
  for (int64_t i = 0; i < kSample; ++i) {
    // Evenly spread, irregular within each step against patterns in the rows.
    const int64_t at = i * step + (i * 40503 % kSample) * step / kSample;
    const int64_t y = call.values.rows == 1 ? 0 : at / call.values.columns, x = at - y * call.values.columns;
    T there = 1, value = 0;
    if (call.valid.data) there = *read_row(call.valid, sample, y, x, 1, &there);
    value = *read_row(call.values, sample, y, x, 1, &value);
    if (there != 0 && value == value) keys[found++] = ordered_key(value);
  }
  if (found < kSample / 4) return false;
  const int64_t middle = int64_t(q * T(found - 1)), margin = found / 20;  // about four standard deviations
  Key* copy = keys + found;
  for (int64_t i = 0; i < found; ++i) copy[i] = keys[i];
  const T infinity = std::numeric_limits<T>::infinity();
  bracket.low = middle < margin ? -infinity : from_ordered_key(select(keys, found, middle - margin).key);
  bracket.high = middle + margin >= found ? infinity : from_ordered_key(select(copy, found, middle + margin).key);
  return true;
}

// The key at `place` of a sample's values, by histograms over all of them: for where the guess was wrong or there are
// too many equal values to set aside.
template <class T, class Key>
Key select_by_passes(const QuantileCall<T>& call, int64_t sample, int64_t place) {
  int shift = 8 * sizeof(Key);
  Key prefix = 0;
  while (shift > 0) {
    const int digit_bits = shift < kDigitBits ? shift : kDigitBits;
    const Key digit = (Key(1) << digit_bits) - 1;
    const int above = shift;
    shift -= digit_bits;
    uint32_t histogram[kCopies][kBins + 1] = {};
    for_each_block(call, sample, [&](const T* values, int64_t size) {
      int32_t bins[kTileColumns];
      for (int64_t i = 0; i < size; ++i) {
        const Key key = ordered_key(values[i]);
        const bool matches = above == 8 * sizeof(Key) || key >> (above & (8 * sizeof(Key) - 1)) == prefix;
        bins[i] = matches ? int32_t(key >> shift & digit) : kBins;
      }
      for (int64_t i = 0; i < size; ++i) ++histogram[i & (kCopies - 1)][bins[i]];
    });
    Key bin = 0;
    for (;; ++bin) {
      int64_t in_bin = 0;
      for (int copy = 0; copy < kCopies; ++copy) in_bin += histogram[copy][bin];
      if (place < in_bin) break;
      place -= in_bin;
    }
    prefix = prefix << digit_bits | bin;
  }
  return prefix;
}

// The smallest key above `key`, or `key` itself if more than `place` + 1 values are not above it.
template <class T, class Key>
Key next_key(const QuantileCall<T>& call, int64_t sample, Key key, int64_t place) {
  int64_t not_above = 0;
  Key next = ~Key(0);
  for_each_block(call, sample, [&](const T* values, int64_t size) {
    Key least = ~Key(0);
    int32_t count = 0;
    for (int64_t i = 0; i < size; ++i) {
      const Key other = ordered_key(values[i]);
      count += other <= key;
      least = other > key && other < least ? other : least;
    }
    not_above += count;
    next = least < next ? least : next;
  });
  return not_above > place + 1 ? key : next;
}

template <class T>
T sample_quantile(const QuantileCall<T>& call, int64_t sample, T q, T* scratch) {
  using Key = decltype(ordered_key(T()));
  constexpr T nan = std::numeric_limits<T>::quiet_NaN(), infinity = std::numeric_limits<T>::infinity();
  Key* keys = reinterpret_cast<Key*>(scratch);
  const int64_t room = quantile_scratch(call) - kOverrun;

  // One pass sets aside the values around the quantile; a short sample is set aside whole.
  Bracket<T> bracket{-infinity, infinity};
  if (!(q >= 0 && q <= 1)) return nan;
  if (call.values.rows * call.values.columns > 8 * kSample) guess_bracket(call, sample, q, keys, bracket);
  for_each_block(call, sample, [&](const T* values, int64_t size) { collect(bracket, values, size, keys, room); });
  if (bracket.all == 0 || bracket.nans > 0) return nan;

  const Rank<T> rank = quantile_rank(q, bracket.all, call.interpolation, call.rank_in_fp64);
  const int64_t place = rank.below - bracket.smaller;
  const bool set_aside = bracket.inside + kTileColumns <= room && place >= 0 && place < bracket.inside;
  Key low, high;
  if (set_aside) {
    const Selected<Key> selected = select(keys, bracket.inside, place);
    low = selected.key;
    high = place + 1 < bracket.inside || rank.above == rank.below ? selected.next : next_key(call, sample, low, rank.below);
  } else {
    low = select_by_passes<T, Key>(call, sample, rank.below);
    high = rank.above > rank.below ? next_key(call, sample, low, rank.below) : low;
  }
  const T value = from_ordered_key(low);
  if (call.interpolation == Interpolation::linear || call.interpolation == Interpolation::midpoint) {
    return lerp(value, from_ordered_key(rank.above > rank.below ? high : low), rank.weight);
  }
  return value;
}

template <class T>
constexpr QuantileKernels<T> quantile_table() {
  return {quantile_scratch<T>, sample_quantile<T>};
}

}  // namespace
}  // namespace aml::cpu
