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
 * A capturing socket is in one of two states:
 *
 *   unhooked --- packet_socket_hook() ---> hooked
 *      ^                                     |
 *      +------- packet_socket_unhook() ------+
 *
 * Only a hooked socket is on the interface's list of taps, so an unhooked one
 * costs the traffic nothing.
 *
 * Frames wait in one of two places, in order; the kernel drops and counts what
 * does not fit:
 *
 *   ring   slots that the kernel fills and we read in mapped memory, without
 *          a system call.  Only where outgoing frames alone are captured, see
 *          packet_socket_map_ring().
 *   queue  the socket's receive queue, one system call per frame: frames that
 *          are longer than a slot (the slot then refers to the queue), or all
 *          of them.
 *
 * An injecting socket is on no list at all.  Past the qdisc nothing is
 * segmented: the kernel drops a GSO frame that the interface cannot take whole,
 * and counts that.  So the interface's offloads are known before such a frame
 * is sent.  They change while the socket exists, above all when the guest's
 * driver negotiates, and a netlink socket tells when.
 */

#include "qemu/osdep.h"
#include <net/if.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <linux/ethtool.h>
#include <linux/filter.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <linux/sock_diag.h>
#include <linux/sockios.h>
#include "qapi/error.h"
#include "net/packet-socket.h"
#include "qemu/atomic.h"
#include "qemu/bitops.h"
#include "qemu/bswap.h"
#include "qemu/cutils.h"
#include "qemu/sockets.h"
#include "qemu/units.h"

/*
 * A slot of the ring holds a frame of an MTU of 1500 with two VLAN tags: 76
 * bytes for the kernel's headers come before it.  A block is what the kernel
 * allocates in one piece, in whole pages of whatever size.
 */
#define SLOT_SIZE 1600
#define BLOCK_SIZE (64 * KiB)
#define SLOTS_PER_BLOCK (BLOCK_SIZE / SLOT_SIZE)

/* What a frame in the queue counts as at least; 768 bytes on x86-64. */
#define QUEUE_MIN_MEMORY 512

/* How many slots ahead the cache is filled; there are at least as many. */
#define AHEAD 8

/*
 * A protocol that no frame of an Ethernet device has: eth_type_trans() in the
 * kernel makes numbers below 0x600 only of a few, and AX.25 is none of them.
 * A socket that is bound to it is not among those that each frame is offered
 * to.  (Protocol 0 would not do: to bind() it means to keep the present one.)
 */
#define NO_PROTOCOL ETH_P_AX25

/* Longer GSO frames are segmented whatever the interface can do. */
#define GSO_MAX_LEN 65536

/* Offloads that let an interface take GSO frames whole */
enum {
    OFFLOAD_TCPV4,
    OFFLOAD_TCPV6,
    OFFLOAD_ECN,
    OFFLOAD_UDP,
};

/* ... by the names that "ethtool -k" has for them */
static const char *const offload_names[] = {
    [OFFLOAD_TCPV4] = "tx-tcp-segmentation",
    [OFFLOAD_TCPV6] = "tx-tcp6-segmentation",
    [OFFLOAD_ECN] = "tx-tcp-ecn-segmentation",
    [OFFLOAD_UDP] = "tx-udp-segmentation",
};

#ifndef PACKET_IGNORE_OUTGOING
#define PACKET_IGNORE_OUTGOING 23       /* Linux 4.20 */
#endif

struct PacketSocket {
    int fd;
    unsigned ifindex;
    bool bypasses_qdisc;
    bool was_empty;
    uint64_t drops;
    uint8_t *ring;              /* NULL: frames come in the queue alone */
    size_t ring_size;
    unsigned slots;
    unsigned next_slot;
    struct timespec time;       /* of the frame that was taken last */
    unsigned offloads;          /* bits: those that were on, when last seen */
    int link_fd;                /* tells when they may be others, or -1 */
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

/* Returns 0 where the kernel does not have the option. */
static int packet_socket_get_option(const PacketSocket *ps, int level,
                                    int option)
{
    int value = 0;
    socklen_t size = sizeof(value);

    return getsockopt(ps->fd, level, option, &value, &size) < 0 ? 0 : value;
}

bool packet_socket_is(int fd)
{
    int domain;
    socklen_t size = sizeof(domain);

    return !getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size) &&
           domain == AF_PACKET;
}

