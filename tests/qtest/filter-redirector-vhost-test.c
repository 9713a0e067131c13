/*
 * QTest testcase for filter-redirector on a TAP with vhost
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Real TAPs and the real vhost worker: it needs root and /dev/vhost-net, and
 * skips all tests without.  The guest's driver is libqos.  The host's side is
 * a packet socket on the TAP.
 *
 * Frames carry a number.  To see that a frame does not come, a test never
 * waits for a while: it sends another one behind it that must come, and looks
 * at which one is first.
 */

#include "qemu/osdep.h"
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <linux/capability.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include "libqtest.h"
#include "libqos/malloc-pc.h"
#include "libqos/pci-pc.h"
#include "libqos/virtio.h"
#include "libqos/virtio-pci.h"
#include "qemu/bswap.h"
#include "qemu/cutils.h"
#include "qemu/units.h"
#include "qobject/qdict.h"
#include "qobject/qjson.h"
#include "standard-headers/linux/virtio_config.h"
#include "standard-headers/linux/virtio_ids.h"
#include "standard-headers/linux/virtio_net.h"
#include "standard-headers/linux/virtio_pci.h"

#define TEST_ETHERTYPE 0x88b5   /* local experimental */
#define FRAME_LEN 64
#define BUFFER_LEN 2048
#define RING_LEN 256
#define NIC_SLOT 5
#define TIMEOUT_US (20 * G_USEC_PER_SEC)
#define NIC_PATH "/machine/peripheral/nic/virtio-backend"

/* VIRTIO_NET_F_MQ guests put their queue pairs at 2i (rx) and 2i+1 (tx). */
typedef struct Guest {
    QVirtQueue *rx;
    QVirtQueue *tx;
    uint64_t buffer[RING_LEN];
} Guest;

typedef struct Fixture {
    QTestState *qts;
    QGuestAllocator alloc;
    QPCIBus *bus;
    QVirtioPCIDevice *dev;
    Guest guest;
    char *dir;
    char ifname[IFNAMSIZ];
    int host;       /* the host's packet socket on the TAP */
    int out;        /* peer of outdev */
    int in;         /* peer of indev */
} Fixture;

static bool have_vhost;

/* The host's side */

static void set_interface_up(const char *ifname, bool up)
{
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    struct ifreq ifr = { };

    pstrcpy(ifr.ifr_name, sizeof(ifr.ifr_name), ifname);
    g_assert_cmpint(ioctl(fd, SIOCGIFFLAGS, &ifr), ==, 0);
    ifr.ifr_flags = up ? ifr.ifr_flags | IFF_UP : ifr.ifr_flags & ~IFF_UP;
    g_assert_cmpint(ioctl(fd, SIOCSIFFLAGS, &ifr), ==, 0);
    close(fd);
}

static int open_host(const char *ifname)
{
    struct sockaddr_ll addr = {
        .sll_family = AF_PACKET,
        .sll_protocol = htons(TEST_ETHERTYPE),
        .sll_ifindex = if_nametoindex(ifname),
    };
    int fd = socket(AF_PACKET, SOCK_RAW, 0);

    g_assert_cmpint(fd, >=, 0);
    g_assert_cmpint(bind(fd, (struct sockaddr *)&addr, sizeof(addr)), ==, 0);
    return fd;
}

static void make_frame(uint8_t *frame, uint32_t number)
{
    static const uint8_t head[] = {
        0x52, 0x54, 0x00, 0x12, 0x34, 0x56, 0x02, 0, 0, 0, 0, 1,
        TEST_ETHERTYPE >> 8, TEST_ETHERTYPE & 0xff,
    };

    memset(frame, 0x5a, FRAME_LEN);
    memcpy(frame, head, sizeof(head));
    stl_be_p(frame + sizeof(head), number);
}

static uint32_t frame_number(const uint8_t *frame)
{
    g_assert_cmphex(lduw_be_p(frame + 12), ==, TEST_ETHERTYPE);
    return ldl_be_p(frame + 14);
}

static void host_send(Fixture *f, uint32_t first, uint32_t count)
{
    uint8_t frame[FRAME_LEN];

    for (uint32_t i = 0; i < count; i++) {
        make_frame(frame, first + i);
        g_assert_cmpint(send(f->host, frame, FRAME_LEN, 0), ==, FRAME_LEN);
    }
}

static void wait_readable(int fd)
{
    struct pollfd pfd = { .fd = fd, .events = POLLIN };

    g_assert_cmpint(poll(&pfd, 1, TIMEOUT_US / 1000), ==, 1);
}

/* Frames that came in from the guest; what we sent ourselves does not count. */
static void expect_host(Fixture *f, uint32_t first, uint32_t count)
{
    uint8_t frame[BUFFER_LEN];
    struct sockaddr_ll from;
    socklen_t from_len;

    for (uint32_t i = 0; i < count;) {
        from_len = sizeof(from);
        wait_readable(f->host);
        g_assert_cmpint(recvfrom(f->host, frame, sizeof(frame), 0,
                                 (struct sockaddr *)&from, &from_len),
                        >=, FRAME_LEN);
        if (from.sll_pkttype != PACKET_OUTGOING) {
            g_assert_cmpuint(frame_number(frame), ==, first + i);
            i++;
        }
    }
}

/* The chardevs' peers */

static int connect_to(Fixture *f, const char *name)
{
    g_autofree char *path = g_build_filename(f->dir, name, NULL);
    struct sockaddr_un addr = { .sun_family = AF_UNIX };
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    gint64 end = g_get_monotonic_time() + TIMEOUT_US;

    pstrcpy(addr.sun_path, sizeof(addr.sun_path), path);
    while (connect(fd, (struct sockaddr *)&addr, sizeof(addr)) < 0) {
        g_assert_cmpint(g_get_monotonic_time(), <, end);
        g_usleep(1000);
    }
    return fd;
}

static void read_full(int fd, void *buf, size_t size)
{
    for (size_t done = 0; done < size;) {
        ssize_t n;

        wait_readable(fd);
        n = read(fd, buf + done, size - done);
        g_assert_cmpint(n, >, 0);
        done += n;
    }
}

/* Read one frame of the stream, which has vnet_hdr_support=on. */
static size_t read_stream(int fd, uint8_t *frame, size_t size,
                          uint8_t *header, uint32_t *header_len)
{
    uint8_t prefix[8];
    uint32_t len;

    read_full(fd, prefix, sizeof(prefix));
    len = ldl_be_p(prefix);
    *header_len = ldl_be_p(prefix + 4);
    g_assert_cmpuint(*header_len, <=, 24);
    g_assert_cmpuint(len, >, *header_len);
    g_assert_cmpuint(len - *header_len, <=, size);
    read_full(fd, header, *header_len);
    read_full(fd, frame, len - *header_len);
    return len - *header_len;
}

static void expect_out(Fixture *f, uint32_t first, uint32_t count)
{
    uint8_t frame[BUFFER_LEN], header[24];
    uint32_t header_len;

    for (uint32_t i = 0; i < count; i++) {
        g_assert_cmpuint(read_stream(f->out, frame, sizeof(frame), header,
                                     &header_len), ==, FRAME_LEN);
        g_assert_cmpuint(frame_number(frame), ==, first + i);
        g_assert_cmphex(frame[FRAME_LEN - 1], ==, 0x5a);
    }
}

static void in_send(Fixture *f, uint32_t first, uint32_t count)
{
    uint8_t record[8 + 12 + FRAME_LEN] = { };

    for (uint32_t i = 0; i < count; i++) {
        stl_be_p(record, 12 + FRAME_LEN);
        stl_be_p(record + 4, 12);
        make_frame(record + 8 + 12, first + i);
        g_assert_cmpint(write(f->in, record, sizeof(record)), ==,
                        sizeof(record));
    }
}

/* The guest's driver */

static void guest_start_queues(Fixture *f, uint64_t features)
{
    QVirtioDevice *vdev = &f->dev->vdev;

    qvirtio_start_device(vdev);
    qvirtio_set_features(vdev, qvirtio_get_features(vdev) & features);
    f->guest.rx = qvirtqueue_setup(vdev, &f->alloc, 0);
    f->guest.tx = qvirtqueue_setup(vdev, &f->alloc, 1);
}

static void guest_start(Fixture *f)
{
    guest_start_queues(f, 1ull << VIRTIO_F_VERSION_1 |
                          1ull << VIRTIO_NET_F_MRG_RXBUF);
    qvirtio_set_driver_ok(&f->dev->vdev);
}

static void guest_stop(Fixture *f)
{
    QVirtioDevice *vdev = &f->dev->vdev;

    qvirtio_reset(vdev);
    qvirtqueue_cleanup(vdev->bus, f->guest.rx, &f->alloc);
    qvirtqueue_cleanup(vdev->bus, f->guest.tx, &f->alloc);
    f->guest.rx = f->guest.tx = NULL;
}

