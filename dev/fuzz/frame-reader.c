/*
 * libFuzzer target: the reader of net/frame-stream.c
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The input is a program that writes to connections, in chunks of any size,
 * and that says when the handler refuses frames, when it goes on, and when a
 * connection ends.  What the reader hands out is compared with the bytes that
 * were written, frame by frame.
 *
 * The character device and the main loop are replaced by what is below.  What
 * only the writer calls does not exist.
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "chardev/char-fe.h"
#include "net/frame-stream.h"

/*
 * One run does no more: it is enough to fill the reader.  Most do less, since
 * to copy and compare so much takes nearly all of the time.
 */
#define MAX_BYTES (5 * MiB / 4)
#define MAX_BYTES_MOSTLY (3 * FRAME_STREAM_MAX_PAYLOAD)
#define MAX_PART (8 + FRAME_STREAM_MAX_PAYLOAD + 1)
#define MAX_CHUNKS 16           /* of a part */

static struct {
    FrameReader *fr;
    bool vnet_hdr;
    size_t prefix;              /* what is before a payload */
    bool resets_at_once;        /* whether a disconnect is seen at once */
    bool over_room;             /* whether more is pushed than there is room */
    size_t chunk;
    size_t max_bytes;

    uint8_t bytes[MAX_BYTES];   /* all that were written */
    size_t total;
    size_t at;                  /* the frame that the handler takes next */
    bool broken;                /* the reader has seen an invalid length */
    unsigned connection;        /* counts them */
    uint64_t errors;            /* connections with an invalid length */

    size_t accept;              /* before it refuses */
    bool refused;
    bool in_handler;
} f;

static uint64_t errors;         /* as the readers count them */

/* The reference */

/* The length of the frame at @at; 0: it is not complete; -1: it is invalid. */
static ssize_t frame_len(size_t at)
{
    uint32_t size;

    if (f.total - at < f.prefix) {
        return 0;
    }
    size = ldl_be_p(f.bytes + at);
    if (size > FRAME_STREAM_MAX_PAYLOAD) {
        return -1;
    }
    return f.total - at < f.prefix + size ? 0 : f.prefix + size;
}

/* What the peer had written of a frame is lost with the connection. */
static void reconnect(void)
{
    size_t at = f.at;
    ssize_t len;

    frame_reader_reset(f.fr);
    while ((len = frame_len(at)) > 0) {
        at += len;
    }
    f.total = at;
    f.broken = false;
    f.connection++;
}

/* The character device */

static Chardev fuzz_chardev = { .label = (char *)"fuzz" };

void qemu_chr_fe_disconnect(CharFrontend *be)
{
    assert(!f.in_handler);
    assert(!f.broken && frame_len(f.at) < 0);
    f.broken = true;
    f.errors++;
    f.total = f.at;
    if (f.resets_at_once) {
        reconnect();
    }
}

void error_report(const char *fmt, ...)
{
}

/* The main loop: one bottom half */

struct QEMUBH {
    QEMUBHFunc *cb;
    void *opaque;
};

static QEMUBH *scheduled;

QEMUBH *qemu_bh_new_full(QEMUBHFunc *cb, void *opaque, const char *name,
                         MemReentrancyGuard *guard)
{
    QEMUBH *bh = g_new(QEMUBH, 1);

    *bh = (QEMUBH) { cb, opaque };
    return bh;
}

void qemu_bh_schedule(QEMUBH *bh)
{
    scheduled = bh;
}

void qemu_bh_cancel(QEMUBH *bh)
{
    if (scheduled == bh) {
        scheduled = NULL;
    }
}

void qemu_bh_delete(QEMUBH *bh)
{
    qemu_bh_cancel(bh);
    g_free(bh);
}

static bool run_bh(void)
{
    QEMUBH *bh = scheduled;

    scheduled = NULL;
    if (bh) {
        bh->cb(bh->opaque);
    }
    return bh != NULL;
}

static size_t handler(void *opaque, const StreamFrame *frames, size_t n)
{
    size_t done = MIN(n, f.accept), at = f.at;

    assert(opaque == &f && !f.in_handler && !f.refused);
    assert(n >= 1 && n <= FRAME_READER_BATCH);
    f.in_handler = true;
    for (size_t i = 0; i < n; i++) {
        const uint8_t *want = f.bytes + at;
        ssize_t len = frame_len(at);

        /* Also of those that are refused. */
        assert(len > 0 && frames[i].size == len - f.prefix);
        assert(frames[i].vnet_hdr_len ==
               (f.vnet_hdr ? ldl_be_p(want + 4) : 0));
        assert(!memcmp(frames[i].payload, want + f.prefix, frames[i].size));
        at += len;
        if (i < done) {
            f.at = at;
        }
    }
    f.accept -= done;
    f.refused = done < n;
    /* It may be called from within. */
    frame_reader_resume(f.fr);
    f.in_handler = false;
    return done;
}