/*
 * Until it is bound, a packet socket made for ETH_P_ALL gets the frames of
 * every interface.  Made with protocol 0 it gets none, so nothing foreign is
 * in the queue when packet_socket_hook() binds it.
 */
static bool packet_socket_open(PacketSocket *ps, Error **errp)
{
    ERRP_GUARD();

    ps->fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (ps->fd < 0) {
        error_setg_errno(errp, errno, "could not open a packet socket for "
                         "interface '%s'", ps->ifname);
        if (errno == EPERM || errno == EACCES) {
            error_append_hint(errp, "Packet sockets need CAP_NET_RAW in the "
                              "network namespace that QEMU runs in.  Without, "
                              "pass one with 'packet-fd'.\n");
        }
        return false;
    }
    return true;
}

/* Since Linux 5.14; before that, 0. */
static uint64_t packet_socket_netns(int fd)
{
    uint64_t cookie = 0;
#ifdef SO_NETNS_COOKIE
    socklen_t size = sizeof(cookie);

    if (getsockopt(fd, SOL_SOCKET, SO_NETNS_COOKIE, &cookie, &size) < 0) {
        return 0;
    }
#endif
    return cookie;
}

/*
 * An interface's number counts in its network namespace.  These are the ways
 * to tell a socket's that need no privilege (SIOCGSKNS does).
 */
static bool packet_socket_same_netns(const PacketSocket *ps)
{
    struct ifreq ifr = { .ifr_ifindex = ps->ifindex };
    int own;
    bool same;

    if (ioctl(ps->fd, SIOCGIFNAME, &ifr) < 0 ||
        strcmp(ifr.ifr_name, ps->ifname)) {
        return false;
    }
    own = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (own < 0) {
        return false;
    }
    same = packet_socket_netns(own) == packet_socket_netns(ps->fd);
    close(own);
    return same;
}

/* Whether the socket is bound to no other interface. */
static bool packet_socket_check_binding(const PacketSocket *ps, Error **errp)
{
    struct sockaddr_ll addr = { };
    socklen_t size = sizeof(addr);
    char name[IF_NAMESIZE];

    if (getsockname(ps->fd, (struct sockaddr *)&addr, &size) < 0) {
        error_setg_errno(errp, errno, "could not see what the packet socket "
                         "is bound to");
        return false;
    }
    if (!addr.sll_ifindex || addr.sll_ifindex == ps->ifindex) {
        return true;
    }
    if (if_indextoname(addr.sll_ifindex, name)) {
        error_setg(errp, "the packet socket is bound to interface '%s', not "
                   "to '%s'", name, ps->ifname);
    } else {
        error_setg(errp, "the packet socket is bound to an interface that is "
                   "gone, not to '%s'", ps->ifname);
    }
    return false;
}

/* The kernel changes neither a ring nor the version while there is one. */
static bool packet_socket_has_ring(const PacketSocket *ps)
{
    int version = packet_socket_get_option(ps, SOL_PACKET, PACKET_VERSION);

    return setsockopt(ps->fd, SOL_PACKET, PACKET_VERSION,
                      &version, sizeof(version)) < 0 && errno == EBUSY;
}

/*
 * Whether a socket that somebody else opened can be made ours.  This changes
 * nothing about it.
 */
static bool packet_socket_check(const PacketSocket *ps, Error **errp)
{
    if (!packet_socket_is(ps->fd)) {
        error_setg(errp, "file descriptor %d is not a packet socket", ps->fd);
        return false;
    }
    if (packet_socket_get_option(ps, SOL_SOCKET, SO_TYPE) != SOCK_RAW) {
        error_setg(errp, "the packet socket is not of type SOCK_RAW");
        return false;
    }
    if (!packet_socket_same_netns(ps)) {
        error_setg(errp, "the packet socket is in another network namespace "
                   "than interface '%s'", ps->ifname);
        return false;
    }
    if (!packet_socket_check_binding(ps, errp)) {
        return false;
    }
    if (packet_socket_get_option(ps, SOL_PACKET, PACKET_FANOUT)) {
        error_setg(errp, "the packet socket is in a fanout group, and there "
                   "is no way out of it");
        return false;
    }
    if (packet_socket_get_option(ps, SOL_SOCKET, SO_LOCK_FILTER)) {
        error_setg(errp, "the packet socket has a filter that is locked");
        return false;
    }
    if (packet_socket_has_ring(ps)) {
        error_setg(errp, "the packet socket has a ring already");
        return false;
    }
    return true;
}

