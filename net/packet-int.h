/*
 * Packet sockets: internal interfaces
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * All functions are called with the BQL held.
 */

#ifndef NET_PACKET_INT_H
#define NET_PACKET_INT_H

#include <linux/if_packet.h>
#include "qemu/queue.h"

struct PacketSocket;

/* Undo packet_socket_new_capture(): an @fd that was passed stays open. */
void packet_socket_abandon(struct PacketSocket *ps);

/* Returns the value of an option of the socket @fd; 0 if it has none. */
int packet_get_option(int fd, int level, int option);

/* Passed sockets */

/*
 * Returns whether @fd, which somebody else opened, can be used as a packet
 * socket on the interface.
 */
bool packet_passed_check(int fd, const char *ifname, unsigned ifindex,
                         Error **errp);

/* Ring: frames that the kernel writes to mapped memory (PACKET_RX_RING) */

/*
 * In bytes: 76 of the kernel's headers, and a frame of an MTU of 1500 with two
 * VLAN tags
 */
#define PACKET_RING_SLOT_SIZE 1600

typedef struct PacketRing {
    uint8_t *memory;
    size_t size;                /* bytes */
    unsigned slots;             /* 0: there is no ring */
    unsigned next;              /* to be read; the one before is not free yet */
    uint64_t drops;             /* when found empty; UINT64_MAX: not yet */
    unsigned dropped;           /* how often they grew, in a row, while empty */
} PacketRing;

/*
 * Give the packet socket @fd a ring of @size bytes, or somewhat less.  @ring is
 * all 0 before.  Returns false on failure.
 */
bool packet_ring_map(PacketRing *ring, int fd, const char *ifname, size_t size,
                     Error **errp);

/* Give the ring back to the kernel, if there is one. */
void packet_ring_unmap(PacketRing *ring, int fd);

/*
 * Returns the next frame's slot, or NULL.  Whoever has a copy of a passed
 * socket can map the ring, too, and write to the slot at any time.
 */
const struct tpacket2_hdr *packet_ring_next(const PacketRing *ring);

/* Go on to the next slot, and free the one before, see net/packet-ring.c. */
void packet_ring_release(PacketRing *ring);

/*
 * Call this when packet_ring_next() has returned NULL, with the number of
 * frames that the kernel has dropped up to now.  Returns true when that has
 * grown two times in a row although there was room.  (One drop proves nothing:
 * newer kernels drop a frame without a header, and go on.)
 */
bool packet_ring_stuck(PacketRing *ring, uint64_t drops);

/* Poll: one wake-up for all sockets */

typedef struct PacketPollEntry PacketPollEntry;

/*
 * Read up to @max_frames frames, or a little more than @max_bytes bytes, and
 * hand them on.  Set @more to true if frames may be left.  Returns the number
 * of frames, and in @bytes their size.
 */
typedef unsigned PacketPollRead(PacketPollEntry *entry, unsigned max_frames,
                                size_t max_bytes, size_t *bytes, bool *more);

/* Only the poll uses its members. */
struct PacketPollEntry {
    int fd;
    PacketPollRead *read;
    bool enabled;
    QTAILQ_ENTRY(PacketPollEntry) next;     /* of those that are ready */
};

/*
 * Add @entry, disabled, to what is polled.  @room is how many frames may wait
 * there.  Returns false on failure.  Remove it before @fd is closed.
 */
bool packet_poll_add(PacketPollEntry *entry, int fd, unsigned room,
                     PacketPollRead *read, Error **errp);
void packet_poll_remove(PacketPollEntry *entry);

/*
 * Set whether @entry is read.  Once enabled, it is read soon, and then each
 * time that the kernel reports an event of @fd.
 */
void packet_poll_set(PacketPollEntry *entry, bool enable);

#endif /* NET_PACKET_INT_H */
