// One step of a decoder on all threads of a pool: every operation between token ids and logits.
//
// A step is cut into segments at the points where a layer's KV has just been written, so that Python can pass finished
// layers on: segment s is the rest of layer s - 1 (attention, output, MLP) and the start of layer s (norm, QKV, rotary,
// KV write); the last one ends with the head. The structs below are mirrored in engine/kernels/library.py.
#pragma once
#include <sys/mman.h>

#include <memory>
#include <vector>

#include "attention.h"
#include "base.h"
#include "comm.h"
#include "linear.h"
#include "ops.h"
#include "pool.h"

namespace baton {

struct LinearDesc {
  const char* packed;   // see linear.h
  const float* scales;  // int8: [outputs padded]; else null
  const float* bias;    // [outputs padded], or null
  int32_t num_outputs;  // in packed order, pads between parts included
  int32_t num_inputs;
  int32_t is_int8;
  int32_t reserved;
};

struct LayerDesc {
  LinearDesc qkv, output, gate_up, down;
  const float *input_norm, *post_norm;  // [hidden padded to 32]
  const float *q_norm, *k_norm;         // [head_dim], or null
  char* pool;                           // the layer's first block
  int64_t window;
};

struct ModelDesc {
  int32_t is_bf16, num_layers, hidden_size, num_heads, num_kv_heads, head_dim, block_size;
  int32_t num_head_outputs;  // of the head's outputs, those that are tokens
  float eps, scale;
  const char* embedding;  // [vocab][hidden]
  const float* final_norm;
  LinearDesc head;
  const LayerDesc* layers;
  SharedGroup* group;  // null: a single rank
};

struct StepDesc {
  int32_t num_tokens, num_seqs, num_rows;
  int32_t num_blocks_in_tables;
  const int32_t* token_ids;    // [num_tokens]
  const int32_t* starts;       // [num_seqs]
  const int32_t* num_new;      // [num_seqs]
  const int32_t* tables;       // block ids of all sequences, one after the other
  const int32_t* table_begin;  // [num_seqs]
  const int32_t* rows;         // [num_rows] tokens whose logits are wanted
  const float* cos_sin;        // [max position][head_dim]: cosines, then sines
  float* logits;               // [num_rows][head outputs padded to 32]; null: only the best
  int32_t* best_index;         // [num_rows]
  float* best_value;           // [num_rows]; NaN if any logit is
};

// Memory for a kernel's operands: huge pages, because one walk of the page tables per 4 KiB costs a third of the speed.
inline void* map_huge(size_t bytes) {
  constexpr size_t huge = size_t(2) << 20;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  if (bytes >= huge) madvise(memory, bytes, MADV_HUGEPAGE);
  return memory;
}

// A zeroed buffer that only grows.
class Buffer {
 public:
  ~Buffer() { release(); }
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  bool reserve(size_t bytes) {
    if (bytes <= size_) return true;
    release();
    bytes = size_t(round_up(int64_t(bytes), bytes > (128 << 10) ? 2 << 20 : 4096));  // the kernel aligns such sizes
    data_ = static_cast<char*>(map_huge(bytes));
    size_ = data_ ? bytes : 0;
    return data_ != nullptr;
  }
  template <class T = char>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  void release() {
    if (data_) munmap(data_, size_);
    data_ = nullptr, size_ = 0;
  }
  char* data_ = nullptr;
  size_t size_ = 0;
};

template <class T>
inline int k_tiles_of(int64_t columns) {
  return int(ceil_div(sizeof(T) == 1 ? columns : round_up(columns, kPanel), kTileK<T>));
}

// Up to this many times phases are timed: norm, qkv, rotary + KV write, attention, output, norm, gate/up, down, sum, head
enum Phase { kNorm, kQkv, kRotary, kAttention, kOutput, kGateUp, kDown, kSum, kHead, kNumPhases };

struct DecoderBase {
  virtual ~DecoderBase() = default;
  // 0: done. -1: out of memory. -2: a rank is lost.
  virtual int run(const StepDesc& step, int first_segment, int end_segment) = 0;
  double phase_s[kNumPhases] = {};
  bool is_timed = false;
};

template <class T>
class Decoder final : public DecoderBase {
 public:
  Decoder(const ModelDesc& model, Pool& pool)
      : m_(model), layers_(model.layers, model.layers + model.num_layers), pool_(pool), next_item_(model.num_layers) {
    hidden_stride_ = row_stride(m_.hidden_size);
    qkv_stride_ = row_stride(int64_t(m_.num_heads + 2 * m_.num_kv_heads) * m_.head_dim);
    for (int i = 0; i < pool.size(); i++) scratch_.push_back(std::make_unique<Buffer>());
  }

