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
#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <linux/if_ether.h>
#include <linux/ethtool.h>
#include <linux/sockios.h>
#include <sys/ioctl.h>
#include "fault-preload.h"
#include "filter-redirector-rig.h"
#include "libqos/pci-pc.h"
#include "libqos/virtio.h"
#include "qemu/atomic.h"
#include "qemu/bswap.h"
#include "qemu/cutils.h"
#include "qemu/units.h"
#include "qobject/qdict.h"
#include "qobject/qjson.h"
#include "standard-headers/linux/virtio_config.h"
#include "standard-headers/linux/virtio_net.h"

#define OTHER_TAP "tapother"
#define LONG_FRAME 1500
#define BUFFER_SIZE (4 * MiB)           /* of peer/all */
#define FOREVER UINT_MAX

/* Of QEMU's CPU time: a loop that does not wait takes all. */
#define IDLE_PERCENT 40

typedef struct Vm {
    Fixture f;
    int other;              /* peer of the other redirector */
    int other_host;
    uint32_t other_number;
    int monitor_fd[2];      /* a monitor of its own: ours, QEMU's */
    GThread *monitor;
    bool monitor_stop;
    bool monitor_pause;
    gint64 monitor_us;      /* the longest that it took to answer */
    unsigned monitor_rounds;
    GThread *machine;
    gint64 machine_us;      /* the longest that we had to wait for a CPU */
} Vm;

static FaultControl *faults;

/* Of seconds, rounds and so on: few, or with -m slow many */
static int amount(int quick, int slow)
{
    return g_test_slow() ? slow : quick;
}

/* System calls that fail */

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

/* Returns how many did fail. */
static unsigned fail_no_more(FaultCall call)
{
    qatomic_set(&faults->fault[call].times, 0);
    return qatomic_read(&faults->fault[call].failed);
}

static void expect_failed(FaultCall call, unsigned times)
{
    gint64 end = g_get_monotonic_time() + TIMEOUT_US;

    while (qatomic_read(&faults->fault[call].failed) < times) {
        g_assert_cmpint(g_get_monotonic_time(), <, end);
        g_usleep(1000);
    }
}

/* The monitor */

static void monitor_write(Vm *vm, const char *command)
{
    size_t len = strlen(command);

    g_assert_cmpint(write(vm->monitor_fd[0], command, len), ==, len);
}

static void *monitor_thread(void *opaque)
{
    static const char command[] = "{\"execute\": \"query-status\"}\n";
    Vm *vm = opaque;
    /* Not to write as well: an event may be in its buffer at that time. */
    FILE *stream = fdopen(dup(vm->monitor_fd[0]), "r");
    g_autofree char *line = g_malloc(64 * KiB);

    g_assert_nonnull(fgets(line, 64 * KiB, stream));
    monitor_write(vm, "{\"execute\": \"qmp_capabilities\"}\n");
    g_assert_nonnull(fgets(line, 64 * KiB, stream));
    while (!qatomic_read(&vm->monitor_stop)) {
        gint64 start = g_get_monotonic_time();

        if (qatomic_read(&vm->monitor_pause)) {
            g_usleep(2000);
            continue;
        }
        monitor_write(vm, command);
        do {
            g_assert_nonnull(fgets(line, 64 * KiB, stream));
        } while (!g_str_has_prefix(line, "{\"return\""));
        vm->monitor_us = MAX(vm->monitor_us, g_get_monotonic_time() - start);
        vm->monitor_rounds++;
        g_usleep(2000);
    }
    fclose(stream);
    return NULL;
}

/* The machine may have other things to do. */
static void *machine_thread(void *opaque)
{
    Vm *vm = opaque;

    while (!qatomic_read(&vm->monitor_stop)) {
        gint64 start = g_get_monotonic_time();

        g_usleep(1000);
        vm->machine_us = MAX(vm->machine_us,
                             g_get_monotonic_time() - start - 1000);
    }
    return NULL;
}

static void monitor_begin(Vm *vm)
{
    vm->monitor_stop = false;
    vm->machine = g_thread_new("machine", machine_thread, vm);
    vm->monitor = g_thread_new("monitor", monitor_thread, vm);
}

static void monitor_end(Vm *vm)
{
    qatomic_set(&vm->monitor_stop, true);
    g_thread_join(vm->monitor);
    g_thread_join(vm->machine);
    g_test_message("longest monitor round trip of %u: %.1f ms; longest wait "
                   "for a CPU: %.1f ms", vm->monitor_rounds,
                   vm->monitor_us / 1e3, vm->machine_us / 1e3);
    g_assert_cmpuint(vm->monitor_rounds, >, 0);
    /* Several threads take part in it. */
    g_assert_cmpint(vm->monitor_us, <, 100 * 1000 + 3 * vm->machine_us);
}

/* What QEMU uses */

static int64_t clock_ns(clockid_t clock)
{
    struct timespec ts;

    g_assert_cmpint(clock_gettime(clock, &ts), ==, 0);
    return ts.tv_sec * 1000000000ll + ts.tv_nsec;
}

/* This one does sleep, since it is time that it looks at. */
static void expect_idle(Vm *vm, const char *what)
{
    clockid_t cpu;
    int64_t used, passed;
    double percent;
    int tries = 10;

    g_assert_cmpint(clock_getcpuclockid(qtest_pid(vm->f.qts), &cpu), ==, 0);
    /* Questions at this rate cost something as well. */
    qatomic_set(&vm->monitor_pause, true);
    do {
        /* An emulated CPU that has to wait for a real one counts that, too. */
        used = clock_ns(cpu);
        passed = clock_ns(CLOCK_MONOTONIC);
        g_usleep(amount(500, 5000) * 1000);
        used = clock_ns(cpu) - used;
        passed = clock_ns(CLOCK_MONOTONIC) - passed;
        percent = 100.0 * used / passed;
        g_test_message("%s: QEMU uses %.1f %% of a CPU", what, percent);
    } while (percent >= IDLE_PERCENT && --tries);
    qatomic_set(&vm->monitor_pause, false);
    g_assert_cmpfloat(percent, <, IDLE_PERCENT);
}

/* In bytes */
static size_t memory(Vm *vm)
{
    g_autofree char *path = g_strdup_printf("/proc/%d/status",
                                            qtest_pid(vm->f.qts));
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
    g_autofree char *text = NULL;
    g_auto(GStrv) lines = NULL;
    size_t sum = 0;

    g_assert_true(g_file_get_contents("/proc/net/packet", &text, NULL, NULL));
    lines = g_strsplit(text, "\n", -1);
    for (int i = 1; lines[i] && *lines[i]; i++) {
        unsigned protocol, bytes;

        g_assert_cmpint(sscanf(lines[i], "%*s %*s %*s %x %*s %*s %u",
                               &protocol, &bytes), ==, 2);
        sum += protocol == ETH_P_ALL ? bytes : 0;
    }
    return sum;
}

/* VM */

static void G_GNUC_PRINTF(1, 2) ip(const char *format, ...)
{
    g_autofree char *args = NULL;
    g_autofree char *command = NULL;
    va_list ap;

    va_start(ap, format);
    args = g_strdup_vprintf(format, ap);
    va_end(ap);
    command = g_strdup_printf("ip %s", args);
    g_assert_cmpint(system(command), ==, 0);
}

static void expect_other(Vm *vm)
{
    int host = vm->f.host, out = vm->f.out;

    vm->f.host = vm->other_host;
    vm->f.out = vm->other;
    host_send(&vm->f, vm->other_number, 10);
    expect_out(&vm->f, vm->other_number, 10);
    vm->other_number += 10;
    vm->f.host = host;
    vm->f.out = out;
}

static void add_chardev(Vm *vm, const char *name, bool server)
{
    g_autofree char *path = g_build_filename(vm->f.dir, name, NULL);

    if (server) {
        qtest_qmp_assert_success(vm->f.qts, "{'execute': 'chardev-add',"
            " 'arguments': {'id': %s, 'backend': {'type': 'socket', 'data': {"
            "  'addr': {'type': 'unix', 'data': {'path': %s}},"
            "  'server': true, 'wait': false}}}}", name, path);
    } else {
        qtest_qmp_assert_success(vm->f.qts, "{'execute': 'chardev-add',"
            " 'arguments': {'id': %s, 'backend': {'type': 'socket', 'data': {"
            "  'addr': {'type': 'unix', 'data': {'path': %s}},"
            "  'server': false, 'reconnect-ms': 1}}}}", name, path);
    }
}

/* Start a VM with @args, and with @netdev_opts for the first TAP. */
static void vm_start_with(Vm *vm, const char *netdev_opts, const char *args)
{
    g_autofree char *all = NULL;

    memset(vm, 0, sizeof(*vm));
    memset(faults, 0, sizeof(*faults));
    g_assert_cmpint(socketpair(AF_UNIX, SOCK_STREAM, 0, vm->monitor_fd), ==,
                    0);
    all = g_strdup_printf(GUEST_MAP_ARGS
                          "-chardev socket,id=mon,fd=%d "
                          "-mon chardev=mon,mode=control "
                          "-netdev tap,id=other,ifname=" OTHER_TAP ","
                          "script=no,downscript=no %s",
                          vm->monitor_fd[1], args);
    fixture_init(&vm->f, netdev_opts, "", all);

    add_chardev(vm, "other", true);
    vm->other = connect_to(&vm->f, "other");
    set_interface_up(OTHER_TAP, true);
    vm->other_host = open_host(OTHER_TAP);
    qtest_qmp_assert_success(vm->f.qts, "{'execute': 'object-add',"
        " 'arguments': {'qom-type': 'filter-redirector', 'id': 'other',"
        "  'netdev': 'other', 'outdev': 'other', 'queue': 'tx',"
        "  'vnet_hdr_support': true, 'packet-socket': 'on'}}");
    expect_other(vm);
}

