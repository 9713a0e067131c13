/*
 * Packets of a TAP with vhost, for netfilters
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Theory of operation
 *
 * Captured packets come from one source at a time:
 *
 *   NONE           the filter is off, or its properties say: not now
 *   PACKET_SOCKET  a copy of each packet, made by the kernel.  The guest, or
 *                  the network, gets the packet as well.  What the chain
 *                  offers is let pass: it is the same packets again.
 *   CHAIN          the packets themselves, read from the TAP's fd.  Only for
 *                  a filter that captures while the VM is stopped and not
 *                  while it runs, and is not one that only copies.
 *
 *                      runs                       stopped
 *   when_running only  PACKET_SOCKET              NONE
 *   both               PACKET_SOCKET              PACKET_SOCKET
 *   when_stopped only  NONE                       CHAIN
 *
 * Why the packet socket will not do for the last row: when the VM stops,
 * packets are waiting in the TAP's queue that the guest has not got.  They
 * went past the packet socket earlier.  And why the chain will not do for the
 * middle row: the same packets have been captured already.
 *
 * CHAIN is exact: each packet that the guest did not take is captured, once.
 * There are two places where such a packet can be when the VM stops.  In the
 * TAP, where QEMU reads it, now that vhost has stopped.  Or in the queue of
 * the NIC, where one that was read waits if the guest had no buffer for it;
 * net.c drops that queue's content at a stop, so it is emptied here before.
 * (The order of the handlers matters: at a stop virtio's come first, then
 * ours, then net.c's; at a start it is the other way round.)  And what is
 * taken must not get lost either: as long as it could not be handed on, the
 * TAP is not read, and its packets wait for the next peer or for the guest.
 *
 * Injected packets are put into the TAP by a packet socket (queue=tx), from
 * where vhost or QEMU brings them to the guest, or passed along the chain to
 * the network (queue=rx).  When the TAP is full they wait.  What the TAP does
 * not take whole is segmented here.
 */

#include "qemu/osdep.h"
#include <ifaddrs.h>
#include <net/if.h>
#include <sys/ioctl.h>
#include <sys/timerfd.h>
#include <linux/ethtool.h>
#include <linux/if_link.h>
#include <linux/if_packet.h>
#include <linux/sockios.h>
#include "monitor/monitor.h"
#include "net/filter-tap.h"
#include "net/frame-offload.h"
#include "net/frame-pace.h"
#include "net/frame-stream.h"
#include "net/packet-socket.h"
#include "net/queue.h"
#include "net/tap.h"
#include "net/vhost_net.h"
#include "qapi/error.h"
#include "qapi/qapi-visit-common.h"
#include "qapi/visitor.h"
#include "qemu/ctype.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/iov.h"
#include "qemu/main-loop.h"
#include "qemu/timer.h"
#include "system/runstate.h"
#include "standard-headers/linux/virtio_net.h"
#include "tap-linux.h"
#include "trace.h"

#ifndef TUNGETDEVNETNS
#define TUNGETDEVNETNS _IO('T', 227)    /* Linux 5.2 */
#endif
#ifndef TUNGETVNETLE
#define TUNGETVNETLE _IOR('T', 221, int)
#define TUNGETVNETBE _IOR('T', 223, int)
#endif

/* Frames, and bytes of them, that are captured before others get their turn. */
#define CAPTURE_BATCH 1024
#define CAPTURE_BATCH_BYTES (256 * KiB)

/*
 * When packets come fast, the packet sockets of all filters are not polled, but
 * looked at from time to time.  More bytes a socket character device does not
 * take at a time.
 */
#define LOOK_MAX_NS (10 * SCALE_MS)
#define LOOK_MAX_FRAMES 600
#define LOOK_MAX_BYTES (128 * KiB)

/*
 * The memory that captured packets may use while they wait.  The frame writer
 * needs a quarter more than it holds, and the rest is the packet socket's.
 */
#define BUFFER_SIZE_DEFAULT (8 * MiB)
#define BUFFER_SIZE_MIN (1 * MiB)
#define BUFFER_SIZE_MAX (1 * GiB)
#define BUFFER_SIZE_WRITER(size) ((size) / 8)
#define BUFFER_SIZE_SOCKET(size) ((size) / 32 * 27)

/*
 * How long a packet socket stays hooked when it is not the source any more.
 * Hooking and unhooking take the kernel some 10 ms each, with the BQL held:
 * much for a VM that is to stop and go on, and a peer that connects over and
 * over again must not be able to hold up the main loop.
 */
#define LINGER_MS 1000

/* Between two looks at an interface that is down. */
#define INTERFACE_DOWN_MS 1000

/* Room for the segments that are sent at a time, in bytes. */
#define INJECT_SEGMENTS_SIZE (128 * KiB)

/*
 * The least payload of a segment that is in use.  With less a frame costs the
 * kernel hundreds of ms.
 */
#define INJECT_MIN_GSO_SIZE 48

/* Between two looks at a TAP that was full. */
#define INJECT_RETRY_MIN_MS 1
#define INJECT_RETRY_MAX_MS 64

/*
 * How long a GSO frame is tried when the TAP does not take it, before it is
 * segmented.  The kernel says the same of a full TAP and of a frame that it
 * cannot send.
 */
#define INJECT_GSO_PATIENCE_MS 1000

typedef enum FilterTapSource {
    FILTER_TAP_NONE,
    FILTER_TAP_PACKET_SOCKET,
    FILTER_TAP_CHAIN,
} FilterTapSource;

static const char *const filter_tap_source_names[] = {
    [FILTER_TAP_NONE] = "none",
    [FILTER_TAP_PACKET_SOCKET] = "packet-socket",
    [FILTER_TAP_CHAIN] = "chain",
};

typedef struct FilterTapStats {
    uint64_t capture_packets;
    uint64_t capture_bytes;
    uint64_t capture_kernel_drops;
    uint64_t capture_peer_drops;
    uint64_t capture_skipped_gso;
    uint64_t capture_skipped_oversize;
    uint64_t inject_packets;
    uint64_t inject_bytes;
    uint64_t inject_skipped_runt;
    uint64_t inject_skipped_oversize;
    uint64_t inject_skipped_header;
    uint64_t inject_interface_drops;
} FilterTapStats;

/* A packet socket that somebody else opened, on its way to an endpoint */
typedef struct FilterTapPassed {
    const char *property;       /* NULL: none */
    int fd;
} FilterTapPassed;

struct FilterTapEndpoints {
    QLIST_ENTRY(FilterTapEndpoints) next;
    NetFilterState *nf;
    char ifname[IFNAMSIZ];
    unsigned ifindex;
    NetFilterDirection direction;       /* as it was at setup */
    bool when_running;
    bool when_stopped;
    bool takes;                 /* captures from the chain, never copies */
    uint64_t buffer_size;
    bool may_swap;
    bool swap;                  /* see filter_tap_header_swapped() */
    bool running;
    VMChangeStateEntry *vm_state;
    VMChangeStateEntry *vm_state_last;
    Notifier wakeup;
    FilterTapStats stats;

    /* capture */
    bool captures;
    CharFrontend *chr_out;      /* NULL: the sink gets what is captured */
    FrameWriter *writer;
    FilterTapSink *sink;
    void *sink_opaque;
    uint8_t *sink_frame;
    FilterTapPassed passed_capture;
    PacketSocket *capture;      /* NULL if the filter takes */
    FilterTapSource source;
    QEMUBH *flush_bh;
    QEMUTimer *linger;
    QEMUTimer *interface_timer;
    bool capture_polled;
    /* What the socket has was captured before the source became none. */
    bool draining;
    bool tap_paused;
    bool interface_lost;
    bool failing;               /* to read from the packet socket */
    uint64_t kernel_drops_seen;
    uint64_t tx_dropped;
    uint32_t tx_dropped_seen;
    const uint8_t *echo;        /* a frame that is not to be captured */
    size_t echo_len;

    /* inject */
    CharFrontend *chr_in;
    bool vnet_hdr;
    FrameReader *reader;
    FilterTapPassed passed_inject;
    PacketSocket *inject;       /* NULL if nothing goes to the guest */
    uint8_t *segments;          /* room for some */
    unsigned segments_sent;     /* of the frame that comes next */
    QEMUTimer *inject_retry;
    unsigned inject_waited_ms;
};

static QLIST_HEAD(, FilterTapEndpoints) filter_tap_list =
    QLIST_HEAD_INITIALIZER(filter_tap_list);

/* What the packet sockets of all filters share */
static struct {
    unsigned endpoints;         /* in the list */
    FilterTapEndpoints *next;   /* whose turn it is, or NULL: the first one's */
    FramePace pace;
    int timer_fd;
    bool paced;                 /* the timer runs, and no socket is polled */
} filter_tap_look = {
    .pace = {
        .max_ns = LOOK_MAX_NS,
        .max_frames = LOOK_MAX_FRAMES,
        .max_bytes = LOOK_MAX_BYTES,
    },
    .timer_fd = -1,
};

static bool filter_tap_wants(const FilterTapEndpoints *ep,
                             NetFilterDirection direction)
{
    return ep->direction == direction ||
           ep->direction == NET_FILTER_DIRECTION_ALL;
}

/* Capture: source */