/* Takes @fd over, also when it fails. */
static PacketSocket *packet_socket_new(const char *ifname, unsigned ifindex,
                                       int fd, Error **errp)
{
    PacketSocket *ps = g_new0(PacketSocket, 1);

    pstrcpy(ps->ifname, sizeof(ps->ifname), ifname);
    ps->ifindex = ifindex;
    ps->link_fd = -1;
    ps->fd = fd;
    if (!ifindex) {
        /* To the kernel it means: all interfaces. */
        error_setg_errno(errp, ENODEV, "could not find interface '%s'",
                         ifname);
        goto fail;
    }
    if (fd < 0 ? !packet_socket_open(ps, errp) :
                 !packet_socket_check(ps, errp)) {
        goto fail;
    }
    if (!packet_socket_option(ps, SOL_PACKET, PACKET_VNET_HDR, 1,
                              "PACKET_VNET_HDR", errp)) {
        goto fail;
    }
    return ps;

fail:
    packet_socket_free(ps);
    return NULL;
}

void packet_socket_free(PacketSocket *ps)
{
    if (ps) {
        if (ps->ring) {
            munmap(ps->ring, ps->ring_size);
        }
        if (ps->link_fd >= 0) {
            close(ps->link_fd);
        }
        if (ps->fd >= 0) {
            qemu_close(ps->fd);         /* it may be of a set, /dev/fdset/ */
        }
        g_free(ps);
    }
}

int packet_socket_fd(const PacketSocket *ps)
{
    return ps->fd;
}

/*
 * Without the option only the ring has times, and they are of the moment when
 * the kernel wrote the slot.  With it the kernel stamps a packet before it
 * makes the copies, so that all packet sockets have the same time for it.
 */
bool packet_socket_stamp(PacketSocket *ps, Error **errp)
{
    return packet_socket_option(ps, SOL_SOCKET, SO_TIMESTAMPNS, 1,
                                "SO_TIMESTAMPNS", errp);
}

struct timespec packet_socket_time(const PacketSocket *ps)
{
    return ps->time;
}

static int packet_socket_bind(PacketSocket *ps, uint16_t protocol)
{
    struct sockaddr_ll addr = {
        .sll_family = AF_PACKET,
        .sll_protocol = htons(protocol),
        .sll_ifindex = ps->ifindex,
    };

    return bind(ps->fd, (struct sockaddr *)&addr, sizeof(addr)) < 0 ?
           -errno : 0;
}

/*
 * The kernel runs the filter before it clones or queues a frame, so that the
 * wrong direction costs next to nothing.  Frames of our own injecting sockets
 * that took the plain path (see packet_socket_send()) are told by their mark.
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
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, SKF_AD_OFF + SKF_AD_MARK),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, PACKET_SOCKET_INJECTED_MARK, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, outgoing),
        BPF_STMT(BPF_RET | BPF_K, 0),
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
 * @memory counts as the kernel does: with what it needs to manage a frame,
 * some 800 bytes for a small one.
 */
static void packet_socket_set_queue(PacketSocket *ps, size_t memory)
{
    /* The kernel doubles the number. */
    int size = MIN(memory / 2, INT_MAX);

    /*
     * Only CAP_NET_ADMIN may go over net.core.rmem_max.  Without, take what we
     * get, or leave what somebody set who may.
     */
    if (setsockopt(ps->fd, SOL_SOCKET, SO_RCVBUFFORCE,
                   &size, sizeof(size)) < 0 &&
        packet_socket_get_option(ps, SOL_SOCKET, SO_RCVBUF) / 2 < size) {
        setsockopt(ps->fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof(size));
    }
}

/*
 * TPACKET_V2 rather than V3, which would hold more small frames in the same
 * memory, since V3 hands them out by the block: when it is full, or after 1
 * to 10 ms.
 *
 * A ring has one flaw.  A GSO frame of a type that struct virtio_net_hdr does
 * not know keeps its slot for ever, and the ring is stuck (6.1, 6.18).  A
 * guest can send such a frame (UFO).  But none goes out of a TAP: the kernel
 * segments it before.  So incoming frames come in the queue.
 */
