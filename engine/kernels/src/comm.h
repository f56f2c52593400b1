// Sums over the ranks of one host, on the shared memory of engine.comm.ShmComm and by its protocol:
//
//   [counter of rank 0 | .. | counter of rank n-1, 128 bytes each, padded to 4096][slot 0 of each rank][slot 1 of each]
//
// Piece number m goes through slot m % 2: write the own slot, set the own counter to m + 1, wait until all counters are
// > m, read all slots. All ranks add in the order of ranks, so all get the same bits.
#pragma once
#include <sched.h>
#include <time.h>

#include <atomic>

#include "base.h"
#include "pool.h"

namespace baton {

struct SharedGroup {
  char* memory;
  int32_t rank, size;
  int64_t slot_bytes;
  uint64_t num_pieces;  // collective pieces so far; the same on all ranks between collectives
  // Called now and then while waiting for `rank`; nonzero: it will not come.
  int32_t (*is_lost)(int32_t rank, double waited_s);
};

class AllReduce {
 public:
  explicit AllReduce(SharedGroup* group) : g_(group) {}

  // data[0 .. count) becomes its sum over ranks, added in float and rounded once. False: a rank is lost.
  template <class T>
  bool sum(T* data, int64_t count) {
    const int64_t at_once = g_->slot_bytes / int64_t(sizeof(T));
    for (int64_t i = 0; i < count; i += at_once) {
      if (!sum_piece(data + i, count - i < at_once ? count - i : at_once)) return false;
    }
    return true;
  }

 private:
  static constexpr int kSpins = 100, kYieldsPerCheck = 64;

  std::atomic<uint64_t>& counter(int rank) const {
    return *reinterpret_cast<std::atomic<uint64_t>*>(g_->memory + rank * 128);
  }
  char* slot(uint64_t piece, int rank) const {
    return g_->memory + round_up(g_->size * 128, 4096) + (int64_t(piece % 2) * g_->size + rank) * g_->slot_bytes;
  }

  template <class T>
  bool sum_piece(T* data, int64_t count) {
    const uint64_t piece = g_->num_pieces;
    if (!wait(piece)) return false;
    std::memcpy(slot(piece, g_->rank), data, size_t(count) * sizeof(T));
    g_->num_pieces = piece + 1;
    counter(g_->rank).store(piece + 1, std::memory_order_release);
    if (!wait(piece + 1)) return false;
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
      f32x16 total = load16((const T*)slot(piece, 0) + i);
      for (int r = 1; r < g_->size; r++) total += load16((const T*)slot(piece, r) + i);
      store16(data + i, total);
    }
    if (i < count) {  // the tail, through a padded copy
      T tail[16] = {};
      f32x16 total = {};
      for (int r = 0; r < g_->size; r++) {
        std::memcpy(tail, (const T*)slot(piece, r) + i, size_t(count - i) * sizeof(T));
        total = r ? total + load16(tail) : load16(tail);
      }
      store16(tail, total);
      std::memcpy(data + i, tail, size_t(count - i) * sizeof(T));
    }
    return true;
  }

  bool wait(uint64_t count) const {
    timespec began{};
    for (int rank = 0; rank < g_->size; rank++) {
      for (int tries = 1; counter(rank).load(std::memory_order_acquire) < count; tries++) {
        if (tries <= kSpins) {
          relax();
          continue;
        }
        sched_yield();
        if (tries % kYieldsPerCheck) continue;
        timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        if (!began.tv_sec) began = now;
        const double waited_s = double(now.tv_sec - began.tv_sec) + 1e-9 * double(now.tv_nsec - began.tv_nsec);
        if (g_->is_lost && g_->is_lost(rank, waited_s)) return false;
      }
    }
    return true;
  }

  SharedGroup* g_;
};

}  // namespace baton