/* Call @func for all queues of the netdev; the filter is with the first one. */
static void filter_tap_foreach_queue(FilterTapEndpoints *ep,
                                     void (*func)(FilterTapEndpoints *ep,
                                                  NetClientState *queue))
{
    g_autofree NetClientState **ncs = g_new(NetClientState *, MAX_QUEUE_NUM);
    int queues = qemu_find_net_clients_except(ep->nf->netdev->name, ncs,
                                              NET_CLIENT_DRIVER_NIC,
                                              MAX_QUEUE_NUM);

    for (int i = 0; i < queues; i++) {
        func(ep, ncs[i]);
    }
}

static void filter_tap_poll_queue(FilterTapEndpoints *ep,
                                  NetClientState *queue)
{
    queue->info->poll(queue, !ep->tap_paused);
}

/* Whether somebody is there to take what is captured. */
static bool filter_tap_listened(FilterTapEndpoints *ep)
{
    return ep->sink || qemu_chr_fe_backend_open(ep->chr_out);
}

static bool filter_tap_full(FilterTapEndpoints *ep)
{
    return ep->writer && frame_writer_full(ep->writer);
}

static bool filter_tap_can_stage(FilterTapEndpoints *ep)
{
    return filter_tap_listened(ep) && !filter_tap_full(ep);
}

/*
 * Whether QEMU reads the TAP while the VM is stopped.  Left to itself it
 * takes one packet per queue, which the NIC cannot take, and which is dropped
 * if the VM stops again before the guest has buffers.  So it reads only for
 * a filter that takes the packets, and the others wait in the TAP.  While the
 * VM runs, vhost and QEMU see to it by themselves.  This is the TAP's state,
 * so all its filters have a say, and know it.
 */
static void filter_tap_update_tap(FilterTapEndpoints *ep)
{
    NetClientState *netdev = ep->nf->netdev;
    FilterTapEndpoints *other;
    bool pause = false, taken = false;

    QLIST_FOREACH(other, &filter_tap_list, next) {
        if (other->nf->netdev == netdev && !other->running) {
            pause |= filter_tap_wants(other, NET_FILTER_DIRECTION_TX);
            taken |= other->source == FILTER_TAP_CHAIN &&
                     filter_tap_can_stage(other);
        }
    }
    pause &= !taken;
    if (ep->tap_paused == pause) {
        return;
    }
    trace_filter_tap_pause_tap(ep->ifname, pause);
    ep->tap_paused = pause;
    QLIST_FOREACH(other, &filter_tap_list, next) {
        if (other->nf->netdev == netdev) {
            other->tap_paused = pause;
        }
    }
    filter_tap_foreach_queue(ep, filter_tap_poll_queue);
}

bool filter_tap_pauses(NetClientState *netdev)
{
    FilterTapEndpoints *ep;

    QLIST_FOREACH(ep, &filter_tap_list, next) {
        if (ep->nf->netdev == netdev) {
            return ep->tap_paused;
        }
    }
    return false;
}

static bool filter_tap_capture_wanted(FilterTapEndpoints *ep)
{
    return (ep->source == FILTER_TAP_PACKET_SOCKET || ep->draining) &&
           filter_tap_can_stage(ep);
}

static void filter_tap_look_readable(void *opaque);

/* Read from the source only what can be staged. */
static void filter_tap_update_polling(FilterTapEndpoints *ep)
{
    bool poll = filter_tap_capture_wanted(ep) && !filter_tap_look.paced;

    if (poll != ep->capture_polled) {
        ep->capture_polled = poll;
        qemu_set_fd_handler(packet_socket_fd(ep->capture),
                            poll ? filter_tap_look_readable : NULL, NULL, ep);
    }
    filter_tap_update_tap(ep);
}

/*
 * An error that does not end the connection, as of a datagram socket or a full
 * disk, is one of what is waiting: keeping it would stop all for ever.  But
 * what was taken is kept, and the TAP not read when it is too much.
 */
static void filter_tap_written(FilterTapEndpoints *ep, int ret)
{
    if (ret < 0 && !ep->takes) {
        trace_filter_tap_peer_error(ep->ifname, -ret);
        ep->stats.capture_peer_drops += frame_writer_discard(ep->writer);
    }
}

static void filter_tap_flush(FilterTapEndpoints *ep)
{
    /* Some character devices throw away what they have no peer for. */
    if (ep->writer && filter_tap_listened(ep)) {
        filter_tap_written(ep, frame_writer_flush(ep->writer));
    }
}

/* It may be us who are late, and not the peer. */
static void filter_tap_offer(FilterTapEndpoints *ep)
{
    if (ep->writer && filter_tap_listened(ep)) {
        filter_tap_written(ep, frame_writer_offer(ep->writer));
    }
}

static void filter_tap_count_captured(FilterTapEndpoints *ep, size_t len)
{
    ep->stats.capture_packets++;
    ep->stats.capture_bytes += len;
}

static void filter_tap_stage(FilterTapEndpoints *ep, size_t size)
{
    size_t hdr_len = ep->nf->netdev->vnet_hdr_len;

    frame_writer_commit(ep->writer, hdr_len, size);
    filter_tap_count_captured(ep, size - hdr_len);
}

/* Returns false if the kernel never lets a guest have the other byte order. */
static bool filter_tap_get_other_order(NetClientState *netdev, int *value)
{
    return ioctl(tap_get_fd(netdev),
                 HOST_BIG_ENDIAN ? TUNGETVNETLE : TUNGETVNETBE, value) == 0;
}

/*
 * Whether the headers that go through the TAP are not in the host's byte
 * order, but in the guest's.  (If the kernel cannot do that, QEMU swaps them,
 * and vhost is not used.)
 */
static bool filter_tap_header_swapped(FilterTapEndpoints *ep)
{
    int value;

    return ep->may_swap &&
           filter_tap_get_other_order(ep->nf->netdev, &value) && value;
}

/*
 * Down or gone?  Down is like a cable that is unplugged.  The kernel does not
 * tell when an interface that is down is deleted.
 */
static void filter_tap_check_interface(void *opaque)
{
    FilterTapEndpoints *ep = opaque;
    struct ifreq ifr = { };

    if (ep->interface_lost) {
        return;
    }
    if (!if_indextoname(ep->ifindex, ifr.ifr_name)) {
        ep->interface_lost = true;
        warn_report("netdev '%s': interface '%s' is gone, and nothing can be "
                    "captured from it any more", ep->nf->netdev_id,
                    ep->ifname);
    } else if (ioctl(packet_socket_fd(ep->capture), SIOCGIFFLAGS, &ifr) < 0 ||
               !(ifr.ifr_flags & IFF_UP)) {
        timer_mod(ep->interface_timer,
                  qemu_clock_get_ms(QEMU_CLOCK_REALTIME) + INTERFACE_DOWN_MS);
    }
}

static void filter_tap_capture_error(FilterTapEndpoints *ep, int err)
{
    trace_filter_tap_capture_error(ep->ifname, err);
    filter_tap_check_interface(ep);
}

/* A sink gets frames as they would be sent, but in one piece. */
static void filter_tap_sink(FilterTapEndpoints *ep, struct virtio_net_hdr *hdr,
                            uint8_t *frame, size_t len)
{
    struct timespec time = packet_socket_time(ep->capture);

    hdr->gso_type = VIRTIO_NET_HDR_GSO_NONE;
    frame_offload_to_guest(hdr, frame, len, NULL, 0, false);
    if (ep->sink(ep->sink_opaque, &time, frame, len)) {
        filter_tap_count_captured(ep, len);
    } else {
        ep->stats.capture_peer_drops++;
    }
}

/* Returns false when nothing more can be read now. */
static bool filter_tap_capture_one(FilterTapEndpoints *ep)
{
    size_t hdr_len = ep->sink ? 0 : ep->nf->netdev->vnet_hdr_len;
    size_t room = ep->sink ? FRAME_STREAM_MAX_PAYLOAD :
                             frame_writer_max_payload(ep->writer);
    uint8_t *payload = ep->sink ? ep->sink_frame :
                                  frame_writer_reserve(ep->writer, room);
    uint8_t *frame = payload + hdr_len;
    struct virtio_net_hdr hdr;
    ssize_t len;

    len = packet_socket_recv(ep->capture, &hdr, frame, room - hdr_len);
    if (len < 0 && len != -EMSGSIZE && len != -EINVAL) {
        /* The kernel tells once that it is down; there may be more behind. */
        bool again = len == -ENETDOWN && !ep->failing;

        ep->failing = len != -EAGAIN;
        if (ep->failing) {
            filter_tap_capture_error(ep, -len);
        }
        return again;
    }
    ep->failing = false;
    if (len == -EMSGSIZE) {
        ep->stats.capture_skipped_oversize++;
    } else if (len == -EINVAL) {
        /* The kernel cannot say it in a header, and has dropped it. */
        ep->stats.capture_skipped_gso++;
    } else if (len == ep->echo_len && !memcmp(frame, ep->echo, len)) {
        ep->echo_len = 0;
    } else if (ep->sink) {
        filter_tap_sink(ep, &hdr, frame, len);
    } else if (frame_offload_to_guest(&hdr, frame, len, payload, hdr_len,
                                      ep->swap)) {
        filter_tap_stage(ep, hdr_len + len);
    } else {
        ep->stats.capture_skipped_gso++;
    }
    return true;
}

