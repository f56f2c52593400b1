// Scattered bytes: digests, copies and socket I/O of many pieces in one call. Knows no frames and no pools.
//
// A list of pieces is an array of (address, length) pairs, which is what the kernel calls an iovec. Nothing here checks
// addresses: the caller makes them from its own pools and a copy plan, never from the wire.
#include <cerrno>
#include <sys/socket.h>
#include <sys/uio.h>
#include <vector>

#include "xxh3.h"

#define API extern "C" __attribute__((visibility("default")))

namespace {

using xxh3::DIGEST;

constexpr size_t LINE = 64;
constexpr size_t TILE = 4096;  // how far ahead of a digest its next bytes are fetched
constexpr uint64_t SOON_PIECES = 16;  // so far ahead of a gather its digests are fetched
constexpr size_t PART_BYTES = 512 * 1024;  // received, and hashed, while it is in the core's own cache
constexpr size_t BOUNCE_BYTES = 256 * 1024;  // the same, of what is streamed
constexpr size_t SENT_BYTES = 1024 * 1024;  // in one call: BBR makes bad estimates of what comes in larger bursts
constexpr int MAX_IOV = 512;

xxh3::Digest digest = xxh3::digest_of<xxh3::Store::NONE>(2);
xxh3::Digest copy_digest = xxh3::digest_of<xxh3::Store::CACHED>(2);
xxh3::Digest stream_digest = xxh3::digest_of<xxh3::Store::STREAMED>(2);  // null: not to be had

// Where a walk over a list of pieces stands.
struct Cursor {
    uint64_t piece;
    uint64_t offset;
};

// A memory that consists of leaves of `leaf_bytes` from `origin` on, and where the 16-byte digest of its first leaf goes;
// the others follow. A piece begins with a leaf. Its last leaf may be shorter, and is then hashed as if zeros followed.
struct Leaves {
    uint64_t origin;
    uint64_t digests;
    uint64_t leaf_bytes;  // more than 240

