/*
 * The benchmark's load generators and receivers, as one program
 *
 *   traffic send TAP...      send frames out of interfaces
 *   traffic write PATH       write frames to a stream
 *   traffic read PATH...     read frames from streams
 *   traffic tap FD...        read frames from TAPs, of which the fds are open
 *   traffic capture TAP PATH write frames from a packet socket to a stream
 *   traffic guest FILE       give receive buffers back, in a guest's memory
 *
 * The options, NAME=VALUE before the targets, are the fields of Options in
 * traffic.h.  Each prints one line of JSON.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <net/if.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>
#include <linux/if_packet.h>
#include "traffic.h"

void die(const char *format, ...)
{
    va_list args;

    va_start(args, format);
    fprintf(stderr, "traffic: ");
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    va_end(args);
    exit(1);
}

static uint64_t read_clock(clockid_t clock)
{
    struct timespec ts;

    clock_gettime(clock, &ts);
    return ts.tv_sec * SECOND + ts.tv_nsec;
}

uint64_t now_ns(void)
{
    return read_clock(CLOCK_MONOTONIC);
}

uint64_t cpu_ns(void)
{
    return read_clock(CLOCK_PROCESS_CPUTIME_ID);
}

void sleep_until(uint64_t when)
{
    struct timespec ts = { when / SECOND, when % SECOND };

    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &ts, NULL);
}

void *allocate(size_t size)
{
    void *memory = calloc(1, size);

    if (!memory) {
        die("no memory");
    }
    return memory;
}

int open_unix(const char *path, bool server)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);

    if (strlen(path) >= sizeof(address.sun_path)) {
        die("'%s' is too long", path);
    }
    strcpy(address.sun_path, path);
    if (fd < 0 || (server ? bind : connect)(
            fd, (struct sockaddr *)&address, sizeof(address)) < 0 ||
        (server && listen(fd, 1) < 0)) {
        die("'%s': %s", path, strerror(errno));
    }
    return fd;
}

int open_packet(void)
{
    int fd = socket(AF_PACKET, SOCK_RAW, 0), on = 1;

    if (fd < 0 ||
        setsockopt(fd, SOL_PACKET, PACKET_VNET_HDR, &on, sizeof(on)) < 0) {
        die("packet socket: %s", strerror(errno));
    }
    return fd;
}

void bind_packet(int fd, const char *name, int protocol)
{
    struct sockaddr_ll address = {
        .sll_family = AF_PACKET,
        .sll_protocol = htons(protocol),
        .sll_ifindex = if_nametoindex(name),
    };

    if (!address.sll_ifindex ||
        bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0) {
        die("packet socket on '%s': %s", name, strerror(errno));
    }
}

static void set_option(Options *o, const char *name, const char *value)
{
    const struct {
        const char *name;
        int *number;
    } options[] = {
        { "size", &o->size }, { "batch_us", &o->batch_us },
        { "burst", &o->burst }, { "cpu", &o->cpu }, { "gso", &o->gso },
        { "bypass", &o->bypass }, { "mix", &o->mix },
        { "written", &o->written }, { "tap", &o->tap },
    };

    if (!strcmp(name, "rate")) {
        o->rate = atof(value);
        return;
    } else if (!strcmp(name, "seconds")) {
        o->seconds = atof(value);
        return;
    }
    for (size_t i = 0; i < sizeof(options) / sizeof(*options); i++) {
        if (!strcmp(name, options[i].name)) {
            *options[i].number = atoi(value);
            return;
        }
    }
    die("no option '%s'", name);
}

static void parse(Options *o, int argc, char **argv)
{
    for (int i = 2; i < argc; i++) {
        char *value = strchr(argv[i], '=');

        if (value && argv[i][0] != '/') {
            *value = '\0';
            set_option(o, argv[i], value + 1);
        } else if (o->targets == MAX_TARGETS) {
            die("more than %d targets", MAX_TARGETS);
        } else {
            o->target[o->targets++] = argv[i];
        }
    }
    if (!o->targets) {
        die("no target");
    }
    if (o->size > MAX_FRAME || !o->burst) {
        die("size=%d or burst=%d makes no sense", o->size, o->burst);
    }
}

static void pin(int cpu)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof(set), &set) < 0) {
        die("cpu=%d: %s", cpu, strerror(errno));
    }
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        int (*main)(const Options *o);
    } programs[] = {
        { "send", send_main },
        { "write", write_main },
        { "read", read_main },
        { "tap", tap_main },
        { "capture", capture_main },
        { "guest", guest_main },
    };
    Options o = { .seconds = 1, .size = 64, .burst = 1, .cpu = -1 };

    if (argc < 2) {
        die("which program?  See the start of main.c");
    }
    parse(&o, argc, argv);
    if (o.cpu >= 0) {
        pin(o.cpu);
    }
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    prctl(PR_SET_TIMERSLACK, 1);
    for (size_t i = 0; i < sizeof(programs) / sizeof(*programs); i++) {
        if (!strcmp(programs[i].name, argv[1])) {
            return programs[i].main(&o);
        }
    }
    die("no program '%s'", argv[1]);
}
