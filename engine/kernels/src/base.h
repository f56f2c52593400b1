// Vectors, bf16 and the tile geometry that all kernels share.
//
// Vectors are GCC vector extensions of 16 floats: the compiler lowers them to whatever the flags allow (AVX-512, AVX2,
// SSE2, NEON), so one source serves every machine; only inner products have versions of their own per instruction set.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace baton {

using f32x16 = float __attribute__((vector_size(64)));
using i32x16 = int32_t __attribute__((vector_size(64)));
using u32x16 = uint32_t __attribute__((vector_size(64)));
using u16x16 = uint16_t __attribute__((vector_size(32)));
using i8x16 = int8_t __attribute__((vector_size(16)));

#define BATON_INLINE inline __attribute__((always_inline))

struct bf16 {
  uint16_t bits;
};

// ---- Geometry ------------------------------------------------------------------------------------------------------
// Every operand of a linear is cut in tiles of 16 rows of 64 bytes = 1 KiB, whatever its type. A tile row holds
// `kTileK<T>` = 64 / sizeof(T) elements of the reduction dimension K.
//   activations ("A tiles"): [ceil(M / 16)][num_k_tiles][R rows][64 bytes], R = min(16, M) so that one token costs one
//       cache line per K tile, not sixteen.
//   weights ("B tiles"): [panel of 32 outputs][num_k_tiles][half of 16 outputs][16 rows][16 outputs][4 bytes]. The four
//       bytes are 4 / sizeof(T) consecutive K (AMX's VNNI order), so tile row r holds K = r * 4 / sizeof(T) and on.
constexpr int kTileRows = 16, kTileRowBytes = 64, kTileBytes = 1024, kPanel = 32;
template <class T>
constexpr int kTileK = kTileRowBytes / int(sizeof(T));

BATON_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
BATON_INLINE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Part `index` of `count` things cut into `parts` runs as equal as can be.
struct Range {
  int begin, end;
};
BATON_INLINE Range part_of(int64_t count, int index, int parts) {
  return {int(count * index / parts), int(count * (index + 1) / parts)};
}

// A tiles of M rows and num_k_tiles * kTileK<T> columns.
struct ATiles {
  char* data = nullptr;
  int num_k_tiles = 0;
  int rows_per_tile = kTileRows;  // R

  static ATiles view(void* data, int num_rows, int num_k_tiles) {
    return {static_cast<char*>(data), num_k_tiles, num_rows < kTileRows ? num_rows : kTileRows};
  }
  static size_t bytes(int64_t num_rows, int64_t num_k_tiles) {
    return size_t(round_up(num_rows, kTileRows) * num_k_tiles * kTileRowBytes);
  }
  BATON_INLINE char* tile(int m_tile, int k_tile) const {
    return data + (size_t(m_tile) * num_k_tiles + k_tile) * rows_per_tile * kTileRowBytes;
  }
  // The 64 bytes of row m in K tile k_tile.
  BATON_INLINE char* row(int m, int k_tile) const {
    return tile(m / kTileRows, k_tile) + (m % kTileRows) * kTileRowBytes;
  }
  template <class T>
  BATON_INLINE T* at(int m, int k) const {
    return reinterpret_cast<T*>(row(m, k / kTileK<T>)) + k % kTileK<T>;
  }
};

