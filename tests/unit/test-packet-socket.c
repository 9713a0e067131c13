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
#include "../../net/packet-int.h"
#include <sched.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include <linux/net_tstamp.h>

#define CAPTURE_MEMORY (24 * MiB)
#define BOTH (PACKET_SOCKET_OUTGOING | PACKET_SOCKET_INCOMING)

/* The largest of a TAP */
#define MTU_MAX (65535 - ETH_HLEN)

#define MSS 1000

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

/* The error is about @text. */
static void expect_error(Error **err, const char *text)
{
    g_assert_nonnull(*err);
    g_assert_nonnull(strstr(error_get_pretty(*err), text));
    error_free_or_abort(err);
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

typedef struct Tags {
    uint16_t outer_tpid, outer;
    uint16_t inner_tpid, inner;
} Tags;

static const Tags all_tags[] = {
    { },
    { ETH_P_8021Q, 0x6005 },
    { ETH_P_8021Q, 0x0fff },
    { ETH_P_8021Q, 0x1005 },                    /* drop eligible */
    { ETH_P_8021Q, 0xa000 },                    /* priority tag */
    { ETH_P_8021Q, 0x0000 },                    /* the same, lowest */
    { ETH_P_8021AD, 0x4123 },
    { ETH_P_8021AD, 0x4123, ETH_P_8021Q, 0x2456 },
    { ETH_P_8021Q, 0x0007, ETH_P_8021Q, 0x0008 },
};

static void frame_add_tags(Frame *frame, const Tags *tags)
{
    if (tags->inner_tpid) {
        frame_add_tag(frame, tags->inner_tpid, tags->inner);
    }
    if (tags->outer_tpid) {
        frame_add_tag(frame, tags->outer_tpid, tags->outer);
    }
}

/* Of the headers, what means something; some kernels fill hdr_len always. */
static void frame_assert_equal(const Frame *a, const Frame *b)
{
    g_assert_cmpmem(a->data, a->len, b->data, b->len);
    g_assert_cmphex(a->hdr.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM, ==,
                    b->hdr.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM);
    if (a->hdr.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM) {
        g_assert_cmpuint(a->hdr.csum_start, ==, b->hdr.csum_start);
        g_assert_cmpuint(a->hdr.csum_offset, ==, b->hdr.csum_offset);
    }
    g_assert_cmphex(a->hdr.gso_type, ==, b->hdr.gso_type);
    if (a->hdr.gso_type) {
        g_assert_cmpuint(a->hdr.gso_size, ==, b->hdr.gso_size);
    }
}

/*
 * A TCP or UDP packet of IPv4 or IPv6 with @payload bytes of data, whose
 * checksum is left to do: the field has the sum of the pseudo header.
 */
static void frame_make_ip(Frame *frame, int version, uint8_t protocol,
                          size_t payload)
{
    static const uint8_t ip4[20] = {
        0x45, [6] = 0x40, [8] = 64, [12] = 192, 0, 2, 1, [16] = 192, 0, 2, 2,
    };
    static const uint8_t ip6[40] = {
        0x60, [7] = 64, [8] = 0x20, 0x01, 0x0d, 0xb8, [23] = 1,
        [24] = 0x20, 0x01, 0x0d, 0xb8, [39] = 2,
    };
    /* Of UDP the ports are the same. */
    static const uint8_t tcp[20] = {
        4, 210, 16, 225, 1, 2, 3, 4, [12] = 0x50, 0x10, 3, 232,
    };
    size_t ip_len = version == 4 ? 20 : 40;
    size_t l4_len = protocol == IPPROTO_TCP ? 20 : 8;
    size_t rest = l4_len + payload;
    uint8_t *ip = frame->data + ETH_HLEN, *l4 = ip + ip_len;

    frame_make(frame, 0, ETH_HLEN + ip_len + rest);
    stw_be_p(frame->data + 12, version == 4 ? ETH_P_IP : ETH_P_IPV6);
    memcpy(ip, version == 4 ? ip4 : ip6, ip_len);
    memcpy(l4, tcp, l4_len);
    if (version == 4) {
        stw_be_p(ip + 2, ip_len + rest);
        ip[9] = protocol;
        stw_be_p(ip + 10, ~sum_bytes(ip, ip_len));
    } else {
        stw_be_p(ip + 4, rest);
        ip[6] = protocol;
    }
    if (protocol == IPPROTO_UDP) {
        stw_be_p(l4 + 4, rest);
    }
    frame->hdr.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
    frame->hdr.csum_start = ETH_HLEN + ip_len;
    frame->hdr.csum_offset = protocol == IPPROTO_TCP ? 16 : 6;
    stw_be_p(l4 + frame->hdr.csum_offset, sum_pseudo(ip, rest, protocol));
}

static void frame_make_gso(Frame *frame, int version, size_t payload)
{
    frame_make_ip(frame, version, IPPROTO_TCP, payload);
    frame->hdr.gso_type = version == 4 ? VIRTIO_NET_HDR_GSO_TCPV4 :
                                         VIRTIO_NET_HDR_GSO_TCPV6;
    frame->hdr.gso_size = MSS;
    frame->hdr.hdr_len = frame->hdr.csum_start + 20;
}

/* It gets a ring stuck. */
static void frame_make_stuck(Frame *frame)
{
    frame_make_ip(frame, 4, IPPROTO_UDP, 60);
    frame->hdr.gso_type = VIRTIO_NET_HDR_GSO_UDP;
    frame->hdr.gso_size = 48;
    frame->hdr.hdr_len = frame->hdr.csum_start + 8;
}

/* Frames whose lengths and contents follow from their number */
typedef void FrameMaker(Frame *frame, uint32_t number);

static void make_small(Frame *frame, uint32_t number)
{
    frame_make(frame, number, 60 + number % 40);
}

static void make_jumbo(Frame *frame, uint32_t number)
{
    frame_make(frame, number, 1600 + number * 37 % 7400);
}

static void make_long_gso(Frame *frame, uint32_t number)
{
    frame_make_gso(frame, 4, 2000 + number * 7919 % 63000);
    stl_be_p(frame->data + 38, number);
    for (size_t i = ETH_HLEN + 40; i < frame->len; i++) {
        frame->data[i] += number;
    }
}

static void make_mixed(Frame *frame, uint32_t number)
{
    uint32_t x = number * 2654435761u >> 8;

    switch (x % 16) {
    case 0:
        frame_make(frame, number, 60 + x / 16 % (ETH_HLEN + MTU_MAX - 59));
        break;
    case 1:
        make_long_gso(frame, number);
        break;
    case 2:
    case 3:
        make_jumbo(frame, number);
        break;
    default:
        frame_make(frame, number, 60 + x / 16 % 1455);
        break;
    }
}

/* Each fifth is long; hundreds fit in the memory. */
static void make_some_jumbo(Frame *frame, uint32_t number)
{
    (number % 5 ? make_small : make_jumbo)(frame, number);
}

/* Short ones, those with a checksum left to do, and GSO frames */
static void make_for_guest(Frame *frame, uint32_t number)
{
    switch (number % 5) {
    case 0:
        frame_make_ip(frame, number & 1 ? 4 : 6, IPPROTO_UDP, number % 1400);
        break;
    case 1:
        make_long_gso(frame, number);
        break;
    default:
        frame_make(frame, number, 60 + number * 13 % 1455);
        break;
    }
}

static const struct {
    const char *name;
    FrameMaker *make;
} makers[] = {
    { "small", make_small },
    { "jumbo", make_jumbo },
    { "gso", make_long_gso },
    { "mixed", make_mixed },
};

/* What was got is as it was made.  Returns: its number. */
static uint32_t frame_assert_made(const Frame *got, FrameMaker *make)
{
    g_autofree Frame *frame = g_new0(Frame, 1);

    make(frame, frame_number(got));
    frame_assert_equal(got, frame);
    return frame_number(got);
}

/* Returns: frames @first to @first + @n - 1 */
static Frame *frames_make(FrameMaker *make, uint32_t first, size_t n)
{
    Frame *frames = g_new0(Frame, n);

    for (size_t i = 0; i < n; i++) {
        make(&frames[i], first + i);
    }
    return frames;
}

/*
 * The two ends of what goes through the TAP
 */

static void host_send(const Tap *tap, const Frame *frame)
{
    /* A full queue of the TAP is nothing to a capture, which comes before. */
    g_assert(frame_write(tap->sender, frame) || errno == ENOBUFS);
}

static void tap_expect(Tap *tap, const Frame *frame)
{
    g_autofree Frame *got = g_new0(Frame, 1);

    tap_read(tap, got);
    frame_assert_equal(got, frame);
}

static void tap_expect_none(Tap *tap)
{
    g_autofree Frame *got = g_new0(Frame, 1);

    g_assert_false(tap_try_read(tap, got));
}

/*
 * Read up to @max frames, which are made by @make and numbered from @first on.
 * Returns: how many there were.
 */
static unsigned tap_read_made(Tap *tap, FrameMaker *make, uint32_t first,
                              unsigned max)
{
    g_autofree Frame *got = g_new0(Frame, 1);
    unsigned n = 0;

    while (n < max && tap_try_read(tap, got)) {
        g_autofree Frame *frame = frames_make(make, first + n, 1);

        frame_assert_equal(got, frame);
        n++;
    }
    return n;
}

static void tap_expect_made(Tap *tap, FrameMaker *make, uint32_t first,
                            unsigned n)
{
    g_assert_cmpuint(tap_read_made(tap, make, first, UINT_MAX), ==, n);
}

/*
 * Capturing
 */

static PacketSocket *capture_new(const Tap *tap, int fd, unsigned directions)
{
    return packet_socket_new_capture(tap->name, tap->index, fd, directions,
                                     CAPTURE_MEMORY, false, &error_abort);
}

static PacketSocket *capture_new_hooked(const Tap *tap, unsigned directions)
{
    PacketSocket *ps = capture_new(tap, -1, directions);

    packet_socket_hook(ps, &error_abort);
    return ps;
}

static ssize_t capture_try(PacketSocket *ps, Frame *frame)
{
    ssize_t ret;

    memset(&frame->hdr, 0x5a, sizeof(frame->hdr));
    ret = packet_socket_recv(ps, &frame->hdr, frame->data,
                             sizeof(frame->data));
    frame->len = MAX(ret, 0);
    return ret;
}

static void capture_expect_frame(PacketSocket *ps, const Frame *frame)
{
    g_autofree Frame *got = g_new0(Frame, 1);

    g_assert_cmpint(capture_try(ps, got), >, 0);
    frame_assert_equal(got, frame);
    if (got->hdr.gso_type) {
        g_assert_cmpuint(got->hdr.hdr_len, >=, got->hdr.csum_start + 20);
    }
}

static void capture_expect(PacketSocket *ps, FrameMaker *make, uint32_t number)
{
    g_autofree Frame *got = g_new0(Frame, 1);

    g_assert_cmpint(capture_try(ps, got), >, 0);
    g_assert_cmpuint(frame_assert_made(got, make), ==, number);
}

static void capture_expect_none(PacketSocket *ps)
{
    g_autofree Frame *frame = g_new0(Frame, 1);

    g_assert_cmpint(capture_try(ps, frame), ==, -EAGAIN);
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
    Tap tap;                    /* it takes any frame in one piece */
    Tap other;
    char bridge[IFNAMSIZ];
    PacketSocket *ps;           /* it captures on @tap */
    unsigned passed;
} Lab;

/* Capture anew, with so much memory. */
static PacketSocket *lab_capture(Lab *lab, size_t memory)
{
    packet_socket_free(lab->ps);
    lab->ps = packet_socket_new_capture(lab->tap.name, lab->tap.index, -1,
                                        lab->way->directions, memory, false,
                                        &error_abort);
    packet_socket_hook(lab->ps, &error_abort);
    return lab->ps;
}

static bool lab_new(Lab *lab, const Way *way)
{
    *lab = (Lab) { .way = way, .other.fd = -1 };
    if (!can_run()) {
        return false;
    }
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
    lab_capture(lab, CAPTURE_MEMORY);
    return true;
}

static void lab_free(Lab *lab)
{
    packet_socket_free(lab->ps);
    tap_delete(&lab->tap);
    tap_delete(&lab->other);
    if (lab->way->bridged) {
        bridge_delete(lab->bridge);
    }
}

/* Returns: false if the kernel does not take this frame. */
static bool lab_write(Lab *lab, const Frame *frame)
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
    return true;
}

