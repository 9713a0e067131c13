/*
 * Frames over a character device: unit tests
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The writer and the reader run on a real socket character device; the test
 * is the peer at the other end of the connection.
 */

#include "qemu/osdep.h"
#include "qemu/units.h"
#include "net/frame-stream.h"
#include "chardev/char-fe.h"
#include "chardev/char-socket.h"
#include "io/channel-socket.h"
#include "qapi/error.h"
#include "qemu/aio.h"
#include "qemu/bswap.h"
#include "qemu/config-file.h"
#include "qemu/main-loop.h"
#include "qemu/module.h"
#include "qemu/option.h"
#include "qemu/sockets.h"
#include "qom/object.h"
#include "system/system.h"
#include <sys/resource.h>
#include <sys/un.h>

#define LIMIT_S 60

/* What a writer holds, in bytes */
#define WRITER_LIMIT (1 * MiB)

/* Some room for the lengths, and for how an implementation counts */
#define SLACK (FRAME_STREAM_MAX_PAYLOAD + 64)

/* What a frame may take in memory besides its bytes, and allocators' habits */
#define MEMORY_LIMIT (24 * MiB)

#define FUZZ_SEED 0x5eed0001
#define FUZZ_STEPS 20000

static gboolean expired(gpointer what)
{
    g_error("not within %d s: %s", LIMIT_S, (const char *)what);
    return G_SOURCE_REMOVE;
}

/*
 * Run the main loop until a state is reached.  It must not block, since the
 * condition may be what brings this about, by what it does as the peer.
 */
#define AWAIT(condition) do {                                           \
        guint tag_ = g_timeout_add_seconds(LIMIT_S, expired,            \
                                           (gpointer)#condition);       \
        while (!(condition)) {                                          \
            main_loop_wait(true);                                       \
        }                                                               \
        g_source_remove(tag_);                                          \
    } while (0)

/* Let everything happen that can without anything from outside. */
static void settle(void)
{
    for (int i = 0; i < 20; i++) {
        main_loop_wait(true);
    }
}

/* Count and keep what is reported as an error between these two. */
static int saved_stderr, captured_stderr;
static char errors_text[4096];

static void errors_begin(void)
{
    g_autofree char *path = NULL;

    fflush(stderr);
    saved_stderr = dup(STDERR_FILENO);
    captured_stderr = g_file_open_tmp("frame-stream-XXXXXX", &path, NULL);
    g_assert_cmpint(captured_stderr, >=, 0);
    unlink(path);
    g_assert_cmpint(dup2(captured_stderr, STDERR_FILENO), >=, 0);
}

static unsigned errors_end(void)
{
    unsigned lines = 0;
    ssize_t len;

    memset(errors_text, 0, sizeof(errors_text));
    fflush(stderr);
    dup2(saved_stderr, STDERR_FILENO);
    close(saved_stderr);
    len = pread(captured_stderr, errors_text, sizeof(errors_text) - 1, 0);
    g_assert_cmpint(len, >=, 0);
    close(captured_stderr);
    for (ssize_t i = 0; i < len; i++) {
        lines += errors_text[i] == '\n';
    }
    return lines;
}

/*
 * A connection: the character device with a writer or a reader, and the peer
 */
typedef struct Link {
    Chardev *chr;
    CharFrontend fe;
    char *dir, *path;
    int peer;
    unsigned opened, closed;

    FrameWriter *fw;
    bool vnet_hdr;
    bool calling;               /* a function of the writer */
    unsigned progress;
    void (*on_progress)(struct Link *link);
    uint32_t next_seq;
    GByteArray *expected;       /* what the stream has to be */

    FrameReader *fr;
    unsigned wait_after;        /* frames before the handler says WAIT */
    bool waiting;
    bool scribble;              /* over the payload in the handler */
    GPtrArray *frames;          /* of GByteArray, as handed out */
    GArray *vnet_hdr_lens;
    unsigned calls;             /* of the handler */
} Link;

/* Let the reader hand out all that it does. */
static void settle_reader(Link *link)
{
    unsigned before;

    do {
        before = link->frames->len;
        settle();
    } while (link->frames->len > before);
}

static void link_event(void *opaque, QEMUChrEvent event)
{
    Link *link = opaque;

    switch (event) {
    case CHR_EVENT_OPENED:
        link->opened++;
        break;
    case CHR_EVENT_CLOSED:
        link->closed++;
        if (link->fw) {
            frame_writer_rewind(link->fw);
        }
        if (link->fr) {
            frame_reader_reset(link->fr);
        }
        break;
    default:
        break;
    }
}

static int link_can_read(void *opaque)
{
    Link *link = opaque;

    return MIN(frame_reader_room(link->fr), INT_MAX);
}

static void link_read(void *opaque, const uint8_t *buf, int size)
{
    Link *link = opaque;

    g_assert_cmpint(size, <=, frame_reader_room(link->fr));
    frame_reader_push(link->fr, buf, size);
}

static void link_progress(void *opaque)
{
    Link *link = opaque;

    /* The contract: from the main loop. */
    g_assert_false(link->calling);
    link->progress++;
    if (link->on_progress) {
        link->on_progress(link);
    }
}

static bool link_frame(Link *link, uint8_t *payload, size_t size,
                       uint32_t vnet_hdr_len)
{
    GByteArray *frame;

    g_assert_cmpuint(size, <=, FRAME_STREAM_MAX_PAYLOAD);
    g_assert_false(link->waiting);
    if (!link->wait_after) {
        link->waiting = true;
        return false;
    }
    if (link->wait_after != UINT_MAX) {
        link->wait_after--;
    }
    frame = g_byte_array_new();
    g_byte_array_append(frame, payload, size);
    g_ptr_array_add(link->frames, frame);
    g_array_append_val(link->vnet_hdr_lens, vnet_hdr_len);
    if (link->scribble) {
        memset(payload, 0xa5, size);
    }
    return true;
}

static size_t link_frames(void *opaque, const StreamFrame *frames, size_t n)
{
    Link *link = opaque;

    g_assert_cmpuint(n, >, 0);
    g_assert_cmpuint(n, <=, FRAME_READER_BATCH);
    link->calls++;
    for (size_t i = 0; i < n; i++) {
        if (!link_frame(link, frames[i].payload, frames[i].size,
                        frames[i].vnet_hdr_len)) {
            return i;
        }
    }
    return n;
}

/* What is handed out may come from the main loop, in parts. */
static void link_resume(Link *link, unsigned wait_after)
{
    link->waiting = false;
    link->wait_after = wait_after;
    frame_reader_resume(link->fr);
    settle_reader(link);
}

static Link *link_new_on(Chardev *chr, bool vnet_hdr)
{
    Link *link = g_new0(Link, 1);

    g_assert_nonnull(chr);
    link->chr = chr;
    qemu_chr_fe_init(&link->fe, link->chr, &error_abort);
    link->peer = -1;
    link->vnet_hdr = vnet_hdr;
    link->expected = g_byte_array_new();
    link->wait_after = UINT_MAX;
    link->frames = g_ptr_array_new_with_free_func(
        (GDestroyNotify)g_byte_array_unref);
    link->vnet_hdr_lens = g_array_new(false, false, sizeof(uint32_t));
    return link;
}

static Link *link_new(bool vnet_hdr)
{
    g_autofree char *dir = g_dir_make_tmp("frame-stream-XXXXXX", NULL);
    g_autofree char *path = g_strdup_printf("%s/socket", dir);
    g_autofree char *spec = g_strdup_printf("unix:%s,server=on,wait=off",
                                            path);
    Link *link;

    g_assert_nonnull(dir);
    link = link_new_on(qemu_chr_new("stream", spec, NULL), vnet_hdr);
    link->dir = g_steal_pointer(&dir);
    link->path = g_steal_pointer(&path);
    return link;
}

static void link_connect(Link *link)
{
    struct sockaddr_un addr = { .sun_family = AF_UNIX };
    unsigned opened = link->opened;

    g_strlcpy(addr.sun_path, link->path, sizeof(addr.sun_path));
    link->peer = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    g_assert_cmpint(link->peer, >=, 0);
    g_assert_cmpint(connect(link->peer, (struct sockaddr *)&addr,
                            sizeof(addr)), ==, 0);
    g_unix_set_fd_nonblocking(link->peer, true, NULL);
    AWAIT(link->opened > opened);
}

/* Make the writer's socket buffer as small as the kernel has it. */
static void link_narrow(Link *link)
{
    int size = 1;

    g_assert_cmpint(setsockopt(SOCKET_CHARDEV(link->chr)->sioc->fd,
                               SOL_SOCKET, SO_SNDBUF, &size, sizeof(size)),
                    ==, 0);
}

static void link_close_peer(Link *link)
{
    close(link->peer);
    link->peer = -1;
}

static void link_disconnect(Link *link)
{
    unsigned closed = link->closed;

    link_close_peer(link);
    AWAIT(link->closed > closed);
}

static Link *link_new_writer_limit(bool vnet_hdr, size_t limit)
{
    Link *link = link_new(vnet_hdr);

    link->fw = frame_writer_new(&link->fe, vnet_hdr, limit, link_progress,
                                link);
    qemu_chr_fe_set_handlers(&link->fe, NULL, NULL, link_event, NULL, link,
                             NULL, true);
    return link;
}

static Link *link_new_writer(bool vnet_hdr)
{
    return link_new_writer_limit(vnet_hdr, WRITER_LIMIT);
}

static Link *link_new_reader(bool vnet_hdr)
{
    Link *link = link_new(vnet_hdr);

    link->fr = frame_reader_new(&link->fe, vnet_hdr, link_frames, link);
    qemu_chr_fe_set_handlers(&link->fe, link_can_read, link_read, link_event,
                             NULL, link, NULL, true);
    return link;
}

/* Returns: how many frames the peer has not got. */
static uint64_t link_close_writer(Link *link)
{
    qemu_chr_fe_set_handlers(&link->fe, NULL, NULL, NULL, NULL, NULL, NULL,
                             true);
    return frame_writer_close(g_steal_pointer(&link->fw));
}

