// XXH3-128 without seed, fed piece by piece, for inputs of more than 240 bytes in all.
//
// Written from the algorithm's description: xxHash, doc/xxhash_spec.md, "XXH3 algorithm description for large inputs".
// Little-endian machines only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace xxh3 {

constexpr size_t STRIPE = 64;
constexpr uint32_t STRIPES_PER_BLOCK = 16;
constexpr uint64_t PRIME32_1 = 0x9E3779B1u, PRIME32_2 = 0x85EBCA77u, PRIME32_3 = 0xC2B2AE3Du;
constexpr uint64_t PRIME64_1 = 0x9E3779B185EBCA87u, PRIME64_2 = 0xC2B2AE3D27D4EB4Fu, PRIME64_3 = 0x165667B19E3779F9u;
constexpr uint64_t PRIME64_4 = 0x85EBCA77C2B2AE63u, PRIME64_5 = 0x27D4EB2F165667C5u;
constexpr uint64_t PRIME_MX1 = 0x165667919E3779F9u;

// The secret's offsets: of stripe n of a block 8 * n; the others as the description numbers them for 192 bytes.
constexpr size_t SCRAMBLE_AT = 128, LAST_STRIPE_AT = 121, LOW_AT = 11, HIGH_AT = 117;
alignas(64) constexpr uint8_t SECRET[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4, 0x6d,
    0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0,
    0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0,
    0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b,
    0x1b, 0x53, 0x2e, 0xa3, 0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac,
    0xd8, 0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51,
    0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34,
    0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb, 0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49,
    0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e, 0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8,
    0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b,
    0x40, 0x7e,
};

inline uint64_t word(const uint8_t* at) {
    uint64_t value;
    std::memcpy(&value, at, sizeof value);
    return value;
}

// Accumulates `count` stripes that lie one after the other; `stripe` is the first one's index in its block. As many
// bytes from `ahead` on, wherever that is, are fetched into the cache meanwhile: the CPU's own prefetching ends with a page.
using Accumulate = void (*)(uint64_t* acc, const uint8_t* data, size_t count, uint32_t* stripe, const uint8_t* ahead);

inline void fetch(const uint8_t* at) { __builtin_prefetch(at, 0, 3); }

inline void accumulate_one(uint64_t* acc, const uint8_t* data, const uint8_t* secret) {
    for (int i = 0; i < 8; ++i) {
        const uint64_t lane = word(data + 8 * i), value = lane ^ word(secret + 8 * i);
        acc[i ^ 1] += lane;
        acc[i] += (value & 0xffffffffu) * (value >> 32);
    }
}

inline void accumulate_portable(uint64_t* acc, const uint8_t* data, size_t count, uint32_t* stripe,
                                const uint8_t* ahead) {
    for (; count; --count, data += STRIPE, ahead += STRIPE) {
        fetch(ahead);
        accumulate_one(acc, data, SECRET + 8 * *stripe);
        if (++*stripe == STRIPES_PER_BLOCK) {
            *stripe = 0;
            for (int i = 0; i < 8; ++i) {
                acc[i] = (acc[i] ^ (acc[i] >> 47) ^ word(SECRET + SCRAMBLE_AT + 8 * i)) * PRIME32_1;
            }
        }
    }
}

#if defined(__x86_64__)
__attribute__((target("avx512f"))) inline __m512i accumulated(__m512i acc, __m512i lanes, __m512i secret) {
    const __m512i value = _mm512_xor_si512(lanes, secret);
    const __m512i product = _mm512_mul_epu32(value, _mm512_srli_epi64(value, 32));
    const __m512i swapped = _mm512_shuffle_epi32(lanes, _MM_PERM_BADC);
    return _mm512_add_epi64(acc, _mm512_add_epi64(product, swapped));
}

