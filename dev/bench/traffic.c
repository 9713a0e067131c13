/*
 * The benchmark's load generators and receivers
 *
 *   traffic send FD...      send frames to packet sockets
 *   traffic write FD        write frames to a stream
 *   traffic read FD...      read frames from streams
 *   traffic tap FD...       read frames from TAPs
 *   traffic capture FD FD   write to a stream what a packet socket captures
 *
 * The driver has opened the files.  Packet sockets and TAPs have a virtio-net
 * header of 10 bytes before each frame.  The load is in the environment; see
 * class Load in contestants.py.  Each program prints one line of JSON, receivers
 * after "ready", and ends; "capture" goes on until it is killed.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <arpa/inet.h>
#include <netinet/ip.h>
#include <netinet/tcp.h>
#include <sys/param.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <linux/if_ether.h>
#include <linux/virtio_net.h>

#define SECOND 1000000000ull
#define MAX_FILES 128
#define MAX_FRAME 65535
#define SMALL_FRAME 64
#define VNET_HDR_LEN sizeof(struct virtio_net_hdr)
#define MAX_BATCH 256
#define MAX_BATCH_BYTES (1u << 20)
#define SILENCE_MS 300
#define STREAM_BUFFER (1u << 20)
#define MESSAGES 64
#define MAX_FRAMES (8u << 20)
#define MAGIC 0x62656e63

static struct {
    double rate;            /* frames per second */
    double seconds;
    unsigned size;          /* bytes of a frame without virtio-net header */
    unsigned batch_us;      /* send all that is due, and sleep so long */
    unsigned burst;         /* frames that go at once if the sender is late */
    unsigned written;       /* every so many frames goes to a TAP, as from its
                               guest: the last file of "send" */
    bool gso;               /* TCPv4 frames that have to be segmented */
    bool mix;               /* every second frame is a small one, no GSO */
    unsigned files;
    int fd[MAX_FILES];
} o;

/* The end of each frame, in the host's byte order */
typedef struct Record {
    uint32_t magic;
    uint32_t flow;          /* the number of the file */
    uint64_t number;        /* within the flow, from 0 */
    uint64_t ns;            /* CLOCK_MONOTONIC, when it was sent */
} Record;

static uint64_t read_clock(clockid_t clock)
{
    struct timespec ts;

    clock_gettime(clock, &ts);
    return ts.tv_sec * SECOND + ts.tv_nsec;
}

static uint64_t now_ns(void)
{
    return read_clock(CLOCK_MONOTONIC);
}

static void sleep_until(uint64_t when)
{
    struct timespec ts = { when / SECOND, when % SECOND };

    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &ts, NULL);
}

static void tell_ready(void)
{
    puts("ready");
    fflush(stdout);
}

/* Write frames as netfilters do, in one call. */
static void write_stream(int fd, const struct mmsghdr *message, unsigned count)
{
    struct iovec iov[3 * MAX_BATCH];
    uint32_t prefix[MAX_BATCH][2];
    unsigned n = 0;
    ssize_t total = 0;

    for (unsigned i = 0; i < count; i++) {
        const struct msghdr *msg = &message[i].msg_hdr;

        prefix[i][0] = htonl(message[i].msg_len);
        prefix[i][1] = htonl(VNET_HDR_LEN);
        iov[n++] = (struct iovec) { prefix[i], sizeof(prefix[i]) };
        for (unsigned j = 0; j < msg->msg_iovlen; j++) {
            iov[n++] = msg->msg_iov[j];
        }
        total += sizeof(prefix[i]) + message[i].msg_len;
    }
    /* It blocks until all is written. */
    if (writev(fd, iov, n) != total) {
        err(1, "write to the stream");
    }
}

/* The load */

/* Without the Record.  Nobody looks at the rest. */
static struct __attribute__((packed)) {
    struct virtio_net_hdr vnet;
    struct ethhdr eth;
    struct iphdr ip;
    struct tcphdr tcp;
    uint8_t payload[MAX_FRAME];
} large, small;

static uint64_t sent, refused;

static void make_packets(void)
{
    small.eth = (struct ethhdr) {
        .h_dest = { 2, 0, 0, 0, 0, 2 },
        .h_source = { 2, 0, 0, 0, 0, 1 },
        .h_proto = htons(ETH_P_802_EX1),
    };
    large.eth = small.eth;
    if (o.gso) {
        large.vnet = (struct virtio_net_hdr) {
            .flags = VIRTIO_NET_HDR_F_NEEDS_CSUM,
            .gso_type = VIRTIO_NET_HDR_GSO_TCPV4,
            .hdr_len = 54,
            .gso_size = 1448,
            .csum_start = 34,
            .csum_offset = 16,
        };
        large.eth.h_proto = htons(ETH_P_IP);
        large.ip = (struct iphdr) {
            .version = 4,
            .ihl = 5,
            .tot_len = htons(o.size - ETH_HLEN),
            .ttl = 64,
            .protocol = IPPROTO_TCP,
        };
        large.tcp.doff = 5;
    }
}

