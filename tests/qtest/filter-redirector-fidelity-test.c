/*
 * QTest testcase for filter-redirector: what goes in comes out
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Packets of all kinds go the whole way and are compared at each step:
 *
 *           side A: captures                      side B: injects
 *
 *   host -> TAP -----------> guest          TAP -----------> guest
 *               \-> stream ---------------> /
 *
 *   guest -> TAP ----------> host           TAP -----------> host
 *               \-> stream ---------------> /
 *
 * A guest or a host that has an offload gets the packet with its header as it
 * was sent; one that has not gets frames that are together the same.
 */

#include "qemu/osdep.h"
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include <netinet/in.h>
#include "filter-redirector-rig.h"
#include "libqos/virtio.h"
#include "qemu/bswap.h"
#include "qemu/units.h"
#include "standard-headers/linux/virtio_pci.h"
#include "standard-headers/linux/virtio_ring.h"

#ifndef TUN_F_USO4
#define TUN_F_USO4 0x20         /* Linux 6.2 */
#define TUN_F_USO6 0x40
#endif

#define FRAME_MAX (65535 + ETH_HLEN + 8)
#define HEADER_MAX sizeof(struct virtio_net_hdr_v1_hash_tunnel)
#define BIG_BUFFER_LEN (68 * KiB)
#define BIG_BUFFERS 16
#define SMALL_BUFFER_LEN (6 * KiB)  /* mergeable */
#define SMALL_BUFFERS 64
#define MTU 9216
/* From this length on the kernel gives no frame to an interface whole. */
#define GSO_MAX_LEN 65536
#define MSS 1400
#define TUNNEL_LEN (20 + 8 + 8 + ETH_HLEN)  /* VXLAN over IPv4 */

/* A frame and what its virtio-net header says, in the host's byte order */
typedef struct Packet {
    struct virtio_net_hdr hdr;
    uint8_t data[FRAME_MAX];
    size_t len;
} Packet;

/* One record of the stream, as it is passed on */
typedef struct Record {
    uint8_t data[8 + HEADER_MAX + FRAME_MAX];
    size_t len;
} Record;

/* A QEMU and what is around it */
typedef struct Side {
    Fixture f;
    int host;                   /* a packet socket with virtio-net headers */
    bool mergeable;
    uint64_t tx_addr;           /* the buffer of what the guest sends */
    size_t hdr_len;             /* that the guest's driver negotiated */
    bool no_header;             /* vnet_hdr=off */
    size_t stream_hdr_len;      /* that the stream has */
    bool stream_plain;          /* vnet_hdr_support=off */
    unsigned skipped;           /* GSO packets that injrx cannot inject */
} Side;

/*
 * Packets
 */

/* What a packet is like; all bytes follow from this and its number. */
typedef struct Shape {
    const char *name;
    size_t len;         /* of the frame; or, with @ip, of the payload */
    int ip;             /* 0, 4 or 6 */
    uint8_t protocol;
    uint8_t gso;        /* VIRTIO_NET_HDR_GSO_* */
    bool csum;          /* left to do */
    uint16_t tpid[2];
    uint16_t tci[2];
    uint8_t to[ETH_ALEN];
} Shape;

