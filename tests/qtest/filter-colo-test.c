/*
 * QTest testcase for the COLO proxy on TAPs with vhost
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Two VMs, a primary and a secondary one, with the filters of
 * docs/system/qemu-colo.rst:
 *
 *   host -> TAP -> m0 ---------------> f1 -> rew0 -> secondary guest
 *                   |                                     |
 *             primary guest                             rew0
 *                   |                                     |
 *                redire1 -> colo-compare <-- f2 ----------+
 *                                |
 *   host <- TAP <- redire0 <-----+
 *
 * What both guests answer alike comes to the host, once.  Nothing comes to the
 * host's side of the secondary's TAP.
 *
 * The tests named proxy/ have the network part alone, and are themselves what
 * takes a checkpoint.  Those named colo/ migrate the primary to the secondary,
 * which then is its copy with each checkpoint.
 */

#include "qemu/osdep.h"
#include <sys/socket.h>
#include <linux/if_packet.h>
#include <linux/if_ether.h>
#include "filter-redirector-rig.h"
#include "libqos/malloc-pc.h"
#include "libqos/virtio.h"
#include "qemu/bswap.h"
#include "qobject/qdict.h"

#define IP_AT 14
#define L4_AT (IP_AT + 20)
#define TCP_DATA_AT (L4_AT + 20)

#define SYN 0x02
#define PSH 0x08
#define ACK 0x10

/* Initial sequence numbers */
#define TCP_HOST 100
#define TCP_PRIMARY 1000
#define TCP_SECONDARY 70000

#define VNET_HDR ",vnet_hdr_support=on"
#define MIRROR "-object filter-mirror,id=m0,netdev=n0,queue=tx," \
               "outdev=mirror0,packet-socket=off"
#define TO_HOST "-object filter-redirector,id=redire0,netdev=n0,queue=rx," \
                "indev=compare_out,packet-socket=off"
#define TO_COMPARE "-object filter-redirector,id=redire1,netdev=n0,queue=rx," \
                   "outdev=compare0,packet-socket=off"
#define IOTHREAD "-object iothread,id=iothread1"
#define COMPARE "-object colo-compare,id=comp0,primary_in=compare0-0," \
                "secondary_in=compare1,outdev=compare_out0,iothread=iothread1"

/* A checkpoint by time takes longer than the test. */
#define NO_TIMEOUT ",compare_timeout=3600000"
#define NOTIFY ",notify_dev=notify"

/* Sockets in the pair's directory; clients have the path of a server. */
static const struct {
    const char *id;
    const char *path;
} chardevs[] = {
    { "mirror0", "mirror0,server=on,wait=off" },
    { "compare1", "compare1,server=on,wait=off" },
    { "compare0", "compare0,server=on,wait=off" },
    { "compare0-0", "compare0" },
    { "compare_out", "compare_out,server=on,wait=off" },
    { "compare_out0", "compare_out" },
    { "notify", "notify,server=on,wait=off" },
};

typedef struct Pair Pair;

/* A test with a Pair that works, whose secondary is a copy if it @migrates */
typedef struct ColoTest {
    const char *path;
    void (*func)(Pair *p);
    bool migrates;
    bool no_vnet_hdr;
} ColoTest;

struct Pair {
    Fixture primary;
    Fixture secondary;
    const ColoTest *test;
    char *dir;
    int notify;         /* of proxy/: the peer of colo-compare's notify_dev */
    uint64_t marker;    /* a word of the guests' memory */
};

/* Packets */

typedef struct Frame {
    size_t len;
    uint8_t data[FRAME_LEN];
} Frame;