static void lab_pass_frame(Lab *lab, const Frame *frame)
{
    g_assert_true(lab_write(lab, frame));
    tap_drain(&lab->tap);
}

static void lab_pass(Lab *lab, FrameMaker *make, uint32_t number)
{
    g_autofree Frame *frame = frames_make(make, number, 1);

    lab_pass_frame(lab, frame);
}

/* A frame that passes now is captured, and nothing else. */
static void lab_check(Lab *lab, PacketSocket *ps, FrameMaker *make,
                      uint32_t number)
{
    lab_pass(lab, make, number);
    capture_expect(ps, make, number);
    capture_expect_none(ps);
}

/* A frame goes to the captures of its direction, and to the guest as well. */
static void test_capture_directions(Tap *tap)
{
    static const uint8_t to[][ETH_ALEN] = {
        { 0x52, 0x54, 0x00, 0x99, 0x99, 0x99 },
        { 0xff, 0xff, 0xff, 0xff, 0xff, 0xff },
        { 0x01, 0x00, 0x5e, 0x00, 0x00, 0xfb },
    };
    g_autofree Frame *frame = g_new0(Frame, 1);
    PacketSocket *ps[BOTH + 1];

    for (unsigned directions = 1; directions <= BOTH; directions++) {
        ps[directions] = capture_new_hooked(tap, directions);
    }
    for (int i = 0; i < 100; i++) {
        frame_make(frame, i, 60 + i * 14);
        host_send(tap, frame);
        capture_expect_frame(ps[PACKET_SOCKET_OUTGOING], frame);
        capture_expect_frame(ps[BOTH], frame);
        tap_expect(tap, frame);

        memcpy(frame->data, to[i % ARRAY_SIZE(to)], ETH_ALEN);
        tap_write(tap, frame);
        capture_expect_frame(ps[PACKET_SOCKET_INCOMING], frame);
        capture_expect_frame(ps[BOTH], frame);
        for (unsigned directions = 1; directions <= BOTH; directions++) {
            capture_expect_none(ps[directions]);
        }
    }
    for (unsigned directions = 1; directions <= BOTH; directions++) {
        packet_socket_free(ps[directions]);
    }
}

/* Returns: the protocol for which the kernel runs the socket, or 0 for none */
static unsigned running_protocol(int fd)
{
    g_autofree char *text = NULL;
    g_auto(GStrv) lines = NULL;
    struct stat st;

    g_assert_cmpint(fstat(fd, &st), ==, 0);
    g_assert_true(g_file_get_contents("/proc/net/packet", &text, NULL, NULL));
    lines = g_strsplit(text, "\n", -1);
    for (int i = 1; lines[i] && *lines[i]; i++) {
        unsigned protocol, running;
        unsigned long inode;

        g_assert_cmpint(sscanf(lines[i], "%*s %*d %*d %x %*d %u %*u %*u %lu",
                               &protocol, &running, &inode), ==, 3);
        if (inode == st.st_ino) {
            return running ? protocol : 0;
        }
    }
    g_assert_not_reached();
}

static void test_capture_unhooked(Lab *lab)
{
    PacketSocket *ps = capture_new(&lab->tap, -1, lab->way->directions);
    int fd = packet_socket_fd(ps);

    for (int round = 0; round < 10; round++) {
        /* The traffic pays for those that run for every protocol. */
        g_assert_cmphex(running_protocol(fd), !=, ETH_P_ALL);
        for (int i = 0; i < 20; i++) {
            lab_pass(lab, make_some_jumbo, 1000 + i);
        }
        capture_expect_none(ps);
        packet_socket_hook(ps, &error_abort);
        g_assert_cmphex(running_protocol(fd), ==, ETH_P_ALL);
        capture_expect_none(ps);
        lab_check(lab, ps, make_some_jumbo, round);
        packet_socket_unhook(ps);
    }
    packet_socket_unhook(ps);
    g_assert_cmpuint(packet_socket_drops(ps), ==, 0);
    packet_socket_free(ps);
}

