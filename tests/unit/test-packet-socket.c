/*
 * Packet socket on one network interface: unit tests
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Everything runs on real TAPs, in a network namespace of its own.  The
 * frames are of the EtherType for local experiments, so that nobody answers,
 * and carry a number that tells one from the other.  What is captured of the
 * traffic to a TAP is compared with what the reader of the TAP gets.
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/sockets.h"
#include "qemu/thread.h"
#include "qemu/timer.h"
#include "qemu/units.h"
#include "net/frame-offload.h"
#include "net/packet-socket.h"
#include "qapi/error.h"
#include "tap-helpers.h"
#include <net/if.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/if_bridge.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include <linux/if_vlan.h>
#include <linux/net_tstamp.h>
#include <linux/sockios.h>

#define CAPTURE_MEMORY (24 * MiB)
#define BOTH (PACKET_SOCKET_OUTGOING | PACKET_SOCKET_INCOMING)

/* The largest of a TAP */
#define MTU_MAX (65535 - ETH_HLEN)

/* The longest GSO frame that the kernel sends to a TAP in one piece */
#define GSO_WHOLE 65535

#define MSS 1000

static bool finish_checksum(struct virtio_net_hdr *hdr, uint8_t *frame,
                            size_t len)
{
    return frame_offload_to_guest(hdr, frame, len, NULL, 0, false);
}

/*
 * The interface, and the two ends of what goes through it
 */

static void set_address(const char *name, const char *address)
{
    struct ifreq ifr = {};
    struct sockaddr_in *sin = (struct sockaddr_in *)&ifr.ifr_addr;

    g_strlcpy(ifr.ifr_name, name, IFNAMSIZ);
    sin->sin_family = AF_INET;
    g_assert_cmpint(inet_pton(AF_INET, address, &sin->sin_addr), ==, 1);
    g_assert_cmpint(ioctl(control_socket(), SIOCSIFADDR, &ifr), ==, 0);
}

/* The host sends. */
static void host_send(int sender, const Frame *frame)
{
    /* A full queue of the TAP is nothing to a capture, which comes before. */
    g_assert(frame_write(sender, frame) || errno == ENOBUFS);
}

/*
 * The ways that frames come to a capture
 */

typedef struct Way {
    const char *name;
    unsigned directions;        /* that are captured */
    bool bridged;               /* from another TAP on the same bridge */
} Way;

static const Way ways[] = {
    { "incoming", PACKET_SOCKET_INCOMING },
    { "outgoing", PACKET_SOCKET_OUTGOING },
    { "both", BOTH },
    /* Here tags come beside the frame. */
    { "bridged", PACKET_SOCKET_OUTGOING, true },
};

typedef struct Lab {
    const Way *way;
    Tap tap;                    /* where frames are captured */
    Tap other;
    char bridge[IFNAMSIZ];
    unsigned passed;
} Lab;

/* With a TAP that takes whatever there is in one piece */
static bool lab_new(Lab *lab, const Way *way)
{
    if (!can_run()) {
        return false;
    }
    memset(lab, 0, sizeof(*lab));
    lab->way = way;
    lab->other.fd = -1;
    if (way->bridged && !bridge_new(lab->bridge)) {
        g_test_skip("the kernel has no bridges");
        return false;
    }
    tap_new(&lab->tap);
    tap_set_offload(&lab->tap, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6);
    set_mtu(&lab->tap, MTU_MAX);
    if (way->bridged) {
        tap_new(&lab->other);
        set_mtu(&lab->other, MTU_MAX);
        bridge_add(lab->bridge, &lab->tap);
        bridge_add(lab->bridge, &lab->other);
    }
    return true;
}

static void lab_free(Lab *lab)
{
    tap_delete(&lab->tap);
    tap_delete(&lab->other);
    if (lab->way->bridged) {
        bridge_delete(lab->bridge);
    }
}

/* Returns: false if the kernel does not take this frame. */
static bool lab_try_pass(Lab *lab, const Frame *frame)
{
    bool incoming = !(lab->way->directions & PACKET_SOCKET_OUTGOING) ||
                    (lab->way->directions == BOTH && lab->passed & 1);
    int fd = incoming ? lab->tap.fd :
             lab->way->bridged ? lab->other.fd : lab->tap.sender;

    lab->passed++;
    if (!frame_write(fd, frame)) {
        g_assert_cmpint(errno, ==, EINVAL);
        return false;
    }
    tap_drain(&lab->tap);
    return true;
}

static void lab_pass(Lab *lab, const Frame *frame)
{
    g_assert_true(lab_try_pass(lab, frame));
}

/*
 * Frames
 */

static void frame_make(Frame *frame, uint32_t number, size_t len)
{
    static const uint8_t header[] = {
        0x52, 0x54, 0x00, 0x00, 0x00, 0x01, 0x52, 0x54, 0x00, 0x00, 0x00, 0x02,
        ETH_P_TEST >> 8, ETH_P_TEST & 0xff,
    };

    g_assert_cmpuint(len, >=, sizeof(header) + 4);
    g_assert_cmpuint(len, <=, FRAME_MAX);
    memset(&frame->hdr, 0, sizeof(frame->hdr));
    memcpy(frame->data, header, sizeof(header));
    stl_be_p(frame->data + sizeof(header), number);
    for (size_t i = sizeof(header) + 4; i < len; i++) {
        frame->data[i] = number + i * 7;
    }
    frame->len = len;
}

static uint32_t frame_number(const Frame *frame)
{
    if (lduw_be_p(frame->data + 12) == ETH_P_IP) {
        return ldl_be_p(frame->data + 38);      /* frame_make_long_gso() */
    }
    g_assert_cmphex(lduw_be_p(frame->data + 12), ==, ETH_P_TEST);
    return ldl_be_p(frame->data + 14);
}

static void frame_add_tag(Frame *frame, uint16_t tpid, uint16_t tci)
{
    memmove(frame->data + 16, frame->data + 12, frame->len - 12);
    stw_be_p(frame->data + 12, tpid);
    stw_be_p(frame->data + 14, tci);
    frame->len += 4;
    if (frame->hdr.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM) {
        frame->hdr.csum_start += 4;
    }
    if (frame->hdr.gso_type) {
        frame->hdr.hdr_len += 4;
    }
}

static void frame_assert_equal(const Frame *a, const Frame *b)
{
    g_assert_cmpuint(a->len, ==, b->len);
    g_assert(!memcmp(a->data, b->data, a->len));
}

/* Those fields that mean something; some kernels fill hdr_len always. */
static void frame_assert_hdr_equal(const Frame *a, const Frame *b)
{
    bool csum = a->hdr.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM;

    g_assert_cmphex(a->hdr.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM, ==,
                    b->hdr.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM);
    g_assert_cmphex(a->hdr.gso_type, ==, b->hdr.gso_type);
    if (csum) {
        g_assert_cmpuint(a->hdr.csum_start, ==, b->hdr.csum_start);
        g_assert_cmpuint(a->hdr.csum_offset, ==, b->hdr.csum_offset);
    }
    if (a->hdr.gso_type) {
        g_assert_cmpuint(a->hdr.gso_size, ==, b->hdr.gso_size);
    }
}

static size_t ip_header_len(const uint8_t *ip)
{
    return ip[0] >> 4 == 4 ? (ip[0] & 15) * 4 : 40;
}

/* Whether the checksum of the TCP or UDP packet in an untagged frame holds */
static bool checksum_holds(const Frame *frame)
{
    const uint8_t *ip = frame->data + ETH_HLEN;
    size_t ip_len = ip_header_len(ip);
    size_t total = ip[0] >> 4 == 4 ? lduw_be_p(ip + 2) :
                                     40 + lduw_be_p(ip + 4);
    uint8_t protocol = ip[0] >> 4 == 4 ? ip[9] : ip[6];
    uint32_t sum = sum_bytes(ip + ip_len, total - ip_len);

    sum += sum_pseudo(ip, total - ip_len, protocol);
    return ((sum & 0xffff) + (sum >> 16)) == 0xffff;
}

/*
 * A TCP or UDP packet of IPv4 or IPv6 with @payload bytes of data, whose
 * checksum is left to do: the field has the sum of the pseudo header.
 */
static void frame_make_ip(Frame *frame, int version, uint8_t protocol,
                          size_t payload)
{
    size_t ip_len = version == 4 ? 20 : 40;
    size_t l4_len = protocol == IPPROTO_TCP ? 20 : 8;
    size_t total = ip_len + l4_len + payload;
    uint8_t *ip = frame->data + ETH_HLEN, *l4 = ip + ip_len;

    frame_make(frame, 0, ETH_HLEN + MAX(total, 4));
    frame->len = ETH_HLEN + total;
    memset(ip, 0, ip_len + l4_len);
    stw_be_p(frame->data + 12, version == 4 ? ETH_P_IP : ETH_P_IPV6);
    if (version == 4) {
        ip[0] = 0x45;
        stw_be_p(ip + 2, total);
        stw_be_p(ip + 6, 0x4000);
        ip[8] = 64;
        ip[9] = protocol;
        stl_be_p(ip + 12, 0xc0000201);
        stl_be_p(ip + 16, 0xc0000202);
        stw_be_p(ip + 10, ~sum_bytes(ip, 20));
    } else {
        ip[0] = 0x60;
        stw_be_p(ip + 4, total - 40);
        ip[6] = protocol;
        ip[7] = 64;
        stl_be_p(ip + 8, 0x20010db8);
        ip[23] = 1;
        stl_be_p(ip + 24, 0x20010db8);
        ip[39] = 2;
    }
    stw_be_p(l4, 1234);
    stw_be_p(l4 + 2, 4321);
    if (protocol == IPPROTO_TCP) {
        stl_be_p(l4 + 4, 0x01020304);
        l4[12] = 0x50;
        l4[13] = 0x10;
        stw_be_p(l4 + 14, 1000);
    } else {
        stw_be_p(l4 + 4, l4_len + payload);
    }
    frame->hdr.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
    frame->hdr.csum_start = ETH_HLEN + ip_len;
    frame->hdr.csum_offset = protocol == IPPROTO_TCP ? 16 : 6;
    stw_be_p(l4 + frame->hdr.csum_offset,
             sum_pseudo(ip, l4_len + payload, protocol));
}

static void frame_make_gso(Frame *frame, int version, size_t payload)
{
    frame_make_ip(frame, version, IPPROTO_TCP, payload);
    frame->hdr.gso_type = version == 4 ? VIRTIO_NET_HDR_GSO_TCPV4 :
                                         VIRTIO_NET_HDR_GSO_TCPV6;
    frame->hdr.gso_size = MSS;
    frame->hdr.hdr_len = frame->hdr.csum_start + 20;
}

/* Frames whose lengths and contents follow from their number */
typedef void FrameMaker(Frame *frame, uint32_t number);

static void frame_make_small(Frame *frame, uint32_t number)
{
    frame_make(frame, number, 60 + number % 40);
}

static void frame_make_full(Frame *frame, uint32_t number)
{
    frame_make(frame, number, 1490 + number % 25);
}

static void frame_make_jumbo(Frame *frame, uint32_t number)
{
    frame_make(frame, number, 1600 + number * 37 % 7400);
}

static void frame_make_long_gso(Frame *frame, uint32_t number)
{
    frame_make_gso(frame, 4, 2000 + number * 7919 % 63000);
    stl_be_p(frame->data + 38, number);
    for (size_t i = ETH_HLEN + 40; i < frame->len; i++) {
        frame->data[i] += number;
    }
}

static void frame_make_mixed(Frame *frame, uint32_t number)
{
    uint32_t x = number * 2654435761u >> 8;

    switch (x % 16) {
    case 0:
        frame_make(frame, number, 60 + x / 16 % (ETH_HLEN + MTU_MAX - 59));
        break;
    case 1:
        frame_make_long_gso(frame, number);
        break;
    case 2:
    case 3:
        frame_make_jumbo(frame, number);
        break;
    default:
        frame_make(frame, number, 60 + x / 16 % 1455);
        break;
    }
}

/* As the last, but hundreds of them fit in the memory. */
static void frame_make_some_jumbo(Frame *frame, uint32_t number)
{
    (number % 5 ? frame_make_small : frame_make_jumbo)(frame, number);
}

static const struct {
    const char *name;
    FrameMaker *make;
} makers[] = {
    { "small", frame_make_small },
    { "full", frame_make_full },
    { "jumbo", frame_make_jumbo },
    { "gso", frame_make_long_gso },
    { "mixed", frame_make_mixed },
};

static void lab_pass_made(Lab *lab, FrameMaker *make, uint32_t number)
{
    g_autofree Frame *frame = g_new0(Frame, 1);

    make(frame, number);
    lab_pass(lab, frame);
}

/*
 * Capturing
 */

static PacketSocket *capture_new_memory(const Tap *tap, unsigned directions,
                                        size_t memory)
{
    PacketSocket *ps = packet_socket_new_capture(tap->name, tap->index, -1,
                                                 directions, memory, false,
                                                 &error_abort);

    g_assert_nonnull(ps);
    return ps;
}

static PacketSocket *capture_new(const Tap *tap, unsigned directions)
{
    return capture_new_memory(tap, directions, CAPTURE_MEMORY);
}

static PacketSocket *capture_new_hooked(const Tap *tap, unsigned directions)
{
    PacketSocket *ps = capture_new(tap, directions);

    g_assert_true(packet_socket_hook(ps, &error_abort));
    return ps;
}

static ssize_t capture_try(PacketSocket *ps, Frame *frame)
{
    ssize_t ret;

    memset(&frame->hdr, 0x5a, sizeof(frame->hdr));
    ret = packet_socket_recv(ps, &frame->hdr, frame->data,
                             sizeof(frame->data));
    frame->len = ret < 0 ? 0 : ret;
    return ret;
}

/* The next frame, which there is. */
static void capture_next(PacketSocket *ps, Frame *frame)
{
    g_assert_cmpint(capture_try(ps, frame), >, 0);
}

/* What was captured is as it was made.  Returns: its number. */
static uint32_t frame_assert_made(const Frame *got, FrameMaker *make)
{
    g_autofree Frame *frame = g_new0(Frame, 1);

    make(frame, frame_number(got));
    frame_assert_equal(got, frame);
    frame_assert_hdr_equal(got, frame);
    return frame_number(got);
}

static void capture_expect_made(PacketSocket *ps, FrameMaker *make,
                                uint32_t number)
{
    g_autofree Frame *frame = g_new0(Frame, 1);

    capture_next(ps, frame);
    g_assert_cmpuint(frame_assert_made(frame, make), ==, number);
}