static Frame make_ip(uint8_t protocol, size_t len, bool to_guest)
{
    static const uint8_t guest_mac[] = { 0x52, 0x54, 0x00, 0x12, 0x34, 0x56 };
    static const uint8_t host_mac[] = { 0x02, 0, 0, 0, 0, 1 };
    Frame frame = { .len = len };
    uint8_t *ip = frame.data + IP_AT;

    g_assert_cmpuint(len, <=, sizeof(frame.data));
    memcpy(frame.data, to_guest ? guest_mac : host_mac, ETH_ALEN);
    memcpy(frame.data + ETH_ALEN, to_guest ? host_mac : guest_mac, ETH_ALEN);
    stw_be_p(frame.data + 12, ETH_P_IP);
    ip[0] = 0x45;
    stw_be_p(ip + 2, len - IP_AT);
    ip[8] = 64;
    ip[9] = protocol;
    stl_be_p(ip + 12, to_guest ? 0xc0000201 : 0xc0000202);
    stl_be_p(ip + 16, to_guest ? 0xc0000202 : 0xc0000201);
    stw_be_p(ip + 10, ~sum_words(ip, 20, 0));
    return frame;
}

static Frame make_udp(uint32_t number, bool to_guest)
{
    Frame frame = make_ip(IPPROTO_UDP, FRAME_LEN, to_guest);
    uint8_t *udp = frame.data + L4_AT;

    stw_be_p(udp, to_guest ? 1000 : 2000);
    stw_be_p(udp + 2, to_guest ? 2000 : 1000);
    stw_be_p(udp + 4, FRAME_LEN - L4_AT);
    stl_be_p(udp + 8, number);
    return frame;
}

static Frame make_tcp(uint32_t seq, uint32_t ack, uint8_t flags,
                      const char *data, bool to_guest)
{
    Frame frame = make_ip(IPPROTO_TCP, TCP_DATA_AT + strlen(data), to_guest);
    size_t len = frame.len - L4_AT;
    uint8_t *tcp = frame.data + L4_AT;

    stw_be_p(tcp, to_guest ? 1000 : 80);
    stw_be_p(tcp + 2, to_guest ? 80 : 1000);
    stl_be_p(tcp + 4, seq);
    stl_be_p(tcp + 8, ack);
    tcp[12] = 0x50;
    tcp[13] = flags;
    stw_be_p(tcp + 14, 0xffff);
    memcpy(frame.data + TCP_DATA_AT, data, strlen(data));
    stw_be_p(tcp + 16, ~sum_words(tcp, len, sum_words(
        frame.data + IP_AT + 12, 8, IPPROTO_TCP + len)));
    return frame;
}

static Frame tcp_to_guest(uint32_t seq, uint32_t ack, uint8_t flags,
                          const char *data)
{
    return make_tcp(seq, ack, flags, data, true);
}

static Frame tcp_to_host(uint32_t seq, uint32_t ack, uint8_t flags,
                         const char *data)
{
    return make_tcp(seq, ack, flags, data, false);
}

static void host_send_ip(Fixture *f, Frame frame)
{
    g_assert_cmpint(send(f->host, frame.data, frame.len, 0), ==, frame.len);
}

static void guest_send_ip(Fixture *f, Frame frame)
{
    guest_send_frame(f, frame.data, frame.len);
}

/* The next one from the guest */
static void expect_at_host(Fixture *f, Frame frame)
{
    uint8_t got[BUFFER_LEN];
    struct sockaddr_ll from;
    socklen_t from_len;
    ssize_t n;

    do {
        from_len = sizeof(from);
        wait_readable(f->host);
        n = recvfrom(f->host, got, sizeof(got), 0,
                     (struct sockaddr *)&from, &from_len);
        g_assert_cmpint(n, >=, 0);
    } while (from.sll_pkttype == PACKET_OUTGOING);
    g_assert_cmpmem(got, n, frame.data, frame.len);
}

static void expect_at_guest(Fixture *f, Frame frame)
{
    uint8_t got[BUFFER_LEN];
    size_t len = guest_read_frame(f, got, sizeof(got));

    g_assert_cmpmem(got, len, frame.data, frame.len);
}

/* VMs */

static void driver_start(Fixture *f)
{
    guest_start(f);
    guest_post(f, 100);
}

static void vm_start(Pair *p, Fixture *f, const char *args)
{
    fixture_init(f, p->test->no_vnet_hdr ? "vhost=on,vnet_hdr=off" : "vhost=on",
                 "", args);
    close(f->host);
    f->host = open_host_protocol(f->ifname, ETH_P_IP);
    driver_start(f);
}

/*
 * As if its host had died: nothing more comes from it, not even the end of its
 * connections.
 */
