/*
 * Work on frames that their virtio-net header leaves to others: unit tests
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What is right is what the kernel does: the same frame goes through a TAP
 * that cannot take it whole, and what the TAP's reader gets is compared with
 * our segments, bit by bit.
 *
 * A frame that a function gets, and the room for what it writes, end at a
 * page that may not be touched.
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "qemu/units.h"
#include "net/frame-offload.h"
#include "net/packet-socket.h"
#include "qapi/error.h"
#include "standard-headers/linux/virtio_net.h"
#include "tap-helpers.h"
#include "net/tap-linux.h"
#include <netinet/in.h>
#include <sys/ioctl.h>
#include <sys/uio.h>
#include <linux/if_ether.h>

#define PORT_VXLAN 4789
#define PORT_GENEVE 6081

/* Of a UDP frame, as the kernel has it */
#define UDP_SEGMENTS_MAX 128

#define TUNNEL_HEADER sizeof(struct virtio_net_hdr_v1_hash_tunnel)

/* What a frame is to be, and, from frame_build() on, where its parts are */
typedef struct Plan {
    const char *name;
    int version;                /* of IP */
    bool udp;
    unsigned tags;
    unsigned options;           /* of IPv4, in words; IPv6: headers */
    unsigned tcp_options;       /* in words */
    size_t payload;
    uint16_t size;              /* of the payload of one segment */
    uint8_t tcp_flags;
    uint16_t id;
    uint16_t fragment;          /* flags and offset of IPv4 */
    uint32_t seq;
    bool no_sum;                /* the header speaks of no checksum */
    int tunnel;                 /* version of IP around it; 0: none */
    bool geneve;                /* not VXLAN */
    unsigned tunnel_options;    /* of IPv4 or IPv6, and of Geneve, in words */
    bool tunnel_sum;

    size_t tunnel_l3;
    size_t tunnel_l4;
    size_t l3;
    size_t l4;
    size_t headers;
} Plan;

#define TCP_ACK 0x10
#define TCP_CWR 0x80

/*
 * Memory that ends at a page that may not be touched
 */

#define FENCE_SIZE (128 * 1024)
#define FENCE_BEFORE 64

static uint8_t *fence_new(void)
{
    uint8_t *map = mmap(NULL, FENCE_SIZE + qemu_real_host_page_size(),
                        PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                        -1, 0);

    g_assert_true(map != MAP_FAILED);
    g_assert_cmpint(mprotect(map + FENCE_SIZE, qemu_real_host_page_size(),
                             PROT_NONE), ==, 0);
    return map;
}

/* Each has its own: the frame, the room for a segment, and a header. */
enum { FENCE_FRAME, FENCE_SEGMENT, FENCE_HEADER, FENCES };

static uint8_t *fence_room(int which, size_t len)
{
    static uint8_t *fences[FENCES];
    uint8_t *room;

    if (!fences[which]) {
        fences[which] = fence_new();
    }
    g_assert_cmpuint(len + FENCE_BEFORE, <=, FENCE_SIZE);
    room = fences[which] + FENCE_SIZE - len;
    memset(room - FENCE_BEFORE, 0x5a, FENCE_BEFORE + len);
    return room;
}

static uint8_t *fence_copy(int which, const void *data, size_t len)
{
    uint8_t *room = fence_room(which, len);

    if (len) {
        memcpy(room, data, len);
    }
    return room;
}

static void fence_check(const uint8_t *room)
{
    for (int i = 1; i <= FENCE_BEFORE; i++) {
        g_assert_cmphex(room[-i], ==, 0x5a);
    }
}

/*
 * Frames
 */

static unsigned pick(unsigned n)
{
    return g_test_rand_int_range(0, n);
}

static void random_bytes(uint8_t *data, size_t len)
{
    for (size_t i = 0; i < len; i++) {
        data[i] = g_test_rand_int();
    }
}

/* Complete for the @rest bytes behind it.  Returns: its length. */
static size_t put_ip(uint8_t *ip, int version, unsigned options,
                     uint8_t protocol, size_t rest)
{
    static const uint8_t types[] = {
        IPPROTO_HOPOPTS, IPPROTO_ROUTING, IPPROTO_DSTOPTS,
    };
    size_t len;
    uint8_t *next;

    if (version == 4) {
        len = 20 + options * 4;
        ip[0] = 0x40 | len / 4;
        stw_be_p(ip + 2, len + rest);
        ip[9] = protocol;
        stw_be_p(ip + 10, 0);
        stw_be_p(ip + 10, ~sum_bytes(ip, len));
        return len;
    }
    ip[0] = 0x60 | (ip[0] & 0xf);
    next = ip + 6;
    len = 40;
    for (unsigned i = 0; i < options; i++) {
        size_t ext = 8 * (1 + i % 2);

        /* The first, if any, is that of each hop. */
        *next = i < ARRAY_SIZE(types) ? types[i] : IPPROTO_DSTOPTS;
        memset(ip + len, 0, ext);
        ip[len + 1] = ext / 8 - 1;
        next = ip + len;
        len += ext;
    }
    *next = protocol;
    stw_be_p(ip + 4, len - 40 + rest);
    return len;
}

static size_t ip_len(int version, unsigned options)
{
    return version == 4 ? 20 + options * 4 :
                          40 + options * 8 + options / 2 * 8;
}

static void put_udp(uint8_t *udp, const uint8_t *ip, size_t len)
{
    stw_be_p(udp + 4, len);
    stw_be_p(udp + 6, sum_pseudo(ip, len, IPPROTO_UDP));
}

static void put_ethertype(uint8_t *data, int version)
{
    stw_be_p(data, version == 4 ? ETH_P_IP : ETH_P_IPV6);
}

/* All bytes that nothing is said about are random. */
static void frame_build(Frame *frame, Plan *plan)
{
    size_t tcp_len = 20 + plan->tcp_options * 4;
    size_t l4_len = (plan->udp ? 8 : tcp_len) + plan->payload;
    size_t pos = 12;
    uint8_t *data = frame->data, *ip, *l4;

    random_bytes(data, sizeof(frame->data) < 600 + l4_len ?
                       sizeof(frame->data) : 600 + l4_len);
    data[0] = 0x52;
    data[6] = 0x52;
    for (unsigned i = 0; i < plan->tags; i++) {
        stw_be_p(data + pos, i + 1 < plan->tags ? ETH_P_8021AD : ETH_P_8021Q);
        pos += 4;
    }
    if (plan->tunnel) {
        size_t inner = ip_len(plan->version, plan->options) + l4_len;
        size_t around = 8 + 8 + ETH_HLEN;
        uint8_t *udp;

        around += plan->geneve ? plan->tunnel_options * 4 : 0;
        put_ethertype(data + pos, plan->tunnel);
        pos += 2;
        plan->tunnel_l3 = pos;
        ip = data + pos;
        stw_be_p(ip + 6, plan->tunnel == 4 ? plan->fragment : 0);
        pos += put_ip(ip, plan->tunnel, plan->tunnel_options, IPPROTO_UDP,
                      around + inner);
        plan->tunnel_l4 = pos;
        udp = data + pos;
        stw_be_p(udp + 2, plan->geneve ? PORT_GENEVE : PORT_VXLAN);
        put_udp(udp, ip, around + inner);
        if (!plan->tunnel_sum) {
            stw_be_p(udp + 6, 0);
        }
        if (plan->geneve) {
            udp[8] = plan->tunnel_options;
            udp[9] = 0;
            stw_be_p(udp + 10, ETH_P_TEB);
        } else {
            stl_be_p(udp + 8, 0x08000000);
        }
        pos += around - 2;
    }
    put_ethertype(data + pos, plan->version);
    pos += 2;
    plan->l3 = pos;
    ip = data + pos;
    if (plan->version == 4) {
        stw_be_p(ip + 4, plan->id);
        stw_be_p(ip + 6, plan->fragment);
    }
    pos += put_ip(ip, plan->version, plan->options,
                  plan->udp ? IPPROTO_UDP : IPPROTO_TCP, l4_len);
    plan->l4 = pos;
    l4 = data + pos;
    if (plan->udp) {
        put_udp(l4, ip, l4_len);
        pos += 8;
    } else {
        stl_be_p(l4 + 4, plan->seq);
        l4[12] = tcp_len / 4 << 4 | (l4[12] & 0xf);
        l4[13] = plan->tcp_flags;
        stw_be_p(l4 + 16, sum_pseudo(ip, l4_len, IPPROTO_TCP));
        pos += tcp_len;
    }
    plan->headers = pos;
    frame->len = pos + plan->payload;
    g_assert_cmpuint(frame->len, <=, FRAME_MAX);

    frame->hdr = (struct virtio_net_hdr) {
        .flags = VIRTIO_NET_HDR_F_NEEDS_CSUM,
        .gso_type = plan->udp ? VIRTIO_NET_HDR_GSO_UDP_L4 :
                    plan->version == 4 ? VIRTIO_NET_HDR_GSO_TCPV4 :
                                         VIRTIO_NET_HDR_GSO_TCPV6,
        .hdr_len = plan->headers,
        .gso_size = plan->size,
        .csum_start = plan->l4,
        .csum_offset = plan->udp ? 6 : 16,
    };
    if (!plan->udp && plan->tcp_flags & TCP_CWR) {
        frame->hdr.gso_type |= VIRTIO_NET_HDR_GSO_ECN;
    }
}