static void link_free(Link *link)
{
    if (link->fw) {
        link_close_writer(link);
    }
    frame_reader_free(link->fr);
    link->fr = NULL;
    qemu_chr_fe_deinit(&link->fe, true);
    if (link->peer >= 0) {
        close(link->peer);
    }
    /* What was freed must not be called any more. */
    link->calling = true;
    settle();
    if (link->path) {
        unlink(link->path);
        rmdir(link->dir);
    }
    g_free(link->path);
    g_free(link->dir);
    g_byte_array_unref(link->expected);
    g_ptr_array_unref(link->frames);
    g_array_unref(link->vnet_hdr_lens);
    g_free(link);
}

/* Payload number @seq: its size and its bytes follow from the number. */
static void fill_payload(uint8_t *payload, size_t size, uint32_t seq)
{
    uint32_t x = seq * 2654435761u + 1;

    for (size_t i = 0; i < size; i++) {
        x = x * 1664525u + 1013904223u;
        payload[i] = x >> 24;
    }
}

static size_t payload_size(uint32_t seq)
{
    switch (seq % 8) {
    case 0:
        return 1 + seq % 64;
    case 1:
        return 30000 + seq % 20000;
    default:
        return 64 + (seq * 37) % 1500;
    }
}

static void append_be32(GByteArray *stream, uint32_t value)
{
    uint8_t bytes[] = { value >> 24, value >> 16, value >> 8, value };

    g_byte_array_append(stream, bytes, sizeof(bytes));
}

static void append_frame(GByteArray *stream, bool vnet_hdr,
                         uint32_t vnet_hdr_len, size_t size, uint32_t seq)
{
    append_be32(stream, size);
    if (vnet_hdr) {
        append_be32(stream, vnet_hdr_len);
    }
    g_byte_array_set_size(stream, stream->len + size);
    fill_payload(stream->data + stream->len - size, size, seq);
}

static void link_stage(Link *link, size_t size)
{
    uint32_t vnet_hdr_len = link->next_seq % 13;
    uint8_t *payload;
    bool was_calling = link->calling;

    link->calling = true;
    payload = frame_writer_reserve(link->fw, size + link->next_seq % 7);
    fill_payload(payload, size, link->next_seq);
    frame_writer_commit(link->fw, vnet_hdr_len, size);
    link->calling = was_calling;
    append_frame(link->expected, link->vnet_hdr, vnet_hdr_len, size,
                 link->next_seq);
    link->next_seq++;
}

static void link_stage_next(Link *link)
{
    link_stage(link, payload_size(link->next_seq));
}

static int link_try_flush(Link *link)
{
    bool was_calling = link->calling;
    int ret;

    link->calling = true;
    ret = frame_writer_flush(link->fw);
    link->calling = was_calling;
    return ret;
}

static void link_flush(Link *link)
{
    link_try_flush(link);
}

/* Take what has come to the peer so far; the main loop does not run. */
static size_t peer_take(Link *link, GByteArray *into, size_t most)
{
    static uint8_t buf[64 * KiB];
    size_t taken = 0;

    while (taken < most) {
        ssize_t ret = recv(link->peer, buf, MIN(sizeof(buf), most - taken),
                           0);

        if (ret <= 0) {
            g_assert(ret == 0 || errno == EAGAIN);
            break;
        }
        g_byte_array_append(into, buf, ret);
        taken += ret;
    }
    return taken;
}

/* Read at the peer until it has the whole of what is expected. */
static void peer_expect(Link *link, GByteArray *got, GByteArray *expected)
{
    AWAIT((peer_take(link, got, SIZE_MAX), got->len >= expected->len));
    settle();
    peer_take(link, got, SIZE_MAX);
    g_assert_cmpuint(got->len, ==, expected->len);
    g_assert(!memcmp(got->data, expected->data, got->len));
}

/* The first byte at or after @offset where a frame starts */
static size_t frame_start(GByteArray *stream, bool vnet_hdr, size_t offset,
                          size_t *before, unsigned *frames_before)
{
    size_t start = 0, last = 0;
    unsigned frames = 0;

    while (start < offset) {
        last = start;
        start += (vnet_hdr ? 8 : 4) + ldl_be_p(stream->data + start);
        frames++;
    }
    if (before) {
        *before = start == offset ? start : last;
    }
    if (frames_before) {
        *frames_before = frames;
    }
    return start;
}

static unsigned frame_count(GByteArray *stream, bool vnet_hdr)
{
    unsigned frames;

    frame_start(stream, vnet_hdr, stream->len, NULL, &frames);
    return frames;
}

/*
 * Writer
 */

static void no_progress(void *opaque)
{
    g_assert_not_reached();
}

static void test_writer_format(void)
{
    static const uint8_t payload[] = {
        0x01, 0x00, 0x42, 0x00, 0xa8, 0x05, 0x22, 0x00, 0x10, 0x00,
        0x52, 0x54, 0x00, 0x12, 0x34, 0x56, 0x52, 0x54, 0x00, 0xab,
        0xcd, 0xef, 0x88, 0xb5, 0xde, 0xad, 0xbe, 0xef,
    };
    static const uint8_t with[] = {
        0x00, 0x00, 0x00, 0x1c, 0x00, 0x00, 0x00, 0x0a,
        0x01, 0x00, 0x42, 0x00, 0xa8, 0x05, 0x22, 0x00, 0x10, 0x00,
        0x52, 0x54, 0x00, 0x12, 0x34, 0x56, 0x52, 0x54, 0x00, 0xab,
        0xcd, 0xef, 0x88, 0xb5, 0xde, 0xad, 0xbe, 0xef,
    };
    static const uint8_t without[] = {
        0x00, 0x00, 0x00, 0x1c,
        0x01, 0x00, 0x42, 0x00, 0xa8, 0x05, 0x22, 0x00, 0x10, 0x00,
        0x52, 0x54, 0x00, 0x12, 0x34, 0x56, 0x52, 0x54, 0x00, 0xab,
        0xcd, 0xef, 0x88, 0xb5, 0xde, 0xad, 0xbe, 0xef,
    };

    for (int vnet_hdr = 0; vnet_hdr < 2; vnet_hdr++) {
        const uint8_t *golden = vnet_hdr ? with : without;
        size_t golden_size = vnet_hdr ? sizeof(with) : sizeof(without);
        g_autoptr(QemuOpts) opts = NULL;
        g_autofree char *spec = NULL;
        CharFrontend fe = {};
        FrameWriter *fw;
        uint8_t got[64];
        int fds[2];

        g_assert_cmpint(socketpair(AF_UNIX, SOCK_STREAM, 0, fds), ==, 0);
        g_unix_set_fd_nonblocking(fds[1], true, NULL);
        spec = g_strdup_printf("socket,id=pair,fd=%d", fds[0]);
        opts = qemu_opts_parse_noisily(qemu_find_opts("chardev"), spec, true);
        qemu_chr_fe_init(&fe, qemu_chr_new_from_opts(opts, NULL,
                                                     &error_abort),
                         &error_abort);
        fw = frame_writer_new(&fe, vnet_hdr, WRITER_LIMIT, no_progress, NULL);

        g_assert_false(frame_writer_full(fw));
        memcpy(frame_writer_reserve(fw, 2000), payload, sizeof(payload));
        frame_writer_commit(fw, 10, sizeof(payload));
        g_assert_cmpint(recv(fds[1], got, sizeof(got), 0), ==, -1);
        frame_writer_flush(fw);
        g_assert_cmpint(recv(fds[1], got, sizeof(got), 0), ==, golden_size);
        g_assert(!memcmp(got, golden, golden_size));
        frame_writer_flush(fw);
        settle();
        g_assert_cmpint(recv(fds[1], got, sizeof(got), 0), ==, -1);

        g_assert_cmpuint(frame_writer_close(fw), ==, 0);
        qemu_chr_fe_deinit(&fe, true);
        close(fds[1]);
    }
}

static void test_writer_batch(gconstpointer vnet_hdr)
{
    Link *link = link_new_writer(GPOINTER_TO_INT(vnet_hdr));
    g_autoptr(GByteArray) got = g_byte_array_new();

    link_connect(link);
    for (int i = 0; i < 500; i++) {
        link_stage_next(link);
    }
    link_stage(link, FRAME_STREAM_MAX_PAYLOAD);
    link_stage_next(link);
    link_flush(link);
    peer_expect(link, got, link->expected);
    link_free(link);
}

/* full() is about what is held, however large the frames are. */
static void test_writer_full(void)
{
    static const size_t sizes[] = { 1, 60, 1514, FRAME_STREAM_MAX_PAYLOAD };

    for (int i = 0; i < ARRAY_SIZE(sizes); i++) {
        Link *link = link_new_writer(true);
        g_autoptr(GByteArray) got = g_byte_array_new();

        link_connect(link);
        while (!frame_writer_full(link->fw)) {
            link_stage(link, sizes[i]);
            g_assert_cmpuint(link->expected->len, <=,
                             WRITER_LIMIT + SLACK);
        }
        g_assert_cmpuint(link->expected->len, >=, WRITER_LIMIT - SLACK);

        /* Those that cannot be refused */
        for (int j = 0; j < 5; j++) {
            link_stage_next(link);
            g_assert_true(frame_writer_full(link->fw));
        }
        link_flush(link);
        peer_expect(link, got, link->expected);
        g_assert_false(frame_writer_full(link->fw));
        link_free(link);
    }
}

static void pump(Link *link)
{
    while (!frame_writer_full(link->fw) && link->next_seq < 2000) {
        link_stage_next(link);
        if (link->next_seq % 16 == 0) {
            link_flush(link);
        }
    }
    link_flush(link);
}

