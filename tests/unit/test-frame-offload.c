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

#define TCP_ACK 0x10
#define TCP_CWR 0x80

/* In place of 0, which stands for what is usual */
#define NO_FLAGS 0x100
#define NO_FRAGMENT 0xffff

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
    uint16_t tcp_flags;
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

/*
 * Memory that ends at a page that may not be touched
 */

#define FENCE_SIZE (128 * 1024)
#define FENCE_BEFORE 64

/* Each has its own: the frame, the room for a segment, and a header. */
enum { FENCE_FRAME, FENCE_SEGMENT, FENCE_HEADER, FENCES };

static uint8_t *fence_room(int which, size_t len)
{
    static uint8_t *fences[FENCES];
    uint8_t *room;

    if (!fences[which]) {
        uint8_t *map = mmap(NULL, FENCE_SIZE + qemu_real_host_page_size(),
                            PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

        g_assert_true(map != MAP_FAILED);
        g_assert_cmpint(mprotect(map + FENCE_SIZE, qemu_real_host_page_size(),
                                 PROT_NONE), ==, 0);
        fences[which] = map;
    }
    g_assert_cmpuint(len + FENCE_BEFORE, <=, FENCE_SIZE);
    room = fences[which] + FENCE_SIZE - len;
    memset(room - FENCE_BEFORE, 0x5a, FENCE_BEFORE + len);
    return room;
}

static uint8_t *fence_copy(int which, const void *data, size_t len)
{
    return memcpy(fence_room(which, len), data, len);
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

/* Returns: the length of the header.  What follows from that is put later. */
static size_t put_ip(uint8_t *ip, int version, unsigned options,
                     uint16_t fragment, uint8_t protocol)
{
    static const uint8_t types[] = {
        IPPROTO_HOPOPTS, IPPROTO_ROUTING, IPPROTO_DSTOPTS,
    };
    uint8_t *next = ip + 6;
    size_t len = 40;

    if (version == 4) {
        ip[0] = 0x45 + options;
        stw_be_p(ip + 6, fragment);
        ip[9] = protocol;
        return 20 + options * 4;
    }
    ip[0] = 0x60 | (ip[0] & 0xf);
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
    return len;
}

/* @len is from the header on. */
static void put_ip_len(uint8_t *ip, size_t len)
{
    if (ip[0] >> 4 == 4) {
        stw_be_p(ip + 2, len);
        stw_be_p(ip + 10, 0);
        stw_be_p(ip + 10, ~sum_bytes(ip, (ip[0] & 0xf) * 4));
    } else {
        stw_be_p(ip + 4, len - 40);
    }
}

static void put_udp_len(uint8_t *udp, const uint8_t *ip, size_t len)
{
    stw_be_p(udp + 4, len);
    stw_be_p(udp + 6, sum_pseudo(ip, len, IPPROTO_UDP));
}

static void put_ethertype(uint8_t *data, int version)
{
    stw_be_p(data, version == 4 ? ETH_P_IP : ETH_P_IPV6);
}

/* Returns: the length from UDP to the Ethernet addresses inside of it */
static size_t put_tunnel(uint8_t *udp, const Plan *plan)
{
    stw_be_p(udp + 2, plan->geneve ? PORT_GENEVE : PORT_VXLAN);
    if (!plan->geneve) {
        stl_be_p(udp + 8, 0x08000000);
        return 8 + 8;
    }
    udp[8] = plan->tunnel_options;
    udp[9] = 0;
    stw_be_p(udp + 10, ETH_P_TEB);
    return 8 + 8 + plan->tunnel_options * 4;
}

/* All bytes that nothing is said about are random. */
static void frame_build(Frame *frame, Plan *plan)
{
    size_t tcp_len = 20 + plan->tcp_options * 4;
    size_t l4_len = (plan->udp ? 8 : tcp_len) + plan->payload;
    size_t pos = 12;
    uint8_t *data = frame->data, *ip, *l4;

    random_bytes(data, MIN(sizeof(frame->data), 600 + l4_len));
    data[0] = 0x52;
    data[6] = 0x52;
    for (unsigned i = 0; i < plan->tags; i++) {
        stw_be_p(data + pos, i + 1 < plan->tags ? ETH_P_8021AD : ETH_P_8021Q);
        pos += 4;
    }
    if (plan->tunnel) {
        put_ethertype(data + pos, plan->tunnel);
        plan->tunnel_l3 = pos + 2;
        plan->tunnel_l4 = plan->tunnel_l3 +
                          put_ip(data + plan->tunnel_l3, plan->tunnel,
                                 plan->tunnel_options, plan->fragment,
                                 IPPROTO_UDP);
        pos = plan->tunnel_l4 + put_tunnel(data + plan->tunnel_l4, plan) + 12;
    }
    put_ethertype(data + pos, plan->version);
    plan->l3 = pos + 2;
    ip = data + plan->l3;
    if (plan->version == 4) {
        stw_be_p(ip + 4, plan->id);
    }
    plan->l4 = plan->l3 + put_ip(ip, plan->version, plan->options,
                                 plan->fragment,
                                 plan->udp ? IPPROTO_UDP : IPPROTO_TCP);
    l4 = data + plan->l4;
    plan->headers = plan->l4 + l4_len - plan->payload;
    frame->len = plan->l4 + l4_len;
    g_assert_cmpuint(frame->len, <=, FRAME_MAX);
    put_ip_len(ip, frame->len - plan->l3);
    if (plan->udp) {
        put_udp_len(l4, ip, l4_len);
    } else {
        stl_be_p(l4 + 4, plan->seq);
        l4[12] = tcp_len / 4 << 4 | (l4[12] & 0xf);
        l4[13] = plan->tcp_flags;
        stw_be_p(l4 + 16, sum_pseudo(ip, l4_len, IPPROTO_TCP));
    }
    if (plan->tunnel) {
        uint8_t *udp = data + plan->tunnel_l4;

        ip = data + plan->tunnel_l3;
        put_ip_len(ip, frame->len - plan->tunnel_l3);
        put_udp_len(udp, ip, frame->len - plan->tunnel_l4);
        if (!plan->tunnel_sum) {
            stw_be_p(udp + 6, 0);
        }
    }

    frame->hdr = (struct virtio_net_hdr) {
        .flags = plan->no_sum ? 0 : VIRTIO_NET_HDR_F_NEEDS_CSUM,
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

static unsigned plan_count(const Plan *plan)
{
    return DIV_ROUND_UP(plan->payload, plan->size);
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

/* Segment @index of the frame */
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

static bool finish_checksum(Frame *frame)
{
    return frame_offload_to_guest(&frame->hdr, frame->data, frame->len, NULL,
                                  0, false);
}

/*
 * Our segments
 */

/* Returns: what frame_segments_init() does, with all it gets fenced */
static bool segments_try(FrameSegments *fs, const Frame *frame)
{
    uint8_t *data = fence_copy(FENCE_FRAME, frame->data, frame->len);
    bool ok;

    memset(fs, 0x5a, sizeof(*fs));
    ok = frame_segments_init(fs, &frame->hdr, data, frame->len);
    fence_check(data);
    g_assert_cmpmem(data, frame->len, frame->data, frame->len);
    return ok;
}

/* The frame is cut as it is planned. */
static void segments_new(FrameSegments *fs, const Frame *frame,
                         const Plan *plan)
{
    if (!segments_try(fs, frame) || fs->count != plan_count(plan) ||
        fs->at.headers != plan->headers || fs->payload != plan->payload ||
        fs->size != plan->size) {
        plan_describe(plan);
        g_assert_not_reached();
    }
}

static void segment_get(const FrameSegments *fs, unsigned index,
                        Frame *segment)
{
    size_t room = fs->at.headers + fs->size;
    uint8_t *buf = fence_room(FENCE_SEGMENT, room);

    g_assert_cmpuint(index, <, fs->count);
    memset(&segment->hdr, 0x5a, sizeof(segment->hdr));
    segment->len = frame_segments_get(fs, index, buf, &segment->hdr);
    fence_check(buf);
    g_assert_cmpuint(segment->len, >, fs->at.headers);
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

    g_assert_cmpuint(fs->at.headers + fs->payload, <=, frame->len);
    g_assert_cmpuint(fs->at.headers, <=, FRAME_SEGMENTS_MAX_HEADERS);
    g_assert_cmpuint(fs->count, >, 0);
    for (unsigned i = 0; i < fs->count; i++) {
        size_t part;

        segment_get(fs, i, segment);
        part = segment->len - fs->at.headers;
        g_assert_cmpuint(part, ==, MIN(fs->size, fs->payload - payload));
        g_assert(!memcmp(segment->data + fs->at.headers,
                         frame->data + fs->at.headers + payload, part));
        payload += part;
        g_assert_true(finish_checksum(segment));
    }
    g_assert_cmpuint(payload, ==, fs->payload);
}

/* Returns: whether the frame is segmented; if so, nothing gets lost. */
static bool segments_good(const Frame *frame)
{
    FrameSegments fs;

    if (!segments_try(&fs, frame)) {
        return false;
    }
    segments_check(&fs, frame);
    return true;
}

/* With the longest header for the guest, too */
static void assert_refused(Frame *frame)
{
    uint8_t guest[FRAME_OFFLOAD_MAX_HEADER];

    g_assert_false(segments_good(frame));
    g_assert_false(frame_offload_to_guest(&frame->hdr, frame->data, frame->len,
                                          guest, sizeof(guest), false));
}

/*
 * The kernel's segments
 */

typedef struct Lab {
    Tap tap;                    /* whose reader gets segments */
    Tap guest;                  /* with tunnels: what a guest sends here ... */
    char bridge[IFNAMSIZ];      /* ... goes over this to @tap */
} Lab;

#define TUNNEL_OFFLOADS                                                     \
    (TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_USO4 | TUN_F_USO6 |       \
     TUN_F_UDP_TUNNEL_GSO | TUN_F_UDP_TUNNEL_GSO_CSUM)

static void lab_free(Lab *lab)
{
    tap_delete(&lab->tap);
    tap_delete(&lab->guest);
    if (lab->bridge[0]) {
        bridge_delete(lab->bridge);
    }
}

static bool lab_add_guest(Lab *lab)
{
    int len = TUNNEL_HEADER;

    tap_new(&lab->guest);
    if (ioctl(lab->guest.fd, TUNSETOFFLOAD, TUNNEL_OFFLOADS) < 0) {
        g_assert_cmpint(errno, ==, EINVAL);
        g_test_skip("tunnels on a TAP need Linux 6.17");
        return false;
    }
    g_assert_cmpint(ioctl(lab->guest.fd, TUNSETVNETHDRSZ, &len), ==, 0);
    if (!bridge_new(lab->bridge)) {
        g_test_skip("the kernel has no bridges");
        lab->bridge[0] = 0;
        return false;
    }
    bridge_add(lab->bridge, &lab->tap);
    bridge_add(lab->bridge, &lab->guest);
    return true;
}

/* @offload: what the reader of the TAP can do */
static bool lab_new(Lab *lab, unsigned offload, bool tunnel)
{
    if (!can_run()) {
        return false;
    }
    *lab = (Lab) { .guest.fd = -1 };
    tap_new(&lab->tap);
    tap_set_offload(&lab->tap, offload);
    /* All segments of the longest frame wait there at once. */
    set_queue_len(&lab->tap, 4096);
    if (tunnel && !lab_add_guest(lab)) {
        lab_free(lab);
        return false;
    }
    return true;
}

static void swap_header(struct virtio_net_hdr *hdr)
{
    bswap16s(&hdr->hdr_len);
    bswap16s(&hdr->gso_size);
    bswap16s(&hdr->csum_start);
    bswap16s(&hdr->csum_offset);
}

/* The header of a guest that knows tunnels, whose fields are little endian */
static void put_header(struct virtio_net_hdr_v1_hash_tunnel *guest,
                       const Frame *frame, const Plan *plan, bool swap)
{
    struct virtio_net_hdr hdr = frame->hdr;

    memset(guest, 0, sizeof(*guest));
    if (plan->tunnel) {
        hdr.gso_type |= plan->tunnel == 4 ?
                        VIRTIO_NET_HDR_GSO_UDP_TUNNEL_IPV4 :
                        VIRTIO_NET_HDR_GSO_UDP_TUNNEL_IPV6;
        hdr.flags |= plan->tunnel_sum ? VIRTIO_NET_HDR_F_UDP_TUNNEL_CSUM : 0;
        guest->outer_th_offset = cpu_to_le16(plan->tunnel_l4);
        guest->inner_nh_offset = cpu_to_le16(plan->l3);
    }
    if (swap) {
        swap_header(&hdr);
    }
    memcpy(guest, &hdr, sizeof(hdr));
}

/*
 * The guest sends, or else a packet socket does, and through a queueing
 * discipline, so that the kernel segments.
 */
static bool lab_send(Lab *lab, const Frame *frame, const Plan *plan)
{
    struct virtio_net_hdr_v1_hash_tunnel guest;
    struct iovec iov[] = {
        { &guest, sizeof(guest) },
        { (void *)frame->data, frame->len },
    };

    if (lab->guest.fd < 0) {
        return frame_write(lab->tap.sender, frame);
    }
    put_header(&guest, frame, plan, false);
    return writev(lab->guest.fd, iov, 2) == sizeof(guest) + frame->len;
}

/* Behind the segments, to tell that there are no more */
static void lab_send_marker(Lab *lab)
{
    g_autofree Frame *frame = g_new0(Frame, 1);
    Plan none = {};

    frame->len = 60;
    memset(frame->data, 0x52, frame->len);
    frame->data[6] = 0;
    stw_be_p(frame->data + 12, ETH_P_TEST);
    g_assert_true(lab_send(lab, frame, &none));
}

/* TCP may write a sum of 0 either way. */
static void unify_zero(Frame *frame, const Plan *plan)
{
    uint8_t *sum = frame->data + plan->l4 + 16;

    if (!plan->udp && !lduw_be_p(sum)) {
        stw_be_p(sum, 0xffff);
    }
}

/* Before Linux 6.2 a packet socket refuses this kind. */
static bool knows_uso(Lab *lab)
{
    static int knows = -1;

    if (knows < 0) {
        g_autofree Frame *frame = g_new0(Frame, 1);
        Plan plan = { .version = 4, .udp = true, .payload = 300, .size = 100 };

        frame_build(frame, &plan);
        knows = frame_write(lab->tap.sender, frame);
        tap_drain(&lab->tap);
        if (!knows) {
            g_test_message("this kernel segments no UDP from a packet socket");
        }
    }
    return knows;
}

/* The kernel's segments are ours. */
static void lab_compare(Lab *lab, Plan *plan)
{
    g_autofree Frame *frame = g_new0(Frame, 1);
    g_autofree Frame *got = g_new0(Frame, 1), *ours = g_new0(Frame, 1);
    unsigned count = 0;
    FrameSegments fs;

    if (plan->udp && (plan_count(plan) > 64 || plan->no_sum ||
                      !knows_uso(lab))) {
        return;
    }
    frame_build(frame, plan);
    segments_new(&fs, frame, plan);
    lab_send(lab, frame, plan);
    lab_send_marker(lab);
    while (tap_read(&lab->tap, got),
           lduw_be_p(got->data + 12) != ETH_P_TEST) {
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
    if (count != fs.count) {
        plan_describe(plan);
        g_assert_cmpuint(count, ==, fs.count);
    }
}

/* A frame of each; the rest as in most frames */
static const Plan plans[] = {
    { "plain" },
    { "exact", .payload = 5000 },
    { "last of 1", .payload = 5001 },
    { "last lacks 1", .payload = 4999 },
    { "odd size", .size = 999 },
    { "FIN PSH", .tcp_flags = 0x19 },
    { "FIN", .tcp_flags = 0x11 },
    { "PSH", .tcp_flags = 0x18 },
    { "CWR", .tcp_flags = 0x90 },
    { "ECE", .tcp_flags = 0x50 },
    { "all flags", .tcp_flags = 0xff },
    { "no flags", .tcp_flags = NO_FLAGS },
    { "one tag", .tags = 1 },
    { "QinQ", .tags = 2 },
    { "options", .options = 1 },
    { "two options", .options = 2 },
    { "three options", .options = 3 },
    { "most options", .options = 10, .tcp_options = 10 },
    { "TCP options", .tcp_options = 3 },
    { "all of them", .tags = 2, .options = 3, .tcp_options = 10,
      .tcp_flags = 0x98 },
    { "id wraps", .id = 0xfffe },
    { "seq wraps", .seq = 0xfffffe00 },
    { "seq wraps to 0", .seq = -1000 },
    { "no DF", .fragment = NO_FRAGMENT },
    { "one segment", .payload = 300, .tcp_flags = 0x19 },
    { "one whole segment", .payload = 1000, .tcp_flags = 0x19 },
    { "no checksum", .no_sum = true },
    { "longest", .payload = 65000 },
    { "smallest size", .size = 48 },
};

static void plan_fill(Plan *plan, const Plan *template, int version, bool udp)
{
    *plan = *template;
    plan->version = version;
    plan->udp = udp;
    plan->payload = plan->payload ?: 5600;
    plan->size = plan->size ?: 1000;
    plan->tcp_flags = plan->tcp_flags ?: TCP_ACK;
    plan->id = plan->id ?: g_test_rand_int();
    plan->seq = plan->seq ?: g_test_rand_int();
    plan->fragment = plan->fragment == NO_FRAGMENT ? 0 : 0x4000;
}

static void plan_random(Plan *plan, bool tunnel)
{
    size_t most = 65000 - 14 - 8 - 400;

    *plan = (Plan) {
        .version = pick(2) ? 4 : 6,
        .udp = pick(2),
        .tags = pick(3),
        .options = pick(2) ? pick(11) : 0,
        .tcp_options = pick(2) ? pick(11) : 0,
        .size = 48 + pick(pick(2) ? 200 : 9000),
        .tcp_flags = pick(0x100),
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

#define KERNEL_CHECKSUM 1       /* the guest finishes checksums */
#define KERNEL_TUNNEL 2         /* frames in a UDP tunnel */

static void test_segments_kernel(gconstpointer data)
{
    unsigned flags = GPOINTER_TO_UINT(data);
    bool tunnel = flags & KERNEL_TUNNEL;
    Plan plan;
    Lab lab;

    if (!lab_new(&lab, flags & KERNEL_CHECKSUM ? TUN_F_CSUM : 0, tunnel)) {
        return;
    }
    for (int i = 0; i < 4 * ARRAY_SIZE(plans) && !tunnel; i++) {
        plan_fill(&plan, &plans[i / 4], i & 1 ? 6 : 4, i & 2);
        lab_compare(&lab, &plan);
    }
    for (int i = 0; i < (g_test_slow() ? 1000 : 250); i++) {
        plan_random(&plan, tunnel);
        lab_compare(&lab, &plan);
    }
    lab_free(&lab);
}

/*
 * Frames that are not segmented
 */

/* A frame of each kind */
static void plan_kind(Plan *plan, unsigned kind)
{
    static const int tunnels[] = { 0, 4, 6 };

    *plan = (Plan) {
        .version = kind & 1 ? 6 : 4,
        .udp = kind & 2,
        .tags = kind / 4 % 2,
        .options = kind / 4 % 3,
        .tcp_options = 3,
        .payload = 900,
        .size = 200,
        .tunnel = tunnels[kind / 8 % 3],
        .geneve = kind / 4 % 2,
        .tunnel_options = kind / 4 % 2,
        .tunnel_sum = kind & 1,
    };
}

#define KIND_TUNNELS 8          /* from here on */
#define KINDS 24

static void test_refused_truncated(void)
{
    g_autofree Frame *frame = g_new0(Frame, 1);

    for (unsigned kind = 0; kind < KINDS; kind++) {
        size_t whole;
        Plan plan;

        plan_kind(&plan, kind);
        frame_build(frame, &plan);
        whole = frame->len;
        for (frame->len = 0; frame->len <= plan.headers; frame->len++) {
            g_assert_false(segments_good(frame));
        }
        /* As to the kernel, a frame is as long as it is. */
        for (; frame->len < whole; frame->len++) {
            g_assert_true(segments_good(frame) == !plan.tunnel);
        }
        g_assert_true(segments_good(frame));
    }
}

/* One thing of a good frame is changed, and the frame is refused. */
#define FLAW(applies, change) do {                                      \
        if (applies) {                                                  \
            frame_build(frame, &plan);                                  \
            g_assert_true(segments_good(frame));                        \
            change;                                                     \
            if (segments_good(frame)) {                                 \
                plan_describe(&plan);                                   \
                g_test_message("%s, sum to do: %d", #change, sum);      \
                g_test_fail();                                          \
            }                                                           \
        }                                                               \
    } while (0)

static void check_flaws(Plan plan)
{
    g_autofree Frame *frame = g_new0(Frame, 1);
    struct virtio_net_hdr *hdr = &frame->hdr;
    bool ip4 = plan.version == 4, ip6 = !ip4, tcp = !plan.udp;
    bool outer = !plan.tunnel, sum = !plan.no_sum;
    uint8_t *ip, *l4, *protocol;

    /* To know where its parts are, which is the same each time */
    frame_build(frame, &plan);
    ip = frame->data + plan.l3;
    l4 = frame->data + plan.l4;
    protocol = ip + (ip4 ? 9 : 6);

    FLAW(true, hdr->gso_size = 0);
    FLAW(true, hdr->gso_size = 1);
    FLAW(true, hdr->gso_size = 47);
    FLAW(true, hdr->gso_type = VIRTIO_NET_HDR_GSO_NONE);
    FLAW(true, hdr->gso_type = VIRTIO_NET_HDR_GSO_UDP);
    FLAW(true, hdr->gso_type = VIRTIO_NET_HDR_GSO_ECN);
    FLAW(true, hdr->gso_type = 2);
    FLAW(true, hdr->gso_type |= 0x18);
    FLAW(tcp, hdr->gso_type = ip4 ? VIRTIO_NET_HDR_GSO_TCPV6 :
                                    VIRTIO_NET_HDR_GSO_TCPV4);
    FLAW(tcp, hdr->gso_type = VIRTIO_NET_HDR_GSO_UDP_L4);
    FLAW(!tcp, hdr->gso_type = ip4 ? VIRTIO_NET_HDR_GSO_TCPV4 :
                                     VIRTIO_NET_HDR_GSO_TCPV6);
    FLAW(outer, hdr->gso_type |= VIRTIO_NET_HDR_GSO_UDP_TUNNEL_IPV4);
    FLAW(outer, hdr->gso_type |= VIRTIO_NET_HDR_GSO_UDP_TUNNEL_IPV6);
    FLAW(sum, hdr->csum_start--);
    FLAW(sum, hdr->csum_start++);
    FLAW(sum, hdr->csum_start = 0);
    FLAW(sum, hdr->csum_start = plan.l3);
    FLAW(sum, hdr->csum_start = frame->len);
    FLAW(sum, hdr->csum_start = 0xffff);
    FLAW(outer, stw_be_p(ip - 2, ETH_P_TEST));
    FLAW(outer, put_ethertype(ip - 2, ip4 ? 6 : 4));
    FLAW(true, ip[0] &= 0x0f);
    FLAW(true, ip[0] ^= 0x20);
    FLAW(true, *protocol = IPPROTO_ICMP);
    FLAW(true, *protocol = IPPROTO_ESP);
    FLAW(ip4, ip[0] = 0x40);
    FLAW(ip4, ip[0] = 0x44);
    FLAW(ip4 && sum, ip[0]++);
    FLAW(ip4 && sum, ip[0] = 0x4f);
    FLAW(ip4, ip[6] |= 0x20);   /* fragments: more, the last, a far one */
    FLAW(ip4, ip[7] |= 1);
    FLAW(ip4, ip[6] |= 0x10);
    FLAW(ip6, (ip[6] = IPPROTO_FRAGMENT, ip[43] = 1));
    FLAW(ip6, (ip[6] = IPPROTO_FRAGMENT, ip[43] = 8));
    FLAW(ip6, (ip[6] = IPPROTO_FRAGMENT, ip[42] = 0x80));
    FLAW(ip6, ip[6] = IPPROTO_NONE);
    FLAW(ip6, (ip[6] = IPPROTO_HOPOPTS, ip[41] = 0xff));
    FLAW(tcp, l4[12] &= 0x0f);
    FLAW(tcp, l4[12] = 0x4f);
    FLAW(tcp, (l4[12] = 0xff, frame->len = plan.l4 + 59));
    FLAW(tcp, (l4[12] = 0xff, frame->len = plan.l4 + 60));
}

static void test_refused_flaws(void)
{
    for (unsigned kind = 0; kind < KINDS; kind++) {
        Plan plan;

        plan_kind(&plan, kind);
        plan.payload = 7000;
        plan.options = !plan.tunnel && plan.version == 6;
        check_flaws(plan);
        /* The checksum is what tells of a tunnel. */
        if (!plan.tunnel) {
            plan.no_sum = true;
            check_flaws(plan);
        }
    }
}

/* What looks like the IP header begins in the header of UDP around it. */
static void test_refused_overlap(void)
{
    g_autofree Frame *frame = g_new0(Frame, 1);

    for (int version = 4; version <= 6; version += 2) {
        Plan plan = {
            .version = version, .udp = true, .payload = 300, .size = 100,
        };
        uint8_t *udp;

        frame_build(frame, &plan);
        udp = frame->data + plan.l4;
        udp[0] = 0x47;
        stw_be_p(udp + 2, frame->len - plan.l4);
        udp[9] = IPPROTO_UDP;
        memset(udp + 10, 0, 20);
        frame->hdr.csum_start = plan.l4 + 28;
        assert_refused(frame);
    }
}

/* The header of TCP in a tunnel is longer than what there is. */
static void test_refused_tunnel_cut(void)
{
    g_autofree Frame *frame = g_new0(Frame, 1);

    for (unsigned kind = KIND_TUNNELS; kind < KINDS; kind++) {
        Plan plan;

        plan_kind(&plan, kind);
        plan.tcp_options = 0;
        plan.payload = 39;
        frame_build(frame, &plan);
        if (!plan.udp) {
            frame->data[plan.l4 + 12] = 0xf0;
            assert_refused(frame);
        }
    }
}

/* What follows from the frame is not taken from the header. */
static void test_ignored(void)
{
    g_autofree Frame *frame = g_new0(Frame, 1);
    g_autofree Frame *good = g_new0(Frame, 1), *got = g_new0(Frame, 1);

    for (unsigned kind = 0; kind < KINDS; kind++) {
        struct virtio_net_hdr hdrs[7];
        FrameSegments fs;
        Plan plan;

        plan_kind(&plan, kind);
        frame_build(frame, &plan);
        segments_new(&fs, frame, &plan);
        segment_get(&fs, 1, good);
        for (int i = 0; i < ARRAY_SIZE(hdrs); i++) {
            hdrs[i] = frame->hdr;
        }
        hdrs[0].hdr_len = 0;
        hdrs[1].hdr_len = 0xffff;
        hdrs[2].csum_offset = 0;
        hdrs[3].csum_offset = 0xffff;
        hdrs[4].flags |= VIRTIO_NET_HDR_F_DATA_VALID;
        hdrs[5].gso_type |= VIRTIO_NET_HDR_GSO_ECN;
        /* As a guest's header says it */
        hdrs[6].gso_type |= !plan.tunnel ? 0 :
                            plan.tunnel == 4 ?
                            VIRTIO_NET_HDR_GSO_UDP_TUNNEL_IPV4 :
                            VIRTIO_NET_HDR_GSO_UDP_TUNNEL_IPV6;
        for (int i = 0; i < ARRAY_SIZE(hdrs); i++) {
            frame->hdr = hdrs[i];
            segments_new(&fs, frame, &plan);
            segment_get(&fs, 1, got);
            assert_bytes(got, good, &plan, 1);
        }
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
    segments_check(&fs, frame);
    plan.payload++;
    frame_build(frame, &plan);
    g_assert_false(segments_good(frame));

    /* The longest headers, and those that are longer by one word */
    for (unsigned words = 0; words <= 10; words++) {
        for (unsigned options = 0; options < 40; options++) {
            plan_kind(&plan, 1);
            plan.tcp_options = words;
            plan.options = options;
            frame_build(frame, &plan);
            g_assert_true(segments_good(frame) ==
                          (plan.headers <= FRAME_SEGMENTS_MAX_HEADERS));
        }
    }
}

/*
 * Headers
 */

/* Returns: what frame_offload_to_guest() does, with all it gets fenced */
static bool to_guest(const Frame *frame, const Plan *plan, size_t len,
                     bool swap)
{
    struct virtio_net_hdr_v1_hash_tunnel want;
    struct virtio_net_hdr hdr = frame->hdr;
    uint8_t *guest = fence_room(FENCE_HEADER, len);
    uint8_t *data = fence_copy(FENCE_FRAME, frame->data, frame->len);
    bool ok = frame_offload_to_guest(&hdr, data, frame->len, guest, len, swap);

    fence_check(guest);
    if (ok) {
        put_header(&want, frame, plan, swap);
        g_assert_cmpmem(guest, len, &want, len);
    }
    if (len) {
        /* The checksum is left to the guest. */
        g_assert_cmpmem(data, frame->len, frame->data, frame->len);
        g_assert_cmpmem(&hdr, sizeof(hdr), &frame->hdr, sizeof(hdr));
    }
    return ok;
}

static void test_from_guest(void)
{
    for (size_t len = 0; len <= 30; len++) {
        for (int i = 0; i < 200; i++) {
            bool swap = i & 1, ok;
            struct virtio_net_hdr hdr, want = {};
            uint8_t was[30], *guest;

            random_bytes(was, len);
            guest = fence_copy(FENCE_HEADER, was, len);
            memset(&hdr, 0x5a, sizeof(hdr));
            ok = frame_offload_from_guest(&hdr, guest, len, swap);
            g_assert_cmpmem(guest, len, was, len);
            g_assert_true(ok == (!len || (len >= 10 && len <= 24)));
            memcpy(&want, was, MIN(len, sizeof(want)));
            if (swap) {
                swap_header(&want);
            }
            if (ok) {
                g_assert_cmpmem(&hdr, sizeof(hdr), &want, sizeof(want));
            }
        }
    }
}

static void test_to_guest(void)
{
    g_autofree Frame *frame = g_new0(Frame, 1);

    for (size_t len = 0; len <= TUNNEL_HEADER; len += len ? 1 : 10) {
        for (int i = 0; i < 2 * KINDS; i++) {
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
            /* Without a header a frame must be whole. */
            g_assert_true(to_guest(frame, &plan, len, i & 1) ==
                          (len || !frame->hdr.gso_type));
        }
    }
}

/* A packet socket tells less of a tunnel than what the guest has written. */
static void test_tunnel_capture(void)
{
    g_autofree Frame *frame = g_new0(Frame, 1), *got = g_new0(Frame, 1);
    PacketSocket *ps;
    Lab lab;

    if (!lab_new(&lab, 0, true)) {
        return;
    }
    ps = packet_socket_new_capture(lab.guest.name, lab.guest.index, -1,
                                   PACKET_SOCKET_INCOMING, 4 * MiB, false,
                                   &error_abort);
    g_assert_true(packet_socket_hook(ps, &error_abort));
    for (int i = 0; i < (g_test_slow() ? 2000 : 600); i++) {
        FrameSegments fs;
        Plan plan;

        plan_random(&plan, i % 4);
        frame_build(frame, &plan);
        g_assert_true(lab_send(&lab, frame, &plan));
        tap_drain(&lab.tap);
        got->len = packet_socket_recv(ps, &got->hdr, got->data,
                                      sizeof(got->data));
        assert_bytes(got, frame, &plan, 0);
        /* The kernel has its own idea of that. */
        got->hdr.hdr_len = frame->hdr.hdr_len;
        g_assert_cmpmem(&got->hdr, sizeof(got->hdr), &frame->hdr,
                        sizeof(frame->hdr));
        if (!to_guest(got, &plan, TUNNEL_HEADER, false)) {
            plan_describe(&plan);
            g_assert_not_reached();
        }
        if (plan.tunnel) {
            segments_new(&fs, got, &plan);
        }
    }
    packet_socket_free(ps);
    lab_free(&lab);
}

/* As if captured, for guests that do and do not know of tunnels */
static void test_tunnel_short(void)
{
    g_autofree Frame *frame = g_new0(Frame, 1);

    for (unsigned kind = KIND_TUNNELS; kind < KINDS; kind++) {
        for (size_t len = 0; len <= TUNNEL_HEADER; len += len ? 1 : 10) {
            for (int swap = 0; swap < 2; swap++) {
                Plan plan;

                plan_kind(&plan, kind);
                frame_build(frame, &plan);
                g_assert_true(to_guest(frame, &plan, len, swap) ==
                              (len == TUNNEL_HEADER));

                /* Not to be segmented: nothing to be told */
                frame->hdr.gso_type = VIRTIO_NET_HDR_GSO_NONE;
                plan.tunnel = 0;
                g_assert_true(to_guest(frame, &plan, len, swap));
            }
        }
    }
}

/* In the addresses of IPv6 is what looks like a header of IPv4. */
static void test_tunnel_addresses(void)
{
    g_autofree Frame *frame = g_new0(Frame, 1);
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
    g_assert_true(to_guest(frame, &plan, TUNNEL_HEADER, false));
    g_assert_true(segments_good(frame));
}

/* A UDP frame that is to be cut itself, with a tunnel's frame inside */
static void test_tunnel_like(void)
{
    g_autofree Frame *frame = g_new0(Frame, 1);

    for (unsigned kind = KIND_TUNNELS; kind < KINDS; kind++) {
        FrameSegments fs;
        Plan plan;

        plan_kind(&plan, kind);
        frame_build(frame, &plan);
        frame->hdr.gso_type = VIRTIO_NET_HDR_GSO_UDP_L4;
        frame->hdr.csum_start = plan.tunnel_l4;
        frame->hdr.csum_offset = 6;
        plan.tunnel = 0;
        g_assert_true(to_guest(frame, &plan, TUNNEL_HEADER, false));
        g_assert_true(segments_try(&fs, frame));
        g_assert_cmpuint(fs.at.headers, ==, plan.tunnel_l4 + 8);
        segments_check(&fs, frame);
    }
}

/* Of frames of all lengths, at all places, some of them far outside */
static void test_checksum(void)
{
    for (size_t len = 0; len < 40; len++) {
        for (unsigned i = 0; i < 50 * 50; i++) {
            unsigned start = i / 50, offset = i % 50;
            struct virtio_net_hdr hdr = {
                .flags = VIRTIO_NET_HDR_F_NEEDS_CSUM |
                         (i & 1 ? VIRTIO_NET_HDR_F_DATA_VALID : 0),
                .csum_start = start > 45 ? 0xffff - (start - 46) : start,
                .csum_offset = offset > 45 ? 0xffff - (offset - 46) : offset,
            };
            size_t at = (size_t)hdr.csum_start + hdr.csum_offset;
            bool inside = at + 2 <= len;
            uint8_t want[40], *data;

            random_bytes(want, len);
            if (inside && i % 3 == 0) {
                /* So that 0 is to be written */
                stw_be_p(want + at, 0);
                stw_be_p(want + at, ~sum_bytes(want + start, len - start));
            }
            data = fence_copy(FENCE_FRAME, want, len);
            g_assert_true(frame_offload_to_guest(&hdr, data, len, NULL, 0,
                                                 i & 2) == inside);
            fence_check(data);
            if (inside) {
                uint16_t sum = ~sum_bytes(want + start, len - start);

                g_assert_cmphex(hdr.flags, ==,
                                i & 1 ? VIRTIO_NET_HDR_F_DATA_VALID : 0);
                stw_be_p(want + at, sum ?: 0xffff);
            }
            g_assert_cmpmem(data, len, want, len);
        }
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    enter_namespace();

#define TEST(name, function) g_test_add_func("/frame-offload/" name, function)
#define TEST_KERNEL(name, flags)                                        \
    g_test_add_data_func("/frame-offload/segments/" name,               \
                         GUINT_TO_POINTER(flags), test_segments_kernel)
    TEST_KERNEL("kernel", 0);
    TEST_KERNEL("kernel-checksum", KERNEL_CHECKSUM);
    TEST_KERNEL("kernel-tunnel", KERNEL_TUNNEL);
    TEST_KERNEL("kernel-tunnel-checksum", KERNEL_TUNNEL | KERNEL_CHECKSUM);
    TEST("segments/limits", test_limits);
    TEST("segments/refused/truncated", test_refused_truncated);
    TEST("segments/refused/flaws", test_refused_flaws);
    TEST("segments/refused/overlap", test_refused_overlap);
    TEST("segments/refused/tunnel-cut", test_refused_tunnel_cut);
    TEST("segments/ignored", test_ignored);
    TEST("header/from-guest", test_from_guest);
    TEST("header/to-guest", test_to_guest);
    TEST("header/tunnel/capture", test_tunnel_capture);
    TEST("header/tunnel/short", test_tunnel_short);
    TEST("header/tunnel/addresses", test_tunnel_addresses);
    TEST("header/tunnel/like", test_tunnel_like);
    TEST("checksum", test_checksum);
    return g_test_run();
}
