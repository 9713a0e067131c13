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
#include "qemu/bswap.h"
#include "qemu/config-file.h"
#include "qemu/main-loop.h"
#include "qemu/module.h"
#include "qemu/option.h"
#include "qemu/sockets.h"
#include "qom/object.h"
#include "system/system.h"

#define LIMIT_S 60

/* What a writer holds, in bytes */
#define WRITER_LIMIT (1 * MiB)

/* As in net/frame-stream.c */
#define WRITER_RETRY_MS 10

/* By how much the memory may grow, with allocators' habits */
#define MEMORY_LIMIT (24 * MiB)

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

/* Also what a timer of the writer's makes happen */
static void settle_timers(void)
{
    gint64 end = g_get_monotonic_time() + 5 * WRITER_RETRY_MS * 1000;

    while (g_get_monotonic_time() < end) {
        main_loop_wait(true);
    }
}

/* Keep what is reported as an error between these two. */
static FILE *errors;
static int saved_stderr;

static void errors_begin(void)
{
    errors = tmpfile();
    g_assert_nonnull(errors);
    saved_stderr = dup(STDERR_FILENO);
    g_assert_cmpint(dup2(fileno(errors), STDERR_FILENO), >=, 0);
}

/* It is that of this length, or nothing if that is 0. */
static void errors_end(uint32_t length)
{
    g_autofree char *expected = g_strdup_printf(
        "%s: chardev 'stream': invalid frame length %" PRIu32
        " (maximum %d); closing the connection\n",
        g_get_prgname(), length, FRAME_STREAM_MAX_PAYLOAD);
    char text[4096];

    dup2(saved_stderr, STDERR_FILENO);
    close(saved_stderr);
    rewind(errors);
    text[fread(text, 1, sizeof(text) - 1, errors)] = '\0';
    fclose(errors);
    g_assert_cmpstr(text, ==, length ? expected : "");
}

/*
 * A connection: the character device with a writer or a reader, and the peer
 */
typedef struct Link {
    Chardev *chr;
    CharFrontend fe;
    bool vnet_hdr;
    char *dir, *path;
    int peer;
    unsigned opened, closed;
    uint32_t next_seq;
    GByteArray *expected;       /* the stream, from where it was checked */
    GByteArray *got;            /* by the peer or, put together, the handler */

    FrameWriter *fw;
    bool calling;               /* a function of the writer */
    unsigned progress;
    void (*on_progress)(struct Link *link);

    FrameReader *fr;
    uint64_t errors;            /* as the reader counts them */
    unsigned accept;            /* frames before the handler waits */
    bool waiting;
    unsigned frames;            /* handed out, of which got consists */
    unsigned calls;             /* of the handler */
} Link;

/*
 * Frames: the bytes of each, and the length of its virtio-net header, follow
 * from its number.
 */

#define VNET_HDR_LEN(seq) ((seq) * 2654435761u)

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

static void append_frame(GByteArray *stream, bool vnet_hdr, size_t size,
                         uint32_t seq)
{
    uint32_t x = seq * 2654435761u + 1;

    append_be32(stream, size);
    if (vnet_hdr) {
        append_be32(stream, VNET_HDR_LEN(seq));
    }
    g_byte_array_set_size(stream, stream->len + size);
    for (size_t i = stream->len - size; i < stream->len; i++) {
        x = x * 1664525u + 1013904223u;
        stream->data[i] = x >> 24;
    }
}

/* The end of the frame that begins at @at */
static size_t frame_end(Link *link, GByteArray *stream, size_t at)
{
    g_assert_cmpuint(at, <, stream->len);
    return at + (link->vnet_hdr ? 8 : 4) + ldl_be_p(stream->data + at);
}

static unsigned frame_count(Link *link)
{
    unsigned frames = 0;

    for (size_t at = 0; at < link->expected->len; frames++) {
        at = frame_end(link, link->expected, at);
    }
    return frames;
}

/* Expect one more frame. */
static void link_make(Link *link, size_t size)
{
    append_frame(link->expected, link->vnet_hdr, size, link->next_seq++);
}

/* Frames of the formats without and with the length of the virtio-net header */
static void link_make_golden(Link *link)
{
    static const uint8_t plain[] = {
        0x00, 0x00, 0x00, 0x03, 0xaa, 0xbb, 0xcc,
        0x00, 0x00, 0x00, 0x01, 0x11,
    };
    static const uint8_t vnet_hdr[] = {
        0x00, 0x00, 0x00, 0x03, 0x00, 0x00, 0x00, 0x0c, 0xaa, 0xbb, 0xcc,
        0x00, 0x00, 0x00, 0x01, 0xff, 0xee, 0xdd, 0xcc, 0x11,
    };

    if (link->vnet_hdr) {
        g_byte_array_append(link->expected, vnet_hdr, sizeof(vnet_hdr));
    } else {
        g_byte_array_append(link->expected, plain, sizeof(plain));
    }
}

/* What is expected up to now does not matter any more. */
static void link_forget(Link *link)
{
    g_byte_array_set_size(link->expected, 0);
    g_byte_array_set_size(link->got, 0);
}

/* All that is expected has come, and no more. */
static void expect_all(Link *link)
{
    g_assert_cmpmem(link->got->data, link->got->len, link->expected->data,
                    link->expected->len);
    link_forget(link);
}

/*
 * Links
 */

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

