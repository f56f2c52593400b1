// Causal attention over one layer of the paged pool, [block][K|V][kv_head][token][dim] (baton/kv_layout.py).
//
// Columns: the queries of one KV head are the columns c = (token - first) * group + head of all its query heads, so
// grouped-query attention reads each key once. Scores are computed transposed, keys x columns: then the softmax runs
// down the lanes of vectors (no horizontal sums), keys are AMX operands as they lie in the pool, and the probabilities
// leave the softmax in the order that the second product wants. Online softmax: Milakov and Gimelshein 2018
// (arXiv:1805.02867); blocked as in FlashAttention (Dao et al. 2022, arXiv:2205.14135).
#pragma once
#include <algorithm>
#include <vector>

#include "base.h"
#include "linear.h"

namespace baton {

constexpr float kMasked = -1e30f;  // finite: a row of nothing but masked scores must not become NaN
constexpr int kMaxHeadDim = 256;
constexpr int kMaxColumns = 512;    // of one work item
constexpr int kDecodeKeys = 128;    // decode: per step of the online softmax
constexpr int kDecodeQueries = 64;  // decode: of one work item, all its KV heads together
constexpr int kWideQueryTiles = 12;

// One layer's pool and the shape of its attention. `q` is [num_tokens][q_stride], head h at h * dim, rotated.
template <class T>
struct AttentionLayer {
  const T* pool;
  const T* q;
  ATiles out;  // [num_tokens][num_heads * dim]
  int64_t q_stride;
  int num_heads, num_kv_heads, dim, block_size;
  int window;  // a query sees the last so many positions, its own included; 0: all
  float scale;

