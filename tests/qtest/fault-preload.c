/*
 * Let system calls of QEMU fail, and count its allocations
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * To be preloaded: the functions come before those of the C library.
 */

#include "qemu/osdep.h"
#include <dlfcn.h>
#include <net/if.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <linux/if_tun.h>
#include <linux/sockios.h>
#include <linux/vhost.h>
#include "fault-preload.h"
#include "qemu/atomic.h"

#define REAL(name) ((__typeof__(name) *)real(#name))

static FaultControl nobody;
static FaultControl *control = &nobody;

static void *real(const char *name)
{
    void *function = dlsym(RTLD_NEXT, name);

    if (!function) {
        abort();
    }
    return function;
}

static void __attribute__((constructor)) fault_open(void)
{
    const char *path = getenv(FAULT_CONTROL_ENV);
    int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    void *map;

    if (fd < 0) {
        return;
    }
    map = REAL(mmap)(NULL, sizeof(*control), PROT_READ | PROT_WRITE,
                     MAP_SHARED, fd, 0);
    if (map == MAP_FAILED) {
        abort();
    }
    close(fd);
    control = map;
}

/* Otherwise there is no need to look what the call is about. */
static bool armed(FaultCall call)
{
    return qatomic_read(&control->fault[call].times);
}

static bool fails(FaultCall call)
{
    Fault *fault = &control->fault[call];

    if (!armed(call)) {
        return false;
    }
    if (fault->skip) {
        fault->skip--;
        return false;
    }
    qatomic_dec(&fault->times);
    qatomic_inc(&fault->failed);
    errno = fault->error;
    return true;
}

static bool packet_fails(FaultCall call, int fd)
{
    int value;
    socklen_t size = sizeof(value);

    return armed(call) &&
           REAL(getsockopt)(fd, SOL_SOCKET, SO_DOMAIN, &value, &size) == 0 &&
           value == AF_PACKET && fails(call);
}

static bool is_named(const struct sockaddr_un *addr, const char *name)
{
    return addr->sun_family == AF_UNIX &&
           g_str_has_suffix(addr->sun_path, name);
}

static bool unix_fails(FaultCall call, int fd, const char *name)
{
    struct sockaddr_un own = { }, peer = { };
    socklen_t own_len = sizeof(own), peer_len = sizeof(peer);

    return armed(call) &&
           getsockname(fd, (struct sockaddr *)&own, &own_len) == 0 &&
           getpeername(fd, (struct sockaddr *)&peer, &peer_len) == 0 &&
           (is_named(&own, name) || is_named(&peer, name)) && fails(call);
}

int socket(int domain, int type, int protocol)
{
    if ((domain == AF_PACKET || domain == AF_INET) && fails(FAULT_SOCKET)) {
        return -1;
    }
    return REAL(socket)(domain, type, protocol);
}

int connect(int fd, __CONST_SOCKADDR_ARG addr, socklen_t size)
{
    if (armed(FAULT_CONNECT) && is_named(addr.__sockaddr_un__, "/client") &&
        fails(FAULT_CONNECT)) {
        return -1;
    }
    return REAL(connect)(fd, addr, size);
}

int setsockopt(int fd, int level, int option, const void *value,
               socklen_t size)
{
    return packet_fails(FAULT_SETSOCKOPT, fd) ? -1 :
           REAL(setsockopt)(fd, level, option, value, size);
}

int getsockopt(int fd, int level, int option, void *value, socklen_t *size)
{
    return packet_fails(FAULT_GETSOCKOPT, fd) ? -1 :
           REAL(getsockopt)(fd, level, option, value, size);
}

int bind(int fd, __CONST_SOCKADDR_ARG addr, socklen_t size)
{
    return packet_fails(FAULT_BIND, fd) ? -1 : REAL(bind)(fd, addr, size);
}

void *mmap(void *addr, size_t size, int protection, int flags, int fd,
           off_t offset)
{
    return fd >= 0 && packet_fails(FAULT_MMAP, fd) ? MAP_FAILED :
           REAL(mmap)(addr, size, protection, flags, fd, offset);
}

ssize_t recvmsg(int fd, struct msghdr *msg, int flags)
{
    if (packet_fails(FAULT_RECVMSG, fd) ||
        unix_fails(FAULT_READ_IN, fd, "/in")) {
        return -1;
    }
    return REAL(recvmsg)(fd, msg, flags);
}

ssize_t sendmsg(int fd, const struct msghdr *msg, int flags)
{
    return unix_fails(FAULT_WRITE_OUT, fd, "/out") ? -1 :
           REAL(sendmsg)(fd, msg, flags);
}

int sendmmsg(int fd, struct mmsghdr *msgs, unsigned n, int flags)
{
    if (packet_fails(FAULT_SEND_PART, fd)) {
        return REAL(sendmmsg)(fd, msgs, 1, flags);
    }
    return packet_fails(FAULT_SENDMMSG, fd) ? -1 :
           REAL(sendmmsg)(fd, msgs, n, flags);
}

ssize_t writev(int fd, const struct iovec *iov, int n)
{
    struct ifreq ifr;

    if (armed(FAULT_WRITE_TAP) && REAL(ioctl)(fd, TUNGETIFF, &ifr) == 0 &&
        fails(FAULT_WRITE_TAP)) {
        return -1;
    }
    return REAL(writev)(fd, iov, n);
}

int ioctl(int fd, unsigned long request, ...)
{
    unsigned type = _IOC_TYPE(request);
    bool tun = type == _IOC_TYPE(TUNGETIFF) && _IOC_NR(request) >= 200;
    va_list args;
    void *arg;

    va_start(args, request);
    arg = va_arg(args, void *);
    va_end(args);
    if ((type == VHOST_VIRTIO && fails(FAULT_VHOST)) ||
        ((tun || type == _IOC_TYPE(SIOCGIFNAME)) && fails(FAULT_IOCTL))) {
        return -1;
    }
    return REAL(ioctl)(fd, request, arg);
}

int timerfd_create(int clock, int flags)
{
    return fails(FAULT_POLL) ? -1 : REAL(timerfd_create)(clock, flags);
}

int epoll_ctl(int epoll_fd, int op, int fd, struct epoll_event *event)
{
    return op == EPOLL_CTL_ADD && packet_fails(FAULT_POLL, fd) ? -1 :
           REAL(epoll_ctl)(epoll_fd, op, fd, event);
}

/* Of the GNU C library.  dlsym() will not do, since it allocates by itself. */
void *__libc_malloc(size_t size);
void *__libc_calloc(size_t n, size_t size);
void *__libc_realloc(void *ptr, size_t size);
void *__libc_memalign(size_t alignment, size_t size);

static void count_allocation(void)
{
    qatomic_inc(&control->allocations);
}

void *malloc(size_t size)
{
    count_allocation();
    return __libc_malloc(size);
}

void *calloc(size_t n, size_t size)
{
    count_allocation();
    return __libc_calloc(n, size);
}

void *realloc(void *ptr, size_t size)
{
    count_allocation();
    return __libc_realloc(ptr, size);
}

void *aligned_alloc(size_t alignment, size_t size)
{
    count_allocation();
    return __libc_memalign(alignment, size);
}

int posix_memalign(void **ptr, size_t alignment, size_t size)
{
    count_allocation();
    *ptr = __libc_memalign(alignment, size);
    return *ptr ? 0 : ENOMEM;
}
