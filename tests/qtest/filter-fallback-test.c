/*
 * QTest testcase for netfilters that make virtio-net leave vhost
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * While packets go both ways, filters that need the packets to pass through
 * QEMU come, go, and are switched on and off.  Each frame belongs to a flow,
 * and has a number in it; each must arrive once, and in order within its flow.
 *
 * The traffic is made by two threads: one is the host, the other the guest,
 * with a driver in mapped memory.  The main thread talks to the monitor only.
 */

#include "qemu/osdep.h"
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <linux/sockios.h>
#include <linux/if_packet.h>
#include <linux/if_ether.h>
#include "filter-redirector-rig.h"
#include "libqos/virtio.h"
#include "qemu/atomic.h"
#include "qemu/bitops.h"
#include "qemu/bswap.h"
#include "qemu/units.h"
#include "qobject/qdict.h"
#include "qobject/qlist.h"
#include "standard-headers/linux/virtio_ring.h"

#define GUEST_RAM (128 * MiB)

#define EVENT_IDX (1ull << VIRTIO_RING_F_EVENT_IDX)
#define RING_RESET (1ull << VIRTIO_F_RING_RESET)

/* Ethernet, IPv4 and UDP; the number comes behind. */
#define ADDRESSES_AT (14 + 12)
#define PORTS_AT (14 + 20)
#define NUMBER_AT (PORTS_AT + 8)
#define HEADER 12               /* of virtio-net */
#define FLOWS 4
#define MAX_PAIRS 2

/* So few that the TAP's queue never overflows */
#define IN_FLIGHT 150

/* So few that the guest, which takes none any more, has buffers for all */
#define IN_FLIGHT_TO_STOP 250

/* Frames each way between two switches */
#define BETWEEN 30

/* QEMU waits for the peer of a mirror on the chain, so have one that reads. */
#define SINK "-chardev null,id=sink "

#define REWRITER "-object filter-rewriter,id=flt,netdev=n0,vnet_hdr_support=on"
/* It holds all, as this clock stands still. */
#define BUFFER "-object filter-buffer,id=flt,netdev=n0,interval=1000"

#if defined(CONFIG_TRACE_LOG) && !defined(CONFIG_TRACE_SIMPLE)
#define HAS_TRACE_LOG true
#else
#define HAS_TRACE_LOG false
#endif

typedef struct Load Load;

/* A test with a Load, whose driver has started */
typedef struct LoadTest {
    const char *path;
    void (*func)(Load *l);
    const char *args;
    const char *nic_opts;
    uint64_t features;
    unsigned pairs;             /* of queues; 0 is the same as 1 */
    int switches;
    bool no_driver;
} LoadTest;

/* A ring of a driver in mapped memory, as simple as it can be */
typedef struct Ring {
    QVirtQueue *vq;
    uint64_t buffers;           /* RING_LEN of BUFFER_LEN each */
    uint16_t added;
    uint16_t kicked;
    uint16_t used;
} Ring;

/* One way */
typedef struct Way {
    uint16_t port;              /* of the first flow */
    uint32_t sent[FLOWS];       /* atomic, like the next one */
    uint32_t received[FLOWS];
} Way;

struct Load {
    Fixture f;
    const LoadTest *test;
    unsigned pairs;
    Ring rx[MAX_PAIRS];
    Ring tx[MAX_PAIRS];
    Way to_guest;
    Way to_host;
    GThread *host_thread;
    GThread *guest_thread;
    uint32_t elsewhere;         /* came to the guest by TAPs before this one */
    bool guest_quit;            /* atomic, like the next one */
    bool host_quit;
};

static uint32_t way_total(uint32_t *count)
{
    uint32_t total = 0;

    for (int i = 0; i < FLOWS; i++) {
        total += qatomic_read(&count[i]);
    }
    return total;
}

static uint32_t way_in_flight(Way *way)
{
    return way_total(way->sent) - way_total(way->received);
}

static bool way_may_send(Way *way)
{
    return way_in_flight(way) < IN_FLIGHT;
}

/* The next frame of a flow, which counts as sent then */
static void way_send(Way *way, unsigned flow, uint8_t *frame)
{
    static const uint8_t head[] = {
        0x52, 0x54, 0x00, 0x12, 0x34, 0x56, 0x02, 0, 0, 0, 0, 1, 0x08, 0x00,
        0x45, 0x00, 0x00, FRAME_LEN - 14, 0, 0, 0, 0, 64, IPPROTO_UDP, 0, 0,
        192, 0, 2, 1, 192, 0, 2, 2,
        0, 0, 0x10, 0x00, 0x00, FRAME_LEN - 34, 0, 0,
    };

    memset(frame, 0, FRAME_LEN);
    memcpy(frame, head, sizeof(head));
    stw_be_p(frame + PORTS_AT, way->port + flow);
    stl_be_p(frame + NUMBER_AT, way->sent[flow]);
    qatomic_set(&way->sent[flow], way->sent[flow] + 1);
}

static void way_arrived(Way *way, const uint8_t *frame)
{
    unsigned flow = lduw_be_p(frame + PORTS_AT) - way->port;

    g_assert_cmpuint(flow, <, FLOWS);
    g_assert_cmpuint(ldl_be_p(frame + NUMBER_AT), ==, way->received[flow]);
    qatomic_set(&way->received[flow], way->received[flow] + 1);
}

/* What has not arrived is not to come any more. */
static void way_forget(Way *way)
{
    for (int i = 0; i < FLOWS; i++) {
        qatomic_set(&way->received[i], way->sent[i]);
    }
}

static bool way_received(Way *way, uint32_t total)
{
    g_usleep(200);              /* the threads need the CPU */
    return way_total(way->received) >= total;
}

/* Wait until BETWEEN more frames have arrived. */
static void way_wait(Way *way)
{
    uint32_t total = way_total(way->received) + BETWEEN;

    WAIT_UNTIL(way_received(way, total));
}

/* The host */

static void host_receive(Load *l)
{
    uint8_t frame[BUFFER_LEN];
    struct sockaddr_ll from;
    socklen_t len = sizeof(from);

    while (recvfrom(l->f.host, frame, sizeof(frame), MSG_DONTWAIT,
                    (struct sockaddr *)&from, &len) > 0) {
        if (from.sll_pkttype != PACKET_OUTGOING) {
            way_arrived(&l->to_host, frame);
        }
        len = sizeof(from);
    }
}

