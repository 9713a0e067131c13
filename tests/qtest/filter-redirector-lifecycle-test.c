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
 * In 10 s with a seed that is always the same, or with -m slow in a minute
 * with a random one, which --seed takes again.
 */

#include "qemu/osdep.h"
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <linux/sockios.h>
#include "filter-redirector-rig.h"
#include "qemu/atomic.h"
#include "qemu/bswap.h"
#include "qemu/units.h"

/* The numbers of the frames: of the host's side, of inj, and of the guest */
#define INJECTED 0x40000000u
#define FROM_GUEST 0x80000000u
#define MAX_FRAMES (16 * MiB)

/* The most that Linux 7.2 takes is 32767. */
#define QUEUE_LEN 32000

/* Commands that are told when something is wrong */
#define HISTORY 32

static Fixture f;
static GRand *rng;
static bool running;
static bool migrating;          /* in pre-switchover */
static unsigned done;           /* commands */
static const char *history[HISTORY];

/* Of two elements, one is for the host's frames, and one for inj's. */

/* What has come to the guest or to sav's peer */
static bool arrived[2][MAX_FRAMES];

static int sender_fd;
static uint32_t sender_sent;    /* atomic, like those to sender_held */
static uint32_t sender_gone;    /* of these, have come anywhere */
static bool sender_quit;
static bool sender_hold;
static bool sender_held;

static uint32_t guest_next[2];  /* no less may come to the guest */
static uint64_t guest_frames;
static uint32_t guest_sent;     /* frames of the guest */

static bool cap_all;            /* queue=all, not tx */
static bool cap_when_stopped;
static bool cap_stalled;        /* the peer does not read */
static bool cap_fresh;          /* nothing has come since it became active */
static uint32_t cap_min;        /* the first frame's number */
static uint32_t cap_max;        /* the most that it can be */
static uint32_t cap_next;
static uint32_t cap_next_guest;
static uint64_t cap_gaps;       /* frames that did not come */
static uint64_t cap_frames;

static uint32_t sav_next[2];
static uint64_t sav_frames;
static uint64_t sav_taken;      /* by those that are deleted */
static uint64_t sav_lost;

static uint8_t inj_rest[RECORD_LEN];
static size_t inj_rest_len;
static uint32_t inj_sent;       /* by the peer */
static uint32_t inj_allowed;    /* before the TAP is looked at again */
static uint64_t inj_injected;   /* by those that are deleted */
static uint32_t inj_lost;       /* by the peer, and not injected */
static bool inj_may_lose;

static bool chance(double p)
{
    return g_rand_double(rng) < p;
}

/* The host's side */

static void *sender_thread(void *opaque)
{
    uint8_t frame[FRAME_LEN];

    for (uint32_t n = 0; !qatomic_read(&sender_quit);) {
        bool hold = qatomic_read(&sender_hold);

        qatomic_store_release(&sender_held, hold);
        /* The TAP must never be full, see also pump(). */
        if (!hold && n - qatomic_read(&sender_gone) < QUEUE_LEN / 8) {
            for (int i = n % 16; i >= 0; i--) {
                make_frame(frame, n);
                if (send(sender_fd, frame, FRAME_LEN, 0) != FRAME_LEN) {
                    g_error("frame %u: %s", n, strerror(errno));
                }
                qatomic_set(&sender_sent, ++n);
            }
            g_assert_cmpuint(n, <, MAX_FRAMES - 16);
        }
        g_usleep(1000 + n % 7 * 500);
    }
    return NULL;
}

static uint32_t sent(void)
{
    return qatomic_read(&sender_sent);
}

static void hold_sender(bool hold)
{
    qatomic_set(&sender_hold, hold);
    while (qatomic_load_acquire(&sender_held) != hold) {
        g_usleep(100);
    }
}

/* What comes */

/* To the guest or sav's peer; @next is what may come there. */
static void arrive(uint32_t number, uint32_t next[2])
{
    bool by_inj = number & INJECTED;

    number &= ~INJECTED;
    g_assert_cmpuint(number, <, MAX_FRAMES);
    g_assert_cmpuint(number, >=, next[by_inj]);
    g_assert_false(arrived[by_inj][number]);
    arrived[by_inj][number] = true;
    next[by_inj] = number + 1;
    if (by_inj) {
        g_assert_cmpuint(number, <, inj_sent);
    } else {
        qatomic_set(&sender_gone, sender_gone + 1);
    }
}