__attribute__((target("avx512f"))) inline __m512i scrambled(__m512i acc) {
    const __m512i secret = _mm512_loadu_si512(SECRET + SCRAMBLE_AT), prime = _mm512_set1_epi64(PRIME32_1);
    acc = _mm512_xor_si512(_mm512_xor_si512(acc, _mm512_srli_epi64(acc, 47)), secret);
    const __m512i high = _mm512_slli_epi64(_mm512_mul_epu32(_mm512_srli_epi64(acc, 32), prime), 32);
    return _mm512_add_epi64(_mm512_mul_epu32(acc, prime), high);
}

__attribute__((target("avx512f"))) inline void accumulate_avx512(uint64_t* acc_words, const uint8_t* data, size_t count,
                                                                 uint32_t* stripe, const uint8_t* ahead) {
    __m512i acc = _mm512_loadu_si512(acc_words);
    for (; count && *stripe; --count, data += STRIPE, ahead += STRIPE) {
        fetch(ahead);
        acc = accumulated(acc, _mm512_loadu_si512(data), _mm512_loadu_si512(SECRET + 8 * *stripe));
        if (++*stripe == STRIPES_PER_BLOCK) {
            *stripe = 0;
            acc = scrambled(acc);
        }
    }
    constexpr size_t BLOCK = STRIPES_PER_BLOCK * STRIPE;
    for (; count >= STRIPES_PER_BLOCK; count -= STRIPES_PER_BLOCK, data += BLOCK, ahead += BLOCK) {
#pragma GCC unroll 16
        for (uint32_t n = 0; n < STRIPES_PER_BLOCK; ++n) {
            fetch(ahead + n * STRIPE);
            acc = accumulated(acc, _mm512_loadu_si512(data + n * STRIPE), _mm512_loadu_si512(SECRET + 8 * n));
        }
        acc = scrambled(acc);
    }
    for (; count; --count, data += STRIPE, ahead += STRIPE, ++*stripe) {
        fetch(ahead);
        acc = accumulated(acc, _mm512_loadu_si512(data), _mm512_loadu_si512(SECRET + 8 * *stripe));
    }
    _mm512_storeu_si512(acc_words, acc);
}

__attribute__((target("avx2"))) inline __m256i accumulated2(__m256i acc, const uint8_t* data, const uint8_t* secret) {
    const __m256i lanes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data));
    const __m256i value = _mm256_xor_si256(lanes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(secret)));
    const __m256i product = _mm256_mul_epu32(value, _mm256_srli_epi64(value, 32));
    return _mm256_add_epi64(acc, _mm256_add_epi64(product, _mm256_shuffle_epi32(lanes, _MM_SHUFFLE(1, 0, 3, 2))));
}

__attribute__((target("avx2"))) inline __m256i scrambled2(__m256i acc, const uint8_t* at) {
    const __m256i secret = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    const __m256i prime = _mm256_set1_epi64x(PRIME32_1);
    acc = _mm256_xor_si256(_mm256_xor_si256(acc, _mm256_srli_epi64(acc, 47)), secret);
    const __m256i high = _mm256_slli_epi64(_mm256_mul_epu32(_mm256_srli_epi64(acc, 32), prime), 32);
    return _mm256_add_epi64(_mm256_mul_epu32(acc, prime), high);
}

__attribute__((target("avx2"))) inline void accumulate_avx2(uint64_t* acc_words, const uint8_t* data, size_t count,
                                                            uint32_t* stripe, const uint8_t* ahead) {
    __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(acc_words));
    __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(acc_words + 4));
    for (; count; --count, data += STRIPE, ahead += STRIPE) {
        fetch(ahead);
        const uint8_t* secret = SECRET + 8 * *stripe;
        low = accumulated2(low, data, secret);
        high = accumulated2(high, data + 32, secret + 32);
        if (++*stripe == STRIPES_PER_BLOCK) {
            *stripe = 0;
            low = scrambled2(low, SECRET + SCRAMBLE_AT);
            high = scrambled2(high, SECRET + SCRAMBLE_AT + 32);
        }
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc_words), low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc_words + 4), high);
}
#endif

