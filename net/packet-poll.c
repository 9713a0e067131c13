/*
 * Polling many packet sockets
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * To wake up for a frame costs QEMU as much as hundreds of frames do.  So one
 * wake-up reads all sockets, and when frames come fast, the next wake-up is by
 * a timer:
 *
 *   fds       the main loop polls the fd of each enabled entry
 *   timer     it polls only the timer's fd; FramePace says how long
 *
 * After each visit to the sockets, frame_pace() chooses between the two.
 */

#include "qemu/osdep.h"
#include <sys/timerfd.h>
#include "packet-int.h"
#include "frame-pace.h"
#include "qapi/error.h"
#include "qemu/main-loop.h"
#include "qemu/timer.h"
#include "qemu/units.h"
#include "trace.h"

/* The most frames and bytes to read before other handlers get their turn. */
#define POLL_BATCH 1024
#define POLL_BATCH_BYTES (256 * KiB)

#define POLL_MAX_NS (10 * SCALE_MS)

static struct {
    QTAILQ_HEAD(, PacketPollEntry) entries;  /* the enabled ones */
    FramePace pace;
    unsigned users;
    int timer_fd;
    bool paced;                         /* the timer runs */
} packet_poll = {
    .entries = QTAILQ_HEAD_INITIALIZER(packet_poll.entries),
    .pace = {
        .max_ns = POLL_MAX_NS,
        .max_frames = 600,
        .max_bytes = 128 * KiB, /* a socket chardev takes no more at a time */
    },
};

static void packet_poll_readable(void *opaque);

static void packet_poll_update_handler(PacketPollEntry *entry)
{
    bool poll = entry->enabled && !packet_poll.paced;

    qemu_set_fd_handler(entry->fd, poll ? packet_poll_readable : NULL, NULL,
                        NULL);
}

/*
 * A QEMUTimer would make the main loop go round once more each time that it is
 * set.  @ns is 0 to stop the timer.
 */
static void packet_poll_set_timer(int64_t ns)
{
    struct itimerspec when = { .it_value.tv_nsec = ns };
    PacketPollEntry *entry;

    if (packet_poll.paced || ns) {
        /* This also clears an expiry that has not been read. */
        timerfd_settime(packet_poll.timer_fd, 0, &when, NULL);
    }
    if (packet_poll.paced != !!ns) {
        packet_poll.paced = ns;
        QTAILQ_FOREACH(entry, &packet_poll.entries, next) {
            packet_poll_update_handler(entry);
        }
    }
}

/*
 * Visit the entries in turn.  Each one moves to the tail when it is visited, so
 * that the next visit begins where this one ends.
 */
static void packet_poll_readable(void *opaque)
{
    int64_t now = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    PacketPollEntry *entry;
    unsigned frames = 0, left = 0;
    size_t bytes = 0;
    bool failing = false;
    int64_t wait;

    QTAILQ_FOREACH(entry, &packet_poll.entries, next) {
        left++;
    }
    while (left && (entry = QTAILQ_FIRST(&packet_poll.entries)) &&
           frames < POLL_BATCH && bytes < POLL_BATCH_BYTES) {
        size_t read = 0;

        QTAILQ_REMOVE(&packet_poll.entries, entry, next);
        QTAILQ_INSERT_TAIL(&packet_poll.entries, entry, next);
        frames += entry->read(entry, POLL_BATCH - frames,
                              POLL_BATCH_BYTES - bytes, &read, &failing);
        bytes += read;
        left--;
    }
    wait = frame_pace(&packet_poll.pace, now, frames, bytes);
    if (left || frames >= POLL_BATCH || bytes >= POLL_BATCH_BYTES) {
        wait = 1;       /* there may be more */
    }
    if (failing) {
        wait = POLL_MAX_NS;     /* the fd may be readable all the time */
    }
    packet_poll_set_timer(QTAILQ_EMPTY(&packet_poll.entries) ? 0 : wait);
    if (trace_event_get_state_backends(TRACE_PACKET_POLL)) {
        trace_packet_poll(frames, bytes,
                              qemu_clock_get_ns(QEMU_CLOCK_REALTIME) - now);
    }
}

bool packet_poll_ref(Error **errp)
{
    if (!packet_poll.users) {
        packet_poll.timer_fd = timerfd_create(CLOCK_MONOTONIC,
                                              TFD_CLOEXEC | TFD_NONBLOCK);
        if (packet_poll.timer_fd < 0) {
            error_setg_errno(errp, errno, "could not create a timer");
            return false;
        }
        qemu_set_fd_handler(packet_poll.timer_fd, packet_poll_readable, NULL,
                            NULL);
    }
    packet_poll.users++;
    return true;
}

void packet_poll_unref(void)
{
    if (!--packet_poll.users) {
        qemu_set_fd_handler(packet_poll.timer_fd, NULL, NULL, NULL);
        close(packet_poll.timer_fd);
        packet_poll.paced = false;
    }
}

void packet_poll_set(PacketPollEntry *entry, bool enable)
{
    if (entry->enabled == enable) {
        return;
    }
    entry->enabled = enable;
    if (enable) {
        QTAILQ_INSERT_TAIL(&packet_poll.entries, entry, next);
    } else {
        QTAILQ_REMOVE(&packet_poll.entries, entry, next);
    }
    packet_poll_update_handler(entry);
}
