/*
 * QTest testcase for filter-redirector on a TAP with vhost
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <net/if.h>
#include <sched.h>
#include <glib/gstdio.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <linux/capability.h>
#include <linux/if_ether.h>
#include <linux/sockios.h>
#include "filter-redirector-rig.h"
#include "libqos/virtio.h"
#include "qemu/bswap.h"
#include "qemu/units.h"

#define MIRROR "-object filter-mirror,id=cap,netdev=n0,outdev=out," \
               "vnet_hdr_support=on,queue="
/* What came while the VM was stopped, so that the guest does not get it */
#define TAKE CAPTURE STOPPED_ONLY
/* A second redirector */
#define CAPTURE2 "-object filter-redirector,id=cap2,netdev=n0,outdev=in," \
                 "vnet_hdr_support=on,queue="
#define MULTIQUEUE_NETDEV "vhost=on,queues=2"
#define MULTIQUEUE_NIC ",mq=on,vectors=6"

/* Frames of the host's that come where they must */

static void host_to_out(Fixture *f, uint32_t first, uint32_t count)
{
    host_send(f, first, count);
    expect_out(f, first, count);
}

static void host_to_guest(Fixture *f, uint32_t first, uint32_t count)
{
    host_send(f, first, count);
    expect_guest(f, first, count);
}

/* Returns the next number; QEMU answers after each burst. */
static uint32_t host_send_bursts(Fixture *f, uint32_t first, int bursts,
                                 uint32_t burst)
{
    for (int i = 0; i < bursts; i++, first += burst) {
        host_send(f, first, burst);
        counter(f, "cap", "capture-packets");
    }
    return first;
}

/* A redirector, and which of the frames it captures or injects */
typedef struct Direction {
    const char *path;
    const char *args;
    bool tx;
    bool rx;
    const char *netdev_opts;
    const char *nic_opts;
} Direction;

/* Capture */

static const Direction captures[] = {
    { "capture/tx", CAPTURE "tx", true, false, "vhost=on", "" },
    { "capture/rx", CAPTURE "rx", false, true, "vhost=on", "" },
    { "capture/all", CAPTURE "all", true, true, "vhost=on", "" },
    { "capture/mirror", MIRROR "all", true, true, "vhost=on", "" },
    /* The socket sees the interface, not a queue. */
    { "capture/multiqueue", CAPTURE "tx", true, false, MULTIQUEUE_NETDEV,
      MULTIQUEUE_NIC },
    /* The guest's packets come along the chain as well: still one copy. */
    { "capture/chain-reads", CAPTURE "tx,packet-socket=on", true, false,
      "vhost=off", "" },
};

static void test_capture(const void *data)
{
    const Direction *d = data;
    uint64_t captured = 50 * (d->tx + d->rx);
    Fixture f;

    fixture_init(&f, d->netdev_opts, d->nic_opts, d->args);
    guest_start(&f);
    g_assert_cmpint(vhost_started(&f), ==,
                    g_str_has_prefix(d->netdev_opts, "vhost=on"));
    expect_source(&f, "cap", "packet-socket");
    guest_post(&f, 51);
    /* That frames are not captured shows by the next ones. */
    for (uint32_t n = 0; n < 100; n += 50) {
        host_to_guest(&f, n, 25);
        expect_out(&f, n, d->tx ? 25 : 0);
        guest_send(&f, n + 25, 25);
        expect_host(&f, n + 25, 25);
        expect_out(&f, n + 25, d->rx ? 25 : 0);
    }
    g_assert_cmpuint(counter(&f, "cap", "capture-packets"), ==, captured);
    /* The TAP is held no longer than the filter is there. */
    vm_stop(&f);
    del_object(&f, "cap");
    vm_cont(&f);
    host_to_guest(&f, 100, 1);
    fixture_close(&f);
}

/* In bursts the sockets are not polled: each last one comes all the same. */
static void test_capture_bursts(Fixture *f)
{
    uint32_t n = 0;

    for (int round = 0; round < 30; round++) {
        uint32_t burst = round % 3 ? 1 : 50 + 20 * round;

        host_to_out(f, n, burst);
        n += burst;
    }
    g_assert_cmpuint(counter(f, "cap", "capture-packets"), ==, n);
    g_assert_cmpuint(counter(f, "cap", "capture-kernel-drops"), ==, 0);
}

/* filter-dump */

/* The next packet of the file, which has its first @caplen bytes */
static void expect_dump(FILE *file, uint32_t number, uint32_t caplen)
{
    uint8_t got[BUFFER_LEN], want[FRAME_LEN];
    PcapPacket packet;

    make_frame(want, number);
    read_pcap(file, &packet, got, sizeof(got));
    g_assert_cmpmem(got, packet.caplen, want, caplen);
    g_assert_cmpuint(packet.len, ==, FRAME_LEN);
}

/* What is longer than maxlen is cut off, and its length is told. */
static void test_capture_dump_maxlen(Fixture *f)
{
    g_autofree char *path = g_build_filename(f->dir, "dump", NULL);
    FILE *file;

    object_add(f, "-object filter-dump,id=cap,netdev=n0,queue=tx,maxlen=20,"
               "file=%s", path);
    file = open_pcap(path);
    host_send(f, 0, 2);
    expect_dump(file, 0, 20);
    expect_dump(file, 1, 20);
    fclose(file);
}

/* When the disk is full the file ends, and what does not come is counted. */
static void test_capture_dump_full(Fixture *f)
{
    const unsigned room = (4096 - 24) / (sizeof(PcapPacket) + FRAME_LEN);
    g_autofree char *dir = g_build_filename(f->dir, "full", NULL);

    g_assert_cmpint(g_mkdir(dir, 0700), ==, 0);
    run_command("mount -t tmpfs -o size=4k none %s", dir);
    object_add(f, "-object filter-dump,id=cap,netdev=n0,queue=tx,file=%s/pcap",
               dir);
    host_send(f, 0, 60);
    wait_counter(f, "cap", "capture-peer-drops", 60 - room);
    g_assert_cmpuint(counter(f, "cap", "capture-packets"), ==, room);
    del_object(f, "cap");
    run_command("umount %s", dir);
    g_rmdir(dir);
}

/* Status and connection */

/* What a capture is off by, and on again */
typedef enum Off {
    BY_STATUS,
    BY_STOP,
    BY_PEER,
    BY_MAX
} Off;

static void capture_off(Fixture *f, Off by)
{
    if (by == BY_STATUS) {
        g_test_message("off by status");
        set_status(f, "cap", "off");
    } else if (by == BY_STOP) {
        g_test_message("off by stop");
        vm_stop(f);
    } else {
        g_test_message("off by the peer");
        close(f->out);
    }
    expect_source(f, "cap", "none");
}

static void capture_on(Fixture *f, Off by)
{
    if (by == BY_STATUS) {
        set_status(f, "cap", "on");
    } else if (by == BY_STOP) {
        vm_cont(f);
    } else {
        f->out = connect_to(f, "out");
    }
    expect_source(f, "cap", "packet-socket");
}

