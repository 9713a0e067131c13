/*
 * Netfilters on a TAP with vhost: capture
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Frames come from a packet socket, as copies, or they are taken: QEMU reads
 * the TAP, and the guest does not get them.  A capture that takes has no
 * socket; one that copies is never in TAKE.
 *
 *   state    socket    what happens to frames
 *   OFF      unhooked  nothing
 *   COPY     hooked    they are copied; the peer gets them
 *   LINGER   hooked    they are discarded and not counted
 *   DRAIN    unhooked  those that are in the socket go to the peer
 *   TAKE     -         they are taken; while the peer is gone or has no room
 *                      the TAP is held, see filter-tap-link.c
 *
 * A capture works while it is active and, if it copies, has a peer.
 *
 *   event                    OFF   COPY          LINGER  DRAIN    TAKE
 *   it works, and copies     COPY                COPY    COPY
 *   it works, and takes      TAKE
 *   it ceases to work              LINGER, or                     OFF
 *                                  DRAIN (1),
 *                                  or OFF (4)
 *   the peer has gone              LINGER (2)            OFF (2)  (3)
 *   1 s has passed                               OFF
 *   the socket is empty                                  OFF
 *   it cannot be read              (4)                   OFF (2)
 *   it cannot be hooked      OFF                 OFF     OFF (2)
 *
 *   When it is deleted it ceases to work, and the peer gets what it accepts at
 *   once; the rest is lost, and a warning tells how much.
 *
 *   (1) what is in the socket is staged; DRAIN if there is no room for all
 *   (2) what was not written is discarded, and counted as peer drops
 *   (3) what was taken is kept for the next peer
 *   (4) while it works, it is tried again; when it ceases to work, OFF (2)
 *
 * LINGER exists because hooking and unhooking take the kernel up to 20 ms each,
 * with the BQL held: a VM that stops must not wait for it, and a peer that
 * connects over and over again must not hold up the main loop.
 *
 * Each frame of COPY and DRAIN is in the socket, then staged, and ends as one
 * of: written to the peer, or in one counter of drops or skipped frames.
 * filter_tap_capture_pending() tells of what is staged, or in a socket that
 * drains.
 */

#include "qemu/osdep.h"
#include "filter-tap-int.h"
#include "net/frame-offload.h"
#include "net/frame-stream.h"
#include "net/packet-socket.h"
#include "packet-int.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/iov.h"
#include "qemu/main-loop.h"
#include "qemu/timer.h"
#include "qapi/error.h"
#include "trace.h"

#define LINGER_MS 1000

/* How many frames are read at a time from a socket that drains. */
#define DRAIN_BATCH 1024

/*
 * Shares of buffer-size: what the frame writer may hold, with and without a
 * socket, and what the socket may.  A writer allocates 5/4 of what it may hold.
 */
#define MEMORY_WRITER(memory) ((memory) / 8)
#define MEMORY_WRITER_ALONE(memory) ((memory) / 5 * 4)
#define MEMORY_SOCKET(memory) ((memory) / 32 * 27)

typedef enum CaptureState {
    CAPTURE_OFF,
    CAPTURE_COPY,
    CAPTURE_LINGER,
    CAPTURE_DRAIN,
    CAPTURE_TAKE,
} CaptureState;

static const struct {
    const char *name;
    const char *source;         /* as the property tells */
} capture_states[] = {
    [CAPTURE_OFF] = { "off", "none" },
    [CAPTURE_COPY] = { "copy", "packet-socket" },
    [CAPTURE_LINGER] = { "linger", "none" },
    [CAPTURE_DRAIN] = { "drain", "none" },
    [CAPTURE_TAKE] = { "take", "chain" },
};