static Link *link_new_on(Chardev *chr, bool vnet_hdr)
{
    Link *link = g_new0(Link, 1);

    g_assert_nonnull(chr);
    link->chr = chr;
    qemu_chr_fe_init(&link->fe, link->chr, &error_abort);
    link->vnet_hdr = vnet_hdr;
    link->peer = -1;
    link->expected = g_byte_array_new();
    link->got = g_byte_array_new();
    link->accept = UINT_MAX;
    return link;
}

static Link *link_new_logged(bool vnet_hdr, const char *log)
{
    char *dir = g_dir_make_tmp("frame-stream-XXXXXX", NULL);
    char *path = g_strdup_printf("%s/socket", dir);
    g_autofree char *spec = g_strdup_printf(
        "unix:%s,server=on,wait=off%s%s", path, log ? ",logfile=" : "",
        log ?: "");
    Link *link = link_new_on(qemu_chr_new("stream", spec, NULL), vnet_hdr);

    link->dir = dir;
    link->path = path;
    return link;
}

static Link *link_new(bool vnet_hdr)
{
    return link_new_logged(vnet_hdr, NULL);
}

/* Returns: how many frames the peer has not got. */
static uint64_t link_close_writer(Link *link)
{
    qemu_chr_fe_set_handlers(&link->fe, NULL, NULL, NULL, NULL, NULL, NULL,
                             true);
    return frame_writer_close(g_steal_pointer(&link->fw));
}

static void link_close_reader(Link *link)
{
    qemu_chr_fe_set_handlers(&link->fe, NULL, NULL, NULL, NULL, NULL, NULL,
                             true);
    frame_reader_close(g_steal_pointer(&link->fr));
}

static void link_free(Link *link)
{
    if (link->fw) {
        link_close_writer(link);
    }
    if (link->fr) {
        link_close_reader(link);
    }
    qemu_chr_fe_deinit(&link->fe, true);
    if (link->peer >= 0) {
        close(link->peer);
    }
    /* What was freed must not be called any more. */
    link->calling = link->waiting = true;
    settle();
    if (link->path) {
        unlink(link->path);
        rmdir(link->dir);
    }
    g_free(link->path);
    g_free(link->dir);
    g_byte_array_unref(link->expected);
    g_byte_array_unref(link->got);
    g_free(link);
}

G_DEFINE_AUTOPTR_CLEANUP_FUNC(Link, link_free)

static void link_connect(Link *link)
{
    unsigned opened = link->opened;

    link->peer = unix_connect(link->path, &error_abort);
    g_unix_set_fd_nonblocking(link->peer, true, NULL);
    AWAIT(link->opened > opened);
}

/* Make the writer's socket buffer as small as the kernel has it. */
static void link_connect_narrow(Link *link)
{
    int size = 1;

    link_connect(link);
    g_assert_cmpint(setsockopt(SOCKET_CHARDEV(link->chr)->sioc->fd,
                               SOL_SOCKET, SO_SNDBUF, &size, sizeof(size)),
                    ==, 0);
}

/* What it has got of a frame that was cut off is not a part of the stream. */
static void link_close_peer(Link *link)
{
    close(link->peer);
    link->peer = -1;
    g_byte_array_set_size(link->got, 0);
}

static void link_disconnect(Link *link)
{
    unsigned closed = link->closed;

    link_close_peer(link);
    AWAIT(link->closed > closed);
}

/*
 * Writer
 */

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

static void link_add_writer(Link *link, size_t limit)
{
    link->fw = frame_writer_new(&link->fe, link->vnet_hdr, limit,
                                link_progress, link);
    qemu_chr_fe_set_handlers(&link->fe, NULL, NULL, link_event, NULL, link,
                             NULL, true);
}

static Link *link_new_writer(bool vnet_hdr)
{
    Link *link = link_new(vnet_hdr);

    link_add_writer(link, WRITER_LIMIT);
    return link;
}

static void link_stage(Link *link, size_t size)
{
    uint32_t seq = link->next_seq;
    uint8_t *payload;

    link_make(link, size);
    link->calling = true;
    payload = frame_writer_reserve(link->fw, size + seq % 7);
    memcpy(payload, link->expected->data + link->expected->len - size, size);
    frame_writer_commit(link->fw, VNET_HDR_LEN(seq), size);
    link->calling = false;
}

static void link_stage_many(Link *link, unsigned n)
{
    while (n--) {
        link_stage(link, payload_size(link->next_seq));
    }
}

static void link_fill(Link *link, size_t size)
{
    while (!frame_writer_full(link->fw)) {
        link_stage(link, size);
    }
}

static int link_flush(Link *link)
{
    int ret;

    link->calling = true;
    ret = frame_writer_flush(link->fw, false);
    link->calling = false;
    return ret;
}

/* Take some of what has come to the peer; the main loop does not run. */
static size_t peer_take(Link *link)
{
    static uint8_t buf[64 * KiB];
    ssize_t ret = recv(link->peer, buf, sizeof(buf), 0);

    if (ret < 0) {
        g_assert_cmpint(errno, ==, EAGAIN);
        return 0;
    }
    g_byte_array_append(link->got, buf, ret);
    return ret;
}

/* The peer gets all that is expected, and no more. */
static void peer_expect(Link *link)
{
    AWAIT((peer_take(link), link->got->len >= link->expected->len));
    settle();
    peer_take(link);
    expect_all(link);
}

/*
 * Write what the narrow socket takes, and see that this ends inside of a
 * frame.  From now on the stream begins with that frame, and its first part is
 * what the peer has got.
 */
