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
constexpr int kSpanKeys = 1024;     // prefill: whose K and V stay in L2 while all columns pass
constexpr int kStepKeys = 32;       // prefill: per step of the online softmax
constexpr int kGroupKeys = 256;     // prefill: whose values are summed at once, at most
constexpr int kDecodeKeys = 128;    // decode: per step of the online softmax
constexpr int kDecodeQueries = 64;  // decode: of one work item, all its KV heads together
constexpr int kWideQueryTiles = 12;
constexpr int kFetchBytes = 128 << 10;  // decode: keys, or values, of a step that are fetched a step ahead
constexpr int kAheadBytes = 16 << 10;   // decode: from what is read to what is begun

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
  // The first of `end` positions that the last of them sees.
  int first_seen(int end) const { return window && end > window ? end - window : 0; }
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

// A share of one sequence's attention that one thread computes: columns [c_begin, c_end) of KV heads [h_begin, h_end).
struct AttentionItem {
  int32_t seq, h_begin, h_end, c_begin, c_end;
};

struct alignas(64) AttentionScratch {
  static constexpr int kKeys = 256;
  alignas(64) char scores[kKeys * 32 * 4];               // prefill: two steps' [keys][32 columns] float
  alignas(64) char probs[kKeys * 32 * 4];                // prefill: two groups' bf16 tiles
  alignas(64) char values[kSpanKeys * kMaxHeadDim * 2];  // V of the keys, transposed tiles or float
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
inline void configure_all_tiles(int width) {  // 4 and 5, the keys: 64 bytes in any case
  TileConfig config;
  for (int i = 0; i < 8; i++) {
    config.row_bytes[i] = uint16_t(i == 4 || i == 5 ? 64 : 4 * width);
    config.rows[i] = kTileRows;
  }
  load_tile_config(config);
}

// Queries as B tiles: [column block of 16][dim / 32][16 pairs of dims][16 columns][2]. Pads with zero columns.
inline void pack_queries(const AttentionLayer<bf16>& layer, const SequencePart& seq, int kv_head, int c_begin,
                         int columns, char* out) {
  const int group = layer.group(), dim = layer.dim;
  const bf16* token = layer.q + (seq.row + c_begin / group) * layer.q_stride + int64_t(kv_head) * group * dim;
  int head = c_begin % group;
  for (int c = 0; c < columns; c += 16) {
    const bf16* from[16];
    for (int i = 0; i < 16 && c + i < columns; i++) {
      from[i] = token + head * dim;
      if (++head == group) head = 0, token += layer.q_stride;
    }
    for (int d = 0; d < dim; d += 32, out += kTileBytes) {
      __m512i rows[16];
      for (int i = 0; i < 16; i++) rows[i] = c + i < columns ? load_as<__m512i>(from[i] + d) : _mm512_setzero_si512();
      transpose16(rows);
      for (int i = 0; i < 16; i++) store_as(out + i * 64, rows[i]);
    }
  }
}

// Values of keys [key, key + num_keys), num_keys a multiple of 32, as A tiles of V^T:
// [num_keys / 32][dim / 16][16 dims][32 keys]. Zero from `end` on: a masked probability of 0 does not hide a NaN.
inline void pack_values(const AttentionLayer<bf16>& layer, const SequencePart& seq, int kv_head, int key, int num_keys,
                        int end, char* out) {
  const int dim = layer.dim, bs = layer.block_size;
  for (int k = key; k < key + num_keys; k += 32) {
    alignas(64) static const bf16 zeros[kMaxHeadDim] = {};
    const bf16* from[32];
    for (int i = 0; i < 32; i += 16) {  // sixteen keys: never across a block
      const bf16* tile = k + i < end ? layer.half(seq.blocks[(k + i) / bs], 1, kv_head) + (k + i) % bs * dim : nullptr;
      for (int j = i; j < i + 16; j++) from[j] = k + j < end ? tile + (j - i) * dim : zeros;
    }
    for (int d = 0; d < dim; d += 32) {
      // Pairs of keys; low has, in each 128-bit lane l, dims 8 l .. 8 l + 3, high the four after them.
      __m512i low[16], high[16];
      for (int i = 0; i < 16; i++) {
        const __m512i a = load_as<__m512i>(from[2 * i] + d), b = load_as<__m512i>(from[2 * i + 1] + d);
        low[i] = _mm512_unpacklo_epi16(a, b);
        high[i] = _mm512_unpackhi_epi16(a, b);
      }
      transpose16(low);
      transpose16(high);
      for (int i = 0; i < 16; i++) {
        char* at = out + i / 8 * kTileBytes + (i / 4 % 2 * 8 + i % 4) * 64;
        store_as(at, low[i]);
        store_as(at + 4 * 64, high[i]);
      }
      out += 2 * kTileBytes;
    }
  }
}

// 2**x to 1e-4, for what is rounded to bf16; 0 where x is far below 0. NaN stays NaN.
BATON_INLINE f32x16 exp2_of_score(f32x16 x) {
  const f32x16 f = (f32x16)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  f32x16 p = f * 0.07826797f + 0.22630768f;
  p = p * f + 0.69542435f;
  p = p * f + 1.0f;
  return (f32x16)_mm512_scalef_ps((__m512)p, (__m512)x);
}

// Rounded, interleaved: low half of each lane from `even`, high half from `odd`.
BATON_INLINE __m512i narrow_pair(f32x16 even, f32x16 odd) {
  return (__m512i)((u32x16)rounded<bf16>(even) >> 16 | (u32x16)rounded<bf16>(odd));
}

// Prefill of columns [c_begin, c_end) of one KV head. Work passes through three stages, each a step of kStepKeys keys
// times a block of 32 columns: scores (tiles), softmax (vectors), sums of values (tiles; of a group of steps at once,
// because accumulators are slow to come and go). The stages of different steps run side by side: slices of the softmax
// stand between the tile products of the step after it and of the group before it, because either alone would leave the
// other's unit idle. Steps and groups are small so that all of it stays in L1 while keys and values stream from L2.
class TileAttention {
 public:
  TileAttention(const AttentionLayer<bf16>& layer, const SequencePart& seq, int kv_head, int c_begin, int c_end,
                AttentionScratch& scratch)
      : layer_(layer), seq_(seq), s_(scratch), kv_head_(kv_head), c_begin_(c_begin), columns_(c_end - c_begin),
        dim_(layer.dim), group_keys_(layer.dim < 128 ? kGroupKeys / 2 : kGroupKeys), to_log2_(layer.scale * kLog2E) {}