  int run(const StepDesc& step, int first_segment, int end_segment) override {
    if (first_segment == 0 && !begin(step)) return -1;
    step_ = &step;
    first_ = first_segment, end_ = end_segment;
    is_lost_.store(false, std::memory_order_relaxed);
    pool_.run([](void* self, int thread) { static_cast<Decoder*>(self)->run_thread(thread); }, this);
    return is_lost_.load(std::memory_order_relaxed) ? -2 : 0;
  }

 private:
  static double now_s() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
  }

  // What all threads share in a step. Only the caller's thread.
  bool begin(const StepDesc& step) {
    const int64_t n = step.num_tokens;
    const int64_t inner = layers_[0].down.num_inputs, attended = int64_t(m_.num_heads) * m_.head_dim;
    const int64_t widest = std::max({int64_t(m_.hidden_size), inner, attended});
    bool ok = hidden_.reserve(n * hidden_stride_ * sizeof(T)) && qkv_.reserve(n * qkv_stride_ * sizeof(T)) &&
              partial_.reserve(m_.group || is_few_rows(n) ? n * hidden_stride_ * sizeof(T) : 1) &&
              normed_.reserve(ATiles::bytes(n, k_tiles_of<T>(m_.hidden_size))) &&
              attended_.reserve(ATiles::bytes(n, k_tiles_of<T>(attended))) &&
              inner_.reserve(ATiles::bytes(n, k_tiles_of<T>(inner))) &&
              quantised_.reserve(ATiles::bytes(n, k_tiles_of<int8_t>(widest))) && row_scales_.reserve(n * 4) &&
              best_.reserve(size_t(step.num_rows) * pool_.size() * sizeof(Best));
    for (auto& s : scratch_) ok = ok && s->reserve(sizeof(AttentionScratch));
    if (!ok) return false;

    // Pads of K must be finite; buffers hold rows of other shapes from other steps.
    clear_pads(tiles(normed_, n, m_.hidden_size), n, m_.hidden_size);
    clear_pads(tiles(attended_, n, attended), n, attended);
    clear_pads(tiles(inner_, n, inner), n, inner);

    parts_.clear();
    positions_.resize(n);
    int row = 0;
    for (int s = 0; s < step.num_seqs; s++) {
      const SequencePart part{row, step.num_new[s], step.starts[s], step.tables + step.table_begin[s]};
      for (int i = 0; i < part.num_new; i++) positions_[row + i] = {part.start + i, s};
      parts_.push_back(part);
      row += part.num_new;
    }
    plan_attention(attention_of(layers_[0], int(n)), parts_, pool_.size(), items_);
    for (auto& next : next_item_) next.store(0, std::memory_order_relaxed);
    return true;
  }

  // Elements from one row to the next: an odd number of panels, so that the same columns of neighbouring rows do not
  // fall into the same few sets of the cache.
  static int64_t row_stride(int64_t columns) { return (ceil_div(columns, kPanel) | 1) * kPanel; }

  ATiles tiles(const Buffer& buffer, int64_t num_rows, int64_t columns) const {
    return ATiles::view(buffer.as(), int(num_rows), k_tiles_of<T>(columns));
  }

  static void clear_pads(const ATiles& a, int64_t num_rows, int64_t columns) {
    if (columns % kTileK<T> == 0) return;
    for (int m = 0; m < num_rows; m++) std::memset(a.row(m, a.num_k_tiles - 1), 0, kTileRowBytes);
  }

  // ---- On every thread ----
  void run_thread(int thread) {
    double began_s = is_timed ? now_s() : 0;
    auto timed = [&](Phase phase) {  // includes the wait for the slowest thread
      if (!is_timed || thread) return;
      const double now = now_s();
      phase_s[phase] += now - began_s;
      began_s = now;
    };
    const int n = step_->num_tokens;
    if (first_ == 0) {
      embed(thread);
      pool_.barrier();
    }
    for (int segment = first_; segment < end_; segment++) {
      if (segment > 0) {
        const LayerDesc& layer = layers_[segment - 1];
        attend_items(layer, segment - 1, thread);
        pool_.barrier();
        timed(kAttention);
        if (!add_linear(layer.output, tiles(attended_, n, int64_t(m_.num_heads) * m_.head_dim), n, thread)) break;
        timed(kOutput);
        norm(layer.post_norm, n, nullptr, thread);
        timed(kNorm);
        apply(layer.gate_up, tiles(normed_, n, m_.hidden_size), n, thread, [&](auto type, const Scales& scales) {
          return SiluMul<decltype(type), T>{tiles(inner_, n, layer.down.num_inputs), scales};
        });
        timed(kGateUp);
        if (!add_linear(layer.down, tiles(inner_, n, layer.down.num_inputs), n, thread)) break;
        timed(kDown);
      }
      if (segment < m_.num_layers) {
        const LayerDesc& layer = layers_[segment];
        norm(layer.input_norm, n, nullptr, thread);
        timed(kNorm);
        apply(layer.qkv, tiles(normed_, n, m_.hidden_size), n, thread, [&](auto type, const Scales& scales) {
          const bool past_cache = is_few_rows(n) || n * qkv_stride_ * int64_t(sizeof(T)) > kPastCacheBytes;
          return StoreRows<decltype(type), T>{qkv_.as<T>(), qkv_stride_, scales, past_cache};
        });
        timed(kQkv);
        write_kv(layer, thread);
        pool_.barrier();
        timed(kRotary);
      } else if (step_->num_rows) {
        head(thread);
        timed(kHead);
      }
    }
    release_tiles();
  }