static bool packet_socket_map_ring(PacketSocket *ps, size_t memory,
                                   Error **errp)
{
    struct tpacket_req req = {
        .tp_block_size = BLOCK_SIZE,
        .tp_block_nr = MAX(1, memory / BLOCK_SIZE),
        .tp_frame_size = SLOT_SIZE,
    };

    req.tp_frame_nr = req.tp_block_nr * SLOTS_PER_BLOCK;
    if (!packet_socket_option(ps, SOL_PACKET, PACKET_VERSION, TPACKET_V2,
                              "PACKET_VERSION", errp) ||
        !packet_socket_option(ps, SOL_PACKET, PACKET_COPY_THRESH, 1,
                              "PACKET_COPY_THRESH", errp)) {
        return false;
    }
    if (setsockopt(ps->fd, SOL_PACKET, PACKET_RX_RING,
                   &req, sizeof(req)) < 0) {
        error_setg_errno(errp, errno, "could not get a ring of %u KiB for the "
                         "packet socket of interface '%s'",
                         (unsigned)(req.tp_block_nr * (BLOCK_SIZE / KiB)),
                         ps->ifname);
        return false;
    }
    ps->ring_size = req.tp_block_nr * BLOCK_SIZE;
    ps->ring = mmap(NULL, ps->ring_size, PROT_READ | PROT_WRITE, MAP_SHARED,
                    ps->fd, 0);
    if (ps->ring == MAP_FAILED) {
        ps->ring = NULL;
        error_setg_errno(errp, errno, "could not map the ring of the packet "
                         "socket of interface '%s'", ps->ifname);
        return false;
    }
    ps->slots = req.tp_frame_nr;
    return true;
}

/*
 * A socket that somebody else opened may have got frames of any interface.
 * Now that the filter is ours, bind it where no frame comes, and throw away
 * what was queued before.
 */
static bool packet_socket_take_over(PacketSocket *ps, Error **errp)
{
    int ret;

    qemu_set_cloexec(ps->fd);
    if (!qemu_set_blocking(ps->fd, false, errp) ||
        !packet_socket_option(ps, SOL_PACKET, PACKET_RESERVE, 0,
                              "PACKET_RESERVE", errp)) {
        return false;
    }
    ret = packet_socket_bind(ps, NO_PROTOCOL);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "could not bind a packet socket to "
                         "interface '%s'", ps->ifname);
        return false;
    }
    packet_socket_discard(ps, UINT64_MAX);
    packet_socket_drops(ps);
    ps->drops = 0;
    return true;
}

PacketSocket *packet_socket_new_capture(const char *ifname, unsigned ifindex,
                                        int fd, unsigned directions,
                                        size_t memory, Error **errp)
{
    PacketSocket *ps = packet_socket_new(ifname, ifindex, fd, errp);
    size_t ring = directions == PACKET_SOCKET_OUTGOING ? memory / 3 * 2 : 0;

    if (!ps) {
        return NULL;
    }
    if (!packet_socket_option(ps, SOL_PACKET, PACKET_AUXDATA, 1,
                              "PACKET_AUXDATA", errp) ||
        !packet_socket_set_filter(ps, directions, errp) ||
        (fd >= 0 && !packet_socket_take_over(ps, errp)) ||
        (ring && !packet_socket_map_ring(ps, ring, errp))) {
        packet_socket_free(ps);
        return NULL;
    }
    /* The filter does it too; this spares the sender the filter. */
    packet_socket_option(ps, SOL_PACKET, PACKET_IGNORE_OUTGOING,
                         !(directions & PACKET_SOCKET_OUTGOING),
                         "PACKET_IGNORE_OUTGOING", NULL);
    packet_socket_set_queue(ps, memory - ring);
    return ps;
}

/*
 * The bypass of the queueing discipline is set for two reasons: no packet
 * socket sees the frame, and when the TAP's queue is full we are told
 * (ENOBUFS), where a discipline would drop it and report success.
 */