/* Nothing stale comes, and the guest has no loss. */
static void test_on_off(Fixture *f)
{
    uint32_t n = 0;

    guest_post(f, 90);
    for (Off by = 0; by < BY_MAX; by++, n += 30) {
        host_to_out(f, n, 10);
        expect_guest(f, n, 10);
        capture_off(f, by);
        host_send(f, n + 10, 10);
        capture_on(f, by);
        host_to_out(f, n + 20, 10);
        expect_guest(f, n + 10, 20);
    }
    g_assert_cmpuint(counter(f, "cap", "capture-packets"), ==, 60);
    del_object(f, "cap");
    g_assert_cmpint(hooked_sockets(f), ==, 0);
}

static void test_off_at_start(Fixture *f)
{
    in_send(f, 10, 10);
    guest_post(f, 30);
    host_to_guest(f, 0, 10);
    wait_inject_pending(f, "inj", false);
    set_status(f, "inj", "on");
    expect_guest(f, 10, 10);
    set_status(f, "cap", "on");
    host_to_out(f, 20, 1);
}

/* No cost while it is off: soon it is not on the interface's list. */
static void test_unhooked(Fixture *f)
{
    for (Off by = 0; by < BY_MAX; by++) {
        expect_source(f, "cap", "packet-socket");
        g_assert_cmpint(hooked_sockets(f), ==, 1);
        capture_off(f, by);
        WAIT_UNTIL(hooked_sockets(f) == 0);
        capture_on(f, by);
    }
    /* One that is on again stays there, also when that time is over. */
    object_add(f, CAPTURE2 "tx");
    capture_off(f, BY_STATUS);
    capture_on(f, BY_STATUS);
    set_status(f, "cap2", "off");
    WAIT_UNTIL(hooked_sockets(f) == 1);
    expect_source(f, "cap", "packet-socket");
}

/*
 * It stays there for 1 s, for one that comes and goes.  Nothing that comes
 * meanwhile is captured later, or counted.
 */
static void test_lingers(Fixture *f)
{
    int seen = 0;

    for (int i = 0; i < 20; i++) {
        Off by = i % 2 ? BY_STATUS : BY_PEER;

        host_to_out(f, 2 * i, 1);
        capture_off(f, by);
        seen += hooked_sockets(f);      /* not each time, on a slow machine */
        host_send(f, 1000, 5000);
        g_assert_cmpuint(counter(f, "cap", "capture-kernel-drops"), ==, 0);
        host_send(f, 1000, 5000);
        capture_on(f, by);
        g_assert_cmpint(hooked_sockets(f), ==, 1);
        host_to_out(f, 2 * i + 1, 1);
    }
    g_assert_cmpint(seen, >, 0);
    g_assert_cmpuint(counter(f, "cap", "capture-kernel-drops"), ==, 0);
    g_assert_cmpuint(counter(f, "cap", "capture-peer-drops"), ==, 0);
    g_assert_cmpuint(counter(f, "cap", "capture-packets"), ==, 40);
}

/* Run state */

/* A mirror takes nothing from the guest, whenever it works. */
static void test_stop_mirror(Fixture *f)
{
    guest_post(f, 30);
    host_to_guest(f, 0, 10);
    expect_source(f, "cap", "none");
    vm_stop(f);
    expect_source(f, "cap", "packet-socket");
    host_to_out(f, 10, 10);
    vm_cont(f);
    expect_source(f, "cap", "none");
    expect_guest(f, 10, 10);
    host_to_guest(f, 20, 10);
    g_assert_cmpuint(counter(f, "cap", "capture-packets"), ==, 10);
}

/*
 * At the stop a packet waits in the NIC's queue, since there is no driver,
 * and net.c drops it; the others stay in the TAP for the driver.
 */
static void test_stop_nothing_read(Fixture *f)
{
    host_send_taken(f, 0, 5);
    expect_out(f, 0, 5);
    vm_stop(f);
    counter(f, "cap", "capture-packets");
    counter(f, "cap", "capture-packets");
    guest_start(f);
    guest_post(f, 10);
    vm_cont(f);
    g_assert_true(vhost_started(f));
    expect_guest(f, 1, 4);
}

/* What the guest did not take, once: from the TAP, which vhost gave back. */
static void test_take(Fixture *f)
{
    g_assert_true(vhost_started(f));
    expect_source(f, "cap", "none");
    guest_post(f, 4);
    host_send(f, 0, 20);
    expect_guest(f, 0, 4);
    vm_stop(f);
    expect_source(f, "cap", "chain");
    expect_out(f, 4, 16);
    host_to_out(f, 20, 100);
    vm_cont(f);
    expect_source(f, "cap", "none");
    g_assert_true(vhost_started(f));

    /* The guest goes on with what comes now. */
    guest_post(f, 10);
    host_to_guest(f, 200, 10);
    g_assert_cmpuint(counter(f, "cap", "capture-packets"), ==, 116);
}

static void host_send_from(Fixture *f, uint32_t number, const uint8_t *address)
{
    uint8_t frame[FRAME_LEN];

    make_frame(frame, number);
    memcpy(frame + ETH_ALEN, address, ETH_ALEN);
    g_assert_cmpint(send(f->host, frame, FRAME_LEN, 0), ==, FRAME_LEN);
}

/* What the guest sent itself, and a bridge brings back, is not taken. */
static void expect_echo_skipped(Fixture *f, const uint8_t *own,
                                const uint8_t *other)
{
    uint64_t packets = counter(f, "cap", "capture-packets");
    uint64_t skipped = counter(f, "cap", "capture-skipped");

    g_assert_true(vhost_started(f));
    for (int round = 0; round < 3; round++) {
        uint32_t n = 100 * round;

        vm_stop(f);
        for (int i = 0; i < 10; i++) {
            host_send_from(f, 1000 + i, own);
            host_send(f, n + i, 1);
        }
        host_send_from(f, n + 10, other);
        expect_out(f, n, 11);
        vm_cont(f);
    }
    g_assert_cmpuint(counter(f, "cap", "capture-packets") - packets, ==, 33);
    g_assert_cmpuint(counter(f, "cap", "capture-skipped") - skipped, ==, 30);
}

/* The guest's address is the command line's, or the one the driver has set. */
static void test_take_echo(Fixture *f)
{
    static const uint8_t given[] = { 0x52, 0x54, 0x00, 0x12, 0x34, 0x56 };
    static const uint8_t set[] = { 0x02, 0x00, 0x00, 0x00, 0xab, 0xcd };

    guest_start(f);
    expect_echo_skipped(f, given, set);
    guest_stop(f);
    guest_start_address(f, set);
    expect_echo_skipped(f, set, given);
}