  void embed(int thread) {
    const Range rows = part_of(step_->num_tokens, thread, pool_.size());
    const size_t bytes = size_t(m_.hidden_size) * sizeof(T), stride = size_t(hidden_stride_) * sizeof(T);
    for (int m = rows.begin; m < rows.end; m++) {
      char* out = hidden_.as() + m * stride;
      std::memcpy(out, m_.embedding + step_->token_ids[m] * bytes, bytes);
      std::memset(out + bytes, 0, stride - bytes);
    }
  }

  // normed[m] = norm of hidden[rows ? rows[m] : m]; ends with a barrier.
  void norm(const float* weight, int num_rows, const int32_t* rows, int thread) {
    const ATiles out = tiles(normed_, num_rows, m_.hidden_size);
    const Range part = part_of(num_rows, thread, pool_.size());
    for (int m = part.begin; m < part.end; m++) {
      const T* x = hidden_.as<T>() + (rows ? rows[m] : m) * hidden_stride_;
      rms_norm_row(x, weight, m_.hidden_size, m_.eps, out, m);
    }
    pool_.barrier();
  }

  // One linear over all threads; `finish(type, scales)` makes what is done with each block. Ends with a barrier.
  template <class MakeFinish>
  void apply(const LinearDesc& w, const ATiles& x, int num_rows, int thread, const MakeFinish& finish) {
    const Range panels = part_of(ceil_div(w.num_outputs, kPanel), thread, pool_.size());
    if (w.is_int8) {
      const ATiles q = ATiles::view(quantised_.as(), num_rows, k_tiles_of<int8_t>(w.num_inputs));
      const Range part = part_of(num_rows, thread, pool_.size());
      for (int m = part.begin; m < part.end; m++) {
        row_scales_.as<float>()[m] = quantise_row<T>(x, m, w.num_inputs, q);
      }
      pool_.barrier();
      linear<int8_t>(q, num_rows, w.packed, panels, finish(int8_t{}, Scales{row_scales_.as<float>(), w.scales, w.bias}));
    } else {
      linear<T>(x, num_rows, w.packed, panels, finish(T{}, Scales{nullptr, nullptr, w.bias}));
    }
    order_stores();
    pool_.barrier();
  }

  // hidden += x W^T, summed over ranks. Ends with a barrier; false: a rank is lost.
  bool add_linear(const LinearDesc& w, const ATiles& x, int num_rows, int thread) {
    if (!m_.group && !is_few_rows(num_rows)) {
      apply(w, x, num_rows, thread, [&](auto type, const Scales& scales) {
        return AddRows<decltype(type), T>{hidden_.as<T>(), hidden_stride_, scales};
      });
      return true;
    }
    apply(w, x, num_rows, thread, [&](auto type, const Scales& scales) {
      return StoreRows<decltype(type), T>{partial_.as<T>(), kPanel, scales, false, num_rows * kPanel};
    });
    const int num_panels = int(ceil_div(m_.hidden_size, kPanel));
    if (m_.group) {
      if (thread == 0 && !AllReduce(m_.group).sum(partial_.as<T>(), int64_t(num_rows) * num_panels * kPanel)) {
        is_lost_.store(true, std::memory_order_relaxed);
      }
      pool_.barrier();
      if (is_lost_.load(std::memory_order_relaxed)) return false;
    }
    const Range panels = part_of(num_panels, thread, pool_.size());
    const T* y = partial_.as<T>() + int64_t(panels.begin) * num_rows * kPanel;
    for (int panel = panels.begin; panel < panels.end; panel++) {
      T* row = hidden_.as<T>() + panel * kPanel;
      for (int m = 0; m < num_rows; m++, row += hidden_stride_, y += kPanel) {
        store16(row, load16(row) + load16(y));
        store16(row + 16, load16(row + 16) + load16(y + 16));
      }
    }
    pool_.barrier();
    return true;
  }

