/*
 * Netfilters on a TAP with vhost: inject
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Frames go to one or both of two places:
 *
 *   queue=tx   to the guest: a packet socket puts them into the TAP's queue,
 *              from where vhost or QEMU reads them
 *   queue=rx   to the network: along the chain, which ends in the TAP's fd
 *
 * Frames wait while the filter does not work, and those for the network also
 * while the VM is stopped, since net.c would drop them.  Frames for the guest
 * also wait while the TAP's queue is full, or its interface is down; nothing
 * tells when that ends, so a timer tries again.
 *
 * The packet socket bypasses the queueing discipline.  So no packet socket
 * captures what it sends, and the kernel does not segment: a GSO frame that
 * the TAP cannot take whole is segmented here.  QEMU knows which ones it can,
 * from the offloads that the guest's driver has negotiated.  If somebody else
 * has switched one off, the kernel returns the same error as for a full TAP;
 * so then the segments are tried.
 */

#include "qemu/osdep.h"
#include <linux/if_ether.h>
#include "filter-tap-int.h"
#include "net/frame-offload.h"
#include "net/frame-stream.h"
#include "net/packet-socket.h"
#include "net/tap.h"
#include "qemu/error-report.h"
#include "qemu/timer.h"
#include "qemu/units.h"
#include "trace.h"

/* The buffer for segments, in bytes */
#define SEGMENTS_SIZE (128 * KiB)

/*
 * Segments with less payload are refused: nobody uses them, and one frame would
 * cost the kernel hundreds of ms.
 */
#define MIN_GSO_SIZE 48

/* How long to wait before a full TAP is tried again. */
#define RETRY_MIN_MS 1
#define RETRY_MAX_MS 64

/* Longer GSO frames are segmented whatever the TAP can do. */
#define GSO_MAX_LEN 65536

/* How long to try a GSO frame that cannot be segmented here. */
#define WHOLE_MAX_MS 1000

struct FilterTapInject {
    NetFilterState *nf;
    FilterTapUser *user;
    FilterTapConfig config;
    bool active;
    FrameReader *reader;
    PacketSocket *socket;       /* NULL if nothing goes to the guest */
    QEMUTimer *retry;
    unsigned waited_ms;         /* by the next frame, for room in the TAP */
    unsigned segments_sent;     /* how many of the next frame's */
    uint8_t *segments;          /* allocated when there are some */
    uint64_t *counters;         /* of the user */
};

static size_t filter_tap_inject_hdr_len(const FilterTapInject *fi,
                                        const StreamFrame *frame)
{
    return fi->config.vnet_hdr ? frame->vnet_hdr_len :
                                 fi->nf->netdev->vnet_hdr_len;
}

/* The frame is not sent. */
static void filter_tap_inject_failed(FilterTapInject *fi, int err)
{
    trace_filter_tap_inject_error(fi->user->link->ifname, err);
    if (err == EINVAL || err == EMSGSIZE || err == EOPNOTSUPP) {
        fi->counters[INJECT_SKIPPED]++;
    } else {
        fi->counters[INJECT_INTERFACE_DROPS]++;
    }
}

/* To the guest */

/*
 * Send the segments of a GSO frame.  Returns as packet_socket_send() does for
 * one frame; -EOPNOTSUPP if the frame is of an unknown kind.
 */
static int filter_tap_inject_segments(FilterTapInject *fi,
                                      const PacketSocketFrame *frame)
{
    PacketSocketFrame batch[PACKET_SOCKET_BATCH];
    FrameSegments fs;

    if (!frame_segments_init(&fs, &frame->hdr, frame->data, frame->len)) {
        return -EOPNOTSUPP;
    }
    fi->segments = fi->segments ?: g_malloc(SEGMENTS_SIZE);
    while (fi->segments_sent < fs.count) {
        uint8_t *buf = fi->segments;
        size_t n = MIN(MIN(fs.count - fi->segments_sent, PACKET_SOCKET_BATCH),
                       SEGMENTS_SIZE / (fs.at.headers + fs.size));
        int ret;

        for (size_t i = 0; i < n; i++) {
            batch[i].data = buf;
            batch[i].len = frame_segments_get(&fs, fi->segments_sent + i, buf,
                                              &batch[i].hdr);
            buf += batch[i].len;
        }
        ret = packet_socket_send(fi->socket, batch, n);
        if (ret < 0) {
            return ret;
        }
        fi->segments_sent += ret;
    }
    return 1;
}

/* Whether the TAP takes it, by what the guest's driver has negotiated */
static bool filter_tap_inject_goes_whole(const FilterTapInject *fi,
                                         const PacketSocketFrame *frame)
{
    const NetOffloads *ol = tap_get_offload(fi->nf->netdev);
    bool whole = false;

    switch (frame->hdr.gso_type & ~VIRTIO_NET_HDR_GSO_ECN) {
    case VIRTIO_NET_HDR_GSO_NONE:
        return true;
    case VIRTIO_NET_HDR_GSO_TCPV4:
        whole = ol->tso4;
        break;
    case VIRTIO_NET_HDR_GSO_TCPV6:
        whole = ol->tso6;
        break;
    case VIRTIO_NET_HDR_GSO_UDP_L4:
        whole = ol->uso4 && ol->uso6;
        break;
    }
    if (frame->hdr.gso_type & VIRTIO_NET_HDR_GSO_ECN) {
        whole &= ol->ecn;
    }
    return whole && ol->csum && frame->len < GSO_MAX_LEN;
}

