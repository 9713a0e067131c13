/*
 * When to look for frames again
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "net/frame-pace.h"
#include "qemu/timer.h"
#include "qemu/units.h"

/* Frames that are further apart on average do not wait for each other. */
#define PACED_NS (200 * SCALE_US)

/* So many frames at a time say it all, while one more or less says little. */
#define MANY 16

static int64_t frame_pace_average(int64_t average, int64_t ns, size_t n)
{
    return n >= MANY ? ns / n : (3 * average + ns / MAX(n, 1)) / 4;
}

int64_t frame_pace(FramePace *pace, int64_t now, unsigned frames, size_t bytes)
{
    /* A long silence shall not take long to forget. */
    int64_t ns = MIN(now - pace->looked_ns, 2 * pace->max_ns);
    int64_t wait;

    pace->looked_ns = now;
    pace->ns_per_frame = frame_pace_average(pace->ns_per_frame, ns, frames);
    pace->ns_per_kib = frame_pace_average(pace->ns_per_kib, ns, bytes / KiB);
    if (!frames || pace->ns_per_frame >= PACED_NS) {
        return 0;
    }
    wait = pace->max_ns - pace->max_ns / PACED_NS * pace->ns_per_frame;
    wait = MIN(wait, pace->max_frames * pace->ns_per_frame);
    return MIN(wait, (int64_t)(pace->max_bytes / KiB) * pace->ns_per_kib);
}
