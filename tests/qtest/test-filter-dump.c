/*
 * QTest testcase for filter-dump on files and pipes
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Packets come from a stream socket, and a redirector takes them, so no guest
 * is needed.  They carry a number, which tells their length.
 */

#include "qemu/osdep.h"
#include <glib/gstdio.h>
#include <poll.h>
#include "libqtest.h"
#include "qobject/qdict.h"
#include "qobject/qlist.h"
#include "qemu/bswap.h"

#define TIMEOUT_MS 20000
#define TIMEOUT_US (TIMEOUT_MS * 1000)
/* QEMU does not answer: this ends the test, and that ends QEMU. */
#define HANG_S 120

#define PACKET_MAX 9000
/* For a pipe, which has room for 1 MiB at the most */
#define TOO_MANY 400
#define PCAP_HEADER_LEN 24
#define PCAP_RECORD_LEN 16

typedef struct Dump {
    QTestState *qts;
    int net;                    /* the peer of the netdev */
    char *dir;
    char *path;
    /* A file of all packets that QEMU got, and how long it will be */
    char *all_path;
    off_t all_size;
    uint32_t sent;
} Dump;

static void dump_start(Dump *d, const void *data)
{
    int fds[2];

    g_assert_cmpint(socketpair(AF_UNIX, SOCK_STREAM, 0, fds), ==, 0);
    d->net = fds[0];
    d->qts = qtest_initf("-machine none -netdev socket,id=n0,fd=%d "
                         "-netdev hubport,id=h0,hubid=0,netdev=n0 "
                         "-chardev null,id=null "
                         "-object filter-redirector,id=end,netdev=n0,queue=tx,"
                         "outdev=null", fds[1]);
    close(fds[1]);
    d->dir = g_dir_make_tmp("filter-dump-XXXXXX", NULL);
    g_assert_nonnull(d->dir);
    d->path = g_build_filename(d->dir, "dump", NULL);
    d->all_path = g_build_filename(d->dir, "all", NULL);
}

static void dump_end(Dump *d, const void *data)
{
    qtest_quit(d->qts);
    close(d->net);
    unlink(d->path);
    unlink(d->all_path);
    rmdir(d->dir);
    g_free(d->path);
    g_free(d->all_path);
    g_free(d->dir);
}

static QDict *object_add(Dump *d, const char *id, const char *file)
{
    return qtest_qmp(d->qts, "{ 'execute': 'object-add', 'arguments': "
        "{ 'qom-type': 'filter-dump', 'id': %s, 'netdev': 'n0',"
        "  'position': 'id=end', 'insert': 'before', 'file': %s } }",
        id, file);
}

static void expect_refused(Dump *d, const char *file, const char *text)
{
    QDict *answer = object_add(d, "dump", file);

    g_assert_true(qdict_haskey(answer, "error"));
    g_assert_nonnull(strstr(qdict_get_str(qdict_get_qdict(answer, "error"),
                                          "desc"), text));
    qobject_unref(answer);
}

/* What is added last sees packets last. */
static void add_dump(Dump *d, const char *file)
{
    const char *const ids[] = { "dump", "all" };
    const char *const files[] = { file, d->all_path };

    for (int i = 0; i < ARRAY_SIZE(ids); i++) {
        QDict *answer = object_add(d, ids[i], files[i]);

        g_assert_true(qdict_haskey(answer, "return"));
        qobject_unref(answer);
    }
    d->all_size = PCAP_HEADER_LEN;
}

static void del_dump(Dump *d)
{
    qtest_qmp_assert_success(d->qts, "{ 'execute': 'object-del', 'arguments': "
                                     "{ 'id': 'all' } }");
    qtest_qmp_assert_success(d->qts, "{ 'execute': 'object-del', 'arguments': "
                                     "{ 'id': 'dump' } }");
}

static uint64_t dropped(Dump *d)
{
    QDict *answer = qtest_qmp(d->qts, "{ 'execute': 'qom-get', 'arguments': "
                              "{ 'path': '/objects/dump',"
                              "  'property': 'dropped' } }");
    uint64_t value = qdict_get_int(answer, "return");

    qobject_unref(answer);
    return value;
}

/* From 60 bytes to PACKET_MAX, mostly more than a pipe takes at one go */
static size_t packet_len(uint32_t number)
{
    return 60 + (PACKET_MAX - 60) * (number % 8) / 7;
}

