/*
 * Netfilters on a TAP with vhost: the TAP
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * All filters on one TAP share a FilterTapLink.  It decides whether QEMU reads
 * the TAP while the VM is stopped.  Left to itself QEMU reads one packet from
 * each queue, which the NIC cannot deliver, and which is lost if the VM stops
 * once more.  So the link holds the TAP: the packets wait in its queue for the
 * guest, unless a filter takes them.
 *
 *   VM       a filter wants tx    a filter takes    the TAP is
 *   runs     any                  any               read by vhost or QEMU
 *   stopped  no                   no                read by QEMU
 *   stopped  yes                  no                held
 *   stopped  yes                  yes               read for that filter
 */

#include "qemu/osdep.h"
#include <sys/ioctl.h>
#include <linux/ethtool.h>
#include <linux/if_tun.h>
#include <linux/sockios.h>
#include "filter-tap-int.h"
#include "net/tap.h"
#include "net/util.h"
#include "qapi/error.h"
#include "qapi/qapi-types-net.h"
#include "qemu/cutils.h"
#include "trace.h"

/*
 * At a stop, handlers run from high to low priority.  virtio-net's (at least 2,
 * its depth in the tree of devices) stops vhost first.  Then filters take what
 * waits in the NIC's queues.  Last comes net.c's (0), which drops those
 * packets.  When the VM runs again, the order is reversed: the link gives the
 * TAP back before vhost starts.
 */
#define FILTER_TAP_VM_STATE_PRIORITY 1

static QLIST_HEAD(, FilterTapLink) filter_tap_links =
    QLIST_HEAD_INITIALIZER(filter_tap_links);

/* Whether @fd's interface is in the network namespace of QEMU. */
static bool filter_tap_same_netns(int fd)
{
    struct stat tap, own;
    int ns = ioctl(fd, TUNGETDEVNETNS);
    bool same;

    if (ns < 0) {
        return true;    /* no CAP_NET_ADMIN: rely on the MAC address */
    }
    same = fstat(ns, &tap) < 0 || stat("/proc/self/ns/net", &own) < 0 ||
           (tap.st_dev == own.st_dev && tap.st_ino == own.st_ino);
    close(ns);
    return same;
}

/* Whether the interface named @ifname is the one that @tap_fd belongs to. */
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
 * The TAP's fd tells the interface's name in the TAP's network namespace.  In
 * QEMU's namespace that may be the name of another interface.
 */
static bool filter_tap_link_resolve(FilterTapLink *link, Error **errp)
{
    int fd = tap_get_fd(link->netdev);
    struct ifreq ifr = { };
    bool good = false;
    unsigned ifindex;
    int socket_fd;

    if (ioctl(fd, TUNGETIFF, &ifr) < 0) {
        error_setg_errno(errp, errno, "could not get the TAP's interface");
        return false;
    }
    socket_fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (socket_fd < 0) {
        error_setg_errno(errp, errno, "could not look up interface '%s'",
                         ifr.ifr_name);
        return false;
    }
    ifindex = if_nametoindex(ifr.ifr_name);
    if (!ifindex) {
        error_setg_errno(errp, errno, "could not find interface '%s' in "
                         "QEMU's network namespace", ifr.ifr_name);
    } else if (!filter_tap_same_interface(fd, ifr.ifr_name, socket_fd)) {
        error_setg(errp, "interface '%s' in QEMU's network namespace is not "
                   "the TAP; run QEMU in the TAP's namespace", ifr.ifr_name);
    } else if (!filter_tap_is_tun_driver(socket_fd, ifr.ifr_name)) {
        error_setg(errp, "interface '%s' is not a TAP (a macvtap cannot be "
                   "used)", ifr.ifr_name);
    } else {
        link->ifindex = ifindex;
        pstrcpy(link->ifname, sizeof(link->ifname), ifr.ifr_name);
        good = true;
    }
    close(socket_fd);
    return good;
}

/*
 * The ioctl fails if the kernel cannot swap headers.  Then virtio-net swaps
 * them, without vhost, and none in the TAP are swapped.  It is not tried again,
 * as each try waits for a lock of the kernel's (RTNL).
 */
bool filter_tap_link_swapped(FilterTapLink *link)
{
    int value = 0;

    if (link->can_swap) {
        link->can_swap = ioctl(tap_get_fd(link->netdev),
                               HOST_BIG_ENDIAN ? TUNGETVNETLE : TUNGETVNETBE,
                               &value) == 0;
    }
    return value;
}

