// The C interface that engine/kernels/library.py loads. Pointers are borrowed for the call, except by `*_create`.
#include <algorithm>
#include <cmath>

#include "attention.h"
#include "comm.h"
#include "decoder.h"
#include "linear.h"
#include "ops.h"
#include "pool.h"

using namespace baton;

namespace {

struct Model {
  std::unique_ptr<DecoderBase> decoder;
};

template <class T>
void pack(char* out, const T* weight, int64_t num_rows, int64_t k, int64_t row_stride, const int32_t* order) {
  const int64_t k_tiles = k_tiles_of<T>(k);
  for (int64_t i = 0; i < num_rows;) {
    bool together = order[i] % 16 == 0 && i + 16 <= num_rows;
    for (int j = 1; together && j < 16; j++) together = order[i + j] == order[i] + j;
    if (together) {
      pack_16_rows(out, weight + i * row_stride, row_stride, order[i], k, k_tiles);
    } else {
      pack_row(out, weight + i * row_stride, order[i], k, k_tiles);
    }
    i += together ? 16 : 1;
  }
}

// [num_rows][k] row-major -> A tiles
template <class T>
void tile_rows(const ATiles& out, const T* x, int num_rows, int64_t k) {
  for (int m = 0; m < num_rows; m++) {
    for (int64_t i = 0; i < k; i++) *out.at<T>(m, int(i)) = x[m * k + i];
  }
}

// y[m][padded outputs] float = x W^T + bias, by the pool; x row-major of type T.
template <class T>
struct LinearCall {
  Pool& pool;
  const T* x;
  int num_rows;
  const LinearDesc& w;
  float* y;
  Buffer tiles, quantised, row_scales;

