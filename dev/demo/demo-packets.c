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
 *       "ID report RUN SENT" with "ID LOST DUPLICATED FIRST LAST LATE DEPTH":
 *       the numbers of the first and the last packet lost, or -1; how many
 *       packets came after one with a higher number, and how much higher that
 *       was at most;
 *       "ID run COMMAND" with what COMMAND, run by a shell, prints.
 *
 *   demo-packets own INTERFACE
 *       In the background, print the EtherType of each packet that comes to
 *       INTERFACE from INTERFACE's own address.
 *
 *   demo-packets queues INTERFACE NUMBER
 *       Have INTERFACE use NUMBER pairs of queues.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/ethtool.h>
#include <linux/filter.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/sockios.h>
#include <net/if.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define MAGIC   0x6e756d62u
#define RUNS    64u
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

/* The highest number that came, and what came later with a lower one. */
static uint32_t highest[RUNS];
static uint32_t late[RUNS];
static uint32_t depth[RUNS];

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
        if (number >= highest[run]) {
            highest[run] = number;
        } else if (!seen[run][number]) {
            late[run]++;
            if (depth[run] < highest[run] - number) {
                depth[run] = highest[run] - number;
            }
        }
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
    dprintf(tty, "%u %u %u %ld %ld %u %u\n", id, lost, duplicated, first,
            last, late[run], depth[run]);
}

/*
 * The answer is one line, whatever the command prints.  The command may take
 * longer than the socket has room for packets.
 */
static void run_command(int tty, int fd, uint32_t id, const char *command)
{
    char out[2000];
    size_t length = 0;
    ssize_t got = 1;
    FILE *pipe = popen(command, "r");
    struct pollfd from = { .events = POLLIN };

    if (!pipe) {
        die(command);
    }
    from.fd = fileno(pipe);
    while (got > 0 && length < sizeof(out) - 1) {
        if (poll(&from, 1, 200) > 0) {
            got = read(from.fd, out + length, sizeof(out) - 1 - length);
            length += got > 0 ? got : 0;
        }
        receive_all(fd);
    }
    pclose(pipe);
    out[length] = '\0';
    for (char *c = out; *c; c++) {
        *c = *c == '\n' ? ' ' : *c;
    }
    dprintf(tty, "%u %s\n", id, out);
}

static void answer(int tty, int fd, const char *line)
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
    } else if (!strncmp(line, "run ", 4)) {
        run_command(tty, fd, id, line + 4);
    } else {
        dprintf(tty, "%u unknown: %s\n", id, line);
    }
}

static void receive_packets(int port, const char *tty_name)
{
    int fd = open_socket(port);
    struct pollfd tty = { .fd = open_tty(tty_name), .events = POLLIN };
    char line[500];
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
        answer(tty.fd, fd, line);
    }
}

static int open_interface(const char *name, struct ifreq *request)
{
    int fd = socket(AF_PACKET, SOCK_RAW, 0);

    snprintf(request->ifr_name, sizeof(request->ifr_name), "%s", name);
    if (fd < 0 || ioctl(fd, SIOCGIFHWADDR, request) < 0) {
        die(name);
    }
    return fd;
}

static void show_own(const char *interface)
{
    struct ifreq request = { 0 };
    int fd = open_interface(interface, &request);
    const uint8_t *own = (const uint8_t *)request.ifr_hwaddr.sa_data;
    struct sockaddr_ll address = {
        .sll_family = AF_PACKET, .sll_protocol = htons(ETH_P_ALL),
        .sll_ifindex = if_nametoindex(interface),
    };
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, SKF_AD_OFF + SKF_AD_PKTTYPE),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, PACKET_OUTGOING, 5, 0),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, ETH_ALEN),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K,
                 (uint32_t)own[0] << 24 | own[1] << 16 | own[2] << 8 | own[3],
                 0, 3),
        BPF_STMT(BPF_LD | BPF_H | BPF_ABS, ETH_ALEN + 4),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, own[4] << 8 | own[5], 0, 1),
        BPF_STMT(BPF_RET | BPF_K, UINT32_MAX),
        BPF_STMT(BPF_RET | BPF_K, 0),
    };
    struct sock_fprog program = { sizeof(code) / sizeof(code[0]), code };
    struct ethhdr header;

    if (setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &program,
                   sizeof(program)) < 0 ||
        bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0 ||
        daemon(1, 1) < 0) {
        die(interface);
    }
    while (recv(fd, &header, sizeof(header), 0) == sizeof(header)) {
        printf("%04x\n", ntohs(header.h_proto));
        fflush(stdout);
    }
    die("recv");
}

static void set_queues(const char *interface, int number)
{
    struct ifreq request = { 0 };
    struct ethtool_channels channels = { .cmd = ETHTOOL_GCHANNELS };
    int fd = open_interface(interface, &request);

    request.ifr_data = (char *)&channels;
    if (ioctl(fd, SIOCETHTOOL, &request) < 0) {
        die(interface);
    }
    channels.cmd = ETHTOOL_SCHANNELS;
    channels.combined_count = number;
    if (ioctl(fd, SIOCETHTOOL, &request) < 0) {
        die(interface);
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
    if (argc == 3 && !strcmp(argv[1], "own")) {
        show_own(argv[2]);
    }
    if (argc == 4 && !strcmp(argv[1], "queues")) {
        set_queues(argv[2], atoi(argv[3]));
        return 0;
    }
    fprintf(stderr, "usage: demo-packets send ADDRESS PORT RATE RUN\n"
                    "       demo-packets receive PORT TTY\n"
                    "       demo-packets own INTERFACE\n"
                    "       demo-packets queues INTERFACE NUMBER\n");
    return 2;
}
