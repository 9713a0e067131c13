/*
 * The benchmark's load: frames sent out of interfaces, or written to streams
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include "traffic.h"

#define MAX_BATCH 256
#define MAX_BATCH_BYTES (1u << 20)

static uint8_t body[MAX_FRAME];

typedef struct Load {
    const Options *options;
    uint64_t sent;
    uint64_t refused;
    int fd[MAX_TARGETS];
    int tap_hdr_len;
    Head head[MAX_BATCH];
    uint8_t *stream;
} Load;

typedef void Emit(Load *load, uint64_t first, unsigned count);

/* How many frames should have gone by now. */
static uint64_t frames_due(const Options *o, uint64_t start)
{
    uint64_t total = o->rate * o->seconds;
    uint64_t due = (now_ns() - start) / 1e9 * o->rate + 1;

    return due < total ? due : total;
}

/* Send all that is due each batch_us, and sleep. */
static void run_batches(Load *load, Emit *emit, uint64_t start, unsigned most)
{
    const Options *o = load->options;
    uint64_t total = o->rate * o->seconds, tick = start, i = 0;

    while (i < total) {
        uint64_t due = frames_due(o, start);

        while (i < due) {
            unsigned count = due - i < most ? due - i : most;

            emit(load, i, count);
            i += count;
        }
        tick += o->batch_us * 1000ull;
        tick = tick < now_ns() ? now_ns() : tick;
        if (i < total) {
            sleep_until(tick);
        }
    }
}

/* Spin, so that the processor is warm and a frame goes when it is due. */
static void run_single(Load *load, Emit *emit, uint64_t start, unsigned most)
{
    const Options *o = load->options;
    uint64_t total = o->rate * o->seconds, i = 0;
    /* Then the rate is out of reach. */
    uint64_t end = start + (o->seconds + 1) * SECOND;

    most = (unsigned)o->burst < most ? (unsigned)o->burst : most;
    while (i < total && now_ns() < end) {
        uint64_t due = frames_due(o, start);

        if (i < due) {
            unsigned count = due - i < most ? due - i : most;

            emit(load, i, count);
            i += count;
        }
    }
}

/* As fast as possible. */
static void run_flood(Load *load, Emit *emit, uint64_t start, unsigned most)
{
    uint64_t end = start + load->options->seconds * SECOND;

    for (uint64_t i = 0; now_ns() < end; i += most) {
        emit(load, i, most);
    }
}

static void run(Load *load, Emit *emit)
{
    const Options *o = load->options;
    uint64_t cpu = cpu_ns(), start = now_ns();
    unsigned most = MAX_BATCH_BYTES / (o->size + 64);

    most = most < MAX_BATCH ? most : MAX_BATCH;
    if (!o->rate) {
        run_flood(load, emit, start, most);
    } else if (o->batch_us) {
        run_batches(load, emit, start, most);
    } else {
        run_single(load, emit, start, most);
    }
    cpu = cpu_ns() - cpu;
    printf("{\"sent\": %" PRIu64 ", \"refused\": %" PRIu64 ", \"cpu_ns\": %"
           PRIu64 ", \"ns\": %" PRIu64 "}\n",
           load->sent, load->refused, cpu, now_ns() - start);
}

/* Out of an interface, or into it as a guest does */

/* The heads of a batch that begins with frame FIRST; small ones are odd. */
static Head *head_of(Load *load, uint64_t first, unsigned i)
{
    return &load->head[(i & ~1u) + ((first + i) & 1)];
}

static void write_packet(Load *load, Head *head)
{
    static uint8_t zero[16];
    struct iovec iov[] = {
        { &head->vnet, sizeof(head->vnet) },
        { zero, load->tap_hdr_len - sizeof(head->vnet) },
        { head->frame, head->len },
        { body, head->body },
    };

    while (writev(load->options->tap, iov, 4) < 0) {
        if (errno != EINTR && errno != EAGAIN) {
            die("write to the TAP: %s", strerror(errno));
        }
    }
    load->sent++;
}

