/*
 * Packet socket on one network interface
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Theory of operation
 *
 *              interface (a TAP)
 *   host stack ------> tx queue ------> reader of the TAP's fd
 *        |        ^                     (vhost worker, or QEMU)
 *        |        |
 *   a copy, by    |  past the qdisc
 *   BPF filter    |
 *        v        |
 *     capture   inject
 *
 * Only a hooked socket is on the interface's list of taps: an unhooked one, and
 * one that injects, cost the traffic nothing.
 *
 * Frames wait in one of two places, in order; the kernel drops and counts what
 * does not fit:
 *
 *   ring   slots in mapped memory, read without a system call
 *   queue  the socket's receive queue, one system call per frame: frames that
 *          are longer than a slot (the slot then refers to the queue), or all
 *          of them, once the ring has got stuck (see net/packet-ring.c)
 */

#include "qemu/osdep.h"
#include <net/if.h>
#include <sys/socket.h>
#include <linux/filter.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/sock_diag.h>
#include "qapi/error.h"
#include "net/packet-socket.h"
#include "qemu/atomic.h"
#include "qemu/bswap.h"
#include "qemu/cutils.h"
#include "qemu/units.h"
#include "packet-int.h"
#include "trace.h"

/* A frame in the queue counts as at least so many bytes (x86-64: 768). */
#define QUEUE_MIN_MEMORY 512

/* Memory for some 3,000 small frames: what comes in some milliseconds */
#define RING_ENOUGH (4608 * KiB)

/*
 * A protocol that no frame of an Ethernet device has, so that a socket bound to
 * it gets none.  (To bind to protocol 0 would keep the present one.)
 */
#define NO_PROTOCOL ETH_P_AX25

struct PacketSocket {
    int fd;
    unsigned ifindex;
    bool passed;                /* somebody else opened it */
    size_t memory;
    uint64_t drops;
    PacketRing ring;            /* no slots: frames come in the queue alone */
    struct timespec time;       /* of the frame that was taken last */
    char ifname[IFNAMSIZ];
};

static bool packet_socket_option(PacketSocket *ps, int level, int option,
                                 int value, const char *name, Error **errp)
{
    if (setsockopt(ps->fd, level, option, &value, sizeof(value)) < 0) {
        error_setg_errno(errp, errno, "could not set %s on the packet socket "
                         "of interface '%s'", name, ps->ifname);
        return false;
    }
    return true;
}

/*
 * Until it is bound, a packet socket made for ETH_P_ALL gets the frames of
 * every interface.  Made with protocol 0 it gets none, so nothing foreign is
 * in the queue when packet_socket_hook() binds it.
 */
static bool packet_socket_open(PacketSocket *ps, Error **errp)
{
    ps->fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (ps->fd < 0) {
        error_setg_errno(errp, errno, "could not open a packet socket for "
                         "interface '%s'%s", ps->ifname,
                         errno == EPERM ?
                         " (it needs CAP_NET_RAW; without, pass a packet "
                         "socket)" :
                         errno == EACCES ?
                         " (AppArmor or SELinux may refuse it)" : "");
        return false;
    }
    return true;
}

void packet_socket_abandon(PacketSocket *ps)
{
    packet_ring_unmap(&ps->ring, ps->fd);
    if (ps->fd >= 0 && !ps->passed) {
        qemu_close(ps->fd);             /* no close(): it may be of an fdset */
    }
    g_free(ps);
}

static PacketSocket *packet_socket_new(const char *ifname, unsigned ifindex,
                                       int fd, Error **errp)
{
    PacketSocket *ps = g_new0(PacketSocket, 1);

    pstrcpy(ps->ifname, sizeof(ps->ifname), ifname);
    ps->ifindex = ifindex;
    ps->fd = fd;
    ps->passed = fd >= 0;
    if ((ps->passed ? packet_passed_check(fd, ifname, ifindex, errp) :
                      packet_socket_open(ps, errp)) &&
        packet_socket_option(ps, SOL_PACKET, PACKET_VNET_HDR, 1,
                             "PACKET_VNET_HDR", errp)) {
        return ps;
    }
    packet_socket_abandon(ps);
    return NULL;
}

