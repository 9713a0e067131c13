/*
 * Netfilters on a TAP with vhost: polling the packet sockets
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * To wake up for a frame costs QEMU as much as hundreds of frames do.  So one
 * wake-up reads the sockets of all captures, and when frames come fast, the
 * next wake-up is by a timer:
 *
 *   fds       the main loop polls the fd of each enabled entry
 *   timer     it polls only the timer's fd; FramePace says how long
 *
 * After each visit to the sockets, frame_pace() chooses between the two.
 */

#include "qemu/osdep.h"
#include <sys/timerfd.h>
#include "filter-tap-int.h"
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
    QTAILQ_HEAD(, FilterTapPollEntry) entries;  /* the enabled ones */
    FramePace pace;
    unsigned users;
    int timer_fd;
    bool paced;                         /* the timer runs */
} filter_tap_poll = {
    .entries = QTAILQ_HEAD_INITIALIZER(filter_tap_poll.entries),
    .pace = {
        .max_ns = POLL_MAX_NS,
        .max_frames = 600,
        .max_bytes = 128 * KiB, /* a socket chardev takes no more at a time */
    },
};

static void filter_tap_poll_readable(void *opaque);

static void filter_tap_poll_update_handler(FilterTapPollEntry *entry)
{
    bool poll = entry->enabled && !filter_tap_poll.paced;

    qemu_set_fd_handler(entry->fd, poll ? filter_tap_poll_readable : NULL,
                        NULL, NULL);
}

/*
 * A QEMUTimer would make the main loop go round once more each time that it is
 * set.  @ns is 0 to stop the timer.
 */
static void filter_tap_poll_set_timer(int64_t ns)
{
    struct itimerspec when = { .it_value.tv_nsec = ns };
    FilterTapPollEntry *entry;

    if (filter_tap_poll.paced || ns) {
        /* This also clears an expiry that has not been read. */
        timerfd_settime(filter_tap_poll.timer_fd, 0, &when, NULL);
    }
    if (filter_tap_poll.paced != !!ns) {
        filter_tap_poll.paced = ns;
        QTAILQ_FOREACH(entry, &filter_tap_poll.entries, next) {
            filter_tap_poll_update_handler(entry);
        }
    }
}

/*
 * Visit the entries in turn.  Each one moves to the tail when it is visited, so
 * that the next visit begins where this one ends.
 */
static void filter_tap_poll_readable(void *opaque)
{
    int64_t now = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    FilterTapPollEntry *entry;
    unsigned frames = 0, left = 0;
    size_t bytes = 0;
    bool failing = false;
    int64_t wait;

    QTAILQ_FOREACH(entry, &filter_tap_poll.entries, next) {
        left++;
    }
    while (left && (entry = QTAILQ_FIRST(&filter_tap_poll.entries)) &&
           frames < POLL_BATCH && bytes < POLL_BATCH_BYTES) {
        size_t read = 0;

        QTAILQ_REMOVE(&filter_tap_poll.entries, entry, next);
        QTAILQ_INSERT_TAIL(&filter_tap_poll.entries, entry, next);
        frames += entry->read(entry, POLL_BATCH - frames,
                              POLL_BATCH_BYTES - bytes, &read, &failing);
        bytes += read;
        left--;
    }
    wait = frame_pace(&filter_tap_poll.pace, now, frames, bytes);
    if (left || frames >= POLL_BATCH || bytes >= POLL_BATCH_BYTES) {
        wait = 1;       /* there may be more */
    }
    if (failing) {
        wait = POLL_MAX_NS;     /* the fd may be readable all the time */
    }
    filter_tap_poll_set_timer(QTAILQ_EMPTY(&filter_tap_poll.entries) ? 0 :
                              wait);
    if (trace_event_get_state_backends(TRACE_FILTER_TAP_POLL)) {
        trace_filter_tap_poll(frames, bytes,
                              qemu_clock_get_ns(QEMU_CLOCK_REALTIME) - now);
    }
}

bool filter_tap_poll_ref(Error **errp)
{
    if (!filter_tap_poll.users) {
        filter_tap_poll.timer_fd = timerfd_create(CLOCK_MONOTONIC,
                                                  TFD_CLOEXEC | TFD_NONBLOCK);
        if (filter_tap_poll.timer_fd < 0) {
            error_setg_errno(errp, errno, "could not create a timer");
            return false;
        }
        qemu_set_fd_handler(filter_tap_poll.timer_fd, filter_tap_poll_readable,
                            NULL, NULL);
    }
    filter_tap_poll.users++;
    return true;
}

void filter_tap_poll_unref(void)
{
    if (!--filter_tap_poll.users) {
        qemu_set_fd_handler(filter_tap_poll.timer_fd, NULL, NULL, NULL);
        close(filter_tap_poll.timer_fd);
        filter_tap_poll.paced = false;
    }
}

void filter_tap_poll_set(FilterTapPollEntry *entry, bool enable)
{
    if (entry->enabled == enable) {
        return;
    }
    entry->enabled = enable;
    if (enable) {
        QTAILQ_INSERT_TAIL(&filter_tap_poll.entries, entry, next);
    } else {
        QTAILQ_REMOVE(&filter_tap_poll.entries, entry, next);
    }
    filter_tap_poll_update_handler(entry);
}
