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
 *
 * Those named .../no-rewriter... do without rew0, as the examples of
 * qemu-options.hx.
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
#include "standard-headers/linux/virtio_config.h"
#include "standard-headers/linux/virtio_net.h"

#define NIC_PATH "/machine/peripheral/nic/virtio-backend"

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

typedef struct Vm {
    Fixture f;
    int host;           /* gets IPv4 */
} Vm;

typedef struct Pair {
    Vm primary;
    Vm secondary;
    bool vnet;
    bool rewriter;
    char *dir;
    int notify;         /* the peer of colo-compare's notify_dev, or -1 */
    uint64_t marker;    /* a word of the guests' memory */
} Pair;

/* Packets */

static uint16_t sum(const uint8_t *data, size_t len, uint32_t start)
{
    for (size_t i = 0; i < len; i += 2) {
        start += i + 1 < len ? lduw_be_p(data + i) : data[i] << 8;
    }
    while (start >> 16) {
        start = (start & 0xffff) + (start >> 16);
    }
    return start;
}

static void put_ip(uint8_t *frame, uint8_t protocol, size_t len, bool to_guest)
{
    static const uint8_t guest_mac[] = { 0x52, 0x54, 0x00, 0x12, 0x34, 0x56 };
    static const uint8_t host_mac[] = { 0x02, 0, 0, 0, 0, 1 };
    uint8_t *ip = frame + IP_AT;

    memcpy(frame, to_guest ? guest_mac : host_mac, ETH_ALEN);
    memcpy(frame + ETH_ALEN, to_guest ? host_mac : guest_mac, ETH_ALEN);
    stw_be_p(frame + 12, ETH_P_IP);
    ip[0] = 0x45;
    stw_be_p(ip + 2, len - IP_AT);
    ip[8] = 64;
    ip[9] = protocol;
    stl_be_p(ip + 12, to_guest ? 0xc0000201 : 0xc0000202);
    stl_be_p(ip + 16, to_guest ? 0xc0000202 : 0xc0000201);
    stw_be_p(ip + 10, ~sum(ip, 20, 0));
}

/* Returns the length. */
static size_t make_udp(uint8_t *frame, uint32_t number, bool to_guest)
{
    memset(frame, 0, FRAME_LEN);
    put_ip(frame, IPPROTO_UDP, FRAME_LEN, to_guest);
    stw_be_p(frame + L4_AT, to_guest ? 1000 : 2000);
    stw_be_p(frame + L4_AT + 2, to_guest ? 2000 : 1000);
    stw_be_p(frame + L4_AT + 4, FRAME_LEN - L4_AT);
    stl_be_p(frame + L4_AT + 8, number);
    return FRAME_LEN;
}

static size_t make_tcp(uint8_t *frame, uint32_t seq, uint32_t ack,
                       uint8_t flags, const char *data, bool to_guest)
{
    size_t len = TCP_DATA_AT + strlen(data);
    uint8_t *tcp = frame + L4_AT;

    memset(frame, 0, TCP_DATA_AT);
    put_ip(frame, IPPROTO_TCP, len, to_guest);
    stw_be_p(tcp, to_guest ? 1000 : 80);
    stw_be_p(tcp + 2, to_guest ? 80 : 1000);
    stl_be_p(tcp + 4, seq);
    stl_be_p(tcp + 8, ack);
    tcp[12] = 0x50;
    tcp[13] = flags;
    stw_be_p(tcp + 14, 0xffff);
    memcpy(frame + TCP_DATA_AT, data, strlen(data));
    stw_be_p(tcp + 16, ~sum(tcp, len - L4_AT,
                            sum(frame + IP_AT + 12, 8,
                                IPPROTO_TCP + len - L4_AT)));
    return len;
}

/* Whether the checksum is right */
static bool tcp_intact(const uint8_t *frame, size_t len)
{
    return sum(frame + L4_AT, len - L4_AT,
               sum(frame + IP_AT + 12, 8, IPPROTO_TCP + len - L4_AT)) == 0xffff;
}

static void host_write(Vm *vm, const uint8_t *frame, size_t len)
{
    g_assert_cmpint(send(vm->host, frame, len, 0), ==, len);
}