/* Without the guest: so slowly that some come until the VM has stopped. */
static bool host_may_send(Load *l)
{
    if (!qatomic_read(&l->guest_quit)) {
        return way_may_send(&l->to_guest);
    }
    g_usleep(1000);
    return way_in_flight(&l->to_guest) < IN_FLIGHT_TO_STOP;
}

static void *host_thread(void *opaque)
{
    Load *l = opaque;
    uint8_t frame[FRAME_LEN];

    for (unsigned i = 0; !qatomic_read(&l->host_quit); i++) {
        host_receive(l);
        if (host_may_send(l)) {
            way_send(&l->to_guest, i % FLOWS, frame);
            g_assert_cmpint(send(l->f.host, frame, FRAME_LEN, 0), ==,
                            FRAME_LEN);
        } else {
            g_usleep(100);
        }
    }
    return NULL;
}

/* The guest */

static void ring_kick(Load *l, Ring *r)
{
    QVirtQueue *vq = r->vq;
    uint16_t *avail_event = (void *)(l->f.guest.ram + vq->used + 4 +
                                     8 * vq->size);
    bool kick;

    if (!(l->test->features & EVENT_IDX)) {
        guest_notify(&l->f, vq);
        return;
    }
    /* What is available is seen before we look at the event's index. */
    smp_mb();
    kick = vring_need_event(le16_to_cpu(qatomic_read(avail_event)), r->added,
                            r->kicked);
    r->kicked = r->added;
    if (kick) {
        l->f.dev->vdev.bus->virtqueue_kick(&l->f.dev->vdev, vq);
    }
}

static void ring_add(Load *l, Ring *r, uint16_t head)
{
    guest_make_available(&l->f.guest, r->vq, head);
    r->added++;
}

static void ring_init(Load *l, Ring *r, QVirtQueue *vq)
{
    *r = (Ring) { .vq = vq, .buffers = r->buffers };
    g_assert_cmpuint(vq->size, ==, RING_LEN);
    if (!r->buffers) {
        r->buffers = guest_alloc(&l->f.alloc, RING_LEN * BUFFER_LEN);
    }
}

static struct vring_desc *ring_desc(Load *l, Ring *r, uint16_t head)
{
    return (struct vring_desc *)(l->f.guest.ram + r->vq->desc) + head;
}

static void set_desc(struct vring_desc *desc, uint64_t addr, uint32_t len,
                     uint16_t flags, uint16_t next)
{
    desc->addr = cpu_to_le64(addr);
    desc->len = cpu_to_le32(len);
    desc->flags = cpu_to_le16(flags);
    desc->next = cpu_to_le16(next);
}

static void rx_init(Load *l, Ring *r, QVirtQueue *vq)
{
    ring_init(l, r, vq);
    for (int i = 0; i < RING_LEN; i++) {
        set_desc(ring_desc(l, r, i), r->buffers + i * BUFFER_LEN, BUFFER_LEN,
                 VRING_DESC_F_WRITE, 0);
    }
}

/* Header and frame: two descriptors */
static void tx_init(Load *l, Ring *r, QVirtQueue *vq)
{
    ring_init(l, r, vq);
    for (int i = 0; i < RING_LEN; i += 2) {
        uint64_t buffer = r->buffers + i * BUFFER_LEN;

        set_desc(ring_desc(l, r, i), buffer, HEADER, VRING_DESC_F_NEXT, i + 1);
        set_desc(ring_desc(l, r, i + 1), buffer + HEADER, FRAME_LEN, 0, 0);
    }
}

static uint8_t *ring_packet(Load *l, Ring *r, uint16_t head)
{
    return l->f.guest.ram + r->buffers + head * BUFFER_LEN;
}

static void guest_receive(Load *l)
{
    for (int i = 0; i < l->pairs; i++) {
        Ring *r = &l->rx[i];
        struct vring_used *used = (void *)(l->f.guest.ram + r->vq->used);
        uint16_t idx = guest_used_idx(&l->f.guest, r->vq);

        if (r->used == idx) {
            continue;
        }
        for (; r->used != idx; r->used++) {
            uint16_t head = le32_to_cpu(used->ring[r->used % RING_LEN].id);

            way_arrived(&l->to_guest, ring_packet(l, r, head) + HEADER);
            ring_add(l, r, head);
        }
        ring_kick(l, r);
    }
}

/* Each flow has its queue; some frames at a time */
static void guest_fill(Load *l, unsigned flow)
{
    Ring *r = &l->tx[flow % l->pairs];

    r->used = guest_used_idx(&l->f.guest, r->vq);
    for (int i = 0; i < 8 && way_may_send(&l->to_host) &&
         (uint16_t)(r->added - r->used) < RING_LEN / 2; i++) {
        uint16_t head = r->added % (RING_LEN / 2) * 2;
        uint8_t *packet = ring_packet(l, r, head);

        memset(packet, 0, HEADER);
        way_send(&l->to_host, flow, packet + HEADER);
        ring_add(l, r, head);
    }
}

static void guest_transmit(Load *l, unsigned flow)
{
    guest_fill(l, flow);
    ring_kick(l, &l->tx[flow % l->pairs]);
}

static void *guest_thread(void *opaque)
{
    Load *l = opaque;

    for (unsigned i = 0; !qatomic_read(&l->guest_quit); i++) {
        guest_receive(l);
        guest_transmit(l, i % FLOWS);
        g_usleep(50);
    }
    return NULL;
}

/* Both */

static void load_driver_start(Load *l)
{
    QVirtQueue *queues[5];

    if (l->pairs > 1) {
        guest_start_multiqueue(&l->f, queues);
        l->f.guest.rx = queues[0];
        l->f.guest.tx = queues[1];
    } else {
        guest_start_queues(&l->f, l->test->features | GUEST_FEATURES);
        qvirtio_set_driver_ok(&l->f.dev->vdev);
        queues[0] = l->f.guest.rx;
        queues[1] = l->f.guest.tx;
    }
    for (int i = 0; i < l->pairs; i++) {
        rx_init(l, &l->rx[i], queues[2 * i]);
        tx_init(l, &l->tx[i], queues[2 * i + 1]);
    }
}

