/*
 * QTest testcase for filter-redirector on a TAP with vhost: life cycle
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What can be done to redirectors, their peers and their VM is done in random
 * order, while packets go both ways.  There are three redirectors, each with
 * a character device of its own, and each there or not:
 *
 *   cap  copies packets to a peer (packet-socket)
 *   sav  takes, while the VM is stopped, what is for the guest (chain)
 *   inj  injects frames toward the guest
 *
 * What holds at any time:
 *
 *   - A frame that the host sends or inj injects comes to the guest or to
 *     sav's peer, once, and in order.  None is lost, but for those that sav
 *     has taken and is deleted with, while it has no peer.
 *   - From when cap's source is packet-socket until the command that ends it,
 *     each frame comes to its peer, once and in order, unless the kernel says
 *     that it dropped some because the peer did not read, or cap is deleted
 *     before the peer has read them; and no other comes.
 *   - inj injects all that its peer sends, unless it was deleted or the peer
 *     left before QEMU had read it.
 *   - QEMU has no more file descriptors than before.
 *
 * The frames have numbers.  Who sends to the host's side is a thread; all the
 * rest is done between the commands.
 *
 * In 10 s with a seed that is always the same, or with -m slow in 10 minutes
 * with a random one, which --seed takes again.
 */

#include "qemu/osdep.h"
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <linux/if_packet.h>
#include <linux/sockios.h>
#include "filter-redirector-rig.h"
#include "qemu/atomic.h"
#include "qemu/bswap.h"
#include "qemu/units.h"
#include "qobject/qdict.h"

/* The numbers of the frames: of the host's side, of inj, and of the guest */
#define INJECTED 0x40000000u
#define FROM_GUEST 0x80000000u
#define MAX_FRAMES (16 * MiB)

/* The most that Linux 7.2 takes is 32767. */
#define QUEUE_LEN 32000

#define RECORD (8 + 12 + FRAME_LEN)

/* Commands that are told when something is wrong */
#define HISTORY 32

/* Where a frame of the host's side has come to */
#define AT_GUEST 1
#define AT_SAV 2

/* A redirector; its chardev's name is its id. */
typedef struct Redirector {
    const char *id;
    bool exists;
    bool on;
    int fd;                 /* of the peer, or -1 */
    uint8_t buf[64 * KiB];  /* what the peer got and is not a frame yet */
    size_t fill;
} Redirector;

typedef struct Life {
    Fixture f;
    GRand *rand;
    bool running;
    bool migrating;         /* in pre-switchover */
    uint8_t *where;         /* where each frame has come to */
    uint8_t *where_injected;
    unsigned commands;
    const char *history[HISTORY];

    GThread *sender;
    int sender_fd;
    uint32_t sent;          /* atomic, like those to sender_held */
    uint32_t gone;          /* of these, have come anywhere */
    bool sender_quit;
    bool sender_hold;
    bool sender_held;

    uint32_t guest_next;    /* no less may come to the guest */
    uint32_t guest_next_injected;
    uint64_t guest_frames;
    uint32_t guest_sent;    /* frames of the guest */

    Redirector cap;
    bool cap_all;           /* queue=all, not tx */
    bool cap_when_stopped;
    bool cap_stalled;       /* the peer does not read */
    bool cap_fresh;         /* nothing has come since it became active */
    uint32_t cap_min;       /* the first frame's number */
    uint32_t cap_max;       /* the most that it can be */
    uint32_t cap_next;
    uint32_t cap_next_guest;
    uint64_t cap_gaps;      /* frames that did not come */
    uint64_t cap_frames;

    Redirector sav;
    uint32_t sav_next;
    uint32_t sav_next_injected;
    uint64_t sav_frames;
    uint64_t sav_taken;     /* by those that are deleted */
    uint64_t sav_lost;

    Redirector inj;
    uint8_t inj_rest[RECORD];
    size_t inj_rest_len;
    uint32_t inj_sent;      /* by the peer */
    uint32_t inj_allowed;   /* that many before the TAP is looked at again */
    uint64_t inj_injected;  /* by those that are deleted */
    uint32_t inj_lost;      /* by the peer, and not injected */
    bool inj_may_lose;
} Life;

static bool chance(Life *l, double p)
{
    return g_rand_double(l->rand) < p;
}

