/*
 * Netfilters on a TAP with vhost: internal interfaces
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 *             filter-tap.c               policy and properties
 *              /        \
 *       -capture.c    -inject.c          frames to a stream, and from one
 *              \        /
 *           filter-tap-link.c            one TAP and its filters
 *
 * All functions are called with the BQL held, and in the main loop, except when
 * the VM's state changes.
 */

#ifndef NET_FILTER_TAP_INT_H
#define NET_FILTER_TAP_INT_H

#include <net/if.h>
#include "net/filter-tap.h"
#include "net/queue.h"
#include "system/runstate.h"

/* Link: one TAP, shared by its filters */

typedef struct FilterTapUser FilterTapUser;

typedef struct FilterTapLink {
    NetClientState *netdev;             /* the first queue */
    char ifname[IFNAMSIZ];
    unsigned ifindex;
    bool running;                       /* the VM */
    bool can_swap;                      /* headers, to the guest's order */
    bool held;                          /* the TAP is not read */
    QLIST_HEAD(, FilterTapUser) users;
    VMChangeStateEntry *vm_state;
    QLIST_ENTRY(FilterTapLink) next;
} FilterTapLink;

/* What a filter counts; net/filter-tap.c has a property for each. */
typedef enum FilterTapCounter {
    CAPTURE_PACKETS,
    CAPTURE_KERNEL_DROPS,
    CAPTURE_PEER_DROPS,
    CAPTURE_SKIPPED,
    INJECT_PACKETS,
    INJECT_SKIPPED,
    INJECT_INTERFACE_DROPS,
    INJECT_STREAM_ERRORS,
    FILTER_TAP_COUNTERS
} FilterTapCounter;

/*
 * A filter on the TAP.  filter-tap.c sets @wants_tx and @changed, capture and
 * inject write @counters, and the link owns the rest.
 */
struct FilterTapUser {
    uint64_t counters[FILTER_TAP_COUNTERS];
    bool wants_tx;                      /* packets toward the guest */
    void (*changed)(FilterTapUser *user);   /* the VM stopped, or runs again */
    FilterTapLink *link;
    bool taking;
    QLIST_ENTRY(FilterTapUser) next;
};

/*
 * Attach @user to the link of the TAP @netdev; create that if there is none.
 * Fails, and returns false, if the TAP's interface cannot be used.
 */
bool filter_tap_link_attach(FilterTapUser *user, NetClientState *netdev,
                            Error **errp);

/* Does nothing if @user is not attached. */
void filter_tap_link_detach(FilterTapUser *user);

/*
 * Set whether @user takes packets from the TAP now.  While the VM is stopped
 * the TAP is read only if a filter takes the packets.
 */
void filter_tap_link_set_taking(FilterTapUser *user, bool taking);

/*
 * Take the packets that QEMU has read from the TAP and that wait for the guest
 * in the NIC's queues.
 */
void filter_tap_link_take_queued(FilterTapUser *user, NetQueueTakeFunc *take,
                                 void *opaque);

/*
 * Returns the address of the NIC now, as its driver may have set it; all 0 if
 * it is not known.
 */
MACAddr filter_tap_link_nic_address(const FilterTapLink *link);

/*
 * Returns whether virtio-net headers in the TAP are in the guest's byte order,
 * and that is not the host's.
 */
bool filter_tap_link_swapped(FilterTapLink *link);

/* Capture: from the interface to a stream */

typedef struct FilterTapCapture FilterTapCapture;

/*
 * Returns a capture that does nothing yet, or NULL.  @user is attached.  Unless
 * it @takes packets from the TAP, it uses the packet socket @fd, or opens one
 * if that is -1; on failure @fd stays the caller's.  Frames that wait use
 * @memory bytes at most.
 */
FilterTapCapture *filter_tap_capture_new(NetFilterState *nf,
                                         FilterTapUser *user,
                                         const FilterTapConfig *config,
                                         bool takes, size_t memory, int fd,
                                         Error **errp);

/* Whether to capture now. */
void filter_tap_capture_set_active(FilterTapCapture *fc, bool active);

/* Returns whether the capture took a packet that QEMU read from the TAP. */
bool filter_tap_capture_receive(FilterTapCapture *fc, const struct iovec *iov,
                                int iovcnt);

/* Returns "none", "packet-socket", or "chain". */
const char *filter_tap_capture_source(const FilterTapCapture *fc);

/* Returns whether captured frames wait for the peer. */
bool filter_tap_capture_pending(const FilterTapCapture *fc);

/* Bring CAPTURE_KERNEL_DROPS up to date; drops count in COPY and DRAIN. */
void filter_tap_capture_update_drops(FilterTapCapture *fc);

/* Write what the peer accepts at once, and warn if frames are lost. */
void filter_tap_capture_free(FilterTapCapture *fc);

/* Inject: from a stream to the interface or the network */

typedef struct FilterTapInject FilterTapInject;

/*
 * Returns an injector that does nothing yet, or NULL.  @user is attached.  If
 * frames go to the guest, it uses the packet socket @fd, or opens one if that
 * is -1; on failure @fd stays the caller's.
 */
FilterTapInject *filter_tap_inject_new(NetFilterState *nf,
                                       FilterTapUser *user,
                                       const FilterTapConfig *config, int fd,
                                       Error **errp);

/*
 * Whether to inject now; otherwise frames wait.  Call it also when only the
 * VM's state, or the filter's status, has changed.
 */
void filter_tap_inject_set_active(FilterTapInject *fi, bool active);

/* Returns whether frames have been read that are not injected yet. */
bool filter_tap_inject_pending(const FilterTapInject *fi);

/* Frames that wait are dropped. */
void filter_tap_inject_free(FilterTapInject *fi);

#endif /* NET_FILTER_TAP_INT_H */