static void guest_frame(void *opaque, uint32_t number)
{
    guest_frames++;
    arrive(number, guest_next);
}

static void cap_frame(uint32_t number)
{
    g_assert_cmphex(number & INJECTED, ==, 0);
    cap_frames++;
    if (number & FROM_GUEST) {
        number &= ~FROM_GUEST;
        g_assert_true(cap_all);
        g_assert_cmpuint(number, >=, cap_next_guest);
        cap_gaps += number - cap_next_guest;
        cap_next_guest = number + 1;
        return;
    }
    if (cap_fresh) {
        g_assert_cmpuint(number, >=, cap_min);
        g_assert_cmpuint(number, <=, cap_max);
        cap_fresh = false;
    } else {
        g_assert_cmpuint(number, >=, cap_next);
        cap_gaps += number - cap_next;
    }
    cap_next = number + 1;
}

static void sav_frame(uint32_t number)
{
    sav_frames++;
    arrive(number, sav_next);
}

/* A redirector; its chardev's name is its id. */
typedef struct Redirector {
    const char *id;
    void (*frame)(uint32_t number);     /* comes to the peer */
    bool exists;
    bool on;
    int fd;                 /* of the peer, or -1 */
    uint8_t buf[64 * KiB];  /* what the peer got and is not a frame yet */
    size_t fill;
} Redirector;

static Redirector cap = { "cap", cap_frame };
static Redirector sav = { "sav", sav_frame };
static Redirector inj = { "inj" };

static bool cap_active(void)
{
    return cap.exists && cap.on && cap.fd >= 0 && (running || cap_when_stopped);
}

/* When a test fails */
static void tell(void *opaque)
{
    const Redirector *all[] = { &cap, &sav, &inj };
    const uint8_t *ram = f.guest.ram;
    const QVirtQueue *rx = f.guest.rx;

    g_test_message("the VM %s%s; cap's peer %s; %u of %u have come to it",
                   running ? "runs" : "is stopped",
                   migrating ? " in a migration" : "",
                   cap_stalled ? "is stalled" : "reads", cap_next, sent());
    for (int i = 0; i < ARRAY_SIZE(all); i++) {
        g_test_message("%s %s, its peer %s", all[i]->id,
                       !all[i]->exists ? "no" : all[i]->on ? "on" : "off",
                       all[i]->fd < 0 ? "no" : "yes");
    }
    g_test_message("%u sent, %u by inj's peer; %" PRIu64 " at the guest; %"
                   PRIu64 " at sav's peer, %" PRIu64 " lost with sav; the TAP "
                   "has dropped %" PRIu64, sent(), inj_sent, guest_frames,
                   sav_frames, sav_lost, statistic(f.ifname, "tx_dropped"));
    g_test_message("of the guest's receive buffers %u are available, %u used, "
                   "%u taken; flags %x", lduw_le_p(ram + rx->avail + 2),
                   lduw_le_p(ram + rx->used + 2), rx->last_used_idx,
                   lduw_le_p(ram + rx->used));
    for (uint32_t n = sent(), told = 0; n-- && told < 8;) {
        if (!arrived[0][n]) {
            g_test_message("frame %u has come nowhere", n);
            told++;
        }
    }
    for (unsigned i = MAX(done, HISTORY) - HISTORY; i <= done; i++) {
        g_test_message("%u: %s", i, history[i % HISTORY]);
    }
}