void packet_socket_free(PacketSocket *ps)
{
    if (ps) {
        if (ps->passed) {
            /* Others may have a copy, such as an fdset. */
            packet_socket_unhook(ps);
            packet_socket_discard(ps);
            ps->passed = false;
        }
        packet_socket_abandon(ps);
    }
}

int packet_socket_fd(const PacketSocket *ps)
{
    return ps->fd;
}

struct timespec packet_socket_time(const PacketSocket *ps)
{
    return ps->time;
}

static bool packet_socket_bind(PacketSocket *ps, uint16_t protocol,
                               Error **errp)
{
    struct sockaddr_ll addr = {
        .sll_family = AF_PACKET,
        .sll_protocol = htons(protocol),
        .sll_ifindex = ps->ifindex,
    };

    if (bind(ps->fd, (struct sockaddr *)&addr, sizeof(addr)) < 0) {
        error_setg_errno(errp, errno, "could not bind a packet socket to "
                         "interface '%s'", ps->ifname);
        return false;
    }
    return true;
}

/*
 * The kernel runs the filter before it clones or queues a frame, so that the
 * wrong direction costs next to nothing.
 */
static bool packet_socket_set_filter(PacketSocket *ps, unsigned directions,
                                     Error **errp)
{
    uint32_t outgoing = directions & PACKET_SOCKET_OUTGOING ? UINT32_MAX : 0;
    uint32_t incoming = directions & PACKET_SOCKET_INCOMING ? UINT32_MAX : 0;
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, SKF_AD_OFF + SKF_AD_PKTTYPE),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, PACKET_OUTGOING, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, incoming),
        BPF_STMT(BPF_RET | BPF_K, outgoing),
    };
    struct sock_fprog prog = { .len = ARRAY_SIZE(code), .filter = code };

    if (setsockopt(ps->fd, SOL_SOCKET, SO_ATTACH_FILTER,
                   &prog, sizeof(prog)) < 0) {
        error_setg_errno(errp, errno, "could not set the filter of the packet "
                         "socket of interface '%s'", ps->ifname);
        return false;
    }
    return packet_socket_option(ps, SOL_SOCKET, SO_LOCK_FILTER, 1,
                                "SO_LOCK_FILTER", errp);
}

/*
 * @memory includes what the kernel needs to manage a frame, some 800 bytes for
 * a small one.
 */
static void packet_socket_set_queue(PacketSocket *ps, size_t memory)
{
    /* The kernel doubles the number. */
    int size = MIN(memory / 2, INT_MAX), any;

    if (setsockopt(ps->fd, SOL_SOCKET, SO_RCVBUFFORCE,
                   &size, sizeof(size)) == 0) {
        return;
    }
    /*
     * To exceed net.core.rmem_max takes CAP_NET_ADMIN.  Without, take what any
     * socket gets, but do not reduce what somebody has set who had it.
     */
    any = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    setsockopt(any, SOL_SOCKET, SO_RCVBUF, &size, sizeof(size));
    if (packet_get_option(any, SOL_SOCKET, SO_RCVBUF) >
        packet_get_option(ps->fd, SOL_SOCKET, SO_RCVBUF)) {
        setsockopt(ps->fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof(size));
    }
    close(any);
}

/*
 * A socket that somebody else opened may have got frames of any interface.
 * Now that it has our filter, bind it so that it gets none, and discard what it
 * has got.
 */
static bool packet_socket_take_over(PacketSocket *ps, Error **errp)
{
    qemu_set_cloexec(ps->fd);
    if (!qemu_set_blocking(ps->fd, false, errp) ||
        !packet_socket_option(ps, SOL_PACKET, PACKET_RESERVE, 0,
                              "PACKET_RESERVE", errp) ||
        !packet_socket_option(ps, SOL_SOCKET, SO_TIMESTAMPING, 0,
                              "SO_TIMESTAMPING", errp) ||
        !packet_socket_bind(ps, NO_PROTOCOL, errp)) {
        return false;
    }
    packet_socket_discard(ps);
    packet_socket_drops(ps);
    ps->drops = 0;
    return true;
}

