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
#include "qemu/bswap.h"
#include "qemu/units.h"
#include "qobject/qdict.h"
#include "qobject/qjson.h"
#include "standard-headers/linux/virtio_config.h"
#include "standard-headers/linux/virtio_net.h"
#include "standard-headers/linux/virtio_pci.h"
#include "standard-headers/linux/virtio_ring.h"

#define NIC_PATH "/machine/peripheral/nic/virtio-backend"
#define GUEST_RAM (128 * MiB)

/* Ethernet, IPv4 and UDP; the number comes behind. */
#define NUMBER_AT (14 + 20 + 8)
#define HEADER 12               /* of virtio-net */
#define FLOWS 4
#define MAX_PAIRS 2

/* So few that the TAP's queue never overflows */
#define IN_FLIGHT 150

/* So few that the guest, which takes none any more, has buffers for all */
#define IN_FLIGHT_TO_STOP 250

/* Frames each way between two switches */
#define BETWEEN 30

static int rounds(int quick, int slow)
{
    return g_test_slow() ? slow : quick;
}

/* A ring of a driver in mapped memory, as simple as it can be */
typedef struct Ring {
    QVirtQueue *vq;
    uint64_t buffer[RING_LEN];
    uint64_t table[RING_LEN];   /* indirect descriptors */
    uint16_t added;
    uint16_t kicked;
    uint16_t used;
} Ring;

/* One way */
typedef struct Way {
    uint32_t sent[FLOWS];       /* atomic, like the next one */
    uint32_t received[FLOWS];
} Way;

typedef struct Load {
    Fixture f;
    uint64_t features;
    unsigned pairs;
    Ring rx[MAX_PAIRS];
    Ring tx[MAX_PAIRS];
    int host;
    Way to_guest;
    Way to_host;
    GThread *host_thread;
    GThread *guest_thread;
    uint32_t elsewhere;         /* came to the guest by TAPs before this one */
    bool guest_takes;           /* atomic, like the next two */
    bool guest_quit;
    bool host_quit;
} Load;

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

static void way_frame(Way *way, unsigned flow, uint8_t *frame, bool from_guest)
{
    static const uint8_t head[] = {
        0x52, 0x54, 0x00, 0x12, 0x34, 0x56, 0x02, 0, 0, 0, 0, 1, 0x08, 0x00,
        0x45, 0x00, 0x00, FRAME_LEN - 14, 0, 0, 0, 0, 64, IPPROTO_UDP, 0, 0,
        192, 0, 2, 1, 192, 0, 2, 2,
        0, 0, 0x10, 0x00, 0x00, FRAME_LEN - 34, 0, 0,
    };

    memset(frame, 0, FRAME_LEN);
    memcpy(frame, head, sizeof(head));
    stw_be_p(frame + 34, (from_guest ? 2000 : 1000) + flow);
    stl_be_p(frame + NUMBER_AT, qatomic_read(&way->sent[flow]));
}

static void way_sent(Way *way, unsigned flow)
{
    qatomic_set(&way->sent[flow], way->sent[flow] + 1);
}

