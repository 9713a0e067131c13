/*
 * The benchmark's client of QEMU's monitor: how long a round trip takes
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "traffic.h"

#define MAX_TRIPS (1u << 20)
#define PATIENCE_MS 3000
/* Between two questions, so that answering is not all that QEMU does. */
#define PAUSE_NS 500000

/* Returns false if no answer comes. */
static bool read_answer(int fd)
{
    static char buffer[1 << 16];
    struct pollfd pfd = { .fd = fd, .events = POLLIN };
    size_t len = 0;

    do {
        ssize_t ret;

        if (poll(&pfd, 1, PATIENCE_MS) <= 0) {
            return false;
        }
        ret = read(fd, buffer + len, sizeof(buffer) - len);
        if (ret <= 0) {
            die("the monitor hung up");
        }
        len += ret;
    } while (buffer[len - 1] != '\n');
    return true;
}

static bool ask(int fd, const char *command)
{
    char line[80];
    int len = snprintf(line, sizeof(line), "{\"execute\": \"%s\"}\n", command);

    if (write(fd, line, len) != len) {
        die("write to the monitor: %s", strerror(errno));
    }
    return read_answer(fd);
}

int monitor_main(const Options *o)
{
    /* What is measured is QEMU, not how long this one waits for its turn. */
    struct sched_param priority = { .sched_priority = 10 };
    uint32_t *trip = allocate(MAX_TRIPS * sizeof(*trip));
    uint64_t end, before, ns;
    bool answered = true;
    size_t trips = 0;
    int fd = open_unix(o->target[0], false);

    if (sched_setscheduler(0, SCHED_FIFO, &priority) < 0) {
        die("sched_setscheduler: %s", strerror(errno));
    }
    if (!read_answer(fd) || !ask(fd, "qmp_capabilities")) {
        answered = false;
    }
    end = now_ns() + o->seconds * SECOND;
    while (answered && trips < MAX_TRIPS && now_ns() < end) {
        sleep_until(now_ns() + PAUSE_NS);
        before = now_ns();
        answered = ask(fd, "query-status");
        ns = now_ns() - before;
        trip[trips++] = ns < UINT32_MAX ? ns : UINT32_MAX;
    }
    printf("{\"answered\": %s, \"patience_ms\": %d, \"trip\": ",
           answered ? "true" : "false", PATIENCE_MS);
    print_percentiles(trip, trips);
    printf("}\n");
    return 0;
}