static void load_driver_restart(Load *l)
{
    guest_stop(&l->f);
    load_driver_start(l);
}

static void load_post(Load *l)
{
    for (int i = 0; i < l->pairs; i++) {
        for (int j = 0; j < RING_LEN; j++) {
            ring_add(l, &l->rx[i], j);
        }
        ring_kick(l, &l->rx[i]);
    }
}

static void load_threads_start(Load *l)
{
    qatomic_set(&l->guest_quit, false);
    qatomic_set(&l->host_quit, false);
    l->host_thread = g_thread_new("host", host_thread, l);
    l->guest_thread = g_thread_new("guest", guest_thread, l);
}

static void load_guest_stop(Load *l)
{
    qatomic_set(&l->guest_quit, true);
    g_thread_join(l->guest_thread);
}

static void load_host_stop(Load *l)
{
    qatomic_set(&l->host_quit, true);
    g_thread_join(l->host_thread);
}

static void load_traffic_start(Load *l)
{
    load_post(l);
    load_threads_start(l);
}

static bool load_arrived(Load *l)
{
    host_receive(l);
    guest_receive(l);
    return !way_in_flight(&l->to_guest) && !way_in_flight(&l->to_host);
}

/* Only the driver's rings are left as they are. */
static void load_traffic_stop(Load *l)
{
    load_host_stop(l);
    load_guest_stop(l);
    WAIT_UNTIL(load_arrived(l));
}

/* Traffic goes on, both ways ... */
static void load_wait(Load *l)
{
    way_wait(&l->to_guest);
    way_wait(&l->to_host);
}

/* ... and does so through vhost. */
static void load_wait_vhost(Load *l)
{
    wait_vhost(&l->f);
    load_wait(l);
}

/* A filter holds all that may be in flight. */
static bool load_held(Load *l)
{
    g_usleep(200);
    return !way_may_send(&l->to_guest) && !way_may_send(&l->to_host);
}

static void load_traffic(Load *l)
{
    load_traffic_start(l);
    load_wait(l);
    load_traffic_stop(l);
}

static void load_init(Load *l, const LoadTest *test)
{
    *l = (Load) {
        .test = test,
        .pairs = MAX(test->pairs, 1),
        .to_guest.port = 1000,
        .to_host.port = 2000,
    };
}

/* The host gets what the threads send, instead of numbered frames. */
static void load_open_host(Fixture *f)
{
    close(f->host);
    f->host = open_host_protocol(f->ifname, ETH_P_IP);
}

static void run_load_test(const void *data)
{
    const LoadTest *test = data;
    g_autofree char *args = g_strconcat(SINK, test->args, NULL);
    g_autofree char *nic_opts = g_strconcat(
        test->pairs > 1 ? ",mq=on" : "", test->nic_opts, NULL);
    Load l;

    load_init(&l, test);
    fixture_init(&l.f, test->pairs > 1 ? "vhost=on,queues=2" : "vhost=on",
                 nic_opts, args);
    load_open_host(&l.f);
    if (!test->no_driver) {
        load_driver_start(&l);
    }
    test->func(&l);
    fixture_close(&l.f);
}

/* QEMU */

/* Filters that let the packets pass */
static const char *const passing[] = {
    REWRITER,
    "-object filter-replay,id=flt,netdev=n0",
    "-object filter-mirror,id=flt,netdev=n0,outdev=sink,queue=tx,"
    "packet-socket=off",
    "-object filter-dump,id=flt,netdev=n0,file=/dev/null,packet-socket=off",
};

static void expect_filter_on(Fixture *f)
{
    expect_datapath(f, "userspace", "filter 'flt' is on");
}

static void switch_on(Fixture *f)
{
    set_status(f, "flt", "on");
    expect_filter_on(f);
}

static void switch_once(Load *l, unsigned i)
{
    Fixture *f = &l->f;

    object_add(f, "%s", passing[i % ARRAY_SIZE(passing)]);
    expect_filter_on(f);
    load_wait(l);
    if (i & 4) {
        set_status(f, "flt", "off");
        load_wait_vhost(l);
        switch_on(f);
    }
    del_object(f, "flt");
    load_wait_vhost(l);
}

static void test_switch(Load *l)
{
    int count = amount(l->test->switches, 3 * l->test->switches);

    load_traffic_start(l);
    wait_vhost(&l->f);
    for (int i = 0; i < count; i++) {
        switch_once(l, i);
    }
    load_traffic_stop(l);
    g_test_message("%d switches: %u frames to the guest, %u from it", count,
                   way_total(l->to_guest.sent), way_total(l->to_host.sent));
}

/*
 * What comes on the second queue goes the same way along the chain: the filter
 * behind one that holds it sees it.  The TAP sends to the queue from which the
 * flow's other direction came.
 */
static void test_multiqueue_direction(Load *l)
{
    g_autofree char *path = g_build_filename(l->f.dir, "dump", NULL);
    uint8_t frame[FRAME_LEN], out[BUFFER_LEN], header[24];
    uint32_t header_len;
    PcapPacket packet;
    FILE *file;

    load_post(l);
    /* It tells when a frame is in the chain, and then held by the next one. */
    object_add(&l->f, "-object filter-dump,id=dump,netdev=n0,file=%s,queue=tx,"
               "packet-socket=off", path);
    object_add(&l->f, BUFFER);
    object_add(&l->f, "-object filter-mirror,id=mir,netdev=n0,outdev=out,"
               "queue=tx,packet-socket=off,vnet_hdr_support=on");
    set_status(&l->f, "flt", "off");
    guest_transmit(l, 1);
    WAIT_UNTIL(load_arrived(l));

    /* The same flow with its ends exchanged */
    way_send(&l->to_host, 1, frame);
    stq_be_p(frame + ADDRESSES_AT, ror64(ldq_be_p(frame + ADDRESSES_AT), 32));
    stl_be_p(frame + PORTS_AT, ror32(ldl_be_p(frame + PORTS_AT), 16));
    set_status(&l->f, "flt", "on");
    g_assert_cmpint(send(l->f.host, frame, FRAME_LEN, 0), ==, FRAME_LEN);
    file = open_pcap(path);
    read_pcap(file, &packet, out, sizeof(out));
    fclose(file);
    set_status(&l->f, "flt", "off");
    g_assert_cmpuint(read_stream(l->f.out, out, sizeof(out), header,
                                 &header_len), ==, FRAME_LEN);
    g_assert_cmpmem(out, FRAME_LEN, frame, FRAME_LEN);
    g_assert_cmpuint(guest_used_idx(&l->f.guest, l->rx[1].vq), ==, 1);
    g_assert_cmpuint(guest_used_idx(&l->f.guest, l->rx[0].vq), ==, 0);
}