    uint8_t* digest_of(const void* data) const {
        const uint64_t leaf = (reinterpret_cast<uint64_t>(data) - origin) / leaf_bytes;
        return reinterpret_cast<uint8_t*>(digests + leaf * DIGEST);
    }
};

// What has come of a list of pieces, and which leaves of it are hashed.
struct Progress {
    Cursor landed;
    Cursor hashed;
};

// What has gone of a frame: of its head, and of the pieces after it.
struct Departure {
    uint64_t head_sent;
    uint64_t head_bytes;
    Cursor sent;
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

// The pieces from the cursor on, `limit` bytes at most, as the kernel takes them, up to `end`; where they end.
iovec* gather(const iovec* pieces, const Cursor& cursor, size_t limit, iovec* out, const iovec* end) {
    Cursor walk = cursor;
    while (limit && out < end) {
        const size_t here = least(left(pieces, walk), limit);
        xxh3::fetch(at(pieces, walk));  // and its page's address: the kernel waits for each of them, one by one
        *out++ = {at(pieces, walk), here};
        advance(pieces, walk, here);
        limit -= here;
    }
    return out;
}

// Copies the next `num_bytes` of the pieces.
void copy_some(uint8_t* to, const iovec* pieces, Cursor& cursor, size_t num_bytes) {
    while (num_bytes) {
        const size_t here = least(left(pieces, cursor), num_bytes);
        std::memcpy(to, at(pieces, cursor), here);
        advance(pieces, cursor, here);
        to += here;
        num_bytes -= here;
    }
}

// The digests of all leaves of `num_bytes` of a piece. `next`: what will be read afterwards.
void hash(const uint8_t* data, size_t num_bytes, const uint8_t* next, const Leaves& leaves) {
    const size_t leaf = leaves.leaf_bytes, count = num_bytes / leaf, rest = num_bytes % leaf;
    uint8_t* const out = leaves.digest_of(data);
    digest(data, leaf, count, next, out, nullptr);
    if (rest) {
        std::vector<uint8_t> padded(leaf);
        std::memcpy(padded.data(), data + count * leaf, rest);
        digest(padded.data(), leaf, 1, padded.data(), out + count * DIGEST, nullptr);
    }
}

// May these leaves be streamed and hashed in one pass?
bool can_stream_digest(const void* to, const Leaves& leaves) {
    return stream_digest && !((reinterpret_cast<uint64_t>(to) | leaves.leaf_bytes) % xxh3::STRIPE);
}

// Whole leaves copied, past the caches if `streams`, and hashed in one pass. `next`: what will be read afterwards.
void copy_leaves(uint8_t* to, const uint8_t* from, size_t num_bytes, const uint8_t* next, const Leaves& leaves,
                 bool streams) {
    const size_t leaf = leaves.leaf_bytes, body = num_bytes > TILE ? (num_bytes - TILE) / leaf * leaf : 0;
    uint8_t* const out = leaves.digest_of(to);
    const xxh3::Digest copy = streams && can_stream_digest(to, leaves) ? stream_digest : copy_digest;
    copy(from, leaf, body / leaf, from + TILE, out, to);
    copy(from + body, leaf, (num_bytes - body) / leaf, next, out + body / leaf * DIGEST, to + body);
}

#if defined(__x86_64__)
constexpr bool CAN_STREAM = true;

// Copies past the caches. `publish` follows.
void stream(uint8_t* to, const uint8_t* from, size_t num_bytes) {
    const size_t head = least(num_bytes, -reinterpret_cast<uint64_t>(to) % LINE), body = (num_bytes - head) / LINE * LINE;
    std::memcpy(to, from, head);
    for (size_t i = head; i < head + body; i += sizeof(__m128i)) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    }
    std::memcpy(to + head + body, from + head + body, num_bytes - head - body);
}

// What was streamed is there for other threads.
void publish() { _mm_sfence(); }
#else
constexpr bool CAN_STREAM = false;

void stream(uint8_t* to, const uint8_t* from, size_t num_bytes) { std::memcpy(to, from, num_bytes); }

void publish() {}
#endif

// Whole leaves of a source that does not change, streamed and hashed.
void stream_leaves(uint8_t* to, const uint8_t* from, size_t num_bytes, const Leaves& leaves) {
    if (can_stream_digest(to, leaves)) {
        copy_leaves(to, from, num_bytes, from, leaves, true);
    } else {
        digest(from, leaves.leaf_bytes, num_bytes / leaves.leaf_bytes, from, leaves.digest_of(to), nullptr);
        stream(to, from, num_bytes);
    }
}

// `num_bytes` more have landed: hashes the leaves that are complete.
void land(const iovec* pieces, Progress& progress, size_t num_bytes, const Leaves& leaves) {
    advance(pieces, progress.landed, num_bytes);
    Cursor& hashed = progress.hashed;
    const Cursor& landed = progress.landed;
    while (hashed.piece < landed.piece || hashed.offset < landed.offset) {
        const bool is_whole = hashed.piece < landed.piece;  // else its last leaf may be coming
        const size_t rest = left(pieces, hashed);
        const size_t ready = is_whole ? rest : (landed.offset - hashed.offset) / leaves.leaf_bytes * leaves.leaf_bytes;
        if (!ready) return;
        const uint8_t* data = at(pieces, hashed);
        const size_t body = ready > TILE ? (ready - TILE) / leaves.leaf_bytes * leaves.leaf_bytes : 0;
        const void* const next = hashed.piece + 1 < landed.piece ? pieces[hashed.piece + 1].iov_base : data;
        hash(data, body, data + TILE, leaves);
        hash(data + body, ready - body, static_cast<const uint8_t*>(next), leaves);
        advance(pieces, hashed, ready);
    }
}

// The next `num_bytes` of the pieces, none of which is empty, lie at `from`: streams them into their place and, if there are
// leaves, makes the digests of those that are complete.
void take(const uint8_t* from, const iovec* pieces, Progress& progress, size_t num_bytes, const Leaves* leaves) {
    while (num_bytes) {
        const Cursor& landed = progress.landed;
        uint8_t* const to = at(pieces, landed);
        const size_t leaf = leaves ? leaves->leaf_bytes : 1, begun = landed.offset % leaf;
        size_t part = least(left(pieces, landed), num_bytes);
        if (begun || part < leaf) {  // what there is of a leaf whose rest is to come, or that is the short one
            part = least(part, leaf - begun);
            std::memcpy(to, from, part);
            land(pieces, progress, part, *leaves);
        } else {
            part = part / leaf * leaf;
            leaves ? stream_leaves(to, from, part, *leaves) : stream(to, from, part);
            advance(pieces, progress.landed, part);
            progress.hashed = progress.landed;
        }
        from += part;
        num_bytes -= part;
    }
}

// Receives some of the next `num_bytes` of the pieces into their place, as recvmsg, and makes digests if there are leaves.
ssize_t receive_some(int32_t fd, const iovec* pieces, Progress& progress, size_t num_bytes, const Leaves* leaves) {
    iovec batch[MAX_IOV];
    msghdr message{};
    message.msg_iov = batch;
    iovec* const end = gather(pieces, progress.landed, least(num_bytes, PART_BYTES), batch, batch + MAX_IOV);
    message.msg_iovlen = static_cast<size_t>(end - batch);
    const ssize_t came = recvmsg(fd, &message, MSG_DONTWAIT);
    if (came <= 0) return came;
    const size_t num_came = static_cast<size_t>(came);
    leaves ? land(pieces, progress, num_came, *leaves) : advance(pieces, progress.landed, num_came);
    return came;
}

// The same by way of a small buffer. The kernel does not stream: its stores to memory that is in no cache take longer
// than its copy to the buffer and the streamed one from there together.
ssize_t stream_some(int32_t fd, const iovec* pieces, Progress& progress, size_t num_bytes, const Leaves* leaves) {
    thread_local std::vector<uint8_t> bounce(BOUNCE_BYTES);
    const ssize_t came = recv(fd, bounce.data(), least(num_bytes, BOUNCE_BYTES), MSG_DONTWAIT);
    if (came > 0) take(bounce.data(), pieces, progress, static_cast<size_t>(came), leaves);
    return came;
}

}  // namespace

