/*
 * QTest testcase for netfilters on a TAP with vhost, in a QEMU that has no
 * privilege
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * QEMU runs as management software runs it: as another user, without any
 * capability, in a sandbox, with a TAP and a vhost that were opened for it.
 * Packet sockets come from contrib/packet-socket-helper, or from the test where
 * they have to be wrong.
 */

#include "qemu/osdep.h"
#include <net/if.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <linux/filter.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include "filter-redirector-rig.h"
#include "libqos/virtio.h"
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "qemu/bswap.h"
#include "qobject/qdict.h"
#include "qobject/qjson.h"
#include "standard-headers/linux/virtio_net.h"

#define NOBODY "65534"
#define AS_NOBODY "setpriv --reuid=" NOBODY " --regid=" NOBODY \
                  " --clear-groups --no-new-privs"
#define NO_CAPABILITY AS_NOBODY " --inh-caps=-all --ambient-caps=-all" \
                      " --bounding-set=-all"
#define NET_RAW AS_NOBODY " --inh-caps=-all,+net_raw" \
                " --ambient-caps=-all,+net_raw --bounding-set=-all,+net_raw"
#define SANDBOX "-sandbox on,obsolete=deny,elevateprivileges=deny," \
                "spawn=deny,resourcecontrol=deny "

/* What the helper gives to QEMU on the command line */
#define FIRST_FD "100"
#define SECOND_FD "101"

/* Where another user finds QEMU and its firmware, though not the directories */
static struct {
    char *dir;
    char *qemu_dir;
    char *qemu;
    char *helper;
    char *bios;
    char *script;               /* starts QEMU for libqtest */
} install;

/* No CPU runs, so that it may be empty. */
static void make_bios(void)
{
    int fd = open(install.bios, O_CREAT | O_WRONLY, 0644);

    g_assert_cmpint(fd, >=, 0);
    g_assert_cmpint(ftruncate(fd, 64 * 1024), ==, 0);
    close(fd);
}

static void install_qemu(void)
{
    const char *binary = getenv("QTEST_QEMU_BINARY");
    g_autofree char *build = g_path_get_dirname(binary);
    g_autofree char *name = g_path_get_basename(binary);

    if (install.dir) {
        return;
    }
    install.dir = g_dir_make_tmp("qemu-XXXXXX", NULL);
    g_assert_nonnull(install.dir);
    g_assert_cmpint(chmod(install.dir, 0755), ==, 0);
    install.qemu_dir = g_build_filename(install.dir, "build", NULL);
    install.qemu = g_build_filename(install.qemu_dir, name, NULL);
    install.helper = g_build_filename(install.qemu_dir, "tests", "qtest",
                                      "packet-socket-helper", NULL);
    install.bios = g_build_filename(install.dir, "bios", NULL);
    install.script = g_build_filename(install.dir, name, NULL);
    g_assert_cmpint(mkdir(install.qemu_dir, 0755), ==, 0);
    g_assert_cmpint(mount(build, install.qemu_dir, NULL, MS_BIND | MS_REC,
                          NULL), ==, 0);
    make_bios();
    g_setenv("QTEST_QEMU_BINARY", install.script, true);
    /* Nobody connects to the sockets of libqtest. */
    umask(0);
}

static void uninstall_qemu(void)
{
    if (install.dir) {
        umount2(install.qemu_dir, MNT_DETACH);
        rmdir(install.qemu_dir);
        unlink(install.bios);
        unlink(install.script);
        rmdir(install.dir);
        g_free(install.dir);
        g_free(install.qemu_dir);
        g_free(install.qemu);
        g_free(install.helper);
        g_free(install.bios);
        g_free(install.script);
    }
}

/* Whoever starts QEMU opens these, and does not keep them. */
static int open_for_qemu(const char *ifname, int *vhost)
{
    int tap = open_tap(ifname);

    g_assert_cmpint(fcntl(tap, F_SETFD, 0), ==, 0);
    *vhost = open("/dev/vhost-net", O_RDWR);
    g_assert_cmpint(*vhost, >=, 0);
    return tap;
}

static void assert_status(pid_t pid, const char *line)
{
    g_autofree char *path = g_strdup_printf("/proc/%d/status", pid);
    g_autofree char *text = NULL;

    g_assert_true(g_file_get_contents(path, &text, NULL, NULL));
    g_assert_nonnull(strstr(text, line));
}

static void assert_no_privilege(Fixture *f)
{
    pid_t pid = qtest_pid(f->qts);

    assert_status(pid, "\nUid:\t" NOBODY "\t" NOBODY "\t" NOBODY "\t" NOBODY);
    assert_status(pid, "\nCapPrm:\t0000000000000000\n");
    assert_status(pid, "\nCapEff:\t0000000000000000\n");
    assert_status(pid, "\nCapAmb:\t0000000000000000\n");
    assert_status(pid, "\nNoNewPrivs:\t1\n");
    assert_status(pid, "\nSeccomp:\t2\n");
}

/* Start QEMU by the program @starter, behind fixture_name(). */
static void start_by(Fixture *f, const char *starter, const char *args)
{
    int vhost, tap = open_for_qemu(f->ifname, &vhost);
    g_autofree char *script = g_strdup_printf("#!/bin/sh\nexec %s %s \"$@\"\n",
                                              starter, install.qemu);
    g_autofree char *netdev = g_strdup_printf("fd=%d,vhostfd=%d,vhost=on",
                                              tap, vhost);
    g_autofree char *all = g_strdup_printf(SANDBOX "-bios %s "
                                           "-global apic-common.vapic=off %s",
                                           install.bios, args);

    g_assert_cmpint(chmod(f->dir, 0777), ==, 0);
    g_assert_true(g_file_set_contents(install.script, script, -1, NULL));
    g_assert_cmpint(chmod(install.script, 0755), ==, 0);
    fixture_init_named(f, netdev, ",romfile=", all);
    close(tap);
    close(vhost);
    assert_no_privilege(f);
}

/* With no packet socket */
static void start(Fixture *f, const char *args)
{
    install_qemu();
    fixture_name(f);
    start_by(f, NO_CAPABILITY, args);
}