static void vm_freeze(Fixture *f)
{
    g_assert_cmpint(kill(qtest_pid(f->qts), SIGSTOP), ==, 0);
}

static void vm_thaw(Fixture *f)
{
    g_assert_cmpint(kill(qtest_pid(f->qts), SIGCONT), ==, 0);
}

/* Why vhost is not in use, or "" if it is */
static void expect_reason(Fixture *f, const char *reason)
{
    expect_datapath(f, *reason ? "userspace" : "vhost", reason);
}

static void expect_filter(Fixture *f, const char *id, const char *status)
{
    g_autofree char *path = g_strdup_printf("/objects/%s", id);
    g_autoptr(QDict) rsp = qtest_qmp(f->qts, "{'execute': 'qom-get',"
                                     " 'arguments': {'path': %s,"
                                     " 'property': 'status'}}", path);

    g_assert_cmpstr(qdict_get_str(rsp, "return"), ==, status);
}

static void pair_set(Pair *p, const ColoTest *test)
{
    *p = (Pair) {
        .test = test,
        .dir = g_dir_make_tmp("filter-colo-XXXXXX", NULL),
        .notify = -1,
    };
    g_assert_nonnull(p->dir);
}

static const char *pair_vnet(Pair *p)
{
    return p->test->no_vnet_hdr ? "" : VNET_HDR;
}

static void pair_start_primary(Pair *p)
{
    const char *vnet = pair_vnet(p);
    GString *args = g_string_new("");

    for (int i = 0; i < ARRAY_SIZE(chardevs); i++) {
        g_string_append_printf(args, "-chardev socket,id=%s,path=%s/%s ",
                               chardevs[i].id, p->dir, chardevs[i].path);
    }
    g_string_append_printf(args, MIRROR "%s " TO_HOST "%s " TO_COMPARE "%s "
                           IOTHREAD " " COMPARE "%s%s", vnet, vnet, vnet, vnet,
                           p->test->migrates ? NO_TIMEOUT : NOTIFY);
    vm_start(p, &p->primary, args->str);
    g_string_free(args, true);
}

static void pair_start_secondary(Pair *p)
{
    const char *vnet = pair_vnet(p);
    g_autofree char *args = g_strdup_printf(
        "-chardev socket,id=red0,path=%s/mirror0,reconnect-ms=100 "
        "-chardev socket,id=red1,path=%s/compare1,reconnect-ms=100 "
        "-object filter-redirector,id=f1,netdev=n0,queue=tx,indev=red0,"
        "packet-socket=off%s "
        "-object filter-redirector,id=f2,netdev=n0,queue=rx,outdev=red1,"
        "packet-socket=off%s "
        "-object filter-rewriter,id=rew0,netdev=n0,queue=all%s %s", p->dir,
        p->dir, vnet, vnet, vnet, p->test->migrates ? "-incoming defer" : "");

    vm_start(p, &p->secondary, args);
}

static void pair_expect_connected(Pair *p)
{
    expect_connected(&p->secondary, "red0", true);
    expect_connected(&p->secondary, "red1", true);
    expect_connected(&p->primary, "mirror0", true);
    expect_connected(&p->primary, "compare1", true);
    expect_reason(&p->primary, "filter 'm0' is on");
    expect_reason(&p->secondary, "filter 'f1' is on");
}

static void pair_rmdir(Pair *p)
{
    run_command("rm -r %s", p->dir);
    g_free(p->dir);
}

static void pair_close(Pair *p)
{
    vm_thaw(&p->secondary);
    vm_thaw(&p->primary);
    fixture_close(&p->secondary);
    fixture_close(&p->primary);
    close(p->notify);
    pair_rmdir(p);
}

/* COLO */

static bool event_came(Fixture *f, const char *name)
{
    g_autoptr(QDict) event = qtest_qmp_event_ref(f->qts, name);

    if (!event) {
        /* Events are read along with answers. */
        qtest_qmp_assert_success(f->qts, "{'execute': 'query-status'}");
    }
    return event;
}