static void cut_off(Link *link)
{
    size_t whole = 0, end;

    link_flush(link);
    peer_take(link);
    g_assert_cmpuint(link->got->len, <, link->expected->len);
    g_assert(!memcmp(link->got->data, link->expected->data, link->got->len));
    while ((end = frame_end(link, link->expected, whole)) <= link->got->len) {
        whole = end;
    }
    g_byte_array_remove_range(link->expected, 0, whole);
    g_byte_array_remove_range(link->got, 0, whole);
    g_assert_cmpuint(link->got->len, >, 0);
}

static void test_writer_format(gconstpointer vnet_hdr)
{
    g_autoptr(Link) link = link_new_writer(GPOINTER_TO_INT(vnet_hdr));

    link_connect(link);
    link_make_golden(link);
    memcpy(frame_writer_reserve(link->fw, 2000), "\xaa\xbb\xcc", 3);
    frame_writer_commit(link->fw, 12, 3);
    memcpy(frame_writer_reserve(link->fw, 1), "\x11", 1);
    frame_writer_commit(link->fw, 0xffeeddcc, 1);
    g_assert_cmpuint(peer_take(link), ==, 0);

    /* At once, and without being called for it */
    g_assert_cmpint(link_flush(link), ==, 0);
    g_assert_cmpuint(peer_take(link), ==, link->expected->len);
    g_assert_cmpint(link_flush(link), ==, 0);
    peer_expect(link);
    g_assert_cmpuint(link->progress, ==, 0);

    /* Many at once, and the longest */
    link_stage_many(link, 500);
    link_stage(link, FRAME_STREAM_MAX_PAYLOAD);
    link_stage_many(link, 1);
    link_flush(link);
    peer_expect(link);
    g_assert_cmpuint(link_close_writer(link), ==, 0);
}

/* full() is about what is held, however large the frames are. */
static void test_writer_full(void)
{
    static const size_t limits[] = { 1, 1000, 64 * KiB, 5 * MiB };
    static const size_t sizes[] = { 1, 56, 1514, FRAME_STREAM_MAX_PAYLOAD };

    for (int i = 0; i < ARRAY_SIZE(limits) * ARRAY_SIZE(sizes); i++) {
        size_t limit = limits[i / ARRAY_SIZE(sizes)];
        g_autoptr(Link) link = link_new(true);

        link_add_writer(link, limit);
        link_connect(link);
        while (link->expected->len < limit) {
            g_assert_false(frame_writer_full(link->fw));
            link_stage(link, sizes[i % ARRAY_SIZE(sizes)]);
        }
        g_assert_true(frame_writer_full(link->fw));

        /* Those that cannot be refused */
        link_stage_many(link, 5);
        g_assert_true(frame_writer_full(link->fw));
        link_flush(link);
        peer_expect(link);
        g_assert_false(frame_writer_full(link->fw));
    }
}

static void pump(Link *link)
{
    while (!frame_writer_full(link->fw) && link->next_seq < 2000) {
        link_stage_many(link, 1);
        if (link->next_seq % 16 == 0) {
            link_flush(link);
        }
    }
    link_flush(link);
}

static void test_writer_slow_peer(void)
{
    g_autoptr(Link) link = link_new_writer(true);

    link->on_progress = pump;
    link_connect(link);
    pump(link);
    g_assert_true(frame_writer_full(link->fw));

    /* As long as the peer takes nothing there is no progress. */
    settle();
    g_assert_cmpuint(link->progress, ==, 0);
    g_assert_true(frame_writer_full(link->fw));

    AWAIT((peer_take(link), link->next_seq == 2000));
    g_assert_cmpuint(link->progress, >, 0);
    peer_expect(link);

    /* All is written: nothing is left to call for. */
    link->progress = 0;
    settle_timers();
    g_assert_cmpuint(link->progress, ==, 0);
}

static void test_writer_rewind(gconstpointer vnet_hdr)
{
    g_autoptr(Link) link = link_new_writer(GPOINTER_TO_INT(vnet_hdr));

    link_connect_narrow(link);
    for (int i = 0; i < 10; i++) {
        link_stage(link, 1000 + i);
    }
    for (int i = 0; i < 10; i++) {
        link_stage(link, 50000 + i);
    }

    /* The second and third time the same frame is cut off again. */
    for (int i = 0; i < 4; i++) {
        cut_off(link);
        link_disconnect(link);
        link_stage_many(link, 1);
        link_connect_narrow(link);
    }
    link_flush(link);
    peer_expect(link);
}

/* Nobody is there: nothing is lost, and full() holds. */
static void test_writer_unconnected(void)
{
    g_autoptr(Link) link = link_new_writer(true);

    for (int i = 0; i < 3; i++) {
        link_forget(link);
        while (!frame_writer_full(link->fw)) {
            link_stage_many(link, 1);
            g_assert_cmpint(link_flush(link), <, 0);
        }
        g_assert_cmpuint(link->expected->len, >=, WRITER_LIMIT);
        settle();
        /* discard() may have started the timer that gives memory back. */
        g_assert_cmpuint(link->progress, <=, i);
        g_assert_true(frame_writer_full(link->fw));
        if (i < 2) {
            g_assert_cmpuint(frame_writer_discard(link->fw), ==,
                             frame_count(link));
        }
    }
    link_connect(link);
    link_flush(link);
    peer_expect(link);
}