static gint64 limit(void)
{
    return g_get_monotonic_time() + TIMEOUT_US;
}

static void G_NORETURN tell(Life *l)
{
    const uint8_t *ram = l->f.guest.ram;
    const QVirtQueue *rx = l->f.guest.rx;

    g_test_message("the VM %s%s; cap %s, its peer %s; sav %s, its peer %s; "
                   "inj %s, its peer %s", l->running ? "runs" : "is stopped",
                   l->migrating ? " in a migration" : "",
                   !l->cap.exists ? "no" : l->cap.on ? "on" : "off",
                   l->cap.fd < 0 ? "no" : l->cap_stalled ? "stalled" : "yes",
                   !l->sav.exists ? "no" : l->sav.on ? "on" : "off",
                   l->sav.fd < 0 ? "no" : "yes",
                   !l->inj.exists ? "no" : l->inj.on ? "on" : "off",
                   l->inj.fd < 0 ? "no" : "yes");
    g_test_message("vhost %s; of the guest's receive buffers %u are available, "
                   "%u used, %u taken; flags %x",
                   vhost_started(&l->f) ? "works" : "does not work",
                   lduw_le_p(ram + rx->avail + 2),
                   lduw_le_p(ram + rx->used + 2),
                   rx->last_used_idx, lduw_le_p(ram + rx->used));
    for (unsigned i = MAX(l->commands, HISTORY) - HISTORY; i <= l->commands;
         i++) {
        g_test_message("%u: %s", i, l->history[i % HISTORY]);
    }
    g_assert_not_reached();
}

/* The host's side */

static void *sender_thread(void *opaque)
{
    Life *l = opaque;
    uint8_t frame[FRAME_LEN];

    for (uint32_t n = 0; !qatomic_read(&l->sender_quit);) {
        bool hold = qatomic_read(&l->sender_hold);

        qatomic_store_release(&l->sender_held, hold);
        /* The TAP must never be full, see also pump(). */
        if (!hold && n - qatomic_read(&l->gone) < QUEUE_LEN / 8) {
            for (int i = n % 16; i >= 0; i--) {
                make_frame(frame, n);
                if (send(l->sender_fd, frame, FRAME_LEN, 0) != FRAME_LEN) {
                    g_error("frame %u: %s", n, strerror(errno));
                }
                qatomic_set(&l->sent, ++n);
            }
            g_assert_cmpuint(n, <, MAX_FRAMES - 16);
        }
        g_usleep(1000 + n % 7 * 500);
    }
    return NULL;
}

static uint32_t sent(Life *l)
{
    return qatomic_read(&l->sent);
}

static void hold_sender(Life *l, bool hold)
{
    qatomic_set(&l->sender_hold, hold);
    while (qatomic_load_acquire(&l->sender_held) != hold) {
        g_usleep(100);
    }
}

/* What comes */

/* To a place where nothing less than @next, or @next_injected, may come */
static void arrive(Life *l, uint32_t number, uint8_t at, uint32_t *next,
                   uint32_t *next_injected)
{
    uint8_t *where = l->where;

    g_assert_cmphex(number & FROM_GUEST, ==, 0);
    if (number & INJECTED) {
        number &= ~INJECTED;
        where = l->where_injected;
        next = next_injected;
        g_assert_cmpuint(number, <, l->inj_sent);
    } else {
        qatomic_set(&l->gone, l->gone + 1);
    }
    g_assert_cmpuint(number, <, MAX_FRAMES);
    g_assert_cmpuint(number, >=, *next);
    g_assert_cmpuint(where[number], ==, 0);
    where[number] = at;
    *next = number + 1;
}

static void guest_frame(void *opaque, uint32_t number)
{
    Life *l = opaque;

    l->guest_frames++;
    arrive(l, number, AT_GUEST, &l->guest_next, &l->guest_next_injected);
}

static void cap_frame(Life *l, uint32_t number)
{
    g_assert_cmphex(number & INJECTED, ==, 0);
    l->cap_frames++;
    if (number & FROM_GUEST) {
        number &= ~FROM_GUEST;
        g_assert_true(l->cap_all);
        g_assert_cmpuint(number, >=, l->cap_next_guest);
        l->cap_gaps += number - l->cap_next_guest;
        l->cap_next_guest = number + 1;
        return;
    }
    if (l->cap_fresh) {
        g_assert_cmpuint(number, >=, l->cap_min);
        g_assert_cmpuint(number, <=, l->cap_max);
        l->cap_fresh = false;
    } else {
        g_assert_cmpuint(number, >=, l->cap_next);
        l->cap_gaps += number - l->cap_next;
    }
    l->cap_next = number + 1;
}