static void frame_make_marker(Frame *frame)
{
    memset(&frame->hdr, 0, sizeof(frame->hdr));
    memset(frame->data, 0x52, 60);
    frame->data[6] = 0;
    stw_be_p(frame->data + 12, ETH_P_TEST);
    frame->len = 60;
}

static bool frame_is_marker(const Frame *frame)
{
    return lduw_be_p(frame->data + 12) == ETH_P_TEST;
}

static bool finish_checksum(Frame *frame)
{
    return frame_offload_to_guest(&frame->hdr, frame->data, frame->len, NULL,
                                  0, false);
}

/* TCP may write a sum of 0 either way. */
static void unify_zero(Frame *frame, const Plan *plan)
{
    uint8_t *sum = frame->data + plan->l4 + 16;

    if (!plan->udp && !lduw_be_p(sum)) {
        stw_be_p(sum, 0xffff);
    }
}

static void plan_describe(const Plan *plan)
{
    g_test_message("IPv%d %s%s: tags %u, options %u, TCP options %u, "
                   "payload %zu, size %u, flags 0x%02x, id %u, seq %u, "
                   "tunnel %d%s, its options %u, sum %d",
                   plan->version, plan->udp ? "UDP " : "TCP ",
                   plan->name ?: "", plan->tags, plan->options,
                   plan->tcp_options, plan->payload, plan->size,
                   plan->tcp_flags, plan->id, plan->seq, plan->tunnel,
                   plan->geneve ? " Geneve" : "", plan->tunnel_options,
                   plan->tunnel_sum);
}

static void assert_bytes(const Frame *got, const Frame *want,
                         const Plan *plan, unsigned index)
{
    size_t len = MIN(got->len, want->len), i = 0;

    while (i < len && got->data[i] == want->data[i]) {
        i++;
    }
    if (i < len || got->len != want->len) {
        plan_describe(plan);
        g_test_message("segment %u: byte %zu, lengths %zu and %zu, headers "
                       "%zu", index, i, got->len, want->len, plan->headers);
        g_assert_not_reached();
    }
}

/*
 * Our segments
 */

/* Returns: what frame_segments_init() does, with all it gets fenced */
static bool segments_try(FrameSegments *fs, const struct virtio_net_hdr *hdr,
                         const uint8_t *data, size_t len)
{
    uint8_t *frame = fence_copy(FENCE_FRAME, data, len);
    bool ok;

    memset(fs, 0x5a, sizeof(*fs));
    ok = frame_segments_init(fs, hdr, frame, len);
    fence_check(frame);
    g_assert(!len || !memcmp(frame, data, len));
    return ok;
}

static void segments_new(FrameSegments *fs, const Frame *frame,
                         const Plan *plan)
{
    if (!segments_try(fs, &frame->hdr, frame->data, frame->len)) {
        plan_describe(plan);
        g_assert_not_reached();
    }
}

static void segment_get(const FrameSegments *fs, unsigned index,
                        Frame *segment)
{
    size_t room = fs->headers + fs->size;
    uint8_t *buf = fence_room(FENCE_SEGMENT, room);

    g_assert_cmpuint(index, <, fs->count);
    memset(&segment->hdr, 0x5a, sizeof(segment->hdr));
    segment->len = frame_segments_get(fs, index, buf, &segment->hdr);
    fence_check(buf);
    g_assert_cmpuint(segment->len, >, fs->headers);
    g_assert_cmpuint(segment->len, <=, room);
    memcpy(segment->data, buf, segment->len);
    g_assert_cmphex(segment->hdr.flags, ==, VIRTIO_NET_HDR_F_NEEDS_CSUM);
    g_assert_cmphex(segment->hdr.gso_type, ==, VIRTIO_NET_HDR_GSO_NONE);
    g_assert_cmpuint(segment->hdr.gso_size, ==, 0);
}

/* What can be said of the segments without the kernel */
static void segments_check(const FrameSegments *fs, const Frame *frame)
{
    g_autofree Frame *segment = g_new0(Frame, 1);
    size_t payload = 0;

    g_assert_cmpuint(fs->headers + fs->payload, <=, frame->len);
    g_assert_cmpuint(fs->headers, <=, FRAME_SEGMENTS_MAX_HEADERS);
    g_assert_cmpuint(fs->count, >, 0);
    for (unsigned i = 0; i < fs->count; i++) {
        size_t part;

        segment_get(fs, i, segment);
        part = segment->len - fs->headers;
        g_assert_cmpuint(part, ==, MIN(fs->size, fs->payload - payload));
        g_assert(!memcmp(segment->data + fs->headers,
                         frame->data + fs->headers + payload, part));
        payload += part;
        g_assert_true(finish_checksum(segment));
    }
    g_assert_cmpuint(payload, ==, fs->payload);
}

/*
 * The kernel's segments
 */

typedef struct Lab {
    Tap tap;                    /* whose reader gets segments */
    Tap from;                   /* that the frame comes from, over ... */
    char bridge[IFNAMSIZ];      /* ... this; or from the sender of @tap */
} Lab;

static bool lab_new(Lab *lab, unsigned offload)
{
    if (!can_run()) {
        return false;
    }
    memset(lab, 0, sizeof(*lab));
    lab->from.fd = -1;
    tap_new(&lab->tap);
    tap_set_offload(&lab->tap, offload);
    /* All segments of the longest frame wait there at once. */
    set_queue_len(&lab->tap, 4096);
    return true;
}

static void lab_free(Lab *lab)
{
    tap_delete(&lab->tap);
    tap_delete(&lab->from);
    if (lab->bridge[0]) {
        bridge_delete(lab->bridge);
    }
}

/*
 * The sender goes through the queueing discipline, so the kernel segments.
 * Returns: 0, or a negative errno if the kernel does not take it
 */
