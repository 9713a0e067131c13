/*
 * QTest testcase for filter-redirector on a TAP with vhost
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <net/if.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <linux/capability.h>
#include <linux/if_ether.h>
#include "filter-redirector-rig.h"
#include "libqos/virtio.h"
#include "qemu/bswap.h"
#include "qemu/cutils.h"
#include "qapi/error.h"
#include "qemu/units.h"
#include "qobject/qdict.h"
#include "qobject/qjson.h"
#include "standard-headers/linux/virtio_config.h"
#include "standard-headers/linux/virtio_net.h"

#define MIRROR "-object filter-mirror,id=cap,netdev=n0,outdev=out," \
               "vnet_hdr_support=on,queue="

/* Capture */

static void test_capture_tx(Fixture *f)
{
    g_assert_true(vhost_started(f));
    guest_post(f, 50);
    host_send(f, 0, 50);
    expect_out(f, 0, 50);
    expect_guest(f, 0, 50);
    g_assert_cmpuint(counter(f, "cap", "capture-packets"), ==, 50);
    g_assert_cmpuint(counter(f, "cap", "capture-bytes"), ==, 50 * FRAME_LEN);
}

static void test_capture_rx(Fixture *f)
{
    g_assert_true(vhost_started(f));
    guest_send(f, 0, 50);
    expect_out(f, 0, 50);
    expect_host(f, 0, 50);

    /* The other direction is left out. */
    guest_post(f, 10);
    host_send(f, 1000, 10);
    expect_guest(f, 1000, 10);
    guest_send(f, 50, 1);
    expect_out(f, 50, 1);
    g_assert_cmpuint(counter(f, "cap", "capture-packets"), ==, 51);
}

static void test_capture_tx_only(Fixture *f)
{
    guest_post(f, 10);
    guest_send(f, 1000, 10);
    expect_host(f, 1000, 10);
    host_send(f, 0, 1);
    expect_out(f, 0, 1);
    g_assert_cmpuint(counter(f, "cap", "capture-packets"), ==, 1);
}

static void test_capture_all(Fixture *f)
{
    guest_post(f, 10);
    for (int i = 0; i < 10; i++) {
        host_send(f, 2 * i, 1);
        expect_out(f, 2 * i, 1);
        guest_send(f, 2 * i + 1, 1);
        expect_out(f, 2 * i + 1, 1);
    }
    expect_guest(f, 0, 1);
}

/* One copy each, whether vhost or the chain reads the TAP. */
static void test_capture_driver_reload(Fixture *f)
{
    uint32_t n = 0;

    g_assert_false(vhost_started(f));
    host_send(f, n, 10);
    expect_out(f, n, 10);
    n += 10;
    for (int round = 0; round < 5; round++) {
        guest_start(f);
        g_assert_true(vhost_started(f));
        guest_post(f, 30);
        host_send(f, n, 10);
        expect_out(f, n, 10);
        n += 10;
        guest_stop(f);
        g_assert_false(vhost_started(f));
        host_send(f, n, 10);
        expect_out(f, n, 10);
        n += 10;
        qtest_system_reset(f->qts);
        host_send(f, n, 10);
        expect_out(f, n, 10);
        n += 10;
        qvirtio_pci_device_enable(f->dev);
    }
    g_assert_cmpuint(counter(f, "cap", "capture-packets"), ==, n);
}

/* Without vhost the guest's packets do come along the chain: still one copy. */
static void test_capture_chain_reads(void)
{
    Fixture f;

    fixture_init(&f, "vhost=off", "", CAPTURE "tx,packet-socket=on");
    guest_start(&f);
    g_assert_false(vhost_started(&f));
    guest_post(&f, 20);
    host_send(&f, 0, 20);
    expect_out(&f, 0, 20);
    expect_guest(&f, 0, 20);
    host_send(&f, 20, 1);
    expect_out(&f, 20, 1);
    fixture_close(&f);
}

/* Two queue pairs: the socket sees the interface, not a queue. */
static void test_capture_multiqueue(void)
{
    Fixture f;

    fixture_init(&f, "vhost=on,queues=2", ",mq=on,vectors=6", CAPTURE "tx");
    guest_start(&f);
    g_assert_true(vhost_started(&f));
    guest_post(&f, 50);
    host_send(&f, 0, 50);
    expect_out(&f, 0, 50);
    expect_guest(&f, 0, 50);
    fixture_close(&f);
}

/* In bursts the sockets are not polled: each last one comes all the same. */
static void test_capture_bursts(Fixture *f)
{
    uint32_t n = 0;

    for (int round = 0; round < 30; round++) {
        uint32_t burst = round % 3 ? 1 : 50 + 20 * round;

        host_send(f, n, burst);
        expect_out(f, n, burst);
        n += burst;
    }
    g_assert_cmpuint(counter(f, "cap", "capture-packets"), ==, n);
    g_assert_cmpuint(counter(f, "cap", "capture-kernel-drops"), ==, 0);
}

/* The other filter that captures */
static void test_capture_mirror(Fixture *f)
{
    g_assert_true(vhost_started(f));
    expect_source(f, "cap", "packet-socket");
    guest_post(f, 20);
    host_send(f, 0, 10);
    expect_out(f, 0, 10);
    expect_guest(f, 0, 10);
    guest_send(f, 10, 10);
    expect_out(f, 10, 10);
    expect_host(f, 10, 10);
    set_status(f, "cap", "off");
    expect_source(f, "cap", "none");
    host_send(f, 20, 1);
    expect_guest(f, 20, 1);
    set_status(f, "cap", "on");
    host_send(f, 21, 1);
    expect_out(f, 21, 1);
    g_assert_cmpuint(counter(f, "cap", "capture-packets"), ==, 21);
    del_object(f, "cap");
    g_assert_cmpint(packet_sockets(f->ifname, ETH_P_ALL, 1), ==, 0);
}

/* The file can be read while it is written, and says what was on the wire. */
static void test_capture_dump(void)
{
    char path[] = "/tmp/filter-dump-XXXXXX";
    uint8_t frame[BUFFER_LEN];
    g_autofree char *args = NULL;
    PcapPacket packet;
    FILE *file;
    Fixture f;

    close(mkstemp(path));
    args = g_strdup_printf("-object filter-dump,id=cap,netdev=n0,queue=all,"
                           "file=%s", path);
    fixture_start(&f, args);
    guest_start(&f);
    g_assert_true(vhost_started(&f));
    expect_source(&f, "cap", "packet-socket");
    file = open_pcap(path);
    guest_post(&f, 20);
    for (int i = 0; i < 20; i += 2) {
        host_send(&f, i, 1);
        expect_guest(&f, i, 1);
        guest_send(&f, i + 1, 1);
        for (int j = i; j < i + 2; j++) {
            read_pcap(file, &packet, frame, sizeof(frame));
            g_assert_cmpuint(packet.caplen, ==, FRAME_LEN);
            g_assert_cmpuint(packet.len, ==, FRAME_LEN);
            g_assert_cmpuint(frame_number(frame), ==, j);
            g_assert_cmphex(frame[FRAME_LEN - 1], ==, 0x5a);
        }
    }
    set_status(&f, "cap", "off");
    host_send(&f, 20, 1);
    set_status(&f, "cap", "on");
    host_send(&f, 21, 1);
    read_pcap(file, &packet, frame, sizeof(frame));
    g_assert_cmpuint(frame_number(frame), ==, 21);
    g_assert_cmpuint(counter(&f, "cap", "capture-packets"), ==, 21);
    del_object(&f, "cap");
    g_assert_cmpint(packet_sockets(f.ifname, ETH_P_ALL, 1), ==, 0);
    fclose(file);
    unlink(path);
    fixture_close(&f);
}

/* What is longer than maxlen is cut off, and its length is told. */
static void test_capture_dump_maxlen(void)
{
    char path[] = "/tmp/filter-dump-XXXXXX";
    uint8_t frame[BUFFER_LEN];
    g_autofree char *args = NULL;
    PcapPacket packet;
    FILE *file;
    Fixture f;

    close(mkstemp(path));
    args = g_strdup_printf("-object filter-dump,id=cap,netdev=n0,queue=tx,"
                           "maxlen=20,file=%s", path);
    fixture_start(&f, args);
    file = open_pcap(path);
    for (int i = 0; i < 2; i++) {
        host_send(&f, i, 1);
        read_pcap(file, &packet, frame, sizeof(frame));
        g_assert_cmpuint(packet.caplen, ==, 20);
        g_assert_cmpuint(packet.len, ==, FRAME_LEN);
        g_assert_cmpuint(frame_number(frame), ==, i);
    }
    fclose(file);
    unlink(path);
    fixture_close(&f);
}

/* When the disk is full the file ends, and what does not come is counted. */
static void test_capture_dump_full(void)
{
    char dir[] = "/tmp/filter-dump-XXXXXX";
    g_autofree char *mount = NULL, *umount = NULL, *args = NULL;
    Fixture f;

    g_assert_nonnull(mkdtemp(dir));
    mount = g_strdup_printf("mount -t tmpfs -o size=4k none %s", dir);
    umount = g_strdup_printf("umount %s", dir);
    g_assert_cmpint(system(mount), ==, 0);
    args = g_strdup_printf("-object filter-dump,id=cap,netdev=n0,queue=tx,"
                           "file=%s/pcap", dir);
    fixture_start(&f, args);
    host_send(&f, 0, 60);
    wait_counter(&f, "cap", "capture-peer-drops", 60 - (4096 - 24) / 80);
    g_assert_cmpuint(counter(&f, "cap", "capture-packets"), ==,
                     (4096 - 24) / 80);
    del_object(&f, "cap");
    fixture_close(&f);
    g_assert_cmpint(system(umount), ==, 0);
    rmdir(dir);
}

/* A mirror takes nothing from the guest, whenever it works. */
static void test_stop_mirror(Fixture *f)
{
    guest_post(f, 30);
    host_send(f, 0, 10);
    expect_guest(f, 0, 10);
    expect_source(f, "cap", "none");
    vm_stop(f);
    expect_source(f, "cap", "packet-socket");
    host_send(f, 10, 10);
    expect_out(f, 10, 10);
    vm_cont(f);
    expect_source(f, "cap", "none");
    expect_guest(f, 10, 10);
    host_send(f, 20, 10);
    expect_guest(f, 20, 10);
    g_assert_cmpuint(counter(f, "cap", "capture-packets"), ==, 10);
}

/* Two filters are looked at together, whoever's packets call for it. */
static void test_capture_two(Fixture *f)
{
    uint32_t n = 0;

    guest_post(f, 10);
    for (int round = 0; round < 10; round++) {
        host_send(f, n, 300);
        expect_out(f, n, 300);
        expect_stream(f->in, n, 300);
        n += 300;
        guest_send(f, n, 1);
        expect_stream(f->in, n, 1);
        n++;
    }
    del_object(f, "cap");
    host_send(f, n, 300);
    expect_stream(f->in, n, 300);
}