static void guest_post(Fixture *f, int count)
{
    for (int i = 0; i < count; i++) {
        uint64_t addr = guest_alloc(&f->alloc, BUFFER_LEN);
        uint32_t head = qvirtqueue_add(f->qts, f->guest.rx, addr, BUFFER_LEN,
                                       true, false);

        f->guest.buffer[head] = addr;
        qvirtqueue_kick(f->qts, &f->dev->vdev, f->guest.rx, head);
    }
}

static void expect_guest(Fixture *f, uint32_t first, uint32_t count)
{
    gint64 end = g_get_monotonic_time() + TIMEOUT_US;
    uint8_t buf[12 + FRAME_LEN];
    uint32_t head, len;

    for (uint32_t i = 0; i < count; i++) {
        while (!qvirtqueue_get_buf(f->qts, f->guest.rx, &head, &len)) {
            g_assert_cmpint(g_get_monotonic_time(), <, end);
        }
        g_assert_cmpuint(len, ==, sizeof(buf));
        qtest_memread(f->qts, f->guest.buffer[head], buf, sizeof(buf));
        guest_free(&f->alloc, f->guest.buffer[head]);
        g_assert_cmpuint(frame_number(buf + 12), ==, first + i);
    }
}

static void guest_send(Fixture *f, uint32_t first, uint32_t count)
{
    gint64 end = g_get_monotonic_time() + TIMEOUT_US;
    uint8_t buf[12 + FRAME_LEN] = { };
    uint32_t head, len;

    for (uint32_t i = 0; i < count; i++) {
        uint64_t addr = guest_alloc(&f->alloc, sizeof(buf));

        make_frame(buf + 12, first + i);
        qtest_memwrite(f->qts, addr, buf, sizeof(buf));
        head = qvirtqueue_add(f->qts, f->guest.tx, addr, sizeof(buf),
                              false, false);
        qvirtqueue_kick(f->qts, &f->dev->vdev, f->guest.tx, head);
        while (!qvirtqueue_get_buf(f->qts, f->guest.tx, &head, &len)) {
            g_assert_cmpint(g_get_monotonic_time(), <, end);
        }
        guest_free(&f->alloc, addr);
    }
}

/* QEMU */

/* The query succeeds only while vhost has the queue. */
static bool vhost_started(Fixture *f)
{
    QDict *rsp = qtest_qmp(f->qts,
        "{'execute': 'x-query-virtio-vhost-queue-status',"
        " 'arguments': {'path': %s, 'queue': 0}}", NIC_PATH);
    bool started = qdict_haskey(rsp, "return");

    qobject_unref(rsp);
    return started;
}

static uint64_t counter(Fixture *f, const char *id, const char *name)
{
    g_autofree char *path = g_strdup_printf("/objects/%s", id);
    QDict *rsp = qtest_qmp(f->qts, "{'execute': 'qom-get', 'arguments':"
                           " {'path': %s, 'property': %s}}", path, name);
    uint64_t value = qdict_get_uint(rsp, "return");

    qobject_unref(rsp);
    return value;
}

static void expect_source(Fixture *f, const char *id, const char *source)
{
    g_autofree char *path = g_strdup_printf("/objects/%s", id);
    gint64 end = g_get_monotonic_time() + TIMEOUT_US;

    for (;;) {
        QDict *rsp = qtest_qmp(f->qts, "{'execute': 'qom-get', 'arguments':"
                               " {'path': %s, 'property': 'source'}}", path);
        bool same = g_str_equal(qdict_get_str(rsp, "return"), source);

        qobject_unref(rsp);
        if (same) {
            return;
        }
        g_assert_cmpint(g_get_monotonic_time(), <, end);
    }
}

static void wait_counter(Fixture *f, const char *id, const char *name,
                         uint64_t value)
{
    gint64 end = g_get_monotonic_time() + TIMEOUT_US;

    while (counter(f, id, name) != value) {
        g_assert_cmpint(g_get_monotonic_time(), <, end);
    }
}

static void set_status(Fixture *f, const char *id, const char *status)
{
    g_autofree char *path = g_strdup_printf("/objects/%s", id);

    qtest_qmp_assert_success(f->qts, "{'execute': 'qom-set', 'arguments':"
                             " {'path': %s, 'property': 'status',"
                             "  'value': %s}}", path, status);
}

static void del_object(Fixture *f, const char *id)
{
    qtest_qmp_assert_success(f->qts, "{'execute': 'object-del', 'arguments':"
                             " {'id': %s}}", id);
}

static void vm_stop(Fixture *f)
{
    qtest_qmp_assert_success(f->qts, "{'execute': 'stop'}");
}

static void vm_cont(Fixture *f)
{
    qtest_qmp_assert_success(f->qts, "{'execute': 'cont'}");
}

static void fixture_connect(Fixture *f)
{
    f->out = connect_to(f, "out");
    f->in = connect_to(f, "in");
}

static void fixture_attach_nic(Fixture *f)
{
    QPCIAddress addr = { .devfn = QPCI_DEVFN(NIC_SLOT, 0) };

    pc_alloc_init(&f->alloc, f->qts, 0);
    f->bus = qpci_new_pc(f->qts, &f->alloc);
    f->dev = virtio_pci_new(f->bus, &addr);
    g_assert_nonnull(f->dev);
    qvirtio_pci_device_enable(f->dev);
}

/*
 * Start QEMU with a netdev "n0", a NIC "nic", and chardevs "out" and "in",
 * whose peers are connected.  @args come behind.
 */
static void fixture_init(Fixture *f, const char *netdev_opts,
                         const char *nic_opts, const char *args)
{
    static unsigned number;

    memset(f, 0, sizeof(*f));
    f->host = f->out = f->in = -1;
    f->dir = g_dir_make_tmp("filter-redirector-vhost-XXXXXX", NULL);
    g_assert_nonnull(f->dir);
    snprintf(f->ifname, sizeof(f->ifname), "tapq%u", number++);
    f->qts = qtest_initf("-nodefaults -machine pc "
                         "-netdev tap,id=n0,ifname=%s,script=no,downscript=no,"
                         "%s "
                         "-device virtio-net-pci,id=nic,netdev=n0,addr=0x%x,"
                         "mac=52:54:00:12:34:56%s "
                         "-chardev socket,id=out,path=%s/out,server=on,"
                         "wait=off "
                         "-chardev socket,id=in,path=%s/in,server=on,wait=off "
                         "%s", f->ifname, netdev_opts, NIC_SLOT, nic_opts,
                         f->dir, f->dir, args);
    set_interface_up(f->ifname, true);
    f->host = open_host(f->ifname);
    fixture_connect(f);
    fixture_attach_nic(f);
}

static void fixture_start(Fixture *f, const char *args)
{
    fixture_init(f, "vhost=on", "", args);
}

static void fixture_close(Fixture *f)
{
    const char *names[] = { "out", "in" };

    if (f->guest.rx) {
        guest_stop(f);
    }
    if (f->dev) {
        g_free(f->dev->pdev);
        g_free(f->dev);
        qpci_free_pc(f->bus);
        alloc_destroy(&f->alloc);
    }
    qtest_quit(f->qts);
    close(f->host);
    close(f->out);
    close(f->in);
    for (int i = 0; i < ARRAY_SIZE(names); i++) {
        g_autofree char *path = g_build_filename(f->dir, names[i], NULL);

        unlink(path);
    }
    rmdir(f->dir);
    g_free(f->dir);
}

#define CAPTURE "-object filter-redirector,id=cap,netdev=n0,outdev=out," \
                "vnet_hdr_support=on,queue="
#define INJECT "-object filter-redirector,id=inj,netdev=n0,indev=in," \
               "vnet_hdr_support=on,queue="

/* Capture */

static void test_capture_tx(void)
{
    Fixture f;

    fixture_start(&f, CAPTURE "tx");
    guest_start(&f);
    g_assert_true(vhost_started(&f));
    guest_post(&f, 50);
    host_send(&f, 0, 50);
    expect_out(&f, 0, 50);
    expect_guest(&f, 0, 50);
    g_assert_cmpuint(counter(&f, "cap", "capture-packets"), ==, 50);
    g_assert_cmpuint(counter(&f, "cap", "capture-bytes"), ==, 50 * FRAME_LEN);
    fixture_close(&f);
}

static void test_capture_rx(void)
{
    Fixture f;

    fixture_start(&f, CAPTURE "rx");
    guest_start(&f);
    g_assert_true(vhost_started(&f));
    guest_send(&f, 0, 50);
    expect_out(&f, 0, 50);
    expect_host(&f, 0, 50);

    /* The other direction is left out. */
    guest_post(&f, 10);
    host_send(&f, 1000, 10);
    expect_guest(&f, 1000, 10);
    guest_send(&f, 50, 1);
    expect_out(&f, 50, 1);
    g_assert_cmpuint(counter(&f, "cap", "capture-packets"), ==, 51);
    fixture_close(&f);
}