API int32_t baton_pieces_abi() { return 7; }

// For tests: 0 portable, 1 AVX2, 2 AVX-512, each only where the CPU has it.
API void baton_digest_width(int32_t width) {
    digest = xxh3::digest_of<xxh3::Store::NONE>(width);
    copy_digest = xxh3::digest_of<xxh3::Store::CACHED>(width);
    stream_digest = xxh3::digest_of<xxh3::Store::STREAMED>(width);
}

// The next `num_bytes` of the pieces are in place: makes the digests of the leaves that are complete with them.
API void baton_landed(const iovec* pieces, Progress* progress, uint64_t num_bytes, const Leaves* leaves) {
    land(pieces, *progress, num_bytes, *leaves);
}

// The digest of the digests of all leaves of `count` pieces goes to `out`. Where those are too short for it, at most 240
// bytes, they do themselves, and their size is returned instead of 0.
API uint64_t baton_digest(const iovec* pieces, uint64_t count, const Leaves* leaves, uint8_t* out) {
    thread_local std::vector<uint8_t> digests;
    digests.clear();
    for (uint64_t i = 0; i < count; ++i) {
        const size_t size = (pieces[i].iov_len + leaves->leaf_bytes - 1) / leaves->leaf_bytes * DIGEST;
        if (i + SOON_PIECES < count) {
            const uint8_t* const soon = leaves->digest_of(pieces[i + SOON_PIECES].iov_base);
            xxh3::fetch(soon);
            xxh3::fetch(soon + 64);
        }
        const uint8_t* const first = leaves->digest_of(pieces[i].iov_base);
        digests.insert(digests.end(), first, first + size);
    }
    if (digests.size() > xxh3::MAX_SHORT) {
        digest(digests.data(), digests.size(), 1, digests.data(), out, nullptr);
        return 0;
    }
    std::memcpy(out, digests.data(), digests.size());
    return digests.size();
}