struct FilterTapCapture {
    NetFilterState *nf;
    FilterTapUser *user;
    FilterTapConfig config;
    bool active;
    CaptureState state;
    bool hook_failed;           /* and that has been told */
    PacketPollEntry poll;
    PacketSocket *socket;       /* NULL if it takes */
    FrameWriter *writer;        /* NULL if there is a sink */
    uint8_t *sink_frame;
    QEMUBH *bh;                 /* write, and go on draining */
    QEMUTimer *linger;
    uint64_t kernel_drops_seen;
    uint64_t read;              /* bytes, from the socket */
    MACAddr nic_address;        /* in TAKE; all 0 if it is not known */
    uint64_t *counters;         /* of the user */
};

static void filter_tap_capture_update(FilterTapCapture *fc);

/* Whether somebody is there who gets what is captured. */
static bool filter_tap_capture_has_peer(const FilterTapCapture *fc)
{
    return fc->config.sink || qemu_chr_fe_backend_open(fc->config.chr_out);
}

static bool filter_tap_capture_full(const FilterTapCapture *fc)
{
    return fc->writer && frame_writer_full(fc->writer);
}

static bool filter_tap_capture_can_stage(const FilterTapCapture *fc)
{
    return filter_tap_capture_has_peer(fc) && !filter_tap_capture_full(fc);
}

void filter_tap_capture_update_drops(FilterTapCapture *fc)
{
    uint64_t drops;

    if (fc->socket) {
        drops = packet_socket_drops(fc->socket);
        if (fc->state == CAPTURE_COPY || fc->state == CAPTURE_DRAIN) {
            fc->counters[CAPTURE_KERNEL_DROPS] += drops - fc->kernel_drops_seen;
        }
        fc->kernel_drops_seen = drops;
    }
}

/* From the socket */

static void filter_tap_capture_stage(FilterTapCapture *fc, size_t size)
{
    frame_writer_commit(fc->writer, fc->nf->netdev->vnet_hdr_len, size);
    fc->counters[CAPTURE_PACKETS]++;
}

static void filter_tap_capture_to_sink(FilterTapCapture *fc,
                                       struct virtio_net_hdr *hdr,
                                       uint8_t *frame, size_t len)
{
    struct timespec time = packet_socket_time(fc->socket);

    hdr->gso_type = VIRTIO_NET_HDR_GSO_NONE;
    frame_offload_to_guest(hdr, frame, len, NULL, 0, false);
    if (fc->config.sink(fc->config.opaque, &time, frame, len)) {
        fc->counters[CAPTURE_PACKETS]++;
    } else {
        fc->counters[CAPTURE_PEER_DROPS]++;
    }
}

static void filter_tap_capture_skip(FilterTapCapture *fc, int err)
{
    trace_filter_tap_capture_skip(fc->user->link->ifname, err);
    fc->counters[CAPTURE_SKIPPED]++;
}

static void filter_tap_capture_error(FilterTapCapture *fc, int err)
{
    const char *ifname = fc->user->link->ifname;

    trace_filter_tap_capture_error(ifname, err);
    if (err == ENETDOWN) {
        /* The error is the same when the interface is deleted. */
        warn_report("netdev '%s': interface '%s' went down or away; nothing is "
                    "captured until it is up", fc->nf->netdev_id, ifname);
    }
}

/*
 * Read a frame and stage it.  Returns 0, -EAGAIN if there is none, or another
 * negative errno if the socket cannot be read now.
 */
static int filter_tap_capture_one(FilterTapCapture *fc, bool swap)
{
    size_t hdr_len = fc->writer ? fc->nf->netdev->vnet_hdr_len : 0;
    const size_t room = FRAME_STREAM_MAX_PAYLOAD;
    uint8_t *payload = fc->writer ? frame_writer_reserve(fc->writer, room) :
                                    fc->sink_frame;
    uint8_t *frame = payload + hdr_len;
    struct virtio_net_hdr hdr;
    ssize_t len;

    len = packet_socket_recv(fc->socket, &hdr, frame, room - hdr_len);
    fc->read += MAX(len, 0);
    if (len == -EAGAIN) {
        return len;
    } else if (len == -EMSGSIZE || len == -EINVAL) {
        filter_tap_capture_skip(fc, -len);
    } else if (len < 0) {
        filter_tap_capture_error(fc, -len);
        return len;
    } else if (!fc->writer) {
        filter_tap_capture_to_sink(fc, &hdr, frame, len);
    } else if (frame_offload_to_guest(&hdr, frame, len, payload, hdr_len,
                                      swap)) {
        filter_tap_capture_stage(fc, hdr_len + len);
    } else {
        filter_tap_capture_skip(fc, EOPNOTSUPP);
    }
    return 0;
}