/* The header is the guest's in size, and without one the frame is bare. */
static void test_capture_header(Fixture *f)
{
    uint8_t frame[BUFFER_LEN], header[24];
    uint32_t header_len;

    guest_start_queues(f, 1ull << VIRTIO_F_VERSION_1);
    qvirtio_set_driver_ok(&f->dev->vdev);
    host_send(f, 7, 1);
    g_assert_cmpuint(read_stream(f->out, frame, sizeof(frame), header,
                                 &header_len), ==, FRAME_LEN);
    g_assert_cmpuint(header_len, ==, 12);
    g_assert_cmpuint(frame_number(frame), ==, 7);
    for (uint32_t i = 0; i < header_len; i++) {
        g_assert_cmphex(header[i], ==, 0);
    }
}

/* Without vnet_hdr_support the stream does not tell the header's length. */
static void test_capture_stream_format(Fixture *f)
{
    uint8_t got[4 + 12 + FRAME_LEN], want[4 + 12 + FRAME_LEN] = { };

    host_send(f, 9, 1);
    stl_be_p(want, 12 + FRAME_LEN);
    make_frame(want + 4 + 12, 9);
    read_full(f->out, got, sizeof(got));
    g_assert_cmpmem(got, sizeof(got), want, sizeof(want));
}

/* Status and run state */

static void test_status(Fixture *f)
{
    guest_post(f, 40);
    expect_source(f, "cap", "packet-socket");
    host_send(f, 0, 10);
    expect_out(f, 0, 10);
    set_status(f, "cap", "off");
    expect_source(f, "cap", "none");
    host_send(f, 100, 10);
    set_status(f, "cap", "on");
    host_send(f, 10, 10);
    /* nothing stale */
    expect_out(f, 10, 10);
    expect_guest(f, 0, 10);
    expect_guest(f, 100, 10);
    expect_guest(f, 10, 10);
}

static void test_status_off_at_start(Fixture *f)
{
    host_send(f, 0, 10);
    set_status(f, "cap", "on");
    host_send(f, 10, 1);
    expect_out(f, 10, 1);
}

/* While nobody listens the socket is unhooked, and nothing stale comes. */
static void test_not_connected(Fixture *f)
{
    guest_post(f, 40);
    host_send(f, 0, 10);
    expect_out(f, 0, 10);
    close(f->out);
    expect_source(f, "cap", "none");
    host_send(f, 100, 10);
    f->out = connect_to(f, "out");
    expect_source(f, "cap", "packet-socket");
    host_send(f, 10, 10);
    expect_out(f, 10, 10);
}

static void test_stop_running_only(Fixture *f)
{
    guest_post(f, 30);
    host_send(f, 0, 10);
    /* What came while the VM was running is sent, even if read late. */
    vm_stop(f);
    expect_source(f, "cap", "none");
    expect_out(f, 0, 10);
    host_send(f, 100, 10);
    vm_cont(f);
    expect_source(f, "cap", "packet-socket");
    host_send(f, 10, 10);
    expect_out(f, 10, 10);
}

static void test_stop_both(Fixture *f)
{
    guest_post(f, 30);
    host_send(f, 0, 10);
    vm_stop(f);
    expect_source(f, "cap", "packet-socket");
    host_send(f, 10, 10);
    expect_out(f, 0, 20);
    vm_cont(f);
    host_send(f, 20, 10);
    expect_out(f, 20, 10);
    g_assert_cmpuint(counter(f, "cap", "capture-packets"), ==, 30);
}

/* What the guest did not take, once: from the TAP, which vhost gave back. */
static void test_stopped_only(Fixture *f)
{
    g_assert_true(vhost_started(f));
    expect_source(f, "cap", "none");
    guest_post(f, 4);
    host_send(f, 0, 20);
    expect_guest(f, 0, 4);
    vm_stop(f);
    expect_source(f, "cap", "chain");
    expect_out(f, 4, 16);
    host_send(f, 20, 100);
    expect_out(f, 20, 100);
    vm_cont(f);
    expect_source(f, "cap", "none");
    g_assert_true(vhost_started(f));

    /* The guest goes on with what comes now. */
    guest_post(f, 10);
    host_send(f, 200, 10);
    expect_guest(f, 200, 10);
    g_assert_cmpuint(counter(f, "cap", "capture-packets"), ==, 116);
}

/*
 * What the guest sent itself, and a bridge brings back, is not taken: the
 * address is the one that the driver has set.
 */
static void test_stopped_only_echo(void)
{
    static const uint8_t addresses[][ETH_ALEN] = {
        { 0x52, 0x54, 0x00, 0x12, 0x34, 0x56 },         /* the command line's */
        { 0x02, 0x00, 0x00, 0x00, 0xab, 0xcd },
    };
    uint8_t frame[FRAME_LEN];

    for (int i = 0; i < ARRAY_SIZE(addresses); i++) {
        Fixture f;

        fixture_start(&f, CAPTURE STOPPED_ONLY);
        if (i) {
            guest_start_address(&f, addresses[i]);
        } else {
            guest_start(&f);
        }
        g_assert_true(vhost_started(&f));
        for (int round = 0; round < 3; round++) {
            uint32_t n = 100 * round;

            vm_stop(&f);
            for (int j = 0; j < 10; j++) {
                make_frame(frame, 1000 + j);
                memcpy(frame + ETH_ALEN, addresses[i], ETH_ALEN);
                g_assert_cmpint(send(f.host, frame, FRAME_LEN, 0), ==,
                                FRAME_LEN);
                host_send(&f, n + j, 1);
            }
            /* The other address is nobody's. */
            make_frame(frame, n + 10);
            memcpy(frame + ETH_ALEN, addresses[!i], ETH_ALEN);
            g_assert_cmpint(send(f.host, frame, FRAME_LEN, 0), ==, FRAME_LEN);
            expect_out(&f, n, 11);
            vm_cont(&f);
        }
        g_assert_cmpuint(counter(&f, "cap", "capture-packets"), ==, 33);
        g_assert_cmpuint(counter(&f, "cap", "capture-skipped"), ==, 30);
        fixture_close(&f);
    }
}

/* QEMU's announcement of the guest is not taken; it waits for the VM to run. */
static void test_stopped_only_announce(Fixture *f)
{
    const uint16_t rarp = 0x8035;
    uint8_t frame[BUFFER_LEN];
    int network;

    network = open_host_protocol(f->ifname, rarp);
    vm_stop(f);
    expect_source(f, "cap", "chain");
    qtest_qmp_assert_success(f->qts, "{'execute': 'announce-self',"
        " 'arguments': {'initial': 50, 'max': 50, 'rounds': 1, 'step': 0}}");
    host_send(f, 0, 10);
    expect_out(f, 0, 10);
    g_assert_cmpuint(counter(f, "cap", "capture-packets"), ==, 10);
    vm_cont(f);
    wait_readable(network);
    g_assert_cmpint(recv(network, frame, sizeof(frame), 0), >=, 42);
    g_assert_cmphex(lduw_be_p(frame + 12), ==, rarp);
    close(network);
}

/* The same if QEMU reads the TAP: one waits in the queue of the NIC. */
static void test_stopped_only_no_vhost(Fixture *f)
{
    g_assert_false(vhost_started(f));
    host_send(f, 0, 20);
    vm_stop(f);
    expect_out(f, 0, 20);
    host_send(f, 20, 20);
    expect_out(f, 20, 20);
    vm_cont(f);
    g_assert_cmpuint(counter(f, "cap", "capture-packets"), ==, 40);
}

/* UDP packets of many flows, so that they spread over the queues. */
static void host_send_flows(Fixture *f, uint16_t count)
{
    static const uint8_t head[14 + 20] = {
        0x52, 0x54, 0x00, 0x12, 0x34, 0x56, 0x02, 0, 0, 0, 0, 1, 0x08, 0x00,
        0x45, 0, 0, FRAME_LEN - 14, 0, 0, 0, 0, 64, 17, 0, 0,
        192, 0, 2, 1, 192, 0, 2, 2,
    };
    uint8_t frame[FRAME_LEN] = { };

    memcpy(frame, head, sizeof(head));
    stw_be_p(frame + sizeof(head) + 2, 9);
    stw_be_p(frame + sizeof(head) + 4, FRAME_LEN - sizeof(head));
    for (uint16_t i = 0; i < count; i++) {
        stw_be_p(frame + sizeof(head), 1000 + i);
        g_assert_cmpint(send(f->host, frame, FRAME_LEN, 0), ==, FRAME_LEN);
    }
}

/* What waits in the TAP's second queue is saved as well. */
static void test_stopped_only_multiqueue(void)
{
    const uint16_t count = 200;
    uint8_t frame[BUFFER_LEN], header[24];
    g_autofree int *seen = g_new0(int, count);
    QVirtQueue *queues[5];
    uint32_t header_len;
    Fixture f;

    fixture_init(&f, "vhost=on,queues=2", ",mq=on,vectors=6",
                 CAPTURE STOPPED_ONLY);
    guest_start_multiqueue(&f, queues);
    g_assert_true(vhost_started(&f));
    host_send_flows(&f, count / 2);
    vm_stop(&f);
    wait_counter(&f, "cap", "capture-packets", count / 2);
    for (int i = 0; i < count / 2; i++) {
        g_assert_cmpuint(read_stream(f.out, frame, sizeof(frame), header,
                                     &header_len), ==, FRAME_LEN);
        seen[lduw_be_p(frame + 34) - 1000]++;
    }
    host_send_flows(&f, count);
    for (int i = 0; i < count; i++) {
        g_assert_cmpuint(read_stream(f.out, frame, sizeof(frame), header,
                                     &header_len), ==, FRAME_LEN);
        seen[lduw_be_p(frame + 34) - 1000]++;
    }
    for (int i = 0; i < count; i++) {
        g_assert_cmpint(seen[i], ==, i < count / 2 ? 2 : 1);
    }
    vm_cont(&f);
    qvirtio_reset(&f.dev->vdev);
    for (int i = 0; i < 5; i++) {
        qvirtqueue_cleanup(f.dev->vdev.bus, queues[i], &f.alloc);
    }
    fixture_close(&f);
}

/* Nobody listens: the packets stay where they are, for the guest. */
static void test_stopped_only_not_connected(Fixture *f)
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

/* The peer comes later: what waited in the NIC's queue is first. */
static void test_stopped_only_late_peer(Fixture *f)
{
    close(f->out);
    host_send(f, 0, 5);
    vm_stop(f);
    expect_source(f, "cap", "chain");
    for (int i = 0; i < 5; i++) {
        g_assert_cmpuint(counter(f, "cap", "capture-packets"), <=, 1);
    }
    f->out = connect_to(f, "out");
    expect_out(f, 0, 5);
}

