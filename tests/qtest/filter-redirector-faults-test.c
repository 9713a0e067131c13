/*
 * QTest testcase for filter-redirector on a TAP with vhost: faults
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Peers, interfaces, the kernel and the guest let QEMU down, and the VM, its
 * monitor and its other filters go on.  System calls fail by way of
 * fault-preload.so.
 *
 * Each VM has a second TAP with a redirector that nothing is done to.
 */

#include "qemu/osdep.h"
#include <sched.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <linux/if_ether.h>
#include "fault-preload.h"
#include "filter-redirector-rig.h"
#include "libqos/pci-pc.h"
#include "libqos/virtio.h"
#include "qemu/atomic.h"
#include "qemu/bswap.h"
#include "qemu/cutils.h"
#include "qemu/units.h"

#define BOTH CAPTURE "tx " INJECT "tx"
#define REWRITER "-object filter-rewriter,id=flt,netdev=n0"
#define OTHER_TAP "tapother"
#define LONG_FRAME 1500
#define BUFFER_SIZE (16 * MiB)          /* of peer/all */
#define FOREVER UINT_MAX

/* Of QEMU's CPU time: a loop that does not wait takes all. */
#define IDLE_PERCENT 75

/* System calls that fail */

static FaultControl *faults;

static const char *const call_names[FAULT_CALLS] = {
    [FAULT_SOCKET] = "socket", [FAULT_SETSOCKOPT] = "setsockopt",
    [FAULT_GETSOCKOPT] = "getsockopt", [FAULT_BIND] = "bind",
    [FAULT_MMAP] = "mmap", [FAULT_RECVMSG] = "recvmsg",
    [FAULT_SENDMMSG] = "sendmmsg", [FAULT_IOCTL] = "ioctl",
    [FAULT_POLL] = "timerfd_create, epoll_ctl", [FAULT_WRITE_OUT] = "sendmsg",
    [FAULT_READ_IN] = "recvmsg", [FAULT_WRITE_TAP] = "writev",
};

static void fail_after(FaultCall call, int error, unsigned skip,
                       unsigned times)
{
    Fault *fault = &faults->fault[call];

    fault->error = error;
    fault->skip = skip;
    qatomic_set(&fault->failed, 0);
    qatomic_set(&fault->times, times);
}

static void fail(FaultCall call, int error, unsigned times)
{
    fail_after(call, error, 0, times);
}

static unsigned failed(FaultCall call)
{
    return qatomic_read(&faults->fault[call].failed);
}

/* Returns how many did fail. */
static unsigned fail_no_more(FaultCall call)
{
    qatomic_set(&faults->fault[call].times, 0);
    return failed(call);
}

static void expect_failed(FaultCall call, unsigned times)
{
    WAIT_UNTIL(failed(call) >= times);
}

/* A monitor of its own, which is asked all the time in WATCHED tests */

static struct {
    int fd[2];              /* ours, QEMU's */
    GThread *thread;
    GThread *machine;
    bool stop;
    bool pause;
    unsigned rounds;
    gint64 longest_us;      /* that it took to answer */
    gint64 cpu_us;          /* the longest that we had to wait for a CPU */
} monitor;

static void *monitor_thread(void *opaque)
{
    /* Not to write as well: an event may be in its buffer at that time. */
    FILE *stream = fdopen(dup(monitor.fd[0]), "r");
    g_autofree char *line = g_malloc(64 * KiB);

    g_assert_nonnull(fgets(line, 64 * KiB, stream));
    dprintf(monitor.fd[0], "{\"execute\": \"qmp_capabilities\"}\n");
    g_assert_nonnull(fgets(line, 64 * KiB, stream));
    while (!qatomic_read(&monitor.stop)) {
        gint64 start = g_get_monotonic_time();

        if (!qatomic_read(&monitor.pause)) {
            dprintf(monitor.fd[0], "{\"execute\": \"query-status\"}\n");
            do {
                g_assert_nonnull(fgets(line, 64 * KiB, stream));
            } while (!g_str_has_prefix(line, "{\"return\""));
            monitor.longest_us = MAX(monitor.longest_us,
                                     g_get_monotonic_time() - start);
            monitor.rounds++;
        }
        g_usleep(2000);
    }
    fclose(stream);
    return NULL;
}

/* The machine may have other things to do. */
static void *machine_thread(void *opaque)
{
    while (!qatomic_read(&monitor.stop)) {
        gint64 start = g_get_monotonic_time();

        g_usleep(1000);
        monitor.cpu_us = MAX(monitor.cpu_us,
                             g_get_monotonic_time() - start - 1000);
    }
    return NULL;
}

static void monitor_begin(void)
{
    monitor.stop = false;
    monitor.rounds = 0;
    monitor.longest_us = monitor.cpu_us = 0;
    monitor.machine = g_thread_new("machine", machine_thread, NULL);
    monitor.thread = g_thread_new("monitor", monitor_thread, NULL);
}

static void monitor_end(void)
{
    qatomic_set(&monitor.stop, true);
    g_thread_join(monitor.thread);
    g_thread_join(monitor.machine);
    g_test_message("longest monitor round trip of %u: %.1f ms; longest wait "
                   "for a CPU: %.1f ms", monitor.rounds,
                   monitor.longest_us / 1e3, monitor.cpu_us / 1e3);
    g_assert_cmpuint(monitor.rounds, >, 0);
    /* Several threads take part in it. */
    g_assert_cmpint(monitor.longest_us, <, 100 * 1000 + 3 * monitor.cpu_us);
}

/* What QEMU uses */

static int64_t clock_ns(clockid_t clock)
{
    struct timespec ts;

    g_assert_cmpint(clock_gettime(clock, &ts), ==, 0);
    return ts.tv_sec * 1000000000ll + ts.tv_nsec;
}

/* This one does sleep, since it is time that it looks at. */
static void expect_idle(Fixture *f, const char *what)
{
    clockid_t cpu;
    int64_t used, passed;
    double percent;
    int tries = 10;

    g_assert_cmpint(clock_getcpuclockid(qtest_pid(f->qts), &cpu), ==, 0);
    /* Questions at this rate cost something as well. */
    qatomic_set(&monitor.pause, true);
    do {
        /* An emulated CPU that has to wait for a real one counts that, too. */
        used = clock_ns(cpu);
        passed = clock_ns(CLOCK_MONOTONIC);
        g_usleep(amount(500, 1500) * 1000);
        used = clock_ns(cpu) - used;
        passed = clock_ns(CLOCK_MONOTONIC) - passed;
        percent = 100.0 * used / passed;
        g_test_message("%s: QEMU uses %.1f %% of a CPU", what, percent);
    } while (percent >= IDLE_PERCENT && --tries);
    qatomic_set(&monitor.pause, false);
    g_assert_cmpfloat(percent, <, IDLE_PERCENT);
}

/* While a call fails and fails */
static void expect_idle_failing(Fixture *f, FaultCall call)
{
    g_autofree char *what = g_strdup_printf("%s: %s", call_names[call],
                                    strerror(faults->fault[call].error));

    expect_failed(call, 1);
    expect_idle(f, what);
}

