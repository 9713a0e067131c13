/*
 * The benchmark's receivers: of streams, of TAPs, of packet sockets
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Each prints "ready", receives, and ends when the driver has told on its
 * standard input how many frames were sent ("N\n") and they have come, or
 * nothing comes any more.  It prints what it has counted, and waits for the
 * end of its standard input.
 */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include "traffic.h"

#define SILENCE_MS 300
#define STREAM_BUFFER (1u << 20)
#define MESSAGES 64

typedef struct Source {
    int fd;
    uint8_t *data;
    size_t used;
    int vnet_hdr_len;
    bool closed;
} Source;

/* Receive what there is, without waiting. */
typedef void Drain(Source *source, Tally *tally);

static uint64_t read_number(void)
{
    char line[64] = "";
    uint64_t number = 0;
    size_t len = 0;

    while (len < sizeof(line) - 1 && read(STDIN_FILENO, line + len, 1) == 1 &&
           line[len] != '\n') {
        len++;
    }
    if (sscanf(line, "%" SCNu64, &number) != 1) {
        die("not a number of frames: '%s'", line);
    }
    return number;
}

static void receive(const Options *o, Source *source, Drain *drain,
                    Tally *tally)
{
    struct pollfd fds[MAX_TARGETS + 1] = { };
    uint64_t expected = UINT64_MAX;

    for (unsigned i = 0; i < o->targets; i++) {
        fds[i] = (struct pollfd) { .fd = source[i].fd, .events = POLLIN };
    }
    fds[o->targets] = (struct pollfd) {
        .fd = STDIN_FILENO, .events = POLLIN,
    };
    printf("ready\n");
    fflush(stdout);
    while (tally->frames < expected) {
        int ready = poll(fds, o->targets + 1,
                         expected == UINT64_MAX ? -1 : SILENCE_MS);

        if (ready < 0) {
            die("poll: %s", strerror(errno));
        } else if (ready == 0) {
            break;
        }
        for (unsigned i = 0; i < o->targets; i++) {
            if (fds[i].revents) {
                drain(&source[i], tally);
                if (source[i].closed) {
                    die("'%s' was closed", o->target[i]);
                }
            }
        }
        if (fds[o->targets].revents) {
            expected = read_number();
            fds[o->targets].fd = -1;
        }
    }
}

static void wait_for_end(void)
{
    char c;

    while (read(STDIN_FILENO, &c, 1) > 0) {
        /* until it is closed */
    }
}

static int receive_all(const Options *o,
                       void (*open_source)(Source *, const char *),
                       Drain *drain)
{
    Source *source = allocate(MAX_TARGETS * sizeof(*source));
    Tally tally;

    tally_init(&tally, o);
    for (unsigned i = 0; i < o->targets; i++) {
        open_source(&source[i], o->target[i]);
    }
    receive(o, source, drain, &tally);
    tally_print(&tally);
    wait_for_end();
    return 0;
}

/* Of a stream */

static uint32_t get32(const uint8_t *from)
{
    uint32_t value;

    memcpy(&value, from, sizeof(value));
    return ntohl(value);
}

/* Hand out the frames that are complete; keep the rest. */
static void parse_stream(Source *source, Tally *tally, uint64_t now)
{
    size_t at = 0;

    while (source->used - at >= 8) {
        uint32_t size = get32(source->data + at);
        uint32_t vnet_hdr_len = get32(source->data + at + 4);

        if (size > MAX_FRAME + 64 || vnet_hdr_len > size) {
            die("the stream is not one: a frame of %" PRIu32 " bytes with a "
                "header of %" PRIu32, size, vnet_hdr_len);
        }
        if (source->used - at - 8 < size) {
            break;
        }
        tally_frame(tally, source->data + at + 8 + vnet_hdr_len,
                    size - vnet_hdr_len, now);
        at += 8 + size;
    }
    memmove(source->data, source->data + at, source->used - at);
    source->used -= at;
}

static void drain_stream(Source *source, Tally *tally)
{
    ssize_t len = recv(source->fd, source->data + source->used,
                       STREAM_BUFFER - source->used, MSG_DONTWAIT);

    if (len > 0) {
        source->used += len;
        parse_stream(source, tally, now_ns());
    } else if (len == 0 || errno != EAGAIN) {
        source->closed = true;
    }
}

static void open_stream(Source *source, const char *path)
{
    source->fd = open_unix(path, false);
    source->data = allocate(STREAM_BUFFER);
}

int read_main(const Options *o)
{
    return receive_all(o, open_stream, drain_stream);
}

/* Of a TAP's queue, whose fd is inherited */

