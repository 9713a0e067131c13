/*
 * When to look for frames again
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * To wake up for one frame costs as much CPU time as hundreds of frames.  So
 * when many come, it is better to let them wait, and wake up for all of them.
 */

#ifndef NET_FRAME_PACE_H
#define NET_FRAME_PACE_H

#include "qemu/timer.h"
#include "qemu/units.h"

/* If frames are further apart than this on average, they do not wait. */
#define FRAME_PACE_NS (200 * SCALE_US)

/* So many frames tell the rate; that of fewer is averaged with earlier ones. */
#define FRAME_PACE_MANY 16

typedef struct FramePace {
    /* Set by the user */
    int64_t max_ns;             /* the longest that a frame may wait */
    unsigned max_frames;        /* how many may wait */
    size_t max_bytes;           /* how many bytes of them may wait */

    /* What was found lately */
    int64_t looked_ns;
    int64_t ns_per_frame;
    int64_t ns_per_kib;
} FramePace;

static inline int64_t frame_pace_average(int64_t average, int64_t ns, size_t n)
{
    return n >= FRAME_PACE_MANY ? ns / n :
                                  (3 * average + ns / MAX(n, 1)) / 4;
}

/*
 * Returns how long to wait in ns, or 0 to be woken by the next frame, when
 * @frames of @bytes in all were found at @now, in ns of a monotonic clock.
 * With fewer than 5,000 frames a second it is 0; above, the more of them come,
 * the longer it is.
 */
static inline int64_t frame_pace(FramePace *pace, int64_t now, unsigned frames,
                                 size_t bytes)
{
    /* After a long silence the new rate shall count soon. */
    int64_t ns = MIN(now - pace->looked_ns, 2 * pace->max_ns);
    int64_t wait;

    pace->looked_ns = now;
    pace->ns_per_frame = frame_pace_average(pace->ns_per_frame, ns, frames);
    pace->ns_per_kib = frame_pace_average(pace->ns_per_kib, ns, bytes / KiB);
    if (!frames || pace->ns_per_frame >= FRAME_PACE_NS) {
        return 0;
    }
    wait = pace->max_ns - pace->max_ns / FRAME_PACE_NS * pace->ns_per_frame;
    wait = MIN(wait, pace->max_frames * pace->ns_per_frame);
    return MIN(wait, (int64_t)(pace->max_bytes / KiB) * pace->ns_per_kib);
}

#endif /* NET_FRAME_PACE_H */