static void send_messages(struct mmsghdr *message, uint64_t first,
                          unsigned count)
{
    unsigned done = 0;

    while (done < count) {
        /* One call for all goes to one file. */
        unsigned part = o.files > 1 || o.written ? 1 : count - done;
        uint64_t number = first + done;
        int ret;

        if (o.written && number % o.written == 0) {
            ret = writev(o.fd[o.files], message[done].msg_hdr.msg_iov, 2) < 0 ?
                  -1 : 1;
        } else {
            ret = sendmmsg(o.fd[number % o.files], message + done, part, 0);
        }
        if (ret > 0) {
            done += ret;
            sent += ret;
        } else if (errno == ENOBUFS) {
            /* The interface is full. */
            refused++;
            done++;
        } else {
            err(1, "send");
        }
    }
}

static void emit(bool to_stream, uint64_t first, unsigned count)
{
    Record record[MAX_BATCH];
    struct iovec iov[MAX_BATCH][2];
    struct mmsghdr message[MAX_BATCH];
    uint64_t now = now_ns();

    for (unsigned i = 0; i < count; i++) {
        uint64_t number = first + i;
        bool is_small = o.mix && number % 2;
        size_t len = VNET_HDR_LEN + (is_small ? SMALL_FRAME : o.size);

        record[i] = (Record) {
            MAGIC, number % o.files, number / o.files, now
        };
        iov[i][0] = (struct iovec) {
            is_small ? &small : &large, len - sizeof(Record)
        };
        iov[i][1] = (struct iovec) { &record[i], sizeof(Record) };
        message[i] = (struct mmsghdr) {
            .msg_hdr = { .msg_iov = iov[i], .msg_iovlen = 2 },
            .msg_len = len,
        };
    }
    if (to_stream) {
        write_stream(o.fd[0], message, count);
        sent += count;
    } else {
        send_messages(message, first, count);
    }
}

static void generate(bool to_stream)
{
    uint64_t cpu = read_clock(CLOCK_PROCESS_CPUTIME_ID);
    uint64_t start = now_ns(), tick = start;
    /* Then the rate is out of reach. */
    uint64_t end = start + (o.seconds + 1) * SECOND;
    uint64_t total = o.rate * o.seconds, due = 0, i = 0;
    unsigned most = MIN(o.burst, MIN(MAX_BATCH, MAX_BATCH_BYTES / o.size));

    make_packets();
    while (i < total && now_ns() < end) {
        unsigned count;
        uint64_t now;

        if (i == due) {
            /* Without it spin, so that a frame goes when it is due. */
            if (o.batch_us) {
                sleep_until(tick);
            }
            now = now_ns();
            tick = MAX(tick + o.batch_us * 1000, now);
            due = MIN(total, (now - start) / 1e9 * o.rate + 1);
        }
        count = MIN(due - i, most);
        emit(to_stream, i, count);
        i += count;
    }
    cpu = read_clock(CLOCK_PROCESS_CPUTIME_ID) - cpu;
    printf("{\"sent\": %" PRIu64 ", \"refused\": %" PRIu64 ", \"cpu_ns\": %"
           PRIu64 ", \"ns\": %" PRIu64 "}\n",
           sent, refused, cpu, now_ns() - start);
}

/* The receivers */

static struct {
    uint64_t frames;
    uint64_t next[MAX_FILES];   /* the least number that may come */
    uint32_t latency[MAX_FRAMES];
} tally;

static void tally_frame(const uint8_t *frame, size_t len, uint64_t now)
{
    Record record = { 0 };

    if (len == o.size || (o.mix && len == SMALL_FRAME)) {
        memcpy(&record, frame + len - sizeof(record), sizeof(record));
    }
    if (record.magic != MAGIC || record.flow >= o.files) {
        errx(1, "a frame that was not sent, of %zu bytes", len);
    }
    if (record.number < tally.next[record.flow]) {
        errx(1, "frame %" PRIu64 " came twice or too late", record.number);
    }
    tally.next[record.flow] = record.number + 1;
    if (tally.frames == MAX_FRAMES) {
        errx(1, "more frames than can be counted");
    }
    tally.latency[tally.frames++] = MIN(now - record.ns, UINT32_MAX);
}

static int compare(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

    return x < y ? -1 : x > y;
}