static void vm_start(Vm *vm, const char *args)
{
    vm_start_with(vm, "vhost=on", args);
}

/* QEMU's messages: start it with " 2>" and the path of an empty file. */

static char *messages_begin(void)
{
    g_autoptr(GError) err = NULL;
    char *path;
    int fd = g_file_open_tmp("messages-XXXXXX", &path, &err);

    g_assert_no_error(err);
    close(fd);
    return path;
}

static unsigned messages_count(const char *path, const char *text)
{
    g_autofree char *all = NULL;
    unsigned count = 0;

    g_assert_true(g_file_get_contents(path, &all, NULL, NULL));
    for (const char *at = all; (at = strstr(at, text)); at += strlen(text)) {
        count++;
    }
    return count;
}

/* Wait for a message; it must not come more often than that. */
static void G_GNUC_PRINTF(3, 4)
expect_message(const char *path, unsigned count, const char *format, ...)
{
    gint64 end = g_get_monotonic_time() + TIMEOUT_US;
    g_autofree char *text = NULL;
    va_list ap;

    va_start(ap, format);
    text = g_strdup_vprintf(format, ap);
    va_end(ap);
    while (messages_count(path, text) < count) {
        if (g_get_monotonic_time() > end) {
            g_autofree char *all = NULL;

            g_file_get_contents(path, &all, NULL, NULL);
            g_test_message("no %u times '%s' in: %s", count, text, all);
            g_assert_not_reached();
        }
        g_usleep(1000);
    }
    g_assert_cmpuint(messages_count(path, text), ==, count);
}

static void messages_end(char *path)
{
    g_autofree char *all = NULL;

    g_assert_true(g_file_get_contents(path, &all, NULL, NULL));
    g_test_message("QEMU said: %s", all);
    unlink(path);
    g_free(path);
}

static void vm_quit(Vm *vm)
{
    g_autofree char *path = g_build_filename(vm->f.dir, "other", NULL);

    expect_other(vm);
    close(vm->other);
    close(vm->other_host);
    unlink(path);
    close(vm->monitor_fd[0]);
    close(vm->monitor_fd[1]);
    fixture_close(&vm->f);
}

static void guest_begin(Vm *vm)
{
    guest_start(&vm->f);
    guest_map(&vm->f);
}

/* Traffic that is checked: a peer that reads what it wants, and a guest */

typedef struct Traffic {
    Vm *vm;
    uint32_t sent;              /* by the host; also the next one's number */
    uint32_t guest;             /* the guest got */
    uint64_t offered;           /* to the capture, while it was on */
    uint64_t received;          /* by the peers */
    uint32_t first;             /* no less may come to the peer */
    uint8_t buf[64 * KiB];      /* what the peer got and is not a frame yet */
    size_t fill;
} Traffic;

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
        g_assert_cmpint(send(t->vm->f.host, frame, sizeof(frame), 0), ==,
                        sizeof(frame));
        t->offered += offered;
    }
    guest_take(&t->vm->f, traffic_guest_frame, t);
}

/* Read up to @max bytes.  Returns false at the end of the connection. */
static bool traffic_read(Traffic *t, size_t max)
{
    const size_t size = 8 + 12 + LONG_FRAME;
    ssize_t n = recv(t->vm->f.out, t->buf + t->fill,
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
    Fixture *f = &t->vm->f;
    uint64_t captured = 0, kernel = 0, peer = 0;

    do {
        if (g_get_monotonic_time() > end) {
            g_test_message("offered %" PRIu64 ", captured %" PRIu64
                           ", received %" PRIu64 ", kernel %" PRIu64
                           ", peer %" PRIu64 ", sent %u, guest %u",
                           t->offered, captured, t->received, kernel, peer,
                           t->sent, t->guest);
            g_assert_not_reached();
        }
        for (int i = 0; i < 100; i++) {
            traffic_read(t, sizeof(t->buf));
        }
        guest_take(f, traffic_guest_frame, t);
        captured = counter(f, "cap", "capture-packets");
        kernel = counter(f, "cap", "capture-kernel-drops");
        peer = counter(f, "cap", "capture-peer-drops");
    } while (t->received + kernel + peer != t->offered || t->guest != t->sent);
    g_assert_cmpuint(t->received, <=, captured);
    g_assert_cmpuint(captured, <=, t->offered - kernel);
    g_test_message("%" PRIu64 " offered = %" PRIu64 " received + %" PRIu64
                   " dropped by the kernel + %" PRIu64 " for the peer",
                   t->offered, t->received, kernel, peer);
}

/*
 * The peer says that it leaves, so that QEMU closes the connection, wherever
 * it is; what was written before is counted.  Returns how many bytes came of
 * a frame that was cut off.
 */
static size_t traffic_peer_leaves(Traffic *t)
{
    size_t cut_off;
    gint64 end = g_get_monotonic_time() + TIMEOUT_US;

    g_assert_cmpint(shutdown(t->vm->f.out, SHUT_WR), ==, 0);
    expect_source(&t->vm->f, "cap", "none");
    while (traffic_read(t, sizeof(t->buf))) {
        g_assert_cmpint(g_get_monotonic_time(), <, end);
    }
    close(t->vm->f.out);
    cut_off = t->fill;
    t->fill = 0;
    return cut_off;
}

static void traffic_peer_comes(Traffic *t)
{
    t->vm->f.out = connect_to(&t->vm->f, "out");
    expect_source(&t->vm->f, "cap", "packet-socket");
    t->first = t->sent;
}

/* Peers of outdev */

/* Slow, stalled, gone in the middle of a frame, not there, and well again */
static void test_peer_all(Vm *vm)
{
    g_autofree Traffic *t = g_new0(Traffic, 1);
    size_t before, most = 0, cut_off = 0;

    ip("link set %s txqueuelen 10000", vm->f.ifname);
    guest_start(&vm->f);
    guest_map(&vm->f);
    t->vm = vm;
    expect_source(&vm->f, "cap", "packet-socket");
    before = memory(vm);
    monitor_begin(vm);

    traffic_run(t, amount(1000, 10000), 4096, true);
    for (int i = 0; i < amount(6, 120) ||
         !counter(&vm->f, "cap", "capture-kernel-drops"); i++) {
        traffic_run(t, 500, 0, true);
        most = MAX(most, memory(vm));
        g_assert_cmpuint(socket_memory(), <=, BUFFER_SIZE);
        g_assert_cmpint(i, <, 1000);
    }
    traffic_settle(t);

    for (int i = 0; i < amount(3, 30); i++) {
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
            set_status(&vm->f, "cap", "off");
            traffic_run(t, 50, 0, false);
            set_status(&vm->f, "cap", "on");
            traffic_run(t, 50, 0, true);
        } else if (i % 3 == 2) {
            /* The peer leaves meanwhile. */
            set_status(&vm->f, "cap", "off");
            traffic_run(t, 50, 0, false);
        }
        cut_off += traffic_peer_leaves(t);
        traffic_run(t, 300, 0, false);
        if (i % 3 == 2) {
            set_status(&vm->f, "cap", "on");
        }
        traffic_peer_comes(t);
    }
    most = MAX(most, memory(vm));
    traffic_run(t, 300, sizeof(t->buf), true);
    traffic_settle(t);
    monitor_end(vm);

    g_test_message("%zu KiB more memory at most", (most - before) / KiB);
    g_assert_cmpuint(cut_off, >, 0);
    /* A quarter of this is for the peer; the monitors need some as well. */
    g_assert_cmpuint(most - before, <, BUFFER_SIZE);
}

static int bind_at(Vm *vm, const char *name)
{
    g_autofree char *path = g_build_filename(vm->f.dir, name, NULL);
    struct sockaddr_un addr = { .sun_family = AF_UNIX };
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    pstrcpy(addr.sun_path, sizeof(addr.sun_path), path);
    g_assert_cmpint(bind(fd, (struct sockaddr *)&addr, sizeof(addr)), ==, 0);
    return fd;
}

static int listen_at(Vm *vm, const char *name)
{
    int fd = bind_at(vm, name);

    g_assert_cmpint(listen(fd, 1), ==, 0);
    return fd;
}

static void unlisten(Vm *vm, int fd, const char *name)
{
    g_autofree char *path = g_build_filename(vm->f.dir, name, NULL);

    close(fd);
    unlink(path);
}

static void add_capture_to(Vm *vm, const char *outdev, const char *queue)
{
    qtest_qmp_assert_success(vm->f.qts, "{'execute': 'object-add',"
        " 'arguments': {'qom-type': 'filter-redirector', 'id': 'cap',"
        "  'netdev': 'n0', 'outdev': %s, 'queue': %s,"
        "  'vnet_hdr_support': true}}", outdev, queue);
}

/* Nobody ever comes. */
static void test_peer_never(Vm *vm)
{
    guest_start(&vm->f);
    guest_post(&vm->f, 20);
    add_chardev(vm, "lonely", true);
    add_capture_to(vm, "lonely", "all");
    monitor_begin(vm);
    for (int i = 0; i < amount(10, 600); i++) {
        host_send(&vm->f, 0, 500);
        g_assert_cmpuint(socket_memory(), ==, 0);
    }
    monitor_end(vm);
    expect_source(&vm->f, "cap", "none");
    g_assert_cmpuint(counter(&vm->f, "cap", "capture-packets"), ==, 0);
    g_assert_cmpuint(counter(&vm->f, "cap", "capture-kernel-drops"), ==, 0);
    expect_guest(&vm->f, 0, 20);
    expect_idle(vm, "nobody listens");
    unlisten(vm, -1, "lonely");
}

