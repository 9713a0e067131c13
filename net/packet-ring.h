/*
 * Ring of a packet socket
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Memory that the kernel writes received frames to, and that is read without a
 * system call (PACKET_RX_RING).
 */

#ifndef NET_PACKET_RING_H
#define NET_PACKET_RING_H

#include <linux/if_packet.h>

typedef struct PacketRing {
    uint8_t *memory;
    size_t size;                /* bytes */
    unsigned slots;             /* 0: there is no ring */
    unsigned next;
} PacketRing;

/**
 * packet_ring_map:
 * @ring: filled in; all 0 before
 * @fd: a packet socket without a ring
 * @ifname: its interface, for messages
 * @size: bytes, rounded to what the kernel can do
 * @errp: set on failure
 *
 * Returns: false on failure.
 */
bool packet_ring_map(PacketRing *ring, int fd, const char *ifname, size_t size,
                     Error **errp);

/* Give the ring back to the kernel, if there is one. */
void packet_ring_unmap(PacketRing *ring, int fd);

/* Returns: the next frame's slot, or NULL.  packet_ring_release() frees it. */
const struct tpacket2_hdr *packet_ring_next(const PacketRing *ring);
void packet_ring_release(PacketRing *ring);

#endif /* NET_PACKET_RING_H */