/*
 * Only packets that differ lead to a checkpoint: what does so by time takes
 * longer than the test.
 *
 * Each checkpoint makes the secondary's memory and devices those of the
 * primary.  What the test knows of the driver's rings and buffers stays right
 * since both drivers are at the same addresses, and have done the same at each
 * checkpoint.
 */
static void colo_migrate(Pair *p)
{
    Fixture *vms[] = { &p->primary, &p->secondary };

    p->marker = guest_alloc(&p->primary.alloc, 4);
    g_assert_cmphex(guest_alloc(&p->secondary.alloc, 4), ==, p->marker);
    /* The driver comes with the migration. */
    qtest_system_reset(p->secondary.qts);

    for (int i = 0; i < ARRAY_SIZE(vms); i++) {
        hmp(vms[i], "migrate_set_capability return-path on");
        hmp(vms[i], "migrate_set_capability x-colo on");
    }
    hmp(&p->primary, "migrate_set_parameter x-checkpoint-delay 3600000");
    hmp(&p->secondary, "migrate_incoming unix:%s/migration", p->dir);
    hmp(&p->primary, "migrate -d unix:%s/migration", p->dir);
    WAIT_UNTIL(event_came(&p->secondary, "RESUME"));
    WAIT_UNTIL(event_came(&p->primary, "RESUME"));
    expect_status(&p->primary, "query-migrate", "colo");
    expect_status(&p->secondary, "query-migrate", "colo");
    expect_reason(&p->primary, "filter 'm0' is on");
    expect_reason(&p->secondary, "filter 'f1' is on");
}

/* Call it for each checkpoint, and in between expect that there is none. */
static void expect_colo_checkpoint(Pair *p)
{
    WAIT_UNTIL(event_came(&p->primary, "STOP"));
    WAIT_UNTIL(event_came(&p->secondary, "STOP"));
    WAIT_UNTIL(event_came(&p->secondary, "RESUME"));
    WAIT_UNTIL(event_came(&p->primary, "RESUME"));
}

static void expect_no_colo_checkpoint(Pair *p)
{
    expect_status(&p->primary, "query-status", "running");
    g_assert_false(event_came(&p->primary, "STOP"));
}

static void lose_heartbeat(Fixture *f)
{
    qtest_qmp_assert_success(f->qts, "{'execute': 'yank', 'arguments':"
                             " {'instances': [{'type': 'migration'}]}}");
    qtest_qmp_assert_success(f->qts, "{'execute': 'x-colo-lost-heartbeat'}");
    expect_status(f, "query-migrate", "completed");
    expect_status(f, "query-status", "running");
}

/*
 * What is in "notify" is in the stream's format; only what goes to QEMU has
 * the length of a header.
 */
static void expect_checkpoint(Pair *p)
{
    char text[13];
    uint8_t prefix[4];

    read_full(p->notify, prefix, sizeof(prefix));
    g_assert_cmpuint(ldl_be_p(prefix), ==, sizeof(text));
    read_full(p->notify, text, sizeof(text));
    g_assert_cmpmem(text, sizeof(text), "DO_CHECKPOINT", 13);
}

static void do_checkpoint(Pair *p)
{
    static const char text[] = "COLO_CHECKPOINT";
    uint8_t record[8 + sizeof(text) - 1] = { };
    size_t prefix = p->test->no_vnet_hdr ? 4 : 8;

    stl_be_p(record, sizeof(text) - 1);
    memcpy(record + prefix, text, sizeof(text) - 1);
    g_assert_cmpint(write(p->notify, record, prefix + sizeof(text) - 1), ==,
                    prefix + sizeof(text) - 1);
}

/* Tests */

/* From the host to both guests, of which the secondary gets another one */
static void pass_to_guests(Pair *p, Frame frame, Frame secondary)
{
    host_send_ip(&p->primary, frame);
    expect_at_guest(&p->primary, frame);
    expect_at_guest(&p->secondary, secondary);
}

/* From both guests to the host, to which they are the same */
static void pass_to_host(Pair *p, Frame frame, Frame secondary)
{
    guest_send_ip(&p->primary, frame);
    guest_send_ip(&p->secondary, secondary);
    expect_at_host(&p->primary, frame);
}