  void run() {
    const int padded = int(round_up(columns_, 32)), group = layer_.group(), k_tiles = dim_ / 32;
    pack_queries(layer_, seq_, kv_head_, c_begin_, columns_, s_.queries);
    if (columns_ <= padded - 16) {
      std::memset(s_.queries + size_t(padded / 16 - 1) * k_tiles * kTileBytes, 0, size_t(k_tiles) * kTileBytes);
    }
    for (int c = 0; c < padded; c++) {
      s_.position[c] = seq_.start + (c_begin_ + (c < columns_ ? c : columns_ - 1)) / group;
      s_.highest[c] = kLowest;
      s_.total[c] = 0;
    }
    std::memset(s_.out, 0, size_t(padded) * dim_ * sizeof(float));
    const int keys_end = s_.position[columns_ - 1] + 1;
    int key = layer_.window ? s_.position[0] - layer_.window + 1 : 0;
    key = key < 0 ? 0 : key / kStepKeys * kStepKeys;
    for (const int first_span = key; key < keys_end;) {
      const int span_end = std::min((key / kSpanKeys + 1) * kSpanKeys, keys_end);
      begin_span(key, span_end);
      for (int c = 0; c < padded; c += 32) {
        const int first = s_.position[c], last = s_.position[c + 31], end = std::min(last + 1, span_end);
        int begin = key;
        if (layer_.window) begin = std::max(begin, (first - layer_.window + 1) / kStepKeys * kStepKeys);
        for (int k = begin; k < end; k += kStepKeys) {
          const bool is_first = k == begin && key == first_span;
          const bool is_masked = k + kStepKeys > first + 1 || (layer_.window && k <= last - layer_.window);
          advance({c, k - key, is_first, is_masked, k + kStepKeys >= end});
        }
      }
      advance({});
      sum_values(dim_, 0);
      key = span_end;
    }
    finish();
  }