static void capture_expect_number(PacketSocket *ps, uint32_t number)
{
    g_autofree Frame *frame = g_new0(Frame, 1);

    capture_next(ps, frame);
    g_assert_cmpuint(frame_number(frame), ==, number);
}

static void capture_expect_none(PacketSocket *ps)
{
    g_autofree Frame *frame = g_new0(Frame, 1);

    g_assert_cmpint(capture_try(ps, frame), ==, -EAGAIN);
}

static void test_capture_outgoing(Tap *tap)
{
    g_autofree Frame *sent = g_new0(Frame, 1), *got = g_new0(Frame, 1);
    PacketSocket *ps;

    ps = capture_new_hooked(tap, PACKET_SOCKET_OUTGOING);
    capture_expect_none(ps);
    for (int i = 0; i < 100; i++) {
        frame_make(sent, i, 60 + i * 14);
        host_send(tap->sender, sent);
        capture_next(ps, got);
        frame_assert_equal(got, sent);
        frame_assert_hdr_equal(got, sent);
        /* The copy is one: the guest gets its own. */
        tap_read(tap, got);
        frame_assert_equal(got, sent);
        capture_expect_none(ps);
    }
    packet_socket_free(ps);
}

/* By the host's own stack, which leaves the checksum to the guest */
static void test_capture_host_stack(Tap *tap)
{
    struct sockaddr_in sin = {
        .sin_family = AF_INET,
        .sin_port = htons(9),
        .sin_addr.s_addr = htonl(INADDR_BROADCAST),
    };
    g_autofree Frame *guest = g_new0(Frame, 1), *got = g_new0(Frame, 1);
    PacketSocket *ps;
    int fd, on = 1;

    tap_set_offload(tap, TUN_F_CSUM);
    set_address(tap->name, "192.0.2.1");
    ps = capture_new_hooked(tap, PACKET_SOCKET_OUTGOING);
    fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    g_assert_cmpint(fd, >=, 0);
    g_assert_cmpint(setsockopt(fd, SOL_SOCKET, SO_BROADCAST, &on, sizeof(on)),
                    ==, 0);
    g_assert_cmpint(setsockopt(fd, SOL_SOCKET, SO_BINDTODEVICE, tap->name,
                               strlen(tap->name)), ==, 0);
    g_assert_cmpint(sendto(fd, "netfilter", 9, 0, (struct sockaddr *)&sin,
                           sizeof(sin)), ==, 9);
    capture_next(ps, got);
    tap_read(tap, guest);
    frame_assert_equal(got, guest);
    frame_assert_hdr_equal(got, guest);
    g_assert_cmpuint(got->len, ==, ETH_HLEN + 20 + 8 + 9);
    g_assert_true(got->hdr.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM);
    g_assert_false(checksum_holds(got));
    g_assert_true(finish_checksum(&got->hdr, got->data,
                                                got->len));
    g_assert_true(checksum_holds(got));
    capture_expect_none(ps);
    packet_socket_free(ps);
    close(fd);
}

/* To whomever the guest sends */
static void test_capture_incoming(Tap *tap)
{
    static const uint8_t to[][6] = {
        { 0x52, 0x54, 0x00, 0x99, 0x99, 0x99 },
        { 0xff, 0xff, 0xff, 0xff, 0xff, 0xff },
        { 0x01, 0x00, 0x5e, 0x00, 0x00, 0xfb },
        { 0 },                  /* the TAP's own */
    };
    g_autofree Frame *sent = g_new0(Frame, 1), *got = g_new0(Frame, 1);
    struct ifreq ifr = {};
    PacketSocket *ps;

    g_strlcpy(ifr.ifr_name, tap->name, IFNAMSIZ);
    g_assert_cmpint(ioctl(control_socket(), SIOCGIFHWADDR, &ifr), ==, 0);
    ps = capture_new_hooked(tap, PACKET_SOCKET_INCOMING);
    for (int i = 0; i < 100; i++) {
        frame_make(sent, i, 60 + i * 14);
        memcpy(sent->data, to[i % 4][0] ? to[i % 4] :
               (uint8_t *)ifr.ifr_hwaddr.sa_data, 6);
        tap_write(tap, sent);
        capture_next(ps, got);
        frame_assert_equal(got, sent);
        frame_assert_hdr_equal(got, sent);
        capture_expect_none(ps);
    }
    packet_socket_free(ps);
}

static void test_capture_directions(Tap *tap)
{
    static const unsigned directions[] = {
        PACKET_SOCKET_OUTGOING, PACKET_SOCKET_INCOMING, BOTH,
    };
    g_autofree Frame *frame = g_new0(Frame, 1);
    PacketSocket *ps[3];

    for (int i = 0; i < 3; i++) {
        ps[i] = capture_new_hooked(tap, directions[i]);
    }
    for (int i = 0; i < 100; i++) {
        frame_make(frame, 2 * i, 60);
        host_send(tap->sender, frame);
        frame_make(frame, 2 * i + 1, 60);
        tap_write(tap, frame);
    }
    for (int i = 0; i < 100; i++) {
        capture_expect_number(ps[0], 2 * i);
        capture_expect_number(ps[1], 2 * i + 1);
        capture_expect_number(ps[2], 2 * i);
        capture_expect_number(ps[2], 2 * i + 1);
    }
    for (int i = 0; i < 3; i++) {
        capture_expect_none(ps[i]);
        packet_socket_free(ps[i]);
    }
}

/* How the kernel lists a packet socket */
static void proc_packet(int fd, unsigned *protocol, unsigned *running)
{
    g_autofree char *text = NULL;
    g_auto(GStrv) lines = NULL;
    struct stat st;

    g_assert_cmpint(fstat(fd, &st), ==, 0);
    g_assert_true(g_file_get_contents("/proc/net/packet", &text, NULL, NULL));
    lines = g_strsplit(text, "\n", -1);
    for (int i = 1; lines[i] && *lines[i]; i++) {
        unsigned long inode;

        g_assert_cmpint(sscanf(lines[i], "%*s %*d %*d %x %*d %u %*u %*u %lu",
                               protocol, running, &inode), ==, 3);
        if (inode == st.st_ino) {
            return;
        }
    }
    g_assert_not_reached();
}

static void test_capture_unhooked(Lab *lab)
{
    unsigned protocol, running;
    PacketSocket *ps;

    ps = capture_new(&lab->tap, lab->way->directions);
    for (int round = 0; round < 10; round++) {
        /* The traffic pays for those that run for every protocol. */
        proc_packet(packet_socket_fd(ps), &protocol, &running);
        g_assert_false(running && protocol == ETH_P_ALL);
        for (int i = 0; i < 20; i++) {
            lab_pass_made(lab, frame_make_some_jumbo, 1000 + i);
        }
        capture_expect_none(ps);
        g_assert_true(packet_socket_hook(ps, &error_abort));
        proc_packet(packet_socket_fd(ps), &protocol, &running);
        g_assert_cmphex(protocol, ==, ETH_P_ALL);
        g_assert_cmpuint(running, ==, 1);
        capture_expect_none(ps);
        lab_pass_made(lab, frame_make_some_jumbo, round);
        capture_expect_made(ps, frame_make_some_jumbo, round);
        capture_expect_none(ps);
        packet_socket_unhook(ps);
    }
    g_assert_cmpuint(packet_socket_drops(ps), ==, 0);
    packet_socket_unhook(ps);
    packet_socket_free(ps);
    packet_socket_free(NULL);
}

static void test_capture_unhook_keeps(Lab *lab)
{
    PacketSocket *ps;

    ps = capture_new_hooked(&lab->tap, lab->way->directions);
    for (int i = 0; i < 300; i++) {
        lab_pass_made(lab, frame_make_some_jumbo, i);
        if (i == 199) {
            packet_socket_unhook(ps);
        }
    }
    for (int i = 0; i < 200; i++) {
        capture_expect_made(ps, frame_make_some_jumbo, i);
        if (i == 99) {
            /* Hooked again, what comes then is behind. */
            g_assert_true(packet_socket_hook(ps, &error_abort));
            lab_pass_made(lab, frame_make_long_gso, 1000);
            lab_pass_made(lab, frame_make_small, 1001);
        }
    }
    capture_expect_made(ps, frame_make_long_gso, 1000);
    capture_expect_made(ps, frame_make_small, 1001);
    capture_expect_none(ps);
    g_assert_cmpuint(packet_socket_drops(ps), ==, 0);
    packet_socket_free(ps);
}

static void test_capture_discard(Lab *lab)
{
    PacketSocket *ps;

    ps = capture_new(&lab->tap, lab->way->directions);
    g_assert_cmpuint(packet_socket_discard(ps, UINT64_MAX), ==, 0);
    for (int n = 0; n < 700; n += 1 + n / 3) {
        g_assert_true(packet_socket_hook(ps, &error_abort));
        for (int i = 0; i < n + 3; i++) {
            lab_pass_made(lab, frame_make_some_jumbo, i);
        }
        capture_expect_made(ps, frame_make_some_jumbo, 0);
        if (n & 1) {
            packet_socket_unhook(ps);
        }
        capture_expect_made(ps, frame_make_some_jumbo, 1);
        g_assert_cmpuint(packet_socket_discard(ps,
                                               packet_socket_max_waiting(ps)),
                         ==, n + 1);
        capture_expect_none(ps);
        g_assert_cmpuint(packet_socket_discard(ps, UINT64_MAX), ==, 0);
        if (!(n & 1)) {
            lab_pass_made(lab, frame_make_mixed, 1000 + n);
            capture_expect_made(ps, frame_make_mixed, 1000 + n);
            packet_socket_unhook(ps);
        }
    }
    g_assert_cmpuint(packet_socket_drops(ps), ==, 0);
    packet_socket_free(ps);
}

typedef struct Flood {
    Tap tap;
    QemuThread thread;
    int count;
    bool stop;
} Flood;

static void *flood(void *opaque)
{
    g_autofree Frame *frame = g_new0(Frame, 1);
    Flood *f = opaque;

    frame_make(frame, 0xf100d, 60);
    while (!qatomic_read(&f->stop)) {
        tap_write(&f->tap, frame);
        host_send(f->tap.sender, frame);
        tap_drain(&f->tap);
        qatomic_inc(&f->count);
    }
    return NULL;
}

static void flood_start(Flood *f)
{
    tap_new(&f->tap);
    f->count = 0;
    f->stop = false;
    qemu_thread_create(&f->thread, "flood", flood, f, QEMU_THREAD_JOINABLE);
}

static void flood_stop(Flood *f)
{
    qatomic_set(&f->stop, true);
    qemu_thread_join(&f->thread);
    tap_delete(&f->tap);
}

/* Let it send a few more. */
static void flood_pass(Flood *f)
{
    int64_t limit = g_get_monotonic_time() + LIMIT_MS * 1000;
    int count = qatomic_read(&f->count);

    while (qatomic_read(&f->count) < count + 2) {
        g_assert_cmpint(g_get_monotonic_time(), <, limit);
        sched_yield();
    }
}

/* Nothing of another interface, not even before the socket is bound */
static void test_capture_foreign(gconstpointer opaque)
{
    const Way *way = opaque;

    g_autofree Frame *frame = g_new0(Frame, 1);
    PacketSocket *ps;
    Flood f;
    Tap tap;

    if (!can_run()) {
        return;
    }
    tap_new(&tap);
    flood_start(&f);
    flood_pass(&f);
    for (int i = 0; i < (g_test_slow() ? 1000 : 100); i++) {
        ps = capture_new(&tap, way->directions);
        capture_expect_none(ps);
        if (i % 4 == 0) {
            flood_pass(&f);
        }
        g_assert_true(packet_socket_hook(ps, &error_abort));
        capture_expect_none(ps);
        if (i % 4 == 1) {
            flood_pass(&f);
            capture_expect_none(ps);
        }
        frame_make(frame, i, 60);
        if (way->directions & PACKET_SOCKET_INCOMING) {
            tap_write(&tap, frame);
        } else {
            host_send(tap.sender, frame);
        }
        capture_expect_number(ps, i);
        packet_socket_unhook(ps);
        if (i % 4 == 2) {
            flood_pass(&f);
        }
        capture_expect_none(ps);
        packet_socket_free(ps);
    }
    flood_stop(&f);
    tap_delete(&tap);
}

static void test_capture_no_interface(Tap *tap)
{
    static const unsigned indexes[] = { 0x7ffffff0, UINT_MAX };
    g_autofree Frame *frame = g_new0(Frame, 1);

    for (int i = 0; i < ARRAY_SIZE(indexes); i++) {
        Error *err = NULL;
        PacketSocket *ps = packet_socket_new_capture("nowhere0", indexes[i], -1,
                                                     BOTH, CAPTURE_MEMORY,
                                                     false, &err);

        if (ps) {
            g_assert_null(err);
            g_assert_false(packet_socket_hook(ps, &err));
            frame_make(frame, i, 60);
            tap_write(tap, frame);
            g_assert_cmpint(capture_try(ps, frame), <, 0);
            packet_socket_free(ps);
        }
        g_assert_nonnull(err);
        g_assert_nonnull(strstr(error_get_pretty(err), "nowhere0"));
        error_free(err);

        err = NULL;
        ps = packet_socket_new_inject("nowhere0", indexes[i], -1, &err);
        g_assert_null(ps);
        g_assert_nonnull(err);
        g_assert_nonnull(strstr(error_get_pretty(err), "nowhere0"));
        error_free(err);
    }
}

typedef struct TagCase {
    uint16_t outer_tpid, outer;
    uint16_t inner_tpid, inner;
} TagCase;

static const TagCase tag_cases[] = {
    { ETH_P_8021Q, 0x6005 },
    { ETH_P_8021Q, 0x0fff },
    { ETH_P_8021Q, 0x1005 },                    /* drop eligible */
    { ETH_P_8021Q, 0xa000 },                    /* priority tag */
    { ETH_P_8021Q, 0x0000 },                    /* the same, lowest */
    { ETH_P_8021AD, 0x4123 },
    { ETH_P_8021AD, 0x4123, ETH_P_8021Q, 0x2456 },
    { ETH_P_8021Q, 0x0007, ETH_P_8021Q, 0x0008 },
};

static void frame_add_tags(Frame *frame, const TagCase *tags)
{
    if (tags->inner_tpid) {
        frame_add_tag(frame, tags->inner_tpid, tags->inner);
    }
    frame_add_tag(frame, tags->outer_tpid, tags->outer);
}

