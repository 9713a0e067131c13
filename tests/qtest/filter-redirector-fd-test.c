/*
 * QTest testcase for netfilters on a TAP with vhost, in a QEMU that has no
 * privilege
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * QEMU runs as management software runs it: as another user, without any
 * capability, in a sandbox, with a TAP and a vhost that were opened for it.
 * Packet sockets come from contrib/packet-socket-helper, or from the test.
 */

#include "qemu/osdep.h"
#include <sched.h>
#include <sys/socket.h>
#include <linux/filter.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include "filter-redirector-rig.h"
#include "qapi/error.h"
#include "qobject/qdict.h"
#include "qobject/qjson.h"

#define NOBODY "65534"
#define AS_NOBODY "setpriv --reuid=" NOBODY " --regid=" NOBODY \
                  " --clear-groups --no-new-privs"
#define NO_CAPABILITY AS_NOBODY " --inh-caps=-all --ambient-caps=-all" \
                      " --bounding-set=-all"
#define SANDBOX "-sandbox on,obsolete=deny,elevateprivileges=deny," \
                "spawn=deny,resourcecontrol=deny "

/* What the helper gives to QEMU on the command line */
#define FIRST_FD "100"
#define SECOND_FD "101"

/* Where another user finds QEMU and its firmware, though not the directories */
static struct {
    char *dir;
    char *qemu;
    char *helper;
    char *script;               /* starts QEMU for libqtest */
} install;

static void install_qemu(void)
{
    const char *binary = getenv("QTEST_QEMU_BINARY");
    g_autofree char *build = g_path_get_dirname(binary);
    g_autofree char *name = g_path_get_basename(binary);

    if (install.dir) {
        return;
    }
    install.dir = g_dir_make_tmp("qemu-XXXXXX", NULL);
    install.qemu = g_build_filename(install.dir, "build", name, NULL);
    install.helper = g_build_filename(install.dir, "build", "tests", "qtest",
                                      "packet-socket-helper", NULL);
    install.script = g_build_filename(install.dir, name, NULL);
    /* No CPU runs, so that the firmware may be empty. */
    run_command("dir=%s && chmod 755 $dir && mkdir -m 755 $dir/build && "
                "mount --rbind %s $dir/build && truncate -s 64K $dir/bios",
                install.dir, build);
    g_setenv("QTEST_QEMU_BINARY", install.script, true);
    /* Nobody connects to the sockets of libqtest. */
    umask(0);
}

static void uninstall_qemu(void)
{
    if (install.dir) {
        run_command("dir=%s && umount -l $dir/build && rmdir $dir/build && "
                    "rm -f $dir/bios %s && rmdir $dir", install.dir,
                    install.script);
    }
}

static void assert_no_privilege(Fixture *f)
{
    static const char *const lines[] = {
        "\nUid:\t" NOBODY "\t" NOBODY "\t" NOBODY "\t" NOBODY,
        "\nCapPrm:\t0000000000000000\n",
        "\nCapEff:\t0000000000000000\n",
        "\nCapAmb:\t0000000000000000\n",
        "\nNoNewPrivs:\t1\n",
        "\nSeccomp:\t2\n",
    };
    g_autofree char *path = g_strdup_printf("/proc/%d/status",
                                            qtest_pid(f->qts));
    g_autofree char *text = NULL;

    g_assert_true(g_file_get_contents(path, &text, NULL, NULL));
    for (int i = 0; i < ARRAY_SIZE(lines); i++) {
        g_test_message("%s", lines[i]);
        g_assert_nonnull(strstr(text, lines[i]));
    }
}

/* A test with a QEMU that has no privilege, and whose driver has started */
typedef struct FdTest {
    const char *path;
    void (*func)(Fixture *f);
    const char *args;
    bool has_sockets;           /* as FIRST_FD and SECOND_FD */
} FdTest;