static void test_capture_tx_only(void)
{
    Fixture f;

    fixture_start(&f, CAPTURE "tx");
    guest_start(&f);
    guest_post(&f, 10);
    guest_send(&f, 1000, 10);
    expect_host(&f, 1000, 10);
    host_send(&f, 0, 1);
    expect_out(&f, 0, 1);
    g_assert_cmpuint(counter(&f, "cap", "capture-packets"), ==, 1);
    fixture_close(&f);
}

static void test_capture_all(void)
{
    Fixture f;

    fixture_start(&f, CAPTURE "all");
    guest_start(&f);
    guest_post(&f, 10);
    for (int i = 0; i < 10; i++) {
        host_send(&f, 2 * i, 1);
        expect_out(&f, 2 * i, 1);
        guest_send(&f, 2 * i + 1, 1);
        expect_out(&f, 2 * i + 1, 1);
    }
    expect_guest(&f, 0, 1);
    fixture_close(&f);
}

/* One copy each, whether vhost or the chain reads the TAP. */
static void test_capture_driver_reload(void)
{
    Fixture f;
    uint32_t n = 0;

    fixture_start(&f, CAPTURE "tx");
    g_assert_false(vhost_started(&f));
    host_send(&f, n, 10);
    expect_out(&f, n, 10);
    n += 10;
    for (int round = 0; round < 5; round++) {
        guest_start(&f);
        g_assert_true(vhost_started(&f));
        guest_post(&f, 30);
        host_send(&f, n, 10);
        expect_out(&f, n, 10);
        n += 10;
        guest_stop(&f);
        g_assert_false(vhost_started(&f));
        host_send(&f, n, 10);
        expect_out(&f, n, 10);
        n += 10;
        qtest_system_reset(f.qts);
        host_send(&f, n, 10);
        expect_out(&f, n, 10);
        n += 10;
        qvirtio_pci_device_enable(f.dev);
    }
    g_assert_cmpuint(counter(&f, "cap", "capture-packets"), ==, n);
    fixture_close(&f);
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
static void test_capture_bursts(void)
{
    uint32_t n = 0;
    Fixture f;

    fixture_start(&f, CAPTURE "tx");
    guest_start(&f);
    for (int round = 0; round < 30; round++) {
        uint32_t burst = round % 3 ? 1 : 50 + 20 * round;

        host_send(&f, n, burst);
        expect_out(&f, n, burst);
        n += burst;
    }
    g_assert_cmpuint(counter(&f, "cap", "capture-packets"), ==, n);
    g_assert_cmpuint(counter(&f, "cap", "capture-kernel-drops"), ==, 0);
    fixture_close(&f);
}

static void swap_peers(Fixture *f)
{
    int out = f->out;

    f->out = f->in;
    f->in = out;
}

/* Two filters are looked at together, whoever's packets call for it. */
static void test_capture_two(void)
{
    uint32_t n = 0;
    Fixture f;

    fixture_start(&f, CAPTURE "tx -object filter-redirector,id=cap2,"
                      "netdev=n0,outdev=in,vnet_hdr_support=on,queue=all");
    guest_start(&f);
    guest_post(&f, 10);
    for (int round = 0; round < 10; round++) {
        host_send(&f, n, 300);
        expect_out(&f, n, 300);
        swap_peers(&f);
        expect_out(&f, n, 300);
        n += 300;
        guest_send(&f, n, 1);
        expect_out(&f, n, 1);
        swap_peers(&f);
        n++;
    }
    del_object(&f, "cap");
    host_send(&f, n, 300);
    swap_peers(&f);
    expect_out(&f, n, 300);
    fixture_close(&f);
}

/* The header is the guest's in size, and without one the frame is bare. */
static void test_capture_header(void)
{
    uint8_t frame[BUFFER_LEN], header[24];
    uint32_t header_len;
    Fixture f;

    fixture_start(&f, CAPTURE "tx");
    guest_start_queues(&f, 1ull << VIRTIO_F_VERSION_1);
    qvirtio_set_driver_ok(&f.dev->vdev);
    host_send(&f, 7, 1);
    g_assert_cmpuint(read_stream(f.out, frame, sizeof(frame), header,
                                 &header_len), ==, FRAME_LEN);
    g_assert_cmpuint(header_len, ==, 12);
    g_assert_cmpuint(frame_number(frame), ==, 7);
    for (uint32_t i = 0; i < header_len; i++) {
        g_assert_cmphex(header[i], ==, 0);
    }
    fixture_close(&f);
}

/* Without vnet_hdr_support the stream does not tell the header's length. */
static void test_capture_stream_format(void)
{
    uint8_t got[4 + 12 + FRAME_LEN], want[4 + 12 + FRAME_LEN] = { };
    Fixture f;

    fixture_start(&f, "-object filter-redirector,id=cap,netdev=n0,"
                      "outdev=out,queue=tx");
    guest_start(&f);
    host_send(&f, 9, 1);
    stl_be_p(want, 12 + FRAME_LEN);
    make_frame(want + 4 + 12, 9);
    read_full(f.out, got, sizeof(got));
    g_assert_cmpmem(got, sizeof(got), want, sizeof(want));
    fixture_close(&f);
}

/* Status and run state */

static void test_status(void)
{
    Fixture f;

    fixture_start(&f, CAPTURE "tx");
    guest_start(&f);
    guest_post(&f, 40);
    expect_source(&f, "cap", "packet-socket");
    host_send(&f, 0, 10);
    expect_out(&f, 0, 10);
    set_status(&f, "cap", "off");
    expect_source(&f, "cap", "none");
    host_send(&f, 100, 10);
    set_status(&f, "cap", "on");
    host_send(&f, 10, 10);
    /* nothing stale */
    expect_out(&f, 10, 10);
    expect_guest(&f, 0, 10);
    expect_guest(&f, 100, 10);
    expect_guest(&f, 10, 10);
    fixture_close(&f);
}

static void test_status_off_at_start(void)
{
    Fixture f;

    fixture_start(&f, CAPTURE "tx,status=off");
    guest_start(&f);
    host_send(&f, 0, 10);
    set_status(&f, "cap", "on");
    host_send(&f, 10, 1);
    expect_out(&f, 10, 1);
    fixture_close(&f);
}

/* While nobody listens the socket is unhooked, and nothing stale comes. */
static void test_not_connected(void)
{
    Fixture f;

    fixture_start(&f, CAPTURE "tx");
    guest_start(&f);
    guest_post(&f, 40);
    host_send(&f, 0, 10);
    expect_out(&f, 0, 10);
    close(f.out);
    expect_source(&f, "cap", "none");
    host_send(&f, 100, 10);
    f.out = connect_to(&f, "out");
    expect_source(&f, "cap", "packet-socket");
    host_send(&f, 10, 10);
    expect_out(&f, 10, 10);
    fixture_close(&f);
}

static void test_stop_running_only(void)
{
    Fixture f;

    fixture_start(&f, CAPTURE "tx");
    guest_start(&f);
    guest_post(&f, 30);
    host_send(&f, 0, 10);
    /* What came while the VM was running is sent, even if read late. */
    vm_stop(&f);
    expect_source(&f, "cap", "none");
    expect_out(&f, 0, 10);
    host_send(&f, 100, 10);
    vm_cont(&f);
    expect_source(&f, "cap", "packet-socket");
    host_send(&f, 10, 10);
    expect_out(&f, 10, 10);
    fixture_close(&f);
}

static void test_stop_both(void)
{
    Fixture f;

    fixture_start(&f, CAPTURE "tx,enable_when_stopped=on");
    guest_start(&f);
    guest_post(&f, 30);
    host_send(&f, 0, 10);
    vm_stop(&f);
    expect_source(&f, "cap", "packet-socket");
    host_send(&f, 10, 10);
    expect_out(&f, 0, 20);
    vm_cont(&f);
    host_send(&f, 20, 10);
    expect_out(&f, 20, 10);
    g_assert_cmpuint(counter(&f, "cap", "capture-packets"), ==, 30);
    fixture_close(&f);
}

#define STOPPED_ONLY "tx,enable_when_running=off,enable_when_stopped=on"

/* What the guest did not take, once: from the TAP, which vhost gave back. */
static void test_stopped_only(void)
{
    Fixture f;

    fixture_start(&f, CAPTURE STOPPED_ONLY);
    guest_start(&f);
    g_assert_true(vhost_started(&f));
    expect_source(&f, "cap", "none");
    guest_post(&f, 4);
    host_send(&f, 0, 20);
    expect_guest(&f, 0, 4);
    vm_stop(&f);
    expect_source(&f, "cap", "chain");
    expect_out(&f, 4, 16);
    host_send(&f, 20, 100);
    expect_out(&f, 20, 100);
    vm_cont(&f);
    expect_source(&f, "cap", "none");
    g_assert_true(vhost_started(&f));

    /* The guest goes on with what comes now. */
    guest_post(&f, 10);
    host_send(&f, 200, 10);
    expect_guest(&f, 200, 10);
    g_assert_cmpuint(counter(&f, "cap", "capture-packets"), ==, 116);
    fixture_close(&f);
}

/* The same if QEMU reads the TAP: one waits in the queue of the NIC. */
static void test_stopped_only_no_vhost(void)
{
    Fixture f;

    fixture_start(&f, CAPTURE STOPPED_ONLY);
    g_assert_false(vhost_started(&f));
    host_send(&f, 0, 20);
    vm_stop(&f);
    expect_out(&f, 0, 20);
    host_send(&f, 20, 20);
    expect_out(&f, 20, 20);
    vm_cont(&f);
    g_assert_cmpuint(counter(&f, "cap", "capture-packets"), ==, 40);
    fixture_close(&f);
}

/* Turn on both queue pairs; the control queue is the fifth. */
static void guest_start_multiqueue(Fixture *f, QVirtQueue *queues[5])
{
    struct virtio_net_ctrl_hdr hdr = {
        .class = VIRTIO_NET_CTRL_MQ,
        .cmd = VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET,
    };
    gint64 end = g_get_monotonic_time() + TIMEOUT_US;
    QVirtioDevice *vdev = &f->dev->vdev;
    uint64_t addr = guest_alloc(&f->alloc, 16);
    uint32_t head, len;

    qvirtio_start_device(vdev);
    qvirtio_set_features(vdev, qvirtio_get_features(vdev) &
                               (1ull << VIRTIO_F_VERSION_1 |
                                1ull << VIRTIO_NET_F_MRG_RXBUF |
                                1ull << VIRTIO_NET_F_CTRL_VQ |
                                1ull << VIRTIO_NET_F_MQ));
    for (int i = 0; i < 5; i++) {
        queues[i] = qvirtqueue_setup(vdev, &f->alloc, i);
    }
    qvirtio_set_driver_ok(vdev);

    qtest_memwrite(f->qts, addr, &hdr, sizeof(hdr));
    qtest_writew(f->qts, addr + 2, 2);
    qtest_writeb(f->qts, addr + 4, 0xff);
    head = qvirtqueue_add(f->qts, queues[4], addr, sizeof(hdr), false, true);
    qvirtqueue_add(f->qts, queues[4], addr + 2, 2, false, true);
    qvirtqueue_add(f->qts, queues[4], addr + 4, 1, true, false);
    qvirtqueue_kick(f->qts, vdev, queues[4], head);
    while (!qvirtqueue_get_buf(f->qts, queues[4], &head, &len)) {
        g_assert_cmpint(g_get_monotonic_time(), <, end);
    }
    g_assert_cmphex(qtest_readb(f->qts, addr + 4), ==, VIRTIO_NET_OK);
    guest_free(&f->alloc, addr);
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
static void test_stopped_only_not_connected(void)
{
    uint32_t taken;
    Fixture f;

    fixture_start(&f, CAPTURE STOPPED_ONLY);
    guest_start(&f);
    close(f.out);
    vm_stop(&f);
    host_send(&f, 0, 20);
    f.out = connect_to(&f, "out");
    expect_out(&f, 0, 20);

    close(f.out);
    f.out = -1;
    host_send(&f, 20, 5);
    vm_cont(&f);
    guest_post(&f, 10);
    host_send(&f, 25, 5);
    /* Some may have been taken before QEMU saw the peer leave. */
    taken = counter(&f, "cap", "capture-packets");
    g_assert_cmpuint(taken, <=, 25);
    expect_guest(&f, taken, 30 - taken);
    fixture_close(&f);
}

/* The peer comes later: what waited in the NIC's queue is first. */
static void test_stopped_only_late_peer(void)
{
    Fixture f;

    fixture_start(&f, CAPTURE STOPPED_ONLY);
    close(f.out);
    host_send(&f, 0, 5);
    vm_stop(&f);
    expect_source(&f, "cap", "chain");
    for (int i = 0; i < 5; i++) {
        g_assert_cmpuint(counter(&f, "cap", "capture-packets"), <=, 1);
    }
    f.out = connect_to(&f, "out");
    expect_out(&f, 0, 5);
    fixture_close(&f);
}

static void expect_status(Fixture *f, const char *command, const char *status)
{
    gint64 end = g_get_monotonic_time() + TIMEOUT_US;
    bool same = false;

    while (!same) {
        QDict *rsp = qtest_qmp(f->qts, "{'execute': %s}", command);

        same = !g_strcmp0(qdict_get_try_str(qdict_get_qdict(rsp, "return"),
                                            "status"), status);
        qobject_unref(rsp);
        g_assert_cmpint(g_get_monotonic_time(), <, end);
    }
}

/* Start a migration to nowhere, up to where the VM has stopped. */
static void migration_start(Fixture *f)
{
    qtest_qmp_assert_success(f->qts,
        "{'execute': 'migrate-set-capabilities', 'arguments':"
        " {'capabilities': [{'capability': 'pause-before-switchover',"
        "                    'state': true}]}}");
    qtest_qmp_assert_success(f->qts, "{'execute': 'migrate', 'arguments':"
                             " {'uri': 'exec:cat > /dev/null'}}");
    expect_status(f, "query-migrate", "pre-switchover");
}

static void migration_cancel(Fixture *f)
{
    qtest_qmp_assert_success(f->qts, "{'execute': 'migrate_cancel'}");
    expect_status(f, "query-migrate", "cancelled");
    expect_status(f, "query-status", "running");
}

/*
 * What was handed over is gone for the guest, what was not is the guest's; and
 * all of it is while the filter was off.
 */
static void test_migration_cancelled(void)
{
    Fixture f;

    fixture_start(&f, CAPTURE STOPPED_ONLY);
    guest_start(&f);
    guest_post(&f, 100);
    host_send(&f, 0, 10);
    expect_guest(&f, 0, 10);
    for (int i = 0; i < 3; i++) {
        uint32_t n = 10 + 40 * i;

        set_status(&f, "cap", "on");
        migration_start(&f);
        expect_source(&f, "cap", "chain");
        host_send(&f, n, 10);
        expect_out(&f, n, 10);
        migration_cancel(&f);
        expect_source(&f, "cap", "none");
        g_assert_true(vhost_started(&f));
        host_send(&f, n + 10, 10);
        expect_guest(&f, n + 10, 10);

        set_status(&f, "cap", "off");
        migration_start(&f);
        host_send(&f, n + 20, 10);
        migration_cancel(&f);
        host_send(&f, n + 30, 10);
        expect_guest(&f, n + 20, 20);
    }
    g_assert_cmpuint(counter(&f, "cap", "capture-packets"), ==, 30);
    fixture_close(&f);
}

/* A peer that does not read: packets wait, and go one way or the other. */
static void test_stopped_only_slow_peer(void)
{
    const uint32_t burst = 800, rounds = 120;
    uint32_t sent = 0, taken;
    Fixture f;

    fixture_start(&f, CAPTURE STOPPED_ONLY);
    guest_start(&f);
    vm_stop(&f);
    /* More than the socket and the stage hold, less than the TAP drops. */
    for (uint32_t i = 0; i < rounds; i++) {
        gint64 end = g_get_monotonic_time() + G_USEC_PER_SEC;

        host_send(&f, sent, burst);
        sent += burst;
        while ((taken = counter(&f, "cap", "capture-packets")) < sent &&
               g_get_monotonic_time() < end) {
            /* until it takes no more */
        }
        if (taken < sent) {
            break;
        }
    }
    g_assert_cmpuint(taken, <, sent);
    host_send(&f, sent, 100);
    g_assert_cmpuint(counter(&f, "cap", "capture-interface-drops"), ==, 0);
    vm_cont(&f);
    guest_post(&f, 50);
    expect_guest(&f, taken, 50);
    expect_out(&f, 0, taken);
    g_assert_cmpuint(counter(&f, "cap", "capture-packets"), ==, taken);
    fixture_close(&f);
}

/* Inject */

static void test_inject_tx(void)
{
    Fixture f;

    fixture_start(&f, INJECT "tx");
    guest_start(&f);
    g_assert_true(vhost_started(&f));
    guest_post(&f, 50);
    in_send(&f, 0, 50);
    expect_guest(&f, 0, 50);
    g_assert_cmpuint(counter(&f, "inj", "inject-packets"), ==, 50);
    g_assert_cmpuint(counter(&f, "inj", "inject-bytes"), ==, 50 * FRAME_LEN);
    fixture_close(&f);
}

static void test_inject_rx(void)
{
    Fixture f;

    fixture_start(&f, INJECT "rx");
    guest_start(&f);
    g_assert_true(vhost_started(&f));
    in_send(&f, 0, 50);
    expect_host(&f, 0, 50);
    fixture_close(&f);
}

static void test_inject_all(void)
{
    Fixture f;

    fixture_start(&f, INJECT "all");
    guest_start(&f);
    guest_post(&f, 20);
    in_send(&f, 0, 20);
    expect_guest(&f, 0, 20);
    expect_host(&f, 0, 20);
    fixture_close(&f);
}

/* More than the TAP and the guest hold: they wait, and none is lost. */
static void test_inject_full(void)
{
    const uint32_t count = 200;
    g_autofree char *cmd = NULL;
    Fixture f;

    fixture_start(&f, INJECT "tx");
    cmd = g_strdup_printf("ip link set %s txqueuelen 20", f.ifname);
    g_assert_cmpint(system(cmd), ==, 0);
    guest_start(&f);
    in_send(&f, 0, count);
    guest_post(&f, count);
    expect_guest(&f, 0, count);
    g_assert_cmpuint(counter(&f, "inj", "inject-packets"), ==, count);
    fixture_close(&f);
}

static void test_inject_hold(void)
{
    Fixture f;

    fixture_start(&f, INJECT "tx");
    guest_start(&f);
    guest_post(&f, 20);
    vm_stop(&f);
    in_send(&f, 0, 10);
    g_assert_cmpuint(counter(&f, "inj", "inject-packets"), ==, 0);
    vm_cont(&f);
    expect_guest(&f, 0, 10);
    in_send(&f, 10, 10);
    expect_guest(&f, 10, 10);
    fixture_close(&f);
}

/* The source of a migration leaves before the target resumes. */
static void test_inject_hold_peer_gone(void)
{
    Fixture f;

    fixture_start(&f, INJECT "tx");
    guest_start(&f);
    guest_post(&f, 40);
    vm_stop(&f);
    in_send(&f, 0, 30);
    close(f.in);
    f.in = connect_to(&f, "in");
    in_send(&f, 30, 10);
    vm_cont(&f);
    expect_guest(&f, 0, 40);
    fixture_close(&f);
}

static void test_inject_when_stopped(void)
{
    Fixture f;

    fixture_start(&f, INJECT "tx,enable_when_stopped=on");
    guest_start(&f);
    guest_post(&f, 20);
    vm_stop(&f);
    in_send(&f, 0, 10);
    wait_counter(&f, "inj", "inject-packets", 10);
    vm_cont(&f);
    guest_post(&f, 20);
    fixture_close(&f);
}

static void test_inject_status(void)
{
    Fixture f;

    fixture_start(&f, INJECT "tx,status=off");
    guest_start(&f);
    guest_post(&f, 20);
    in_send(&f, 10, 10);
    host_send(&f, 0, 10);
    expect_guest(&f, 0, 10);
    set_status(&f, "inj", "on");
    expect_guest(&f, 10, 10);
    fixture_close(&f);
}

/* The number of packet sockets on the interface, by protocol and hook. */
static int packet_sockets(const char *ifname, unsigned protocol, int hooked)
{
    g_autofree char *text = NULL;
    g_auto(GStrv) lines = NULL;
    int count = 0;

    g_assert_true(g_file_get_contents("/proc/net/packet", &text, NULL, NULL));
    lines = g_strsplit(text, "\n", -1);
    for (int i = 1; lines[i] && *lines[i]; i++) {
        unsigned proto, ifindex, running;

        g_assert_cmpint(sscanf(lines[i], "%*s %*s %*s %x %u %u",
                               &proto, &ifindex, &running), ==, 3);
        count += ifindex == if_nametoindex(ifname) && proto == protocol &&
                 running == hooked;
    }
    return count;
}

static void test_inject_receives_nothing(void)
{
    Fixture f;

    fixture_start(&f, INJECT "tx");
    guest_start(&f);
    guest_post(&f, 20);
    host_send(&f, 0, 20);
    expect_guest(&f, 0, 20);
    g_assert_cmpint(packet_sockets(f.ifname, 0, 0), ==, 1);
    g_assert_cmpint(packet_sockets(f.ifname, ETH_P_ALL, 1), ==, 0);
    fixture_close(&f);
}

/* No cost while it is off: it is not on the interface's list. */
static void test_unhooked(void)
{
    Fixture f;

    fixture_start(&f, CAPTURE "tx");
    expect_source(&f, "cap", "packet-socket");
    g_assert_cmpint(packet_sockets(f.ifname, ETH_P_ALL, 1), ==, 1);
    set_status(&f, "cap", "off");
    g_assert_cmpint(packet_sockets(f.ifname, ETH_P_ALL, 1), ==, 0);
    set_status(&f, "cap", "on");
    g_assert_cmpint(packet_sockets(f.ifname, ETH_P_ALL, 1), ==, 1);
    vm_stop(&f);
    g_assert_cmpint(packet_sockets(f.ifname, ETH_P_ALL, 1), ==, 0);
    fixture_close(&f);
}

/* What an object injects it does not capture; nor does another. */
static void test_no_loop(void)
{
    Fixture f;

    fixture_start(&f, "-object filter-redirector,id=both,netdev=n0,indev=in,"
                      "outdev=out,vnet_hdr_support=on,queue=tx");
    guest_start(&f);
    guest_post(&f, 20);
    in_send(&f, 100, 10);
    expect_guest(&f, 100, 10);
    host_send(&f, 0, 1);
    expect_out(&f, 0, 1);
    expect_guest(&f, 0, 1);
    g_assert_cmpuint(counter(&f, "both", "capture-packets"), ==, 1);
    g_assert_cmpuint(counter(&f, "both", "inject-packets"), ==, 10);
    fixture_close(&f);
}

static void test_no_loop_rx(void)
{
    Fixture f;

    fixture_start(&f, "-object filter-redirector,id=both,netdev=n0,indev=in,"
                      "outdev=out,vnet_hdr_support=on,queue=rx "
                      "-chardev ringbuf,id=null,size=1024 "
                      "-object filter-redirector,id=cap,netdev=n0,outdev=null,"
                      "queue=all");
    guest_start(&f);
    for (int i = 0; i < 5; i++) {
        in_send(&f, 100 + i, 10);
        expect_host(&f, 100 + i, 10);
        guest_send(&f, i, 1);
        expect_out(&f, i, 1);
        expect_host(&f, i, 1);
    }
    g_assert_cmpuint(counter(&f, "both", "capture-packets"), ==, 5);
    g_assert_cmpuint(counter(&f, "both", "inject-packets"), ==, 50);
    g_assert_cmpuint(counter(&f, "cap", "capture-packets"), ==, 5);
    fixture_close(&f);
}

/* One VM's redirector to another's: what is captured is injected as it was. */
static void test_relay(void)
{
    uint8_t record[8 + 12 + FRAME_LEN];
    Fixture f;

    fixture_start(&f, CAPTURE "rx " INJECT "tx");
    guest_start(&f);
    guest_post(&f, 30);
    for (int i = 0; i < 30; i++) {
        guest_send(&f, i, 1);
        read_full(f.out, record, sizeof(record));
        g_assert_cmpint(write(f.in, record, sizeof(record)), ==,
                        sizeof(record));
        expect_guest(&f, i, 1);
    }
    fixture_close(&f);
}

/* Bad frames are skipped and counted, and the good ones arrive. */
static void test_inject_bad_frames(void)
{
    uint8_t bad[8 + 4096] = { };
    Fixture f;

    fixture_start(&f, INJECT "tx");
    guest_start(&f);
    guest_post(&f, 20);
    in_send(&f, 0, 1);
    stl_be_p(bad, 0);                           /* empty */
    g_assert_cmpint(write(f.in, bad, 8), ==, 8);
    in_send(&f, 1, 1);
    stl_be_p(bad, 12 + 13);                     /* no Ethernet header */
    stl_be_p(bad + 4, 12);
    g_assert_cmpint(write(f.in, bad, 8 + 25), ==, 8 + 25);
    in_send(&f, 2, 1);
    stl_be_p(bad, 12 + 4000);                   /* over the MTU */
    g_assert_cmpint(write(f.in, bad, 8 + 4012), ==, 8 + 4012);
    in_send(&f, 3, 1);
    stl_be_p(bad, 100);                         /* header over the end */
    stl_be_p(bad + 4, 0xffffff00);
    g_assert_cmpint(write(f.in, bad, 108), ==, 108);
    in_send(&f, 4, 1);
    expect_guest(&f, 0, 5);
    g_assert_cmpuint(counter(&f, "inj", "inject-skipped-runt"), ==, 2);
    g_assert_cmpuint(counter(&f, "inj", "inject-skipped-oversize"), ==, 1);
    g_assert_cmpuint(counter(&f, "inj", "inject-skipped-header"), ==, 1);

    /* A length that makes no sense ends the connection, and only that. */
    memset(bad, 0xff, 8);
    g_assert_cmpint(write(f.in, bad, 8), ==, 8);
    wait_readable(f.in);
    g_assert_cmpint(read(f.in, bad, 1), ==, 0);
    close(f.in);
    f.in = connect_to(&f, "in");
    in_send(&f, 5, 5);
    expect_guest(&f, 5, 5);
    fixture_close(&f);
}

/* A GSO frame that the kernel cannot segment holds nothing up for ever. */
static void test_inject_bad_gso(void)
{
    uint8_t record[8 + 12 + 2000] = { };
    struct virtio_net_hdr *hdr = (void *)(record + 8);
    Fixture f;

    fixture_start(&f, INJECT "tx");
    guest_start(&f);
    guest_post(&f, 20);
    in_send(&f, 0, 1);
    stl_be_p(record, 12 + 2000);
    stl_be_p(record + 4, 12);
    make_frame(record + 8 + 12, 0xbad);
    hdr->flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
    hdr->gso_type = VIRTIO_NET_HDR_GSO_TCPV4;
    hdr->gso_size = 1000;
    hdr->hdr_len = 54;
    hdr->csum_start = 34;
    hdr->csum_offset = 16;
    g_assert_cmpint(write(f.in, record, sizeof(record)), ==, sizeof(record));
    in_send(&f, 1, 10);
    expect_guest(&f, 0, 11);
    fixture_close(&f);
}

/* Life cycle */

static void add_capture(Fixture *f)
{
    qtest_qmp_assert_success(f->qts, "{'execute': 'object-add', 'arguments':"
        " {'qom-type': 'filter-redirector', 'id': 'cap', 'netdev': 'n0',"
        "  'outdev': 'out', 'queue': 'tx', 'vnet_hdr_support': true}}");
}

static void add_inject(Fixture *f)
{
    qtest_qmp_assert_success(f->qts, "{'execute': 'object-add', 'arguments':"
        " {'qom-type': 'filter-redirector', 'id': 'inj', 'netdev': 'n0',"
        "  'indev': 'in', 'queue': 'tx', 'vnet_hdr_support': true}}");
}

static void test_hotplug(void)
{
    Fixture f;

    fixture_start(&f, "");
    guest_start(&f);
    guest_post(&f, 40);
    add_capture(&f);
    host_send(&f, 0, 10);
    expect_out(&f, 0, 10);
    add_inject(&f);
    in_send(&f, 10, 10);
    expect_guest(&f, 0, 20);
    del_object(&f, "cap");
    host_send(&f, 20, 10);
    add_capture(&f);
    host_send(&f, 30, 10);
    expect_out(&f, 30, 10);
    del_object(&f, "inj");
    del_object(&f, "cap");
    g_assert_cmpint(packet_sockets(f.ifname, ETH_P_ALL, 1), ==, 0);
    expect_guest(&f, 20, 20);
    g_assert_true(vhost_started(&f));
    fixture_close(&f);
}

/* The TAP is not read while the VM is stopped: the guest gets it all. */
static void test_stop_nothing_lost(void)
{
    Fixture f;

    fixture_start(&f, CAPTURE "tx " INJECT "tx");
    guest_start(&f);
    guest_post(&f, 30);
    for (int i = 0; i < 3; i++) {
        vm_stop(&f);
        host_send(&f, 10 * i, 10);
        /* Each answer is a turn of the main loop, in which it could read. */
        counter(&f, "cap", "capture-packets");
        counter(&f, "cap", "capture-packets");
        vm_cont(&f);
        expect_guest(&f, 10 * i, 10);
    }
    fixture_close(&f);
}

/*
 * At the stop a packet waits in the NIC's queue, since there is no driver,
 * and net.c drops it; the others stay in the TAP for the driver.
 */
static void test_stop_nothing_read(void)
{
    Fixture f;

    fixture_start(&f, CAPTURE "tx");
    host_send(&f, 0, 5);
    expect_out(&f, 0, 5);
    vm_stop(&f);
    counter(&f, "cap", "capture-packets");
    counter(&f, "cap", "capture-packets");
    guest_start(&f);
    guest_post(&f, 10);
    vm_cont(&f);
    g_assert_true(vhost_started(&f));
    expect_guest(&f, 1, 4);
    fixture_close(&f);
}

/* Two that save packets: each packet goes to one of them, in bounds. */
static void test_stopped_only_two(void)
{
    const uint32_t burst = 900;
    uint32_t sent = 0, first, second;
    Fixture f;

    fixture_start(&f, CAPTURE STOPPED_ONLY);
    qtest_qmp_assert_success(f.qts, "{'execute': 'object-add', 'arguments':"
        " {'qom-type': 'filter-redirector', 'id': 'cap2', 'netdev': 'n0',"
        "  'outdev': 'in', 'queue': 'tx', 'vnet_hdr_support': true,"
        "  'enable_when_running': false, 'enable_when_stopped': true}}");
    guest_start(&f);
    vm_stop(&f);
    /* Nobody reads.  One peer comes back all the time. */
    for (int i = 0; i < 60; i++) {
        host_send(&f, sent, burst);
        sent += burst;
        first = counter(&f, "cap", "capture-packets");
        second = counter(&f, "cap2", "capture-packets");
    }
    for (int i = 0; i < 5; i++) {
        close(f.in);
        expect_source(&f, "cap2", "chain");
        f.in = connect_to(&f, "in");
    }
    first = counter(&f, "cap", "capture-packets");
    for (int i = 0; i < 5; i++) {
        host_send(&f, sent, burst);
        sent += burst;
        counter(&f, "cap", "capture-packets");
    }
    second = counter(&f, "cap2", "capture-packets");
    g_test_message("%u sent, %u and %u taken", sent, first, second);
    /* 1 MiB each, and 50 packets at most for each time it was full */
    g_assert_cmpuint(first, <, 18000);
    g_assert_cmpuint(second, <, 18000 + 6 * 3000);
    expect_out(&f, 0, 10000);
    fixture_close(&f);
}

/* While the VM is stopped what goes to the network waits, and is not lost. */
static void test_inject_rx_waits(void)
{
    Fixture f;

    fixture_start(&f, INJECT "rx,enable_when_stopped=on");
    guest_start(&f);
    vm_stop(&f);
    in_send(&f, 0, 200);
    g_assert_cmpuint(counter(&f, "inj", "inject-packets"), ==, 0);
    vm_cont(&f);
    expect_host(&f, 0, 200);
    fixture_close(&f);
}

/* The next user of a connection begins with a frame, or gets another one. */
static void test_framing_after_del(void)
{
    g_autofree uint8_t *buf = g_malloc(1 * MiB);
    gint64 end = g_get_monotonic_time() + TIMEOUT_US;
    int queued;
    Fixture f;

    fixture_start(&f, "");
    guest_start(&f);
    add_capture(&f);
    /*
     * Fill the connection, and then make room: the socket takes what it can
     * of all that is staged then, and cuts off a frame.
     */
    for (int i = 0; i < 8; i++) {
        host_send(&f, 0, 900);
        counter(&f, "cap", "capture-packets");
    }
    g_assert_cmpint(ioctl(f.out, FIONREAD, &queued), ==, 0);
    g_assert_cmpint(queued, <=, 1 * MiB);
    read_full(f.out, buf, queued);
    do {
        counter(&f, "cap", "capture-packets");
        g_assert_cmpint(ioctl(f.out, FIONREAD, &queued), ==, 0);
        g_assert_cmpint(g_get_monotonic_time(), <, end);
    } while (queued < 128 * KiB);
    del_object(&f, "cap");
    do {
        wait_readable(f.out);
    } while (read(f.out, buf, 128 * KiB) > 0);
    close(f.out);
    f.out = connect_to(&f, "out");
    add_capture(&f);
    expect_source(&f, "cap", "packet-socket");
    host_send(&f, 5000, 5);
    expect_out(&f, 5000, 5);
    fixture_close(&f);
}

static void test_netdev_del(void)
{
    QDict *rsp;
    Fixture f;

    fixture_start(&f, CAPTURE "tx " INJECT "tx");
    guest_start(&f);
    qtest_qmp_assert_success(f.qts, "{'execute': 'netdev_del', 'arguments':"
                             " {'id': 'n0'}}");
    rsp = qtest_qmp(f.qts, "{'execute': 'qom-list', 'arguments':"
                    " {'path': '/objects/cap'}}");
    g_assert_true(qdict_haskey(rsp, "error"));
    qobject_unref(rsp);
    g_assert_cmpint(packet_sockets(f.ifname, ETH_P_ALL, 1), ==, 0);
    fixture_close(&f);
}

static void test_device_del(void)
{
    Fixture f;

    fixture_start(&f, CAPTURE "tx");
    guest_start(&f);
    qtest_qmp_device_del_send(f.qts, "nic");
    qtest_system_reset_nowait(f.qts);
    qtest_qmp_eventwait(f.qts, "DEVICE_DELETED");
    host_send(&f, 0, 10);
    expect_out(&f, 0, 10);
    f.guest.rx = NULL;
    del_object(&f, "cap");
    qtest_qmp_assert_success(f.qts, "{'execute': 'netdev_del', 'arguments':"
                             " {'id': 'n0'}}");
    fixture_close(&f);
}

static int count_fds(Fixture *f)
{
    g_autofree char *path = g_strdup_printf("/proc/%d/fd", qtest_pid(f->qts));
    g_autoptr(GDir) dir = g_dir_open(path, 0, NULL);
    int count = 0;

    while (g_dir_read_name(dir)) {
        count++;
    }
    return count;
}

static void test_no_leak(void)
{
    Fixture f;
    int before;

    fixture_start(&f, "");
    guest_start(&f);
    add_capture(&f);
    add_inject(&f);
    del_object(&f, "cap");
    del_object(&f, "inj");
    before = count_fds(&f);
    for (int i = 0; i < 1000; i++) {
        add_capture(&f);
        add_inject(&f);
        del_object(&f, "cap");
        del_object(&f, "inj");
    }
    g_assert_cmpint(count_fds(&f), ==, before);
    guest_post(&f, 10);
    host_send(&f, 0, 10);
    expect_guest(&f, 0, 10);
    fixture_close(&f);
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

static int open_tap(const char *ifname)
{
    struct ifreq ifr = { .ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR };
    int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);

    pstrcpy(ifr.ifr_name, sizeof(ifr.ifr_name), ifname);
    g_assert_cmpint(fd, >=, 0);
    g_assert_cmpint(ioctl(fd, TUNSETIFF, &ifr), ==, 0);
    return fd;
}

static void test_no_foreign_frames(void)
{
    Flood flood = { };
    GThread *thread;
    int tap;
    Fixture f;

    fixture_start(&f, "");
    guest_start(&f);
    tap = open_tap("tapflood");
    set_interface_up("tapflood", true);
    flood.fd = open_host("tapflood");
    thread = g_thread_new("flood", flood_thread, &flood);
    for (int i = 0; i < 100; i++) {
        add_capture(&f);
        host_send(&f, i, 1);
        expect_out(&f, i, 1);
        del_object(&f, "cap");
    }
    qatomic_set(&flood.stop, true);
    g_thread_join(thread);
    close(flood.fd);
    close(tap);
    fixture_close(&f);
}

/* Peers of outdev */

static void test_slow_peer(void)
{
    const uint32_t burst = 1000, bursts = 100;
    uint64_t captured, dropped;
    Fixture f;

    fixture_start(&f, CAPTURE "tx");
    guest_start(&f);
    for (uint32_t i = 0; i < bursts; i++) {
        host_send(&f, i * burst, burst);
        /* The main loop is not held. */
        counter(&f, "cap", "capture-packets");
    }
    dropped = counter(&f, "cap", "capture-kernel-drops");
    g_assert_cmpuint(dropped, >, 0);
    captured = counter(&f, "cap", "capture-packets");
    g_assert_cmpuint(captured, >, 10000);
    g_assert_cmpuint(captured, <, bursts * burst);
    expect_out(&f, 0, 10000);
    fixture_close(&f);
}

/* With more memory nothing is dropped. */
static void test_buffer_size(void)
{
    const uint32_t burst = 1000, bursts = 40;
    Fixture f;

    fixture_start(&f, CAPTURE "tx,buffer-size=64M");
    g_assert_cmpuint(counter(&f, "cap", "buffer-size"), ==, 64 * MiB);
    guest_start(&f);
    for (uint32_t i = 0; i < bursts; i++) {
        host_send(&f, i * burst, burst);
        counter(&f, "cap", "capture-packets");
    }
    g_assert_cmpuint(counter(&f, "cap", "capture-kernel-drops"), ==, 0);
    expect_out(&f, 0, bursts * burst);
    del_object(&f, "cap");
    add_capture(&f);
    g_assert_cmpuint(counter(&f, "cap", "buffer-size"), ==, 8 * MiB);
    fixture_close(&f);
}

/* The peer leaves in the middle of a frame. */
static void test_reconnect(void)
{
    uint8_t byte;
    Fixture f;

    fixture_start(&f, CAPTURE "tx");
    guest_start(&f);
    for (int i = 0; i < 20; i++) {
        host_send(&f, 1000 * i, 20);
        read_full(f.out, &byte, 1);
        close(f.out);
        expect_source(&f, "cap", "none");
        f.out = connect_to(&f, "out");
        expect_source(&f, "cap", "packet-socket");
        host_send(&f, 1000 * i + 500, 5);
        expect_out(&f, 1000 * i + 500, 5);
    }
    fixture_close(&f);
}

/* Without a packet socket: what the chain brings is written together */

#define CHAIN "-object filter-redirector,id=cap,netdev=n0,outdev=out," \
              "vnet_hdr_support=on,queue=tx"

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

/* A slow peer holds up QEMU, and gets everything. */
static void test_chain_slow_peer(void)
{
    const uint32_t frames = 30000;
    g_autofree char *command = NULL;
    Fixture f;

    fixture_init(&f, "vhost=off", "", CHAIN);
    command = g_strdup_printf("ip link set %s txqueuelen %u", f.ifname,
                              frames);
    g_assert_cmpint(system(command), ==, 0);
    guest_start(&f);
    guest_post(&f, 1);
    host_send(&f, 0, frames);
    expect_out(&f, 0, frames);
    fixture_close(&f);
}

static void expect_connected(Fixture *f, const char *label, bool connected)
{
    gint64 end = g_get_monotonic_time() + TIMEOUT_US;
    bool is_connected = !connected;

    while (is_connected != connected) {
        QDict *rsp = qtest_qmp(f->qts, "{'execute': 'query-chardev'}");
        QListEntry *entry;

        QLIST_FOREACH_ENTRY(qdict_get_qlist(rsp, "return"), entry) {
            QDict *chr = qobject_to(QDict, qlist_entry_obj(entry));

            if (g_str_equal(qdict_get_str(chr, "label"), label)) {
                is_connected = !g_str_has_prefix(qdict_get_str(chr, "filename"),
                                                 "disconnected:");
            }
        }
        qobject_unref(rsp);
        g_assert_cmpint(g_get_monotonic_time(), <, end);
    }
}

/* The peer leaves in the middle of a frame; the next one gets whole ones. */
static void test_chain_reconnect(void)
{
    uint8_t frame[BUFFER_LEN], header[24], byte;
    uint32_t header_len, n = 0;
    Fixture f;

    fixture_init(&f, "vhost=off", "", CHAIN);
    guest_start(&f);
    guest_post(&f, 1);
    for (int round = 0; round < 5; round++) {
        /* More than the connection takes, less than makes QEMU wait. */
        for (int i = 0; i < 10; i++) {
            host_send(&f, n, 600);
            n += 600;
            counter(&f, "cap", "capture-packets");
        }
        read_full(f.out, &byte, 1);
        close(f.out);
        expect_connected(&f, "out", false);
        f.out = connect_to(&f, "out");
        expect_connected(&f, "out", true);
        /* Before it may come some that waited in the TAP. */
        host_send(&f, n, 1);
        do {
            g_assert_cmpuint(read_stream(f.out, frame, sizeof(frame), header,
                                         &header_len), ==, FRAME_LEN);
            g_assert_cmpuint(frame_number(frame), <=, n);
        } while (frame_number(frame) < n);
        n++;
    }
    fixture_close(&f);
}

/* The interface */

static void test_interface_down_up(void)
{
    Fixture f;

    fixture_start(&f, CAPTURE "tx " INJECT "tx");
    guest_start(&f);
    guest_post(&f, 40);
    set_interface_up(f.ifname, false);
    in_send(&f, 0, 3);
    wait_counter(&f, "inj", "inject-interface-drops", 3);
    set_interface_up(f.ifname, true);
    close(f.host);
    f.host = open_host(f.ifname);
    host_send(&f, 10, 10);
    expect_out(&f, 10, 10);
    in_send(&f, 20, 10);
    expect_guest(&f, 10, 20);
    fixture_close(&f);
}

/* Errors */

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

static void test_errors(void)
{
    Fixture f;

    fixture_start(&f, "-netdev hubport,id=hub,hubid=1 "
                      "-netdev tap,id=plain,ifname=tapplain,script=no,"
                      "downscript=no,vhost=off");
    expect_error_args(&f, "'netdev': 'n0', 'outdev': 'out',"
                      " 'packet-socket': 'off'",
                      "Vhost is not supported: the packets of netdev 'n0' of "
                      "type 'tap'");
    expect_error_args(&f, "'netdev': 'hub', 'outdev': 'out',"
                      " 'packet-socket': 'on'",
                      "'packet-socket=on' needs a netdev of type 'tap', and "
                      "netdev 'hub' is of type 'hubport'");
    expect_error_args(&f, "'netdev': 'plain', 'outdev': 'out',"
                      " 'enable_when_stopped': true",
                      "need a packet socket, which is not used on netdev "
                      "'plain'");
    expect_error_args(&f, "'netdev': 'n0', 'outdev': 'out',"
                      " 'enable_when_running': false",
                      "leaves nothing to do");
    expect_error_args(&f, "'netdev': 'plain', 'outdev': 'out',"
                      " 'buffer-size': 4194304",
                      "'buffer-size' is that of a packet socket, which is not "
                      "used on netdev 'plain'");
    expect_error_args(&f, "'netdev': 'n0', 'outdev': 'out',"
                      " 'buffer-size': 1000000", "from 1 MiB to 1 GiB");
    expect_error_args(&f, "'netdev': 'n0', 'outdev': 'none'",
                      "'none' not found");
    expect_error_args(&f, "'netdev': 'n0'", "at least one property");
    expect_error_args(&f, "'netdev': 'n0', 'outdev': 'out', 'indev': 'out'",
                      "could not be same");

    /* Other filters are still refused there. */
    qobject_unref(qtest_qmp_assert_failure_ref(f.qts,
        "{'execute': 'object-add', 'arguments': {'qom-type': 'filter-buffer',"
        " 'id': 'bad', 'netdev': 'n0', 'interval': 1000}}"));

    /* Properties stay as they are once the filter is set up. */
    add_capture(&f);
    qobject_unref(qtest_qmp_assert_failure_ref(f.qts,
        "{'execute': 'qom-set', 'arguments': {'path': '/objects/cap',"
        " 'property': 'enable_when_stopped', 'value': true}}"));
    del_object(&f, "cap");

    /* And the VM is as it was. */
    guest_start(&f);
    guest_post(&f, 1);
    host_send(&f, 0, 1);
    expect_guest(&f, 0, 1);
    fixture_close(&f);
}

static void test_error_interface_gone(void)
{
    g_autofree char *cmd = NULL;
    Fixture f;

    fixture_start(&f, "");
    cmd = g_strdup_printf("ip link del %s", f.ifname);
    g_assert_cmpint(system(cmd), ==, 0);
    expect_error_args(&f, "'netdev': 'n0', 'outdev': 'out'",
                      "netdev 'n0': could not get the TAP's interface");
    fixture_close(&f);
}

/* Run @func in a child that has its own namespaces and capabilities. */
static void in_child(void (*func)(void))
{
    int status;
    pid_t pid = fork();

    if (!pid) {
        func();
        _exit(0);
    }
    g_assert_cmpint(waitpid(pid, &status, 0), ==, pid);
    g_assert_cmpint(status, ==, 0);
}

static void no_cap_net_raw(void)
{
    Fixture f;

    g_assert_cmpint(prctl(PR_CAPBSET_DROP, CAP_NET_RAW), ==, 0);
    fixture_start(&f, "");
    expect_error_args(&f, "'netdev': 'n0', 'outdev': 'out'",
                      "could not open a packet socket for interface");
    expect_error_args(&f, "'netdev': 'n0', 'indev': 'in', 'queue': 'tx'",
                      "Operation not permitted");
    /* What needs no packet socket needs no capability. */
    qtest_qmp_assert_success(f.qts, "{'execute': 'object-add', 'arguments':"
        " {'qom-type': 'filter-redirector', 'id': 'cap', 'netdev': 'n0',"
        "  'outdev': 'out', 'enable_when_running': false,"
        "  'enable_when_stopped': true}}");
    fixture_close(&f);
}

static void test_error_no_cap_net_raw(void)
{
    in_child(no_cap_net_raw);
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

static void test_info_network(void)
{
    g_autofree char *text = NULL;
    Fixture f;

    fixture_start(&f, CAPTURE "tx");
    host_send(&f, 0, 3);
    expect_out(&f, 0, 3);
    text = qtest_hmp(f.qts, "info network");
    g_assert_nonnull(strstr(text, "capture-packets=3"));
    g_assert_nonnull(strstr(text, "source=packet-socket"));
    g_assert_nonnull(strstr(text, f.ifname));
    fixture_close(&f);
}

static void skip(void)
{
    g_test_skip("needs root and /dev/vhost-net");
}

static void add(const char *path, void (*func)(void))
{
    g_autofree char *full = g_strdup_printf("/filter-redirector-vhost/%s",
                                            path);

    qtest_add_func(full, have_vhost ? func : skip);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);

    have_vhost = access("/dev/vhost-net", R_OK | W_OK) == 0 &&
                 unshare(CLONE_NEWNET | CLONE_NEWNS) == 0;
    if (have_vhost) {
        /* An interface that comes up shall not send anything by itself. */
        g_assert_cmpint(system("mount --make-rprivate / && "
                               "mount -t sysfs sysfs /sys && "
                               "ip link set lo up && "
                               "sysctl -q -w net.ipv6.conf.all.disable_ipv6=1 "
                               "net.ipv6.conf.default.disable_ipv6=1"), ==, 0);
    }

    add("capture/tx", test_capture_tx);
    add("capture/rx", test_capture_rx);
    add("capture/tx-only", test_capture_tx_only);
    add("capture/all", test_capture_all);
    add("capture/driver-reload", test_capture_driver_reload);
    add("capture/chain-reads", test_capture_chain_reads);
    add("capture/multiqueue", test_capture_multiqueue);
    add("capture/bursts", test_capture_bursts);
    add("capture/two", test_capture_two);
    add("capture/header", test_capture_header);
    add("capture/stream-format", test_capture_stream_format);
    add("status/on-off", test_status);
    add("status/off-at-start", test_status_off_at_start);
    add("status/not-connected", test_not_connected);
    add("status/unhooked", test_unhooked);
    add("stop/running-only", test_stop_running_only);
    add("stop/both", test_stop_both);
    add("stop/stopped-only", test_stopped_only);
    add("stop/stopped-only-no-vhost", test_stopped_only_no_vhost);
    add("stop/stopped-only-multiqueue", test_stopped_only_multiqueue);
    add("stop/stopped-only-not-connected", test_stopped_only_not_connected);
    add("stop/stopped-only-late-peer", test_stopped_only_late_peer);
    add("stop/stopped-only-slow-peer", test_stopped_only_slow_peer);
    add("stop/migration-cancelled", test_migration_cancelled);
    add("inject/tx", test_inject_tx);
    add("inject/rx", test_inject_rx);
    add("inject/all", test_inject_all);
    add("inject/full", test_inject_full);
    add("inject/hold", test_inject_hold);
    add("inject/hold-peer-gone", test_inject_hold_peer_gone);
    add("inject/when-stopped", test_inject_when_stopped);
    add("inject/status", test_inject_status);
    add("inject/receives-nothing", test_inject_receives_nothing);
    add("inject/no-loop", test_no_loop);
    add("inject/no-loop-rx", test_no_loop_rx);
    add("inject/relay", test_relay);
    add("inject/bad-frames", test_inject_bad_frames);
    add("inject/bad-gso", test_inject_bad_gso);
    add("inject/rx-waits", test_inject_rx_waits);
    add("stop/nothing-lost", test_stop_nothing_lost);
    add("stop/nothing-read", test_stop_nothing_read);
    add("stop/two-filters", test_stopped_only_two);
    add("life/framing", test_framing_after_del);
    add("life/hotplug", test_hotplug);
    add("life/netdev-del", test_netdev_del);
    add("life/device-del", test_device_del);
    add("life/no-leak", test_no_leak);
    add("life/no-foreign-frames", test_no_foreign_frames);
    add("peer/slow", test_slow_peer);
    add("peer/buffer-size", test_buffer_size);
    add("peer/reconnect", test_reconnect);
    add("chain/mirror", test_chain_mirror);
    add("chain/mirror-no-peer", test_chain_mirror_no_peer);
    add("chain/slow-peer", test_chain_slow_peer);
    add("chain/reconnect", test_chain_reconnect);
    add("interface/down-up", test_interface_down_up);
    add("error/options", test_errors);
    add("error/interface-gone", test_error_interface_gone);
    add("error/no-cap-net-raw", test_error_no_cap_net_raw);
    add("error/netns", test_error_netns);
    add("error/not-a-tap", test_error_not_a_tap);
    add("info/network", test_info_network);
    return g_test_run();
}
