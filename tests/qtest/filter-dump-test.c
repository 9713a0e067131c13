/*
 * QTest testcase for filter-dump on a TAP with vhost
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * FIFOs, whose reader may be slow or end.  What a file on disk gets is in
 * filter-redirector-vhost-test and filter-redirector-fidelity-test, and
 * test-filter-dump has FIFOs on the chain, and files that were passed.
 */

#include "qemu/osdep.h"
#include "filter-redirector-rig.h"

/* More than PIPE_BUF: a pipe may take a part of it. */
#define LONG_FRAME 6000
/* Frames for which a pipe of 1 MiB has no room */
#define TOO_MANY 400

/* Dump to a new FIFO.  Returns: its end for reading */
static int add_dump(Fixture *f)
{
    g_autofree char *path = g_build_filename(f->dir, "fifo", NULL);
    int fd;

    g_assert_cmpint(mkfifo(path, 0600), ==, 0);
    fd = open(path, O_RDONLY | O_NONBLOCK);
    g_assert_cmpint(fd, >=, 0);
    run_command("ip link set %s mtu 9000", f->ifname);
    object_add(f, "-object filter-dump,id=dump,netdev=n0,queue=tx,file=%s",
               path);
    expect_source(f, "dump", "packet-socket");
    return fd;
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
    uint8_t frame[LONG_FRAME] = { };

    for (uint32_t i = 0; i < count; i++) {
        make_frame(frame, (*sent)++);
        g_assert_cmpint(send(f->host, frame, sizeof(frame), 0), ==,
                        sizeof(frame));
    }
    WAIT_UNTIL(kept(f) + lost(f) +
               counter(f, "dump", "capture-kernel-drops") >= *sent);
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

/* The reader stops twice; whole packets are missing then, and counted. */
static void test_fifo_stalled(Fixture *f)
{
    int fd = add_dump(f);
    g_autofree char *path = g_strdup_printf("/proc/self/fd/%d", fd);
    FILE *file = open_pcap(path);
    uint32_t sent = 0;
    uint64_t got = 0;

    g_assert_cmpint(fcntl(fileno(file), F_SETFL, O_NONBLOCK), ==, 0);
    for (int i = 1; i <= 2; i++) {
        uint64_t before = lost(f);

        send_long(f, &sent, TOO_MANY);
        g_assert_cmpuint(lost(f), >, before);
        g_assert_cmpuint(counter(f, "dump", "dropped"), ==, lost(f));
        read_kept(f, file, &got);
        send_long(f, &sent, 1);
        g_assert_cmpuint(read_kept(f, file, &got), ==, sent - 1);
    }
    del_object(f, "dump");
    clearerr(file);
    g_assert_cmpint(fgetc(file), ==, EOF);
    g_assert_true(feof(file));
    fclose(file);
    close(fd);
}

static void test_fifo_gone(Fixture *f)
{
    int fd = add_dump(f);
    uint32_t sent = 0;
    uint64_t before;

    send_long(f, &sent, TOO_MANY);
    before = kept(f);
    close(fd);
    send_long(f, &sent, 10);
    g_assert_cmpuint(kept(f), ==, before);
    del_object(f, "dump");
}

/* A filter that is refused leaves the file as it is. */
static void test_refused(Fixture *f)
{
    static const char *const wrong[] = {
        "packet-fd=1000", "enable_when_running=off",
        "packet-socket=off,buffer-size=2M",
    };
    g_autofree char *path = g_build_filename(f->dir, "file", NULL);

    g_assert_true(g_file_set_contents(path, "precious", -1, NULL));
    for (int i = 0; i < ARRAY_SIZE(wrong); i++) {
        g_autofree char *said = qtest_hmp(f->qts, "object_add filter-dump,"
                                          "id=dump,netdev=n0,file=%s,%s", path,
                                          wrong[i]);
        g_autofree char *content = NULL;

        g_assert_nonnull(strstr(said, "Error: "));
        g_assert_true(g_file_get_contents(path, &content, NULL, NULL));
        g_assert_cmpstr(content, ==, "precious");
    }
}

int main(int argc, char **argv)
{
    rig_init(&argc, &argv, "filter-dump");
    rig_add_vm("fifo/stalled", "", test_fifo_stalled);
    rig_add_vm("fifo/gone", "", test_fifo_gone);
    rig_add_vm("refused", "", test_refused);
    return g_test_run();
}