  int group() const { return num_heads / num_kv_heads; }
  // First element of the keys (half 0) or values (1) of one head in one block: [block_size][dim].
  BATON_INLINE const T* half(int block, int half, int kv_head) const {
    return pool + ((int64_t(block) * 2 + half) * num_kv_heads + kv_head) * int64_t(block_size) * dim;
  }
};

// One sequence's part of the step: tokens [row, row + num_new) of the batch are its positions [start, start + num_new).
struct SequencePart {
  int row, num_new, start;
  const int32_t* blocks;
  int end() const { return start + num_new; }
};

struct alignas(64) AttentionScratch {
  static constexpr int kKeys = 256;  // keys per step of the online softmax
  alignas(64) char scores[kKeys * 32 * 4];               // [keys][32 columns] float
  alignas(64) char probs[kKeys * 32 * 4];                // bf16 tiles, or float
  alignas(64) char values[kKeys * kMaxHeadDim * 4];      // V of the keys, transposed tiles or float
  alignas(64) char keys[kKeys * kMaxHeadDim * 4];        // K transposed (plain path)
  alignas(64) char queries[kMaxColumns * kMaxHeadDim * 4];
  alignas(64) float out[kMaxColumns * kMaxHeadDim];      // [column block][dim][16 columns], or [column][dim]
  alignas(64) float highest[kMaxColumns], total[kMaxColumns];
  alignas(64) int32_t position[kMaxColumns];             // of each column's token
};

// ---- Plain path: any type, any machine -----------------------------------------------------------------------------
template <class T>
inline void attend_plain(const AttentionLayer<T>& layer, const SequencePart& seq, int kv_head, int c_begin, int c_end,
                         AttentionScratch& s) {
  constexpr int kKeys = 64;
  const int dim = layer.dim, group = layer.group(), columns = c_end - c_begin, bs = layer.block_size;
  float *queries = (float*)s.queries, *keys = (float*)s.keys, *values = (float*)s.values;
  const float to_log2 = layer.scale * kLog2E;
  for (int c = 0; c < columns; c++) {
    const int token = (c_begin + c) / group, head = kv_head * group + (c_begin + c) % group;
    const T* q = layer.q + (seq.row + token) * layer.q_stride + head * dim;
    for (int d = 0; d < dim; d += 16) store16(queries + c * dim + d, load16(q + d) * to_log2);
    s.position[c] = seq.start + token;
    s.highest[c] = kMasked;
    s.total[c] = 0;
  }
  std::memset(s.out, 0, size_t(columns) * dim * sizeof(float));
  const int keys_end = s.position[columns - 1] + 1;
  int key = layer.window ? s.position[0] - layer.window + 1 : 0;
  for (key = key < 0 ? 0 : key / kKeys * kKeys; key < keys_end; key += kKeys) {
    const int n = keys_end - key < kKeys ? keys_end - key : kKeys;
    for (int j = 0; j < kKeys; j++) {  // keys[dim][kKeys], values[kKeys][dim]; zero beyond the end
      const int at = key + j;
      const T* k = j < n ? layer.half(seq.blocks[at / bs], 0, kv_head) + at % bs * dim : nullptr;
      const T* v = j < n ? layer.half(seq.blocks[at / bs], 1, kv_head) + at % bs * dim : nullptr;
      for (int d = 0; d < dim; d += 16) {
        const f32x16 x = k ? load16(k + d) : f32x16{};
        for (int i = 0; i < 16; i++) keys[(d + i) * kKeys + j] = x[i];
        store16(values + j * dim + d, v ? load16(v + d) : f32x16{});
      }
    }
    for (int c = 0; c < columns; c++) {
      const int last = s.position[c], first = layer.window ? last - layer.window + 1 : 0;
      if (key > last || key + kKeys <= first) continue;
      f32x16 score[kKeys / 16] = {};
      for (int d = 0; d < dim; d++) {
        const float q = queries[c * dim + d];
        for (int v = 0; v < kKeys / 16; v++) score[v] += q * load16(keys + d * kKeys + v * 16);
      }
      const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
      f32x16 high = splat(kMasked);
      i32x16 seen[kKeys / 16];
      for (int v = 0; v < kKeys / 16; v++) {
        const i32x16 at = lanes + (key + v * 16);
        seen[v] = (at <= last) & (at >= first);
        score[v] = seen[v] ? score[v] : splat(kMasked);
        high = max(high, score[v]);
      }
      const float before = s.highest[c], highest = before > max_of(high) ? before : max_of(high);
      const float correction = exp2(splat(before - highest))[0];
      f32x16 total = {};
      float probs[kKeys];
      for (int v = 0; v < kKeys / 16; v++) {
        const f32x16 p = seen[v] ? exp2(score[v] - highest) : splat(0.f);
        total += p;
        store16(probs + v * 16, p);
      }
      s.highest[c] = highest;
      s.total[c] = s.total[c] * correction + sum(total);
      float* out = s.out + c * dim;
      for (int d = 0; d < dim; d += 16) {
        f32x16 acc = load16(out + d) * correction;
        for (int j = 0; j < n; j++) acc += probs[j] * load16(values + j * dim + d);
        store16(out + d, acc);
      }
    }
  }
  for (int c = 0; c < columns; c++) {
    const int token = (c_begin + c) / group, head = kv_head * group + (c_begin + c) % group;
    const float inverse = 1.f / s.total[c];
    for (int d = 0; d < dim; d += 16) {
      store16(layer.out.template at<T>(seq.row + token, head * dim + d), load16(s.out + c * dim + d) * inverse);
    }
  }
}

#if defined(__AMX_TILE__) && defined(__AVX512BF16__)
// ---- AMX ---------------------------------------------------------------------------------------------------------
// Queries as B tiles: [column block of 16][dim / 32][16 pairs of dims][16 columns][2]. Pads with zero columns.
inline void pack_queries(const AttentionLayer<bf16>& layer, const SequencePart& seq, int kv_head, int c_begin,
                         int columns, char* out) {
  const int group = layer.group(), dim = layer.dim;
  for (int c = 0; c < columns; c += 16) {
    for (int d = 0; d < dim; d += 32) {
      __m512i rows[16];
      for (int i = 0; i < 16; i++) {
        const int at = c_begin + c + i, head = kv_head * group + at % group;
        rows[i] = c + i < columns
                      ? load_as<__m512i>(layer.q + (seq.row + at / group) * layer.q_stride + head * dim + d)
                      : _mm512_setzero_si512();
      }
      transpose16(rows);
      for (int i = 0; i < 16; i++) store_as(out + i * 64, rows[i]);
      out += kTileBytes;
    }
  }
}

// Values of keys [key, key + num_keys), num_keys a multiple of 32, as A tiles of V^T:
// [num_keys / 32][dim / 16][16 dims][32 keys]. Zero from `end` on: a masked probability of 0 does not hide a NaN.
inline void pack_values(const AttentionLayer<bf16>& layer, const SequencePart& seq, int kv_head, int key, int num_keys,
                        int end, char* out) {
  const int dim = layer.dim, bs = layer.block_size;
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5,
                                       36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int k = key; k < key + num_keys; k += 32) {
    const bf16* tile[2];  // sixteen keys each: never across a block
    for (int i = 0; i < 2; i++) {
      const int at = k + 16 * i;
      tile[i] = at < end ? layer.half(seq.blocks[at / bs], 1, kv_head) + at % bs * dim : nullptr;
    }
    for (int d = 0; d < dim; d += 32) {
      __m512i even[16], odd[16];  // dims d .. d + 15 and d + 16 .. d + 31; register i: keys 2i and 2i + 1
      for (int i = 0; i < 16; i++) {
        const int at = k + 2 * i;
        const bf16* from = tile[i / 8] + (i % 8) * 2 * dim + d;
        const __m512i a = at < end ? load_as<__m512i>(from) : _mm512_setzero_si512();
        const __m512i b = at + 1 < end ? load_as<__m512i>(from + dim) : _mm512_setzero_si512();
        even[i] = _mm512_permutex2var_epi16(a, low, b);
        odd[i] = _mm512_permutex2var_epi16(a, high, b);
      }
      transpose16(even);
      transpose16(odd);
      for (int i = 0; i < 16; i++) {
        store_as(out + i * 64, even[i]);
        store_as(out + kTileBytes + i * 64, odd[i]);
      }
      out += 2 * kTileBytes;
    }
  }
}