/* The next frame from the guest, with up to 6 bytes of padding behind */
static void expect_at_host(Vm *vm, const uint8_t *frame, size_t len)
{
    uint8_t got[BUFFER_LEN];
    struct sockaddr_ll from;
    socklen_t from_len;
    ssize_t n;

    do {
        from_len = sizeof(from);
        wait_readable(vm->host);
        n = recvfrom(vm->host, got, sizeof(got), 0,
                     (struct sockaddr *)&from, &from_len);
        g_assert_cmpint(n, >=, 0);
    } while (from.sll_pkttype == PACKET_OUTGOING);
    g_assert_cmpint(n, ==, len);
    g_assert_cmpint(memcmp(got, frame, len), ==, 0);
}

static void expect_at_guest(Vm *vm, const uint8_t *frame, size_t len)
{
    uint8_t got[BUFFER_LEN];

    g_assert_cmpuint(guest_read_frame(&vm->f, got, sizeof(got)), ==, len);
    g_assert_cmpint(memcmp(got, frame, len), ==, 0);
}

/* VMs */

static char *primary_args(const char *dir, const char *vnet,
                          const char *compare_opts)
{
    return g_strdup_printf(
        "-chardev socket,id=mirror0,path=%s/mirror0,server=on,wait=off "
        "-chardev socket,id=compare1,path=%s/compare1,server=on,wait=off "
        "-chardev socket,id=compare0,path=%s/compare0,server=on,wait=off "
        "-chardev socket,id=compare0-0,path=%s/compare0 "
        "-chardev socket,id=compare_out,path=%s/compare_out,server=on,wait=off "
        "-chardev socket,id=compare_out0,path=%s/compare_out "
        "-chardev socket,id=notify,path=%s/notify,server=on,wait=off "
        "-object filter-mirror,id=m0,netdev=n0,queue=tx,outdev=mirror0,"
        "packet-socket=off%s "
        "-object filter-redirector,netdev=n0,id=redire0,queue=rx,"
        "indev=compare_out,packet-socket=off%s "
        "-object filter-redirector,netdev=n0,id=redire1,queue=rx,"
        "outdev=compare0,packet-socket=off%s "
        "-object iothread,id=iothread1 "
        "-object colo-compare,id=comp0,primary_in=compare0-0,"
        "secondary_in=compare1,outdev=compare_out0,iothread=iothread1,"
        "%s%s", dir, dir, dir, dir, dir, dir, dir,
        vnet, vnet, vnet, compare_opts, vnet);
}

static char *secondary_args(const char *dir, const char *vnet,
                            bool has_rewriter, const char *incoming)
{
    g_autofree char *rewriter = g_strdup_printf(
        "-object filter-rewriter,id=rew0,netdev=n0,queue=all%s", vnet);

    return g_strdup_printf(
        "-chardev socket,id=red0,path=%s/mirror0,reconnect-ms=100 "
        "-chardev socket,id=red1,path=%s/compare1,reconnect-ms=100 "
        "-object filter-redirector,id=f1,netdev=n0,queue=tx,indev=red0,"
        "packet-socket=off%s "
        "-object filter-redirector,id=f2,netdev=n0,queue=rx,outdev=red1,"
        "packet-socket=off%s %s %s",
        dir, dir, vnet, vnet, has_rewriter ? rewriter : "", incoming);
}

static void driver_start(Vm *vm)
{
    guest_start(&vm->f);
    guest_post(&vm->f, 100);
}

static void vm_start(Vm *vm, const char *netdev_opts, const char *args)
{
    struct sockaddr_ll addr = {
        .sll_family = AF_PACKET,
        .sll_protocol = htons(ETH_P_IP),
    };

    fixture_init(&vm->f, netdev_opts, "", args);
    addr.sll_ifindex = if_nametoindex(vm->f.ifname);
    vm->host = socket(AF_PACKET, SOCK_RAW, 0);
    g_assert_cmpint(vm->host, >=, 0);
    g_assert_cmpint(bind(vm->host, (struct sockaddr *)&addr, sizeof(addr)),
                    ==, 0);
    driver_start(vm);
}

static void vm_close(Vm *vm)
{
    close(vm->host);
    fixture_close(&vm->f);
}

/*
 * As if its host had died: nothing more comes from it, not even the end of its
 * connections.
 */
static void vm_freeze(Vm *vm)
{
    g_assert_cmpint(kill(qtest_pid(vm->f.qts), SIGSTOP), ==, 0);
}

static void vm_thaw(Vm *vm)
{
    g_assert_cmpint(kill(qtest_pid(vm->f.qts), SIGCONT), ==, 0);
}