static void test_writer_slow_peer(void)
{
    Link *link = link_new_writer(true);
    g_autoptr(GByteArray) got = g_byte_array_new();

    link->on_progress = pump;
    link_connect(link);
    pump(link);
    g_assert_true(frame_writer_full(link->fw));

    /* As long as the peer takes nothing there is no progress. */
    settle();
    g_assert_cmpuint(link->progress, ==, 0);
    g_assert_true(frame_writer_full(link->fw));

    AWAIT((peer_take(link, got, 10000), link->next_seq == 2000));
    g_assert_cmpuint(link->progress, >, 0);
    peer_expect(link, got, link->expected);

    /* All is written: nothing is left to call for. */
    link->progress = 0;
    link->on_progress = NULL;
    settle();
    g_assert_cmpuint(link->progress, ==, 0);
    link_free(link);
}

/* A peer that keeps up: no progress calls are needed, and none come late. */
static void test_writer_fast_peer(void)
{
    Link *link = link_new_writer(false);
    g_autoptr(GByteArray) got = g_byte_array_new();

    link_connect(link);
    for (int i = 0; i < 2000; i++) {
        link_stage(link, 100);
        link_flush(link);
        g_assert_cmpuint(peer_take(link, got, SIZE_MAX), ==, 104);
    }
    g_assert_cmpuint(got->len, ==, link->expected->len);
    g_assert(!memcmp(got->data, link->expected->data, got->len));
    settle();
    g_assert_cmpuint(link->progress, ==, 0);
    link_free(link);
}

/*
 * Stage frames, let the writer write what the narrow socket takes, and
 * check that this ends inside of a frame.
 * Returns: where the frame starts that is cut off.
 */
static size_t cut_off(Link *link, GByteArray *got, size_t base,
                      unsigned *begun)
{
    size_t end, start;

    link_flush(link);
    peer_take(link, got, SIZE_MAX);
    g_assert_cmpuint(got->len, >, 0);
    g_assert(!memcmp(got->data, link->expected->data + base, got->len));
    end = frame_start(link->expected, link->vnet_hdr, base + got->len, &start,
                      begun);
    g_assert_cmpuint(end, >, base + got->len);
    return start;
}

static void test_writer_rewind(gconstpointer vnet_hdr)
{
    Link *link = link_new_writer(GPOINTER_TO_INT(vnet_hdr));
    size_t start = 0;

    link_connect(link);
    link_narrow(link);
    for (int i = 0; i < 10; i++) {
        link_stage(link, 1000 + i);
    }
    for (int i = 0; i < 10; i++) {
        link_stage(link, 50000 + i);
    }

    /* The second and third time the same frame is cut off again. */
    for (int i = 0; i < 4; i++) {
        g_autoptr(GByteArray) got = g_byte_array_new();
        size_t cut = cut_off(link, got, start, NULL);

        g_assert_cmpuint(cut, >=, start);
        start = cut;
        link_disconnect(link);
        link_stage_next(link);
        link_connect(link);
        link_narrow(link);
    }

    link_flush(link);
    {
        g_autoptr(GByteArray) got = g_byte_array_new();

        g_byte_array_remove_range(link->expected, 0, start);
        peer_expect(link, got, link->expected);
    }
    link_free(link);
}

/* Nobody is there: nothing is lost, nothing is called, full() holds. */
static void test_writer_unconnected(void)
{
    Link *link = link_new_writer(true);
    g_autoptr(GByteArray) got = g_byte_array_new();

    while (!frame_writer_full(link->fw)) {
        link_stage_next(link);
        link_flush(link);
        g_assert_cmpuint(link->expected->len, <=, WRITER_LIMIT + SLACK);
    }
    settle();
    g_assert_cmpuint(link->progress, ==, 0);
    link_connect(link);
    link_flush(link);
    peer_expect(link, got, link->expected);
    link_free(link);
}

/* The writer finds out itself: CLOSED comes while it writes. */
static void test_writer_closed_in_flush(void)
{
    Link *link = link_new_writer(true);
    g_autoptr(GByteArray) got = g_byte_array_new();
    g_autoptr(GByteArray) rest = g_byte_array_new();
    size_t start;

    link_connect(link);
    link_narrow(link);
    link_stage(link, 50001);
    link_stage(link, 50002);
    start = cut_off(link, got, 0, NULL);
    g_assert_cmpuint(start, ==, 0);
    link_close_peer(link);
    link_stage_next(link);
    link_flush(link);
    AWAIT(link->closed);

    /* It may be told once that the peer has gone, not again and again. */
    settle();
    g_assert_cmpuint(link->progress, <=, 1);

    link_connect(link);
    link_flush(link);
    peer_expect(link, rest, link->expected);

    /* The same when nothing was left to write */
    link->closed = 0;
    link_close_peer(link);
    g_byte_array_set_size(link->expected, 0);
    g_byte_array_set_size(rest, 0);
    for (int i = 0; i < 3; i++) {
        link_stage_next(link);
        link_flush(link);
    }
    AWAIT(link->closed);
    link_connect(link);
    link_flush(link);
    peer_expect(link, rest, link->expected);
    link_free(link);
}

static void test_writer_discard(void)
{
    Link *link = link_new_writer(true);
    g_autoptr(GByteArray) got = g_byte_array_new();
    unsigned begun, frames;

    g_assert_cmpuint(frame_writer_discard(link->fw), ==, 0);
    link_connect(link);
    g_assert_cmpuint(frame_writer_discard(link->fw), ==, 0);

    /* None begun: all go. */
    for (int i = 0; i < 100; i++) {
        link_stage_next(link);
    }
    g_assert_cmpuint(frame_writer_discard(link->fw), ==, 100);
    g_assert_cmpuint(frame_writer_discard(link->fw), ==, 0);
    g_assert_false(frame_writer_full(link->fw));
    g_byte_array_set_size(link->expected, 0);
    link_flush(link);
    settle();
    g_assert_cmpuint(peer_take(link, got, SIZE_MAX), ==, 0);

    /* Some written, one begun: the rest of that one stays. */
    link_narrow(link);
    for (int i = 0; i < 3; i++) {
        link_stage(link, 500 + i);
    }
    while (!frame_writer_full(link->fw)) {
        link_stage(link, 40000 + link->next_seq);
    }
    cut_off(link, got, 0, &begun);
    frames = frame_count(link->expected, true);
    g_assert_cmpuint(frame_writer_discard(link->fw), ==, frames - begun);
    g_assert_false(frame_writer_full(link->fw));
    g_byte_array_set_size(link->expected,
                          frame_start(link->expected, true, got->len, NULL,
                                      NULL));
    peer_expect(link, got, link->expected);

    /* Frames staged later come after it. */
    g_byte_array_set_size(link->expected, 0);
    g_byte_array_set_size(got, 0);
    link_stage(link, 60000);
    link_stage_next(link);
    cut_off(link, got, 0, &begun);
    g_assert_cmpuint(begun, ==, 1);
    g_assert_cmpuint(frame_writer_discard(link->fw), ==, 1);
    g_byte_array_set_size(link->expected, 8 + 60000);
    for (int i = 0; i < 10; i++) {
        link_stage_next(link);
    }
    link_flush(link);
    peer_expect(link, got, link->expected);
    link_free(link);
}

/* At once, although nobody has told that there is room */
static void test_writer_flush_now(void)
{
    Link *link = link_new_writer(true);
    g_autoptr(GByteArray) got = g_byte_array_new();
    size_t had = 0;

    link_connect(link);
    link_narrow(link);
    g_assert_true(frame_writer_empty(link->fw));
    for (int i = 0; i < 10; i++) {
        link_stage(link, 50000);
    }
    g_assert_cmpint(frame_writer_flush(link->fw), ==, 0);
    g_assert_false(frame_writer_empty(link->fw));
    while (got->len < link->expected->len) {
        peer_take(link, got, SIZE_MAX);
        g_assert_cmpuint(got->len, >, had);
        had = got->len;
        g_assert_cmpint(frame_writer_flush_now(link->fw), ==, 0);
    }
    g_assert_true(frame_writer_empty(link->fw));
    g_assert_cmpmem(got->data, got->len, link->expected->data,
                    link->expected->len);
    link_free(link);
}

/* The connection ends only if it could not go on with a frame. */
static void test_writer_close(void)
{
    for (int begun = 0; begun < 2; begun++) {
        Link *link = link_new_writer(true);
        g_autoptr(GByteArray) got = g_byte_array_new();
        size_t len;
        uint8_t byte;

        link_connect(link);
        link_narrow(link);
        for (int i = 0; i < 10; i++) {
            link_stage(link, 50000);
        }
        if (begun) {
            g_assert_cmpint(frame_writer_flush(link->fw), ==, 0);
            peer_take(link, got, SIZE_MAX);
        }
        len = got->len;
        g_assert_cmpuint(link_close_writer(link), ==, 10 - len / (8 + 50000));
        g_assert_cmpuint(len % (8 + 50000) != 0, ==, begun);
        g_assert_cmpint(recv(link->peer, &byte, 1, MSG_DONTWAIT), ==,
                        begun ? 0 : -1);
        link_free(link);
    }
}

/* What a closed connection cut off counts as not begun. */
static void test_writer_rewind_discard(void)
{
    Link *link = link_new_writer(true);
    g_autoptr(GByteArray) got = g_byte_array_new();
    g_autoptr(GByteArray) rest = g_byte_array_new();

    link_connect(link);
    link_narrow(link);
    for (int i = 0; i < 10; i++) {
        link_stage(link, 50000);
    }
    cut_off(link, got, 0, NULL);
    link_disconnect(link);
    g_assert_cmpuint(frame_writer_discard(link->fw), ==, 10);
    g_byte_array_set_size(link->expected, 0);
    link_connect(link);
    link_stage_next(link);
    link_flush(link);
    peer_expect(link, rest, link->expected);
    link_free(link);
}

#if !defined(QEMU_SANITIZE_ADDRESS) && defined(CONFIG_LINUX)
static size_t memory_used(void)
{
    g_autofree char *text = NULL;
    unsigned long data = 0;

    g_assert_true(g_file_get_contents("/proc/self/statm", &text, NULL, NULL));
    g_assert_cmpint(sscanf(text, "%*u %*u %*u %*u %*u %lu", &data), ==, 1);
    return data * qemu_real_host_page_size();
}