static void run_fd_test(const void *data)
{
    const FdTest *test = data;
    g_autofree char *script = NULL;
    g_autofree char *helper = NULL;
    g_autofree char *netdev = NULL;
    g_autofree char *args = NULL;
    int tap, vhost = open("/dev/vhost-net", O_RDWR);
    Fixture f;

    install_qemu();
    fixture_name(&f);
    g_assert_cmpint(chmod(f.dir, 0777), ==, 0);
    tap = open_tap(f.ifname);
    g_assert_cmpint(fcntl(tap, F_SETFD, 0), ==, 0);
    g_assert_cmpint(vhost, >=, 0);
    helper = g_strdup_printf("%s --ifname=%s --as=" FIRST_FD " --as=" SECOND_FD,
                             install.helper, f.ifname);
    script = g_strdup_printf("#!/bin/sh\nexec %s " NO_CAPABILITY
                             " %s \"$@\"\n",
                             test->has_sockets ? helper : "", install.qemu);
    g_assert_true(g_file_set_contents(install.script, script, -1, NULL));
    g_assert_cmpint(chmod(install.script, 0755), ==, 0);
    netdev = g_strdup_printf("fd=%d,vhostfd=%d,vhost=on", tap, vhost);
    args = g_strdup_printf(SANDBOX "-bios %s/bios "
                           "-global apic-common.vapic=off %s",
                           install.dir, test->args ?: "");
    fixture_init_named(&f, netdev, ",romfile=", args);
    close(tap);
    close(vhost);
    assert_no_privilege(&f);
    guest_start(&f);
    g_assert_true(vhost_started(&f));
    test->func(&f);
    fixture_close(&f);
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
#define QMP_STOPPED_ONLY ", 'enable_when_running': false," \
                         " 'enable_when_stopped': true"

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

static void test_args_capture(Fixture *f)
{
    expect_source(f, "cap", "packet-socket");
    expect_captures(f, "cap", 0);
    del_object(f, "cap");
}

static void test_args_two(Fixture *f)
{
    int before = count_fds(f);

    expect_injects(f, 100);
    /* What is injected is not captured. */
    expect_captures(f, "cap", 0);
    g_assert_cmpuint(counter(f, "inj", "inject-packets"), ==, 10);
    g_assert_cmpint(sockets(f), ==, 2);
    del_object(f, "cap");
    del_object(f, "inj");
    g_assert_cmpint(sockets(f), ==, 0);
    /* The timer and the epoll fd are gone, too. */
    g_assert_cmpint(count_fds(f), ==, before - 4);
}

/* Run the helper with a command that must not run.  Returns: what it says */
static char *helper_refuses(const char *starter, const char *options)
{
    g_autofree char *command = g_strdup_printf(
        "exec %s %s --ifname=taphelper %s echo COMMAND RUNS 2>&1",
        starter, install.helper, options);
    const char *argv[] = { "sh", "-c", command, NULL };
    char *said = NULL;
    int status;

    g_assert_true(g_spawn_sync(NULL, (char **)argv, NULL, G_SPAWN_SEARCH_PATH,
                               NULL, NULL, &said, NULL, &status, NULL));
    g_test_message("%s", said);
    g_assert_true(WIFEXITED(status));
    g_assert_cmpint(WEXITSTATUS(status), ==, EXIT_FAILURE);
    g_assert_null(strstr(said, "COMMAND RUNS"));
    return said;
}

static void test_helper_refuses(void)
{
    static const struct {
        const char *starter;
        const char *options;
        const char *says;
    } cases[] = {
        /* A socket replaces nothing that is open, not even another socket. */
        { "", "--as=0", "is open already" },
        { "", "--as=2", "is open already" },
        { "", "--as=" FIRST_FD " --as=" FIRST_FD, "is open already" },
        { NO_CAPABILITY, "--as=" FIRST_FD, "needs CAP_NET_RAW" },
        { "", "--ifname=nowhere --as=" FIRST_FD, "nowhere, --as=" },
    };
    int tap;

    install_qemu();
    tap = open_tap("taphelper");
    for (int i = 0; i < ARRAY_SIZE(cases); i++) {
        g_autofree char *said = helper_refuses(cases[i].starter,
                                               cases[i].options);

        g_assert_nonnull(strstr(said, cases[i].says));
    }
    close(tap);
}

/* Sockets by QMP */

static void test_getfd(Fixture *f)
{
    int before = count_fds(f);

    getfd(f, "c", open_host_protocol(f->ifname, 0));
    getfd(f, "i", open_host_protocol(f->ifname, 0));
    add(f, QMP_CAPTURE "'queue': 'tx', 'packet-fd': 'c'");
    add(f, QMP_INJECT "'queue': 'tx', 'packet-fd': 'i'");
    expect_injects(f, 100);
    expect_captures(f, "cap", 0);
    del_object(f, "cap");
    del_object(f, "inj");
    g_assert_cmpint(count_fds(f), ==, before);
}

/* To capture with enable_when_running=off takes no socket. */
static void test_stopped_only(Fixture *f)
{
    add(f, QMP_CAPTURE "'queue': 'tx'" QMP_STOPPED_ONLY);
    vm_stop(f);
    expect_source(f, "cap", "chain");
    host_send(f, 0, 10);
    expect_out(f, 0, 10);
}

static void test_fdset(Fixture *f)
{
    int before = count_fds(f), fd = open_host_protocol(f->ifname, 0);

    qtest_qmp_fds_assert_success(f->qts, &fd, 1, "{'execute': 'add-fd',"
                                 " 'arguments': {'fdset-id': 7}}");
    close(fd);
    add(f, QMP_CAPTURE "'queue': 'all', 'packet-fd': '/dev/fdset/7'");
    expect_captures(f, "cap", 0);
    del_object(f, "cap");
    qtest_qmp_assert_success(f->qts, "{'execute': 'remove-fd', 'arguments':"
                             " {'fdset-id': 7}}");
    g_assert_cmpint(count_fds(f), ==, before);
    g_assert_cmpint(sockets(f), ==, 0);
}

/* All that is done with the sockets later */

/* A VM with a capture, and with an injection each for queue=all and queue=rx */
typedef struct Later {
    Fixture *f;
    bool captures_rx;           /* and not tx alone */
    bool captures_stopped;
    int rx;                     /* peer of the indev with queue=rx */
    uint32_t number;            /* of the next frame */
} Later;

/* What the kernel has of a packet socket, and shows to whoever holds it */
typedef struct SocketState {
    struct sockaddr_ll addr;
    socklen_t filter_len;
    struct sock_filter filter[32];
} SocketState;

static void get_socket_state(int fd, SocketState *state)
{
    socklen_t len = sizeof(state->addr);

    *state = (SocketState) { .filter_len = ARRAY_SIZE(state->filter) };
    g_assert_cmpint(getsockname(fd, (struct sockaddr *)&state->addr, &len),
                    ==, 0);
    g_assert_cmpint(getsockopt(fd, SOL_SOCKET, SO_GET_FILTER, state->filter,
                               &state->filter_len), ==, 0);
    g_assert_cmpint(state->filter_len, >, 0);
}

static void expect_socket_state(int fd, const SocketState *want)
{
    SocketState got;

    get_socket_state(fd, &got);
    g_assert_cmphex(got.addr.sll_protocol, ==, want->addr.sll_protocol);
    g_assert_cmpint(got.addr.sll_ifindex, ==, want->addr.sll_ifindex);
    g_assert_cmpmem(got.filter, sizeof(got.filter),
                    want->filter, sizeof(want->filter));
}

/* QEMU has it then, and the test as well. */
static int getfd_shared(Fixture *f, const char *name)
{
    int fd = open_host_protocol(f->ifname, 0), copy = dup(fd);

    g_assert_cmpint(copy, >=, 0);
    getfd(f, name, fd);
    return copy;
}

static void rx_send(Later *l, uint32_t first, uint32_t count)
{
    Fixture at = { .in = l->rx };

    in_send(&at, first, count);
}

/* Both ways, and each object */
static void expect_all_works(Later *l)
{
    Fixture *f = l->f;
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
        set_status(l->f, ids[i], "off");
    }
    /* So that it must be bound once more */
    WAIT_UNTIL(!hooked_sockets(l->f));
    for (int i = 0; i < ARRAY_SIZE(ids); i++) {
        set_status(l->f, ids[i], "on");
    }
}