#define PLAIN(name, len) { name, len }
#define TO(name, ...) { name, 64, .to = { __VA_ARGS__ } }
#define TAG(name, tpid, tci) { name, 200, 0, 0, 0, 0, { tpid }, { tci } }
#define L4(name, ip, protocol, len) { name, len, ip, protocol, 0, true }
#define GSO(name, ip, protocol, gso, len) \
    { name, len, ip, protocol, VIRTIO_NET_HDR_GSO_##gso, true }
#define GSO_TAG(name, ip, gso, tpid, tci) \
    { name, 5000, ip, IPPROTO_TCP, VIRTIO_NET_HDR_GSO_##gso, true, \
      { tpid }, { tci } }

static const Shape shapes[] = {
    PLAIN("runt: 14 bytes", 14),
    PLAIN("runt: 15 bytes", 15),
    PLAIN("runt: 59 bytes", 59),
    PLAIN("60 bytes", 60),
    PLAIN("odd", 333),
    PLAIN("full", 1514),
    PLAIN("just over a slot of the ring", 1523),
    PLAIN("jumbo", ETH_HLEN + MTU),
    TO("broadcast", 0xff, 0xff, 0xff, 0xff, 0xff, 0xff),
    TO("multicast", 0x01, 0x00, 0x5e, 0x01, 0x02, 0x03),
    TO("multicast of IPv6", 0x33, 0x33, 0, 0, 0, 1),
    TO("another's", 0x52, 0x54, 0, 0xaa, 0xbb, 0xcc),
    TAG("tag", ETH_P_8021Q, 42),
    TAG("tag with priority", ETH_P_8021Q, 0xefff),
    TAG("priority tag", ETH_P_8021Q, 0xa000),
    TAG("empty tag", ETH_P_8021Q, 0),
    TAG("service tag", ETH_P_8021AD, 7),
    { "QinQ", 200, 0, 0, 0, 0, { ETH_P_8021AD, ETH_P_8021Q }, { 100, 200 } },
    { "QinQ of old", 1000, 0, 0, 0, 0, { ETH_P_8021Q, ETH_P_8021Q },
      { 0x2001, 0xe002 } },
    L4("TCP", 4, IPPROTO_TCP, 1000),
    L4("TCP over IPv6", 6, IPPROTO_TCP, 1001),
    L4("TCP, empty", 4, IPPROTO_TCP, 0),
    L4("UDP", 4, IPPROTO_UDP, 1000),
    L4("UDP over IPv6", 6, IPPROTO_UDP, 999),
    L4("UDP, jumbo", 4, IPPROTO_UDP, 8000),
    { "TCP, checksum there", 500, 4, IPPROTO_TCP },
    { "UDP, tagged", 500, 4, IPPROTO_UDP, 0, true, { ETH_P_8021Q }, { 3 } },
    { "TCP over IPv6, QinQ", 500, 6, IPPROTO_TCP, 0, true,
      { ETH_P_8021AD, ETH_P_8021Q }, { 100, 200 } },
    GSO("TSO", 4, IPPROTO_TCP, TCPV4, 4000),
    GSO("TSO, just two", 4, IPPROTO_TCP, TCPV4, MSS + 1),
    GSO("longest TSO", 4, IPPROTO_TCP, TCPV4,
        GSO_MAX_LEN - 1 - ETH_HLEN - 20 - 32),
    GSO("too long TSO", 4, IPPROTO_TCP, TCPV4, 65535 - 20 - 32),
    GSO("TSO over IPv6", 6, IPPROTO_TCP, TCPV6, 4001),
    GSO("longest TSO over IPv6", 6, IPPROTO_TCP, TCPV6,
        GSO_MAX_LEN - 1 - ETH_HLEN - 40 - 32),
    GSO("USO", 4, IPPROTO_UDP, UDP_L4, 5000),
    GSO("USO over IPv6", 6, IPPROTO_UDP, UDP_L4, 7000),
    GSO_TAG("TSO, tagged", 4, TCPV4, ETH_P_8021Q, 0x6123),
    GSO_TAG("TSO over IPv6, service tag", 6, TCPV6, ETH_P_8021AD, 5),
    { "TSO, QinQ", 6000, 4, IPPROTO_TCP, VIRTIO_NET_HDR_GSO_TCPV4, true,
      { ETH_P_8021AD, ETH_P_8021Q }, { 1, 2 } },
};

static const Shape *shape_named(const char *name)
{
    for (int i = 0; i < ARRAY_SIZE(shapes); i++) {
        if (g_str_equal(shapes[i].name, name)) {
            return &shapes[i];
        }
    }
    g_assert_not_reached();
}

static uint32_t sum_pseudo(const uint8_t *ip, size_t len, uint8_t protocol)
{
    uint32_t start = protocol + (len & 0xffff) + (len >> 16);

    return ip[0] >> 4 == 4 ? sum_words(ip + 12, 8, start) :
                             sum_words(ip + 8, 32, start);
}

/* Offsets in a frame, in bytes */
static size_t l3_offset(const uint8_t *frame)
{
    size_t at = 2 * ETH_ALEN;

    while (lduw_be_p(frame + at) == ETH_P_8021Q ||
           lduw_be_p(frame + at) == ETH_P_8021AD) {
        at += 4;
    }
    return at + 2;
}

static size_t ip_len(const uint8_t *ip)
{
    return ip[0] >> 4 == 4 ? 20 : 40;
}

static uint8_t ip_protocol(const uint8_t *ip)
{
    return ip[0] >> 4 == 4 ? ip[9] : ip[6];
}

static size_t l4_len(uint8_t protocol)
{
    return protocol == IPPROTO_TCP ? 32 : 8;
}

static size_t l4_csum_offset(uint8_t protocol)
{
    return protocol == IPPROTO_TCP ? 16 : 6;
}

static void put_ip(uint8_t *ip, int version, uint8_t protocol, size_t len,
                   uint32_t number)
{
    memset(ip, 0, version == 4 ? 20 : 40);
    if (version == 4) {
        ip[0] = 0x45;
        ip[1] = 0x28;
        stw_be_p(ip + 2, 20 + len);
        stw_be_p(ip + 4, 0xfff0 + number);
        stw_be_p(ip + 6, 0x4000);
        ip[8] = 63;
        ip[9] = protocol;
        stl_be_p(ip + 12, 0xc0000201);
        stl_be_p(ip + 16, 0xc0000202);
        stw_be_p(ip + 10, ~sum_words(ip, 20, 0));
    } else {
        stl_be_p(ip, 0x60012345);
        stw_be_p(ip + 4, len);
        ip[6] = protocol;
        ip[7] = 63;
        stl_be_p(ip + 8, 0x20010db8);
        ip[23] = 1;
        stl_be_p(ip + 24, 0x20010db8);
        ip[39] = 2;
    }
}

static void put_tcp(uint8_t *tcp, uint32_t number)
{
    memset(tcp, 0, 32);
    stw_be_p(tcp, 1234);
    stw_be_p(tcp + 2, 4321);
    stl_be_p(tcp + 4, 0xfffffff0 + number);
    stl_be_p(tcp + 8, 77);
    tcp[12] = 0x80;
    tcp[13] = 0x19;             /* FIN, PSH, ACK */
    stw_be_p(tcp + 14, 1000);
    stl_be_p(tcp + 20, 0x0101080a);
    stl_be_p(tcp + 24, number);
}

static void packet_make(Packet *p, const Shape *shape, uint32_t number)
{
    static const uint8_t macs[] = {
        0x52, 0x54, 0x00, 0x12, 0x34, 0x56, 0x02, 0, 0, 0, 0, 1,
    };
    size_t l4 = shape->ip ? l4_len(shape->protocol) : 0;
    size_t at = sizeof(macs), total;
    uint32_t x = number * 2654435761u + 1;
    uint8_t *ip;

    memset(p, 0, sizeof(*p));
    memcpy(p->data, macs, sizeof(macs));
    if (shape->to[0]) {
        memcpy(p->data, shape->to, sizeof(shape->to));
    }
    for (int i = 0; i < 2 && shape->tpid[i]; i++, at += 4) {
        stw_be_p(p->data + at, shape->tpid[i]);
        stw_be_p(p->data + at + 2, shape->tci[i]);
    }
    stw_be_p(p->data + at, shape->ip == 4 ? ETH_P_IP :
                           shape->ip == 6 ? ETH_P_IPV6 : TEST_ETHERTYPE);
    at += 2;
    ip = p->data + at;
    total = shape->ip ? at + (shape->ip == 4 ? 20 : 40) + l4 + shape->len :
                        shape->len;
    g_assert_cmpuint(total, <=, sizeof(p->data));
    for (; at < total; at++) {
        x = x * 1664525 + 1013904223;
        p->data[at] = x >> 24;
    }
    p->len = total;
    if (!shape->ip) {
        if (total >= 18) {
            stl_be_p(ip, number);
        }
        return;
    }

    put_ip(ip, shape->ip, shape->protocol, l4 + shape->len, number);
    at = ip + ip_len(ip) - p->data;
    if (shape->protocol == IPPROTO_TCP) {
        put_tcp(p->data + at, number);
    } else {
        stw_be_p(p->data + at, 1234);
        stw_be_p(p->data + at + 2, 4321);
        stw_be_p(p->data + at + 4, l4 + shape->len);
        stw_be_p(p->data + at + 6, 0);
    }
    total = sum_pseudo(ip, l4 + shape->len, shape->protocol);
    p->hdr.csum_start = at;
    p->hdr.csum_offset = l4_csum_offset(shape->protocol);
    if (!shape->csum) {
        total = ~sum_words(p->data + at, p->len - at, total);
    }
    stw_be_p(p->data + at + p->hdr.csum_offset, total);
    if (!shape->csum) {
        memset(&p->hdr, 0, sizeof(p->hdr));
        return;
    }
    p->hdr.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
    p->hdr.gso_type = shape->gso;
    if (shape->gso) {
        p->hdr.gso_size = MSS;
        p->hdr.hdr_len = at + l4;
    }
}

static Packet *packet_new(const char *name, uint32_t number)
{
    Packet *p = g_new(Packet, 1);

    packet_make(p, shape_named(name), number);
    return p;
}

/* All bytes, and of the header what means something. */
static void packet_assert_equal(const Packet *got, const Packet *want)
{
    bool csum = want->hdr.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM;

    g_assert_cmpmem(got->data, got->len, want->data, want->len);
    g_assert_cmpint(!!(got->hdr.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM), ==,
                    csum);
    g_assert_cmphex(got->hdr.gso_type, ==, want->hdr.gso_type);
    if (csum) {
        g_assert_cmpuint(got->hdr.csum_start, ==, want->hdr.csum_start);
        g_assert_cmpuint(got->hdr.csum_offset, ==, want->hdr.csum_offset);
    }
    if (want->hdr.gso_type) {
        g_assert_cmpuint(got->hdr.gso_size, ==, want->hdr.gso_size);
        /* A hint: the kernel says how much it has in one piece. */
        g_assert_cmpuint(got->hdr.hdr_len, >=, want->hdr.hdr_len);
    }
}

/*
 * @got is the segment of @whole whose payload begins at @done, as whoever cuts
 * it has to make it.  Returns: the payload's length.
 */
static size_t packet_assert_segment(const Packet *got, const Packet *whole,
                                    size_t done, bool csum_left)
{
    size_t l3 = l3_offset(whole->data);
    const uint8_t *ip = got->data + l3, *whole_ip = whole->data + l3;
    uint8_t protocol = ip_protocol(whole_ip);
    size_t l4 = l3 + ip_len(whole_ip), headers = l4 + l4_len(protocol);
    size_t left = whole->len - headers - done;
    size_t len = whole->hdr.gso_type ? MIN(left, whole->hdr.gso_size) : left;
    g_autofree uint8_t *want = g_memdup2(whole->data, headers + len);
    size_t csum_at = l4 + l4_csum_offset(protocol);
    uint32_t pseudo;

    g_assert_cmpuint(got->len, ==, headers + len);
    g_assert_cmpint(got->hdr.gso_type, ==, VIRTIO_NET_HDR_GSO_NONE);
    memcpy(want + headers, whole->data + headers + done, len);
    if (ip[0] >> 4 == 4) {
        stw_be_p(want + l3 + 2, headers - l3 + len);
        if (whole->hdr.gso_type) {
            stw_be_p(want + l3 + 4, lduw_be_p(whole_ip + 4) +
                                    done / whole->hdr.gso_size);
        }
        stw_be_p(want + l3 + 10, 0);
        stw_be_p(want + l3 + 10, ~sum_words(want + l3, 20, 0));
    } else {
        stw_be_p(want + l3 + 4, headers - l4 + len);
    }
    if (protocol == IPPROTO_TCP) {
        stl_be_p(want + l4 + 4, ldl_be_p(whole->data + l4 + 4) + done);
        if (len < left) {
            want[l4 + 13] &= ~0x09;     /* FIN and PSH are the last one's */
        }
    } else {
        stw_be_p(want + l4 + 4, 8 + len);
    }
    pseudo = sum_pseudo(ip, headers - l4 + len, protocol);
    if (csum_left && got->hdr.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM) {
        g_assert_cmpuint(got->hdr.csum_start, ==, l4);
        g_assert_cmpuint(got->hdr.csum_start + got->hdr.csum_offset, ==,
                         csum_at);
        g_assert_cmphex(lduw_be_p(got->data + csum_at), ==, pseudo);
    } else {
        g_assert_cmpint(got->hdr.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM, ==, 0);
        g_assert_cmphex(sum_words(got->data + l4, got->len - l4, pseudo), ==,
                        0xffff);
    }
    memcpy(want + csum_at, got->data + csum_at, 2);
    g_assert_cmpmem(got->data, got->len, want, headers + len);
    return len;
}

/* A header of the guest's or the stream's: little-endian; @len 0: none */
static void header_get(struct virtio_net_hdr *hdr, const uint8_t *buf,
                       size_t len)
{
    memset(hdr, 0, sizeof(*hdr));
    if (len) {
        memcpy(hdr, buf, sizeof(*hdr));
        hdr->hdr_len = le16_to_cpu(hdr->hdr_len);
        hdr->gso_size = le16_to_cpu(hdr->gso_size);
        hdr->csum_start = le16_to_cpu(hdr->csum_start);
        hdr->csum_offset = le16_to_cpu(hdr->csum_offset);
    }
}

static void header_put(uint8_t *buf, size_t len,
                       const struct virtio_net_hdr *hdr)
{
    struct virtio_net_hdr le = *hdr;

    memset(buf, 0, len);
    if (len) {
        le.hdr_len = cpu_to_le16(le.hdr_len);
        le.gso_size = cpu_to_le16(le.gso_size);
        le.csum_start = cpu_to_le16(le.csum_start);
        le.csum_offset = cpu_to_le16(le.csum_offset);
        memcpy(buf, &le, sizeof(le));
    }
}

/*
 * The host
 */

static int host_open(const char *ifname)
{
    const int options[] = {
        PACKET_VNET_HDR, PACKET_AUXDATA, PACKET_IGNORE_OUTGOING,
    };
    int fd = open_host_protocol(ifname, ETH_P_ALL), on = 1, size = 32 * MiB;

    for (int i = 0; i < ARRAY_SIZE(options); i++) {
        g_assert_cmpint(setsockopt(fd, SOL_PACKET, options[i], &on,
                                   sizeof(on)), ==, 0);
    }
    setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof(size));
    return fd;
}