/* In bytes */
static size_t memory(Fixture *f)
{
    g_autofree char *path = g_strdup_printf("/proc/%d/status",
                                            qtest_pid(f->qts));
    g_autofree char *text = NULL;
    const char *line;

    g_assert_true(g_file_get_contents(path, &text, NULL, NULL));
    line = strstr(text, "RssAnon:");
    g_assert_nonnull(line);
    return g_ascii_strtoull(line + strlen("RssAnon:"), NULL, 10) * KiB;
}

/* What waits in the queues of the capturing sockets, as the kernel counts */
static size_t socket_memory(void)
{
    FILE *file = fopen("/proc/net/packet", "r");
    unsigned protocol, bytes;
    size_t sum = 0;
    char line[128];

    while (fgets(line, sizeof(line), file)) {
        if (sscanf(line, "%*s %*s %*s %x %*s %*s %u", &protocol, &bytes) == 2 &&
            protocol == ETH_P_ALL) {
            sum += bytes;
        }
    }
    fclose(file);
    return sum;
}

/* What QEMU says in HEARD tests */

#define MESSAGES "messages"     /* a file in the fixture's directory */

static unsigned count_messages(Fixture *f, const char *text)
{
    g_autofree char *path = g_build_filename(f->dir, MESSAGES, NULL);
    g_autofree char *all = NULL;
    unsigned count = 0;

    g_assert_true(g_file_get_contents(path, &all, NULL, NULL));
    for (const char *at = all; (at = strstr(at, text)); at++) {
        count++;
    }
    return count;
}

/* Wait for a message; it must not come more often than that. */
static void G_GNUC_PRINTF(3, 4)
expect_message(Fixture *f, unsigned count, const char *format, ...)
{
    g_autofree char *text = NULL;
    va_list ap;

    va_start(ap, format);
    text = g_strdup_vprintf(format, ap);
    va_end(ap);
    g_test_message("%u times: %s", count, text);
    WAIT_UNTIL(count_messages(f, text) >= count);
    g_assert_cmpuint(count_messages(f, text), ==, count);
}

/* VM */

static Fixture other;           /* only its host and out, of the second TAP */
static uint32_t other_number;

/* What is done for a test, and expected of it at its end */
#define STARTED 1                       /* There is the guest's driver ... */
#define POSTED (STARTED | 2)            /* ... with all buffers posted. */
#define WATCHED 4                       /* QEMU's monitor answers. */
#define HEARD 8                         /* for expect_message() */
#define FALLBACK 16                     /* See HAS_FALLBACK. */

typedef struct FaultTest {
    const char *path;
    void (*func)(Fixture *f);
    const char *args;
    unsigned flags;
} FaultTest;

static void expect_other(void)
{
    host_send(&other, other_number, 10);
    expect_out(&other, other_number, 10);
    other_number += 10;
}

static void add_other(Fixture *f)
{
    object_add(f, "-object filter-redirector,id=other,netdev=other,queue=tx,"
               "outdev=other,vnet_hdr_support=on,packet-socket=on");
    expect_other();
}

static void vm_start(Fixture *f, const FaultTest *test)
{
    g_autofree char *netdev = NULL, *args = NULL, *messages = NULL;

    memset(faults, 0, sizeof(*faults));
    g_assert_cmpint(socketpair(AF_UNIX, SOCK_STREAM, 0, monitor.fd), ==, 0);
    fixture_name(f);
    if (test->flags & HEARD) {
        messages = g_strdup_printf("2>%s/" MESSAGES, f->dir);
    }
    netdev = g_strdup_printf("ifname=%s,script=no,downscript=no,vhost=on",
                             f->ifname);
    args = g_strdup_printf("-chardev socket,id=mon,fd=%d "
                           "-mon chardev=mon,mode=control "
                           "-netdev tap,id=other,ifname=" OTHER_TAP ","
                           "script=no,downscript=no %s %s", monitor.fd[1],
                           test->args, messages ?: "");
    fixture_init_named(f, netdev, "", args);

    other.out = add_peer(f, "other");
    set_interface_up(OTHER_TAP, true);
    other.host = open_host(OTHER_TAP);
    add_other(f);
}

static void vm_quit(Fixture *f)
{
    expect_other();
    close(other.out);
    close(other.host);
    close(monitor.fd[0]);
    close(monitor.fd[1]);
    fixture_close(f);
}

static void guest_begin(Fixture *f)
{
    guest_start(f);
    guest_post_all(f);
}

static void run_fault_test(const void *data)
{
    const FaultTest *test = data;
    Fixture f;

    vm_start(&f, test);
    if (test->flags & STARTED) {
        guest_start(&f);
    }
    if ((test->flags & POSTED) == POSTED) {
        guest_post_all(&f);
    }
    if (test->flags & WATCHED) {
        monitor_begin();
    }
    test->func(&f);
    if (test->flags & WATCHED) {
        monitor_end();
    }
    vm_quit(&f);
}

/* What comes to a guest that posts all buffers */

typedef struct Expected {
    uint32_t first;
    uint32_t next;
    uint32_t end;
} Expected;

static void expected_frame(void *opaque, uint32_t number)
{
    Expected *expected = opaque;

    /* Lower ones may be left of what was before. */
    if (number >= expected->first) {
        g_assert_cmpuint(number, ==, expected->next);
        expected->next++;
    }
}

static bool take_expected(Fixture *f, Expected *expected)
{
    guest_take(f, expected_frame, expected);
    return expected->next == expected->end;
}

/* The same as expect_guest() */
static void expect_taken(Fixture *f, uint32_t first, uint32_t count)
{
    Expected expected = { first, first, first + count };

    WAIT_UNTIL(take_expected(f, &expected));
}

/* What is written to "in" comes to the guest, and what is sent to "out". */
static void expect_working(Fixture *f)
{
    static uint32_t number = 1000000;

    host_send(f, number, 5);
    expect_out(f, number, 5);
    in_send(f, number + 5, 5);
    expect_taken(f, number, 10);
    number += 10;
}

/* Traffic that is checked: a peer that reads what it wants, and a guest */

typedef struct Traffic {
    Fixture *f;
    uint32_t sent;              /* by the host; also the next one's number */
    uint32_t guest;             /* the guest got */
    uint64_t offered;           /* to the capture, while it was on */
    uint64_t received;          /* by the peers */
    uint32_t first;             /* no less may come to the peer */
    uint8_t buf[64 * KiB];      /* what the peer got and is not a frame yet */
    size_t fill;
} Traffic;

static Traffic *traffic_begin(Fixture *f)
{
    Traffic *t = g_new0(Traffic, 1);

    t->f = f;
    run_command("ip link set %s txqueuelen 10000", f->ifname);
    expect_source(f, "cap", "packet-socket");
    return t;
}

static void traffic_guest_frame(void *opaque, uint32_t number)
{
    Traffic *t = opaque;

    g_assert_cmpuint(number, ==, t->guest);
    t->guest++;
}

/* Send some of the long frames; the guest takes what has come. */
static void traffic_send(Traffic *t, unsigned count, bool offered)
{
    uint8_t frame[LONG_FRAME] = { };

    for (unsigned i = 0; i < count; i++) {
        make_frame(frame, t->sent++);
        g_assert_cmpint(send(t->f->host, frame, sizeof(frame), 0), ==,
                        sizeof(frame));
        t->offered += offered;
    }
    guest_take(t->f, traffic_guest_frame, t);
}