static void drain_tap(Source *source, Tally *tally)
{
    for (int i = 0; i < MESSAGES; i++) {
        ssize_t len = read(source->fd, source->data, MAX_FRAME + 64);

        if (len < 0) {
            source->closed = errno != EAGAIN;
            break;
        }
        tally_frame(tally, source->data + source->vnet_hdr_len,
                    len - source->vnet_hdr_len, now_ns());
    }
}

static void open_tap(Source *source, const char *fd)
{
    source->fd = atoi(fd);
    source->data = allocate(MAX_FRAME + 64);
    if (ioctl(source->fd, TUNGETVNETHDRSZ, &source->vnet_hdr_len) < 0) {
        die("TUNGETVNETHDRSZ of fd %s: %s", fd, strerror(errno));
    }
    fcntl(source->fd, F_SETFL, fcntl(source->fd, F_GETFL) | O_NONBLOCK);
    /* What is left of earlier runs. */
    while (read(source->fd, source->data, MAX_FRAME + 64) > 0) {
        continue;
    }
}

int tap_main(const Options *o)
{
    return receive_all(o, open_tap, drain_tap);
}

/* Of a packet socket, to a stream: the bare loop */

static int out;                 /* the stream to write to */

/* Write the frames of @message to the stream, with as few calls as can be. */
static void write_stream(struct mmsghdr *message, int n)
{
    struct iovec iov[3 * MESSAGES], *at = iov;
    uint32_t prefix[MESSAGES][2];
    int left = 3 * n;

    for (int i = 0; i < n; i++) {
        struct iovec *frame = message[i].msg_hdr.msg_iov;

        prefix[i][0] = htonl(message[i].msg_len);
        prefix[i][1] = htonl(frame[0].iov_len);
        iov[3 * i] = (struct iovec) { prefix[i], sizeof(prefix[i]) };
        iov[3 * i + 1] = frame[0];
        iov[3 * i + 2] = (struct iovec) {
            frame[1].iov_base, message[i].msg_len - frame[0].iov_len,
        };
    }
    while (left) {
        ssize_t len = writev(out, at, left);

        if (len < 0 && errno != EINTR) {
            die("write to the stream: %s", strerror(errno));
        }
        while (len > 0 && (size_t)len >= at->iov_len) {
            len -= at++->iov_len;
            left--;
        }
        if (len > 0) {
            at->iov_base = (char *)at->iov_base + len;
            at->iov_len -= len;
        }
    }
}

static void drain_packets(Source *source, Tally *tally)
{
    struct virtio_net_hdr vnet[MESSAGES];
    struct iovec iov[MESSAGES][2];
    struct mmsghdr message[MESSAGES];
    int got;

    for (int i = 0; i < MESSAGES; i++) {
        iov[i][0] = (struct iovec) { &vnet[i], sizeof(vnet[i]) };
        iov[i][1] = (struct iovec) {
            source->data + i * (MAX_FRAME + 1), MAX_FRAME,
        };
        message[i] = (struct mmsghdr) {
            .msg_hdr = { .msg_iov = iov[i], .msg_iovlen = 2 },
        };
    }
    got = recvmmsg(source->fd, message, MESSAGES, MSG_DONTWAIT, NULL);
    source->closed = got < 0 && errno != EAGAIN;
    if (got > 0) {
        write_stream(message, got);
        tally->frames += got;
    }
}

int capture_main(const Options *o)
{
    Source source = { .fd = open_packet() };
    int size = 2 << 20;
    struct tpacket_stats stats;
    socklen_t len = sizeof(stats);
    Options one = *o;
    uint64_t cpu;
    Tally tally = { };

    if (o->targets != 2) {
        die("capture takes an interface and a stream");
    }
    if (setsockopt(source.fd, SOL_SOCKET, SO_RCVBUFFORCE, &size,
                   sizeof(size)) < 0) {
        die("SO_RCVBUFFORCE: %s", strerror(errno));
    }
    bind_packet(source.fd, o->target[0], ETH_P_ALL);
    source.data = allocate(MESSAGES * (MAX_FRAME + 1));
    cpu = cpu_ns();
    out = accept(open_unix(o->target[1], true), NULL, NULL);
    if (out < 0) {
        die("accept: %s", strerror(errno));
    }
    one.targets = 1;
    receive(&one, &source, drain_packets, &tally);
    cpu = cpu_ns() - cpu;
    if (getsockopt(source.fd, SOL_PACKET, PACKET_STATISTICS, &stats,
                   &len) < 0) {
        die("PACKET_STATISTICS: %s", strerror(errno));
    }
    printf("{\"drops\": %u, \"cpu_ns\": %" PRIu64 "}\n", stats.tp_drops, cpu);
    fflush(stdout);
    wait_for_end();             /* The peer still reads. */
    return 0;
}