/* With packet sockets as FIRST_FD and SECOND_FD */
static void start_with_sockets(Fixture *f, const char *args)
{
    g_autofree char *starter = NULL;

    install_qemu();
    fixture_name(f);
    starter = g_strdup_printf(NET_RAW " %s --ifname=%s --as=" FIRST_FD
                              " --as=" SECOND_FD, install.helper, f->ifname);
    start_by(f, starter, args);
}

static int receive_fd(int unix_fd)
{
    char byte;
    struct iovec iov = { .iov_base = &byte, .iov_len = sizeof(byte) };
    union {
        struct cmsghdr align;
        char buf[CMSG_SPACE(sizeof(int))];
    } control;
    struct msghdr msg = {
        .msg_iov = &iov,
        .msg_iovlen = 1,
        .msg_control = &control,
        .msg_controllen = sizeof(control),
    };
    int fd;

    g_assert_cmpint(recvmsg(unix_fd, &msg, MSG_CMSG_CLOEXEC), ==, 1);
    g_assert_nonnull(CMSG_FIRSTHDR(&msg));
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&msg)), sizeof(fd));
    return fd;
}

/* What management software gets from the helper */
static int helper_socket(Fixture *f)
{
    g_autofree char *command = NULL;
    int sv[2], fd;

    g_assert_cmpint(socketpair(AF_UNIX, SOCK_STREAM, 0, sv), ==, 0);
    command = g_strdup_printf(NET_RAW " %s --ifname=%s --fd=%d",
                              install.helper, f->ifname, sv[1]);
    g_assert_cmpint(system(command), ==, 0);
    fd = receive_fd(sv[0]);
    close(sv[0]);
    close(sv[1]);
    return fd;
}

/* QEMU has it then, and not the test. */
static void getfd(Fixture *f, const char *name, int fd)
{
    qtest_qmp_fds_assert_success(f->qts, &fd, 1, "{'execute': 'getfd',"
                                 " 'arguments': {'fdname': %s}}", name);
    close(fd);
}

static QObject *object_args(const char *args)
{
    g_autofree char *json = g_strdup_printf("{'execute': 'object-add',"
                                            " 'arguments': {%s}}", args);

    return qobject_from_json(json, &error_abort);
}

#define QMP_CAPTURE "'qom-type': 'filter-redirector', 'id': 'cap'," \
                    " 'netdev': 'n0', 'outdev': 'out'," \
                    " 'vnet_hdr_support': true, "
#define QMP_INJECT "'qom-type': 'filter-redirector', 'id': 'inj'," \
                   " 'netdev': 'n0', 'indev': 'in'," \
                   " 'vnet_hdr_support': true, "

static void add(Fixture *f, const char *args)
{
    qtest_qmp_assert_success(f->qts, "%p", object_args(args));
}

/* The packet sockets on the interface besides the test's own */
static int sockets(Fixture *f)
{
    int count = 0;

    for (unsigned protocol = 0; protocol < 16; protocol++) {
        for (int hooked = 0; hooked < 2; hooked++) {
            count += packet_sockets(f->ifname, protocol, hooked);
        }
    }
    return count;
}

static void expect_captures(Fixture *f, const char *id, uint32_t first)
{
    guest_post(f, 10);
    host_send(f, first, 10);
    expect_out(f, first, 10);
    expect_guest(f, first, 10);
    g_assert_cmpuint(counter(f, id, "capture-kernel-drops"), ==, 0);
}

static void expect_injects(Fixture *f, uint32_t first)
{
    guest_post(f, 10);
    in_send(f, first, 10);
    expect_guest(f, first, 10);
}

/* Sockets from the command line */

static void test_args_capture(void)
{
    Fixture f;

    start_with_sockets(&f, CAPTURE "tx,packet-fd=" FIRST_FD);
    guest_start(&f);
    g_assert_true(vhost_started(&f));
    expect_source(&f, "cap", "packet-socket");
    expect_captures(&f, "cap", 0);
    fixture_close(&f);
}

static void test_args_inject(void)
{
    Fixture f;

    start_with_sockets(&f, INJECT "tx,packet-fd=" FIRST_FD);
    guest_start(&f);
    g_assert_true(vhost_started(&f));
    expect_injects(&f, 0);
    fixture_close(&f);
}

static void test_args_both(void)
{
    int before;
    Fixture f;

    start_with_sockets(&f, "-object filter-redirector,id=both,netdev=n0,"
                       "indev=in,outdev=out,vnet_hdr_support=on,queue=tx,"
                       "packet-fd=" FIRST_FD ",inject-packet-fd=" SECOND_FD);
    guest_start(&f);
    g_assert_true(vhost_started(&f));
    before = count_fds(&f);
    expect_injects(&f, 100);
    /* What is injected is not captured. */
    expect_captures(&f, "both", 0);
    g_assert_cmpuint(counter(&f, "both", "inject-packets"), ==, 10);
    g_assert_cmpint(sockets(&f), ==, 2);
    del_object(&f, "both");
    g_assert_cmpint(sockets(&f), ==, 0);
    /* The timer and the epoll fd are gone, too. */
    g_assert_cmpint(count_fds(&f), ==, before - 4);
    fixture_close(&f);
}

static void test_args_fdset(void)
{
    Fixture f;

    start_with_sockets(&f, "-add-fd fd=" FIRST_FD ",set=7 "
                       CAPTURE "tx,packet-fd=/dev/fdset/7");
    guest_start(&f);
    expect_captures(&f, "cap", 0);
    del_object(&f, "cap");
    fixture_close(&f);
}

/* The helper by itself: of root, too, nothing is left for the command. */
static void test_helper(void)
{
    static const char *const starters[] = { NET_RAW, "" };
    int tap;

    install_qemu();
    tap = open_tap("taphelper");
    for (int i = 0; i < ARRAY_SIZE(starters); i++) {
        g_autofree char *command = g_strdup_printf(
            "%s %s --ifname=taphelper --as=" FIRST_FD " sh -c '"
            "grep -q CapPrm:.0000000000000000 /proc/self/status && "
            "grep -q CapEff:.0000000000000000 /proc/self/status && "
            "readlink /proc/self/fd/" FIRST_FD " | grep -q ^socket:'",
            starters[i], install.helper);

        g_assert_cmpint(system(command), ==, 0);
    }
    close(tap);
}