/* Read up to @max bytes.  Returns false at the end of the connection. */
static bool traffic_read(Traffic *t, size_t max)
{
    const size_t size = 8 + 12 + LONG_FRAME;
    ssize_t n = recv(t->f->out, t->buf + t->fill,
                     MIN(max, sizeof(t->buf) - t->fill), MSG_DONTWAIT);
    size_t at = 0;

    if (n <= 0) {
        return n < 0 && errno == EAGAIN;
    }
    t->fill += n;
    for (; t->fill - at >= size; at += size) {
        uint32_t number;

        g_assert_cmpuint(ldl_be_p(t->buf + at), ==, 12 + LONG_FRAME);
        g_assert_cmpuint(ldl_be_p(t->buf + at + 4), ==, 12);
        number = frame_number(t->buf + at + 8 + 12);
        g_assert_cmpuint(number, >=, t->first);
        g_assert_cmpuint(number, <, t->sent);
        t->first = number + 1;
        t->received++;
    }
    memmove(t->buf, t->buf + at, t->fill - at);
    t->fill -= at;
    return true;
}

/* Send for a while; the peer reads @rate bytes in between. */
static void traffic_run(Traffic *t, int ms, size_t rate, bool offered)
{
    gint64 end = g_get_monotonic_time() + ms * 1000;

    while (g_get_monotonic_time() < end) {
        traffic_send(t, 20, offered);
        if (rate) {
            g_assert_true(traffic_read(t, rate));
        }
        g_usleep(1000);
    }
}

/* The peer gets all that there is for it; the counters tell how much. */
static void traffic_settle(Traffic *t)
{
    gint64 end = g_get_monotonic_time() + TIMEOUT_US;
    uint64_t captured, kernel, peer;

    do {
        for (int i = 0; i < 100; i++) {
            traffic_read(t, sizeof(t->buf));
        }
        guest_take(t->f, traffic_guest_frame, t);
        captured = counter(t->f, "cap", "capture-packets");
        kernel = counter(t->f, "cap", "capture-kernel-drops");
        peer = counter(t->f, "cap", "capture-peer-drops");
    } while ((t->received + kernel + peer != t->offered ||
              t->guest != t->sent) && g_get_monotonic_time() < end);
    g_test_message("%" PRIu64 " offered = %" PRIu64 " received + %" PRIu64
                   " dropped by the kernel + %" PRIu64 " for the peer",
                   t->offered, t->received, kernel, peer);
    g_assert_cmpuint(t->received + kernel + peer, ==, t->offered);
    g_assert_cmpuint(t->guest, ==, t->sent);
    g_assert_cmpuint(t->received, <=, captured);
    g_assert_cmpuint(captured, <=, t->offered - kernel);
}

/*
 * The peer says that it leaves, so that QEMU closes the connection, wherever
 * it is; what was written before is counted.  Returns how many bytes came of
 * a frame that was cut off.
 */
static size_t traffic_peer_leaves(Traffic *t)
{
    size_t cut_off;

    g_assert_cmpint(shutdown(t->f->out, SHUT_WR), ==, 0);
    expect_source(t->f, "cap", "none");
    WAIT_UNTIL(!traffic_read(t, sizeof(t->buf)));
    close(t->f->out);
    cut_off = t->fill;
    t->fill = 0;
    return cut_off;
}

/* Peers of outdev */

/* Slow, stalled, gone in the middle of a frame, not there, and well again */
static void test_peer_all(Fixture *f)
{
    g_autofree Traffic *t = traffic_begin(f);
    size_t before = memory(f), most = 0, cut_off = 0;

    traffic_run(t, amount(1000, 3000), 4096, true);
    for (int i = 0; i < amount(6, 20) ||
         !counter(f, "cap", "capture-kernel-drops"); i++) {
        traffic_run(t, 500, 0, true);
        most = MAX(most, memory(f));
        g_assert_cmpuint(socket_memory(), <=, BUFFER_SIZE);
        g_assert_cmpint(i, <, 1000);
    }
    traffic_settle(t);

    for (int i = 0; i < amount(3, 10); i++) {
        traffic_run(t, 300, 0, true);
        /*
         * So much room that QEMU writes again, all that is staged, of which
         * the socket takes a part.
         */
        for (int j = 0; j < 4; j++) {
            g_assert_true(traffic_read(t, 48 * KiB));
        }
        traffic_run(t, 50, 0, true);
        if (i % 3 == 1) {
            /* It comes on again while there is much from before. */
            set_status(f, "cap", "off");
            traffic_run(t, 50, 0, false);
            set_status(f, "cap", "on");
            traffic_run(t, 50, 0, true);
        } else if (i % 3 == 2) {
            /* The peer leaves meanwhile. */
            set_status(f, "cap", "off");
            traffic_run(t, 50, 0, false);
        }
        cut_off += traffic_peer_leaves(t);
        traffic_run(t, 300, 0, false);
        if (i % 3 == 2) {
            set_status(f, "cap", "on");
        }
        f->out = connect_to(f, "out");
        expect_source(f, "cap", "packet-socket");
        t->first = t->sent;
    }
    most = MAX(most, memory(f));
    traffic_run(t, 300, sizeof(t->buf), true);
    traffic_settle(t);

    g_test_message("%zu KiB more memory at most", (most - before) / KiB);
    g_assert_cmpuint(cut_off, >, 0);
    /* A part of this is for the peer; the rest of QEMU takes some 5 MiB. */
    g_assert_cmpuint(most - before, <, BUFFER_SIZE);
}

/* The peer leaves, and QEMU connects by itself. */
static void expect_client(Fixture *f, int listener)
{
    close(f->out);
    wait_readable(listener);
    f->out = accept(listener, NULL, NULL);
    g_assert_cmpint(f->out, >=, 0);
    expect_source(f, "cap", "packet-socket");
}

/* QEMU connects: in vain at first, and then again and again. */
static void test_peer_reconnect(Fixture *f)
{
    const int rounds = amount(50, 150);
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_un addr = { .sun_family = AF_UNIX };
    uint8_t part[100];
    uint32_t n = 0;
    int fds = 0;

    /* There is no socket.  The tries before the one that fails are real. */
    snprintf(addr.sun_path, sizeof(addr.sun_path), "%s/client", f->dir);
    fail_after(FAULT_CONNECT, ECONNREFUSED, 10, 1);
    hmp(f, "chardev-add socket,id=client,path=%s,reconnect-ms=1",
        addr.sun_path);
    object_add(f, "-object filter-redirector,id=cap,netdev=n0,outdev=client,"
               "queue=tx,vnet_hdr_support=on");
    expect_failed(FAULT_CONNECT, 1);
    /* Nobody listens. */
    g_assert_cmpint(bind(listener, (struct sockaddr *)&addr, sizeof(addr)),
                    ==, 0);
    fail_after(FAULT_CONNECT, ECONNREFUSED, 10, 1);
    expect_failed(FAULT_CONNECT, 1);
    expect_source(f, "cap", "none");
    expect_other();

    g_assert_cmpint(listen(listener, 1), ==, 0);
    for (int i = 0; i < rounds; i++) {
        expect_client(f, listener);
        if (i == 1) {
            fds = count_fds(f);
        }
        /* The first bytes are a frame's; the last may be any. */
        host_send(f, n, 6);
        expect_out(f, n, i % 5);
        read_full(f->out, part, i % sizeof(part));
        n += 6;
    }
    expect_client(f, listener);
    g_assert_cmpint(count_fds(f), ==, fds);
    host_send(f, n, 10);
    expect_out(f, n, 10);
    close(listener);
}