/* A pty throws away what nobody reads, so it gets nothing before. */
static void test_stopped_only_pty(Fixture *f)
{
    const char *path = NULL;
    QListEntry *entry;
    QDict *rsp;

    host_send_taken(f, 0, 5);
    vm_stop(f);
    rsp = qtest_qmp(f->qts, "{'execute': 'query-chardev'}");
    QLIST_FOREACH_ENTRY(qdict_get_qlist(rsp, "return"), entry) {
        QDict *chr = qobject_to(QDict, qlist_entry_obj(entry));

        if (g_str_equal(qdict_get_str(chr, "label"), "pty")) {
            path = strstr(qdict_get_str(chr, "filename"), "/dev/");
        }
    }
    g_assert_nonnull(path);
    close(f->out);
    f->out = open(path, O_RDWR | O_NOCTTY);
    g_assert_cmpint(f->out, >=, 0);
    qobject_unref(rsp);
    expect_out(f, 0, 5);
}

/*
 * What was handed over is gone for the guest, what was not is the guest's; and
 * all of it is while the filter was off.
 */
static void test_migration_cancelled(Fixture *f)
{
    guest_post(f, 100);
    host_send(f, 0, 10);
    expect_guest(f, 0, 10);
    for (int i = 0; i < 3; i++) {
        uint32_t n = 10 + 40 * i;

        set_status(f, "cap", "on");
        migration_start(f);
        expect_source(f, "cap", "chain");
        host_send(f, n, 10);
        expect_out(f, n, 10);
        migration_cancel(f);
        expect_source(f, "cap", "none");
        g_assert_true(vhost_started(f));
        host_send(f, n + 10, 10);
        expect_guest(f, n + 10, 10);

        set_status(f, "cap", "off");
        migration_start(f);
        host_send(f, n + 20, 10);
        migration_cancel(f);
        host_send(f, n + 30, 10);
        expect_guest(f, n + 20, 20);
    }
    g_assert_cmpuint(counter(f, "cap", "capture-packets"), ==, 30);
}

static void *migration_drain(void *opaque)
{
    int fd = GPOINTER_TO_INT(opaque);
    g_autofree uint8_t *buf = g_malloc(64 * KiB);

    while (read(fd, buf, 64 * KiB) > 0) {
        /* until test_migration_failed() shuts it down */
    }
    return NULL;
}

/*
 * The same for a migration that fails: the target goes away when the VM has
 * stopped, or there never is one.
 */
static void test_migration_failed(Fixture *f)
{
    guest_post(f, 200);
    qtest_qmp_assert_success(f->qts,
        "{'execute': 'migrate-set-capabilities', 'arguments':"
        " {'capabilities': [{'capability': 'pause-before-switchover',"
        "                    'state': true}]}}");
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
        host_send(f, n, 10);
        expect_guest(f, n, 10);
        qtest_qmp_assert_success(f->qts, "{'execute': 'migrate', 'arguments':"
                                 " {'uri': 'fd:target'}}");
        expect_status(f, "query-migrate", "pre-switchover");
        expect_source(f, "cap", on ? "chain" : "none");
        host_send(f, n + 10, handed_over);
        expect_out(f, n + 10, handed_over);
        /* Nobody takes what comes now. */
        close(f->out);
        expect_connected(f, "out", false);
        host_send(f, n + 20, 10);

        shutdown(fd[0], SHUT_RDWR);
        g_thread_join(drain);
        close(fd[0]);
        qtest_qmp_assert_success(f->qts, "{'execute': 'migrate-continue',"
                                 " 'arguments': {'state': 'pre-switchover'}}");
        expect_status(f, "query-migrate", "failed");
        /* QEMU goes on by itself; it is no harm to tell it so. */
        expect_status(f, "query-status", "running");
        vm_cont(f);
        expect_source(f, "cap", "none");
        g_assert_true(vhost_started(f));
        host_send(f, n + 30, 10);
        expect_guest(f, n + 20, 20);

        f->out = connect_to(f, "out");
        qtest_qmp_assert_success(f->qts, "{'execute': 'migrate', 'arguments':"
                                 " {'uri': 'exec:false'}}");
        host_send(f, n + 40, 5);
        expect_status(f, "query-migrate", "failed");
        expect_status(f, "query-status", "running");
        host_send(f, n + 45, 5);
        expect_guest(f, n + 40, 10);
    }
    g_assert_cmpuint(counter(f, "cap", "capture-packets"), ==, 20);
}

/* A peer that does not read: packets wait, and go one way or the other. */
static void test_stopped_only_slow_peer(Fixture *f)
{
    const uint32_t burst = 800, rounds = 120;
    uint32_t sent = 0, taken;

    vm_stop(f);
    /* More than the socket and the stage hold, less than the TAP drops. */
    for (uint32_t i = 0; i < rounds; i++) {
        gint64 end = g_get_monotonic_time() + G_USEC_PER_SEC;

        host_send(f, sent, burst);
        sent += burst;
        while ((taken = counter(f, "cap", "capture-packets")) < sent &&
               g_get_monotonic_time() < end) {
            /* until it takes no more */
        }
        if (taken < sent) {
            break;
        }
    }
    g_assert_cmpuint(taken, <, sent);
    host_send(f, sent, 100);
    vm_cont(f);
    guest_post(f, 50);
    expect_guest(f, taken, 50);
    expect_out(f, 0, taken);
    g_assert_cmpuint(counter(f, "cap", "capture-packets"), ==, taken);
}

/* Inject */

static void test_inject_tx(Fixture *f)
{
    g_assert_true(vhost_started(f));
    guest_post(f, 50);
    in_send(f, 0, 50);
    expect_guest(f, 0, 50);
    g_assert_cmpuint(counter(f, "inj", "inject-packets"), ==, 50);
    g_assert_cmpuint(counter(f, "inj", "inject-bytes"), ==, 50 * FRAME_LEN);
}

static void test_inject_rx(Fixture *f)
{
    g_assert_true(vhost_started(f));
    in_send(f, 0, 50);
    expect_host(f, 0, 50);
}

static void test_inject_all(Fixture *f)
{
    guest_post(f, 20);
    in_send(f, 0, 20);
    expect_guest(f, 0, 20);
    expect_host(f, 0, 20);
}

/* More than the TAP and the guest hold: they wait, and none is lost. */
static void test_inject_full(Fixture *f)
{
    const uint32_t count = 200;
    g_autofree char *cmd = NULL;

    cmd = g_strdup_printf("ip link set %s txqueuelen 20", f->ifname);
    g_assert_cmpint(system(cmd), ==, 0);
    guest_start(f);
    in_send(f, 0, count);
    guest_post(f, count);
    expect_guest(f, 0, count);
    g_assert_cmpuint(counter(f, "inj", "inject-packets"), ==, count);
}

static void test_inject_hold(Fixture *f)
{
    guest_post(f, 20);
    vm_stop(f);
    wait_inject_pending(f, "inj", false);
    in_send(f, 0, 10);
    wait_inject_pending(f, "inj", true);
    g_assert_cmpuint(counter(f, "inj", "inject-packets"), ==, 0);
    vm_cont(f);
    expect_guest(f, 0, 10);
    wait_inject_pending(f, "inj", false);
    in_send(f, 10, 10);
    expect_guest(f, 10, 10);
}

/* The source of a migration leaves before the target resumes. */
static void test_inject_hold_peer_gone(Fixture *f)
{
    guest_post(f, 40);
    vm_stop(f);
    in_send(f, 0, 30);
    close(f->in);
    f->in = connect_to(f, "in");
    in_send(f, 30, 10);
    vm_cont(f);
    expect_guest(f, 0, 40);
}

static void test_inject_when_stopped(Fixture *f)
{
    guest_post(f, 20);
    vm_stop(f);
    in_send(f, 0, 10);
    wait_counter(f, "inj", "inject-packets", 10);
    vm_cont(f);
    guest_post(f, 20);
}

static void test_inject_status(Fixture *f)
{
    guest_post(f, 20);
    in_send(f, 10, 10);
    host_send(f, 0, 10);
    expect_guest(f, 0, 10);
    set_status(f, "inj", "on");
    expect_guest(f, 10, 10);
}

static void test_inject_receives_nothing(Fixture *f)
{
    guest_post(f, 20);
    host_send(f, 0, 20);
    expect_guest(f, 0, 20);
    g_assert_cmpint(packet_sockets(f->ifname, 0, 0), ==, 1);
    g_assert_cmpint(packet_sockets(f->ifname, ETH_P_ALL, 1), ==, 0);
}

static void wait_hooked(Fixture *f, int count)
{
    gint64 end = g_get_monotonic_time() + TIMEOUT_US;

    while (packet_sockets(f->ifname, ETH_P_ALL, 1) != count) {
        g_assert_cmpint(g_get_monotonic_time(), <, end);
        qtest_qmp_assert_success(f->qts, "{'execute': 'query-status'}");
    }
}

/* No cost while it is off: soon it is not on the interface's list. */
static void test_unhooked(Fixture *f)
{
    expect_source(f, "cap", "packet-socket");
    g_assert_cmpint(packet_sockets(f->ifname, ETH_P_ALL, 1), ==, 1);
    set_status(f, "cap", "off");
    wait_hooked(f, 0);
    set_status(f, "cap", "on");
    g_assert_cmpint(packet_sockets(f->ifname, ETH_P_ALL, 1), ==, 1);
    vm_stop(f);
    wait_hooked(f, 0);
}

/*
 * Until then it stays there, for one that comes and goes.  Nothing of what
 * comes meanwhile is captured later, or counted.
 */
static void test_lingers(Fixture *f)
{
    for (int i = 0; i < 20; i++) {
        host_send(f, 2 * i, 1);
        expect_out(f, 2 * i, 1);
        if (i % 2) {
            set_status(f, "cap", "off");
        } else {
            close(f->out);
            expect_source(f, "cap", "none");
        }
        g_assert_cmpint(packet_sockets(f->ifname, ETH_P_ALL, 1), <=, 1);
        host_send(f, 1000, 5000);
        g_assert_cmpuint(counter(f, "cap", "capture-kernel-drops"), ==, 0);
        host_send(f, 1000, 5000);
        if (i % 2) {
            set_status(f, "cap", "on");
        } else {
            f->out = connect_to(f, "out");
        }
        expect_source(f, "cap", "packet-socket");
        g_assert_cmpint(packet_sockets(f->ifname, ETH_P_ALL, 1), ==, 1);
        host_send(f, 2 * i + 1, 1);
        expect_out(f, 2 * i + 1, 1);
    }
    g_assert_cmpuint(counter(f, "cap", "capture-kernel-drops"), ==, 0);
    g_assert_cmpuint(counter(f, "cap", "capture-peer-drops"), ==, 0);
    g_assert_cmpuint(counter(f, "cap", "capture-packets"), ==, 40);
}