static void reconnect_out(Later *l)
{
    close(l->f->out);
    expect_connected(l->f, "out", false);
    WAIT_UNTIL(!hooked_sockets(l->f));
    l->f->out = connect_to(l->f, "out");
    expect_source(l->f, "cap", "packet-socket");
}

/* What comes while the VM is stopped waits for the guest. */
static void stop_and_cont(Later *l)
{
    Fixture *f = l->f;

    vm_stop(f);
    if (!l->captures_stopped) {
        WAIT_UNTIL(!hooked_sockets(f));
    }
    host_send(f, l->number, 1);
    if (l->captures_stopped) {
        expect_out(f, l->number, 1);
    }
    vm_cont(f);
    guest_post(f, 1);
    expect_guest(f, l->number++, 1);
    expect_source(f, "cap", "packet-socket");
}

static void switch_fallback(Later *l)
{
    Fixture *f = l->f;

    if (!HAS_FALLBACK) {
        return;
    }
    /* A filter-buffer would wait for QEMU's clock, which stands still. */
    add(f, "'qom-type': 'filter-rewriter', 'id': 'rew', 'netdev': 'n0',"
        " 'vnet_hdr_support': true");
    for (int i = 0; i < 2; i++) {
        expect_datapath(f, "userspace", "filter 'rew' is on");
        expect_all_works(l);
        set_status(f, "rew", "off");
        wait_vhost(f);
        expect_all_works(l);
        set_status(f, "rew", "on");
    }
    del_object(f, "rew");
    wait_vhost(f);
}