/* A peer that is always behind must not make the writer grow. */
static void test_writer_memory(void)
{
    Link *link = link_new_writer(true);
    g_autoptr(GByteArray) got = g_byte_array_new();
    size_t before, written = 0;

    link_connect(link);
    before = memory_used();
    while (written < 64 * MiB) {
        while (!frame_writer_full(link->fw)) {
            link_stage(link, 1514);
        }
        written += link->expected->len;
        g_byte_array_set_size(link->expected, 0);
        link_flush(link);
        AWAIT((peer_take(link, got, SIZE_MAX),
               !frame_writer_full(link->fw)));
        g_byte_array_set_size(got, 0);
        g_assert_cmpuint(memory_used(), <, before + MEMORY_LIMIT);
    }
    link_free(link);
}
#endif

/* With frames held, while a peer is there and while none is */
static void test_writer_close_full(void)
{
    for (int i = 0; i < 3; i++) {
        Link *link = link_new_writer(true);
        uint64_t lost;

        if (i) {
            link_connect(link);
        }
        while (!frame_writer_full(link->fw)) {
            link_stage_next(link);
        }
        link_flush(link);
        if (i == 2) {
            link_disconnect(link);
        }
        lost = link_close_writer(link);
        g_assert_cmpuint(lost, >, 0);
        g_assert_true(i ? lost < link->next_seq : lost == link->next_seq);
        link_free(link);
    }
}

/*
 * A character device that takes what the test lets it take, and fails then
 */

#define TYPE_CHARDEV_TEST "chardev-frame-test"
OBJECT_DECLARE_SIMPLE_TYPE(TestChardev, CHARDEV_TEST)

struct TestChardev {
    Chardev parent;
    GByteArray *got;
    size_t budget;              /* bytes that it takes */
    int error;                  /* an errno, or 0 to take 0 bytes */
};

static int test_chardev_write(Chardev *chr, const uint8_t *buf, int len)
{
    TestChardev *tc = CHARDEV_TEST(chr);

    if (!tc->budget) {
        errno = tc->error;
        return tc->error ? -1 : 0;
    }
    len = MIN(len, tc->budget);
    g_byte_array_append(tc->got, buf, len);
    tc->budget -= len;
    return len;
}

static void test_chardev_class_init(ObjectClass *oc, const void *data)
{
    CHARDEV_CLASS(oc)->chr_write = test_chardev_write;
}

static const TypeInfo test_chardev_info = {
    .name = TYPE_CHARDEV_TEST,
    .parent = TYPE_CHARDEV,
    .instance_size = sizeof(TestChardev),
    .class_init = test_chardev_class_init,
};

static Link *link_new_test_writer(TestChardev **tc)
{
    Link *link = link_new_on(qemu_chardev_new("test", TYPE_CHARDEV_TEST, NULL,
                                              NULL, &error_abort), true);

    *tc = CHARDEV_TEST(link->chr);
    (*tc)->got = g_byte_array_new();
    link->fw = frame_writer_new(&link->fe, true, WRITER_LIMIT, link_progress,
                                link);
    return link;
}

static void test_chardev_check(TestChardev *tc, Link *link)
{
    g_assert_cmpuint(tc->got->len, ==, link->expected->len);
    g_assert(!memcmp(tc->got->data, link->expected->data, tc->got->len));
}

/*
 * A device that fails wherever it likes: it is told, and what is staged goes
 * on from there.
 */
static void test_writer_errors(void)
{
    static const int errors[] = { EIO, ENOSPC, EPIPE, 0 };

    for (int i = 0; i < ARRAY_SIZE(errors); i++) {
        TestChardev *tc;
        Link *link = link_new_test_writer(&tc);
        int error = errors[i] ?: EIO;

        tc->error = errors[i];
        for (int j = 0; j < 100; j++) {
            link_stage_next(link);
            tc->budget = j * 997 % 3000;
            while (link->expected->len > tc->got->len + tc->budget) {
                size_t after = tc->got->len + tc->budget;

                g_assert_cmpint(link_try_flush(link), ==, -error);
                g_assert_cmpuint(tc->got->len, ==, after);
                tc->budget = 5000 + j * 997 % 50000;
            }
        }
        /* It will not tell when it can. */
        settle();
        g_assert_cmpuint(link->progress, ==, 0);
        g_assert_cmpint(link_try_flush(link), ==, 0);
        test_chardev_check(tc, link);
        g_byte_array_unref(tc->got);
        link_free(link);
    }
}

/*
 * Each datagram is one frame, and so is what gets lost, also when its receiver
 * is not there at all.
 */
static Link *link_new_datagrams(bool vnet_hdr)
{
    struct sockaddr_in addr = {
        .sin_family = AF_INET,
        .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
    };
    socklen_t addr_len = sizeof(addr);
    int size = 4 * MiB;
    int peer = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    g_autofree char *spec = NULL;
    Link *link;

    g_assert_cmpint(peer, >=, 0);
    setsockopt(peer, SOL_SOCKET, SO_RCVBUF, &size, sizeof(size));
    g_assert_cmpint(bind(peer, (struct sockaddr *)&addr, sizeof(addr)), ==, 0);
    g_assert_cmpint(getsockname(peer, (struct sockaddr *)&addr, &addr_len), ==,
                    0);
    spec = g_strdup_printf("udp:127.0.0.1:%u", ntohs(addr.sin_port));
    link = link_new_on(qemu_chr_new("datagrams", spec, NULL), vnet_hdr);
    link->peer = peer;
    link->fw = frame_writer_new(&link->fe, vnet_hdr, WRITER_LIMIT,
                                link_progress, link);
    qemu_chr_fe_set_handlers(&link->fe, NULL, NULL, link_event, NULL, link,
                             NULL, true);
    return link;
}

static void test_writer_datagrams(gconstpointer data)
{
    bool vnet_hdr = GPOINTER_TO_INT(data);
    Link *link = link_new_datagrams(vnet_hdr);
    size_t longest = frame_writer_max_payload(link->fw), at = 0;
    g_autofree uint8_t *got = g_malloc(64 * KiB);
    int ret;

    g_assert_cmpuint(longest + (vnet_hdr ? 8 : 4), ==, 65507);
    for (int i = 0; i < 50; i++) {
        link_stage_next(link);
        if (i % 10 == 9) {
            link_stage(link, longest);
        }
        if (i % 5 == 4) {
            g_assert_cmpint(link_try_flush(link), ==, 0);
        }
        while (at < link->expected->len && i % 5 == 4) {
            size_t end = frame_start(link->expected, vnet_hdr, at + 1, NULL,
                                     NULL);

            AWAIT((ret = recv(link->peer, got, 64 * KiB, 0)) >= 0);
            g_assert_cmpmem(got, ret, link->expected->data + at, end - at);
            at = end;
        }
    }

    /* Nobody is there: that is told, and not for ever. */
    link_close_peer(link);
    for (int i = 0; i < 10; i++) {
        link_stage(link, 100);
        ret = link_try_flush(link);
        g_assert(ret == 0 || ret == -ECONNREFUSED);
        frame_writer_discard(link->fw);
    }
    link_free(link);
}

/*
 * A file that takes a part and then no more, as on a full disk: what was
 * written is not written again when there is room.
 */
static void test_writer_partial_error(void)
{
    g_autofree char *dir = g_dir_make_tmp("frame-stream-XXXXXX", NULL);
    g_autofree char *path = g_build_filename(dir, "file", NULL);
    g_autofree char *spec = g_strdup_printf("file:%s", path);
    g_autofree char *got = NULL;
    struct rlimit old, small;
    size_t got_len;
    Link *link;

    g_assert_cmpint(getrlimit(RLIMIT_FSIZE, &old), ==, 0);
    signal(SIGXFSZ, SIG_IGN);
    link = link_new_on(qemu_chr_new("file", spec, NULL), true);
    link->fw = frame_writer_new(&link->fe, true, WRITER_LIMIT, link_progress,
                                link);
    small = old;
    for (int i = 0; i < 20; i++) {
        size_t before = link->expected->len;

        for (int j = 0; j < 5; j++) {
            link_stage(link, 1000);
        }
        /* In the middle of one of these frames, or between two */
        small.rlim_cur = before + 1008 * (i % 5) + (i & 1 ? 123 : 0);
        g_assert_cmpint(setrlimit(RLIMIT_FSIZE, &small), ==, 0);
        g_assert_cmpint(link_try_flush(link), <, 0);
        g_assert_cmpint(setrlimit(RLIMIT_FSIZE, &old), ==, 0);
        g_assert_cmpint(link_try_flush(link), ==, 0);
    }
    g_assert_true(g_file_get_contents(path, &got, &got_len, NULL));
    g_assert_cmpmem(got, got_len, link->expected->data, link->expected->len);
    link_free(link);
    unlink(path);
    rmdir(dir);
}

/* One that cannot tell when it takes more: it is tried again. */
static void test_writer_retry(void)
{
    TestChardev *tc;
    Link *link = link_new_test_writer(&tc);

    tc->error = EAGAIN;
    for (int i = 0; i < 20; i++) {
        unsigned progress = link->progress;

        link_stage_next(link);
        link_stage_next(link);
        tc->budget = 10;
        g_assert_cmpint(link_try_flush(link), ==, 0);
        AWAIT((tc->budget = 1000, tc->got->len == link->expected->len));
        AWAIT(link->progress > progress);
        test_chardev_check(tc, link);
    }

    /* It is not tried any more once there is nothing to write. */
    link->progress = 0;
    settle();
    g_assert_cmpuint(link->progress, ==, 0);
    g_byte_array_unref(tc->got);
    link_free(link);
}

static void test_writer_limit(void)
{
    static const size_t limits[] = { 1, 1000, 64 * KiB, 5 * MiB };

    for (int i = 0; i < ARRAY_SIZE(limits); i++) {
        Link *link = link_new_writer_limit(true, limits[i]);

        for (int j = 0; j < 3; j++) {
            while (!frame_writer_full(link->fw)) {
                g_assert_cmpuint(link->expected->len, <, limits[i]);
                link_stage(link, 100 + link->next_seq % 1400);
            }
            g_assert_cmpuint(link->expected->len, >=, limits[i]);
            g_assert_cmpint(link_try_flush(link), <, 0);
            g_assert_true(frame_writer_full(link->fw));
            g_assert_cmpuint(frame_writer_discard(link->fw), ==,
                             frame_count(link->expected, true));
            g_assert_false(frame_writer_full(link->fw));
            g_byte_array_set_size(link->expected, 0);
        }
        link_free(link);
    }
}