/* GSO frames */

#define GSO_SIZE 504            /* UFO wants a multiple of 8 */
#define GSO_HEADERS (14 + 20 + 20)
#define GSO_LEN (GSO_HEADERS + 2 * GSO_SIZE + 200)
#define GSO_SEGMENTS 3

/* With a virtio-net header before it: of TCP, or of UDP, which is UFO */
static size_t make_gso(uint8_t packet[12 + GSO_LEN], bool ufo)
{
    struct virtio_net_hdr hdr = {
        .flags = VIRTIO_NET_HDR_F_NEEDS_CSUM,
        .gso_type = ufo ? VIRTIO_NET_HDR_GSO_UDP : VIRTIO_NET_HDR_GSO_TCPV4,
        .hdr_len = cpu_to_le16(34 + (ufo ? 8 : 20)),
        .gso_size = cpu_to_le16(GSO_SIZE),
        .csum_start = cpu_to_le16(34),
        .csum_offset = cpu_to_le16(ufo ? 6 : 16),
    };
    uint8_t *ip = packet + 12 + 14, *l4 = ip + 20;

    memset(packet, 0, 12 + GSO_LEN);
    memcpy(packet, &hdr, sizeof(hdr));
    make_frame(packet + 12, 0);
    memset(ip, 0, FRAME_LEN - 14);
    stw_be_p(ip - 2, ETH_P_IP);
    ip[0] = 0x45;
    stw_be_p(ip + 2, GSO_LEN - 14);
    ip[8] = 64;
    ip[9] = ufo ? IPPROTO_UDP : IPPROTO_TCP;
    if (ufo) {
        stw_be_p(l4 + 4, GSO_LEN - 34);
    } else {
        l4[12] = 5 << 4;
    }
    return 12 + GSO_LEN;
}

/*
 * Get the ring of the capture "cap" stuck, so that from now on it reads each
 * frame from the queue.
 */
static void leave_ring(Fixture *f)
{
    uint8_t packet[12 + GSO_LEN];
    size_t len = make_gso(packet, true);

    for (int i = 0; !counter(f, "cap", "capture-skipped"); i++) {
        g_assert_cmpint(i, <, 1000);
        guest_send_packet(f, packet, len);
    }
}

/* A packet with a header of 12 bytes, as a record of the stream */
static void in_send_packet(Fixture *f, const uint8_t *packet, size_t len)
{
    g_autofree uint8_t *record = g_malloc(8 + len);

    stl_be_p(record, len);
    stl_be_p(record + 4, 12);
    memcpy(record + 8, packet, len);
    g_assert_cmpint(write(f->in, record, 8 + len), ==, 8 + len);
}

/*
 * Send one of TCP, and a frame behind it.  Returns in how many frames the
 * former came.
 */
static unsigned inject_gso(Fixture *f)
{
    static uint32_t next;
    uint8_t packet[12 + GSO_LEN], frame[BUFFER_LEN];
    size_t len = make_gso(packet, false), sum = 0;
    unsigned count = 0;

    in_send_packet(f, packet, len);
    in_send(f, ++next, 1);
    while ((len = guest_read_frame(f, frame, sizeof(frame))) != FRAME_LEN) {
        g_assert_cmphex(lduw_be_p(frame + 12), ==, ETH_P_IP);
        sum += len - GSO_HEADERS;
        count++;
    }
    g_assert_cmpuint(frame_number(frame), ==, next);
    g_assert_cmpuint(sum, ==, GSO_LEN - GSO_HEADERS);
    return count;
}

/*
 * The filter goes off, or on, while frames come faster than they are thrown
 * away.  (Each error stands for a frame.)
 */
static void test_peer_flood(Fixture *f)
{
    static const int errors[] = { EINVAL, EMSGSIZE, ENETDOWN, EIO };
    const unsigned flood = 1000 * 1000;
    uint32_t n = 0;

    leave_ring(f);
    for (int i = 0; i < ARRAY_SIZE(errors); i++) {
        host_send(f, n, 10);
        expect_out(f, n, 10);
        n += 10;
        fail(FAULT_RECVMSG, errors[i], flood);
        set_status(f, "cap", "off");
        set_status(f, "cap", "on");
        set_status(f, "cap", "off");
        g_assert_cmpuint(fail_no_more(FAULT_RECVMSG), <, flood / 100);
        set_status(f, "cap", "on");
    }
    host_send(f, n, 10);
    expect_out(f, n, 10);
}

/* The interface */

/* As docs/system/filter-redirector-vhost.rst has it */
#define DOWN "netdev 'n0': interface '%s' went down or away; nothing " \
             "is captured until it is up\n"
#define NOT_CAPTURED "netdev 'n0': nothing is captured: could not bind a " \
                     "packet socket to interface '%s': No such device\n"

/* With a packet socket of the host that was not there while it was down */
static void interface_up(Fixture *f)
{
    set_interface_up(f->ifname, true);
    close(f->host);
    f->host = open_host(f->ifname);
}

static void test_interface_down(Fixture *f)
{
    int rounds = amount(2, 6);

    for (int i = 0; i < rounds; i++) {
        set_interface_up(f->ifname, false);
        expect_message(f, i + 1, DOWN, f->ifname);
        in_send(f, 0, 3);
        wait_inject_pending(f, "inj", true);
        if (i == 0) {
            expect_idle(f, "the interface is down");
            expect_other();
        }
        interface_up(f);
        expect_taken(f, 0, 3);
        expect_working(f);
    }
    g_assert_cmpuint(counter(f, "inj", "inject-interface-drops"), ==, 0);
    expect_message(f, rounds, "netdev 'n0'");

    /* What waits is lost with the filter, and not tried again. */
    set_interface_up(f->ifname, false);
    in_send(f, 0, 3);
    wait_inject_pending(f, "inj", true);
    g_free(qtest_hmp(f->qts, "object_del inj"));
    expect_idle(f, "the filter is gone");
}

/* What has come to "inj", by what became of it */
static void expect_injected(Fixture *f, uint64_t packets, uint64_t drops,
                            uint64_t skipped)
{
    wait_counter(f, "inj", "inject-packets", packets);
    g_assert_cmpuint(counter(f, "inj", "inject-interface-drops"), ==, drops);
    g_assert_cmpuint(counter(f, "inj", "inject-skipped"), ==, skipped);
}

/* Toward the network: what the TAP refuses has not been injected. */
static void test_interface_down_network(Fixture *f)
{
    for (int i = 0; i < amount(2, 6); i++) {
        set_interface_up(f->ifname, false);
        in_send(f, 0, 3);
        wait_counter(f, "inj", "inject-interface-drops", 3 * (i + 1));
        expect_injected(f, 5 * i, 3 * (i + 1), 0);
        interface_up(f);
        in_send(f, 10 * i, 5);
        expect_host(f, 10 * i, 5);
        expect_injected(f, 5 * (i + 1), 3 * (i + 1), 0);
    }
}

