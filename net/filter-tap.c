/*
 * Netfilters that reach the packets of a TAP with vhost
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * This file decides which netdevs a filter reaches by itself and when it
 * works, and has the properties.  net/filter-tap-int.h shows the other parts.
 */

#include "qemu/osdep.h"
#include "filter-tap-int.h"
#include "monitor/monitor.h"
#include "net/frame-stream.h"
#include "net/vhost_net.h"
#include "qapi/error.h"
#include "qapi/visitor.h"
#include "qemu/ctype.h"
#include "qemu/cutils.h"
#include "qemu/units.h"

#define BUFFER_SIZE_DEFAULT (32 * MiB)
#define BUFFER_SIZE_MIN (1 * MiB)
#define BUFFER_SIZE_MAX (1 * GiB)

struct FilterTapEndpoints {
    FilterTap *ft;
    FilterTapUser user;
    FilterTapCapture *capture;  /* or NULL */
    FilterTapInject *inject;    /* or NULL */
};

static void filter_tap_update(FilterTapEndpoints *ep)
{
    const FilterTap *ft = ep->ft;
    bool active = ft->parent_obj.on &&
                  (ep->user.link->running ?
                   ft->when_running != ON_OFF_AUTO_OFF :
                   ft->when_stopped == ON_OFF_AUTO_ON);

    if (ep->capture) {
        filter_tap_capture_set_active(ep->capture, active);
    }
    if (ep->inject) {
        filter_tap_inject_set_active(ep->inject, active);
    }
}

static void filter_tap_link_changed(FilterTapUser *user)
{
    filter_tap_update(container_of(user, FilterTapEndpoints, user));
}

void filter_tap_status_changed(NetFilterState *nf, Error **errp)
{
    FilterTap *ft = FILTER_TAP(nf);

    if (ft->endpoints) {
        filter_tap_update(ft->endpoints);
    }
}

ssize_t filter_tap_receive_iov(FilterTap *ft, unsigned flags,
                               const struct iovec *iov, int iovcnt)
{
    FilterTapCapture *fc = ft->endpoints->capture;

    /* QEMU's announcements pass: they are raw, that is, have no header. */
    if (!fc || flags & QEMU_NET_PACKET_FLAG_RAW ||
        !filter_tap_capture_receive(fc, iov, iovcnt)) {
        return 0;
    }
    return iov_size(iov, iovcnt);
}

/* Setup */

static bool filter_tap_reaches(NetFilterState *nf, NetClientState *netdev)
{
    FilterTap *ft = FILTER_TAP(nf);

    return netdev->info->type == NET_CLIENT_DRIVER_TAP &&
           (ft->packet_socket == ON_OFF_AUTO_ON ||
            (ft->packet_socket == ON_OFF_AUTO_AUTO && get_vhost_net(netdev)));
}

/* Whether the filter takes packets, instead of copying them */
static bool filter_tap_takes(const FilterTap *ft, const FilterTapConfig *config)
{
    return config->can_take && config->chr_out &&
           ft->when_running == ON_OFF_AUTO_OFF;
}

/* Check the options of a filter that works on the chain. */
static bool filter_tap_check_chain(FilterTap *ft, Error **errp)
{
    const NetFilterState *nf = NETFILTER(ft);
    const char *property =
        ft->when_running != ON_OFF_AUTO_AUTO ? "enable_when_running" :
        ft->when_stopped != ON_OFF_AUTO_AUTO ? "enable_when_stopped" :
        ft->buffer_size ? "buffer-size" :
        ft->packet_fd ? "packet-fd" : NULL;

    if (ft->packet_socket == ON_OFF_AUTO_ON) {
        error_setg(errp, "'packet-socket=on' needs a netdev of type 'tap', "
                   "and netdev '%s' is of type '%s'", nf->netdev_id,
                   NetClientDriver_str(nf->netdev->info->type));
    } else if (property) {
        error_setg(errp, "'%s' needs 'packet-socket=on' on netdev '%s', which "
                   "must be a TAP", property, nf->netdev_id);
    } else {
        return true;
    }
    return false;
}