/*
 * Reader
 */

static void reader_check(Link *link, unsigned number, size_t size,
                         uint32_t vnet_hdr_len, uint32_t seq)
{
    g_autofree uint8_t *payload = g_malloc(size + 1);
    GByteArray *frame;

    g_assert_cmpuint(number, <, link->frames->len);
    frame = link->frames->pdata[number];
    fill_payload(payload, size, seq);
    g_assert_cmpmem(frame->data, frame->len, payload, size);
    g_assert_cmpuint(g_array_index(link->vnet_hdr_lens, uint32_t, number), ==,
                     link->vnet_hdr ? vnet_hdr_len : 0);
}

static void reader_forget(Link *link)
{
    g_ptr_array_set_size(link->frames, 0);
    g_array_set_size(link->vnet_hdr_lens, 0);
}

/* Push all of @stream, no more at once than there is room for. */
static void reader_push(Link *link, const uint8_t *data, size_t size)
{
    while (size) {
        size_t part = MIN(size, frame_reader_room(link->fr));

        g_assert_cmpuint(part, >, 0);
        frame_reader_push(link->fr, data, part);
        data += part;
        size -= part;
        if (!frame_reader_room(link->fr)) {
            settle_reader(link);
        }
    }
}

/* A copy of its own for each push, so that reading past its end shows. */
static void reader_push_copy(Link *link, const uint8_t *data, size_t size)
{
    g_autofree uint8_t *copy = g_memdup2(data, size);

    reader_push(link, copy, size);
}

static void test_reader_format(void)
{
    static const uint8_t with[] = {
        0x00, 0x00, 0x00, 0x03, 0x00, 0x00, 0x00, 0x0c, 0xaa, 0xbb, 0xcc,
        0x00, 0x00, 0x00, 0x01, 0xff, 0xee, 0xdd, 0xcc, 0x11,
    };
    static const uint8_t without[] = {
        0x00, 0x00, 0x00, 0x03, 0xaa, 0xbb, 0xcc,
        0x00, 0x00, 0x00, 0x01, 0x11,
    };

    for (int vnet_hdr = 0; vnet_hdr < 2; vnet_hdr++) {
        Link *link = link_new_reader(vnet_hdr);
        GByteArray *first, *second;

        frame_reader_push(link->fr, vnet_hdr ? with : without,
                          vnet_hdr ? sizeof(with) : sizeof(without));
        g_assert_cmpuint(link->frames->len, ==, 2);
        first = link->frames->pdata[0];
        second = link->frames->pdata[1];
        g_assert_cmpmem(first->data, first->len, "\xaa\xbb\xcc", 3);
        g_assert_cmpmem(second->data, second->len, "\x11", 1);
        g_assert_cmphex(g_array_index(link->vnet_hdr_lens, uint32_t, 0), ==,
                        vnet_hdr ? 12 : 0);
        g_assert_cmphex(g_array_index(link->vnet_hdr_lens, uint32_t, 1), ==,
                        vnet_hdr ? 0xffeeddcc : 0);
        link_free(link);
    }
}

static void test_reader_splits(gconstpointer vnet_hdr)
{
    Link *link = link_new_reader(GPOINTER_TO_INT(vnet_hdr));
    g_autoptr(GByteArray) stream = g_byte_array_new();
    static const size_t sizes[] = { 61, 1, 90 };

    for (int i = 0; i < 3; i++) {
        append_frame(stream, link->vnet_hdr, 10 + i, sizes[i], i);
    }

    for (int scribble = 0; scribble < 2; scribble++) {
        link->scribble = scribble;

        /* One byte at a time */
        for (int i = 0; i < stream->len; i++) {
            reader_push_copy(link, stream->data + i, 1);
        }
        g_assert_cmpuint(link->frames->len, ==, 3);
        for (int j = 0; j < 3; j++) {
            reader_check(link, j, sizes[j], 10 + j, j);
        }
        reader_forget(link);

        /* In up to three parts, at every pair of places */
        for (int i = 0; i <= stream->len; i++) {
            for (int k = i; k <= stream->len; k++) {
                reader_push_copy(link, stream->data, i);
                reader_push_copy(link, stream->data + i, k - i);
                reader_push_copy(link, stream->data + k, stream->len - k);
                g_assert_cmpuint(link->frames->len, ==, 3);
                for (int j = 0; j < 3; j++) {
                    reader_check(link, j, sizes[j], 10 + j, j);
                }
                reader_forget(link);
            }
        }
    }
    link_free(link);
}

/* A frame is handed out with its last byte, not with the next push. */
static void test_reader_prompt(void)
{
    Link *link = link_new_reader(true);
    g_autoptr(GByteArray) stream = g_byte_array_new();

    for (int i = 0; i < 50; i++) {
        append_frame(stream, true, 10, payload_size(i), i);
        reader_push(link, stream->data, stream->len - 1);
        g_assert_cmpuint(link->frames->len, ==, i);
        reader_push(link, stream->data + stream->len - 1, 1);
        g_assert_cmpuint(link->frames->len, ==, i + 1);
        reader_check(link, i, payload_size(i), 10, i);
        g_byte_array_set_size(stream, 0);
    }
    link_free(link);
}

/* A frame without any payload is handed out like the others. */
static void test_reader_empty_frames(gconstpointer vnet_hdr)
{
    Link *link = link_new_reader(GPOINTER_TO_INT(vnet_hdr));
    g_autoptr(GByteArray) stream = g_byte_array_new();
    size_t room = frame_reader_room(link->fr);

    /* Alone, to the last byte of its prefix */
    append_frame(stream, link->vnet_hdr, 12, 0, 0);
    reader_push(link, stream->data, stream->len - 1);
    g_assert_cmpuint(link->frames->len, ==, 0);
    reader_push(link, stream->data + stream->len - 1, 1);
    g_assert_cmpuint(link->frames->len, ==, 1);
    reader_check(link, 0, 0, 12, 0);
    g_assert_cmpuint(frame_reader_room(link->fr), ==, room);
    reader_forget(link);

    /* Many, with others after and between them */
    g_byte_array_set_size(stream, 0);
    for (int i = 0; i < 1000; i++) {
        append_frame(stream, link->vnet_hdr, i, 0, 0);
    }
    append_frame(stream, link->vnet_hdr, 1, 60, 1);
    append_frame(stream, link->vnet_hdr, 2, 0, 0);
    append_frame(stream, link->vnet_hdr, 2, 60, 2);
    append_frame(stream, link->vnet_hdr, 3, 0, 0);
    for (int one_by_one = 0; one_by_one < 2; one_by_one++) {
        size_t part = one_by_one ? 1 : stream->len;

        for (size_t i = 0; i < stream->len; i += part) {
            reader_push(link, stream->data + i, part);
        }
        settle_reader(link);
        g_assert_cmpuint(link->frames->len, ==, 1004);
        for (int i = 0; i < 1000; i++) {
            reader_check(link, i, 0, i, 0);
        }
        reader_check(link, 1000, 60, 1, 1);
        reader_check(link, 1001, 0, 2, 0);
        reader_check(link, 1002, 60, 2, 2);
        reader_check(link, 1003, 0, 3, 0);
        g_assert_cmpuint(frame_reader_room(link->fr), ==, room);
        reader_forget(link);
    }

    /* One that waits is offered again, and kept by a reset. */
    link->wait_after = 0;
    reader_push(link, stream->data, stream->len);
    g_assert_true(link->waiting);
    frame_reader_reset(link->fr);
    link_resume(link, 1);
    g_assert_cmpuint(link->frames->len, ==, 1);
    link_resume(link, UINT_MAX);
    g_assert_cmpuint(link->frames->len, ==, 1004);
    g_assert_cmpuint(frame_reader_room(link->fr), ==, room);
    link_free(link);
}

static void test_reader_longest(gconstpointer vnet_hdr)
{
    Link *link = link_new_reader(GPOINTER_TO_INT(vnet_hdr));
    g_autoptr(GByteArray) stream = g_byte_array_new();

    for (int i = 0; i < 40; i++) {
        append_frame(stream, link->vnet_hdr, i, FRAME_STREAM_MAX_PAYLOAD, i);
    }
    reader_push(link, stream->data, stream->len);
    g_assert_cmpuint(link->frames->len, ==, 40);
    for (int i = 0; i < 40; i++) {
        reader_check(link, i, FRAME_STREAM_MAX_PAYLOAD, i, i);
    }
    link_free(link);
}

static void test_reader_wait(void)
{
    Link *link = link_new_reader(true);
    g_autoptr(GByteArray) stream = g_byte_array_new();

    for (int i = 0; i < 20; i++) {
        append_frame(stream, true, i, payload_size(i), i);
    }
    link->wait_after = 3;
    reader_push(link, stream->data, stream->len);
    g_assert_true(link->waiting);
    g_assert_cmpuint(link->frames->len, ==, 3);

    /* What comes meanwhile waits too: link_frame() asserts it. */
    g_byte_array_set_size(stream, 0);
    for (int i = 20; i < 30; i++) {
        append_frame(stream, true, i, payload_size(i), i);
    }
    for (int i = 0; i < stream->len; i++) {
        frame_reader_push(link->fr, stream->data + i, 1);
    }

    /* Once more the same one, then the rest one by one */
    for (int i = 3; i < 30; i++) {
        link_resume(link, 0);
        g_assert_true(link->waiting);
        g_assert_cmpuint(link->frames->len, ==, i);
        link_resume(link, 1);
        g_assert_cmpuint(link->frames->len, ==, i + 1);
        reader_check(link, i, payload_size(i), i, i);
    }
    g_assert_false(link->waiting);
    link_resume(link, UINT_MAX);
    g_assert_cmpuint(link->frames->len, ==, 30);
    link_free(link);
}