PacketSocket *packet_socket_new_capture(const char *ifname, unsigned ifindex,
                                        int fd, unsigned directions,
                                        size_t memory, bool stamp,
                                        Error **errp)
{
    PacketSocket *ps = packet_socket_new(ifname, ifindex, fd, errp);
    size_t ring = MAX(MIN(memory / 3 * 2, RING_ENOUGH), memory / 6);

    if (!ps) {
        return NULL;
    }
    if (!packet_socket_option(ps, SOL_PACKET, PACKET_AUXDATA, 1,
                              "PACKET_AUXDATA", errp) ||
        !packet_socket_set_filter(ps, directions, errp) ||
        (ps->passed && !packet_socket_take_over(ps, errp)) ||
        !packet_ring_map(&ps->ring, ps->fd, ifname, ring, errp) ||
        /*
         * Otherwise the time would be that at which the kernel wrote the slot,
         * and not the one that all packet sockets have for the packet.
         */
        (stamp && !packet_socket_option(ps, SOL_SOCKET, SO_TIMESTAMPNS, 1,
                                        "SO_TIMESTAMPNS", errp))) {
        packet_socket_abandon(ps);
        return NULL;
    }
    /* The filter would do, but this costs the sender less. */
    packet_socket_option(ps, SOL_PACKET, PACKET_IGNORE_OUTGOING,
                         !(directions & PACKET_SOCKET_OUTGOING),
                         "PACKET_IGNORE_OUTGOING", NULL);
    ps->memory = memory;
    packet_socket_set_queue(ps, memory - ring);
    return ps;
}

/*
 * The bypass of the queueing discipline has two effects that are wanted: no
 * packet socket sees the frame, and a full queue of the TAP is reported
 * (ENOBUFS), where a discipline would drop the frame and report success.
 */
PacketSocket *packet_socket_new_inject(const char *ifname, unsigned ifindex,
                                       int fd, Error **errp)
{
    PacketSocket *ps = packet_socket_new(ifname, ifindex, fd, errp);

    if (ps && (!packet_socket_option(ps, SOL_PACKET, PACKET_QDISC_BYPASS, 1,
                                     "PACKET_QDISC_BYPASS", errp) ||
               !packet_socket_set_filter(ps, 0, errp) ||
               (ps->passed && !packet_socket_take_over(ps, errp)) ||
               /* Protocol 0 keeps the present one, for which none come. */
               !packet_socket_bind(ps, 0, errp))) {
        packet_socket_abandon(g_steal_pointer(&ps));
    }
    return ps;
}

bool packet_socket_hook(PacketSocket *ps, Error **errp)
{
    return packet_socket_bind(ps, ETH_P_ALL, errp);
}

void packet_socket_unhook(PacketSocket *ps)
{
    /* This fails only if the interface is gone, and @ps unhooked by that. */
    packet_socket_bind(ps, NO_PROTOCOL, NULL);
}

/* Put back the tag that the kernel stripped from the frame. */
static size_t packet_socket_restore_tag(struct virtio_net_hdr *hdr,
                                        uint8_t *frame, size_t len,
                                        uint32_t status, uint16_t tci,
                                        uint16_t tpid)
{
    const size_t at = 2 * ETH_ALEN;

    if (!(status & TP_STATUS_VLAN_VALID) || len < at) {
        return len;
    }
    memmove(frame + at + PACKET_SOCKET_TAG_ROOM, frame + at, len - at);
    stw_be_p(frame + at, tpid);
    stw_be_p(frame + at + 2, tci);
    if (hdr->flags & VIRTIO_NET_HDR_F_NEEDS_CSUM) {
        hdr->csum_start += PACKET_SOCKET_TAG_ROOM;
    }
    if (hdr->gso_type != VIRTIO_NET_HDR_GSO_NONE) {
        hdr->hdr_len += PACKET_SOCKET_TAG_ROOM;
    }
    return len + PACKET_SOCKET_TAG_ROOM;
}

/*
 * What the kernel tells beside a frame of the queue; some more may come before
 * if whoever opened the socket set that.
 */
typedef union PacketSocketControl {
    struct cmsghdr align;
    uint8_t buf[CMSG_SPACE(sizeof(struct tpacket_auxdata)) +
                CMSG_SPACE(sizeof(struct timespec)) + 256];
} PacketSocketControl;