/*
 * Run the helper with @options, and with a command that must not run.
 * Returns: what it says
 */
static char *helper_refuses(const char *starter, const char *options)
{
    g_autofree char *command = g_strdup_printf(
        "%s %s --ifname=taphelper %s echo COMMAND RUNS 2>&1",
        starter, install.helper, options);
    GString *said = g_string_new(NULL);
    FILE *pipe = popen(command, "r");
    char buf[256];
    size_t len;
    int status;

    g_assert_nonnull(pipe);
    while ((len = fread(buf, 1, sizeof(buf), pipe)) > 0) {
        g_string_append_len(said, buf, len);
    }
    status = pclose(pipe);
    g_assert_true(WIFEXITED(status));
    g_assert_cmpint(WEXITSTATUS(status), ==, EXIT_FAILURE);
    g_assert_null(strstr(said->str, "COMMAND RUNS"));
    return g_string_free(said, false);
}

/* A socket replaces nothing that is open, not even another socket. */
static void test_helper_open(void)
{
    static const char *const options[] = {
        "--as=0", "--as=2", "--as=" FIRST_FD " --as=" FIRST_FD,
    };
    int tap;

    install_qemu();
    tap = open_tap("taphelper");
    for (int i = 0; i < ARRAY_SIZE(options); i++) {
        g_autofree char *said = helper_refuses(NET_RAW, options[i]);

        g_assert_nonnull(strstr(said, "is open already"));
    }
    close(tap);
}

/* What is missing, and how it is given */
static void test_helper_capability(void)
{
    g_autofree char *said = NULL;
    int tap;

    install_qemu();
    tap = open_tap("taphelper");
    said = helper_refuses(NO_CAPABILITY, "--as=" FIRST_FD);
    g_assert_nonnull(strstr(said, "CAP_NET_RAW is missing"));
    g_assert_nonnull(strstr(said, "--ambient-caps=+net_raw"));
    g_assert_nonnull(strstr(said, "AmbientCapabilities="));
    close(tap);
}

/* Sockets by QMP */

static void test_getfd(void)
{
    uint32_t number = 0;
    int before;
    Fixture f;

    start(&f, "");
    guest_start(&f);
    before = count_fds(&f);
    for (int i = 0; i < 5; i++) {
        getfd(&f, "c", helper_socket(&f));
        add(&f, QMP_CAPTURE "'queue': 'tx', 'packet-fd': 'c'");
        expect_captures(&f, "cap", number);
        getfd(&f, "i", helper_socket(&f));
        add(&f, QMP_INJECT "'queue': 'tx', 'packet-fd': 'i'");
        expect_injects(&f, number + 10);
        expect_captures(&f, "cap", number + 20);
        number += 30;
        del_object(&f, "cap");
        del_object(&f, "inj");
        g_assert_cmpint(count_fds(&f), ==, before);
        g_assert_cmpint(sockets(&f), ==, 0);
    }
    fixture_close(&f);
}

static void test_getfd_both(void)
{
    int before;
    Fixture f;

    start(&f, "");
    guest_start(&f);
    before = count_fds(&f);
    getfd(&f, "c", helper_socket(&f));
    getfd(&f, "i", helper_socket(&f));
    add(&f, QMP_CAPTURE "'queue': 'tx', 'indev': 'in', 'packet-fd': 'c',"
        " 'inject-packet-fd': 'i'");
    expect_injects(&f, 100);
    expect_captures(&f, "cap", 0);
    del_object(&f, "cap");
    g_assert_cmpint(count_fds(&f), ==, before);
    fixture_close(&f);
}

/* To capture with enable_when_running=off takes no socket. */
static void test_getfd_stopped_only(void)
{
    Fixture f;

    start(&f, "");
    guest_start(&f);
    add(&f, QMP_CAPTURE "'queue': 'tx',"
        " 'enable_when_running': false, 'enable_when_stopped': true");
    vm_stop(&f);
    expect_source(&f, "cap", "chain");
    host_send(&f, 0, 10);
    expect_out(&f, 0, 10);
    fixture_close(&f);
}

static void test_fdset(void)
{
    g_autofree char *args = NULL;
    int before, fd;
    int64_t id;
    QDict *rsp;
    Fixture f;

    start(&f, "");
    guest_start(&f);
    before = count_fds(&f);
    fd = helper_socket(&f);
    rsp = qtest_qmp_fds_assert_success_ref(f.qts, &fd, 1,
                                           "{'execute': 'add-fd'}");
    id = qdict_get_int(rsp, "fdset-id");
    qobject_unref(rsp);
    close(fd);
    args = g_strdup_printf(QMP_CAPTURE "'queue': 'all',"
                           " 'packet-fd': '/dev/fdset/%" PRId64 "'", id);
    add(&f, args);
    expect_captures(&f, "cap", 0);
    del_object(&f, "cap");
    qtest_qmp_assert_success(f.qts, "{'execute': 'remove-fd', 'arguments':"
                             " {'fdset-id': %" PRId64 "}}", id);
    g_assert_cmpint(count_fds(&f), ==, before);
    g_assert_cmpint(sockets(&f), ==, 0);
    fixture_close(&f);
}

static void test_mirror(void)
{
    Fixture f;

    start(&f, "");
    guest_start(&f);
    getfd(&f, "c", helper_socket(&f));
    add(&f, "'qom-type': 'filter-mirror', 'id': 'mir', 'netdev': 'n0',"
        " 'outdev': 'out', 'vnet_hdr_support': true, 'queue': 'tx',"
        " 'packet-fd': 'c'");
    expect_captures(&f, "mir", 0);
    fixture_close(&f);
}