/* Returns the number of frames, and puts their bytes to @bytes. */
static unsigned filter_tap_capture(FilterTapEndpoints *ep, unsigned max_frames,
                                   size_t max_bytes, size_t *bytes)
{
    uint64_t before = ep->stats.capture_bytes;
    unsigned frames = 0;

    ep->swap = filter_tap_header_swapped(ep);
    while (frames < max_frames &&
           ep->stats.capture_bytes - before < max_bytes &&
           !filter_tap_full(ep)) {
        if (!filter_tap_capture_one(ep)) {
            ep->draining = false;
            break;
        }
        frames++;
    }
    *bytes = ep->stats.capture_bytes - before;
    return frames;
}

/* Throw away what waits now.  Returns the number of frames. */
static uint64_t filter_tap_discard(FilterTapEndpoints *ep)
{
    return packet_socket_discard(ep->capture,
                                 packet_socket_waiting(ep->capture));
}

/*
 * All that waits now; and not for ever, however much comes meanwhile.
 *
 * Returns how many more there may be that could not be staged.
 */
static unsigned filter_tap_capture_all(FilterTapEndpoints *ep)
{
    unsigned max = packet_socket_waiting(ep->capture);
    size_t bytes;

    max -= filter_tap_capture(ep, max, SIZE_MAX, &bytes);
    return filter_tap_full(ep) ? max : 0;
}

/*
 * This is no QEMUTimer, which would make the main loop go round once more
 * each time that it is set.
 */
static void filter_tap_look_set_timer(int64_t ns)
{
    struct itimerspec when = { .it_value.tv_nsec = ns };

    if (filter_tap_look.paced || ns) {
        /* This also takes back that the fd is readable. */
        timerfd_settime(filter_tap_look.timer_fd, 0, &when, NULL);
        filter_tap_look.paced = ns;
    }
}

/* Look at the packet sockets of all filters, since it costs little more. */
static void filter_tap_look_readable(void *opaque)
{
    int64_t now = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    FilterTapEndpoints *ep = filter_tap_look.next ?:
                             QLIST_FIRST(&filter_tap_list);
    unsigned frames = 0;
    size_t bytes = 0;
    bool failing = false;
    int64_t wait;

    for (unsigned i = 0; i < filter_tap_look.endpoints &&
         frames < CAPTURE_BATCH && bytes < CAPTURE_BATCH_BYTES; i++) {
        size_t turn = 0;

        if (filter_tap_capture_wanted(ep)) {
            frames += filter_tap_capture(ep, CAPTURE_BATCH - frames,
                                         CAPTURE_BATCH_BYTES - bytes, &turn);
            filter_tap_flush(ep);
            bytes += turn;
            failing |= ep->failing;
        }
        ep = QLIST_NEXT(ep, next) ?: QLIST_FIRST(&filter_tap_list);
    }
    filter_tap_look.next = ep;
    wait = frame_pace(&filter_tap_look.pace, now, frames, bytes);
    if (frames >= CAPTURE_BATCH || bytes >= CAPTURE_BATCH_BYTES) {
        wait = 1;       /* there may be more, but others get their turn */
    }
    if (failing) {
        wait = LOOK_MAX_NS;     /* the socket may be readable all the time */
    }
    filter_tap_look_set_timer(wait);
    QLIST_FOREACH(ep, &filter_tap_list, next) {
        if (ep->captures) {
            filter_tap_update_polling(ep);
        }
    }
    if (trace_event_get_state_backends(TRACE_FILTER_TAP_LOOK)) {
        trace_filter_tap_look(frames, bytes,
                              qemu_clock_get_ns(QEMU_CLOCK_REALTIME) - now);
    }
}

/* What is dropped while the socket lingers does not count. */
static void filter_tap_update_kernel_drops(FilterTapEndpoints *ep, bool count)
{
    uint64_t drops = packet_socket_drops(ep->capture);

    if (count) {
        ep->stats.capture_kernel_drops += drops - ep->kernel_drops_seen;
    }
    ep->kernel_drops_seen = drops;
}

static void filter_tap_unhook(void *opaque)
{
    FilterTapEndpoints *ep = opaque;

    packet_socket_unhook(ep->capture);
    filter_tap_discard(ep);
}

/* What was a copy is stale for the next peer. */
static void filter_tap_drop_copies(FilterTapEndpoints *ep)
{
    ep->stats.capture_peer_drops += frame_writer_discard(ep->writer);
    if (ep->draining) {
        ep->stats.capture_peer_drops += filter_tap_discard(ep);
        ep->draining = false;
    }
}

/*
 * The filter ceases to capture by packet socket.  Whoever listens still gets
 * what came before, in its own time.  If that cannot be staged now, the socket
 * is left to it, and gets no more.
 */
static void filter_tap_leave_packet_socket(FilterTapEndpoints *ep)
{
    if (filter_tap_listened(ep)) {
        if (filter_tap_capture_all(ep)) {
            packet_socket_unhook(ep->capture);
            ep->draining = true;
        }
        filter_tap_offer(ep);
    } else {
        ep->stats.capture_peer_drops += filter_tap_discard(ep);
    }
    filter_tap_update_kernel_drops(ep, true);
    if (!ep->draining) {
        timer_mod(ep->linger,
                  qemu_clock_get_ms(QEMU_CLOCK_REALTIME) + LINGER_MS);
    }
}

static bool filter_tap_enter_packet_socket(FilterTapEndpoints *ep)
{
    Error *err = NULL;

    timer_del(ep->linger);
    if (!packet_socket_hook(ep->capture, &err)) {
        error_prepend(&err, "netdev '%s': nothing is captured: ",
                      ep->nf->netdev_id);
        warn_report_err(err);
        return false;
    }
    if (!ep->draining) {
        filter_tap_discard(ep);
    }
    ep->draining = false;
    filter_tap_update_kernel_drops(ep, false);
    return true;
}

static void filter_tap_take_iov(FilterTapEndpoints *ep,
                                const struct iovec *iov, int iovcnt)
{
    size_t size = iov_size(iov, iovcnt);

    if (size > frame_writer_max_payload(ep->writer)) {
        ep->stats.capture_skipped_oversize++;
        return;
    }
    iov_to_buf(iov, iovcnt, 0, frame_writer_reserve(ep->writer, size), size);
    filter_tap_stage(ep, size);
    qemu_bh_schedule(ep->flush_bh);
}

static void filter_tap_take_queued(void *opaque, const uint8_t *data,
                                   size_t size)
{
    struct iovec iov = { .iov_base = (void *)data, .iov_len = size };

    filter_tap_take_iov(opaque, &iov, 1);
}

static void filter_tap_take_nic_queue(FilterTapEndpoints *ep,
                                      NetClientState *queue)
{
    if (queue->peer) {
        qemu_net_queue_take(queue->peer->incoming_queue, queue,
                            filter_tap_take_queued, ep);
    }
    /* It was told that it can go on. */
    filter_tap_poll_queue(ep, queue);
}

/* Take the packets that the guest's NIC had no buffer for. */
static void filter_tap_take_nic_queues(FilterTapEndpoints *ep)
{
    if (filter_tap_wants(ep, NET_FILTER_DIRECTION_TX)) {
        filter_tap_foreach_queue(ep, filter_tap_take_nic_queue);
    }
}

/* Whether the filter is on, and its properties say: now. */
static bool filter_tap_works(FilterTapEndpoints *ep)
{
    return ep->nf->on && (ep->running ? ep->when_running : ep->when_stopped);
}

static FilterTapSource filter_tap_wanted_source(FilterTapEndpoints *ep)
{
    if (!filter_tap_works(ep)) {
        return FILTER_TAP_NONE;
    }
    if (ep->takes) {
        return FILTER_TAP_CHAIN;
    }
    /* With nobody there to listen, the traffic shall not pay for it. */
    return filter_tap_listened(ep) ? FILTER_TAP_PACKET_SOCKET :
                                     FILTER_TAP_NONE;
}

static void filter_tap_set_source(FilterTapEndpoints *ep, FilterTapSource new)
{
    FilterTapSource old = ep->source;

    if (old == new) {
        return;
    }
    trace_filter_tap_source(ep->ifname, filter_tap_source_names[old],
                            filter_tap_source_names[new]);
    ep->source = FILTER_TAP_NONE;
    filter_tap_update_polling(ep);
    if (old == FILTER_TAP_PACKET_SOCKET) {
        filter_tap_leave_packet_socket(ep);
    }
    if (new == FILTER_TAP_PACKET_SOCKET &&
        !filter_tap_enter_packet_socket(ep)) {
        return;
    } else if (new == FILTER_TAP_CHAIN) {
        filter_tap_take_nic_queues(ep);
    }
    ep->source = new;
}

static void filter_tap_update_source(FilterTapEndpoints *ep)
{
    if (ep->captures) {
        filter_tap_set_source(ep, filter_tap_wanted_source(ep));
        filter_tap_update_polling(ep);
    } else {
        filter_tap_update_tap(ep);
    }
}