static void host_write(int fd, const Packet *p)
{
    struct iovec iov[] = {
        { (void *)&p->hdr, sizeof(p->hdr) },
        { (void *)p->data, p->len },
    };

    g_assert_cmpint(writev(fd, iov, ARRAY_SIZE(iov)), ==,
                    sizeof(p->hdr) + p->len);
}

/* The kernel strips a tag and tells it beside the frame. */
static void host_read(int fd, Packet *p)
{
    union {
        struct cmsghdr align;
        uint8_t buf[CMSG_SPACE(sizeof(struct tpacket_auxdata))];
    } control;
    struct iovec iov[] = {
        { &p->hdr, sizeof(p->hdr) },
        { p->data, sizeof(p->data) },
    };
    struct msghdr msg = {
        .msg_iov = iov,
        .msg_iovlen = ARRAY_SIZE(iov),
        .msg_control = &control,
        .msg_controllen = sizeof(control),
    };
    struct tpacket_auxdata aux;
    ssize_t len;

    wait_readable(fd);
    len = recvmsg(fd, &msg, 0);
    g_assert_cmpint(len, >=, sizeof(p->hdr) + ETH_HLEN);
    p->len = len - sizeof(p->hdr);
    g_assert_nonnull(CMSG_FIRSTHDR(&msg));
    memcpy(&aux, CMSG_DATA(CMSG_FIRSTHDR(&msg)), sizeof(aux));
    if (aux.tp_status & TP_STATUS_VLAN_VALID) {
        memmove(p->data + 16, p->data + 12, p->len - 12);
        stw_be_p(p->data + 12, aux.tp_vlan_tpid);
        stw_be_p(p->data + 14, aux.tp_vlan_tci);
        p->len += 4;
        p->hdr.csum_start += 4;
        p->hdr.hdr_len += 4;
    }
}

static void expect_host_packet(int fd, const Packet *want)
{
    g_autofree Packet *got = g_new(Packet, 1);

    host_read(fd, got);
    packet_assert_equal(got, want);
}

/* Before Linux 6.2 a virtio-net header cannot say it. */
static bool kernel_has_uso(void)
{
    int fd = open_tap("tapuso");
    bool has = ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_USO4 |
                                        TUN_F_USO6) == 0;

    close(fd);
    return has;
}

/* Whether the kernel knows such a packet; if not, it is said. */
static bool kernel_has_shape(const Shape *shape)
{
    if (shape->gso == VIRTIO_NET_HDR_GSO_UDP_L4 && !kernel_has_uso()) {
        g_test_message("%s: left out, the kernel has no USO", shape->name);
        return false;
    }
    return true;
}

/*
 * The guest
 */

static bool guest_has(const Side *s, unsigned feature)
{
    return s->f.dev->vdev.features >> feature & 1;
}

static void put_desc(Side *s, QVirtQueue *vq, int index, uint64_t addr,
                     uint32_t len, uint16_t flags)
{
    struct vring_desc *desc = (void *)(s->f.guest.ram + vq->desc);

    desc[index].addr = cpu_to_le64(addr);
    desc[index].len = cpu_to_le32(len);
    desc[index].flags = cpu_to_le16(flags);
}

/* Start the driver, or reload it; @high are features from bit 64 on. */
static void side_start(Side *s, uint64_t features, uint32_t high)
{
    Fixture *f = &s->f;

    if (f->guest.rx) {
        guest_stop(f);
    }
    f->guest.high_features = high;
    guest_start_queues(f, features);
    s->mergeable = guest_has(s, VIRTIO_NET_F_MRG_RXBUF);
    s->hdr_len = high ? sizeof(struct virtio_net_hdr_v1_hash_tunnel) :
                 guest_has(s, VIRTIO_NET_F_HASH_REPORT) ?
                 sizeof(struct virtio_net_hdr_v1_hash) :
                 s->mergeable || guest_has(s, VIRTIO_F_VERSION_1) ?
                 sizeof(struct virtio_net_hdr_v1) :
                 sizeof(struct virtio_net_hdr);
    s->stream_hdr_len = s->no_header ? 0 : s->hdr_len;
    for (int i = 0; i < (s->mergeable ? SMALL_BUFFERS : BIG_BUFFERS); i++) {
        size_t len = s->mergeable ? SMALL_BUFFER_LEN : BIG_BUFFER_LEN;

        f->guest.buffer[i] = guest_alloc(&f->alloc, len);
        put_desc(s, f->guest.rx, i, f->guest.buffer[i], len,
                 VRING_DESC_F_WRITE);
        guest_make_available(&f->guest, f->guest.rx, i);
    }
    s->tx_addr = guest_alloc(&f->alloc, BIG_BUFFER_LEN);
    qvirtio_set_driver_ok(&f->dev->vdev);
    guest_notify(f, f->guest.rx);
}