static int lab_send_host(Lab *lab, const Frame *frame, const Plan *plan)
{
    return frame_write(lab->tap.sender, frame) ? 0 : -errno;
}

/*
 * The kernel's segments of @frame are ours.  Returns: their number, or 0 if
 * the kernel has thrown the frame away.
 */
static unsigned lab_compare(Lab *lab, const Frame *frame, const Plan *plan,
                            int (*send)(Lab *, const Frame *, const Plan *))
{
    g_autofree Frame *got = g_new0(Frame, 1), *ours = g_new0(Frame, 1);
    unsigned count = 0;
    FrameSegments fs;

    segments_new(&fs, frame, plan);
    send(lab, frame, plan);
    frame_make_marker(got);
    g_assert_cmpint(send(lab, got, NULL), ==, 0);
    while (tap_read(&lab->tap, got), !frame_is_marker(got)) {
        if (count < fs.count) {
            segment_get(&fs, count, ours);
            /* Of two checksums the kernel leaves the inner, we the outer. */
            if (got->hdr.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM &&
                !plan->tunnel_sum) {
                g_assert_cmpuint(got->hdr.csum_start, ==,
                                 ours->hdr.csum_start);
                g_assert_cmpuint(got->hdr.csum_offset, ==,
                                 ours->hdr.csum_offset);
                assert_bytes(ours, got, plan, count);
            }
            g_assert_true(finish_checksum(got));
            g_assert_true(finish_checksum(ours));
            unify_zero(got, plan);
            unify_zero(ours, plan);
            assert_bytes(ours, got, plan, count);
        }
        count++;
    }
    if (count && count != fs.count) {
        plan_describe(plan);
        g_assert_cmpuint(count, ==, fs.count);
    }
    return count;
}

static unsigned plan_count(const Plan *plan)
{
    return DIV_ROUND_UP(plan->payload, plan->size);
}

/* Before Linux 6.2 a packet socket refuses this kind. */
static bool knows_uso(Lab *lab)
{
    static int knows = -1;

    if (knows < 0) {
        g_autofree Frame *frame = g_new0(Frame, 1);
        Plan plan = { .version = 4, .udp = true, .payload = 300, .size = 100 };

        frame_build(frame, &plan);
        knows = lab_send_host(lab, frame, NULL) == 0;
        tap_drain(&lab->tap);
    }
    return knows;
}

/* Of each a frame; the rest as it is in most frames */
static const Plan plans[] = {
    { "plain", .tcp_flags = TCP_ACK },
    { "exact", .payload = 5000, .tcp_flags = TCP_ACK },
    { "last of 1", .payload = 5001, .tcp_flags = TCP_ACK },
    { "last lacks 1", .payload = 4999, .tcp_flags = TCP_ACK },
    { "odd size", .size = 999, .tcp_flags = TCP_ACK },
    { "FIN PSH", .tcp_flags = 0x19 },
    { "FIN", .tcp_flags = 0x11 },
    { "PSH", .tcp_flags = 0x18 },
    { "CWR", .tcp_flags = 0x90 },
    { "ECE", .tcp_flags = 0x50 },
    { "all flags", .tcp_flags = 0xff },
    { "no flags", .tcp_flags = 0 },
    { "one tag", .tags = 1, .tcp_flags = TCP_ACK },
    { "QinQ", .tags = 2, .tcp_flags = TCP_ACK },
    { "options", .options = 1, .tcp_flags = TCP_ACK },
    { "two options", .options = 2, .tcp_flags = TCP_ACK },
    { "three options", .options = 3, .tcp_flags = TCP_ACK },
    { "most options", .options = 10, .tcp_options = 10,
      .tcp_flags = TCP_ACK },
    { "TCP options", .tcp_options = 3, .tcp_flags = TCP_ACK },
    { "all of them", .tags = 2, .options = 3, .tcp_options = 10,
      .tcp_flags = 0x98 },
    { "id wraps", .id = 0xfffe, .tcp_flags = TCP_ACK },
    { "seq wraps", .seq = 0xfffffe00, .tcp_flags = TCP_ACK },
    { "seq wraps to 0", .seq = -1000, .tcp_flags = TCP_ACK },
    { "no DF", .fragment = 0xffff, .tcp_flags = TCP_ACK },
    { "one segment", .payload = 300, .tcp_flags = 0x19 },
    { "one whole segment", .payload = 1000, .tcp_flags = 0x19 },
    { "no checksum", .tcp_flags = TCP_ACK, .no_sum = true },
    { "longest", .payload = 65000, .tcp_flags = TCP_ACK },
    { "smallest size", .size = 48, .tcp_flags = TCP_ACK },
};

static void plan_fill(Plan *plan, const Plan *template, int version, bool udp)
{
    *plan = *template;
    plan->version = version;
    plan->udp = udp;
    plan->payload = plan->payload ?: 5600;
    plan->size = plan->size ?: 1000;
    /* 0 stands for what is usual. */
    plan->id = plan->id ?: g_test_rand_int();
    plan->seq = plan->seq ?: g_test_rand_int();
    plan->fragment = plan->fragment == 0xffff ? 0 : 0x4000;
}

static void plan_random(Plan *plan, bool tunnel)
{
    size_t most;

    *plan = (Plan) {
        .version = pick(2) ? 4 : 6,
        .udp = pick(2),
        .tags = pick(3),
        .options = pick(2) ? pick(11) : 0,
        .tcp_options = pick(2) ? pick(11) : 0,
        .size = 48 + pick(pick(2) ? 200 : 9000),
        .tcp_flags = g_test_rand_int(),
        .id = g_test_rand_int(),
        .seq = g_test_rand_int(),
        .fragment = pick(2) ? 0x4000 : 0,
    };
    if (tunnel) {
        plan->tunnel = pick(2) ? 4 : 6;
        plan->geneve = pick(2);
        plan->tunnel_sum = pick(2);
        plan->tunnel_options = pick(2) ? pick(3) : 0;
        if (plan->version == 6) {
            /* All headers together have 256 bytes at the most. */
            plan->options = MIN(plan->options, 2);
        }
    }
    most = 65000 - 14 - 8 - 400;
    if (plan->udp) {
        most = MIN(most, plan->size * 64);
    }
    /* More than one segment */
    plan->payload = plan->size + 1 + pick(most - plan->size);
    if (!pick(8)) {
        plan->payload -= plan->payload % plan->size;
        plan->payload += plan->payload == plan->size ? 1 : 0;
    }
}

static void compare_plan(Lab *lab, Plan *plan)
{
    g_autofree Frame *frame = g_new0(Frame, 1);
    unsigned count;

    if (plan->udp && (!knows_uso(lab) || plan_count(plan) > 64 ||
                      plan->no_sum)) {
        return;
    }
    frame_build(frame, plan);
    if (plan->no_sum) {
        frame->hdr.flags = 0;
    }
    count = lab_compare(lab, frame, plan, lab_send_host);
    if (count != plan_count(plan)) {
        plan_describe(plan);
    }
    g_assert_cmpuint(count, ==, plan_count(plan));
}

static void compare_all(unsigned offload)
{
    unsigned rounds = g_test_slow() ? 20000 : 400;
    Plan plan;
    Lab lab;

    if (!lab_new(&lab, offload)) {
        return;
    }
    for (int i = 0; i < ARRAY_SIZE(plans); i++) {
        for (int kind = 0; kind < 4; kind++) {
            plan_fill(&plan, &plans[i], kind & 1 ? 6 : 4, kind & 2);
            compare_plan(&lab, &plan);
        }
    }
    for (unsigned i = 0; i < rounds; i++) {
        plan_random(&plan, false);
        compare_plan(&lab, &plan);
    }
    if (!knows_uso(&lab)) {
        g_test_message("this kernel segments no UDP from a packet socket");
    }
    lab_free(&lab);
}