/*
 * The property tells why vhost is not in use, or nothing if it is.  So does the
 * trace event at each switch: what is in @trace since the last call is one.
 */
static void expect_switch(Fixture *f, FILE *trace, const char *reason)
{
    const char *datapath = *reason ? "userspace" : "vhost";
    g_autofree char *line = g_strdup_printf("virtio_net_datapath nic: %s %s\n",
                                            datapath, reason);
    char got[4096];

    expect_datapath(f, datapath, reason);
    if (HAS_TRACE_LOG) {
        clearerr(trace);
        got[fread(got, 1, sizeof(got) - 1, trace)] = 0;
        g_assert_cmpstr(got, ==, line);
    }
}

/* What is done, and why vhost is not in use then: the last filter brings it. */
static void test_last(Fixture *f)
{
    static const struct {
        const char *command;
        const char *reason;
    } steps[] = {
        /* This one does not need it. */
        { "object_add filter-redirector,id=cap,netdev=n0,outdev=out", "" },
        { "object_add filter-buffer,id=a,netdev=n0,interval=1000",
          "filter 'a' is on" },
        { "object_add filter-rewriter,id=b,netdev=n0", "filter 'a' is on" },
        { "object_add filter-rewriter,id=c,netdev=n0,status=off",
          "filter 'a' is on" },
        { "qom-set /objects/a status off", "filter 'b' is on" },
        { "object_del b", "" },
        { "qom-set /objects/c status on", "filter 'c' is on" },
        { "stop", "filter 'c' is on" },
        { "qom-set /objects/c status off", "the VM is stopped" },
        { "cont", "" },
        { "stop", "the VM is stopped" },
        { "qom-set /objects/a status on", "filter 'a' is on" },
        { "cont", "filter 'a' is on" },
        { "object_del a", "" },
        { "set_link n0 off", "the link is down" },
        { "set_link n0 on", "" },
        { "set_link nic off", "the link is down" },
        { "set_link nic on", "" },
        { "qom-set /objects/c status on", "filter 'c' is on" },
        /* It goes with its netdev. */
        { "netdev_del n0", "the link is down" },
    };
    g_autofree char *path = g_build_filename(f->dir, "trace", NULL);
    const char *last = "";
    FILE *trace = NULL;

    if (HAS_TRACE_LOG) {
        hmp(f, "logfile %s", path);
        hmp(f, "log trace:virtio_net_datapath");
        trace = fopen(path, "r");
        g_assert_nonnull(trace);
    }
    expect_datapath(f, "userspace", "the driver is not ready");
    guest_start(f);
    expect_switch(f, trace, "");
    object_add(f, REWRITER);
    expect_switch(f, trace, "filter 'flt' is on");
    host_send_taken(f, 0, 1);
    del_object(f, "flt");
    expect_switch(f, trace, "packets wait in QEMU");
    guest_post(f, 1);
    wait_vhost(f);
    expect_switch(f, trace, "");
    for (int i = 0; i < ARRAY_SIZE(steps); i++) {
        const char *reason = steps[i].reason;

        g_test_message("%s", steps[i].command);
        hmp(f, "%s", steps[i].command);
        if (!*reason != !*last) {
            expect_switch(f, trace, reason);
        } else {
            expect_datapath(f, *reason ? "userspace" : "vhost", reason);
        }
        last = reason;
    }
    if (trace) {
        fclose(trace);
    }
}

/*
 * vhost may stop when it has told the driver not to notify it, and has not
 * looked again yet.
 */
static void test_left_over(Load *l)
{
    for (int i = 0; i < 3; i++) {
        guest_fill(l, i);
        object_add(&l->f, REWRITER);
        WAIT_UNTIL(load_arrived(l));
        del_object(&l->f, "flt");
        wait_vhost(&l->f);
    }
}

/* The guest has no buffers: vhost waits for the packets that QEMU has read. */
static void test_delayed(Fixture *f)
{
    for (uint32_t n = 0; n < 60; n += 20) {
        object_add(f, REWRITER);
        host_send_taken(f, n, 10);
        /* A stop drops what QEMU has read, and reading goes on then. */
        guest_send(f, 1000 + n, 1);
        expect_host(f, 1000 + n, 1);
        del_object(f, "flt");
        expect_datapath(f, "userspace", "packets wait in QEMU");
        guest_send(f, 1001 + n, 1);
        expect_host(f, 1001 + n, 1);
        if (n == 20) {
            object_add(f, REWRITER);
            del_object(f, "flt");
            expect_datapath(f, "userspace", "packets wait in QEMU");
        }
        guest_post(f, 20);
        wait_vhost(f);
        host_send(f, n + 10, 10);
        expect_guest(f, n, 20);
    }
}

/* What QEMU has taken before there is a driver does not come, but all else. */
static void test_before_driver(Load *l)
{
    host_send_taken(&l->f, 0, 10);
    guest_start(&l->f);
    guest_post(&l->f, 20);
    host_send(&l->f, 10, 10);
    expect_guest(&l->f, 1, 19);
}

static void migrate_to(Fixture *source, Fixture *target)
{
    hmp(target, "migrate_incoming unix:%s/migration", target->dir);
    hmp(source, "migrate -d unix:%s/migration", target->dir);
    qtest_qmp_eventwait(target->qts, "RESUME");
}

/* The rings are where they were, but in the memory of the target. */
static void expect_guest_at(Fixture *target, Fixture *source, uint32_t first,
                            uint32_t count)
{
    Fixture at = *source;

    at.guest.ram = target->guest.ram;
    expect_guest(&at, first, count);
}