/* However many frames there are, one that waits does so until the resume. */
static void test_reader_wait_long(void)
{
    for (int accept = 0; accept < 400; accept += 7) {
        Link *link = link_new_reader(false);
        g_autoptr(GByteArray) stream = g_byte_array_new();

        for (int i = 0; i < 1000; i++) {
            append_frame(stream, false, 0, 60, i);
        }
        link->wait_after = UINT_MAX;
        reader_push(link, stream->data, stream->len);
        link->waiting = false;
        link->wait_after = accept;
        frame_reader_resume(link->fr);

        /* link_frame() asserts that the frame is not offered meanwhile. */
        settle_reader(link);
        link_resume(link, 0);
        link_resume(link, UINT_MAX);
        g_assert_cmpuint(link->frames->len, ==, 1000);
        for (int i = 0; i < 1000; i++) {
            reader_check(link, i, 60, 0, i);
        }
        link_free(link);
    }
}

static void test_reader_room(void)
{
    static const size_t sizes[] = { 1, 60, 1514, FRAME_STREAM_MAX_PAYLOAD };

    for (int k = 0; k < ARRAY_SIZE(sizes); k++) {
        Link *link = link_new_reader(true);
        g_autoptr(GByteArray) stream = g_byte_array_new();
        size_t room = frame_reader_room(link->fr), held = 0;
        unsigned sent = 0, pieces = 0;

        g_assert_cmpuint(room, >=, 1);
        g_assert_cmpuint(room, <=, FRAME_READER_LIMIT);
        link->wait_after = 0;

        /* Filled up until there is no room */
        while (frame_reader_room(link->fr)) {
            size_t was = frame_reader_room(link->fr), part;

            if (!stream->len) {
                append_frame(stream, true, 0, sizes[k], sent++);
            }
            part = MIN(was, MIN(stream->len, 1 + pieces++ % 4000));
            frame_reader_push(link->fr, stream->data, part);
            g_byte_array_remove_range(stream, 0, part);
            held += part;
            g_assert_cmpuint(held, <=, FRAME_READER_LIMIT);
            g_assert_cmpuint(frame_reader_room(link->fr), <, was);
        }
        g_assert_true(link->waiting);
        g_assert_cmpuint(link->frames->len, ==, 0);
        g_assert_cmpuint(held, >=, FRAME_STREAM_MAX_PAYLOAD + 8);

        /* A little is taken: a little room comes back. */
        link_resume(link, MAX(2, 40000 / sizes[k]));
        g_assert_cmpuint(link->frames->len, ==, MAX(2, 40000 / sizes[k]));
        g_assert_true(link->waiting);
        g_assert_cmpuint(frame_reader_room(link->fr), >, 0);

        link_resume(link, UINT_MAX);
        reader_push(link, stream->data, stream->len);
        settle_reader(link);
        g_assert_cmpuint(link->frames->len, ==, sent);
        for (int i = 0; i < sent; i++) {
            reader_check(link, i, sizes[k], 0, i);
        }
        g_assert_cmpuint(frame_reader_room(link->fr), ==, room);
        link_free(link);
    }
}

/*
 * Two sockets behind a hub are told of the same room, and each fills it.  The
 * handler takes all frames, some of them or none meanwhile.
 */
static void test_reader_push_twice(void)
{
    static const unsigned accepts[] = { UINT_MAX, 100, 0 };

    for (int i = 0; i < ARRAY_SIZE(accepts); i++) {
        Link *link = link_new_reader(true);
        g_autoptr(GByteArray) stream = g_byte_array_new();
        size_t all = frame_reader_room(link->fr), at = all / 2, room;
        unsigned sent = 0;

        while (stream->len < 3 * all) {
            append_frame(stream, true, sent, payload_size(sent), sent);
            sent++;
        }
        link->wait_after = accepts[i];
        frame_reader_push(link->fr, stream->data, at);
        room = frame_reader_room(link->fr);
        for (int j = 0; j < 2; j++) {
            frame_reader_push(link->fr, stream->data + at, room);
            at += room;
        }
        if (link->waiting) {
            g_assert_cmpuint(frame_reader_room(link->fr), ==, 0);
        }
        link_resume(link, UINT_MAX);
        frame_reader_push(link->fr, stream->data + at, stream->len - at);
        settle_reader(link);
        g_assert_cmpuint(link->frames->len, ==, sent);
        for (int j = 0; j < sent; j++) {
            reader_check(link, j, payload_size(j), j, j);
        }
        g_assert_cmpuint(frame_reader_room(link->fr), ==, all);
        g_assert_true(frame_reader_empty(link->fr));
        link_free(link);
    }
}

/* Empty is what holds nothing, not even a part of a frame. */
static void test_reader_empty(void)
{
    Link *link = link_new_reader(true);
    g_autoptr(GByteArray) stream = g_byte_array_new();

    append_frame(stream, true, 0, 60, 1);
    g_assert_true(frame_reader_empty(link->fr));
    for (int i = 0; i < stream->len - 1; i++) {
        reader_push(link, stream->data + i, 1);
        g_assert_false(frame_reader_empty(link->fr));
    }
    reader_push(link, stream->data + stream->len - 1, 1);
    g_assert_true(frame_reader_empty(link->fr));

    /* A frame that the handler has not taken, and a part of one */
    link->wait_after = 0;
    reader_push(link, stream->data, stream->len);
    reader_push(link, stream->data, 10);
    frame_reader_reset(link->fr);
    g_assert_false(frame_reader_empty(link->fr));
    link_resume(link, UINT_MAX);
    g_assert_true(frame_reader_empty(link->fr));
    reader_push(link, stream->data, 10);
    g_assert_false(frame_reader_empty(link->fr));
    frame_reader_reset(link->fr);
    g_assert_true(frame_reader_empty(link->fr));
    g_assert_cmpuint(frame_reader_errors(link->fr), ==, 0);
    link_free(link);
}

static void test_reader_reset(gconstpointer vnet_hdr)
{
    Link *link = link_new_reader(GPOINTER_TO_INT(vnet_hdr));
    g_autoptr(GByteArray) stream = g_byte_array_new();
    size_t room = frame_reader_room(link->fr), first;

    append_frame(stream, link->vnet_hdr, 12, 100, 1);
    first = stream->len;
    append_frame(stream, link->vnet_hdr, 12, 70, 2);

    /* Cut off at every byte of the second frame */
    for (int cut = first; cut < stream->len; cut++) {
        reader_push(link, stream->data, cut);
        frame_reader_reset(link->fr);
        g_assert_cmpuint(frame_reader_room(link->fr), ==, room);
        reader_push(link, stream->data, stream->len);
        g_assert_cmpuint(link->frames->len, ==, 3);
        reader_check(link, 0, 100, 12, 1);
        reader_check(link, 1, 100, 12, 1);
        reader_check(link, 2, 70, 12, 2);
        reader_forget(link);
    }

    /* The same with complete frames that wait: they are kept. */
    for (int cut = first; cut < stream->len; cut++) {
        link->wait_after = 0;
        reader_push(link, stream->data, cut);
        g_assert_true(link->waiting);
        frame_reader_reset(link->fr);
        frame_reader_reset(link->fr);
        reader_push(link, stream->data, cut);
        frame_reader_reset(link->fr);
        reader_push(link, stream->data, stream->len);
        g_assert_cmpuint(link->frames->len, ==, 0);
        link_resume(link, UINT_MAX);
        g_assert_cmpuint(link->frames->len, ==, 4);
        reader_check(link, 0, 100, 12, 1);
        reader_check(link, 1, 100, 12, 1);
        reader_check(link, 2, 100, 12, 1);
        reader_check(link, 3, 70, 12, 2);
        g_assert_cmpuint(frame_reader_room(link->fr), ==, room);
        reader_forget(link);
    }

    /* Nothing there */
    frame_reader_reset(link->fr);
    frame_reader_resume(link->fr);
    g_assert_cmpuint(frame_reader_room(link->fr), ==, room);
    g_assert_cmpuint(link->frames->len, ==, 0);
    link_free(link);
}

static void peer_send(Link *link, GByteArray *stream)
{
    size_t sent = 0;

    while (sent < stream->len) {
        ssize_t ret = send(link->peer, stream->data + sent,
                           stream->len - sent, MSG_NOSIGNAL);

        if (ret < 0) {
            g_assert_cmpint(errno, ==, EAGAIN);
            main_loop_wait(true);
            continue;
        }
        sent += ret;
    }
}

/* Over the wire, with a handler that makes the peer wait */
static void test_reader_stream(void)
{
    Link *link = link_new_reader(true);
    g_autoptr(GByteArray) stream = g_byte_array_new();
    unsigned sent = 0;
    size_t pos = 0;

    while (stream->len < 4 * FRAME_READER_LIMIT) {
        append_frame(stream, true, sent % 20, payload_size(sent), sent);
        sent++;
    }
    link_connect(link);
    link->wait_after = 10;

    /* The peer gets stuck since the reader takes no more than its limit. */
    for (int idle = 0; idle < 100;) {
        ssize_t ret = send(link->peer, stream->data + pos, stream->len - pos,
                           MSG_NOSIGNAL);

        if (ret > 0) {
            pos += ret;
            idle = 0;
        } else {
            main_loop_wait(true);
            idle++;
        }
    }
    g_assert_true(link->waiting);
    g_assert_cmpuint(link->frames->len, ==, 10);
    g_assert_cmpuint(pos, <, stream->len);
    g_assert_cmpuint(frame_reader_room(link->fr), ==, 0);

    g_byte_array_remove_range(stream, 0, pos);
    link_resume(link, UINT_MAX);
    peer_send(link, stream);
    AWAIT(link->frames->len == sent);
    for (int i = 0; i < sent; i++) {
        reader_check(link, i, payload_size(i), i % 20, i);
    }
    link_free(link);
}