static void test_capture_tags(Tap *tap)
{
    g_autofree Frame *sent = g_new0(Frame, 1), *got = g_new0(Frame, 1);
    PacketSocket *ps;

    set_mtu(tap, 9000);
    ps = capture_new_hooked(tap, BOTH);
    for (int i = 0; i < ARRAY_SIZE(tag_cases); i++) {
        for (int len = 60; len < 9000; len += 1111) {
            frame_make(sent, i, len);
            frame_add_tags(sent, &tag_cases[i]);

            tap_write(tap, sent);
            capture_next(ps, got);
            frame_assert_equal(got, sent);
            frame_assert_hdr_equal(got, sent);

            host_send(tap->sender, sent);
            capture_next(ps, got);
            frame_assert_equal(got, sent);
            frame_assert_hdr_equal(got, sent);
            tap_read(tap, got);
            frame_assert_equal(got, sent);
            capture_expect_none(ps);
        }
    }
    packet_socket_free(ps);
}

/*
 * The offsets in the header count from the start of the tagged frame.  What
 * the guest gets tells whether the kernel left a frame in one piece.
 */
static void capture_expect_like_guest(PacketSocket *ps, Tap *tap,
                                      const Frame *sent)
{
    g_autofree Frame *got = g_new0(Frame, 1), *guest = g_new0(Frame, 1);
    unsigned frames = 0;

    while (tap_try_read(tap, guest)) {
        capture_next(ps, got);
        frame_assert_equal(got, guest);
        frame_assert_hdr_equal(got, guest);
        if (guest->hdr.gso_type) {
            g_assert_cmpuint(got->hdr.hdr_len, >=, got->hdr.csum_start + 20);
            frame_assert_equal(got, sent);
        }
        frames++;
    }
    g_assert_cmpuint(frames, >, 0);
}

static void test_capture_tags_checksum(Lab *lab)
{
    const Way *way = lab->way;
    g_autofree Frame *sent = g_new0(Frame, 1), *got = g_new0(Frame, 1);
    PacketSocket *ps;

    ps = capture_new_hooked(&lab->tap, way->directions);
    for (int i = 0; i < 2 * ARRAY_SIZE(tag_cases); i++) {
        int version = i & 1 ? 6 : 4;

        for (int gso = 0; gso < 2; gso++) {
            if (gso) {
                frame_make_gso(sent, version, 30000);
            } else {
                frame_make_ip(sent, version, IPPROTO_UDP, 100);
            }
            frame_add_tags(sent, &tag_cases[i / 2]);
            if (way->directions == PACKET_SOCKET_OUTGOING) {
                g_assert_true(frame_write(way->bridged ? lab->other.fd :
                                          lab->tap.sender, sent));
                capture_expect_like_guest(ps, &lab->tap, sent);
            } else {
                tap_write(&lab->tap, sent);
                capture_next(ps, got);
                frame_assert_equal(got, sent);
                frame_assert_hdr_equal(got, sent);
                g_assert_true(got->hdr.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM);
                g_assert(!gso ||
                         got->hdr.hdr_len >= got->hdr.csum_start + 20);
            }
            capture_expect_none(ps);
        }
    }
    packet_socket_free(ps);
}

/*
 * About the length of which a frame takes another way: each one, with no tag,
 * one and two, to a buffer that has just the room that it needs.
 */
static void check_lengths(const Way *way, int sender, PacketSocket *ps,
                          Lab *lab, const TagCase *inside,
                          const TagCase *beside)
{
    g_autofree Frame *sent = g_new0(Frame, 1);

    for (int pass = 0; pass < 2; pass++) {
        for (int len = 1500; len <= 1530; len++) {
            size_t size;

            frame_make(sent, len, len);
            if (inside) {
                frame_add_tags(sent, inside);
            }
            if (!pass) {
                if (sender < 0) {
                    lab_pass(lab, sent);
                } else {
                    host_send(sender, sent);
                    tap_drain(&lab->tap);
                }
                lab_pass_made(lab, frame_make_small, len);
                continue;
            }
            if (beside) {
                frame_add_tags(sent, beside);
            }
            size = sent->len + PACKET_SOCKET_TAG_ROOM;
            {
                g_autofree Frame *got = g_malloc0(sizeof(*got));

                memset(got->data, 0x5a, sizeof(got->data));
                got->len = packet_socket_recv(ps, &got->hdr, got->data, size);
                frame_assert_equal(got, sent);
                frame_assert_hdr_equal(got, sent);
                for (size_t i = size; i < size + 100; i++) {
                    g_assert_cmphex(got->data[i], ==, 0x5a);
                }
            }
            capture_expect_made(ps, frame_make_small, len);
        }
    }
    capture_expect_none(ps);
    g_assert_cmpuint(packet_socket_drops(ps), ==, 0);
}

static void test_capture_lengths(Lab *lab)
{
    PacketSocket *ps;

    ps = capture_new_hooked(&lab->tap, lab->way->directions);
    check_lengths(lab->way, -1, ps, lab, NULL, NULL);
    for (int i = 0; i < ARRAY_SIZE(tag_cases); i++) {
        check_lengths(lab->way, -1, ps, lab, &tag_cases[i], NULL);
    }
    packet_socket_free(ps);
}

static bool vlan_add(const char *on, int id, char name[IFNAMSIZ])
{
    struct vlan_ioctl_args args = { .cmd = ADD_VLAN_CMD, .u.VID = id };

    g_strlcpy(args.device1, on, sizeof(args.device1));
    if (ioctl(control_socket(), SIOCSIFVLAN, &args) < 0) {
        return false;
    }
    /* As the kernel names it unless told otherwise */
    if (snprintf(name, IFNAMSIZ, "%s.%d", on, id) >= IFNAMSIZ ||
        !if_nametoindex(name)) {
        g_snprintf(name, IFNAMSIZ, "vlan%d", id);
        g_assert_cmpuint(if_nametoindex(name), >, 0);
    }
    set_up(name, true);
    return true;
}

/*
 * From an interface on top the tag comes beside the frame.  The guest's copy
 * tells how it has to look.
 */
static void test_capture_tags_vlan(void)
{
    struct sockaddr_in sin = {
        .sin_family = AF_INET,
        .sin_port = htons(9),
        .sin_addr.s_addr = htonl(INADDR_BROADCAST),
    };
    g_autofree Frame *sent = g_new0(Frame, 1), *got = g_new0(Frame, 1);
    g_autofree Frame *guest = g_new0(Frame, 1);
    char vlan[2][IFNAMSIZ];
    PacketSocket *ps;
    int sender, fd, on = 1;
    Tap tap;

    if (!can_run()) {
        return;
    }
    tap_new(&tap);
    tap_set_offload(&tap, TUN_F_CSUM);
    if (!vlan_add(tap.name, 5, vlan[0])) {
        g_test_skip("the kernel has no VLAN interfaces");
        tap_delete(&tap);
        return;
    }
    g_assert_true(vlan_add(vlan[0], 6, vlan[1]));
    ps = capture_new_hooked(&tap, PACKET_SOCKET_OUTGOING);

    /* The frame alone, with one tag and with two */
    for (int i = 0; i < 2; i++) {
        sender = sender_new(if_nametoindex(vlan[i]));
        frame_make(sent, i, 200);
        host_send(sender, sent);
        close(sender);
        if (i) {
            frame_add_tag(sent, ETH_P_8021Q, 6);
        }
        frame_add_tag(sent, ETH_P_8021Q, 5);
        tap_read(&tap, guest);
        frame_assert_equal(guest, sent);
        capture_next(ps, got);
        frame_assert_equal(got, sent);
        frame_assert_hdr_equal(got, sent);
    }

    /* By the host's stack, with the checksum left to do */
    set_address(vlan[0], "192.0.2.1");
    fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    g_assert_cmpint(fd, >=, 0);
    g_assert_cmpint(setsockopt(fd, SOL_SOCKET, SO_BROADCAST, &on, sizeof(on)),
                    ==, 0);
    g_assert_cmpint(setsockopt(fd, SOL_SOCKET, SO_BINDTODEVICE, vlan[0],
                               strlen(vlan[0])), ==, 0);
    g_assert_cmpint(sendto(fd, "netfilter", 9, 0, (struct sockaddr *)&sin,
                           sizeof(sin)), ==, 9);
    close(fd);
    tap_read(&tap, guest);
    capture_next(ps, got);
    frame_assert_equal(got, guest);
    frame_assert_hdr_equal(got, guest);
    g_assert_cmphex(lduw_be_p(got->data + 12), ==, ETH_P_8021Q);
    g_assert_true(got->hdr.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM);
    g_assert_cmpuint(got->hdr.csum_start, ==, 14 + 4 + 20);
    capture_expect_none(ps);
    packet_socket_free(ps);
    tap_delete(&tap);
}

/* From interfaces on top, whose tags come beside the frame, or one of two */
static void test_capture_lengths_vlan(void)
{
    static const TagCase tags[] = {
        { ETH_P_8021Q, 5 },
        { ETH_P_8021Q, 5, ETH_P_8021Q, 6 },
    };
    char vlan[2][IFNAMSIZ];
    PacketSocket *ps;
    Lab lab;

    if (!lab_new(&lab, &ways[1])) {
        return;
    }
    if (!vlan_add(lab.tap.name, 5, vlan[0])) {
        g_test_skip("the kernel has no VLAN interfaces");
        lab_free(&lab);
        return;
    }
    g_assert_true(vlan_add(vlan[0], 6, vlan[1]));
    ps = capture_new_hooked(&lab.tap, PACKET_SOCKET_OUTGOING);
    for (int i = 0; i < 2; i++) {
        int sender = sender_new(if_nametoindex(vlan[i]));

        check_lengths(lab.way, sender, ps, &lab, NULL, &tags[i]);
        check_lengths(lab.way, sender, ps, &lab, &tag_cases[0], &tags[i]);
        close(sender);
    }
    packet_socket_free(ps);
    lab_free(&lab);
}

static void test_capture_gso(Lab *lab)
{
    static const size_t payloads[] = { MSS + 1, 30000, 65535 - 60 };
    const Way *way = lab->way;
    g_autofree Frame *sent = g_new0(Frame, 1), *got = g_new0(Frame, 1);
    PacketSocket *ps;

    ps = capture_new_hooked(&lab->tap, way->directions);
    for (int i = 0; i < ARRAY_SIZE(payloads); i++) {
        for (int version = 4; version <= 6; version += 2) {
            frame_make_gso(sent, version, payloads[i]);
            if (way->directions & PACKET_SOCKET_OUTGOING &&
                sent->len > GSO_WHOLE) {
                frame_make_gso(sent, version,
                               payloads[i] - (sent->len - GSO_WHOLE));
            }
            lab_pass(lab, sent);
            capture_next(ps, got);
            frame_assert_equal(got, sent);
            frame_assert_hdr_equal(got, sent);
            g_assert_cmpuint(got->hdr.hdr_len, >=, got->hdr.csum_start + 20);
            capture_expect_none(ps);
        }
    }
    g_assert_cmpuint(packet_socket_drops(ps), ==, 0);
    packet_socket_free(ps);
}

/* It gets a ring stuck. */
static void frame_make_stuck(Frame *frame)
{
    frame_make_ip(frame, 4, IPPROTO_UDP, 60);
    frame->hdr.gso_type = VIRTIO_NET_HDR_GSO_UDP;
    frame->hdr.gso_size = 48;
    frame->hdr.hdr_len = frame->hdr.csum_start + 8;
}

/*
 * Polled edge-triggered, the fd reports each frame, also one that gets the ring
 * stuck, and nothing else.
 */
static void test_capture_poll(gconstpointer way)
{
    struct epoll_event event = { .events = EPOLLIN | EPOLLET };
    g_autofree Frame *frame = g_new0(Frame, 1);
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    PacketSocket *ps;
    Lab lab;

    if (!lab_new(&lab, way)) {
        close(epoll);
        return;
    }
    ps = capture_new_memory(&lab.tap, lab.way->directions, 256 * KiB);
    g_assert_true(packet_socket_hook(ps, &error_abort));
    g_assert_cmpint(epoll_ctl(epoll, EPOLL_CTL_ADD, packet_socket_fd(ps),
                              &event), ==, 0);
    epoll_wait(epoll, &event, 1, 0);
    for (int i = 0; i < 500; i++) {
        g_assert_false(readable(epoll, 0));
        lab_pass_made(&lab, frame_make_small, i);
        g_assert_cmpint(epoll_wait(epoll, &event, 1, LIMIT_MS), ==, 1);
        g_assert_cmphex(event.events, ==, EPOLLIN);
        capture_expect_made(ps, frame_make_small, i);
    }
    g_assert_false(readable(epoll, 0));
    if (lab.way->directions & PACKET_SOCKET_INCOMING) {
        frame_make_stuck(frame);
        tap_write(&lab.tap, frame);
        g_assert_cmpint(epoll_wait(epoll, &event, 1, LIMIT_MS), ==, 1);
    }
    packet_socket_free(ps);
    lab_free(&lab);
    close(epoll);
}

/*
 * A frame that gets a ring stuck costs what comes until that is found out.  If
 * frames are read one by one, that is one, or two if frames came just before.
 */
static void test_capture_stuck(gconstpointer way)
{
    g_autofree Frame *frame = g_new0(Frame, 1);
    unsigned lost = 0, got = 0;
    PacketSocket *ps;
    Lab lab;

    for (int before = 0; before < 3; before++) {
        if (!lab_new(&lab, way)) {
            return;
        }
        ps = capture_new_memory(&lab.tap, lab.way->directions, 256 * KiB);
        g_assert_true(packet_socket_hook(ps, &error_abort));
        for (int i = 0; i < before * 100; i++) {
            lab_pass_made(&lab, frame_make_small, i);
            capture_expect_made(ps, frame_make_small, i);
        }
        frame_make_stuck(frame);
        tap_write(&lab.tap, frame);
        g_assert_cmpint(capture_try(ps, frame), ==, -EAGAIN);
        for (lost = 0, got = 0; got < 100; ) {
            lab_pass_made(&lab, frame_make_small, lost + got);
            if (capture_try(ps, frame) > 0) {
                g_assert_cmpuint(frame_assert_made(frame, frame_make_small),
                                 ==, lost + got);
                got++;
            } else {
                g_assert_cmpuint(got, ==, 0);
                g_assert_cmpuint(++lost, <=, 2);
            }
        }
        g_assert_cmpuint(packet_socket_drops(ps), ==,
                         lab.way->directions & PACKET_SOCKET_INCOMING ?
                         1 + lost : 0);
        packet_socket_free(ps);
        lab_free(&lab);
    }
}

/*
 * Frames of GSO types that struct virtio_net_hdr may not be able to tell any
 * more once the kernel has them: UFO above all.  They themselves may be
 * captured (whole or in segments), refused once each, or counted as drops,
 * but all others must come.
 */