static void expect_error_args(Fixture *f, const char *args, const char *text)
{
    g_autofree char *cmd = g_strdup_printf(
        "{'execute': 'object-add', 'arguments': {"
        "'qom-type': 'filter-redirector', 'id': 'bad', %s}}", args);
    int before = count_fds(f);
    QDict *rsp = qtest_qmp_assert_failure_ref(f->qts, "%p",
                                              qobject_from_json(cmd, NULL));

    g_test_message("%s", qdict_get_str(rsp, "desc"));
    g_assert_nonnull(strstr(qdict_get_str(rsp, "desc"), text));
    qobject_unref(rsp);
    g_assert_cmpint(count_fds(f), ==, before);
}

/* What an object injects it does not capture; nor does another. */
static void test_no_loop(Fixture *f)
{
    guest_post(f, 20);
    in_send(f, 100, 10);
    expect_guest(f, 100, 10);
    host_send(f, 0, 1);
    expect_out(f, 0, 1);
    expect_guest(f, 0, 1);
    g_assert_cmpuint(counter(f, "both", "capture-packets"), ==, 1);
    g_assert_cmpuint(counter(f, "both", "inject-packets"), ==, 10);
}

/*
 * To the interface, what is injected toward the network is as from the guest.
 * So that no peer can make a loop of it, one object cannot do both.
 */
static void test_injected_rx_captured(Fixture *f)
{
    for (int i = 0; i < 5; i++) {
        in_send(f, 11 * i, 10);
        expect_host(f, 11 * i, 10);
        guest_send(f, 11 * i + 10, 1);
        expect_host(f, 11 * i + 10, 1);
        expect_out(f, 11 * i, 11);
    }
    g_assert_cmpuint(counter(f, "cap", "capture-packets"), ==, 55);
    g_assert_cmpuint(counter(f, "inj", "inject-packets"), ==, 50);
    del_object(f, "cap");
    del_object(f, "inj");
    expect_error_args(f, "'netdev': 'n0', 'indev': 'in', 'outdev': 'out'",
                      "only 'queue=tx' is possible");
    expect_error_args(f, "'netdev': 'n0', 'indev': 'in', 'outdev': 'out',"
                      " 'queue': 'tx', 'enable_when_running': false,"
                      " 'enable_when_stopped': true",
                      "would be taken again");
    expect_error_args(f, "'netdev': 'n0', 'indev': 'in',"
                      " 'enable_when_running': false,"
                      " 'enable_when_stopped': true",
                      "needs 'queue=tx'");
}

/* One VM's redirector to another's: what is captured is injected as it was. */
static void test_relay(Fixture *f)
{
    uint8_t record[8 + 12 + FRAME_LEN];

    guest_post(f, 30);
    for (int i = 0; i < 30; i++) {
        guest_send(f, i, 1);
        read_full(f->out, record, sizeof(record));
        g_assert_cmpint(write(f->in, record, sizeof(record)), ==,
                        sizeof(record));
        expect_guest(f, i, 1);
    }
}