static void sav_frame(Life *l, uint32_t number)
{
    l->sav_frames++;
    arrive(l, number, AT_SAV, &l->sav_next, &l->sav_next_injected);
}

/* Read what there is.  Returns false at the end of the connection. */
static bool peer_read(Life *l, Redirector *r,
                      void (*func)(Life *l, uint32_t number))
{
    for (;;) {
        ssize_t n = recv(r->fd, r->buf + r->fill, sizeof(r->buf) - r->fill,
                         MSG_DONTWAIT);
        size_t at = 0;

        if (n <= 0) {
            return n < 0 && errno == EAGAIN;
        }
        r->fill += n;
        for (; r->fill - at >= RECORD; at += RECORD) {
            g_assert_cmpuint(ldl_be_p(r->buf + at), ==, 12 + FRAME_LEN);
            g_assert_cmpuint(ldl_be_p(r->buf + at + 4), ==, 12);
            func(l, frame_number(r->buf + at + 8 + 12));
        }
        memmove(r->buf, r->buf + at, r->fill - at);
        r->fill -= at;
    }
}

static void peer_closed(Redirector *r)
{
    close(r->fd);
    r->fd = -1;
    r->fill = 0;
}

static void cap_read(Life *l)
{
    /* QEMU ends a connection that is in the middle of a frame. */
    if (l->cap.fd >= 0 && !peer_read(l, &l->cap, cap_frame)) {
        g_assert_false(l->cap.exists);
        peer_closed(&l->cap);
    }
}

static void sav_read(Life *l)
{
    if (l->sav.fd >= 0 && !peer_read(l, &l->sav, sav_frame)) {
        g_assert_false(l->sav.exists);
        peer_closed(&l->sav);
    }
}

static bool cap_active(Life *l)
{
    return l->cap.exists && l->cap.on && l->cap.fd >= 0 &&
           (l->running || l->cap_when_stopped);
}

static void inject(Life *l, unsigned count)
{
    while (count && l->inj.fd >= 0) {
        ssize_t n;

        if (!l->inj_rest_len) {
            memset(l->inj_rest, 0, sizeof(l->inj_rest));
            stl_be_p(l->inj_rest, 12 + FRAME_LEN);
            stl_be_p(l->inj_rest + 4, 12);
            make_frame(l->inj_rest + 8 + 12, INJECTED | l->inj_sent);
            l->inj_rest_len = RECORD;
            l->inj_sent++;
        }
        n = send(l->inj.fd, l->inj_rest + RECORD - l->inj_rest_len,
                 l->inj_rest_len, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0) {
            if (errno != EAGAIN) {
                /* Ended by QEMU: inj was deleted in the middle of a frame. */
                g_assert_true(l->inj_may_lose);
                peer_closed(&l->inj);
                l->inj_rest_len = 0;
            }
            return;
        }
        l->inj_rest_len -= n;
        count -= !l->inj_rest_len;
    }
}

/* The guest sends, and each frame is waited for where it must come to. */
static void guest_traffic(Life *l, unsigned count)
{
    gint64 end = limit();

    for (unsigned i = 0; i < count; i++) {
        guest_put(&l->f, FROM_GUEST | l->guest_sent);
        expect_host(&l->f, FROM_GUEST | l->guest_sent, 1);
        l->guest_sent++;
    }
    while (cap_active(l) && l->cap_all && !l->cap_stalled && !l->cap_gaps &&
           l->cap_next_guest < l->guest_sent) {
        cap_read(l);
        g_assert_cmpint(g_get_monotonic_time(), <, end);
    }
}

/* Packets that sav has ever taken */
static uint64_t taken(Life *l)
{
    return l->sav_taken + (l->sav.exists ?
                           counter(&l->f, "sav", "capture-packets") : 0);
}

/* Frames that inj has ever injected */
static uint64_t injected(Life *l)
{
    return l->inj_injected + (l->inj.exists ?
                              counter(&l->f, "inj", "inject-packets") : 0);
}