/* QEMU reconnects by itself, again and again. */
static void test_peer_reconnect(Vm *vm)
{
    const int rounds = amount(50, 1000);
    uint8_t part[100];
    uint32_t n = 0;
    int listener, fds = 0;

    guest_start(&vm->f);
    listener = listen_at(vm, "client");
    add_chardev(vm, "client", false);
    add_capture_to(vm, "client", "tx");
    close(vm->f.out);
    monitor_begin(vm);
    for (int i = 0; i < rounds; i++) {
        wait_readable(listener);
        vm->f.out = accept(listener, NULL, NULL);
        g_assert_cmpint(vm->f.out, >=, 0);
        expect_source(&vm->f, "cap", "packet-socket");
        if (i == 0) {
            fds = count_fds(&vm->f);
        }
        /* The first bytes are a frame's; the last may be any. */
        host_send(&vm->f, n, 6);
        expect_out(&vm->f, n, i % 5);
        read_full(vm->f.out, part, i % sizeof(part));
        n += 6;
        close(vm->f.out);
    }
    wait_readable(listener);
    vm->f.out = accept(listener, NULL, NULL);
    expect_source(&vm->f, "cap", "packet-socket");
    g_assert_cmpint(count_fds(&vm->f), ==, fds);
    host_send(&vm->f, n, 10);
    expect_out(&vm->f, n, 10);
    g_test_message("%d reconnects", rounds);
    monitor_end(vm);
    unlisten(vm, listener, "client");
}

/*
 * QEMU tries to connect and is refused, since there is no socket, and then
 * since nobody listens; at last somebody does.
 */
static void test_peer_refuses(Vm *vm)
{
    int listener;

    guest_start(&vm->f);
    monitor_begin(vm);
    /* The tries before one that is made to fail were real ones. */
    fail_after(FAULT_CONNECT, ECONNREFUSED, 10, 1);
    add_chardev(vm, "client", false);
    add_capture_to(vm, "client", "tx");
    expect_failed(FAULT_CONNECT, 1);
    listener = bind_at(vm, "client");
    fail_after(FAULT_CONNECT, ECONNREFUSED, 10, 1);
    expect_failed(FAULT_CONNECT, 1);
    expect_source(&vm->f, "cap", "none");
    expect_other(vm);

    g_assert_cmpint(listen(listener, 1), ==, 0);
    wait_readable(listener);
    close(vm->f.out);
    vm->f.out = accept(listener, NULL, NULL);
    expect_source(&vm->f, "cap", "packet-socket");
    host_send(&vm->f, 0, 10);
    expect_out(&vm->f, 0, 10);
    monitor_end(vm);
    unlisten(vm, listener, "client");
}

/*
 * While the source is "none" nothing is kept, neither what waited when it
 * became so nor what comes meanwhile; and the former is counted.
 */
static void test_peer_nothing_stale(void)
{
    static const char *const roles[] = { CAPTURE "tx", CAPTURE "all" };

    for (int i = 0; i < ARRAY_SIZE(roles); i++) {
        g_autofree Traffic *t = g_new0(Traffic, 1);
        Vm vm;

        vm_start(&vm, roles[i]);
        ip("link set %s txqueuelen 10000", vm.f.ifname);
        guest_begin(&vm);
        t->vm = &vm;
        expect_source(&vm.f, "cap", "packet-socket");
        for (int j = 0; j < amount(2, 20); j++) {
            /* As much as the peer's socket and QEMU hold, and more */
            while (counter(&vm.f, "cap", "capture-packets") < 800 ||
                   !counter(&vm.f, "cap", "capture-kernel-drops")) {
                traffic_send(t, 100, true);
            }
            set_status(&vm.f, "cap", "off");
            g_assert_cmpuint(socket_memory(), ==, 0);
            traffic_settle(t);
            traffic_send(t, 100, false);
            set_status(&vm.f, "cap", "on");
            t->first = t->sent;
            traffic_send(t, 100, true);
            traffic_settle(t);

            traffic_send(t, 2000, true);
            vm_stop(&vm.f);
            traffic_send(t, 100, false);
            vm_cont(&vm.f);
            traffic_send(t, 100, true);
            traffic_settle(t);
        }
        vm_quit(&vm);
    }
}

#define GSO_SIZE 504            /* UFO wants a multiple of 8 */
#define GSO_LEN (34 + 20 + 2 * GSO_SIZE + 200)
#define GSO_SEGMENTS 3
#define GSO_PACKET_LEN (12 + GSO_LEN)

/* A virtio-net header and a GSO frame of TCP or UDP */
static void make_gso(uint8_t *packet, bool ufo)
{
    struct virtio_net_hdr *hdr = (void *)packet;
    uint8_t *frame = packet + 12, *ip = frame + 14, *l4 = ip + 20;

    memset(packet, 0, GSO_PACKET_LEN);
    hdr->flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
    hdr->gso_type = ufo ? VIRTIO_NET_HDR_GSO_UDP : VIRTIO_NET_HDR_GSO_TCPV4;
    hdr->gso_size = cpu_to_le16(GSO_SIZE);
    hdr->hdr_len = cpu_to_le16(l4 - frame + (ufo ? 8 : 20));
    hdr->csum_start = cpu_to_le16(l4 - frame);
    hdr->csum_offset = cpu_to_le16(ufo ? 6 : 16);

    make_frame(frame, 0);
    stw_be_p(frame + 12, ETH_P_IP);
    ip[0] = 0x45;
    stw_be_p(ip + 2, GSO_LEN - 14);
    stw_be_p(ip + 6, 0);
    ip[8] = 64;
    ip[9] = ufo ? 17 : 6;
    stl_be_p(ip + 12, 0xc0000201);
    stl_be_p(ip + 16, 0xc0000202);
    memset(l4, 0, 20);
    stw_be_p(l4 + 2, 9);
    if (ufo) {
        stw_be_p(l4 + 4, GSO_LEN - 34);
    } else {
        l4[12] = 5 << 4;
    }
}

/*
 * Get the ring of the capture "cap" stuck, so that from now on it reads each
 * frame from the queue.
 */
static void leave_ring(Fixture *f)
{
    gint64 end = g_get_monotonic_time() + TIMEOUT_US;
    uint8_t packet[GSO_PACKET_LEN];

    make_gso(packet, true);
    do {
        g_assert_cmpint(g_get_monotonic_time(), <, end);
        guest_send_packet(f, packet, sizeof(packet));
    } while (!counter(f, "cap", "capture-skipped"));
}

/*
 * The filter goes off, or on, while frames come faster than they are thrown
 * away.  (An error of this kind is one frame.)
 */
static void test_peer_flood(Vm *vm)
{
    static const int errors[] = { EINVAL, EMSGSIZE, ENETDOWN };
    const unsigned flood = 1000 * 1000;
    uint32_t n = 0;

    guest_start(&vm->f);
    leave_ring(&vm->f);
    monitor_begin(vm);
    for (int i = 0; i < ARRAY_SIZE(errors); i++) {
        host_send(&vm->f, n, 10);
        expect_out(&vm->f, n, 10);
        n += 10;
        fail(FAULT_RECVMSG, errors[i], flood);
        set_status(&vm->f, "cap", "off");
        set_status(&vm->f, "cap", "on");
        set_status(&vm->f, "cap", "off");
        g_assert_cmpuint(fail_no_more(FAULT_RECVMSG), <, flood / 100);
        set_status(&vm->f, "cap", "on");
    }
    monitor_end(vm);
    host_send(&vm->f, n, 10);
    expect_out(&vm->f, n, 10);
}

/* The interface */