/* Bad frames are skipped and counted, and the good ones arrive. */
static void test_inject_bad_frames(Fixture *f)
{
    uint8_t bad[8 + 4096] = { };

    guest_post(f, 20);
    in_send(f, 0, 1);
    stl_be_p(bad, 0);                           /* empty */
    g_assert_cmpint(write(f->in, bad, 8), ==, 8);
    in_send(f, 1, 1);
    stl_be_p(bad, 12 + 13);                     /* no Ethernet header */
    stl_be_p(bad + 4, 12);
    g_assert_cmpint(write(f->in, bad, 8 + 25), ==, 8 + 25);
    in_send(f, 2, 1);
    stl_be_p(bad, 12 + 4000);                   /* over the MTU */
    g_assert_cmpint(write(f->in, bad, 8 + 4012), ==, 8 + 4012);
    in_send(f, 3, 1);
    stl_be_p(bad, 100);                         /* header over the end */
    stl_be_p(bad + 4, 0xffffff00);
    g_assert_cmpint(write(f->in, bad, 108), ==, 108);
    in_send(f, 4, 1);
    expect_guest(f, 0, 5);
    g_assert_cmpuint(counter(f, "inj", "inject-skipped"), ==, 4);
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

/* A packet of IPv4 behind a header, without vnet_hdr_support */
static void in_send_plain(Fixture *f, size_t hdr_len)
{
    uint8_t record[4 + 24 + FRAME_LEN] = { };

    stl_be_p(record, hdr_len + FRAME_LEN);
    make_frame(record + 4 + hdr_len, 0);
    stw_be_p(record + 4 + hdr_len + 12, 0x0800);
    g_assert_cmpint(write(f->in, record, 4 + hdr_len + FRAME_LEN), ==,
                    4 + hdr_len + FRAME_LEN);
}

/* The ends do not agree on the header: no frame comes shifted. */
static void test_inject_shifted(Fixture *f)
{
    uint8_t frame[BUFFER_LEN], want[FRAME_LEN];

    /* Until the driver starts it is 10 bytes. */
    in_send_plain(f, 12);
    wait_counter(f, "inj", "inject-skipped", 1);
    guest_start(f);
    guest_post(f, 4);
    in_send_plain(f, 10);
    in_send_plain(f, 12);
    g_assert_cmpuint(guest_read_frame(f, frame, sizeof(frame)), ==,
                     FRAME_LEN);
    make_frame(want, 0);
    g_assert_cmpmem(frame, 12, want, 12);
    g_assert_cmpuint(counter(f, "inj", "inject-skipped"), ==, 2);
    g_assert_cmpuint(counter(f, "inj", "inject-packets"), ==, 1);
}

/* A GSO frame that the kernel cannot segment holds nothing up for ever. */
static void test_inject_bad_gso(Fixture *f)
{
    uint8_t record[8 + 12 + 2000] = { };
    struct virtio_net_hdr *hdr = (void *)(record + 8);

    guest_post(f, 20);
    in_send(f, 0, 1);
    stl_be_p(record, 12 + 2000);
    stl_be_p(record + 4, 12);
    make_frame(record + 8 + 12, 0xbad);
    hdr->flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
    hdr->gso_type = VIRTIO_NET_HDR_GSO_TCPV4;
    hdr->gso_size = 1000;
    hdr->hdr_len = 54;
    hdr->csum_start = 34;
    hdr->csum_offset = 16;
    g_assert_cmpint(write(f->in, record, sizeof(record)), ==, sizeof(record));
    in_send(f, 1, 10);
    expect_guest(f, 0, 11);
}

/* Life cycle */

static void test_hotplug(Fixture *f)
{
    guest_post(f, 40);
    add_capture(f);
    host_send(f, 0, 10);
    expect_out(f, 0, 10);
    add_inject(f);
    in_send(f, 10, 10);
    expect_guest(f, 0, 20);
    del_object(f, "cap");
    host_send(f, 20, 10);
    add_capture(f);
    host_send(f, 30, 10);
    expect_out(f, 30, 10);
    del_object(f, "inj");
    del_object(f, "cap");
    g_assert_cmpint(packet_sockets(f->ifname, ETH_P_ALL, 1), ==, 0);
    expect_guest(f, 20, 20);
    g_assert_true(vhost_started(f));
}

/* The TAP is not read while the VM is stopped: the guest gets it all. */
static void test_stop_nothing_lost(Fixture *f)
{
    guest_post(f, 30);
    for (int i = 0; i < 3; i++) {
        vm_stop(f);
        host_send(f, 10 * i, 10);
        /* Each answer is a turn of the main loop, in which it could read. */
        counter(f, "cap", "capture-packets");
        counter(f, "cap", "capture-packets");
        vm_cont(f);
        expect_guest(f, 10 * i, 10);
    }
}

/*
 * At the stop a packet waits in the NIC's queue, since there is no driver,
 * and net.c drops it; the others stay in the TAP for the driver.
 */
static void test_stop_nothing_read(Fixture *f)
{
    host_send(f, 0, 5);
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

/* Two that save packets: each packet goes to one of them, in bounds. */
static void test_stopped_only_two(Fixture *f)
{
    const uint32_t burst = 900;
    uint32_t sent = 0, first, second;

    qtest_qmp_assert_success(f->qts, "{'execute': 'object-add', 'arguments':"
        " {'qom-type': 'filter-redirector', 'id': 'cap2', 'netdev': 'n0',"
        "  'outdev': 'in', 'queue': 'tx', 'vnet_hdr_support': true,"
        "  'enable_when_running': false, 'enable_when_stopped': true,"
        "  'buffer-size': 1048576}}");
    guest_start(f);
    vm_stop(f);
    /* Nobody reads.  One peer comes back all the time. */
    for (int i = 0; i < 60; i++) {
        host_send(f, sent, burst);
        sent += burst;
        first = counter(f, "cap", "capture-packets");
        second = counter(f, "cap2", "capture-packets");
    }
    for (int i = 0; i < 5; i++) {
        close(f->in);
        expect_source(f, "cap2", "chain");
        f->in = connect_to(f, "in");
    }
    first = counter(f, "cap", "capture-packets");
    for (int i = 0; i < 5; i++) {
        host_send(f, sent, burst);
        sent += burst;
        counter(f, "cap", "capture-packets");
    }
    second = counter(f, "cap2", "capture-packets");
    g_test_message("%u sent, %u and %u taken", sent, first, second);
    /* 4/5 of that each, and little more for each time that it was full */
    g_assert_cmpuint(first, <, 18000);
    g_assert_cmpuint(second, <, 18000 + 6 * 3000);
    expect_out(f, 0, 10000);
}

/* While the VM is stopped what goes to the network waits, and is not lost. */
static void test_inject_rx_waits(Fixture *f)
{
    vm_stop(f);
    in_send(f, 0, 200);
    g_assert_cmpuint(counter(f, "inj", "inject-packets"), ==, 0);
    vm_cont(f);
    expect_host(f, 0, 200);
}

/* The next user of a connection begins with a frame, or gets another one. */
static void test_framing_after_del(Fixture *f)
{
    g_autofree uint8_t *buf = g_malloc(1 * MiB);
    gint64 end = g_get_monotonic_time() + TIMEOUT_US;
    int queued;

    add_capture(f);
    /*
     * Fill the connection, and then make room: the socket takes what it can
     * of all that is staged then, and cuts off a frame.
     */
    for (int i = 0; i < 8; i++) {
        host_send(f, 0, 900);
        counter(f, "cap", "capture-packets");
    }
    g_assert_cmpint(ioctl(f->out, FIONREAD, &queued), ==, 0);
    g_assert_cmpint(queued, <=, 1 * MiB);
    read_full(f->out, buf, queued);
    do {
        counter(f, "cap", "capture-packets");
        g_assert_cmpint(ioctl(f->out, FIONREAD, &queued), ==, 0);
        g_assert_cmpint(g_get_monotonic_time(), <, end);
    } while (queued < 128 * KiB);
    del_object(f, "cap");
    do {
        wait_readable(f->out);
    } while (read(f->out, buf, 128 * KiB) > 0);
    close(f->out);
    f->out = connect_to(f, "out");
    add_capture(f);
    expect_source(f, "cap", "packet-socket");
    host_send(f, 5000, 5);
    expect_out(f, 5000, 5);
}

static void test_netdev_del(Fixture *f)
{
    QDict *rsp;

    qtest_qmp_assert_success(f->qts, "{'execute': 'netdev_del', 'arguments':"
                             " {'id': 'n0'}}");
    rsp = qtest_qmp(f->qts, "{'execute': 'qom-list', 'arguments':"
                    " {'path': '/objects/cap'}}");
    g_assert_true(qdict_haskey(rsp, "error"));
    qobject_unref(rsp);
    g_assert_cmpint(packet_sockets(f->ifname, ETH_P_ALL, 1), ==, 0);
}

static void test_device_del(Fixture *f)
{
    qtest_qmp_device_del_send(f->qts, "nic");
    qtest_system_reset_nowait(f->qts);
    qtest_qmp_eventwait(f->qts, "DEVICE_DELETED");
    host_send(f, 0, 10);
    expect_out(f, 0, 10);
    f->guest.rx = NULL;
    del_object(f, "cap");
    qtest_qmp_assert_success(f->qts, "{'execute': 'netdev_del', 'arguments':"
                             " {'id': 'n0'}}");
}

static void test_no_leak(Fixture *f)
{
    int before;

    add_capture(f);
    add_inject(f);
    del_object(f, "cap");
    del_object(f, "inj");
    before = count_fds(f);
    for (int i = 0; i < 1000; i++) {
        add_capture(f);
        add_inject(f);
        del_object(f, "cap");
        del_object(f, "inj");
    }
    g_assert_cmpint(count_fds(f), ==, before);
    guest_post(f, 10);
    host_send(f, 0, 10);
    expect_guest(f, 0, 10);
}

/* While a socket is being set up, other interfaces' frames stay out. */
typedef struct Flood {
    int fd;
    bool stop;
} Flood;

static void *flood_thread(void *opaque)
{
    Flood *flood = opaque;
    uint8_t frame[FRAME_LEN];

    make_frame(frame, 0xdead);
    while (!qatomic_read(&flood->stop)) {
        send(flood->fd, frame, sizeof(frame), 0);
    }
    return NULL;
}

static void test_no_foreign_frames(Fixture *f)
{
    Flood flood = { };
    GThread *thread;
    int tap;

    tap = open_tap("tapflood");
    set_interface_up("tapflood", true);
    flood.fd = open_host("tapflood");
    thread = g_thread_new("flood", flood_thread, &flood);
    for (int i = 0; i < 100; i++) {
        add_capture(f);
        host_send(f, i, 1);
        expect_out(f, i, 1);
        del_object(f, "cap");
    }
    qatomic_set(&flood.stop, true);
    g_thread_join(thread);
    close(flood.fd);
    close(tap);
}

/* Peers of outdev */

static void test_slow_peer(Fixture *f)
{
    const uint32_t burst = 1000, bursts = 100;
    uint64_t captured, dropped;

    for (uint32_t i = 0; i < bursts; i++) {
        host_send(f, i * burst, burst);
        /* The main loop is not held. */
        counter(f, "cap", "capture-packets");
    }
    dropped = counter(f, "cap", "capture-kernel-drops");
    g_assert_cmpuint(dropped, >, 0);
    captured = counter(f, "cap", "capture-packets");
    g_assert_cmpuint(captured, >, 10000);
    g_assert_cmpuint(captured, <, bursts * burst);
    expect_out(f, 0, 10000);
}

static void wait_handed_over(Fixture *f)
{
    gint64 end = g_get_monotonic_time() + TIMEOUT_US;

    while (capture_pending(f, "cap")) {
        g_assert_cmpint(g_get_monotonic_time(), <, end);
    }
}

static void capture_off(Fixture *f, bool by_stop)
{
    if (by_stop) {
        vm_stop(f);
    } else {
        set_status(f, "cap", "off");
    }
    expect_source(f, "cap", "none");
}

static void capture_on(Fixture *f, bool by_cont)
{
    if (by_cont) {
        vm_cont(f);
    } else {
        set_status(f, "cap", "on");
    }
    expect_source(f, "cap", "packet-socket");
}

/*
 * The filter goes off, or the VM stops, while the peer is behind.  It gets
 * what came before, and then what comes after the filter is on again.
 */
static void test_slow_peer_off(Fixture *f)
{
    const uint32_t burst = 500;
    uint64_t dropped = 0;
    uint32_t n = 0;

    for (int i = 0; i < 4; i++) {
        uint32_t first = n;

        /* More than the connection takes */
        for (int j = 0; j < 10; j++, n += burst) {
            host_send(f, n, burst);
            counter(f, "cap", "capture-packets");
        }
        capture_off(f, i % 2);
        g_assert_cmpuint(counter(f, "cap", "capture-packets"), ==, n);
        host_send(f, 1000000, 1);
        if (i < 2) {
            expect_out(f, first, n - first);
        }
        capture_on(f, i % 2);
        if (i >= 2) {
            expect_out(f, first, n - first);
        }
        host_send(f, n, 1);
        expect_out(f, n++, 1);
    }
    g_assert_cmpuint(counter(f, "cap", "capture-kernel-drops"), ==, 0);
    g_assert_cmpuint(counter(f, "cap", "capture-peer-drops"), ==, 0);

    /* More than can be staged, and more than the kernel has room for */
    for (int i = 0; i < 4; i++) {
        uint32_t first = n;
        uint64_t before = dropped;

        do {
            host_send(f, n, burst);
            n += burst;
            dropped = counter(f, "cap", "capture-kernel-drops");
        } while (dropped == before);
        capture_off(f, i % 2);
        g_assert_true(capture_pending(f, "cap"));
        dropped = counter(f, "cap", "capture-kernel-drops");
        if (i < 2) {
            uint64_t staged = counter(f, "cap", "capture-packets");
            uint32_t begin = 0;

            do {
                expect_out(f, first + begin, 100);
                begin += 100;
            } while (counter(f, "cap", "capture-packets") == staged);
            /* The kernel has room again, but this is not to be captured. */
            host_send(f, 1000000, 100);
            expect_out(f, first + begin,
                       n - first - begin - (dropped - before));
            wait_handed_over(f);
        }
        capture_on(f, i % 2);
        if (i >= 2) {
            expect_out(f, first, n - first - (dropped - before));
        }
        host_send(f, n, 1);
        expect_out(f, n++, 1);
    }
    g_assert_cmpuint(counter(f, "cap", "capture-kernel-drops"), ==, dropped);
    g_assert_cmpuint(counter(f, "cap", "capture-peer-drops"), ==, 0);
}

/* Who deletes it while the peer is behind is told what that costs. */
/*
 * A peer that accepts all at once gets all, more than is staged at a time.
 * QEMU is stopped, so that the frames wait when the filter is deleted.
 */
static void test_deleted_accepting(void)
{
    const uint32_t n = 1000;
    const size_t len = 9000;
    g_autofree uint8_t *frame = g_malloc0(len);
    g_autofree char *path = NULL, *args = NULL, *text = NULL;
    struct ifreq ifr = { .ifr_mtu = len };
    struct stat st;
    Fixture f;

    path = g_strdup_printf("/tmp/deleted-%d", getpid());
    args = g_strdup_printf("-chardev file,id=file,path=%s "
                           "-object filter-redirector,id=cap,netdev=n0,"
                           "outdev=file,queue=tx", path);
    fixture_start(&f, args);
    guest_start(&f);
    pstrcpy(ifr.ifr_name, sizeof(ifr.ifr_name), f.ifname);
    g_assert_cmpint(ioctl(f.host, SIOCSIFMTU, &ifr), ==, 0);
    for (int round = 0; round < 3; round++) {
        pid_t pid = qtest_pid(f.qts);

        expect_source(&f, "cap", "packet-socket");
        make_frame(frame, round);
        kill(pid, SIGSTOP);
        for (uint32_t i = 0; i < n; i++) {
            g_assert_cmpint(send(f.host, frame, len, 0), ==, len);
        }
        qtest_qmp_send(f.qts, "{'execute': 'object-del',"
                              " 'arguments': {'id': 'cap'}}");
        kill(pid, SIGCONT);
        qobject_unref(qtest_qmp_receive(f.qts));
        g_assert_cmpint(stat(path, &st), ==, 0);
        g_assert_cmpint(st.st_size, ==, (round + 1) * n * (4 + 12 + len));
        qtest_qmp_assert_success(f.qts, "{'execute': 'object-add',"
            " 'arguments': {'qom-type': 'filter-redirector', 'id': 'cap',"
            "  'netdev': 'n0', 'outdev': 'file', 'queue': 'tx'}}");
    }
    text = qtest_hmp(f.qts, "object_del cap");
    g_assert_cmpstr(text, ==, "");
    unlink(path);
    fixture_close(&f);
}

static void test_slow_peer_deleted(void)
{
    for (int off = 0; off < 2; off++) {
        g_autofree char *text = NULL;
        uint64_t lost, dropped;
        uint32_t n = 0;
        Fixture f;

        fixture_start(&f, CAPTURE "tx");
        guest_start(&f);
        do {
            host_send(&f, n, 500);
            n += 500;
        } while (!counter(&f, "cap", "capture-kernel-drops"));
        if (off) {
            set_status(&f, "cap", "off");
        }
        dropped = counter(&f, "cap", "capture-kernel-drops");
        text = qtest_hmp(f.qts, "object_del cap");
        g_assert_cmpint(sscanf(text, "warning: netdev 'n0': %" SCNu64
                               " packets are lost with the filter", &lost),
                        ==, 1);
        expect_out(&f, 0, n - dropped - lost);
        fixture_close(&f);
    }
}

/* Who waits until it has all loses none. */
static void test_slow_peer_handed_over(Fixture *f)
{
    g_autofree char *text = NULL;

    for (int i = 0; i < 10; i++) {
        host_send(f, 500 * i, 500);
        counter(f, "cap", "capture-packets");
    }
    set_status(f, "cap", "off");
    g_assert_true(capture_pending(f, "cap"));
    expect_out(f, 0, 5000);
    wait_handed_over(f);
    text = qtest_hmp(f->qts, "object_del cap");
    g_assert_cmpstr(text, ==, "");
}


/* What cannot be written is dropped, although the peer stays, and no more. */
static void test_peer_error(Fixture *f)
{
    for (int i = 1; i <= 3; i++) {
        host_send(f, i, 1);
        wait_counter(f, "cap", "capture-peer-drops", i);
    }
    g_assert_cmpuint(counter(f, "cap", "capture-packets"), ==, 3);
}

/* With more memory nothing is dropped. */
static void test_buffer_size(Fixture *f)
{
    const uint32_t burst = 1000, bursts = 40;

    g_assert_cmpuint(counter(f, "cap", "buffer-size"), ==, 64 * MiB);
    guest_start(f);
    for (uint32_t i = 0; i < bursts; i++) {
        host_send(f, i * burst, burst);
        counter(f, "cap", "capture-packets");
    }
    g_assert_cmpuint(counter(f, "cap", "capture-kernel-drops"), ==, 0);
    expect_out(f, 0, bursts * burst);
    del_object(f, "cap");
    add_capture(f);
    g_assert_cmpuint(counter(f, "cap", "buffer-size"), ==, 32 * MiB);
}

/* The peer leaves in the middle of a frame. */
static void test_reconnect(Fixture *f)
{
    uint8_t byte;

    for (int i = 0; i < 20; i++) {
        host_send(f, 1000 * i, 20);
        read_full(f->out, &byte, 1);
        close(f->out);
        expect_source(f, "cap", "none");
        f->out = connect_to(f, "out");
        expect_source(f, "cap", "packet-socket");
        host_send(f, 1000 * i + 500, 5);
        expect_out(f, 1000 * i + 500, 5);
    }
}

/* Without a packet socket */

static void test_chain_mirror(void)
{
    Fixture f;

    fixture_init(&f, "vhost=off", "", "-object filter-mirror,id=mirror,"
                 "netdev=n0,outdev=out,vnet_hdr_support=on,queue=tx");
    guest_start(&f);
    guest_post(&f, 200);
    for (int i = 0; i < 10; i++) {
        host_send(&f, 20 * i, 20);
        expect_out(&f, 20 * i, 20);
    }
    expect_guest(&f, 0, 200);
    fixture_close(&f);
}

static void test_chain_mirror_no_peer(void)
{
    Fixture f;

    fixture_init(&f, "vhost=off", "", "-object filter-mirror,id=mirror,"
                 "netdev=n0,outdev=out,vnet_hdr_support=on,queue=tx");
    close(f.out);
    guest_start(&f);
    guest_post(&f, 20);
    host_send(&f, 0, 10);
    expect_guest(&f, 0, 10);
    fixture_close(&f);
}

/* The receiver of a character device "datagrams", which is added here */
static int add_datagrams(Fixture *f)
{
    struct sockaddr_in addr = {
        .sin_family = AF_INET,
        .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
    };
    socklen_t addr_len = sizeof(addr);
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    g_autofree char *port = NULL;

    g_assert_cmpint(bind(fd, (struct sockaddr *)&addr, sizeof(addr)), ==, 0);
    g_assert_cmpint(getsockname(fd, (struct sockaddr *)&addr, &addr_len), ==,
                    0);
    port = g_strdup_printf("%u", ntohs(addr.sin_port));
    qtest_qmp_assert_success(f->qts, "{'execute': 'chardev-add', 'arguments':"
        " {'id': 'datagrams', 'backend': {'type': 'udp', 'data': {"
        "  'remote': {'type': 'inet', 'data': {'host': '127.0.0.1',"
        "                                      'port': %s}}}}}}", port);
    return fd;
}

/* Each frame in one, however many of them are read together */
static void expect_datagrams(int fd, uint32_t first, uint32_t count)
{
    uint8_t datagram[BUFFER_LEN];

    for (uint32_t i = 0; i < count; i++) {
        wait_readable(fd);
        g_assert_cmpint(recv(fd, datagram, sizeof(datagram), 0), ==,
                        8 + 12 + FRAME_LEN);
        g_assert_cmpuint(ldl_be_p(datagram), ==, 12 + FRAME_LEN);
        g_assert_cmpuint(ldl_be_p(datagram + 4), ==, 12);
        g_assert_cmpuint(frame_number(datagram + 8 + 12), ==, first + i);
    }
}

static void test_capture_datagrams(Fixture *f)
{
    int fd;

    guest_post(f, 200);
    fd = add_datagrams(f);
    qtest_qmp_assert_success(f->qts, "{'execute': 'object-add', 'arguments':"
        " {'qom-type': 'filter-mirror', 'id': 'mirror', 'netdev': 'n0',"
        "  'outdev': 'datagrams', 'queue': 'tx', 'vnet_hdr_support': true}}");
    for (int i = 0; i < 4; i++) {
        host_send(f, 50 * i, 50);
        expect_datagrams(fd, 50 * i, 50);
    }
    expect_guest(f, 0, 200);
    close(fd);
}

/* The interface */

static void test_interface_down_up(Fixture *f)
{
    guest_post(f, 40);
    set_interface_up(f->ifname, false);
    in_send(f, 0, 3);
    wait_inject_pending(f, "inj", true);
    set_interface_up(f->ifname, true);
    wait_inject_pending(f, "inj", false);
    close(f->host);
    f->host = open_host(f->ifname);
    host_send(f, 3, 10);
    expect_out(f, 3, 10);
    in_send(f, 13, 10);
    expect_guest(f, 0, 23);
    g_assert_cmpuint(counter(f, "inj", "inject-interface-drops"), ==, 0);
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

static const struct {
    const char *id;
    const char *args;
} mixed[MIXED] = {
    { "mirror", "'qom-type': 'filter-mirror', 'outdev': 'mir',"
                " 'vnet_hdr_support': true, 'queue': 'all'" },
    { "cap", "'qom-type': 'filter-redirector', 'outdev': 'out',"
             " 'vnet_hdr_support': true, 'queue': 'all'" },
    { "dump", "'qom-type': 'filter-dump', 'queue': 'all'" },
    { "inj", "'qom-type': 'filter-redirector', 'indev': 'in',"
             " 'vnet_hdr_support': true, 'queue': 'all'" },
    { "chain", "'qom-type': 'filter-mirror', 'outdev': 'chn',"
               " 'vnet_hdr_support': true, 'queue': 'all',"
               " 'packet-socket': 'off'" },
    { "rew", "'qom-type': 'filter-rewriter', 'vnet_hdr_support': true,"
             " 'queue': 'all'" },
};

typedef struct Mixed {
    Fixture f;
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

static void swap_ints(int *a, int *b)
{
    int was = *a;

    *a = *b;
    *b = was;
}

/* Add a filter: at either end, or beside another one. */
static void mixed_add(Mixed *m, int which, int step)
{
    g_autofree char *place = NULL, *args = NULL;
    int at;

    if (m->count && step % 2) {
        at = step / 2 % m->count;
        place = g_strdup_printf("'position': 'id=%s', 'insert': '%s'",
                                mixed[m->list[at]].id,
                                step % 4 == 1 ? "before" : "behind");
        at += step % 4 != 1;
    } else {
        at = step % 3 ? m->count : 0;
        place = g_strdup_printf("'position': '%s'", at ? "tail" : "head");
    }
    for (int i = m->count++; i > at; i--) {
        m->list[i] = m->list[i - 1];
    }
    m->list[at] = which;
    args = g_strdup_printf("{'id': '%s', 'netdev': 'n0', %s, %s%s%s%s}",
                           mixed[which].id, mixed[which].args, place,
                           which == MIXED_DUMP ? ", 'file': '" : "",
                           which == MIXED_DUMP ? m->path : "",
                           which == MIXED_DUMP ? "'" : "");
    qtest_qmp_assert_success(m->f.qts, "{'execute': 'object-add',"
                             " 'arguments': %p}",
                             qobject_from_json(args, &error_abort));
    if (which == MIXED_DUMP) {
        m->dump = open_pcap(m->path);
    }
}

/* Returns the peer of a new character device. */
static int mixed_add_peer(Fixture *f, const char *id)
{
    g_autofree char *path = g_build_filename(f->dir, id, NULL);
    int fd;

    qtest_qmp_assert_success(f->qts, "{'execute': 'chardev-add',"
        " 'arguments': {'id': %s, 'backend': {'type': 'socket',"
        " 'data': {'server': true, 'wait': false, 'addr': {"
        " 'type': 'unix', 'data': {'path': %s}}}}}}", id, path);
    fd = connect_to(f, id);
    expect_connected(f, id, true);
    unlink(path);
    return fd;
}

/* The peer of a filter has this packet next. */
static void mixed_expect_peer(Fixture *f, int peer, uint32_t number)
{
    swap_ints(&f->out, &peer);
    expect_out(f, number, 1);
    swap_ints(&f->out, &peer);
}

static void mixed_expect_vhost(Mixed *m)
{
    bool vhost = !mixed_has(m, MIXED_CHAIN) && !mixed_has(m, MIXED_REWRITER);
    gint64 end = g_get_monotonic_time() + TIMEOUT_US;

    while (vhost_started(&m->f) != vhost) {
        g_assert_cmpint(g_get_monotonic_time(), <, end);
    }
}

static void mixed_del(Mixed *m, int which)
{
    int at = mixed_place(m, which);

    del_object(&m->f, mixed[which].id);
    for (m->count--; at < m->count; at++) {
        m->list[at] = m->list[at + 1];
    }
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
    gint64 end = g_get_monotonic_time() + TIMEOUT_US;
    uint32_t next = number;

    while (next == number) {
        guest_take(&m->f, mixed_took, &next);
        g_assert_cmpint(g_get_monotonic_time(), <, end);
    }
    g_assert_cmpuint(next, ==, number + 1);
}

static void mixed_expect_chain(Mixed *m, uint32_t number)
{
    if (mixed_has(m, MIXED_CHAIN)) {
        mixed_expect_peer(&m->f, m->chain, number);
    }
}

/* Each of the filters with a packet socket has this packet next. */
static void mixed_expect_copies(Mixed *m, uint32_t number)
{
    uint8_t frame[BUFFER_LEN];
    PcapPacket packet;

    if (mixed_has(m, MIXED_MIRROR)) {
        mixed_expect_peer(&m->f, m->mirror, number);
    }
    if (mixed_has(m, MIXED_CAP)) {
        expect_out(&m->f, number, 1);
    }
    if (mixed_has(m, MIXED_DUMP)) {
        read_pcap(m->dump, &packet, frame, sizeof(frame));
        g_assert_cmpuint(frame_number(frame), ==, number);
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
    mixed_expect_vhost(m);
    host_send(&m->f, m->number, 1);
    mixed_expect_guest(m, m->number);
    mixed_expect_copies(m, m->number);
    mixed_expect_chain(m, m->number++);
    if (mixed_has(m, MIXED_INJ)) {
        in_send(&m->f, m->number, 1);
        mixed_expect_guest(m, m->number);
        mixed_expect_copies(m, m->number);
        mixed_expect_chain(m, m->number);
        if (mixed_place(m, MIXED_CHAIN) < mixed_place(m, MIXED_INJ)) {
            mixed_expect_chain(m, m->number);
        }
        expect_host(&m->f, m->number++, 1);
    }
    guest_put(&m->f, m->number);
    expect_host(&m->f, m->number, 1);
    mixed_expect_copies(m, m->number);
    mixed_expect_chain(m, m->number++);
}

/* The order with this number, of MIXED! ones */
static void mixed_order(int number, int order[MIXED])
{
    for (int i = 0; i < MIXED; i++) {
        order[i] = i;
    }
    for (int i = MIXED; i > 1; i--) {
        swap_ints(&order[i - 1], &order[number % i]);
        number /= i;
    }
}

static void test_mixed(void)
{
    const int orders = 720;     /* MIXED! */
    Mixed m = { };
    int order[MIXED];

    fixture_start(&m.f, GUEST_MAP_ARGS);
    m.path = g_build_filename(m.f.dir, "dump", NULL);
    m.mirror = mixed_add_peer(&m.f, "mir");
    m.chain = mixed_add_peer(&m.f, "chn");
    guest_start(&m.f);
    guest_map(&m.f);
    g_assert_true(vhost_started(&m.f));
    for (int i = 0; i < orders; i += g_test_slow() ? 1 : 31) {
        mixed_order(i, order);
        for (int j = 0; j < MIXED; j++) {
            mixed_add(&m, order[j], i + j);
            mixed_pass(&m);
        }
        mixed_order(i * 7 % orders, order);
        for (int j = 0; j < MIXED; j++) {
            mixed_del(&m, order[j]);
            mixed_pass(&m);
        }
        g_assert_cmpint(packet_sockets(m.f.ifname, ETH_P_ALL, 1), ==, 0);
    }
    close(m.mirror);
    close(m.chain);
    g_free(m.path);
    fixture_close(&m.f);
}

/*
 * On the chain the order counts: what comes behind one that takes the packets
 * gets none.  They go from the head to the tail to the guest, and the other
 * way from it.  A packet socket sees them on the TAP, before or after that.
 */
static void test_mixed_order(Fixture *f)
{
    static const char mirror[] = "'qom-type': 'filter-mirror', 'id': 'm',"
                                 " 'outdev': 'mir'";
    static const char taker[] = "'qom-type': 'filter-redirector', 'id': 't',"
                                " 'outdev': 'tak'";
    static const struct {
        const char *first;
        const char *second;
        const char *place;      /* of the second */
        bool mirror_is_first;
    } places[] = {
        { taker, mirror, "'position': 'head'", true },
        { taker, mirror, "'position': 'tail'", false },
        { taker, mirror, "'position': 'id=t', 'insert': 'before'", true },
        { taker, mirror, "'position': 'id=t', 'insert': 'behind'", false },
        { mirror, taker, "'position': 'head'", false },
        { mirror, taker, "'position': 'tail'", true },
        { mirror, taker, "'position': 'id=m', 'insert': 'before'", false },
        { mirror, taker, "'position': 'id=m', 'insert': 'behind'", true },
    };
    uint32_t n = 0;
    int mir, tak;

    mir = mixed_add_peer(f, "mir");
    tak = mixed_add_peer(f, "tak");
    guest_start(f);
    guest_map(f);
    for (int i = 0; i < ARRAY_SIZE(places); i++) {
        for (int j = 0; j < 2; j++) {
            g_autofree char *args = g_strdup_printf(
                "{%s, 'netdev': 'n0', 'vnet_hdr_support': true,"
                " 'packet-socket': 'off', %s}",
                j ? places[i].second : places[i].first,
                j ? places[i].place : "'position': 'tail'");

            qtest_qmp_assert_success(f->qts, "{'execute': 'object-add',"
                                     " 'arguments': %p}",
                                     qobject_from_json(args, &error_abort));
        }
        g_assert_false(vhost_started(f));
        host_send(f, n, 1);
        mixed_expect_peer(f, tak, n);
        expect_out(f, n, 1);
        guest_put(f, n + 1);
        mixed_expect_peer(f, tak, n + 1);
        mixed_expect_peer(f, mir, places[i].mirror_is_first ? n : n + 1);
        n += 2;
        del_object(f, "m");
        del_object(f, "t");
    }
    close(mir);
    close(tak);
}

/* Errors */

/* @properties are names and values, ended by NULL. */
static void expect_fixed(Fixture *f, const char *type, const char *args,
                         const char *const *properties)
{
    g_autofree char *cmd = g_strdup_printf(
        "{'execute': 'object-add', 'arguments': {'qom-type': '%s',"
        " 'id': 'fixed', 'netdev': 'n0', %s}}", type, args);

    qtest_qmp_assert_success(f->qts, "%p", qobject_from_json(cmd, NULL));
    for (; *properties; properties += 2) {
        g_autofree char *set = g_strdup_printf(
            "{'execute': 'qom-set', 'arguments': {'path': '/objects/fixed',"
            " 'property': '%s', 'value': %s}}", properties[0], properties[1]);
        QDict *rsp = qtest_qmp_assert_failure_ref(f->qts, "%p",
                                                  qobject_from_json(set, NULL));

        g_assert_nonnull(strstr(qdict_get_str(rsp, "desc"),
                                "cannot be changed once the filter is set up"));
        qobject_unref(rsp);
    }
    del_object(f, "fixed");
}

static void test_errors(Fixture *f)
{
    static const char *const redirector[] = {
        "netdev", "'n0'", "queue", "'rx'", "position", "'head'",
        "insert", "'before'", "indev", "'in'", "outdev", "'out'",
        "vnet_hdr_support", "true", "packet-socket", "'on'",
        "enable_when_running", "false", "enable_when_stopped", "true",
        "buffer-size", "2097152", "packet-fd", "'1'",
        "inject-packet-fd", "'1'", NULL
    };
    static const char *const mirror[] = {
        "outdev", "'out'", "vnet_hdr_support", "true", NULL
    };
    static const char *const dump[] = {
        "file", "'other'", "maxlen", "100", NULL
    };

    expect_error_args(f, "'netdev': 'hub', 'outdev': 'out',"
                      " 'packet-socket': 'on'",
                      "'packet-socket=on' needs a netdev of type 'tap', and "
                      "netdev 'hub' is of type 'hubport'");
    expect_error_args(f, "'netdev': 'plain', 'outdev': 'out',"
                      " 'enable_when_stopped': true",
                      "'enable_when_stopped' needs a packet socket, which is "
                      "not used on netdev 'plain'");
    expect_error_args(f, "'netdev': 'n0', 'outdev': 'out',"
                      " 'enable_when_running': false",
                      "needs 'enable_when_stopped=on'");
    expect_error_args(f, "'netdev': 'plain', 'outdev': 'out',"
                      " 'buffer-size': 4194304",
                      "'buffer-size' needs a packet socket, which is not used "
                      "on netdev 'plain'");
    expect_error_args(f, "'netdev': 'n0', 'outdev': 'out',"
                      " 'buffer-size': 1000000", "from 1 MiB to 1 GiB");
    expect_error_args(f, "'netdev': 'n0', 'outdev': 'none'",
                      "'none' not found");
    expect_error_args(f, "'netdev': 'n0'", "at least one property");
    expect_error_args(f, "'netdev': 'n0', 'outdev': 'out', 'indev': 'out'",
                      "could not be same");
    expect_error_args(f, "'netdev': 'n0'", "filter-redirector 'bad': ");
    expect_error_args(f, "'netdev': 'n0', 'outdev': 'both'",
                      "chardev 'both' is a hub");
    expect_error_args(f, "'netdev': 'n0', 'queue': 'tx', 'indev': 'both'",
                      "chardev 'both' is a hub");
    expect_error_args(f, "'netdev': 'n0', 'queue': 'tx', 'indev': 'udp'",
                      "chardev 'udp' is a udp one");
    expect_error_args(f, "'netdev': 'n0', 'outdev': 'out',"
                      " 'position': 'id=io'", "'io' is not a filter");
    expect_fixed(f, "filter-redirector", "'outdev': 'out'", redirector);
    expect_fixed(f, "filter-mirror", "'outdev': 'out'", mirror);
    if (HAS_DUMP) {
        expect_fixed(f, "filter-dump", "'file': '/dev/null'", dump);
    }

    /* And the VM is as it was. */
    guest_start(f);
    guest_post(f, 1);
    host_send(f, 0, 1);
    expect_guest(f, 0, 1);
}

static void test_error_interface_gone(Fixture *f)
{
    g_autofree char *cmd = NULL;

    cmd = g_strdup_printf("ip link del %s", f->ifname);
    g_assert_cmpint(system(cmd), ==, 0);
    expect_error_args(f, "'netdev': 'n0', 'outdev': 'out'",
                      "netdev 'n0': could not get the TAP's interface");
}

static void no_cap_net_raw(void)
{
    Fixture f;

    g_assert_cmpint(prctl(PR_CAPBSET_DROP, CAP_NET_RAW), ==, 0);
    fixture_start(&f, "");
    expect_error_args(&f, "'netdev': 'n0', 'outdev': 'out'",
                      "(it needs CAP_NET_RAW; without, pass a packet ");
    expect_error_args(&f, "'netdev': 'n0', 'indev': 'in', 'queue': 'tx'",
                      "Operation not permitted");
    /* What needs no packet socket needs no capability. */
    qtest_qmp_assert_success(f.qts, "{'execute': 'object-add', 'arguments':"
        " {'qom-type': 'filter-redirector', 'id': 'cap', 'netdev': 'n0',"
        "  'outdev': 'out', 'enable_when_running': false,"
        "  'enable_when_stopped': true}}");
    fixture_close(&f);
}

/* In a child that has its own capabilities */
static void test_error_no_cap_net_raw(void)
{
    int status;
    pid_t pid = fork();

    if (!pid) {
        no_cap_net_raw();
        _exit(0);
    }
    g_assert_cmpint(waitpid(pid, &status, 0), ==, pid);
    g_assert_cmpint(status, ==, 0);
}

/* A TAP of another namespace, with the name of an interface that is here. */
static void test_error_netns(void)
{
    g_autofree char *args = NULL;
    int own = open("/proc/self/ns/net", O_RDONLY);
    int here, there;
    QTestState *qts;
    Fixture f = { };

    here = open_tap("tapns");
    g_assert_cmpint(unshare(CLONE_NEWNET), ==, 0);
    there = open_tap("tapns");
    g_assert_cmpint(setns(own, CLONE_NEWNET), ==, 0);
    g_assert_cmpint(fcntl(there, F_SETFD, 0), ==, 0);

    qts = qtest_initf("-nodefaults -machine pc "
                      "-netdev tap,id=n0,fd=%d,vhost=on "
                      "-chardev null,id=out", there);
    f.qts = qts;
    expect_error_args(&f, "'netdev': 'n0', 'outdev': 'out'",
                      "netdev 'n0': interface 'tapns' in QEMU's network "
                      "namespace is not the TAP");
    close(here);
    expect_error_args(&f, "'netdev': 'n0', 'outdev': 'out'",
                      "netdev 'n0': could not find interface 'tapns'");
    qtest_quit(qts);
    close(there);
    close(own);
}

/* A macvtap's fd is like a TAP's, but its directions are the other way. */
static void test_error_not_a_tap(void)
{
    g_autofree char *path = NULL;
    int tap, fd;
    Fixture f = { };

    tap = open_tap("tapmv");
    if (system("ip link add link tapmv name macvtapq type macvtap")) {
        g_test_skip("the kernel has no macvtap");
        close(tap);
        return;
    }
    path = g_strdup_printf("/dev/tap%u", if_nametoindex("macvtapq"));
    fd = open(path, O_RDWR | O_NONBLOCK);
    g_assert_cmpint(fd, >=, 0);
    f.qts = qtest_initf("-nodefaults -machine pc "
                        "-netdev tap,id=n0,fd=%d,vhost=on "
                        "-chardev null,id=out", fd);
    expect_error_args(&f, "'netdev': 'n0', 'outdev': 'out'",
                      "netdev 'n0': interface 'macvtapq' is not a TAP");
    qtest_quit(f.qts);
    close(fd);
    close(tap);
}

static void test_info_network(Fixture *f)
{
    g_autofree char *text = NULL;

    host_send(f, 0, 3);
    expect_out(f, 0, 3);
    text = qtest_hmp(f->qts, "info network");
    g_assert_nonnull(strstr(text, "capture-packets=3"));
    g_assert_nonnull(strstr(text, "source=packet-socket"));
    g_assert_nonnull(strstr(text, f->ifname));
}

int main(int argc, char **argv)
{
    rig_init(&argc, &argv, "filter-redirector-vhost");

    rig_add_guest("capture/tx", CAPTURE "tx", test_capture_tx);
    rig_add_guest("capture/rx", CAPTURE "rx", test_capture_rx);
    rig_add_guest("capture/tx-only", CAPTURE "tx", test_capture_tx_only);
    rig_add_guest("capture/all", CAPTURE "all", test_capture_all);
    rig_add_vm("capture/driver-reload", CAPTURE "tx",
               test_capture_driver_reload);
    rig_add("capture/chain-reads", test_capture_chain_reads);
    rig_add("capture/multiqueue", test_capture_multiqueue);
    rig_add_guest("capture/bursts", CAPTURE "tx", test_capture_bursts);
    rig_add_guest("capture/two", CAPTURE "tx -object filter-redirector,id=cap2,"
                  "netdev=n0,outdev=in,vnet_hdr_support=on,queue=all",
                  test_capture_two);
    rig_add_guest("capture/mirror", MIRROR "all", test_capture_mirror);
    if (HAS_DUMP) {
        rig_add("capture/dump", test_capture_dump);
        rig_add("capture/dump-maxlen", test_capture_dump_maxlen);
        rig_add("capture/dump-full", test_capture_dump_full);
    }
    if (HAS_FALLBACK) {
        rig_add("mixed", test_mixed);
        rig_add_vm("mixed-order", GUEST_MAP_ARGS " " CAPTURE "all",
                   test_mixed_order);
    }
    rig_add_guest("capture/datagrams", "", test_capture_datagrams);
    rig_add_vm("capture/header", CAPTURE "tx", test_capture_header);
    rig_add_guest("capture/stream-format",
                  "-object filter-redirector,id=cap,netdev=n0,"
                  "outdev=out,queue=tx",
                  test_capture_stream_format);
    rig_add_guest("status/on-off", CAPTURE "tx", test_status);
    rig_add_guest("status/off-at-start", CAPTURE "tx,status=off",
                  test_status_off_at_start);
    rig_add_guest("status/not-connected", CAPTURE "tx", test_not_connected);
    rig_add_vm("status/unhooked", CAPTURE "tx", test_unhooked);
    rig_add_guest("status/lingers", CAPTURE "all,buffer-size=1M", test_lingers);
    rig_add_guest("stop/running-only", CAPTURE "tx", test_stop_running_only);
    rig_add_guest("stop/both", CAPTURE "tx,enable_when_stopped=on",
                  test_stop_both);
    rig_add_guest("stop/mirror", MIRROR STOPPED_ONLY, test_stop_mirror);
    rig_add_guest("stop/stopped-only", CAPTURE STOPPED_ONLY, test_stopped_only);
    rig_add_guest("stop/stopped-only-announce",
                  CAPTURE "all,enable_when_running=off,"
                  "enable_when_stopped=on",
                  test_stopped_only_announce);
    rig_add("stop/stopped-only-echo", test_stopped_only_echo);
    rig_add_vm("stop/stopped-only-no-vhost", CAPTURE STOPPED_ONLY,
               test_stopped_only_no_vhost);
    rig_add("stop/stopped-only-multiqueue", test_stopped_only_multiqueue);
    rig_add_guest("stop/stopped-only-not-connected", CAPTURE STOPPED_ONLY,
                  test_stopped_only_not_connected);
    rig_add_vm("stop/stopped-only-late-peer", CAPTURE STOPPED_ONLY,
               test_stopped_only_late_peer);
    rig_add_vm("stop/stopped-only-pty",
               "-chardev pty,id=pty -object filter-redirector,id=cap,"
               "netdev=n0,outdev=pty,vnet_hdr_support=on,queue="
               STOPPED_ONLY,
               test_stopped_only_pty);
    rig_add_guest("stop/stopped-only-slow-peer",
                  CAPTURE STOPPED_ONLY ",buffer-size=8M",
                  test_stopped_only_slow_peer);
    rig_add_guest("stop/migration-cancelled", CAPTURE STOPPED_ONLY,
                  test_migration_cancelled);
    rig_add_guest("stop/migration-failed", CAPTURE STOPPED_ONLY,
                  test_migration_failed);
    rig_add_guest("inject/tx", INJECT "tx", test_inject_tx);
    rig_add_guest("inject/rx", INJECT "rx", test_inject_rx);
    rig_add_guest("inject/all", INJECT "all", test_inject_all);
    rig_add_vm("inject/full", INJECT "tx", test_inject_full);
    rig_add_guest("inject/hold", INJECT "tx", test_inject_hold);
    rig_add_guest("inject/hold-peer-gone", INJECT "tx",
                  test_inject_hold_peer_gone);
    rig_add_guest("inject/when-stopped", INJECT "tx,enable_when_stopped=on",
                  test_inject_when_stopped);
    rig_add_guest("inject/status", INJECT "tx,status=off", test_inject_status);
    rig_add_guest("inject/receives-nothing", INJECT "tx",
                  test_inject_receives_nothing);
    rig_add_guest("inject/no-loop",
                  "-object filter-redirector,id=both,netdev=n0,indev=in,"
                  "outdev=out,vnet_hdr_support=on,queue=tx",
                  test_no_loop);
    rig_add_guest("inject/rx-captured", CAPTURE "all " INJECT "rx",
                  test_injected_rx_captured);
    rig_add_guest("inject/relay", CAPTURE "rx " INJECT "tx", test_relay);
    rig_add_guest("inject/bad-frames", INJECT "tx", test_inject_bad_frames);
    rig_add_guest("inject/bad-gso", INJECT "tx", test_inject_bad_gso);
    rig_add_vm("inject/shifted",
               "-object filter-redirector,id=inj,netdev=n0,indev=in,"
               "queue=tx",
               test_inject_shifted);
    rig_add_guest("inject/rx-waits", INJECT "rx,enable_when_stopped=on",
                  test_inject_rx_waits);
    rig_add_guest("stop/nothing-lost", CAPTURE "tx " INJECT "tx",
                  test_stop_nothing_lost);
    rig_add_vm("stop/nothing-read", CAPTURE "tx", test_stop_nothing_read);
    rig_add_vm("stop/two-filters", CAPTURE STOPPED_ONLY ",buffer-size=1M",
               test_stopped_only_two);
    rig_add_guest("life/framing", "", test_framing_after_del);
    rig_add_guest("life/hotplug", "", test_hotplug);
    rig_add_guest("life/netdev-del", CAPTURE "tx " INJECT "tx",
                  test_netdev_del);
    rig_add_guest("life/device-del", CAPTURE "tx", test_device_del);
    rig_add_guest("life/no-leak", "", test_no_leak);
    rig_add_guest("life/no-foreign-frames", "", test_no_foreign_frames);
    rig_add_guest("peer/slow", CAPTURE "tx", test_slow_peer);
    rig_add_guest("peer/slow-off", CAPTURE "tx", test_slow_peer_off);
    rig_add("peer/slow-deleted", test_slow_peer_deleted);
    rig_add("peer/deleted-accepting", test_deleted_accepting);
    rig_add_guest("peer/slow-handed-over", CAPTURE "tx",
                  test_slow_peer_handed_over);
    rig_add_vm("peer/error", "-chardev file,id=full,path=/dev/full "
               "-object filter-redirector,id=cap,netdev=n0,outdev=full,"
               "queue=tx",
               test_peer_error);
    rig_add_vm("peer/buffer-size", CAPTURE "tx,buffer-size=64M",
               test_buffer_size);
    rig_add_guest("peer/reconnect", CAPTURE "tx", test_reconnect);
    rig_add("chain/mirror", test_chain_mirror);
    rig_add("chain/mirror-no-peer", test_chain_mirror_no_peer);
    rig_add_guest("interface/down-up", CAPTURE "tx " INJECT "tx",
                  test_interface_down_up);
    rig_add_vm("error/options", "-object iothread,id=io "
               "-chardev udp,id=udp,host=127.0.0.1,port=9 "
               "-chardev null,id=null1 -chardev null,id=null2 "
               "-chardev hub,id=both,chardevs.0=null1,"
               "chardevs.1=null2 "
               "-netdev hubport,id=hub,hubid=1 "
               "-netdev tap,id=plain,ifname=tapplain,script=no,"
               "downscript=no,vhost=off",
               test_errors);
    rig_add_vm("error/interface-gone", "", test_error_interface_gone);
    rig_add("error/no-cap-net-raw", test_error_no_cap_net_raw);
    rig_add("error/netns", test_error_netns);
    rig_add("error/not-a-tap", test_error_not_a_tap);
    rig_add_vm("info/network", CAPTURE "tx", test_info_network);
    return g_test_run();
}