static void expect_property(Vm *vm, const char *path, const char *property,
                            const char *value)
{
    QDict *rsp = qtest_qmp(vm->f.qts, "{'execute': 'qom-get', 'arguments':"
                           " {'path': %s, 'property': %s}}", path, property);

    g_assert_cmpstr(qdict_get_str(rsp, "return"), ==, value);
    qobject_unref(rsp);
}

static void expect_datapath(Vm *vm, const char *datapath)
{
    expect_property(vm, NIC_PATH, "datapath", datapath);
}

static void expect_reason(Vm *vm, const char *reason)
{
    expect_property(vm, NIC_PATH, "datapath-reason", reason);
}

static void pair_set(Pair *p, bool vnet, bool rewriter)
{
    p->vnet = vnet;
    p->rewriter = rewriter;
    p->notify = -1;
    p->dir = g_dir_make_tmp("filter-colo-XXXXXX", NULL);
    g_assert_nonnull(p->dir);
}

static const char *pair_vnet(Pair *p)
{
    return p->vnet ? ",vnet_hdr_support=on" : "";
}

static const char *pair_netdev(Pair *p)
{
    return p->vnet ? "vhost=on" : "vhost=on,vnet_hdr=off";
}

static void pair_start_secondary(Pair *p, const char *incoming)
{
    g_autofree char *args = secondary_args(p->dir, pair_vnet(p), p->rewriter,
                                           incoming);

    vm_start(&p->secondary, pair_netdev(p), args);
}

static void pair_expect_connected(Pair *p)
{
    expect_connected(&p->secondary.f, "red0", true);
    expect_connected(&p->secondary.f, "red1", true);
    expect_connected(&p->primary.f, "mirror0", true);
    expect_connected(&p->primary.f, "compare1", true);
    expect_datapath(&p->primary, "userspace");
    expect_datapath(&p->secondary, "userspace");
}

static void pair_init(Pair *p, bool vnet, bool rewriter,
                      const char *compare_opts, const char *incoming)
{
    g_autofree char *primary = NULL;

    pair_set(p, vnet, rewriter);
    primary = primary_args(p->dir, pair_vnet(p), compare_opts);
    vm_start(&p->primary, pair_netdev(p), primary);
    pair_start_secondary(p, incoming);
    pair_expect_connected(p);
}

/* The network part alone */
static void pair_start(Pair *p, bool vnet, bool rewriter, bool notify)
{
    Fixture at;

    pair_init(p, vnet, rewriter,
              notify ? "notify_dev=notify" : "compare_timeout=3600000", "");
    if (notify) {
        at.dir = p->dir;
        p->notify = connect_to(&at, "notify");
    }
}

static void pair_rmdir(Pair *p)
{
    static const char *const names[] = {
        "mirror0", "compare1", "compare0", "compare_out", "notify",
        "migration",
    };

    for (int i = 0; i < ARRAY_SIZE(names); i++) {
        g_autofree char *path = g_build_filename(p->dir, names[i], NULL);

        unlink(path);
    }
    rmdir(p->dir);
    g_free(p->dir);
}

static void pair_close(Pair *p)
{
    vm_thaw(&p->secondary);
    vm_thaw(&p->primary);
    vm_close(&p->secondary);
    vm_close(&p->primary);
    close(p->notify);
    pair_rmdir(p);
}

/* COLO */

/* As qtest_qmp_eventwait(), but it must come. */
static void expect_event(Vm *vm, const char *name)
{
    gint64 end = g_get_monotonic_time() + TIMEOUT_US;
    QDict *event;

    while (!(event = qtest_qmp_event_ref(vm->f.qts, name))) {
        g_assert_cmpint(g_get_monotonic_time(), <, end);
        /* Events are read along with answers. */
        qtest_qmp_assert_success(vm->f.qts, "{'execute': 'query-status'}");
    }
    qobject_unref(event);
}

static void forget_events(Vm *vm, const char *name)
{
    QDict *event;

    while ((event = qtest_qmp_event_ref(vm->f.qts, name))) {
        qobject_unref(event);
    }
}