/* Receive until as many frames have come as the standard input tells. */
static void receive(void (*drain)(unsigned))
{
    struct pollfd fds[MAX_FILES + 1];
    struct pollfd *told = &fds[o.files];
    uint64_t expected = UINT64_MAX;

    for (unsigned i = 0; i < o.files; i++) {
        fds[i] = (struct pollfd) { .fd = o.fd[i], .events = POLLIN };
    }
    *told = (struct pollfd) { .fd = STDIN_FILENO, .events = POLLIN };
    tell_ready();
    while (tally.frames < expected &&
           poll(fds, o.files + 1, told->fd < 0 ? SILENCE_MS : -1) > 0) {
        for (unsigned i = 0; i < o.files; i++) {
            if (fds[i].revents) {
                drain(i);
            }
        }
        if (told->revents) {
            if (scanf("%" SCNu64, &expected) != 1) {
                errx(1, "how many frames were sent?");
            }
            told->fd = -1;
        }
    }
    qsort(tally.latency, tally.frames, sizeof(*tally.latency), compare);
    printf("{\"frames\": %" PRIu64 ", \"p50_ns\": %" PRIu32
           ", \"p99_ns\": %" PRIu32 "}\n", tally.frames,
           tally.latency[tally.frames / 2],
           tally.latency[tally.frames * 99 / 100]);
}

static uint32_t get32(const uint8_t *from)
{
    uint32_t value;

    memcpy(&value, from, sizeof(value));
    return ntohl(value);
}

static void drain_stream(unsigned i)
{
    static struct Stream {
        uint8_t data[STREAM_BUFFER];
        size_t used;
    } streams[MAX_FILES];
    struct Stream *stream = &streams[i];
    ssize_t len = recv(o.fd[i], stream->data + stream->used,
                       STREAM_BUFFER - stream->used, 0);
    uint64_t now = now_ns();
    size_t at = 0;

    if (len <= 0) {
        errx(1, "the stream was closed");
    }
    stream->used += len;
    while (stream->used - at >= 8) {
        const uint8_t *frame = stream->data + at + 8;
        uint32_t size = get32(frame - 8), vnet_hdr_len = get32(frame - 4);

        if (size > MAX_FRAME + 64 || vnet_hdr_len > size) {
            errx(1, "invalid frame length %" PRIu32, size);
        }
        if (stream->used - at - 8 < size) {
            break;
        }
        tally_frame(frame + vnet_hdr_len, size - vnet_hdr_len, now);
        at += 8 + size;
    }
    stream->used -= at;
    memmove(stream->data, stream->data + at, stream->used);
}

static void drain_tap(unsigned i)
{
    static uint8_t packet[VNET_HDR_LEN + MAX_FRAME];

    for (int n = 0; n < MESSAGES; n++) {
        ssize_t len = read(o.fd[i], packet, sizeof(packet));

        if (len < 0) {
            break;
        }
        tally_frame(packet + VNET_HDR_LEN, len - VNET_HDR_LEN, now_ns());
    }
}

/* The bare loop */
static void capture(void)
{
    static uint8_t packet[MESSAGES][VNET_HDR_LEN + MAX_FRAME];
    struct pollfd fds = { .fd = o.fd[0], .events = POLLIN };
    struct iovec iov[MESSAGES];
    struct mmsghdr message[MESSAGES];
    int got;

    tell_ready();
    while (poll(&fds, 1, -1) > 0) {
        for (int i = 0; i < MESSAGES; i++) {
            iov[i] = (struct iovec) { packet[i], sizeof(packet[i]) };
            message[i] = (struct mmsghdr) {
                .msg_hdr = { .msg_iov = &iov[i], .msg_iovlen = 1 },
            };
        }
        got = recvmmsg(o.fd[0], message, MESSAGES, MSG_DONTWAIT, NULL);
        if (got < 0) {
            err(1, "recvmmsg");
        }
        for (int i = 0; i < got; i++) {
            iov[i].iov_len = message[i].msg_len;
        }
        write_stream(o.fd[1], message, got);
    }
}

static double option(const char *name)
{
    const char *value = getenv(name);

    return value ? atof(value) : 0;
}

int main(int argc, char **argv)
{
    const char *program = argc < 3 ? "" : argv[1];

    o.rate = option("rate");
    o.seconds = option("seconds");
    o.size = option("size");
    o.batch_us = option("batch_us");
    o.burst = option("burst");
    o.written = option("written");
    o.gso = option("gso");
    o.mix = option("mix");
    for (int i = 2; i < MIN(argc, MAX_FILES + 2); i++) {
        o.fd[o.files++] = atoi(argv[i]);
    }
    prctl(PR_SET_TIMERSLACK, 1);
    if (!strcmp(program, "send")) {
        o.files -= o.written > 0;
        generate(false);
    } else if (!strcmp(program, "write")) {
        generate(true);
    } else if (!strcmp(program, "read")) {
        receive(drain_stream);
    } else if (!strcmp(program, "tap")) {
        receive(drain_tap);
    } else if (!strcmp(program, "capture")) {
        capture();
    } else {
        errx(1, "which program?  See the start of traffic.c");
    }
    return 0;
}
