/*
 * libFuzzer target: net/frame-offload.c
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The input is
 *
 *   byte   length of the guest's header
 *   byte   bit 0: its byte order is the other one
 *   byte   its square is the number of bytes to append to the frame
 *   24     the guest's header
 *   rest   the frame
 *
 * Headers that are converted must come back the same; a checksum is what a
 * plain sum says; and segments must hold the payload, once and in order, with
 * checksums and lengths that are right.  What the kernel has in each field of
 * their headers is compared in test-frame-offload.
 */

#include "qemu/osdep.h"
#include "qemu/bswap.h"
#include "net/frame-offload.h"

#define INPUT_HEADER 27

/* The sum of 16-bit words in one's complement */
static uint32_t sum(const uint8_t *data, size_t size, uint32_t start)
{
    for (size_t i = 0; i < size; i++) {
        start += i % 2 ? data[i] : data[i] << 8;
        start = (start & 0xffff) + (start >> 16);
    }
    return start;
}

/* Finish the checksum as the kernel would; returns whether it can be. */
static bool finish_checksum(const struct virtio_net_hdr *hdr, uint8_t *frame,
                            size_t len)
{
    size_t at = hdr->csum_start + hdr->csum_offset;
    uint16_t value;

    if (!(hdr->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM)) {
        return true;
    }
    if (hdr->csum_start >= len || at + 2 > len) {
        return false;
    }
    value = ~sum(frame + hdr->csum_start, len - hdr->csum_start, 0);
    stw_be_p(frame + at, value ?: 0xffff);
    return true;
}

/* Returns whether @guest_len is one that a header may have. */
static bool check_from_guest(const uint8_t *guest, size_t guest_len, bool swap)
{
    g_autofree uint8_t *copy = g_memdup2(guest, guest_len);
    struct virtio_net_hdr hdr;
    bool good = !guest_len || (guest_len >= sizeof(hdr) &&
                               guest_len <= FRAME_OFFLOAD_MAX_HEADER);

    assert(frame_offload_from_guest(&hdr, copy, guest_len, swap) == good);
    /* What is swapped is checked on its way back. */
    assert(!good || !guest_len || swap || !memcmp(&hdr, guest, sizeof(hdr)));
    return good;
}

static void check_to_guest(const struct virtio_net_hdr *hdr,
                           const uint8_t *frame, size_t len,
                           size_t guest_len, bool swap)
{
    g_autofree uint8_t *guest = g_malloc(guest_len);
    g_autofree uint8_t *copy = g_memdup2(frame, len);
    g_autofree uint8_t *want = g_memdup2(frame, len);
    struct virtio_net_hdr done = *hdr, back;
    bool good = frame_offload_to_guest(&done, copy, len, guest, guest_len,
                                       swap);

    if (!guest_len) {
        assert(good == (!hdr->gso_type && finish_checksum(hdr, want, len)));
        assert(!memcmp(copy, want, len));
        assert(!good || !(done.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM));
        return;
    }
    assert(!memcmp(copy, frame, len));
    assert(good || hdr->gso_type);
    if (good) {
        assert(frame_offload_from_guest(&back, guest, guest_len, swap));
        if (back.gso_type & VIRTIO_NET_HDR_GSO_UDP_TUNNEL) {
            assert(guest_len == FRAME_OFFLOAD_MAX_HEADER);
            back.gso_type &= ~VIRTIO_NET_HDR_GSO_UDP_TUNNEL;
            back.flags &= ~VIRTIO_NET_HDR_F_UDP_TUNNEL_CSUM;
            back.gso_type |= hdr->gso_type & VIRTIO_NET_HDR_GSO_UDP_TUNNEL;
            back.flags |= hdr->flags & VIRTIO_NET_HDR_F_UDP_TUNNEL_CSUM;
        }
        assert(!memcmp(&back, hdr, sizeof(back)));
    }
}

/* What follows the IP header at @l3 is from @l4 to @len: is its sum right? */
static bool checksum_is_right(const uint8_t *frame, size_t l3, size_t l4,
                              size_t len, bool ip6, uint8_t proto)
{
    uint8_t tail[4] = { (len - l4) >> 8, len - l4, 0, proto };
    uint32_t value = ip6 ? sum(frame + l3 + 8, 32, 0) :
                           sum(frame + l3 + 12, 8, 0);

    value = sum(tail, sizeof(tail), value);
    return sum(frame + l4, len - l4, value) == 0xffff;
}