/* Check the options of a filter that reaches the TAP by itself. */
static bool filter_tap_check_tap(FilterTap *ft, const FilterTapConfig *config,
                                 Error **errp)
{
    NetFilterDirection direction = NETFILTER(ft)->direction;
    bool takes = filter_tap_takes(ft, config);
    bool copies = (config->chr_out || config->sink) && !takes;
    bool to_guest = config->chr_in && direction != NET_FILTER_DIRECTION_RX;
    bool to_network = config->chr_in && direction != NET_FILTER_DIRECTION_TX;

    if (ft->when_running == ON_OFF_AUTO_OFF &&
        ft->when_stopped != ON_OFF_AUTO_ON) {
        error_setg(errp, "'enable_when_running=off' needs "
                   "'enable_when_stopped=on'");
    } else if (copies && to_network) {
        error_setg(errp, "with both 'indev' and 'outdev' only 'queue=tx' is "
                   "possible: what goes to the network would be captured "
                   "again");
    } else if (takes && config->chr_in) {
        error_setg(errp, "with both 'indev' and 'outdev' "
                   "'enable_when_running=off' is not possible: what is "
                   "injected would be taken again");
    } else if (to_network && ft->when_running == ON_OFF_AUTO_OFF) {
        error_setg(errp, "'indev' with 'enable_when_running=off' needs "
                   "'queue=tx': nothing goes to the network while the VM is "
                   "stopped");
    } else if (ft->packet_fd && copies == to_guest) {
        error_setg(errp, copies ?
                   "'packet-fd': with both 'indev' and 'outdev' the filter "
                   "needs two packet sockets; use two filters" :
                   "'packet-fd': the filter needs no packet socket");
    } else {
        return true;
    }
    return false;
}

/*
 * Create the endpoints.  On failure, close what getfd or an fd set gave, but
 * not a number: a wrong one may be any file of QEMU's.
 */
static bool filter_tap_open(FilterTapEndpoints *ep,
                            const FilterTapConfig *config, Error **errp)
{
    ERRP_GUARD();
    FilterTap *ft = ep->ft;
    NetFilterState *nf = NETFILTER(ft);
    bool failed = false;
    int fd = -1;

    if (!filter_tap_check_tap(ft, config, errp) ||
        (config->chr_in && !frame_stream_check(config->chr_in, errp)) ||
        (config->chr_out && !frame_stream_check(config->chr_out, errp)) ||
        !filter_tap_link_attach(&ep->user, nf->netdev, errp)) {
        return false;
    }
    if (ft->packet_fd) {
        fd = strstart(ft->packet_fd, "/dev/fdset/", NULL) ?
             qemu_open(ft->packet_fd, O_RDWR, errp) :
             monitor_fd_param(monitor_cur(), ft->packet_fd, errp);
        failed = fd < 0;
    }
    if (!failed && (config->chr_out || config->sink)) {
        ep->capture = filter_tap_capture_new(nf, &ep->user, config,
                                             filter_tap_takes(ft, config),
                                             ft->buffer_size ?:
                                             BUFFER_SIZE_DEFAULT, fd, errp);
        failed = !ep->capture;
    }
    if (!failed && config->chr_in) {
        ep->inject = filter_tap_inject_new(nf, &ep->user, config, fd, errp);
        failed = !ep->inject;
    }
    if (failed && ft->packet_fd) {
        error_prepend(errp, "'packet-fd': ");
        if (fd >= 0 && !qemu_isdigit(*ft->packet_fd)) {
            qemu_close(fd);
        }
    }
    return !failed;
}

bool filter_tap_setup(FilterTap *ft, const FilterTapConfig *config,
                      Error **errp)
{
    ERRP_GUARD();
    NetFilterState *nf = NETFILTER(ft);
    FilterTapEndpoints *ep;

    if (!filter_tap_reaches(nf, nf->netdev)) {
        return filter_tap_check_chain(ft, errp);
    }
    ep = ft->endpoints = g_new0(FilterTapEndpoints, 1);
    ep->ft = ft;
    ep->user.wants_tx = nf->direction != NET_FILTER_DIRECTION_RX;
    ep->user.changed = filter_tap_link_changed;
    if (!filter_tap_open(ep, config, errp)) {
        error_prepend(errp, "netdev '%s': ", nf->netdev_id);
        filter_tap_cleanup(ft);
        return false;
    }
    filter_tap_update(ep);
    return true;
}

void filter_tap_cleanup(FilterTap *ft)
{
    FilterTapEndpoints *ep = g_steal_pointer(&ft->endpoints);

    if (ep) {
        filter_tap_inject_free(ep->inject);
        filter_tap_capture_free(ep->capture);
        filter_tap_link_detach(&ep->user);
        g_free(ep);
    }
}