static void test_dump(void)
{
    g_autofree char *args = NULL;
    g_autofree char *path = NULL;
    Fixture f;

    start(&f, "");
    guest_start(&f);
    getfd(&f, "c", helper_socket(&f));
    path = g_build_filename(f.dir, "pcap", NULL);
    args = g_strdup_printf("'qom-type': 'filter-dump', 'id': 'dump',"
                           " 'netdev': 'n0', 'file': '%s', 'queue': 'tx',"
                           " 'packet-fd': 'c'", path);
    add(&f, args);
    guest_post(&f, 10);
    host_send(&f, 0, 10);
    expect_guest(&f, 0, 10);
    wait_counter(&f, "dump", "capture-packets", 10);
    unlink(path);
    fixture_close(&f);
}

/* All that is done with the sockets later */

#define HDR_LEN sizeof(struct virtio_net_hdr_v1)
#define GARBAGE_MAX (HDR_LEN + 300)
#define GARBAGES 100

/* A VM with a capture, and with an injection each for queue=all and queue=rx */
typedef struct Later {
    Fixture f;
    bool captures_rx;           /* and not tx alone */
    bool captures_stopped;
    int rx;                     /* peer of the indev with queue=rx */
    uint32_t number;            /* of the next frame */
} Later;

/* What the kernel has of a packet socket, and shows to whoever holds it */
typedef struct SocketState {
    unsigned protocol;
    unsigned ifindex;
    unsigned hooked;
    socklen_t filter_len;
    struct sock_filter filter[32];
} SocketState;

static void get_socket_state(int fd, SocketState *state)
{
    g_autofree char *text = NULL;
    g_auto(GStrv) lines = NULL;
    struct stat st;
    bool found = false;

    memset(state, 0, sizeof(*state));
    state->filter_len = ARRAY_SIZE(state->filter);
    g_assert_cmpint(getsockopt(fd, SOL_SOCKET, SO_GET_FILTER, state->filter,
                               &state->filter_len), ==, 0);
    g_assert_cmpint(fstat(fd, &st), ==, 0);
    g_assert_true(g_file_get_contents("/proc/net/packet", &text, NULL, NULL));
    lines = g_strsplit(text, "\n", -1);
    for (int i = 1; lines[i] && *lines[i] && !found; i++) {
        unsigned long inode;

        g_assert_cmpint(sscanf(lines[i], "%*s %*s %*s %x %u %u %*s %*s %lu",
                               &state->protocol, &state->ifindex,
                               &state->hooked, &inode), ==, 4);
        found = inode == st.st_ino;
    }
    g_assert_true(found);
}

static void expect_socket_state(int fd, const SocketState *want)
{
    SocketState got;

    get_socket_state(fd, &got);
    g_assert_cmphex(got.protocol, ==, want->protocol);
    g_assert_cmpuint(got.ifindex, ==, want->ifindex);
    g_assert_cmpmem(&got, sizeof(got), want, sizeof(*want));
}

/* QEMU has it then, and the test as well. */
static int getfd_shared(Fixture *f, const char *name)
{
    int fd = helper_socket(f), copy = dup(fd);

    g_assert_cmpint(copy, >=, 0);
    getfd(f, name, fd);
    return copy;
}

static int add_server(Fixture *f, const char *id)
{
    g_autofree char *path = g_build_filename(f->dir, id, NULL);

    qtest_qmp_assert_success(f->qts, "{'execute': 'chardev-add', 'arguments':"
                             " {'id': %s, 'backend': {'type': 'socket',"
                             "  'data': {'addr': {'type': 'unix', 'data':"
                             "  {'path': %s}}, 'wait': false}}}}", id, path);
    return connect_to(f, id);
}

static void wait_hooked(Fixture *f, int count)
{
    gint64 end = g_get_monotonic_time() + TIMEOUT_US;

    while (packet_sockets(f->ifname, ETH_P_ALL, 1) != count) {
        g_assert_cmpint(g_get_monotonic_time(), <, end);
        g_usleep(1000);
    }
}

static void wait_vhost(Fixture *f, bool started)
{
    gint64 end = g_get_monotonic_time() + TIMEOUT_US;

    while (vhost_started(f) != started) {
        g_assert_cmpint(g_get_monotonic_time(), <, end);
    }
}

static void rx_send(Later *l, uint32_t first, uint32_t count)
{
    int in = l->f.in;

    l->f.in = l->rx;
    in_send(&l->f, first, count);
    l->f.in = in;
}

/* Both ways, and each object */
static void expect_all_works(Later *l)
{
    Fixture *f = &l->f;
    uint32_t n = l->number;

    guest_post(f, 20);
    host_send(f, n, 10);
    expect_out(f, n, 10);
    expect_guest(f, n, 10);
    guest_send(f, n + 10, 10);
    expect_host(f, n + 10, 10);
    if (l->captures_rx) {
        expect_out(f, n + 10, 10);
    }
    in_send(f, n + 20, 10);
    expect_guest(f, n + 20, 10);
    if (!l->captures_rx) {
        expect_host(f, n + 20, 10);
    }
    rx_send(l, n + 30, 10);
    expect_host(f, n + 30, 10);
    if (l->captures_rx) {
        expect_out(f, n + 30, 10);
    }
    l->number = n + 40;
}

static void switch_status(Later *l)
{
    static const char *const ids[] = { "cap", "inj", "injrx" };

    for (int i = 0; i < ARRAY_SIZE(ids); i++) {
        set_status(&l->f, ids[i], "off");
    }
    /* So that it must be bound once more */
    wait_hooked(&l->f, 0);
    for (int i = 0; i < ARRAY_SIZE(ids); i++) {
        set_status(&l->f, ids[i], "on");
    }
    expect_all_works(l);
}

static void reconnect_out(Later *l)
{
    close(l->f.out);
    expect_connected(&l->f, "out", false);
    wait_hooked(&l->f, 0);
    l->f.out = connect_to(&l->f, "out");
    expect_source(&l->f, "cap", "packet-socket");
    expect_all_works(l);
}

/* What comes while the VM is stopped waits for the guest. */
static void stop_and_cont(Later *l)
{
    Fixture *f = &l->f;

    vm_stop(f);
    if (!l->captures_stopped) {
        wait_hooked(f, 0);
    }
    host_send(f, l->number, 1);
    if (l->captures_stopped) {
        expect_out(f, l->number, 1);
    }
    vm_cont(f);
    guest_post(f, 1);
    expect_guest(f, l->number++, 1);
    expect_source(f, "cap", "packet-socket");
    expect_all_works(l);
}

