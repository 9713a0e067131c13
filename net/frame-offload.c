/*
 * What the virtio-net headers of frames leave to others: checksums, segments
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "net/checksum.h"
#include "net/eth.h"
#include "net/frame-offload.h"
#include "qemu/bswap.h"

/*
 * Linux makes no smaller segments of TCP, and no more segments of one UDP
 * datagram.  Both limit what a hostile frame can cost.
 */
#define TCP_MIN_SIZE 48
#define UDP_MAX_SEGMENTS 128

/* Returns false unless the frame has a complete header of TCP or UDP. */
static bool frame_offload_parse(FrameLayout *layout, const uint8_t *frame,
                                size_t len)
{
    struct iovec iov = { .iov_base = (void *)frame, .iov_len = len };
    eth_ip6_hdr_info ip6;
    eth_ip4_hdr_info ip4;
    eth_l4_hdr_info l4;
    bool has_ip4;

    if (len < ETH_HLEN) {
        return false;
    }
    eth_get_protocols(&iov, 1, 0, &has_ip4, &layout->ip6, &layout->l3,
                      &layout->l4, &layout->headers, &ip6, &ip4, &l4);
    layout->tcp = l4.proto == ETH_L4_HDR_PROTO_TCP;
    return (layout->tcp || l4.proto == ETH_L4_HDR_PROTO_UDP) &&
           layout->l4 >= layout->l3 + sizeof(struct ip_header) &&
           layout->headers <= len &&
           (!layout->ip6 || frame[layout->l3] >> 4 == 6) &&
           (!layout->tcp ||
            layout->headers >= layout->l4 + sizeof(struct tcp_hdr));
}

static bool frame_offload_is_type(const FrameLayout *layout, uint8_t gso_type)
{
    switch (gso_type & ~(VIRTIO_NET_HDR_GSO_ECN |
                         VIRTIO_NET_HDR_GSO_UDP_TUNNEL)) {
    case VIRTIO_NET_HDR_GSO_TCPV4:
        return layout->tcp && !layout->ip6;
    case VIRTIO_NET_HDR_GSO_TCPV6:
        return layout->tcp && layout->ip6;
    case VIRTIO_NET_HDR_GSO_UDP_L4:
        return !layout->tcp;
    default:
        return false;
    }
}

/* A checksum of 0 means that there is none. */
static bool frame_offload_has_udp_checksum(const uint8_t *udp)
{
    return lduw_be_p(udp + offsetof(udp_header, uh_sum));
}

/* Headers */

static void frame_offload_swap(struct virtio_net_hdr *hdr)
{
    bswap16s(&hdr->hdr_len);
    bswap16s(&hdr->gso_size);
    bswap16s(&hdr->csum_start);
    bswap16s(&hdr->csum_offset);
}

/* Complete the checksum, for a receiver that gets no virtio-net header. */
static bool frame_offload_finish_checksum(struct virtio_net_hdr *hdr,
                                          uint8_t *frame, size_t len)
{
    size_t at = hdr->csum_start + hdr->csum_offset;

    if (!(hdr->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM)) {
        return true;
    }
    if (at + 2 > len) {
        return false;
    }
    /* The field holds the pseudo header's sum, so that it is included. */
    stw_be_p(frame + at,
             net_checksum_finish_nozero(
                 net_checksum_add(len - hdr->csum_start,
                                  frame + hdr->csum_start)));
    hdr->flags &= ~VIRTIO_NET_HDR_F_NEEDS_CSUM;
    return true;
}