/*
 * Read frames as long as there is room for them.  Sets @err as
 * filter_tap_capture_one() returns, and returns the number of frames.
 */
static unsigned filter_tap_capture_read(FilterTapCapture *fc,
                                        unsigned max_frames, size_t max_bytes,
                                        int *err)
{
    uint64_t end = fc->read + MIN(max_bytes, INT64_MAX);
    bool swap = filter_tap_link_swapped(fc->user->link);
    unsigned frames = 0;
    bool down = false;

    *err = 0;
    while (frames < max_frames && fc->read < end &&
           !filter_tap_capture_full(fc)) {
        *err = filter_tap_capture_one(fc, swap);
        if (*err == -ENETDOWN && !down) {
            /* The kernel reports it once, ahead of the frames that wait. */
            down = true;
        } else if (*err) {
            break;
        } else {
            frames++;
        }
    }
    return frames;
}

/* To the peer */

/* With @now, try before the watch fires: the peer may have made room. */
static void filter_tap_capture_flush(FilterTapCapture *fc, bool now)
{
    int ret;

    /* Some character devices accept data without a peer, and lose it. */
    if (!fc->writer || !filter_tap_capture_has_peer(fc)) {
        return;
    }
    ret = frame_writer_flush(fc->writer, now);
    /*
     * If the character device is still open after an error, as on a full
     * disk, a frame cannot be written.  Copies are dropped, or the capture
     * would be stuck.  What was taken is kept; the TAP is held when that fills
     * the buffer.
     */
    if (ret < 0 && fc->socket) {
        trace_filter_tap_peer_error(fc->user->link->ifname, -ret);
        fc->counters[CAPTURE_PEER_DROPS] += frame_writer_discard(fc->writer);
    }
}

/* From the TAP */

/*
 * After a migration the guest announces itself at the target, and a bridge may
 * send that here, too.  If it were taken, the guest would get it, and think
 * that somebody else uses its address.
 */
static bool filter_tap_capture_is_echo(const FilterTapCapture *fc,
                                       const struct iovec *iov, int iovcnt)
{
    MACAddr source;

    return iov_to_buf(iov, iovcnt, fc->nf->netdev->vnet_hdr_len + ETH_ALEN,
                      &source, sizeof(source)) == sizeof(source) &&
           !memcmp(&source, &fc->nic_address, sizeof(source)) &&
           !buffer_is_zero(&source, sizeof(source));
}

static void filter_tap_capture_take(FilterTapCapture *fc,
                                    const struct iovec *iov, int iovcnt)
{
    size_t size = iov_size(iov, iovcnt);

    if (size > FRAME_STREAM_MAX_PAYLOAD) {
        filter_tap_capture_skip(fc, EMSGSIZE);
        return;
    }
    if (filter_tap_capture_is_echo(fc, iov, iovcnt)) {
        filter_tap_capture_skip(fc, ELOOP);
        return;
    }
    iov_to_buf(iov, iovcnt, 0, frame_writer_reserve(fc->writer, size), size);
    filter_tap_capture_stage(fc, size);
    qemu_bh_schedule(fc->bh);
}

static void filter_tap_capture_take_queued(void *opaque, const uint8_t *data,
                                           size_t size)
{
    struct iovec iov = { .iov_base = (void *)data, .iov_len = size };

    filter_tap_capture_take(opaque, &iov, 1);
}

