/*
 * TAPs in a network namespace of their own, for tests
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "tap-helpers.h"
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include <linux/sockios.h>

/* Why no test can run here, or NULL */
static const char *no_namespace;

bool can_run(void)
{
    if (no_namespace) {
        g_test_skip(no_namespace);
    }
    return !no_namespace;
}

/* For the ioctls of interfaces */
static int control_socket(void)
{
    static int fd = -1;

    if (fd < 0) {
        fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
        g_assert_cmpint(fd, >=, 0);
    }
    return fd;
}

static void interface_ioctl(const char *name, unsigned long request,
                            struct ifreq *ifr)
{
    g_strlcpy(ifr->ifr_name, name, IFNAMSIZ);
    g_assert_cmpint(ioctl(control_socket(), request, ifr), ==, 0);
}

void set_up(const char *name, bool up)
{
    struct ifreq ifr = { .ifr_flags = IFF_NOARP | (up ? IFF_UP : 0) };

    interface_ioctl(name, SIOCSIFFLAGS, &ifr);
}

void set_queue_len(Tap *tap, int len)
{
    struct ifreq ifr = { .ifr_qlen = len };

    interface_ioctl(tap->name, SIOCSIFTXQLEN, &ifr);
}

void set_mtu(Tap *tap, int mtu)
{
    struct ifreq ifr = { .ifr_mtu = mtu };

    interface_ioctl(tap->name, SIOCSIFMTU, &ifr);
}

bool bridge_new(char *name)
{
    static unsigned number;

    g_snprintf(name, IFNAMSIZ, "testbr%u", number++);
    if (ioctl(control_socket(), SIOCBRADDBR, name) < 0) {
        return false;
    }
    set_up(name, true);
    return true;
}

void bridge_add(const char *name, const Tap *tap)
{
    struct ifreq ifr = { .ifr_ifindex = tap->index };

    interface_ioctl(name, SIOCBRADDIF, &ifr);
}

void bridge_delete(const char *name)
{
    set_up(name, false);
    g_assert_cmpint(ioctl(control_socket(), SIOCBRDELBR, name), ==, 0);
}

int sender_new(unsigned index)
{
    struct sockaddr_ll sll = {
        .sll_family = AF_PACKET,
        .sll_ifindex = index,
    };
    int fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, 0), on = 1;

    g_assert_cmpint(fd, >=, 0);
    g_assert_cmpint(setsockopt(fd, SOL_PACKET, PACKET_VNET_HDR, &on,
                               sizeof(on)), ==, 0);
    g_assert_cmpint(bind(fd, (struct sockaddr *)&sll, sizeof(sll)), ==, 0);
    return fd;
}

void tap_new(Tap *tap)
{
    static unsigned number;
    struct ifreq ifr = { .ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR };

    g_snprintf(ifr.ifr_name, IFNAMSIZ, "test%u", number++);
    tap->fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC | O_NONBLOCK);
    g_assert_cmpint(tap->fd, >=, 0);
    g_assert_cmpint(ioctl(tap->fd, TUNSETIFF, &ifr), ==, 0);
    g_strlcpy(tap->name, ifr.ifr_name, IFNAMSIZ);
    tap->index = if_nametoindex(tap->name);
    g_assert_cmpuint(tap->index, >, 0);
    set_up(tap->name, true);
    tap->sender = sender_new(tap->index);
}

void tap_delete(Tap *tap)
{
    if (tap->fd >= 0) {
        close(tap->sender);
        close(tap->fd);
    }
    tap->fd = -1;
}

void tap_set_offload(Tap *tap, unsigned offload)
{
    g_assert_cmpint(ioctl(tap->fd, TUNSETOFFLOAD, offload), ==, 0);
}

bool readable(int fd, int timeout)
{
    struct pollfd pfd = { .fd = fd, .events = POLLIN };

    g_assert_cmpint(poll(&pfd, 1, timeout), >=, 0);
    return pfd.revents;
}