static void enable_colo(Vm *vm)
{
    qtest_qmp_assert_success(vm->f.qts,
        "{'execute': 'migrate-set-capabilities', 'arguments':"
        " {'capabilities': [{'capability': 'return-path', 'state': true},"
        "                   {'capability': 'x-colo', 'state': true}]}}");
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
    g_autofree char *uri = NULL;

    p->marker = guest_alloc(&p->primary.f.alloc, 4);
    g_assert_cmphex(guest_alloc(&p->secondary.f.alloc, 4), ==, p->marker);
    /* The driver comes with the migration. */
    qtest_system_reset(p->secondary.f.qts);

    uri = g_strdup_printf("unix:%s/migration", p->dir);
    enable_colo(&p->primary);
    enable_colo(&p->secondary);
    qtest_qmp_assert_success(p->primary.f.qts,
        "{'execute': 'migrate-set-parameters', 'arguments':"
        " {'x-checkpoint-delay': 3600000}}");
    qtest_qmp_assert_success(p->secondary.f.qts,
        "{'execute': 'migrate-incoming', 'arguments': {'uri': %s}}", uri);
    qtest_qmp_assert_success(p->primary.f.qts,
        "{'execute': 'migrate', 'arguments': {'uri': %s}}", uri);
    expect_event(&p->secondary, "RESUME");
    expect_event(&p->primary, "RESUME");
    expect_status(&p->primary.f, "query-migrate", "colo");
    expect_status(&p->secondary.f, "query-migrate", "colo");
    expect_datapath(&p->primary, "userspace");
    expect_datapath(&p->secondary, "userspace");
}

static void colo_start(Pair *p, bool vnet, bool rewriter)
{
    pair_init(p, vnet, rewriter, "compare_timeout=3600000", "-incoming defer");
    colo_migrate(p);
}

/* Call it for each checkpoint, and in between expect that there is none. */
static void expect_colo_checkpoint(Pair *p)
{
    expect_event(&p->primary, "STOP");
    expect_event(&p->secondary, "STOP");
    expect_event(&p->secondary, "RESUME");
    expect_event(&p->primary, "RESUME");
}

static void expect_no_colo_checkpoint(Pair *p)
{
    expect_status(&p->primary.f, "query-status", "running");
    g_assert_null(qtest_qmp_event_ref(p->primary.f.qts, "STOP"));
}

static void lose_heartbeat(Vm *vm)
{
    qtest_qmp_assert_success(vm->f.qts, "{'execute': 'yank', 'arguments':"
                             " {'instances': [{'type': 'migration'}]}}");
    qtest_qmp_assert_success(vm->f.qts,
                             "{'execute': 'x-colo-lost-heartbeat'}");
    expect_status(&vm->f, "query-migrate", "completed");
    expect_status(&vm->f, "query-status", "running");
}

/* From the host to both guests */
static void pass_to_guests(Pair *p, const uint8_t *frame, size_t len)
{
    host_write(&p->primary, frame, len);
    expect_at_guest(&p->primary, frame, len);
    expect_at_guest(&p->secondary, frame, len);
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
    g_assert_cmpint(memcmp(text, "DO_CHECKPOINT", sizeof(text)), ==, 0);
}

static void do_checkpoint(Pair *p)
{
    static const char text[] = "COLO_CHECKPOINT";
    uint8_t record[8 + sizeof(text) - 1] = { };
    size_t prefix = p->vnet ? 8 : 4;

    stl_be_p(record, sizeof(text) - 1);
    memcpy(record + prefix, text, sizeof(text) - 1);
    g_assert_cmpint(write(p->notify, record, prefix + sizeof(text) - 1), ==,
                    prefix + sizeof(text) - 1);
}

/* Tests */

static void check_match(Pair *p, uint32_t first)
{
    uint8_t frame[FRAME_LEN];

    for (uint32_t i = first; i < first + 10; i++) {
        size_t len = make_udp(frame, i, true);

        pass_to_guests(p, frame, len);
        len = make_udp(frame, 1000 + i, false);
        /* Either of them may be the first one. */
        guest_send_frame(i & 1 ? &p->primary.f : &p->secondary.f, frame, len);
        guest_send_frame(i & 1 ? &p->secondary.f : &p->primary.f, frame, len);
        expect_at_host(&p->primary, frame, len);
    }
}

/* What differs comes to the host with the next checkpoint, from the primary. */
static void check_differ(Pair *p)
{
    uint8_t frame[FRAME_LEN], other[FRAME_LEN];
    size_t len = make_udp(frame, 5000, false);

    make_udp(other, 6000, false);
    guest_send_frame(&p->primary.f, frame, len);
    guest_send_frame(&p->secondary.f, other, len);
    expect_checkpoint(p);
    do_checkpoint(p);
    expect_at_host(&p->primary, frame, len);
}