/* QEMU's announcement of the guest is not taken; it waits for the VM to run. */
static void test_take_announce(Fixture *f)
{
    const uint16_t rarp = 0x8035;
    int network = open_host_protocol(f->ifname, rarp);
    uint8_t frame[BUFFER_LEN];

    vm_stop(f);
    expect_source(f, "cap", "chain");
    qtest_qmp_assert_success(f->qts, "{'execute': 'announce-self',"
        " 'arguments': {'initial': 50, 'max': 50, 'rounds': 1, 'step': 0}}");
    host_to_out(f, 0, 10);
    g_assert_cmpuint(counter(f, "cap", "capture-packets"), ==, 10);
    vm_cont(f);
    wait_readable(network);
    g_assert_cmpint(recv(network, frame, sizeof(frame), 0), >=, 42);
    g_assert_cmphex(lduw_be_p(frame + 12), ==, rarp);
    close(network);
}

/* The same if QEMU reads the TAP: one waits in the queue of the NIC. */
static void test_take_no_vhost(Fixture *f)
{
    g_assert_false(vhost_started(f));
    host_send_taken(f, 0, 20);
    vm_stop(f);
    expect_out(f, 0, 20);
    host_to_out(f, 20, 20);
    vm_cont(f);
    g_assert_cmpuint(counter(f, "cap", "capture-packets"), ==, 40);
}

/*
 * UDP packets of many flows, so that they spread over the queues.  The kernel
 * looks for flows in what the socket has as its protocol.
 */
static void host_send_flows(Fixture *f, uint16_t count)
{
    static const uint8_t head[14 + 20] = {
        0x52, 0x54, 0x00, 0x12, 0x34, 0x56, 0x02, 0, 0, 0, 0, 1, 0x08, 0x00,
        0x45, 0, 0, FRAME_LEN - 14, 0, 0, 0, 0, 64, 17, 0, 0,
        192, 0, 2, 1, 192, 0, 2, 2,
    };
    int host = open_host_protocol(f->ifname, ETH_P_IP);
    uint8_t frame[FRAME_LEN] = { };

    memcpy(frame, head, sizeof(head));
    stw_be_p(frame + sizeof(head) + 2, 9);
    stw_be_p(frame + sizeof(head) + 4, FRAME_LEN - sizeof(head));
    for (uint16_t i = 0; i < count; i++) {
        stw_be_p(frame + sizeof(head), 1000 + i);
        g_assert_cmpint(send(host, frame, FRAME_LEN, 0), ==, FRAME_LEN);
    }
    close(host);
}

/* All flows' packets come to the peer, in any order. */
static void expect_flows(Fixture *f, uint16_t count)
{
    g_autofree bool *seen = g_new0(bool, count);
    uint8_t frame[BUFFER_LEN], header[24];
    uint32_t header_len;

    for (uint16_t i = 0; i < count; i++) {
        uint16_t flow;

        g_assert_cmpuint(read_stream(f->out, frame, sizeof(frame), header,
                                     &header_len), ==, FRAME_LEN);
        flow = lduw_be_p(frame + 34) - 1000;
        g_assert_cmpuint(flow, <, count);
        g_assert_false(seen[flow]);
        seen[flow] = true;
    }
}

/* What waits in the TAP's second queue, or the NIC's, is saved as well. */
static void check_take_multiqueue(const char *netdev_opts, bool vhost)
{
    QVirtQueue *queues[5];
    Fixture f;

    fixture_init(&f, netdev_opts, MULTIQUEUE_NIC, TAKE ",packet-socket=on");
    guest_start_multiqueue(&f, queues);
    g_assert_cmpint(vhost_started(&f), ==, vhost);
    host_send_flows(&f, 100);
    vm_stop(&f);
    wait_counter(&f, "cap", "capture-packets", 100);
    expect_flows(&f, 100);
    host_send_flows(&f, 200);
    expect_flows(&f, 200);
    /* Without a peer both are held. */
    close(f.out);
    expect_connected(&f, "out", false);
    host_send_flows(&f, 100);
    f.out = connect_to(&f, "out");
    expect_flows(&f, 100);
    vm_cont(&f);
    qvirtio_reset(&f.dev->vdev);
    for (int i = 0; i < 5; i++) {
        qvirtqueue_cleanup(f.dev->vdev.bus, queues[i], &f.alloc);
    }
    fixture_close(&f);
}

static void test_take_multiqueue(void)
{
    check_take_multiqueue(MULTIQUEUE_NETDEV, true);
    check_take_multiqueue("vhost=off,queues=2", false);
}

/* Nobody listens: the packets stay where they are, for the guest. */
static void test_take_not_connected(Fixture *f)
{
    uint32_t taken;

    close(f->out);
    vm_stop(f);
    host_send(f, 0, 20);
    f->out = connect_to(f, "out");
    expect_out(f, 0, 20);

    close(f->out);
    f->out = -1;
    host_send(f, 20, 5);
    vm_cont(f);
    guest_post(f, 10);
    host_send(f, 25, 5);
    /* Some may have been taken before QEMU saw the peer leave. */
    taken = counter(f, "cap", "capture-packets");
    g_assert_cmpuint(taken, <=, 25);
    expect_guest(f, taken, 30 - taken);
}

/* A pty throws away what nobody reads, so it gets nothing before. */
static void test_take_pty(Fixture *f)
{
    g_autofree char *text = NULL;
    const char *at;
    char path[32];

    host_send_taken(f, 0, 5);
    vm_stop(f);
    text = qtest_hmp(f->qts, "info chardev");
    at = strstr(text, "pty:/dev/");
    g_assert_nonnull(at);
    g_assert_cmpint(sscanf(at, "pty:%31s", path), ==, 1);
    close(f->out);
    f->out = open(path, O_RDWR | O_NOCTTY);
    g_assert_cmpint(f->out, >=, 0);
    expect_out(f, 0, 5);
}

/* More than the socket and the stage hold, less than the TAP drops */
static uint32_t overfill_take(Fixture *f, uint32_t *sent)
{
    const uint32_t burst = 800, most = *sent + 60 * burst;
    uint32_t taken = 0;

    do {
        /* It is full when the counter stands still. */
        gint64 end = g_get_monotonic_time() + G_USEC_PER_SEC;

        host_send(f, *sent, burst);
        *sent += burst;
        do {
            uint32_t before = taken;

            taken = counter(f, "cap", "capture-packets");
            if (taken > before) {
                end = g_get_monotonic_time() + G_USEC_PER_SEC;
            }
        } while (taken < *sent && g_get_monotonic_time() < end);
    } while (taken == *sent && *sent < most);
    g_assert_cmpuint(taken, <, *sent);
    return taken;
}

/*
 * A peer that does not read: packets wait, and go one way or the other.  When
 * it leaves, the next one gets what it did not get whole.
 */