static void check_match(Pair *p, uint32_t first)
{
    for (uint32_t i = first; i < first + 10; i++) {
        Frame ask = make_udp(i, true), answer = make_udp(1000 + i, false);

        pass_to_guests(p, ask, ask);
        /* Either of them may be the first one. */
        guest_send_ip(i & 1 ? &p->primary : &p->secondary, answer);
        guest_send_ip(i & 1 ? &p->secondary : &p->primary, answer);
        expect_at_host(&p->primary, answer);
    }
}

/* What differs comes to the host with the next checkpoint, from the primary. */
static void check_differ(Pair *p)
{
    guest_send_ip(&p->primary, make_udp(5000, false));
    guest_send_ip(&p->secondary, make_udp(6000, false));
    expect_checkpoint(p);
    do_checkpoint(p);
    expect_at_host(&p->primary, make_udp(5000, false));
}

/* ... which here COLO takes by itself. */
static void check_colo_differ(Pair *p, uint32_t number)
{
    qtest_writel(p->primary.qts, p->marker, number);
    guest_send_ip(&p->primary, make_udp(number, false));
    expect_no_colo_checkpoint(p);
    guest_send_ip(&p->secondary, make_udp(number + 1000, false));
    expect_colo_checkpoint(p);
    expect_at_host(&p->primary, make_udp(number, false));
    g_assert_cmphex(qtest_readl(p->secondary.qts, p->marker), ==, number);
}

/* The VM's own TAP, both ways */
static void check_alone(Fixture *f, uint32_t first)
{
    for (uint32_t i = first; i < first + 10; i++) {
        host_send_ip(f, make_udp(i, true));
        expect_at_guest(f, make_udp(i, true));
        guest_send_ip(f, make_udp(1000 + i, false));
        expect_at_host(f, make_udp(1000 + i, false));
    }
}

/*
 * A connection, with another initial sequence number at the secondary.  The
 * host knows that of the primary.
 */
static void check_tcp(Pair *p)
{
    const uint32_t seq = TCP_HOST, primary = TCP_PRIMARY;
    const uint32_t secondary = TCP_SECONDARY;
    Frame syn = tcp_to_guest(seq, 0, SYN, "");

    pass_to_guests(p, syn, syn);
    pass_to_host(p, tcp_to_host(primary, seq + 1, SYN | ACK, ""),
                 tcp_to_host(secondary, seq + 1, SYN | ACK, ""));
    pass_to_guests(p, tcp_to_guest(seq + 1, primary + 1, ACK, ""),
                   tcp_to_guest(seq + 1, secondary + 1, ACK, ""));
    pass_to_guests(p, tcp_to_guest(seq + 1, primary + 1, PSH | ACK, "hello"),
                   tcp_to_guest(seq + 1, secondary + 1, PSH | ACK, "hello"));
    pass_to_host(p, tcp_to_host(primary + 1, seq + 6, PSH | ACK, "answer"),
                 tcp_to_host(secondary + 1, seq + 6, PSH | ACK, "answer"));
}

/* The same connection after the failover: only the secondary is left. */
static void check_tcp_alone(Fixture *secondary)
{
    const uint32_t seq = TCP_HOST + 6;

    host_send_ip(secondary, tcp_to_guest(seq, TCP_PRIMARY + 7, ACK, ""));
    expect_at_guest(secondary, tcp_to_guest(seq, TCP_SECONDARY + 7, ACK, ""));
    guest_send_ip(secondary, tcp_to_host(TCP_SECONDARY + 7, seq, PSH | ACK,
                                         "more"));
    expect_at_host(secondary, tcp_to_host(TCP_PRIMARY + 7, seq, PSH | ACK,
                                          "more"));
}

/*
 * The same connection when the secondary has become the primary of another
 * one: the rewriter is between the guest and the new filters, so that all but
 * the guest have the numbers that the host knows.
 */
