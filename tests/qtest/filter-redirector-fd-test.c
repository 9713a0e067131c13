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
#include "qapi/error.h"
#include "qemu/atomic.h"
#include "qobject/qdict.h"
#include "qobject/qjson.h"

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
    install.helper = g_build_filename(install.qemu_dir, "contrib",
                                      "packet-socket-helper",
                                      "packet-socket-helper", NULL);
    install.bios = g_build_filename(install.dir, "bios", NULL);
    install.script = g_build_filename(install.dir, name, NULL);
    g_assert_cmpint(mkdir(install.qemu_dir, 0755), ==, 0);
    g_assert_cmpint(mount(build, install.qemu_dir, NULL, MS_BIND, NULL),
                    ==, 0);
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
    /* The timer is gone, too. */
    g_assert_cmpint(count_fds(&f), ==, before - 3);
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

/* To capture with enable_when_running=off takes no socket: one is enough. */
static void test_getfd_stopped_only(void)
{
    Fixture f;

    start(&f, "");
    guest_start(&f);
    getfd(&f, "i", helper_socket(&f));
    add(&f, QMP_CAPTURE "'queue': 'tx', 'indev': 'in', 'packet-fd': 'i',"
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
    int tap, fd;

    start(&f, "");
    guest_start(&f);
    expect_bad_fd(&f, open("/dev/null", O_RDWR), "is not a packet socket");
    expect_bad_fd(&f, socket(AF_INET, SOCK_DGRAM, 0),
                  "is not a packet socket");
    expect_bad_fd(&f, socket(AF_PACKET, SOCK_DGRAM, 0),
                  "netdev 'n0': 'packet-fd': the packet socket is not of type "
                  "SOCK_RAW");
    tap = open_tap("tapbad");
    set_interface_up("tapbad", true);
    expect_bad_fd(&f, bound_socket("tapbad", ETH_P_ALL),
                  "the packet socket is bound to interface 'tapbad', not to "
                  "'tapq");
    fd = bound_socket("tapbad", 0);
    close(tap);
    expect_bad_fd(&f, fd, "is bound to an interface that is gone");
    expect_bad_fd(&f, socket_in_other_netns(f.ifname, false),
                  "is in another network namespace than interface 'tapq");
    expect_bad_fd(&f, socket_in_other_netns(f.ifname, true),
                  "is in another network namespace than interface 'tapq");
    expect_bad_fd(&f, socket_in_fanout(f.ifname), "is in a fanout group");
    expect_bad_fd(&f, socket_with_locked_filter(),
                  "has a filter that is locked");
    expect_bad_fd(&f, socket_with_ring(PACKET_RX_RING), "has a ring already");
    expect_bad_fd(&f, socket_with_ring(PACKET_TX_RING), "has a ring already");

    /* To capture it is good. */
    getfd(&f, "bad", socket(AF_PACKET, SOCK_RAW, 0));
    expect_refused(&f, QMP_INJECT "'queue': 'tx', 'packet-fd': 'bad'",
                   "could not set SO_MARK 0x71656d75 on the packet socket of "
                   "interface 'tapq");
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
    expect_refused(&f, QMP_CAPTURE "'indev': 'in', 'packet-fd': 'c',"
                   " 'inject-packet-fd': 'i'",
                   "netdev 'n0': 'inject-packet-fd': file descriptor");
    g_assert_cmpint(count_fds(&f), ==, before);

    getfd(&f, "c", open("/dev/null", O_RDWR));
    getfd(&f, "i", helper_socket(&f));
    expect_refused(&f, QMP_CAPTURE "'indev': 'in', 'packet-fd': 'c',"
                   " 'inject-packet-fd': 'i'",
                   "netdev 'n0': 'packet-fd': file descriptor");
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
                   "file descriptor 1000 is not a packet socket");
    expect_refused(&f, QMP_CAPTURE "'packet-fd': '/dev/fdset/9'",
                   "'packet-fd': Failed to find fdset /dev/fdset/9");
    expect_refused(&f, QMP_INJECT "'queue': 'rx', 'packet-fd': 'c'",
                   "'packet-fd' is a packet socket that the filter does not "
                   "need");
    expect_refused(&f, QMP_CAPTURE "'packet-fd': 'c',"
                   " 'enable_when_running': false,"
                   " 'enable_when_stopped': true",
                   "'packet-fd' is a packet socket that the filter does not "
                   "need");
    expect_refused(&f, QMP_CAPTURE "'inject-packet-fd': 'i',"
                   " 'enable_when_running': false,"
                   " 'enable_when_stopped': true",
                   "'inject-packet-fd' is a packet socket that the filter "
                   "does not need");
    expect_refused(&f, "'qom-type': 'filter-redirector', 'id': 'x',"
                   " 'netdev': 'hub', 'outdev': 'out', 'packet-fd': 'c'",
                   "'packet-fd' is a packet socket, which is not used on "
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
                   "'packet-fd': file descriptor " FIRST_FD " is in use "
                   "already");
    expect_captures(&f, "cap", 0);
    expect_refused(&f, "'qom-type': 'filter-redirector', 'id': 'two',"
                   " 'netdev': 'n0', 'indev': 'in', 'outdev': 'null',"
                   " 'packet-fd': '" SECOND_FD "',"
                   " 'inject-packet-fd': '" SECOND_FD "'",
                   "'inject-packet-fd': file descriptor " SECOND_FD " is in "
                   "use already");
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
                            "socket for interface 'tapno': Operation not "
                            "permitted"));
    g_assert_nonnull(strstr(text, "CAP_NET_RAW"));
    g_assert_nonnull(strstr(text, "'packet-fd'"));
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
    rig_add("getfd/two", test_getfd);
    rig_add("getfd/both", test_getfd_both);
    rig_add("getfd/stopped-only", test_getfd_stopped_only);
    rig_add("getfd/mirror", test_mirror);
    rig_add("getfd/dump", test_dump);
    rig_add("fdset", test_fdset);
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
