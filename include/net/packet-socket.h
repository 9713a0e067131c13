/*
 * Packet socket on one network interface
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A packet socket (AF_PACKET, see packet(7)) is bound to one interface and
 * either captures or injects.  Frames cross this interface with a struct
 * virtio_net_hdr beside them, in the host's byte order, so that offloaded
 * checksums and segmentation survive.
 *
 * All functions are called with the BQL held.  None of them waits for
 * traffic.  Linux only.
 */

#ifndef QEMU_NET_PACKET_SOCKET_H
#define QEMU_NET_PACKET_SOCKET_H

#include "standard-headers/linux/virtio_net.h"

typedef struct PacketSocket PacketSocket;

/*
 * Directions, as the kernel sees them from the interface.  On a TAP what the
 * host sends (outgoing) is what the reader of the TAP's fd gets.
 */
#define PACKET_SOCKET_OUTGOING (1 << 0)
#define PACKET_SOCKET_INCOMING (1 << 1)

/*
 * Bytes that packet_socket_recv() needs in its buffer besides the frame, to
 * put a VLAN tag back.
 */
#define PACKET_SOCKET_TAG_ROOM 4

/* How many frames are sent at a time. */
#define PACKET_SOCKET_BATCH 64

/*
 * The mark (SO_MARK) of sockets that inject, "qemu".  Captures leave their
 * frames out: a frame that was just put in must not come out again.
 */
#define PACKET_SOCKET_INJECTED_MARK 0x71656d75

/*
 * A socket that somebody else opened, @fd of the functions below, is taken
 * over: it gets filter and binding anew, what is queued is thrown away, and its
 * filter is locked, so that nothing can widen it any more.  It is refused
 * unless it is a packet socket of type SOCK_RAW in the network namespace of
 * the interface, bound to it or to none, without a ring, a locked filter or a
 * fanout group.  With it nothing here needs a privilege, see the functions.
 * It is closed when it is refused, too.
 */

/**
 * packet_socket_new_capture:
 * @ifname: the interface's name, for messages
 * @ifindex: the interface, not 0
 * @fd: a packet socket to take over, or -1 to open one
 * @directions: PACKET_SOCKET_OUTGOING, PACKET_SOCKET_INCOMING, or both
 * @memory: bytes that frames that wait to be taken may use
 * @errp: set on failure
 *
 * Create a socket that can capture the frames of @ifindex.  It gets none
 * until packet_socket_hook(), and never one of another interface, nor one
 * that a socket of packet_socket_new_inject() sent.
 * Without @fd this needs CAP_NET_RAW, now and not later.
 *
 * Without CAP_NET_ADMIN the third of @memory that is for frames of more than
 * 1522 bytes, or all of it unless @directions is PACKET_SOCKET_OUTGOING, is no
 * more than twice net.core.rmem_max; or more, if @fd has it (SO_RCVBUFFORCE).
 *
 * Returns: the socket, which packet_socket_free() destroys, or NULL.
 */
PacketSocket *packet_socket_new_capture(const char *ifname, unsigned ifindex,
                                        int fd, unsigned directions,
                                        size_t memory, Error **errp);

/**
 * packet_socket_new_inject:
 * @ifname: the interface's name, for messages
 * @ifindex: the interface, not 0
 * @fd: a packet socket to take over, or -1 to open one
 * @errp: set on failure
 *
 * Create a socket that sends frames out of @ifindex and receives nothing.
 * Without @fd this needs CAP_NET_RAW (before Linux 5.17 also CAP_NET_ADMIN),
 * now and not later; with one that has not PACKET_SOCKET_INJECTED_MARK, too.
 *
 * Returns: the socket, which packet_socket_free() destroys, or NULL.
 */
PacketSocket *packet_socket_new_inject(const char *ifname, unsigned ifindex,
                                       int fd, Error **errp);

/**
 * packet_socket_free:
 * @ps: the socket, or NULL
 *
 * Close @ps.  The caller has removed its handlers from the fd.
 */
void packet_socket_free(PacketSocket *ps);

/**
 * packet_socket_is:
 * @fd: any file descriptor, open or not
 *
 * Returns: whether it is a packet socket.
 */
bool packet_socket_is(int fd);

/**
 * packet_socket_fd:
 * @ps: the socket
 *
 * Returns: the fd, to poll it.  It stays @ps's.
 */
int packet_socket_fd(const PacketSocket *ps);

/**
 * packet_socket_stamp:
 * @ps: a capturing socket
 * @errp: set on failure
 *
 * From now on packet_socket_time() tells the time of each frame.  (The kernel
 * begins with it some ms later; until then it may be a time at which the frame
 * was taken.)  As long as there is such a socket, each packet of the host costs
 * the kernel a look at the clock.
 *
 * Returns: true on success.
 */