bool filter_tap_capture_receive(FilterTapCapture *fc, const struct iovec *iov,
                                int iovcnt)
{
    if (fc->state != CAPTURE_TAKE || !filter_tap_capture_can_stage(fc)) {
        return false;
    }
    filter_tap_capture_take(fc, iov, iovcnt);
    filter_tap_capture_update(fc);
    return true;
}

/* State */

static bool filter_tap_capture_hook(FilterTapCapture *fc)
{
    Error *err = NULL;

    if (packet_socket_hook(fc->socket, &err)) {
        fc->hook_failed = false;
        return true;
    }
    /* A peer can come again and again, so tell it once. */
    warn_report_once_cond(&fc->hook_failed, "netdev '%s': nothing is captured: "
                          "%s", fc->nf->netdev_id, error_get_pretty(err));
    error_free(err);
    return false;
}

/*
 * Every transition is made here.  This does not write to the peer, so that no
 * event of the character device can call it again meanwhile.
 */
static void filter_tap_capture_set_state(FilterTapCapture *fc,
                                         CaptureState new)
{
    CaptureState old = fc->state;
    uint64_t discarded = 0;

    if (new == CAPTURE_COPY && old == CAPTURE_OFF) {
        /* None, unless an earlier discard failed to read them. */
        fc->counters[CAPTURE_PEER_DROPS] += packet_socket_discard(fc->socket);
    }
    if (new == CAPTURE_COPY && old != CAPTURE_COPY &&
        !filter_tap_capture_hook(fc)) {
        new = CAPTURE_OFF;
    }
    if (new == old) {
        return;
    }
    trace_filter_tap_capture_state(fc->user->link->ifname,
                                   capture_states[old].name,
                                   capture_states[new].name);
    if (old == CAPTURE_LINGER) {
        timer_del(fc->linger);
    }
    if (new == CAPTURE_LINGER) {
        timer_mod(fc->linger,
                  qemu_clock_get_ms(QEMU_CLOCK_REALTIME) + LINGER_MS);
    } else if (new == CAPTURE_TAKE) {
        fc->nic_address = filter_tap_link_nic_address(fc->user->link);
        if (fc->user->wants_tx) {
            filter_tap_link_take_queued(fc->user,
                                        filter_tap_capture_take_queued, fc);
        }
    } else if (new != CAPTURE_COPY && fc->socket) {
        packet_socket_unhook(fc->socket);
    }
    if (fc->socket && (new == CAPTURE_OFF ||
                       (new == CAPTURE_COPY && old == CAPTURE_LINGER))) {
        discarded = packet_socket_discard(fc->socket);
    }
    if (old != CAPTURE_LINGER) {
        fc->counters[CAPTURE_PEER_DROPS] += discarded;
    }
    filter_tap_capture_update_drops(fc);
    fc->state = new;
}

/* Stage the frames that are in the socket now, however many come meanwhile. */
static void filter_tap_capture_end_copy(FilterTapCapture *fc)
{
    unsigned max = packet_socket_max_waiting(fc->socket);
    int err;

    if (!filter_tap_capture_has_peer(fc)) {
        fc->counters[CAPTURE_PEER_DROPS] += packet_socket_discard(fc->socket);
        filter_tap_capture_set_state(fc, CAPTURE_LINGER);
        return;
    }
    filter_tap_capture_read(fc, max, SIZE_MAX, &err);
    filter_tap_capture_set_state(fc, filter_tap_capture_full(fc) ?
                                     CAPTURE_DRAIN :
                                     err && err != -EAGAIN ?
                                     CAPTURE_OFF : CAPTURE_LINGER);
    filter_tap_capture_flush(fc, true);
    if (fc->state == CAPTURE_DRAIN) {
        qemu_bh_schedule(fc->bh);       /* there may be room again */
    }
}