static void test_take_slow_peer(Fixture *f)
{
    uint32_t sent = 0, taken, next;
    uint8_t record[RECORD_LEN];
    size_t got = 0;
    ssize_t n;

    run_command("ip link set %s txqueuelen 1000", f->ifname);
    vm_stop(f);
    next = overfill_take(f, &sent) / 2;
    /* When there is room again, none is left behind. */
    expect_out(f, 0, next);
    wait_counter(f, "cap", "capture-packets", sent);
    taken = overfill_take(f, &sent);
    host_send(f, sent, 100);
    vm_cont(f);
    guest_post(f, 50);
    expect_guest(f, taken, 50);
    expect_out(f, next, next);
    shutdown(f->out, SHUT_WR);
    expect_connected(f, "out", false);
    while ((n = read(f->out, record, sizeof(record))) > 0) {
        got += n;
    }
    close(f->out);
    f->out = connect_to(f, "out");
    next += next + got / RECORD_LEN;
    expect_out(f, next, taken - next);
    g_assert_cmpuint(counter(f, "cap", "capture-packets"), ==, taken);
}

/* Two that save packets: each packet goes to one of them, in bounds. */
static void test_take_two(Fixture *f)
{
    uint32_t sent = 0, first, second;

    guest_start(f);
    vm_stop(f);
    /* Nobody reads.  The first one takes so many, and the TAP drops none. */
    while (sent < 10000) {
        sent = host_send_bursts(f, sent, 1, 500);
        wait_counter(f, "cap", "capture-packets", sent);
    }
    /* One peer comes back all the time. */
    sent = host_send_bursts(f, sent, 100, 450);
    for (int i = 0; i < 5; i++) {
        close(f->in);
        expect_source(f, "cap2", "chain");
        f->in = connect_to(f, "in");
    }
    first = counter(f, "cap", "capture-packets");
    sent = host_send_bursts(f, sent, 10, 450);
    second = counter(f, "cap2", "capture-packets");
    g_test_message("%u sent, %u and %u taken", sent, first, second);
    /* 4/5 of a buffer each; when it was full, a few more were taken. */
    g_assert_cmpuint(first, <, 18000);
    g_assert_cmpuint(second, >, 0);
    g_assert_cmpuint(second, <, 18000 + 6 * 3000);
    expect_out(f, 0, 10000);
}

/* Migration */

static void *migration_drain(void *opaque)
{
    int fd = GPOINTER_TO_INT(opaque);
    g_autofree uint8_t *buf = g_malloc(64 * KiB);

    while (read(fd, buf, 64 * KiB) > 0) {
        /* until test_migration_failed() shuts it down */
    }
    return NULL;
}

/* Neither a migration that fails nor a "cont" behind it harms the VM. */
static void expect_migration_failed(Fixture *f)
{
    expect_status(f, "query-migrate", "failed");
    expect_status(f, "query-status", "running");
    vm_cont(f);
    expect_source(f, "cap", "none");
    g_assert_true(vhost_started(f));
}

/*
 * What was handed over is gone for the guest, what was not is the guest's; and
 * all of it is while the filter was off.  The target goes away when the VM has
 * stopped, or there never is one.
 */
static void test_migration_failed(Fixture *f)
{
    guest_post(f, 200);
    for (int i = 0; i < 4; i++) {
        bool on = i % 2 == 0;
        uint32_t n = 50 * i, handed_over = on ? 10 : 0;
        GThread *drain;
        int fd[2];

        g_assert_cmpint(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fd),
                        ==, 0);
        qtest_qmp_fds_assert_success(f->qts, &fd[1], 1, "{'execute': 'getfd',"
                                     " 'arguments': {'fdname': 'target'}}");
        close(fd[1]);
        drain = g_thread_new("drain", migration_drain, GINT_TO_POINTER(fd[0]));
        set_status(f, "cap", on ? "on" : "off");
        host_to_guest(f, n, 10);
        migration_start(f, "fd:target");
        expect_source(f, "cap", on ? "chain" : "none");
        host_to_out(f, n + 10, handed_over);
        /* Nobody takes what comes now. */
        close(f->out);
        expect_connected(f, "out", false);
        host_send(f, n + 20, 10);

        shutdown(fd[0], SHUT_RDWR);
        g_thread_join(drain);
        close(fd[0]);
        qtest_qmp_assert_success(f->qts, "{'execute': 'migrate-continue',"
                                 " 'arguments': {'state': 'pre-switchover'}}");
        expect_migration_failed(f);
        host_send(f, n + 30, 10);
        expect_guest(f, n + 20, 20);

        f->out = connect_to(f, "out");
        qtest_qmp_assert_success(f->qts, "{'execute': 'migrate', 'arguments':"
                                 " {'uri': 'exec:false'}}");
        host_send(f, n + 40, 5);
        expect_migration_failed(f);
        host_send(f, n + 45, 5);
        expect_guest(f, n + 40, 10);
    }
    g_assert_cmpuint(counter(f, "cap", "capture-packets"), ==, 20);
}

/* Inject */

static const Direction injects[] = {
    { "inject/tx", INJECT "tx", true, false },
    { "inject/rx", INJECT "rx", false, true },
    { "inject/all", INJECT "all", true, true },
};

static void test_inject(const void *data)
{
    const Direction *d = data;
    Fixture f;

    fixture_start(&f, d->args);
    guest_start(&f);
    g_assert_true(vhost_started(&f));
    guest_post(&f, 60);
    in_send(&f, 0, 50);
    expect_guest(&f, 0, d->tx ? 50 : 0);
    expect_host(&f, 0, d->rx ? 50 : 0);
    /* There are no others before the next ones. */
    host_to_guest(&f, 50, 1);
    guest_send(&f, 51, 1);
    expect_host(&f, 51, 1);
    g_assert_cmpuint(counter(&f, "inj", "inject-packets"), ==, 50);
    /* The packet socket is for the guest's frames, and receives nothing. */
    g_assert_cmpint(packet_sockets(f.ifname, 0, 0), ==, d->tx);
    g_assert_cmpint(hooked_sockets(&f), ==, 0);
    fixture_close(&f);
}

/* The source of a migration may leave before the target resumes. */
static void test_inject_hold(Fixture *f)
{
    guest_post(f, 60);
    vm_stop(f);
    wait_inject_pending(f, "inj", false);
    in_send(f, 0, 30);
    wait_inject_pending(f, "inj", true);
    close(f->in);
    f->in = connect_to(f, "in");
    in_send(f, 30, 10);
    g_assert_cmpuint(counter(f, "inj", "inject-packets"), ==, 0);
    vm_cont(f);
    expect_guest(f, 0, 40);
    wait_inject_pending(f, "inj", false);
    in_send(f, 40, 10);
    expect_guest(f, 40, 10);
}

/* While the VM is stopped what goes to the network waits, and is not lost. */
static void test_inject_rx_waits(Fixture *f)
{
    vm_stop(f);
    in_send(f, 0, 200);
    wait_inject_pending(f, "inj", true);
    g_assert_cmpuint(counter(f, "inj", "inject-packets"), ==, 0);
    vm_cont(f);
    expect_host(f, 0, 200);
    /* What nobody takes has not been injected. */
    hmp(f, "set_link n0 off");
    in_send(f, 0, 3);
    wait_counter(f, "inj", "inject-interface-drops", 3);
    g_assert_cmpuint(counter(f, "inj", "inject-packets"), ==, 200);
}

