/*
 * state_page.h - read the kill switch's state page: may this process send an order?
 *
 * One file, C11 or C++17, nothing beyond POSIX. Copy it into your project. Layout and rules of reading are those of
 * docs/STATE_PAGE.md.
 *
 *     ks_page page;                                    // one per thread, or one behind a lock
 *     ks_init(&page, "/run/killswitch/state.page");
 *     ...
 *     if (ks_check(&page) == KS_ALLOW)
 *         send(order);
 *
 * Whatever is not a whole, fresh and understood page is no permission. Cancels need no check: they always pass.
 *
 * A check of an unchanged page is a copy of 64 bytes, a compare and one look at the clock, without a system call. A page
 * whose writer died in mid-write is read again for 5 ms, once; a page that is missing or stale costs a system call or two.
 *
 * SPDX-License-Identifier: Apache-2.0
 */
#ifndef KILLSWITCH_STATE_PAGE_H
#define KILLSWITCH_STATE_PAGE_H

/* For clock_gettime under -std=c11: include this file before all others, or define it yourself. */
#if !defined(__cplusplus) && !defined(_POSIX_C_SOURCE)
#define _POSIX_C_SOURCE 200809L
#endif

#include <fcntl.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

/* A load that takes a lock would write to a read-only mapping, so the words must be lock-free. */
#ifdef __cplusplus
#include <atomic>
typedef std::atomic<uint64_t> ks_word;
#define KS_LOAD(word, order) (word).load(std::memory_order_##order)
#define KS_ACQUIRE() std::atomic_thread_fence(std::memory_order_acquire)
static_assert(ks_word::is_always_lock_free && sizeof(ks_word) == 8, "64-bit loads must be lock-free");
#else
#include <stdatomic.h>
#include <stdbool.h>
typedef _Atomic uint64_t ks_word;
#define KS_LOAD(word, order) atomic_load_explicit(&(word), memory_order_##order)
#define KS_ACQUIRE() atomic_thread_fence(memory_order_acquire)
_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2 && sizeof(ks_word) == 8, "64-bit loads must be lock-free");
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the page is little-endian and this reader does not swap bytes"
#endif

#define KS_WORDS 8
#define KS_BYTES 64
#define KS_CRC_COVERS 56
#define KS_PATIENCE_NS 5000000 /* a write takes microseconds, but its process may lose the CPU in the middle of it */

typedef enum {
    KS_ALLOW = 0,       /* an order of any size may go out */
    KS_THROTTLED = 1,   /* only an order that reduces, or that keeps |position| within factor x limit */
    KS_REDUCE_ONLY = 2, /* only an order that truly reduces the position */
    KS_HALT = 3,        /* no order */
    KS_STALE = 4        /* no order: no sidecar vouches for the page. It is dead, stopped, not there, or damaged */
} ks_answer;

typedef enum { KS_ACTIVE = 0, KS_KILLED = 1, KS_RECOVERING = 2, KS_DISABLED = 3 } ks_state;

typedef struct {
    uint64_t heartbeat;   /* CLOCK_MONOTONIC, ns; 0 where the sidecar stopped or has just started */
    uint32_t state;       /* ks_state */
    uint32_t restriction; /* 0 none, 1 reduce_only, 2 halt */
    double factor;        /* position limit factor, 0.0 to 1.0 */
    uint64_t epoch;       /* counts durable changes */
    uint64_t lease;       /* ns */
} ks_snapshot;

/* A reader. Threads need one each, or a lock; a forked child may go on with its copy. */
typedef struct {
    const char *path; /* must live as long as the reader */
    void *map;        /* NULL until the file could be mapped */
    dev_t device;     /* of the mapped file */
    ino_t inode;
    bool has_seen;     /* whether `seen` holds a copy that was whole, and `snapshot` its values */
    bool has_given_up; /* whether `given_up_on` holds a copy that was not, for as long as the patience lasted */
    uint64_t seen[KS_WORDS];
    uint64_t given_up_on[KS_WORDS];
    ks_snapshot snapshot; /* of the last check that did not answer KS_STALE */
} ks_page;

/* Make a reader; opens nothing yet, for the sidecar may start later than this process. */
static inline void ks_init(ks_page *page, const char *path)
{
    memset(page, 0, sizeof *page);
    page->path = path;
}

/* Let go of the mapping. A later check maps anew. */
static inline void ks_close(ks_page *page)
{
    if (page->map)
        (void)munmap(page->map, KS_BYTES);
    page->map = NULL;
    page->has_seen = false;
    page->has_given_up = false;
}

/* The CRC-32 of zlib, gzip and PNG, four bits at a time. */
static inline uint32_t ks_crc32(const unsigned char *bytes, size_t count)
{
    static const uint32_t table[16] = {
        0x00000000u, 0x1db71064u, 0x3b6e20c8u, 0x26d930acu, 0x76dc4190u, 0x6b6b51f4u, 0x4db26158u, 0x5005713cu,
        0xedb88320u, 0xf00f9344u, 0xd6d6a3e8u, 0xcb61b38cu, 0x9b64c2b0u, 0x86d3d2d4u, 0xa00ae278u, 0xbdbdf21cu};
    uint32_t crc = 0xffffffffu;
    for (size_t i = 0; i < count; i++) {
        crc ^= bytes[i];
        crc = (crc >> 4) ^ table[crc & 15u];
        crc = (crc >> 4) ^ table[crc & 15u];
    }
    return ~crc;
}

/* CLOCK_MONOTONIC in ns; -1, which is before every heartbeat, where there is none. */
static inline int64_t ks_now(void)
{
    struct timespec now;
    if (clock_gettime(CLOCK_MONOTONIC, &now) != 0)
        return -1;
    return (int64_t)now.tv_sec * 1000000000 + (int64_t)now.tv_nsec;
}