static void test_interface_deleted(Fixture *f)
{
    expect_working(f);
    expect_message(f, 0, "netdev 'n0'");
    run_command("ip link del %s", f->ifname);
    expect_message(f, 1, DOWN, f->ifname);
    in_send(f, 0, 3);
    wait_counter(f, "inj", "inject-interface-drops", 3);
    expect_idle(f, "the interface is gone");
    expect_other();
    set_status(f, "cap", "off");
    expect_message(f, 0, NOT_CAPTURED, f->ifname);
    set_status(f, "cap", "on");
    expect_message(f, 1, NOT_CAPTURED, f->ifname);
    expect_source(f, "cap", "none");
    vm_stop(f);
    vm_cont(f);
    expect_message(f, 1, NOT_CAPTURED, f->ifname);
    expect_source(f, "cap", "none");
    counter(f, "cap", "capture-kernel-drops");
    del_object(f, "cap");
    del_object(f, "inj");
    /* All that was said, each once */
    expect_message(f, 1, DOWN, f->ifname);
    expect_message(f, 2, "netdev 'n0': ");
}

static void test_interface_renamed(Fixture *f)
{
    expect_working(f);
    run_command("ip link set %s down", f->ifname);
    run_command("ip link set %s name renamed", f->ifname);
    pstrcpy(f->ifname, sizeof(f->ifname), "renamed");
    interface_up(f);
    expect_working(f);
    guest_stop(f);
    del_object(f, "cap");
    add_capture(f);
    host_send(f, 5000, 10);
    expect_out(f, 5000, 10);
}

/* To another network namespace, and back */
static void test_interface_netns(Fixture *f)
{
    int own = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    g_autofree char *said = NULL;
    int there;

    g_assert_cmpint(unshare(CLONE_NEWNET), ==, 0);
    there = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    g_assert_cmpint(setns(own, CLONE_NEWNET), ==, 0);
    expect_working(f);
    run_command("ip link set %s netns /proc/%d/fd/%d", f->ifname, getpid(),
                there);
    expect_message(f, 1, DOWN, f->ifname);
    in_send(f, 0, 3);
    wait_counter(f, "inj", "inject-interface-drops", 3);
    expect_idle(f, "the interface is in another namespace");
    expect_other();
    del_object(f, "cap");
    said = qtest_hmp(f->qts, "object_add filter-redirector,id=cap,netdev=n0,"
                     "outdev=out");
    g_test_message("%s", said);
    g_assert_cmpstr(said, !=, "");

    g_assert_cmpint(setns(there, CLONE_NEWNET), ==, 0);
    run_command("ip link set %s netns /proc/%d/fd/%d", f->ifname, getpid(),
                own);
    g_assert_cmpint(setns(own, CLONE_NEWNET), ==, 0);
    interface_up(f);
    del_object(f, "inj");
    add_capture(f);
    add_inject(f);
    expect_working(f);
    expect_message(f, 1, "netdev 'n0'");
    close(own);
    close(there);
}

/* The guest does not read: what is injected waits, and QEMU with it. */
static void test_interface_full(Fixture *f)
{
    const uint32_t count = 200;

    run_command("ip link set %s txqueuelen 20", f->ifname);
    guest_start(f);
    in_send(f, 0, count);
    /* Some are in the TAP. */
    WAIT_UNTIL(counter(f, "inj", "inject-packets"));
    expect_idle(f, "the TAP's queue is full");
    expect_other();
    guest_post_all(f);
    expect_taken(f, 0, count);
    expect_working(f);
}

/* System calls that fail */

/*
 * One of the calls that there are when an object is created fails: either it
 * can do without, or there is no object and nothing left of it.
 */
static void check_setup_call(Fixture *f, const char *object, FaultCall call,
                             int error)
{
    bool capture = strstr(object, "id=cap");
    const char *id = capture ? "cap" : "inj";
    /* To hook a capture is tried twice. */
    bool hook = capture && call == FAULT_BIND;
    unsigned skip = 0, refused = 0, count;

    do {
        g_autofree char *said = NULL;
        int fds = count_fds(f);

        fail_after(call, error, skip, hook ? 2 : 1);
        said = qtest_hmp(f->qts, "object_add %s", object + strlen("-object "));
        count = fail_no_more(call);
        if (g_str_has_prefix(said, "Error: ")) {
            g_assert_nonnull(strstr(said, "netdev 'n0': "));
            g_assert_cmpuint(count, ==, 1);
            refused++;
        } else {
            if (hook && count) {
                /* It is there and tells that it does not capture. */
                expect_source(f, id, "none");
                set_status(f, id, "off");
                set_status(f, id, "on");
            }
            if (capture) {
                expect_source(f, id, "packet-socket");
                host_send(f, skip, 1);
                expect_out(f, skip, 1);
            }
            del_object(f, id);
        }
        g_assert_cmpint(count_fds(f), ==, fds);
        skip++;
    } while (count);
    g_test_message("%s, %s, %s: %u of %u refused", object, call_names[call],
                   strerror(error), refused, skip - 1);
}

static void check_setup(Fixture *f, const char *object)
{
    static const struct {
        FaultCall call;
        int errors[2];
    } calls[] = {
        { FAULT_SOCKET, { ENFILE, EPERM } },
        { FAULT_SETSOCKOPT, { ENOMEM, EPERM } },
        { FAULT_GETSOCKOPT, { ENOBUFS, ENOPROTOOPT } },
        { FAULT_BIND, { ENETDOWN, ENODEV } },
        { FAULT_MMAP, { ENOMEM, EPERM } },
        { FAULT_IOCTL, { ENODEV, EBUSY } },
        { FAULT_POLL, { EMFILE, ENOMEM } },
    };

    for (int i = 0; i < ARRAY_SIZE(calls); i++) {
        for (int j = 0; j < 2; j++) {
            check_setup_call(f, object, calls[i].call, calls[i].errors[j]);
        }
    }
    g_assert_cmpint(packet_sockets(f->ifname, ETH_P_ALL, 1), ==, 0);
}

static void test_error_setup(Fixture *f)
{
    /* The first opens what all share, and the last closes it. */
    del_object(f, "other");
    check_setup(f, CAPTURE "tx");
    add_other(f);
    check_setup(f, CAPTURE "tx");
    check_setup(f, INJECT "tx");
    add_capture(f);
    add_inject(f);
    guest_begin(f);
    expect_working(f);
}

/* Frames on their way, and a call on it that fails */
typedef struct ErrorPath {
    const char *id;
    FaultCall call;
    unsigned times;             /* that it fails */
    bool loses;                 /* a frame with each error that is counted */
    void (*send)(Fixture *f, uint32_t first, uint32_t count);
    void (*expect)(Fixture *f, uint32_t first, uint32_t count);
} ErrorPath;

typedef struct ErrorCase {
    int error;
    const char *counter;        /* one for each, or NULL: nothing is lost */
    bool forever;               /* QEMU stands that, too. */
} ErrorCase;