/* Properties */

static int filter_tap_get_packet_socket(Object *obj, Error **errp)
{
    return FILTER_TAP(obj)->packet_socket;
}

static void filter_tap_set_packet_socket(Object *obj, int value, Error **errp)
{
    if (qemu_netfilter_settable(obj, "packet-socket", errp)) {
        FILTER_TAP(obj)->packet_socket = value;
    }
}

/* A filter on the chain works always: both properties are true there. */
static bool filter_tap_get_when_running(Object *obj, Error **errp)
{
    return FILTER_TAP(obj)->when_running != ON_OFF_AUTO_OFF;
}

static void filter_tap_set_when_running(Object *obj, bool value, Error **errp)
{
    if (qemu_netfilter_settable(obj, "enable_when_running", errp)) {
        FILTER_TAP(obj)->when_running = value ? ON_OFF_AUTO_ON :
                                                ON_OFF_AUTO_OFF;
    }
}

static bool filter_tap_get_when_stopped(Object *obj, Error **errp)
{
    FilterTap *ft = FILTER_TAP(obj);

    return !ft->endpoints || ft->when_stopped == ON_OFF_AUTO_ON;
}

static void filter_tap_set_when_stopped(Object *obj, bool value, Error **errp)
{
    if (qemu_netfilter_settable(obj, "enable_when_stopped", errp)) {
        FILTER_TAP(obj)->when_stopped = value ? ON_OFF_AUTO_ON :
                                                ON_OFF_AUTO_OFF;
    }
}

static void filter_tap_get_buffer_size(Object *obj, Visitor *v,
                                       const char *name, void *opaque,
                                       Error **errp)
{
    uint64_t value = FILTER_TAP(obj)->buffer_size ?: BUFFER_SIZE_DEFAULT;

    visit_type_size(v, name, &value, errp);
}

static void filter_tap_set_buffer_size(Object *obj, Visitor *v,
                                       const char *name, void *opaque,
                                       Error **errp)
{
    uint64_t value;

    if (!qemu_netfilter_settable(obj, name, errp) ||
        !visit_type_size(v, name, &value, errp)) {
        return;
    }
    if (value < BUFFER_SIZE_MIN || value > BUFFER_SIZE_MAX) {
        error_setg(errp, "'%s' must be from 1 MiB to 1 GiB", name);
        return;
    }
    FILTER_TAP(obj)->buffer_size = value;
}

static char *filter_tap_get_packet_fd(Object *obj, Error **errp)
{
    return g_strdup(FILTER_TAP(obj)->packet_fd ?: "");
}

static void filter_tap_set_packet_fd(Object *obj, const char *value,
                                     Error **errp)
{
    FilterTap *ft = FILTER_TAP(obj);

    if (qemu_netfilter_settable(obj, "packet-fd", errp)) {
        g_free(ft->packet_fd);
        ft->packet_fd = g_strdup(value);
    }
}

static char *filter_tap_get_interface(Object *obj, Error **errp)
{
    FilterTapEndpoints *ep = FILTER_TAP(obj)->endpoints;

    return g_strdup(ep ? ep->user.link->ifname : "");
}

static char *filter_tap_get_source(Object *obj, Error **errp)
{
    FilterTapEndpoints *ep = FILTER_TAP(obj)->endpoints;

    return g_strdup(!ep ? "chain" :
                    ep->capture ? filter_tap_capture_source(ep->capture) :
                                  "none");
}

static bool filter_tap_get_capture_pending(Object *obj, Error **errp)
{
    FilterTapEndpoints *ep = FILTER_TAP(obj)->endpoints;

    return ep && ep->capture && filter_tap_capture_pending(ep->capture);
}

static bool filter_tap_get_inject_pending(Object *obj, Error **errp)
{
    FilterTapEndpoints *ep = FILTER_TAP(obj)->endpoints;

    return ep && ep->inject && filter_tap_inject_pending(ep->inject);
}

static void filter_tap_get_counter(Object *obj, Visitor *v, const char *name,
                                   void *opaque, Error **errp)
{
    FilterTapEndpoints *ep = FILTER_TAP(obj)->endpoints;
    uint64_t value = 0;

    if (ep && ep->capture) {
        filter_tap_capture_update_drops(ep->capture);
    }
    if (ep) {
        value = ep->user.counters[GPOINTER_TO_UINT(opaque)];
    }
    visit_type_uint64(v, name, &value, errp);
}

