/*
 * When to look for frames again: unit tests
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "../../net/frame-pace.h"
#include "qemu/timer.h"
#include "qemu/units.h"

#define MAX_NS (10 * SCALE_MS)
#define MAX_FRAMES 400
#define MAX_BYTES (128 * KiB)

typedef struct Stream {
    FramePace pace;
    int64_t now;
    int64_t next;               /* when the next frame comes */
    unsigned looks;
} Stream;

/* When nothing has come yet */
static const Stream begin = {
    .pace = {
        .max_ns = MAX_NS, .max_frames = MAX_FRAMES, .max_bytes = MAX_BYTES,
    },
    .now = 12345 * NANOSECONDS_PER_SECOND,
    .next = 12345 * NANOSECONDS_PER_SECOND,
};

/*
 * Let frames of @size bytes come every @gap ns for @duration.  Returns the
 * longest wait from the middle on, and fails if a limit is exceeded there.
 */
static int64_t stream_run(Stream *s, int64_t gap, size_t size,
                          int64_t duration)
{
    int64_t first = s->now, longest = 0, wait = 0;

    s->looks = 0;
    while (s->now < first + duration) {
        unsigned frames = 0;

        /* Woken by the next frame, or by the timer */
        s->now = wait ? s->now + wait : MAX(s->now, s->next);
        while (s->next <= s->now) {
            s->next += gap;
            frames++;
        }
        wait = frame_pace(&s->pace, s->now, frames, frames * size);
        s->looks++;
        g_assert_cmpint(wait, >=, 0);
        g_assert_cmpint(wait, <=, MAX_NS);
        if (s->now > first + duration / 2) {
            longest = MAX(longest, wait);
            g_assert_cmpint(wait / gap, <=, MAX_FRAMES);
            g_assert_cmpint(wait / gap * size, <=, MAX_BYTES * 5 / 4 + size);
        }
    }
    return longest;
}

/* Frames that come seldom do not wait, others not longer than is allowed. */
static void test_limits(void)
{
    static const struct {
        int64_t gap;
        size_t size;
        int64_t most;
    } cases[] = {
        { SCALE_MS, 64, 0 },
        { 250 * SCALE_US, 64, 0 },
        { SCALE_US, 64, MAX_FRAMES * SCALE_US },
        { 10 * SCALE_US, 1500, (MAX_BYTES / 1500 + 20) * 10 * SCALE_US },
        { 50 * SCALE_US, 64000, 4 * 50 * SCALE_US },
    };

    for (int i = 0; i < ARRAY_SIZE(cases); i++) {
        Stream s = begin;

        g_test_message("%zu bytes every %" PRId64 " ns", cases[i].size,
                       cases[i].gap);
        g_assert_cmpint(stream_run(&s, cases[i].gap, cases[i].size,
                                   400 * SCALE_MS), <=, cases[i].most);
    }
}

/* The more frames, the longer, until a limit says otherwise. */
static void test_often(void)
{
    static const int64_t gaps_us[] = { 190, 150, 100, 50, 30 };
    int64_t last = 0;
    Stream s = begin;

    for (int i = 0; i < ARRAY_SIZE(gaps_us); i++) {
        int64_t wait = stream_run(&s, gaps_us[i] * SCALE_US, 64,
                                  400 * SCALE_MS);

        g_assert_cmpint(wait, >, last);
        last = wait;
    }
    /* 100,000 a second: some 4 ms, so that 400 come */
    g_assert_cmpint(stream_run(&s, 10 * SCALE_US, 64, 400 * SCALE_MS), >,
                    3500 * SCALE_US);
    g_assert_cmpuint(s.looks, <, 400 / 3);
}

/* From one rate to another it takes a few looks, not a few seconds. */
static void test_change(void)
{
    Stream s = begin;

    for (int i = 0; i < 5; i++) {
        /* After a silence, too */
        g_assert_cmpint(stream_run(&s, 5 * SCALE_US, 64, 200 * SCALE_US), >,
                        0);
        stream_run(&s, SCALE_MS, 64, 50 * SCALE_MS);
        g_assert_cmpint(stream_run(&s, 5 * SCALE_US, 64, 100 * SCALE_MS), >,
                        SCALE_MS);
        g_assert_cmpint(stream_run(&s, 2 * SCALE_MS, 64, 50 * SCALE_MS), ==,
                        0);
        s.next = s.now += 3600 * NANOSECONDS_PER_SECOND;
    }
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/frame-pace/limits", test_limits);
    g_test_add_func("/frame-pace/often", test_often);
    g_test_add_func("/frame-pace/change", test_change);
    return g_test_run();
}