static void switch_fallback(Later *l)
{
    Fixture *f = &l->f;

    if (!HAS_FALLBACK) {
        return;
    }
    /* A filter-buffer would wait for QEMU's clock, which stands still. */
    add(f, "'qom-type': 'filter-rewriter', 'id': 'rew', 'netdev': 'n0',"
        " 'vnet_hdr_support': true");
    for (int i = 0; i < 2; i++) {
        wait_vhost(f, false);
        expect_all_works(l);
        set_status(f, "rew", "off");
        wait_vhost(f, true);
        expect_all_works(l);
        set_status(f, "rew", "on");
    }
    wait_vhost(f, false);
    del_object(f, "rew");
    wait_vhost(f, true);
    expect_all_works(l);
}

/* A packet of IPv4 with @len bytes behind the IP header, to be cut */
static size_t make_gso(uint8_t *record, uint8_t type, uint8_t protocol,
                       size_t hdr_len, uint16_t csum_offset, size_t len)
{
    const size_t ip_at = 8 + HDR_LEN + ETH_HLEN, l4_at = ip_at + 20;
    struct virtio_net_hdr_v1 hdr = {
        .flags = VIRTIO_NET_HDR_F_NEEDS_CSUM,
        .gso_type = type,
        .hdr_len = cpu_to_le16(ETH_HLEN + 20 + hdr_len),
        .gso_size = cpu_to_le16(1000),
        .csum_start = cpu_to_le16(ETH_HLEN + 20),
        .csum_offset = cpu_to_le16(csum_offset),
    };
    uint8_t *ip = record + ip_at;

    memset(record, 0, l4_at + len);
    stl_be_p(record, HDR_LEN + ETH_HLEN + 20 + len);
    stl_be_p(record + 4, HDR_LEN);
    memcpy(record + 8, &hdr, sizeof(hdr));
    make_frame(record + 8 + HDR_LEN, 0);
    stw_be_p(ip - 2, ETH_P_IP);
    memset(ip, 0, FRAME_LEN - ETH_HLEN);
    ip[0] = 0x45;
    stw_be_p(ip + 2, 20 + len);
    ip[8] = 64;
    ip[9] = protocol;
    if (protocol == IPPROTO_TCP) {
        record[l4_at + 12] = 0x50;
    } else {
        stw_be_p(record + l4_at + 4, len);
    }
    return l4_at + len;
}

/* QEMU makes the segments of one kind of them; the other one is skipped. */
static void inject_gso(Later *l)
{
    uint64_t before = counter(&l->f, "inj", "inject-packets");
    uint8_t record[4096], frame[BUFFER_LEN];
    size_t size;

    guest_post(&l->f, 3);
    size = make_gso(record, VIRTIO_NET_HDR_GSO_TCPV4, IPPROTO_TCP, 20, 16,
                    20 + 3000);
    g_assert_cmpint(write(l->f.in, record, size), ==, size);
    for (int i = 0; i < 3; i++) {
        g_assert_cmpuint(guest_read_frame(&l->f, frame, sizeof(frame)), ==,
                         ETH_HLEN + 20 + 20 + 1000);
    }
    size = make_gso(record, VIRTIO_NET_HDR_GSO_UDP, IPPROTO_UDP, 8, 6,
                    8 + 3000);
    g_assert_cmpint(write(l->f.in, record, size), ==, size);
    wait_counter(&l->f, "inj", "inject-packets", before + 1);
    wait_counter(&l->f, "inj", "inject-skipped", 1);
    expect_all_works(l);
}

/* A virtio-net header and a frame, neither of which needs to make sense */
static size_t make_garbage(uint8_t *buf, size_t hdr_len)
{
    static const uint16_t types[] = {
        ETH_P_IP, ETH_P_IPV6, ETH_P_8021Q, ETH_P_8021AD, 0, 0xffff,
    };
    size_t size = g_test_rand_int_range(HDR_LEN + 1, GARBAGE_MAX + 1);

    for (size_t i = 0; i < size; i++) {
        buf[i] = g_test_rand_int();
    }
    if (g_test_rand_bit()) {
        memset(buf, 0, HDR_LEN);
    }
    buf[1] &= 0x87;             /* GSO, of a kind that there is */
    /* The frames that the test waits for are of another type. */
    if (size >= hdr_len + ETH_HLEN) {
        stw_be_p(buf + hdr_len + 2 * ETH_ALEN,
                 types[g_test_rand_int_range(0, ARRAY_SIZE(types))]);
    }
    return size;
}

static void guest_send_garbage(Fixture *f)
{
    gint64 end = g_get_monotonic_time() + TIMEOUT_US;
    uint64_t addr = guest_alloc(&f->alloc, GARBAGE_MAX);
    uint8_t buf[GARBAGE_MAX];
    size_t size = make_garbage(buf, HDR_LEN);
    uint32_t head, len;

    /* vhost would try one with a checksum outside the frame for ever. */
    buf[0] &= ~VIRTIO_NET_HDR_F_NEEDS_CSUM;
    qtest_memwrite(f->qts, addr, buf, size);
    head = qvirtqueue_add(f->qts, f->guest.tx, addr, size, false, false);
    qvirtqueue_kick(f->qts, &f->dev->vdev, f->guest.tx, head);
    while (!qvirtqueue_get_buf(f->qts, f->guest.tx, &head, &len)) {
        g_assert_cmpint(g_get_monotonic_time(), <, end);
    }
    guest_free(&f->alloc, addr);
}

static void in_send_garbage(Fixture *f)
{
    uint8_t record[8 + GARBAGE_MAX];
    size_t hdr_len = g_test_rand_bit() ? HDR_LEN : g_test_rand_int_range(0, 32);
    size_t size = make_garbage(record + 8, hdr_len);

    stl_be_p(record, size);
    stl_be_p(record + 4, hdr_len);
    g_assert_cmpint(write(f->in, record, 8 + size), ==, 8 + size);
}

