/*
 * Work on frames that their virtio-net header leaves to others
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "net/checksum.h"
#include "net/eth.h"
#include "net/frame-offload.h"
#include "qemu/bswap.h"
#include "qemu/iov.h"

/*
 * The least payload of a segment, and the most segments of a UDP datagram,
 * that Linux makes.  They bound what a hostile frame can cost.
 */
#define TCP_MIN_SIZE 48
#define UDP_MAX_SEGMENTS 128

typedef struct FrameLayout {
    size_t l3;                  /* offsets in the frame, in bytes */
    size_t l4;
    size_t payload;
    EthL4HdrProto proto;
    bool ip6;
} FrameLayout;

/* Returns false if the frame has no header of TCP or UDP, or only a part. */
static bool frame_offload_parse(FrameLayout *layout, const uint8_t *frame,
                                size_t len)
{
    struct iovec iov = { .iov_base = (void *)frame, .iov_len = len };
    eth_ip6_hdr_info ip6;
    eth_ip4_hdr_info ip4;
    eth_l4_hdr_info l4;
    bool has_ip4;

    eth_get_protocols(&iov, 1, 0, &has_ip4, &layout->ip6, &layout->l3,
                      &layout->l4, &layout->payload, &ip6, &ip4, &l4);
    layout->proto = l4.proto;
    if (l4.proto == ETH_L4_HDR_PROTO_TCP) {
        return layout->l4 >= layout->l3 + sizeof(struct ip_header) &&
               layout->payload >= layout->l4 + sizeof(struct tcp_hdr) &&
               layout->payload <= len;
    }
    return l4.proto == ETH_L4_HDR_PROTO_UDP &&
           layout->l4 >= layout->l3 + sizeof(struct ip_header);
}

static uint8_t frame_offload_gso_type(const struct virtio_net_hdr *hdr)
{
    return hdr->gso_type & ~VIRTIO_NET_HDR_GSO_ECN;
}

/* Headers */

static void frame_offload_swap(struct virtio_net_hdr *hdr)
{
    bswap16s(&hdr->hdr_len);
    bswap16s(&hdr->gso_size);
    bswap16s(&hdr->csum_start);
    bswap16s(&hdr->csum_offset);
}

/* For a receiver that gets no header. */
static bool frame_offload_finish_checksum(struct virtio_net_hdr *hdr,
                                          uint8_t *frame, size_t len)
{
    size_t at = hdr->csum_start + hdr->csum_offset;

    if (!(hdr->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM)) {
        return true;
    }
    if (hdr->csum_start >= len || at + 2 > len) {
        return false;
    }
    /* The field holds the sum of the pseudo header and is summed up too. */
    stw_be_p(frame + at,
             net_checksum_finish_nozero(
                 net_checksum_add(len - hdr->csum_start,
                                  frame + hdr->csum_start)));
    hdr->flags &= ~VIRTIO_NET_HDR_F_NEEDS_CSUM;
    return true;
}

/* Whether the IP header of a frame that ends at @len begins at @at. */
static bool frame_offload_is_ip_header(const uint8_t *frame, size_t len,
                                       size_t at, size_t end)
{
    switch (frame[at] >> 4) {
    case 4:
        return at + (frame[at] & 0xf) * 4 == end &&
               lduw_be_p(frame + at + 2) == len - at;
    case 6:
        return at + sizeof(struct ip6_header) == end &&
               lduw_be_p(frame + at + 4) == len - end;
    default:
        return false;
    }
}

/*
 * A packet socket's header does not tell (Linux 6.18) that the frame is in a
 * UDP tunnel: it speaks of the inner frame alone, and so do the offsets.  But
 * it can be seen: what is to be checksummed is not what follows the IP
 * header.  @tunnel is left alone if the frame is in no tunnel.
 *
 * Returns false if it is in one that cannot be expressed.
 */
static bool
frame_offload_find_tunnel(const struct virtio_net_hdr *hdr,
                          const uint8_t *frame, size_t len,
                          struct virtio_net_hdr_v1_hash_tunnel *tunnel)
{
    struct virtio_net_hdr_v1 *guest = &tunnel->hash_hdr.hdr;
    size_t end = hdr->csum_start;
    FrameLayout outer;
    size_t at;

    if (hdr->gso_type == VIRTIO_NET_HDR_GSO_NONE ||
        !(hdr->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM) || end > len ||
        !frame_offload_parse(&outer, frame, len) ||
        outer.proto != ETH_L4_HDR_PROTO_UDP || outer.l4 >= end) {
        return true;
    }
    for (at = end - sizeof(struct ip_header);
         at >= outer.payload && at + ETH_MAX_IP4_HDR_LEN >= end; at -= 4) {
        if (frame_offload_is_ip_header(frame, len, at, end)) {
            guest->gso_type |= outer.ip6 ? VIRTIO_NET_HDR_GSO_UDP_TUNNEL_IPV6
                                         : VIRTIO_NET_HDR_GSO_UDP_TUNNEL_IPV4;
            /* A tunnel without a checksum has 0 there. */
            if (lduw_be_p(frame + outer.l4 + 6)) {
                guest->flags |= VIRTIO_NET_HDR_F_UDP_TUNNEL_CSUM;
            }
            tunnel->outer_th_offset = cpu_to_le16(outer.l4);
            tunnel->inner_nh_offset = cpu_to_le16(at);
            return true;
        }
    }
    return false;
}