/* That the log cannot be written is no error of the connection. */
static void test_writer_log_full(void)
{
    g_autoptr(Link) link = link_new_logged(true, "/dev/full");

    link_add_writer(link, WRITER_LIMIT);
    link_connect_narrow(link);
    for (int i = 0; i < 10; i++) {
        link_stage(link, 50000);
        g_assert_cmpint(link_flush(link), ==, 0);
    }
    g_assert_false(frame_writer_empty(link->fw));
    peer_expect(link);
}

/* The writer finds out itself: CLOSED comes while it writes. */
static void test_writer_closed_in_flush(void)
{
    g_autoptr(Link) link = link_new_writer(true);

    link_connect_narrow(link);
    link_stage(link, 50001);
    link_stage(link, 50002);
    cut_off(link);
    g_assert_cmpuint(frame_count(link), ==, 2);
    link_close_peer(link);
    link_stage_many(link, 1);
    link_flush(link);
    AWAIT(link->closed);

    /* It may be told once that the peer has gone, not again and again. */
    settle();
    g_assert_cmpuint(link->progress, <=, 1);
    link_connect(link);
    link_flush(link);
    peer_expect(link);

    /* The same when nothing was left to write */
    link->closed = 0;
    link_close_peer(link);
    for (int i = 0; i < 3; i++) {
        link_stage_many(link, 1);
        link_flush(link);
    }
    AWAIT(link->closed);
    link_connect(link);
    link_flush(link);
    peer_expect(link);
}

static void test_writer_discard(void)
{
    g_autoptr(Link) link = link_new_writer(true);

    g_assert_cmpuint(frame_writer_discard(link->fw), ==, 0);
    link_connect_narrow(link);

    /* None begun: all go. */
    link_stage_many(link, 100);
    g_assert_cmpuint(frame_writer_discard(link->fw), ==, 100);
    g_assert_cmpuint(frame_writer_discard(link->fw), ==, 0);
    g_assert_false(frame_writer_full(link->fw));
    link_forget(link);
    link_flush(link);
    peer_expect(link);

    /* Some written, one begun: its rest stays, and what is staged follows. */
    for (int i = 0; i < 3; i++) {
        link_stage(link, 500 + i);
    }
    link_fill(link, 40000);
    cut_off(link);
    g_assert_cmpuint(frame_writer_discard(link->fw), ==,
                     frame_count(link) - 1);
    g_assert_false(frame_writer_full(link->fw));
    g_byte_array_set_size(link->expected, frame_end(link, link->expected, 0));
    link_stage_many(link, 10);
    peer_expect(link);

    /* What a closed connection cut off counts as not begun. */
    link_stage(link, 60000);
    link_stage_many(link, 1);
    cut_off(link);
    link_disconnect(link);
    g_assert_cmpuint(frame_writer_discard(link->fw), ==, 2);
    link_forget(link);
    link_connect(link);
    link_stage_many(link, 1);
    link_flush(link);
    peer_expect(link);
}

/* At once, although nobody has told that there is room */
static void test_writer_flush_now(void)
{
    g_autoptr(Link) link = link_new_writer(true);

    link_connect_narrow(link);
    g_assert_true(frame_writer_empty(link->fw));
    for (int i = 0; i < 10; i++) {
        link_stage(link, 50000);
    }
    g_assert_cmpint(link_flush(link), ==, 0);
    g_assert_false(frame_writer_empty(link->fw));
    while (link->got->len < link->expected->len) {
        g_assert_cmpuint(peer_take(link), >, 0);
        g_assert_cmpint(frame_writer_flush(link->fw, true), ==, 0);
    }
    g_assert_true(frame_writer_empty(link->fw));
    expect_all(link);
}

enum { UNCONNECTED, NOT_BEGUN, BEGUN, DISCONNECTED };

/* The connection ends only if it could not go on with a frame. */
static void test_writer_close(void)
{
    for (int state = UNCONNECTED; state <= DISCONNECTED; state++) {
        g_autoptr(Link) link = link_new_writer(true);
        uint8_t byte;

        if (state >= NOT_BEGUN) {
            link_connect_narrow(link);
        }
        link_fill(link, 50000);
        if (state >= BEGUN) {
            cut_off(link);
        }
        if (state == DISCONNECTED) {
            link_disconnect(link);
        }
        g_assert_cmpuint(link_close_writer(link), ==, frame_count(link));
        if (link->peer >= 0) {
            g_assert_cmpint(recv(link->peer, &byte, 1, 0), ==,
                            state == BEGUN ? 0 : -1);
        }
    }
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
    g_autoptr(Link) link = link_new_writer(true);
    size_t before, written = 0;

    link_connect(link);
    before = memory_used();
    while (written < 64 * MiB) {
        link_fill(link, 1514);
        written += link->expected->len;
        link_flush(link);
        AWAIT((peer_take(link), !frame_writer_full(link->fw)));
        link_forget(link);
        g_assert_cmpuint(memory_used(), <, before + MEMORY_LIMIT);
    }
}

/* The memory that a burst took is given back. */
static void test_writer_memory_burst(void)
{
    /* malloc() gets so much from the kernel, and free() returns it. */
    const size_t limit = 64 * MiB;
    g_autoptr(Link) link = link_new(true);
    size_t full;

    link_add_writer(link, limit);
    link_connect(link);
    link_fill(link, 50000);
    full = memory_used();
    link_flush(link);
    AWAIT((peer_take(link), link_forget(link), frame_writer_empty(link->fw)));
    AWAIT(memory_used() + limit / 2 < full);
}
#endif