/* Frames that are in the TAP, or in the guest's ring */
static int64_t waiting(Life *l)
{
    return sent(l) + injected(l) - l->guest_frames - taken(l);
}

static void pump(Life *l)
{
    guest_take(&l->f, guest_frame, l);
    if (!l->cap_stalled) {
        cap_read(l);
    }
    sav_read(l);
    /* QEMU and the connection hold as much as half of the TAP's queue. */
    if (l->inj_sent >= l->inj_allowed && waiting(l) < QUEUE_LEN / 8) {
        l->inj_allowed = l->inj_sent + QUEUE_LEN / 8;
    }
    if (l->inj_sent < l->inj_allowed && chance(l, 0.5)) {
        inject(l, g_rand_int_range(l->rand, 1, 20));
    }
    if (l->running && chance(l, 0.2)) {
        guest_traffic(l, g_rand_int_range(l->rand, 1, 5));
    }
}

/* What is done; each returns false if it cannot be done now. */

static void set_on(Life *l, Redirector *r, bool on)
{
    set_status(&l->f, r->id, on ? "on" : "off");
    r->on = on;
}

static bool toggle(Life *l, Redirector *r)
{
    if (!r->exists) {
        return false;
    }
    set_on(l, r, !r->on);
    return true;
}

static bool come(Life *l, Redirector *r)
{
    if (r->fd >= 0) {
        return false;
    }
    r->fd = connect_to(&l->f, r->id);
    r->fill = 0;
    expect_connected(&l->f, r->id, true);
    return true;
}

/* QEMU closes the connection, and what was written before is read. */
static void leave(Life *l, Redirector *r,
                  void (*func)(Life *l, uint32_t number))
{
    gint64 end = limit();

    if (r->exists) {
        g_assert_cmpint(shutdown(r->fd, SHUT_WR), ==, 0);
        while (peer_read(l, r, func)) {
            g_assert_cmpint(g_get_monotonic_time(), <, end);
            g_usleep(100);
        }
    } else {
        /* Nobody would see that, nor write any more. */
        peer_read(l, r, func);
    }
    peer_closed(r);
    expect_connected(&l->f, r->id, false);
}

static bool do_cap_add(Life *l)
{
    if (l->cap.exists) {
        return false;
    }
    l->cap_all = chance(l, 0.5);
    l->cap_when_stopped = chance(l, 0.5);
    l->cap.on = chance(l, 0.7);
    l->cap_gaps = l->cap_frames = 0;
    qtest_qmp_assert_success(l->f.qts, "{'execute': 'object-add',"
        " 'arguments': {'qom-type': 'filter-redirector', 'id': 'cap',"
        "  'netdev': 'n0', 'outdev': 'cap', 'vnet_hdr_support': true,"
        "  'queue': %s, 'enable_when_stopped': %i, 'status': %s}}",
        l->cap_all ? "all" : "tx", l->cap_when_stopped,
        l->cap.on ? "on" : "off");
    l->cap.exists = true;
    return true;
}

/*
 * It has ceased to capture.  While its peer reads, nothing that came before,
 * up to the frame @from, is lost.
 */
static void expect_cap(Life *l, uint32_t from)
{
    gint64 end = limit();

    while (l->cap.fd >= 0 && !l->cap_stalled && !l->cap_gaps &&
           (l->cap_fresh ? l->cap_max : l->cap_next) < from) {
        cap_read(l);
        if (g_get_monotonic_time() > end) {
            g_test_message("%u of %u have come to cap", l->cap_next, from);
            tell(l);
        }
    }
}

static bool do_cap_del(Life *l)
{
    if (!l->cap.exists) {
        return false;
    }
    if (cap_active(l) && chance(l, 0.5)) {
        uint32_t from = sent(l);

        set_on(l, &l->cap, false);
        expect_cap(l, from);
    }
    g_assert_cmpuint(l->cap_gaps, <=,
                     counter(&l->f, "cap", "capture-kernel-drops"));
    g_assert_cmpuint(l->cap_frames, <=,
                     counter(&l->f, "cap", "capture-packets"));
    l->cap.exists = false;
    del_object(&l->f, "cap");
    return true;
}

static bool do_cap_toggle(Life *l)
{
    return toggle(l, &l->cap);
}