/* Send @count packets, and wait until QEMU has dealt with them. */
static void send_packets(Dump *d, uint32_t count)
{
    gint64 end = g_get_monotonic_time() + TIMEOUT_US;
    GStatBuf st;

    for (uint32_t i = 0; i < count; i++) {
        uint8_t buf[4 + PACKET_MAX];
        size_t len = packet_len(d->sent);

        memset(buf, d->sent, sizeof(buf));
        stl_be_p(buf, len);
        stl_be_p(buf + 4, d->sent);
        g_assert_cmpint(send(d->net, buf, 4 + len, 0), ==, 4 + len);
        d->all_size += PCAP_RECORD_LEN + len;
        d->sent++;
    }
    do {
        g_assert_cmpint(g_get_monotonic_time(), <, end);
        g_usleep(1000);
        g_assert_cmpint(g_stat(d->all_path, &st), ==, 0);
    } while (st.st_size < d->all_size);
    g_assert_cmpint(st.st_size, ==, d->all_size);
}

static void read_all(int fd, void *buf, size_t size)
{
    while (size) {
        struct pollfd pfd = { .fd = fd, .events = POLLIN };
        ssize_t n;

        g_assert_cmpint(poll(&pfd, 1, TIMEOUT_MS), ==, 1);
        n = read(fd, buf, size);
        g_assert_cmpint(n, >, 0);
        buf += n;
        size -= n;
    }
}

static void read_header(int fd)
{
    uint32_t header[6];

    read_all(fd, header, sizeof(header));
    g_assert_cmphex(header[0], ==, 0xa1b2c3d4);
}

/* Read a whole record.  Returns: the packet's number */
static uint32_t read_packet(int fd)
{
    uint8_t buf[PACKET_MAX], expected[PACKET_MAX];
    uint32_t record[4], number;

    read_all(fd, record, sizeof(record));
    g_assert_cmpuint(record[2], <=, sizeof(buf));
    g_assert_cmpuint(record[3], ==, record[2]);
    read_all(fd, buf, record[2]);
    number = ldl_be_p(buf);
    memset(expected, number, sizeof(expected));
    stl_be_p(expected, number);
    g_assert_cmpmem(buf, record[2], expected, packet_len(number));
    return number;
}

static void expect_packets(int fd, uint32_t first, uint32_t count)
{
    for (uint32_t number = first; number < first + count; number++) {
        g_assert_cmpuint(read_packet(fd), ==, number);
    }
}

static void expect_end(int fd)
{
    uint8_t byte;

    g_assert_cmpint(read(fd, &byte, 1), ==, 0);
}

static void expect_file(const char *path, uint32_t first, uint32_t count)
{
    int fd = open(path, O_RDONLY);

    read_header(fd);
    expect_packets(fd, first, count);
    expect_end(fd);
    close(fd);
}

static int open_fifo(Dump *d)
{
    int fd = open(d->path, O_RDONLY | O_NONBLOCK);

    g_assert_cmpint(fd, >=, 0);
    return fd;
}

/* Dump to a new FIFO once it has a reader.  Returns: its end for reading */
static int add_dump_fifo(Dump *d)
{
    int fd;

    g_assert_cmpint(mkfifo(d->path, 0600), ==, 0);
    expect_refused(d, d->path, "has no reader");
    fd = open_fifo(d);
    add_dump(d, d->path);
    read_header(fd);
    return fd;
}

/* Whole and right: so is that of all packets, which the others look at. */
static void test_file(Dump *d, const void *data)
{
    g_assert_true(g_file_set_contents(d->path, "what was there before", -1,
                                      NULL));
    add_dump(d, d->path);
    send_packets(d, 20);
    expect_file(d->path, 0, 20);
    expect_file(d->all_path, 0, 20);
    g_assert_cmpuint(dropped(d), ==, 0);
}

/* An object that cannot be made closes nothing that is not its own. */
static void test_no_file(Dump *d, const void *data)
{
    g_autofree char *link = g_strdup_printf("/proc/%d/fd/0",
                                            (int)qtest_pid(d->qts));

    if (!g_file_test(link, G_FILE_TEST_IS_SYMLINK)) {
        g_test_skip("QEMU's standard input is not to be seen");
        return;
    }
    expect_refused(d, "/nonexistent/dump", "/nonexistent/dump");
    g_assert_true(g_file_test(link, G_FILE_TEST_IS_SYMLINK));
}

static void test_fifo(Dump *d, const void *data)
{
    int fd = add_dump_fifo(d);

    for (int i = 0; i < 500; i += 10) {
        send_packets(d, 10);
        expect_packets(fd, i, 10);
    }
    g_assert_cmpuint(dropped(d), ==, 0);
    del_dump(d);
    expect_end(fd);
    close(fd);
}