// Copies `num_bytes` from one list of pieces to another. `leaves`, if any: makes the digests of what then lies in `to`; only
// then, and with AVX-512, `streams` has a meaning: past the caches.
API void baton_copy(const iovec* to, const iovec* from, uint64_t num_bytes, const Leaves* leaves, int32_t streams) {
    Cursor to_at{0, 0}, from_at{0, 0};
    while (num_bytes) {
        uint8_t* const data = at(to, to_at);
        const uint8_t* const source = at(from, from_at);
        const size_t room = left(to, to_at), here = least(room, left(from, from_at));
        size_t part = leaves ? here / leaves->leaf_bytes * leaves->leaf_bytes : here;
        if (part) {
            advance(from, from_at, part);
            num_bytes -= part;
            if (leaves) {
                copy_leaves(data, source, part, num_bytes ? at(from, from_at) : source, *leaves, streams);
            } else {
                std::memcpy(data, source, part);
            }
        } else {  // the source's piece ends within a leaf, or this is the short one
            part = least(room, leaves->leaf_bytes);
            copy_some(data, from, from_at, part);
            num_bytes -= part;
            hash(data, part, data, *leaves);
        }
        advance(to, to_at, part);
    }
    publish();
}

// Sends of the rest of a frame, `num_bytes`, on a non-blocking socket until it is full or `enough` bytes (up to SENT_BYTES
// more) are sent; how many were, or -errno if none.
API int64_t baton_send(int32_t fd, const char* head, const iovec* pieces, Departure* departure, uint64_t num_bytes,
                       uint64_t enough) {
    uint64_t done = 0;
    iovec batch[MAX_IOV];
    while (done < num_bytes && done < enough) {
        const size_t head_left = departure->head_bytes - departure->head_sent;
        iovec* end = batch;
        if (head_left) *end++ = {const_cast<char*>(head) + departure->head_sent, head_left};
        const size_t limit = least(num_bytes - done - head_left, SENT_BYTES);
        end = gather(pieces, departure->sent, limit, end, batch + MAX_IOV);
        msghdr message{};
        message.msg_iov = batch;
        message.msg_iovlen = static_cast<size_t>(end - batch);
        const ssize_t count = sendmsg(fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (count < 0) {
            if (errno == EINTR) continue;
            return done ? static_cast<int64_t>(done) : -errno;
        }
        const size_t sent = static_cast<size_t>(count), of_head = least(sent, head_left);
        departure->head_sent += of_head;
        advance(pieces, departure->sent, sent - of_head);
        done += sent;
    }
    return static_cast<int64_t>(done);
}

// Reads the next `num_bytes` of the pieces from a non-blocking socket until it is empty, past the caches if `streams`.
// `leaves`, if any: makes the digests of those that are complete. How many bytes came (0: the peer closed), or
// -errno if none.
API int64_t baton_receive(int32_t fd, const iovec* pieces, Progress* progress, uint64_t num_bytes, const Leaves* leaves,
                          int32_t streams) {
    uint64_t done = 0;
    int64_t end = 0;
    // More is waiting than one read takes: only then the buffer pays without digests. A reader with time to spare had better
    // take longer inside the kernel: while a thread reads from a socket, packets wait for it; else the sender's core takes
    // them in, too.
    bool is_behind = false;
    while (done < num_bytes) {
        const size_t rest = num_bytes - done;
        const bool by_buffer = streams && CAN_STREAM && (leaves || is_behind);
        const ssize_t came = by_buffer ? stream_some(fd, pieces, *progress, rest, leaves)
                                       : receive_some(fd, pieces, *progress, rest, leaves);
        if (came < 0 && errno == EINTR) continue;
        end = came < 0 ? -errno : 0;
        if (came <= 0) break;
        done += static_cast<uint64_t>(came);
        is_behind = static_cast<size_t>(came) == least(rest, by_buffer ? BOUNCE_BYTES : PART_BYTES);
    }
    publish();
    return done ? static_cast<int64_t>(done) : end;
}
