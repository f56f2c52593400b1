// Element-wise work between linears, rounded where torch rounds: results equal the reference's, not only nearly so.
#pragma once
#include <cmath>

#include "base.h"

namespace baton {

// out = weight * round(x / rms(x)), `size` elements padded to a multiple of 32 with zeros in x and in weight.
template <class T>
BATON_INLINE float inverse_rms(const T* x, int64_t size, int64_t padded, float eps) {
  f32x16 total[4] = {};
  for (int64_t i = 0; i < padded; i += 16) {
    const f32x16 v = load16(x + i);
    total[i / 16 % 4] += v * v;
  }
  return 1.f / std::sqrt(sum((total[0] + total[1]) + (total[2] + total[3])) / float(size) + eps);
}

template <class T>
inline void rms_norm_row(const T* x, const float* weight, int64_t size, float eps, const ATiles& out, int m) {
  const int64_t padded = round_up(size, kPanel);
  const float scale = inverse_rms(x, size, padded, eps);
  for (int64_t i = 0; i < padded; i += 16) {
    store16(out.at<T>(m, int(i)), rounded<T>(load16(x + i) * scale) * load16(weight + i));
  }
}

// int8 row = round(x / scale), scale = max |x| / 127; both in A tiles, of other widths.
template <class T>
inline float quantise_row(const ATiles& x, int m, int64_t size, const ATiles& out) {
  f32x16 largest = {};
  const int64_t padded = round_up(size, 16);
  f32x16 nan = {};
  for (int64_t i = 0; i < padded; i += 16) {
    const f32x16 v = load16(x.at<T>(m, int(i)));
    largest = max(largest, abs(v));
    nan += v * 0.f;  // NaN or infinite values may not hide behind the largest finite one
  }
  const float amax = max_of(largest);
  const float inverse = amax > 0 ? 127.f / amax : 0.f;
  for (int64_t i = 0; i < padded; i += 16) {
    const f32x16 v = load16(x.at<T>(m, int(i))) * inverse;
    const i32x16 q = __builtin_convertvector((v + 12582912.f) - 12582912.f, i32x16);
    store_as(out.at<int8_t>(m, int(i)), __builtin_convertvector(q, i8x16));
  }
  for (int64_t i = padded; i < round_up(size, kTileK<int8_t>); i += 16) store_as(out.at<int8_t>(m, int(i)), i8x16{});
  return amax / 127.f + sum(nan);
}

// Rotary embedding of one head: cos_sin holds head_dim / 2 cosines, then as many sines. Any dim that is a multiple of 32.
template <class T>
BATON_INLINE void rotate_head(T* x, const float* cos_sin, int dim, T* out) {
  const int half = dim / 2;
  for (int i = 0; i < half; i += 16) {
    const f32x16 first = load16(x + i), second = load16(x + half + i);
    const f32x16 cos = load16(cos_sin + i), sin = load16(cos_sin + half + i);
    store16(out + i, rounded<T>(first * cos) - rounded<T>(second * sin));
    store16(out + half + i, rounded<T>(second * cos) + rounded<T>(first * sin));
  }
}

template <class T>
BATON_INLINE void norm_head(T* x, const float* weight, int dim, float eps) {
  const float scale = inverse_rms(x, dim, dim, eps);
  for (int i = 0; i < dim; i += 16) store16(x + i, rounded<T>(load16(x + i) * scale) * load16(weight + i));
}

}  // namespace baton