/* Read what there is.  Returns false at the end of the connection. */
static bool peer_read(Redirector *r)
{
    for (;;) {
        ssize_t n = recv(r->fd, r->buf + r->fill, sizeof(r->buf) - r->fill,
                         MSG_DONTWAIT);
        size_t at = 0;

        if (n <= 0) {
            return n < 0 && errno == EAGAIN;
        }
        r->fill += n;
        for (; r->fill - at >= RECORD_LEN; at += RECORD_LEN) {
            g_assert_cmpuint(ldl_be_p(r->buf + at), ==, 12 + FRAME_LEN);
            g_assert_cmpuint(ldl_be_p(r->buf + at + 4), ==, 12);
            r->frame(frame_number(r->buf + at + 8 + 12));
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

static void read_peer(Redirector *r)
{
    /* QEMU ends a connection that is in the middle of a frame. */
    if (r->fd >= 0 && !peer_read(r)) {
        g_assert_false(r->exists);
        peer_closed(r);
    }
}

/*
 * Whether all has come to cap that is not lost, if its peer reads: what the
 * host sent up to the frame @end, and the guest up to @guest_end
 */
static bool cap_has(uint32_t end, uint32_t guest_end)
{
    if (!cap_stalled) {
        read_peer(&cap);
    }
    return cap.fd < 0 || cap_stalled || cap_gaps ||
           ((cap_fresh ? cap_max : cap_next) >= end &&
            cap_next_guest >= guest_end);
}

static void inject(unsigned count)
{
    while (count && inj.fd >= 0) {
        ssize_t n;

        if (!inj_rest_len) {
            make_record(inj_rest, INJECTED | inj_sent);
            inj_rest_len = RECORD_LEN;
            inj_sent++;
        }
        n = send(inj.fd, inj_rest + RECORD_LEN - inj_rest_len, inj_rest_len,
                 MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0) {
            if (errno != EAGAIN) {
                /* Ended by QEMU: inj was deleted in the middle of a frame. */
                g_assert_true(inj_may_lose);
                peer_closed(&inj);
                inj_rest_len = 0;
            }
            return;
        }
        inj_rest_len -= n;
        count -= !inj_rest_len;
    }
}

/* The guest sends, and each frame is waited for where it must come to. */
static void guest_traffic(unsigned count)
{
    for (unsigned i = 0; i < count; i++) {
        guest_put(&f, FROM_GUEST | guest_sent);
        expect_host(&f, FROM_GUEST | guest_sent, 1);
        guest_sent++;
    }
    if (cap_active() && cap_all) {
        WAIT_UNTIL(cap_has(0, guest_sent));
    }
}

/* Packets that sav has ever taken */
static uint64_t taken(void)
{
    return sav_taken +
           (sav.exists ? counter(&f, "sav", "capture-packets") : 0);
}

/* Frames that inj has ever injected */
static uint64_t injected(void)
{
    return inj_injected +
           (inj.exists ? counter(&f, "inj", "inject-packets") : 0);
}

/* Frames that are in the TAP, or in the guest's ring */
static int64_t waiting(void)
{
    uint64_t gone = guest_frames + taken();

    return sent() + injected() - gone;
}

static void pump(void)
{
    guest_take(&f, guest_frame, NULL);
    if (!cap_stalled) {
        read_peer(&cap);
    }
    read_peer(&sav);
    /* QEMU and the connection hold as much as half of the TAP's queue. */
    if (inj_sent >= inj_allowed && waiting() < QUEUE_LEN / 8) {
        inj_allowed = inj_sent + QUEUE_LEN / 8;
    }
    if (inj_sent < inj_allowed && chance(0.5)) {
        inject(g_rand_int_range(rng, 1, 20));
    }
    if (running && chance(0.2)) {
        guest_traffic(g_rand_int_range(rng, 1, 5));
    }
}

/* Whether each frame that went into the TAP is taken or at the guest */
static bool settled(void)
{
    int64_t left;

    guest_take(&f, guest_frame, NULL);
    read_peer(&sav);
    left = waiting();
    g_assert_cmpint(left, >=, 0);
    return !left;
}

/* Whether sav's peer has all that was taken */
static bool sav_settled(void)
{
    uint64_t all;

    read_peer(&sav);
    all = taken();
    g_assert_cmpuint(sav_frames + sav_lost, <=, all);
    return sav_frames + sav_lost == all;
}

/* What is done, see commands[] */

static void set_on(Redirector *r, bool on)
{
    set_status(&f, r->id, on ? "on" : "off");
    r->on = on;
}

static void toggle(Redirector *r)
{
    set_on(r, !r->on);
}

static void come(Redirector *r)
{
    r->fd = connect_to(&f, r->id);
    expect_connected(&f, r->id, true);
}

/* QEMU closes the connection, and what was written before is read. */
static void leave(Redirector *r)
{
    if (r->exists) {
        g_assert_cmpint(shutdown(r->fd, SHUT_WR), ==, 0);
        WAIT_UNTIL(!peer_read(r));
    } else {
        /* Nobody would see that, nor write any more. */
        peer_read(r);
    }
    peer_closed(r);
    expect_connected(&f, r->id, false);
}

static void add(Redirector *r, const char *properties)
{
    r->on = chance(0.7);
    object_add(&f, "-object filter-redirector,id=%s,netdev=n0,status=%s,"
               "vnet_hdr_support=on,%s", r->id, r->on ? "on" : "off",
               properties);
    r->exists = true;
}

static void cap_add(Redirector *r)
{
    g_autofree char *properties = NULL;

    cap_all = chance(0.5);
    cap_when_stopped = chance(0.5);
    cap_gaps = cap_frames = 0;
    properties = g_strdup_printf("outdev=cap,queue=%s,enable_when_stopped=%s",
                                 cap_all ? "all" : "tx",
                                 cap_when_stopped ? "on" : "off");
    add(r, properties);
}

static void cap_del(Redirector *r)
{
    if (cap_active() && chance(0.5)) {
        uint32_t from = sent();

        set_on(r, false);
        WAIT_UNTIL(cap_has(from, 0));
    }
    g_assert_cmpuint(cap_gaps, <=, counter(&f, "cap", "capture-kernel-drops"));
    g_assert_cmpuint(cap_frames, <=, counter(&f, "cap", "capture-packets"));
    r->exists = false;
    del_object(&f, "cap");
}

static void cap_leave(Redirector *r)
{
    if (chance(0.5)) {
        leave(r);
    } else {
        peer_closed(r);
        expect_connected(&f, "cap", false);
    }
}

static void cap_stall(Redirector *r)
{
    cap_stalled = !cap_stalled;
}

static void sav_add(Redirector *r)
{
    add(r, "outdev=sav,queue=" STOPPED_ONLY);
}

static void sav_del(Redirector *r)
{
    if (r->on && !running && r->fd >= 0 && chance(0.5)) {
        /* All are taken; some may still wait for the peer. */
        hold_sender(true);
        WAIT_UNTIL(settled());
    } else {
        set_on(r, false);
    }
    sav_taken = taken();
    if (chance(0.5)) {
        read_peer(r);
    }
    r->exists = false;
    del_object(&f, "sav");
    if (r->fd < 0) {
        /* Who had no peer loses what it had taken. */
        sav_lost = sav_taken - sav_frames;
    }
    WAIT_UNTIL(sav_settled());
    hold_sender(false);
}

static void inj_add(Redirector *r)
{
    add(r, chance(0.3) ? "indev=inj,queue=tx,enable_when_stopped=on" :
                         "indev=inj,queue=tx");
}

static void inj_del(Redirector *r)
{
    /* What it has not injected yet is lost with it. */
    set_on(r, false);
    inj_injected = injected();
    inj_may_lose = true;
    r->exists = false;
    del_object(&f, "inj");
}

static int inj_unread(void)
{
    int unread;

    g_assert_cmpint(ioctl(inj.fd, SIOCOUTQ, &unread), ==, 0);
    return unread;
}

static void inj_leave(Redirector *r)
{
    gint64 end = g_get_monotonic_time() + G_USEC_PER_SEC / 2;

    /* What QEMU has read survives, and this tells what it has not. */
    do {
        pump();
        if (r->fd < 0) {
            return;
        }
    } while (r->exists && r->on && inj_unread() &&
             g_get_monotonic_time() < end && chance(0.99));
    inj_may_lose |= inj_unread() || inj_rest_len;
    inj_rest_len = 0;
    peer_closed(r);
    expect_connected(&f, "inj", false);
}

static void stop(Redirector *r)
{
    vm_stop(&f);
    running = false;
}

static void cont(Redirector *r)
{
    vm_cont(&f);
    running = true;
}

static void migrate(Redirector *r)
{
    migration_start(&f, "exec:cat > /dev/null");
    running = false;
    migrating = true;
}

static void cancel(Redirector *r)
{
    migration_cancel(&f);
    migrating = false;
    running = true;
}

/* It ends well, and then the VM goes on at its source. */
static void complete(Redirector *r)
{
    qtest_qmp_assert_success(f.qts, "{'execute': 'migrate-continue',"
                             " 'arguments': {'state': 'pre-switchover'}}");
    expect_status(&f, "query-migrate", "completed");
    migrating = false;
}

static void traffic(Redirector *r)
{
    gint64 end = g_get_monotonic_time() + g_rand_int_range(rng, 0, 100000);

    do {
        pump();
    } while (g_get_monotonic_time() < end);
}

/* What is begun goes on.  Returns whether all that was sent is injected. */
static bool all_injected(void)
{
    inject(!!inj_rest_len);
    guest_take(&f, guest_frame, NULL);
    return injected() + inj_lost == inj_sent;
}

/* Wait until all that inj's peer has sent is injected; the VM runs. */
static void check_injected(void)
{
    if (inj_may_lose) {
        uint32_t last;

        /* When this one comes, those before have come or are lost. */
        inject(1);
        last = inj_sent - 1;
        WAIT_UNTIL(all_injected() || inj.fd < 0 || arrived[1][last]);
        if (inj.fd < 0) {
            return;
        }
        inj_lost = inj_sent - injected();
        inj_may_lose = false;
    }
    WAIT_UNTIL(all_injected());
}

/* Everything has come to where it is due. */
static void check(Redirector *r)
{
    if (!running && !(sav.exists && sav.on && sav.fd >= 0)) {
        return;
    }
    hold_sender(true);
    WAIT_UNTIL(settled());
    if (sav.fd >= 0) {
        WAIT_UNTIL(sav_settled());
    }
    if (cap_active()) {
        WAIT_UNTIL(cap_has(sent(), 0));
    }
    if (running && inj.exists && inj.on && inj.fd >= 0) {
        check_injected();
    }
    hold_sender(false);
}

typedef struct Command {
    void (*func)(Redirector *r);
    Redirector *r;
    enum {
        ANY_TIME,
        NOT_ADDED,          /* like those to PEER, of the redirector */
        ADDED,
        NO_PEER,
        PEER,
        RUNNING,            /* of the VM */
        STOPPED,
        MIGRATING,
    } when;
    unsigned weight;
    const char *name;
} Command;

static const Command commands[] = {
    { cap_add, &cap, NOT_ADDED, 3, "cap is added" },
    { cap_del, &cap, ADDED, 2, "cap is deleted" },
    { toggle, &cap, ADDED, 3, "cap goes on or off" },
    { come, &cap, NO_PEER, 4, "cap's peer comes" },
    { cap_leave, &cap, PEER, 2, "cap's peer leaves" },
    { cap_stall, &cap, ANY_TIME, 2, "cap's peer stops or begins to read" },
    { sav_add, &sav, NOT_ADDED, 3, "sav is added" },
    { sav_del, &sav, ADDED, 2, "sav is deleted" },
    { toggle, &sav, ADDED, 3, "sav goes on or off" },
    { come, &sav, NO_PEER, 4, "sav's peer comes" },
    { leave, &sav, PEER, 2, "sav's peer leaves" },
    { inj_add, &inj, NOT_ADDED, 3, "inj is added" },
    { inj_del, &inj, ADDED, 2, "inj is deleted" },
    { toggle, &inj, ADDED, 3, "inj goes on or off" },
    { come, &inj, NO_PEER, 4, "inj's peer comes" },
    { inj_leave, &inj, PEER, 2, "inj's peer leaves" },
    { stop, NULL, RUNNING, 4, "stop" },
    { cont, NULL, STOPPED, 6, "cont" },
    { migrate, NULL, RUNNING, 2, "migrate" },
    { cancel, NULL, MIGRATING, 4, "cancel" },
    { complete, NULL, MIGRATING, 3, "the migration completes" },
    { traffic, NULL, ANY_TIME, 15, "traffic" },
    { check, NULL, ANY_TIME, 4, "check" },
};

static bool possible(const Command *c)
{
    switch (c->when) {
    case NOT_ADDED:
        return !c->r->exists;
    case ADDED:
        return c->r->exists;
    case NO_PEER:
        return c->r->fd < 0;
    case PEER:
        return c->r->fd >= 0;
    case RUNNING:
        return running;
    case STOPPED:
        return !running && !migrating;
    case MIGRATING:
        return migrating;
    default:
        return true;
    }
}

/* Once it has ceased to be active, all of that time is there. */
static bool cap_drained(void)
{
    bool pending = cap.exists && cap.fd >= 0 && capture_pending(&f, "cap");

    read_peer(&cap);
    return !pending;
}

/* Do one if it is possible, and see that cap gets what it must. */
static void command(const Command *c)
{
    bool was_active = cap_active();
    uint32_t from;

    if (!was_active) {
        WAIT_UNTIL(cap_drained());
    } else if (!cap_stalled) {
        read_peer(&cap);
    }
    if (!possible(c)) {
        return;
    }
    from = sent();
    history[done % HISTORY] = c->name;
    c->func(c->r);
    done++;
    if (!was_active && cap_active()) {
        expect_source(&f, "cap", "packet-socket");
        cap_fresh = true;
        cap_min = from;
        /* One may have passed cap, and not count as sent yet. */
        cap_max = sent() + 1;
        cap_next_guest = guest_sent;
        cap_stalled = false;
    }
    /* A deleted one can leave nothing for its peer. */
    if (was_active && !cap_active() && cap.exists) {
        WAIT_UNTIL(cap_has(from, 0));
    }
}

static const Command *draw(void)
{
    const Command *c;
    unsigned sum = 0, at;

    for (int i = 0; i < ARRAY_SIZE(commands); i++) {
        sum += commands[i].weight;
    }
    at = g_rand_int_range(rng, 0, sum);
    for (c = commands; at >= c->weight; c++) {
        at -= c->weight;
    }
    return c;
}

static void perform(void (*func)(Redirector *r), const Redirector *r)
{
    for (int i = 0; i < ARRAY_SIZE(commands); i++) {
        if (commands[i].func == func && commands[i].r == r) {
            command(&commands[i]);
        }
    }
}

/* A running VM without redirectors, all peers there, nothing on its way */
static void rest(void)
{
    perform(cancel, NULL);
    perform(cont, NULL);
    perform(come, &cap);
    perform(come, &sav);
    perform(come, &inj);
    if (!inj.on) {
        perform(toggle, &inj);
    }
    perform(check, NULL);
    perform(cap_del, &cap);
    perform(sav_del, &sav);
    perform(inj_del, &inj);
    perform(check, NULL);
    WAIT_UNTIL(cap_drained());
    /* A peer whose connection was ended in the middle of a frame */
    perform(come, &cap);
    inject(1);
    perform(come, &inj);
}

static void test_random(void)
{
    uint32_t seed = g_test_slow() ? g_test_rand_int() : 20240229;
    gint64 end, next_rest = 0;
    unsigned rests = 0;
    GThread *sender;
    int fds;

    rng = g_rand_new_with_seed(seed);
    fixture_start(&f, "");
    run_command("ip link set %s txqueuelen %d", f.ifname, QUEUE_LEN);
    guest_start(&f);
    guest_post_all(&f);
    running = true;
    cap.fd = add_peer(&f, "cap");
    sav.fd = add_peer(&f, "sav");
    inj.fd = add_peer(&f, "inj");
    sender_fd = open_host(f.ifname);
    sender = g_thread_new("sender", sender_thread, NULL);
    qtest_add_abrt_handler(tell, &f);

    /* A migration opens what it keeps. */
    perform(migrate, NULL);
    rest();
    fds = count_fds(&f);
    end = g_get_monotonic_time() +
          (g_test_slow() ? 60 : 10) * G_USEC_PER_SEC;
    while (g_get_monotonic_time() < end) {
        command(draw());
        pump();
        if (g_get_monotonic_time() > next_rest) {
            rest();
            WAIT_UNTIL(count_fds(&f) == fds);
            rests++;
            next_rest = g_get_monotonic_time() + 5 * G_USEC_PER_SEC;
        }
    }
    rest();
    WAIT_UNTIL(count_fds(&f) == fds);
    g_assert_cmpuint(statistic(f.ifname, "tx_dropped"), ==, 0);
    g_test_message("%u commands, %u times at rest", done, rests);
    g_test_message("%u frames sent to the guest, %" PRIu64 " injected, %u lost "
                   "with inj or before; %u sent by the guest", sent(),
                   injected(), inj_lost, guest_sent);
    g_test_message("%" PRIu64 " came to the guest, %" PRIu64 " were saved, %"
                   PRIu64 " lost with sav", guest_frames, sav_frames, sav_lost);

    qatomic_set(&sender_quit, true);
    g_thread_join(sender);
    close(sender_fd);
    close(cap.fd);
    close(sav.fd);
    close(inj.fd);
    qtest_remove_abrt_handler(&f);
    fixture_close(&f);
    g_rand_free(rng);
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