static void way_arrived(Way *way, const uint8_t *frame, bool from_guest)
{
    unsigned flow = lduw_be_p(frame + 34) - (from_guest ? 2000 : 1000);

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

/* Wait until @count more frames have arrived. */
static void way_wait(Way *way, uint32_t count)
{
    gint64 end = g_get_monotonic_time() + TIMEOUT_US;
    uint32_t before = way_total(way->received);

    while (way_total(way->received) - before < count) {
        g_assert_cmpint(g_get_monotonic_time(), <, end);
        g_usleep(200);
    }
}

/* The host */

static int host_open(const char *ifname)
{
    struct sockaddr_ll addr = {
        .sll_family = AF_PACKET,
        .sll_protocol = htons(ETH_P_IP),
        .sll_ifindex = if_nametoindex(ifname),
    };
    int fd = socket(AF_PACKET, SOCK_RAW, 0);

    g_assert_cmpint(fd, >=, 0);
    g_assert_cmpint(bind(fd, (struct sockaddr *)&addr, sizeof(addr)), ==, 0);
    return fd;
}

static void host_receive(Load *l)
{
    uint8_t frame[BUFFER_LEN];
    struct sockaddr_ll from;
    socklen_t len = sizeof(from);

    while (recvfrom(l->host, frame, sizeof(frame), MSG_DONTWAIT,
                    (struct sockaddr *)&from, &len) > 0) {
        if (from.sll_pkttype != PACKET_OUTGOING) {
            way_arrived(&l->to_host, frame, true);
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
            way_frame(&l->to_guest, i % FLOWS, frame, false);
            g_assert_cmpint(send(l->host, frame, FRAME_LEN, 0), ==, FRAME_LEN);
            way_sent(&l->to_guest, i % FLOWS);
        } else {
            g_usleep(100);
        }
    }
    return NULL;
}

/* The guest */

static bool ring_event_idx(Load *l)
{
    return l->features & 1ull << VIRTIO_RING_F_EVENT_IDX;
}

static void ring_kick(Load *l, Ring *r)
{
    QVirtQueue *vq = r->vq;
    uint16_t *avail_event = (void *)(l->f.guest.ram + vq->used + 4 +
                                     8 * vq->size);
    bool kick;

    if (!ring_event_idx(l)) {
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

static struct vring_desc *ring_desc(Load *l, Ring *r, uint16_t head)
{
    return (struct vring_desc *)(l->f.guest.ram + r->vq->desc) + head;
}

static void ring_init(Load *l, Ring *r, QVirtQueue *vq)
{
    r->vq = vq;
    r->added = r->kicked = r->used = 0;
    g_assert_cmpuint(vq->size, ==, RING_LEN);
    for (int i = 0; i < RING_LEN; i++) {
        if (!r->buffer[i]) {
            r->buffer[i] = guest_alloc(&l->f.alloc, BUFFER_LEN);
            r->table[i] = guest_alloc(&l->f.alloc,
                                      2 * sizeof(struct vring_desc));
        }
    }
}

static void rx_init(Load *l, Ring *r, QVirtQueue *vq)
{
    ring_init(l, r, vq);
    for (int i = 0; i < RING_LEN; i++) {
        struct vring_desc *desc = ring_desc(l, r, i);

        desc->addr = cpu_to_le64(r->buffer[i]);
        desc->len = cpu_to_le32(BUFFER_LEN);
        desc->flags = cpu_to_le16(VRING_DESC_F_WRITE);
    }
}

static void rx_post(Load *l, Ring *r)
{
    for (int i = 0; i < RING_LEN; i++) {
        ring_add(l, r, i);
    }
    ring_kick(l, r);
}

/* Header and frame: two descriptors, or an indirect one for both */
static void tx_init(Load *l, Ring *r, QVirtQueue *vq)
{
    bool indirect = l->features & 1ull << VIRTIO_RING_F_INDIRECT_DESC;

    ring_init(l, r, vq);
    for (int i = 0; i < RING_LEN; i += 2) {
        struct vring_desc *desc = ring_desc(l, r, i);

        if (indirect) {
            desc->addr = cpu_to_le64(r->table[i]);
            desc->len = cpu_to_le32(2 * sizeof(*desc));
            desc->flags = cpu_to_le16(VRING_DESC_F_INDIRECT);
            desc = (void *)(l->f.guest.ram + r->table[i]);
        }
        desc[0].addr = cpu_to_le64(r->buffer[i]);
        desc[0].len = cpu_to_le32(HEADER);
        desc[0].flags = cpu_to_le16(VRING_DESC_F_NEXT);
        desc[0].next = cpu_to_le16(indirect ? 1 : i + 1);
        desc[1].addr = cpu_to_le64(r->buffer[i] + HEADER);
        desc[1].len = cpu_to_le32(FRAME_LEN);
        desc[1].flags = 0;
    }
}

static unsigned ring_take(Load *l, Ring *r)
{
    struct vring_used *used = (void *)(l->f.guest.ram + r->vq->used);
    uint16_t idx = guest_used_idx(&l->f.guest, r->vq);
    unsigned count = (uint16_t)(idx - r->used);

    for (; r->used != idx; r->used++) {
        unsigned at = r->used % RING_LEN;
        uint32_t head = le32_to_cpu(used->ring[at].id);

        if (r >= l->rx && r < l->rx + MAX_PAIRS) {
            way_arrived(&l->to_guest,
                        l->f.guest.ram + r->buffer[head] + HEADER, false);
            ring_add(l, r, head);
        }
    }
    return count;
}

static void guest_receive(Load *l)
{
    for (int i = 0; i < l->pairs; i++) {
        if (ring_take(l, &l->rx[i])) {
            ring_kick(l, &l->rx[i]);
        }
    }
}

/* Each flow has its queue; some frames at a time */
static void guest_fill(Load *l, unsigned flow)
{
    Ring *r = &l->tx[flow % l->pairs];

    ring_take(l, r);
    for (int i = 0; i < 8 && way_may_send(&l->to_host) &&
         (uint16_t)(r->added - r->used) < RING_LEN / 2; i++) {
        uint16_t head = r->added % (RING_LEN / 2) * 2;
        uint8_t *packet = l->f.guest.ram + r->buffer[head];

        memset(packet, 0, HEADER);
        way_frame(&l->to_host, flow, packet + HEADER, true);
        way_sent(&l->to_host, flow);
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
        if (qatomic_read(&l->guest_takes)) {
            guest_receive(l);
        }
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
        guest_start_queues(&l->f, l->features);
        qvirtio_set_driver_ok(&l->f.dev->vdev);
        queues[0] = l->f.guest.rx;
        queues[1] = l->f.guest.tx;
    }
    guest_map_ram(&l->f);
    for (int i = 0; i < l->pairs; i++) {
        rx_init(l, &l->rx[i], queues[2 * i]);
        tx_init(l, &l->tx[i], queues[2 * i + 1]);
    }
}

static void load_threads_start(Load *l)
{
    qatomic_set(&l->guest_quit, false);
    qatomic_set(&l->host_quit, false);
    qatomic_set(&l->guest_takes, true);
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
    for (int i = 0; i < l->pairs; i++) {
        rx_post(l, &l->rx[i]);
    }
    load_threads_start(l);
}

/* All that was sent arrives; only the driver's rings are left as they are. */
static void load_traffic_stop(Load *l)
{
    gint64 end = g_get_monotonic_time() + TIMEOUT_US;

    load_host_stop(l);
    load_guest_stop(l);
    while (way_in_flight(&l->to_guest) || way_in_flight(&l->to_host)) {
        host_receive(l);
        guest_receive(l);
        g_assert_cmpint(g_get_monotonic_time(), <, end);
    }
}

static void load_init(Load *l, uint64_t features, unsigned pairs)
{
    memset(l, 0, sizeof(*l));
    l->features = features | 1ull << VIRTIO_F_VERSION_1 |
                  1ull << VIRTIO_NET_F_MRG_RXBUF;
    l->pairs = pairs;
}

/* QEMU waits for the peer of a mirror on the chain, so have one that reads. */
#define SINK "-chardev null,id=sink "

static void load_start_with(Load *l, uint64_t features, unsigned pairs,
                            const char *nic_opts, const char *args)
{
    g_autofree char *all = g_strconcat(GUEST_MAP_ARGS SINK, args, NULL);

    load_init(l, features, pairs);
    fixture_init(&l->f, pairs > 1 ? "vhost=on,queues=2" : "vhost=on",
                 nic_opts, all);
    l->host = host_open(l->f.ifname);
    load_driver_start(l);
}

static void load_start(Load *l, uint64_t features, unsigned pairs,
                       const char *nic_opts)
{
    load_start_with(l, features, pairs, nic_opts, "");
}

static void load_close(Load *l)
{
    close(l->host);
    fixture_close(&l->f);
}

/* QEMU */

static char *nic_property(Fixture *f, const char *name)
{
    QDict *rsp = qtest_qmp(f->qts, "{'execute': 'qom-get', 'arguments':"
                           " {'path': %s, 'property': %s}}", NIC_PATH, name);
    char *value = g_strdup(qdict_get_str(rsp, "return"));

    qobject_unref(rsp);
    return value;
}

static void expect_datapath(Fixture *f, const char *datapath,
                            const char *reason)
{
    g_autofree char *is = nic_property(f, "datapath");
    g_autofree char *why = nic_property(f, "datapath-reason");

    g_assert_cmpstr(is, ==, datapath);
    g_assert_cmpstr(why, ==, reason);
    g_assert_cmpint(vhost_started(f), ==, g_str_equal(datapath, "vhost"));
}

/* vhost comes back, though it may have to wait for packets on their way. */
static void wait_vhost(Fixture *f)
{
    gint64 end = g_get_monotonic_time() + TIMEOUT_US;

    while (!vhost_started(f)) {
        g_assert_cmpint(g_get_monotonic_time(), <, end);
    }
    expect_datapath(f, "vhost", "");
}

static void add_object(Fixture *f, const char *type, const char *id,
                       const char *more)
{
    g_autofree char *json = g_strdup_printf("{'execute': 'object-add',"
        " 'arguments': {'qom-type': '%s', 'id': '%s', 'netdev': 'n0'%s}}",
        type, id, more);

    qtest_qmp_assert_success(f->qts, "%p", qobject_from_json(json, NULL));
}

/* Filters that let the packets pass */
static const struct {
    const char *type;
    const char *more;
} passing[] = {
    { "filter-rewriter", ", 'vnet_hdr_support': true" },
    { "filter-replay", "" },
    { "filter-mirror", ", 'outdev': 'sink', 'packet-socket': 'off',"
                       " 'queue': 'tx'" },
    { "filter-dump", ", 'file': '/dev/null', 'packet-socket': 'off'" },
};

static void switch_once(Load *l, unsigned i)
{
    unsigned kind = i % ARRAY_SIZE(passing);
    Fixture *f = &l->f;

    add_object(f, passing[kind].type, "flt", passing[kind].more);
    expect_datapath(f, "userspace", "filter 'flt' is on");
    way_wait(&l->to_guest, BETWEEN);
    way_wait(&l->to_host, BETWEEN);
    if (i & 4) {
        set_status(f, "flt", "off");
        wait_vhost(f);
        way_wait(&l->to_guest, BETWEEN);
        way_wait(&l->to_host, BETWEEN);
        set_status(f, "flt", "on");
        expect_datapath(f, "userspace", "filter 'flt' is on");
    }
    del_object(f, "flt");
    wait_vhost(f);
    way_wait(&l->to_guest, BETWEEN);
    way_wait(&l->to_host, BETWEEN);
}

/* The peer of "out" takes what it gets. */
static void *drain_thread(void *opaque)
{
    int fd = GPOINTER_TO_INT(opaque);
    char buf[4096];

    while (read(fd, buf, sizeof(buf)) > 0) {
        /* there is more */
    }
    return NULL;
}

static void check_switch(uint64_t features, unsigned pairs,
                         const char *nic_opts, int count)
{
    Load l;
    GThread *drain;

    load_start(&l, features, pairs, nic_opts);
    drain = g_thread_new("drain", drain_thread, GINT_TO_POINTER(l.f.out));
    load_traffic_start(&l);
    wait_vhost(&l.f);
    for (int i = 0; i < count; i++) {
        switch_once(&l, i);
    }
    load_traffic_stop(&l);
    g_test_message("%d switches: %u frames to the guest, %u from it", count,
                   way_total(l.to_guest.sent), way_total(l.to_host.sent));
    shutdown(l.f.out, SHUT_RDWR);
    g_thread_join(drain);
    load_close(&l);
}

static void test_switch(void)
{
    check_switch(0, 1, "", rounds(100, 1000));
}

static void test_switch_event_idx(void)
{
    check_switch(1ull << VIRTIO_RING_F_EVENT_IDX, 1, "", rounds(100, 1000));
}

static void test_switch_indirect(void)
{
    check_switch(1ull << VIRTIO_RING_F_EVENT_IDX |
                 1ull << VIRTIO_RING_F_INDIRECT_DESC, 1, "",
                 rounds(100, 1000));
}

/* Nobody kicks for what was in the rings before the switch. */
static void test_switch_no_ioeventfd(void)
{
    check_switch(1ull << VIRTIO_RING_F_EVENT_IDX, 1, ",ioeventfd=off",
                 rounds(20, 1000));
}

static void test_switch_multiqueue(void)
{
    check_switch(0, MAX_PAIRS, ",mq=on", rounds(100, 1000));
}

static void wait_at_host(Load *l)
{
    gint64 end = g_get_monotonic_time() + TIMEOUT_US;

    while (way_in_flight(&l->to_host)) {
        host_receive(l);
        g_assert_cmpint(g_get_monotonic_time(), <, end);
    }
}

/* Until there is more in the file than the header of a pcap file */
static void wait_file(const char *path)
{
    gint64 end = g_get_monotonic_time() + TIMEOUT_US;
    struct stat st = { };

    while (st.st_size <= 24) {
        g_assert_cmpint(stat(path, &st), ==, 0);
        g_assert_cmpint(g_get_monotonic_time(), <, end);
    }
}

/*
 * What comes on the second queue goes the same way along the chain: the filter
 * behind one that holds it sees it.  The TAP sends to the queue from which the
 * flow's other direction came.
 */
static void test_multiqueue_direction(void)
{
    uint8_t frame[FRAME_LEN], out[BUFFER_LEN], header[24], swap[4];
    g_autofree char *file = NULL;
    g_autofree char *dump = NULL;
    uint32_t header_len;
    Load l;

    load_start(&l, 0, MAX_PAIRS, ",mq=on");
    file = g_build_filename(l.f.dir, "dump", NULL);
    dump = g_strdup_printf(", 'file': '%s', 'packet-socket': 'off',"
                           " 'queue': 'tx'", file);
    rx_post(&l, &l.rx[0]);
    rx_post(&l, &l.rx[1]);
    /* It tells when a frame is in the chain, and then held by the next one. */
    add_object(&l.f, "filter-dump", "dump", dump);
    add_object(&l.f, "filter-buffer", "buf", ", 'interval': 1000");
    add_object(&l.f, "filter-mirror", "mir", ", 'outdev': 'out',"
               " 'packet-socket': 'off', 'queue': 'tx',"
               " 'vnet_hdr_support': true");
    set_status(&l.f, "buf", "off");
    guest_transmit(&l, 1);
    wait_at_host(&l);

    /* The same with its ends exchanged */
    way_frame(&l.to_guest, 1, frame, true);
    memcpy(swap, frame + 26, 4);
    memcpy(frame + 26, frame + 30, 4);
    memcpy(frame + 30, swap, 4);
    memcpy(swap, frame + 34, 2);
    memcpy(frame + 34, frame + 36, 2);
    memcpy(frame + 36, swap, 2);
    set_status(&l.f, "buf", "on");
    g_assert_cmpint(send(l.host, frame, FRAME_LEN, 0), ==, FRAME_LEN);
    wait_file(file);
    set_status(&l.f, "buf", "off");
    g_assert_cmpuint(read_stream(l.f.out, out, sizeof(out), header,
                                 &header_len), ==, FRAME_LEN);
    g_assert_cmpint(memcmp(out, frame, FRAME_LEN), ==, 0);
    g_assert_cmpuint(guest_used_idx(&l.f.guest, l.rx[1].vq), ==, 1);
    g_assert_cmpuint(guest_used_idx(&l.f.guest, l.rx[0].vq), ==, 0);
    unlink(file);
    load_close(&l);
}

/* vhost has no packed rings, so a device with vhost does not offer them. */
static void test_packed(void)
{
    Fixture f;

    fixture_init(&f, "vhost=on", ",packed=on", "");
    qvirtio_start_device(&f.dev->vdev);
    g_assert_cmphex(qvirtio_get_features(&f.dev->vdev) &
                    1ull << VIRTIO_F_RING_PACKED, ==, 0);
    fixture_close(&f);
}

/* The last filter that goes brings vhost back. */
static void test_last(Fixture *f)
{
    expect_datapath(f, "userspace", "the driver is not ready");
    guest_start(f);
    expect_datapath(f, "vhost", "");
    /* This one does not need it. */
    add_capture(f);
    expect_datapath(f, "vhost", "");
    add_object(f, "filter-buffer", "a", ", 'interval': 1000");
    expect_datapath(f, "userspace", "filter 'a' is on");
    add_object(f, "filter-rewriter", "b", "");
    add_object(f, "filter-rewriter", "c", ", 'status': 'off'");
    set_status(f, "a", "off");
    expect_datapath(f, "userspace", "filter 'b' is on");
    del_object(f, "b");
    expect_datapath(f, "vhost", "");
    set_status(f, "c", "on");
    expect_datapath(f, "userspace", "filter 'c' is on");
    vm_stop(f);
    set_status(f, "c", "off");
    expect_datapath(f, "userspace", "the VM is stopped");
    vm_cont(f);
    expect_datapath(f, "vhost", "");
    vm_stop(f);
    set_status(f, "a", "on");
    vm_cont(f);
    expect_datapath(f, "userspace", "filter 'a' is on");
}

/* Filters of the command line, before there is a NIC */
static void test_command_line(Fixture *f)
{
    guest_post(f, 10);
    expect_datapath(f, "userspace", "filter 'rew' is on");
    host_send(f, 0, 10);
    expect_guest(f, 0, 10);
    guest_send(f, 10, 10);
    expect_host(f, 10, 10);
}

/* What a filter holds comes before what comes behind, on whatever way. */
static void test_held(Fixture *f)
{
    uint32_t n = 0;

    guest_post(f, 60);
    for (int i = 0; i < 3; i++) {
        add_object(f, "filter-buffer", "buf", ", 'interval': 1000");
        host_send(f, n, 10);
        guest_send(f, 1000 + n, 10);
        if (i == 1) {
            set_status(f, "buf", "off");
        }
        del_object(f, "buf");
        wait_vhost(f);
        host_send(f, n + 10, 10);
        guest_send(f, 1000 + n + 10, 10);
        expect_guest(f, n, 20);
        expect_host(f, 1000 + n, 20);
        n += 20;
    }
}

/*
 * vhost may stop when it has told the driver not to notify it, and has not
 * looked again yet.
 */
static void test_left_over(void)
{
    uint8_t packet[HEADER + FRAME_LEN] = { };
    uint32_t head;
    Fixture f;

    fixture_init(&f, "vhost=on", ",ioeventfd=off", GUEST_MAP_ARGS);
    guest_start(&f);
    guest_map(&f);
    make_frame(packet + HEADER, 7);
    head = f.guest.tx_head;
    for (int i = 0; i < 3; i++) {
        struct vring_desc *desc = (void *)(f.guest.ram + f.guest.tx->desc);

        memcpy(f.guest.ram + le64_to_cpu(desc[head].addr), packet,
               sizeof(packet));
        guest_make_available(&f.guest, f.guest.tx, head);
        add_object(&f, "filter-rewriter", "rew", "");
        expect_host(&f, 7, 1);
        del_object(&f, "rew");
        wait_vhost(&f);
    }
    fixture_close(&f);
}

/* The guest has no buffers: vhost waits for the packets that QEMU has read. */
static void test_delayed(Fixture *f)
{
    for (int i = 0; i < 3; i++) {
        uint32_t n = i * 20;

        add_object(f, "filter-rewriter", "rew", "");
        host_send_taken(f, n, 10);
        /* A stop drops what QEMU has read, and reading goes on then. */
        guest_send(f, 1000 + n, 1);
        expect_host(f, 1000 + n, 1);
        del_object(f, "rew");
        expect_datapath(f, "userspace", "packets wait in QEMU");
        guest_send(f, 1001 + n, 1);
        expect_host(f, 1001 + n, 1);
        if (i == 1) {
            add_object(f, "filter-rewriter", "rew", "");
            del_object(f, "rew");
            expect_datapath(f, "userspace", "packets wait in QEMU");
        }
        guest_post(f, 20);
        wait_vhost(f);
        host_send(f, n + 10, 10);
        expect_guest(f, n, 20);
    }
}

/* A stop drops the one that waits, but not if a redirector takes it. */
static void test_delayed_stop(Fixture *f)
{
    for (int take = 0; take < 2; take++) {
        uint32_t n = take * 20;

        add_object(f, "filter-rewriter", "rew", "");
        host_send_taken(f, n, 10);
        del_object(f, "rew");
        expect_datapath(f, "userspace", "packets wait in QEMU");
        if (take) {
            add_object(f, "filter-redirector", "red",
                       ", 'queue': 'tx', 'outdev': 'out',"
                       " 'vnet_hdr_support': true,"
                       " 'enable_when_running': false,"
                       " 'enable_when_stopped': true");
        }
        vm_stop(f);
        if (take) {
            expect_out(f, n, 10);
        }
        vm_cont(f);
        /* It shall have no buffer left then. */
        guest_post(f, take ? 10 : 19);
        wait_vhost(f);
        host_send(f, n + 10, 10);
        if (take) {
            expect_guest(f, n + 10, 10);
        } else {
            expect_guest(f, n + 1, 19);
        }
    }
}

/* What QEMU has taken before there is a driver does not come, but all else. */
static void check_before_driver(const char *netdev_opts, const char *args)
{
    Fixture f;

    fixture_init(&f, netdev_opts, "", args);
    host_send_taken(&f, 0, 10);
    guest_start(&f);
    guest_post(&f, 20);
    host_send(&f, 10, 10);
    expect_guest(&f, 1, 19);
    fixture_close(&f);
}

static void test_before_driver(void)
{
    check_before_driver("vhost=on", "");
}

static void test_before_driver_filter(void)
{
    check_before_driver("vhost=on", "-object filter-rewriter,id=rew,netdev=n0");
}

static void test_before_driver_no_vhost(void)
{
    check_before_driver("vhost=off", "");
}

static void swap_qemus(Fixture *a, Fixture *b)
{
    QTestState *qts = a->qts;

    a->qts = b->qts;
    b->qts = qts;
}

static void migrate_to(Fixture *source, Fixture *target)
{
    g_autofree char *uri = g_strdup_printf("unix:%s/migration", target->dir);

    qtest_qmp_assert_success(target->qts, "{'execute': 'migrate-incoming',"
                             " 'arguments': {'uri': %s}}", uri);
    qtest_qmp_assert_success(source->qts, "{'execute': 'migrate',"
                             " 'arguments': {'uri': %s}}", uri);
    qtest_qmp_eventwait(target->qts, "RESUME");
    unlink(uri + strlen("unix:"));
}

/* The same when the driver comes with a migration: no frame comes damaged. */
static void test_before_migration(void)
{
    Fixture source, target;

    fixture_start(&source, "");
    guest_start(&source);
    guest_post(&source, 20);
    fixture_start(&target, "-incoming defer");
    host_send_taken(&target, 0, 10);
    migrate_to(&source, &target);

    wait_vhost(&target);
    host_send(&target, 10, 10);
    /* The rings are where they were, but in the memory of the target. */
    swap_qemus(&source, &target);
    expect_guest(&source, 1, 19);
    swap_qemus(&source, &target);
    fixture_close(&target);
    fixture_close(&source);
}

/* All that was written has been read. */
static void wait_read(int fd)
{
    gint64 end = g_get_monotonic_time() + TIMEOUT_US;
    int left;

    do {
        g_assert_cmpint(ioctl(fd, SIOCOUTQ, &left), ==, 0);
        g_assert_cmpint(g_get_monotonic_time(), <, end);
    } while (left);
}

/* What a filter has put in by then is for the guest, and it gets it. */
static void run_injected_before_migration(const char *netdev_opts)
{
    Fixture source, target;

    fixture_init(&source, netdev_opts, "", "");
    guest_start(&source);
    guest_post(&source, 20);
    fixture_init(&target, netdev_opts, "",
                 "-incoming defer -object filter-redirector,id=inj,netdev=n0,"
                 "queue=tx,indev=in,vnet_hdr_support=on,packet-socket=off");
    in_send(&target, 0, 5);
    wait_read(target.in);
    migrate_to(&source, &target);
    in_send(&target, 5, 5);
    swap_qemus(&source, &target);
    expect_guest(&source, 0, 10);
    swap_qemus(&source, &target);
    fixture_close(&target);
    fixture_close(&source);
}

static void test_injected_before_migration(void)
{
    run_injected_before_migration("vhost=on");
}

static void test_injected_before_migration_no_vhost(void)
{
    run_injected_before_migration("vhost=off");
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

static void test_stop_cont(void)
{
    Load l;

    load_start(&l, 1ull << VIRTIO_RING_F_EVENT_IDX, 1, "");
    load_traffic_start(&l);
    for (int i = 0; i < rounds(20, 200); i++) {
        add_object(&l.f, "filter-rewriter", "rew", "");
        way_wait(&l.to_guest, BETWEEN);
        if (i & 1) {
            vm_stop(&l.f);
            vm_cont(&l.f);
            del_object(&l.f, "rew");
        } else {
            vm_stop(&l.f);
            del_object(&l.f, "rew");
            vm_cont(&l.f);
        }
        wait_vhost(&l.f);
        way_wait(&l.to_guest, BETWEEN);
        way_wait(&l.to_host, BETWEEN);
    }
    load_traffic_stop(&l);
    load_close(&l);
}

static void test_reset(void)
{
    Load l;

    load_start(&l, 0, 1, "");
    for (int i = 0; i < 6; i++) {
        load_traffic_start(&l);
        way_wait(&l.to_guest, BETWEEN);
        add_object(&l.f, "filter-rewriter", "rew", "");
        way_wait(&l.to_guest, BETWEEN);
        way_wait(&l.to_host, BETWEEN);
        if (i & 1) {
            del_object(&l.f, "rew");
        }
        load_traffic_stop(&l);
        guest_stop(&l.f);
        load_driver_start(&l);
        if (i & 1) {
            expect_datapath(&l.f, "vhost", "");
        } else {
            expect_datapath(&l.f, "userspace", "filter 'rew' is on");
            del_object(&l.f, "rew");
            expect_datapath(&l.f, "vhost", "");
        }
    }
    load_close(&l);
}

/* While a migration logs what is written to memory */
static void test_migration(void)
{
    Load l;

    load_start(&l, 0, 1, "");
    load_traffic_start(&l);
    for (int i = 0; i < 5; i++) {
        qtest_qmp_assert_success(l.f.qts,
                                 "{'execute': 'migrate-set-parameters',"
                                 " 'arguments': {'max-bandwidth': 100000}}");
        qtest_qmp_assert_success(l.f.qts, "{'execute': 'migrate', 'arguments':"
                                 " {'uri': 'exec:cat > /dev/null'}}");
        expect_status(&l.f, "query-migrate", "active");
        switch_once(&l, 2 * i);
        switch_once(&l, 2 * i + 1);
        expect_status(&l.f, "query-migrate", "active");
        if (i & 1) {
            add_object(&l.f, "filter-rewriter", "rew", "");
        }
        migration_cancel(&l.f);
        if (i & 1) {
            del_object(&l.f, "rew");
        }
        wait_vhost(&l.f);
        way_wait(&l.to_guest, BETWEEN);
        way_wait(&l.to_host, BETWEEN);
    }
    load_traffic_stop(&l);
    load_close(&l);
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
        "-machine memory-backend=ram0 " SINK "%s", path, args);

    fixture_start(f, all);
    qtest_qmp_assert_success(f->qts,
        "{'execute': 'migrate-set-capabilities', 'arguments':"
        " {'capabilities': [{'capability': 'x-ignore-shared',"
        "                    'state': true}]}}");
}

static void load_start_memory(Load *l, const char *path)
{
    int fd = open(path, O_RDWR);

    load_init(l, 1ull << VIRTIO_RING_F_EVENT_IDX, 1);
    memory_start(&l->f, path, "");
    l->f.guest.ram = mmap(NULL, GUEST_RAM, PROT_READ | PROT_WRITE, MAP_SHARED,
                          fd, 0);
    g_assert_true(l->f.guest.ram != MAP_FAILED);
    close(fd);
    l->host = host_open(l->f.ifname);
    load_driver_start(l);
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
static void load_move(Load *l, Fixture *target, int host)
{
    QGuestAllocator alloc = target->alloc;
    QVirtioDevice *vdev = &target->dev->vdev;

    vdev->features = l->f.dev->vdev.features;
    l->rx[0].vq->vdev = l->tx[0].vq->vdev = vdev;
    target->guest = l->f.guest;
    target->alloc = l->f.alloc;
    memset(&l->f.guest, 0, sizeof(l->f.guest));
    l->f.alloc = alloc;
    close(l->host);
    fixture_close(&l->f);
    l->f = *target;
    l->host = host;
}

static void load_migrate(Load *l, Fixture *target)
{
    int host = host_open(target->ifname);
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
    way_wait(&l->to_guest, BETWEEN);
    way_wait(&l->to_host, BETWEEN);
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
    load_move(l, target, host);
    guest_receive(l);
    came = way_total(l->to_guest.received) - l->elsewhere;
    g_test_message("%u frames to the source's TAP, %" PRIu64 " taken out, "
                   "%u came to the guest",
                   way_total(l->to_guest.sent) - l->elsewhere, taken, came);
    g_assert_cmpuint(taken - came, <=, dropped);
    way_forget(&l->to_guest);
    l->elsewhere = way_total(l->to_guest.received);
}

/* Of each filter: its object, and the same for the command line */
typedef struct ChainFilter {
    const char *type;
    const char *more;
    const char *args;
    bool holds;
} ChainFilter;

static const ChainFilter no_filter;
static const ChainFilter rewriter = {
    "filter-rewriter", ", 'vnet_hdr_support': true",
    "-object filter-rewriter,id=flt,netdev=n0,vnet_hdr_support=on"
};
/* It holds all, as this clock stands still. */
static const ChainFilter buffer = {
    "filter-buffer", ", 'interval': 1000",
    "-object filter-buffer,id=flt,netdev=n0,interval=1000", true
};

/* Until all that may be in flight is held */
static void way_wait_held(Way *way)
{
    gint64 end = g_get_monotonic_time() + TIMEOUT_US;

    while (way_may_send(way)) {
        g_assert_cmpint(g_get_monotonic_time(), <, end);
        g_usleep(200);
    }
}

/* From a source that runs and has no filter to a target that has none then */
static void migrate_once(Load *l, const char *path, const ChainFilter *source,
                         const ChainFilter *target, bool off)
{
    g_autofree char *args = g_strdup_printf("-incoming defer %s",
                                            target->args ?: "");
    Fixture f;

    memory_start(&f, path, args);
    if (source->type) {
        add_object(&l->f, source->type, "flt", source->more);
        expect_datapath(&l->f, "userspace", "filter 'flt' is on");
    }
    load_migrate(l, &f);
    if (target->type) {
        expect_datapath(&l->f, "userspace", "filter 'flt' is on");
    } else {
        expect_datapath(&l->f, "vhost", "");
    }

    load_threads_start(l);
    if (target->holds) {
        way_wait_held(&l->to_guest);
        way_wait_held(&l->to_host);
    } else {
        way_wait(&l->to_guest, BETWEEN);
        way_wait(&l->to_host, BETWEEN);
    }
    if (target->type && off) {
        set_status(&l->f, "flt", "off");
        wait_vhost(&l->f);
        way_wait(&l->to_guest, BETWEEN);
        way_wait(&l->to_host, BETWEEN);
    }
    if (target->type) {
        del_object(&l->f, "flt");
    }
    wait_vhost(&l->f);
    way_wait(&l->to_guest, BETWEEN);
    way_wait(&l->to_host, BETWEEN);
}

static void test_migrated(void)
{
    g_autofree char *path = NULL;
    int fd = g_file_open_tmp("filter-fallback-XXXXXX", &path, NULL);
    Load l;

    g_assert_cmpint(fd, >=, 0);
    g_assert_cmpint(ftruncate(fd, GUEST_RAM), ==, 0);
    close(fd);
    load_start_memory(&l, path);
    load_traffic_start(&l);
    wait_vhost(&l.f);
    for (int i = 0; i < rounds(1, 10); i++) {
        migrate_once(&l, path, &rewriter, &rewriter, true);
        migrate_once(&l, path, &rewriter, &rewriter, false);
        migrate_once(&l, path, &rewriter, &no_filter, false);
        migrate_once(&l, path, &no_filter, &buffer, true);
        migrate_once(&l, path, &rewriter, &buffer, false);
    }
    load_traffic_stop(&l);
    load_close(&l);
    unlink(path);
}

#if defined(CONFIG_TRACE_LOG) && !defined(CONFIG_TRACE_SIMPLE)
/* What the file has since the last call */
static void expect_trace(FILE *file, const char *datapath, const char *reason)
{
    g_autofree char *line = g_strdup_printf("virtio_net_datapath nic: %s %s\n",
                                            datapath, reason);
    char got[4096];

    clearerr(file);
    got[fread(got, 1, sizeof(got) - 1, file)] = 0;
    g_assert_cmpstr(got, ==, line);
}

/* The trace event tells each switch, and the same reason as the property. */
static void test_trace(void)
{
    g_autofree char *netdev = NULL;
    g_autofree char *path = NULL;
    g_autofree char *args = NULL;
    FILE *file;
    Fixture f;

    fixture_name(&f);
    netdev = g_strdup_printf("ifname=%s,script=no,downscript=no,vhost=on",
                             f.ifname);
    path = g_build_filename(f.dir, "trace", NULL);
    args = g_strdup_printf("-trace virtio_net_datapath,file=%s", path);
    fixture_init_named(&f, netdev, "", args);
    file = fopen(path, "r");
    g_assert_nonnull(file);
    guest_start(&f);
    expect_trace(file, "vhost", "");

    add_object(&f, "filter-rewriter", "rew", "");
    expect_trace(file, "userspace", "filter 'rew' is on");
    host_send_taken(&f, 0, 1);
    set_status(&f, "rew", "off");
    expect_trace(file, "userspace", "packets wait in QEMU");
    guest_post(&f, 1);
    wait_vhost(&f);
    expect_trace(file, "vhost", "");

    vm_stop(&f);
    expect_trace(file, "userspace", "the VM is stopped");
    vm_cont(&f);
    expect_trace(file, "vhost", "");
    qtest_qmp_assert_success(f.qts, "{'execute': 'set_link', 'arguments':"
                             " {'name': 'n0', 'up': false}}");
    expect_trace(file, "userspace", "the link is down");
    qtest_qmp_assert_success(f.qts, "{'execute': 'set_link', 'arguments':"
                             " {'name': 'n0', 'up': true}}");
    expect_trace(file, "vhost", "");
    guest_stop(&f);
    expect_trace(file, "userspace", "the driver is not ready");
    fclose(file);
    unlink(path);
    fixture_close(&f);
}
#endif

/* A guest that resets one queue while vhost is not in use */
static void test_queue_reset(void)
{
    Fixture f;

    fixture_start(&f, "");
    guest_start_queues(&f, 1ull << VIRTIO_F_VERSION_1 |
                           1ull << VIRTIO_NET_F_MRG_RXBUF |
                           1ull << VIRTIO_F_RING_RESET);
    if (!(f.dev->vdev.features & 1ull << VIRTIO_F_RING_RESET)) {
        g_test_skip("vhost cannot reset one queue");
        fixture_close(&f);
        return;
    }
    qvirtio_set_driver_ok(&f.dev->vdev);
    for (int i = 0; i < 20; i++) {
        guest_post(&f, 10);
        host_send(&f, 0, 5);
        expect_guest(&f, 0, 5);
        add_object(&f, "filter-rewriter", "rew", "");
        host_send(&f, 5, 5);
        expect_guest(&f, 5, 5);

        f.guest.rx = guest_move_queue(&f, f.guest.rx);
        guest_post(&f, 10);
        host_send(&f, 10, 5);
        expect_guest(&f, 10, 5);
        del_object(&f, "rew");
        wait_vhost(&f);
        host_send(&f, 15, 5);
        expect_guest(&f, 15, 5);
    }
    fixture_close(&f);
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

static void load_traffic(Load *l)
{
    load_traffic_start(l);
    way_wait(&l->to_guest, BETWEEN);
    way_wait(&l->to_host, BETWEEN);
    load_traffic_stop(l);
}

/* The same when vhost has never been started, for each queue there is */
static void check_queue_reset_first(unsigned pairs, const char *nic_opts)
{
    Load l;

    load_start_with(&l, 0, pairs, nic_opts,
                    "-object filter-rewriter,id=flt,netdev=n0,"
                    "vnet_hdr_support=on");
    expect_datapath(&l.f, "userspace", "filter 'flt' is on");
    load_move_queues(&l);
    load_traffic(&l);
    for (int i = 0; i < 3; i++) {
        load_move_queues(&l);
        load_traffic(&l);
        set_status(&l.f, "flt", "off");
        wait_vhost(&l.f);
        load_move_queues(&l);
        load_traffic(&l);
        expect_datapath(&l.f, "vhost", "");
        set_status(&l.f, "flt", "on");
        expect_datapath(&l.f, "userspace", "filter 'flt' is on");
    }
    load_close(&l);
}

static void test_queue_reset_first(void)
{
    check_queue_reset_first(1, "");
}

static void test_queue_reset_first_multiqueue(void)
{
    check_queue_reset_first(MAX_PAIRS, ",mq=on");
}

static void set_link(Fixture *f, const char *up)
{
    g_autofree char *json = g_strdup_printf("{'execute': 'set_link',"
        " 'arguments': {'name': 'n0', 'up': %s}}", up);

    qtest_qmp_assert_success(f->qts, "%p", qobject_from_json(json, NULL));
}

/* A link that is down keeps vhost from being started as well. */
static void test_queue_reset_link_down(void)
{
    Load l;

    load_init(&l, 0, MAX_PAIRS);
    fixture_init(&l.f, "vhost=on,queues=2", ",mq=on", GUEST_MAP_ARGS);
    l.host = host_open(l.f.ifname);
    set_link(&l.f, "false");
    load_driver_start(&l);
    expect_datapath(&l.f, "userspace", "the link is down");
    load_move_queues(&l);
    set_link(&l.f, "true");
    expect_datapath(&l.f, "vhost", "");
    load_traffic(&l);
    load_close(&l);
}

/* Without VIRTIO_NET_F_MQ the third queue is not vhost's, but the control's. */
static void test_queue_reset_control(void)
{
    QVirtQueue control = { .index = 2 };
    Load l;

    load_init(&l, 0, 1);
    fixture_init(&l.f, "vhost=on,queues=2", ",mq=on", GUEST_MAP_ARGS);
    l.host = host_open(l.f.ifname);
    load_driver_start(&l);
    expect_datapath(&l.f, "vhost", "");
    guest_disable_queue(&l.f, &control);
    load_traffic(&l);
    load_close(&l);
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
static void check_queue_disabled(const char *nic_opts)
{
    Load l;

    load_start_with(&l, 0, MAX_PAIRS, nic_opts,
                    "-object filter-rewriter,id=flt,netdev=n0,"
                    "vnet_hdr_support=on");
    load_traffic(&l);
    for (int i = 0; i < 4; i++) {
        for (int j = 0; j < l.pairs; j++) {
            guest_disable_queue(&l.f, l.rx[j].vq);
            guest_disable_queue(&l.f, l.tx[j].vq);
        }
        load_kick(&l);
        for (int j = 0; j < 2 + i % 2; j++) {
            set_status(&l.f, "flt", j % 2 ? "on" : "off");
            g_assert_cmpint(vhost_started(&l.f), ==, !(j % 2));
            load_kick(&l);
        }
        load_move_queues(&l);
        load_kick(&l);
        load_traffic(&l);
        set_status(&l.f, "flt", "on");
        expect_datapath(&l.f, "userspace", "filter 'flt' is on");
    }
    load_close(&l);
}

static void test_queue_disabled(void)
{
    check_queue_disabled(",mq=on");
}

static void test_queue_disabled_no_ioeventfd(void)
{
    check_queue_disabled(",mq=on,ioeventfd=off");
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

/*
 * A driver that gives up VIRTIO_NET_F_MQ while it runs, which is possible
 * without FEATURES_OK: the second pair of queues is deleted.
 */
static void test_queues_deleted(void)
{
    QVirtioDevice *vdev;
    Load l;

    load_start_with(&l, 0, MAX_PAIRS, ",mq=on",
                    "-object filter-rewriter,id=flt,netdev=n0,"
                    "vnet_hdr_support=on");
    vdev = &l.f.dev->vdev;
    load_traffic(&l);
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
        load_kick(&l);
        set_status(&l.f, "flt", "off");
        expect_datapath(&l.f, "vhost", "");
        load_kick(&l);
        set_status(&l.f, "flt", "on");
        expect_datapath(&l.f, "userspace", "filter 'flt' is on");
    }
    guest_stop(&l.f);
    l.pairs = MAX_PAIRS;
    load_driver_start(&l);
    load_traffic(&l);
    load_close(&l);
}

/* The reset of a machine, whose filters go on as they are */

/* QEMU, or vhost, has taken all that was sent to the TAP. */
static void wait_taken(Fixture *f, uint32_t sent)
{
    gint64 end = g_get_monotonic_time() + TIMEOUT_US;

    while (statistic(f->ifname, "tx_packets") < sent) {
        g_assert_cmpint(g_get_monotonic_time(), <, end);
    }
}

/*
 * What a filter holds when the machine is reset is not in the way.  If it is
 * released before there is another driver, it ends, as it has the header that
 * the old one used; what the new one uses is the same here.
 */
static void test_machine_reset_held(void)
{
    Load l;

    load_start(&l, 0, 1, "");
    for (int i = 0; i < 4; i++) {
        bool before = i & 1, deleted = i & 2;
        uint64_t written;

        load_traffic_start(&l);
        wait_vhost(&l.f);
        add_object(&l.f, "filter-buffer", "buf", ", 'interval': 1000");
        way_wait_held(&l.to_guest);
        way_wait_held(&l.to_host);
        load_guest_stop(&l);
        load_host_stop(&l);
        wait_taken(&l.f, way_total(l.to_guest.sent));
        vm_reset(&l.f);
        expect_datapath(&l.f, "userspace", "filter 'buf' is on");
        if (!before) {
            load_driver_start(&l);
            rx_post(&l, &l.rx[0]);
            expect_datapath(&l.f, "userspace", "filter 'buf' is on");
        }
        written = statistic(l.f.ifname, "rx_packets");
        if (deleted) {
            del_object(&l.f, "buf");
        } else {
            set_status(&l.f, "buf", "off");
        }
        if (before) {
            g_assert_cmpuint(statistic(l.f.ifname, "rx_packets"), ==, written);
            expect_datapath(&l.f, "userspace", "the driver is not ready");
            way_forget(&l.to_guest);
            way_forget(&l.to_host);
            load_driver_start(&l);
            rx_post(&l, &l.rx[0]);
        }
        wait_vhost(&l.f);
        load_threads_start(&l);
        way_wait(&l.to_guest, BETWEEN);
        way_wait(&l.to_host, BETWEEN);
        load_traffic_stop(&l);
        if (!deleted) {
            del_object(&l.f, "buf");
        }
        guest_stop(&l.f);
        load_driver_start(&l);
    }
    load_close(&l);
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
    set_status(f, "buf", "off");
    wait_vhost(f);
    expect_guest(f, 10, 10);
}

/* A mirror that has been added while the machine ran mirrors on. */
static void test_machine_reset_mirror(Fixture *f)
{
    add_object(f, "filter-mirror", "mir", ", 'outdev': 'out', 'queue': 'all',"
               " 'vnet_hdr_support': true");
    for (int i = 0; i < 3; i++) {
        uint32_t n = 100 * i;

        expect_datapath(f, "vhost", "");
        expect_source(f, "mir", "packet-socket");
        guest_post(f, 10);
        host_send(f, n, 10);
        expect_guest(f, n, 10);
        expect_out(f, n, 10);
        guest_send(f, n + 10, 10);
        expect_host(f, n + 10, 10);
        expect_out(f, n + 10, 10);
        vm_reset(f);
        expect_datapath(f, "userspace", "the driver is not ready");
        guest_start(f);
    }
    g_assert_cmpuint(counter(f, "mir", "capture-packets"), ==, 60);
}

/*
 * Snapshots, which save the device's state: vhost must not run then, whatever
 * becomes of filters before, meanwhile and behind.
 */

#define SNAPSHOT_DISK_SIZE (256 * MiB)

static void wait_job(Fixture *f, const char *id)
{
    gint64 end = g_get_monotonic_time() + TIMEOUT_US;
    bool concluded = false;

    while (!concluded) {
        QDict *rsp = qtest_qmp(f->qts, "{'execute': 'query-jobs'}");
        QListEntry *entry;

        QLIST_FOREACH_ENTRY(qdict_get_qlist(rsp, "return"), entry) {
            QDict *job = qobject_to(QDict, qlist_entry_obj(entry));

            if (g_str_equal(qdict_get_str(job, "id"), id) &&
                g_str_equal(qdict_get_str(job, "status"), "concluded")) {
                g_assert_cmpstr(qdict_get_try_str(job, "error"), ==, NULL);
                concluded = true;
            }
        }
        qobject_unref(rsp);
        g_assert_cmpint(g_get_monotonic_time(), <, end);
    }
    qtest_qmp_assert_success(f->qts, "{'execute': 'job-dismiss', 'arguments':"
                             " {'id': %s}}", id);
}

/* The node "disk" */
static char *snapshot_disk_add(Fixture *f)
{
    g_autofree char *path = g_build_filename(f->dir, "disk", NULL);

    g_assert_true(g_file_set_contents(path, "", 0, NULL));
    qtest_qmp_assert_success(f->qts, "{'execute': 'blockdev-add', 'arguments':"
                             " {'driver': 'file', 'node-name': 'file',"
                             "  'filename': %s}}", path);
    qtest_qmp_assert_success(f->qts, "{'execute': 'blockdev-create',"
                             " 'arguments': {'job-id': 'create', 'options':"
                             " {'driver': 'qcow2', 'file': 'file',"
                             "  'size': %d}}}", (int)SNAPSHOT_DISK_SIZE);
    wait_job(f, "create");
    qtest_qmp_assert_success(f->qts, "{'execute': 'blockdev-add', 'arguments':"
                             " {'driver': 'qcow2', 'node-name': 'disk',"
                             "  'file': 'file'}}");
    return g_steal_pointer(&path);
}

/* "snapshot-save" and so on: begun, but not more */
static void snapshot_begin(Fixture *f, const char *command)
{
    g_autofree char *more = g_strdup(g_str_equal(command, "snapshot-delete") ?
                                     "" : ", 'vmstate': 'disk'");
    g_autofree char *json = g_strdup_printf("{'execute': '%s', 'arguments':"
        " {'job-id': 'snapshot', 'tag': 'one', 'devices': ['disk']%s}}",
        command, more);

    qtest_qmp_assert_success(f->qts, "%p", qobject_from_json(json, NULL));
}

static void snapshot(Fixture *f, const char *command)
{
    snapshot_begin(f, command);
    wait_job(f, "snapshot");
}

static void test_snapshot(void)
{
    g_autofree char *disk = NULL;
    Load l;

    load_start(&l, 1ull << VIRTIO_RING_F_EVENT_IDX, 1, "");
    disk = snapshot_disk_add(&l.f);
    load_traffic_start(&l);
    wait_vhost(&l.f);
    for (int i = 0; i < rounds(8, 160); i++) {
        bool before = i & 1, stopped = i & 2, within = i & 4;

        if (before) {
            add_object(&l.f, "filter-rewriter", "rew", "");
        }
        if (stopped) {
            vm_stop(&l.f);
        }
        snapshot_begin(&l.f, "snapshot-save");
        if (before) {
            set_status(&l.f, "rew", "off");
        } else {
            add_object(&l.f, "filter-rewriter", "rew", "");
        }
        wait_job(&l.f, "snapshot");
        if (within) {
            set_status(&l.f, "rew", before ? "on" : "off");
            snapshot(&l.f, "snapshot-delete");
            snapshot(&l.f, "snapshot-save");
        }
        if (stopped) {
            g_assert_false(vhost_started(&l.f));
            vm_cont(&l.f);
        }
        del_object(&l.f, "rew");
        wait_vhost(&l.f);
        way_wait(&l.to_guest, BETWEEN);
        way_wait(&l.to_host, BETWEEN);
        snapshot(&l.f, "snapshot-delete");
    }
    load_traffic_stop(&l);
    unlink(disk);
    load_close(&l);
}

/* What was saved with a filter comes back without, and the reverse. */
static void test_snapshot_load(void)
{
    g_autofree char *disk = NULL;
    Load l;

    load_start(&l, 1ull << VIRTIO_RING_F_EVENT_IDX, 1, "");
    disk = snapshot_disk_add(&l.f);
    for (int i = 0; i < 8; i++) {
        bool saved = i & 1, loaded = i & 2, stopped = i & 4;

        load_traffic(&l);
        add_object(&l.f, "filter-rewriter", "rew", "");
        set_status(&l.f, "rew", saved ? "on" : "off");
        snapshot(&l.f, "snapshot-save");
        set_status(&l.f, "rew", loaded ? "on" : "off");
        if (stopped) {
            vm_stop(&l.f);
        }
        snapshot(&l.f, "snapshot-load");
        snapshot(&l.f, "snapshot-delete");
        if (stopped) {
            g_assert_false(vhost_started(&l.f));
            vm_cont(&l.f);
        }
        g_assert_cmpint(vhost_started(&l.f), ==, !loaded);
        /* The driver's memory is that of the snapshot, with the same rings. */
        load_threads_start(&l);
        way_wait(&l.to_guest, BETWEEN);
        way_wait(&l.to_host, BETWEEN);
        del_object(&l.f, "rew");
        wait_vhost(&l.f);
        way_wait(&l.to_guest, BETWEEN);
        way_wait(&l.to_host, BETWEEN);
        load_traffic_stop(&l);
        guest_stop(&l.f);
        load_driver_start(&l);
    }
    unlink(disk);
    load_close(&l);
}

/* A NIC that does not use vhost is all right with any filter. */
static void test_other_nic(void)
{
    QTestState *qts = qtest_init("-nodefaults -machine pc -netdev tap,id=n0,"
                                 "ifname=tapother,script=no,downscript=no,"
                                 "vhost=on -device e1000,netdev=n0 "
                                 "-object filter-rewriter,id=rew,netdev=n0");

    qtest_qmp_assert_success(qts, "{'execute': 'object-del', 'arguments':"
                             " {'id': 'rew'}}");
    qtest_quit(qts);
}

/* As much of a vhost-user backend as QEMU needs to create the netdev */
static void *vhost_user_thread(void *opaque)
{
    const uint32_t get_features = 1, reply_flags = 1 | 1 << 2;
    struct QEMU_PACKED {
        uint32_t request;
        uint32_t flags;
        uint32_t size;
        uint8_t payload[256];
    } msg;
    int fd = connect_to(opaque, "vhost-user");

    while (recv(fd, &msg, 12, MSG_WAITALL) == 12) {
        g_assert_cmpuint(msg.size, <=, sizeof(msg.payload));
        if (msg.size) {
            recv(fd, msg.payload, msg.size, MSG_WAITALL);
        }
        if (msg.request == get_features) {
            msg.flags = reply_flags;
            msg.size = 8;
            memset(msg.payload, 0, 8);
            g_assert_cmpint(write(fd, &msg, 20), ==, 20);
        }
    }
    close(fd);
    return NULL;
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
    g_thread_join(backend);
    unlink(path);
    rmdir(f.dir);
    g_free(f.dir);
}

/* A filter that is on goes with its netdev. */
static void test_unplug(Fixture *f)
{
    add_object(f, "filter-rewriter", "rew", "");
    expect_datapath(f, "userspace", "filter 'rew' is on");
    qtest_qmp_assert_success(f->qts, "{'execute': 'netdev_del', 'arguments':"
                             " {'id': 'n0'}}");
    expect_datapath(f, "userspace", "the link is down");
}

int main(int argc, char **argv)
{
    rig_init(&argc, &argv, "filter-fallback");
    rig_add_vm("last", "", test_last);
    rig_add_guest("command-line", "-object filter-rewriter,id=rew,netdev=n0",
                  test_command_line);
    rig_add_guest("held", "", test_held);
    rig_add("left-over", test_left_over);
    rig_add_guest("delayed", "", test_delayed);
    rig_add_guest("delayed-stop", "", test_delayed_stop);
    rig_add("before-driver/vhost", test_before_driver);
    rig_add("before-driver/filter", test_before_driver_filter);
    rig_add("before-driver/no-vhost", test_before_driver_no_vhost);
    rig_add("before-migration", test_before_migration);
    rig_add("injected-before-migration", test_injected_before_migration);
    rig_add("injected-before-migration-no-vhost",
            test_injected_before_migration_no_vhost);
    rig_add_guest("continued", "", test_continued);
    rig_add("switch/plain", test_switch);
    rig_add("switch/event-idx", test_switch_event_idx);
    rig_add("switch/indirect", test_switch_indirect);
    rig_add("switch/no-ioeventfd", test_switch_no_ioeventfd);
    rig_add("switch/multiqueue", test_switch_multiqueue);
    rig_add("multiqueue-direction", test_multiqueue_direction);
    rig_add("packed", test_packed);
    rig_add("stop-cont", test_stop_cont);
    rig_add("reset", test_reset);
    rig_add("migration", test_migration);
    rig_add("migrated", test_migrated);
#if defined(CONFIG_TRACE_LOG) && !defined(CONFIG_TRACE_SIMPLE)
    rig_add("trace", test_trace);
#endif
    rig_add("queue-reset", test_queue_reset);
    rig_add("queue-reset-first/plain", test_queue_reset_first);
    rig_add("queue-reset-first/multiqueue", test_queue_reset_first_multiqueue);
    rig_add("queue-reset-link-down", test_queue_reset_link_down);
    rig_add("queue-reset-control", test_queue_reset_control);
    rig_add_guest("queue-reset-delayed",
                  "-object filter-rewriter,id=flt,netdev=n0",
                  test_queue_reset_delayed);
    rig_add("queue-disabled/ioeventfd", test_queue_disabled);
    rig_add("queue-disabled/no-ioeventfd", test_queue_disabled_no_ioeventfd);
    rig_add("queues-deleted", test_queues_deleted);
    rig_add("machine-reset/held", test_machine_reset_held);
    rig_add_vm("machine-reset/held-before-driver",
               "-object filter-buffer,id=buf,netdev=n0,interval=1000",
               test_held_before_driver);
    rig_add_guest("machine-reset/mirror", "", test_machine_reset_mirror);
    rig_add("snapshot/save", test_snapshot);
    rig_add("snapshot/load", test_snapshot_load);
    rig_add("other-nic", test_other_nic);
    rig_add("refused", test_refused);
    rig_add_guest("unplug", "", test_unplug);
    return g_test_run();
}