static void filter_tap_capture_drain(FilterTapCapture *fc)
{
    int err;

    if (!filter_tap_capture_has_peer(fc)) {
        filter_tap_capture_set_state(fc, CAPTURE_OFF);
    } else if (!filter_tap_capture_full(fc)) {
        filter_tap_capture_read(fc, DRAIN_BATCH, SIZE_MAX, &err);
        if (err) {
            filter_tap_capture_set_state(fc, CAPTURE_OFF);
        }
        qemu_bh_schedule(fc->bh);
    }
}

/* Something has changed: make the transition, if any. */
static void filter_tap_capture_update(FilterTapCapture *fc)
{
    bool works = fc->active &&
                 (!fc->socket || filter_tap_capture_has_peer(fc));

    if (works) {
        filter_tap_capture_set_state(fc, fc->socket ? CAPTURE_COPY :
                                                      CAPTURE_TAKE);
    } else if (fc->state == CAPTURE_COPY) {
        filter_tap_capture_end_copy(fc);
    } else if (fc->state == CAPTURE_DRAIN) {
        filter_tap_capture_drain(fc);
    } else if (fc->state == CAPTURE_TAKE) {
        filter_tap_capture_set_state(fc, CAPTURE_OFF);
    }

    filter_tap_link_set_taking(fc->user, fc->state == CAPTURE_TAKE &&
                                         filter_tap_capture_can_stage(fc));
    if (fc->socket) {
        packet_poll_set(&fc->poll, fc->state == CAPTURE_COPY &&
                                   filter_tap_capture_can_stage(fc));
    }
}

static void filter_tap_capture_linger_ends(void *opaque)
{
    filter_tap_capture_set_state(opaque, CAPTURE_OFF);
}

static unsigned filter_tap_capture_poll(PacketPollEntry *entry,
                                        unsigned max_frames, size_t max_bytes,
                                        size_t *bytes, bool *more)
{
    FilterTapCapture *fc = container_of(entry, FilterTapCapture, poll);
    uint64_t before = fc->read;
    unsigned frames;
    int err;

    frames = filter_tap_capture_read(fc, max_frames, max_bytes, &err);
    *bytes = fc->read - before;
    *more = err != -EAGAIN;
    filter_tap_capture_flush(fc, false);
    filter_tap_capture_update(fc);
    return frames;
}

/* The peer may accept more, or there is more to write. */
static void filter_tap_capture_write(void *opaque)
{
    filter_tap_capture_flush(opaque, false);
    filter_tap_capture_update(opaque);
}

static void filter_tap_capture_event(void *opaque, QEMUChrEvent event)
{
    FilterTapCapture *fc = opaque;

    if (event == CHR_EVENT_OPENED) {
        filter_tap_capture_write(fc);
    } else if (event == CHR_EVENT_CLOSED) {
        frame_writer_rewind(fc->writer);
        if (fc->socket) {
            /* The next peer shall not get old frames. */
            fc->counters[CAPTURE_PEER_DROPS] +=
                frame_writer_discard(fc->writer);
        }
        filter_tap_capture_update(fc);
    }
}

/* What the peer sends is ignored, but only a read tells that it has gone. */
static int filter_tap_capture_can_read(void *opaque)
{
    return CHR_READ_BUF_LEN;
}

static void filter_tap_capture_read_none(void *opaque, const uint8_t *buf,
                                         int size)
{
}

/* Setup */

static bool filter_tap_capture_open(FilterTapCapture *fc, size_t memory, int fd,
                                    Error **errp)
{
    unsigned directions =
        (fc->nf->direction != NET_FILTER_DIRECTION_RX ?
         PACKET_SOCKET_OUTGOING : 0) |
        (fc->nf->direction != NET_FILTER_DIRECTION_TX ?
         PACKET_SOCKET_INCOMING : 0);

    fc->socket = packet_socket_new_capture(fc->user->link->ifname,
                                           fc->user->link->ifindex, fd,
                                           directions, MEMORY_SOCKET(memory),
                                           !!fc->config.sink, errp);
    if (!fc->socket) {
        return false;
    }
    if (!packet_poll_add(&fc->poll, packet_socket_fd(fc->socket),
                         packet_socket_max_waiting(fc->socket),
                         filter_tap_capture_poll, errp)) {
        packet_socket_abandon(fc->socket);
        return false;
    }
    fc->linger = timer_new_ms(QEMU_CLOCK_REALTIME,
                              filter_tap_capture_linger_ends, fc);
    return true;
}