bool packet_socket_stamp(PacketSocket *ps, Error **errp);

/**
 * packet_socket_time:
 * @ps: a capturing socket, after packet_socket_stamp()
 *
 * Returns: when the frame that packet_socket_recv() has given last came to the
 * interface, by the host's clock (CLOCK_REALTIME).
 */
struct timespec packet_socket_time(const PacketSocket *ps);

/**
 * packet_socket_hook:
 * @ps: a capturing socket
 * @errp: set on failure
 *
 * Begin to capture: from now on each frame is queued in the kernel.  If @ps is
 * hooked already, that is quick, and makes sure of it.  Otherwise this and
 * packet_socket_unhook() can take some 10 ms, until no CPU uses the
 * interface's former list.
 *
 * Returns: true on success.  On failure @ps stays unhooked.
 */
bool packet_socket_hook(PacketSocket *ps, Error **errp);

/**
 * packet_socket_unhook:
 * @ps: a capturing socket
 *
 * End capturing: the interface's traffic no longer pays for @ps.  What is
 * queued stays and can be read.
 */
void packet_socket_unhook(PacketSocket *ps);

/**
 * packet_socket_waiting:
 * @ps: a capturing socket
 *
 * Returns: how many packet_socket_recv() it takes at most to get all that waits
 * in @ps now.
 */
unsigned packet_socket_waiting(const PacketSocket *ps);

/**
 * packet_socket_discard:
 * @ps: a capturing socket
 * @max: the most frames, as more may come meanwhile
 *
 * Throw away what is queued.
 *
 * Returns: the number of frames thrown away.
 */
uint64_t packet_socket_discard(PacketSocket *ps, uint64_t max);

/**
 * packet_socket_recv:
 * @ps: a capturing socket
 * @hdr: filled with the frame's header
 * @frame: filled with the frame, any VLAN tag in its place
 * @size: bytes at @frame, PACKET_SOCKET_TAG_ROOM among them
 *
 * Take the next frame from the queue.
 *
 * Returns: the frame's length in bytes, or a negative errno: -EAGAIN when the
 * queue is empty, -EMSGSIZE when the frame was longer than @size allows and
 * is gone, -ENETDOWN once when the interface went down or away.
 */
ssize_t packet_socket_recv(PacketSocket *ps, struct virtio_net_hdr *hdr,
                           uint8_t *frame, size_t size);

/* A frame to be sent */
typedef struct PacketSocketFrame {
    struct virtio_net_hdr hdr;
    const uint8_t *data;
    size_t len;                 /* in bytes */
} PacketSocketFrame;

/**
 * packet_socket_send:
 * @ps: an injecting socket
 * @frames: the frames
 * @n: their number, not 0; no more than PACKET_SOCKET_BATCH are sent
 *
 * Send frames out of the interface, past its queueing discipline.  None goes
 * behind the first GSO frame that the interface does not take whole.
 *
 * Returns: how many of the frames were sent, or a negative errno that is about
 * the first of them, with nothing sent: -EAGAIN when the interface cannot take
 * it now (a TAP's queue is full) and it is worth to try again later;
 * -EOPNOTSUPP when the interface cannot take it unless it is segmented;
 * -EINVAL for a bad header; -EMSGSIZE for a frame longer than the MTU allows;
 * -ENETDOWN, -ENXIO or -ENODEV when the interface is down or gone.
 */
int packet_socket_send(PacketSocket *ps, const PacketSocketFrame *frames,
                       size_t n);

/**
 * packet_socket_send_plain:
 * @ps: an injecting socket
 * @frame: the frame
 *
 * Send one frame through the interface's queueing discipline.  The kernel
 * segments it at need; when the interface cannot take it, it gets lost there
 * and shows only in the interface's tx_dropped.  For a GSO frame that
 * packet_socket_send() cannot send and frame_segments_init() does not know, or
 * that has been waiting too long: the kernel does not tell a full queue from a
 * frame that it cannot send for ever.
 *
 * Returns: 0, or a negative errno.
 */
int packet_socket_send_plain(PacketSocket *ps, const PacketSocketFrame *frame);

/**
 * packet_socket_drops:
 * @ps: a capturing socket
 *
 * Returns: how many frames the kernel has dropped since @ps was made because
 * its queue was full.
 */
uint64_t packet_socket_drops(PacketSocket *ps);

#endif /* QEMU_NET_PACKET_SOCKET_H */