ssize_t filter_tap_receive_iov(FilterTap *ft, NetClientState *sender,
                               const struct iovec *iov, int iovcnt)
{
    FilterTapEndpoints *ep = ft->endpoints;

    if (ep->source != FILTER_TAP_CHAIN ||
        !qemu_chr_fe_backend_open(ep->chr_out)) {
        return 0;
    }
    /*
     * When nobody has room the TAP is not read any more, and what comes is
     * the rest of what tap_send() reads at a time, 50 packets at most.
     */
    if (frame_writer_full(ep->writer) && !ep->tap_paused) {
        return 0;
    }
    filter_tap_take_iov(ep, iov, iovcnt);
    filter_tap_update_polling(ep);
    return iov_size(iov, iovcnt);
}

/* Capture: stream */

static void filter_tap_flush_bh(void *opaque)
{
    FilterTapEndpoints *ep = opaque;

    filter_tap_flush(ep);
    filter_tap_update_polling(ep);
}

static void filter_tap_writer_progress(void *opaque)
{
    filter_tap_flush(opaque);
    filter_tap_update_polling(opaque);
}

static void filter_tap_out_event(void *opaque, QEMUChrEvent event)
{
    FilterTapEndpoints *ep = opaque;

    if (event == CHR_EVENT_CLOSED) {
        frame_writer_rewind(ep->writer);
        if (!ep->takes) {
            filter_tap_drop_copies(ep);
        }
    }
    if (event == CHR_EVENT_OPENED || event == CHR_EVENT_CLOSED) {
        filter_tap_update_source(ep);
        if (event == CHR_EVENT_OPENED) {
            filter_tap_flush(ep);
        }
    }
}

/* The peer has nothing to say; but without reading we do not see it leave. */
static int filter_tap_out_can_read(void *opaque)
{
    return CHR_READ_BUF_LEN;
}

static void filter_tap_out_read(void *opaque, const uint8_t *buf, int size)
{
}

/* Inject */

/* Count why a frame was not sent. */
static void filter_tap_inject_failed(FilterTapEndpoints *ep, int err)
{
    trace_filter_tap_inject_error(ep->ifname, err);
    switch (err) {
    case EINVAL:
        ep->stats.inject_skipped_header++;
        break;
    case EMSGSIZE:
        ep->stats.inject_skipped_oversize++;
        break;
    default:
        ep->stats.inject_interface_drops++;
        break;
    }
}

/*
 * Send the segments of a GSO frame that the TAP does not take.  The kernel
 * could make them too, but behind it a full TAP loses them, silently.
 *
 * Returns as packet_socket_send() does for one frame.
 */
static int filter_tap_inject_segments(FilterTapEndpoints *ep,
                                      const PacketSocketFrame *frame)
{
    PacketSocketFrame batch[PACKET_SOCKET_BATCH];
    FrameSegments fs;

    if (!frame_segments_init(&fs, &frame->hdr, frame->data, frame->len)) {
        int ret = packet_socket_send_plain(ep->inject, frame);

        return ret < 0 ? ret : 1;
    }
    ep->segments = ep->segments ?: g_malloc(INJECT_SEGMENTS_SIZE);
    while (ep->segments_sent < fs.count) {
        uint8_t *buf = ep->segments;
        size_t n = MIN(MIN(fs.count - ep->segments_sent, PACKET_SOCKET_BATCH),
                       INJECT_SEGMENTS_SIZE / (fs.headers + fs.size));
        int ret;

        for (size_t i = 0; i < n; i++) {
            batch[i].data = buf;
            batch[i].len = frame_segments_get(&fs, ep->segments_sent + i, buf,
                                              &batch[i].hdr);
            buf += batch[i].len;
        }
        ret = packet_socket_send(ep->inject, batch, n);
        if (ret < 0) {
            return ret;
        }
        ep->segments_sent += ret;
    }
    return 1;
}

static int filter_tap_inject_send(FilterTapEndpoints *ep,
                                  const PacketSocketFrame *frames, size_t n)
{
    int ret = -EOPNOTSUPP;

    /* What has been begun in segments goes on so. */
    if (!ep->segments_sent) {
        ret = packet_socket_send(ep->inject, frames, n);
    }
    if (ret == -EOPNOTSUPP) {
        ret = filter_tap_inject_segments(ep, frames);
    } else if (ret == -EAGAIN &&
               frames->hdr.gso_type != VIRTIO_NET_HDR_GSO_NONE &&
               ep->inject_waited_ms >= INJECT_GSO_PATIENCE_MS) {
        ret = filter_tap_inject_segments(ep, frames);
    }
    return ret;
}

/* Returns how many frames are dealt with; 0: they have to wait. */
static size_t filter_tap_inject_to_guest(FilterTapEndpoints *ep,
                                         const PacketSocketFrame *frames,
                                         size_t n)
{
    int ret = filter_tap_inject_send(ep, frames, n);

    if (ret == -EAGAIN) {
        int wait = MIN(MAX(ep->inject_waited_ms, INJECT_RETRY_MIN_MS),
                       INJECT_RETRY_MAX_MS);

        trace_filter_tap_inject_wait(ep->ifname, wait);
        timer_mod(ep->inject_retry,
                  qemu_clock_get_ms(QEMU_CLOCK_REALTIME) + wait);
        ep->inject_waited_ms += wait;
        return 0;
    }
    ep->inject_waited_ms = 0;
    ep->segments_sent = 0;
    if (ret < 0) {
        filter_tap_inject_failed(ep, -ret);
        return 1;
    }
    for (int i = 0; i < ret; i++) {
        ep->stats.inject_bytes += frames[i].len;
    }
    ep->stats.inject_packets += ret;
    return ret;
}

/*
 * What goes to the network passes the interface in the direction of the
 * guest's own packets, where nothing tells one from the other but the
 * content.  The kernel queues it for the capturing sockets before the write
 * returns: so empty them, write, and leave it out when they are emptied
 * again.
 */
static void filter_tap_capture_around(FilterTapEndpoints *ep,
                                      const uint8_t *echo, size_t echo_len)
{
    FilterTapEndpoints *other;
    uint64_t drops;

    QLIST_FOREACH(other, &filter_tap_list, next) {
        if (other->nf->netdev != ep->nf->netdev ||
            other->source != FILTER_TAP_PACKET_SOCKET ||
            !filter_tap_wants(other, NET_FILTER_DIRECTION_RX)) {
            continue;
        }
        other->echo = echo;
        other->echo_len = echo_len;
        drops = packet_socket_discard(other->capture,
                                      filter_tap_capture_all(other));
        other->stats.capture_peer_drops += drops - (drops && other->echo_len);
        other->echo_len = 0;
        if (other->writer) {
            qemu_bh_schedule(other->flush_bh);
        }
    }
}

/* The chain wants the header in the size that the guest negotiated. */
static void filter_tap_inject_to_network(FilterTapEndpoints *ep,
                                         const StreamFrame *frame,
                                         size_t hdr_len)
{
    NetFilterState *nf = ep->nf;
    uint8_t header[FRAME_OFFLOAD_MAX_HEADER];
    struct virtio_net_hdr hdr;
    struct iovec iov[] = {
        { .iov_base = header, .iov_len = nf->netdev->vnet_hdr_len },
        { .iov_base = frame->payload + hdr_len,
          .iov_len = frame->size - hdr_len },
    };
    ssize_t sent;

    if (!nf->netdev->peer) {
        ep->stats.inject_interface_drops += !ep->inject;
        return;
    }
    if (iov[0].iov_len == hdr_len) {
        memcpy(header, frame->payload, hdr_len);
    } else if (!frame_offload_from_guest(&hdr, frame->payload, hdr_len,
                                         ep->swap) ||
               !frame_offload_to_guest(&hdr, iov[1].iov_base, iov[1].iov_len,
                                       header, iov[0].iov_len, ep->swap)) {
        ep->stats.inject_skipped_header += !ep->inject;
        return;
    }
    filter_tap_capture_around(ep, NULL, 0);
    sent = qemu_netfilter_pass_to_next(nf->netdev->peer, 0, iov,
                                       ARRAY_SIZE(iov), nf);
    filter_tap_capture_around(ep, iov[1].iov_base, iov[1].iov_len);
    if (ep->inject) {
        return;     /* what goes to the guest counts */
    }
    if (sent < 0 || nf->netdev->link_down) {
        ep->stats.inject_interface_drops++;
    } else {
        ep->stats.inject_packets++;
        ep->stats.inject_bytes += iov[1].iov_len;
    }
}

static size_t filter_tap_stream_hdr_len(FilterTapEndpoints *ep,
                                        const StreamFrame *frame)
{
    return ep->vnet_hdr ? frame->vnet_hdr_len : ep->nf->netdev->vnet_hdr_len;
}

/*
 * Make a frame of the stream one for the packet socket.  Returns the counter
 * of what is wrong with it, or NULL.
 */