typedef struct Expected {
    uint32_t next;
    uint32_t first;
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

/* The same as expect_guest() for a guest of guest_begin() */
static void expect_taken(Vm *vm, uint32_t first, uint32_t count)
{
    gint64 end = g_get_monotonic_time() + TIMEOUT_US;
    Expected expected = { .next = first, .first = first };

    while (expected.next < first + count) {
        guest_take(&vm->f, expected_frame, &expected);
        g_assert_cmpint(g_get_monotonic_time(), <, end);
    }
}

/* What is written to "in" comes to the guest, and what is sent to "out". */
static void expect_working(Vm *vm)
{
    static uint32_t number = 1000000;

    host_send(&vm->f, number, 5);
    expect_out(&vm->f, number, 5);
    in_send(&vm->f, number + 5, 5);
    expect_taken(vm, number, 10);
    number += 10;
}

#define BOTH CAPTURE "tx " INJECT "tx"

/* As docs/system/filter-redirector-vhost.rst has it */
#define GONE "netdev 'n0': interface '%s' is gone; nothing more can be " \
             "captured from it\n"
#define NOT_CAPTURED "netdev 'n0': nothing is captured: could not bind a " \
                     "packet socket to interface '%s': No such device\n"

/* Returns where to find what it says, for messages_end(). */
static char *vm_start_heard(Vm *vm)
{
    char *messages = messages_begin();
    g_autofree char *args = g_strdup_printf(BOTH " 2>%s", messages);

    vm_start(vm, args);
    guest_begin(vm);
    return messages;
}

static void test_interface_down(void)
{
    char *messages;
    Vm vm;

    messages = vm_start_heard(&vm);
    for (int i = 0; i < amount(2, 20); i++) {
        set_interface_up(vm.f.ifname, false);
        in_send(&vm.f, 0, 3);
        wait_inject_pending(&vm.f, "inj", true);
        if (i == 0) {
            expect_idle(&vm, "the interface is down");
            expect_other(&vm);
        }
        set_interface_up(vm.f.ifname, true);
        expect_taken(&vm, 0, 3);
        close(vm.f.host);
        vm.f.host = open_host(vm.f.ifname);
        expect_working(&vm);
    }
    g_assert_cmpuint(counter(&vm.f, "inj", "inject-interface-drops"), ==, 0);
    /* It is down like a cable that is unplugged, and not gone. */
    expect_message(messages, 0, "netdev 'n0'");
    vm_quit(&vm);
    messages_end(messages);
}

/* Toward the network: what the TAP refuses has not been injected. */
static void test_interface_down_network(Vm *vm)
{
    guest_begin(vm);
    monitor_begin(vm);
    for (int i = 0; i < amount(2, 20); i++) {
        set_interface_up(vm->f.ifname, false);
        in_send(&vm->f, 0, 3);
        wait_counter(&vm->f, "inj", "inject-interface-drops", 3 * (i + 1));
        g_assert_cmpuint(counter(&vm->f, "inj", "inject-packets"), ==, 5 * i);
        g_assert_cmpuint(counter(&vm->f, "inj", "inject-bytes"), ==,
                         5 * i * FRAME_LEN);
        set_interface_up(vm->f.ifname, true);
        close(vm->f.host);
        vm->f.host = open_host(vm->f.ifname);
        in_send(&vm->f, 10 * i, 5);
        expect_host(&vm->f, 10 * i, 5);
        wait_counter(&vm->f, "inj", "inject-packets", 5 * (i + 1));
        g_assert_cmpuint(counter(&vm->f, "inj", "inject-interface-drops"), ==,
                         3 * (i + 1));
    }
    monitor_end(vm);
}

static void test_interface_deleted(void)
{
    char *messages;
    Vm vm;

    messages = vm_start_heard(&vm);
    expect_working(&vm);
    monitor_begin(&vm);
    expect_message(messages, 0, "netdev 'n0'");
    ip("link del %s", vm.f.ifname);
    expect_message(messages, 1, GONE, vm.f.ifname);
    in_send(&vm.f, 0, 3);
    wait_counter(&vm.f, "inj", "inject-interface-drops", 3);
    expect_idle(&vm, "the interface is gone");
    expect_other(&vm);
    set_status(&vm.f, "cap", "off");
    expect_message(messages, 0, NOT_CAPTURED, vm.f.ifname);
    set_status(&vm.f, "cap", "on");
    expect_message(messages, 1, NOT_CAPTURED, vm.f.ifname);
    expect_source(&vm.f, "cap", "none");
    vm_stop(&vm.f);
    vm_cont(&vm.f);
    expect_message(messages, 2, NOT_CAPTURED, vm.f.ifname);
    expect_source(&vm.f, "cap", "none");
    counter(&vm.f, "cap", "capture-kernel-drops");
    del_object(&vm.f, "cap");
    del_object(&vm.f, "inj");
    /* All that was said, each once */
    expect_message(messages, 1, GONE, vm.f.ifname);
    expect_message(messages, 3, "netdev 'n0': ");
    monitor_end(&vm);
    vm_quit(&vm);
    messages_end(messages);
}

static void test_interface_renamed(Vm *vm)
{
    guest_begin(vm);
    expect_working(vm);
    ip("link set %s down", vm->f.ifname);
    ip("link set %s name renamed", vm->f.ifname);
    ip("link set renamed up");
    pstrcpy(vm->f.ifname, sizeof(vm->f.ifname), "renamed");
    close(vm->f.host);
    vm->f.host = open_host(vm->f.ifname);
    expect_working(vm);
    guest_stop(&vm->f);
    del_object(&vm->f, "cap");
    add_capture(&vm->f);
    host_send(&vm->f, 5000, 10);
    expect_out(&vm->f, 5000, 10);
}

/* A frame of @len bytes to the interface, or as a record to "in" */
static void send_long(Vm *vm, uint32_t number, size_t len, bool record)
{
    g_autofree uint8_t *buf = g_malloc0(8 + 12 + len);

    stl_be_p(buf, 12 + len);
    stl_be_p(buf + 4, 12);
    make_frame(buf + 8 + 12, number);
    if (record) {
        g_assert_cmpint(write(vm->f.in, buf, 20 + len), ==, 20 + len);
    } else {
        g_assert_cmpint(send(vm->f.host, buf + 20, len, 0), ==, len);
    }
}

static void test_interface_mtu(Vm *vm)
{
    g_autofree uint8_t *frame = g_malloc(64 * KiB);
    uint8_t header[24];
    uint32_t header_len;

    guest_begin(vm);
    expect_working(vm);
    guest_stop(&vm->f);

    ip("link set %s mtu 9000", vm->f.ifname);
    send_long(vm, 1, 9000, false);
    g_assert_cmpuint(read_stream(vm->f.out, frame, 64 * KiB, header,
                                 &header_len), ==, 9000);
    g_assert_cmpuint(frame_number(frame), ==, 1);
    send_long(vm, 2, 9000, true);
    wait_counter(&vm->f, "inj", "inject-packets", 6);

    ip("link set %s mtu 500", vm->f.ifname);
    send_long(vm, 3, 1000, true);
    wait_counter(&vm->f, "inj", "inject-skipped", 1);
    send_long(vm, 4, 400, false);
    g_assert_cmpuint(read_stream(vm->f.out, frame, 64 * KiB, header,
                                 &header_len), ==, 400);
    in_send(&vm->f, 5, 1);
    wait_counter(&vm->f, "inj", "inject-packets", 7);
    g_assert_cmpuint(counter(&vm->f, "cap", "capture-skipped"), ==, 0);
}

static void test_interface_mac(Vm *vm)
{
    guest_begin(vm);
    expect_working(vm);
    ip("link set %s address 02:00:00:12:34:57", vm->f.ifname);
    expect_working(vm);
    del_object(&vm->f, "cap");
    del_object(&vm->f, "inj");
    add_capture(&vm->f);
    add_inject(&vm->f);
    expect_working(vm);
}

/* To another network namespace, and back */
static void test_interface_netns(void)
{
    char *messages;
    int own = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    int there;
    QDict *rsp;
    Vm vm;

    g_assert_cmpint(unshare(CLONE_NEWNET), ==, 0);
    there = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
    g_assert_cmpint(setns(own, CLONE_NEWNET), ==, 0);

    messages = vm_start_heard(&vm);
    expect_working(&vm);
    monitor_begin(&vm);
    ip("link set %s netns /proc/%d/fd/%d", vm.f.ifname, getpid(), there);
    expect_message(messages, 1, GONE, vm.f.ifname);
    in_send(&vm.f, 0, 3);
    wait_counter(&vm.f, "inj", "inject-interface-drops", 3);
    expect_idle(&vm, "the interface is in another namespace");
    expect_other(&vm);
    del_object(&vm.f, "cap");
    rsp = qtest_qmp_assert_failure_ref(vm.f.qts, "{'execute': 'object-add',"
        " 'arguments': {'qom-type': 'filter-redirector', 'id': 'cap',"
        "  'netdev': 'n0', 'outdev': 'out'}}");
    g_test_message("%s", qdict_get_str(rsp, "desc"));
    qobject_unref(rsp);

    g_assert_cmpint(setns(there, CLONE_NEWNET), ==, 0);
    ip("link set %s netns /proc/%d/fd/%d", vm.f.ifname, getpid(), own);
    g_assert_cmpint(setns(own, CLONE_NEWNET), ==, 0);
    set_interface_up(vm.f.ifname, true);
    close(vm.f.host);
    vm.f.host = open_host(vm.f.ifname);
    del_object(&vm.f, "inj");
    add_capture(&vm.f);
    add_inject(&vm.f);
    expect_working(&vm);
    monitor_end(&vm);
    expect_message(messages, 1, "netdev 'n0'");
    close(own);
    close(there);
    vm_quit(&vm);
    messages_end(messages);
}

/* The guest does not read: what is injected waits, and QEMU with it. */
static void test_interface_full(Vm *vm)
{
    const uint32_t count = 200;

    ip("link set %s txqueuelen 20", vm->f.ifname);
    guest_start(&vm->f);
    in_send(&vm->f, 0, count);
    while (!counter(&vm->f, "inj", "inject-packets")) {
        /* until some are in the TAP */
    }
    expect_idle(vm, "the TAP's queue is full");
    expect_other(vm);
    guest_map(&vm->f);
    expect_taken(vm, 0, count);
    expect_working(vm);
}

/* System calls that fail */

typedef struct ErrorCase {
    int error;
    const char *counter;        /* one for each, or NULL: nothing is lost */
} ErrorCase;

/*
 * Each call that there is when an object is created fails once: either it can
 * do without, or there is no object and nothing left of it.
 */
static void check_setup(Vm *vm, const char *role, const char *id, bool capture)
{
    static const struct {
        FaultCall call;
        const char *name;
        int error;
    } calls[] = {
        { FAULT_SOCKET, "socket", ENFILE },
        { FAULT_SOCKET, "socket", EPERM },
        { FAULT_SETSOCKOPT, "setsockopt", ENOMEM },
        { FAULT_SETSOCKOPT, "setsockopt", EPERM },
        { FAULT_GETSOCKOPT, "getsockopt", ENOBUFS },
        { FAULT_GETSOCKOPT, "getsockopt", ENOPROTOOPT },
        { FAULT_BIND, "bind", ENETDOWN },
        { FAULT_BIND, "bind", ENODEV },
        { FAULT_MMAP, "mmap", ENOMEM },
        { FAULT_MMAP, "mmap", EPERM },
        { FAULT_IOCTL, "ioctl", ENODEV },
        { FAULT_IOCTL, "ioctl", EBUSY },
        { FAULT_TIMERFD, "timerfd_create", EMFILE },
        { FAULT_TIMERFD, "timerfd_create", ENOMEM },
    };
    g_autofree char *json = g_strdup_printf("{'execute': 'object-add',"
        " 'arguments': {'qom-type': 'filter-redirector', 'id': '%s',"
        " 'netdev': 'n0', 'vnet_hdr_support': true, %s}}", id, role);

    for (int i = 0; i < ARRAY_SIZE(calls); i++) {
        unsigned refused = 0, done_without = 0;

        for (unsigned skip = 0;; skip++) {
            int fds = count_fds(&vm->f);
            QDict *rsp;

            /* To hook a capture is tried twice. */
            fail_after(calls[i].call, calls[i].error, skip,
                       capture && calls[i].call == FAULT_BIND ? 2 : 1);
            rsp = qtest_qmp(vm->f.qts, "%p", qobject_from_json(json, NULL));
            if (!qdict_haskey(rsp, "error")) {
                bool failed = fail_no_more(calls[i].call);

                qobject_unref(rsp);
                if (capture && failed && calls[i].call == FAULT_BIND) {
                    /* It is there and tells that it does not capture. */
                    expect_source(&vm->f, id, "none");
                    set_status(&vm->f, id, "off");
                    set_status(&vm->f, id, "on");
                }
                if (capture) {
                    expect_source(&vm->f, id, "packet-socket");
                    host_send(&vm->f, skip, 1);
                    expect_out(&vm->f, skip, 1);
                }
                del_object(&vm->f, id);
                g_assert_cmpint(count_fds(&vm->f), ==, fds);
                if (!failed) {
                    break;
                }
                done_without++;
                continue;
            }
            g_assert_cmpuint(fail_no_more(calls[i].call), ==, 1);
            g_assert_nonnull(strstr(qdict_get_str(qdict_get_qdict(rsp,
                                                                  "error"),
                                                  "desc"), "netdev 'n0': "));
            qobject_unref(rsp);
            g_assert_cmpint(count_fds(&vm->f), ==, fds);
            refused++;
        }
        g_test_message("%s, %s, %s: %u refused, %u done without", role,
                       calls[i].name, strerror(calls[i].error), refused,
                       done_without);
    }
    g_assert_cmpint(packet_sockets(vm->f.ifname, ETH_P_ALL, 1), ==, 0);
}

static void test_error_setup(Vm *vm)
{
    expect_other(vm);
    check_setup(vm, "'outdev': 'out', 'queue': 'tx'", "cap", true);
    check_setup(vm, "'outdev': 'out', 'queue': 'all'", "cap", true);
    check_setup(vm, "'indev': 'in', 'queue': 'tx'", "inj", false);
    /* The last of all closes what they share. */
    del_object(&vm->f, "other");
    check_setup(vm, "'outdev': 'out', 'queue': 'tx'", "cap", true);
    add_capture(&vm->f);
    add_inject(&vm->f);
    guest_begin(vm);
    expect_working(vm);
    qtest_qmp_assert_success(vm->f.qts, "{'execute': 'object-add',"
        " 'arguments': {'qom-type': 'filter-redirector', 'id': 'other',"
        "  'netdev': 'other', 'outdev': 'other', 'queue': 'tx',"
        "  'vnet_hdr_support': true, 'packet-socket': 'on'}}");
}

/* Reading from the packet socket: no frame is lost with the error. */
static void test_error_capture(Vm *vm)
{
    static const ErrorCase table[] = {
        { EINTR }, { ENETDOWN }, { ENOBUFS }, { ENOMEM }, { EIO },
        { EMSGSIZE, "capture-skipped" },
    };
    uint64_t skipped;
    uint32_t n = 0;

    guest_start(&vm->f);
    leave_ring(&vm->f);
    for (int i = 0; i < ARRAY_SIZE(table); i++) {
        skipped = counter(&vm->f, "cap", "capture-skipped");
        fail(FAULT_RECVMSG, table[i].error, 50);
        host_send(&vm->f, n, 10);
        expect_out(&vm->f, n, 10);
        g_assert_cmpuint(fail_no_more(FAULT_RECVMSG), ==, 50);
        if (table[i].counter) {
            g_assert_cmpuint(counter(&vm->f, "cap", table[i].counter) - skipped,
                             ==, 50);
        }
        n += 10;
    }
    g_assert_cmpuint(counter(&vm->f, "cap", "capture-packets"), ==, n);

    /* It goes on and on; the others do not suffer. */
    monitor_begin(vm);
    for (int i = 1; i < 5; i++) {
        g_autofree char *what = g_strdup_printf("recvmsg: %s",
                                                strerror(table[i].error));

        fail(FAULT_RECVMSG, table[i].error, FOREVER);
        host_send(&vm->f, n, 10);
        expect_failed(FAULT_RECVMSG, 1);
        expect_idle(vm, what);
        g_test_message("%u calls failed", fail_no_more(FAULT_RECVMSG));
        expect_out(&vm->f, n, 10);
        expect_other(vm);
        n += 10;
    }
    monitor_end(vm);

    /* The filter goes off while it lasts. */
    fail(FAULT_RECVMSG, EIO, FOREVER);
    host_send(&vm->f, n, 10);
    set_status(&vm->f, "cap", "off");
    fail_no_more(FAULT_RECVMSG);
    set_status(&vm->f, "cap", "on");
    host_send(&vm->f, n + 10, 10);
    expect_out(&vm->f, n + 10, 10);
}

/* With a ring it is asked for errors. */
static void test_error_capture_ring(Vm *vm)
{
    uint32_t n = 0;

    guest_start(&vm->f);
    fail(FAULT_GETSOCKOPT, ENOBUFS, FOREVER);
    for (int i = 0; i < 10; i++) {
        host_send(&vm->f, n, 50);
        expect_out(&vm->f, n, 50);
        n += 50;
        g_assert_cmpuint(counter(&vm->f, "cap", "capture-kernel-drops"), ==, 0);
    }
    expect_idle(vm, "getsockopt fails");
    g_assert_cmpuint(fail_no_more(FAULT_GETSOCKOPT), >, 0);
}

static void test_error_inject(Vm *vm)
{
    static const ErrorCase table[] = {
        { EAGAIN }, { ENOBUFS }, { EINTR }, { ENETDOWN },
        { ENXIO, "inject-interface-drops" },
        { EMSGSIZE, "inject-skipped" },
        { EINVAL, "inject-skipped" },
    };
    uint32_t n = 0;

    guest_start(&vm->f);
    for (int i = 0; i < ARRAY_SIZE(table); i++) {
        const unsigned errors = 10;
        const unsigned lost = table[i].counter ? errors : 0;
        const uint64_t before = lost ? counter(&vm->f, "inj",
                                               table[i].counter) : 0;

        guest_post(&vm->f, 10);
        fail(FAULT_SENDMMSG, table[i].error, errors);
        in_send(&vm->f, n, 10 + lost);
        expect_guest(&vm->f, n + lost, 10);
        g_assert_cmpuint(fail_no_more(FAULT_SENDMMSG), ==, errors);
        if (lost) {
            g_assert_cmpuint(counter(&vm->f, "inj", table[i].counter), ==,
                             before + lost);
        }
        n += 10 + lost;
    }

    monitor_begin(vm);
    guest_post(&vm->f, 10);
    fail(FAULT_SENDMMSG, ENOBUFS, FOREVER);
    in_send(&vm->f, n, 10);
    expect_failed(FAULT_SENDMMSG, 1);
    expect_idle(vm, "sendmmsg: ENOBUFS");
    g_test_message("%u calls failed", fail_no_more(FAULT_SENDMMSG));
    expect_guest(&vm->f, n, 10);
    n += 10;

    fail(FAULT_SENDMMSG, ENXIO, FOREVER);
    in_send(&vm->f, n, 10);
    wait_counter(&vm->f, "inj", "inject-interface-drops", 20);
    expect_idle(vm, "sendmmsg: ENXIO");
    fail_no_more(FAULT_SENDMMSG);
    monitor_end(vm);
    guest_post(&vm->f, 10);
    in_send(&vm->f, n, 10);
    expect_guest(&vm->f, n, 10);
}

/* Toward the network QEMU writes to the TAP. */
static void test_error_inject_network(Vm *vm)
{
    static const int errors[] = { EIO, ENOBUFS, ENETDOWN, EMSGSIZE };
    const unsigned each = 5;
    uint32_t n = 20;

    guest_start(&vm->f);
    fail(FAULT_WRITE_TAP, EINTR, 5);
    in_send(&vm->f, 0, 10);
    expect_host(&vm->f, 0, 10);
    g_assert_cmpuint(fail_no_more(FAULT_WRITE_TAP), ==, 5);
    /* It is net.c's queue then where they wait. */
    fail(FAULT_WRITE_TAP, EAGAIN, 5);
    in_send(&vm->f, 10, 10);
    expect_host(&vm->f, 10, 10);
    g_assert_cmpuint(fail_no_more(FAULT_WRITE_TAP), ==, 5);
    wait_counter(&vm->f, "inj", "inject-packets", n);
    g_assert_cmpuint(counter(&vm->f, "inj", "inject-interface-drops"), ==, 0);

    /* And these are lost, and told. */
    monitor_begin(vm);
    for (int i = 0; i < ARRAY_SIZE(errors); i++) {
        fail(FAULT_WRITE_TAP, errors[i], each);
        in_send(&vm->f, n, each + 10);
        expect_host(&vm->f, n + each, 10);
        g_assert_cmpuint(fail_no_more(FAULT_WRITE_TAP), ==, each);
        n += each + 10;
        wait_counter(&vm->f, "inj", "inject-packets", n - each * (i + 1));
        g_assert_cmpuint(counter(&vm->f, "inj", "inject-bytes"), ==,
                         (n - each * (i + 1)) * FRAME_LEN);
        g_assert_cmpuint(counter(&vm->f, "inj", "inject-interface-drops"), ==,
                         each * (i + 1));
    }
    /* However long it lasts */
    for (int i = 0; i < ARRAY_SIZE(errors); i++) {
        g_autofree char *what = g_strdup_printf("writev: %s",
                                                strerror(errors[i]));

        fail(FAULT_WRITE_TAP, errors[i], FOREVER);
        in_send(&vm->f, n, 10);
        wait_counter(&vm->f, "inj", "inject-interface-drops",
                     ARRAY_SIZE(errors) * each + 10 * (i + 1));
        expect_idle(vm, what);
        fail_no_more(FAULT_WRITE_TAP);
        in_send(&vm->f, n + 10, 1);
        expect_host(&vm->f, n + 10, 1);
        n += 11;
    }
    wait_counter(&vm->f, "inj", "inject-packets",
                 n - ARRAY_SIZE(errors) * (each + 10));
    monitor_end(vm);
}

/* GSO frames toward the guest */

#define GSO_NONE (1ull << VIRTIO_F_VERSION_1 | 1ull << VIRTIO_NET_F_MRG_RXBUF)
#define GSO_WHOLE (GSO_NONE | 1ull << VIRTIO_NET_F_GUEST_CSUM | \
                   1ull << VIRTIO_NET_F_GUEST_TSO4)