static bool do_cap_come(Life *l)
{
    return come(l, &l->cap);
}

static bool do_cap_leave(Life *l)
{
    if (l->cap.fd < 0) {
        return false;
    }
    if (chance(l, 0.5)) {
        leave(l, &l->cap, cap_frame);
    } else {
        peer_closed(&l->cap);
        expect_connected(&l->f, "cap", false);
    }
    return true;
}

static bool do_cap_stall(Life *l)
{
    l->cap_stalled = !l->cap_stalled;
    return true;
}

static bool do_sav_add(Life *l)
{
    if (l->sav.exists) {
        return false;
    }
    l->sav.on = chance(l, 0.7);
    qtest_qmp_assert_success(l->f.qts, "{'execute': 'object-add',"
        " 'arguments': {'qom-type': 'filter-redirector', 'id': 'sav',"
        "  'netdev': 'n0', 'outdev': 'sav', 'vnet_hdr_support': true,"
        "  'queue': 'tx', 'enable_when_stopped': true,"
        "  'enable_when_running': false, 'status': %s}}",
        l->sav.on ? "on" : "off");
    l->sav.exists = true;
    return true;
}

/* The last of the frames that have come nowhere */
static void tell_missing(const char *what, const uint8_t *where, uint32_t n)
{
    for (int told = 0; n && told < 8;) {
        if (!where[--n]) {
            g_test_message("%s %u has come nowhere", what, n);
            told++;
        }
    }
}

/* Wait until each frame that went into the TAP is taken or at the guest. */
static void settle(Life *l)
{
    gint64 end = limit();
    int64_t left;

    do {
        guest_take(&l->f, guest_frame, l);
        sav_read(l);
        left = waiting(l);
        if (g_get_monotonic_time() > end) {
            g_test_message("of %u sent and %" PRIu64 " injected, %" PRIu64
                           " at the guest, %" PRIu64 " taken; the TAP has "
                           "dropped %" PRIu64,
                           sent(l), injected(l), l->guest_frames, taken(l),
                           statistic(l->f.ifname, "tx_dropped"));
            tell_missing("frame", l->where, sent(l));
            tell_missing("injected frame", l->where_injected, l->inj_sent);
            tell(l);
        }
    } while (left > 0);
    g_assert_cmpint(left, ==, 0);
}

/* Wait until sav's peer has all that was taken. */
static void settle_sav(Life *l, uint64_t all)
{
    gint64 end = limit();

    while (l->sav_frames + l->sav_lost < all) {
        sav_read(l);
        if (g_get_monotonic_time() > end) {
            g_test_message("%" PRIu64 " taken, %" PRIu64 " lost with sav, %"
                           PRIu64 " came", all, l->sav_lost, l->sav_frames);
            tell(l);
        }
    }
    g_assert_cmpuint(l->sav_frames + l->sav_lost, ==, all);
}

static bool do_sav_del(Life *l)
{
    bool active = l->sav.exists && l->sav.on && !l->running &&
                  l->sav.fd >= 0;
    uint64_t all;

    if (!l->sav.exists) {
        return false;
    }
    if (active && chance(l, 0.5)) {
        /* All are taken; some may still wait for the peer. */
        hold_sender(l, true);
        settle(l);
    } else {
        set_on(l, &l->sav, false);
    }
    all = taken(l);
    if (chance(l, 0.5)) {
        sav_read(l);
    }
    l->sav.exists = false;
    del_object(&l->f, "sav");
    l->sav_taken = all;
    if (l->sav.fd < 0) {
        /* Who had no peer loses what it had taken. */
        l->sav_lost = all - l->sav_frames;
    }
    settle_sav(l, all);
    hold_sender(l, false);
    return true;
}

static bool do_sav_toggle(Life *l)
{
    return toggle(l, &l->sav);
}

static bool do_sav_come(Life *l)
{
    return come(l, &l->sav);
}

static bool do_sav_leave(Life *l)
{
    if (l->sav.fd < 0) {
        return false;
    }
    leave(l, &l->sav, sav_frame);
    return true;
}