static void guest_write(Side *s, const Packet *p)
{
    uint8_t *buf = s->f.guest.ram + s->tx_addr;

    g_assert_cmpuint(s->hdr_len + p->len, <=, BIG_BUFFER_LEN);
    header_put(buf, s->hdr_len, &p->hdr);
    if (p->hdr.gso_type & VIRTIO_NET_HDR_GSO_UDP_TUNNEL) {
        struct virtio_net_hdr_v1_hash_tunnel *hdr = (void *)buf;

        hdr->outer_th_offset = cpu_to_le16(ETH_HLEN + 20);
        hdr->inner_nh_offset = cpu_to_le16(ETH_HLEN + TUNNEL_LEN);
    }
    memcpy(buf + s->hdr_len, p->data, p->len);
    put_desc(s, s->f.guest.tx, 0, s->tx_addr, s->hdr_len + p->len, 0);
    guest_send_head(&s->f, 0);
}

/* Returns: the number of bytes of one buffer, put to @buf. */
static uint32_t guest_read_buffer(Side *s, uint8_t *buf, size_t size)
{
    Guest *guest = &s->f.guest;
    QVirtQueue *rx = guest->rx;
    struct vring_used *used = (void *)(guest->ram + rx->used);
    uint32_t head, len;

    WAIT_UNTIL(guest_used_idx(guest, rx) != rx->last_used_idx);
    head = le32_to_cpu(used->ring[rx->last_used_idx % rx->size].id);
    len = le32_to_cpu(used->ring[rx->last_used_idx % rx->size].len);
    rx->last_used_idx++;
    g_assert_cmpuint(len, <=, size);
    memcpy(buf, guest->ram + guest->buffer[head], len);
    guest_make_available(guest, rx, head);
    guest_notify(&s->f, rx);
    return len;
}

static void guest_read(Side *s, Packet *p)
{
    g_autofree uint8_t *buf = g_malloc(BIG_BUFFER_LEN + HEADER_MAX);
    size_t len = guest_read_buffer(s, buf, BIG_BUFFER_LEN);

    g_assert_cmpuint(len, >=, s->hdr_len + ETH_HLEN);
    header_get(&p->hdr, buf, s->hdr_len);
    if (s->mergeable) {
        for (int n = lduw_le_p(buf + 10); n > 1; n--) {
            len += guest_read_buffer(s, buf + len, BIG_BUFFER_LEN - len);
        }
    }
    p->len = len - s->hdr_len;
    g_assert_cmpuint(p->len, <=, sizeof(p->data));
    memcpy(p->data, buf + s->hdr_len, p->len);
}

/* The features without which a packet cannot be received, or sent, whole */
static bool guest_takes_gso(const Side *s, const Packet *p, bool sends)
{
    switch (p->hdr.gso_type) {
    case VIRTIO_NET_HDR_GSO_NONE:
        return true;
    case VIRTIO_NET_HDR_GSO_TCPV4:
        return guest_has(s, sends ? VIRTIO_NET_F_HOST_TSO4 :
                                    VIRTIO_NET_F_GUEST_TSO4);
    case VIRTIO_NET_HDR_GSO_TCPV6:
        return guest_has(s, sends ? VIRTIO_NET_F_HOST_TSO6 :
                                    VIRTIO_NET_F_GUEST_TSO6);
    case VIRTIO_NET_HDR_GSO_UDP_L4:
        return guest_has(s, sends ? VIRTIO_NET_F_HOST_USO :
                         p->data[l3_offset(p->data)] >> 4 == 4 ?
                         VIRTIO_NET_F_GUEST_USO4 : VIRTIO_NET_F_GUEST_USO6);
    default:
        return false;
    }
}

static bool guest_can_send(const Side *s, const Packet *p)
{
    return !(p->hdr.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM) ||
           (guest_has(s, VIRTIO_NET_F_CSUM) && guest_takes_gso(s, p, true));
}

static bool guest_gets_whole(const Side *s, const Packet *p)
{
    return !(p->hdr.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM) ||
           (guest_has(s, VIRTIO_NET_F_GUEST_CSUM) &&
            guest_takes_gso(s, p, false) && p->len < GSO_MAX_LEN);
}

static size_t packet_payload(const Packet *p)
{
    size_t l3 = l3_offset(p->data);

    return p->len - l3 - ip_len(p->data + l3) -
           l4_len(ip_protocol(p->data + l3));
}

static void expect_guest_segments(Side *s, const Packet *want)
{
    g_autofree Packet *got = g_new(Packet, 1);
    size_t done = 0;

    do {
        guest_read(s, got);
        done += packet_assert_segment(got, want, done,
                                      guest_has(s, VIRTIO_NET_F_GUEST_CSUM));
    } while (done < packet_payload(want));
}

static void expect_guest_packet(Side *s, const Packet *want)
{
    g_autofree Packet *got = g_new(Packet, 1);

    if (guest_gets_whole(s, want)) {
        guest_read(s, got);
        packet_assert_equal(got, want);
    } else {
        expect_guest_segments(s, want);
    }
}

/*
 * The stream
 */

/* A record, as it is, to @record, and what it says to @p */
static void stream_read(const Side *s, int fd, Packet *p, Record *record)
{
    size_t prefix = s->stream_plain ? 4 : 8, len;
    uint8_t *header = record->data + prefix;

    read_full(fd, record->data, prefix);
    len = ldl_be_p(record->data);
    g_assert_cmpuint(len, >=, s->stream_hdr_len + ETH_HLEN);
    g_assert_cmpuint(len, <=, sizeof(record->data) - prefix);
    if (!s->stream_plain) {
        g_assert_cmpuint(ldl_be_p(record->data + 4), ==, s->stream_hdr_len);
    }
    read_full(fd, header, len);
    record->len = prefix + len;
    header_get(&p->hdr, header, s->stream_hdr_len);
    p->len = len - s->stream_hdr_len;
    g_assert_cmpuint(p->len, <=, sizeof(p->data));
    memcpy(p->data, header + s->stream_hdr_len, p->len);
    if (!(p->hdr.gso_type & VIRTIO_NET_HDR_GSO_UDP_TUNNEL)) {
        for (size_t i = sizeof(p->hdr); i < s->stream_hdr_len; i++) {
            g_assert_cmphex(header[i], ==, 0);
        }
    }
}

static void stream_write(int fd, const Record *record)
{
    for (size_t done = 0; done < record->len;) {
        ssize_t n = write(fd, record->data + done, record->len - done);

        g_assert_cmpint(n, >, 0);
        done += n;
    }
}

/* The next record at @fd has this packet. */
static void expect_record(const Side *s, int fd, const Packet *want,
                          Record *record)
{
    g_autofree Packet *got = g_new(Packet, 1);

    stream_read(s, fd, got, record);
    packet_assert_equal(got, want);
}

/* ... and is passed on. */
static void pass_record(const Side *s, int from, int to, const Packet *want)
{
    g_autofree Record *record = g_new(Record, 1);

    expect_record(s, from, want, record);
    stream_write(to, record);
}

/*
 * Two sides
 */