static void test_segments_kernel(void)
{
    compare_all(0);
}

/* The guest finishes checksums: the kernel leaves them. */
static void test_segments_kernel_checksum(void)
{
    compare_all(TUN_F_CSUM);
}


/*
 * Frames in a UDP tunnel
 */

#define TUNNEL_OFFLOADS                                                     \
    (TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_USO4 | TUN_F_USO6 |       \
     TUN_F_UDP_TUNNEL_GSO | TUN_F_UDP_TUNNEL_GSO_CSUM)

/* The header of a guest that knows tunnels */
static void put_tunnel_header(struct virtio_net_hdr_v1_hash_tunnel *guest,
                              const Frame *frame, const Plan *plan)
{
    struct virtio_net_hdr_v1 *hdr = &guest->hash_hdr.hdr;

    memset(guest, 0, sizeof(*guest));
    memcpy(hdr, &frame->hdr, sizeof(frame->hdr));
    if (plan && plan->tunnel) {
        hdr->gso_type |= plan->tunnel == 4 ?
                         VIRTIO_NET_HDR_GSO_UDP_TUNNEL_IPV4 :
                         VIRTIO_NET_HDR_GSO_UDP_TUNNEL_IPV6;
        hdr->flags |= plan->tunnel_sum ?
                      VIRTIO_NET_HDR_F_UDP_TUNNEL_CSUM : 0;
        guest->outer_th_offset = cpu_to_le16(plan->tunnel_l4);
        guest->inner_nh_offset = cpu_to_le16(plan->l3);
    }
}

/* A guest sends into the other TAP. */
static int lab_send_guest(Lab *lab, const Frame *frame, const Plan *plan)
{
    struct virtio_net_hdr_v1_hash_tunnel guest;
    struct iovec iov[] = {
        { &guest, sizeof(guest) },
        { (void *)frame->data, frame->len },
    };
    ssize_t ret;

    put_tunnel_header(&guest, frame, plan);
    ret = writev(lab->from.fd, iov, 2);
    g_assert(ret < 0 || ret == sizeof(guest) + frame->len);
    return ret < 0 ? -errno : 0;
}

static bool tap_set_tunnels(Tap *tap)
{
    int len = sizeof(struct virtio_net_hdr_v1_hash_tunnel);

    if (ioctl(tap->fd, TUNSETOFFLOAD, TUNNEL_OFFLOADS) < 0) {
        g_assert_cmpint(errno, ==, EINVAL);
        g_test_skip("tunnels on a TAP need Linux 6.17");
        return false;
    }
    g_assert_cmpint(ioctl(tap->fd, TUNSETVNETHDRSZ, &len), ==, 0);
    return true;
}

/* With a bridge between two TAPs, of which the first knows tunnels */
static bool lab_new_tunnel(Lab *lab, unsigned offload)
{
    if (!lab_new(lab, offload)) {
        return false;
    }
    tap_new(&lab->from);
    if (!tap_set_tunnels(&lab->from)) {
        lab_free(lab);
        return false;
    }
    if (!bridge_new(lab->bridge)) {
        g_test_skip("the kernel has no bridges");
        lab->bridge[0] = 0;
        lab_free(lab);
        return false;
    }
    bridge_add(lab->bridge, &lab->tap);
    bridge_add(lab->bridge, &lab->from);
    return true;
}

static void compare_tunnels(unsigned offload)
{
    g_autofree Frame *frame = g_new0(Frame, 1);
    unsigned rounds = g_test_slow() ? 20000 : 600;
    Lab lab;

    if (!lab_new_tunnel(&lab, offload)) {
        return;
    }
    for (unsigned i = 0; i < rounds; i++) {
        unsigned count;
        Plan plan;

        plan_random(&plan, true);
        frame_build(frame, &plan);
        count = lab_compare(&lab, frame, &plan, lab_send_guest);
        if (count != plan_count(&plan)) {
            plan_describe(&plan);
        }
        g_assert_cmpuint(count, ==, plan_count(&plan));
    }
    lab_free(&lab);
}

static void test_tunnel_kernel(void)
{
    compare_tunnels(0);
}

static void test_tunnel_kernel_checksum(void)
{
    compare_tunnels(TUN_F_CSUM);
}

static PacketSocket *capture_new(const Tap *tap, unsigned directions)
{
    PacketSocket *ps = packet_socket_new_capture(tap->name, tap->index, -1,
                                                 directions, 4 * MiB, false,
                                                 &error_abort);

    g_assert_true(packet_socket_hook(ps, &error_abort));
    return ps;
}

static void capture_next(PacketSocket *ps, Frame *frame)
{
    ssize_t ret;

    ret = packet_socket_recv(ps, &frame->hdr, frame->data,
                             sizeof(frame->data));
    g_assert_cmpint(ret, >, 0);
    frame->len = ret;
}

static void assert_tunnel_header(
    const struct virtio_net_hdr_v1_hash_tunnel *got,
    const struct virtio_net_hdr_v1_hash_tunnel *want)
{
    struct virtio_net_hdr_v1_hash_tunnel copy = *got;

    /* The kernel's own idea */
    copy.hash_hdr.hdr.hdr_len = want->hash_hdr.hdr.hdr_len;
    g_assert_cmphex(got->hash_hdr.hdr.flags, ==, want->hash_hdr.hdr.flags);
    g_assert_cmphex(got->hash_hdr.hdr.gso_type, ==,
                    want->hash_hdr.hdr.gso_type);
    g_assert_cmpuint(got->outer_th_offset, ==, want->outer_th_offset);
    g_assert_cmpuint(got->inner_nh_offset, ==, want->inner_nh_offset);
    g_assert(!memcmp(&copy, want, sizeof(copy)));
}

/*
 * What a packet socket tells of a frame in a tunnel is less than what the
 * guest has written.
 */
static void test_tunnel_capture(void)
{
    g_autofree Frame *frame = g_new0(Frame, 1), *got = g_new0(Frame, 1);
    PacketSocket *ps;
    Lab lab;

    if (!lab_new_tunnel(&lab, 0)) {
        return;
    }
    ps = capture_new(&lab.from, PACKET_SOCKET_INCOMING);
    for (int i = 0; i < (g_test_slow() ? 20000 : 600); i++) {
        struct virtio_net_hdr_v1_hash_tunnel want, guest;
        struct virtio_net_hdr hdr;
        Plan plan;

        plan_random(&plan, i % 4);
        frame_build(frame, &plan);
        g_assert_cmpint(lab_send_guest(&lab, frame, &plan), ==, 0);
        tap_drain(&lab.tap);
        capture_next(ps, got);
        assert_bytes(got, frame, &plan, 0);
        put_tunnel_header(&want, frame, &plan);
        hdr = got->hdr;
        if (!frame_offload_to_guest(&hdr, got->data, got->len,
                                    (uint8_t *)&guest, sizeof(guest),
                                    false)) {
            plan_describe(&plan);
            g_assert_not_reached();
        }
        assert_tunnel_header(&guest, &want);
        assert_bytes(got, frame, &plan, 0);
        for (size_t len = 0; len < sizeof(guest); len++) {
            if (len == 0 || len >= sizeof(hdr)) {
                hdr = got->hdr;
                g_assert_true(frame_offload_to_guest(&hdr, got->data,
                                                     got->len,
                                                     (uint8_t *)&guest, len,
                                                     false) ==
                              (len && !plan.tunnel));
            }
        }
        /* What was captured can be segmented. */
        if (plan.tunnel) {
            FrameSegments fs;

            segments_new(&fs, got, &plan);
            g_assert_cmpuint(fs.count, ==, plan_count(&plan));
        }
    }
    packet_socket_free(ps);
    lab_free(&lab);
}