static void test_capture_discard(Lab *lab)
{
    PacketSocket *ps = lab->ps;

    g_assert_cmpuint(packet_socket_discard(ps), ==, 0);
    for (int n = 0; n < 700; n += 1 + n / 3) {
        bool unhook = n & 1;

        packet_socket_hook(ps, &error_abort);
        for (int i = 0; i < n + 3; i++) {
            lab_pass(lab, make_some_jumbo, i);
        }
        capture_expect(ps, make_some_jumbo, 0);
        if (unhook) {
            packet_socket_unhook(ps);
        }
        capture_expect(ps, make_some_jumbo, 1);
        g_assert_cmpuint(packet_socket_discard(ps), ==, n + 1);
        capture_expect_none(ps);
        g_assert_cmpuint(packet_socket_discard(ps), ==, 0);
        if (!unhook) {
            lab_check(lab, ps, make_mixed, 1000 + n);
        }
    }
    g_assert_cmpuint(packet_socket_drops(ps), ==, 0);
}

/* Traffic of another interface */
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
        host_send(&f->tap, frame);
        tap_drain(&f->tap);
        qatomic_inc(&f->count);
    }
    return NULL;
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

static void flood_start(Flood *f)
{
    *f = (Flood) { };
    tap_new(&f->tap);
    qemu_thread_create(&f->thread, "flood", flood, f, QEMU_THREAD_JOINABLE);
    flood_pass(f);
}

static void flood_stop(Flood *f)
{
    qatomic_set(&f->stop, true);
    qemu_thread_join(&f->thread);
    tap_delete(&f->tap);
}

/* Nothing of another interface, not even before the socket is bound */
static void test_capture_foreign(Lab *lab)
{
    Flood f;

    flood_start(&f);
    for (int i = 0; i < (g_test_slow() ? 300 : 100); i++) {
        PacketSocket *ps = capture_new(&lab->tap, -1, lab->way->directions);

        flood_pass(&f);
        capture_expect_none(ps);
        packet_socket_hook(ps, &error_abort);
        flood_pass(&f);
        lab_check(lab, ps, make_small, i);
        packet_socket_unhook(ps);
        flood_pass(&f);
        capture_expect_none(ps);
        packet_socket_free(ps);
    }
    flood_stop(&f);
}

/* What the guest gets tells whether the kernel left a frame in one piece. */
static void test_capture_tags_checksum(Lab *lab)
{
    g_autofree Frame *sent = g_new0(Frame, 1), *guest = g_new0(Frame, 1);

    for (int i = 0; i < 4 * ARRAY_SIZE(all_tags); i++) {
        int version = i & 1 ? 6 : 4;
        unsigned to_guest = 0;

        if (i & 2) {
            frame_make_gso(sent, version, 30000);
        } else {
            frame_make_ip(sent, version, IPPROTO_UDP, 100);
        }
        frame_add_tags(sent, &all_tags[i / 4]);
        g_assert_true(lab_write(lab, sent));
        while (tap_try_read(&lab->tap, guest)) {
            capture_expect_frame(lab->ps, guest);
            if (guest->hdr.gso_type) {
                frame_assert_equal(guest, sent);
            }
            to_guest++;
        }
        if (!to_guest) {
            capture_expect_frame(lab->ps, sent);
        }
        capture_expect_none(lab->ps);
    }
}

/*
 * Frames of many lengths, and of each one about that of which they take another
 * way, with all tags, to a buffer that has just the room that is needed.
 */
static void test_capture_lengths(Lab *lab)
{
    g_autofree Frame *frame = g_new0(Frame, 1), *got = g_new0(Frame, 1);

    for (int len = 60; len < 9000; len += len < 1500 || len > 1530 ? 720 : 1) {
        for (int i = 0; i < ARRAY_SIZE(all_tags); i++) {
            size_t size;

            frame_make(frame, len, len);
            frame_add_tags(frame, &all_tags[i]);
            lab_pass_frame(lab, frame);

            size = frame->len + PACKET_SOCKET_TAG_ROOM;
            memset(got->data, 0x5a, sizeof(got->data));
            got->len = packet_socket_recv(lab->ps, &got->hdr, got->data, size);
            frame_assert_equal(got, frame);
            for (int j = 0; j < 100; j++) {
                g_assert_cmphex(got->data[size + j], ==, 0x5a);
            }
            capture_expect_none(lab->ps);
        }
    }
    g_assert_cmpuint(packet_socket_drops(lab->ps), ==, 0);
}

/*
 * Polled edge-triggered, the fd reports each frame, also one that gets the ring
 * stuck, and nothing else.
 */
static void test_capture_poll(Lab *lab)
{
    struct epoll_event event = { .events = EPOLLIN | EPOLLET };
    PacketSocket *ps = lab_capture(lab, 256 * KiB);
    int epoll = epoll_create1(EPOLL_CLOEXEC);

    g_assert_cmpint(epoll_ctl(epoll, EPOLL_CTL_ADD, packet_socket_fd(ps),
                              &event), ==, 0);
    epoll_wait(epoll, &event, 1, 0);
    for (int i = 0; i < 500; i++) {
        g_assert_false(readable(epoll, 0));
        lab_pass(lab, make_small, i);
        g_assert_cmpint(epoll_wait(epoll, &event, 1, LIMIT_MS), ==, 1);
        g_assert_cmphex(event.events, ==, EPOLLIN);
        capture_expect(ps, make_small, i);
    }
    g_assert_false(readable(epoll, 0));
    if (lab->way->directions & PACKET_SOCKET_INCOMING) {
        g_autofree Frame *frame = g_new0(Frame, 1);

        frame_make_stuck(frame);
        tap_write(&lab->tap, frame);
        g_assert_cmpint(epoll_wait(epoll, &event, 1, LIMIT_MS), ==, 1);
    }
    close(epoll);
}

/*
 * A frame that gets a ring stuck costs what comes until that is found out.  If
 * frames are read one by one, that is one, or two if frames came just before.
 */
static void test_capture_stuck(Lab *lab)
{
    bool incoming = lab->way->directions & PACKET_SOCKET_INCOMING;
    g_autofree Frame *frame = g_new0(Frame, 1);

    for (int before = 0; before < 300; before += 100) {
        PacketSocket *ps = lab_capture(lab, 256 * KiB);
        unsigned lost = 0, got = 0;

        for (int i = 0; i < before; i++) {
            lab_pass(lab, make_small, i);
            capture_expect(ps, make_small, i);
        }
        frame_make_stuck(frame);
        tap_write(&lab->tap, frame);
        capture_expect_none(ps);
        while (got < 100) {
            lab_pass(lab, make_small, lost + got);
            if (capture_try(ps, frame) > 0) {
                g_assert_cmpuint(frame_assert_made(frame, make_small), ==,
                                 lost + got);
                got++;
            } else {
                g_assert_cmpuint(got, ==, 0);
                g_assert_cmpuint(++lost, <=, 2);
            }
        }
        g_assert_cmpuint(packet_socket_drops(ps), ==, incoming ? 1 + lost : 0);

        /* Who has a copy of a passed socket can make it blocking. */
        g_unix_set_fd_nonblocking(packet_socket_fd(ps), false, NULL);
        alarm(LIMIT_MS / 1000);
        capture_expect_none(ps);
        alarm(0);
    }
}

/*
 * Frames of GSO types that struct virtio_net_hdr may not be able to tell any
 * more once the kernel has them: UFO above all.  They themselves may be
 * captured (whole or in segments), refused once each, or counted as drops,
 * but all others must come.
 */
static const struct {
    uint8_t type;
    int version;
    uint8_t protocol;
} gso_types[] = {
    { VIRTIO_NET_HDR_GSO_UDP, 4, IPPROTO_UDP },
    { VIRTIO_NET_HDR_GSO_UDP, 6, IPPROTO_UDP },
    { VIRTIO_NET_HDR_GSO_UDP_L4, 4, IPPROTO_UDP },
    { VIRTIO_NET_HDR_GSO_UDP_L4, 6, IPPROTO_UDP },
    { VIRTIO_NET_HDR_GSO_TCPV4 | VIRTIO_NET_HDR_GSO_ECN, 4, IPPROTO_TCP },
    { VIRTIO_NET_HDR_GSO_TCPV6 | VIRTIO_NET_HDR_GSO_ECN, 6, IPPROTO_TCP },
};

