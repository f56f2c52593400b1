// XXH3-128 without seed, for inputs of more than 240 bytes.
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

constexpr size_t DIGEST = 16;     // bytes
constexpr size_t MAX_SHORT = 240;  // bytes: so few are treated in other ways
constexpr size_t SOON = 2048;  // bytes: so far ahead of a copy its destination is fetched
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

inline void fetch(const uint8_t* at) { __builtin_prefetch(at, 0, 3); }

constexpr uint64_t START[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
constexpr size_t BLOCK = STRIPES_PER_BLOCK * STRIPE;

// The canonical, big-endian digests of `count` inputs of `num_bytes`, more than MAX_SHORT, that lie one after the other:
// one after the other to `out`. As many bytes from `ahead` on, wherever that is, are fetched into the cache meanwhile:
// the CPU's own prefetching ends with a page. `to`: what was read, and hashed, is written there, unless Store is NONE.
using Digest = void (*)(const uint8_t* data, size_t num_bytes, size_t count, const uint8_t* ahead, uint8_t* out,
                        uint8_t* to);

// Where a copy goes. STREAMED: past the caches, which spares the wait for lines that are in none; `to` and `num_bytes` are
// multiples of STRIPE, and other threads see it after a fence.
enum class Store { NONE, CACHED, STREAMED };

#define XXH3_INLINE inline __attribute__((always_inline))

XXH3_INLINE uint64_t merged(const uint64_t* acc, const uint8_t* secret, uint64_t result) {
    for (int i = 0; i < 8; i += 2) {
        const unsigned __int128 product = static_cast<unsigned __int128>(acc[i] ^ word(secret + 8 * i)) *
                                          (acc[i + 1] ^ word(secret + 8 * i + 8));
        result += static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
    }
    result ^= result >> 37;
    result *= PRIME_MX1;
    return result ^ (result >> 32);
}

XXH3_INLINE void finish(const uint64_t* acc, size_t num_bytes, uint8_t* out) {
    const uint64_t low = merged(acc, SECRET + LOW_AT, num_bytes * PRIME64_1);
    const uint64_t high = merged(acc, SECRET + HIGH_AT, ~(num_bytes * PRIME64_2));
    const uint64_t words[2] = {__builtin_bswap64(high), __builtin_bswap64(low)};
    std::memcpy(out, words, sizeof words);
}

inline void stripe_portable(uint64_t* acc, const uint8_t* data, const uint8_t* secret) {
    for (int i = 0; i < 8; ++i) {
        const uint64_t lane = word(data + 8 * i), value = lane ^ word(secret + 8 * i);
        acc[i ^ 1] += lane;
        acc[i] += (value & 0xffffffffu) * (value >> 32);
    }
}

inline void digest_portable(const uint8_t* data, size_t num_bytes, size_t count, const uint8_t* ahead, uint8_t* out,
                            uint8_t*) {
    for (; count; --count, data += num_bytes, ahead += num_bytes, out += DIGEST) {
        uint64_t acc[8];
        std::memcpy(acc, START, sizeof START);
        for (size_t n = 0; n < (num_bytes - 1) / STRIPE; ++n) {
            fetch(ahead + n * STRIPE);
            stripe_portable(acc, data + n * STRIPE, SECRET + 8 * (n % STRIPES_PER_BLOCK));
            if (n % STRIPES_PER_BLOCK == STRIPES_PER_BLOCK - 1) {
                for (int i = 0; i < 8; ++i) {
                    acc[i] = (acc[i] ^ (acc[i] >> 47) ^ word(SECRET + SCRAMBLE_AT + 8 * i)) * PRIME32_1;
                }
            }
        }
        stripe_portable(acc, data + num_bytes - STRIPE, SECRET + LAST_STRIPE_AT);
        finish(acc, num_bytes, out);
    }
}

#if defined(__x86_64__)
__attribute__((target("avx512f,bmi2"))) XXH3_INLINE __m512i stripe_avx512(__m512i acc, __m512i lanes, const uint8_t* secret) {
    const __m512i value = _mm512_xor_si512(lanes, _mm512_loadu_si512(secret));
    const __m512i product = _mm512_mul_epu32(value, _mm512_srli_epi64(value, 32));
    const __m512i swapped = _mm512_shuffle_epi32(lanes, _MM_PERM_BADC);
    return _mm512_add_epi64(acc, _mm512_add_epi64(product, swapped));
}

__attribute__((target("avx512f,bmi2"))) XXH3_INLINE __m512i scrambled(__m512i acc) {
    const __m512i secret = _mm512_loadu_si512(SECRET + SCRAMBLE_AT), prime = _mm512_set1_epi64(PRIME32_1);
    acc = _mm512_xor_si512(_mm512_xor_si512(acc, _mm512_srli_epi64(acc, 47)), secret);
    const __m512i high = _mm512_slli_epi64(_mm512_mul_epu32(_mm512_srli_epi64(acc, 32), prime), 32);
    return _mm512_add_epi64(_mm512_mul_epu32(acc, prime), high);
}

// One stripe, read once: hashed and perhaps written.
template <Store STORE>
__attribute__((target("avx512f,bmi2"))) XXH3_INLINE __m512i taken_avx512(__m512i acc, const uint8_t* data,
                                                                         const uint8_t* secret, uint8_t* to) {
    const __m512i lanes = _mm512_loadu_si512(data);
    if (STORE == Store::CACHED) {
        __builtin_prefetch(to + SOON, 1, 3);  // else each store waits for its line
        _mm512_storeu_si512(to, lanes);
    }
    if (STORE == Store::STREAMED) _mm512_stream_si512(reinterpret_cast<__m512i*>(to), lanes);
    return stripe_avx512(acc, lanes, secret);
}

template <Store STORE>
__attribute__((target("avx512f,bmi2"))) void digest_avx512(const uint8_t* data, size_t num_bytes, size_t count,
                                                           const uint8_t* ahead, uint8_t* out, uint8_t* to) {
    for (; count; --count, data += num_bytes, ahead += num_bytes, out += DIGEST, to += STORE == Store::NONE ? 0 : num_bytes) {
        __m512i acc = _mm512_loadu_si512(START);
        size_t n = 0;
        const size_t stripes = (num_bytes - 1) / STRIPE;
        for (; n + STRIPES_PER_BLOCK <= stripes; n += STRIPES_PER_BLOCK) {
#pragma GCC unroll 16
            for (size_t k = 0; k < STRIPES_PER_BLOCK; ++k) {
                fetch(ahead + (n + k) * STRIPE);
                acc = taken_avx512<STORE>(acc, data + (n + k) * STRIPE, SECRET + 8 * k, to + (n + k) * STRIPE);
            }
            acc = scrambled(acc);
        }
        for (size_t k = 0; n < stripes; ++n, ++k) {
            fetch(ahead + n * STRIPE);
            acc = taken_avx512<STORE>(acc, data + n * STRIPE, SECRET + 8 * k, to + n * STRIPE);
        }
        alignas(64) uint64_t words[8];
        const size_t last = num_bytes - STRIPE;
        _mm512_store_si512(words, taken_avx512<STORE>(acc, data + last, SECRET + LAST_STRIPE_AT, to + last));
        finish(words, num_bytes, out);
    }
}

__attribute__((target("avx2,bmi2"))) XXH3_INLINE __m256i stripe_avx2(__m256i acc, const uint8_t* data, const uint8_t* secret) {
    const __m256i lanes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data));
    const __m256i value = _mm256_xor_si256(lanes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(secret)));
    const __m256i product = _mm256_mul_epu32(value, _mm256_srli_epi64(value, 32));
    return _mm256_add_epi64(acc, _mm256_add_epi64(product, _mm256_shuffle_epi32(lanes, _MM_SHUFFLE(1, 0, 3, 2))));
}