/* Put the TAP's queues to @ncs, of MAX_QUEUE_NUM.  Returns their number. */
static int filter_tap_link_queues(FilterTapLink *link, NetClientState **ncs)
{
    return qemu_find_net_clients_except(link->netdev->name, ncs,
                                        NET_CLIENT_DRIVER_NIC, MAX_QUEUE_NUM);
}

static void filter_tap_link_update_hold(FilterTapLink *link)
{
    QEMU_UNINITIALIZED NetClientState *ncs[MAX_QUEUE_NUM];
    FilterTapUser *user;
    bool wanted = false, taken = false;
    int queues;

    QLIST_FOREACH(user, &link->users, next) {
        wanted |= user->wants_tx;
        taken |= user->wants_tx && user->taking;
    }
    if (link->held == (!link->running && wanted && !taken)) {
        return;
    }
    link->held = !link->held;
    trace_filter_tap_hold(link->ifname, link->held);
    queues = filter_tap_link_queues(link, ncs);
    for (int i = 0; i < queues; i++) {
        tap_hold(ncs[i], link->held);
    }
}

void filter_tap_link_set_taking(FilterTapUser *user, bool taking)
{
    user->taking = taking;
    filter_tap_link_update_hold(user->link);
}

void filter_tap_link_take_queued(FilterTapUser *user, NetQueueTakeFunc *take,
                                 void *opaque)
{
    QEMU_UNINITIALIZED NetClientState *ncs[MAX_QUEUE_NUM];
    int queues = filter_tap_link_queues(user->link, ncs);

    for (int i = 0; i < queues; i++) {
        if (ncs[i]->peer) {
            qemu_net_queue_take(ncs[i]->peer->incoming_queue, ncs[i], take,
                                opaque);
        }
    }
}

/* The query also enables an event, which only a QMP command is to do. */
MACAddr filter_tap_link_nic_address(const FilterTapLink *link)
{
    NetClientState *nic = link->netdev->peer;
    MACAddr address = { };

    if (nic && nic->info->query_rx_filter) {
        bool notify = nic->rxfilter_notify_enabled;
        g_autoptr(RxFilterInfo) info = nic->info->query_rx_filter(nic);

        nic->rxfilter_notify_enabled = notify;
        net_parse_macaddr(address.a, info->main_mac);
    }
    return address;
}

static void filter_tap_link_vm_state(void *opaque, bool running,
                                     RunState state)
{
    FilterTapLink *link = opaque;
    FilterTapUser *user;

    link->running = running;
    QLIST_FOREACH(user, &link->users, next) {
        user->changed(user);
    }
    filter_tap_link_update_hold(link);
}

static FilterTapLink *filter_tap_link_new(NetClientState *netdev)
{
    FilterTapLink *link = g_new0(FilterTapLink, 1);

    link->netdev = netdev;
    link->running = runstate_is_live(runstate_get());
    link->can_swap = true;
    link->vm_state =
        qemu_add_vm_change_state_handler_prio(filter_tap_link_vm_state, link,
                                              FILTER_TAP_VM_STATE_PRIORITY);
    QLIST_INSERT_HEAD(&filter_tap_links, link, next);
    return link;
}

bool filter_tap_link_attach(FilterTapUser *user, NetClientState *netdev,
                            Error **errp)
{
    FilterTapLink *link;

    QLIST_FOREACH(link, &filter_tap_links, next) {
        if (link->netdev == netdev) {
            break;
        }
    }
    user->link = link ?: filter_tap_link_new(netdev);
    QLIST_INSERT_HEAD(&user->link->users, user, next);
    /* The interface may have been renamed or moved since the last time. */
    if (!filter_tap_link_resolve(user->link, errp)) {
        filter_tap_link_detach(user);
        return false;
    }
    filter_tap_link_update_hold(user->link);
    return true;
}

void filter_tap_link_detach(FilterTapUser *user)
{
    FilterTapLink *link = g_steal_pointer(&user->link);

    if (link) {
        QLIST_REMOVE(user, next);
        filter_tap_link_update_hold(link);
        if (QLIST_EMPTY(&link->users)) {
            QLIST_REMOVE(link, next);
            qemu_del_vm_change_state_handler(link->vm_state);
            g_free(link);
        }
    }
}
