/*
 * When to look for frames again
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * To wake up for one frame costs as much CPU time as hundreds of frames.  So
 * whoever gets many of them, and can let them wait, does better to look from
 * time to time than to be woken by each.
 *
 * Any thread, one at a time for a FramePace.
 */

#ifndef QEMU_NET_FRAME_PACE_H
#define QEMU_NET_FRAME_PACE_H

typedef struct FramePace {
    /* Set by the user */
    int64_t max_ns;             /* the longest that a frame may wait */
    unsigned max_frames;        /* how many may wait */
    size_t max_bytes;           /* how many bytes of them may wait */

    /* Of late */
    int64_t looked_ns;
    int64_t ns_per_frame;
    int64_t ns_per_kib;
} FramePace;

/**
 * frame_pace:
 * @pace: the user's, zero but for the limits at first
 * @now: the time of this look, in ns of any clock that goes on
 * @frames: how many frames there were at this look
 * @bytes: their length
 *
 * Called after each look.
 *
 * Returns: how long to wait for the next look in ns, or 0 to be woken by the
 * next frame.  With fewer than 5,000 frames a second it is 0; above, it is the
 * longer, the more of them come.
 */
int64_t frame_pace(FramePace *pace, int64_t now, unsigned frames,
                   size_t bytes);

#endif /* QEMU_NET_FRAME_PACE_H */