__attribute__((target("avx2,bmi2"))) XXH3_INLINE __m256i scrambled2(__m256i acc, const uint8_t* at) {
    const __m256i secret = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    const __m256i prime = _mm256_set1_epi64x(PRIME32_1);
    acc = _mm256_xor_si256(_mm256_xor_si256(acc, _mm256_srli_epi64(acc, 47)), secret);
    const __m256i high = _mm256_slli_epi64(_mm256_mul_epu32(_mm256_srli_epi64(acc, 32), prime), 32);
    return _mm256_add_epi64(_mm256_mul_epu32(acc, prime), high);
}

__attribute__((target("avx2,bmi2"))) inline void digest_avx2(const uint8_t* data, size_t num_bytes, size_t count,
                                                             const uint8_t* ahead, uint8_t* out, uint8_t*) {
    for (; count; --count, data += num_bytes, ahead += num_bytes, out += DIGEST) {
        __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(START));
        __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(START + 4));
        for (size_t n = 0; n < (num_bytes - 1) / STRIPE; ++n) {
            const uint8_t* const secret = SECRET + 8 * (n % STRIPES_PER_BLOCK);
            fetch(ahead + n * STRIPE);
            low = stripe_avx2(low, data + n * STRIPE, secret);
            high = stripe_avx2(high, data + n * STRIPE + 32, secret + 32);
            if (n % STRIPES_PER_BLOCK == STRIPES_PER_BLOCK - 1) {
                low = scrambled2(low, SECRET + SCRAMBLE_AT);
                high = scrambled2(high, SECRET + SCRAMBLE_AT + 32);
            }
        }
        const uint8_t* const last = data + num_bytes - STRIPE;
        alignas(32) uint64_t words[8];
        _mm256_store_si256(reinterpret_cast<__m256i*>(words), stripe_avx2(low, last, SECRET + LAST_STRIPE_AT));
        _mm256_store_si256(reinterpret_cast<__m256i*>(words + 4), stripe_avx2(high, last + 32, SECRET + LAST_STRIPE_AT + 32));
        finish(words, num_bytes, out);
    }
}
#endif

// A copy for a width that reads twice: copied, then hashed where it lies, for the source may change meanwhile.
template <Digest PLAIN>
void copied(const uint8_t* data, size_t num_bytes, size_t count, const uint8_t* ahead, uint8_t* out, uint8_t* to) {
    for (; count; --count, data += num_bytes, ahead += num_bytes, out += DIGEST, to += num_bytes) {
        std::memcpy(to, data, num_bytes);
        PLAIN(to, num_bytes, 1, ahead, out, nullptr);
    }
}

// The widest that this CPU runs, or a narrower one: 0 portable, 1 AVX2, 2 AVX-512. Null: none of those can stream.
template <Store STORE>
Digest digest_of(int width) {
#if defined(__x86_64__)
    const bool has_bmi2 = __builtin_cpu_supports("bmi2");
    if (width >= 2 && has_bmi2 && __builtin_cpu_supports("avx512f")) return digest_avx512<STORE>;
#endif
    if (STORE == Store::STREAMED) return nullptr;
#if defined(__x86_64__)
    if (width >= 1 && has_bmi2 && __builtin_cpu_supports("avx2")) {
        return STORE == Store::NONE ? digest_avx2 : copied<digest_avx2>;
    }
#endif
    (void)width;
    return STORE == Store::NONE ? digest_portable : copied<digest_portable>;
}

}  // namespace xxh3