/*
 * A reader that stops for a while: QEMU goes on, and what is missing then is
 * whole packets, all of them counted.
 */
static void check_stalled(Dump *d, int fd)
{
    uint32_t got = 0, last = 0;

    for (int i = 0; i < 3; i++) {
        uint64_t before = dropped(d);

        send_packets(d, TOO_MANY);
        g_assert_cmpuint(dropped(d), >, before);
        for (; got + dropped(d) < d->sent; got++) {
            uint32_t number = read_packet(fd);

            g_assert_true(got == 0 || number > last);
            last = number;
        }
        /* There is room again. */
        send_packets(d, 1);
        last = d->sent - 1;
        expect_packets(fd, last, 1);
        got++;
        g_assert_cmpuint(got + dropped(d), ==, d->sent);
    }
    del_dump(d);
    expect_end(fd);
    close(fd);
}

static void test_fifo_stalled(Dump *d, const void *data)
{
    check_stalled(d, add_dump_fifo(d));
}

/* The reader ends, with or without a packet that is written in part. */
static void test_fifo_gone(Dump *d, const void *data)
{
    const uint32_t *count = data;
    int fd = add_dump_fifo(d);
    uint64_t before;

    send_packets(d, *count);
    before = dropped(d);
    g_assert_cmpint(before > 0, ==, *count > 1);
    close(fd);
    for (int i = 1; i < 4; i++) {
        send_packets(d, 1);
        /* One more if it was written in part */
        g_assert_cmpuint(dropped(d), ==, before + i + (*count > 1));
    }
    /* Nothing more is written, also if there is another reader. */
    fd = open_fifo(d);
    send_packets(d, 1);
    expect_end(fd);
    del_dump(d);

    add_dump(d, d->path);
    send_packets(d, 1);
    read_header(fd);
    expect_packets(fd, d->sent - 1, 1);
    close(fd);
}

/* As "/dev/fdset/1"; QEMU has it then, and not the test. */
static void pass_fd(Dump *d, int fd)
{
    g_assert_cmpint(fd, >=, 0);
    qtest_qmp_fds_assert_success(d->qts, &fd, 1, "{ 'execute': 'add-fd', "
                                 "'arguments': { 'fdset-id': 1 } }");
    close(fd);
}

/* What is dumped to keeps the set until it is deleted. */
static void remove_fdset(Dump *d)
{
    qtest_qmp_assert_success(d->qts, "{ 'execute': 'remove-fd', 'arguments': "
                                     "{ 'fdset-id': 1 } }");
}

static void expect_no_fdset(Dump *d)
{
    QDict *answer = qtest_qmp(d->qts, "{ 'execute': 'query-fdsets' }");

    g_assert_true(qlist_empty(qdict_get_qlist(answer, "return")));
    qobject_unref(answer);
}

/* A file that is open for writing only, and is used twice */
static void test_fdset_file(Dump *d, const void *data)
{
    int fd = open(d->path, O_CREAT | O_WRONLY, 0600);

    g_assert_cmpint(write(fd, "before", 6), ==, 6);
    pass_fd(d, fd);
    for (int i = 0; i < 2; i++) {
        add_dump(d, "/dev/fdset/1");
        send_packets(d, 10);
        expect_file(d->path, 10 * i, 10);
        del_dump(d);
    }
    remove_fdset(d);
    expect_no_fdset(d);
}

static void test_fdset_pipe(Dump *d, const void *data)
{
    int fds[2];

    g_assert_cmpint(pipe(fds), ==, 0);
    pass_fd(d, fds[1]);
    add_dump(d, "/dev/fdset/1");
    remove_fdset(d);
    read_header(fds[0]);
    check_stalled(d, fds[0]);
    expect_no_fdset(d);
}

int main(int argc, char **argv)
{
    static const uint32_t one = 1, too_many = TOO_MANY;

    g_test_init(&argc, &argv, NULL);
    alarm(HANG_S);
#define TEST(name, data, test)                                          \
    qtest_add("/filter-dump/" name, Dump, data, dump_start, test, dump_end)
    TEST("file", NULL, test_file);
    TEST("no-file", NULL, test_no_file);
    TEST("fifo", NULL, test_fifo);
    TEST("fifo/stalled", NULL, test_fifo_stalled);
    TEST("fifo/gone", &one, test_fifo_gone);
    TEST("fifo/gone/partly", &too_many, test_fifo_gone);
    TEST("fdset/file", NULL, test_fdset_file);
    TEST("fdset/pipe", NULL, test_fdset_pipe);
    return g_test_run();
}