/* ... which here COLO takes by itself. */
static void check_colo_differ(Pair *p, uint32_t number)
{
    uint8_t frame[FRAME_LEN], other[FRAME_LEN];
    size_t len = make_udp(frame, number, false);

    qtest_writel(p->primary.f.qts, p->marker, number);
    make_udp(other, number + 1000, false);
    guest_send_frame(&p->primary.f, frame, len);
    expect_no_colo_checkpoint(p);
    guest_send_frame(&p->secondary.f, other, len);
    expect_colo_checkpoint(p);
    expect_at_host(&p->primary, frame, len);
    g_assert_cmphex(qtest_readl(p->secondary.f.qts, p->marker), ==, number);
}

/* The VM's own TAP, both ways */
static void check_alone(Vm *vm, uint32_t first)
{
    uint8_t frame[FRAME_LEN];

    for (uint32_t i = first; i < first + 10; i++) {
        size_t len = make_udp(frame, i, true);

        host_write(vm, frame, len);
        expect_at_guest(vm, frame, len);
        len = make_udp(frame, 1000 + i, false);
        guest_send_frame(&vm->f, frame, len);
        expect_at_host(vm, frame, len);
    }
}

/* A connection, at the secondary with the initial sequence number given */
static void check_tcp(Pair *p, uint32_t secondary)
{
    const uint32_t seq = TCP_HOST, primary = TCP_PRIMARY;
    uint8_t frame[BUFFER_LEN], there[BUFFER_LEN];
    size_t len = make_tcp(frame, seq, 0, SYN, "", true);

    pass_to_guests(p, frame, len);
    len = make_tcp(frame, primary, seq + 1, SYN | ACK, "", false);
    guest_send_frame(&p->primary.f, frame, len);
    make_tcp(there, secondary, seq + 1, SYN | ACK, "", false);
    guest_send_frame(&p->secondary.f, there, len);
    expect_at_host(&p->primary, frame, len);

    /* The host knows that of the primary. */
    len = make_tcp(frame, seq + 1, primary + 1, ACK, "", true);
    host_write(&p->primary, frame, len);
    expect_at_guest(&p->primary, frame, len);
    make_tcp(there, seq + 1, secondary + 1, ACK, "", true);
    expect_at_guest(&p->secondary, there, len);

    len = make_tcp(frame, seq + 1, primary + 1, PSH | ACK, "hello", true);
    host_write(&p->primary, frame, len);
    expect_at_guest(&p->primary, frame, len);
    guest_read_frame(&p->secondary.f, there, sizeof(there));
    g_assert_true(tcp_intact(there, len));
    g_assert_cmpint(memcmp(there + TCP_DATA_AT, "hello", 5), ==, 0);

    len = make_tcp(frame, primary + 1, seq + 6, PSH | ACK, "answer", false);
    guest_send_frame(&p->primary.f, frame, len);
    make_tcp(there, secondary + 1, seq + 6, PSH | ACK, "answer", false);
    guest_send_frame(&p->secondary.f, there, len);
    expect_at_host(&p->primary, frame, len);
}

/* The same connection after the failover: only the secondary is left. */
static void check_tcp_alone(Vm *secondary)
{
    uint8_t frame[BUFFER_LEN], there[BUFFER_LEN];
    size_t len = make_tcp(frame, TCP_HOST + 6, TCP_PRIMARY + 7, ACK, "", true);

    host_write(secondary, frame, len);
    make_tcp(there, TCP_HOST + 6, TCP_SECONDARY + 7, ACK, "", true);
    expect_at_guest(secondary, there, len);
    len = make_tcp(there, TCP_SECONDARY + 7, TCP_HOST + 6, PSH | ACK, "more",
                   false);
    guest_send_frame(&secondary->f, there, len);
    make_tcp(frame, TCP_PRIMARY + 7, TCP_HOST + 6, PSH | ACK, "more", false);
    expect_at_host(secondary, frame, len);
}

/*
 * The same connection when the secondary has become the primary of another
 * one: the rewriter is between the guest and the new filters, so that all but
 * the guest have the numbers that the host knows.
 */