// Prefill: columns [c_begin, c_end) of one KV head, at most kMaxColumns.
inline void attend_tiles(const AttentionLayer<bf16>& layer, const SequencePart& seq, int kv_head, int c_begin,
                         int c_end, AttentionScratch& s) {
  constexpr int kKeys = AttentionScratch::kKeys;
  const int dim = layer.dim, group = layer.group(), columns = c_end - c_begin, bs = layer.block_size;
  const int padded = int(round_up(columns, 32)), k_tiles = dim / 32;
  const float to_log2 = layer.scale * kLog2E;
  pack_queries(layer, seq, kv_head, c_begin, columns, s.queries);
  if (columns <= padded - 16) {
    std::memset(s.queries + size_t(padded / 16 - 1) * k_tiles * kTileBytes, 0, size_t(k_tiles) * kTileBytes);
  }
  for (int c = 0; c < padded; c++) {
    s.position[c] = seq.start + (c_begin + (c < columns ? c : columns - 1)) / group;
    s.highest[c] = kMasked;
    s.total[c] = 0;
  }
  std::memset(s.out, 0, size_t(padded) * dim * sizeof(float));
  const int keys_end = s.position[columns - 1] + 1;
  int key = layer.window ? s.position[0] - layer.window + 1 : 0;
  for (key = key < 0 ? 0 : key / kKeys * kKeys; key < keys_end; key += kKeys) {
    const int num_keys = int(round_up(keys_end - key < kKeys ? keys_end - key : kKeys, 32));
    pack_values(layer, seq, kv_head, key, num_keys, keys_end, s.values);
    for (int c = 0; c < padded; c += 32) {
      const int first_pos = s.position[c], last_pos = s.position[c + 31];
      if (key > last_pos) continue;
      if (layer.window && key + num_keys <= first_pos - layer.window + 1) continue;
      const int n = int(round_up(last_pos + 1 - key < num_keys ? last_pos + 1 - key : num_keys, 32));
      // Scores, 32 keys x 32 columns at a time.
      const char* queries = s.queries + size_t(c / 16) * k_tiles * kTileBytes;
      for (int j = 0; j < n; j += 32) {
        const bf16* k[2];
        for (int i = 0; i < 2; i++) {
          int at = key + j + 16 * i;
          if (at >= keys_end) at = key + j;  // beyond the sequence: any finite address does, all is masked
          k[i] = layer.half(seq.blocks[at / bs], 0, kv_head) + at % bs * dim;
        }
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int t = 0; t < k_tiles; t++) {
          _tile_loadd(4, k[0] + t * 32, dim * 2);
          _tile_loadd(5, k[1] + t * 32, dim * 2);
          _tile_loadd(6, queries + size_t(t) * kTileBytes, 64);
          _tile_loadd(7, queries + size_t(k_tiles + t) * kTileBytes, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        char* out = s.scores + j * 128;
        _tile_stored(0, out, 128);
        _tile_stored(1, out + 64, 128);
        _tile_stored(2, out + 16 * 128, 128);
        _tile_stored(3, out + 16 * 128 + 64, 128);
      }
      // Softmax down the columns. probs: [n / 32][2 column halves][16 pairs of keys][16 columns][2].
      const int clear_end = first_pos + 1 - key;  // keys before it are visible to all columns
      const int clear_begin = layer.window ? last_pos - layer.window + 1 - key : 0;
      for (int half = 0; half < 2; half++) {
        const __m512i position = load_as<__m512i>(s.position + c + half * 16);
        char* scores = s.scores + half * 64;
        const int masked_begin = clear_end < 0 ? 0 : clear_end / 2 * 2;
        for (int j = 0; j < n; j++) {
          if (j >= clear_begin && j < masked_begin) {
            j = masked_begin;
            if (j >= n) break;
          }
          __m512i at = _mm512_set1_epi32(key + j);
          __mmask16 seen = _mm512_cmple_epi32_mask(at, position);
          if (layer.window) {
            seen &= _mm512_cmpgt_epi32_mask(_mm512_add_epi32(at, _mm512_set1_epi32(layer.window)), position);
          }
          const f32x16 x = load_as<f32x16>(scores + j * 128);
          store_as(scores + j * 128, _mm512_mask_blend_ps(seen, _mm512_set1_ps(kMasked), (__m512)x));
        }
        const f32x16 before = load16(s.highest + c + half * 16);
        f32x16 high[4] = {before, before, before, before};
        for (int j = 0; j < n; j += 4) {
          for (int i = 0; i < 4; i++) high[i] = max(high[i], load_as<f32x16>(scores + (j + i) * 128));
        }
        const f32x16 highest = max(max(high[0], high[1]), max(high[2], high[3]));
        const f32x16 offset = highest * -to_log2;
        f32x16 total[2] = {};
        for (int j = 0; j < n; j += 2) {
          const f32x16 p0 = exp2<4>(load_as<f32x16>(scores + j * 128) * to_log2 + offset);
          const f32x16 p1 = exp2<4>(load_as<f32x16>(scores + (j + 1) * 128) * to_log2 + offset);
          total[0] += p0;
          total[1] += p1;
          // Round both to bf16 (ties up) and interleave: low half of each lane the even key, high half the odd one.
          const u32x16 low = ((u32x16)p0 + 0x8000u) >> 16, high = (u32x16)p1 + 0x8000u;
          store_as(s.probs + (j / 32 * 2 + half) * kTileBytes + j % 32 / 2 * 64,
                   _mm512_mask_blend_epi16(0xaaaaaaaau, (__m512i)low, (__m512i)high));
        }
        const f32x16 correction = exp2((before - highest) * to_log2);
        store16(s.highest + c + half * 16, highest);
        store16(s.total + c + half * 16, load16(s.total + c + half * 16) * correction + (total[0] + total[1]));
        float* out = s.out + size_t(c / 16 + half) * dim * 16;
        if (_mm512_cmpneq_ps_mask((__m512)correction, _mm512_set1_ps(1.f))) {
          for (int d = 0; d < dim; d++) store16(out + d * 16, load16(out + d * 16) * correction);
        }
      }
      // out^T [dim][columns] += V^T [dim][keys] * P^T [keys][columns]
      for (int d = 0; d < dim; d += 32) {
        float* out0 = s.out + size_t(c / 16) * dim * 16 + d * 16;
        float* out1 = out0 + dim * 16;
        _tile_loadd(0, out0, 64);
        _tile_loadd(1, out1, 64);
        _tile_loadd(2, out0 + 256, 64);
        _tile_loadd(3, out1 + 256, 64);
        for (int j = 0; j < n; j += 32) {
          const char* v = s.values + (size_t(j / 32) * (dim / 16) + d / 16) * kTileBytes;
          _tile_loadd(4, v, 64);
          _tile_loadd(5, v + kTileBytes, 64);
          _tile_loadd(6, s.probs + j / 32 * 2 * kTileBytes, 64);
          _tile_loadd(7, s.probs + (j / 32 * 2 + 1) * kTileBytes, 64);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, out0, 64);
        _tile_stored(1, out1, 64);
        _tile_stored(2, out0 + 256, 64);
        _tile_stored(3, out1 + 256, 64);
      }
    }
  }
  // Divide, transpose back to one row per column, and round.
  for (int c = 0; c < columns; c += 16) {
    const f32x16 inverse = 1.f / load16(s.total + c);
    for (int d = 0; d < dim; d += 16) {
      __m512i rows[16];
      const float* out = s.out + size_t(c / 16) * dim * 16 + d * 16;
      for (int i = 0; i < 16; i++) rows[i] = (__m512i)(load16(out + i * 16) * inverse);
      transpose16(rows);
      for (int i = 0; i < 16 && c + i < columns; i++) {
        const int at = c_begin + c + i, head = kv_head * group + at % group;
        store16(layer.out.at<bf16>(seq.row + at / group, head * dim + d), (f32x16)rows[i]);
      }
    }
  }
}

// ---- AMX, one token: keys and values pass once, in the order in which they lie ---------------------------------------
// out[g][32 dims * kDims] += p[g][16 keys] V for the sixteen keys of which `v` is the first, in registers. Lanes of the
// sums are in the order that unpacking leaves: vector 0 has dims 0-3 8-11 16-19 24-27, vector 1 the others.
template <int kGroup, int kDims>
BATON_INLINE void add_values(const bf16* v, int dim, int here, const uint16_t* probs, int probs_stride, float* out,
                             const char* next) {
  f32x16 acc[kGroup][kDims * 2];
  for (int g = 0; g < kGroup; g++) {
    for (int i = 0; i < kDims * 2; i++) acc[g][i] = load16(out + g * dim + i * 16);
  }
  for (int t = 0; t < here; t += 2, v += 2 * dim, next += 4 * dim) {
    __m512 p[kGroup];
    for (int g = 0; g < kGroup; g++) p[g] = (__m512)_mm512_set1_epi32(load_as<int32_t>(probs + g * probs_stride + t));
    for (int i = 0; i < kDims; i++) {
      prefetch_l1(next + i * 64);
      prefetch_l1(next + i * 64 + 2 * dim);
      const __m512i a = load_as<__m512i>(v + i * 32);
      const __m512i b = t + 1 < here ? load_as<__m512i>(v + dim + i * 32) : _mm512_setzero_si512();
      const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(a, b), high = (__m512bh)_mm512_unpackhi_epi16(a, b);
      for (int g = 0; g < kGroup; g++) {
        acc[g][2 * i] = (f32x16)_mm512_dpbf16_ps((__m512)acc[g][2 * i], (__m512bh)p[g], low);
        acc[g][2 * i + 1] = (f32x16)_mm512_dpbf16_ps((__m512)acc[g][2 * i + 1], (__m512bh)p[g], high);
      }
    }
  }
  for (int g = 0; g < kGroup; g++) {
    for (int i = 0; i < kDims * 2; i++) store16(out + g * dim + i * 16, acc[g][i]);
  }
}

// All dims of `kGroup` queries, at most 24 sums at a time.
template <int kGroup>
BATON_INLINE void add_tile(const bf16* v, int dim, int here, const uint16_t* probs, int probs_stride, float* out,
                           const char* next) {
  constexpr int kDims = kGroup <= 3 ? 4 : kGroup <= 6 ? 2 : 1;
  int d = 0;
  for (; d + 32 * kDims <= dim; d += 32 * kDims) {
    add_values<kGroup, kDims>(v + d, dim, here, probs, probs_stride, out + d, next + 2 * d);
  }
  if constexpr (kDims == 4) {
    for (; d + 64 <= dim; d += 64) add_values<kGroup, 2>(v + d, dim, here, probs, probs_stride, out + d, next + 2 * d);
  }
  for (; d < dim; d += 32) add_values<kGroup, 1>(v + d, dim, here, probs, probs_stride, out + d, next + 2 * d);
}

BATON_INLINE void add_group(int count, const bf16* v, int dim, int here, const uint16_t* probs, int probs_stride,
                            float* out, const char* next) {
  while (count > 0) {
    int done = 1;
    if (count >= 8) {
      add_tile<8>(v, dim, here, probs, probs_stride, out, next), done = 8;
    } else if (count >= 4) {
      add_tile<4>(v, dim, here, probs, probs_stride, out, next), done = 4;
    } else if (count == 3) {
      add_tile<3>(v, dim, here, probs, probs_stride, out, next), done = 3;
    } else if (count == 2) {
      add_tile<2>(v, dim, here, probs, probs_stride, out, next), done = 2;
    } else {
      add_tile<1>(v, dim, here, probs, probs_stride, out, next);
    }
    count -= done;
    probs += done * probs_stride;
    out += done * dim;
  }
}

// The queries of one KV head and one token as B tiles of `step` columns: [dim / 32][16 pairs of dims][step][2].
inline void pack_token_queries(const AttentionLayer<bf16>& layer, const SequencePart& seq, int head, int columns,
                               int step, char* out) {
  const __mmask16 used = __mmask16((1u << (step < 16 ? columns : 16)) - 1);
  for (int d = 0; d < layer.dim; d += 32) {
    __m512i rows[16];
    for (int i = 0; i < 16; i++) {
      rows[i] = i < columns ? load_as<__m512i>(layer.q + seq.row * layer.q_stride + (head + i) * layer.dim + d)
                            : _mm512_setzero_si512();
    }
    transpose16(rows);
    for (int i = 0; i < 16; i++, out += 4 * step) _mm512_mask_storeu_epi32(out, used, rows[i]);
  }
}

// One token of a sequence, KV heads [h_begin, h_end) and of each the `columns` queries from g_begin on (at most 16), at
// most kDecodeQueries together. All heads advance together, because the heads of a block are neighbours in memory: read
// one by one, each would end a run of pages, and the memory would wait for the core at the start of every one.
inline void attend_token(const AttentionLayer<bf16>& layer, const SequencePart& seq, int h_begin, int h_end, int g_begin,
                         int columns, AttentionScratch& s) {
  const int dim = layer.dim, group = layer.group(), bs = layer.block_size, k_tiles = dim / 32;
  const int end = seq.end(), num_heads = h_end - h_begin, num_queries = num_heads * columns;
  const float to_log2 = layer.scale * kLog2E;
  // Tiles of queries and of scores: rows of 4 * width bytes. Narrow ones only where wide ones would not leave L1 to the
  // keys: they load more slowly.
  const bool is_narrow = num_heads * k_tiles > kWideQueryTiles;
  const int width = is_narrow ? columns : 16;
  const int step = !is_narrow ? 16 : columns <= 1 ? 1 : columns <= 2 ? 2 : columns <= 4 ? 4 : columns <= 8 ? 8 : 16;
  const size_t tile_bytes = size_t(kTileRows) * 4 * step, query_bytes = k_tiles * tile_bytes;  // of one head
  const int64_t to_values = int64_t(layer.num_kv_heads) * bs * dim;
  for (int h = 0; h < num_heads; h++) {
    pack_token_queries(layer, seq, (h_begin + h) * group + g_begin, columns, step, s.queries + h * query_bytes);
  }
  TileConfig config;
  for (int i = 0; i < 8; i++) {
    config.row_bytes[i] = uint16_t(i == 4 || i == 5 ? 64 : 4 * width);
    config.rows[i] = kTileRows;
  }
  _tile_loadconfig(&config);
  float* out = s.out;  // [query][dim], query = head * columns + g
  float highest[kDecodeQueries], total[kDecodeQueries];
  for (int q = 0; q < num_queries; q++) highest[q] = kMasked, total[q] = 0;
  std::memset(out, 0, size_t(num_queries) * dim * sizeof(float));
  float* rows = (float*)s.keys;          // [query][kDecodeKeys]
  uint16_t* probs = (uint16_t*)s.probs;  // the same, bf16
  struct Tile {
    const bf16* keys;  // sixteen keys of one head
    int head, at;      // of the item's heads; position of the first key within the step
  };
  Tile tiles[kDecodeQueries * kDecodeKeys / 16 + 2];
  const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const int first = layer.window && end > layer.window ? end - layer.window : 0;
  for (int key = first / 16 * 16; key < end; key += kDecodeKeys) {
    const int n = end - key < kDecodeKeys ? end - key : kDecodeKeys, n16 = int(round_up(n, 16));
    int num_tiles = 0;  // in the order of memory: block, head, token
    for (int j = 0; j < n16;) {
      const int in_block = bs - (key + j) % bs, run = n16 - j < in_block ? n16 - j : in_block;
      const bf16* k = layer.half(seq.blocks[(key + j) / bs], 0, h_begin) + (key + j) % bs * dim;
      for (int h = 0; h < num_heads; h++, k += int64_t(bs) * dim) {
        for (int t = 0; t < run; t += 16) tiles[num_tiles++] = {k + t * dim, h, j + t};
      }
      j += run;
    }
    tiles[num_tiles] = tiles[num_tiles + 1] = {tiles[0].keys + to_values, 0, 0};  // what is read after the last keys
    for (int i = 0; i < num_tiles; i += 2) {  // two at once: one sum must wait for itself
      const Tile &one = tiles[i], &two = tiles[i + 1 < num_tiles ? i + 1 : i];
      const char* next[2];
      for (int ahead = 0; ahead < 2; ahead++) {
        next[ahead] = reinterpret_cast<const char*>(tiles[std::min(i + 2 + ahead, num_tiles + 1)].keys);
      }
      const char *query_one = s.queries + one.head * query_bytes, *query_two = s.queries + two.head * query_bytes;
      _tile_zero(0);
      _tile_zero(1);
      for (int t = 0; t < k_tiles; t++) {
        for (int line = 0; line < 16; line++) {
          prefetch_l1(next[0] + (t * 16 + line) * 64);
          prefetch_l1(next[1] + (t * 16 + line) * 64);
        }
        _tile_loadd(4, one.keys + t * 32, dim * 2);
        _tile_loadd(6, query_one + t * tile_bytes, 4 * step);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, two.keys + t * 32, dim * 2);
        _tile_loadd(7, query_two + t * tile_bytes, 4 * step);
        _tile_dpbf16ps(1, 5, 7);
      }
      char* scores = s.scores + i % 8 * tile_bytes;  // not the same one soon: the stores take a while
      _tile_stored(0, scores, 4 * step);
      _tile_stored(1, scores + tile_bytes, 4 * step);
      for (int g = 0; g < columns; g++) {
        const float* column = (const float*)scores + g;
        const __m512 x = _mm512_i32gather_ps((__m512i)(lanes * step), column, 4);
        const __m512 y = _mm512_i32gather_ps((__m512i)(lanes * step), column + tile_bytes / 4, 4);
        store16(rows + (one.head * columns + g) * kDecodeKeys + one.at, (f32x16)x);
        store16(rows + (two.head * columns + g) * kDecodeKeys + two.at, (f32x16)y);
      }
    }
    for (int q = 0; q < num_queries; q++) {
      float* row = rows + q * kDecodeKeys;
      f32x16 high = splat(kMasked);
      for (int j = 0; j < n16; j += 16) {
        const i32x16 at = lanes + (key + j);
        const f32x16 x = ((at < end) & (at >= first)) ? load16(row + j) : splat(kMasked);
        store16(row + j, x);
        high = max(high, x);
      }
      const float now = max_of(high), before = highest[q];
      highest[q] = before > now ? before : now;
      const float offset = -highest[q] * to_log2;
      f32x16 sum_here = {};
      for (int j = 0; j < n16; j += 16) {
        const f32x16 p = exp2<4>(load16(row + j) * to_log2 + offset);
        sum_here += p;
        store_as(probs + q * kDecodeKeys + j, narrow(p));
      }
      const float correction = exp2(splat((before - highest[q]) * to_log2))[0];
      total[q] = total[q] * correction + sum(sum_here);
      if (correction != 1.f) {
        for (int d = 0; d < dim; d += 16) store16(out + q * dim + d, load16(out + q * dim + d) * correction);
      }
    }
    for (int i = 0; i < num_tiles; i++) {
      const Tile& tile = tiles[i];
      const int q = tile.head * columns, here = n - tile.at < 16 ? n - tile.at : 16;
      const bf16* next = tiles[i + 1 < num_tiles ? i + 1 : i].keys + to_values;
      add_group(columns, tile.keys + to_values, dim, here, probs + q * kDecodeKeys + tile.at, kDecodeKeys,
                out + q * dim, reinterpret_cast<const char*>(next));
    }
  }
  // Undo the order of unpacking within each run of 32 dims, divide and round.
  const __m512i low = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  const __m512i high = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
  for (int q = 0; q < num_queries; q++) {
    const float inverse = 1.f / total[q];
    const int head = (h_begin + q / columns) * group + g_begin + q % columns;
    for (int d = 0; d < dim; d += 32) {
      const __m512 a = (__m512)(load16(out + q * dim + d) * inverse);
      const __m512 b = (__m512)(load16(out + q * dim + d + 16) * inverse);
      store16(layer.out.at<bf16>(seq.row, head * dim + d), (f32x16)_mm512_permutex2var_ps(a, low, b));
      store16(layer.out.at<bf16>(seq.row, head * dim + d + 16), (f32x16)_mm512_permutex2var_ps(a, high, b));
    }
  }
}
#endif