/* A length that breaks framing ends this connection, and only this one. */
static void test_reader_too_long(gconstpointer data)
{
    uint32_t length = GPOINTER_TO_UINT(data);
    g_autofree char *message = g_strdup_printf(
        "chardev 'stream': invalid frame length %" PRIu32 " (maximum %d); "
        "closing the connection\n", length, FRAME_STREAM_MAX_PAYLOAD);

    for (int wait = 0; wait < 2; wait++) {
        Link *link = link_new_reader(true);
        g_autoptr(GByteArray) stream = g_byte_array_new();
        size_t room = frame_reader_room(link->fr);

        link_connect(link);
        link->wait_after = wait ? 0 : UINT_MAX;
        append_frame(stream, true, 1, 60, 1);
        append_frame(stream, true, 2, 80, 2);
        append_be32(stream, length);
        append_be32(stream, 12);
        /* Would pass for frames */
        for (int i = 0; i < 20; i++) {
            append_frame(stream, true, 3, 90, 3);
        }

        errors_begin();
        peer_send(link, stream);
        if (wait) {
            AWAIT(link->waiting);
            settle();
            link_resume(link, UINT_MAX);
        }
        AWAIT(link->closed);
        settle();
        g_assert_cmpuint(errors_end(), ==, 1);
        g_assert_nonnull(strstr(errors_text, message));
        g_assert_cmpuint(frame_reader_errors(link->fr), ==, 1);
        g_assert_true(frame_reader_empty(link->fr));
        g_assert_cmpuint(link->closed, ==, 1);
        g_assert_cmpuint(link->frames->len, ==, 2);
        reader_check(link, 0, 60, 1, 1);
        reader_check(link, 1, 80, 2, 2);
        /* The peer sees it too: the end, or a reset if it had more to say. */
        g_assert_cmpint(recv(link->peer, stream->data, 1, 0), <=, 0);
        g_assert_cmpint(errno, !=, EAGAIN);
        close(link->peer);
        reader_forget(link);

        /* The next connection starts clean. */
        link_connect(link);
        g_assert_cmpuint(frame_reader_room(link->fr), ==, room);
        g_byte_array_set_size(stream, 0);
        append_frame(stream, true, 4, 100, 4);
        errors_begin();
        peer_send(link, stream);
        AWAIT(link->frames->len == 1);
        g_assert_cmpuint(errors_end(), ==, 0);
        g_assert_cmpuint(frame_reader_errors(link->fr), ==, 1);
        reader_check(link, 0, 100, 4, 4);
        link_free(link);
    }
}

/* A device that does not close: still one error, until the reset. */
static void test_reader_too_long_once(void)
{
    Link *link = link_new_reader(false);
    g_autoptr(GByteArray) stream = g_byte_array_new();

    append_frame(stream, false, 0, 60, 1);
    append_be32(stream, FRAME_STREAM_MAX_PAYLOAD + 1);
    for (int i = 0; i < 1000; i++) {
        append_be32(stream, 0xffffffff);
    }
    for (int round = 1; round <= 2; round++) {
        errors_begin();
        for (int i = 0; i < stream->len; i++) {
            frame_reader_push(link->fr, stream->data + i, 1);
        }
        /* Told the first time, counted each time */
        g_assert_cmpuint(errors_end(), ==, round == 1);
        g_assert_cmpuint(frame_reader_errors(link->fr), ==, round);
        g_assert_cmpuint(link->frames->len, ==, round);
        frame_reader_reset(link->fr);
    }

    g_byte_array_set_size(stream, 0);
    append_frame(stream, false, 0, 60, 2);
    reader_push(link, stream->data, stream->len);
    g_assert_cmpuint(link->frames->len, ==, 3);
    reader_check(link, 2, 60, 0, 2);
    link_free(link);
}

static void test_reader_free(void)
{
    Link *link = link_new_reader(true);
    g_autoptr(GByteArray) stream = g_byte_array_new();

    append_frame(stream, true, 0, 60, 1);
    append_frame(stream, true, 0, 60, 2);
    link->wait_after = 0;
    reader_push(link, stream->data, stream->len - 1);
    link_free(link);
    frame_reader_free(NULL);
}

#define MANY_FRAMES 10000

static void reader_push_many(Link *link)
{
    g_autoptr(GByteArray) stream = g_byte_array_new();

    for (int i = 0; i < MANY_FRAMES; i++) {
        append_frame(stream, true, i, 60, i);
    }
    g_assert_cmpuint(stream->len, <=, frame_reader_room(link->fr));
    frame_reader_push(link->fr, stream->data, stream->len);
}

/* With many frames left, of which a part was to come from the main loop */
static void test_reader_free_many(void)
{
    Link *link = link_new_reader(true);

    reader_push_many(link);
    g_assert_cmpuint(link->frames->len, <, MANY_FRAMES);
    /* From now on a call of the handler is an error. */
    link->waiting = true;
    link_free(link);
}

typedef struct Others {
    Link *link;
    QEMUBH *bh;
    QEMUTimer *timer;
    unsigned bh_turns, timer_turns;     /* while there was something left */
} Others;

static void others_bh(void *opaque)
{
    Others *o = opaque;

    if (o->link->frames->len < MANY_FRAMES) {
        o->bh_turns++;
        qemu_bh_schedule(o->bh);
    }
}

static void others_timer(void *opaque)
{
    Others *o = opaque;

    if (o->link->frames->len < MANY_FRAMES) {
        o->timer_turns++;
        timer_mod(o->timer, qemu_clock_get_ns(QEMU_CLOCK_REALTIME) + 1);
    }
}

/* While many frames are handed out others get their turn. */
static void test_reader_turns(void)
{
    for (int wait = 0; wait < 2; wait++) {
        Others o = { .link = link_new_reader(true) };

        o.bh = qemu_bh_new(others_bh, &o);
        o.timer = timer_new_ns(QEMU_CLOCK_REALTIME, others_timer, &o);
        qemu_bh_schedule(o.bh);
        timer_mod(o.timer, 0);
        if (wait) {
            o.link->wait_after = 0;
            reader_push_many(o.link);
            g_assert_true(o.link->waiting);
            o.link->waiting = false;
            o.link->wait_after = UINT_MAX;
            frame_reader_resume(o.link->fr);
        } else {
            reader_push_many(o.link);
        }
        g_assert_cmpuint(o.link->frames->len, >, 0);
        AWAIT(o.link->frames->len == MANY_FRAMES);
        g_assert_cmpuint(o.bh_turns, >=, 5);
        g_assert_cmpuint(o.timer_turns, >=, 5);
        for (int i = 0; i < MANY_FRAMES; i++) {
            reader_check(o.link, i, 60, i, i);
        }
        /* They came many at a time. */
        g_assert_cmpuint(o.link->calls, <, MANY_FRAMES / 4);
        qemu_bh_delete(o.bh);
        timer_free(o.timer);
        link_free(o.link);
    }
}

/* A part of each batch, once resumed from the main loop right away */
static void test_reader_parts(void)
{
    for (int part = 1; part <= FRAME_READER_BATCH + 1; part += 7) {
        Link *link = link_new_reader(true);

        link->wait_after = part;
        reader_push_many(link);
        while (link->frames->len < MANY_FRAMES) {
            unsigned before = link->frames->len;

            g_assert_true(link->waiting);
            link_resume(link, part);
            g_assert_cmpuint(link->frames->len, ==,
                             MIN(before + part, MANY_FRAMES));
        }
        for (int i = 0; i < MANY_FRAMES; i++) {
            reader_check(link, i, 60, i, i);
        }
        link_free(link);
    }
}

/*
 * The reader against a model of it: the frames that are complete, in order,
 * and the place of each in what was pushed since the last reset.
 */
typedef struct ModelFrame {
    size_t size;
    uint32_t vnet_hdr_len;
    uint32_t seq;
    size_t end;                 /* offset on the wire behind the frame */
} ModelFrame;

typedef struct Model {
    FrameReader *fr;
    GQueue on_wire;             /* frames not completely pushed */
    GQueue complete;            /* frames to be handed out */
    GByteArray *wire;
    size_t pushed;
    size_t complete_end;        /* of the last complete frame */
    unsigned accept;            /* frames before the next WAIT */
    bool waiting;
    uint64_t handed_out;
    GRand *rand;                /* NULL: no whims */
    bool running;
    unsigned resumes;           /* under way in the main loop */
} Model;

static void model_resume(Model *model)
{
    model->waiting = false;
    frame_reader_resume(model->fr);
}

static void model_resume_later(void *opaque)
{
    Model *model = opaque;

    model->resumes--;
    model_resume(model);
}

static void model_reset(Model *model)
{
    g_queue_clear_full(&model->on_wire, g_free);
    g_byte_array_set_size(model->wire, 0);
    model->pushed = model->complete_end = 0;
    frame_reader_reset(model->fr);
}


static bool model_frame(Model *model, uint8_t *payload, size_t size,
                        uint32_t vnet_hdr_len)
{
    g_autofree uint8_t *expected = g_malloc(size + 1);
    ModelFrame *frame = g_queue_peek_head(&model->complete);

    g_assert_false(model->waiting);
    g_assert_nonnull(frame);
    g_assert_cmpuint(size, ==, frame->size);
    g_assert_cmpuint(vnet_hdr_len, ==, frame->vnet_hdr_len);
    fill_payload(expected, size, frame->seq);
    g_assert(!memcmp(payload, expected, size));
    if (!model->accept) {
        model->waiting = true;
        return false;
    }
    model->accept--;
    memset(payload, 0xa5, size);
    g_free(g_queue_pop_head(&model->complete));
    model->handed_out++;
    return true;
}