static void frame_make_gso_type(Frame *frame, unsigned i)
{
    i %= ARRAY_SIZE(gso_types);
    frame_make_ip(frame, gso_types[i].version, gso_types[i].protocol, 7777);
    frame->hdr.gso_type = gso_types[i].type;
    frame->hdr.gso_size = MSS;
    frame->hdr.hdr_len = frame->hdr.csum_start +
                         (gso_types[i].protocol == IPPROTO_TCP ? 20 : 8);
}

static void test_capture_gso_types(Lab *lab)
{
    g_autofree Frame *frame = g_new0(Frame, 1);
    /* So little that each place is used many times */
    PacketSocket *ps = lab_capture(lab, 256 * KiB);
    unsigned passed = 0;
    uint64_t drops, discarded;
    ssize_t ret;

    /* test_capture_stuck() tells what these cost. */
    for (int i = 0; i < 5; i++) {
        frame_make_stuck(frame);
        tap_write(&lab->tap, frame);
        capture_try(ps, frame);
    }
    drops = packet_socket_drops(ps);
    for (int i = 0; i < 40 * ARRAY_SIZE(gso_types); i++) {
        unsigned strange = 0, refused = 0, reads = 0;

        for (int j = 0; j < 1 + i % 3; j++) {
            frame_make_gso_type(frame, i);
            strange += lab_write(lab, frame);
        }
        passed += strange;
        lab_pass(lab, make_some_jumbo, i);
        do {
            ret = capture_try(ps, frame);
            g_assert_true(ret > 0 || ret == -EINVAL || ret == -EAGAIN);
            refused += ret == -EINVAL;
            g_assert_cmpuint(reads++, <, 100);
        } while (ret < 0 || lduw_be_p(frame->data + 12) != ETH_P_TEST);
        g_assert_cmpuint(frame_assert_made(frame, make_some_jumbo), ==, i);
        g_assert_cmpuint(refused, <=, strange);
        capture_expect_none(ps);
    }
    g_assert_cmpuint(passed, >, 0);
    g_assert_cmpuint(packet_socket_drops(ps) - drops, <=, passed);

    /* A discard takes them along. */
    drops = packet_socket_drops(ps);
    passed = 0;
    for (int i = 0; i < 3 * ARRAY_SIZE(gso_types); i++) {
        frame_make_gso_type(frame, i);
        passed += lab_write(lab, frame) + 1;
        lab_pass(lab, make_small, i);
    }
    discarded = packet_socket_discard(ps);
    g_assert_cmpuint(discarded, >=, 3 * ARRAY_SIZE(gso_types));
    if (lab->way->directions == PACKET_SOCKET_INCOMING) {
        /* Where the kernel cuts none */
        g_assert_cmpuint(discarded + packet_socket_drops(ps) - drops, ==,
                         passed);
    }
    capture_expect_none(ps);
    lab_check(lab, ps, make_jumbo, 1);
}

/* A frame that does not fit is gone; what is behind the buffer is not. */
static void test_capture_too_long(Lab *lab)
{
    static const int lens[] = { 200, 2000 };
    static const Tags tags[] = {
        { }, { ETH_P_8021AD, 5 }, { ETH_P_8021AD, 5, ETH_P_8021Q, 6 },
    };
    g_autofree Frame *sent = g_new0(Frame, 1), *got = g_new0(Frame, 1);

    for (int i = 0; i < ARRAY_SIZE(tags) * ARRAY_SIZE(lens); i++) {
        int len = lens[i / ARRAY_SIZE(tags)];

        for (int size = 1; size < len + 20;
             size += size < len - 20 ? len / 12 : 1) {
            ssize_t ret;

            frame_make(sent, 1, len);
            frame_add_tags(sent, &tags[i % ARRAY_SIZE(tags)]);
            lab_pass_frame(lab, sent);
            lab_pass(lab, make_small, 2);

            memset(got->data, 0x5a, sizeof(got->data));
            ret = packet_socket_recv(lab->ps, &got->hdr, got->data, size);
            if (ret == -EMSGSIZE) {
                g_assert_cmpuint(size, <, sent->len + PACKET_SOCKET_TAG_ROOM);
            } else {
                g_assert_cmpint(ret, <=, size);
                got->len = ret;
                frame_assert_equal(got, sent);
            }
            for (int j = 0; j < 300; j++) {
                g_assert_cmphex(got->data[size + j], ==, 0x5a);
            }
            capture_expect(lab->ps, make_small, 2);
            capture_expect_none(lab->ps);
        }
    }
    g_assert_cmpuint(packet_socket_drops(lab->ps), ==, 0);
}

/*
 * The interface went down or away: the frames that were queued before, and
 * -ENETDOWN once among them.
 */