/* As "ethtool -K IFNAME tso on|off" does.  Returns whether it is so. */
static bool set_tso(const char *ifname, bool on)
{
    struct ethtool_value value = { .cmd = ETHTOOL_STSO, .data = on };
    struct ifreq ifr = { .ifr_data = (void *)&value };
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    bool ok;

    pstrcpy(ifr.ifr_name, sizeof(ifr.ifr_name), ifname);
    ok = ioctl(fd, SIOCETHTOOL, &ifr) == 0;
    value.cmd = ETHTOOL_GTSO;
    ok = ok && ioctl(fd, SIOCETHTOOL, &ifr) == 0 && !!value.data == on;
    close(fd);
    return ok;
}

/* A frame that is segmented here, or of a kind that is not (UFO) */
static void in_send_gso(Vm *vm, bool ufo)
{
    uint8_t record[8 + GSO_PACKET_LEN];

    stl_be_p(record, GSO_PACKET_LEN);
    stl_be_p(record + 4, 12);
    make_gso(record + 8, ufo);
    g_assert_cmpint(write(vm->f.in, record, sizeof(record)), ==,
                    sizeof(record));
}

/* Returns in how many frames it came; 0: it did not, but the next one. */
static unsigned guest_read_gso(Vm *vm, bool ufo, uint32_t next)
{
    const size_t headers = ufo ? 34 : 54;
    uint8_t frame[BUFFER_LEN];
    unsigned count = 0;
    size_t sum = 0;

    for (;; count++) {
        size_t len = guest_read_frame(&vm->f, frame, sizeof(frame));

        if (lduw_be_p(frame + 12) == TEST_ETHERTYPE) {
            g_assert_cmpuint(frame_number(frame), ==, next);
            break;
        }
        g_assert_cmphex(lduw_be_p(frame + 12), ==, ETH_P_IP);
        sum += len - headers;
    }
    g_assert_cmpuint(sum, ==, count ? GSO_LEN - headers : 0);
    return count;
}