static uint64_t *filter_tap_inject_prepare(FilterTapEndpoints *ep,
                                           const StreamFrame *frame,
                                           PacketSocketFrame *out)
{
    size_t hdr_len = filter_tap_stream_hdr_len(ep, frame);

    if (hdr_len > FRAME_OFFLOAD_MAX_HEADER) {
        return &ep->stats.inject_skipped_header;
    }
    if (frame->size < hdr_len + ETH_HLEN) {
        return &ep->stats.inject_skipped_runt;
    }
    if (!frame_offload_from_guest(&out->hdr, frame->payload, hdr_len,
                                  ep->swap)) {
        return &ep->stats.inject_skipped_header;
    }
    if (out->hdr.gso_type != VIRTIO_NET_HDR_GSO_NONE &&
        out->hdr.gso_size < INJECT_MIN_GSO_SIZE) {
        return &ep->stats.inject_skipped_header;
    }
    out->data = frame->payload + hdr_len;
    out->len = frame->size - hdr_len;
    return NULL;
}

/*
 * Inject the first one of @frames, and more as far as they can go with it in
 * one system call.  Returns how many are dealt with; 0: they have to wait.
 */
static size_t filter_tap_inject_some(FilterTapEndpoints *ep,
                                     const StreamFrame *frames, size_t n)
{
    PacketSocketFrame batch[PACKET_SOCKET_BATCH];
    bool to_network = filter_tap_wants(ep, NET_FILTER_DIRECTION_RX);
    uint64_t *flaw = filter_tap_inject_prepare(ep, frames, batch);
    size_t done = 1;

    if (flaw) {
        ++*flaw;
        return 1;
    }
    /* net.c would queue what is for the network, and drop it in the end. */
    if (to_network && !runstate_is_running()) {
        return 0;
    }
    if (ep->inject) {
        n = to_network ? 1 : MIN(n, PACKET_SOCKET_BATCH);
        while (done < n && !filter_tap_inject_prepare(ep, &frames[done],
                                                      &batch[done])) {
            done++;
        }
        done = filter_tap_inject_to_guest(ep, batch, done);
    }
    if (done && to_network) {
        filter_tap_inject_to_network(ep, frames,
                                     filter_tap_stream_hdr_len(ep, frames));
    }
    return done;
}

static size_t filter_tap_inject_frames(void *opaque, const StreamFrame *frames,
                                       size_t n)
{
    FilterTapEndpoints *ep = opaque;
    size_t done = 0, some;

    ep->swap = filter_tap_header_swapped(ep);
    while (done < n && filter_tap_works(ep)) {
        some = filter_tap_inject_some(ep, frames + done, n - done);
        if (!some) {
            break;
        }
        done += some;
    }
    return done;
}

static void filter_tap_inject_retry(void *opaque)
{
    FilterTapEndpoints *ep = opaque;

    frame_reader_resume(ep->reader);
}

/*
 * While the filter is on but must wait, the stream is read ahead as far as
 * the reader has room: when a peer has gone (the source of a migration that
 * is done) its character device throws away what was not read.
 */
static int filter_tap_in_can_read(void *opaque)
{
    FilterTapEndpoints *ep = opaque;

    return ep->nf->on ? frame_reader_room(ep->reader) : 0;
}

static void filter_tap_in_read(void *opaque, const uint8_t *buf, int size)
{
    FilterTapEndpoints *ep = opaque;

    frame_reader_push(ep->reader, buf, size);
}

static void filter_tap_in_event(void *opaque, QEMUChrEvent event)
{
    FilterTapEndpoints *ep = opaque;

    if (event == CHR_EVENT_OPENED || event == CHR_EVENT_CLOSED) {
        frame_reader_reset(ep->reader);
    }
}

/* Both */

static void filter_tap_update(FilterTapEndpoints *ep)
{
    filter_tap_update_source(ep);
    if (ep->chr_in) {
        if (filter_tap_works(ep)) {
            frame_reader_resume(ep->reader);
        }
        qemu_chr_fe_accept_input(ep->chr_in);
    }
}

void filter_tap_status_changed(FilterTap *ft)
{
    filter_tap_update(ft->endpoints);
}

static void filter_tap_vm_state(void *opaque, bool running, RunState state)
{
    FilterTapEndpoints *ep = opaque;

    ep->running = running;
    filter_tap_update(ep);
}

/* After S3, during which nothing goes to the network */
static void filter_tap_wakeup(Notifier *notifier, void *opaque)
{
    filter_tap_update(container_of(notifier, FilterTapEndpoints, wakeup));
}

/* At a stop net.c comes behind, empties the queues, and has the TAP read. */
static void filter_tap_vm_state_last(void *opaque, bool running,
                                     RunState state)
{
    FilterTapEndpoints *ep = opaque;

    if (!running && ep->tap_paused) {
        filter_tap_foreach_queue(ep, filter_tap_poll_queue);
    }
}

/* Setup: which interface */

static bool filter_tap_same_netns(int fd)
{
    struct stat tap, own;
    int ns = ioctl(fd, TUNGETDEVNETNS);         /* Linux 5.2 */
    bool same;

    if (ns < 0) {
        return true;    /* not for us to know; the address has to do */
    }
    same = fstat(ns, &tap) < 0 || stat("/proc/self/ns/net", &own) < 0 ||
           (tap.st_dev == own.st_dev && tap.st_ino == own.st_ino);
    close(ns);
    return same;
}

/* Whether the interface of that name is the one that @tap_fd belongs to. */
static bool filter_tap_same_interface(int tap_fd, const char *ifname,
                                      int socket_fd)
{
    struct ifreq tap = { }, named = { };

    pstrcpy(named.ifr_name, sizeof(named.ifr_name), ifname);
    if (ioctl(tap_fd, SIOCGIFHWADDR, &tap) < 0 ||
        ioctl(socket_fd, SIOCGIFHWADDR, &named) < 0) {
        return false;
    }
    return !memcmp(tap.ifr_hwaddr.sa_data, named.ifr_hwaddr.sa_data,
                   ETH_ALEN) && filter_tap_same_netns(tap_fd);
}

static bool filter_tap_is_tun_driver(int socket_fd, const char *ifname)
{
    struct ethtool_drvinfo info = { .cmd = ETHTOOL_GDRVINFO };
    struct ifreq ifr = { .ifr_data = (void *)&info };

    pstrcpy(ifr.ifr_name, sizeof(ifr.ifr_name), ifname);
    return ioctl(socket_fd, SIOCETHTOOL, &ifr) == 0 &&
           !strcmp(info.driver, "tun");
}

/*
 * The name is all that a TAP's fd tells of its interface, and it counts in
 * the network namespace that the TAP lives in.  In QEMU's own, where the
 * packet socket is opened, it may be another interface's.
 *
 * Returns the interface's index, or 0.
 */
static unsigned filter_tap_resolve(NetFilterState *nf, char *ifname,
                                   Error **errp)
{
    ERRP_GUARD();
    int fd = tap_get_fd(nf->netdev);
    struct ifreq ifr = { };
    unsigned ifindex = 0;
    int socket_fd;

    if (ioctl(fd, TUNGETIFF, &ifr) < 0) {
        error_setg_errno(errp, errno, "could not get the TAP's interface");
        return 0;
    }
    pstrcpy(ifname, IFNAMSIZ, ifr.ifr_name);

    socket_fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (socket_fd < 0) {
        error_setg_errno(errp, errno, "could not look up interface '%s'",
                         ifname);
        return 0;
    }
    if (!if_nametoindex(ifname)) {
        error_setg_errno(errp, errno, "could not find interface '%s'",
                         ifname);
        error_append_hint(errp, "The TAP may be in another network namespace "
                          "than QEMU, or be gone.\n");
    } else if (!filter_tap_same_interface(fd, ifname, socket_fd)) {
        error_setg(errp, "interface '%s' in QEMU's network namespace is not "
                   "the TAP", ifname);
        error_append_hint(errp, "The TAP is in another network namespace. "
                          "Run QEMU in that one.\n");
    } else if (!filter_tap_is_tun_driver(socket_fd, ifname)) {
        error_setg(errp, "interface '%s' is not a TAP", ifname);
        error_append_hint(errp, "On other interfaces, such as macvtap, the "
                          "directions have another meaning.\n");
    } else {
        ifindex = if_nametoindex(ifname);
    }
    close(socket_fd);
    return ifindex;
}

/* Setup: endpoints */

bool filter_tap_reaches(const FilterTap *ft, NetClientState *netdev)
{
    return netdev->info->type == NET_CLIENT_DRIVER_TAP &&
           (ft->packet_socket == ON_OFF_AUTO_ON ||
            (ft->packet_socket == ON_OFF_AUTO_AUTO && get_vhost_net(netdev)));
}

static bool filter_tap_check_chain(FilterTap *ft, NetFilterState *nf,
                                   Error **errp)
{
    ERRP_GUARD();

    if (ft->packet_socket == ON_OFF_AUTO_ON) {
        error_setg(errp, "'packet-socket=on' needs a netdev of type 'tap', "
                   "and netdev '%s' is of type '%s'", nf->netdev_id,
                   NetClientDriver_str(nf->netdev->info->type));
        return false;
    }
    if (ft->when_running != ON_OFF_AUTO_AUTO ||
        ft->when_stopped != ON_OFF_AUTO_AUTO) {
        error_setg(errp, "'enable_when_running' and 'enable_when_stopped' "
                   "need a packet socket, which is not used on netdev '%s'",
                   nf->netdev_id);
        error_append_hint(errp, "Add 'packet-socket=on', on a TAP.\n");
        return false;
    }
    if (ft->buffer_size) {
        error_setg(errp, "'buffer-size' is that of a packet socket, which is "
                   "not used on netdev '%s'", nf->netdev_id);
        return false;
    }
    if (ft->packet_fd || ft->inject_packet_fd) {
        error_setg(errp, "'%s' is a packet socket, which is not used on "
                   "netdev '%s'",
                   ft->packet_fd ? "packet-fd" : "inject-packet-fd",
                   nf->netdev_id);
        return false;
    }
    return true;
}

