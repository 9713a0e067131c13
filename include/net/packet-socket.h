/*
 * Packet socket on one network interface
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A packet socket (AF_PACKET, see packet(7)) is bound to one interface and
 * either captures or injects.  Beside each frame there is a struct
 * virtio_net_hdr in the host's byte order, so that offloaded checksums and
 * segmentation survive.
 *
 * All functions are called with the BQL held.  None of them waits for
 * traffic.  Linux only.
 */

#ifndef QEMU_NET_PACKET_SOCKET_H
#define QEMU_NET_PACKET_SOCKET_H

#include "standard-headers/linux/virtio_net.h"

typedef struct PacketSocket PacketSocket;

/*
 * Directions, as the kernel names them.  On a TAP outgoing frames go to the
 * guest, and incoming ones come from it.
 */
#define PACKET_SOCKET_OUTGOING (1 << 0)
#define PACKET_SOCKET_INCOMING (1 << 1)

/* The room that packet_socket_recv() needs to put a VLAN tag back. */
#define PACKET_SOCKET_TAG_ROOM 4

/* How many frames are sent at a time. */
#define PACKET_SOCKET_BATCH 64

/*
 * Create a socket that can capture the frames of @ifindex, which is not 0, in
 * the @directions.  It gets none until packet_socket_hook(), and never one of
 * another interface, nor one that packet_socket_send() sent.
 *
 * If @fd is -1 this needs CAP_NET_RAW, now and not later.  Otherwise @fd is a
 * packet socket that somebody else opened.  It gets a filter and a binding
 * anew, what is queued is discarded, and the filter is locked so that nothing
 * can widen it any more.  On failure (NULL) @fd stays the caller's, but its
 * options may have changed.
 *
 * Frames that wait may use @memory bytes.  A ring, which is there all the time,
 * gets a sixth of it, but at least 4.5 MiB, or two thirds of @memory if that is
 * less.  The rest is for frames of more than 1522 bytes; without
 * CAP_NET_ADMIN it is limited to twice net.core.rmem_max, unless whoever opened
 * @fd has set more (SO_RCVBUFFORCE).
 *
 * With @stamp, packet_socket_time() works, and each packet of the host costs
 * the kernel a look at the clock.
 */
PacketSocket *packet_socket_new_capture(const char *ifname, unsigned ifindex,
                                        int fd, unsigned directions,
                                        size_t memory, bool stamp,
                                        Error **errp);

/*
 * Create a socket that sends frames out of @ifindex and receives nothing.  The
 * rest is as for packet_socket_new_capture().
 */
PacketSocket *packet_socket_new_inject(const char *ifname, unsigned ifindex,
                                       int fd, Error **errp);

/* Close @ps, which may be NULL, and whose fd is not polled any more. */
void packet_socket_free(PacketSocket *ps);

/*
 * Returns the fd, which stays @ps's.  To wait for frames, poll it
 * edge-triggered (EPOLLET): with a ring it is always readable, and each frame
 * is an event, also one that the kernel drops although the ring has room.
 */
int packet_socket_fd(const PacketSocket *ps);

/*
 * Begin to capture: from now on each frame is queued in the kernel.  If @ps is
 * hooked already, that is quick.  Otherwise this and packet_socket_unhook()
 * can take some 20 ms, in which the kernel waits for all CPUs.  Returns false
 * on failure; @ps is not hooked then.
 */
bool packet_socket_hook(PacketSocket *ps, Error **errp);

/*
 * End capturing: the interface's traffic no longer pays for @ps.  What is
 * queued stays and can be read.
 */
void packet_socket_unhook(PacketSocket *ps);

/*
 * Read the next frame to @frame, with any VLAN tag in its place, and its header
 * to @hdr.  @size is what there is at @frame, PACKET_SOCKET_TAG_ROOM included.
 *
 * Returns the frame's length in bytes, or a negative errno: -EAGAIN when there
 * is none; -EMSGSIZE when the frame was longer than @size allows and is gone;
 * -EINVAL when the kernel has no header for the frame's offload (UFO) and has
 * dropped it; -ENETDOWN once when the interface went down or away.
 */
ssize_t packet_socket_recv(PacketSocket *ps, struct virtio_net_hdr *hdr,
                           uint8_t *frame, size_t size);

/*
 * Returns when the frame that packet_socket_recv() has returned last came to
 * the interface, by the host's clock (CLOCK_REALTIME), if @ps has timestamps.
 */
struct timespec packet_socket_time(const PacketSocket *ps);

/*
 * Returns how many calls of packet_socket_recv() it takes at most to read all
 * that waits now.
 */
unsigned packet_socket_max_waiting(const PacketSocket *ps);

/* Discard what waits now.  Returns the number of frames. */
uint64_t packet_socket_discard(PacketSocket *ps);

/* Returns how many the kernel has dropped: no room, or no header for them. */
uint64_t packet_socket_drops(PacketSocket *ps);

/* A frame to be sent */
typedef struct PacketSocketFrame {
    struct virtio_net_hdr hdr;
    const uint8_t *data;
    size_t len;                 /* in bytes */
} PacketSocketFrame;

/*
 * Send up to @n frames, not 0, out of the interface, past its queueing
 * discipline.  Returns how many were sent, or a negative errno that is about
 * the first of them, with nothing sent: -EAGAIN when the interface cannot take
 * it, because a TAP's queue is full, because the interface is down, or because
 * it is a GSO frame that the interface cannot take whole; -EINVAL for a bad
 * header; -EMSGSIZE for a frame longer than the MTU allows; -ENXIO or -ENODEV
 * when the interface is gone.
 */
int packet_socket_send(PacketSocket *ps, const PacketSocketFrame *frames,
                       size_t n);

#endif /* QEMU_NET_PACKET_SOCKET_H */