/* The same when the driver comes with a migration: no frame comes damaged. */
static void test_before_migration(Fixture *source)
{
    Fixture target;

    guest_post(source, 20);
    fixture_start(&target, "-incoming defer");
    host_send_taken(&target, 0, 10);
    migrate_to(source, &target);

    wait_vhost(&target);
    host_send(&target, 10, 10);
    expect_guest_at(&target, source, 1, 19);
    fixture_close(&target);
}

static int unread(int fd)
{
    int left;

    g_assert_cmpint(ioctl(fd, SIOCOUTQ, &left), ==, 0);
    return left;
}

/* What a filter has put in by then is for the guest, and it gets it. */
static void test_injected_before_migration(Fixture *source)
{
    Fixture target;

    guest_post(source, 20);
    fixture_start(&target, "-incoming defer " INJECT "tx,packet-socket=off");
    in_send(&target, 0, 5);
    WAIT_UNTIL(!unread(target.in));
    migrate_to(source, &target);
    in_send(&target, 5, 5);
    expect_guest_at(&target, source, 0, 10);
    fixture_close(&target);
}

/* The same at a continuation: without a filter, too, nothing is lost. */
static void test_continued(Fixture *f)
{
    for (int i = 0; i < 5; i++) {
        vm_stop(f);
        host_send_taken(f, 20 * i, 10);
        if (i & 1) {
            guest_post(f, 20);
            /* What it told at last, QEMU may handle when it has stopped. */
            f->dev->vdev.bus->virtqueue_kick(&f->dev->vdev, f->guest.rx);
            vm_cont(f);
        } else {
            vm_cont(f);
            expect_datapath(f, "userspace", "packets wait in QEMU");
            guest_post(f, 20);
        }
        wait_vhost(f);
        host_send(f, 20 * i + 10, 10);
        expect_guest(f, 20 * i, 20);
    }
}

static void test_stop_cont(Load *l)
{
    load_traffic_start(l);
    for (int i = 0; i < amount(20, 60); i++) {
        object_add(&l->f, REWRITER);
        way_wait(&l->to_guest);
        vm_stop(&l->f);
        if (i & 1) {
            vm_cont(&l->f);
            del_object(&l->f, "flt");
        } else {
            del_object(&l->f, "flt");
            vm_cont(&l->f);
        }
        load_wait_vhost(l);
    }
    load_traffic_stop(l);
}

static void test_reset(Load *l)
{
    for (int i = 0; i < 6; i++) {
        load_traffic_start(l);
        way_wait(&l->to_guest);
        object_add(&l->f, REWRITER);
        load_wait(l);
        if (i & 1) {
            del_object(&l->f, "flt");
        }
        load_traffic_stop(l);
        load_driver_restart(l);
        if (!(i & 1)) {
            expect_filter_on(&l->f);
            del_object(&l->f, "flt");
        }
        expect_datapath(&l->f, "vhost", "");
    }
}

/* While a migration logs what is written to memory */
static void test_migration(Load *l)
{
    load_traffic_start(l);
    /* So slow that none of them stops the VM */
    hmp(&l->f, "migrate_set_parameter max-bandwidth 1000B");
    for (int i = 0; i < 5; i++) {
        hmp(&l->f, "migrate -d \"exec:cat > /dev/null\"");
        expect_status(&l->f, "query-migrate", "active");
        switch_once(l, 2 * i);
        switch_once(l, 2 * i + 1);
        expect_status(&l->f, "query-migrate", "active");
        if (i & 1) {
            object_add(&l->f, REWRITER);
        }
        migration_cancel(&l->f);
        if (i & 1) {
            del_object(&l->f, "flt");
        }
        load_wait_vhost(l);
    }
    load_traffic_stop(l);
}

/*
 * A migration that completes, under load
 *
 * What is in the source's TAP when the VM stops is lost to the guest with any
 * migration, and so is what comes there later.  But:
 *
 * - All that has been taken out of that TAP while the VM ran comes to the
 *   guest, once and in order.
 * - So does all that is sent to the target's TAP, with nothing in between.
 * - All that the guest sends comes to the host, once and in order: first from
 *   the source's TAP, then from the target's.
 *
 * Both VMs have the same memory, in a file.  What our driver writes there is
 * not seen by QEMU's log of dirty pages, so copies of it would be outdated.
 */

static void memory_start(Fixture *f, const char *path, const char *args)
{
    g_autofree char *all = g_strdup_printf(
        "-object memory-backend-file,id=ram0,size=128M,share=on,mem-path=%s "
        "-machine memory-backend=ram0 %s", path, args);

    fixture_start(f, all);
    load_open_host(f);
    hmp(f, "migrate_set_capability x-ignore-shared on");
}

/* Through @fd, which is closed */
static void migrate_fd(Fixture *f, const char *command, int fd)
{
    qtest_qmp_fds_assert_success(f->qts, &fd, 1, "{'execute': 'getfd',"
                                 " 'arguments': {'fdname': 'migration'}}");
    close(fd);
    qtest_qmp_assert_success(f->qts, "{'execute': %s, 'arguments':"
                             " {'uri': 'fd:migration'}}", command);
}

/* The driver goes on as it is, with the device of the target. */
static void load_move(Load *l, Fixture *target)
{
    QGuestAllocator alloc = target->alloc;
    QVirtioDevice *vdev = &target->dev->vdev;

    vdev->features = l->f.dev->vdev.features;
    l->rx[0].vq->vdev = l->tx[0].vq->vdev = vdev;
    target->guest = l->f.guest;
    target->alloc = l->f.alloc;
    memset(&l->f.guest, 0, sizeof(l->f.guest));
    l->f.alloc = alloc;
    fixture_close(&l->f);
    l->f = *target;
}

