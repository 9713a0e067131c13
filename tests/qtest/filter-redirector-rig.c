/*
 * What the tests of filter-redirector on a TAP with vhost share
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include "filter-redirector-rig.h"
#include "libqos/malloc-pc.h"
#include "libqos/pci-pc.h"
#include "libqos/virtio.h"
#include "qemu/atomic.h"
#include "qemu/bswap.h"
#include "qemu/cutils.h"
#include "qemu/units.h"
#include "qobject/qdict.h"
#include "standard-headers/linux/virtio_pci.h"
#include "standard-headers/linux/virtio_ring.h"

#define NIC_SLOT 5
#define GUEST_RAM (128 * MiB)
#define NIC_PATH "/machine/peripheral/nic/virtio-backend"

static bool have_vhost;
static const char *test_name;

/* The host's side */

void run_command(const char *format, ...)
{
    g_autofree char *command = NULL;
    va_list ap;

    va_start(ap, format);
    command = g_strdup_vprintf(format, ap);
    va_end(ap);
    g_assert_cmpint(system(command), ==, 0);
}

void set_interface_up(const char *ifname, bool up)
{
    run_command("ip link set %s %s", ifname, up ? "up" : "down");
}

int open_host(const char *ifname)
{
    return open_host_protocol(ifname, TEST_ETHERTYPE);
}

int open_host_protocol(const char *ifname, uint16_t protocol)
{
    struct sockaddr_ll addr = {
        .sll_family = AF_PACKET,
        .sll_protocol = htons(protocol),
        .sll_ifindex = if_nametoindex(ifname),
    };
    int fd = socket(AF_PACKET, SOCK_RAW, 0);

    g_assert_cmpint(fd, >=, 0);
    g_assert_cmpint(bind(fd, (struct sockaddr *)&addr, sizeof(addr)), ==, 0);
    return fd;
}

void make_frame(uint8_t *frame, uint32_t number)
{
    static const uint8_t head[] = {
        0x52, 0x54, 0x00, 0x12, 0x34, 0x56, 0x02, 0, 0, 0, 0, 1,
        TEST_ETHERTYPE >> 8, TEST_ETHERTYPE & 0xff,
    };

    memset(frame, 0x5a, FRAME_LEN);
    memcpy(frame, head, sizeof(head));
    stl_be_p(frame + sizeof(head), number);
}

uint32_t frame_number(const uint8_t *frame)
{
    g_assert_cmphex(lduw_be_p(frame + 12), ==, TEST_ETHERTYPE);
    return ldl_be_p(frame + 14);
}

void host_send(Fixture *f, uint32_t first, uint32_t count)
{
    uint8_t frame[FRAME_LEN];

    for (uint32_t i = 0; i < count; i++) {
        make_frame(frame, first + i);
        g_assert_cmpint(send(f->host, frame, FRAME_LEN, 0), ==, FRAME_LEN);
    }
}

void wait_readable(int fd)
{
    struct pollfd pfd = { .fd = fd, .events = POLLIN };

    g_assert_cmpint(poll(&pfd, 1, TIMEOUT_US / 1000), ==, 1);
}

void expect_host(Fixture *f, uint32_t first, uint32_t count)
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

int open_tap(const char *ifname)
{
    struct ifreq ifr = { .ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR };
    int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);

    pstrcpy(ifr.ifr_name, sizeof(ifr.ifr_name), ifname);
    g_assert_cmpint(fd, >=, 0);
    g_assert_cmpint(ioctl(fd, TUNSETIFF, &ifr), ==, 0);
    return fd;
}

uint64_t statistic(const char *ifname, const char *name)
{
    g_autofree char *path = g_strdup_printf("/sys/class/net/%s/statistics/%s",
                                            ifname, name);
    g_autofree char *text = NULL;

    g_assert_true(g_file_get_contents(path, &text, NULL, NULL));
    return g_ascii_strtoull(text, NULL, 10);
}

void host_send_taken(Fixture *f, uint32_t first, uint32_t count)
{
    uint64_t taken = statistic(f->ifname, "tx_packets");

    host_send(f, first, count);
    WAIT_UNTIL(statistic(f->ifname, "tx_packets") != taken);
}

int packet_sockets(const char *ifname, unsigned protocol, int hooked)
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

int hooked_sockets(Fixture *f)
{
    return packet_sockets(f->ifname, ETH_P_ALL, 1);
}

uint16_t sum_words(const uint8_t *data, size_t len, uint32_t start)
{
    for (size_t i = 0; i < len; i++) {
        start += i & 1 ? data[i] : data[i] << 8;
        start = (start & 0xffff) + (start >> 16);
    }
    return start;
}