 private:
  static constexpr float kLowest = -1e20f;  // so far above kMasked that a masked score's probability is 0
  static constexpr float kMayRise = 8;      // log2 of what probabilities may reach before sums are rescaled
  static constexpr int kPairs = 4;          // of keys per slice of the softmax
  static constexpr int kSlices = kStepKeys / kPairs;

  struct Step {
    int column = -1;         // the first of 32; -1: no step
    int key = 0;             // the first of kStepKeys, counted from the span's first
    bool is_first = false;   // of its columns, if they see keys of the first span
    bool is_masked = false;  // some columns do not see some keys
    bool is_last = false;    // of its columns, in this span
    explicit operator bool() const { return column >= 0; }
  };
  // Steps of the same columns, one after the other in `probs`.
  struct Group {
    int column = 0, key = 0, num_keys = 0;
    int parity = 0;  // of the two buffers
    int dim = 0;     // values of dims before it are summed
  };

  // What lies beyond the sequence is replaced by other keys, and by zeros as values: all of it is masked.
  void begin_span(int key, int end) {
    span_ = key;
    const int n = int(round_up(end - key, kStepKeys)), bs = layer_.block_size;
    for (int i = 0; i < n; i += 16) {
      const int at = key + i < end ? key + i : key;
      keys_[i / 16] = layer_.half(seq_.blocks[at / bs], 0, kv_head_) + at % bs * dim_;
    }
    pack_values(layer_, seq_, kv_head_, key, n, end, s_.values);
  }

  // One step further: `next` is scored while the step before it goes through the softmax and joins the open group, and
  // while some values of the closed group are summed.
  void advance(const Step& next) {
    if (now_) {
      if (open_.num_keys == 0) open_.column = now_.column, open_.key = now_.key;
      if (raise_highest() && !now_.is_first) rescale();
      offset_[0] = load16(s_.highest + now_.column) * -to_log2_;
      offset_[1] = load16(s_.highest + now_.column + 16) * -to_log2_;
    }
    // The closed group must be done when the open one closes.
    const int share = now_ && now_.is_last ? dim_ : int(round_up(dim_ * kStepKeys / group_keys_, 32));
    const int dims = closed_.num_keys ? std::min(share, dim_ - closed_.dim) : 0;
    const int products = dims / 32 * (closed_.num_keys / 32) + (next ? dim_ / 32 : 0);
    slice_ = now_ ? 0 : kSlices;
    const int slices = products ? int(ceil_div(kSlices, products)) : kSlices;
    sum_values(dims, slices);
    if (next) score(next, slices);
    softmax(kSlices);
    if (now_) {
      open_.num_keys += kStepKeys;
      if (now_.is_last || open_.num_keys == group_keys_) close();
    }
    now_ = next;
    parity_ ^= 1;
  }

  void close() {
    sum_values(dim_, 0);
    closed_ = open_;
    open_ = {};
    open_.parity = closed_.parity ^ 1;
  }

  char* scores(int parity) const { return s_.scores + parity * kStepKeys * 128; }
  char* probs(const Group& group) const { return s_.probs + group.parity * kGroupKeys * 64; }

  void mask() {
    for (int half = 0; half < 2; half++) {
      const __m512i position = load_as<__m512i>(s_.position + now_.column + half * 16);
      char* score = scores(parity_) + half * 64;
      for (int j = 0; j < kStepKeys; j++, score += 128) {
        const __m512i at = _mm512_set1_epi32(span_ + now_.key + j);
        __mmask16 seen = _mm512_cmple_epi32_mask(at, position);
        if (layer_.window) {
          seen &= _mm512_cmpgt_epi32_mask(_mm512_add_epi32(at, _mm512_set1_epi32(layer_.window)), position);
        }
        store_as(score, _mm512_mask_blend_ps(seen, _mm512_set1_ps(kMasked), load_as<__m512>(score)));
      }
    }
  }