/* Bad frames are skipped and counted, and the good ones arrive. */
static void test_inject_bad_frames(Fixture *f)
{
    static const struct {
        uint32_t len;
        uint32_t header_len;
    } cases[] = {
        { 0, 0 },                   /* empty */
        { 12 + 13, 12 },            /* no Ethernet header */
        { 12 + 4000, 12 },          /* over the MTU */
        { 100, 0xffffff00 },        /* header over the end */
    };
    uint8_t bad[8 + 4096] = { };

    guest_post(f, 20);
    for (int i = 0; i < ARRAY_SIZE(cases); i++) {
        size_t size = 8 + cases[i].len;

        stl_be_p(bad, cases[i].len);
        stl_be_p(bad + 4, cases[i].header_len);
        g_assert_cmpint(write(f->in, bad, size), ==, size);
        in_send(f, i, 1);
        expect_guest(f, i, 1);
        g_assert_cmpuint(counter(f, "inj", "inject-skipped"), ==, i + 1);
    }
    g_assert_cmpuint(counter(f, "inj", "inject-stream-errors"), ==, 0);

    /* A length that makes no sense ends the connection, and only that. */
    memset(bad, 0xff, 8);
    g_assert_cmpint(write(f->in, bad, 8), ==, 8);
    wait_readable(f->in);
    g_assert_cmpint(read(f->in, bad, 1), ==, 0);
    close(f->in);
    f->in = connect_to(f, "in");
    in_send(f, 5, 5);
    expect_guest(f, 5, 5);
}

/* Life cycle */

static void test_hotplug(Fixture *f)
{
    uint8_t begun[5] = { };
    int unread;

    guest_post(f, 40);
    add_capture(f);
    host_to_out(f, 0, 10);
    add_inject(f);
    in_send(f, 10, 10);
    expect_guest(f, 0, 20);
    del_object(f, "cap");
    host_send(f, 20, 10);
    add_capture(f);
    host_to_out(f, 30, 10);
    /* Whoever reads next has to begin with a frame. */
    g_assert_cmpint(write(f->in, begun, sizeof(begun)), ==, sizeof(begun));
    WAIT_UNTIL(ioctl(f->in, SIOCOUTQ, &unread) == 0 && !unread);
    del_object(f, "inj");
    wait_readable(f->in);
    g_assert_cmpint(read(f->in, begun, 1), ==, 0);
    del_object(f, "cap");
    g_assert_cmpint(hooked_sockets(f), ==, 0);
    expect_guest(f, 20, 20);
    g_assert_true(vhost_started(f));
    vm_stop(f);
    add_capture(f);
    expect_source(f, "cap", "none");
}

static void test_netdev_del(Fixture *f)
{
    g_autofree char *text = NULL;

    hmp(f, "netdev_del n0");
    text = qtest_hmp(f->qts, "qom-list /objects/cap");
    g_assert_nonnull(strstr(text, "not found"));
    g_assert_cmpint(hooked_sockets(f), ==, 0);
}

static void test_device_del(Fixture *f)
{
    qtest_qmp_device_del_send(f->qts, "nic");
    qtest_system_reset_nowait(f->qts);
    qtest_qmp_eventwait(f->qts, "DEVICE_DELETED");
    host_to_out(f, 0, 10);
    f->guest.rx = NULL;
    del_object(f, "cap");
    hmp(f, "netdev_del n0");
}

static void test_no_leak(Fixture *f)
{
    int fds = 0;

    for (int i = 0; i <= (g_test_slow() ? 300 : 100); i++) {
        add_capture(f);
        add_inject(f);
        del_object(f, "cap");
        del_object(f, "inj");
        if (i == 0) {
            fds = count_fds(f);
        }
    }
    g_assert_cmpint(count_fds(f), ==, fds);
    guest_post(f, 10);
    host_to_guest(f, 0, 10);
}

/* Peers of outdev */

/* More than the connection takes, or than can be staged and queued */
static uint32_t overfill(Fixture *f, uint32_t first, bool drop)
{
    uint64_t dropped = counter(f, "cap", "capture-kernel-drops");
    uint32_t limit = first + 1000000;

    do {
        first = host_send_bursts(f, first, 10, 500);
        g_assert_cmpuint(first, <, limit);
    } while (drop && counter(f, "cap", "capture-kernel-drops") == dropped);
    return first;
}

/*
 * So many of the frames from @first to @end, in order: where those that were
 * dropped are missing depends on when QEMU made room.  Returns the next one.
 */
static uint32_t expect_some(Fixture *f, uint32_t first, uint32_t end,
                            uint32_t count)
{
    uint8_t record[RECORD_LEN];

    for (; count; count--) {
        uint32_t number;

        read_full(f->out, record, RECORD_LEN);
        number = frame_number(record + RECORD_LEN - FRAME_LEN);
        g_assert_cmpuint(number, >=, first);
        first = number + 1;
    }
    g_assert_cmpuint(first, <=, end);
    return first;
}

/*
 * The filter goes off, or the VM stops, while the peer is behind.  It gets
 * what came before, and then what comes after the filter is on again.
 */
static void test_slow_peer_off(Fixture *f)
{
    uint64_t dropped = 0;
    uint32_t n = 0;

    for (int i = 0; i < 8; i++) {
        Off by = i & 1 ? BY_STOP : BY_STATUS;
        bool reads_before_on = i & 2, drop = i & 4;
        uint64_t before = dropped, staged;
        uint32_t first = n, left;

        n = overfill(f, n, drop);
        capture_off(f, by);
        g_assert_true(capture_pending(f, "cap"));
        dropped = counter(f, "cap", "capture-kernel-drops");
        g_assert_cmpint(dropped > before, ==, drop);
        left = n - first - (dropped - before);
        if (reads_before_on) {
            staged = counter(f, "cap", "capture-packets");
            do {
                first = expect_some(f, first, n, 100);
                left -= 100;
            } while (drop && counter(f, "cap", "capture-packets") == staged);
            /* The kernel has room again, but this is not to be captured. */
            host_send(f, 1000000, 100);
            expect_some(f, first, n, left);
            WAIT_UNTIL(!capture_pending(f, "cap"));
        }
        capture_on(f, by);
        if (!reads_before_on) {
            expect_some(f, first, n, left);
        }
        host_to_out(f, n++, 1);
    }
    g_assert_cmpuint(counter(f, "cap", "capture-kernel-drops"), ==, dropped);
    g_assert_cmpuint(counter(f, "cap", "capture-peer-drops"), ==, 0);
    /* Nothing is lost with it. */
    hmp(f, "object_del cap");
}

