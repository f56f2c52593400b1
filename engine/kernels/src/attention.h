// Causal attention over one layer of the paged pool, [block][K|V][kv_head][token][dim] (baton/kv_layout.py).
//
// Columns: the queries of one KV head are the columns c = (token - first) * group + head of all its query heads, so
// grouped-query attention reads each key once. Scores are computed transposed, keys x columns: then the softmax runs
// down the lanes of vectors (no horizontal sums), keys are AMX operands as they lie in the pool, and the probabilities
// leave the softmax in the order that the second product wants. Online softmax: Milakov and Gimelshein 2018
// (arXiv:1805.02867); blocked as in FlashAttention (Dao et al. 2022, arXiv:2205.14135).
#pragma once
#include <memory>

#include "base.h"
#include "linear.h"

namespace baton {

constexpr float kMasked = -1e30f;  // finite: a row of nothing but masked scores must not become NaN
constexpr int kMaxHeadDim = 256;
constexpr int kMaxColumns = 512;  // of one work item

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
  configure_tiles(kTileRows);
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

// ---- AMX, one token: the keys and values of a head pass once --------------------------------------------------------
// out[g][32 dims * kDims] += p[g][keys] V, in registers. probs: [kGroup][kKeys] bf16. Lanes of `acc` are in the order
// that unpacking leaves: vector 0 has dims 0-3 8-11 16-19 24-27, vector 1 the others.
template <int kGroup, int kDims>
BATON_INLINE void add_values(const AttentionLayer<bf16>& layer, const SequencePart& seq, int kv_head, int key, int n,
                             int end, const uint16_t* probs, int probs_stride, float* out, int out_stride, int d) {
  const int dim = layer.dim, bs = layer.block_size;
  f32x16 acc[kGroup][kDims * 2];
  for (int g = 0; g < kGroup; g++) {
    for (int i = 0; i < kDims * 2; i++) acc[g][i] = load16(out + g * out_stride + d + i * 16);
  }
  for (int j = 0; j < n; j += 16) {
    const int at = key + j;
    const bf16* v = layer.half(seq.blocks[at / bs], 1, kv_head) + at % bs * dim + d;
    const int here = end - at < 16 ? end - at : 16;
    for (int t = 0; t < here; t += 2, v += 2 * dim) {
      __m512 p[kGroup];
      for (int g = 0; g < kGroup; g++) {
        p[g] = (__m512)_mm512_set1_epi32(load_as<int32_t>(probs + g * probs_stride + j + t));
      }
      for (int i = 0; i < kDims; i++) {
        const __m512i a = load_as<__m512i>(v + i * 32);
        const __m512i b = t + 1 < here ? load_as<__m512i>(v + dim + i * 32) : _mm512_setzero_si512();
        const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(a, b), high = (__m512bh)_mm512_unpackhi_epi16(a, b);
        for (int g = 0; g < kGroup; g++) {
          acc[g][2 * i] = (f32x16)_mm512_dpbf16_ps((__m512)acc[g][2 * i], (__m512bh)p[g], low);
          acc[g][2 * i + 1] = (f32x16)_mm512_dpbf16_ps((__m512)acc[g][2 * i + 1], (__m512bh)p[g], high);
        }
      }
    }
  }
  for (int g = 0; g < kGroup; g++) {
    for (int i = 0; i < kDims * 2; i++) store16(out + g * out_stride + d + i * 16, acc[g][i]);
  }
}

template <int kGroup>
inline void add_all_values(const AttentionLayer<bf16>& layer, const SequencePart& seq, int kv_head, int key, int n,
                           int end, const uint16_t* probs, int probs_stride, float* out) {
  constexpr int kDims = kGroup <= 3 ? 4 : kGroup <= 6 ? 2 : 1;  // at most 24 accumulators
  const int dim = layer.dim;
  int d = 0;
  for (; d + 32 * kDims <= dim; d += 32 * kDims) {
    add_values<kGroup, kDims>(layer, seq, kv_head, key, n, end, probs, probs_stride, out, dim, d);
  }
  for (; d + 64 <= dim; d += 64) {
    add_values<kGroup, kGroup <= 6 ? 2 : 1>(layer, seq, kv_head, key, n, end, probs, probs_stride, out, dim, d);
    if (kGroup > 6) add_values<kGroup, 1>(layer, seq, kv_head, key, n, end, probs, probs_stride, out, dim, d + 32);
  }
  for (; d < dim; d += 32) {
    add_values<kGroup, 1>(layer, seq, kv_head, key, n, end, probs, probs_stride, out, dim, d);
  }
}

constexpr int kDecodeKeys = 128;  // per step: 16 KiB of values of 64 dims stay in L1 between the two products

inline void attend_token(const AttentionLayer<bf16>& layer, const SequencePart& seq, int kv_head, int g_begin,
                         int columns, AttentionScratch& s) {
  const int dim = layer.dim, group = layer.group(), bs = layer.block_size, k_tiles = dim / 32;
  const int end = seq.end(), head = kv_head * group + g_begin;
  const float to_log2 = layer.scale * kLog2E;
  pack_queries(layer, seq, kv_head, g_begin, columns, s.queries);
  float* out = s.out;
  float highest[16], total[16];
  for (int g = 0; g < columns; g++) highest[g] = kMasked, total[g] = 0;
  std::memset(out, 0, size_t(columns) * dim * sizeof(float));
  float* rows = (float*)s.keys;           // [columns][kDecodeKeys]
  uint16_t* probs = (uint16_t*)s.probs;   // the same, bf16
  const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const int first = layer.window && end > layer.window ? end - layer.window : 0;
  const int line_step = 64 / int(sizeof(bf16));
  for (int key = first / 16 * 16; key < end; key += kDecodeKeys) {
    const int n = end - key < kDecodeKeys ? end - key : kDecodeKeys, n16 = int(round_up(n, 16));
    for (int j = 0; j < n16; j += 16) {
      const int at = key + j;
      const bf16* k = layer.half(seq.blocks[at / bs], 0, kv_head) + at % bs * dim;
      // The values of these keys are read next, and the keys of the tile after the next one soon.
      const bf16* v = k + int64_t(layer.num_kv_heads) * bs * dim;
      for (int i = 0; i < 16 * dim; i += line_step) prefetch_l1(v + i);
      if (at + 32 < end) {
        const bf16* next = layer.half(seq.blocks[(at + 32) / bs], 0, kv_head) + (at + 32) % bs * dim;
        for (int i = 0; i < 16 * dim; i += line_step) prefetch_l1(next + i);
      }
      _tile_zero(0);
      for (int t = 0; t < k_tiles; t++) {
        _tile_loadd(4, k + t * 32, dim * 2);
        _tile_loadd(6, s.queries + size_t(t) * kTileBytes, 64);
        _tile_dpbf16ps(0, 4, 6);
      }
      _tile_stored(0, s.scores + j * 64, 64);
    }
    for (int g = 0; g < columns; g++) {
      const float* column = (const float*)s.scores + g;
      float* row = rows + g * kDecodeKeys;
      f32x16 high = splat(kMasked);
      for (int j = 0; j < n16; j += 16) {
        f32x16 x = (f32x16)_mm512_i32gather_ps((__m512i)(lanes * 16), column + j * 16, 4);
        const i32x16 at = lanes + (key + j);
        x = ((at < end) & (at >= first)) ? x : splat(kMasked);
        store16(row + j, x);
        high = max(high, x);
      }
      const float now = max_of(high), before = highest[g];
      highest[g] = before > now ? before : now;
      const float offset = -highest[g] * to_log2;
      f32x16 sum_here = {};
      for (int j = 0; j < n16; j += 16) {
        const f32x16 p = exp2<4>(load16(row + j) * to_log2 + offset);
        sum_here += p;
        store_as(probs + g * kDecodeKeys + j, narrow(p));
      }
      const float correction = exp2(splat((before - highest[g]) * to_log2))[0];
      total[g] = total[g] * correction + sum(sum_here);
      if (correction != 1.f) {
        for (int d = 0; d < dim; d += 16) store16(out + g * dim + d, load16(out + g * dim + d) * correction);
      }
    }
    for (int g = 0; g < columns;) {
      const int left = columns - g;
      const uint16_t* p = probs + g * kDecodeKeys;
      float* o = out + g * dim;
#define BATON_ADD(count)                                                                \
  {                                                                                     \
    add_all_values<count>(layer, seq, kv_head, key, n16, end, p, kDecodeKeys, o);       \
    g += count;                                                                         \
  }
      if (left >= 8) BATON_ADD(8)
      else if (left >= 4) BATON_ADD(4)
      else if (left == 3) BATON_ADD(3)
      else if (left == 2) BATON_ADD(2)
      else BATON_ADD(1)
#undef BATON_ADD
    }
  }
  // Undo the order of unpacking within each run of 32 dims, divide and round.
  const __m512i low = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  const __m512i high = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
  for (int g = 0; g < columns; g++) {
    const float inverse = 1.f / total[g];
    for (int d = 0; d < dim; d += 32) {
      const __m512 a = (__m512)(load16(out + g * dim + d) * inverse);
      const __m512 b = (__m512)(load16(out + g * dim + d + 16) * inverse);
      const int at = (head + g) * dim + d;
      store16(layer.out.at<bf16>(seq.row, at), (f32x16)_mm512_permutex2var_ps(a, low, b));
      store16(layer.out.at<bf16>(seq.row, at + 16), (f32x16)_mm512_permutex2var_ps(a, high, b));
    }
  }
}
#endif

// Columns of a sequence's KV head, and how many of them one work item takes.
template <class T>
BATON_INLINE int columns_per_item(const AttentionLayer<T>& layer) {
  return kMaxColumns / layer.group() * layer.group();
}

template <class T>
inline void attend(const AttentionLayer<T>& layer, const SequencePart& seq, int kv_head, int c_begin, int c_end,
                   AttentionScratch& s) {
#if defined(__AMX_TILE__) && defined(__AVX512BF16__)
  if constexpr (sizeof(T) == 2) {
    if (seq.num_new > 1) return attend_tiles(layer, seq, kv_head, c_begin, c_end, s);
    configure_tiles(kTileRows);
    for (int g = c_begin; g < c_end; g += 16) {
      attend_token(layer, seq, kv_head, g, c_end - g < 16 ? c_end - g : 16, s);
    }
    return;
  }
#endif
  attend_plain(layer, seq, kv_head, c_begin, c_end, s);
}

}  // namespace baton
