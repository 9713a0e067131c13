/*
 * libFuzzer target: the reader of net/frame-stream.c
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The input is a program that writes to connections, in chunks of any size,
 * and that says when the handler refuses frames, when it goes on, and when a
 * connection ends.  What the reader hands out is compared with what a trivial
 * parser finds in all bytes of each connection together.
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
#define MAX_FRAMES 400
#define MAX_PART (8 + FRAME_STREAM_MAX_PAYLOAD + 1)
#define MAX_CHUNKS 16           /* of a part */

typedef struct Expected {
    size_t at;                  /* of the payload in bytes[] */
    size_t size;
    uint32_t vnet_hdr_len;
} Expected;

static struct {
    FrameReader *fr;
    bool vnet_hdr;
    bool resets_at_once;        /* whether a disconnect is seen at once */
    bool over_room;             /* whether more is pushed than there is room */
    size_t chunk;
    size_t max_bytes;

    /* What the reference knows: all bytes that the reader took ... */
    uint8_t bytes[MAX_BYTES];
    size_t total;
    size_t start;               /* of the last frame, not complete yet */
    bool bad;                   /* its length is too large, ... */
    bool broken;                /* ... and the reader has seen that */
    unsigned connection;        /* counts them */
    uint64_t errors;            /* connections with a bad length */
    /* ... and the frames that are in them */
    Expected frames[MAX_FRAMES];
    size_t n_frames;
    size_t n_seen;

    size_t accept;              /* before it refuses */
    bool refused;
    bool in_handler;
} f;

static uint64_t errors;         /* as the readers count them */

/* What the peer had written of a frame is lost with the connection. */
static void reconnect(void)
{
    frame_reader_reset(f.fr);
    f.total = f.start;
    f.bad = f.broken = false;
    f.connection++;
}

/* The character device */

static Chardev fuzz_chardev = { .label = (char *)"fuzz" };

void qemu_chr_fe_disconnect(CharFrontend *be)
{
    assert(!f.in_handler);
    assert(f.bad && !f.broken);
    assert(f.n_seen == f.n_frames);
    f.broken = true;
    f.errors++;
    f.total = f.start;
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

/* The reference */

static size_t prefix_len(void)
{
    return f.vnet_hdr ? 8 : 4;
}

/* Find the frames that are complete with the bytes that have come. */
static void parse(void)
{
    size_t prefix = prefix_len();

    while (!f.bad && f.total - f.start >= prefix) {
        uint32_t size = ldl_be_p(f.bytes + f.start);

        if (size > FRAME_STREAM_MAX_PAYLOAD) {
            f.bad = true;
        } else if (f.total - f.start < prefix + size) {
            break;
        } else {
            assert(f.n_frames < MAX_FRAMES);
            f.frames[f.n_frames++] = (Expected) {
                .at = f.start + prefix,
                .size = size,
                .vnet_hdr_len = f.vnet_hdr ? ldl_be_p(f.bytes + f.start + 4)
                                           : 0,
            };
            f.start += prefix + size;
        }
    }
}

/* The bytes that the reader must hold. */
static size_t held(void)
{
    return f.total - (f.n_seen < f.n_frames ?
                      f.frames[f.n_seen].at - prefix_len() : f.start);
}

static size_t handler(void *opaque, const StreamFrame *frames, size_t n)
{
    size_t done = 0;

    assert(opaque == &f && !f.in_handler && !f.refused);
    assert(n >= 1 && n <= FRAME_READER_BATCH);
    f.in_handler = true;
    for (size_t i = 0; i < n; i++) {
        Expected *want = &f.frames[f.n_seen + i];

        /* Also of those that are refused. */
        assert(f.n_seen + i < f.n_frames);
        assert(frames[i].size == want->size);
        assert(frames[i].vnet_hdr_len == want->vnet_hdr_len);
        assert(!memcmp(frames[i].payload, f.bytes + want->at, want->size));
    }
    done = MIN(n, f.accept);
    f.accept -= done;
    f.n_seen += done;
    f.refused = done < n;
    /* It may be called from within. */
    frame_reader_resume(f.fr);
    f.in_handler = false;
    return done;
}

/* The actions */

static void check_room(void)
{
    assert(frame_reader_room(f.fr) ==
           FRAME_READER_LIMIT - MIN(held(), FRAME_READER_LIMIT));
    assert(frame_reader_empty(f.fr) == !held());
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
    assert(f.n_seen == f.n_frames);
    assert(f.broken == f.bad);
}

static void push(const uint8_t *buf, size_t size)
{
    /* Bytes are pushed from its end, so that a read behind them is seen. */
    static uint8_t *room;
    unsigned connection = f.connection;
    size_t max_chunk = MAX(f.chunk, DIV_ROUND_UP(size, MAX_CHUNKS));

    room = room ?: g_malloc(MAX_PART);
    while (size && connection == f.connection &&
           f.total < f.max_bytes && f.n_frames < MAX_FRAMES) {
        size_t chunk = MIN(MIN(size, max_chunk), f.max_bytes - f.total);
        uint8_t *copy;

        /* No more frames than there is room for the expectation. */
        chunk = MIN(chunk, (MAX_FRAMES - f.n_frames) * prefix_len());
        if (!f.over_room) {
            chunk = MIN(chunk, frame_reader_room(f.fr));
        }
        if (!chunk) {
            assert(f.n_seen < f.n_frames);
            finish();
            continue;
        }
        copy = memcpy(room + MAX_PART - chunk, buf, chunk);
        if (!f.broken) {
            memcpy(f.bytes + f.total, buf, chunk);
            f.total += chunk;
            parse();
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
    size_t prefix = prefix_len();

    stl_be_p(frame, size);
    stl_be_p(frame + 4, number++);
    for (size_t i = 0; i + 4 <= size; i += 512) {
        stl_be_p(frame + prefix + i, number * 0x9e3779b1 + i);
    }
    push(frame, prefix + size);
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
    f.resets_at_once = *data & 2;
    f.over_room = (*data & 0x1c) == 0x18;
    f.max_bytes = (*data & 0xe0) == 0xe0 ? MAX_BYTES : MAX_BYTES_MOSTLY;
    f.chunk = f.accept = SIZE_MAX;
    f.total = f.start = f.n_frames = f.n_seen = 0;
    f.bad = f.broken = f.refused = false;
    if (!readers[f.vnet_hdr]) {
        readers[f.vnet_hdr] = frame_reader_new(&chr, f.vnet_hdr, &errors,
                                               handler, &f);
    }
    f.fr = readers[f.vnet_hdr];
    f.errors = errors;
    run(data + 1, size - 1);
    if ((*data & 0x1c) == 0x1c) {
        frame_reader_reset(f.fr);
        frame_reader_close(f.fr);
        readers[f.vnet_hdr] = NULL;
    } else {
        finish();
        reconnect();
        resume(0);
    }
    return 0;
}
