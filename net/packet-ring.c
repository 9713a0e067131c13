/*
 * Ring of a packet socket
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * TPACKET_V2 rather than V3, which would hold more small frames in the same
 * memory, since V3 hands them out by the block: when it is full, or after 1
 * to 10 ms.
 *
 * A ring has one flaw.  A GSO frame of a type that struct virtio_net_hdr does
 * not know keeps its slot for ever, and the ring is stuck: the kernel drops
 * this frame and all that follow (6.1, 6.12, 6.18; not 7.2).  A guest can send
 * such a frame (UFO) at any time.
 *
 * To find that out, the reader must wake up for such a frame.  The kernel wakes
 * up whoever polls the socket, but the socket is readable only if the slot that
 * the kernel wrote last has not been freed.  So a slot is not freed before the
 * next one has been read: the socket is always readable, and is polled
 * edge-triggered.
 */

#include "qemu/osdep.h"
#include <sys/mman.h>
#include <sys/socket.h>
#include "qapi/error.h"
#include "packet-int.h"
#include "qemu/atomic.h"
#include "qemu/units.h"

/*
 * The kernel allocates a block in one piece, of whole pages.  A page has up to
 * 64 KiB.
 */
#define BLOCK_SIZE (64 * KiB)
#define SLOTS_PER_BLOCK (BLOCK_SIZE / PACKET_RING_SLOT_SIZE)

/* How many slots ahead to prefetch; a ring has at least as many. */
#define AHEAD 8

/* The slot that comes @ahead (-1 to AHEAD) slots after the next one */
static struct tpacket2_hdr *packet_ring_slot(const PacketRing *ring, int ahead)
{
    unsigned n = (ring->next + ring->slots + ahead) % ring->slots;

    return (struct tpacket2_hdr *)
           (ring->memory + n / SLOTS_PER_BLOCK * BLOCK_SIZE +
            n % SLOTS_PER_BLOCK * PACKET_RING_SLOT_SIZE);
}

bool packet_ring_map(PacketRing *ring, int fd, const char *ifname, size_t size,
                     Error **errp)
{
    unsigned blocks = MAX(1, size / BLOCK_SIZE);
    struct tpacket_req req = {
        .tp_block_size = BLOCK_SIZE,
        .tp_block_nr = blocks,
        .tp_frame_size = PACKET_RING_SLOT_SIZE,
        .tp_frame_nr = blocks * SLOTS_PER_BLOCK,
    };
    /* Longer frames wait in the socket's queue; their slots refer to it. */
    int version = TPACKET_V2, threshold = 1;

    if (setsockopt(fd, SOL_PACKET, PACKET_VERSION, &version,
                   sizeof(version)) < 0 ||
        setsockopt(fd, SOL_PACKET, PACKET_COPY_THRESH, &threshold,
                   sizeof(threshold)) < 0 ||
        setsockopt(fd, SOL_PACKET, PACKET_RX_RING, &req, sizeof(req)) < 0) {
        goto fail;
    }
    ring->slots = req.tp_frame_nr;
    ring->size = blocks * BLOCK_SIZE;
    ring->memory = mmap(NULL, ring->size, PROT_READ | PROT_WRITE, MAP_SHARED,
                        fd, 0);
    if (ring->memory == MAP_FAILED) {
        goto fail;
    }
    packet_ring_slot(ring, -1)->tp_status = TP_STATUS_USER;
    return true;

fail:
    error_setg_errno(errp, errno, "could not get a ring of %u KiB for the "
                     "packet socket of interface '%s'",
                     (unsigned)(blocks * BLOCK_SIZE / KiB), ifname);
    packet_ring_unmap(ring, fd);
    return false;
}

void packet_ring_unmap(PacketRing *ring, int fd)
{
    struct tpacket_req none = { };

    if (ring->memory && ring->memory != MAP_FAILED) {
        munmap(ring->memory, ring->size);
    }
    if (ring->slots) {
        setsockopt(fd, SOL_PACKET, PACKET_RX_RING, &none, sizeof(none));
    }
    *ring = (PacketRing) { };
}

const struct tpacket2_hdr *packet_ring_next(const PacketRing *ring)
{
    const struct tpacket2_hdr *slot = packet_ring_slot(ring, 0);
    const uint8_t *ahead = (const uint8_t *)packet_ring_slot(ring, AHEAD);

    if (!(qatomic_load_acquire(&slot->tp_status) & TP_STATUS_USER)) {
        return NULL;
    }
    /*
     * Another CPU wrote the slots, so that each of their cache lines is a
     * miss.  Prefetch those of a small frame.
     */
    __builtin_prefetch(ahead);
    __builtin_prefetch(ahead + 64);
    __builtin_prefetch(ahead + 128);
    return slot;
}

bool packet_ring_stuck(PacketRing *ring, uint64_t drops)
{
    bool dropped = drops > ring->drops;

    ring->drops = drops;
    /*
     * If the slot after the next one has a frame, another CPU still writes the
     * next one: then the ring was full when frames were dropped.
     */
    if (dropped && !packet_ring_next(ring) &&
        !(qatomic_load_acquire(&packet_ring_slot(ring, 1)->tp_status) &
          TP_STATUS_USER)) {
        ring->dropped++;
    }
    return ring->dropped > 1;
}

void packet_ring_release(PacketRing *ring)
{
    ring->drops = UINT64_MAX;
    ring->dropped = 0;
    qatomic_store_release(&packet_ring_slot(ring, -1)->tp_status,
                          TP_STATUS_KERNEL);
    if (++ring->next == ring->slots) {
        ring->next = 0;
    }
}