/* Who deletes it while the peer is behind is told what that costs. */
static void test_slow_peer_deleted(Fixture *f)
{
    for (int off = 0; off < 2; off++) {
        g_autofree char *text = NULL;
        uint64_t lost, dropped;
        uint32_t n;

        add_capture(f);
        expect_source(f, "cap", "packet-socket");
        n = overfill(f, 0, true);
        if (off) {
            set_status(f, "cap", "off");
        }
        dropped = counter(f, "cap", "capture-kernel-drops");
        text = qtest_hmp(f->qts, "object_del cap");
        g_assert_cmpint(sscanf(text, "warning: netdev 'n0': %" SCNu64
                               " packets were lost when", &lost),
                        ==, 1);
        expect_out(f, 0, n - dropped - lost);
        close(f->out);
        f->out = connect_to(f, "out");
    }
}

/*
 * A peer that accepts all at once gets all, more than is staged at a time.
 * QEMU is stopped, so that the frames wait when the filter is deleted, or goes
 * off.  For the long ones then the socket has no room; it tells that later.
 */
static void test_deleted_accepting(Fixture *f)
{
    const uint32_t n = 1600;
    const size_t most = 3500;
    g_autofree uint8_t *frame = g_malloc0(most);
    g_autofree char *path = g_build_filename(f->dir, "file", NULL);
    pid_t pid = qtest_pid(f->qts);
    size_t size = 0;
    struct stat st;

    run_command("ip link set %s mtu %zu", f->ifname, most);
    hmp(f, "chardev-add file,id=file,path=%s", path);
    for (int round = 1; round <= 3; round++) {
        size_t len = round < 3 ? 1500 : most;
        uint64_t dropped = 0;

        object_add(f, "-object filter-redirector,id=cap,netdev=n0,"
                   "outdev=file,queue=tx,buffer-size=6M");
        expect_source(f, "cap", "packet-socket");
        make_frame(frame, round);
        kill(pid, SIGSTOP);
        for (uint32_t i = 0; i < n; i++) {
            g_assert_cmpint(send(f->host, frame, len, 0), ==, len);
        }
        if (round == 3) {
            qtest_qmp_send(f->qts, "{'execute': 'qom-set', 'arguments':"
                           " {'path': '/objects/cap', 'property': 'status',"
                           " 'value': 'off'}}");
        } else {
            qtest_qmp_send(f->qts, "{'execute': 'object-del',"
                                   " 'arguments': {'id': 'cap'}}");
        }
        kill(pid, SIGCONT);
        qobject_unref(qtest_qmp_receive(f->qts));
        if (round == 3) {
            WAIT_UNTIL(!capture_pending(f, "cap"));
            dropped = counter(f, "cap", "capture-kernel-drops");
            g_assert_cmpuint(dropped, >, 0);
        }
        size += (n - dropped) * (4 + 12 + len);
        g_assert_cmpint(stat(path, &st), ==, 0);
        g_assert_cmpint(st.st_size, ==, size);
    }
}

/* With more memory nothing is dropped. */
static void test_buffer_size(Fixture *f)
{
    uint32_t sent;

    g_assert_cmpuint(counter(f, "cap", "buffer-size"), ==, 64 * MiB);
    guest_start(f);
    sent = host_send_bursts(f, 0, 40, 1000);
    g_assert_cmpuint(counter(f, "cap", "capture-kernel-drops"), ==, 0);
    expect_out(f, 0, sent);
    del_object(f, "cap");
    add_capture(f);
    g_assert_cmpuint(counter(f, "cap", "buffer-size"), ==, 32 * MiB);
}

/* Filters of all kinds on one netdev */

/* The last two need the chain, and keep vhost off. */
enum {
    MIXED_MIRROR,
    MIXED_CAP,
    MIXED_DUMP,
    MIXED_INJ,
    MIXED_CHAIN,
    MIXED_REWRITER,
    MIXED
};

/* All have queue=all; the dump's file comes behind. */
static const struct {
    const char *id;
    const char *args;
} mixed[MIXED] = {
    { "mirror", "filter-mirror,outdev=mir,vnet_hdr_support=on" },
    { "cap", "filter-redirector,outdev=out,vnet_hdr_support=on" },
    { "dump", "filter-dump,file=" },
    { "inj", "filter-redirector,indev=in,vnet_hdr_support=on" },
    { "chain", "filter-mirror,outdev=chn,vnet_hdr_support=on,"
               "packet-socket=off" },
    { "rew", "filter-rewriter,vnet_hdr_support=on" },
};

typedef struct Mixed {
    Fixture *f;
    int mirror;                 /* peers of the outdevs */
    int chain;
    char *path;                 /* of the dump */
    FILE *dump;
    int list[MIXED];            /* the filters that are there, head first */
    int count;
    uint32_t number;            /* of the next packet */
} Mixed;

/* How many filters are before this one. */
static int mixed_place(Mixed *m, int which)
{
    int at = 0;

    while (at < m->count && m->list[at] != which) {
        at++;
    }
    return at;
}

static bool mixed_has(Mixed *m, int which)
{
    return mixed_place(m, which) < m->count;
}

static void mixed_add(Mixed *m, int which)
{
    m->list[m->count++] = which;
    object_add(m->f, "-object %s%s,id=%s,netdev=n0,queue=all",
               mixed[which].args, which == MIXED_DUMP ? m->path : "",
               mixed[which].id);
    if (which == MIXED_DUMP) {
        m->dump = open_pcap(m->path);
    }
}

static void mixed_del(Mixed *m, int which)
{
    int at = mixed_place(m, which);

    del_object(m->f, mixed[which].id);
    m->count--;
    memmove(&m->list[at], &m->list[at + 1], (m->count - at) * sizeof(int));
    if (which == MIXED_DUMP) {
        fclose(m->dump);
        unlink(m->path);
    }
}

static void mixed_took(void *opaque, uint32_t number)
{
    uint32_t *next = opaque;

    g_assert_cmpuint(number, ==, *next);
    ++*next;
}

static void mixed_expect_guest(Mixed *m, uint32_t number)
{
    uint32_t next = number;

    WAIT_UNTIL(guest_take(m->f, mixed_took, &next));
    g_assert_cmpuint(next, ==, number + 1);
}

static void mixed_expect_chain(Mixed *m, uint32_t number)
{
    if (mixed_has(m, MIXED_CHAIN)) {
        expect_stream(m->chain, number, 1);
    }
}

/* Each of the filters with a packet socket has this packet next. */
static void mixed_expect_copies(Mixed *m, uint32_t number)
{
    if (mixed_has(m, MIXED_MIRROR)) {
        expect_stream(m->mirror, number, 1);
    }
    if (mixed_has(m, MIXED_CAP)) {
        expect_out(m->f, number, 1);
    }
    if (mixed_has(m, MIXED_DUMP)) {
        expect_dump(m->dump, number, FRAME_LEN);
    }
}

/*
 * A packet each way, and one that is injected both ways.  Of that, filters with
 * a packet socket get the one toward the network; on the chain it comes as from
 * the TAP, and as from the filter that injects.  That each comes once shows by
 * the one that comes next.
 */