static void packet_socket_parse_control(struct msghdr *msg,
                                        struct tpacket_auxdata *aux,
                                        struct timespec *time)
{
    struct cmsghdr *cmsg;

    for (cmsg = CMSG_FIRSTHDR(msg); cmsg; cmsg = CMSG_NXTHDR(msg, cmsg)) {
        if (cmsg->cmsg_level == SOL_PACKET &&
            cmsg->cmsg_type == PACKET_AUXDATA) {
            memcpy(aux, CMSG_DATA(cmsg), sizeof(*aux));
        } else if (cmsg->cmsg_level == SOL_SOCKET &&
                   cmsg->cmsg_type == SO_TIMESTAMPNS) {
            memcpy(time, CMSG_DATA(cmsg), sizeof(*time));
        }
    }
}

/* Take a frame from the queue. */
static ssize_t packet_socket_recv_queue(PacketSocket *ps,
                                        struct virtio_net_hdr *hdr,
                                        uint8_t *frame, size_t size)
{
    PacketSocketControl control;
    struct iovec iov[] = {
        { .iov_base = hdr, .iov_len = sizeof(*hdr) },
        { .iov_base = frame, .iov_len = size },
    };
    struct msghdr msg = {
        .msg_iov = iov,
        .msg_iovlen = ARRAY_SIZE(iov),
        .msg_control = &control,
        .msg_controllen = sizeof(control),
    };
    struct tpacket_auxdata aux = { };
    ssize_t len;

    /*
     * With MSG_TRUNC the length is the frame's even if it does not fit.  Others
     * who have a copy of a passed socket can make it blocking at any time.
     */
    len = RETRY_ON_EINTR(recvmsg(ps->fd, &msg, MSG_TRUNC | MSG_DONTWAIT));
    if (len < 0) {
        return -errno;
    }
    len -= sizeof(*hdr);
    if (len < 0 || len > size) {
        return -EMSGSIZE;
    }
    packet_socket_parse_control(&msg, &aux, &ps->time);
    return packet_socket_restore_tag(hdr, frame, len, aux.tp_status,
                                     aux.tp_vlan_tci, aux.tp_vlan_tpid);
}

/*
 * Take the frame of the next slot.  Returns -ENOBUFS if it was too long for
 * the slot, and is not in the queue, which was full or was read by others.
 */
static ssize_t packet_socket_recv_slot(PacketSocket *ps,
                                       struct virtio_net_hdr *hdr,
                                       uint8_t *frame, size_t size)
{
    const struct tpacket2_hdr *slot = packet_ring_next(&ps->ring);
    const uint8_t *data;
    uint32_t status, in_slot, at;
    ssize_t len;

    if (!slot) {
        return -EAGAIN;
    }
    status = slot->tp_status;
    in_slot = qatomic_read(&slot->tp_snaplen);
    at = qatomic_read(&slot->tp_mac);
    data = (const uint8_t *)slot + at;
    if (status & TP_STATUS_COPY) {
        len = packet_socket_recv_queue(ps, hdr, frame, size);
        if (len == -EAGAIN) {
            len = -ENOBUFS;     /* somebody else has read it */
        } else if (len < 0 && len != -EMSGSIZE && len != -EINVAL) {
            return len;         /* of the socket; the frame is still there */
        }
    } else if (in_slot < slot->tp_len) {
        len = -ENOBUFS;
    } else if (in_slot > size || at < sizeof(*slot) + sizeof(*hdr) ||
               at + in_slot > PACKET_RING_SLOT_SIZE) {
        len = -EMSGSIZE;
    } else {
        memcpy(hdr, data - sizeof(*hdr), sizeof(*hdr));
        memcpy(frame, data, in_slot);
        ps->time.tv_sec = slot->tp_sec;
        ps->time.tv_nsec = slot->tp_nsec;
        len = packet_socket_restore_tag(hdr, frame, in_slot, status,
                                        slot->tp_vlan_tci,
                                        slot->tp_vlan_tpid);
    }
    packet_ring_release(&ps->ring);
    return len;
}

/* What comes meanwhile, in some 10 ms, is neither read nor counted. */
static void packet_socket_leave_ring(PacketSocket *ps)
{
    trace_packet_socket_ring_stuck(ps->ifname);
    packet_ring_unmap(&ps->ring, ps->fd);
    packet_socket_set_queue(ps, ps->memory);
}

