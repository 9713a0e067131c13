/*
 * Frames over a character device
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Theory of operation
 *
 * Writer and reader have one contiguous buffer each, in the format of the
 * stream: a batch of frames is one write, and a frame is handed out where it
 * was read to.
 *
 *   writer   | written |cut off| staged          |    free           |
 *            0         first   head              tail             size
 *
 *   reader   |         | complete frames | part  |    free           |
 *            0         head                      tail             size
 *
 * "first" is the start of the first frame that is not written completely: a
 * new connection begins there.
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qapi/error.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/timer.h"
#include "chardev/char.h"
#include "net/frame-stream.h"

/* Until another try, if the device tells nothing; or until memory is freed */
#define FRAME_WRITER_RETRY_MS 10

/* A larger buffer is freed when it has become empty. */
#define FRAME_WRITER_KEEP (1 * MiB)

/* How many batches are handed out before others get their turn. */
#define FRAME_READER_BATCHES 4

typedef struct FrameBuffer {
    uint8_t *data;
    size_t size;
    size_t head;
    size_t tail;
} FrameBuffer;

struct FrameWriter {
    CharFrontend *chr;
    bool vnet_hdr;
    FrameBuffer buf;
    size_t first;
    size_t limit;
    guint watch;
    QEMUTimer *retry;
    /* Tells whether something was discarded, or rewound, during a write. */
    unsigned generation;
    FrameWriterProgress *progress;
    void *opaque;
};

struct FrameReader {
    CharFrontend *chr;
    bool vnet_hdr;
    /* A length was invalid: the rest of this connection is ignored. */
    bool broken;
    bool waiting;
    bool running;
    FrameBuffer buf;
    uint64_t *errors;
    FrameReaderHandler *handler;
    void *opaque;
    QEMUBH *bh;
};

static size_t frame_prefix_len(bool vnet_hdr)
{
    return vnet_hdr ? 8 : 4;
}

/* A hub mixes streams, a mux takes bytes as commands, and UDP loses some. */
bool frame_stream_check(CharFrontend *chr, Error **errp)
{
    if (object_dynamic_cast(OBJECT(chr->chr), TYPE_CHARDEV_HUB) ||
        object_dynamic_cast(OBJECT(chr->chr), TYPE_CHARDEV_MUX) ||
        object_dynamic_cast(OBJECT(chr->chr), TYPE_CHARDEV_UDP)) {
        error_setg(errp, "chardev '%s' cannot carry frames (it is a hub, udp, "
                   "or has mux=on); use a socket", chr->chr->label);
        return false;
    }
    return true;
}

static void frame_writer_retry(void *opaque)
{
    FrameWriter *fw = opaque;

    if (frame_writer_empty(fw)) {
        /* Nothing is left to write. */
        g_free(fw->buf.data);
        fw->buf = (FrameBuffer) { };
        fw->first = 0;
        return;
    }
    frame_writer_flush(fw, false);
    fw->progress(fw->opaque);
}

FrameWriter *frame_writer_new(CharFrontend *chr, bool vnet_hdr, size_t limit,
                              FrameWriterProgress *progress, void *opaque)
{
    FrameWriter *fw = g_new0(FrameWriter, 1);

    fw->chr = chr;
    fw->vnet_hdr = vnet_hdr;
    fw->limit = limit;
    fw->progress = progress;
    fw->opaque = opaque;
    fw->retry = timer_new_ms(QEMU_CLOCK_REALTIME, frame_writer_retry, fw);
    return fw;
}

static void frame_writer_unwatch(FrameWriter *fw)
{
    if (fw->watch) {
        g_source_remove(fw->watch);
        fw->watch = 0;
    }
    timer_del(fw->retry);
}

uint8_t *frame_writer_reserve(FrameWriter *fw, size_t size)
{
    FrameBuffer *buf = &fw->buf;
    size_t room = frame_prefix_len(fw->vnet_hdr) + size;
    size_t used = buf->tail - fw->first;

    if (buf->size - buf->tail < room && fw->first > 0 &&
        fw->first >= buf->size / 8) {
        /* Not for less than an eighth, which would cost too much. */
        memmove(buf->data, buf->data + fw->first, used);
        buf->head -= fw->first;
        buf->tail = used;
        fw->first = 0;
    }
    if (buf->size - buf->tail < room) {
        /* Double it, but up to 5/4 of the limit only. */
        buf->size = MAX(MIN(2 * buf->size, fw->limit / 4 * 5),
                        buf->tail + room);
        buf->data = g_realloc(buf->data, buf->size);
    }
    return buf->data + buf->tail + frame_prefix_len(fw->vnet_hdr);
}