typedef struct GsoType {
    uint8_t type;
    int version;
    uint8_t protocol;
} GsoType;

static const GsoType gso_types[] = {
    { VIRTIO_NET_HDR_GSO_UDP, 4, IPPROTO_UDP },
    { VIRTIO_NET_HDR_GSO_UDP, 6, IPPROTO_UDP },
    { VIRTIO_NET_HDR_GSO_UDP_L4, 4, IPPROTO_UDP },
    { VIRTIO_NET_HDR_GSO_UDP_L4, 6, IPPROTO_UDP },
    { VIRTIO_NET_HDR_GSO_TCPV4 | VIRTIO_NET_HDR_GSO_ECN, 4, IPPROTO_TCP },
    { VIRTIO_NET_HDR_GSO_TCPV6 | VIRTIO_NET_HDR_GSO_ECN, 6, IPPROTO_TCP },
};

static void frame_make_gso_type(Frame *frame, const GsoType *type)
{
    frame_make_ip(frame, type->version, type->protocol, 7777);
    frame->hdr.gso_type = type->type;
    frame->hdr.gso_size = MSS;
    frame->hdr.hdr_len = frame->hdr.csum_start +
                         (type->protocol == IPPROTO_TCP ? 20 : 8);
}

/* Returns: whether the number was @number, or none, of a GSO frame. */
static bool capture_reaches_number(PacketSocket *ps, uint32_t number,
                                   unsigned *refused)
{
    g_autofree Frame *frame = g_new0(Frame, 1);
    ssize_t ret;

    ret = capture_try(ps, frame);
    if (ret == -EINVAL) {
        (*refused)++;
    }
    if (ret == -EAGAIN || ret == -EINVAL) {
        return false;
    }
    g_assert_cmpint(ret, >, 0);
    if (lduw_be_p(frame->data + 12) != ETH_P_TEST) {
        return false;
    }
    g_assert_cmpuint(frame_assert_made(frame, frame_make_mixed), ==, number);
    return true;
}

static void test_capture_gso_types(Lab *lab)
{
    g_autofree Frame *frame = g_new0(Frame, 1);
    unsigned number = 0, passed = 0;
    uint64_t before, drops, discarded;
    PacketSocket *ps;

    /* So little that each place is used many times */
    ps = capture_new_memory(&lab->tap, lab->way->directions, 256 * KiB);
    g_assert_true(packet_socket_hook(ps, &error_abort));
    /* test_capture_stuck() tells what these cost. */
    for (int i = 0; i < 5; i++) {
        frame_make_stuck(frame);
        tap_write(&lab->tap, frame);
        capture_try(ps, frame);
    }
    before = packet_socket_drops(ps);
    for (int i = 0; i < 40 * ARRAY_SIZE(gso_types); i++) {
        unsigned strange = 0, refused = 0, reads = 0;

        for (int j = 0; j < 1 + i % 3; j++) {
            frame_make_gso_type(frame, &gso_types[i % ARRAY_SIZE(gso_types)]);
            strange += lab_try_pass(lab, frame);
        }
        passed += strange;
        while (frame_make_mixed(frame, ++number),
               lduw_be_p(frame->data + 12) != ETH_P_TEST) {
            /* A TCP packet could be taken for one of these. */
        }
        lab_pass(lab, frame);
        while (!capture_reaches_number(ps, number, &refused)) {
            g_assert_cmpuint(reads++, <, 100);
        }
        g_assert_cmpuint(refused, <=, strange);
        capture_expect_none(ps);
    }
    g_assert_cmpuint(passed, >, 0);
    g_assert_cmpuint(packet_socket_drops(ps) - before, <=, passed);

    /* A discard takes them along. */
    drops = packet_socket_drops(ps);
    passed = 0;
    for (int i = 0; i < 3 * ARRAY_SIZE(gso_types); i++) {
        frame_make_gso_type(frame, &gso_types[i % ARRAY_SIZE(gso_types)]);
        passed += lab_try_pass(lab, frame);
        lab_pass_made(lab, frame_make_small, i);
        passed++;
    }
    discarded = packet_socket_discard(ps, UINT64_MAX);
    g_assert_cmpuint(discarded, >=, 3 * ARRAY_SIZE(gso_types));
    if (lab->way->directions == PACKET_SOCKET_INCOMING) {
        /* Where the kernel cuts none */
        g_assert_cmpuint(discarded + packet_socket_drops(ps) - drops, ==,
                         passed);
    }
    capture_expect_none(ps);
    lab_pass_made(lab, frame_make_jumbo, 1);
    capture_expect_made(ps, frame_make_jumbo, 1);
    capture_expect_none(ps);
    packet_socket_free(ps);
}

/* A frame that does not fit is gone; what is behind the buffer is not. */
static void test_capture_too_long(Lab *lab)
{
    static const int lens[] = { 200, 2000 };
    g_autofree Frame *sent = g_new0(Frame, 1), *got = g_new0(Frame, 1);
    PacketSocket *ps;

    ps = capture_new_hooked(&lab->tap, lab->way->directions);
    for (int i = 0; i < 3 * ARRAY_SIZE(lens); i++) {
        int len = lens[i / 3], tags = i % 3;

        for (int size = 1; size < len + 20;
             size += size < len - 20 ? len / 12 : 1) {
            struct virtio_net_hdr hdr;
            ssize_t ret;

            frame_make(sent, 1, len);
            if (tags == 2) {
                frame_add_tag(sent, ETH_P_8021Q, 6);
            }
            if (tags) {
                frame_add_tag(sent, ETH_P_8021AD, 5);
            }
            lab_pass(lab, sent);
            lab_pass_made(lab, frame_make_small, 2);

            memset(got->data, 0x5a, sizeof(got->data));
            ret = packet_socket_recv(ps, &hdr, got->data, size);
            if (ret != -EMSGSIZE) {
                g_assert_cmpint(ret, ==, sent->len);
                g_assert_cmpint(ret, <=, size);
                g_assert(!memcmp(got->data, sent->data, sent->len));
            } else {
                g_assert_cmpuint(size, <,
                                 sent->len + PACKET_SOCKET_TAG_ROOM);
            }
            for (int j = 0; j < 300; j++) {
                g_assert_cmphex(got->data[size + j], ==, 0x5a);
            }
            capture_expect_made(ps, frame_make_small, 2);
            capture_expect_none(ps);
        }
    }
    g_assert_cmpuint(packet_socket_drops(ps), ==, 0);
    packet_socket_free(ps);
}

/*
 * The interface went down or away: the frames that were queued before, and
 * -ENETDOWN once among them.
 */
static void capture_expect_down(PacketSocket *ps, FrameMaker *make,
                                unsigned first, unsigned frames)
{
    g_autofree Frame *frame = g_new0(Frame, 1);
    unsigned got = 0, down = 0;

    while (got < frames || !down) {
        ssize_t ret;

        ret = capture_try(ps, frame);
        if (ret < 0) {
            g_assert_cmpint(ret, ==, -ENETDOWN);
            down++;
        } else {
            g_assert_cmpuint(frame_assert_made(frame, make), ==, first + got);
            got++;
        }
    }
    g_assert_cmpuint(down, ==, 1);
    for (int i = 0; i < 10; i++) {
        capture_expect_none(ps);
    }
}

static void capture_expect_none_or_down(PacketSocket *ps)
{
    g_autofree Frame *frame = g_new0(Frame, 1);

    for (int i = 0; i < 2; i++) {
        ssize_t ret = capture_try(ps, frame);

        g_assert(ret == -ENETDOWN || ret == -EAGAIN);
        if (ret == -ENETDOWN) {
            break;
        }
    }
    capture_expect_none(ps);
}

static void test_capture_down(Lab *lab)
{
    PacketSocket *ps;

    ps = capture_new_hooked(&lab->tap, lab->way->directions);
    for (int i = 0; i < 12; i++) {
        for (int j = 0; j < i; j++) {
            lab_pass_made(lab, frame_make_mixed, 1000 * i + j);
        }
        set_up(lab->tap.name, false);
        capture_expect_down(ps, frame_make_mixed, 1000 * i, i);
        set_up(lab->tap.name, true);
        capture_expect_none(ps);
        lab_pass_made(lab, frame_make_mixed, i);
        capture_expect_made(ps, frame_make_mixed, i);
        capture_expect_none(ps);
    }

    /* Unhooked it may be of no interest. */
    packet_socket_unhook(ps);
    set_up(lab->tap.name, false);
    capture_expect_none_or_down(ps);

    /* Hooked while it is down, it works once it is up. */
    if (packet_socket_hook(ps, NULL)) {
        capture_expect_none_or_down(ps);
        set_up(lab->tap.name, true);
    } else {
        set_up(lab->tap.name, true);
        g_assert_true(packet_socket_hook(ps, &error_abort));
    }
    capture_expect_none(ps);
    lab_pass_made(lab, frame_make_small, 1000);
    capture_expect_made(ps, frame_make_small, 1000);

    /* Down and up in between two reads, too: the error is the only one. */
    for (int i = 0; i < 2; i++) {
        FrameMaker *make = i ? frame_make_jumbo : frame_make_small;

        set_up(lab->tap.name, false);
        set_up(lab->tap.name, true);
        lab_pass_made(lab, make, 1001);
        capture_expect_down(ps, make, 1001, 1);

        /* A discard leaves no frame, and no endless error. */
        lab_pass_made(lab, make, 1002);
        lab_pass_made(lab, make, 1003);
        set_up(lab->tap.name, false);
        g_assert_cmpuint(packet_socket_discard(ps,
                                               packet_socket_max_waiting(ps)),
                         ==, 2);
        capture_expect_none_or_down(ps);
        set_up(lab->tap.name, true);
    }
    g_assert_cmpuint(packet_socket_drops(ps), ==, 0);
    packet_socket_free(ps);
}

static void test_capture_gone(Lab *lab)
{
    PacketSocket *ps, *unhooked;
    Error *err = NULL;
    Lab next;

    ps = capture_new_hooked(&lab->tap, lab->way->directions);
    unhooked = capture_new(&lab->tap, lab->way->directions);
    for (int i = 0; i < 30; i++) {
        lab_pass_made(lab, frame_make_mixed, i);
    }
    tap_delete(&lab->tap);
    capture_expect_down(ps, frame_make_mixed, 0, 30);
    capture_expect_none(unhooked);

    /* Another interface, which may even have the name of the old one */
    g_assert_true(lab_new(&next, lab->way));
    lab_pass_made(&next, frame_make_small, 9);
    capture_expect_none(ps);
    packet_socket_unhook(ps);
    g_assert_false(packet_socket_hook(ps, &err));
    g_assert_nonnull(err);
    g_assert_nonnull(strstr(error_get_pretty(err), lab->tap.name));
    error_free(err);
    err = NULL;
    g_assert_false(packet_socket_hook(unhooked, &err));
    g_assert_nonnull(err);
    error_free(err);
    lab_pass_made(&next, frame_make_small, 9);
    capture_expect_none(ps);
    capture_expect_none(unhooked);
    g_assert_cmpuint(packet_socket_discard(ps, UINT64_MAX), ==, 0);
    g_assert_cmpuint(packet_socket_drops(ps), ==, 0);
    packet_socket_free(ps);
    packet_socket_free(unhooked);
    lab_free(&next);
}

/*
 * Each frame is captured or counted.
 */
typedef struct Flow {
    Lab lab;
    PacketSocket *ps;
    FrameMaker *make;
    uint32_t sent, captured, next;
} Flow;

static void flow_new(Flow *flow, FrameMaker *make, size_t memory)
{
    flow->ps = capture_new_memory(&flow->lab.tap, flow->lab.way->directions,
                                  memory);
    g_assert_true(packet_socket_hook(flow->ps, &error_abort));
    flow->make = make;
    flow->sent = flow->captured = flow->next = 0;
}

static void flow_free(Flow *flow)
{
    packet_socket_free(flow->ps);
    lab_free(&flow->lab);
}

static void flow_pass(Flow *flow)
{
    lab_pass_made(&flow->lab, flow->make, flow->sent++);
}

/* Returns: false when there is none. */
static bool flow_take(Flow *flow)
{
    g_autofree Frame *got = g_new0(Frame, 1);
    ssize_t ret = capture_try(flow->ps, got);
    uint32_t number;

    if (ret < 0) {
        g_assert_cmpint(ret, ==, -EAGAIN);
        return false;
    }
    number = frame_assert_made(got, flow->make);
    g_assert_cmpuint(number, >=, flow->next);
    flow->next = number + 1;
    flow->captured++;
    return true;
}

/* Without a loss since the last frame that was taken */
static void flow_take_next(Flow *flow)
{
    flow->captured++;
    capture_expect_made(flow->ps, flow->make, flow->next++);
}

static void test_capture_drops(gconstpointer opaque)
{
    const Way *way = opaque;

    for (int i = 0; i < ARRAY_SIZE(makers); i++) {
        g_autoptr(GRand) rand = g_rand_new_with_seed(i);
        uint64_t drops, discarded;
        Flow flow;

        if (!lab_new(&flow.lab, way)) {
            return;
        }
        g_test_message("%s", makers[i].name);
        flow_new(&flow, makers[i].make, 512 * KiB);

        /* Without a read, until the queue overflows and well beyond */
        while (packet_socket_drops(flow.ps) < 200) {
            for (int j = 0; j < 100; j++) {
                flow_pass(&flow);
            }
            g_assert_cmpuint(flow.sent, <, 100000);
        }
        drops = packet_socket_drops(flow.ps);
        g_assert_cmpuint(packet_socket_drops(flow.ps), ==, drops);
        while (flow_take(&flow)) {
            /* As many as there are */
        }
        g_assert_cmpuint(flow.captured, >, 0);
        drops = packet_socket_drops(flow.ps);
        g_assert_cmpuint(flow.captured + drops, ==, flow.sent);

        /* It goes on without a gap as soon as there is room. */
        flow.next = flow.sent;
        for (int j = 0; j < 500; j++) {
            flow_pass(&flow);
            flow_take_next(&flow);
        }
        g_assert_cmpuint(packet_socket_drops(flow.ps), ==, drops);

        /* With reads in between, so that the queue is full now and then */
        for (int round = 0; round < (g_test_slow() ? 1000 : 25); round++) {
            for (int j = g_rand_int_range(rand, 0, 100); j; j--) {
                flow_pass(&flow);
            }
            for (int j = g_rand_int_range(rand, 0, 100);
                 j && flow_take(&flow); j--) {
                /* Some of them */
            }
        }
        packet_socket_unhook(flow.ps);
        discarded = packet_socket_discard(flow.ps, UINT64_MAX);
        drops = packet_socket_drops(flow.ps);
        g_assert_cmpuint(flow.captured + discarded + drops, ==, flow.sent);

        /* The count is since the socket was made. */
        g_assert_true(packet_socket_hook(flow.ps, &error_abort));
        flow.next = flow.sent;
        flow_pass(&flow);
        flow_take_next(&flow);
        g_assert_cmpuint(packet_socket_drops(flow.ps), ==, drops);
        flow_free(&flow);
    }
}

