/*
 * Numbered UDP packets: sent at a steady rate, and counted.
 *
 *   demo-packets send ADDRESS PORT RATE RUN
 *       Send RATE packets per second of the run RUN until SIGTERM, then
 *       print how many were sent.
 *
 *   demo-packets receive PORT
 *       Remember how often each packet came.
 *
 *   demo-packets count RUN
 *       Print the number of packets that came.
 *
 *   demo-packets report RUN SENT
 *       Print "LOST DUPLICATED FIRST LAST LATE DEPTH": FIRST and LAST are the
 *       numbers of the first and the last packet lost, or -1; LATE packets
 *       came after one with a higher number, by up to DEPTH.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAGIC   0x6e756d62u
#define RUNS    64u
#define NUMBERS (1u << 20)
#define SECOND  1000000000ll
#define FILENAME "/run/demo-packets"

/* In network byte order. */
struct packet {
    uint32_t magic;
    uint32_t run;
    uint32_t number;
    uint32_t padding[13];
};

/* What came of a run.  All runs are in a file. */
struct run {
    uint32_t total;
    uint32_t highest;           /* number that came */
    uint32_t late;              /* packets after one with a higher number */
    uint32_t depth;             /* how much higher it was at most */
    uint8_t seen[NUMBERS];      /* how often each packet came */
};

static volatile sig_atomic_t stopped;

static void die(const char *what)
{
    fprintf(stderr, "demo-packets: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void stop(int signum)
{
    (void)signum;
    stopped = 1;
}

static long long now(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * SECOND + ts.tv_nsec;
}

static void sleep_until(long long when)
{
    struct timespec ts = { when / SECOND, when % SECOND };

    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &ts, NULL);
}

static void send_packets(const char *address, int port, int rate,
                         uint32_t run)
{
    struct sockaddr_in to = {
        .sin_family = AF_INET, .sin_port = htons(port),
    };
    struct sigaction action = { .sa_handler = stop };
    struct packet packet = { htonl(MAGIC), htonl(run), 0, { 0 } };
    uint32_t number = 0;
    long long next = now();
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    if (fd < 0 || inet_pton(AF_INET, address, &to.sin_addr) != 1 ||
        connect(fd, (struct sockaddr *)&to, sizeof(to)) < 0) {
        die(address);
    }
    sigaction(SIGTERM, &action, NULL);
    while (!stopped && number < NUMBERS) {
        packet.number = htonl(number);
        if (send(fd, &packet, sizeof(packet), 0) == sizeof(packet)) {
            number++;
        } else if (errno != EINTR && errno != ENOBUFS) {
            die("send");
        }
        next += SECOND / rate;
        /* Steady means no burst after the machine was held up. */
        if (now() - next > SECOND / 20) {
            next = now();
        }
        sleep_until(next);
    }
    printf("%u\n", number);
}

static int open_socket(int port)
{
    struct sockaddr_in local = {
        .sin_family = AF_INET, .sin_port = htons(port),
    };
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    int size = 16 << 20;

    if (fd < 0 ||
        setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof(size)) < 0 ||
        bind(fd, (struct sockaddr *)&local, sizeof(local)) < 0) {
        die("socket");
    }
    return fd;
}

static struct run *open_runs(void)
{
    size_t size = RUNS * sizeof(struct run);
    int fd = open(FILENAME, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    void *runs;

    if (fd < 0 || ftruncate(fd, size) < 0) {
        die(FILENAME);
    }
    runs = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (runs == MAP_FAILED) {
        die(FILENAME);
    }
    return runs;
}

static void count(struct run *run, uint32_t number)
{
    run->total++;
    if (number >= run->highest) {
        run->highest = number;
    } else if (!run->seen[number]) {
        run->late++;
        if (run->depth < run->highest - number) {
            run->depth = run->highest - number;
        }
    }
    if (run->seen[number] < UINT8_MAX) {
        run->seen[number]++;
    }
}

static void receive_packets(int port)
{
    struct run *runs = open_runs();
    int fd = open_socket(port);
    struct packet packet;
    uint32_t run, number;
    ssize_t got;

    for (;;) {
        while ((got = recv(fd, &packet, sizeof(packet), MSG_DONTWAIT)) >= 0) {
            run = ntohl(packet.run);
            number = ntohl(packet.number);
            if (got == sizeof(packet) && packet.magic == htonl(MAGIC) &&
                run < RUNS && number < NUMBERS) {
                count(&runs[run], number);
            }
        }
        /*
         * Not woken by each packet, which would take most of the time of a
         * guest that is emulated by an emulated machine.
         */
        sleep_until(now() + SECOND / 5);
    }
}

static void report(const struct run *run, uint32_t sent)
{
    uint32_t lost = 0, duplicated = 0;
    long first = -1, last = -1;

    for (uint32_t i = 0; i < NUMBERS && (i < sent || i <= run->highest); i++) {
        if (run->seen[i] > 1) {
            duplicated += run->seen[i] - 1;
        }
        if (i < sent && !run->seen[i]) {
            lost++;
            first = first < 0 ? i : first;
            last = i;
        }
    }
    printf("%u %u %ld %ld %u %u\n", lost, duplicated, first, last, run->late,
           run->depth);
}

int main(int argc, char **argv)
{
    uint32_t run = argc > 2 ? atoi(argv[2]) : 0;

    if (argc == 6 && !strcmp(argv[1], "send") && atoi(argv[4]) > 0) {
        send_packets(argv[2], atoi(argv[3]), atoi(argv[4]), atoi(argv[5]));
        return 0;
    }
    if (argc == 3 && !strcmp(argv[1], "receive")) {
        receive_packets(atoi(argv[2]));
    }
    if (argc == 3 && !strcmp(argv[1], "count") && run < RUNS) {
        printf("%u\n", open_runs()[run].total);
        return 0;
    }
    if (argc == 4 && !strcmp(argv[1], "report") && run < RUNS) {
        report(&open_runs()[run], atoi(argv[3]));
        return 0;
    }
    fprintf(stderr, "demo-packets: for usage see the head of its source\n");
    return 2;
}