static void emit_packets(Load *load, uint64_t first, unsigned count)
{
    const Options *o = load->options;
    struct mmsghdr message[MAX_BATCH];
    struct iovec iov[MAX_BATCH][2];
    uint64_t now = now_ns();
    unsigned done = 0;

    for (unsigned i = 0; i < count; i++) {
        Head *head = head_of(load, first, i);

        head_stamp(head, o, first + i, now);
        iov[i][0] = (struct iovec) {
            head, offsetof(Head, frame) + head->len
        };
        iov[i][1] = (struct iovec) { body, head->body };
        message[i] = (struct mmsghdr) {
            .msg_hdr = { .msg_iov = iov[i], .msg_iovlen = 2 },
        };
    }
    while (done < count) {
        /* One call for all goes to one target. */
        unsigned flow = (first + done) % o->targets;
        unsigned part = o->targets > 1 || o->written ? 1 : count - done;
        int ret;

        if (o->written && (first + done) % o->written == 0) {
            write_packet(load, head_of(load, first, done++));
            continue;
        }
        ret = sendmmsg(load->fd[flow], message + done, part, 0);
        if (ret > 0) {
            done += ret;
            load->sent += ret;
        } else if (errno == ENOBUFS) {
            /* The interface is full. */
            load->refused++;
            done++;
        } else if (errno != EINTR) {
            die("send to '%s': %s", o->target[flow], strerror(errno));
        }
    }
}

int send_main(const Options *o)
{
    Load *load = allocate(sizeof(*load));

    load->options = o;
    for (unsigned i = 0; i < o->targets; i++) {
        load->fd[i] = open_packet();
        if (o->bypass && setsockopt(load->fd[i], SOL_PACKET,
                                    PACKET_QDISC_BYPASS, &o->bypass,
                                    sizeof(o->bypass)) < 0) {
            die("PACKET_QDISC_BYPASS: %s", strerror(errno));
        }
        bind_packet(load->fd[i], o->target[i], 0);
    }
    if (o->written && ioctl(o->tap, TUNGETVNETHDRSZ, &load->tap_hdr_len) < 0) {
        die("TUNGETVNETHDRSZ of fd %d: %s", o->tap, strerror(errno));
    }
    for (unsigned i = 0; i < MAX_BATCH; i++) {
        head_init(&load->head[i], o, i);
    }
    run(load, emit_packets);
    return 0;
}

/* To a stream, when there is a line on the standard input */

static void put32(uint8_t *to, uint32_t value)
{
    value = htonl(value);
    memcpy(to, &value, sizeof(value));
}

/* All of them with one write */
static void emit_stream(Load *load, uint64_t first, unsigned count)
{
    const Options *o = load->options;
    Head *head = load->head;
    size_t frame_len = 8 + sizeof(head->vnet) + o->size;
    size_t done = 0, len = count * frame_len;
    uint64_t now = now_ns();

    for (unsigned i = 0; i < count; i++) {
        head_stamp(head, o, first + i, now);
        memcpy(load->stream + i * frame_len + 8 + sizeof(head->vnet),
               head->frame, head->len);
    }
    while (done < len) {
        ssize_t ret = write(load->fd[0], load->stream + done, len - done);

        if (ret > 0) {
            done += ret;
        } else if (errno != EINTR) {
            die("write to '%s': %s", o->target[0], strerror(errno));
        }
    }
    load->sent += count;
}

int write_main(const Options *o)
{
    Load *load = allocate(sizeof(*load));
    Head *head = load->head;
    size_t frame_len = 8 + sizeof(head->vnet) + o->size;
    char go;

    load->options = o;
    load->fd[0] = open_unix(o->target[0], false);
    head_init(head, o, 0);
    load->stream = allocate(MAX_BATCH * frame_len);
    for (unsigned i = 0; i < MAX_BATCH; i++) {
        uint8_t *at = load->stream + i * frame_len;

        put32(at, frame_len - 8);
        put32(at + 4, sizeof(head->vnet));
        memcpy(at + 8, &head->vnet, sizeof(head->vnet));
    }
    if (read(STDIN_FILENO, &go, 1) == 1) {
        run(load, emit_stream);
    }
    /* Until the driver has seen the counters: a peer that goes drops. */
    fflush(stdout);
    while (read(STDIN_FILENO, &go, 1) > 0) {
        /* until it is closed */
    }
    return 0;
}
