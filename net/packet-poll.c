/*
 * Polling many packet sockets
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * To wake up for a frame costs QEMU as much as hundreds of frames do.  So one
 * wake-up reads all sockets that have frames, and when frames come fast, the
 * next wake-up is by a timer:
 *
 *   epoll     the main loop polls the epoll fd, which reports enabled entries
 *   timer     it polls only the timer's fd; FramePace says how long
 *
 * After each visit to the sockets, frame_pace() chooses between the two.
 *
 * Events are edge-triggered: an entry that was reported stays in the list of
 * ready ones until it has been read to its end.
 */

#include "qemu/osdep.h"
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include "packet-int.h"
#include "frame-pace.h"
#include "qapi/error.h"
#include "qemu/main-loop.h"
#include "trace.h"

/* The most frames and bytes to read before other handlers get their turn. */
#define POLL_BATCH 1024
#define POLL_BATCH_BYTES (256 * KiB)

/* How long frames may wait for the timer, and how many. */
#define POLL_MAX_NS (10 * SCALE_MS)
#define POLL_MAX_FRAMES 600
#define POLL_EVENTS 256

static struct {
    QTAILQ_HEAD(, PacketPollEntry) ready;
    FramePace pace;
    unsigned entries;
    int epoll_fd;
    int timer_fd;
    bool paced;                         /* the timer runs */
} packet_poll = {
    .ready = QTAILQ_HEAD_INITIALIZER(packet_poll.ready),
    .pace = {
        .max_ns = POLL_MAX_NS,
        .max_bytes = 128 * KiB, /* what a socket chardev takes at a time */
    },
};

static void packet_poll_readable(void *opaque);

/*
 * @ns is 0 to stop the timer.  It is no QEMUTimer, since each time that one is
 * set the main loop goes round once more.
 */
static void packet_poll_set_timer(int64_t ns)
{
    struct itimerspec when = { .it_value.tv_nsec = ns };

    if (packet_poll.paced || ns) {
        /* This also clears an expiry that has not been read. */
        timerfd_settime(packet_poll.timer_fd, 0, &when, NULL);
    }
    if (packet_poll.paced != !!ns) {
        packet_poll.paced = ns;
        qemu_set_fd_handler(packet_poll.epoll_fd,
                            ns ? NULL : packet_poll_readable, NULL, NULL);
    }
}

static void packet_poll_set_ready(PacketPollEntry *entry, bool ready)
{
    if (QTAILQ_IN_USE(entry, next)) {
        QTAILQ_REMOVE(&packet_poll.ready, entry, next);
    }
    if (ready) {
        QTAILQ_INSERT_TAIL(&packet_poll.ready, entry, next);
    }
}

/* Add what epoll reports to the ready entries.  Returns their number. */
static unsigned packet_poll_wait(void)
{
    struct epoll_event events[POLL_EVENTS];
    int n = epoll_wait(packet_poll.epoll_fd, events, POLL_EVENTS, 0);
    PacketPollEntry *entry;
    unsigned ready = 0;

    for (int i = 0; i < n; i++) {
        entry = events[i].data.ptr;
        if (entry->enabled && !QTAILQ_IN_USE(entry, next)) {
            packet_poll_set_ready(entry, true);
        }
    }
    QTAILQ_FOREACH(entry, &packet_poll.ready, next) {
        ready++;
    }
    return ready;
}

/*
 * Visit the ready entries, in turn.  One that has more frames goes to the tail,
 * so that the next visit begins with the others.
 */
static void packet_poll_readable(void *opaque)
{
    int64_t now = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    unsigned ready = packet_poll_wait();
    PacketPollEntry *entry;
    unsigned frames = 0;
    size_t bytes = 0;
    int64_t wait;

    while (ready-- && (entry = QTAILQ_FIRST(&packet_poll.ready)) &&
           frames < POLL_BATCH && bytes < POLL_BATCH_BYTES) {
        size_t read = 0;
        bool more = false;

        frames += entry->read(entry, POLL_BATCH - frames,
                              POLL_BATCH_BYTES - bytes, &read, &more);
        bytes += read;
        packet_poll_set_ready(entry, more && entry->enabled);
    }
    wait = frame_pace(&packet_poll.pace, now, frames, bytes);
    if (!QTAILQ_EMPTY(&packet_poll.ready)) {
        /* If nothing could be read, there is an error: try again later. */
        wait = frames ? 1 : POLL_MAX_NS;
    }
    packet_poll_set_timer(wait);
    if (trace_event_get_state_backends(TRACE_PACKET_POLL)) {
        trace_packet_poll(frames, bytes,
                          qemu_clock_get_ns(QEMU_CLOCK_REALTIME) - now);
    }
}

static bool packet_poll_open(Error **errp)
{
    packet_poll.epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (packet_poll.epoll_fd < 0) {
        error_setg_errno(errp, errno, "could not create an epoll fd");
        return false;
    }
    packet_poll.timer_fd = timerfd_create(CLOCK_MONOTONIC,
                                          TFD_CLOEXEC | TFD_NONBLOCK);
    if (packet_poll.timer_fd < 0) {
        error_setg_errno(errp, errno, "could not create a timer");
        close(packet_poll.epoll_fd);
        return false;
    }
    packet_poll.paced = false;
    packet_poll.pace.max_frames = POLL_MAX_FRAMES;
    qemu_set_fd_handler(packet_poll.timer_fd, packet_poll_readable, NULL, NULL);
    qemu_set_fd_handler(packet_poll.epoll_fd, packet_poll_readable, NULL, NULL);
    return true;
}

static void packet_poll_close(void)
{
    qemu_set_fd_handler(packet_poll.timer_fd, NULL, NULL, NULL);
    qemu_set_fd_handler(packet_poll.epoll_fd, NULL, NULL, NULL);
    close(packet_poll.timer_fd);
    close(packet_poll.epoll_fd);
}

bool packet_poll_add(PacketPollEntry *entry, int fd, unsigned room,
                     PacketPollRead *read, Error **errp)
{
    struct epoll_event event = { .events = EPOLLET, .data.ptr = entry };

    if (!packet_poll.entries && !packet_poll_open(errp)) {
        return false;
    }
    packet_poll.pace.max_frames = MIN(packet_poll.pace.max_frames, room / 2);
    entry->fd = fd;
    entry->read = read;
    packet_poll.entries++;
    if (epoll_ctl(packet_poll.epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0) {
        error_setg_errno(errp, errno, "could not poll a packet socket");
        packet_poll_remove(entry);
        return false;
    }
    return true;
}

void packet_poll_remove(PacketPollEntry *entry)
{
    packet_poll_set_ready(entry, false);
    epoll_ctl(packet_poll.epoll_fd, EPOLL_CTL_DEL, entry->fd, NULL);
    if (!--packet_poll.entries) {
        packet_poll_close();
    }
}

void packet_poll_set(PacketPollEntry *entry, bool enable)
{
    struct epoll_event event = {
        .events = enable ? EPOLLIN | EPOLLET : EPOLLET,
        .data.ptr = entry,
    };

    if (entry->enabled != enable) {
        entry->enabled = enable;
        packet_poll_set_ready(entry, false);
        epoll_ctl(packet_poll.epoll_fd, EPOLL_CTL_MOD, entry->fd, &event);
    }
}