// ---- Vectors -------------------------------------------------------------------------------------------------------
template <class V>
BATON_INLINE V load_as(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
BATON_INLINE void store_as(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}
BATON_INLINE f32x16 splat(float x) { return f32x16{} + x; }

BATON_INLINE f32x16 widen(u16x16 h) { return (f32x16)(__builtin_convertvector(h, u32x16) << 16); }

// Round to nearest even; NaN stays NaN.
BATON_INLINE u16x16 narrow(f32x16 x) {
#if defined(__AVX512BF16__)
  return (u16x16)_mm512_cvtneps_pbh((__m512)x);
#else
  u32x16 u = (u32x16)x;
  u32x16 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  u32x16 nan = u32x16{} + 0x7fc0u;
  return __builtin_convertvector((x != x) ? nan : rounded, u16x16);
#endif
}

BATON_INLINE f32x16 load16(const float* p) { return load_as<f32x16>(p); }
BATON_INLINE f32x16 load16(const bf16* p) { return widen(load_as<u16x16>(p)); }
BATON_INLINE void store16(float* p, f32x16 x) { store_as(p, x); }
BATON_INLINE void store16(bf16* p, f32x16 x) { store_as(p, narrow(x)); }

// 32 consecutive elements, at a multiple of 64 bytes. `past_cache`: they are not read again soon and would only push
// out what is (the cache lines need not be read before they are written, either).
BATON_INLINE void store32(float* p, f32x16 low, f32x16 high, bool) {
  store16(p, low);
  store16(p + 16, high);
}
BATON_INLINE void store32(bf16* p, f32x16 low, f32x16 high, bool past_cache) {
#if defined(__AVX512BF16__)
  const __m512i v = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  if (past_cache) {
    _mm512_stream_si512((__m512i*)p, v);
  } else {
    store_as(p, v);
  }
#else
  (void)past_cache;
  store16(p, low);
  store16(p + 16, high);
#endif
}
BATON_INLINE void order_stores() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// x as it would be after a trip through memory of type T.
template <class T>
BATON_INLINE f32x16 rounded(f32x16 x);
template <>
BATON_INLINE f32x16 rounded<float>(f32x16 x) {
  return x;
}
template <>
BATON_INLINE f32x16 rounded<bf16>(f32x16 x) {
  // In integers: converting there and back takes more than twice as long. NaN stays NaN: one that arithmetic makes from
  // bf16 ends in zeros, so that adding to it carries nowhere.
  const u32x16 u = (u32x16)x;
  return (f32x16)((u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u);
}

BATON_INLINE float sum(f32x16 x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float s[8];
  for (int i = 0; i < 8; i++) s[i] = x[i] + x[i + 8];
  return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
#endif
}
// The larger; a NaN in `b` is ignored (it shows up again in the exponentials that follow).
BATON_INLINE f32x16 max(f32x16 a, f32x16 b) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_max_ps((__m512)b, (__m512)a);
#else
  return b > a ? b : a;
#endif
}
BATON_INLINE f32x16 abs(f32x16 x) { return (f32x16)((u32x16)x & 0x7fffffffu); }
BATON_INLINE float max_of(f32x16 x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float m = x[0];
  for (int i = 1; i < 16; i++) m = x[i] > m ? x[i] : m;
  return m;
#endif
}

// 2**x for x >= -126; what is below counts as -126, what is above 127 as 127. NaN stays NaN. The series of 2**f around
// the nearest integer, |f| <= 1/2: relative error < 2e-7 of degree 6, < 4e-5 of degree 4.
template <int kDegree = 6>
BATON_INLINE f32x16 exp2(f32x16 x) {
  const f32x16 magic = splat(12582912.f);  // 1.5 * 2**23: adding it leaves round(x) in the low bits
#if defined(__AVX512F__)
  x = (f32x16)_mm512_max_ps((__m512)splat(-126.f), (__m512)x);  // a NaN in the second operand stays
  x = (f32x16)_mm512_min_ps((__m512)splat(127.f), (__m512)x);
#else
  x = x < -126.f ? splat(-126.f) : x;
  x = x > 127.f ? splat(127.f) : x;
#endif
  const f32x16 shifted = x + magic;
  const f32x16 f = x - (shifted - magic);
  f32x16 p;
  if constexpr (kDegree == 6) {
    p = f * 1.5403530e-4f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
  } else {
    p = splat(9.6181291e-3f);
  }
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  // The exponent of p is 0 or -1; adding round(x) to its bits multiplies. The bits of NaN that arithmetic makes end in
  // zeros, so they are left alone.
  return (f32x16)((i32x16)p + ((i32x16)shifted << 23));
}

constexpr float kLog2E = 1.44269504f;

// 1 / x to within two units in the last place: dividing takes 16 cycles, this 3.
BATON_INLINE f32x16 reciprocal(f32x16 x) {
#if defined(__AVX512F__)
  const f32x16 guess = (f32x16)_mm512_rcp14_ps((__m512)x);
  const f32x16 better = guess * (2.f - x * guess);
  return x == __builtin_inff() ? splat(0.f) : better;  // where inf * 0 would be NaN
#else
  return 1.f / x;
#endif
}
BATON_INLINE f32x16 silu(f32x16 x) { return x * reciprocal(1.f + exp2(x * -kLog2E)); }

BATON_INLINE void prefetch_l1(const void* p) { __builtin_prefetch(p, 0, 3); }
BATON_INLINE void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

#if defined(__AVX512F__)
// Transpose a 16 x 16 matrix of 32-bit elements held in 16 registers.
BATON_INLINE void transpose16(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  // r[4i + j] holds, in 128-bit lane l, column 4l + j of rows 4i .. 4i + 3.
  for (int j = 0; j < 4; j++) {
    __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    __m512i c = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88), d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(a, c, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
    t[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
  for (int i = 0; i < 16; i++) r[i] = t[i];
}
#endif

}  // namespace baton