static size_t model_frames(void *opaque, const StreamFrame *frames, size_t n)
{
    Model *model = opaque;
    int whim = model->rand ? g_rand_int_range(model->rand, 0, 100) : 100;
    size_t done = 0;

    g_assert_cmpuint(n, >, 0);
    g_assert_cmpuint(n, <=, FRAME_READER_BATCH);
    g_assert_false(model->running);
    model->running = true;
    if (whim < 30) {
        /* A part of the batch, none and all included */
        model->accept = g_rand_int_range(model->rand, 0, n + 1);
    }
    while (done < n && model_frame(model, frames[done].payload,
                                   frames[done].size,
                                   frames[done].vnet_hdr_len)) {
        done++;
    }
    if (done < n && whim % 3 == 0) {
        /* The rest soon */
        aio_bh_schedule_oneshot(qemu_get_aio_context(), model_resume_later,
                                model);
        model->resumes++;
    } else if (done == n && whim % 10 == 1) {
        /* It goes on anyway. */
        frame_reader_resume(model->fr);
    }
    if (whim == 50) {
        /* The connection ends because of what was in the frame. */
        model_reset(model);
    }
    model->running = false;
    return done;
}

static void model_push(Model *model, size_t size)
{
    g_autofree uint8_t *copy = g_memdup2(model->wire->data + model->pushed,
                                         size);
    ModelFrame *frame;

    if (!size) {
        return;
    }
    model->pushed += size;
    while ((frame = g_queue_peek_head(&model->on_wire)) &&
           frame->end <= model->pushed) {
        g_queue_pop_head(&model->on_wire);
        g_queue_push_tail(&model->complete, frame);
        model->complete_end = frame->end;
    }
    frame_reader_push(model->fr, copy, size);
}

static void test_reader_fuzz(gconstpointer data)
{
    uint32_t seed = FUZZ_SEED + GPOINTER_TO_UINT(data);
    bool vnet_hdr = seed & 1;
    g_autoptr(GRand) rand = g_rand_new_with_seed(seed);
    Link *link = link_new(vnet_hdr);
    Model model = { .wire = g_byte_array_new(), .rand = rand };
    uint32_t seq = 0;
    size_t room;

    g_test_message("seed 0x%x", seed);
    g_queue_init(&model.on_wire);
    g_queue_init(&model.complete);
    model.fr = frame_reader_new(&link->fe, vnet_hdr, model_frames, &model);
    room = frame_reader_room(model.fr);

    for (int step = 0; step < FUZZ_STEPS; step++) {
        int what = g_rand_int_range(rand, 0, 1000);

        if (what < 350) {
            ModelFrame *frame = g_new0(ModelFrame, 1);

            frame->size = g_rand_int_range(rand, 0, 300);
            if (what < 100) {
                frame->size = 0;
            } else if (what < 110) {
                frame->size = g_rand_int_range(rand, 0,
                                               FRAME_STREAM_MAX_PAYLOAD + 1);
            }
            frame->seq = seq++;
            frame->vnet_hdr_len = vnet_hdr ? g_rand_int(rand) : 0;
            append_frame(model.wire, vnet_hdr, frame->vnet_hdr_len,
                         frame->size, frame->seq);
            frame->end = model.wire->len;
            g_queue_push_tail(&model.on_wire, frame);
        } else if (what < 800) {
            size_t left = model.wire->len - model.pushed;
            size_t most = MIN(frame_reader_room(model.fr), left);

            if (what < 600) {
                most = MIN(most, g_rand_int_range(rand, 0, 200));
            } else if (what < 700) {
                most = MIN(most, g_rand_int_range(rand, 0, 20000));
            } else if (what >= 790) {
                most = left;    /* whether there is room or not */
            }
            model_push(&model, most);
        } else if (what < 980) {
            model.accept = g_rand_int_range(rand, 0, what < 900 ? 5 : 1000);
            model_resume(&model);
        } else if (what < 990) {
            model_reset(&model);
        }

        /* Sometimes what is to come from the main loop comes late. */
        if (!model.waiting && g_rand_boolean(rand)) {
            AWAIT(model.waiting || g_queue_is_empty(&model.complete));
        }
        if (!model.waiting && g_queue_is_empty(&model.complete)) {
            g_assert_cmpuint(frame_reader_room(model.fr), >, 0);
        }
        g_assert_cmpuint(frame_reader_room(model.fr), <=, FRAME_READER_LIMIT);
        g_assert_true(frame_reader_empty(model.fr) ==
                      (g_queue_is_empty(&model.complete) &&
                       model.pushed == model.complete_end));
    }

    /* In the end nothing is left. */
    model.rand = NULL;
    model.accept = UINT_MAX;
    model_resume(&model);
    AWAIT(g_queue_is_empty(&model.complete) && !model.resumes);
    model_reset(&model);
    g_assert_cmpuint(frame_reader_room(model.fr), ==, room);
    g_assert_cmpuint(model.handed_out, >, 500);

    frame_reader_free(model.fr);
    g_byte_array_unref(model.wire);
    link_free(link);
}

int main(int argc, char **argv)
{
    qemu_init_main_loop(&error_abort);
    socket_init();
    g_test_init(&argc, &argv, NULL);
    module_call_init(MODULE_INIT_QOM);
    type_register_static(&test_chardev_info);
    qemu_add_opts(&qemu_chardev_opts);

    /* A flush on a closed connection must not end the test. */
    signal(SIGPIPE, SIG_IGN);

    g_test_add_func("/frame-stream/writer/format", test_writer_format);
    g_test_add_data_func("/frame-stream/writer/batch/plain",
                         GINT_TO_POINTER(false), test_writer_batch);
    g_test_add_data_func("/frame-stream/writer/batch/vnet-hdr",
                         GINT_TO_POINTER(true), test_writer_batch);
    g_test_add_func("/frame-stream/writer/full", test_writer_full);
    g_test_add_func("/frame-stream/writer/slow-peer", test_writer_slow_peer);
    g_test_add_func("/frame-stream/writer/fast-peer", test_writer_fast_peer);
    g_test_add_data_func("/frame-stream/writer/rewind/plain",
                         GINT_TO_POINTER(false), test_writer_rewind);
    g_test_add_data_func("/frame-stream/writer/rewind/vnet-hdr",
                         GINT_TO_POINTER(true), test_writer_rewind);
    g_test_add_func("/frame-stream/writer/unconnected",
                    test_writer_unconnected);
    g_test_add_func("/frame-stream/writer/closed-in-flush",
                    test_writer_closed_in_flush);
    g_test_add_func("/frame-stream/writer/discard", test_writer_discard);
    g_test_add_func("/frame-stream/writer/flush-now", test_writer_flush_now);
    g_test_add_func("/frame-stream/writer/close/begun", test_writer_close);
    g_test_add_func("/frame-stream/writer/close/full", test_writer_close_full);
    g_test_add_func("/frame-stream/writer/rewind-discard",
                    test_writer_rewind_discard);
#if !defined(QEMU_SANITIZE_ADDRESS) && defined(CONFIG_LINUX)
    g_test_add_func("/frame-stream/writer/memory", test_writer_memory);
#endif
    g_test_add_func("/frame-stream/writer/errors", test_writer_errors);
    g_test_add_func("/frame-stream/writer/partial-error",
                    test_writer_partial_error);
    g_test_add_data_func("/frame-stream/writer/datagrams/plain",
                         GINT_TO_POINTER(false), test_writer_datagrams);
    g_test_add_data_func("/frame-stream/writer/datagrams/vnet-hdr",
                         GINT_TO_POINTER(true), test_writer_datagrams);
    g_test_add_func("/frame-stream/writer/retry", test_writer_retry);
    g_test_add_func("/frame-stream/writer/limit", test_writer_limit);

    g_test_add_func("/frame-stream/reader/format", test_reader_format);
    g_test_add_data_func("/frame-stream/reader/splits/plain",
                         GINT_TO_POINTER(false), test_reader_splits);
    g_test_add_data_func("/frame-stream/reader/splits/vnet-hdr",
                         GINT_TO_POINTER(true), test_reader_splits);
    g_test_add_func("/frame-stream/reader/prompt", test_reader_prompt);
    g_test_add_data_func("/frame-stream/reader/empty-frames/plain",
                         GINT_TO_POINTER(false), test_reader_empty_frames);
    g_test_add_data_func("/frame-stream/reader/empty-frames/vnet-hdr",
                         GINT_TO_POINTER(true), test_reader_empty_frames);
    g_test_add_data_func("/frame-stream/reader/longest/plain",
                         GINT_TO_POINTER(false), test_reader_longest);
    g_test_add_data_func("/frame-stream/reader/longest/vnet-hdr",
                         GINT_TO_POINTER(true), test_reader_longest);
    g_test_add_func("/frame-stream/reader/wait", test_reader_wait);
    g_test_add_func("/frame-stream/reader/wait-long", test_reader_wait_long);
    g_test_add_func("/frame-stream/reader/room", test_reader_room);
    g_test_add_func("/frame-stream/reader/push-twice", test_reader_push_twice);
    g_test_add_func("/frame-stream/reader/empty", test_reader_empty);
    g_test_add_data_func("/frame-stream/reader/reset/plain",
                         GINT_TO_POINTER(false), test_reader_reset);
    g_test_add_data_func("/frame-stream/reader/reset/vnet-hdr",
                         GINT_TO_POINTER(true), test_reader_reset);
    g_test_add_func("/frame-stream/reader/stream", test_reader_stream);
    g_test_add_data_func("/frame-stream/reader/too-long/by-one",
                         GUINT_TO_POINTER(FRAME_STREAM_MAX_PAYLOAD + 1),
                         test_reader_too_long);
    g_test_add_data_func("/frame-stream/reader/too-long/most",
                         GUINT_TO_POINTER(UINT32_MAX), test_reader_too_long);
    g_test_add_func("/frame-stream/reader/too-long/once",
                    test_reader_too_long_once);
    g_test_add_func("/frame-stream/reader/free", test_reader_free);
    g_test_add_func("/frame-stream/reader/free-many", test_reader_free_many);
    g_test_add_func("/frame-stream/reader/turns", test_reader_turns);
    g_test_add_func("/frame-stream/reader/parts", test_reader_parts);
    g_test_add_data_func("/frame-stream/reader/fuzz/plain",
                         GUINT_TO_POINTER(1), test_reader_fuzz);
    g_test_add_data_func("/frame-stream/reader/fuzz/vnet-hdr",
                         GUINT_TO_POINTER(2), test_reader_fuzz);
    return g_test_run();
}