/* Without the kernel: in any order, as often as one likes */
static void test_segments_order(void)
{
    g_autofree Frame *frame = g_new0(Frame, 1);
    g_autofree Frame *first = g_new0(Frame, 1), *again = g_new0(Frame, 1);

    for (int i = 0; i < 200; i++) {
        FrameSegments fs;
        Plan plan;

        plan_random(&plan, i & 1);
        frame_build(frame, &plan);
        segments_new(&fs, frame, &plan);
        g_assert_cmpuint(fs.count, ==, plan_count(&plan));
        g_assert_cmpuint(fs.headers, ==, plan.headers);
        g_assert_cmpuint(fs.payload, ==, plan.payload);
        g_assert_cmpuint(fs.size, ==, plan.size);
        segments_check(&fs, frame);
        segment_get(&fs, fs.count - 1, again);
        segment_get(&fs, 0, first);
        segment_get(&fs, fs.count - 1, first);
        assert_bytes(first, again, &plan, fs.count - 1);
    }
}

/*
 * Frames that are not segmented
 */

static void assert_refused(const Frame *frame)
{
    FrameSegments fs;

    g_assert_false(segments_try(&fs, &frame->hdr, frame->data, frame->len));
}

/* A frame of each kind */
static void plan_kind(Plan *plan, unsigned kind)
{
    *plan = (Plan) {
        .version = kind & 1 ? 6 : 4,
        .udp = kind & 2,
        .tags = kind / 4 % 2,
        .options = kind / 4 % 3,
        .tcp_options = 3,
        .payload = 900,
        .size = 200,
        .tunnel = kind / 8 % 3 == 0 ? 0 : kind / 8 % 3 == 1 ? 4 : 6,
        .geneve = kind / 4 % 2,
        .tunnel_options = kind / 4 % 2,
        .tunnel_sum = kind & 1,
    };
}

#define KINDS 24

static void test_refused_truncated(void)
{
    g_autofree Frame *frame = g_new0(Frame, 1);

    for (unsigned kind = 0; kind < KINDS; kind++) {
        FrameSegments fs;
        size_t whole;
        Plan plan;

        plan_kind(&plan, kind);
        frame_build(frame, &plan);
        whole = frame->len;
        for (frame->len = 0; frame->len <= plan.headers; frame->len++) {
            assert_refused(frame);
        }
        /* As to the kernel, a frame is as long as it is. */
        for (; frame->len < whole; frame->len++) {
            if (plan.tunnel) {
                assert_refused(frame);
            } else {
                segments_new(&fs, frame, &plan);
                segments_check(&fs, frame);
            }
        }
        segments_new(&fs, frame, &plan);
    }
}

/* Whatever the frame says: nothing out of bounds, and no byte gets lost. */
static void test_random_headers(void)
{
    g_autofree Frame *frame = g_new0(Frame, 1);
    unsigned rounds = g_test_slow() ? 300000 : 50000, accepted = 0;
    FrameSegments fs;

    for (unsigned i = 0; i < rounds; i++) {
        Plan plan;

        plan_kind(&plan, i % KINDS);
        plan.payload = 1 + pick(900);
        frame_build(frame, &plan);
        for (unsigned j = 0; j <= pick(4); j++) {
            unsigned at = pick(plan.headers + sizeof(frame->hdr));

            if (at < plan.headers) {
                frame->data[at] = pick(2) ? g_test_rand_int() :
                                  frame->data[at] ^ 1 << pick(8);
            } else {
                ((uint8_t *)&frame->hdr)[at - plan.headers] =
                    g_test_rand_int();
            }
        }
        frame->len -= pick(8) ? 0 : pick(frame->len);
        if (segments_try(&fs, &frame->hdr, frame->data, frame->len)) {
            segments_check(&fs, frame);
            accepted++;
        }
    }
    g_assert_cmpuint(accepted, >, rounds / 20);
    g_assert_cmpuint(accepted, <, rounds - rounds / 20);
}

static void test_random_bytes(void)
{
    g_autofree Frame *frame = g_new0(Frame, 1);
    unsigned rounds = g_test_slow() ? 300000 : 50000;
    FrameSegments fs;

    for (unsigned i = 0; i < rounds; i++) {
        Plan plan;

        plan_kind(&plan, i % KINDS);
        frame_build(frame, &plan);
        frame->len = pick(400);
        random_bytes(frame->data, frame->len);
        if (i & 1 && frame->len >= ETH_HLEN) {
            put_ethertype(frame->data + 12, plan.version);
        }
        if (segments_try(&fs, &frame->hdr, frame->data, frame->len)) {
            segments_check(&fs, frame);
        }
    }
}

/* Each changes one thing of a good frame. */
typedef struct Flaw {
    const char *name;
    void (*make)(Frame *frame, const Plan *plan);
    int version;                /* of which it is; 0: of both */
    int udp;                    /* 1: of UDP only, -1: of TCP only */
    bool outer;                 /* no matter inside of a tunnel */
    bool sum;                   /* no matter with the checksum done */
} Flaw;

#define FLAW(name, code)                                        \
    static void flaw_##name(Frame *frame, const Plan *plan)     \
    {                                                           \
        uint8_t *ip = frame->data + plan->l3;                   \
        uint8_t *l4 = frame->data + plan->l4;                   \
        struct virtio_net_hdr *hdr = &frame->hdr;               \
                                                                \
        (void)ip;                                               \
        (void)l4;                                               \
        (void)hdr;                                              \
        code;                                                   \
    }

FLAW(size_0, hdr->gso_size = 0)
FLAW(size_1, hdr->gso_size = 1)
FLAW(size_47, hdr->gso_size = 47)
FLAW(no_gso, hdr->gso_type = VIRTIO_NET_HDR_GSO_NONE)
FLAW(ufo, hdr->gso_type = VIRTIO_NET_HDR_GSO_UDP)
FLAW(unknown, hdr->gso_type = 2)
FLAW(unknown_bits, hdr->gso_type |= 0x18)
FLAW(ecn_only, hdr->gso_type = VIRTIO_NET_HDR_GSO_ECN)
FLAW(other_version, hdr->gso_type ^= 1 ^ 4)
FLAW(other_protocol, hdr->gso_type = plan->udp ?
     (plan->version == 4 ? 1 : 4) : VIRTIO_NET_HDR_GSO_UDP_L4)
FLAW(start_before, hdr->csum_start--)
FLAW(start_after, hdr->csum_start++)
FLAW(start_0, hdr->csum_start = 0)
FLAW(start_ip, hdr->csum_start = plan->l3)
FLAW(start_end, hdr->csum_start = frame->len)
FLAW(start_most, hdr->csum_start = 0xffff)
FLAW(version_0, ip[0] &= 0x0f)
FLAW(version_other, ip[0] ^= 0x20)
FLAW(ethertype, stw_be_p(frame->data + plan->l3 - 2, ETH_P_TEST))
FLAW(ethertype_other, put_ethertype(frame->data + plan->l3 - 2,
                                    plan->version ^ 2))