/* The length and, with IPv4, the checksum of the header at @l3 */
static void check_ip(const uint8_t *seg, size_t len, size_t l3, size_t l4,
                     bool ip6)
{
    assert(lduw_be_p(seg + l3 + (ip6 ? 4 : 2)) ==
           (uint16_t)(len - l3 - (ip6 ? 40 : 0)));
    assert(ip6 || sum(seg + l3, l4 - l3, 0) == 0xffff);
}

static void check_segments(const struct virtio_net_hdr *hdr,
                           const uint8_t *frame, size_t len)
{
    g_autofree uint8_t *copy = g_memdup2(frame, len);
    g_autofree uint8_t *seg = NULL;
    FrameSegments fs;
    size_t offset = 0;

    if (!frame_segments_init(&fs, hdr, copy, len)) {
        return;
    }
    assert(fs.count > 0 && fs.size == hdr->gso_size);
    assert(fs.at.headers + fs.payload == len);
    assert(fs.at.headers <= FRAME_SEGMENTS_MAX_HEADERS);
    assert(fs.at.l3 < fs.at.l4 && fs.at.l4 < fs.at.headers);
    assert(!fs.tunnel.l4 ||
           (fs.tunnel.l3 < fs.tunnel.l4 && fs.tunnel.l4 + 8 <= fs.at.l3));
    seg = g_malloc(fs.at.headers + fs.size);
    for (unsigned i = 0; i < fs.count; i++) {
        struct virtio_net_hdr seg_hdr;
        size_t seg_len = frame_segments_get(&fs, i, seg, &seg_hdr);
        size_t payload = seg_len - fs.at.headers;
        bool last = i == fs.count - 1;

        assert(seg_len > fs.at.headers);
        assert(last ? payload <= fs.size : payload == fs.size);
        assert(seg_hdr.gso_type == VIRTIO_NET_HDR_GSO_NONE);
        assert(finish_checksum(&seg_hdr, seg, seg_len));
        /* What passes 16 bits is of no use, and refused for its length. */
        if (seg_len <= 0xffff) {
            assert(checksum_is_right(seg, fs.at.l3, fs.at.l4, seg_len,
                                     fs.at.ip6, fs.at.tcp ? 6 : 17));
        }
        if (fs.tunnel.l4) {
            if (lduw_be_p(frame + fs.tunnel.l4 + 6) && seg_len <= 0xffff) {
                assert(checksum_is_right(seg, fs.tunnel.l3, fs.tunnel.l4,
                                         seg_len, fs.tunnel.ip6, 17));
            }
            check_ip(seg, seg_len, fs.tunnel.l3, fs.tunnel.l4, fs.tunnel.ip6);
        }
        check_ip(seg, seg_len, fs.at.l3, fs.at.l4, fs.at.ip6);
        assert(!memcmp(seg, frame, fs.tunnel.l3 ?: fs.at.l3));
        assert(!memcmp(seg + fs.at.headers, frame + fs.at.headers + offset,
                       payload));
        offset += payload;
    }
    assert(offset == fs.payload);
    assert(!memcmp(copy, frame, len));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    g_autofree uint8_t *frame = NULL;
    struct virtio_net_hdr hdr;
    size_t guest_len, len, more;
    bool swap;

    if (size < INPUT_HEADER + 2) {
        return 0;
    }
    guest_len = data[0] % (FRAME_OFFLOAD_MAX_HEADER + 3);
    swap = data[1] & 1;
    more = data[2] * data[2];
    len = size - INPUT_HEADER + more;
    frame = g_malloc(len);
    memcpy(frame, data + INPUT_HEADER, len - more);
    for (size_t i = 0; i < more; i++) {
        frame[len - more + i] = i * 7 + (i >> 8);
    }

    memcpy(&hdr, data + 3, sizeof(hdr));
    if (check_from_guest(data + 3, guest_len, swap)) {
        check_to_guest(&hdr, frame, len, guest_len, swap);
    }
    check_segments(&hdr, frame, len);
    return 0;
}