#define CSUM (1ull << VIRTIO_NET_F_CSUM | 1ull << VIRTIO_NET_F_GUEST_CSUM)
#define TSO4 (1ull << VIRTIO_NET_F_HOST_TSO4 | 1ull << VIRTIO_NET_F_GUEST_TSO4)
#define TSO6 (1ull << VIRTIO_NET_F_HOST_TSO6 | 1ull << VIRTIO_NET_F_GUEST_TSO6)
#define USO (1ull << VIRTIO_NET_F_HOST_USO | 1ull << VIRTIO_NET_F_GUEST_USO4 | \
             1ull << VIRTIO_NET_F_GUEST_USO6)
#define OFFLOADS (CSUM | TSO4 | TSO6 | USO)

static void side_open(Side *s, const char *netdev_opts, const char *nic_opts,
                      const char *args)
{
    memset(s, 0, sizeof(*s));
    fixture_init(&s->f, netdev_opts, nic_opts, args);
    run_command("ip link set %s mtu %d txqueuelen 5000", s->f.ifname, MTU);
    s->host = host_open(s->f.ifname);
    s->no_header = strstr(netdev_opts, "vnet_hdr=off");
}

static void side_close(Side *s)
{
    fixture_close(&s->f);
    close(s->host);
}

/* By the TAP; each try to inject into a full one counts. */
static uint64_t tx_dropped(Side *s)
{
    return statistic(s->f.ifname, "tx_dropped");
}

/* A captures both ways, to its peers "out" (tx) and "in" (rx) ... */
#define SIDE_A \
    "-object filter-redirector,id=captx,netdev=n0,outdev=out,queue=tx," \
    "vnet_hdr_support=on%s " \
    "-object filter-redirector,id=caprx,netdev=n0,outdev=in,queue=rx," \
    "vnet_hdr_support=on%s"
/* ... and B injects both ways, from "in" (tx) and "out" (rx). */
#define SIDE_B \
    "-object filter-redirector,id=injtx,netdev=n0,indev=in,queue=tx," \
    "vnet_hdr_support=on%s " \
    "-object filter-redirector,id=injrx,netdev=n0,indev=out,queue=rx," \
    "vnet_hdr_support=on%s"

/* From the host to the guest, or from the guest to the host */
static void packet_write(Side *s, const Packet *p, bool rx)
{
    if (rx) {
        guest_write(s, p);
    } else {
        host_write(s->host, p);
    }
}

static void expect_packet(Side *s, const Packet *want, bool rx)
{
    if (rx) {
        expect_host_packet(s->host, want);
    } else {
        expect_guest_packet(s, want);
    }
}

/* From the host to A's guest, and across to B's */
static void pass_tx(Side *a, Side *b, const Packet *p)
{
    g_autofree Packet *got = g_new(Packet, 1);
    g_autofree Record *record = g_new(Record, 1);
    size_t done = 0;

    host_write(a->host, p);
    expect_guest_packet(a, p);
    if (guest_gets_whole(a, p)) {
        pass_record(a, a->f.out, b->f.in, p);
        expect_guest_packet(b, p);
        return;
    }
    /* The kernel cuts it for A before it is captured. */
    do {
        stream_read(a, a->f.out, got, record);
        done += packet_assert_segment(got, p, done,
                                      guest_has(a, VIRTIO_NET_F_GUEST_CSUM));
        stream_write(b->f.in, record);
        expect_guest_packet(b, got);
    } while (done < packet_payload(p));
}

/* From A's guest to the host, and across to B's guest and host */
static void pass_rx(Side *a, Side *b, const Packet *p)
{
    g_autofree Packet *got = g_new(Packet, 1);
    g_autofree Record *record = g_new(Record, 1);

    if (!guest_can_send(a, p)) {
        return;
    }
    guest_write(a, p);
    expect_host_packet(a->host, p);
    expect_record(a, a->f.in, p, record);

    stream_write(b->f.in, record);
    expect_guest_packet(b, p);

    stream_write(b->f.out, record);
    if (b->stream_hdr_len || !p->hdr.flags) {
        expect_host_packet(b->host, p);
    } else if (p->hdr.gso_type == VIRTIO_NET_HDR_GSO_NONE) {
        host_read(b->host, got);
        packet_assert_segment(got, p, 0, false);
    } else {
        /* The network cannot get it whole without a header. */
        wait_counter(&b->f, "injrx", "inject-skipped", ++b->skipped);
    }
}

/* @only are patterns, separated by "|". */
static void pass_shapes(Side *a, Side *b, const char *only)
{
    g_auto(GStrv) patterns = g_strsplit(only, "|", -1);
    g_autofree Packet *p = g_new(Packet, 1);

    for (int i = 0; i < ARRAY_SIZE(shapes); i++) {
        bool match = false;

        for (char **pattern = patterns; *pattern; pattern++) {
            match |= g_pattern_match_simple(*pattern, shapes[i].name);
        }
        if (match && kernel_has_shape(&shapes[i])) {
            g_test_message("%s", shapes[i].name);
            packet_make(p, &shapes[i], i);
            pass_tx(a, b, p);
            packet_make(p, &shapes[i], 100 + i);
            pass_rx(a, b, p);
        }
    }
}

static void pair_open(Side *a, Side *b, const char *a_netdev_opts,
                      const char *b_netdev_opts, const char *nic_opts,
                      const char *filter_opts)
{
    g_autofree char *a_args = g_strdup_printf(SIDE_A, filter_opts,
                                              filter_opts);
    g_autofree char *b_args = g_strdup_printf(SIDE_B, filter_opts,
                                              filter_opts);

    side_open(a, a_netdev_opts, nic_opts, a_args);
    side_open(b, b_netdev_opts, nic_opts, b_args);
}

/* With vhost and all offloads */
static void pair_start(Side *a, Side *b, const char *a_netdev_opts,
                       const char *b_netdev_opts)
{
    pair_open(a, b, a_netdev_opts, b_netdev_opts, "", "");
    side_start(a, GUEST_FEATURES | OFFLOADS, 0);
    side_start(b, GUEST_FEATURES | OFFLOADS, 0);
    g_assert_true(vhost_started(&a->f));
    g_assert_true(vhost_started(&b->f));
}

/* What must go in segments is not tried otherwise: the kernel would tell. */
static void pair_close(Side *a, Side *b)
{
    g_assert_cmpuint(tx_dropped(a), ==, 0);
    g_assert_cmpuint(tx_dropped(b), ==, 0);
    side_close(a);
    side_close(b);
}

static void test_all_offloads(void)
{
    Side a, b;

    pair_start(&a, &b, "vhost=on", "vhost=on");
    pass_shapes(&a, &b, "*");
    pair_close(&a, &b);
}

/* A guest or the other has fewer of them, or other ones. */
static void test_fewer_offloads(void)
{
    static const struct {
        uint64_t a, b;
    } cases[] = {
        { OFFLOADS, 0 },
        { OFFLOADS, CSUM },
        { OFFLOADS, CSUM | TSO6 },
        { CSUM | TSO4, OFFLOADS },
        { CSUM, CSUM },
        { 0, OFFLOADS },
        { 0, 0 },
    };
    Side a, b;

    pair_open(&a, &b, "vhost=on", "vhost=on", "", "");
    for (int i = 0; i < ARRAY_SIZE(cases); i++) {
        g_test_message("case %d", i);
        if (!i || cases[i].a != cases[i - 1].a) {
            side_start(&a, GUEST_FEATURES | cases[i].a, 0);
        }
        side_start(&b, GUEST_FEATURES | cases[i].b, 0);
        pass_shapes(&a, &b, "TSO*|USO*|TCP|UDP, tagged");
    }
    pair_close(&a, &b);
}

/*
 * Headers: of each length on either side, changed by reloading the driver
 */

typedef struct Headers {
    const char *path;
    const char *netdev_opts;
    const char *nic_opts;
    const char *filter_opts;
    struct {
        uint64_t features;
        size_t len;
    } sides[2];
} Headers;

