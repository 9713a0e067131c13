/*
 * Open packet sockets for a QEMU that may not
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * An example for management software: what a process has to do that opens
 * sockets for the properties packet-fd and inject-packet-fd, see
 * docs/system/filter-redirector-vhost.rst.
 *
 *   packet-socket-helper --ifname=IF --fd=UNIXFD
 *      Send a socket on the interface IF over the Unix domain socket UNIXFD.
 *      The receiver sends it on to QEMU with "getfd".
 *
 *   packet-socket-helper --ifname=IF --as=FD... COMMAND [ARGUMENT]...
 *      Run COMMAND without any capability, with a socket as each of the FDs.
 *
 * It needs CAP_NET_RAW, by its parent's ambient capabilities or as root.
 * Before Linux 5.17 what it opens can only capture.  It does not ask who may
 * have sockets of which interface, so do not give the file capabilities.
 */

#include "qemu/osdep.h"
#include <getopt.h>
#include <net/if.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <linux/if_packet.h>
#include <cap-ng.h>
#include "qemu/cutils.h"

static G_NORETURN void fail(const char *what)
{
    fprintf(stderr, "packet-socket-helper: %s: %s\n", what, strerror(errno));
    exit(EXIT_FAILURE);
}

static G_NORETURN void usage(void)
{
    fprintf(stderr,
            "Usage: packet-socket-helper --ifname=IF --fd=UNIXFD\n"
            "       packet-socket-helper --ifname=IF --as=FD... COMMAND "
            "[ARGUMENT]...\n");
    exit(EXIT_FAILURE);
}

/* Keep CAP_NET_RAW, or not even that. */
static void drop_capabilities(bool keep_net_raw)
{
    capng_clear(CAPNG_SELECT_CAPS);
    if (keep_net_raw) {
        capng_update(CAPNG_ADD, CAPNG_EFFECTIVE | CAPNG_PERMITTED,
                     CAP_NET_RAW);
    }
    if (capng_apply(CAPNG_SELECT_CAPS) < 0) {
        fail(keep_net_raw ? "could not keep CAP_NET_RAW alone" :
                            "could not drop CAP_NET_RAW");
    }
}

/* With protocol 0 it gets no frame until QEMU binds it again. */
static int open_socket(const char *ifname)
{
    struct sockaddr_ll addr = {
        .sll_family = AF_PACKET,
        .sll_ifindex = if_nametoindex(ifname),
    };
    int fd;

    if (!addr.sll_ifindex) {
        fail(ifname);
    }
    fd = socket(AF_PACKET, SOCK_RAW, 0);
    if (fd < 0) {
        fail("could not open a packet socket");
    }
    if (bind(fd, (struct sockaddr *)&addr, sizeof(addr)) < 0) {
        fail("could not bind to the interface");
    }
    return fd;
}

static void send_socket(int unix_fd, int fd)
{
    char byte = 0;
    struct iovec iov = { .iov_base = &byte, .iov_len = sizeof(byte) };
    union {
        struct cmsghdr align;
        char buf[CMSG_SPACE(sizeof(fd))];
    } control = { };
    struct msghdr msg = {
        .msg_iov = &iov,
        .msg_iovlen = 1,
        .msg_control = &control,
        .msg_controllen = sizeof(control),
    };
    struct cmsghdr *cmsg = CMSG_FIRSTHDR(&msg);

    cmsg->cmsg_level = SOL_SOCKET;
    cmsg->cmsg_type = SCM_RIGHTS;
    cmsg->cmsg_len = CMSG_LEN(sizeof(fd));
    memcpy(CMSG_DATA(cmsg), &fd, sizeof(fd));
    if (RETRY_ON_EINTR(sendmsg(unix_fd, &msg, 0)) < 0) {
        fail("could not send the socket");
    }
}

static void move_fd(int from, int to)
{
    if (from != to) {
        if (dup2(from, to) < 0) {
            fail("could not move the socket");
        }
        close(from);
    }
}

static int parse_fd(const char *text)
{
    int fd = qemu_parse_fd(text);

    if (fd < 0) {
        errno = EBADF;
        fail(text);
    }
    return fd;
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        { "ifname", required_argument, NULL, 'i' },
        { "fd", required_argument, NULL, 'f' },
        { "as", required_argument, NULL, 'a' },
        { }
    };
    const char *ifname = NULL;
    int unix_fd = -1;
    bool runs = false;
    int option;

    drop_capabilities(true);
    while ((option = getopt_long(argc, argv, "+", options, NULL)) != -1) {
        switch (option) {
        case 'i':
            ifname = optarg;
            break;
        case 'f':
            unix_fd = parse_fd(optarg);
            break;
        case 'a':
            if (!ifname) {
                usage();
            }
            move_fd(open_socket(ifname), parse_fd(optarg));
            runs = true;
            break;
        default:
            usage();
        }
    }
    if (!ifname || runs == (unix_fd >= 0) || runs == (optind == argc)) {
        usage();
    }
    if (unix_fd >= 0) {
        send_socket(unix_fd, open_socket(ifname));
        return EXIT_SUCCESS;
    }
    drop_capabilities(false);
    /* Root's programs would have the capabilities back. */
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0) {
        fail("could not give up new privileges");
    }
    execvp(argv[optind], argv + optind);
    fail(argv[optind]);
}
