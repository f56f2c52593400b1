// Scattered bytes: digests, copies and socket I/O of many pieces in one call. Knows no frames and no pools.
//
// A list of pieces is an array of (address, length) pairs, which is what the kernel calls an iovec. Nothing here checks
// addresses: the caller makes them from its own pools and a copy plan, never from the wire.
#include <cerrno>
#include <sys/socket.h>
#include <sys/uio.h>

#include "xxh3.h"

#define API extern "C" __attribute__((visibility("default")))

namespace {

constexpr size_t TILE = 4096;  // copied, then hashed where it lies, while it is in the innermost cache; also how far ahead
constexpr size_t HASH_BYTES = 256 * 1024;  // sent or received, and hashed, while it is in the core's own cache
constexpr int MAX_IOV = 512;

xxh3::Accumulate accumulate = xxh3::accumulate_of(2);

// Where a walk over a list of pieces stands.
struct Cursor {
    uint64_t piece;
    uint64_t offset;
};

size_t least(size_t a, size_t b) { return a < b ? a : b; }

uint8_t* at(const iovec* pieces, const Cursor& cursor) {
    return static_cast<uint8_t*>(pieces[cursor.piece].iov_base) + cursor.offset;
}

size_t left(const iovec* pieces, const Cursor& cursor) { return pieces[cursor.piece].iov_len - cursor.offset; }

void advance(const iovec* pieces, Cursor& cursor, size_t num_bytes) {
    while (num_bytes) {
        const size_t here = least(left(pieces, cursor), num_bytes);
        cursor.offset += here;
        num_bytes -= here;
        if (cursor.offset == pieces[cursor.piece].iov_len) cursor = {cursor.piece + 1, 0};
    }
}

// The pieces from the cursor on, `limit` bytes at most, as the kernel takes them; how many.
int gather(const iovec* pieces, const Cursor& cursor, size_t limit, iovec* out) {
    Cursor walk = cursor;
    int count = 0;
    while (limit && count < MAX_IOV) {
        const size_t here = least(left(pieces, walk), limit);
        out[count++] = {at(pieces, walk), here};
        advance(pieces, walk, here);
        limit -= here;
    }
    return count;
}

// `next`: what will be copied afterwards, or null.
void copy_piece(uint8_t* to, const uint8_t* from, size_t num_bytes, const uint8_t* next, xxh3::Digest* digest) {
    if (!digest) {
        std::memcpy(to, from, num_bytes);
        return;
    }
    while (num_bytes) {
        const size_t tile = least(num_bytes, TILE);
        std::memcpy(to, from, tile);
        const uint8_t* ahead = tile < num_bytes ? from + tile : next;
        xxh3::take(*digest, to, tile, ahead != nullptr, ahead ? ahead : from, accumulate);
        to += tile;
        from += tile;
        num_bytes -= tile;
    }
}

// `next`: what will be hashed afterwards, or null.
void hash_piece(const uint8_t* data, size_t num_bytes, const uint8_t* next, xxh3::Digest* digest) {
    const size_t tail = least(num_bytes, TILE), body = num_bytes - tail;
    xxh3::take(*digest, data, body, true, data + TILE, accumulate);
    xxh3::take(*digest, data + body, tail, next != nullptr, next ? next : data, accumulate);
}

}  // namespace

API int32_t baton_pieces_abi() { return 4; }

API uint64_t baton_digest_bytes() { return sizeof(xxh3::Digest); }

// For tests: 0 portable, 1 AVX2, 2 AVX-512, each only where the CPU has it.
API void baton_digest_width(int32_t width) { accumulate = xxh3::accumulate_of(width); }

// Feeds the next `num_bytes` of the pieces, from the cursor on.
API void baton_digest_take(xxh3::Digest* digest, const iovec* pieces, Cursor* cursor, uint64_t num_bytes) {
    while (num_bytes) {
        const size_t here = least(left(pieces, *cursor), num_bytes);
        const uint8_t* data = at(pieces, *cursor);
        advance(pieces, *cursor, here);
        num_bytes -= here;
        hash_piece(data, here, num_bytes ? at(pieces, *cursor) : nullptr, digest);
    }
}