/* Returns as packet_socket_send() does, or -EOPNOTSUPP: it cannot be sent. */
static int filter_tap_inject_send(FilterTapInject *fi,
                                  const PacketSocketFrame *frames, size_t n)
{
    size_t whole = 0;
    int ret;

    /* A frame of which some segments were sent goes on in segments. */
    while (!fi->segments_sent && whole < n &&
           filter_tap_inject_goes_whole(fi, &frames[whole])) {
        whole++;
    }
    if (whole) {
        ret = packet_socket_send(fi->socket, frames, whole);
        if (ret != -EAGAIN ||
            frames->hdr.gso_type == VIRTIO_NET_HDR_GSO_NONE) {
            return ret;
        }
    }
    ret = filter_tap_inject_segments(fi, frames);
    return ret == -EOPNOTSUPP && whole && fi->waited_ms < WHOLE_MAX_MS ?
           -EAGAIN : ret;
}

/* Returns how many frames are done with; 0: they have to wait. */
static size_t filter_tap_inject_into_tap(FilterTapInject *fi,
                                         const PacketSocketFrame *frames,
                                         size_t n)
{
    int ret = filter_tap_inject_send(fi, frames, n);

    if (ret == -EAGAIN) {
        int wait = MIN(MAX(fi->waited_ms, RETRY_MIN_MS), RETRY_MAX_MS);

        trace_filter_tap_inject_wait(fi->user->link->ifname, wait);
        timer_mod(fi->retry, qemu_clock_get_ms(QEMU_CLOCK_REALTIME) + wait);
        fi->waited_ms += wait;
        return 0;
    }
    if (ret < 0) {
        filter_tap_inject_failed(fi, -ret);
        return 1;
    }
    fi->counters[INJECT_PACKETS] += ret;
    return ret;
}

/* To the network */

/*
 * The chain wants the header in the size that the guest negotiated.  With
 * queue=all the frame was counted when it went to the guest.
 */
static void filter_tap_inject_along_chain(FilterTapInject *fi,
                                          const StreamFrame *frame, bool swap)
{
    NetFilterState *nf = fi->nf;
    size_t hdr_len = filter_tap_inject_hdr_len(fi, frame);
    uint8_t header[FRAME_OFFLOAD_MAX_HEADER];
    struct virtio_net_hdr hdr;
    struct iovec iov[] = {
        { .iov_base = header, .iov_len = nf->netdev->vnet_hdr_len },
        { .iov_base = frame->payload + hdr_len,
          .iov_len = frame->size - hdr_len },
    };
    int err = 0;

    if (iov[0].iov_len == hdr_len) {
        memcpy(header, frame->payload, hdr_len);
    } else if (!frame_offload_from_guest(&hdr, frame->payload, hdr_len,
                                         swap) ||
               !frame_offload_to_guest(&hdr, iov[1].iov_base, iov[1].iov_len,
                                       header, iov[0].iov_len, swap)) {
        err = EINVAL;
    }
    errno = 0;
    if (!err && (!nf->netdev->peer || nf->netdev->link_down)) {
        err = ENETDOWN;
    } else if (!err && qemu_netfilter_pass_to_next(nf->netdev->peer, 0, iov,
                                                   ARRAY_SIZE(iov), nf) < 0) {
        /* The TAP refuses a bad header with EINVAL. */
        err = errno == EINVAL ? EINVAL : ENETDOWN;
    }
    if (fi->socket) {
        return;
    } else if (err) {
        filter_tap_inject_failed(fi, err);
    } else {
        fi->counters[INJECT_PACKETS]++;
    }
}

/* From the stream */

/* Convert a frame for the packet socket.  Returns false if it is invalid. */
static bool filter_tap_inject_parse(const FilterTapInject *fi,
                                    const StreamFrame *frame, bool swap,
                                    PacketSocketFrame *out)
{
    size_t hdr_len = filter_tap_inject_hdr_len(fi, frame);

    if (frame->size < hdr_len + ETH_HLEN ||
        !frame_offload_from_guest(&out->hdr, frame->payload, hdr_len, swap) ||
        (out->hdr.gso_type != VIRTIO_NET_HDR_GSO_NONE &&
         out->hdr.gso_size < MIN_GSO_SIZE)) {
        return false;
    }
    out->data = frame->payload + hdr_len;
    out->len = frame->size - hdr_len;
    return true;
}

/*
 * Inject the first one of @frames, and those that can go with it in one system
 * call.  Returns how many are done with; 0: they have to wait.
 */