static void check_tcp_resumed(Pair *p)
{
    uint8_t frame[BUFFER_LEN], there[BUFFER_LEN];
    size_t len = make_tcp(frame, TCP_HOST + 6, TCP_PRIMARY + 11, ACK, "",
                          true);

    make_tcp(there, TCP_HOST + 6, TCP_SECONDARY + 11, ACK, "", true);
    host_write(&p->primary, frame, len);
    expect_at_guest(&p->primary, there, len);
    expect_at_guest(&p->secondary, frame, len);

    len = make_tcp(frame, TCP_PRIMARY + 11, TCP_HOST + 6, PSH | ACK, "again",
                   false);
    make_tcp(there, TCP_SECONDARY + 11, TCP_HOST + 6, PSH | ACK, "again",
             false);
    guest_send_frame(&p->primary.f, there, len);
    guest_send_frame(&p->secondary.f, frame, len);
    expect_at_host(&p->primary, frame, len);
}

/* What the rewriter has queued while the VM was stopped is not lost. */
static void check_rewriter_off(Pair *p)
{
    uint8_t frame[BUFFER_LEN];
    size_t len = make_tcp(frame, 1, 0, SYN, "", true);

    vm_stop(&p->secondary.f);
    host_write(&p->primary, frame, len);
    expect_at_guest(&p->primary, frame, len);
    /* It is in the socket; after one turn of the main loop, in the queue. */
    expect_status(&p->secondary.f, "query-status", "paused");
    set_status(&p->secondary.f, "rew0", "off");
    vm_cont(&p->secondary.f);
    expect_at_guest(&p->secondary, frame, len);
    set_status(&p->secondary.f, "rew0", "on");
}

static void set_rewriter(Pair *p, const char *status)
{
    if (p->rewriter) {
        set_status(&p->secondary.f, "rew0", status);
    }
}

/* As at a failover: each VM goes on by itself, with vhost. */
static void check_failover(Pair *p)
{
    set_status(&p->primary.f, "m0", "off");
    set_status(&p->primary.f, "redire0", "off");
    expect_datapath(&p->primary, "userspace");
    set_status(&p->primary.f, "redire1", "off");
    expect_datapath(&p->primary, "vhost");
    set_status(&p->secondary.f, "f1", "off");
    set_status(&p->secondary.f, "f2", "off");
    set_rewriter(p, "off");
    expect_datapath(&p->secondary, "vhost");

    check_alone(&p->primary, 7000);
    /* The first that comes here from the secondary */
    check_alone(&p->secondary, 7100);

    /* And back again */
    set_status(&p->primary.f, "m0", "on");
    set_status(&p->primary.f, "redire0", "on");
    set_status(&p->primary.f, "redire1", "on");
    set_status(&p->secondary.f, "f1", "on");
    set_status(&p->secondary.f, "f2", "on");
    set_rewriter(p, "on");
    check_match(p, 8000);
}

static void run_proxy(bool vnet)
{
    Pair p;

    pair_start(&p, vnet, true, true);
    check_match(&p, 0);
    check_differ(&p);
    check_match(&p, 100);
    check_rewriter_off(&p);
    check_tcp(&p, TCP_SECONDARY);
    check_failover(&p);
    pair_close(&p);
}

static void test_vnet_hdr(void)
{
    run_proxy(true);
}

static void test_no_vnet_hdr(void)
{
    run_proxy(false);
}

/*
 * What differs leads to a checkpoint by COLO itself if there is no notify_dev,
 * see colo/no-rewriter.
 */
static void run_no_rewriter(bool notify)
{
    Pair p;

    pair_start(&p, true, false, notify);
    check_match(&p, 0);
    if (notify) {
        check_differ(&p);
        check_match(&p, 100);
    }
    check_tcp(&p, TCP_PRIMARY);
    check_failover(&p);
    pair_close(&p);
}

static void test_no_rewriter(void)
{
    run_no_rewriter(false);
}

