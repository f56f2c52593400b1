// Element-wise work between linears, rounded where torch rounds: results equal the reference's, not only nearly so.
#pragma once
#include <cmath>

#include "base.h"

namespace baton {

// Of `padded` elements, a multiple of 32.
template <class T>
BATON_INLINE float sum_of_squares(const T* x, int64_t padded) {
  f32x16 total[4] = {};  // only constants as indices: it must not go through memory
  int64_t i = 0;
  for (; i + 64 <= padded; i += 64) {
    for (int j = 0; j < 4; j++) {
      const f32x16 v = load16(x + i + j * 16);
      total[j] += v * v;
    }
  }
  if (i < padded) {
    const f32x16 v = load16(x + i), w = load16(x + i + 16);
    total[0] += v * v;
    total[1] += w * w;
  }
  return sum((total[0] + total[1]) + (total[2] + total[3]));
}

template <class T>
BATON_INLINE float inverse_rms(const T* x, int64_t size, int64_t padded, float eps) {
  return 1.f / std::sqrt(sum_of_squares(x, padded) / float(size) + eps);
}

// out = weight * round(x / rms(x)), `size` elements padded to a multiple of 32 with zeros in x and in weight.
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
// With `norm`, x is first multiplied by `scale` and by those weights.
template <class T>
BATON_INLINE void rotate_head(const T* x, const float* norm, float scale, const float* cos_sin, int dim, T* out) {
  const int half = dim / 2;
  for (int i = 0; i < half; i += 16) {
    f32x16 first = load16(x + i), second = load16(x + half + i);
    if (norm) {
      first = rounded<T>(rounded<T>(first * scale) * load16(norm + i));
      second = rounded<T>(rounded<T>(second * scale) * load16(norm + half + i));
    }
    const f32x16 cos = load16(cos_sin + i), sin = load16(cos_sin + half + i);
    store16(out + i, rounded<T>(first * cos) - rounded<T>(second * sin));
    store16(out + half + i, rounded<T>(second * cos) + rounded<T>(first * sin));
  }
}

// The same for `num_heads` heads, one after the other in x, `out_stride` elements apart in out; normalised by their root
// mean squares where `norm` is given. Those come first, many at once: a square root and a division take longer alone than
// all else that happens to a head.
template <class T>
inline void rotate_heads(const T* x, int num_heads, const float* norm, float eps, const float* cos_sin, int dim, T* out,
                         int64_t out_stride) {
  for (int begin = 0; begin < num_heads; begin += 16) {
    const int count = num_heads - begin < 16 ? num_heads - begin : 16;
    alignas(64) float scale[16] = {};
    if (norm) {
      for (int h = 0; h < count; h++) scale[h] = sum_of_squares(x + h * dim, dim);
      for (int h = 0; h < 16; h++) scale[h] = 1.f / std::sqrt(scale[h] / float(dim) + eps);
    }
    for (int h = 0; h < count; h++, x += dim, out += out_stride) rotate_head(x, norm, scale[h], cos_sin, dim, out);
  }
}

}  // namespace baton