/* The actions */

static void check_room(void)
{
    size_t held = f.total - f.at;

    assert(frame_reader_room(f.fr) ==
           FRAME_READER_LIMIT - MIN(held, FRAME_READER_LIMIT));
    assert(frame_reader_empty(f.fr) == !held);
    assert(errors == f.errors);
}

static void resume(size_t accept)
{
    f.accept = accept;
    f.refused = false;
    frame_reader_resume(f.fr);
    check_room();
}

static void finish(void)
{
    resume(SIZE_MAX);
    while (run_bh()) {
        check_room();
    }
    assert(!frame_len(f.at));
}

static void push(const uint8_t *buf, size_t size)
{
    unsigned connection = f.connection;
    size_t max_chunk = MAX(f.chunk, DIV_ROUND_UP(size, MAX_CHUNKS));

    while (size && connection == f.connection && f.total < f.max_bytes) {
        /* A copy, so that a read behind its end is seen */
        g_autofree uint8_t *copy = NULL;
        size_t chunk = MIN(MIN(size, max_chunk), f.max_bytes - f.total);

        if (!f.over_room) {
            chunk = MIN(chunk, frame_reader_room(f.fr));
        }
        if (!chunk) {
            assert(frame_len(f.at) > 0);
            finish();
            continue;
        }
        copy = g_memdup2(buf, chunk);
        if (!f.broken) {
            memcpy(f.bytes + f.total, buf, chunk);
            f.total += chunk;
        }
        frame_reader_push(f.fr, copy, chunk);
        check_room();
        buf += chunk;
        size -= chunk;
    }
}

static void push_frame(size_t size)
{
    static uint8_t frame[MAX_PART];
    static uint32_t number;

    stl_be_p(frame, size);
    stl_be_p(frame + 4, number++);
    for (size_t i = 0; i + 4 <= size; i += 512) {
        stl_be_p(frame + f.prefix + i, number * 0x9e3779b1 + i);
    }
    push(frame, f.prefix + size);
}

static void run(const uint8_t *data, size_t size)
{
    const uint8_t *end = data + size;

    while (data < end) {
        unsigned action = *data & 7, arg = *data >> 3;

        data++;
        switch (action) {
        case 0:         /* bytes */
        case 1:
            arg = MIN(arg + 1, end - data);
            push(data, arg);
            data += arg;
            break;
        case 2:         /* a frame, which may be one byte too long */
            if (arg == 31) {
                push_frame(FRAME_STREAM_MAX_PAYLOAD + 1);
            } else if (arg >= 28) {
                push_frame(FRAME_STREAM_MAX_PAYLOAD - (30 - arg) * 1000);
            } else {
                push_frame(arg * arg * 2);
            }
            break;
        case 3:         /* small frames */
            for (unsigned i = 0; i < arg * 8; i++) {
                push_frame(i % 64);
            }
            break;
        case 4:
            f.accept = arg < 31 ? arg : SIZE_MAX;
            break;
        case 5:
            resume(arg < 31 ? arg * 8 : SIZE_MAX);
            break;
        case 6:
            if (arg & 1) {
                reconnect();
            } else {
                run_bh();
            }
            break;
        case 7:
            f.chunk = 1ul << arg;
            break;
        }
        check_room();
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    /* A new one each time would take most of the time, for its buffer. */
    static FrameReader *readers[2];
    static CharFrontend chr = { .chr = &fuzz_chardev };

    if (!size) {
        return 0;
    }
    f.vnet_hdr = *data & 1;
    f.prefix = f.vnet_hdr ? 8 : 4;
    f.resets_at_once = *data & 2;
    f.over_room = (*data & 0x1c) == 0x18;
    f.max_bytes = (*data & 0xe0) == 0xe0 ? MAX_BYTES : MAX_BYTES_MOSTLY;
    f.chunk = f.accept = SIZE_MAX;
    f.total = f.at = 0;
    f.broken = f.refused = false;
    f.errors = errors;
    if (!readers[f.vnet_hdr]) {
        readers[f.vnet_hdr] = frame_reader_new(&chr, f.vnet_hdr, &errors,
                                               handler, &f);
    }
    f.fr = readers[f.vnet_hdr];
    run(data + 1, size - 1);
    if ((*data & 0x1c) == 0x1c) {
        frame_reader_reset(f.fr);
        frame_reader_close(f.fr);
        readers[f.vnet_hdr] = NULL;
    } else {
        finish();
        reconnect();
    }
    return 0;
}