FLAW(ihl_0, ip[0] = 0x40)
FLAW(ihl_4, ip[0] = 0x44)
FLAW(ihl_more, ip[0]++)
FLAW(ihl_15, ip[0] = 0x4f)
FLAW(fragment_more, ip[6] |= 0x20)
FLAW(fragment_last, ip[7] |= 1)
FLAW(fragment_far, ip[6] |= 0x10)
FLAW(protocol, ip[plan->version == 4 ? 9 : 6] = IPPROTO_ICMP)
FLAW(protocol_esp, ip[plan->version == 4 ? 9 : 6] = IPPROTO_ESP)
FLAW(fragment6_more, ip[6] = IPPROTO_FRAGMENT; ip[43] = 1)
FLAW(fragment6_last, ip[6] = IPPROTO_FRAGMENT; ip[43] = 8)
FLAW(fragment6_far, ip[6] = IPPROTO_FRAGMENT; ip[42] = 0x80)
FLAW(protocol_none, ip[6] = IPPROTO_NONE)
FLAW(hop_by_hop_no_end, ip[6] = IPPROTO_HOPOPTS; ip[41] = 0xff)
FLAW(data_0, l4[12] &= 0x0f)
FLAW(data_4, l4[12] = 0x4f)
FLAW(data_past, l4[12] = 0xff; frame->len = plan->l4 + 59)
FLAW(data_all, l4[12] = 0xff; frame->len = plan->l4 + 60)
FLAW(segments_129, hdr->gso_size = 48;
     frame->len = plan->headers + 48 * UDP_SEGMENTS_MAX + 1)

static const Flaw flaws[] = {
#define ENTRY(name, ...) { #name, flaw_##name, __VA_ARGS__ }
    ENTRY(size_0), ENTRY(size_1), ENTRY(size_47), ENTRY(no_gso), ENTRY(ufo),
    ENTRY(unknown), ENTRY(unknown_bits), ENTRY(ecn_only),
    ENTRY(other_version, .udp = -1), ENTRY(other_protocol),
    ENTRY(start_before, .sum = true), ENTRY(start_after, .sum = true),
    ENTRY(start_0, .sum = true), ENTRY(start_ip, .sum = true),
    ENTRY(start_end, .sum = true), ENTRY(start_most, .sum = true),
    ENTRY(version_0), ENTRY(version_other),
    ENTRY(ethertype, .outer = true), ENTRY(ethertype_other, .outer = true),
    ENTRY(ihl_0, 4), ENTRY(ihl_4, 4), ENTRY(ihl_more, 4, .sum = true),
    ENTRY(ihl_15, 4, .sum = true), ENTRY(fragment_more, 4),
    ENTRY(fragment_last, 4),
    ENTRY(fragment_far, 4), ENTRY(protocol),
    ENTRY(protocol_esp), ENTRY(fragment6_more, 6), ENTRY(fragment6_last, 6),
    ENTRY(fragment6_far, 6), ENTRY(protocol_none, 6),
    ENTRY(hop_by_hop_no_end, 6), ENTRY(data_0, .udp = -1),
    ENTRY(data_4, .udp = -1), ENTRY(data_past, .udp = -1),
    ENTRY(data_all, .udp = -1), ENTRY(segments_129, .udp = 1),
};

static void check_flaw(const Flaw *flaw, unsigned kind, bool sum)
{
    g_autofree Frame *frame = g_new0(Frame, 1);
    FrameSegments fs;
    Plan plan;

    plan_kind(&plan, kind);
    plan.payload = 7000;
    plan.options = !plan.tunnel && plan.version == 6;
    if ((flaw->version && flaw->version != plan.version) ||
        (flaw->udp && plan.udp != (flaw->udp > 0)) ||
        (flaw->outer && plan.tunnel) ||
        /* That is what tells of a tunnel. */
        (!sum && (flaw->sum || plan.tunnel))) {
        return;
    }
    frame_build(frame, &plan);
    if (!sum) {
        frame->hdr.flags = 0;
    }
    segments_new(&fs, frame, &plan);
    flaw->make(frame, &plan);
    if (segments_try(&fs, &frame->hdr, frame->data, frame->len)) {
        plan_describe(&plan);
        g_test_message("%s, checksum to do: %d", flaw->name, sum);
        g_test_fail();
    }
}

static void test_refused_flaws(void)
{
    for (int i = 0; i < ARRAY_SIZE(flaws); i++) {
        for (unsigned kind = 0; kind < KINDS; kind++) {
            check_flaw(&flaws[i], kind, true);
            check_flaw(&flaws[i], kind, false);
        }
    }
}

/* What looks like the IP header begins in the header of UDP around it. */
static void test_refused_overlap(void)
{
    g_autofree Frame *frame = g_new0(Frame, 1);

    for (int version = 4; version <= 6; version += 2) {
        uint8_t guest[FRAME_OFFLOAD_MAX_HEADER], *udp;
        Plan plan = {
            .version = version, .udp = true, .payload = 300, .size = 100,
        };

        frame_build(frame, &plan);
        udp = frame->data + plan.l4;
        udp[0] = 0x47;
        stw_be_p(udp + 2, frame->len - plan.l4);
        udp[9] = IPPROTO_UDP;
        memset(udp + 10, 0, 20);
        frame->hdr.csum_start = plan.l4 + 28;
        assert_refused(frame);
        g_assert_false(frame_offload_to_guest(&frame->hdr, frame->data,
                                              frame->len, guest,
                                              sizeof(guest), false));
    }
}

/* The header of TCP is longer than what there is. */
static void test_tunnel_cut(void)
{
    g_autofree Frame *frame = g_new0(Frame, 1);

    for (unsigned kind = 8; kind < KINDS; kind++) {
        uint8_t guest[FRAME_OFFLOAD_MAX_HEADER];
        Plan plan;

        plan_kind(&plan, kind);
        if (plan.udp) {
            continue;
        }
        plan.tcp_options = 0;
        plan.payload = 39;
        frame_build(frame, &plan);
        frame->data[plan.l4 + 12] = 0xf0;
        assert_refused(frame);
        g_assert_false(frame_offload_to_guest(&frame->hdr, frame->data,
                                              frame->len, guest,
                                              sizeof(guest), false));
    }
}

/* What follows from the frame is not taken from the header. */
static void test_ignored(void)
{
    g_autofree Frame *frame = g_new0(Frame, 1);
    g_autofree Frame *good = g_new0(Frame, 1), *got = g_new0(Frame, 1);

    for (unsigned kind = 0; kind < KINDS; kind++) {
        for (unsigned i = 0; i < 7; i++) {
            FrameSegments fs, good_fs;
            Plan plan;

            plan_kind(&plan, kind);
            frame_build(frame, &plan);
            segments_new(&good_fs, frame, &plan);
            segment_get(&good_fs, 1, good);
            switch (i) {
            case 0:
                frame->hdr.hdr_len = 0;
                break;
            case 1:
                frame->hdr.hdr_len = 0xffff;
                break;
            case 2:
                frame->hdr.csum_offset = 0;
                break;
            case 3:
                frame->hdr.csum_offset = 0xffff;
                break;
            case 4:
                frame->hdr.flags |= VIRTIO_NET_HDR_F_DATA_VALID;
                break;
            case 5:
                frame->hdr.gso_type |= VIRTIO_NET_HDR_GSO_ECN;
                break;
            case 6:
                /* As a guest's header says it */
                frame->hdr.gso_type |= !plan.tunnel ? 0 : plan.tunnel == 4 ?
                    VIRTIO_NET_HDR_GSO_UDP_TUNNEL_IPV4 :
                    VIRTIO_NET_HDR_GSO_UDP_TUNNEL_IPV6;
                break;
            }
            segments_new(&fs, frame, &plan);
            g_assert_cmpuint(fs.count, ==, good_fs.count);
            segment_get(&fs, 1, got);
            assert_bytes(got, good, &plan, 1);
        }
    }
}