static void check_tcp_resumed(Pair *p)
{
    const uint32_t seq = TCP_HOST + 6;
    Frame ack = tcp_to_guest(seq, TCP_PRIMARY + 11, ACK, "");
    Frame again = tcp_to_host(TCP_PRIMARY + 11, seq, PSH | ACK, "again");

    host_send_ip(&p->primary, ack);
    expect_at_guest(&p->primary,
                    tcp_to_guest(seq, TCP_SECONDARY + 11, ACK, ""));
    expect_at_guest(&p->secondary, ack);

    guest_send_ip(&p->primary, tcp_to_host(TCP_SECONDARY + 11, seq, PSH | ACK,
                                           "again"));
    guest_send_ip(&p->secondary, again);
    expect_at_host(&p->primary, again);
}

/* What the rewriter has queued while the VM was stopped is not lost. */
static void check_rewriter_off(Pair *p)
{
    Frame syn = tcp_to_guest(1, 0, SYN, "");

    vm_stop(&p->secondary);
    host_send_ip(&p->primary, syn);
    expect_at_guest(&p->primary, syn);
    /* It is in the socket; after one turn of the main loop, in the queue. */
    expect_status(&p->secondary, "query-status", "paused");
    set_status(&p->secondary, "rew0", "off");
    vm_cont(&p->secondary);
    expect_at_guest(&p->secondary, syn);
    set_status(&p->secondary, "rew0", "on");
}

static void set_all(Pair *p, const char *status)
{
    set_status(&p->primary, "m0", status);
    set_status(&p->primary, "redire0", status);
    set_status(&p->primary, "redire1", status);
    set_status(&p->secondary, "f1", status);
    set_status(&p->secondary, "f2", status);
    set_status(&p->secondary, "rew0", status);
}

/* As at a failover: each VM goes on by itself, with vhost. */
static void check_failover(Pair *p)
{
    set_all(p, "off");
    expect_reason(&p->primary, "");
    expect_reason(&p->secondary, "");
    check_alone(&p->primary, 7000);
    /* The first that comes here from the secondary */
    check_alone(&p->secondary, 7100);

    /* And back again */
    set_all(p, "on");
    check_match(p, 8000);
}

static void test_proxy(Pair *p)
{
    check_match(p, 0);
    check_differ(p);
    check_match(p, 100);
    check_rewriter_off(p);
    check_tcp(p);
    check_failover(p);
}

static void run_checkpoints(Pair *p)
{
    for (int i = 0; i < 3; i++) {
        check_match(p, 100 * i);
        expect_no_colo_checkpoint(p);
        check_colo_differ(p, 5000 + i);
    }
    check_match(p, 1000);
    expect_no_colo_checkpoint(p);
}

static void secondary_failover(Pair *p)
{
    vm_freeze(&p->primary);
    lose_heartbeat(&p->secondary);
    expect_filter(&p->secondary, "f1", "off");
    expect_filter(&p->secondary, "f2", "off");
}

/* Nothing is to be rewritten: vhost comes back by itself. */
static void test_secondary_failover(Pair *p)
{
    run_checkpoints(p);
    secondary_failover(p);
    expect_filter(&p->secondary, "rew0", "off");
    expect_reason(&p->secondary, "");
    check_alone(&p->secondary, 7000);
}

/* A connection needs the rewriter as long as it lives. */
static void test_secondary_failover_tcp(Pair *p)
{
    check_tcp(p);
    expect_no_colo_checkpoint(p);
    secondary_failover(p);
    expect_filter(&p->secondary, "rew0", "on");
    expect_reason(&p->secondary, "filter 'rew0' is on");
    check_tcp_alone(&p->secondary);
    check_alone(&p->secondary, 7000);

    set_status(&p->secondary, "rew0", "off");
    expect_reason(&p->secondary, "");
    check_alone(&p->secondary, 8000);
}

/* A checkpoint makes the connections of both guests the same. */
static void test_secondary_failover_tcp_checkpoint(Pair *p)
{
    check_tcp(p);
    check_colo_differ(p, 5000);
    secondary_failover(p);
    expect_filter(&p->secondary, "rew0", "off");
    expect_reason(&p->secondary, "");
    check_alone(&p->secondary, 7000);
}

static void primary_failover(Pair *p)
{
    vm_freeze(&p->secondary);
    del_object(&p->primary, "comp0");
    del_object(&p->primary, "iothread1");
    del_object(&p->primary, "m0");
    del_object(&p->primary, "redire0");
    expect_reason(&p->primary, "filter 'redire1' is on");
    del_object(&p->primary, "redire1");
    lose_heartbeat(&p->primary);
}