bool frame_offload_to_guest(struct virtio_net_hdr *hdr, uint8_t *frame,
                            size_t len, uint8_t *guest, size_t guest_len,
                            bool swap)
{
    struct virtio_net_hdr_v1_hash_tunnel all = { };

    if (!guest_len) {
        return hdr->gso_type == VIRTIO_NET_HDR_GSO_NONE &&
               frame_offload_finish_checksum(hdr, frame, len);
    }
    memcpy(&all, hdr, sizeof(*hdr));
    if (!frame_offload_find_tunnel(hdr, frame, len, &all) ||
        (guest_len < sizeof(all) && all.outer_th_offset)) {
        return false;
    }
    if (swap) {
        frame_offload_swap((struct virtio_net_hdr *)&all);
    }
    memcpy(guest, &all, guest_len);
    return true;
}

bool frame_offload_from_guest(struct virtio_net_hdr *hdr,
                              const uint8_t *guest, size_t guest_len,
                              bool swap)
{
    memset(hdr, 0, sizeof(*hdr));
    if (!guest_len) {
        return true;
    }
    if (guest_len < sizeof(*hdr) || guest_len > FRAME_OFFLOAD_MAX_HEADER) {
        return false;
    }
    memcpy(hdr, guest, sizeof(*hdr));
    if (swap) {
        frame_offload_swap(hdr);
    }
    return !(hdr->gso_type & VIRTIO_NET_HDR_GSO_UDP_TUNNEL);
}

/* Segments */

bool frame_segments_init(FrameSegments *fs, const struct virtio_net_hdr *hdr,
                         const uint8_t *frame, size_t len)
{
    uint8_t type = frame_offload_gso_type(hdr);
    FrameLayout layout;

    if (!frame_offload_parse(&layout, frame, len) ||
        layout.payload > FRAME_SEGMENTS_MAX_HEADERS ||
        layout.payload >= len || !hdr->gso_size ||
        (hdr->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM &&
         hdr->csum_start != layout.l4)) {
        return false;
    }
    *fs = (FrameSegments) {
        .frame = frame,
        .l3 = layout.l3,
        .l4 = layout.l4,
        .headers = layout.payload,
        .payload = len - layout.payload,
        .size = hdr->gso_size,
        .count = DIV_ROUND_UP(len - layout.payload, hdr->gso_size),
        .ip6 = layout.ip6,
        .tcp = layout.proto == ETH_L4_HDR_PROTO_TCP,
    };
    switch (type) {
    case VIRTIO_NET_HDR_GSO_TCPV4:
    case VIRTIO_NET_HDR_GSO_TCPV6:
        return fs->tcp && fs->size >= TCP_MIN_SIZE &&
               fs->ip6 == (type == VIRTIO_NET_HDR_GSO_TCPV6);
    case VIRTIO_NET_HDR_GSO_UDP_L4:
        return !fs->tcp && fs->count <= UDP_MAX_SEGMENTS;
    default:
        return false;
    }
}

static void frame_segments_put_ip(const FrameSegments *fs, unsigned index,
                                  uint8_t *ip, size_t len)
{
    if (fs->ip6) {
        stw_be_p(ip + 4, len - sizeof(struct ip6_header));
    } else {
        stw_be_p(ip + 2, len);
        stw_be_p(ip + 4, lduw_be_p(ip + 4) + index);
        stw_be_p(ip + 10, 0);
        stw_be_p(ip + 10, net_raw_checksum(ip, fs->l4 - fs->l3));
    }
}

static void frame_segments_put_tcp(const FrameSegments *fs, unsigned index,
                                   uint8_t *tcp)
{
    uint8_t *flags = tcp + 13;

    stl_be_p(tcp + 4, ldl_be_p(tcp + 4) + index * fs->size);
    if (index > 0) {
        *flags &= ~TH_CWR;
    }
    if (index < fs->count - 1) {
        *flags &= ~(TH_FIN | TH_PUSH);
    }
}

/* The sum of the pseudo header, as it is before the rest is added. */
static uint16_t frame_segments_pseudo_sum(const FrameSegments *fs,
                                          const uint8_t *ip, size_t len)
{
    size_t at = fs->ip6 ? 8 : 12, size = fs->ip6 ? 32 : 8;
    uint32_t sum = net_checksum_add(size, (uint8_t *)ip + at);

    sum += len + (fs->tcp ? IP_PROTO_TCP : IP_PROTO_UDP);
    return ~net_checksum_finish(sum);
}

size_t frame_segments_get(const FrameSegments *fs, unsigned index,
                          uint8_t *buf, struct virtio_net_hdr *hdr)
{
    size_t at = index * fs->size;
    size_t payload = MIN(fs->size, fs->payload - at);
    size_t len = fs->headers + payload;
    uint8_t *l4 = buf + fs->l4;

    memcpy(buf, fs->frame, fs->headers);
    memcpy(buf + fs->headers, fs->frame + fs->headers + at, payload);
    frame_segments_put_ip(fs, index, buf + fs->l3, len - fs->l3);
    if (fs->tcp) {
        frame_segments_put_tcp(fs, index, l4);
    } else {
        stw_be_p(l4 + 4, len - fs->l4);
    }
    *hdr = (struct virtio_net_hdr) {
        .flags = VIRTIO_NET_HDR_F_NEEDS_CSUM,
        .csum_start = fs->l4,
        .csum_offset = fs->tcp ? offsetof(struct tcp_hdr, th_sum) :
                                 offsetof(udp_header, uh_sum),
    };
    stw_be_p(l4 + hdr->csum_offset,
             frame_segments_pseudo_sum(fs, buf + fs->l3, len - fs->l4));
    return len;
}