static size_t filter_tap_inject_some(FilterTapInject *fi,
                                     const StreamFrame *frames, size_t n,
                                     bool swap)
{
    PacketSocketFrame batch[PACKET_SOCKET_BATCH];
    bool to_network = fi->nf->direction != NET_FILTER_DIRECTION_TX;
    size_t done = 1;

    if (!filter_tap_inject_parse(fi, frames, swap, batch)) {
        filter_tap_inject_failed(fi, EINVAL);
        return 1;
    }
    if (to_network && !runstate_is_running()) {
        if (fi->user->link->running) {
            /* The guest sleeps (S3), and nothing tells when it wakes up. */
            timer_mod(fi->retry,
                      qemu_clock_get_ms(QEMU_CLOCK_REALTIME) + RETRY_MAX_MS);
        }
        return 0;
    }
    if (fi->socket) {
        n = to_network ? 1 : MIN(n, PACKET_SOCKET_BATCH);
        while (done < n && filter_tap_inject_parse(fi, &frames[done], swap,
                                                   &batch[done])) {
            done++;
        }
        done = filter_tap_inject_into_tap(fi, batch, done);
    }
    if (done && to_network) {
        filter_tap_inject_along_chain(fi, frames, swap);
    }
    return done;
}

static size_t filter_tap_inject_frames(void *opaque, const StreamFrame *frames,
                                       size_t n)
{
    FilterTapInject *fi = opaque;
    bool swap = filter_tap_link_swapped(fi->user->link);
    size_t done = 0, some;

    while (done < n && fi->active) {
        some = filter_tap_inject_some(fi, frames + done, n - done, swap);
        if (!some) {
            break;
        }
        done += some;
        fi->waited_ms = 0;
        fi->segments_sent = 0;
    }
    return done;
}

static void filter_tap_inject_retry(void *opaque)
{
    FilterTapInject *fi = opaque;

    frame_reader_resume(fi->reader);
}

/*
 * Read ahead while frames have to wait: when the peer goes, as the source does
 * after a migration, the character device discards what has not been read.
 */
static int filter_tap_inject_can_read(void *opaque)
{
    FilterTapInject *fi = opaque;

    return fi->nf->on ? frame_reader_room(fi->reader) : 0;
}

static void filter_tap_inject_read(void *opaque, const uint8_t *buf, int size)
{
    FilterTapInject *fi = opaque;

    frame_reader_push(fi->reader, buf, size);
}

static void filter_tap_inject_event(void *opaque, QEMUChrEvent event)
{
    FilterTapInject *fi = opaque;

    if (event == CHR_EVENT_OPENED || event == CHR_EVENT_CLOSED) {
        frame_reader_reset(fi->reader);
    }
}

/* Setup */

FilterTapInject *filter_tap_inject_new(NetFilterState *nf,
                                       FilterTapUser *user,
                                       const FilterTapConfig *config, int fd,
                                       Error **errp)
{
    FilterTapInject *fi = g_new0(FilterTapInject, 1);

    fi->nf = nf;
    fi->user = user;
    fi->counters = user->counters;
    fi->config = *config;
    if (nf->direction != NET_FILTER_DIRECTION_RX) {
        fi->socket = packet_socket_new_inject(user->link->ifname,
                                              user->link->ifindex, fd, errp);
        if (!fi->socket) {
            g_free(fi);
            return NULL;
        }
    }
    fi->reader = frame_reader_new(fi->config.chr_in, fi->config.vnet_hdr,
                                  &fi->counters[INJECT_STREAM_ERRORS],
                                  filter_tap_inject_frames, fi);
    fi->retry = timer_new_ms(QEMU_CLOCK_REALTIME, filter_tap_inject_retry, fi);
    qemu_chr_fe_set_handlers(fi->config.chr_in, filter_tap_inject_can_read,
                             filter_tap_inject_read, filter_tap_inject_event,
                             NULL, fi, NULL, true);
    return fi;
}

void filter_tap_inject_free(FilterTapInject *fi)
{
    if (!fi) {
        return;
    }
    qemu_chr_fe_set_handlers(fi->config.chr_in, NULL, NULL, NULL, NULL, NULL,
                             NULL, true);
    timer_free(fi->retry);
    if (filter_tap_inject_pending(fi)) {
        warn_report("netdev '%s': frames that waited were lost when the filter "
                    "was deleted", fi->nf->netdev_id);
    }
    frame_reader_close(fi->reader);
    packet_socket_free(fi->socket);
    g_free(fi->segments);
    g_free(fi);
}

/* For net/filter-tap.c */

void filter_tap_inject_set_active(FilterTapInject *fi, bool active)
{
    fi->active = active;
    if (active) {
        frame_reader_resume(fi->reader);
    }
    qemu_chr_fe_accept_input(fi->config.chr_in);
}

bool filter_tap_inject_pending(const FilterTapInject *fi)
{
    return !frame_reader_empty(fi->reader);
}