ssize_t packet_socket_recv(PacketSocket *ps, struct virtio_net_hdr *hdr,
                           uint8_t *frame, size_t size)
{
    ssize_t len = -EAGAIN;

    size -= MIN(size, PACKET_SOCKET_TAG_ROOM);
    if (!ps->ring.slots) {
        return packet_socket_recv_queue(ps, hdr, frame, size);
    }
    /* Bounded, since others may write to the ring of a passed socket. */
    for (unsigned i = 0; i < ps->ring.slots; i++) {
        len = packet_socket_recv_slot(ps, hdr, frame, size);
        if (len != -ENOBUFS) {
            break;
        }
        ps->drops++;
        len = -EAGAIN;
    }
    if (len == -EAGAIN) {
        /* Errors of the socket do not show in the ring. */
        len = -packet_get_option(ps->fd, SOL_SOCKET, SO_ERROR) ?: -EAGAIN;
        if (packet_ring_stuck(&ps->ring, packet_socket_drops(ps))) {
            packet_socket_leave_ring(ps);
        }
    }
    return len;
}

unsigned packet_socket_max_waiting(const PacketSocket *ps)
{
    uint32_t memory[SK_MEMINFO_VARS] = { };
    socklen_t size = sizeof(memory);

    getsockopt(ps->fd, SOL_SOCKET, SO_MEMINFO, memory, &size);
    /* One call more may return an error, which comes before the frames. */
    return ps->ring.slots +
           memory[SK_MEMINFO_RMEM_ALLOC] / QUEUE_MIN_MEMORY + 1;
}

uint64_t packet_socket_discard(PacketSocket *ps)
{
    unsigned max = packet_socket_max_waiting(ps);
    uint64_t frames = 0;
    struct virtio_net_hdr hdr;
    uint8_t room[PACKET_SOCKET_TAG_ROOM];
    ssize_t len;

    for (unsigned i = 0; i < max; i++) {
        /* To read a part of a frame removes all of it. */
        len = packet_socket_recv(ps, &hdr, room, sizeof(room));
        if (len >= 0 || len == -EMSGSIZE || len == -EINVAL) {
            frames++;
        } else if (len != -ENETDOWN) { /* that comes before the frames */
            break;
        }
    }
    return frames;
}

int packet_socket_send(PacketSocket *ps, const PacketSocketFrame *frames,
                       size_t n)
{
    /*
     * The protocol is 0: the kernel takes it from the frame, and not from what
     * the socket is bound to.
     */
    struct sockaddr_ll addr = {
        .sll_family = AF_PACKET,
        .sll_ifindex = ps->ifindex,
    };
    struct iovec iov[PACKET_SOCKET_BATCH][2];
    struct mmsghdr msgs[PACKET_SOCKET_BATCH];
    int ret;

    n = MIN(n, PACKET_SOCKET_BATCH);
    for (size_t i = 0; i < n; i++) {
        iov[i][0].iov_base = (void *)&frames[i].hdr;
        iov[i][0].iov_len = sizeof(frames[i].hdr);
        iov[i][1].iov_base = (void *)frames[i].data;
        iov[i][1].iov_len = frames[i].len;
        msgs[i].msg_hdr = (struct msghdr) {
            .msg_name = &addr,
            .msg_namelen = sizeof(addr),
            .msg_iov = iov[i],
            .msg_iovlen = ARRAY_SIZE(iov[i]),
        };
    }
    ret = RETRY_ON_EINTR(sendmmsg(ps->fd, msgs, n, MSG_DONTWAIT));
    if (ret < 0) {
        return errno == ENOBUFS || errno == ENETDOWN ? -EAGAIN : -errno;
    }
    return ret;
}

uint64_t packet_socket_drops(PacketSocket *ps)
{
    struct tpacket_stats stats;
    socklen_t size = sizeof(stats);

    /* To read the kernel's counters resets them. */
    if (getsockopt(ps->fd, SOL_PACKET, PACKET_STATISTICS,
                   &stats, &size) == 0) {
        ps->drops += stats.tp_drops;
    }
    return ps->drops;
}