/*
 * However frames and reads interleave: all come in order, and none gets lost as
 * long as there is room, all around the memory and many times.
 */
static void test_capture_order(gconstpointer opaque)
{
    const Way *way = opaque;

    for (int i = 0; i < ARRAY_SIZE(makers); i++) {
        /* In the kernel's count a frame takes less than twice its length. */
        const size_t memory = 2 * MiB, room = memory / 16;
        g_autoptr(GRand) rand = g_rand_new_with_seed(i);
        g_autofree Frame *frame = g_new0(Frame, 1);
        size_t waiting = 0;
        Flow flow;

        if (!lab_new(&flow.lab, way)) {
            return;
        }
        g_test_message("%s", makers[i].name);
        flow_new(&flow, makers[i].make, memory);
        while (flow.sent < (g_test_slow() ? 40000 : 1500)) {
            for (int j = g_rand_int_range(rand, 0, 60);
                 j && waiting < room; j--) {
                flow.make(frame, flow.sent++);
                lab_pass(&flow.lab, frame);
                waiting += 2 * frame->len + 1024;
            }
            for (int j = g_rand_int_range(rand, 0, 60);
                 j && flow.next < flow.sent; j--) {
                flow.make(frame, flow.next);
                waiting -= 2 * frame->len + 1024;
                flow_take_next(&flow);
            }
            if (flow.next == flow.sent) {
                capture_expect_none(flow.ps);
            }
        }
        while (flow.next < flow.sent) {
            flow_take_next(&flow);
        }
        capture_expect_none(flow.ps);
        g_assert_cmpuint(packet_socket_drops(flow.ps), ==, 0);
        flow_free(&flow);
    }
}

/* From hardly any memory to much */
static void test_capture_memory(gconstpointer opaque)
{
    static const struct {
        size_t memory;
        unsigned frames;        /* that find room for sure */
    } cases[] = {
        { 0 }, { 1 }, { 2 }, { 3 }, { 100 }, { 4 * KiB, 1 }, { 64 * KiB, 10 },
        { 64 * KiB + 1, 10 }, { 1 * MiB, 70 }, { 64 * MiB, 6000 },
    };
    const Way *way = opaque;

    for (int i = 0; i < ARRAY_SIZE(cases); i++) {
        unsigned frames = cases[i].frames;
        int rounds = frames > 1000 ? 1 : 2;
        Error *err = NULL;
        Flow flow;

        if (!lab_new(&flow.lab, way)) {
            return;
        }
        flow.ps = packet_socket_new_capture(flow.lab.tap.name,
                                            flow.lab.tap.index, -1,
                                            way->directions, cases[i].memory,
                                            false, &err);
        if (!flow.ps) {
            g_test_message("%zu bytes: %s", cases[i].memory,
                           error_get_pretty(err));
            g_assert_false(frames);
            error_free(err);
            lab_free(&flow.lab);
            continue;
        }
        g_assert_null(err);
        packet_socket_free(flow.ps);
        flow_new(&flow, frame_make_small, cases[i].memory);
        for (int round = 0; round < rounds; round++) {
            uint32_t first = flow.captured;

            for (int j = 0; j < frames + 100; j++) {
                flow_pass(&flow);
            }
            flow.next = round ? flow.next : 0;
            while (flow_take(&flow)) {
                /* As many as there are */
            }
            g_assert_cmpuint(flow.captured - first, >=, frames);
            g_assert_cmpuint(flow.captured + packet_socket_drops(flow.ps), ==,
                             flow.sent);
            flow.make = frame_make_some_jumbo;
        }
        flow_free(&flow);
    }
}

/* However frames and reads interleave, the fd tells of each. */
static void test_capture_wakeup(gconstpointer way)
{
    Flow flow;

    if (!lab_new(&flow.lab, way)) {
        return;
    }
    flow_new(&flow, frame_make_some_jumbo, CAPTURE_MEMORY);
    for (int i = 0; i < (g_test_slow() ? 10000 : 1500); i++) {
        for (int j = 0; j < i % 7; j++) {
            flow_pass(&flow);
        }
        for (int j = 0; j < i % 8 && flow.next < flow.sent; j++) {
            flow_take_next(&flow);
        }
    }
    while (flow.next < flow.sent) {
        flow_take_next(&flow);
    }
    capture_expect_none(flow.ps);
    flow_free(&flow);
}

static int64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_REALTIME, &now);
    return now.tv_sec * NANOSECONDS_PER_SECOND + now.tv_nsec;
}

/* Returns when the next frame came, which has this number. */
static int64_t capture_expect_time(PacketSocket *ps, uint32_t number)
{
    struct timespec time;

    capture_expect_made(ps, frame_make_some_jumbo, number);
    time = packet_socket_time(ps);
    return time.tv_sec * NANOSECONDS_PER_SECOND + time.tv_nsec;
}

/* A frame has the time at which it came, whenever it is taken. */
static void test_capture_times(Lab *lab)
{
    enum { FRAMES = 100 };
    int64_t before[FRAMES], after[FRAMES];
    gint64 end = g_get_monotonic_time() + 20 * G_USEC_PER_SEC;
    PacketSocket *ps;
    int64_t passed;

    ps = packet_socket_new_capture(lab->tap.name, lab->tap.index, -1,
                                   lab->way->directions, CAPTURE_MEMORY, true,
                                   &error_abort);
    g_assert_true(packet_socket_hook(ps, &error_abort));
    /* The kernel begins with it in its own time. */
    do {
        g_assert_cmpint(g_get_monotonic_time(), <, end);
        lab_pass_made(lab, frame_make_some_jumbo, 0);
        passed = now_ns();
    } while (capture_expect_time(ps, 0) > passed);

    for (int i = 0; i < FRAMES; i++) {
        before[i] = now_ns();
        lab_pass_made(lab, frame_make_some_jumbo, i);
        after[i] = now_ns();
    }
    for (int i = 0; i < FRAMES; i++) {
        int64_t time = capture_expect_time(ps, i);

        g_assert_cmpint(time, >=, before[i]);
        g_assert_cmpint(time, <=, after[i]);
    }
    packet_socket_free(ps);
}

/*
 * Injecting
 */

static PacketSocket *inject_new(const Tap *tap)
{
    PacketSocket *ps = packet_socket_new_inject(tap->name, tap->index, -1,
                                                &error_abort);

    g_assert_nonnull(ps);
    return ps;
}

static int inject(PacketSocket *ps, const Frame *frame)
{
    PacketSocketFrame f = {
        .hdr = frame->hdr, .data = frame->data, .len = frame->len,
    };
    int ret = packet_socket_send(ps, &f, 1);

    g_assert_cmpint(ret, !=, 0);
    g_assert_cmpint(ret, <=, 1);
    return MIN(ret, 0);
}

static void test_inject_plain(Tap *tap)
{
    g_autofree Frame *sent = g_new0(Frame, 1), *got = g_new0(Frame, 1);
    PacketSocket *ps;

    ps = inject_new(tap);
    for (int len = 60; len <= 1514; len++) {
        frame_make(sent, len, len);
        g_assert_cmpint(inject(ps, sent), ==, 0);
        tap_read(tap, got);
        frame_assert_equal(got, sent);
        frame_assert_hdr_equal(got, sent);
    }
    for (int i = 0; i < ARRAY_SIZE(tag_cases); i++) {
        /* A tag does not count for the MTU. */
        frame_make(sent, i, tag_cases[i].inner_tpid ? 1510 : 1514);
        if (tag_cases[i].outer_tpid == ETH_P_8021AD) {
            sent->len = 1500;
        }
        frame_add_tags(sent, &tag_cases[i]);
        g_assert_cmpint(inject(ps, sent), ==, 0);
        tap_read(tap, got);
        frame_assert_equal(got, sent);
    }
    g_assert_false(tap_try_read(tap, got));
    packet_socket_free(ps);
}

/* A checksum left to do: the guest does it, or else the kernel. */
static void test_inject_checksum(Tap *tap)
{
    g_autofree Frame *sent = g_new0(Frame, 1), *got = g_new0(Frame, 1);
    PacketSocket *ps;

    ps = inject_new(tap);
    for (int version = 4; version <= 6; version += 2) {
        for (int udp = 0; udp < 2; udp++) {
            frame_make_ip(sent, version, udp ? IPPROTO_UDP : IPPROTO_TCP, 333);
            tap_set_offload(tap, TUN_F_CSUM);
            g_assert_cmpint(inject(ps, sent), ==, 0);
            tap_read(tap, got);
            frame_assert_equal(got, sent);
            frame_assert_hdr_equal(got, sent);

            tap_set_offload(tap, 0);
            g_assert_cmpint(inject(ps, sent), ==, 0);
            tap_read(tap, got);
            g_assert_false(got->hdr.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM);
            g_assert_true(checksum_holds(got));
            g_assert_cmpuint(got->len, ==, sent->len);
        }
    }
    packet_socket_free(ps);
}

static void test_inject_gso(Tap *tap)
{
    g_autofree Frame *sent = g_new0(Frame, 1), *got = g_new0(Frame, 1);
    PacketSocket *ps;

    tap_set_offload(tap, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6);
    ps = inject_new(tap);
    for (int version = 4; version <= 6; version += 2) {
        /* With all headers: from 64 KiB on the kernel segments anyway. */
        frame_make_gso(sent, version, 65535 - 14 - 60);
        g_assert_cmpint(inject(ps, sent), ==, 0);
        tap_read(tap, got);
        frame_assert_equal(got, sent);
        frame_assert_hdr_equal(got, sent);
        g_assert_cmpuint(got->hdr.hdr_len, ==, sent->hdr.hdr_len);
        g_assert_false(tap_try_read(tap, got));
    }
    packet_socket_free(ps);
}

/*
 * A GSO frame arrives whole if the guest can take it.  If not it is refused,
 * nothing of it arrives or is captured, and what is sent next arrives.
 */
static void check_inject_gso(PacketSocket *ps, PacketSocket *capture, Tap *tap,
                             const Frame *sent, bool whole)
{
    g_autofree Frame *got = g_new0(Frame, 1), *next = g_new0(Frame, 1);

    g_assert_cmpint(inject(ps, sent), ==, whole ? 0 : -EAGAIN);
    if (whole) {
        tap_read(tap, got);
        frame_assert_equal(got, sent);
        frame_assert_hdr_equal(got, sent);
    }
    frame_make(next, 1, 60);
    g_assert_cmpint(inject(ps, next), ==, 0);
    tap_read(tap, got);
    frame_assert_equal(got, next);
    g_assert_false(tap_try_read(tap, got));
    capture_expect_none(capture);
}

static void test_inject_gso_refused(Tap *tap)
{
    static const unsigned offloads[] = {
        0, TUN_F_CSUM, TUN_F_CSUM | TUN_F_TSO4, TUN_F_CSUM | TUN_F_TSO6,
        TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6,
        TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN,
    };
    g_autofree Frame *sent = g_new0(Frame, 1);
    g_autoptr(GRand) rand = g_rand_new_with_seed(1);
    PacketSocket *ps, *capture;

    ps = inject_new(tap);
    capture = capture_new_hooked(tap, BOTH);
    for (int round = 0; round < 50; round++) {
        unsigned offload = offloads[g_rand_int_range(rand, 0,
                                                     ARRAY_SIZE(offloads))];

        tap_set_offload(tap, offload);
        for (int i = 0; i < 4; i++) {
            bool tcp6 = i & 1, ecn = i & 2;
            unsigned needed = (tcp6 ? TUN_F_TSO6 : TUN_F_TSO4) |
                              (ecn ? TUN_F_TSO_ECN : 0);

            frame_make_gso(sent, tcp6 ? 6 : 4, 5 * MSS);
            sent->hdr.gso_type |= ecn ? VIRTIO_NET_HDR_GSO_ECN : 0;
            check_inject_gso(ps, capture, tap, sent,
                             (offload & needed) == needed);
        }
        frame_make_gso_type(sent, &gso_types[0]);
        check_inject_gso(ps, capture, tap, sent, false);
    }
    /* The longest packet is too long for the kernel to leave it whole. */
    tap_set_offload(tap, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6);
    frame_make_gso(sent, 6, 65535 - 60);
    check_inject_gso(ps, capture, tap, sent, false);
    packet_socket_free(capture);
    packet_socket_free(ps);
}

/* With one tag a frame goes whole, with two it may not. */
static void test_inject_gso_tags(Tap *tap)
{
    g_autofree Frame *sent = g_new0(Frame, 1), *got = g_new0(Frame, 1);
    PacketSocket *ps;

    tap_set_offload(tap, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6);
    ps = inject_new(tap);
    for (int i = 0; i < ARRAY_SIZE(tag_cases); i++) {
        int ret;

        frame_make_gso(sent, 4, 10 * MSS);
        frame_add_tags(sent, &tag_cases[i]);
        ret = inject(ps, sent);
        if (ret) {
            g_assert_cmpint(ret, ==, -EAGAIN);
            g_assert_cmphex(tag_cases[i].inner_tpid, !=, 0);
        } else {
            tap_read(tap, got);
            frame_assert_equal(got, sent);
            frame_assert_hdr_equal(got, sent);
        }
        g_assert_false(tap_try_read(tap, got));
    }
    packet_socket_free(ps);
}

static void test_inject_receives_nothing(void)
{
    g_autofree Frame *frame = g_new0(Frame, 1);
    unsigned protocol, running;
    PacketSocket *ps;
    Flood f;

    if (!can_run()) {
        return;
    }
    flood_start(&f);
    for (int i = 0; i < 20; i++) {
        ps = inject_new(&f.tap);
        proc_packet(packet_socket_fd(ps), &protocol, &running);
        g_assert_cmphex(protocol, ==, 0);
        g_assert_cmpuint(running, ==, 0);
        flood_pass(&f);
        g_assert_false(readable(packet_socket_fd(ps), 0));
        frame_make(frame, i, 60);
        g_assert_cmpint(inject(ps, frame), ==, 0);
        flood_pass(&f);
        g_assert_false(readable(packet_socket_fd(ps), 0));
        packet_socket_free(ps);
    }
    flood_stop(&f);
}