/* A frame that is in no tunnel, whatever its header says */
static void test_refused_no_tunnel(void)
{
    g_autofree Frame *frame = g_new0(Frame, 1);

    for (unsigned kind = 0; kind < 8; kind++) {
        FrameSegments fs;
        Plan plan;

        plan_kind(&plan, kind);
        frame_build(frame, &plan);
        segments_new(&fs, frame, &plan);
        frame->hdr.gso_type |= kind & 4 ? VIRTIO_NET_HDR_GSO_UDP_TUNNEL_IPV4 :
                                          VIRTIO_NET_HDR_GSO_UDP_TUNNEL_IPV6;
        assert_refused(frame);
    }
}

/* What is just still good */
static void test_limits(void)
{
    g_autofree Frame *frame = g_new0(Frame, 1);
    FrameSegments fs;
    Plan plan;

    plan_kind(&plan, 2);
    plan.size = 48;
    plan.payload = 48 * UDP_SEGMENTS_MAX;
    frame_build(frame, &plan);
    segments_new(&fs, frame, &plan);
    g_assert_cmpuint(fs.count, ==, UDP_SEGMENTS_MAX);
    segments_check(&fs, frame);

    /* The longest headers, and those that are longer by one word */
    for (unsigned words = 0; words <= 10; words++) {
        for (unsigned options = 0; options < 40; options++) {
            plan_kind(&plan, 1);
            plan.tcp_options = words;
            plan.options = options;
            frame_build(frame, &plan);
            if (plan.headers > FRAME_SEGMENTS_MAX_HEADERS) {
                assert_refused(frame);
            } else {
                segments_new(&fs, frame, &plan);
                segments_check(&fs, frame);
            }
        }
    }
}

/*
 * Headers
 */

/* What is in a header of each length, from its beginning */
static void put_header(uint8_t *guest, size_t len,
                       const struct virtio_net_hdr *hdr, bool swap)
{
    uint16_t fields[] = {
        hdr->hdr_len, hdr->gso_size, hdr->csum_start, hdr->csum_offset,
    };

    memset(guest, 0, len);
    guest[0] = hdr->flags;
    guest[1] = hdr->gso_type;
    for (int i = 0; i < ARRAY_SIZE(fields); i++) {
        uint16_t field = swap ? bswap16(fields[i]) : fields[i];

        memcpy(guest + 2 + 2 * i, &field, 2);
    }
}

static const uint8_t gso_types[] = {
    VIRTIO_NET_HDR_GSO_NONE,
    VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV4 | VIRTIO_NET_HDR_GSO_ECN,
    VIRTIO_NET_HDR_GSO_UDP,
    VIRTIO_NET_HDR_GSO_TCPV6,
    VIRTIO_NET_HDR_GSO_TCPV6 | VIRTIO_NET_HDR_GSO_ECN,
    VIRTIO_NET_HDR_GSO_UDP_L4,
};

static void test_from_guest(void)
{
    for (size_t len = 0; len <= 30; len++) {
        for (int i = 0; i < 200; i++) {
            bool swap = i & 1, ok;
            struct virtio_net_hdr hdr, want;
            uint8_t *guest = fence_room(FENCE_HEADER, len);
            uint8_t was[30];

            random_bytes(was, len);
            if (len > 1) {
                was[0] &= 3;
                was[1] = gso_types[pick(ARRAY_SIZE(gso_types))] |
                         pick(4) << 5;
            }
            memcpy(guest, was, len);
            memset(&hdr, 0x5a, sizeof(hdr));
            ok = frame_offload_from_guest(&hdr, guest, len, swap);
            g_assert(!memcmp(guest, was, len));
            g_assert_true(ok == (!len || (len >= 10 && len <= 24)));
            if (!ok) {
                continue;
            }
            memset(&want, 0, sizeof(want));
            if (len) {
                memcpy(&want, was, sizeof(want));
                if (swap) {
                    want.hdr_len = bswap16(want.hdr_len);
                    want.gso_size = bswap16(want.gso_size);
                    want.csum_start = bswap16(want.csum_start);
                    want.csum_offset = bswap16(want.csum_offset);
                }
            }
            g_assert(!memcmp(&hdr, &want, sizeof(hdr)));
        }
    }
}

/* There and back.  The rest of a longer header is 0. */
static void test_to_guest(void)
{
    g_autofree Frame *frame = g_new0(Frame, 1);

    for (size_t len = 10; len <= FRAME_OFFLOAD_MAX_HEADER; len++) {
        for (int i = 0; i < 2 * KINDS; i++) {
            bool swap = i & 1;
            struct virtio_net_hdr hdr, back;
            uint8_t *guest, *data, want[FRAME_OFFLOAD_MAX_HEADER];
            Plan plan;

            plan_kind(&plan, i / 2);
            plan.tunnel = 0;
            frame_build(frame, &plan);
            if (i % 3 == 0) {
                frame->hdr.gso_type = VIRTIO_NET_HDR_GSO_NONE;
                frame->hdr.gso_size = g_test_rand_int();
                frame->hdr.hdr_len = g_test_rand_int();
            }
            frame->hdr.flags |= i % 5 ? 0 : VIRTIO_NET_HDR_F_DATA_VALID;
            if (i % 7 == 0) {
                frame->hdr.flags &= ~VIRTIO_NET_HDR_F_NEEDS_CSUM;
                frame->hdr.csum_start = 0;
            }
            hdr = frame->hdr;
            data = fence_copy(FENCE_FRAME, frame->data, frame->len);
            guest = fence_room(FENCE_HEADER, len);
            g_assert_true(frame_offload_to_guest(&hdr, data, frame->len,
                                                 guest, len, swap));
            fence_check(guest);
            /* The checksum is left to the guest. */
            g_assert(!memcmp(data, frame->data, frame->len));
            g_assert(!memcmp(&hdr, &frame->hdr, sizeof(hdr)));
            put_header(want, len, &hdr, swap);
            g_assert(!memcmp(guest, want, len));
            g_assert_true(frame_offload_from_guest(&back, guest, len, swap));
            g_assert(!memcmp(&back, &hdr, sizeof(hdr)));
        }
    }
}

/* As if captured.  The fields of tunnels are always little endian. */
static void test_tunnel_short(void)
{
    g_autofree Frame *frame = g_new0(Frame, 1);

    for (unsigned kind = 8; kind < KINDS; kind++) {
        for (size_t len = 0; len <= FRAME_OFFLOAD_MAX_HEADER; len++) {
            for (int swap = 0; swap < 2; swap++) {
                struct virtio_net_hdr_v1_hash_tunnel want;
                struct virtio_net_hdr hdr;
                uint8_t *guest;
                Plan plan;

                if (len && len < sizeof(hdr)) {
                    continue;
                }
                plan_kind(&plan, kind);
                frame_build(frame, &plan);
                hdr = frame->hdr;
                guest = fence_room(FENCE_HEADER, len);
                g_assert_true(frame_offload_to_guest(&hdr, frame->data,
                                                     frame->len, guest, len,
                                                     swap) ==
                              (len == TUNNEL_HEADER));
                fence_check(guest);
                if (len == TUNNEL_HEADER) {
                    struct virtio_net_hdr full;

                    put_tunnel_header(&want, frame, &plan);
                    memcpy(&full, &want, sizeof(full));
                    put_header((uint8_t *)&want, sizeof(full), &full, swap);
                    g_assert(!memcmp(guest, &want, len));
                }

                /* Not to be segmented: nothing to be told */
                hdr = frame->hdr;
                hdr.gso_type = VIRTIO_NET_HDR_GSO_NONE;
                g_assert_true(frame_offload_to_guest(&hdr, frame->data,
                                                     frame->len, guest, len,
                                                     swap));
            }
        }
    }
}

