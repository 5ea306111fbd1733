// BCE and Dice of one pixel, the loss of a sample from its sums, and the gradient from the same sums.
#pragma once

#include <cmath>

#include "platform.h"

namespace aml {

// The formulas below are written for `V`: a float or a double, or several of them at once (csrc/cpu/lanes.h).
AML_INLINE float larger(float a, float b) { return a > b ? a : b; }  // b if one of them is NaN
AML_INLINE double larger(double a, double b) { return a > b ? a : b; }
AML_INLINE float reciprocal(float x) { return 1.0f / x; }
AML_INLINE double reciprocal(double x) { return 1.0 / x; }
AML_INLINE float magnitude(float x) { return ::fabsf(x); }
AML_INLINE double magnitude(double x) { return ::fabs(x); }
AML_INLINE float if_negative(float x, float a, float b) { return x < 0 ? a : b; }
AML_INLINE double if_negative(double x, double a, double b) { return x < 0 ? a : b; }
// The float whose exponent field is the low bits of `x`.
AML_INLINE float from_exponent(float x) { return bit_cast<float>(bit_cast<uint32_t>(x) << 23); }

// exp(x) for x <= 0 within 1 ulp, and 0 where that is subnormal: x = n ln 2 + r, a polynomial in r, times 2^n.
template <class V>
AML_INLINE V exp_nonpositive(V x) {
  const V clamped = larger(V(-88.3f), x);  // n = -127, which stands for 0; NaN passes
  const V magic(12583039.0f);              // 1.5 * 2^23 + 127: rounds to a whole number, plus the exponent's bias
  const V shifted = multiply_add(clamped, V(1.44269504f), magic);
  const V n = shifted - magic;
  V r = multiply_add(n, V(-0.693359375f), clamped);
  r = multiply_add(n, V(2.12194440e-4f), r);
  V p(1.3941111e-3f);
  p = multiply_add(p, r, V(8.3691506e-3f));
  p = multiply_add(p, r, V(4.1666351e-2f));
  p = multiply_add(p, r, V(1.6666505e-1f));
  p = multiply_add(p, r, V(0.5f));
  p = multiply_add(p, r, V(1.0f));
  p = multiply_add(p, r, V(1.0f));
  return p * from_exponent(shifted);
}

// log(1 + e) = e * log1p_slope(e) for 0 <= e <= 1, relative error 3e-8 before rounding.
template <class V>
AML_INLINE V log1p_slope(V e) {
  V p(-3.25637846e-3f);
  p = multiply_add(p, e, V(1.99071616e-2f));
  p = multiply_add(p, e, V(-5.70642017e-2f));
  p = multiply_add(p, e, V(1.06142648e-1f));
  p = multiply_add(p, e, V(-1.53118625e-1f));
  p = multiply_add(p, e, V(1.96781173e-1f));
  p = multiply_add(p, e, V(-2.49545589e-1f));
  p = multiply_add(p, e, V(3.33300054e-1f));
  p = multiply_add(p, e, V(-4.99999046e-1f));
  return multiply_add(p, e, V(1.0f));
}

AML_INLINE double exp_nonpositive(double x) { return ::exp(x); }
AML_INLINE double log1p_slope(double e) { return e > 0 ? ::log1p(e) / e : 1.0; }

template <class V>
struct Sigmoid {
  V e;           // exp(-|z|)
  V reciprocal;  // 1 / (1 + e)
  V p;           // sigmoid(z)
};

template <class V>
AML_INLINE Sigmoid<V> sigmoid(V z) {
  const V e = exp_nonpositive(-magnitude(z));
  const V r = reciprocal(V(1) + e);
  return {e, r, if_negative(z, e * r, r)};
}

// Binary cross entropy with logits: max(z, 0) - z y + log(1 + exp(-|z|)).
template <class V>
AML_INLINE V cross_entropy(V z, V y, V e) {
  return multiply_add(log1p_slope(e), e, multiply_add(-z, y, larger(z, V(0))));
}

// What a sample's pixels add up to. `Sum` is double on the CPU and a pair of floats or a float on a GPU.
template <class Sum>
struct SampleSums {
  Sum weight, weighted_bce, p, y, py;  // over the kept pixels
  int64_t kept, kept_target, intersection, union_;
  int64_t bad_target;  // kept pixels whose target is outside [0, 1]
};

template <class T>
struct LossOptions {
  T bce_weight, dice_weight, negative_weight, positive_weight, smooth;
};

template <class T>
struct SampleLoss {
  T bce, dice, loss;
};

template <class T, class Sum>
AML_INLINE SampleLoss<T> sample_loss(const SampleSums<Sum>& sums, const LossOptions<T>& options) {
  const T bce = sums.weight > 0 ? T(sums.weighted_bce) / T(sums.weight) : T(0);
  // 1 - (2 py + smooth) / (p + y + smooth), without the cancellation where little is predicted and nothing is there.
  const T p = T(sums.p), y = T(sums.y), py = T(sums.py);
  const T dice = sums.kept == 0 ? T(0) : ((p - py) + (y - py)) / (p + y + options.smooth);
  return {bce, dice, options.bce_weight * bce + options.dice_weight * dice};
}

// d loss / dz = bce w_y (p - y) + p (1 - p) (dice_p + dice_py y) for a kept pixel.
template <class T>
struct LossGradient {
  T bce, dice_p, dice_py;
};

template <class T>
AML_INLINE LossGradient<T> loss_gradient(T grad, T weight, T p, T y, T py, const LossOptions<T>& options) {
  const T denominator = p + y + options.smooth;
  const T numerator = T(2) * py + options.smooth;
  const T dice = grad * options.dice_weight / denominator;
  return {weight > 0 ? grad * options.bce_weight / weight : T(0), dice * (numerator / denominator), T(-2) * dice};
}

// The same for several pixels: V is T or lanes of it.
template <class V, class T>
AML_INLINE V pixel_gradient(const Sigmoid<V>& s, V y, const LossGradient<T>& g, T negative_weight, T weight_step) {
  const V slope = s.e * s.reciprocal * s.reciprocal;  // p (1 - p)
  const V weight = multiply_add(V(weight_step), y, V(negative_weight));
  return multiply_add(slope, multiply_add(V(g.dice_py), y, V(g.dice_p)), V(g.bce) * weight * (s.p - y));
}
template <class V, class T>
AML_INLINE V pixel_gradient(V z, V y, const LossGradient<T>& g, T negative_weight, T weight_step) {
  return pixel_gradient(sigmoid(z), y, g, negative_weight, weight_step);
}

}  // namespace aml