static void test_no_rewriter_notify(void)
{
    run_no_rewriter(true);
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

/* Nothing is to be rewritten: vhost comes back by itself. */
static void run_secondary_failover(bool vnet, bool rewriter)
{
    Pair p;

    colo_start(&p, vnet, rewriter);
    run_checkpoints(&p);
    vm_freeze(&p.primary);
    lose_heartbeat(&p.secondary);
    expect_property(&p.secondary, "/objects/f1", "status", "off");
    expect_property(&p.secondary, "/objects/f2", "status", "off");
    if (rewriter) {
        expect_property(&p.secondary, "/objects/rew0", "status", "off");
    }
    expect_datapath(&p.secondary, "vhost");
    check_alone(&p.secondary, 7000);
    pair_close(&p);
}

static void test_secondary_failover(void)
{
    run_secondary_failover(true, true);
}

static void test_secondary_failover_no_vnet_hdr(void)
{
    run_secondary_failover(false, true);
}

static void test_colo_no_rewriter(void)
{
    run_secondary_failover(true, false);
}

/* A connection needs the rewriter as long as it lives. */
static void test_secondary_failover_tcp(void)
{
    Pair p;

    colo_start(&p, true, true);
    check_tcp(&p, TCP_SECONDARY);
    expect_no_colo_checkpoint(&p);
    vm_freeze(&p.primary);
    lose_heartbeat(&p.secondary);
    expect_property(&p.secondary, "/objects/f1", "status", "off");
    expect_property(&p.secondary, "/objects/f2", "status", "off");
    expect_property(&p.secondary, "/objects/rew0", "status", "on");
    expect_datapath(&p.secondary, "userspace");
    expect_reason(&p.secondary, "filter 'rew0' is on");
    check_tcp_alone(&p.secondary);
    check_alone(&p.secondary, 7000);

    set_status(&p.secondary.f, "rew0", "off");
    expect_datapath(&p.secondary, "vhost");
    check_alone(&p.secondary, 8000);
    pair_close(&p);
}

/* A checkpoint makes the connections of both guests the same. */
static void test_secondary_failover_tcp_checkpoint(void)
{
    Pair p;

    colo_start(&p, true, true);
    check_tcp(&p, TCP_SECONDARY);
    check_colo_differ(&p, 5000);
    vm_freeze(&p.primary);
    lose_heartbeat(&p.secondary);
    expect_property(&p.secondary, "/objects/rew0", "status", "off");
    expect_datapath(&p.secondary, "vhost");
    check_alone(&p.secondary, 7000);
    pair_close(&p);
}

static void primary_failover(Pair *p)
{
    vm_freeze(&p->secondary);
    del_object(&p->primary.f, "comp0");
    del_object(&p->primary.f, "iothread1");
    del_object(&p->primary.f, "m0");
    del_object(&p->primary.f, "redire0");
    expect_datapath(&p->primary, "userspace");
    del_object(&p->primary.f, "redire1");
    lose_heartbeat(&p->primary);
}

static void test_primary_failover(void)
{
    Pair p;

    colo_start(&p, true, true);
    run_checkpoints(&p);
    primary_failover(&p);
    expect_datapath(&p.primary, "vhost");
    check_alone(&p.primary, 7000);
    pair_close(&p);
}

/* Replication is resumed: the secondary becomes the primary of another one. */

static void chardev_remove(Vm *vm, const char *id)
{
    qtest_qmp_assert_success(vm->f.qts, "{'execute': 'chardev-remove',"
                             " 'arguments': {'id': %s}}", id);
}

static void chardev_add(Pair *p, const char *id, const char *name, bool server)
{
    g_autofree char *path = g_build_filename(p->dir, name, NULL);

    qtest_qmp_assert_success(p->primary.f.qts,
        "{'execute': 'chardev-add', 'arguments': {'id': %s, 'backend':"
        " {'type': 'socket', 'data': {'server': %i, 'addr':"
        "  {'type': 'unix', 'data': {'path': %s}}}}}}", id, server, path);
}

static void add_before_rewriter(Pair *p, const char *type, const char *id,
                                const char *queue, const char *property,
                                const char *chardev)
{
    qtest_qmp_assert_success(p->primary.f.qts,
        "{'execute': 'object-add', 'arguments': {'qom-type': %s, 'id': %s,"
        " 'insert': 'before', 'position': 'id=rew0', 'netdev': 'n0',"
        " 'queue': %s, %s: %s, 'vnet_hdr_support': true,"
        " 'packet-socket': 'off'}}", type, id, queue, property, chardev);
}

/*
 * The guest's driver starts again, at the addresses and with the buffers that
 * the driver of a new VM has.
 */
static void driver_restart(Vm *vm)
{
    guest_stop(&vm->f);
    alloc_destroy(&vm->f.alloc);
    pc_alloc_init(&vm->f.alloc, vm->f.qts, 0);
    driver_start(vm);
}

/* What the document says, in its order; @reason is why there is no vhost. */
static void colo_resume(Pair *p, Vm *survivor, const char *reason)
{
    static const char *const names[] = { "STOP", "RESUME" };

    pair_set(p, true, true);
    p->primary = *survivor;
    del_object(&p->primary.f, "f2");
    del_object(&p->primary.f, "f1");
    chardev_remove(&p->primary, "red1");
    chardev_remove(&p->primary, "red0");
    chardev_add(p, "mirror0", "mirror0", true);
    chardev_add(p, "compare1", "compare1", true);
    chardev_add(p, "compare0", "compare0", true);
    chardev_add(p, "compare0-0", "compare0", false);
    chardev_add(p, "compare_out", "compare_out", true);
    chardev_add(p, "compare_out0", "compare_out", false);
    driver_restart(&p->primary);
    expect_reason(&p->primary, reason);

    pair_start_secondary(p, "-incoming defer");
    vm_stop(&p->primary.f);
    add_before_rewriter(p, "filter-mirror", "m0", "tx", "outdev", "mirror0");
    add_before_rewriter(p, "filter-redirector", "redire0", "rx", "indev",
                        "compare_out");
    add_before_rewriter(p, "filter-redirector", "redire1", "rx", "outdev",
                        "compare0");
    /* The first one in the chain */
    expect_reason(&p->primary, "filter 'm0' is on");
    qtest_qmp_assert_success(p->primary.f.qts, "{'execute': 'object-add',"
        " 'arguments': {'qom-type': 'iothread', 'id': 'iothread1'}}");
    qtest_qmp_assert_success(p->primary.f.qts, "{'execute': 'object-add',"
        " 'arguments': {'qom-type': 'colo-compare', 'id': 'comp0',"
        " 'primary_in': 'compare0-0', 'secondary_in': 'compare1',"
        " 'outdev': 'compare_out0', 'iothread': 'iothread1',"
        " 'compare_timeout': 3600000, 'vnet_hdr_support': true}}");
    pair_expect_connected(p);
    for (int i = 0; i < ARRAY_SIZE(names); i++) {
        forget_events(&p->primary, names[i]);
    }
    colo_migrate(p);
}

static void run_resume(bool tcp)
{
    const char *reason = tcp ? "filter 'rew0' is on" : "";
    Pair p, q;

    colo_start(&p, true, true);
    if (tcp) {
        check_tcp(&p, TCP_SECONDARY);
    }
    vm_freeze(&p.primary);
    lose_heartbeat(&p.secondary);
    expect_reason(&p.secondary, reason);
    if (tcp) {
        check_tcp_alone(&p.secondary);
    }

    colo_resume(&q, &p.secondary, reason);
    if (tcp) {
        check_tcp_resumed(&q);
    }
    run_checkpoints(&q);
    primary_failover(&q);
    expect_reason(&q.primary, reason);
    check_alone(&q.primary, 7000);
    set_status(&q.primary.f, "rew0", "off");
    expect_datapath(&q.primary, "vhost");
    check_alone(&q.primary, 8000);
    pair_close(&q);
    vm_thaw(&p.primary);
    vm_close(&p.primary);
    pair_rmdir(&p);
}

static void test_resume(void)
{
    run_resume(false);
}

static void test_resume_tcp(void)
{
    run_resume(true);
}

int main(int argc, char **argv)
{
    rig_init(&argc, &argv, "filter-colo");
    rig_add("proxy/vnet-hdr", test_vnet_hdr);
    rig_add("proxy/no-vnet-hdr", test_no_vnet_hdr);
    rig_add("proxy/no-rewriter", test_no_rewriter);
    rig_add("proxy/no-rewriter-notify", test_no_rewriter_notify);
    rig_add("colo/secondary-failover", test_secondary_failover);
    rig_add("colo/secondary-failover-no-vnet-hdr",
            test_secondary_failover_no_vnet_hdr);
    rig_add("colo/secondary-failover-tcp", test_secondary_failover_tcp);
    rig_add("colo/secondary-failover-tcp-checkpoint",
            test_secondary_failover_tcp_checkpoint);
    rig_add("colo/no-rewriter", test_colo_no_rewriter);
    rig_add("colo/primary-failover", test_primary_failover);
    rig_add("colo/resume", test_resume);
    rig_add("colo/resume-tcp", test_resume_tcp);
    return g_test_run();
}
