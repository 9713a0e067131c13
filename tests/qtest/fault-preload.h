/*
 * Let system calls of QEMU fail, and count its allocations
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A test maps a file with a FaultControl, names it in FAULT_CONTROL_ENV, and
 * starts QEMU with fault-preload.so in LD_PRELOAD.  From then on it says at
 * any time, through the file, which calls shall fail.
 */

#ifndef TESTS_FAULT_PRELOAD_H
#define TESTS_FAULT_PRELOAD_H

#define FAULT_CONTROL_ENV "QTEST_FAULT_CONTROL"

/* "out", "in" and "client" are Unix sockets with such a path at one end. */
typedef enum FaultCall {
    FAULT_SOCKET,       /* packet sockets, and those for ioctls */
    FAULT_SETSOCKOPT,   /* of packet sockets, as all to FAULT_SEND_PART */
    FAULT_GETSOCKOPT,
    FAULT_BIND,
    FAULT_MMAP,
    FAULT_RECVMSG,
    FAULT_SENDMMSG,
    FAULT_SEND_PART,    /* sendmmsg() does not fail: it sends one message */
    FAULT_IOCTL,        /* of TAPs, and of interfaces by their name */
    FAULT_POLL,         /* timerfd_create(), epoll_ctl() of packet sockets */
    FAULT_VHOST,        /* ioctls of vhost */
    FAULT_WRITE_OUT,    /* sendmsg() to "out" */
    FAULT_READ_IN,      /* recvmsg() from "in" */
    FAULT_WRITE_TAP,    /* writev() */
    FAULT_CONNECT,      /* connect() to "client" */
    FAULT_CALLS
} FaultCall;

typedef struct Fault {
    int error;          /* errno */
    unsigned skip;      /* so many go well first */
    unsigned times;     /* then so many fail */
    unsigned failed;    /* so many did */
} Fault;

typedef struct FaultControl {
    Fault fault[FAULT_CALLS];
    uint64_t allocations;
} FaultControl;

#endif /* TESTS_FAULT_PRELOAD_H */
