// Scattered bytes on a device: copy them, digest them. What the digest is: kvtransfer/cuda/driver.py.
//
// A table lists pieces of (destination, source, first unit) in order; a piece ends where the next one begins, the last
// at `num_units`. A unit is 16 bytes. Each block of threads takes one tile of units, whatever pieces they lie in.
// Addresses are not checked here: the host makes them from its own plan and the sizes of both allocations.

#ifndef THREADS
#define THREADS 256
#endif
#ifndef TILE_UNITS
#define TILE_UNITS 1024
#endif

typedef unsigned long long u64;

struct Piece {
    u64 to;
    u64 from;
    u64 first_unit;
};

// The last piece that begins at or before a unit.
__device__ inline unsigned piece_of(const Piece* pieces, unsigned num_pieces, u64 unit) {
    unsigned low = 0, high = num_pieces;
    while (high - low > 1) {
        const unsigned middle = low + (high - low) / 2;
        if (pieces[middle].first_unit <= unit) low = middle;
        else high = middle;
    }
    return low;
}

__device__ inline u64 mixed(u64 x) {
    x = (x ^ x >> 32) * 0x9FB21C651E98DF25ull;
    return x ^ x >> 29;
}

extern "C" __global__ void baton_copy(const Piece* pieces, unsigned num_pieces, u64 num_units) {
    const u64 begin = (u64)blockIdx.x * TILE_UNITS;
    const u64 end = begin + TILE_UNITS < num_units ? begin + TILE_UNITS : num_units;
    u64 unit = begin + threadIdx.x;
    if (unit >= end) return;
    unsigned at = piece_of(pieces, num_pieces, unit);
    for (; unit < end; unit += THREADS) {
        while (at + 1 < num_pieces && pieces[at + 1].first_unit <= unit) ++at;
        const u64 offset = (unit - pieces[at].first_unit) * 16;
        *(ulonglong2*)(pieces[at].to + offset) = *(const ulonglong2*)(pieces[at].from + offset);
    }
}

// Adds to sums[0] and sums[1], which must be 0 before the launch.
extern "C" __global__ void baton_digest(const Piece* pieces, unsigned num_pieces, u64 num_units, u64* sums) {
    __shared__ u64 parts[2][THREADS];
    const u64 begin = (u64)blockIdx.x * TILE_UNITS;
    const u64 end = begin + TILE_UNITS < num_units ? begin + TILE_UNITS : num_units;
    u64 unit = begin + threadIdx.x;
    u64 sum_a = 0, sum_b = 0;
    if (unit < end) {
        unsigned at = piece_of(pieces, num_pieces, unit);
        for (; unit < end; unit += THREADS) {
            while (at + 1 < num_pieces && pieces[at + 1].first_unit <= unit) ++at;
            const ulonglong2 words = *(const ulonglong2*)(pieces[at].to + (unit - pieces[at].first_unit) * 16);
            const u64 key = (unit + 1) * 0x9E3779B97F4A7C15ull;
            u64 a = words.x ^ key;
            u64 b = words.y + (key << 32 | key >> 32);
            b ^= mixed(a);
            a ^= mixed(b);
            b ^= mixed(a);
            a ^= mixed(b);
            sum_a += a;
            sum_b += b;
        }
    }
    parts[0][threadIdx.x] = sum_a;
    parts[1][threadIdx.x] = sum_b;
    for (unsigned half = THREADS / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
            parts[0][threadIdx.x] += parts[0][threadIdx.x + half];
            parts[1][threadIdx.x] += parts[1][threadIdx.x + half];
        }
    }
    if (threadIdx.x == 0) {
        atomicAdd(&sums[0], parts[0][0]);
        atomicAdd(&sums[1], parts[1][0]);
    }
}
