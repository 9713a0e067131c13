/*
 * Packet sockets that somebody else opened
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A QEMU without CAP_NET_RAW gets its packet sockets from outside.  This file
 * checks whether one of them can be used.  It needs no privilege, and changes
 * nothing of the socket.
 */

#include "qemu/osdep.h"
#include <sys/socket.h>
#include <linux/if_packet.h>
#include "qapi/error.h"
#include "packet-int.h"

int packet_get_option(int fd, int level, int option)
{
    int value = 0;
    socklen_t size = sizeof(value);

    return getsockopt(fd, level, option, &value, &size) < 0 ? 0 : value;
}

/* Returns 0 if the kernel does not tell (before Linux 5.14). */
static uint64_t packet_passed_netns(int fd)
{
    uint64_t cookie = 0;
    socklen_t size = sizeof(cookie);

    /* SIOCGSKNS would need a privilege. */
    getsockopt(fd, SOL_SOCKET, SO_NETNS_COOKIE, &cookie, &size);
    return cookie;
}

/* An interface's number counts in its network namespace. */
static bool packet_passed_same_netns(int fd)
{
    int any = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    uint64_t own = packet_passed_netns(any);

    close(any);
    return own && own == packet_passed_netns(fd);
}

/* Whether the socket is bound to this interface, or to none. */
static bool packet_passed_fits_binding(int fd, unsigned ifindex)
{
    struct sockaddr_ll addr = { };
    socklen_t size = sizeof(addr);

    return getsockname(fd, (struct sockaddr *)&addr, &size) == 0 &&
           (!addr.sll_ifindex || addr.sll_ifindex == ifindex);
}

/* With a ring, the kernel refuses to set the version, even to the same. */
static bool packet_passed_has_ring(int fd)
{
    int version = packet_get_option(fd, SOL_PACKET, PACKET_VERSION);

    return setsockopt(fd, SOL_PACKET, PACKET_VERSION, &version,
                      sizeof(version)) < 0 && errno == EBUSY;
}

bool packet_passed_check(int fd, const char *ifname, unsigned ifindex,
                         Error **errp)
{
    int domain = packet_get_option(fd, SOL_SOCKET, SO_DOMAIN);
    const char *flaw = NULL;

    if (!domain && errno == EACCES) {
        flaw = "is refused, as AppArmor or SELinux may do";
    } else if (!domain && errno == EBADF) {
        flaw = "is not open";
    } else if (domain != AF_PACKET) {
        flaw = "is not a packet socket";
    } else if (packet_get_option(fd, SOL_SOCKET, SO_TYPE) != SOCK_RAW) {
        flaw = "is not of type SOCK_RAW";
    } else if (!packet_passed_same_netns(fd)) {
        flaw = "is in another network namespace than QEMU";
    } else if (!packet_passed_fits_binding(fd, ifindex)) {
        flaw = "is bound to another interface";
    } else if (packet_get_option(fd, SOL_PACKET, PACKET_FANOUT)) {
        flaw = "is in a fanout group";
    } else if (packet_get_option(fd, SOL_SOCKET, SO_LOCK_FILTER)) {
        flaw = "has a locked filter; maybe another filter uses it";
    } else if (packet_passed_has_ring(fd)) {
        flaw = "has a ring";
    }
    if (flaw) {
        error_setg(errp, "cannot use file descriptor %d for interface '%s': "
                   "it %s", fd, ifname, flaw);
    }
    return !flaw;
}
