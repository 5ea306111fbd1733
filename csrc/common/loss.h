// BCE and Dice of one pixel, the loss of a sample from its sums, and the gradient from the same sums.
#pragma once

#include <cmath>

#include "platform.h"

namespace aml {

// exp(x) for x <= 0 within 1 ulp: x = n ln 2 + r, a polynomial in r, n added to the exponent. Branch-free.
AML_INLINE float exp_nonpositive(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;  // below, the result would be subnormal; NaN passes
  const float shifted = multiply_add(clamped, 1.44269504f, 12582912.0f);  // 1.5 * 2^23: rounds to a whole number
  const float n = shifted - 12582912.0f;
  float r = multiply_add(n, -0.693359375f, clamped);
  r = multiply_add(n, 2.12194440e-4f, r);
  float p = 1.3941111e-3f;
  p = multiply_add(p, r, 8.3691506e-3f);
  p = multiply_add(p, r, 4.1666351e-2f);
  p = multiply_add(p, r, 1.6666505e-1f);
  p = multiply_add(p, r, 0.5f);
  p = multiply_add(p, r, 1.0f);
  p = multiply_add(p, r, 1.0f);
  const int32_t exponent = (bit_cast<int32_t>(shifted) - 0x4B400000 + 127) << 23;
  return p * bit_cast<float>(exponent);
}

// log(1 + e) for 0 <= e <= 1, relative error 3e-8 before rounding: e times a polynomial. Branch-free.
AML_INLINE float log1p_unit(float e) {
  float p = -3.25637846e-3f;
  p = multiply_add(p, e, 1.99071616e-2f);
  p = multiply_add(p, e, -5.70642017e-2f);
  p = multiply_add(p, e, 1.06142648e-1f);
  p = multiply_add(p, e, -1.53118625e-1f);
  p = multiply_add(p, e, 1.96781173e-1f);
  p = multiply_add(p, e, -2.49545589e-1f);
  p = multiply_add(p, e, 3.33300054e-1f);
  p = multiply_add(p, e, -4.99999046e-1f);
  p = multiply_add(p, e, 1.0f);
  return p * e;
}

AML_INLINE double exp_nonpositive(double x) { return ::exp(x); }
AML_INLINE double log1p_unit(double e) { return ::log1p(e); }

template <class T>
struct Sigmoid {
  T e;           // exp(-|z|)
  T reciprocal;  // 1 / (1 + e)
  T p;           // sigmoid(z)
};

template <class T>
AML_INLINE Sigmoid<T> sigmoid(T z) {
  const T e = exp_nonpositive(z < 0 ? z : -z);
  const T reciprocal = T(1) / (T(1) + e);
  return {e, reciprocal, z >= 0 ? reciprocal : e * reciprocal};
}

// Binary cross entropy with logits: max(z, 0) - z y + log(1 + exp(-|z|)).
template <class T>
AML_INLINE T cross_entropy(T z, T y, T e) {
  return (z > 0 ? z : T(0)) - z * y + log1p_unit(e);
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
  const T dice = sums.kept == 0 ? T(0)
      : T(1) - (T(2) * T(sums.py) + options.smooth) / (T(sums.p) + T(sums.y) + options.smooth);
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

template <class T>
AML_INLINE T pixel_gradient(T z, T y, const LossGradient<T>& g, T negative_weight, T weight_step) {
  const Sigmoid<T> s = sigmoid(z);
  const T slope = s.e * s.reciprocal * s.reciprocal;  // p (1 - p)
  const T weight = multiply_add(weight_step, y, negative_weight);
  return multiply_add(slope, multiply_add(g.dice_py, y, g.dice_p), g.bce * weight * (s.p - y));
}

}  // namespace aml
