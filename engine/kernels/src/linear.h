// y = x W^T for x in A tiles and W packed once in B tiles (see base.h): one layout for one row and for thousands.
//
// A block of up to 32 rows x one panel of 32 outputs accumulates over all of K in registers, in the order of K, so a
// row's result does not depend on how many rows there are. With few rows the weights pass once, at the speed of memory
// (prefetched 512 bytes ahead, which is what crosses page boundaries where the hardware prefetcher stops). With more, a
// panel stays in the L2 cache over all blocks of rows, while the next one is fetched a little per block.
#pragma once
#include "base.h"

namespace baton {

// The accumulators of one block: float, or int32 for int8 operands.
template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<int8_t> {
  using type = int32_t;
};

struct alignas(64) Block {
  char bytes[2 * kTileRows * kPanel * 4];  // [32 rows][32 outputs]
};

constexpr int kBlockRows = 32;
constexpr int kStreamAheadBytes = 512;
constexpr int kMaxStreams = 4;
constexpr int64_t kPastCacheBytes = 3 << 19;  // results larger than this do not stay in L2
// A few rows far apart are as many streams to the hardware's prefetchers, which then lose those of the weights: results
// of so many rows go past the cache, or to where they lie together.
constexpr bool is_few_rows(int64_t num_rows) { return num_rows > 1 && num_rows <= 16; }
constexpr int64_t kRowsInCacheBytes = 1200 << 10;  // of activations that stay in a 2 MiB L2 beside two panels

inline size_t packed_bytes(int64_t num_outputs, int64_t num_k_tiles) {
  return size_t(ceil_div(num_outputs, kPanel) * num_k_tiles * 2 * kTileBytes);
}

// Write output row `n` (a position in the packed order) from `src`, k elements. The destination was zeroed.
template <class T>
inline void pack_row(char* dst, const T* src, int64_t n, int64_t k, int64_t num_k_tiles) {
  constexpr int group = 4 / int(sizeof(T));
  char* column = dst + (n / kPanel) * num_k_tiles * 2 * kTileBytes + (n % kPanel) / 16 * kTileBytes + (n % 16) * 4;
  for (int64_t i = 0; i < k; i += group) {
    char* at = column + i / kTileK<T> * 2 * kTileBytes + i % kTileK<T> / group * kTileRowBytes;
    std::memcpy(at, src + i, size_t(k - i < group ? k - i : group) * sizeof(T));
  }
}

// The same for outputs n .. n + 15, n a multiple of 16: a tile is its sixteen rows' 64 bytes, transposed in fours.
template <class T>
inline void pack_16_rows(char* dst, const T* src, int64_t row_stride, int64_t n, int64_t k, int64_t num_k_tiles) {
  char* tile = dst + (n / kPanel) * num_k_tiles * 2 * kTileBytes + (n % kPanel) / 16 * kTileBytes;
  for (int64_t i = 0; i < k; i += kTileK<T>, tile += 2 * kTileBytes) {
    const size_t bytes = size_t(k - i < kTileK<T> ? k - i : kTileK<T>) * sizeof(T);
    uint32_t rows[16][16] = {};
    for (int r = 0; r < 16; r++) std::memcpy(rows[r], src + r * row_stride + i, bytes);
#if defined(__AVX512F__)
    __m512i turned[16];
    for (int r = 0; r < 16; r++) turned[r] = load_as<__m512i>(rows[r]);
    transpose16(turned);
    for (int r = 0; r < 16; r++) store_as(tile + r * kTileRowBytes, turned[r]);
#else
    uint32_t turned[16][16];
    for (int r = 0; r < 16; r++) {
      for (int c = 0; c < 16; c++) turned[c][r] = rows[r][c];
    }
    std::memcpy(tile, turned, kTileBytes);
#endif
  }
}

enum class Prefetch { kStream, kNextPanel };

// What a block fetches into L2 while it computes (kNextPanel): in every K tile, the next `lines` cache lines of each of
// `streams` runs that begin `stride` bytes apart. In one run, requests to memory hold all of the core's sixteen fill
// buffers, and activations from L2 wait behind them. In several, each with a hardware prefetcher some lines ahead, most
// of what is asked for is in L2 already.
struct FetchPlan {
  const char* from;
  int64_t stride;
  int streams, lines;
};

// A block that is computed and not yet finished. No rows: there is none.
struct Late {
  const Block* block;
  int m, rows, panel;
};

// Not inline: in the loop over K tiles, its registers would push the loop's own out into memory. And one copy for all
// rows: the compiler may fuse multiplications and additions in one and not in another.
template <class Finish>
__attribute__((noinline)) void finish_row(const Finish& finish, const Late& late, int row) {
  finish(*late.block, late.m, row, late.panel);
}
template <class Finish>
inline void finish_all(const Finish& finish, const Late& late) {
  for (int row = 0; row < late.rows; row++) finish_row(finish, late, row);
}

#if defined(__AMX_TILE__)
struct __attribute__((packed)) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
// As _tile_loadconfig, whose operand in GCC's header is only the first eight bytes: stores of the others may be dropped.
BATON_INLINE void load_tile_config(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" : : "m"(config)); }

// Tiles 0..3 accumulate and 4, 5 hold activations: `rows` rows. 6 and 7 hold weights: 16 rows.
inline void configure_tiles(int rows) {
  TileConfig config;
  for (int i = 0; i < 8; i++) {
    config.row_bytes[i] = 64;
    config.rows[i] = uint8_t(i < 6 ? rows : kTileRows);
  }
  load_tile_config(config);
}
inline void release_tiles() { _tile_release(); }

template <class T>
constexpr bool kHasTiles = sizeof(T) < 4;

#define BATON_TILE_DOT(T, c, a, b)             \
  do {                                         \
    if constexpr (sizeof(T) == 2) {            \
      _tile_dpbf16ps(c, a, b);                 \
    } else {                                   \
      _tile_dpbssd(c, a, b);                   \
    }                                          \
  } while (0)

// All of K. What is `late` is finished between the tiles, evenly.
template <class T, bool kTwo, Prefetch kFetch, class Finish>
BATON_INLINE void tile_block(const char* a0, const char* a1, int a_step, const char* b, int num_k_tiles, Block& out,
                             FetchPlan fetch, Late late, const Finish& finish) {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kTwo) {
    _tile_zero(2);
    _tile_zero(3);
  }
  int done = 0, credit = 0;
  for (int k = 0; k < num_k_tiles; k++) {
    if constexpr (kFetch == Prefetch::kStream) {
      for (int i = 0; i < 16; i++) prefetch_l1(b + kStreamAheadBytes + i * 64);
    } else if constexpr (kFetch == Prefetch::kNextPanel) {
      const char* from = fetch.from;
      for (int s = 0; s < fetch.streams; s++, from += fetch.stride) {
        for (int i = 0; i < fetch.lines; i++) prefetch_l2(from + i * 64);
      }
      fetch.from += fetch.lines * 64;
    }
    _tile_loadd(4, a0, 64);
    _tile_loadd(6, b, 64);
    BATON_TILE_DOT(T, 0, 4, 6);
    if constexpr (kTwo) {
      _tile_loadd(5, a1, 64);
      BATON_TILE_DOT(T, 2, 5, 6);
    }
    if constexpr (kFetch == Prefetch::kStream) {
      for (int i = 16; i < 32; i++) prefetch_l1(b + kStreamAheadBytes + i * 64);
    }
    _tile_loadd(7, b + kTileBytes, 64);
    BATON_TILE_DOT(T, 1, 4, 7);
    if constexpr (kTwo) BATON_TILE_DOT(T, 3, 5, 7);
    for (credit += late.rows; credit >= num_k_tiles; credit -= num_k_tiles, done++) {
      finish_row(finish, late, done);
    }
    a0 += a_step;
    if constexpr (kTwo) a1 += a_step;
    b += 2 * kTileBytes;
  }
  _tile_stored(0, out.bytes, kPanel * 4);
  _tile_stored(1, out.bytes + 64, kPanel * 4);
  if constexpr (kTwo) {
    _tile_stored(2, out.bytes + kTileRows * kPanel * 4, kPanel * 4);
    _tile_stored(3, out.bytes + kTileRows * kPanel * 4 + 64, kPanel * 4);
  }
}
#else
inline void configure_tiles(int) {}
inline void release_tiles() {}
template <class T>
constexpr bool kHasTiles = false;
#endif

// ---- Without tiles: kRows rows x 32 outputs in vector registers ---------------------------------------------------
BATON_INLINE void dot_row(f32x16& acc, const char* a, const char* b, float) { acc += *(const float*)a * load_as<f32x16>(b); }
BATON_INLINE void dot_row(f32x16& acc, const char* a, const char* b, bf16) {
  uint32_t pair;
  std::memcpy(&pair, a, 4);
#if defined(__AVX512BF16__)
  acc = (f32x16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(int(pair)), (__m512bh)load_as<__m512i>(b));
#else
  const u32x16 w = load_as<u32x16>(b);
  float even, odd;
  const uint32_t low = pair << 16, high = pair & 0xffff0000u;
  std::memcpy(&even, &low, 4);
  std::memcpy(&odd, &high, 4);
  acc += even * (f32x16)(w << 16);
  acc += odd * (f32x16)(w & 0xffff0000u);
#endif
}
BATON_INLINE void dot_row(i32x16& acc, const char* a, const char* b, int8_t) {
  const i32x16 w = load_as<i32x16>(b);  // four int8 in each lane
  int8_t x[4];
  std::memcpy(x, a, 4);
  acc += (w << 24 >> 24) * int32_t(x[0]) + (w << 16 >> 24) * int32_t(x[1]) + (w << 8 >> 24) * int32_t(x[2]) +
         (w >> 24) * int32_t(x[3]);
}

template <class T, int kRows>
inline void vector_rows(const ATiles& a, int m, const char* b, Block& out, int out_row) {
  using V = typename std::conditional<sizeof(T) == 1, i32x16, f32x16>::type;
  V acc[kRows][2] = {};
  for (int kt = 0; kt < a.num_k_tiles; kt++, b += 2 * kTileBytes) {
    const char* rows[kRows];
    for (int i = 0; i < kRows; i++) rows[i] = a.row(m + i, kt);
    for (int r = 0; r < kTileRows; r++) {
      if (r % 4 == 0) {
        for (int i = 0; i < 8; i++) prefetch_l1(b + kStreamAheadBytes + (r * 2 + i) * 64);
      }
      for (int i = 0; i < kRows; i++) {
        dot_row(acc[i][0], rows[i] + r * 4, b + r * 64, T{});
        dot_row(acc[i][1], rows[i] + r * 4, b + kTileBytes + r * 64, T{});
      }
    }
  }
  for (int i = 0; i < kRows; i++) {
    store_as(out.bytes + (out_row + i) * kPanel * 4, acc[i][0]);
    store_as(out.bytes + (out_row + i) * kPanel * 4 + 64, acc[i][1]);
  }
}

// One block, and all of what is `late`.
template <class T, class Finish>
BATON_INLINE void compute_block(const ATiles& a, int m, int rows, const char* panel, Block& out, Prefetch mode,
                                FetchPlan fetch, Late late, const Finish& finish) {
#if defined(__AMX_TILE__)
  if constexpr (kHasTiles<T>) {
    const int a_step = a.rows_per_tile * kTileRowBytes, n = a.num_k_tiles;
    const char* a0 = a.tile(m / kTileRows, 0);
    const char* a1 = rows > kTileRows ? a.tile(m / kTileRows + 1, 0) : nullptr;
    if (mode == Prefetch::kStream) {  // at most sixteen rows
      tile_block<T, false, Prefetch::kStream>(a0, a1, a_step, panel, n, out, fetch, late, finish);
    } else if (a1) {
      tile_block<T, true, Prefetch::kNextPanel>(a0, a1, a_step, panel, n, out, fetch, late, finish);
    } else {
      tile_block<T, false, Prefetch::kNextPanel>(a0, a1, a_step, panel, n, out, fetch, late, finish);
    }
    return;
  }
#endif
  finish_all(finish, late);
  int i = 0;
  for (; i + 6 <= rows; i += 6) vector_rows<T, 6>(a, m + i, panel, out, i);
  for (; i + 2 <= rows; i += 2) vector_rows<T, 2>(a, m + i, panel, out, i);
  for (; i < rows; i++) vector_rows<T, 1>(a, m + i, panel, out, i);
  (void)mode, (void)fetch;
}

// Rows [0, num_rows) times panels [panels.begin, panels.end) of `weights`. `finish(block, m, i, panel)` gets the
// accumulators of row m + i, row i of the block. It runs between the tiles of the next block: while it would run alone,
// the tile unit would stand still for a third of the time. Its stores serve another purpose: after half a microsecond
// without any of 64 bytes, the next one (of a tile, too) takes 300 ns.
//
// Loops, outermost first: rows that fit in L2 | panels | blocks of rows.
template <class T, class Finish>
inline void linear(const ATiles& a, int num_rows, const char* weights, Range panels, const Finish& finish) {
  if (num_rows == 0 || panels.begin == panels.end) return;
  if constexpr (kHasTiles<T>) configure_tiles(a.rows_per_tile);
  Block blocks[2];
  int turn = 0;
  Late late = {};
  const int k_tiles = a.num_k_tiles;
  const size_t panel_bytes = size_t(k_tiles) * 2 * kTileBytes;
  int64_t rows_at_once = kRowsInCacheBytes / (int64_t(k_tiles) * kTileRowBytes) / kBlockRows * kBlockRows;
  if (rows_at_once < 4 * kBlockRows) rows_at_once = 4 * kBlockRows;
  for (int64_t m_begin = 0; m_begin < num_rows; m_begin += rows_at_once) {
    const int m_end = int(m_begin + rows_at_once < num_rows ? m_begin + rows_at_once : num_rows);
    const int num_blocks = int(ceil_div(m_end - m_begin, kBlockRows));
    const Prefetch mode = m_end - m_begin <= kTileRows ? Prefetch::kStream : Prefetch::kNextPanel;
    const int wanted = int(ceil_div(32, num_blocks)), streams = wanted < kMaxStreams ? wanted : kMaxStreams;
    const int lines = int(ceil_div(wanted, streams));
    for (int panel = panels.begin; panel < panels.end; panel++) {
      const char* b = weights + panel * panel_bytes;
      FetchPlan fetch{b + panel_bytes, int64_t(panel_bytes) / streams, streams, lines};
      for (int i = 0; i < num_blocks; i++, fetch.from += k_tiles * lines * 64) {
        const int m = int(m_begin) + i * kBlockRows;
        const int rows = m_end - m < kBlockRows ? m_end - m : kBlockRows;
        compute_block<T>(a, m, rows, b, blocks[turn], mode, fetch, late, finish);
        late = {&blocks[turn], m, rows, panel};
        turn ^= 1;
      }
    }
  }
  finish_all(finish, late);
}

// ---- What happens to a block ---------------------------------------------------------------------------------------
// int8: y = acc * scale of the row * scale of the output. Others: the accumulator itself.
struct Scales {
  const float* row = nullptr;     // [num_rows]
  const float* output = nullptr;  // [outputs, padded to panels]
  const float* bias = nullptr;    // [outputs, padded]; any type; or null
};

template <class T>
BATON_INLINE f32x16 accumulated(const Block& block, int i, int half, int m, int output, const Scales& s) {
  const char* at = block.bytes + i * kPanel * 4 + half * 64;
  f32x16 y;
  if constexpr (sizeof(T) == 1) {
    y = __builtin_convertvector(load_as<i32x16>(at), f32x16) * s.row[m] * load16(s.output + output);
  } else {
    y = load_as<f32x16>(at);
  }
  return s.bias ? y + load16(s.bias + output) : y;
}

// out[m][n] = y; rows start at multiples of 64 bytes, panels one after the other unless `panel_stride` says otherwise.
template <class T, class Out>
struct StoreRows {
  Out* out;
  int64_t stride;  // elements; outputs are padded to panels
  Scales scales;
  bool past_cache = false;
  int64_t panel_stride = kPanel;  // elements
  void operator()(const Block& block, int m, int i, int panel) const {
    const f32x16 low = accumulated<T>(block, i, 0, m + i, panel * kPanel, scales);
    const f32x16 high = accumulated<T>(block, i, 1, m + i, panel * kPanel + 16, scales);
    store32(out + (m + i) * stride + panel * panel_stride, low, high, past_cache);
  }
};

// logits[m][n] = y, rounded as a torch bf16 linear's are, then widened
template <class T, class Rounded>
struct StoreLogits {
  float* out;
  int64_t stride;
  Scales scales;
  void operator()(const Block& block, int m, int i, int panel) const {
    float* row = out + (m + i) * stride + panel * kPanel;
    for (int half = 0; half < 2; half++) {
      const f32x16 y = accumulated<T>(block, i, half, m + i, panel * kPanel + half * 16, scales);
      store16(row + half * 16, rounded<Rounded>(y));
    }
  }
};

// hidden[m][n] += y, rounded before and after as a torch bf16 addition is
template <class T, class Out>
struct AddRows {
  Out* hidden;
  int64_t stride;
  Scales scales;
  void operator()(const Block& block, int m, int i, int panel) const {
    Out* row = hidden + (m + i) * stride + panel * kPanel;
    const f32x16 low = rounded<Out>(accumulated<T>(block, i, 0, m + i, panel * kPanel, scales));
    const f32x16 high = rounded<Out>(accumulated<T>(block, i, 1, m + i, panel * kPanel + 16, scales));
    store32(row, load16(row) + low, load16(row + 16) + high, false);
  }
};

// out[m][panel * 16 ..] = silu(gate) * up, where a panel is 16 gate outputs and their 16 up outputs
template <class T, class Out>
struct SiluMul {
  ATiles out;
  Scales scales;
  void operator()(const Block& block, int m, int i, int panel) const {
    const f32x16 gate = rounded<Out>(accumulated<T>(block, i, 0, m + i, panel * kPanel, scales));
    const f32x16 up = rounded<Out>(accumulated<T>(block, i, 1, m + i, panel * kPanel + 16, scales));
    store16(out.at<Out>(m + i, panel * 16), rounded<Out>(silu(gate)) * up);
  }
};

// The largest logit of each row so far, in 16 lanes of which lane l has seen the outputs l, l + 16, ...
struct alignas(64) Best {
  f32x16 value;
  i32x16 index;
  i32x16 is_nan;
};
template <class T, class Out>
struct ArgMax {
  Best* best;  // [num_rows], of this thread
  int num_outputs;
  Scales scales;
  void operator()(const Block& block, int m, int i, int panel) const {
    const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    Best& b = best[m + i];
    for (int half = 0; half < 2; half++) {
      const i32x16 index = lanes + (panel * kPanel + half * 16);
      const i32x16 is_real = index < num_outputs;
      const f32x16 y = rounded<Out>(accumulated<T>(block, i, half, m + i, panel * kPanel + half * 16, scales));
      const i32x16 better = (y > b.value) & is_real;
      b.is_nan |= (y != y) & is_real;
      b.value = better ? y : b.value;
      b.index = better ? index : b.index;
    }
  }
};

}  // namespace baton