  // Whether `highest` of some columns had to rise. It follows the true maximum only when that is far above it, column
  // by column: what a column's sums are scaled by does not depend on its neighbours.
  bool raise_highest() {
    if (now_.is_masked) mask();
    const char* in = scores(parity_);
    f32x16 high[2][2];
    for (int i = 0; i < 4; i++) high[i % 2][i / 2] = load_as<f32x16>(in + i * 64);
    for (int j = 2; j < kStepKeys; j += 2) {
      for (int i = 0; i < 4; i++) {
        high[i % 2][i / 2] = max(high[i % 2][i / 2], load_as<f32x16>(in + j * 128 + i * 64));
      }
    }
    bool is_raised = false;
    for (int half = 0; half < 2; half++) {
      float* at = s_.highest + now_.column + half * 16;
      const f32x16 here = max(max(splat(kLowest), high[half][0]), high[half][1]), before = load16(at);
      const __mmask16 is_higher =
          _mm512_cmp_ps_mask((__m512)((here - before) * to_log2_), _mm512_set1_ps(kMayRise), _CMP_GT_OQ);
      const f32x16 highest = (f32x16)_mm512_mask_blend_ps(is_higher, (__m512)before, (__m512)here);
      correction_[half] = exp2((before - highest) * to_log2_);
      store16(at, highest);
      is_raised |= is_higher != 0;
    }
    return is_raised;
  }

  void rescale() {
    if (open_.num_keys) {
      close();
      open_.column = now_.column, open_.key = now_.key;
    }
    sum_values(dim_, 0);
    for (int half = 0; half < 2; half++) {
      float* total = s_.total + now_.column + half * 16;
      store16(total, load16(total) * correction_[half]);
      float* out = s_.out + size_t(now_.column / 16 + half) * dim_ * 16;
      for (int d = 0; d < dim_; d++) store16(out + d * 16, load16(out + d * 16) * correction_[half]);
    }
  }

  // Slices up to `end`: probabilities in the order of the tiles that they become, [2 column halves][16 pairs of keys]
  // [16 columns][2].
  BATON_INLINE void softmax(int end) {
    for (; slice_ < end; slice_++) {
      const int half = slice_ / (kSlices / 2), pair = slice_ % (kSlices / 2) * kPairs;
      const char* in = scores(parity_) + half * 64 + pair * 256;
      char* out = probs(open_) + open_.num_keys * 64 + slice_ * kPairs * 64;
      float* total = s_.total + now_.column + half * 16;
      const f32x16 offset = offset_[half];
      f32x16 sums[kPairs];
      for (int i = 0; i < kPairs; i++) {
        const f32x16 p0 = exp2_of_score(load_as<f32x16>(in + i * 256) * to_log2_ + offset);
        const f32x16 p1 = exp2_of_score(load_as<f32x16>(in + i * 256 + 128) * to_log2_ + offset);
        sums[i] = p0 + p1;
        // Round both to bf16 (ties up) and interleave: low half of each lane the even key, high half the odd one.
        const u32x16 low = ((u32x16)p0 + 0x8000u) >> 16, high = (u32x16)p1 + 0x8000u;
        store_as(out + i * 64, _mm512_mask_blend_epi16(0xaaaaaaaau, (__m512i)low, (__m512i)high));
      }
      store16(total, load16(total) + ((sums[0] + sums[1]) + (sums[2] + sums[3])));
    }
  }

  // Scores of `step`, into the other buffer; `slices` of the softmax after each product.
  BATON_INLINE void score(const Step& step, int slices) {
    const int k_tiles = dim_ / 32;
    const char* queries = s_.queries + size_t(step.column / 16) * k_tiles * kTileBytes;
    const bf16 *k0 = keys_[step.key / 16], *k1 = keys_[step.key / 16 + 1];
    char* out = scores(parity_ ^ 1);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int t = 0; t < k_tiles; t++) {
      _tile_loadd(4, k0 + t * 32, dim_ * 2);
      _tile_loadd(6, queries + size_t(t) * kTileBytes, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, queries + size_t(k_tiles + t) * kTileBytes, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, k1 + t * 32, dim_ * 2);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      softmax(std::min(slice_ + slices, kSlices));
    }
    _tile_stored(0, out, 128);
    _tile_stored(1, out + 64, 128);
    _tile_stored(2, out + 16 * 128, 128);
    _tile_stored(3, out + 16 * 128 + 64, 128);
  }

