// What masked_loss adds up along a row: of targets that are probabilities, and of those that are 0 or 1.
#pragma once

#include "pixels.h"

namespace aml::cpu {
namespace {

enum Count { kKept, kKeptTarget, kIntersection, kUnion, kBad, kCounts };
constexpr int kSums = 4;
constexpr int64_t kRowVectors = 64;  // that are added up in T before the sums go on in fp64

template <class T>
struct RowCounts {
  Tally<T> kept{}, kept_target{}, intersection{}, union_{}, bad{};

  template <class Pixels>
  AML_MEMBER void add(const Pixels& at, Mask<T> predicted) {
    kept = count(kept, at.keep);
    kept_target = count(kept_target, at.keep & at.is_target);
    intersection = count(intersection, predicted & at.is_target);
    union_ = count(union_, predicted | at.is_target);
    bad = count(bad, at.bad);
  }

  AML_MEMBER void end_row(int64_t* counts) const {
    counts[kKept] += total(kept);
    counts[kKeptTarget] += total(kept_target);
    counts[kIntersection] += total(intersection);
    counts[kUnion] += total(union_);
    counts[kBad] += total(bad);
  }
};

template <class T, Target>
struct RowSums;

template <class T>
struct RowSums<T, Target::Soft> {
  RowSums(T negative_weight, T weight_step) : negative(negative_weight), step(weight_step) {}

  Lanes<T> negative, step, bce, p, y, py;

  template <class Pixels>
  AML_MEMBER void add(const Pixels& at, Mask<T>) {
    // Of a pixel that is left out exp, p and the cross entropy are exactly 0.
    const Lanes<T> z = select(at.keep, at.logit, Lanes<T>(-1000)), target = select(at.keep, at.y, Lanes<T>());
    const Sigmoid<Lanes<T>> s = sigmoid(z);
    bce = multiply_add(multiply_add(step, target, negative), cross_entropy(z, target, s.e), bce);
    p += s.p;
    y += target;
    py = multiply_add(s.p, target, py);
  }

  AML_MEMBER void end_row(double (*sums)[kLanes<T>]) const {
    const Lanes<T> row[kSums] = {bce, p, y, py};
    for (int i = 0; i < kSums; ++i) {
      for (int lane = 0; lane < kLanes<T>; ++lane) sums[i][lane] += double(row[i].v[lane]);
    }
  }

  static SampleSums<double> finish(const double* sum, const int64_t* counts, const LossOptions<T>& options) {
    const double negative = options.negative_weight, step = options.positive_weight - options.negative_weight;
    return {negative * double(counts[kKept]) + step * sum[2], sum[0], sum[1], sum[2], sum[3], 0, 0, 0, 0, 0};
  }
};

// The pixels of each class by themselves: their weight is then a factor of the sums. The cross entropy of a pixel is
// max(f, 0) + log(1 + e), f = -z for the target and z for the rest. Logarithms add up to the logarithm of a product,
// and one is enough for a row. The product is held less 1, or a row of small e would be lost.
template <class T>
struct RowSums<T, Target::Label> {
  RowSums(T, T) {}

  struct Class {
    Lanes<T> linear, product, p;

    AML_MEMBER Class() {}  // written out: GCC compiles a constructor of its own making for another instruction set
    AML_MEMBER void add(Mask<T> m, Lanes<T> linear_, const Sigmoid<Lanes<T>>& s) {
      linear = add_where(m, linear, linear_);
      product = multiply_add_where(m, s.e, product, add_where(m, product, s.e));
      p = add_where(m, p, s.p);
    }
  };
  Class rest, target;

  template <class Pixels>
  AML_MEMBER void add(const Pixels& at, Mask<T> predicted) {
    const Sigmoid<Lanes<T>> s = sigmoid(at.logit, predicted);
    const Lanes<T> linear = larger(negate_where(at.is_target, at.logit), Lanes<T>());
    rest.add(and_not(at.keep, at.is_target), linear, s);
    target.add(at.keep & at.is_target, linear, s);
  }

  AML_MEMBER void end_row(double (*sums)[kLanes<T>]) const {
    const Lanes<T> row[kSums] = {rest.linear + log1p(rest.product), target.linear + log1p(target.product), rest.p, target.p};
    for (int i = 0; i < kSums; ++i) {
      for (int lane = 0; lane < kLanes<T>; ++lane) sums[i][lane] += double(row[i].v[lane]);
    }
  }

  static SampleSums<double> finish(const double* sum, const int64_t* counts, const LossOptions<T>& options) {
    const double negative = options.negative_weight, positive = options.positive_weight;
    const double target = double(counts[kKeptTarget]), rest = double(counts[kKept]) - target;
    return {negative * rest + positive * target, negative * sum[0] + positive * sum[1], sum[2] + sum[3], target, sum[3],
            0, 0, 0, 0, 0};
  }
};

}  // namespace
}  // namespace aml::cpu
