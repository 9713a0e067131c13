/*
 * Netfilters that reach the packets of a TAP with vhost
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * With vhost the packets of a TAP bypass QEMU and the filters of its netdev.
 * A filter whose type derives from TYPE_FILTER_TAP reaches them all the same:
 * a packet socket gives it copies, and while the VM is stopped it can take the
 * packets themselves from the TAP.  docs/devel/filter-redirector-vhost.rst
 * tells how.
 *
 * All functions are called with the BQL held.
 */

#ifndef QEMU_NET_FILTER_TAP_H
#define QEMU_NET_FILTER_TAP_H

#include "chardev/char-fe.h"
#include "net/filter.h"
#include "qapi/qapi-types-common.h"

/* Abstract; has the properties of FilterTapProperties in qapi/qom.json. */
#define TYPE_FILTER_TAP "filter-tap"
OBJECT_DECLARE_SIMPLE_TYPE(FilterTap, FILTER_TAP)

typedef struct FilterTapEndpoints FilterTapEndpoints;

struct FilterTap {
    NetFilterState parent_obj;

    OnOffAuto packet_socket;
    OnOffAuto when_running;
    OnOffAuto when_stopped;
    uint64_t buffer_size;               /* bytes; 0: the default */
    char *packet_fd;                    /* NULL: open a socket */

    FilterTapEndpoints *endpoints;      /* NULL: the filter is on the chain */
};

/*
 * Gets a captured frame, with its checksum completed, and in one piece if it is
 * a GSO frame.  @time is when it came to the interface, by the host's clock.
 * Returns false if it could not be handled; it counts as dropped then.
 */
typedef bool FilterTapSink(void *opaque, const struct timespec *time,
                           const uint8_t *frame, size_t len);

/* What a filter wants */
typedef struct FilterTapConfig {
    CharFrontend *chr_in;       /* where frames to inject come from, or NULL */
    CharFrontend *chr_out;      /* where captured frames go, or NULL */
    bool vnet_hdr;              /* the streams tell the header's length */
    bool can_take;              /* if it works only while the VM is stopped */
    FilterTapSink *sink;        /* gets captured frames, or NULL */
    void *opaque;               /* for @sink */
} FilterTapConfig;

/*
 * Set up @ft->endpoints if the properties and the netdev ask for it.  From
 * then on only @ft uses the character devices.  Otherwise @ft->endpoints stays
 * NULL, and the filter works on the chain.  Returns false on failure, with
 * nothing left behind.
 */
bool filter_tap_setup(FilterTap *ft, const FilterTapConfig *config,
                      Error **errp);

/* Undo filter_tap_setup(), if it was called. */
void filter_tap_cleanup(FilterTap *ft);

/* Of the class; an override must call it if @endpoints is set. */
void filter_tap_status_changed(NetFilterState *nf, Error **errp);

/*
 * A packet comes along the chain to a filter with endpoints; see
 * FilterReceiveIOV.  Returns its size if the filter took it, or 0.
 */
ssize_t filter_tap_receive_iov(FilterTap *ft, unsigned flags,
                               const struct iovec *iov, int iovcnt);

/* Add the properties of filters that can inject. */
void filter_tap_add_inject_properties(ObjectClass *oc);

#endif /* QEMU_NET_FILTER_TAP_H */
