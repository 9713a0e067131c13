/*
 * QTest testcase for filter-dump on a TAP with vhost
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Pipes, whose reader may be slow or end, and files that were passed.  What
 * a file on disk gets is in filter-redirector-vhost-test and
 * filter-redirector-fidelity-test, and test-filter-dump has pipes on the chain.
 */

#include "qemu/osdep.h"
#include "libqtest.h"
#include "qobject/qdict.h"
#include "filter-redirector-rig.h"

/* More than PIPE_BUF: a pipe may take a part of it. */
#define LONG_FRAME 6000
/* Frames for which a pipe of 1 MiB has no room */
#define TOO_MANY 400

static void start(Fixture *f)
{
    g_autofree char *command = NULL;

    fixture_start(f, "");
    command = g_strdup_printf("ip link set %s mtu 9000", f->ifname);
    g_assert_cmpint(system(command), ==, 0);
}

static void add_dump(Fixture *f, const char *path)
{
    qtest_qmp_assert_success(f->qts, "{ 'execute': 'object-add', 'arguments': "
        "{ 'qom-type': 'filter-dump', 'id': 'dump', 'netdev': 'n0',"
        "  'queue': 'tx', 'file': %s } }", path);
    expect_source(f, "dump", "packet-socket");
}

/* Open a FIFO's end for reading, and make it one before. */
static int open_fifo(Fixture *f, char **path)
{
    int fd;

    *path = g_build_filename(f->dir, "fifo", NULL);
    g_assert_cmpint(mkfifo(*path, 0600), ==, 0);
    fd = open(*path, O_RDONLY | O_NONBLOCK);
    g_assert_cmpint(fd, >=, 0);
    return fd;
}

/* The same end once more, for read_pcap() */
static FILE *open_reader(int fd)
{
    g_autofree char *path = g_strdup_printf("/proc/self/fd/%d", fd);
    FILE *file = open_pcap(path);

    g_assert_cmpint(fcntl(fileno(file), F_SETFL, O_NONBLOCK), ==, 0);
    return file;
}

/* What is written, or will be as soon as there is room */
static uint64_t kept(Fixture *f)
{
    return counter(f, "dump", "capture-packets");
}

static uint64_t lost(Fixture *f)
{
    return counter(f, "dump", "capture-peer-drops");
}

/* Send frames, and wait until the dump has dealt with them. */
static void send_long(Fixture *f, uint32_t *sent, uint32_t count)
{
    gint64 end = g_get_monotonic_time() + TIMEOUT_US;
    uint8_t frame[LONG_FRAME] = { };

    for (uint32_t i = 0; i < count; i++) {
        make_frame(frame, (*sent)++);
        g_assert_cmpint(send(f->host, frame, sizeof(frame), 0), ==,
                        sizeof(frame));
    }
    while (kept(f) + lost(f) + counter(f, "dump", "capture-kernel-drops") <
           *sent) {
        g_assert_cmpint(g_get_monotonic_time(), <, end);
        g_usleep(1000);
    }
}

/* Read all that is kept, in order.  Returns: the number of the last one */
static uint32_t read_kept(Fixture *f, FILE *file, uint64_t *got)
{
    uint32_t number = 0;

    while (*got < kept(f)) {
        uint8_t frame[LONG_FRAME];
        uint32_t last = number;
        PcapPacket packet;

        read_pcap(file, &packet, frame, sizeof(frame));
        g_assert_cmpuint(packet.caplen, ==, LONG_FRAME);
        g_assert_cmpuint(packet.len, ==, LONG_FRAME);
        number = frame_number(frame);
        g_assert_true(number == 0 || number > last);
        (*got)++;
    }
    return number;
}

static void assert_end(FILE *file)
{
    clearerr(file);
    g_assert_cmpint(fgetc(file), ==, EOF);
    g_assert_true(feof(file));
}

/* The reader stops twice; whole packets are missing then, and counted. */
static void run_stalled(Fixture *f, FILE *file)
{
    uint32_t sent = 0;
    uint64_t got = 0;

    for (int i = 1; i <= 2; i++) {
        uint64_t before = lost(f);

        send_long(f, &sent, TOO_MANY);
        g_assert_cmpuint(lost(f), >, before);
        g_assert_cmpuint(counter(f, "dump", "dropped"), ==, lost(f));
        read_kept(f, file, &got);
        send_long(f, &sent, 1);
        g_assert_cmpuint(read_kept(f, file, &got), ==, sent - 1);
    }
}

static void test_fifo_stalled(void)
{
    g_autofree char *path = NULL;
    FILE *file;
    Fixture f;
    int fd;

    start(&f);
    fd = open_fifo(&f, &path);
    add_dump(&f, path);
    file = open_reader(fd);
    run_stalled(&f, file);
    del_object(&f, "dump");
    assert_end(file);
    fclose(file);
    close(fd);
    unlink(path);
    fixture_close(&f);
}

static void test_fifo_gone(void)
{
    g_autofree char *path = NULL;
    uint32_t sent = 0;
    uint64_t before;
    Fixture f;
    int fd;

    start(&f);
    fd = open_fifo(&f, &path);
    add_dump(&f, path);
    send_long(&f, &sent, TOO_MANY);
    before = kept(&f);
    close(fd);
    send_long(&f, &sent, 10);
    g_assert_cmpuint(kept(&f), ==, before);
    del_object(&f, "dump");
    unlink(path);
    fixture_close(&f);
}

static void pass_fd(Fixture *f, int fd)
{
    qtest_qmp_fds_assert_success(f->qts, &fd, 1, "{ 'execute': 'add-fd', "
                                 "'arguments': { 'fdset-id': 1 } }");
    close(fd);
}

static void test_fdset_pipe(void)
{
    int fds[2];
    FILE *file;
    Fixture f;

    start(&f);
    g_assert_cmpint(pipe(fds), ==, 0);
    pass_fd(&f, fds[1]);
    add_dump(&f, "/dev/fdset/1");
    file = open_reader(fds[0]);
    run_stalled(&f, file);
    del_object(&f, "dump");
    qtest_qmp_assert_success(f.qts, "{ 'execute': 'remove-fd', 'arguments': "
                                    "{ 'fdset-id': 1 } }");
    assert_end(file);
    fclose(file);
    close(fds[0]);
    fixture_close(&f);
}

static void test_fdset_file(void)
{
    g_autofree char *path = NULL;
    uint32_t sent = 0;
    Fixture f;
    int fd;

    start(&f);
    path = g_build_filename(f.dir, "file", NULL);
    fd = open(path, O_CREAT | O_WRONLY, 0600);
    g_assert_cmpint(fd, >=, 0);
    pass_fd(&f, fd);
    for (int i = 0; i < 2; i++) {
        uint64_t got = 0;
        FILE *file;

        add_dump(&f, "/dev/fdset/1");
        /* The counters begin anew with the object. */
        sent = 0;
        send_long(&f, &sent, 20);
        file = open_pcap(path);
        g_assert_cmpuint(read_kept(&f, file, &got), ==, sent - 1);
        g_assert_cmpuint(got, ==, sent);
        assert_end(file);
        fclose(file);
        del_object(&f, "dump");
    }
    unlink(path);
    fixture_close(&f);
}

int main(int argc, char **argv)
{
    rig_init(&argc, &argv, "filter-dump");
    rig_add("fifo/stalled", test_fifo_stalled);
    rig_add("fifo/gone", test_fifo_gone);
    rig_add("fdset/pipe", test_fdset_pipe);
    rig_add("fdset/file", test_fdset_file);
    return g_test_run();
}