static bool packet_socket_set_bypass(PacketSocket *ps, bool bypass,
                                     Error **errp)
{
    if (bypass != ps->bypasses_qdisc) {
        if (!packet_socket_option(ps, SOL_PACKET, PACKET_QDISC_BYPASS, bypass,
                                  "PACKET_QDISC_BYPASS", errp)) {
            return false;
        }
        ps->bypasses_qdisc = bypass;
    }
    return true;
}

/* It takes a privilege, so whoever opened the socket may have set it. */
static bool packet_socket_set_mark(PacketSocket *ps, Error **errp)
{
    ERRP_GUARD();

    if (packet_socket_get_option(ps, SOL_SOCKET, SO_MARK) ==
        PACKET_SOCKET_INJECTED_MARK) {
        return true;
    }
    if (!packet_socket_option(ps, SOL_SOCKET, SO_MARK,
                              PACKET_SOCKET_INJECTED_MARK,
                              "SO_MARK "
                              stringify(PACKET_SOCKET_INJECTED_MARK), errp)) {
        error_append_hint(errp, "This needs CAP_NET_RAW, before Linux 5.17 "
                          "CAP_NET_ADMIN.  Whoever opens the socket can do "
                          "it.\n");
        return false;
    }
    return true;
}

PacketSocket *packet_socket_new_inject(const char *ifname, unsigned ifindex,
                                       int fd, Error **errp)
{
    PacketSocket *ps = packet_socket_new(ifname, ifindex, fd, errp);
    int ret;

    if (!ps) {
        return NULL;
    }
    if (!packet_socket_set_mark(ps, errp) ||
        !packet_socket_set_bypass(ps, true, errp) ||
        !packet_socket_set_filter(ps, 0, errp) ||
        (fd >= 0 && !packet_socket_take_over(ps, errp))) {
        goto fail;
    }
    /*
     * Bound to ETH_P_ALL it would get, and pay for, a copy of each frame.  With
     * 0 the protocol stays.
     */
    ret = packet_socket_bind(ps, 0);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "could not bind a packet socket to "
                         "interface '%s'", ifname);
        goto fail;
    }
    return ps;

fail:
    packet_socket_free(ps);
    return NULL;
}

bool packet_socket_hook(PacketSocket *ps, Error **errp)
{
    int ret = packet_socket_bind(ps, ETH_P_ALL);

    if (ret < 0) {
        error_setg_errno(errp, -ret, "could not bind a packet socket to "
                         "interface '%s'", ps->ifname);
        return false;
    }
    return true;
}

void packet_socket_unhook(PacketSocket *ps)
{
    /* This fails only when the interface is gone, and the hook with it. */
    packet_socket_bind(ps, NO_PROTOCOL);
}

/*
 * Put back the tag that the kernel stripped from the frame.  Since Linux 3.14
 * it also says which TPID it had.
 */
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
    stw_be_p(frame + at,
             status & TP_STATUS_VLAN_TPID_VALID ? tpid : ETH_P_8021Q);
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

/* Returns the data of a message, or NULL if it is another one. */
static const void *packet_socket_control_data(struct cmsghdr *cmsg, int level,
                                              int type, size_t size)
{
    return cmsg->cmsg_level == level && cmsg->cmsg_type == type &&
           cmsg->cmsg_len >= CMSG_LEN(size) ? CMSG_DATA(cmsg) : NULL;
}

static void packet_socket_parse_control(struct msghdr *msg,
                                        struct tpacket_auxdata *aux,
                                        struct timespec *time)
{
    struct cmsghdr *cmsg;