static void test_primary_failover(Pair *p)
{
    run_checkpoints(p);
    primary_failover(p);
    expect_reason(&p->primary, "");
    check_alone(&p->primary, 7000);
}

/* Replication is resumed: the secondary becomes the primary of another one. */

#define BEFORE_REWRITER VNET_HDR ",insert=before,position=id=rew0"

/*
 * What the document says, in its order.  The guest's driver starts again, at
 * the addresses and with the buffers that the driver of a new VM has.
 */
static void colo_resume(Pair *p, Pair *old)
{
    Fixture *f = &p->primary;

    pair_set(p, old->test);
    *f = old->secondary;
    del_object(f, "f2");
    del_object(f, "f1");
    hmp(f, "chardev-remove red1");
    hmp(f, "chardev-remove red0");
    for (int i = 0; i < ARRAY_SIZE(chardevs); i++) {
        hmp(f, "chardev-add socket,id=%s,path=%s/%s", chardevs[i].id, p->dir,
            chardevs[i].path);
    }
    guest_stop(f);
    alloc_destroy(&f->alloc);
    pc_alloc_init(&f->alloc, f->qts, 0);
    driver_start(f);
    expect_reason(f, "filter 'rew0' is on");

    pair_start_secondary(p);
    vm_stop(f);
    object_add(f, MIRROR BEFORE_REWRITER);
    object_add(f, TO_HOST BEFORE_REWRITER);
    object_add(f, TO_COMPARE BEFORE_REWRITER);
    object_add(f, IOTHREAD);
    object_add(f, COMPARE VNET_HDR NO_TIMEOUT);
    pair_expect_connected(p);
    while (event_came(f, "STOP") || event_came(f, "RESUME")) {
        /* It is of before. */
    }
    colo_migrate(p);
}

static void test_resume(Pair *p)
{
    Pair q;

    check_tcp(p);
    secondary_failover(p);
    expect_reason(&p->secondary, "filter 'rew0' is on");
    check_tcp_alone(&p->secondary);

    colo_resume(&q, p);
    check_tcp_resumed(&q);
    run_checkpoints(&q);
    primary_failover(&q);
    expect_reason(&q.primary, "filter 'rew0' is on");
    check_alone(&q.primary, 7000);
    set_status(&q.primary, "rew0", "off");
    expect_reason(&q.primary, "");
    check_alone(&q.primary, 8000);
    vm_thaw(&q.secondary);
    fixture_close(&q.secondary);
    pair_rmdir(&q);
    p->secondary = q.primary;
}

static void run_colo_test(const void *data)
{
    Pair p;

    pair_set(&p, data);
    pair_start_primary(&p);
    pair_start_secondary(&p);
    pair_expect_connected(&p);
    if (p.test->migrates) {
        colo_migrate(&p);
    } else {
        p.notify = connect_to(&(Fixture) { .dir = p.dir }, "notify");
    }
    p.test->func(&p);
    pair_close(&p);
}

static const ColoTest tests[] = {
    { "proxy/vnet-hdr", test_proxy },
    { "proxy/no-vnet-hdr", test_proxy, .no_vnet_hdr = true },
    { "colo/secondary-failover", test_secondary_failover, true },
    { "colo/secondary-failover-no-vnet-hdr", test_secondary_failover, true,
      .no_vnet_hdr = true },
    { "colo/secondary-failover-tcp", test_secondary_failover_tcp, true },
    { "colo/secondary-failover-tcp-checkpoint",
      test_secondary_failover_tcp_checkpoint, true },
    { "colo/primary-failover", test_primary_failover, true },
    { "colo/resume", test_resume, true },
};

int main(int argc, char **argv)
{
    rig_init(&argc, &argv, "filter-colo");
    for (int i = 0; i < ARRAY_SIZE(tests); i++) {
        if (!tests[i].no_vnet_hdr || g_test_slow()) {
            rig_add_data(tests[i].path, g_memdup2(&tests[i], sizeof(tests[i])),
                         run_colo_test);
        }
    }
    return g_test_run();
}