int amount(int quick, int slow)
{
    return g_test_slow() ? slow : quick;
}

/* The chardevs' peers */

int connect_to(Fixture *f, const char *name)
{
    g_autofree char *path = g_build_filename(f->dir, name, NULL);
    struct sockaddr_un addr = { .sun_family = AF_UNIX };
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);

    pstrcpy(addr.sun_path, sizeof(addr.sun_path), path);
    WAIT_UNTIL(connect(fd, (struct sockaddr *)&addr, sizeof(addr)) == 0);
    return fd;
}

int add_peer(Fixture *f, const char *id)
{
    int fd;

    hmp(f, "chardev-add socket,id=%s,path=%s/%s,server=on,wait=off", id,
        f->dir, id);
    fd = connect_to(f, id);
    expect_connected(f, id, true);
    return fd;
}

void read_full(int fd, void *buf, size_t size)
{
    for (size_t done = 0; done < size;) {
        ssize_t n;

        wait_readable(fd);
        n = read(fd, buf + done, size - done);
        g_assert_cmpint(n, >, 0);
        done += n;
    }
}

size_t read_stream(int fd, uint8_t *frame, size_t size,
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

void expect_stream(int fd, uint32_t first, uint32_t count)
{
    uint8_t frame[BUFFER_LEN], header[24];
    uint32_t header_len;

    for (uint32_t i = 0; i < count; i++) {
        g_assert_cmpuint(read_stream(fd, frame, sizeof(frame), header,
                                     &header_len), ==, FRAME_LEN);
        g_assert_cmpuint(frame_number(frame), ==, first + i);
        g_assert_cmphex(frame[FRAME_LEN - 1], ==, 0x5a);
    }
}

void expect_out(Fixture *f, uint32_t first, uint32_t count)
{
    expect_stream(f->out, first, count);
}

void make_record(uint8_t *record, uint32_t number)
{
    memset(record, 0, RECORD_LEN);
    stl_be_p(record, 12 + FRAME_LEN);
    stl_be_p(record + 4, 12);
    make_frame(record + 8 + 12, number);
}

void in_send(Fixture *f, uint32_t first, uint32_t count)
{
    uint8_t record[RECORD_LEN];

    for (uint32_t i = 0; i < count; i++) {
        make_record(record, first + i);
        g_assert_cmpint(write(f->in, record, sizeof(record)), ==,
                        sizeof(record));
    }
}

/* The files of filter-dump and tcpdump */

static void read_growing(FILE *file, void *buf, size_t size)
{
    gint64 end = g_get_monotonic_time() + TIMEOUT_US;

    for (size_t done = 0; done < size;) {
        clearerr(file);
        done += fread(buf + done, 1, size - done, file);
        g_assert_cmpint(g_get_monotonic_time(), <, end);
    }
}

FILE *open_pcap(const char *path)
{
    FILE *file = fopen(path, "r");
    uint32_t header[6];

    g_assert_nonnull(file);
    read_growing(file, header, sizeof(header));
    g_assert_cmphex(header[0], ==, 0xa1b2c3d4);     /* microseconds */
    g_assert_cmpuint(header[5], ==, 1);             /* Ethernet */
    return file;
}

void read_pcap(FILE *file, PcapPacket *packet, uint8_t *frame, size_t size)
{
    read_growing(file, packet, sizeof(*packet));
    g_assert_cmpuint(packet->caplen, <=, size);
    read_growing(file, frame, packet->caplen);
}

/* The guest's driver */

/*
 * As qvirtqueue_setup(), which takes some 700 steps of the qtest protocol,
 * and most of a test's time.
 */
static QVirtQueue *guest_setup_queue(Fixture *f, uint16_t index)
{
    QVirtioPCIDevice *dev = f->dev;
    QVirtioDevice *vdev = &dev->vdev;
    uint64_t common = dev->common_cfg_offset;
    QVirtQueuePCI *vqpci = g_new0(QVirtQueuePCI, 1);
    QVirtQueue *vq = &vqpci->vq;
    g_autofree struct vring_desc *ring = NULL;
    size_t len;

    vdev->bus->queue_select(vdev, index);
    vq->vdev = vdev;
    vq->index = index;
    vq->size = vdev->bus->get_queue_size(vdev);
    vq->num_free = vq->size;
    vq->align = VIRTIO_PCI_VRING_ALIGN;
    vqpci->msix_entry = -1;

    len = qvring_size(vq->size, vq->align);
    ring = g_malloc0(len);
    for (uint32_t i = 0; i < vq->size - 1; i++) {
        ring[i].next = cpu_to_le16(i + 1);
    }
    vq->desc = guest_alloc(&f->alloc, len);
    vq->avail = vq->desc + vq->size * sizeof(struct vring_desc);
    vq->used = QEMU_ALIGN_UP(vq->avail + sizeof(uint16_t) * (3 + vq->size),
                             vq->align);
    qtest_bufwrite(f->qts, vq->desc, ring, len);
    vdev->bus->set_queue_address(vdev, vq);

    if (dev->notify_cfg_offset) {           /* not a legacy device */
        uint16_t offset = qpci_io_readw(dev->pdev, dev->bar, common +
            offsetof(struct virtio_pci_common_cfg, queue_notify_off));

        vqpci->notify_offset = dev->notify_cfg_offset +
                               offset * dev->notify_off_multiplier;
        qpci_io_writew(dev->pdev, dev->bar, common +
                       offsetof(struct virtio_pci_common_cfg, queue_enable),
                       1);
    }
    return vq;
}

void guest_start_queues(Fixture *f, uint64_t features)
{
    QVirtioDevice *vdev = &f->dev->vdev;

    qvirtio_start_device(vdev);
    if (f->guest.high_features) {
        QVirtioPCIDevice *dev = f->dev;
        uint64_t common = dev->common_cfg_offset;

        /* libqos knows 64 of them, and ends the negotiation after these. */
        qpci_io_writel(dev->pdev, dev->bar, common +
                       offsetof(struct virtio_pci_common_cfg,
                                guest_feature_select), 2);
        qpci_io_writel(dev->pdev, dev->bar, common +
                       offsetof(struct virtio_pci_common_cfg, guest_feature),
                       f->guest.high_features);
    }
    qvirtio_set_features(vdev, qvirtio_get_features(vdev) & features);
    f->guest.rx = guest_setup_queue(f, 0);
    f->guest.tx = guest_setup_queue(f, 1);
}

void guest_start(Fixture *f)
{
    guest_start_queues(f, GUEST_FEATURES);
    qvirtio_set_driver_ok(&f->dev->vdev);
}

void guest_disable_queue(Fixture *f, QVirtQueue *vq)
{
    QVirtioPCIDevice *dev = f->dev;
    uint64_t reset = dev->common_cfg_offset +
                     offsetof(struct virtio_pci_modern_common_cfg,
                              queue_reset);

    dev->vdev.bus->queue_select(&dev->vdev, vq->index);
    qpci_io_writew(dev->pdev, dev->bar, reset, 1);
    g_assert_cmpuint(qpci_io_readw(dev->pdev, dev->bar, reset), ==, 0);
}

QVirtQueue *guest_move_queue(Fixture *f, QVirtQueue *vq)
{
    QVirtQueue *moved;

    guest_disable_queue(f, vq);
    moved = guest_setup_queue(f, vq->index);
    g_assert_cmphex(moved->desc, !=, vq->desc);
    qvirtqueue_cleanup(vq->vdev->bus, vq, &f->alloc);
    return moved;
}

/* Send a command through the control queue. */
static void guest_control(Fixture *f, QVirtQueue *control, uint8_t class,
                          uint8_t cmd, const void *data, size_t size)
{
    struct virtio_net_ctrl_hdr hdr = { .class = class, .cmd = cmd };
    uint64_t addr = guest_alloc(&f->alloc, 16);
    uint64_t status = addr + sizeof(hdr) + size;
    uint32_t head, len;

    qtest_memwrite(f->qts, addr, &hdr, sizeof(hdr));
    qtest_memwrite(f->qts, addr + sizeof(hdr), data, size);
    qtest_writeb(f->qts, status, 0xff);
    head = qvirtqueue_add(f->qts, control, addr, sizeof(hdr), false, true);
    qvirtqueue_add(f->qts, control, addr + sizeof(hdr), size, false, true);
    qvirtqueue_add(f->qts, control, status, 1, true, false);
    qvirtqueue_kick(f->qts, &f->dev->vdev, control, head);
    WAIT_UNTIL(qvirtqueue_get_buf(f->qts, control, &head, &len));
    g_assert_cmphex(qtest_readb(f->qts, status), ==, VIRTIO_NET_OK);
    guest_free(&f->alloc, addr);
}

void guest_start_address(Fixture *f, const uint8_t *address)
{
    QVirtioDevice *vdev = &f->dev->vdev;
    QVirtQueue *control;

    guest_start_queues(f, GUEST_FEATURES | 1ull << VIRTIO_NET_F_CTRL_VQ |
                          1ull << VIRTIO_NET_F_CTRL_MAC_ADDR);
    control = guest_setup_queue(f, 2);
    qvirtio_set_driver_ok(vdev);
    guest_control(f, control, VIRTIO_NET_CTRL_MAC,
                  VIRTIO_NET_CTRL_MAC_ADDR_SET, address, ETH_ALEN);
    qvirtqueue_cleanup(vdev->bus, control, &f->alloc);
}

void guest_start_multiqueue(Fixture *f, QVirtQueue *queues[5])
{
    const uint8_t pairs[] = { 2, 0 };
    QVirtioDevice *vdev = &f->dev->vdev;

    qvirtio_start_device(vdev);
    qvirtio_set_features(vdev, qvirtio_get_features(vdev) &
                               (GUEST_FEATURES |
                                1ull << VIRTIO_NET_F_CTRL_VQ |
                                1ull << VIRTIO_NET_F_MQ));
    for (int i = 0; i < 5; i++) {
        queues[i] = guest_setup_queue(f, i);
    }
    qvirtio_set_driver_ok(vdev);

    guest_control(f, queues[4], VIRTIO_NET_CTRL_MQ,
                  VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, pairs, sizeof(pairs));
}

void guest_stop(Fixture *f)
{
    QVirtioDevice *vdev = &f->dev->vdev;

    qvirtio_reset(vdev);
    qvirtqueue_cleanup(vdev->bus, f->guest.rx, &f->alloc);
    qvirtqueue_cleanup(vdev->bus, f->guest.tx, &f->alloc);
    f->guest.rx = f->guest.tx = NULL;
}

static int open_guest_memory(pid_t pid)
{
    g_autofree char *path = g_strdup_printf("/proc/%d/fd", pid);
    g_autoptr(GDir) dir = g_dir_open(path, 0, NULL);
    const char *name;

    while ((name = g_dir_read_name(dir))) {
        g_autofree char *file = g_build_filename(path, name, NULL);
        g_autofree char *target = g_file_read_link(file, NULL);

        if (target && strstr(target, "memory-backend-memfd")) {
            return open(file, O_RDWR);
        }
    }
    g_assert_not_reached();
}

static void guest_map_ram(Fixture *f)
{
    int fd = open_guest_memory(qtest_pid(f->qts));

    g_assert_cmpint(fd, >=, 0);
    f->guest.ram = mmap(NULL, GUEST_RAM, PROT_READ | PROT_WRITE, MAP_SHARED,
                        fd, 0);
    g_assert_true(f->guest.ram != MAP_FAILED);
    close(fd);
}

uint16_t guest_used_idx(Guest *guest, QVirtQueue *vq)
{
    struct vring_used *used = (void *)(guest->ram + vq->used);

    return le16_to_cpu(qatomic_load_acquire(&used->idx));
}

void guest_make_available(Guest *guest, QVirtQueue *vq, uint16_t head)
{
    struct vring_avail *avail = (void *)(guest->ram + vq->avail);
    uint16_t idx = le16_to_cpu(avail->idx);

    avail->ring[idx % vq->size] = cpu_to_le16(head);
    qatomic_store_release(&avail->idx, cpu_to_le16(idx + 1));
}

void guest_notify(Fixture *f, QVirtQueue *vq)
{
    struct vring_used *used = (void *)(f->guest.ram + vq->used);

    /* What is available is seen before we look at the flags. */
    smp_mb();
    if (!(le16_to_cpu(used->flags) & VRING_USED_F_NO_NOTIFY)) {
        f->dev->vdev.bus->virtqueue_kick(&f->dev->vdev, vq);
    }
}

/* Fill a descriptor; libqos, too, uses each of them once. */
static uint16_t guest_describe(Fixture *f, QVirtQueue *vq, uint64_t addr,
                               uint32_t len, uint16_t flags)
{
    struct vring_desc *desc = (void *)(f->guest.ram + vq->desc);
    uint16_t head = vq->free_head++;

    g_assert_nonnull(f->guest.ram);
    g_assert_cmpuint(head, <, vq->size);
    desc[head].addr = cpu_to_le64(addr);
    desc[head].len = cpu_to_le32(len);
    desc[head].flags = cpu_to_le16(flags);
    return head;
}

/* Wait until the device has used a descriptor. */
static uint32_t guest_wait_used(Fixture *f, QVirtQueue *vq, uint32_t *len)
{
    struct vring_used *used = (void *)(f->guest.ram + vq->used);
    uint16_t at = vq->last_used_idx % vq->size;

    WAIT_UNTIL(guest_used_idx(&f->guest, vq) != vq->last_used_idx);
    vq->last_used_idx++;
    *len = le32_to_cpu(used->ring[at].len);
    return le32_to_cpu(used->ring[at].id);
}

void guest_post(Fixture *f, int count)
{
    for (int i = 0; i < count; i++) {
        uint64_t addr = guest_alloc(&f->alloc, BUFFER_LEN);
        uint16_t head = guest_describe(f, f->guest.rx, addr, BUFFER_LEN,
                                       VRING_DESC_F_WRITE);

        g_assert_cmpuint(head, <, RING_LEN);
        f->guest.buffer[head] = addr;
        guest_make_available(&f->guest, f->guest.rx, head);
    }
    guest_notify(f, f->guest.rx);
}

size_t guest_read_frame(Fixture *f, uint8_t *frame, size_t size)
{
    uint32_t len, head = guest_wait_used(f, f->guest.rx, &len);

    g_assert_cmpuint(len, >=, 12);
    g_assert_cmpuint(len - 12, <=, size);
    memcpy(frame, f->guest.ram + f->guest.buffer[head] + 12, len - 12);
    guest_free(&f->alloc, f->guest.buffer[head]);
    return len - 12;
}

void expect_guest(Fixture *f, uint32_t first, uint32_t count)
{
    uint8_t frame[BUFFER_LEN];

    for (uint32_t i = 0; i < count; i++) {
        g_assert_cmpuint(guest_read_frame(f, frame, sizeof(frame)), ==,
                         FRAME_LEN);
        g_assert_cmpuint(frame_number(frame), ==, first + i);
    }
}

/* Returns the packet's address. */
static uint64_t guest_add_packet(Fixture *f, const uint8_t *packet, size_t size)
{
    uint64_t addr = guest_alloc(&f->alloc, size);

    memcpy(f->guest.ram + addr, packet, size);
    guest_make_available(&f->guest, f->guest.tx,
                         guest_describe(f, f->guest.tx, addr, size, 0));
    return addr;
}

void guest_send_packet(Fixture *f, const uint8_t *packet, size_t size)
{
    uint64_t addr = guest_add_packet(f, packet, size);
    uint32_t len;

    guest_notify(f, f->guest.tx);
    guest_wait_used(f, f->guest.tx, &len);
    guest_free(&f->alloc, addr);
}

void guest_send_frame(Fixture *f, const uint8_t *frame, size_t size)
{
    g_autofree uint8_t *packet = g_malloc0(12 + size);

    memcpy(packet + 12, frame, size);
    guest_send_packet(f, packet, 12 + size);
}

void guest_send(Fixture *f, uint32_t first, uint32_t count)
{
    uint8_t packet[12 + FRAME_LEN] = { };
    uint64_t addr[RING_LEN];
    uint32_t len;

    g_assert_cmpuint(count, <=, RING_LEN);
    for (uint32_t i = 0; i < count; i++) {
        make_frame(packet + 12, first + i);
        addr[i] = guest_add_packet(f, packet, sizeof(packet));
    }
    guest_notify(f, f->guest.tx);
    for (uint32_t i = 0; i < count; i++) {
        guest_wait_used(f, f->guest.tx, &len);
        guest_free(&f->alloc, addr[i]);
    }
}

void guest_send_begin(Fixture *f, uint32_t number)
{
    uint8_t packet[12 + FRAME_LEN] = { };

    make_frame(packet + 12, number);
    guest_add_packet(f, packet, sizeof(packet));
    guest_notify(f, f->guest.tx);
}

void guest_post_all(Fixture *f)
{
    Guest *guest = &f->guest;
    QVirtQueue *rx = guest->rx;
    struct vring_desc *desc;

    desc = (void *)(guest->ram + rx->desc);
    g_assert_cmpuint(rx->size, ==, RING_LEN);
    for (int i = 0; i < RING_LEN; i++) {
        guest->buffer[i] = guest_alloc(&f->alloc, BUFFER_LEN);
        desc[i].addr = cpu_to_le64(guest->buffer[i]);
        desc[i].len = cpu_to_le32(BUFFER_LEN);
        desc[i].flags = cpu_to_le16(VRING_DESC_F_WRITE);
        guest_make_available(guest, rx, i);
    }
    guest_notify(f, rx);
    guest->tx_head = guest_describe(f, guest->tx,
                                    guest_alloc(&f->alloc, BUFFER_LEN),
                                    12 + FRAME_LEN, 0);
}

unsigned guest_take(Fixture *f, void (*func)(void *opaque, uint32_t number),
                    void *opaque)
{
    Guest *guest = &f->guest;
    QVirtQueue *rx = guest->rx;
    struct vring_used *used = (void *)(guest->ram + rx->used);
    unsigned count = 0;

    for (; rx->last_used_idx != guest_used_idx(guest, rx); count++) {
        uint16_t at = rx->last_used_idx % rx->size;
        uint32_t head = le32_to_cpu(used->ring[at].id);

        func(opaque, frame_number(guest->ram + guest->buffer[head] + 12));
        guest_make_available(guest, rx, head);
        rx->last_used_idx++;
    }
    if (count) {
        guest_notify(f, rx);
    }
    return count;
}

void guest_send_head(Fixture *f, uint16_t head)
{
    uint32_t len;

    guest_make_available(&f->guest, f->guest.tx, head);
    guest_notify(f, f->guest.tx);
    guest_wait_used(f, f->guest.tx, &len);
}

void guest_put(Fixture *f, uint32_t number)
{
    Guest *guest = &f->guest;
    struct vring_desc *desc = (void *)(guest->ram + guest->tx->desc);
    uint8_t *packet = guest->ram + le64_to_cpu(desc[guest->tx_head].addr);

    memset(packet, 0, 12);
    make_frame(packet + 12, number);
    guest_send_head(f, guest->tx_head);
}

/* QEMU */

static QDict *get_property(Fixture *f, const char *path, const char *name)
{
    return qtest_qmp(f->qts, "{'execute': 'qom-get', 'arguments':"
                     " {'path': %s, 'property': %s}}", path, name);
}

static QDict *object_property(Fixture *f, const char *id, const char *name)
{
    g_autofree char *path = g_strdup_printf("/objects/%s", id);

    return get_property(f, path, name);
}

/* The query succeeds only while vhost has the queue. */
bool vhost_started(Fixture *f)
{
    g_autoptr(QDict) rsp = qtest_qmp(f->qts,
        "{'execute': 'x-query-virtio-vhost-queue-status',"
        " 'arguments': {'path': %s, 'queue': 0}}", NIC_PATH);

    return qdict_haskey(rsp, "return");
}

static void expect_nic_property(Fixture *f, const char *name,
                                const char *value)
{
    g_autoptr(QDict) rsp = get_property(f, NIC_PATH, name);

    g_assert_cmpstr(qdict_get_str(rsp, "return"), ==, value);
}

void expect_datapath(Fixture *f, const char *datapath, const char *reason)
{
    expect_nic_property(f, "datapath", datapath);
    expect_nic_property(f, "datapath-reason", reason);
    g_assert_cmpint(vhost_started(f), ==, g_str_equal(datapath, "vhost"));
}

void wait_vhost(Fixture *f)
{
    WAIT_UNTIL(vhost_started(f));
    expect_datapath(f, "vhost", "");
}

uint64_t counter(Fixture *f, const char *id, const char *name)
{
    g_autoptr(QDict) rsp = object_property(f, id, name);

    return qdict_get_uint(rsp, "return");
}

void wait_counter(Fixture *f, const char *id, const char *name,
                  uint64_t value)
{
    WAIT_UNTIL(counter(f, id, name) == value);
}

static bool is_pending(Fixture *f, const char *id, const char *name)
{
    g_autoptr(QDict) rsp = object_property(f, id, name);

    return qdict_get_bool(rsp, "return");
}

bool capture_pending(Fixture *f, const char *id)
{
    return is_pending(f, id, "capture-pending");
}

void wait_inject_pending(Fixture *f, const char *id, bool pending)
{
    WAIT_UNTIL(is_pending(f, id, "inject-pending") == pending);
}

static bool source_is(Fixture *f, const char *id, const char *source)
{
    g_autoptr(QDict) rsp = object_property(f, id, "source");

    return g_str_equal(qdict_get_str(rsp, "return"), source);
}

void expect_source(Fixture *f, const char *id, const char *source)
{
    WAIT_UNTIL(source_is(f, id, source));
}

void set_status(Fixture *f, const char *id, const char *status)
{
    g_autofree char *path = g_strdup_printf("/objects/%s", id);

    qtest_qmp_assert_success(f->qts, "{'execute': 'qom-set', 'arguments':"
                             " {'path': %s, 'property': 'status',"
                             "  'value': %s}}", path, status);
}

void del_object(Fixture *f, const char *id)
{
    qtest_qmp_assert_success(f->qts, "{'execute': 'object-del', 'arguments':"
                             " {'id': %s}}", id);
}

void vm_stop(Fixture *f)
{
    qtest_qmp_assert_success(f->qts, "{'execute': 'stop'}");
}

void vm_cont(Fixture *f)
{
    qtest_qmp_assert_success(f->qts, "{'execute': 'cont'}");
}

void hmp(Fixture *f, const char *format, ...)
{
    g_autofree char *text = NULL;
    va_list ap;

    va_start(ap, format);
    text = qtest_vhmp(f->qts, format, ap);
    va_end(ap);
    g_assert_cmpstr(text, ==, "");
}

void object_add(Fixture *f, const char *format, ...)
{
    g_autofree char *args = NULL;
    va_list ap;

    va_start(ap, format);
    args = g_strdup_vprintf(format, ap);
    va_end(ap);
    g_assert_true(g_str_has_prefix(args, "-object "));
    hmp(f, "object_add %s", args + strlen("-object "));
}

void add_capture(Fixture *f)
{
    object_add(f, CAPTURE "tx");
}

void add_inject(Fixture *f)
{
    object_add(f, INJECT "tx");
}

static bool status_is(Fixture *f, const char *command, const char *status)
{
    g_autoptr(QDict) rsp = qtest_qmp(f->qts, "{'execute': %s}", command);

    return !g_strcmp0(qdict_get_try_str(qdict_get_qdict(rsp, "return"),
                                        "status"), status);
}

void expect_status(Fixture *f, const char *command, const char *status)
{
    WAIT_UNTIL(status_is(f, command, status));
}

void migration_start(Fixture *f, const char *uri)
{
    qtest_qmp_assert_success(f->qts,
        "{'execute': 'migrate-set-capabilities', 'arguments':"
        " {'capabilities': [{'capability': 'pause-before-switchover',"
        "                    'state': true}]}}");
    qtest_qmp_assert_success(f->qts, "{'execute': 'migrate', 'arguments':"
                             " {'uri': %s}}", uri);
    expect_status(f, "query-migrate", "pre-switchover");
}

void migration_cancel(Fixture *f)
{
    qtest_qmp_assert_success(f->qts, "{'execute': 'migrate_cancel'}");
    expect_status(f, "query-migrate", "cancelled");
    expect_status(f, "query-status", "running");
}

static bool is_connected(Fixture *f, const char *label)
{
    g_autofree char *text = qtest_hmp(f->qts, "info chardev");
    g_auto(GStrv) lines = g_strsplit(text, "\n", -1);
    g_autofree char *start = g_strdup_printf("%s: filename=", label);
    char **line = lines;

    while (!g_str_has_prefix(*line, start)) {
        line++;
        g_assert_nonnull(*line);
    }
    return !g_str_has_prefix(*line + strlen(start), "disconnected:");
}

void expect_connected(Fixture *f, const char *label, bool connected)
{
    WAIT_UNTIL(is_connected(f, label) == connected);
}

int count_fds(Fixture *f)
{
    g_autofree char *path = g_strdup_printf("/proc/%d/fd", qtest_pid(f->qts));
    g_autoptr(GDir) dir = g_dir_open(path, 0, NULL);
    int count = 0;

    while (g_dir_read_name(dir)) {
        count++;
    }
    return count;
}

/* The whole */

static void fixture_find_nic(Fixture *f)
{
    QPCIAddress addr = { .devfn = QPCI_DEVFN(NIC_SLOT, 0) };

    f->dev = virtio_pci_new(f->bus, &addr);
    g_assert_nonnull(f->dev);
    qvirtio_pci_device_enable(f->dev);
}

static void fixture_forget_nic(Fixture *f)
{
    g_free(f->dev->pdev);
    g_free(f->dev);
}

void vm_reset(Fixture *f)
{
    qtest_qmp_assert_success(f->qts, "{'execute': 'system_reset'}");
    qtest_qmp_eventwait(f->qts, "RESET");
    if (f->guest.rx) {
        qvirtqueue_cleanup(f->dev->vdev.bus, f->guest.rx, &f->alloc);
        qvirtqueue_cleanup(f->dev->vdev.bus, f->guest.tx, &f->alloc);
        f->guest.rx = f->guest.tx = NULL;
    }
    /* Its base addresses are gone. */
    fixture_forget_nic(f);
    fixture_find_nic(f);
}

void fixture_name(Fixture *f)
{
    static unsigned number;

    memset(f, 0, sizeof(*f));
    f->host = f->out = f->in = -1;
    f->dir = g_dir_make_tmp("filter-redirector-vhost-XXXXXX", NULL);
    g_assert_nonnull(f->dir);
    snprintf(f->ifname, sizeof(f->ifname), "tapq%u", number++);
}

void fixture_init_named(Fixture *f, const char *netdev, const char *nic_opts,
                        const char *args)
{
    bool own_memory = strstr(args, "memory-backend=");

    f->qts = qtest_initf("-nodefaults -machine pc %s"
                         "-netdev tap,id=n0,%s "
                         "-device virtio-net-pci,id=nic,netdev=n0,addr=0x%x,"
                         "mac=52:54:00:12:34:56%s "
                         "-chardev socket,id=out,path=%s/out,server=on,"
                         "wait=off "
                         "-chardev socket,id=in,path=%s/in,server=on,wait=off "
                         "%s", own_memory ? "" :
                         "-object memory-backend-memfd,id=ram0,size=128M,"
                         "share=on -machine memory-backend=ram0 ",
                         netdev, NIC_SLOT, nic_opts, f->dir, f->dir, args);
    if (!own_memory) {
        guest_map_ram(f);
    }
    set_interface_up(f->ifname, true);
    f->host = open_host(f->ifname);
    f->out = connect_to(f, "out");
    f->in = connect_to(f, "in");
    pc_alloc_init(&f->alloc, f->qts, 0);
    f->bus = qpci_new_pc(f->qts, &f->alloc);
    fixture_find_nic(f);
}

void fixture_init(Fixture *f, const char *netdev_opts,
                  const char *nic_opts, const char *args)
{
    g_autofree char *netdev = NULL;

    fixture_name(f);
    netdev = g_strdup_printf("ifname=%s,script=no,downscript=no,%s",
                             f->ifname, netdev_opts);
    fixture_init_named(f, netdev, nic_opts, args);
}

void fixture_start(Fixture *f, const char *args)
{
    fixture_init(f, "vhost=on", "", args);
}

void fixture_close(Fixture *f)
{
    g_autoptr(GDir) dir = g_dir_open(f->dir, 0, NULL);
    const char *name;

    if (f->guest.rx) {
        guest_stop(f);
    }
    if (f->dev) {
        fixture_forget_nic(f);
        qpci_free_pc(f->bus);
        alloc_destroy(&f->alloc);
    }
    if (f->guest.ram) {
        munmap(f->guest.ram, GUEST_RAM);
    }
    qtest_quit(f->qts);
    close(f->host);
    close(f->out);
    close(f->in);
    while ((name = g_dir_read_name(dir))) {
        g_autofree char *path = g_build_filename(f->dir, name, NULL);

        unlink(path);
    }
    rmdir(f->dir);
    g_free(f->dir);
}

/* The program */

static void skip(void)
{
    g_test_skip("needs root and /dev/vhost-net");
}

void rig_init(int *argc, char ***argv, const char *name)
{
    g_test_init(argc, argv, NULL);
    test_name = name;

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
}

void rig_add(const char *path, void (*func)(void))
{
    g_autofree char *full = g_strdup_printf("/%s/%s", test_name, path);

    qtest_add_func(full, have_vhost ? func : skip);
}

void rig_add_data(const char *path, void *data, void (*func)(const void *data))
{
    g_autofree char *full = g_strdup_printf("/%s/%s", test_name, path);

    if (have_vhost) {
        qtest_add_data_func_full(full, data, func, g_free);
    } else {
        g_free(data);
        qtest_add_func(full, skip);
    }
}

/* A test with a VM */
typedef struct VmTest {
    const char *args;
    bool driver;
    void (*func)(Fixture *f);
} VmTest;

static void run_vm_test(const void *data)
{
    const VmTest *test = data;
    Fixture f;

    fixture_start(&f, test->args);
    if (test->driver) {
        guest_start(&f);
    }
    test->func(&f);
    fixture_close(&f);
}

static void add_vm_test(const char *path, const char *args, bool driver,
                        void (*func)(Fixture *f))
{
    VmTest *test = g_new(VmTest, 1);

    *test = (VmTest) { .args = args, .driver = driver, .func = func };
    rig_add_data(path, test, run_vm_test);
}

void rig_add_vm(const char *path, const char *args, void (*func)(Fixture *f))
{
    add_vm_test(path, args, false, func);
}

void rig_add_guest(const char *path, const char *args, void (*func)(Fixture *f))
{
    add_vm_test(path, args, true, func);
}

bool rig_has(const char *option, const char *property)
{
    g_autofree char *command = g_strdup_printf("%s %s,help",
                                               qtest_qemu_binary(NULL), option);
    g_autofree char *line = g_strdup_printf(" %s=", property);
    g_autofree char *help = NULL;

    g_assert_true(g_spawn_command_line_sync(command, &help, NULL, NULL, NULL));
    return strstr(help, line);
}