static void filter_tap_add_counter(ObjectClass *oc, const char *name,
                                   FilterTapCounter counter,
                                   const char *description)
{
    object_class_property_add(oc, name, "uint64", filter_tap_get_counter,
                              NULL, NULL, GUINT_TO_POINTER(counter));
    object_class_property_set_description(oc, name, description);
}

static void filter_tap_class_init(ObjectClass *oc, const void *data)
{
    NetFilterClass *nfc = NETFILTER_CLASS(oc);

    nfc->reaches_netdev = filter_tap_reaches;
    nfc->status_changed = filter_tap_status_changed;

    object_class_property_add_enum(oc, "packet-socket", "OnOffAuto",
                                   &OnOffAuto_lookup,
                                   filter_tap_get_packet_socket,
                                   filter_tap_set_packet_socket);
    object_class_property_add_bool(oc, "enable_when_running",
                                   filter_tap_get_when_running,
                                   filter_tap_set_when_running);
    object_class_property_add_bool(oc, "enable_when_stopped",
                                   filter_tap_get_when_stopped,
                                   filter_tap_set_when_stopped);
    object_class_property_add(oc, "buffer-size", "size",
                              filter_tap_get_buffer_size,
                              filter_tap_set_buffer_size, NULL, NULL);
    object_class_property_add_str(oc, "packet-fd", filter_tap_get_packet_fd,
                                  filter_tap_set_packet_fd);

    object_class_property_add_str(oc, "interface", filter_tap_get_interface,
                                  NULL);
    object_class_property_set_description(oc, "interface",
        "The TAP's interface; empty if the filter is on the chain");
    object_class_property_add_str(oc, "source", filter_tap_get_source, NULL);
    object_class_property_set_description(oc, "source",
        "Where captured packets come from now: packet-socket, chain or none");
    object_class_property_add_bool(oc, "capture-pending",
                                   filter_tap_get_capture_pending, NULL);
    object_class_property_set_description(oc, "capture-pending",
        "Whether captured packets wait for the peer");

    filter_tap_add_counter(oc, "capture-packets", CAPTURE_PACKETS,
        "Packets that were captured");
    filter_tap_add_counter(oc, "capture-kernel-drops", CAPTURE_KERNEL_DROPS,
        "Packets that the kernel did not copy because the packet socket was "
        "full, or stuck at a UFO frame");
    filter_tap_add_counter(oc, "capture-peer-drops", CAPTURE_PEER_DROPS,
        "Packets that were discarded because the peer went away, or because "
        "they could not be written");
    filter_tap_add_counter(oc, "capture-skipped", CAPTURE_SKIPPED,
        "Packets that are too long, or that the header cannot express; while "
        "the filter takes, also those from the NIC's own address");
}

void filter_tap_add_inject_properties(ObjectClass *oc)
{
    object_class_property_add_bool(oc, "inject-pending",
                                   filter_tap_get_inject_pending, NULL);
    object_class_property_set_description(oc, "inject-pending",
        "Whether frames have been read that are not injected yet");
    filter_tap_add_counter(oc, "inject-packets", INJECT_PACKETS,
        "Frames that were injected");
    filter_tap_add_counter(oc, "inject-skipped", INJECT_SKIPPED,
        "Frames that are invalid, too long, or of a kind that cannot be "
        "injected");
    filter_tap_add_counter(oc, "inject-interface-drops",
                           INJECT_INTERFACE_DROPS,
        "Frames that were discarded because the interface was gone; toward "
        "the network also because it was down");
    filter_tap_add_counter(oc, "inject-stream-errors", INJECT_STREAM_ERRORS,
        "Connections that were closed because of an invalid frame length");
}

static void filter_tap_finalize(Object *obj)
{
    g_free(FILTER_TAP(obj)->packet_fd);
}

static const TypeInfo filter_tap_types[] = {
    {
        .name = TYPE_FILTER_TAP,
        .parent = TYPE_NETFILTER,
        .abstract = true,
        .class_init = filter_tap_class_init,
        .instance_size = sizeof(FilterTap),
        .instance_finalize = filter_tap_finalize,
    },
};

DEFINE_TYPES(filter_tap_types)