static bool do_inj_add(Life *l)
{
    if (l->inj.exists) {
        return false;
    }
    l->inj.on = chance(l, 0.7);
    qtest_qmp_assert_success(l->f.qts, "{'execute': 'object-add',"
        " 'arguments': {'qom-type': 'filter-redirector', 'id': 'inj',"
        "  'netdev': 'n0', 'indev': 'inj', 'vnet_hdr_support': true,"
        "  'queue': 'tx', 'enable_when_stopped': %i, 'status': %s}}",
        chance(l, 0.3), l->inj.on ? "on" : "off");
    l->inj.exists = true;
    return true;
}

static bool do_inj_del(Life *l)
{
    if (!l->inj.exists) {
        return false;
    }
    /* What it has not injected yet is lost with it. */
    set_on(l, &l->inj, false);
    l->inj_injected = injected(l);
    l->inj_may_lose = true;
    l->inj.exists = false;
    del_object(&l->f, "inj");
    return true;
}

static bool do_inj_toggle(Life *l)
{
    return toggle(l, &l->inj);
}

static bool do_inj_come(Life *l)
{
    return come(l, &l->inj);
}

static bool do_inj_leave(Life *l)
{
    gint64 end = g_get_monotonic_time() + G_USEC_PER_SEC / 2;
    int unread;

    if (l->inj.fd < 0) {
        return false;
    }
    /* What QEMU has read survives, and this tells what it has not. */
    do {
        g_assert_cmpint(ioctl(l->inj.fd, SIOCOUTQ, &unread), ==, 0);
        pump(l);
        if (l->inj.fd < 0) {
            return true;
        }
    } while (l->inj.exists && l->inj.on && unread &&
             g_get_monotonic_time() < end && chance(l, 0.99));
    g_assert_cmpint(ioctl(l->inj.fd, SIOCOUTQ, &unread), ==, 0);
    l->inj_may_lose |= unread || l->inj_rest_len;
    l->inj_rest_len = 0;
    peer_closed(&l->inj);
    expect_connected(&l->f, "inj", false);
    return true;
}

static bool do_stop(Life *l)
{
    if (!l->running) {
        return false;
    }
    vm_stop(&l->f);
    l->running = false;
    return true;
}

static bool do_cont(Life *l)
{
    if (l->running || l->migrating) {
        return false;
    }
    vm_cont(&l->f);
    l->running = true;
    return true;
}

static bool do_migrate(Life *l)
{
    if (!l->running) {
        return false;
    }
    migration_start(&l->f);
    l->running = false;
    l->migrating = true;
    return true;
}

static bool do_cancel(Life *l)
{
    if (!l->migrating) {
        return false;
    }
    migration_cancel(&l->f);
    l->migrating = false;
    l->running = true;
    return true;
}

/* It ends well, and then the VM goes on at its source. */
static bool do_complete(Life *l)
{
    if (!l->migrating) {
        return false;
    }
    qtest_qmp_assert_success(l->f.qts, "{'execute': 'migrate-continue',"
                             " 'arguments': {'state': 'pre-switchover'}}");
    expect_status(&l->f, "query-migrate", "completed");
    l->migrating = false;
    return true;
}

static bool do_traffic(Life *l)
{
    gint64 end = g_get_monotonic_time() + g_rand_int_range(l->rand, 0, 100000);

    do {
        pump(l);
    } while (g_get_monotonic_time() < end);
    return true;
}

/* Wait until all that inj's peer has sent is injected; the VM runs. */
static void check_injected(Life *l)
{
    gint64 end = limit();
    uint32_t last;

    if (l->inj_may_lose) {
        /* When this one comes, those before have come or are lost. */
        inject(l, 1);
        last = l->inj_sent - 1;
        while (l->inj.fd >= 0 && !l->where_injected[last]) {
            inject(l, !!l->inj_rest_len);
            guest_take(&l->f, guest_frame, l);
            g_assert_cmpint(g_get_monotonic_time(), <, end);
        }
        if (l->inj.fd < 0) {
            return;
        }
        l->inj_lost = l->inj_sent - injected(l);
        l->inj_may_lose = false;
    }
    while (injected(l) + l->inj_lost != l->inj_sent) {
        inject(l, !!l->inj_rest_len);
        guest_take(&l->f, guest_frame, l);
        g_assert_cmpint(g_get_monotonic_time(), <, end);
    }
}