static void load_migrate(Load *l, Fixture *target)
{
    /*
     * QEMU takes one that waits until the VM runs again.  If it does so when
     * the VM is about to stop, the stop drops that one, and QEMU takes another.
     */
    uint64_t dropped = vhost_started(&l->f) ? 1 : 2;
    int size = 16 * KiB;
    uint64_t taken;
    uint32_t came;
    int pair[2];

    /* The source has more to send than this, and so waits for the target. */
    g_assert_cmpint(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), ==, 0);
    g_assert_cmpint(setsockopt(pair[0], SOL_SOCKET, SO_SNDBUF, &size,
                               sizeof(size)), ==, 0);
    migrate_fd(&l->f, "migrate", pair[0]);
    expect_status(&l->f, "query-migrate", "active");
    load_wait(l);
    expect_status(&l->f, "query-migrate", "active");

    /* As if its CPU had stopped before it could notify the device */
    load_guest_stop(l);
    guest_fill(l, 0);
    migrate_fd(target, "migrate-incoming", pair[1]);
    expect_status(&l->f, "query-status", "postmigrate");
    load_host_stop(l);
    expect_status(target, "query-status", "running");

    host_receive(l);
    taken = statistic(l->f.ifname, "tx_packets");
    load_move(l, target);
    guest_receive(l);
    came = way_total(l->to_guest.received) - l->elsewhere;
    g_test_message("%u frames to the source's TAP, %" PRIu64 " taken out, "
                   "%u came to the guest",
                   way_total(l->to_guest.sent) - l->elsewhere, taken, came);
    g_assert_cmpuint(taken - came, <=, dropped);
    way_forget(&l->to_guest);
    l->elsewhere = way_total(l->to_guest.received);
}

/* From a source that runs to a target, each with a filter or none ("") */
static void migrate_once(Load *l, const char *path, const char *source,
                         const char *target, bool off)
{
    g_autofree char *args = g_strdup_printf("-incoming defer %s", target);
    Fixture f;

    memory_start(&f, path, args);
    if (*source) {
        object_add(&l->f, "%s", source);
        expect_filter_on(&l->f);
    }
    load_migrate(l, &f);
    load_threads_start(l);
    if (*target) {
        expect_filter_on(&l->f);
        if (g_str_equal(target, BUFFER)) {
            WAIT_UNTIL(load_held(l));
        } else {
            load_wait(l);
        }
        if (off) {
            set_status(&l->f, "flt", "off");
            load_wait_vhost(l);
        }
        del_object(&l->f, "flt");
    } else {
        expect_datapath(&l->f, "vhost", "");
    }
    load_wait_vhost(l);
}

static void test_migrated(void)
{
    static const LoadTest test = { .features = EVENT_IDX };
    g_autofree char *path = NULL;
    int fd = g_file_open_tmp("filter-fallback-XXXXXX", &path, NULL);
    Load l;

    g_assert_cmpint(fd, >=, 0);
    g_assert_cmpint(ftruncate(fd, GUEST_RAM), ==, 0);
    load_init(&l, &test);
    memory_start(&l.f, path, "");
    l.f.guest.ram = mmap(NULL, GUEST_RAM, PROT_READ | PROT_WRITE, MAP_SHARED,
                         fd, 0);
    g_assert_true(l.f.guest.ram != MAP_FAILED);
    close(fd);
    load_driver_start(&l);
    load_traffic_start(&l);
    wait_vhost(&l.f);
    for (int i = 0; i < amount(1, 3); i++) {
        migrate_once(&l, path, REWRITER, REWRITER, true);
        migrate_once(&l, path, REWRITER, REWRITER, false);
        migrate_once(&l, path, REWRITER, "", false);
        migrate_once(&l, path, "", BUFFER, true);
        migrate_once(&l, path, REWRITER, BUFFER, false);
    }
    load_traffic_stop(&l);
    fixture_close(&l.f);
    unlink(path);
}

/* All queues, when all that was sent has arrived */
static void load_move_queues(Load *l)
{
    for (int i = 0; i < l->pairs; i++) {
        rx_init(l, &l->rx[i], guest_move_queue(&l->f, l->rx[i].vq));
        tx_init(l, &l->tx[i], guest_move_queue(&l->f, l->tx[i].vq));
    }
    l->f.guest.rx = l->rx[0].vq;
    l->f.guest.tx = l->tx[0].vq;
}

/*
 * A guest that resets its queues, which it may do one by one, while vhost is
 * not in use, and has never been if the filter is on from the beginning.
 */
static void test_queue_reset(Load *l)
{
    if (l->test->features & ~l->f.dev->vdev.features & RING_RESET) {
        g_test_skip("vhost cannot reset one queue");
        return;
    }
    switch_on(&l->f);
    load_move_queues(l);
    load_traffic(l);
    for (int i = 0; i < 5; i++) {
        load_move_queues(l);
        load_traffic(l);
        set_status(&l->f, "flt", "off");
        wait_vhost(&l->f);
        load_move_queues(l);
        load_traffic(l);
        expect_datapath(&l->f, "vhost", "");
        switch_on(&l->f);
    }
}

/* A link that is down keeps vhost from being started as well. */
static void test_queue_reset_link_down(Load *l)
{
    hmp(&l->f, "set_link n0 off");
    load_driver_start(l);
    expect_datapath(&l->f, "userspace", "the link is down");
    load_move_queues(l);
    hmp(&l->f, "set_link n0 on");
    expect_datapath(&l->f, "vhost", "");
    load_traffic(l);
}

/* Without VIRTIO_NET_F_MQ the third queue is not vhost's, but the control's. */
static void test_queue_reset_control(Load *l)
{
    QVirtQueue control = { .index = 2 };

    l->pairs = 1;
    load_driver_start(l);
    expect_datapath(&l->f, "vhost", "");
    guest_disable_queue(&l->f, &control);
    load_traffic(l);
}

/* vhost waits until there is room for a packet: in another ring, then. */
static void test_queue_reset_delayed(Fixture *f)
{
    host_send_taken(f, 0, 10);
    set_status(f, "flt", "off");
    expect_datapath(f, "userspace", "packets wait in QEMU");
    f->guest.rx = guest_move_queue(f, f->guest.rx);
    f->guest.tx = guest_move_queue(f, f->guest.tx);
    expect_datapath(f, "userspace", "packets wait in QEMU");
    guest_send(f, 1000, 5);
    expect_host(f, 1000, 5);
    guest_post(f, 20);
    wait_vhost(f);
    host_send(f, 10, 10);
    expect_guest(f, 0, 20);
    guest_send(f, 1005, 5);
    expect_host(f, 1005, 5);
}