static void capture_expect_down(PacketSocket *ps, FrameMaker *make,
                                uint32_t first, unsigned frames)
{
    g_autofree Frame *frame = g_new0(Frame, 1);
    unsigned got = 0, down = 0;

    while (got < frames || !down) {
        ssize_t ret = capture_try(ps, frame);

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
    ssize_t ret = capture_try(ps, frame);

    g_assert_true(ret == -ENETDOWN || ret == -EAGAIN);
    capture_expect_none(ps);
}

static void test_capture_down(Lab *lab)
{
    PacketSocket *ps = lab->ps;

    for (int i = 0; i < 12; i++) {
        for (int j = 0; j < i; j++) {
            lab_pass(lab, make_mixed, 1000 * i + j);
        }
        set_up(lab->tap.name, false);
        capture_expect_down(ps, make_mixed, 1000 * i, i);
        set_up(lab->tap.name, true);
        capture_expect_none(ps);
        lab_check(lab, ps, make_mixed, i);
    }

    /* Unhooked it may be of no interest. */
    packet_socket_unhook(ps);
    set_up(lab->tap.name, false);
    capture_expect_none_or_down(ps);

    /* Hooked while it is down, it works once it is up. */
    packet_socket_hook(ps, &error_abort);
    capture_expect_none_or_down(ps);
    set_up(lab->tap.name, true);
    capture_expect_none(ps);
    lab_check(lab, ps, make_small, 1000);

    /* Down and up in between two reads, too: the error is the only one. */
    for (int i = 0; i < 2; i++) {
        FrameMaker *make = i ? make_jumbo : make_small;

        set_up(lab->tap.name, false);
        set_up(lab->tap.name, true);
        lab_pass(lab, make, 1001);
        capture_expect_down(ps, make, 1001, 1);

        /* A discard leaves no frame, and no endless error. */
        lab_pass(lab, make, 1002);
        lab_pass(lab, make, 1003);
        set_up(lab->tap.name, false);
        g_assert_cmpuint(packet_socket_discard(ps), ==, 2);
        capture_expect_none_or_down(ps);
        set_up(lab->tap.name, true);
    }
    g_assert_cmpuint(packet_socket_drops(ps), ==, 0);
}

static void test_capture_gone(Lab *lab)
{
    PacketSocket *unhooked = capture_new(&lab->tap, -1, lab->way->directions);
    PacketSocket *gone[] = { lab->ps, unhooked };
    Error *err = NULL;
    Lab next;

    for (int i = 0; i < 30; i++) {
        lab_pass(lab, make_mixed, i);
    }
    tap_delete(&lab->tap);
    capture_expect_down(lab->ps, make_mixed, 0, 30);
    capture_expect_none(unhooked);

    /* Another interface; the old sockets get nothing of it */
    g_assert_true(lab_new(&next, lab->way));
    lab_check(&next, next.ps, make_small, 9);
    for (int i = 0; i < ARRAY_SIZE(gone); i++) {
        capture_expect_none(gone[i]);
        packet_socket_unhook(gone[i]);
        g_assert_false(packet_socket_hook(gone[i], &err));
        expect_error(&err, lab->tap.name);
        lab_pass(&next, make_small, 9);
        capture_expect_none(gone[i]);
    }
    g_assert_null(packet_socket_new_inject(lab->tap.name, lab->tap.index, -1,
                                           &err));
    expect_error(&err, lab->tap.name);
    g_assert_cmpuint(packet_socket_discard(lab->ps), ==, 0);
    g_assert_cmpuint(packet_socket_drops(lab->ps), ==, 0);
    packet_socket_free(unhooked);
    lab_free(&next);
}

/*
 * Each frame is captured or counted.
 */
typedef struct Flow {
    Lab *lab;
    FrameMaker *make;
    uint32_t sent, captured, next;
} Flow;

static void flow_pass(Flow *flow, unsigned n)
{
    while (n--) {
        lab_pass(flow->lab, flow->make, flow->sent++);
    }
}

/* Take up to @max frames, in order.  Returns: how many there were. */
static unsigned flow_take(Flow *flow, unsigned max)
{
    g_autofree Frame *got = g_new0(Frame, 1);
    ssize_t ret = 0;
    unsigned n = 0;

    while (n < max && (ret = capture_try(flow->lab->ps, got)) > 0) {
        uint32_t number = frame_assert_made(got, flow->make);

        g_assert_cmpuint(number, >=, flow->next);
        flow->next = number + 1;
        n++;
    }
    g_assert_true(n == max || ret == -EAGAIN);
    flow->captured += n;
    return n;
}

/* Without a loss since the last frame that was taken */
static void flow_take_next(Flow *flow)
{
    capture_expect(flow->lab->ps, flow->make, flow->next++);
    flow->captured++;
}

static void test_capture_drops(Lab *lab)
{
    for (int i = 0; i < ARRAY_SIZE(makers); i++) {
        g_autoptr(GRand) rand = g_rand_new_with_seed(i);
        Flow flow = { .lab = lab, .make = makers[i].make };
        PacketSocket *ps = lab_capture(lab, 512 * KiB);
        uint64_t drops, discarded;

        g_test_message("%s", makers[i].name);

        /* Without a read, until the queue overflows and well beyond */
        while (packet_socket_drops(ps) < 200) {
            flow_pass(&flow, 100);
            g_assert_cmpuint(flow.sent, <, 100000);
        }
        g_assert_cmpuint(flow_take(&flow, UINT_MAX), >, 0);
        drops = packet_socket_drops(ps);
        g_assert_cmpuint(flow.captured + drops, ==, flow.sent);

        /* It goes on without a gap as soon as there is room. */
        flow.next = flow.sent;
        for (int j = 0; j < 500; j++) {
            flow_pass(&flow, 1);
            flow_take_next(&flow);
        }
        g_assert_cmpuint(packet_socket_drops(ps), ==, drops);

        /* With reads in between, so that the queue is full now and then */
        for (int round = 0; round < (g_test_slow() ? 60 : 25); round++) {
            flow_pass(&flow, g_rand_int_range(rand, 0, 100));
            if (round == 10) {
                /* What is queued stays. */
                packet_socket_unhook(ps);
                packet_socket_hook(ps, &error_abort);
            }
            flow_take(&flow, g_rand_int_range(rand, 0, 100));
        }
        packet_socket_unhook(ps);
        discarded = packet_socket_discard(ps);
        drops = packet_socket_drops(ps);
        g_assert_cmpuint(flow.captured + discarded + drops, ==, flow.sent);

        /* The count is since the socket was made. */
        packet_socket_hook(ps, &error_abort);
        flow.next = flow.sent;
        flow_pass(&flow, 1);
        flow_take_next(&flow);
        g_assert_cmpuint(packet_socket_drops(ps), ==, drops);
    }
}

/*
 * However frames and reads interleave: all come in order, and none gets lost as
 * long as there is room, all around the memory and many times.
 */
static void test_capture_order(Lab *lab)
{
    for (int i = 0; i < ARRAY_SIZE(makers); i++) {
        /* In the kernel's count a frame takes less than twice its length. */
        const size_t memory = 2 * MiB, room = memory / 16;
        g_autoptr(GRand) rand = g_rand_new_with_seed(i);
        g_autofree Frame *frame = g_new0(Frame, 1);
        Flow flow = { .lab = lab, .make = makers[i].make };
        PacketSocket *ps = lab_capture(lab, memory);
        size_t waiting = 0;

        g_test_message("%s", makers[i].name);
        while (flow.sent < (g_test_slow() ? 4000 : 1500)) {
            for (int j = g_rand_int_range(rand, 0, 60);
                 j && waiting < room; j--) {
                flow.make(frame, flow.sent++);
                lab_pass_frame(lab, frame);
                waiting += 2 * frame->len + 1024;
            }
            for (int j = g_rand_int_range(rand, 0, 60);
                 j && flow.next < flow.sent; j--) {
                flow.make(frame, flow.next);
                waiting -= 2 * frame->len + 1024;
                flow_take_next(&flow);
            }
            if (flow.next == flow.sent) {
                capture_expect_none(ps);
            }
        }
        while (flow.next < flow.sent) {
            flow_take_next(&flow);
        }
        capture_expect_none(ps);
        g_assert_cmpuint(packet_socket_drops(ps), ==, 0);
    }
}

/* From hardly any memory to much */
static void test_capture_memory(Lab *lab)
{
    static const struct {
        size_t memory;
        unsigned frames;        /* that find room for sure */
    } cases[] = {
        { 0 }, { 1 }, { 2 }, { 3 }, { 100 }, { 4 * KiB, 1 }, { 64 * KiB, 10 },
        { 64 * KiB + 1, 10 }, { 1 * MiB, 70 }, { 64 * MiB, 6000 },
    };

    for (int i = 0; i < ARRAY_SIZE(cases); i++) {
        unsigned frames = cases[i].frames;
        Flow flow = { .lab = lab, .make = make_small };
        PacketSocket *ps = lab_capture(lab, cases[i].memory);

        for (int round = 0; round < (frames > 1000 ? 1 : 2); round++) {
            flow_pass(&flow, frames + 100);
            g_assert_cmpuint(flow_take(&flow, UINT_MAX), >=, frames);
            g_assert_cmpuint(flow.captured + packet_socket_drops(ps), ==,
                             flow.sent);
            flow.make = make_some_jumbo;
        }
    }
}

static int64_t to_ns(struct timespec time)
{
    return time.tv_sec * NANOSECONDS_PER_SECOND + time.tv_nsec;
}

static int64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_REALTIME, &now);
    return to_ns(now);
}

/* Returns: when the next frame came, which has this number. */
static int64_t capture_expect_time(PacketSocket *ps, uint32_t number)
{
    capture_expect(ps, make_some_jumbo, number);
    return to_ns(packet_socket_time(ps));
}