/*
 * The growth of the interface's counter since the filter was set up; of a
 * counter that cannot be read any more, the last that was seen.
 */
static void filter_tap_update_tx_dropped(FilterTapEndpoints *ep)
{
    struct ifaddrs *list, *ifa;
    char name[IF_NAMESIZE];

    if (!if_indextoname(ep->ifindex, name) || getifaddrs(&list) < 0) {
        return;
    }
    for (ifa = list; ifa; ifa = ifa->ifa_next) {
        if (ifa->ifa_addr && ifa->ifa_addr->sa_family == AF_PACKET &&
            ifa->ifa_data && !strcmp(ifa->ifa_name, name)) {
            struct rtnl_link_stats *stats = ifa->ifa_data;
            uint32_t now = stats->tx_dropped;

            ep->tx_dropped += (uint32_t)(now - ep->tx_dropped_seen);
            ep->tx_dropped_seen = now;
        }
    }
    freeifaddrs(list);
}

/* Which roles need a packet socket */
static bool filter_tap_needs_capture(const FilterTapEndpoints *ep)
{
    return ep->captures && !ep->takes;
}

static bool filter_tap_needs_inject(const FilterTapEndpoints *ep)
{
    return ep->chr_in && filter_tap_wants(ep, NET_FILTER_DIRECTION_TX);
}

static bool filter_tap_fd_in_use(FilterTapEndpoints *ep, int fd)
{
    FilterTapEndpoints *other;

    QLIST_FOREACH(other, &filter_tap_list, next) {
        if ((other->capture && packet_socket_fd(other->capture) == fd) ||
            (other->inject && packet_socket_fd(other->inject) == fd)) {
            return true;
        }
    }
    return ep->passed_capture.property && ep->passed_capture.fd == fd;
}

/* From here on the fd is ours, and is closed if something fails. */
static bool filter_tap_take_fd(FilterTapEndpoints *ep, const char *property,
                               const char *value, FilterTapPassed *passed,
                               Error **errp)
{
    ERRP_GUARD();
    int fd;

    if (!value) {
        return true;
    }
    if (strstart(value, "/dev/fdset/", NULL)) {
        fd = qemu_open(value, O_RDWR, errp);
    } else {
        fd = monitor_fd_param(monitor_cur(), value, errp);
    }
    if (fd >= 0 && filter_tap_fd_in_use(ep, fd)) {
        /* It is the other user's, so it is not closed. */
        error_setg(errp, "file descriptor %d is in use already", fd);
        fd = -1;
    } else if (fd >= 0 && qemu_isdigit(*value) && !packet_socket_is(fd)) {
        /* A wrong number, maybe that of something which QEMU needs. */
        error_setg(errp, "file descriptor %d is not a packet socket", fd);
        fd = -1;
    }
    if (fd < 0) {
        error_prepend(errp, "'%s': ", property);
        return false;
    }
    *passed = (FilterTapPassed) { .property = property, .fd = fd };
    return true;
}

/* 'packet-fd' is the first or the only one that the filter needs. */
static bool filter_tap_take_fds(FilterTap *ft, FilterTapEndpoints *ep,
                                Error **errp)
{
    const char *first = ft->packet_fd, *second = ft->inject_packet_fd;

    if (filter_tap_needs_capture(ep)) {
        if (!filter_tap_take_fd(ep, "packet-fd", first, &ep->passed_capture,
                                errp)) {
            return false;
        }
        first = NULL;
    }
    if (filter_tap_needs_inject(ep)) {
        const char **value = second ? &second : &first;

        if (!filter_tap_take_fd(ep, second ? "inject-packet-fd" : "packet-fd",
                                *value, &ep->passed_inject, errp)) {
            return false;
        }
        *value = NULL;
    }
    if (first || second) {
        error_setg(errp, "'%s' is a packet socket that the filter does not "
                   "need", first ? "packet-fd" : "inject-packet-fd");
        return false;
    }
    return true;
}

/* The fd that was passed, which is the caller's from now on; or -1 */
static int filter_tap_steal_fd(FilterTapPassed *passed)
{
    int fd = passed->property ? passed->fd : -1;

    passed->fd = -1;
    return fd;
}

static void filter_tap_passed_error(const FilterTapPassed *passed,
                                    Error **errp)
{
    if (passed->property) {
        error_prepend(errp, "'%s': ", passed->property);
    }
}

static bool filter_tap_open_capture(FilterTapEndpoints *ep, Error **errp)
{
    ERRP_GUARD();
    unsigned directions =
        (filter_tap_wants(ep, NET_FILTER_DIRECTION_TX) ?
         PACKET_SOCKET_OUTGOING : 0) |
        (filter_tap_wants(ep, NET_FILTER_DIRECTION_RX) ?
         PACKET_SOCKET_INCOMING : 0);

    if (!filter_tap_needs_capture(ep)) {
        return true;
    }
    ep->capture = packet_socket_new_capture(ep->ifname, ep->ifindex,
                                            filter_tap_steal_fd(
                                                &ep->passed_capture),
                                            directions,
                                            BUFFER_SIZE_SOCKET(ep->buffer_size),
                                            errp);
    if (!ep->capture) {
        filter_tap_passed_error(&ep->passed_capture, errp);
        return false;
    }
    return !ep->sink || packet_socket_stamp(ep->capture, errp);
}

static bool filter_tap_open_inject(FilterTapEndpoints *ep, Error **errp)
{
    ERRP_GUARD();

    if (!filter_tap_needs_inject(ep)) {
        return true;
    }
    ep->inject = packet_socket_new_inject(ep->ifname, ep->ifindex,
                                          filter_tap_steal_fd(
                                              &ep->passed_inject), errp);
    if (!ep->inject) {
        filter_tap_passed_error(&ep->passed_inject, errp);
    }
    return ep->inject;
}

/* The timer lives as long as there are endpoints. */
static bool filter_tap_open_timer(Error **errp)
{
    if (filter_tap_look.timer_fd < 0) {
        filter_tap_look.timer_fd = timerfd_create(CLOCK_MONOTONIC,
                                                  TFD_CLOEXEC | TFD_NONBLOCK);
        if (filter_tap_look.timer_fd < 0) {
            error_setg_errno(errp, errno, "could not create a timer");
            return false;
        }
        qemu_set_fd_handler(filter_tap_look.timer_fd,
                            filter_tap_look_readable, NULL, NULL);
    }
    return true;
}

static void filter_tap_close_timer(void)
{
    if (filter_tap_look.timer_fd >= 0 && !filter_tap_look.endpoints) {
        qemu_set_fd_handler(filter_tap_look.timer_fd, NULL, NULL, NULL);
        close(filter_tap_look.timer_fd);
        filter_tap_look.timer_fd = -1;
        filter_tap_look.paced = false;
    }
}

static void filter_tap_remove(FilterTapEndpoints *ep)
{
    if (filter_tap_look.next == ep) {
        filter_tap_look.next = QLIST_NEXT(ep, next);
    }
    QLIST_REMOVE(ep, next);
    filter_tap_look.endpoints--;
    filter_tap_close_timer();
}

/* Nothing can fail any more: begin. */
static void filter_tap_start(FilterTapEndpoints *ep)
{
    FilterTapEndpoints *other;

    QLIST_FOREACH(other, &filter_tap_list, next) {
        if (other->nf->netdev == ep->nf->netdev) {
            ep->tap_paused = other->tap_paused;
        }
    }
    QLIST_INSERT_HEAD(&filter_tap_list, ep, next);
    filter_tap_look.endpoints++;
    if (ep->captures) {
        ep->linger = timer_new_ms(QEMU_CLOCK_REALTIME, filter_tap_unhook, ep);
        ep->interface_timer = timer_new_ms(QEMU_CLOCK_REALTIME,
                                           filter_tap_check_interface, ep);
        filter_tap_update_tx_dropped(ep);
        ep->tx_dropped = 0;
    }
    if (ep->chr_out) {
        ep->writer = frame_writer_new(ep->chr_out, ep->vnet_hdr,
                                      filter_tap_writer_progress, ep);
        frame_writer_set_limit(ep->writer,
                               BUFFER_SIZE_WRITER(ep->buffer_size));
        ep->flush_bh = qemu_bh_new(filter_tap_flush_bh, ep);
        qemu_chr_fe_set_handlers(ep->chr_out, filter_tap_out_can_read,
                                 filter_tap_out_read, filter_tap_out_event,
                                 NULL, ep, NULL, true);
    }
    if (ep->chr_in) {
        ep->reader = frame_reader_new(ep->chr_in, ep->vnet_hdr,
                                      filter_tap_inject_frames, ep);
        ep->inject_retry = timer_new_ms(QEMU_CLOCK_REALTIME,
                                        filter_tap_inject_retry, ep);
        qemu_chr_fe_set_handlers(ep->chr_in, filter_tap_in_can_read,
                                 filter_tap_in_read, filter_tap_in_event,
                                 NULL, ep, NULL, true);
    }
    ep->wakeup.notify = filter_tap_wakeup;
    qemu_register_wakeup_notifier(&ep->wakeup);
    ep->vm_state = qemu_add_vm_change_state_handler(filter_tap_vm_state, ep);
    ep->vm_state_last =
        qemu_add_vm_change_state_handler_prio(filter_tap_vm_state_last, ep,
                                              -1);
    filter_tap_update(ep);
}