  // Normalise and rotate queries in place and keys into the pool; copy values there.
  void write_kv(const LayerDesc& layer, int thread) {
    const int dim = m_.head_dim, kv_heads = m_.num_kv_heads;
    const Range part = part_of(step_->num_tokens, thread, pool_.size());
    for (int m = part.begin; m < part.end; m++) {
      const auto [position, seq] = positions_[m];
      const float* cos_sin = step_->cos_sin + int64_t(position) * dim;
      T* q = qkv_.as<T>() + m * qkv_stride_;
      rotate_heads(q, m_.num_heads, layer.q_norm, m_.eps, cos_sin, dim, q, dim);
      const T *k = q + m_.num_heads * dim, *v = k + kv_heads * dim;
      const int64_t half = int64_t(kv_heads) * m_.block_size * dim;  // elements of K, and of V, of one block
      T* out = reinterpret_cast<T*>(layer.pool) + parts_[seq].blocks[position / m_.block_size] * 2 * half +
               position % m_.block_size * dim;
      rotate_heads(k, kv_heads, layer.k_norm, m_.eps, cos_sin, dim, out, m_.block_size * dim);
      for (int h = 0; h < kv_heads; h++) std::memcpy(out + half + h * m_.block_size * dim, v + h * dim, dim * sizeof(T));
    }
  }

  AttentionLayer<T> attention_of(const LayerDesc& layer, int num_tokens) const {
    return {reinterpret_cast<const T*>(layer.pool), qkv_.as<T>(),
            tiles(attended_, num_tokens, int64_t(m_.num_heads) * m_.head_dim), qkv_stride_, m_.num_heads,
            m_.num_kv_heads, m_.head_dim, m_.block_size, int(layer.window), m_.scale};
  }

  void attend_items(const LayerDesc& layer, int index, int thread) {
    const AttentionLayer<T> attention = attention_of(layer, step_->num_tokens);
    auto& scratch = *scratch_[thread]->template as<AttentionScratch>();
    const int count = int(items_.size());
    for (int i; (i = next_item_[index].fetch_add(1, std::memory_order_relaxed)) < count;) {
      const int next = i + pool_.size();  // the thread's next item, more or less
      attend(attention, parts_, items_[i], next < count ? &items_[next] : nullptr, scratch);
    }
  }

  void head(int thread) {
    const int n = step_->num_rows;
    norm(m_.final_norm, n, step_->rows, thread);
    const ATiles x = tiles(normed_, n, m_.hidden_size);
    if (step_->logits) {
      apply(m_.head, x, n, thread, [&](auto type, const Scales& scales) {
        return StoreLogits<decltype(type), T>{step_->logits, round_up(m_.head.num_outputs, kPanel), scales};
      });
      return;
    }
    Best* best = best_.as<Best>() + size_t(thread) * n;
    for (int m = 0; m < n; m++) best[m] = {splat(-INFINITY), i32x16{}, i32x16{}};
    apply(m_.head, x, n, thread, [&](auto type, const Scales& scales) {
      return ArgMax<decltype(type), T>{best, m_.num_head_outputs, scales};
    });
    if (thread == 0) choose(n);
  }

  // The best of all lanes and threads; of equals the first, as torch.argmax.
  void choose(int num_rows) {
    for (int m = 0; m < num_rows; m++) {
      float value = -INFINITY;
      int index = 0;
      bool is_nan = false;
      for (int t = 0; t < pool_.size(); t++) {
        const Best& best = best_.as<Best>()[size_t(t) * num_rows + m];
        for (int lane = 0; lane < 16; lane++) {
          const float v = best.value[lane];
          const int i = best.index[lane];
          is_nan |= best.is_nan[lane] != 0;
          if (v > value || (v == value && i < index)) value = v, index = i;
        }
      }
      step_->best_index[m] = index;
      step_->best_value[m] = is_nan ? NAN : value;
    }
  }

  const ModelDesc m_;
  const std::vector<LayerDesc> layers_;
  Pool& pool_;
  int64_t hidden_stride_, qkv_stride_;  // elements

  Buffer hidden_;     // [num_tokens][hidden padded] the residual stream
  Buffer qkv_;        // [num_tokens][q heads, k heads, v heads]
  Buffer partial_;    // [panel of 32][num_tokens][32] this rank's part of a sum over ranks
  Buffer normed_, attended_, inner_;  // A tiles: inputs of QKV and gate/up and head, of output, of down
  Buffer quantised_, row_scales_;     // A tiles of int8, and their scales
  Buffer best_;                       // [thread][num_rows] Best
  std::vector<std::unique_ptr<Buffer>> scratch_;

  struct Position {
    int32_t position, seq;
  };
  std::vector<SequencePart> parts_;
  std::vector<Position> positions_;  // per token
  std::vector<AttentionItem> items_;  // of attention, the same in all layers
  std::vector<std::atomic<int>> next_item_;

  const StepDesc* step_ = nullptr;
  int first_ = 0, end_ = 0;
  std::atomic<bool> is_lost_{false};
};

}  // namespace baton