/* Returns how many frames were sent. */
static uint32_t check_errors(Fixture *f, const ErrorPath *path,
                             const ErrorCase *cases, size_t count)
{
    uint32_t n = 0;

    for (int i = 0; i < count; i++) {
        const ErrorCase *c = &cases[i];
        bool loses = path->loses && c->counter;
        uint32_t lost = loses ? path->times : 0;
        uint64_t before = c->counter ? counter(f, path->id, c->counter) : 0;

        g_test_message("%s: %s", call_names[path->call], strerror(c->error));
        fail(path->call, c->error, path->times);
        path->send(f, n, lost + 10);
        path->expect(f, n + lost, 10);
        g_assert_cmpuint(fail_no_more(path->call), ==, path->times);
        if (c->counter) {
            g_assert_cmpuint(counter(f, path->id, c->counter) - before, ==,
                             path->times);
        }
        n += lost + 10;

        if (c->forever) {
            fail(path->call, c->error, FOREVER);
            path->send(f, n, 10);
            if (loses) {
                wait_counter(f, path->id, c->counter, before + lost + 10);
            }
            expect_idle_failing(f, path->call);
            g_test_message("%u calls failed", fail_no_more(path->call));
            if (loses) {
                path->send(f, n + 10, 10);
                n += 10;
            }
            path->expect(f, n, 10);
            n += 10;
            expect_other();
        }
    }
    return n;
}

/* Reading from the packet socket: no frame is lost with the error. */
static void test_error_capture(Fixture *f)
{
    static const ErrorPath path = {
        "cap", FAULT_RECVMSG, 50, false, host_send, expect_out,
    };
    static const ErrorCase cases[] = {
        { EINTR },
        { ENETDOWN, NULL, true }, { ENOBUFS, NULL, true },
        { ENOMEM, NULL, true }, { EIO, NULL, true },
        { EMSGSIZE, "capture-skipped" },
    };
    uint32_t n;

    leave_ring(f);
    n = check_errors(f, &path, cases, ARRAY_SIZE(cases));
    g_assert_cmpuint(counter(f, "cap", "capture-packets"), ==, n);
}

/* With a ring it is asked for errors. */
static void test_error_capture_ring(Fixture *f)
{
    fail(FAULT_GETSOCKOPT, ENOBUFS, FOREVER);
    for (int i = 0; i < 10; i++) {
        host_send(f, 50 * i, 50);
        expect_out(f, 50 * i, 50);
        g_assert_cmpuint(counter(f, "cap", "capture-kernel-drops"), ==, 0);
    }
    expect_idle_failing(f, FAULT_GETSOCKOPT);
    fail_no_more(FAULT_GETSOCKOPT);
}

static void test_error_inject(Fixture *f)
{
    static const ErrorPath path = {
        "inj", FAULT_SENDMMSG, 10, true, in_send, expect_guest,
    };
    static const ErrorCase cases[] = {
        { EAGAIN }, { ENOBUFS, NULL, true }, { EINTR }, { ENETDOWN },
        { ENXIO, "inject-interface-drops", true },
        { EMSGSIZE, "inject-skipped" },
        { EINVAL, "inject-skipped" },
    };
    uint32_t n;

    guest_post(f, 90);
    n = check_errors(f, &path, cases, ARRAY_SIZE(cases));
    expect_injected(f, n - 40, 20, 20);
}

/* Toward the network QEMU writes to the TAP. */
static void test_error_inject_network(Fixture *f)
{
    static const ErrorPath path = {
        "inj", FAULT_WRITE_TAP, 5, true, in_send, expect_host,
    };
    static const ErrorCase cases[] = {
        { EINTR },
        { EAGAIN },             /* They wait in net.c's queue. */
        { EIO, "inject-interface-drops", true },
        { ENOBUFS, "inject-interface-drops", true },
        { ENETDOWN, "inject-interface-drops", true },
        { EMSGSIZE, "inject-interface-drops", true },
    };
    uint32_t n = check_errors(f, &path, cases, ARRAY_SIZE(cases));

    expect_injected(f, n - 60, 60, 0);
}

/* GSO frames toward the guest */

#define GSO_WHOLE (GUEST_FEATURES | 1ull << VIRTIO_NET_F_GUEST_CSUM | \
                   1ull << VIRTIO_NET_F_GUEST_TSO4)

static void guest_begin_gso(Fixture *f, uint64_t features)
{
    guest_start_queues(f, features);
    qvirtio_set_driver_ok(&f->dev->vdev);
    guest_post(f, 30);
}

/*
 * The kernel says the same of a full TAP and of a GSO frame that it cannot send
 * whole, so after it the segments are tried: each second error is about these.
 */
static void test_error_inject_gso(Fixture *f)
{
    static const struct {
        int error;
        unsigned times;
        unsigned frames;        /* in which each one comes */
    } table[] = {
        { ENOBUFS, 4, 1 }, { EAGAIN, 4, 1 },
        { ENOBUFS, 5, GSO_SEGMENTS }, { EAGAIN, 5, GSO_SEGMENTS },
    };
    uint8_t packet[12 + GSO_LEN];
    struct virtio_net_hdr *hdr = (void *)packet;

    for (int i = 0; i < ARRAY_SIZE(table); i++) {
        guest_begin_gso(f, GSO_WHOLE);
        fail(FAULT_SENDMMSG, table[i].error, table[i].times);
        g_assert_cmpuint(inject_gso(f), ==, table[i].frames);
        g_assert_cmpuint(fail_no_more(FAULT_SENDMMSG), ==, table[i].times);
        g_assert_cmpuint(inject_gso(f), ==, 1);
        guest_stop(f);
        guest_begin_gso(f, GUEST_FEATURES);
        g_assert_cmpuint(inject_gso(f), ==, GSO_SEGMENTS);
        guest_stop(f);
        expect_injected(f, 6 * (i + 1), 0, 0);
    }

    /* What has gone in part goes on in segments. */
    guest_begin_gso(f, GSO_WHOLE);
    fail_after(FAULT_SEND_PART, 0, 1, 1);
    fail(FAULT_SENDMMSG, ENOBUFS, 2);
    g_assert_cmpuint(inject_gso(f), ==, GSO_SEGMENTS);

    /* Without GUEST_ECN it is not tried whole: there is no second call. */
    make_gso(packet, false);
    hdr->gso_type |= VIRTIO_NET_HDR_GSO_ECN;
    fail_after(FAULT_SENDMMSG, EIO, 1, 1);
    in_send_packet(f, packet, sizeof(packet));
    expect_injected(f, 6 * ARRAY_SIZE(table) + 3, 0, 0);
    g_assert_cmpuint(fail_no_more(FAULT_SENDMMSG), ==, 0);

    /* Segments as small as these cost the kernel too much. */
    hdr->gso_type = VIRTIO_NET_HDR_GSO_TCPV4;
    hdr->gso_size = cpu_to_le16(47);
    in_send_packet(f, packet, sizeof(packet));
    wait_counter(f, "inj", "inject-skipped", 1);

    /* What can only go whole is tried for some time, each time anew. */
    make_gso(packet, false);
    stw_be_p(packet + 12 + 12, ETH_P_LOOPBACK);
    for (int i = 2; i <= 3; i++) {
        fail(FAULT_SENDMMSG, ENOBUFS, FOREVER);
        in_send_packet(f, packet, sizeof(packet));
        wait_counter(f, "inj", "inject-skipped", i);
        g_assert_cmpuint(fail_no_more(FAULT_SENDMMSG), >, 10);
    }
}