static FilterTapEndpoints *filter_tap_new(FilterTap *ft, NetFilterState *nf)
{
    FilterTapEndpoints *ep = g_new0(FilterTapEndpoints, 1);

    ep->nf = nf;
    ep->direction = nf->direction;
    ep->when_running = ft->when_running != ON_OFF_AUTO_OFF;
    ep->when_stopped = ft->when_stopped == ON_OFF_AUTO_ON;
    ep->buffer_size = ft->buffer_size ?: BUFFER_SIZE_DEFAULT;
    ep->running = runstate_is_live(runstate_get());
    ep->may_swap = filter_tap_get_other_order(nf->netdev, &(int){ 0 });
    return ep;
}

static void filter_tap_close_fd(FilterTapPassed *passed)
{
    int fd = filter_tap_steal_fd(passed);

    if (fd >= 0) {
        qemu_close(fd);
    }
}

static void filter_tap_free(FilterTapEndpoints *ep)
{
    filter_tap_close_fd(&ep->passed_capture);
    filter_tap_close_fd(&ep->passed_inject);
    packet_socket_free(ep->capture);
    packet_socket_free(ep->inject);
    g_free(ep->sink_frame);
    g_free(ep->segments);
    g_free(ep);
}

/* Open what can fail, and begin.  Takes @ep over. */
static bool filter_tap_open(FilterTap *ft, FilterTapEndpoints *ep,
                            Error **errp)
{
    ERRP_GUARD();
    NetFilterState *nf = ep->nf;

    ep->captures = ep->chr_out || ep->sink;
    ep->takes = ep->captures && !ep->when_running && !ft->copies;
    if (!filter_tap_take_fds(ft, ep, errp)) {
        goto fail;
    }
    if (!ep->when_running && !ep->when_stopped) {
        error_setg(errp, "'enable_when_running=off' without "
                   "'enable_when_stopped=on' leaves nothing to do");
        goto fail;
    }
    ep->ifindex = filter_tap_resolve(nf, ep->ifname, errp);
    if (!ep->ifindex || !filter_tap_open_capture(ep, errp) ||
        !filter_tap_open_inject(ep, errp) ||
        !filter_tap_open_timer(errp)) {
        goto fail;
    }
    ft->endpoints = ep;
    filter_tap_start(ep);
    return true;

fail:
    error_prepend(errp, "netdev '%s': ", nf->netdev_id);
    filter_tap_free(ep);
    return false;
}

bool filter_tap_setup(FilterTap *ft, NetFilterState *nf, CharFrontend *chr_in,
                      CharFrontend *chr_out, bool vnet_hdr, Error **errp)
{
    FilterTapEndpoints *ep;

    if (!filter_tap_reaches(ft, nf->netdev)) {
        return filter_tap_check_chain(ft, nf, errp);
    }
    ep = filter_tap_new(ft, nf);
    ep->chr_in = chr_in;
    ep->chr_out = chr_out;
    ep->vnet_hdr = vnet_hdr;
    return filter_tap_open(ft, ep, errp);
}

bool filter_tap_setup_sink(FilterTap *ft, NetFilterState *nf,
                           FilterTapSink *sink, void *opaque, Error **errp)
{
    FilterTapEndpoints *ep;

    assert(ft->copies);
    if (!filter_tap_reaches(ft, nf->netdev)) {
        return filter_tap_check_chain(ft, nf, errp);
    }
    ep = filter_tap_new(ft, nf);
    ep->sink = sink;
    ep->sink_opaque = opaque;
    ep->sink_frame = g_malloc(FRAME_STREAM_MAX_PAYLOAD);
    return filter_tap_open(ft, ep, errp);
}

/* What was captured and not handed on yet is offered a last time. */
static void filter_tap_stop_stream(FilterTapEndpoints *ep)
{
    uint64_t lost;

    filter_tap_offer(ep);
    qemu_chr_fe_set_handlers(ep->chr_out, NULL, NULL, NULL, NULL, NULL, NULL,
                             true);
    qemu_bh_delete(ep->flush_bh);
    lost = frame_writer_close(g_steal_pointer(&ep->writer));
    if (ep->draining) {
        lost += filter_tap_discard(ep);
    }
    if (lost) {
        warn_report("netdev '%s': %" PRIu64 " packets%s are lost with the "
                    "filter", ep->nf->netdev_id, lost,
                    ep->takes ? " that the guest did not get" : "");
    }
    ep->chr_out = NULL;
}

static void filter_tap_stop_inject(FilterTapEndpoints *ep)
{
    qemu_chr_fe_set_handlers(ep->chr_in, NULL, NULL, NULL, NULL, NULL, NULL,
                             true);
    timer_free(ep->inject_retry);
    if (frame_reader_mid_frame(ep->reader)) {
        qemu_chr_fe_disconnect(ep->chr_in);
    }
    frame_reader_free(ep->reader);
}

void filter_tap_cleanup(FilterTap *ft)
{
    FilterTapEndpoints *ep = g_steal_pointer(&ft->endpoints);

    if (!ep) {
        return;
    }
    if (ep->captures) {
        filter_tap_set_source(ep, FILTER_TAP_NONE);
        timer_free(ep->linger);
        timer_free(ep->interface_timer);
        ep->captures = false;
    }
    if (ep->chr_out) {
        filter_tap_stop_stream(ep);
    }
    filter_tap_remove(ep);
    filter_tap_update_tap(ep);
    notifier_remove(&ep->wakeup);
    qemu_del_vm_change_state_handler(ep->vm_state);
    qemu_del_vm_change_state_handler(ep->vm_state_last);
    if (ep->chr_in) {
        filter_tap_stop_inject(ep);
    }
    filter_tap_free(ep);
}

/* Properties */

static FilterTap *filter_tap_of(Object *obj, void *opaque)
{
    return (FilterTap *)((uint8_t *)obj + GPOINTER_TO_SIZE(opaque));
}

static bool filter_tap_settable(Object *obj, const char *name, Error **errp)
{
    if (NETFILTER(obj)->netdev) {
        error_setg(errp, "'%s' cannot be changed once the filter is set up",
                   name);
        return false;
    }
    return true;
}

static void filter_tap_get_packet_socket(Object *obj, Visitor *v,
                                         const char *name, void *opaque,
                                         Error **errp)
{
    visit_type_OnOffAuto(v, name, &filter_tap_of(obj, opaque)->packet_socket,
                         errp);
}

static void filter_tap_set_packet_socket(Object *obj, Visitor *v,
                                         const char *name, void *opaque,
                                         Error **errp)
{
    OnOffAuto value;

    if (filter_tap_settable(obj, name, errp) &&
        visit_type_OnOffAuto(v, name, &value, errp)) {
        filter_tap_of(obj, opaque)->packet_socket = value;
    }
}

/* On the chain alone both are true, as ever. */
static void filter_tap_get_when_running(Object *obj, Visitor *v,
                                        const char *name, void *opaque,
                                        Error **errp)
{
    FilterTap *ft = filter_tap_of(obj, opaque);
    bool value = ft->when_running != ON_OFF_AUTO_OFF;

    visit_type_bool(v, name, &value, errp);
}

static void filter_tap_get_when_stopped(Object *obj, Visitor *v,
                                        const char *name, void *opaque,
                                        Error **errp)
{
    FilterTap *ft = filter_tap_of(obj, opaque);
    bool value = !ft->endpoints || ft->endpoints->when_stopped;

    visit_type_bool(v, name, &value, errp);
}

static void filter_tap_set_when(Object *obj, Visitor *v, const char *name,
                                OnOffAuto *when, Error **errp)
{
    bool value;

    if (filter_tap_settable(obj, name, errp) &&
        visit_type_bool(v, name, &value, errp)) {
        *when = value ? ON_OFF_AUTO_ON : ON_OFF_AUTO_OFF;
    }
}

static void filter_tap_set_when_running(Object *obj, Visitor *v,
                                        const char *name, void *opaque,
                                        Error **errp)
{
    filter_tap_set_when(obj, v, name,
                        &filter_tap_of(obj, opaque)->when_running, errp);
}

static void filter_tap_set_when_stopped(Object *obj, Visitor *v,
                                        const char *name, void *opaque,
                                        Error **errp)
{
    filter_tap_set_when(obj, v, name,
                        &filter_tap_of(obj, opaque)->when_stopped, errp);
}

static void filter_tap_get_buffer_size(Object *obj, Visitor *v,
                                       const char *name, void *opaque,
                                       Error **errp)
{
    FilterTap *ft = filter_tap_of(obj, opaque);
    uint64_t value = ft->buffer_size ?: BUFFER_SIZE_DEFAULT;

    visit_type_size(v, name, &value, errp);
}

