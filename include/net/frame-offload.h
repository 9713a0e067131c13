/*
 * What the virtio-net headers of frames leave to others: checksums, segments
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * There are two kinds of header.  The kernel's is that of a packet socket: a
 * struct virtio_net_hdr in the host's byte order.  The guest's is what goes
 * through the TAP and a frame stream: of the length that the guest's driver
 * has negotiated, in the guest's byte order.
 *
 * All functions may be called from any thread.
 */

#ifndef QEMU_NET_FRAME_OFFLOAD_H
#define QEMU_NET_FRAME_OFFLOAD_H

#include "standard-headers/linux/virtio_net.h"

/* The longest header that a guest's driver can negotiate, in bytes. */
#define FRAME_OFFLOAD_MAX_HEADER sizeof(struct virtio_net_hdr_v1_hash_tunnel)

/*
 * Express the kernel's header as the guest's, of @guest_len bytes: 0, or from
 * 10 to FRAME_OFFLOAD_MAX_HEADER.  @swap says that the guest's byte order is
 * not the host's.  If there is no header, the checksum is completed in the
 * frame, and cleared in @hdr.  Returns false for a GSO frame without a header,
 * or in a tunnel that the header cannot express; or if the checksum to complete
 * is outside of the frame.
 */
bool frame_offload_to_guest(struct virtio_net_hdr *hdr, uint8_t *frame,
                            size_t len, uint8_t *guest, size_t guest_len,
                            bool swap);

/*
 * Express the guest's header as the kernel's.  The kernel is to check whether
 * it fits the frame.  Returns false if @guest_len is not the length of a
 * header.
 */
bool frame_offload_from_guest(struct virtio_net_hdr *hdr,
                              const uint8_t *guest, size_t guest_len,
                              bool swap);

/* Where a frame's IP header is, and that of TCP or UDP behind it */
typedef struct FrameLayout {
    size_t l3;                  /* offsets in the frame, in bytes */
    size_t l4;
    size_t headers;             /* length of all headers, in bytes */
    bool ip6;
    bool tcp;
} FrameLayout;

/* A GSO frame that is being segmented */
typedef struct FrameSegments {
    const uint8_t *frame;
    FrameLayout at;             /* of the innermost headers */
    FrameLayout tunnel;         /* of those around them; all 0 without any */
    size_t payload;             /* length of what is to be cut, in bytes */
    size_t size;                /* of the payload of one segment, in bytes */
    unsigned count;
} FrameSegments;

/* Frames with longer headers are not segmented. */
#define FRAME_SEGMENTS_MAX_HEADERS 256

/*
 * Prepare to segment a frame as @hdr says.  @frame must stay as long as @fs is
 * used.  It may be TCP or UDP (VIRTIO_NET_HDR_GSO_UDP_L4) over IPv4 or IPv6,
 * with VLAN tags, options and extension headers, also in a UDP tunnel.
 * Returns false if the frame is of another kind, or malformed.
 */
bool frame_segments_init(FrameSegments *fs, const struct virtio_net_hdr *hdr,
                         const uint8_t *frame, size_t len);

/*
 * Put the segment @index, less than @fs->count, to @buf, which has room for
 * @fs->at.headers + @fs->size bytes.  @hdr is its header, which leaves the
 * checksum to the kernel.  Returns the segment's length in bytes.
 */
size_t frame_segments_get(const FrameSegments *fs, unsigned index,
                          uint8_t *buf, struct virtio_net_hdr *hdr);

#endif /* QEMU_NET_FRAME_OFFLOAD_H */