/* A frame has the time at which it came, whenever it is taken. */
static void test_capture_times(Lab *lab)
{
    enum { FRAMES = 100 };
    int64_t before[FRAMES], after[FRAMES];
    gint64 end = g_get_monotonic_time() + LIMIT_MS * 1000;
    PacketSocket *ps;
    int64_t passed;

    ps = packet_socket_new_capture(lab->tap.name, lab->tap.index, -1,
                                   lab->way->directions, CAPTURE_MEMORY, true,
                                   &error_abort);
    packet_socket_hook(ps, &error_abort);
    /* The kernel begins with it in its own time, in each direction. */
    for (int good = 0; good < 4;) {
        g_assert_cmpint(g_get_monotonic_time(), <, end);
        lab_pass(lab, make_some_jumbo, 0);
        passed = now_ns();
        good = capture_expect_time(ps, 0) > passed ? 0 : good + 1;
    }

    for (int i = 0; i < FRAMES; i++) {
        before[i] = now_ns();
        lab_pass(lab, make_some_jumbo, i);
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

static PacketSocket *inject_new(const Tap *tap, int fd)
{
    return packet_socket_new_inject(tap->name, tap->index, fd, &error_abort);
}

/* Returns: as packet_socket_send() */
static int inject_frames(PacketSocket *ps, const Frame *frames, size_t n)
{
    g_autofree PacketSocketFrame *send = g_new(PacketSocketFrame, n);
    int ret;

    for (size_t i = 0; i < n; i++) {
        send[i] = (PacketSocketFrame) {
            .hdr = frames[i].hdr, .data = frames[i].data, .len = frames[i].len,
        };
    }
    ret = packet_socket_send(ps, send, n);
    g_assert_cmpint(ret, !=, 0);
    g_assert_cmpint(ret, <=, (int)MIN(n, PACKET_SOCKET_BATCH));
    return ret;
}

/* Returns: 0, or a negative errno */
static int inject(PacketSocket *ps, const Frame *frame)
{
    return MIN(inject_frames(ps, frame, 1), 0);
}

static void inject_arrives(PacketSocket *ps, Tap *tap, const Frame *frame)
{
    g_assert_cmpint(inject(ps, frame), ==, 0);
    tap_expect(tap, frame);
    tap_expect_none(tap);
}

static void test_inject_plain(Tap *tap)
{
    g_autofree Frame *frame = g_new0(Frame, 1);
    PacketSocket *ps = inject_new(tap, -1);

    /* It is on no interface, and so gets nothing. */
    g_assert_cmphex(running_protocol(packet_socket_fd(ps)), ==, 0);
    for (int len = 60; len <= 1514; len++) {
        frame_make(frame, len, len);
        inject_arrives(ps, tap, frame);
    }
    for (int i = 0; i < ARRAY_SIZE(all_tags); i++) {
        /* A tag does not count for the MTU. */
        frame_make(frame, i, all_tags[i].outer_tpid == ETH_P_8021AD ? 1500 :
                             all_tags[i].inner_tpid ? 1510 : 1514);
        frame_add_tags(frame, &all_tags[i]);
        inject_arrives(ps, tap, frame);
    }
    packet_socket_free(ps);
}

/* A checksum left to do: the guest does it, or else the kernel. */
static void test_inject_checksum(Tap *tap)
{
    g_autofree Frame *frame = g_new0(Frame, 1);
    PacketSocket *ps = inject_new(tap, -1);

    for (int i = 0; i < 4; i++) {
        frame_make_ip(frame, i & 1 ? 6 : 4, i & 2 ? IPPROTO_UDP : IPPROTO_TCP,
                      333);
        tap_set_offload(tap, TUN_F_CSUM);
        inject_arrives(ps, tap, frame);

        tap_set_offload(tap, 0);
        g_assert_cmpint(inject(ps, frame), ==, 0);
        g_assert_true(frame_offload_to_guest(&frame->hdr, frame->data,
                                             frame->len, NULL, 0, false));
        tap_expect(tap, frame);
    }
    packet_socket_free(ps);
}

/*
 * A GSO frame arrives whole if the guest can take it.  If not it is refused,
 * nothing of it arrives or is captured, and what is sent next arrives.
 */
static void check_inject_gso(PacketSocket *ps, PacketSocket *capture, Tap *tap,
                             const Frame *frame, bool whole)
{
    g_autofree Frame *next = frames_make(make_small, 1, 1);

    if (whole) {
        inject_arrives(ps, tap, frame);
    } else {
        g_assert_cmpint(inject(ps, frame), ==, -EAGAIN);
    }
    inject_arrives(ps, tap, next);
    capture_expect_none(capture);
}

static void test_inject_gso(Tap *tap)
{
    static const unsigned offloads[] = {
        0, TUN_F_CSUM, TUN_F_CSUM | TUN_F_TSO4, TUN_F_CSUM | TUN_F_TSO6,
        TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6,
        TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN,
    };
    g_autofree Frame *frame = g_new0(Frame, 1), *got = g_new0(Frame, 1);
    PacketSocket *ps = inject_new(tap, -1);
    PacketSocket *capture = capture_new_hooked(tap, BOTH);

    for (int i = 0; i < ARRAY_SIZE(offloads); i++) {
        tap_set_offload(tap, offloads[i]);
        for (int j = 0; j < 4; j++) {
            bool tcp6 = j & 1, ecn = j & 2;
            unsigned needed = (tcp6 ? TUN_F_TSO6 : TUN_F_TSO4) |
                              (ecn ? TUN_F_TSO_ECN : 0);

            frame_make_gso(frame, tcp6 ? 6 : 4, 5 * MSS);
            frame->hdr.gso_type |= ecn ? VIRTIO_NET_HDR_GSO_ECN : 0;
            check_inject_gso(ps, capture, tap, frame,
                             (offloads[i] & needed) == needed);
        }
        frame_make_gso_type(frame, 0);
        check_inject_gso(ps, capture, tap, frame, false);
    }

    /* With all headers: what is longer the kernel does not leave whole. */
    tap_set_offload(tap, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6);
    for (int version = 4; version <= 6; version += 2) {
        frame_make_gso(frame, version, 65535 - 14 - 60);
        g_assert_cmpint(inject(ps, frame), ==, 0);
        tap_read(tap, got);
        frame_assert_equal(got, frame);
        g_assert_cmpuint(got->hdr.hdr_len, ==, frame->hdr.hdr_len);
    }
    frame_make_gso(frame, 6, 65535 - 60);
    check_inject_gso(ps, capture, tap, frame, false);
    packet_socket_free(capture);
    packet_socket_free(ps);
}

/* What was taken arrives, once and in order; what was not is refused. */
static void test_inject_queue_full(Tap *tap)
{
    static const struct {
        int queue_len;
        int batch;
    } cases[] = {
        { 16, 1 }, { 1, 64 }, { 10, 64 }, { 63, 64 }, { 64, 64 }, { 65, 64 },
        { 100, 64 },
    };
    PacketSocket *ps = inject_new(tap, -1);

    tap_set_offload(tap, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6);
    for (int i = 0; i < ARRAY_SIZE(cases); i++) {
        g_autoptr(GRand) rand = g_rand_new_with_seed(i);
        int batch = cases[i].batch;
        unsigned sent = 0, arrived = 0, partly = 0, refused = 0;

        g_test_message("queue of %d, %d at a time", cases[i].queue_len, batch);
        set_queue_len(tap, cases[i].queue_len);
        while (sent < (g_test_slow() ? 1500 : 500) || !refused ||
               (!partly && batch > 1)) {
            g_autofree Frame *frames = frames_make(make_for_guest, sent, batch);
            int ret = inject_frames(ps, frames, batch);

            if (ret < 0) {
                g_assert_cmpint(ret, ==, -EAGAIN);
                refused++;
            } else if (ret < batch) {
                /* The next one was the first that did not fit. */
                g_assert_cmpint(inject(ps, &frames[ret]), ==, -EAGAIN);
                partly++;
            }
            sent += MAX(ret, 0);
            arrived += tap_read_made(tap, make_for_guest, arrived,
                                     g_rand_int_range(rand, 0, batch + 2));
        }
        tap_expect_made(tap, make_for_guest, arrived, sent - arrived);
    }
    packet_socket_free(ps);
}

enum {
    SUM = VIRTIO_NET_HDR_F_NEEDS_CSUM,
    TCP4 = VIRTIO_NET_HDR_GSO_TCPV4,
};

/*
 * The beginnings of a TCP packet of IPv4: IP is at 14, TCP at 34, and the data
 * at 54.  No guest takes GSO frames.
 */
static const struct {
    const char *what;
    int error;
    size_t len;
    /* Flags, GSO type, length of headers, size, start and offset of the sum */
    struct virtio_net_hdr hdr;
} bad_frames[] = {
    { "no frame", -EINVAL, 0 },
    { "a runt", -EINVAL, ETH_HLEN - 1 },
    /* With a tag it could be 1518. */
    { "longer than the MTU", -EMSGSIZE, 1519 },
    { "the longest", -EMSGSIZE, FRAME_MAX },
    { "sum begins at the end", -EINVAL, 142, { SUM, 0, 0, 0, 142, 16 } },
    { "sum begins far behind", -EINVAL, 142, { SUM, 0, 0, 0, 0xffff, 16 } },
    { "sum does not fit", -EINVAL, 142, { SUM, 0, 0, 0, 34, 107 } },
    { "unknown type", -EINVAL, 20054, { SUM, 0x7e, 54, MSS, 34, 16 } },
    { "segments of 0", -EINVAL, 20054, { SUM, TCP4, 54, 0, 34, 16 } },
    { "header too long", -EINVAL, 2054, { SUM, TCP4, 2055, MSS, 34, 16 } },
    { "not to be cut", -EAGAIN, 20054, { SUM, TCP4, 54, MSS, 34, 16 } },
};

static void frame_make_bad(Frame *frame, unsigned i)
{
    i %= ARRAY_SIZE(bad_frames);
    frame_make_gso(frame, 4, 20000);
    frame->len = bad_frames[i].len;
    frame->hdr = bad_frames[i].hdr;
}

/* What comes before a bad frame goes; the error is about the first. */
static void test_inject_errors(Tap *tap)
{
    static const int places[] = { 0, 1, 7, 31, 62, 63 };
    PacketSocket *ps = inject_new(tap, -1);

    for (int i = 0; i < ARRAY_SIZE(bad_frames) * ARRAY_SIZE(places); i++) {
        int kind = i % ARRAY_SIZE(bad_frames);
        int place = places[i / ARRAY_SIZE(bad_frames)];
        g_autofree Frame *frames = frames_make(make_small, 0, 64);

        g_test_message("%s, at %d", bad_frames[kind].what, place);
        /* The last is bad, too, which nobody gets to hear of before. */
        frame_make_bad(&frames[63], kind + 1);
        frame_make_bad(&frames[place], kind);
        if (place) {
            g_assert_cmpint(inject_frames(ps, frames, 64), ==, place);
            tap_expect_made(tap, make_small, 0, place);
        }
        for (int j = 0; j < 2; j++) {
            g_assert_cmpint(inject_frames(ps, frames + place, 64 - place), ==,
                            bad_frames[kind].error);
            tap_expect_none(tap);
        }
        /* Without it the rest goes. */
        if (place < 62) {
            g_assert_cmpint(inject_frames(ps, frames + place + 1, 63 - place),
                            ==, 62 - place);
            tap_expect_made(tap, make_small, place + 1, 62 - place);
        }
    }
    packet_socket_free(ps);
}

/* Down, and up again */
static void check_inject_down(PacketSocket *ps, Tap *tap)
{
    g_autofree Frame *frame = g_new0(Frame, 1);

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
        tap_expect(tap, frame);
    }
}

static void test_inject_down(Tap *tap)
{
    g_autofree Frame *frames = frames_make(make_small, 0, 104);
    PacketSocket *ps = inject_new(tap, -1);

    check_inject_down(ps, tap);

    /* What is left of many goes once it is up. */
    g_assert_cmpint(inject_frames(ps, frames, 104), ==, 64);
    set_up(tap->name, false);
    for (int i = 0; i < 3; i++) {
        g_assert_cmpint(inject_frames(ps, frames + 64, 40), ==, -EAGAIN);
    }
    tap_drain(tap);
    set_up(tap->name, true);
    g_assert_cmpint(inject_frames(ps, frames + 64, 40), ==, 40);
    tap_expect_made(tap, make_small, 64, 40);

    tap_delete(tap);
    for (int i = 0; i < 3; i++) {
        int ret = inject(ps, frames);

        g_assert_true(ret == -ENXIO || ret == -ENODEV);
    }
    packet_socket_free(ps);
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

static size_t address_space(void)
{
    g_autofree char *text = NULL;

    g_assert_true(g_file_get_contents("/proc/self/statm", &text, NULL, NULL));
    return g_ascii_strtoull(text, NULL, 10) * qemu_real_host_page_size();
}

static void test_errors_leak(Tap *tap)
{
    g_autofree Frame *frame = frames_make(make_small, 0, 1);
    unsigned fds = count_fds();
    size_t before = address_space();

    /* Each close waits for the kernel's RCU. */
    for (int i = 0; i < (g_test_slow() ? 300 : 100); i++) {
        PacketSocket *ps = capture_new(tap, -1, 1 + i % BOTH);

        if (i & 1) {
            packet_socket_hook(ps, &error_abort);
            tap_write(tap, frame);
            host_send(tap, frame);
            tap_drain(tap);
        }
        if (i & 2) {
            packet_socket_unhook(ps);
        }
        packet_socket_free(ps);
        packet_socket_free(inject_new(tap, -1));
        g_assert_null(packet_socket_new_inject(tap->name, tap->index + 100000,
                                               -1, NULL));
    }
    g_assert_cmpuint(count_fds(), ==, fds);
    g_assert_cmpuint(address_space(), <, before + 16 * MiB);
}

/*
 * Sockets that somebody else opened
 */

static int set_filter(int fd, uint32_t len)
{
    struct sock_filter code = BPF_STMT(BPF_RET | BPF_K, len);
    struct sock_fprog prog = { .len = 1, .filter = &code };

    return setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &prog, sizeof(prog));
}

/*
 * Returns: a socket that gets all frames of all interfaces, has got some of
 * @flood, and, if it is to be @spoilt, has all options that would be in the way
 */
static int others_new(Flood *flood, bool spoilt)
{
    int fd = socket(AF_PACKET, SOCK_RAW, htons(ETH_P_ALL));

    flood_pass(flood);
    g_assert_true(readable(fd, LIMIT_MS));
    if (spoilt) {
        set_option(fd, SOL_PACKET, PACKET_VERSION, TPACKET_V3);
        set_option(fd, SOL_PACKET, PACKET_RESERVE, 8192);
        set_option(fd, SOL_PACKET, PACKET_IGNORE_OUTGOING, 1);
        set_option(fd, SOL_PACKET, PACKET_TIMESTAMP,
                   SOF_TIMESTAMPING_SOFTWARE);
        set_option(fd, SOL_PACKET, PACKET_ORIGDEV, 1);
        set_option(fd, SOL_SOCKET, SO_TIMESTAMP, 1);
        set_option(fd, SOL_SOCKET, SO_TIMESTAMPING,
                   SOF_TIMESTAMPING_SOFTWARE | SOF_TIMESTAMPING_RX_SOFTWARE);
        set_option(fd, SOL_SOCKET, SO_RXQ_OVFL, 1);
        g_assert_cmpint(set_filter(fd, 0), ==, 0);
    }
    return fd;
}

/* As one that we opened, and with nothing of what was there before */
static void test_passed_capture(Lab *lab)
{
    g_autofree Frame *frame = g_new0(Frame, 1);
    Flood flood;

    flood_start(&flood);
    for (int round = 0; round < (g_test_slow() ? 30 : 10); round++) {
        int fd = others_new(&flood, round & 1);
        PacketSocket *ps = capture_new(&lab->tap, fd, lab->way->directions);

        g_assert_cmpint(packet_socket_fd(ps), ==, fd);
        capture_expect_none(ps);
        g_assert_cmpuint(packet_socket_drops(ps), ==, 0);
        g_assert_cmphex(running_protocol(fd), !=, ETH_P_ALL);
        lab_pass(lab, make_small, 1000);
        capture_expect_none(ps);
        g_assert_true(fcntl(fd, F_GETFD) & FD_CLOEXEC);
        g_assert_true(fcntl(fd, F_GETFL) & O_NONBLOCK);
        /* Nobody else who has the socket can have it get more. */
        g_assert_cmpint(set_filter(fd, UINT32_MAX), ==, -1);

        packet_socket_hook(ps, &error_abort);
        for (int i = 0; i < 50; i++) {
            lab_check(lab, ps, make_mixed, i);
            frame_make(frame, i, 60 + 30 * i);
            frame_add_tag(frame, ETH_P_8021Q, i);
            lab_pass_frame(lab, frame);
            capture_expect_frame(ps, frame);
        }
        packet_socket_unhook(ps);
        capture_expect_none(ps);
        packet_socket_free(ps);
    }
    flood_stop(&flood);
}

static void test_passed_inject(Tap *tap)
{
    g_autofree Frame *frame = g_new0(Frame, 1);
    PacketSocket *capture = capture_new_hooked(tap, BOTH);
    Flood flood;

    flood_start(&flood);
    for (int round = 0; round < 10; round++) {
        int fd = others_new(&flood, round & 1);
        PacketSocket *ps = inject_new(tap, fd);

        g_assert_cmphex(running_protocol(fd), !=, ETH_P_ALL);
        g_assert_cmpint(set_filter(fd, UINT32_MAX), ==, -1);
        for (int i = 0; i < 20; i++) {
            frame_make(frame, i, 60 + 70 * i);
            inject_arrives(ps, tap, frame);
        }
        frame_make_gso(frame, 4, 5000);
        g_assert_cmpint(inject(ps, frame), ==, -EAGAIN);
        capture_expect_none(capture);
        /* And it gets nothing. */
        host_send(tap, frame);
        tap_write(tap, frame);
        tap_drain(tap);
        g_assert_false(readable(fd, 0));
        check_inject_down(ps, tap);
        packet_socket_discard(capture);
        packet_socket_free(ps);
    }
    packet_socket_free(capture);
    flood_stop(&flood);
}

/*
 * Whoever passed a socket may have kept a duplicate.  It is off the interface
 * and empty once we are done.
 */
static void test_passed_free(Lab *lab)
{
    for (int waiting = 0; waiting < 30; waiting += 10) {
        int fd = socket(AF_PACKET, SOCK_RAW, 0), kept = dup(fd);
        PacketSocket *ps = capture_new(&lab->tap, fd, lab->way->directions);

        packet_socket_hook(ps, &error_abort);
        for (int i = 0; i < waiting; i++) {
            lab_pass(lab, make_some_jumbo, i);
        }
        packet_socket_free(ps);
        g_assert_cmpint(fcntl(fd, F_GETFD), ==, -1);

        g_assert_cmphex(running_protocol(kept), !=, ETH_P_ALL);
        lab_pass(lab, make_small, 1000);
        g_assert_false(readable(kept, 0));
        /* With a ring the kernel would not allow it. */
        set_option(kept, SOL_PACKET, PACKET_VERSION, TPACKET_V1);
        close(kept);
    }
}

/* Whoever has a copy of the socket can map the ring, too, and write to it. */
static void test_passed_mapped(Lab *lab)
{
    const uint16_t places[] = { 0, 40, PACKET_RING_SLOT_SIZE, UINT16_MAX };
    g_autofree Frame *got = g_new0(Frame, 1);
    int fd = socket(AF_PACKET, SOCK_RAW, 0);
    PacketSocket *ps = capture_new(&lab->tap, fd, lab->way->directions);
    struct tpacket2_hdr *slot = MAP_FAILED;
    size_t size = 0;

    while (slot == MAP_FAILED) {
        size += 65536;
        g_assert_cmpuint(size, <, CAPTURE_MEMORY);
        slot = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    }
    packet_socket_hook(ps, &error_abort);
    for (int i = 0; i < ARRAY_SIZE(places); i++) {
        lab_pass(lab, make_small, i);
        ((struct tpacket2_hdr *)((uint8_t *)slot + i * PACKET_RING_SLOT_SIZE))
            ->tp_mac = places[i];
        g_assert_cmpint(packet_socket_recv(ps, &got->hdr, got->data,
                                           sizeof(got->data)), ==, -EMSGSIZE);
    }
    lab_pass(lab, make_small, 9);
    capture_expect(ps, make_small, 9);
    munmap(slot, size);
    packet_socket_free(ps);
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
    expect_error(&err, text);
    g_assert_true((fcntl(fd, F_GETFD) >= 0) == open);
    close(fd);
}

static void test_passed_errors(Tap *tap)
{
    struct tpacket_req req = {
        .tp_block_size = 65536,
        .tp_block_nr = 1,
        .tp_frame_size = 2048,
        .tp_frame_nr = 32,
    };
    Tap other;
    unsigned fds;
    int fd;

    tap_new(&other);
    fds = count_fds();
    for (int injects = 0; injects < 2; injects++) {
        int locked = socket(AF_PACKET, SOCK_RAW, 0);
        int ring = socket(AF_PACKET, SOCK_RAW, 0);
        const struct {
            int fd;
            const char *flaw;
        } cases[] = {
            { open("/dev/null", O_RDWR), "is not a packet socket" },
            { 1000, "is not open" },
            { socket(AF_UNIX, SOCK_DGRAM, 0), "is not a packet socket" },
            { socket(AF_PACKET, SOCK_DGRAM, 0), "SOCK_RAW" },
            { sender_new(other.index), "bound to another interface" },
            { locked, "locked" },
            { ring, "has a ring" },
        };

        set_option(locked, SOL_SOCKET, SO_LOCK_FILTER, 1);
        g_assert_cmpint(setsockopt(ring, SOL_PACKET, PACKET_RX_RING, &req,
                                   sizeof(req)), ==, 0);
        for (int i = 0; i < ARRAY_SIZE(cases); i++) {
            expect_passed_error(tap, cases[i].fd, injects, CAPTURE_MEMORY,
                                cases[i].flaw);
        }
        g_assert_cmpuint(count_fds(), ==, fds);
    }
    /* What is found out late: the kernel has no such ring. */
    fd = socket(AF_PACKET, SOCK_RAW, 0);
    expect_passed_error(tap, fd, false, SIZE_MAX / 64, "could not get a ring");
    /* One that was refused is as it was. */
    fd = sender_new(other.index);
    expect_passed_error(tap, dup(fd), false, CAPTURE_MEMORY,
                        "bound to another interface");
    packet_socket_free(capture_new(&other, fd, BOTH));
    g_assert_cmpuint(count_fds(), ==, fds);
    tap_delete(&other);
}

/* The queue stays as large as somebody made it who has the privilege. */
static void test_passed_no_privilege(Tap *tap)
{
    struct __user_cap_header_struct head = {
        .version = _LINUX_CAPABILITY_VERSION_3,
    };
    struct __user_cap_data_struct none[_LINUX_CAPABILITY_U32S_3] = { };
    PacketSocket *ps;
    int fd, large;

    if (!g_test_subprocess()) {
        g_test_trap_subprocess(NULL, 0, 0);
        g_test_trap_assert_passed();
        return;
    }
    fd = socket(AF_PACKET, SOCK_RAW, 0);
    /* More than anybody may set, and less than the capture would like. */
    set_option(fd, SOL_SOCKET, SO_RCVBUFFORCE, CAPTURE_MEMORY / 3);
    large = get_option(fd, SOL_SOCKET, SO_RCVBUF);
    g_assert_cmpint(syscall(SYS_capset, &head, none), ==, 0);
    ps = capture_new(tap, fd, BOTH);
    g_assert_cmpint(get_option(fd, SOL_SOCKET, SO_RCVBUF), ==, large);
    packet_socket_free(ps);
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

static void add_tap_test(const char *name, void (*func)(Tap *tap))
{
    g_autofree char *path = g_strdup_printf("/packet-socket/%s", name);

    g_test_add_data_func(path, func, run_tap_test);
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

/* A test for each way */
static void add_lab_tests(const char *name, void (*func)(Lab *lab))
{
    for (int i = 0; i < ARRAY_SIZE(ways); i++) {
        g_autofree char *path = g_strdup_printf("/packet-socket/%s/%s", name,
                                                ways[i].name);
        LabTest test = { .way = &ways[i], .func = func };

        g_test_add_data_func_full(path, g_memdup2(&test, sizeof(test)),
                                  run_lab_test, g_free);
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    enter_namespace();

    add_tap_test("capture/directions", test_capture_directions);
    add_lab_tests("capture/unhooked", test_capture_unhooked);
    add_lab_tests("capture/discard", test_capture_discard);
    add_lab_tests("capture/foreign", test_capture_foreign);
    add_lab_tests("capture/tags/checksum", test_capture_tags_checksum);
    add_lab_tests("capture/lengths", test_capture_lengths);
    add_lab_tests("capture/gso-types", test_capture_gso_types);
    add_lab_tests("capture/poll", test_capture_poll);
    add_lab_tests("capture/stuck", test_capture_stuck);
    add_lab_tests("capture/too-long", test_capture_too_long);
    add_lab_tests("capture/down", test_capture_down);
    add_lab_tests("capture/gone", test_capture_gone);
    add_lab_tests("capture/drops", test_capture_drops);
    add_lab_tests("capture/order", test_capture_order);
    add_lab_tests("capture/memory", test_capture_memory);
    add_lab_tests("capture/times", test_capture_times);
    add_tap_test("inject/plain", test_inject_plain);
    add_tap_test("inject/checksum", test_inject_checksum);
    add_tap_test("inject/gso", test_inject_gso);
    add_tap_test("inject/queue-full", test_inject_queue_full);
    add_tap_test("inject/errors", test_inject_errors);
    add_tap_test("inject/down", test_inject_down);
    add_tap_test("errors/leak", test_errors_leak);
    add_lab_tests("passed/capture", test_passed_capture);
    add_lab_tests("passed/free", test_passed_free);
    add_lab_tests("passed/mapped", test_passed_mapped);
    add_tap_test("passed/inject", test_passed_inject);
    add_tap_test("passed/errors", test_passed_errors);
    add_tap_test("passed/no-privilege", test_passed_no_privilege);
    return g_test_run();
}
