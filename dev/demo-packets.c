/*
 * Numbered UDP packets: sent at a steady rate, and counted.
 *
 *   demo-packets send ADDRESS PORT RATE RUN
 *       Send RATE packets per second of the run RUN until SIGTERM, then
 *       print how many were sent.
 *
 *   demo-packets receive PORT TTY
 *       Remember how often each packet came.  Answer on TTY, a line each;
 *       a number before the request comes back before the answer: "ID hello"
 *       with "ID ready"; "ID count RUN" with the number of packets that came;
 *       "ID report RUN SENT" with "ID LOST DUPLICATED FIRST LAST", the last
 *       two being the numbers of the first and the last packet lost, or -1.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define MAGIC   0x6e756d62u
#define RUNS    4u
#define NUMBERS (1u << 20)
#define SECOND  1000000000ll

/* In network byte order. */
struct packet {
    uint32_t magic;
    uint32_t run;
    uint32_t number;
    uint32_t padding[13];
};

/* How often each packet came, and all packets of a run together. */
static uint8_t seen[RUNS][NUMBERS];
static uint32_t total[RUNS];

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

static int open_tty(const char *name)
{
    struct termios mode;
    int fd = open(name, O_RDWR | O_NOCTTY);

    if (fd < 0 || tcgetattr(fd, &mode) < 0) {
        die(name);
    }
    cfmakeraw(&mode);
    tcsetattr(fd, TCSANOW, &mode);
    return fd;
}

static void receive_all(int fd)
{
    struct packet packet;
    uint32_t run, number;
    ssize_t got;

    while ((got = recv(fd, &packet, sizeof(packet), MSG_DONTWAIT)) >= 0) {
        run = ntohl(packet.run);
        number = ntohl(packet.number);
        if (got != sizeof(packet) || packet.magic != htonl(MAGIC) ||
            run >= RUNS || number >= NUMBERS) {
            continue;
        }
        total[run]++;
        if (seen[run][number] < UINT8_MAX) {
            seen[run][number]++;
        }
    }
}

static void report(int tty, uint32_t id, uint32_t run, uint32_t sent)
{
    uint32_t lost = 0, duplicated = 0;
    long first = -1, last = -1;

    for (uint32_t i = 0; i < NUMBERS; i++) {
        if (seen[run][i] > 1) {
            duplicated += seen[run][i] - 1;
        }
        if (i < sent && !seen[run][i]) {
            lost++;
            first = first < 0 ? i : first;
            last = i;
        }
    }
    dprintf(tty, "%u %u %u %ld %ld\n", id, lost, duplicated, first, last);
}

static void answer(int tty, const char *line)
{
    uint32_t id, run, sent;
    int skip = 0;

    if (sscanf(line, "%u %n", &id, &skip) != 1) {
        return;
    }
    line += skip;
    if (!strcmp(line, "hello")) {
        dprintf(tty, "%u ready\n", id);
    } else if (sscanf(line, "count %u", &run) == 1 && run < RUNS) {
        dprintf(tty, "%u %u\n", id, total[run]);
    } else if (sscanf(line, "report %u %u", &run, &sent) == 2 &&
               run < RUNS && sent <= NUMBERS) {
        report(tty, id, run, sent);
    } else {
        dprintf(tty, "%u unknown: %s\n", id, line);
    }
}

static void receive_packets(int port, const char *tty_name)
{
    int fd = open_socket(port);
    struct pollfd tty = { .fd = open_tty(tty_name), .events = POLLIN };
    char line[80];
    size_t length = 0;
    char c;

    for (;;) {
        /*
         * Not woken by each packet, which would take most of the time of a
         * guest that is emulated by an emulated machine.
         */
        if (poll(&tty, 1, 200) < 0) {
            die("poll");
        }
        receive_all(fd);
        if (!tty.revents || read(tty.fd, &c, 1) != 1) {
            continue;
        }
        if (c != '\n') {
            length = length < sizeof(line) - 1 ? length : 0;
            line[length++] = c;
            continue;
        }
        line[length] = '\0';
        length = 0;
        answer(tty.fd, line);
    }
}

int main(int argc, char **argv)
{
    if (argc == 6 && !strcmp(argv[1], "send") && atoi(argv[4]) > 0) {
        send_packets(argv[2], atoi(argv[3]), atoi(argv[4]), atoi(argv[5]));
        return 0;
    }
    if (argc == 4 && !strcmp(argv[1], "receive")) {
        receive_packets(atoi(argv[2]), argv[3]);
    }
    fprintf(stderr, "usage: demo-packets send ADDRESS PORT RATE RUN\n"
                    "       demo-packets receive PORT TTY\n");
    return 2;
}