/* A capture beside an injector does not feed itself. */
static void test_inject_not_captured(Tap *tap)
{
    static const unsigned directions[] = {
        PACKET_SOCKET_OUTGOING, PACKET_SOCKET_INCOMING, BOTH,
    };
    g_autofree Frame *frame = g_new0(Frame, 1);
    PacketSocket *ps;

    ps = inject_new(tap);
    for (int i = 0; i < 3; i++) {
        PacketSocket *capture = capture_new_hooked(tap, directions[i]);

        for (int offload = 0; offload < 2; offload++) {
            tap_set_offload(tap, offload ? TUN_F_CSUM | TUN_F_TSO4 |
                                            TUN_F_TSO6 : 0);
            frame_make(frame, 1, 60);
            g_assert_cmpint(inject(ps, frame), ==, 0);
            frame_make_ip(frame, 4, IPPROTO_UDP, 100);
            g_assert_cmpint(inject(ps, frame), ==, 0);
            frame_make_gso(frame, 4, 20000);
            g_assert_cmpint(inject(ps, frame), ==, offload ? 0 : -EAGAIN);
            frame_make_gso(frame, 6, 20000);
            g_assert_cmpint(inject(ps, frame), ==, offload ? 0 : -EAGAIN);
            tap_drain(tap);
            capture_expect_none(capture);
            frame_make(frame, 2, 60);
            host_send(tap->sender, frame);
            tap_write(tap, frame);
            capture_expect_number(capture, 2);
            if (i == 2) {
                capture_expect_number(capture, 2);
            }
            capture_expect_none(capture);
            tap_drain(tap);
        }
        packet_socket_free(capture);
    }
    packet_socket_free(ps);
}

/* What was taken arrives, once and in order; what was not is refused. */
static void test_inject_queue_full(Tap *tap)
{
    g_autofree Frame *frame = g_new0(Frame, 1);
    uint32_t sent = 0, got = 0;
    unsigned refused = 0;
    PacketSocket *ps;

    set_queue_len(tap, 16);
    ps = inject_new(tap);
    for (int round = 0; round < 500; round++) {
        for (int i = 0; i < 1 + round % 37; i++) {
            int ret;

            frame_make(frame, sent, 60 + sent % 1400);
            ret = inject(ps, frame);
            if (ret) {
                g_assert_cmpint(ret, ==, -EAGAIN);
                refused++;
                break;
            }
            sent++;
        }
        for (int i = 0; i < 1 + round % 29; i++) {
            if (!tap_try_read(tap, frame)) {
                g_assert_cmpuint(got, ==, sent);
                break;
            }
            g_assert_cmpuint(frame_number(frame), ==, got);
            g_assert_cmpuint(frame->len, ==, 60 + got % 1400);
            got++;
        }
    }
    while (tap_try_read(tap, frame)) {
        g_assert_cmpuint(frame_number(frame), ==, got);
        got++;
    }
    g_assert_cmpuint(got, ==, sent);
    g_assert_cmpuint(refused, >, 50);
    packet_socket_free(ps);
}

/* The same with frames that the guest takes whole */
static void test_inject_queue_full_gso(Tap *tap)
{
    g_autofree Frame *frame = g_new0(Frame, 1), *got = g_new0(Frame, 1);
    unsigned sent = 0, arrived = 0;
    PacketSocket *ps;
    int ret;

    tap_set_offload(tap, TUN_F_CSUM | TUN_F_TSO4);
    set_queue_len(tap, 16);
    ps = inject_new(tap);
    for (int round = 0; round < 20; round++) {
        /* The id tells one from the other. */
        frame_make_gso(frame, 4, 5000);
        while (stl_be_p(frame->data + 38, sent), !(ret = inject(ps, frame))) {
            sent++;
            g_assert_cmpuint(sent, <, 10000);
        }
        g_assert_cmpint(ret, ==, -EAGAIN);
        while (tap_try_read(tap, got)) {
            g_assert_cmpuint(got->len, ==, frame->len);
            g_assert_cmpuint(ldl_be_p(got->data + 38), ==, arrived);
            arrived++;
        }
    }
    g_assert_cmpuint(arrived, ==, sent);
    packet_socket_free(ps);
}

/*
 * Many frames at a time
 */

#define BATCH_ROOM (PACKET_SOCKET_BATCH + 40)

typedef struct Batch {
    Frame *frames;
    PacketSocketFrame send[BATCH_ROOM];
    size_t n;
} Batch;

static Batch *batch_new(void)
{
    Batch *batch = g_new0(Batch, 1);

    batch->frames = g_new0(Frame, BATCH_ROOM);
    return batch;
}

static void batch_free(Batch *batch)
{
    g_free(batch->frames);
    g_free(batch);
}

G_DEFINE_AUTOPTR_CLEANUP_FUNC(Batch, batch_free)

/* Once the frame is made as it has to be */
static void batch_set(Batch *batch, size_t i)
{
    batch->send[i].hdr = batch->frames[i].hdr;
    batch->send[i].data = batch->frames[i].data;
    batch->send[i].len = batch->frames[i].len;
}

static void batch_make(Batch *batch, FrameMaker *make, uint32_t first,
                       size_t n)
{
    g_assert_cmpuint(n, <=, BATCH_ROOM);
    batch->n = n;
    for (size_t i = 0; i < n; i++) {
        make(&batch->frames[i], first + i);
        batch_set(batch, i);
    }
}

static int batch_inject(const Batch *batch, PacketSocket *ps, size_t from)
{
    int ret = packet_socket_send(ps, batch->send + from, batch->n - from);

    g_assert_cmpint(ret, !=, 0);
    g_assert_cmpint(ret, <=, (int)MIN(batch->n - from, PACKET_SOCKET_BATCH));
    return ret;
}

/* Read frames @from to @to at the TAP. */
static void batch_expect(const Batch *batch, Tap *tap, size_t from, size_t to)
{
    g_autofree Frame *got = g_new0(Frame, 1);

    for (size_t i = from; i < to; i++) {
        tap_read(tap, got);
        frame_assert_equal(got, &batch->frames[i]);
        frame_assert_hdr_equal(got, &batch->frames[i]);
    }
}

static void tap_expect_none(Tap *tap)
{
    g_autofree Frame *got = g_new0(Frame, 1);

    g_assert_false(tap_try_read(tap, got));
}

/* Short ones, those with a checksum left to do, and GSO frames */
static void frame_make_for_guest(Frame *frame, uint32_t number)
{
    switch (number % 5) {
    case 0:
        frame_make_ip(frame, number & 1 ? 4 : 6, IPPROTO_UDP, number % 1400);
        break;
    case 1:
        frame_make_long_gso(frame, number);
        break;
    default:
        frame_make(frame, number, 60 + number * 13 % 1455);
        break;
    }
}

static void test_inject_batch(Tap *tap)
{
    g_autoptr(Batch) batch = batch_new();
    PacketSocket *ps;

    tap_set_offload(tap, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6);
    ps = inject_new(tap);
    for (int n = 1; n <= BATCH_ROOM; n++) {
        int sent = MIN(n, PACKET_SOCKET_BATCH);

        batch_make(batch, frame_make_for_guest, n * 100, n);
        g_assert_cmpint(batch_inject(batch, ps, 0), ==, sent);
        batch_expect(batch, tap, 0, sent);
        tap_expect_none(tap);
        if (sent < n) {
            g_assert_cmpint(batch_inject(batch, ps, sent), ==, n - sent);
            batch_expect(batch, tap, sent, n);
            tap_expect_none(tap);
        }
    }
    packet_socket_free(ps);
}

/* The queue gets full in the middle; what is read makes room for the rest. */
static void test_inject_batch_queue_full(Tap *tap)
{
    static const int lens[] = { 1, 10, 63, 64, 65, 100 };
    g_autofree Frame *got = g_new0(Frame, 1), *expected = g_new0(Frame, 1);
    g_autoptr(Batch) batch = batch_new();
    PacketSocket *ps;

    tap_set_offload(tap, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6);
    ps = inject_new(tap);
    for (int i = 0; i < ARRAY_SIZE(lens); i++) {
        g_autoptr(GRand) rand = g_rand_new_with_seed(i);
        unsigned sent = 0, arrived = 0, partly = 0, refused = 0;

        set_queue_len(tap, lens[i]);
        while (sent < (g_test_slow() ? 20000 : 2000)) {
            int ret;

            batch_make(batch, frame_make_for_guest, sent, 64);
            ret = batch_inject(batch, ps, 0);
            if (ret < 0) {
                g_assert_cmpint(ret, ==, -EAGAIN);
                refused++;
            } else {
                sent += ret;
                if (ret < 64) {
                    /* The next one was the first that did not fit. */
                    g_assert_cmpint(batch_inject(batch, ps, ret), ==, -EAGAIN);
                    partly++;
                }
            }
            for (int j = g_rand_int_range(rand, 0, lens[i] + 2); j; j--) {
                if (!tap_try_read(tap, got)) {
                    g_assert_cmpuint(arrived, ==, sent);
                    break;
                }
                frame_make_for_guest(expected, arrived++);
                frame_assert_equal(got, expected);
                frame_assert_hdr_equal(got, expected);
            }
        }
        while (arrived < sent) {
            tap_read(tap, got);
            frame_make_for_guest(expected, arrived++);
            frame_assert_equal(got, expected);
        }
        tap_expect_none(tap);
        g_assert_cmpuint(partly, >, 0);
        g_assert_cmpuint(refused, >, 0);
    }
    packet_socket_free(ps);
}

static void frame_spoil_header(Frame *frame)
{
    frame->hdr.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
    frame->hdr.csum_start = 0xffff;
}

static void frame_spoil_length(Frame *frame)
{
    frame_make(frame, 0, 1519);
}

static void frame_spoil_runt(Frame *frame)
{
    frame->len = 5;
}

/* What comes before a bad frame goes; the error is about the first. */
static void test_inject_batch_errors(Tap *tap)
{
    static const struct {
        void (*spoil)(Frame *frame);
        int error;
    } cases[] = {
        { frame_spoil_header, -EINVAL },
        { frame_spoil_length, -EMSGSIZE },
        { frame_spoil_runt, -EINVAL },
    };
    static const int places[] = { 0, 1, 7, 31, 62, 63 };
    g_autoptr(Batch) batch = batch_new();
    PacketSocket *ps;

    ps = inject_new(tap);
    for (int i = 0; i < ARRAY_SIZE(cases) * ARRAY_SIZE(places); i++) {
        int kind = i % ARRAY_SIZE(cases);
        int place = places[i / ARRAY_SIZE(cases)];

        batch_make(batch, frame_make_small, i * 100, PACKET_SOCKET_BATCH);
        cases[kind].spoil(&batch->frames[place]);
        batch_set(batch, place);
        if (place < 63) {
            /* Of another kind, which nobody gets to hear of before */
            cases[(kind + 1) % ARRAY_SIZE(cases)].spoil(&batch->frames[63]);
            batch_set(batch, 63);
        }
        if (place) {
            g_assert_cmpint(batch_inject(batch, ps, 0), ==, place);
            batch_expect(batch, tap, 0, place);
        }
        g_assert_cmpint(batch_inject(batch, ps, place), ==, cases[kind].error);
        g_assert_cmpint(batch_inject(batch, ps, place), ==, cases[kind].error);
        tap_expect_none(tap);

        /* Without it the rest goes. */
        if (place < 62) {
            g_assert_cmpint(batch_inject(batch, ps, place + 1), ==,
                            62 - place);
            batch_expect(batch, tap, place + 1, 63);
        }
        tap_expect_none(tap);
    }

    /* Down in between, and all of it once it is up */
    batch_make(batch, frame_make_small, 0, BATCH_ROOM);
    g_assert_cmpint(batch_inject(batch, ps, 0), ==, PACKET_SOCKET_BATCH);
    set_up(tap->name, false);
    for (int i = 0; i < 3; i++) {
        g_assert_cmpint(batch_inject(batch, ps, PACKET_SOCKET_BATCH), ==,
                        -EAGAIN);
    }
    tap_drain(tap);
    set_up(tap->name, true);
    g_assert_cmpint(batch_inject(batch, ps, PACKET_SOCKET_BATCH), ==,
                    BATCH_ROOM - PACKET_SOCKET_BATCH);
    batch_expect(batch, tap, PACKET_SOCKET_BATCH, BATCH_ROOM);
    tap_expect_none(tap);
    packet_socket_free(ps);
}

/* What comes before a GSO frame that is refused goes, and so does the rest. */
static void test_inject_batch_gso_refused(Tap *tap)
{
    static const int places[] = { 0, 1, 31, 62, 63 };
    g_autoptr(Batch) batch = batch_new();
    PacketSocket *ps;

    ps = inject_new(tap);
    for (int i = 0; i < ARRAY_SIZE(places); i++) {
        int place = places[i], rest = PACKET_SOCKET_BATCH - place - 1;

        batch_make(batch, frame_make_small, i * 100, PACKET_SOCKET_BATCH);
        frame_make_gso(&batch->frames[place], i & 1 ? 4 : 6, 5 * MSS);
        batch_set(batch, place);
        if (place) {
            g_assert_cmpint(batch_inject(batch, ps, 0), ==, place);
            batch_expect(batch, tap, 0, place);
        }
        g_assert_cmpint(batch_inject(batch, ps, place), ==, -EAGAIN);
        tap_expect_none(tap);
        if (rest) {
            g_assert_cmpint(batch_inject(batch, ps, place + 1), ==, rest);
            batch_expect(batch, tap, place + 1, PACKET_SOCKET_BATCH);
        }
        tap_expect_none(tap);
    }
    packet_socket_free(ps);
}

/* Down, and up again */
static void check_inject_down(PacketSocket *ps, Tap *tap)
{
    g_autofree Frame *frame = g_new0(Frame, 1), *got = g_new0(Frame, 1);

    for (int i = 0; i < 4; i++) {
        set_up(tap->name, false);
        frame_make(frame, i, 60);
        if (i) {
            g_assert_cmpint(inject(ps, frame), ==, -EAGAIN);
            g_assert_cmpint(inject(ps, frame), ==, -EAGAIN);
            frame_make_gso(frame, 4, 20000);
            g_assert_cmpint(inject(ps, frame), ==, -EAGAIN);
        }
        set_up(tap->name, true);
        frame_make(frame, i, 60);
        /* A passed socket with a protocol tells once more that it was down. */
        g_assert_true(inject(ps, frame) == 0 || inject(ps, frame) == 0);
        tap_read(tap, got);
        frame_assert_equal(got, frame);
    }
}