/* Whether there is an IP header at @l3, and TCP or UDP behind it at @l4. */
static bool frame_offload_parse_inner(FrameLayout *inner, const uint8_t *frame,
                                      size_t len, size_t l3, size_t l4)
{
    const uint8_t *ip = frame + l3;
    uint8_t proto;

    *inner = (FrameLayout) { .l3 = l3, .l4 = l4, .ip6 = ip[0] >> 4 == 6 };
    if (inner->ip6) {
        struct iovec iov = { .iov_base = (void *)frame, .iov_len = l4 };
        eth_ip6_hdr_info info;

        if (l3 + sizeof(struct ip6_header) > l4 ||
            lduw_be_p(ip + 4) != len - l3 - sizeof(struct ip6_header) ||
            !eth_parse_ipv6_hdr(&iov, 1, l3, &info) || info.fragment ||
            l3 + info.full_hdr_len != l4) {
            return false;
        }
        proto = info.l4proto;
    } else {
        if (ip[0] >> 4 != 4 || l3 + IP_HDR_GET_LEN(ip) != l4 ||
            lduw_be_p(ip + 2) != len - l3 ||
            lduw_be_p(ip + 6) & (IP_MF | IP_OFFMASK)) {
            return false;
        }
        proto = ip[9];
    }
    inner->tcp = proto == IP_PROTO_TCP;
    if (inner->tcp && l4 + sizeof(struct tcp_hdr) <= len) {
        size_t size = (frame[l4 + 12] >> 4) * 4;

        inner->headers = l4 + size;
        return size >= sizeof(struct tcp_hdr) && inner->headers <= len;
    }
    inner->headers = l4 + sizeof(udp_header);
    return proto == IP_PROTO_UDP && inner->headers <= len;
}

/*
 * The header of a packet socket does not say (Linux 6.18) that a frame is in a
 * UDP tunnel: its type and offsets are those of the inner frame.  But it can be
 * seen from csum_start, which is not where the outer UDP header is.
 *
 * Returns false unless the frame is in a tunnel, yet to be segmented, and of
 * a kind that a virtio-net header can express.
 */
static bool frame_offload_find_tunnel(const FrameLayout *outer,
                                      FrameLayout *inner,
                                      const struct virtio_net_hdr *hdr,
                                      const uint8_t *frame, size_t len)
{
    size_t l4 = hdr->csum_start;

    if (outer->tcp || l4 > len ||
        l4 < outer->headers + sizeof(struct ip_header)) {
        return false;
    }
    for (size_t l3 = l4 - sizeof(struct ip_header);
         l3 >= outer->headers && l4 - l3 <= FRAME_SEGMENTS_MAX_HEADERS;
         l3 -= 4) {
        if (frame_offload_parse_inner(inner, frame, len, l3, l4) &&
            frame_offload_is_type(inner, hdr->gso_type)) {
            return true;
        }
    }
    return false;
}