bool tap_try_read(Tap *tap, Frame *frame)
{
    struct iovec iov[] = {
        { &frame->hdr, sizeof(frame->hdr) },
        { frame->data, sizeof(frame->data) },
    };
    ssize_t ret = readv(tap->fd, iov, 2);

    if (ret < 0) {
        g_assert_cmpint(errno, ==, EAGAIN);
        return false;
    }
    g_assert_cmpint(ret, >=, sizeof(frame->hdr));
    frame->len = ret - sizeof(frame->hdr);
    return true;
}

void tap_read(Tap *tap, Frame *frame)
{
    g_assert_true(readable(tap->fd, LIMIT_MS));
    g_assert_true(tap_try_read(tap, frame));
}

void tap_drain(Tap *tap)
{
    g_autofree Frame *frame = g_new0(Frame, 1);

    while (tap_try_read(tap, frame)) {
        /* Nobody wants it */
    }
}

bool frame_write(int fd, const Frame *frame)
{
    struct iovec iov[] = {
        { (void *)&frame->hdr, sizeof(frame->hdr) },
        { (void *)frame->data, frame->len },
    };
    ssize_t ret = writev(fd, iov, 2);

    g_assert(ret < 0 || ret == sizeof(frame->hdr) + frame->len);
    return ret >= 0;
}

void tap_write(Tap *tap, const Frame *frame)
{
    g_assert_true(frame_write(tap->fd, frame));
}

uint32_t sum_bytes(const uint8_t *data, size_t len)
{
    uint32_t sum = 0;

    for (size_t i = 0; i < len; i++) {
        sum += i & 1 ? data[i] : data[i] << 8;
        sum = (sum & 0xffff) + (sum >> 16);
    }
    return sum;
}

uint32_t sum_pseudo(const uint8_t *ip, uint32_t len, uint8_t protocol)
{
    uint32_t sum = ip[0] >> 4 == 4 ? sum_bytes(ip + 12, 8) :
                                     sum_bytes(ip + 8, 32);

    sum += protocol + (len & 0xffff) + (len >> 16);
    return (sum & 0xffff) + (sum >> 16);
}

static void set_sysctl(const char *name, const char *value)
{
    g_autofree char *path = g_strdup_printf("/proc/sys/net/%s", name);
    int fd = open(path, O_WRONLY | O_CLOEXEC);

    if (fd < 0 ? errno != ENOENT : write(fd, value, strlen(value)) < 0) {
        no_namespace = "sysctls are not permitted";
    }
    if (fd >= 0) {
        close(fd);
    }
}

/*
 * No frame may come that the tests did not send, and a bridge is to pass on
 * whatever there is.
 */
static void set_sysctls(void)
{
    set_sysctl("ipv6/conf/all/disable_ipv6", "1");
    set_sysctl("ipv6/conf/default/disable_ipv6", "1");
    /* Of a bridge */
    set_sysctl("ipv4/igmp_link_local_mcast_reports", "0");
    set_sysctl("bridge/bridge-nf-call-arptables", "0");
    set_sysctl("bridge/bridge-nf-call-iptables", "0");
    set_sysctl("bridge/bridge-nf-call-ip6tables", "0");
}

void enter_namespace(void)
{
    struct ifreq ifr = { .ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR };
    int fd;

    if (unshare(CLONE_NEWNET) < 0) {
        no_namespace = "a network namespace is not permitted";
        return;
    }
    fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC);
    if (fd < 0 || ioctl(fd, TUNSETIFF, &ifr) < 0) {
        no_namespace = "a TAP is not permitted, or the kernel has none";
    }
    if (fd >= 0) {
        close(fd);
    }
    fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, 0);
    if (fd < 0) {
        no_namespace = "a packet socket is not permitted";
    } else {
        close(fd);
    }
    set_sysctls();
    if (!no_namespace) {
        set_up("lo", true);
    }
}