// Only for more than 240 bytes in all.
API void baton_digest_result(const xxh3::Digest* digest, uint8_t* out) { xxh3::result(*digest, out); }

// Copies `num_bytes` from one list of pieces to another; `digest`, if any, is fed with what lies at the destination.
API void baton_copy(const iovec* to, const iovec* from, uint64_t num_bytes, xxh3::Digest* digest) {
    Cursor to_at{0, 0}, from_at{0, 0};
    while (num_bytes) {
        const size_t here = least(num_bytes, least(left(to, to_at), left(from, from_at)));
        uint8_t* destination = at(to, to_at);
        const uint8_t* source = at(from, from_at);
        advance(to, to_at, here);
        advance(from, from_at, here);
        num_bytes -= here;
        copy_piece(destination, source, here, num_bytes ? at(from, from_at) : nullptr, digest);
    }
}

// Sends the next `num_bytes` of the pieces on a non-blocking socket until it is full; how many were sent, or -errno if
// none. `digest`, if any, is fed with each part right before it goes; `*num_hashed` bytes after the cursor are in it.
// With a digest the last part stays unsent once it is hashed: the caller may put the digest behind it.
API int64_t baton_send(int32_t fd, const iovec* pieces, Cursor* cursor, uint64_t num_bytes, xxh3::Digest* digest,
                       uint64_t* num_hashed) {
    uint64_t done = 0;
    iovec batch[MAX_IOV];
    while (done < num_bytes) {
        const uint64_t rest = num_bytes - done, part = rest < HASH_BYTES + HASH_BYTES / 2 ? rest : HASH_BYTES;
        if (digest && *num_hashed < part) {
            Cursor walk = *cursor;
            advance(pieces, walk, *num_hashed);
            baton_digest_take(digest, pieces, &walk, part - *num_hashed);
            *num_hashed = part;
        }
        if (digest && *num_hashed >= rest) return static_cast<int64_t>(done);
        msghdr message{};
        message.msg_iov = batch;
        message.msg_iovlen = static_cast<size_t>(gather(pieces, *cursor, part, batch));
        const ssize_t sent = sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0) {
            if (errno == EINTR) continue;
            return done ? static_cast<int64_t>(done) : -errno;
        }
        advance(pieces, *cursor, static_cast<size_t>(sent));
        done += static_cast<uint64_t>(sent);
        if (digest) *num_hashed -= static_cast<uint64_t>(sent);
    }
    return static_cast<int64_t>(done);
}

// Reads the next `num_bytes` of the pieces from a non-blocking socket until it is empty; `digest`, if any, is fed with
// them. How many came (0: the peer closed), or -errno if none.
API int64_t baton_receive(int32_t fd, const iovec* pieces, Cursor* cursor, uint64_t num_bytes, xxh3::Digest* digest) {
    uint64_t done = 0;
    iovec batch[MAX_IOV];
    while (done < num_bytes) {
        msghdr message{};
        message.msg_iov = batch;
        message.msg_iovlen =
            static_cast<size_t>(gather(pieces, *cursor, least(num_bytes - done, HASH_BYTES), batch));
        const ssize_t came = recvmsg(fd, &message, MSG_DONTWAIT);
        if (came < 0 && errno == EINTR) continue;
        if (came <= 0) return done ? static_cast<int64_t>(done) : came < 0 ? -errno : 0;
        if (digest) {
            Cursor walk = *cursor;
            baton_digest_take(digest, pieces, &walk, static_cast<uint64_t>(came));
        }
        advance(pieces, *cursor, static_cast<size_t>(came));
        done += static_cast<uint64_t>(came);
    }
    return static_cast<int64_t>(done);
}