/* Writing to the peer: what is refused for good is dropped and counted. */
static void test_error_out(Fixture *f)
{
    static const ErrorPath path = {
        "cap", FAULT_WRITE_OUT, 3, false, host_send, expect_out,
    };
    static const ErrorCase again[] = { { EAGAIN }, { EINTR } };
    static const int errors[] = { ENOBUFS, ENOMEM, ENETDOWN, EMSGSIZE };
    uint32_t n = check_errors(f, &path, again, ARRAY_SIZE(again));
    uint32_t received = n, header_len;
    uint8_t frame[BUFFER_LEN], header[24];

    for (int i = 0; i < 2 * ARRAY_SIZE(errors); i++) {
        bool forever = i & 1;
        uint32_t least = n;

        fail(FAULT_WRITE_OUT, errors[i / 2], forever ? FOREVER : 3);
        host_send(f, n, 100);
        n += 100;
        if (forever) {
            expect_idle_failing(f, FAULT_WRITE_OUT);
        } else {
            while (failed(FAULT_WRITE_OUT) < 3) {
                host_send(f, n++, 1);
                counter(f, "cap", "capture-packets");
            }
        }
        fail_no_more(FAULT_WRITE_OUT);
        host_send(f, n++, 1);
        do {
            read_stream(f->out, frame, sizeof(frame), header, &header_len);
            g_assert_cmpuint(frame_number(frame), >=, least);
            least = frame_number(frame) + 1;
            received++;
        } while (least < n);
        g_assert_cmpuint(least, ==, n);
        g_assert_cmpuint(received + counter(f, "cap", "capture-peer-drops"),
                         ==, n);
        expect_source(f, "cap", "packet-socket");
    }
}

/* What was taken from the guest is not dropped, whatever the peer does. */
static void test_error_out_taken(Fixture *f)
{
    vm_stop(f);
    /* It is tried again without another packet that comes. */
    fail(FAULT_WRITE_OUT, ENOBUFS, 3);
    host_send(f, 0, 1);
    expect_out(f, 0, 1);
    g_assert_cmpuint(fail_no_more(FAULT_WRITE_OUT), ==, 3);

    fail(FAULT_WRITE_OUT, EPIPE, FOREVER);
    host_send(f, 1, 10);
    wait_counter(f, "cap", "capture-packets", 11);
    expect_idle_failing(f, FAULT_WRITE_OUT);
    close(f->out);
    expect_connected(f, "out", false);
    fail_no_more(FAULT_WRITE_OUT);
    f->out = connect_to(f, "out");
    expect_out(f, 1, 10);
    g_assert_cmpuint(counter(f, "cap", "capture-peer-drops"), ==, 0);
    vm_cont(f);
}

/* Reading from the peer: what is no wait is the end of the connection. */
static void test_error_in(Fixture *f)
{
    static const ErrorPath path = {
        "inj", FAULT_READ_IN, 3, false, in_send, expect_guest,
    };
    static const ErrorCase again[] = { { EAGAIN }, { EINTR } };
    static const int errors[] = { ENOBUFS, ENETDOWN, EMSGSIZE };
    uint32_t n;

    guest_post(f, 50);
    n = check_errors(f, &path, again, ARRAY_SIZE(again));
    for (int i = 0; i < ARRAY_SIZE(errors); i++, n += 10) {
        uint8_t byte;

        fail(FAULT_READ_IN, errors[i], 1);
        /* One write: for a second one the connection may be gone. */
        in_send(f, n, 1);
        wait_readable(f->in);
        g_assert_cmpint(read(f->in, &byte, 1), <=, 0);
        close(f->in);
        f->in = connect_to(f, "in");
        in_send(f, n, 10);
        expect_guest(f, n, 10);
    }
}

/* The guest */

static void test_guest_reset(Fixture *f)
{
    uint32_t n = 0;

    for (int i = 0; i < amount(3, 10); i++) {
        guest_begin(f);
        host_send(f, n, 10);
        expect_out(f, n, 10);
        in_send(f, n + 10, 10);
        expect_taken(f, n, 20);
        guest_put(f, n + 20);
        expect_out(f, n + 20, 1);
        /* In the middle of all that */
        in_send(f, n + 1000, 300);
        host_send(f, n + 1000, 300);
        qtest_system_reset(f->qts);
        expect_out(f, n + 1000, 300);
        wait_counter(f, "inj", "inject-packets", 310 * (i + 1));
        qvirtio_pci_device_enable(f->dev);
        guest_stop(f);
        n += 2000;
    }
    expect_idle(f, "no driver");
    guest_begin(f);
    expect_working(f);
}

/* S3 by the PIIX4's registers, as a guest's firmware and system do it */
static void test_guest_suspend(Fixture *f)
{
    const uint16_t base = 0x600, sleep_enable = 1 << 13, s3 = 1 << 10;
    QPCIDevice *pm;
    uint32_t n = 0;

    pm = qpci_device_find(f->bus, QPCI_DEVFN(1, 3));
    g_assert_nonnull(pm);
    for (int i = 0; i < 3; i++) {
        guest_begin(f);
        qpci_config_writel(pm, 0x40, base | 1);
        qpci_config_writeb(pm, 0x80, 1);
        qtest_outw(f->qts, base + 4, sleep_enable | s3);
        qtest_qmp_eventwait(f->qts, "SUSPEND");
        expect_status(f, "query-status", "suspended");
        host_send(f, n, 10);
        expect_out(f, n, 10);
        in_send(f, n + 10, 10);
        expect_idle(f, "suspended");
        expect_other();
        hmp(f, "system_wakeup");
        qtest_qmp_eventwait(f->qts, "WAKEUP");
        expect_host(f, n + 10, 10);
        /* The machine was reset by that. */
        qvirtio_pci_device_enable(f->dev);
        guest_stop(f);
        n += 20;
    }
    g_free(pm);
    guest_begin(f);
    in_send(f, n, 10);
    expect_taken(f, n, 10);
}

/* Whichever step of vhost's start fails: QEMU moves the packets instead. */
static void test_guest_vhost_fails(Fixture *f)
{
    unsigned skip = 0, count, userspace = 0;

    do {
        fail_after(FAULT_VHOST, ENOMEM, skip, 1);
        guest_begin(f);
        count = fail_no_more(FAULT_VHOST);
        if (vhost_started(f)) {
            expect_datapath(f, "vhost", "");
        } else {
            g_assert_cmpuint(count, ==, 1);
            expect_datapath(f, "userspace", "vhost could not be started");
            userspace++;
        }
        expect_working(f);
        vm_stop(f);
        expect_datapath(f, "userspace", "the VM is stopped");
        vm_cont(f);
        expect_datapath(f, "vhost", "");
        expect_working(f);
        guest_stop(f);
        skip += amount(5, 2);
    } while (count);
    g_test_message("one of %u calls failed; %u times vhost was not started",
                   skip, userspace);
    g_assert_cmpuint(userspace, >, 0);
}

/* The TAP takes no packets, but for those that vhost brings. */
static void guest_send_blocked(Fixture *f, uint32_t first, uint32_t count)
{
    fail(FAULT_WRITE_TAP, EAGAIN, FOREVER);
    for (uint32_t i = 0; i < count; i++) {
        guest_send_begin(f, first + i);
    }
    expect_failed(FAULT_WRITE_TAP, 1);
}

/*
 * A guest that resets a queue while packets wait for the TAP, and maybe vhost
 * waits for these.  The packet that waits ends there, and those behind it with
 * their queue.
 */