/* In the addresses of IPv6 is what looks like a header of IPv4. */
static void test_tunnel_addresses(void)
{
    g_autofree Frame *frame = g_new0(Frame, 1);
    struct virtio_net_hdr_v1_hash_tunnel guest, want;
    FrameSegments fs;
    uint8_t *fake;
    Plan plan = {
        .version = 6, .payload = 900, .size = 200, .tunnel = 4,
    };

    frame_build(frame, &plan);
    fake = frame->data + plan.l4 - 20;
    fake[0] = 0x45;
    stw_be_p(fake + 2, frame->len - (plan.l4 - 20));
    stw_be_p(fake + 6, 0);
    fake[9] = IPPROTO_TCP;
    put_tunnel_header(&want, frame, &plan);
    g_assert_true(frame_offload_to_guest(&frame->hdr, frame->data, frame->len,
                                         (uint8_t *)&guest, sizeof(guest),
                                         false));
    assert_tunnel_header(&guest, &want);
    segments_new(&fs, frame, &plan);
    segments_check(&fs, frame);
}

/* A UDP frame that is to be cut itself, with a tunnel's frame inside */
static void test_tunnel_like(void)
{
    g_autofree Frame *frame = g_new0(Frame, 1);

    for (unsigned kind = 8; kind < KINDS; kind++) {
        uint8_t guest[FRAME_OFFLOAD_MAX_HEADER], want[sizeof(guest)];
        struct virtio_net_hdr hdr;
        FrameSegments fs;
        Plan plan;

        plan_kind(&plan, kind);
        frame_build(frame, &plan);
        frame->hdr.gso_type = VIRTIO_NET_HDR_GSO_UDP_L4;
        frame->hdr.csum_start = plan.tunnel_l4;
        frame->hdr.csum_offset = 6;
        hdr = frame->hdr;
        g_assert_true(frame_offload_to_guest(&hdr, frame->data, frame->len,
                                             guest, sizeof(guest), false));
        put_header(want, sizeof(want), &frame->hdr, false);
        g_assert(!memcmp(guest, want, sizeof(want)));
        segments_new(&fs, frame, &plan);
        g_assert_cmpuint(fs.headers, ==, plan.tunnel_l4 + 8);
        segments_check(&fs, frame);
    }
}

/* Without a header a frame must be done. */
static void test_to_guest_without(void)
{
    g_autofree Frame *frame = g_new0(Frame, 1);

    for (int i = 0; i < ARRAY_SIZE(gso_types); i++) {
        for (int swap = 0; swap < 2; swap++) {
            Plan plan;

            plan_kind(&plan, 0);
            plan.payload = 101;
            frame_build(frame, &plan);
            frame->hdr.gso_type = gso_types[i];
            g_assert_true(frame_offload_to_guest(&frame->hdr, frame->data,
                                                 frame->len, NULL, 0, swap)
                          == !gso_types[i]);
        }
    }
}

/* Returns: the sum that is to be at @offset of what begins at @start */
static uint16_t sum_wanted(const uint8_t *data, size_t len, size_t start,
                           size_t offset)
{
    g_autofree uint8_t *copy = g_memdup2(data + start, len - start);
    uint16_t sum = ~sum_bytes(copy, len - start);

    return sum ?: 0xffff;
}

static void test_checksum(void)
{
    for (int i = 0; i < (g_test_slow() ? 200000 : 20000); i++) {
        size_t len = 2 + pick(200), start = pick(len - 1);
        size_t offset = pick(len - start - 1);
        uint8_t was[202], *data;
        struct virtio_net_hdr hdr = {
            .flags = VIRTIO_NET_HDR_F_NEEDS_CSUM |
                     (i & 1 ? VIRTIO_NET_HDR_F_DATA_VALID : 0),
            .csum_start = start,
            .csum_offset = offset,
        };

        random_bytes(was, len);
        if (i % 3 == 0) {
            /* So that 0 is to be written, in the order of the bytes there */
            size_t at = start + (offset >= 2 ? 0 : 2);
            uint16_t sum;

            if (at + 2 <= len) {
                stw_be_p(was + at, 0);
                sum = ~sum_bytes(was + start, len - start);
                stw_be_p(was + at, sum);
            }
        }
        data = fence_copy(FENCE_FRAME, was, len);
        g_assert_true(frame_offload_to_guest(&hdr, data, len, NULL, 0,
                                             i & 2));
        fence_check(data);
        g_assert_cmphex(hdr.flags, ==,
                        i & 1 ? VIRTIO_NET_HDR_F_DATA_VALID : 0);
        stw_be_p(was + start + offset,
                 sum_wanted(was, len, start, offset));
        g_assert(!memcmp(data, was, len));
    }
}

static void test_checksum_outside(void)
{
    for (size_t len = 0; len < 40; len++) {
        for (unsigned i = 0; i < 50 * 50; i++) {
            unsigned start = i / 50, offset = i % 50;
            struct virtio_net_hdr hdr = {
                .flags = VIRTIO_NET_HDR_F_NEEDS_CSUM,
                .csum_start = start > 45 ? 0xffff - (start - 46) : start,
                .csum_offset = offset > 45 ? 0xffff - (offset - 46) : offset,
            };
            size_t end = (size_t)hdr.csum_start + hdr.csum_offset + 2;
            uint8_t was[40], *data;

            random_bytes(was, len);
            data = fence_copy(FENCE_FRAME, was, len);
            g_assert_true(frame_offload_to_guest(&hdr, data, len, NULL, 0,
                                                 false) == (end <= len));
            fence_check(data);
            if (end > len) {
                g_assert(!len || !memcmp(data, was, len));
            }
        }
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    enter_namespace();

#define TEST(name, function) g_test_add_func("/frame-offload/" name, function)
    TEST("segments/kernel", test_segments_kernel);
    TEST("segments/kernel-checksum", test_segments_kernel_checksum);
    TEST("segments/kernel-tunnel", test_tunnel_kernel);
    TEST("segments/kernel-tunnel-checksum", test_tunnel_kernel_checksum);
    TEST("segments/order", test_segments_order);
    TEST("segments/limits", test_limits);
    TEST("segments/refused/truncated", test_refused_truncated);
    TEST("segments/refused/flaws", test_refused_flaws);
    TEST("segments/refused/overlap", test_refused_overlap);
    TEST("segments/refused/no-tunnel", test_refused_no_tunnel);
    TEST("segments/ignored", test_ignored);
    TEST("segments/random/headers", test_random_headers);
    TEST("segments/random/bytes", test_random_bytes);
    TEST("header/from-guest", test_from_guest);
    TEST("header/to-guest", test_to_guest);
    TEST("header/tunnel/capture", test_tunnel_capture);
    TEST("header/tunnel/short", test_tunnel_short);
    TEST("header/tunnel/addresses", test_tunnel_addresses);
    TEST("header/tunnel/cut", test_tunnel_cut);
    TEST("header/tunnel/like", test_tunnel_like);
    TEST("header/none", test_to_guest_without);
    TEST("checksum/random", test_checksum);
    TEST("checksum/outside", test_checksum_outside);
    return g_test_run();
}
