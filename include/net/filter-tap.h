/*
 * Packets of a TAP with vhost, for netfilters
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * With vhost the packets of a TAP pass QEMU by, and so does the chain of its
 * netfilters.  A filter that embeds a FilterTap gets at them all the same: a
 * copy through a packet socket while the VM runs, and the packets themselves
 * through the TAP while it is stopped.  net/filter-tap.c tells how.
 *
 * All functions are called with the BQL held.
 */

#ifndef QEMU_NET_FILTER_TAP_H
#define QEMU_NET_FILTER_TAP_H

#include "chardev/char-fe.h"
#include "net/filter.h"
#include "qapi/qapi-types-common.h"

typedef struct FilterTapEndpoints FilterTapEndpoints;

/*
 * To be embedded in a filter's state.  The properties are set through QOM, and
 * @copies by the filter's instance_init; they do not change after
 * filter_tap_setup().
 */
typedef struct FilterTap {
    OnOffAuto packet_socket;
    OnOffAuto when_running;
    OnOffAuto when_stopped;
    uint64_t buffer_size;               /* bytes; 0: the default */
    char *packet_fd;                    /* NULL: open a socket */
    char *inject_packet_fd;
    bool copies;                        /* the filter never takes a packet */
    FilterTapEndpoints *endpoints;      /* NULL: the chain does it all */
} FilterTap;

/**
 * filter_tap_add_properties:
 * @oc: the filter's class
 * @offset: where in the filter's state its FilterTap is
 * @injects: whether the filter can inject, too
 *
 * Add the properties that configure the FilterTap, and those that show what
 * it does.
 */
void filter_tap_add_properties(ObjectClass *oc, ptrdiff_t offset,
                               bool injects);

/**
 * filter_tap_reaches:
 * @ft: the filter's, with its properties set
 * @netdev: the first queue of a network backend
 *
 * Returns: whether the filter would reach the packets of @netdev although
 * they may not pass through QEMU, or pass through several queues.
 */
bool filter_tap_reaches(const FilterTap *ft, NetClientState *netdev);

/**
 * filter_tap_setup:
 * @ft: the filter's, with its properties set
 * @nf: the filter, whose netdev is known
 * @chr_in: where packets to inject come from, or NULL
 * @chr_out: where captured packets go, or NULL
 * @vnet_hdr: whether the streams tell the length of the virtio-net header
 * @errp: set on failure
 *
 * Set up @ft->endpoints if the properties and the netdev ask for it; from
 * then on @chr_in and @chr_out are used by @ft alone.  Otherwise the filter
 * works on the chain and @ft->endpoints stays NULL.
 *
 * Returns: false on failure, with nothing left behind.
 */
bool filter_tap_setup(FilterTap *ft, NetFilterState *nf, CharFrontend *chr_in,
                      CharFrontend *chr_out, bool vnet_hdr, Error **errp);

/**
 * FilterTapSink:
 * @opaque: as given to filter_tap_setup_sink()
 * @time: when it came to the interface, by the host's clock
 * @frame: the frame as it would be sent, with its checksum completed, but in
 *         one piece if it is yet to be segmented
 * @len: its length in bytes
 *
 * Deals with a captured packet.
 *
 * Returns: whether it could; if not, the packet counts as dropped.
 */
typedef bool FilterTapSink(void *opaque, const struct timespec *time,
                           const uint8_t *frame, size_t len);

/**
 * filter_tap_setup_sink:
 * @ft: the filter's, with its properties set, and @copies
 * @nf: the filter, whose netdev is known
 * @sink: called in the main loop for each captured packet
 * @opaque: for @sink
 * @errp: set on failure
 *
 * The same as filter_tap_setup(), for a filter that handles what is captured
 * by itself.
 *
 * Returns: false on failure, with nothing left behind.
 */
bool filter_tap_setup_sink(FilterTap *ft, NetFilterState *nf,
                           FilterTapSink *sink, void *opaque, Error **errp);

/**
 * filter_tap_cleanup:
 * @ft: the filter's, whether it was set up or not
 *
 * Give everything back.  The character devices are the caller's again.
 */
void filter_tap_cleanup(FilterTap *ft);

/**
 * filter_tap_status_changed:
 * @ft: the filter's, set up
 *
 * The filter went on or off.
 */
void filter_tap_status_changed(FilterTap *ft);

/**
 * filter_tap_pauses:
 * @netdev: the first queue of a network backend
 *
 * Returns: whether @netdev is not to be read, since its packets shall wait in
 * the TAP while the VM is stopped.
 */
bool filter_tap_pauses(NetClientState *netdev);

/**
 * filter_tap_receive_iov:
 * @ft: the filter's, set up
 * @sender: as for FilterReceiveIOV
 * @iov: as for FilterReceiveIOV
 * @iovcnt: as for FilterReceiveIOV
 *
 * A packet comes along the chain.
 *
 * Returns: its size if it was taken, or 0 if it shall go on.
 */
ssize_t filter_tap_receive_iov(FilterTap *ft, NetClientState *sender,
                               const struct iovec *iov, int iovcnt);

#endif /* QEMU_NET_FILTER_TAP_H */