static bool is_frame(const uint8_t *frame, uint32_t number)
{
    return lduw_be_p(frame + 2 * ETH_ALEN) == TEST_ETHERTYPE &&
           frame_number(frame) == number;
}

/* What of the garbage is a frame nevertheless comes before the good one. */
static void send_garbage(Later *l)
{
    uint8_t frame[BUFFER_LEN] = { }, header[24];
    Fixture *f = &l->f;
    uint32_t header_len;

    /* The rings are new with it. */
    guest_stop(f);
    guest_start(f);
    for (int i = 0; i < GARBAGES; i++) {
        guest_send_garbage(f);
    }
    guest_send(f, l->number, 1);
    expect_host(f, l->number, 1);
    while (l->captures_rx && !is_frame(frame, l->number)) {
        read_stream(f->out, frame, sizeof(frame), header, &header_len);
    }
    l->number++;

    for (int i = 0; i < GARBAGES; i++) {
        in_send_garbage(f);
    }
    in_send(f, l->number, 1);
    do {
        guest_post(f, 1);
        guest_read_frame(f, frame, sizeof(frame));
    } while (!is_frame(frame, l->number));
    if (!l->captures_rx) {
        expect_host(f, l->number, 1);
    }
    l->number++;

    /* No frame at all */
    memset(header, 0xff, sizeof(header));
    g_assert_cmpint(write(f->in, header, sizeof(header)), ==, sizeof(header));
    expect_connected(f, "in", false);
    close(f->in);
    f->in = connect_to(f, "in");
    expect_connected(f, "in", true);
    guest_stop(f);
    guest_start(f);
    expect_all_works(l);
}

static void run_later(const char *queue, bool stopped)
{
    static const struct {
        const char *name;
        void (*func)(Later *l);
    } steps[] = {
        { "status off and on", switch_status },
        { "outdev's peer reconnects", reconnect_out },
        { "stop and cont", stop_and_cont },
        { "a filter that needs the chain", switch_fallback },
        { "GSO frames", inject_gso },
        { "malformed frames", send_garbage },
    };
    g_autofree char *capture = g_strdup_printf(
        QMP_CAPTURE "'queue': '%s', 'packet-fd': 'c',"
        " 'enable_when_stopped': %s", queue, stopped ? "true" : "false");
    Later l = {
        .captures_rx = !g_str_equal(queue, "tx"),
        .captures_stopped = stopped,
    };
    Fixture *f = &l.f;
    g_autofree char *rx_path = NULL;
    SocketState captured, injected;
    int cap, inj;

    start(f, "");
    rx_path = g_build_filename(f->dir, "rx", NULL);
    guest_start(f);
    cap = getfd_shared(f, "c");
    add(f, capture);
    inj = getfd_shared(f, "i");
    add(f, l.captures_rx ? QMP_INJECT "'queue': 'tx', 'packet-fd': 'i'" :
                           QMP_INJECT "'queue': 'all', 'packet-fd': 'i'");
    l.rx = add_server(f, "rx");
    add(f, "'qom-type': 'filter-redirector', 'id': 'injrx', 'netdev': 'n0',"
        " 'indev': 'rx', 'vnet_hdr_support': true, 'queue': 'rx'");
    expect_all_works(&l);
    get_socket_state(cap, &captured);
    get_socket_state(inj, &injected);
    g_assert_cmpuint(captured.ifindex, ==, if_nametoindex(f->ifname));
    g_assert_cmpuint(injected.ifindex, ==, if_nametoindex(f->ifname));
    g_assert_cmphex(captured.protocol, ==, ETH_P_ALL);
    g_assert_cmphex(injected.protocol, !=, ETH_P_ALL);
    g_assert_cmpint(captured.filter_len, >, 0);
    g_assert_cmpint(injected.filter_len, >, 0);

    for (int i = 0; i < ARRAY_SIZE(steps); i++) {
        g_test_message("queue=%s: %s", queue, steps[i].name);
        steps[i].func(&l);
        assert_no_privilege(f);
        expect_socket_state(cap, &captured);
        expect_socket_state(inj, &injected);
    }

    del_object(f, "cap");
    del_object(f, "inj");
    del_object(f, "injrx");
    close(cap);
    close(inj);
    g_assert_cmpint(sockets(f), ==, 0);
    close(l.rx);
    unlink(rx_path);
    fixture_close(f);
}

static void test_later_tx(void)
{
    run_later("tx", false);
}

static void test_later_all(void)
{
    run_later("all", true);
}

/* What others get */

typedef struct Flood {
    int fd;
    bool stop;
} Flood;

static void *flood_thread(void *opaque)
{
    Flood *flood = opaque;
    uint8_t frame[FRAME_LEN];

    make_frame(frame, 0xdead);
    while (!qatomic_read(&flood->stop)) {
        send(flood->fd, frame, sizeof(frame), 0);
    }
    return NULL;
}

/* A socket that gets, and has got, frames of all interfaces */
static int greedy_socket(void)
{
    int fd = socket(AF_PACKET, SOCK_RAW, htons(ETH_P_ALL));

    g_assert_cmpint(fd, >=, 0);
    wait_readable(fd);
    return fd;
}

static void test_foreign(void)
{
    static const char *const queues[] = { "tx", "rx", "all" };
    Flood flood = { };
    uint32_t number = 0;
    GThread *thread;
    int tap;
    Fixture f;

    start(&f, "");
    guest_start(&f);
    tap = open_tap("tapother");
    set_interface_up("tapother", true);
    flood.fd = open_host("tapother");
    thread = g_thread_new("flood", flood_thread, &flood);
    for (int i = 0; i < 30; i++, number++) {
        const char *queue = queues[i % 3];
        g_autofree char *args = g_strdup_printf(QMP_CAPTURE "'queue': '%s',"
                                                " 'packet-fd': 'c'", queue);

        getfd(&f, "c", greedy_socket());
        add(&f, args);
        if (g_str_equal(queue, "rx")) {
            guest_send(&f, number, 1);
        } else {
            host_send(&f, number, 1);
        }
        expect_out(&f, number, 1);
        g_assert_cmpuint(counter(&f, "cap", "capture-packets"), ==, 1);
        del_object(&f, "cap");
    }
    qatomic_set(&flood.stop, true);
    g_thread_join(thread);
    close(flood.fd);
    close(tap);
    fixture_close(&f);
}