// The widest that this CPU runs, or a narrower one: 0 portable, 1 AVX2, 2 AVX-512.
inline Accumulate accumulate_of(int width) {
#if defined(__x86_64__)
    if (width >= 2 && __builtin_cpu_supports("avx512f")) return accumulate_avx512;
    if (width >= 1 && __builtin_cpu_supports("avx2")) return accumulate_avx2;
#endif
    (void)width;
    return accumulate_portable;
}

// All zeros is a fresh one. A stripe is accumulated only once a byte after it has come: the last one counts otherwise.
struct Digest {
    uint64_t acc[8];
    uint64_t num_bytes;
    uint32_t stripe;       // of the next one, in its block
    uint32_t num_pending;  // bytes in `pending`, at most 64
    uint8_t before[STRIPE];  // the stripe before `pending`
    uint8_t pending[STRIPE];
};

// Feeds `num_bytes`; as many from `ahead` on are fetched into the cache meanwhile. `has_more`: others will follow, which
// keeps whole stripes where they are.
inline void take(Digest& digest, const uint8_t* data, size_t num_bytes, bool has_more, const uint8_t* ahead,
                 Accumulate accumulate) {
    if (!num_bytes) return;
    if (!digest.num_bytes) {
        const uint64_t start[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
        std::memcpy(digest.acc, start, sizeof start);
    }
    digest.num_bytes += num_bytes;
    if (digest.num_pending) {
        const size_t room = STRIPE - digest.num_pending, filled = num_bytes < room ? num_bytes : room;
        std::memcpy(digest.pending + digest.num_pending, data, filled);
        digest.num_pending += static_cast<uint32_t>(filled);
        data += filled;
        num_bytes -= filled;
        if (!num_bytes) return;
        accumulate(digest.acc, digest.pending, 1, &digest.stripe, ahead);
        std::memcpy(digest.before, digest.pending, STRIPE);
    }
    const size_t count = (has_more ? num_bytes : num_bytes - 1) / STRIPE;
    if (count) {
        accumulate(digest.acc, data, count, &digest.stripe, ahead);
        data += count * STRIPE;
        std::memcpy(digest.before, data - STRIPE, STRIPE);
    }
    digest.num_pending = static_cast<uint32_t>(num_bytes - count * STRIPE);
    std::memcpy(digest.pending, data, digest.num_pending);
}

inline uint64_t merged(const uint64_t* acc, const uint8_t* secret, uint64_t result) {
    for (int i = 0; i < 8; i += 2) {
        const unsigned __int128 product = static_cast<unsigned __int128>(acc[i] ^ word(secret + 8 * i)) *
                                          (acc[i + 1] ^ word(secret + 8 * i + 8));
        result += static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
    }
    result ^= result >> 37;
    result *= PRIME_MX1;
    return result ^ (result >> 32);
}

// The canonical, big-endian form. The digest can go on afterwards.
inline void result(const Digest& digest, uint8_t out[16]) {
    uint64_t acc[8];
    uint8_t last[STRIPE];
    const size_t num_before = STRIPE - digest.num_pending;
    std::memcpy(acc, digest.acc, sizeof acc);
    std::memcpy(last, digest.before + digest.num_pending, num_before);
    std::memcpy(last + num_before, digest.pending, digest.num_pending);
    accumulate_one(acc, last, SECRET + LAST_STRIPE_AT);
    const uint64_t low = merged(acc, SECRET + LOW_AT, digest.num_bytes * PRIME64_1);
    const uint64_t high = merged(acc, SECRET + HIGH_AT, ~(digest.num_bytes * PRIME64_2));
    const uint64_t words[2] = {__builtin_bswap64(high), __builtin_bswap64(low)};
    std::memcpy(out, words, sizeof words);
}

}  // namespace xxh3