// A share of one sequence's attention that one thread computes: columns [c_begin, c_end) of KV heads [h_begin, h_end).
struct AttentionItem {
  int32_t seq, h_begin, h_end, c_begin, c_end;
};

// Cut the sequences into items, at least `num_threads` where that is possible at no cost.
template <class T>
inline void plan_attention(const AttentionLayer<T>& layer, const std::vector<SequencePart>& parts, int num_threads,
                           std::vector<AttentionItem>& items) {
  items.clear();
  const int group = layer.group(), kv_heads = layer.num_kv_heads, per_item = kMaxColumns / group * group;
  constexpr bool has_tiles = kHasTiles<T> && sizeof(T) == 2;
  // Decodes: many heads at once, but not so many that a thread has nothing to do.
  int heads = has_tiles ? kDecodeQueries / (group < 16 ? group : 16) : 1;
  if (int(parts.size()) < 2 * num_threads && heads > ceil_div(kv_heads, num_threads)) {
    heads = int(ceil_div(kv_heads, num_threads));
  }
  for (int s = 0; s < int(parts.size()); s++) {
    const int columns = parts[s].num_new * group;
    if (parts[s].num_new == 1) {
      for (int h = 0; h < kv_heads; h += heads) items.push_back({s, h, std::min(h + heads, kv_heads), 0, group});
      continue;
    }
    for (int h = 0; h < kv_heads; h++) {
      // Later columns see more keys: they come first, so that threads end together.
      for (int c = (columns - 1) / per_item * per_item; c >= 0; c -= per_item) {
        items.push_back({s, h, h + 1, c, std::min(c + per_item, columns)});
      }
    }
  }
}

template <class T>
inline void attend(const AttentionLayer<T>& layer, const std::vector<SequencePart>& parts, const AttentionItem& item,
                   AttentionScratch& s) {
  const SequencePart& seq = parts[item.seq];
#if defined(__AMX_TILE__) && defined(__AVX512BF16__)
  if constexpr (sizeof(T) == 2) {
    if (seq.num_new > 1) {
      configure_tiles(kTileRows);
      return attend_tiles(layer, seq, item.h_begin, item.c_begin, item.c_end, s);
    }
    for (int g = item.c_begin; g < item.c_end; g += 16) {
      attend_token(layer, seq, item.h_begin, item.h_end, g, item.c_end - g < 16 ? item.c_end - g : 16, s);
    }
    return;
  }
#endif
  for (int h = item.h_begin; h < item.h_end; h++) attend_plain(layer, seq, h, item.c_begin, item.c_end, s);
}

}  // namespace baton