/* Everything has come to where it is due. */
static bool do_check(Life *l)
{
    gint64 end = limit();

    if (!l->running && !(l->sav.exists && l->sav.on && l->sav.fd >= 0)) {
        return false;
    }
    hold_sender(l, true);
    settle(l);
    if (l->sav.fd >= 0) {
        settle_sav(l, taken(l));
    }
    while (cap_active(l) && !l->cap_stalled && !l->cap_gaps &&
           (l->cap_fresh ? l->cap_max : l->cap_next) < sent(l)) {
        cap_read(l);
        g_assert_cmpint(g_get_monotonic_time(), <, end);
    }
    if (l->running && l->inj.exists && l->inj.on && l->inj.fd >= 0) {
        check_injected(l);
    }
    hold_sender(l, false);
    return true;
}

static const struct {
    bool (*func)(Life *l);
    const char *name;
    unsigned weight;
} commands[] = {
    { do_cap_add, "cap is added", 3 },
    { do_cap_del, "cap is deleted", 2 },
    { do_cap_toggle, "cap goes on or off", 3 },
    { do_cap_come, "cap's peer comes", 4 },
    { do_cap_leave, "cap's peer leaves", 2 },
    { do_cap_stall, "cap's peer stops or begins to read", 2 },
    { do_sav_add, "sav is added", 3 },
    { do_sav_del, "sav is deleted", 2 },
    { do_sav_toggle, "sav goes on or off", 3 },
    { do_sav_come, "sav's peer comes", 4 },
    { do_sav_leave, "sav's peer leaves", 2 },
    { do_inj_add, "inj is added", 3 },
    { do_inj_del, "inj is deleted", 2 },
    { do_inj_toggle, "inj goes on or off", 3 },
    { do_inj_come, "inj's peer comes", 4 },
    { do_inj_leave, "inj's peer leaves", 2 },
    { do_stop, "stop", 4 },
    { do_cont, "cont", 6 },
    { do_migrate, "migrate", 2 },
    { do_cancel, "cancel", 4 },
    { do_complete, "the migration completes", 3 },
    { do_traffic, "traffic", 15 },
    { do_check, "check", 4 },
};

/* Before cap becomes active: all of the time before */
static void cap_drain(Life *l)
{
    gint64 end = limit();

    while (l->cap.exists && l->cap.fd >= 0 && capture_pending(&l->f, "cap")) {
        cap_read(l);
        g_assert_cmpint(g_get_monotonic_time(), <, end);
    }
    cap_read(l);
}

/* Do one, and see that cap gets what it must. */
static void command(Life *l, unsigned i)
{
    bool was_active = cap_active(l);
    uint32_t from;

    if (!was_active) {
        cap_drain(l);
    } else if (!l->cap_stalled) {
        cap_read(l);
    }
    from = sent(l);
    l->history[l->commands % HISTORY] = commands[i].name;
    if (!commands[i].func(l)) {
        return;
    }
    l->commands++;
    if (!was_active && cap_active(l)) {
        expect_source(&l->f, "cap", "packet-socket");
        l->cap_fresh = true;
        l->cap_min = from;
        /* One may have passed cap, and not count as sent yet. */
        l->cap_max = sent(l) + 1;
        l->cap_next_guest = l->guest_sent;
        l->cap_stalled = false;
    }
    /* A deleted one can leave nothing for its peer. */
    if (was_active && !cap_active(l) && l->cap.exists) {
        expect_cap(l, from);
    }
}

static unsigned draw(Life *l)
{
    unsigned sum = 0, at;

    for (int i = 0; i < ARRAY_SIZE(commands); i++) {
        sum += commands[i].weight;
    }
    at = g_rand_int_range(l->rand, 0, sum);
    for (int i = 0;; i++) {
        if (at < commands[i].weight) {
            return i;
        }
        at -= commands[i].weight;
    }
}

static void do_named(Life *l, bool (*func)(Life *l))
{
    for (int i = 0; i < ARRAY_SIZE(commands); i++) {
        if (commands[i].func == func) {
            command(l, i);
        }
    }
}

/* A running VM without redirectors, all peers there, nothing on its way */
static void rest(Life *l)
{
    do_named(l, do_cancel);
    do_named(l, do_cont);
    do_named(l, do_cap_come);
    do_named(l, do_sav_come);
    do_named(l, do_inj_come);
    if (l->inj.exists && !l->inj.on) {
        do_named(l, do_inj_toggle);
    }
    do_named(l, do_check);
    do_named(l, do_cap_del);
    do_named(l, do_sav_del);
    do_named(l, do_inj_del);
    do_named(l, do_check);
    cap_drain(l);
    /* A peer whose connection was ended in the middle of a frame */
    do_named(l, do_cap_come);
    inject(l, 1);
    do_named(l, do_inj_come);
}