/* Errors */

static void expect_refused(Fixture *f, const char *args, const char *text)
{
    QDict *rsp = qtest_qmp_assert_failure_ref(f->qts, "%p", object_args(args));

    g_test_message("%s", qdict_get_str(rsp, "desc"));
    g_assert_nonnull(strstr(qdict_get_str(rsp, "desc"), text));
    qobject_unref(rsp);
}

/* What is passed is closed, and nothing else. */
static void expect_bad_fd(Fixture *f, int fd, const char *text)
{
    int before = count_fds(f);

    g_assert_cmpint(fd, >=, 0);
    getfd(f, "bad", fd);
    g_assert_cmpint(count_fds(f), ==, before + 1);
    expect_refused(f, QMP_CAPTURE "'queue': 'tx', 'packet-fd': 'bad'", text);
    g_assert_cmpint(count_fds(f), ==, before);
}

static int bound_socket(const char *ifname, unsigned protocol)
{
    struct sockaddr_ll addr = {
        .sll_family = AF_PACKET,
        .sll_protocol = htons(protocol),
        .sll_ifindex = if_nametoindex(ifname),
    };
    int fd = socket(AF_PACKET, SOCK_RAW, 0);

    g_assert_cmpint(bind(fd, (struct sockaddr *)&addr, sizeof(addr)), ==, 0);
    return fd;
}

/* There the same number and name are another interface's, or nobody's. */
static int socket_in_other_netns(const char *ifname, bool same)
{
    g_autofree char *command = g_strdup_printf(
        "ip link add %s index %u type dummy", ifname, if_nametoindex(ifname));
    int own = open("/proc/self/ns/net", O_RDONLY), fd;

    g_assert_cmpint(unshare(CLONE_NEWNET), ==, 0);
    if (same) {
        g_assert_cmpint(system(command), ==, 0);
    }
    fd = socket(AF_PACKET, SOCK_RAW, 0);
    g_assert_cmpint(setns(own, CLONE_NEWNET), ==, 0);
    close(own);
    return fd;
}

static int socket_in_fanout(const char *ifname)
{
    int fd = bound_socket(ifname, ETH_P_ALL);
    int fanout = 7 | PACKET_FANOUT_HASH << 16;

    g_assert_cmpint(setsockopt(fd, SOL_PACKET, PACKET_FANOUT,
                               &fanout, sizeof(fanout)), ==, 0);
    return fd;
}

static int socket_with_locked_filter(void)
{
    struct sock_filter all = BPF_STMT(BPF_RET | BPF_K, UINT32_MAX);
    struct sock_fprog prog = { .len = 1, .filter = &all };
    int fd = socket(AF_PACKET, SOCK_RAW, 0);
    int one = 1;

    g_assert_cmpint(setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER,
                               &prog, sizeof(prog)), ==, 0);
    g_assert_cmpint(setsockopt(fd, SOL_SOCKET, SO_LOCK_FILTER,
                               &one, sizeof(one)), ==, 0);
    return fd;
}

static int socket_with_ring(int ring)
{
    struct tpacket_req req = {
        .tp_block_size = 65536,
        .tp_block_nr = 1,
        .tp_frame_size = 2048,
        .tp_frame_nr = 32,
    };
    int fd = socket(AF_PACKET, SOCK_RAW, 0);

    g_assert_cmpint(setsockopt(fd, SOL_PACKET, ring, &req, sizeof(req)),
                    ==, 0);
    return fd;
}

static void test_bad_fd(void)
{
    Fixture f;
    int tap, fd, fds;

    start(&f, "");
    guest_start(&f);
    /* By its number it may be anything of QEMU's, and so is left as it is. */
    fds = count_fds(&f);
    expect_refused(&f, QMP_CAPTURE "'queue': 'tx', 'packet-fd': '0'",
                   "'packet-fd': cannot use file descriptor 0 for interface");
    g_assert_cmpint(count_fds(&f), ==, fds);
    expect_bad_fd(&f, open("/dev/null", O_RDWR), "is not a packet socket");
    expect_bad_fd(&f, socket(AF_INET, SOCK_DGRAM, 0),
                  "is not a packet socket");
    expect_bad_fd(&f, socket(AF_PACKET, SOCK_DGRAM, 0),
                  "is not of type SOCK_RAW");
    tap = open_tap("tapbad");
    set_interface_up("tapbad", true);
    expect_bad_fd(&f, bound_socket("tapbad", ETH_P_ALL),
                  "is bound to another interface");
    fd = bound_socket("tapbad", 0);
    close(tap);
    expect_bad_fd(&f, fd, "is bound to another interface");
    expect_bad_fd(&f, socket_in_other_netns(f.ifname, false),
                  "is in another network namespace than QEMU");
    expect_bad_fd(&f, socket_in_other_netns(f.ifname, true),
                  "is in another network namespace than QEMU");
    expect_bad_fd(&f, socket_in_fanout(f.ifname), "is in a fanout group");
    expect_bad_fd(&f, socket_with_locked_filter(),
                  "has a locked filter");
    expect_bad_fd(&f, socket_with_ring(PACKET_RX_RING), "has a ring");
    expect_bad_fd(&f, socket_with_ring(PACKET_TX_RING), "has a ring");

    getfd(&f, "good", socket(AF_PACKET, SOCK_RAW, 0));
    add(&f, QMP_CAPTURE "'queue': 'tx', 'packet-fd': 'good'");
    expect_captures(&f, "cap", 0);
    fixture_close(&f);
}