static void filter_tap_set_buffer_size(Object *obj, Visitor *v,
                                       const char *name, void *opaque,
                                       Error **errp)
{
    uint64_t value;

    if (!filter_tap_settable(obj, name, errp) ||
        !visit_type_size(v, name, &value, errp)) {
        return;
    }
    if (value < BUFFER_SIZE_MIN || value > BUFFER_SIZE_MAX) {
        error_setg(errp, "'%s' must be from 1 MiB to 1 GiB", name);
        return;
    }
    filter_tap_of(obj, opaque)->buffer_size = value;
}

static char **filter_tap_fd_of(Object *obj, const char *name, void *opaque)
{
    FilterTap *ft = filter_tap_of(obj, opaque);

    return g_str_equal(name, "packet-fd") ? &ft->packet_fd :
                                            &ft->inject_packet_fd;
}

static void filter_tap_get_fd(Object *obj, Visitor *v, const char *name,
                              void *opaque, Error **errp)
{
    char *value = *filter_tap_fd_of(obj, name, opaque) ?: (char *)"";

    visit_type_str(v, name, &value, errp);
}

static void filter_tap_set_fd(Object *obj, Visitor *v, const char *name,
                              void *opaque, Error **errp)
{
    char **fd = filter_tap_fd_of(obj, name, opaque);
    char *value;

    if (filter_tap_settable(obj, name, errp) &&
        visit_type_str(v, name, &value, errp)) {
        g_free(*fd);
        *fd = value;
    }
}

static void filter_tap_release_fd(Object *obj, const char *name, void *opaque)
{
    g_clear_pointer(filter_tap_fd_of(obj, name, opaque), g_free);
}

static void filter_tap_get_interface(Object *obj, Visitor *v,
                                     const char *name, void *opaque,
                                     Error **errp)
{
    FilterTap *ft = filter_tap_of(obj, opaque);
    char *value = ft->endpoints ? ft->endpoints->ifname : (char *)"";

    visit_type_str(v, name, &value, errp);
}

static void filter_tap_get_source(Object *obj, Visitor *v,
                                  const char *name, void *opaque,
                                  Error **errp)
{
    FilterTap *ft = filter_tap_of(obj, opaque);
    FilterTapSource source = ft->endpoints ? ft->endpoints->source :
                                             FILTER_TAP_CHAIN;
    char *value = (char *)filter_tap_source_names[source];

    visit_type_str(v, name, &value, errp);
}

static void filter_tap_get_pending(Object *obj, Visitor *v, const char *name,
                                   void *opaque, Error **errp)
{
    FilterTapEndpoints *ep = filter_tap_of(obj, opaque)->endpoints;
    bool value = ep && (ep->draining ||
                        (ep->writer && !frame_writer_empty(ep->writer)));

    visit_type_bool(v, name, &value, errp);
}

static void filter_tap_get_kernel_drops(Object *obj, Visitor *v,
                                        const char *name, void *opaque,
                                        Error **errp)
{
    FilterTapEndpoints *ep = filter_tap_of(obj, opaque)->endpoints;
    uint64_t value = 0;

    if (ep && ep->capture) {
        filter_tap_update_kernel_drops(ep, ep->source ==
                                           FILTER_TAP_PACKET_SOCKET);
        value = ep->stats.capture_kernel_drops;
    }
    visit_type_uint64(v, name, &value, errp);
}

static void filter_tap_get_tx_dropped(Object *obj, Visitor *v,
                                      const char *name, void *opaque,
                                      Error **errp)
{
    FilterTapEndpoints *ep = filter_tap_of(obj, opaque)->endpoints;
    uint64_t value = 0;

    if (ep && ep->captures) {
        filter_tap_update_tx_dropped(ep);
        value = ep->tx_dropped;
    }
    visit_type_uint64(v, name, &value, errp);
}

static const struct {
    const char *name;
    size_t offset;
    void (*get)(Object *obj, Visitor *v, const char *name, void *opaque,
                Error **errp);
    const char *description;
} filter_tap_counters[] = {
#define COUNTER(name, field, description) \
    { name, offsetof(FilterTapStats, field), NULL, description }
    COUNTER("capture-packets", capture_packets,
            "Packets that were captured"),
    COUNTER("capture-bytes", capture_bytes,
            "Bytes of their frames"),
    { "capture-kernel-drops", 0, filter_tap_get_kernel_drops,
      "Packets that the kernel dropped because the packet socket's queue "
      "was full" },
    COUNTER("capture-peer-drops", capture_peer_drops,
            "Packets that were thrown away because the peer had not taken "
            "them when it went away, or because they could not be written"),
    COUNTER("capture-skipped-gso", capture_skipped_gso,
            "Packets left out because without a virtio-net header they "
            "cannot be expressed"),
    COUNTER("capture-skipped-oversize", capture_skipped_oversize,
            "Packets left out because they are longer than a frame of the "
            "stream may be"),
    { "capture-interface-drops", 0, filter_tap_get_tx_dropped,
      "Packets toward the guest that the interface dropped since the filter "
      "was set up, because the TAP's queue (txqueuelen) was full" },
    COUNTER("inject-packets", inject_packets,
            "Packets that were injected"),
    COUNTER("inject-bytes", inject_bytes,
            "Bytes of their frames"),
    COUNTER("inject-skipped-runt", inject_skipped_runt,
            "Frames skipped because they are shorter than a header"),
    COUNTER("inject-skipped-oversize", inject_skipped_oversize,
            "Frames skipped because they are longer than the MTU allows"),
    COUNTER("inject-skipped-header", inject_skipped_header,
            "Frames skipped because of a bad virtio-net header"),
    COUNTER("inject-interface-drops", inject_interface_drops,
            "Frames thrown away because the interface was down or gone"),
#undef COUNTER
};

static void filter_tap_get_counter(Object *obj, Visitor *v, const char *name,
                                   void *opaque, Error **errp)
{
    FilterTapEndpoints *ep = filter_tap_of(obj, opaque)->endpoints;
    uint64_t value = 0;

    for (int i = 0; ep && i < ARRAY_SIZE(filter_tap_counters); i++) {
        if (!strcmp(filter_tap_counters[i].name, name)) {
            value = *(uint64_t *)((uint8_t *)&ep->stats +
                                  filter_tap_counters[i].offset);
        }
    }
    visit_type_uint64(v, name, &value, errp);
}

void filter_tap_add_properties(ObjectClass *oc, ptrdiff_t offset,
                               bool injects)
{
    void *opaque = GSIZE_TO_POINTER(offset);

    object_class_property_add(oc, "packet-socket", "OnOffAuto",
                              filter_tap_get_packet_socket,
                              filter_tap_set_packet_socket, NULL, opaque);
    object_class_property_set_description(oc, "packet-socket",
        "Reach the packets through a packet socket (auto: on a TAP with "
        "vhost)");
    object_class_property_add(oc, "enable_when_running", "bool",
                              filter_tap_get_when_running,
                              filter_tap_set_when_running, NULL, opaque);
    object_class_property_set_description(oc, "enable_when_running",
        "Work while the VM runs");
    object_class_property_add(oc, "enable_when_stopped", "bool",
                              filter_tap_get_when_stopped,
                              filter_tap_set_when_stopped, NULL, opaque);
    object_class_property_set_description(oc, "enable_when_stopped",
        "Work while the VM is stopped");
    object_class_property_add(oc, "buffer-size", "size",
                              filter_tap_get_buffer_size,
                              filter_tap_set_buffer_size, NULL, opaque);
    object_class_property_set_description(oc, "buffer-size",
        "Memory in bytes for captured packets that wait");
    object_class_property_add(oc, "packet-fd", "str", filter_tap_get_fd,
                              filter_tap_set_fd, filter_tap_release_fd,
                              opaque);
    object_class_property_set_description(oc, "packet-fd",
        "Packet socket to capture with, or to inject with if that is all");
    if (injects) {
        object_class_property_add(oc, "inject-packet-fd", "str",
                                  filter_tap_get_fd, filter_tap_set_fd,
                                  filter_tap_release_fd, opaque);
        object_class_property_set_description(oc, "inject-packet-fd",
            "Packet socket to inject with");
    }

    object_class_property_add(oc, "interface", "str",
                              filter_tap_get_interface, NULL, NULL, opaque);
    object_class_property_set_description(oc, "interface",
        "The TAP's interface, if the filter reaches it by itself");
    object_class_property_add(oc, "source", "str",
                              filter_tap_get_source, NULL, NULL, opaque);
    object_class_property_set_description(oc, "source",
        "Where captured packets come from now: packet-socket, chain or none");

    object_class_property_add(oc, "capture-pending", "bool",
                              filter_tap_get_pending, NULL, NULL, opaque);
    object_class_property_set_description(oc, "capture-pending",
        "Whether captured packets wait for the peer");

    for (int i = 0; i < ARRAY_SIZE(filter_tap_counters); i++) {
        if (!injects && strstart(filter_tap_counters[i].name, "inject", NULL)) {
            continue;
        }
        object_class_property_add(oc, filter_tap_counters[i].name, "uint64",
                                  filter_tap_counters[i].get ?:
                                  filter_tap_get_counter, NULL, NULL, opaque);
        object_class_property_set_description(oc, filter_tap_counters[i].name,
                                       filter_tap_counters[i].description);
    }
}