/*
 * A character device that takes what the test lets it take, and fails then
 */

#define TYPE_CHARDEV_TEST "chardev-frame-test"
OBJECT_DECLARE_SIMPLE_TYPE(TestChardev, CHARDEV_TEST)

struct TestChardev {
    Chardev parent;
    Link *link;
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
    g_byte_array_append(tc->link->got, buf, len);
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

static TestChardev *test_chardev_new(int error)
{
    Chardev *chr = qemu_chardev_new("test", TYPE_CHARDEV_TEST, NULL, NULL,
                                    &error_abort);
    TestChardev *tc = CHARDEV_TEST(chr);

    tc->error = error;
    tc->link = link_new_on(chr, true);
    link_add_writer(tc->link, WRITER_LIMIT);
    return tc;
}

/*
 * A device that fails wherever it likes: it is told, and what is staged goes
 * on from there.
 */
static void test_writer_errors(void)
{
    static const int codes[] = { EIO, ENOSPC, EPIPE, 0 };

    for (int i = 0; i < ARRAY_SIZE(codes); i++) {
        TestChardev *tc = test_chardev_new(codes[i]);
        g_autoptr(Link) link = tc->link;

        for (int j = 0; j < 100; j++) {
            link_stage_many(link, 1);
            tc->budget = j * 997 % 3000;
            while (link->expected->len > link->got->len + tc->budget) {
                size_t after = link->got->len + tc->budget;

                g_assert_cmpint(link_flush(link), ==, -(codes[i] ?: EIO));
                g_assert_cmpuint(link->got->len, ==, after);
                tc->budget = 5000 + j * 997 % 50000;
            }
        }
        g_assert_cmpint(link_flush(link), ==, 0);
        expect_all(link);
    }
}

/* What was written up to the end of a frame does not come again. */
static void test_writer_rewind_whole(void)
{
    TestChardev *tc = test_chardev_new(EAGAIN);
    g_autoptr(Link) link = tc->link;

    link_stage_many(link, 2);
    tc->budget = link->expected->len;
    link_stage_many(link, 1);
    g_assert_cmpint(link_flush(link), ==, 0);
    frame_writer_rewind(link->fw);
    tc->budget = SIZE_MAX;
    g_assert_cmpint(link_flush(link), ==, 0);
    expect_all(link);
}

/* One that cannot tell when it takes more: it is tried again. */
static void test_writer_retry(void)
{
    TestChardev *tc = test_chardev_new(EAGAIN);
    g_autoptr(Link) link = tc->link;

    for (int i = 0; i < 20; i++) {
        link->progress = 0;
        link_stage_many(link, 2);
        tc->budget = 10;
        g_assert_cmpint(link_flush(link), ==, 0);
        AWAIT((tc->budget = 1000, link->got->len == link->expected->len));
        AWAIT(link->progress > 0);
        expect_all(link);
    }

    /* It is not tried any more once there is nothing to write. */
    link->progress = 0;
    settle_timers();
    g_assert_cmpuint(link->progress, ==, 0);
}

/*
 * Reader
 */

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

/* What is handed out is put together again as it was in the stream. */
static bool link_frame(Link *link, const StreamFrame *frame)
{
    g_assert_cmpuint(frame->size, <=, FRAME_STREAM_MAX_PAYLOAD);
    g_assert_false(link->waiting);
    if (!link->accept) {
        link->waiting = true;
        return false;
    }
    if (link->accept != UINT_MAX) {
        link->accept--;
    }
    append_be32(link->got, frame->size);
    if (link->vnet_hdr) {
        append_be32(link->got, frame->vnet_hdr_len);
    } else {
        g_assert_cmphex(frame->vnet_hdr_len, ==, 0);
    }
    g_byte_array_append(link->got, frame->payload, frame->size);
    /* That is allowed. */
    memset(frame->payload, 0xa5, frame->size);
    link->frames++;
    return true;
}

static size_t link_frames(void *opaque, const StreamFrame *frames, size_t n)
{
    Link *link = opaque;

    g_assert_cmpuint(n, >, 0);
    g_assert_cmpuint(n, <=, FRAME_READER_BATCH);
    link->calls++;
    /* That is allowed, too, and is nothing to do now. */
    frame_reader_resume(link->fr);
    for (size_t i = 0; i < n; i++) {
        if (!link_frame(link, &frames[i])) {
            return i;
        }
    }
    return n;
}

static Link *link_new_reader(bool vnet_hdr)
{
    Link *link = link_new(vnet_hdr);

    link->fr = frame_reader_new(&link->fe, vnet_hdr, &link->errors,
                                link_frames, link);
    qemu_chr_fe_set_handlers(&link->fe, link_can_read, link_read, link_event,
                             NULL, link, NULL, true);
    return link;
}

/* Let the reader hand out all that it does. */
static void settle_reader(Link *link)
{
    unsigned before;

    do {
        before = link->frames;
        settle();
    } while (link->frames > before);
}

/* Be ready for that many frames, without a run of the main loop. */
static void link_resume_now(Link *link, unsigned accept)
{
    link->waiting = false;
    link->accept = accept;
    frame_reader_resume(link->fr);
}

static void link_resume(Link *link, unsigned accept)
{
    link_resume_now(link, accept);
    settle_reader(link);
}

/*
 * Push no more at once than there is room for, and a copy each time, so that
 * reading past its end shows.
 */
static void reader_push(Link *link, const uint8_t *data, size_t size)
{
    while (size) {
        size_t part = MIN(size, frame_reader_room(link->fr));
        g_autofree uint8_t *copy = g_memdup2(data, part);

        g_assert_cmpuint(part, >, 0);
        frame_reader_push(link->fr, copy, part);
        data += part;
        size -= part;
        if (!frame_reader_room(link->fr)) {
            settle_reader(link);
        }
    }
}

static void reader_push_all(Link *link)
{
    reader_push(link, link->expected->data, link->expected->len);
}

/* Since the last time, these frames were handed out: the next @n expected. */
static void expect_frames(Link *link, unsigned n)
{
    size_t len = 0;

    g_assert_cmpuint(link->frames, ==, n);
    for (unsigned i = 0; i < n; i++) {
        len = frame_end(link, link->expected, len);
    }
    g_assert_cmpmem(link->got->data, link->got->len, link->expected->data,
                    len);
    g_byte_array_remove_range(link->expected, 0, len);
    g_byte_array_set_size(link->got, 0);
    link->frames = 0;
}

static void test_reader_format(gconstpointer vnet_hdr)
{
    g_autoptr(Link) link = link_new_reader(GPOINTER_TO_INT(vnet_hdr));

    link_make_golden(link);
    frame_reader_push(link->fr, link->expected->data, link->expected->len);
    expect_frames(link, 2);

    /* Many, all of them the longest */
    for (int i = 0; i < 40; i++) {
        link_make(link, FRAME_STREAM_MAX_PAYLOAD);
    }
    reader_push_all(link);
    expect_frames(link, 40);
}

/* In up to three parts, at every pair of places */
static void test_reader_splits(gconstpointer vnet_hdr)
{
    g_autoptr(Link) link = link_new_reader(GPOINTER_TO_INT(vnet_hdr));
    size_t len = 3 * (link->vnet_hdr ? 8 : 4) + 61 + 1 + 90;

    for (size_t i = 0; i <= len; i++) {
        for (size_t k = i; k <= len; k++) {
            uint8_t *data;

            link_make(link, 61);
            link_make(link, 1);
            link_make(link, 90);
            data = link->expected->data;
            reader_push(link, data, i);
            reader_push(link, data + i, k - i);
            reader_push(link, data + k, len - k);
            expect_frames(link, 3);
        }
    }
}

/* Byte by byte: a frame is handed out with its last one. */
static void test_reader_prompt(gconstpointer vnet_hdr)
{
    static const size_t sizes[] = {
        0, 0, 1, 60, 0, 1514, FRAME_STREAM_MAX_PAYLOAD, 0,
    };
    g_autoptr(Link) link = link_new_reader(GPOINTER_TO_INT(vnet_hdr));
    size_t room = frame_reader_room(link->fr);

    for (int i = 0; i < ARRAY_SIZE(sizes); i++) {
        g_assert_true(frame_reader_empty(link->fr));
        g_assert_cmpuint(frame_reader_room(link->fr), ==, room);
        link_make(link, sizes[i]);
        for (size_t at = 0; at < link->expected->len - 1; at++) {
            reader_push(link, link->expected->data + at, 1);
            g_assert_false(frame_reader_empty(link->fr));
            g_assert_cmpuint(link->frames, ==, 0);
        }
        reader_push(link, link->expected->data + link->expected->len - 1, 1);
        expect_frames(link, 1);
    }
    g_assert_true(frame_reader_empty(link->fr));
    g_assert_cmpuint(link->errors, ==, 0);
}

/*
 * However many frames the handler takes at a time, the next one waits until
 * the resume: link_frame() asserts that it is not offered meanwhile.
 */
static void test_reader_parts(gconstpointer vnet_hdr)
{
    static const unsigned parts[] = {
        1, 2, 50, FRAME_READER_BATCH - 1, FRAME_READER_BATCH,
        FRAME_READER_BATCH + 1, 200, 255, 256, 257, 300,
    };

    for (int i = 0; i < ARRAY_SIZE(parts); i++) {
        g_autoptr(Link) link = link_new_reader(GPOINTER_TO_INT(vnet_hdr));
        unsigned left = 1000;

        for (unsigned j = 0; j < left; j++) {
            link_make(link, j % 5 < 2 ? 0 : 60);
        }
        /* Some come at once; the rest is about to come, but has to wait. */
        reader_push_all(link);
        left -= link->frames;
        expect_frames(link, link->frames);
        while (left) {
            unsigned part = MIN(parts[i], left);

            link_resume(link, 0);
            g_assert_true(link->waiting);
            expect_frames(link, 0);
            link_resume(link, part);
            g_assert_true(link->waiting == (part < left));
            expect_frames(link, part);
            left -= part;
        }
        g_assert_true(frame_reader_empty(link->fr));
    }
}

static void test_reader_room(void)
{
    static const size_t sizes[] = { 1, 60, 1514, FRAME_STREAM_MAX_PAYLOAD };

    for (int i = 0; i < ARRAY_SIZE(sizes); i++) {
        g_autoptr(Link) link = link_new_reader(true);
        size_t room = frame_reader_room(link->fr), before, pushed = 0, left;
        unsigned some = MAX(2, 40000 / sizes[i]);

        g_assert_cmpuint(room, >=, 1);
        g_assert_cmpuint(room, <=, FRAME_READER_LIMIT);
        link->accept = 0;

        /* Filled up until there is no room */
        for (int j = 0; (before = frame_reader_room(link->fr)); j++) {
            size_t part = MIN(before, 1 + j % 4000);

            if (pushed == link->expected->len) {
                link_make(link, sizes[i]);
            }
            part = MIN(part, link->expected->len - pushed);
            frame_reader_push(link->fr, link->expected->data + pushed, part);
            pushed += part;
            g_assert_cmpuint(pushed, <=, FRAME_READER_LIMIT);
            g_assert_cmpuint(frame_reader_room(link->fr), <, before);
        }
        g_assert_true(link->waiting);
        g_assert_cmpuint(pushed, >=, FRAME_STREAM_MAX_PAYLOAD + 8);
        left = link->expected->len - pushed;

        /* A little is taken: a little room comes back. */
        link_resume(link, some);
        expect_frames(link, some);
        g_assert_true(link->waiting);
        g_assert_cmpuint(frame_reader_room(link->fr), >, 0);

        /* What comes although there is no room is not lost. */
        pushed = link->expected->len - left;
        while (link->expected->len < 3 * FRAME_READER_LIMIT) {
            link_make(link, sizes[i]);
        }
        frame_reader_push(link->fr, link->expected->data + pushed,
                          link->expected->len - pushed);
        g_assert_cmpuint(frame_reader_room(link->fr), ==, 0);
        link_resume(link, UINT_MAX);
        expect_frames(link, frame_count(link));
        g_assert_cmpuint(frame_reader_room(link->fr), ==, room);
    }
}

/* The frame that is cut off, at each of its bytes, is forgotten. */
static void test_reader_reset(gconstpointer vnet_hdr)
{
    g_autoptr(Link) link = link_new_reader(GPOINTER_TO_INT(vnet_hdr));
    g_autoptr(GByteArray) stream = g_byte_array_new();
    size_t room = frame_reader_room(link->fr), whole;

    append_frame(stream, link->vnet_hdr, 0, 1);
    append_frame(stream, link->vnet_hdr, 100, 2);
    whole = stream->len;
    append_frame(stream, link->vnet_hdr, 70, 3);

    for (size_t cut = whole; cut < stream->len; cut++) {
        for (int wait = 0; wait < 2; wait++) {
            link->accept = wait ? 0 : UINT_MAX;
            for (int i = 0; i < 2; i++) {
                reader_push(link, stream->data, cut);
                frame_reader_reset(link->fr);
                frame_reader_reset(link->fr);
                g_assert_true(frame_reader_empty(link->fr) == !wait);
                g_byte_array_append(link->expected, stream->data, whole);
            }
            reader_push(link, stream->data, stream->len);
            g_byte_array_append(link->expected, stream->data, stream->len);
            if (wait) {
                /* Complete ones that wait are kept. */
                expect_frames(link, 0);
                link_resume(link, UINT_MAX);
            }
            expect_frames(link, 7);
            g_assert_cmpuint(frame_reader_room(link->fr), ==, room);
        }
    }

    /* Nothing there */
    frame_reader_reset(link->fr);
    frame_reader_resume(link->fr);
    expect_frames(link, 0);
    g_assert_cmpuint(frame_reader_room(link->fr), ==, room);
}

static void peer_send(Link *link, const uint8_t *data, size_t size)
{
    while (size) {
        ssize_t ret = send(link->peer, data, size, MSG_NOSIGNAL);

        if (ret < 0) {
            g_assert_cmpint(errno, ==, EAGAIN);
            main_loop_wait(true);
            continue;
        }
        data += ret;
        size -= ret;
    }
}

/* A length that breaks framing ends this connection, and only this one. */
static void test_reader_too_long(void)
{
    static const uint32_t lengths[] = {
        FRAME_STREAM_MAX_PAYLOAD + 1, UINT32_MAX,
    };

    for (int i = 0; i < 2 * ARRAY_SIZE(lengths); i++) {
        uint32_t length = lengths[i / 2];
        bool wait = i & 1;
        g_autoptr(Link) link = link_new_reader(true);
        size_t room = frame_reader_room(link->fr);
        uint8_t byte;

        link_connect(link);
        link->accept = wait ? 0 : UINT_MAX;
        link_make(link, 60);
        link_make(link, 80);
        append_be32(link->expected, length);
        append_be32(link->expected, 12);
        /* Would pass for frames */
        for (int j = 0; j < 20; j++) {
            link_make(link, 90);
        }

        errors_begin();
        peer_send(link, link->expected->data, link->expected->len);
        if (wait) {
            AWAIT(link->waiting);
            settle();
            link_resume(link, UINT_MAX);
        }
        AWAIT(link->closed);
        settle();
        errors_end(length);
        g_assert_cmpuint(link->errors, ==, 1);
        g_assert_true(frame_reader_empty(link->fr));
        g_assert_cmpuint(link->closed, ==, 1);
        expect_frames(link, 2);
        /* The peer sees it too: the end, or a reset if it had more to say. */
        g_assert_true(recv(link->peer, &byte, 1, 0) == 0 ||
                      errno == ECONNRESET);
        link_close_peer(link);

        /* The next connection starts clean. */
        link_connect(link);
        g_assert_cmpuint(frame_reader_room(link->fr), ==, room);
        link_forget(link);
        link_make(link, 100);
        errors_begin();
        peer_send(link, link->expected->data, link->expected->len);
        AWAIT(link->frames);
        errors_end(0);
        g_assert_cmpuint(link->errors, ==, 1);
        expect_frames(link, 1);
    }
}

/* A device that does not close: still one error, until the reset. */
static void test_reader_too_long_once(void)
{
    g_autoptr(Link) link = link_new_reader(false);

    for (int round = 1; round <= 2; round++) {
        link_make(link, 60);
        append_be32(link->expected, FRAME_STREAM_MAX_PAYLOAD + 1);
        for (int i = 0; i < 1000; i++) {
            append_be32(link->expected, 0xffffffff);
        }
        /* Told the first time, counted each time */
        errors_begin();
        for (int i = 0; i < link->expected->len; i++) {
            frame_reader_push(link->fr, link->expected->data + i, 1);
        }
        errors_end(round == 1 ? FRAME_STREAM_MAX_PAYLOAD + 1 : 0);
        g_assert_cmpuint(link->errors, ==, round);
        expect_frames(link, 1);
        frame_reader_reset(link->fr);
        link_forget(link);
    }
    link_make(link, 60);
    reader_push_all(link);
    expect_frames(link, 1);
}

#define MANY_FRAMES 10000

static void reader_push_many(Link *link)
{
    for (int i = 0; i < MANY_FRAMES; i++) {
        link_make(link, 60);
    }
    g_assert_cmpuint(link->expected->len, <=, frame_reader_room(link->fr));
    frame_reader_push(link->fr, link->expected->data, link->expected->len);
}

/* With many frames left that wait, or of which a part was to come later */
static void test_reader_free(void)
{
    for (int wait = 0; wait < 2; wait++) {
        g_autoptr(Link) link = link_new_reader(true);

        link->accept = wait ? 0 : UINT_MAX;
        reader_push_many(link);
        frame_reader_push(link->fr, link->expected->data, 10);
        g_assert_cmpuint(link->frames, <, MANY_FRAMES);
    }
}

/* The connection ends only if the next reader could not begin with a frame. */
static void test_reader_close(void)
{
    for (int missing = 0; missing < 2; missing++) {
        g_autoptr(Link) link = link_new_reader(true);
        uint8_t byte;

        link_connect(link);
        link->accept = 0;
        link_make(link, 60);
        link_make(link, 60);
        reader_push(link, link->expected->data, link->expected->len - missing);
        link_close_reader(link);
        g_assert_cmpint(recv(link->peer, &byte, 1, 0), ==, missing ? 0 : -1);
    }
}

/* While many frames are handed out others get their turn in the main loop. */
static void test_reader_turns(void)
{
    for (int wait = 0; wait < 2; wait++) {
        g_autoptr(Link) link = link_new_reader(true);
        unsigned turns = 0;

        link->accept = wait ? 0 : UINT_MAX;
        reader_push_many(link);
        if (wait) {
            g_assert_true(link->waiting);
            link_resume_now(link, UINT_MAX);
        }
        g_assert_cmpuint(link->frames, >, 0);
        AWAIT((turns++, link->frames == MANY_FRAMES));
        g_assert_cmpuint(turns, >, 5);
        /* They came many at a time. */
        g_assert_cmpuint(link->calls, <, MANY_FRAMES / 4);
        expect_frames(link, MANY_FRAMES);
    }
}

#define TEST(name, test) g_test_add_func("/frame-stream/" name, test)
#define TEST_DATA(name, data, test) \
    g_test_add_data_func("/frame-stream/" name, data, test)

/* Without and with the length of the virtio-net header in the stream */
#define TEST_FORMATS(name, test) do {                                   \
        TEST_DATA(name "/plain", GINT_TO_POINTER(false), test);         \
        TEST_DATA(name "/vnet-hdr", GINT_TO_POINTER(true), test);       \
    } while (0)

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

    TEST_FORMATS("writer/format", test_writer_format);
    TEST("writer/full", test_writer_full);
    TEST("writer/slow-peer", test_writer_slow_peer);
    TEST_FORMATS("writer/rewind", test_writer_rewind);
    TEST("writer/unconnected", test_writer_unconnected);
    TEST("writer/closed-in-flush", test_writer_closed_in_flush);
    TEST("writer/discard", test_writer_discard);
    TEST("writer/flush-now", test_writer_flush_now);
    TEST("writer/log-full", test_writer_log_full);
    TEST("writer/close", test_writer_close);
#if !defined(QEMU_SANITIZE_ADDRESS) && defined(CONFIG_LINUX)
    TEST("writer/memory", test_writer_memory);
    TEST("writer/memory-burst", test_writer_memory_burst);
#endif
    TEST("writer/errors", test_writer_errors);
    TEST("writer/rewind-whole", test_writer_rewind_whole);
    TEST("writer/retry", test_writer_retry);

    TEST_FORMATS("reader/format", test_reader_format);
    TEST_FORMATS("reader/splits", test_reader_splits);
    TEST_FORMATS("reader/prompt", test_reader_prompt);
    TEST_FORMATS("reader/parts", test_reader_parts);
    TEST("reader/room", test_reader_room);
    TEST_FORMATS("reader/reset", test_reader_reset);
    TEST("reader/too-long", test_reader_too_long);
    TEST("reader/too-long/once", test_reader_too_long_once);
    TEST("reader/free", test_reader_free);
    TEST("reader/close", test_reader_close);
    TEST("reader/turns", test_reader_turns);
    return g_test_run();
}