void frame_writer_commit(FrameWriter *fw, uint32_t vnet_hdr_len, size_t size)
{
    FrameBuffer *buf = &fw->buf;

    /* The caller has checked this. */
    assert(size <= FRAME_STREAM_MAX_PAYLOAD);
    stl_be_p(buf->data + buf->tail, size);
    if (fw->vnet_hdr) {
        stl_be_p(buf->data + buf->tail + 4, vnet_hdr_len);
    }
    buf->tail += frame_prefix_len(fw->vnet_hdr) + size;
}

bool frame_writer_full(const FrameWriter *fw)
{
    return fw->buf.tail - fw->buf.head >= fw->limit;
}

bool frame_writer_empty(const FrameWriter *fw)
{
    return fw->buf.head == fw->buf.tail;
}

/* The end of the frame that begins at @at. */
static size_t frame_writer_end(const FrameWriter *fw, size_t at)
{
    return at + frame_prefix_len(fw->vnet_hdr) + ldl_be_p(fw->buf.data + at);
}

static void frame_writer_advance(FrameWriter *fw, size_t written)
{
    fw->buf.head += written;
    if (fw->buf.head == fw->buf.tail) {
        fw->first = fw->buf.head = fw->buf.tail = 0;
        return;
    }
    while (fw->first < fw->buf.head &&
           frame_writer_end(fw, fw->first) <= fw->buf.head) {
        fw->first = frame_writer_end(fw, fw->first);
    }
}

static gboolean frame_writer_writable(void *do_not_use, GIOCondition cond,
                                      void *opaque)
{
    FrameWriter *fw = opaque;

    fw->watch = 0;
    frame_writer_retry(fw);
    return G_SOURCE_REMOVE;
}

static void frame_writer_retry_later(FrameWriter *fw)
{
    timer_mod(fw->retry, qemu_clock_get_ms(QEMU_CLOCK_REALTIME) +
                         FRAME_WRITER_RETRY_MS);
}

static void frame_writer_wait(FrameWriter *fw)
{
    fw->watch = qemu_chr_fe_add_watch(fw->chr, G_IO_OUT | G_IO_HUP,
                                      frame_writer_writable, fw);
    if (!fw->watch) {
        frame_writer_retry_later(fw);
    }
}

int frame_writer_flush(FrameWriter *fw, bool now)
{
    FrameBuffer *buf = &fw->buf;

    if (now) {
        frame_writer_unwatch(fw);
    } else if (fw->watch) {
        return 0;
    }
    while (buf->head < buf->tail) {
        unsigned generation = fw->generation;
        int ret = qemu_chr_fe_write(fw->chr, buf->data + buf->head,
                                    MIN(buf->tail - buf->head, INT_MAX));

        if (generation != fw->generation) {
            /* The write closed the connection, and the handler has run. */
            return 0;
        }
        if (ret < 0 && errno == EAGAIN) {
            frame_writer_wait(fw);
            return 0;
        }
        if (ret <= 0) {
            int err = ret < 0 ? -errno : -EIO;

            if (qemu_chr_fe_backend_open(fw->chr)) {
                frame_writer_retry_later(fw);
            }
            return err;
        }
        frame_writer_advance(fw, ret);
    }
    if (buf->size > FRAME_WRITER_KEEP) {
        frame_writer_retry_later(fw);
    }
    return 0;
}

uint64_t frame_writer_discard(FrameWriter *fw)
{
    FrameBuffer *buf = &fw->buf;
    size_t keep = fw->first;
    uint64_t frames = 0;

    if (fw->first < buf->head) {
        keep = frame_writer_end(fw, fw->first);
    }
    for (size_t at = keep; at < buf->tail; at = frame_writer_end(fw, at)) {
        frames++;
    }
    buf->tail = keep;
    fw->generation++;
    if (buf->size > FRAME_WRITER_KEEP) {
        frame_writer_retry_later(fw);   /* this may be during a write of it */
    }
    return frames;
}

void frame_writer_rewind(FrameWriter *fw)
{
    frame_writer_unwatch(fw);
    fw->buf.head = fw->first;
    fw->generation++;
}

uint64_t frame_writer_close(FrameWriter *fw)
{
    uint64_t lost;

    if (fw->first < fw->buf.head) {
        qemu_chr_fe_disconnect(fw->chr);
    }
    frame_writer_rewind(fw);
    lost = frame_writer_discard(fw);
    timer_free(fw->retry);
    g_free(fw->buf.data);
    g_free(fw);
    return lost;
}

static void frame_reader_bh(void *opaque)
{
    frame_reader_resume(opaque);
}

FrameReader *frame_reader_new(CharFrontend *chr, bool vnet_hdr,
                              uint64_t *errors, FrameReaderHandler *handler,
                              void *opaque)
{
    FrameReader *fr = g_new0(FrameReader, 1);

    fr->chr = chr;
    fr->vnet_hdr = vnet_hdr;
    fr->errors = errors;
    fr->handler = handler;
    fr->opaque = opaque;
    fr->bh = qemu_bh_new(frame_reader_bh, fr);
    return fr;
}