static const Headers headers[] = {
    /* Without and with mergeable buffers */
    { "header/legacy", "vhost=on", ",disable-modern=on", "",
      { { 0, 10 }, { 1ull << VIRTIO_NET_F_MRG_RXBUF, 12 } } },
    { "header/modern", "vhost=on", "", "",
      { { 1ull << VIRTIO_F_VERSION_1, 12 }, { GUEST_FEATURES, 12 } } },
    /* No kernel's vhost has hash reporting (as of 6.18). */
    { "header/hash-report", "vhost=off", ",hash=on", ",packet-socket=on",
      { { GUEST_FEATURES | 1ull << VIRTIO_NET_F_HASH_REPORT, 20 },
        { GUEST_FEATURES, 12 } } },
};

static void headers_start(Side *s, const Headers *h, int side)
{
    side_start(s, h->sides[side].features | OFFLOADS, 0);
    g_assert_cmpuint(s->hdr_len, ==, h->sides[side].len);
}

static void test_headers(const void *data)
{
    const Headers *h = data;
    Side a, b;

    pair_open(&a, &b, h->netdev_opts, h->netdev_opts, h->nic_opts,
              h->filter_opts);
    for (int i = 0; i < 4; i++) {
        g_test_message("from %zu to %zu bytes", h->sides[i / 2].len,
                       h->sides[i % 2].len);
        if (i % 2 == 0) {
            headers_start(&a, h, i / 2);
        }
        headers_start(&b, h, i % 2);
        pass_shapes(&a, &b, "60 bytes|QinQ|UDP|TSO|longest TSO");
    }
    pair_close(&a, &b);
}

#define WITHOUT_HEADER "60 bytes|*tag*|*QinQ*|UDP*|TCP*|TSO*"

/*
 * There is no header: what it would say must be done before.  vhost puts a
 * header of zeroes before a frame, and skips the guest's.
 */
static void test_header_none(void)
{
    Side a, b;

    pair_start(&a, &b, "vhost=on,vnet_hdr=off", "vhost=on,vnet_hdr=off");
    g_assert_false(guest_has(&a, VIRTIO_NET_F_CSUM));
    pass_shapes(&a, &b, WITHOUT_HEADER);
    pair_close(&a, &b);
}

/* From one that has a header to one that has none */
static void test_header_to_none(void)
{
    Side a, b;

    pair_start(&a, &b, "vhost=on", "vhost=on,vnet_hdr=off");
    pass_shapes(&a, &b, WITHOUT_HEADER);
    g_assert_cmpuint(b.skipped, >, 0);
    pair_close(&a, &b);
}

/*
 * Frames in a UDP tunnel: VXLAN, around a packet of TCP that is to be cut
 */

#define TUNNEL_FEATURES (1u << (VIRTIO_NET_F_HOST_UDP_TUNNEL_GSO - 64) | \
                         1u << (VIRTIO_NET_F_GUEST_UDP_TUNNEL_GSO - 64))

static uint32_t device_high_features(Side *s)
{
    QVirtioPCIDevice *dev = s->f.dev;
    uint64_t common = dev->common_cfg_offset;

    qpci_io_writel(dev->pdev, dev->bar, common +
                   offsetof(struct virtio_pci_common_cfg,
                            device_feature_select), 2);
    return qpci_io_readl(dev->pdev, dev->bar, common +
                         offsetof(struct virtio_pci_common_cfg,
                                  device_feature));
}

static Packet *packet_new_tunnel(uint32_t number)
{
    Packet *p = packet_new("TSO", number);
    uint8_t *ip = p->data + ETH_HLEN, *udp = ip + 20;

    memmove(ip + TUNNEL_LEN, ip, p->len - ETH_HLEN);
    memcpy(ip + TUNNEL_LEN - ETH_HLEN, p->data, ETH_HLEN);
    p->len += TUNNEL_LEN;
    put_ip(ip, 4, IPPROTO_UDP, p->len - ETH_HLEN - 20, number);
    memset(udp, 0, 16);
    stw_be_p(udp, 50000);
    stw_be_p(udp + 2, 4789);
    stw_be_p(udp + 4, p->len - ETH_HLEN - 20);
    udp[8] = 8;                 /* VXLAN: there is an identifier */
    udp[14] = 42;
    p->hdr.csum_start += TUNNEL_LEN;
    p->hdr.hdr_len += TUNNEL_LEN;
    p->hdr.gso_type |= VIRTIO_NET_HDR_GSO_UDP_TUNNEL_IPV4;
    return p;
}

/* What makes up @want, with all headers around each piece */
static void expect_guest_tunnel(Side *s, const Packet *want)
{
    const size_t headers = ETH_HLEN + TUNNEL_LEN + 20 + 32;
    g_autofree Packet *got = g_new(Packet, 1);

    for (size_t done = 0; done < want->len - headers;) {
        size_t len = MIN(want->len - headers - done, MSS);

        guest_read(s, got);
        g_assert_cmpint(got->hdr.gso_type, ==, VIRTIO_NET_HDR_GSO_NONE);
        g_assert_cmpuint(got->len, ==, headers + len);
        g_assert_cmpuint(lduw_be_p(got->data + ETH_HLEN + 2), ==,
                         got->len - ETH_HLEN);
        g_assert_cmpuint(lduw_be_p(got->data + ETH_HLEN + 24), ==,
                         got->len - ETH_HLEN - 20);
        g_assert_cmpuint(lduw_be_p(got->data + ETH_HLEN + TUNNEL_LEN + 2), ==,
                         got->len - ETH_HLEN - TUNNEL_LEN);
        g_assert_cmpmem(got->data + headers, len,
                        want->data + headers + done, len);
        done += len;
    }
}

/* From the guest of A to the network, and across to both of B */
static void pass_tunnel(Side *a, Side *b, const Packet *p)
{
    g_autofree Packet *got = g_new(Packet, 1);
    g_autofree Record *record = g_new(Record, 1);
    struct virtio_net_hdr_v1_hash_tunnel *hdr = (void *)(record->data + 8);

    guest_write(a, p);
    host_read(a->host, got);
    g_assert_cmpmem(got->data, got->len, p->data, p->len);
    expect_record(a, a->f.in, p, record);
    g_assert_cmpuint(le16_to_cpu(hdr->outer_th_offset), ==, ETH_HLEN + 20);
    g_assert_cmpuint(le16_to_cpu(hdr->inner_nh_offset), ==,
                     ETH_HLEN + TUNNEL_LEN);
    stream_write(b->f.in, record);
    expect_guest_tunnel(b, p);
    if (b->hdr_len == a->hdr_len) {
        stream_write(b->f.out, record);
        host_read(b->host, got);
        g_assert_cmpmem(got->data, got->len, p->data, p->len);
    }
}

static void run_tunnel(const char *netdev_opts, const char *filter_opts)
{
    Side a, b;

    pair_open(&a, &b, netdev_opts, netdev_opts, "", filter_opts);
    if ((device_high_features(&a) & TUNNEL_FEATURES) != TUNNEL_FEATURES) {
        g_test_skip("needs the offloads of UDP tunnels of Linux 6.17");
        pair_close(&a, &b);
        return;
    }
    for (int i = 0; i < 4; i++) {
        g_autofree Packet *p = packet_new_tunnel(i);

        side_start(&a, GUEST_FEATURES | OFFLOADS, i & 2 ? 0 : TUNNEL_FEATURES);
        side_start(&b, GUEST_FEATURES | OFFLOADS, i & 1 ? 0 : TUNNEL_FEATURES);
        g_test_message("from %zu to %zu bytes", a.hdr_len, b.hdr_len);
        pass_shapes(&a, &b, "60 bytes|QinQ|UDP|TSO*");
        if (!(i & 2)) {
            pass_tunnel(&a, &b, p);
        }
    }
    pair_close(&a, &b);
}