FilterTapCapture *filter_tap_capture_new(NetFilterState *nf,
                                         FilterTapUser *user,
                                         const FilterTapConfig *config,
                                         bool takes, size_t memory, int fd,
                                         Error **errp)
{
    FilterTapCapture *fc = g_new0(FilterTapCapture, 1);

    fc->nf = nf;
    fc->user = user;
    fc->counters = user->counters;
    fc->config = *config;
    if (!takes && !filter_tap_capture_open(fc, memory, fd, errp)) {
        g_free(fc);
        return NULL;
    }
    fc->bh = qemu_bh_new(filter_tap_capture_write, fc);
    if (config->chr_out) {
        fc->writer = frame_writer_new(config->chr_out, config->vnet_hdr,
                                      takes ? MEMORY_WRITER_ALONE(memory) :
                                              MEMORY_WRITER(memory),
                                      filter_tap_capture_write, fc);
        qemu_chr_fe_set_handlers(config->chr_out, filter_tap_capture_can_read,
                                 filter_tap_capture_read_none,
                                 filter_tap_capture_event, NULL, fc, NULL,
                                 true);
    } else {
        fc->sink_frame = g_malloc(FRAME_STREAM_MAX_PAYLOAD);
    }
    return fc;
}

void filter_tap_capture_free(FilterTapCapture *fc)
{
    uint64_t lost;

    if (!fc) {
        return;
    }
    filter_tap_capture_update_drops(fc);
    lost = -fc->counters[CAPTURE_KERNEL_DROPS] -
           fc->counters[CAPTURE_PEER_DROPS];
    filter_tap_capture_set_active(fc, false);
    filter_tap_capture_flush(fc, true);
    while (fc->state == CAPTURE_DRAIN && filter_tap_capture_can_stage(fc)) {
        filter_tap_capture_update(fc);
        filter_tap_capture_flush(fc, true);
    }
    if (fc->config.chr_out) {
        qemu_chr_fe_set_handlers(fc->config.chr_out, NULL, NULL, NULL, NULL,
                                 NULL, NULL, true);
        lost += frame_writer_close(fc->writer);
    }
    if (fc->state == CAPTURE_DRAIN) {
        lost += packet_socket_discard(fc->socket);
    }
    /* Reading and writing may have shown more drops than there were before. */
    filter_tap_capture_update_drops(fc);
    lost += fc->counters[CAPTURE_KERNEL_DROPS] +
            fc->counters[CAPTURE_PEER_DROPS];
    if (lost) {
        warn_report("netdev '%s': %" PRIu64 " packets%s were lost when the "
                    "filter was deleted", fc->nf->netdev_id, lost,
                    fc->socket ? "" : " that the guest did not get");
    }
    qemu_bh_delete(fc->bh);
    g_free(fc->sink_frame);
    if (fc->socket) {
        timer_free(fc->linger);
        packet_poll_remove(&fc->poll);
        packet_socket_free(fc->socket);
    }
    g_free(fc);
}

/* For net/filter-tap.c */

void filter_tap_capture_set_active(FilterTapCapture *fc, bool active)
{
    fc->active = active;
    filter_tap_capture_update(fc);
}

const char *filter_tap_capture_source(const FilterTapCapture *fc)
{
    return capture_states[fc->state].source;
}

bool filter_tap_capture_pending(const FilterTapCapture *fc)
{
    return fc->state == CAPTURE_DRAIN ||
           (fc->writer && !frame_writer_empty(fc->writer));
}