/* Add the tunnel, if any.  Returns false if the header cannot express it. */
static bool frame_offload_put_tunnel(struct virtio_net_hdr_v1_hash_tunnel *all,
                                     const struct virtio_net_hdr *hdr,
                                     const uint8_t *frame, size_t len)
{
    struct virtio_net_hdr_v1 *guest = &all->hash_hdr.hdr;
    FrameLayout outer, inner;

    if (hdr->gso_type == VIRTIO_NET_HDR_GSO_NONE) {
        return true;
    }
    if (!(hdr->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM) ||
        !frame_offload_parse(&outer, frame, len) || outer.tcp ||
        outer.l4 == hdr->csum_start) {
        return !(hdr->gso_type & VIRTIO_NET_HDR_GSO_UDP_TUNNEL);
    }
    if (!frame_offload_find_tunnel(&outer, &inner, hdr, frame, len)) {
        return false;
    }
    guest->gso_type |= outer.ip6 ? VIRTIO_NET_HDR_GSO_UDP_TUNNEL_IPV6 :
                                   VIRTIO_NET_HDR_GSO_UDP_TUNNEL_IPV4;
    if (frame_offload_has_udp_checksum(frame + outer.l4)) {
        guest->flags |= VIRTIO_NET_HDR_F_UDP_TUNNEL_CSUM;
    }
    all->outer_th_offset = cpu_to_le16(outer.l4);
    all->inner_nh_offset = cpu_to_le16(inner.l3);
    return true;
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
    if (!frame_offload_put_tunnel(&all, hdr, frame, len) ||
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
    return true;
}

/* Segments */

bool frame_segments_init(FrameSegments *fs, const struct virtio_net_hdr *hdr,
                         const uint8_t *frame, size_t len)
{
    *fs = (FrameSegments) { .frame = frame, .size = hdr->gso_size };
    if (!frame_offload_parse(&fs->at, frame, len)) {
        return false;
    }
    if (hdr->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM &&
        hdr->csum_start != fs->at.l4) {
        fs->tunnel = fs->at;
        if (!frame_offload_find_tunnel(&fs->tunnel, &fs->at, hdr, frame, len)) {
            return false;
        }
    }
    if (!fs->size || fs->at.headers > FRAME_SEGMENTS_MAX_HEADERS ||
        fs->at.headers >= len ||
        (hdr->gso_type & VIRTIO_NET_HDR_GSO_UDP_TUNNEL && !fs->tunnel.l4)) {
        return false;
    }
    fs->payload = len - fs->at.headers;
    fs->count = DIV_ROUND_UP(fs->payload, fs->size);
    return frame_offload_is_type(&fs->at, hdr->gso_type) &&
           (fs->at.tcp ? fs->size >= TCP_MIN_SIZE :
                         fs->count <= UDP_MAX_SEGMENTS);
}

/* Set the lengths in the headers of IP and UDP; @len is the segment's. */
static void frame_segments_put_lengths(const FrameLayout *at, uint8_t *buf,
                                       size_t len, unsigned index)
{
    uint8_t *ip = buf + at->l3;

    if (at->ip6) {
        stw_be_p(ip + 4, len - at->l3 - sizeof(struct ip6_header));
    } else {
        stw_be_p(ip + 2, len - at->l3);
        stw_be_p(ip + 4, lduw_be_p(ip + 4) + index);
        stw_be_p(ip + 10, 0);
        stw_be_p(ip + 10, net_raw_checksum(ip, at->l4 - at->l3));
    }
    if (!at->tcp) {
        stw_be_p(buf + at->l4 + offsetof(udp_header, uh_ulen), len - at->l4);
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

/* Leave the checksum to the kernel: the field gets the pseudo header's sum. */
static void frame_segments_leave_checksum(const FrameLayout *at, uint8_t *buf,
                                          size_t len,
                                          struct virtio_net_hdr *hdr)
{
    uint8_t *addresses = buf + at->l3 + (at->ip6 ? 8 : 12);
    uint32_t sum = net_checksum_add(at->ip6 ? 32 : 8, addresses) +
                   len - at->l4 + (at->tcp ? IP_PROTO_TCP : IP_PROTO_UDP);

    hdr->flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
    hdr->csum_start = at->l4;
    hdr->csum_offset = at->tcp ? offsetof(struct tcp_hdr, th_sum) :
                                 offsetof(udp_header, uh_sum);
    stw_be_p(buf + at->l4 + hdr->csum_offset, ~net_checksum_finish(sum));
}

size_t frame_segments_get(const FrameSegments *fs, unsigned index,
                          uint8_t *buf, struct virtio_net_hdr *hdr)
{
    size_t at = index * fs->size, headers = fs->at.headers;
    size_t payload = MIN(fs->size, fs->payload - at);
    size_t len = headers + payload;

    memcpy(buf, fs->frame, headers);
    memcpy(buf + headers, fs->frame + headers + at, payload);
    frame_segments_put_lengths(&fs->at, buf, len, index);
    if (fs->at.tcp) {
        frame_segments_put_tcp(fs, index, buf + fs->at.l4);
    }
    *hdr = (struct virtio_net_hdr) { };
    frame_segments_leave_checksum(&fs->at, buf, len, hdr);
    if (fs->tunnel.l4) {
        frame_segments_put_lengths(&fs->tunnel, buf, len, index);
        if (frame_offload_has_udp_checksum(buf + fs->tunnel.l4)) {
            /* It covers the inner checksum: complete that first. */
            frame_offload_finish_checksum(hdr, buf, len);
            frame_segments_leave_checksum(&fs->tunnel, buf, len, hdr);
        }
    }
    return len;
}