static void test_inject_errors(void)
{
    g_autofree Frame *frame = g_new0(Frame, 1), *got = g_new0(Frame, 1);
    PacketSocket *ps;
    int ret;
    Tap tap;

    if (!can_run()) {
        return;
    }
    tap_new(&tap);
    ps = inject_new(&tap);

    /* Bad headers */
    frame_make_ip(frame, 4, IPPROTO_UDP, 100);
    frame->hdr.csum_start = frame->len;
    g_assert_cmpint(inject(ps, frame), ==, -EINVAL);
    frame_make_ip(frame, 4, IPPROTO_UDP, 100);
    frame->hdr.csum_start = 0xffff;
    g_assert_cmpint(inject(ps, frame), ==, -EINVAL);
    frame_make_ip(frame, 4, IPPROTO_UDP, 100);
    frame->hdr.csum_offset = frame->len - frame->hdr.csum_start - 1;
    g_assert_cmpint(inject(ps, frame), ==, -EINVAL);
    frame_make_gso(frame, 4, 20000);
    frame->hdr.gso_type = 0x7e;
    g_assert_cmpint(inject(ps, frame), ==, -EINVAL);
    frame_make_gso(frame, 4, 20000);
    frame->hdr.gso_size = 0;
    g_assert_cmpint(inject(ps, frame), ==, -EINVAL);
    frame_make_gso(frame, 4, 2000);
    frame->hdr.hdr_len = frame->len + 1;
    g_assert_cmpint(inject(ps, frame), ==, -EINVAL);

    /* No frame at all */
    for (int len = 0; len < ETH_HLEN; len++) {
        frame_make(frame, 0, 60);
        frame->len = len;
        ret = inject(ps, frame);
        g_assert_cmpint(ret, <, 0);
        g_assert_cmpint(ret, !=, -EAGAIN);
    }

    /* Longer than the MTU allows */
    for (size_t len = 1515; len < 70000; len = len * 2 + 1) {
        if (len == 1515) {
            len = 1519;         /* with a tag it could be 1518 */
        }
        frame_make(frame, 0, MIN(len, FRAME_MAX));
        g_assert_cmpint(inject(ps, frame), ==, -EMSGSIZE);
    }
    g_assert_false(tap_try_read(&tap, got));

    check_inject_down(ps, &tap);

    /* Gone */
    tap_delete(&tap);
    for (int i = 0; i < 3; i++) {
        ret = inject(ps, frame);
        g_assert(ret == -ENXIO || ret == -ENODEV);
    }
    packet_socket_free(ps);
}

/*
 * Checksums
 */

static void test_checksum(void)
{
    g_autofree Frame *frame = g_new0(Frame, 1), *was = g_new0(Frame, 1);

    for (int version = 4; version <= 6; version += 2) {
        for (int udp = 0; udp < 2; udp++) {
            for (int payload = 0; payload < 1400; payload += 1 + payload / 9) {
                uint16_t field;

                frame_make_ip(frame, version,
                              udp ? IPPROTO_UDP : IPPROTO_TCP, payload);
                *was = *frame;
                g_assert_false(checksum_holds(frame));
                g_assert_true(finish_checksum(&frame->hdr,
                                                            frame->data,
                                                            frame->len));
                g_assert_cmphex(frame->hdr.flags, ==, 0);
                g_assert_true(checksum_holds(frame));

                /* Nothing else has changed. */
                field = was->hdr.csum_start + was->hdr.csum_offset;
                memcpy(was->data + field, frame->data + field, 2);
                frame_assert_equal(frame, was);

                /* Done is done. */
                g_assert_true(finish_checksum(&frame->hdr,
                                                            frame->data,
                                                            frame->len));
                frame_assert_equal(frame, was);
            }
        }
    }
}

/* Behind a tag, and with other flags that stay */
static void test_checksum_tag(void)
{
    g_autofree Frame *frame = g_new0(Frame, 1), *plain = g_new0(Frame, 1);

    frame_make_ip(frame, 4, IPPROTO_TCP, 101);
    frame_make_ip(plain, 4, IPPROTO_TCP, 101);
    frame_add_tag(frame, ETH_P_8021Q, 5);
    frame->hdr.flags |= VIRTIO_NET_HDR_F_DATA_VALID;
    g_assert_true(finish_checksum(&frame->hdr, frame->data,
                                                frame->len));
    g_assert_cmphex(frame->hdr.flags, ==, VIRTIO_NET_HDR_F_DATA_VALID);
    memcpy(plain->data + ETH_HLEN, frame->data + ETH_HLEN + 4,
           plain->len - ETH_HLEN);
    g_assert_true(checksum_holds(plain));
}

/* A sum of 0 would mean none to UDP. */
static void test_checksum_udp_zero(void)
{
    g_autofree Frame *frame = g_new0(Frame, 1);

    for (int version = 4; version <= 6; version += 2) {
        uint8_t *l4;
        uint16_t sum;

        frame_make_ip(frame, version, IPPROTO_UDP, 10);
        l4 = frame->data + frame->hdr.csum_start;
        stw_be_p(l4 + 8, 0);
        sum = sum_bytes(l4, 18);
        stw_be_p(l4 + 8, 0xffff - sum);
        g_assert_cmphex(sum_bytes(l4, 18), ==, 0xffff);
        g_assert_true(finish_checksum(&frame->hdr, frame->data,
                                                    frame->len));
        g_assert_cmphex(lduw_be_p(l4 + 6), ==, 0xffff);
        g_assert_true(checksum_holds(frame));
    }
}

static void check_outside(size_t len, uint16_t start, uint16_t offset)
{
    struct virtio_net_hdr hdr = {
        .flags = VIRTIO_NET_HDR_F_NEEDS_CSUM,
        .csum_start = start,
        .csum_offset = offset,
    };
    g_autofree uint8_t *data = g_malloc0(len);
    bool inside = start + offset + 2 <= len;

    g_assert_true(finish_checksum(&hdr, data, len) == inside);
    if (!inside) {
        for (int i = 0; i < len; i++) {
            g_assert_cmphex(data[i], ==, 0);
        }
    }
}

static void test_checksum_outside(void)
{
    g_autofree Frame *frame = g_new0(Frame, 1);

    /* At the end of its own memory, so that a write behind it shows */
    for (int len = 0; len < 40; len++) {
        for (int start = 0; start < 45; start++) {
            for (int offset = 0; offset < 45; offset++) {
                check_outside(len, start, offset);
            }
        }
    }
    check_outside(60, 0xffff, 0xffff);
    check_outside(60, 0xffff, 1);
    check_outside(60, 1, 0xffff);
    check_outside(60, 0x8000, 0x8000);

    /* Nothing to do: the frame is not looked at. */
    frame_make(frame, 0, 60);
    frame->hdr.csum_start = 0xffff;
    g_assert_true(finish_checksum(&frame->hdr, frame->data,
                                                frame->len));
}

/*
 * Errors
 */

static unsigned count_fds(void)
{
    g_autoptr(GDir) dir = g_dir_open("/proc/self/fd", 0, NULL);
    unsigned fds = 0;

    g_assert_nonnull(dir);
    while (g_dir_read_name(dir)) {
        fds++;
    }
    return fds;
}

static bool drop_capabilities(uint64_t which)
{
    struct __user_cap_header_struct head = {
        .version = _LINUX_CAPABILITY_VERSION_3,
    };
    struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3];

    if (syscall(SYS_capget, &head, data) < 0) {
        return false;
    }
    for (int i = 0; i < ARRAY_SIZE(data); i++) {
        data[i].effective &= ~(uint32_t)(which >> 32 * i);
        data[i].permitted &= ~(uint32_t)(which >> 32 * i);
    }
    return syscall(SYS_capset, &head, data) == 0;
}

/* Says on stderr what the user would read. */
static void test_errors_capability_subprocess(Tap *tap)
{
    Error *capture_err = NULL, *inject_err = NULL;
    unsigned fds;

    g_assert_true(drop_capabilities(1ull << CAP_NET_RAW));
    fds = count_fds();
    g_assert_null(packet_socket_new_capture(tap->name, tap->index, -1, BOTH,
                                            CAPTURE_MEMORY, false,
                                            &capture_err));
    g_assert_null(packet_socket_new_inject(tap->name, tap->index, -1,
                                           &inject_err));
    g_assert_cmpuint(count_fds(), ==, fds);
    g_assert_nonnull(strstr(error_get_pretty(capture_err), tap->name));
    g_assert_nonnull(strstr(error_get_pretty(inject_err), tap->name));
    error_reportf_err(capture_err, "capture: ");
    error_reportf_err(inject_err, "inject: ");
}

static void test_errors_capability(void)
{
    if (!can_run()) {
        return;
    }
    g_test_trap_subprocess("/packet-socket/errors/capability/subprocess", 0,
                           0);
    g_test_trap_assert_passed();
    g_test_trap_assert_stderr("*capture: *CAP_NET_RAW*"
                              "inject: *CAP_NET_RAW*");
}

static size_t address_space(void)
{
    g_autofree char *text = NULL;

    g_assert_true(g_file_get_contents("/proc/self/statm", &text, NULL, NULL));
    return g_ascii_strtoull(text, NULL, 10) * qemu_real_host_page_size();
}

static void test_errors_leak(Tap *tap)
{
    g_autofree Frame *frame = g_new0(Frame, 1);
    unsigned fds;
    size_t before;

    frame_make(frame, 0, 60);
    fds = count_fds();
    before = address_space();
    /* Each close waits for the kernel's RCU. */
    for (int i = 0; i < (g_test_slow() ? 1000 : 100); i++) {
        PacketSocket *ps = capture_new(tap, 1 + i % BOTH), *injector;

        if (i & 1) {
            g_assert_true(packet_socket_hook(ps, &error_abort));
            tap_write(tap, frame);
            host_send(tap->sender, frame);
            tap_drain(tap);
        }
        if (i & 2) {
            packet_socket_unhook(ps);
        }
        packet_socket_free(ps);
        injector = inject_new(tap);
        packet_socket_free(injector);
        injector = packet_socket_new_inject(tap->name, tap->index + 100000, -1,
                                            NULL);
        g_assert_null(injector);
    }
    g_assert_cmpuint(count_fds(), ==, fds);
    g_assert_cmpuint(address_space(), <, before + 16 * MiB);
}

/*
 * Sockets that somebody else opened
 */

static void set_option(int fd, int level, int option, int value)
{
    g_assert_cmpint(setsockopt(fd, level, option, &value, sizeof(value)),
                    ==, 0);
}

static int get_option(int fd, int level, int option)
{
    int value = 0;
    socklen_t size = sizeof(value);

    g_assert_cmpint(getsockopt(fd, level, option, &value, &size), ==, 0);
    return value;
}

static int set_filter(int fd, uint32_t len)
{
    struct sock_filter code = BPF_STMT(BPF_RET | BPF_K, len);
    struct sock_fprog prog = { .len = 1, .filter = &code };

    return setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &prog, sizeof(prog));
}

/* It gets all frames of all interfaces, and has got some of @flood. */
static int others_new(Flood *flood)
{
    int fd = socket(AF_PACKET, SOCK_RAW, htons(ETH_P_ALL));

    g_assert_cmpint(fd, >=, 0);
    flood_pass(flood);
    g_assert_true(readable(fd, LIMIT_MS));
    return fd;
}

/* Whatever can be set that would be in the way */
static void others_spoil(int fd)
{
    set_option(fd, SOL_PACKET, PACKET_VERSION, TPACKET_V3);
    set_option(fd, SOL_PACKET, PACKET_RESERVE, 8192);
    set_option(fd, SOL_PACKET, PACKET_IGNORE_OUTGOING, 1);
    set_option(fd, SOL_PACKET, PACKET_TIMESTAMP, SOF_TIMESTAMPING_SOFTWARE);
    set_option(fd, SOL_PACKET, PACKET_ORIGDEV, 1);
    set_option(fd, SOL_SOCKET, SO_TIMESTAMP, 1);
    set_option(fd, SOL_SOCKET, SO_TIMESTAMPING,
               SOF_TIMESTAMPING_SOFTWARE | SOF_TIMESTAMPING_RX_SOFTWARE);
    set_option(fd, SOL_SOCKET, SO_RXQ_OVFL, 1);
    g_assert_cmpint(set_filter(fd, 0), ==, 0);
}

static PacketSocket *capture_passed(const Tap *tap, int fd,
                                    unsigned directions)
{
    PacketSocket *ps = packet_socket_new_capture(tap->name, tap->index, fd,
                                                 directions, CAPTURE_MEMORY,
                                                 false, &error_abort);

    g_assert_nonnull(ps);
    return ps;
}

static PacketSocket *inject_passed(const Tap *tap, int fd)
{
    PacketSocket *ps = packet_socket_new_inject(tap->name, tap->index, fd,
                                                &error_abort);

    g_assert_nonnull(ps);
    return ps;
}

/* As one that we opened, and with nothing of what was there before */
static void test_passed_capture(Lab *lab)
{
    g_autofree Frame *sent = g_new0(Frame, 1), *got = g_new0(Frame, 1);
    unsigned protocol, running;
    PacketSocket *ps;
    Flood flood;
    int fd;

    flood_start(&flood);
    for (int round = 0; round < (g_test_slow() ? 100 : 10); round++) {
        fd = others_new(&flood);
        if (round & 1) {
            others_spoil(fd);
        }
        ps = capture_passed(&lab->tap, fd, lab->way->directions);
        g_assert_cmpint(packet_socket_fd(ps), ==, fd);
        capture_expect_none(ps);
        g_assert_cmpuint(packet_socket_drops(ps), ==, 0);
        proc_packet(fd, &protocol, &running);
        g_assert_false(running && protocol == ETH_P_ALL);
        lab_pass_made(lab, frame_make_small, 1000);
        capture_expect_none(ps);
        g_assert_true(fcntl(fd, F_GETFD) & FD_CLOEXEC);
        g_assert_true(fcntl(fd, F_GETFL) & O_NONBLOCK);

        g_assert_true(packet_socket_hook(ps, &error_abort));
        for (int i = 0; i < 50; i++) {
            lab_pass_made(lab, frame_make_mixed, i);
            capture_expect_made(ps, frame_make_mixed, i);
            frame_make(sent, i, 60 + 30 * i);
            frame_add_tag(sent, ETH_P_8021Q, i);
            lab_pass(lab, sent);
            capture_next(ps, got);
            frame_assert_equal(got, sent);
        }
        packet_socket_unhook(ps);
        capture_expect_none(ps);
        packet_socket_free(ps);
    }
    flood_stop(&flood);
}