static void test_header_tunnel(void)
{
    run_tunnel("vhost=on", "");
}

static void test_header_tunnel_no_vhost(void)
{
    run_tunnel("vhost=off", ",packet-socket=on");
}

/*
 * GSO packets that have to wait, or cannot be injected
 */

static void inject_packet(Side *s, const Packet *p)
{
    g_autofree Record *record = g_new(Record, 1);
    uint8_t *header = record->data + 8;

    record->len = 8 + s->hdr_len + p->len;
    stl_be_p(record->data, s->hdr_len + p->len);
    stl_be_p(record->data + 4, s->hdr_len);
    header_put(header, s->hdr_len, &p->hdr);
    memcpy(header + s->hdr_len, p->data, p->len);
    stream_write(s->f.in, record);
}

static void injecting_open(Side *s, uint64_t features, const char *ip_args)
{
    side_open(s, "vhost=on", "", INJECT "tx,enable_when_stopped=on");
    run_command("ip link set %s %s", s->f.ifname, ip_args);
    side_start(s, features, 0);
}

/*
 * The peer goes when some segments of a packet are in the TAP, and others not.
 */
static void test_gso_peer_leaves(void)
{
    g_autofree Packet *p = packet_new("longest TSO", 0);
    Side s;

    injecting_open(&s, GUEST_FEATURES, "txqueuelen 10");
    vm_stop(&s.f);
    inject_packet(&s, p);
    for (int i = 0; i < 4; i++) {
        uint64_t dropped = tx_dropped(&s);

        WAIT_UNTIL(tx_dropped(&s) > dropped);
        if (i < 3) {
            close(s.f.in);
            expect_connected(&s.f, "in", false);
            s.f.in = connect_to(&s.f, "in");
        }
    }
    g_assert_cmpuint(counter(&s.f, "inj", "inject-packets"), ==, 0);
    vm_cont(&s.f);
    expect_guest_segments(&s, p);
    inject_packet(&s, p);
    expect_guest_segments(&s, p);
    wait_counter(&s.f, "inj", "inject-packets", 2);
    side_close(&s);
}

/*
 * UFO has gone from the kernel (Linux 4.14) but for what guests negotiate: no
 * packet socket takes it, and it is not segmented.
 */
static void test_gso_unknown(void)
{
    g_autofree Packet *ufo = packet_new("UDP, jumbo", 0);
    g_autofree Packet *plain = packet_new("60 bytes", 1);
    Side s;

    ufo->hdr.gso_type = VIRTIO_NET_HDR_GSO_UDP;
    ufo->hdr.gso_size = 1480;
    ufo->hdr.hdr_len = ufo->hdr.csum_start + 8;
    injecting_open(&s, GUEST_FEATURES | OFFLOADS |
                       1ull << VIRTIO_NET_F_HOST_UFO |
                       1ull << VIRTIO_NET_F_GUEST_UFO, "mtu 1500");
    inject_packet(&s, ufo);
    inject_packet(&s, plain);
    expect_guest_packet(&s, plain);
    g_assert_cmpuint(counter(&s.f, "inj", "inject-skipped"), ==, 1);
    side_close(&s);
}

/*
 * Order: packets that are read and sent in different ways do not overtake
 */

#define BURST 40

/* The packet with this number, from the same mixture for all that make it */
static const Packet *mixture(Packet *p, uint32_t number)
{
    static const char *const names[] = {
        "60 bytes", "just over a slot of the ring", "TSO", "odd", "UDP",
        "jumbo", "tag", "TSO over IPv6", "full", "TCP, empty", "TSO, tagged",
    };

    packet_make(p, shape_named(names[(number * 2654435761u >> 16) %
                                     ARRAY_SIZE(names)]), number);
    return p;
}

static void pass_burst(Side *a, Side *b, uint32_t first, bool rx)
{
    g_autofree Packet *p = g_new(Packet, 1);
    g_autofree Record *records = g_new(Record, BURST);

    for (uint32_t i = 0; i < BURST; i++) {
        packet_write(a, mixture(p, first + i), rx);
    }
    for (uint32_t i = 0; i < BURST; i++) {
        expect_record(a, rx ? a->f.in : a->f.out, mixture(p, first + i),
                      &records[i]);
        expect_packet(a, p, rx);
    }
    for (uint32_t i = 0; i < BURST; i++) {
        stream_write(rx ? b->f.out : b->f.in, &records[i]);
    }
    for (uint32_t i = 0; i < BURST; i++) {
        expect_packet(b, mixture(p, first + i), rx);
    }
}

/* Some go as they are, and some in segments. */
static void test_order(void)
{
    Side a, b;

    pair_open(&a, &b, "vhost=on", "vhost=on", "", "");
    side_start(&a, GUEST_FEATURES | OFFLOADS, 0);
    side_start(&b, GUEST_FEATURES, 0);
    for (uint32_t n = 0; n < 12 * BURST; n += BURST) {
        pass_burst(&a, &b, n, false);
        pass_burst(&a, &b, n, true);
    }
    pair_close(&a, &b);
}

/*
 * Interoperation: each that writes the stream with each that reads it
 */

/* One that writes to "out", or reads from "in" */
typedef struct StreamEnd {
    const char *args;
    bool vhost;
    bool takes;                 /* the packets, so that they go nowhere else */
} StreamEnd;

static const StreamEnd stream_writers[] = {
    { "filter-redirector,outdev=out", .vhost = true },
    { "filter-mirror,outdev=out", .vhost = true },
    { "filter-redirector,outdev=out,packet-socket=on" },
    { "filter-redirector,outdev=out", .takes = true },
    { "filter-mirror,outdev=out" },
};

static const StreamEnd stream_readers[] = {
    { "filter-redirector,indev=in", .vhost = true },
    { "filter-redirector,indev=in" },
};

static void add_stream_end(Side *s, const char *args, bool rx, bool vnet_hdr)
{
    object_add(&s->f, "-object %s,id=end,netdev=n0,queue=%s,"
               "vnet_hdr_support=%s", args, rx ? "rx" : "tx",
               vnet_hdr ? "on" : "off");
    s->stream_plain = !vnet_hdr;
}

static void run_streams(Side *a, const StreamEnd *from, Side *b,
                        const StreamEnd *to, bool rx, bool vnet_hdr)
{
    static const char *const names[] = {
        "odd", "60 bytes", "tag", "UDP over IPv6", "longest TSO",
    };

    g_test_message("%s, vhost=%d, to %s, vhost=%d, %s, vnet_hdr_support=%d",
                   from->args, from->vhost, to->args, to->vhost,
                   rx ? "rx" : "tx", vnet_hdr);
    add_stream_end(a, from->args, rx, vnet_hdr);
    add_stream_end(b, to->args, rx, vnet_hdr);
    for (int i = 0; i < ARRAY_SIZE(names); i++) {
        g_autofree Packet *p = packet_new(names[i], i);

        packet_write(a, p, rx);
        pass_record(a, a->f.out, b->f.in, p);
        expect_packet(b, p, rx);
        if (!from->takes) {
            expect_packet(a, p, rx);
        }
    }
    del_object(&a->f, "end");
    del_object(&b->f, "end");
}

