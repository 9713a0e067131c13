/*
 * The benchmark's load generators and receivers
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef BENCH_TRAFFIC_H
#define BENCH_TRAFFIC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <linux/if_ether.h>
#include <linux/virtio_net.h>

#define MAX_TARGETS 128
#define MAX_FRAME 65535
#define SMALL_FRAME 64
#define SECOND 1000000000ull

/* What all programs take, as NAME=VALUE; see main.c. */
typedef struct Options {
    double rate;            /* frames per second, 0: as fast as possible */
    double seconds;
    int size;               /* bytes of a frame without virtio-net header */
    int batch_us;           /* send all that is due at once, this often */
    int burst;              /* frames that go at once if the sender is late */
    int cpu;                /* to run on, or -1 */
    int gso;                /* TCPv4 frames that have to be segmented */
    int bypass;             /* the queueing discipline, as QEMU does */
    int mix;                /* every second frame is a small one, no GSO */
    int written;            /* every so many frames is written to ... */
    int tap;                /* ... this one, as the guest does; 0: none */
    unsigned targets;
    const char *target[MAX_TARGETS];
} Options;

void die(const char *format, ...)
    __attribute__((noreturn, format(printf, 1, 2)));
uint64_t now_ns(void);
uint64_t cpu_ns(void);
void sleep_until(uint64_t when);
void *allocate(size_t size);
/* A socket that is connected to @path, or listens there. */
int open_unix(const char *path, bool server);
/* A packet socket whose frames have virtio-net headers, not bound yet */
int open_packet(void);
void bind_packet(int fd, const char *name, int protocol);

/* frames.c */

/* Carried by each frame behind its headers, in the host's byte order. */
typedef struct Record {
    uint32_t magic;
    uint32_t flow;          /* the number of the target */
    uint64_t number;        /* within the flow, from 0 */
    uint64_t ns;            /* CLOCK_MONOTONIC, when it was sent */
} Record;

/* A frame up to its body, which is of no interest. */
typedef struct Head {
    struct virtio_net_hdr vnet;
    uint8_t frame[54 + sizeof(Record)];     /* right behind it */
    size_t len;             /* bytes used of @frame */
    size_t body;            /* bytes that come behind */
    Record record;          /* its last bytes, see head_stamp() */
} Head;

void head_init(Head *head, const Options *o, unsigned i);
void head_stamp(Head *head, const Options *o, uint64_t i, uint64_t ns);

typedef struct Tally {
    const Options *options;
    uint64_t frames;
    uint64_t missing;       /* gaps in the numbers */
    uint64_t disorder;      /* numbers that came before */
    uint64_t foreign;       /* frames that are not the benchmark's */
    uint64_t next[MAX_TARGETS];
    uint32_t *latency;
    size_t latencies;
} Tally;

void tally_init(Tally *tally, const Options *o);
void tally_frame(Tally *tally, const uint8_t *frame, size_t len, uint64_t now);
void tally_print(Tally *tally);

/* The programs */

int send_main(const Options *o);
int write_main(const Options *o);
int read_main(const Options *o);
int tap_main(const Options *o);
int capture_main(const Options *o);
int guest_main(const Options *o);

#endif /* BENCH_TRAFFIC_H */