static void test_passed_inject(Tap *tap)
{
    g_autofree Frame *sent = g_new0(Frame, 1), *got = g_new0(Frame, 1);
    PacketSocket *ps, *capture;
    unsigned protocol, running;
    Flood flood;
    int fd;

    flood_start(&flood);
    capture = capture_new_hooked(tap, BOTH);
    for (int round = 0; round < 10; round++) {
        fd = others_new(&flood);
        if (round & 1) {
            others_spoil(fd);
        }
        ps = inject_passed(tap, fd);
        proc_packet(fd, &protocol, &running);
        g_assert_false(running && protocol == ETH_P_ALL);
        for (int i = 0; i < 20; i++) {
            frame_make(sent, i, 60 + 70 * i);
            g_assert_cmpint(inject(ps, sent), ==, 0);
            tap_read(tap, got);
            frame_assert_equal(got, sent);
        }
        frame_make_gso(sent, 4, 5000);
        g_assert_cmpint(inject(ps, sent), ==, -EAGAIN);
        capture_expect_none(capture);
        /* And it gets nothing. */
        host_send(tap->sender, sent);
        tap_write(tap, sent);
        tap_drain(tap);
        g_assert_false(readable(fd, 0));
        check_inject_down(ps, tap);
        packet_socket_discard(capture, UINT64_MAX);
        packet_socket_free(ps);
    }
    packet_socket_free(capture);
    flood_stop(&flood);
}

/* Nobody else who has the socket can have it get more. */
static void test_passed_locked(Tap *tap)
{
    PacketSocket *ps;

    for (int i = 0; i < 2; i++) {
        int fd = socket(AF_PACKET, SOCK_RAW, 0);

        ps = i ? inject_passed(tap, fd) : capture_passed(tap, fd, BOTH);
        g_assert_cmpint(get_option(fd, SOL_SOCKET, SO_LOCK_FILTER), ==, 1);
        g_assert_cmpint(set_filter(fd, UINT32_MAX), ==, -1);
        g_assert_cmpint(errno, ==, EPERM);
        g_assert_cmpint(setsockopt(fd, SOL_SOCKET, SO_DETACH_FILTER, &i,
                                   sizeof(i)), ==, -1);
        g_assert_cmpint(errno, ==, EPERM);
        packet_socket_free(ps);
    }
}

/*
 * Whoever passed a socket may have kept a duplicate.  It is off the interface
 * and empty once we are done, and of use for others.
 */
static void test_passed_free(Lab *lab)
{
    g_autofree Frame *got = g_new0(Frame, 1);
    struct sockaddr_ll addr = {
        .sll_family = AF_PACKET,
        .sll_protocol = htons(ETH_P_ALL),
    };
    unsigned protocol, running;
    PacketSocket *ps;

    addr.sll_ifindex = lab->tap.index;
    for (int waiting = 0; waiting < 30; waiting += 10) {
        int fd = socket(AF_PACKET, SOCK_RAW, 0), kept = dup(fd);
        struct iovec iov[] = {
            { &got->hdr, sizeof(got->hdr) },
            { got->data, sizeof(got->data) },
        };

        ps = capture_passed(&lab->tap, fd, lab->way->directions);
        g_assert_true(packet_socket_hook(ps, &error_abort));
        for (int i = 0; i < waiting; i++) {
            lab_pass_made(lab, frame_make_some_jumbo, i);
        }
        packet_socket_free(ps);
        g_assert_cmpint(fcntl(fd, F_GETFD), ==, -1);

        proc_packet(kept, &protocol, &running);
        g_assert_false(running && protocol == ETH_P_ALL);
        lab_pass_made(lab, frame_make_small, 1000);
        g_assert_false(readable(kept, 0));
        /* With a ring the kernel would not allow it. */
        set_option(kept, SOL_PACKET, PACKET_VERSION, TPACKET_V1);

        g_assert_cmpint(bind(kept, (struct sockaddr *)&addr, sizeof(addr)),
                        ==, 0);
        lab_pass_made(lab, frame_make_small, 2000);
        g_assert_true(readable(kept, LIMIT_MS));
        got->len = readv(kept, iov, ARRAY_SIZE(iov)) - sizeof(got->hdr);
        g_assert_cmpuint(frame_assert_made(got, frame_make_small), ==, 2000);
        g_assert_false(readable(kept, 0));
        close(kept);
    }
}

/* It stays the caller's, and is closed here. */
static void expect_passed_error(const Tap *tap, int fd, bool injects,
                                size_t memory, const char *text)
{
    Error *err = NULL;
    bool open = fcntl(fd, F_GETFD) >= 0;
    PacketSocket *ps = injects ?
        packet_socket_new_inject(tap->name, tap->index, fd, &err) :
        packet_socket_new_capture(tap->name, tap->index, fd,
                                  PACKET_SOCKET_OUTGOING, memory, false, &err);

    g_assert_null(ps);
    g_assert_nonnull(strstr(error_get_pretty(err), text));
    error_free(err);
    g_assert_true((fcntl(fd, F_GETFD) >= 0) == open);
    close(fd);
}

static void test_passed_errors(Tap *tap)
{
    Tap other;
    unsigned fds;
    int fd;

    tap_new(&other);
    fds = count_fds();
    for (int injects = 0; injects < 2; injects++) {
        struct tpacket_req req = {
            .tp_block_size = 65536,
            .tp_block_nr = 1,
            .tp_frame_size = 2048,
            .tp_frame_nr = 32,
        };

        fd = open("/dev/null", O_RDWR);
        expect_passed_error(tap, fd, injects, CAPTURE_MEMORY,
                            "is not a packet socket");
        expect_passed_error(tap, 1000, injects, CAPTURE_MEMORY,
                            "is not a packet socket");
        fd = socket(AF_UNIX, SOCK_DGRAM, 0);
        expect_passed_error(tap, fd, injects, CAPTURE_MEMORY,
                            "is not a packet socket");
        fd = socket(AF_PACKET, SOCK_DGRAM, 0);
        expect_passed_error(tap, fd, injects, CAPTURE_MEMORY, "SOCK_RAW");
        expect_passed_error(tap, sender_new(other.index), injects,
                            CAPTURE_MEMORY, "bound to another interface");
        fd = socket(AF_PACKET, SOCK_RAW, 0);
        set_option(fd, SOL_SOCKET, SO_LOCK_FILTER, 1);
        expect_passed_error(tap, fd, injects, CAPTURE_MEMORY, "locked");
        fd = socket(AF_PACKET, SOCK_RAW, 0);
        g_assert_cmpint(setsockopt(fd, SOL_PACKET, PACKET_RX_RING,
                                   &req, sizeof(req)), ==, 0);
        expect_passed_error(tap, fd, injects, CAPTURE_MEMORY, "has a ring");
        g_assert_cmpuint(count_fds(), ==, fds);
    }
    /* What is found out late: the kernel has no such ring. */
    fd = socket(AF_PACKET, SOCK_RAW, 0);
    expect_passed_error(tap, fd, false, SIZE_MAX / 64,
                        "could not get a ring");
    /* One that was refused is as it was. */
    fd = sender_new(other.index);
    expect_passed_error(tap, dup(fd), false, CAPTURE_MEMORY,
                        "bound to another interface");
    packet_socket_free(capture_passed(&other, fd, BOTH));
    g_assert_cmpuint(count_fds(), ==, fds);
    tap_delete(&other);
}

/* Whoever opened it has done all that takes a privilege. */
static void test_passed_no_privilege_subprocess(void)
{
    g_autofree Frame *frame = g_new0(Frame, 1), *got = g_new0(Frame, 1);
    int capture_fd, inject_fd, large;
    PacketSocket *capture, *injector;
    Tap tap;

    if (!can_run()) {
        return;
    }
    tap_new(&tap);
    capture_fd = socket(AF_PACKET, SOCK_RAW, 0);
    set_option(capture_fd, SOL_SOCKET, SO_RCVBUFFORCE, CAPTURE_MEMORY);
    large = get_option(capture_fd, SOL_SOCKET, SO_RCVBUF);
    inject_fd = socket(AF_PACKET, SOCK_RAW, 0);
    g_assert_true(drop_capabilities(UINT64_MAX));

    capture = capture_passed(&tap, capture_fd, BOTH);
    g_assert_cmpint(get_option(capture_fd, SOL_SOCKET, SO_RCVBUF), ==, large);
    injector = inject_passed(&tap, inject_fd);
    for (int i = 0; i < 3; i++) {
        g_assert_true(packet_socket_hook(capture, &error_abort));
        frame_make(frame, i, 100);
        g_assert_cmpint(inject(injector, frame), ==, 0);
        tap_read(&tap, got);
        frame_assert_equal(got, frame);
        host_send(tap.sender, frame);
        capture_next(capture, got);
        frame_assert_equal(got, frame);
        tap_drain(&tap);
        packet_socket_unhook(capture);
    }
    packet_socket_free(capture);
    packet_socket_free(injector);
}

static void test_passed_no_privilege(void)
{
    if (!can_run()) {
        return;
    }
    g_test_trap_subprocess("/packet-socket/passed/no-privilege/subprocess", 0,
                           0);
    g_test_trap_assert_passed();
}

static void run_tap_test(gconstpointer func)
{
    Tap tap;

    if (can_run()) {
        tap_new(&tap);
        ((void (*)(Tap *tap))func)(&tap);
        tap_delete(&tap);
    }
}

typedef struct LabTest {
    const Way *way;
    void (*func)(Lab *lab);
} LabTest;

static void run_lab_test(gconstpointer data)
{
    const LabTest *test = data;
    Lab lab;

    if (lab_new(&lab, test->way)) {
        test->func(&lab);
        lab_free(&lab);
    }
}

/*
 * A test for each way, or for those to one TAP alone; either @func, or @in_lab
 * with a laboratory
 */
static void add_ways_of(const char *name, bool bridged, GTestDataFunc func,
                        void (*in_lab)(Lab *lab))
{
    for (int i = 0; i < ARRAY_SIZE(ways); i++) {
        g_autofree char *path = g_strdup_printf("/packet-socket/%s/%s", name,
                                                ways[i].name);

        if (!bridged && ways[i].bridged) {
            continue;
        }
        if (in_lab) {
            LabTest *test = g_new(LabTest, 1);

            *test = (LabTest) { .way = &ways[i], .func = in_lab };
            g_test_add_data_func_full(path, test, run_lab_test, g_free);
        } else {
            g_test_add_data_func(path, &ways[i], func);
        }
    }
}

static void add_ways(const char *name, bool bridged, GTestDataFunc func)
{
    add_ways_of(name, bridged, func, NULL);
}

static void add_lab_ways(const char *name, bool bridged,
                         void (*func)(Lab *lab))
{
    add_ways_of(name, bridged, NULL, func);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    enter_namespace();

#define TEST(name, func) g_test_add_func("/packet-socket/" name, func)
#define TAP_TEST(name, func) \
    g_test_add_data_func("/packet-socket/" name, func, run_tap_test)
    TAP_TEST("capture/outgoing", test_capture_outgoing);
    TAP_TEST("capture/host-stack", test_capture_host_stack);
    TAP_TEST("capture/incoming", test_capture_incoming);
    TAP_TEST("capture/directions", test_capture_directions);
    add_lab_ways("capture/unhooked", true, test_capture_unhooked);
    add_lab_ways("capture/unhook-keeps", true, test_capture_unhook_keeps);
    add_lab_ways("capture/discard", true, test_capture_discard);
    add_ways("capture/foreign", false, test_capture_foreign);
    TAP_TEST("capture/no-interface", test_capture_no_interface);
    TAP_TEST("capture/tags/in-frame", test_capture_tags);
    add_lab_ways("capture/tags/checksum", true, test_capture_tags_checksum);
    add_lab_ways("capture/lengths", true, test_capture_lengths);
    TEST("capture/lengths/vlan-interface", test_capture_lengths_vlan);
    TEST("capture/tags/vlan-interface", test_capture_tags_vlan);
    add_lab_ways("capture/gso", true, test_capture_gso);
    add_ways("capture/poll", false, test_capture_poll);
    add_ways("capture/stuck", false, test_capture_stuck);
    add_lab_ways("capture/gso-types", true, test_capture_gso_types);
    add_lab_ways("capture/too-long", true, test_capture_too_long);
    add_lab_ways("capture/down", true, test_capture_down);
    add_lab_ways("capture/gone", true, test_capture_gone);
    add_ways("capture/drops", true, test_capture_drops);
    add_ways("capture/order", true, test_capture_order);
    add_ways("capture/memory", true, test_capture_memory);
    add_ways("capture/wakeup", true, test_capture_wakeup);
    add_lab_ways("capture/times", true, test_capture_times);
    TAP_TEST("inject/plain", test_inject_plain);
    TAP_TEST("inject/checksum", test_inject_checksum);
    TAP_TEST("inject/gso", test_inject_gso);
    TAP_TEST("inject/gso-refused", test_inject_gso_refused);
    TAP_TEST("inject/gso-tags", test_inject_gso_tags);
    TEST("inject/receives-nothing", test_inject_receives_nothing);
    TAP_TEST("inject/not-captured", test_inject_not_captured);
    TAP_TEST("inject/queue-full/plain", test_inject_queue_full);
    TAP_TEST("inject/queue-full/gso", test_inject_queue_full_gso);
    TAP_TEST("inject/batch/order", test_inject_batch);
    TAP_TEST("inject/batch/queue-full", test_inject_batch_queue_full);
    TAP_TEST("inject/batch/errors", test_inject_batch_errors);
    TAP_TEST("inject/batch/gso-refused", test_inject_batch_gso_refused);
    TEST("inject/errors", test_inject_errors);
    TEST("checksum/tcp-udp", test_checksum);
    TEST("checksum/tag", test_checksum_tag);
    TEST("checksum/udp-zero", test_checksum_udp_zero);
    TEST("checksum/outside", test_checksum_outside);
    TEST("errors/capability", test_errors_capability);
    TAP_TEST("errors/capability/subprocess", test_errors_capability_subprocess);
    TAP_TEST("errors/leak", test_errors_leak);
    add_lab_ways("passed/capture", true, test_passed_capture);
    add_lab_ways("passed/free", true, test_passed_free);
    TAP_TEST("passed/inject", test_passed_inject);
    TAP_TEST("passed/locked", test_passed_locked);
    TAP_TEST("passed/errors", test_passed_errors);
    TEST("passed/no-privilege", test_passed_no_privilege);
    TEST("passed/no-privilege/subprocess",
         test_passed_no_privilege_subprocess);
    return g_test_run();
}