    for (cmsg = CMSG_FIRSTHDR(msg); cmsg; cmsg = CMSG_NXTHDR(msg, cmsg)) {
        const void *data;

        data = packet_socket_control_data(cmsg, SOL_PACKET, PACKET_AUXDATA,
                                          sizeof(*aux));
        if (data) {
            memcpy(aux, data, sizeof(*aux));
        }
        data = packet_socket_control_data(cmsg, SOL_SOCKET, SO_TIMESTAMPNS,
                                          sizeof(*time));
        if (data) {
            memcpy(time, data, sizeof(*time));
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

    /* With MSG_TRUNC the length is the frame's even if it does not fit. */
    len = RETRY_ON_EINTR(recvmsg(ps->fd, &msg, MSG_TRUNC));
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

static struct tpacket2_hdr *packet_socket_slot(const PacketSocket *ps,
                                               unsigned ahead)
{
    unsigned n = ps->next_slot + ahead;

    n = n < ps->slots ? n : n - ps->slots;
    return (struct tpacket2_hdr *)
           (ps->ring + n / SLOTS_PER_BLOCK * BLOCK_SIZE +
            n % SLOTS_PER_BLOCK * SLOT_SIZE);
}

/*
 * Another CPU wrote the slots, so that each of their cache lines is a miss:
 * begin early to get those of a small frame.
 */
static void packet_socket_prefetch(const PacketSocket *ps)
{
    const uint8_t *slot = (const uint8_t *)packet_socket_slot(ps, AHEAD);

    __builtin_prefetch(slot);
    __builtin_prefetch(slot + 64);
    __builtin_prefetch(slot + 128);
}

static void packet_socket_give_slot_back(PacketSocket *ps)
{
    /* All reads of the slot come before. */
    qatomic_store_release(&packet_socket_slot(ps, 0)->tp_status,
                          TP_STATUS_KERNEL);
    if (++ps->next_slot == ps->slots) {
        ps->next_slot = 0;
    }
}

/*
 * Take the frame of the next slot.  Returns -ENOBUFS if it was too long for
 * the slot, and the queue was full.
 */
static ssize_t packet_socket_recv_slot(PacketSocket *ps,
                                       struct virtio_net_hdr *hdr,
                                       uint8_t *frame, size_t size)
{
    const struct tpacket2_hdr *slot = packet_socket_slot(ps, 0);
    uint32_t status = qatomic_load_acquire(&slot->tp_status);
    const uint8_t *data = (const uint8_t *)slot + slot->tp_mac;
    ssize_t len;

    if (!(status & TP_STATUS_USER)) {
        return -EAGAIN;
    }
    packet_socket_prefetch(ps);
    if (status & TP_STATUS_COPY) {
        len = packet_socket_recv_queue(ps, hdr, frame, size);
        if (len == -ENETDOWN) {
            return len;         /* which came first; the frame is still there */
        }
    } else if (slot->tp_snaplen < slot->tp_len) {
        len = -ENOBUFS;
    } else if (slot->tp_len > size) {
        len = -EMSGSIZE;
    } else {
        memcpy(hdr, data - sizeof(*hdr), sizeof(*hdr));
        memcpy(frame, data, slot->tp_len);
        ps->time.tv_sec = slot->tp_sec;
        ps->time.tv_nsec = slot->tp_nsec;
        len = packet_socket_restore_tag(hdr, frame, slot->tp_len, status,
                                        slot->tp_vlan_tci,
                                        slot->tp_vlan_tpid);
    }
    packet_socket_give_slot_back(ps);
    return len;
}

/*
 * The ring does not tell errors.  To ask for them costs a system call, so it
 * is done only when the fd has been found readable with nothing to read.
 */
static int packet_socket_error(PacketSocket *ps)
{
    int err = 0;
    socklen_t size = sizeof(err);

    getsockopt(ps->fd, SOL_SOCKET, SO_ERROR, &err, &size);
    return err;
}

ssize_t packet_socket_recv(PacketSocket *ps, struct virtio_net_hdr *hdr,
                           uint8_t *frame, size_t size)
{
    ssize_t len;

    size -= MIN(size, PACKET_SOCKET_TAG_ROOM);
    if (!ps->ring) {
        return packet_socket_recv_queue(ps, hdr, frame, size);
    }
    while ((len = packet_socket_recv_slot(ps, hdr, frame, size)) == -ENOBUFS) {
        ps->drops++;
    }
    if (len == -EAGAIN && ps->was_empty) {
        int err = packet_socket_error(ps);

        return err ? -err : -EAGAIN;
    }
    ps->was_empty = len == -EAGAIN;
    return len;
}

unsigned packet_socket_waiting(const PacketSocket *ps)
{
    uint32_t memory[SK_MEMINFO_VARS];
    socklen_t size = sizeof(memory);

    /* Since Linux 4.12; before that, as much as may wait. */
    if (getsockopt(ps->fd, SOL_SOCKET, SO_MEMINFO, memory, &size) < 0) {
        memory[SK_MEMINFO_RMEM_ALLOC] =
            packet_socket_get_option(ps, SOL_SOCKET, SO_RCVBUF);
    }
    /* And one read for an error, which comes before the frames. */
    return ps->slots + memory[SK_MEMINFO_RMEM_ALLOC] / QUEUE_MIN_MEMORY + 1;
}

uint64_t packet_socket_discard(PacketSocket *ps, uint64_t max)
{
    uint64_t frames = 0;
    struct virtio_net_hdr hdr;
    uint8_t room[PACKET_SOCKET_TAG_ROOM];
    ssize_t len;

    for (uint64_t i = 0; i < max; i++) {
        /* A read of the header takes the whole frame. */
        len = packet_socket_recv(ps, &hdr, room, sizeof(room));
        if (len >= 0 || len == -EMSGSIZE || len == -EINVAL) {
            frames++;
        } else if (len != -ENETDOWN) { /* which comes before frames */
            break;
        }
    }
    return frames;
}

static int packet_socket_sendmmsg(PacketSocket *ps,
                                  const PacketSocketFrame *frames, size_t n)
{
    /*
     * Have the kernel see the protocol from the frame.  Otherwise it would be
     * the one that the socket is bound to, and nobody would segment it.
     */
    struct sockaddr_ll addr = {
        .sll_family = AF_PACKET,
        .sll_ifindex = ps->ifindex,
    };
    struct iovec iov[PACKET_SOCKET_BATCH][2];
    struct mmsghdr msgs[PACKET_SOCKET_BATCH];
    int ret;

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
    ret = RETRY_ON_EINTR(sendmmsg(ps->fd, msgs, n, 0));
    if (ret < 0 && errno == ENETDOWN) {
        /*
         * A socket that was bound to a protocol, as one that somebody passed,
         * tells this once more after the interface has come up again.
         */
        ret = RETRY_ON_EINTR(sendmmsg(ps->fd, msgs, n, 0));
    }
    return ret < 0 ? -errno : ret;
}

static bool packet_socket_ethtool(PacketSocket *ps, void *cmd)
{
    struct ifreq ifr = { .ifr_ifindex = ps->ifindex };

    /* The name may have changed since. */
    if (ioctl(ps->fd, SIOCGIFNAME, &ifr) < 0) {
        return false;
    }
    ifr.ifr_data = cmd;
    return ioctl(ps->fd, SIOCETHTOOL, &ifr) == 0;
}

/* Returns the offloads that are on; none if the kernel does not tell. */
static unsigned packet_socket_get_offloads(PacketSocket *ps)
{
    g_autofree struct ethtool_gstrings *names = NULL;
    g_autofree struct ethtool_gfeatures *features = NULL;
    struct {
        struct ethtool_sset_info info;
        uint32_t count;
    } set = {
        .info.cmd = ETHTOOL_GSSET_INFO,
        .info.sset_mask = 1 << ETH_SS_FEATURES,
    };
    unsigned offloads = 0;
    uint32_t blocks;

    if (!packet_socket_ethtool(ps, &set)) {
        return 0;
    }
    blocks = DIV_ROUND_UP(set.count, 32);
    names = g_malloc0(sizeof(*names) + set.count * ETH_GSTRING_LEN);
    names->cmd = ETHTOOL_GSTRINGS;
    names->string_set = ETH_SS_FEATURES;
    names->len = set.count;
    features = g_malloc0(sizeof(*features) +
                         blocks * sizeof(features->features[0]));
    features->cmd = ETHTOOL_GFEATURES;
    features->size = blocks;
    if (!packet_socket_ethtool(ps, names) ||
        !packet_socket_ethtool(ps, features)) {
        return 0;
    }
    for (uint32_t i = 0; i < set.count; i++) {
        const char *name = (char *)names->data + i * ETH_GSTRING_LEN;
        bool on = features->features[i / 32].active & (1u << i % 32);

        for (int j = 0; on && j < ARRAY_SIZE(offload_names); j++) {
            if (!strncmp(name, offload_names[j], ETH_GSTRING_LEN)) {
                offloads |= BIT(j);
            }
        }
    }
    return offloads;
}

/*
 * The kernel queues a message when an interface's offloads change, before the
 * system call that changes them returns (6.1, 6.18).
 */
static void packet_socket_watch_links(PacketSocket *ps)
{
    struct sockaddr_nl addr = {
        .nl_family = AF_NETLINK,
        .nl_groups = RTMGRP_LINK,
    };
    int size = 1;               /* the least: one message is enough */

    ps->link_fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK,
                         NETLINK_ROUTE);
    if (ps->link_fd < 0) {
        return;
    }
    setsockopt(ps->link_fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof(size));
    if (bind(ps->link_fd, (struct sockaddr *)&addr, sizeof(addr)) < 0) {
        close(ps->link_fd);
        ps->link_fd = -1;
    }
}

/* Whether an interface may have changed since the last time. */
static bool packet_socket_links_changed(PacketSocket *ps)
{
    bool changed = false;
    uint8_t byte;

    if (ps->link_fd < 0) {
        packet_socket_watch_links(ps);
        return true;
    }
    for (;;) {
        if (recv(ps->link_fd, &byte, sizeof(byte), 0) < 0 &&
            errno != ENOBUFS && errno != EINTR) {
            return changed || errno != EAGAIN;
        }
        changed = true;         /* ENOBUFS: by more messages than fit */
    }
}

/* Whether the frame must be segmented for the interface. */
static bool packet_socket_must_segment(const PacketSocket *ps,
                                       const PacketSocketFrame *frame)
{
    unsigned needed = 0;

    switch (frame->hdr.gso_type & ~VIRTIO_NET_HDR_GSO_ECN) {
    case VIRTIO_NET_HDR_GSO_TCPV4:
        needed = BIT(OFFLOAD_TCPV4);
        break;
    case VIRTIO_NET_HDR_GSO_TCPV6:
        needed = BIT(OFFLOAD_TCPV6);
        break;
    case VIRTIO_NET_HDR_GSO_UDP_L4:
        needed = BIT(OFFLOAD_UDP);
        break;
    default:
        return true;
    }
    if (frame->hdr.gso_type & VIRTIO_NET_HDR_GSO_ECN) {
        needed |= BIT(OFFLOAD_ECN);
    }
    return frame->len >= GSO_MAX_LEN || (ps->offloads & needed) != needed;
}

/* How many frames there are before the first that must be segmented. */
static size_t packet_socket_count_whole(PacketSocket *ps,
                                        const PacketSocketFrame *frames,
                                        size_t n)
{
    bool known = false;

    for (size_t i = 0; i < n; i++) {
        if (frames[i].hdr.gso_type == VIRTIO_NET_HDR_GSO_NONE) {
            continue;
        }
        if (!known && packet_socket_links_changed(ps)) {
            ps->offloads = packet_socket_get_offloads(ps);
        }
        known = true;
        if (packet_socket_must_segment(ps, &frames[i])) {
            return i;
        }
    }
    return n;
}

int packet_socket_send_plain(PacketSocket *ps, const PacketSocketFrame *frame)
{
    int ret = -ENOBUFS;

    if (packet_socket_set_bypass(ps, false, NULL)) {
        ret = packet_socket_sendmmsg(ps, frame, 1);
        packet_socket_set_bypass(ps, true, NULL);
    }
    return ret < 0 ? ret : 0;
}

int packet_socket_send(PacketSocket *ps, const PacketSocketFrame *frames,
                       size_t n)
{
    int ret = -EOPNOTSUPP;

    n = packet_socket_count_whole(ps, frames, MIN(n, PACKET_SOCKET_BATCH));
    if (n) {
        /* In case that packet_socket_send_plain() could not. */
        packet_socket_set_bypass(ps, true, NULL);
        ret = packet_socket_sendmmsg(ps, frames, n);
    }
    if (ret == -ENOBUFS) {
        /* The queue is full; or it had to be segmented, from just now on. */
        ret = packet_socket_count_whole(ps, frames, 1) ? -EAGAIN : -EOPNOTSUPP;
    }
    return ret;
}

uint64_t packet_socket_drops(PacketSocket *ps)
{
    struct tpacket_stats stats;
    socklen_t size = sizeof(stats);

    /* Reading them sets the kernel's counters to 0. */
    if (getsockopt(ps->fd, SOL_PACKET, PACKET_STATISTICS,
                   &stats, &size) == 0) {
        ps->drops += stats.tp_drops;
    }
    return ps->drops;
}