static void run_later(Fixture *f, const char *queue, bool stopped)
{
    static const struct {
        const char *name;
        void (*func)(Later *l);
    } steps[] = {
        { "status off and on", switch_status },
        { "outdev's peer reconnects", reconnect_out },
        { "stop and cont", stop_and_cont },
        { "a filter that needs the chain", switch_fallback },
    };
    g_autofree char *capture = g_strdup_printf(
        QMP_CAPTURE "'queue': '%s', 'packet-fd': 'c',"
        " 'enable_when_stopped': %s", queue, stopped ? "true" : "false");
    Later l = {
        .f = f,
        .captures_rx = !g_str_equal(queue, "tx"),
        .captures_stopped = stopped,
    };
    int cap = getfd_shared(f, "c"), inj = getfd_shared(f, "i");
    SocketState captured, injected;

    add(f, capture);
    add(f, l.captures_rx ? QMP_INJECT "'queue': 'tx', 'packet-fd': 'i'" :
                           QMP_INJECT "'queue': 'all', 'packet-fd': 'i'");
    l.rx = add_peer(f, "rx");
    add(f, "'qom-type': 'filter-redirector', 'id': 'injrx', 'netdev': 'n0',"
        " 'indev': 'rx', 'vnet_hdr_support': true, 'queue': 'rx'");
    expect_all_works(&l);
    get_socket_state(cap, &captured);
    get_socket_state(inj, &injected);
    g_assert_cmpint(captured.addr.sll_ifindex, ==, if_nametoindex(f->ifname));
    g_assert_cmpint(injected.addr.sll_ifindex, ==, if_nametoindex(f->ifname));
    g_assert_cmphex(captured.addr.sll_protocol, ==, htons(ETH_P_ALL));
    g_assert_cmphex(injected.addr.sll_protocol, !=, htons(ETH_P_ALL));

    for (int i = 0; i < ARRAY_SIZE(steps); i++) {
        g_test_message("queue=%s: %s", queue, steps[i].name);
        steps[i].func(&l);
        expect_all_works(&l);
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
}

static void test_later_tx(Fixture *f)
{
    run_later(f, "tx", false);
}

static void test_later_all(Fixture *f)
{
    run_later(f, "all", true);
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

static int raw_socket(void)
{
    int fd = socket(AF_PACKET, SOCK_RAW, 0);

    g_assert_cmpint(fd, >=, 0);
    return fd;
}

/* There the same number and name are another interface's, or nobody's. */
static int socket_in_other_netns(const char *ifname, bool same)
{
    unsigned ifindex = if_nametoindex(ifname);
    int own = open("/proc/self/ns/net", O_RDONLY), fd;

    g_assert_cmpint(unshare(CLONE_NEWNET), ==, 0);
    if (same) {
        run_command("ip link add %s index %u type dummy", ifname, ifindex);
    }
    fd = raw_socket();
    g_assert_cmpint(setns(own, CLONE_NEWNET), ==, 0);
    close(own);
    return fd;
}

/* Those that are wrong in other ways are in test-packet-socket. */
static void test_bad_fd(Fixture *f)
{
    int fanout = 7 | PACKET_FANOUT_HASH << 16;
    int fd, fds = count_fds(f);

    /* By its number it may be anything of QEMU's, and so is left as it is. */
    expect_refused(f, QMP_CAPTURE "'queue': 'tx', 'packet-fd': '0'",
                   "'packet-fd': cannot use file descriptor 0 for interface");
    g_assert_cmpint(count_fds(f), ==, fds);
    expect_bad_fd(f, open("/dev/null", O_RDWR), "is not a packet socket");
    expect_bad_fd(f, socket_in_other_netns(f->ifname, false),
                  "is in another network namespace than QEMU");
    expect_bad_fd(f, socket_in_other_netns(f->ifname, true),
                  "is in another network namespace than QEMU");

    fd = open_host_protocol(f->ifname, ETH_P_ALL);
    g_assert_cmpint(setsockopt(fd, SOL_PACKET, PACKET_FANOUT, &fanout,
                               sizeof(fanout)), ==, 0);
    expect_bad_fd(f, fd, "is in a fanout group");

    getfd(f, "good", raw_socket());
    add(f, QMP_CAPTURE "'queue': 'tx', 'packet-fd': 'good'");
    expect_captures(f, "cap", 0);
}

/* With a netdev "hub" */
static void test_bad_value(Fixture *f)
{
    static const struct {
        const char *args;
        const char *text;
    } cases[] = {
        { QMP_CAPTURE "'packet-fd': 'nothing'",
          "'packet-fd': File descriptor named 'nothing' has not been found" },
        { QMP_CAPTURE "'packet-fd': '7up'",
          "'packet-fd': Invalid file descriptor number '7up'" },
        { QMP_CAPTURE "'packet-fd': '1000'", "it is not open" },
        { QMP_CAPTURE "'packet-fd': '/dev/fdset/9'",
          "'packet-fd': Failed to find fdset /dev/fdset/9" },
        { QMP_INJECT "'queue': 'rx', 'packet-fd': 'c'",
          "'packet-fd': the filter needs no packet socket" },
        { QMP_CAPTURE "'packet-fd': 'c'" QMP_STOPPED_ONLY,
          "'packet-fd': the filter needs no packet socket" },
        { QMP_CAPTURE "'indev': 'in', 'queue': 'tx', 'packet-fd': 'c'",
          "needs two packet sockets; use two filters" },
        { "'qom-type': 'filter-redirector', 'id': 'x', 'netdev': 'hub',"
          " 'outdev': 'out', 'packet-fd': 'c'",
          "'packet-fd' needs 'packet-socket=on' on netdev 'hub'" },
    };
    int before = count_fds(f);

    for (int i = 0; i < ARRAY_SIZE(cases); i++) {
        expect_refused(f, cases[i].args, cases[i].text);
        g_assert_cmpint(count_fds(f), ==, before);
    }
}

/* The number of a socket that another filter has is not taken from it. */
static void test_bad_in_use(Fixture *f)
{
    expect_refused(f, QMP_INJECT "'packet-fd': '" FIRST_FD "'",
                   "'packet-fd': cannot use file descriptor " FIRST_FD);
    expect_captures(f, "cap", 0);
}

/* Without a socket it is said what to do. */
static void test_no_socket(Fixture *f)
{
    g_autofree char *text = g_strdup_printf(
        "netdev 'n0': could not open a packet socket for interface '%s' (it "
        "needs CAP_NET_RAW; without, pass a packet socket): Operation not "
        "permitted", f->ifname);

    expect_refused(f, QMP_CAPTURE "'queue': 'tx'", text);
}

static const FdTest fd_tests[] = {
    { "args/capture", test_args_capture, CAPTURE "tx,packet-fd=" FIRST_FD,
      true },
    { "args/two", test_args_two, CAPTURE "tx,packet-fd=" FIRST_FD
      " " INJECT "tx,packet-fd=" SECOND_FD, true },
    { "args/fdset", test_args_capture, "-add-fd fd=" FIRST_FD ",set=7 "
      CAPTURE "tx,packet-fd=/dev/fdset/7", true },
    { "getfd", test_getfd },
    { "stopped-only", test_stopped_only },
    { "fdset", test_fdset },
    { "later/tx", test_later_tx },
    { "later/all", test_later_all },
    { "bad/fd", test_bad_fd },
    { "bad/value", test_bad_value, "-netdev hubport,id=hub,hubid=1" },
    { "bad/in-use", test_bad_in_use, CAPTURE "tx,packet-fd=" FIRST_FD, true },
    { "bad/no-socket", test_no_socket },
};

int main(int argc, char **argv)
{
    int ret;

    rig_init(&argc, &argv, "filter-redirector-fd");
    for (int i = 0; i < ARRAY_SIZE(fd_tests); i++) {
        rig_add_data(fd_tests[i].path,
                     g_memdup2(&fd_tests[i], sizeof(fd_tests[i])), run_fd_test);
    }
    rig_add("helper-refuses", test_helper_refuses);
    ret = g_test_run();
    uninstall_qemu();
    return ret;
}