static void mixed_pass(Mixed *m)
{
    bool vhost = !mixed_has(m, MIXED_CHAIN) && !mixed_has(m, MIXED_REWRITER);

    WAIT_UNTIL(vhost_started(m->f) == vhost);
    host_send(m->f, m->number, 1);
    mixed_expect_guest(m, m->number);
    mixed_expect_copies(m, m->number);
    mixed_expect_chain(m, m->number++);
    if (mixed_has(m, MIXED_INJ)) {
        in_send(m->f, m->number, 1);
        mixed_expect_guest(m, m->number);
        mixed_expect_copies(m, m->number);
        mixed_expect_chain(m, m->number);
        if (mixed_place(m, MIXED_CHAIN) < mixed_place(m, MIXED_INJ)) {
            mixed_expect_chain(m, m->number);
        }
        expect_host(m->f, m->number++, 1);
    }
    guest_put(m->f, m->number);
    expect_host(m->f, m->number, 1);
    mixed_expect_copies(m, m->number);
    mixed_expect_chain(m, m->number++);
}

/* The order with this number, of MIXED! ones */
static void mixed_order(int number, int order[MIXED])
{
    order[0] = 0;
    for (int i = 1; i < MIXED; i++) {
        int at = number % (i + 1);

        order[i] = order[at];
        order[at] = i;
        number /= i + 1;
    }
}

static void test_mixed(Fixture *f)
{
    const int orders = 720;     /* MIXED! */
    Mixed m = { .f = f };
    int order[MIXED];

    m.path = g_build_filename(f->dir, "dump", NULL);
    m.mirror = add_peer(f, "mir");
    m.chain = add_peer(f, "chn");
    guest_post_all(f);
    for (int i = 0; i < orders; i += g_test_slow() ? 11 : 31) {
        mixed_order(i, order);
        for (int j = 0; j < MIXED; j++) {
            mixed_add(&m, order[j]);
            mixed_pass(&m);
        }
        mixed_order(i * 7 % orders, order);
        for (int j = 0; j < MIXED; j++) {
            mixed_del(&m, order[j]);
            mixed_pass(&m);
        }
        g_assert_cmpint(hooked_sockets(f), ==, 0);
    }
    close(m.mirror);
    close(m.chain);
    g_free(m.path);
}

/* Errors */

static void expect_error(Fixture *f, const char *args, const char *error)
{
    int fds = count_fds(f);
    g_autofree char *text = qtest_hmp(f->qts, "object_add filter-redirector,"
                                      "id=bad,%s", args);

    g_test_message("%s", text);
    g_assert_nonnull(strstr(text, error));
    g_assert_cmpint(count_fds(f), ==, fds);
}

/* @properties are names and values, ended by NULL. */
static void expect_fixed(Fixture *f, const char *args,
                         const char *const *properties)
{
    object_add(f, "-object %s,id=fixed,netdev=n0", args);
    for (; *properties; properties++) {
        g_autofree char *text = qtest_hmp(f->qts, "qom-set /objects/fixed %s",
                                          *properties);

        g_test_message("%s: %s", *properties, text);
        g_assert_nonnull(strstr(text, "cannot be changed once the filter is "
                                      "set up"));
    }
    del_object(f, "fixed");
}

static void test_errors(Fixture *f)
{
    static const struct {
        const char *args;
        const char *error;
    } cases[] = {
        { "netdev=hub,outdev=out,packet-socket=on",
          "'packet-socket=on' needs a netdev of type 'tap', and netdev 'hub' "
          "is of type 'hubport'" },
        { "netdev=plain,outdev=out,enable_when_stopped=on",
          "'enable_when_stopped' needs 'packet-socket=on' on netdev 'plain'" },
        { "netdev=n0,outdev=out,enable_when_running=off",
          "needs 'enable_when_stopped=on'" },
        { "netdev=plain,outdev=out,buffer-size=4M",
          "'buffer-size' needs 'packet-socket=on' on netdev 'plain'" },
        { "netdev=n0,outdev=out,buffer-size=1000000",
          "from 1 MiB to 1 GiB" },
        { "netdev=n0,outdev=out,buffer-size=1025M", "from 1 MiB to 1 GiB" },
        { "netdev=n0,outdev=none", "'none' not found" },
        { "netdev=n0", "at least one property" },
        { "netdev=n0", "filter-redirector 'bad': " },
        { "netdev=n0,outdev=out,indev=out", "could not be same" },
        { "netdev=n0,outdev=both", "chardev 'both' cannot carry frames" },
        { "netdev=n0,queue=tx,indev=both", "'both' cannot carry frames" },
        { "netdev=n0,queue=tx,indev=mux", "'mux' cannot carry frames" },
        { "netdev=n0,outdev=udp", "'udp' cannot carry frames" },
        { "netdev=n0,outdev=out,position=id=io", "'io' is not a filter" },
        /* So that no peer can make a loop of it */
        { "netdev=n0,indev=in,outdev=out", "only 'queue=tx' is possible" },
        { "netdev=n0,indev=in,outdev=out,queue=" STOPPED_ONLY,
          "would be taken again" },
        { "netdev=n0,indev=in,enable_when_running=off,enable_when_stopped=on",
          "needs 'queue=tx'" },
    };
    static const char *const redirector[] = {
        "netdev n0", "queue rx", "position head", "insert before", "indev in",
        "outdev out", "vnet_hdr_support on", "packet-socket on",
        "enable_when_running off", "enable_when_stopped on", "buffer-size 2M",
        "packet-fd 1", NULL
    };
    static const char *const mirror[] = {
        "outdev out", "vnet_hdr_support on", NULL
    };
    static const char *const dump[] = { "file other", "maxlen 100", NULL };

    for (int i = 0; i < ARRAY_SIZE(cases); i++) {
        expect_error(f, cases[i].args, cases[i].error);
    }
    expect_fixed(f, "filter-redirector,outdev=out", redirector);
    expect_fixed(f, "filter-mirror,outdev=out", mirror);
    if (HAS_DUMP) {
        expect_fixed(f, "filter-dump,file=/dev/null", dump);
    }

    /* And the VM is as it was. */
    guest_start(f);
    guest_post(f, 1);
    host_to_guest(f, 0, 1);
}

static void test_error_interface_gone(Fixture *f)
{
    run_command("ip link del %s", f->ifname);
    expect_error(f, "netdev=n0,outdev=out",
                 "netdev 'n0': could not get the TAP's interface");
}

/* A QEMU that gets its TAP, or what looks like one */
static void start_with_fd(Fixture *f, int fd)
{
    f->qts = qtest_initf("-nodefaults -machine pc "
                         "-netdev tap,id=n0,fd=%d,vhost=on "
                         "-chardev null,id=out", fd);
}