static void load_kick(Load *l)
{
    for (int i = 0; i < l->pairs; i++) {
        l->f.dev->vdev.bus->virtqueue_kick(&l->f.dev->vdev, l->rx[i].vq);
        l->f.dev->vdev.bus->virtqueue_kick(&l->f.dev->vdev, l->tx[i].vq);
    }
    /* QEMU has handled what came before that. */
    qobject_unref(qtest_qmp(l->f.qts, "{'execute': 'query-status'}"));
}

/* A queue that is disabled is kicked, and vhost comes and goes meanwhile. */
static void test_queue_disabled(Load *l)
{
    expect_filter_on(&l->f);
    load_traffic(l);
    for (int i = 0; i < 4; i++) {
        for (int j = 0; j < l->pairs; j++) {
            guest_disable_queue(&l->f, l->rx[j].vq);
            guest_disable_queue(&l->f, l->tx[j].vq);
        }
        load_kick(l);
        for (int j = 0; j < 2 + i % 2; j++) {
            set_status(&l->f, "flt", j % 2 ? "on" : "off");
            g_assert_cmpint(vhost_started(&l->f), ==, !(j % 2));
            load_kick(l);
        }
        load_move_queues(l);
        load_kick(l);
        load_traffic(l);
        switch_on(&l->f);
    }
}

/*
 * A driver that gives up VIRTIO_NET_F_MQ while it runs, which is possible
 * without FEATURES_OK: the second pair of queues is deleted.
 */
static void test_queues_deleted(Load *l)
{
    QVirtioDevice *vdev = &l->f.dev->vdev;

    load_traffic(l);
    vdev->bus->set_status(vdev, VIRTIO_CONFIG_S_ACKNOWLEDGE |
                                VIRTIO_CONFIG_S_DRIVER |
                                VIRTIO_CONFIG_S_DRIVER_OK);
    vdev->bus->set_features(vdev, vdev->features &
                                  ~(1ull << VIRTIO_NET_F_MQ));
    /*
     * The third queue is the control queue now, and has no ring yet.  That is
     * an error, after which QEMU uses no queue until the driver is reset.
     */
    for (int i = 0; i < 3; i++) {
        load_kick(l);
        set_status(&l->f, "flt", "off");
        expect_datapath(&l->f, "vhost", "");
        load_kick(l);
        switch_on(&l->f);
    }
    load_driver_restart(l);
    load_traffic(l);
}

/* The reset of a machine, whose filters go on as they are */

/* QEMU, or vhost, has taken all that was sent to the TAP. */
static void wait_taken(Fixture *f, uint32_t sent)
{
    WAIT_UNTIL(statistic(f->ifname, "tx_packets") >= sent);
}

/*
 * What a filter holds when the machine is reset is not in the way.  If it is
 * released before there is another driver, it ends, as it has the header that
 * the old one used; what the new one uses is the same here.
 */
static void test_machine_reset_held(Load *l)
{
    for (int i = 0; i < 4; i++) {
        bool before = i & 1, deleted = i & 2;
        uint64_t written;

        load_traffic_start(l);
        wait_vhost(&l->f);
        object_add(&l->f, BUFFER);
        WAIT_UNTIL(load_held(l));
        load_guest_stop(l);
        load_host_stop(l);
        wait_taken(&l->f, way_total(l->to_guest.sent));
        vm_reset(&l->f);
        if (!before) {
            load_driver_start(l);
            load_post(l);
        }
        expect_filter_on(&l->f);
        written = statistic(l->f.ifname, "rx_packets");
        if (deleted) {
            del_object(&l->f, "flt");
        } else {
            set_status(&l->f, "flt", "off");
        }
        if (before) {
            g_assert_cmpuint(statistic(l->f.ifname, "rx_packets"), ==, written);
            expect_datapath(&l->f, "userspace", "the driver is not ready");
            way_forget(&l->to_guest);
            way_forget(&l->to_host);
            load_driver_start(l);
            load_post(l);
        }
        wait_vhost(&l->f);
        load_threads_start(l);
        load_wait(l);
        load_traffic_stop(l);
        if (!deleted) {
            del_object(&l->f, "flt");
        }
        load_driver_restart(l);
    }
}

/* What the filter has taken without a driver has another header. */
static void test_held_before_driver(Fixture *f)
{
    host_send(f, 0, 10);
    wait_taken(f, 10);
    guest_start(f);
    guest_post(f, 20);
    host_send(f, 10, 10);
    wait_taken(f, 20);
    set_status(f, "flt", "off");
    wait_vhost(f);
    expect_guest(f, 10, 10);
}

/* Snapshots, which save the device's state, and load it */

/* The only job that there is */
static bool job_concluded(Fixture *f)
{
    g_autoptr(QDict) rsp = qtest_qmp(f->qts, "{'execute': 'query-jobs'}");
    QObject *job = qlist_peek(qdict_get_qlist(rsp, "return"));
    QDict *dict = qobject_to(QDict, job);

    g_assert_cmpstr(qdict_get_try_str(dict, "error"), ==, NULL);
    return g_str_equal(qdict_get_str(dict, "status"), "concluded");
}

static void wait_job(Fixture *f)
{
    WAIT_UNTIL(job_concluded(f));
    qtest_qmp_assert_success(f->qts, "{'execute': 'job-dismiss', 'arguments':"
                             " {'id': 'job'}}");
}

/* The node "disk" */
static void add_disk(Fixture *f)
{
    g_autofree char *path = g_build_filename(f->dir, "disk", NULL);

    g_assert_true(g_file_set_contents(path, "", 0, NULL));
    qtest_qmp_assert_success(f->qts, "{'execute': 'blockdev-add', 'arguments':"
                             " {'driver': 'file', 'node-name': 'file',"
                             "  'filename': %s}}", path);
    qtest_qmp_assert_success(f->qts, "{'execute': 'blockdev-create',"
                             " 'arguments': {'job-id': 'job', 'options':"
                             " {'driver': 'qcow2', 'file': 'file',"
                             "  'size': %d}}}", (int)(256 * MiB));
    wait_job(f);
    qtest_qmp_assert_success(f->qts, "{'execute': 'blockdev-add', 'arguments':"
                             " {'driver': 'qcow2', 'node-name': 'disk',"
                             "  'file': 'file'}}");
}