/* Send one, and a frame behind it that must come. */
static unsigned inject_gso(Vm *vm, bool ufo)
{
    static uint32_t next;

    in_send_gso(vm, ufo);
    in_send(&vm->f, ++next, 1);
    return guest_read_gso(vm, ufo, next);
}

static void guest_begin_gso(Vm *vm, uint64_t features)
{
    guest_start_queues(&vm->f, features);
    qvirtio_set_driver_ok(&vm->f.dev->vdev);
    guest_post(&vm->f, 30);
}

/* What came from "in", by what became of it */
static void expect_injected(Vm *vm, uint64_t packets, uint64_t skipped)
{
    wait_counter(&vm->f, "inj", "inject-packets", packets);
    g_assert_cmpuint(counter(&vm->f, "inj", "inject-interface-drops"), ==, 0);
    g_assert_cmpuint(counter(&vm->f, "inj", "inject-skipped"), ==, skipped);
}

/*
 * The kernel says the same of a full TAP and of a GSO frame that it cannot send
 * whole, so after it the segments are tried: each second error is about these.
 */
static void test_error_inject_gso(Vm *vm)
{
    static const struct {
        int error;
        unsigned times;
        unsigned frames;        /* in which each one comes */
    } table[] = {
        { ENOBUFS, 4, 1 }, { EAGAIN, 4, 1 },
        { ENOBUFS, 5, GSO_SEGMENTS }, { EAGAIN, 5, GSO_SEGMENTS },
    };

    for (int i = 0; i < ARRAY_SIZE(table); i++) {
        add_inject(&vm->f);
        guest_begin_gso(vm, GSO_WHOLE);
        fail(FAULT_SENDMMSG, table[i].error, table[i].times);
        g_assert_cmpuint(inject_gso(vm, false), ==, table[i].frames);
        g_assert_cmpuint(fail_no_more(FAULT_SENDMMSG), ==, table[i].times);
        g_assert_cmpuint(inject_gso(vm, false), ==, 1);
        guest_stop(&vm->f);
        guest_begin_gso(vm, GSO_NONE);
        g_assert_cmpuint(inject_gso(vm, false), ==, GSO_SEGMENTS);
        guest_stop(&vm->f);
        expect_injected(vm, 6, 0);
        del_object(&vm->f, "inj");
    }
}

/* Somebody else has switched off what the guest's driver has negotiated. */
static void test_inject_gso_switched_off(Vm *vm)
{
    add_inject(&vm->f);
    guest_begin_gso(vm, GSO_WHOLE);
    g_assert_cmpuint(inject_gso(vm, false), ==, 1);
    if (!set_tso(vm->f.ifname, false)) {
        g_test_skip("could not switch TSO off");
    } else {
        g_assert_cmpuint(inject_gso(vm, false), ==, GSO_SEGMENTS);
        set_tso(vm->f.ifname, true);
        g_assert_cmpuint(inject_gso(vm, false), ==, 1);
        expect_injected(vm, 6, 0);
    }
    guest_stop(&vm->f);
}

/* A kind that is not segmented here, and that no TAP takes whole */
static void test_inject_gso_unknown(Vm *vm)
{
    add_inject(&vm->f);
    guest_begin_gso(vm, GSO_WHOLE);
    for (unsigned i = 1; i <= 3; i++) {
        g_assert_cmpuint(inject_gso(vm, true), ==, 0);
        expect_injected(vm, i, i);
    }
    guest_stop(&vm->f);
}

/* Read up to frame @last; returns how many came. */
static unsigned read_up_to(Vm *vm, uint32_t first, uint32_t last)
{
    uint8_t frame[BUFFER_LEN], header[24];
    uint32_t header_len, number;
    unsigned count = 0;

    do {
        g_assert_cmpuint(read_stream(vm->f.out, frame, sizeof(frame), header,
                                     &header_len), ==, FRAME_LEN);
        number = frame_number(frame);
        g_assert_cmpuint(number, >=, first);
        first = number + 1;
        count++;
    } while (number < last);
    g_assert_cmpuint(number, ==, last);
    return count;
}

/* Writing to the peer: what is refused for good is dropped and counted. */
static void test_error_out(Vm *vm)
{
    static const int errors[] = {
        EAGAIN, EINTR, ENOBUFS, ENOMEM, ENETDOWN, EMSGSIZE,
    };
    uint32_t n = 0, received = 0;

    guest_start(&vm->f);
    monitor_begin(vm);
    for (int i = 0; i < 2 * ARRAY_SIZE(errors); i++) {
        int error = errors[i % ARRAY_SIZE(errors)];
        bool again = error == EAGAIN || error == EINTR;
        bool forever = i >= ARRAY_SIZE(errors);
        uint32_t first = n;

        if (forever && again) {
            continue;           /* The kernel does not do that. */
        }
        fail(FAULT_WRITE_OUT, error, forever ? FOREVER : 3);
        host_send(&vm->f, n, 100);
        n += 100;
        expect_failed(FAULT_WRITE_OUT, 1);
        if (forever) {
            g_autofree char *what = g_strdup_printf("sendmsg: %s",
                                                    strerror(error));

            expect_idle(vm, what);
        }
        while (!again && !forever &&
               qatomic_read(&faults->fault[FAULT_WRITE_OUT].failed) < 3) {
            host_send(&vm->f, n++, 1);
            counter(&vm->f, "cap", "capture-packets");
        }
        if (again) {
            expect_failed(FAULT_WRITE_OUT, 3);
        }
        fail_no_more(FAULT_WRITE_OUT);
        host_send(&vm->f, n, 1);
        received += read_up_to(vm, first, n);
        n++;
        g_assert_cmpuint(received +
                         counter(&vm->f, "cap", "capture-peer-drops"), ==, n);
        if (again) {
            g_assert_cmpuint(received, ==, n);
        }
        expect_source(&vm->f, "cap", "packet-socket");
    }
    monitor_end(vm);
}