  void prepare() {
    const int k_tiles = k_tiles_of<T>(w.num_inputs);
    tiles.reserve(ATiles::bytes(num_rows, k_tiles));
    tile_rows(ATiles::view(tiles.as(), num_rows, k_tiles), x, num_rows, w.num_inputs);
    if (w.is_int8) {
      quantised.reserve(ATiles::bytes(num_rows, k_tiles_of<int8_t>(w.num_inputs)));
      row_scales.reserve(size_t(num_rows) * 4);
      for (int m = 0; m < num_rows; m++) {
        row_scales.as<float>()[m] =
            quantise_row<T>(ATiles::view(tiles.as(), num_rows, k_tiles), m, w.num_inputs,
                            ATiles::view(quantised.as(), num_rows, k_tiles_of<int8_t>(w.num_inputs)));
      }
    }
  }
  void run() {
    pool.run([](void* self, int thread) { static_cast<LinearCall*>(self)->part(thread); }, this);
  }
  void part(int thread) {
    const Range panels = part_of(ceil_div(w.num_outputs, kPanel), thread, pool.size());
    const int64_t stride = round_up(w.num_outputs, kPanel);
    if (w.is_int8) {
      linear<int8_t>(ATiles::view(quantised.as(), num_rows, k_tiles_of<int8_t>(w.num_inputs)), num_rows, w.packed,
                     panels, StoreRows<int8_t, float>{y, stride, {row_scales.as<float>(), w.scales, w.bias}});
    } else {
      linear<T>(ATiles::view(tiles.as(), num_rows, k_tiles_of<T>(w.num_inputs)), num_rows, w.packed, panels,
                StoreRows<T, float>{y, stride, {nullptr, nullptr, w.bias}});
    }
    release_tiles();
  }
};

template <class T>
void attend_all(const AttentionLayer<T>& layer, const StepDesc& step) {
  Buffer memory;
  memory.reserve(sizeof(AttentionScratch));
  auto& scratch = *memory.as<AttentionScratch>();
  std::vector<SequencePart> parts;
  for (int s = 0, row = 0; s < step.num_seqs; row += step.num_new[s++]) {
    parts.push_back({row, step.num_new[s], step.starts[s], step.tables + step.table_begin[s]});
  }
  std::vector<AttentionItem> items;
  plan_attention(layer, parts, 1, items);
  for (const auto& item : items) attend(layer, parts, item, nullptr, scratch);
  release_tiles();
}

template <class T>
void attend_rows(const T* pool, const T* q, T* out, int num_heads, int num_kv_heads, int dim, int block_size,
                 int window, float scale, const StepDesc& step) {
  const int n = step.num_tokens, width = num_heads * dim, k_tiles = k_tiles_of<T>(width);
  Buffer tiles;
  tiles.reserve(ATiles::bytes(n, k_tiles));
  const ATiles a = ATiles::view(tiles.as(), n, k_tiles);
  attend_all(AttentionLayer<T>{pool, q, a, width, num_heads, num_kv_heads, dim, block_size, window, scale}, step);
  for (int m = 0; m < n; m++) {
    for (int i = 0; i < width; i++) out[m * width + i] = *a.at<T>(m, i);
  }
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

int32_t baton_abi() { return 1; }

// Ask the kernel for the AMX state (arch_prctl(2), ARCH_REQ_XCOMP_PERM, feature 18). 0: granted, or not needed.
int32_t baton_enable() {
#if defined(__AMX_TILE__)
  return int32_t(syscall(SYS_arch_prctl, 0x1023, 18));
#else
  return 0;
#endif
}

void* baton_map(uint64_t bytes) { return map_huge(bytes); }
void baton_unmap(void* memory, uint64_t bytes) { munmap(memory, bytes); }

void* baton_pool_create(int32_t num_threads, const int32_t* cores) { return new Pool(num_threads, cores); }
void baton_pool_destroy(void* pool) { delete static_cast<Pool*>(pool); }

// itemsize 1, 2 or 4.
uint64_t baton_packed_bytes(int32_t itemsize, int64_t num_outputs, int64_t k) {
  const int64_t k_tiles = itemsize == 1 ? k_tiles_of<int8_t>(k) : itemsize == 2 ? k_tiles_of<bf16>(k) : k_tiles_of<float>(k);
  return packed_bytes(num_outputs, k_tiles);
}

// Rows of `weight` [num_rows][row_stride] go to the packed outputs order[i]. `out` is zeroed memory.
void baton_pack(int32_t itemsize, void* out, const void* weight, int64_t num_rows, int64_t k, int64_t row_stride,
                const int32_t* order) {
  char* to = static_cast<char*>(out);
  if (itemsize == 1) pack(to, static_cast<const int8_t*>(weight), num_rows, k, row_stride, order);
  if (itemsize == 2) pack(to, static_cast<const bf16*>(weight), num_rows, k, row_stride, order);
  if (itemsize == 4) pack(to, static_cast<const float*>(weight), num_rows, k, row_stride, order);
}

// y [num_rows][num_outputs padded to 32] float. Returns the seconds of the quickest of `repeats` runs.
double baton_linear(void* pool, int32_t is_bf16, const void* x, int32_t num_rows, const LinearDesc* w, float* y,
                    int32_t repeats) {
  double best_s = 1e9;
  // A single thread is measured by its own time: other processes on its core do not count.
  const clockid_t clock = static_cast<Pool*>(pool)->size() == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC;
  auto call = [&](auto typed) {
    typed.prepare();
    for (int i = 0; i < std::max(1, repeats); i++) {
      timespec a, b;
      clock_gettime(clock, &a);
      typed.run();
      clock_gettime(clock, &b);
      best_s = std::min(best_s, double(b.tv_sec - a.tv_sec) + 1e-9 * double(b.tv_nsec - a.tv_nsec));
    }
  };
  Pool& p = *static_cast<Pool*>(pool);
  if (is_bf16) {
    call(LinearCall<bf16>{p, static_cast<const bf16*>(x), num_rows, *w, y, {}, {}, {}});
  } else {
    call(LinearCall<float>{p, static_cast<const float*>(x), num_rows, *w, y, {}, {}, {}});
  }
  return best_s;
}

void baton_attention(int32_t is_bf16, const void* pool, const void* q, void* out, int32_t num_heads,
                     int32_t num_kv_heads, int32_t dim, int32_t block_size, int32_t window, float scale,
                     const StepDesc* step) {
  if (is_bf16) {
    attend_rows((const bf16*)pool, (const bf16*)q, (bf16*)out, num_heads, num_kv_heads, dim, block_size, window, scale, *step);
  } else {
    attend_rows((const float*)pool, (const float*)q, (float*)out, num_heads, num_kv_heads, dim, block_size, window, scale, *step);
  }
}

void* baton_model_create(const ModelDesc* model, void* pool) {
  Pool& p = *static_cast<Pool*>(pool);
  if (model->is_bf16) return static_cast<DecoderBase*>(new Decoder<bf16>(*model, p));
  return static_cast<DecoderBase*>(new Decoder<float>(*model, p));
}
void baton_model_destroy(void* model) { delete static_cast<DecoderBase*>(model); }

int32_t baton_model_run(void* model, const StepDesc* step, int32_t first_segment, int32_t end_segment) {
  return static_cast<DecoderBase*>(model)->run(*step, first_segment, end_segment);
}

// Seconds per phase since the last call, into out[9]; from then on phases are timed if `on`.
void baton_model_phases(void* model, int32_t on, double* out) {
  auto& decoder = *static_cast<DecoderBase*>(model);
  std::copy(decoder.phase_s, decoder.phase_s + kNumPhases, out);
  std::fill(decoder.phase_s, decoder.phase_s + kNumPhases, 0.0);
  decoder.is_timed = on != 0;
}

int32_t baton_all_reduce(SharedGroup* group, void* data, int64_t count, int32_t is_bf16) {
  AllReduce reduce(group);
  return (is_bf16 ? reduce.sum(static_cast<bf16*>(data), count) : reduce.sum(static_cast<float*>(data), count)) ? 0 : -2;
}

// ---- Ceilings, measured beside the kernels ----
// Seconds to read `bytes` once, as fast as this core can.
double baton_read_s(const void* memory, uint64_t bytes) {
  timespec a, b;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &a);
  i32x16 total[4] = {};
  const char* p = static_cast<const char*>(memory);
  for (uint64_t i = 0; i < bytes; i += 256) {
    for (int j = 0; j < 4; j++) prefetch_l1(p + i + 1024 + j * 64);
    for (int j = 0; j < 4; j++) total[j] += load_as<i32x16>(p + i + j * 64);
  }
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &b);
  const i32x16 all = total[0] + total[1] + total[2] + total[3];
  volatile int32_t sink = all[0];
  (void)sink;
  return double(b.tv_sec - a.tv_sec) + 1e-9 * double(b.tv_nsec - a.tv_nsec);
}

// Operations per second of tile products whose operands are in L1 (itemsize 2: bf16, 1: int8). 0: no AMX.
double baton_tile_peak(int32_t itemsize) {
#if defined(__AMX_TILE__)
  alignas(64) static char data[4 * kTileBytes];
  configure_tiles(kTileRows);
  constexpr int n = 20000;
  timespec a, b;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &a);
  for (int i = 0; i < n; i++) {
    _tile_loadd(4, data, 64);
    _tile_loadd(5, data + kTileBytes, 64);
    _tile_loadd(6, data + 2 * kTileBytes, 64);
    _tile_loadd(7, data + 3 * kTileBytes, 64);
    if (itemsize == 2) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    } else {
      _tile_dpbssd(0, 4, 6);
      _tile_dpbssd(1, 4, 7);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
  }
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &b);
  release_tiles();
  const double s = double(b.tv_sec - a.tv_sec) + 1e-9 * double(b.tv_nsec - a.tv_nsec);
  return 4.0 * n * 2 * 16 * 16 * (64 / itemsize) / s;
#else
  (void)itemsize;
  return 0;
#endif
}
}