  // Of the closed group, for `dims` more dims: out^T [dim][columns] += V^T [dim][keys] * P^T [keys][columns]
  BATON_INLINE void sum_values(int dims, int slices) {
    if (!closed_.num_keys) return;
    const char* p = probs(closed_);
    const int end = std::min(closed_.dim + dims, dim_);
    for (; closed_.dim < end; closed_.dim += 32) {
      float* out0 = s_.out + size_t(closed_.column / 16) * dim_ * 16 + closed_.dim * 16;
      float* out1 = out0 + dim_ * 16;
      _tile_loadd(0, out0, 64);
      _tile_loadd(1, out1, 64);
      _tile_loadd(2, out0 + 256, 64);
      _tile_loadd(3, out1 + 256, 64);
      for (int j = 0; j < closed_.num_keys; j += 32) {
        const char* v = s_.values + (size_t((closed_.key + j) / 32) * (dim_ / 16) + closed_.dim / 16) * kTileBytes;
        _tile_loadd(4, v, 64);
        _tile_loadd(6, p + j * 64, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, p + j * 64 + kTileBytes, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, v + kTileBytes, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        softmax(std::min(slice_ + slices, kSlices));
      }
      _tile_stored(0, out0, 64);
      _tile_stored(1, out1, 64);
      _tile_stored(2, out0 + 256, 64);
      _tile_stored(3, out1 + 256, 64);
    }
    if (closed_.dim == dim_) closed_.num_keys = 0;
  }

  // Divide, round, and transpose back to one row per column.
  void finish() {
    const int group = layer_.group();
    int row = seq_.row + c_begin_ / group, head = c_begin_ % group;
    for (int c = 0; c < columns_; c += 16) {
      const int here = std::min(columns_ - c, 16);
      char* to[16];
      for (int i = 0; i < here; i++) {
        to[i] = layer_.out.row(row, (kv_head_ * group + head) * dim_ / 32);
        if (++head == group) head = 0, row++;
      }
      const f32x16 inverse = 1.f / load16(s_.total + c);
      const float* out = s_.out + size_t(c) * dim_;
      for (int d = 0; d < dim_; d += 32) {
        __m512i rows[16];  // pairs of dims
        for (int i = 0; i < 16; i++, out += 32) {
          rows[i] = narrow_pair(load16(out) * inverse, load16(out + 16) * inverse);
        }
        transpose16(rows);
        for (int i = 0; i < here; i++) {
          store_as(to[i], rows[i]);
          to[i] += layer_.out.rows_per_tile * kTileRowBytes;
        }
      }
    }
  }

  const AttentionLayer<bf16>& layer_;
  const SequencePart& seq_;
  AttentionScratch& s_;
  const int kv_head_, c_begin_, columns_, dim_, group_keys_;
  const float to_log2_;
  int span_ = 0;                      // its first key
  const bf16* keys_[kSpanKeys / 16];  // of the span, sixteen keys each: never across a block
  Step now_;                          // scored, in the softmax
  int slice_ = 0;                     // of its softmax, the next
  int parity_ = 0;                    // of the two buffers, which has its scores
  f32x16 offset_[2], correction_[2];  // of its columns
  Group open_, closed_;
};

// ---- AMX, one token: keys and values pass once, in the order in which they lie ---------------------------------------
// Where bytes to come lie.
struct Rows {
  const char *one, *two;
  Rows operator+(int64_t bytes) const { return {one + bytes, two + bytes}; }
};

// out[g][32 dims * kDims] += p[g][16 keys] V for the sixteen keys of which `v` is the first, in registers. Lanes of the
// sums are in the order that unpacking leaves: vector 0 has dims 0-3 8-11 16-19 24-27, vector 1 the others. Fetches eight
// rows from each of `next` on: from two runs of memory at once, because the hardware stays only so far ahead of each.
template <int kGroup, int kDims>
BATON_INLINE void add_values(const bf16* v, int dim, int here, const uint16_t* probs, int probs_stride, float* out,
                             Rows next) {
  f32x16 acc[kGroup][kDims * 2];
  for (int g = 0; g < kGroup; g++) {
    for (int i = 0; i < kDims * 2; i++) acc[g][i] = load16(out + g * dim + i * 16);
  }
  for (int t = 0; t < here; t += 2, v += 2 * dim, next = next + 2 * dim) {
    __m512 p[kGroup];
    for (int g = 0; g < kGroup; g++) p[g] = (__m512)_mm512_set1_epi32(load_as<int32_t>(probs + g * probs_stride + t));
    for (int i = 0; i < kDims; i++) {
      prefetch_l1(next.one + i * 64);
      prefetch_l1(next.two + i * 64);
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
                           Rows next) {
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
                            float* out, Rows next) {
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

// The keys of one step, in tiles of sixteen, in the order of memory: block, head, token.
struct KeyTiles {
  struct Tile {
    const bf16* keys;  // of one head
    int head, at;      // of the item's heads; position of the first key within the step
  };
  Tile tiles[kDecodeQueries * kDecodeKeys / 16];
  int count = 0;

  // Keys from `key` on, kDecodeKeys or what there is before `end`.
  void list(const AttentionLayer<bf16>& layer, const SequencePart& seq, int h_begin, int h_end, int key, int end) {
    const int bs = layer.block_size, dim = layer.dim;
    const int n16 = int(round_up(end - key < kDecodeKeys ? end - key : kDecodeKeys, 16));
    count = 0;
    for (int j = 0; j < n16;) {
      const int in_block = bs - (key + j) % bs, run = n16 - j < in_block ? n16 - j : in_block;
      const bf16* k = layer.half(seq.blocks[(key + j) / bs], 0, h_begin) + (key + j) % bs * dim;
      for (int h = h_begin; h < h_end; h++, k += int64_t(bs) * dim) {
        for (int t = 0; t < run; t += 16) tiles[count++] = {k + t * dim, h - h_begin, j + t};
      }
      j += run;
    }
  }

  bool is_small(int dim) const { return count * 32 * dim <= kFetchBytes; }

  // Small steps into L2 while tile `i` of the phase before is worked on: part `part` of `parts` of a fourth of each of
  // four tiles, a quarter of the list apart. In one run, requests to memory would hold all of the core's fill buffers
  // (see FetchPlan).
  BATON_INLINE void fetch(int i, int dim, int64_t offset, int part, int parts) const {
    const int quarter = (count + 3) / 4, lines = dim / 8 / parts, first = (i % 4) * (dim / 8) + part * lines;
    if (i / 4 >= quarter || !is_small(dim)) return;
    for (int at = i / 4; at < count; at += quarter) {
      const char* from = reinterpret_cast<const char*>(tiles[at].keys + offset) + first * 64;
      for (int l = 0; l < lines; l++) prefetch_l2(from + l * 64);
    }
  }

  // Of large steps only the first lines of each tile, some tiles ahead: the hardware goes on with a page that is begun.
  BATON_INLINE void begin(int i, int dim, int64_t offset) const {
    if (i < 0 || i >= count || is_small(dim)) return;
    const char* from = reinterpret_cast<const char*>(tiles[i].keys + offset);
    for (int line = 0; line < 4; line++) prefetch_l2(from + line * 64);
  }
};

// One token of a sequence, KV heads [h_begin, h_end) and of each the `columns` queries from g_begin on (at most 16), at
// most kDecodeQueries together. All heads advance together, because the heads of a block are neighbours in memory: read
// one by one, each would end a run of pages, and the memory would wait for the core at the start of every one.
inline void attend_token(const AttentionLayer<bf16>& layer, const SequencePart& seq, int h_begin, int h_end, int g_begin,
                         int columns, const AttentionItem* next, const std::vector<SequencePart>& parts,
                         AttentionScratch& s) {
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
  const int ahead = kAheadBytes / (kTileRows * dim * 2);  // tiles
  for (int h = 0; h < num_heads; h++) {
    pack_token_queries(layer, seq, (h_begin + h) * group + g_begin, columns, step, s.queries + h * query_bytes);
  }
  configure_all_tiles(width);
  float* out = s.out;  // [query][dim], query = head * columns + g
  float highest[kDecodeQueries], total[kDecodeQueries];
  for (int q = 0; q < num_queries; q++) highest[q] = kMasked, total[q] = 0;
  std::memset(out, 0, size_t(num_queries) * dim * sizeof(float));
  float* rows = (float*)s.keys;          // [query][kDecodeKeys]
  uint16_t* probs = (uint16_t*)s.probs;  // the same, bf16
  KeyTiles lists[2];
  const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const int first = layer.first_seen(end);
  int turn = 0;
  lists[0].list(layer, seq, h_begin, h_end, first / 16 * 16, end);
  for (int key = first / 16 * 16; key < end; key += kDecodeKeys, turn ^= 1) {
    const int n = end - key < kDecodeKeys ? end - key : kDecodeKeys, n16 = int(round_up(n, 16));
    KeyTiles &here = lists[turn], &then = lists[turn ^ 1];
    KeyTiles::Tile* tiles = here.tiles;
    const int num_tiles = here.count;
    for (int i = 0; i < num_tiles; i += 2) {  // two at once: one sum must wait for itself
      const KeyTiles::Tile &one = tiles[i], &two = tiles[i + 1 < num_tiles ? i + 1 : i];
      const char* next[2];
      for (int j = 0; j < 2; j++) {
        const int at = i + 2 + j;
        next[j] = reinterpret_cast<const char*>(at < num_tiles ? tiles[at].keys : tiles[0].keys + to_values);
      }
      here.begin(i + ahead, dim, 0);
      here.begin(i + ahead + 1, dim, 0);
      here.begin(i + ahead - num_tiles, dim, to_values);
      here.begin(i + ahead + 1 - num_tiles, dim, to_values);
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
        here.fetch(i, dim, to_values, t, k_tiles);
        _tile_loadd(5, two.keys + t * 32, dim * 2);
        _tile_loadd(7, query_two + t * tile_bytes, 4 * step);
        _tile_dpbf16ps(1, 5, 7);
        here.fetch(i + 1, dim, to_values, t, k_tiles);
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
    then.count = 0;
    if (key + kDecodeKeys < end) {
      then.list(layer, seq, h_begin, h_end, key + kDecodeKeys, end);
    } else if (next) {
      const SequencePart& other = parts[next->seq];
      then.list(layer, other, next->h_begin, next->h_end, layer.first_seen(other.end()) / 16 * 16, other.end());
    }
    for (int i = 0; i < num_tiles; i++) {
      const KeyTiles::Tile& tile = tiles[i];
      here.begin(i + ahead, dim, to_values);
      then.begin(i + ahead - num_tiles, dim, 0);
      then.fetch(i, dim, 0, 0, 1);
      const int q = tile.head * columns, here = n - tile.at < 16 ? n - tile.at : 16;
      // Of the two tiles after this pair the first halves, then the second ones.
      const auto rows_of = [&](int t) {
        return reinterpret_cast<const char*>(tiles[t < num_tiles ? t : i].keys + to_values) + i % 2 * 16 * dim;
      };
      const Rows next_rows = {rows_of(i - i % 2 + 2), rows_of(i - i % 2 + 3)};
      add_group(columns, tile.keys + to_values, dim, here, probs + q * kDecodeKeys + tile.at, kDecodeKeys,
                out + q * dim, next_rows);
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
                   const AttentionItem* next, AttentionScratch& s) {
  const SequencePart& seq = parts[item.seq];
#if defined(__AMX_TILE__) && defined(__AVX512BF16__)
  if constexpr (sizeof(T) == 2) {
    if (seq.num_new > 1) {
      configure_all_tiles(16);
      return TileAttention(layer, seq, item.h_begin, item.c_begin, item.c_end, s).run();
    }
    for (int g = item.c_begin; g < item.c_end; g += 16) {
      // What comes after this sequence's keys: the same ones for more queries, or another decode's.
      const AttentionItem* after = g + 16 < item.c_end || !next || parts[next->seq].num_new > 1 ? nullptr : next;
      attend_token(layer, seq, item.h_begin, item.h_end, g, item.c_end - g < 16 ? item.c_end - g : 16, after, parts, s);
    }
    return;
  }
#endif
  for (int h = item.h_begin; h < item.h_end; h++) attend_plain(layer, seq, h, item.c_begin, item.c_end, s);
}

}  // namespace baton