/* What was taken from the guest is not dropped, whatever the peer does. */
static void test_error_out_taken(Vm *vm)
{
    guest_start(&vm->f);
    vm_stop(&vm->f);
    fail(FAULT_WRITE_OUT, ENOBUFS, 3);
    host_send(&vm->f, 0, 10);
    expect_out(&vm->f, 0, 10);
    g_assert_cmpuint(fail_no_more(FAULT_WRITE_OUT), ==, 3);

    fail(FAULT_WRITE_OUT, EPIPE, FOREVER);
    host_send(&vm->f, 10, 10);
    wait_counter(&vm->f, "cap", "capture-packets", 20);
    expect_failed(FAULT_WRITE_OUT, 1);
    expect_idle(vm, "sendmsg: EPIPE");
    close(vm->f.out);
    expect_connected(&vm->f, "out", false);
    fail_no_more(FAULT_WRITE_OUT);
    vm->f.out = connect_to(&vm->f, "out");
    expect_out(&vm->f, 10, 10);
    g_assert_cmpuint(counter(&vm->f, "cap", "capture-peer-drops"), ==, 0);
    vm_cont(&vm->f);
}

/* Reading from the peer: what is no wait is the end of the connection. */
static void test_error_in(Vm *vm)
{
    static const int errors[] = {
        EAGAIN, EINTR, ENOBUFS, ENETDOWN, EMSGSIZE,
    };
    uint32_t n = 0;

    guest_start(&vm->f);
    for (int i = 0; i < ARRAY_SIZE(errors); i++) {
        guest_post(&vm->f, 10);
        fail(FAULT_READ_IN, errors[i], i < 2 ? 3 : 1);
        in_send(&vm->f, n, 10);
        if (i >= 2) {
            uint8_t byte;

            wait_readable(vm->f.in);
            g_assert_cmpint(read(vm->f.in, &byte, 1), <=, 0);
            close(vm->f.in);
            vm->f.in = connect_to(&vm->f, "in");
            in_send(&vm->f, n, 10);
        }
        expect_guest(&vm->f, n, 10);
        n += 10;
    }
}

/* The guest */

static void test_guest_reset(Vm *vm)
{
    uint32_t n = 0;

    for (int i = 0; i < amount(3, 50); i++) {
        guest_begin(vm);
        host_send(&vm->f, n, 10);
        expect_out(&vm->f, n, 10);
        in_send(&vm->f, n + 10, 10);
        expect_taken(vm, n, 20);
        guest_put(&vm->f, n + 20);
        expect_out(&vm->f, n + 20, 1);
        /* In the middle of all that */
        in_send(&vm->f, n + 1000, 300);
        host_send(&vm->f, n + 1000, 300);
        qtest_system_reset(vm->f.qts);
        expect_out(&vm->f, n + 1000, 300);
        wait_counter(&vm->f, "inj", "inject-packets", 310 * (i + 1));
        qvirtio_pci_device_enable(vm->f.dev);
        guest_stop(&vm->f);
        n += 2000;
    }
    expect_idle(vm, "no driver");
    guest_begin(vm);
    expect_working(vm);
}

/* S3 by the PIIX4's registers, as a guest's firmware and system do it */
static void test_guest_suspend(Vm *vm)
{
    const uint16_t base = 0x600, sleep_enable = 1 << 13, s3 = 1 << 10;
    QPCIDevice *pm;
    uint32_t n = 0;

    pm = qpci_device_find(vm->f.bus, QPCI_DEVFN(1, 3));
    g_assert_nonnull(pm);
    for (int i = 0; i < 3; i++) {
        guest_begin(vm);
        qpci_config_writel(pm, 0x40, base | 1);
        qpci_config_writeb(pm, 0x80, 1);
        qtest_outw(vm->f.qts, base + 4, sleep_enable | s3);
        qtest_qmp_eventwait(vm->f.qts, "SUSPEND");
        expect_status(&vm->f, "query-status", "suspended");
        host_send(&vm->f, n, 10);
        expect_out(&vm->f, n, 10);
        in_send(&vm->f, n + 10, 10);
        expect_idle(vm, "suspended");
        expect_other(vm);
        qtest_qmp_assert_success(vm->f.qts, "{'execute': 'system_wakeup'}");
        qtest_qmp_eventwait(vm->f.qts, "WAKEUP");
        expect_host(&vm->f, n + 10, 10);
        /* The machine was reset by that. */
        qvirtio_pci_device_enable(vm->f.dev);
        guest_stop(&vm->f);
        n += 20;
    }
    g_free(pm);
    guest_begin(vm);
    in_send(&vm->f, n, 10);
    expect_taken(vm, n, 10);
}

static void set_link(Vm *vm, const char *name, bool up)
{
    qtest_qmp_assert_success(vm->f.qts, "{'execute': 'set_link', 'arguments':"
                             " {'name': %s, 'up': %i}}", name, up);
}

static void test_guest_set_link(Vm *vm)
{
    uint32_t n = 0;

    guest_begin(vm);
    expect_working(vm);
    for (int i = 0; i < 4; i++) {
        const char *name = i & 1 ? "n0" : "nic";

        /* A copy is made before the cable. */
        set_link(vm, name, false);
        host_send(&vm->f, n, 10);
        expect_out(&vm->f, n, 10);
        in_send(&vm->f, n, 10);
        wait_counter(&vm->f, "inj", "inject-packets", 5 + 15 * i + 10);
        if (i & 1) {
            vm_stop(&vm->f);
            vm_cont(&vm->f);
        }
        expect_idle(vm, "the link is down");
        expect_other(vm);
        set_link(vm, name, true);
        g_assert_true(vhost_started(&vm->f));
        expect_working(vm);
        n += 10;
    }
}

static void expect_nic(Vm *vm, const char *property, const char *value)
{
    QDict *rsp = qtest_qmp(vm->f.qts, "{'execute': 'qom-get', 'arguments':"
                           " {'path': '/machine/peripheral/nic/virtio-backend',"
                           "  'property': %s}}", property);

    g_assert_cmpstr(qdict_get_str(rsp, "return"), ==, value);
    qobject_unref(rsp);
}

/* Whether vhost moves the packets; if not, @reason is why. */
static bool check_datapath(Vm *vm, const char *reason)
{
    bool vhost = vhost_started(&vm->f);

    expect_nic(vm, "datapath", vhost ? "vhost" : "userspace");
    expect_nic(vm, "datapath-reason", vhost ? "" : reason);
    return vhost;
}

/* Whichever step of vhost's start fails: QEMU moves the packets instead. */
static void test_guest_vhost_fails(Vm *vm)
{
    unsigned skip = 0, failed, userspace = 0;

    do {
        fail_after(FAULT_VHOST, ENOMEM, skip, 1);
        guest_begin(vm);
        failed = fail_no_more(FAULT_VHOST);
        if (!check_datapath(vm, "vhost could not be started")) {
            g_assert_cmpuint(failed, ==, 1);
            userspace++;
        }
        expect_working(vm);
        vm_stop(&vm->f);
        g_assert_false(check_datapath(vm, "the VM is stopped"));
        vm_cont(&vm->f);
        g_assert_true(check_datapath(vm, NULL));
        expect_working(vm);
        guest_stop(&vm->f);
        skip += amount(5, 1);
    } while (failed);
    g_test_message("one of %u calls failed; %u times vhost was not started",
                   skip, userspace);
    g_assert_cmpuint(userspace, >, 0);
}

/*
 * A guest that resets a queue while the TAP takes no packets, and maybe vhost
 * waits for that.  The packet that waits ends there, and those behind it with
 * their queue.
 */
static void check_queue_reset_blocked(bool delayed)
{
    uint32_t n = 0;
    Vm vm;

    vm_start(&vm, "-object filter-rewriter,id=flt,netdev=n0");
    guest_start(&vm.f);
    for (int i = 0; i < 6; i++) {
        bool tx = i & 1;
        /* Once it may start, vhost may send more before its reset. */
        uint32_t count = delayed && tx ? 1 : 5;

        fail(FAULT_WRITE_TAP, EAGAIN, FOREVER);
        for (int j = 0; j < count; j++) {
            guest_send_begin(&vm.f, n + j);
        }
        expect_failed(FAULT_WRITE_TAP, 1);
        if (delayed) {
            set_status(&vm.f, "flt", "off");
            g_assert_false(check_datapath(&vm, "packets wait in QEMU"));
        }
        if (tx) {
            vm.f.guest.tx = guest_move_queue(&vm.f, vm.f.guest.tx);
        } else {
            vm.f.guest.rx = guest_move_queue(&vm.f, vm.f.guest.rx);
        }
        g_assert_cmpint(vhost_started(&vm.f), ==, delayed);
        fail_no_more(FAULT_WRITE_TAP);
        if (tx) {
            guest_send(&vm.f, n + count, 5);
            expect_host(&vm.f, n + count, 5);
            n += 5;
        } else {
            expect_host(&vm.f, n + 1, count - 1);
            vm.f.guest.tx = guest_move_queue(&vm.f, vm.f.guest.tx);
        }
        n += count;
        guest_post(&vm.f, 5);
        host_send(&vm.f, 1000 + n, 5);
        expect_guest(&vm.f, 1000 + n, 5);
        set_status(&vm.f, "flt", "on");
    }
    vm_quit(&vm);
}

static void test_queue_reset_blocked(void)
{
    check_queue_reset_blocked(false);
    check_queue_reset_blocked(true);
}