static void redirector_init(Life *l, Redirector *r, const char *id)
{
    g_autofree char *path = g_build_filename(l->f.dir, id, NULL);

    r->id = id;
    r->fd = -1;
    qtest_qmp_assert_success(l->f.qts, "{'execute': 'chardev-add',"
        " 'arguments': {'id': %s, 'backend': {'type': 'socket', 'data': {"
        "  'addr': {'type': 'unix', 'data': {'path': %s}},"
        "  'server': true, 'wait': false}}}}", id, path);
    come(l, r);
}

static void redirector_close(Life *l, Redirector *r)
{
    g_autofree char *path = g_build_filename(l->f.dir, r->id, NULL);

    close(r->fd);
    unlink(path);
}

static void expect_fds(Life *l, int fds)
{
    gint64 end = limit();

    while (count_fds(&l->f) != fds) {
        g_assert_cmpint(g_get_monotonic_time(), <, end);
    }
}

static void test_random(void)
{
    g_autofree Life *l = g_new0(Life, 1);
    g_autofree char *cmd = NULL;
    uint32_t seed = g_test_slow() ? g_test_rand_int() : 20240229;
    gint64 end, next_rest;
    unsigned rests = 0;
    int fds;

    g_test_message("seed %u", seed);
    l->rand = g_rand_new_with_seed(seed);
    l->where = g_malloc0(MAX_FRAMES);
    l->where_injected = g_malloc0(MAX_FRAMES);
    fixture_start(&l->f, GUEST_MAP_ARGS);
    cmd = g_strdup_printf("ip link set %s txqueuelen %d", l->f.ifname,
                          QUEUE_LEN);
    g_assert_cmpint(system(cmd), ==, 0);
    guest_start(&l->f);
    guest_map(&l->f);
    l->running = true;
    redirector_init(l, &l->cap, "cap");
    redirector_init(l, &l->sav, "sav");
    redirector_init(l, &l->inj, "inj");
    l->sender_fd = open_host(l->f.ifname);
    l->sender = g_thread_new("sender", sender_thread, l);

    /* A migration opens what it keeps. */
    do_named(l, do_migrate);
    rest(l);
    fds = count_fds(&l->f);
    end = g_get_monotonic_time() +
          (g_test_slow() ? 600 : 10) * G_USEC_PER_SEC;
    next_rest = 0;
    while (g_get_monotonic_time() < end) {
        command(l, draw(l));
        pump(l);
        if (g_get_monotonic_time() > next_rest) {
            rest(l);
            expect_fds(l, fds);
            rests++;
            next_rest = g_get_monotonic_time() + 5 * G_USEC_PER_SEC;
        }
    }
    rest(l);
    expect_fds(l, fds);
    g_assert_cmpuint(statistic(l->f.ifname, "tx_dropped"), ==, 0);
    g_test_message("%u commands, %u times at rest", l->commands, rests);
    g_test_message("%u frames sent to the guest, %" PRIu64 " injected, %u lost "
                   "with inj or before; %u sent by the guest", sent(l),
                   injected(l), l->inj_lost, l->guest_sent);
    g_test_message("%" PRIu64 " came to the guest, %" PRIu64 " were saved, %"
                   PRIu64 " lost with sav", l->guest_frames, l->sav_frames,
                   l->sav_lost);

    qatomic_set(&l->sender_quit, true);
    g_thread_join(l->sender);
    close(l->sender_fd);
    redirector_close(l, &l->cap);
    redirector_close(l, &l->sav);
    redirector_close(l, &l->inj);
    fixture_close(&l->f);
    g_free(l->where);
    g_free(l->where_injected);
    g_rand_free(l->rand);
}

int main(int argc, char **argv)
{
    rig_init(&argc, &argv, "filter-redirector-lifecycle");
    if (HAS_FALLBACK) {
        /* Without it QEMU loses packets at a stop. */
        rig_add("random", test_random);
    }
    return g_test_run();
}