/* What was saved with a filter comes back without, and the reverse. */
static void test_snapshot(Load *l)
{
    Fixture *f = &l->f;

    add_disk(f);
    for (int i = 0; i < 8; i++) {
        bool saved = i & 1, loaded = i & 2, stopped = i & 4;

        load_traffic(l);
        object_add(f, REWRITER);
        set_status(f, "flt", saved ? "on" : "off");
        hmp(f, "savevm one");
        set_status(f, "flt", loaded ? "on" : "off");
        if (stopped) {
            vm_stop(f);
        }
        hmp(f, "loadvm one");
        hmp(f, "delvm one");
        if (stopped) {
            g_assert_false(vhost_started(f));
            vm_cont(f);
        }
        g_assert_cmpint(vhost_started(f), ==, !loaded);
        /* The driver's memory is that of the snapshot, with the same rings. */
        load_threads_start(l);
        load_wait(l);
        del_object(f, "flt");
        load_wait_vhost(l);
        load_traffic_stop(l);
        load_driver_restart(l);
    }
}

/* A NIC that does not use vhost is all right with any filter. */
static void test_other_nic(void)
{
    QTestState *qts = qtest_init("-nodefaults -machine pc -netdev tap,id=n0,"
                                 "ifname=tapother,script=no,downscript=no,"
                                 "vhost=on -device e1000,netdev=n0 " REWRITER);

    qtest_qmp_assert_success(qts, "{'execute': 'object-del', 'arguments':"
                             " {'id': 'flt'}}");
    qtest_quit(qts);
}

/* As much of a vhost-user backend as QEMU needs to create the netdev */
static void *vhost_user_thread(void *opaque)
{
    /* To VHOST_USER_GET_FEATURES, a reply of 8 bytes: no feature */
    const uint32_t reply[] = { 1, 1 | 1 << 2, 8, 0, 0 };
    int fd = connect_to(opaque, "vhost-user");

    /* It asks more than once; other requests have no reply then. */
    for (int i = 0; i < 16; i++) {
        g_assert_cmpint(write(fd, reply, sizeof(reply)), ==, sizeof(reply));
    }
    return GINT_TO_POINTER(fd);
}

/* One that has no way through QEMU is not. */
static void test_refused(void)
{
    Fixture f = { .dir = g_dir_make_tmp("filter-fallback-XXXXXX", NULL) };
    GThread *backend = g_thread_new("backend", vhost_user_thread, &f);
    g_autofree char *path = g_build_filename(f.dir, "vhost-user", NULL);
    QDict *rsp;

    f.qts = qtest_initf("-nodefaults -machine none -chardev socket,id=c,"
                        "path=%s,server=on,wait=off "
                        "-netdev vhost-user,id=n0,chardev=c", path);
    rsp = qtest_qmp_assert_failure_ref(f.qts, "{'execute': 'object-add',"
        " 'arguments': {'qom-type': 'filter-rewriter', 'id': 'rew',"
        " 'netdev': 'n0'}}");
    g_assert_cmpstr(qdict_get_str(rsp, "desc"), ==,
                    "filter-rewriter 'rew': Vhost is not supported: the "
                    "packets of netdev 'n0' of type 'vhost-user' cannot pass "
                    "through QEMU; use a netdev of type 'tap'");
    qobject_unref(rsp);
    qtest_quit(f.qts);
    close(GPOINTER_TO_INT(g_thread_join(backend)));
    unlink(path);
    rmdir(f.dir);
    g_free(f.dir);
}

static const LoadTest load_tests[] = {
    { "left-over", test_left_over, .nic_opts = ",ioeventfd=off", .pairs = 2 },
    { "before-driver/vhost", test_before_driver, .no_driver = true },
    { "before-driver/filter", test_before_driver, REWRITER,
      .no_driver = true },
    { "switch/plain", test_switch, .switches = 20 },
    { "switch/event-idx", test_switch, .features = EVENT_IDX,
      .switches = 20 },
    /* Nobody kicks for what was in the rings before the switch. */
    { "switch/no-ioeventfd", test_switch, .nic_opts = ",ioeventfd=off",
      .features = EVENT_IDX, .switches = 10 },
    { "switch/multiqueue", test_switch, .pairs = 2, .switches = 20 },
    { "multiqueue-direction", test_multiqueue_direction, .pairs = 2 },
    { "stop-cont", test_stop_cont, .features = EVENT_IDX },
    { "reset", test_reset },
    { "migration", test_migration },
    { "queue-reset", test_queue_reset, REWRITER ",status=off",
      .features = RING_RESET },
    { "queue-reset-first", test_queue_reset, REWRITER, .pairs = 2 },
    { "queue-reset-link-down", test_queue_reset_link_down, .pairs = 2,
      .no_driver = true },
    { "queue-reset-control", test_queue_reset_control, .pairs = 2,
      .no_driver = true },
    { "queue-disabled/ioeventfd", test_queue_disabled, REWRITER, .pairs = 2 },
    { "queue-disabled/no-ioeventfd", test_queue_disabled, REWRITER,
      ",ioeventfd=off", .pairs = 2 },
    { "queues-deleted", test_queues_deleted, REWRITER, .pairs = 2 },
    { "machine-reset/held", test_machine_reset_held },
    { "snapshot", test_snapshot, .features = EVENT_IDX },
};

int main(int argc, char **argv)
{
    rig_init(&argc, &argv, "filter-fallback");
    for (int i = 0; i < ARRAY_SIZE(load_tests); i++) {
        rig_add_data(load_tests[i].path, g_memdup2(&load_tests[i],
                     sizeof(load_tests[i])), run_load_test);
    }
    rig_add_vm("last", "", test_last);
    rig_add_guest("delayed", "", test_delayed);
    rig_add_guest("before-migration", "", test_before_migration);
    rig_add_guest("injected-before-migration", "",
                  test_injected_before_migration);
    rig_add_guest("continued", "", test_continued);
    rig_add("migrated", test_migrated);
    rig_add_guest("queue-reset-delayed", REWRITER, test_queue_reset_delayed);
    rig_add_vm("machine-reset/held-before-driver", BUFFER,
               test_held_before_driver);
    rig_add("other-nic", test_other_nic);
    rig_add("refused", test_refused);
    return g_test_run();
}