static void check_queue_reset(Fixture *f, bool delayed)
{
    uint32_t n = 0;

    for (int i = 0; i < 6; i++) {
        bool tx = i & 1;
        /* Once it may start, vhost may send more before its reset. */
        uint32_t count = delayed && tx ? 1 : 5;

        guest_send_blocked(f, n, count);
        if (delayed) {
            set_status(f, "flt", "off");
            expect_datapath(f, "userspace", "packets wait in QEMU");
        }
        if (tx) {
            f->guest.tx = guest_move_queue(f, f->guest.tx);
        } else {
            f->guest.rx = guest_move_queue(f, f->guest.rx);
        }
        g_assert_cmpint(vhost_started(f), ==, delayed);
        fail_no_more(FAULT_WRITE_TAP);
        if (tx) {
            guest_send(f, n + count, 5);
            expect_host(f, n + count, 5);
            n += 5;
        } else {
            expect_host(f, n + 1, count - 1);
            f->guest.tx = guest_move_queue(f, f->guest.tx);
        }
        n += count;
        guest_post(f, 5);
        host_send(f, 1000 + n, 5);
        expect_guest(f, 1000 + n, 5);
        set_status(f, "flt", "on");
    }
}

static void test_queue_reset_blocked(Fixture *f)
{
    check_queue_reset(f, false);
}

static void test_queue_reset_delayed(Fixture *f)
{
    check_queue_reset(f, true);
}

/* The same when the VM stops: the others come when it goes on. */
static void test_guest_stop_blocked(Fixture *f)
{
    for (int i = 0; i < 6; i++) {
        uint32_t n = 20 * i;
        bool off = i & 1;

        guest_send_blocked(f, n, 10);
        vm_stop(f);
        fail_no_more(FAULT_WRITE_TAP);
        if (off) {
            set_status(f, "flt", "off");
        }
        vm_cont(f);
        expect_host(f, n + 1, 9);
        g_assert_cmpint(vhost_started(f), ==, off);
        f->guest.tx = guest_move_queue(f, f->guest.tx);
        guest_send(f, n + 10, 10);
        expect_host(f, n + 10, 10);
        set_status(f, "flt", "on");
    }
}

static void test_guest_no_vhost(void)
{
    Fixture f;

    fixture_init(&f, "vhost=off", "", "");
    expect_datapath(&f, "userspace", "the netdev has no vhost");
    guest_start(&f);
    expect_datapath(&f, "userspace", "the netdev has no vhost");
    vm_stop(&f);
    expect_datapath(&f, "userspace", "the netdev has no vhost");
    fixture_close(&f);
}

/* Memory */

/* Nothing is allocated for a packet: 10,000 captured, 10,000 injected */
static void test_allocations(Fixture *f)
{
    const uint32_t frames = 10000, burst = 100;
    uint32_t n = 0;

    if (!qatomic_read(&faults->allocations)) {
        g_test_skip("QEMU's allocator cannot be replaced");
        return;
    }
    for (int inject = 0; inject < 2; inject++) {
        uint64_t before = 0, allocations;

        /* The first of them may allocate what lasts. */
        for (uint32_t i = 0; i < frames + burst; i += burst, n += burst) {
            if (i == burst) {
                before = qatomic_read(&faults->allocations);
            }
            if (inject) {
                in_send(f, n, burst);
            } else {
                host_send(f, n, burst);
                expect_out(f, n, burst);
            }
            expect_taken(f, n, burst);
        }
        allocations = qatomic_read(&faults->allocations) - before;
        g_test_message("%u packets %s: %" PRIu64 " allocations", frames,
                       inject ? "injected" : "captured", allocations);
        g_assert_cmpuint(allocations, <, frames / 10);
    }
}

/* In each QEMU that is started from now on */
static void begin_faults(void)
{
    g_autofree char *preload = g_test_build_filename(G_TEST_BUILT,
                                                     "fault-preload.so", NULL);
    g_autofree char *binary = NULL;
    int fd = memfd_create("faults", 0);

    g_assert_cmpint(ftruncate(fd, sizeof(*faults)), ==, 0);
    faults = mmap(NULL, sizeof(*faults), PROT_READ | PROT_WRITE, MAP_SHARED,
                  fd, 0);
    g_assert_true(faults != MAP_FAILED);
    binary = g_strdup_printf("env LD_PRELOAD=%s " FAULT_CONTROL_ENV "="
                             "/proc/%d/fd/%d %s", preload, getpid(), fd,
                             getenv("QTEST_QEMU_BINARY"));
    g_setenv("QTEST_QEMU_BINARY", binary, true);
}

static const FaultTest tests[] = {
    { "peer/all", test_peer_all,
      CAPTURE "tx,buffer-size=4M", POSTED | WATCHED },
    { "peer/reconnect", test_peer_reconnect, "", STARTED | WATCHED },
    { "peer/flood", test_peer_flood, CAPTURE "all", STARTED | WATCHED },
    { "interface/down", test_interface_down, BOTH, POSTED | HEARD },
    { "interface/down-network", test_interface_down_network,
      INJECT "rx", STARTED | WATCHED },
    { "interface/deleted", test_interface_deleted,
      BOTH, POSTED | WATCHED | HEARD },
    { "interface/renamed", test_interface_renamed, BOTH, POSTED },
    { "interface/netns", test_interface_netns, BOTH, POSTED | WATCHED | HEARD },
    { "interface/full", test_interface_full, BOTH },
    { "error/setup", test_error_setup, "" },
    { "error/capture", test_error_capture, CAPTURE "all", STARTED | WATCHED },
    { "error/capture-ring", test_error_capture_ring, CAPTURE "tx", STARTED },
    { "error/inject", test_error_inject, INJECT "tx", STARTED | WATCHED },
    { "error/inject-network", test_error_inject_network,
      INJECT "rx", STARTED | WATCHED },
    { "error/inject-gso", test_error_inject_gso, INJECT "tx" },
    { "error/out", test_error_out, CAPTURE "tx", STARTED | WATCHED },
    { "error/out-taken", test_error_out_taken, CAPTURE STOPPED_ONLY, STARTED },
    { "error/in", test_error_in, INJECT "tx", STARTED },
    { "guest/reset", test_guest_reset, CAPTURE "all " INJECT "tx" },
    { "guest/suspend", test_guest_suspend, CAPTURE "tx " INJECT "all" },
    { "guest/vhost-fails", test_guest_vhost_fails, BOTH, FALLBACK },
    { "guest/queue-reset-blocked/plain", test_queue_reset_blocked,
      REWRITER, STARTED | FALLBACK },
    { "guest/queue-reset-blocked/delayed", test_queue_reset_delayed,
      REWRITER, STARTED | FALLBACK },
    { "guest/stop-blocked", test_guest_stop_blocked,
      REWRITER, STARTED | FALLBACK },
    { "memory/allocations", test_allocations, BOTH, POSTED },
};

int main(int argc, char **argv)
{
    bool fallback = HAS_FALLBACK;

    rig_init(&argc, &argv, "filter-redirector-faults");
    begin_faults();
    for (int i = 0; i < ARRAY_SIZE(tests); i++) {
        if (fallback || !(tests[i].flags & FALLBACK)) {
            rig_add_data(tests[i].path, g_memdup2(&tests[i], sizeof(tests[i])),
                         run_fault_test);
        }
    }
    if (fallback) {
        rig_add("guest/no-vhost", test_guest_no_vhost);
    }
    return g_test_run();
}