/* Map the file, or leave `map` NULL. A shorter file is refused: access beyond its end would be SIGBUS. */
static inline bool ks_map(ks_page *page)
{
    ks_close(page);
    int fd = open(page->path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0)
        return false;
    struct stat found;
    if (fstat(fd, &found) == 0 && S_ISREG(found.st_mode) && found.st_size >= KS_BYTES) {
        void *map = mmap(NULL, KS_BYTES, PROT_READ, MAP_SHARED, fd, 0);
        if (map != MAP_FAILED) {
            page->map = map;
            page->device = found.st_dev;
            page->inode = found.st_ino;
        }
    }
    (void)close(fd);
    return page->map != NULL;
}

/* Whether the path leads to another file than the one mapped: a volume may have been made anew. */
static inline bool ks_was_replaced(const ks_page *page)
{
    struct stat found;
    return stat(page->path, &found) == 0 && (found.st_dev != page->device || found.st_ino != page->inode);
}

/* Copy the page; false where a write was seen to go on meanwhile. The copy is made in either case. */
static inline bool ks_copy(const ks_page *page, uint64_t copy[KS_WORDS])
{
    const ks_word *words = (const ks_word *)page->map;
    copy[1] = KS_LOAD(words[1], acquire); /* the sequence first: no later load moves before it ... */
    for (int i = 0; i < KS_WORDS; i++)
        if (i != 1)
            copy[i] = KS_LOAD(words[i], relaxed);
    KS_ACQUIRE(); /* ... and none moves behind the second look at it, or behind the clock */
    return (copy[1] & 1u) == 0 && KS_LOAD(words[1], relaxed) == copy[1];
}

/* Whether a copy is a page, and all of one write. */
static inline bool ks_is_whole(const uint64_t copy[KS_WORDS])
{
    unsigned char bytes[KS_BYTES];
    memcpy(bytes, copy, KS_BYTES);
    uint32_t crc = (uint32_t)copy[7];
    uint32_t zero = (uint32_t)(copy[7] >> 32);
    return memcmp(bytes, "KSWPAGE1", 8) == 0 && zero == 0 && crc == ks_crc32(bytes, KS_CRC_COVERS);
}

/* Keep a whole copy and unpack it. */
static inline void ks_keep(ks_page *page, const uint64_t copy[KS_WORDS])
{
    memcpy(page->seen, copy, KS_BYTES);
    page->has_seen = true;
    page->snapshot.heartbeat = copy[2];
    page->snapshot.state = (uint32_t)copy[3];
    page->snapshot.restriction = (uint32_t)(copy[3] >> 32);
    memcpy(&page->snapshot.factor, &copy[4], sizeof page->snapshot.factor);
    page->snapshot.epoch = copy[5];
    page->snapshot.lease = copy[6];
}

/* Get a whole copy into `seen`, and the clock after it; false after KS_PATIENCE_NS of none. */
static inline bool ks_read_whole(ks_page *page, int64_t *now)
{
    uint64_t copy[KS_WORDS];
    int64_t until = 0;
    for (int tries = 0;; tries++) {
        bool steady = ks_copy(page, copy);
        *now = ks_now();
        if (steady && page->has_seen && memcmp(copy, page->seen, KS_BYTES) == 0)
            return true; /* equal bytes have an equal CRC */
        if (steady && ks_is_whole(copy)) {
            ks_keep(page, copy);
            return true;
        }
        if (tries == 0)
            until = *now + KS_PATIENCE_NS;
        /* What stayed the same through a whole wait belongs to a dead writer: it is not waited for again. */
        bool dead = page->has_given_up && memcmp(copy, page->given_up_on, KS_BYTES) == 0;
        if (dead || *now < 0 || *now >= until) {
            memcpy(page->given_up_on, copy, KS_BYTES);
            page->has_given_up = true;
            return false;
        }
        if (tries < 20) {
            (void)sched_yield();
        } else {
            struct timespec pause = {0, 100000};
            (void)nanosleep(&pause, NULL);
        }
    }
}

static inline ks_answer ks_check_mapped(ks_page *page)
{
    int64_t now;
    if (!ks_read_whole(page, &now))
        return KS_STALE;
    const ks_snapshot *said = &page->snapshot;
    /* In signed numbers, for a heartbeat of the future must not become a huge age; 0 is a sidecar that stopped. */
    if (said->heartbeat == 0 || said->heartbeat > (uint64_t)INT64_MAX || now < (int64_t)said->heartbeat)
        return KS_STALE;
    if ((uint64_t)(now - (int64_t)said->heartbeat) > said->lease)
        return KS_STALE;
    /* Values of no known meaning are a newer sidecar's, and no permission. Written so that NaN is none either. */
    if (said->state > KS_DISABLED || said->restriction > 2 || !(said->factor >= 0.0 && said->factor <= 1.0))
        return KS_HALT;
    if (said->restriction == 2)
        return KS_HALT;
    if (said->restriction == 1)
        return KS_REDUCE_ONLY;
    return said->factor < 1.0 ? KS_THROTTLED : KS_ALLOW;
}

/*
 * Say what may be sent now. `page->snapshot` then says why, except after KS_STALE.
 *
 * Never blocks for longer than KS_PATIENCE_NS, and for that only when a writer was killed in mid-write.
 */
static inline ks_answer ks_check(ks_page *page)
{
    if (!page->map && !ks_map(page))
        return KS_STALE;
    ks_answer answer = ks_check_mapped(page);
    if (answer == KS_STALE && ks_was_replaced(page))
        return ks_map(page) ? ks_check_mapped(page) : KS_STALE;
    return answer;
}

#endif /* KILLSWITCH_STATE_PAGE_H */