size_t frame_reader_room(const FrameReader *fr)
{
    size_t used = fr->buf.tail - fr->buf.head;

    return FRAME_READER_LIMIT - MIN(used, FRAME_READER_LIMIT);
}

bool frame_reader_empty(const FrameReader *fr)
{
    return fr->buf.head == fr->buf.tail;
}

/*
 * The length of the frame at @at in the buffer with its prefix, 0 when it is
 * not complete yet, or a negative errno.
 */
static ssize_t frame_reader_peek(const FrameReader *fr, size_t at)
{
    const FrameBuffer *buf = &fr->buf;
    size_t prefix = frame_prefix_len(fr->vnet_hdr);
    size_t have = buf->tail - at;
    uint32_t size;

    if (have < prefix) {
        return 0;
    }
    size = ldl_be_p(buf->data + at);
    if (size > FRAME_STREAM_MAX_PAYLOAD) {
        return -EMSGSIZE;
    }
    return have < prefix + size ? 0 : prefix + size;
}

/* A peer can do this over and over again, so tell it once. */
static void frame_reader_break(FrameReader *fr)
{
    if (!(*fr->errors)++) {
        error_report("chardev '%s': invalid frame length %" PRIu32
                     " (maximum %d); closing the connection",
                     fr->chr->chr->label,
                     ldl_be_p(fr->buf.data + fr->buf.head),
                     FRAME_STREAM_MAX_PAYLOAD);
    }
    fr->buf.head = fr->buf.tail = 0;
    fr->broken = true;
    qemu_chr_fe_disconnect(fr->chr);
}

/* Hand out a batch.  Returns false when no more can be handed out now. */
static bool frame_reader_hand_out(FrameReader *fr)
{
    FrameBuffer *buf = &fr->buf;
    size_t prefix = frame_prefix_len(fr->vnet_hdr);
    StreamFrame frames[FRAME_READER_BATCH];
    size_t n = 0, done, at = buf->head;
    ssize_t len = 0;

    while (n < FRAME_READER_BATCH && (len = frame_reader_peek(fr, at)) > 0) {
        frames[n].payload = buf->data + at + prefix;
        frames[n].size = len - prefix;
        frames[n].vnet_hdr_len = fr->vnet_hdr ?
                                 ldl_be_p(buf->data + at + 4) : 0;
        at += len;
        n++;
    }
    if (n) {
        done = fr->handler(fr->opaque, frames, n);
        if (done < n) {
            buf->head = frames[done].payload - prefix - buf->data;
            fr->waiting = true;
            return false;
        }
        buf->head = at;
    }
    if (len < 0) {
        frame_reader_break(fr);
    }
    return len > 0;
}

void frame_reader_resume(FrameReader *fr)
{
    FrameBuffer *buf = &fr->buf;
    unsigned batches = 0;

    if (fr->running) {
        return;
    }
    fr->running = true;
    fr->waiting = false;
    qemu_bh_cancel(fr->bh);
    while (frame_reader_hand_out(fr)) {
        if (++batches == FRAME_READER_BATCHES) {
            qemu_bh_schedule(fr->bh);
            fr->waiting = true;
            break;
        }
    }
    fr->running = false;
    if (buf->head == buf->tail) {
        buf->head = buf->tail = 0;
    }
}

void frame_reader_push(FrameReader *fr, const uint8_t *data, size_t size)
{
    FrameBuffer *buf = &fr->buf;
    size_t used = buf->tail - buf->head;

    if (fr->broken) {
        return;
    }
    if (buf->head && buf->size - buf->tail < size) {
        memmove(buf->data, buf->data + buf->head, used);
        buf->tail = used;
        buf->head = 0;
    }
    if (buf->size - buf->tail < size) {
        buf->size = ROUND_UP(used + size, FRAME_READER_LIMIT);
        buf->data = g_realloc(buf->data, buf->size);
    }
    memcpy(buf->data + buf->tail, data, size);
    buf->tail += size;
    if (!fr->waiting) {
        frame_reader_resume(fr);
    }
}

/* Where the incomplete frame begins, or where the next one will. */
static size_t frame_reader_complete(const FrameReader *fr)
{
    size_t at = fr->buf.head;
    ssize_t len;

    while ((len = frame_reader_peek(fr, at)) > 0) {
        at += len;
    }
    return at;
}

void frame_reader_reset(FrameReader *fr)
{
    fr->buf.tail = frame_reader_complete(fr);
    fr->broken = false;
}

void frame_reader_close(FrameReader *fr)
{
    if (frame_reader_complete(fr) < fr->buf.tail) {
        qemu_chr_fe_disconnect(fr->chr);
    }
    qemu_bh_delete(fr->bh);
    g_free(fr->buf.data);
    g_free(fr);
}