static void test_streams(void)
{
    Side a[2], b[2];            /* without and with vhost */

    for (int i = 0; i < 2; i++) {
        const char *opts = i ? "vhost=on" : "vhost=off";

        side_open(&a[i], opts, "", "");
        side_open(&b[i], opts, "", "");
        side_start(&a[i], GUEST_FEATURES | OFFLOADS, 0);
        side_start(&b[i], GUEST_FEATURES | OFFLOADS, 0);
    }
    for (int i = 0; i < ARRAY_SIZE(stream_writers); i++) {
        for (int j = 0; j < ARRAY_SIZE(stream_readers); j++) {
            const StreamEnd *from = &stream_writers[i];
            const StreamEnd *to = &stream_readers[j];

            for (int k = 0; k < 4; k++) {
                run_streams(&a[from->vhost], from, &b[to->vhost], to, k & 1,
                            k & 2);
            }
        }
    }
    for (int i = 0; i < 2; i++) {
        pair_close(&a[i], &b[i]);
    }
}

/*
 * Files: filter-dump beside tcpdump
 */

#define DUMP_LAST 0xfeedbeef    /* the number of the last packet */

static GPid tcpdump_start(const char *ifname, const char *path)
{
    int before = packet_sockets(ifname, ETH_P_ALL, 1);
    g_autofree char *command = g_strdup_printf(
        "tcpdump -i %s -q --immediate-mode -U -B 32768 -s 262144 -Z root -w %s",
        ifname, path);
    g_auto(GStrv) argv = g_strsplit(command, " ", -1);
    GPid pid;

    g_assert_true(g_spawn_async(NULL, argv, NULL, G_SPAWN_SEARCH_PATH |
                                G_SPAWN_DO_NOT_REAP_CHILD, NULL, NULL, &pid,
                                NULL));
    WAIT_UNTIL(packet_sockets(ifname, ETH_P_ALL, 1) > before &&
               access(path, R_OK) == 0);
    return pid;
}

/* Returns where the frame has a checksum of TCP or UDP, which is right; or 0 */
static size_t frame_checksum(const uint8_t *frame, size_t len)
{
    size_t l3 = l3_offset(frame), l4;
    uint16_t type = lduw_be_p(frame + l3 - 2);
    uint8_t protocol;

    if (type != ETH_P_IP && type != ETH_P_IPV6) {
        return 0;
    }
    l4 = l3 + ip_len(frame + l3);
    protocol = ip_protocol(frame + l3);
    g_assert_cmphex(sum_words(frame + l4, len - l4,
                        sum_pseudo(frame + l3, len - l4, protocol)), ==,
                    0xffff);
    return l4 + l4_csum_offset(protocol);
}

/*
 * One packet in both files: the same, at the same time, but a checksum that is
 * left to do in tcpdump's is done in ours.  Returns whether it was.
 */
static bool expect_same_packet(FILE *ours, FILE *theirs, uint32_t *number)
{
    g_autofree uint8_t *a = g_malloc(FRAME_MAX), *b = g_malloc(FRAME_MAX);
    PcapPacket pa, pb;
    bool differs;
    size_t at;

    read_pcap(ours, &pa, a, FRAME_MAX);
    read_pcap(theirs, &pb, b, FRAME_MAX);
    g_assert_cmpuint(pa.len, ==, pb.len);
    g_assert_cmpuint(pa.caplen, ==, pa.len);
    g_assert_cmpuint(pb.caplen, ==, pb.len);
    g_assert_cmpuint(pa.sec, ==, pb.sec);
    g_assert_cmpuint(pa.usec, ==, pb.usec);
    *number = pa.len >= 18 ? ldl_be_p(a + 14) : 0;
    differs = memcmp(a, b, pa.len);
    at = frame_checksum(a, pa.len);
    if (at) {
        memcpy(b + at, a + at, 2);
    }
    g_assert_cmpmem(a, pa.len, b, pb.len);
    return differs;
}

/* Wireshark finds no flaw in the file: it shows only packets that have one. */
static void expect_no_flaw(const char *path)
{
    g_autofree char *program = g_find_program_in_path("tshark");
    g_autofree char *command = NULL, *text = NULL;
    int status;

    if (!program) {
        /* The rest of the test has its value, but does not count as all. */
        g_test_incomplete("there is no tshark");
        return;
    }
    command = g_strdup_printf(
        "tshark -n -r %s -o ip.check_checksum:TRUE -o tcp.check_checksum:TRUE "
        "-o udp.check_checksum:TRUE -Y '_ws.malformed || "
        "ip.checksum.status != 1 || tcp.checksum.status != 1 || "
        "udp.checksum.status != 1'", path);
    g_assert_true(g_spawn_command_line_sync(command, &text, NULL, &status,
                                            NULL));
    g_assert_cmpint(status, ==, 0);
    g_assert_cmpstr(text, ==, "");
}

static void run_dump(uint64_t features, bool whole)
{
    g_autofree char *path = NULL, *tcpdump_path = NULL;
    g_autofree Packet *p = g_new(Packet, 1);
    unsigned packets = 0, completed = 0;
    FILE *ours, *theirs;
    uint32_t number;
    GPid tcpdump;
    Side a;

    side_open(&a, "vhost=on", "", "");
    side_start(&a, features, 0);
    path = g_build_filename(a.f.dir, "dump", NULL);
    tcpdump_path = g_build_filename(a.f.dir, "tcpdump", NULL);
    object_add(&a.f, "-object filter-dump,id=dump,netdev=n0,maxlen=262144,"
               "file=%s", path);
    g_assert_true(vhost_started(&a.f));
    tcpdump = tcpdump_start(a.f.ifname, tcpdump_path);
    for (int i = 0; i < ARRAY_SIZE(shapes); i++) {
        if (!kernel_has_shape(&shapes[i])) {
            continue;
        }
        packet_make(p, &shapes[i], i);
        host_write(a.host, p);
        expect_guest_packet(&a, p);
        if (guest_can_send(&a, p)) {
            packet_make(p, &shapes[i], 100 + i);
            guest_write(&a, p);
            expect_host_packet(a.host, p);
        }
    }
    packet_make(p, shape_named("60 bytes"), DUMP_LAST);
    host_write(a.host, p);

    ours = open_pcap(path);
    theirs = open_pcap(tcpdump_path);
    do {
        completed += expect_same_packet(ours, theirs, &number);
        packets++;
    } while (number != DUMP_LAST);
    g_assert_cmpuint(packets, ==, counter(&a.f, "dump", "capture-packets"));
    g_assert_cmpuint(packets, >=, ARRAY_SIZE(shapes));
    g_assert_true(!whole || completed > 0);
    expect_no_flaw(path);

    fclose(ours);
    fclose(theirs);
    kill(tcpdump, SIGINT);
    g_assert_cmpint(waitpid(tcpdump, NULL, 0), ==, tcpdump);
    side_close(&a);
}

static void test_dump(void)
{
    g_autofree char *program = g_find_program_in_path("tcpdump");

    if (!program) {
        g_test_skip("there is no tcpdump");
        return;
    }
    run_dump(GUEST_FEATURES | OFFLOADS, true);
    run_dump(GUEST_FEATURES, false);
}

int main(int argc, char **argv)
{
    rig_init(&argc, &argv, "filter-redirector-fidelity");
    rig_add("offloads/all", test_all_offloads);
    rig_add("offloads/fewer", test_fewer_offloads);
    for (int i = 0; i < ARRAY_SIZE(headers); i++) {
        rig_add_data(headers[i].path,
                     g_memdup2(&headers[i], sizeof(headers[i])), test_headers);
    }
    rig_add("header/none", test_header_none);
    rig_add("header/to-none", test_header_to_none);
    rig_add("header/tunnel", test_header_tunnel);
    rig_add("header/tunnel-no-vhost", test_header_tunnel_no_vhost);
    rig_add("gso/peer-leaves", test_gso_peer_leaves);
    rig_add("gso/unknown", test_gso_unknown);
    rig_add("order", test_order);
    rig_add("streams/each-with-each", test_streams);
    if (HAS_DUMP) {
        rig_add("dump/tcpdump", test_dump);
    }
    return g_test_run();
}