/* If the second one is bad the first one is not left behind. */
static void test_bad_second(void)
{
    int before;
    Fixture f;

    start(&f, "");
    before = count_fds(&f);
    getfd(&f, "c", helper_socket(&f));
    getfd(&f, "i", open("/dev/null", O_RDWR));
    expect_refused(&f, QMP_CAPTURE "'queue': 'tx', 'indev': 'in',"
                   " 'packet-fd': 'c',"
                   " 'inject-packet-fd': 'i'",
                   "netdev 'n0': 'inject-packet-fd': cannot use file descriptor");
    g_assert_cmpint(count_fds(&f), ==, before);

    getfd(&f, "c", open("/dev/null", O_RDWR));
    getfd(&f, "i", helper_socket(&f));
    expect_refused(&f, QMP_CAPTURE "'queue': 'tx', 'indev': 'in',"
                   " 'packet-fd': 'c',"
                   " 'inject-packet-fd': 'i'",
                   "netdev 'n0': 'packet-fd': cannot use file descriptor");
    /* The other one is the monitor's still. */
    qtest_qmp_assert_success(f.qts, "{'execute': 'closefd', 'arguments':"
                             " {'fdname': 'i'}}");
    g_assert_cmpint(count_fds(&f), ==, before);
    fixture_close(&f);
}

static void test_bad_value(void)
{
    int before;
    Fixture f;

    start(&f, "-netdev hubport,id=hub,hubid=1");
    before = count_fds(&f);
    expect_refused(&f, QMP_CAPTURE "'packet-fd': 'nothing'",
                   "'packet-fd': File descriptor named 'nothing' has not been "
                   "found");
    expect_refused(&f, QMP_CAPTURE "'packet-fd': '7up'",
                   "'packet-fd': Invalid file descriptor number '7up'");
    expect_refused(&f, QMP_CAPTURE "'packet-fd': '1000'",
                   "it is not a packet socket");
    expect_refused(&f, QMP_CAPTURE "'packet-fd': '/dev/fdset/9'",
                   "'packet-fd': Failed to find fdset /dev/fdset/9");
    expect_refused(&f, QMP_INJECT "'queue': 'rx', 'packet-fd': 'c'",
                   "'packet-fd': the filter needs no packet socket");
    expect_refused(&f, QMP_CAPTURE "'packet-fd': 'c',"
                   " 'enable_when_running': false,"
                   " 'enable_when_stopped': true",
                   "'packet-fd': the filter needs no packet socket");
    expect_refused(&f, QMP_CAPTURE "'inject-packet-fd': 'i',"
                   " 'enable_when_running': false,"
                   " 'enable_when_stopped': true",
                   "'inject-packet-fd': the filter needs no packet socket");
    expect_refused(&f, "'qom-type': 'filter-redirector', 'id': 'x',"
                   " 'netdev': 'hub', 'outdev': 'out', 'packet-fd': 'c'",
                   "'packet-fd' needs a packet socket, which is not used on "
                   "netdev 'hub'");
    g_assert_cmpint(count_fds(&f), ==, before);
    fixture_close(&f);
}

/* The number of a socket that another filter has is not taken from it. */
static void test_bad_in_use(void)
{
    Fixture f;

    start_with_sockets(&f, CAPTURE "tx,packet-fd=" FIRST_FD
                       " -chardev null,id=null");
    guest_start(&f);
    expect_refused(&f, QMP_INJECT "'packet-fd': '" FIRST_FD "'",
                   "'packet-fd': cannot use file descriptor " FIRST_FD);
    expect_captures(&f, "cap", 0);
    expect_refused(&f, "'qom-type': 'filter-redirector', 'id': 'two',"
                   " 'netdev': 'n0', 'indev': 'in', 'outdev': 'null',"
                   " 'queue': 'tx',"
                   " 'packet-fd': '" SECOND_FD "',"
                   " 'inject-packet-fd': '" SECOND_FD "'",
                   "'inject-packet-fd': cannot use file descriptor "
                   SECOND_FD);
    expect_captures(&f, "cap", 10);
    fixture_close(&f);
}

/* Without a socket it is said what to do. */
static void test_no_socket(void)
{
    g_autofree char *command = NULL;
    g_auto(GStrv) argv = NULL;
    g_autofree char *text = NULL;
    int tap, vhost;

    install_qemu();
    tap = open_for_qemu("tapno", &vhost);
    command = g_strdup_printf(NO_CAPABILITY " %s " SANDBOX
                              "-display none -nodefaults -machine none "
                              "-netdev tap,id=n0,fd=%d,vhostfd=%d,vhost=on "
                              "-chardev null,id=out " CAPTURE "tx",
                              install.qemu, tap, vhost);
    g_assert_true(g_shell_parse_argv(command, NULL, &argv, NULL));
    g_assert_true(g_spawn_sync(NULL, argv, NULL, G_SPAWN_SEARCH_PATH |
                               G_SPAWN_LEAVE_DESCRIPTORS_OPEN, NULL, NULL,
                               NULL, &text, NULL, NULL));
    g_test_message("%s", text);
    g_assert_nonnull(strstr(text, "netdev 'n0': could not open a packet "
                            "socket for interface 'tapno' (it needs "
                            "CAP_NET_RAW; without, pass a packet socket): "
                            "Operation not permitted"));
    close(tap);
    close(vhost);
}

int main(int argc, char **argv)
{
    int ret;

    rig_init(&argc, &argv, "filter-redirector-fd");

    rig_add("args/capture", test_args_capture);
    rig_add("args/inject", test_args_inject);
    rig_add("args/both", test_args_both);
    rig_add("args/fdset", test_args_fdset);
    rig_add("helper", test_helper);
    rig_add("helper-open", test_helper_open);
    rig_add("helper-capability", test_helper_capability);
    rig_add("getfd/two", test_getfd);
    rig_add("getfd/both", test_getfd_both);
    rig_add("getfd/stopped-only", test_getfd_stopped_only);
    rig_add("getfd/mirror", test_mirror);
    if (HAS_DUMP) {
        rig_add("getfd/dump", test_dump);
    }
    rig_add("fdset", test_fdset);
    rig_add("later/tx", test_later_tx);
    rig_add("later/all", test_later_all);
    rig_add("foreign", test_foreign);
    rig_add("bad/fd", test_bad_fd);
    rig_add("bad/second", test_bad_second);
    rig_add("bad/value", test_bad_value);
    rig_add("bad/in-use", test_bad_in_use);
    rig_add("bad/no-socket", test_no_socket);
    ret = g_test_run();
    uninstall_qemu();
    return ret;
}