/* The same when the VM stops: the others come when it goes on. */
static void test_guest_stop_blocked(Vm *vm)
{
    guest_start(&vm->f);
    for (int i = 0; i < 6; i++) {
        uint32_t n = 20 * i;
        bool off = i & 1;

        fail(FAULT_WRITE_TAP, EAGAIN, FOREVER);
        for (int j = 0; j < 10; j++) {
            guest_send_begin(&vm->f, n + j);
        }
        expect_failed(FAULT_WRITE_TAP, 1);
        vm_stop(&vm->f);
        fail_no_more(FAULT_WRITE_TAP);
        if (off) {
            set_status(&vm->f, "flt", "off");
        }
        vm_cont(&vm->f);
        expect_host(&vm->f, n + 1, 9);
        g_assert_cmpint(vhost_started(&vm->f), ==, off);
        vm->f.guest.tx = guest_move_queue(&vm->f, vm->f.guest.tx);
        guest_send(&vm->f, n + 10, 10);
        expect_host(&vm->f, n + 10, 10);
        set_status(&vm->f, "flt", "on");
    }
}

static void test_guest_no_vhost(void)
{
    Vm vm;

    vm_start_with(&vm, "vhost=off", "");
    g_assert_false(check_datapath(&vm, "the netdev has no vhost"));
    guest_begin(&vm);
    g_assert_false(check_datapath(&vm, "the netdev has no vhost"));
    vm_stop(&vm.f);
    g_assert_false(check_datapath(&vm, "the netdev has no vhost"));
    vm_cont(&vm.f);
    vm_quit(&vm);
}

/* A guest that writes anything to its rings, and is reset after that */
static void test_guest_ring_errors(Vm *vm)
{
    uint32_t n = 0;

    for (int i = 0; i < amount(4, 60); i++) {
        static const uint64_t addresses[] = { 1ull << 50, -4096ull, 0 };
        QVirtQueue *queue;
        uint8_t *desc, *avail;

        guest_begin(vm);
        expect_working(vm);
        queue = i & 1 ? vm->f.guest.tx : vm->f.guest.rx;
        desc = vm->f.guest.ram + queue->desc;
        avail = vm->f.guest.ram + queue->avail;
        for (int j = 0; j < queue->size; j++) {
            /* Memory that is not there, and loops of descriptors */
            stq_le_p(desc + 16 * j, addresses[i % 3]);
            stl_le_p(desc + 16 * j + 8, 0x7fffffff);
            stw_le_p(desc + 16 * j + 12, 1 | (i & 1 ? 0 : 2));
            stw_le_p(desc + 16 * j + 14, j);
            /* No such descriptors */
            stw_le_p(avail + 4 + 2 * j, i & 2 ? 0xffff : j);
        }
        /* More than there are */
        stw_le_p(avail + 2, lduw_le_p(avail + 2) + 30000);
        vm->f.dev->vdev.bus->virtqueue_kick(&vm->f.dev->vdev, queue);
        host_send(&vm->f, n, 20);
        expect_out(&vm->f, n, 20);
        in_send(&vm->f, n, 20);
        wait_counter(&vm->f, "inj", "inject-packets", 25 * (i + 1));
        if (i < 2) {
            expect_idle(vm, "ring error");
        }
        expect_other(vm);
        guest_stop(&vm->f);
        n += 20;
    }
    guest_begin(vm);
    expect_working(vm);
}

/* Memory */

static void count_guest_frame(void *opaque, uint32_t number)
{
    uint32_t *next = opaque;

    g_assert_cmpuint(number, ==, (*next)++);
}

/* Wait for frames in the guest's mapped memory, and in the peer's socket. */
static void expect_both(Vm *vm, uint32_t *next, uint32_t end, bool out)
{
    gint64 limit = g_get_monotonic_time() + TIMEOUT_US;
    uint32_t first = *next;

    while (*next < end) {
        guest_take(&vm->f, count_guest_frame, next);
        g_assert_cmpint(g_get_monotonic_time(), <, limit);
    }
    if (out) {
        expect_out(&vm->f, first, end - first);
    }
}

/* Nothing is allocated for a packet: 10,000 captured, 10,000 injected */
static void test_allocations(void)
{
    const uint32_t frames = 10000, burst = 100;
    uint64_t allocations[2];
    uint32_t next = 0;
    Vm vm;

    vm_start(&vm, BOTH);
    guest_start(&vm.f);
    guest_map(&vm.f);
    if (!qatomic_read(&faults->allocations)) {
        g_test_skip("QEMU's allocator cannot be replaced");
        vm_quit(&vm);
        return;
    }
    for (int inject = 0; inject < 2; inject++) {
        /* The first of them may allocate what lasts. */
        for (uint32_t i = 0; i < frames + burst; i += burst) {
            if (i == burst) {
                allocations[inject] = qatomic_read(&faults->allocations);
            }
            if (inject) {
                in_send(&vm.f, next, burst);
            } else {
                host_send(&vm.f, next, burst);
            }
            expect_both(&vm, &next, next + burst, !inject);
        }
        allocations[inject] = qatomic_read(&faults->allocations) -
                              allocations[inject];
    }
    g_test_message("%u packets captured: %" PRIu64 " allocations", frames,
                   allocations[0]);
    g_test_message("%u packets injected: %" PRIu64 " allocations", frames,
                   allocations[1]);
    g_assert_cmpuint(allocations[0], <, frames / 10);
    g_assert_cmpuint(allocations[1], <, frames / 10);
    vm_quit(&vm);
}

static char *begin_faults(void)
{
    g_autofree char *preload = g_test_build_filename(G_TEST_BUILT,
                                                     "fault-preload.so", NULL);
    g_autofree char *binary = NULL;
    g_autoptr(GError) err = NULL;
    char *path;
    int fd = g_file_open_tmp("fault-control-XXXXXX", &path, &err);

    g_assert_no_error(err);
    g_assert_cmpint(ftruncate(fd, sizeof(*faults)), ==, 0);
    faults = mmap(NULL, sizeof(*faults), PROT_READ | PROT_WRITE, MAP_SHARED,
                  fd, 0);
    g_assert_true(faults != MAP_FAILED);
    close(fd);
    /* In QEMU alone */
    binary = g_strdup_printf("env LD_PRELOAD=%s " FAULT_CONTROL_ENV "=%s %s",
                             preload, path, getenv("QTEST_QEMU_BINARY"));
    g_setenv("QTEST_QEMU_BINARY", binary, true);
    return path;
}

typedef struct VmTest {
    const char *args;
    void (*func)(Vm *vm);
} VmTest;

static void run_vm_test(const void *data)
{
    const VmTest *test = data;
    Vm vm;

    vm_start(&vm, test->args);
    test->func(&vm);
    vm_quit(&vm);
}

static void add_vm(const char *path, const char *args, void (*func)(Vm *vm))
{
    VmTest *test = g_new(VmTest, 1);

    *test = (VmTest) { .args = args, .func = func };
    rig_add_data(path, test, run_vm_test);
}

int main(int argc, char **argv)
{
    g_autofree char *path = NULL;
    int ret;

    rig_init(&argc, &argv, "filter-redirector-faults");
    path = begin_faults();

    add_vm("peer/all", CAPTURE "tx,buffer-size=4M", test_peer_all);
    add_vm("peer/never", "", test_peer_never);
    add_vm("peer/reconnect", "", test_peer_reconnect);
    add_vm("peer/refuses", "", test_peer_refuses);
    rig_add("peer/nothing-stale", test_peer_nothing_stale);
    add_vm("peer/flood", CAPTURE "all", test_peer_flood);
    rig_add("interface/down", test_interface_down);
    add_vm("interface/down-network", INJECT "rx", test_interface_down_network);
    rig_add("interface/deleted", test_interface_deleted);
    add_vm("interface/renamed", BOTH, test_interface_renamed);
    add_vm("interface/mtu", BOTH, test_interface_mtu);
    add_vm("interface/mac", BOTH, test_interface_mac);
    rig_add("interface/netns", test_interface_netns);
    add_vm("interface/full", BOTH, test_interface_full);
    add_vm("error/setup", "", test_error_setup);
    add_vm("error/capture", CAPTURE "all", test_error_capture);
    add_vm("error/capture-ring", CAPTURE "tx", test_error_capture_ring);
    add_vm("error/inject", INJECT "tx", test_error_inject);
    add_vm("error/inject-network", INJECT "rx", test_error_inject_network);
    add_vm("error/inject-gso", "", test_error_inject_gso);
    add_vm("inject/gso-switched-off", "", test_inject_gso_switched_off);
    add_vm("inject/gso-unknown", "", test_inject_gso_unknown);
    add_vm("error/out", CAPTURE "tx", test_error_out);
    add_vm("error/out-taken", CAPTURE STOPPED_ONLY, test_error_out_taken);
    add_vm("error/in", INJECT "tx", test_error_in);
    add_vm("guest/reset", CAPTURE "all " INJECT "tx", test_guest_reset);
    add_vm("guest/suspend", CAPTURE "tx " INJECT "all", test_guest_suspend);
    add_vm("guest/set-link", BOTH, test_guest_set_link);
    if (HAS_FALLBACK) {
        add_vm("guest/vhost-fails", BOTH, test_guest_vhost_fails);
        rig_add("guest/queue-reset-blocked", test_queue_reset_blocked);
        add_vm("guest/stop-blocked", "-object filter-rewriter,id=flt,netdev=n0",
               test_guest_stop_blocked);
        rig_add("guest/no-vhost", test_guest_no_vhost);
    }
    add_vm("guest/ring-errors", BOTH, test_guest_ring_errors);
    rig_add("memory/allocations", test_allocations);
    ret = g_test_run();
    unlink(path);
    return ret;
}