/* A TAP of another namespace, with the name of an interface that is here. */
static void check_netns(bool same_address)
{
    int own = open("/proc/self/ns/net", O_RDONLY);
    int here = open_tap("tapns"), there;
    struct ifreq ifr;
    Fixture f;

    g_assert_cmpint(unshare(CLONE_NEWNET), ==, 0);
    there = open_tap("tapns");
    g_assert_cmpint(setns(own, CLONE_NEWNET), ==, 0);
    g_assert_cmpint(fcntl(there, F_SETFD, 0), ==, 0);
    if (same_address) {
        g_assert_cmpint(ioctl(there, SIOCGIFHWADDR, &ifr), ==, 0);
        g_assert_cmpint(ioctl(here, SIOCSIFHWADDR, &ifr), ==, 0);
    }

    start_with_fd(&f, there);
    expect_error(&f, "netdev=n0,outdev=out",
                 "netdev 'n0': interface 'tapns' in QEMU's network namespace "
                 "is not the TAP");
    close(here);
    expect_error(&f, "netdev=n0,outdev=out",
                 "netdev 'n0': could not find interface 'tapns'");
    qtest_quit(f.qts);
    close(there);
    close(own);
}

static void test_error_netns(void)
{
    int status;
    pid_t pid = fork();

    if (!pid) {
        /* QEMU may not ask for the namespace: the MAC address tells. */
        g_assert_cmpint(prctl(PR_CAPBSET_DROP, CAP_NET_ADMIN), ==, 0);
        check_netns(false);
        _exit(0);
    }
    g_assert_cmpint(waitpid(pid, &status, 0), ==, pid);
    g_assert_cmpint(status, ==, 0);
    check_netns(true);
}

/* A macvtap's fd is like a TAP's, but its directions are the other way. */
static void test_error_not_a_tap(void)
{
    g_autofree char *path = NULL;
    int tap = open_tap("tapmv"), fd;
    Fixture f;

    if (system("ip link add link tapmv name macvtapq type macvtap")) {
        g_test_skip("the kernel has no macvtap");
        close(tap);
        return;
    }
    path = g_strdup_printf("/dev/tap%u", if_nametoindex("macvtapq"));
    fd = open(path, O_RDWR | O_NONBLOCK);
    g_assert_cmpint(fd, >=, 0);
    start_with_fd(&f, fd);
    expect_error(&f, "netdev=n0,outdev=out",
                 "netdev 'n0': interface 'macvtapq' is not a TAP");
    qtest_quit(f.qts);
    close(fd);
    close(tap);
}

static void add_directions(const Direction *directions, int count,
                           void (*func)(const void *data))
{
    for (int i = 0; i < count; i++) {
        rig_add_data(directions[i].path,
                     g_memdup2(&directions[i], sizeof(directions[i])), func);
    }
}

int main(int argc, char **argv)
{
    rig_init(&argc, &argv, "filter-redirector-vhost");

    add_directions(captures, ARRAY_SIZE(captures), test_capture);
    rig_add_guest("capture/bursts", CAPTURE "tx", test_capture_bursts);
    if (HAS_DUMP) {
        rig_add_vm("capture/dump-maxlen", "", test_capture_dump_maxlen);
        rig_add_vm("capture/dump-full", "", test_capture_dump_full);
    }
    if (HAS_FALLBACK) {
        rig_add_guest("mixed", "", test_mixed);
    }
    rig_add_guest("status/on-off", CAPTURE "tx", test_on_off);
    rig_add_guest("status/on-off-mirror", MIRROR "tx", test_on_off);
    rig_add_guest("status/off-at-start",
                  CAPTURE "tx,status=off " INJECT "tx,status=off",
                  test_off_at_start);
    rig_add_vm("status/unhooked", CAPTURE "tx", test_unhooked);
    rig_add_guest("status/lingers", CAPTURE "all,buffer-size=1M", test_lingers);
    rig_add_guest("stop/mirror", MIRROR STOPPED_ONLY, test_stop_mirror);
    /* The second takes nothing of what is for the guest. */
    rig_add_vm("stop/nothing-read", CAPTURE "tx " CAPTURE2
               "rx,enable_when_running=off,enable_when_stopped=on",
               test_stop_nothing_read);
    rig_add_guest("stop/stopped-only", TAKE " " CAPTURE2 "tx", test_take);
    rig_add_guest("stop/stopped-only-announce",
                  CAPTURE "all,enable_when_running=off,enable_when_stopped=on",
                  test_take_announce);
    rig_add_vm("stop/stopped-only-echo", TAKE, test_take_echo);
    rig_add_vm("stop/stopped-only-no-vhost", TAKE, test_take_no_vhost);
    rig_add("stop/stopped-only-multiqueue", test_take_multiqueue);
    rig_add_guest("stop/stopped-only-not-connected", TAKE,
                  test_take_not_connected);
    rig_add_vm("stop/stopped-only-pty", "-chardev pty,id=pty "
               "-object filter-redirector,id=cap,netdev=n0,outdev=pty,"
               "vnet_hdr_support=on,queue=" STOPPED_ONLY, test_take_pty);
    rig_add_guest("stop/stopped-only-slow-peer", TAKE ",buffer-size=2M",
                  test_take_slow_peer);
    rig_add_vm("stop/two-filters", TAKE ",buffer-size=1M "
               CAPTURE2 STOPPED_ONLY ",buffer-size=1M", test_take_two);
    rig_add_guest("stop/migration-failed", TAKE, test_migration_failed);
    add_directions(injects, ARRAY_SIZE(injects), test_inject);
    rig_add_guest("inject/hold", INJECT "tx", test_inject_hold);
    rig_add_guest("inject/rx-waits", INJECT "rx,enable_when_stopped=on",
                  test_inject_rx_waits);
    rig_add_guest("inject/bad-frames", INJECT "tx", test_inject_bad_frames);
    rig_add_guest("life/hotplug", "", test_hotplug);
    rig_add_guest("life/netdev-del", CAPTURE "tx " INJECT "tx",
                  test_netdev_del);
    rig_add_guest("life/device-del", CAPTURE "tx", test_device_del);
    rig_add_guest("life/no-leak", "", test_no_leak);
    rig_add_guest("peer/slow-off", CAPTURE "tx", test_slow_peer_off);
    rig_add_guest("peer/slow-deleted", "", test_slow_peer_deleted);
    rig_add_guest("peer/deleted-accepting", "", test_deleted_accepting);
    rig_add_vm("peer/buffer-size", CAPTURE "tx,buffer-size=64M",
               test_buffer_size);
    rig_add_vm("error/options", "-object iothread,id=io "
               "-chardev udp,id=udp,host=127.0.0.1,port=9 "
               "-chardev null,id=mux,mux=on "
               "-chardev null,id=null1 -chardev null,id=null2 "
               "-chardev hub,id=both,chardevs.0=null1,chardevs.1=null2 "
               "-netdev hubport,id=hub,hubid=1 "
               "-netdev tap,id=plain,ifname=tapplain,script=no,"
               "downscript=no,vhost=off",
               test_errors);
    rig_add_vm("error/interface-gone", "", test_error_interface_gone);
    rig_add("error/netns", test_error_netns);
    rig_add("error/not-a-tap", test_error_not_a_tap);
    return g_test_run();
}
